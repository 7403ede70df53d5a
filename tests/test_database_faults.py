"""The database fails under a running daemon: locks, killed writers, files lost, broken or exchanged, a full disk, many writers at once.

During a fault, an answer that only SQLite can give is a temporary failure, never a refusal, a wrong alias or a permission. After it the
daemon continues without a restart and no committed row is missing. A commit counts from the next question, even if the same question was
asked before over the same connection.
"""

from __future__ import annotations

import contextlib
import io
import os
import pwd
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from typing import Any, Callable, NamedTuple

import pytest
from conftest import ROOT, USERS, wait_until
from test_lifecycle import nobody_daemon
from test_mailcloakctl import has_open

import mailcloak
import mailcloakctl

root_only = pytest.mark.real("root")

INTERNAL = "451 4.3.0 Temporary internal error"
NO_USER = "550 5.1.1 No such user"
NOT_OWNED = "553 5.7.1 Sender not owned by authenticated user"
NOT_LOGGED_IN = "553 5.7.1 Sending from local domains requires authentication"
SEED = 20261123

STOCK = [
    "INSERT INTO aliases (alias_email, username, enabled)"
    " VALUES ('info@d1.test', 'alice', 1), ('off@d1.test', 'alice', 0), ('shop@d1.test', 'bob', 1)",
    "INSERT INTO apps (app_id, secret_hash) VALUES ('printer', '{X}hash')",
    "INSERT INTO app_from (app_id, from_addr) VALUES ('printer', 'scan@d1.test')",
]
STOCK_ROWS = {
    "aliases": [("info@d1.test", "alice", 1), ("off@d1.test", "alice", 0), ("shop@d1.test", "bob", 1)],
    "apps": [("printer", "{X}hash", 1)],
    "app_from": [("printer", "scan@d1.test", 1)],
}


def mail_from(sender, sasl_username="", sasl_method="XOAUTH2"):
    return {"protocol_state": "MAIL", "sender": sender, "sasl_username": sasl_username, "sasl_method": sasl_method}


# What is asked (attributes of a policy request, or an address for the alias map), the answer, and the answer without the database.
QUESTIONS = {
    "recipient, alias": ({"recipient": "info@d1.test"}, "DUNNO", INTERNAL),
    "recipient, alias with an extension": ({"recipient": "info+x@d1.test"}, "DUNNO", INTERNAL),
    "recipient, disabled alias": ({"recipient": "off@d1.test"}, NO_USER, INTERNAL),
    "recipient, unknown": ({"recipient": "stranger@d1.test"}, NO_USER, INTERNAL),
    "recipient, primary e-mail": ({"recipient": "alice@d1.test"}, "DUNNO", "DUNNO"),
    "recipient, elsewhere": ({"recipient": "x@else.test"}, "DUNNO", "DUNNO"),
    "sender, own alias": (mail_from("info@d1.test", "alice"), "DUNNO", INTERNAL),
    "sender, alias of another": (mail_from("shop@d1.test", "alice"), NOT_OWNED, INTERNAL),
    "sender, own primary e-mail": (mail_from("alice@d1.test", "alice"), "DUNNO", "DUNNO"),
    "sender, not logged in": (mail_from("info@d1.test"), NOT_LOGGED_IN, NOT_LOGGED_IN),
    "sender, app": (mail_from("scan@d1.test", "printer", "PLAIN"), "DUNNO", INTERNAL),
    "sender, not the app's": (mail_from("info@d1.test", "printer", "PLAIN"), NOT_OWNED, INTERNAL),
    "map, alias": ("info@d1.test", "OK alice@d1.test", "TEMP"),
    "map, alias with an extension": ("info+x@d1.test", "OK alice+x@d1.test", "TEMP"),
    "map, alias of another": ("shop@d1.test", "OK bob@d1.test", "TEMP"),
    "map, disabled alias": ("off@d1.test", "NOTFOUND ", "TEMP"),
    "map, unknown": ("stranger@d1.test", "NOTFOUND ", "TEMP"),
    "map, elsewhere": ("x@else.test", "NOTFOUND ", "NOTFOUND "),
}
REQUESTS = {name: question[0] for name, question in QUESTIONS.items()}
GOOD = {name: question[1] for name, question in QUESTIONS.items()}
FAULT = {name: question[2] for name, question in QUESTIONS.items()}
WITHOUT_INFO = {  # with info@d1.test disabled
    **GOOD,
    "recipient, alias": NO_USER,
    "recipient, alias with an extension": NO_USER,
    "sender, own alias": NOT_OWNED,
    "map, alias": "NOTFOUND ",
    "map, alias with an extension": "NOTFOUND ",
}


class Kept:
    """Questions, each on a connection of its own that is kept, asked all at once, as the processes of Postfix do."""

    def __init__(self, daemon, requests=None):
        self._daemon = daemon
        self._requests = requests or REQUESTS
        self.connect()

    def connect(self):
        self._clients = {
            name: self._daemon.policy() if isinstance(request, dict) else self._daemon.socketmap()
            for name, request in self._requests.items()
        }

    def ask(self):
        """The answer to each question; a socketmap's temporary failure without its reason."""
        for name, client in self._clients.items():
            request = self._requests[name]
            if isinstance(request, dict):
                client.send(**request)
            else:
                client.send(f"alias {request}")
        answers = {name: client.receive() for name, client in self._clients.items()}
        return {name: "TEMP" if (answer or "").startswith("TEMP ") else answer for name, answer in answers.items()}

    def ask_twice(self):
        """The answers, which are the same when they are asked for again."""
        answers = self.ask()
        assert self.ask() == answers
        return answers

    def close(self):
        for client in self._clients.values():
            client.close()


def ask_anew(daemon, requests=None):
    """The answers over new connections."""
    with contextlib.closing(Kept(daemon, requests)) as connections:
        return connections.ask()


def ask_afresh(daemon, number):
    """The answers, over new connections, to questions that were never asked before and that the database decides: nobody and no app."""
    requests = {
        "recipient": {"recipient": f"stranger{number}@d1.test"},
        "app": mail_from("scan@d1.test", f"fax{number}", "PLAIN"),
        "map": f"stranger{number}@d1.test",
    }
    return ask_anew(daemon, requests)


FRESH_FAULT = {"recipient": INTERNAL, "app": INTERNAL, "map": "TEMP"}


def wrong_answers(answers, good=None):
    """Those that are neither the good answer nor a temporary failure."""
    good = good or GOOD
    return {name: answer for name, answer in answers.items() if answer not in (good[name], FAULT[name])}


def sql(path, *statements):
    """Statements in autocommit mode; the rows of the last one."""
    rows = []
    with contextlib.closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as database:
        for statement in statements:
            rows = database.execute(statement).fetchall()
    return rows


def rows_of(path):
    columns = {
        "aliases": "alias_email, username, enabled",
        "apps": "app_id, secret_hash, enabled",
        "app_from": "app_id, from_addr, enabled",
    }
    return {table: sql(path, f"SELECT {columns[table]} FROM {table} ORDER BY 1, 2") for table in columns}


def change_counter(path):
    """Bytes 24 to 27 of the header, which each commit in rollback-journal mode changes (SQLite, Database File Format, section 1.3.7)."""
    with open(path, "rb") as file:
        return int.from_bytes(file.read(28)[24:], "big")


def set_change_counter(path, counter):
    with open(path, "r+b") as file:
        for offset in (24, 92):  # the second says for which counter the size in the header holds
            file.seek(offset)
            file.write(counter.to_bytes(4, "big"))


def copy_in_place(source, path):
    """As an administrator restores a backup: the file keeps its inode."""
    subprocess.run(["cp", str(source), str(path)], check=True)


def copy_by_rename(source, path):
    shutil.copy(source, f"{path}.new")
    os.rename(f"{path}.new", path)


def assert_serves(daemon, kept, answers=None, rows=None):
    """The same process answers rightly, over kept and over new connections, and every committed row is there, and no other."""
    answers = answers or GOOD
    assert kept.ask() == answers
    assert ask_anew(daemon) == answers
    assert rows_of(daemon.database) == (rows or STOCK_ROWS)
    assert sql(daemon.database, "PRAGMA integrity_check") == [("ok",)]
    assert daemon.process.poll() is None
    log = daemon.log()
    assert log.count("daemon: started") == 1
    assert "Traceback" not in log
    assert "internal error" not in log


def assert_change_counts_at_once(daemon, kept):
    assert kept.ask_twice() == GOOD
    daemon.ctl("aliases", "disable", "info@d1.test")
    assert kept.ask_twice() == WITHOUT_INFO
    daemon.ctl("aliases", "enable", "info@d1.test")
    assert kept.ask_twice() == GOOD


@pytest.fixture
def daemon(static_daemon):
    """A running daemon with two aliases, a disabled one, and an app."""
    sql(static_daemon.database, *STOCK)
    return static_daemon


@pytest.fixture
def kept(daemon):
    """All questions over kept connections, asked twice already."""
    kept = Kept(daemon)
    assert kept.ask_twice() == GOOD
    return kept


@contextlib.contextmanager
def child(script, *arguments):
    """A Python process that has printed its first line; it is to go on when its standard input is closed."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{script}", *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def finish(process):
    """Let a child go on; its exit code."""
    process.stdin.close()
    return process.wait(60)


# ---- locked

LOCK = """
import sqlite3
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("BEGIN EXCLUSIVE")
database.execute("INSERT INTO aliases (alias_email, username) VALUES ('late@d1.test', 'alice')")
print("locked", flush=True)
sys.stdin.read()
database.execute("COMMIT")
"""
ROWS_WITH_LATE = {**STOCK_ROWS, "aliases": sorted([*STOCK_ROWS["aliases"], ("late@d1.test", "alice", 1)])}


def test_file_locked_for_a_second_is_waited_for_and_answered_rightly(daemon, kept):
    with child(LOCK, daemon.database) as writer:
        timer = threading.Timer(1, writer.stdin.close)
        timer.start()
        started = time.monotonic()
        assert kept.ask() == GOOD
        assert ask_afresh(daemon, 1) == {"recipient": NO_USER, "app": NOT_OWNED, "map": "NOTFOUND "}
        assert 0.9 < time.monotonic() - started < mailcloak.DATABASE_BUSY_SECONDS + 1
        timer.join()
        assert writer.wait(10) == 0
    assert_serves(daemon, kept, rows=ROWS_WITH_LATE)
    assert "deferred until it is fixed" not in daemon.log()


@pytest.mark.long
@pytest.mark.parametrize("seconds", [5, pytest.param(60, marks=pytest.mark.timeout(1800))])
def test_file_locked_for_longer_is_a_temporary_failure_and_served_again_at_once(daemon, kept, seconds):
    with child(LOCK, daemon.database) as writer:
        end, number = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            started, number = time.monotonic(), number + 1
            assert not wrong_answers(kept.ask())
            assert time.monotonic() - started < 3 * mailcloak.DATABASE_BUSY_SECONDS  # two addresses are looked up at the most
            assert ask_afresh(daemon, number) == FRESH_FAULT
        assert finish(writer) == 0
    started = time.monotonic()
    assert kept.ask() == GOOD
    assert time.monotonic() - started < 1
    assert_serves(daemon, kept, rows=ROWS_WITH_LATE)
    assert daemon.log().count("; answers that need it are deferred until it is fixed") == 1
    assert daemon.log().count("warning database: works again path=") == 1
    assert_change_counts_at_once(daemon, kept)


READER = """
import sqlite3
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("BEGIN")
database.execute("SELECT * FROM aliases").fetchall()
print("reading", flush=True)
sys.stdin.read()
"""


def start_ctl(path, *arguments):
    command = [sys.executable, str(ROOT / "mailcloakctl.py"), "--db", str(path), *arguments]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_two_mailcloakctl_and_a_long_reader_end_in_turn(daemon, kept):
    with child(READER, daemon.database) as reader:
        writers = [start_ctl(daemon.database, "aliases", "add", f"new{number}@d1.test", "bob") for number in range(2)]
        end = time.monotonic() + 1
        while time.monotonic() < end:
            assert not wrong_answers(kept.ask())  # from the first writer's commit on, SQLite lets no new reader in
        assert [writer.poll() for writer in writers] == [None, None]
        finish(reader)
        said = [writer.communicate(timeout=60)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], said
    assert_serves(daemon, kept, rows={**STOCK_ROWS, "aliases": sorted([*STOCK_ROWS["aliases"], *new_aliases("new", 2)])})


def new_aliases(name, count):
    return [(f"{name}{number}@d1.test", "bob", 1) for number in range(count)]


def test_two_mailcloakctl_at_once_both_succeed_and_count_at_once(daemon, kept):
    rows = {**STOCK_ROWS, "aliases": STOCK_ROWS["aliases"]}
    for number in range(8):
        addresses = [f"{name}{number}@d1.test" for name in ("x", "y")]
        maps = Kept(daemon, {address: address for address in addresses})
        assert maps.ask_twice() == dict.fromkeys(addresses, "NOTFOUND ")
        with child(LOCK.replace("INSERT", "--"), daemon.database) as gate:  # so that both come to the file while it is locked
            writers = [start_ctl(daemon.database, "aliases", "add", address, "bob") for address in addresses]
            for writer in writers:
                wait_until(lambda writer=writer: has_open(writer.pid, daemon.database), what="writer at the database")
            finish(gate)
        said = [writer.communicate(timeout=60)[1] for writer in writers]
        assert [writer.returncode for writer in writers] == [0, 0], said
        assert maps.ask_twice() == dict.fromkeys(addresses, "OK bob@d1.test")
        rows["aliases"] = sorted([*rows["aliases"], *((address, "bob", 1) for address in addresses)])
        maps.close()
    assert_serves(daemon, kept, rows=rows)


CTL_LOOP = """
import mailcloakctl
print("begun", flush=True)
sys.stdin.read()
path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.exit(max(mailcloakctl.main(["--db", path, "aliases", "add", f"{name}{n}@d1.test", "bob"]) for n in range(count)))
"""


@pytest.mark.long
def test_two_mailcloakctl_in_a_loop_lose_nothing_and_the_answers_stay_right(daemon, kept):
    with child(CTL_LOOP, daemon.database, "x", 100) as first, child(CTL_LOOP, daemon.database, "y", 100) as second:
        for writer in (first, second):
            writer.stdin.close()
        while None in (first.poll(), second.poll()):
            assert kept.ask() == GOOD
        assert [first.returncode, second.returncode] == [0, 0]
    added = new_aliases("x", 100) + new_aliases("y", 100)
    assert_serves(daemon, kept, rows={**STOCK_ROWS, "aliases": sorted([*STOCK_ROWS["aliases"], *added])})


def test_list_that_nobody_reads_holds_up_no_writer(daemon, kept):
    add_aliases(daemon.database, "many", 5000)  # far more than a pipe holds
    command = [sys.executable, str(ROOT / "mailcloakctl.py"), "--db", str(daemon.database), "aliases", "list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.read(1)
        started = time.monotonic()
        assert_change_counts_at_once(daemon, kept)
        assert time.monotonic() - started < 10
        assert process.poll() is None
        process.kill()


def add_aliases(path, name, count, username="bob"):
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        rows = [(f"{name}{number}@d1.test", username) for number in range(count)]
        database.executemany("INSERT INTO aliases (alias_email, username) VALUES (?, ?)", rows)


SWINGING_WRITER = """
import sqlite3, time
database = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
database.execute("PRAGMA synchronous = OFF")
print("begun", flush=True)
end = time.monotonic() + 3
enabled = 1
while time.monotonic() < end:
    enabled = 1 - enabled
    database.execute("BEGIN IMMEDIATE")
    database.execute("UPDATE apps SET enabled = ? WHERE app_id = 'printer'", (enabled,))
    database.execute("UPDATE aliases SET enabled = ? WHERE alias_email LIKE 'many%'", (enabled,))
    database.execute("UPDATE app_from SET enabled = ? WHERE app_id = 'printer'", (1 - enabled,))
    database.execute("COMMIT")
    time.sleep(0.0005)
"""


def test_answer_is_never_made_of_two_states_of_the_file(daemon):
    add_aliases(daemon.database, "many", 300)  # between the two rows of the app
    sql(daemon.database, "UPDATE app_from SET enabled = 0")
    request = mail_from("scan@d1.test", "printer", "PLAIN")
    kept = Kept(daemon, dict.fromkeys(range(6), request))
    seen, rounds = set(), 0
    with child(SWINGING_WRITER, daemon.database) as writer:
        while writer.poll() is None:
            seen.update(kept.ask().values())
            assert daemon.ask(**request) == NOT_OWNED  # connections that come and go beside the kept ones
            rounds += 1
        assert writer.returncode == 0
    assert seen == {NOT_OWNED}
    assert rounds > 20


# ---- killed writers

SPILLING_WRITER = """
import sqlite3
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("PRAGMA cache_size = 1")
database.execute("BEGIN IMMEDIATE")
database.execute("UPDATE aliases SET username = 'mallory', enabled = 1")
database.execute("DELETE FROM app_from")
rows = [(f"stranger{n}@d1.test",) for n in range(5000)] + [("stranger@d1.test",)]
database.executemany("INSERT INTO aliases (alias_email, username) VALUES (?, 'mallory')", rows)
print("spilled", flush=True)
sys.stdin.read()
"""

# Killed by the kernel at the first page behind the end of the file as it was: the pages before it, that with the change counter among
# them, are in the file, and the journal is still there.
COMMITTING_WRITER = """
import os, resource, signal, sqlite3
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("BEGIN IMMEDIATE")
database.execute("UPDATE aliases SET username = 'mallory', enabled = 1")
rows = [(f"stranger{n}@d1.test",) for n in range(500)] + [("stranger@d1.test",)]
database.executemany("INSERT INTO aliases (alias_email, username) VALUES (?, 'mallory')", rows)
print("committing", flush=True)
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(sys.argv[1]),) * 2)
database.execute("COMMIT")
"""


def kill_writer(path, script):
    """Leave a hot journal, and pages in the file that were never committed."""
    with child(script, path) as writer:
        if script is SPILLING_WRITER:
            writer.kill()
        assert writer.wait(10) == -(signal.SIGKILL if script is SPILLING_WRITER else signal.SIGXFSZ)
    assert os.path.getsize(f"{path}-journal") > 512
    assert b"mallory" in path.read_bytes()


@pytest.mark.parametrize("script", [SPILLING_WRITER, COMMITTING_WRITER], ids=["spilling", "committing"])
@pytest.mark.parametrize("users", ["static users", "Keycloak"])
def test_journal_of_a_killed_writer_is_rolled_back(request, users, script):
    daemon = request.getfixturevalue("static_daemon" if users == "static users" else "keycloak_daemon")
    sql(daemon.database, *STOCK)
    kept = Kept(daemon)
    assert kept.ask_twice() == GOOD
    for _ in range(3):
        kill_writer(daemon.database, script)
        assert kept.ask() == GOOD
        assert not os.path.exists(f"{daemon.database}-journal")
        assert_serves(daemon, kept)
    assert_change_counts_at_once(daemon, kept)


@pytest.mark.parametrize("times_asked", [0, 1, 2])
def test_change_counter_that_a_roll_back_takes_back_may_be_used_again(daemon, kept, times_asked):
    before = change_counter(daemon.database)
    for _ in range(3):
        kill_writer(daemon.database, COMMITTING_WRITER)
        assert change_counter(daemon.database) == before + 1
        maps = Kept(daemon, dict.fromkeys(range(2), REQUESTS["map, alias"]))
        for _ in range(times_asked):
            assert maps.ask() == {0: "OK alice@d1.test", 1: "OK alice@d1.test"}
            assert change_counter(daemon.database) == before
        daemon.ctl("aliases", "disable", "info@d1.test")
        assert change_counter(daemon.database) == before + 1
        assert maps.ask() == {0: "NOTFOUND ", 1: "NOTFOUND "}
        assert kept.ask_twice() == WITHOUT_INFO
        maps.close()
        daemon.ctl("aliases", "enable", "info@d1.test")
        assert kept.ask_twice() == GOOD
        before += 2


def test_mailcloakctl_that_finds_the_journal_first_rolls_it_back_too(daemon, kept):
    kill_writer(daemon.database, SPILLING_WRITER)
    daemon.ctl("aliases", "disable", "info@d1.test")
    assert kept.ask_twice() == WITHOUT_INFO
    daemon.ctl("aliases", "enable", "info@d1.test")
    assert_serves(daemon, kept)


BULK_ROWS = 20_000
BULK_WRITER = f"""
import mailcloakcommon
database = mailcloakcommon.open_database(sys.argv[1], create=False)
database.execute("PRAGMA cache_size = 10")  # so that pages reach the file long before the commit
print("begun", flush=True)
with mailcloakcommon.transaction(database):
    for number in range({BULK_ROWS}):
        database.execute("INSERT INTO aliases (alias_email, username) VALUES (?, 'bob')", (f"bulk{{number}}@d1.test",))
"""


class Writer(NamedTuple):
    """Something that changes many rows at once: how it is started, and how the file and the daemon tell whether it was done."""

    start: Callable[..., Any]  # from the path of the database to the process
    prepare: Callable[..., Any]  # makes the state before, from either state
    count: str  # the query for the number of rows
    requests: dict[int, Any]
    before: tuple[int, str]  # number of rows, and the answer to each request
    after: tuple[int, str]


def start_bulk_add(path):
    """Aliases added in one transaction of mailcloakctl's, from the moment it begins."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{BULK_WRITER}", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout.readline()
    return process


def start_apps_del(path):
    """apps del, which takes the app's addresses with it, from the start of the command."""
    return start_ctl(path, "apps", "del", "bulk")


def delete_bulk_aliases(path):
    sql(path, "DELETE FROM aliases WHERE alias_email LIKE 'bulk%'")


def add_bulk_app(path):
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("INSERT OR IGNORE INTO apps (app_id, secret_hash) VALUES ('bulk', '{X}hash')")
        rows = [(f"bulk{number}@d1.test",) for number in range(BULK_ROWS)]
        database.executemany("INSERT OR IGNORE INTO app_from (app_id, from_addr) VALUES ('bulk', ?)", rows)


SOME = (0, BULK_ROWS // 2, BULK_ROWS - 1)
WRITERS = {
    "aliases in one transaction": Writer(
        start_bulk_add,
        delete_bulk_aliases,
        "SELECT count(*) FROM aliases WHERE alias_email LIKE 'bulk%'",
        {number: f"bulk{number}@d1.test" for number in SOME},
        (0, "NOTFOUND "),
        (BULK_ROWS, "OK bob@d1.test"),
    ),
    "apps del": Writer(
        start_apps_del,
        add_bulk_app,
        "SELECT count(*) FROM (SELECT app_id FROM apps UNION ALL SELECT app_id FROM app_from) WHERE app_id = 'bulk'",
        {number: mail_from(f"bulk{number}@d1.test", "bulk", "PLAIN") for number in SOME},
        (BULK_ROWS + 1, "DUNNO"),
        (0, NOT_OWNED),
    ),
}


def kill_at_each(daemon, kept, writer, instants):
    """Kill the writer so often, spread evenly over its run time; (states seen, journals left behind)."""
    path, randomness = daemon.database, random.Random(SEED)
    run_time = 0.0
    writer.prepare(path)
    bulk = Kept(daemon, writer.requests)
    answers = dict([writer.before, writer.after])
    assert set(bulk.ask_twice().values()) == {writer.before[1]}
    seen, journals = set(), 0
    for number in range(instants):
        if number % 10 == 0:  # as long as it takes now: the machine has other things to do as well
            started = time.monotonic()
            process = writer.start(path)
            process.communicate()
            assert process.returncode == 0
            run_time = time.monotonic() - started
            seen.update(row[0] for row in sql(path, writer.count))
            assert set(bulk.ask_twice().values()) == {writer.after[1]}
            writer.prepare(path)
            assert set(bulk.ask_twice().values()) == {writer.before[1]}
        process = writer.start(path)
        time.sleep((number + randomness.random()) / instants * run_time * 1.1)
        process.kill()
        process.communicate()
        journals += os.path.exists(f"{path}-journal")
        answered = bulk.ask_twice()
        ((rows,),) = sql(path, writer.count)
        assert rows in answers
        assert answered == ask_anew(daemon, writer.requests) == dict.fromkeys(writer.requests, answers[rows])
        assert sql(path, "PRAGMA integrity_check") == [("ok",)]
        assert kept.ask() == GOOD
        seen.add(rows)
        if rows != writer.before[0]:
            writer.prepare(path)
            assert set(bulk.ask_twice().values()) == {writer.before[1]}
    bulk.close()
    return seen, journals


@pytest.mark.parametrize("instants", [5, pytest.param(100, marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_bulk_write_that_is_killed_is_whole_or_did_not_happen(daemon, kept, writer, instants):
    seen, journals = kill_at_each(daemon, kept, writer, instants)
    if instants == 100:
        assert seen == {writer.before[0], writer.after[0]}
        assert journals > 2
    sql(
        daemon.database,
        "PRAGMA foreign_keys = ON",
        "DELETE FROM aliases WHERE alias_email LIKE 'bulk%'",
        "DELETE FROM apps WHERE app_id = 'bulk'",
    )
    assert_serves(daemon, kept)


@pytest.mark.parametrize("instants", [4, pytest.param(67, marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
def test_aliases_add_in_three_processes_that_are_killed_is_whole_for_each(daemon, kept, instants):
    path, randomness = daemon.database, random.Random(SEED)
    addresses = [f"bulk{number}@d1.test" for number in range(3)]
    maps = Kept(daemon, {address: address for address in addresses})
    run_time = 0.0
    for number in range(-1, instants):  # the first ones end by themselves
        delete_bulk_aliases(path)
        assert maps.ask_twice() == dict.fromkeys(addresses, "NOTFOUND ")
        started = time.monotonic()
        processes = {address: start_ctl(path, "aliases", "add", address, "bob") for address in addresses}
        if number >= 0:
            time.sleep((number + randomness.random()) / instants * run_time * 1.1)
            for process in processes.values():
                process.kill()
        for process in processes.values():
            process.communicate()
        run_time = run_time or time.monotonic() - started
        answers = maps.ask_twice()
        there = {row[0] for row in sql(path, "SELECT alias_email FROM aliases WHERE alias_email LIKE 'bulk%'")}
        assert answers == {address: "OK bob@d1.test" if address in there else "NOTFOUND " for address in addresses}
        assert sql(path, "PRAGMA integrity_check") == [("ok",)]
        assert there >= {address for address, process in processes.items() if process.returncode == 0}  # done is done
    delete_bulk_aliases(path)
    assert_serves(daemon, kept)


# ---- lost and broken files


def truncate(size):
    return lambda path: os.truncate(path, size)


def garble_in_place(path):
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.write(random.Random(SEED).randbytes(size))


def garble_by_rename(path):
    other = path.with_name("garbage")
    other.write_bytes(random.Random(SEED).randbytes(path.stat().st_size))
    os.rename(other, path)


def empty_by_rename(path):
    other = path.with_name("empty")
    other.touch()
    os.rename(other, path)


def tables_by_rename(path):
    other = path.with_name("tables")
    sql(other, "CREATE TABLE other (x)", "INSERT INTO other VALUES (1)")
    os.rename(other, path)


BREAKS = {
    "deleted": os.unlink,
    "emptied in place": truncate(0),
    "an empty file by rename": empty_by_rename,
    "truncated in its header": truncate(50),
    "truncated to its first page": truncate(4096),
    "truncated in a page": truncate(10_000),
    "truncated between two pages": truncate(16_384),
    "random bytes in place": garble_in_place,
    "random bytes by rename": garble_by_rename,
    "another program's database by rename": tables_by_rename,
}


@pytest.mark.parametrize("restore", [copy_in_place, copy_by_rename], ids=["restored in place", "restored by rename"])
@pytest.mark.parametrize("fault", BREAKS.values(), ids=BREAKS)
def test_file_that_is_lost_or_broken_is_a_temporary_failure_until_it_is_back(daemon, kept, fault, restore):
    backup = daemon.directory / "backup"
    shutil.copy(daemon.database, backup)
    for _ in range(2):
        fault(daemon.database)
        assert kept.ask_twice() == FAULT
        assert ask_anew(daemon) == FAULT
        restore(backup, daemon.database)
        assert_serves(daemon, kept)
    assert daemon.log().count("; answers that need it are deferred until it is fixed") == 2
    assert daemon.log().count("warning database: works again path=") == 2
    assert_change_counts_at_once(daemon, kept)


def test_deleted_file_is_not_made_again_by_questions_reloads_or_lists(daemon, kept):
    backup = daemon.directory / "backup"
    os.rename(daemon.database, backup)
    daemon.reload()
    assert kept.ask_twice() == FAULT
    for noun in ("aliases", "apps"):
        assert daemon.ctl(noun, "list", check=False).returncode == 1
    assert ask_anew(daemon) == FAULT
    assert not daemon.database.exists()
    os.rename(backup, daemon.database)
    assert_serves(daemon, kept)


@pytest.mark.parametrize("arguments", [("aliases", "list"), ("apps", "list"), ("aliases", "del", "x@d1.test")], ids=" ".join)
def test_emptied_file_stays_a_temporary_failure_when_mailcloakctl_looks_at_it(daemon, kept, arguments):
    os.truncate(daemon.database, 0)
    assert kept.ask_twice() == FAULT
    daemon.ctl(*arguments, check=False)
    assert kept.ask_twice() == FAULT


def test_emptied_file_is_not_taken_for_a_new_one_without_a_warning(daemon):
    os.truncate(daemon.database, 0)
    assert daemon.stop() == 0
    lines = len(daemon.log().splitlines())
    daemon.start()
    assert ask_anew(daemon) == FAULT or "warning database" in "\n".join(daemon.log().splitlines()[lines:])


def test_pages_garbled_behind_a_good_header_are_never_a_wrong_answer(daemon, kept):
    backup = daemon.directory / "backup"
    shutil.copy(daemon.database, backup)
    garbled = random.Random(SEED).randbytes(daemon.database.stat().st_size - 4096)
    with open(daemon.database, "r+b") as file:
        file.seek(4096)
        file.write(garbled)
    for number in range(3):
        assert not wrong_answers(kept.ask())
        assert not wrong_answers(ask_anew(daemon))
        assert ask_afresh(daemon, number) == FRESH_FAULT
    copy_in_place(backup, daemon.database)
    assert_serves(daemon, kept)
    assert_change_counts_at_once(daemon, kept)


def test_file_truncated_within_its_last_page_is_never_a_wrong_answer(daemon):
    add_aliases(daemon.database, "many", 300)
    good = daemon.database.read_bytes()
    wrong = set()
    for cut in (1, 100, 1000, 2000, 4000, 4095):
        os.truncate(daemon.database, len(good) - cut)
        with contextlib.closing(daemon.socketmap()) as maps:
            wrong |= {maps.ask(f"alias many{number}@d1.test") for number in range(300)}
        daemon.database.write_bytes(good)
    assert wrong <= {"OK bob@d1.test", "TEMP database not usable"}


@pytest.mark.long
@pytest.mark.parametrize("fault", [garble_in_place, truncate(10_000), None], ids=["random bytes", "truncated", "locked"])
def test_daemon_started_on_a_file_it_cannot_use_serves_when_it_is_back(make_daemon, fault):
    daemon = make_daemon(static_users=USERS)
    mailcloak.prepare_database(str(daemon.database), 5)
    sql(daemon.database, *STOCK)
    backup = daemon.directory / "backup"
    shutil.copy(daemon.database, backup)
    with child(LOCK if fault is None else "print('nothing')", daemon.database):
        if fault:
            fault(daemon.database)
        daemon.start()
        kept = Kept(daemon)
        assert kept.ask() == FAULT
    if fault:
        copy_in_place(backup, daemon.database)
    assert_serves(daemon, kept)
    assert_change_counts_at_once(daemon, kept)


def start_as_nobody(make_daemon):
    """A running daemon that became nobody, with the stock in a database of nobody's."""
    daemon = nobody_daemon(make_daemon).start()
    sql(daemon.database, *STOCK)
    return daemon


@root_only
@pytest.mark.parametrize("what", ["file", "directory"])
def test_file_that_its_user_may_not_read_is_a_temporary_failure_until_the_user_may(make_daemon, what):
    daemon = start_as_nobody(make_daemon)
    kept = Kept(daemon)
    assert kept.ask_twice() == GOOD
    path = daemon.database if what == "file" else daemon.database.parent
    mode = path.stat().st_mode
    for _ in range(2):
        path.chmod(0)
        assert ask_anew(daemon) == FAULT
        assert not wrong_answers(kept.ask())  # who had opened the file before may read on
        sql(daemon.database, "UPDATE aliases SET enabled = 0 WHERE alias_email = 'info@d1.test'")  # as root
        assert not wrong_answers(kept.ask(), WITHOUT_INFO)
        assert not wrong_answers(ask_anew(daemon), WITHOUT_INFO)  # what one of them has read holds for all
        path.chmod(mode)
        assert kept.ask_twice() == WITHOUT_INFO
        daemon.ctl("aliases", "enable", "info@d1.test")
        assert_serves(daemon, kept)


@root_only
def test_file_that_root_restored_as_its_own_is_a_temporary_failure_until_it_is_given_back(make_daemon):
    daemon = start_as_nobody(make_daemon)
    kept = Kept(daemon)
    assert kept.ask_twice() == GOOD
    copy_by_rename(daemon.database, daemon.database)
    os.chown(daemon.database, 0, 0)
    daemon.database.chmod(0o640)
    assert kept.ask_twice() == FAULT
    os.chown(daemon.database, pwd.getpwnam("nobody").pw_uid, -1)
    assert_serves(daemon, kept)
    assert_change_counts_at_once(daemon, kept)


# ---- exchanged files

OTHER = [
    "INSERT INTO aliases (alias_email, username, enabled)"
    " VALUES ('info@d1.test', 'carol', 1), ('off@d1.test', 'alice', 1), ('shop@d1.test', 'bob', 0)",
    "INSERT INTO apps (app_id, secret_hash) VALUES ('printer', '{Y}hash')",
    "INSERT INTO app_from (app_id, from_addr) VALUES ('printer', 'info@d1.test')",
]
OTHER_ANSWERS = {
    **GOOD,
    "recipient, disabled alias": "DUNNO",
    "sender, own alias": NOT_OWNED,
    "sender, app": NOT_OWNED,
    "sender, not the app's": "DUNNO",
    "map, alias": "OK carol@d1.test",
    "map, alias with an extension": "OK carol+x@d1.test",
    "map, alias of another": "NOTFOUND ",
    "map, disabled alias": "OK alice@d1.test",
}


def make_other(daemon, counter=None):
    """A good file with other rows, beside the daemon's."""
    other = daemon.directory / "other.db"
    mailcloak.prepare_database(str(other), 5)
    sql(other, *OTHER)
    if counter is not None:
        set_change_counter(other, counter)
    assert sql(other, "PRAGMA integrity_check") == [("ok",)]
    return other


@pytest.mark.parametrize("alike", ["nothing", "change counter", "change counter and times"])
def test_another_good_file_put_in_place_by_rename_counts_from_the_next_question(daemon, kept, alike):
    other = make_other(daemon, None if alike == "nothing" else change_counter(daemon.database))
    backup = daemon.directory / "backup"
    shutil.copy(daemon.database, backup)
    times = daemon.database.stat()
    assert other.stat().st_size == times.st_size
    for _ in range(3):
        for source, answers in ((other, OTHER_ANSWERS), (backup, GOOD)):
            new = daemon.directory / "new.db"
            shutil.copy(source, new)
            if alike.endswith("times"):
                os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))
            os.rename(new, daemon.database)
            assert kept.ask_twice() == answers
            assert ask_anew(daemon) == answers
    assert_serves(daemon, kept)
    assert_change_counts_at_once(daemon, kept)


def test_older_copy_restored_in_place_counts_from_the_next_question(daemon, kept):
    backup = daemon.directory / "backup"
    shutil.copy(daemon.database, backup)
    for _ in range(3):
        daemon.ctl("aliases", "disable", "info@d1.test")
        assert kept.ask_twice() == WITHOUT_INFO
        copy_in_place(backup, daemon.database)
        assert kept.ask_twice() == GOOD
    assert_serves(daemon, kept)


SAME_COUNTER = "SQLite keeps the pages that a connection has read as long as the change counter is the same"


def test_older_copy_restored_in_place_and_changed_counts_from_the_next_question(daemon, kept):
    backup = daemon.directory / "backup"
    shutil.copy(daemon.database, backup)
    daemon.ctl("aliases", "add", "info@d1.test", "carol", "--replace")
    assert kept.ask_twice()["map, alias"] == "OK carol@d1.test"
    copy_in_place(backup, daemon.database)
    daemon.ctl("aliases", "disable", "info@d1.test")  # the same change counter as after the other change
    assert ask_anew(daemon) == WITHOUT_INFO
    assert kept.ask_twice() == WITHOUT_INFO


def test_another_file_with_the_same_change_counter_copied_in_place_counts_from_the_next_question(daemon, kept):
    other = make_other(daemon, change_counter(daemon.database))
    copy_in_place(other, daemon.database)
    assert ask_anew(daemon) == OTHER_ANSWERS
    assert kept.ask_twice() == OTHER_ANSWERS


def test_another_file_with_the_same_schema_version_and_other_tables_copied_in_place_counts_from_the_next_question(daemon, kept):
    """To a connection that knows where the tables were, it looks like a commit."""
    other = daemon.directory / "other.db"
    statements = [statement for statement in mailcloak.SCHEMA.split(";\n") if statement.strip()]
    sql(other, *statements[2:], *statements[:2], f"PRAGMA user_version = {mailcloak.SCHEMA_VERSION}", *OTHER)
    sql(other, *["UPDATE aliases SET updated_at = updated_at + 1"] * 5)
    schemas = [sql(path, "SELECT name, rootpage FROM sqlite_master ORDER BY name") for path in (other, daemon.database)]
    assert schemas[0] != schemas[1]
    assert sql(other, "PRAGMA schema_version") == sql(daemon.database, "PRAGMA schema_version")
    assert change_counter(other) != change_counter(daemon.database)
    copy_in_place(other, daemon.database)
    assert kept.ask_twice() == OTHER_ANSWERS
    assert ask_anew(daemon) == OTHER_ANSWERS


# ---- a full disk


@pytest.fixture
def small_disk(short_dir):
    """A file system of 512 KiB and 16 files of its own; filled and cleared with fill_disk."""
    path = short_dir / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k,nr_inodes=16,mode=755", "none", str(path)], check=True)
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill_disk(disk, what, leave_bytes=0):
    """Use up the room, or the files that can be made; returns what clears it again."""
    used = []
    with contextlib.suppress(OSError):
        for number in range(100):
            used.append(disk / f"filler{number}")
            with open(used[-1], "wb", buffering=0) as file:
                while what == "room" and file.write(b"x" * 4096):
                    pass
    if leave_bytes:
        os.truncate(used[0], used[0].stat().st_size - leave_bytes)

    def clear():
        for path in used:
            path.unlink(missing_ok=True)

    return clear


WRITES = [
    ("aliases", "add", "new@d1.test", "bob"),
    ("aliases", "disable", "info@d1.test"),
    ("aliases", "del", "shop@d1.test"),
    ("apps", "add", "new", "--generate"),
    ("apps", "allow", "printer", "info@d1.test"),
    ("apps", "del", "bulk"),
]


def daemon_on(disk, make_daemon, keycloak):
    """A daemon that asks Keycloak, with all its files on this disk, and an app with enough senders that apps del takes 150 KB."""
    for username, email in USERS.items():
        keycloak.add_user(username, email)
    daemon = make_daemon(keycloak=keycloak.config(), sqlite={"path": str(disk / "state.db")}).start()
    sql(daemon.database, *STOCK, "INSERT INTO apps (app_id, secret_hash) VALUES ('bulk', '{X}hash')")
    with contextlib.closing(sqlite3.connect(daemon.database)) as database, database:
        rows = [(f"bulk{number}@d1.test",) for number in range(1500)]
        database.executemany("INSERT INTO app_from (app_id, from_addr) VALUES ('bulk', ?)", rows)
    return daemon


@root_only
@pytest.mark.parametrize(("what", "leave_bytes"), [("room", 0), ("room", 40_960), ("files", 0)], ids=["full", "nearly", "files"])
def test_full_disk_makes_mailcloakctl_fail_and_loses_nothing(small_disk, make_daemon, keycloak, what, leave_bytes):
    daemon = daemon_on(small_disk, make_daemon, keycloak)
    kept = Kept(daemon)
    assert kept.ask_twice() == GOOD
    before = rows_of(daemon.database)
    clear = fill_disk(small_disk, what, leave_bytes)
    for arguments in WRITES[-1:] if leave_bytes else WRITES:
        result = daemon.ctl(*arguments, check=False)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith(f"mailcloakctl: database '{daemon.database}': ")
        assert "nothing was changed" in result.stderr
        assert result.stderr.count("\n") == 1
        assert_serves(daemon, kept, rows=before)
    clear()
    for arguments in WRITES:
        daemon.ctl(*arguments)
    assert daemon.process.poll() is None
    assert kept.ask() == {
        **WITHOUT_INFO,
        "map, alias of another": "NOTFOUND ",
        "sender, not the app's": "DUNNO",
    }
    assert sql(daemon.database, "SELECT count(*) FROM app_from") == [(2,)]
    assert sql(daemon.database, "SELECT username FROM aliases WHERE alias_email = 'new@d1.test'") == [("bob",)]


@root_only
@pytest.mark.parametrize("leave_bytes", [0, 40_960], ids=["full", "nearly"])
def test_full_disk_is_what_mailcloakctl_complains_of(small_disk, make_daemon, keycloak, leave_bytes):
    daemon = daemon_on(small_disk, make_daemon, keycloak)
    fill_disk(small_disk, "room", leave_bytes)
    message = daemon.ctl("apps", "del", "bulk", check=False).stderr
    assert "database or disk is full, nothing was changed; make room on its disk and try again" in message


@root_only
def test_disk_that_takes_no_more_files_is_no_reason_to_restore_a_backup(small_disk, make_daemon, keycloak):
    daemon = daemon_on(small_disk, make_daemon, keycloak)
    fill_disk(small_disk, "files")
    assert "backup" not in daemon.ctl("apps", "del", "bulk", check=False).stderr


# ---- each of 300 commits counts from the next question on


CHANGE_REQUESTS = {
    "recipient": {"recipient": "new@d1.test"},
    "recipient with an extension": {"recipient": "new+x@d1.test"},
    "sender": mail_from("new@d1.test", "alice"),
    "app": mail_from("scan@d1.test", "fax", "PLAIN"),
    "map": "new@d1.test",
    "map with an extension": "new+x@d1.test",
    "map, alias that stays": "shop@d1.test",
}


class Changes:
    """One alias and one app that are changed in every way; what the file says of them is kept here as values too.

    alias is (username, enabled) or None; app is (enabled, may send as scan) or None.
    """

    def __init__(self, daemon):
        self.daemon, self.path = daemon, daemon.database
        self.alias = self.app = None
        self.copy = None
        self.random = random.Random(SEED)

    def answers(self):
        username = self.alias[0] if self.alias and self.alias[1] else None
        return {
            "recipient": "DUNNO" if username else NO_USER,
            "recipient with an extension": "DUNNO" if username else NO_USER,
            "sender": "DUNNO" if username == "alice" else NOT_OWNED,
            "app": "DUNNO" if self.app == (True, True) else NOT_OWNED,
            "map": f"OK {username}@d1.test" if username else "NOTFOUND ",
            "map with an extension": f"OK {username}+x@d1.test" if username else "NOTFOUND ",
            "map, alias that stays": "OK bob@d1.test",
        }

    # Each of these is one commit.

    def command(self, in_process=True):
        """A command of mailcloakctl's."""
        arguments = self._alias_command() if self.random.random() < 0.6 else self._app_command()
        if not in_process:
            self.daemon.ctl(*arguments)
            return
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
            assert mailcloakctl.main(["--db", str(self.path), *arguments]) == 0, said.getvalue()

    def process(self):
        self.command(in_process=False)

    def _alias_command(self):
        username = self.random.choice(["alice", "bob"])
        if self.alias is None:
            self.alias = (username, True)
            return "aliases", "add", "new@d1.test", username
        verb = self.random.choice(["add", "enable", "disable", "disable", "del"])
        if verb == "add":
            self.alias = (username, self.alias[1])
            return "aliases", "add", "new@d1.test", username, "--replace"
        self.alias = None if verb == "del" else (self.alias[0], verb == "enable")
        return "aliases", verb, "new@d1.test"

    def _app_command(self):
        if self.app is None:
            self.app = (True, False)
            return "apps", "add", "fax", "--generate"
        verb = self.random.choice(["enable", "disable", "disallow" if self.app[1] else "allow", "del"])
        if verb in ("allow", "disallow"):
            self.app = (self.app[0], verb == "allow")
            return "apps", verb, "fax", "scan@d1.test"
        self.app = None if verb == "del" else (verb == "enable", self.app[1])
        return "apps", verb, "fax"

    def sql(self, path=None, journal_mode=None):
        """A transaction of another program's that changes everything."""
        alias = self.random.choice([None, ("alice", True), ("bob", True), ("alice", False)])
        app = self.random.choice([None, (True, True), (True, False), (False, True)])
        statements = [f"PRAGMA journal_mode = {journal_mode}"] if journal_mode else []
        statements += ["BEGIN", "DELETE FROM app_from WHERE app_id = 'fax'", "DELETE FROM apps WHERE app_id = 'fax'"]
        statements.append("DELETE FROM aliases WHERE alias_email = 'new@d1.test'")
        if alias:
            statements.append(
                f"INSERT INTO aliases (alias_email, username, enabled) VALUES ('new@d1.test', '{alias[0]}', {alias[1]:d})"
            )
        if app:
            statements.append(f"INSERT INTO apps (app_id, secret_hash, enabled) VALUES ('fax', '{{X}}hash', {app[0]:d})")
            statements.append(f"INSERT INTO app_from (app_id, from_addr, enabled) VALUES ('fax', 'scan@d1.test', {app[1]:d})")
        sql(path or self.path, *statements, "COMMIT")
        self.alias, self.app = alias, app

    def sql_truncating_the_journal(self):
        self.sql(journal_mode="TRUNCATE")

    def sql_keeping_the_journal(self):
        self.sql(journal_mode="PERSIST")

    def vacuum(self):
        sql(self.path, "VACUUM")

    def checkpoint(self):
        sql(self.path, "PRAGMA wal_checkpoint(TRUNCATE)")

    def rename(self):
        """Another file with the same change counter by rename."""
        other = self.path.with_name("other.db")
        shutil.copy(self.path, other)
        self.sql(other)
        set_change_counter(other, change_counter(self.path))
        os.rename(other, self.path)

    def restore(self):
        """An older copy in place; it was made some changes ago."""
        backup = self.path.with_name("backup")
        if self.copy:
            copy_in_place(backup, self.path)
            self.alias, self.app = self.copy
            self.copy = None
        else:
            shutil.copy(self.path, backup)
            self.copy = (self.alias, self.app)
            self.sql()


ROLLBACK_WAYS = [
    Changes.command,
    Changes.sql,
    Changes.rename,
    Changes.command,
    Changes.sql_truncating_the_journal,
    Changes.sql_keeping_the_journal,
    Changes.vacuum,
    Changes.restore,
    Changes.command,
    Changes.sql,
]
WAL_WAYS = [Changes.command, Changes.sql, Changes.command, Changes.sql, Changes.checkpoint, Changes.sql, Changes.vacuum]


def journal_mode_becomes(path, mode):
    try:
        return sql_at_once(path, f"PRAGMA journal_mode = {mode}") == mode
    except sqlite3.OperationalError:  # locked: somebody has it open in WAL mode
        return False


def sql_at_once(path, statement):
    with contextlib.closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as database:
        return database.execute(statement).fetchone()[0]


@pytest.mark.parametrize(
    "mode", ["rollback journal", *(pytest.param(name, marks=pytest.mark.long) for name in ("WAL", "to and fro"))]
)
def test_each_of_300_commits_counts_from_the_next_question_on(daemon, mode):
    changes = Changes(daemon)
    kept = Kept(daemon, CHANGE_REQUESTS)
    assert kept.ask_twice() == changes.answers()
    is_wal, seen = False, set()
    for number in range(300):
        if (mode == "WAL" and number == 0) or (mode == "to and fro" and number % 10 == 0 and not is_wal):
            assert journal_mode_becomes(daemon.database, "wal")
            is_wal, changes.copy = True, None
        elif mode == "to and fro" and number % 10 == 5 and is_wal:
            kept.close()  # SQLite does not leave WAL mode while anybody else has the file open in it
            wait_until(lambda: journal_mode_becomes(daemon.database, "delete"), what="end of WAL mode")
            is_wal = False
            kept.connect()
            assert kept.ask_twice() == changes.answers()
        ways = WAL_WAYS if is_wal else ROLLBACK_WAYS
        way = Changes.process if number % 50 == 49 else ways[number % len(ways)]
        way(changes)
        answers = changes.answers()
        assert kept.ask_twice() == answers, f"after {way.__name__}, number {number}"
        if number % 10 == 0:
            assert ask_anew(daemon, CHANGE_REQUESTS) == answers
        seen.update(answers.values())
    assert seen == {*answers_possible()}
    assert sql(daemon.database, "PRAGMA integrity_check") == [("ok",)]
    assert daemon.process.poll() is None
    assert "deferred until it is fixed" not in daemon.log()


def answers_possible():
    mapped = [f"OK {username}{extension}@d1.test" for username in ("alice", "bob") for extension in ("", "+x")]
    return ["DUNNO", NO_USER, NOT_OWNED, "NOTFOUND ", *mapped]
