# mailcloakcommon: what the commands of mailcloakctl share. MIT licence, see LICENSE.
"""What the commands of mailcloakctl share: those in mailcloakctl.py, and those in files of their own, which few runs load.

  Refused          why a command was not done, as an administrator reads it, and its exit code
  Context          what a command works with: its options, the database, the policy, the running daemon; each part is read at its first use
  read_address()   and the other read_...(): text that was typed, to a value that may be stored; raises Refused
  say(), answer()  what people are told, or programs with --json; lists are tables (print_list())
  transaction()    all or nothing, one command at a time, and only where this database takes changes: not on a host that follows another
  look_up()        what the running daemon says that Keycloak says; a command goes on without it
  refuse_chain()   and the other refuse_...(): what an alias cannot be

What only some commands need is imported where it is used, or by load(): most of a command's time is its start.

Contents: errors, Context; arguments; output; the database; several mail hosts; what Keycloak says; aliases and apps.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import os
import pwd
import re
import shlex
import shutil
import signal
import sqlite3
import stat
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, TypeVar, Union

import mailcloak
import mailcloakowner

if TYPE_CHECKING:
    import mailcloakask

Columns = dict[str, Callable[[Any], str]]  # the columns of a table, each with the function that makes its value readable
Result = TypeVar("Result")

EXIT_DONE, EXIT_REFUSED, EXIT_OVER_LIMIT = 0, 1, 3  # 2 is argparse's
EXIT_NOT_RUN = 3  # of doctor
BUSY_SECONDS = 60.0  # how long to wait for another mailcloakctl that is writing
STATEMENT_STEPS = 1_000_000  # of SQLite's virtual machine, some 20 ms
INTERRUPT_SECONDS = 0.2  # how long SQLite may wait at a time: Ctrl-C counts only between two waits
ROLE_SECONDS = 2.0  # how long to wait for a commit before the role of a database is read
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # each ends a command as Ctrl-C does, which clears up
ANSWER_SECONDS = 10.0  # the longest wait for what may hang: a socket, a command, a request to Keycloak
WATCH_SECONDS = 2.0  # between two looks of status --watch
MAX_TARGETS = 1000  # of an alias: virtual_alias_expansion_limit of Postfix
MAX_TARGETS_BYTES = 90_000  # socketmap_table(5) takes an answer of 100,000; an extension may come to each mailbox
SHOWN_ITEMS = 10  # of a long enumeration

# ---------------------------------------------------------------------------------------------------------------------------------
# Errors, and what a command works with
# ---------------------------------------------------------------------------------------------------------------------------------


class Refused(mailcloak.MailcloakError):
    """The command cannot be done as asked; nothing was changed."""

    joiner = "; "
    exit_code = EXIT_REFUSED


class OverLimit(Refused):
    """A safety limit stopped the command."""

    exit_code = EXIT_OVER_LIMIT


class InGrace(Refused):
    """A user may have the name: Keycloak has just taken that back."""


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
        if self.creates and not self.options.db and not os.path.lexists(self.path):
            self._refuse_beside_that_of_the_daemon()
        return open_database(self.path, create=self.creates)

    def _refuse_beside_that_of_the_daemon(self) -> None:
        """Raise Refused where the daemon that runs uses another database than sqlite.path, which is missing: a new one would help nobody."""
        used = self.path
        with contextlib.suppress(Refused, mailcloak.ConfigError):  # none runs, or not this version
            used = self.daemon.ask_json("stats", "*", lambda stats: str(stats["database"]["path"]))
        if used != self.path:
            raise Refused(f"database {self.path!r} does not exist, the daemon uses {used!r}", mailcloak.MOVE_DATABASE)

    def replication(self) -> Optional[dict[str, Any]]:
        """How the database stands to those of other mail hosts, as read_replication() says. Raises ConfigError."""
        return read_replication(self.path, self._block("replication").max_lag_seconds)

    @functools.cached_property
    def daemon(self) -> mailcloakask.RunningDaemon:
        """The daemon whose sockets the configuration names. Raises ConfigError."""
        sockets, keycloak = self._block("sockets"), self._configuration[0].get("keycloak")
        seconds = ANSWER_SECONDS + (keycloak or mailcloak.KeycloakConfig).timeout_seconds
        ask = load("mailcloakask", "where_log", "RunningDaemon")
        log = ask.where_log(self._configuration[0].get("daemon"))
        daemon: mailcloakask.RunningDaemon = ask.RunningDaemon(sockets, seconds, log)
        return daemon

    def close(self) -> None:
        """Close the database, if the command has opened it."""
        if "database" in self.__dict__:
            self.database.close()


def load(module: str, *names: str) -> Any:
    """A module that lies beside this one, and that few commands need; names: of what must be in it. Raises Refused."""
    try:
        loaded = importlib.import_module(module)
        for name in names:
            getattr(loaded, name)
        return loaded
    except Exception as exc:  # also a file that was cut
        path = os.path.join(os.path.dirname(os.path.realpath(__file__)), f"{module}.py")
        raise Refused(f"{path} cannot be loaded: {exc}", "install mailcloak again (make install), which puts it there") from exc


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


# ---------------------------------------------------------------------------------------------------------------------------------
# Output
# say() writes to standard error. Standard output belongs to what was asked for: lists, findings, generated tokens, and JSON.
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


def try_to_print(show: Callable[[], None]) -> Optional[OSError]:
    """Print at once; the error where that fails, and then all further output is dropped."""
    try:
        show()
        sys.stdout.flush()
    except OSError as exc:
        drop_output()
        return exc
    return None


def drop_output() -> None:
    """Drop what is still in the buffer of standard output, so that the end of the program does not fail on it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
        is_theirs = exc.remedy and os.geteuid() != 0  # that is for the daemon's user, not for the one who types this
        raise Refused(exc.text, database_remedy(exc, path) if is_theirs or mailcloak.sqlite_fault(exc) else exc.remedy) from exc
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
    if mailcloak.sqlite_fault(exc) == "readonly":
        for place in filter(os.path.exists, (path, os.path.dirname(path))):
            status = os.stat(place)
            if not status.st_mode & stat.S_IWUSR and os.geteuid() in (0, status.st_uid):
                return f"chmod u+w {shlex.quote(place)}"
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


def note_change(event: str, key: str, **values: Any) -> None:
    """A line in syslog (facility mail) for a change that was made: who made it, the old value and the new one; never a token."""
    import syslog

    values = {**values, "uid": os.getuid(), "sudo_user": os.environ.get("SUDO_USER")}
    texts = [f"{name}={mailcloak.escape_for_log(str(value))}" for name, value in values.items() if value is not None]
    syslog.openlog("mailcloakctl", syslog.LOG_PID, syslog.LOG_MAIL)
    syslog.syslog(syslog.LOG_NOTICE, " ".join([event, f"<{mailcloak.escape_for_log(key)}>", *texts]))


# ---------------------------------------------------------------------------------------------------------------------------------
# Several mail hosts
# The role of this one, and how old its rows are. What makes them so is in mailcloakmirror.py.
# ---------------------------------------------------------------------------------------------------------------------------------


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
    "writer": "start mailcloak-publish on this host again, or the job that publishes; its log says more; if another host is the writer now, let this one follow it",
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


# ---------------------------------------------------------------------------------------------------------------------------------
# What Keycloak says
# The running daemon is asked. Where it has no answer, a command says so and goes on.
# ---------------------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------------------
# Aliases and apps
# How they are stored, and which aliases are refused.
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


def shown_state(row: Any) -> str:
    """Whether an app counts now: "enabled", "disabled" or "expired"."""
    if row["enabled"] != 1:
        return "disabled"
    expires_at = row["expires_at"]
    is_expired = expires_at is not None and not (isinstance(expires_at, int) and expires_at > time.time())  # as the daemon sees it
    return "expired" if is_expired else "enabled"


def read_external(context: Context, text: str) -> str:
    """An address elsewhere that an alias may lead to."""
    address = read_address(text)
    policy, domain = context.policy, address.rpartition("@")[2]
    if policy and domain in (*policy.domain, policy.mailbox_domain):
        raise Refused(f"aliases: {address} is not elsewhere, but in our domain {domain}; name the user whose address it is")
    return address


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
