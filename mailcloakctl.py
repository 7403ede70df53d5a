#!/usr/bin/env python3
# mailcloakctl: change the aliases and apps of mailcloak, ask the daemon, check the installation. MIT licence, see LICENSE.
"""Edit the aliases and apps of mailcloak, ask the running daemon, and check the whole installation; by hand and from cron jobs.

  mailcloakctl aliases add ADDRESS USERNAME     an address that leads to a user's mailbox
  mailcloakctl aliases sync FILE                make the aliases equal to a file
  mailcloakctl apps add APP_ID --generate       a login that may send, and only as the addresses it is allowed
  mailcloakctl apps allow APP_ID ADDRESS

  mailcloakctl ask recipient ADDRESS            what the daemon answers, and step by step why
  mailcloakctl status                           what the daemon has answered so far, and how it is
  mailcloakctl doctor                           what is wrong with the installation, and what to do next
  mailcloakctl flush [ADDRESS]                  have the daemon forget which users it has cached

  mailcloakctl backup FILE, restore FILE        copy the database, and bring it back
  mailcloakctl db check                         what is wrong in the database
  mailcloakctl db mirror SOURCE                 make the database equal to that of another host, and stay so with --watch

The database is --db, else sqlite.path of the configuration, else /var/lib/mailcloak/state.db. A change counts from the next answer
of the daemon; nothing has to be reloaded. The daemon is asked over the two sockets that the configuration names; the configuration
is --config, else /etc/mailcloak/config.yaml.

Exit codes: 0 done, or already so; 1 refused, not found or not possible, and then nothing was changed; 2 usage; 3 a safety limit
stopped it. ask: 0 whatever the answer was. doctor: 0 all is well, 1 there are warnings, 2 there are problems, 3 it could not run,
or its command line is wrong.

The checks of doctor are in mailcloakdoctor.py beside this file, and explained there; what works with files is in mailcloakdata.py,
and what keeps the databases of several mail hosts equal in mailcloakmirror.py.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() waits for it, Ctrl-C ends the program without a traceback

import argparse
import base64
import collections
import contextlib
import datetime
import errno
import functools
import importlib
import io
import itertools
import json
import os
import pwd
import re
import shlex
import shutil
import socket
import sqlite3
import stat
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, TypeVar, Union

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # mailcloak.py lies beside this file, also behind a symlink

import mailcloak
import mailcloakowner

if TYPE_CHECKING:
    import mailcloakdoctor

Columns = dict[str, Callable[[Any], str]]  # the columns of a table, each with the function that makes its value readable

EXIT_DONE, EXIT_REFUSED, EXIT_OVER_LIMIT = 0, 1, 3  # 2 is argparse's
BUSY_SECONDS = 60.0  # how long to wait for another mailcloakctl that is writing
STATEMENT_STEPS = 1_000_000  # of SQLite's virtual machine, some 20 ms
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # each ends a command as Ctrl-C does, which clears up
INTERRUPT_SECONDS = 0.2  # how long SQLite may wait at a time: Ctrl-C counts only between two waits
GENERATED_TOKEN_BYTES = 32
GENERATED_ITERATIONS = 4096  # 256 random bits cannot be guessed, however fast a guess is checked
CHOSEN_ITERATIONS = 100_000  # Dovecot checks one login at a time: more would let wrong logins delay good ones
SHORT_TOKEN_CHARS = 16
LEAST_TOKEN_CHARS = 8

ANSWER_SECONDS = 10.0  # the longest wait for what may hang: a socket, a command, a request to Keycloak
MAX_ANSWER_BYTES = 16 * 1024 * 1024  # of the daemon; its statistics are about 10 kB
MAX_TARGETS = 1000  # of an alias: virtual_alias_expansion_limit of Postfix
MAX_TARGETS_BYTES = 90_000  # socketmap_table(5) takes an answer of 100,000; an extension may come to each mailbox
MAX_ASKED_CHARS = 2000  # of an address to ask about; an SMTP line of Postfix holds 2048 (line_length_limit)
SHOWN_ITEMS = 10  # of a long enumeration
ROLE_SECONDS = 2.0  # how long to wait for a commit before the role of a database is read
WATCH_SECONDS = 2.0  # between two looks of status --watch


class Refused(mailcloak.MailcloakError):
    """The command cannot be done as asked; nothing was changed."""

    joiner = "; "
    exit_code = EXIT_REFUSED


class OverLimit(Refused):
    """A safety limit stopped the command."""

    exit_code = EXIT_OVER_LIMIT


class NotAllowed(Refused):
    """The daemon says that this user may not ask for that."""


class InGrace(Refused):
    """A user may have the name: Keycloak has just taken that back."""


class NoAnswer(Refused):
    """The daemon was asked and has not answered; it may have done what it was asked all the same."""


class OtherVersion(Refused):
    """The running daemon is of another version than this program, so its statistics and explanations cannot be read."""


class Context:
    """What a command works with, each part read at its first use: a command needs few of them."""

    def __init__(self, options: argparse.Namespace, *, create: bool) -> None:
        self.options, self.creates = options, create

    @functools.cached_property
    def _configuration(self) -> tuple[dict[str, Any], list[mailcloak.Problem]]:
        return mailcloak.read_blocks(self.options.config or mailcloak.DEFAULT_CONFIG_PATH)

    def _block(self, name: str) -> Any:
        """One block of the configuration, whatever is wrong with the others. Raises ConfigError."""
        blocks, problems = self._configuration
        if name not in blocks:
            raise mailcloak.ConfigError([problem for problem in problems if problem.key.partition(".")[0] == name])
        return blocks[name]

    @functools.cached_property
    def path(self) -> str:
        """The path of the database: --db, else sqlite.path of the configuration, else the default. Raises ConfigError."""
        if self.options.db:
            return str(os.path.abspath(self.options.db))
        if not self.options.config and not os.path.exists(mailcloak.DEFAULT_CONFIG_PATH):
            return mailcloak.DEFAULT_DATABASE_PATH
        return str(self._block("sqlite").path)

    @functools.cached_property
    def policy(self) -> Optional[mailcloak.PolicyConfig]:
        """None where no configuration says which domains are ours; what is wrong with it is reported by the daemon."""
        policy: Optional[mailcloak.PolicyConfig] = None
        with contextlib.suppress(mailcloak.ConfigError):
            if self.options.config or (not self.options.db and os.path.exists(mailcloak.DEFAULT_CONFIG_PATH)):
                policy = self._block("policy")
        return policy

    @functools.cached_property
    def database(self) -> sqlite3.Connection:
        """The database, opened at its first use: arguments are checked before, so that a refused command does not create it."""
        return open_database(self.path, create=self.creates)

    def replication(self) -> Optional[dict[str, Any]]:
        """How the database stands to those of other mail hosts, as read_replication() says. Raises ConfigError."""
        return read_replication(self.path, self._block("replication").max_lag_seconds)

    @functools.cached_property
    def daemon(self) -> RunningDaemon:
        """The daemon whose sockets the configuration names. Raises ConfigError."""
        sockets, keycloak = self._block("sockets"), self._configuration[0].get("keycloak")
        seconds = ANSWER_SECONDS + (keycloak or mailcloak.KeycloakConfig).timeout_seconds
        return RunningDaemon(sockets, seconds, where_log(self._configuration[0].get("daemon")))

    def close(self) -> None:
        """Close the database, if the command has opened it."""
        if "database" in self.__dict__:
            self.database.close()


# ---------------------------------------------------------------------------------------------------------------------------------
# Arguments: text that was typed, to values that may be stored
# ---------------------------------------------------------------------------------------------------------------------------------


def read_address(text: str) -> str:
    """An address that may be stored, in the form in which it is looked up."""
    try:
        return mailcloak.parse_plain_address(text).text
    except ValueError as exc:
        raise Refused(f"{text!r} is not an address for this: {exc}") from None


def read_addresses(words: Sequence[str]) -> list[str]:
    """Addresses that may be stored, each once; "-" stands for the lines of standard input."""
    found: dict[str, None] = {}
    for word in words:
        try:
            lines = sys.stdin.buffer.read().decode("utf-8").splitlines() if word == "-" else [word]
        except UnicodeDecodeError:
            raise Refused("standard input is not UTF-8") from None
        found.update(dict.fromkeys(read_address(line.strip()) for line in lines if word != "-" or line.strip()))
    return list(found)


def read_domain(text: str) -> str:
    """A domain in the form in which addresses have it."""
    try:
        return mailcloak.parse_plain_address(f"postmaster@{text}").domain
    except ValueError:
        raise Refused(f"{text!r} is not a domain") from None


def read_sender(text: str) -> str:
    """An address that an app may send from; '<>' is the null sender, stored as the empty string."""
    if text.startswith("*@"):
        raise Refused(f"apps: {text} would stand for a whole domain, which is not supported: name each address")
    return "" if text == "<>" else read_address(text)


def read_username(text: str) -> str:
    """A username as Keycloak has it, in lower case."""
    if not text.strip() or not text.isprintable():
        raise Refused(f"{text!r} is not a username: it cannot be empty or hold control characters")
    if len(text) > mailcloak.MAX_ADDRESS_CHARS:
        raise Refused(f"a username cannot be longer than {mailcloak.MAX_ADDRESS_CHARS} characters")
    return text.strip().lower()


def read_app_id(text: str) -> str:
    """An app id in lower case, of the characters that Dovecot lets through to its query (auth_username_chars)."""
    if not re.fullmatch(r"[A-Za-z0-9._@-]{1,254}", text):
        # without showing what may be a TOKEN that changed places with APP_ID
        raise Refused("APP_ID is not an app id: it takes 1 to 254 letters a-z, digits and . _ - @")
    return text.lower()


def read_days(text: str) -> Optional[int]:
    """How many days "90d" is; None for other text."""
    days = re.fullmatch(r"([1-9][0-9]{0,4})d", text, re.ASCII)
    return int(days[1]) if days else None


def read_expiry(text: str) -> Optional[int]:
    """Seconds since 1970 from which an app no longer counts: the end of that day, or of the day in so many days; None for "never"."""
    if text == "never":
        return None
    days = read_days(text)
    try:
        day = datetime.date.today() + datetime.timedelta(days) if days else datetime.date.fromisoformat(text)
        midnight = datetime.datetime.combine(day + datetime.timedelta(days=1), datetime.time())
        seconds = int(midnight.timestamp())  # in the zone of this host
    except (ValueError, OverflowError):
        raise Refused(f"{text!r} is not a date such as 2027-01-31, a number of days such as 90d, or never") from None
    if seconds <= time.time():
        raise Refused(f"{text} is in the past; apps disable takes an app out of use at once")
    return seconds


def check_token(token: str) -> str:
    """The token itself; raises Refused for one that cannot be typed, warns about one that can be guessed."""
    if not token or not token.isprintable():
        raise Refused("a token cannot be empty or hold control characters, --generate makes a good one")
    if len(token) < LEAST_TOKEN_CHARS:
        raise Refused(f"a token of {len(token)} characters is too short: use at least {LEAST_TOKEN_CHARS}, or --generate")
    if len(token) < SHORT_TOKEN_CHARS:
        say(f"warning: a token of {len(token)} characters can be guessed, --generate makes a strong one")
    return token


def hash_token(token: str, iterations: int, salt: bytes) -> str:
    """The token as Dovecot stores it in the scheme SCRAM-SHA-256 (RFC 5802, section 3; RFC 7677)."""
    import hashlib
    import hmac

    salted = hashlib.pbkdf2_hmac("sha256", token.encode(), salt, iterations)
    stored_key = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server_key = hmac.digest(salted, b"Server Key", "sha256")
    parts = [base64.b64encode(part).decode("ascii") for part in (salt, stored_key, server_key)]
    return "{SCRAM-SHA-256}" + ",".join([str(iterations), *parts])


def is_hash_of(token: str, secret_hash: str) -> bool:
    """Is this the hash of the token? Only of one in the scheme above can that be told."""
    parts = re.fullmatch(r"\{SCRAM-SHA-256\}([0-9]{1,7}),([A-Za-z0-9+/]+=*),[^,]+,[^,]+", secret_hash)
    try:
        return parts is not None and hash_token(token, int(parts[1]), base64.b64decode(parts[2])) == secret_hash
    except ValueError:
        return False


def read_token(options: argparse.Namespace) -> str:
    """The token that the user chose: an argument, a line of standard input, or typed twice on the terminal."""
    if options.token_stdin and not sys.stdin.isatty():
        try:
            return check_token(sys.stdin.buffer.readline().decode("utf-8").rstrip("\r\n"))
        except UnicodeDecodeError:
            raise Refused("the token on standard input is not UTF-8, --generate makes a good one") from None
    if options.token is not None:
        return check_token(options.token)
    if not sys.stdin.isatty():
        raise Refused("no token: name one, or use --generate or --token-stdin")
    import getpass

    try:
        token = getpass.getpass(f"token of {options.app_id}: ")
        again = getpass.getpass("again: ")
    except EOFError:
        raise Refused("no token: type it twice, or use --generate") from None
    if token != again:
        raise Refused("the two tokens differ, try again or use --generate")
    return check_token(token)


# ---------------------------------------------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------------------------------------------


def say(message: str) -> None:
    """A line for people: standard output belongs to lists and generated tokens."""
    with contextlib.suppress(OSError):  # without a reader of this line the command does the same
        print(shown_text(message), file=sys.stderr)


def shown_sender(sender: str) -> str:
    """An app's sender as it is typed: '<>' for the null sender."""
    return sender or "<>"


def shown_time(seconds: Any) -> str:
    """A time in seconds since 1970, in the zone of this host; "-" for None."""
    if seconds is None:
        return "-"  # where time.localtime() would take the time it is now
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (TypeError, ValueError, OverflowError, OSError):
        return str(seconds)  # a row that another program wrote


def shown_text(text: Any) -> str:
    """Text that may come from anywhere, with control characters escaped: it moves no cursor and forges no line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def shown_seconds(seconds: float) -> str:
    """A span of time in its two greatest units."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    index = next((index for index, (size, _) in enumerate(units) if seconds >= size), 0)  # 0: not a number, said by another program
    (size, unit), (lesser_size, lesser_unit) = units[index : index + 2]
    return f"{seconds // size:.0f} {unit} {seconds % size // lesser_size:.0f} {lesser_unit}"


def real_paths(text: str) -> str:
    """The text with share/doc/mailcloak as it is called here: where make install, a copy of the sources, or pip has put it."""
    here = os.path.dirname(os.path.realpath(__file__))
    places = (os.path.join(os.path.dirname(here), "doc", "mailcloak"), here, os.path.join(sys.prefix, "share", "doc", "mailcloak"))
    documents = next((place for place in places if os.path.isdir(os.path.join(place, "examples"))), "share/doc/mailcloak")
    return text.replace("share/doc/mailcloak", documents)


def counted(items: Union[Sized, int], one: str, many: str = "") -> str:
    """How many there are, in words; items: they, or their number."""
    number = items if isinstance(items, int) else len(items)
    return f"{number} {one if number == 1 else many or one + 's'}"


def shorten(items: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(items) - SHOWN_ITEMS} more" if len(items) > SHOWN_ITEMS else ""
    return ", ".join(items[:SHOWN_ITEMS]) + more


def answer(context: Context, changed: Sequence[str], *texts: str, **values: Any) -> None:
    """Say what was done, or with --json print it: which aliases or apps were changed, and the values.

    That it cannot be printed is said, and no failure: it is done.
    """
    if context.options.json:
        print_done(lambda: print_json({"changed": bool(changed), context.options.noun: list(changed), **values}))
    else:
        for text in texts:
            say(text)


def print_done(show: Callable[[], None]) -> None:
    """Print what was done; where that fails, say so, and go on."""
    error = try_to_print(show)
    if error and not isinstance(error, BrokenPipeError):
        say(f"warning: it is done, but cannot be shown: {error.strerror or error}")


def show_progress(text: str) -> None:
    """A line on the terminal that says how far a long command has come, "" for none; nothing where standard error is no terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def print_list(options: argparse.Namespace, rows: Sequence[dict[str, Any]], columns: Columns) -> None:
    """The rows as a table, or as one JSON array with all that is in them."""
    if options.json:
        print_json(rows)
        return
    table = [[name.upper().replace("_", " ") for name in columns]]
    table += [[shown_text(show(row[name])) for name, show in columns.items()] for row in rows]
    print_table(table)


def print_json(value: Any) -> None:
    """In ASCII, so that any locale can print it."""
    print(json.dumps(value, indent=2, default=repr))


def terminal_width() -> Optional[int]:
    """The width of the terminal that standard output is; None where it is none: what programs read is never cut."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_table(table: Sequence[Sequence[str]]) -> None:
    """Nothing where there is only a heading."""
    for line in format_table(table, terminal_width()) if len(table) > 1 else ():
        print(line)


def format_table(table: Sequence[Sequence[str]], width: Optional[int]) -> Iterator[str]:
    """The lines of a table that begins with its heading; where it is too wide, the widest columns go on in further lines.

    No word is cut: an address must stay whole to be copied, so a line may be longer than the terminal is wide.
    """
    columns = list(zip(*table))
    widths = [max(map(len, column)) for column in columns]
    longest_words = [max((len(word) for text in column for word in text.split()), default=0) for column in columns]
    while width and sum(widths) + 2 * (len(widths) - 1) > width:
        wide = [index for index, least in enumerate(longest_words) if widths[index] > least]
        if not wide:
            break
        widths[max(wide, key=widths.__getitem__)] -= 1
    for row in table:
        cells = [wrap(text, cell_width) for text, cell_width in zip(row, widths)]
        for parts in itertools.zip_longest(*cells, fillvalue=""):
            yield "  ".join(part.ljust(cell_width) for part, cell_width in zip(parts, widths)).rstrip()


def wrap(text: str, width: Optional[int]) -> list[str]:
    """The text in lines of at most width characters, but for longer words; in one where width is None."""
    if not width or len(text) <= width:
        return [text]
    return textwrap.wrap(text, max(1, width), break_on_hyphens=False, break_long_words=False) or [""]


def hang(head: str, text: str, width: Optional[int]) -> list[str]:
    """Lines of the head and its text, which goes on below itself where the width ends."""
    first, *rest = wrap(shown_text(text), max(20, width - len(head)) if width else None)
    return [head + first, *(" " * len(head) + line for line in rest)]


def print_field(label: str, text: str) -> None:
    """One line of label and text, which goes on below itself where the terminal ends."""
    print("\n".join(hang(f"{label:<15}", text, terminal_width())))


GREEN, YELLOW, RED, BOLD = "32", "33", "31", "1"


def paint(text: str, colour: str) -> str:
    """The text in a colour ("" for none), on a terminal that wants colours (https://no-color.org)."""
    wanted = colour and sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
    return f"\x1b[{colour}m{text}\x1b[0m" if wanted else text


def yes_no(value: Any) -> str:
    """The state of a row in words: only 1 counts as enabled."""
    return "yes" if value == 1 else "no"


# ---------------------------------------------------------------------------------------------------------------------------------
# The database
# ---------------------------------------------------------------------------------------------------------------------------------


Result = TypeVar("Result")


class Origin(NamedTuple):
    """Where the rows of a database on several mail hosts come from: the row of its table origin, which mailcloakmirror.py makes."""

    role: str  # "writer": changes are made here; "follower": they come from the writer
    writer: str  # its id, random
    host: str  # its name
    epoch: int  # 1 for the first writer, one more for each that was promoted
    serial: int  # rises with each change
    published_at: int  # when the writer said that these are its rows, in seconds since 1970
    digest: str  # of all rows, and of whose they are; "" in the database of the writer itself
    file: str  # where the writer publishes its rows, or where the follower has them from


def find_origin(database: sqlite3.Connection, schema: str = "main") -> Optional[Origin]:
    """None for a database of one host alone; raises sqlite3.Error. A view does not count: its rows may have no end."""
    if not database.execute(f"SELECT 1 FROM {schema}.sqlite_master WHERE name = 'origin' AND type = 'table'").fetchone():  # noqa: S608
        return None
    numbers = ("epoch", "serial", "published_at")
    columns = [f"CAST({name} AS {'INTEGER' if name in numbers else 'TEXT'})" for name in Origin._fields]
    row = database.execute(f"SELECT {', '.join(columns)} FROM {schema}.origin").fetchone()  # noqa: S608
    if row and (None in row or row[0] not in ("writer", "follower") or not all(0 <= number < 2**62 for number in row[3:6])):
        raise sqlite3.DatabaseError("its origin makes no sense")
    return Origin(*row) if row else None


# What to do where what was brought or published last is too old.
LATE_REMEDIES = {
    "follower": "if other followers are late too, look on the writer: mailcloak-publish, mailcloak-replicate; else on this host:"
    " mailcloak-follow, mailcloak-mirror; restart what stands still, its log may say more",
    "writer": "start mailcloak-publish on this host again, its log says more; if another host is the writer now, let this one follow it",
}


def read_replication(path: str, max_lag_seconds: float) -> Optional[dict[str, Any]]:
    """How the database stands to those of other mail hosts; None where it cannot be read.

    role is "single", "writer" or "follower"; age_seconds that of what was brought or published last, None where that is not known, as by
    clocks that differ: a time in the future would hide a stall until then.
    """
    try:
        with contextlib.closing(mailcloakowner.connect(path, ROLE_SECONDS)) as database:
            origin = find_origin(database)
    except mailcloak.SQLITE_ERRORS:
        return None
    if origin is None:
        return {"role": "single"}
    last = find_published(origin, path) if origin.role == "writer" else origin
    now = time.time()
    age = max(0.0, round(now - last.published_at, 1)) if last and last.published_at <= now + max_lag_seconds else None
    return {
        **{name: getattr(last or origin, name) for name in ("host", "writer", "epoch", "serial")},
        "role": origin.role,
        "age_seconds": age,
        "max_lag_seconds": max_lag_seconds,
        "late": age is None or age > max_lag_seconds,
    }


def find_published(origin: Origin, path: str) -> Optional[Origin]:
    """The origin in the file that the writer publishes; None where there is none of this writer. path: of the database that names it."""
    with contextlib.suppress(*mailcloak.SQLITE_ERRORS, OSError):
        with (
            mailcloakowner.acting_as_owner_of(path),
            contextlib.closing(mailcloakowner.connect(origin.file, ROLE_SECONDS)) as database,
        ):
            published = find_origin(database)
        if published and (published.writer, published.epoch) == (origin.writer, origin.epoch):
            return published
    return None


def describe_replication(replication: dict[str, Any]) -> str:
    """The role of this host in words, where there are several."""
    age = replication["age_seconds"]
    if replication["role"] == "writer":
        when = "has published nothing yet" if age is None else f"published for mailcloak-replicate {shown_seconds(age)} ago"
        return f"the writer (epoch {replication['epoch']}), {when}"
    when = "a time in the future, so its clock or that of this host is wrong" if age is None else f"{shown_seconds(age)} ago"
    return f"follows {replication['host']} (epoch {replication['epoch']}, serial {replication['serial']}), as of {when}"


@contextlib.contextmanager
def transaction(database: sqlite3.Connection, *, of_mirror: bool = False) -> Iterator[None]:
    """All or nothing; waits for its turn where another command is writing. Only db mirror and db promote write to a follower's."""
    patiently(lambda: database.execute("PRAGMA synchronous = EXTRA"))  # see mailcloak.SavedUsers._save()
    patiently(lambda: database.execute("BEGIN IMMEDIATE"))
    try:
        origin = None if of_mirror else find_origin(database)
        if origin and origin.role == "follower":
            text = f"this database follows that of {origin.host}, nothing was changed"
            raise Refused(text, "make the change there; if that host is lost, mailcloakctl db promote makes this one the writer")
        yield
        patiently(lambda: commit(database))
    except BaseException:
        if database.in_transaction:  # on a full disk SQLite has rolled back by itself
            database.execute("ROLLBACK")
        raise


def commit(database: sqlite3.Connection) -> None:
    """From here on a signal comes too late, until main() ends: the change is said, and noted in syslog."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        database.execute("COMMIT")
    except BaseException:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        raise


def patiently(step: Callable[[], Result]) -> Result:
    """What the step returns, done again until the lock of another program on the database is gone, or BUSY_SECONDS are over."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return step()
        except (*mailcloak.SQLITE_ERRORS, mailcloak.DatabaseUnavailable) as exc:
            if mailcloak.sqlite_fault(exc) != "busy" or time.monotonic() > deadline:
                raise


def open_database(path: str, *, create: bool) -> sqlite3.Connection:
    """The database with its schema; raises Refused. create says whether the command may make a file that is missing."""
    try:
        os.stat(path)
    except FileNotFoundError:
        if not create and os.path.exists(mailcloak.last_known_path(path)):
            raise Refused(f"database {path!r} is missing, though a daemon has run on it", "restore it from a backup") from None
        if not create:
            raise Refused(f"database {path!r} does not exist yet, aliases add and apps add create it; --db names another") from None
    except OSError as exc:
        raise Refused(f"database {path!r}: {exc.strerror}", database_remedy(exc, path)) from exc
    try:
        done = patiently(lambda: mailcloakowner.prepare(path, INTERRUPT_SECONDS, create=create))
        if done:
            say(f"database {path} {done}")
        database = mailcloakowner.connect(path, INTERRUPT_SECONDS)
    except mailcloak.StartError as exc:
        raise Refused(str(exc), database_remedy(exc, path) if mailcloak.sqlite_fault(exc) else "") from exc
    except mailcloak.DatabaseUnavailable as exc:
        raise Refused(exc.text, exc.remedy or database_remedy(exc, path)) from exc
    database.row_factory = sqlite3.Row
    # Python sees a signal here, though SQLite works for long; the statement then ends as interrupted.
    database.set_progress_handler(lambda: 0, STATEMENT_STEPS)
    return database


# No chown or chmod: it would change the file that the link leads to, whoever has made the link.
LINK_REMEDY = "this is a link: if the file it leads to is the right one, name that in sqlite.path; else delete the link"


def database_remedy(exc: BaseException, path: str) -> str:
    """The way out of an error of the database, from what SQLite and the file system say about it."""
    fault = mailcloak.sqlite_fault(exc)
    if fault == "busy":
        return "another program is writing, try again when it is done"
    if os.path.isdir(path):
        return "this is a directory, name the file in it with --db or sqlite.path"
    with contextlib.suppress(OSError):  # its directory may not be entered
        disk = os.statvfs(os.path.dirname(path))
        if disk.f_flag & os.ST_RDONLY:
            return "its file system is mounted read-only, mount it for writing"
        if fault == "full" or not disk.f_favail or not disk.f_bavail:
            return "make room on its disk and try again"
    if os.path.islink(path):
        return LINK_REMEDY
    shared = re.search("below (/.*), which others may write", str(exc))
    if shared and os.stat(shared[1]).st_mode & stat.S_ISVTX:  # /tmp and the like are for all
        return "name a database in a directory that only root, or one user, may write"
    if shared:
        return f"chmod go-w {shlex.quote(shared[1])}, or name a database in another directory"
    user, file_user = (owner_name(place) if os.path.exists(place) else "" for place in (os.path.dirname(path), path))
    if os.geteuid() == 0 and file_user not in (user, ""):  # root acts as the first
        return f"chown the file to {user}, who owns its directory and has to read it"
    readable = os.access(path, os.R_OK | os.W_OK) and os.access(os.path.dirname(path), os.W_OK | os.X_OK)
    if not readable:
        return f"run mailcloakctl as {owner_name(path)}, who owns this database, or as root"
    return "name the right one with --db or sqlite.path, or restore this one from a backup"


def owner_name(path: str) -> str:
    """Who owns the file, or as much of its path as can be seen."""
    while path != "/":
        with contextlib.suppress(OSError):
            uid = os.stat(path).st_uid
            try:
                return f"user {pwd.getpwuid(uid).pw_name}"
            except KeyError:
                return f"user id {uid}"
        path = os.path.dirname(path)
    return "root"


def named_rows(context: Context) -> tuple[str, str, list[str]]:
    """Table, key column and keys of the aliases or of the app that the arguments name."""
    if context.options.noun == "aliases":
        return "aliases", "alias_email", read_addresses(context.options.addresses)
    return "apps", "app_id", [read_app_id(context.options.app_id)]


def fetch_rows(context: Context, table: str, column: str, keys: Sequence[str]) -> dict[str, Any]:
    """The rows by their keys; raises Refused unless all are there."""
    select = f"SELECT * FROM {table} WHERE {column} = ?"  # noqa: S608  two names of this file
    rows = {key: context.database.execute(select, (key,)).fetchone() for key in keys}
    absent = [key for key, row in rows.items() if row is None]
    if absent:
        verb = "does" if len(absent) == 1 else "do"
        raise Refused(f"{table}: {shorten(absent)} {verb} not exist, {table} list shows what does")
    return rows


def note_change(event: str, key: str, **values: Any) -> None:
    """A line in syslog (facility mail) for a change that was made: who made it, the old value and the new one; never a token."""
    import syslog

    values = {**values, "uid": os.getuid(), "sudo_user": os.environ.get("SUDO_USER")}
    texts = [f"{name}={mailcloak.escape_for_log(str(value))}" for name, value in values.items() if value is not None]
    syslog.openlog("mailcloakctl", syslog.LOG_PID, syslog.LOG_MAIL)
    syslog.syslog(syslog.LOG_NOTICE, " ".join([event, f"<{mailcloak.escape_for_log(key)}>", *texts]))


def set_enabled(context: Context) -> None:
    """Enable or disable aliases or an app."""
    table, column, keys = named_rows(context)
    enabled = context.options.verb == "enable"
    word = "enabled" if enabled else "disabled"
    touch = ", updated_at = strftime('%s', 'now')" if table == "aliases" else ""
    with transaction(context.database):
        changed = [key for key, row in fetch_rows(context, table, column, keys).items() if row["enabled"] != enabled]
        update = f"UPDATE {table} SET enabled = ?{touch} WHERE {column} = ?"  # noqa: S608
        context.database.executemany(update, [(int(enabled), key) for key in changed])
    for key in changed:
        note_change(f"{table}: {context.options.verb}", key)
    warn_of_jobs(context, changed)
    answer(context, changed, *(f"{table}: {key} {word if key in changed else f'is {word} already'}" for key in keys))


def warn_of_jobs(context: Context, aliases: Sequence[str]) -> None:
    """Say whose aliases these are, where a job made them, whose next run makes them again as its file says."""
    if context.options.noun == "aliases":
        for address in aliases:
            row = context.database.execute("SELECT source FROM aliases WHERE alias_email = ?", (address,)).fetchone()
            if row and row["source"]:
                say(f"warning: {address} belongs to the job {row['source']}, whose next run may undo this: change its file")


def delete(context: Context) -> None:
    """Delete aliases, or an app with its addresses."""
    table, column, keys = named_rows(context)
    warn_of_jobs(context, keys)
    with transaction(context.database):
        rows = fetch_rows(context, table, column, keys)
        found = {key: find_alias(context.database, key) for key in keys} if table == "aliases" else {}
        targets = {key: shown_targets(alias) for key, alias in found.items() if alias}
        context.database.executemany(f"DELETE FROM {table} WHERE {column} = ?", [(key,) for key in keys])  # noqa: S608
    for key in rows:
        note_change(f"{table}: del", key, username=targets.get(key))
    answer(context, keys, *(f"{table}: {key} deleted" for key in keys))


# ---------------------------------------------------------------------------------------------------------------------------------
# aliases
# ---------------------------------------------------------------------------------------------------------------------------------


# the targets of all aliases, each with the address
ALL_TARGETS = (
    "(SELECT alias_email, username, external FROM aliases UNION ALL SELECT alias_email, target, external FROM alias_targets"
    " WHERE alias_email IN (SELECT alias_email FROM aliases))"
)
ALIAS_USERS = f"(SELECT alias_email, username FROM {ALL_TARGETS} WHERE external <> 1)"  # noqa: S608


AliasChange = tuple[str, Optional[mailcloak.Alias], mailcloak.Alias]  # address, what is stored, what is to be


class Stored(NamedTuple):
    """An alias to be stored."""

    address: str
    alias: mailcloak.Alias
    source: Optional[str] = None  # the job that owns it from now on; None keeps what is stored


def store_aliases(database: sqlite3.Connection, aliases: Sequence[Stored]) -> None:
    """Write aliases, in place of those with the same addresses: the first target in the table aliases, all others in alias_targets."""
    rows, further = [], []
    for address, (users, enabled, external, receive_only), source in aliases:
        targets = [(user, 0) for user in users] + [(other, 1) for other in external]
        rows.append((address, *targets[0], int(enabled), int(receive_only), source))
        if len(targets) > 1:
            further += [(address, *target) for target in targets[1:]]
    if database.execute("SELECT 1 FROM alias_targets").fetchone():
        database.executemany("DELETE FROM alias_targets WHERE alias_email = ?", [(row[0],) for row in rows])
    database.executemany(
        "INSERT INTO aliases (alias_email, username, external, enabled, receive_only, source) VALUES (?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (alias_email) DO UPDATE SET username = excluded.username, external = excluded.external,"
        " enabled = excluded.enabled, receive_only = excluded.receive_only, source = COALESCE(excluded.source, source),"
        " updated_at = excluded.updated_at",
        rows,
    )
    database.executemany("INSERT INTO alias_targets (alias_email, target, external) VALUES (?, ?, ?)", further)


def find_alias(database: sqlite3.Connection, address: str) -> Optional[mailcloak.Alias]:
    """The alias that is stored for this address."""
    row = database.execute(f"SELECT {mailcloak.ALIAS_COLUMNS} FROM aliases WHERE alias_email = ?", (address,)).fetchone()  # noqa: S608
    return mailcloak.read_alias(*row) if row else None


def shown_targets(alias: mailcloak.Alias) -> str:
    """What an alias leads to, in one line: its users, then addresses elsewhere, which stand in angle brackets."""
    return ", ".join([*alias.users, *(f"<{address}>" for address in alias.external)])


def aliases_add(context: Context) -> None:
    """Let an address lead to a user, or to several."""
    options = context.options
    wanted = read_targets(context, read_address(options.address), receive_only=options.receive_only)

    def decide(address: str, before: Optional[mailcloak.Alias]) -> mailcloak.Alias:
        after = wanted._replace(enabled=before.enabled if before else True)
        if before and before != after and not options.replace:
            receives = ", which only receives," if before.receive_only else ""
            raise Refused(f"aliases: {address} leads to {shown_targets(before)}{receives} already, --replace changes that")
        return after

    change_alias(context, decide)


def aliases_add_user(context: Context) -> None:
    """Let an alias lead to further users as well."""
    wanted = read_targets(context, read_address(context.options.address))

    def decide(address: str, before: Optional[mailcloak.Alias]) -> mailcloak.Alias:
        if not before:
            raise Refused(f"aliases: {address} does not exist, aliases add makes it")
        users, external = (
            tuple(sorted({*old, *new})) for old, new in ((before.users, wanted.users), (before.external, wanted.external))
        )
        return before._replace(users=users, external=external)

    change_alias(context, decide)


def aliases_remove_user(context: Context) -> None:
    """Let an alias with several targets no longer lead to some of them."""
    options = context.options
    names = {read_username(name.strip("<>")) for name in options.users}

    def decide(address: str, before: Optional[mailcloak.Alias]) -> mailcloak.Alias:
        if not before:
            raise Refused(f"aliases: {address} does not exist, aliases list shows what does")
        users, external = (tuple(name for name in old if name not in names) for old in (before.users, before.external))
        if not users and not external:
            raise Refused(f"aliases: {address} would lead to nobody, aliases del {address} deletes it")
        return before._replace(users=users, external=external)

    change_alias(context, decide)


def read_targets(context: Context, address: str, *, receive_only: bool = False) -> mailcloak.Alias:
    """The alias that the arguments describe; raises Refused for names that it cannot have.

    With --external a name with @ is an address elsewhere, unless it is in one of our domains.
    """
    names = [name.strip("<>") for name in context.options.users]
    own = context.policy.domain if context.policy else {address.rpartition("@")[2]}
    is_elsewhere = {name: "@" in name and mailcloak.normalise_address(name).domain not in own for name in names}
    external = {read_external(context, name) for name in names if is_elsewhere[name]} if context.options.external else set()
    users = {read_username(name) for name in names if not (is_elsewhere[name] and context.options.external)}
    refuse_catch_all(address)
    for user in sorted(users):
        refuse_names(context, user)
    return mailcloak.Alias(tuple(sorted(users)), True, tuple(sorted(external)), receive_only)


def read_external(context: Context, text: str) -> str:
    """An address elsewhere that an alias may lead to."""
    address = read_address(text)
    policy, domain = context.policy, address.rpartition("@")[2]
    if policy and domain in (*policy.domain, policy.mailbox_domain):
        raise Refused(f"aliases: {address} is not elsewhere, but in our domain {domain}; name the user whose address it is")
    return address


def change_alias(context: Context, decide: Callable[[str, Optional[mailcloak.Alias]], mailcloak.Alias]) -> None:
    """Store what decide() makes of the alias that is there, and say so."""
    options, address = context.options, read_address(context.options.address)
    # aliases add may have to make the database, and does not do so before its arguments are looked up
    is_new = context.creates and not os.path.exists(context.path)
    stored = None if is_new else patiently(lambda: find_alias(context.database, address))
    wanted = decide(address, stored)
    if not stored or (stored.users, stored.external) != (wanted.users, wanted.external):
        check_with_keycloak(context, f"{address} and its users were", [(address, stored, wanted)])
    database = context.database
    with transaction(database):
        before = find_alias(database, address)
        after = decide(address, before)
        refuse_number(context, address, after)
        added = new_targets(before, after)
        for target in added if not options.force else ():
            refuse_chain(context, address, target)
        apps = [user for user in added if database.execute("SELECT 1 FROM apps WHERE app_id = ?", (user,)).fetchone()]
        if before != after:
            store_aliases(database, [Stored(address, after)])
    targets, old = shown_targets(after), shown_targets(before) if before else None
    if before != after:
        note_change(f"aliases: {options.verb}", address, username=targets, before=old)
    now = "now leads" if before and before != after else "leads"
    text = f"aliases: {address} {now} to {targets}{', and only receives' if after.receive_only else ''}"
    if before:
        users = tuple(user for user in before.users if user not in after.users)
        external = tuple(other for other in before.external if other not in after.external)
        lost = shown_targets(before._replace(users=users, external=external))
        text += f", no longer to {lost}" if lost else ""
    values = {"username": targets, "before": old}
    answer(context, [address] if before != after else [], text + (" already" if before == after else ""), **values)
    if not after.enabled:
        say(f"aliases: {address} is disabled, aliases enable {address} makes it count")
    if context.policy and mailcloak.normalise_address(address).domain not in context.policy.domain:
        say(f"warning: {address} is not in policy.domain ({', '.join(sorted(context.policy.domain))}), so it leads nowhere")
    for app in apps:
        say(f"warning: {app} is an app, and apps receive no mail; name the user who should get it")


def new_targets(before: Optional[mailcloak.Alias], after: mailcloak.Alias) -> list[str]:
    """Who gets mail for the alias now, and did not before."""
    old = {*before.users, *before.external} if before else set()
    return [target for target in (*after.users, *after.external) if target not in old]


def refuse_number(context: Context, address: str, alias: mailcloak.Alias) -> None:
    """Raise Refused for more targets than Postfix takes: it would defer the mail for ever. Or for one that is there twice."""
    twice = set(alias.users) & set(alias.external)
    if twice:
        raise Refused(f"aliases: {address}: {min(twice)} cannot be both a user and an address elsewhere")
    mailboxes = mailboxes_of(context, address, alias)
    size = len(",".join(mailboxes).encode())
    if len(mailboxes) > MAX_TARGETS or size > MAX_TARGETS_BYTES:
        raise Refused(
            f"aliases: {address} would lead to {len(mailboxes)} targets of {size} bytes; Postfix takes {MAX_TARGETS} at most, in"
            f" {MAX_TARGETS_BYTES} bytes: use a mailing list for so many"
        )


def mailboxes_of(context: Context, address: str, alias: mailcloak.Alias) -> list[str]:
    """Where the daemon leads mail for the alias, if all its users are there."""
    domain = (context.policy.mailbox_domain if context.policy else "") or address.rpartition("@")[2]
    return [*(mailcloak.format_mailbox(user, "", domain) for user in alias.users), *alias.external]


def refuse_catch_all(address: str) -> None:
    """Raise Refused for an address that is no single one."""
    if address.startswith("*@"):
        raise Refused(f"aliases: {address} would be a catch-all for a whole domain, which is not supported: name each address")


def refuse_names(context: Context, username: str) -> None:
    """Raise Refused for a name that stands for something else than one user of ours."""
    if re.search(r"[\s,;<>]", username):
        raise Refused(
            f"aliases: {username!r} holds a space, a comma, a semicolon or an angle bracket; name each user by itself, as in Keycloak"
        )
    if "@" in username:
        try:
            mailcloak.parse_plain_address(username)
        except ValueError as exc:
            raise Refused(f"aliases: {username} is neither a username nor an address: {exc}") from None
    policy = context.policy
    if not policy:
        return
    if mailcloak.holds_delimiter(username, policy.recipient_delimiter):
        raise Refused(
            f"aliases: {username} holds a character of policy.recipient_delimiter ({policy.recipient_delimiter}), where"
            " Dovecot would cut it; mail would reach another user: rename the user in Keycloak"
        )
    domain = mailcloak.normalise_address(username).domain if re.search("[@!%]", username) else ""
    if domain not in ("", *policy.domain, policy.mailbox_domain) and not context.options.force:
        raise Refused(
            f"aliases: {username} is in {domain}, which is not in policy.domain ({', '.join(sorted(policy.domain))}): name a user"
            " as in Keycloak; an address elsewhere needs --external, and a username with such a domain --force"
        )


def check_with_keycloak(context: Context, what: str, changes: Sequence[AliasChange]) -> None:
    """Ask the daemon what Keycloak says, before aliases are changed; of who gets their mail already, nothing is asked.

    what: that were asked about, with its verb. Raises Refused if an address is the e-mail of somebody else; warns of new users who do not
    count.
    """
    new_users = [[user for user in after.users if not before or user not in before.users] for _, before, after in changes]

    def ask() -> list[tuple[list[str], list[dict[str, str]]]]:
        return [
            (find_others(context, address, after.users), [ask_login(context, user) for user in users])
            for (address, _, after), users in zip(changes, new_users)
        ]

    answers = look_up(context, what, ask) if changes else None
    logins: dict[str, dict[str, str]] = {}
    for (address, before, _), users, (others, states) in zip(changes, new_users, answers or ()):
        only_removes = before and before.enabled and not users  # who did not get the mail before loses nothing
        losers = [user for user in others if user in before.users] if before and only_removes else others
        if losers and not context.options.force:
            raise Refused(
                f"aliases: {address} is the primary e-mail of {shorten(losers)}, whose mail this alias would take;"
                " name that user too, and both get it, or use --force"
            )
        logins.update(zip(users, states))
    for user, login in logins.items():
        warn_of_login(user, login)


def find_others(context: Context, address: str, users: Sequence[str]) -> list[str]:
    """Who else has the address as primary e-mail, or the one without its extension; raises Refused, ConfigError.

    As a login as well: where an alias has the address already, the daemon looks no further for a recipient.
    """
    policy = context.policy
    others: dict[str, None] = {}
    for spelling in spellings_of(address, policy.recipient_delimiter if policy else ""):
        recipient = {"protocol_state": "RCPT", "policy_context": "recipient", "recipient": spelling}
        holders = ask_fact(context, "holders", spelling, lambda users: [str(user["username"]) for user in users], **recipient)
        login = ask_login(context, spelling)
        others.update(dict.fromkeys([*(holders or ()), login["username"]]))
        if not holders and login["state"] in ("disabled", "ambiguous"):
            others["another user"] = None
    return [other for other in others if other not in ("", *users)]


def look_up(context: Context, what: str, ask: Callable[[], Result]) -> Optional[Result]:
    """What the daemon answers; None where it cannot, with a warning, and for a database that may be no daemon's."""
    if context.options.db:
        return None
    try:
        return ask()
    except (Refused, mailcloak.ConfigError) as exc:
        if isinstance(exc, InGrace) and not getattr(context.options, "force", True):
            raise Refused(f"{context.options.noun}: {exc}; wait until it is certain, or use --force") from None
        why = exc if isinstance(exc, Refused) else "no configuration names the daemon's sockets"
        say(f"warning: {what} not looked up in Keycloak: {why}")
        return None


def warn_of_login(username: str, login: Optional[dict[str, str]]) -> None:
    """Say so where this is no username of a user who counts; login: None if that is not known."""
    state = login["state"] if login else "enabled"
    if login and state == "enabled" and login["username"] != username:
        say(f"warning: {username} is not a username but the e-mail of {login['username']}; name {login['username']} instead")
    elif state != "enabled":
        texts = {
            "missing": "is not a user",
            "no-email": "is a user without an e-mail",
            "ambiguous": "is the name of one user and the e-mail of another, or the e-mail of several,",
        }
        say(f"warning: {username} {texts.get(state, 'is ' + state)} in Keycloak")


def refuse_chain(context: Context, address: str, username: str) -> None:
    """Postfix looks the answer of an alias up again, so an alias that leads to another alias would carry mail past its user.

    With policy.mailbox_domain set that goes only for a username that is an address: no other answer is ever an alias.
    """
    only_addresses = bool(context.policy and context.policy.mailbox_domain)
    delimiters = context.policy.recipient_delimiter if context.policy else ""
    mailbox, spellings = mailbox_of(address, username), spellings_of(address, delimiters)
    if mailbox == address:
        return  # Postfix stops at an answer that is the question
    for other, other_username in aliases_that_begin_with(mailbox.rpartition("@")[0], context.database):
        if (only_addresses and "@" not in username) or not meets(address, username, other, delimiters):
            continue
        leads_to = mailbox_of(other, other_username)
        if leads_to == address:
            raise Refused(
                f"aliases: {other} leads to {other_username} with the mailbox {address}: this alias would close a circle;"
                f" aliases del {other} first, or use --force"
            )
        if leads_to != mailbox:
            itself = "which is" if other == mailbox else f"and {other} is"
            raise Refused(
                f"aliases: the mailbox of {username} is {mailbox}, {itself} itself an alias and leads to {other_username};"
                f" name {other_username} instead, or use --force"
            )
    for spelling in spellings:
        if spelling == mailbox:
            continue  # mail with that extension stays with its user
        for other, other_username in context.database.execute(
            f"SELECT alias_email, username FROM {ALL_TARGETS} WHERE lower(username) IN (?, ?) ORDER BY alias_email",  # noqa: S608
            (spelling.rpartition("@")[0], spelling),
        ):
            if only_addresses and "@" not in other_username:
                continue
            is_its_mailbox = other not in spellings and mailbox_of(other, other_username) == spelling
            if is_its_mailbox and meets(other, other_username, address, delimiters):
                raise Refused(
                    f"aliases: {other} leads to {other_username} with the mailbox {spelling}:"
                    f" this alias would carry {'that mail' if spelling == address else 'mail with that extension'}"
                    f" on to {username}; --force does it anyway"
                )


def aliases_that_begin_with(text: str, database: sqlite3.Connection) -> list[tuple[str, str]]:
    """Address and a user of the aliases with an address that begins so, the shortest first."""
    return database.execute(
        f"SELECT alias_email, username FROM {ALL_TARGETS} WHERE alias_email >= ? AND alias_email < ?"  # noqa: S608
        " ORDER BY length(alias_email), alias_email",
        (text, text + chr(0x10FFFF)),
    ).fetchall()


def meets(address: str, username: str, other: str, delimiters: str) -> bool:
    """Does Postfix ask for the alias other next, after the alias address that leads to username?

    An extension that was cut off stands in the answer: with info -> alice, mail for info+x leads to alice+x.
    """
    mailbox = mailbox_of(address, username)
    keeps_extension = "@" not in username and spellings_of(address, delimiters) == [address]
    return other == mailbox or (keeps_extension and mailbox in spellings_of(other, delimiters))


def spellings_of(address: str, delimiters: str) -> list[str]:
    """The address, and without its extension if it has one: what the daemon looks up for it."""
    spellings = mailcloak.address_spellings(mailcloak.normalise_address(address), delimiters)
    return [spelling.text for spelling, _ in spellings]


def mailbox_of(address: str, username: str) -> str:
    """Where Postfix is told to deliver what comes for an alias, in the form in which it asks again."""
    return mailcloak.normalise_address(mailcloak.format_mailbox(str(username).lower(), "", address.rpartition("@")[2])).text


def aliases_list(context: Context) -> None:
    """Print the aliases that all of the options let through, sorted by address."""
    options = context.options
    filters = [
        ("alias_email GLOB ?", options.glob and options.glob.lower()),
        (
            f"alias_email IN (SELECT alias_email FROM {ALIAS_USERS} WHERE lower(username) = ?)",  # noqa: S608
            options.user and read_username(options.user),
        ),
        ("substr(alias_email, instr(alias_email, '@') + 1) = ?", options.domain and read_domain(options.domain)),
        ("COALESCE(source, '') = ?", options.source),
        ("enabled <> ?", 1 if options.disabled else None),
    ]
    where = " AND ".join(condition for condition, value in filters if value is not None) or "1"
    values = [value for _, value in filters if value is not None]
    what = "count(*)" if options.count else f"alias_email, updated_at, source, {mailcloak.ALIAS_COLUMNS}"
    select = f"SELECT {what} FROM aliases WHERE {where} ORDER BY alias_email"  # noqa: S608  no text of a user
    rows = patiently(lambda: context.database.execute(select, values).fetchall())
    if options.count:
        print_json({"count": rows[0][0]}) if options.json else print(rows[0][0])
    elif options.quiet and options.json:
        print_json([row["alias_email"] for row in rows])
    elif options.quiet:
        for row in rows:
            print(shown_text(row["alias_email"]))
    else:
        columns: Columns = {"alias_email": str, "username": str, "enabled": yes_no}
        if any(row["source"] for row in rows):
            columns["source"] = lambda name: name or "-"
        print_list(options, [describe_alias(row) for row in rows], {**columns, "updated_at": shown_time})


def describe_alias(row: Any) -> dict[str, Any]:
    """An alias as a list shows it; row: address, time, owner, and ALIAS_COLUMNS."""
    address, updated_at, source, *columns = row
    alias = mailcloak.read_alias(*columns)
    values = {"alias_email": address, "username": shown_targets(alias), "enabled": int(alias.enabled), "updated_at": updated_at}
    return {**values, "source": source, **alias._asdict(), "enabled": int(alias.enabled)}


def aliases_show(context: Context) -> None:
    """Print one alias, and the mailboxes that it leads to."""
    address = read_address(context.options.address)
    select = f"SELECT alias_email, updated_at, source, {mailcloak.ALIAS_COLUMNS} FROM aliases WHERE alias_email = ?"  # noqa: S608
    row = patiently(lambda: context.database.execute(select, (address,)).fetchone())
    if not row:
        raise Refused(f"aliases: {address} does not exist, aliases list shows what does")
    alias = describe_alias(row)
    mailboxes = mailboxes_of(context, address, mailcloak.read_alias(*row[3:]))
    if context.options.json:
        print_json({**alias, "mailbox": ", ".join(mailboxes)})
        return
    for label, text in (
        ("alias", address),
        ("username", alias["username"]),
        ("mailbox", ", ".join(mailboxes)),
        ("enabled", yes_no(alias["enabled"])),
        ("may send", yes_no(not alias["receive_only"])),
        ("source", alias["source"] or "-"),
        ("updated at", shown_time(alias["updated_at"])),
    ):
        print_field(label, str(text))


# ---------------------------------------------------------------------------------------------------------------------------------
# apps
# ---------------------------------------------------------------------------------------------------------------------------------


def apps_add(context: Context) -> None:
    """Make an app, or give one a new token; nothing is changed where it has this token already."""
    import secrets

    options, app_id = context.options, read_app_id(context.options.app_id)
    generated = secrets.token_urlsafe(GENERATED_TOKEN_BYTES) if options.generate else None
    token = generated or read_token(options)
    changes = read_app_changes(options)
    login = look_up(context, f"{app_id} was", lambda: ask_login(context, app_id))
    warn_of_owner(context, changes)
    database = context.database
    with transaction(database):
        alias = database.execute("SELECT alias_email FROM aliases WHERE lower(username) = ? LIMIT 1", (app_id,)).fetchone()
        if alias:
            raise Refused(f"apps: {app_id} is a username, the alias {alias['alias_email']} leads to it; choose another app id")
        known = database.execute("SELECT * FROM apps WHERE app_id = ?", (app_id,)).fetchone()
        if not known and login and login["state"] != "missing" and not options.force:
            raise Refused(
                f"apps: {app_id} is a user in Keycloak, who could no longer log in; choose another app id, or use --force"
            )
        if known and generated and not options.replace:
            raise Refused(f"apps: {app_id} exists already, --replace gives it a new token in place of the old one")
        if not known:  # left by a program without foreign keys
            database.execute("DELETE FROM app_from WHERE app_id = ?", (app_id,))
        has_token = bool(known) and is_hash_of(token, str(known["secret_hash"]))
        if not has_token:
            iterations = GENERATED_ITERATIONS if generated else CHOSEN_ITERATIONS
            database.execute(
                "INSERT INTO apps (app_id, secret_hash) VALUES (?, ?)"
                " ON CONFLICT (app_id) DO UPDATE SET secret_hash = excluded.secret_hash",
                (app_id, hash_token(token, iterations, secrets.token_bytes(16))),
            )
        changed = change_app(context, app_id, changes)
        if generated:  # before the commit: a token that was not shown must not lock the app out
            show_token(options, app_id, generated)
    texts = {"added": "added", "token": "has a new token, the old one no longer works", "": "has this token already"}
    done = "" if has_token else "token" if known else "added"
    if done:
        note_change(f"apps: {'token' if known else 'add'}", app_id)
    if generated:  # its answer was the token
        say(f"apps: {app_id} {texts[done]}")
    else:
        is_changed = done or any(before != now for before, now in changed.values())
        answer(context, [app_id] if is_changed else [], f"apps: {app_id} {texts[done]}")
    if known and not known["enabled"]:
        say(f"apps: {app_id} is disabled, apps enable {app_id} lets it in again")
    say_app_changes(app_id, changed)
    if not known:
        say(f"apps: it may not send yet, apps allow {app_id} ADDRESS lets it use an address")


def apps_set(context: Context) -> None:
    """Set owner or expiry of an app."""
    app_id, changes = read_app_id(context.options.app_id), read_app_changes(context.options)
    if not changes:
        raise Refused("apps set: nothing to set, name --owner, --expires or both")
    warn_of_owner(context, changes)
    with transaction(context.database):
        require_app(context, app_id)
        changed = change_app(context, app_id, changes)
    if context.options.json:
        answer(context, [app_id] if any(before != now for before, now in changed.values()) else [])
    say_app_changes(app_id, changed)


def read_app_changes(options: argparse.Namespace) -> dict[str, Any]:
    """The columns that --owner and --expires set, with their values; None takes a value away."""
    changes: dict[str, Any] = {}
    if options.owner is not None:
        changes["owner"] = read_username(options.owner) if options.owner else None
    if options.expires is not None:
        changes["expires_at"] = read_expiry(options.expires)
    return changes


def warn_of_owner(context: Context, changes: dict[str, Any]) -> None:
    """Say so where an app gets an owner who does not count; raises Refused for an e-mail, which never does."""
    owner = changes.get("owner")
    if owner:
        login = look_up(context, f"{owner} was", lambda: ask_login(context, owner))
        if login and login["username"] not in ("", owner):
            raise Refused(
                f"apps: {owner} is the e-mail of {login['username']}, and an owner is a username", f"--owner {login['username']}"
            )
        warn_of_login(owner, login)


def change_app(context: Context, app_id: str, changes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Store these columns of an app; (old value, new value) of each."""
    row = context.database.execute("SELECT owner, expires_at FROM apps WHERE app_id = ?", (app_id,)).fetchone()
    for column, value in changes.items():  # two names of this file, never text of a user
        if value != row[column]:
            context.database.execute(f"UPDATE apps SET {column} = ? WHERE app_id = ?", (value, app_id))  # noqa: S608
    return {column: (row[column], value) for column, value in changes.items()}


def say_app_changes(app_id: str, changed: dict[str, tuple[Any, Any]]) -> None:
    """Say what was changed, and what it means."""
    for column, (before, now) in changed.items():
        if before != now:
            note_change("apps: set", app_id, **{column: "none" if now is None else now, "before": before})
        if column == "owner":
            say(f"apps: {app_id} counts only while {now} is enabled in Keycloak" if now else f"apps: {app_id} has no owner now")
        else:
            say(f"apps: {app_id} expires at {shown_time(now)}" if now else f"apps: {app_id} does not expire now")


def shown_state(row: Any) -> str:
    """Whether an app counts now: "enabled", "disabled" or "expired"."""
    if row["enabled"] != 1:
        return "disabled"
    expires_at = row["expires_at"]
    is_expired = expires_at is not None and not (isinstance(expires_at, int) and expires_at > time.time())  # as the daemon sees it
    return "expired" if is_expired else "enabled"


def show_token(options: argparse.Namespace, app_id: str, token: str) -> None:
    """Print a generated token; raises Refused where it cannot be printed, since it is never shown again."""
    if not options.has_output:
        raise Refused("the token cannot be shown: standard output is closed; nothing was changed, try again on a terminal")
    try:
        print(json.dumps({"app_id": app_id, "token": token}) if options.json else token, flush=True)
    except OSError as exc:
        drop_output()
        raise Refused(f"the token cannot be shown: {exc.strerror}; nothing was changed, try again on a terminal") from exc


def read_uses(context: Context) -> dict[str, Any]:
    """What the daemon of this host has noted of the uses of apps; where that cannot be read, {}, or Refused if --unused needs it."""
    path = mailcloak.last_used_path(context.path)
    try:
        return mailcloak.read_app_uses(path)
    except (OSError, ValueError, RecursionError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not what the daemon writes"
        remedy = "delete it, and the daemon begins a new one"
        if isinstance(exc, PermissionError):
            remedy = f"run mailcloakctl as {owner_name(path)} or as root"
        if isinstance(exc, FileNotFoundError):
            remedy = "the daemon makes it when it starts"
        if context.options.unused:
            raise Refused(f"apps: it is not known which are unused: {path}: {reason}", remedy) from exc
        if not isinstance(exc, FileNotFoundError):
            say(f"warning: it is not known when apps were last used: {path}: {reason}; {remedy}")
        return {}


def last_use(row: Any, uses: dict[str, Any]) -> tuple[Optional[int], Optional[str]]:
    """When and from where an app was last used; None where that is not noted, or only of another app that had its name before."""
    use = uses.get("apps", {}).get(row["app_id"])
    last_used, client = (use.get("last_used"), use.get("client")) if isinstance(use, dict) else (None, None)
    if not (isinstance(last_used, int) and isinstance(client, str)):
        return None, None
    return (None, None) if isinstance(row["created_at"], int) and last_used < row["created_at"] else (last_used, client)


def is_unused(row: dict[str, Any], since: int, limit: float) -> bool:
    """Is it certain that the app was not used from limit on? Only if it was there by then, and uses were noted; since: from when on."""
    times = (row["last_used"] or since, row["created_at"])
    return all(isinstance(each, int) and each < limit for each in times)


def apps_list(context: Context) -> None:
    """Print all apps and what they may send as, or those that are unused."""
    unused = context.options.unused
    days = None if unused is None else read_days(unused)
    if unused is not None and not days:
        raise Refused(f"{unused!r} is not a number of days such as 90d")
    selects = (
        "SELECT app_id, enabled, created_at, owner, expires_at FROM apps ORDER BY app_id",
        "SELECT app_id, from_addr FROM app_from WHERE enabled = 1 ORDER BY app_id, from_addr",
    )
    stored, senders = patiently(lambda: [context.database.execute(select).fetchall() for select in selects])
    rows, uses = [dict(row) for row in stored], read_uses(context)
    allowed: dict[str, list[str]] = {row["app_id"]: [] for row in rows}
    for row in senders:
        allowed.setdefault(row["app_id"], []).append(row["from_addr"])
    for entry in rows:
        entry["from_addr"] = allowed[entry["app_id"]]
        entry["state"] = shown_state(entry)
        entry["last_used"], entry["client"] = last_use(entry, uses)
    if days:
        limit, since = time.time() - days * 86400, uses["since"]
        if since > limit:
            say(f"warning: uses are noted since {shown_time(since)} only, apps without one are not listed yet")
        rows = [entry for entry in rows if is_unused(entry, since, limit)]
    columns: Columns = {
        "app_id": str,
        "state": str,
        "owner": lambda owner: owner or "-",
        "expires_at": lambda expires_at: "never" if expires_at is None else shown_time(expires_at),
        "created_at": shown_time,
        "last_used": shown_time,
        "client": lambda client: client or "-",
        "from_addr": lambda senders: ", ".join(map(str, map(shown_sender, senders))) or "(none: may not send)",
    }
    print_list(context.options, rows, columns)


def apps_allow(context: Context) -> None:
    """Let an app send as an address."""
    app_id, sender = read_app_id(context.options.app_id), read_sender(context.options.address)
    others = look_up(context, f"{sender} was", lambda: find_others(context, sender, ())) if sender else None
    with transaction(context.database):
        require_app(context, app_id)
        changed = context.database.execute(
            "INSERT INTO app_from (app_id, from_addr) VALUES (?, ?) ON CONFLICT (app_id, from_addr) DO UPDATE SET enabled = 1 WHERE enabled = 0",
            (app_id, sender),
        ).rowcount
    if changed:
        note_change("apps: allow", app_id, sender=shown_sender(sender))
        if others:
            say(f"warning: {sender} is the primary e-mail of {shorten(others)}")
    text = f"apps: {app_id} may {'now ' if changed else ''}send as {shown_sender(sender)}{'' if changed else ' already'}"
    answer(context, [app_id] if changed else [], text, sender=sender)


def apps_disallow(context: Context) -> None:
    """Take an address from an app."""
    app_id, sender = read_app_id(context.options.app_id), read_sender(context.options.address)
    with transaction(context.database):
        require_app(context, app_id)
        if not context.database.execute("DELETE FROM app_from WHERE app_id = ? AND from_addr = ?", (app_id, sender)).rowcount:
            raise Refused(f"apps: {app_id} was not allowed to send as {shown_sender(sender)}, apps list shows what it is allowed")
    note_change("apps: disallow", app_id, sender=shown_sender(sender))
    answer(context, [app_id], f"apps: {app_id} may no longer send as {shown_sender(sender)}", sender=sender)


def require_app(context: Context, app_id: str) -> None:
    """Raise Refused where there is no such app."""
    if not context.database.execute("SELECT 1 FROM apps WHERE app_id = ?", (app_id,)).fetchone():
        raise Refused(f"apps: {app_id} does not exist, apps add {app_id} --generate makes it")


# ---------------------------------------------------------------------------------------------------------------------------------
# The running daemon
# Its two sockets, asked as Postfix asks them. Whatever goes wrong is a Refused that names the way out; no wait is longer than the
# time given. What the daemon tells of itself is read as it stands, by a function given to ask_json, which lets only a daemon of this
# very version through, and says so where the function fails.
# ---------------------------------------------------------------------------------------------------------------------------------


OPENRC_SETTINGS = "/etc/conf.d/mailcloak"


def where_log(daemon: Optional[mailcloak.DaemonConfig]) -> str:
    """How to read the daemon's log on this host; daemon is that block of the configuration. Source: mailcloak(8), DIAGNOSTICS."""
    if daemon and daemon.log == "syslog":
        return "lines of mailcloak in the host's log of mail"
    if os.path.isdir("/run/systemd/system"):
        return "journalctl -u mailcloak"
    with contextlib.suppress(OSError), open(OPENRC_SETTINGS, encoding="utf-8", errors="replace") as file:
        if named := re.search(r"^mailcloak_log=[\"']?([^\"'\s]+)", file.read(), re.MULTILINE):
            return named[1]
    return "/var/log/mailcloak.log, or where its standard error goes"


class RunningDaemon:
    """Questions to the daemon, each over a connection of its own; log says where its log is."""

    def __init__(self, sockets: mailcloak.SocketsConfig, seconds: float, log: str) -> None:
        self.sockets, self._seconds, self.log = sockets, seconds, log

    def ask_policy(self, **attributes: str) -> str:
        """The answer of the policy service, such as "550 5.1.1 No such user". Source: SMTPD_POLICY_README."""
        lines = "".join(f"{name}={value}\n" for name, value in {"request": "smtpd_access_policy", **attributes}.items())
        path = self.sockets.policy_socket
        answer = self._exchange(path, lines.encode() + b"\n", self._read_policy_answer)
        if not answer.startswith("action="):
            raise senseless_answer(path)
        return answer[len("action=") :]

    def ask_map(self, name: str, key: str) -> tuple[str, str]:
        """The status and the text of a map's answer, such as ("OK", "alice@example.org"). Source: socketmap_table(5)."""
        query = mailcloak.encode_netstring(f"{name} {key}".encode())
        path = self.sockets.socketmap_socket
        status, _, text = self._exchange(path, query, self._read_netstring).partition(" ")
        if status not in ("OK", "NOTFOUND", "TEMP", "PERM"):
            raise senseless_answer(path)
        return status, text

    def ask_json(self, name: str, key: str, read: Callable[[dict[str, Any]], Result]) -> Result:
        """What read() makes of the object with which the daemon's map "stats" or "explain" answers.

        Raises NotAllowed where the daemon says that this user may not ask, OtherVersion where it is not of this version.
        """

        def read_own(value: dict[str, Any]) -> Result:
            theirs = value.get("version", "unknown")
            if theirs != mailcloak.__version__:
                raise OtherVersion(f"the running daemon is version {theirs}, this is {mailcloak.__version__}", "restart it")
            return read(value)

        return self._ask_object(name, key, read_own)

    def flush(self, key: str) -> int:
        """Let the daemon forget what it has cached of one user, or of all ("*"); how many cached answers these were."""
        try:
            return self._ask_object("flush", key, lambda value: int(value["forgotten"]))
        except NoAnswer as exc:
            text = f"{exc.text}; the flush may be done all the same"
            raise Refused(text, f"repeat it; if there is no answer again, {exc.remedy}") from exc

    def _ask_object(self, name: str, key: str, read: Callable[[dict[str, Any]], Result]) -> Result:
        """What read() makes of the object in the answer. Whatever it does not find there, another program has answered."""
        status, text = self.ask_map(name, key)
        if status == "PERM" and (text.startswith("unknown map") or text in ("no key", "not a question")):
            raise OtherVersion(f"the running daemon does not understand {name!r} ({text}): it is of another version", "restart it")
        if status == "PERM":
            owner = owner_name(self.sockets.socketmap_socket)
            raise NotAllowed(f"the daemon says: {text}", f"run mailcloakctl as root, as the daemon's own user or as {owner}")
        if status == "TEMP":
            raise Refused(f"the daemon says: {text}", f"its log ({self.log}) says why")
        try:
            return read(json.loads(text if status == "OK" else ""))
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as exc:
            raise senseless_answer(self.sockets.socketmap_socket) from exc

    # ---- one exchange

    def _exchange(self, path: str, question: bytes, read: Callable[[bytes], Optional[bytes]]) -> str:
        deadline = time.monotonic() + self._seconds
        answer = b""
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
            try:
                connection.settimeout(self._seconds)
                connection.connect(path)
                connection.sendall(question)
                while True:
                    connection.settimeout(max(0.001, deadline - time.monotonic()))
                    data = connection.recv(64 * 1024)
                    answer += data
                    whole = read(answer)
                    if whole is not None:
                        return whole.decode("utf-8", "replace")
                    if not data:
                        closed = f"the daemon at {path} closed the connection without an answer"
                        raise NoAnswer(closed, f"its log ({self.log}) says why, or something else listens there")
                    if len(answer) > MAX_ANSWER_BYTES:
                        raise senseless_answer(path)
            except socket.timeout:
                late = f"no answer at {path} within {self._seconds:.0f} s"
                raise NoAnswer(late, f"look at its log ({self.log}), and restart it") from None
            except ValueError:
                raise senseless_answer(path) from None
            except OSError as exc:
                raise self._failed_connection(path, exc) from exc

    def _failed_connection(self, path: str, exc: OSError) -> Refused:
        """Why the daemon cannot be asked at that path, and what to do."""
        if exc.errno in (errno.ENOENT, errno.ECONNREFUSED):
            gone = "there is no socket" if exc.errno == errno.ENOENT else "nobody listens"
            start = "start it (rc-service mailcloak start, systemctl start mailcloak), or name its configuration with --config"
            return Refused(f"{gone} at {path}: the daemon is not running, or runs with another configuration", start)
        if exc.errno in (errno.EACCES, errno.EPERM):
            return Refused(f"this user may not connect to {path}", "run mailcloakctl as root")
        return Refused(f"{path}: {exc.strerror or exc}", f"look at its log ({self.log}), and restart it")

    @staticmethod
    def _read_policy_answer(data: bytes) -> Optional[bytes]:
        answer, end, _ = data.partition(b"\n\n")
        return answer if end else None

    @staticmethod
    def _read_netstring(data: bytes) -> Optional[bytes]:
        """The payload, None while it is not whole; raises ValueError for what is no netstring."""
        digits, colon, rest = data.partition(b":")
        if not re.fullmatch(rb"[0-9]{0,9}", digits) or (colon and not digits):
            raise ValueError
        if not colon or len(rest) <= int(digits):
            return None
        length = int(digits)
        if rest[length : length + 1] != b",":
            raise ValueError
        return rest[:length]


def senseless_answer(path: str) -> Refused:
    """The answer is not of the form in which the daemon answers."""
    remedy = "something else listens there, or a daemon of another version: restart it"
    return Refused(f"the answer at {path} makes no sense", remedy)


# ---------------------------------------------------------------------------------------------------------------------------------
# ask: what the daemon answers, and why
# The answer is the one that Postfix gets to the same question. Reason, rule and change come from the daemon's map "explain", in the
# sentences of the table REASONS of mailcloak.py.
# ---------------------------------------------------------------------------------------------------------------------------------


# The first word of an answer, in plain words, and its colour on a terminal.
ANSWERS = {
    "DUNNO": ("no objection", GREEN),
    "550": ("refused for good", RED),
    "553": ("refused for good", RED),
    "451": ("deferred, the other side tries again", YELLOW),
    "OK": ("its mail goes there", GREEN),
    "NOTFOUND": ("no alias leads it elsewhere", GREEN),
    "TEMP": ("Postfix defers the mail", YELLOW),
    "PERM": ("Postfix cannot ask this", RED),
}
SOURCES = {
    "database": "database",
    "cache": "cached",
    "keycloak": "Keycloak",
    "outage": "cached, used in an outage",
    "static": "static_users",
}


def ask_recipient(context: Context) -> None:
    """May mail for an address come in, and where does it lead?"""
    address = read_asked_address(context.options.address)
    if not address:
        raise Refused("'<>' receives no mail; name an address")
    question = {"protocol_state": "RCPT", "policy_context": "recipient", "recipient": address}
    explanation = explain(context, {"policy": question})
    answer = context.daemon.ask_policy(**question)
    leads_to = None
    if answer == "DUNNO":
        status, text = context.daemon.ask_map("alias", address)
        leads_to = {"OK": text, "NOTFOUND": None}.get(status, f"{status} {text}")
    show_answer(context, f"may mail for <{address}> come in?", answer, leads_to, describe(explanation, answer, address))


def ask_sender(context: Context) -> None:
    """May a client, logged in or not, use a sender?"""
    options = context.options
    address, user = read_asked_address(options.address), read_username(options.user) if options.user else ""
    method = read_method(options.method or "PLAIN") if user else ""
    question = {"protocol_state": "RCPT", "policy_context": "sender", "sender": address}
    question |= {"sasl_username": user, "sasl_method": method}
    explanation = explain(context, {"policy": question})
    if user and not options.method and is_no_app(explanation.get("steps", [])):
        method = question["sasl_method"] = "XOAUTH2"  # the only way for a user to log in
        explanation = explain(context, {"policy": question})
    answer = context.daemon.ask_policy(**question)
    who = f"{user}, logged in by {method}," if user else "a client who has not logged in"
    show_answer(context, f"may {who} send as <{address}>?", answer, None, describe(explanation, answer, address))


def is_no_app(steps: Sequence[dict[str, Any]]) -> bool:
    """Did the daemon look for an app on the way to its answer, and find none?"""
    return any(step["asked"] == "app" and not step["found"] and not step["error"] for step in steps)


def ask_alias(context: Context) -> None:
    """Where does an address lead?"""
    address = read_asked_address(context.options.address)
    if not address:
        raise Refused("'<>' is no alias; name an address")
    explanation = explain(context, {"alias": address})
    answer = " ".join(context.daemon.ask_map("alias", address)).rstrip()
    show_answer(context, f"where does <{address}> lead?", answer, None, describe(explanation, answer, address))


def read_asked_address(text: str) -> str:
    """An address as it stands in an SMTP envelope, with or without its angle brackets; "" is the null sender."""
    address = text[1:-1] if text.startswith("<") and text.endswith(">") else text
    if not address.isprintable() or len(address) > MAX_ASKED_CHARS:
        raise Refused(f"{text[:100]!r} is not an address that Postfix can ask about: it is too long or holds control characters")
    return address


def read_method(text: str) -> str:
    """The name of a SASL mechanism, in the form in which Postfix sends it."""
    if not re.fullmatch(r"[A-Za-z0-9-]{1,40}", text):
        raise Refused(f"{text!r} is not a SASL mechanism such as PLAIN or XOAUTH2")
    return text.upper()


def ask_fact(context: Context, asked: str, value: str, read: Callable[[Any], Result], **attributes: str) -> Optional[Result]:
    """What read() makes of a fact of that kind that the daemon finds on the way to its answer to a policy request; None without one.

    Raises Refused, also where Keycloak gave no answer; ConfigError.
    """

    def find(explanation: dict[str, Any]) -> Optional[Result]:
        for step in explanation["steps"]:
            if (step["asked"], step["value"]) == (asked, value):
                if step["error"]:
                    raise (InGrace if explanation["reason"] == "in-grace" else Refused)(str(step["error"]))
                return read(step["found"]) if step["found"] else None
        return None

    return context.daemon.ask_json("explain", json.dumps({"policy": attributes}), find)


def ask_login(context: Context, name: str) -> dict[str, str]:
    """Which user a login of this name is, and its state; raises Refused, ConfigError."""
    question = {"protocol_state": "RCPT", "policy_context": "sender", "sasl_username": name, "sasl_method": "XOAUTH2"}
    found = ask_fact(context, "login", name, lambda login: {key: str(login[key]) for key in ("username", "state")}, **question)
    return found or {"username": "", "state": "missing"}


def explain(context: Context, question: dict[str, Any]) -> dict[str, Any]:
    """What the daemon's map "explain" says, or a note why it does not. Asked before the answer, which would fill the cache."""
    try:
        return context.daemon.ask_json("explain", json.dumps(question), read_explanation)
    except NotAllowed as exc:
        return {"note": f"the reason is told only to root, to the daemon's own user and to the sockets' owner ({exc})"}
    except Refused as exc:
        return {"note": f"the reason cannot be told: {exc}"}


def read_explanation(value: dict[str, Any]) -> dict[str, Any]:
    """What is shown of an explanation; each step was described once, so that it can be described later."""
    for step in value["steps"]:
        describe_step(step)
    texts = {name: real_paths(str(value[name])) for name in ("answer", "reason", "rule", "change")}
    return {**texts, "steps": value["steps"]}


def describe(explanation: dict[str, Any], answer: str, address: str) -> dict[str, Any]:
    """The daemon's explanation of an answer: reason, rule, change, steps; and a note where something is odd."""
    if "note" in explanation:
        return {"note": explanation["note"], "steps": []}
    shown = {name: explanation[name] for name in ("reason", "rule", "change", "steps")}
    if address and "@" not in address:
        shown["change"] = "ask for it with its domain: Postfix appends $myorigin to an address that has none"
    explained = explanation["answer"].rstrip()
    if explained != answer:
        shown["note"] = (
            f"the answer to the very same question was {explained} a moment before: something has just changed, ask again"
        )
    return shown


def show_answer(context: Context, asked: str, answer: str, leads_to: Optional[str], why: dict[str, Any]) -> None:
    """Print the daemon's answer, and why: as far as the daemon tells this user."""
    shown = {"asked": asked, "answer": answer, "leads_to": leads_to, **why}
    if context.options.json:
        print_json(shown)
        return
    meaning, colour = ANSWERS.get(answer.partition(" ")[0], ("", BOLD))
    print_field("question", asked)
    print(f"{'answer':<15}{paint(shown_text(f'{answer} ({meaning})' if meaning else answer), colour)}")
    for name in ("leads_to", "note", "reason", "rule", "change"):
        if shown.get(name):
            print_field(name.replace("_", " "), shown[name])
    steps = dict.fromkeys(reversed([describe_step(step) for step in why["steps"]]))  # if asked twice, only the last is shown
    table = [["", "ASKED", "FOUND", "FROM"]]
    table += [[f"{index}.", *map(shown_text, step)] for index, step in enumerate(reversed(list(steps)), 1)]
    print_table(table)


def describe_step(step: dict[str, Any]) -> tuple[str, str, str]:
    """What was asked, what was found and where, in words."""
    asked = {
        "alias": "is there an alias",
        "app": "is there an app",
        "holders": "whose e-mail is",
        "leaver": "has the user left:",
        "login": "whose login is",
        "user": "is there a user",
    }
    source, where = step["source"], SOURCES.get(step["source"], "-")
    if source in ("cache", "outage"):
        where += f", {shown_seconds(step['age_seconds'])} old"
    elif source == "keycloak":
        where += ", just now"
    found = f"no answer: {step['error']}" if step["error"] else describe_found(step["asked"], step["found"])
    return f"{asked[step['asked']]} {step['value']}", found, where


def describe_found(kind: str, found: Any) -> str:
    """A fact in words: that of a step which asked for this kind."""
    if kind == "leaver":
        return "yes, gone or disabled" if found else "no"
    if kind == "holders":
        return ", ".join(map(describe_holder, found)) or "nobody's"
    if found is None:
        return "no"
    if kind == "alias":
        alias = mailcloak.Alias(**found)
        return f"leads to {shown_targets(alias)}{', and only receives' if alias.receive_only else ''}{'' if alias.enabled else ', but is disabled'}"
    if kind == "app":
        may = "may use the sender" if found["may_send"] else "may not use the sender"
        return f"{found['state']}, {may}" + (f", owner {found['owner']}" if found["owner"] else "")
    return f"{found['username']}, enabled" if found["state"] == "enabled" else str(found["state"])


def describe_holder(user: dict[str, Any]) -> str:
    """A user who has the address, in words."""
    state = "enabled" if user["enabled"] else "locked out" if user["locked_out"] else "disabled"
    return f"{user['username']}, {state}{', federated' if user['federation'] else ''}"


# ---------------------------------------------------------------------------------------------------------------------------------
# status and flush
# ---------------------------------------------------------------------------------------------------------------------------------


def show_status(context: Context) -> None:
    """Print the daemon's statistics, as text or JSON, or write them for Prometheus; or print them again and again."""
    options = context.options
    if options.prometheus:
        write_metrics(context, options.prometheus)
    elif options.watch:
        watch_status(context)
    elif options.json:
        replication = context.replication()
        print_json(
            context.daemon.ask_json("stats", "*", lambda stats: {**stats, "replication": replication} if replication else stats)
        )
    else:
        print("\n".join(ask_status(context, terminal_width())))


def ask_status(context: Context, width: Optional[int]) -> list[str]:
    """The daemon's statistics as lines for people."""
    daemon, replication = context.daemon, context.replication()
    return daemon.ask_json("stats", "*", lambda stats: format_status(stats, width, daemon.log, replication))


def watch_status(context: Context) -> None:
    """Show the status again and again in the same place, until Ctrl-C, also while the daemon is restarted."""
    if not sys.stdout.isatty():
        raise Refused("--watch needs a terminal; --json and --prometheus are for programs")
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            width, height = shutil.get_terminal_size()
            try:
                lines = ask_status(context, width)
            except Refused as exc:
                lines = [paint(line, RED) for line in wrap(shown_text(exc), width)]
            lines = [time.strftime(f"%H:%M:%S, every {WATCH_SECONDS:.0f} s, Ctrl-C ends it"), "", *lines]
            if len(lines) >= height:
                lines = [*lines[: height - 2], f"({len(lines) - height + 2} more lines)"]
            # home, each line and what was behind it, then all that was below
            print("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J", end="", flush=True)
            time.sleep(WATCH_SECONDS)


def format_status(stats: dict[str, Any], width: Optional[int], log: str, replication: Optional[dict[str, Any]] = None) -> list[str]:
    """Statistics as lines; log says where the daemon's log is, replication what read_replication() does."""
    head = f"mailcloak {stats['version']}, pid {stats['pid']}, up {shown_seconds(stats['uptime_seconds'])}"
    lines = [paint(shown_text(head), BOLD)]
    for label, text, colour in (*status_fields(stats, log), *replication_fields(replication)):
        first, *rest = hang(f"{label:<15}", text, width)
        lines += [first[:15] + paint(first[15:], colour), *rest]
    table = [["SERVICE", "ANSWER", "COUNT", "REASON"]]
    for answer in sorted(stats["answers"], key=lambda answer: -answer["count"]):
        table.append([shown_text(answer[name]) for name in ("service", "answer", "count", "reason")])
    return [*lines, "", *format_table(table, width)] if len(table) > 1 else lines


def status_fields(stats: dict[str, Any], log: str) -> Iterator[tuple[str, str, str]]:
    """Label, text and colour ("" for none) of each line."""
    reload = stats["last_reload"]
    read_at = f"reloaded {shown_time(reload['at'])}" if reload else f"read at start, {shown_time(stats['started_at'])}"
    refused = bool(reload) and not reload["ok"]
    text = f"{stats['config']}, {read_at}{': refused, the one before it is in force' if refused else ''}"
    yield "configuration", text, RED if refused else ""
    yield ("Keycloak", *describe_keycloak(stats["keycloak"]))
    database, connections = stats["database"], stats["connections"]
    works = "works" if database["works"] else "cannot be used"
    yield "database", f"{database['path']}, {works}", "" if database["works"] else RED
    open_now = ", ".join(f"{name} {connections[name]}" for name in SERVICES)
    yield "connections", f"{open_now}; at most {connections['limit']} each", ""
    users, missing, limit = (stats["cache"][name] for name in ("users", "missing", "limit"))
    yield "cached", f"users {users}, names without a user {missing}; at most {limit}", ""
    if saved := stats["saved"]:
        works = "works" if saved["works"] else f"cannot be used, its log ({log}) says why"
        waiting = f", {saved['waiting']} changes are not on the disk yet" if saved["waiting"] else ""
        yield "saved", f"{saved['path']}, {works}{waiting}", "" if saved["works"] else RED
    yield "lookups", ", ".join(f"{text} {stats['lookups'][name]}" for name, text in LOOKUPS.items()), ""
    total, recalled = sum(answer["count"] for answer in stats["answers"]), stats["recalled_answers"]
    yield "answers", f"{total}, of which {recalled['given']} were recalled; {recalled['kept']} can be recalled now", ""
    for service in SERVICES:
        yield f"{service} time", describe_times(stats["seconds"][service]), ""


def replication_fields(replication: Optional[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """The same for what read_replication() says; nothing where there is one host alone."""
    if replication and replication["role"] != "single":
        text, late = describe_replication(replication), replication["late"]
        remedy = f"; {LATE_REMEDIES[replication['role']]}" if late else ""
        yield "several hosts", text + remedy, RED if late else ""


SERVICES = ("policy", "socketmap")
LOOKUPS = {"cache": "in the cache", "keycloak": "at Keycloak", "outage": "in the cache in an outage", "failed": "without an answer"}


def describe_keycloak(keycloak: Optional[dict[str, Any]]) -> tuple[str, str]:
    """How Keycloak is, and the colour for it; keycloak is that block of the statistics."""
    if keycloak is None:
        return "not asked: static_users of the configuration take its place", ""
    requests = keycloak["requests"]
    asked = f"{requests} requests, {keycloak['failed']} failed"
    asked += f", {shown_seconds(keycloak['seconds'] / requests)} each" if requests else ""
    since = keycloak["since_seconds"]
    lasting = f" for {shown_seconds(since)}" if since is not None else ""
    if keycloak["state"] == "answers":
        return f"answers{lasting}; {asked}", ""
    return f"away{lasting}: {keycloak['failure'] or 'no answer'}; {asked}", RED


def describe_times(histogram: dict[str, Any]) -> str:
    """Mean and tail of a histogram, whose counts are not cumulative."""
    total = sum(histogram["counts"])
    if not total:
        return "-"
    text = f"{shown_seconds(histogram['sum'] / total)} on average"
    for bound, so_far in zip(histogram["bounds"], itertools.accumulate(histogram["counts"])):
        if so_far >= 0.99 * total:
            return f"{text}, 99 of 100 within {shown_seconds(bound)}"
    return f"{text}, more than 1 of 100 longer than {shown_seconds(histogram['bounds'][-1])}"


def write_metrics(context: Context, path: str) -> None:
    """Write the metrics, "-" is standard output. That the daemon is down is one of them: their reader sees no exit code."""
    others = list(replication_metrics(context.replication()))
    try:
        text = context.daemon.ask_json("stats", "*", lambda stats: format_metrics([*daemon_metrics(stats), *others]))
    except Refused as exc:
        say(f"mailcloakctl: {exc}")
        text = format_metrics(others, is_up=isinstance(exc, OtherVersion))
    if path == "-":
        print(text, end="")
    else:
        replace_file(path, text)


def replace_file(path: str, text: str) -> None:
    """Put the text in place of the file: who reads it sees all of the old or all of the new. Raises Refused."""
    import tempfile

    new = ""
    try:
        if os.path.islink(path) or (os.path.exists(path) and not os.path.isfile(path)):
            raise OSError(errno.EINVAL, "not a regular file")  # such as /dev/stdout, which root would replace for everybody
        descriptor, new = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".mailcloak-")
        with open(descriptor, "w", encoding="ascii") as file:
            os.fchmod(descriptor, 0o644)
            file.write(text)
        os.rename(new, path)
    except OSError as exc:
        raise Refused(f"status: {path!r} cannot be written: {exc.strerror}; what was there stays") from exc
    finally:
        with contextlib.suppress(FileNotFoundError):  # it has been renamed
            os.unlink(new)


def format_metrics(metrics: Iterable[tuple[str, str, Any]] = (), *, is_up: bool = True) -> str:
    """The metrics (name, help, value or values by labels) in the text format of Prometheus, version 0.0.4; None is left out."""
    lines: list[str] = []
    for name, help_text, value in (("up", "Whether the daemon answers.", is_up), *metrics):
        kind = "histogram" if name == "answer_seconds" else "counter" if name.endswith("_total") else "gauge"
        values = value if isinstance(value, dict) else {"": value}
        samples = [f"mailcloak_{name}{behind} {float(each)!r}" for behind, each in values.items() if each is not None]
        if samples:
            lines += [f"# HELP mailcloak_{name} {help_text}", f"# TYPE mailcloak_{name} {kind}", *samples]
    return "\n".join(lines) + "\n"


def daemon_metrics(stats: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """No label holds an address, the name of a user or any other text from outside: their values are words of the daemon."""
    answers = {labels(**{name: each[name] for name in ("service", "answer", "reason")}): each["count"] for each in stats["answers"]}
    yield "info", "The version that runs.", {labels(version=stats["version"]): 1}
    yield "start_time_seconds", "When the daemon started, in seconds since 1970.", stats["started_at"]
    yield "answers_total", "Answers, and why.", answers
    yield "recalled_answers_given_total", "Answers that were recalled: given again as a whole.", stats["recalled_answers"]["given"]
    yield "recalled_answers", "Answers that can be recalled.", stats["recalled_answers"]["kept"]
    yield "answer_seconds", "How long an answer took.", dict(histogram_samples(stats["seconds"]))
    lookups = {labels(source=name): stats["lookups"][name] for name in LOOKUPS}
    yield "lookups_total", "Users looked up, by where the answer came from.", lookups
    yield "cache_users", "Cached users.", stats["cache"]["users"]
    yield "cache_missing", "Cached names that no user has.", stats["cache"]["missing"]
    yield "cache_limit", "Entries that the cache may hold.", stats["cache"]["limit"]
    yield "database_up", "Whether the database can be used.", stats["database"]["works"]
    if stats["saved"]:
        yield "saved_up", "Whether last-known.db can be used.", stats["saved"]["works"]
        yield "saved_waiting", "Changes of users that are not on the disk yet.", stats["saved"]["waiting"]
    yield "connections", "Open connections.", {labels(service=name): stats["connections"][name] for name in SERVICES}
    yield "connections_limit", "Connections that each service takes.", stats["connections"]["limit"]
    if stats["last_reload"]:
        yield "last_reload_time_seconds", "When it was last told to reload.", stats["last_reload"]["at"]
        yield "last_reload_success", "Whether that reload was done.", stats["last_reload"]["ok"]
    keycloak = stats["keycloak"]
    if keycloak:
        yield "keycloak_up", "Whether Keycloak answers.", keycloak["state"] == "answers"
        yield "keycloak_state_seconds", "For how long it has done so, or not.", keycloak["since_seconds"]
        yield "keycloak_requests_total", "Requests to Keycloak.", keycloak["requests"]
        yield "keycloak_failed_requests_total", "Requests to Keycloak that got no usable answer.", keycloak["failed"]
        yield "keycloak_request_seconds_total", "The time that requests to Keycloak took.", keycloak["seconds"]


def replication_metrics(replication: Optional[dict[str, Any]]) -> Iterator[tuple[str, str, Any]]:
    """What read_replication() says; nothing where there is one host alone."""
    if replication and replication["role"] != "single":
        info = {labels(role=replication["role"], writer=replication["writer"]): 1}
        yield "replication_info", "The role of this host among several, and the id of the writer.", info
        yield "replication_epoch", "Which writer it is: one more with each promotion.", replication["epoch"]
        yield "replication_serial", "The last change of the writer that is here.", replication["serial"]
        age = replication["age_seconds"]
        yield "replication_age_seconds", "How old is what was brought or published last.", float("inf") if age is None else age
        yield "replication_max_lag_seconds", "replication.max_lag_seconds.", replication["max_lag_seconds"]


def labels(**texts: str) -> str:
    """The labels of a sample. JSON quotes their values as Prometheus does."""
    return "{" + ",".join(f"{name}={json.dumps(text)}" for name, text in texts.items()) + "}"


def histogram_samples(seconds: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The samples of each service's histogram by suffix and labels, cumulative as Prometheus wants them."""
    for service in SERVICES:
        histogram = seconds[service]
        for bound, so_far in zip((*map(repr, histogram["bounds"]), "+Inf"), itertools.accumulate(histogram["counts"])):
            yield f"_bucket{labels(service=service, le=bound)}", so_far
        yield f"_sum{labels(service=service)}", histogram["sum"]
        yield f"_count{labels(service=service)}", sum(histogram["counts"])


def flush(context: Context) -> None:
    """Let the daemon forget one user or all; it asks Keycloak again when it needs them."""
    text = context.options.address
    key = "*" if text is None else read_address(text) if "@" in text else read_username(text)
    forgotten = context.daemon.flush(key)
    if context.options.json:
        print_json({"forgotten": forgotten})
        return
    of = "" if key == "*" else f" of {key}"
    if forgotten:
        say(f"flush: {counted(forgotten, 'cached answer')}{of} forgotten, Keycloak is asked again")
    else:
        say(f"flush: nothing{of} was cached")


# ---------------------------------------------------------------------------------------------------------------------------------
# doctor
# ---------------------------------------------------------------------------------------------------------------------------------


# Of a finding, each with its colour, the worst last.
STATES = {"ok": GREEN, "skipped": YELLOW, "warning": YELLOW, "problem": RED}
EXIT_NOT_RUN = 3


def run_doctor(context: Context) -> int:
    """Print what the checks find, and what to do next; 0 all is well, 1 there are warnings, 2 there are problems, 3 it could not run.

    Only this command loads mailcloakdoctor.py, which has the checks. A reader who goes away changes neither the checks nor the code.
    """
    try:
        import mailcloakdoctor
    except Exception as exc:  # also a file that was cut
        say(f"mailcloakctl: doctor: {cannot_load('mailcloakdoctor.py', exc)}")
        return EXIT_NOT_RUN
    findings: list[mailcloakdoctor.Finding] = []
    errors: list[Optional[OSError]] = []
    try:
        for finding in mailcloakdoctor.run_checks(context.options):
            show_progress("")
            findings.append(finding)
            if not context.options.json:
                errors.append(try_to_print(functools.partial(print_finding, finding)))
        show_progress("")
        if context.options.json:
            rows = [{**finding._asdict(), "items": list(finding.items)} for finding in findings]
            errors.append(try_to_print(functools.partial(print_json, rows)))
        else:
            errors.append(try_to_print(functools.partial(print_summary, findings, mailcloakdoctor.SEE_FINDINGS)))
    except KeyboardInterrupt:
        say("mailcloakctl: doctor: interrupted, not all was checked")
        return EXIT_NOT_RUN
    for error in errors:
        if error and not isinstance(error, BrokenPipeError):
            say(f"mailcloakctl: doctor: the findings could not be printed: {error.strerror or error}, send them elsewhere")
            return EXIT_NOT_RUN
    states = {finding.state for finding in findings if finding.remedy}
    return 2 if "problem" in states else 1 if states else 0


def try_to_print(show: Callable[[], None]) -> Optional[OSError]:
    """Print at once; the error where that fails, and then all further output is dropped."""
    try:
        show()
        sys.stdout.flush()
    except OSError as exc:
        drop_output()
        return exc
    return None


def print_finding(finding: mailcloakdoctor.Finding) -> None:
    """One finding as a row of the table, its remedy below."""
    width = terminal_width()
    first, *rest = hang(f"{finding.state:<8} {finding.check:<22} ", finding.text, width)
    rest += hang(" " * 32 + "-> ", finding.remedy, width) if finding.remedy else []
    print("\n".join([paint(first[:8], STATES[finding.state]) + first[8:].rstrip(), *rest]))


def print_summary(findings: Sequence[mailcloakdoctor.Finding], see_findings: str) -> None:
    """How many findings there are of each state, and the remedy to begin with; not one that begins with see_findings, if possible."""
    counts = collections.Counter(finding.state for finding in findings)
    plural = {state: "s" if counts[state] > 1 and state in ("warning", "problem") else "" for state in STATES}
    print("\n" + paint(", ".join(f"{counts[state]} {state}{plural[state]}" for state in reversed(STATES) if counts[state]), BOLD))
    wrong = [finding for finding in findings if finding.remedy]
    first = min(wrong, key=lambda finding: (finding.state != "problem", finding.remedy.startswith(see_findings)), default=None)
    if first:
        print_field("next", f"{first.check}: {first.remedy}; then mailcloakctl doctor again")
    else:
        print_field("next", "nothing; mailcloakctl ask recipient ADDRESS shows what becomes of mail for an address")


# ---------------------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------------------


def cannot_load(file: str, exc: Exception) -> str:
    """Why a module that lies beside this one cannot be used, and what to do."""
    path = os.path.join(os.path.dirname(os.path.realpath(__file__)), file)
    return f"{path} cannot be loaded: {exc}; install mailcloak again (make install), which puts it there"


def from_data(name: str, module: str = "mailcloakdata") -> Callable[[Context], Optional[int]]:
    """A function of mailcloakdata.py or another module, which is loaded when it is called."""

    def run(context: Context) -> Optional[int]:
        try:
            loaded = importlib.import_module(module)
        except Exception as exc:  # also a file that was cut
            raise Refused(cannot_load(f"{module}.py", exc)) from exc
        code: Optional[int] = getattr(loaded, name)(context)
        return code

    return run


class Command(NamedTuple):
    """A verb of the command line: what does it, and what its help says."""

    run: Callable[[Context], Optional[int]]  # its exit code, None for 0
    help: str
    example: str  # of its arguments and options
    arguments: Sequence[str]
    creates: bool = False  # may it make a database that is missing?


COMMANDS: dict[str, dict[str, Command]] = {  # the verb is "" where there is none
    "aliases": {
        "add": Command(aliases_add, "let an address lead to a user", "info@example.org alice", ("address", "users"), True),
        "add-user": Command(aliases_add_user, "let an alias lead to further users", "info@example.org bob", ("address", "users")),
        "remove-user": Command(aliases_remove_user, "take users from an alias", "info@example.org bob", ("address", "users")),
        "list": Command(aliases_list, "show all aliases, or some", "*@example.org --disabled", ("[glob]",)),
        "show": Command(aliases_show, "show one alias, and where it leads", "info@example.org", ("address",)),
        "move": Command(
            from_data("aliases_move"), "let all aliases of a user lead to another", "alice bob", ("old_user", "new_user")
        ),
        "del": Command(delete, "delete aliases", "info@example.org", ("addresses",)),
        "enable": Command(set_enabled, "let disabled aliases count again", "info@example.org", ("addresses",)),
        "disable": Command(set_enabled, "keep aliases, but let them lead nowhere", "info@example.org", ("addresses",)),
        "export": Command(from_data("aliases_export"), "write all aliases to a file", "aliases.csv", ("[file]",)),
        "import": Command(from_data("import_or_sync"), "add and change what a file says", "aliases.csv --dry-run", ("file",), True),
        "sync": Command(
            from_data("import_or_sync"), "make the aliases equal to a file", "aliases.csv --missing disable", ("file",), True
        ),
    },
    "apps": {
        "add": Command(apps_add, "make an app, or give one a new token", "printer --generate", ("app_id",), True),
        "set": Command(apps_set, "set owner or expiry, and leave the token as it is", "printer --expires 90d", ("app_id",)),
        "list": Command(apps_list, "show all apps and what they may send as", "--unused 90d", ()),
        "allow": Command(apps_allow, "let an app send as an address", "printer scan@example.org", ("app_id", "address")),
        "disallow": Command(apps_disallow, "take an address from an app", "printer scan@example.org", ("app_id", "address")),
        "del": Command(delete, "delete an app and its addresses", "printer", ("app_id",)),
        "enable": Command(set_enabled, "let a disabled app in again", "printer", ("app_id",)),
        "disable": Command(set_enabled, "keep an app, but do not let it log in or send", "printer", ("app_id",)),
    },
    "ask": {
        "recipient": Command(ask_recipient, "say whether mail for an address comes in, and why", "info@example.org", ("address",)),
        "sender": Command(
            ask_sender,
            "say whether a client may use a sender, and why",
            "info@example.org --user alice --method XOAUTH2",
            ("address",),
        ),
        "alias": Command(ask_alias, "say where an address leads, and why", "info@example.org", ("address",)),
    },
    "backup": {
        "": Command(from_data("backup"), "copy the database to a file, and check the copy", "/var/backups/state.db", ("file",))
    },
    "restore": {
        "": Command(from_data("restore"), "make the database what a backup says", "/var/backups/state.db", ("file",), True)
    },
    "db": {
        "check": Command(from_data("db_check"), "say what is wrong in the database", "--fix", ()),
        "mirror": Command(
            from_data("mirror", "mailcloakmirror"),
            "make the database equal to that of another host",
            "/var/lib/mailcloak-shared/shared.db --watch",
            ("source",),
        ),
        "promote": Command(from_data("promote", "mailcloakmirror"), "make this host, which follows another, the writer", "", ()),
    },
    "migrate-from-go": {
        "": Command(
            from_data("migrate_from_go"), "take over the data of the Go program", "/srv/old-mailcloak/state.db", ("file",), True
        )
    },
    "status": {"": Command(show_status, "show what the daemon has answered so far, and how it is", "--watch", ())},
    "doctor": {"": Command(run_doctor, "check the whole installation, and say what to do next", "", ())},
    "flush": {"": Command(flush, "have the daemon forget which users it has cached", "alice@example.org", ("[address]",))},
}
# those that use the database, and not the running daemon
DATABASE_NOUNS = ("aliases", "apps", "backup", "restore", "db", "migrate-from-go")
_ARGUMENT_HELP = {
    "address": "an e-mail address; for an app '<>' is the null sender",
    "addresses": "e-mail addresses; - for the lines of standard input",
    "[glob]": "only addresses like this pattern, with * and ?",
    "users": "Keycloak usernames; with --external also addresses elsewhere",
    "old_user": "the Keycloak username that they lead to now",
    "new_user": "the Keycloak username that they will lead to",
    "app_id": "the app's login name",
    "[address]": "an e-mail address or a login; all that is cached, unless one is named",
    "file": "the file",
    "aliases file": "the file, - for standard input",
    "[file]": "the file to write, - for standard output (the default)",
    "source": "the other database: a file on this host",
}


class ArgumentParser(mailcloak.ArgumentParser):
    """That of the daemon, with the exit code of a tool; of a verb that is not known it names the nearest."""

    usage_exit_code = 2  # argparse's own

    def error(self, message: str) -> Any:
        found = re.match(r"argument [A-Z]+: invalid choice: '(.*)' \(choose from (.*)\)$", message, re.DOTALL)
        if found:
            choices = re.findall(r"[a-z][a-z-]*", found[2])
            near = mailcloak.near_miss(found[1], choices)
            message = f"unknown word {found[1]!r}{near}" if near else f"unknown word, expected one of {', '.join(choices)}"
        super().error(message)


def build_parser() -> ArgumentParser:
    """The parser of the whole command line, made of COMMANDS."""
    common = ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)  # so that they stand before or after the verb
    place = common.add_mutually_exclusive_group()
    place.add_argument(
        "--config", metavar="FILE", help=f"the daemon's configuration, {mailcloak.DEFAULT_CONFIG_PATH} if it is there"
    )
    place.add_argument("--db", metavar="FILE", help="the database itself")
    common.add_argument("--json", action="store_true", help="JSON in place of text; of a list, one array of objects")
    parser = ArgumentParser(prog="mailcloakctl", description=(__doc__ or "").split("\n", 1)[0], parents=[common])
    parser.add_argument("--version", action="version", version=f"mailcloakctl {mailcloak.__version__}")
    nouns = parser.add_subparsers(metavar="NOUN", dest="noun", required=True)
    for noun, verbs in COMMANDS.items():
        if "" in verbs:
            add_command(nouns, common, noun, "", verbs[""])
            continue
        noun_parser = nouns.add_parser(noun, help=f"{', '.join(verbs)}", parents=[common])
        verb_parsers = noun_parser.add_subparsers(metavar="VERB", dest="verb", required=True)
        for verb, command in verbs.items():
            add_command(verb_parsers, common, noun, verb, command)
    return parser


def add_command(parsers: Any, common: argparse.ArgumentParser, noun: str, verb: str, command: Command) -> None:
    """Add the parser of one command to those of its noun, or to the nouns."""
    example = " ".join(filter(None, (noun, verb, command.example)))
    epilog = f"example: mailcloakctl {example}"
    parser = parsers.add_parser(verb or noun, help=command.help, description=f"{command.help}.", epilog=epilog, parents=[common])
    parser.set_defaults(noun=noun, verb=verb, parser=parser)
    if noun == "doctor":
        parser.usage_exit_code = EXIT_NOT_RUN  # 2 says that there are problems
    for argument in command.arguments:
        name = argument.strip("[]")
        number: dict[str, Any] = {"nargs": "?", "default": None} if name != argument else {}
        if name in ("addresses", "users"):
            number = {"nargs": "+"}
        metavar = {"addresses": "ADDRESS", "users": "USERNAME"}.get(name, name.upper())
        parser.add_argument(
            name, metavar=metavar, help=_ARGUMENT_HELP.get(f"{noun} {argument}", _ARGUMENT_HELP[argument]), **number
        )
    if noun == "aliases":
        add_list_options(parser, verb)
        add_file_options(parser, verb)
    if (noun, verb) == ("aliases", "remove-user"):
        parser.add_argument("--force", action="store_true", help="also a user who has the address as e-mail")
    if (noun, verb) in (("aliases", "add"), ("aliases", "add-user")):
        parser.add_argument("--external", action="store_true", help="a USERNAME may be an address elsewhere that gets its mail too")
        parser.add_argument(
            "--force", action="store_true", help="also an alias of an alias, another user's e-mail, a foreign domain"
        )
    if (noun, verb) == ("aliases", "add"):
        parser.add_argument("--replace", action="store_true", help="also when the address leads to others now")
        parser.add_argument("--receive-only", action="store_true", help="its users may not send as it")
    if (noun, verb) == ("apps", "add"):
        token = parser.add_mutually_exclusive_group()
        token.add_argument(
            "token", nargs="?", metavar="TOKEN", help="the password; others on this host can see it in the process list"
        )
        token.add_argument("--token-stdin", action="store_true", help="read the token from one line of standard input")
        token.add_argument("--generate", action="store_true", help="make a strong token and show it, once")
        parser.add_argument("--replace", action="store_true", help="with --generate, also when the app has a token already")
        parser.add_argument("--force", action="store_true", help="also when a user of Keycloak has that name")
    if noun == "apps" and verb in ("add", "set"):
        parser.add_argument(
            "--owner", metavar="USERNAME", help="the Keycloak user who must be enabled for it to count; '' for none"
        )
        parser.add_argument(
            "--expires", metavar="DATE", help="its last day, 2027-01-31, or a number of days from now, 90d; or never"
        )
    if (noun, verb) == ("apps", "list"):
        parser.add_argument(
            "--unused", metavar="DAYS", help="only apps that this host's daemon has not seen used in so many days, 90d"
        )
    add_other_options(parser, noun, verb)


def add_other_options(parser: ArgumentParser, noun: str, verb: str) -> None:
    """Add what the commands take that are neither about aliases nor about apps."""
    if noun == "backup":
        parser.add_argument("--replace", action="store_true", help="also when the file is there already")
    if noun == "restore":
        parser.add_argument("--dry-run", action="store_true", help="only say what would change")
    if noun == "migrate-from-go":
        parser.add_argument("--go-config", metavar="OLD", help="its config.yaml")
        parser.add_argument("--new-config", metavar="NEW", help="where to write the same for this mailcloak, mode 0600")
        parser.add_argument("--skip-bad", action="store_true", help="leave out bad rows, and say so")
        parser.add_argument("--dry-run", action="store_true", help="only say what would come in")
        parser.add_argument("--force", action="store_true", help="also what aliases add would refuse without it")
    if (noun, verb) == ("db", "check"):
        parser.set_defaults(force=True)  # what is stored by --force is no fault
        parser.add_argument("--fix", action="store_true", help="correct what can be corrected without a doubt")
    if (noun, verb) == ("db", "mirror"):
        parser.add_argument("--watch", action="store_true", help="stay, and do it again whenever SOURCE changes")
        way = parser.add_mutually_exclusive_group()
        way.add_argument("--publish", action="store_true", help="on the writer: SOURCE is its database, --db what others follow")
        way.add_argument("--adopt", action="store_true", help="also from another writer, or over rows of one's own; once")
    if (noun, verb) == ("ask", "sender"):
        parser.add_argument("--user", metavar="NAME", default="", help="who has logged in: a username, an e-mail or an app")
        parser.add_argument(
            "--method",
            metavar="M",
            help="how: XOAUTH2 or OAUTHBEARER with a token (the default for a user), PLAIN or LOGIN with a password (for an app)",
        )
    if noun == "status":
        form = parser.add_mutually_exclusive_group()
        form.add_argument("--watch", action="store_true", help=f"again every {WATCH_SECONDS:.0f} seconds, in place, until Ctrl-C")
        need = "argument --prometheus: expected a FILE to replace, or - for standard output"
        either: dict[str, Any] = {"nargs": "?", "const": "", "type": lambda text: text or parser.error(need)}
        form.add_argument("--prometheus", metavar="FILE", help="write the metrics for Prometheus, - to standard output", **either)
    if noun == "doctor":
        parser.add_argument(
            "--postfix-config",
            metavar="DIR",
            action="append",
            help="Postfix's configuration, else postconf's own; once for each instance",
        )
        parser.add_argument("--dovecot-config", metavar="FILE", help="Dovecot's configuration, else doveconf's own")


def add_list_options(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add what aliases list and aliases move take."""
    if verb == "move":
        parser.add_argument("--force", action="store_true", help="also what aliases add would refuse without it")
    if verb != "list":
        return
    parser.add_argument("--user", metavar="NAME", help="only aliases that lead to this user")
    parser.add_argument("--domain", metavar="NAME", help="only aliases in this domain")
    parser.add_argument("--source", metavar="NAME", help="only aliases of this job; '' for those of none")
    parser.add_argument("--disabled", action="store_true", help="only disabled aliases")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--quiet", action="store_true", help="only the addresses, without a heading")
    form.add_argument("--count", action="store_true", help="only how many there are")


def add_file_options(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add what the verbs take that read or write a file of aliases."""
    if verb in ("export", "import", "sync"):
        skipped = "what the format cannot hold" if verb == "export" else "bad lines"
        formats, usernames = ("csv", "jsonl", "virtual", "postfixadmin"), ("local", "address")
        parser.add_argument("--format", choices=formats, help="of the file, unless its name ends so; csv for -")
        parser.add_argument(
            "--usernames", choices=usernames, default="local", help="what a target in virtual and postfixadmin has of the username"
        )
        parser.add_argument("--skip-bad", action="store_true", help=f"leave out {skipped}, and say so")
    if verb == "export":
        parser.set_defaults(file="-")
    if verb in ("import", "sync"):
        parser.add_argument("--dry-run", action="store_true", help="only say what would change")
        parser.add_argument(
            "--max-change",
            metavar="SHARE",
            default="20%",
            help="stop if more of the aliases would change or go (default: 20%%)",
        )
        parser.add_argument("--scope", metavar="DOMAIN", help="only aliases in this domain; all others stay as they are")
        parser.add_argument("--source", metavar="NAME", help="only aliases of the job NAME, which owns what it names")
        parser.add_argument("--external", action="store_true", help="also let aliases lead to addresses elsewhere")
        parser.add_argument("--force", action="store_true", help="also what aliases add would refuse without it")
        parser.add_argument("-v", "--verbose", action="store_true", help="say each change")
    if verb == "import":
        parser.set_defaults(missing="keep")
    if verb == "sync":
        parser.add_argument(
            "--missing",
            choices=("delete", "disable", "keep"),
            default="delete",
            help="what becomes of aliases that the file does not name (default: %(default)s)",
        )


def take_late_argument(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """apps add APP_ID --json TOKEN: argparse lets an optional argument stand only directly after the one before it."""
    parser = options.parser
    for word in rest:  # shown only where it is nearly an option: it may be the token
        near = mailcloak.near_miss(word.partition("=")[0], re.findall(r"--[a-z-]+", parser.format_help()))
        if near and word.startswith("--"):
            parser.error(f"unknown option {word.partition('=')[0]}{near}")
    for argument in COMMANDS[options.noun][options.verb].arguments:
        name, is_optional = argument.strip("[]"), argument.startswith("[")
        if is_optional and getattr(options, name) == parser.get_default(name) and len(rest) == 1 and not rest[0].startswith("-"):
            setattr(options, name, rest[0])
            return
    if (options.noun, options.verb) != ("apps", "add"):
        parser.error("unrecognized arguments")
    if len(rest) > 1 or rest[0].startswith("-"):
        parser.error("an unknown option or a second TOKEN; a TOKEN that begins with - goes after --")
    if options.token is not None or options.token_stdin or options.generate:
        parser.error("TOKEN, --token-stdin and --generate exclude each other")
    options.token = rest[0]


def repair_streams() -> None:
    """Open a standard stream that was closed, on /dev/null; escape the characters that a locale lacks."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  open as long as the program runs
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Drop what is still in the buffer of standard output, so that the end of the program does not fail on it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_command(options: argparse.Namespace) -> int:
    """Run the command that the options name; its exit code. An error of the database becomes a Refused."""
    command = COMMANDS[options.noun][options.verb]
    with contextlib.closing(Context(options, create=command.creates)) as context:
        try:
            exit_code = command.run(context)
        except mailcloak.SQLITE_ERRORS as exc:
            text = f"database {context.path!r}: {mailcloak.describe_sqlite(exc)}, nothing was changed"
            raise Refused(text, database_remedy(exc, context.path)) from exc
        sys.stdout.flush()
    return exit_code or EXIT_DONE


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command; returns its exit code."""
    mask, handlers = signal.pthread_sigmask(signal.SIG_BLOCK, ()), {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    options = argparse.Namespace(config=None, db=None, json=False, noun="")
    try:
        for number, handler in handlers.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler)
        return run(argv, options)
    except KeyboardInterrupt:
        for number in handlers:
            signal.signal(number, signal.SIG_DFL)
        say(f"mailcloakctl: interrupted{', no alias or app was changed' if options.noun in DATABASE_NOUNS else ''}")
        return EXIT_NOT_RUN if options.noun == "doctor" else EXIT_REFUSED
    finally:
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run(argv: Optional[Sequence[str]], options: argparse.Namespace) -> int:
    """Run the command of these arguments; returns its exit code. options has the defaults, and gets what the arguments say.

    Raises KeyboardInterrupt, before an alias or an app was changed.
    """
    top = build_parser()
    if "doctor" in (sys.argv if argv is None else argv):  # also where an option before it is wrong
        top.usage_exit_code = EXIT_NOT_RUN
    _, rest = top.parse_known_args(argv, options)
    parser = options.parser
    if rest:
        take_late_argument(options, rest)
    if options.config is not None and options.db is not None:
        parser.error("--config and --db both name the database, give one of them")
    if "" in (options.config, options.db):
        parser.error("--config or --db is empty, it must name a file")
    if options.noun == "aliases" and options.verb in ("import", "sync") and "" in (options.scope, options.source):
        parser.error("--scope or --source is empty, it must name a domain or a job")
    texts = [getattr(options, name, None) or "" for name in ("source", "glob")]
    if not all(text.isprintable() for text in texts):
        parser.error("an argument holds control characters, or is not UTF-8")
    if options.noun == "status" and options.json and (options.watch or options.prometheus):
        parser.error("--json, --watch and --prometheus exclude each other")
    if (options.noun, options.verb) == ("ask", "sender") and options.method and not options.user:
        parser.error("--method says how --user has logged in, name both")
    options.has_output = sys.stdout is not None
    repair_streams()
    try:
        os.getcwd()
    except OSError:
        say("mailcloakctl: the working directory is gone, change to another")
        return EXIT_NOT_RUN if options.noun == "doctor" else EXIT_REFUSED
    try:
        return run_command(options)
    except mailcloak.ConfigError as exc:
        for problem in exc.problems:
            say(str(problem))
        if options.noun in DATABASE_NOUNS:
            say("mailcloakctl: the configuration names the database; fix it, or name the database with --db")
        else:
            remedy = "fix it, name another with --config, or run this as root"
            say(f"mailcloakctl: the configuration names the daemon's sockets; {remedy}")
    except Refused as exc:
        say(f"mailcloakctl: {exc}")
        return exc.exit_code
    except BrokenPipeError:  # the reader of our list has seen enough
        drop_output()
        return EXIT_DONE
    except OSError as exc:
        drop_output()
        say(f"mailcloakctl: the list cannot be written: {exc.strerror or exc}, send it elsewhere")
    return EXIT_REFUSED


if __name__ == "__main__":
    sys.modules["mailcloakctl"] = sys.modules["__main__"]  # mailcloakdoctor.py imports this very module, not a second one
    sys.exit(main())
