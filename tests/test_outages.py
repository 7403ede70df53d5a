"""Keycloak down, hanging or slow: kept answers, the circuit breaker, refresh ahead, and what outlives a restart."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import sqlite3
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import Clock, as_nobody, wait_until
from keycloak_stand_in import SELF_CHECK
from test_lifecycle import wait_for_self_check

import mailcloak

DEFER = "451 4.3.0 Temporary authentication/lookup failure"
REJECT = "550 5.1.1 No such user"
NOT_OWNED = "553 5.7.1 Sender not owned by authenticated user"
SHORT = {
    "disappearance_grace_seconds": 0,
    "domain": ["d1.test", "d2.test"],
    "recipient_delimiter": "+",
    "cache_ttl_seconds": 0.2,
    "negative_cache_ttl_seconds": 0,
}
OWN = {"protocol_state": "MAIL", "sender": "alice@d1.test", "sasl_username": "alice", "sasl_method": "XOAUTH2"}
OWN_BY_EMAIL = {**OWN, "sasl_username": "alice@d1.test"}


ALICE = mailcloak.User("alice", "alice@d1.test", True)
ALICE_DISABLED = ALICE._replace(enabled=False)


class PlainDirectory:
    """Users that are values; down makes every question fail."""

    name = "keycloak"

    def __init__(self, clock):
        self.clock = clock
        self.outage = mailcloak.Outage(clock)
        self.users = [ALICE]
        self.down = False
        self.asked = []

    def find_users(self, question, deadline):
        self.asked.append(question)
        if self.down:
            raise mailcloak.DirectoryUnavailable("down")
        attribute, value = question
        return mailcloak.Answer(tuple(user for user in self.users if getattr(user, attribute) == value), self.clock())

    def report(self):
        return None

    def give_up(self):
        pass

    def close(self):
        pass


@pytest.fixture
def plain():
    """(directory behind the store of users, what it asks, its clock)."""
    yield from make_plain(disappearance_grace_seconds=0)


class Ask:
    """A UserDirectory, of which a test sees the value alone."""

    def __init__(self, users):
        self.users = users

    def find_holders(self, address):
        return self.users.find_holders(address, math.inf).value

    def find_login(self, sasl_username):
        return self.users.find_login(sasl_username, math.inf).value


def make_plain(saved=None, store=None, clock=None, **policy):
    clock = clock or Clock()
    directory = PlainDirectory(clock)
    policy = mailcloak.read_block(
        mailcloak.PolicyConfig, "policy", {"domain": "d1.test", "stale_if_error_seconds": 1000, **policy}, []
    )
    store = store or mailcloak.UserStore(policy)
    store.policy = dataclasses.replace(policy, cache_max_entries=store.policy.cache_max_entries)
    cached = mailcloak.UserDirectory(directory, policy, 1.0, store, saved, clock=clock)
    yield Ask(cached), directory, clock
    cached.close()


def short_daemon(make_daemon, keycloak, **policy):
    keycloak.add_user("alice", "alice@d1.test")
    keycloak.add_user("bob", "bob@d1.test")
    return make_daemon(keycloak=keycloak.config(timeout_seconds=1), policy={**SHORT, **policy})


def test_address_that_a_user_was_found_without_is_not_theirs_in_any_failure_mode(make_daemon, keycloak):
    daemon = short_daemon(make_daemon, keycloak, keycloak_failure_mode="dunno").start()
    assert daemon.ask(**OWN) == "DUNNO"
    keycloak.user("alice")["email"] = "alicia@d1.test"
    wait_until(lambda: daemon.ask(**OWN) == NOT_OWNED)
    keycloak.fault = "close"
    for sender in ("alice@d1.test", "ALICE@d1.test", "alice+x@d1.test"):
        assert daemon.ask(**{**OWN, "sender": sender}) == DEFER
    assert daemon.ask(**{**OWN, "sender": "alicia@d1.test"}) == "DUNNO"
    assert daemon.ask(**{**OWN, "sender": "other@d1.test"}) == "DUNNO"  # the failure mode


# ---- kept answers


def test_positive_answer_serves_in_an_outage_until_its_limit(plain):
    cached, directory, clock = plain
    assert cached.find_holders("alice@d1.test") == tuple(directory.users)
    assert cached.find_login("alice").state == "enabled"
    directory.down = True
    clock.now += 999
    assert cached.find_holders("alice@d1.test") == tuple(directory.users)
    assert cached.find_login("alice").state == "enabled"
    clock.now += 2
    with pytest.raises(mailcloak.DirectoryUnavailable):
        cached.find_holders("alice@d1.test")
    with pytest.raises(mailcloak.DirectoryUnavailable):
        cached.find_login("alice")


def test_negative_answer_never_serves_in_an_outage(plain):
    cached, directory, clock = plain
    assert cached.find_holders("stranger@d1.test") == ()
    directory.down = True
    clock.now += 11
    with pytest.raises(mailcloak.DirectoryUnavailable):
        cached.find_holders("stranger@d1.test")


def test_user_who_came_back_after_an_outage_is_asked_for_again(plain):
    cached, directory, clock = plain
    cached.find_holders("alice@d1.test")
    directory.down = True
    clock.now += 500
    cached.find_holders("alice@d1.test")
    directory.down, directory.users = False, []
    assert cached.find_holders("alice@d1.test") == ()


def test_user_found_disabled_loses_every_kept_login(plain):
    cached, directory, clock = plain
    for name in ("alice", "alice@d1.test"):
        assert cached.find_login(name).state == "enabled"
    directory.users = [mailcloak.User("alice", "alice@d1.test", False)]
    clock.now += 200
    assert cached.find_login("alice").state == "disabled"
    directory.down = True
    for seconds in (0, 200, 100_000):  # nor does the outage lift what was refused before it
        clock.now += seconds
        for name in ("alice", "alice@d1.test"):
            assert cached.find_login(name).state == "disabled"


def test_disabled_recipient_gets_the_failure_mode_in_an_outage(plain):
    cached, directory, clock = plain
    directory.users = [ALICE_DISABLED]
    assert cached.find_holders("alice@d1.test") == (ALICE_DISABLED,)
    directory.down = True
    clock.now += 200
    with pytest.raises(mailcloak.DirectoryUnavailable):
        cached.find_holders("alice@d1.test")


def test_user_found_gone_is_refused_as_sender_in_an_outage(plain):
    cached, directory, clock = plain
    assert cached.find_login("alice").state == "enabled"
    directory.users = []
    clock.now += 200
    assert cached.find_login("alice").state == "missing"
    directory.down = True
    clock.now += 200
    for name in ("alice", "alice@d1.test"):
        assert cached.find_login(name).state == "missing"
    with pytest.raises(mailcloak.DirectoryUnavailable):
        cached.find_holders("alice@d1.test")
    with pytest.raises(mailcloak.DirectoryUnavailable):
        cached.find_login("stranger")  # nothing was ever known of this one


@pytest.mark.parametrize("down", [False, True], ids=["keycloak-answers", "outage"])
@pytest.mark.parametrize("found_by", ["username", "email"])
def test_user_found_disabled_by_one_question_is_disabled_for_all(plain, found_by, down):
    cached, directory, clock = plain
    for name in ("alice", "alice@d1.test"):
        assert cached.find_login(name).state == "enabled"
    clock.now += 5  # all of it is still fresh
    directory.users = [ALICE_DISABLED]
    users = cached.users
    asked = ("username", "alice") if found_by == "username" else ("email", "alice@d1.test")
    users._store.learn(asked, directory.find_users(asked, 0))
    directory.down = down
    assert {cached.find_login(name).state for name in ("alice", "alice@d1.test")} == {"disabled"}
    assert len(directory.asked) == (
        5 if found_by == "username" else 4
    )  # the e-mail of a disabled user may be another one's as well


def test_slow_answer_does_not_bring_back_who_was_disabled_meanwhile(plain):
    cached, directory, clock = plain
    users, asked = cached.users, ("username", "alice")
    early = directory.find_users(asked, 0)
    clock.now += 1
    directory.users = [ALICE_DISABLED]
    assert cached.find_login("alice@d1.test").state == "disabled"
    users._store.learn(asked, early)
    assert {cached.find_login(name).state for name in ("alice", "alice@d1.test")} == {"disabled"}


@pytest.mark.parametrize("asked_first", [True, False])
def test_login_by_email_serves_in_an_outage_if_it_was_nobodys_username(plain, asked_first):
    cached, directory, clock = plain
    assert cached.find_login("alice").state == "enabled"
    if asked_first:
        assert cached.find_login("alice@d1.test").state == "enabled"
    directory.down = True
    clock.now += 500
    assert cached.find_login("alice").state == "enabled"
    if asked_first:
        assert cached.find_login("alice@d1.test").state == "enabled"
    else:
        with pytest.raises(mailcloak.DirectoryUnavailable):
            cached.find_login("alice@d1.test")


def test_alias_alone_does_not_make_a_sender_in_an_outage(make_daemon, keycloak):
    daemon = short_daemon(make_daemon, keycloak).start()
    daemon.ctl("aliases", "add", "info@d1.test", "alice")
    daemon.ctl("aliases", "add", "sales@d1.test", "bob")
    by_alice, by_bob = {**OWN, "sender": "info@d1.test"}, {**OWN, "sender": "sales@d1.test", "sasl_username": "bob"}
    assert daemon.ask(**by_alice) == "DUNNO"
    keycloak.stop()
    time.sleep(0.3)
    assert daemon.ask(**by_alice) == "DUNNO"
    assert daemon.ask(**by_bob) == DEFER  # bob has not logged in before
    assert daemon.ask(recipient="sales@d1.test") == "DUNNO"


def test_deadline_of_a_request_begins_with_its_first_question_to_keycloak(make_daemon, keycloak):
    daemon = short_daemon(make_daemon, keycloak).start()
    wait_for_self_check(keycloak)
    with contextlib.closing(sqlite3.connect(daemon.database, isolation_level=None, check_same_thread=False)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        timer = threading.Timer(1.5, writer.execute, ["COMMIT"])  # longer than timeout_seconds
        timer.start()
        assert daemon.ask(recipient="alice@d1.test") == "DUNNO"
        timer.join()
    assert [query["email"] for query in keycloak.searches] == ["alice@d1.test"]
    assert " directory: " not in daemon.log()


def test_outage_keeps_recipients_and_senders_over_the_wire(make_daemon, keycloak):
    daemon = short_daemon(make_daemon, keycloak).start()
    assert (daemon.ask(recipient="alice@d1.test"), daemon.ask(**OWN)) == ("DUNNO", "DUNNO")
    keycloak.stop()
    deadline = time.monotonic() + 4
    while time.monotonic() < deadline:
        assert (daemon.ask(recipient="alice@d1.test"), daemon.ask(**OWN)) == ("DUNNO", "DUNNO")
        assert daemon.ask(recipient="bob@d1.test") == DEFER
        assert daemon.ask(recipient="stranger@d1.test") == DEFER


# ---- refresh ahead


def test_answer_used_near_its_end_is_renewed_in_the_background(plain):
    cached, directory, clock = plain
    cached.find_holders("alice@d1.test")
    clock.now += 95
    cached.find_holders("alice@d1.test")
    assert len(directory.asked) == 1
    clock.now += 10
    cached.find_holders("alice@d1.test")
    wait_until(lambda: len(directory.asked) == 2 and not cached.users._refreshing)
    clock.now += 100  # past the first answer's end
    cached.find_holders("alice@d1.test")
    wait_until(lambda: cached.users._refreshes.empty() and not cached.users._refreshing)
    assert len(directory.asked) == 3  # in the last fifth of the second: renewed again, waited for by nobody


def test_renewal_that_fails_leaves_the_answer(plain):
    cached, directory, clock = plain
    cached.find_holders("alice@d1.test")
    directory.down = True
    clock.now += 110
    assert cached.find_holders("alice@d1.test")
    wait_until(lambda: len(directory.asked) == 2)
    clock.now += 5
    assert cached.find_holders("alice@d1.test")


@pytest.mark.long
def test_nobody_waits_for_a_renewal(make_daemon, keycloak):
    daemon = short_daemon(make_daemon, keycloak, cache_ttl_seconds=2).start()
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"
    keycloak.latency_seconds = 0.5
    client, slowest, end = daemon.policy(), 0.0, time.monotonic() + 5
    while time.monotonic() < end:
        started = time.monotonic()
        assert client.ask(recipient="alice@d1.test") == "DUNNO"
        slowest = max(slowest, time.monotonic() - started)
        time.sleep(0.02)
    assert slowest < 0.4
    assert len(keycloak.searches) >= 3


# ---- the circuit breaker


def test_established_outage_is_answered_at_once_and_ends_soon_after_keycloak_returns(make_daemon, keycloak):
    daemon = short_daemon(make_daemon, keycloak).start()
    wait_for_self_check(keycloak)
    keycloak.fault = "stall"
    for number in range(3):
        assert daemon.ask(recipient=f"u{number}@d1.test") == DEFER
    daemon.wait_for_log("warning directory: realm")
    client = daemon.policy()
    for number in range(20):
        started = time.monotonic()
        assert client.ask(recipient=f"v{number}@d1.test") == DEFER
        assert time.monotonic() - started < 0.5  # a lookup would take a second
    keycloak.fault = None
    wait_until(lambda: client.ask(recipient="alice@d1.test") == "DUNNO", 10)
    daemon.wait_for_log("answers again, after ")
    lines = [line for line in daemon.log().splitlines() if "Keycloak counts as away" in line]
    follows = "; Keycloak counts as away: cached users are served, policy.keycloak_failure_mode decides for others"
    assert len(lines) == 1, "not for the failures before, and not again for those after"
    assert re.search(
        rf" warning directory: realm 'mail': .*(timed out|no answer within).*, host \S+{re.escape(follows)}$", lines[0]
    )


def test_outage_is_probed_one_request_at_a_time(make_daemon, keycloak):
    daemon = short_daemon(make_daemon, keycloak).start()
    wait_for_self_check(keycloak)
    keycloak.fault = "status-503"
    for number in range(3):
        daemon.ask(recipient=f"u{number}@d1.test")
    daemon.wait_for_log("warning directory: realm")
    keycloak.forget_requests()
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda number: daemon.ask(recipient=f"v{number}@d1.test"), range(100)))
    wait_until(lambda: keycloak.self_checks >= 2)
    assert keycloak.searches == []
    assert keycloak.most_at_once == 1


def only_searches(keycloak, misbehave):
    """Let searches misbehave while the question for one user of all is answered."""
    original = keycloak.search
    keycloak.search = lambda query: original(query) if query == SELF_CHECK else misbehave(query)
    return original


def fail(query):
    raise RuntimeError  # which closes the connection


@pytest.mark.long
@pytest.mark.parametrize("how", ["fail", "hang"])
def test_searches_that_fail_are_an_outage_though_other_questions_are_answered(make_daemon, keycloak, how):
    daemon = short_daemon(make_daemon, keycloak).start()
    wait_for_self_check(keycloak)
    original = only_searches(keycloak, fail if how == "fail" else lambda query: keycloak.wait(30) or [])
    for number in range(3):
        assert daemon.ask(recipient=f"u{number}@d1.test") == DEFER
    daemon.wait_for_log("warning directory: realm")
    client, end = daemon.policy(), time.monotonic() + 6  # two probes at least
    while time.monotonic() < end:
        started = time.monotonic()
        assert client.ask(recipient="alice@d1.test") == DEFER
        assert time.monotonic() - started < 0.5
        time.sleep(0.05)
    assert keycloak.self_checks > 2
    assert "answers again" not in daemon.log()
    assert daemon.log().count("warning directory: realm") == 1
    keycloak.search = original
    wait_until(lambda: client.ask(recipient="alice@d1.test") == "DUNNO", 10)
    assert daemon.log().count("answers again") == 1


@pytest.mark.parametrize("how", ["fail", "hang"])
def test_question_that_keycloak_never_answers_makes_no_outage(make_daemon, keycloak, how):
    """The probe asks for another name of that kind first, so that it ends at once what anybody can begin."""
    daemon = short_daemon(make_daemon, keycloak).start()
    wait_for_self_check(keycloak)
    original = keycloak.search

    def search(query):
        if query.get("email", "").startswith("poison"):
            return fail(query) if how == "fail" else keycloak.wait(30) or []
        return original(query)

    keycloak.search = search
    clients = [daemon.policy() for _ in range(5)]
    for number, client in enumerate(clients):
        client.send(recipient=f"poison{number}@d1.test")
    assert [client.receive() for client in clients] == [DEFER] * 5
    wait_until(lambda: daemon.ask(recipient="alice@d1.test") == "DUNNO", 15)
    wait_until(lambda: daemon.log().count("counts as away") == daemon.log().count("answers again"))
    times = {"hang": 1, "fail": 2}[how]  # a connection that was closed is tried again
    assert sum(query.get("email", "").startswith("poison") for query in keycloak.searches) <= 5 * times


def test_record_that_makes_no_sense_is_no_outage(make_daemon, keycloak):
    daemon = short_daemon(make_daemon, keycloak).start()
    wait_for_self_check(keycloak)
    keycloak.add_user("odd", "odd@d1.test", enabled="true")
    keycloak.latency_seconds = 0.2  # so that the probe does not answer in between
    assert [daemon.ask(recipient="odd@d1.test") for _ in range(4)] == [DEFER] * 4
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"
    assert "warning directory: " not in daemon.log()


def test_look_up_that_waited_in_the_queue_is_no_failure_of_keycloak(make_daemon, keycloak):
    keycloak.add_user("alice", "alice@d1.test")
    daemon = make_daemon(keycloak=keycloak.config(timeout_seconds=1, max_requests=1)).start()
    wait_for_self_check(keycloak)
    keycloak.latency_seconds = 0.3
    clients = [daemon.policy() for _ in range(20)]
    for number, client in enumerate(clients):
        client.send(recipient=f"u{number}@d1.test")
    answers = [client.receive() for client in clients]
    assert set(answers) <= {REJECT, DEFER}
    assert answers.count(DEFER) > 10
    keycloak.latency_seconds = 0
    assert "warning directory: " not in daemon.log()
    wait_until(lambda: keycloak.at_once == 0)
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"


def test_single_failure_is_no_outage():
    outage = mailcloak.Outage()
    outage.note_failure(mailcloak.DirectoryUnavailable("one"))
    outage.note_failure(mailcloak.DirectoryUnavailable("two"))
    outage.note_success(str)
    outage.note_failure(mailcloak.DirectoryUnavailable("three"))
    assert not outage.established
    outage.note_failure(mailcloak.DirectoryUnavailable("four"))
    outage.note_failure(mailcloak.DirectoryUnavailable("five"))
    assert outage.established
    outage.note_success(str)
    assert not outage.established


def test_answers_from_the_cache_stay_fast_while_lookups_hang(make_daemon, keycloak):
    keycloak.add_user("alice", "alice@d1.test")
    daemon = make_daemon(keycloak=keycloak.config(timeout_seconds=3)).start()
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"
    keycloak.fault = "stall"
    hanging = [daemon.policy() for _ in range(20)]
    for number, client in enumerate(hanging):
        client.send(recipient=f"u{number}@d1.test")
    client = daemon.policy()
    started = time.monotonic()
    for _ in range(500):
        assert client.ask(recipient="alice@d1.test") == "DUNNO"
    assert time.monotonic() - started < 2.5  # less than one hanging lookup takes
    assert [client.receive() for client in hanging] == [DEFER] * 20
    assert time.monotonic() - started < 4


def test_sixty_equal_questions_at_once_are_one_request(make_daemon, keycloak):
    keycloak.add_user("alice", "alice@d1.test")
    keycloak.latency_seconds = 0.5
    daemon = make_daemon(keycloak=keycloak.config()).start()
    clients = [daemon.policy() for _ in range(60)]
    for client in clients:
        client.send(recipient="alice@d1.test")
    assert [client.receive() for client in clients] == ["DUNNO"] * 60
    assert len(keycloak.searches) == 1


@pytest.mark.parametrize("limit", [1, 3])
def test_requests_at_a_time_are_limited_by_max_requests(make_daemon, keycloak, limit):
    keycloak.latency_seconds = 0.05
    daemon = make_daemon(keycloak=keycloak.config(max_requests=limit)).start()
    wait_until(lambda: ("profile", {}) in keycloak.requests and keycloak.at_once == 0)
    keycloak.forget_requests()
    clients = [daemon.policy() for _ in range(12)]
    for number, client in enumerate(clients):
        client.send(recipient=f"u{number}@d1.test")
    assert [client.receive() for client in clients] == [REJECT] * 12
    assert keycloak.most_at_once == limit


# ---- what outlives a restart


def saved_people(path):
    """(meaning, username, standing) of each row of the file."""
    rows = []
    no_table_yet = contextlib.suppress(sqlite3.OperationalError)  # or no file
    with no_table_yet, contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        rows = database.execute("SELECT meaning, person FROM users").fetchall()
    return {(meaning, json.loads(person)["user"][0], json.loads(person)["standing"]) for meaning, person in rows}


def known(daemon):
    """Usernames in the file of a daemon."""
    return {username for _, username, _ in saved_people(daemon.database.parent / "last-known.db")}


def test_daemon_restarted_in_an_outage_still_knows_everyone(make_daemon, keycloak):
    daemon = short_daemon(make_daemon, keycloak).start()
    assert (daemon.ask(recipient="alice@d1.test"), daemon.ask(**OWN), daemon.ask(recipient="stranger@d1.test")) == (
        "DUNNO",
        "DUNNO",
        REJECT,
    )
    keycloak.stop()
    for how in ("stop", "kill"):
        if how == "stop":
            assert daemon.stop() == 0
        else:
            wait_until(lambda: known(daemon) == {"alice"})
            daemon.process.kill()
            daemon.process.wait()
        daemon.start()
        assert (daemon.ask(recipient="alice@d1.test"), daemon.ask(**OWN)) == ("DUNNO", "DUNNO")
        assert daemon.ask(recipient="bob@d1.test") == DEFER
        assert daemon.ask(recipient="stranger@d1.test") == DEFER
    assert known(daemon) == {"alice"}


def test_saved_user_is_asked_about_again_after_a_restart_when_keycloak_answers(make_daemon, keycloak):
    daemon = short_daemon(make_daemon, keycloak, cache_ttl_seconds=1000).start()
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"
    daemon.stop()
    keycloak.users.remove(keycloak.user("alice"))
    daemon.start()
    assert daemon.ask(recipient="alice@d1.test") == REJECT


@pytest.mark.parametrize("lost", ["disabled", "deleted", "other-address"])
def test_user_who_lost_the_right_to_send_does_not_get_it_back_by_outage_or_restart(make_daemon, keycloak, lost):
    daemon = short_daemon(make_daemon, keycloak).start()
    daemon.ctl("aliases", "add", "info@d1.test", "alice")
    assert (daemon.ask(**OWN), daemon.ask(**OWN_BY_EMAIL)) == ("DUNNO", "DUNNO")
    if lost == "disabled":
        keycloak.user("alice")["enabled"] = False
    elif lost == "deleted":
        keycloak.users.remove(keycloak.user("alice"))
    else:
        keycloak.user("alice")["email"] = "new@d1.test"
    wait_until(lambda: daemon.ask(**OWN) == NOT_OWNED)
    keycloak.stop()
    asked = (OWN, OWN_BY_EMAIL, {**OWN_BY_EMAIL, "sasl_username": "ALICE@D1.test", "sender": "info@d1.test"})
    for restarted in (False, True):
        if restarted:
            daemon.process.kill()  # at once after the answer
            daemon.process.wait()
            daemon.start()
        assert not {daemon.ask(**each) for each in asked} - {NOT_OWNED, DEFER}
        if lost != "other-address":
            assert {daemon.ask(**each) for each in asked} == {NOT_OWNED}
            assert daemon.ask(**{**OWN, "sender": ""}) == NOT_OWNED


def test_reload_keeps_the_users_that_are_known(make_daemon, keycloak):
    daemon = short_daemon(make_daemon, keycloak, cache_ttl_seconds=1000).start()
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"
    asked = len(keycloak.searches)
    for change in ({}, {"policy": {"foreign_sender": "dunno"}}, {"keycloak": {"timeout_seconds": 2}}):
        for block, values in change.items():
            daemon.config[block] = {**daemon.config[block], **values}
        daemon.reload()
        assert daemon.ask(recipient="alice@d1.test") == "DUNNO"
        assert len(keycloak.searches) == asked  # what is fresh is not asked for again
    keycloak.stop()
    daemon.reload()
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"


@pytest.mark.parametrize("change", [{"realm": "nowhere"}, {"base_url": "http://127.0.0.1:9"}], ids=["realm", "base_url"])
def test_mistyped_setting_that_is_corrected_costs_nothing(make_daemon, keycloak, change):
    daemon = short_daemon(make_daemon, keycloak).start()
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"
    good = daemon.config["keycloak"]
    for restart in (False, True):
        daemon.config["keycloak"] = {**good, **change}
        if restart:
            daemon.stop()
            daemon.start()
        else:
            daemon.reload()
        assert daemon.ask(recipient="alice@d1.test") == DEFER  # what another realm said is not used
        daemon.config["keycloak"] = good
        if restart:
            daemon.stop()
    keycloak.stop()
    daemon.start()
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"


def test_verified_addresses_are_asked_for_where_they_are_required_from_now_on(make_daemon, keycloak):
    daemon = short_daemon(make_daemon, keycloak, cache_ttl_seconds=1000).start()
    keycloak.user("alice")["emailVerified"] = False
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"
    daemon.config["keycloak"]["require_verified_email"] = True
    daemon.reload()
    assert daemon.ask(recipient="alice@d1.test") == REJECT


def test_file_of_saved_users_is_the_daemons_alone_from_the_first_moment(make_daemon, keycloak, tmp_path, monkeypatch):
    daemon = short_daemon(make_daemon, keycloak).start()
    daemon.ask(recipient="alice@d1.test")
    wait_until(lambda: known(daemon))
    assert stat.S_IMODE((daemon.database.parent / "last-known.db").stat().st_mode) == 0o600
    modes, create = [], mailcloak.os.open
    monkeypatch.setattr(mailcloak.os, "open", lambda *arguments: modes.append(arguments[2:]) or create(*arguments))
    save(tmp_path / "last-known.db", "here", [ALICE])
    assert modes == [(0o600,)] * len(modes)


def test_who_was_refused_does_not_pass_while_the_saved_users_cannot_be_read(make_daemon, keycloak):
    """In the failure mode dunno: the file may know more than Keycloak, which gives no answer."""
    policy = {"keycloak_failure_mode": "dunno", "cache_ttl_seconds": 0.1, "negative_cache_ttl_seconds": 0.1}
    keycloak.add_user("alice", "alice@d1.test", enabled=False)
    daemon = make_daemon(keycloak=keycloak.config(), policy=policy).start()
    asked = {"protocol_state": "MAIL", "sender": "bob@d1.test", "sasl_username": "alice", "sasl_method": "XOAUTH2"}
    assert daemon.ask(**asked).startswith("553")
    daemon.process.kill()
    daemon.process.wait()
    keycloak.fault = "close"
    with contextlib.closing(sqlite3.connect(daemon.database.parent / "last-known.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        daemon.start()
        assert daemon.ask(**asked).startswith("451")
    wait_until(lambda: daemon.ask(**asked).startswith("553"), 20, what="the saved users")


@pytest.mark.parametrize("fault", ["garbage", "truncated", "gone", "directory"])
def test_broken_file_of_saved_users_costs_what_was_in_it_and_a_warning(make_daemon, keycloak, fault):
    daemon = short_daemon(make_daemon, keycloak).start()
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"
    daemon.stop()
    path = daemon.database.parent / "last-known.db"
    if fault == "garbage":
        path.write_bytes(b"garbage" * 3000)
    elif fault == "truncated":
        path.write_bytes(path.read_bytes()[:3000])
    else:
        path.unlink()
        if fault == "directory":
            path.mkdir()
    daemon.start()
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"
    if fault in ("garbage", "truncated"):
        daemon.wait_for_log("warning last-known: begun again from memory path=")
    if fault == "directory":
        daemon.wait_for_log("warning last-known: cannot be used, tried again until it can path=")
        path.rmdir()
        daemon.wait_for_log("warning last-known: written again path=")
    wait_until(lambda: known(daemon) == {"alice"})
    assert "Traceback" not in daemon.log()


# ---- the file by itself


def save(path, meaning, users=(), clock=None):
    """Write these users as confirmed now, and return when they are on the disk."""
    clock = clock or Clock()
    store = store_of(100)
    saved = mailcloak.SavedUsers(str(path), meaning, store, clock, clock)
    for user in users:
        store.learn(("username", user.username), mailcloak.Answer((user,), clock()))
    saved.wait()
    saved.close()


def load(path, meaning, clock=None):
    """Who is known after a start, by username."""
    clock = clock or Clock()
    store = store_of(100)
    mailcloak.SavedUsers(str(path), meaning, store, clock, clock).close()
    return {person.user.username: person for person in store.everybody().values()}


POLICY = mailcloak.read_block(mailcloak.PolicyConfig, "policy", {"domain": "d1.test"}, [])
BOB = mailcloak.User("bob", "bob@d1.test", True, user_id="id-bob")


def store_of(max_entries):
    return mailcloak.UserStore(dataclasses.replace(POLICY, cache_max_entries=max_entries))


def test_users_of_another_realm_are_kept_and_not_used(tmp_path):
    path = tmp_path / "last-known.db"
    save(path, "mail", [ALICE])
    save(path, "other", [BOB])
    assert set(load(path, "mail")) == {"alice"}
    assert set(load(path, "other")) == {"bob"}
    assert load(path, "third") == {}


def test_each_setting_that_an_answer_depends_on_is_part_of_its_meaning(keycloak):
    def meaning(**changes):
        return mailcloak.meaning_of(
            mailcloak.read_block(mailcloak.KeycloakConfig, "keycloak", {**keycloak.config(), **changes}, [])
        )

    changes = [
        {"realm": "other"},
        {"base_url": "https://sso.example.org"},
        {"require_verified_email": True},
        {"receive_when_locked_out": False},
    ]
    assert len({meaning(), *(meaning(**each) for each in changes)}) == 5
    assert meaning(timeout_seconds=3, max_requests=2, client_id="other") == meaning()


def test_saved_user_is_the_same_after_a_restart(tmp_path):
    path, clock = tmp_path / "last-known.db", Clock()
    store = store_of(100)
    saved = mailcloak.SavedUsers(str(path), "mail", store, clock, lambda: clock() + 1e9)
    for user in (BOB._replace(federation="ldap"), BOB._replace(email="bobby@d1.test", federation="ldap"), None):
        clock.now += 10
        users = (user,) if user else ()
        store.learn(("username", "bob"), mailcloak.Answer(users, clock()))
    clock.now += 1
    store.learn(("username", "carol"), mailcloak.Answer((mailcloak.User("carol", "", False),), clock()))
    saved.wait()
    saved.close()
    again = store_of(100)
    mailcloak.SavedUsers(str(path), "mail", again, lambda: clock() - 500, lambda: clock() + 1e9).close()  # another boot's clock
    before, after = store.everybody(), again.everybody()
    assert {
        key: person._replace(asked_at=person.asked_at - 500, confirmed_at=person.confirmed_at - 500)
        for key, person in before.items()
    } == after
    assert before["id-bob"].standing == mailcloak.DOUBTED
    assert before["id-bob"].former == (("email", "bob@d1.test"),)


def test_user_who_lost_a_right_is_written_so_that_no_power_failure_brings_the_journal_back(tmp_path, monkeypatch):
    """Source: SQLite, PRAGMA synchronous: only EXTRA syncs the directory after the journal was deleted."""
    statements, connect = [], mailcloak.connect_database

    def connect_and_trace(*arguments):
        connection = connect(*arguments)
        connection.set_trace_callback(statements.append)
        return connection

    monkeypatch.setattr(mailcloak, "connect_database", connect_and_trace)
    save(tmp_path / "last-known.db", "mail", [BOB])
    begin = statements.index("BEGIN IMMEDIATE")
    assert statements[begin - 1] == "PRAGMA synchronous = EXTRA"


def test_user_who_is_forgotten_is_forgotten_on_disk(tmp_path):
    path, clock = tmp_path / "last-known.db", Clock()
    save(path, "mail", [ALICE, BOB], clock)
    store = store_of(100)
    saved = mailcloak.SavedUsers(str(path), "mail", store, clock, clock)
    for users, _, _ in make_plain(saved, store, clock):
        assert users.users.forget("bob") == 1
    saved.close()
    assert set(load(path, "mail")) == {"alice"}


def test_saved_users_are_bounded_and_who_was_asked_about_longest_ago_goes_first(tmp_path):
    path, clock = tmp_path / "last-known.db", Clock()
    store = store_of(10)
    saved = mailcloak.SavedUsers(str(path), "mail", store, clock, clock)
    for number in range(25):
        clock.now += 1
        user = mailcloak.User(f"u{number}", f"u{number}@d1.test", True)
        store.learn(("username", user.username), mailcloak.Answer((user,), clock()))
    saved.wait()
    saved.close()
    assert set(load(path, "mail")) == {f"u{number}" for number in range(15, 25)}


def test_file_that_cannot_be_read_from_the_start_is_one_line(tmp_path, caplog):
    """Also where nobody has asked yet, so that there is nothing to write."""
    path, clock = tmp_path / "missing" / "last-known.db", Clock()
    saved = mailcloak.SavedUsers(str(path), "mail", store_of(100), clock, clock)
    time.sleep(2.5)
    assert [record.message.split(" path=")[0] for record in caplog.records] == [
        "last-known: cannot be used, tried again until it can"
    ]
    path.parent.mkdir()
    wait_until(lambda: "written again" in caplog.text, what="the file")
    saved.close()
    assert len(caplog.records) == 2


def test_nobody_is_refused_for_good_while_the_file_cannot_be_read_at_the_start(tmp_path):
    """It may know a user who is not found by Keycloak just now."""
    path, clock = tmp_path / "last-known.db", Clock()
    save(path, "mail", [BOB], clock)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        store = store_of(100)
        saved = mailcloak.SavedUsers(str(path), "mail", store, clock, clock)
        for users, directory, _ in make_plain(saved, store, clock):
            directory.users = [ALICE]
            assert users.find_login("alice").state == "enabled"
            for ask, name in ((users.find_holders, "bob@d1.test"), (users.find_login, "bob"), (users.find_login, "stranger")):
                with pytest.raises(mailcloak.Disappeared):
                    ask(name)
            database.execute("ROLLBACK")
            wait_until(lambda: not saved.may_know_more(3600), what="the file")
            with pytest.raises(mailcloak.Disappeared):
                users.find_login("bob")
            directory.outage.established = True
            with pytest.raises(mailcloak.Disappeared):
                users.find_login("bob")
            directory.outage.established = False
            assert users.find_login("stranger").state == "missing"
        saved.close()


def test_file_that_stays_unreadable_defers_refusals_for_the_grace_alone(tmp_path):
    clock, store = Clock(), store_of(100)
    saved = mailcloak.SavedUsers(str(tmp_path / "missing" / "last-known.db"), "mail", store, clock, clock)
    for users, _, _ in make_plain(saved, store, clock):
        with pytest.raises(mailcloak.Disappeared):
            users.find_login("stranger")
        clock.now += 3601
        assert users.find_login("stranger").state == "missing"
    saved.close()


def test_user_who_was_forgotten_before_the_file_could_be_read_does_not_come_back(tmp_path):
    path, clock = tmp_path / "last-known.db", Clock()
    save(path, "mail", [ALICE, BOB], clock)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        store = store_of(100)
        saved = mailcloak.SavedUsers(str(path), "mail", store, clock, clock)
        for users, _, _ in make_plain(saved, store, clock):
            users.users.forget("bob@d1.test")
        database.execute("ROLLBACK")
    wait_until(lambda: not saved.may_know_more(3600), what="the file")
    saved.wait()
    saved.close()
    assert set(load(path, "mail")) == {"alice"}


@contextlib.contextmanager
def late(path, users, max_entries=100):
    """(store, clock, read) of a start at which another program has the file locked; read() ends that."""
    clock = Clock()
    save(path, "mail", users, clock)
    store = store_of(max_entries)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        clock.now += 10
        saved = mailcloak.SavedUsers(str(path), "mail", store, clock, clock)

        def read():
            database.execute("ROLLBACK")
            wait_until(lambda: not saved.may_know_more(3600), what="the file")
            saved.wait()

        yield store, clock, read
        saved.close()


def test_user_found_disabled_after_a_flush_is_so_on_the_disk_when_it_can_be_read(tmp_path):
    path = tmp_path / "last-known.db"
    with late(path, [ALICE]) as (store, clock, read):
        store.forget(["alice"], clock())
        clock.now += 1
        store.learn(("username", "alice"), mailcloak.Answer((ALICE._replace(enabled=False),), clock()))
        read()
        assert not store.everybody()[ALICE.key].user.enabled
    assert not load(path, "mail")["alice"].user.enabled


def test_user_found_disabled_and_pushed_out_before_the_file_could_be_read_is_not_enabled_again(tmp_path):
    path = tmp_path / "last-known.db"
    others = [mailcloak.User(f"u{number}", f"u{number}@d1.test", True, user_id=f"id{number}") for number in range(3)]
    with late(path, [ALICE], max_entries=2) as (store, clock, read):
        for user in (ALICE._replace(enabled=False), *others):
            clock.now += 1
            store.learn(("username", user.username), mailcloak.Answer((user,), clock()))
        read()
        assert "alice" not in {person.user.username for person in store.everybody().values()}
    assert "alice" not in load(path, "mail")


def test_user_whose_username_was_found_to_be_anothers_before_the_file_could_be_read_is_in_doubt(tmp_path):
    gone, new = (mailcloak.User("xen", f"{name}@d1.test", True, user_id=f"id-{name}") for name in ("x", "y"))
    with late(tmp_path / "last-known.db", [gone]) as (store, clock, read):
        store.learn(("username", "xen"), mailcloak.Answer((new,), clock()))
        read()
        assert store.everybody()["id-x"].standing == mailcloak.DOUBTED
        assert [person.user for person in store.look(("username", "xen")).here] == [new]


@pytest.mark.parametrize("fault", ["deleted", "replaced", "copied over", "emptied"])
def test_file_that_was_deleted_or_replaced_is_written_again_from_memory(tmp_path, caplog, fault):
    path, clock = tmp_path / "last-known.db", Clock()
    save(path, "mail", [ALICE, BOB], clock)
    shutil.copy(path, tmp_path / "older")
    store = store_of(100)
    saved = mailcloak.SavedUsers(str(path), "mail", store, clock, clock)
    clock.now += 1
    store.learn(("username", "alice"), mailcloak.Answer((ALICE._replace(enabled=False),), clock()))
    saved.wait()
    if fault == "deleted":
        path.unlink()
    elif fault == "replaced":
        os.replace(tmp_path / "older", path)
    elif fault == "copied over":  # as by cp: it stays the same file
        path.write_bytes((tmp_path / "older").read_bytes())
    else:
        os.truncate(path, 0)
    store.learn(("username", "bob"), mailcloak.Answer((BOB,), clock()))
    saved.close()
    found = load(path, "mail")
    assert (set(found), found["alice"].user.enabled) == ({"alice", "bob"}, False)
    assert "last-known: written again from memory, it was deleted, replaced or changed" in caplog.text


def test_file_that_was_replaced_is_written_again_by_all_who_use_it(tmp_path):
    """After a reload with another base_url the users of both are saved in it for some seconds."""
    path, users = str(tmp_path / "last-known.db"), []
    for meaning in ("before", "now"):
        store = mailcloak.UserStore(mailcloak.PolicyConfig(domain=frozenset({"d1.test"})))
        users.append((store, mailcloak.SavedUsers(path, meaning, store)))
    for at, enabled in ((1, True), (2, False)):
        for store, saved in users:
            store.learn(("username", "alice"), mailcloak.Answer((mailcloak.User("alice", "alice@d1.test", enabled),), at))
            saved.wait(10)
        if enabled:
            shutil.copy(path, tmp_path / "older.db")
    os.replace(tmp_path / "older.db", path)
    for _, saved in users:
        saved.close(10)
    with contextlib.closing(sqlite3.connect(path)) as database:
        rows = database.execute("SELECT meaning, person FROM users").fetchall()
    assert {meaning: json.loads(person)["user"][2] for meaning, person in rows} == {"before": False, "now": False}


def test_saved_users_follow_a_link_that_is_led_elsewhere(tmp_path):
    """A new disk, while the path stays as it is written in the configuration."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("one")
    store = mailcloak.UserStore(mailcloak.PolicyConfig(domain=frozenset({"d1.test"})))
    path = str(tmp_path / "link" / "last-known.db")
    saved = mailcloak.SavedUsers(path, "mail", store)
    for name, enabled in (("one", True), ("two", False)):
        (tmp_path / "link").unlink()
        (tmp_path / "link").symlink_to(name)
        answer = mailcloak.Answer((mailcloak.User("alice", "alice@d1.test", enabled),), time.monotonic())
        store.learn(("username", "alice"), answer)
        saved.wait(10)
    saved.close(10)
    with contextlib.closing(sqlite3.connect(tmp_path / "two" / "last-known.db")) as database:
        ((row,),) = database.execute("SELECT person FROM users").fetchall()
    assert json.loads(row)["user"][2] is False


def test_on_a_disk_that_hangs_only_the_first_questions_wait(tmp_path, monkeypatch):
    """However many users an answer depends on: each refusal is to be on the disk first."""
    hangs, began, waits = threading.Event(), threading.Event(), []
    store = mailcloak.UserStore(mailcloak.PolicyConfig(domain=frozenset({"d1.test"})))
    saved = mailcloak.SavedUsers(str(tmp_path / "last-known.db"), "mail", store)
    monkeypatch.setattr(saved, "_save", lambda *_: (began.set(), hangs.wait(20)))
    store.learn(("username", "alice"), mailcloak.Answer((mailcloak.User("alice", "alice@d1.test", True),), time.monotonic()))
    assert began.wait(10)
    wait_for = saved._turn.wait_for
    monkeypatch.setattr(saved._turn, "wait_for", lambda test, timeout=None: (waits.append(timeout), wait_for(test, timeout))[1])
    for _ in range(5):
        saved.wait(0.2)
    hangs.set()
    saved.close(10)
    assert 0 < waits[0] <= 0.2
    assert waits[1:5] == [0.0] * 4


@pytest.mark.long
def test_what_is_learned_of_a_user_while_a_mistyped_realm_is_corrected_is_known(make_daemon, keycloak):
    daemon = short_daemon(make_daemon, keycloak, keycloak_failure_mode="dunno")
    daemon.config["keycloak"]["timeout_seconds"] = 8
    daemon.start()
    assert daemon.ask(**OWN) == "DUNNO"
    time.sleep(SHORT["cache_ttl_seconds"])
    keycloak.user("alice")["enabled"], keycloak.latency_seconds = False, 2
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(daemon.ask, **OWN)
        time.sleep(0.3)
        for realm in ("typo", "mail"):
            daemon.config["keycloak"]["realm"] = realm
            daemon.reload()
        assert answer.result(10) == NOT_OWNED
    keycloak.latency_seconds, keycloak.fault = 0, "close"
    assert daemon.ask(**OWN) in (NOT_OWNED, DEFER)
    assert "the disk is slow" not in daemon.log()


def test_users_without_room_at_the_start_do_not_come_back(tmp_path):
    path, clock = tmp_path / "last-known.db", Clock()
    users = [mailcloak.User(f"u{number}", f"u{number}@d1.test", True, user_id=f"id{number}") for number in range(10)]
    save(path, "mail", users, clock)
    saved = mailcloak.SavedUsers(str(path), "mail", store_of(3), clock, clock)
    saved.wait()
    saved.close()
    assert len(load(path, "mail")) == 3


def test_damaged_file_that_cannot_be_removed_is_one_line(tmp_path, caplog, monkeypatch):
    path = tmp_path / "last-known.db"
    path.write_bytes(b"no database" * 1000)

    def refuse(_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(mailcloak.os, "unlink", refuse)
    saved = mailcloak.SavedUsers(str(path), "mail", store_of(10))
    time.sleep(2.5)
    assert len([record for record in caplog.records if "and it cannot be removed" in record.message]) == 1
    assert "begun again" not in caplog.text
    monkeypatch.undo()
    saved.close()


@pytest.mark.real("root")
def test_file_of_another_user_is_said_to_be_that(short_dir, caplog):
    shutil.chown(short_dir, "nobody")
    path = short_dir / "last-known.db"
    path.touch()
    path.chmod(0o666)

    def begin():
        mailcloak.SavedUsers(str(path), "mail", store_of(10)).close()
        return caplog.text

    assert 'reason="its mode cannot be set to 0600: let it belong to the user that runs mailcloak"' in as_nobody(begin)
    shutil.chown(path, "nobody")
    assert as_nobody(begin) == ""


def test_only_what_is_news_of_a_user_is_waited_for(tmp_path):
    """A refusal that is on the disk already costs no second write, though the time of the look goes there too."""
    path, clock = tmp_path / "last-known.db", Clock()
    save(path, "mail", [BOB], clock)
    store = store_of(100)
    saved = mailcloak.SavedUsers(str(path), "mail", store, clock, clock)

    def learn(user):
        clock.now += 10
        known, _ = store.learn(("username", "bob"), mailcloak.Answer((user,), clock()))
        return known.people

    disabled = BOB._replace(enabled=False)
    learn(disabled)
    saved.wait()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        assert not saved.is_behind(learn(disabled))
        assert saved.is_behind(learn(BOB))
        assert saved.is_behind(learn(disabled))
        assert saved.is_behind(learn(disabled))
        database.execute("ROLLBACK")
    wait_until(lambda: not saved.is_behind(learn(disabled)), what="the disk")
    saved.close()
    assert load(path, "mail")["bob"].user == disabled


def saved_row(**more):
    row = {"user": list(BOB), "standing": "known", "asked_at": 1, "confirmed_at": 1, "doubted_seconds": 0, "former": []}
    return json.dumps({**row, "unnamed_at": None, "shares_email": False, **more})


@pytest.mark.parametrize(
    "row",
    [
        "",
        "garbage",
        "[]",
        "{}",
        "[" * 100_000,
        '{"user": ["a", "", true, false, "", ""], "standing": "known"}',
        '{"user": ["", "", true, false, "", ""], "standing": "known", "asked_at": 1, "confirmed_at": 1, "doubted_seconds": 0,'
        ' "former": [], "unnamed_at": null, "shares_email": false}',
        '{"user": ["a", "", "yes", false, "", ""], "standing": "known", "asked_at": 1, "confirmed_at": 1, "doubted_seconds": 0,'
        ' "former": [], "unnamed_at": null, "shares_email": false}',
        '{"user": ["a", "", true, false, "", ""], "standing": "immortal", "asked_at": 1, "confirmed_at": 1, "doubted_seconds": 0,'
        ' "former": [], "unnamed_at": null, "shares_email": false}',
        '{"user": ["a", "", true, false, "", ""], "standing": "known", "asked_at": NaN, "confirmed_at": 1, "doubted_seconds": 0,'
        ' "former": [], "unnamed_at": null, "shares_email": false}',
        b"\xff\xfe",
        saved_row(asked_at=10**400),
        saved_row(doubted_seconds=math.inf, standing="doubted"),
        saved_row(doubted_seconds=math.nan, standing="doubted"),
        saved_row(former=[["username", "bob"]]),
        saved_row(former=[["email", "b@d1.test"], ["email", "b@d1.test"]]),
        saved_row(former=[["standing", "bob"]]),
    ],
    ids=[
        "empty", "garbage", "list", "nothing", "deep", "short", "nameless", "types", "standing", "nan", "blob", "huge-number",
        "grace-for-ever", "grace-is-nan", "name-is-former-too", "former-name-twice", "former-name-of-no-kind",
    ],
)  # fmt: skip
def test_row_that_makes_no_sense_is_a_warning_and_the_others_serve(tmp_path, caplog, row):
    path = tmp_path / "last-known.db"
    save(path, "mail", [ALICE])
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("INSERT INTO users VALUES ('mail', '\"odd\"', ?)", (row,))
    assert set(load(path, "mail")) == {"alice"}
    assert [record.message for record in caplog.records] == [f"last-known: a row that makes no sense is left alone path={path}"]
    assert set(load(path, "mail")) == {"alice"}  # the file was not begun again


def test_row_that_is_not_utf8_is_a_warning_and_the_others_serve(tmp_path, caplog):
    path = tmp_path / "last-known.db"
    save(path, "mail", [ALICE])
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("INSERT INTO users VALUES ('mail', '\"odd\"', CAST(X'FF7B7D' AS TEXT))")
    assert set(load(path, "mail")) == {"alice"}
    assert [record.message for record in caplog.records] == [f"last-known: a row that makes no sense is left alone path={path}"]


def test_no_saved_time_is_later_than_now(tmp_path):
    """A clock that was wrong for a while makes nobody serve for ever."""
    path, clock = tmp_path / "last-known.db", Clock()
    clock.now += 1e8
    save(path, "mail", [ALICE], clock)
    clock.now -= 1e8
    person = load(path, "mail", clock)["alice"]
    assert person.asked_at == person.confirmed_at == clock()


@pytest.mark.parametrize("moment", ["at-start", "while-running"])
def test_locked_file_keeps_what_is_in_it(tmp_path, caplog, monkeypatch, moment):
    monkeypatch.setattr(mailcloak, "DATABASE_BUSY_SECONDS", 0.05)
    monkeypatch.setattr(mailcloak, "SAVE_RETRY_SECONDS", 0.05)
    path, clock = tmp_path / "last-known.db", Clock()
    save(path, "mail", [ALICE], clock)
    store = store_of(100)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        if moment == "at-start":
            other.execute("BEGIN EXCLUSIVE")
        saved = mailcloak.SavedUsers(str(path), "mail", store, clock, clock)
        if moment == "while-running":
            other.execute("BEGIN EXCLUSIVE")
        store.learn(("username", "bob"), mailcloak.Answer((BOB,), clock()))
        saved.wait(0.2)
        time.sleep(0.3)
        other.execute("ROLLBACK")
    wait_until(lambda: "last-known: written again" in caplog.text)
    if moment == "at-start":
        wait_until(lambda: "alice" in store.everybody(), what="those of the file are known when it can be read")
    saved.close()
    assert caplog.text.count("last-known: cannot be used, tried again until it can") == 1
    assert "begun again" not in caplog.text
    assert set(load(path, "mail")) == {"alice", "bob"}


def test_full_disk_keeps_what_is_in_the_file(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(mailcloak, "SAVE_RETRY_SECONDS", 0.05)
    path, clock = tmp_path / "last-known.db", Clock()
    save(path, "mail", [ALICE], clock)
    store = store_of(100)
    saved, connect, full = mailcloak.SavedUsers(str(path), "mail", store, clock, clock), mailcloak.connect_database, [True]

    def connect_to_a_full_disk(*arguments):
        connection = connect(*arguments)
        if full[0]:
            connection.execute("PRAGMA max_page_count = 1")
        return connection

    monkeypatch.setattr(mailcloak, "connect_database", connect_to_a_full_disk)
    users = [mailcloak.User(f"u{number}" * 40, f"u{number}@d1.test", True) for number in range(40)]
    for user in users:
        store.learn(("username", user.username), mailcloak.Answer((user,), clock()))
    wait_until(lambda: "cannot be used, tried again until it can" in caplog.text)
    assert "alice" in load(path, "mail")
    full[0] = False
    wait_until(lambda: "last-known: written again" in caplog.text)
    saved.close()
    assert set(load(path, "mail")) == {"alice", *(user.username for user in users)}
    assert "begun again" not in caplog.text


def test_file_damaged_while_the_daemon_runs_is_begun_again_from_memory(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(mailcloak, "SAVE_RETRY_SECONDS", 0.05)
    path, clock = tmp_path / "last-known.db", Clock()
    save(path, "mail", [ALICE], clock)
    store = store_of(100)
    saved = mailcloak.SavedUsers(str(path), "mail", store, clock, clock)
    path.write_bytes(b"garbage" * 3000)
    store.learn(("username", "bob"), mailcloak.Answer((BOB,), clock()))
    wait_until(lambda: "last-known: written again" in caplog.text)
    saved.close()
    assert "last-known: begun again from memory" in caplog.text
    assert set(load(path, "mail")) == {"alice", "bob"}


def test_loss_of_a_right_is_on_the_disk_before_the_answer(tmp_path):
    path, clock = tmp_path / "last-known.db", Clock()
    store = store_of(100)
    saved = mailcloak.SavedUsers(str(path), "mail", store, clock, clock)
    for users, directory, _ in make_plain(saved, store, clock, disappearance_grace_seconds=0):
        assert users.find_login("alice").state == "enabled"
        clock.now += 200
        directory.users = [ALICE_DISABLED]
        assert users.find_login("alice").state == "disabled"
        with contextlib.closing(sqlite3.connect(path)) as database:  # not closed, not waited for
            (row,) = database.execute("SELECT person FROM users").fetchone()
        assert json.loads(row)["user"][2] is False
    saved.close()


@pytest.mark.parametrize("down", [False, True], ids=["keycloak-answers", "outage"])
def test_loss_that_another_thread_learnt_is_on_the_disk_before_the_answer(tmp_path, monkeypatch, down):
    """Of two who ask the same at once, one takes in the answer; the refusal of the other must hold after a crash as well."""
    path, clock = tmp_path / "last-known.db", Clock()
    store = store_of(100)
    saved = mailcloak.SavedUsers(str(path), "mail", store, clock, clock)
    for users, directory, _ in make_plain(saved, store, clock, disappearance_grace_seconds=0):
        assert users.find_login("alice").state == "enabled"
        saved.wait()
        monkeypatch.setattr(saved, "_save", lambda *arguments, now=saved._save: time.sleep(0.3) or now(*arguments))
        clock.now += 200
        directory.users = [ALICE_DISABLED]
        store.learn(("username", "alice"), directory.find_users(("username", "alice"), 0))
        directory.down = down
        assert users.find_login("alice").state == "disabled"
        with contextlib.closing(sqlite3.connect(path)) as database:
            (row,) = database.execute("SELECT person FROM users").fetchone()
        assert json.loads(row)["user"][2] is False
    saved.close()


def test_saved_user_older_than_the_limit_does_not_serve_after_a_restart(make_daemon, keycloak):
    daemon = short_daemon(make_daemon, keycloak).start()
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"
    daemon.stop()
    keycloak.stop()
    with contextlib.closing(sqlite3.connect(daemon.database.parent / "last-known.db")) as database, database:
        (row,) = database.execute("SELECT person FROM users").fetchone()
        person = json.loads(row)
        person["confirmed_at"] -= 86400
        database.execute("UPDATE users SET person = ?", (json.dumps(person),))
    daemon.start()
    assert daemon.ask(recipient="alice@d1.test") == DEFER


# ---- under attack


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_dictionary_attack_evicts_no_known_user_and_costs_little_memory(make_daemon, keycloak):
    for number in range(100):
        keycloak.add_user(f"known{number}", f"known{number}@d1.test")
    daemon = make_daemon(keycloak=keycloak.config(), level="info", policy={"cache_ttl_seconds": 1000}).start()
    client = daemon.policy()
    for number in range(100):
        assert client.ask(recipient=f"known{number}@d1.test") == "DUNNO"

    def resident_kib():
        with open(f"/proc/{daemon.process.pid}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

    before, asked = resident_kib(), len(keycloak.searches)
    keycloak.requests = Counter()  # a hundred thousand queries would be the test's own memory

    def attack(worker):
        with contextlib.closing(daemon.policy(timeout=60)) as connection:
            for number in range(worker, 100_000, 8):
                assert connection.ask(recipient=f"guess{number}@d1.test") == REJECT

    threads = [threading.Thread(target=attack, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert resident_kib() - before < 30 * 1024
    keycloak.requests = []
    for number in range(100):
        assert client.ask(recipient=f"known{number}@d1.test") == "DUNNO"
    assert (keycloak.searches, asked) == ([], 100)


class Counter(list):
    """A list that forgets what is put into it."""

    def append(self, _):
        pass
