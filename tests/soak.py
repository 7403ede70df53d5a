#!/usr/bin/env python3
"""A running daemon under mixed load while everything around it changes; every answer is checked against what was true.

    python tests/soak.py [--json] [SECONDS]

For SECONDS (600) two processes of five clients each ask over both sockets: recipients, senders and aliases, one by one, several at
once, in two pieces, over old connections and new ones; some leave without reading or send nonsense. At the same time aliases and apps
are changed every 100 ms by direct commits and sometimes by mailcloakctl.py, with pauses in which the daemon may recall answers; the
configuration is read again every 5 s (two files in turn, with different foreign_sender and domain); and Keycloak is killed, stopped or
answers nonsense for some seconds.

What is right is known by number. Commit n of either writer and reload n make a state that follows from n alone. A number is counted
as begun before anything is done and as done after all is; so between sending a question and receiving its answer the states from
"done when it was sent" to "begun when the answer came" may have been in force, and no other. In most windows that is one state.

A deferral (451, TEMP) is right only if the answer needs Keycloak for a user it has not confirmed yet, and only from the beginning
of an outage to BACK_SECONDS after its end. Users that the daemon has seen once are never deferred, and no existing user is ever
refused.

A first part of the run fills what has a bound. After it and at the end everything rests: all clients are gone, what is cached is
flushed. Then the daemon must have as many objects as after the first part, and as many threads and descriptors as when it was fresh.
Its resident memory says less: it grows while caches fill and while the allocators find their size.

Exit code: 0 nothing wrong, 1 something was, 130 interrupted (SIGINT, which ends the run cleanly). Where something was wrong, the
daemon's log is kept, and the last line says where.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import http.client
import itertools
import json
import math
import multiprocessing
import os
import pwd
import random
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import yaml
from conftest import ROOT, PolicyClient, SocketmapClient
from keycloak_stand_in import KeycloakStandIn

import mailcloak

# ---- how much, how often, how long

PROCESSES, CLIENTS = 2, 5  # processes that ask, and threads in each
PAUSE_SECONDS = 0.006  # at most between two questions of a client: a load, not a flood, else nobody's time limits mean much
COMMIT_SECONDS = 0.1  # between two direct commits
CTL_SECONDS = 1.5  # between two runs of mailcloakctl.py, each of which starts a Python
WRITE_SECONDS, REST_SECONDS = 8, 6  # writing and not writing by turns: answers are recalled only for a file that has settled
RELOAD_SECONDS = 5
UP_SECONDS, DOWN_SECONDS = 14, (5, 1, 3)
FAULTS = ("killed", "stopped", "status-503", "not-json", "close", "truncated")

KEYCLOAK_TIMEOUT_SECONDS = 3  # keycloak.timeout_seconds; less than its default, so that outages are through sooner
CACHE_TTL_SECONDS = 2  # so that users are asked for again all the time
CACHE_MAX_ENTRIES = 2000  # full after some seconds, so that memory has no reason to grow from then on
TOKEN_SECONDS = 10

# ---- which windows are allowed, and why

# A probe that has just begun when Keycloak returns is given up after at most PROBE_SECONDS or timeout_seconds, the next begins after
# PROBE_PAUSE_SECONDS, and its success ends the outage; the rest is for a busy machine.
BACK_SECONDS = min(KEYCLOAK_TIMEOUT_SECONDS, mailcloak.PROBE_SECONDS) + mailcloak.PROBE_PAUSE_SECONDS + 2
# The soak itself asks Keycloak all the time. Where it waits this long in no outage of its making, Keycloak or the machine is too slow
# for anybody's timeout, and that counts as an outage; the figures name it apart.
SLOW_SECONDS = KEYCLOAK_TIMEOUT_SECONDS / 4
PULSE_SECONDS = 0.25
VERDICT_SECONDS = KEYCLOAK_TIMEOUT_SECONDS + 2 * PULSE_SECONDS + 1  # a deferral is judged when the pulse of its time is there
# One lookup deadline and two waits for a writer's lock (recipient, sender); the rest is for a busy machine.
ANSWER_SECONDS = KEYCLOAK_TIMEOUT_SECONDS + 2 * mailcloak.DATABASE_BUSY_SECONDS + 8
SETTLE_SECONDS = 2 * KEYCLOAK_TIMEOUT_SECONDS + BACK_SECONDS + 10  # until what a reload replaced has ended
# Of each figure of Used, from the first rest to the last. Objects and entries were the same to the last one in rests after 18 s each,
# so one that each reload, outage or connection leaves behind is found (test_memory.py). Blocks went up and down by 300; what is allocated
# grew by up to 230 KiB in 240 s, by what the C library caches for each thread: with glibc.malloc.tcache_count=0 it went up and down too.
# Resident memory grew by 5 MiB under load and by 2 at rest in the same run, with the same objects: each thread opens SQLite's file again
# after each commit, and what that gives back lies between other things. Its bound is only for what neither Python nor malloc has.
MORE_HELD = (5, 5, 1000, 1024, 500, 8 * 1024)
FIRST_PART_SECONDS = 60

DUNNO, REJECT = "DUNNO", "550 5.1.1 No such user"
NOT_OWNED = "553 5.7.1 Sender not owned by authenticated user"
FORGED = "553 5.7.1 Sending from local domains requires authentication"
DEFER, TEMP = "451 4.3.0 Temporary authentication/lookup failure", "TEMP lookup failed"
DATABASE_FAILED = ("451 4.3.0 Temporary internal error", "TEMP database not usable")
NOTFOUND = "NOTFOUND "

# ---- what is true: states by the number of a commit or reload

KNOWN = [f"known{number}" for number in range(10)]  # users that the daemon has seen before the run
OFF = ["off0", "off1"]  # disabled in Keycloak
NUMBERED = [f"numbered{number}" for number in range(3)]  # aliases that lead to n<commit>
TURNING = [f"turning{number}" for number in range(6)]  # aliases that come and go
APPS = ["app0", "app1", "app2"]  # apps that are disabled, or lose their sender, and get it back
SQL, CTL, RELOAD = range(3)  # the writers: direct commits, mailcloakctl.py, reloads


def mixed(*numbers: int) -> int:
    """A number that looks random and is the same everywhere: a state that is some commits old differs most of the time."""
    value = 0
    for number in numbers:
        value = (value + number + 1) * 2654435761 % 2**32
        value ^= value >> 13
    return value


def turning_alias(index: int, commit: int) -> Optional[str]:
    """Which user the alias leads to; "" for a disabled one, None for none."""
    return (KNOWN[0], KNOWN[1], "", None)[mixed(index, commit) % 4]


def app_may_send(index: int, commit: int) -> bool:
    return mixed(100 + index, commit) % 3 == 0


def statements_of(commit: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """What commit number so and so does."""
    yield "UPDATE aliases SET username = ? WHERE alias_email LIKE 'numbered%'", (f"n{commit}",)
    for index, name in enumerate(TURNING):
        username = turning_alias(index, commit)
        yield "DELETE FROM aliases WHERE alias_email = ?", (f"{name}@d1.test",)
        if username is not None:
            row = (f"{name}@d1.test", username or KNOWN[0], int(bool(username)))
            yield "INSERT INTO aliases (alias_email, username, enabled) VALUES (?, ?, ?)", row
    for index, name in enumerate(APPS):
        off = mixed(100 + index, commit) % 3
        yield "UPDATE apps SET enabled = ? WHERE app_id = ?", (int(off != 1), name)
        yield "UPDATE app_from SET enabled = ? WHERE app_id = ?", (int(off != 2), name)


CTL_RUNS = (
    ("aliases", "del", "ctl@d1.test"),
    ("aliases", "add", "ctl@d1.test", "m{}"),
    ("aliases", "disable", "ctl@d1.test"),
    ("aliases", "enable", "ctl@d1.test"),
    ("apps", "disable", "ctl-app"),
    ("apps", "enable", "ctl-app"),
)  # by the number of the run modulo 6; 0 is also how it begins


def ctl_alias(run: int) -> Optional[str]:
    """As turning_alias(), of the alias that mailcloakctl.py changes."""
    return (None, f"m{run}", "", *(f"m{run - run % 6 + 1}",) * 3)[run % 6]


def ctl_app_may_send(run: int) -> bool:
    return run % 6 != 4


def policy_of(reload: int) -> dict[str, Any]:
    """What differs between the two configurations."""
    if reload % 2:
        return {"foreign_sender": "dunno", "domain": ["d1.test", "d2.test", "d3.test"]}
    return {"foreign_sender": "reject", "domain": ["d1.test", "d2.test"]}


# ---- what is true now, in memory shared with the processes that ask

WAIT, RUN, STOP = range(3)
OUTAGE, SLOW = 0.0, 1.0
LAST_TROUBLES = 1000


class World:
    """Numbers, each written by one thread, so that none needs a lock."""

    def __init__(self) -> None:
        array = multiprocessing.get_context("fork").RawArray
        self.phase = array("q", 1)
        self.rests = array("q", PROCESSES)  # 1: no client of the process is under way
        self.started_at = array("d", 1)
        self.begun, self.done = array("q", 3), array("q", 3)  # the last number of each writer
        self.commit_began_at, self.slow_commit_ended_at = array("d", 2), array("d", 2)
        self._troubles = [array("d", LAST_TROUBLES) for _ in range(3)]  # kind, begun at, over at; the last ones, as a ring
        self._trouble_count = array("q", 1)
        self._lock = threading.Lock()  # of the process that writes them

    def begin_trouble(self, kind: float, at: float) -> int:
        """Its place, for end_trouble()."""
        with self._lock:
            place = self._trouble_count[0] % LAST_TROUBLES
            for values, value in zip(self._troubles, (kind, at, math.inf)):
                values[place] = value
            self._trouble_count[0] += 1
        return place

    def end_trouble(self, place: int, at: float) -> None:
        self._troubles[2][place] = at

    def last_troubles(self) -> Iterator[tuple[float, float, float]]:
        """(kind, begun at, over at), the last one first."""
        count = self._trouble_count[0]
        for number in range(count - 1, max(-1, count - 50), -1):
            kind, begun_at, over_at = (values[number % LAST_TROUBLES] for values in self._troubles)
            yield kind, begun_at, over_at

    @contextlib.contextmanager
    def numbered(self, writer: int) -> Iterator[int]:
        """The next number of a writer, begun when the block is entered and done when it is left without an exception."""
        if writer in (SQL, CTL):
            self.commit_began_at[writer] = time.monotonic()
        self.begun[writer] += 1
        yield self.begun[writer]
        self.done[writer] += 1
        if writer in (SQL, CTL) and time.monotonic() - self.commit_began_at[writer] >= mailcloak.DATABASE_BUSY_SECONDS:
            self.slow_commit_ended_at[writer] = time.monotonic()


class Window(NamedTuple):
    """When a question was sent and its answer received, and what each writer had done by then and begun by then."""

    sent_at: float
    received_at: float
    done: Sequence[int]
    begun: Sequence[int]

    def numbers(self, writer: int) -> range:
        return range(self.done[writer], self.begun[writer] + 1)


# ---- questions and what may be answered

Rule = Callable[[Window], set[str]]


class Question(NamedTuple):
    """rule gives the right answers for a window; DEFER or TEMP among them only counts in an outage."""

    kind: str
    text: Any  # the attributes of a policy request, or a query
    rule: Rule

    @property
    def is_query(self) -> bool:
        return isinstance(self.text, str)

    def encode(self) -> bytes:
        if self.is_query:
            data = self.text.encode()
            return b"%d:%s," % (len(data), data)
        attributes = {"request": "smtpd_access_policy", "protocol_state": "RCPT", **self.text}
        return ("".join(f"{name}={value}\n" for name, value in attributes.items()) + "\n").encode()


def always(*answers: str) -> Rule:
    right = set(answers)
    return lambda window: right


def any_of(writer: int, rule: Callable[[int], set[str]]) -> Rule:
    """What rule gives for any number of this writer that may have been in force."""
    return lambda window: set().union(*(rule(number) for number in window.numbers(writer)))


def recipient(kind: str, address: str, rule: Rule) -> Question:
    return Question(kind, {"recipient": address, "policy_context": "recipient"}, rule)


def sender(kind: str, address: str, username: str, rule: Rule, method: str = "XOAUTH2") -> Question:
    login = {"sasl_username": username, "sasl_method": method} if username else {}
    return Question(kind, {"sender": address, "recipient": "x@elsewhere.test", **login}, rule)


def alias_rules(state: Callable[[int], Optional[str]], writer: int) -> dict[str, Rule]:
    """For an alias with these states: mail to it, mail to it with a tag, mail from it by the first known user, its mailbox."""

    def owned_by_first(number: int) -> set[str]:
        username = state(number)
        return {DUNNO if username == KNOWN[0] else NOT_OWNED, *(() if username else (DEFER,))}

    def mailbox(number: int) -> set[str]:
        username = state(number)
        return {f"OK {username}@d1.test"} if username else {NOTFOUND, TEMP}  # TEMP: disabled between the two looks of one query

    return {
        "recipient": any_of(writer, lambda number: {DUNNO} if state(number) else {REJECT, DEFER}),
        "tagged": any_of(writer, lambda number: {DUNNO, DEFER} if state(number) else {REJECT, DEFER}),
        "sender": any_of(writer, owned_by_first),
        "map": any_of(writer, mailbox),
    }


def app_rule(may_send: Callable[[int], bool], writer: int) -> Rule:
    return any_of(writer, lambda number: {DUNNO if may_send(number) else NOT_OWNED})


TURNING_RULES = [alias_rules(lambda number, index=index: turning_alias(index, number), SQL) for index in range(len(TURNING))]
APP_RULES = [app_rule(lambda number, index=index: app_may_send(index, number), SQL) for index in range(len(APPS))]
CTL_ALIAS, CTL_APP = alias_rules(ctl_alias, CTL), app_rule(ctl_app_may_send, CTL)
BY_FOREIGN_SENDER = any_of(RELOAD, lambda number: {DUNNO if number % 2 else NOT_OWNED})
BY_DOMAIN = any_of(RELOAD, lambda number: {REJECT, DEFER} if number % 2 else {DUNNO})
BY_COMMIT = any_of(SQL, lambda number: {f"OK n{number}@d1.test"})
BY_COMMIT_TAGGED = any_of(SQL, lambda number: {f"OK n{number}+tag@d1.test", TEMP})


def ask_turning(dice: random.Random) -> Question:
    index = dice.randrange(len(TURNING))
    name, rules = TURNING[index], TURNING_RULES[index]
    what = dice.choice(("recipient", "recipient", "tagged", "sender", "map"))
    if what == "map":
        return Question("turning alias, map", f"alias {name}@d1.test", rules["map"])
    if what == "sender":
        return sender("turning alias, sender", f"{name}@d1.test", KNOWN[0], rules["sender"])
    return recipient(f"turning alias, {what}", f"{name}{'+tag' if what == 'tagged' else ''}@d1.test", rules[what])


def ask_ctl(dice: random.Random) -> Question:
    what = dice.choice(("recipient", "map", "app"))
    if what == "app":
        return sender("app of mailcloakctl", "ctl-app@d1.test", "ctl-app", CTL_APP, "PLAIN")
    if what == "map":
        return Question("alias of mailcloakctl, map", "alias ctl@d1.test", CTL_ALIAS["map"])
    return recipient("alias of mailcloakctl, recipient", "ctl@d1.test", CTL_ALIAS["recipient"])


def ask_numbered(dice: random.Random) -> Question:
    name = dice.choice(NUMBERED)
    what = dice.random()
    if what < 0.6:
        return Question("numbered alias, map", f"alias {name}@d1.test", BY_COMMIT)
    if what < 0.8:
        return Question("numbered alias with a tag, map", f"alias {name}+tag@d1.test", BY_COMMIT_TAGGED)
    return recipient("numbered alias, recipient", f"{name}@d1.test", always(DUNNO))


def ask_known(dice: random.Random) -> Question:
    name, what = dice.choice(KNOWN), dice.random()
    address = f"{name}@d1.test"
    if what < 0.4:
        return recipient("known user, recipient", address, always(DUNNO))
    if what < 0.5:
        return recipient("known user with a tag", f"{name}+tag@d1.test", always(DUNNO, DEFER))
    if what < 0.6:
        return sender("known user, own address", address, name, always(DUNNO))
    if what < 0.7:
        return sender("known user by e-mail, own address", address, address, always(DUNNO), "PLAIN")
    if what < 0.8:
        own = {"recipient": address, "sender": address, "sasl_username": name, "sasl_method": "XOAUTH2"}
        return Question("known user to their own address", own, always(DUNNO))
    if what < 0.9:
        return Question("known user, map", f"alias {address}", always(NOTFOUND))
    return sender("known user, null sender", "", name, always(DUNNO))


def ask_unauthorised(dice: random.Random) -> Question:
    name, other = dice.sample(KNOWN, 2)
    what = dice.randrange(6)
    if what == 0:
        return sender("another's address", f"{other}@d1.test", name, always(NOT_OWNED))
    if what == 1:
        return sender("stranger's address", f"nobody{dice.randrange(10**9)}@d1.test", name, always(NOT_OWNED, DEFER))
    if what == 2:
        stranger = f"nobody{dice.randrange(10**9)}"
        return sender("unknown login", f"{stranger}@d1.test", stranger, always(NOT_OWNED, DEFER))
    if what == 3:
        off = dice.choice(OFF)
        return sender("disabled login", f"{off}@d1.test", off, always(NOT_OWNED, DEFER))
    if what == 4:
        return sender("no login", f"{name}@d1.test", "", always(FORGED))
    return sender("app, another's address", f"{name}@d1.test", dice.choice(APPS), always(NOT_OWNED), "PLAIN")


def ask_app(dice: random.Random) -> Question:
    index, what = dice.randrange(len(APPS)), dice.random()
    if what < 0.7:
        return sender("app", f"{APPS[index]}@d1.test", APPS[index], APP_RULES[index], "PLAIN")
    if what < 0.9:
        return sender("app with a known owner", "owned@d1.test", "owned", always(DUNNO), "PLAIN")
    return sender("app with a disabled owner", "orphan@d1.test", "orphan", always(NOT_OWNED, DEFER), "PLAIN")


def ask_new(dice: random.Random) -> Question:
    name = f"new{dice.randrange(20_000)}"
    if dice.random() < 0.7:
        return recipient("user not seen yet, recipient", f"{name}@d1.test", always(DUNNO, DEFER))
    return sender("user not seen yet, own address", f"{name}@d1.test", name, always(DUNNO, DEFER))


def ask_unknown(dice: random.Random) -> Question:
    if dice.random() < 0.2:
        return recipient("disabled user, recipient", f"{dice.choice(OFF)}@d1.test", always(REJECT, DEFER))
    address = f"nobody{dice.randrange(10**9)}@d{dice.choice('12')}.test"
    if dice.random() < 0.3:
        return Question("unknown, map", f"alias {address}", always(NOTFOUND))
    return recipient("unknown recipient", address, always(REJECT, DEFER))


def ask_by_config(dice: random.Random) -> Question:
    if dice.random() < 0.5:
        return recipient("recipient in a domain that comes and goes", f"nobody{dice.randrange(10**9)}@d3.test", BY_DOMAIN)
    return sender("foreign sender of a known user", "x@elsewhere.test", dice.choice(KNOWN), BY_FOREIGN_SENDER)


def ask_other(dice: random.Random) -> Question:
    what = dice.randrange(3)
    if what == 0:
        return Question("unknown map", "other x@d1.test", always("PERM unknown map other"))
    if what == 1:
        return recipient("recipient elsewhere", "x@elsewhere.test", always(DUNNO))
    return sender("foreign sender without a login", "x@elsewhere.test", "", always(DUNNO))


ASKED = {
    ask_known: 30,
    ask_turning: 18,
    ask_numbered: 14,
    ask_app: 10,
    ask_unauthorised: 8,
    ask_by_config: 7,
    ask_ctl: 4,
    ask_unknown: 4,
    ask_new: 3,
    ask_other: 2,
}  # in hundredths

# ---- the clients

COUNTS = ("answers", "one right answer", "connections", "passers-by", "wrong")
CAUSES = ("Keycloak away", "Keycloak just back", "Keycloak slow", "database locked")
# Of answers, by what they may have waited for; the last one is by how much a client's own pauses were too long.
LATENCIES = ("may need Keycloak", "around a commit", "neither", "late")
BUCKETS_PER_OCTAVE = 8  # of the latency histogram, from 1 us on
BUCKETS = 26 * BUCKETS_PER_OCTAVE  # the last one holds 64 s
MOST_COMPLAINTS = 10  # printed by one client


class Tally:
    """What one client has counted, in shared memory."""

    def __init__(self) -> None:
        array = multiprocessing.get_context("fork").RawArray
        self.counts = array("q", len(COUNTS))
        self.causes = array("q", len(CAUSES))
        self.latencies = [array("q", BUCKETS) for _ in LATENCIES]
        self.slowest = array("d", len(LATENCIES))
        self.last_back_seconds = array("d", 1)  # the longest from the end of an outage to a question that was still deferred

    def count(self, name: str) -> None:
        self.counts[COUNTS.index(name)] += 1

    def time(self, what: str, seconds: float) -> None:
        which = LATENCIES.index(what)
        bucket = int(BUCKETS_PER_OCTAVE * math.log2(max(1.0, seconds * 1e6)))
        self.latencies[which][min(bucket, BUCKETS - 1)] += 1
        self.slowest[which] = max(self.slowest[which], seconds)


class Suspect(NamedTuple):
    question: Question
    answer: Optional[str]
    right: set[str]
    window: Window


class Client:
    """One thread that asks. It has a connection to each socket, and makes others."""

    def __init__(self, name: str, world: World, tally: Tally, sockets: dict[str, str]) -> None:
        self.name, self.world, self.tally, self._sockets = name, world, tally, sockets
        self._dice = random.Random(name)
        self._kept: dict[bool, PolicyClient] = {}
        self._suspects: list[Suspect] = []  # deferrals that need an outage which is not known of yet
        self._complaints = 0

    def run(self) -> None:
        styles = {self._ask_one: 80, self._ask_several: 10, self._ask_in_pieces: 4, self._come_ask_and_go: 3, self._pass_by: 3}
        parent = os.getppid()
        while self.world.phase[0] == RUN and os.getppid() == parent:
            (style,) = self._dice.choices(list(styles), list(styles.values()))
            try:
                style()
            except Exception as exc:  # a connection refused or lost where nothing was due
                self._complain(f"{type(exc).__name__}: {exc} (in {style.__name__})")
                self._forget_connections()
            self._judge_suspects(time.monotonic() - VERDICT_SECONDS)
            pause_seconds, paused_at = self._dice.uniform(0, PAUSE_SECONDS), time.monotonic()
            time.sleep(pause_seconds)
            self.tally.time("late", time.monotonic() - paused_at - pause_seconds)
        self._forget_connections()
        if self._suspects:
            time.sleep(VERDICT_SECONDS)
            self._judge_suspects(math.inf)

    # ---- ways to ask

    def _ask_one(self) -> None:
        question = self._question()
        self._exchange(self._connection(question.is_query), [question])

    def _ask_several(self) -> None:
        first = self._question()
        others = (self._question() for _ in range(200))
        questions = [first, *itertools.islice((each for each in others if each.is_query == first.is_query), 7)]
        self._exchange(self._connection(first.is_query), questions)

    def _ask_in_pieces(self) -> None:
        question = self._question()
        data = question.encode()
        cut = self._dice.randrange(1, len(data))
        connection = self._connection(question.is_query)
        connection.send_bytes(data[:cut])
        time.sleep(self._dice.uniform(0, 0.05))
        self._exchange(connection, [question], data[cut:])

    def _come_ask_and_go(self) -> None:
        question = self._question()
        with contextlib.closing(self._connect(question.is_query)) as connection:
            self._exchange(connection, [question])

    def _pass_by(self) -> None:
        """Connect, and do not wait for an answer."""
        self.tally.count("passers-by")
        question, what = self._question(), self._dice.randrange(4)
        with contextlib.closing(self._connect(question.is_query)) as connection:
            if what == 1:
                connection.send_bytes(question.encode()[:-1])
            elif what == 2:
                connection.send_bytes(question.encode() * 3)
            elif what == 3:
                connection.send_bytes(b"\n\nnonsense\n\n")
                if connection.receive() is not None:
                    self._complain("nonsense got an answer")

    # ---- connections

    def _question(self) -> Question:
        (ask,) = self._dice.choices(list(ASKED), list(ASKED.values()))
        return ask(self._dice)

    def _connect(self, is_query: bool) -> PolicyClient:
        self.tally.count("connections")
        if is_query:
            return SocketmapClient(self._sockets["socketmap_socket"], timeout=ANSWER_SECONDS)
        return PolicyClient(self._sockets["policy_socket"], timeout=ANSWER_SECONDS)

    def _connection(self, is_query: bool) -> PolicyClient:
        """The one that is kept."""
        if is_query not in self._kept:
            self._kept[is_query] = self._connect(is_query)
        return self._kept[is_query]

    def _forget_connections(self) -> None:
        for connection in self._kept.values():
            connection.close()
        self._kept.clear()

    # ---- answers

    def _exchange(self, connection: PolicyClient, questions: Sequence[Question], data: Optional[bytes] = None) -> None:
        """Send the questions, or data if part of the only one has been sent before, and judge the answers."""
        data = data if data is not None else b"".join(question.encode() for question in questions)
        done, sent_at = self.world.done[:], time.monotonic()
        connection.send_bytes(data)
        for question in questions:
            failure: Optional[Exception] = None
            try:
                answer = connection.receive()
            except (OSError, AssertionError) as exc:  # none in time, half an answer, or none at all
                answer, failure = f"{type(exc).__name__}: {exc}", exc
            window = Window(sent_at, time.monotonic(), done, self.world.begun[:])
            if len(questions) == 1:
                self._time(question, window)
            self._judge(question, answer, window)
            if failure or answer is None:  # the daemon closed it instead of answering
                self._forget_connections()
                return

    def _time(self, question: Question, window: Window) -> None:
        what = "neither"
        if question.rule(window) & {DEFER, TEMP}:
            what = "may need Keycloak"
        elif any(len(window.numbers(writer)) > 1 for writer in (SQL, CTL)):
            what = "around a commit"
        self.tally.time(what, window.received_at - window.sent_at)

    def _judge(self, question: Question, answer: Optional[str], window: Window) -> None:
        right = question.rule(window)
        self.tally.count("answers")
        if len(right - {DEFER, TEMP}) == 1:
            self.tally.count("one right answer")
        suspect = Suspect(question, answer, right, window)
        if answer in DATABASE_FAILED and self._database_was_locked(window):
            self.tally.causes[CAUSES.index("database locked")] += 1
        elif answer not in right:
            self._complain_of(suspect, right if self._why_deferred(window) else right - {DEFER, TEMP})
        elif answer in (DEFER, TEMP):
            self._suspects.append(suspect)

    def _judge_suspects(self, until: float) -> None:
        """Deferrals that were received until then: each needs an outage around it."""
        while self._suspects and self._suspects[0].window.received_at <= until:
            suspect = self._suspects.pop(0)
            cause = self._why_deferred(suspect.window)
            if cause:
                self.tally.causes[CAUSES.index(cause)] += 1
                if cause == "Keycloak just back":
                    self._note_back(suspect.window.sent_at)
            else:
                self._complain_of(suspect, suspect.right - {DEFER, TEMP})

    def _note_back(self, sent_at: float) -> None:
        seconds = min(sent_at - over_at for kind, _, over_at in self.world.last_troubles() if kind == OUTAGE and sent_at > over_at)
        self.tally.last_back_seconds[0] = max(self.tally.last_back_seconds[0], seconds)

    def _why_deferred(self, window: Window) -> str:
        cause = ""
        for kind, begun_at, over_at in self.world.last_troubles():
            if begun_at <= window.received_at and window.sent_at <= over_at + BACK_SECONDS:
                if kind == SLOW:
                    cause = cause or "Keycloak slow"
                elif window.sent_at > over_at:
                    cause = "Keycloak just back"
                else:
                    return "Keycloak away"
        return cause

    def _database_was_locked(self, window: Window) -> bool:
        """Was one commit under way for longer than the daemon waits for a writer?"""
        busy = mailcloak.DATABASE_BUSY_SECONDS
        for writer in (SQL, CTL):
            under_way = window.begun[writer] > self.world.done[writer]
            if under_way and window.received_at - self.world.commit_began_at[writer] >= busy:
                return True
            if self.world.slow_commit_ended_at[writer] >= window.sent_at:
                return True
        return False

    def _complain_of(self, suspect: Suspect, right: set[str]) -> None:
        window, started_at = suspect.window, self.world.started_at[0]
        troubles = [
            f"{'slow' if kind == SLOW else 'away'} from {begun_at - started_at:.3f} to {over_at - started_at:.3f} s"
            for kind, begun_at, over_at in itertools.islice(self.world.last_troubles(), 2)
        ]
        self._complain(
            f"{suspect.question.kind}\n"
            f"    question: {suspect.question.text}\n"
            f"    answer:   {suspect.answer!r}\n"
            f"    allowed:  {sorted(right)}\n"
            f"    window:   {window.sent_at - started_at:.3f} to {window.received_at - started_at:.3f} s;"
            f" commits {window.done[SQL]}-{window.begun[SQL]}, runs of mailcloakctl {window.done[CTL]}-{window.begun[CTL]},"
            f" reloads {window.done[RELOAD]}-{window.begun[RELOAD]}; Keycloak {', '.join(troubles) or 'always there'}"
        )

    def _complain(self, text: str) -> None:
        self.tally.count("wrong")
        self._complaints += 1
        if self._complaints <= MOST_COMPLAINTS:
            say(f"wrong, client {self.name}, after {time.monotonic() - self.world.started_at[0]:.3f} s: {text}")


def say(text: str) -> None:
    """A message in one write, so that those of several processes do not mix."""
    sys.stderr.flush()
    os.write(2, f"\nsoak: {text}\n".encode())


def work(number: int, world: World, tallies: Sequence[Tally], sockets: dict[str, str]) -> None:
    """A process that asks."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # the soak itself ends it
    parent = os.getppid()
    clients = [Client(f"{number}.{index}", world, tally, sockets) for index, tally in enumerate(tallies)]
    world.rests[number] = 1
    while world.phase[0] != STOP and os.getppid() == parent:
        if world.phase[0] == WAIT:
            time.sleep(0.05)
            continue
        world.rests[number] = 0
        threads = [threading.Thread(target=client.run) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        world.rests[number] = 1


# ---- Keycloak, in a process of its own


class SoakKeycloak(KeycloakStandIn):
    """Knows everybody who is called known, new or off and a number, and nobody else; forgets what it was asked."""

    def note(self, kind: str, query: dict[str, str]) -> None:
        pass

    def search(self, query: dict[str, str]) -> list[dict[str, Any]]:
        username = query.get("username", "")
        if "email" in query:
            username, _, domain = query["email"].partition("@")
            username = username if domain == "d1.test" else ""
        elif "username" not in query:
            return list(super().search(query))
        base = username.rstrip("0123456789")
        if base not in ("known", "new", "off") or base == username:
            return []
        user = {"id": username, "username": username, "email": f"{username}@d1.test", "emailVerified": True}
        return [{**user, "enabled": base != "off"}]


def serve_keycloak(port: int) -> None:
    """Until standard input ends; each line of it is a fault, or "none"."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    with SoakKeycloak(port=port) as keycloak:
        keycloak.token_seconds = TOKEN_SECONDS
        print("ready", flush=True)
        for line in sys.stdin:
            keycloak.fault = None if line == "none\n" else line.strip()
            print("ready", flush=True)


class Keycloak:
    """The process, which can be killed, stopped and told to answer nonsense."""

    def __init__(self) -> None:
        self.port = free_port()
        self._process: Optional[subprocess.Popen[str]] = None
        self._fault = ""

    def start(self) -> None:
        command = [sys.executable, __file__, "--keycloak", str(self.port)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
        )
        self._wait()

    def _wait(self) -> None:
        assert self._process
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError("the stand-in for Keycloak ended")

    def _tell(self, fault: str) -> None:
        assert self._process
        self._process.stdin.write(f"{fault}\n")
        self._wait()

    def go(self, fault: str) -> None:
        self._fault = fault
        assert self._process
        if fault == "killed":
            self.close()
        elif fault == "stopped":
            self._process.send_signal(signal.SIGSTOP)
        else:
            self._tell(fault)

    def come_back(self) -> None:
        assert self._process
        if self._fault == "killed":
            self.start()
        elif self._fault == "stopped":
            self._process.send_signal(signal.SIGCONT)
        elif self._fault:
            self._tell("none")
        self._fault = ""

    def close(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {seconds} s")
        time.sleep(0.05)


def free_port() -> int:
    """Below the range from which the kernel takes ports for connections: while Keycloak is away, nobody else gets its port."""
    for port in random.sample(range(20_000, 30_000), 1000):
        with contextlib.suppress(OSError), contextlib.closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port")


# ---- the daemon


def end_with_the_soak() -> None:
    """In the child: SIGTERM when the parent dies, even by SIGKILL. Source: prctl(2), PR_SET_PDEATHSIG."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


class Used(NamedTuple):
    """What the daemon holds in memory; see soak_daemon.py."""

    objects: int
    entries: int
    blocks: int
    allocated_kib: int
    garbage: int
    resident_kib: int


class Daemon:
    """mailcloak.py with its standard error read, and kept in a file."""

    def __init__(self, config_path: Path, log_path: Path) -> None:
        program = [str(ROOT / "tests" / "soak_daemon.py"), str(ROOT / "mailcloak.py")]
        self.process = subprocess.Popen(
            [sys.executable, *program, "--config", str(config_path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, start_new_session=True,
            preexec_fn=end_with_the_soak,
        )  # fmt: skip
        self._log_path = log_path
        self.lines = 0
        self.errors: list[str] = []
        self.recent: collections.deque[str] = collections.deque(maxlen=30)  # lines that are no answers
        self._counts: dict[str, int] = {"daemon: started": 0, "daemon: reloaded": 0}
        self._changed = threading.Condition()  # guards _counts
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with self._log_path.open("wb") as log, open(self.process.stderr.fileno(), "rb", closefd=False) as lines:
            for line in lines:
                log.write(line)
                self._note(line.decode(errors="replace"))
        with self._changed:
            self._changed.notify_all()

    def _note(self, line: str) -> None:
        self.lines += 1
        level, _, message = line.partition(" ")[2].partition(" ")[2].partition(" ")
        if level == "info" and message.startswith(("policy: ", "socketmap: ")):
            return
        self.recent.append(message.strip())
        if level not in ("info", "warning") and not message.startswith("socketmap: error map=other "):
            self.errors.append(line.strip())
        with self._changed:
            for event in self._counts:
                self._counts[event] += message.startswith(event)
            self._changed.notify_all()

    def wait_for(self, event: str, count: int, seconds: float) -> None:
        """Wait until the log has had this event this many times."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._counts[event] >= count or self.process.poll() is not None, seconds):
                raise TimeoutError(f"no {event!r} for the {count}. time within {seconds} s")
        if self._counts[event] < count:
            raise RuntimeError(f"the daemon ended: {list(self.recent)}")

    def reload(self) -> None:
        count = self._counts["daemon: reloaded"] + 1
        self.process.send_signal(signal.SIGHUP)
        self.wait_for("daemon: reloaded", count, 30)

    @property
    def _proc(self) -> Path:
        return Path(f"/proc/{self.process.pid}")

    def resident_kib(self) -> int:
        return int((self._proc / "status").read_text().partition("VmRSS:")[2].split()[0])

    def used(self) -> Used:
        """Of some looks the least of each figure: what comes and goes counts for nothing."""
        looks = []
        for _ in range(5):
            self.process.stdin.write(b"?")
            if not select.select([self.process.stdout], [], [], 30)[0]:
                raise TimeoutError("the daemon does not say what memory it uses")
            looks.append(Used(**json.loads(self.process.stdout.readline())))
            time.sleep(0.2)
        return Used(*map(min, zip(*looks)))

    def held(self) -> tuple[int, int]:
        """(threads, descriptors)"""
        return len(os.listdir(self._proc / "task")), len(os.listdir(self._proc / "fd"))

    def describe_descriptors(self) -> list[str]:
        """Each with what it is; of a socket the line of /proc/net that has its inode."""
        networks = [line for kind in ("unix", "tcp") for line in (self._proc / "net" / kind).read_text().splitlines()]
        found = []
        for name in os.listdir(self._proc / "fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(self._proc / "fd" / name)
                inode = target.partition("socket:[")[2].rstrip("]")
                lines = [" ".join(line.split()) for line in networks if inode and inode in line.split()]
                found.append(" ".join([name, target, *lines]))
        return sorted(found)

    def stop(self) -> int:
        self.process.terminate()
        code = self.process.wait(mailcloak.SHUTDOWN_TOTAL_SECONDS + 15)
        self._reader.join(5)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(5)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            stream.close()


# ---- the run


class Soak:
    """All of it. The main thread starts and ends the others, and looks at the daemon once a second."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.problems: list[str] = []
        self.interrupted = threading.Event()
        self.log_kept = ""  # where the daemon's log is, if anything was wrong
        self.figures: dict[str, Any] = {}
        self._level_after = min(FIRST_PART_SECONDS, seconds / 3)
        self._directory = Path(tempfile.mkdtemp(prefix="mc", dir="/tmp"))
        self._config_path = self._directory / "config.yaml"
        self._database = self._directory / "state.db"
        self._log_path = self._directory / "daemon.log"
        self._sockets = {name: str(self._directory / name) for name in ("policy_socket", "socketmap_socket")}
        self._world = World()
        self._tallies = [Tally() for _ in range(PROCESSES * CLIENTS)]
        self._keycloak = Keycloak()
        self._stop = threading.Event()
        self._daemon: Optional[Daemon] = None
        self._resident: list[tuple[float, int]] = []  # (seconds since the beginning, KiB)
        self._outages: list[str] = []
        self._reloads_rest = False
        self._round_began_at = self._loaded_seconds = 0.0
        self._slow_seconds = self._slowest_pulse = self._slowest_commit = 0.0
        fork = multiprocessing.get_context("fork")
        # before there are threads and pipes, of which a copy must not live on in them
        self._processes = [
            fork.Process(
                target=work,
                args=(number, self._world, self._tallies[number * CLIENTS : (number + 1) * CLIENTS], self._sockets),
                daemon=True,
            )
            for number in range(PROCESSES)
        ]
        for process in self._processes:
            process.start()

    def run(self) -> None:
        """Everything, and the end of everything, whatever happens."""
        try:
            fresh = self._prepare()
            self._world.started_at[0] = time.monotonic()
            self._load(self._level_after)
            level = self._used_at_rest()
            self._load(self.seconds)
            end = self._used_at_rest()
            if level and end:
                self._ask_stats()
                self._check_memory(level, end)
                self._check_left_over(fresh)
        except Exception as exc:
            self.problems.append(f"the soak itself: {type(exc).__name__}: {exc}")
        finally:
            ran_seconds = self._loaded_seconds
            try:
                self._check_end()
            except Exception as exc:
                self.problems.append(f"the end: {type(exc).__name__}: {exc}")
            finally:
                self._close()
        self._sum_up(ran_seconds)

    def _load(self, until_seconds: float) -> None:
        """Clients, writers and outages, until the load has lasted so long in all."""
        if self.problems or self.interrupted.is_set():
            return
        self._stop.clear()
        threads = [
            threading.Thread(target=self._guarded, args=(task,), daemon=True)
            for task in (self._commit, self._run_ctl, self._reload, self._disturb_keycloak, self._feel_pulse)
        ]
        self._round_began_at = time.monotonic()
        self._world.phase[0] = RUN
        try:
            for thread in threads:
                thread.start()
            self._watch(until_seconds)
        finally:
            self._loaded_seconds += time.monotonic() - self._round_began_at
            self._end_load(threads)

    def _used_at_rest(self) -> Optional[Used]:
        """What the daemon holds with all clients gone, Keycloak there, nothing cached and nothing recalled; None if interrupted."""
        if self.interrupted.is_set():
            return None
        assert self._daemon
        until(lambda: self._stats()["keycloak"]["state"] == "answers", BACK_SECONDS + 10, "end of the outage")
        cache = self._stats()["cache"]
        if cache["users"] > CACHE_MAX_ENTRIES or cache["missing"] > CACHE_MAX_ENTRIES / 10:
            self.problems.append(f"more is cached than there is room for: {cache}")
        self._reload_once()
        while self._world.done[RELOAD] % 4:  # the same configuration each time
            self._reload_once()
        with contextlib.closing(SocketmapClient(self._sockets["socketmap_socket"], timeout=ANSWER_SECONDS)) as client:
            client.ask("flush *")
        time.sleep(2 * KEYCLOAK_TIMEOUT_SECONDS + 1)  # until workers that the last reload replaced have ended
        self._settled()
        used = self._daemon.used()
        self._ask_known()
        return used

    # ---- before

    def _prepare(self) -> tuple[int, int]:
        """Start everything and let the daemon see the known users; the threads and descriptors of a fresh one."""
        self._keycloak.start()
        self._write_config(0)
        mailcloak.prepare_database(str(self._database), mailcloak.DATABASE_BUSY_SECONDS)
        with contextlib.closing(self._open_database()) as database:
            database.execute("BEGIN")
            for name in NUMBERED:
                database.execute("INSERT INTO aliases (alias_email, username) VALUES (?, 'n0')", (f"{name}@d1.test",))
            for name, owner in [(name, None) for name in (*APPS, "ctl-app")] + [("owned", KNOWN[2]), ("orphan", OFF[0])]:
                database.execute("INSERT INTO apps (app_id, secret_hash, owner) VALUES (?, 'x', ?)", (name, owner))
                database.execute("INSERT INTO app_from (app_id, from_addr) VALUES (?, ?)", (name, f"{name}@d1.test"))
            for statement in statements_of(0):
                database.execute(*statement)
            database.execute("COMMIT")
        self._daemon = Daemon(self._config_path, self._log_path)
        self._daemon.wait_for("daemon: started", 1, 30)
        started = time.monotonic()
        until(lambda: f":{self._keycloak.port:04X} 01 " in str(self._daemon.describe_descriptors()), 30, "the daemon's self-check")
        descriptors = self._settled()[1]  # of a daemon that nobody has asked anything
        self._stop.wait(max(0.0, started + mailcloak.POSTMASTER_SECONDS + 0.5 - time.monotonic()))
        threads = self._settled()[0]  # without the timer of the start
        self._ask_known()
        return threads, descriptors

    def _ask_known(self) -> None:
        """Let the daemon see the known users."""
        with contextlib.closing(PolicyClient(self._sockets["policy_socket"], timeout=ANSWER_SECONDS)) as client:
            for name in KNOWN:
                own = {"recipient": f"{name}@d1.test", "sender": f"{name}@d1.test", "sasl_method": "XOAUTH2"}
                for username in (name, f"{name}@d1.test"):
                    answer = client.ask(**own, sasl_username=username)
                    if answer != DUNNO:
                        raise RuntimeError(f"known user {username} before the run: {answer}")

    def _settled(self) -> tuple[int, int]:
        """Threads and descriptors once they have been the same for a second."""
        assert self._daemon
        held, since = self._daemon.held(), time.monotonic()
        while time.monotonic() < since + 1:
            time.sleep(0.1)
            if self._daemon.held() != held:
                held, since = self._daemon.held(), time.monotonic()
        return held

    def _write_config(self, number: int) -> None:
        keycloak = {"base_url": f"http://127.0.0.1:{self._keycloak.port}", "realm": "mail"}
        config = {
            "keycloak": {
                **keycloak,
                "client_id": "mailcloak",
                "client_secret": "stand-in-secret-7Qz",
                "timeout_seconds": KEYCLOAK_TIMEOUT_SECONDS + number // 2 % 2 / 1000,  # every other reload replaces the workers too
            },
            "policy": {
                "recipient_delimiter": "+",
                "cache_ttl_seconds": CACHE_TTL_SECONDS,
                "negative_cache_ttl_seconds": 1,
                "cache_max_entries": CACHE_MAX_ENTRIES,
                **policy_of(number),
            },
            "sqlite": {"path": str(self._database)},
            "sockets": {**self._sockets, "socket_owner_user": pwd.getpwuid(os.geteuid()).pw_name, "socket_owner_group": ""},
            "daemon": {"user": ""},
        }
        new = self._directory / "config.new"
        new.write_text(yaml.safe_dump(config), encoding="utf-8")
        new.chmod(0o600)
        new.rename(self._config_path)

    def _open_database(self) -> sqlite3.Connection:
        return mailcloak.connect_database(str(self._database), 30)

    # ---- what changes while it runs; each in a thread of its own

    def _guarded(self, task: Callable[[], None]) -> None:
        try:
            task()
        except Exception as exc:
            self.problems.append(f"{task.__name__}: {type(exc).__name__}: {exc}")

    def _is_writing(self, ahead_seconds: float = 0) -> bool:
        elapsed = time.monotonic() - self._world.started_at[0] + ahead_seconds
        return elapsed % (WRITE_SECONDS + REST_SECONDS) < WRITE_SECONDS

    def _commit(self) -> None:
        with contextlib.closing(self._open_database()) as database:
            while not self._stop.wait(COMMIT_SECONDS):
                if not self._is_writing():
                    continue
                started = time.monotonic()
                with self._world.numbered(SQL) as number:
                    database.execute("BEGIN IMMEDIATE")
                    for statement in statements_of(number):
                        database.execute(*statement)
                    database.execute("COMMIT")
                self._slowest_commit = max(self._slowest_commit, time.monotonic() - started)

    def _run_ctl(self) -> None:
        while not self._stop.wait(CTL_SECONDS):
            if not (self._is_writing() and self._is_writing(1)):
                continue
            with self._world.numbered(CTL) as number:
                arguments = [argument.format(number) for argument in CTL_RUNS[number % 6]]
                command = [sys.executable, str(ROOT / "mailcloakctl.py"), "--db", str(self._database), *arguments]
                result = subprocess.run(
                    command, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL, start_new_session=True
                )  # fmt: skip
                if result.returncode:
                    raise RuntimeError(f"{arguments}: {result.returncode} {result.stderr}")

    def _reload(self) -> None:
        while not self._stop.wait(RELOAD_SECONDS):
            if not self._reloads_rest:
                self._reload_once()

    def _reload_once(self) -> None:
        assert self._daemon
        with self._world.numbered(RELOAD) as number:
            self._write_config(number)
            self._daemon.reload()

    def _disturb_keycloak(self) -> None:
        after_seconds = BACK_SECONDS + 2
        pauses = itertools.chain([UP_SECONDS / 2 + after_seconds], itertools.repeat(UP_SECONDS))
        for up_seconds in pauses:
            if self._stop.wait(up_seconds - after_seconds):
                return
            number = len(self._outages)
            fault, down_seconds = FAULTS[number % len(FAULTS)], DOWN_SECONDS[number % len(DOWN_SECONDS)]
            # A reload begins with no outage known: around every other one there is none, so that the daemon must notice its end itself.
            self._reloads_rest = len(self._outages) % 2 == 0
            place = self._world.begin_trouble(OUTAGE, time.monotonic())
            try:
                self._outages.append(fault)
                self._keycloak.go(fault)
                self._stop.wait(down_seconds)
                self._keycloak.come_back()
            finally:
                self._world.end_trouble(place, time.monotonic())
            self._stop.wait(after_seconds)
            self._reloads_rest = False

    def _feel_pulse(self) -> None:
        """Ask Keycloak as anybody might, and note when it is slow though nobody disturbs it."""
        while not self._stop.wait(PULSE_SECONDS):
            sent_at = time.monotonic()
            connection = http.client.HTTPConnection("127.0.0.1", self._keycloak.port, timeout=KEYCLOAK_TIMEOUT_SECONDS)
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection.request("GET", "/admin/realms/mail/users?max=1")
                connection.getresponse().read()  # 401
            connection.close()
            took_seconds, now = time.monotonic() - sent_at, time.monotonic()
            troubles = (each for each in self._world.last_troubles() if each[0] == OUTAGE)
            if any(begun_at <= now and sent_at <= over_at for _, begun_at, over_at in troubles):
                continue
            self._slowest_pulse = max(self._slowest_pulse, took_seconds)
            if took_seconds > SLOW_SECONDS:
                self._slow_seconds += took_seconds
                self._world.end_trouble(self._world.begin_trouble(SLOW, sent_at), now)

    # ---- the main thread meanwhile

    def _watch(self, until_seconds: float) -> None:
        assert self._daemon
        end = self._round_began_at + until_seconds - self._loaded_seconds
        while time.monotonic() < end and not self.problems and not self.interrupted.wait(min(1.0, max(0, end - time.monotonic()))):
            if self._daemon.process.poll() is not None:
                raise RuntimeError(f"the daemon ended with {self._daemon.process.returncode}: {list(self._daemon.recent)}")
            elapsed = self._loaded_seconds + time.monotonic() - self._round_began_at
            self._resident.append((elapsed, self._daemon.resident_kib()))
            if sys.stderr.isatty():
                self._show_progress(elapsed)

    def _show_progress(self, elapsed: float) -> None:
        assert self._daemon
        threads, descriptors = self._daemon.held()
        done = self._world.done
        sys.stderr.write(
            f"\r{elapsed:4.0f} s  {self._total('answers')} answers, {self._deferrals()} deferred, {self._total('wrong')} wrong;"
            f" {done[SQL]}+{done[CTL]} commits, {done[RELOAD]} reloads, {len(self._outages)} outages;"
            f" {self._resident[-1][1] / 1024:.1f} MiB, {threads} threads, {descriptors} descriptors \x1b[K"
        )
        sys.stderr.flush()

    def _total(self, name: str) -> int:
        return sum(tally.counts[COUNTS.index(name)] for tally in self._tallies)

    def _deferrals(self) -> int:
        return sum(sum(tally.causes) for tally in self._tallies)

    # ---- after

    def _end_load(self, threads: Sequence[threading.Thread]) -> None:
        self._stop.set()
        for thread in threads:
            if thread.ident:
                thread.join(70)
        with contextlib.suppress(Exception):
            self._keycloak.come_back()
        self._world.phase[0] = WAIT
        until(lambda: all(self._world.rests), ANSWER_SECONDS + VERDICT_SECONDS + 10, "end of the clients")
        if self._total("wrong"):
            self.problems.append(f"{self._total('wrong')} wrong answers")

    def _check_memory(self, level: Used, end: Used) -> None:
        """Nothing is left behind by what came and went."""
        self.figures.update(held_level=level._asdict(), held_end=end._asdict())
        for name, before, after, allowed in zip(Used._fields, level, end, MORE_HELD):
            if after - before > allowed:
                self.problems.append(
                    f"memory: {name} after {self._level_after:.0f} s and rest {before:,}, at the end {after:,}, allowed are {allowed} more"
                )

    def _ask_stats(self) -> None:
        """How many answers the daemon says were recalled, since the run shows little where these are few."""
        self.figures["recalled_answers"] = self._stats()["recalled_answers"]["given"]

    def _stats(self) -> Any:
        with contextlib.closing(SocketmapClient(self._sockets["socketmap_socket"], timeout=ANSWER_SECONDS)) as client:
            return json.loads(client.ask("stats all").partition(" ")[2])

    def _check_left_over(self, fresh: tuple[int, int]) -> None:
        """With all clients gone, one reload later, once what it replaced is closed: as a fresh daemon of the same configuration.

        Only the workers, which go on over a reload, may each have its connection to Keycloak by now.
        """
        assert self._daemon

        def is_level() -> bool:
            threads, descriptors = self._daemon.held()
            more = (
                mailcloak.KeycloakConfig.max_requests + 1
            )  # connections to Keycloak, and where the version of the database is read
            return bool(threads == fresh[0] and descriptors <= fresh[1] + more)

        self._write_config(0)
        self._daemon.reload()
        with contextlib.suppress(TimeoutError):
            until(is_level, SETTLE_SECONDS, "end of what was")
        held = self._daemon.held()
        self.figures.update(zip(("threads_fresh", "descriptors_fresh", "threads_end", "descriptors_end"), (*fresh, *held)))
        if not is_level():
            found = self._daemon.describe_descriptors()[:20]
            self.problems.append(
                f"left over: threads {fresh[0]} when fresh, {held[0]} now; descriptors {fresh[1]} when fresh, {held[1]} now: {found}"
            )

    def _check_end(self) -> None:
        if self._daemon is None:
            return
        if self._daemon.process.poll() is None:
            code = self._daemon.stop()
            if code:
                self.problems.append(f"the daemon ended with {code}")
        self.problems.extend(f"the daemon's log: {line}" for line in self._daemon.errors[:10])

    def _close(self) -> None:
        self._world.phase[0] = STOP
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        if self._daemon:
            self._daemon.close()
        self._keycloak.close()
        if self.problems and self._log_path.exists():
            descriptor, self.log_kept = tempfile.mkstemp(prefix="mailcloak-soak-", suffix=".log", dir="/tmp")
            os.close(descriptor)
            self._log_path.replace(self.log_kept)
        shutil.rmtree(self._directory, ignore_errors=True)

    # ---- figures

    def _percentile(self, share: float, *what: str) -> float:
        """In ms, from the histograms; within a tenth."""
        which = [LATENCIES.index(each) for each in what]
        counts = [sum(tally.latencies[each][bucket] for tally in self._tallies for each in which) for bucket in range(BUCKETS)]
        wanted = share * sum(counts)
        for bucket, total in enumerate(itertools.accumulate(counts)):
            if total >= wanted:
                return 2 ** ((bucket + 1) / BUCKETS_PER_OCTAVE) / 1000
        return 0.0

    def _sum_up(self, seconds: float) -> None:
        answers = self._total("answers")
        self.figures.update(
            seconds=round(seconds, 1),
            answers=answers,
            answers_per_second=round(answers / seconds) if seconds else 0,
            answers_with_one_right=round(self._total("one right answer") / max(1, answers), 4),
            wrong=self._total("wrong"),
            deferred={cause: sum(tally.causes[index] for tally in self._tallies) for index, cause in enumerate(CAUSES)},
            last_deferral_after_return_seconds=round(max(tally.last_back_seconds[0] for tally in self._tallies), 1),
            p50_ms=round(self._percentile(0.5, *LATENCIES[:3]), 2),
            p99_ms=round(self._percentile(0.99, *LATENCIES[:3]), 2),
            p99_without_keycloak_ms=round(self._percentile(0.99, *LATENCIES[1:3]), 2),
            p99_without_keycloak_and_commit_ms=round(self._percentile(0.99, "neither"), 2),
            p99_late_ms=round(self._percentile(0.99, "late"), 2),
            slowest_ms=round(1000 * max(max(tally.slowest[:3]) for tally in self._tallies)),
            slowest_without_keycloak_ms=round(1000 * max(max(tally.slowest[1:3]) for tally in self._tallies)),
            connections=self._total("connections"),
            passers_by=self._total("passers-by"),
            commits=self._world.done[SQL],
            slowest_commit_ms=round(1000 * self._slowest_commit),
            runs_of_mailcloakctl=self._world.done[CTL],
            reloads=self._world.done[RELOAD],
            outages=dict(collections.Counter(self._outages)),
            keycloak_slow_seconds=round(self._slow_seconds, 1),
            slowest_pulse_ms=round(1000 * self._slowest_pulse),
            level_after_seconds=round(self._level_after),
            resident_kib=[level for _, level in self._resident],
            log_lines=self._daemon.lines if self._daemon else 0,
            problems=self.problems,
        )

    def text(self) -> str:
        """The figures as a table for bench/RESULTS.md."""
        figures = self.figures
        rows = [
            ("length", f"{figures['seconds']} s"),
            ("answers", f"{figures['answers']:,}, {figures['answers_per_second']:,}/s, wrong: {figures['wrong']}"),
            ("of these with exactly one right answer", f"{100 * figures['answers_with_one_right']:.1f} %"),
            ("of these recalled", f"{figures.get('recalled_answers', 0):,}"),
            ("p50, p99", f"{figures['p50_ms']} ms, {figures['p99_ms']} ms"),
            ("p99 and slowest where Keycloak is not needed",
             f"{figures['p99_without_keycloak_ms']} ms, {figures['slowest_without_keycloak_ms']} ms"),
            ("p99 where no commit is under way either", f"{figures['p99_without_keycloak_and_commit_ms']} ms"),
            ("p99 of how late a client itself goes on after a pause", f"{figures['p99_late_ms']} ms"),
            ("deferred (451, TEMP)", ", ".join(f"{cause}: {count:,}" for cause, count in figures["deferred"].items())),
            ("last of these after the return of Keycloak", f"{figures['last_deferral_after_return_seconds']} s"),
            ("outages", ", ".join(f"{count} {fault}" for fault, count in figures["outages"].items()) or "none"),
            ("commits, runs of mailcloakctl, reloads",
             f"{figures['commits']:,}, {figures['runs_of_mailcloakctl']}, {figures['reloads']}"),
            ("connections, of which nobody waited for an answer", f"{figures['connections']:,}, {figures['passers_by']:,}"),
        ]  # fmt: skip
        if "threads_end" in figures:
            rows += [
                *(
                    (f"{name} after {figures['level_after_seconds']} s, at the end", f"{before:,}, {figures['held_end'][name]:,}")
                    for name, before in figures["held_level"].items()
                ),
                ("resident under load, at most", f"{max(figures['resident_kib']) / 1024:.1f} MiB"),
                ("threads fresh, at the end", f"{figures['threads_fresh']}, {figures['threads_end']}"),
                ("descriptors fresh, at the end", f"{figures['descriptors_fresh']}, {figures['descriptors_end']}"),
            ]  # fmt: skip
        return "\n".join(["| soak | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def main() -> int:
    parser = argparse.ArgumentParser(description="Run mailcloak under mixed load and check every answer.")
    parser.add_argument("seconds", nargs="?", type=float, default=600, help="how long the load lasts (600)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of a table")
    parser.add_argument("--keycloak", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.keycloak:
        serve_keycloak(options.keycloak)
        return 0
    soak = Soak(options.seconds)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: soak.interrupted.set())
    soak.run()
    if sys.stderr.isatty():
        sys.stderr.write("\n")
    print(json.dumps(soak.figures, indent=2) if options.json else soak.text())
    for problem in soak.problems:
        say(problem)
    if soak.log_kept:
        say(f"the daemon's log is {soak.log_kept}")
    return 1 if soak.problems else 130 if soak.interrupted.is_set() else 0


if __name__ == "__main__":
    sys.exit(main())
