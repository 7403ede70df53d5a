"""Recalled answers: the same as answers decided at that moment, and never older than their facts."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import decision_table as table
import pytest
from conftest import USERS, PolicyClient, wait_until
from test_policy_decisions import fill_database
from test_wire import FULL_REQUEST

import mailcloak


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
        services.append(mailcloak.Service(config, *services[-1:]))
        return services[-1]

    yield make
    for service in services:
        service.directory.close()
        service.database.close()
        service.source.close()
        if service.saved:
            service.saved.close()


def test_attempts_at_one_answer_share_their_deadline(make_service, monkeypatch):
    service, deadlines = make_service(), []
    monkeypatch.setattr(mailcloak.LiveFacts, "is_torn", property(lambda facts: True))

    def decide(facts):
        deadlines.append(facts._until())
        return mailcloak.accept("other-state")

    service.answer(("question",), decide)
    assert (len(deadlines), len(set(deadlines))) == (mailcloak.MAX_ATTEMPTS, 1)


def test_answer_is_made_again_as_often_as_what_it_was_made_from_changes(make_service):
    """A user who gets another e-mail during the first attempt may have lost the right during the second."""
    service, states = make_service({"alice": "alice@d1.test"}), []

    def decide(facts):
        states.append(facts.find_login("alice").state)
        if len(states) <= 2:
            said = mailcloak.User("alice", "a@d1.test", enabled=len(states) == 1)
            service.store.learn(("username", "alice"), mailcloak.Answer((said,), time.monotonic()))
        return mailcloak.accept(states[-1])

    assert service.answer(("question",), decide)[0].reason == "disabled"
    assert states == ["enabled", "enabled", "disabled"]


def test_answer_is_given_though_users_are_asked_for_again_all_the_time(make_service, keycloak):
    """The answers of Keycloak take longer than they count, so that none is still cached when the last has come."""
    keycloak.add_user("alice", "alice@d1.test")
    keycloak.latency_seconds = 0.05
    service = make_service(cache_ttl_seconds=0.02, negative_cache_ttl_seconds=0.02)
    add_alias(service, username="alice")
    assert ask(service, sender("alice@d1.test", "alice", "PLAIN")) == "DUNNO"
    assert ask(service, sender("info@d1.test", "alice@d1.test", "PLAIN")) == "DUNNO"


def test_answer_is_given_though_users_have_a_new_id_in_each_answer(make_service, keycloak, monkeypatch):
    """As some user storages may make it up: each look-up then takes the user of another one for somebody else."""
    keycloak.add_user("alice", "alice@d1.test")
    search = keycloak.search
    monkeypatch.setattr(keycloak, "search", lambda query: [{**user, "id": str(uuid.uuid4())} for user in search(query)])
    service = make_service()
    for method in ("PLAIN", "XOAUTH2"):
        assert ask(service, sender("alice@d1.test", "alice", method)) == "DUNNO"
    assert len(keycloak.searches) <= 4


@pytest.mark.parametrize("max_entries", [1, 2, 5])
def test_answer_about_more_users_than_the_cache_holds_is_given(make_service, max_entries):
    """Each user who is looked up pushes out another one, which does not change who that is."""
    names = [f"user{number}" for number in range(6)]
    service = make_service({name: f"{name}@d1.test" for name in names}, cache_max_entries=max_entries)
    add_alias(service, username=names[0])
    for name in names[1:]:
        write(service, "INSERT INTO alias_targets VALUES ('info@d1.test', ?, 0)", name)
    assert ask(service, sender("info@d1.test", names[0], "PLAIN")) == "DUNNO"
    assert ask(service, alias("info@d1.test")) == "OK " + ",".join(f"{name}@d1.test" for name in names)
    assert ask(service, mailcloak.PolicyRequest("RCPT", "", "user1@d1.test", "user2@d1.test", "user2", "PLAIN")) == "DUNNO"


def ask(service, request):
    kind = mailcloak.SocketmapHandler if isinstance(request, mailcloak.SocketmapQuery) else mailcloak.PolicyHandler
    handler = kind.__new__(kind)  # without a connection
    handler.tally, handler.used_at = mailcloak.Tally(), time.monotonic()
    handler.server = SimpleNamespace(daemon=SimpleNamespace(app_uses=SimpleNamespace(note=lambda *use: None)))
    return handler.decide(request, service).text


def recipient(address):
    return mailcloak.PolicyRequest("RCPT", "recipient", address)


def sender(address, sasl_username="", sasl_method=""):
    return mailcloak.PolicyRequest("MAIL", "", "", address, sasl_username, sasl_method)


def alias(address):
    return mailcloak.SocketmapQuery("alias", address)


def is_recalled(service, request):
    is_query = isinstance(request, mailcloak.SocketmapQuery)
    question = ("alias", request.key) if is_query else mailcloak.policy_question(request, service.policy)
    return service.recalled._answers.get(question) is not None


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


@pytest.mark.parametrize(("rows", "answers"), [(20_000, 20_000), (20_000, 0), (0, 20_000), (0, 0)])
@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
def test_decision_table_is_the_same_with_each_memory_on_and_off(rows, answers, mode, make_service, keycloak, monkeypatch):
    monkeypatch.setattr(mailcloak, "MAX_REMEMBERED_ROWS", rows)
    monkeypatch.setattr(mailcloak, "MAX_RECALLED_ANSWERS", answers)
    for username, email, enabled in table.USERS:
        keycloak.add_user(username, email, enabled)
    fill_database(make_service().config.sqlite.path)
    write(make_service(), f"PRAGMA journal_mode = {mode}")
    rows = [row for row in table.ROWS if row.keycloak != "down" and row.database != "broken"]  # a fault keeps from recalling
    services = {policy: make_service(**dict(policy)) for policy in {row.policy for row in rows}}
    for _ in range(3):
        assert {row.id: answer(row, services[row.policy]) for row in rows} == {row.id: row.answer for row in rows}
    recalled = sum(len(service.recalled) for service in services.values())
    assert (recalled > 50) if answers else (recalled == 0)


def test_recalled_answer_asks_neither_sqlite_nor_the_directory(make_service, keycloak, monkeypatch):
    keycloak.add_user("alice", "alice@d1.test")
    service = make_service()
    questions = [recipient("alice@d1.test"), sender("alice@d1.test", "alice", "plain"), alias("alice@d1.test")]
    for _ in range(2):  # what the second question says of alice is news for the first
        first = [ask(service, question) for question in questions]

    def not_to_be_called(*_):
        raise AssertionError

    monkeypatch.setattr(service.database, "_row", not_to_be_called)
    monkeypatch.setattr(service.directory, "_find", not_to_be_called)
    assert [ask(service, question) for question in questions] == first == ["DUNNO", "DUNNO", "NOTFOUND "]


# ---- as long as their facts


def test_commit_counts_from_the_next_request(make_service):
    service = make_service(static_users=USERS)
    add_alias(service)
    assert [ask(service, alias("info@d1.test")) for _ in range(3)] == ["OK alice@d1.test"] * 3
    write(service, "UPDATE aliases SET username = 'bob'")
    assert ask(service, alias("info@d1.test")) == "OK bob@d1.test"
    write(service, "DELETE FROM aliases")
    assert ask(service, alias("info@d1.test")) == "NOTFOUND "


def test_answer_made_from_many_facts_is_not_recalled(make_service):
    """Each would keep what was found of every user: of 1,000 users half a megabyte."""
    service = make_service(static_users=USERS)
    write(service, "INSERT INTO aliases (alias_email, username) VALUES ('all@d1.test', 'alice'), ('two@d1.test', 'alice')")
    write(service, "INSERT INTO alias_targets VALUES ('two@d1.test', 'bob', 0)")
    for number in range(mailcloak.MAX_RECALLED_FACTS):
        write(service, "INSERT INTO alias_targets VALUES ('all@d1.test', ?, 0)", f"user{number}")
    assert ask(service, alias("two@d1.test")) == "OK alice@d1.test,bob@d1.test"
    assert ask(service, alias("all@d1.test")).startswith("OK alice@d1.test,user0@d1.test,")
    assert is_recalled(service, alias("two@d1.test"))
    assert not is_recalled(service, alias("all@d1.test"))


def test_commits_that_bear_the_same_time_are_all_seen(make_service, monkeypatch):
    """On a file system whose times are a second apart."""
    service = make_service(static_users=USERS)
    add_alias(service)
    exact, versions = service.database.version, set()
    monkeypatch.setattr(service.database, "version", lambda: (*exact()[:2], 0, 0, *exact()[4:]))
    for number in range(100):
        write(service, "UPDATE aliases SET username = ?", f"user{number}")
        versions.add(service.database.version()[:-1])
        assert [ask(service, alias("info@d1.test")) for _ in range(2)] == [f"OK user{number}@d1.test"] * 2
        assert is_recalled(service, alias("info@d1.test"))
    assert len(versions) == 1


def test_file_put_in_place_by_rename_counts_from_the_next_request(make_service, tmp_path):
    service = make_service(static_users=USERS)
    add_alias(service)
    path, other = service.config.sqlite.path, str(tmp_path / "other.db")
    mailcloak.prepare_database(other, 2)
    with contextlib.closing(sqlite3.connect(other)) as database, database:
        database.execute("INSERT INTO aliases (alias_email, username) VALUES ('info@d1.test', 'bob')")
    assert [ask(service, alias("info@d1.test")) for _ in range(2)] == ["OK alice@d1.test"] * 2
    os.rename(other, path)
    assert ask(service, alias("info@d1.test")) == "OK bob@d1.test"


def test_older_copy_written_over_the_file_under_its_old_time_counts_from_the_next_request(make_service, tmp_path):
    service = make_service(static_users=USERS)
    add_alias(service)
    path, copy = service.config.sqlite.path, str(tmp_path / "copy.db")
    subprocess.run(["cp", "-p", path, copy], check=True)
    write(service, "UPDATE aliases SET username = 'bob'")
    assert [ask(service, alias("info@d1.test")) for _ in range(2)] == ["OK bob@d1.test"] * 2
    times = os.stat(path)
    subprocess.run(["cp", copy, path], check=True)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert ask(service, alias("info@d1.test")) == "OK alice@d1.test"


def test_each_commit_in_wal_mode_counts_and_what_is_between_is_recalled(make_service):
    service = make_service(static_users=USERS)
    add_alias(service)
    write(service, "PRAGMA journal_mode = WAL")
    with contextlib.closing(sqlite3.connect(service.config.sqlite.path, isolation_level=None)) as database:
        for number in range(300):
            database.execute("UPDATE aliases SET username = ?", (f"user{number}",))
            if number % 100 == 50:
                database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            assert [ask(service, alias("info@d1.test")) for _ in range(2)] == [f"OK user{number}@d1.test"] * 2
    version = service.database.version()
    assert version is not None
    assert service.recalled.recall(("alias", "info@d1.test"), version).text == "OK user299@d1.test"


def test_commit_in_wal_mode_after_the_last_connection_of_the_daemon_counts(make_service):
    """SQLite deletes the -shm file with the last connection, and the next one makes a new one."""
    service = make_service(static_users=USERS)
    add_alias(service)
    write(service, "PRAGMA journal_mode = WAL")
    for username in ("alice", "bob", "carol"):
        write(service, "UPDATE aliases SET username = ?", username)
        assert [ask(service, alias("info@d1.test")) for _ in range(2)] == [f"OK {username}@d1.test"] * 2
        service.database.close()
        assert service.database.version() is None


def test_commit_in_wal_mode_while_the_last_connection_is_being_closed_counts(make_service, monkeypatch):
    service = make_service(static_users=USERS)
    add_alias(service)
    write(service, "PRAGMA journal_mode = WAL")
    connect, path, answers = mailcloak.connect_database, service.config.sqlite.path, []

    def in_another_process():
        change = "import sqlite3, sys; sqlite3.connect(sys.argv[1], isolation_level=None).execute(\"UPDATE aliases SET username = 'bob'\")"
        subprocess.run([sys.executable, "-c", change, path], check=True)
        with ThreadPoolExecutor(1) as pool:
            answers.extend(pool.submit(lambda: [ask(service, alias("info@d1.test")) for _ in range(2)]).result(10))
            pool.submit(service.database.close).result(10)  # as each thread of the daemon does at its end

    class Connection:
        """A connection whose close() takes long."""

        def __init__(self, *args):
            self._connection = connect(*args)

        def __getattr__(self, name):
            return getattr(self._connection, name)

        def __setattr__(self, name, value):
            if name == "_connection":
                object.__setattr__(self, name, value)
            else:
                setattr(self._connection, name, value)

        def close(self):
            self._connection.close()
            if not answers:
                in_another_process()

    monkeypatch.setattr(mailcloak, "connect_database", Connection)
    assert [ask(service, alias("info@d1.test")) for _ in range(2)] == ["OK alice@d1.test"] * 2
    service.database.close()
    assert answers == ["OK bob@d1.test"] * 2
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        for username in ("carol", "alice"):
            database.execute("UPDATE aliases SET username = ?", (username,))
            assert [ask(service, alias("info@d1.test")) for _ in range(2)] == [f"OK {username}@d1.test"] * 2


def test_rows_read_while_a_commit_comes_are_not_remembered_as_of_after_it(make_service, monkeypatch):
    service = make_service(static_users=USERS)
    add_alias(service)
    write(service, "PRAGMA journal_mode = WAL")
    ask(service, alias("other@d1.test"))
    exact, calls = service.database.version, []

    def version():
        calls.append(exact())
        if len(calls) == 3:  # SQLite has read
            write(service, "UPDATE aliases SET username = 'bob'")
            calls[-1] = exact()
        return calls[-1]

    monkeypatch.setattr(service.database, "version", version)
    usernames = [service.database.find_alias("info@d1.test").users[0] for _ in range(3)]
    assert usernames == ["alice", "bob", "bob"]


def test_descriptors_for_versions_are_closed_with_their_files(make_service, tmp_path):
    service = make_service(static_users=USERS)
    path = service.config.sqlite.path

    def count():
        links = [
            os.readlink(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{each}")
        ]
        return sum(str(tmp_path) in link and "last-known" not in link for link in links)

    for number in range(5):
        for mode in ("WAL", "DELETE"):
            other = str(tmp_path / "other.db")
            mailcloak.prepare_database(other, 2)
            with contextlib.closing(sqlite3.connect(other, isolation_level=None)) as database:
                database.execute(f"PRAGMA journal_mode = {mode}")
                database.execute("INSERT INTO aliases (alias_email, username) VALUES ('info@d1.test', ?)", (f"user{number}",))
            os.rename(other, path)
            assert [ask(service, alias("info@d1.test")) for _ in range(3)] == [f"OK user{number}@d1.test"] * 3
            assert count() <= 6  # SQLite's own for the file, -wal and -shm, and ours
    service.database.close()
    assert count() <= 2


def test_recalled_answer_serves_while_the_file_is_locked(make_service):
    service = make_service(static_users=USERS)
    add_alias(service)
    assert ask(service, alias("info@d1.test")) == "OK alice@d1.test"
    with contextlib.closing(sqlite3.connect(service.config.sqlite.path, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        assert ask(service, alias("info@d1.test")) == "OK alice@d1.test"


def test_answer_made_while_the_database_fails_is_not_recalled(make_service, monkeypatch):
    service = make_service(static_users=USERS)
    add_alias(service, "alice@d1.test", "bob")
    monkeypatch.setattr(mailcloak, "DATABASE_BUSY_SECONDS", 0.01)
    with contextlib.closing(sqlite3.connect(service.config.sqlite.path, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        assert ask(service, sender("alice@d1.test", "alice", "xoauth2")) == "DUNNO"  # it is her primary e-mail
    assert len(service.recalled) == 0
    assert ask(service, sender("alice@d1.test", "alice", "xoauth2")) == mailcloak.SENDER_NOT_OWNED


def test_end_of_a_cache_entry_is_observed(make_service, keycloak):
    keycloak.add_user("alice", "alice@d1.test")
    service = make_service(cache_ttl_seconds=0.5, negative_cache_ttl_seconds=0, disappearance_grace_seconds=0)
    assert ask(service, recipient("alice@d1.test")) == "DUNNO"
    assert is_recalled(service, recipient("alice@d1.test"))
    keycloak.users.clear()
    keycloak.add_user("bob", "bob@d1.test")
    wait_until(lambda: ask(service, recipient("alice@d1.test")) == mailcloak.NO_SUCH_USER, 3, "end of the entry")


def test_user_found_disabled_loses_the_recalled_answers_as_well(make_service, keycloak):
    keycloak.add_user("alice", "alice@d1.test")
    service = make_service(disappearance_grace_seconds=0)
    question = sender("", "alice", "plain")
    assert [ask(service, question) for _ in range(2)] == ["DUNNO"] * 2
    assert is_recalled(service, question)
    keycloak.users.clear()
    keycloak.add_user("alice", "alice@d1.test", False)
    assert ask(service, recipient("alice@d1.test")) == mailcloak.NO_SUCH_USER
    assert ask(service, question) == mailcloak.SENDER_NOT_OWNED


def test_new_fact_counts_for_a_recalled_answer_though_it_was_learnt_by_another_question(make_service, keycloak):
    keycloak.add_user("alice", "alice@d1.test")
    service = make_service()
    add_alias(service)
    by_name, by_email = sender("info@d1.test", "alice", "plain"), sender("info@d1.test", "alice@d1.test", "plain")
    assert [ask(service, each) for each in (by_name, by_email)] == ["DUNNO"] * 2
    assert is_recalled(service, by_name)
    assert is_recalled(service, by_email)
    keycloak.user("alice")["enabled"] = False
    answer = service.source.find_users(("username", "alice"), time.monotonic() + 5)
    service.store.learn(("username", "alice"), answer)
    assert [ask(service, each) for each in (by_name, by_email)] == [mailcloak.SENDER_NOT_OWNED] * 2


@pytest.mark.long
def test_recalled_answer_is_made_again_in_the_last_part_of_its_facts_life(make_service, keycloak):
    """So that they are asked for again in the background, and nobody waits."""
    keycloak.add_user("alice", "alice@d1.test")
    service = make_service(cache_ttl_seconds=5)
    asked = len(keycloak.searches)
    end, recalled = time.monotonic() + 6.5, 0
    while time.monotonic() < end:
        recalled += service.answer(
            mailcloak.policy_question(recipient("alice@d1.test"), service.policy),
            lambda facts: mailcloak.decide_policy(recipient("alice@d1.test"), service.policy, facts),
        )[1]
        time.sleep(0.05)
    assert recalled > 20
    assert 2 <= len(keycloak.searches) - asked <= 3


def test_answer_of_an_outage_is_not_recalled(make_service, keycloak):
    keycloak.add_user("alice", "alice@d1.test")
    service = make_service(cache_ttl_seconds=0.2, stale_if_error_seconds=1.5)
    assert ask(service, recipient("alice@d1.test")) == "DUNNO"
    keycloak.stop()
    time.sleep(0.3)
    assert ask(service, recipient("alice@d1.test")) == "DUNNO"
    wait_until(lambda: ask(service, recipient("alice@d1.test")) == mailcloak.DIRECTORY_FAILED, 5)


def test_reload_begins_with_no_recalled_answer(make_service):
    service = make_service(static_users=USERS)
    ask(service, recipient("alice@d1.test"))
    assert len(service.recalled) == 1
    reloaded = make_service(static_users={"bob": "bob@d1.test"})
    assert len(reloaded.recalled) == 0
    assert ask(reloaded, recipient("alice@d1.test")) == mailcloak.NO_SUCH_USER


# ---- what is not recalled, and how much


def test_recalled_app_ends_with_its_time(make_service):
    service = make_service(static_users=USERS)
    write(service, "INSERT INTO apps (app_id, secret_hash, expires_at) VALUES ('printer', 'x', strftime('%s', 'now') + 2)")
    write(service, "INSERT INTO app_from (app_id, from_addr) VALUES ('printer', 'scan@d1.test')")
    question = sender("scan@d1.test", "printer", "plain")
    assert ask(service, question) == "DUNNO"
    assert is_recalled(service, question)
    wait_until(lambda: ask(service, question) == mailcloak.SENDER_NOT_OWNED, 5, "the end of the app's time")


def test_recalled_app_counts_again_where_the_clock_is_set_back(make_service, monkeypatch):
    service = make_service(static_users=USERS)
    write(service, "INSERT INTO apps (app_id, secret_hash, expires_at) VALUES ('printer', 'x', 2000)")
    write(service, "INSERT INTO app_from (app_id, from_addr) VALUES ('printer', 'scan@d1.test')")
    for now, answer in (
        (1999.5, "DUNNO"),
        (2000.0, mailcloak.SENDER_NOT_OWNED),
        (1000.0, "DUNNO"),
        (3000.0, mailcloak.SENDER_NOT_OWNED),
    ):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        assert [ask(service, sender("scan@d1.test", "printer", "plain")) for _ in range(3)] == [answer] * 3


def test_recalled_refusal_ends_when_keycloak_is_to_be_asked_again(make_service, keycloak):
    keycloak.add_user("bob", "bob@d1.test")
    service = make_service(negative_cache_ttl_seconds=0.5)
    assert [ask(service, recipient("alice@d1.test")) for _ in range(2)] == [mailcloak.NO_SUCH_USER] * 2
    assert is_recalled(service, recipient("alice@d1.test"))
    keycloak.add_user("alice", "alice@d1.test")
    wait_until(lambda: ask(service, recipient("alice@d1.test")) == "DUNNO", 3, "end of the negative answer")


def test_refusals_push_out_no_other_answer(make_service, monkeypatch):
    monkeypatch.setattr(mailcloak, "MAX_RECALLED_ANSWERS", 20)
    monkeypatch.setattr(mailcloak, "MAX_REMEMBERED_ROWS", 20)
    service = make_service(static_users=USERS)
    add_alias(service)
    assert [ask(service, each) for each in (recipient("alice@d1.test"), alias("info@d1.test"))] == ["DUNNO", "OK alice@d1.test"]
    for number in range(50):
        assert ask(service, recipient(f"stranger{number}@d1.test")) == mailcloak.NO_SUCH_USER
        assert ask(service, alias(f"stranger{number}@d1.test")) == "NOTFOUND "
        assert ask(service, sender(f"x{number}@elsewhere.test", "", "")) == "DUNNO"
        assert ask(service, recipient(f"x{number}@elsewhere.test")) == "DUNNO"
    assert len(service.recalled) == 2 + 2
    assert is_recalled(service, recipient("alice@d1.test"))
    assert is_recalled(service, alias("info@d1.test"))
    assert len(service.database._rows) == 1 + 2


def test_recalled_answers_are_bounded_in_count_and_in_length(make_service, monkeypatch):
    monkeypatch.setattr(mailcloak, "MAX_RECALLED_ANSWERS", 10)
    service = make_service(static_users=USERS, foreign_sender="dunno")
    for number in range(30):
        assert ask(service, sender(f"x{number}@elsewhere.test", "alice", "plain")) == "DUNNO"
        assert ask(service, sender(f"{'x' * 1000}{number}@elsewhere.test", "alice", "plain")) == "DUNNO"
    assert len(service.recalled) == 10
    assert is_recalled(service, sender("x20@elsewhere.test", "alice", "plain"))
    assert not is_recalled(service, sender("x19@elsewhere.test", "alice", "plain"))


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


def test_change_by_mailcloakctl_is_seen_where_the_answer_was_recalled(static_daemon):
    static_daemon.ctl("aliases", "add", "info@d1.test", "alice")
    client, map_client = static_daemon.policy(), static_daemon.socketmap()
    for _ in range(3):
        assert client.ask(recipient="info@d1.test") == "DUNNO"
        assert map_client.ask("alias info@d1.test") == "OK alice@d1.test"
    static_daemon.ctl("aliases", "disable", "info@d1.test")
    assert client.ask(recipient="info@d1.test") == "550 5.1.1 No such user"
    assert map_client.ask("alias info@d1.test") == "NOTFOUND "


def test_version_of_the_file_is_the_same_without_the_librarys_calls(make_service, monkeypatch):
    service = make_service(static_users=USERS)
    path = service.config.sqlite.path
    version, status = service.database.version(), os.stat(path)
    times, device = divmod(status.st_ctime_ns, 10**9), (os.major(status.st_dev), os.minor(status.st_dev))
    with open(path, "rb") as file:
        counter = int.from_bytes(file.read(28)[24:], "big")
    assert version == (status.st_ino, status.st_size, *times, *device, counter)
    monkeypatch.setattr(mailcloak, "_statx", None)
    monkeypatch.setattr(mailcloak, "_pread", None)
    assert service.database.version() == version
    os.unlink(path)
    assert service.database.version() is None
    monkeypatch.undo()
    assert service.database.version() is None


@pytest.mark.parametrize("with_library", [True, False])
@pytest.mark.parametrize("size", [1, 14, 5_000_000])
def test_answer_is_sent_whole(monkeypatch, with_library, size):
    if not with_library:
        monkeypatch.setattr(mailcloak, "_send_at_once", None)
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


SYSTEM_CALLS_OF_A_RECALLED_ANSWER = 4  # recv of the request, stat and a read of the database file, send of the answer


@pytest.mark.real("strace")
def test_recalled_answer_takes_four_system_calls(make_daemon, short_dir):
    daemon = make_daemon(static_users=USERS, level="info")
    trace = short_dir / "trace"
    daemon._command = ["strace", "-f", "-qq", "-o", str(trace), *daemon._command]
    daemon.start()
    try:
        with contextlib.closing(PolicyClient(daemon.config["sockets"]["policy_socket"])) as client:
            for _ in range(510):
                client.send_bytes(FULL_REQUEST)
                assert client.receive() == "DUNNO"
        wait_until(lambda: trace.read_text().count("sendto(") >= 510, what="trace")
    finally:  # the end of strace would not end the daemon
        os.kill(int(re.search(r"daemon: started .*pid=(\d+)", daemon.log()).group(1)), signal.SIGTERM)
        daemon.process.wait(20)
    lines = [line.split(None, 1) for line in trace.read_text().splitlines() if "resumed>" not in line]
    thread = next(thread for thread, call in lines if call.startswith("sendto(") and "DUNNO" in call)
    calls = [call.partition("(")[0] for each, call in lines if each == thread]
    ends = [number for number, call in enumerate(calls) if call == "sendto"][-501:]
    hundreds = [calls[first + 1 : last + 1] for first, last in zip(ends[::100], ends[100::100])]
    assert len(hundreds) >= 4
    best = min(hundreds, key=len)  # on a busy machine other threads wake more often
    others = [call for call in best if call not in ("recvfrom", "stat", "newfstatat", "statx", "pread64", "sendto")]
    assert len(best) <= 102 * SYSTEM_CALLS_OF_A_RECALLED_ANSWER, best
    assert len(others) <= 4, others  # a futex where another thread happens to wake


# ---- what changes the file without a commit


def make_file(path, script, mode="DELETE"):
    """A database by other statements than mailcloak's own, as a restored dump is one."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(f"PRAGMA journal_mode = {mode}")
        database.executescript(f"BEGIN; {script}; PRAGMA user_version = {mailcloak.SCHEMA_VERSION}; COMMIT")
    return path


def test_restored_dump_copied_over_the_file_counts_though_its_tables_are_elsewhere(make_service, tmp_path):
    """SQLite keeps the schema that it has read while the file's counters look like those of a commit."""
    service = make_service(static_users=USERS)
    write(service, "INSERT INTO apps (app_id, secret_hash) VALUES ('alice', 'x')")
    with contextlib.closing(sqlite3.connect(service.config.sqlite.path)) as database, database:
        rows = [(f"alias{number}@d1.test", "bob") for number in range(300)]
        database.executemany("INSERT INTO aliases (alias_email, username) VALUES (?, ?)", rows)
    as_alice = sender("alice@d1.test", "alice", "plain")
    assert [ask(service, each) for each in (as_alice, alias("alias7@d1.test"))] == [mailcloak.SENDER_NOT_OWNED, "OK bob@d1.test"]
    with contextlib.closing(sqlite3.connect(service.config.sqlite.path)) as database:
        statements = [statement for statement in database.iterdump() if statement not in ("BEGIN TRANSACTION;", "COMMIT;")]
    for number, order in enumerate(
        (statements, sorted(statements, key=lambda each: "INSERT" in each), sorted(statements, reverse=True))
    ):
        order = sorted(order, key=lambda each: not each.startswith("CREATE TABLE")) if number == 2 else order
        copy = make_file(str(tmp_path / f"dump{number}.db"), "".join(order))
        subprocess.run(["cp", copy, service.config.sqlite.path], check=True)
        for _ in range(2):
            assert ask(service, as_alice) == mailcloak.SENDER_NOT_OWNED
            assert ask(service, alias("alias7@d1.test")) == "OK bob@d1.test"


def test_copy_with_the_same_counters_during_a_question_counts_after_it(make_service, tmp_path):
    service = make_service(static_users=USERS)
    path, version = service.config.sqlite.path, service.database.version
    copies = [
        make_file(
            str(tmp_path / f"{owner}.db"),
            f"{mailcloak.SCHEMA}; INSERT INTO aliases (alias_email, username) VALUES ('boss@d1.test', '{owner}')",
        )
        for owner in ("bob", "alice")
    ]
    subprocess.run(["cp", copies[0], path], check=True)
    assert ask(service, sender("boss@d1.test", "bob", "plain")) == "DUNNO"
    before = version()
    subprocess.run(["cp", copies[1], path], check=True)
    service.database.find_alias("other@d1.test", before)  # a question that began before the copy
    for _ in range(3):
        assert ask(service, sender("boss@d1.test", "bob", "plain")) == mailcloak.SENDER_NOT_OWNED
        assert ask(service, sender("boss@d1.test", "alice", "plain")) == "DUNNO"


def test_connection_that_is_closed_in_wal_mode_leaves_the_others_their_version(make_service):
    """With many busy connections one is closed after each question."""
    service = make_service(static_users=USERS)
    write(service, "PRAGMA journal_mode = WAL")
    pools = [ThreadPoolExecutor(1) for _ in range(2)]
    for number, pool in enumerate(pools):
        assert pool.submit(ask, service, alias(f"x{number}@d1.test")).result(10) == "NOTFOUND "
    pools[1].submit(service.database.close).result(10)
    assert service.database.version() is not None
    for pool in pools:
        pool.submit(service.database.close).result(10)
        pool.shutdown()
    assert service.database.version() is None


@pytest.mark.parametrize("link", [False, True])
def test_switch_to_wal_mode_while_another_thread_keeps_its_connection(make_service, tmp_path, link):
    service = make_service(static_users=USERS)
    path = service.config.sqlite.path
    if link:
        os.mkdir(tmp_path / "real")
        os.rename(path, tmp_path / "real" / "state.db")
        os.symlink(tmp_path / "real" / "state.db", path)
        (tmp_path / "state.db-shm").write_bytes(bytes(32768))  # left over from before
    add_alias(service)
    pools = [ThreadPoolExecutor(1) for _ in range(3)]

    def by(number, question):
        return pools[number].submit(ask, service, question).result(10)

    assert by(0, alias("info@d1.test")) == "OK alice@d1.test"
    write(service, "PRAGMA journal_mode = WAL")
    assert by(1, alias("x1@d1.test")) == "NOTFOUND "
    pools[1].submit(service.database.close).result(10)
    assert by(2, alias("x2@d1.test")) == "NOTFOUND "
    for username in ("bob", "carol", "alice") * 3:
        write(service, "UPDATE aliases SET username = ?", username)
        for number in (0, 2, 0):
            assert by(number, alias("info@d1.test")) == f"OK {username}@d1.test"
        pools[2].submit(service.database.close).result(10)
        by(1, alias(f"{username}@d2.test"))
    for pool in pools:
        pool.submit(service.database.close).result(10)
        pool.shutdown()


def test_one_answer_is_made_from_one_state_of_the_file(make_service, keycloak):
    """An alias that goes from the base of an address to the whole of it, while Keycloak is asked in between."""
    service = make_service(recipient_delimiter="+")
    add_alias(service)
    find, calls = service.directory._source.find_users, []

    def find_users(*args):
        calls.append(args)
        if len(calls) == 1:
            with contextlib.closing(sqlite3.connect(service.config.sqlite.path)) as database, database:
                database.execute("DELETE FROM aliases")
                database.execute("INSERT INTO aliases (alias_email, username) VALUES ('info+shop@d1.test', 'alice')")
        return find(*args)

    keycloak.add_user("alice", "alice@d1.test")
    service.directory._source.find_users = find_users
    assert ask(service, recipient("info+shop@d1.test")) == "DUNNO"
    assert calls


def test_another_page_size_is_no_fault(make_service, caplog):
    service = make_service(static_users=USERS)
    add_alias(service)
    assert ask(service, alias("info@d1.test")) == "OK alice@d1.test"
    for size in (512, 65536, 4096):
        with contextlib.closing(sqlite3.connect(service.config.sqlite.path, isolation_level=None)) as database:
            database.execute(f"PRAGMA page_size = {size}")
            database.execute("VACUUM")
        assert [ask(service, alias(each)) for each in ("info@d1.test", f"x{size}@d1.test")] == ["OK alice@d1.test", "NOTFOUND "]
    assert "truncated" not in caplog.text


def test_pipe_in_place_of_the_file_holds_up_nobody(make_service):
    service = make_service(static_users=USERS)
    path = service.config.sqlite.path
    os.unlink(path)
    os.mkfifo(path)
    assert ask(service, alias("info@d1.test")) == "TEMP database not usable"


def test_damage_that_sqlite_quotes_in_its_message_is_a_fault_like_others(make_service, caplog):
    service = make_service(static_users=USERS)
    path = service.config.sqlite.path
    service.database.close()
    with open(path, "r+b") as file:
        content = file.read()
        file.seek(content.index(b"CREATE TABLE aliases") + 7)
        file.write(b"T\xa8\nLE")
    for _ in range(3):
        assert ask(service, alias("info@d1.test")) == "TEMP database not usable"
    assert not service.database.works()
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("database: ")]
    assert len(lines) == 1
    assert "\n" not in lines[0]


def test_migration_that_fails_leaves_no_copy(make_service):
    service = make_service(static_users=USERS)
    path = service.config.sqlite.path
    service.database.close()
    os.unlink(path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.executescript("CREATE TABLE aliases_username (x); CREATE TABLE aliases (y); PRAGMA user_version = 1")
    for _ in range(5):
        assert ask(service, alias("info@d1.test")) == "TEMP database not usable"
    assert not [name for name in os.listdir(os.path.dirname(path)) if "version-1" in name]


# ---- one state of the database


VIP = {"protocol_state": "MAIL", "sender": "info+vip@d1.test", "sasl_username": "alice", "sasl_method": "XOAUTH2"}


def run_sql(path, *statements):
    """In a process of its own, as another program."""
    code = "import sqlite3, sys\nc = sqlite3.connect(sys.argv[1], isolation_level=None)\nfor each in sys.argv[2:]: c.execute(each)"
    subprocess.run([sys.executable, "-c", code, str(path), *statements], check=True, timeout=30)


def insert_alias(address, username):
    return f"INSERT INTO aliases (alias_email, username) VALUES ('{address}', '{username}')"


def test_alias_without_the_extension_does_not_decide_while_the_address_itself_cannot_be_read(static_daemon):
    """It may be an alias of somebody else."""
    run_sql(static_daemon.database, insert_alias("info@d1.test", "alice"), insert_alias("info+vip@d1.test", "bob"))
    assert static_daemon.ask(**VIP).startswith("553")
    run_sql(
        static_daemon.database, "UPDATE aliases SET username = CAST(x'626fff62' AS TEXT) WHERE alias_email = 'info+vip@d1.test'"
    )
    for request in (VIP, {"recipient": "info+vip@d1.test"}):
        assert static_daemon.ask(**request).startswith("451")
    assert static_daemon.ask_map("alias info+vip@d1.test").startswith("TEMP")


@pytest.mark.long
@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_answer_is_made_from_one_state_of_the_database_though_keycloak_is_asked_in_between(make_daemon, keycloak, mode):
    """In WAL mode the version is not known while no connection is open."""
    for name in ("alice", "bob"):
        keycloak.add_user(name, f"{name}@d1.test")
    daemon = make_daemon(keycloak=keycloak.config()).start()
    run_sql(daemon.database, f"PRAGMA journal_mode = {mode}", insert_alias("info@d1.test", "bob"))
    client = daemon.policy()
    assert client.ask(**{**VIP, "sender": "alice@d1.test"}) == "DUNNO"
    time.sleep(1.3)  # the connection rests
    answers, keycloak.latency_seconds = [], 0.7
    thread = threading.Thread(target=lambda: answers.append(client.ask(**VIP)))
    thread.start()
    time.sleep(0.3)
    move = "UPDATE aliases SET username = 'alice' WHERE alias_email = 'info@d1.test'"
    run_sql(daemon.database, "BEGIN", insert_alias("info+vip@d1.test", "bob"), move, "COMMIT")
    thread.join()
    assert answers == ["553 5.7.1 Sender not owned by authenticated user"]


@pytest.mark.long
@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_answer_is_made_from_one_state_of_the_database_while_another_program_writes_it(static_daemon, mode):
    """In one transaction the address goes to bob, and what it is an extension of to alice; and back."""
    run_sql(static_daemon.database, f"PRAGMA journal_mode = {mode}", insert_alias("info@d1.test", "bob"))
    there = f"{insert_alias('info+vip@d1.test', 'bob')}; UPDATE aliases SET username = 'alice' WHERE alias_email = 'info@d1.test'"
    back = "DELETE FROM aliases WHERE alias_email = 'info+vip@d1.test'; UPDATE aliases SET username = 'bob' WHERE alias_email = 'info@d1.test'"
    code = f"""
import sqlite3, sys, time
c = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=10)
end = time.monotonic() + 4
while time.monotonic() < end:
    for text in ({there!r}, {back!r}):
        c.executescript("BEGIN IMMEDIATE; " + text + "; COMMIT")
        time.sleep(0.002)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(static_daemon.database)]) as writer:
        clients, given = [static_daemon.policy() for _ in range(3)], set()

        def load(client):
            while writer.poll() is None:
                given.add(client.ask(**VIP)[:3])

        with ThreadPoolExecutor(len(clients)) as pool:
            list(pool.map(load, clients))
    assert writer.returncode == 0
    assert "DUN" not in given
    assert "553" in given


@pytest.mark.parametrize("has_snapshot", [False, True])
def test_file_that_goes_to_wal_mode_while_a_kept_connection_asks_counts_each_commit_after_it(
    make_service, monkeypatch, has_snapshot
):
    """SQLite deletes the -shm file with its last connection, so another one is there when the next thread asks."""
    service = make_service(static_users=USERS)
    add_alias(service)
    path, connect = service.config.sqlite.path, service.database._connection

    def switch(version):
        connection = connect(version)
        run_sql(path, "PRAGMA journal_mode = wal")
        return connection

    assert ask(service, alias("info@d1.test")) == "OK alice@d1.test"
    with monkeypatch.context() as patch:
        patch.setattr(service.database, "_connection", switch)
        assert ask(service, alias("none@d1.test")) == "NOTFOUND "
    for number in range(6):
        username = ("bob", "alice")[number % 2]
        run_sql(path, f"UPDATE aliases SET username = '{username}'")
        assert [ask(service, alias("info@d1.test")) for _ in range(2)] == [f"OK {username}@d1.test"] * 2
        assert is_recalled(service, alias("info@d1.test"))
        if number == 2 and has_snapshot:  # of hard links, as by cp -al
            os.link(f"{path}-shm", f"{path}.snapshot-shm")
        if number == 3:
            service.database.close()
