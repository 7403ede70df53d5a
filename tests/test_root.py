"""mailcloakctl as root on a database that belongs to another user, who may put anything beside it."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, as_nobody, run_ctl, short_directory

import mailcloak
import mailcloakcommon
import mailcloakowner

pytestmark = pytest.mark.real("root")

NOBODY = pwd.getpwnam("nobody")
PAGE_BYTES, SECTOR_BYTES, MAGIC = 4096, 512, bytes.fromhex("d9d505f920a163d7")


@pytest.fixture
def theirs(tmp_path):
    """A database of the user nobody, in a directory of theirs."""
    with short_directory() as directory:
        os.chown(directory, NOBODY.pw_uid, NOBODY.pw_gid)
        path = Path(directory) / "state.db"
        assert mailcloak.prepare_database(str(path), 5) == "created"
        run_ctl("--db", path, "aliases", "add", "info@d1.test", "alice")
        assert path.stat().st_uid == NOBODY.pw_uid
        yield path


def plant_journal(path, victim):
    """A journal as a killed writer leaves it, of a transaction over several files; SQLite deletes the file that it names last.

    Source: the SQLite database file format, section 3, "The Rollback Journal".
    """
    name = os.fsencode(victim)
    head = MAGIC + struct.pack(">IIIII", 0, 12345, path.stat().st_size // PAGE_BYTES, SECTOR_BYTES, PAGE_BYTES)
    checksum = sum(byte if byte < 128 else byte - 256 for byte in name) & 0xFFFFFFFF
    record = struct.pack(">I", 0x40000000 // PAGE_BYTES + 1) + name + struct.pack(">II", len(name), checksum) + MAGIC
    journal = Path(f"{path}-journal")
    journal.write_bytes(head.ljust(SECTOR_BYTES, b"\0") + record)
    os.chown(journal, NOBODY.pw_uid, NOBODY.pw_gid)


def make_victim(directory, mode):
    """A file in a directory that only root, or its group, may change."""
    private = directory / "private"
    private.mkdir()
    private.chmod(mode)
    victim = private / "victim"
    victim.write_text("root's", encoding="utf-8")
    return victim


def run_as_root(*arguments):
    """mailcloakctl as from a login of root, who is in the group root."""
    return run_ctl(*arguments, check=False, extra_groups=[0])


COMMANDS = {
    "aliases list": ("aliases", "list"),
    "aliases add": ("aliases", "add", "new@d1.test", "bob"),
    "aliases sync": ("aliases", "sync", "FILE", "--dry-run"),
    "apps list": ("apps", "list"),
    "db check": ("db", "check"),
    "backup": ("backup", "DIRECTORY/copy.db"),
    "restore": ("restore", "DIRECTORY/older.db"),
    "migrate-from-go": ("migrate-from-go", "THEIRS", "--dry-run"),
    "db mirror": ("db", "mirror", "DIRECTORY/older.db", "--adopt"),
}


@pytest.mark.parametrize("mode", [0o700, 0o770])
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_journal_that_the_owner_plants_deletes_no_file_of_roots(theirs, tmp_path, short_dir, command, mode):
    """Nor one that the group root may delete too, in which root is when it logs in."""
    (tmp_path / "aliases.csv").write_text("info@d1.test,alice\n", encoding="utf-8")
    run_ctl("--db", theirs, "backup", tmp_path / "older.db")
    victim = make_victim(short_dir, mode)
    plant_journal(theirs, victim)
    database, replaced = theirs, {"FILE": tmp_path / "aliases.csv", "DIRECTORY": tmp_path, "THEIRS": theirs}
    if "THEIRS" in command:
        database = tmp_path / "own.db"
        mailcloak.prepare_database(str(database), 5)
    words = []
    for word in command:
        for name, value in replaced.items():
            word = word.replace(name, str(value))
        words.append(word)
    result = run_as_root("--db", database, *words)
    assert "Traceback" not in result.stderr
    assert victim.exists(), result.stderr


STICKY_COMMANDS = {
    "database": ("--db", "COPY", "aliases", "list"),
    "new database": ("--db", "NEW", "aliases", "add", "info@d1.test", "alice"),
    "restored database": ("--db", "NEW", "restore", "OLDER"),
    "source": ("--db", "OWN", "db", "mirror", "COPY", "--adopt"),
    "database of Go": ("--db", "OWN", "migrate-from-go", "COPY", "--dry-run"),
}


@pytest.mark.parametrize("command", STICKY_COMMANDS.values(), ids=STICKY_COMMANDS)
def test_root_uses_no_database_where_everybody_can_put_a_journal_beside_it(tmp_path, command):
    own, older = tmp_path / "own.db", tmp_path / "older.db"
    assert mailcloak.prepare_database(str(own), 5) == "created"
    run_ctl("--db", own, "backup", older)
    victim = make_victim(tmp_path, 0o700)
    with short_directory() as directory:
        directory.chmod(0o1777)
        places = {"OWN": own, "OLDER": older, "COPY": directory / "copy.db", "NEW": directory / "new.db"}
        shutil.copy(own, places["COPY"])
        plant_journal(places["COPY"], victim)
        result = run_as_root(*(places.get(word, word) for word in command))
        assert result.returncode == 1
        assert "which others may write" in result.stderr
        assert "chmod" not in result.stderr  # of /tmp it would harm the host
        assert "Traceback" not in result.stderr
        assert victim.exists()
        assert {path.name for path in directory.iterdir()} == {"copy.db", "copy.db-journal"}


def test_links_in_a_circle_are_no_way(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    result = run_as_root("--db", tmp_path / "a" / "state.db", "aliases", "list")
    assert (result.returncode, "Too many levels of symbolic links" in result.stderr) == (1, True), result.stderr
    with pytest.raises(OSError, match="Too many levels"):
        mailcloakowner.owner_on_the_way(str(tmp_path / "a" / "state.db"))


def test_file_that_the_owner_names_as_published_is_read_as_the_owner(theirs, tmp_path):
    victim = make_victim(tmp_path, 0o700)
    with short_directory() as directory:
        directory.chmod(0o1777)
        named = directory / "published.db"
        shutil.copy(theirs, named)
        os.chown(named, NOBODY.pw_uid, NOBODY.pw_gid)
        plant_journal(named, victim)
        with contextlib.closing(sqlite3.connect(theirs)) as database, database:
            database.execute(
                "CREATE TABLE origin (id INTEGER PRIMARY KEY, role, writer, host, epoch, serial, published_at, digest, file)"
            )
            database.execute("INSERT INTO origin VALUES (1, 'writer', 'w', 'h', 1, 1, 1, 'x', ?)", (str(named),))
        config = tmp_path / "config.yaml"
        settings = {"policy": {"domain": "d1.test"}, "static_users": {"alice": "alice@d1.test"}, "sqlite": {"path": str(theirs)}}
        sockets = {"policy_socket": str(tmp_path / "p"), "socketmap_socket": str(tmp_path / "s"), "socket_owner_user": "root"}
        config.write_text(yaml.safe_dump({**settings, "sockets": sockets, "daemon": {"user": "nobody"}}), encoding="utf-8")
        assert "Traceback" not in run_as_root("--config", config, "status", "--prometheus", tmp_path / "x.prom").stderr
        assert "role" in (tmp_path / "x.prom").read_text(encoding="utf-8")
        assert victim.exists()


def test_backup_opens_no_database_in_the_directory_where_it_is_written(theirs, tmp_path):
    """Others may write there, and put a journal beside it."""
    code = "import sys, mailcloakctl; sys.addaudithook(lambda event, values: event == 'sqlite3.connect' and print(values[0]));"
    command = [sys.executable, "-c", f"{code} mailcloakctl.main(sys.argv[1:])", "--db", theirs, "backup", tmp_path / "copy.db"]
    opened = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=ROOT).stdout
    assert str(theirs) in opened
    assert f"{tmp_path}/copy.db written" in opened
    assert opened.count(str(tmp_path)) == 1


@pytest.mark.parametrize(
    ("layout", "owner"),
    [
        ("root 755 / root 755", "root"),
        ("root 755 / nobody 755 root", "nobody"),
        ("root 1777 / root 700", "root"),
        ("root 1777 / nobody 700", "nobody"),
        ("nobody 755 / root 700", "nobody"),
        ("root 777 / root 700", None),
        ("root 755 / root 1777", None),
        ("root 755 / root 2775 daemon", None),
        ("root 755 / root 775", None),
        ("root 755 / link to nobody 755", "nobody"),
        ("nobody 755 / link to root 755", "nobody"),
        ("root 1777 / nobody's link to root 755", "nobody"),
    ],
)
def test_root_acts_as_who_could_put_another_file_in_its_place(layout, owner):
    with short_directory() as top:
        place = top
        for number, step in enumerate(layout.split(" / ")):
            user, mode, *group = step.rpartition("link to ")[2].split()
            real = top / f"real{number}" if "link to" in step else place / f"d{number}"
            real.mkdir()
            shutil.chown(real, user, group[0] if group else None)
            real.chmod(int(mode, 8))
            if "link to" in step:
                (place / f"link{number}").symlink_to(real)
                os.chown(place / f"link{number}", NOBODY.pw_uid if "nobody's" in step else 0, 0, follow_symlinks=False)
                place /= f"link{number}"
            else:
                place = real
        if owner is None:
            with pytest.raises(PermissionError):
                mailcloakowner.owner_on_the_way(str(place / "state.db"))
        else:
            assert mailcloakowner.owner_on_the_way(str(place / "state.db")) == (
                pwd.getpwnam(owner).pw_uid,
                pwd.getpwnam(owner).pw_gid,
            )


def test_commands_of_root_work_on_a_database_of_another_user(theirs, tmp_path):
    tmp_path.chmod(0o700)  # only root gets at the backup
    copy = tmp_path / "copy.db"
    run_ctl("--db", theirs, "backup", copy)
    run_ctl("--db", theirs, "aliases", "del", "info@d1.test")
    assert "1 rows changed: 1 alias" in run_ctl("--db", theirs, "restore", copy).stdout
    assert run_ctl("--db", theirs, "aliases", "export").stdout.endswith("info@d1.test,alice,1\n")
    run_ctl("--db", theirs, "aliases", "del", "info@d1.test")
    assert "1 rows changed: 1 alias" in run_ctl("--db", theirs, "db", "mirror", copy, "--adopt").stdout
    assert {name.name: name.stat().st_uid for name in theirs.parent.iterdir()} == {"state.db": NOBODY.pw_uid}
    assert os.geteuid() == 0


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o666])
def test_no_remedy_changes_a_file_that_the_owner_has_led_a_link_to(theirs, tmp_path, make_config, mode):
    victim = make_victim(tmp_path, 0o700)
    victim.chmod(mode)
    theirs.unlink()
    theirs.symlink_to(victim)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(make_config(static_users={"alice": "alice@d1.test"}, sqlite={"path": str(theirs)})))
    for arguments in (("--db", theirs, "aliases", "list"), ("--config", config, "doctor")):
        result = run_ctl(*arguments, check=False)
        said = " ".join((result.stdout + result.stderr).split())
        assert "this is a link: if the file it leads to is the right one, name that in sqlite.path" in said
        assert not any(word in line for word in ("chown", "chmod") for line in result.stdout.splitlines() if str(theirs) in line)
        assert "chown" not in result.stderr


def test_file_that_roots_copy_has_made_is_to_be_given_to_its_user(theirs, tmp_path):
    os.chown(theirs, 0, 0)
    os.chmod(theirs, 0o640)
    result = run_ctl("--db", theirs, "aliases", "list", check=False)
    assert "chown the file to user nobody, who owns its directory and has to read it" in result.stderr


@pytest.mark.parametrize("is_file", [True, False], ids=["file", "directory"])
def test_database_that_its_owner_may_not_write_is_to_be_made_writable(theirs, is_file):
    place = theirs if is_file else theirs.parent
    place.chmod(0o440 if is_file else 0o550)
    said = run_ctl("--db", theirs, "aliases", "add", "x@d1.test", "bob", check=False).stderr
    assert said.endswith(f"attempt to write a readonly database, nothing was changed; chmod u+w {place}\n")
    error = sqlite3.OperationalError("attempt to write a readonly database")
    assert as_nobody(lambda: mailcloakcommon.database_remedy(error, str(theirs))) == f"chmod u+w {place}"
