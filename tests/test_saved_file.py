"""last-known.db in other hands: while mailcloak uses it, it is deleted, replaced and copied over, and the configuration changes too.

Histories at random. Whoever has used the file until now has all its users in it when it closes, as it knew them last.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import tempfile
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

import mailcloak

MEANINGS = ("a", "b", "c")
NAMES = ("alice", "bob")
MOMENTS = [("BEGIN IMMEDIATE", "delete"), ("BEGIN IMMEDIATE", "replace"), ("BEGIN IMMEDIATE", "copy over")]
MOMENTS += [("COMMIT", "delete"), ("COMMIT", "replace")]  # whoever copies over the file in the middle of that is not noticed


def read_rows(path):
    """{meaning: {username: enabled}} on the disk."""
    found = {meaning: {} for meaning in MEANINGS}
    if os.path.exists(path):
        with contextlib.closing(sqlite3.connect(path)) as database, contextlib.suppress(sqlite3.OperationalError):  # no table yet
            for meaning, person in database.execute("SELECT meaning, person FROM users"):
                username, _, enabled, *_ = json.loads(person)["user"]
                found[meaning][username] = enabled
    return found


class FileInOtherHands(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.directory = tempfile.mkdtemp()
        self.path, self.older = (os.path.join(self.directory, name) for name in ("last-known.db", "older.db"))
        self.connect, self.swap = mailcloak.connect_database, None
        mailcloak.connect_database = self.connect_and_swap
        self.saved, self.store, self.known = {}, {}, {}  # each by meaning; known: what is to be in the file
        self.use("a")

    def connect_and_swap(self, path, *arguments):
        """Another file comes to the path before SQLite has its lock, or while what it wrote is not yet on the disk."""
        connection = self.connect(path, *arguments)
        if self.swap and path == self.path:
            connection.set_trace_callback(self.swap_at)
        return connection

    def swap_at(self, statement):
        if self.swap and statement == self.swap[0]:
            (_, how), self.swap = self.swap, None
            self.hands(how)

    def use(self, meaning):
        self.known[meaning] = read_rows(self.path)[meaning]
        self.store[meaning] = mailcloak.UserStore(mailcloak.PolicyConfig(domain=frozenset({"d1.test"})))
        self.saved[meaning] = mailcloak.SavedUsers(self.path, meaning, self.store[meaning])

    def learn_one(self, meaning, name, *, enabled):
        user = mailcloak.User(name, f"{name}@d1.test", enabled, user_id=f"id-{name}")
        self.store[meaning].learn(("username", name), mailcloak.Answer((user,), time.monotonic()))
        self.known[meaning][name] = enabled
        self.saved[meaning].wait(10)

    @rule(place=st.integers(0, 1), name=st.sampled_from(NAMES), enabled=st.booleans(), is_kept=st.booleans())
    def learn(self, place, name, enabled, is_kept):
        if is_kept and os.path.exists(self.path):
            shutil.copy(self.path, self.older)
        self.learn_one([*self.saved][place % len(self.saved)], name, enabled=enabled)

    def hands(self, how):
        """What somebody does to the file."""
        if how == "delete":
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        elif how == "copy over" and os.path.exists(self.older):
            shutil.copyfile(self.older, self.path)
        elif os.path.exists(self.older):
            shutil.copy(self.older, f"{self.path}-copy")
            os.replace(f"{self.path}-copy", self.path)

    @rule(how=st.sampled_from(["delete", "replace", "copy over"]))
    def meddle(self, how):
        self.hands(how)

    @rule(moment=st.sampled_from(MOMENTS), name=st.sampled_from(NAMES), enabled=st.booleans())
    def meddle_while_it_is_written(self, moment, name, enabled):
        meaning = next(iter(self.saved))
        self.swap = moment
        self.learn_one(meaning, name, enabled=enabled)
        deadline = time.monotonic() + 10
        while self.saved[meaning].report()["waiting"] and time.monotonic() < deadline:
            time.sleep(0.001)
        self.swap = None

    @precondition(lambda self: len(self.saved) == 1)
    @rule(meaning=st.sampled_from(MEANINGS))
    def reload(self, meaning):
        """With another base_url or realm, say; the one before goes on for some seconds."""
        if meaning not in self.saved:
            self.use(meaning)

    @precondition(lambda self: len(self.saved) == 2)
    @rule()
    def retire(self):
        meaning = next(iter(self.saved))
        self.saved.pop(meaning).close(10)
        assert read_rows(self.path)[meaning] == self.known[meaning]

    def teardown(self):
        mailcloak.connect_database = self.connect
        for saved in self.saved.values():
            saved.close(10)
        found = read_rows(self.path)
        shutil.rmtree(self.directory)
        assert {meaning: found[meaning] for meaning in self.saved} == {meaning: self.known[meaning] for meaning in self.saved}


@pytest.mark.parametrize("examples", [30, pytest.param(600, marks=pytest.mark.long)])
def test_all_users_are_in_the_file_whatever_others_do_to_it(monkeypatch, examples):
    monkeypatch.setattr(mailcloak, "SAVE_RETRY_SECONDS", 0.01)
    run_state_machine_as_test(FileInOtherHands, settings=settings(max_examples=examples, stateful_step_count=15, deadline=None))


def history(*steps):
    """These steps alone, by name and arguments."""
    machine = FileInOtherHands()
    for name, arguments in steps:
        getattr(machine, name)(**arguments)
    machine.teardown()


LEARN = [("learn", {"place": 0, "name": "alice", "enabled": enabled, "is_kept": True}) for enabled in (True, False)]


@pytest.mark.parametrize("how", ["delete", "replace", "copy over"])
def test_first_to_see_another_file_is_the_one_of_a_new_configuration(how):
    history(*LEARN, ("meddle", {"how": how}), ("reload", {"meaning": "b"}), ("retire", {}))


def test_file_behind_a_link_is_replaced(tmp_path):
    machine, target = FileInOtherHands(), tmp_path / "last-known.db"
    machine.saved["a"].wait(10)
    os.replace(machine.path, target)
    os.symlink(target, machine.path)
    for name, arguments in LEARN:
        getattr(machine, name)(**arguments)
    shutil.copy(machine.older, tmp_path / "copy")
    os.replace(tmp_path / "copy", target)
    machine.teardown()


@pytest.mark.parametrize("moment", MOMENTS, ids=" ".join)
def test_file_that_is_written_is_taken_away_meanwhile(monkeypatch, moment):
    monkeypatch.setattr(mailcloak, "SAVE_RETRY_SECONDS", 0.01)
    history(*LEARN, ("meddle_while_it_is_written", {"moment": moment, "name": "bob", "enabled": False}))
