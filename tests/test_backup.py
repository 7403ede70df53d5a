"""Backups: copied while others write, checked, brought back into the file that is there; and what db check finds and corrects."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import types

import pytest
from conftest import ROOT, run_ctl
from test_data import cron_lines, run_job
from test_mailcloakctl import Ctl

import mailcloak
import mailcloakctl
import mailcloakdata

TABLES = ("aliases", "apps", "app_from")


@pytest.fixture
def ctl(tmp_path):
    """The command on a database with two aliases, and an app that may send as one address."""
    path = tmp_path / "state.db"
    assert mailcloak.prepare_database(str(path), 5)
    ctl = Ctl(path)
    ctl.insert("aliases", "info@d1.test", "alice")
    ctl.insert("aliases", "sales@d1.test", "bob")
    ctl.insert("apps", "printer", "{SHA256}x")
    ctl.insert("app_from", "printer", "scan@d1.test")
    return ctl


def contents(path):
    with contextlib.closing(sqlite3.connect(path)) as database:
        return [sorted(database.execute(f"SELECT * FROM {table}").fetchall(), key=str) for table in TABLES]


@pytest.fixture
def copy(ctl):
    """A backup of it."""
    path = ctl.path.parent / "backup.db"
    ctl("backup", path)
    return path


# ---- backup


def test_signal_ends_a_command_whose_statement_has_no_end(ctl):
    """Another program has put a view in place of the table."""
    with contextlib.closing(sqlite3.connect(ctl.path)) as database, database:
        columns = "alias_email, username, enabled, updated_at, source, receive_only, external"
        database.execute("DROP TABLE aliases")
        endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i, i, 1, 1, '', 0, 0 FROM n ORDER BY -i"
        database.execute(f"CREATE VIEW aliases ({columns}) AS {endless}")
    command = [sys.executable, ROOT / "mailcloakctl.py", "--db", ctl.path, "aliases", "list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            time.sleep(1.5)
            assert process.poll() is None
            process.terminate()
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()  # it would fill the disk
    assert "Traceback" not in said
    assert process.returncode == 1, said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_backup_that_a_signal_ends_leaves_nothing_behind(ctl, tmp_path, number):
    with contextlib.closing(sqlite3.connect(ctl.path)) as database, database:
        database.execute("CREATE TABLE other AS SELECT zeroblob(100000000) AS data")  # so that it takes a moment
    place, private = tmp_path / "backups", tmp_path / "private"
    place.mkdir()
    private.mkdir()
    command = ["env", "--default-signal", sys.executable, ROOT / "mailcloakctl.py", "--db", ctl.path, "backup", place / "copy.db"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(private)})
    while process.poll() is None and not any(private.glob("*/copy.db")):
        pass
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (1, "mailcloakctl: interrupted, no alias or app was changed\n")
    assert [*place.iterdir(), *private.iterdir()] == []


def test_backup_is_a_whole_copy_for_its_owner_alone(ctl):
    path = ctl.path.parent / "backup.db"
    result = ctl("backup", path)
    assert (result.stdout, result.stderr) == (f"backup: {path} written: 2 aliases, 1 app\n", "")
    assert contents(path) == contents(ctl.path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(each.name for each in path.parent.iterdir()) == ["backup.db", "state.db"]
    assert json.loads(ctl("backup", path, "--replace", "--json").stdout) == {"file": str(path), "aliases": 2, "apps": 1}


@pytest.mark.parametrize("command", [("backup",), ("backup", "--replace"), ("restore",)], ids=" ".join)
def test_directory_in_place_of_a_file_is_called_one(ctl, tmp_path, command):
    assert f"{command[0]}: {str(tmp_path)!r} is a directory, name " in ctl.refuses(*command, tmp_path)


def test_backup_replaces_no_file_without_replace(ctl, copy):
    ctl("aliases", "del", "info@d1.test")
    before = copy.read_bytes()
    assert "is there already, --replace replaces it" in ctl.refuses("backup", copy)
    assert copy.read_bytes() == before
    ctl("backup", copy, "--replace")
    assert contents(copy) == contents(ctl.path)


def test_backup_that_cannot_be_made_is_refused(ctl):
    assert "is the database itself" in ctl.refuses("backup", ctl.path, "--replace")
    assert "cannot be written: No such file" in ctl.refuses("backup", ctl.path.parent / "absent" / "x.db")
    absent = Ctl(ctl.path.parent / "absent.db")
    assert "does not exist yet" in absent.refuses("backup", ctl.path.parent / "x.db")
    assert [each.name for each in ctl.path.parent.iterdir()] == ["state.db"]


def test_backup_of_a_database_in_wal_mode_is_one_file(ctl):
    with contextlib.closing(sqlite3.connect(ctl.path)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("UPDATE aliases SET username = 'carol'")
        database.commit()
        ctl("backup", ctl.path.parent / "backup.db")
    path = ctl.path.parent / "backup.db"
    assert path.read_bytes()[18:20] == b"\1\1"  # rollback journal, section 1.3 of the file format
    assert {row[1] for row in contents(path)[0]} == {"carol"}


def test_backup_while_others_write_is_one_state_of_the_database(ctl, monkeypatch):
    """Each commit changes all rows together."""
    with contextlib.closing(sqlite3.connect(ctl.path)) as database, database:
        rows = [(f"a{number}@d1.test", "0") for number in range(20_000)]
        database.executemany("INSERT INTO aliases (alias_email, username) VALUES (?, ?)", rows)
        database.execute("UPDATE aliases SET username = '0'")
    monkeypatch.setattr(mailcloakdata, "BACKUP_PAGES", 50)
    done = threading.Event()

    def write():
        with contextlib.closing(sqlite3.connect(ctl.path, timeout=30)) as database:
            for number in range(1, 1000):
                if done.is_set():
                    return
                with database:
                    database.execute("UPDATE aliases SET username = ?", (str(number),))
                time.sleep(0.3)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(3):
            path = str(ctl.path.parent / f"{number}.db")
            assert mailcloakctl.main(["--db", str(ctl.path), "backup", path]) == 0
    finally:
        done.set()
        writer.join()
    assert [len({row[1] for row in contents(ctl.path.parent / f"{number}.db")[0]}) for number in range(3)] == [1, 1, 1]


def test_nightly_job_of_readme_keeps_seven_copies(ctl, tmp_path):
    (job,) = cron_lines("mailcloakctl backup")
    directory = tmp_path / "backups"
    directory.mkdir()
    for day in range(1, 11):
        date = tmp_path / "date"
        date.write_text(f'#!/bin/sh\nexec /bin/date -d 2027-01-{day:02} "$@"\n')
        date.chmod(0o755)
        # cron reads \% as %
        result = run_job(job.replace("\\%", "%"), ctl, tmp_path, [("/var/backups/mailcloak", directory)])
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        ctl("aliases", "add", f"day{day}@d1.test", "alice")
    kept = sorted(len(contents(path)[0]) for path in directory.iterdir())
    assert kept == [5, 6, 7, 8, 9, 10, 11]  # of days 4 to 10


# ---- restore


def change_much(ctl):
    ctl("aliases", "add", "new@d1.test", "carol")
    ctl("aliases", "del", "info@d1.test")
    ctl("aliases", "disable", "sales@d1.test")
    ctl("apps", "add", "shop", "--generate")
    ctl("apps", "allow", "shop", "shop@d1.test")
    ctl("apps", "set", "printer", "--owner", "carol")
    ctl("apps", "disallow", "printer", "scan@d1.test")


def test_restore_brings_back_all_tables_into_the_same_file(ctl, copy):
    before, inode = contents(ctl.path), ctl.path.stat().st_ino
    with contextlib.closing(sqlite3.connect(ctl.path)) as other:  # as Dovecot, which keeps the file open
        change_much(ctl)
        other.execute("SELECT count(*) FROM aliases").fetchone()
        result = ctl("restore", copy)
        assert other.execute("SELECT alias_email FROM aliases ORDER BY 1").fetchall() == [("info@d1.test",), ("sales@d1.test",)]
    assert result.stdout == f"restore: {ctl.path} is as {copy}, 7 rows changed: 2 aliases, 1 app\n"
    assert (contents(ctl.path), ctl.path.stat().st_ino) == (before, inode)


def test_restore_names_what_it_takes_away_and_a_dry_run_changes_nothing(ctl, copy):
    for number in range(7):
        ctl.insert("aliases", f"new{number}@d1.test", "carol")
    ctl.insert("apps", "scanner", "{SHA256}y")
    ctl("aliases", "add", "info@d1.test", "carol", "--replace")
    before = contents(ctl.path)
    lacks = f"restore: {copy} lacks these aliases, which {{}} gone: new0@d1.test, new1@d1.test"
    said = ctl("restore", copy, "--dry-run")
    assert lacks.format("would be") in said.stderr
    assert "lacks these apps, which would be gone: scanner\n" in said.stderr
    assert f"restore: {ctl.path} would be as {copy}, 9 rows would be changed: 2 aliases, 1 app\n" in said.stdout
    shown = json.loads(ctl("restore", copy, "--dry-run", "--json").stdout)
    assert (shown["changed"], shown["rows"], shown["aliases"], shown["gone"]["apps"]) == (False, 9, 2, ["scanner"])
    assert contents(ctl.path) == before
    assert lacks.format("are") in ctl("restore", copy).stderr
    assert contents(ctl.path) == contents(copy)
    ctl.path.unlink()
    assert "would be made from" in ctl("restore", copy, "--dry-run").stderr
    assert not ctl.path.exists()
    ctl.path.touch()
    assert "rows would be changed: 2 aliases, 1 app" in ctl("restore", copy, "--dry-run").stdout
    assert ctl.path.stat().st_size == 0
    ctl.path.unlink()
    ctl.path.symlink_to("absent.db")
    assert "cannot be made: its directory, or what it leads to, is missing" in ctl("restore", copy, check=False).stderr


def test_restore_names_what_comes_back_to_life(ctl, copy):
    ctl("apps", "del", "printer")
    ctl("aliases", "disable", "info@d1.test")
    for words, would in ((("--dry-run",), "would be"), ((), "are")):
        said = ctl("restore", copy, *words).stderr
        assert f"restore: these apps {would} there again, or enabled again: printer\n" in said
        assert f"restore: these aliases {would} there again, or enabled again: info@d1.test\n" in said


def test_restore_of_what_is_there_writes_nothing(ctl, copy):
    before = ctl.path.read_bytes()
    nothing = {"aliases": [], "apps": []}
    said = {"changed": False, "dry_run": False, "rows": 0, "gone": nothing, "back": nothing, "aliases": 2, "apps": 1}
    assert json.loads(ctl("restore", copy, "--json").stdout) == said
    assert ctl.path.read_bytes() == before


@pytest.mark.parametrize("lost", ["missing", "missing, last-known.db is there", "empty"])
def test_restore_makes_a_database_that_is_lost(ctl, copy, lost):
    before = contents(ctl.path)
    if lost == "empty":
        ctl.path.write_bytes(b"")
    else:
        ctl.path.unlink()
    if "last-known" in lost:
        (ctl.path.parent / "last-known.db").write_bytes(b"")
        assert "restore it from a backup" in ctl.refuses("aliases", "add", "new@d1.test", "bob")
    ctl("restore", copy)
    assert contents(ctl.path) == before
    assert ctl.rows("PRAGMA user_version") == [(mailcloak.SCHEMA_VERSION,)]
    assert [each.name for each in ctl.path.parent.iterdir() if "restored" in each.name] == []
    assert ctl("db", "check").stdout == "db: nothing is wrong: 2 aliases, 1 app\n"


def test_restore_leaves_columns_and_rows_of_other_programs_alone(ctl, copy):
    """A column that only the database has, with a space in its name, and rows of the backup that have no key."""
    with contextlib.closing(sqlite3.connect(ctl.path)) as database, database:
        database.execute('ALTER TABLE aliases ADD COLUMN "my note" TEXT')
        database.execute("""UPDATE aliases SET "my note" = 'kept'""")
        database.execute("UPDATE aliases SET username = 'carol' WHERE alias_email = 'sales@d1.test'")
    with contextlib.closing(sqlite3.connect(copy)) as database, database:
        database.execute("INSERT INTO aliases (alias_email, username) VALUES (NULL, 'bob')")
    for changed in (1, 0):
        result = ctl("restore", copy)
        assert f"{changed} rows changed" in result.stdout
        assert "None" not in result.stdout + result.stderr
    assert ctl.rows('SELECT username, "my note" FROM aliases ORDER BY 1') == [("alice", "kept"), ("bob", "kept")]


def test_restore_of_an_older_version_fills_the_columns_that_it_lacks(ctl, copy):
    with contextlib.closing(sqlite3.connect(copy)) as database, database:
        database.execute("CREATE TABLE older AS SELECT app_id, secret_hash, enabled, created_at FROM apps")
        database.execute("PRAGMA foreign_keys = OFF")
        database.execute("DROP TABLE apps")
        database.execute("ALTER TABLE older RENAME TO apps")
        database.execute("PRAGMA user_version = 1")
    before = contents(ctl.path)
    change_much(ctl)
    ctl("restore", copy)
    assert contents(ctl.path) == before
    assert contents(copy) != before, "the backup itself was migrated"


def break_pages(path):
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    path.write_bytes(data)


def no_mailcloak(path):
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE other (x)")


def newer(path):
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA user_version = {mailcloak.SCHEMA_VERSION + 1}")


BAD_BACKUPS = {
    "missing": (lambda path: path.unlink(), "No such file"),
    "damaged": (break_pages, "is damaged"),
    "cut": (lambda path: os.truncate(path, 5000), "malformed|is damaged"),
    "text": (lambda path: path.write_text("alias,username\n" * 100), "file is not a database"),
    "empty": (lambda path: path.write_bytes(b""), "is no database of mailcloak"),
    "of another program": (no_mailcloak, "is no database of mailcloak"),
    "newer": (newer, "install the newer one first"),
}


@pytest.mark.parametrize(("spoil", "says"), BAD_BACKUPS.values(), ids=BAD_BACKUPS)
def test_restore_of_a_bad_backup_is_refused(ctl, copy, spoil, says):
    spoil(copy)
    message = ctl.refuses("restore", copy)
    assert any(each in message for each in says.split("|")), message


def test_restore_over_a_damaged_database_says_what_to_do(ctl, copy):
    before = contents(ctl.path)
    break_pages(ctl.path)
    message = ctl.refuses("restore", copy)
    assert f"stop mailcloak and Dovecot, move {ctl.path} away, run this again, and start them" in message
    ctl.path.rename(ctl.path.parent / "damaged.db")
    ctl("restore", copy)
    assert contents(ctl.path) == before


def test_restore_of_the_database_itself_is_refused(ctl):
    assert "is the database itself" in ctl.refuses("restore", ctl.path)


def test_restore_leaves_out_addresses_of_an_app_that_is_not_there(ctl, copy):
    with contextlib.closing(sqlite3.connect(copy)) as database, database:
        database.execute("INSERT INTO app_from (app_id, from_addr) VALUES ('gone', 'x@d1.test')")
    before = contents(ctl.path)
    change_much(ctl)
    ctl("restore", copy)
    assert contents(ctl.path) == before


def test_daemon_answers_from_what_was_restored(static_daemon, tmp_path):
    static_daemon.ctl("aliases", "add", "info@d1.test", "alice")
    static_daemon.ctl("backup", str(tmp_path / "backup.db"))
    static_daemon.ctl("aliases", "del", "info@d1.test")
    assert static_daemon.ask_map("alias info@d1.test") == "NOTFOUND "
    static_daemon.ctl("restore", str(tmp_path / "backup.db"))
    assert static_daemon.ask_map("alias info@d1.test") == "OK alice@d1.test"


@pytest.mark.long
def test_kill_in_a_restore_leaves_the_old_state_or_the_new(ctl, copy):
    with contextlib.closing(sqlite3.connect(copy)) as database, database:
        rows = [(f"a{number}@d1.test", "alice") for number in range(30_000)]
        database.executemany("INSERT INTO aliases (alias_email, username) VALUES (?, ?)", rows)
    old, new = contents(ctl.path), contents(copy)
    command = [sys.executable, str(ROOT / "mailcloakctl.py"), "--db", str(ctl.path), "restore", str(copy)]
    for number in range(8):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            time.sleep(0.15 + 0.07 * number)
            process.send_signal(signal.SIGKILL)
        assert contents(ctl.path) in (old, new)
    ctl("restore", copy)
    assert contents(ctl.path) == new


# ---- db check


def faults(ctl, *options, code):
    result = ctl("db", "check", "--json", *options, check=False)
    assert result.returncode == code, result.stderr
    return [(row["table"], row["key"], row["remedy"]) for row in json.loads(result.stdout)]


CORRECTED = "db check --fix corrects it"
FAULTS = {  # statement, key of the fault, is it corrected, what is there after it
    "alias in capitals": (
        "INSERT INTO aliases (alias_email, username) VALUES ('New@D1.test', 'bob')",
        ("aliases", "New@D1.test"),
        ("SELECT username FROM aliases WHERE alias_email = 'new@d1.test'", [("bob",)]),
    ),
    "alias in capitals, also there": (
        "INSERT INTO aliases (alias_email, username) VALUES ('INFO@d1.test', 'Alice')",
        ("aliases", "INFO@d1.test"),
        ("SELECT alias_email FROM aliases WHERE username LIKE 'alice'", [("info@d1.test",)]),
    ),
    "alias with a U-label": (
        "INSERT INTO aliases (alias_email, username) VALUES ('x@bücher.test', 'bob')",
        ("aliases", "x@bücher.test"),
        ("SELECT username FROM aliases WHERE alias_email = 'x@xn--bcher-kva.test'", [("bob",)]),
    ),
    "alias in capitals, for another user": (
        "INSERT INTO aliases (alias_email, username) VALUES ('INFO@d1.test', 'bob')",
        ("aliases", "INFO@d1.test"),
        None,
    ),
    "alias that is no address": (
        "INSERT INTO aliases (alias_email, username) VALUES ('info', 'bob')",
        ("aliases", "info"),
        None,
    ),
    "alias that is not UTF-8": (
        "INSERT INTO aliases (alias_email, username) VALUES (CAST(x'ff' AS TEXT), 'bob')",
        ("aliases", "\\udcff"),
        None,
    ),
    "alias that is a BLOB": ("INSERT INTO aliases (alias_email, username) VALUES (x'61', 'bob')", ("aliases", "b'a'"), None),
    "username in capitals": (
        "UPDATE aliases SET username = 'ALICE' WHERE username = 'alice'",
        ("aliases", "info@d1.test"),
        ("SELECT username FROM aliases WHERE alias_email = 'info@d1.test'", [("alice",)]),
    ),
    "username that is a BLOB": ("UPDATE aliases SET username = x'61' WHERE username = 'alice'", ("aliases", "info@d1.test"), None),
    "two usernames": ("UPDATE aliases SET username = 'x, y' WHERE username = 'alice'", ("aliases", "info@d1.test"), None),
    "app in capitals": (
        "INSERT INTO apps (app_id, secret_hash) VALUES ('Shop', 'x')",
        ("apps", "Shop"),
        ("SELECT app_id FROM apps", [("printer",), ("shop",)]),
    ),
    "app in capitals, also there": ("INSERT INTO apps (app_id, secret_hash) VALUES ('Printer', 'x')", ("apps", "Printer"), None),
    "app that is a BLOB": ("INSERT INTO apps (app_id, secret_hash) VALUES (x'61', 'x')", ("apps", "b'a'"), None),
    "owner that is a BLOB": ("UPDATE apps SET owner = x'61'", ("apps", "printer"), None),
    "owner that is empty": ("UPDATE apps SET owner = ''", ("apps", "printer"), None),
    "owner in capitals": (
        "UPDATE apps SET owner = 'Alice'",
        ("apps", "printer"),
        ("SELECT owner FROM apps", [("alice",)]),
    ),
    "sender in capitals": (
        "INSERT INTO app_from (app_id, from_addr) VALUES ('printer', 'SCAN@d1.test')",
        ("app_from", "printer SCAN@d1.test"),
        ("SELECT from_addr FROM app_from", [("scan@d1.test",)]),
    ),
    "sender that is no address": (
        "INSERT INTO app_from (app_id, from_addr) VALUES ('printer', CAST(x'ff' AS TEXT))",
        ("app_from", "printer \\udcff"),
        ("SELECT from_addr FROM app_from", [("scan@d1.test",)]),
    ),
    "sender that is a BLOB": (
        "INSERT INTO app_from (app_id, from_addr) VALUES ('printer', x'61')",
        ("app_from", "printer b'a'"),
        ("SELECT from_addr FROM app_from", [("scan@d1.test",)]),
    ),
    "sender of no app": (
        "INSERT INTO app_from (app_id, from_addr) VALUES ('gone', 'x@d1.test')",
        ("app_from", "gone"),
        ("SELECT from_addr FROM app_from", [("scan@d1.test",)]),
    ),
}


@pytest.mark.parametrize(("statement", "key", "after"), FAULTS.values(), ids=FAULTS)
def test_fault_is_found_and_corrected_where_that_leaves_no_doubt(ctl, statement, key, after):
    with contextlib.closing(sqlite3.connect(ctl.path)) as database, database:
        database.execute(statement)
    before = ctl.path.read_bytes()
    ((*found, remedy),) = faults(ctl, code=1)
    assert (tuple(found), remedy == CORRECTED) == (key, after is not None)
    assert ctl.path.read_bytes() == before
    assert [(*each[:2], each[2] == "fixed") for each in faults(ctl, "--fix", code=1 if after is None else 0)] == [
        (*key, after is not None)
    ]
    if after:
        assert ctl.rows(after[0]) == after[1]
        assert faults(ctl, code=0) == []
    else:
        assert ctl.path.read_bytes() == before


def test_two_apps_that_become_one_are_not_joined(ctl):
    """Or one would get the addresses of the other."""
    with contextlib.closing(sqlite3.connect(ctl.path)) as database, database:
        database.execute("INSERT INTO apps (app_id, secret_hash) VALUES ('Shop', 'x'), ('SHOP', 'y')")
        database.execute("INSERT INTO app_from (app_id, from_addr) VALUES ('Shop', 'a@d1.test'), ('SHOP', 'b@d1.test')")
    faults(ctl, "--fix", code=1)
    assert ctl.senders() == [("Shop", "a@d1.test", 1), ("printer", "scan@d1.test", 1), ("shop", "b@d1.test", 1)]


def test_two_spellings_of_one_alias_become_one(ctl):
    for address in ("A@d1.test", "a@D1.test", "A@D1.test"):
        ctl.insert("aliases", address, "bob")
    faults(ctl, "--fix", code=0)
    assert [row[0] for row in ctl.aliases()] == ["a@d1.test", "info@d1.test", "sales@d1.test"]


def test_damage_and_missing_columns_are_found(ctl):
    with contextlib.closing(sqlite3.connect(ctl.path)) as database:
        database.execute("ALTER TABLE aliases DROP COLUMN updated_at")
    assert faults(ctl, code=1) == [("aliases", "updated_at", "mailcloakctl restore brings back a backup")]


def test_damage_of_an_index_is_found(ctl):
    with contextlib.closing(sqlite3.connect(ctl.path)) as database:
        database.execute("PRAGMA writable_schema = ON")
        database.execute(
            "UPDATE sqlite_master SET sql = 'CREATE INDEX aliases_username ON aliases (enabled)' WHERE name = 'aliases_username'"
        )
        database.commit()
    assert {(table, remedy) for table, _, remedy in faults(ctl, code=1)} == {("-", "mailcloakctl restore brings back a backup")}


def test_check_leaves_the_tables_of_other_programs_alone(ctl):
    with contextlib.closing(sqlite3.connect(ctl.path)) as database, database:
        database.execute("CREATE TABLE notes (note TEXT, alias_email TEXT REFERENCES aliases)")
        database.execute("INSERT INTO notes VALUES ('of an alias that is gone', 'gone@d1.test')")
    assert ctl("db", "check", "--fix").stdout == "db: nothing is wrong: 2 aliases, 1 app\n"
    with contextlib.closing(sqlite3.connect(ctl.path)) as database:
        assert database.execute("SELECT count(*) FROM notes").fetchall() == [(1,)]


def test_check_keeps_an_alias_that_is_found_once_more_without_regard_to_capitals(ctl):
    schema = mailcloak.SCHEMA.replace("alias_email TEXT PRIMARY KEY", "alias_email TEXT COLLATE NOCASE PRIMARY KEY", 1)
    path = ctl.path.parent / "other.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(f"{schema}PRAGMA user_version = {mailcloak.SCHEMA_VERSION};")
        database.execute("INSERT INTO aliases (alias_email, username) VALUES ('Info@d1.test', 'alice')")
        database.commit()
    Ctl(path)("db", "check", "--fix", check=False)
    assert Ctl(path).rows("SELECT alias_email, username FROM aliases") == [("info@d1.test", "alice")]


def test_check_by_the_rules_of_the_configuration(static_daemon):
    static_daemon.ctl("aliases", "add", "info@d1.test", "bob+x")
    result = run_ctl("--config", static_daemon.config_path, "db", "check", check=False)
    assert result.returncode == 1
    assert "holds a character of policy.recipient_delimiter" in " ".join(result.stdout.split())


def test_username_that_was_stored_by_force_is_no_fault(static_daemon):
    static_daemon.ctl("aliases", "add", "info@d1.test", "bob@elsewhere.example")
    result = run_ctl("--config", static_daemon.config_path, "db", "check")
    assert result.stdout == "db: nothing is wrong: 1 alias, 0 apps\n"


@pytest.mark.parametrize(
    ("module", "command"), [("mailcloakdata", "db check"), ("mailcloakmirror", "db promote"), ("mailcloakask", "status")]
)
@pytest.mark.parametrize("content", [None, types.ModuleType("cut")], ids=["missing", "cut"])
def test_module_that_is_missing_or_cut_says_so(ctl, monkeypatch, capsys, module, command, content):
    """Cut at the end of a function, so that it can be loaded."""
    monkeypatch.setitem(sys.modules, module, content)
    assert mailcloakctl.main(["--db", str(ctl.path), *command.split()]) == 1
    assert capsys.readouterr().err.startswith(f"mailcloakctl: {ROOT / module}.py cannot be loaded: ")
