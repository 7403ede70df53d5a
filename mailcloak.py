#!/usr/bin/env python3
# mailcloak: who may receive and who may send, asked by Postfix, answered from Keycloak and SQLite. MIT licence, see LICENSE.
"""Tell Postfix whether a recipient exists, whether a sender may use an address, and where an alias leads.

Postfix asks over two Unix sockets:

  policy      smtpd access policy delegation (SMTPD_POLICY_README). At RCPT: is there such a recipient, and may this client use this
              sender? At MAIL: the sender alone. Answers DUNNO, 550, 553 or 451.
  socketmap   virtual_alias_maps (socketmap_table(5)), map name "alias": the mailboxes that an alias leads to. The maps "stats",
              "explain" and "flush" are mailcloakctl's.

Read at start:  the configuration, /etc/mailcloak/config.yaml unless another is named; config.yaml.sample explains each key.
Written:        beside the database, last-known.db: what Keycloak said last of each user, for a restart; and last-used.json: when
                each app was last used; the database itself only to create it, or to bring an older one to this version, after a copy.
Asked:          Keycloak, by its admin REST interface, for users: their names, primary e-mail, and whether they are enabled;
                the database, one SQLite file that mailcloakctl edits, for aliases and for apps (logins that may only send).
Signals:        SIGTERM and SIGINT answer what was read and end; SIGHUP reads the configuration again.
Environment:    LISTEN_*, NOTIFY_SOCKET, WATCHDOG_* and JOURNAL_STREAM of a service manager (sd_listen_fds(3), sd_notify(3),
                sd-daemon(3)).
Exit codes:     0 ended by a signal, or the configuration is good; 64 usage; 78 configuration; 1 anything else.

Security: started as root, the daemon binds its sockets and becomes daemon.user. The policy service never answers OK or any other
permission, only DUNNO ("no objection"). When it cannot know, it says 451 ("try later"), since a wrong 550 loses a message for good;
policy.keycloak_failure_mode may let mail pass instead. It sees envelopes, never message headers. No secret, token or password is logged.

Contents:
   1 Constants, errors, text for the log   limits with unit and source, the tree of exceptions
   2 Addresses                             one form for each address, the one that Postfix acts on
   3 Decisions                             why a recipient or a sender is accepted, refused (550, 553) or deferred (451)
   4 Wire protocols                        bytes to requests, answers to bytes
   5 Config                                the YAML file, checked as a whole
   6 Database                              the daemon's SQL on aliases and apps
   7 Keycloak                              what a request and an answer mean
   8 Directory                             who runs the requests; what is cached and saved of users, and what still counts
   9 Answers                               facts for a decision, recalled answers, explain, the service of one configuration;
                                          when an app was used
  10 Servers                               connections: read, decide, write, log
  11 Process                               sockets, privileges, signals, reload
  12 main                                  arguments, start, exit code
An answer that surprises: mailcloakctl ask explains it, and each reason= of the log is an entry of REASONS, at the end of section 3.
  550 No such user          decide_recipient, find_owner (3); who counts: User.receives (3), read_user (7), judge (8). That nobody has an
                            address is cached for policy.negative_cache_ttl_seconds
  553 Sender not owned      decide_sender and what it calls (3); which user a login names: resolve_login (3), judge_login (8)
  451                       UNKNOWN (3), and the other Actions with DIRECTORY_FAILED or INTERNAL_ERROR. in-grace: judge (8) says who is doubted,
                            judge_holders and judge_login (8) of which name it is not known who has it, UserDirectory._find (8) raises it
  Keycloak is away          UserDirectory._find_in_outage (8), policy.keycloak_failure_mode in section 3
  a change of the database  Database.version (6), RecalledAnswers (9): it counts from the next request on
  kept over a restart       Person, SavedUsers (8): users; not rows, answers, or which names nobody has
Words: a row is remembered, a user is cached (and saved on the disk), a whole answer is recalled. In the grace, a user who is suddenly
missing still counts as perhaps there. A canary is a user who is always there: if it is missing, Keycloak is faulty.

Implements SMTPD_POLICY_README, access(5), socketmap_table(5), the extension rules of Postfix's recipient_delimiter, RFC 3463 status
codes, the OAuth 2.0 client credentials grant (RFC 6749, section 4.4) and the user search of Keycloak's admin REST interface.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import functools
import gc
import grp
import io
import json
import logging
import math
import operator
import os
import pwd
import queue
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import stat
import struct
import sys
import syslog
import threading
import time
import urllib.parse
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, Callable, ClassVar, Generic, NamedTuple, Optional, Protocol, TypeVar, Union, cast

try:
    import yaml
except ImportError as error:  # the first that a copy on a new host meets
    sys.exit(f"mailcloak: {error}: install PyYAML (python3-yaml; RHEL: python3-pyyaml; Alpine: py3-yaml)")

if TYPE_CHECKING:
    import requests

__version__ = "0.1.0"


# ---------------------------------------------------------------------------------------------------------------------------------
# 1. Constants, errors, text for the log
# "Not found" is never an exception. Any thread enters; nothing here waits.
# ---------------------------------------------------------------------------------------------------------------------------------

DEFAULT_CONFIG_PATH = "/etc/mailcloak/config.yaml"
DEFAULT_DATABASE_PATH = "/var/lib/mailcloak/state.db"

MAX_POLICY_REQUEST_BYTES = 16 * 1024  # a full request of Postfix 3.7 is about 700 bytes; its longest attributes are addresses
MAX_SOCKETMAP_QUERY_BYTES = 10_000  # Postfix itself never sends a key longer than an SMTP line
MAX_ADDRESS_CHARS = 254  # RFC 5321, section 4.5.3.1.3: a path of 256 octets with its angle brackets
MAX_LABEL_CHARS = 63  # RFC 1035, section 2.3.4: of a domain, in A-label form
MAX_SOCKETMAP_REPLY_BYTES = 100_000  # Postfix takes no longer answer. Source: socketmap_table(5)
MAX_ROUTES = 20  # hosts in one address, such as c!b!user@a
MAX_SOCKET_PATH_BYTES = 107  # unix(7): sun_path holds 108 bytes, a terminating NUL included
MAX_LOG_LINE_BYTES = 4096  # on standard error; what is beyond is cut off
MAX_LOG_LINES_WAITING = 4000  # to be written; beyond, lines are lost
MAX_LOGGED_CHARS = 2000  # of a request that waits for its line to be made; a longer one is not kept for that
MAX_LOG_LINES_AT_ONCE = 200  # in one system call
LOG_GATHER_SECONDS = 0.005  # a line waits this long for others: to wake a thread for each would cost more than the line
LOG_END_SECONDS = 0.7  # how long the program's end waits for the log
LISTEN_BACKLOG = 1024  # a full backlog fails Postfix's non-blocking connect at once; the kernel caps it at net.core.somaxconn
RECEIVE_BYTES = 16 * 1024  # one recv; takes any whole request
REQUEST_SECONDS = 10  # a request that was begun must be whole after this; between requests a client may rest for ever
SEND_TIMEOUT_SECONDS = 10  # a client that does not read its answers is dropped after this
POLL_SECONDS = 0.2  # how often a server looks whether it is to end
LOOK_SECONDS = 30.0  # how often the main thread looks whether the servers still do so
ROOM_SECONDS = 0.05  # how often a server that has no room for a connection looks for some
SPARE_FILES = 200  # for SQLite, Keycloak, last-known.db, listeners, the log
IDLE_SECONDS = 1  # an idle connection closes its SQLite connection after this long

MAX_DIRECTORY_ANSWER_BYTES = 1024 * 1024  # of one HTTP response, headers too; ten brief user records are about 4 kB
MAX_DIRECTORY_MATCHES = 10  # asked for in one search; an answer with so many cannot be used, since there may be more
MAX_DIRECTORY_RECORDS = 100  # looked at in one answer: a server that ignores exact may ignore max as well
MAX_DIRECTORY_WAITING = 2000  # lookups waiting their turn; above it a question fails at once instead of queueing
TOKEN_LIFE_USED = 0.8  # of a token's life; the rest is margin for clocks and requests under way

OUTAGE_FAILURES = 3  # this many failures in a row count as an outage: requests no longer wait for Keycloak, only the probe asks it
PROBE_SECONDS = 5.0  # after which a question of the probe is given up
PROBE_PAUSE_SECONDS = 3.0  # at most between two probes
REFRESH_AHEAD = 0.2  # of a positive answer's life: one that is used in this last part of it is asked for again in the background
MAX_REFRESHES_WAITING = 1000  # beyond, an answer is not refreshed ahead but asked for when it has ended
LEAST_LOOK_SECONDS = 2.0  # the limit for what one look can add to the grace is never below this
MAX_STEPS = 20_000  # noted while last-known.db cannot be read, each about 500 bytes
MAX_FORMER_NAMES = 4  # of a user who was renamed
MAX_FORMER_HOLDERS = 50  # of a name
MAX_WITNESSES = 1000  # federations whose last confirmed user is remembered; where one is forgotten, a grace lasts longer
MAX_NAME_CHARS = 255  # of a username or an address in an answer of Keycloak: its own limit

MAX_CONFIG_CHARS = 1_048_576  # of config.yaml; so many take PyYAML some 10 s
SAVE_RETRY_SECONDS = 1.0  # before last-known.db or last-used.json is tried again
USE_SECONDS = 60.0  # in which one use of an app is noted at the most
MAX_APPS_NOTED = 10_000  # beyond, one may be noted before USE_SECONDS are over; each about 200 bytes
MAX_USES_CHARS = 8_388_608  # of last-used.json, with some 100 for each app; more is not read
DATABASE_KEPT_CONNECTIONS = 16  # beyond, a thread's connection ends with its question; each takes about 150 KiB and 3 open files
DATABASE_CACHE_KIB = 400  # of pages that a connection keeps; SQLite's own limit is 2,000
DATABASE_BUSY_SECONDS = 2.0  # how long a question waits for a writer's lock
DATABASE_WAIT_SECONDS = 10.0  # how long a question waits for the thread that asks SQLite, whose disk may hang
MAX_FAULTS_TOLD, FAULTS_TOLD_SECONDS = 3, 600.0  # of the database, in the log; status and each answer tell more
MAX_REMEMBERED_ROWS = 20_000  # each about 400 bytes
MAX_RECALLED_ANSWERS = 20_000  # each about 800 bytes
MAX_RECALLED_FACTS = 8  # of one answer; only that of an alias with many users has more
MAX_RECALLED_CHARS = (
    600  # of one question, or of an address whose form is kept; two addresses and a login seldom have more than 200
)
MAX_ATTEMPTS = (
    10  # to make an answer from one state of database and users while they change; then the database counts as unavailable
)
MAX_ERRORS_SAID = 1000  # errors that the log has had and does not repeat
POSTMASTER_SECONDS = 10.0  # after the start, Keycloak is asked whether each domain has a postmaster
LOCK_SECONDS = 5.0  # at start, for the directory of a socket; another daemon holds it for a second at the most
SHUTDOWN_LOOKUP_SECONDS = 3.0  # after SIGTERM, lookups that still wait for Keycloak are given up
SHUTDOWN_TOTAL_SECONDS = 3.8  # then connections that are left are cut off
SHUTDOWN_SECONDS = 4.2  # then the program ends, though last-known.db may lack what was learned last

MIN_FROZEN_OBJECTS = 10_000  # that Python's collector has not left out yet; a pass over so many takes 5 ms, and a user is about ten

THREAD_STACK_BYTES = 4 * 1024 * 1024  # enough for json to reach Python's limit of recursion first, where the system has less

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_CONFIG = 0, 1, 64, 78  # the last two from sysexits.h

log = logging.getLogger("mailcloak")

Clock = Callable[[], float]  # time.monotonic, or a test's
LineText = Union[str, Callable[[], str]]  # of a line of the log, or what makes it
Deadline = float  # of time.monotonic()
Value = TypeVar("Value")


class MailcloakError(Exception):
    """Anything mailcloak itself reports, fit for an administrator: what is wrong, and what to do about it where that is known."""

    joiner = ", "  # between the two

    def __init__(self, text: str, remedy: str = "") -> None:
        super().__init__(f"{text}{self.joiner}{remedy}" if remedy else text)
        self.text, self.remedy = text, remedy


class Problem(NamedTuple):
    """One thing that is wrong with the configuration, or worth a warning."""

    key: str  # or the file
    text: str
    remedy: str = ""
    kind: str = ""  # for programs: "unreadable", "secret-exposed" or "plain-http", and "" for all else

    def __str__(self) -> str:
        return f"config: {self.key}: {self.text}{', ' if self.remedy else ''}{self.remedy}"


class ConfigError(MailcloakError):
    """The configuration cannot be used. problems holds each thing that is wrong."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = list(problems)


class ProtocolError(MailcloakError):
    """The peer's bytes make no sense; its connection is closed."""


class DirectoryUnavailable(MailcloakError):
    """Keycloak gave no usable answer, which is not the same as "no such user"."""


class DirectoryMisconfigured(DirectoryUnavailable):
    """Keycloak answers, and will go on refusing until an administrator changes something; the text says what."""


class QuestionFailed(DirectoryUnavailable):
    """This question has no answer, which is no sign that Keycloak is away."""


class Disappeared(MailcloakError):
    """Keycloak no longer says the same of a user: not believed yet (no 550), but the old answer is not used either (451)."""


class DatabaseUnavailable(MailcloakError):
    """SQLite gave no usable answer."""


class RowUnreadable(DatabaseUnavailable):
    """There is such a row, and what it says cannot be read."""


class StartError(MailcloakError):
    """A socket, a user or the database file does not allow the daemon to start."""


_TO_BE_ESCAPED = re.compile(r'[ <>"\\]')


def escape_for_log(text: str) -> str:
    """Text of a client for a log line: nothing in it can end the line, a quoted value or an address in angle brackets."""
    text = text if len(text) <= 300 else text[:300] + "..."
    if text.isprintable() and not _TO_BE_ESCAPED.search(text):
        return text
    return "".join(f"\\x{ord(c):02x}" if c in ' <>"\\' else c if c.isprintable() else ascii(c)[1:-1] for c in text)


def escape_all_for_log(*texts: str) -> Sequence[str]:
    """The same for several, mostly with one look at all of them."""
    together = "".join(texts)
    if len(together) <= 300 and together.isprintable() and not _TO_BE_ESCAPED.search(together):
        return texts
    return [escape_for_log(text) for text in texts]


def describe_exception(exc: BaseException) -> str:
    """Type, text and place of an unexpected exception on one line. Imports nothing, as the module traceback may."""
    frame = exc.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    place = f"{os.path.basename(frame.tb_frame.f_code.co_filename)}:{frame.tb_lineno}" if frame else "?"
    return f"error={type(exc).__name__} text={escape_for_log(str(exc))} at={place}"


def end_process(reason: bytes) -> None:
    """End at once, whatever the threads do, since the process cannot be trusted any more. The service manager starts it again."""
    signal.alarm(1)  # which ends it where nobody reads the log
    with contextlib.suppress(OSError):
        os.write(2, b"error daemon: " + reason + b", it ends\n")
    os._exit(EXIT_FAILED)


def end_without_memory(exc: Optional[BaseException]) -> None:
    """End the process after a MemoryError, also one that led to exc: what was left half done is not known."""
    while exc and not isinstance(exc, MemoryError):
        exc = exc.__context__
    if exc:
        end_process(b"out of memory")


def note_lost_exception(lost: Any) -> None:
    """An exception that ended a thread, or that Python can give to nobody; for threading.excepthook and sys.unraisablehook."""
    end_without_memory(lost.exc_value)
    log.error("daemon: internal error %s", describe_exception(lost.exc_value or Exception()))


# ---------------------------------------------------------------------------------------------------------------------------------
# 2. Addresses
# One form for an address from whichever side it comes: the form that Postfix acts on. Pure: any thread enters.
# ---------------------------------------------------------------------------------------------------------------------------------

_ATOM = r"[^.\x00-\x20\x7f\"(),:;<>@\[\\\]]+"  # RFC 5322 atext with all of RFC 6531, as Postfix's quote_822_local.c
_DOT_STRING = re.compile(rf"{_ATOM}(\.{_ATOM})*")  # what needs no quotes in an address
_DOMAIN = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")  # as Postfix's valid_hostname
_NOBODYS = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # spaces, controls, and bytes that are not UTF-8
_DIRECTION = re.compile(r"[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # what turns the order in which a line is read

_NOT_IN_DOMAINS = re.compile(r'[\s\x00-\x1f\x7f"(),;<>\\]')  # Postfix drops some; what remains may be a domain of ours

# Stands for a domain that cannot be converted here. Postfix's ICU may know more letters than Python's tables, so it could be one of
# ours: it is neither passed nor refused, but deferred. No domain holds U+FFFD (disallowed by UTS 46).
NOT_CONVERTIBLE = "\ufffd"


class Address(NamedTuple):
    """An address as Postfix will act on it, lower-cased, the domain in A-label form. ("", "") is the null sender."""

    local_part: str
    domain: str  # "" when there is none: Postfix will append $myorigin; or NOT_CONVERTIBLE
    folded_domain: str = ""  # the domain as Postfix's lists compare it (ß is ss); "" if it is the same

    @property
    def text(self) -> str:
        return f"{self.local_part}@{self.domain}" if self.domain else self.local_part

    @property
    def is_plain(self) -> bool:
        """Can this be somebody's address at all? What cannot is never asked of SQLite or Keycloak."""
        return self.local_part != "" and self.domain not in ("", NOT_CONVERTIBLE) and is_plain_text(self.text)


def is_plain_text(text: str) -> bool:
    """Can this be somebody's name or address? Not with controls, spaces, bytes that are not UTF-8, or over MAX_ADDRESS_CHARS.

    Not isprintable(): it knows no letter newer than Python's tables, and Persian and Indic names need joiners (U+200C, U+200D).
    """
    return len(text) <= MAX_ADDRESS_CHARS and not _NOBODYS.search(text)


def domain_to_ascii(domain: str) -> str:
    """A domain lower-cased and in A-label form, as it travels in DNS; NOT_CONVERTIBLE if it has no such form.

    Converted as Postfix does it: characters are mapped or left out by UTS 46, nothing is lower-cased before, and what remains is
    written in Punycode. IDNA 2008 allows fewer letters (no emoji), but such domains exist and have mail.
    Source: Postfix midna_domain.c; UTS 46 without transitional mapping (enable_idna2003_compatibility = no); RFC 3492.
    """
    if domain.isascii():
        return domain.lower() if not _NOT_IN_DOMAINS.search(domain) else NOT_CONVERTIBLE
    # Postfix takes a longer one if UTS 46 leaves out enough of it. To convert that here would cost too much time.
    # Capital sharp s became "ss" until Unicode 15.0 and has become U+00DF since: the one character with two mappings.
    if len(domain) > MAX_ADDRESS_CHARS or "\u1e9e" in domain:
        return NOT_CONVERTIBLE
    import idna  # a dependency of requests itself, so it is there wherever requests is

    try:
        mapped = idna.uts46_remap(domain, std3_rules=False)
        converted = ".".join(map(_label_to_ascii, mapped.split(".")))
    except (UnicodeError, ValueError, IndexError):
        return NOT_CONVERTIBLE
    return converted if _DOMAIN.fullmatch(converted.removesuffix(".")) else NOT_CONVERTIBLE


def _label_to_ascii(label: str) -> str:
    """Raises ValueError for one that is too long, or that holds a character which this Python cannot compose (NFC) yet."""
    import unicodedata

    if not label.isascii() and len(label) <= MAX_LABEL_CHARS:  # Punycode takes time quadratic in the length
        if any(unicodedata.category(character) == "Cn" for character in label):
            raise ValueError("unassigned character")
        label = "xn--" + label.encode("punycode").decode("ascii")
    if len(label) > MAX_LABEL_CHARS:
        raise ValueError("label too long")
    return label


def to_unicode_domain(address: str) -> str:
    """A normalised address (or a domain) as people write it, with U-labels. Raises nothing: what cannot be decoded stays as it is."""
    local_part, at_sign, domain = address.rpartition("@")
    decoded = ".".join(map(_label_to_unicode, domain.split(".")))
    return local_part + at_sign + (decoded if domain_to_ascii(decoded) == domain else domain)


def _label_to_unicode(label: str) -> str:
    if not label.startswith("xn--"):
        return label
    try:
        decoded = label[4:].encode("ascii").decode("punycode")
    except (UnicodeError, ValueError, OverflowError):
        return label
    return decoded if domain_to_ascii(decoded) == label else label


def _split_domain(raw: str, *, is_inner: bool = False) -> tuple[str, str]:
    """(local part, domain) as Postfix reads the address, both as they were written. The domain is "" when there is none.

    is_inner: an outer domain was dropped from it. Then quotes do not keep Postfix from reading user%domain and domain!user.
    Source: Postfix trivial-rewrite(8), resolve.c: source routes, resolve_dequoted_address, swap_bangpath, allow_percent_hack.
    """
    text = raw
    while text.startswith("@") and ":" in text[:-1]:
        text = text.partition(":")[2]
    needs_quotes = not _DOT_STRING.fullmatch(text)
    if "@" not in text and (is_inner or not needs_quotes):
        if "%" in text and (needs_quotes or "!" not in text):
            user, _, site = text.rpartition("%")
            text = f"{user}@{site}"
        elif "!" in text:
            site, _, user = text.partition("!")
            text = f"{user}@{site}"
    local_part, at_sign, domain = text.rpartition("@")
    if not at_sign:
        return text, ""
    return (local_part, domain) if domain else (local_part or "@", "")


def normalise_address(raw: str) -> Address:
    """The form in which Postfix will deliver to, or send from, the address.

    raw is an address of an SMTP envelope, without angle brackets; "" is the null sender. Raises nothing.
    Source: Postfix trivial-rewrite(8), also for the trailing dot; casefold.c for the domain in its lists.
    """
    return _memoised_form(raw) if len(raw) <= MAX_RECALLED_CHARS else _form(raw)


def _form(raw: str, *, is_inner: bool = False) -> Address:
    local_part, written = _split_domain(raw, is_inner=is_inner)
    domain = _without_dot(domain_to_ascii(written))
    folded = domain if written.isascii() else _without_dot(domain_to_ascii(written.casefold()))
    if NOT_CONVERTIBLE in (domain, folded):
        return Address(local_part.lower(), NOT_CONVERTIBLE)
    return Address(local_part.lower(), domain, "" if folded == domain else folded)


_memoised_form = functools.lru_cache(maxsize=1000)(_form)  # the sender comes with each recipient of a message


def _without_dot(domain: str) -> str:
    return domain[:-1] if domain.endswith(".") and len(domain) > 1 and not domain.endswith("..") else domain


def routing_steps(raw: str) -> Iterator[Address]:
    """The address, and what Postfix would deliver to if each outer domain were one of its own hosts; each has a domain.

    Postfix drops the domain of user%domain@host, domain!user@host and "user@domain"@host when the host is itself ($mydestination or
    its IP address in brackets) and reads the rest again, so such an address may lead to a domain of ours. raw is what the client
    wrote: if it were lower-cased first, some inner domains would be converted to others.
    Source: Postfix trivial-rewrite(8), resolve.c.
    """
    address, inner = normalise_address(raw), _split_domain(raw)[0]
    while True:
        if address.domain:
            yield address
        if inner == raw:
            return
        raw = inner
        address, inner = _form(raw, is_inner=True), _split_domain(raw, is_inner=True)[0]


def _domain(value: Any) -> str:
    domain = domain_to_ascii(value).removesuffix(".") if isinstance(value, str) else ""
    if not _DOMAIN.fullmatch(domain):
        raise ValueError("expected a domain such as example.org")
    return domain


def parse_plain_address(text: str) -> Address:
    """An address as a person types it into a command or a config; raises ValueError saying what is wrong with it."""
    if _NOBODYS.search(text) or _DIRECTION.search(text):
        raise ValueError("it holds a space or a control character")
    if text.count("@") != 1:
        raise ValueError("it has no @" if "@" not in text else "it has more than one @")
    local_part, domain = text.split("@")
    local_part = local_part.lower()
    if not local_part:
        raise ValueError("there is nothing before the @, and a catch-all for a whole domain is not supported")
    if not _DOT_STRING.fullmatch(local_part):
        raise ValueError("the part before the @ would need quotes")
    too_long = f"it is longer than {MAX_ADDRESS_CHARS} characters"
    if len(text) > MAX_ADDRESS_CHARS:
        raise ValueError(too_long)
    try:
        address = Address(local_part, _domain(domain))
    except ValueError:
        raise ValueError(f"{domain!r} is not a domain") from None
    if len(address.text) > MAX_ADDRESS_CHARS:
        raise ValueError(f"{too_long}, with its domain in A-label form")
    return address


def split_extension(local_part: str, delimiters: str) -> tuple[str, str]:
    """(base, extension): the extension begins with its delimiter, and is "" where there is none to cut off.

    Source: Postfix split_addr.c, and postconf(5) recipient_delimiter, owner_request_special.
    """
    if local_part in ("postmaster", "mailer-daemon", "double-bounce"):
        return local_part, ""
    if "-" in delimiters and (local_part.startswith("owner-") or local_part.endswith("-request")):
        return local_part, ""
    cut = next((index for index, character in enumerate(local_part) if character in delimiters), 0)
    return (local_part[:cut], local_part[cut:]) if cut else (local_part, "")


def holds_delimiter(username: str, delimiters: str) -> bool:
    """Would Dovecot cut this username, and deliver to the user of its first part? Of one with @, only what is before it counts."""
    return not set(_split_username(username)[0]).isdisjoint(delimiters)


def address_spellings(address: Address, delimiters: str) -> list[tuple[Address, str]]:
    """(address, extension) to look up, in this order: the address itself, then without its extension if it has one."""
    base, extension = split_extension(address.local_part, delimiters)
    return [(address, "")] + ([(Address(base, address.domain), extension)] if extension else [])


def quote_local_part(local_part: str) -> str:
    """The local part as it must stand in an address of a lookup table's answer (RFC 5322, section 3.2.4)."""
    if _DOT_STRING.fullmatch(local_part):
        return local_part
    return '"' + re.sub(r'(["\\\r])', r"\\\1", local_part) + '"'


def unquote_local_part(address: str) -> str:
    """The address without the quotes that Postfix puts around a local part for a lookup table: as it is in a policy request."""
    quoted, _, domain = address.rpartition("@")
    local_part = re.sub(r"\\(.)", r"\1", quoted[1:-1], flags=re.DOTALL)
    return f"{local_part}@{domain}" if quote_local_part(local_part) == quoted else address


def format_mailbox(username: str, extension: str, domain: str) -> str:
    """Where the mail of username goes: username+extension@domain; a username that is an address stays as it is, without extension."""
    local_part, own_domain = _split_username(username)
    return f"{quote_local_part(local_part if own_domain else username + extension)}@{own_domain or domain}"


def _split_username(username: str) -> tuple[str, str]:
    """(local part, domain) of a username that is an address, (username, "") of any other: zoe@a,bob is one name, and no list."""
    local_part, _, domain = username.rpartition("@")
    return (local_part, domain) if local_part and _DOMAIN.fullmatch(domain_to_ascii(domain)) else (username, "")


# ---------------------------------------------------------------------------------------------------------------------------------
# 3. Decisions
# From a request and the facts to an answer, and the reasons in words. No socket, log line or clock of its own; only the facts may wait.
# Any thread enters. A fact is asked for only where a rule needs it: an alias is answered while Keycloak is away.
# ---------------------------------------------------------------------------------------------------------------------------------


class Alias(NamedTuple):
    """A row of the table aliases, with its further targets."""

    users: tuple[str, ...]  # who receive its mail and may send as it
    enabled: bool
    external: tuple[str, ...] = ()  # addresses elsewhere, which receive its mail as well
    receive_only: bool = False  # its users may not send as it


class App(NamedTuple):
    """A row of the table apps, with what its list says of one sender."""

    state: str  # "enabled", "disabled" or "expired"
    may_send: bool  # is the sender asked about in its list?
    owner: str = ""  # the app counts only while this user is enabled; "" if it has no owner
    expires_at: Optional[int] = None  # of an app that is enabled until then, in seconds since 1970


class User(NamedTuple):
    """What counts of what Keycloak says of a user, see read_user()."""

    username: str  # lower-cased
    email: str  # primary e-mail, normalised; "" if there is none that counts
    enabled: bool  # may log in and send
    locked_out: bool = False  # disabled for wrong passwords, which anybody can send, while such users receive mail
    federation: str = ""  # the user storage behind Keycloak that the user comes from, such as LDAP
    user_id: str = ""  # Keycloak's

    @property
    def receives(self) -> bool:
        """Does mail for this user come in?"""
        return self.enabled or self.locked_out

    @property
    def key(self) -> str:
        """What stays the same when the user is renamed, where Keycloak says it."""
        return self.user_id or self.username


Users = tuple[User, ...]


class Login(NamedTuple):
    """Which user a sasl_username names. username is "" unless state is "enabled"."""

    username: str
    state: str  # "enabled", "disabled", "missing", "no-email", or "ambiguous": it names more than one user


def resolve_login(named: Users, holders: Users) -> Login:
    """The login of users found by username (named) and by primary e-mail (holders). A user without an e-mail may not send."""
    usernames = {user.username for user in named + holders}
    if len(usernames) > 1:
        return Login("", "ambiguous")
    users = [user for user in named + holders if user.email]
    if not users:
        return Login("", "no-email" if usernames else "missing")
    if all(user.enabled for user in users):
        return Login(users[0].username, "enabled")
    return Login("", "disabled")


class PolicyRequest(NamedTuple):
    """The attributes of a policy request that decide, as the client sent them. Source: SMTPD_POLICY_README."""

    protocol_state: str = ""
    policy_context: str = ""
    recipient: str = ""
    sender: str = ""
    sasl_username: str = ""
    sasl_method: str = ""
    text: str = ""  # all of it, where the log finds the others


class Action(NamedTuple):
    """An answer to Postfix, and why, for the log. level is the level at which it is logged."""

    text: str
    reason: str
    level: int = logging.INFO


class Owner(NamedTuple):
    """Who owns an address. There are no users for nobody, and also where two users share a primary e-mail."""

    users: tuple[str, ...]
    source: str  # "alias", "primary", "nobody", "users-gone", or why it is not known: the reason of an answer in UNKNOWN
    extension: str = ""  # what was cut off the address to find the owner, with its delimiter
    is_certain: bool = True  # False for a primary e-mail while SQLite cannot say whether the address is an alias as well
    external: tuple[str, ...] = ()  # addresses elsewhere that an alias leads to
    receive_only: bool = False  # of an alias: its users may not send as it


class Facts(Protocol):
    """What a decision may ask. The daemon looks facts up (section 9); a test's are plain values."""

    def find_alias(self, address: Address) -> Optional[Alias]:
        """The alias of exactly this address; raises DatabaseUnavailable."""

    def find_app(self, app_id: str, sender: Address) -> Optional[App]:
        """The app, and whether it may use the sender; raises DatabaseUnavailable."""

    def find_holders(self, address: Address) -> Users:
        """The users whose primary e-mail this is, disabled ones too; raises DirectoryUnavailable, Disappeared."""

    def has_left(self, username: str) -> bool:
        """Is it sure that there was a user of this name who is gone or disabled now? Raises DirectoryUnavailable, Disappeared."""

    def find_login(self, sasl_username: str) -> Login:
        """Which user the login names; raises DirectoryUnavailable, Disappeared."""

    def find_user(self, username: str) -> Login:
        """The same for a username alone, lower-cased, which is nobody's e-mail here."""

    def has_lost(self, sasl_username: str, address: Address) -> bool:
        """Did a user that this login may name have this e-mail before, and not now? Asks nobody."""


NO_SUCH_USER = "550 5.1.1 No such user"
LOCAL_SENDER_UNAUTHENTICATED = "553 5.7.1 Sending from local domains requires authentication"
SENDER_NOT_OWNED = "553 5.7.1 Sender not owned by authenticated user"
DIRECTORY_FAILED = "451 4.3.0 Temporary authentication/lookup failure"
INTERNAL_ERROR = "451 4.3.0 Temporary internal error"
UNKNOWN = MappingProxyType(
    {
        "directory-unavailable": Action(DIRECTORY_FAILED, "directory-unavailable"),
        "in-grace": Action(DIRECTORY_FAILED, "in-grace"),
        "database-unavailable": Action(INTERNAL_ERROR, "database-unavailable"),
    }
)  # the answers where it is not known who owns an address, by their reason
TOKEN_METHODS = frozenset({"xoauth2", "oauthbearer"})  # a Keycloak token; by any other method the login may be an app's


def decide_policy(request: PolicyRequest, policy: PolicyConfig, facts: Facts) -> Action:
    """The answer to one policy request: at RCPT the recipient, then the sender; at MAIL the sender; else no objection.

    policy_context, which main.cf sets for each restriction list, limits it to "recipient" or "sender".
    """
    if request.protocol_state not in ("RCPT", "MAIL"):
        return accept("other-state")
    recipient = None
    if request.protocol_state == "RCPT" and request.policy_context != "sender":
        recipient = decide_recipient(request.recipient, policy, facts)
        if recipient.text != "DUNNO" or request.policy_context == "recipient":
            return recipient
    elif request.policy_context == "recipient":
        return accept("nothing-to-check")
    sender = decide_sender(request, policy, facts)
    if not recipient or sender.text != "DUNNO":
        return sender
    return Action("DUNNO", f"{recipient.reason},{sender.reason}", max(recipient.level, sender.level))


def decide_recipient(raw: str, policy: PolicyConfig, facts: Facts) -> Action:
    """May mail for this recipient, as the client wrote it, come in?

    DUNNO for an address that has an owner and for domains that are not ours; 550 when it has none, when all users of an alias are gone,
    when it leads over too many hosts, or over another one to what only the alias map knows, or is itself a mailbox
    (policy.mailbox_domain); 451, or what policy.keycloak_failure_mode says, when that is not known; 451 also where it is not certain how
    Postfix reads the domain, and where Dovecot would cut the username.
    """
    recipient, is_routed = normalise_address(raw), False
    # XXX: user%ours@elsewhere gets 550 if we have no such user, even where elsewhere is a foreign host (SECURITY.md). Knowing
    # $mydestination would end that.
    for number, step in enumerate(routing_steps(raw)):
        if number == MAX_ROUTES:
            return Action(NO_SUCH_USER, "too-many-routes")
        if could_be_ours(step, policy):
            return Action(INTERNAL_ERROR, "domain-not-convertible")
        if is_local(step, policy):
            recipient, is_routed = step, number > 0
            break
    if is_routed and policy.mailbox_domain:  # Postfix asks the alias map for the whole, and would deliver to the address itself
        return Action(NO_SUCH_USER, "routed-address")
    if policy.mailbox_domain and recipient.domain == policy.mailbox_domain:
        return Action(NO_SUCH_USER, "mailbox-domain")
    if not is_local(recipient, policy):
        return accept("recipient-not-local")
    owner = without_leavers(find_owner(recipient, policy, facts), facts, is_one_enough=True)
    if is_routed and owner.source == "alias":
        return Action(NO_SUCH_USER, "routed-address")
    is_exact = owner.source == "primary" and not owner.extension
    if is_exact and not policy.mailbox_domain and holds_delimiter(recipient.text, policy.recipient_delimiter):
        return Action(DIRECTORY_FAILED, "username-with-delimiter", logging.ERROR)
    if owner.source in ("alias", "primary"):
        return accept(owner.source)
    if owner.source == "directory-unavailable" and policy.keycloak_failure_mode != "tempfail":
        return Action("DUNNO", "directory-unavailable")
    reason = "alias-users-gone" if owner.source == "users-gone" else "unknown-recipient"
    return UNKNOWN.get(owner.source) or Action(NO_SUCH_USER, reason)


def find_owner(address: Address, policy: PolicyConfig, facts: Facts) -> Owner:
    """Who owns this address: enabled alias, primary e-mail, disabled alias (nobody), then the same without the extension.

    A primary e-mail counts if one of the users who have it receives mail; an alias counts whether its user exists or not. Without SQLite a
    primary e-mail still counts; without Keycloak only an exact, enabled alias does, since the address might be somebody's primary
    e-mail. Raises nothing.
    """
    if address.domain not in policy.domain:
        return Owner((), "nobody")
    database_failed = False
    for spelling, extension in address_spellings(address, policy.recipient_delimiter):
        if not spelling.is_plain:
            continue
        alias = None
        try:
            alias = facts.find_alias(spelling)
        except RowUnreadable:
            return Owner((), "database-unavailable")
        except DatabaseUnavailable:
            database_failed = True
        if alias and database_failed:  # the address itself may be an alias of somebody else
            return Owner((), "database-unavailable")
        if alias and alias.enabled and (alias.users or alias.external):
            return Owner(alias.users, "alias", extension, external=alias.external, receive_only=alias.receive_only)
        try:
            holders = facts.find_holders(spelling)
        except DirectoryUnavailable:
            return Owner((), "directory-unavailable")
        except Disappeared:
            return Owner((), "in-grace")
        if any(user.receives for user in holders):
            users = tuple(user.username for user in holders) if len(holders) == 1 else ()
            return Owner(users, "primary", extension, not database_failed)
        if alias:
            return Owner((), "nobody")
    return Owner((), "database-unavailable" if database_failed else "nobody")


def without_leavers(owner: Owner, facts: Facts, *, is_one_enough: bool = False) -> Owner:
    """The owner without users who have surely left, so that the others' mail does not bounce; is_one_enough: if only they are left.

    Only of an alias with several targets: one with a single user counts whether the user exists or not. A name that Keycloak never knew
    stays too: it may be an e-mail, or of a user whose storage is down. Where nobody is left, source is "users-gone", or "in-grace"
    while one of them is not believed gone. Raises nothing.
    """
    if owner.source != "alias" or len(owner.users) + len(owner.external) < 2:
        return owner
    left, is_known = [], bool(owner.external)
    for username in owner.users:
        if is_known and is_one_enough:
            return owner
        try:
            if facts.has_left(username):
                continue
            is_known = True
        except DirectoryUnavailable:
            is_known = True  # nobody has left because Keycloak does not answer
        except Disappeared:
            pass
        left.append(username)
    return owner._replace(users=tuple(left)) if is_known else Owner((), "in-grace" if left else "users-gone")


def decide_sender(request: PolicyRequest, policy: PolicyConfig, facts: Facts) -> Action:
    """May this client, logged in or not, use this sender?"""
    sender = normalise_address(request.sender)
    if not request.sasl_username:
        return decide_unauthenticated_sender(sender, policy)
    if could_be_ours(sender, policy):
        return Action(INTERNAL_ERROR, "domain-not-convertible")
    sasl_username = request.sasl_username.lower()
    try:
        app = facts.find_app(sasl_username, sender) if request.sasl_method.lower() not in TOKEN_METHODS else None
        if app:  # in whatever state: an app that has a user's name must never become that user
            return _decide_app(app, facts)
        return _decide_user(sasl_username, sender, policy, facts)
    except DatabaseUnavailable:
        return UNKNOWN["database-unavailable"]
    except Disappeared:
        return UNKNOWN["in-grace"]
    except DirectoryUnavailable:
        return _fail_sender(sasl_username, sender, policy, facts)


def decide_unauthenticated_sender(sender: Address, policy: PolicyConfig) -> Action:
    """May a client that has not logged in use this sender? Needs no facts."""
    if could_be_ours(sender, policy):
        return Action(INTERNAL_ERROR, "domain-not-convertible")
    if not is_local(sender, policy):
        return accept("sender-not-local")
    if policy.unauthenticated_local_sender == "reject":
        return Action(LOCAL_SENDER_UNAUTHENTICATED, "local-sender-unauthenticated")
    level = logging.INFO if policy.unauthenticated_local_sender == "warn" else logging.DEBUG
    return Action("DUNNO", "local-sender-unauthenticated", level)


def _decide_app(app: App, facts: Facts) -> Action:
    if app.state == "disabled":
        return Action(SENDER_NOT_OWNED, "app-disabled")
    if app.state == "expired":
        return Action(SENDER_NOT_OWNED, "app-expired")
    if not app.may_send:
        return Action(SENDER_NOT_OWNED, "app-sender")
    owner_state = facts.find_user(app.owner).state if app.owner else "enabled"  # an e-mail may be somebody else's tomorrow
    if owner_state != "enabled":
        return Action(SENDER_NOT_OWNED, "app-owner-disabled" if owner_state == "disabled" else "app-owner-missing")
    return accept("app")


def _decide_user(sasl_username: str, sender: Address, policy: PolicyConfig, facts: Facts) -> Action:
    login = facts.find_login(sasl_username)
    if login.state == "ambiguous":
        return Action(SENDER_NOT_OWNED, "login-ambiguous", logging.WARNING)
    if login.state != "enabled":
        return Action(SENDER_NOT_OWNED, "login-disabled" if login.state == "disabled" else "login-missing")
    if sender.text == "":
        return accept("null-sender")
    if not is_local(sender, policy):
        return accept("foreign-sender") if policy.foreign_sender == "dunno" else Action(SENDER_NOT_OWNED, "foreign-sender")
    owner = find_owner(sender, policy, facts)
    if login.username in owner.users and (owner.is_certain or not owner.extension):
        if owner.receive_only:
            return Action(SENDER_NOT_OWNED, "receive-only")
        return accept("own-alias" if owner.source == "alias" else "own-primary")
    if owner.source == "directory-unavailable":
        return _fail_sender(sasl_username, sender, policy, facts)
    if not owner.is_certain:
        return UNKNOWN["database-unavailable"]
    reason = "sender-of-nobody" if owner.source == "nobody" else "sender-not-owned"
    return UNKNOWN.get(owner.source) or Action(SENDER_NOT_OWNED, reason)


def _fail_sender(sasl_username: str, sender: Address, policy: PolicyConfig, facts: Facts) -> Action:
    """The failure mode, but 451 in each mode for an address that Keycloak says the user has lost."""
    spellings = address_spellings(sender, policy.recipient_delimiter)
    may_pass = policy.keycloak_failure_mode == "dunno" and not any(facts.has_lost(sasl_username, each) for each, _ in spellings)
    return Action("DUNNO" if may_pass else DIRECTORY_FAILED, "directory-unavailable")


def decide_alias(key: str, policy: PolicyConfig, facts: Facts) -> Action:
    """The socketmap's answer for a key of the alias map: "OK mailbox", of several separated by commas, "NOTFOUND ", or "TEMP reason".

    "NOTFOUND " keeps its space: Postfix wants one after every status word (socketmap_table(5)). An extension that makes the address or
    the answer too long, or has a space or a control character, is left out: Dovecot refuses such names.
    """
    unquoted = unquote_local_part(key)
    address = normalise_address(unquoted)
    is_odd = "@" not in key or (unquoted == key and not _DOT_STRING.fullmatch(address.local_part))
    if not is_odd and could_be_ours(address, policy):
        return Action("TEMP domain not convertible", "domain-not-convertible")
    if is_odd or address.domain not in policy.domain:
        return Action("NOTFOUND ", "not-local", logging.DEBUG)
    not_found = Action("NOTFOUND ", "no-alias", logging.DEBUG)
    try:
        spellings = address_spellings(address, policy.recipient_delimiter)
        aliases = [facts.find_alias(spelling) for spelling, _ in spellings if spelling.is_plain]
    except DatabaseUnavailable:
        return Action("TEMP database not usable", "database-unavailable")
    if not policy.mailbox_domain and not any(alias and alias.enabled for alias in aliases):
        return not_found  # no alias can own it, so Keycloak need not be asked
    owner = without_leavers(find_owner(address, policy, facts), facts)
    if owner.source in UNKNOWN:
        return Action("TEMP lookup failed", owner.source)
    if owner.source == "users-gone":
        return Action("TEMP all users have left", "alias-users-gone")  # "NOTFOUND " would lead it to a mailbox of the alias's name
    if owner.source == "nobody" or (owner.source == "primary" and not policy.mailbox_domain):
        return not_found
    if not owner.users and not owner.external:
        base = address.local_part[: len(address.local_part) - len(owner.extension)]
        return Action(f"TEMP several users have {base}@{address.domain}", "shared-primary", logging.ERROR)
    uncut = next((name for name in owner.users if holds_delimiter(name, policy.recipient_delimiter)), None)
    if uncut is not None:
        return Action(
            f"TEMP username {escape_for_log(uncut)} holds a recipient delimiter", "username-with-delimiter", logging.ERROR
        )
    domain = policy.mailbox_domain or address.domain
    for extension in (owner.extension if address.is_plain else "", ""):
        mailboxes = [format_mailbox(username, extension, domain) for username in owner.users]
        text = f"OK {','.join([*mailboxes, *owner.external])}"
        if len(text.encode()) <= MAX_SOCKETMAP_REPLY_BYTES:
            break
    return Action(text, owner.source, logging.DEBUG)


@functools.cache
def accept(reason: str) -> Action:
    """No objection. Never OK, which would end Postfix's restriction list and skip the checks after this one (access(5))."""
    return Action("DUNNO", reason, logging.DEBUG)


def is_local(address: Address, policy: PolicyConfig) -> bool:
    """In our domains or the one of mailboxes, or without a domain: Postfix appends $myorigin, which may be ours."""
    if not address.domain:
        return bool(address.local_part)
    return address.domain in policy.domain or address.domain == policy.mailbox_domain


def could_be_ours(address: Address, policy: PolicyConfig) -> bool:
    """Is it uncertain whether Postfix takes the domain for one of ours? Then mail is deferred, neither passed nor refused."""
    if address.domain == NOT_CONVERTIBLE:
        return True
    if address.domain in policy.domain or address.domain == policy.mailbox_domain:
        return False
    return (address.folded_domain or address.domain) in folded_domains(policy.domain, policy.mailbox_domain)


@functools.lru_cache(maxsize=8)
def folded_domains(domains: frozenset[str], mailbox_domain: str) -> frozenset[str]:
    """Our domains as Postfix's lists compare them, if they are written there with their own letters: ß is ss."""
    return frozenset(domain_to_ascii(to_unicode_domain(domain).casefold()) for domain in (*domains, mailbox_domain) if domain)


def policy_question(request: PolicyRequest, policy: PolicyConfig) -> tuple[str, ...]:
    """The attributes that the answer depends on: the same question has the same answer while policy and facts are the same.

    Without a login only whether the sender is local counts, which needs no facts: all outside senders share one recalled answer.
    """
    if request.sasl_username:
        return request[:-1]
    sender = decide_unauthenticated_sender(normalise_address(request.sender), policy)
    return (request.protocol_state, request.policy_context, request.recipient, sender.reason)


class Reason(NamedTuple):
    """The rule behind a reason= of the log in a sentence, and what would have to change for another answer.

    change may name {address}, the address asked about; {alias}, the alias that decided; {user}, the user or app of the login.
    """

    rule: str
    change: str


def _read_reasons(table: str) -> Mapping[str, Reason]:
    """The reasons by their word, from lines of "word: rule", each with indented lines that say what would have to change."""
    entries = re.findall(r"^([a-z-]+): (.*)\n((?: .*\n)*)", table, re.MULTILINE)
    return MappingProxyType({word: Reason(rule, " ".join(change.split())) for word, rule, change in entries})


REASONS = _read_reasons(
    """\
# who owns an address: recipients and the alias map
alias: an enabled alias owns the address: its mail is accepted and goes to the alias's users
    mailcloakctl aliases disable {alias}; aliases add-user and remove-user change who gets its mail
primary: the address is the primary e-mail of an enabled user: its mail is accepted and goes to this user
    disable the user or change the user's e-mail in Keycloak; this counts after policy.cache_ttl_seconds, or after
      mailcloakctl flush {address}
unknown-recipient: the address is neither an enabled alias nor the primary e-mail of an enabled user: refused
    mailcloakctl aliases add {address} USERNAME, or give a user this e-mail in Keycloak; a user just made counts after
      policy.negative_cache_ttl_seconds, or after mailcloakctl flush {address}; with keycloak.require_verified_email the
      e-mail must be verified
alias-users-gone: an enabled alias owns the address, and each of its several users has left Keycloak or is disabled there: refused
    enable one of them in Keycloak, or mailcloakctl aliases add-user {alias} USERNAME; this counts after
      policy.negative_cache_ttl_seconds
mailbox-domain: the address is in policy.mailbox_domain, which only aliases and primary e-mails lead to: refused
    nothing; write to one of the user's own addresses
too-many-routes: the address leads over too many hosts: refused
    nothing; write to the address itself
routed-address: the address leads over another host to an alias, or with policy.mailbox_domain to a user, and Postfix would pass the alias map: refused
    nothing; write to the address itself
domain-not-convertible: it is not certain how Postfix reads this domain, whose characters or length are unusual: the mail waits
    nothing; write the domain in its ASCII form (xn--...)
recipient-not-local: the recipient is not in policy.domain: Postfix alone decides whether it relays the mail
    if this is one of our domains, add it to policy.domain
not-local: the address is not in policy.domain, or has a form that no alias can have: there is no alias
    if this is one of our domains, add it to policy.domain
no-alias: no enabled alias owns the address: its mail is delivered to the address as it stands
    mailcloakctl aliases add {address} USERNAME
username-with-delimiter: the owner's username (or e-mail, where mail goes to that) holds a recipient delimiter, where Dovecot would cut it: the mail waits
    rename the user in Keycloak and in the aliases, or drop the character from recipient_delimiter here, in Postfix and in Dovecot
shared-primary: several users have this primary e-mail, so the right mailbox is not known: the mail waits
    in Keycloak, let only one of them keep this e-mail
# senders who have not logged in
sender-not-local: the client has not logged in, and the sender is not in policy.domain: mailcloak does not check it
    if this is one of our domains, add it to policy.domain
local-sender-unauthenticated: the client has not logged in, and the sender is one of ours: policy.unauthenticated_local_sender sets the answer
    let the client log in, as a user or as an app (mailcloakctl apps add); or list a host of yours in Postfix's
      mynetworks, with permit_mynetworks in smtpd_sender_restrictions; policy.unauthenticated_local_sender changes the
      answer for all
# users who have logged in
own-alias: the sender is an alias of the user: allowed
    mailcloakctl aliases disable {alias}
own-primary: the sender is the user's own primary e-mail: allowed
    change the user's e-mail in Keycloak; this counts after policy.cache_ttl_seconds, or after mailcloakctl flush
      {address}
null-sender: an enabled user may use the null sender <>, for notices and vacation mail: allowed
    disable the user in Keycloak
sender-not-owned: the login is good, but the sender belongs to another user, or to several: refused
    if it is an alias: mailcloakctl aliases add-user {address} {user} lets this user send as it, and receive its mail
receive-only: the sender is an alias of the user, and its users receive its mail but may not send as it: refused
    mailcloakctl aliases add {alias} --replace, with all its users and without --receive-only, lets them send as it
sender-of-nobody: the login is good, but the sender is neither an enabled alias nor the primary e-mail of an enabled user: refused
    mailcloakctl aliases add {address} USERNAME lets this user send as it
foreign-sender: a user has logged in, and the sender is not in policy.domain: policy.foreign_sender sets the answer
    policy.foreign_sender: dunno lets users send as other domains; if this is one of our domains, add it to policy.domain
login-missing: the login is neither a Keycloak user with an e-mail nor an app that has logged in with its password: refused
    in Keycloak, create the user or give the user an e-mail; for an app: mailcloakctl apps add, and a login with its password
login-disabled: the user is disabled or locked out in Keycloak: refused
    enable the user in Keycloak
login-ambiguous: the login is the name of one user and the e-mail of another, or the e-mail of several: refused
    in Keycloak, rename one of these users or change an e-mail
# apps
app: the login is an app, and the sender is in its list: allowed
    mailcloakctl apps disallow {user} {address}
app-sender: the login is an app, but the sender is not in its list: refused
    mailcloakctl apps allow {user} {address}
app-disabled: the app is disabled: refused
    mailcloakctl apps enable {user}
app-expired: the app has expired: refused
    mailcloakctl apps set {user} --expires 90d
app-owner-missing: the owner of the app is not the username of a Keycloak user with an e-mail: refused
    mailcloakctl apps set {user} --owner USERNAME
app-owner-disabled: the owner of the app is disabled or locked out in Keycloak: refused
    enable the owner in Keycloak, or mailcloakctl apps set {user} --owner USERNAME
# what cannot be known
directory-unavailable: Keycloak gave no answer that can be used, and neither the cache nor the database decides without it
    mailcloakctl status and mailcloakctl doctor show what is wrong with Keycloak; policy.keycloak_failure_mode sets the
      answer until it is fixed
in-grace: Keycloak no longer says the same of a user (missing, disabled, or another user has the name), or the saved users cannot be read: the mail waits
    look for the user in Keycloak, and in the log for last-known; if the user is really gone, mailcloakctl flush {address};
      policy.disappearance_grace_seconds sets for how long a user is not believed gone
database-unavailable: the database cannot be read, and the answer depends on it
    mailcloakctl doctor shows what is wrong with the database
internal-error: a fault of mailcloak itself: the answer is temporary
    the daemon's log has a line 'internal error'; please report it
other-state: the request is neither at RCPT nor at MAIL: mailcloak checks nothing
    check_policy_service stands in a wrong list of restrictions: compare main.cf with share/doc/mailcloak/examples/postfix/main.cf
nothing-to-check: the request is for a recipient, but there is no recipient yet: mailcloak checks nothing
    check_policy_service stands in a wrong list of restrictions: compare main.cf with share/doc/mailcloak/examples/postfix/main.cf
# what mailcloakctl asks
stats: mailcloakctl status has asked
explain: mailcloakctl ask has asked
flush: mailcloakctl flush has asked
bad-question: the daemon does not understand the question
    use a mailcloakctl of the same version as the daemon
not-permitted: the user may connect, but may not use the maps explain and flush
    run mailcloakctl as root
# what Postfix does not ask
unknown-map: there is no map of this name
    in main.cf, virtual_alias_maps: the map's name is alias
no-key: the map was asked without a key
    Postfix does not send such a request: compare main.cf with share/doc/mailcloak/examples/postfix/main.cf
"""
)


# ---------------------------------------------------------------------------------------------------------------------------------
# 4. Wire protocols
# Bytes to requests and answers to bytes. A stream object belongs to one connection, and so to one thread; it holds the bytes that are
# not a whole request yet. No I/O.
# ---------------------------------------------------------------------------------------------------------------------------------


def _decode(data: bytes) -> str:
    """Bytes of a client, or of the database, as text; what is not UTF-8 becomes characters that no stored address or name can hold."""
    return data.decode("utf-8", "surrogateescape")


class _Stream:
    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> None:
        self._buffer += data

    @property
    def has_begun(self) -> bool:
        """Are there bytes of a request that is not whole yet?"""
        return self._buffer != b""


class PolicyStream(_Stream):
    """Requests of the policy protocol: lines of name=value, ended by an empty line. Source: SMTPD_POLICY_README."""

    def next_request(self) -> Optional[PolicyRequest]:
        """The next whole request, None when there is none yet; raises ProtocolError for bytes that can never be one."""
        if self._buffer.startswith(b"\n"):
            raise ProtocolError("empty request")
        end = self._buffer.find(b"\n\n", 0, MAX_POLICY_REQUEST_BYTES)
        if end < 0:
            if len(self._buffer) >= MAX_POLICY_REQUEST_BYTES:
                raise ProtocolError(f"request longer than {MAX_POLICY_REQUEST_BYTES} bytes")
            return None
        request, self._buffer = self._buffer[:end], self._buffer[end + 2 :]
        return parse_policy_request(request)

    @staticmethod
    def encode(action: Action) -> bytes:
        return b"action=" + action.text.encode("utf-8", "replace") + b"\n\n"


# what they begin with, and its length
_POLICY_LINES = tuple((f"\n{name}=", len(name) + 2) for name in ("request", *PolicyRequest._fields[:-1]))


def parse_policy_request(data: bytes) -> PolicyRequest:
    """One request without its empty line. Other attributes are ignored, the last of two lines counts; raises ProtocolError."""
    text = _decode(b"\n" + data + b"\n")
    values = []
    for line, length in _POLICY_LINES:  # find_attribute(), without a call for each
        at = text.rfind(line)
        values.append(text[at + length : text.index("\n", at + length)] if at >= 0 else "")
    if values[0] != "smtpd_access_policy":
        raise ProtocolError(f"request={escape_for_log(values[0])}, expected smtpd_access_policy")
    return PolicyRequest._make([*values[1:], text])


def find_attribute(text: str, line: str) -> str:
    """The value behind the last line of a request's text that begins so, as in "\\nclient_address="; "" where there is none."""
    at = text.rfind(line)
    return text[at + len(line) : text.index("\n", at + 1)] if at >= 0 else ""


class SocketmapQuery(NamedTuple):
    """One query: the name of a map, and the key that is looked up in it."""

    name: str
    key: str


_LENGTH = re.compile(rb"(0|[1-9][0-9]{0,4})?")  # of a netstring; "" while nothing has come


class SocketmapStream(_Stream):
    """Queries of the socketmap protocol: netstrings that hold a map name, a space and a key. Source: socketmap_table(5)."""

    def next_request(self) -> Optional[SocketmapQuery]:
        """The next whole query, None when there is none yet; raises ProtocolError for bytes that are not a netstring."""
        digits, colon, rest = self._buffer.partition(b":")
        if not _LENGTH.fullmatch(digits) or (colon and not digits):
            raise ProtocolError("not a netstring")
        if not colon:
            return None
        length = int(digits)
        if length > MAX_SOCKETMAP_QUERY_BYTES:
            raise ProtocolError(f"query longer than {MAX_SOCKETMAP_QUERY_BYTES} bytes")
        if len(rest) <= length:
            return None
        if rest[length : length + 1] != b",":
            raise ProtocolError("netstring without its comma")
        self._buffer = rest[length + 1 :]
        name, _, key = _decode(rest[:length]).partition(" ")
        return SocketmapQuery(name, key)

    @staticmethod
    def encode(action: Action) -> bytes:
        return encode_netstring(action.text.encode("utf-8", "replace"))


def encode_netstring(payload: bytes) -> bytes:
    """Source: D. J. Bernstein, Netstrings, 1997."""
    return b"%d:%s," % (len(payload), payload)


# ---------------------------------------------------------------------------------------------------------------------------------
# 5. Config
# The YAML file as frozen dataclasses. Each field carries the reader that checks its value, so a key is described in one place, and
# every problem of a file is found in one pass. Later sections never see a raw dict. The main thread reads the file at the start and at
# each reload; every thread reads what came of it, which never changes. mailcloakctl reads it too.
# ---------------------------------------------------------------------------------------------------------------------------------

# A YAML value to the field's value; raises ValueError("expected ...") or ValueError("expected ...", hint).
_Reader = Callable[[Any], Any]


def near_miss(value: Any, choices: Sequence[str]) -> str:
    """The one of the choices that was probably meant, as a question behind a message; "" if none is near."""
    import difflib

    close = difflib.get_close_matches(str(value), choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _shown(value: Any) -> str:
    """A value of the file, short enough for a message, without the password of a URL and without a secret from the next line.

    A line with too much indentation, or behind a quote that is not closed, becomes part of the value of the line before it.
    """
    text = "nothing" if value is None else re.sub(r".*[:/].*@", "'...@", repr(value))
    if isinstance(value, dict) or "secret" in text:
        return _kind(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _shown_key(key: Any) -> str:
    """A key of the file without what follows where the space after its colon was forgotten."""
    return re.sub(r"[^\w.-].*", "...", str(key), flags=re.DOTALL)


def _kind(value: Any) -> str:
    """What sort of value it is, where the value itself might hold a secret."""
    names = {type(None): "nothing", str: "text", list: "a list", dict: "a block of keys", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else "something else")


def _or_empty(read: _Reader) -> _Reader:
    return lambda value: "" if value == "" else read(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("expected text")
    if not value.isprintable():
        raise ValueError("expected text without control characters")
    return value


def _absolute_path(value: Any) -> str:
    if not os.path.isabs(_text(value)):
        raise ValueError("expected an absolute path")
    return str(value)


def _socket_path(value: Any) -> str:
    size = len(os.fsencode(_absolute_path(value)))
    if size > MAX_SOCKET_PATH_BYTES:
        raise ValueError(f"expected a path of at most {MAX_SOCKET_PATH_BYTES} bytes, the limit of a Unix socket ({size} bytes)")
    return str(value)


def _url(value: Any) -> str:
    if "@" in _text(value):
        raise ValueError("expected a URL without user and password; put the secret into keycloak.client_secret")
    if re.search("[^/]/(realms|admin)(/|$)", value):
        raise ValueError("expected a URL without /realms/... and /admin/..., which mailcloak adds")
    with contextlib.suppress(ValueError):  # urlsplit() quotes parts of the URL in it; .port raises it when it is not a number
        parts = urllib.parse.urlsplit(value)
        is_plain = re.fullmatch(r"[^<>\s?#]+", value) and re.fullmatch(r"[\w.:\[\]-]+", parts.netloc)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and is_plain:
            return str(value).rstrip("/")
    raise ValueError("expected a URL such as https://sso.example.org")


def _number(minimum: float, maximum: float = 1e9, *, whole: bool = False, wanted: str) -> _Reader:
    def read(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int,) if whole else (int, float)) or not minimum <= value <= maximum:
            raise ValueError(f"expected {wanted}")
        return value

    return read


_positive_seconds = _number(0.001, wanted="a positive number")
_any_seconds = _number(0, wanted="a number, 0 or more")


def _choice(*choices: str) -> _Reader:
    def read(value: Any) -> str:
        if value in choices:
            return str(value)
        raise ValueError(f"expected one of {', '.join(choices)}", near_miss(value, choices))

    return read


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _domains(value: Any) -> frozenset[str]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError("expected a domain such as example.org, or a list of them")
    return frozenset(_domain(each) for each in values)


def _addresses(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    try:
        return tuple(parse_plain_address(each if isinstance(each, str) else "").text for each in values)
    except ValueError as exc:
        raise ValueError(f"expected an e-mail address or a list of them: {exc}") from None


def _delimiters(value: Any) -> str:
    if not isinstance(value, str) or any(not 33 <= ord(c) <= 126 or c.isalnum() or c in '@"\\<>' for c in value):
        raise ValueError("expected the delimiter characters themselves, such as + or +-, as in Postfix's recipient_delimiter")
    return value


def _octal_mode(value: Any) -> int:
    if not isinstance(value, str) or not re.fullmatch(r"0?[0-7]{3}", value):
        raise ValueError('expected an octal mode as text, in quotes, such as "0660"')
    return int(value, 8)


def _account(kind: str, find: Callable[[str], Any], hint: str = "") -> _Reader:
    def read(value: Any) -> str:
        try:
            find(_text(value))
        except KeyError:  # no near miss: an account of another program would not do
            raise ValueError(f"expected an existing {kind}", hint) from None
        return str(value)

    return _or_empty(read)


_user = _account("user", pwd.getpwnam)
_group = _account("group", grp.getgrnam)


def _daemon_user(value: Any) -> str:
    hint = "; make it by useradd --system --user-group, or by systemd-sysusers, as the README says"
    # nobody else can become that user anyway
    return str((_account("user", pwd.getpwnam, hint) if os.geteuid() == 0 else _or_empty(_text))(value))


def _static_users(value: Any) -> Mapping[str, str]:
    if not isinstance(value, dict) or not value:
        raise ValueError("expected pairs of username: address")
    users: dict[str, str] = {}
    for username, address in value.items():
        if not isinstance(username, str) or not username or not username.isprintable():
            raise ValueError(f"expected usernames as text, got {username!r}; put it in quotes")
        if username.lower() in users:
            raise ValueError(f"expected each username once, got {username.lower()!r} twice")
        try:
            users[username.lower()] = parse_plain_address(address if isinstance(address, str) else "").text
        except ValueError as exc:
            raise ValueError(f"{username}: expected an e-mail address: {exc}") from None
    return MappingProxyType(users)


def _key(read: _Reader, default: Any = dataclasses.MISSING, *, secret: bool = False) -> Any:
    """A dataclass field with its reader; a secret is never shown, neither in a problem nor in repr()."""
    return dataclasses.field(default=default, repr=not secret, metadata={"read": read})


@dataclass(frozen=True)
class KeycloakConfig:
    """The block keycloak. Exactly one of the two secrets is given; client_secret is the secret itself in either case."""

    base_url: str = _key(_url)
    realm: str = _key(_text)
    client_id: str = _key(_text)
    client_secret: str = _key(_text, "", secret=True)
    client_secret_file: str = _key(_absolute_path, "", secret=True)  # not shown: it might be the secret itself
    ca_file: str = _key(_or_empty(_absolute_path), "")
    timeout_seconds: float = _key(_number(0.1, 60, wanted="a number from 0.1 to 60"), 5)
    max_requests: int = _key(_number(1, 100, whole=True, wanted="a whole number from 1 to 100"), 8)
    require_verified_email: bool = _key(_boolean, False)
    receive_when_locked_out: bool = _key(_boolean, True)
    canary: tuple[str, ...] = _key(_addresses, ())


@dataclass(frozen=True)
class PolicyConfig:
    """The block policy; times in seconds."""

    domain: frozenset[str] = _key(_domains)
    mailbox_domain: str = _key(_or_empty(_domain), "")
    cache_ttl_seconds: float = _key(_positive_seconds, 120)
    negative_cache_ttl_seconds: float = _key(_any_seconds, 10)
    cache_max_entries: int = _key(_number(1, whole=True, wanted="a whole number, 1 or more"), 100_000)
    stale_if_error_seconds: float = _key(_any_seconds, 86400)
    disappearance_grace_seconds: float = _key(_any_seconds, 3600)
    keycloak_failure_mode: str = _key(_choice("tempfail", "dunno-recipients", "dunno"), "tempfail")
    recipient_delimiter: str = _key(_delimiters, "")
    unauthenticated_local_sender: str = _key(_choice("reject", "warn", "dunno"), "reject")
    foreign_sender: str = _key(_choice("reject", "dunno"), "reject")


@dataclass(frozen=True)
class SqliteConfig:
    """The block sqlite."""

    path: str = _key(_absolute_path, DEFAULT_DATABASE_PATH)


@dataclass(frozen=True)
class SocketsConfig:
    """The block sockets; "" for a user or group keeps the one that the daemon has."""

    policy_socket: str = _key(_socket_path)
    socketmap_socket: str = _key(_socket_path)
    socket_owner_user: str = _key(_user, "postfix")
    socket_owner_group: str = _key(_group, "postfix")
    socket_mode: int = _key(_octal_mode, "0660")


@dataclass(frozen=True)
class DaemonConfig:
    """The block daemon; user "" keeps the one that started it."""

    user: str = _key(_daemon_user, "mailcloak")
    log: str = _key(_choice("stderr", "syslog"), "stderr")
    log_level: str = _key(_choice("debug", "info", "warning", "error"), "info")
    max_connections: int = _key(_number(1, 100_000, whole=True, wanted="a whole number from 1 to 100000"), 1000)


@dataclass(frozen=True)
class ReplicationConfig:
    """The block replication, for several mail hosts; mailcloakctl alone reads it."""

    max_lag_seconds: float = _key(_positive_seconds, 60)


_BLOCKS: Mapping[str, type[Any]] = MappingProxyType(
    {
        "keycloak": KeycloakConfig,
        "policy": PolicyConfig,
        "sqlite": SqliteConfig,
        "sockets": SocketsConfig,
        "daemon": DaemonConfig,
        "replication": ReplicationConfig,
    }
)


@dataclass(frozen=True)
class Config:
    """One configuration file, checked. Exactly one of keycloak and static_users is there; warnings are for the log."""

    path: str
    keycloak: Optional[KeycloakConfig]
    static_users: Optional[Mapping[str, str]]
    policy: PolicyConfig
    sqlite: SqliteConfig
    sockets: SocketsConfig
    daemon: DaemonConfig
    replication: ReplicationConfig = ReplicationConfig()
    warnings: tuple[Problem, ...] = ()


def open_file(path: str, flags: int = 0) -> IO[str]:
    """A file of text, to be read; raises OSError, at once for what is no regular file: a FIFO or a device may never end."""

    def opener(name: str, mode: int) -> int:
        descriptor = os.open(name, mode | os.O_NONBLOCK | flags)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is not a regular file")
        return descriptor

    return open(path, encoding="utf-8", opener=opener)


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, since one of the two would have no effect, and aliases: a few lines could hold billions."""

    def compose_node(self, parent: Optional[yaml.Node], index: Any) -> Optional[yaml.Node]:
        """The next value of the file."""
        if self.check_event(yaml.AliasEvent):
            text = "an alias (*name): write out what it stands for, a text with * in quotes"
            raise yaml.composer.ComposerError(None, None, text, self.current_event.start_mark)
        return super().compose_node(parent, index)


def _construct_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key, _ in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else key
        if name in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key given twice: {_shown_key(name)}", key.start_mark)
        seen.add(name)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


# A fault as PyYAML says it, and what it is in most files. Never the line itself, which may hold a secret.
_YAML_FAULTS = (
    (r"character '\\t' that cannot", "a tab, where YAML takes only spaces"),
    (r"character '.' that cannot", "a value that begins with a character such as @ or % needs quotes"),
    (
        "mapping values are not allowed",
        "no space after a colon further up, two colons in this line (a value with one needs quotes), or wrong indentation",
    ),
    ("could not find expected ':'", "no colon with a space after it"),
    ("unexpected end of stream", "a quote that is not closed"),
    ("expected (<block end>|'<document start>')", "wrong indentation, or a quote that is not closed or stands inside a value"),
)


def _describe_yaml(exc: yaml.MarkedYAMLError) -> str:
    """The line of a fault, and what is probably wrong there."""
    # of a key or a quote the end is missing, so its line is where it begins
    is_open = str(exc.context).startswith("while scanning a ")
    mark = (exc.context_mark if is_open else None) or exc.problem_mark
    problem = re.sub(r"(alias|tag|handle) '.*'", r"\1 '...'", exc.problem or "not YAML")
    fault = next((fault for said, fault in _YAML_FAULTS if re.search(said, problem)), problem)
    return f"line {mark.line + 1 if mark else 1}: {fault}"


def read_yaml(path: str) -> dict[str, Any]:
    """The file as a mapping of blocks, unchecked; raises ConfigError with the file's line where YAML itself fails."""
    try:
        with open_file(path) as file:
            text = file.read(MAX_CONFIG_CHARS + 1)
        if len(text) > MAX_CONFIG_CHARS:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        raw = yaml.load(text, Loader=_StrictLoader)  # noqa: S506  a SafeLoader by descent, builds plain values only
        repr(raw)  # ValueError for a number of thousands of digits, which no message could show
    except OSError as exc:
        raise ConfigError([Problem(path, f"cannot be read: {exc.strerror}", kind="unreadable")]) from exc
    except yaml.MarkedYAMLError as exc:
        raise ConfigError([Problem(path, _describe_yaml(exc))]) from exc
    except Exception as exc:  # PyYAML lets out whatever it meets in values such as "!!bool x" and "!!int ''"
        raise ConfigError([Problem(path, f"not YAML in UTF-8 ({type(exc).__name__})")]) from exc
    if not isinstance(raw, dict):
        raise ConfigError([Problem(path, f"expected blocks such as policy: and sockets:, got {_kind(raw)}")])
    return raw


def read_block(cls: type[Any], name: str, raw: Any, problems: list[Problem]) -> Any:
    """One block of the file as its dataclass, or None with its problems appended."""
    if not isinstance(raw, dict):
        ask = "; is there a space after each colon?" if isinstance(raw, str) else ""
        problems.append(Problem(name, f"expected a block of keys, got {_kind(raw)}{ask}"))
        return None
    before = len(problems)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = [key for key in raw if key not in fields]
    problems += [Problem(f"{name}.{_shown_key(key)}", f"unknown key{near_miss(key, list(fields))}") for key in unknown]
    values: dict[str, Any] = {}
    for key, field in fields.items():
        if key not in raw and field.default is dataclasses.MISSING:
            problems.append(Problem(f"{name}.{key}", "missing, this key is required"))
            continue
        value = raw.get(key, field.default)
        try:
            if isinstance(value, str) and re.fullmatch(r"\s*<[^<>]*>\s*", value):
                raise ValueError("expected your own value in place of the placeholder")
            values[key] = field.metadata["read"](value) if key in raw or value else value
        except ValueError as exc:
            expected, *hint = exc.args
            shown = _shown(value) if field.repr else "a value that is not shown"
            problems.append(Problem(f"{name}.{key}", f"{expected}, got {shown}{''.join(hint)}"))
    problems += _check_between_keys(name, raw, values)
    return cls(**values) if len(problems) == before else None


def _check_between_keys(block: str, raw: Mapping[str, Any], values: dict[str, Any]) -> Iterator[Problem]:
    """What the keys of a block require of each other, and of files. raw: the keys that are there; values: those that could be read."""
    if block == "keycloak":
        yield from _check_secret(raw, values)
    if ca_file := values.get("ca_file"):
        import ssl

        text = f"{ca_file}: expected a file of CA certificates in PEM form"
        is_folder = os.path.isdir(ca_file)
        try:
            if not is_folder:
                open_file(ca_file).close()
            ssl.create_default_context(**{"capath" if is_folder else "cafile": ca_file})
        except ssl.SSLError:
            yield Problem("keycloak.ca_file", f"{text}: no such certificates in it")
        except OSError as exc:
            yield Problem("keycloak.ca_file", f"{text}: {exc.strerror}", kind="unreadable")
    if values.get("mailbox_domain") in values.get("domain", ()):
        yield Problem("policy.mailbox_domain", f"expected a domain that is not in policy.domain, got {values['mailbox_domain']!r}")
    for name, use in (("last-known.db", "saves users"), ("last-used.json", "notes uses of apps")):
        if os.path.basename(values.get("path", "")) == name:
            yield Problem("sqlite.path", f"expected another name than {name}, the file in which the daemon {use}")
    with contextlib.suppress(OSError):  # a link that is taken away in this moment; the start looks at each path again
        sockets = [os.path.realpath(values[name]) for name in ("policy_socket", "socketmap_socket") if name in values]
        if len(sockets) > len(set(sockets)):
            yield Problem("sockets.socketmap_socket", "expected another path than policy_socket")


def _check_secret(raw: Mapping[str, Any], values: dict[str, Any]) -> Iterator[Problem]:
    """Put the secret in place, from the key itself or from the file that client_secret_file names."""
    if bool(raw.get("client_secret")) == bool(raw.get("client_secret_file")):
        yield Problem("keycloak.client_secret", "expected exactly one of client_secret and client_secret_file")
        return
    path = values.get("client_secret_file")
    if not path:
        return
    try:
        with open_file(path) as file:
            secret = file.readline(4096).strip()
    except (OSError, UnicodeDecodeError) as exc:
        # A secret may begin with a slash; a file that is there, or could be, is none.
        is_path = os.path.exists(path) or (os.path.dirname(path) != "/" and os.path.isdir(os.path.dirname(path)))
        shown = path if is_path else "a path that is not shown"
        reason = exc.strerror if isinstance(exc, OSError) else "not UTF-8"
        yield Problem("keycloak.client_secret_file", f"{shown}: cannot be read: {reason}", kind="unreadable")
        return
    if not secret or not secret.isprintable():
        yield Problem("keycloak.client_secret_file", f"{path}: expected the secret in the first line")
    values["client_secret"] = secret


def _config_warnings(path: str, config: Config) -> Iterator[Problem]:
    keycloak = config.keycloak
    if keycloak:
        secret_file = keycloak.client_secret_file or path
        with contextlib.suppress(OSError):
            if os.stat(secret_file).st_mode & stat.S_IROTH:
                text = "holds the client secret and every user of this host can read it"
                yield Problem(secret_file, text, "chmod o-r", "secret-exposed")
        if keycloak.base_url.startswith("http:"):
            text = "http sends the client secret unencrypted"
            yield Problem("keycloak.base_url", text, "use https beyond this host", "plain-http")
    for username, address in (config.static_users or {}).items():
        if normalise_address(address).domain not in config.policy.domain:
            yield Problem(f"static_users.{username}", f"<{address}> is not in policy.domain and owns nothing")
    if config.sockets.socket_mode & 0o006:
        yield Problem("sockets.socket_mode", "every user of this host may connect", "0660 is usual")


def read_blocks(path: str) -> tuple[dict[str, Any], list[Problem]]:
    """(the blocks of the file that are good, by name; every problem); raises ConfigError where the file as a whole cannot be read."""
    raw = read_yaml(path)
    known = [*_BLOCKS, "static_users"]
    problems = [Problem(_shown_key(key), f"unknown key{near_miss(key, known)}") for key in raw if key not in known]
    blocks = {
        name: read_block(cls, name, raw.get(name, {}), problems)
        for name, cls in _BLOCKS.items()
        if name in raw or name != "keycloak"
    }
    if "static_users" in raw:
        try:
            blocks["static_users"] = _static_users(raw["static_users"])
        except ValueError as exc:
            problems.append(Problem("static_users", str(exc)))
    if ("keycloak" in raw) == ("static_users" in raw):
        problems.append(Problem("keycloak", "expected exactly one of the blocks keycloak and static_users"))
    return {name: block for name, block in blocks.items() if block is not None}, problems


def load_config(path: str) -> Config:
    """The file, checked as a whole; raises ConfigError with every problem of the file."""
    blocks, problems = read_blocks(path)
    if problems:
        raise ConfigError(problems)
    config = Config(path=path, **{"keycloak": None, "static_users": None, **blocks})
    return dataclasses.replace(config, warnings=tuple(_config_warnings(path, config)))


# How main.cf names each socket, in the values of its settings.
_IN_MAIN_CF = {"policy_socket": r"check_policy_service[\s{]+unix:([^\s,}]+)", "socketmap_socket": r"socketmap:unix:([^\s,:]+)"}


def misnamed_sockets(sockets: SocketsConfig, queue_directory: str, main_cf: str) -> Iterator[tuple[str, Problem]]:
    """Where the values of main.cf name no socket of ours but another of mailcloak beside it: (the path of that, the problem)."""
    ours = [getattr(sockets, key) for key in _IN_MAIN_CF]
    for (key, pattern), path in zip(_IN_MAIN_CF.items(), ours):
        asked = [os.path.join(queue_directory, name) for name in re.findall(pattern, main_cf)]
        beside = [other for other in asked if re.fullmatch(re.escape(os.path.dirname(path)) + "/[^/]*mailcloak[^/]*", other)]
        if beside and not set(ours) & set(asked):
            text = f"{path} here, {beside[0]} in Postfix's main.cf; both must be the same"
            yield beside[0], Problem(f"sockets.{key}", text, "correct the one that is wrong")


def postfix_warnings(config: Config) -> Iterator[Problem]:
    """What does not fit the Postfix of this host, if there is one. Source: postconf(1)."""
    import subprocess

    for key in ("policy_socket", "socketmap_socket"):
        directory = os.path.dirname(getattr(config.sockets, key))
        try:
            os.stat(directory)
        except FileNotFoundError:
            remedy = "start Postfix once, which makes its own, or correct the path"
            yield Problem(f"sockets.{key}", f"directory {directory!r} does not exist", remedy)
        except OSError:  # not to be seen from here
            pass
    postconf = shutil.which("postconf", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if not postconf:
        return
    try:
        lists = ("smtpd_relay_restrictions", "smtpd_recipient_restrictions", "smtpd_sender_restrictions", "virtual_alias_maps")
        command = [postconf, "-xh", "queue_directory", "recipient_delimiter", *lists]
        output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout
        queue_directory, delimiter, main_cf = output.split("\n", 2)
    except (OSError, ValueError, subprocess.SubprocessError) as exc:
        yield Problem("postconf", f"could not be asked whether this fits Postfix: {type(exc).__name__}")
        return
    for key in ("policy_socket", "socketmap_socket"):
        path = getattr(config.sockets, key)
        if not path.startswith(f"{queue_directory.rstrip('/')}/"):
            text = f"{path} is not below Postfix's queue_directory {queue_directory}, where a chrooted smtpd looks"
            yield Problem(f"sockets.{key}", text)
    yield from (problem for _, problem in misnamed_sockets(config.sockets, queue_directory, main_cf))
    if delimiter != config.policy.recipient_delimiter:
        ours = config.policy.recipient_delimiter
        yield Problem("policy.recipient_delimiter", f"{ours!r} here, {delimiter!r} in Postfix's main.cf; both must be the same")


# ---------------------------------------------------------------------------------------------------------------------------------
# 6. Database
# The daemon's SQL on aliases and apps. Each thread that asks SQLite has its own connection, since sqlite3 connections must not be shared;
# one asks at a time, for all that wait. Handler, server, timer and main threads enter, the one that saves users, and mailcloakctl. A row
# is remembered with the version of the file (Database.version) and counts only while the file has that version, so a commit counts from
# the next request on. The three system calls that keep Python's lock stand here, too; section 10 uses one of them.
# ---------------------------------------------------------------------------------------------------------------------------------

MOVE_DATABASE = "to keep the database, stop the daemon, move the whole directory, and start the daemon"

SCHEMA_VERSION = 3
SCHEMA = """\
-- The state of mailcloak: aliases and apps. Written by mailcloakctl, read by mailcloak and by Dovecot.
-- The version of this schema is PRAGMA user_version. Addresses and names are stored in lower case, domains in A-label form.

-- An address that leads to a user's mailbox. The address counts only if its domain is one of policy.domain.
CREATE TABLE IF NOT EXISTS aliases (
    alias_email TEXT PRIMARY KEY,                                  -- local-part@domain, without an extension
    username    TEXT NOT NULL,                                     -- the Keycloak user who receives and may send as it
    enabled     INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)), -- 0: the address exists for nobody
    updated_at  INTEGER NOT NULL DEFAULT (strftime('%s', 'now')),  -- seconds since 1970, UTC
    source      TEXT,                                              -- the job that owns the row (aliases sync --source)
    receive_only INTEGER NOT NULL DEFAULT 0 CHECK (receive_only IN (0, 1)), -- 1: its users may not send as it
    external    INTEGER NOT NULL DEFAULT 0 CHECK (external IN (0, 1)) -- 1: username is an address elsewhere
);
-- For all aliases of one user.
CREATE INDEX IF NOT EXISTS aliases_username ON aliases (username);

-- The further targets of an alias that has several.
CREATE TABLE IF NOT EXISTS alias_targets (
    alias_email TEXT NOT NULL,
    target      TEXT NOT NULL,                                     -- a username or, where external is 1, an address elsewhere
    external    INTEGER NOT NULL DEFAULT 0 CHECK (external IN (0, 1)),
    PRIMARY KEY (alias_email, target),
    FOREIGN KEY (alias_email) REFERENCES aliases (alias_email) ON DELETE CASCADE -- an alias takes its targets with it
);
-- For all aliases of one user.
CREATE INDEX IF NOT EXISTS alias_targets_target ON alias_targets (target);

-- A login that may send but never receives: a printer, a shop, a monitoring system. Dovecot checks its password.
CREATE TABLE IF NOT EXISTS apps (
    app_id      TEXT PRIMARY KEY,                                  -- the SASL username
    secret_hash TEXT NOT NULL,                                     -- {SCHEME}hash as in Dovecot, never the password itself
    enabled     INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)), -- 0: may neither log in nor send
    created_at  INTEGER NOT NULL DEFAULT (strftime('%s', 'now')),  -- seconds since 1970, UTC
    owner       TEXT,                                              -- the app counts only while this Keycloak user is enabled
    expires_at  INTEGER                                            -- seconds since 1970, UTC: from then on as if disabled
);

-- The sender addresses that an app may use.
CREATE TABLE IF NOT EXISTS app_from (
    app_id    TEXT NOT NULL,
    from_addr TEXT NOT NULL,                                       -- the exact sender; the empty string is the null sender <>
    enabled   INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)), -- 0: as if the row were not there
    PRIMARY KEY (app_id, from_addr),                               -- an address is allowed once
    FOREIGN KEY (app_id) REFERENCES apps (app_id) ON DELETE CASCADE -- an app takes its addresses with it
);
"""
# (table, column, type): what a file of an older version lacks. Tables that are missing come from SCHEMA.
ADDED_COLUMNS = (
    ("aliases", "source", "TEXT"),
    ("aliases", "receive_only", "INTEGER NOT NULL DEFAULT 0 CHECK (receive_only IN (0, 1))"),
    ("aliases", "external", "INTEGER NOT NULL DEFAULT 0 CHECK (external IN (0, 1))"),
    ("apps", "owner", "TEXT"),
    ("apps", "expires_at", "INTEGER"),
)


# Of an alias, each of its targets on a line, with 0 before a username and 1 before an address elsewhere. No name holds the end of a line.
ALIAS_TARGETS = (
    "(aliases.external = 1) || replace(username, char(10), '?') || COALESCE((SELECT char(10) || group_concat((external = 1)"
    " || replace(target, char(10), '?'), char(10)) FROM alias_targets WHERE alias_email = aliases.alias_email), '')"
)
ALIAS_COLUMNS = f"{ALIAS_TARGETS}, enabled, receive_only"  # for read_alias()


def read_alias(targets: str, enabled: Any, receive_only: Any) -> Alias:
    """The alias of these columns."""
    if "\n" not in targets and targets[:1] == "0" != targets:  # one user, as nearly all have it
        return Alias((targets[1:].lower(),), enabled == 1, (), receive_only == 1)
    lines = sorted({line for line in targets.lower().split("\n") if line[1:]})
    users = tuple([line[1:] for line in lines if line[0] == "0"])
    external = tuple([line[1:] for line in lines if line[0] == "1"])
    return Alias(users, enabled == 1, external, receive_only == 1)


# UnicodeDecodeError: of SQLite's message about a damaged file, which quotes its bytes.
SQLITE_ERRORS = (sqlite3.Error, UnicodeDecodeError)


def describe_sqlite(exc: BaseException) -> str:
    """What SQLite says, on one line."""
    text = "the file is malformed" if isinstance(exc, UnicodeDecodeError) else str(exc)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def sqlite_fault(exc: Optional[BaseException]) -> str:
    """What SQLite complains of, also where it caused an error of ours: "busy", "full", "damaged", "readonly", or "" for anything else.

    By the library's own constant texts (sqlite3_errstr()): its codes come with Python 3.11 only. Texts of ours may hold such words in a path.
    """
    while exc and not isinstance(exc, SQLITE_ERRORS):
        exc = exc.__cause__
    if exc is None:
        return ""
    texts = {"locked": "busy", "disk is full": "full", "malformed": "damaged", "not a database": "damaged", "readonly": "readonly"}
    return next((fault for text, fault in texts.items() if text in describe_sqlite(exc)), "")


def connect_database(path: str, busy_seconds: float, factory: type[sqlite3.Connection] = sqlite3.Connection) -> sqlite3.Connection:
    """A connection to an existing file, in autocommit mode; raises one of SQLITE_ERRORS, as each use of it does.

    Opened for writing even to read: only then can SQLite roll back the journal that a killed writer left behind. SQLite falls back
    to reading by itself where the file may not be written. The connection may be closed, though not used, by another thread.
    """
    uri = f"file:{urllib.parse.quote(os.fsencode(path))}?mode=rw"
    connection = sqlite3.connect(
        uri, uri=True, timeout=busy_seconds, isolation_level=None, check_same_thread=False, factory=factory
    )
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def create_database_file(path: str, mode: int = 0o640) -> bool:
    """Make an empty file, as root for the owner and group of its directory; False if there is one already."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, mode)
    except FileExistsError:
        return False
    except FileNotFoundError as exc:
        raise StartError(
            f"sqlite.path: directory {os.path.dirname(path)!r} does not exist, create it for the user that runs mailcloak"
        ) from exc
    except OSError as exc:
        parent, user, remedy = os.path.dirname(path), pwd.getpwuid(os.geteuid()).pw_name, ""
        if isinstance(exc, PermissionError):
            remedy = f"let this user write and enter its directory: chown {shlex.quote(user)} {shlex.quote(parent)}"
            if not os.path.exists(parent):  # as far as this user sees
                remedy = f"let this user enter each directory above {parent!r}"
        raise StartError(f"sqlite.path: {path!r} cannot be created: {exc.strerror}, as user {user!r}", remedy) from exc
    try:
        os.fchmod(descriptor, mode)
        directory = os.stat(os.path.dirname(path))
        if os.geteuid() == 0:
            os.fchown(descriptor, directory.st_uid, directory.st_gid)
    finally:
        os.close(descriptor)
    return True


def file_identity(path: str) -> Optional[tuple[int, int]]:
    """(device, inode) of what has this name, None for nothing. An inode is not used again while it is open, or its socket is."""
    with contextlib.suppress(FileNotFoundError):
        status = os.lstat(path)
        return status.st_dev, status.st_ino
    return None


def last_known_path(database_path: str) -> str:
    """Of the file that SavedUsers keeps beside the database."""
    return os.path.join(os.path.dirname(database_path), "last-known.db")


def last_used_path(database_path: str) -> str:
    """Of the file that AppUses keeps beside the database."""
    return os.path.join(os.path.dirname(database_path), "last-used.json")


def prepare_database(path: str, busy_seconds: float, *, create: bool = True) -> str:
    """Create the file with its schema if it is missing, migrate an older one; says what was done, "" if nothing.

    Raises StartError where it cannot be made or belongs to a newer mailcloak; DatabaseUnavailable where it is there and cannot be used,
    or is missing and must not be created: a new one in place of a lost one would refuse the mail of every alias.
    """
    if create and not os.path.lexists(path):
        if os.path.exists(last_known_path(path)):
            raise _lost_database(path, "missing, though a daemon has run on it")
        if _create_database(path):
            return "created"
    try:
        if os.stat(path).st_size == 0:  # somebody has emptied it
            raise _lost_database(path, "empty")
        with contextlib.closing(connect_database(path, busy_seconds)) as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise StartError(
                    f"sqlite.path: {path!r} has schema version {version}, this mailcloak knows {SCHEMA_VERSION}: install a newer one"
                )
            copy = _migrate(connection, path) if version < SCHEMA_VERSION else ""
    except (*SQLITE_ERRORS, OSError) as exc:
        raise DatabaseUnavailable(f"database: {path!r}: {describe_sqlite(exc)}") from exc
    return f"migrated to schema version {SCHEMA_VERSION}, the file as it was is {copy}" if copy else ""


def _lost_database(path: str, state: str) -> DatabaseUnavailable:
    remedy = (
        "restore it from a backup; only if it held nothing you need, stop the daemon, delete what there is of it and"
        f" {last_known_path(path)!r}, and start the daemon, which creates a new database"
    )
    return DatabaseUnavailable(f"database: {path!r} is {state}", remedy)


def _create_database(path: str) -> bool:
    """Put a new database at path, complete with its schema; False if another process was faster."""
    new = f"{path}.new-{os.getpid()}"
    with contextlib.suppress(OSError):
        os.unlink(new)
    create_database_file(new)
    try:
        with contextlib.closing(connect_database(new, 0)) as connection:
            _migrate(connection, new)
        os.link(new, path)
    except FileExistsError:
        return False
    except (*SQLITE_ERRORS, OSError) as exc:
        raise StartError(f"sqlite.path: {path!r} cannot be created: {describe_sqlite(exc)}") from exc
    finally:
        os.unlink(new)
    return True


def _migrate(connection: sqlite3.Connection, path: str) -> str:
    """Bring the file to SCHEMA_VERSION in one transaction; the path of the copy that was made first, "" if there was nothing to copy."""
    connection.execute("BEGIN IMMEDIATE")  # left open by an error, rolled back when the connection is closed
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version >= SCHEMA_VERSION:  # another process was faster
        connection.execute("ROLLBACK")
        return ""
    copy = _copy_database(path, version) if connection.execute("SELECT 1 FROM sqlite_master").fetchone() else ""
    try:
        for statement in SCHEMA.split(";\n"):
            connection.execute(statement)
        for table, column, kind in ADDED_COLUMNS:
            if column not in {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}:
                connection.execute(f"ALTER TABLE {table} ADD COLUMN {column} {kind}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except SQLITE_ERRORS:
        if copy:
            os.unlink(copy)  # the file is as it was; each question may try again
        raise
    return copy


def _copy_database(path: str, version: int) -> str:
    """Copy the file beside itself, with its owner, group and mode; the copy's path."""
    copies = (f"{path}.version-{version}{suffix}" for suffix in ("", *(f".{number}" for number in range(1, 1000))))
    copy = next(candidate for candidate in copies if create_database_file(candidate))
    try:
        status = os.stat(path)
        with contextlib.suppress(PermissionError):  # a copy that an unprivileged user makes stays that user's
            os.chown(copy, status.st_uid, status.st_gid)
        os.chmod(copy, stat.S_IMODE(status.st_mode))
        with contextlib.closing(connect_database(path, 30)) as source, contextlib.closing(connect_database(copy, 30)) as target:
            source.backup(target)
    except (*SQLITE_ERRORS, OSError):
        os.unlink(copy)
        raise
    return copy


class BoundedMap(Generic[Value]):
    """A bounded dict, which forgets what was put first, in two parts.

    Entries that anybody on the net can cause have a tenth of the room, beside the rest; they push out only each other.
    """

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._lock = threading.Lock()  # guards the order of the two; a look-up needs none
        self._lasting: OrderedDict[Any, Value] = OrderedDict()  # the oldest first
        self._others: OrderedDict[Any, Value] = OrderedDict()

    def get(self, key: Any) -> Optional[Value]:
        """What is kept under the key."""
        return self._lasting.get(key) or self._others.get(key)

    def put(self, key: Any, value: Value, *, is_lasting: bool) -> None:
        """Keep the value, which is true in a condition, in place of one under the same key."""
        part, other, room = self._lasting, self._others, self._max_entries
        if not is_lasting:
            part, other, room = other, part, self._max_entries // 10
        with self._lock:
            other.pop(key, None)
            part[key] = value
            part.move_to_end(key)
            if len(part) > room:
                part.popitem(last=False)

    def __len__(self) -> int:
        return len(self._lasting) + len(self._others)


def call_with_lock(name: str) -> Optional[Callable[..., int]]:
    """A function of the C library to be called without giving up Python's global lock; None if the library lacks it.

    For system calls that hardly ever wait: with many busy connections, to get that lock back takes longer than all the rest of an answer
    (bench/NOTES.md). It takes small numbers, bytes and buffers as they are; to name their types would double what the call costs.
    """
    return getattr(ctypes.PyDLL(None), name, None)


_statx = call_with_lock("statx")  # not in old musl
_AT_FDCWD, _STATX_INO_SIZE_CTIME, _STATX_BYTES = -100, 0x380, 256  # statx(2)
# stx_ino, stx_size, stx_ctime (s since 1970 and ns; no program can set it), stx_dev_major, stx_dev_minor; on each architecture alike
_STATX_STATE = struct.Struct("=32xQQ48xqI28xII")

_pread = call_with_lock("pread64") or call_with_lock("pread")  # musl has the second alone
_AT_START = ctypes.c_longlong(0)  # an offset, which has 64 bits on each architecture

_send_at_once = call_with_lock("send")
_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL

# Of the content of a file: inode, size, ctime (s, ns), device (major, minor), and the change counter or the header of the -shm file.
Version = tuple[Any, ...]

# The SQLite database file format: page size (1 for 65536), the write version, which is 2 in WAL mode, and the change counter; WAL-mode
# file format: the header of the -shm file, which is there twice.
_HEADER, _WAL_INDEX_BYTES = struct.Struct(">16xHB5xI"), 48


def _read_start(file: _Descriptor, buffer: Any) -> bool:
    """Fill the buffer from the start of the file; False where that cannot be done. These bytes are nearly always in memory, since each
    question reads them; a read from the disk would stop all threads for as long as it takes.
    """
    try:
        count = _pread(file.number, buffer, len(buffer), _AT_START) if _pread else os.preadv(file.number, [buffer], 0)
    except OSError:
        return False
    return bool(count == len(buffer))


def _look_at(path: bytes, buffer: Any) -> Optional[Version]:
    """The parts of a version that are not in the file itself: (inode, size, ctime (s, ns), device (major, minor)); None without a file."""
    if _statx and _statx(_AT_FDCWD, path, 0, _STATX_INO_SIZE_CTIME, buffer) == 0:
        return _STATX_STATE.unpack_from(buffer)
    try:
        found = os.stat(path)
    except OSError:
        return None
    device = os.major(found.st_dev), os.minor(found.st_dev)
    return (found.st_ino, found.st_size, *divmod(found.st_ctime_ns, 10**9), *device)


class _Descriptor:
    """An open file, which is closed with its last reference: nobody reads from a number that is of another file by now."""

    def __init__(self, path: str) -> None:
        self.path = os.fsencode(path)
        self.number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        status = os.fstat(self.number)
        self.inode, self.device = status.st_ino, (os.major(status.st_dev), os.minor(status.st_dev))

    def __del__(self) -> None:
        if hasattr(self, "number"):  # else os.open() failed
            os.close(self.number)

    def is_of(self, state: Optional[Version]) -> bool:
        """Is it the file that was looked at?"""
        return state is not None and state[0] == self.inode and state[4:6] == self.device


class _VersionFile:
    """Where the version of one file is read.

    To close a descriptor of a file drops all locks of the process on that file, SQLite's too (fcntl(2)). So each connection refers to this
    object, which ends after them, and there is one for each file, by whatever path it is found.
    """

    known: ClassVar[weakref.WeakValueDictionary[tuple[int, ...], _VersionFile]] = weakref.WeakValueDictionary()  # by inode, device
    lock = threading.Lock()  # guards it, and that one at a time sets wal_index

    def __init__(self, path: str) -> None:
        self.database = _Descriptor(path)
        self.wal_index: Optional[_Descriptor] = None  # the -shm file, which SQLite deletes with the last connection of all programs
        self._twins: list[_VersionFile] = []  # of the same file, opened by mistake: not to be closed before this one

    @classmethod
    def at(cls, path: str, state: Version) -> _VersionFile:
        """The object for the file that had this path and state a moment ago, or for the one that has the path now; raises OSError."""
        with cls.lock:
            file = cls.known.get((state[0], *state[4:6]))
            if file is None:
                opened = cls(path)
                file = cls.known.setdefault((opened.database.inode, *opened.database.device), opened)
                if file is not opened:
                    file._twins.append(opened)
            return file

    def open_wal_index(self, path: str, buffer: Any) -> bool:
        """Open the -shm file, if it is not open; was it not? Raises OSError. It is there while a connection reads in WAL mode."""
        with self.lock:
            if self.wal_index is not None and self.wal_index.is_of(_look_at(self.wal_index.path, buffer)):
                return False
            self.wal_index = _Descriptor(path)
            return True


class _Question:
    """A row that a thread waits for."""

    __slots__ = ("error", "has_connection", "read_from", "row", "statement", "value", "wake")

    def __init__(self, statement: str, value: Any, *, has_connection: bool) -> None:
        self.statement, self.value = statement, value
        self.has_connection = has_connection  # has its thread one to SQLite?
        self.row: Optional[Sequence[Any]] = None
        self.read_from: Optional[Version] = None  # the row is exactly that of this version; None: not known
        self.error = ""
        self.wake = threading.Lock()  # released when there is the row or the error, or when its thread is the next to ask SQLite
        self.wake.acquire()


class _Connection:
    """A thread's connection to SQLite. It ends with its last reference, and before its file does."""

    def __init__(self, sqlite: sqlite3.Connection, path: str, file: Optional[_VersionFile]) -> None:
        self.sqlite, self.path = sqlite, path
        self.file = file  # None: while it was opened, the path led elsewhere
        self.version: Optional[Version] = None  # when it was used last
        self.schema: Sequence[Any] = ()  # that it knows

    def __del__(self) -> None:
        self.sqlite.close()


class _ThreadsOwn(threading.local):
    """What a thread keeps of the database."""

    connection: Optional[_Connection] = None
    read_from: Optional[Version] = None  # of its last row, as in _Question
    page_bytes = 0  # as in the header, when the version was asked last

    def __init__(self) -> None:
        self.status = ctypes.create_string_buffer(_STATX_BYTES)
        self.header = ctypes.create_string_buffer(_HEADER.size)
        self.wal_index = ctypes.create_string_buffer(2 * _WAL_INDEX_BYTES)


class Database:
    """The daemon's view of the file. Every method raises DatabaseUnavailable when SQLite gives no usable answer.

    A row that was read is remembered with the file's version, and counts while the file has that version.
    """

    # Each is for a JSON array, and gives a row for each of its values with the value's place, also where there is no such alias or app.
    FIND_ALIASES = (
        f"SELECT asked.key, alias_email IS NULL, {ALIAS_COLUMNS}"  # noqa: S608
        " FROM json_each(?) AS asked LEFT JOIN aliases ON alias_email = asked.value"
    )
    FIND_APPS = (
        "SELECT asked.key, app_id IS NULL, apps.enabled, expires_at, CAST(COALESCE(owner, '') AS TEXT),"
        " EXISTS (SELECT 1 FROM app_from WHERE app_id = apps.app_id AND from_addr = json_extract(asked.value, '$[1]') AND enabled = 1)"
        " FROM json_each(?) AS asked LEFT JOIN apps ON app_id = json_extract(asked.value, '$[0]')"
    )

    def __init__(self, path: str) -> None:
        self._path = path
        self._path_bytes = os.fsencode(path)
        self._local = _ThreadsOwn()
        self._rows: BoundedMap[tuple[Version, Any]] = BoundedMap(MAX_REMEMBERED_ROWS)  # by statement and value
        self._file: Optional[_VersionFile] = None  # of the file that has the path now
        self._last: Optional[Version] = None  # what version() said: 40,000 rows and answers need not have one each
        self._open: weakref.WeakSet[_Connection] = weakref.WeakSet()  # of all threads; the one that asks SQLite adds to it
        self._lock = threading.Lock()  # guards the six below
        self._waiting: list[_Question] = []  # for the thread that asks SQLite now
        self._is_asked = False  # is there such a thread?
        self._fails = False  # for one line in the log when it begins and one when it ends
        self._told: deque[float] = deque(maxlen=MAX_FAULTS_TOLD)  # when the log had such lines
        self._is_told = True  # did it have the first of the two?
        self._bad_rows: tuple[str, ...] = ()  # rows that the log has named

    def find_alias(self, address: str, version: Optional[Version] = None) -> Optional[Alias]:
        """The alias of this exact, normalised address. version: what version() said for this question, None to ask it."""
        is_missing, targets, *others = self._row(self.FIND_ALIASES, address, version)
        return None if is_missing else read_alias(self._text(targets, "aliases", address), *others)

    def find_app(self, app_id: str, sender: Optional[str], version: Optional[Version] = None) -> Optional[App]:
        """The app, and whether the normalised sender ("" is <>, None is never) is in its list; None if no app has that id."""
        is_missing, enabled, expires_at, owner, may_send = self._row(self.FIND_APPS, (app_id, sender), version)
        if is_missing:
            return None
        is_expired = expires_at is not None and not (isinstance(expires_at, int) and time.time() < expires_at)
        state = "disabled" if enabled != 1 else "expired" if is_expired else "enabled"
        return App(state, may_send == 1, self._text(owner, "apps", app_id).lower(), None if is_expired else expires_at)

    @property
    def read_from(self) -> Optional[Version]:
        """The version of the file that has exactly the row which this thread found last; None: not known."""
        return self._local.read_from

    def _text(self, value: str, table: str, key: str) -> str:
        """A text of the row; one that is not UTF-8 is a fault of this row alone, said once."""
        if value.isascii() or not re.search("[\udc80-\udcff]", value):
            return value
        text = f"database: {self._path!r}: the row {escape_for_log(key)} of {table} is not UTF-8"
        with self._lock:
            is_new = key not in self._bad_rows
            self._bad_rows = (*self._bad_rows[-100:], key) if is_new else self._bad_rows
        if is_new:
            log.error("%s; answers that need it are deferred until it is fixed", text)
        raise RowUnreadable(text)

    def check(self) -> None:
        """Raise DatabaseUnavailable if a question could not be answered now."""
        self._ask(self.FIND_ALIASES, "")
        self._ask(self.FIND_APPS, ("", ""))

    def works(self) -> bool:
        """Are questions answered? If the last one failed, this asks another."""
        if self._fails:
            with contextlib.suppress(DatabaseUnavailable):
                self.check()
        return not self._fails

    def version(self) -> Optional[Version]:
        """A value that changes with each commit, and when another file takes the place of this one; None if it cannot be told.

        In rollback-journal mode a commit changes the counter in the file's header before anybody can read what it wrote; in WAL mode
        it changes the header of the -shm file. What writes the file without SQLite changes its times.
        Source: the SQLite database file format, section 1.3; the WAL-mode file format, section 2.
        """
        local = self._local
        state = _look_at(self._path_bytes, local.status)
        if state is None:
            return None
        file = self._file
        if file is None or not file.database.is_of(state):
            file = self._find_file(state)
        if file is None or not _read_start(file.database, local.header):
            return None
        local.page_bytes, mode, counter = _HEADER.unpack_from(local.header)
        content: Union[int, bytes] = counter
        if mode == 2:
            wal_index = file.wal_index  # once: another thread may open another one now
            if wal_index is None or not wal_index.is_of(_look_at(wal_index.path, local.status)):
                return None
            if not _read_start(wal_index, local.wal_index):
                return None
            both = local.wal_index.raw
            content = both[:_WAL_INDEX_BYTES]
            if content != both[_WAL_INDEX_BYTES:]:  # a commit is writing it
                return None
        version, last = (*state, content), self._last
        if version == last:
            return last
        self._last = version
        return version

    def close(self) -> None:
        """Close this thread's connection, if it has one."""
        self._local.connection = None

    def _find_file(self, state: Version) -> Optional[_VersionFile]:
        """The open file that has this state; None if the path has yet another one now, or none."""
        try:
            file = self._file = _VersionFile.at(self._path, state)
        except OSError:
            return None
        return file if file.database.is_of(state) else None

    def _open_wal_index(self, connection: _Connection) -> Optional[Version]:
        """The version, if only the -shm file is not open yet: opens it. To be called while this thread reads by the connection."""
        with contextlib.suppress(OSError):
            if connection.file and connection.file.open_wal_index(f"{connection.path}-shm", self._local.status):
                return self.version()
        return None

    def _row(self, statement: str, value: Any, version: Optional[Version]) -> Any:
        """The row that the statement gives for the value, remembered or read; version: of the file a moment ago."""
        version = version or self.version()
        known = self._rows.get((statement, value))
        if known and known[0] == version:
            self._local.read_from = version
            return known[1]
        row, read_from = self._ask(statement, value)
        if read_from:
            self._rows.put((statement, value), (read_from, row), is_lasting=not row[0])
        return row

    def _ask(self, statement: str, value: Any) -> tuple[Any, Optional[Version]]:
        """The row from SQLite, and the version that it was read from.

        One thread at a time asks SQLite, for all that wait; then it wakes them, and one of those who came meanwhile to ask for these. So
        threads that all ask do not wait for each other's locks at each step of SQLite.
        """
        local = self._local
        question = _Question(statement, value, has_connection=local.connection is not None)
        with self._lock:
            is_next, self._is_asked = not self._is_asked, True
            if not is_next:
                self._waiting.append(question)
        if not is_next and not question.wake.acquire(timeout=DATABASE_WAIT_SECONDS) and self._gives_up(question):
            fault = self._unavailable(f"no answer within {DATABASE_WAIT_SECONDS:g} s")
            self._note(fault)
            raise fault
        if question.row is None and not question.error:
            self._ask_for_all(question)
        if question.error or question.row is None:
            raise DatabaseUnavailable(question.error)
        local.read_from = question.read_from
        return question.row, question.read_from

    def _gives_up(self, question: _Question) -> bool:
        """Stop waiting, unless the question was answered or chosen just now."""
        with self._lock:
            if question.wake.acquire(blocking=False):
                return False
            with contextlib.suppress(ValueError):  # it is being asked now
                self._waiting.remove(question)
            return True

    def _ask_for_all(self, own: _Question) -> None:
        """Answer this thread's own question and all that wait."""
        asked, error = [own], "internal error"
        try:
            with self._lock:
                asked, self._waiting = [own, *self._waiting], []
            for statement in {question.statement for question in asked}:
                self._ask_together(statement, [question for question in asked if question.statement == statement])
        except DatabaseUnavailable as exc:
            error = str(exc)
        finally:
            for question in asked:
                question.error = "" if question.row else question.error or error
            with self._lock:
                following = next(
                    (each for each in self._waiting if each.has_connection), self._waiting[0] if self._waiting else None
                )
                if following:
                    self._waiting.remove(following)
                    following.wake.release()
                self._is_asked = following is not None
            for question in asked:
                question.wake.release()

    def _ask_together(self, statement: str, questions: Sequence[_Question]) -> None:
        """Give these questions, all of this statement, their rows; raises DatabaseUnavailable where somebody locks the file.

        After any other fault each is asked by itself: a damaged page, or an address that is there twice, concerns one alone.
        """
        try:
            self._ask_sqlite(statement, questions)
        except DatabaseUnavailable as exc:
            is_busy = sqlite_fault(exc) == "busy"
            if is_busy or len(questions) == 1:
                self._note(exc)
            if is_busy:
                raise
            if len(questions) == 1:
                questions[0].error = str(exc)
                return
            until = time.monotonic() + DATABASE_BUSY_SECONDS
            for question in questions:
                if time.monotonic() < until:
                    self._ask_together(statement, [question])
                else:  # a disk that takes seconds to fail
                    question.error = str(exc)

    def _ask_sqlite(self, statement: str, questions: Sequence[_Question]) -> None:
        """The same in one question to SQLite; raises DatabaseUnavailable."""
        version = self.version()
        try:
            connection = self._connection(version)
            cursor = connection.sqlite.execute(statement, (json.dumps([question.value for question in questions]),))
            # SQLite has found a row and holds its lock until fetchall(). So in rollback-journal mode nobody writes the file now; in WAL
            # mode, if the version is the same as before, there was no commit in between.
            now = self.version() or self._open_wal_index(connection)
            connection.version = now if version is None or now == version else None
            rows = cursor.fetchall()
            size = now[1] if now else os.stat(self._path).st_size
            page_bytes = self._local.page_bytes if self._local.page_bytes > 1 else 65536
            if size % page_bytes:  # SQLite reads zeros behind the end of such a file
                raise DatabaseUnavailable("the file ends within a page, it was truncated")
            if len(rows) != len(questions):
                raise DatabaseUnavailable("an alias or app is there twice: the table lacks its primary key")
        except (*SQLITE_ERRORS, OSError, StartError, DatabaseUnavailable) as exc:
            self.close()  # a fresh connection next time: the file may have been replaced or fixed by then
            raise self._unavailable(describe_sqlite(exc)) from exc
        is_exact = now == version and connection.file is not None and connection.file.database.is_of(now)
        for place, *row in rows:
            question = questions[place]
            question.row, question.read_from = row, now if is_exact else None
        if len(self._open) > DATABASE_KEPT_CONNECTIONS:
            self.close()
        if self._fails:
            self._note(None)

    def _unavailable(self, reason: str) -> DatabaseUnavailable:
        return DatabaseUnavailable(f"database: {self._path!r}: {reason}")

    def _note(self, fault: Optional[DatabaseUnavailable]) -> None:
        """Note whether the database fails. The log is told MAX_FAULTS_TOLD times in ten minutes: one damaged row lets it come and go for long."""
        with self._lock:
            turns, self._fails = self._fails == (fault is None), fault is not None
            if turns and fault:
                now = time.monotonic()
                self._is_told = len(self._told) < MAX_FAULTS_TOLD or now > self._told[0] + FAULTS_TOLD_SECONDS
                self._told.extend([now] if self._is_told else [])
        if turns and self._is_told and fault:
            log.error("%s; answers that need it are deferred until it is fixed", fault)
        elif turns and self._is_told:
            log.warning("database: works again path=%s", self._path)

    def _connection(self, version: Optional[Version]) -> _Connection:
        """This thread's connection, which lasts through commits; made again where the file may have changed in another way.

        SQLite notices a commit by the last part of the version. It does not notice a file that was renamed into place, nor a copy over the
        file with the same last part. It takes a copy with another last part for a commit, and may keep the old schema where its number of
        changes is equal; so the schema is compared.
        """
        local, file = self._local, self._file
        kept = local.connection
        if kept is not None and kept.file is file and version and kept.version:
            before = kept.version
            is_commit = before[-1] != version[-1] and isinstance(before[-1], bytes) == isinstance(version[-1], bytes)
            if version == before or (is_commit and self._schema(kept.sqlite) == kept.schema):
                return kept
        local.connection = kept = None
        path = os.path.realpath(self._path)  # a link may be led elsewhere and back, and no version shows that
        sqlite = connect_database(path, DATABASE_BUSY_SECONDS)
        is_there = file is not None and file.database.is_of(_look_at(os.fsencode(path), local.status))
        local.connection = connection = _Connection(sqlite, path, file if is_there else None)
        self._open.add(connection)
        if 0 < sqlite.execute("PRAGMA user_version").fetchone()[0] < SCHEMA_VERSION:
            prepare_database(self._path, DATABASE_BUSY_SECONDS, create=False)  # an older file was put in place of ours
        sqlite.execute("PRAGMA query_only = ON")
        sqlite.execute(f"PRAGMA cache_size = -{DATABASE_CACHE_KIB}")
        sqlite.text_factory = _decode
        connection.schema = self._schema(sqlite)
        return connection

    @staticmethod
    def _schema(connection: sqlite3.Connection) -> list[Any]:
        """Tables and indexes, with where they begin in the file."""
        return connection.execute("SELECT rootpage, sql FROM sqlite_master").fetchall()


# ---------------------------------------------------------------------------------------------------------------------------------
# 7. Keycloak
# What a request to Keycloak and its answer mean; plain values or an exception. No threads of its own: the workers and the probe of
# section 8 enter, each with its own HTTP session, and share the access token; the main thread loads the HTTP client, and doctor asks as
# well. requests and what it imports are more than half of the
# time that this file takes to load, so import_http() alone does that: most of mailcloakctl never asks.
# ---------------------------------------------------------------------------------------------------------------------------------


class _AnswerTooLong(MailcloakError):
    """Keycloak has sent more than MAX_DIRECTORY_ANSWER_BYTES."""


class _LimitedReader(io.RawIOBase):
    """The bytes of one response: until its deadline, and no more than MAX_DIRECTORY_ANSWER_BYTES.

    All of them pass here, also those that the libraries skip without a limit: responses 100 Continue, chunk lengths, trailers. The timeout
    of a socket is not enough, since it begins again with each byte.
    """

    def __init__(self, raw: io.RawIOBase, sock: socket.socket) -> None:
        self._raw, self._sock, self._bytes_left = raw, sock, MAX_DIRECTORY_ANSWER_BYTES
        self._deadline = time.monotonic() + (sock.gettimeout() or 0.0)  # just set by urllib3 to what is left of Timeout(total=...)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Optional[int]:
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise socket.timeout("the deadline is over")
        self._sock.settimeout(seconds)
        count = self._raw.readinto(buffer)
        self._bytes_left -= count or 0
        if self._bytes_left < 0:
            raise _AnswerTooLong(f"an answer of more than {MAX_DIRECTORY_ANSWER_BYTES} bytes")
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


@functools.cache
def _session_class() -> Callable[[str], requests.Session]:
    """The class of HTTP sessions; the first call imports all that a request can ever need, and what functions above import."""
    import difflib  # noqa: F401  of a key that is not known, at a reload
    import encodings.idna  # of the host's name, in socket.getaddrinfo()
    import encodings.punycode  # noqa: F401  of addresses, in section 2
    import http.client
    import ssl
    import unicodedata  # noqa: F401  of addresses

    import idna.uts46data  # noqa: F401  idna itself does so at the first name that is not ASCII, requests imports idna then
    import requests
    import urllib3

    class Response(http.client.HTTPResponse):
        def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
            super().__init__(sock, *args, **kwargs)
            self.fp = io.BufferedReader(_LimitedReader(self.fp.detach(), sock))

        def begin(self) -> None:
            super().begin()
            while 100 < self.status < 200:  # RFC 9110, section 15.2: an interim answer, such as 103; http.client skips 100 alone
                if self.status == 101:
                    raise http.client.BadStatusLine("101")  # nobody asked for another protocol
                self.headers = self.msg = None  # type: ignore[assignment]  # as http.client does itself
                super().begin()
            # After a fault, more bytes may come on this connection (from a proxy that gave up too soon) and would be taken for the next
            # answer. A new connection may also lead to a healthy node.
            self.will_close = self.will_close or self.status != 200
            for name in ("Set-Cookie", "Set-Cookie2"):  # none is kept or sent, nor even looked at
                del self.headers[name]

    pools: dict[str, Any] = dict(urllib3.poolmanager.pool_classes_by_scheme)  # as they are, but for the class of a response
    for scheme, pool in pools.items():
        connection = type("Connection", (pool.ConnectionCls,), {"response_class": Response})
        pools[scheme] = type("Pool", (pool,), {"ConnectionCls": connection})

    class Session(requests.Session):
        def __init__(self, ca_file: str) -> None:
            super().__init__()
            self.trust_env = False  # no proxies or .netrc of the environment
            host = ssl.get_default_verify_paths()  # its own CA bundle or folder rather than one that pip has brought with requests
            self.verify = ca_file or host.cafile or host.capath or True
            ours = {"User-Agent": f"mailcloak/{__version__}", "Accept": "application/json", "Accept-Encoding": "identity"}
            self.headers.update(ours)
            adapter = requests.adapters.HTTPAdapter()
            adapter.poolmanager.pool_classes_by_scheme = pools
            # What close() does. urllib3 2 leaves that to the garbage collector, which a daemon at rest does not reach.
            adapter.poolmanager.pools.dispose_func = operator.methodcaller("close")
            self.mount("http://", adapter)
            self.mount("https://", adapter)

        def get_redirect_target(self, resp: requests.Response) -> None:
            """Nowhere, ever: even without allow_redirects requests would read and decode the whole body of a redirect."""

    return Session


def import_http() -> Callable[[str], requests.Session]:
    """The class of HTTP sessions, each made for a ca_file; raises StartError where a library is missing.

    The daemon calls it while it is root: later its user may not be able to read the directories of Python's modules.
    """
    try:
        return _session_class()
    except ImportError as exc:
        raise StartError(str(exc), "install requests (python3-requests; Alpine: py3-requests)") from exc


def new_session(ca_file: str) -> requests.Session:
    """An HTTP session for one thread: requests does not promise thread safety."""
    return import_http()(ca_file)


def _describe_failure(exc: BaseException) -> tuple[str, str]:
    """(why an HTTP request failed, from the innermost cause; the remedy, if it is known); never a URL, a header or a body."""
    import ssl

    import urllib3

    chain: list[BaseException] = []
    current: Optional[BaseException] = exc
    while current is not None and current not in chain:
        chain.append(current)
        nested = [each for each in (*current.args, getattr(current, "reason", None)) if isinstance(each, BaseException)]
        current = nested[0] if nested else current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    for each in reversed(chain):
        # urllib3 1.26 compares the name by itself, and raises a class of its own or ssl's without the message of OpenSSL
        if isinstance(each, ssl.SSLCertVerificationError) or type(each).__name__ == "CertificateError":
            reason = getattr(each, "verify_message", "for another name")
            remedy = "name the certificate of your own CA in keycloak.ca_file, or correct base_url"
            if "expired" in reason or "not yet valid" in reason:
                remedy = "renew the certificate of Keycloak's host, or correct the clock of this one"
            return f"certificate refused ({reason})", remedy
        if isinstance(each, (socket.timeout, urllib3.exceptions.TimeoutError)):
            return "timed out", ""
        if isinstance(each, _AnswerTooLong):
            return each.text, ""
        if isinstance(each, OSError) and each.strerror:
            return str(each.strerror).lower(), ""
    return f"connection failed ({type(chain[-1]).__name__})", ""


EMAIL_MAY_BE_TAKEN = (
    "users may change their own e-mail and so take over any address: in the realm's user profile let only admins edit the attribute"
    " email, or turn on Verify email and set keycloak.require_verified_email"
)
# RFC 6749, section 5.2, and what Keycloak says of a realm that is turned off; any other text could be anything, a secret included
TOKEN_ERRORS = re.compile("invalid_(request|client|grant|scope)|unauthorized_client|unsupported_grant_type|access_denied")


@dataclass(frozen=True)
class Answer:
    """What Keycloak says to one question: everybody whose email or username it is, disabled users too, and when it was asked."""

    users: Users
    asked_at: float  # of time.monotonic(), before the first request
    unexplained: frozenset[str] = frozenset()  # keys of disabled users where it did not tell why: locked_out is a guess


Question = tuple[str, str]  # ("email", address) or ("username", name), normalised


def shows_owner(question: Question, users: Users) -> bool:
    """Do these users show by themselves whose name it is? If not, Keycloak may hide the owner.

    A storage that is down may call its users disabled. An e-mail may have several users, so a disabled one does not prove that nobody else
    has it; nor does one whose e-mail does not count, such as an unverified one.
    """
    attribute, name = question
    believed = [user for user in users if getattr(user, attribute) == name and (user.enabled or not user.federation)]
    return any(attribute == "username" or user.receives for user in believed)


def read_user(record: Mapping[str, Any], config: KeycloakConfig, *, is_whole: bool = True) -> User:
    """What one of Keycloak's user records means: the only place that says so. Raises QuestionFailed for one that makes no sense.

    Source: UserRepresentation of the admin REST interface. is_whole: with attributes; without them a disabled user may be locked out,
    and receives mail, unless a user storage may be the reason, for which there is the grace. A service account has no address, nor has
    a user whose e-mail is not verified where keycloak.require_verified_email demands it.
    """
    username, enabled = _field(record, "username"), record.get("enabled")
    try:
        email = _field(record, "email")
    except QuestionFailed:
        if enabled is not False:
            raise
        email = ""  # whatever it is: who is disabled sends nothing
    verified = record.get("emailVerified", False)
    if not username or not isinstance(enabled, bool) or not isinstance(verified, bool):
        raise QuestionFailed("directory: a user record without username or enabled")
    if record.get("serviceAccountClientId") or username.startswith("service-account-"):
        email = ""
    if config.require_verified_email and not verified:
        email = ""
    attributes = record.get("attributes")
    reason = attributes.get("disabledReason") if isinstance(attributes, dict) else None
    user_id, federation = _field(record, "id"), _field(record, "federationLink")
    if not federation and re.match("f:[^:]+:", user_id):  # of a user storage without import. Source: Keycloak's StorageId
        federation = user_id.split(":")[1]
    may_be_locked_out = reason in ("permanentLockout", ["permanentLockout"]) or not (is_whole or federation)
    locked_out = not enabled and may_be_locked_out and config.receive_when_locked_out
    return User(username, email, enabled, locked_out, federation, user_id)


def _field(record: Mapping[str, Any], name: str) -> str:
    """A text of the record, "" if there is none; usernames lower-cased and e-mails normalised, as they are compared."""
    value = record.get(name)
    if value is not None and (not isinstance(value, str) or re.search("[\ud800-\udfff]", value)):
        raise QuestionFailed(f"directory: a user record whose {name} is not text")
    if len(value or "") > MAX_NAME_CHARS:
        raise QuestionFailed(f"directory: a user record whose {name} has more than {MAX_NAME_CHARS} characters")
    if name == "username":
        return (value or "").lower()
    if name != "email":
        return value or ""
    address = normalise_address(value or "").text
    # Keycloak takes alice@d1.test and its full-width form for two e-mails. Our searches cannot find the second, so it counts as none:
    # normalised, it would be another user's.
    return address if (value or "").lower() in (address, to_unicode_domain(address)) else ""


class Shared(Generic[Value]):
    """One thread does the work; the others that need its result at that time wait for it."""

    def __init__(self, purpose: str) -> None:
        self._purpose = purpose  # for the message at the deadline
        self._turn = threading.Condition()  # guards the fields below; while _running, the one who works writes the last three
        self._running = False
        self._begun_at = -math.inf
        self._result: Optional[Value] = None
        self._error: Optional[DirectoryUnavailable] = None
        self._ran_out = False  # the error may be due to the little time that the thread had

    def get(self, since: float, deadline: Deadline, work: Callable[[], Value]) -> Value:
        """The result of work that began at since or later, by this thread or by another one; raises DirectoryUnavailable."""
        waited = False
        with self._turn:
            while self._running:
                waited = True
                if not self._turn.wait(max(0.0, deadline - time.monotonic())):
                    raise DirectoryUnavailable(f"directory: timed out waiting for {self._purpose}")
            if self._begun_at >= since and self._result is not None:
                return self._result
            if self._begun_at >= since and self._error and waited and not self._ran_out:
                raise type(self._error)(self._error.text, self._error.remedy)
            self._running, self._begun_at = True, time.monotonic()
            self._result, self._error, self._ran_out = None, DirectoryUnavailable("directory: internal error"), False
        try:
            result = work()
            self._result, self._error = result, None
        except DirectoryUnavailable as exc:
            self._error, self._ran_out = type(exc)(exc.text, exc.remedy), time.monotonic() > deadline - 0.01
            raise
        finally:
            with self._turn:
                self._running = False
                self._turn.notify_all()
        return result


class Token(NamedTuple):
    """An access token; the times are of time.monotonic()."""

    text: str
    good_until: float
    got_at: float


class KeycloakApi:
    """Requests to Keycloak for one configuration, with one access token for all of them."""

    def __init__(self, config: KeycloakConfig) -> None:
        self._config = config
        # Anybody can lock a canary out by wrong passwords; it was found all the same.
        self._config_of_canaries = dataclasses.replace(config, receive_when_locked_out=True)
        realm = urllib.parse.quote(config.realm, safe="")
        self._token_url = f"{config.base_url}/realms/{realm}/protocol/openid-connect/token"
        self._users_url = f"{config.base_url}/admin/realms/{realm}/users"
        self.requests, self.failed, self.seconds = 0, 0, 0.0  # counted without a lock: each may miss one in a great many
        self._token = Token("", -math.inf, 0.0)
        self._fetching: Shared[Token] = Shared("a token")
        self._proving: Shared[bool] = Shared("the proof that Keycloak sees users")

    def search(self, session: requests.Session, question: Question, deadline: Deadline) -> Answer:
        """Everybody whose "email" or "username" is the value, disabled users too. Raises DirectoryUnavailable.

        An answer that shows no owner is believed only if a prove() that begins after it succeeds.
        Source: GET /admin/realms/{realm}/users with exact and briefRepresentation.
        """
        answer = self._search_once(session, question, deadline, self._config)
        explained = tuple(user for user in answer.users if question[0] == "username" or user.key not in answer.unexplained)
        if shows_owner(question, explained):
            return answer
        self.prove(session, time.monotonic(), deadline)
        # With canaries once more: perhaps LDAP has come back between the two. Or Keycloak was just importing the user from it: then of
        # two searches at once one is told that nobody is there.
        return self._search_once(session, question, deadline, self._config) if self._config.canary else answer

    def _search_once(self, session: requests.Session, question: Question, deadline: Deadline, config: KeycloakConfig) -> Answer:
        attribute, value = question
        # Keycloak stores an internationalised domain as it was typed
        spellings = [value, to_unicode_domain(value)] if attribute == "email" else [value]
        asked_at = time.monotonic()
        found: dict[str, User] = {}
        unexplained: set[str] = set()
        for spelling in dict.fromkeys(spellings):
            query = {attribute: spelling, "exact": "true", "briefRepresentation": "true", "max": str(MAX_DIRECTORY_MATCHES)}
            matches, is_whole = self._matches(session, deadline, question, query), True
            if config.receive_when_locked_out and any(record.get("enabled") is False for record in matches):
                # Why a user is disabled is an attribute, which Keycloak 26.0 leaves out of the brief form. Without an answer to that in
                # half of the time left, the user is disabled all the same.
                half = (time.monotonic() + deadline) / 2
                try:
                    matches = self._matches(session, half, question, {**query, "briefRepresentation": "false"})
                except DirectoryUnavailable:
                    is_whole = False
            users = [read_user(record, config, is_whole=is_whole) for record in matches]
            found.update((user.key, user) for user in users)
            unexplained.update(user.key for user in users if not is_whole and not user.enabled)
        return Answer(tuple(found.values()), asked_at, frozenset(unexplained))

    def _matches(
        self, session: requests.Session, deadline: Deadline, question: Question, query: Mapping[str, str]
    ) -> list[dict[str, Any]]:
        """The records of the answer that the question is about, no more of them than were asked for."""
        attribute, value = question
        try:
            records = self.get_users(session, deadline, **query)
        except DirectoryMisconfigured as exc:  # by a proxy perhaps this question alone; whether all, the probe finds out
            raise DirectoryUnavailable(exc.text, exc.remedy) from None
        if len(records) > MAX_DIRECTORY_RECORDS:
            raise QuestionFailed(self.message(f"{len(records)} users for one {attribute}, more than were asked for"))
        matches = [record for record in records if _field(record, attribute) == value]  # older servers ignore exact=true
        if not all(record.get(attribute) for record in records):  # another one is no fault: LDAP may find a user by a second e-mail
            raise QuestionFailed(self.message(f"a user record without the {attribute} that was asked for"))
        if len(matches) >= MAX_DIRECTORY_MATCHES:
            raise QuestionFailed(self.message(f"{len(matches)} users for one {attribute}, there may be more"))
        if len(records) >= MAX_DIRECTORY_MATCHES and not matches:
            raise QuestionFailed(self.message(f"{len(records)} users for one {attribute} and no exact match"))
        return matches

    def prove(self, session: requests.Session, since: float, deadline: Deadline) -> None:
        """Return if Keycloak shows us users, and every canary, asked at since or later; those who wait share one check.

        With the role query-users alone every search is empty, and a role can be lost at run time. While its user storage is down,
        Keycloak may say of anybody that they are missing or disabled, and then of the canaries too. Raises DirectoryUnavailable.
        """
        self._proving.get(since, deadline, lambda: self._prove(session, deadline))

    def _prove(self, session: requests.Session, deadline: Deadline) -> bool:
        first = self.get_users(session, deadline, max="1", briefRepresentation="true")  # the whole one may have a megabyte
        if not any(_field(record, "username") for record in first):
            raise DirectoryMisconfigured(self.message("sees no users at all (query-users is not enough)"), self.role_remedy)
        for address in self._config.canary:
            try:
                users = self._search_once(session, ("email", address), deadline, self._config_of_canaries).users
            except QuestionFailed as exc:
                raise DirectoryUnavailable(self.message(f"canary <{address}> has no answer that can be used: {exc.text}")) from None
            if not any(user.receives for user in users):
                raise DirectoryUnavailable(self.message(f"canary <{address}> is missing or disabled, no such answer is believed"))
        return True

    def get_users(self, session: requests.Session, deadline: Deadline, **query: str) -> list[dict[str, Any]]:
        """The user records that a search gives. Source: GET /admin/realms/{realm}/users."""
        status, body = self.get(session, deadline, self._users_url, query)
        if status == 403:
            raise DirectoryMisconfigured(self.failure("search refused (HTTP 403)"), self.role_remedy)
        if status != 200:
            raise DirectoryUnavailable(self.failure(f"search failed (HTTP {status})"))
        records = self._json(body)
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise DirectoryUnavailable(self.failure("the answer to a search is not a list of users"))
        return records

    def users_may_edit_email(self, session: requests.Session, deadline: Deadline) -> Optional[bool]:
        """Does the realm's user profile let users change their own e-mail? None where the profile cannot be read.

        Source: GET /admin/realms/{realm}/users/profile, attributes[].permissions.edit.
        """
        try:
            status, body = self.get(session, deadline, f"{self._users_url}/profile", {})
            attributes = {attribute["name"]: attribute for attribute in self._json(body)["attributes"]} if status == 200 else {}
            return "user" in attributes["email"]["permissions"]["edit"]
        except (KeyError, TypeError, DirectoryUnavailable):  # a proxy may let no such request through
            return None

    def message(self, what: str) -> str:
        """What happened, with the realm it happened at."""
        return f"directory: realm {self._config.realm!r}: {what}"

    def failure(self, what: str) -> str:
        """What went wrong between Keycloak and us, with its host and port as well."""
        url = urllib.parse.urlsplit(self._config.base_url)
        port = "" if url.port else ":443" if url.scheme == "https" else ":80"
        return self.message(f"{what}, host {url.netloc}{port}")

    @property
    def role_remedy(self) -> str:
        """What an administrator does where Keycloak shows us no users."""
        return f"give the service account of client {self._config.client_id!r} the realm-management role view-users"

    def get(self, session: requests.Session, deadline: Deadline, url: str, query: Mapping[str, str]) -> tuple[int, bytes]:
        """(status, body); the token is renewed once if Keycloak says 401."""
        token = None
        for _ in range(2):
            token = self.access_token(session, deadline, rejected=token)
            headers = {"Authorization": f"Bearer {token.text}"}
            status, body = self._exchange(session, deadline, "GET", url, params=query, headers=headers)
            if status != 401:
                break
        return status, body

    def access_token(self, session: requests.Session, deadline: Deadline, rejected: Optional[Token] = None) -> Token:
        """A token that is good, and not the rejected one; raises DirectoryUnavailable."""
        token = self._token  # one read needs no lock
        if token is not rejected and time.monotonic() < token.good_until:
            return token
        return self._fetching.get(token.got_at, deadline, lambda: self._fetch_token(session, deadline))

    def _fetch_token(self, session: requests.Session, deadline: Deadline) -> Token:
        """A new token by the client credentials grant (RFC 6749, section 4.4)."""
        asked_at = time.monotonic()
        client_id, client_secret = self._config.client_id, self._config.client_secret
        form = {"grant_type": "client_credentials", "client_id": client_id, "client_secret": client_secret}
        status, body = self._exchange(session, deadline, "POST", self._token_url, data=form)
        if status == 404:
            raise DirectoryMisconfigured(self.failure("no such realm (HTTP 404)"), "check keycloak.realm and keycloak.base_url")
        if status in (400, 401):
            reason = ""
            with contextlib.suppress(DirectoryUnavailable, AttributeError, TypeError):
                error = self._json(body).get("error")
                reason = f" {error}" if TOKEN_ERRORS.fullmatch(error) else ""
            remedy = "check keycloak.realm, client_id and client_secret, and that the client has Service accounts roles on"
            raise DirectoryMisconfigured(self.failure(f"token refused (HTTP {status}{reason})"), remedy)
        if status != 200:
            raise DirectoryUnavailable(self.failure(f"no token (HTTP {status})"))
        answer = self._json(body)
        text = answer.get("access_token") if isinstance(answer, dict) else None
        life = answer.get("expires_in") if isinstance(answer, dict) else None
        is_text = isinstance(text, str) and re.fullmatch(r"[!-~]+", text)
        if not is_text or not isinstance(life, (int, float)) or not 0 < life < 1e12:
            raise DirectoryUnavailable(self.failure("the answer to the token request holds no token"))
        self._token = Token(str(text), asked_at + life * TOKEN_LIFE_USED, time.monotonic())
        return self._token

    def _exchange(self, session: requests.Session, deadline: Deadline, method: str, url: str, **options: Any) -> tuple[int, bytes]:
        """(status, body) of one request, finished by the deadline."""
        import requests

        try:
            try:
                return self._exchange_once(session, deadline, method, url, options)
            except requests.ConnectionError:  # most likely a kept connection that the server has closed
                return self._exchange_once(session, deadline, method, url, options)
        except DirectoryUnavailable:
            raise
        except Exception as exc:  # a server may send anything: at some headers requests 2.32 fails with AttributeError
            reason, remedy = _describe_failure(exc)
            raise DirectoryUnavailable(self.failure(reason), remedy) from exc

    def _exchange_once(
        self, session: requests.Session, deadline: Deadline, method: str, url: str, options: Mapping[str, Any]
    ) -> tuple[int, bytes]:
        import urllib3

        started = time.monotonic()
        if started >= deadline:  # it waited for its turn until then
            raise QuestionFailed(self.failure("timed out before the request"))
        timeout: Any = urllib3.Timeout(total=deadline - started)
        try:
            with session.request(method, url, timeout=timeout, allow_redirects=False, stream=True, **options) as response:
                self.failed += response.status_code not in ((200,) if method == "POST" else (200, 401))  # 401: the token has ended
                return response.status_code, self._read_body(response)
        except Exception:
            self.failed += 1
            raise
        finally:
            self.requests += 1
            self.seconds += time.monotonic() - started

    def _read_body(self, response: requests.Response) -> bytes:
        """The bytes of the body as they came: some hundred that are compressed can stand for a gigabyte."""
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise DirectoryUnavailable(self.failure("an answer in a Content-Encoding, which was not asked for"))
        return b"".join(response.raw.stream(64 * 1024, decode_content=False))

    def _json(self, body: bytes) -> Any:
        try:
            # of bytes it would guess the encoding, and import that; older Pythons read an int of a million digits for seconds
            return json.loads(body.decode().lstrip("\ufeff"), parse_int=float)
        except (ValueError, RecursionError) as exc:
            raise DirectoryUnavailable(self.failure("the answer is not JSON")) from exc


# ---------------------------------------------------------------------------------------------------------------------------------
# 8. Directory
# Who the users are: Keycloak, or static_users of the configuration. Worker threads run the requests, a probe watches an outage, one
# thread asks ahead and one writes to the disk; handler and timer threads wait for an answer until their deadline. What is known of
# users is in one store: judge() says what counts of a user, judge_holders() and judge_login() what follows for a question. The file on
# disk mirrors the store. UserStore._lock guards the users; who holds it may take SavedUsers._turn, never the other way.
# ---------------------------------------------------------------------------------------------------------------------------------


class UserSource(Protocol):
    """Who answers questions about users: Keycloak, the configuration, or a test."""

    name: str  # for explain
    outage: Outage

    def find_users(self, question: Question, deadline: Deadline) -> Answer:
        """The answer by the deadline; raises DirectoryUnavailable."""

    def report(self) -> Optional[dict[str, Any]]:
        """What the map stats says of it."""

    def give_up(self) -> None:
        """Fail every question from now on, also those under way: at shutdown nobody waits longer."""

    def close(self) -> None:
        """End the threads."""


class Outage:
    """Whether Keycloak counts as away: from OUTAGE_FAILURES failures in a row until the first success.

    The log has a line when it begins and one when it ends, one for each failure before, and for each new mistake of the set-up.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.suspected = threading.Event()  # wakes the probe
        self.established = False  # read without the lock: a moment's delay does no harm
        self.failed: Optional[Question] = None  # what failed last, for the probe
        # counted without the lock, so each may miss one in a great many
        self.cached = 0  # answers from the cache in place of Keycloak's
        self.deferred = 0  # questions without any answer
        self._clock = clock
        self._lock = threading.Lock()  # guards the fields below, and the writing of established
        self._failures = 0
        self._said = ""  # what the log says of this outage
        self._since = 0.0
        self._before = (0, 0)  # cached and deferred when it began

    def note_failure(self, error: DirectoryUnavailable, question: Optional[Question] = None) -> None:
        """A request to Keycloak failed. What an administrator must fix is an outage at once."""
        with self._lock:
            self._failures += 1
            self.failed = question or self.failed
            begins = not self.established and (self._failures >= OUTAGE_FAILURES or isinstance(error, DirectoryMisconfigured))
            if self._failures == 1:
                self._since, self._before = self._clock(), (self.cached, self.deferred)
            self.established = self.established or begins
            is_new = begins or (isinstance(error, DirectoryMisconfigured) and str(error) != self._said)
            self._said = str(error) if is_new else self._said
            established = self.established
        self.suspected.set()
        if is_new:
            follows = "; Keycloak counts as away: cached users are served, policy.keycloak_failure_mode decides for others"
            level = logging.ERROR if isinstance(error, DirectoryMisconfigured) else logging.WARNING
            log.log(level, "%s%s", error, follows if begins else "")
        elif not established:
            log.info("%s", error)

    def note_success(self, message: Callable[[str], str]) -> None:
        """A request to Keycloak was answered."""
        if not self._failures:  # read without the lock: the common case
            return
        with self._lock:
            self._failures, self._said, self.failed, ends, self.established = 0, "", None, self.established, False
            seconds, cached, deferred = self._clock() - self._since, self.cached - self._before[0], self.deferred - self._before[1]
        if ends:
            text = f"answers again, after {seconds:.0f} s; {cached} answers came from the cache, {deferred} were deferred"
            log.warning("%s", message(text))

    def report(self) -> dict[str, Any]:
        """What the map stats says of it."""
        with self._lock:
            away = self.established
            return {
                "state": "away" if away else "answers",
                "since_seconds": self._clock() - self._since if away else None,
                "failure": self._said if away else "",
            }


class StaticUsers:
    """static_users of the configuration: the embedded directory for trials, tests and small hosts."""

    name = "static"

    def __init__(self, users: Mapping[str, str]) -> None:
        self.outage = Outage()  # never established
        self._users = [User(username, address, True) for username, address in users.items()]

    def find_users(self, question: Question, deadline: Deadline) -> Answer:
        """All users whose "email" or "username" is the value."""
        return Answer(tuple(user for user in self._users if getattr(user, question[0]) == question[1]), time.monotonic())

    def close(self) -> None:
        """Nothing to end here, to give up, or to report of Keycloak."""

    give_up = report = close


class _Lookup(NamedTuple):
    """One question under way at Keycloak; those who ask the same in the meantime wait for it too."""

    question: Question
    deadline: Deadline
    answer: Future[Union[Answer, DirectoryUnavailable]]  # an error as a value: raised, it would hold on to all that led to it
    in_time: threading.Event  # a worker took it while there was time for an answer: a failure is Keycloak's


class KeycloakUsers:
    """Users by e-mail or username from Keycloak. A few worker threads run the requests.

    A handler thread waits for its answer until its deadline and no longer, whatever DNS, TLS or a dripping body do to the worker.
    """

    name = "keycloak"

    def __init__(self, config: KeycloakConfig) -> None:
        self.outage = Outage()
        self._config = config
        self._api = KeycloakApi(config)
        self._queue: queue.SimpleQueue[Optional[_Lookup]] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._lock = threading.Lock()  # guards the two below
        self._given_up = False
        self._pending: dict[Question, _Lookup] = {}
        try:
            for number in range(config.max_requests):
                threading.Thread(target=self._work, name=f"keycloak-{number}", daemon=True).start()
            threading.Thread(target=self._probe, name="keycloak-probe", daemon=True).start()
        except RuntimeError:  # the system gives no more threads
            self.close()
            raise

    def find_users(self, question: Question, deadline: Deadline) -> Answer:
        """Everybody whose "email" or "username" is the value, which is normalised and not empty; disabled users too.

        Raises DirectoryUnavailable, at the deadline at the latest, and at once in an established outage.
        """
        if self.outage.established:
            raise DirectoryUnavailable(self._api.message("away"))
        with self._lock:
            if self._given_up:
                raise DirectoryUnavailable(self._api.message("shutting down"))
            lookup = self._pending.get(question)
            if lookup is None:
                if self._queue.qsize() >= MAX_DIRECTORY_WAITING:
                    raise DirectoryUnavailable(self._api.message("too many lookups are waiting"))
                lookup = self._pending[question] = _Lookup(question, deadline, Future(), threading.Event())
                self._queue.put(lookup)
        try:
            result = lookup.answer.result(max(0.0, deadline - time.monotonic()))
        except FutureTimeout:
            result = DirectoryUnavailable(self._api.failure(f"no answer within {self._config.timeout_seconds:g} s"))
            self._end(lookup, result)  # who asks later begins another
        if isinstance(result, Answer):
            return result
        raise DirectoryUnavailable(result.text, result.remedy)  # one error for all who wait: each raises its own

    def report(self) -> dict[str, Any]:
        """What the map stats says of Keycloak."""
        api = self._api
        return {**self.outage.report(), "requests": api.requests, "failed": api.failed, "seconds": api.seconds}

    def give_up(self) -> None:
        """Fail every lookup from now on, those pending too."""
        with self._lock:
            self._given_up = True
            pending, self._pending = list(self._pending.values()), {}
        for lookup in pending:
            _settle(lookup.answer, DirectoryUnavailable(self._api.message("shutting down")))

    def close(self) -> None:
        """End the threads, the workers after what is queued."""
        self._closed.set()
        self.outage.suspected.set()
        for _ in range(self._config.max_requests):
            self._queue.put(None)

    def _end(self, lookup: _Lookup, error: Optional[DirectoryUnavailable]) -> None:
        """Take the lookup out of those under way; the first who does so notes how it went, so that a failure counts once."""
        with self._lock:
            if self._pending.get(lookup.question) is not lookup:
                return
            del self._pending[lookup.question]
        if error is None:
            self.outage.note_success(self._api.message)
        elif lookup.in_time.is_set() and not isinstance(error, QuestionFailed):
            self.outage.note_failure(error, lookup.question)

    # ---- worker threads

    def _work(self) -> None:
        with new_session(self._config.ca_file) as session:
            while True:
                lookup = self._queue.get()
                if lookup is None:
                    return
                self._work_on(lookup, session)
                del lookup

    def _work_on(self, lookup: _Lookup, session: requests.Session) -> None:
        if lookup.deadline - time.monotonic() > self._config.timeout_seconds / 2:
            lookup.in_time.set()
        try:
            result: Union[Answer, DirectoryUnavailable] = self._api.search(session, lookup.question, lookup.deadline)
        except Exception as exc:
            session.close()  # a new connection may lead to a node that is well
            result = self._as_failure(exc)
        self._end(lookup, result if isinstance(result, DirectoryUnavailable) else None)
        _settle(lookup.answer, result)

    def _as_failure(self, exc: Exception) -> DirectoryUnavailable:
        """The exception as one that handlers expect: a bug or bytes nobody thought of are no answer, never the end of a thread.

        A new one: an exception that was raised holds on to all that led to it, such as an answer of a megabyte.
        """
        end_without_memory(exc)
        if isinstance(exc, DirectoryUnavailable):
            return type(exc)(exc.text, exc.remedy)
        log.error("directory: internal error %s", describe_exception(exc))
        return DirectoryUnavailable(self._api.message("internal error"))

    # ---- the probe: a self-check at start, and from the first failure on until Keycloak answers

    def _probe(self) -> None:
        profile_seen = self._config.require_verified_email
        pause = 0.0
        while True:
            self.outage.suspected.clear()
            if self._closed.is_set():
                return
            with new_session(self._config.ca_file) as session:  # each time, since new connections may be what hangs
                try:
                    self._api.prove(session, time.monotonic(), self._probe_deadline())
                    self._repeat_what_failed(session)
                except Exception as exc:
                    self.outage.note_failure(self._as_failure(exc))
                    pause = min(PROBE_PAUSE_SECONDS, pause * 2 or 0.25)
                    self._closed.wait(pause * random.uniform(0.5, 1))  # noqa: S311  jitter, so that many hosts do not ask at once
                    continue
                self.outage.note_success(self._api.message)
                if not profile_seen and self._api.users_may_edit_email(session, self._probe_deadline()):
                    log.error("%s", self._api.message(EMAIL_MAY_BE_TAKEN))
            profile_seen, pause = True, 0.0
            self.outage.suspected.wait()

    def _probe_deadline(self) -> Deadline:
        return time.monotonic() + min(self._config.timeout_seconds, PROBE_SECONDS)

    def _repeat_what_failed(self, session: requests.Session) -> None:
        """Ask for nobody's name of the kind that failed last and, if that fails, once more for what failed; raise DirectoryUnavailable.

        If Keycloak never answers one question but answers others of its kind, that is no outage: anybody could ask it.
        """
        failed = self.outage.failed
        if not failed:
            return
        attribute, value = failed
        other = f"{random.getrandbits(64):x}{value[value.find('@') :] if '@' in value else ''}"
        try:
            self._api.search(session, (attribute, other), self._probe_deadline())
        except DirectoryUnavailable:
            self._api.search(session, failed, self._probe_deadline())


def _settle(future: Future[Union[Answer, DirectoryUnavailable]], result: Union[Answer, DirectoryUnavailable]) -> None:
    """Give those who wait the result, unless they have one already."""
    with contextlib.suppress(InvalidStateError):
        future.set_result(result)


# What is believed of a user. Keycloak gave no answer: what was believed last goes on.
KNOWN = "known"  # the user is as Keycloak described them last, enabled or not
DOUBTED = "doubted"  # Keycloak takes back a user it confirmed before, and may be wrong: the grace
GONE = "gone"  # the user no longer exists
NEVER = -math.inf  # as a time


class Person(NamedTuple):
    """What is cached and saved of one user. Times are of time.monotonic(), on disk in seconds since 1970."""

    user: User  # as Keycloak described the user last
    standing: str  # KNOWN, DOUBTED or GONE
    asked_at: float  # when the newest answer about the user was asked for
    confirmed_at: float = NEVER  # the same of the newest that found the user, and receiving mail
    doubted_seconds: float = 0.0  # how much of the grace has passed
    former: tuple[Question, ...] = ()  # names that the user had before, the newest first
    unnamed_at: float = NEVER  # when Keycloak was asked last and said that nobody's username is this user's e-mail
    shares_email: bool = False  # Keycloak was asked: somebody else has the same e-mail

    def has(self, question: Question) -> bool:
        """Is this the user's email or username now?"""
        return bool(getattr(self.user, question[0]) == question[1]) and self.standing != GONE

    def may_answer(self, question: Question) -> bool:
        """Is this the user's name now, and could nobody else be meant? An e-mail of a disabled user may be another one's as well."""
        return self.has(question) and (self.user.receives or question[0] == "username")

    @property
    def names(self) -> tuple[Question, ...]:
        """All questions that find the user, the former names too."""
        now = (("username", self.user.username), ("email", self.user.email))
        return (*(name for name in now if name[1]), *self.former)

    def without(self, taken: Sequence[Question]) -> Person:
        """The same after another user got these names: they become former ones, and the username or e-mail is empty."""
        username = "" if ("username", self.user.username) in taken else self.user.username
        email = "" if ("email", self.user.email) in taken else self.user.email
        if (username, email) == self.user[:2]:
            return self
        return _renamed(self, self._replace(user=self.user._replace(username=username, email=email, user_id=self.user.key)))

    def may_have_lost(self, before: Person) -> bool:
        """Is a right that the user had before not there any more, or in doubt?"""
        may_send = (self.user.enabled or not before.user.enabled) and (before.shares_email or not self.shares_email)
        kept = self.standing == KNOWN and self.user.receives and may_send and self.user[:2] == before.user[:2]
        return before.standing == KNOWN and before.user.receives and not kept


def judge(known: Optional[Person], said: Optional[User], asked_at: float, witness_at: float, policy: PolicyConfig) -> Person:
    """What counts of a user from now on, by what was known and by what Keycloak says now (None: it does not find the user).

    witness_at: when it last confirmed another user of the same federation. A user is doubted only if the user was there before, and
    only if Keycloak may be wrong: where it finds nobody, and where a user storage says "disabled" or gives no e-mail any more. The time of
    the grace counts only while Keycloak confirms others and somebody asks; between two looks at most
    2 * policy.negative_cache_ttl_seconds, at least 2 s. One of known and said is not None. Pure.
    """
    lost_email = known.user.email if known and said and said.federation and not said.email else ""  # which may only not be readable
    if said and said.receives and not lost_email:
        return _renamed(known, Person(said, KNOWN, asked_at, asked_at))
    if known is None:
        return Person(said or User("", "", enabled=False), KNOWN, asked_at)
    person = _renamed(known, known._replace(user=said or known.user, asked_at=asked_at))
    was_there = known.standing == DOUBTED or (known.standing == KNOWN and known.user.receives)
    believed = person._replace(standing=KNOWN if said else GONE, doubted_seconds=0.0)
    if not was_there or (said and not said.federation):
        return believed
    looked_again = known.standing == DOUBTED and witness_at > known.asked_at
    longest = max(2 * policy.negative_cache_ttl_seconds, LEAST_LOOK_SECONDS)
    seconds = known.doubted_seconds + (min(asked_at - known.asked_at, longest) if looked_again else 0.0)
    if seconds >= policy.disappearance_grace_seconds:
        return believed
    if said and lost_email:
        person = _renamed(known, known._replace(user=said._replace(email=lost_email), asked_at=asked_at))
    return person._replace(standing=DOUBTED, doubted_seconds=seconds)


def _renamed(known: Optional[Person], person: Person) -> Person:
    """The person, with the names that were changed kept as former ones: who uses one of them is no stranger."""
    if known is None:
        return person
    dropped = [name for name in known.names if name not in person._replace(former=()).names]
    same = known.user[:2] == person.user[:2]
    shares_email = known.shares_email and known.user.email == person.user.email
    return person._replace(
        former=tuple(dropped[:MAX_FORMER_NAMES]), unnamed_at=known.unnamed_at if same else NEVER, shares_email=shares_email
    )


class Known(NamedTuple):
    """What is cached for one question."""

    question: Question
    people: tuple[Person, ...]  # who have the name, or had it
    stamp: float  # when Keycloak was asked last; negative if it is to be asked again, -inf: never

    @property
    def asked_at(self) -> float:
        """When Keycloak was asked last; -inf: it is to be asked again."""
        return self.stamp if self.stamp > 0 else NEVER

    @property
    def answered_at(self) -> float:
        """When Keycloak was asked last, though it may have to be asked again; -inf: never."""
        return self.stamp if self.stamp == NEVER else abs(self.stamp)

    @property
    def here(self) -> tuple[Person, ...]:
        """Those who have the name now, as far as is known."""
        return tuple(person for person in self.people if person.has(self.question))

    @property
    def meaning(self) -> tuple[Any, ...]:
        """What an answer depends on: not the times, nor the ids, which a server may make up for each answer."""
        here = {(*person.user[:4], person.standing, person.shares_email) for person in self.here}
        renamed = {(person.user.username, person.standing) for person in self.people if not person.has(self.question)}
        return here, {each for each in renamed if each[0]}, self.is_doubted

    @property
    def is_doubted(self) -> bool:
        """Is a user in doubt who has the name? Or, where it is nobody's who receives mail, one who lost it to another user?

        An e-mail may have several users, so that one who is disabled does not show that it is no longer another one's.
        """
        here = self.here
        is_taken = any(person.user.receives or self.question[0] == "username" for person in here)
        lost = [person for person in self.people if not is_taken and not getattr(person.user, self.question[0])]
        return any(person.standing == DOUBTED for person in (*here, *lost))

    @property
    def is_settled(self) -> bool:
        """Is it known who has the name? Not where it went from one user to another, and Keycloak was not asked for it since."""
        here = self.here
        sharers = [person for person in here if person.shares_email and self.question[0] == "email"]
        is_clear = len(here) == 1 > len(sharers) or len(here) == len(sharers) > 1
        return is_clear or self.asked_at > NEVER or all(person.standing == GONE for person in self.people)


class UserStore:
    """The users that are known: a least-recently-used store that both servers share. Questions are an index into it.

    Questions that found nobody have a tenth of the room beside it, so that a dictionary attack makes the daemon forget nobody.
    """

    def __init__(self, policy: PolicyConfig) -> None:
        self.policy = policy  # a reload changes it
        # (user_id, before, after), called with the lock held; before is None for a new user, after for a forgotten one
        self.on_change: Callable[[str, Optional[Person], Optional[Person]], None] = lambda user_id, before, after: None
        self._lock = threading.Lock()  # guards the fields below
        self._people: OrderedDict[str, Person] = OrderedDict()  # by user_id, longest unused first
        # by attribute and by every name of these people: (stamp, as in Known, *user_ids)
        self._index: dict[str, dict[str, tuple[Any, ...]]] = {"username": {}, "email": {}}
        self._nobody: OrderedDict[Question, float] = OrderedDict()  # when asked, by questions that found nobody
        self._forgotten_at = NEVER
        self._witnesses: dict[str, float] = {}  # when a user of this federation was confirmed last
        self._steps: Optional[list[Callable[[], Any]]] = None  # what has happened while the saved users cannot be read
        self._has_all_steps = True

    def look(self, question: Question) -> Known:
        """What is cached for the question; notes the use."""
        with self._lock:
            known = self._look(question)
            for person in known.people:
                self._people.move_to_end(person.user.key)
            return known

    def holds(self, *known: Known) -> bool:
        """Is this still what is cached for these questions? No lock, and no use noted: each step is one look at a dict."""
        for each in known:
            entry = self._entry(each.question)
            if entry[0] != each.stamp or len(entry) != 1 + len(each.people):
                return False
            for place, person in enumerate(each.people, 1):
                if self._people.get(entry[place]) is not person:
                    return False
        return True

    def says_the_same(self, known: Known) -> bool:
        """Is it still so who has the name and what counts of them, though it may have been asked for again, or pushed out?"""
        if self.holds(known):
            return True
        now = self.look(known.question)
        return now.meaning == known.meaning or (not now.people and now.asked_at == NEVER)

    def learn(self, question: Question, answer: Answer) -> tuple[Optional[Known], list[tuple[Person, Person]]]:
        """Take in what Keycloak said, for all questions at once: what is cached now, and (before, after) of whoever has changed.

        If a later question about a user was answered already, this answer changes nothing of that user. None means: ask again; the two
        disagree about a user found here, or this question was answered later. A username belongs to one user, and so does an e-mail that
        Keycloak did not show with two: who is found with it has taken it from the earlier holder.
        """
        with self._lock:
            return self._do(functools.partial(self._learn, question, answer))

    def _learn(self, question: Question, answer: Answer) -> tuple[Optional[Known], list[tuple[Person, Person]]]:
        answer = self._with_known_reasons(answer)
        said = {user.key: user for user in answer.users}
        named = [question, *(("username", user.username) for user in answer.users)]
        sharers = [user.key for user in answer.users if user.receives and ("email", user.email) == question]
        changes = []
        is_overtaken = answer.asked_at < self._forgotten_at
        is_late = is_overtaken or self._look(question).answered_at > answer.asked_at
        for user in answer.users:
            if user.receives and user.email:
                last = self._witnesses.pop(user.federation, NEVER)
                self._witnesses[user.federation] = max(last, answer.asked_at)
                if len(self._witnesses) > MAX_WITNESSES:
                    del self._witnesses[next(iter(self._witnesses))]
        others = [user_id for name in named for user_id in self._entry(name)[1:]]
        losers = [user_id for user_id in others if user_id not in said]  # first, so that no name is two users' on the disk
        for user_id in dict.fromkeys((*losers, *said)):
            before, now = self._people.get(user_id), said.get(user_id)
            is_old = before.asked_at > answer.asked_at if before else is_late or self._was_missed(now, answer.asked_at)
            if is_old:
                if now:
                    agrees = before is not None and before.standing == KNOWN and before.user == now
                else:
                    agrees = before is None or before.standing != KNOWN or not any(map(before.has, named))
                is_overtaken |= not agrees
                if before and before.user == now and user_id in sharers and not is_late:  # by another name asked about later
                    self._put(user_id, before._replace(shares_email=len(sharers) > 1))
                continue
            remaining = before
            if before and not now:
                taken = named if sharers and not before.shares_email else named[1:]
                remaining = before.without(taken)
                if remaining is before and not before.has(question):
                    continue
            federation = now.federation if now else before.user.federation if before else ""
            after = judge(remaining, now, answer.asked_at, self._witnesses.get(federation, NEVER), self.policy)
            if user_id in sharers:
                after = after._replace(shares_email=len(sharers) > 1)
            later = self._find_later(before, after) if before else []
            for name, asked_at in later:
                after = self._miss(after, name, asked_at)
            is_overtaken |= bool(later)
            answered = [(name, asked_at) for name, asked_at in later if self._entry(name)[0] > 0]
            self._put(user_id, after)
            for name, asked_at in answered:
                self._note_question(name, asked_at)
            if before and after != before:
                changes.append((before, after))
        for name in named:
            self._forget_former_holders(name)
        if is_overtaken or is_late:
            return None, changes
        self._note_question(question, answer.asked_at)
        known = self._look(question)._replace(stamp=answer.asked_at)
        self._make_room(len(said))
        return known, changes

    def _with_known_reasons(self, answer: Answer) -> Answer:
        """The answer, with why a user is disabled as it was told before, where it was not told now."""
        if not answer.unexplained:
            return answer
        users = list(answer.users)
        for place, user in enumerate(users):
            before = self._people.get(user.key)
            if user.key in answer.unexplained and before and not before.user.enabled:
                users[place] = user._replace(locked_out=before.user.locked_out)
        return dataclasses.replace(answer, users=tuple(users))

    def allow_login_by_email(self, user: User, asked_at: float) -> None:
        """Note that no other user's username is this user's e-mail, as Keycloak has said."""
        with self._lock:
            self._do(functools.partial(self._allow_login_by_email, user, asked_at))

    def _allow_login_by_email(self, user: User, asked_at: float) -> None:
        person = self._people.get(user.key)
        if person and person.user == user and person.unnamed_at < asked_at:
            self._put(user.key, person._replace(unnamed_at=asked_at))

    def await_saved(self) -> None:
        """Until take_up() note what happens, to do it again then: the saved users come first, however late they can be read."""
        with self._lock:
            self._steps = []

    def take_up(self, people: Iterable[Person], now: float) -> None:
        """Begin with what was saved: not fresh, but it counts in an outage. What has happened since await_saved() comes after it.

        If that was more than MAX_STEPS, it is not known which users it concerned: a saved user who is not known by then is in doubt.
        """
        with self._lock:
            steps, self._steps = self._steps, None
            if steps:
                parts: tuple[dict[Any, Any], ...] = (self._people, *self._index.values(), self._nobody, self._witnesses)
                for part in parts:
                    part.clear()
                self._forgotten_at = NEVER
            for person in sorted(people, key=lambda person: person.asked_at):
                if self._has_all_steps:
                    self._put(person.user.key, person, is_saved=not steps)
                elif person.user.key not in self._people:
                    is_there = person.standing == KNOWN and person.user.receives
                    self._put(person.user.key, person._replace(standing=DOUBTED, asked_at=now) if is_there else person)
            self._make_room(0)
            for step in steps or ():
                step()

    def forget(self, names: Optional[Iterable[str]], now: float) -> int:
        """Forget the users with one of these addresses or usernames, and questions about these; None: all. Returns how many.

        A slow answer to an earlier question does not bring them back.
        """
        with self._lock:
            return self._do(functools.partial(self._forget, names, now))

    def _forget(self, names: Optional[Iterable[str]], now: float) -> int:
        self._forgotten_at = now
        if names is None:
            ids, questions = list(self._people), list(self._nobody)
        else:
            questions = [(attribute, name) for name in names for attribute in ("username", "email")]
            ids = list(dict.fromkeys(user_id for each in questions for user_id in self._entry(each)[1:]))
        for user_id in ids:
            self._put(user_id, None)
        return len(ids) + sum(self._nobody.pop(each, None) is not None for each in questions)

    def everybody(self) -> dict[str, Person]:
        """All people, by user_id."""
        with self._lock:
            return dict(self._people)

    def sizes(self) -> tuple[int, int]:
        """How many users are known, and how many questions that found nobody."""
        with self._lock:
            return len(self._people), len(self._nobody)

    def _entry(self, question: Question) -> tuple[Any, ...]:
        """(stamp, *user_ids)."""
        return self._index[question[0]].get(question[1]) or (self._nobody.get(question, NEVER),)

    # ---- with the lock held

    def _do(self, step: Callable[[], Value]) -> Value:
        """Do it, and note it while the saved users are awaited."""
        if self._steps is not None:
            self._steps.append(step)
            if len(self._steps) > MAX_STEPS:
                self._steps, self._has_all_steps = None, False
        return step()

    def _look(self, question: Question) -> Known:
        stamp, *ids = self._entry(question)
        return Known(question, tuple(self._people[user_id] for user_id in ids), stamp)

    def _was_missed(self, user: Optional[User], since: float) -> bool:
        """Has an answer that was asked for later said something else about a name of this user, who was not known until now?"""
        looked = [self._look(name) for name in ((("username", user.username), ("email", user.email)) if user else ())]
        return any(time > since for known in looked for time in (known.answered_at, *(person.asked_at for person in known.people)))

    def _find_later(self, before: Person, after: Person) -> list[tuple[Question, float]]:
        """Names that are new to the user, and about which an answer that was asked for later did not show the user; when that was.

        A username is shown as well by an answer in which another user had it.
        """
        found = []
        for name in [name for name in after.names if after.has(name) and not before.has(name)]:
            known = self._look(name)
            others = [person.asked_at for person in known.here if name[0] == "username" and person.user.key != after.user.key]
            asked_at = max([known.answered_at, *others])
            if asked_at > after.asked_at:
                found.append((name, asked_at))
        return found

    def _miss(self, person: Person, name: Question, asked_at: float) -> Person:
        """The person after that later answer, as if both had come in the order in which they were asked for."""
        is_taken = any(other.has(name) and other.user.key != person.user.key for other in self._look(name).people)
        remaining = person.without([name]) if is_taken and not (person.shares_email and name[0] == "email") else person
        return judge(remaining, None, asked_at, self._witnesses.get(person.user.federation, NEVER), self.policy)

    def _put(self, user_id: str, after: Optional[Person], *, is_saved: bool = False) -> None:
        """Put the person in place, in the index too; None takes it out. is_saved: as they are on the disk."""
        before = self._people.pop(user_id, None)
        if after:
            self._people[user_id] = after  # at the end: used last
        old, new = before.names if before else (), after.names if after else ()
        for name in old:
            index = self._index[name[0]]
            stamp, *ids = index[name[1]]
            if name not in new:
                ids = [each for each in ids if each != user_id]
            if not ids:
                del index[name[1]]
            elif name not in new or (before and after and before.may_answer(name) and not after.may_answer(name)):
                index[name[1]] = (-abs(stamp), *ids)  # it may be somebody else's now: asked for again
        for name in new:
            stamp, *ids = self._entry(name)
            gains = after is not None and after.has(name) and not (before and before.has(name))
            if gains or user_id not in ids:
                self._nobody.pop(name, None)
                # the answer that found the user by another name may be older than the one to this question, or newer: asked for again
                self._index[name[0]][name[1]] = (-abs(stamp), *dict.fromkeys((*ids, user_id)))
        if after != before and not is_saved:
            self.on_change(user_id, before, after)

    def _forget_former_holders(self, name: Question) -> None:
        """Of many who had this name before, forget it for the first: a server may give each user a new id in each answer."""
        ids = self._entry(name)[1:]
        for user_id in ids[: max(0, len(ids) - MAX_FORMER_HOLDERS)]:
            person = self._people[user_id]
            rest = person._replace(former=tuple(each for each in person.former if each != name))
            if person.standing != KNOWN:
                self._put(user_id, None)
            elif not person.has(name):
                self._put(user_id, rest if rest.names else None)

    def _note_question(self, question: Question, asked_at: float) -> None:
        attribute, name = question
        before, *ids = self._entry(question)
        if ids:
            self._index[attribute][name] = (max(before, asked_at), *ids)
        else:
            self._nobody.pop(question, None)
            self._nobody[question] = max(before, asked_at)

    def _make_room(self, new: int) -> None:
        """Forget the longest unused. The new people of one answer stay, however small the store is."""
        while len(self._people) > max(self.policy.cache_max_entries, new):
            self._put(next(iter(self._people)), None)
        while len(self._nobody) > max(1, self.policy.cache_max_entries // 10):
            self._nobody.popitem(last=False)


class SavedUsers:
    """The store of users on disk, last-known.db, so that a restart in an outage knows what was known before. It has no rules of its own.

    A row for each user; not which names nobody has. Written by one thread in the background. Rows belong to a meaning, the settings that
    an answer of Keycloak depends on: rows of another meaning are not used and stay. A fault is a warning, and what could not be written
    is tried again; the file is begun again, from memory, only where SQLite says that it is no database or malformed.
    """

    SCHEMA = "CREATE TABLE IF NOT EXISTS users (meaning TEXT, user_id TEXT, person TEXT NOT NULL, PRIMARY KEY (meaning, user_id)) WITHOUT ROWID"
    # By path, once this process has used the file: (what _look_at_file() said of it, how often it was another file by then)
    states: ClassVar[dict[str, tuple[tuple[int, ...], int]]] = {}
    # Guards it, and the file: for the threads that write it, and the start. Nobody who answers takes it.
    disk = threading.Lock()

    def __init__(
        self, path: str, meaning: str, store: UserStore, clock: Clock = time.monotonic, wall_clock: Clock = time.time
    ) -> None:
        self._path, self._meaning, self._store = path, meaning, store
        self._clock, self._wall_clock = clock, wall_clock
        self._turn = threading.Condition()  # guards the six below
        self._waiting: dict[str, Optional[Person]] = {}  # to be written, by user_id; None: to be deleted
        self._news: set[str] = set()  # user_ids of people with unsaved changes other than times
        self._noted, self._written = 0, 0  # changes so far, and how many of them are on disk
        self._busy_since: Optional[float] = None  # when the writer began what it is writing now
        self._closing = False
        self._fails = False  # of the writer thread: one line when faults begin, one when they end
        self._is_slow = False  # the same of the threads that wait
        self._begun_at = clock()
        store.on_change = self._note
        store.await_saved()
        self._taken_up = False
        self._is_whole = False  # is all of it, of this meaning, to be written?
        self._others_seen = 0  # how many of the other files have all users of this meaning by now
        self._take_up()
        self._thread = threading.Thread(target=self._write, name="last-known", daemon=True)
        self._thread.start()

    def may_know_more(self, seconds: float) -> bool:
        """Could the file, which could not be read yet, know somebody? For so many seconds after the start."""
        return not self._taken_up and self._clock() - self._begun_at < seconds

    def is_behind(self, people: Iterable[Person]) -> bool:
        """Is an older state of one of them on the disk, apart from times?"""
        with self._turn:
            return any(person.user.key in self._news for person in people)

    def wait(self, seconds: float = 1.0) -> None:
        """Return when all that was noted so far is on the disk, or with a warning after so many seconds; at once while the file fails.

        The time counts from the start of the write that is going on, so on a disk that hangs only the first questions wait.
        """
        with self._turn:
            noted, now = self._noted, time.monotonic()
            left = max(0.0, (self._busy_since or now) + seconds - now)
            is_written = self._turn.wait_for(lambda: self._written >= noted or self._fails or self._closing, left)
        if not is_written and not self._is_slow:
            log.warning("last-known: the disk is slow path=%s", self._path)
        self._is_slow = not is_written

    def report(self) -> dict[str, Any]:
        """What the map stats says of the file."""
        with self._turn:
            return {"path": self._path, "works": self._taken_up and not self._fails, "waiting": self._noted - self._written}

    def close(self, seconds: float = 1.0) -> None:
        """Write what is waiting, for so many seconds at the most."""
        with self._turn:
            self._closing = True
            self._turn.notify_all()
        self._thread.join(seconds)
        self._store.on_change = lambda user_id, before, after: None  # else each would keep the other, see collect_garbage()

    def _note(self, user_id: str, before: Optional[Person], after: Optional[Person]) -> None:
        with self._turn:
            self._waiting[user_id] = after
            if not (before and after and (*before[:2], before.shares_email) == (*after[:2], after.shares_email)):
                self._news.add(user_id)
            self._noted += 1
            self._turn.notify_all()

    def _take_up(self) -> None:
        """Put what is saved into the store, if the file can be read now."""
        age = self._wall_clock() - self._clock()
        people = []
        with self.disk:
            try:
                others = self._check_file()
                with contextlib.closing(self._open()) as connection:
                    connection.text_factory = _decode
                    rows = connection.execute("SELECT person FROM users WHERE meaning = ?", (self._meaning,)).fetchall()
                self._note_state()
                self._others_seen = others
            except Exception as exc:
                self._note_fault(exc)
                return
        for (row,) in rows:
            try:
                people.append(person_from_json(row, age, self._begun_at))
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                log.warning("last-known: a row that makes no sense is left alone path=%s", self._path)
        self._store.take_up(people, self._clock())
        self._taken_up = True

    def _look_at_file(self) -> tuple[int, ...]:
        """What changes when another file is put in its place, or when somebody else writes it; raises OSError where there is none."""
        status = os.stat(self._path)  # of what a link leads to: to another disk, say
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def _check_file(self) -> int:
        """How often it was another file by now, or changed by others: whoever uses it writes all users again each time. Makes a new one
        where there is none.
        """
        create_database_file(self._path, 0o600)
        try:
            os.chmod(self._path, 0o600)
        except PermissionError as exc:
            raise OSError("its mode cannot be set to 0600: let it belong to the user that runs mailcloak") from exc
        self._open().close()
        now = self._look_at_file()
        before, others = self.states.get(self._path, (now, 0))
        self.states[self._path] = now, others + (now != before)
        return self.states[self._path][1]

    def _note_state(self) -> None:
        """Note the file as it is now as ours; raises OSError if another one came to its path after _check_file()."""
        (before, others), now = self.states[self._path], self._look_at_file()
        if now[:2] != before[:2]:
            raise OSError("it was replaced while it was used")
        self.states[self._path] = now, others

    def _open(self) -> sqlite3.Connection:
        connection = connect_database(self._path, DATABASE_BUSY_SECONDS)
        try:
            connection.execute(self.SCHEMA)
        except SQLITE_ERRORS:
            connection.close()
            raise
        return connection

    def _write(self) -> None:
        is_last = False
        while not is_last:
            with self._turn:
                if self._fails or not self._taken_up:
                    self._turn.wait_for(lambda: self._closing, SAVE_RETRY_SECONDS)
                else:
                    self._turn.wait_for(lambda: self._waiting or self._closing)
                is_last = self._closing
            self._write_once()

    def _write_once(self) -> None:
        """Write what is waiting; nothing while the file was not read, since its rows may know more."""
        if not self._taken_up:
            self._take_up()
        if not self._taken_up:
            return
        with self.disk:
            noted = self._write_batch()
        if noted is None:
            return
        if self._fails:
            self._fails = False
            log.warning("last-known: written again path=%s", self._path)
        with self._turn:
            self._written, self._busy_since = noted, None
            self._turn.notify_all()

    def _write_batch(self) -> Optional[int]:
        """How many changes are on the disk now; None where it failed."""
        batch: dict[str, Optional[Person]] = {}
        try:
            others = self._check_file()
            if self._others_seen != others:
                if not self._fails:
                    log.warning("last-known: written again from memory, it was deleted, replaced or changed path=%s", self._path)
                self._write_everybody()
            with self._turn:
                self._busy_since = time.monotonic()
                batch, self._waiting = self._waiting, {}
                noted, is_urgent = self._noted, not self._news.isdisjoint(batch)
            if batch or self._is_whole:
                self._save(batch, is_urgent)
            self._others_seen = others
        except Exception as exc:
            self._note_fault(exc)
            with self._turn:
                self._waiting, self._busy_since = {**batch, **self._waiting}, None
                self._turn.notify_all()
            return None
        with self._turn:
            self._news.difference_update(batch.keys() - self._waiting.keys())
        return noted

    def _save(self, batch: Mapping[str, Optional[Person]], is_urgent: bool) -> None:
        age = self._wall_clock() - self._clock()
        saved = [(self._meaning, json.dumps(user_id), person_to_json(person, age)) for user_id, person in batch.items() if person]
        forgotten = [(self._meaning, json.dumps(user_id)) for user_id, person in batch.items() if not person]
        with contextlib.closing(self._open()) as connection:
            # After a power failure a lost right must not come back: with FULL the deleted journal may be there again, and undo the write.
            # Times may be lost.
            connection.execute(f"PRAGMA synchronous = {'EXTRA' if is_urgent else 'OFF'}")
            connection.execute("BEGIN IMMEDIATE")
            if self._look_at_file() != self.states[self._path][0]:  # in the meantime it was locked by another program, say
                raise OSError("it was changed while it was used")
            if self._is_whole:
                connection.execute("DELETE FROM users WHERE meaning = ?", (self._meaning,))
            connection.executemany("INSERT OR REPLACE INTO users VALUES (?, ?, ?)", saved)
            connection.executemany("DELETE FROM users WHERE meaning = ? AND user_id = ?", forgotten)
            connection.execute("COMMIT")
        self._note_state()
        self._is_whole = False

    def _note_fault(self, exc: Exception) -> None:
        end_without_memory(exc)
        is_new, self._fails, reason = not self._fails, True, describe_sqlite(exc)
        if sqlite_fault(exc) == "damaged":
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._path)
                log.warning("last-known: begun again from memory path=%s reason=%s", self._path, f'"{reason}"')
                self._write_everybody()
                return
            except OSError as error:
                reason += f", and it cannot be removed: {error.strerror}"
        if is_new:
            log.warning("last-known: cannot be used, tried again until it can path=%s reason=%s", self._path, f'"{reason}"')

    def _write_everybody(self) -> None:
        """Soon, in place of all rows of this meaning."""
        everybody = self._store.everybody()
        self._is_whole = True
        with self._turn:
            self._waiting = {**everybody, **self._waiting}
            self._news.update(everybody)


def person_to_json(person: Person, age: float) -> str:
    """A row of the file; age: what makes seconds since 1970 of the clock's."""
    times = {name: getattr(person, name) for name in ("asked_at", "confirmed_at", "unnamed_at")}
    return json.dumps({**person._asdict(), **{name: None if time == NEVER else time + age for name, time in times.items()}})


def person_from_json(text: str, age: float, now: float) -> Person:
    """The person of a row; raises ValueError, TypeError, KeyError or OverflowError for what makes no sense. No time is later than now."""
    row = json.loads(text)
    user = User(*row["user"])
    former = tuple((str(attribute), str(name)) for attribute, name in row["former"])
    times = [NEVER if row[name] is None else float(row[name]) - age for name in ("asked_at", "confirmed_at", "unnamed_at")]
    is_sound = row["standing"] in (KNOWN, DOUBTED, GONE) and [type(each) for each in user] == [str, str, bool, bool, str, str]
    is_nameless = row["standing"] == KNOWN and not user.username
    if not is_sound or is_nameless or not all(each <= math.inf for each in times):  # NaN is not
        raise ValueError
    asked_at, confirmed_at, unnamed_at = (min(each, now) for each in times)
    doubted_seconds = float(row["doubted_seconds"])
    person = Person(user, row["standing"], asked_at, confirmed_at, doubted_seconds, former, unnamed_at, row["shares_email"] is True)
    are_names = {attribute for attribute, _ in former} <= {"username", "email"} and len({*person.names}) == len(person.names)
    if not are_names or not 0 <= doubted_seconds < math.inf:
        raise ValueError
    return person


class Verdict(NamedTuple):
    """What follows from the cached people, for one question or two."""

    value: Any  # Users, Login, or whether the user has left
    counts: str  # "there", "absent", "doubted", or "unknown": in an outage, nothing that is known decides


class Found(NamedTuple):
    """What the directory found, and where that came from."""

    value: Any  # Users, Login, or whether the user has left
    source: str  # "cache", "keycloak" or "static"; "outage": from the cache, since Keycloak gave no answer
    age_seconds: float
    known: tuple[Known, ...]  # what it was made from
    good_until: float  # of the clock: until then the same would be found in the cache, if nothing new is learned


def judge_holders(known: Sequence[Known], confirmed_since: Optional[float]) -> Verdict:
    """Whose primary e-mail, or username, it is. confirmed_since: None without an outage; in one, only who was confirmed since counts."""
    here = known[0].here
    since = NEVER if confirmed_since is None else confirmed_since
    users = tuple(person.user for person in here)
    is_open = confirmed_since is not None and bool(here) and not known[0].is_settled
    if is_open or known[0].is_doubted:
        return Verdict(users, "doubted")
    if any(person.standing == KNOWN and person.user.receives and person.confirmed_at >= since for person in here):
        return Verdict(users, "there")
    return Verdict(users, "absent" if confirmed_since is None else "unknown")


def judge_leaving(known: Sequence[Known], confirmed_since: Optional[float]) -> Verdict:
    """Was there a user of this name who is gone or disabled now? Who has another name now has not left."""
    verdict, people = judge_holders(known, confirmed_since), known[0].people
    is_renamed = any(person.standing != GONE and person.user.username not in ("", known[0].question[1]) for person in people)
    return verdict._replace(value=verdict.counts == "absent" and bool(people) and not is_renamed)


def judge_login(known: Sequence[Known], confirmed_since: Optional[float]) -> Verdict:
    """Which user a login names; known are the username and, where the login has the form of one, the e-mail.

    In an outage, a login by e-mail counts only if Keycloak said before that it is nobody's username. Who was refused stays refused.
    """
    named, *held = (each.here for each in known)
    holders = held[0] if held else ()
    if any(each.is_doubted for each in known if each.here or not (named or holders)):
        return Verdict(Login("", "missing"), "doubted")
    login = resolve_login(tuple(person.user for person in named), tuple(person.user for person in holders))
    if confirmed_since is None:
        return Verdict(login, "there" if login.username else "absent")
    if login.username and not known[0 if named else -1].is_settled:
        return Verdict(login, "doubted")
    if login.username:
        person = (*named, *holders)[0]
        is_usable = person.confirmed_at >= confirmed_since and (named or person.unnamed_at >= confirmed_since)
        return Verdict(login, "there" if is_usable else "unknown")
    if not all(each.is_settled for each in known):
        return Verdict(login, "doubted")
    people = [(person, each.question) for each in known for person in each.people]
    if people and not any(person.standing == GONE or person.has(question) for person, question in people):
        return Verdict(login, "doubted")  # who had the username has another one now, and somebody else may have the e-mail
    return Verdict(login, "absent" if people else "unknown")


def newest(known: Sequence[Known]) -> tuple[Known, ...]:
    """The same, with the newest state of each user that one of them has."""
    if len(known) == 1:
        return tuple(known)
    last: dict[str, Person] = {}
    for person in sorted((person for each in known for person in each.people), key=lambda person: person.asked_at):
        last[person.user.key] = person
    return tuple(each._replace(people=tuple(last[person.user.key] for person in each.people)) for each in known)


def _questions_of_login(sasl_username: str) -> list[Question]:
    """Who may be named: the user of this username and, where it is one, of this e-mail."""
    address = normalise_address(sasl_username)
    # Only if it is written in this form: anybody may have zoe@example.org. (or its full-width form) as a username. Keycloak may have a
    # domain that is not ASCII in either spelling, so that the other one is such a name too.
    is_email = address.is_plain and sasl_username == address.text and "xn--" not in address.domain
    return [("username", sasl_username), *([("email", address.text)] if is_email else [])]


class UserDirectory:
    """The directory behind the store of users, as the decisions want it: who has this address, and which user does this login name.

    An answer is cached for its time to live. One about users who are there is asked for again in the background when it is used near
    its end, and goes on in an outage, until policy.stale_if_error_seconds after the user was confirmed.
    """

    def __init__(
        self,
        source: UserSource,
        policy: PolicyConfig,
        timeout_seconds: float,
        store: UserStore,
        saved: Optional[SavedUsers] = None,
        *,
        clock: Clock = time.monotonic,
    ) -> None:
        self._source, self._policy, self._store, self._saved = source, policy, store, saved
        self._timeout_seconds = timeout_seconds
        self._clock = clock
        self._refresh_seconds = REFRESH_AHEAD * policy.cache_ttl_seconds
        self.lookups = {"cache": 0, source.name: 0}  # no lock: each may miss one in a great many
        self._refreshes: queue.SimpleQueue[Optional[Question]] = queue.SimpleQueue()
        self._refreshing: set[Question] = set()  # what is in the queue; each use of a set is one atomic step
        threading.Thread(target=self._refresh, name="refresh", daemon=True).start()

    def find_holders(self, address: str, deadline: Deadline) -> Found:
        """The users whose primary e-mail this is, disabled ones too. Raises DirectoryUnavailable, Disappeared."""
        return self._find([("email", address)], judge_holders, deadline)

    def has_left(self, username: str, deadline: Deadline) -> Found:
        """Was there a user of this name, lower-cased, who is gone or disabled now? Raises DirectoryUnavailable, Disappeared."""
        return self._find([("username", username)], judge_leaving, deadline)

    def find_login(self, sasl_username: str, deadline: Deadline) -> Found:
        """The Login that sasl_username, lower-cased, names: a username or, where there is no such username, a primary e-mail.

        Raises DirectoryUnavailable, Disappeared.
        """
        questions = _questions_of_login(sasl_username)
        found = self._find(questions, judge_login, deadline)
        if found.value.username and found.source != "outage" and len(questions) > 1 and not found.known[0].here:
            self._store.allow_login_by_email(found.known[1].here[0].user, found.known[0].asked_at)
        return found

    def find_user(self, username: str, deadline: Deadline) -> Found:
        """The Login of the user with this username, lower-cased. Raises DirectoryUnavailable, Disappeared."""
        return self._find([("username", username)], judge_login, deadline)

    def has_lost(self, sasl_username: str, address: str) -> bool:
        """Is this a former e-mail of a user that the login may name? Asks nobody."""
        question, names = ("email", address), _questions_of_login(sasl_username)
        former = [person for person in self._store.look(question).people if not person.has(question)]
        return any(person.has(name) for person in former for name in names)

    def holds(self, known: Sequence[Known], good_until: float) -> bool:
        """Would the same be found now in the cache, and is it not yet to be asked for again?"""
        return self._clock() < good_until and self._store.holds(*known)

    def forget(self, address: Optional[str]) -> int:
        """Forget the users with this login or address (with its extension or without), on disk too; None: everybody.

        Returns how many users and questions were forgotten.
        """
        names = None
        if address is not None:
            spellings = address_spellings(normalise_address(address), self._policy.recipient_delimiter)
            names = {address.lower(), *(spelling.text for spelling, _ in spellings)}
        count = self._store.forget(names, self._clock())
        if self._saved:
            self._saved.wait()
        return count

    def report(self) -> dict[str, Any]:
        """What the map stats says of users and Keycloak."""
        users, missing = self._store.sizes()
        outage = self._source.outage
        return {
            "lookups": {"keycloak": 0, **self.lookups, "outage": outage.cached, "failed": outage.deferred},
            "cache": {"users": users, "missing": missing, "limit": self._store.policy.cache_max_entries},
            "keycloak": self._source.report(),
            "saved": self._saved.report() if self._saved else None,
        }

    def close(self) -> None:
        """End the thread; questions are still answered, until the source is closed too."""
        self._refreshes.put(None)

    def _find(self, questions: Sequence[Question], judge_all: Callable[..., Verdict], deadline: Deadline) -> Found:
        policy, source = self._policy, "cache"
        asked: dict[Question, Known] = {}
        while True:  # again after asking: an answer may change what is cached for the other question
            known = newest([self._look(question, asked) for question in questions])
            verdict, now = judge_all(known, None), self._clock()
            life = policy.cache_ttl_seconds if verdict.counts == "there" else policy.negative_cache_ttl_seconds
            old = [each.question for each in known if each.question not in asked and now - each.asked_at >= life]
            if not old:
                break
            try:
                for question in old:
                    asked[question] = self._ask(question, deadline)
            except DirectoryUnavailable:
                found = self._find_in_outage(newest([self._look(question, asked) for question in questions]), judge_all)
                if found is None:
                    raise
                return found
            source = self._source.name
        oldest = min(each.asked_at for each in known)
        if source == "cache" and verdict.counts == "there" and now >= oldest + life - self._refresh_seconds:
            self._refresh_soon(min(known, key=lambda each: each.asked_at).question)
        self.lookups[source] += 1
        self._keep_refusal(verdict, known)
        is_unsure = verdict.counts == "absent" and self._saved and self._saved.may_know_more(policy.disappearance_grace_seconds)
        if verdict.counts == "doubted" or is_unsure:
            raise Disappeared(f"directory: {questions[-1][1]} has disappeared, or it is not known who has this name now")
        good_until = oldest + life - (self._refresh_seconds if verdict.counts == "there" else 0.0)
        return Found(verdict.value, source, now - oldest, known, good_until)

    def _look(self, question: Question, asked: Mapping[Question, Known]) -> Known:
        """What is cached, or what was just learned, where the cache has pushed that out already."""
        cached, learned = self._store.look(question), asked.get(question)
        return learned if learned and learned.asked_at > cached.asked_at else cached

    def _find_in_outage(self, known: tuple[Known, ...], judge_all: Callable[..., Verdict]) -> Optional[Found]:
        """What is known already, where Keycloak gives no answer; None where that does not decide. Raises Disappeared."""
        now = self._clock()
        verdict = judge_all(known, now - self._policy.stale_if_error_seconds)
        may_be_known = self._saved is not None and self._saved.may_know_more(self._policy.disappearance_grace_seconds)
        if verdict.counts == "unknown" and not may_be_known:
            self._source.outage.deferred += 1
            return None
        self._keep_refusal(verdict, known)
        if verdict.counts in ("doubted", "unknown"):
            self._source.outage.deferred += 1
            raise Disappeared(f"directory: {known[-1].question[1]} has disappeared, or it is not known who has this name now")
        self._source.outage.cached += 1
        asked_at = min((person.asked_at for each in known for person in each.people), default=now)
        return Found(verdict.value, "outage", now - asked_at, known, NEVER)

    def _keep_refusal(self, verdict: Verdict, known: Sequence[Known]) -> None:
        """Before a refusal is given, wait until it is on the disk, even if another thread learned it."""
        if self._saved and verdict.counts != "there" and self._saved.is_behind(each for one in known for each in one.people):
            self._saved.wait()

    def _ask(self, question: Question, deadline: Deadline) -> Known:
        """Ask the source itself, and take in the answer for all questions."""
        answer = self._source.find_users(question, deadline)
        known, changes = self._store.learn(question, answer)
        for before, after in changes:
            is_disabled = after.standing == KNOWN and not after.user.receives and after.user.federation
            if before.standing == DOUBTED and (after.standing == GONE or is_disabled):
                name, seconds = escape_for_log(after.names[0][1]), self._policy.disappearance_grace_seconds
                log.warning("directory: user <%s> has been gone for %.0f s, believed from now on", name, seconds)
        if self._saved and any(after.may_have_lost(before) for before, after in changes):
            self._saved.wait()
        return known or self._ask(question, deadline)

    def _refresh_soon(self, question: Question) -> None:
        if question not in self._refreshing and len(self._refreshing) < MAX_REFRESHES_WAITING:
            self._refreshing.add(question)
            self._refreshes.put(question)

    def _refresh(self) -> None:
        while True:
            question = self._refreshes.get()
            if question is None:
                return
            try:
                self._ask(question, time.monotonic() + self._timeout_seconds)
            except DirectoryUnavailable:
                pass  # what is cached stays as it is
            except Exception as exc:
                end_without_memory(exc)
                log.error("directory: internal error %s", describe_exception(exc))
            self._refreshing.discard(question)


# ---------------------------------------------------------------------------------------------------------------------------------
# 9. Answers
# What the handlers ask: the facts for one request, whole answers recalled, the explanation of an answer, and the service that holds
# all that answers come from; and what they tell: that an app was used. Handler threads enter; the main thread makes the service, it or a
# timer thread asks for postmasters, and one thread writes to the disk when each app was last used.
# ---------------------------------------------------------------------------------------------------------------------------------


class LiveFacts(Facts):
    """Facts looked up for one attempt at an answer, with what is needed to recall it, or to explain it.

    All its questions to Keycloak share one deadline, which begins with the first of them, or with an earlier attempt's.
    """

    def __init__(
        self,
        service: Service,
        version: Optional[Version] = None,
        *,
        deadline: Deadline = 0.0,
        explained: bool = False,
        gives_up: bool = False,
    ) -> None:
        self._service = service
        self.version = version  # of the database, when the request came
        self.expires_at = math.inf  # of an app, in seconds since 1970
        self.deadline = deadline  # 0 until the first question to Keycloak
        self.known: dict[tuple[str, str], Any] = {}  # by what was asked, and its value: one question sees each fact once
        self.can_be_recalled = True  # may the answer be recalled? Not if a fact cannot be compared with a later one
        self._rows = 0  # facts from the database so far
        self._is_exact = True  # were all of these read from self.version?
        self._gives_up = gives_up
        self.found: list[Found] = []  # in the directory
        self.steps: Optional[list[dict[str, Any]]] = [] if explained else None  # asked, value, found, source, age_seconds, error

    def find_alias(self, address: Address) -> Optional[Alias]:
        find = functools.partial(self._service.database.find_alias, address.text, self.version)
        return cast(Optional[Alias], self._look_up("alias", address.text, find))

    def find_app(self, app_id: str, sender: Address) -> Optional[App]:
        if not is_plain_text(app_id):
            return None
        text = sender.text if is_plain_text(sender.text) else None  # which no row equals
        app: Optional[App] = self._look_up("app", app_id, lambda: self._service.database.find_app(app_id, text, self.version))
        if app and app.expires_at is not None:
            self.expires_at = app.expires_at
        self.can_be_recalled &= not app or app.state != "expired"  # the host's clock may be set back
        return app

    def find_holders(self, address: Address) -> Users:
        return cast(Users, self._look_up_user("holders", address.text, self._service.directory.find_holders))

    def has_left(self, username: str) -> bool:
        return _may_be_name(username) and bool(self._look_up_user("leaver", username, self._service.directory.has_left))

    def find_login(self, sasl_username: str) -> Login:
        return self._find_login("login", sasl_username, self._service.directory.find_login)

    def find_user(self, username: str) -> Login:
        return self._find_login("user", username, self._service.directory.find_user)

    def _find_login(self, asked: str, name: str, find: Callable[[str, Deadline], Found]) -> Login:
        return cast(Login, self._look_up_user(asked, name, find)) if _may_be_name(name) else Login("", "missing")

    def has_lost(self, sasl_username: str, address: Address) -> bool:
        return self._service.directory.has_lost(sasl_username, address.text)

    @property
    def is_torn(self) -> bool:
        """May there be rows of different versions of the database among them?"""
        return self._rows > 1 and not self._is_exact

    def _until(self) -> Deadline:
        self.deadline = self.deadline or time.monotonic() + self._service.timeout_seconds
        return self.deadline

    def _look_up_user(self, asked: str, value: str, find: Callable[[str, Deadline], Found]) -> Any:
        return self._look_up(asked, value, lambda: find(value, self._until()))

    def _look_up(self, asked: str, value: str, find: Callable[[], Any]) -> Any:
        if (asked, value) in self.known:
            return self.known[asked, value]
        try:
            if self._gives_up and asked in ("alias", "app"):
                raise DatabaseUnavailable(f"database: {self._service.config.sqlite.path!r}: changes too often to be read")
            found = find()
        except MailcloakError as exc:
            self.can_be_recalled = False
            self._note_step(asked, value, error=str(exc))
            raise
        if not isinstance(found, Found):
            self._rows += 1
            read_from = self._service.database.read_from
            if self._rows == 1:
                self.version = read_from
            if read_from is None or read_from != self.version:
                self.can_be_recalled = self._is_exact = False
            self._note_step(asked, value, found=found, source="database")
            self.known[asked, value] = found
            return found
        self.found.append(found)
        self.known[asked, value] = found.value
        self._note_step(asked, value, found=found.value, source=found.source, age_seconds=found.age_seconds)
        return found.value

    def _note_step(self, asked: str, value: str, **outcome: Any) -> None:
        if self.steps is not None:
            step = {"asked": asked, "value": value, "found": None, "source": "", "age_seconds": None, "error": "", **outcome}
            self.steps.append({**step, "found": _to_json(step["found"])})


def _may_be_name(username: str) -> bool:
    """Can Keycloak have a user of this name? Names may hold spaces."""
    return len(username) <= MAX_ADDRESS_CHARS and is_plain_text(username.replace(" ", ""))


def _to_json(found: Any) -> Any:
    """A fact as JSON takes it: its fields by name, or a list of such, true or false, or None."""
    if hasattr(found, "_asdict"):
        return found._asdict()
    return found if found is None or isinstance(found, bool) else [_to_json(each) for each in found]


class Recalled(NamedTuple):
    """A whole answer, and what it was made from besides the configuration."""

    action: Action
    version: Optional[Version]  # of the database
    known: Sequence[Known]  # in the directory
    good_until: float  # of what was found there, as in Found
    expires_at: float  # of an app, in seconds since 1970; inf: never


class RecalledAnswers:
    """Whole answers that are given again while all that they were made from is the same.

    Each has the version of the database file that its rows were read from, and what was found in the directory. It is recalled while the
    file has that version and the directory would find the same; a reload begins with none. One that needed no look-up is made as fast.
    """

    def __init__(self, directory: UserDirectory) -> None:
        self._directory = directory
        self._answers: BoundedMap[Recalled] = BoundedMap(MAX_RECALLED_ANSWERS)  # by policy_question() or the map's query

    def recall(self, question: tuple[str, ...], version: Optional[Version]) -> Optional[Action]:
        """The answer, if it holds."""
        kept = self._answers.get(question)
        if kept is None or kept.version != version or not self._directory.holds(kept.known, kept.good_until):
            return None
        if kept.expires_at < math.inf and time.time() >= kept.expires_at:
            return None
        return kept.action

    def keep(self, question: tuple[str, ...], action: Action, facts: LiveFacts) -> None:
        """Keep the answer that was made from these facts, if it can be compared with them later, and is not too long."""
        is_small = len(facts.found) <= MAX_RECALLED_FACTS and sum(map(len, question)) <= MAX_RECALLED_CHARS
        good_until = min((found.good_until for found in facts.found), default=math.inf)
        if facts.known and facts.can_be_recalled and is_small and good_until > NEVER:
            known = tuple(known for found in facts.found for known in found.known)
            recalled = Recalled(action, facts.version, known, good_until, facts.expires_at)
            self._answers.put(question, recalled, is_lasting=action.text.startswith(("DUNNO", "OK")))

    def __len__(self) -> int:
        return len(self._answers)


class Service:
    """All that answers come from, for one configuration. A reload makes a new one and swaps it in.

    Parts whose settings did not change are taken from the old ones, the newest first: the users, the workers, the database.
    """

    def __init__(self, config: Config, *old: Service) -> None:
        self.config, self.policy = config, config.policy
        self.database: Database = old[0].database if old else Database(config.sqlite.path)
        self.timeout_seconds = config.keycloak.timeout_seconds if config.keycloak else 1.0
        self.meaning = meaning_of(config.keycloak) if config.keycloak else ""
        self.store = UserStore(config.policy)
        self.saved: Optional[SavedUsers] = None
        with_same_meaning = [each for each in old if each.saved and each.meaning == self.meaning]
        if with_same_meaning:
            self.store, self.saved = with_same_meaning[0].store, with_same_meaning[0].saved
        self.source: UserSource
        with_same_source = [each for each in old if each.config.keycloak == config.keycloak]
        if config.keycloak and with_same_source:
            self.source = with_same_source[0].source
        elif config.keycloak:
            self.source = KeycloakUsers(config.keycloak)
        else:
            self.source = StaticUsers(config.static_users or {})
        try:
            if self.meaning and not with_same_meaning:
                self.saved = SavedUsers(last_known_path(config.sqlite.path), self.meaning, self.store)
            self.directory = UserDirectory(self.source, config.policy, self.timeout_seconds, self.store, self.saved)
        except RuntimeError:  # the system gives no more threads
            if self.saved and not with_same_meaning:
                self.saved.close()
            if not with_same_source:
                self.source.close()
            raise
        self.store.policy = config.policy  # not before: a reload that fails changes nothing
        self.recalled = RecalledAnswers(self.directory)
        self._said: set[str] = set()  # errors that the log has already; each use of a set is one atomic step

    def note_error(self, text: str) -> bool:
        """Note an error; is it in the log already? One line for each is enough; a reload begins again."""
        if text in self._said:
            return True
        if len(self._said) >= MAX_ERRORS_SAID:
            self._said.clear()
        self._said.add(text)
        return False

    def answer(self, question: tuple[str, ...], decide: Callable[[Facts], Action]) -> tuple[Action, bool]:
        """(the answer to the question, was it recalled?); decide makes it from facts."""
        version, deadline = self.database.version(), 0.0
        recalled = self.recalled.recall(question, version)
        if recalled is not None:
            return recalled, True
        for attempt in range(MAX_ATTEMPTS):
            facts = LiveFacts(self, version, deadline=deadline, gives_up=attempt == MAX_ATTEMPTS - 1)
            action = decide(facts)
            deadline = facts.deadline
            # Again if what an earlier look-up found was no longer so at a later one: the user may have lost the right meanwhile.
            is_same = all(self.store.says_the_same(known) for found in facts.found for known in found.known)
            if is_same and not facts.is_torn:
                break
            version = self.database.version()
        self.recalled.keep(question, action, facts)
        return action, False


def meaning_of(config: KeycloakConfig) -> str:
    """The settings that change what an answer of Keycloak means; users saved under others are not used."""
    return json.dumps([config.base_url, config.realm, config.require_verified_email, config.receive_when_locked_out])


def explain_policy(request: PolicyRequest, service: Service) -> dict[str, Any]:
    """The answer to a policy request and the steps that led to it, by the daemon's own decision."""
    facts = LiveFacts(service, explained=True)
    action = decide_policy(request, service.policy, facts)
    asked = request.recipient if request.policy_context == "recipient" else request.sender
    return _explain(action, facts, asked, request.sasl_username)


def explain_alias(key: str, service: Service) -> dict[str, Any]:
    """The same for a query of the alias map."""
    facts = LiveFacts(service, explained=True)
    return _explain(decide_alias(key, service.policy, facts), facts, key, "")


def _can_be_alias(address: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(parse_plain_address(address))
    return False


ANOTHER_ADDRESS = "mailcloakctl aliases add ADDRESS USERNAME gives the user another address to send as; this one is somebody else's e-mail in Keycloak"


def _explain(action: Action, facts: LiveFacts, asked: str, user: str) -> dict[str, Any]:
    """The answer as mailcloakctl prints it, with rule and change in words; two reasons where both recipient and sender were asked."""
    steps = facts.steps or []
    aliases = {step["value"]: step["found"]["enabled"] for step in steps if step["asked"] == "alias" and step["found"]}
    deciding, holders = list(aliases), any(step["asked"] == "holders" and step["found"] for step in steps)
    username = next((step["found"]["username"] for step in steps if step["asked"] == "login" and step["found"]), "")
    names = {"address": asked, "alias": deciding[-1] if deciding else asked, "user": username or user}
    quoted = {name: shlex.quote(value) if value else "'<>'" for name, value in names.items()}
    reasons = [REASONS[word] for word in action.reason.split(",")]
    change = "; ".join(reason.change for reason in reasons if reason.change).format(**quoted)
    if asked and "@" not in asked:
        change = "ask for it with its domain: Postfix appends $myorigin to an address that has none"
    elif "aliases add" in change and aliases and not any(aliases.values()):
        change = f"mailcloakctl aliases enable {shlex.quote(deciding[0])}"
    elif "aliases add" in change and holders:
        change = "enable the user in Keycloak" if action.reason != "sender-not-owned" else ANOTHER_ADDRESS
    elif action.reason == "sender-not-owned" and any(
        step["asked"] == "alias" and step["found"] and step["found"]["receive_only"] for step in steps
    ):
        change = REASONS["receive-only"].change.format(**quoted)
    elif "aliases add" in change and not _can_be_alias(asked):
        change = "nothing: no alias or e-mail of a user can have this form"
    rule = "; ".join(reason.rule for reason in reasons)
    return {"version": __version__, "answer": action.text, "reason": action.reason, "rule": rule, "change": change, "steps": steps}


def read_app_uses(path: str) -> dict[str, Any]:
    """{"since": when noting began, "apps": {app_id: {"last_used": ..., "client": ...}}}; times in seconds since 1970.

    Raises OSError, ValueError or RecursionError. What it says of one app may be anything. Root reads it as well, so no link is followed.
    """
    with open_file(path, os.O_NOFOLLOW) as file:
        known = json.loads(file.read(MAX_USES_CHARS))
    if not (isinstance(known, dict) and isinstance(known.get("since"), int) and isinstance(known.get("apps"), dict)):
        raise ValueError("it is not what the daemon writes")
    return known


class AppUses:
    """When and from where each app was last used, for mailcloakctl apps list: last-used.json. No answer depends on it.

    One thread writes it in the background: a new file with all that was in the old one, which it replaces. A fault is a warning, what is
    in the file stays, and what could not be written is tried again.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._noted: BoundedMap[float] = BoundedMap(MAX_APPS_NOTED)  # by app, when, of time.monotonic()
        self._lock = threading.Lock()  # guards the next
        self._waiting: dict[str, dict[str, Any]] = {}  # to be written, by app
        self._has_news = threading.Event()
        self._is_closing = False
        self._thread = threading.Thread(target=self._write, name="last-used", daemon=True)
        self._thread.start()

    def note(self, app_id: str, request: PolicyRequest, now: float) -> None:
        """A request of the app was accepted. Mostly one look at a dict; two at the same moment may both be noted."""
        if now < (self._noted.get(app_id) or NEVER) + USE_SECONDS:
            return
        client = find_attribute(request.text, "\nclient_address=")
        if not client:  # Postfix always names one, mailcloakctl ask does not
            return
        self._noted.put(app_id, now, is_lasting=True)
        with self._lock:
            self._waiting[app_id] = {"last_used": int(time.time()), "client": escape_for_log(client)}
        self._has_news.set()

    def close(self, seconds: float) -> None:
        """Write what is waiting, for so many seconds at the most."""
        self._is_closing = True
        self._has_news.set()
        self._thread.join(seconds)

    def _write(self) -> None:
        is_last = fails = False
        while not is_last:
            self._has_news.clear()  # before it is looked for
            path, is_last = self._path, self._is_closing
            with self._lock:
                batch, self._waiting = self._waiting, {}
            try:
                self._save(path, batch)
                if fails:
                    log.warning("last-used: written again path=%s", path)
                fails = False
            except Exception as exc:
                end_without_memory(exc)
                with self._lock:
                    self._waiting = {**batch, **self._waiting}
                if not fails:
                    reason = getattr(exc, "strerror", None) or exc
                    log.warning("last-used: cannot be used, tried again until it can path=%s reason=%s", path, f'"{reason}"')
                fails = True
            if not is_last:
                self._has_news.wait(SAVE_RETRY_SECONDS if fails else None)

    @staticmethod
    def _save(path: str, uses: Mapping[str, Any]) -> None:
        known: dict[str, Any] = {"since": int(time.time()), "apps": {}}
        with contextlib.suppress(FileNotFoundError):
            known = read_app_uses(path)
            if not uses:
                return
        known["apps"].update(uses)
        new = f"{path}.new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        with open(new, "x", encoding="utf-8", opener=functools.partial(os.open, mode=0o600)) as file:
            json.dump(known, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)


# ---------------------------------------------------------------------------------------------------------------------------------
# 10. Servers
# One server for each socket, one thread for each connection. A handler reads, asks the sections above, leaves a line for each decision to
# the log's thread, which calls describe() here, and writes. A connection stays open until Postfix closes it: a policy client whose
# connection is closed waits a second before it reconnects (smtpd_policy_service_retry_delay), for every recipient again.
# ---------------------------------------------------------------------------------------------------------------------------------


class Tally:
    """How many answers of which kind, and how long they took. Each connection has its own, so that counting needs no lock."""

    BOUNDS = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)  # seconds

    def __init__(self) -> None:
        self.answers: Counter[tuple[str, str]] = Counter()  # by the first word of the answer, and the reason
        self.recalled = 0  # of them; each took some microseconds, and no clock is asked for it
        self.counts = [0] * (len(self.BOUNDS) + 1)  # of others made from facts: those that took up to each bound, then those beyond
        self.seconds = 0.0  # that they took together

    def note_time(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(self.BOUNDS, seconds)] += 1
        self.seconds += seconds

    def add(self, other: Tally) -> None:
        self.answers.update(dict(other.answers))  # a copy, since its connection goes on counting
        self.recalled += other.recalled
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts)]
        self.seconds += other.seconds

    def times(self) -> dict[str, Any]:
        """Of answers made from facts, as a histogram: a recalled one counts as within the least bound."""
        least, *others = self.counts
        return {"bounds": self.BOUNDS, "counts": [least + self.recalled, *others], "sum": self.seconds}


class Handler(socketserver.BaseRequestHandler):
    """One connection: request after request until the client closes it. Subclasses say what a request and an answer are."""

    component = ""
    stream_class: type[Any]
    internal_error = Action("", "internal-error")
    waited_seconds = 0.0  # for room for the answers to what was received last
    server: Server

    def setup(self) -> None:
        self.tally = Tally()
        self.rests = False  # between two requests, so that it may make room for another connection
        self.used_at = time.monotonic()
        self._set_timeout(socket.SO_SNDTIMEO, SEND_TIMEOUT_SECONDS)
        self._set_timeout(socket.SO_RCVTIMEO, IDLE_SECONDS)
        self.server.connections[self.request] = self

    def handle(self) -> None:
        stream, begun_at = self.stream_class(), 0.0
        try:
            while data := self._receive_until(begun_at + REQUEST_SECONDS) if begun_at else self._receive():
                stream.feed(data)
                self.waited_seconds = 0.0
                while stream.has_begun and (request := stream.next_request()):
                    self._send(stream.encode(self._answer(request)))
                    begun_at = 0.0
                if stream.has_begun:
                    begun_at = begun_at or time.monotonic()
        except ProtocolError as exc:
            log.warning("%s: bad request, connection closed reason=%s", self.component, f'"{exc}"')
        except BlockingIOError:
            log.info("%s: client does not read its answers, connection closed", self.component)
        except OSError as exc:
            log.debug("%s: connection lost reason=%s", self.component, f'"{exc.strerror}"')

    def _receive(self) -> bytes:
        """The first bytes of a request, however long the client rests before; b"" at the connection's end."""
        self.rests = True
        try:
            data: bytes = self.request.recv(RECEIVE_BYTES)
        except BlockingIOError:
            self.server.service.database.close()
            self._set_timeout(socket.SO_RCVTIMEO, 0)
            data = self.request.recv(RECEIVE_BYTES)
            self._set_timeout(socket.SO_RCVTIMEO, IDLE_SECONDS)
        self.rests = False
        return data

    def _receive_until(self, deadline: Deadline) -> bytes:
        """More bytes of a request that has begun; raises ProtocolError at the deadline."""
        self._set_timeout(socket.SO_RCVTIMEO, max(0.001, deadline - time.monotonic()))
        try:
            data: bytes = self.request.recv(RECEIVE_BYTES)
        except BlockingIOError:
            raise ProtocolError(f"request not whole after {REQUEST_SECONDS} s") from None
        self._set_timeout(socket.SO_RCVTIMEO, IDLE_SECONDS)
        return data

    def _send(self, data: bytes) -> None:
        """Send all of it; raises BlockingIOError where the client does not make room in time for it, and for the answers before it."""
        sent = _send_at_once(self.request.fileno(), data, len(data), _SEND_FLAGS) if _send_at_once else 0
        if sent == len(data):
            return
        began = time.monotonic()
        self.request.sendall(data[max(0, sent) :])
        self.waited_seconds += time.monotonic() - began
        if self.waited_seconds > SEND_TIMEOUT_SECONDS:  # it reads, but a little now and then
            raise BlockingIOError

    def _set_timeout(self, option: int, seconds: float) -> None:
        """The kernel's own timeout, 0 for none: unlike settimeout() it costs no further system call for each answer."""
        timeval = "qq" if option > 60 else "ll"  # the options whose times have 64 bits where a long has 32 (socket.h)
        timeout = struct.pack(timeval, int(seconds), int(seconds % 1 * 1_000_000))
        self.request.setsockopt(socket.SOL_SOCKET, option, timeout)

    def _answer(self, request: Any) -> Action:
        self.used_at = started = time.monotonic()
        try:
            action = self.decide(request, self.server.service)
            level = action.level
            if level == logging.ERROR and self.server.service.note_error(action.text):
                level = logging.INFO
            if log.isEnabledFor(level):
                line = functools.partial(self._line, request, action, (time.monotonic() - started) * 1000)
                self.server.daemon.log_line(level, line if sum(map(len, request)) <= MAX_LOGGED_CHARS else line())
        except Exception as exc:  # the edge: whatever went wrong, the answer is "try later", never a permission
            end_without_memory(exc)
            log.error("%s: internal error %s", self.component, describe_exception(exc))
            action = self.internal_error
        self.tally.answers[action.text.partition(" ")[0], action.reason] += 1
        return action

    def _answer_from_facts(self, question: tuple[str, ...], decide: Callable[[Facts], Action], service: Service) -> Action:
        action, is_recalled = service.answer(question, decide)
        if is_recalled:
            self.tally.recalled += 1
        else:
            self.tally.note_time(time.monotonic() - self.used_at)
        return action

    def decide(self, request: Any, service: Service) -> Action:
        """The answer to one request of the stream."""
        raise NotImplementedError

    def describe(self, request: Any, action: Action) -> str:
        """What happened, for the log: an event and its key=value pairs. The log's thread calls it, or for a long request the handler's."""
        raise NotImplementedError

    def _line(self, request: Any, action: Action, elapsed_ms: float) -> str:
        return f"{self.component}: {self.describe(request, action)} reason={action.reason} elapsed_ms={elapsed_ms:.0f}"


class PolicyHandler(Handler):
    """A connection to the policy socket."""

    component = "policy"
    stream_class = PolicyStream
    internal_error = Action(INTERNAL_ERROR, "internal-error")

    def decide(self, request: PolicyRequest, service: Service) -> Action:
        question = policy_question(request, service.policy)
        action = self._answer_from_facts(question, lambda facts: decide_policy(request, service.policy, facts), service)
        if request.sasl_username and action.reason.rpartition(",")[2] == "app":
            self.server.daemon.app_uses.note(request.sasl_username.lower(), request, self.used_at)
        return action

    def describe(self, request: PolicyRequest, action: Action) -> str:
        event = {"5": "reject", "4": "defer"}.get(action.text[0], "accept")
        client, queue_id = (find_attribute(request.text, f"\n{name}=") for name in ("client_address", "queue_id"))
        state, recipient, sender, client, queue_id, sasl_username = escape_all_for_log(
            request.protocol_state, request.recipient, request.sender, client, queue_id, request.sasl_username
        )
        line = f"{event} state={state} recipient=<{recipient}> sender=<{sender}> client={client}"
        line += f" queue_id={queue_id}" if queue_id else ""
        return line + (f" sasl_username={sasl_username}" if sasl_username else "")


class SocketmapHandler(Handler):
    """A connection to the socketmap socket."""

    component = "socketmap"
    stream_class = SocketmapStream
    internal_error = Action("TEMP internal error", "internal-error")

    def decide(self, request: SocketmapQuery, service: Service) -> Action:
        if request.name not in ("alias", "stats", "explain", "flush"):
            return Action(f"PERM unknown map {escape_for_log(request.name)[:64]}", "unknown-map", logging.ERROR)
        if not request.key:
            return Action("PERM no key", "no-key", logging.ERROR)
        if request.name != "alias":
            return self._administer(request, service)
        question = ("alias", request.key)
        return self._answer_from_facts(question, lambda facts: decide_alias(request.key, service.policy, facts), service)

    def _administer(self, request: SocketmapQuery, service: Service) -> Action:
        """The maps that mailcloakctl asks: stats for all who may connect, the others for those who could change the answers anyway."""
        if request.name == "stats":
            return Action(f"OK {json.dumps(self.server.daemon.report())}", "stats", logging.DEBUG)
        peer = struct.unpack("3i", self.request.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        owner = self.server.owner
        if peer[1] not in (0, os.geteuid(), *([pwd.getpwnam(owner).pw_uid] if owner else [])):
            return Action(
                f"PERM {request.name} is for root, daemon.user and the owner of the socket", "not-permitted", logging.WARNING
            )
        if request.name == "flush":
            address = None if request.key == "*" else request.key
            return Action(f"OK {json.dumps({'forgotten': service.directory.forget(address)})}", "flush")
        try:
            question = json.loads(request.key)
            if "alias" in question:
                return Action(f"OK {json.dumps(explain_alias(str(question['alias']), service))}", "explain", logging.DEBUG)
            asked = PolicyRequest(**{name: str(value) for name, value in question["policy"].items()})
            return Action(f"OK {json.dumps(explain_policy(asked, service))}", "explain", logging.DEBUG)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return Action("PERM not a question", "bad-question", logging.WARNING)

    def describe(self, request: SocketmapQuery, action: Action) -> str:
        status, _, text = action.text.partition(" ")
        event = {"OK": "found", "NOTFOUND": "not-found", "TEMP": "defer"}.get(status, "error")
        mailbox = f" mailbox=<{escape_for_log(text)}>" if status == "OK" and request.name == "alias" else ""
        return f"{event} map={escape_for_log(request.name)} key=<{escape_for_log(request.key)}>{mailbox}"


def collect_garbage() -> None:
    """A full pass of Python's collector, where there are enough new objects for one; what survives it is left out of later passes.

    A pass over 100,000 users would stop all threads for 0.1 s and more, and find nothing. Each object still ends with its last reference;
    only one that becomes part of a cycle after that is never freed. Answers leave no cycles (tests/test_memory.py). A failed HTTP request
    does; at most those requests stay that are under way at such a pass. Not one of gc.callbacks: in the middle of a pass these give up
    Python's lock, and the other threads make objects that the next pass has to look at.
    """
    if len(gc.get_objects()) > MIN_FROZEN_OBJECTS:  # without those left out; Python's own count falls when one of those ends
        gc.collect()
        gc.freeze()


class Server(socketserver.ThreadingUnixStreamServer):
    """A listening socket, bound beforehand, and the connections that came in over it.

    Where there is room for no other connection, the one that has rested longest is closed: Postfix opens a new one when it needs it.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, listener: socket.socket, handler: type[Handler], service: Service, daemon: Daemon) -> None:
        super().__init__(str(listener.getsockname()), handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.service = service  # replaced as a whole by a reload; a request uses the one it began with
        self.component = handler.component
        self.owner = service.config.sockets.socket_owner_user  # a change of it needs a restart
        self.daemon = daemon
        self.ended = Tally()  # of connections that have ended; guarded by _connections_changed
        self._full_said_at = -math.inf
        self.looked_at = time.monotonic()  # when the thread that accepts connections was last seen at work, for the watchdog
        self._connections_changed = threading.Condition()  # guards the keys of connections
        self.connections: dict[socket.socket, Optional[Handler]] = {}  # None until its thread runs

    def service_actions(self) -> None:
        """What serve_forever() calls after each look for a connection, at least every POLL_SECONDS."""
        self.looked_at = time.monotonic()
        collect_garbage()

    def get_request(self) -> tuple[socket.socket, Any]:
        """The next connection; raises OSError where there is none or no room, and the server then looks again."""
        if len(self.connections) >= self.daemon.max_connections:
            self._make_room(f"{self.daemon.max_connections} connections")
            raise BlockingIOError
        try:
            return super().get_request()
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._make_room(exc.strerror or type(exc).__name__)
            raise

    def _make_room(self, reason: str) -> None:
        """Close the connection that has rested longest, and wait a moment for one to end, whichever it is."""
        if time.monotonic() > self._full_said_at + 60:
            self._full_said_at = time.monotonic()
            log.warning(
                "server: full, resting connections are closed for new ones path=%s reason=%s", self.server_address, f'"{reason}"'
            )
        with self._connections_changed:
            resting = [handler for handler in self.connections.values() if handler and handler.rests]
            if resting:
                with contextlib.suppress(OSError):
                    min(resting, key=lambda handler: handler.used_at).request.shutdown(socket.SHUT_RDWR)
            self._connections_changed.wait(ROOM_SECONDS)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._connections_changed:
            self.connections[request] = None
        try:
            super().process_request(request, client_address)
        except RuntimeError as exc:  # the system gives no more threads
            log.error("server: connection refused reason=%s", f'"{exc}"')
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        self.service.database.close()  # this thread's own
        super().shutdown_request(request)
        with self._connections_changed:
            handler = self.connections.pop(request, None)
            if handler:
                self.ended.add(handler.tally)
            self._connections_changed.notify_all()

    def tally(self) -> Tally:
        """Of all connections so far."""
        total = Tally()
        with self._connections_changed:
            for tally in (self.ended, *(handler.tally for handler in self.connections.values() if handler)):
                total.add(tally)
        return total

    def handle_error(self, request: Any, client_address: Any) -> None:
        exc = sys.exc_info()[1]
        end_without_memory(exc)
        log.error("server: internal error %s", describe_exception(exc or Exception()))

    def stop_accepting(self) -> None:
        """Take no further connection, and wake handlers that wait for a request: what has arrived is still read and answered."""
        self.shutdown()
        self.server_close()
        with self._connections_changed:
            for connection in self.connections:
                with contextlib.suppress(OSError):  # the client was faster
                    connection.shutdown(socket.SHUT_RD)

    def wait_for_connections(self, deadline: Deadline) -> bool:
        """True once no connection is left, False at the deadline."""
        with self._connections_changed:
            return self._connections_changed.wait_for(lambda: not self.connections, max(0.0, deadline - time.monotonic()))


# ---------------------------------------------------------------------------------------------------------------------------------
# 11. Process
# Sockets, privileges, signals, reload, the end. The main thread enters; with Keycloak a timer thread asks for postmasters, and handler
# threads ask for the report.
# ---------------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked_directory(path: str) -> Iterator[None]:
    """Keep other daemons from the sockets in this directory: from looking for stale ones to listening.

    Without it, one daemon could remove a socket that another has just bound, or take one that does not listen yet for stale. Where the
    directory cannot be locked, that is logged and it is used all the same, since anybody who can read it could hold the lock.
    """
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            _lock_within(LOCK_SECONDS, descriptor)
        except FileNotFoundError:
            pass  # bind() will say so
        except OSError as exc:
            log.info("server: directory not locked path=%s reason=%s", path, f'"{exc.strerror}"')
        yield


def _lock_within(seconds: float, descriptor: int) -> None:
    """Lock the file until its descriptor is closed. Source: flock(2)."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def remove_stale_socket(path: str, key: str) -> None:
    """Remove the socket that a killed daemon left behind; raise StartError if the path is anything else that is there."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as exc:
        raise StartError(f"{key}: {path!r}: {exc.strerror}") from exc
    if not stat.S_ISSOCK(status.st_mode):
        raise StartError(f"{key}: {path!r} is there and is not a socket, move it away or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        error = probe.connect_ex(path)
    if error == 0:
        raise StartError(f"{key}: {path!r} is served by another running daemon, stop it first")
    if error == errno.ENOENT:
        return
    if error != errno.ECONNREFUSED:
        raise StartError(f"{key}: {path!r} is there and cannot be tried: {os.strerror(error)}")
    try:
        os.unlink(path)
    except OSError as exc:
        raise StartError(f"{key}: {path!r} is stale and cannot be removed: {exc.strerror}") from exc
    log.info("server: stale socket removed path=%s", path)


def _hand_over_socket(path: str, uid: int, gid: int, mode: int) -> None:
    """Give the socket that root has just bound, with mode 0, to its owner. Works on the file itself, not on whatever has its name."""
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != 0:
            raise StartError(f"sockets: {path!r} was replaced while it was made, its directory must not be writable by others")
        itself = f"/proc/self/fd/{descriptor}"
        os.chown(itself, uid, gid)
        os.chmod(itself, mode)
    finally:
        os.close(descriptor)


def _bind_in_group(listener: socket.socket, path: str, gid: int) -> None:
    """Bind as an ordinary user, who can change the group of own files only; a directory with setgid makes files of its own group."""
    listener.bind(path)
    if os.lstat(path).st_gid != gid:
        os.chown(path, -1, gid, follow_symlinks=False)


def bind_socket(path: str, key: str, sockets: SocketsConfig) -> socket.socket:
    """A listening socket with its owner, group and mode; raises StartError.

    As root the socket is made under the owner's own ids and with the umask that leaves the mode asked for, so nobody else can
    connect at any moment, and no chown is needed that could hit a swapped file. Only where the owner may not write
    the directory, root makes it, closed to everybody, and hands it over.
    """
    uid = pwd.getpwnam(sockets.socket_owner_user).pw_uid if sockets.socket_owner_user else os.geteuid()
    gid = grp.getgrnam(sockets.socket_owner_group).gr_gid if sockets.socket_owner_group else os.getegid()
    if os.geteuid() != 0 and (uid != os.geteuid() or gid not in (os.getegid(), *os.getgroups())):
        raise StartError(
            f"{key}: only root can give a socket to another user, start as root or set socket_owner_user and socket_owner_group to ''"
        )
    with locked_directory(os.path.dirname(path)):
        remove_stale_socket(path, key)
        try:
            return _make_socket(path, uid, gid, sockets.socket_mode)
        except OSError as exc:
            raise StartError(f"{key}: {path!r} cannot be made: {exc.strerror or exc}{_socket_hint(exc, path)}") from exc


@contextlib.contextmanager
def acting_as(uid: int, gid: int) -> Iterator[None]:
    """For a moment, create files as another user, in no further groups; only root can."""
    with contextlib.ExitStack() as stack:
        if uid and os.geteuid() == 0:
            stack.callback(os.setgroups, os.getgroups())
            os.setgroups([gid])
        stack.callback(os.setegid, os.getegid())
        os.setegid(gid)
        stack.callback(os.seteuid, os.geteuid())
        os.seteuid(uid)
        yield


def _make_socket(path: str, uid: int, gid: int, mode: int) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old_umask = os.umask(0o777 & ~mode)
    try:
        if os.geteuid() != 0:
            _bind_in_group(listener, path, gid)
        else:
            try:
                with acting_as(uid, gid):
                    _bind_in_group(listener, path, gid)
            except PermissionError:
                os.umask(0o777)
                listener.bind(path)
                _hand_over_socket(path, uid, gid, mode)
        listener.listen(LISTEN_BACKLOG)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(old_umask)
    return listener


def _socket_hint(exc: OSError, path: str) -> str:
    if exc.errno == errno.ENOENT:
        return f", its directory {os.path.dirname(path)!r} does not exist"
    return f", as user {pwd.getpwuid(os.geteuid()).pw_name!r}" if exc.errno == errno.EACCES else ""


def take_over_sockets() -> dict[str, socket.socket]:
    """The listening sockets that a service manager hands over, by name, {} if none; raises StartError for others than ours.

    Source: sd_listen_fds(3): descriptors from 3 on, LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    count = os.environ.pop("LISTEN_FDS", "0")
    if sorted(names) != ["policy", "socketmap"] or count != str(len(names)):
        raise StartError(f"sockets: expected two handed over, named policy and socketmap, got {count} named {':'.join(names)!r}")
    try:
        listeners = {name: socket.socket(fileno=number) for number, name in enumerate(names, 3)}
    except OSError as exc:
        raise StartError(f"sockets: two were announced by LISTEN_FDS, and are not there: {exc.strerror}") from exc
    for name, listener in listeners.items():
        listener.set_inheritable(False)
        if (listener.family, listener.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            raise StartError(f"sockets: the one handed over as {name} is not a Unix stream socket")
    return listeners


def notify(**state: object) -> None:
    """Tell the service manager that started us, if it wants to know. Source: sd_notify(3)."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.setblocking(False)
            lines = "\n".join(f"{name}={value}" for name, value in state.items())
            manager.sendto(os.fsencode(lines), "\0" + path[1:] if path.startswith("@") else path)


def find_watchdog_seconds() -> float:
    """How often the service manager has to hear from us: twice in its patience. 0 for never. Source: sd_watchdog_enabled(3)."""
    usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID") or str(os.getpid())
    return int(usec) / 2e6 if usec.isdecimal() and pid == str(os.getpid()) else 0.0


def drop_privileges(user: str) -> None:
    """Become user for good, with its groups; raises StartError if root could be regained."""
    if os.geteuid() != 0 or not user:
        return
    entry = pwd.getpwnam(user)
    try:
        os.initgroups(user, entry.pw_gid)
        os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
        os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    except OSError as exc:
        raise StartError(f"daemon.user: cannot become {user!r}: {exc.strerror}") from exc
    if entry.pw_uid == 0:
        return
    try:
        os.setresuid(0, 0, 0)
    except OSError:
        return
    raise StartError(f"daemon.user: root could be regained after becoming {user!r}")


def allow_connections(wanted: int) -> int:
    """Raise the limit of open files for so many connections to each socket; how many of them the limit then allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = SPARE_FILES + 2 * wanted
    for soft_limit, hard_limit in ((needed, max(needed, hard)), (min(needed, hard), hard)):
        if 0 <= soft < needed:  # RLIM_INFINITY is -1
            with contextlib.suppress(ValueError, OSError):  # only root may raise the hard limit
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft_limit, hard_limit))
                soft = soft_limit
    allowed = wanted if soft < 0 else max(1, min(wanted, (soft - SPARE_FILES) // 2))
    if allowed < wanted:
        log.warning(
            "config: daemon.max_connections: lowered to %d, the limit of open files allows no more; raise that limit", allowed
        )
    return allowed


def warn_of_missing_postmasters(service: Service) -> None:
    """One line for the domains that have no postmaster (RFC 5321, section 4.5.1); nothing where that cannot be told now."""
    missing = []
    for domain in sorted(service.policy.domain):
        source = find_owner(Address("postmaster", domain), service.policy, LiveFacts(service)).source
        if source in UNKNOWN:
            break  # Keycloak is not asked again and again for this
        if source == "nobody":
            missing.append(f"postmaster@{domain}")
    if missing:
        remedy = f"mailcloakctl aliases add {missing[0]} USERNAME"
        log.warning("config: policy.domain: nobody has %s, which RFC 5321 asks for: %s", " or ".join(missing), remedy)
    service.database.close()


class Daemon:
    """The running program: two servers, one service, the signals."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self, config: Config, log_line: Callable[[int, LineText], None]) -> None:
        self._config = config
        self.log_line = log_line  # of a decision, as QueuedLog.put()
        self.max_connections = config.daemon.max_connections  # to each socket
        self._servers: list[Server] = []
        self._socket_files: dict[str, Optional[tuple[int, int]]] = {}  # path and identity of those that we made
        self.app_uses: AppUses  # from run() on, since it begins a thread
        self._started, self._started_at = time.monotonic(), time.time()
        self._last_reload: Optional[dict[str, Any]] = None  # {"at": seconds since 1970, "ok": bool}
        self._retired: list[Service] = []  # that a reload replaced, at most one
        self._retired_until = 0.0  # of time.monotonic(): its requests have ended by then
        self._watchdog_seconds = find_watchdog_seconds()
        self._looked_at = 0.0  # at the servers

    def run(self) -> None:
        """Serve until a signal says stop; raises StartError if that cannot begin."""
        threading.stack_size(THREAD_STACK_BYTES)
        for warning in self._config.warnings:
            log.warning("%s", warning)
        listeners = take_over_sockets()  # by the component that serves it
        sockets = self._config.sockets
        try:
            if not listeners:
                for name, path in (("policy", sockets.policy_socket), ("socketmap", sockets.socketmap_socket)):
                    listeners[name] = bind_socket(path, f"sockets.{name}_socket", sockets)
                    self._socket_files[path] = file_identity(path)
            self.max_connections = allow_connections(self.max_connections)
            import_http()
            gc.set_threshold(*gc.get_threshold()[:2], 1_000_000)  # full passes only by collect_garbage()
            gc.collect()
            gc.freeze()
            drop_privileges(self._config.daemon.user)
            self._open_database()
        except MailcloakError:
            self._remove_sockets()
            raise
        self._warn_of_unreadable_files()
        service = Service(self._config)
        self.app_uses = AppUses(last_used_path(self._config.sqlite.path))
        for handler in (PolicyHandler, SocketmapHandler):
            server = Server(listeners[handler.component], handler, service, self)
            self._servers.append(server)
            # shutdown() must be called from another thread than serve_forever() runs in, or it waits for itself
            threading.Thread(target=server.serve_forever, args=[POLL_SECONDS], name=handler.component, daemon=True).start()
        user = pwd.getpwuid(os.geteuid()).pw_name
        details = [__version__, os.getpid(), user, *(server.server_address for server in self._servers)]
        log.info("daemon: started version=%s pid=%d user=%s policy_socket=%s socketmap_socket=%s", *details)
        notify(READY=1, STATUS=f"serving, configuration {self._config.path}")
        if self._config.keycloak:  # later: Keycloak may be starting with us, and the first seconds belong to mail
            timer = threading.Timer(POSTMASTER_SECONDS, warn_of_missing_postmasters, [service])
            timer.daemon = True
            timer.start()
        else:
            warn_of_missing_postmasters(service)
        del service  # which would outlive a reload here
        while (received := self._next_signal()) in (None, signal.SIGHUP):
            if received is None:
                if self._retired and time.monotonic() >= self._retired_until:
                    self._end_retired(self._servers[0].service)
                continue
            notify(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)
            is_good = self._reload()
            self._last_reload = {"at": time.time(), "ok": is_good}
            notify(READY=1, STATUS="reloaded" if is_good else "reload refused, the old configuration stays in force")
        notify(STOPPING=1, STATUS=f"stopping on {received.name}")
        self._stop(received)
        gc.unfreeze()  # Python looks at all once more when it ends

    def _next_signal(self) -> Optional[signal.Signals]:
        """Wait for it; None if it is time to look at the servers, or to end what a reload has retired."""
        looks_in = max(0.0, self._looked_at + (self._watchdog_seconds or LOOK_SECONDS) - time.monotonic())
        ends_in = max(0.0, self._retired_until - time.monotonic()) if self._retired else math.inf
        if not looks_in:
            self._look_at_servers()
        found = signal.sigtimedwait(self.SIGNALS, min(ends_in, looks_in))
        # Python returns what nobody has filled in where the process was stopped (SIGSTOP) for longer than the wait.
        return signal.Signals(found.si_signo) if found and found.si_signo in self.SIGNALS else None

    def _look_at_servers(self) -> None:
        """Say that we work, if both servers look after their sockets, and if nobody keeps the lock that all look-ups need. End the process if
        one has not looked since the last time, and no service manager would do so.
        """
        if self._watchdog_seconds:
            self._servers[0].service.directory.report()
        self._looked_at, before = time.monotonic(), self._looked_at
        is_well = min(server.looked_at for server in self._servers) > before - 2 * POLL_SECONDS
        if self._watchdog_seconds and is_well:
            notify(WATCHDOG=1)
        elif not is_well and not self._watchdog_seconds:
            end_process(b"no connection is accepted any more")

    def report(self) -> dict[str, Any]:
        """What the map stats answers: counters since the start, and the state of things. No name and no address but a canary's."""
        service = self._servers[0].service
        tallies = {server.component: server.tally() for server in self._servers}
        return {
            "version": __version__,
            "pid": os.getpid(),
            "config": self._config.path,
            "started_at": self._started_at,
            "uptime_seconds": time.monotonic() - self._started,
            "last_reload": self._last_reload,
            "answers": [
                {"service": name, "answer": answer, "reason": reason, "count": count}
                for name, tally in tallies.items()
                for (answer, reason), count in sorted(tally.answers.items())
            ],
            "recalled_answers": {"given": sum(tally.recalled for tally in tallies.values()), "kept": len(service.recalled)},
            "seconds": {name: tally.times() for name, tally in tallies.items()},
            **service.directory.report(),
            "database": {"path": service.config.sqlite.path, "works": service.database.works()},
            "connections": {
                **{server.component: len(server.connections) for server in self._servers},
                "limit": self.max_connections,
            },
        }

    def _open_database(self) -> None:
        path = self._config.sqlite.path
        try:
            done = prepare_database(path, DATABASE_BUSY_SECONDS)
            if done:
                log.warning("database: %s path=%s", "created, there was none" if done == "created" else done, path)
            with contextlib.closing(Database(path)) as database:
                database.check()
        except DatabaseUnavailable as exc:
            log.error("%s; answers that need it are deferred until it is fixed", exc)

    def _warn_of_unreadable_files(self) -> None:
        keycloak = self._config.keycloak
        files = [self._config.path] + ([keycloak.client_secret_file, keycloak.ca_file] if keycloak else [])
        for path in filter(None, files):
            if not os.access(path, os.R_OK):
                log.warning("config: %s: not readable by user %r, a reload will fail", path, pwd.getpwuid(os.geteuid()).pw_name)

    def _reload(self) -> bool:
        """Read the config again and put it in force as a whole; False for a bad one, which changes nothing."""
        try:
            config = load_config(self._config.path)
        except ConfigError as exc:
            for problem in exc.problems:
                log.error("%s", problem)
            log.error("daemon: reload refused, the old configuration stays in force")
            return False
        for warning in config.warnings:
            log.warning("%s", warning)
        for block in ("sockets", "daemon", "sqlite"):
            for field in dataclasses.fields(getattr(config, block)):
                old, new = (getattr(getattr(each, block), field.name) for each in (self._config, config))
                if old != new and field.name != "log_level":
                    log.warning("config: %s.%s: a change here needs a restart", block, field.name)
        if not os.path.exists(config.sqlite.path):
            log.warning("config: sqlite.path: %s does not exist: %s", config.sqlite.path, MOVE_DATABASE)
        config = dataclasses.replace(config, sqlite=self._config.sqlite)
        old_service = self._servers[0].service
        try:
            service = Service(config, old_service, *self._retired)
        except RuntimeError as exc:  # the system gives no more threads
            log.error("daemon: reload refused, the old configuration stays in force reason=%s", f'"{exc}"')
            return False
        self._config = config
        for server in self._servers:
            server.service = service
        self._retire(old_service, service)
        log.setLevel(config.daemon.log_level.upper())
        log.info("daemon: reloaded config=%s", config.path)
        return True

    def _retire(self, old: Service, new: Service) -> None:
        """Let the requests that began with the old one end. Reloads in a row pile up no threads: the one before it is ended now."""
        old.directory.close()
        self._end_retired(new, old)
        self._retired, self._retired_until = [old], time.monotonic() + 2 * old.timeout_seconds

    def _end_retired(self, *others: Service) -> None:
        """End what none of the others uses."""
        for service in self._retired:
            if not any(each.source is service.source for each in others):
                service.source.give_up()
                service.source.close()
            if service.saved and not any(each.saved is service.saved for each in others):
                service.saved.close()
        self._retired = []

    def _stop(self, received: signal.Signals) -> None:
        log.info("daemon: stopping signal=%s", received.name)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))  # a second one ends the program at once
        started = time.monotonic()
        self._remove_sockets()
        for server in self._servers:
            server.stop_accepting()
        if not all(server.wait_for_connections(started + SHUTDOWN_LOOKUP_SECONDS) for server in self._servers):
            for service in (self._servers[0].service, *self._retired):
                service.source.give_up()
        if not all(server.wait_for_connections(started + SHUTDOWN_TOTAL_SECONDS) for server in self._servers):
            log.warning("daemon: connections cut off at the end of the time to stop")
        for service in (self._servers[0].service, *self._retired):
            if service.saved:
                service.saved.close(max(0.0, started + SHUTDOWN_SECONDS - time.monotonic()))
        self.app_uses.close(max(0.0, started + SHUTDOWN_SECONDS - time.monotonic()))
        log.info("daemon: stopped")

    def _remove_sockets(self) -> None:
        """Take our sockets' names away, so that nobody connects any more; those that were handed over stay for the next daemon."""
        for path, identity in self._socket_files.items():
            try:
                if identity and file_identity(path) == identity:  # perhaps somebody has removed ours, and started another daemon
                    os.unlink(path)
            except OSError as exc:  # daemon.user may not write there; the next start removes it
                log.info("server: socket left behind path=%s reason=%s", path, f'"{exc.strerror}"')


# ---------------------------------------------------------------------------------------------------------------------------------
# 12. main
# Arguments, config, the log, start, exit code. The main thread enters; any thread logs, and one thread writes the log.
# ---------------------------------------------------------------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors repeat no argument: one of them may be a secret in the wrong place."""

    usage_exit_code = EXIT_USAGE

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)  # part of an option may be part of another one as well

    def error(self, message: str) -> Any:
        message = re.sub(r"(unrecognized arguments|ignored explicit argument).*", r"\1", message, flags=re.DOTALL)
        message = re.sub(r"(ambiguous option).*?( could match|$)", r"\1\2", message, flags=re.DOTALL)
        self.print_usage(sys.stderr)
        self.exit(self.usage_exit_code, f"{self.prog}: {message}\n")


def _parse_arguments(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="mailcloak",
        description="Answer Postfix from Keycloak and SQLite: who may receive, who may send, where an alias leads.",
        epilog="Stays in the foreground and logs to stderr. SIGHUP reads the configuration again.",
    )
    parser.add_argument("config", nargs="?", help=f"the configuration, {DEFAULT_CONFIG_PATH} if none is named")
    parser.add_argument("--config", dest="config_option", metavar="FILE", help="the same as an option")
    parser.add_argument("--check-config", action="store_true", help="say what is wrong with the configuration, then end")
    parser.add_argument("--version", action="version", version=f"mailcloak {__version__}")
    options = parser.parse_args(argv)
    if options.config and options.config_option:
        parser.error("the configuration is named twice")
    options.config = os.path.abspath(options.config or options.config_option or DEFAULT_CONFIG_PATH)
    return options


class Line(NamedTuple):
    """A line of the log."""

    level: int
    at: float  # seconds since 1970
    text: LineText
    stands_for: int = 1  # lines


class QueuedLog(logging.Handler):
    """The log, written by a thread of its own: a slow disk, a full pipe or a syslog that hangs keeps no answer waiting.

    The thread also makes the text of a decision's line: many one after another take less time than each beside its answer
    (bench/NOTES.md). What waits to be written is bounded: lines are lost beyond that, and counted.
    """

    def __init__(self, write: Callable[[Sequence[Line]], None]) -> None:
        super().__init__()
        self._write_lines = write
        self._lines: queue.SimpleQueue[Union[Line, threading.Event]] = queue.SimpleQueue()
        self._lost = 0  # for which there was no room; no lock: it may miss one in a great many
        self._failed = 0  # that could not be written
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def handle(self, record: logging.LogRecord) -> bool:
        """What logging calls, which would take a lock."""
        self.put(record.levelno, record.getMessage())
        return True

    def put(self, level: int, text: LineText) -> None:
        """Leave a line to the thread."""
        if self._lines.qsize() >= MAX_LOG_LINES_WAITING:
            self._lost += 1
            return
        lost, self._lost = self._lost, 0
        if lost:
            self._lines.put(self._tell(lost))
        self._lines.put(Line(level, time.time(), text))

    @staticmethod
    def _tell(lost: int) -> Line:
        return Line(logging.WARNING, time.time(), f"daemon: {lost} lines of the log were lost, it took no more", lost)

    def flush(self) -> None:
        """Wait until what waits now is written, for LOG_END_SECONDS at the most; logging does so at the program's end."""
        written = threading.Event()
        self._lines.put(written)
        written.wait(LOG_END_SECONDS)

    def _write(self) -> None:
        while True:
            self._write_some([self._lines.get()])

    def _write_some(self, waiting: list[Union[Line, threading.Event]]) -> None:
        """Write these, and what comes while they wait."""
        if self._lines.qsize() < MAX_LOG_LINES_AT_ONCE:
            time.sleep(LOG_GATHER_SECONDS)
        while not self._lines.empty() and len(waiting) < MAX_LOG_LINES_AT_ONCE:
            waiting.append(self._lines.get())
        lines = [each for each in waiting if isinstance(each, Line)]
        if lines and self._failed:
            lines.insert(0, self._tell(self._failed))
            self._failed = 0
        try:
            self._write_lines(lines)
        except Exception as exc:  # the disk is full, or nobody will ever read it
            end_without_memory(exc)
            self._failed += sum(line.stands_for for line in lines)
        for each in waiting:
            if isinstance(each, threading.Event):
                each.set()


@functools.lru_cache(maxsize=1)
def _shown_second(second: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))


def _text_of(line: Line) -> str:
    return f"{logging.getLevelName(line.level).lower()} {line.text if isinstance(line.text, str) else line.text()}"


def _write_to_stderr(lines: Sequence[Line]) -> None:
    _write_texts([f"{_shown_second(int(line.at))},{int(line.at % 1 * 1000):03} {_text_of(line)}" for line in lines])


def _write_to_journal(lines: Sequence[Line]) -> None:
    """Standard error as systemd reads it, with the priority before each line. Source: sd-daemon(3)."""
    _write_texts([f"<{_priority(line.level)}>{_text_of(line)}" for line in lines])


def _write_texts(texts: Sequence[str]) -> None:
    data = b"".join(text.encode("utf-8", "backslashreplace")[: MAX_LOG_LINE_BYTES - 1] + b"\n" for text in texts)
    while data:
        try:
            data = data[os.write(2, data) :]
        except BlockingIOError:  # whoever gave it to us does not want to wait
            select.select([], [2], [])


def _write_to_syslog(lines: Sequence[Line]) -> None:
    for line in lines:
        syslog.syslog(_priority(line.level), _text_of(line))


def _priority(level: int) -> int:
    """The priority of a line in syslog and the journal."""
    priorities = {logging.DEBUG: syslog.LOG_DEBUG, logging.INFO: syslog.LOG_INFO, logging.WARNING: syslog.LOG_WARNING}
    return priorities.get(level, syslog.LOG_ERR)


def _to_journal() -> bool:
    """Does standard error go to systemd's journal? Source: systemd.exec(5), JOURNAL_STREAM."""
    try:
        status = os.fstat(2)
    except OSError:  # it is closed
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def configure_logging(config: DaemonConfig) -> QueuedLog:
    """Log to stderr, each line with its time, or to syslog or the journal, which have their own; raises StartError without a syslog."""
    write = _write_to_journal if _to_journal() else _write_to_stderr
    if config.log == "syslog":
        if not os.path.exists("/dev/log"):
            raise StartError("daemon.log: there is no /dev/log, start a syslog daemon or set it to stderr")
        syslog.openlog("mailcloak", syslog.LOG_PID, syslog.LOG_MAIL)
        write = _write_to_syslog
    handler = QueuedLog(write)
    log.addHandler(handler)
    log.propagate = False
    for library in ("urllib3", "requests"):  # keep them from handlers of the root logger: urllib3 logs headers of the server
        logging.getLogger(library).propagate = False
    log.setLevel(config.log_level.upper())
    return handler


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the daemon; returns its exit code."""
    options = _parse_arguments(argv)
    if (
        not options.check_config
    ):  # before all that takes time, and before any thread, which inherits it: only sigtimedwait() sees them
        signal.pthread_sigmask(signal.SIG_BLOCK, Daemon.SIGNALS)
    try:
        config = load_config(options.config)
    except ConfigError as exc:
        priority = f"<{syslog.LOG_ERR}>" if _to_journal() else ""
        print(*(f"{priority}{problem}" for problem in exc.problems), sep="\n", file=sys.stderr)
        return EXIT_CONFIG
    if options.check_config:
        try:
            if config.keycloak:
                import_http()
        except StartError as exc:
            print(exc, file=sys.stderr)
            return EXIT_FAILED
        print(*config.warnings, *postfix_warnings(config), f"config: {config.path}: good", sep="\n", file=sys.stderr)
        return EXIT_OK
    threading.excepthook = sys.unraisablehook = note_lost_exception
    try:
        Daemon(config, configure_logging(config.daemon).put).run()
    except StartError as exc:
        log.error("%s", exc)  # without a handler yet, logging writes it to stderr
        return EXIT_FAILED
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
