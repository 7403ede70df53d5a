"""Keycloak down, hanging or slow: kept answers, the circuit breaker, refresh ahead, and what outlives a restart."""

from __future__ import annotations

import contextlib
import sqlite3
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import Clock, wait_until
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


class PlainDirectory:
    """Users that are values; down makes every question fail."""

    def __init__(self):
        self.outage = mailcloak.Outage()
        self.users = [mailcloak.User("alice", "alice@d1.test", True)]
        self.down = False
        self.asked = []

    def find_users(self, attribute, value, deadline):
        self.asked.append((attribute, value))
        if self.down:
            raise mailcloak.DirectoryUnavailable("down")
        return tuple(user for user in self.users if getattr(user, attribute) == value)

    def close(self):
        pass


@pytest.fixture
def plain():
    """(directory behind the cache, what it asks, its clock)."""
    yield from make_plain(disappearance_grace_seconds=0)


@pytest.fixture
def graceful():
    """The same with a grace of 3600 seconds, of which bob has been confirmed as well."""
    for cached, directory, clock in make_plain():
        directory.users.append(mailcloak.User("bob", "bob@d1.test", True))
        yield cached, directory, clock


def make_plain(**policy):
    directory, clock = PlainDirectory(), Clock()
    policy = mailcloak.read_block(
        mailcloak.PolicyConfig, "policy", {"domain": "d1.test", "stale_if_error_seconds": 1000, **policy}, []
    )
    cached = mailcloak.CachedDirectory(directory, policy, 1.0, clock=clock)
    yield cached, directory, clock
    cached.close()


def short_daemon(make_daemon, keycloak, **policy):
    keycloak.add_user("alice", "alice@d1.test")
    keycloak.add_user("bob", "bob@d1.test")
    return make_daemon(keycloak=keycloak.config(timeout_seconds=1), policy={**SHORT, **policy})


# ---- kept answers


def test_positive_answer_serves_in_an_outage_until_its_limit(plain):
    cached, directory, clock = plain
    assert cached.find_holders("alice@d1.test", 0) == tuple(directory.users)
    assert cached.find_login("alice", 0).state == "enabled"
    directory.down = True
    clock.now += 999
    assert cached.find_holders("alice@d1.test", 0) == tuple(directory.users)
    assert cached.find_login("alice", 0).state == "enabled"
    clock.now += 2
    with pytest.raises(mailcloak.DirectoryUnavailable):
        cached.find_holders("alice@d1.test", 0)
    with pytest.raises(mailcloak.DirectoryUnavailable):
        cached.find_login("alice", 0)


def test_negative_answer_is_never_kept(plain):
    cached, directory, clock = plain
    assert cached.find_holders("stranger@d1.test", 0) == ()
    directory.down = True
    clock.now += 11
    with pytest.raises(mailcloak.DirectoryUnavailable):
        cached.find_holders("stranger@d1.test", 0)


def test_user_who_came_back_after_an_outage_is_asked_for_anew(plain):
    cached, directory, clock = plain
    cached.find_holders("alice@d1.test", 0)
    directory.down = True
    clock.now += 500
    cached.find_holders("alice@d1.test", 0)
    directory.down, directory.users = False, []
    assert cached.find_holders("alice@d1.test", 0) == ()


def test_user_found_disabled_loses_every_kept_login(plain):
    cached, directory, clock = plain
    for name in ("alice", "alice@d1.test"):
        assert cached.find_login(name, 0).state == "enabled"
    directory.users = [mailcloak.User("alice", "alice@d1.test", False)]
    clock.now += 200
    assert cached.find_login("alice", 0).state == "disabled"
    directory.down = True
    with pytest.raises(mailcloak.DirectoryUnavailable):
        cached.find_login("alice@d1.test", 0)


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
    cached.find_holders("alice@d1.test", 0)
    clock.now += 95
    cached.find_holders("alice@d1.test", 0)
    assert len(directory.asked) == 1
    clock.now += 10
    cached.find_holders("alice@d1.test", 0)
    wait_until(lambda: len(directory.asked) == 2)
    clock.now += 100  # past the first answer's end
    cached.find_holders("alice@d1.test", 0)
    wait_until(lambda: cached._refreshes.empty())
    assert len(directory.asked) == 3  # in the last fifth of the second: renewed again, waited for by nobody


def test_renewal_that_fails_leaves_the_answer(plain):
    cached, directory, clock = plain
    cached.find_holders("alice@d1.test", 0)
    directory.down = True
    clock.now += 110
    assert cached.find_holders("alice@d1.test", 0)
    wait_until(lambda: len(directory.asked) == 2)
    clock.now += 5
    assert cached.find_holders("alice@d1.test", 0)


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


def test_single_failure_is_no_outage(plain, caplog):
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


def known(daemon):
    with contextlib.closing(sqlite3.connect(daemon.database.parent / "last-known.db")) as database:
        return set(database.execute("SELECT kind, name FROM known").fetchall())


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
            wait_until(lambda: len(known(daemon)) == 2)
            daemon.process.kill()
            daemon.process.wait()
        daemon.start()
        assert (daemon.ask(recipient="alice@d1.test"), daemon.ask(**OWN)) == ("DUNNO", "DUNNO")
        assert daemon.ask(recipient="bob@d1.test") == DEFER
        assert daemon.ask(recipient="stranger@d1.test") == DEFER
    assert known(daemon) == {("holders", "alice@d1.test"), ("login", "alice")}


def test_known_positive_is_asked_for_anew_after_a_restart_when_keycloak_answers(make_daemon, keycloak):
    daemon = short_daemon(make_daemon, keycloak, cache_ttl_seconds=1000).start()
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"
    daemon.stop()
    keycloak.users.remove(keycloak.user("alice"))
    daemon.start()
    assert daemon.ask(recipient="alice@d1.test") == REJECT


def test_user_who_lost_the_right_to_send_does_not_get_it_back_by_outage_or_restart(make_daemon, keycloak):
    daemon = short_daemon(make_daemon, keycloak).start()
    assert (daemon.ask(**OWN), daemon.ask(**OWN_BY_EMAIL)) == ("DUNNO", "DUNNO")
    keycloak.user("alice")["enabled"] = False
    wait_until(lambda: daemon.ask(**OWN) == NOT_OWNED)
    keycloak.stop()
    daemon.process.kill()  # at once after the answer
    daemon.process.wait()
    daemon.start()
    assert (daemon.ask(**OWN), daemon.ask(**OWN_BY_EMAIL)) == (DEFER, DEFER)


def test_reload_drops_remembered_answers_but_not_the_known_positives(make_daemon, keycloak):
    daemon = short_daemon(make_daemon, keycloak, cache_ttl_seconds=1000).start()
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"
    asked = len(keycloak.searches)
    daemon.reload()
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"
    assert len(keycloak.searches) == asked + 1
    daemon.reload()
    keycloak.stop()
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"


def test_file_of_known_positives_is_the_daemons_alone(make_daemon, keycloak):
    daemon = short_daemon(make_daemon, keycloak).start()
    daemon.ask(recipient="alice@d1.test")
    wait_until(lambda: known(daemon))
    assert stat.S_IMODE((daemon.database.parent / "last-known.db").stat().st_mode) == 0o600


@pytest.mark.parametrize("fault", ["garbage", "truncated", "gone", "directory"])
def test_broken_file_of_known_positives_costs_the_memory_and_a_warning(make_daemon, keycloak, fault):
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
    if fault != "gone":
        daemon.wait_for_log("warning last-known: begun anew")
    if fault != "directory":
        wait_until(lambda: ("holders", "alice@d1.test") in known(daemon))
    assert "Traceback" not in daemon.log()


def test_known_positives_of_another_realm_are_wiped(tmp_path):
    path = str(tmp_path / "last-known.db")
    first = mailcloak.LastKnown(path, "https://sso.test mail", 10)
    first.remember(("login", "alice"), ["alice"], "alice", 1.0)
    assert first.load() == [("login", "alice", "alice", 1.0, None, None)]
    first.close()
    assert mailcloak.LastKnown(path, "https://sso.test mail", 10).load() == [("login", "alice", "alice", 1.0, None, None)]
    assert mailcloak.LastKnown(path, "https://sso.test other", 10).load() == []


def test_known_positives_are_bounded_and_the_oldest_go_first(tmp_path):
    last_known = mailcloak.LastKnown(str(tmp_path / "last-known.db"), "x", 10)
    for number in range(25):
        last_known.remember(("login", f"u{number}"), [f"u{number}"], f"u{number}", float(number))
    assert sorted(row[3] for row in last_known.load()) == [float(number) for number in range(15, 25)]
    last_known.close()


def test_known_positive_older_than_the_limit_does_not_serve_after_a_restart(make_daemon, keycloak):
    daemon = short_daemon(make_daemon, keycloak).start()
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"
    daemon.stop()
    keycloak.stop()
    with contextlib.closing(sqlite3.connect(daemon.database.parent / "last-known.db")) as database, database:
        database.execute("UPDATE known SET confirmed_at = confirmed_at - 86400")
    daemon.start()
    assert daemon.ask(recipient="alice@d1.test") == DEFER


# ---- under attack


@pytest.mark.long
@pytest.mark.timeout(300)
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
