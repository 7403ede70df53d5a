"""The users that are known: what counts of each after a new answer, the bounds of the store, and who is forgotten first."""

from __future__ import annotations

import dataclasses
import gc
import math
import threading
import weakref

import pytest

import mailcloak
from mailcloak import DOUBTED, GONE, KNOWN, Answer, Person, User

POLICY = mailcloak.read_block(
    mailcloak.PolicyConfig,
    "policy",
    {"domain": "d1.test", "disappearance_grace_seconds": 100, "negative_cache_ttl_seconds": 10},
    [],
)
ALICE = User("alice", "alice@d1.test", True, user_id="id-alice")
DISABLED = ALICE._replace(enabled=False)
LOCKED_OUT = DISABLED._replace(locked_out=True)
LDAP = ALICE._replace(federation="ldap")
LDAP_DISABLED = LDAP._replace(enabled=False)
RENAMED = ALICE._replace(username="alicia", email="alicia@d1.test")
EMAIL, USERNAME = ("email", "alice@d1.test"), ("username", "alice")


def store_of(max_entries):
    return mailcloak.UserStore(dataclasses.replace(POLICY, cache_max_entries=max_entries))


def user(number, **more):
    return User(f"u{number}", f"u{number}@d1.test", True, user_id=f"id-{number}")._replace(**more)


def by_email(number):
    return ("email", f"u{number}@d1.test")


def learn(store, question, *users, at=0.0):
    """What the store holds for the question after this answer."""
    return store.learn(question, Answer(users, at))[0]


def fill(store, numbers, at=0.0):
    for number in numbers:
        learn(store, by_email(number), user(number), at=at)


# ---- what counts of a user from now on


def known(user, standing=KNOWN, seconds=0.0, asked_at=1000.0, **more):
    return Person(user, standing, asked_at, 900.0, seconds, **more)


@pytest.mark.parametrize(
    ("before", "said", "witness_at", "standing", "seconds"),
    [
        # nobody is known: what Keycloak says counts
        pytest.param(None, ALICE, -math.inf, KNOWN, 0, id="new"),
        pytest.param(None, DISABLED, -math.inf, KNOWN, 0, id="new-disabled"),
        pytest.param(None, LDAP_DISABLED, -math.inf, KNOWN, 0, id="new-disabled-by-ldap"),
        # who is there counts at once, whatever was before
        pytest.param(known(ALICE), ALICE, 1010, KNOWN, 0, id="still-there"),
        pytest.param(known(ALICE), LOCKED_OUT, 1010, KNOWN, 0, id="locked-out"),
        pytest.param(known(ALICE, DOUBTED, 50), ALICE, 1010, KNOWN, 0, id="back-in-the-grace"),
        pytest.param(known(ALICE, GONE), ALICE, 1010, KNOWN, 0, id="back-after-the-grace"),
        pytest.param(known(DISABLED), ALICE, 1010, KNOWN, 0, id="enabled-again"),
        # Keycloak's own "disabled" counts at once, a user storage's does not
        pytest.param(known(ALICE), DISABLED, 1010, KNOWN, 0, id="disabled"),
        pytest.param(known(ALICE, DOUBTED, 50), DISABLED, 1010, KNOWN, 0, id="disabled-in-the-grace"),
        pytest.param(known(LDAP), LDAP_DISABLED, 1010, DOUBTED, 0, id="disabled-by-ldap"),
        pytest.param(known(LDAP_DISABLED), LDAP_DISABLED, 1010, KNOWN, 0, id="disabled-by-ldap-since-ever"),
        pytest.param(known(LDAP_DISABLED, DOUBTED, 95), LDAP_DISABLED, 1010, KNOWN, 0, id="disabled-by-ldap-for-the-grace"),
        # nor does a user storage's "has no e-mail", which may only not be readable
        pytest.param(known(LDAP), LDAP._replace(email=""), 1010, DOUBTED, 0, id="ldap-shows-no-email"),
        pytest.param(known(ALICE), ALICE._replace(email=""), 1010, KNOWN, 0, id="email-taken-away"),
        pytest.param(
            known(LDAP, DOUBTED, 50),
            LDAP._replace(email=""),
            1010,
            DOUBTED,
            60,
            id="ldap-shows-no-email-still",
        ),
        pytest.param(
            known(LDAP, DOUBTED, 95),
            LDAP._replace(email=""),
            1010,
            KNOWN,
            0,
            id="ldap-shows-no-email-for-the-grace",
        ),
        pytest.param(known(LDAP._replace(email="")), LDAP._replace(email=""), 1010, KNOWN, 0, id="ldap-never-had-an-email"),
        # who is missing is doubted first, where the user was there
        pytest.param(known(ALICE), None, 1010, DOUBTED, 0, id="missing"),
        pytest.param(known(LOCKED_OUT), None, 1010, DOUBTED, 0, id="missing-and-was-locked-out"),
        pytest.param(known(DISABLED), None, 1010, GONE, 0, id="missing-and-was-disabled"),
        pytest.param(known(ALICE, GONE), None, 1010, GONE, 0, id="missing-and-was-gone"),
        # the grace: what was observed counts, twice a negative life at most, and only while others are confirmed
        pytest.param(known(ALICE, DOUBTED, 50), None, 1010, DOUBTED, 60, id="grace-passes"),
        pytest.param(known(ALICE, DOUBTED, 95), None, 1010, GONE, 0, id="grace-is-over"),
        pytest.param(known(ALICE, DOUBTED, 89), None, 1010, DOUBTED, 99, id="grace-is-almost-over"),
        pytest.param(known(ALICE, DOUBTED, 50, asked_at=0.0), None, 1010, DOUBTED, 70, id="long-ago-counts-two-lives"),
        pytest.param(known(ALICE, DOUBTED, 95), None, 999, DOUBTED, 95, id="nobody-else-confirmed-since"),
        pytest.param(known(ALICE, DOUBTED, 95), None, 1000, DOUBTED, 95, id="confirmed-at-the-last-look-not-since"),
        pytest.param(known(ALICE, DOUBTED, 95), None, -math.inf, DOUBTED, 95, id="nobody-else-ever"),
    ],
)
def test_judgement_of_a_user_by_what_was_known_and_what_is_said(before, said, witness_at, standing, seconds):
    after = mailcloak.judge(before, said, 1010.0, witness_at, POLICY)
    assert (after.standing, after.doubted_seconds, after.asked_at) == (standing, seconds, 1010.0)
    lacks_email = bool(said and before and before.user.email and not said.email)
    assert after.user == (before.user if standing == DOUBTED and lacks_email else said or before.user)
    if said and said.receives and not (lacks_email and said.federation):
        assert after.confirmed_at == 1010.0
    else:
        assert after.confirmed_at == (before.confirmed_at if before else -math.inf)


def test_grace_counts_two_seconds_between_looks_where_the_negative_life_is_shorter():
    policy = POLICY.__class__(**{**POLICY.__dict__, "negative_cache_ttl_seconds": 0.0})
    after = mailcloak.judge(known(ALICE, DOUBTED, 50), None, 1010.0, 1009.0, policy)
    assert (after.standing, after.doubted_seconds) == (DOUBTED, 52)


def test_no_grace_at_all_is_believed_at_once():
    policy = POLICY.__class__(**{**POLICY.__dict__, "disappearance_grace_seconds": 0.0})
    assert mailcloak.judge(known(ALICE), None, 1010.0, -math.inf, policy).standing == GONE
    assert mailcloak.judge(known(LDAP), LDAP_DISABLED, 1010.0, -math.inf, policy).standing == KNOWN


def test_names_that_a_user_had_are_kept_and_the_login_by_email_is_not():
    before = known(ALICE, unnamed_at=900.0)
    after = mailcloak.judge(before, RENAMED, 1010.0, 1010.0, POLICY)
    assert after.former == (USERNAME, EMAIL)
    assert after.names == (("username", "alicia"), ("email", "alicia@d1.test"), USERNAME, EMAIL)
    assert after.unnamed_at == mailcloak.NEVER
    assert mailcloak.judge(before, ALICE, 1010.0, 1010.0, POLICY).unnamed_at == 900.0
    for number in range(20):
        after = mailcloak.judge(after, RENAMED._replace(username=f"alicia{number}"), 1010.0, 1010.0, POLICY)
    assert after.former == tuple(("username", f"alicia{number}") for number in (18, 17, 16, 15))


@pytest.mark.parametrize(
    ("before", "after", "lost"),
    [
        pytest.param(known(ALICE), known(ALICE), False, id="same"),
        pytest.param(known(ALICE), known(DISABLED), True, id="disabled"),
        pytest.param(known(ALICE), known(LOCKED_OUT), True, id="locked-out"),
        pytest.param(known(ALICE), known(ALICE, DOUBTED), True, id="in-doubt"),
        pytest.param(known(ALICE), known(RENAMED), True, id="renamed"),
        pytest.param(known(ALICE, DOUBTED), known(ALICE, GONE), False, id="lost-before"),
        pytest.param(known(DISABLED), known(ALICE), False, id="enabled"),
    ],
)
def test_loss_of_a_right_is_known(before, after, lost):
    assert after.may_have_lost(before) is lost


# ---- one user, many questions


def test_user_found_by_one_question_is_known_to_all():
    store = store_of(10)
    learn(store, EMAIL, ALICE, at=5)
    assert [person.user for person in store.look(USERNAME).here] == [ALICE]
    assert store.look(USERNAME).asked_at == -math.inf  # nobody has asked this question yet
    assert store.look(EMAIL).asked_at == 5


@pytest.mark.parametrize("asked", [EMAIL, USERNAME], ids=["by-email", "by-username"])
@pytest.mark.parametrize("said", [(), (DISABLED,), (RENAMED,)], ids=["missing", "disabled", "renamed"])
def test_user_who_lost_a_right_lost_it_for_every_question(asked, said):
    store = store_of(10)
    for question in (EMAIL, USERNAME):
        learn(store, question, ALICE)
    learn(store, asked, *said, at=1)
    for question in (EMAIL, USERNAME):
        (person,) = store.look(question).people
        assert not (person.has(question) and person.standing == KNOWN and person.user.enabled)


def test_answer_that_was_asked_for_earlier_changes_nothing_of_a_user():
    store = store_of(10)
    learn(store, EMAIL, DISABLED, at=10)
    for question in (EMAIL, USERNAME):
        assert learn(store, question, ALICE, at=9) is None  # a newer answer says something else: ask again
        assert [person.user for person in store.look(question).people] == [DISABLED]
    assert [person.user for person in learn(store, EMAIL, ALICE, at=11).people] == [ALICE]
    assert learn(store, EMAIL, at=10.5) is None  # missing, but asked for earlier
    assert store.look(EMAIL).here[0].standing == KNOWN


@pytest.mark.parametrize("newer", ["nobody", "somebody else"])
def test_slow_answer_gives_no_right_that_a_newer_answer_took(newer):
    """As if both had come in the order in which they were asked for: in doubt until Keycloak is asked again."""
    store = store_of(10)
    boss = ("email", "boss@d1.test")
    carl = User("carl", "boss@d1.test", True, user_id="3")
    learn(store, USERNAME, ALICE, at=1)
    learn(store, boss, *([carl] if newer == "somebody else" else []), at=23)
    assert learn(store, USERNAME, ALICE._replace(email="boss@d1.test"), at=20) is None
    (alice,) = store.look(USERNAME).people
    assert alice.standing == DOUBTED
    assert [person.user.username for person in store.look(boss).here] == (["carl"] if newer == "somebody else" else ["alice"])
    assert store.look(boss).asked_at == 23
    assert learn(store, boss, at=18) is None  # older still
    assert store.look(boss).asked_at == 23


def test_sizes_wait_for_the_lock_that_all_look_ups_need():
    """By them the watchdog learns that nobody keeps it."""
    store, seen = store_of(10), threading.Event()
    with store._lock:
        threading.Thread(target=lambda: (store.sizes(), seen.set()), daemon=True).start()
        assert not seen.wait(0.2)
    assert seen.wait(10)


def test_user_with_another_email_has_no_right_to_the_old_one_and_is_no_stranger():
    store = store_of(10)
    learn(store, EMAIL, ALICE)
    learn(store, ("username", "alicia"), RENAMED, at=1)
    assert store.look(EMAIL).here == ()
    assert [person.user for person in store.look(EMAIL).people] == [RENAMED]


def test_address_that_was_given_up_is_free_for_another_user():
    store = store_of(10)
    learn(store, EMAIL, ALICE)
    learn(store, USERNAME, ALICE._replace(email="new@d1.test"), at=1)
    other = user(1, email="alice@d1.test")
    found = learn(store, EMAIL, other, at=2)
    assert [person.user for person in found.here] == [other]
    assert store.look(("email", "new@d1.test")).here[0].standing == KNOWN


def test_new_user_of_the_same_name_replaces_the_old_one():
    store = store_of(10)
    learn(store, EMAIL, ALICE)
    new = ALICE._replace(user_id="id-new", email="new@d1.test")
    found = learn(store, USERNAME, new, at=1)
    assert [person.user for person in found.here] == [new]
    assert [(person.user.username, person.standing) for person in store.look(EMAIL).here] == [("", DOUBTED)]


def test_new_user_of_the_same_name_and_address_replaces_the_old_one():
    store = store_of(10)
    learn(store, EMAIL, ALICE)
    new = ALICE._replace(user_id="id-new")
    assert [person.user for person in learn(store, USERNAME, new, at=1).here] == [new]
    assert [person.user for person in learn(store, EMAIL, new, at=2).here] == [new]


def test_two_users_of_one_address_are_both_there():
    store = store_of(10)
    twins = [user(number, email="twin@d1.test") for number in (1, 2)]
    assert {person.user for person in learn(store, ("email", "twin@d1.test"), *twins).here} == set(twins)
    assert [person.user for person in learn(store, ("email", "twin@d1.test"), twins[0], at=1).here if person.standing == KNOWN] == [
        twins[0]
    ]


@pytest.mark.parametrize(("federation", "passes"), [("ldap", True), ("", False), ("other-ldap", False)])
def test_grace_passes_while_users_of_the_same_federation_are_confirmed(federation, passes):
    store = store_of(10)
    learn(store, EMAIL, LDAP)
    for number in range(1, 20):
        learn(store, by_email(1), user(1, federation=federation), at=number * 10)
        found = learn(store, EMAIL, at=number * 10 + 1)
    assert (found.people[0].standing == GONE) is passes
    assert store.look(USERNAME).people[0].standing == (GONE if passes else DOUBTED)


def test_what_is_held_is_told_from_what_has_changed():
    store = store_of(10)
    found, nobody = learn(store, EMAIL, ALICE), learn(store, by_email(1))
    assert store.holds(found)
    assert store.holds(nobody)
    learn(store, by_email(2), user(2), at=1)
    assert store.holds(found)
    learn(store, USERNAME, DISABLED, at=1)
    assert not store.holds(found)
    learn(store, by_email(1), user(1), at=1)
    assert not store.holds(nobody)


def test_login_by_email_is_noted_of_the_user_as_described():
    store = store_of(10)
    learn(store, EMAIL, ALICE)
    store.allow_login_by_email(RENAMED, 5.0)
    assert store.look(EMAIL).people[0].unnamed_at == mailcloak.NEVER
    for asked_at in (5.0, 4.0):
        store.allow_login_by_email(ALICE, asked_at)
        assert store.look(EMAIL).people[0].unnamed_at == 5.0
    learn(store, USERNAME, ALICE, at=1)
    assert store.look(EMAIL).people[0].unnamed_at == 5.0
    learn(store, USERNAME, RENAMED, at=2)
    assert store.look(EMAIL).people[0].unnamed_at == mailcloak.NEVER


# ---- bounds


def test_why_a_user_is_disabled_is_known_from_before_where_it_is_not_told():
    """Keycloak went away between the two requests: nobody begins to receive by that."""
    guess = LOCKED_OUT  # who may be locked out receives
    for before, receives in ((DISABLED, False), (LOCKED_OUT, True), (ALICE, True), (None, True)):
        store = store_of(10)
        if before:
            learn(store, EMAIL, before)
        store.learn(EMAIL, Answer((guess,), 1.0, frozenset({guess.key})))
        (person,) = store.look(EMAIL).here
        assert (person.user.receives, person.user.enabled) == (receives, False)


def test_server_that_gives_each_user_a_new_id_in_each_answer_fills_no_name():
    """Each answer takes the name from the users of the one before."""
    store = store_of(10_000)
    for number in range(300):
        learn(
            store, EMAIL, *(user(0, username="alice", email=EMAIL[1], user_id=f"{number}-{each}") for each in range(9)), at=number
        )
    assert store.sizes()[0] <= mailcloak.MAX_FORMER_HOLDERS + 9
    assert len(store.look(USERNAME).people) <= mailcloak.MAX_FORMER_HOLDERS + 9
    assert len(store.look(USERNAME).here) == 9


@pytest.mark.parametrize(("later", "has_left"), [(None, False), (LDAP_DISABLED, False), ("gone", True)])
def test_user_who_was_renamed_has_not_left_before_they_are_gone(later, has_left):
    """Also not while they are in the grace, or disabled: an alias with several users keeps the old name."""
    store = store_of(10)
    learn(store, USERNAME, LDAP)
    renamed = LDAP._replace(username="alicia")
    learn(store, ("username", "alicia"), renamed, at=1.0)
    learn(store, USERNAME, at=2.0)
    if later == "gone":
        for at in range(3, 60):
            learn(store, by_email(1), user(1, federation="ldap"), at=at * 10.0)
            learn(store, ("username", "alicia"), at=at * 10.0 + 1)
    else:
        learn(store, ("username", "alicia"), *([later._replace(username="alicia")] if later else []), at=3.0)
    assert mailcloak.judge_leaving([store.look(USERNAME)], None).value is has_left


def test_disabled_user_who_has_a_new_id_in_each_answer_fills_no_name():
    store = store_of(10_000)
    for number in range(300):
        learn(store, EMAIL, user(0, username=f"u{number % 7}", email=EMAIL[1], user_id=f"id-{number}", enabled=False), at=number)
    assert store.sizes()[0] <= 8 * (mailcloak.MAX_FORMER_HOLDERS + 1)


def test_user_who_was_renamed_stays_known_where_too_many_had_the_old_name():
    store = store_of(10_000)
    learn(store, EMAIL, ALICE)
    learn(store, ("email", RENAMED.email), RENAMED, at=1.0)
    for number in range(60):
        learn(store, USERNAME, ALICE._replace(user_id=f"other-{number}"), at=2.0 + number)
    assert [person.user for person in store.look(("username", "alicia")).here] == [RENAMED]


def test_full_store_forgets_who_was_used_longest_ago():
    store = store_of(3)
    fill(store, (1, 2, 3))
    store.look(by_email(1))
    fill(store, [4])
    assert [bool(store.look(by_email(number)).people) for number in (1, 2, 3, 4)] == [True, False, True, True]
    assert store.sizes() == (3, 0)
    assert [len(names) for names in store._index.values()] == [3, 3]  # nothing is left of the forgotten one


def test_user_who_is_gone_is_remembered_as_long_as_others():
    """So that a user who is asked about is no stranger, though the answer serves nobody any more."""
    store = store_of(3)
    fill(store, [1])
    learn(store, by_email(1), at=1)
    fill(store, [2, 3])
    for _ in range(10):
        assert store.look(by_email(1)).people
    fill(store, [4])
    assert store.look(by_email(1)).people[0].standing == DOUBTED


def test_questions_that_found_nobody_never_push_out_users():
    store = store_of(20)
    fill(store, range(20))
    for number in range(100, 1100):
        assert learn(store, by_email(number), at=1).asked_at == 1
    assert store.sizes() == (20, 2)
    assert all(store.look(by_email(number)).here for number in range(20))


def test_questions_that_found_nobody_have_a_tenth_of_the_room():
    store = store_of(100)
    for number in range(1000):
        learn(store, by_email(number), at=number)
    assert store.sizes() == (0, 10)
    assert store.look(by_email(999)).asked_at == 999
    assert store.look(by_email(989)).asked_at == -math.inf


def test_user_who_is_found_is_no_question_without_an_answer_any_more():
    store = store_of(10)
    learn(store, by_email(1))
    learn(store, by_email(1), user(1), at=1)
    assert store.sizes() == (1, 0)
    store.forget(None, 0.0)
    assert store.sizes() == (0, 0)
    assert store._index == {"username": {}, "email": {}}


def test_smaller_limit_counts_from_the_next_answer():
    store = store_of(100)
    fill(store, range(50))
    store.policy = dataclasses.replace(POLICY, cache_max_entries=10)
    fill(store, [50])
    assert store.sizes() == (10, 0)
    assert store.look(by_email(50)).here


def test_saved_users_are_taken_up_to_the_limit_the_newest_of_them():
    store = store_of(3)
    store.take_up([Person(user(number), KNOWN, float(number), float(number)) for number in (4, 1, 5, 2, 3)], 100)
    assert set(store.everybody()) == {"id-3", "id-4", "id-5"}
    assert store.look(by_email(5)).asked_at == -math.inf  # asked about again


def test_saved_user_does_not_replace_one_that_is_known():
    store = store_of(3)
    store.await_saved()
    learn(store, EMAIL, DISABLED, at=9)
    store.take_up([Person(ALICE, KNOWN, 1.0, 1.0)], 100)
    assert [person.user for person in store.look(EMAIL).people] == [DISABLED]


@pytest.mark.parametrize(("names", "count"), [(["alice@d1.test"], 1), (["alice"], 1), (["u1@d1.test"], 1), (["bob"], 0), (None, 3)])
def test_forgotten_users_and_questions_are_counted(names, count):
    store = store_of(30)
    learn(store, EMAIL, ALICE)
    learn(store, by_email(1))
    learn(store, by_email(2))
    assert store.forget(names, 0.0) == count
    assert sum(store.sizes()) == 3 - count
    assert store.forget(names, 0.0) == 0


def test_every_change_of_a_user_is_told():
    """What is on disk follows from it."""
    store, told = store_of(2), {}

    def tell(user_id, before, after):
        assert told.get(user_id) == before
        told[user_id] = after

    store.on_change = tell
    learn(store, EMAIL, ALICE)
    fill(store, [1], at=1)
    learn(store, USERNAME, DISABLED, at=2)
    learn(store, by_email(1), at=3)
    assert told == store.everybody()
    fill(store, [2], at=4)
    assert told == {**store.everybody(), "id-alice": None}
    store.forget(None, 0.0)
    assert set(told.values()) == {None}


def test_threads_leave_it_whole_and_within_its_bound():
    store, failures = store_of(50), []

    def work(seed):
        try:
            for number in range(1500):
                who = (number * seed) % 97
                users = [user(who, enabled=bool(number % 5))] if number % 3 else []
                found = learn(store, by_email(who), *users, at=float(number))
                assert all(person.user.username == f"u{who}" for person in (found.people if found else ()))
                assert all(person.user.username == f"u{who}" for person in store.look(("username", f"u{who}")).people)
                store.holds(found or store.look(by_email(who)))
                if number % 100 == 0:
                    store.forget([f"u{who}"], 0.0)
        except Exception as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (3, 5, 7, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    people = store.everybody()
    assert len(people) <= 50
    assert store.sizes()[1] <= 5
    names = {name: set() for person in people.values() for name in person.names}
    for user_id, person in people.items():
        for name in person.names:
            names[name].add(user_id)
    index = {(attribute, name): {*ids} for attribute, those in store._index.items() for name, (_, *ids) in those.items()}
    assert index == names


def test_federations_without_an_end_take_little_room(monkeypatch):
    monkeypatch.setattr(mailcloak, "MAX_WITNESSES", 10)
    store = store_of(10)
    for number in range(50):
        learn(store, by_email(number), user(number, federation=f"ldap{number}"))
    assert len(store._witnesses) == 10


def test_user_without_an_id_whose_name_another_has_now_is_still_somebody():
    store = store_of(10)
    nameless = ALICE._replace(user_id="")
    learn(store, EMAIL, nameless)
    learn(store, USERNAME, ALICE._replace(email="new@d1.test"), at=1)
    assert [person.standing for person in store.look(EMAIL).here] == [DOUBTED]
    assert [person.user for person in learn(store, EMAIL, ALICE, at=2).here] == [ALICE]


def test_user_read_from_the_disk_after_keycloak_did_not_find_them_is_in_doubt():
    store = store_of(10)
    store.await_saved()
    learn(store, USERNAME, at=5)
    store.take_up([mailcloak.Person(ALICE, KNOWN, 1, 1), mailcloak.Person(user(1), KNOWN, 1, 1)], 100)
    assert [person.standing for person in store.look(USERNAME).people] == [DOUBTED]
    assert [person.standing for person in store.look(by_email(1)).people] == [KNOWN]


X, Y = (User(name, f"{name}@d1.test", True, user_id=f"id-{name}") for name in ("xen", "yan"))


@pytest.mark.parametrize("between", [(), ((("username", "yan"), (Y._replace(email="a@d1.test"),)),)], ids=["nobody", "somebody"])
def test_late_answer_about_a_user_not_known_is_overtaken_by_any_newer_one_about_their_names(between):
    store = store_of(10)
    learn(store, ("email", "a@d1.test"), at=20)
    for number, (question, users) in enumerate(between):
        learn(store, question, *users, at=30 + number)
    assert learn(store, ("username", "xen"), X._replace(email="a@d1.test"), at=10) is None
    assert "id-xen" not in store.everybody()


def test_late_answer_about_a_user_whose_username_another_has_by_now_is_overtaken():
    store = store_of(10)
    learn(store, ("email", "xen@d1.test"), X._replace(username="yan"), at=20)
    assert learn(store, ("email", "yan@d1.test"), Y, at=10) is None


def test_username_that_went_to_another_user_by_a_newer_answer_is_not_taken_by_a_late_one():
    """Two users with one username would send as each other."""
    store = store_of(10)
    fill_with = ((("email", X.email), X), (("email", Y.email), Y))
    for question, someone in fill_with:
        learn(store, question, someone)
    learn(store, ("email", Y.email), Y._replace(username="alice"), at=11)
    assert learn(store, ("email", X.email), X._replace(username="alice"), at=10) is None
    here = store.look(("username", "alice")).here
    assert [person.user.user_id for person in here] == ["id-yan"]
    assert "alice" not in [person.user.username for person in store.look(("email", X.email)).people]


def test_late_answer_without_a_user_who_has_the_email_by_a_newer_one_is_overtaken():
    store, question = store_of(10), ("email", X.email)
    learn(store, ("username", "xen"), X, at=11)
    learn(store, ("username", "yan"), Y._replace(email=X.email), at=12)
    assert learn(store, question, X, at=10) is None


def test_email_of_a_user_who_was_found_disabled_by_username_is_asked_for_again():
    """Meanwhile somebody else may have it as well, who was not there when it was asked for."""
    store = store_of(10)
    learn(store, ("email", X.email), X, at=1)
    learn(store, ("username", "xen"), X, at=2)
    assert store.look(("email", X.email)).asked_at == 1
    learn(store, ("username", "xen"), X._replace(enabled=False), at=3)
    assert store.look(("email", X.email)).asked_at == mailcloak.NEVER
    assert store.look(("username", "xen")).asked_at == 3


@pytest.mark.parametrize("comes", ["before", "after"])
def test_late_answer_is_overtaken_by_one_about_nobody_whoever_was_looked_up_since(comes):
    """Else a user who had somebody's e-mail for a moment could send as it for the whole of an outage."""
    store = store_of(10)
    late = (("username", "yan"), Y._replace(email=X.email))
    learn(store, ("email", X.email), X, at=1)
    learn(store, ("email", Y.email), Y, at=2)
    learn(store, ("email", X.email), at=12)
    if comes == "before":
        assert learn(store, *late, at=10) is None
    learn(store, ("username", "xen"), X._replace(email="new@d1.test"), at=13)
    if comes == "after":
        assert learn(store, *late, at=10) is None
    assert {person.standing for person in store.look(("email", X.email)).here} <= {DOUBTED}


@pytest.mark.parametrize("asked_at", [None, 3])
def test_login_by_a_former_username_is_neither_refused_nor_unknown_in_an_outage(asked_at):
    """Another user may have it as e-mail by now, though nobody had it when that was asked."""
    store = store_of(10)
    learn(store, ("username", X.email), X._replace(username=X.email, email="old@d1.test"))
    learn(store, ("username", "xen"), X._replace(email="old@d1.test"), at=1)
    learn(store, ("username", X.email), at=2)
    if asked_at:
        learn(store, ("email", X.email), at=asked_at)
    known = [store.look(("username", X.email)), store.look(("email", X.email))]
    assert mailcloak.judge_login(known, 0.0).counts == "doubted"


def test_user_who_loses_a_name_is_told_to_the_disk_before_the_one_who_gains_it():
    """The writer may begin between the two, and the program may be killed after that."""
    store, told = store_of(10), []
    learn(store, ("username", "xen"), X)
    store.on_change = lambda user_id, before, after: told.append(user_id)
    learn(store, ("username", "xen"), Y._replace(username="xen"), at=1)
    assert told == ["id-xen", "id-yan"]


def test_shared_email_is_nobodys_in_an_outage_after_one_of_its_users_was_forgotten():
    store = store_of(10)
    question = ("email", "shared@d1.test")
    learn(store, question, *(user._replace(email="shared@d1.test") for user in (X, Y)))
    assert mailcloak.judge_holders([store.look(question)], -math.inf).counts == "there"  # both: no owner
    store.forget(["yan"], 1)
    assert mailcloak.judge_holders([store.look(question)], -math.inf).counts == "doubted"
    known = [store.look(("username", "shared@d1.test")), store.look(question)]
    assert mailcloak.judge_login(known, -math.inf).counts == "doubted"
    assert mailcloak.judge_login([store.look(("username", "xen"))], -math.inf).counts == "there"


def test_email_that_a_hidden_user_lost_to_one_who_is_disabled_now_may_still_be_the_hidden_ones():
    """Keycloak shows the other one alone while LDAP is down; both have the e-mail."""
    store, question = store_of(10), ("email", "a@d1.test")
    hidden, other = X._replace(email="a@d1.test", federation="ldap"), Y._replace(email="a@d1.test")
    learn(store, ("username", "xen"), hidden)
    assert mailcloak.judge_holders([learn(store, question, other, at=1)], None).counts == "there"
    disabled = other._replace(enabled=False)
    assert mailcloak.judge_holders([learn(store, question, disabled, at=2)], None).counts == "doubted"
    named = learn(store, ("username", "yan"), disabled, at=3)
    assert mailcloak.judge_login([named], None) == mailcloak.Verdict(mailcloak.Login("", "disabled"), "absent")


def test_email_that_somebody_else_turns_out_to_share_is_a_right_that_was_lost():
    store = store_of(10)
    question, mine = ("email", "xen@d1.test"), X
    store.learn(question, Answer((mine,), 0.0))
    (before, after), *_ = store.learn(question, Answer((mine, Y._replace(email="xen@d1.test")), 1.0))[1]
    assert after.may_have_lost(before)


def test_saved_users_are_in_doubt_after_more_than_can_be_noted_while_they_could_not_be_read(monkeypatch):
    monkeypatch.setattr(mailcloak, "MAX_STEPS", 5)
    store = store_of(10)
    store.await_saved()
    for number in range(6):
        learn(store, by_email(number), user(number))
    store.take_up([Person(user(1)._replace(enabled=False), KNOWN, 1.0, 1.0), Person(ALICE, KNOWN, 1.0, 1.0)], 100)
    assert [person.standing for person in store.look(USERNAME).people] == [DOUBTED]
    assert [person.user for person in store.look(by_email(1)).people] == [user(1)]


def test_store_that_a_reload_has_replaced_ends_without_the_collector(tmp_path):
    """Which no longer looks at what has survived a pass."""
    store = store_of(10)
    saved = mailcloak.SavedUsers(str(tmp_path / "last-known.db"), "mail", store)
    fill(store, (1, 2))
    saved.close()
    reference = weakref.ref(store)
    gc.disable()
    try:
        del store, saved
        assert reference() is None
    finally:
        gc.enable()
