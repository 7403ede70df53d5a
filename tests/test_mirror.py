"""Several mail hosts: rows are brought as a whole or not at all, one host is the writer, and no old writer comes back by itself."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, USERS, as_nobody, in_own_dev, run_ctl
from conftest import wait_until as wait_seconds
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import run_job
from test_mailcloakctl import Ctl

import mailcloak
import mailcloakask
import mailcloakcommon
import mailcloakctl
import mailcloakdata
import mailcloakdoctor
import mailcloakfindings
import mailcloakmirror
from mailcloakcommon import Origin
from mailcloakmirror import why_refused

wait_until = functools.partial(wait_seconds, seconds=30)  # for programs that start, on a machine with other work
TABLES = {table.name: table for table in mailcloakdata.read_tables()}


class Host(Ctl):
    """A mail host: its database, and the file that it publishes."""

    def __init__(self, directory):
        directory.mkdir(exist_ok=True)
        super().__init__(directory / "state.db")
        self.shared = directory / "shared.db"

    def publish(self):
        return run_ctl("--db", self.shared, "db", "mirror", self.path, "--publish")

    def origin(self, path=None):
        with contextlib.closing(sqlite3.connect(path or self.path)) as database:
            return mailcloakcommon.find_origin(database)


@pytest.fixture
def writer(tmp_path):
    """A writer with two aliases and an app, which are published."""
    host = Host(tmp_path / "writer")
    host("aliases", "add", "info@d1.test", "alice")
    host("aliases", "add", "sales@d1.test", "bob")
    host.insert("apps", "printer", "{SHA256}x")
    host.insert("app_from", "printer", "scan@d1.test")
    host.publish()
    return host


@pytest.fixture
def follower(tmp_path, writer):
    """A host that has followed the writer once."""
    host = Host(tmp_path / "follower")
    host("db", "mirror", writer.shared)
    return host


def rows_of(path):
    """All rows of all tables of the schema."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        return {name: sorted(database.execute(f"SELECT * FROM {name}").fetchall(), key=repr) for name in TABLES}


def journal_mode(path):
    return "wal" if path.read_bytes()[18:20] == b"\2\2" else "delete"


# ---- decisions


def origin(role="follower", writer="w1", epoch=1, serial=10):
    return Origin(role, writer, f"host-of-{writer}", epoch, serial, 1_800_000_000, "digest", "")


@pytest.mark.parametrize(
    ("ours", "theirs", "has_rows", "why"),
    [
        (None, None, False, ""),
        (None, None, True, "no writer has published it with db mirror --publish"),
        (None, origin("writer")._replace(digest=""), True, "no writer has published it with db mirror --publish"),
        (None, origin(), False, ""),
        (None, origin(), True, "this database has rows of its own, which would be lost"),
        (origin(), None, True, "no writer has published it with db mirror --publish"),
        (origin(), origin(serial=10), True, ""),
        (origin(), origin(serial=11), True, ""),
        (origin(), origin(serial=9), True, "it is older than what is here"),
        (origin(), origin(writer="w2"), True, "both host-of-w2 and host-of-w1 say that they are the writer"),
        (origin(), origin(writer="w2", serial=99), True, "both host-of-w2 and host-of-w1 say that they are the writer"),
        (origin(), origin(writer="w2", epoch=2, serial=1), True, ""),
        (origin(epoch=2), origin(writer="w2", serial=99), True, "host-of-w2 is no longer the writer, host-of-w1 is"),
        (origin("writer"), origin("writer", serial=11), True, "these are rows of this host itself, which is the writer"),
        (origin("writer"), origin(writer="w2", epoch=2), True, "this host is the writer itself"),
    ],
)
def test_source_is_followed_or_refused_by_its_origin(ours, theirs, has_rows, why):
    assert why_refused(ours, theirs, has_rows=has_rows) == why


# ---- one look


def test_schema_has_what_bringing_rows_needs():
    """A primary key in each table, and no other unique column, which would make the order of the rows count."""
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.executescript(mailcloak.SCHEMA)
        for table in TABLES.values():
            assert table.keys
            assert "u" not in {row[3] for row in database.execute(f"PRAGMA index_list({table.name})")}


def test_follower_has_the_rows_of_the_writer_and_a_rollback_journal(writer, follower):
    assert rows_of(follower.path) == rows_of(writer.path) == rows_of(writer.shared)
    assert [journal_mode(path) for path in (writer.path, writer.shared, follower.path)] == ["delete", "wal", "delete"]
    shown = follower("db", "mirror", writer.shared).stdout
    assert shown == f"db: {follower.path} is as {writer.shared}, 0 rows changed: 2 aliases, 1 app\n"
    ours, theirs = follower.origin(), writer.origin(writer.shared)
    assert theirs.role == "writer"
    assert ours == theirs._replace(role="follower", file=str(writer.shared))
    assert writer.origin().writer == theirs.writer


def test_rows_that_go_come_and_change_are_brought_in_one_transaction(writer, follower):
    writer("aliases", "del", "info@d1.test")
    writer("aliases", "disable", "sales@d1.test")
    writer("aliases", "add", "new@d1.test", "carol")
    writer("apps", "del", "printer")
    assert "5 rows changed: 2 aliases, 0 apps" in writer.publish().stdout
    before = change_counter(follower.path)
    follower("db", "mirror", writer.shared)
    assert rows_of(follower.path) == rows_of(writer.path)
    assert change_counter(follower.path) == before + 1


def change_counter(path):
    return int.from_bytes(path.read_bytes()[24:28], "big")


def test_nothing_is_written_where_nothing_differs(writer, follower):
    before = follower.path.read_bytes(), writer.path.read_bytes(), follower.path.stat().st_mtime_ns
    follower("db", "mirror", writer.shared)
    writer.publish()
    assert (follower.path.read_bytes(), writer.path.read_bytes(), follower.path.stat().st_mtime_ns) == before


def test_serial_rises_with_each_change_also_where_the_published_file_was_lost(writer, follower):
    serials = [writer.origin(writer.shared).serial]
    for number in range(3):
        writer("aliases", "add", f"a{number}@d1.test", "alice")
        writer.publish()
        serials.append(writer.origin(writer.shared).serial)
    writer.shared.unlink()
    writer("aliases", "del", "a0@d1.test")
    writer.publish()
    serials.append(writer.origin(writer.shared).serial)
    assert serials == sorted(set(serials))
    follower("db", "mirror", writer.shared)
    assert rows_of(follower.path) == rows_of(writer.path)


def test_published_file_that_is_lost_begins_after_all_that_was_published_though_the_clock_was_ahead(writer, follower, monkeypatch):
    """Its followers would have refused it for a month."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 30 * 86400)
    writer("aliases", "add", "a@d1.test", "alice")
    mailcloakmirror.publish(str(writer.shared), str(writer.path), thorough=True)
    mailcloakmirror.follow(str(follower.path), str(writer.shared), thorough=True)
    monkeypatch.setattr(time, "time", lambda: now)
    for number in range(3):
        writer.shared.unlink()
        writer("aliases", "add", f"b{number}@d1.test", "alice")
        mailcloakmirror.publish(str(writer.shared), str(writer.path), thorough=True)
        mailcloakmirror.follow(str(follower.path), str(writer.shared), thorough=True)
        assert rows_of(follower.path) == rows_of(writer.path)
    before = writer.path.read_bytes()
    follower("db", "promote")
    mailcloakmirror.publish(str(writer.shared), str(writer.path), thorough=True)
    assert writer.path.read_bytes() == before  # it is not written at each look


@pytest.mark.long
def test_changes_go_on_while_another_program_holds_the_published_file(writer):
    """Such as a hung Litestream: mailcloakctl waited for it."""
    with contextlib.closing(sqlite3.connect(writer.shared, isolation_level=None, check_same_thread=False)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with watching(writer.shared, writer.path, "--publish"):
            ended = time.monotonic() + 5
            while time.monotonic() < ended:
                with contextlib.closing(sqlite3.connect(writer.path, timeout=1, isolation_level=None)) as database:
                    database.execute("BEGIN IMMEDIATE")
                time.sleep(0.05)
            holder.execute("ROLLBACK")
            writer("aliases", "add", "new@d1.test", "carol")
            wait_until(lambda: rows_of(writer.shared) == rows_of(writer.path), what="the change")


def test_copy_that_nobody_has_published_replaces_rows_by_adopt_alone_and_neither_is_a_follower(tmp_path):
    """It may be half of two backups, older than what is here, or empty: nothing in it tells."""
    one, two = Host(tmp_path / "one"), Host(tmp_path / "two")
    one("aliases", "add", "info@d1.test", "alice")
    two("db", "mirror", one.path)  # into an empty one
    two("aliases", "add", "other@d1.test", "bob")
    before = rows_of(two.path)
    mailcloak.prepare_database(str(tmp_path / "empty.db"), 5)
    for source in (one.path, tmp_path / "empty.db"):
        said = two.refuses("db", "mirror", source)
        assert "no writer has published it with db mirror --publish; if it is the right one, db mirror --adopt takes it" in said
        assert rows_of(two.path) == before
    two("db", "mirror", one.path, "--adopt")
    assert rows_of(two.path) == rows_of(one.path)
    assert two.origin() is None
    two("aliases", "add", "again@d1.test", "bob")


def test_backup_of_a_writer_is_no_source_since_it_may_be_an_old_one(writer, follower, tmp_path):
    writer("backup", tmp_path / "old.db")
    writer("aliases", "add", "new@d1.test", "carol")
    writer.publish()
    follower("db", "mirror", writer.shared)
    assert "no writer has published it" in follower.refuses("db", "mirror", tmp_path / "old.db")
    assert rows_of(follower.path) == rows_of(writer.path)


@pytest.mark.parametrize("name", ["aliases", "apps"])
def test_source_with_a_view_in_place_of_a_table_is_refused_before_a_row_of_it_is_read(writer, tmp_path, name):
    """It would hold the lock of the database for good."""
    writer("backup", tmp_path / "copy.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "copy.db")) as database:
        database.execute("DROP TABLE origin")
        columns = ", ".join(f"n AS {column}" for column in TABLES[name].columns)
        database.execute(f"DROP TABLE {name}")
        endless = "WITH RECURSIVE r (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r)"
        database.execute(f"CREATE VIEW {name} AS {endless} SELECT {columns} FROM r")
        database.commit()
    host = Host(tmp_path / "host")
    assert f"is refused: it has no table {name}" in host.refuses("db", "mirror", tmp_path / "copy.db")
    assert not host.path.exists()


def test_database_of_a_follower_that_is_lost_is_made_whole_though_a_daemon_has_run_on_it(writer, follower):
    mailcloak_saved = Path(mailcloak.last_known_path(str(follower.path)))
    mailcloak_saved.touch()
    follower.path.unlink()
    assert "is missing" in follower.refuses("aliases", "list")
    assert "missing, though a daemon has run on it" in follower.refuses("aliases", "add", "x@d1.test", "alice")
    follower("db", "mirror", writer.shared)
    assert rows_of(follower.path) == rows_of(writer.path)
    assert sorted(path.name for path in follower.path.parent.iterdir()) == ["last-known.db", "state.db"]


def test_database_that_was_emptied_is_filled_again(writer, follower):
    follower.path.write_bytes(b"")
    assert "is empty" in follower.refuses("aliases", "list")
    follower("db", "mirror", writer.shared)
    assert rows_of(follower.path) == rows_of(writer.path)
    assert follower.path.stat().st_mode & 0o777 == 0o640
    writer.shared.write_bytes(b"")
    writer.publish()
    writer.publish()
    assert rows_of(writer.shared) == rows_of(writer.path)
    assert journal_mode(writer.shared) == "wal"


def test_source_that_is_refused_makes_no_database(writer, tmp_path):
    host = Host(tmp_path / "new")
    writer.shared.write_bytes(writer.shared.read_bytes()[:9000])
    host.refuses("db", "mirror", writer.shared)
    assert list(host.path.parent.iterdir()) == []


def test_published_file_is_as_closed_as_the_database(writer):
    assert writer.shared.stat().st_mode & 0o777 == writer.path.stat().st_mode & 0o777 == 0o640
    with contextlib.closing(sqlite3.connect(writer.shared)) as database:
        database.execute("SELECT count(*) FROM aliases").fetchall()  # which makes the files of WAL mode
        for suffix in ("-wal", "-shm"):
            assert Path(f"{writer.shared}{suffix}").stat().st_mode & 0o777 == 0o640


def test_tables_of_litestream_stay_where_they_are(writer, follower):
    with contextlib.closing(sqlite3.connect(writer.shared)) as database, database:
        database.execute("CREATE TABLE _litestream_seq (id INTEGER PRIMARY KEY, seq INTEGER)")
    writer("aliases", "del", "info@d1.test")
    writer.publish()
    follower("db", "mirror", writer.shared)
    with contextlib.closing(sqlite3.connect(writer.shared)) as database:
        assert database.execute("SELECT count(*) FROM _litestream_seq").fetchone() == (0,)
    assert rows_of(follower.path) == rows_of(writer.path)


def test_rows_are_brought_from_a_writer_whose_program_was_killed_in_a_commit(writer):
    """Its journal is rolled back: what it had begun to write is not published."""
    killed = (
        "import os, sqlite3, sys\n"
        "database = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "database.execute('PRAGMA cache_size = 1')\n"
        "database.execute('BEGIN')\n"
        "for number in range(5000):\n"
        "    database.execute('INSERT INTO aliases (alias_email, username) VALUES (?, ?)', (f'k{number}@d1.test', 'x'))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    before = rows_of(writer.path)
    assert subprocess.run([sys.executable, "-c", killed, writer.path], check=False).returncode == -signal.SIGKILL
    assert Path(f"{writer.path}-journal").stat().st_size
    writer.publish()
    assert rows_of(writer.shared) == before


def test_columns_and_tables_that_are_added_later_are_brought_as_all_others(tmp_path, monkeypatch):
    later = """
CREATE TABLE members (
    alias_email TEXT NOT NULL, target TEXT NOT NULL, external INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (alias_email, target), FOREIGN KEY (alias_email) REFERENCES aliases (alias_email) ON DELETE CASCADE
);
CREATE TABLE only_keys (a TEXT, b TEXT, PRIMARY KEY (a, b));
"""
    schema = mailcloak.SCHEMA.replace("    username    TEXT NOT NULL,", "    username    TEXT NOT NULL, team TEXT,", 1) + later
    monkeypatch.setattr(mailcloak, "SCHEMA", schema)
    mailcloakdata.read_tables.cache_clear()
    try:
        state, shared, own = (str(tmp_path / name) for name in ("state.db", "shared.db", "own.db"))
        mailcloak.prepare_database(state, 5)
        with contextlib.closing(sqlite3.connect(state)) as database, database:
            database.execute(
                "INSERT INTO aliases (alias_email, username, team) VALUES ('a@d1.test', 'alice', 'hr'), ('b@d1.test', 'bob', 'hr')"
            )
            database.execute("INSERT INTO members VALUES ('a@d1.test', 'x', 1), ('b@d1.test', 'y', 0), ('nobody', 'z', 0)")
            database.execute("INSERT INTO only_keys VALUES ('1', '2'), ('1', '3')")
        counts = []
        for change in ("UPDATE members SET external = 1", "DELETE FROM aliases WHERE username = 'alice'", "DELETE FROM only_keys"):
            mailcloakmirror.publish(shared, state, thorough=True)
            counts.append(mailcloakmirror.follow(own, shared, thorough=False))
            with contextlib.closing(sqlite3.connect(state)) as database, database:
                database.execute(change)
        assert counts == [7, 2, 1]
        with contextlib.closing(sqlite3.connect(own)) as database:
            assert database.execute("SELECT * FROM members ORDER BY target").fetchall() == [
                ("a@d1.test", "x", 1),
                ("b@d1.test", "y", 1),
                ("nobody", "z", 1),
            ]
            assert database.execute("SELECT alias_email, team FROM aliases").fetchall() == [("b@d1.test", "hr")]
    finally:
        mailcloakdata.read_tables.cache_clear()


def test_writer_waits_for_the_end_of_a_look_before_it_begins_so_that_no_reader_waits_for_the_writer(writer, monkeypatch):
    """At its commit it would keep new readers out, such as the daemon, until the look is over."""
    seen = []

    def check(*_):
        with contextlib.closing(sqlite3.connect(writer.path, timeout=0, isolation_level=None)) as database:
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                database.execute("BEGIN IMMEDIATE")
            seen.extend(database.execute("SELECT count(*) FROM aliases").fetchall())

    monkeypatch.setattr(mailcloakmirror, "check_source", check)
    mailcloakmirror.publish(str(writer.shared), str(writer.path), thorough=True)
    assert seen == [(2,)]
    writer("aliases", "add", "new@d1.test", "carol")


@pytest.mark.real("root")
def test_source_that_this_user_may_only_read_is_brought(writer, tmp_path, short_dir):
    shutil.copy(writer.shared, short_dir / "shared.db")
    with contextlib.closing(sqlite3.connect(short_dir / "shared.db")) as database:
        database.execute("PRAGMA journal_mode = DELETE")
    (short_dir / "shared.db").chmod(0o444)
    (short_dir / "own").mkdir()
    (short_dir / "own").chmod(0o777)
    own = str(short_dir / "own" / "state.db")
    assert as_nobody(lambda: mailcloakmirror.follow(own, str(short_dir / "shared.db"), thorough=True)) == "4"
    assert rows_of(own) == rows_of(writer.path)


@pytest.mark.real("root")
def test_full_disk_of_a_follower_changes_nothing_until_there_is_room(writer, short_dir):
    disk = short_dir / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k,mode=755", "none", str(disk)], check=True)
    try:
        host = Host(disk)
        host("db", "mirror", writer.shared)
        with watching(host.path, writer.shared) as mirror:
            wait_until(mirror.said, what="start")
            (disk / "other").write_bytes(bytes(250_000))
            before = rows_of(host.path)
            with contextlib.closing(sqlite3.connect(writer.path)) as database, database:
                rows = [(f"a{number}@d1.test", "alice" * 20) for number in range(1500)]
                database.executemany("INSERT INTO aliases (alias_email, username) VALUES (?, ?)", rows)
            writer.publish()
            wait_until(lambda: "database or disk is full" in mirror.said(), what="reason")
            assert rows_of(host.path) == before
            subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
            wait_until(lambda: rows_of(host.path) == rows_of(writer.path), what="the rows")
            assert mirror.said().count("\n") == 3
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---- a source that is refused


def cut(data):
    return data[: len(data) // 2]


def without_a_page(data):
    return data[:-4096]


def flipped_in_a_row(data):
    """One bit of a username: SQLite finds nothing wrong with it."""
    place = data.index(b"alice")
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def flipped_in_a_page(data):
    place = data.index(b"\x0d", 4096)  # the type of a leaf
    return data[:place] + b"\x3f" + data[place + 1 :]


def of_other_version(data):
    return data[:60] + (99).to_bytes(4, "big") + data[64:]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (cut, "damaged|malformed"),
        (without_a_page, "damaged|malformed"),
        (flipped_in_a_row, "its rows are not those that the writer has published"),
        (flipped_in_a_page, "damaged|malformed"),
        (of_other_version, f"it has schema version 99, this mailcloak has {mailcloak.SCHEMA_VERSION}; install the same version"),
        (lambda data: b"", "it is empty"),
        (lambda data: b"x" * 5000, "file is not a database"),
        (lambda data: os.urandom(100) + data[100:], "not a database|malformed|damaged"),
    ],
    ids=["cut", "without-a-page", "flipped-row", "flipped-page", "version", "empty", "text", "header"],
)
def test_damaged_source_is_refused_in_one_line(writer, follower, change, why):
    writer("aliases", "add", "new@d1.test", "carol")
    writer.publish()
    writer.shared.write_bytes(change(writer.shared.read_bytes()))
    said = follower.refuses("db", "mirror", writer.shared)
    assert re.fullmatch(rf"mailcloakctl: db: mirror: '{writer.shared}' is refused: .*({why}).*\n", said)
    assert said == follower.refuses("db", "mirror", writer.shared, "--adopt")


def test_half_of_a_change_is_refused(writer, follower):
    """The program that copies pages was killed between two of them; SQLite finds nothing wrong."""
    with contextlib.closing(sqlite3.connect(writer.path)) as database, database:
        rows = [(f"a{number:04}@d1.test", "alice") for number in range(500)]
        database.executemany("INSERT INTO aliases (alias_email, username) VALUES (?, ?)", rows)
    writer.publish()
    follower("db", "mirror", writer.shared)
    before = writer.shared.read_bytes()
    with contextlib.closing(sqlite3.connect(writer.path)) as database, database:
        database.execute("UPDATE aliases SET username = 'bobby'")
    writer.publish()
    after = writer.shared.read_bytes()
    pages = [index for index in range(0, len(after), 4096) if before[index : index + 4096] != after[index : index + 4096]]
    assert len(before) == len(after)
    assert len(pages) > 5
    half = bytearray(before)
    for index in pages[: len(pages) // 2]:
        half[index : index + 4096] = after[index : index + 4096]
    writer.shared.write_bytes(half)
    with contextlib.closing(sqlite3.connect(writer.shared)) as database:
        assert database.execute("PRAGMA quick_check").fetchall() == [("ok",)]
    assert "half of a change" in follower.refuses("db", "mirror", writer.shared)
    writer.shared.write_bytes(after)
    follower("db", "mirror", writer.shared)
    assert {row[1] for row in rows_of(follower.path)["aliases"]} == {"bobby"}


def test_damaged_source_without_an_origin_is_refused(writer, tmp_path):
    host = Host(tmp_path / "plain")
    host("aliases", "add", "info@d1.test", "alice")
    own = Host(tmp_path / "own")
    own("db", "mirror", host.path)
    host("aliases", "del", "info@d1.test")
    data = host.path.read_bytes()
    host.path.write_bytes(data[:4096] + flipped_in_a_page(data)[4096:])
    assert "is refused: it is damaged" in own.refuses("db", "mirror", host.path, "--adopt")


def test_source_that_is_missing_or_no_file_of_ours_is_refused(writer, follower, tmp_path):
    assert "No such file" in follower.refuses("db", "mirror", tmp_path / "absent.db")
    assert "is refused" in follower.refuses("db", "mirror", tmp_path)
    assert "is the database itself" in follower.refuses("db", "mirror", follower.path)
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as database:
        database.execute("CREATE TABLE t (x)")
    assert "is refused" in follower.refuses("db", "mirror", tmp_path / "other.db")


def test_fifo_and_device_in_place_of_the_source_are_refused_in_one_line(follower, tmp_path):
    """The FIFO would be waited for."""
    os.mkfifo(tmp_path / "fifo")
    for source in (tmp_path / "fifo", "/dev/zero"):
        assert "is refused: it is not a file" in follower.refuses("db", "mirror", source)
        with watching(follower.path, source) as mirror:
            wait_until(lambda: "it is not a file; tried again until it can" in mirror.said(), what="the reason")


def test_database_is_no_source_of_itself_by_any_name(writer, tmp_path):
    (tmp_path / "soft").symlink_to(writer.path)
    os.link(writer.path, tmp_path / "hard")
    for name in (writer.path, tmp_path / "soft", tmp_path / "hard", os.path.relpath(writer.path)):
        for options in ((), ("--publish",), ("--watch",)):
            assert "is the database itself" in writer.refuses("db", "mirror", name, *options)
    (tmp_path / "missing").symlink_to(tmp_path / "absent.db")
    assert "is the database itself" in Ctl(tmp_path / "absent.db").refuses("db", "mirror", tmp_path / "missing", "--watch")


@pytest.mark.parametrize(
    "change", ["epoch = epoch + 65536", "serial = serial + 1", "writer = 'w2'", "host = 'mx9'", "epoch = NULL"]
)
def test_origin_with_flipped_bits_is_refused_and_the_true_one_is_followed_again(writer, follower, change):
    """Taken for true, it would have locked out the writer until db mirror --adopt."""
    good = writer.shared.read_bytes()
    with contextlib.closing(sqlite3.connect(writer.shared)) as database, database:
        if "NULL" in change:
            database.execute("PRAGMA writable_schema = ON")
            database.execute("UPDATE sqlite_master SET sql = replace(sql, ' NOT NULL', '') WHERE name = 'origin'")
    with contextlib.closing(sqlite3.connect(writer.shared)) as database, database:
        database.execute(f"UPDATE origin SET {change}")
    said = follower.refuses("db", "mirror", writer.shared)
    assert re.search("its rows are not those|its origin makes no sense|both .* say that they are the writer", said)
    if "writer" not in change:
        assert "--adopt" not in said
    writer.shared.write_bytes(good)
    writer("aliases", "add", "new@d1.test", "carol")
    writer.publish()
    follower("db", "mirror", writer.shared)
    assert rows_of(follower.path) == rows_of(writer.path)


def test_source_with_other_columns_is_refused(writer, follower):
    with contextlib.closing(sqlite3.connect(writer.shared)) as database, database:
        database.execute("ALTER TABLE apps ADD COLUMN other TEXT")
    assert "its table apps has other columns" in follower.refuses("db", "mirror", writer.shared)


# ---- the writer and its followers

WRITING = [
    ("aliases", "add", "x@d1.test", "alice"),
    ("aliases", "add-user", "info@d1.test", "bob"),
    ("aliases", "remove-user", "info@d1.test", "nobody"),
    ("aliases", "del", "info@d1.test"),
    ("aliases", "disable", "info@d1.test"),
    ("aliases", "move", "alice", "bob"),
    ("aliases", "import", "-"),
    ("aliases", "sync", "-", "--max-change", "100%"),
    ("apps", "add", "shop", "a token of many signs"),
    ("apps", "set", "printer", "--expires", "90d"),
    ("apps", "allow", "printer", "x@d1.test"),
    ("apps", "disallow", "printer", "scan@d1.test"),
    ("apps", "del", "printer"),
    ("db", "check", "--fix"),
    ("restore", "BACKUP"),
]


@pytest.mark.parametrize("command", WRITING, ids=" ".join)
def test_follower_refuses_each_verb_that_writes_and_names_the_writer(writer, follower, tmp_path, command):
    writer("backup", tmp_path / "backup.db")
    words = [str(tmp_path / "backup.db") if word == "BACKUP" else word for word in command]
    said = follower.refuses(*words, input="other@d1.test,alice\n")
    assert f"this database follows that of {os.uname().nodename}, nothing was changed; make the change there" in said
    writer(*words, input="other@d1.test,alice\n")


def test_each_verb_that_writes_is_tried_on_a_follower():
    reading = {"aliases list", "aliases show", "aliases export", "apps list", "backup", "db mirror", "db promote"}
    nouns = mailcloakctl.DATABASE_NOUNS
    verbs = {f"{noun} {verb}".strip() for noun in nouns for verb in mailcloakctl.COMMANDS[noun]}
    same_code = {"aliases enable", "apps enable", "apps disable"}  # as those that are tried
    tried = {" ".join(words[:2]) if words[0] != "restore" else "restore" for words in WRITING}
    assert verbs - reading - same_code - {"migrate-from-go"} <= tried


def test_database_with_rows_of_its_own_follows_nobody_without_adopt(writer, tmp_path):
    host = Host(tmp_path / "own")
    host("aliases", "add", "own@d1.test", "alice")
    assert "rows of its own, which would be lost; if it is the right one, db mirror --adopt" in host.refuses(
        "db", "mirror", writer.shared
    )
    host("db", "mirror", writer.shared, "--adopt")
    assert rows_of(host.path) == rows_of(writer.path)


def test_follower_is_promoted_and_the_writer_that_comes_back_is_refused_until_adopt(writer, follower, tmp_path):
    third = Host(tmp_path / "third")
    third("db", "mirror", writer.shared)
    assert "in place of" in follower("db", "promote").stderr
    assert "is the writer already" in follower("db", "promote").stderr
    follower("aliases", "add", "new@d1.test", "carol")
    follower.publish()
    third("db", "mirror", follower.shared)
    assert rows_of(third.path) == rows_of(follower.path)
    # the old writer comes back
    writer("aliases", "add", "late@d1.test", "bob")
    writer.publish()
    assert "is no longer the writer" in third.refuses("db", "mirror", writer.shared)
    assert "this host is the writer itself" in writer.refuses("db", "mirror", follower.shared)
    writer("db", "mirror", follower.shared, "--adopt")
    assert rows_of(writer.path) == rows_of(follower.path)
    said = run_ctl("--db", writer.shared, "db", "mirror", writer.path, "--publish", check=False)
    assert (said.returncode, "nothing was published" in said.stderr) == (1, True)


def test_writer_that_lost_its_database_has_all_of_it_again_from_the_published_file(writer, follower):
    """README: db mirror shared.db, db promote; --publish --watch runs on, and no follower needs --adopt."""
    writer("aliases", "add", "last@d1.test", "alice")
    with watching(writer.shared, writer.path, "--publish") as publisher:
        wait_until(lambda: rows_of(writer.shared) == rows_of(writer.path), what="the last change")
        before = rows_of(writer.path)
        writer.path.unlink()
        wait_until(lambda: "tried again until it can" in publisher.said(), what="the reason")
        writer("db", "mirror", writer.shared)
        writer("db", "promote")
        assert rows_of(writer.path) == before
        writer("aliases", "add", "next@d1.test", "alice")
        wait_until(lambda: rows_of(writer.shared) == rows_of(writer.path), what="the next change")
    follower("db", "mirror", writer.shared)
    assert rows_of(follower.path) == rows_of(writer.path)
    assert follower.origin().epoch == 2


def test_two_that_were_promoted_are_told_apart(writer, follower, tmp_path):
    others = [Host(tmp_path / name) for name in ("two", "three")]
    for host in others:
        host("db", "mirror", writer.shared)
        host("db", "promote")
        host.publish()
    follower("db", "mirror", others[0].shared)
    assert "say that they are the writer" in follower.refuses("db", "mirror", others[1].shared)


def test_published_file_of_another_writer_is_not_written_over(writer, follower):
    follower("db", "promote")
    run_ctl("--db", writer.shared, "db", "mirror", follower.path, "--publish")  # of an older epoch: an old copy
    said = run_ctl("--db", writer.shared, "db", "mirror", writer.path, "--publish", check=False)
    assert said.returncode == 1
    assert "has rows of the writer" in said.stderr


def test_nothing_is_published_over_rows_that_were_not_published(writer, follower, tmp_path):
    """Such as by source and database in the wrong order, which would take back the changes since."""
    writer("aliases", "add", "new@d1.test", "carol")
    plain = Host(tmp_path / "plain")
    plain("aliases", "add", "plain@d1.test", "alice")
    before = {path: path.read_bytes() for path in (writer.path, follower.path, plain.path)}
    for host, source in ((writer, writer.shared), (follower, writer.path), (plain, writer.path)):
        assert "has rows that were not published" in host.refuses("db", "mirror", source, "--publish")
    assert "is no database of a host" in Ctl(tmp_path / "new.db").refuses("db", "mirror", writer.shared, "--publish")
    assert {path: path.read_bytes() for path in before} == before
    plain.publish()
    assert "has rows that were not published" in writer.refuses("db", "mirror", plain.path, "--publish")


def test_directory_that_is_missing_is_named(writer, tmp_path):
    absent = Ctl(tmp_path / "absent" / "own.db")
    for words in (("db", "mirror", writer.shared), ("db", "mirror", writer.path, "--publish")):
        assert f"database '{absent.path}': No such file or directory" in absent.refuses(*words)


def test_host_follows_a_follower_and_is_told_how_old_the_rows_of_the_writer_are(writer, follower, tmp_path):
    third = Host(tmp_path / "third")
    set_age(writer.shared, 50)
    follower("db", "mirror", writer.shared)
    third("db", "mirror", follower.path)
    assert third.origin()._replace(file="") == follower.origin()._replace(file="")
    writer("aliases", "add", "new@d1.test", "carol")
    writer.publish()
    follower("db", "mirror", writer.shared)
    third("db", "mirror", follower.path)
    assert rows_of(third.path) == rows_of(writer.path)
    follower("db", "promote")
    follower("aliases", "add", "end@d1.test", "carol")
    follower.publish()
    third("db", "mirror", follower.shared)
    assert rows_of(third.path) == rows_of(follower.path)
    assert "is no longer the writer" in third.refuses("db", "mirror", writer.shared)


def test_promotion_under_a_mirror_that_runs_is_not_undone(writer, follower):
    with watching(follower.path, writer.shared) as mirror:
        wait_until(mirror.said, what="start")
        follower("db", "promote")
        writer("aliases", "add", "new@d1.test", "carol")
        writer.publish()
        wait_until(lambda: "this host is the writer itself" in mirror.said(), what="the reason")
        follower("aliases", "add", "own@d1.test", "carol")
    assert follower.origin().role == "writer"
    assert {row[0] for row in rows_of(follower.path)["aliases"]} == {"info@d1.test", "sales@d1.test", "own@d1.test"}


def test_clock_of_the_writer_that_goes_back_stops_nothing(writer, follower, monkeypatch):
    now = time.time()
    for seconds in (100_000, -100_000, 5, -1_000_000, 0):
        monkeypatch.setattr(time, "time", lambda seconds=seconds: now + seconds)
        writer("aliases", "add", f"a{seconds}@d1.test", "alice")
        mailcloakmirror.publish(str(writer.shared), str(writer.path), thorough=True)
        mailcloakmirror.follow(str(follower.path), str(writer.shared), thorough=False)
        assert rows_of(follower.path) == rows_of(writer.path)
        assert follower.origin().published_at == int(now + seconds)
        monkeypatch.setattr(time, "time", lambda seconds=seconds: now + seconds - 3)  # nothing has changed since
        mailcloakmirror.publish(str(writer.shared), str(writer.path), thorough=False)
        mailcloakmirror.follow(str(follower.path), str(writer.shared), thorough=False)
        assert follower.origin().published_at == int(now + seconds - 3)


def test_host_that_follows_nobody_is_not_promoted(tmp_path):
    host = Host(tmp_path / "host")
    host("aliases", "add", "info@d1.test", "alice")
    assert "this database follows none" in host.refuses("db", "promote")


# ---- any rows, and any order of events

KEY = st.one_of(
    st.none(), st.sampled_from(["a", "A", "ä", "", "0", "a b", "\x00", "'"]), st.integers(-1, 2), st.sampled_from([b"a", b"\xff"])
)
VALUE = st.one_of(KEY, st.floats(allow_nan=False, width=32))


@st.composite
def contents(draw):
    """Rows for each table of the schema, some of which another program may have written."""
    found = {}
    for table in TABLES.values():
        values = st.tuples(*(KEY if column in table.keys else VALUE for column in table.columns))
        found[table.name] = draw(st.lists(values, max_size=6))
    return found


def fill(path, rows):
    mailcloak.prepare_database(str(path), 5)
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        for name, values in rows.items():
            marks = ", ".join("?" * len(TABLES[name].columns))
            for row in values:
                database.execute(f"INSERT OR IGNORE INTO {name} VALUES ({marks})", row)


def with_keys(path):
    """The rows of all tables that have a key."""
    found = rows_of(path)
    places = {name: [table.columns.index(key) for key in table.keys] for name, table in TABLES.items()}
    return {name: [row for row in rows if None not in [row[place] for place in places[name]]] for name, rows in found.items()}


@settings(max_examples=150)
@given(contents(), contents())
def test_any_rows_become_those_of_any_others(wanted, there):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        state, shared, own = (Path(folder) / name for name in ("state.db", "shared.db", "own.db"))
        fill(state, wanted)
        fill(own, there)
        mailcloakmirror.publish(str(shared), str(state), thorough=True)
        assert mailcloakmirror.publish(str(shared), str(state), thorough=True) == 0
        mailcloakmirror.follow(str(own), str(shared), thorough=True, adopt=True)
        assert rows_of(own) == with_keys(state)
        before = own.read_bytes()
        assert mailcloakmirror.follow(str(own), str(shared), thorough=True) == 0
        assert own.read_bytes() == before


class Model:
    """A host as an oracle sees it: its rows, whose they are, and what it has published."""

    def __init__(self):
        self.rows, self.role, self.writer, self.epoch, self.published = {}, "", None, 0, None

    def follows(self, theirs):
        if theirs is None:
            return False
        _, writer, epoch, version = theirs
        if self.role == "writer" or (not self.role and self.rows):
            return False
        return not self.role or epoch > self.epoch or ((epoch, writer) == (self.epoch, self.writer) and version >= self.version)


STEP = st.tuples(st.sampled_from(["change", "publish", "apply", "adopt", "promote"]), st.integers(0, 2), st.integers(0, 2))


@settings(max_examples=60)
@given(st.lists(STEP, max_size=25))
def test_any_order_of_publishing_following_and_promoting_is_as_an_oracle_says(steps):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        hosts = [Path(folder) / str(number) for number in range(3)]
        models = [Model() for _ in hosts]
        for host in hosts:
            host.mkdir()
            mailcloak.prepare_database(str(host / "state.db"), 5)
        for number, (event, place, other) in enumerate(steps):
            done = do(event, hosts[place], hosts[other])
            assert done == expect(event, models[place], models[other], place, number), (event, place, other)
            for host, model in zip(hosts, models):
                found = {row[0]: row[1] for row in rows_of(host / "state.db")["aliases"]}
                assert found == model.rows


def do(event, host, other):
    """Does the event happen at the host? other: the host whose published file it looks at."""
    state, shared = str(host / "state.db"), str(host / "shared.db")
    try:
        if event == "publish":
            mailcloakmirror.publish(shared, state, thorough=True)
        elif event in ("apply", "adopt"):
            mailcloakmirror.follow(state, str(other / "shared.db"), thorough=False, adopt=event == "adopt")
        else:
            with contextlib.closing(mailcloakcommon.open_database(state, create=False)) as database:
                if event == "promote":
                    context = type(
                        "C", (), {"database": database, "path": state, "options": type("O", (), {"json": False, "noun": "db"})}
                    )
                    mailcloakmirror.promote(context)
                else:
                    with mailcloakcommon.transaction(database):
                        number = database.execute("SELECT count(*) FROM aliases").fetchone()[0]
                        database.execute(
                            "INSERT INTO aliases (alias_email, username) VALUES (?, ?)", (f"{number}@{host.name}.test", "alice")
                        )
    except mailcloakcommon.Refused:
        return False
    return True


def expect(event, model, other, place, number):
    """The same by the oracle."""
    if event == "change":
        if model.role == "follower":
            return False
        model.rows = {**model.rows, f"{len(model.rows)}@{place}.test": "alice"}
    elif event == "publish":
        if model.role == "follower":
            return False
        if not model.role:
            model.role, model.writer, model.epoch = "writer", (place, number), 1
        last = model.published
        version = 0 if not last or last[1:3] != (model.writer, model.epoch) else last[3] + (last[0] != model.rows)
        model.published = (model.rows, model.writer, model.epoch, version)
    elif event == "promote":
        if not model.role:
            return False
        if model.role == "follower":
            model.role, model.writer, model.epoch = "writer", (place, number), model.epoch + 1
    else:
        if other.published is None or (event == "apply" and not model.follows(other.published)):
            return False
        model.role = "follower"
        model.rows, model.writer, model.epoch, model.version = other.published
    return True


# ---- staying


@contextlib.contextmanager
def watching(path, source, *options):
    """db mirror --watch in a process of its own; what it says goes to a file."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as said:
        command = [
            sys.executable,
            str(ROOT / "mailcloakctl.py"),
            "--db",
            str(path),
            "db",
            "mirror",
            str(source),
            "--watch",
            *options,
        ]
        process = subprocess.Popen(command, stderr=said)
        process.said = lambda: Path(said.name).read_text()
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def test_change_of_the_writer_is_with_the_follower_within_a_second(writer, follower):
    with watching(writer.shared, writer.path, "--publish") as publisher, watching(follower.path, writer.shared) as mirror:
        wait_until(lambda: publisher.said() and mirror.said(), what="start")
        times = []
        for number in range(5):
            writer("aliases", "add", f"a{number}@d1.test", "alice")
            begin = time.monotonic()
            wait_until(lambda: rows_of(follower.path) == rows_of(writer.path), what="the same rows")
            times.append(time.monotonic() - begin)
        assert min(times) < 1  # 0.5 s each at the most, on a machine without other work
        for process in (publisher, mirror):
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        assert mirror.said() == f"db: mirror: {follower.path} is as {writer.shared}\n"


@pytest.mark.long
def test_origin_is_renewed_while_nothing_changes(writer, follower, monkeypatch):
    def published_at(path):
        return writer.origin(path).published_at

    with contextlib.closing(sqlite3.connect(writer.shared)) as database, database:
        database.execute("UPDATE origin SET published_at = published_at - 100")
    old, serial = published_at(writer.shared), writer.origin(writer.shared).serial
    with watching(writer.shared, writer.path, "--publish"), watching(follower.path, writer.shared):
        wait_until(lambda: published_at(writer.shared) > old, what="renewed")
        wait_until(lambda: published_at(follower.path) == published_at(writer.shared), what="brought")
        first = published_at(writer.shared)
        wait_until(lambda: published_at(writer.shared) > first, what="renewed again")
    assert writer.origin(writer.shared).serial == serial


def test_reason_is_said_once_and_the_source_tried_again(writer, follower):
    good, before = writer.shared.read_bytes(), rows_of(follower.path)
    with watching(follower.path, writer.shared) as mirror:
        wait_until(lambda: mirror.said().count("\n") == 1, what="start")
        writer.shared.write_bytes(flipped_in_a_row(good))
        os.utime(writer.shared)
        with contextlib.closing(sqlite3.connect(writer.shared)) as database, database:
            database.execute("UPDATE origin SET serial = serial + 1")
        wait_until(lambda: "not those that the writer has published" in mirror.said(), what="reason")
        time.sleep(2.5)  # it is tried again meanwhile
        assert mirror.said().count("\n") == 2
        writer.shared.unlink()
        wait_until(lambda: "No such file" in mirror.said(), what="the next reason")
        assert mirror.poll() is None
        assert rows_of(follower.path) == before
        writer("aliases", "add", "new@d1.test", "carol")
        writer.publish()
        wait_until(lambda: rows_of(follower.path) == rows_of(writer.path), what="the rows")
        wait_until(lambda: mirror.said().count("\n") == 4, what="the line that follows")
        assert mirror.said().endswith(f"db: mirror: {follower.path} is as {writer.shared}\n")


def test_database_of_a_follower_that_is_lost_or_changed_is_as_before_though_nothing_comes(writer, follower):
    """With the storage or the writer away, the copy beside it is all there is."""
    before = rows_of(follower.path)
    with watching(follower.path, writer.shared) as mirror:
        wait_until(mirror.said, what="start")
        follower.path.unlink()
        wait_seconds(follower.path.exists, seconds=5, what="the database")
        assert rows_of(follower.path) == before
        for change in ("DELETE FROM aliases", "UPDATE aliases SET username = 'mallory'"):
            with contextlib.closing(sqlite3.connect(follower.path)) as database, database:
                database.execute(change)
            wait_seconds(lambda: rows_of(follower.path) == before, seconds=5, what="the rows")
        follower.path.unlink()
        mailcloak.prepare_database(str(follower.path), 5)  # as the daemon does
        wait_seconds(lambda: rows_of(follower.path) == before, seconds=5, what="the rows")
        assert follower.origin().role == "follower"


def test_damaged_database_of_a_follower_is_made_again_and_kept_beside_it(writer, follower):
    before = rows_of(follower.path)
    with watching(follower.path, writer.shared) as mirror:
        wait_until(mirror.said, what="start")
        good = follower.path.read_bytes()
        damaged = good[:4096] + b"\xff" * (len(good) - 4096)
        source = writer.shared.read_bytes()
        writer.shared.write_bytes(b"x" * 5000)
        follower.path.write_bytes(damaged)
        wait_until(lambda: "tried again until it can" in mirror.said(), what="the reason")
        assert follower.path.read_bytes() == damaged  # it is better than none
        writer.shared.write_bytes(source)
        wait_until(lambda: "was damaged, and is made again" in mirror.said(), what="the database")
        assert rows_of(follower.path) == before
        assert (follower.path.parent / "state.db.damaged").read_bytes() == damaged
        assert sorted(path.name for path in follower.path.parent.iterdir()) == ["state.db", "state.db.damaged"]
        follower.path.write_text("this is no database, but perhaps another file\n" * 200)
        wait_until(lambda: "file is not a database" in mirror.said(), what="the reason")
        follower.path.unlink()
        wait_seconds(follower.path.exists, seconds=5, what="the database")


def test_damaged_database_of_a_writer_is_not_replaced_by_what_it_no_longer_follows(writer, follower):
    follower("db", "promote")
    with contextlib.closing(sqlite3.connect(follower.path)) as database:
        pages = database.execute("SELECT rootpage FROM sqlite_master WHERE tbl_name = ?", (min(TABLES),)).fetchall()
    damaged = bytearray(follower.path.read_bytes())
    for (page,) in pages:
        damaged[(page - 1) * 4096 : page * 4096] = b"\xff" * 4096
    follower.path.write_bytes(damaged)
    with watching(follower.path, writer.shared) as mirror:
        wait_until(lambda: "this host is the writer" in mirror.said(), what="the reason")
    assert follower.path.read_bytes() == damaged


def test_fifo_that_comes_in_place_of_the_source_is_not_waited_for(tmp_path, monkeypatch):
    """Between two looks at it."""
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setattr(os.path, "isfile", lambda _: True)
    status = (tmp_path / "fifo").stat()
    assert mailcloakmirror.state_of(str(tmp_path / "fifo"))[0] == (status.st_ino, 0, status.st_mtime_ns)


def test_file_put_in_place_by_rename_is_followed(writer, follower, tmp_path):
    with watching(follower.path, writer.shared) as mirror:
        wait_until(mirror.said, what="start")
        other = Host(tmp_path / "other")
        shutil.copy(writer.path, other.path)
        shutil.copy(writer.shared, other.shared)
        other("aliases", "add", "new@d1.test", "carol")
        run_ctl("--db", other.shared, "db", "mirror", other.path, "--publish")
        os.rename(other.shared, writer.shared)
        wait_until(lambda: rows_of(follower.path) == rows_of(other.path), what="the rows")


def test_adopt_counts_once(writer, follower, tmp_path):
    other = Host(tmp_path / "other")
    other("aliases", "add", "other@d1.test", "carol")
    other.publish()
    with watching(follower.path, writer.shared, "--adopt") as mirror:
        wait_until(mirror.said, what="start")
        os.rename(other.shared, writer.shared)
        wait_until(lambda: "say that they are the writer" in mirror.said(), what="refusal")
    assert rows_of(follower.path) == rows_of(writer.path)


def test_commit_to_a_source_in_wal_mode_behind_a_symlink_is_seen(writer, follower, tmp_path):
    """Only the file beside the true one changes."""
    (tmp_path / "link.db").symlink_to(writer.shared)
    with contextlib.closing(sqlite3.connect(writer.shared)) as database:
        database.execute("SELECT count(*) FROM aliases").fetchall()  # who has it open keeps the file
        with watching(follower.path, tmp_path / "link.db") as mirror:
            wait_until(mirror.said, what="start")
            writer("aliases", "add", "new@d1.test", "carol")
            writer.publish()
            wait_until(lambda: rows_of(follower.path) == rows_of(writer.path), what="the rows")


def test_two_commits_of_one_time_and_size_are_told_apart(writer):
    before = writer.path.stat()
    state = mailcloakmirror.state_of(str(writer.path))
    writer("aliases", "disable", "info@d1.test")
    os.utime(writer.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert writer.path.stat().st_size == before.st_size
    assert mailcloakmirror.state_of(str(writer.path)) != state


@pytest.mark.long
def test_kill_at_any_moment_leaves_rows_of_one_state(writer, follower):
    """Each change gives all aliases another username, the same."""
    with contextlib.closing(sqlite3.connect(writer.path)) as database, database:
        rows = [(f"a{number}@d1.test", "alice") for number in range(20_000)]
        database.executemany("INSERT INTO aliases (alias_email, username) VALUES (?, ?)", rows)
        database.execute("UPDATE aliases SET username = 'alice'")
    writer.publish()
    follower("db", "mirror", writer.shared)
    for number in range(8):
        with contextlib.closing(sqlite3.connect(writer.path)) as database, database:
            database.execute("UPDATE aliases SET username = ?", (f"user{number}",))
        with watching(writer.shared, writer.path, "--publish"), watching(follower.path, writer.shared):
            time.sleep(random.uniform(0.2, 1.2))
        assert len({row[1] for row in rows_of(follower.path)["aliases"]}) == 1
    writer.publish()
    follower("db", "mirror", writer.shared)
    assert {row[1] for row in rows_of(follower.path)["aliases"]} == {"user7"}


@pytest.mark.long
@pytest.mark.alone
def test_million_aliases_need_little_memory(tmp_path):
    host, other = Host(tmp_path / "a"), Host(tmp_path / "b")
    mailcloak.prepare_database(str(host.path), 5)
    with contextlib.closing(sqlite3.connect(host.path)) as database, database:
        rows = ((f"alias-number-{number}@department-{number % 50}.example.org", "alice") for number in range(1_000_000))
        database.executemany("INSERT INTO aliases (alias_email, username) VALUES (?, ?)", rows)
    for _ in range(2):
        assert peak_kib("--db", host.shared, "db", "mirror", host.path, "--publish") < 300 * 1024
        assert peak_kib("--db", other.path, "db", "mirror", host.shared) < 300 * 1024
        with contextlib.closing(sqlite3.connect(host.path)) as database, database:
            database.execute("UPDATE aliases SET username = 'bob'")


def peak_kib(*arguments):
    """The memory that mailcloakctl had at most."""
    script = "import sys, mailcloakctl; mailcloakctl.main(sys.argv[1:])"
    # not getrusage(2), which has the peak of the process that began this one
    script += "; print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0], file=sys.stderr)"
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return int(result.stderr.split()[-1])


# ---- what status, doctor and the metrics say


def set_age(path, seconds):
    """Let what was published or brought last be so old."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE origin SET published_at = ?", (int(time.time() - seconds),))


@pytest.fixture
def late_at_60(make_config):
    """A configuration for a database, without a daemon."""

    def make(path, **replication):
        file = path.with_name("config.yaml")
        file.write_text(yaml.safe_dump(make_config(sqlite={"path": str(path)}, static_users=USERS, replication=replication)))
        file.chmod(0o600)
        return str(file)

    return make


def doctor_says(config):
    options = argparse.Namespace(config=config, db=None, postfix_config=None, dovecot_config=None, json=False)
    return list(mailcloakdoctor.check_replication(mailcloakfindings.Installation(options)))


def test_host_alone_has_a_role_and_no_line(tmp_path, late_at_60):
    host = Host(tmp_path / "host")
    host("aliases", "add", "info@d1.test", "alice")
    found = mailcloakcommon.read_replication(str(host.path), 60)
    assert found == {"role": "single"}
    assert list(mailcloakask.replication_fields(found)) == []
    assert list(mailcloakask.replication_metrics(found)) == []
    assert doctor_says(late_at_60(host.path)) == []
    assert mailcloakcommon.read_replication(str(tmp_path / "absent.db"), 60) is None


def test_follower_says_which_host_it_follows_and_how_old_that_is(writer, follower, late_at_60):
    config, name = late_at_60(follower.path), os.uname().nodename
    set_age(follower.path, 20)
    (finding,) = doctor_says(config)
    assert finding.state == "ok"
    assert re.fullmatch(rf"follows {name} \(epoch 1, serial \d+\), as of 2\d(\.\d)? s ago", finding.text)
    set_age(follower.path, 70)
    (finding,) = doctor_says(config)
    assert (finding.check, finding.state) == ("replication", "warning")
    assert "replication.max_lag_seconds is 60" in finding.text
    assert (
        "on the writer: mailcloak-publish, mailcloak-replicate; else on this host: mailcloak-follow, mailcloak-mirror"
        in finding.remedy
    )
    assert doctor_says(late_at_60(follower.path, max_lag_seconds=100))[0].state == "ok"
    # the same in the metrics, though the daemon does not run, and for people
    shown = run_ctl("--config", config, "status", "--prometheus", "-").stdout
    assert "mailcloak_up 0.0" in shown
    info = f'mailcloak_replication_info{{role="follower",writer="{follower.origin().writer}"}} 1.0'
    assert info in shown
    assert re.search(r"^mailcloak_replication_age_seconds 7\d\.\d$", shown, re.MULTILINE)
    assert f"mailcloak_replication_serial {float(follower.origin().serial)!r}" in shown
    ((label, text, colour),) = mailcloakask.replication_fields(mailcloakcommon.read_replication(str(follower.path), 60))
    assert (label, colour) == ("several hosts", mailcloakcommon.RED)
    assert "; if other followers are late too, look on the writer" in text


def test_time_in_the_future_is_a_warning_since_it_would_hide_a_stall(follower, late_at_60):
    config = late_at_60(follower.path)
    set_age(follower.path, -30)
    assert doctor_says(config)[0].state == "ok"
    set_age(follower.path, -100)
    (finding,) = doctor_says(config)
    assert finding.state == "warning"
    assert "as of a time in the future, so its clock or that of this host is wrong; replication.max_lag" in finding.text
    assert "mailcloak_replication_age_seconds inf\n" in run_ctl("--config", config, "status", "--prometheus", "-").stdout
    ((_, text, colour),) = mailcloakask.replication_fields(mailcloakcommon.read_replication(str(follower.path), 60))
    assert (colour, "in the future" in text) == (mailcloakcommon.RED, True)


def test_writer_says_when_it_has_published(writer, late_at_60):
    config = late_at_60(writer.path)
    assert re.fullmatch(r"the writer \(epoch 1\), published for mailcloak-replicate .* ago", doctor_says(config)[0].text)
    set_age(writer.shared, 100)
    (finding,) = doctor_says(config)
    assert finding.state == "warning"
    assert finding.remedy.startswith("start mailcloak-publish on this host again")
    assert finding.remedy.endswith("if another host is the writer now, let this one follow it")
    writer.shared.unlink()
    (finding,) = doctor_says(config)
    assert (finding.state, "has published nothing yet" in finding.text) == ("warning", True)


def test_doctor_finds_a_copy_of_another_host_that_is_not_used(writer, tmp_path, late_at_60):
    """The place is that of the example units: /var/lib/mailcloak and /var/lib/mailcloak-shared."""
    host = Host(tmp_path / "host")
    config = late_at_60(host.path)
    (tmp_path / "host-shared").mkdir()
    shutil.copy(writer.shared, tmp_path / "host-shared" / "shared.db")
    (finding,) = doctor_says(config)
    assert (finding.state, finding.text) == ("warning", "shared.db is there, but the database of this host cannot be read")
    assert finding.remedy.startswith("on a follower no backup: start mailcloak-mirror")
    host("aliases", "add", "own@d1.test", "alice")
    (finding,) = doctor_says(config)
    assert (finding.state, "neither follows another host nor is published" in finding.text) == ("warning", True)
    host("db", "mirror", tmp_path / "host-shared" / "shared.db", "--adopt")
    (finding,) = doctor_says(config)
    assert finding.state == "ok"


def test_status_of_a_daemon_on_a_follower(writer, make_daemon, short_dir):
    host = Host(short_dir)
    host("db", "mirror", writer.shared)
    daemon = make_daemon(static_users=USERS).start()
    shown = run_ctl("--config", daemon.config_path, "status").stdout
    assert re.search(rf"^several hosts  follows {os.uname().nodename} \(epoch 1, serial \d+\), as of .* ago$", shown, re.MULTILINE)
    found = json.loads(run_ctl("--config", daemon.config_path, "status", "--json").stdout)["replication"]
    assert (found["role"], found["serial"], found["late"]) == ("follower", host.origin().serial, False)
    assert daemon.ask_map("alias info@d1.test") == "OK alice@d1.test"
    writer("aliases", "add", "info@d1.test", "bob", "--replace")
    writer.publish()
    host("db", "mirror", writer.shared)
    assert daemon.ask_map("alias info@d1.test") == "OK bob@d1.test"


# ---- the README


def test_three_lines_of_readme_make_a_host_follow_another(writer, tmp_path):
    text = (ROOT / "README.md").read_text()
    (lines,) = re.findall(r"^```\n(set -e\nssh .*\nrsync -a .*\n.* db mirror .*\n)```$", text, re.MULTILINE)
    own = Host(tmp_path / "own")
    there = tmp_path / "there"
    tools = {
        "ssh": f'shift 2; {sys.executable} {ROOT}/mailcloakctl.py "$@"',
        "rsync": 'cp -a "${2#*:}" "$3.new" && mv "$3.new" "$3"',
    }
    for name, script in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    lines = lines.replace("mx1.example.org:/var/lib/mailcloak/shared.db", f"mx1.example.org:{there}")
    lines = lines.replace("--db /var/lib/mailcloak/shared.db", f"--db {there}").replace(
        "/var/lib/mailcloak/state.db", str(writer.path)
    )

    def run():
        return run_job(lines, own, tmp_path, [("/var/lib/mailcloak/shared.db", tmp_path / "here")])

    for number in range(2):
        result = run()
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        assert rows_of(own.path) == rows_of(writer.path)
        writer("aliases", "add", f"a{number}@d1.test", "alice")
    assert own.origin().role == "follower"
    assert "this database follows that of" in own.refuses("aliases", "add", "x@d1.test", "alice")
    shutil.copy(there, tmp_path / "old")
    run()
    assert "it is older than what is here" in own.refuses("db", "mirror", tmp_path / "old")


# ---- the log


@pytest.mark.real("root")
def test_change_that_was_brought_is_noted_in_syslog(writer, follower, short_dir):
    import socket

    writer("aliases", "add", "new@d1.test", "carol")
    writer.publish()
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as syslog:
        syslog.bind(str(short_dir / "log"))
        syslog.settimeout(20)
        command = [sys.executable, ROOT / "mailcloakctl.py", "--db", follower.path, "db", "mirror", writer.shared]
        subprocess.run(in_own_dev(list(map(str, command)), short_dir / "log"), check=True, capture_output=True)
        line = syslog.recv(4096).decode()
    assert f"db: mirror <{writer.shared}> rows=1 host={os.uname().nodename} serial=" in line
