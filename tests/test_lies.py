"""Keycloak says 200 and lies: disappearance grace, canaries, lockouts."""

from __future__ import annotations

import time

import pytest
from conftest import wait_until
from test_outages import ALICE_DISABLED, DEFER, NOT_OWNED, OWN, OWN_BY_EMAIL, REJECT, SHORT, make_plain

import mailcloak

BOB = mailcloak.User("bob", "bob@d1.test", True)
ALICE_DISABLED_BY_LDAP = ALICE_DISABLED._replace(federation="ldap")


@pytest.fixture
def plain():
    """(directory behind the store of users, what it asks, its clock), with alice known, looks of 100 s and a grace of an hour."""
    for cached, directory, clock in make_plain(stale_if_error_seconds=100_000, negative_cache_ttl_seconds=100):
        directory.users.append(BOB)
        assert cached.find_holders("alice@d1.test")
        assert cached.find_login("alice").state == "enabled"
        yield cached, directory, clock


def ask_both(cached):
    """What the recipient check and the login of alice come to: "there", "gone" or "deferred"."""
    answers = []
    for ask, name in ((cached.find_holders, "alice@d1.test"), (cached.find_login, "alice")):
        try:
            answer = ask(name)
        except mailcloak.Disappeared:
            answers.append("deferred")
        else:
            there = answer.state == "enabled" if isinstance(answer, mailcloak.Login) else any(user.enabled for user in answer)
            answers.append("there" if there else "gone")
    return tuple(answers)


def pass_time(cached, clock, seconds, confirming):
    """So many seconds in steps of 200, with bob confirmed in each if that is said."""
    for _ in range(0, seconds, 200):
        clock.now += 200
        if confirming:
            cached.find_holders("bob@d1.test")
        yield ask_both(cached)


# ---- disappearance grace


@pytest.mark.parametrize(
    "users", [[BOB], [BOB._replace(federation="ldap"), ALICE_DISABLED_BY_LDAP]], ids=["missing", "disabled-by-ldap"]
)
def test_user_who_disappears_is_deferred_for_the_grace_and_then_believed_with_a_warning(plain, users, caplog):
    cached, directory, clock = plain
    directory.users = users
    answers = list(pass_time(cached, clock, 3600, confirming=True))
    assert set(answers) == {("deferred", "deferred")}
    assert list(pass_time(cached, clock, 600, confirming=True))[-1] == ("gone", "gone")
    assert sum("believed from now on" in record.message for record in caplog.records) == 1


def test_grace_is_one_for_all_questions_about_a_user(plain):
    """Who asks often, or by several names, does not make it pass faster."""
    cached, directory, clock = plain
    directory.users = [BOB]
    clock.now += 200
    for _ in range(350):
        clock.now += 10
        cached.find_holders("bob@d1.test")
        assert ask_both(cached) == ("deferred", "deferred")
    assert list(pass_time(cached, clock, 3600, confirming=True))[-1] == ("gone", "gone")


def test_time_in_which_nobody_looks_counts_as_two_lives(plain):
    """Two short lies that are far apart are not one long absence."""
    cached, directory, clock = plain
    users, directory.users = directory.users, [BOB]
    for _ in range(10):
        clock.now += 100_000
        cached.find_holders("bob@d1.test")
        assert ask_both(cached) == ("deferred", "deferred")
    directory.users = users
    clock.now += 200
    assert ask_both(cached) == ("there", "there")


def test_only_users_of_the_same_federation_make_the_grace_pass(plain):
    cached, directory, clock = plain
    directory.users = [BOB, mailcloak.User("carol", "carol@d1.test", True, federation="ldap")]
    assert cached.find_holders("carol@d1.test")
    directory.users = [BOB]

    def ask():
        try:
            return "there" if cached.find_holders("carol@d1.test") else "gone"
        except mailcloak.Disappeared:
            return "deferred"

    for _ in range(200):
        clock.now += 200
        assert cached.find_holders("bob@d1.test")  # a local user: LDAP is down
        assert ask() == "deferred"
    directory.users = [BOB, mailcloak.User("dora", "dora@d1.test", True, federation="ldap")]
    for _ in range(20):
        clock.now += 200
        assert cached.find_holders("dora@d1.test")
        answer = ask()
    assert answer == "gone"


def test_user_disabled_in_keycloak_itself_is_believed_at_once(plain, caplog):
    cached, directory, clock = plain
    directory.users = [BOB]
    clock.now += 200
    assert ask_both(cached) == ("deferred", "deferred")
    directory.users = [BOB, ALICE_DISABLED]
    clock.now += 200
    assert ask_both(cached) == ("gone", "gone")
    assert "believed from now on" not in caplog.text  # that is of the grace, which did not pass


def test_realm_that_lies_about_everybody_never_runs_the_grace_out(plain):
    cached, directory, clock = plain
    directory.users = []
    assert set(pass_time(cached, clock, 40_000, confirming=False)) == {("deferred", "deferred")}


def test_time_in_which_nobody_else_is_confirmed_does_not_count(plain):
    cached, directory, clock = plain
    directory.users = [BOB]
    assert set(pass_time(cached, clock, 3000, confirming=True)) == {("deferred", "deferred")}
    assert set(pass_time(cached, clock, 10_000, confirming=False)) == {("deferred", "deferred")}
    assert list(pass_time(cached, clock, 1200, confirming=True))[-1] == ("gone", "gone")


def test_address_that_its_user_has_given_up_is_free_at_once(plain):
    """Keycloak itself shows the user with another one: that is no sign of a fault."""
    cached, directory, clock = plain
    directory.users = [BOB, mailcloak.User("alice", "new@d1.test", True)]
    clock.now += 200
    assert cached.find_login("alice").state == "enabled"
    assert cached.find_holders("new@d1.test")
    assert cached.find_holders("alice@d1.test") == ()
    directory.users.append(mailcloak.User("carol", "alice@d1.test", True))
    clock.now += 200
    assert [user.username for user in cached.find_holders("alice@d1.test")] == ["carol"]
    assert [user.username for user in cached.find_holders("new@d1.test")] == ["alice"]


def test_user_who_was_seen_long_ago_is_not_refused_at_once(plain):
    """However long ago that was: only the memory of the answer ends."""
    cached, directory, clock = plain
    clock.now += 10 * 365 * 86400
    directory.users = [BOB]
    cached.find_holders("bob@d1.test")
    assert ask_both(cached) == ("deferred", "deferred")


def test_user_who_is_back_within_the_grace_is_there_at_once(plain):
    cached, directory, clock = plain
    users, directory.users = directory.users, [BOB]
    assert set(pass_time(cached, clock, 2000, confirming=True)) == {("deferred", "deferred")}
    directory.users = users
    clock.now += 101
    assert ask_both(cached) == ("there", "there")
    directory.users = [BOB]
    clock.now += 200
    assert ask_both(cached) == ("deferred", "deferred")


def test_user_who_disappeared_stays_deferred_in_an_outage(plain):
    cached, directory, clock = plain
    assert cached.find_login("alice@d1.test").state == "enabled"
    directory.users = [BOB]
    clock.now += 200
    assert ask_both(cached) == ("deferred", "deferred")
    directory.down = True
    clock.now += 200
    assert ask_both(cached) == ("deferred", "deferred")
    with pytest.raises(mailcloak.Disappeared):
        cached.find_login("alice@d1.test")


@pytest.mark.parametrize("mode", ["tempfail", "dunno-recipients", "dunno"])
@pytest.mark.parametrize("lie", ["missing", "disabled-by-ldap"])
def test_user_in_the_grace_is_deferred_in_every_failure_mode(make_daemon, keycloak, mode, lie):
    for name in ("alice", "bob"):
        keycloak.add_user(name, f"{name}@d1.test", federationLink="ldap")
    policy = {**SHORT, "disappearance_grace_seconds": 3600, "keycloak_failure_mode": mode}
    daemon = make_daemon(keycloak=keycloak.config(), policy=policy).start()
    daemon.ctl("aliases", "add", "info@d1.test", "alice")
    asked = [
        {"recipient": "alice@d1.test"},
        OWN,
        OWN_BY_EMAIL,
        {**OWN, "sender": ""},
        {**OWN, "sender": "info@d1.test"},
    ]
    assert [daemon.ask(**each) for each in asked] == ["DUNNO"] * 5
    if lie == "missing":
        keycloak.users.remove(keycloak.user("alice"))
    else:
        keycloak.user("alice")["enabled"] = False
    time.sleep(0.3)
    assert daemon.ask(recipient="alice+x@d1.test") == DEFER
    for outage in (False, True):
        if outage:
            keycloak.stop()
        assert [daemon.ask(**each) for each in asked] == [DEFER] * 5
        assert daemon.ask(recipient="info@d1.test") == "DUNNO"  # an alias is one while its user is in the grace
    lines = [line for line in daemon.log().splitlines() if "elapsed_ms" in line]
    assert sum("reason=in-grace" in line for line in lines) == 11


@pytest.mark.long
def test_start_of_the_grace_outlives_a_restart(make_daemon, keycloak):
    for name in ("alice", "bob"):
        keycloak.add_user(name, f"{name}@d1.test")
    policy = {**SHORT, "negative_cache_ttl_seconds": 0.2, "disappearance_grace_seconds": 8}
    daemon = make_daemon(keycloak=keycloak.config(), policy=policy).start()
    assert (daemon.ask(recipient="alice@d1.test"), daemon.ask(**OWN), daemon.ask(**OWN_BY_EMAIL)) == ("DUNNO",) * 3
    keycloak.users.remove(keycloak.user("alice"))
    started = time.monotonic()

    def ask():
        assert daemon.ask(recipient="bob@d1.test") == "DUNNO"
        return daemon.ask(recipient="alice@d1.test")

    wait_until(lambda: ask() == DEFER)
    while time.monotonic() - started < 4:
        assert ask() == DEFER
    assert daemon.ask(**OWN) == DEFER
    daemon.process.kill()
    daemon.process.wait()
    daemon.start()
    assert ask() == DEFER
    restarted = time.monotonic()
    wait_until(lambda: ask() == REJECT)
    assert time.monotonic() - restarted < 7  # of the eight seconds four had passed
    daemon.wait_for_log("believed from now on")


def test_user_locked_out_loses_every_login_and_still_receives(plain):
    cached, directory, clock = plain
    assert cached.find_login("alice@d1.test").state == "enabled"
    directory.users = [BOB, mailcloak.User("alice", "alice@d1.test", False, locked_out=True)]
    clock.now += 200
    assert cached.find_holders("alice@d1.test")
    for down in (False, True):
        directory.down = down
        assert cached.find_holders("alice@d1.test")
        for name in ("alice", "alice@d1.test"):
            assert cached.find_login(name).state == "disabled"


# ---- canaries


@pytest.fixture
def canary_daemon(make_daemon, keycloak):
    """A daemon with two canaries; alice and bob are there."""
    for name in ("alice", "bob", "canary1", "canary2"):
        keycloak.add_user(name, f"{name}@d1.test")
    canary = ["canary1@d1.test", "canary2@d1.test"]
    return make_daemon(keycloak=keycloak.config(canary=canary), policy={**SHORT, "disappearance_grace_seconds": 0}).start()


def canary_searches(keycloak):
    return [query["email"] for query in keycloak.searches if query.get("email", "").startswith("canary")]


def test_negative_answer_is_believed_after_the_canaries_have_answered(canary_daemon, keycloak):
    wait_until(lambda: ("profile", {}) in keycloak.requests)
    keycloak.forget_requests()
    assert canary_daemon.ask(recipient="alice@d1.test") == "DUNNO"
    assert canary_searches(keycloak) == []
    for number in range(3):
        assert canary_daemon.ask(recipient=f"u{number}@d1.test") == REJECT
    emails = [query["email"] for query in keycloak.searches[1:]]
    assert emails == [
        email for number in range(3) for email in (f"u{number}@d1.test", "canary1@d1.test", "canary2@d1.test", f"u{number}@d1.test")
    ]


def test_user_who_is_just_being_imported_is_found_by_asking_again(canary_daemon, keycloak):
    keycloak.add_user("newcomer", "newcomer@d1.test")
    original, asked = keycloak.search, []
    keycloak.search = lambda query: (
        asked.append(query) or (original(query) if "newcomer" not in str(query) or len(asked) > 1 else [])
    )
    assert canary_daemon.ask(recipient="newcomer@d1.test") == "DUNNO"


def test_user_called_disabled_by_a_storage_just_before_it_came_back_is_found_by_asking_again(canary_daemon, keycloak):
    keycloak.add_user("newcomer", "newcomer@d1.test", federationLink="ldap")
    original, asked = keycloak.search, []

    def search(query):
        if "newcomer" not in str(query):
            return original(query)
        asked.append(query)
        return [{**record, "enabled": len(asked) > 2} for record in original(query)]  # the first answer, and why it is so

    keycloak.search = search
    assert canary_daemon.ask(recipient="newcomer@d1.test") == "DUNNO"


@pytest.mark.parametrize("fault", ["missing", "disabled"])
def test_canary_that_is_missing_or_disabled_makes_it_an_outage(make_daemon, keycloak, fault):
    for name in ("alice", "canary1", "canary2"):
        keycloak.add_user(name, f"{name}@d1.test")
    if fault == "missing":
        keycloak.users.remove(keycloak.user("canary2"))
    else:
        keycloak.user("canary2")["enabled"] = False
    keycloak.user("alice").update(enabled=False, federationLink="ldap")
    daemon = make_daemon(keycloak=keycloak.config(canary=["canary1@d1.test", "canary2@d1.test"])).start()
    for recipient in ("alice@d1.test", "stranger@d1.test"):
        assert daemon.ask(recipient=recipient) == DEFER
    daemon.wait_for_log(r"canary <canary2@d1.test> is missing or disabled")
    keycloak.add_user("canary3", "canary2@d1.test")
    wait_until(lambda: daemon.ask(recipient="stranger@d1.test") == REJECT)
    assert daemon.ask(recipient="alice@d1.test") == REJECT


def test_canary_that_wrong_passwords_have_locked_out_is_there(make_daemon, keycloak):
    """Anybody can do that to a canary whose name is known."""
    keycloak.add_user("canary1", "canary1@d1.test", enabled=False, attributes={"disabledReason": ["permanentLockout"]})
    daemon = make_daemon(keycloak=keycloak.config(canary=["canary1@d1.test"], receive_when_locked_out=False)).start()
    assert daemon.ask(recipient="stranger@d1.test") == REJECT


@pytest.mark.parametrize("login", ["alice", "alice@d1.test"])
def test_user_disabled_in_keycloak_itself_sends_nothing_while_a_canary_is_missing(make_daemon, keycloak, login):
    """Keycloak shows the user: that needs no proof, and no outage takes it back."""
    for name in ("alice", "canary1"):
        keycloak.add_user(name, f"{name}@d1.test")
    policy = {"cache_ttl_seconds": 0.1, "negative_cache_ttl_seconds": 0.1, "keycloak_failure_mode": "dunno"}
    daemon = make_daemon(keycloak=keycloak.config(canary="canary1@d1.test"), policy=policy).start()
    asked = {"protocol_state": "MAIL", "sender": "alice@d1.test", "sasl_username": login, "sasl_method": "XOAUTH2"}
    assert daemon.ask(**asked) == "DUNNO"
    keycloak.users.remove(keycloak.user("canary1"))
    keycloak.user("alice")["enabled"] = False
    asked_by_name = {**asked, "sasl_username": "alice"}
    wait_until(lambda: daemon.ask(**asked_by_name).startswith("553"), what="the refusal")
    assert daemon.ask(**asked)[:3] in ("553", "451")
    daemon.process.kill()
    daemon.process.wait()
    keycloak.fault = "close"
    daemon.start()
    assert daemon.ask(**asked_by_name).startswith("553")


@pytest.mark.long
@pytest.mark.parametrize("lie", ["disabled", "missing"])
def test_user_of_a_storage_that_does_not_import_is_in_the_grace_while_the_storage_lies(make_daemon, keycloak, lie):
    """Such a user has no federationLink; the id names the storage."""
    for name in ("bob", "carol"):
        keycloak.add_user(name, f"{name}@d1.test", id=f"f:ldap-1:{name}")
    keycloak.add_user("alice", "alice@d1.test")
    daemon = make_daemon(keycloak=keycloak.config(), policy={**SHORT, "disappearance_grace_seconds": 1}).start()
    assert daemon.ask(recipient="bob@d1.test") == "DUNNO"
    if lie == "disabled":
        for name in ("bob", "carol"):
            keycloak.user(name)["enabled"] = False
    else:
        keycloak.users = [keycloak.user("alice")]
    end = time.monotonic() + 3
    while time.monotonic() < end:  # that others are confirmed says nothing of this storage
        assert daemon.ask(recipient="alice@d1.test") == "DUNNO"
        assert daemon.ask(recipient="bob@d1.test") in ("DUNNO", DEFER)
        time.sleep(0.1)
    assert daemon.ask(recipient="bob@d1.test") == DEFER


@pytest.mark.parametrize("other", [{"emailVerified": False}, {"enabled": False}], ids=["unverified", "disabled"])
def test_sharer_of_an_address_does_not_show_that_nobody_has_it_while_a_canary_is_missing(make_daemon, keycloak, other):
    for name in ("bob", "canary1"):
        keycloak.add_user(name, f"{name}@d1.test", emailVerified=True, federationLink="ldap")
    keycloak.add_user("zoe", "bob@d1.test", **{"emailVerified": True, **other})
    keycloak_block = keycloak.config(canary="canary1@d1.test", require_verified_email=True)
    daemon = make_daemon(keycloak=keycloak_block, policy={**SHORT, "disappearance_grace_seconds": 0}).start()
    everybody, keycloak.users = keycloak.users, [keycloak.user("zoe")]
    assert daemon.ask(recipient="bob@d1.test") == DEFER
    keycloak.users = everybody
    wait_until(lambda: daemon.ask(recipient="bob@d1.test") == "DUNNO")


def test_storage_that_goes_down_later_rejects_nobody(canary_daemon, keycloak):
    assert canary_daemon.ask(recipient="stranger@d1.test") == REJECT
    users, keycloak.users = keycloak.users, keycloak.users[:1]
    for recipient in ("alice@d1.test", "bob@d1.test", "other@d1.test") * 5:
        assert canary_daemon.ask(recipient=recipient) == DEFER
    keycloak.users = users
    wait_until(lambda: canary_daemon.ask(recipient="alice@d1.test") == "DUNNO")


@pytest.mark.long
def test_many_negative_answers_at_once_ask_the_canaries_once(make_daemon, keycloak):
    keycloak.add_user("canary", "canary1@d1.test")
    keycloak.latency_seconds = 0.2
    daemon = make_daemon(keycloak=keycloak.config(canary="canary1@d1.test", timeout_seconds=30)).start()
    wait_until(lambda: ("profile", {}) in keycloak.requests)
    clients = [daemon.policy() for _ in range(30)]
    for number, client in enumerate(clients):
        client.send(recipient=f"u{number}@d1.test")
    assert [client.receive() for client in clients] == [REJECT] * 30
    assert len(canary_searches(keycloak)) < 25  # not thirty: those who wait share one check


# ---- lockout by guessed passwords


@pytest.mark.parametrize(
    ("reason", "changes", "answer"),
    [
        pytest.param(["permanentLockout"], {}, "DUNNO", id="locked-out"),
        pytest.param(["permanentLockout"], {"receive_when_locked_out": False}, REJECT, id="locked-out-by-configuration"),
        pytest.param(["somethingElse"], {}, REJECT, id="other-reason"),
        pytest.param(None, {}, REJECT, id="no-reason"),
    ],
)
def test_user_locked_out_by_guessed_passwords_receives_and_may_not_send(make_daemon, keycloak, reason, changes, answer):
    keycloak.add_user("alice", "alice@d1.test", enabled=False, attributes={"disabledReason": reason} if reason else {})
    daemon = make_daemon(keycloak=keycloak.config(**changes)).start()
    assert daemon.ask(recipient="alice@d1.test") == answer
    assert daemon.ask(recipient="alice+x@d1.test") == answer
    assert (daemon.ask(**OWN), daemon.ask(**OWN_BY_EMAIL)) == (NOT_OWNED, NOT_OWNED)


def test_why_a_user_is_disabled_is_asked_for_once(make_daemon, keycloak):
    keycloak.add_user("alice", "alice@d1.test", enabled=False)
    daemon = make_daemon(keycloak=keycloak.config()).start()
    assert daemon.ask(recipient="alice@d1.test") == REJECT
    assert [query["briefRepresentation"] for query in keycloak.searches] == ["true", "false"]


# ---- what must be no outage, and no answer


@pytest.mark.long
@pytest.mark.parametrize("fault", ["html", "close"])
def test_user_profile_that_cannot_be_read_is_no_outage(make_daemon, keycloak, fault):
    """A proxy in front of Keycloak may let nothing through but searches."""
    for number in range(8):
        keycloak.add_user(f"u{number}", f"u{number}@d1.test")
    keycloak.profile_fault = fault
    daemon = make_daemon(keycloak=keycloak.config(timeout_seconds=1)).start()
    wait_until(lambda: ("profile", {}) in keycloak.requests)
    for number in range(8):
        assert daemon.ask(recipient=f"u{number}@d1.test") == "DUNNO"
        time.sleep(0.4)
    assert "warning directory" not in daemon.log()


def test_as_many_users_with_one_email_as_were_asked_for_are_no_answer(make_daemon, keycloak):
    """There may be more, who would count as gone."""
    for number in range(12):
        keycloak.add_user(f"u{number:02}", "shared@d1.test")
    daemon = make_daemon(keycloak=keycloak.config(), policy=SHORT).start()
    own = {"protocol_state": "MAIL", "sender": "", "sasl_username": "u11", "sasl_method": "XOAUTH2"}
    assert daemon.ask(**own) == "DUNNO"
    assert daemon.ask(recipient="shared@d1.test") == "DUNNO"  # u11 has it
    time.sleep(0.3)
    assert daemon.ask(**own) == "DUNNO"
    assert daemon.ask(recipient="other@d1.test") == REJECT


def test_canary_whose_record_makes_no_sense_is_named(canary_daemon, keycloak):
    keycloak.user("canary2")["enabled"] = "yes"
    assert canary_daemon.ask(recipient="stranger@d1.test") == DEFER
    canary_daemon.wait_for_log("canary <canary2@d1.test> has no answer that can be used")


def test_username_of_bytes_that_are_no_text_is_no_answer(make_daemon, keycloak):
    keycloak.add_user("al\ud800x", "alice@d1.test")
    daemon = make_daemon(keycloak=keycloak.config(), policy={"mailbox_domain": "mbx.test"}).start()
    assert daemon.ask_map("alias alice@d1.test").startswith("TEMP")
