"""The daemon and its database: changes count at once, faults are temporary, the file may be replaced."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

import mailcloak
import mailcloakowner

INTERNAL = "451 4.3.0 Temporary internal error"


def sql(path, *statements):
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        for statement in statements:
            database.execute(statement)


def test_change_by_mailcloakctl_counts_from_the_next_request(static_daemon):
    client, maps = static_daemon.policy(), static_daemon.socketmap()
    steps = [
        (["aliases", "add", "new@d1.test", "alice"], "DUNNO", "OK alice@d1.test"),
        (["aliases", "disable", "new@d1.test"], "550 5.1.1 No such user", "NOTFOUND "),
        (["aliases", "enable", "new@d1.test"], "DUNNO", "OK alice@d1.test"),
        (["aliases", "add", "new@d1.test", "bob", "--replace"], "DUNNO", "OK bob@d1.test"),
        (["aliases", "del", "new@d1.test"], "550 5.1.1 No such user", "NOTFOUND "),
    ]
    for arguments, answer, mapped in steps:
        static_daemon.ctl(*arguments)
        assert (client.ask(recipient="new@d1.test"), maps.ask("alias new@d1.test")) == (answer, mapped)


def test_app_commands_count_from_the_next_request(static_daemon):
    client = static_daemon.policy()
    ask = {"protocol_state": "MAIL", "sender": "scan@d1.test", "sasl_username": "printer", "sasl_method": "PLAIN"}
    static_daemon.ctl("apps", "add", "printer", "--generate")
    assert client.ask(**ask).startswith("553")
    static_daemon.ctl("apps", "allow", "printer", "scan@d1.test")
    assert client.ask(**ask) == "DUNNO"
    static_daemon.ctl("apps", "disable", "printer")
    assert client.ask(**ask).startswith("553")


def test_row_with_address_and_username_alone_counts(static_daemon):
    sql(static_daemon.database, "INSERT INTO aliases (alias_email, username) VALUES ('plain@d1.test', 'ALICE')")
    assert static_daemon.ask_map("alias plain@d1.test") == "OK alice@d1.test"


@pytest.mark.parametrize("value", ["42", "x'616c696365'"], ids=["number", "blob"])
def test_row_with_a_username_of_another_type_ends_nothing(static_daemon, value):
    sql(static_daemon.database, f"INSERT INTO aliases (alias_email, username) VALUES ('odd@d1.test', {value})")
    assert static_daemon.ask_map("alias odd@d1.test") in ("OK 42@d1.test", "OK alice@d1.test")


@pytest.mark.parametrize("name", ["key", "value", "atom", "id"])
def test_column_that_an_administrator_has_added_changes_nothing(static_daemon, name):
    static_daemon.ctl("aliases", "add", "info@d1.test", "alice")
    static_daemon.ctl("apps", "add", "printer", "--generate")
    sql(
        static_daemon.database,
        *(f"ALTER TABLE {table} ADD COLUMN {name} TEXT DEFAULT 'x'" for table in ("aliases", "alias_targets", "apps", "app_from")),
    )
    assert static_daemon.ask_map("alias info@d1.test") == "OK alice@d1.test"
    assert static_daemon.ask(protocol_state="MAIL", sender="a@d1.test", sasl_username="printer", sasl_method="PLAIN")[:3] == "553"


def test_row_that_is_not_utf8_is_a_temporary_failure_of_that_row_alone(static_daemon):
    sql(static_daemon.database, "INSERT INTO aliases (alias_email, username) VALUES ('bad@d1.test', CAST(x'ff' AS TEXT))")
    static_daemon.ctl("aliases", "add", "good@d1.test", "alice")
    for _ in range(2):
        assert static_daemon.ask_map("alias bad@d1.test") == "TEMP database not usable"
        assert static_daemon.ask(recipient="bad@d1.test") == INTERNAL
        assert static_daemon.ask_map("alias good@d1.test") == "OK alice@d1.test"
    assert json.loads(static_daemon.ask_map("stats *")[3:])["database"]["works"] is True
    lines = [line for line in static_daemon.log().splitlines() if " database: " in line and "created" not in line]
    assert len(lines) == 1
    assert "the row bad@d1.test of aliases is not UTF-8; answers that need it are deferred until it is fixed" in lines[0]


def test_app_whose_owner_is_not_utf8_is_a_temporary_failure_of_that_app_alone(static_daemon):
    sql(
        static_daemon.database,
        "INSERT INTO apps (app_id, secret_hash, owner) VALUES ('bad', 'x', CAST(x'ff' AS TEXT)), ('good', 'x', NULL)",
        "INSERT INTO app_from (app_id, from_addr) VALUES ('bad', 'scan@d1.test'), ('good', 'scan@d1.test')",
    )
    ask = {"protocol_state": "MAIL", "sender": "scan@d1.test", "sasl_method": "PLAIN"}
    assert static_daemon.ask(**ask, sasl_username="bad") == INTERNAL
    assert static_daemon.ask(**ask, sasl_username="good") == "DUNNO"


@pytest.mark.parametrize(
    ("expires_at", "answer"),
    [
        ("NULL", "DUNNO"),
        ("4000000000", "DUNNO"),
        ("1000000000", "553"),
        ("4000000000.5", "553"),
        ("'2099-01-01'", "553"),
        ("''", "553"),
        ("x'ff'", "553"),
    ],
    ids=["none", "future", "past", "fraction", "date", "empty", "blob"],
)
def test_app_expires_at_a_whole_number_and_anything_else_has_expired(static_daemon, expires_at, answer):
    sql(
        static_daemon.database,
        f"INSERT INTO apps (app_id, secret_hash, expires_at) VALUES ('printer', 'x', {expires_at})",
        "INSERT INTO app_from (app_id, from_addr) VALUES ('printer', 'scan@d1.test')",
    )
    ask = {"protocol_state": "MAIL", "sender": "scan@d1.test", "sasl_username": "printer", "sasl_method": "PLAIN"}
    assert static_daemon.ask(**ask).startswith(answer)


def test_missing_file_is_created_with_its_schema_and_a_warning(static_daemon):
    assert "warning database: created, there was none path=" in static_daemon.log()
    status = static_daemon.database.stat()
    assert stat.S_IMODE(status.st_mode) == 0o640
    assert status.st_uid == static_daemon.directory.stat().st_uid
    with contextlib.closing(sqlite3.connect(static_daemon.database)) as database:
        assert database.execute("PRAGMA user_version").fetchone()[0] == mailcloak.SCHEMA_VERSION
        assert database.execute("PRAGMA journal_mode").fetchone()[0] == "delete"


@pytest.mark.parametrize("fault", ["missing", "empty"])
def test_lost_file_of_a_daemon_that_has_run_is_not_made_again(make_daemon, keycloak, fault):
    """A new one would say of each alias that there is none: mail for it would be refused for good."""
    keycloak.add_user("alice", "alice@d1.test")
    daemon = make_daemon(keycloak=keycloak.config()).start()
    daemon.ctl("aliases", "add", "info@d1.test", "alice")
    assert daemon.ask(recipient="info@d1.test") == "DUNNO"
    daemon.stop()
    good = daemon.database.read_bytes()
    daemon.database.unlink()
    if fault == "empty":
        daemon.database.touch()
    daemon.start()
    assert daemon.ask(recipient="info@d1.test") == INTERNAL
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"
    assert daemon.ask_map("alias info@d1.test") == "TEMP database not usable"
    result = daemon.ctl("aliases", "add", "x@d1.test", "alice", check=False)
    assert result.returncode == 1
    for text in (daemon.log(), result.stderr):
        assert "restore it from a backup; only if it held nothing you need, stop the daemon, delete what there is of it and" in text
        assert "start the daemon, which creates a new database" in text
        assert str(daemon.database.parent / "last-known.db") in text
    daemon.database.write_bytes(good)
    assert daemon.ask(recipient="info@d1.test") == "DUNNO"
    daemon.stop()
    daemon.database.unlink()
    (daemon.database.parent / "last-known.db").unlink()
    daemon.start()
    assert daemon.ask(recipient="info@d1.test") == "550 5.1.1 No such user"


def test_database_that_works_again_is_known_to_do_so_without_a_question(static_daemon):
    good = static_daemon.database.read_bytes()
    static_daemon.database.unlink()
    assert static_daemon.ask(recipient="info@d1.test") == INTERNAL
    assert json.loads(static_daemon.ask_map("stats *")[3:])["database"]["works"] is False
    static_daemon.database.write_bytes(good)
    assert json.loads(static_daemon.ask_map("stats *")[3:])["database"]["works"] is True


def test_file_of_the_older_program_without_a_version_keeps_its_rows(make_daemon):
    daemon = make_daemon(static_users={"alice": "alice@d1.test"})
    sql(
        daemon.database,
        "CREATE TABLE aliases (alias_email TEXT PRIMARY KEY, username TEXT NOT NULL, enabled INTEGER NOT NULL DEFAULT 1, updated_at INTEGER)",
        "INSERT INTO aliases VALUES ('info@d1.test', 'alice', 1, 1700000000)",
    )
    daemon.start()
    assert daemon.ask_map("alias info@d1.test") == "OK alice@d1.test"
    assert daemon.ctl("apps", "list", "--json").stdout.strip() == "[]"


VERSION_1 = [
    "CREATE TABLE aliases (alias_email TEXT PRIMARY KEY, username TEXT NOT NULL, enabled INTEGER NOT NULL DEFAULT 1, updated_at INTEGER)",
    "CREATE TABLE apps (app_id TEXT PRIMARY KEY, secret_hash TEXT NOT NULL, enabled INTEGER NOT NULL DEFAULT 1, created_at INTEGER)",
    "CREATE TABLE app_from (app_id TEXT NOT NULL, from_addr TEXT NOT NULL, enabled INTEGER NOT NULL DEFAULT 1, PRIMARY KEY (app_id, from_addr))",
    "INSERT INTO aliases VALUES ('info@d1.test', 'alice', 1, 1700000000), ('old@d1.test', 'bob', 0, 1700000001)",
    "INSERT INTO apps VALUES ('printer', '{X}hash', 1, 1700000002)",
    "INSERT INTO app_from VALUES ('printer', 'scan@d1.test', 1), ('printer', '', 0)",
    "PRAGMA user_version = 1",
]
ROWS_KEPT = {
    "aliases": [("info@d1.test", "alice", 1, 1700000000, None, 0, 0), ("old@d1.test", "bob", 0, 1700000001, None, 0, 0)],
    "apps": [("printer", "{X}hash", 1, 1700000002, None, None)],
    "app_from": [("printer", "", 0), ("printer", "scan@d1.test", 1)],
}


def rows_of(path):
    with contextlib.closing(sqlite3.connect(path)) as database:
        return {table: database.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall() for table in ROWS_KEPT}


@pytest.mark.parametrize("by", ["daemon", "mailcloakctl"])
def test_older_file_is_migrated_with_every_row_and_a_copy_beside_it(make_daemon, by):
    daemon = make_daemon(static_users={"alice": "alice@d1.test"})
    sql(daemon.database, *VERSION_1)
    daemon.database.chmod(0o604)
    before = daemon.database.stat()
    if by == "daemon":
        said = daemon.start().log()
        assert daemon.ask(protocol_state="MAIL", sender="scan@d1.test", sasl_username="printer", sasl_method="PLAIN") == "DUNNO"
    else:
        said = daemon.ctl("aliases", "list").stderr
    copy = f"{daemon.database}.version-1"
    assert f"migrated to schema version {mailcloak.SCHEMA_VERSION}, the file as it was is {copy}" in said
    assert rows_of(daemon.database) == ROWS_KEPT
    after = daemon.database.stat()
    assert (after.st_mode, after.st_uid, after.st_gid, after.st_ino) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
        before.st_ino,
    )
    with contextlib.closing(sqlite3.connect(copy)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (1,)
        assert database.execute("SELECT * FROM apps").fetchall() == [("printer", "{X}hash", 1, 1700000002)]
    assert stat.S_IMODE(os.stat(copy).st_mode) == 0o604
    assert "migrated" not in daemon.ctl("aliases", "list").stderr


def test_copy_of_an_earlier_migration_is_not_overwritten(tmp_path):
    path = tmp_path / "state.db"
    (tmp_path / "state.db.version-1").write_text("precious")
    sql(path, *VERSION_1)
    assert mailcloak.prepare_database(str(path), 5).endswith("state.db.version-1.1")
    assert (tmp_path / "state.db.version-1").read_text() == "precious"


def test_migration_that_fails_halfway_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "state.db"
    sql(path, *VERSION_1)
    before = rows_of(path)
    monkeypatch.setattr(mailcloak, "ADDED_COLUMNS", (*mailcloak.ADDED_COLUMNS, ("apps", "x y z(", "TEXT")))
    with pytest.raises(mailcloak.DatabaseUnavailable):
        mailcloak.prepare_database(str(path), 5)
    assert rows_of(path) == before
    monkeypatch.undo()
    assert mailcloak.prepare_database(str(path), 5).startswith(f"migrated to schema version {mailcloak.SCHEMA_VERSION}")


def test_migration_by_two_at_once_happens_once(tmp_path):
    path = tmp_path / "state.db"
    sql(path, *VERSION_1)
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import mailcloak; print(mailcloak.prepare_database({str(path)!r}, 30))",
    ]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sum("migrated" in text for text in said) == 1
    assert rows_of(path) == ROWS_KEPT


def test_file_of_a_newer_program_is_refused_with_a_message(make_daemon):
    daemon = make_daemon(static_users={"alice": "alice@d1.test"})
    sql(daemon.database, "PRAGMA user_version = 999")
    assert daemon.launch().process.wait(10) == 1
    assert "has schema version 999" in daemon.log()


@pytest.mark.parametrize("name", ["policy", "socketmap"])
def test_file_locked_for_a_moment_is_waited_for(static_daemon, name):
    static_daemon.ctl("aliases", "add", "info@d1.test", "alice")
    with contextlib.closing(sqlite3.connect(static_daemon.database, isolation_level=None, check_same_thread=False)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        timer = threading.Timer(0.5, writer.execute, ["COMMIT"])
        timer.start()
        if name == "policy":
            assert static_daemon.ask(recipient="info@d1.test") == "DUNNO"
        else:
            assert static_daemon.ask_map("alias info@d1.test") == "OK alice@d1.test"
        timer.join()


@pytest.mark.long
def test_file_locked_for_long_is_a_temporary_failure_while_it_lasts(static_daemon):
    static_daemon.ctl("aliases", "add", "info@d1.test", "alice")
    with contextlib.closing(sqlite3.connect(static_daemon.database, isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        assert static_daemon.ask(recipient="info@d1.test") == INTERNAL
        assert static_daemon.ask(recipient="alice@d1.test") == "DUNNO"
        assert static_daemon.ask_map("alias info@d1.test") == "TEMP database not usable"
        writer.execute("ROLLBACK")
    assert static_daemon.ask_map("alias info@d1.test") == "OK alice@d1.test"


def test_file_replaced_by_rename_is_noticed_on_a_kept_connection(static_daemon):
    static_daemon.ctl("aliases", "add", "info@d1.test", "alice")
    client = static_daemon.socketmap()
    assert client.ask("alias info@d1.test") == "OK alice@d1.test"
    other = static_daemon.directory / "other.db"
    mailcloak.prepare_database(str(other), 5)
    sql(other, "INSERT INTO aliases (alias_email, username) VALUES ('info@d1.test', 'bob')")
    os.rename(other, static_daemon.database)
    assert client.ask("alias info@d1.test") == "OK bob@d1.test"


@pytest.mark.parametrize("fault", ["gone", "garbage", "truncated", "directory", "empty"])
def test_broken_file_is_a_temporary_failure_until_it_is_back(static_daemon, fault):
    path = static_daemon.database
    static_daemon.ctl("aliases", "add", "info@d1.test", "alice")
    client, maps = static_daemon.policy(), static_daemon.socketmap()
    assert maps.ask("alias info@d1.test") == "OK alice@d1.test"
    good = path.read_bytes()
    if fault == "truncated":
        path.write_bytes(good[:5000])
    else:
        path.unlink()
        if fault == "garbage":
            path.write_bytes(b"no database " * 500)
        elif fault == "empty":
            path.touch()
        elif fault == "directory":
            path.mkdir()
    assert maps.ask("alias info@d1.test") == "TEMP database not usable"
    assert client.ask(recipient="info@d1.test") == INTERNAL
    assert client.ask(recipient="alice@d1.test") == "DUNNO"
    if fault == "directory":
        path.rmdir()
    path.write_bytes(good)
    assert maps.ask("alias info@d1.test") == "OK alice@d1.test"
    assert client.ask(recipient="info@d1.test") == "DUNNO"
    log = static_daemon.log()
    assert log.count("; answers that need it are deferred until it is fixed") == 1
    assert log.count("warning database: works again path=") == 1


def test_older_file_put_in_place_of_ours_is_migrated(static_daemon):
    client = static_daemon.policy()
    ask = {"protocol_state": "MAIL", "sender": "scan@d1.test", "sasl_username": "printer", "sasl_method": "PLAIN"}
    assert client.ask(**ask).startswith("553")
    other = static_daemon.directory / "other.db"
    sql(other, *VERSION_1)
    os.rename(other, static_daemon.database)
    assert client.ask(**ask) == "DUNNO"


KILLED_WRITER = """
import os, sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("PRAGMA cache_size = 1")
database.execute("BEGIN IMMEDIATE")
database.execute("UPDATE aliases SET username = 'mallory'")
database.executemany("INSERT INTO aliases (alias_email, username) VALUES (?, 'x')", [(f"a{n}@d1.test",) for n in range(5000)])
print("spilled", flush=True)
sys.stdin.read()
"""


def test_journal_of_a_killed_writer_is_rolled_back(static_daemon):
    static_daemon.ctl("aliases", "add", "info@d1.test", "alice")
    maps = static_daemon.socketmap()
    assert maps.ask("alias info@d1.test") == "OK alice@d1.test"
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED_WRITER, str(static_daemon.database)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert writer.stdout.readline() == b"spilled\n"
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert os.path.exists(f"{static_daemon.database}-journal")
    with (
        pytest.raises(sqlite3.OperationalError),
        contextlib.closing(sqlite3.connect(f"file:{static_daemon.database}?mode=ro", uri=True)) as reader,
    ):
        reader.execute("SELECT 1 FROM aliases").fetchall()
    assert maps.ask("alias info@d1.test") == "OK alice@d1.test"
    assert static_daemon.ask(recipient="a1@d1.test") == "550 5.1.1 No such user"


def test_answers_stay_right_while_mailcloakctl_writes_in_a_loop(static_daemon):
    static_daemon.ctl("aliases", "add", "info@d1.test", "alice")
    stop = threading.Event()

    def write():
        while not stop.is_set():
            static_daemon.ctl("aliases", "add", "busy@d1.test", "bob")
            static_daemon.ctl("aliases", "del", "busy@d1.test")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        client, end, answers = static_daemon.policy(), time.monotonic() + 2, set()
        while time.monotonic() < end:
            answers.add((client.ask(recipient="info@d1.test"), client.ask(recipient="stranger@d1.test")))
    finally:
        stop.set()
        thread.join()
    assert answers == {("DUNNO", "550 5.1.1 No such user")}


def test_daemon_never_writes_to_the_database(static_daemon):
    static_daemon.ctl("aliases", "add", "info@d1.test", "alice")
    before = static_daemon.database.read_bytes()
    for recipient in ("info@d1.test", "alice@d1.test", "stranger@d1.test"):
        static_daemon.ask(recipient=recipient)
    assert static_daemon.database.read_bytes() == before
    database = mailcloak.Database(str(static_daemon.database))
    with pytest.raises(mailcloak.DatabaseUnavailable, match="readonly"):
        database._ask("DELETE FROM aliases WHERE ? IS NOT NULL", "")


@pytest.mark.real("root")
@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_root_writes_nothing_into_a_database_of_its_own_to_which_the_owner_of_the_directory_leads(short_dir, journal):
    short_dir.chmod(0o755)
    roots, directory = short_dir / "roots.db", short_dir / "state"
    with contextlib.closing(sqlite3.connect(roots)) as database:
        database.execute(f"PRAGMA journal_mode = {journal}")
        database.execute("CREATE TABLE other (x)")
    directory.mkdir()
    shutil.chown(directory, "nobody", "nogroup")
    path = directory / "state.db"
    path.symlink_to(roots)
    with pytest.raises(mailcloak.DatabaseUnavailable, match="readonly"):
        mailcloakowner.prepare(str(path), 2)
    with contextlib.closing(sqlite3.connect(roots)) as database:
        assert database.execute("SELECT name FROM sqlite_master").fetchall() == [("other",)]


@pytest.mark.real("root")
def test_root_gives_away_no_file_that_a_link_in_the_directory_names(short_dir, monkeypatch):
    """The directory belongs to the daemon's user, who puts a link in place of the copy that mailcloakctl makes as root."""
    short_dir.chmod(0o755)
    directory, secret = short_dir / "state", short_dir / "secret"
    directory.mkdir(mode=0o750)
    secret.write_text("secret")
    secret.chmod(0o600)
    path = str(directory / "state.db")
    mailcloak.prepare_database(path, 2)
    with contextlib.closing(mailcloak.connect_database(path, 2)) as database:
        database.execute("PRAGMA user_version = 1")
    for each in (directory, path):
        shutil.chown(each, "nobody", "nogroup")
    create = mailcloak.create_database_file

    def create_and_swap(name, mode=0o640):
        made = create(name, mode)
        if made and "version-" in name:
            os.unlink(name)
            os.symlink(secret, name)
        return made

    monkeypatch.setattr(mailcloak, "create_database_file", create_and_swap)
    with pytest.raises(mailcloak.DatabaseUnavailable):
        mailcloakowner.prepare(path, 2)
    status = secret.stat()
    assert (status.st_uid, status.st_mode & 0o777, secret.read_text()) == (0, 0o600, "secret")
    monkeypatch.undo()
    assert "migrated" in mailcloak.prepare_database(path, 2)
    assert {each.owner() for each in directory.iterdir()} == {"nobody"}
