"""Threads that ask the database at the same time are answered together, by one of them."""

import contextlib
import os
import shutil
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import wait_until

import mailcloak

ALIASES, APPS, THREADS, COMMITS = 40, 10, 16, 50


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "state.db"
    mailcloak.prepare_database(str(path), 1)
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.executemany(
            "INSERT INTO aliases (alias_email, username) VALUES (?, '0')", ((f"{n}@d1.test",) for n in range(ALIASES))
        )
        database.executemany(
            "INSERT INTO apps (app_id, secret_hash, owner) VALUES (?, '{X}hash', '0')", ((f"app{n}",) for n in range(APPS))
        )
        database.executemany(
            "INSERT INTO app_from (app_id, from_addr) VALUES (?, ?)", ((f"app{n}", f"{n}@d1.test") for n in range(APPS))
        )
    return path


def wait_for_questions(database, count):
    wait_until(lambda: len(database._waiting) >= count, 5, f"{count} threads that wait")


@pytest.mark.parametrize("way", ["delete", "wal", pytest.param("replaced", marks=pytest.mark.long)])
def test_each_thread_gets_its_own_row_as_it_was_committed_before_it_asked(path, way):
    """The writer counts: in each commit all aliases and apps have the number of the commit in place of a username."""
    database, committed, end = mailcloak.Database(str(path)), 0, time.monotonic() + 30
    together = []

    def goes_on():
        return committed < COMMITS and time.monotonic() < end

    def write():
        nonlocal committed
        while goes_on():
            file = shutil.copy(path, path.with_name("new.db")) if way == "replaced" else path
            with contextlib.closing(sqlite3.connect(file, timeout=10, isolation_level=None)) as writer:
                writer.execute(f"PRAGMA journal_mode = {'wal' if way == 'wal' else 'delete'}")
                for _ in range(1 if way == "replaced" else 10):
                    writer.execute("BEGIN IMMEDIATE")
                    writer.execute("UPDATE aliases SET username = ?", (committed + 1,))
                    writer.execute("UPDATE apps SET owner = ?", (committed + 1,))
                    writer.execute("COMMIT")
                    os.replace(file, path)
                    committed += 1
                    time.sleep(0.005)

    def ask(thread):
        asked = 0
        while goes_on():
            number, before = (thread * 7 + asked) % (ALIASES + 5), committed
            alias = database.find_alias(f"{number}@d1.test")
            assert (alias is not None) == (number < ALIASES)
            assert alias is None or before <= int(alias.users[0]) <= committed + 1
            number, before = (thread * 3 + asked) % (APPS + 2), committed
            app = database.find_app(f"app{number}", f"{asked % 3 or number}@d1.test")
            assert (app is not None) == (number < APPS)
            assert app is None or (before <= int(app.owner) <= committed + 1 and app.may_send == ((asked % 3 or number) == number))
            together.append(len(database._waiting))
            asked += 1
        database.close()
        return asked

    with ThreadPoolExecutor(THREADS + 1) as threads:
        writer = threads.submit(write)
        asked = sum(threads.map(ask, range(THREADS)))
        writer.result()
    assert committed >= COMMITS
    assert asked > COMMITS
    assert max(together) > 3  # else nothing was tried
    assert (len(database._open), database._waiting, database._is_asked) == (0, [], False)


def test_who_waits_too_long_for_the_thread_that_asks_gives_up_and_loses_nobody(path, monkeypatch):
    monkeypatch.setattr(mailcloak, "DATABASE_BUSY_SECONDS", 30)
    monkeypatch.setattr(mailcloak, "DATABASE_WAIT_SECONDS", 0.3)
    database = mailcloak.Database(str(path))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as writer, ThreadPoolExecutor(4) as threads:
        writer.execute("BEGIN EXCLUSIVE")
        first = threads.submit(database.find_alias, "1@d1.test")  # waits for SQLite
        wait_until(lambda: database._is_asked and not database._waiting, 5, "question to SQLite")
        others = [threads.submit(database.find_alias, f"{n}@d1.test") for n in (2, 3)]
        for other in others:
            with pytest.raises(mailcloak.DatabaseUnavailable, match=r"no answer within 0\.3 s"):
                other.result(5)
        assert not database._waiting
        assert not first.done()
        last = threads.submit(database.find_app, "app4", "4@d1.test")
        wait_for_questions(database, 1)
        writer.execute("ROLLBACK")
        assert first.result(5).users == ("0",)
        assert last.result(5).may_send
        assert database.works()


def test_error_in_the_thread_that_asks_for_all_defers_these_and_nobody_after_them(path, monkeypatch):
    database, may_fail = mailcloak.Database(str(path)), threading.Event()

    def fail(version):
        may_fail.wait(5)
        raise RuntimeError

    with ThreadPoolExecutor(4) as threads, monkeypatch.context() as patch:
        patch.setattr(database, "_connection", fail)
        first = threads.submit(database.find_alias, "1@d1.test")
        wait_until(lambda: database._is_asked and not database._waiting, 5, "question to SQLite")
        others = [threads.submit(database.find_alias, f"{n}@d1.test") for n in (2, 3)]
        wait_for_questions(database, 2)
        may_fail.set()
        for each in (first, *others):  # one of the others asks for both
            assert isinstance(each.exception(5), (RuntimeError, mailcloak.DatabaseUnavailable))
    assert database.find_alias("2@d1.test").users == ("0",)


def test_address_that_is_there_twice_is_deferred(tmp_path, caplog):
    path = tmp_path / "not locked" / "state.db"  # the path is no part of what SQLite says
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        schema = mailcloak.SCHEMA.replace("alias_email TEXT PRIMARY KEY", "alias_email TEXT")
        for statement in schema.split(";\n"):
            database.execute(statement)
        database.execute(f"PRAGMA user_version = {mailcloak.SCHEMA_VERSION}")
        database.execute("INSERT INTO aliases (alias_email, username) VALUES ('twice@d1.test', 'alice'), ('twice@d1.test', 'bob')")
        database.execute("INSERT INTO aliases (alias_email, username) VALUES ('once@d1.test', 'alice')")
    found = mailcloak.Database(str(path))
    with pytest.raises(mailcloak.DatabaseUnavailable, match="there twice"):
        found.find_alias("twice@d1.test")
    assert found.find_alias("once@d1.test").users == ("alice",)
    own = mailcloak._Question(found.FIND_ALIASES, "once@d1.test", has_connection=False)
    others = [mailcloak._Question(found.FIND_ALIASES, f"{name}@d1.test", has_connection=False) for name in ("twice", "none")]
    found._waiting += others
    found._ask_for_all(own)
    assert [(each.row is not None, "there twice" in each.error) for each in (own, *others)] == [
        (True, False),
        (False, True),
        (True, False),
    ]
    for _ in range(5):  # whoever knows the address can ask for it again and again
        with pytest.raises(mailcloak.DatabaseUnavailable):
            found.find_alias("twice@d1.test")
        assert not found._fails or found.find_alias("once@d1.test")
        assert found.find_alias("none@d1.test") is None
        found._rows = mailcloak.BoundedMap(10)
    assert [record.message.partition(" path=")[0].rpartition(": ")[2] for record in caplog.records] == [
        "the table lacks its primary key; answers that need it are deferred until it is fixed",
        "works again",
    ] * mailcloak.MAX_FAULTS_TOLD
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("DELETE FROM aliases WHERE username = 'bob'")
    assert found.find_alias("twice@d1.test").users == ("alice",)
    assert found.works()


def test_disk_that_takes_long_to_fail_is_not_asked_for_each_question_alone(path, monkeypatch):
    monkeypatch.setattr(mailcloak, "DATABASE_BUSY_SECONDS", 0.1)
    database, asked = mailcloak.Database(str(path)), []

    def fail(version):
        asked.append(version)
        time.sleep(0.15)
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(database, "_connection", fail)
    own, *others = [mailcloak._Question(database.FIND_ALIASES, f"{n}@d1.test", has_connection=False) for n in range(20)]
    database._waiting += others
    database._ask_for_all(own)
    assert len(asked) == 2
    assert all("disk I/O error" in each.error for each in (own, *others))


def test_directory_whose_link_is_led_elsewhere_and_back_gives_no_row_of_the_other_later(path, tmp_path, monkeypatch):
    there, link = tmp_path / "there", tmp_path / "link"
    there.mkdir()
    shutil.copy(path, there)
    with contextlib.closing(sqlite3.connect(there / "state.db")) as database, database:
        database.execute("UPDATE aliases SET username = 'elsewhere'")
    link.symlink_to(tmp_path)
    database, realpath = mailcloak.Database(str(link / "state.db")), os.path.realpath

    def lead_elsewhere_and_back(name):
        link.unlink()
        link.symlink_to(there)
        found = realpath(name)
        link.unlink()
        link.symlink_to(tmp_path)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(os.path, "realpath", lead_elsewhere_and_back)
        assert database.find_alias("1@d1.test").users == ("elsewhere",)
    assert [database.find_alias("1@d1.test").users for _ in range(3)] == [("0",)] * 3
