"""mailcloakctl as root on a database that belongs to another user, who may put anything beside it."""

from __future__ import annotations

import os
import pwd
import struct
from pathlib import Path

import pytest
from conftest import run_ctl, short_directory

import mailcloak

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


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_journal_that_the_owner_plants_deletes_no_file_of_roots(theirs, tmp_path, command):
    tmp_path.chmod(0o700)
    (tmp_path / "aliases.csv").write_text("info@d1.test,alice\n", encoding="utf-8")
    run_ctl("--db", theirs, "backup", tmp_path / "older.db")
    victim = tmp_path / "victim"
    victim.write_text("root's", encoding="utf-8")
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
    result = run_ctl("--db", database, *words, check=False)
    assert "Traceback" not in result.stderr
    assert victim.exists(), result.stderr


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


def test_file_that_roots_copy_has_made_is_to_be_given_to_its_user(theirs, tmp_path):
    os.chown(theirs, 0, 0)
    os.chmod(theirs, 0o640)
    result = run_ctl("--db", theirs, "aliases", "list", check=False)
    assert "chown the file to user nobody, who owns its directory and has to read it" in result.stderr
