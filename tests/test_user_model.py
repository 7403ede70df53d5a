"""mailcloak's memory of users against a model: any order of events, each answer checked. See user_model.py."""

from __future__ import annotations

import contextlib
import json
import threading
import time

import pytest
from conftest import Daemon, config_in, short_directory, wait_until
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from keycloak_stand_in import KeycloakStandIn
from user_model import (
    Limits,
    Question,
    UserModel,
    UserRules,
    World,
    fill_database,
    id_of,
    policy_attributes,
    policy_block,
)

import mailcloak

FAST = settings(suppress_health_check=list(HealthCheck))


def always_the_same(machine, number=0):
    """With the same examples in each run, so that a change is to blame for a failure; make model looks for others."""
    return seed(number)(type(machine.__name__, (machine,), {}))


def test_answers_are_right_in_any_order_of_events():
    run_state_machine_as_test(always_the_same(UserModel), settings=settings(FAST, max_examples=250, stateful_step_count=25))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_answers_are_right_in_thousands_of_orders():
    run_state_machine_as_test(always_the_same(UserModel), settings=settings(FAST, max_examples=3000, stateful_step_count=40))


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", range(5))
def test_daemon_answers_right_in_any_order_of_events(number):
    """50 examples in all, in parts that can run side by side."""
    machine = always_the_same(DaemonModel, number)
    run_state_machine_as_test(machine, settings=settings(FAST, max_examples=10, stateful_step_count=12))


# ---- what it has found, as its shortest examples


@contextlib.contextmanager
def model(**settings):
    """The model, whose steps check all answers."""
    state = UserModel()
    try:
        state.begin(**{"mode": "tempfail", "mailbox_domain": "", "foreign_sender": "reject", "with_ids": True, **settings})
        yield state
    finally:
        state.teardown()


def test_address_that_goes_to_another_user_is_not_refused_when_only_the_loss_is_known():
    with model() as state:
        state.ask(Question("recipient", "a@d1.test"))
        state.pass_time(1.0)
        state.take_address(2, 0)  # carol gets alice's
        state.ask(Question("recipient", "new0@d1.test"))  # alice's new one
        state.ask(Question("recipient", "a@d1.test"))


def test_sender_is_not_refused_while_an_earlier_holder_of_the_address_is_in_doubt():
    with model() as state:
        state.ask_all_of_login("alice")
        state.delete(0)
        state.change(2, ("email", "a@d1.test"))
        state.pass_time(121.0)
        state.ask(Question("sender", "a@d1.test", "carol"))


def test_address_that_went_to_another_user_is_theirs_at_once():
    """Not only after the grace of the user who had it before."""
    with model() as state:
        state.ask_all_of_login("alice")
        state.delete(0)
        state.ask_all_of_login("carol")
        state.change(2, ("email", "a@d1.test"))
        state.pass_time(121.0)
        state.ask(Question("sender", "c@d1.test", "carol"))  # by the username, which does not show whose the address is
        state.ask(Question("sender", "a@d1.test", "carol"))
        state.ask(Question("recipient", "a@d1.test"))


def test_address_that_went_to_another_user_just_before_an_outage_is_deferred():
    with model() as state:
        state.ask_all_of_login("alice")
        state.pass_time(1.0)
        state.change(0, ("email", "c@d1.test"))
        state.change(2, ("email", "a@d1.test"))
        state.ask(Question("sender", "", "carol"))
        state.turn(True)
        state.ask(Question("sender", "a@d1.test", "carol"))


def test_username_that_was_given_up_just_before_an_outage_is_deferred():
    with model() as state:
        state.ask_all_of_login("alice")
        state.change(0, ("username", "eve"))
        state.change(3, ("username", "alice"))
        state.pass_time(121.0)
        state.ask(Question("recipient", "a@d1.test"))
        state.turn(True)
        state.ask(Question("sender", "", "alice"))


def test_users_who_swapped_their_usernames_are_there_in_an_outage():
    with model() as state:
        state.ask_all_of_login("alice")
        state.ask_all_of_login("bob")
        state.change(0, ("username", "eve"))
        state.change(1, ("username", "alice"))
        state.change(0, ("username", "bob"))
        state.pass_time(121.0)
        state.ask(Question("sender", "", "alice"))
        state.turn(True)
        state.ask_all_of_login("a@d1.test")


def test_address_that_a_user_has_lost_does_not_pass_by_a_login_that_is_not_known_in_the_outage():
    with model(mode="dunno") as state:
        state.change(0, ("email", "c@d1.test"))
        state.change(1, ("email", "a@d1.test"))
        state.ask_all_of_login("bob")
        state.pass_time(121.0)
        state.change(1, ("email", "b@d1.test"))
        state.ask(Question("sender", "", "bob"))
        state.turn(True)
        state.ask(Question("sender", "a@d1.test", "b@d1.test"))


def test_address_that_another_user_had_for_a_while_is_not_refused_while_keycloak_hides_its_holder():
    with model(with_ids=False) as state:
        state.overtake(by_email=False, change=("taken", 0), flushed=False, number=1, seconds=1.0)
        state.reload_with_other_meaning()
        state.overtake(by_email=False, change=("taken", 1), flushed=False, number=0, seconds=1.0)
        state.reload_with_other_meaning()
        state.outlast(lie="hides-all", number=0, other=1, seconds=5.25, times=2)


def test_late_answer_does_not_give_back_an_address_that_has_another_user_now():
    with model(with_ids=False) as state:
        state.delete(number=1)
        state.outlast(lie="none", number=0, other=2, seconds=5.25, times=2)
        state.overtake(by_email=False, change=("username", "bob"), flushed=False, number=2, seconds=121.0)
        state.make(number=2)
        state.overtake(by_email=False, change=("state", "enabled"), flushed=False, number=0, seconds=121.0)
        state.overtake(by_email=False, change=("taken", 0), flushed=False, number=2, seconds=1.0)


def test_late_answer_with_an_address_that_nobody_has_by_now_is_heard():
    with model(with_ids=False) as state:
        state.watch(number=0, question=Question("recipient", "a@d1.test"), seconds=5.25, times=2)
        state.take_address(number=0, other=1)
        state.overtake(by_email=False, change=("state", "deleted"), flushed=False, number=0, seconds=1.0)


def test_late_answer_about_a_user_not_known_until_then_does_not_make_a_login_ambiguous():
    with model(with_ids=False) as state:
        state.overtake(0, ("username", "b@d1.test"), by_email=False, seconds=1.0)


def test_name_is_not_taken_for_free_because_of_an_answer_that_was_overtaken():
    with model() as state:
        state.change(1, ("username", "b@d1.test"))
        state.overtake(1, ("username", "bob"), by_email=False, seconds=1.0)


def test_answer_that_was_asked_for_before_a_flush_does_not_come_back():
    with model() as state:
        meanwhile = [("pass_time", 1.0), ("change", 0, ("state", "disabled")), ("flush", None)]
        state.ask_slow_keycloak(Question("sender", "", "alice"), meanwhile)
        state.ask(Question("sender", "", "alice"))


def test_user_whose_loss_the_look_up_of_the_sender_shows_does_not_send_once_more():
    with model() as state:
        state.ask(Question("sender", "", "alice"))
        state.change(0, ("state", "locked"))
        state.ask(Question("sender", "a@d1.test", "alice"))  # the login is cached, the sender is asked about


def test_address_is_not_refused_because_keycloak_shows_another_user_who_may_not_have_it():
    with model(with_ids=False, has_canary=True) as state:
        state.take_address(3, 1)  # dave gets bob's, and bob has it again
        state.make(1)
        state.change(3, ("verified", False))
        state.reload_with_other_meaning()
        state.lie("hides-all", 0)
        state.ask(Question("recipient", "b@d1.test"))


def start_without_file(state):
    """What is known is saved, and cannot be read at the next start."""
    state.write_file()
    state.hold_file()
    state.restart(0.0, 1.0)


def read_file(state):
    state.release_file()
    state.write_file()


def test_user_called_disabled_by_keycloak_before_the_file_could_be_read_is_in_the_grace_afterwards():
    with model() as state:
        state.ask_all_of_login("carol")
        start_without_file(state)
        state.lie("bars", 2)
        state.ask(Question("sender", "", "carol"))
        read_file(state)
        state.ask(Question("sender", "", "carol"))


def test_address_that_a_user_lost_before_the_file_could_be_read_does_not_pass_afterwards():
    with model(mode="dunno") as state:
        state.ask_all_of_login("alice")
        start_without_file(state)
        state.change(0, ("email", "c@d1.test"))
        state.ask(Question("sender", "", "alice"))
        read_file(state)
        state.turn(True)
        state.pass_time(121.0)
        state.ask(Question("sender", "a@d1.test", "alice"))


def test_user_found_disabled_after_a_flush_stays_so_when_the_file_is_read():
    with model(mode="dunno") as state:
        state.ask_all_of_login("alice")
        start_without_file(state)
        state.flush("alice")
        state.change(0, ("state", "disabled"))
        state.ask(Question("sender", "", "alice"))
        read_file(state)
        state.turn(True)
        state.pass_time(121.0)
        state.ask(Question("sender", "a@d1.test", "alice"))


def test_slow_answer_does_not_bring_back_a_user_whose_address_was_found_free_since():
    with model() as state:
        question = Question("recipient", "a@d1.test")
        state.ask_slow_keycloak(Question("sender", "", "alice"), [("pass_time", 1.0), ("delete", 0), ("ask", question)])
        state.ask(Question("sender", "", "alice"))


def test_slow_answer_that_was_asked_for_before_a_flush_does_not_count_when_the_saved_users_are_read_later():
    """A mistake of the oracle, which counted it then."""
    with model(with_ids=False) as state:
        state.hold_file()
        state.kill(offset=0.0, seconds=1.0)
        state.overtake(by_email=False, change=("state", "disabled"), flushed=True, number=1, seconds=1.0)
        state.release_file()
        state.leave(how="hides", numbers=[1, 3], seconds=5.25, times=1)


def test_address_that_keycloak_showed_given_up_counts_so_also_where_it_called_the_user_disabled_by_mistake():
    """A mistake of the oracle, which saw what was said last of a user who was there."""
    with model(with_ids=False) as state:
        state.watch(number=2, question=Question("recipient", "a@d1.test"), seconds=5.25, times=2)
        state.ask_slow_keycloak(
            meanwhile=[("take_address", 2, 3), ("lie", "bars", 2)], question=Question("sender", "a@d1.test", "d@d2.test")
        )
        state.make(number=2)
        state.lie(lie="hides-all", number=0)
        state.watch(number=0, question=Question("recipient", "c@d1.test"), seconds=5.25, times=2)


def test_email_that_a_slow_answer_shows_with_two_users_is_nobodys_in_an_outage():
    with model() as state:
        state.change(3, ("email", "b@d1.test"))
        state.ask(Question("sender", "", "dave"))
        state.pass_time(1.0)
        state.overtake(by_email=True, change=("state", "enabled"), flushed=False, number=1, seconds=1.0)
        state.turn(True)
        state.pass_time(121.0)
        state.ask(Question("sender", "b@d1.test", "bob"))


# ---- the same rules on a daemon


CANARY = "canary@d1.test"


class RealTime(World):
    @property
    def time(self):
        return time.monotonic()

    @time.setter
    def time(self, seconds):
        pass


class Keycloak(KeycloakStandIn):
    """The stand-in, with the model's users; what it says is heard by the oracle."""

    def __init__(self, driver):
        super().__init__()
        self.driver = driver
        self.is_heard = True
        self.held = None  # (a search has arrived, it may be answered) of a slow question

    def search(self, query):
        attribute = next((name for name in ("username", "email") if name in query), None)
        if attribute is None:
            return [{"username": "administrator", "enabled": True}]
        world, at = self.driver.model.world, time.monotonic()
        moment, question = world.seen_by_keycloak, (attribute, query[attribute].lower())
        if question == ("email", CANARY):
            is_there = not world.lies_of_all or bool(moment.barred)
            return [{"username": "canary", "email": CANARY, "enabled": not world.lies_of_all}] if is_there else []
        users = world.answer(question, moment)
        held, self.held = self.held, None
        if held:
            held[0].set()
            held[1].wait(2)
        if self.is_heard and (mailcloak.shows_owner(question, users) or not world.is_unmasked):
            self.driver.model.oracle.hear(question, at, users)
            self.driver.model.oracle.save()  # its thread writes at once
        return [record_of(account, moment) for account in moment.accounts if any(user.key == id_of(account) for user in users)]


def record_of(account, moment):
    is_barred = bool(account.federation) and id_of(account) in moment.barred
    record = {"id": account.user_id, "username": account.username, "email": account.email, "emailVerified": account.verified}
    record["enabled"] = account.state == "enabled" and not is_barred
    if account.federation:
        record["federationLink"] = account.federation
    if account.state == "locked" and not is_barred:
        record["attributes"] = {"disabledReason": ["permanentLockout"]}
    return record


class OverSockets:
    """A daemon with short limits; where the model's clock is moved, real time passes."""

    limits = Limits(ttl=0.8, negative=0.1, stale=4.0, grace=1000.0, tick=0.3)
    world_class = RealTime
    refreshes_by_itself = True
    FAULTS = ("close", "status-503", "role", "stall")

    def __init__(self, model):
        self.model, self.offset, self.faults = model, 0.0, 0
        self.files = contextlib.ExitStack()
        directory = self.files.enter_context(short_directory())
        self.keycloak = self.files.enter_context(Keycloak(self))
        self.keycloak.fault_seconds = 1.0
        self.daemon = Daemon(directory, config_in(directory, **self.blocks()))
        mailcloak.prepare_database(str(self.daemon.database), 2)
        with contextlib.closing(mailcloak.connect_database(str(self.daemon.database), 2)) as connection:
            fill_database(connection)
            connection.execute("COMMIT") if connection.in_transaction else None
        self.start()

    def blocks(self):
        world = self.model.world
        canary = [CANARY] if world.has_canary else []
        keycloak = self.keycloak.config(timeout_seconds=1.5, require_verified_email=world.verified_only, canary=canary)
        return {"keycloak": keycloak, "policy": policy_block(self.model.oracle)}

    def pass_time(self, seconds):
        time.sleep(min(seconds / 150, 1.2))

    def turn(self, down):
        """The next fault of several, or none; then until Keycloak is asked again."""
        if down:
            self.faults += 1
            fault = self.FAULTS[self.faults % len(self.FAULTS)]
            self.keycloak.role = "query-users" if fault == "role" else "view-users"
            self.keycloak.fault = None if fault == "role" else fault
            return
        was_down = self.keycloak.fault or self.keycloak.role != "view-users"
        self.keycloak.fault, self.keycloak.role = None, "view-users"
        if was_down and not self.model.world.is_unmasked:
            self.settle()

    def settle(self):
        """The probe repeats what failed, and the daemon learns nothing by that: nor does the oracle."""
        self.keycloak.is_heard = False
        number = iter(range(1000))
        nobody = {"protocol_state": "RCPT", "policy_context": "recipient"}
        wait_until(
            lambda: self.daemon.ask(**nobody, recipient=f"probe{next(number)}@d1.test").startswith("550"),
            15,
            "the end of the outage",
        )
        time.sleep(0.05)
        self.keycloak.is_heard = True

    def start(self):
        self.daemon.start()
        if not (self.model.world.down or self.model.world.is_unmasked):
            self.settle()
        return True

    def can_turn(self):
        return True

    def stop(self):
        assert self.daemon.stop() == 0

    def await_saved(self):
        wait_until(lambda: json.loads(self.daemon.ask_map("stats *")[3:])["saved"]["waiting"] == 0, 30, "what is saved")

    def kill(self):
        self.await_saved()
        self.daemon.process.kill()
        self.daemon.process.wait()

    def reload(self):
        self.await_saved()
        for name, block in self.blocks().items():
            self.daemon.config[name] = {**self.daemon.config[name], **block}
        self.daemon.reload()
        if not (self.model.world.down or self.model.world.is_unmasked):
            self.settle()

    def ask(self, question, meanwhile=(), fails_at=-1):
        world, answers = self.model.world, []
        may_fail = world.down or world.is_unmasked
        if meanwhile:
            arrived, may_go = threading.Event(), threading.Event()
            self.keycloak.held = (arrived, may_go)
            thread = threading.Thread(target=lambda: answers.append(self._ask(question)))
            thread.start()
            wait_until(lambda: arrived.is_set() or not thread.is_alive(), 10)
            self.keycloak.held = None
            for step in meanwhile:
                if step[0] == "ask" and not is_apart(question, step[1]):
                    continue  # it would wait for this very answer
                if step != ("turn", False) and not (step[0] == "lie" and world.has_canary):
                    self.model.do(step)
            may_go.set()
            thread.join()
        else:
            answers.append(self._ask(question))
        return answers[0], None if may_fail or world.down else False

    def _ask(self, question):
        time.sleep(0.02)
        self.daemon.await_log()  # what it refreshes in the background because of the question before has come, and was taken in
        if question.kind == "map":
            return self.daemon.ask_map(f"alias {question.address}")
        return self.daemon.ask(request="smtpd_access_policy", **policy_attributes(question))

    def refresh(self):
        pass

    def write(self):
        pass

    def flush(self, address):
        assert self.daemon.ask_map(f"flush {address or '*'}").startswith("OK")

    def note_flushed(self):
        self.model.oracle.save()

    def close(self):
        self.daemon.close()
        self.files.close()


def is_apart(question: Question, other: Question) -> bool:
    """Do the two ask Keycloak for different things?"""
    names = [{each.user, *each.spellings} - {""} for each in (question, other)]
    return not names[0] & names[1]


class DaemonModel(UserRules):
    driver_class = OverSockets
