# mailcloakdata: aliases as files. MIT licence, see LICENSE.
"""Aliases as files: what "mailcloakctl aliases export", "import", "sync" and "move" run; no other command loads it.

  aliases export [FILE]    all aliases as a file, or on standard output
  aliases import FILE      adds and changes what the file says, deletes nothing
  aliases sync FILE        makes the aliases equal to the file; what it does not name is deleted (--missing)
  aliases move OLD NEW     lets all aliases of one user lead to another

A file is read to its end before anything is decided. One bad line stops the whole, unless --skip-bad; each is said with its number.
What is read is compared with the database, and only rows that differ are written, in one transaction: a kill at any instant leaves
the old state or the new, and where nothing differs nothing is written at all. The daemon reads on meanwhile. It waits for the commit
alone, as for every commit.

A file that would remove or change more than --max-change of the aliases stops with exit code 3: it may be a broken export.

Formats (--format, else by the end of the file's name):
  csv            alias,username[,enabled], a header if you like; enabled is 1 or 0, and 1 where it is not there
  jsonl          a line of JSON for each: {"alias": "info@example.org", "username": "alice", "enabled": true}
  virtual        virtual(5): an address and its target; it has no disabled aliases
  postfixadmin   CSV with address,goto,active, as PostfixAdmin exports its aliases; other columns are not read
The last two name mailboxes, not users. With --usernames local the username is the local part, and the target must be in the alias's
own domain; with --usernames address the whole target is the username. An alias leads to one user: a line with several targets, or
with one that is elsewhere, is a bad line.

Contents: decisions (pure), formats (pure), files, comparing (in a database of its own, which is deleted when it is closed), verbs.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import itertools
import json
import os
import re
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, NamedTuple, Optional, TypeVar, cast

import mailcloak
import mailcloakctl as ctl

MAX_LINE_BYTES = 65536  # of a line of a file; an alias with all its fields takes less than 1,000
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
    username: str
    enabled: int  # 1 or 0


class Change(NamedTuple):
    """What becomes of one alias. Both old values are None for one that is new, both new values for one that goes."""

    address: str
    old_username: Optional[str]
    old_enabled: Optional[int]
    username: Optional[str]
    enabled: Optional[int]

    @property
    def kind(self) -> str:
        """One of KINDS."""
        if self.old_username is None:
            return "add"
        if self.username is None:
            return "delete"
        if self.username != self.old_username:
            return "change"
        return "enable" if self.enabled else "disable"

    @property
    def leads_elsewhere(self) -> bool:
        """Does mail for the address go to another user than before?"""
        return self.username is not None and self.username != self.old_username


KINDS = {"add": "added", "change": "changed", "enable": "enabled", "disable": "disabled", "delete": "deleted"}


def plan(stored: Iterable[Row], wanted: Iterable[Row], missing: str) -> Iterator[Change]:
    """The changes that make what is stored what is wanted. Both are sorted by address, and hold each address once.

    missing: what becomes of an alias that is stored and not wanted: "delete", "disable" or "keep".
    """
    stored, wanted = iter(stored), iter(wanted)
    old, new = next(stored, None), next(wanted, None)
    while old is not None or new is not None:
        if old == new:
            old, new = next(stored, None), next(wanted, None)
        elif new is None or (old is not None and old[0] < new[0]):
            address, username, enabled = cast(Row, old)
            if missing == "delete":
                yield Change(address, username, enabled, None, None)
            elif missing == "disable" and enabled:
                yield Change(address, username, enabled, username, 0)
            old = next(stored, None)
        elif old is None or new[0] < old[0]:
            yield Change(new[0], None, None, new[1], new[2])
            new = next(wanted, None)
        else:
            yield Change(old[0], old[1], old[2], new[1], new[2])
            old, new = next(stored, None), next(wanted, None)


def take_once(rows: Iterable[tuple[str, str, int, int]], report: Callable[[int, str], None]) -> Iterator[Row]:
    """Each address once. rows: address, username, enabled and the number of the line, sorted by address and number.

    A line that says again what an earlier one said is no fault; one that says something else is reported, and left out.
    """
    last, last_number = Row("", "", 0), 0
    for address, username, enabled, number in rows:
        row = (address, username, enabled)
        if address != last[0]:
            last, last_number = cast(Row, row), number
            yield last
        elif row != last:
            leads = "leads to another user" if username != last[1] else "has another state"
            report(number, f"{address} {leads} in line {last_number}; an alias leads to one user")


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
        raise ValueError(f"it says {text!r} where 1 or 0 (enabled or not) is expected; an alias leads to one user") from None


def username_of(target: str, address: str, usernames: str) -> str:
    """The username that a target of virtual(5) stands for; raises ValueError for one that is no user of ours.

    usernames: "local" (the local part, of a target in the alias's own domain) or "address" (all of it).
    """
    if len(re.split(r"[\s,]+", target.strip(" \t,"))) != 1:
        raise ValueError("it has several targets, and an alias leads to one user")
    local_part, at_sign, domain = mailcloak.unquote_local_part(target.strip(" \t,")).rpartition("@")
    if not at_sign:
        raise ValueError(f"its target {target!r} has no domain")
    if usernames == "address":
        return f"{local_part}@{domain}"
    own = address.rpartition("@")[2]
    if mailcloak.domain_to_ascii(domain) != mailcloak.domain_to_ascii(own):
        raise ValueError(f"its target {target!r} is not in the alias's own domain, and an external target is not supported")
    return local_part


def target_of(row: Row, usernames: str) -> str:
    """The mailbox of an alias as virtual(5) names it; raises ValueError where another username would be read from it."""
    target = mailcloak.format_mailbox(row[1], "", row[0].rpartition("@")[2])
    if ("@" in row[1]) != (usernames == "address"):
        other = "address" if usernames == "local" else "local"
        raise ValueError(f"its username {row[1]!r} needs --usernames {other}")
    with contextlib.suppress(ValueError):
        if username_of(target, row[0], usernames) == row[1]:
            return target
    raise ValueError(f"its username {row[1]!r} cannot stand there")


class Unreadable(ctl.Refused):
    """The file as a whole cannot be read in this format."""


class Format:
    """One form of file; an object for each file that is read or written."""

    head = ""  # what a file begins with

    def __init__(self, usernames: str) -> None:
        self.usernames = usernames

    def join(self, lines: Iterable[tuple[int, str]]) -> Iterable[tuple[int, str]]:
        """The numbered lines, with each that goes on in the next one whole."""
        return lines

    def read(self, line: str) -> Optional[tuple[str, str, int]]:
        """Address, username and enabled as they are written; None where the line has no alias. Raises ValueError with the reason."""
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


class Csv(Format):
    """Comma-separated values as Python's csv reads and writes them (RFC 4180), each alias on a line."""

    head = "alias,username,enabled\n"
    columns: tuple[dict[str, int], ...] = (  # each name that a column may have, with its place in what read() returns
        {"alias": 0, "alias_email": 0, "address": 0, "username": 1, "enabled": 2},
    )
    takes_other_columns = False

    def __init__(self, usernames: str) -> None:
        super().__init__(usernames)
        self._order: Optional[list[Optional[int]]] = None  # what stands in each column; None until the first line is read
        self._least = 2  # so many columns must be there
        self._writer: Any = csv.writer(cast(Any, Echo()), lineterminator="\n")

    def read(self, line: str) -> Optional[tuple[str, str, int]]:
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
            raise ValueError(f"it has {ctl.counted(fields, 'field')}, expected {len(self._order)}; an alias leads to one user")
        found = ["", "", "1"]
        for place, field in zip(self._order, fields):
            if place is not None:
                found[place] = field.strip()
        return self._checked(found[0], found[1], read_enabled(found[2]))

    def _read_header(self, fields: list[str]) -> list[Optional[int]]:
        if any("@" in field for field in fields):
            return [0, 1, 2]
        names = [field.strip().lower() for field in fields]
        order = [self.columns[0].get(name) for name in names]
        found = [place for place in order if place is not None]
        unknown = [name for name, place in zip(names, order) if place is None and not self.takes_other_columns]
        if not {0, 1} <= set(found) or len(set(found)) != len(found) or unknown:
            raise Unreadable(f"its first line names the columns {','.join(names)!r}, expected {self.head.strip()}")
        self._least = len(order)
        return order

    def _checked(self, address: str, username: str, enabled: int) -> tuple[str, str, int]:
        return address, username, enabled

    def write(self, row: Row) -> str:
        return str(self._writer.writerow(row))


class PostfixAdmin(Csv):
    """What PostfixAdmin's list of aliases gives as CSV: its columns by their names or, in English, as they are shown."""

    head = "address,goto,active\n"
    columns = ({"address": 0, "alias": 0, "goto": 1, "to": 1, "active": 2},)
    takes_other_columns = True

    def _checked(self, address: str, username: str, enabled: int) -> tuple[str, str, int]:
        return address, username_of(username, address, self.usernames), enabled

    def write(self, row: Row) -> str:
        return str(self._writer.writerow((row[0], target_of(row, self.usernames), row[2])))


class JsonLines(Format):
    """An object of JSON on each line."""

    def read(self, line: str) -> Optional[tuple[str, str, int]]:
        if not line.strip():
            return None
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError("it is not JSON") from None
        if not isinstance(value, dict):
            raise ValueError("it is not an object of JSON")
        other = value.keys() - {"alias", "username", "enabled"}
        if other:
            raise ValueError(f"it has {sorted(other)[0]!r}, expected alias, username and enabled")
        address, username, enabled = value.get("alias"), value.get("username"), value.get("enabled", True)
        if not isinstance(address, str) or not isinstance(username, str):
            raise ValueError("alias and username must both be there, each a text; an alias leads to one user")
        if enabled not in (0, 1):
            raise ValueError("enabled must be true or false")
        return address, username, int(enabled)

    def write(self, row: Row) -> str:
        return json.dumps({"alias": row[0], "username": row[1], "enabled": bool(row[2])}) + "\n"


class Virtual(Format):
    """The text of a virtual alias table. Source: virtual(5), TABLE FORMAT."""

    def join(self, lines: Iterable[tuple[int, str]]) -> Iterable[tuple[int, str]]:
        number, whole = 0, ""
        for each, line in lines:
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            if line[0].isspace():
                whole += line
                if len(whole) > MAX_LINE_BYTES:
                    raise Unreadable(f"line {number} goes on for more than {MAX_LINE_BYTES} characters")
                continue
            if whole:
                yield number, whole
            number, whole = each, line
        if whole:
            yield number, whole

    def read(self, line: str) -> Optional[tuple[str, str, int]]:
        if not line.strip() or line.lstrip().startswith("#"):
            return None
        address, _, target = line.strip().replace("\t", " ").partition(" ")
        if not target:
            raise ValueError("it has no target")
        return address, username_of(target, address, self.usernames), 1

    def write(self, row: Row) -> str:
        if not row[2]:
            raise ValueError("it is disabled, and this format has no disabled aliases")
        line = f"{row[0]} {target_of(row, self.usernames)}"
        if self.read(line) != row:
            raise ValueError("it would be read as something else")
        return line + "\n"


FORMATS: dict[str, type[Format]] = {"csv": Csv, "jsonl": JsonLines, "virtual": Virtual, "postfixadmin": PostfixAdmin}


def find_format(name: Optional[str], path: str, usernames: str) -> Format:
    """The format that --format names, or the end of the file's name; CSV on standard input and output. Raises Refused."""
    if not name:
        name = "csv" if path == "-" else os.path.splitext(path)[1][1:]
        if name not in FORMATS:
            raise ctl.Refused(
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
            left = f", {ctl.shown_seconds(seconds / done * (1 - done))} left" if done else ""
            ctl.show_progress(f"aliases: {what}: {count:,}, {count / seconds:,.0f} a second{left}")
            next_time += PROGRESS_SECONDS / 2
        yield item
    ctl.show_progress("")


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

    def refuse(self, text: str) -> ctl.Refused:
        """The error for the whole file."""
        return ctl.Refused(f"aliases: {self.name}: {text}; nothing was changed")

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

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0

    def report(self, number: int, reason: str) -> None:
        """Say what is wrong with a line."""
        ctl.show_progress("")
        ctl.say(f"aliases: {self.name}: line {number}: {reason}")
        self.count += 1

    def stop(self, *, skip: bool) -> None:
        """Raise Refused if there were any, and they may not be left out."""
        if self.count and not skip:
            lines = "line is" if self.count == 1 else "lines are"
            raise ctl.Refused(
                f"aliases: {self.name}: {self.count} {lines} bad, nothing was changed; correct them, or leave them out with --skip-bad"
            )


def read_aliases(
    lines: Iterable[tuple[int, str]],
    form: Format,
    check: Callable[[str, str], tuple[str, str]],
    report: Callable[[int, str], None],
) -> Iterator[tuple[str, str, int, int]]:
    """Address, username, enabled and line of each alias. check: makes both of the form in which they are stored, or raises Refused.

    A bad line is reported, and left out.
    """
    for number, line in form.join(lines):
        try:
            fields = form.read(line)
            if fields:
                yield (*check(fields[0], fields[1]), fields[2], number)
        except Unreadable:
            raise
        except (ValueError, ctl.Refused) as exc:
            report(number, str(exc).removeprefix("aliases: "))


@contextlib.contextmanager
def replacing(path: str, mode: int) -> Iterator[str]:
    """The path of a new file beside path, that takes its place at the end: a reader sees all of the old or all of the new."""
    descriptor, new = tempfile.mkstemp(dir=os.path.dirname(os.path.abspath(path)), prefix=".mailcloak-")
    try:
        os.fchmod(descriptor, mode)
        yield new
        os.fsync(descriptor)
        os.rename(new, path)
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
CREATE TABLE wanted (address TEXT, username TEXT, enabled INTEGER, line INTEGER);
CREATE TABLE changes (address TEXT, old_username TEXT, old_enabled INTEGER, username TEXT, enabled INTEGER);
CREATE TABLE stored (address TEXT, username TEXT, enabled INTEGER);
BEGIN;
"""
SELECT_STORED = "SELECT alias_email, username, enabled FROM aliases WHERE typeof(alias_email) = 'text' ORDER BY alias_email"


def open_staging() -> sqlite3.Connection:
    """An empty database in a temporary file, gone when it is closed. Its one transaction is never committed."""
    staging = sqlite3.connect("", isolation_level=None)
    staging.executescript(STAGING.format(kib=STAGING_CACHE_KIB))
    return staging


def rows_of(database: sqlite3.Connection, select: str) -> Iterator[Any]:
    """Plain tuples, one after the other."""
    cursor = database.cursor()
    cursor.row_factory = None
    return cursor.execute(select)


@contextlib.contextmanager
def reading(database: sqlite3.Connection) -> Iterator[None]:
    """One state of the database, whatever others do meanwhile.

    With the lock of a writer where this user may have it: another writer that waited for a mere reader would keep new readers, such
    as the daemon, waiting as well.
    """
    try:
        ctl.patiently(lambda: database.execute("BEGIN IMMEDIATE"))
    except sqlite3.OperationalError as exc:
        if mailcloak.sqlite_fault(exc) != "readonly":
            raise
        database.execute("BEGIN")
    try:
        yield
    finally:
        if database.in_transaction:
            database.execute("ROLLBACK")


def data_version(database: sqlite3.Connection) -> int:
    """A number that changes with each commit of another connection. Source: SQLite, PRAGMA data_version."""
    return int(database.execute("PRAGMA data_version").fetchone()[0])


def load(staging: sqlite3.Connection, context: ctl.Context, source: Source, form: Format, problems: Problems) -> int:
    """Read the file into the table wanted; how many aliases it has. Raises Refused where it is not whole."""
    foreign: collections.Counter[str] = collections.Counter()
    policy = context.policy

    def check(address: str, username: str) -> tuple[str, str]:
        address, username = ctl.read_address(address), ctl.read_username(username)
        ctl.refuse_names(context, address, username)
        domain = address.rpartition("@")[2]
        if policy and domain not in policy.domain:
            foreign[domain] += 1
        return address, username

    lines = watch(source.lines(), "lines read", source.share)
    try:
        staging.executemany("INSERT INTO wanted VALUES (?, ?, ?, ?)", read_aliases(lines, form, check, problems.report))
    except Unreadable as exc:
        raise source.refuse(str(exc)) from None
    for domain, count in foreign.most_common(ctl.SHOWN_ITEMS):
        aliases = "1 alias" if count == 1 else f"{count} aliases"
        ctl.say(f"warning: {aliases} in {domain}, which is not in policy.domain: such an alias leads nowhere")
    return int(staging.execute("SELECT count(*) FROM wanted").fetchone()[0])


def compare(
    staging: sqlite3.Connection, database: sqlite3.Connection, problems: Problems, missing: str
) -> tuple[dict[str, int], int]:
    """Fill the table changes. How many changes there are of each kind, and how many aliases are stored."""
    counts: collections.Counter[str] = collections.Counter()

    def counted(changes: Iterator[Change]) -> Iterator[Change]:
        for change in changes:
            counts[change.kind] += 1
            yield change

    wanted = rows_of(staging, "SELECT address, username, enabled, line FROM wanted ORDER BY address, line")
    with reading(database):
        stored = int(database.execute("SELECT count(*) FROM aliases").fetchone()[0])
        rows = watch(rows_of(database, SELECT_STORED), "compared", lambda: 0.0)
        changes = counted(plan(rows, take_once(wanted, problems.report), missing))
        staging.executemany("INSERT INTO changes VALUES (?, ?, ?, ?, ?)", changes)
    return dict(counts), stored


def read_changes(staging: sqlite3.Connection) -> Iterator[Change]:
    """The table changes, sorted by address."""
    return map(Change._make, rows_of(staging, "SELECT * FROM changes ORDER BY rowid"))


def apply(database: sqlite3.Connection, changes: Iterable[Change]) -> None:
    """Make the changes, in the transaction that is open."""
    changes = iter(changes)
    while batch := list(itertools.islice(changes, BATCH_ROWS)):
        database.executemany("DELETE FROM aliases WHERE alias_email = ?", [(each[0],) for each in batch if each[3] is None])
        database.executemany(
            "INSERT INTO aliases (alias_email, username, enabled) VALUES (?, ?, ?) ON CONFLICT (alias_email) DO UPDATE"
            " SET username = excluded.username, enabled = excluded.enabled, updated_at = excluded.updated_at",
            [(each[0], each[3], each[4]) for each in batch if each[3] is not None],
        )


# ---------------------------------------------------------------------------------------------------------------------------------
# Verbs
# ---------------------------------------------------------------------------------------------------------------------------------


class DryRun(Exception):
    """All was tried, and is to be taken back."""


def aliases_import(context: ctl.Context) -> None:
    """Add and change what the file says."""
    make_so(context, "keep")


def aliases_sync(context: ctl.Context) -> None:
    """Make the aliases equal to the file."""
    make_so(context, context.options.missing)


def make_so(context: ctl.Context, missing: str) -> None:
    """Read, compare, check, write, tell. Raises Refused, OverLimit; then nothing was changed."""
    options = context.options
    percent, form, source = (
        read_share(options.max_change),
        find_format(options.format, options.file, options.usernames),
        Source(options.file),
    )
    problems = Problems(source.name)
    with contextlib.closing(open_staging()) as staging:
        wanted = load(staging, context, source, form, problems)
        problems.stop(skip=options.skip_bad)
        database = context.database
        version = data_version(database)
        counts, stored = compare(staging, database, problems, missing)
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
        raise ctl.Refused(f"aliases: --max-change {text}: expected a share such as 20%, at most 100%")
    return float(found[1])


def over_limit(options: Any, counts: dict[str, int], stored: int) -> ctl.OverLimit:
    """What the limit stopped, and how to let it pass."""
    touched = ", ".join(f"{counts[kind]} {KINDS[kind]}" for kind in KINDS if counts.get(kind) and kind != "add")
    return ctl.OverLimit(
        f"aliases: {options.verb}: of {stored} aliases {touched}: more than --max-change {options.max_change}, nothing was changed;"
        " look with --dry-run -v, and if this is right, allow it with --max-change 100%"
    )


def ask_about(context: ctl.Context, elsewhere: Optional[list[Change]]) -> None:
    """Look up in Keycloak the aliases that are new or lead elsewhere; None: too many of them. Raises Refused as aliases add does."""
    if elsewhere is None:
        ctl.say(
            f"warning: more than {MAX_ASKED} changes: the daemon was not asked about them, and aliases of aliases were not looked for;"
            " mailcloakctl doctor does both for all aliases"
        )
        return

    def ask() -> list[tuple[list[str], dict[str, str]]]:
        return [ctl.ask_keycloak(context, change.address, str(change.username)) for change in changes]

    changes = elsewhere
    answers = ctl.look_up(context, f"{ctl.counted(changes, 'alias', 'aliases')} were", ask) if changes else None
    logins = {}
    for change, (others, login) in zip(changes, answers or ()):
        ctl.refuse_holders(context, change.address, others)
        logins[str(change.username)] = login
    for username, login in logins.items():
        ctl.warn_of_login(username, login)


def write(context: ctl.Context, staging: sqlite3.Connection, version: int, elsewhere: Optional[list[Change]]) -> None:
    """Make the changes in one transaction. Raises DryRun where this is one; Refused where the database is not what was compared."""
    database, options = context.database, context.options
    # what does not fit the cache would be written before the commit, with all readers locked out
    database.execute("PRAGMA cache_spill = OFF")
    with ctl.transaction(database):
        if data_version(database) != version:
            raise ctl.Refused("aliases: another program has changed the database meanwhile; nothing was changed, try again")
        if not options.dry_run or elsewhere is not None:
            apply(database, watch(read_changes(staging), "changes made"))
        for change in elsewhere or () if not options.force else ():
            ctl.refuse_chain(context, change.address, str(change.username))
        if options.dry_run:
            raise DryRun


def tell(context: ctl.Context, staging: sqlite3.Connection, counts: dict[str, int], stored: int, skipped: int) -> None:
    """Print what was changed, or would be; note it in syslog where it was."""
    options = context.options

    def show() -> None:
        report(options, staging, counts, stored, skipped)

    if not counts or options.dry_run:
        show()
        return
    note(f"aliases: {options.verb}", read_changes(staging), options.file, counts)
    ctl.print_done(show)


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
            print(ctl.shown_text(describe(change)))
    would = "would be " if options.dry_run else ""
    parts = [f"{number} {would}{word}" for word, number in numbers.items() if number]
    skipped_part = [f"{skipped} bad lines left out"] if skipped else []
    print(f"aliases: {', '.join([*(parts or ['nothing to change']), f'{unchanged} unchanged', *skipped_part])}")


def describe(change: Change) -> str:
    """One change in words."""
    if change.kind == "change":
        state = "" if change.enabled == change.old_enabled else ", enabled" if change.enabled else ", disabled"
        return f"change {change.address} {change.old_username} -> {change.username}{state}"
    state = ", disabled" if change.kind == "add" and not change.enabled else ""
    return f"{change.kind} {change.address} {change.username or change.old_username}{state}"


def print_as_json(head: dict[str, Any], changes: Iterable[Change]) -> None:
    """One object: the head, and "changes" with the old and the new value of each; one after the other, since they may be a million."""
    print(json.dumps(head)[:-1] + ', "changes": [', end="")
    separator = "\n  "
    for address, *values in changes:
        old, new = (
            None if username is None else {"username": username, "enabled": enabled}
            for username, enabled in (values[:2], values[2:])
        )
        print(separator + json.dumps({"alias": address, "old": old, "new": new}), end="")
        separator = ",\n  "
    print("]}")


def note(event: str, changes: Iterable[Change], subject: str, counts: dict[str, int]) -> None:
    """A line in syslog for each of the first changes, and one for all of them."""
    for change in itertools.islice(changes, MAX_ASKED):
        values = {"username": change.username, "before": change.old_username}
        if change.enabled != change.old_enabled and change.kind in ("change", "enable", "disable"):
            values["enabled"] = "yes" if change.enabled else "no"
        ctl.note_change(f"{event}: {change.kind}", change.address, **values)
    ctl.note_change(event, subject, **{KINDS[kind]: number for kind, number in counts.items()})


def aliases_move(context: ctl.Context) -> None:
    """Let all aliases of a user lead to another."""
    options, database = context.options, context.database
    old, new = ctl.read_username(options.old_user), ctl.read_username(options.new_user)
    select = "SELECT alias_email, username, enabled FROM aliases WHERE lower(username) = ? ORDER BY alias_email"

    def find() -> list[Change]:
        rows = database.execute(select, (old,)).fetchall()
        return [Change(row[0], row[1], row[2], new, row[2]) for row in rows if row[1] != new]

    changes = ctl.patiently(find)
    if not changes:
        raise ctl.Refused(f"aliases: no alias leads to {old}, aliases list shows who has any")
    for change in changes:
        ctl.refuse_names(context, change.address, new)
    asked = changes if len(changes) <= MAX_ASKED else None
    ask_about(context, asked)
    with ctl.transaction(database):
        if find() != changes:
            raise ctl.Refused("aliases: another program has changed them meanwhile; nothing was changed, try again")
        apply(database, changes)
        for change in asked or () if not options.force else ():
            ctl.refuse_chain(context, change.address, new)
    note("aliases: move", changes, old, {"change": len(changes)})
    addresses = [change.address for change in changes]
    lead = "alias now leads" if len(changes) == 1 else "aliases now lead"
    ctl.answer(context, addresses, f"aliases: {len(changes)} {lead} to {new}: {ctl.shorten(addresses)}", username=new, before=old)


def aliases_export(context: ctl.Context) -> None:
    """Write all aliases to a file, or to standard output."""
    options = context.options
    form = find_format(options.format, options.file, options.usernames)
    database = context.database
    with contextlib.closing(open_staging()) as staging:
        with reading(database):  # and not longer: who reads our output may be slow
            staging.executemany("INSERT INTO stored VALUES (?, ?, ?)", rows_of(database, SELECT_STORED))
        if isinstance(form, (Virtual, PostfixAdmin)):
            count_unholdable(staging, form, skip=options.skip_bad)
        lines = export_lines(staging, form)
        if options.file == "-":
            write_lines(lines, sys.stdout.buffer)
            return
        umask = os.umask(0)
        os.umask(umask)
        try:
            with replacing(options.file, 0o666 & ~umask) as new, open(new, "wb") as file:
                write_lines(lines, file)
        except OSError as exc:
            raise ctl.Refused(f"aliases: {options.file!r} cannot be written: {exc.strerror}; what was there stays") from exc


def count_unholdable(staging: sqlite3.Connection, form: Format, *, skip: bool) -> None:
    """Say which aliases the format cannot hold; raises Refused where there are any, unless they may be left out."""
    count = 0
    for row in watch(rows_of(staging, "SELECT * FROM stored"), "looked at"):
        try:
            form.write(row)
        except ValueError as exc:
            ctl.say(f"aliases: {row[0]} cannot be in this file: {exc}")
            count += 1
    if count and not skip:
        raise ctl.Refused(
            f"aliases: {count} cannot be in this file, nothing was written; use another --format, or leave them out with --skip-bad"
        )


def export_lines(staging: sqlite3.Connection, form: Format) -> Iterator[str]:
    """The lines of the file, but those that the format cannot hold."""
    yield form.head
    for row in watch(rows_of(staging, "SELECT * FROM stored ORDER BY rowid"), "written"):
        with contextlib.suppress(ValueError):
            yield form.write(row)


def write_lines(lines: Iterator[str], file: IO[bytes]) -> None:
    """Write the lines as UTF-8, many at a time."""
    while batch := list(itertools.islice(lines, BATCH_ROWS)):
        file.write("".join(batch).encode())
    file.flush()
