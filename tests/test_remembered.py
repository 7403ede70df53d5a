"""Remembered answers: the same as those made anew, and never older than what they were made from."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sqlite3
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import decision_table as table
import pytest
from conftest import USERS, PolicyClient, wait_until
from test_policy_decisions import fill_database
from test_wire import FULL_REQUEST

import mailcloak


@pytest.fixture(autouse=True)
def _settled(monkeypatch):
    """A file counts as settled at once: each test here changes it long after it has been read, in the kernel's time."""
    monkeypatch.setattr(mailcloak, "DATABASE_SETTLED_SECONDS", 0.05)


@pytest.fixture
def make_service(tmp_path, keycloak):
    """A service as the daemon has it, without sockets, on the stand-in and an empty database."""
    services = []

    def make(static_users=None, **policy):
        problems = []
        path = tmp_path / "state.db"
        if not path.exists():
            mailcloak.prepare_database(str(path), 2)
        config = mailcloak.Config(
            path="",
            keycloak=None
            if static_users
            else mailcloak.read_block(mailcloak.KeycloakConfig, "keycloak", keycloak.config(), problems),
            static_users=static_users,
            policy=mailcloak.read_block(mailcloak.PolicyConfig, "policy", {**table.POLICY, **policy}, problems),
            sqlite=mailcloak.SqliteConfig(str(path)),
            sockets=None,
            daemon=None,
        )
        assert not problems
        services.append(mailcloak.Service(config, services[-1] if services else None))
        return services[-1]

    yield make
    for service in services:
        service.directory.close()
        service.database.close()
        if service.last_known:
            service.last_known.close()


def settle():
    time.sleep(0.1)


def ask(service, request):
    kind = mailcloak.SocketmapHandler if isinstance(request, mailcloak.SocketmapQuery) else mailcloak.PolicyHandler
    handler = kind.__new__(kind)  # without a connection
    handler.tally, handler.used_at = mailcloak.Tally(), time.monotonic()
    return handler.decide(request, service).text


def recipient(address):
    return mailcloak.PolicyRequest("RCPT", "recipient", address)


def sender(address, sasl_username="", sasl_method=""):
    return mailcloak.PolicyRequest("MAIL", "", "", address, sasl_username, sasl_method)


def alias(address):
    return mailcloak.SocketmapQuery("alias", address)


def is_remembered(service, request):
    is_query = isinstance(request, mailcloak.SocketmapQuery)
    question = ("alias", request.key) if is_query else mailcloak.policy_question(request, service.policy)
    return service.remembered.get(question) is not None


def write(service, statement, *parameters):
    with contextlib.closing(sqlite3.connect(service.config.sqlite.path)) as database, database:
        database.execute(statement, parameters)


def add_alias(service, address="info@d1.test", username="alice"):
    write(service, "INSERT INTO aliases (alias_email, username) VALUES (?, ?)", address, username)


# ---- the same answers


def answer(row, service):
    if "query" in row.ask:
        name, _, key = row.ask["query"].partition(" ")
        return ask(service, mailcloak.SocketmapQuery(name, key))
    return ask(service, mailcloak.PolicyRequest(**{"protocol_state": "RCPT", **row.ask}))


@pytest.mark.parametrize("remembering", [True, False], ids=["on", "off"])
def test_decision_table_is_the_same_with_and_without_memory(remembering, make_service, keycloak, monkeypatch):
    if not remembering:
        monkeypatch.setattr(mailcloak, "MAX_REMEMBERED_ANSWERS", 0)
    for username, email, enabled in table.USERS:
        keycloak.add_user(username, email, enabled)
    fill_database(make_service().config.sqlite.path)
    settle()
    rows = [row for row in table.ROWS if row.keycloak != "down" and row.database != "broken"]  # a fault keeps from remembering
    services = {policy: make_service(**dict(policy)) for policy in {row.policy for row in rows}}
    for _ in range(3):
        assert {row.id: answer(row, services[row.policy]) for row in rows} == {row.id: row.answer for row in rows}
    remembered = sum(len(service.remembered) for service in services.values())
    assert (remembered > 50) if remembering else (remembered == 0)


def test_remembered_answer_asks_neither_sqlite_nor_the_directory(make_service, keycloak, monkeypatch):
    keycloak.add_user("alice", "alice@d1.test")
    service = make_service()
    settle()
    questions = [recipient("alice@d1.test"), sender("alice@d1.test", "alice", "plain"), alias("alice@d1.test")]
    first = [ask(service, question) for question in questions]

    def not_to_be_called(*_):
        raise AssertionError

    monkeypatch.setattr(service.database, "_rows", not_to_be_called)
    monkeypatch.setattr(service.directory, "_find", not_to_be_called)
    assert [ask(service, question) for question in questions] == first == ["DUNNO", "DUNNO", "NOTFOUND "]


# ---- as long as their facts


def test_commit_counts_from_the_next_request(make_service):
    service = make_service(static_users=USERS)
    add_alias(service)
    settle()
    assert [ask(service, alias("info@d1.test")) for _ in range(3)] == ["OK alice@d1.test"] * 3
    write(service, "UPDATE aliases SET username = 'bob'")
    assert ask(service, alias("info@d1.test")) == "OK bob@d1.test"
    write(service, "DELETE FROM aliases")
    assert ask(service, alias("info@d1.test")) == "NOTFOUND "


def test_commits_that_bear_the_same_time_are_all_seen(make_service, monkeypatch):
    """On a file system whose times are a second apart."""
    monkeypatch.setattr(mailcloak, "DATABASE_SETTLED_SECONDS", 1.0)
    service = make_service(static_users=USERS)
    add_alias(service)
    exact = service.database.state
    monkeypatch.setattr(service.database, "state", lambda: (*exact()[:2], 0, *exact()[3:]))
    times = set()
    for number in range(100):
        write(service, "UPDATE aliases SET username = ?", f"user{number}")
        times.add(service.database.state())
        assert ask(service, alias("info@d1.test")) == f"OK user{number}@d1.test"
        time.sleep(0.02)
    assert 1 < len(times) < 100


def test_file_put_in_place_by_rename_counts_from_the_next_request(make_service, tmp_path):
    service = make_service(static_users=USERS)
    add_alias(service)
    path, other = service.config.sqlite.path, str(tmp_path / "other.db")
    mailcloak.prepare_database(other, 2)
    with contextlib.closing(sqlite3.connect(other)) as database, database:
        database.execute("INSERT INTO aliases (alias_email, username) VALUES ('info@d1.test', 'bob')")
    settle()
    assert [ask(service, alias("info@d1.test")) for _ in range(2)] == ["OK alice@d1.test"] * 2
    os.rename(other, path)
    assert ask(service, alias("info@d1.test")) == "OK bob@d1.test"


def test_older_copy_written_over_the_file_under_its_old_time_counts_from_the_next_request(make_service, tmp_path):
    service = make_service(static_users=USERS)
    add_alias(service)
    path, copy = service.config.sqlite.path, str(tmp_path / "copy.db")
    subprocess.run(["cp", "-p", path, copy], check=True)
    write(service, "UPDATE aliases SET username = 'bob'")
    settle()
    assert [ask(service, alias("info@d1.test")) for _ in range(2)] == ["OK bob@d1.test"] * 2
    times = os.stat(path)
    subprocess.run(["cp", copy, path], check=True)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert ask(service, alias("info@d1.test")) == "OK alice@d1.test"


def test_nothing_is_remembered_in_wal_mode(make_service):
    service = make_service(static_users=USERS)
    add_alias(service)
    write(service, "PRAGMA journal_mode = WAL")
    with contextlib.closing(sqlite3.connect(service.config.sqlite.path, isolation_level=None)) as database:
        for username in ("bob", "carol", "bob"):
            database.execute("UPDATE aliases SET username = ?", (username,))
            settle()
            assert [ask(service, alias("info@d1.test")) for _ in range(2)] == [f"OK {username}@d1.test"] * 2
    assert len(service.remembered) == 0


def test_file_just_changed_is_not_remembered(make_service, monkeypatch):
    monkeypatch.setattr(mailcloak, "DATABASE_SETTLED_SECONDS", 3600.0)
    service = make_service(static_users=USERS)
    add_alias(service)
    assert ask(service, alias("info@d1.test")) == "OK alice@d1.test"
    assert len(service.remembered) == 0


def test_remembered_answer_serves_while_the_file_is_locked(make_service):
    service = make_service(static_users=USERS)
    add_alias(service)
    settle()
    assert ask(service, alias("info@d1.test")) == "OK alice@d1.test"
    with contextlib.closing(sqlite3.connect(service.config.sqlite.path, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        assert ask(service, alias("info@d1.test")) == "OK alice@d1.test"


def test_answer_made_while_the_database_fails_is_not_remembered(make_service, monkeypatch):
    service = make_service(static_users=USERS)
    add_alias(service, "alice@d1.test", "bob")
    settle()
    monkeypatch.setattr(service.database, "_busy_seconds", 0.01)
    with contextlib.closing(sqlite3.connect(service.config.sqlite.path, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        assert ask(service, sender("alice@d1.test", "alice", "xoauth2")) == "DUNNO"  # it is her primary e-mail
    assert len(service.remembered) == 0
    assert ask(service, sender("alice@d1.test", "alice", "xoauth2")) == mailcloak.SENDER_NOT_OWNED


def test_end_of_a_cache_entry_is_observed(make_service, keycloak):
    keycloak.add_user("alice", "alice@d1.test")
    service = make_service(cache_ttl_seconds=0.5, negative_cache_ttl_seconds=0, disappearance_grace_seconds=0)
    settle()
    assert ask(service, recipient("alice@d1.test")) == "DUNNO"
    assert is_remembered(service, recipient("alice@d1.test"))
    keycloak.users.clear()
    keycloak.add_user("bob", "bob@d1.test")
    wait_until(lambda: ask(service, recipient("alice@d1.test")) == mailcloak.NO_SUCH_USER, 3, "end of the entry")


def test_user_found_disabled_loses_his_remembered_answers_as_well(make_service, keycloak):
    keycloak.add_user("alice", "alice@d1.test")
    service = make_service(disappearance_grace_seconds=0)
    settle()
    question = sender("", "alice", "plain")
    assert [ask(service, question) for _ in range(2)] == ["DUNNO"] * 2
    assert is_remembered(service, question)
    keycloak.users.clear()
    keycloak.add_user("alice", "alice@d1.test", False)
    assert ask(service, recipient("alice@d1.test")) == mailcloak.NO_SUCH_USER
    assert ask(service, question) == mailcloak.SENDER_NOT_OWNED


def test_reload_begins_with_no_remembered_answer(make_service):
    service = make_service(static_users=USERS)
    settle()
    ask(service, recipient("alice@d1.test"))
    assert len(service.remembered) == 1
    reloaded = make_service(static_users={"bob": "bob@d1.test"})
    assert len(reloaded.remembered) == 0
    assert ask(reloaded, recipient("alice@d1.test")) == mailcloak.NO_SUCH_USER


# ---- what is not remembered, and how much


def test_app_is_asked_about_each_time_since_its_time_may_run_out(make_service):
    service = make_service(static_users=USERS)
    write(service, "INSERT INTO apps (app_id, secret_hash, expires_at) VALUES ('printer', 'x', strftime('%s', 'now') + 2)")
    write(service, "INSERT INTO app_from (app_id, from_addr) VALUES ('printer', 'scan@d1.test')")
    settle()
    question = sender("scan@d1.test", "printer", "plain")
    assert ask(service, question) == "DUNNO"
    wait_until(lambda: ask(service, question) == mailcloak.SENDER_NOT_OWNED, 5, "the end of the app's time")


def test_refusals_that_anybody_can_bring_about_are_not_remembered(make_service):
    service = make_service(static_users=USERS)
    settle()
    for number in range(50):
        assert ask(service, recipient(f"stranger{number}@d1.test")) == mailcloak.NO_SUCH_USER
        assert ask(service, sender(f"x{number}@elsewhere.test", "", "")) == "DUNNO"
        assert ask(service, recipient(f"x{number}@elsewhere.test")) == "DUNNO"
    assert len(service.remembered) == 0


def test_memory_is_bounded_in_count_and_in_length(make_service, monkeypatch):
    monkeypatch.setattr(mailcloak, "MAX_REMEMBERED_ANSWERS", 10)
    service = make_service(static_users=USERS, foreign_sender="dunno")
    settle()
    for number in range(30):
        assert ask(service, sender(f"x{number}@elsewhere.test", "alice", "plain")) == "DUNNO"
        assert ask(service, sender(f"{'x' * 1000}{number}@elsewhere.test", "alice", "plain")) == "DUNNO"
    assert len(service.remembered) == 10
    assert is_remembered(service, sender("x20@elsewhere.test", "alice", "plain"))
    assert not is_remembered(service, sender("x19@elsewhere.test", "alice", "plain"))


def test_answers_stay_right_while_commits_and_questions_race(make_service):
    """Each question sees what was committed before it was asked, or something newer."""
    service = make_service(static_users=USERS)
    add_alias(service, username="0")
    committed, stop, wrong = [0], threading.Event(), []

    def ask_on():
        while not stop.is_set():
            before = committed[0]
            answer = ask(service, alias("info@d1.test"))
            if int(re.fullmatch(r"OK (\d+)@d1.test", answer)[1]) < before:
                wrong.append((before, answer))
        service.database.close()

    threads = [threading.Thread(target=ask_on) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(1, 40):
        write(service, "UPDATE aliases SET username = ?", str(number))
        committed[0] = number
        time.sleep(0.12 if number % 2 else 0.01)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- a running daemon


def test_change_by_mailcloakctl_is_seen_where_the_answer_was_remembered(static_daemon):
    static_daemon.ctl("aliases", "add", "info@d1.test", "alice")
    client, map_client = static_daemon.policy(), static_daemon.socketmap()
    time.sleep(3.2)  # the daemon's own DATABASE_SETTLED_SECONDS
    for _ in range(3):
        assert client.ask(recipient="info@d1.test") == "DUNNO"
        assert map_client.ask("alias info@d1.test") == "OK alice@d1.test"
    static_daemon.ctl("aliases", "disable", "info@d1.test")
    assert client.ask(recipient="info@d1.test") == "550 5.1.1 No such user"
    assert map_client.ask("alias info@d1.test") == "NOTFOUND "


def test_state_of_the_file_is_the_same_without_the_librarys_call(make_service, monkeypatch):
    service = make_service(static_users=USERS)
    state = service.database.state()
    status = os.stat(service.config.sqlite.path)
    assert state == (status.st_ino, *divmod(status.st_ctime_ns, 10**9), os.major(status.st_dev), os.minor(status.st_dev))
    monkeypatch.setattr(mailcloak, "_statx", None)
    assert service.database.state() == state
    os.unlink(service.config.sqlite.path)
    assert service.database.state() is None
    monkeypatch.undo()
    assert service.database.state() is None


@pytest.mark.parametrize("with_library", [True, False])
@pytest.mark.parametrize("size", [1, 14, 5_000_000])
def test_answer_is_sent_whole(monkeypatch, with_library, size):
    if not with_library:
        monkeypatch.setattr(mailcloak, "_send", None)
    handler = mailcloak.Handler.__new__(mailcloak.Handler)
    answer = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    handler.request, client = socket.socketpair()
    with client:
        with handler.request, ThreadPoolExecutor(1) as pool:
            sending = pool.submit(handler._send, answer)
            assert client.recv(size, socket.MSG_WAITALL) == answer
            sending.result(10)
        assert client.recv(1) == b""
    with pytest.raises(OSError, match="file descriptor"):
        handler._send(answer)


SYSTEM_CALLS_OF_A_REMEMBERED_ANSWER = 3  # recv of the request, stat of the database file, send of the answer


@pytest.mark.real("strace")
def test_remembered_answer_takes_three_system_calls(make_daemon, short_dir):
    daemon = make_daemon(static_users=USERS, level="info")
    trace = short_dir / "trace"
    daemon._command = ["strace", "-f", "-qq", "-o", str(trace), *daemon._command]
    daemon.start()
    time.sleep(3.2)
    with contextlib.closing(PolicyClient(daemon.config["sockets"]["policy_socket"])) as client:
        for _ in range(110):
            client.send_bytes(FULL_REQUEST)
            assert client.receive() == "DUNNO"
    wait_until(lambda: trace.read_text().count("sendto(") >= 110, what="trace")
    lines = [line.split(None, 1) for line in trace.read_text().splitlines() if "resumed>" not in line]
    thread = next(thread for thread, call in lines if call.startswith("sendto(") and "DUNNO" in call)
    calls = [call.partition("(")[0] for each, call in lines if each == thread]
    last = len(calls) - 1 - calls[::-1].index("sendto")
    hundred = calls[: last + 1][-100 * SYSTEM_CALLS_OF_A_REMEMBERED_ANSWER :]
    others = [call for call in hundred if call not in ("recvfrom", "stat", "newfstatat", "statx", "sendto")]
    assert hundred.count("sendto") >= 98, hundred
    assert len(others) <= 4, others  # a futex where another thread happens to wake
