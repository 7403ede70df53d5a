# mailcloakdata: aliases as files, backups. MIT licence, see LICENSE.
"""Aliases as files, and backups of the database: what these commands of mailcloakctl run, and no other command loads.

  aliases export [FILE]    all aliases as a file, or on standard output
  aliases import FILE      adds and changes what the file says, deletes nothing
  aliases sync FILE        makes the aliases equal to the file; what it does not name is deleted (--missing). With --scope or --source,
                           only those of a domain or of a job: two jobs do not delete each other's
  aliases move OLD NEW     lets all aliases of one user lead to another

A file is read to its end before anything is decided. One bad line stops the whole, unless --skip-bad; each is said with its number.
What is read is compared with the database, and only rows that differ are written, in one transaction: a kill at any instant leaves
the old state or the new, and where nothing differs nothing is written at all. The daemon reads on meanwhile. It waits for the commit
alone, as for every commit.

A file that would remove or change more than --max-change of the aliases stops with exit code 3: it may be a broken export.

Formats (--format, else by the end of the file's name):
  csv            alias,username[,enabled[,receive_only]], a header if you like; enabled is 1 or 0, and 1 where it is not there. Several
                 targets are separated by semicolons; one in angle brackets is an address elsewhere: alice;bob;<jo@elsewhere.example>
  jsonl          a line of JSON for each: {"alias": "info@example.org", "username": "alice", "enabled": true}, or with
                 "users": ["alice", "bob"], "external": ["jo@elsewhere.example"], "receive_only": true
  virtual        virtual(5): an address and its targets; it has no disabled aliases
  postfixadmin   CSV with address,goto,active, as PostfixAdmin exports its aliases; other columns are not read
The last two name mailboxes, not users. With --usernames local a target in the alias's own domain is a user, by its local part, and any
other is an address elsewhere; with --usernames address each whole target is a username. Addresses elsewhere are taken with --external.

  backup FILE              a copy of the database, while others use it, checked, for its owner alone
  restore FILE             checks a backup and makes the database equal to it, in one transaction: the file itself stays the same, so
                           that a Dovecot that has it open reads on
  db check                 damage, rows that belong to nothing, and names that are not as the daemon compares them; --fix corrects them

  migrate-from-go FILE     takes over the aliases and apps of the Go program, and its configuration

Contents: decisions (pure), formats (pure), files, comparing (in a database of its own, which is deleted when it is closed), the verbs
of aliases, backups, the check, moving in from the Go program.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import errno
import functools
import itertools
import json
import os
import re
import shutil
import sqlite3
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, ClassVar, NamedTuple, Optional, TypeVar, cast

import mailcloak
import mailcloakcommon as common
import mailcloakowner

MAX_LINE_BYTES = 262_144  # of a line of a file; an alias with 1,000 targets takes less than half of it
MAX_ASKED = 100  # changed aliases that are looked up in Keycloak one by one, and that get a line of their own in syslog
FEW_ALIASES = 20  # so many are not worth a limit on changes
BATCH_ROWS = 1000
STAGING_CACHE_KIB = 16384
PROGRESS_SECONDS = 1.0  # what takes longer is shown on a terminal
PROGRESS_ITEMS = 4096  # between two looks at the clock

Item = TypeVar("Item")

# ---------------------------------------------------------------------------------------------------------------------------------
# Decisions
# From what is stored and what is wanted to what changes. Pure.
# ---------------------------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """An alias as it is stored."""

    address: str
    targets: str  # each on a line, with 0 before a username and 1 before an address elsewhere, as mailcloak.read_alias() takes them
    enabled: int  # 1 or 0
    receive_only: Optional[int]  # 1 or 0; None in a file that does not say it
    source: str  # "" where no job owns it, or where that does not matter


class Change(NamedTuple):
    """What becomes of one alias. All old values are None for one that is new, all new values for one that goes."""

    address: str
    old_targets: Optional[str]
    old_enabled: Optional[int]
    old_receive_only: Optional[int]
    old_source: Optional[str]
    targets: Optional[str]
    enabled: Optional[int]
    receive_only: Optional[int]
    source: Optional[str]

    @property
    def kind(self) -> str:
        """One of KINDS."""
        if self.old_targets is None:
            return "add"
        if self.targets is None:
            return "delete"
        if (self.targets, self.receive_only) != (self.old_targets, self.old_receive_only):
            return "change"
        if self.enabled == self.old_enabled:
            return "claim"
        return "enable" if self.enabled else "disable"

    @property
    def old(self) -> Optional[mailcloak.Alias]:
        """What is stored."""
        return None if self.old_targets is None else mailcloak.read_alias(self.old_targets, self.old_enabled, self.old_receive_only)

    @property
    def new(self) -> Optional[mailcloak.Alias]:
        """What is to be stored."""
        return None if self.targets is None else mailcloak.read_alias(self.targets, self.enabled, self.receive_only)

    @property
    def leads_elsewhere(self) -> bool:
        """Does mail for the address go to others than before?"""
        return self.targets is not None and self.targets != self.old_targets

    @property
    def new_targets(self) -> list[str]:
        """Who gets mail for the address now, and did not before."""
        return common.new_targets(self.old, self.new) if self.new else []


KINDS = {
    "add": "added",
    "change": "changed",
    "enable": "enabled",
    "disable": "disabled",
    "claim": "claimed",  # nothing but the job that owns it
    "delete": "deleted",
}
NOTHING = (None,) * 4


def plan(stored: Iterable[Row], wanted: Iterable[Row], missing: str, source: str = "") -> Iterator[Change]:
    """The changes that make what is stored what is wanted. Both are sorted by address, and hold each address once.

    missing: what becomes of an alias of this source that is stored and not wanted: "delete", "disable" or "keep".
    """
    stored, wanted = iter(stored), iter(wanted)
    old, new = next(stored, None), next(wanted, None)
    while old is not None or new is not None:
        if old == new:
            old, new = next(stored, None), next(wanted, None)
        elif new is None or (old is not None and old[0] < new[0]):
            row = cast(Row, old)
            if missing == "delete" and row[4] == source:
                yield Change._make((*row, *NOTHING))
            elif missing == "disable" and row[2] and row[4] == source:
                yield Change._make((*row, row[1], 0, *row[3:]))
            old = next(stored, None)
        elif old is None or new[0] < old[0]:
            yield Change._make((*new[:1], *NOTHING, *new[1:3], new[3] or 0, new[4]))
            new = next(wanted, None)
        else:
            receive_only = old[3] if new[3] is None else new[3]
            change = Change._make((*old, *new[1:3], receive_only, new[4]))
            if change[1:5] != change[5:]:
                yield change
            old, new = next(stored, None), next(wanted, None)


def take_once(
    rows: Iterable[tuple[str, str, int, Optional[int], int]], report: Callable[[int, str], None], source: str = ""
) -> Iterator[Row]:
    """Each address once. rows: address, targets, enabled, receive_only and the number of the line, sorted by address and number.

    A line that says again what an earlier one said is no fault; one that says something else is reported, and left out.
    """
    last, last_number = Row("", "", 0, 0, ""), 0
    for address, targets, enabled, receive_only, number in rows:
        row = (address, targets, enabled, receive_only, source)
        if address != last[0]:
            last, last_number = cast(Row, row), number
            yield last
        elif row != last:
            leads = "leads to another user" if targets != last[1] else "has another state"
            report(number, f"{address} {leads} in line {last_number}; all targets of an alias stand in one line")


def is_over_limit(counts: dict[str, int], stored: int, wanted: int, percent: float) -> bool:
    """Do so many of the stored aliases change or go that the file may be a broken one? counts: of changes, by kind.

    Of a few aliases each may change, but all of them do not go because a file is empty.
    """
    touched = sum(counts.values()) - counts.get("add", 0)
    return touched > stored * percent / 100 and (stored > FEW_ALIASES or not wanted)


# ---------------------------------------------------------------------------------------------------------------------------------
# Formats
# A line of text to the fields of an alias, and an alias to a line. Pure.
# ---------------------------------------------------------------------------------------------------------------------------------

ENABLED = {"1": 1, "yes": 1, "true": 1, "0": 0, "no": 0, "false": 0}


def read_enabled(text: str) -> int:
    """1 or 0; raises ValueError."""
    try:
        return ENABLED[text.lower()]
    except KeyError:
        expected = "1 or 0 (yes or no) is expected; several users are separated by semicolons"
        raise ValueError(f"it says {text!r} where {expected}") from None


class Line(NamedTuple):
    """An alias as a line of a file says it."""

    address: str
    users: Sequence[str]
    external: Sequence[str] = ()  # addresses elsewhere
    enabled: int = 1
    receive_only: Optional[int] = None  # the file does not say it: what is stored stays


def join_targets(users: Iterable[str], external: Iterable[str] = ()) -> str:
    """The targets of a Row."""
    return "\n".join([*sorted({f"0{user}" for user in users}), *sorted({f"1{address}" for address in external})])


def split_targets(targets: str) -> tuple[list[str], list[str]]:
    """(users, addresses elsewhere) of a Row."""
    lines = targets.split("\n")
    return [line[1:] for line in lines if line[:1] == "0"], [line[1:] for line in lines if line[:1] == "1"]


def read_names(text: str) -> tuple[list[str], list[str]]:
    """(users, addresses elsewhere) of a field such as "alice; bob; <jo@elsewhere.example>"."""
    if ";" not in text and "<" not in text:
        return [text], []
    names = [name.strip() for name in text.split(";")]
    users = [name for name in names if not name.startswith("<")]
    return users, [name.strip("<>") for name in names if name.startswith("<")]


def read_mailboxes(text: str, address: str, usernames: str) -> tuple[list[str], list[str]]:
    """(users, addresses elsewhere) of the targets of virtual(5), separated by commas; raises ValueError.

    usernames: "local" (a user is the local part of a target in the alias's own domain) or "address" (all of it).
    """
    users, external, own = [], [], mailcloak.domain_to_ascii(address.rpartition("@")[2])
    for target in filter(None, re.split(r"[\s,]+", text)):
        local_part, at_sign, domain = mailcloak.unquote_local_part(target).rpartition("@")
        if not at_sign:
            raise ValueError(f"its target {target!r} has no domain")
        if usernames == "address":
            users.append(f"{local_part}@{domain}")
        elif mailcloak.domain_to_ascii(domain) == own:
            users.append(local_part)
        else:
            external.append(target)
    if not users and not external:
        raise ValueError("it has no target")
    return users, external


def write_mailboxes(row: Row, usernames: str) -> str:
    """The targets of an alias as virtual(5) names them; raises ValueError where something else would be read from them."""
    users, external = split_targets(row[1])
    if row[3]:
        raise ValueError("its users may only receive, which this format cannot say")
    for user in users:
        if ("@" in user) != (usernames == "address"):
            raise ValueError(f"its username {user!r} needs --usernames {'address' if usernames == 'local' else 'local'}")
    if external and usernames == "address":
        raise ValueError("it leads elsewhere, which needs --usernames local")
    domain = row[0].rpartition("@")[2]
    text = ",".join([*(mailcloak.format_mailbox(user, "", domain) for user in users), *external])
    with contextlib.suppress(ValueError):
        if read_mailboxes(text, row[0], usernames) == (users, external):
            return text
    raise ValueError(f"its username {users[0] if users else ''!r} cannot stand there")


class Unreadable(common.Refused):
    """The file as a whole cannot be read in this format."""


class Format:
    """One form of file; an object for each file that is read or written."""

    head = ""  # what a file begins with
    holds_all = True  # is there a line for each alias that may be stored?

    def __init__(self, usernames: str) -> None:
        self.usernames = usernames

    def prepare(self, *, receive_only: bool) -> None:
        """To be called before anything is written: are there aliases that only receive?"""

    def join(self, lines: Iterable[tuple[int, str]]) -> Iterable[tuple[int, str]]:
        """The numbered lines, with each that goes on in the next one whole."""
        return lines

    def read(self, line: str) -> Optional[Line]:
        """The alias as it is written; None where the line has none. Raises ValueError with the reason."""
        raise NotImplementedError

    def write(self, row: Row) -> str:
        """The line of an alias, with its end; raises ValueError with the reason why this format cannot hold it."""
        raise NotImplementedError


class Echo:
    """A file for csv.writer whose writerow() returns what it writes."""

    @staticmethod
    def write(text: str) -> str:
        """The text."""
        return text


_ODD_NAME = re.compile(r"[;<>]|^\s|\s$|^$")


class Csv(Format):
    """Comma-separated values as Python's csv reads and writes them (RFC 4180), each alias on a line."""

    head = "alias,username,enabled\n"
    # each name that a column may have, with its place in what read() returns
    columns: ClassVar[dict[str, int]] = {"alias": 0, "alias_email": 0, "address": 0, "username": 1, "enabled": 2, "receive_only": 3}
    takes_other_columns = False

    def __init__(self, usernames: str) -> None:
        super().__init__(usernames)
        self._order: Optional[list[Optional[int]]] = None  # what stands in each column; None until the first line is read
        self._least = 2  # so many columns must be there
        self._writer: Any = csv.writer(cast(Any, Echo()), lineterminator="\n")
        self._width = 3  # columns that are written

    def prepare(self, *, receive_only: bool) -> None:
        if receive_only and self.head.endswith(",enabled\n"):
            self.head, self._width = self.head[:-1] + ",receive_only\n", 4

    def read(self, line: str) -> Optional[Line]:
        if not line.strip():
            return None
        try:
            fields = line.split(",") if '"' not in line else next(csv.reader([line], strict=True))
        except csv.Error as exc:
            raise ValueError(f"it is not CSV: {exc}") from None
        if self._order is None:
            self._order = self._read_header(fields)
            if "@" not in line:
                return None
        if not self._least <= len(fields) <= len(self._order):
            expected = " or ".join(map(str, range(self._least, len(self._order) + 1)))
            raise ValueError(
                f"it has {common.counted(fields, 'field')}, expected {expected}; several users are separated by semicolons"
            )
        found = ["", "", "1", ""]
        for place, field in zip(self._order, fields):
            if place is not None:
                found[place] = field.strip()
        users, external = self._read_targets(found[1], found[0])
        return Line(found[0], users, external, read_enabled(found[2]), read_enabled(found[3]) if found[3] else None)

    def _read_header(self, fields: list[str]) -> list[Optional[int]]:
        if any("@" in field for field in fields):
            return [0, 1, 2]
        names = [field.strip().lower() for field in fields]
        order = [self.columns.get(name) for name in names]
        found = [place for place in order if place is not None]
        unknown = [name for name, place in zip(names, order) if place is None and not self.takes_other_columns]
        if not {0, 1} <= set(found) or len(set(found)) != len(found) or unknown:
            raise Unreadable(f"its first line names the columns {','.join(names)!r}, expected {self.head.strip()}")
        self._least = len(order)
        return order

    def _read_targets(self, text: str, address: str) -> tuple[list[str], list[str]]:
        return read_names(text)

    def write(self, row: Row) -> str:
        users, external = split_targets(row[1])
        names = ";".join([*users, *[f"<{address}>" for address in external]])
        if (external or len(users) > 1 or _ODD_NAME.search(names)) and read_names(names) != (users, external):
            raise ValueError(f"its targets {names!r} cannot stand there")
        return str(self._writer.writerow((row[0], names, row[2], row[3])[: self._width]))


class PostfixAdmin(Csv):
    """What PostfixAdmin's list of aliases gives as CSV: its columns by their names or, in English, as they are shown."""

    head, holds_all = "address,goto,active\n", False
    columns: ClassVar[dict[str, int]] = {"address": 0, "alias": 0, "goto": 1, "to": 1, "active": 2}
    takes_other_columns = True

    def _read_targets(self, text: str, address: str) -> tuple[list[str], list[str]]:
        return read_mailboxes(text, address, self.usernames)

    def write(self, row: Row) -> str:
        return str(self._writer.writerow((row[0], write_mailboxes(row, self.usernames), row[2])))


class JsonLines(Format):
    """An object of JSON on each line."""

    def read(self, line: str) -> Optional[Line]:
        if not line.strip():
            return None
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError("it is not JSON") from None
        if not isinstance(value, dict):
            raise ValueError("it is not an object of JSON")
        other = value.keys() - {"alias", "username", "users", "external", "enabled", "receive_only"}
        if other:
            raise ValueError(f"it has {sorted(other)[0]!r}, expected alias, users, external, enabled and receive_only")
        address: Any = value.get("alias")
        users, external = value.get("users", []), value.get("external", [])
        if "username" in value:
            users = [value["username"]] if "users" not in value else None
        if not all(isinstance(each, list) and all(isinstance(name, str) for name in each) for each in (users, external, [address])):
            raise ValueError("alias must be a text, and there must be a username, or users and external as lists of texts")
        enabled, receive_only = value.get("enabled", True), value.get("receive_only")
        if enabled not in (0, 1) or receive_only not in (0, 1, None):
            raise ValueError("enabled and receive_only must be true or false")
        return Line(address, users, external, int(enabled), receive_only if receive_only is None else int(receive_only))

    def write(self, row: Row) -> str:
        users, external = split_targets(row[1])
        value: dict[str, Any] = {
            "alias": row[0],
            **({"username": users[0]} if len(users) == 1 else {"users": users} if users else {}),
        }
        value |= {**({"external": external} if external else {}), "enabled": bool(row[2])}
        return json.dumps({**value, **({"receive_only": True} if row[3] else {})}) + "\n"


class Virtual(Format):
    """The text of a virtual alias table. Source: virtual(5), TABLE FORMAT."""

    holds_all = False

    def join(self, lines: Iterable[tuple[int, str]]) -> Iterable[tuple[int, str]]:
        number, whole = 0, ""
        for each, line in lines:
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            if whole and line[0].isspace():
                whole += line
                if len(whole) > MAX_LINE_BYTES:
                    raise Unreadable(f"line {number} goes on for more than {MAX_LINE_BYTES} characters")
                continue
            if whole:
                yield number, whole
            number, whole = each, line
        if whole:
            yield number, whole

    def read(self, line: str) -> Optional[Line]:
        if not line.strip() or line.lstrip().startswith("#"):
            return None
        address, _, target = line.strip().replace("\t", " ").partition(" ")
        users, external = read_mailboxes(target, address, self.usernames)
        return Line(address, users, external)

    def write(self, row: Row) -> str:
        if not row[2]:
            raise ValueError("it is disabled, and this format has no disabled aliases")
        line = f"{row[0]} {write_mailboxes(row, self.usernames)}"
        if self.read(line) != Line(row[0], *split_targets(row[1])):
            raise ValueError("it would be read as something else")
        return line + "\n"


FORMATS: dict[str, type[Format]] = {"csv": Csv, "jsonl": JsonLines, "virtual": Virtual, "postfixadmin": PostfixAdmin}


def find_format(name: Optional[str], path: str, usernames: str) -> Format:
    """The format that --format names, or the end of the file's name; CSV on standard input and output. Raises Refused."""
    if not name:
        name = "csv" if path == "-" else os.path.splitext(path)[1][1:]
        if name not in FORMATS:
            raise common.Refused(
                f"aliases: the name {path!r} does not say which format this is, name it with --format {'|'.join(FORMATS)}"
            )
    return FORMATS[name](usernames)


# ---------------------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------------------


def watch(items: Iterable[Item], what: str, share: Callable[[], float] = lambda: 0.0) -> Iterator[Item]:
    """The items; on a terminal, how many there were and what share (0 to 1, 0 is unknown) that is, once it takes a while."""
    began = next_time = time.monotonic() + PROGRESS_SECONDS
    began -= PROGRESS_SECONDS
    for count, item in enumerate(items, 1):
        if not count % PROGRESS_ITEMS and time.monotonic() > next_time:
            seconds, done = time.monotonic() - began, share()
            left = f", {common.shown_seconds(seconds / done * (1 - done))} left" if done else ""
            common.show_progress(f"aliases: {what}: {count:,}, {count / seconds:,.0f} a second{left}")
            next_time += PROGRESS_SECONDS / 2
        yield item
    common.show_progress("")


class Source:
    """A file of aliases that is read once, line by line, "-" for standard input. Raises Refused where it is not whole."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = "standard input" if path == "-" else path
        self._bytes = self._size = 0

    def lines(self) -> Iterator[tuple[int, str]]:
        """Each line with its number, without its end."""
        try:
            with contextlib.ExitStack() as stack:
                file = sys.stdin.buffer if self.path == "-" else stack.enter_context(open(self.path, "rb"))
                before = self._state(os.fstat(file.fileno()))
                self._size = before[2]
                yield from self._decode(file)
                is_same = self.path == "-" or before == self._state(os.fstat(file.fileno())) == self._state(os.stat(self.path))
        except OSError as exc:
            raise self.refuse(f"it cannot be read: {exc.strerror}") from exc
        if not is_same:
            raise self.refuse("it has changed while it was read, try again when it is whole")

    def share(self) -> float:
        """How much of the file has been read, from 0 to 1; 0 where its size is not known."""
        return self._bytes / self._size if self._size else 0.0

    def refuse(self, text: str) -> common.Refused:
        """The error for the whole file."""
        return common.Refused(f"aliases: {self.name}: {text}; nothing was changed")

    @staticmethod
    def _state(status: os.stat_result) -> tuple[int, ...]:
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def _decode(self, file: IO[bytes]) -> Iterator[tuple[int, str]]:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
            self._bytes += len(raw)
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise self.refuse(f"line {number} is not UTF-8, save the file as UTF-8") from None
            if not line.endswith("\n"):
                long = f"line {number} is longer than {MAX_LINE_BYTES} bytes"
                cut = f"its last line, {number}, has no end: it may have been cut"
                raise self.refuse(long if len(raw) == MAX_LINE_BYTES else cut)
            yield number, line.rstrip("\r\n")


class Problems:
    """Bad lines: each is said at once, and counted."""

    def __init__(self, name: str, unit: str = "line") -> None:
        self.name, self.unit, self.count = name, unit, 0

    def report(self, number: int, reason: str) -> None:
        """Say what is wrong with a line."""
        common.show_progress("")
        common.say(f"aliases: {self.name}: {self.unit} {number}: {reason}")
        self.count += 1

    def stop(self, *, skip: bool) -> None:
        """Raise Refused if there were any, and they may not be left out."""
        if self.count and not skip:
            raise common.Refused(
                f"aliases: {self.name}: {common.counted(self.count, f'{self.unit} is', f'{self.unit}s are')} bad, nothing was changed; correct them, or leave them out with --skip-bad"
            )


def read_aliases(
    lines: Iterable[tuple[int, str]],
    form: Format,
    check: Callable[[Line], tuple[str, str]],
    report: Callable[[int, str], None],
) -> Iterator[tuple[str, str, int, Optional[int], int]]:
    """What take_once() takes of each alias. check: makes address and targets of the form in which they are stored, or raises Refused.

    A bad line is reported, and left out.
    """
    for number, text in form.join(lines):
        try:
            line = form.read(text)
            if line:
                yield (*check(line), line[3], line[4], number)
        except Unreadable:
            raise
        except (ValueError, common.Refused) as exc:
            report(number, str(exc).removeprefix("aliases: "))


@contextlib.contextmanager
def replacing(path: str, mode: int, *, replace: bool = True) -> Iterator[IO[bytes]]:
    """A new file beside path, open, that takes its place at the end: a reader sees all of the old or all of the new.

    Raises OSError; FileExistsError where there is a file already and it may not be replaced.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "it is not a regular file")
    descriptor, new = tempfile.mkstemp(dir=os.path.dirname(os.path.abspath(path)), prefix=".mailcloak-")
    try:
        os.fchmod(descriptor, mode)
        with open(descriptor, "wb", closefd=False) as file:  # not by its name, which might lead elsewhere by now
            yield file
        os.fsync(descriptor)
        (os.rename if replace else os.link)(new, path)
    finally:
        os.close(descriptor)
        with contextlib.suppress(FileNotFoundError):  # it has been renamed
            os.unlink(new)


# ---------------------------------------------------------------------------------------------------------------------------------
# Comparing
# What was read, and what is to change, wait in a database of their own in a temporary file, which nobody else can see: a million
# aliases need little memory, and the mail host's database is locked for the shortest time.
# ---------------------------------------------------------------------------------------------------------------------------------

STAGING = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA cache_size = -{kib};
CREATE TABLE wanted (address TEXT, targets TEXT, enabled INTEGER, receive_only INTEGER, line INTEGER);
CREATE TABLE changes (address TEXT, old_targets TEXT, old_enabled INTEGER, old_receive_only INTEGER, old_source TEXT,
    targets TEXT, enabled INTEGER, receive_only INTEGER, source TEXT);
CREATE TABLE stored (address TEXT, targets TEXT, enabled INTEGER, receive_only INTEGER, source TEXT);
CREATE TABLE lines (line TEXT);
BEGIN;
"""
# of one domain, or with "" of all
STORED = "FROM aliases WHERE typeof(alias_email) = 'text' AND (:domain = '' OR substr(alias_email, instr(alias_email, '@') + 1) = :domain)"
# Rows; the function sorts the targets where there are several
SELECT_STORED = (
    f"SELECT alias_email, CASE WHEN external <> 1 AND NOT EXISTS (SELECT 1 FROM alias_targets AS t WHERE t.alias_email ="  # noqa: S608
    f" aliases.alias_email) THEN '0' || replace(username, char(10), '?') ELSE sort_targets({mailcloak.ALIAS_TARGETS}) END, enabled,"
    f" receive_only, CASE WHEN :source = '' THEN '' ELSE COALESCE(source, '') END {STORED} ORDER BY alias_email"
)


def open_staging() -> sqlite3.Connection:
    """An empty database in a temporary file, gone when it is closed. Its one transaction is never committed."""
    staging = sqlite3.connect("", isolation_level=None)
    staging.executescript(STAGING.format(kib=STAGING_CACHE_KIB))
    return staging


def rows_of(database: sqlite3.Connection, select: str, **values: str) -> Iterator[Any]:
    """Plain tuples, one after the other."""
    cursor = database.cursor()
    cursor.row_factory = None
    return cursor.execute(select, values)


def stored_rows(database: sqlite3.Connection, domain: str = "", source: str = "") -> Iterator[Any]:
    """A Row of each alias of the domain ("": of all), sorted by address; whose they are counts only where a source is named."""
    database.create_function("sort_targets", 1, lambda targets: join_targets(*split_targets(targets)), deterministic=True)
    return rows_of(database, SELECT_STORED, domain=domain, source=source)


@contextlib.contextmanager
def reading(database: sqlite3.Connection) -> Iterator[None]:
    """One state of the database, whatever others do meanwhile.

    With the lock of a writer where this user may have it: another writer that waited for a mere reader would keep new readers, such
    as the daemon, waiting as well.
    """
    try:
        common.patiently(lambda: database.execute("BEGIN IMMEDIATE"))
    except sqlite3.OperationalError as exc:
        if mailcloak.sqlite_fault(exc) != "readonly":
            raise
        database.execute("BEGIN")
    try:
        yield
    finally:
        if database.in_transaction:
            database.execute("ROLLBACK")


def find_database(context: common.Context) -> sqlite3.Connection:
    """The database; for a dry run where there is none yet, an empty one in memory."""
    if context.options.dry_run and not os.path.lexists(context.path):
        context.database = sqlite3.connect(":memory:", isolation_level=None)
        context.database.row_factory = sqlite3.Row
        context.database.executescript(mailcloak.SCHEMA)
    return context.database


def data_version(database: sqlite3.Connection) -> int:
    """A number that changes with each commit of another connection. Source: SQLite, PRAGMA data_version."""
    return int(database.execute("PRAGMA data_version").fetchone()[0])


def check_names(context: common.Context, line: Line) -> tuple[str, str]:
    """Address and targets as they may be stored, by the rules of aliases add; raises Refused."""
    address = common.read_address(line.address)
    common.refuse_catch_all(address)
    if len(line.users) == 1 and not line.external:  # as nearly all have it
        username = common.read_username(line.users[0])
        common.refuse_names(context, username)
        return address, f"0{username}"
    users = [common.read_username(user) for user in line.users]
    external = [common.read_external(context, target) for target in line.external]
    if not users and not external:
        raise common.Refused(f"{address} has no target")
    for user in users:
        common.refuse_names(context, user)
    common.refuse_number(context, address, mailcloak.Alias(tuple(users), True, tuple(external)))
    return address, join_targets(users, external)


def load(staging: sqlite3.Connection, context: common.Context, source: Source, form: Format, problems: Problems) -> int:
    """Read the file into the table wanted; how many aliases it has. Raises Refused where it is not whole."""
    foreign: collections.Counter[str] = collections.Counter()
    policy, options = context.policy, context.options

    def check(line: Line) -> tuple[str, str]:
        address, targets = check_names(context, line)
        domain = address.rpartition("@")[2]
        if options.scope and domain != options.scope:
            raise common.Refused(f"{address} is not in {options.scope}, the domain of --scope")
        if line.external and not options.external:
            raise common.Refused(f"its target {line.external[0]!r} is elsewhere, and is taken only with --external")
        if policy and domain not in policy.domain:
            foreign[domain] += 1
        return address, targets

    lines = watch(source.lines(), "lines read", source.share)
    try:
        staging.executemany("INSERT INTO wanted VALUES (?, ?, ?, ?, ?)", read_aliases(lines, form, check, problems.report))
    except Unreadable as exc:
        raise source.refuse(str(exc)) from None
    for domain, count in foreign.most_common(common.SHOWN_ITEMS):
        common.say(
            f"warning: {common.counted(count, 'alias', 'aliases')} in {domain}, which is not in policy.domain: such an alias leads nowhere"
        )
    return int(staging.execute("SELECT count(*) FROM wanted").fetchone()[0])


def compare(
    staging: sqlite3.Connection,
    database: sqlite3.Connection,
    problems: Problems,
    missing: str,
    *,
    domain: str = "",
    source: str = "",
) -> tuple[dict[str, int], int]:
    """Fill the table changes. How many changes there are of each kind, and of how many stored aliases: those of the domain and, where a
    source is named, that it owns or will own.
    """
    counts: collections.Counter[str] = collections.Counter()
    stored = 0

    def counted(changes: Iterator[Change]) -> Iterator[Change]:
        nonlocal stored
        for change in changes:
            counts[change.kind] += 1
            stored += change.old_source not in (None, source)
            yield change

    wanted = rows_of(staging, "SELECT address, targets, enabled, receive_only, line FROM wanted ORDER BY address, line")
    with reading(database):
        own = f"SELECT count(*) {STORED} AND (:source = '' OR source = :source)"
        stored += int(database.execute(own, {"domain": domain, "source": source}).fetchone()[0])
        rows = watch(stored_rows(database, domain, source), "compared", lambda: 0.0)
        changes = counted(plan(rows, take_once(wanted, problems.report, source), missing, source))
        staging.executemany("INSERT INTO changes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", changes)
    return dict(counts), stored


def read_changes(staging: sqlite3.Connection) -> Iterator[Change]:
    """The table changes, sorted by address."""
    return map(Change._make, rows_of(staging, "SELECT * FROM changes ORDER BY rowid"))


def apply(database: sqlite3.Connection, changes: Iterable[Change]) -> None:
    """Make the changes, in the transaction that is open."""
    changes = iter(changes)
    while batch := list(itertools.islice(changes, BATCH_ROWS)):
        database.executemany("DELETE FROM aliases WHERE alias_email = ?", [(each[0],) for each in batch if each[5] is None])
        stored = [
            common.Stored(each.address, mailcloak.read_alias(each.targets, each.enabled, each.receive_only), each.source or None)
            for each in batch
            if each.targets is not None
        ]
        common.store_aliases(database, stored)


def prepare_commit(database: sqlite3.Connection) -> None:
    """Have the disk take the rollback journal now: at the commit SQLite waits for that while it keeps all readers out.

    Source: SQLite, "Atomic Commit In SQLite", section 3.7.
    """
    path = next(row[2] for row in database.execute("PRAGMA database_list") if row[1] == "main")
    with contextlib.suppress(OSError):  # in WAL mode and in memory there is none
        descriptor = os.open(f"{path}-journal", os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------------------
# The verbs of aliases
# ---------------------------------------------------------------------------------------------------------------------------------


class DryRun(Exception):
    """All was tried, and is to be taken back."""


def import_or_sync(context: common.Context) -> None:
    """Read, compare, check, write, tell. Raises Refused, OverLimit; then nothing was changed."""
    options = context.options
    options.scope = common.read_domain(options.scope) if options.scope else ""
    options.source = options.source or ""
    percent = read_share(options.max_change)
    form, source = find_format(options.format, options.file, options.usernames), Source(options.file)
    problems = Problems(source.name)
    with contextlib.closing(open_staging()) as staging:
        wanted = load(staging, context, source, form, problems)
        problems.stop(skip=options.skip_bad)
        database = find_database(context)
        version = data_version(database)
        counts, stored = compare(staging, database, problems, options.missing, domain=options.scope, source=options.source)
        problems.stop(skip=options.skip_bad)
        if is_over_limit(counts, stored, wanted, percent):
            if options.dry_run:
                tell(context, staging, counts, stored, problems.count)
            raise over_limit(options, counts, stored)
        elsewhere = (
            [change for change in read_changes(staging) if change.leads_elsewhere] if sum(counts.values()) <= MAX_ASKED else None
        )
        ask_about(context, elsewhere)
        if counts:
            with contextlib.suppress(DryRun):
                write(context, staging, version, elsewhere)
        tell(context, staging, counts, stored, problems.count)


def read_share(text: str) -> float:
    """The percentage of --max-change; raises Refused."""
    found = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]+)?)%?", text, re.ASCII)
    if not found or float(found[1]) > 100:
        raise common.Refused(f"aliases: --max-change {text}: expected a share such as 20%, at most 100%")
    return float(found[1])


def over_limit(options: Any, counts: dict[str, int], stored: int) -> common.OverLimit:
    """What the limit stopped, and how to let it pass."""
    touched = ", ".join(f"{counts[kind]} would be {KINDS[kind]}" for kind in KINDS if counts.get(kind) and kind != "add")
    return common.OverLimit(
        f"aliases: {options.verb}: of {stored} aliases {touched}: more than --max-change {options.max_change}, nothing was changed;"
        " look with --dry-run -v, and if this is right, allow it with --max-change 100%"
    )


def ask_about(context: common.Context, elsewhere: Optional[list[Change]]) -> None:
    """Look up in Keycloak the aliases that are new or lead elsewhere; None: too many of them. Raises Refused as aliases add does."""
    if elsewhere is None:
        common.say(
            f"warning: more than {MAX_ASKED} changes: the daemon was not asked about them, and aliases of aliases were not looked for;"
            " mailcloakctl doctor does both for all aliases"
        )
        return
    changes = [(change.address, change.old, cast(mailcloak.Alias, change.new)) for change in elsewhere]
    common.check_with_keycloak(context, common.counted(changes, "alias was", "aliases were"), changes)


def write(
    context: common.Context,
    staging: sqlite3.Connection,
    version: int,
    elsewhere: Optional[list[Change]],
    write_others: Callable[[], object] = lambda: None,
) -> None:
    """Make the changes in one transaction, with others that belong to them. Raises DryRun where this is one; Refused where the database is not what was compared."""
    database, options = context.database, context.options
    # what does not fit the cache would be written before the commit, with all readers locked out
    database.execute("PRAGMA cache_spill = OFF")
    with common.transaction(database):
        if data_version(database) != version:
            raise common.Refused("aliases: another program has changed the database meanwhile; nothing was changed, try again")
        if not options.dry_run or elsewhere is not None:
            apply(database, watch(read_changes(staging), "changes made"))
            write_others()
        for change in elsewhere or () if not options.force else ():
            for target in change.new_targets:
                common.refuse_chain(context, change.address, target)
        if options.dry_run:
            raise DryRun
        prepare_commit(database)


def tell(context: common.Context, staging: sqlite3.Connection, counts: dict[str, int], stored: int, skipped: int) -> None:
    """Print what was changed, or would be; note it in syslog where it was."""
    options = context.options
    warn_of_other_owners(staging, dry_run=options.dry_run)
    show = functools.partial(report, options, staging, counts, stored, skipped)
    if not counts or options.dry_run:
        show()
        return
    note(f"aliases: {options.verb}", read_changes(staging), options.file, counts)
    common.print_done(show)


def report(options: Any, staging: sqlite3.Connection, counts: dict[str, int], stored: int, skipped: int) -> None:
    """Print the summary of an import or a sync, with each change if that is wanted."""
    numbers = {word: counts.get(kind, 0) for kind, word in KINDS.items()}
    unchanged = stored - sum(counts.values()) + counts.get("add", 0)
    if options.json:
        changed = bool(counts) and not options.dry_run
        head = {"changed": changed, "dry_run": options.dry_run, "counts": {**numbers, "unchanged": unchanged, "skipped": skipped}}
        print_as_json(head, read_changes(staging))
        return
    if options.verbose:
        for change in read_changes(staging):
            print(common.shown_text(describe(change)))
    would = "would be " if options.dry_run else ""
    parts = [f"{number} {would}{word}" for word, number in numbers.items() if number]
    skipped_part = [f"{common.counted(skipped, 'bad line')} left out"] if skipped else []
    print(f"aliases: {', '.join([*(parts or ['nothing to change']), f'{unchanged} unchanged', *skipped_part])}")


def warn_of_other_owners(staging: sqlite3.Connection, *, dry_run: bool) -> None:
    """Say which aliases another job had, or somebody made by hand for others.

    Where the files of two jobs name one, each takes it from the other, night after night. One that was made by hand is deleted when the
    job's file does not name it any more.
    """
    would = "would be" if dry_run else "were"
    taken = "FROM changes WHERE targets IS NOT NULL AND coalesce(old_source, '') <> '' AND coalesce(source, '') <> old_source"
    rows = staging.execute(f"SELECT address, old_source {taken} ORDER BY address").fetchmany(1000)
    if rows:
        names = common.shorten([f"{address} ({source})" for address, source in rows])
        common.say(f"warning: {would} taken from another job: {names}; let one file alone name them")
    taken = "FROM changes WHERE old_targets <> targets AND coalesce(old_source, '') = '' AND coalesce(source, '') <> ''"
    rows = staging.execute(f"SELECT address {taken} ORDER BY address").fetchmany(1000)
    if rows:
        names = common.shorten([address for (address,) in rows])
        common.say(f"warning: were made by hand, and {would} changed and taken over by this job: {names}")


def describe(change: Change) -> str:
    """One change in words."""
    before, after = change.old, change.new
    was, words = before or mailcloak.Alias((), True), []  # a new one is enabled unless something else is said
    if after and after.enabled != was.enabled and change.kind not in ("enable", "disable"):
        words.append("enabled" if after.enabled else "disabled")
    if after and after.receive_only != was.receive_only:
        words.append("only receives" if after.receive_only else "may send")
    if before and after and change.source != change.old_source:
        words.append(f"taken from {change.old_source or 'no job'}")
    targets = list(dict.fromkeys(common.shown_targets(alias) for alias in (before, after) if alias))
    shown = " -> ".join(targets if change.kind == "change" else targets[-1:])
    return ", ".join([f"{change.kind} {change.address} {shown}", *words])


def print_as_json(head: dict[str, Any], changes: Iterable[Change]) -> None:
    """One object: the head, and "changes" with the old and the new value of each; one after the other, since they may be a million."""

    def shown(alias: Optional[mailcloak.Alias], source: Optional[str]) -> Optional[dict[str, Any]]:
        if alias is None:
            return None
        state = {"enabled": int(alias.enabled), "receive_only": alias.receive_only, "source": source or None}
        return {"username": common.shown_targets(alias), **state}

    print(json.dumps(head)[:-1] + ', "changes": [', end="")
    separator = "\n  "
    for change in changes:
        old, new = shown(change.old, change.old_source), shown(change.new, change.source)
        print(separator + json.dumps({"alias": change.address, "old": old, "new": new}), end="")
        separator = ",\n  "
    print("]}")


def note(event: str, changes: Iterable[Change], subject: str, counts: dict[str, int]) -> None:
    """A line in syslog for each of the first changes, and one for all of them."""
    for change in itertools.islice(changes, MAX_ASKED):
        before, after = change.old, change.new
        values = {
            "username": common.shown_targets(after) if after else None,
            "before": common.shown_targets(before) if before else None,
            "source": change.source or None,
        }
        if after and after.enabled != (before.enabled if before else True):
            values["enabled"] = "yes" if after.enabled else "no"
        common.note_change(f"{event}: {change.kind}", change.address, **values)
    common.note_change(event, subject, **{KINDS[kind]: number for kind, number in counts.items()})


def aliases_move(context: common.Context) -> None:
    """Let all aliases of a user lead to another."""
    options, database = context.options, context.database
    old, new = common.read_username(options.old_user), common.read_username(options.new_user)
    select = f"SELECT DISTINCT alias_email FROM {common.ALIAS_USERS} WHERE lower(username) = ? ORDER BY alias_email"  # noqa: S608

    def find() -> list[Change]:
        changes = []
        for (address,) in database.execute(select, (old,)).fetchall() if old != new else ():
            alias = common.find_alias(database, address)
            if alias is None or not isinstance(address, str):  # nobody looks it up: db check finds it
                continue
            users = [new if user == old else user for user in alias.users]
            state = (int(alias.enabled), int(alias.receive_only), "")
            before, after = join_targets(alias.users, alias.external), join_targets(users, alias.external)
            changes.append(Change(address, before, *state, after, *state))
        return changes

    changes = common.patiently(find)
    if not changes:
        raise common.Refused(f"aliases: no alias leads to {old}, aliases list shows who has any")
    common.refuse_names(context, new)
    asked = changes if len(changes) <= MAX_ASKED else None
    ask_about(context, asked)
    with common.transaction(database):
        if find() != changes:
            raise common.Refused("aliases: another program has changed them meanwhile; nothing was changed, try again")
        apply(database, changes)
        for change in asked or () if not options.force else ():
            common.refuse_chain(context, change.address, new)
    note("aliases: move", changes, old, {"change": len(changes)})
    addresses = [change.address for change in changes]
    lead = common.counted(changes, "alias now leads", "aliases now lead")
    common.answer(context, addresses, f"aliases: {lead} to {new}: {common.shorten(addresses)}", username=new, before=old)


def aliases_export(context: common.Context) -> None:
    """Write all aliases to a file, or to standard output."""
    options = context.options
    form = find_format(options.format, options.file, options.usernames)
    database = context.database
    with contextlib.closing(open_staging()) as staging:
        with reading(database):  # and not longer: who reads our output may be slow
            staging.executemany("INSERT INTO stored VALUES (?, ?, ?, ?, ?)", stored_rows(database))
        rows = watch(rows_of(staging, "SELECT * FROM stored ORDER BY rowid"), "written")
        form.prepare(receive_only=bool(staging.execute("SELECT 1 FROM stored WHERE receive_only LIMIT 1").fetchone()))
        is_odd = staging.execute("SELECT 1 FROM stored WHERE targets GLOB '*[ ;<>]*' OR targets = '0' LIMIT 1").fetchone()
        lines = map(form.write, rows) if form.holds_all and not is_odd else hold(staging, form, rows, skip=options.skip_bad)
        lines = itertools.chain([form.head], lines)
        if options.file == "-":
            write_lines(lines, sys.stdout.buffer)
            return
        umask = os.umask(0)
        os.umask(umask)
        try:
            with replacing(options.file, 0o666 & ~umask) as file:
                write_lines(lines, file)
        except OSError as exc:
            raise common.Refused(f"aliases: {options.file!r} cannot be written: {exc.strerror}; what was there stays") from exc


def hold(staging: sqlite3.Connection, form: Format, rows: Iterable[Row], *, skip: bool) -> Iterator[str]:
    """The lines of a format that may not hold all aliases, all of them made before the first is given.

    Which it cannot hold is said; raises Refused where there are any, unless they may be left out.
    """
    left_out = 0

    def lines() -> Iterator[tuple[str]]:
        nonlocal left_out
        for row in rows:
            try:
                yield (form.write(row),)
            except ValueError as exc:
                common.say(f"aliases: {row[0]} cannot be in this file: {exc}")
                left_out += 1

    staging.executemany("INSERT INTO lines VALUES (?)", lines())
    if left_out and not skip:
        raise common.Refused(
            f"aliases: {left_out} cannot be in this file, nothing was written; use another --format, or leave them out with --skip-bad"
        )
    return (line for (line,) in rows_of(staging, "SELECT line FROM lines ORDER BY rowid"))


def write_lines(lines: Iterator[str], file: IO[bytes]) -> None:
    """Write the lines as UTF-8, many at a time."""
    while batch := list(itertools.islice(lines, BATCH_ROWS)):
        file.write("".join(batch).encode())
    file.flush()


# ---------------------------------------------------------------------------------------------------------------------------------
# Tables that are made equal to those of another file, which is attached as a schema of its own
# Tables and columns are those of mailcloak.SCHEMA, whatever else is in a file: Litestream has tables of its own in shared.db.
# ---------------------------------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """A table of the schema."""

    name: str
    columns: list[str]
    keys: list[str]  # the columns of its primary key


@functools.cache
def read_tables() -> tuple[Table, ...]:
    """All tables of the schema, a parent before its child."""
    with contextlib.closing(sqlite3.connect(":memory:")) as model:
        model.executescript(mailcloak.SCHEMA)
        names = [row[0] for row in model.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY rowid")]
        infos = {name: model.execute(f"PRAGMA table_info({name})").fetchall() for name in names}
    return tuple(Table(name, [row[1] for row in info], [row[1] for row in info if row[5]]) for name, info in infos.items())


def same_key(table: Table) -> str:
    """Have the row "theirs" of the other file and our row "ours" the same key? As SQL."""
    return " AND ".join(f"theirs.{key} = ours.{key}" for key in table.keys)


def has_key(table: Table) -> str:
    """Has the row a key? As SQL; a table of another program may have rows without."""
    return " AND ".join(f"{key} IS NOT NULL" for key in table.keys)


def lacks(table: Table, schema: str) -> str:
    """Has the other file no row with the key of our row "ours"? As SQL."""
    return f"NOT EXISTS (SELECT 1 FROM {schema}.{table.name} AS theirs WHERE {same_key(table)})"  # noqa: S608


def delete_rows(database: sqlite3.Connection, table: Table, schema: str) -> int:
    """Delete the rows whose key the other file does not have; how many these were."""
    return database.execute(f"DELETE FROM main.{table.name} AS ours WHERE {lacks(table, schema)}").rowcount  # noqa: S608


def copy_rows(database: sqlite3.Connection, table: Table, rows: str) -> int:
    """Write the rows that are new or differ; how many these were. rows: those of the other file, as a SELECT of all columns."""
    name, columns, keys = table
    others = [column for column in columns if column not in keys]
    differs = " OR ".join([f"ours.{keys[0]} IS NULL", *(f"ours.{column} IS NOT theirs.{column}" for column in others)])
    update = f"UPDATE SET {', '.join(f'{column} = excluded.{column}' for column in others)}" if others else "NOTHING"
    return database.execute(
        f"INSERT INTO main.{name} ({', '.join(columns)}) SELECT {', '.join(f'theirs.{column}' for column in columns)}"  # noqa: S608
        f" FROM ({rows}) AS theirs LEFT JOIN main.{name} AS ours ON {same_key(table)} WHERE {differs}"
        f" ON CONFLICT ({', '.join(keys)}) DO {update}"
    ).rowcount


# ---------------------------------------------------------------------------------------------------------------------------------
# Backups
# ---------------------------------------------------------------------------------------------------------------------------------

BACKUP_PAGES = 5000  # copied at a time; between two of these steps others may write
NAMED = ("aliases", "apps")  # the tables whose rows are told
PARENTS = {"alias_targets": "aliases", "app_from": "apps"}  # by the first column of the key


def tell_numbers(
    context: common.Context, database: sqlite3.Connection, text: str, numbers: Optional[dict[str, int]] = None, **values: Any
) -> None:
    """Print what was done, and how many aliases and apps there are now, or those numbers."""
    numbers = numbers or count_names(database)

    def show() -> None:
        if context.options.json:
            common.print_json({**values, **numbers})
        else:
            aliases, apps = common.counted(numbers["aliases"], "alias", "aliases"), common.counted(numbers["apps"], "app")
            print(f"{context.options.noun}: {text}: {aliases}, {apps}")

    common.print_done(show)


def check_whole(database: sqlite3.Connection, name: str) -> None:
    """Raise Refused where SQLite finds the file damaged."""
    found = [str(row[0]) for row in database.execute("PRAGMA quick_check(1)")]
    if found != ["ok"]:
        raise common.Refused(f"{name} is damaged: {found[0]}", "mailcloakctl db check says more; use another backup")


def backup(context: common.Context) -> None:
    """Copy the database to a new file."""
    options, database = context.options, context.database
    path = os.path.abspath(options.file)
    if os.path.isdir(path):
        raise common.Refused(f"backup: {path!r} is a directory, name a file in it")
    if os.path.lexists(path) and not options.replace:
        raise common.Refused(f"backup: {path!r} is there already, --replace replaces it")
    if os.path.exists(path) and os.path.samefile(path, context.path):
        raise common.Refused(f"backup: {path!r} is the database itself, name another file")
    try:
        with replacing(path, 0o600, replace=options.replace) as file, tempfile.TemporaryDirectory(prefix="mailcloak-") as private:
            new = os.path.join(private, "copy.db")  # SQLite opens nothing where others could put a journal beside it
            with contextlib.closing(sqlite3.connect(new)) as copy:
                copy.execute("PRAGMA journal_mode = OFF")  # nobody else sees it yet
                try:
                    database.backup(copy, pages=BACKUP_PAGES)
                except sqlite3.OperationalError as exc:
                    if mailcloak.sqlite_fault(exc) == "full":
                        raise common.Refused(
                            f"backup: no room for the copy in {private}", "make room there, or set TMPDIR"
                        ) from exc
                    raise
                copy.execute("PRAGMA journal_mode = DELETE")  # also where the database is in WAL mode: one file has all of it
                check_whole(copy, "backup: the copy")
            with open(new, "rb") as whole:
                shutil.copyfileobj(whole, file)
    except FileExistsError:
        raise common.Refused(f"backup: {path!r} is there now, --replace replaces it") from None
    except OSError as exc:
        raise common.Refused(f"backup: {path!r} cannot be written: {exc.strerror}; what was there stays") from exc
    tell_numbers(context, database, f"{path} written", file=path)


def restore(context: common.Context) -> None:
    """Make the database what a backup says."""
    path = os.path.abspath(context.options.file)
    check_backup(path)
    target = context.path
    if os.path.exists(target) and os.path.samefile(path, target):
        raise common.Refused(f"restore: {path!r} is the database itself, name a backup")
    if not os.path.isdir(os.path.dirname(os.path.realpath(target))) or (os.path.islink(target) and not os.path.exists(target)):
        raise common.Refused(f"restore: {target!r} cannot be made: its directory, or what it leads to, is missing")
    try:
        if not os.path.lexists(target) and context.options.dry_run:
            common.say(f"restore: {target} would be made from {path}")
        elif not os.path.lexists(target):
            restore_new(context, path)
        elif os.stat(target).st_size == 0:  # SQLite takes it for a database without tables
            with contextlib.closing(mailcloakowner.connect(target, common.INTERRUPT_SECONDS)) as database:
                restore_into(context, database, path)
        else:
            restore_into(context, context.database, path)
    except mailcloak.SQLITE_ERRORS as exc:
        raise damaged(context, exc) from exc
    except common.Refused as exc:
        if mailcloak.sqlite_fault(exc) == "damaged":
            raise damaged(context, exc) from exc
        raise


def damaged(context: common.Context, exc: BaseException) -> common.Refused:
    """What to do where SQLite cannot write the rows into the file that is there."""
    if mailcloak.sqlite_fault(exc) != "damaged":
        return common.Refused(
            f"restore: {mailcloak.describe_sqlite(exc)}, nothing was changed", common.database_remedy(exc, context.path)
        )
    move = f"stop mailcloak and Dovecot, move {context.path} away, run this again, and start them"
    return common.Refused(f"restore: the database itself is damaged ({mailcloak.describe_sqlite(exc)}), nothing was changed", move)


def check_backup(path: str) -> None:
    """Raise Refused for a file that is no whole database of mailcloak, or of a newer one."""
    if os.path.isdir(path):
        raise common.Refused(f"restore: {path!r} is a directory, name the backup in it")
    try:
        os.stat(path)
        with contextlib.closing(sqlite3.connect(readonly_uri(path), uri=True)) as database:
            check_whole(database, f"restore: {path!r}")
            version = database.execute("PRAGMA user_version").fetchone()[0]
            tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except OSError as exc:
        raise common.Refused(f"restore: {path!r}: {exc.strerror}") from exc
    except mailcloak.SQLITE_ERRORS as exc:
        raise common.Refused(f"restore: {path!r} cannot be read: {mailcloak.describe_sqlite(exc)}", "use another backup") from exc
    if version > mailcloak.SCHEMA_VERSION:
        text = f"restore: {path!r} has schema version {version}, this mailcloak knows {mailcloak.SCHEMA_VERSION}"
        raise common.Refused(text, "install the newer one first")
    if not version or not {"aliases", "apps", "app_from"} <= tables:
        raise common.Refused(f"restore: {path!r} is no database of mailcloak, name a file that backup has written")


def readonly_uri(path: str) -> str:
    """The name by which SQLite opens a file for reading alone."""
    return f"file:{urllib.parse.quote(os.fsencode(path))}?mode=ro"


def attach(database: sqlite3.Connection, path: str, name: str) -> None:
    """Have the file as a schema of this name, for reading alone, though perhaps only root may read it."""
    if isinstance(database, mailcloakowner.OwnersConnection):
        database.attach(readonly_uri(path), name)
    else:
        database.execute(f"ATTACH ? AS {name}", (readonly_uri(path),))


def restore_new(context: common.Context, path: str) -> None:
    """Make the database, which is missing."""
    with contextlib.closing(sqlite3.connect(":memory:", uri=True, isolation_level=None)) as rows:
        bring_rows(rows, path)  # the owner of the directory may not read the backup
        make_database(rows, context.path)
        common.note_change("restore", path)
        tell_numbers(context, rows, f"{context.path} made from {path}", changed=True)


def make_database(rows: sqlite3.Connection, target: str, *, wal: bool = False) -> None:
    """Put a copy of the rows where no file is yet: nobody sees it before all is in it. Raises Refused where there is one now."""
    new = f"{target}.restored-{os.getpid()}"
    try:
        os.stat(os.path.dirname(target))
        as_owner = mailcloakowner.acting_as_owner_of(new)
    except OSError as exc:
        raise common.Refused(f"database {target!r}: {exc.strerror}", common.database_remedy(exc, target)) from exc
    mailcloak.create_database_file(new)
    try:
        with as_owner, contextlib.closing(mailcloak.connect_database(new, 0)) as database:
            rows.backup(database)
            database.execute(f"PRAGMA journal_mode = {'WAL' if wal else 'DELETE'}")
        os.link(new, target)
    except FileExistsError:
        raise common.Refused(f"another program has made {target!r} meanwhile, try again") from None
    finally:
        os.unlink(new)


def restore_into(context: common.Context, database: sqlite3.Connection, path: str) -> None:
    """Make the rows of an open database those of the backup."""
    database.execute("PRAGMA cache_spill = OFF")  # as in write()
    dry_run = context.options.dry_run
    brought = bring_rows(database, path, dry_run=dry_run)
    if brought.changed and not dry_run:
        common.note_change("restore", path, rows=brought.changed)
    for kind, names in brought.gone.items():
        if names:
            common.say(
                f"restore: {path} lacks these {kind}, which {'would be' if dry_run else 'are'} gone: {common.shorten(names)}"
            )
    for kind, names in brought.back.items():
        if names:
            common.say(
                f"restore: these {kind} {'would be' if dry_run else 'are'} there again, or enabled again: {common.shorten(names)}"
            )
    would = "would be " if dry_run else ""
    text = f"{context.path} {would or 'is '}as {path}, {brought.changed} rows {would}changed"
    changed = bool(brought.changed) and not dry_run
    values = {"changed": changed, "dry_run": dry_run, "rows": brought.changed, "gone": brought.gone, "back": brought.back}
    tell_numbers(context, database, text, brought.numbers, **values)


class Brought(NamedTuple):
    """What came of bringing the rows of a backup."""

    changed: int  # rows
    gone: dict[str, list[str]]  # of aliases and apps, names that the backup does not have
    back: dict[str, list[str]]  # that the database did not have, or had disabled, and that count now
    numbers: dict[str, int]  # how many of both there are then


def bring_rows(database: sqlite3.Connection, path: str, *, dry_run: bool = False) -> Brought:
    """Write the rows of the backup that differ, in one transaction. Makes the tables where there are none."""
    attach(database, path, "backup")
    with contextlib.suppress(DryRun), common.transaction(database):
        if not database.execute("SELECT 1 FROM main.sqlite_master").fetchone():
            for statement in mailcloak.SCHEMA.split(";\n"):
                database.execute(statement)
            database.execute(f"PRAGMA main.user_version = {mailcloak.SCHEMA_VERSION}")
        named = [table for table in read_tables() if table.name in NAMED]
        gone, back = (
            {table.name: [str(row[0]) for row in database.execute(select(table))] for table in named}
            for select in (select_gone, select_back)
        )
        changed = sum(take_away(database, table) for table in reversed(read_tables()))
        changed += sum(bring_table(database, table) for table in read_tables() if has_table(database, table))
        brought = Brought(changed, gone, back, count_names(database))
        if dry_run:
            raise DryRun
        prepare_commit(database)
    database.execute("DETACH backup")
    return brought


def select_gone(table: Table) -> str:
    """The names that the backup does not have, as a statement."""
    return f"SELECT {table.keys[0]} FROM main.{table.name} AS ours WHERE {lacks(table, 'backup')} ORDER BY 1"  # noqa: S608


def select_back(table: Table) -> str:
    """The names that the backup has, enabled, and the database has not, or disabled, as a statement."""
    ours = f"SELECT 1 FROM main.{table.name} AS ours WHERE {same_key(table)} AND ours.enabled = 1"  # noqa: S608
    theirs = f"backup.{table.name} AS theirs WHERE theirs.enabled = 1 AND {has_key(table)}"
    return f"SELECT {table.keys[0]} FROM {theirs} AND NOT EXISTS ({ours}) ORDER BY 1"  # noqa: S608


def count_names(database: sqlite3.Connection) -> dict[str, int]:
    """How many aliases and apps there are."""
    return {name: int(database.execute(f"SELECT count(*) FROM main.{name}").fetchone()[0]) for name in NAMED}  # noqa: S608


def has_table(database: sqlite3.Connection, table: Table) -> bool:
    """Has the backup this table? An older one may not."""
    return bool(database.execute("SELECT 1 FROM backup.sqlite_master WHERE name = ?", (table.name,)).fetchone())


def take_away(database: sqlite3.Connection, table: Table) -> int:
    """Delete the rows that the backup does not have; how many these were."""
    if not has_table(database, table):
        return database.execute(f"DELETE FROM main.{table.name}").rowcount  # noqa: S608
    return delete_rows(database, table, "backup")


def bring_table(database: sqlite3.Connection, table: Table) -> int:
    """Write the rows of the backup that differ; how many these were. A column that an older backup lacks has its default."""
    defaults = {row[1]: row[4] or "NULL" for row in database.execute(f"PRAGMA main.table_info({table.name})")}
    theirs = {row[1] for row in database.execute(f"PRAGMA backup.table_info({table.name})")}
    values = [column if column in theirs else f"{defaults[column]} AS {column}" for column in table.columns]
    key, parent = table.keys[0], PARENTS.get(table.name)
    belongs = f"{key} IN (SELECT {key} FROM backup.{parent})" if parent else "1"  # noqa: S608
    rows = f"SELECT {', '.join(values)} FROM backup.{table.name} WHERE {belongs} AND {has_key(table)}"  # noqa: S608
    return copy_rows(database, table, rows)


# ---------------------------------------------------------------------------------------------------------------------------------
# The check
# ---------------------------------------------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """What is wrong with one row, or with the file."""

    table: str  # "" for the file
    key: str
    fault: str
    remedy: str  # "" where the statements correct it
    fixes: tuple[tuple[str, tuple[Any, ...]], ...] = ()  # statements with their values


def db_check(context: common.Context) -> int:
    """Print what is wrong; 0 where nothing is, or where all of it was corrected, else 1."""
    options, database = context.options, context.database
    database.text_factory = lambda data: data.decode("utf-8", "surrogateescape")  # what is not UTF-8 is a fault of its row
    fixed: list[Fault] = []
    if options.fix:
        with common.transaction(database):
            database.execute("PRAGMA defer_foreign_keys = ON")
            # each correction makes one row right, or deletes it
            while fixable := [fault for fault in find_faults(context) if fault.fixes]:
                for fault in fixable:
                    for statement, values in fault.fixes:
                        database.execute(statement, values)
                fixed += fixable
        for fault in fixed:
            common.note_change("db check: fix", fault.key, table=fault.table, fault=fault.fault)
    left = list(find_faults(context))
    rows = [(fault, "fixed") for fault in fixed] + [(fault, fault.remedy or "db check --fix corrects it") for fault in left]

    def show() -> None:
        if rows or options.json:
            shown = [
                {"table": fault.table or "-", "key": fault.key, "fault": fault.fault, "remedy": remedy} for fault, remedy in rows
            ]
            common.print_list(options, shown, dict.fromkeys(("table", "key", "fault", "remedy"), str))
        else:
            tell_numbers(context, database, "nothing is wrong")

    common.print_done(show)
    return common.EXIT_REFUSED if left else common.EXIT_DONE


def find_faults(context: common.Context) -> Iterator[Fault]:
    """All that is wrong, the file first; with a file that is damaged, nothing else."""
    database = context.database
    restore_it = "mailcloakctl restore brings back a backup"
    damage = [str(row[0]) for row in database.execute("PRAGMA integrity_check")]
    if damage != ["ok"]:
        yield from (Fault("", context.path, text, restore_it) for text in damage)
        return
    is_short = False
    for name, columns, _ in read_tables():
        found = {row[1] for row in database.execute(f"PRAGMA table_info({name})")}
        for column in sorted(set(columns) - found):
            is_short = True
            yield Fault(name, column, "this column is missing", restore_it)
    if is_short:
        return
    for name, _, keys in reversed(read_tables()):
        for _, rowid, parent, _ in database.execute(f"PRAGMA foreign_key_check({name})").fetchall():
            (key,) = database.execute(f"SELECT {keys[0]} FROM {name} WHERE rowid = ?", (rowid,)).fetchone()  # noqa: S608
            fixes = ((f"DELETE FROM {name} WHERE rowid = ?", (rowid,)),)  # noqa: S608
            yield Fault(name, str(key), f"belongs to nothing in {parent}", "", fixes)
    yield from find_alias_faults(context)
    yield from find_app_faults(database)
    yield from find_sender_faults(database)


def read_stored(read: Callable[[str], str], name: Any) -> str:
    """The name in the form in which it is looked up; raises Refused, also where it is not stored as text."""
    if not isinstance(name, str):
        raise common.Refused(f"{name!r} is not text")
    return read(name)


def find_alias_faults(context: common.Context) -> Iterator[Fault]:
    """Addresses and targets that are not as the daemon compares them."""
    database = context.database
    for address, rowid in watch(rows_of(database, "SELECT alias_email, rowid FROM aliases ORDER BY alias_email"), "checked"):
        remedy = f"delete it: sqlite3 {context.path} 'DELETE FROM aliases WHERE rowid = {rowid}'"  # noqa: S608
        try:
            right = read_stored(common.read_address, address)
        except common.Refused:
            yield Fault("aliases", common.shown_text(address), "this is no address, so the alias counts for nobody", remedy)
            continue
        if right != address:
            yield from misspelled(database, address, right)
    targets = (
        "SELECT 'aliases', alias_email, username, external FROM aliases"
        " UNION ALL SELECT 'alias_targets', alias_email, target, external FROM alias_targets ORDER BY 2"
    )
    for table, address, target, external in rows_of(database, targets):
        with contextlib.suppress(common.Refused):
            if read_stored(common.read_address, address) == address:
                yield from find_target_faults(context, table, address, target, external == 1)


def find_target_faults(context: common.Context, table: str, address: str, target: str, external: bool) -> Iterator[Fault]:
    """What is wrong with a target of an alias: a username or, where external, an address elsewhere."""
    column = "username" if table == "aliases" else "target"
    try:
        name = read_stored(functools.partial(common.read_external, context) if external else common.read_username, target)
        if not external:
            common.refuse_names(context, name)
    except common.Refused as exc:
        fault = str(exc).removeprefix("aliases: ")
        yield Fault(table, address, fault, f"mailcloakctl aliases add {address} USERNAME --replace")
        return
    if name != target:
        update = f"UPDATE OR REPLACE {table} SET {column} = ? WHERE alias_email = ? AND {column} = ?"  # noqa: S608
        kind = "address" if external else "username"
        yield Fault(table, address, f"the {kind} {target!r} is stored for {name}", "", ((update, (name, address, target)),))


def misspelled(database: sqlite3.Connection, address: str, right: str) -> Iterator[Fault]:
    """The fault of an alias that is not stored in the form in which it is looked up."""
    fault = f"is stored in a form that is never looked up: {right} is"
    this, other = (common.find_alias(database, each) for each in (address, right))
    # another program's table may compare without regard to capitals, and find this alias once more
    is_there = database.execute("SELECT 1 FROM aliases WHERE alias_email = ? COLLATE BINARY", (right,)).fetchone()
    if not other or not is_there:
        update = ("UPDATE OR IGNORE aliases SET alias_email = ? WHERE alias_email = ?", (right, address))
        # not those of another one with the same right form, which was corrected before
        gone = "NOT EXISTS (SELECT 1 FROM aliases WHERE aliases.alias_email = alias_targets.alias_email)"
        targets = (f"UPDATE alias_targets SET alias_email = ? WHERE alias_email = ? AND {gone}", (right, address))  # noqa: S608
        yield Fault("aliases", address, fault, "", (update, targets))
    elif this == other:
        delete = ("DELETE FROM aliases WHERE alias_email = ?", (address,))
        yield Fault("aliases", address, f"{fault}, and is there", "", (delete,))
    else:
        remedy = f"choose one: mailcloakctl aliases add {right} USERNAME --replace; then db check --fix"
        leads = f"{fault}, and leads to {common.shown_targets(other)} or has another state"
        yield Fault("aliases", address, leads, remedy)


def find_app_faults(database: sqlite3.Connection) -> Iterator[Fault]:
    """Ids and owners of apps that are not as the daemon compares them."""
    ids = {app_id for (app_id,) in database.execute("SELECT app_id FROM apps")}
    fixes: tuple[tuple[str, tuple[Any, ...]], ...]
    for app_id, owner in database.execute("SELECT app_id, owner FROM apps ORDER BY app_id").fetchall():
        try:
            right = read_stored(common.read_app_id, app_id)
            name = owner if owner is None else read_stored(common.read_username, owner)
        except common.Refused as exc:
            yield Fault("apps", common.shown_text(app_id), str(exc), "make it again, with mailcloakctl apps add and apps set")
            continue
        fault = f"nobody can log in as it, since {right} is looked up"
        if right != app_id and right in ids:
            yield Fault("apps", app_id, fault, f"there are two: mailcloakctl apps del {right}")
        elif right != app_id:
            ids.add(right)
            apps, senders = (f"UPDATE {table} SET app_id = ? WHERE app_id = ?" for table in ("apps", "app_from"))  # noqa: S608
            fixes = ((apps, (right, app_id)), (senders, (right, app_id)))
            yield Fault("apps", app_id, fault, "", fixes)
        elif name != owner:
            fixes = (("UPDATE apps SET owner = ? WHERE app_id = ?", (name, app_id)),)
            yield Fault("apps", app_id, f"the owner {owner!r} is stored for {name}", "", fixes)


def find_sender_faults(database: sqlite3.Connection) -> Iterator[Fault]:
    """Addresses of apps that are not as the daemon compares them."""
    select = "SELECT app_id, from_addr, rowid FROM app_from ORDER BY app_id, from_addr"
    for app_id, sender, rowid in database.execute(select).fetchall():
        key = common.shown_text(f"{app_id} {sender}")
        try:
            right = sender if sender == "" else read_stored(common.read_sender, sender)
        except common.Refused:
            delete = ("DELETE FROM app_from WHERE rowid = ?", (rowid,))
            yield Fault("app_from", key, "this is no address, so it allows nothing", "", (delete,))
            continue
        if right != sender:
            fixes = (("UPDATE OR REPLACE app_from SET from_addr = ? WHERE rowid = ?", (right, rowid)),)
            yield Fault("app_from", key, f"is never looked up: {right} is", "", fixes)


# ---------------------------------------------------------------------------------------------------------------------------------
# From the Go program
# Its database in both layouts, and its config.yaml in both forms. Its files are only read: the database as a copy, since a file in
# WAL mode cannot be opened without writing beside it.
# ---------------------------------------------------------------------------------------------------------------------------------

GO_ALIASES = {  # the columns of its table aliases that tell the layout, and what to read
    frozenset({"username"}): "SELECT alias_email, username, enabled = 1, rowid FROM aliases ORDER BY rowid",
    frozenset({"target_user", "alias_domain_name"}): (
        "SELECT alias_email, target_user, aliases.enabled = 1 AND coalesce(domains.enabled, 0) = 1, aliases.rowid FROM aliases"
        " LEFT JOIN domains ON domain_name = alias_domain_name ORDER BY aliases.rowid"
    ),
}
GO_KEYS = {  # each block that it reads, with those keys that are ours as well
    "keycloak": ("base_url", "realm", "client_id", "client_secret"),
    "sockets": ("policy_socket", "socketmap_socket", "socket_owner_user", "socket_owner_group", "socket_mode"),
}


class GoData(NamedTuple):
    """What is in the database of the Go program, but for the aliases."""

    domains: list[str]  # of ours, that are enabled
    apps: list[tuple[str, str, int, int]]  # id, hash, enabled, created_at
    senders: list[tuple[str, str, int]]  # id of the app, address, enabled


def migrate_from_go(context: common.Context) -> None:
    """Take over aliases and apps of the Go program, and its configuration; raises Refused, and then nothing was changed."""
    options = context.options
    problems = Problems(options.file, "row")
    if bool(options.go_config) != bool(options.new_config):
        raise common.Refused("migrate-from-go: --go-config names the old file and --new-config the new one, name both")
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(copy_of_go(options.file))
        staging = stack.enter_context(contextlib.closing(open_staging()))
        select = find_go_layout(old, options.file)
        staging.executemany("INSERT INTO wanted VALUES (?, ?, ?, 0, ?)", read_go_aliases(context, old, select, problems))
        data = read_go_data(old, problems)
        config = convert_config(options.go_config, context.path, data.domains) if options.go_config else ""
        problems.stop(skip=options.skip_bad)
        database = find_database(context)
        version = data_version(database)
        compare(staging, database, problems, "keep")
        for number, change in enumerate(read_changes(staging), 1):
            if change.kind == "change":
                problems.report(
                    number, f"{change.address} leads to {common.shown_targets(cast(mailcloak.Alias, change.old))} here already"
                )
        problems.stop(skip=options.skip_bad)
        staging.execute("DELETE FROM changes WHERE old_targets IS NOT NULL")
        new = list(itertools.islice(read_changes(staging), MAX_ASKED + 1))
        elsewhere = new if len(new) <= MAX_ASKED else None
        ask_about(context, elsewhere)
        before = database.total_changes
        with contextlib.ExitStack() as undo, contextlib.suppress(DryRun):
            if config and not options.dry_run:
                write_new_file(options.new_config, config)
                undo.callback(os.unlink, options.new_config)
            write(context, staging, version, elsewhere, lambda: write_go_apps(database, data))
            undo.pop_all()
        tell_go(context, staging, data, is_changed=database.total_changes != before and not options.dry_run)


@contextlib.contextmanager
def copy_of_go(path: str) -> Iterator[sqlite3.Connection]:
    """A connection to a copy of the database, with what its -wal has; raises Refused."""
    with contextlib.ExitStack() as stack:
        try:
            with mailcloakowner.acting_as_owner_of(path):
                # as the owner, who could lead to a file of root's otherwise
                copy = os.path.join(stack.enter_context(tempfile.TemporaryDirectory(prefix="mailcloak-")), "go.db")
                for suffix in ("", "-wal", "-journal"):
                    if not suffix or os.path.exists(path + suffix):
                        shutil.copyfile(path + suffix, copy + suffix)
        except OSError as exc:
            raise common.Refused(f"migrate-from-go: {path!r} cannot be read: {exc.strerror}") from exc
        database = stack.enter_context(contextlib.closing(mailcloakowner.connect(copy, 0)))
        database.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
        try:
            check_whole(database, f"migrate-from-go: {path!r}")
        except mailcloak.SQLITE_ERRORS as exc:
            raise common.Refused(f"migrate-from-go: {path!r} cannot be read: {mailcloak.describe_sqlite(exc)}") from exc
        yield database


def find_go_layout(old: sqlite3.Connection, path: str) -> str:
    """The statement that reads the aliases; raises Refused for a database of another program."""
    columns = {row[1] for row in old.execute("PRAGMA table_info(aliases)")}
    select = next((select for layout, select in GO_ALIASES.items() if layout <= columns), None)
    if old.execute("PRAGMA user_version").fetchone()[0]:
        raise common.Refused(f"migrate-from-go: {path!r} is a database of this mailcloak, mailcloakctl restore takes it")
    if not select:
        raise common.Refused(f"migrate-from-go: {path!r} is no database of the Go program")
    return select


def read_go_aliases(
    context: common.Context, old: sqlite3.Connection, select: str, problems: Problems
) -> Iterator[tuple[str, str, int, int]]:
    """Its aliases, as read_aliases() gives those of a file; those of a disabled domain are disabled."""
    for address, username, enabled, number in old.execute(select):
        try:
            yield (*check_names(context, Line(str(address), [str(username)])), enabled, number)
        except common.Refused as exc:
            problems.report(number, str(exc).removeprefix("aliases: "))


def read_go_data(old: sqlite3.Connection, problems: Problems) -> GoData:
    """Its domains and apps. An address in a disabled domain comes in disabled."""
    tables = {row[0] for row in old.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    states: dict[str, bool] = {}
    if "domains" in tables:
        rows = old.execute("SELECT domain_name, enabled = 1 FROM domains ORDER BY domain_name")
        states = {mailcloak.domain_to_ascii(str(name)): bool(enabled) for name, enabled in rows}
    apps, senders = [], []
    known: set[str] = set()
    if "apps" in tables:
        columns = {row[1] for row in old.execute("PRAGMA table_info(apps)")}
        created = "created_at" if "created_at" in columns else "updated_at"
        for app_id, secret_hash, enabled, created_at, number in old.execute(
            f"SELECT app_id, secret_hash, enabled = 1, {created}, rowid FROM apps ORDER BY app_id"  # noqa: S608
        ):
            try:
                right = common.read_app_id(str(app_id))
                if not isinstance(secret_hash, str) or not secret_hash.isprintable():
                    raise common.Refused(f"{right} has no hash that could be taken over")
                if right in known:
                    raise common.Refused(f"{right} is there twice, in small letters and in capitals")
                known.add(right)
                apps.append((right, secret_hash, enabled, created_at))
            except common.Refused as exc:
                problems.report(number, f"of apps: {exc}")
    for app_id, sender, enabled, number in old.execute(
        "SELECT app_id, from_addr, enabled = 1, rowid FROM app_from ORDER BY rowid" if "app_from" in tables else "SELECT 1 WHERE 0"
    ):
        try:
            address = common.read_sender(str(sender)) if sender else ""
            if str(app_id).lower() not in known:
                raise common.Refused(f"{app_id} is no app")
            senders.append((str(app_id).lower(), address, int(enabled and states.get(address.rpartition("@")[2], True))))
        except common.Refused as exc:
            problems.report(number, f"of app_from: {exc}")
    domains = [name for name, enabled in states.items() if enabled]
    return GoData(domains or ([] if states else go_domains(old)), apps, senders)


def go_domains(old: sqlite3.Connection) -> list[str]:
    """The domains of its aliases, where it has no table of domains."""
    found = {str(row[0]).rpartition("@")[2] for row in old.execute("SELECT alias_email FROM aliases")}
    return sorted({mailcloak.domain_to_ascii(domain) for domain in found if domain})


def write_go_apps(database: sqlite3.Connection, data: GoData) -> None:
    """Store the apps with their hashes as they are; raises Refused for one that is here with another hash."""
    for app in data.apps:
        known = database.execute("SELECT secret_hash FROM apps WHERE app_id = ?", (app[0],)).fetchone()
        if known and known[0] != app[1]:
            raise common.Refused(
                f"apps: {app[0]} is here already, with another token; nothing was changed: apps del {app[0]} first"
            )
    database.executemany("INSERT OR IGNORE INTO apps (app_id, secret_hash, enabled, created_at) VALUES (?, ?, ?, ?)", data.apps)
    database.executemany("INSERT OR IGNORE INTO app_from (app_id, from_addr, enabled) VALUES (?, ?, ?)", data.senders)


def convert_config(path: str, database: str, domains: list[str]) -> str:
    """Its config.yaml as ours; raises Refused. Keys that have no counterpart are said."""
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            old = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        reason = (exc.strerror if isinstance(exc, OSError) else "") or "it is not YAML"
        raise common.Refused(f"migrate-from-go: {path!r} cannot be read: {reason}") from None
    if not isinstance(old, dict):
        raise common.Refused(f"migrate-from-go: {path!r} is no configuration of the Go program")
    blocks = {name: block if isinstance(block, dict) else {} for name, block in old.items()}
    idp, policy = blocks.get("idp", {}), blocks.get("policy", {})
    if str(idp.get("provider", "keycloak")).strip().lower() != "keycloak":
        raise common.Refused(f"migrate-from-go: {path!r} has idp.provider {idp['provider']}, and mailcloak asks Keycloak only")
    keycloak = {**blocks.get("keycloak", {}), **{key: value for key, value in (idp.get("keycloak") or {}).items() if value}}
    sockets = dict(blocks.get("sockets", {}))
    if isinstance(sockets.get("socket_mode"), int):  # 0660 without quotes is an octal number in YAML 1.1
        sockets["socket_mode"] = f"{sockets['socket_mode']:04o}"
    new: dict[str, dict[str, Any]] = {
        "keycloak": {key: keycloak[key] for key in GO_KEYS["keycloak"] if key in keycloak},
        "policy": {"domain": policy.get("domain") or domains},
        "sqlite": {"path": database},
        "sockets": {key: sockets[key] for key in GO_KEYS["sockets"] if key in sockets},
        "daemon": {"user": blocks.get("daemon", {}).get("user") or "mailcloak"},
    }
    ttl = keycloak.get("cache_ttl_seconds") or policy.get("cache_ttl_seconds")
    mode = policy.get("idp_failure_mode") or policy.get("keycloak_failure_mode")
    new["policy"].update({key: value for key, value in (("cache_ttl_seconds", ttl), ("keycloak_failure_mode", mode)) if value})
    for block in sorted(blocks.keys() - {*new, "idp"}):
        common.say(f"warning: {path}: {block} has no counterpart, and was left out")
    return yaml.safe_dump(new, sort_keys=False, allow_unicode=True)


def write_new_file(path: str, text: str) -> None:
    """A file for its owner alone, which was not there before; raises Refused."""
    try:
        with replacing(path, 0o600, replace=False) as file:
            file.write(text.encode())
    except OSError as exc:
        raise common.Refused(f"migrate-from-go: {path!r} cannot be written: {exc.strerror}; nothing was changed") from exc


def tell_go(context: common.Context, staging: sqlite3.Connection, data: GoData, *, is_changed: bool) -> None:
    """Print what came in, and what the configuration must say."""
    options = context.options
    added = int(staging.execute("SELECT count(*) FROM changes").fetchone()[0])
    if is_changed:
        note("migrate-from-go", read_changes(staging), options.file, {"add": added})

    def show() -> None:
        if options.json:
            numbers = {"aliases_added": added, "apps": len(data.apps), "domains": data.domains}
            common.print_json({"changed": is_changed, "dry_run": options.dry_run, **numbers})
            return
        would = " would be" if options.dry_run else ""
        print(
            f"migrate-from-go: {common.counted(added, 'alias', 'aliases')}{would} added, {common.counted(data.apps, 'app')} in it"
        )
        print(f"migrate-from-go: policy.domain must list: {', '.join(data.domains) or '(no domain is enabled in it)'}")
        if options.new_config and not options.dry_run:
            print(
                f"migrate-from-go: {options.new_config} written; mailcloak --config {options.new_config} --check-config looks at it"
            )

    common.print_done(show)
