"""A model of all that happens around mailcloak's memory of users, and an oracle that knows which answers are right. Driven by hypothesis.

World: the users as they are, Keycloak's lies, and the time. Oracle: what mailcloak was told, and which answers that allows. UserModel: the
rules, and a driver that asks: InProcess (a Service on a clock that is moved) or a daemon over its sockets (test_user_model.py). With the
first, last-known.db is locked and damaged as well.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sqlite3
import tempfile
from typing import Any, NamedTuple, Optional

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

import mailcloak
from mailcloak import User

USERNAMES = ("alice", "bob", "carol", "dave", "b@d1.test")  # the last is an e-mail as well
EMAILS = ("a@d1.test", "b@d1.test", "c@d1.test", "d@d2.test", "also@d1.test", "off@d1.test")
ALIASES = {"info@d1.test": ("alice", 1), "sales@d2.test": ("bob", 1), "also@d1.test": ("alice", 1), "off@d1.test": ("alice", 0)}
LISTS = {"team@d1.test": ("bob", "dave")}  # aliases with several users
APPS = {"printer": "", "scanner": "alice", "fax": "bob"}  # with their owners; each may send as APP_SENDER
APP_SENDER = "apps@d1.test"
TICK = 0.25  # of the model's clock, in seconds: sums of it are exact
STRANGERS = ("nobody", "nobody@d1.test")
NO_SENSE = "no sense"  # a row of last-known.db
NO_DATABASE = b"this is not a database, whatever its name says".ljust(100)
LOCAL = ("alice", "a@d1.test", ""), ("bob", "b@d1.test", "ldap"), ("carol", "c@d1.test", "ldap"), ("dave", "d@d2.test", "")


class Limits(NamedTuple):
    """Seconds, as in the configuration."""

    ttl: float = 120.0
    negative: float = 10.0
    stale: float = 600.0
    grace: float = 60.0
    tick: float = TICK  # at the edges of these, so many seconds either way decide nothing


class Account(NamedTuple):
    """A user as they truly are."""

    user_id: str
    username: str
    email: str
    federation: str = ""
    state: str = "enabled"  # "disabled", "locked"
    verified: bool = True


class Question(NamedTuple):
    """kind is "recipient", "map" or "sender"; address as Postfix sends it."""

    kind: str
    address: str
    login: str = ""

    @property
    def spellings(self) -> tuple[str, ...]:
        address = self.address.lower()
        local, _, domain = address.partition("@")
        return (address, f"{local.partition('+')[0]}@{domain}") if "+" in local else (address,)

    @property
    def members(self) -> tuple[str, ...]:
        """The users of the alias with several that the address is."""
        return next((LISTS[spelling] for spelling in self.spellings if spelling in LISTS), ())

    @property
    def user(self) -> str:
        """The login that has to be a user: an app's owner."""
        return APPS.get(self.login.lower(), self.login.lower())


class Moment(NamedTuple):
    """How things were from a time on."""

    since: float
    accounts: tuple[Account, ...]
    hidden: frozenset  # user_ids that Keycloak does not find
    barred: frozenset  # user_ids that it calls disabled, where they are federated


class World:
    def __init__(self) -> None:
        self.time = 1_000_000.0
        self.down = False
        self.accounts: dict[int, Account] = {}
        self.hidden: frozenset = frozenset()
        self.barred: frozenset = frozenset()
        self.serial = 0
        self.with_ids = True
        self.verified_only = False
        self.has_canary = False  # who is hidden, or called disabled, with all the federated users
        self.lies_of_all = False
        self.history: list[Moment] = []
        for number in range(len(LOCAL)):
            self.make(number)

    def make(self, number: int) -> None:
        """The user with this number, with another id than before."""
        self.serial += 1
        username, email, federation = LOCAL[number]
        self.put(number, Account(f"id{self.serial}" if self.with_ids else "", username, email, federation))

    def put(self, number: int, account: Optional[Account]) -> None:
        self.accounts.pop(number, None)
        if account:
            self.accounts[number] = account
        self.note()

    def note(self) -> None:
        """With a canary, what Keycloak says while it lies of everybody is no answer."""
        lies = (frozenset(), frozenset()) if self.is_unmasked else (self.hidden, self.barred)
        self.history.append(Moment(self.time, tuple(self.accounts.values()), *lies))

    @property
    def is_unmasked(self) -> bool:
        """Does the canary show that Keycloak lies?"""
        return self.has_canary and self.lies_of_all

    @property
    def seen_by_keycloak(self) -> Moment:
        """How things are now, with its lies."""
        return self.history[-1]._replace(hidden=self.hidden, barred=self.barred)

    def moments(self, since: float) -> list[Moment]:
        """How things were from then until now."""
        ends = [moment.since for moment in self.history[1:]] + [self.time + 1]
        return [moment for moment, end in zip(self.history, ends) if end > since]

    def record(self, account: Account, *, enabled: bool) -> User:
        """What Keycloak says of the account."""
        email = "" if self.verified_only and not account.verified else account.email
        is_locked = enabled and account.state == "locked"
        return User(account.username, email, enabled and account.state == "enabled", is_locked, account.federation, account.user_id)

    def answer(self, question: tuple[str, str], moment: Moment, is_spared: Any = lambda key: False) -> tuple[User, ...]:
        """The users that Keycloak names at that moment; it does not lie about those who are spared."""
        found = []
        for account in moment.accounts:
            spared = is_spared(account.user_id or account.username)
            if getattr(account, question[0]) == question[1] and (spared or id_of(account) not in moment.hidden):
                is_barred = bool(account.federation) and id_of(account) in moment.barred and not spared
                found.append(self.record(account, enabled=not is_barred))
        return tuple(found)


def id_of(account: Account) -> str:
    return account.user_id or account.username


class Heard(NamedTuple):
    """What was said of one user."""

    at: float
    record: Optional[User]  # None: not found
    lost: frozenset = frozenset()  # "username", "email": another user has it now
    shares: Optional[bool] = None  # the e-mail with somebody else; None: it was not asked for
    seconds: float = 0.0  # that count for the grace
    has_faded: bool = False  # the user storage shows no e-mail any more; the record has the one of before

    @property
    def is_good(self) -> bool:
        return bool(self.record and self.record.receives and not self.has_faded)


def names_of(entries: list[Heard]) -> set[str]:
    return {name for each in entries if each.record for name in each.record[:2]}


class Oracle:
    """What mailcloak was told, and whether an answer fits that and the truth. Says what is wrong with it, or nothing."""

    def __init__(self, world: World, limits: Limits) -> None:
        self.world, self.limits = world, limits
        self.mode, self.mailbox_domain, self.foreign_sender = "tempfail", "", "reject"
        self.heard: dict[str, list[Heard]] = {}
        self.saved: dict[str, list[Heard]] = {}
        self.forgotten_at = 0.0  # by a flush: what was asked for before does not count
        self.asked: dict[tuple[str, str], float] = {}  # when each question was asked last
        self.witnesses: list[tuple[str, float]] = []  # (federation, when one of it was confirmed)
        self.versions: list[dict[str, list[Heard]]] = []  # what was heard so far, as long as a slow question lasts
        self.unnamed: dict[str, float] = {}  # these are no usernames; when Keycloak was asked
        self.unread: Optional[dict[str, list[Heard]]] = None  # what is saved, while the file cannot be read
        self.was_unread = False  # the same, when the question came
        self.begun_at = 0.0
        self.answers: list[
            tuple[tuple[str, str], float, tuple[User, ...], float]
        ] = []  # that were heard meanwhile; the last: forgotten_at

    # ---- what was told

    def hear(self, question: tuple[str, str], at: float, users: tuple[User, ...]) -> bool:
        """Keycloak's answer arrives; True if somebody lost a right by it."""
        names, said, lost = {user.username for user in users}, {user.key: user for user in users}, False
        if self.unread is not None:
            self.answers.append((question, at, users, self.forgotten_at))
        sharers = [user.key for user in users if user.receives and ("email", user.email) == question]
        is_late = self.asked.get(question, 0.0) > at or at < self.forgotten_at
        self.asked[question] = max(at, self.asked.get(question, 0.0))
        self.witnesses += [(user.federation, at) for user in users if user.receives and user.email]
        for key in sharers if not is_late else ():
            last = self.heard[key][-1] if key in self.heard else None
            if last and last.at > at and self.now(key) == said[key]:
                self.heard[key] = [*self.heard[key][:-1], last._replace(shares=len(sharers) > 1)]
        for key in dict.fromkeys((*said, *self.heard)):
            before = self.now(key)
            taken = {"username"} if before and key not in said and before.username in names else set()
            if sharers and before and key not in said and before.email == question[1] and not self.shares(key):
                taken.add("email")
            if key not in self.heard and (is_late or self._was_missed(said[key], at)):
                continue  # a newer answer to the same question, or about another name of this user, did not name them
            if key in said or taken or (before and getattr(before, question[0]) == question[1]):
                was_there = self.standing(key) == "there"
                self._add(key, at, said.get(key), frozenset(taken), len(sharers) > 1 if key in sharers else None)
                if before and key in said:
                    self._hear_later(key, before, said[key])
                now = self.now(key)
                if was_there:  # a locked-out user who is still that has lost nothing more
                    is_kept = self.standing(key) == "there" and now.receives and (now.enabled or not before.enabled)
                    lost |= not (is_kept and now[:2] == before[:2])
        self.versions.append(dict(self.heard))
        for name in names:
            if self.asked.get(("username", name), 0.0) <= at:
                self.unnamed.pop(name, None)
        if question[0] == "username" and not users:
            self.unnamed[question[1]] = max(at, self.unnamed.get(question[1], 0.0))
        return lost

    def _hear_later(self, key: str, before: User, user: User) -> None:
        """A newer answer about a name that is new to the user did not show the user."""
        at = self.heard[key][-1].at
        for attribute in ("username", "email"):
            name = getattr(user, attribute)
            asked = self.asked.get((attribute, name), 0.0)
            if self.heard[key][-1].record == user and name and name != getattr(before, attribute) and asked > at:
                others = self.people(attribute, name).keys() - {key}
                is_taken = bool(others) and not (attribute == "email" and self.shares(key))
                self._add(key, asked, None, frozenset({attribute} if is_taken else ()), None)

    def _was_missed(self, user: User, at: float) -> bool:
        names = [(attribute, getattr(user, attribute)) for attribute in ("username", "email")]
        others = [entries for key, entries in self.heard.items() if key != user.key and entries[-1].at > at]
        had = {name for entries in others for each in entries if each.record for name in zip(("username", "email"), each.record)}
        return any(self.asked.get(name, 0.0) > at or name in had for name in names)

    def _add(self, key: str, at: float, record: Optional[User], lost: frozenset, shares: Optional[bool]) -> None:
        entries = self.heard.setdefault(key, [])
        if entries and at < entries[-1].at:
            return
        seconds = 0.0
        if entries and not entries[-1].is_good:
            last = record or next(each.record for each in reversed(entries) if each.record)
            if any(federation == last.federation and time > entries[-1].at for federation, time in self.witnesses):
                seconds = min(at - entries[-1].at, 2 * max(self.limits.negative, 1.0))
        email = self.now(key).email if entries and self.now(key) else ""
        has_faded = bool(record and record.federation and not record.email and email)
        record = record._replace(email=email) if has_faded else record
        self.heard[key] = [*entries, Heard(at, record, lost, shares, seconds, has_faded)]

    def save(self, is_bad: Any = lambda key: False) -> None:
        """All is written. is_bad: of these users the file has a row without sense."""
        self.saved = {key: entries for key, entries in self.heard.items() if not is_bad(key)}

    def restart(self, *, can_read: bool = True) -> None:
        """What was saved is known; who confirmed a user is not."""
        self.heard, self.witnesses, self.asked = dict(self.saved), [], {}
        self.unread, self.answers = None, []
        if not can_read:
            self.heard, self.unread, self.begun_at = {}, dict(self.saved), self.world.time

    def read(self) -> None:
        """What was saved is known now, and what was heard meanwhile came after it."""
        answers, forgotten_at, known = self.answers, self.forgotten_at, self.heard
        self.heard, self.unread, self.witnesses, self.asked, self.forgotten_at = dict(self.unread or {}), None, [], {}, 0.0
        for question, at, users, self.forgotten_at in answers:
            self.hear(question, at, users)
        self.answers, self.forgotten_at = [], forgotten_at
        self.versions.append(known)

    def forget(self, names: Optional[set]) -> None:
        for key, entries in list(self.heard.items()):
            if names is None or names & names_of(entries):
                del self.heard[key]
        if self.unread is not None:
            self.unread = {key: each for key, each in self.unread.items() if names is not None and not names & names_of(each)}
            self.answers = [
                (question, at, tuple(user for user in users if not names & {*user[:2]}), forgotten_at)
                for question, at, users, forgotten_at in self.answers
                if names is not None and question[1] not in names
            ]
        self.asked.clear()
        self.forgotten_at = self.world.time

    # ---- what follows from it

    def standing(self, key: str) -> str:
        """ "there", "bad" (found disabled, or never there), "doubted" (451) or "gone"."""
        entries = self.heard.get(key, [])
        looks = list(itertools.takewhile(lambda each: not each.is_good, reversed(entries)))[::-1]
        if entries and not looks:
            return "there"
        is_believed = any(each.record and not each.record.federation for each in looks)
        if len(looks) < len(entries) and not is_believed and sum(each.seconds for each in looks[1:]) < self.limits.grace:
            return "doubted"
        return "bad" if entries and entries[-1].record else "gone"

    def now(self, key: str) -> Optional[User]:
        """The user as mailcloak has to see them."""
        standing = self.standing(key)
        if standing == "gone":
            return None
        user, has_faded = self.last(self.heard[key]), self.heard[key][-1].has_faded
        return user._replace(email="") if has_faded and standing != "doubted" else user

    @staticmethod
    def last(entries: list[Heard]) -> User:
        """The user by these entries, without what somebody else has got since."""
        looks = list(itertools.takewhile(lambda each: not each.record, reversed(entries)))
        record = entries[-1 - len(looks)].record
        return record._replace(**dict.fromkeys((attribute for each in looks for attribute in each.lost), ""))

    def shares(self, key: str) -> bool:
        """Did Keycloak show somebody else with this user's e-mail, when it was asked for it last?"""
        email, shares = self.now(key).email, False
        for each in self.heard[key]:
            if each.record and each.record.email != email:
                shares = False
            elif each.shares is not None:
                shares = each.shares
        return shares

    def is_open(self, attribute: str, value: str, *, surely: bool = False) -> bool:
        """Went the name from one user to another, or away, so that it is not known whose it is? surely: not asked for since."""
        holders, changed_at = self.people(attribute, value), []
        for key, entries in self.heard.items():
            had = [getattr(self.last(entries[:end]), attribute) == value for end in range(1, len(entries) + 1) if entries[0].record]
            times = [each.at for each, before, now in zip(entries, [False, *had], had) if before != now]
            changed_at += times[-1:] if self.standing(key) != "gone" else []
        sharers = [key for key in holders if attribute == "email" and self.shares(key)]
        if not changed_at or len(holders) == 1 > len(sharers) or len(holders) == len(sharers) > 1:
            return False
        return not surely or self.asked.get((attribute, value), 0.0) < max(changed_at) - self.limits.tick

    def people(self, attribute: str, value: str) -> dict[str, User]:
        found = {key: self.now(key) for key in self.heard}
        return {key: user for key, user in found.items() if user and getattr(user, attribute) == value}

    def logins(self, login: str) -> dict[str, User]:
        return {**self.people("username", login), **(self.people("email", login) if "@" in login else {})}

    def is_usable(self, key: str, since: float) -> bool:
        return self.standing(key) == "there" and self.heard[key][-1].at > since

    def usable(self, login: str, since: float) -> Optional[User]:
        """The user that the login proves."""
        (key, user), *more = [*self.logins(login).items()] or [("", None)]
        if user and not more and self.is_usable(key, since) and user.enabled and user.email:
            return user if login == user.username or self.unnamed.get(login, 0.0) > since else None
        return None

    def is_bad(self, login: str) -> bool:
        """Was it found that who uses this login may not send?"""
        people = self.logins(login)
        if people:
            good = all(self.standing(key) == "there" and user.enabled and user.email for key, user in people.items())
            return not good or len({user.username for user in people.values()}) > 1
        return any(each.record and login in each.record[:2] for entries in self.heard.values() for each in entries)

    def is_doubted(self, question: Question) -> bool:
        people = [*(self.logins(question.user) if question.user else ())]
        people += [key for spelling in question.spellings for key in self.people("email", spelling)]
        people += [key for spelling in question.spellings for key in self.dispossessed("email", spelling)]
        people += [key for attribute in ("username", "email") for key in self.dispossessed(attribute, question.user)]
        for username in question.members if question.kind != "sender" else ():
            people += [*self.people("username", username), *self.dispossessed("username", username)]
        return any(self.standing(key) == "doubted" for key in people)

    def dispossessed(self, attribute: str, value: str) -> list[str]:
        """Who had the name until somebody else got it, and was not seen with another one since; where nobody has it now.

        Whose e-mail it is does not show by somebody who is disabled: it may have several users.
        """
        if any(attribute == "username" or user.receives for user in self.people(attribute, value).values()):
            return []
        had = [
            key
            for key, entries in self.heard.items()
            if any(each.record and getattr(each.record, attribute) == value for each in entries)
        ]
        return [key for key in had if self.now(key) and not getattr(self.now(key), attribute)]

    def has_lost(self, question: Question) -> bool:
        """Was the user of the login found without this sender, or without what it is an extension of, which they had before?"""
        for key in self.logins(question.user) if question.user else ():
            now, had = self.now(key), {each.record.email for each in self.heard[key] if each.record and each.record.email}
            if now and any(spelling in had and spelling != now.email for spelling in question.spellings):
                return True
        return False

    def owner(self, question: Question, since: float) -> Optional[str]:
        """Whose the address is by what was told: None, or "" where several have it; "*" for those of question.members."""
        for spelling in question.spellings:
            username, is_enabled = ALIASES.get(spelling, ("*", 1) if spelling in LISTS else ("", 0))
            if is_enabled:
                return username
            holders = self.people("email", spelling)
            if any(user.receives and self.is_usable(key, since) for key, user in holders.items()):
                return next(iter(holders.values())).username if len(holders) == 1 else ""
            if username:
                return None
        return None

    # ---- which answers are right

    def wrong(self, question: Question, text: str, *, failed: bool, began: float) -> str:
        """What is wrong with the answer. failed: Keycloak gave no answer to a question that mailcloak asked for it."""
        since = began - (self.limits.stale if failed else self.limits.ttl) - self.limits.tick
        if question.kind != "sender" and question.members:
            return self._wrong_of_several(question, text, failed=failed, began=began)
        if text.startswith(("451", "TEMP")):
            return self._wrong_deferral(question, failed=failed, began=began)
        if text.startswith(("5", "NOTFOUND")):
            return self._wrong_refusal(question, failed=failed, began=began)
        if question.kind == "map":
            owner = self.owner(question, since)
            is_right = owner and text == f"OK {self.mailbox(question, owner)}"
            return "" if is_right else f"leads to somebody who does not own the address (owner: {owner})"
        if text != "DUNNO":
            return "no answer of mailcloak's"
        if question.kind == "recipient":
            if self.owner(question, since) is not None or (failed and self.mode != "tempfail"):
                return ""
            return "accepted, though nobody is known to have this address"
        if self.may_send(question, self.usable(question.user, since) if question.user else None, since):
            return ""
        return self._wrong_failure_mode(question) if failed else "forged: accepted, but the login does not prove this sender"

    def mailbox(self, question: Question, username: str) -> str:
        domain = self.mailbox_domain or question.spellings[0].partition("@")[2]
        tag = question.address.lower().partition("@")[0].partition("+")[2]
        return username if "@" in username else f"{username}{'+' if tag else ''}{tag}@{domain}"

    def _wrong_of_several(self, question: Question, text: str, *, failed: bool, began: float) -> str:
        """Mail for an alias with several users: only those are left out who may have been gone or disabled all the time."""
        gone, since = [], began - self.limits.ttl - self.limits.tick
        entries = [each for several in self.heard.values() for each in several]
        heard = {each.record.username for each in entries if each.record}
        unheard = set(question.members) - heard  # nobody knows that they are users
        for username in question.members:
            found = self._answers("username", username, began, is_positive=False)
            may_be_gone = any(not any(user.receives for user in users) for users in found)
            gone += [username] if may_be_gone and username not in unheard else []
        here = [
            username
            for username in question.members
            if any(user.receives and self.is_usable(key, since) for key, user in self.people("username", username).items())
        ]
        # A user who was renamed has not left.
        renamed = [
            username
            for username in question.members
            for key, entries in self.heard.items()
            if self.now(key) and self.now(key).username not in ("", username)
            if any(each.record and each.record.username == username for each in entries)
        ]
        is_unread = self.unread is not None or self.was_unread  # who was known is in doubt
        if text == "TEMP all users have left":
            text = "NOTFOUND "
        if text.startswith(("451", "TEMP")):
            is_sure = set(here) - set(gone) and not failed and not is_unread
            return (
                "deferred, though one of them was there all the time"
                if is_sure
                else self._wrong_deferral(question, failed=failed, began=began)
            )
        if text.startswith(("5", "NOTFOUND")):
            return "" if len(gone) == len(question.members) and not failed else "refused, though not all of them were gone"
        if text == "DUNNO" and question.kind == "recipient":
            return "" if here or unheard or renamed or failed else "accepted, though all of them are gone"
        doubted = [name for name in question.members if self.is_doubted(Question("sender", "", name))]
        named = {username for username in question.members if self.mailbox(question, username) in text[3:].split(",")}
        if not text.startswith("OK ") or len(named) != len(text.split(",")):
            return "leads to somebody else"
        if not failed and not is_unread and not named <= {*here, *doubted, *unheard, *renamed}:
            return "leads to somebody who is gone"
        return "" if set(question.members) - named <= set(gone) else "somebody who was there all the time gets no mail"

    def may_send(self, question: Question, user: Optional[User], since: float) -> bool:
        if question.login.lower() in APPS:
            return question.address == APP_SENDER and bool(user or not question.user)
        if not user:
            return False
        if not question.address or not question.address.lower().endswith(("@d1.test", "@d2.test")):
            return not question.address or self.foreign_sender == "dunno"
        return self.owns(user.username, question, self.owner(question, since))

    @staticmethod
    def owns(username: str, question: Question, owner: Optional[str]) -> bool:
        return username in question.members if owner == "*" else username == owner

    def _wrong_failure_mode(self, question: Question) -> str:
        since = self.world.time - self.limits.stale + self.limits.tick
        if self.mode != "dunno":
            return f"forged: accepted with {self.mode}"
        if self.is_bad(question.user):
            return "accepted by the failure mode, though the user was found gone, disabled or in doubt"
        if question.login.lower() not in APPS and self.has_lost(question):
            return "accepted by the failure mode, though the user was found without this address"
        user, is_app = self.usable(question.user, since), question.login.lower() in APPS
        is_known = "+" not in question.address and self.owner(question, since) is not None
        if (is_app and question.address != APP_SENDER) or (user and user.username == question.user and (is_app or is_known)):
            return "accepted by the failure mode, though what is known decides"
        return ""

    def _wrong_deferral(self, question: Question, *, failed: bool, began: float) -> str:
        if (self.unread is not None or self.was_unread) and self.world.time < self.begun_at + self.limits.grace:
            return ""
        if self.is_doubted(question) or (question.kind == "map" and self.owner(question, began - self.limits.stale) == ""):
            return ""
        if not failed:
            return "deferred, though Keycloak gave an answer and nobody is in doubt"
        if question.kind == "sender" and self.has_lost(question):
            return ""
        if any(self.is_open("email", spelling) for spelling in question.spellings):
            return ""
        if question.user and any(self.is_open(attribute, question.user) for attribute in ("username", "email")):
            return ""
        if self.mode != "tempfail" and (question.kind == "recipient" or (question.kind == "sender" and self.mode == "dunno")):
            return f"deferred with {self.mode}, though Keycloak gave no answer"
        since = self.world.time - self.limits.stale + self.limits.tick
        owner = self.owner(question, since)
        if question.kind != "sender":
            return "deferred, though it is known whose the address is" if owner is not None and "+" not in question.address else ""
        user = self.usable(question.user, since) if question.user else None
        if self.may_send(question, user, since) and (not user or user.username == question.user) and "+" not in question.address:
            return "deferred, though the login and the sender are known"
        return ""

    def _wrong_refusal(self, question: Question, *, failed: bool, began: float) -> str:
        if question.kind == "sender" and question.user and self.must_wait(question):
            return "refused, though the user is in the grace"
        if failed:
            return self._wrong_refusal_in_outage(question, began)
        logins, owners = self._possible_logins(question, began), self._possible_owners(question, began)
        if question.kind == "recipient":
            return "" if None in owners else "refused, though the address was somebody's all the time"
        if question.kind == "map":
            is_alias = any(ALIASES.get(spelling, ("", 0))[1] for spelling in question.spellings)
            return "" if None in owners or not (is_alias or self.mailbox_domain) else "not found, though somebody has it"
        address = question.address.lower()
        if question.login.lower() in APPS:
            return "" if "" in logins or address != APP_SENDER else "refused, though app and owner are good"
        is_local = address.endswith(("@d1.test", "@d2.test"))
        if "" in logins or (not is_local and address and self.foreign_sender == "reject"):
            return ""
        if is_local and any(not self.owns(login, question, owner) for owner in owners for login in logins):
            return ""
        return "refused, though user and sender were good all the time"

    def _wrong_refusal_in_outage(self, question: Question, began: float) -> str:
        if question.kind == "recipient":
            return "refused in an outage"
        since = began - self.limits.stale - self.limits.tick
        user, address = self.usable(question.user, since) if question.user else None, question.address.lower()
        if question.kind == "map":
            return "not found in an outage" if self.owner(question, since) is not None else ""
        if question.login.lower() in APPS and address != APP_SENDER:
            return ""
        if question.user and not self.logins(question.user) and self.is_open("username", question.user, surely=True):
            return "refused in an outage, though the login went to a user that Keycloak was not asked for"
        if question.user and self.is_bad(question.user):
            return ""
        if user and not ALIASES.get(address, ("", 0))[1] and self.is_open("email", address, surely=True):
            holders = self.people("email", address)
            if user.username in [holder.username for holder in holders.values()] and all(
                self.is_usable(key, since) for key in holders
            ):
                return "refused in an outage, though Keycloak was not asked whose the address is since it went to this user"
        if user and not self.may_send(question, user, since):
            return ""
        return "refused in an outage, though nothing is known against the user"

    def must_wait(self, question: Question) -> bool:
        people = self.logins(question.user)
        return (
            bool(people)
            and all(self.standing(key) == "doubted" for key in people)
            and (question.login.lower() not in APPS or question.address == APP_SENDER)
        )

    def _is_spared(self, attribute: str, value: str) -> Any:
        """Whoever was seen under this name, and is not believed gone: no lie about them may refuse them."""

        def is_spared(key: str) -> bool:
            if self.unread is not None and key not in self.heard and self.world.time < self.begun_at + self.limits.grace:
                entries = self.unread.get(key, [])
                return bool(entries) and entries[-1].is_good and getattr(entries[-1].record, attribute) == value
            entries = self.heard.get(key, [])
            is_known = any(each.is_good for each in entries) and self.standing(key) in ("there", "doubted")
            shown = [
                each.record for each in entries if each.record
            ]  # the last may be a lie but for the names: what it lacks is given up
            return is_known and getattr(shown[-1], attribute) == value

        return is_spared

    def _moments(self, began: float, *, is_positive: bool) -> list[Moment]:
        return self.world.moments(began - (self.limits.ttl if is_positive else self.limits.negative) - self.limits.tick)

    def _answers(self, attribute: str, value: str, began: float, *, is_positive: bool) -> list[tuple[User, ...]]:
        spared = self._is_spared(attribute, value)
        moments = self._moments(began, is_positive=is_positive)
        return list(dict.fromkeys(self.world.answer((attribute, value), moment, spared) for moment in moments))

    def _possible_logins(self, question: Question, began: float) -> set:
        """The usernames that the login may have named, "" for none, while what was so may still be cached."""
        found, login = set(), question.user
        for is_positive in (True, False):
            named = self._answers("username", login, began, is_positive=is_positive)
            held = self._answers("email", login, began, is_positive=is_positive) if "@" in login else [()]
            for users, holders in itertools.product(named, held):
                result = mailcloak.resolve_login(users, holders).username if question.user else "app"
                found |= {result} if bool(result) is is_positive else set()
        return found

    def _possible_owners(self, question: Question, began: float) -> set:
        """The same of the address's owners: None for nobody, "?" for several."""
        found = set()
        for is_positive in (True, False):
            for moment in self._moments(began, is_positive=is_positive):
                owner = self._owner_at(question, moment)
                found |= {owner} if (owner is not None) is is_positive else set()
        return found

    def _owner_at(self, question: Question, moment: Moment) -> Optional[str]:
        for spelling in question.spellings:
            username, is_enabled = ALIASES.get(spelling, ("*", 1) if spelling in LISTS else ("", 0))
            if is_enabled:
                return username
            holders = self.world.answer(("email", spelling), moment, self._is_spared("email", spelling))
            holders = tuple(user for user in holders if user.email)
            if any(user.receives for user in holders):
                return holders[0].username if len(holders) == 1 else "?"
            if username:
                return None
        return None


# ---- the driver in process


class Source:
    """In place of KeycloakUsers: answers from the world, late if the model says so."""

    name = "keycloak"

    def __init__(self, config: Any, driver: InProcess) -> None:
        self.outage = mailcloak.Outage()
        self._driver, self._verified_only = driver, config.require_verified_email

    def find_users(self, question: tuple[str, str], deadline: float) -> mailcloak.Answer:
        driver, world = self._driver, self._driver.model.world
        world.time += 2**-20  # no two questions are asked at the same time
        at, moment, is_down = world.time, world.seen_by_keycloak, world.down or driver.fails_at == driver.asked
        asked_at, users = driver.clock(), world.answer(question, moment)
        driver.asked += 1
        meanwhile, driver.meanwhile = driver.meanwhile, []
        for step in meanwhile:
            driver.model.do(step)
        if world.has_canary and not mailcloak.shows_owner(question, users):  # asked again after the canary
            at, asked_at, users = world.time, driver.clock(), world.answer(question, world.seen_by_keycloak)
            is_down |= world.is_unmasked
        if is_down:
            driver.failed = True
            raise mailcloak.DirectoryUnavailable("directory: down")
        if driver.model.oracle.hear(question, at, users):
            driver.save()  # who loses a right has lost it whatever happens next
        return mailcloak.Answer(users, asked_at)

    def report(self) -> None:
        pass

    def give_up(self) -> None:
        pass

    def close(self) -> None:
        pass


class SteppedDirectory(mailcloak.UserDirectory):
    """What it would ask again in the background waits for the model."""

    def __init__(self, *arguments: Any, driver: InProcess) -> None:
        super().__init__(*arguments, clock=driver.clock)
        self._driver = driver

    def _refresh_soon(self, question: tuple[str, str]) -> None:
        self._driver.refreshes.append(question)

    def refresh(self, question: tuple[str, str]) -> None:
        with contextlib.suppress(mailcloak.DirectoryUnavailable):
            self._ask(question, 0)


class SteppedSavedUsers(mailcloak.SavedUsers):
    """What its thread would write waits for the model, and is written by it."""

    def __init__(self, *arguments: Any, driver: InProcess) -> None:
        self._driver = driver
        super().__init__(*arguments, driver.clock, driver.wall_clock)

    def _write(self) -> None:
        pass

    def step(self) -> None:
        was_read = self._taken_up
        self._write_once()
        if self._taken_up and not was_read:
            self._driver.model.oracle.read()
        if self._taken_up and not self._waiting:
            self._driver.save(self._meaning)

    @property
    def can_read(self) -> bool:
        return self._taken_up

    @property
    def is_waiting(self) -> bool:
        return bool(self._waiting)

    def wait(self, seconds: float = 1.0) -> None:
        self.step()

    def close(self) -> None:
        self.step()


class InProcess:
    """A Service without sockets, on clocks that are moved; what runs in threads elsewhere is done by steps of the model."""

    limits = Limits()
    world_class = World
    refreshes_by_itself = False

    def __init__(self, model: UserRules) -> None:
        self.model = model
        self.asked, self.fails_at, self.failed = 0, -1, False
        self.meanwhile: list[Any] = []
        self.refreshes: list[tuple[str, str]] = []
        self.offset = 0.0  # of the monotonic clock, another one after each start
        self.directory = tempfile.mkdtemp(prefix="mc", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        self._patches = {
            "KeycloakUsers": lambda config: Source(config, self),
            "UserDirectory": lambda *arguments: SteppedDirectory(*arguments, driver=self),
            "SavedUsers": lambda *arguments: SteppedSavedUsers(*arguments, driver=self),
            "DATABASE_BUSY_SECONDS": 0.0,
        }
        self._kept = {name: getattr(mailcloak, name) for name in self._patches}
        vars(mailcloak).update(self._patches)
        self.path = os.path.join(self.directory, "state.db")
        mailcloak.prepare_database(self.path, 2)
        with contextlib.closing(sqlite3.connect(self.path)) as connection:
            fill_database(connection)
        self.saved_path = mailcloak.last_known_path(self.path)
        self.holder: Optional[sqlite3.Connection] = None  # of another program, which holds last-known.db
        self.service: Any = None
        self.start()

    def clock(self) -> float:
        return self.model.world.time + self.offset

    def wall_clock(self) -> float:
        return self.model.world.time + 1_700_000_000

    def config(self) -> mailcloak.Config:
        model, problems = self.model, []
        keycloak = {"base_url": "http://127.0.0.1:1", "realm": "mail", "client_id": "m", "client_secret": "s"}
        keycloak["require_verified_email"] = model.world.verified_only
        return mailcloak.Config(
            path="",
            keycloak=mailcloak.read_block(mailcloak.KeycloakConfig, "keycloak", keycloak, problems),
            static_users=None,
            policy=mailcloak.read_block(mailcloak.PolicyConfig, "policy", policy_block(model.oracle), problems),
            sqlite=mailcloak.SqliteConfig(self.path),
            sockets=None,
            daemon=None,
        )

    def start(self) -> bool:
        """Could what is saved be read?"""
        self.service = mailcloak.Service(self.config())
        return bool(self.service.saved.can_read)

    def pass_time(self, seconds: float) -> None:
        self.model.world.time += seconds

    def save(self, meaning: Optional[str] = None) -> None:
        """The oracle's, if the file can be written; a row without sense stays until there is news of its user."""
        if self.holder or not self.is_database():
            return
        bad = set()
        if self.has_rows():
            with contextlib.closing(sqlite3.connect(self.saved_path)) as connection:
                key = (meaning or self.service.meaning, NO_SENSE)
                rows = connection.execute("SELECT user_id FROM users WHERE meaning = ? AND person = ?", key)
                bad = {json.loads(user_id) for (user_id,) in rows}
        self.model.oracle.save(lambda key: key in bad)

    def is_database(self) -> bool:
        """Or no file at all, which becomes one."""
        try:
            with open(self.saved_path, "rb") as file:
                return file.read(16) != NO_DATABASE[:16]
        except FileNotFoundError:
            return True

    def has_rows(self) -> bool:
        return self.is_database() and os.path.exists(self.saved_path) and os.path.getsize(self.saved_path) > 0

    def can_turn(self) -> bool:
        """Is the file of use to a service with other settings?"""
        return self.model.oracle.unread is None and not self.holder and self.is_database()

    def hold_file(self) -> None:
        if self.holder or not self.has_rows():
            return
        self.holder = sqlite3.connect(self.saved_path, isolation_level=None)
        self.holder.execute("BEGIN EXCLUSIVE")

    def release_file(self) -> None:
        if self.holder:
            self.holder.close()
            self.holder = None

    def damage_row(self, number: int) -> Optional[str]:
        """The user_id of the row that has no sense now."""
        if self.holder or not self.has_rows():
            return None
        with contextlib.closing(sqlite3.connect(self.saved_path)) as connection:
            rows = connection.execute("SELECT user_id FROM users WHERE meaning = ? ORDER BY 1", (self.service.meaning,)).fetchall()
            if number >= len(rows):
                return None
            key = (self.service.meaning, *rows[number])
            connection.execute("UPDATE users SET person = ? WHERE meaning = ? AND user_id = ?", (NO_SENSE, *key))
            connection.commit()
        return str(json.loads(rows[number][0]))

    def damage_file(self) -> bool:
        if self.holder or not os.path.exists(self.saved_path):
            return False
        with open(self.saved_path, "r+b") as file:
            file.write(NO_DATABASE)
        return True

    def reload(self) -> None:
        old, self.service = self.service, mailcloak.Service(self.config(), self.service)
        old.directory.close()
        self.refreshes.clear()
        if old.saved is not self.service.saved:
            old.saved.close()

    def stop(self) -> None:
        self.service.saved.close()
        self._end()

    def kill(self) -> None:
        self._end()

    def _end(self) -> None:
        self.refreshes.clear()
        self.service.directory.close()
        self.service.database.close()

    def ask(self, question: Question, meanwhile: Any = (), fails_at: int = -1) -> tuple[str, bool]:
        """(the answer, did Keycloak give none to what mailcloak asked for it?)"""
        before = self.asked, self.fails_at, self.failed, self.meanwhile
        self.asked, self.fails_at, self.failed, self.meanwhile = 0, fails_at, False, list(meanwhile)
        try:
            policy = self.service.policy
            if question.kind == "map":
                text = self.service.answer(
                    ("map", question.address), lambda facts: mailcloak.decide_alias(question.address, policy, facts)
                )[0].text
            else:
                request = policy_request(question)
                key = mailcloak.policy_question(request, policy)
                text = self.service.answer(key, lambda facts: mailcloak.decide_policy(request, policy, facts))[0].text
            return text, self.failed
        finally:
            self.asked, self.fails_at, self.failed, self.meanwhile = before

    def turn(self, down: bool) -> None:
        pass

    def settle(self) -> None:
        pass

    def refresh(self) -> None:
        questions, self.refreshes = self.refreshes, []
        for question in questions:
            self.service.directory.refresh(question)

    def write(self) -> None:
        self.service.saved.step()

    def flush(self, address: Optional[str]) -> None:
        self.service.directory.forget(address)

    def note_flushed(self) -> None:
        if not self.service.saved.is_waiting:
            self.save()

    def close(self) -> None:
        self.release_file()
        self._end()
        vars(mailcloak).update(self._kept)
        for name in os.listdir(self.directory):
            os.unlink(os.path.join(self.directory, name))
        os.rmdir(self.directory)


def policy_request(question: Question) -> mailcloak.PolicyRequest:
    attributes = policy_attributes(question)
    return mailcloak.PolicyRequest(**{**dict.fromkeys(mailcloak.PolicyRequest._fields, ""), **attributes})


def policy_attributes(question: Question) -> dict[str, str]:
    if question.kind == "recipient":
        return {"protocol_state": "RCPT", "policy_context": "recipient", "recipient": question.address}
    method = "PLAIN" if question.login.lower() in APPS else "XOAUTH2"
    return {"protocol_state": "MAIL", "sender": question.address, "sasl_username": question.login, "sasl_method": method}


def policy_block(oracle: Oracle) -> dict[str, Any]:
    limits = oracle.limits
    return {
        "domain": ["d1.test", "d2.test"],
        "recipient_delimiter": "+",
        "cache_ttl_seconds": limits.ttl,
        "negative_cache_ttl_seconds": limits.negative,
        "stale_if_error_seconds": limits.stale,
        "disappearance_grace_seconds": limits.grace,
        "keycloak_failure_mode": oracle.mode,
        "mailbox_domain": oracle.mailbox_domain,
        "foreign_sender": oracle.foreign_sender,
    }


def fill_database(connection: sqlite3.Connection) -> None:
    rows = [(address, username, enabled) for address, (username, enabled) in ALIASES.items()]
    rows += [(address, members[0], 1) for address, members in LISTS.items()]
    connection.executemany("INSERT INTO aliases (alias_email, username, enabled) VALUES (?, ?, ?)", rows)
    others = [(address, member) for address, members in LISTS.items() for member in members[1:]]
    connection.executemany("INSERT INTO alias_targets (alias_email, target) VALUES (?, ?)", others)
    for app, owner in APPS.items():
        connection.execute("INSERT INTO apps (app_id, secret_hash, owner) VALUES (?, '', ?)", (app, owner))
        connection.execute("INSERT INTO app_from (app_id, from_addr) VALUES (?, ?)", (app, APP_SENDER))
    connection.commit()


# ---- the rules

LOGINS = (*USERNAMES, *EMAILS[:4], "A@D1.test", "Alice", *APPS, *STRANGERS)
ADDRESSES = (*EMAILS, *ALIASES, *LISTS, "team+x@d1.test", "A@D1.Test", "a+tag@d1.test", "info+tag@d1.test", *STRANGERS[1:])
SENDERS = (*ADDRESSES, "", "someone@elsewhere.test", APP_SENDER)
STEPS = (1.0, 5.25, 11.0, 30.0, 61.0, 100.0, 121.0, 601.0, 5000.0)

numbers = st.integers(0, len(LOCAL) - 1)
questions = st.one_of(
    st.builds(Question, st.sampled_from(["recipient", "map"]), st.sampled_from(ADDRESSES), st.just("")),
    st.builds(Question, st.just("sender"), st.sampled_from(SENDERS), st.sampled_from(LOGINS)),
)
changes = st.one_of(
    st.tuples(st.just("state"), st.sampled_from(["enabled", "disabled", "locked", "deleted"])),
    st.tuples(st.just("username"), st.sampled_from(USERNAMES)),
    st.tuples(st.just("email"), st.sampled_from(EMAILS)),
    st.tuples(st.just("federation"), st.sampled_from(["", "ldap"])),
    st.tuples(st.just("verified"), st.booleans()),
    st.tuples(st.just("taken"), numbers),  # another user gets the address
)
lies = st.sampled_from(["none", "hides", "bars", "hides-all", "bars-all"])
steps = st.one_of(
    st.tuples(st.just("pass_time"), st.sampled_from(STEPS)),
    st.tuples(st.just("change"), numbers, changes),
    st.tuples(st.just("delete"), numbers),
    st.tuples(st.just("make"), numbers),
    st.tuples(st.just("take_address"), numbers, numbers),
    st.tuples(st.just("lie"), lies, numbers),
    st.tuples(st.just("ask"), questions),
    st.tuples(st.just("turn"), st.booleans()),
    st.tuples(st.just("flush"), st.sampled_from([None, "alice", "b@d1.test"])),
)


class UserRules(RuleBasedStateMachine):
    """A driver that is asked while the world changes around it; each answer is checked by the oracle."""

    driver_class: Any

    def __init__(self) -> None:
        super().__init__()
        self.world = self.driver_class.world_class()
        self.oracle = Oracle(self.world, self.driver_class.limits)
        self.others: dict[bool, Any] = {}  # what was heard under the other setting
        self.driver = self.driver_class(self)

    def teardown(self) -> None:
        self.driver.close()

    @initialize(
        mode=st.sampled_from(["tempfail", "dunno-recipients", "dunno"]),
        mailbox_domain=st.sampled_from(["", "mbx.test"]),
        foreign_sender=st.sampled_from(["reject", "dunno"]),
        with_ids=st.booleans(),
        has_canary=st.booleans(),
    )
    def begin(self, mode: str, mailbox_domain: str, foreign_sender: str, with_ids: bool, has_canary: bool = False) -> None:
        oracle, world = self.oracle, self.world
        world.has_canary = has_canary
        oracle.mode, oracle.mailbox_domain, oracle.foreign_sender = mode, mailbox_domain, foreign_sender
        if not with_ids:
            world.with_ids = False
            for number in list(world.accounts):
                world.make(number)
        self.driver.reload()

    def do(self, step: tuple[Any, ...]) -> None:
        getattr(self, f"_{step[0]}")(*step[1:])

    # ---- the world

    @rule(seconds=st.sampled_from(STEPS))
    def pass_time(self, seconds: float) -> None:
        self._pass_time(seconds)

    def _pass_time(self, seconds: float) -> None:
        self.driver.pass_time(seconds)

    @rule(number=numbers, change=changes)
    def change(self, number: int, change: tuple[str, Any]) -> None:
        self._change(number, change)

    def _change(self, number: int, change: tuple[str, Any]) -> None:
        account, (name, value) = self.world.accounts.get(number), change
        if name == "taken":
            self._take_address(value, number)
            return
        if not account or (name == "username" and any(each.username == value for each in self.world.accounts.values())):
            return
        if name != "state" and name != "federation" and not self._may_rename(number):
            return
        self.world.put(number, None if value == "deleted" else account._replace(**{name: value}))

    def _may_rename(self, number: int) -> bool:
        """No oftener than mailcloak remembers former names."""
        self.renamed = getattr(self, "renamed", {})
        self.renamed[number] = self.renamed.get(number, 0) + 1
        return self.renamed[number] < 4

    @rule(number=numbers)
    def delete(self, number: int) -> None:
        self._delete(number)

    def _delete(self, number: int) -> None:
        self.world.put(number, None)

    @rule(number=numbers)
    def make(self, number: int) -> None:
        self._make(number)

    def _make(self, number: int) -> None:
        if not any(each.username == LOCAL[number][0] for key, each in self.world.accounts.items() if key != number):
            self.world.make(number)

    @rule(number=numbers, other=numbers)
    def take_address(self, number: int, other: int) -> None:
        self._take_address(number, other)

    def _take_address(self, number: int, other: int) -> None:
        """One user gets another's address, who gets a new one."""
        accounts = self.world.accounts
        if number != other and number in accounts and other in accounts and self._may_rename(number) and self._may_rename(other):
            email = accounts[other].email
            accounts[other] = accounts[other]._replace(email=f"new{other}@d1.test")
            self.world.put(number, accounts[number]._replace(email=email))

    @rule(lie=lies, number=numbers)
    def lie(self, lie: str, number: int) -> None:
        self._lie(lie, number)

    def _lie(self, lie: str, number: int) -> None:
        """ "hides" is said of anybody, "bars" only of the federated."""
        world = self.world
        those = {id_of(each) for key, each in world.accounts.items() if each.federation if lie.endswith("-all") or key == number}
        if lie == "hides" and number in world.accounts:
            those = {id_of(world.accounts[number])}
        world.hidden = frozenset(those) if lie.startswith("hides") else frozenset()
        world.barred = frozenset(those) if lie.startswith("bars") else frozenset()
        was_unmasked, world.lies_of_all = world.is_unmasked, lie.endswith("-all")
        world.note()
        if was_unmasked and not world.is_unmasked and not world.down:
            self.driver.settle()

    @rule(down=st.booleans())
    def turn(self, down: bool) -> None:
        self._turn(down)

    def _turn(self, down: bool) -> None:
        self.world.down = down
        self.driver.turn(down)

    # ---- questions

    def _ask(self, question: Question, meanwhile: Any = (), fails_at: int = -1) -> None:
        oracle, began = self.oracle, self.world.time
        oracle.was_unread = oracle.unread is not None
        several = meanwhile or self.driver.refreshes_by_itself
        if several:
            oracle.versions = [dict(oracle.heard)]
        text, failed = self.driver.ask(question, meanwhile, fails_at)
        self.check(question, text, failed=failed, began=began, versions=list(oracle.versions) if several else ())

    def check(self, question: Question, text: str, *, failed: Optional[bool], began: float, versions: Any = ()) -> None:
        """failed=None: not known. versions: what was known from the question to its answer, where things happened meanwhile; by any it may be right."""
        now, wrong = self.oracle.heard, "unknown"
        for self.oracle.heard in (now, *versions):
            for each in (True, False) if failed is None else (failed,):
                wrong = wrong and self.oracle.wrong(question, text, failed=each, began=began)
        self.oracle.heard = now
        assert not wrong, f"{question} failed={failed} mode={self.oracle.mode}: {text!r}: {wrong}\n{self.describe()}"

    def describe(self) -> str:
        heard = "".join(f"\n  {key} {self.oracle.standing(key)}: {entries[-4:]}" for key, entries in self.oracle.heard.items())
        return f"time {self.world.time}, users {self.world.history[-1]}\nheard:{heard}"

    @rule(question=questions)
    def ask(self, question: Question) -> None:
        self._ask(question)

    @rule(question=questions, meanwhile=st.lists(steps, min_size=1, max_size=3))
    def ask_slow_keycloak(self, question: Question, meanwhile: list[Any]) -> None:
        """All this happens between the question and Keycloak's answer."""
        self._ask(question, meanwhile)

    @rule(question=questions, number=st.integers(0, 1))
    def ask_failing_keycloak(self, question: Question, number: int) -> None:
        """This question to Keycloak gets no answer, the others do."""
        self._ask(question, (), number)

    @rule(login=st.sampled_from(LOGINS))
    def ask_all_of_login(self, login: str) -> None:
        """The login with each kind of sender, and what would come in for it."""
        for sender in ("info@d1.test", "a@d1.test", "b@d1.test", ""):
            self._ask(Question("sender", sender, login))
        if "@" in login:
            self._ask(Question("recipient", login))

    @rule(question=questions, number=numbers, seconds=st.sampled_from([5.25, 20.0, 100.0]), times=st.integers(2, 6))
    def watch(self, question: Question, number: int, seconds: float, times: int) -> None:
        """Some time, in which Keycloak is asked for this and for somebody else."""
        for _ in range(times):
            self._pass_time(seconds)
            if number in self.world.accounts:
                self._ask(Question("recipient", self.world.accounts[number].email))
            self._ask(question)

    @rule(number=numbers, change=changes, by_email=st.booleans(), seconds=st.sampled_from(STEPS), flushed=st.booleans())
    def overtake(self, number: int, change: tuple[str, Any], by_email: bool, seconds: float, flushed: bool = False) -> None:
        """While one question about a user is slow, the user changes, and an answer to another question says so."""
        account = self.world.accounts.get(number)
        if account:
            self._pass_time(seconds)
            asked = [Question("sender", "", account.username), Question("recipient", account.email)]
            slow, fast = asked[::-1] if by_email else asked
            self._ask(slow, [("pass_time", 1.0), ("change", number, change), ("flush", None) if flushed else ("ask", fast)])
            for question in (*asked, Question("sender", account.email, account.username), Question("sender", "", account.email)):
                self._ask(question)

    @rule(number=numbers, change=changes, seconds=st.sampled_from(STEPS), goes_down=st.booleans())
    def change_and_ask(self, number: int, change: tuple[str, Any], seconds: float, goes_down: bool) -> None:
        """A user changes, is asked about under one name, and then, perhaps in an outage, under the others."""
        account = self.world.accounts.get(number)
        if account:
            by_email = Question("sender", "", account.email)
            self._ask(by_email)
            self._change(number, change)
            self._pass_time(seconds)
            now = self.world.accounts.get(number, account)
            self._ask(Question("sender", "", now.username if number % 2 else now.email))
            if goes_down:
                self._turn(True)
            for question in (by_email, Question("sender", "info@d1.test", account.username), Question("recipient", account.email)):
                self._ask(question)

    @rule(number=numbers, other=numbers, lie=lies, seconds=st.sampled_from([5.25, 20.0, 100.0, 700.0]), times=st.integers(2, 6))
    def outlast(self, number: int, other: int, lie: str, seconds: float, times: int) -> None:
        """Keycloak lies about a user for a while, in which somebody else is confirmed."""
        account = self.world.accounts.get(number)
        if account:
            self._ask(Question("sender", "", account.username))
            self._lie(lie, number)
            for _ in range(times):
                self._pass_time(seconds)
                if other in self.world.accounts:
                    self._ask(Question("recipient", self.world.accounts[other].email))
                self._ask(Question("sender", account.email, account.username))

    @rule(
        numbers=st.permutations([1, 3]).flatmap(lambda both: st.sampled_from([both, both[:1]])),
        how=st.sampled_from(["hides", "bars", "disabled", "deleted"]),
        seconds=st.sampled_from([5.25, 20.0, 100.0]),
        times=st.integers(1, 4),
    )
    def leave(self, numbers: list[int], how: str, seconds: float, times: int) -> None:
        """One user of the alias with several leaves, or both do, or Keycloak says so; somebody else is confirmed."""
        self._ask_for_several()
        for number in numbers:
            if how in ("hides", "bars"):
                self._lie(how if len(numbers) == 1 else f"{how}-all", number)
            else:
                self._change(number, ("state", how))
        for _ in range(times):
            self._pass_time(seconds)
            for number in (0, 2):
                if number in self.world.accounts:
                    self._ask(Question("recipient", self.world.accounts[number].email))
            self._ask_for_several()

    def _ask_for_several(self) -> None:
        for address, members in LISTS.items():
            questions = [Question("recipient", address), Question("map", address)]
            for question in [*questions, *(Question("sender", address, member) for member in members)]:
                self._ask(question)

    # ---- mailcloak itself

    @rule()
    def refresh_in_background(self) -> None:
        self.driver.refresh()

    @rule()
    def write_file(self) -> None:
        self.driver.write()

    @rule(offset=st.sampled_from([0.0, -999_000.0, 500_000.0]), seconds=st.sampled_from(STEPS))
    def restart(self, offset: float, seconds: float) -> None:
        self.driver.stop()
        self._begin(offset, seconds)

    @rule(offset=st.sampled_from([0.0, -999_000.0, 500_000.0]), seconds=st.sampled_from(STEPS))
    def kill(self, offset: float, seconds: float) -> None:
        self.driver.kill()
        self._begin(offset, seconds)

    def _begin(self, offset: float, seconds: float) -> None:
        self.others = {setting: (saved, saved, unnamed) for setting, (_, saved, unnamed) in self.others.items()}
        self.driver.pass_time(seconds)
        self.driver.offset = offset
        self.oracle.restart(can_read=self.driver.start())

    @rule(mode=st.sampled_from(["tempfail", "dunno-recipients", "dunno"]))
    def reload(self, mode: str) -> None:
        self.oracle.mode = mode
        self.driver.reload()

    @rule()
    def reload_with_other_meaning(self) -> None:
        """keycloak.require_verified_email is turned; what was known under the other setting counts again."""
        oracle, world = self.oracle, self.world
        old = world.verified_only
        if not self.driver.can_turn():
            return
        world.verified_only = not old
        self.driver.reload()
        self.others[old] = (oracle.saved, oracle.saved, oracle.unnamed)
        oracle.heard, oracle.saved, oracle.unnamed = self.others.pop(not old, ({}, {}, {}))
        oracle.heard, oracle.saved, oracle.unnamed = dict(oracle.heard), dict(oracle.saved), dict(oracle.unnamed)
        oracle.witnesses, oracle.asked = [], {}
        world.history = [world.history[-1]._replace(since=world.time)]

    @rule(address=st.one_of(st.none(), st.sampled_from([*USERNAMES, *EMAILS[:4]])))
    def flush(self, address: Optional[str]) -> None:
        self._flush(address)

    def _flush(self, address: Optional[str]) -> None:
        self.driver.flush(address)
        self.oracle.forget(None if address is None else {address})
        self.driver.note_flushed()


class UserModel(UserRules):
    """In process, with all that can happen to last-known.db."""

    driver_class: Any = InProcess

    @rule()
    def hold_file(self) -> None:
        """Another program locks it."""
        self.driver.hold_file()

    @rule()
    def release_file(self) -> None:
        self.driver.release_file()

    @rule(number=numbers)
    def damage_row(self, number: int) -> None:
        user_id = self.driver.damage_row(number)
        if user_id:
            self.oracle.saved.pop(user_id, None)
            if self.oracle.unread:
                self.oracle.unread.pop(user_id, None)

    @rule()
    def damage_file(self) -> None:
        """All that is in it is lost, and what is known in memory is written again."""
        if self.driver.damage_file():
            self.oracle.saved = {}
            self.others = {setting: ({}, {}, {}) for setting in self.others}
            if self.oracle.unread:
                self.oracle.unread = {}
