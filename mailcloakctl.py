#!/usr/bin/env python3
# mailcloakctl: edit what mailcloak answers from, ask it, look after it. MIT licence, see LICENSE.
"""Edit the aliases and apps of mailcloak, ask the running daemon, and check the whole installation; by hand and from cron jobs.

  mailcloakctl aliases add ADDRESS USERNAME     an address that leads to a user's mailbox
  mailcloakctl apps add APP_ID --generate       a login that may send, and only as the addresses it is allowed
  mailcloakctl apps allow APP_ID ADDRESS

  mailcloakctl ask recipient ADDRESS            what the daemon answers, and step by step why
  mailcloakctl status                           what the daemon has answered so far, and how it is
  mailcloakctl doctor                           what is wrong with the installation, and what to do next
  mailcloakctl flush [ADDRESS]                  have the daemon forget what it remembers of Keycloak

The database is --db, else sqlite.path of the configuration, else /var/lib/mailcloak/state.db. A change counts from the daemon's next
answer on; nothing has to be reloaded. The daemon is asked over the two sockets that the configuration names; the configuration is
--config, else /etc/mailcloak/config.yaml.

Exit codes: 0 done, or already so; 1 refused, not found or not possible, and then nothing was changed; 2 usage; 3 a safety limit
stopped it. ask: 0 whatever the answer was. doctor: 0 all is well, 1 there are warnings, 2 there are problems.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import datetime
import email.utils
import errno
import functools
import getpass
import grp
import hashlib
import hmac
import io
import itertools
import json
import math
import os
import pwd
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import time
import urllib.parse
from collections import Counter, defaultdict
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Set, Sized, Tuple, TypeVar, Union

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # mailcloak.py lies beside this file, also behind a symlink

import mailcloak

Columns = Dict[str, Callable[[Any], str]]  # the columns of a table, each with the function that makes its value readable

EXIT_DONE, EXIT_REFUSED = 0, 1  # 2 is argparse's; 3 is kept for safety limits
BUSY_SECONDS = 60.0  # how long to wait for another mailcloakctl that is writing
GENERATED_TOKEN_BYTES = 32
GENERATED_ITERATIONS = 4096  # 256 random bits cannot be guessed, however fast a guess is checked
CHOSEN_ITERATIONS = 100_000  # Dovecot checks one login at a time: more would let wrong logins keep good ones waiting
SHORT_TOKEN_CHARS = 16

ANSWER_SECONDS = 10.0  # how long whatever may hang is waited for: a socket, a command, a request to Keycloak
MAX_ANSWER_BYTES = 16 * 1024 * 1024  # of the daemon; its statistics are about 10 kB
MAX_ASKED_CHARS = 2000  # of an address to ask about; an SMTP line of Postfix holds 2048 (line_length_limit)
WATCH_SECONDS = 2.0  # between two looks of status --watch


class Refused(mailcloak.MailcloakError):
    """The command cannot be done as asked; nothing was changed. Of the daemon: what is wrong, a semicolon, what to do."""


class NotAllowed(Refused):
    """The daemon says that this user may not ask for that."""


class Context:
    """What a command works with, each part read at its first use: a command needs few of them."""

    def __init__(self, options: argparse.Namespace, *, create: bool) -> None:
        self.options, self._create = options, create

    @functools.cached_property
    def _raw_config(self) -> Dict[str, Any]:
        return mailcloak.read_yaml(self.options.config or mailcloak.DEFAULT_CONFIG_PATH)

    def _block(self, name: str, cls: type) -> Any:
        """One block of the configuration, whatever is wrong with the others. Raises ConfigError."""
        problems: List[str] = []
        block = mailcloak.read_block(cls, name, self._raw_config.get(name, {}), problems)
        if block is None:
            raise mailcloak.ConfigError(problems)
        return block

    @functools.cached_property
    def path(self) -> str:
        """The path of the database: --db, else sqlite.path of the configuration, else the default. Raises ConfigError."""
        if self.options.db:
            return str(os.path.abspath(self.options.db))
        if not self.options.config and not os.path.exists(mailcloak.DEFAULT_CONFIG_PATH):
            return mailcloak.DEFAULT_DATABASE_PATH
        return str(self._block("sqlite", mailcloak.SqliteConfig).path)

    @functools.cached_property
    def policy(self) -> Optional[mailcloak.PolicyConfig]:
        """None where no configuration says which domains are ours; what is wrong with it is the daemon's to report."""
        policy: Optional[mailcloak.PolicyConfig] = None
        with contextlib.suppress(mailcloak.ConfigError):
            if self.options.config or (not self.options.db and os.path.exists(mailcloak.DEFAULT_CONFIG_PATH)):
                policy = self._block("policy", mailcloak.PolicyConfig)
        return policy

    @functools.cached_property
    def database(self) -> sqlite3.Connection:
        """The database, opened at its first use: arguments are checked before, so that a refused command does not create it."""
        return open_database(self.path, create=self._create)

    @functools.cached_property
    def daemon(self) -> RunningDaemon:
        """The daemon whose sockets the configuration names. Raises ConfigError."""
        sockets = self._block("sockets", mailcloak.SocketsConfig)
        return RunningDaemon(sockets, ANSWER_SECONDS + (number(self._raw_config, "keycloak", "timeout_seconds") or 5))

    def close(self) -> None:
        if "database" in self.__dict__:
            self.database.close()


# ---------------------------------------------------------------------------------------------------------------------------------
# Arguments: text of a person to values that may be stored
# ---------------------------------------------------------------------------------------------------------------------------------


def read_address(text: str) -> str:
    try:
        return mailcloak.parse_plain_address(text).text
    except ValueError as exc:
        raise Refused(f"{text!r} is not an address for this: {exc}") from None


def read_sender(text: str) -> str:
    """An address that an app may send from; '<>' is the null sender, stored as the empty string."""
    return "" if text == "<>" else read_address(text)


def read_username(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise Refused(f"{text!r} is not a username: it cannot be empty or hold control characters")
    if len(text) > mailcloak.MAX_ADDRESS_CHARS:
        raise Refused(f"a username cannot be longer than {mailcloak.MAX_ADDRESS_CHARS} characters")
    return text.strip().lower()


def read_app_id(text: str) -> str:
    """Dovecot lets no other characters of a username through to its query (auth_username_chars)."""
    if not re.fullmatch(r"[A-Za-z0-9._@-]{1,254}", text):
        # without showing what may be a TOKEN that changed places with APP_ID
        raise Refused("APP_ID is not an app id: it takes 1 to 254 letters a-z, digits and . _ - @")
    return text.lower()


def read_expiry(text: str) -> Optional[int]:
    """Seconds since 1970 from which an app no longer counts: after so many days, or after the day named; "never" takes it away."""
    if text == "never":
        return None
    days = re.fullmatch(r"([0-9]{1,5})d", text, re.ASCII)
    if days and int(days[1]):
        return int(time.time()) + int(days[1]) * 86400
    try:
        day = datetime.date.fromisoformat(text)
        midnight = datetime.datetime.combine(day + datetime.timedelta(days=1), datetime.time())
        seconds = int(midnight.timestamp())  # in the zone of this host
    except (ValueError, OverflowError):
        raise Refused(f"{text!r} is not a date such as 2027-01-31, a number of days such as 90d, or never") from None
    if seconds <= time.time():
        raise Refused(f"{text} is in the past; apps disable takes an app out of use at once")
    return seconds


def check_token(token: str) -> str:
    if not token or not token.isprintable():
        raise Refused("a token cannot be empty or hold control characters, --generate makes a good one")
    if len(token) < SHORT_TOKEN_CHARS:
        say(f"warning: a token of {len(token)} characters can be guessed, --generate makes a strong one")
    return token


def hash_token(token: str, iterations: int) -> str:
    """The token as Dovecot stores it in the scheme SCRAM-SHA-256 (RFC 5802, section 3; RFC 7677)."""
    salt = secrets.token_bytes(16)
    salted = hashlib.pbkdf2_hmac("sha256", token.encode(), salt, iterations)
    stored_key = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server_key = hmac.digest(salted, b"Server Key", "sha256")
    parts = [base64.b64encode(part).decode("ascii") for part in (salt, stored_key, server_key)]
    return "{SCRAM-SHA-256}" + ",".join([str(iterations), *parts])


def read_token(options: argparse.Namespace) -> str:
    """The token that the user chose, by whichever way was asked for."""
    if options.token_stdin:
        try:
            return check_token(sys.stdin.buffer.readline().decode("utf-8").rstrip("\r\n"))
        except UnicodeDecodeError:
            raise Refused("the token on standard input is not UTF-8, --generate makes a good one") from None
    if options.token is not None:
        return check_token(options.token)
    if not sys.stdin.isatty():
        raise Refused("no token: name one, or use --generate or --token-stdin")
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
    with contextlib.suppress(OSError):  # nobody reads it; what the command does is not decided by that
        print(shown_text(message), file=sys.stderr)


def shown_sender(sender: str) -> str:
    return sender or "<>"


def shown_time(seconds: Any) -> str:
    if seconds is None:
        return "-"  # where time.localtime() would take the time it is now
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (TypeError, ValueError, OverflowError, OSError):
        return str(seconds)  # a row that somebody else wrote


def shown_text(text: Any) -> str:
    """Text that may come from anywhere, with control characters escaped: it moves no cursor and forges no line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def shown_seconds(seconds: Any) -> str:
    """A span of time in its two greatest units."""
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not math.isfinite(seconds):
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    index = next(index for index, (size, _) in enumerate(units) if seconds >= size)
    (size, unit), (lesser_size, lesser_unit) = units[index : index + 2]
    return f"{seconds // size:.0f} {unit} {seconds % size // lesser_size:.0f} {lesser_unit}"


def print_list(options: argparse.Namespace, rows: Sequence[Dict[str, Any]], columns: Columns) -> None:
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
    """The lines of a table whose first row is its heading. Where it is wider than width, the widest columns go on in further lines."""
    widths = [max(len(row[index]) for row in table) for index in range(len(table[0]))]
    least = 8
    while width and sum(widths) + 2 * (len(widths) - 1) > width and max(widths) > least:
        widths[widths.index(max(widths))] -= 1
    for row in table:
        cells = [wrap(text, cell_width) for text, cell_width in zip(row, widths)]
        for parts in itertools.zip_longest(*cells, fillvalue=""):
            yield "  ".join(part.ljust(cell_width) for part, cell_width in zip(parts, widths)).rstrip()


def wrap(text: str, width: Optional[int]) -> List[str]:
    """The text in lines of at most width characters; in one where width is None."""
    lines = textwrap.wrap(text, max(1, width), break_on_hyphens=False) if width and len(text) > width else [text]
    return lines or [""]


def hang(head: str, text: str, width: Optional[int]) -> List[str]:
    """Lines of the head and its text, which goes on below itself where the terminal ends."""
    first, *rest = wrap(shown_text(text), max(20, width - len(head)) if width else None)
    return [head + first, *(" " * len(head) + line for line in rest)]


def print_field(label: str, text: str) -> None:
    print("\n".join(hang(f"{label:<15}", text, terminal_width())))


GREEN, YELLOW, RED, BOLD = "32", "33", "31", "1"


def paint(text: str, colour: str) -> str:
    """The text in a colour ("" for none), on a terminal that wants colours (https://no-color.org)."""
    wanted = colour and sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
    return f"\x1b[{colour}m{text}\x1b[0m" if wanted else text


def yes_no(value: Any) -> str:
    return "yes" if value == 1 else "no"


# ---------------------------------------------------------------------------------------------------------------------------------
# The database
# ---------------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """All or nothing; waits for its turn where another command is writing."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if database.in_transaction:  # on a full disk SQLite has rolled back by itself
            database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


def open_database(path: str, *, create: bool) -> sqlite3.Connection:
    """The database with its schema; raises Refused. create says whether the command may make a file that is missing."""
    try:
        os.stat(path)
    except FileNotFoundError:
        if not create:
            raise Refused(f"database {path!r} does not exist yet, aliases add and apps add create it; --db names another") from None
    except OSError as exc:
        raise Refused(f"database {path!r}: {exc.strerror}{database_hint(exc, path)}") from exc
    try:
        done = mailcloak.prepare_database(path, BUSY_SECONDS, create=create)
        if done:
            say(f"database {path} {done}")
        database = mailcloak.connect_database(path, BUSY_SECONDS)
    except mailcloak.StartError as exc:
        raise Refused(str(exc)) from exc
    except mailcloak.DatabaseUnavailable as exc:
        raise Refused(f"{exc}{database_hint(exc, path)}") from exc
    database.row_factory = sqlite3.Row
    return database


def database_hint(exc: BaseException, path: str) -> str:
    """The way out of an error of the database, from what the file system says about it."""
    if "locked" in str(exc):
        return "; another program is writing, try again when it is done"
    if os.path.isdir(path):
        return "; this is a directory, name the file in it with --db or sqlite.path"
    if "restore it from a backup" in str(exc):
        return ""
    with contextlib.suppress(OSError):
        if os.statvfs(os.path.dirname(path)).f_flag & os.ST_RDONLY:
            return "; its file system is mounted read-only, mount it for writing"
    if "full" in str(exc) or not os.statvfs(os.path.dirname(path)).f_favail:
        return "; make room on its disk and try again"
    readable = os.access(path, os.R_OK | os.W_OK) and os.access(os.path.dirname(path), os.W_OK | os.X_OK)
    if not readable:
        return f"; run mailcloakctl as {owner_name(path)}, whose database this is, or as root"
    return "; name the right one with --db or sqlite.path, or restore this one from a backup"


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


def named_row(context: Context) -> Tuple[str, str, str]:
    """Table, key column and key of the alias or app that the arguments name."""
    if context.options.noun == "aliases":
        return "aliases", "alias_email", read_address(context.options.address)
    return "apps", "app_id", read_app_id(context.options.app_id)


def set_enabled(context: Context) -> None:
    table, column, key = named_row(context)
    enabled = context.options.verb == "enable"
    word = "enabled" if enabled else "disabled"
    touch = ", updated_at = strftime('%s', 'now')" if table == "aliases" else ""
    with transaction(context.database):
        row = context.database.execute(f"SELECT enabled FROM {table} WHERE {column} = ?", (key,)).fetchone()  # noqa: S608
        if row is None:
            raise Refused(f"{table}: {key} does not exist, {table} list shows what does")
        if row["enabled"] != enabled:
            context.database.execute(f"UPDATE {table} SET enabled = ?{touch} WHERE {column} = ?", (int(enabled), key))  # noqa: S608
    say(f"{table}: {key} {'is ' + word + ' already' if row['enabled'] == enabled else word}")


def delete(context: Context) -> None:
    table, column, key = named_row(context)
    with transaction(context.database):
        if not context.database.execute(f"DELETE FROM {table} WHERE {column} = ?", (key,)).rowcount:  # noqa: S608
            raise Refused(f"{table}: {key} does not exist, {table} list shows what does")
    say(f"{table}: {key} deleted")


# ---------------------------------------------------------------------------------------------------------------------------------
# aliases
# ---------------------------------------------------------------------------------------------------------------------------------


def aliases_add(context: Context) -> None:
    address, username = read_address(context.options.address), read_username(context.options.username)
    database = context.database
    with transaction(database):
        row = database.execute("SELECT username, enabled FROM aliases WHERE alias_email = ?", (address,)).fetchone()
        is_there = row and row["username"].lower() == username
        if row and not is_there and not context.options.replace:
            raise Refused(f"aliases: {address} leads to {row['username']} already, --replace changes that")
        if not is_there and not context.options.force:
            refuse_chain(context, address, username)
        app = database.execute("SELECT 1 FROM apps WHERE app_id = ?", (username,)).fetchone()
        database.execute(
            "INSERT INTO aliases (alias_email, username) VALUES (?, ?) ON CONFLICT (alias_email)"
            " DO UPDATE SET username = excluded.username, updated_at = strftime('%s', 'now') WHERE username <> excluded.username",
            (address, username),
        )
    if is_there:
        say(f"aliases: {address} leads to {username} already")
    else:
        say(f"aliases: {address} {'now ' if row else ''}leads to {username}")
    if row and not row["enabled"]:
        say(f"aliases: {address} is disabled, aliases enable {address} makes it count")
    if context.policy and mailcloak.normalise_address(address).domain not in context.policy.domain:
        say(f"warning: {address} is not in policy.domain ({', '.join(sorted(context.policy.domain))}), so it leads nowhere")
    if app:
        say(f"warning: {username} is an app, and apps receive no mail; name the user who is to have it")


def refuse_chain(context: Context, address: str, username: str) -> None:
    """Postfix looks the answer of an alias up again, so an alias that leads to another alias would carry mail past its user.

    With policy.mailbox_domain set an answer is never an alias, and nothing needs to be refused.
    """
    if context.policy and context.policy.mailbox_domain:
        return
    mailbox = mailbox_of(address, username)
    if mailbox == address:
        return  # Postfix stops at an answer that is the question
    find = context.database.execute
    other = find("SELECT username FROM aliases WHERE alias_email = ?", (mailbox,)).fetchone()
    if other and mailbox_of(mailbox, other["username"]) == address:
        raise Refused(
            f"aliases: {mailbox} leads to {other['username']}, whose mailbox is {address}: this alias would close a circle;"
            f" aliases del {mailbox} first, or use --force"
        )
    if other and mailbox_of(mailbox, other["username"]) != mailbox:
        raise Refused(
            f"aliases: the mailbox of {username} is {mailbox}, which is itself an alias and leads to {other['username']};"
            f" name {other['username']} instead, or use --force"
        )
    for other in find(
        "SELECT alias_email, username FROM aliases WHERE lower(username) IN (?, ?) AND alias_email <> ? ORDER BY alias_email",
        (address.rpartition("@")[0], address, address),
    ):
        if mailbox_of(other["alias_email"], other["username"]) == address:
            raise Refused(
                f"aliases: {other['alias_email']} leads to {other['username']}, whose mailbox is {address}:"
                f" this alias would carry that mail on to {username}; --force does it all the same"
            )


def mailbox_of(address: str, username: str) -> str:
    """Where Postfix is told to deliver what comes for an alias, in the form in which it asks again."""
    return mailcloak.normalise_address(mailcloak.format_mailbox(username.lower(), "", address.rpartition("@")[2])).text


def aliases_list(context: Context) -> None:
    rows = context.database.execute("SELECT alias_email, username, enabled, updated_at FROM aliases ORDER BY alias_email")
    columns: Columns = {"alias_email": str, "username": str, "enabled": yes_no, "updated_at": shown_time}
    print_list(context.options, [dict(row) for row in rows], columns)


# ---------------------------------------------------------------------------------------------------------------------------------
# apps
# ---------------------------------------------------------------------------------------------------------------------------------


def apps_add(context: Context) -> None:
    app_id = read_app_id(context.options.app_id)
    generated = secrets.token_urlsafe(GENERATED_TOKEN_BYTES) if context.options.generate else None
    token = generated or read_token(context.options)
    secret_hash = hash_token(token, GENERATED_ITERATIONS if generated else CHOSEN_ITERATIONS)
    changes = read_app_changes(context.options)
    database = context.database
    with transaction(database):
        alias = database.execute("SELECT alias_email FROM aliases WHERE lower(username) = ? LIMIT 1", (app_id,)).fetchone()
        if alias:
            raise Refused(f"apps: {app_id} is a username, the alias {alias['alias_email']} leads to it; choose another app id")
        known = database.execute("SELECT enabled FROM apps WHERE app_id = ?", (app_id,)).fetchone()
        database.execute(
            "INSERT INTO apps (app_id, secret_hash) VALUES (?, ?) ON CONFLICT (app_id) DO UPDATE SET secret_hash = excluded.secret_hash",
            (app_id, secret_hash),
        )
        change_app(context, app_id, changes)
        if generated:  # before the commit: a token that nobody saw must not lock the app out
            show_token(context.options, app_id, generated)
    say(f"apps: {app_id} {'has a new token, the old one no longer works' if known else 'added'}")
    if known and not known["enabled"]:
        say(f"apps: {app_id} is disabled, apps enable {app_id} lets it in again")
    say_app_changes(app_id, changes)
    if not known:
        say(f"apps: it may not send yet, apps allow {app_id} ADDRESS lets it use an address")


def apps_set(context: Context) -> None:
    app_id, changes = read_app_id(context.options.app_id), read_app_changes(context.options)
    if not changes:
        raise Refused("apps set: nothing to set, name --owner, --expires or both")
    with transaction(context.database):
        require_app(context, app_id)
        change_app(context, app_id, changes)
    say_app_changes(app_id, changes)


def read_app_changes(options: argparse.Namespace) -> Dict[str, Any]:
    """The columns that --owner and --expires set, with their values; None takes a value away."""
    changes: Dict[str, Any] = {}
    if options.owner is not None:
        changes["owner"] = read_username(options.owner) if options.owner else None
    if options.expires is not None:
        changes["expires_at"] = read_expiry(options.expires)
    return changes


def change_app(context: Context, app_id: str, changes: Dict[str, Any]) -> None:
    for column, value in changes.items():  # two names of this file, never text of a user
        context.database.execute(f"UPDATE apps SET {column} = ? WHERE app_id = ?", (value, app_id))  # noqa: S608


def say_app_changes(app_id: str, changes: Dict[str, Any]) -> None:
    if "owner" in changes:
        owner = changes["owner"]
        say(f"apps: {app_id} counts only while {owner} is enabled in Keycloak" if owner else f"apps: {app_id} has no owner now")
    if "expires_at" in changes:
        expires_at = changes["expires_at"]
        say(f"apps: {app_id} expires at {shown_time(expires_at)}" if expires_at else f"apps: {app_id} does not expire now")


def shown_state(row: Any) -> str:
    if row["enabled"] != 1:
        return "disabled"
    return "expired" if row["expires_at"] is not None and row["expires_at"] <= time.time() else "enabled"


def show_token(options: argparse.Namespace, app_id: str, token: str) -> None:
    try:
        print(json.dumps({"app_id": app_id, "token": token}) if options.json else token, flush=True)
    except OSError as exc:
        drop_output()
        raise Refused(f"the token cannot be shown: {exc.strerror}; nothing was changed, try again on a terminal") from exc


def apps_list(context: Context) -> None:
    stored = context.database.execute("SELECT app_id, enabled, created_at, owner, expires_at FROM apps ORDER BY app_id")
    rows = [dict(row) for row in stored]
    allowed: Dict[str, List[str]] = {row["app_id"]: [] for row in rows}
    for row in context.database.execute("SELECT app_id, from_addr FROM app_from WHERE enabled = 1 ORDER BY app_id, from_addr"):
        allowed.setdefault(row["app_id"], []).append(row["from_addr"])
    for entry in rows:
        entry["from_addr"] = allowed[entry["app_id"]]
        entry["state"] = shown_state(entry)
    columns: Columns = {
        "app_id": str,
        "state": str,
        "owner": lambda owner: owner or "-",
        "expires_at": lambda expires_at: "never" if expires_at is None else shown_time(expires_at),
        "created_at": shown_time,
        "from_addr": lambda senders: ", ".join(map(shown_sender, senders)) or "(none: may not send)",
    }
    print_list(context.options, rows, columns)


def apps_allow(context: Context) -> None:
    app_id, sender = read_app_id(context.options.app_id), read_sender(context.options.address)
    with transaction(context.database):
        require_app(context, app_id)
        changed = context.database.execute(
            "INSERT INTO app_from (app_id, from_addr) VALUES (?, ?) ON CONFLICT (app_id, from_addr) DO UPDATE SET enabled = 1 WHERE enabled = 0",
            (app_id, sender),
        ).rowcount
    say(f"apps: {app_id} may {'now ' if changed else ''}send as {shown_sender(sender)}{'' if changed else ' already'}")


def apps_disallow(context: Context) -> None:
    app_id, sender = read_app_id(context.options.app_id), read_sender(context.options.address)
    with transaction(context.database):
        require_app(context, app_id)
        if not context.database.execute("DELETE FROM app_from WHERE app_id = ? AND from_addr = ?", (app_id, sender)).rowcount:
            raise Refused(f"apps: {app_id} was not allowed to send as {shown_sender(sender)}, apps list shows what it is allowed")
    say(f"apps: {app_id} may no longer send as {shown_sender(sender)}")


def require_app(context: Context, app_id: str) -> None:
    if not context.database.execute("SELECT 1 FROM apps WHERE app_id = ?", (app_id,)).fetchone():
        raise Refused(f"apps: {app_id} does not exist, apps add {app_id} --generate makes it")


# ---------------------------------------------------------------------------------------------------------------------------------
# The running daemon
# Its two sockets, asked as Postfix asks them. Whatever goes wrong is a Refused that names the way out; nothing is waited for longer
# than the time given.
# ---------------------------------------------------------------------------------------------------------------------------------


class RunningDaemon:
    """Questions to the daemon, each over a connection of its own."""

    def __init__(self, sockets: mailcloak.SocketsConfig, seconds: float) -> None:
        self.sockets, self._seconds = sockets, seconds

    def ask_policy(self, **attributes: str) -> str:
        """The answer of the policy service, such as "550 5.1.1 No such user". Source: SMTPD_POLICY_README."""
        lines = "".join(f"{name}={value}\n" for name, value in {"request": "smtpd_access_policy", **attributes}.items())
        path = self.sockets.policy_socket
        answer = self._exchange(path, lines.encode() + b"\n", self._read_policy_answer)
        if not answer.startswith("action="):
            raise senseless_answer(path)
        return answer[len("action=") :]

    def ask_map(self, name: str, key: str) -> Tuple[str, str]:
        """The status and the text of a map's answer, such as ("OK", "alice@example.org"). Source: socketmap_table(5)."""
        query = mailcloak.encode_netstring(f"{name} {key}".encode())
        path = self.sockets.socketmap_socket
        status, _, text = self._exchange(path, query, self._read_netstring).partition(" ")
        if status not in ("OK", "NOTFOUND", "TEMP", "PERM"):
            raise senseless_answer(path)
        return status, text

    def ask_json(self, name: str, key: str) -> Dict[str, Any]:
        """The object that one of the daemon's own maps answers with. Raises NotAllowed where it says that this user may not ask."""
        status, text = self.ask_map(name, key)
        if status == "PERM" and text.startswith("unknown map"):
            raise Refused(f"the running daemon does not know {name!r}: it is of an older version; restart it")
        if status == "PERM" and text in ("no key", "not a question"):
            raise Refused(f"the running daemon does not understand the question ({text}): it is of another version; restart it")
        if status == "PERM":
            owner = owner_name(self.sockets.socketmap_socket)
            raise NotAllowed(f"the daemon says: {text}; run mailcloakctl as root, as the daemon's own user or as {owner}")
        try:
            value = json.loads(text) if status == "OK" else None
        except (ValueError, RecursionError):
            value = None
        if status == "TEMP":
            raise Refused(f"the daemon says: {text}; its log says why")
        if not isinstance(value, dict):
            raise senseless_answer(self.sockets.socketmap_socket)
        return value

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
                        raise Refused(
                            f"the daemon at {path} closed the connection without an answer; its log says why, or something else listens there"
                        )
                    if len(answer) > MAX_ANSWER_BYTES:
                        raise senseless_answer(path)
            except socket.timeout:
                raise Refused(
                    f"no answer at {path} within {self._seconds:.0f} s; look at the daemon's log, and restart it"
                ) from None
            except ValueError:
                raise senseless_answer(path) from None
            except OSError as exc:
                raise Refused(describe_failure(path, exc)) from exc

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


def describe_failure(path: str, exc: OSError) -> str:
    if exc.errno in (errno.ENOENT, errno.ECONNREFUSED):
        gone = "there is no socket" if exc.errno == errno.ENOENT else "nobody listens"
        return (
            f"{gone} at {path}: the daemon is not running, or runs with another configuration; start it (rc-service mailcloak start,"
            " systemctl start mailcloak), or name its configuration with --config"
        )
    if exc.errno in (errno.EACCES, errno.EPERM):
        return f"this user may not connect to {path}; run mailcloakctl as root or as {owner_name(path)}"
    return f"{path}: {exc.strerror or exc}; look at the daemon's log, and restart it"


def senseless_answer(path: str) -> Refused:
    return Refused(f"the answer at {path} makes no sense; something else listens there, or a daemon of another version: restart it")


def pick(value: Any, *path: str) -> Any:
    """What stands at that place of a JSON value; None where there is no such place: the daemon may be of another version."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def number(value: Any, *path: str) -> Optional[float]:
    """The number at that place of a JSON value, None if there is none."""
    found = pick(value, *path)
    is_number = isinstance(found, (int, float)) and not isinstance(found, bool) and math.isfinite(found)
    return found if is_number else None


def objects(value: Any, *path: str) -> List[Dict[str, Any]]:
    """The objects in the list at that place of a JSON value."""
    found = pick(value, *path)
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


# ---------------------------------------------------------------------------------------------------------------------------------
# ask: what the daemon answers, and why
# The answer is that of the very question which Postfix would ask; the reasons come from the daemon's map "explain".
# ---------------------------------------------------------------------------------------------------------------------------------


class Reason(NamedTuple):
    """A row of the decision table in words, and what would have to change for another answer.

    change may name {address}, the address asked about; {alias}, the alias that decided; {user}, the login asked about.
    """

    rule: str
    change: str


_OWNERLESS = "mailcloakctl aliases add {address} USERNAME, or give a user this e-mail in Keycloak"
_AFTERWARDS = "; it counts when policy.cache_ttl_seconds are over, or after mailcloakctl flush"
_MEND_KEYCLOAK = (
    "mailcloakctl status and doctor say what is wrong with Keycloak; policy.keycloak_failure_mode is what is answered until then"
)
_MEND_DATABASE = "mailcloakctl doctor says what is wrong with the database"
_MEND_REQUEST = "a request that Postfix does not send: compare main.cf with examples/postfix/main.cf"

# Of every reason that mailcloak.py gives for an answer. A test looks for them there.
REASONS: Dict[str, Reason] = {
    # ---- whose an address is: recipients and the alias map
    "alias": Reason(
        "an enabled alias owns the address: its mail comes in, and goes to the alias's user",
        "mailcloakctl aliases disable {alias}, or aliases add {alias} USERNAME --replace to let it lead to somebody else",
    ),
    "primary": Reason(
        "the address is the primary e-mail of an enabled user: its mail comes in, and goes to him",
        "disable the user or change his e-mail in Keycloak" + _AFTERWARDS + " {address}",
    ),
    "unknown-recipient": Reason(
        "nobody has the address, neither an enabled alias nor an enabled user with this primary e-mail: refused", _OWNERLESS
    ),
    "mailbox-domain": Reason(
        "an address in policy.mailbox_domain, where aliases and primary e-mails lead: from outside it is refused",
        "nothing: write to one of the user's own addresses",
    ),
    "too-many-routes": Reason(
        "an address that leads over a great many hosts, as nobody writes it: refused", "nothing: write to the address itself"
    ),
    "recipient-not-local": Reason(
        "the address is not in policy.domain: whether mail for it is relayed, Postfix decides by itself",
        "policy.domain, if the domain is ours",
    ),
    "not-local": Reason(
        "the address is not in policy.domain, or has a form that no alias can have: there is no alias",
        "policy.domain, if the domain is ours",
    ),
    "no-alias": Reason(
        "no enabled alias owns the address: mail for it is delivered as the address stands",
        "mailcloakctl aliases add {address} USERNAME",
    ),
    "shared-primary": Reason(
        "several users have this primary e-mail, so nobody can say whose mailbox the mail belongs in: it waits",
        "give all of them but one another e-mail in Keycloak",
    ),
    # ---- senders who have not logged in
    "sender-not-local": Reason(
        "nobody has logged in, and the sender is not in policy.domain: not mailcloak's business",
        "policy.domain, if the domain is ours",
    ),
    "local-sender-unauthenticated": Reason(
        "nobody has logged in, and the sender is one of ours: what policy.unauthenticated_local_sender says",
        "let the client log in, as a user or as an app (mailcloakctl apps add); or list a host of yours in Postfix's mynetworks, with"
        " permit_mynetworks in smtpd_sender_restrictions; policy.unauthenticated_local_sender for everybody",
    ),
    # ---- users who have logged in
    "own-alias": Reason("the sender is an alias of the user: he may use it", "mailcloakctl aliases disable {alias}"),
    "own-primary": Reason(
        "the sender is the user's own primary e-mail: he may use it", "change his e-mail in Keycloak" + _AFTERWARDS + " {address}"
    ),
    "null-sender": Reason("an enabled user may use the null sender <>, for notices and vacation mail", "disable him in Keycloak"),
    "sender-not-owned": Reason(
        "the login is good, but the sender belongs to somebody else, to several users or to nobody: refused",
        "mailcloakctl aliases add {address} {user} lets him use it, if nobody else has it",
    ),
    "foreign-sender": Reason(
        "a user, and a sender outside policy.domain: what policy.foreign_sender says",
        "policy.foreign_sender: dunno lets users send as other domains; or policy.domain, if the domain is ours",
    ),
    "login-missing": Reason(
        "no app has this name, nor has a user of Keycloak with an e-mail: refused",
        "make the user, or give him an e-mail, in Keycloak",
    ),
    "login-disabled": Reason("the user is disabled in Keycloak: refused", "enable him in Keycloak"),
    "login-ambiguous": Reason(
        "the login is the name of one user and the e-mail of another, so it proves neither: refused",
        "rename one of the two, or change the other's e-mail, in Keycloak",
    ),
    # ---- apps
    "app": Reason("an app, and the sender is in its list: it may use it", "mailcloakctl apps disallow {user} {address}"),
    "app-sender": Reason("an app, and the sender is not in its list: refused", "mailcloakctl apps allow {user} {address}"),
    "app-disabled": Reason("the app is disabled: refused", "mailcloakctl apps enable {user}"),
    "app-expired": Reason("the app has expired: refused", "mailcloakctl apps set {user} --expires 90d"),
    "app-owner-missing": Reason(
        "the user who owns the app does not exist in Keycloak: refused", "mailcloakctl apps set {user} --owner USERNAME"
    ),
    "app-owner-disabled": Reason(
        "the user who owns the app is disabled in Keycloak: refused",
        "enable the owner in Keycloak, or mailcloakctl apps set {user} --owner USERNAME",
    ),
    "app-owner-ambiguous": Reason(
        "the app's owner is the name of one user and the e-mail of another: refused",
        "mailcloakctl apps set {user} --owner USERNAME, or rename one of the two in Keycloak",
    ),
    # ---- what cannot be known
    "directory-unavailable": Reason(
        "Keycloak gave no usable answer, and nothing that is remembered or stored decides without it", _MEND_KEYCLOAK
    ),
    "database-unavailable": Reason("the database cannot be read: nobody can say whose the address is", _MEND_DATABASE),
    "internal-error": Reason(
        "a fault of mailcloak itself: the answer is to try later", "the daemon's log has a line 'internal error'; report it"
    ),
    "other-state": Reason("neither at RCPT nor at MAIL: mailcloak has nothing to say", _MEND_REQUEST),
    "nothing-to-check": Reason(
        "the recipient was to be checked where there is none yet: mailcloak has nothing to say", _MEND_REQUEST
    ),
    # ---- what mailcloakctl asks
    "stats": Reason("mailcloakctl status", ""),
    "explain": Reason("mailcloakctl ask", ""),
    "flush": Reason("mailcloakctl flush", ""),
    "bad-question": Reason("a question that the daemon does not understand", "a mailcloakctl of the same version"),
    "not-permitted": Reason("a user who may connect, but neither see why nor have anything forgotten", "run mailcloakctl as root"),
    # ---- what Postfix does not ask
    "unknown-map": Reason("there is no map of this name", "in main.cf, virtual_alias_maps: the map is called alias"),
    "no-key": Reason("the map was asked without a key", _MEND_REQUEST),
}

# An answer by its first word, in the words of people; the colour is that of a terminal.
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
    "cache": "remembered",
    "keycloak": "Keycloak",
    "kept": "kept for outages",
    "static": "static_users",
}


def ask_recipient(context: Context) -> None:
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
    options = context.options
    address, user = read_asked_address(options.address), read_username(options.user) if options.user else ""
    method = read_method(options.method or "PLAIN") if user else ""
    question = {"protocol_state": "RCPT", "policy_context": "sender", "sender": address}
    question |= {"sasl_username": user, "sasl_method": method}
    explanation = explain(context, {"policy": question})
    answer = context.daemon.ask_policy(**question)
    who = f"{user}, logged in by {method}," if user else "somebody who has not logged in"
    show_answer(context, f"may {who} send as <{address}>?", answer, None, describe(explanation, answer, address, user))


def ask_alias(context: Context) -> None:
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
    if not re.fullmatch(r"[A-Za-z0-9-]{1,40}", text):
        raise Refused(f"{text!r} is not a SASL mechanism such as PLAIN or XOAUTH2")
    return text.upper()


def explain(context: Context, question: Dict[str, Any]) -> Dict[str, Any]:
    """What the daemon's map "explain" says, or a note why it does not. Asked before the answer, which would fill the cache."""
    try:
        return context.daemon.ask_json("explain", json.dumps(question))
    except NotAllowed as exc:
        return {"note": f"why is told to root, to the daemon's own user and to the sockets' owner alone ({exc})"}
    except Refused as exc:
        return {"note": f"why cannot be told: {exc}"}


def describe(explanation: Dict[str, Any], answer: str, address: str, user: str = "") -> Dict[str, Any]:
    """The explanation of an answer in words: reason, rule, change, steps, and a note where something is odd."""
    if "note" in explanation:
        return {"note": explanation["note"], "steps": []}
    steps, explained = objects(explanation, "steps"), str(pick(explanation, "answer") or "").rstrip()
    shown = {**describe_reasons(str(pick(explanation, "reason") or ""), address, user, steps), "steps": steps}
    if explained != answer:
        shown["note"] = (
            f"the answer to the very same question was {explained} a moment before: something has just changed, ask again"
        )
    return shown


def show_answer(context: Context, asked: str, answer: str, leads_to: Optional[str], why: Dict[str, Any]) -> None:
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
    steps = dict.fromkeys(reversed([describe_step(step) for step in why["steps"]]))  # of what was asked twice, the last counts
    table = [["", "ASKED", "FOUND", "FROM"]]
    table += [[f"{index}.", *map(shown_text, step)] for index, step in enumerate(reversed(list(steps)), 1)]
    print_table(table)


def describe_reasons(reasons: str, address: str, user: str, steps: Sequence[Dict[str, Any]]) -> Dict[str, str]:
    """The reasons of an answer, of which there are two where recipient and sender were checked, with rule and remedy in words."""
    aliases = [step for step in steps if pick(step, "asked") == "alias" and not pick(step, "error")]
    deciding = [step for step in aliases if pick(step, "found", "enabled") is True]
    alias = str(pick(deciding[-1], "value") or address) if deciding else address
    names = {"address": shlex.quote(address) if address else "'<>'", "alias": shlex.quote(alias), "user": shlex.quote(user)}
    known = [REASONS.get(name, Reason("a rule that this mailcloakctl does not know", "")) for name in reasons.split(",")]
    rule, change = ("; ".join(getattr(each, part) for each in known if getattr(each, part)) for part in Reason._fields)
    if address and "@" not in address:
        change = "ask for it with its domain: Postfix appends $myorigin to an address that has none"
    return {"reason": reasons, "rule": rule, "change": change.format(**names)}


def describe_step(step: Dict[str, Any]) -> Tuple[str, str, str]:
    """What was asked, what was found and where, in words."""
    kind, value, found = pick(step, "asked"), pick(step, "value"), pick(step, "found")
    error, source, age = pick(step, "error"), str(pick(step, "source") or ""), number(step, "age_seconds")
    asked = {"alias": "is there an alias", "app": "is there an app", "holders": "whose e-mail is", "login": "whose login is"}
    where = SOURCES.get(source, source)
    if source in ("cache", "kept") and age is not None:
        where += f", {shown_seconds(age)} old"
    elif source == "keycloak":
        where += ", just now"
    return f"{asked.get(str(kind), kind)} {value}", f"no answer: {error}" if error else describe_found(str(kind), found), where


def describe_found(kind: str, found: Any) -> str:
    if kind == "holders":
        return ", ".join(map(describe_holder, objects(found))) or "nobody's"
    if not isinstance(found, dict):
        return "no"
    if kind == "alias":
        return f"leads to {pick(found, 'username')}{'' if pick(found, 'enabled') is True else ', but is disabled'}"
    if kind == "app":
        may = "may use the sender" if pick(found, "may_send") is True else "may not use the sender"
        owner = pick(found, "owner")
        return f"{pick(found, 'state')}, {may}{f', owner {owner}' if owner else ''}"
    state = pick(found, "state")
    return f"{pick(found, 'username')}, enabled" if state == "enabled" else str(state)


def describe_holder(user: Dict[str, Any]) -> str:
    state = "enabled" if pick(user, "enabled") is True else "locked out" if pick(user, "locked_out") is True else "disabled"
    return f"{pick(user, 'username')}, {state}{', federated' if pick(user, 'federated') is True else ''}"


# ---------------------------------------------------------------------------------------------------------------------------------
# status and flush
# ---------------------------------------------------------------------------------------------------------------------------------


def show_status(context: Context) -> Optional[int]:
    options = context.options
    if options.watch:
        return watch_status(context)
    try:
        stats = context.daemon.ask_json("stats", "*")
    except Refused:
        if options.prometheus:  # for a folder of which everything is read: that the daemon is down is worth knowing as well
            print(format_metrics(None), end="")
        raise
    if options.json:
        print_json(stats)
    elif options.prometheus:
        print(format_metrics(stats), end="")
    else:
        for line in format_status(stats, terminal_width()):
            print(line)
    return EXIT_DONE


def watch_status(context: Context) -> int:
    """Show the status again and again in the same place, until Ctrl-C; a daemon that is restarted meanwhile comes back by itself."""
    if not sys.stdout.isatty():
        raise Refused("--watch needs a terminal; --json and --prometheus are for programs")
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            width, height = shutil.get_terminal_size()
            try:
                lines = format_status(context.daemon.ask_json("stats", "*"), width)
            except Refused as exc:
                lines = [paint(line, RED) for line in wrap(shown_text(exc), width)]
            lines = [time.strftime(f"%H:%M:%S, every {WATCH_SECONDS:.0f} s, Ctrl-C ends it"), "", *lines]
            if len(lines) >= height:
                lines = [*lines[: height - 2], f"({len(lines) - height + 2} more lines)"]
            # home, each line and what was behind it, then all that was below
            print("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J", end="", flush=True)
            time.sleep(WATCH_SECONDS)
    return EXIT_DONE


def format_status(stats: Dict[str, Any], width: Optional[int]) -> List[str]:
    """The daemon's statistics as lines for people."""
    version, up = shown_text(pick(stats, "version")), shown_seconds(number(stats, "uptime_seconds"))
    lines = [paint(f"mailcloak {version}, pid {count(stats, 'pid')}, up {up}", BOLD)]
    for label, text, colour in status_fields(stats):
        first, *rest = hang(f"{label:<15}", text, width)
        lines += [first[:15] + paint(first[15:], colour), *rest]
    table = [["SERVICE", "ANSWER", "COUNT", "REASON"]]
    for answer in sorted(objects(stats, "answers"), key=lambda answer: -(number(answer, "count") or 0)):
        service, given, reason = (shown_text(pick(answer, name)) for name in ("service", "answer", "reason"))
        table.append([service, given, count(answer, "count"), reason])
    return [*lines, "", *format_table(table, width)] if len(table) > 1 else lines


def status_fields(stats: Dict[str, Any]) -> Iterator[Tuple[str, str, str]]:
    """Label, text and colour ("" for none) of each line."""
    at, went_well = number(stats, "last_reload", "at"), pick(stats, "last_reload", "ok")
    read_at = f"reloaded {shown_time(at)}" if at else f"read at start, {shown_time(number(stats, 'started_at'))}"
    refused = at is not None and went_well is not True
    text = f"{pick(stats, 'config')}, {read_at}{': refused, the one before it is in force' if refused else ''}"
    yield "configuration", text, RED if refused else ""
    yield ("Keycloak", *describe_keycloak(stats))
    works = pick(stats, "database", "works") is True
    yield "database", f"{pick(stats, 'database', 'path')}, {'works' if works else 'cannot be used'}", "" if works else RED
    open_now = ", ".join(f"{name} {count(stats, 'connections', name)}" for name in SERVICES)
    yield "connections", f"{open_now}; at most {count(stats, 'connections', 'limit')} each", ""
    users, missing, limit = (count(stats, "cache", name) for name in ("users", "missing", "limit"))
    yield "remembered", f"users {users}, who do not exist {missing}; at most {limit}", ""
    lookups = ", ".join(f"{text} {count(stats, 'lookups', name)}" for name, text in LOOKUPS.items())
    yield "lookups", lookups, ""
    total = sum(number(answer, "count") or 0 for answer in objects(stats, "answers"))
    given, kept = (count(stats, "remembered_answers", name) for name in ("given", "kept"))
    yield "answers", f"{total:.0f}, of which {given} were given again from memory, which holds {kept}", ""
    for service in SERVICES:
        yield f"{service} time", describe_times(pick(stats, "seconds", service)), ""


SERVICES = ("policy", "socketmap")
LOOKUPS = {"cache": "remembered", "keycloak": "asked anew", "kept": "kept for outages", "failed": "without an answer"}


def describe_keycloak(stats: Dict[str, Any]) -> Tuple[str, str]:
    """How Keycloak is, and the colour for it."""
    if pick(stats, "keycloak") is None:
        return "not asked: static_users of the configuration take its place", ""
    requests, seconds = number(stats, "keycloak", "requests") or 0, number(stats, "keycloak", "seconds") or 0
    asked = f"{requests:.0f} requests, {count(stats, 'keycloak', 'failed')} failed"
    asked += f", {shown_seconds(seconds / requests)} each" if requests else ""
    since = number(stats, "keycloak", "since_seconds")
    lasting = f" for {shown_seconds(since)}" if since is not None else ""
    if pick(stats, "keycloak", "state") == "answers":
        return f"answers{lasting}; {asked}", ""
    return f"away{lasting}: {pick(stats, 'keycloak', 'failure') or 'no answer'}; {asked}", RED


def describe_times(histogram: Any) -> str:
    """Mean and tail of a histogram, whose counts are not cumulative."""
    bounds, counts = numbers(histogram, "bounds"), numbers(histogram, "counts")
    total = sum(counts)
    if not bounds or not total or len(counts) != len(bounds) + 1:
        return "-"
    text = f"{shown_seconds((number(histogram, 'sum') or 0) / total)} on average"
    for bound, so_far in zip(bounds, itertools.accumulate(counts)):
        if so_far >= 0.99 * total:
            return f"{text}, 99 of 100 within {shown_seconds(bound)}"
    return f"{text}, more than 1 of 100 longer than {shown_seconds(bounds[-1])}"


def numbers(value: Any, name: str) -> List[float]:
    """The numbers in the list at that place of a JSON value; [] if it holds anything else."""
    found = pick(value, name)
    values = [number(each) for each in found] if isinstance(found, list) else []
    return [each for each in values if each is not None] if None not in values else []


def count(value: Any, *path: str) -> str:
    """The number at that place as text, "-" if there is none."""
    found = number(value, *path)
    return "-" if found is None else f"{found:.0f}"


class Metric(NamedTuple):
    """One family of numbers: its name without the prefix, its type and what it says."""

    name: str
    kind: str
    help: str
    value: Union[float, Mapping[str, Optional[float]], None]  # or values, by suffix and labels; None: not known, left out


def format_metrics(stats: Optional[Dict[str, Any]]) -> str:
    """The statistics in the text format of Prometheus, version 0.0.4; None: the daemon is down."""
    lines: List[str] = []
    up = Metric("up", "gauge", "Whether the daemon answers.", stats is not None)
    for metric in (up, *(daemon_metrics(stats) if stats else ())):
        name = f"mailcloak_{metric.name}"
        values = metric.value if isinstance(metric.value, dict) else {"": metric.value}
        samples = [f"{name}{behind} {float(value)!r}" for behind, value in values.items() if value is not None]
        if samples:
            lines += [f"# HELP {name} {metric.help}", f"# TYPE {name} {metric.kind}", *samples]
    return "\n".join(lines) + "\n"


def daemon_metrics(stats: Dict[str, Any]) -> Iterator[Metric]:
    """No label holds an address, the name of a user or any other text from outside, but words of the daemon's own alone."""
    version = labels(version=own_word(pick(stats, "version"), r"[0-9][0-9a-z.+-]{0,40}"))
    yield Metric("info", "gauge", "The version that runs.", {version: 1})
    yield Metric("start_time_seconds", "gauge", "When the daemon started, in seconds since 1970.", number(stats, "started_at"))
    yield Metric("last_reload_time_seconds", "gauge", "When it was last told to reload.", number(stats, "last_reload", "at"))
    yield Metric("last_reload_success", "gauge", "Whether that reload was done.", flag(stats, "last_reload", "ok"))
    yield Metric("answers_total", "counter", "Answers, and why.", count_answers(stats))
    memory = pick(stats, "remembered_answers")
    yield Metric("remembered_answers_given_total", "counter", "Answers given again from memory.", number(memory, "given"))
    yield Metric("remembered_answers", "gauge", "Answers in memory.", number(memory, "kept"))
    yield Metric("answer_seconds", "histogram", "How long an answer took.", dict(histogram_samples(stats)))
    lookups = {labels(source=name): number(stats, "lookups", name) for name in LOOKUPS}
    yield Metric("lookups_total", "counter", "Users looked up, by where the answer came from.", lookups)
    yield Metric("cache_users", "gauge", "Users in memory.", number(stats, "cache", "users"))
    yield Metric("cache_missing", "gauge", "Users in memory who do not exist.", number(stats, "cache", "missing"))
    yield Metric("cache_limit", "gauge", "Entries that memory may hold.", number(stats, "cache", "limit"))
    keycloak = pick(stats, "keycloak")
    if isinstance(keycloak, dict):
        yield Metric("keycloak_up", "gauge", "Whether Keycloak answers.", pick(keycloak, "state") == "answers")
        since, failed = number(keycloak, "since_seconds"), number(keycloak, "failed")
        yield Metric("keycloak_state_seconds", "gauge", "For how long it has done so, or not.", since)
        yield Metric("keycloak_requests_total", "counter", "Requests to Keycloak.", number(keycloak, "requests"))
        yield Metric("keycloak_failed_requests_total", "counter", "Requests to Keycloak that got no usable answer.", failed)
        seconds = number(keycloak, "seconds")
        yield Metric("keycloak_request_seconds_total", "counter", "The time that requests to Keycloak took.", seconds)
    yield Metric("database_up", "gauge", "Whether the database can be used.", flag(stats, "database", "works"))
    connections = {labels(service=name): number(stats, "connections", name) for name in SERVICES}
    yield Metric("connections", "gauge", "Open connections.", connections)
    yield Metric("connections_limit", "gauge", "Connections that each service takes.", number(stats, "connections", "limit"))


def labels(**texts: str) -> str:
    return "{" + ",".join(f'{name}="{text}"' for name, text in texts.items()) + "}"


def flag(value: Any, *path: str) -> Optional[float]:
    """1 or 0 for a truth value at that place, None if there is none."""
    found = pick(value, *path)
    return float(found) if isinstance(found, bool) else None


def own_word(text: Any, form: str) -> str:
    """The text if it has the form of the daemon's own words, else "other"."""
    return text if isinstance(text, str) and re.fullmatch(form, text) else "other"


ONE_REASON = "({0})(,({0}))?".format("|".join(map(re.escape, REASONS)))


def count_answers(stats: Dict[str, Any]) -> Dict[str, float]:
    counts: Dict[str, float] = defaultdict(float)
    for answer in objects(stats, "answers"):
        key = labels(
            service=own_word(pick(answer, "service"), "policy|socketmap"),
            answer=own_word(pick(answer, "answer"), "[A-Z]{2,8}|[245][0-9]{2}"),
            reason=own_word(pick(answer, "reason"), ONE_REASON),
        )
        counts[key] += number(answer, "count") or 0
    return counts


def histogram_samples(stats: Dict[str, Any]) -> Iterator[Tuple[str, Optional[float]]]:
    for service in SERVICES:
        histogram = pick(stats, "seconds", service)
        bounds, counts = numbers(histogram, "bounds"), numbers(histogram, "counts")
        if len(counts) == len(bounds) + 1:
            for bound, so_far in zip((*map(repr, bounds), "+Inf"), itertools.accumulate(counts)):
                yield f"_bucket{labels(service=service, le=bound)}", so_far
            yield f"_sum{labels(service=service)}", number(histogram, "sum")
            yield f"_count{labels(service=service)}", sum(counts)


def flush(context: Context) -> None:
    text = context.options.address
    key = "*" if text is None else read_address(text) if "@" in text else read_username(text)
    answer = context.daemon.ask_json("flush", key)
    if context.options.json:
        print_json(answer)
        return
    forgotten = number(answer, "forgotten") or 0
    of = "" if key == "*" else f" of {key}"
    if forgotten:
        say(f"flush: {forgotten:.0f} remembered answer{'s' if forgotten != 1 else ''}{of} forgotten, Keycloak is asked anew")
    else:
        say(f"flush: nothing{of} was remembered")


# ---------------------------------------------------------------------------------------------------------------------------------
# doctor: findings
# A check yields its findings. It changes nothing, and waits for nothing longer than ANSWER_SECONDS.
# ---------------------------------------------------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """One line of doctor."""

    check: str  # the name of the check, for programs
    state: str  # "ok", "warning" or "problem"
    text: str
    remedy: str = ""
    items: Tuple[str, ...] = ()  # all that the text speaks of; people are shown the first few


Findings = Iterator[Finding]
STATES = {"ok": GREEN, "warning": YELLOW, "problem": RED}
SHOWN_ITEMS = 10
AS_ROOT = "run mailcloakctl doctor as root"


def ok(check: str, text: str) -> Finding:
    return Finding(check, "ok", text)


def warning(check: str, text: str, remedy: str) -> Finding:
    return Finding(check, "warning", text, remedy)


def problem(check: str, text: str, remedy: str) -> Finding:
    return Finding(check, "problem", text, remedy)


def about(items: Sequence[str], finding: Finding) -> List[Finding]:
    """The finding, with the items that it speaks of behind its text; nothing where there are none."""
    return [finding._replace(text=f"{finding.text}: {shorten(items)}", items=tuple(items))] if items else []


def shorten(items: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(items) - SHOWN_ITEMS} more" if len(items) > SHOWN_ITEMS else ""
    return ", ".join(items[:SHOWN_ITEMS]) + more


def counted(items: Sized, one: str, many: str = "") -> str:
    """How many there are, in words."""
    return f"{len(items)} {one if len(items) == 1 else many or one + 's'}"


def from_refusal(check: str, exc: Refused) -> Finding:
    """The problem that the client of the daemon reports: what is wrong, a semicolon, what to do."""
    text, _, remedy = str(exc).partition("; ")
    return problem(check, text, remedy)


class Installation:
    """What the checks look at, and what they find out for those after them; None is what is not known."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.config_path = os.path.abspath(options.config or mailcloak.DEFAULT_CONFIG_PATH)
        self.keycloak: Optional[mailcloak.KeycloakConfig] = None
        self.static_users: Optional[Mapping[str, str]] = None
        self.policy: Optional[mailcloak.PolicyConfig] = None
        self.sockets: Optional[mailcloak.SocketsConfig] = None
        self.daemon_user = ""
        self.database_path = str(os.path.abspath(options.db)) if options.db else mailcloak.DEFAULT_DATABASE_PATH
        self.aliases: Optional[List[StoredAlias]] = None
        self.apps: Optional[List[StoredApp]] = None
        self.users: Optional[Dict[str, mailcloak.User]] = None  # by username
        self.users_not_looked_up: Set[str] = set()  # whom aliases and apps name
        self.find_holders: Optional[Callable[[str], mailcloak.Users]] = None  # of a primary e-mail; raises DirectoryUnavailable
        self.federations: Set[str] = set()  # from which users come


class StoredAlias(NamedTuple):
    address: str
    username: str
    enabled: bool


class StoredApp(NamedTuple):
    app_id: str
    enabled: bool
    owner: str
    expires_at: Optional[float]


def show_progress(text: str) -> None:
    """A line on the terminal that says how far a long check has come, "" for none; nothing where standard error is no terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


class CannotBecome(mailcloak.MailcloakError):
    """This user cannot act as another."""


def as_user(user: str, work: Callable[[], str], *, groups: Sequence[int] = (), root: str = "") -> str:
    """The text that work() gives in a process of that user, with root as its root directory where one is named.

    Raises CannotBecome unless this is root, or that user already and no root is named. An error of work() is given as its text.
    """
    entry = pwd.getpwnam(user)
    if os.geteuid() != 0:
        if entry.pw_uid == os.geteuid() and not root:
            return work()
        raise CannotBecome(f"only root can act as user {user!r}")
    all_groups = sorted({*os.getgrouplist(user, entry.pw_gid), *groups})  # before the chroot, where there is no list of groups
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if root:
                os.chroot(root)
                os.chdir("/")
            os.setgroups(all_groups)
            os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
            os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
            text = work()
        except BaseException as exc:
            text = getattr(exc, "strerror", None) or type(exc).__name__
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    try:
        if not select.select([reader], [], [], ANSWER_SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
            return f"no answer within {ANSWER_SECONDS:.0f} s"
        return os.read(reader, 4096).decode()
    finally:
        os.close(reader)
        os.waitpid(child, 0)


def why_not(path: str, mode: int) -> str:
    """Why this process may not use the path so (os.R_OK, os.W_OK); "" if it may."""
    directory = "/"
    for part in os.path.dirname(path).strip("/").split("/"):
        directory = os.path.join(directory, part)
        if not os.access(directory, os.X_OK):
            return f"may not enter {directory}"
    if not os.path.exists(path):
        return f"finds no {path}"
    for bit, word in ((os.R_OK, "read"), (os.W_OK, "write")):
        if mode & bit and not os.access(path, bit):
            return f"may not {word} {path}"
    return ""


def access_remedy(why: str, user: str, groups: Sequence[int], otherwise: str) -> str:
    """What lets the user, who is in these groups, do what why_not() says he may not.

    otherwise: the remedy where the path is neither his nor his groups', with {path} and {bit} for the path and the letter of chmod.
    """
    match = re.fullmatch(r"may not (enter|read|write) (/.*)", why)
    if not match:
        return "restore what is missing"
    path, bit = shlex.quote(match[2]), {"enter": "x", "read": "r", "write": "w"}[match[1]]
    status = os.stat(match[2])
    if bit == "w" and os.statvfs(match[2]).f_flag & os.ST_RDONLY:
        return "mount its file system for writing, it is mounted read-only"
    if status.st_uid == pwd.getpwnam(user).pw_uid:
        return f"chmod u+{bit} {path}"
    if status.st_gid in groups:
        return f"chmod g+{bit} {path}"
    return otherwise.replace("{path}", path).replace("{bit}", bit)


def current_user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


# ---------------------------------------------------------------------------------------------------------------------------------
# doctor: configuration, database, daemon, sockets
# ---------------------------------------------------------------------------------------------------------------------------------


SEE_FINDINGS = "look at the findings"  # of other checks, whose remedies come first
NEEDED_BYTES = 10 * 1024 * 1024  # that the disk of the database should have left
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def check_config(host: Installation) -> Findings:
    """The file as the daemon reads it; of a bad one the blocks that are good serve the checks below."""
    path = host.config_path
    try:
        config = mailcloak.load_config(path)
    except mailcloak.ConfigError as exc:
        for text in exc.problems:
            remedy = "mend it; mailcloak --check-config says when it is good"
            if "Permission denied" in text and os.geteuid() != 0:
                remedy = AS_ROOT
            elif not os.path.exists(path):
                remedy = "make it of config.yaml.sample, which make install puts into /etc/mailcloak; or name another with --config"
            yield problem("config", text[len("config: ") :] if text.startswith("config: ") else text, remedy)
        read_good_blocks(host)
        return
    host.keycloak, host.static_users = config.keycloak, config.static_users
    host.policy, host.sockets, host.daemon_user = config.policy, config.sockets, config.daemon.user
    host.database_path = host.database_path if host.options.db else config.sqlite.path
    yield ok("config", f"{path} is good")
    for text in config.warnings:
        # what they are silent about: config-mode says more of the secret, and a Keycloak on this very host needs no https
        is_local = config.keycloak is not None and urllib.parse.urlsplit(config.keycloak.base_url).hostname in LOOPBACK
        if "holds the client secret" not in text and not ("keycloak.base_url" in text and is_local):
            what, comma, remedy = text[len("config: ") :].rpartition(", ")
            yield warning("config", what if comma else remedy, remedy if comma else "mend it in the configuration")


def read_good_blocks(host: Installation) -> None:
    try:
        raw = mailcloak.read_yaml(host.config_path)
    except mailcloak.ConfigError:
        return

    def good(name: str, cls: type) -> Any:
        return mailcloak.read_block(cls, name, raw.get(name, {}), [])

    host.policy, host.sockets = good("policy", mailcloak.PolicyConfig), good("sockets", mailcloak.SocketsConfig)
    host.keycloak, daemon = good("keycloak", mailcloak.KeycloakConfig), good("daemon", mailcloak.DaemonConfig)
    sqlite = good("sqlite", mailcloak.SqliteConfig)
    host.daemon_user = daemon.user if daemon else ""
    if sqlite and not host.options.db:
        host.database_path = sqlite.path


def check_config_files(host: Installation) -> Findings:
    """Who may read and change the configuration, the secret and the certificates."""
    secret_file = (host.keycloak.client_secret_file or host.config_path) if host.keycloak else ""
    files = [host.config_path, secret_file, host.keycloak.ca_file if host.keycloak else ""]
    found: List[Finding] = []
    for path in dict.fromkeys(filter(None, files)):
        try:
            mode = os.stat(path).st_mode
        except OSError:
            continue  # reported with the configuration
        if mode & 0o022:
            remedy = f"chmod go-w {shlex.quote(path)}"
            found.append(problem("config-mode", f"{path} can be changed by others than its owner", remedy))
        found += check_owner(host, path)
        found += check_directory(os.path.dirname(path), 0o022, "config-mode", path)
        if path == secret_file and mode & 0o004:
            text = f"{path} holds the client secret, and every user of this host can read it"
            remedy = f"chmod o-r {shlex.quote(path)}, and make a new secret in Keycloak if others have had an account here"
            found.append(problem("config-mode", text, remedy))
        remedy = f"chgrp {host.daemon_user} {{path}}; chmod g+{{bit}} {{path}}"
        failure = warning("config-access", "a reload will fail: ", remedy)
        found += check_daemon_access(host, functools.partial(why_not, path, os.R_OK), failure)
    good = ok("config-mode", "its owner alone changes it, and no stranger reads the secret")
    yield from found or ([good] if os.path.exists(host.config_path) else [])


def check_owner(host: Installation, path: str) -> List[Finding]:
    """A finding where the file is neither root's, nor the daemon's, nor that of who asks."""
    uid = os.stat(path).st_uid
    with contextlib.suppress(KeyError):
        if uid not in (0, os.geteuid(), pwd.getpwnam(host.daemon_user or "root").pw_uid):
            return [
                problem(
                    "config-mode", f"{path} belongs to {owner_name(path)}, who can change it", f"chown root {shlex.quote(path)}"
                )
            ]
    return []


def check_directory(directory: str, bits: int, check: str, path: str) -> List[Finding]:
    """A finding where others, by these bits of its mode, may put another file in place of the path."""
    mode = os.stat(directory).st_mode
    if not mode & bits or mode & stat.S_ISVTX:
        return []
    remedy = f"chmod {'o' if bits == 0o002 else 'go'}-w {shlex.quote(directory)}"
    return [problem(check, f"others may put another file in place of {path}, since they can write {directory}", remedy)]


def check_daemon_access(host: Installation, work: Callable[[], str], failure: Finding) -> List[Finding]:
    """The failure, with why the user whom the daemon becomes may not do the work behind its text; nothing where he may.

    The remedy of failure is that of access_remedy() for a path that is not his.
    """
    user = host.daemon_user
    try:
        why = as_user(user, work) if user else ""
    except KeyError:
        return []  # there is no such user; reported with the configuration
    except CannotBecome as exc:
        return [warning(failure.check, f"not checked for user {user}, whom the daemon becomes: {exc}", AS_ROOT)]
    if not why:
        return []
    remedy = access_remedy(why, user, os.getgrouplist(user, pwd.getpwnam(user).pw_gid), failure.remedy)
    return [failure._replace(text=f"{failure.text}user {user}, whom the daemon becomes, {why}", remedy=remedy)]


def check_database(host: Installation) -> Findings:
    """The file, opened as the programs open it, and read whole; what the daemon may do with it."""
    path = host.database_path
    try:
        status = os.stat(path)
    except FileNotFoundError:
        remedy = "start the daemon, which makes it; or name the right one in sqlite.path"
        if os.path.exists(mailcloak.last_known_path(path)):  # a daemon has run on one
            remedy = "restore it from a backup, or name the right one in sqlite.path; a daemon that runs needs no restart"
        yield problem("database", f"{path} does not exist", remedy)
        return
    except OSError as exc:
        yield problem("database", f"{path}: {exc.strerror}", AS_ROOT if os.geteuid() else "mend the path in sqlite.path")
        return
    try:
        with contextlib.closing(mailcloak.connect_database(path, ANSWER_SECONDS)) as database:
            yield from read_database(host, database)
    except sqlite3.Error as exc:
        if os.geteuid() != 0 and not os.access(path, os.R_OK | os.W_OK):
            yield warning("database", f"not checked: {path} may not be used by user {current_user()}", AS_ROOT)
        else:
            yield problem("database", f"{path}: {exc}", database_hint(exc, path)[len("; ") :])
    if status.st_mode & 0o002:
        yield problem("database-mode", f"every user of this host can change {path}", f"chmod o-rwx {shlex.quote(path)}")
    elif status.st_mode & 0o004:
        remedy = f"chmod o-r {shlex.quote(path)}"
        yield warning("database-mode", f"every user of this host can read {path}, with the hashes of the apps' tokens", remedy)
    else:
        yield ok("database-mode", f"{path} is closed to strangers")
    directory, mode = os.path.dirname(path), os.R_OK | os.W_OK
    yield from check_directory(directory, 0o002, "database-mode", path)
    room = os.statvfs(directory)
    free_bytes = room.f_bavail * room.f_frsize
    if free_bytes < NEEDED_BYTES and not room.f_flag & os.ST_RDONLY:
        yield problem("database-room", f"the disk of {path} has only {free_bytes // 1024} kB left", "make room on it")
    failure = problem("database-access", "", f"chown {host.daemon_user}: {{path}}")
    yield from check_daemon_access(host, lambda: why_not(path, mode) or why_not(directory, mode), failure)


def read_database(host: Installation, database: sqlite3.Connection) -> Findings:
    path = host.database_path
    database.execute("PRAGMA query_only = ON")
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version > mailcloak.SCHEMA_VERSION:
        remedy = "install the newer mailcloak again, or restore the database of before"
        yield problem("database", f"{path} has schema version {version}, this mailcloak knows {mailcloak.SCHEMA_VERSION}", remedy)
        return
    if version < mailcloak.SCHEMA_VERSION:
        remedy = "restart the daemon: it migrates the file, and leaves a copy of it as it was"
        yield warning("database", f"{path} has schema version {version}, older than {mailcloak.SCHEMA_VERSION}", remedy)
    journal_mode = database.execute("PRAGMA journal_mode").fetchone()[0]
    columns = {row[1] for row in database.execute("PRAGMA table_info(apps)")}
    rows = database.execute("SELECT alias_email, username, enabled FROM aliases ORDER BY alias_email")
    host.aliases = [StoredAlias(str(address), str(username).lower(), enabled == 1) for address, username, enabled in rows]
    newer = "owner, expires_at" if {"owner", "expires_at"} <= columns else "NULL, NULL"
    host.apps = [
        StoredApp(str(app_id), enabled == 1, str(owner or "").lower(), expires_at if isinstance(expires_at, (int, float)) else None)
        for app_id, enabled, owner, expires_at in database.execute(f"SELECT app_id, enabled, {newer} FROM apps ORDER BY app_id")  # noqa: S608
    ]
    deadline = time.monotonic() + ANSWER_SECONDS
    database.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
    try:
        damage = str(database.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.OperationalError:  # a file so big that it would take longer
        damage = "ok"
    if damage != "ok":
        yield problem("database", f"{path} is damaged: {damage}", "restore it from a backup")
    elif version == mailcloak.SCHEMA_VERSION:
        yield ok("database", f"{path} has {counted(host.aliases, 'alias', 'aliases')} and {counted(host.apps, 'app')}")
    if journal_mode == "wal":
        text = f"{path} is in WAL mode: Dovecot cannot read it as an ordinary user while nobody else has it open, and mailcloak remembers no answers"
        remedy = f"stop the daemon, then sqlite3 {shlex.quote(path)} 'PRAGMA journal_mode = DELETE'; Dovecot 2.4 needs sqlite_readonly = yes, or it brings WAL back"
        yield warning("database-journal", text, remedy)
    else:
        yield ok("database-journal", "a rollback journal, which everybody who may read the file can use")


def check_daemon(host: Installation) -> Findings:
    """Is it running, is it this version, and does it work with what is on the disk now?"""
    if host.sockets is None:
        yield warning("daemon", "not checked: the configuration does not say where its sockets are", "mend the configuration first")
        return
    try:
        stats = RunningDaemon(host.sockets, ANSWER_SECONDS).ask_json("stats", "*")
    except Refused as exc:
        yield from_refusal("daemon", exc)
        return
    version, up = str(pick(stats, "version")), shown_seconds(number(stats, "uptime_seconds"))
    if version != mailcloak.__version__:
        yield warning("daemon", f"version {version} runs, {mailcloak.__version__} is installed", "restart the daemon")
    else:
        yield ok("daemon", f"it runs: version {version}, pid {count(stats, 'pid')}, up {up}")
    yield from check_read_config(host, stats)
    if pick(stats, "database", "works") is False:
        remedy = f"{SEE_FINDINGS} about the database, and at its log"
        yield problem("daemon-database", "the daemon cannot use the database", remedy)
    elif pick(stats, "database", "path") not in (None, host.database_path):
        remedy = f"reload it, so that it uses {host.database_path}"
        yield warning("daemon-database", f"the daemon uses {pick(stats, 'database', 'path')}", remedy)
    if pick(stats, "keycloak", "state") == "away":
        remedy = f"{SEE_FINDINGS} about Keycloak"
        yield problem("daemon-keycloak", f"for the daemon Keycloak is {describe_keycloak(stats)[0]}", remedy)


def check_read_config(host: Installation, stats: Dict[str, Any]) -> Findings:
    """Did the daemon read the file that is there now?"""
    config, reloaded_at = str(pick(stats, "config")), number(stats, "last_reload", "at")
    if os.path.realpath(config) != os.path.realpath(host.config_path):
        remedy = "name that file with --config, or restart the daemon"
        yield warning("daemon-config", f"the daemon reads {config}, not {host.config_path}", remedy)
        return
    if reloaded_at is not None and pick(stats, "last_reload", "ok") is False:
        text = f"the reload of {shown_time(reloaded_at)} was refused, the configuration of before is in force"
        yield problem("daemon-config", text, "mend the configuration, and reload the daemon")
        return
    read_at = max(filter(None, (number(stats, "started_at"), reloaded_at)), default=math.inf)
    with contextlib.suppress(OSError):
        changed_at = os.stat(host.config_path).st_mtime
        if changed_at > read_at:
            text = f"{host.config_path} was changed at {shown_time(changed_at)}, after the daemon read it"
            remedy = (
                "reload the daemon (rc-service mailcloak reload, systemctl reload mailcloak); sockets and daemon need a restart"
            )
            yield warning("daemon-config", text, remedy)
            return
    yield ok("daemon-config", "the daemon has read the configuration as it is now")


def check_sockets(host: Installation) -> Findings:
    """Both sockets: whose they are, and whether they answer."""
    if host.sockets is None:
        return
    daemon = RunningDaemon(host.sockets, ANSWER_SECONDS)
    for check, path in (("socket-policy", host.sockets.policy_socket), ("socket-aliases", host.sockets.socketmap_socket)):
        try:
            status = os.lstat(path)
        except OSError as exc:
            remedy = AS_ROOT if isinstance(exc, PermissionError) else "start the daemon, which makes it; restart one that runs"
            yield problem(check, f"{path}: {exc.strerror}", remedy)
            continue
        if not stat.S_ISSOCK(status.st_mode):
            yield problem(check, f"{path} is not a socket", "move it away, and restart the daemon")
            continue
        try:
            is_policy = check == "socket-policy"
            answer = daemon.ask_policy(protocol_state="CONNECT") if is_policy else daemon.ask_map("alias", "no-domain")[0]
        except Refused as exc:
            yield from_refusal(check, exc)
            continue
        if answer not in ("DUNNO", "NOTFOUND"):
            yield problem(check, f"{path} answers {answer!r} where it should have no objection", "restart the daemon")
        elif stat.S_IMODE(status.st_mode) != host.sockets.socket_mode or not has_owner(status, host.sockets):
            remedy = "restart the daemon; where a service manager makes the sockets, set owner, group and mode there"
            yield warning(check, f"{path} has another owner or mode than sockets of the configuration says", remedy)
        else:
            yield ok(check, f"{path} answers")


def has_owner(status: os.stat_result, sockets: mailcloak.SocketsConfig) -> bool:
    """Does the socket belong to whom the configuration names?"""
    with contextlib.suppress(KeyError):
        if sockets.socket_owner_user and pwd.getpwnam(sockets.socket_owner_user).pw_uid != status.st_uid:
            return False
        if sockets.socket_owner_group and grp.getgrnam(sockets.socket_owner_group).gr_gid != status.st_gid:
            return False
    return True


# ---------------------------------------------------------------------------------------------------------------------------------
# doctor: Postfix
# What postconf says, of main.cf and of each smtpd of master.cf, whose -o options take the place of main.cf's settings.
# ---------------------------------------------------------------------------------------------------------------------------------

SYSTEM_PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin:/usr/local/sbin"
ALWAYS_AT_RCPT = ("smtpd_relay_restrictions", "smtpd_recipient_restrictions")
DELAYED_TO_RCPT = ("smtpd_client_restrictions", "smtpd_helo_restrictions", "smtpd_sender_restrictions")  # by smtpd_delay_reject
LATER = ("smtpd_data_restrictions", "smtpd_end_of_data_restrictions")
LISTS = (*ALWAYS_AT_RCPT, *DELAYED_TO_RCPT, *LATER)
DOMAIN_LISTS = ("mydestination", "virtual_mailbox_domains", "relay_domains", "virtual_alias_domains")
REWRITING = {"append_dot_mydomain": "no", "allow_percent_hack": "yes", "swap_bangpath": "yes", "allow_untrusted_routing": "no"}
MAIN_PARAMETERS = (
    *LISTS,
    *DOMAIN_LISTS,
    *REWRITING,
    "smtpd_delay_reject",
    "smtpd_policy_service_timeout",
    "smtpd_policy_service_default_action",
    "smtpd_restriction_classes",
    "virtual_alias_maps",
    "recipient_delimiter",
    "queue_directory",
    "mail_owner",
)


class CommandFailed(mailcloak.MailcloakError):
    """A command of another program is missing, fails or hangs."""


def run_program(name: str, *arguments: str) -> Tuple[str, str]:
    """Standard output and standard error of a command that must not fail."""
    program = shutil.which(name, path=SYSTEM_PATH)
    if not program:
        raise CommandFailed(f"there is no {name} in the PATH")
    try:
        result = subprocess.run(
            [program, *arguments],
            check=False,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=ANSWER_SECONDS,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C", "PATH": SYSTEM_PATH},
        )
    except subprocess.TimeoutExpired:
        raise CommandFailed(f"{name} gave no answer within {ANSWER_SECONDS:.0f} s") from None
    except OSError as exc:
        raise CommandFailed(f"{name}: {exc.strerror}") from exc
    if result.returncode != 0:
        raise CommandFailed(f"{name} failed: {(result.stderr.strip().splitlines() or ['without a word'])[0]}")
    return result.stdout, result.stderr


class PostfixService(NamedTuple):
    """One line of master.cf."""

    name: str  # service/type
    chroot: bool
    command: str
    overrides: Mapping[str, str]  # its -o options


class PolicyUse(NamedTuple):
    """A check_policy_service that leads to mailcloak, in one list of one smtpd."""

    list_name: str
    options: Mapping[str, str]  # policy_context, timeout, default_action
    permits: Tuple[str, ...]  # what stands before it and ends the list with a permission
    warn_only: bool  # behind warn_if_reject


class Postfix:
    """One instance, as postconf shows it."""

    def __init__(self, directory: Optional[str]) -> None:
        self._where = ("-c", directory) if directory else ()
        self.directory = self._postconf("-h", "config_directory").strip()
        self.main = self._parameters(MAIN_PARAMETERS)
        self.classes = self._parameters(split_list(self.main["smtpd_restriction_classes"]))
        overrides: Dict[str, Dict[str, str]] = defaultdict(dict)
        for line in self._postconf("-x", "-P").splitlines():
            match = re.fullmatch(r"(\S+/[a-z-]+)/(\S+) =(.*)", line)
            if match:
                overrides[match[1]][match[2]] = match[3].strip()
        lines = [line.split() for line in self._postconf("-M").splitlines()]
        self.services = {
            name: PostfixService(name, chroot == "y", command, overrides.get(name, {}))
            for name, chroot, command in ((f"{words[0]}/{words[1]}", words[4], words[7]) for words in lines if len(words) >= 8)
        }
        self.smtpds = [service for service in self.services.values() if service.command == "smtpd"]
        self.unused = re.findall(r"unused parameter: (\w+)=", run_program("postconf", *self._where, "-n")[1])

    def _postconf(self, *arguments: str) -> str:
        return run_program("postconf", *self._where, *arguments)[0]

    def _parameters(self, names: Sequence[str]) -> Dict[str, str]:
        """The values in force, with all that they refer to put in."""
        values = dict.fromkeys(names, "")
        for line in self._postconf("-x", *names).splitlines() if names else []:
            name, equals, value = line.partition(" =")
            if equals and name in values:
                values[name] = value.strip()
        return values

    def value(self, smtpd: PostfixService, name: str) -> str:
        return smtpd.overrides.get(name, self.main[name])

    def endpoint(self, path: str) -> str:
        """How main.cf names a socket: relative to the queue directory where it lies below that."""
        relative = os.path.relpath(os.path.realpath(path), os.path.realpath(self.main["queue_directory"]))
        return f"unix:{path if relative.startswith('..') else relative}"

    def path_of(self, endpoint: str, chroot: bool) -> str:
        """The path that a program of Postfix finds at unix:PATH; "" for what is no Unix socket."""
        kind, _, path = endpoint.partition(":")
        if kind != "unix":
            return ""
        return os.path.join(self.main["queue_directory"], path.lstrip("/") if chroot else path)

    def uses(self, smtpd: PostfixService, socket_path: str) -> Iterator[PolicyUse]:
        """Where this smtpd asks mailcloak."""
        for list_name in LISTS:
            permits: List[str] = []
            before = ""
            words = iter(self._expand(split_list(self.value(smtpd, list_name))))
            for word in words:
                if word == "check_policy_service":
                    endpoint, options = read_policy_service(next(words, ""))
                    if same_path(self.path_of(endpoint, smtpd.chroot), socket_path):
                        yield PolicyUse(list_name, options, tuple(permits), before == "warn_if_reject")
                elif re.fullmatch(r"permit(_\w+)?", word):
                    permits.append(word)
                before = word

    def _expand(self, words: Sequence[str], depth: int = 0) -> Iterator[str]:
        """The words with each restriction class replaced by what it stands for."""
        for word in words:
            if word in self.classes and depth < 10:
                yield from self._expand(split_list(self.classes[word]), depth + 1)
            else:
                yield word


def split_list(text: str) -> List[str]:
    """The words of a list of Postfix, separated by commas and white space; what stands in braces is one word."""
    words, word, depth = [], "", 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if depth <= 0 and (character == "," or character.isspace()):
            words.append(word)
            word = ""
        else:
            word += character
    return [each for each in (*words, word) if each]


def read_policy_service(text: str) -> Tuple[str, Dict[str, str]]:
    """The endpoint and the options of what stands behind check_policy_service: unix:PATH or { unix:PATH, name=value, { name = value } }."""
    words = split_list(text[1:-1]) if text.startswith("{") else [text]
    options = {}
    for word in words[1:]:
        name, _, value = word.strip("{}").partition("=")
        options[name.strip()] = value.strip()
    return words[0] if words else "", options


def same_path(one: str, other: str) -> bool:
    return bool(one and other) and os.path.realpath(one) == os.path.realpath(other)


def check_postfix(host: Installation) -> Findings:
    """Each instance of Postfix that was named, or the one that postconf finds."""
    if host.sockets is None or host.policy is None:
        yield warning("postfix", "not checked: the configuration of mailcloak is not good", "mend the configuration first")
        return
    for directory in host.options.postfix_config or [None]:
        try:
            postfix = Postfix(directory)
        except CommandFailed as exc:
            text, remedy = f"not checked: {exc}", "install Postfix, or name the folder of its main.cf with --postfix-config"
            if "postconf failed" in text:  # it was there, and could not read main.cf
                yield problem("postfix", text, "mend main.cf, or name its folder with --postfix-config; then postfix check")
            else:
                yield warning("postfix", text, remedy)
            continue
        yield ok("postfix", f"{postfix.directory} has {counted(postfix.smtpds, 'smtpd service')}")
        if not postfix.smtpds:
            remedy = "compare examples/postfix/master.cf"
            yield problem("postfix-smtpd", f"{postfix.directory}/master.cf has no smtpd: no mail comes in", remedy)
        yield from check_postfix_access(host, host.sockets, postfix)
        for smtpd in postfix.smtpds:
            yield from check_smtpd(host, host.sockets, postfix, smtpd)
        yield from check_alias_maps(host.sockets, postfix)
        yield from check_domains(host.policy, postfix)
        yield from check_main_settings(host.policy, postfix)


def check_postfix_access(host: Installation, sockets: mailcloak.SocketsConfig, postfix: Postfix) -> Findings:
    """Can Postfix's own user connect, from inside the queue directory, where a chrooted smtpd is?"""
    queue_directory, user = os.path.realpath(postfix.main["queue_directory"]), postfix.main["mail_owner"]
    chrooted = [smtpd.name for smtpd in postfix.smtpds if smtpd.chroot]
    for path in (sockets.policy_socket, sockets.socketmap_socket):
        if chrooted and not os.path.realpath(os.path.dirname(path)).startswith(f"{queue_directory}/"):
            text = f"{path} is not below the queue directory {queue_directory}, where {chrooted[0]} is confined"
            yield problem("postfix-access", text, f"sockets: put both below {queue_directory}/private, then restart the daemon")
            continue
        seen = os.path.join("/", os.path.relpath(os.path.realpath(path), queue_directory)) if chrooted else path
        try:
            why = as_user(user, functools.partial(try_to_connect, seen), root=queue_directory if chrooted else "")
        except CannotBecome as exc:
            yield warning("postfix-access", f"not checked whether Postfix can connect to {path}: {exc}", AS_ROOT)
            continue
        except KeyError:
            yield problem("postfix-access", f"mail_owner = {user}: there is no such user", "compare main.cf with Postfix's own")
            continue
        if why:
            remedy = f"sockets.socket_owner_user: {user}; its directory must let {user} in; then restart the daemon"
            yield problem("postfix-access", f"user {user} cannot connect to {path}: {why.lower()}", remedy)
        else:
            yield ok("postfix-access", f"user {user} can connect to {path}{' from its chroot' if chrooted else ''}")


def try_to_connect(path: str) -> str:
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
        connection.settimeout(ANSWER_SECONDS)
        try:
            connection.connect(path)
        except OSError as exc:
            return exc.strerror or str(exc)
    return ""


def check_smtpd(host: Installation, sockets: mailcloak.SocketsConfig, postfix: Postfix, smtpd: PostfixService) -> Findings:
    """Is mailcloak asked about each recipient and each sender of this smtpd, and heeded?"""
    uses = list(postfix.uses(smtpd, sockets.policy_socket))
    delayed = postfix.value(smtpd, "smtpd_delay_reject") == "yes"
    if not uses and is_reentry(smtpd):
        yield ok("postfix-smtpd", f"{smtpd.name} does not ask mailcloak, as a filter's re-entry port may")
        return
    found: List[Finding] = []
    for aspect in ("recipient", "sender"):
        asking = [use for use in uses if aspect in checked_by(use, delayed)]
        found += check_aspect(smtpd, aspect, asking, postfix.endpoint(sockets.policy_socket))
    for use in uses:
        found += check_use(host, postfix, smtpd, use)
    yield from found or [ok("postfix-smtpd", f"{smtpd.name} asks mailcloak about each recipient and each sender")]


def is_reentry(smtpd: PostfixService) -> bool:
    """Where a content filter hands mail back: on this host alone, and with the filter taken out (Postfix's FILTER_README)."""
    local = re.match(r"(127\.[0-9.]+|localhost|\[::1\]|::1):", smtpd.name)
    return bool(local) and smtpd.overrides.get("content_filter") == ""


def checked_by(use: PolicyUse, delayed: bool) -> Tuple[str, ...]:
    """What mailcloak checks when it is asked from there: at RCPT what policy_context says, at MAIL the sender, else nothing."""
    context = use.options.get("policy_context", "")
    if use.list_name in ALWAYS_AT_RCPT or (use.list_name in DELAYED_TO_RCPT and delayed):
        return (context,) if context in ("recipient", "sender") else ("recipient", "sender")
    return ("sender",) if use.list_name == "smtpd_sender_restrictions" and context != "recipient" else ()


def check_aspect(smtpd: PostfixService, aspect: str, uses: Sequence[PolicyUse], endpoint: str) -> Findings:
    """What is wrong with how recipients, or senders, are checked."""
    list_name = f"smtpd_{aspect}_restrictions"
    if not uses:
        text = f"{smtpd.name} does not ask mailcloak about the {aspect}"
        remedy = (
            f"main.cf: put check_policy_service {{ {endpoint}, policy_context={aspect} }} into {list_name}, then postfix reload"
        )
        if list_name in smtpd.overrides:
            text += f": its own -o {list_name} takes the place of main.cf's"
            remedy = f"master.cf: take -o {list_name} out of the lines of {smtpd.name}, then postfix reload"
        yield problem("postfix-smtpd", text, remedy)
        return
    best = min(uses, key=lambda use: len(use.permits))
    if not best.permits:
        return
    place = f"master.cf, -o {best.list_name} of {smtpd.name}" if best.list_name in smtpd.overrides else f"main.cf, {best.list_name}"
    make = warning if aspect == "sender" and set(best.permits) == {"permit_mynetworks"} else problem
    text = f"{smtpd.name}: {', '.join(best.permits)} before mailcloak, which is then not asked about the {aspect}"
    yield make("postfix-permit", text, f"{place}: move check_policy_service before {best.permits[0]}, then postfix reload")


def check_use(host: Installation, postfix: Postfix, smtpd: PostfixService, use: PolicyUse) -> Findings:
    """What becomes of mailcloak's answer, and of none."""
    if use.list_name in LATER:
        remedy = f"take it out of {use.list_name}"
        yield warning("postfix-smtpd", f"{smtpd.name} asks mailcloak in {use.list_name}, where it never has an objection", remedy)
        return
    if use.warn_only:
        text = f"{smtpd.name}: warn_if_reject before mailcloak in {use.list_name}: nothing is refused, the log says reject_warning"
        yield warning("postfix-trial", text, "when the log holds no surprises, take warn_if_reject out, then postfix reload")
    action = use.options.get("default_action") or postfix.value(smtpd, "smtpd_policy_service_default_action")
    if not re.match(r"4[0-9][0-9]\b|defer", action.lower()):
        loses = "mail is lost" if re.match(r"5|reject", action.lower()) else "nothing is checked"
        text = f"{smtpd.name}: while mailcloak does not answer, Postfix says {action!r} in {use.list_name}, so {loses}"
        remedy = "default_action = 451 4.3.0 Temporary lookup failure, as in examples/postfix/main.cf"
        yield problem("postfix-default-action", text, remedy)
    timeout = use.options.get("timeout") or postfix.value(smtpd, "smtpd_policy_service_timeout")
    seconds = read_postfix_time(timeout)
    needed = host.keycloak.timeout_seconds if host.keycloak else 1.0
    if seconds is not None and seconds <= needed:
        text = f"{smtpd.name}: Postfix waits {timeout} for mailcloak, which may wait {needed:g} s for Keycloak"
        yield warning("postfix-timeout", text, "timeout=30s in check_policy_service, or a lower keycloak.timeout_seconds")


def read_postfix_time(text: str) -> Optional[float]:
    match = re.fullmatch(r"([0-9]+)([smhdw]?)", text)
    return int(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[match[2]] if match else None


def check_alias_maps(sockets: mailcloak.SocketsConfig, postfix: Postfix) -> Findings:
    """Does cleanup, which rewrites recipients, ask for aliases?"""
    askers = {name: service for name, service in postfix.services.items() if service.command in ("cleanup", "smtpd")}
    places = [("main.cf", postfix.main["virtual_alias_maps"], any(service.chroot for service in askers.values()))]
    for name, service in askers.items():
        if "virtual_alias_maps" in service.overrides:
            places.append((f"master.cf, {name}", service.overrides["virtual_alias_maps"], service.chroot))
    remedy = f"virtual_alias_maps = socketmap:{postfix.endpoint(sockets.socketmap_socket)}:alias"
    for place, value, chroot in places:
        maps = [re.fullmatch(r"((?:proxy:)?)socketmap:(unix:.*):([^:]*)", word) for word in split_list(value)]
        ours = [found for found in maps if found and same_path(postfix.path_of(found[2], chroot), sockets.socketmap_socket)]
        if not ours:
            text = f"{place}: virtual_alias_maps does not ask mailcloak, so no alias leads anywhere"
            yield problem("postfix-aliases", text, remedy)
        elif any(found[3] != "alias" for found in ours):
            text = f"{place}: virtual_alias_maps asks for the map {ours[0][3]!r}, which is called alias"
            yield problem("postfix-aliases", text, remedy)
        elif any(found[1] for found in ours):
            yield warning("postfix-aliases", f"{place}: proxy: makes all of Postfix ask mailcloak over one connection", remedy)
        else:
            yield ok("postfix-aliases", f"{place}: virtual_alias_maps asks mailcloak")


def check_domains(policy: mailcloak.PolicyConfig, postfix: Postfix) -> Findings:
    """Does Postfix take mail for our domains, and for no others that nobody checks?"""
    lists = {name: [word.lower() for word in split_list(postfix.main[name])] for name in DOMAIN_LISTS}
    tables = sorted({word for words in lists.values() for word in words if ":" in word or "/" in word})
    found: List[Finding] = []
    for domain in sorted(policy.domain | ({policy.mailbox_domain} - {""})):
        places = [name for name, words in lists.items() if domain in words]
        if len(places) > 1:
            text, remedy = f"{domain} is in {' and in '.join(places)}", "leave it in virtual_mailbox_domains alone"
        elif places == ["virtual_alias_domains"]:
            text, remedy = f"{domain} is in virtual_alias_domains, where it has no mailboxes", "move it to virtual_mailbox_domains"
        elif not places and not tables:
            text = f"Postfix takes no mail for {domain}"
            remedy = f"main.cf: add {domain} to virtual_mailbox_domains, then postfix reload"
        else:
            continue
        found.append(problem("postfix-domains", text, remedy))
    unchecked = [
        word
        for word in lists["virtual_mailbox_domains"]
        if mailcloak.domain_to_ascii(word) not in (*policy.domain, policy.mailbox_domain) and word not in tables
    ]
    text = "Postfix takes mail for domains that are not in policy.domain, and nobody says which recipients exist"
    remedy = "add them to policy.domain, or take them out of virtual_mailbox_domains"
    found += about(unchecked, warning("postfix-domains", text, remedy))
    unread = f" (not looked into: {', '.join(tables)})" if tables else ""
    yield from found or [ok("postfix-domains", f"Postfix takes mail for {', '.join(sorted(policy.domain))}{unread}")]


def check_main_settings(policy: mailcloak.PolicyConfig, postfix: Postfix) -> Findings:
    """recipient_delimiter, how addresses are rewritten, and settings that have no effect."""
    theirs, ours = postfix.main["recipient_delimiter"], policy.recipient_delimiter
    if set(theirs) != set(ours):
        text = f"recipient_delimiter is {theirs!r} in main.cf and {ours!r} in the configuration of mailcloak, so tagged addresses go astray"
        remedy = f'policy.recipient_delimiter: "{theirs}", then reload the daemon; the same in Dovecot'
        yield problem("postfix-delimiter", text, remedy)
    else:
        yield ok("postfix-delimiter", f"recipient_delimiter is {theirs!r} here and there")
    for name, wanted in REWRITING.items():
        if postfix.main[name] != wanted:
            text = f"{name} = {postfix.main[name]}: Postfix may deliver to another address than mailcloak was asked about"
            yield warning("postfix-rewriting", text, f"main.cf: {name} = {wanted}, then postfix reload")
    odd = warning("postfix-settings", "main.cf sets what Postfix does not know", "look for typing errors in these names")
    yield from about(postfix.unused, odd)


# ---------------------------------------------------------------------------------------------------------------------------------
# doctor: Dovecot
# The query by which it admits apps, tried on a database in memory, and whether its user can read the real one.
# ---------------------------------------------------------------------------------------------------------------------------------

SQL_SAMPLES = "examples/dovecot-2.3/dovecot-sql.conf.ext or examples/dovecot-2.4/dovecot.conf"


class PasswordQuery(NamedTuple):
    """How Dovecot asks for an app's password."""

    place: str
    query: str
    database: str  # the path; "" if it is not said
    percent_doubled: bool  # 2.3: %% is a percent sign, %u a variable; 2.4: only %{name} is one


def check_dovecot(host: Installation) -> Findings:
    where = ("-c", host.options.dovecot_config) if host.options.dovecot_config else ()
    try:
        settings = run_program("doveconf", *where, "-n")[0]
        worker, internal, groups = (
            run_program("doveconf", *where, "-h", name)[0].strip()
            for name in ("service/auth-worker/user", "default_internal_user", "service/auth-worker/extra_groups")
        )
    except CommandFailed as exc:
        text, remedy = f"not checked: {exc}", "name Dovecot's configuration with --dovecot-config, and run doveconf -n"
        yield ok("dovecot", text) if "there is no doveconf" in text else warning("dovecot", text, remedy)
        return
    try:
        queries = list(find_password_queries(settings))
    except OSError as exc:
        remedy = AS_ROOT if os.geteuid() else "mend args of the passdb"
        yield warning("dovecot", f"not checked: {exc.filename}: {exc.strerror}", remedy)
        return
    if not queries:
        if host.apps:
            remedy = f"take the passdb from {SQL_SAMPLES}"
            yield warning("dovecot", f"Dovecot has no SQLite passdb, so {counted(host.apps, 'app')} cannot log in", remedy)
        else:
            yield ok("dovecot", "it asks no SQLite database, and there are no apps")
        return
    for found in queries:
        if found.database and not same_path(found.database, host.database_path):
            remedy = f"name {host.database_path} there, then doveadm reload"
            yield problem("dovecot", f"{found.place} reads {found.database}, not {host.database_path}", remedy)
        yield from check_query(found)
    user = re.sub(r"\$(SET:)?default_internal_user", internal, worker)
    yield from check_dovecot_access(host, user, groups)


def find_password_queries(settings: str) -> Iterator[PasswordQuery]:
    """The queries of all passdbs on SQLite in the output of doveconf -n. Raises OSError where a file that it names cannot be read."""
    top: Dict[str, str] = {}
    blocks: List[Dict[str, str]] = []  # those that stand in no other, each with its head
    depth = 0
    for line in settings.splitlines():
        text = line.strip()
        name, equals, value = text.partition("=")
        if text.endswith("{") and not equals:
            depth += 1
            if depth == 1:
                blocks.append({"head": text[:-1].strip()})
        elif text == "}":
            depth -= 1
        elif equals and depth in (0, 1):
            (blocks[-1] if depth else top)[name.strip()] = value.strip()
    for passdb in (block for block in blocks if block["head"].startswith("passdb")):
        if passdb.get("driver") == "sql" and "args" in passdb:  # 2.3
            with open(passdb["args"], encoding="utf-8", errors="replace") as file:
                options = read_sql_options(file.read())
            if options.get("driver") == "sqlite":
                yield PasswordQuery(passdb["args"], options.get("password_query", ""), options.get("connect", ""), True)
        elif "query" in passdb and (passdb.get("sql_driver") or top.get("sql_driver")) == "sqlite":  # 2.4
            path = passdb.get("sqlite_path") or top.get("sqlite_path", "")
            yield PasswordQuery(passdb["head"], passdb["query"], path, False)


def read_sql_options(text: str) -> Dict[str, str]:
    """The settings of a dovecot-sql.conf.ext; a line goes on in the next where it ends in a backslash."""
    lines = re.sub(r"[ \t]*\\\n[ \t]*", " ", text).splitlines()
    pairs = (line.partition("=") for line in lines if not line.lstrip().startswith("#"))
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}


def check_query(found: PasswordQuery) -> Findings:
    """Try the query on apps of which it is known who may log in."""
    apps = (("doctor-good", 1, None), ("doctor-later", 1, 2**40), ("doctor-off", 0, None), ("doctor-expired", 1, 1))
    services = ("smtp", "submission", "imap", "pop3", "lmtp")
    remedy = f"take the query from {SQL_SAMPLES}, then doveadm reload"
    try:
        with contextlib.closing(sqlite3.connect(":memory:")) as database:
            database.executescript(mailcloak.SCHEMA)
            rows = [(app[0], *app) for app in apps]
            database.executemany("INSERT INTO apps (secret_hash, app_id, enabled, expires_at) VALUES (?, ?, ?, ?)", rows)
            admitted = {
                (app_id, service): database.execute(fill_query(found, app_id, service)).fetchall()
                for app_id in (*(app[0] for app in apps), "doctor-absent")
                for service in services
            }
    except (sqlite3.Error, sqlite3.Warning) as exc:
        yield problem("dovecot-query", f"{found.place}: its query fails: {exc}", remedy)
        return
    except ValueError as exc:
        yield warning("dovecot-query", f"not checked: {found.place}: {exc}", remedy)
        return
    wrong = []
    good = [admitted[app_id, "smtp"] for app_id in ("doctor-good", "doctor-later")]
    if not all(len(rows) == 1 and {"doctor-good", "doctor-later"} & set(rows[0]) for rows in good):
        wrong.append("does not give the hash of an app that sends")
    for app_id, text in (("doctor-off", "disabled apps"), ("doctor-expired", "expired apps"), ("doctor-absent", "anybody")):
        if any(admitted[app_id, service] for service in services):
            wrong.append(f"lets {text} log in")
    if any(admitted["doctor-good", service] for service in ("imap", "pop3", "lmtp")):
        wrong.append("lets apps log in to read mail")
    if wrong:
        yield problem("dovecot-query", f"{found.place}: its query {' and '.join(wrong)}", remedy)
    else:
        yield ok("dovecot-query", f"{found.place}: apps log in to send, while they are enabled and not expired")


def fill_query(found: PasswordQuery, user: str, service: str) -> str:
    """The query with Dovecot's variables put in. Raises ValueError for a variable whose value is not known here."""
    values = {"u": user, "n": user, "s": service, "d": ""}
    names = {"user": user, "username": user, "service": service, "protocol": service, "domain": ""}

    def put_in(match: re.Match[str]) -> str:
        if match[0] == "%%":
            return "%"
        name = match[1].partition("|")[0].partition(":")[0].strip() if match[1] is not None else ""
        value = names.get(name) if name else values.get(match[2][-1])
        if value is None:
            raise ValueError(f"its query uses {match[0]}, which is not known here")
        return value

    pattern = r"%[LU]?\{([^}]*)\}|%([LU]?[a-zA-Z])|%%" if found.percent_doubled else r"%\{([^}]*)\}()"
    return re.sub(pattern, put_in, found.query)


def check_dovecot_access(host: Installation, user: str, groups: str) -> Findings:
    """Can the process that asks the database read it?"""
    if not user or user == "root":
        yield ok("dovecot-access", "Dovecot's auth-worker reads the database as root")
        return
    path = host.database_path
    group_ids = []
    for name in re.split(r"[\s,]+", groups):
        with contextlib.suppress(KeyError):
            group_ids.append(grp.getgrnam(name).gr_gid)
    try:
        why = as_user(user, lambda: why_not(path, os.R_OK), groups=group_ids)
    except CannotBecome as exc:
        yield warning("dovecot-access", f"not checked whether Dovecot can read {path}: {exc}", AS_ROOT)
    except KeyError:
        yield problem("dovecot-access", f"service auth-worker: there is no user {user!r}", "mend it, then doveadm reload")
    else:
        if why:
            group = host.daemon_user or "mailcloak"
            remedy = f"chgrp {group} {{path}}; chmod g+{{bit}} {{path}}"
            if group not in re.split(r"[\s,]+", groups):
                remedy = f"service auth-worker {{ extra_groups = {group} }}, the group of the database, then doveadm reload"
            remedy = access_remedy(why, user, [*group_ids, *os.getgrouplist(user, pwd.getpwnam(user).pw_gid)], remedy)
            yield problem("dovecot-access", f"Dovecot's auth-worker runs as user {user}, who {why}", remedy)
        else:
            yield ok("dovecot-access", f"Dovecot's auth-worker can read the database as user {user}")


# ---------------------------------------------------------------------------------------------------------------------------------
# doctor: Keycloak
# Asked directly, with a session and a token of our own, so that it can be told apart whether Keycloak or the daemon is at fault.
# ---------------------------------------------------------------------------------------------------------------------------------

PAGE_USERS = 500  # of one request; a brief record is about 500 bytes, and an answer may have a megabyte
MAX_USERS = 20_000  # that are read; some 40 requests
MAX_SINGLE_LOOKUPS = 200  # of users whom aliases and apps name, where there are more users than that
MAX_CLOCK_SECONDS = 60.0  # by which two clocks may differ
NEEDED_ROLES = {"view-users", "query-users", "query-groups"}  # the last two are part of the first
READING_ROLES = NEEDED_ROLES | {"view-realm"}  # with which doctor can also read the cache policy of a federation


Result = TypeVar("Result")


class KeycloakReader:
    """Requests to Keycloak, each given up after ANSWER_SECONDS. Raises DirectoryUnavailable."""

    def __init__(self, config: mailcloak.KeycloakConfig) -> None:
        self._api = mailcloak.KeycloakApi(config)
        self._session = mailcloak._new_session(config.ca_file)
        self._admin_url = f"{config.base_url}/admin/realms/{urllib.parse.quote(config.realm, safe='')}"
        self.clock_ahead: Optional[float] = None  # of Keycloak, in seconds
        self._session.hooks["response"].append(self._note_clock)

    def _note_clock(self, response: Any, *_: Any, **__: Any) -> None:
        with contextlib.suppress(TypeError, ValueError):
            told = email.utils.parsedate_to_datetime(response.headers.get("Date"))
            self.clock_ahead = told.timestamp() - time.time()

    def _within(self, work: Callable[[float], Result]) -> Result:
        """What work returns or raises. It is told its deadline; name resolution, which knows none, is left behind in its thread."""
        results: List[Result] = []
        errors: List[BaseException] = []

        def run() -> None:
            try:
                results.append(work(time.monotonic() + ANSWER_SECONDS))
            except BaseException as exc:
                errors.append(exc)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(ANSWER_SECONDS + 1)
        if errors:
            raise errors[0]
        if not results:
            raise mailcloak.DirectoryUnavailable(self._api.message(f"no answer within {ANSWER_SECONDS + 1:.0f} s"))
        return results[0]

    def token(self) -> str:
        return self._within(lambda deadline: self._api._access_token(self._session, deadline, rejected=""))

    def users(self, **query: str) -> List[Dict[str, Any]]:
        return self._within(lambda deadline: self._api.get_users(self._session, deadline, **query))

    def find(self, **query: str) -> List[Dict[str, Any]]:
        """The users who are exactly so."""
        return self.users(**{"exact": "true", "briefRepresentation": "true", "max": str(mailcloak.MAX_DIRECTORY_MATCHES), **query})

    def get(self, path: str, **query: str) -> Tuple[int, Any]:
        """(status, JSON value) of what lies below the realm in the admin interface; the value is None where it is no JSON."""
        status, body = self._within(lambda deadline: self._api._get(self._session, deadline, f"{self._admin_url}/{path}", query))
        try:
            return status, json.loads(body)
        except (ValueError, RecursionError):
            return status, None


def check_keycloak(host: Installation) -> Findings:
    """Token, role, clock, who may change an e-mail, canaries, and the users themselves."""
    if host.static_users is not None:
        users = {
            name: mailcloak.User(name, mailcloak.normalise_address(text).text, True) for name, text in host.static_users.items()
        }
        host.users = users
        host.find_holders = lambda address: tuple(user for user in users.values() if user.email == address)
        yield ok("keycloak", f"not asked: static_users of the configuration, {len(host.users)}, take its place")
        return
    if host.keycloak is None:
        yield warning("keycloak", "not checked: the configuration of mailcloak is not good", "mend the configuration first")
        return
    reader = KeycloakReader(host.keycloak)
    try:
        show_progress("asking Keycloak for a token ...")
        token = reader.token()
        who = f"{host.keycloak.base_url}, realm {host.keycloak.realm}, gives client {host.keycloak.client_id} a token"
        yield ok("keycloak-token", who)
        yield from check_clock(reader)
        sees_users = bool(reader.users(max="1"))
    except mailcloak.DirectoryUnavailable as exc:
        text, _, remedy = str(exc).rpartition(", ")
        check = "keycloak-role" if "search" in str(exc) else "keycloak-token"
        if isinstance(exc, mailcloak.DirectoryMisconfigured):
            yield problem(check, text, remedy)
        else:
            remedy = "look whether Keycloak runs, and whether keycloak.base_url can be reached from this host"
            yield problem(check, str(exc), remedy)
        return
    role = f"client {host.keycloak.client_id}, page Service accounts roles: the role view-users of realm-management, and no other"
    if not sees_users:
        yield problem("keycloak-role", "the token is good, but shows no user at all (query-users is not enough)", role)
        return
    more = warning("keycloak-role", "the client may do more than see users", role)
    yield from about(sorted(token_roles(token) - READING_ROLES), more) or [ok("keycloak-role", "the client sees users")]
    try:
        yield from check_email_edit(host.keycloak, reader)
        yield from list_users(host, host.keycloak, reader)
        yield from check_canaries(host, host.keycloak, reader)
    except mailcloak.DirectoryUnavailable as exc:
        remedy = "run mailcloakctl doctor again; if it is so again, look at Keycloak's log"
        yield problem("keycloak", f"not checked to the end: {exc}", remedy)


def token_roles(token: str) -> Set[str]:
    """The roles in realm-management that a token of Keycloak names; none where it cannot be read. Source: RFC 7519, section 3."""
    parts = token.split(".")
    with contextlib.suppress(ValueError, IndexError, TypeError):
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
        roles = pick(claims, "resource_access", "realm-management", "roles")
        return {role for role in roles if isinstance(role, str) and re.fullmatch(r"[a-z-]{1,60}", role)}
    return set()


def check_clock(reader: KeycloakReader) -> Findings:
    ahead = reader.clock_ahead
    if ahead is None:
        yield ok("keycloak-clock", "not checked: Keycloak does not say what time it is")
    elif abs(ahead) > MAX_CLOCK_SECONDS:
        lead = f"{shown_seconds(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'}"
        text = f"Keycloak's clock is {lead} this host's, so tokens and apps may count too long or not long enough"
        yield warning("keycloak-clock", text, "set the clock of whichever is wrong: timedatectl, chronyc tracking")
    else:
        yield ok("keycloak-clock", "the clocks of Keycloak and of this host agree")


def check_email_edit(config: mailcloak.KeycloakConfig, reader: KeycloakReader) -> Findings:
    if config.require_verified_email:
        yield ok("keycloak-email", "an e-mail counts only when Keycloak has verified it (require_verified_email)")
        return
    status, profile = reader.get("users/profile")
    attributes = [each for each in objects(profile, "attributes") if pick(each, "name") == "email"]
    editors = pick(attributes[0], "permissions", "edit") if attributes else None
    if status != 200 or not isinstance(editors, list):
        yield ok("keycloak-email", "not checked who may change a user's e-mail: the user profile of the realm cannot be read")
    elif "user" in editors:
        remedy = (
            "examples/keycloak/setup email-by-administrators; or setup verify-email, with keycloak.require_verified_email: true"
        )
        yield problem("keycloak-email", "users may change their own e-mail and so take over any address that is free", remedy)
    else:
        yield ok("keycloak-email", "administrators alone change a user's e-mail")


def list_users(host: Installation, config: mailcloak.KeycloakConfig, reader: KeycloakReader) -> Findings:
    """Read the users page by page; where there are more than MAX_USERS, also those whom aliases and apps name."""
    users: Dict[str, mailcloak.User] = {}
    read, is_whole = 0, False
    while read < MAX_USERS:
        records = reader.users(first=str(read), max=str(PAGE_USERS), briefRepresentation="true")
        known = len(users)
        note_users(host, users, records, config)
        read += len(records)
        show_progress(f"{read} users of Keycloak read ...")
        is_whole = len(records) < PAGE_USERS
        if is_whole or len(users) == known:  # the latter: a server that gives the same page again
            break
    host.users = users
    host.find_holders = lambda address: tuple(user for user in users.values() if user.email == address)
    if is_whole:
        yield ok("keycloak-users", counted(users, "user"))
        return
    named = {alias.username for alias in host.aliases or [] if alias.enabled} | {app.owner for app in host.apps or [] if app.owner}
    missing, read_before = sorted(named - set(users)), len(users)
    for done, username in enumerate(missing[:MAX_SINGLE_LOOKUPS]):
        show_progress(f"{done} of {len(missing)} users whom aliases and apps name looked up ...")
        note_users(host, users, reader.find(username=username), config)
    host.users_not_looked_up = set(missing[MAX_SINGLE_LOOKUPS:])

    def find_holders(address: str) -> mailcloak.Users:
        found: Dict[str, mailcloak.User] = {}
        note_users(host, found, reader.find(email=address), config)
        return tuple(user for user in found.values() if user.email == address)

    host.find_holders = find_holders
    text = f"more than can be read: the first {read_before} were looked at, and {min(len(missing), MAX_SINGLE_LOOKUPS)} more whom aliases and apps name"
    rest = len(host.users_not_looked_up)
    yield ok("keycloak-users", f"{text}; not checked: {rest} others of these" if rest else text)


def note_users(
    host: Installation, users: Dict[str, mailcloak.User], records: Sequence[Dict[str, Any]], config: mailcloak.KeycloakConfig
) -> None:
    """Add the users of Keycloak's records, understood as the daemon understands them, and their federations."""
    for record in records:
        username, address, enabled = (pick(record, name) for name in ("username", "email", "enabled"))
        if not isinstance(username, str) or not username or not isinstance(enabled, bool):
            continue
        username = username.lower()
        is_service_account = bool(pick(record, "serviceAccountClientId")) or username.startswith("service-account-")
        is_verified = pick(record, "emailVerified") is True or not config.require_verified_email
        counts = isinstance(address, str) and is_verified and not is_service_account
        reason = pick(record, "attributes", "disabledReason")
        locked_out = not enabled and reason in ("permanentLockout", ["permanentLockout"]) and config.receive_when_locked_out
        link = pick(record, "federationLink")
        if isinstance(link, str):
            host.federations.add(link)
        primary = mailcloak.normalise_address(address).text if counts else ""
        users[username] = mailcloak.User(username, primary, enabled, locked_out, bool(link))


def check_canaries(host: Installation, config: mailcloak.KeycloakConfig, reader: KeycloakReader) -> Findings:
    """Are the canaries there, is there one for each federation, and would they be seen to be gone?"""
    status, components = reader.get("components", type="org.keycloak.storage.UserStorageProvider")
    providers = [each for each in objects(components) if pick(each, "config", "enabled") != ["false"]] if status == 200 else []
    federations = host.federations | {str(pick(provider, "id")) for provider in providers}
    watched = set()
    for address in config.canary:
        records = reader.find(email=address, max="2")
        matches = [record for record in records if mailcloak.normalise_address(str(pick(record, "email") or "")).text == address]
        if not any(pick(record, "enabled") is True for record in matches):
            text = (
                f"canary {address} is missing or disabled, so no user counts as missing or disabled, and unknown recipients get 451"
            )
            remedy = "make that user in Keycloak, or enable him; or take the address out of keycloak.canary"
            yield problem("keycloak-canary", text, remedy)
        watched |= {str(pick(record, "federationLink")) for record in matches if pick(record, "federationLink")}
    if not federations:
        good = "no federation was seen" if config.canary else "no user comes from a federation, so none is needed"
        yield ok("keycloak-canary", good)
    elif not config.canary:
        text = "users come from a federation, and there is no canary: while it is down, mail to users whom mailcloak has never seen is refused"
        remedy = "keycloak.canary: the address of a user of the federation that always exists; and its cache policy in Keycloak: NO_CACHE"
        yield warning("keycloak-canary", text, remedy)
    elif not federations <= watched:
        remedy = "keycloak.canary: one address of each federation that always exists"
        yield warning("keycloak-canary", f"{len(federations - watched)} of {len(federations)} federations have no canary", remedy)
    if config.canary and federations:
        yield from check_cache_policy(status, providers)


def check_cache_policy(status: int, providers: Sequence[Dict[str, Any]]) -> Findings:
    if status != 200:
        text = "not checked: a canary protects only where the federation's cache policy in Keycloak is NO_CACHE; to read it the client would need the role view-realm"
        yield ok("keycloak-cache-policy", text)
        return
    for provider in providers:
        policies = pick(provider, "config", "cachePolicy")
        policy = policies[0] if isinstance(policies, list) and policies else "DEFAULT"
        name = pick(provider, "name")
        if policy != "NO_CACHE":
            text = f"federation {name}: cache policy {policy}: while it is down, Keycloak goes on answering for the canary from its cache, so the canary protects nobody"
            yield warning("keycloak-cache-policy", text, f"Keycloak, User federation, {name}: Cache policy NO_CACHE")
        else:
            yield ok("keycloak-cache-policy", f"federation {name}: NO_CACHE, so a canary is seen to be gone")


# ---------------------------------------------------------------------------------------------------------------------------------
# doctor: addresses, users, apps
# What database and Keycloak say, held against each other.
# ---------------------------------------------------------------------------------------------------------------------------------


class KnownFacts(mailcloak.Facts):
    """The facts for a decision of the daemon's own, made of what the checks have read."""

    def __init__(self, host: Installation) -> None:
        self._aliases = {alias.address: mailcloak.Alias(alias.username, alias.enabled) for alias in host.aliases or []}
        self._host = host

    def find_alias(self, address: mailcloak.Address) -> Optional[mailcloak.Alias]:
        return self._aliases.get(address.text)

    def find_holders(self, address: mailcloak.Address) -> mailcloak.Users:
        if self._host.find_holders is None:
            raise mailcloak.DirectoryUnavailable("not asked")
        return self._host.find_holders(address.text)


def check_role_addresses(host: Installation) -> Findings:
    """postmaster@ and abuse@ of each of our domains."""
    if host.policy is None or host.aliases is None:
        return
    facts = KnownFacts(host)
    for local_part, source in (("postmaster", "RFC 5321, section 4.5.1, demands it"), ("abuse", "RFC 2142 asks for it")):
        addresses = [mailcloak.Address(local_part, domain) for domain in sorted(host.policy.domain)]
        owners = {address.text: mailcloak.find_owner(address, host.policy, facts).source for address in addresses}
        missing = [address for address, owner in owners.items() if owner == "nobody"]
        unknown = [address for address, owner in owners.items() if owner == "directory-unavailable"]
        if missing:
            text = f"nobody receives mail for {shorten(missing)}; {source}"
            remedy = f"mailcloakctl aliases add {missing[0]} USERNAME"
            yield warning(local_part, text, remedy)._replace(items=tuple(missing))
        if unknown:
            yield ok(local_part, f"not checked, since Keycloak cannot be asked: {shorten(unknown)}")
        if not missing and not unknown:
            yield ok(local_part, f"somebody receives mail for {shorten(list(owners))}")


def check_aliases(host: Installation) -> Findings:
    """Aliases that lead nowhere, to nobody, in circles, or past somebody."""
    if host.aliases is None:
        return
    enabled = [alias for alias in host.aliases if alias.enabled]
    good = "good in themselves" if host.users is None else f"{counted(enabled, 'enabled alias', 'enabled aliases')}, each a user's"
    yield from [*check_stored_aliases(host, enabled), *check_alias_users(host, enabled)] or [ok("aliases", good)]
    if host.users is None and enabled:
        yield ok("aliases", "not checked, since Keycloak cannot be asked: whether their users exist")


def check_stored_aliases(host: Installation, enabled: Sequence[StoredAlias]) -> Findings:
    """What the database alone shows."""
    misspelled = [alias.address for alias in enabled if mailcloak.normalise_address(alias.address).text != alias.address]
    text = "these aliases are not stored in the form in which they are looked up, so they are never found"
    remedy = "mailcloakctl aliases add makes them anew in the right form; delete these rows with sqlite3"
    yield from about(misspelled, warning("alias-spelling", text, remedy))
    if host.policy is None:
        return
    outside = [alias.address for alias in enabled if mailcloak.normalise_address(alias.address).domain not in host.policy.domain]
    remedy = "policy.domain, if the domain is ours; else mailcloakctl aliases del"
    yield from about(outside, warning("alias-domain", "these aliases are not in policy.domain, so they lead nowhere", remedy))
    if not host.policy.mailbox_domain:
        mailboxes = {alias.address: mailbox_of(alias.address, alias.username) for alias in enabled}
        chains = [
            f"{address} -> {mailbox} -> {mailboxes[mailbox]}"
            for address, mailbox in mailboxes.items()
            if mailbox != address and mailboxes.get(mailbox, mailbox) != mailbox
        ]
        text = "the mailbox of an alias is an alias itself, so the mail goes past its user"
        remedy = "mailcloakctl aliases add ADDRESS USERNAME --replace with the last user, or set policy.mailbox_domain"
        yield from about(chains, problem("alias-chain", text, remedy))


def check_alias_users(host: Installation, enabled: Sequence[StoredAlias]) -> Findings:
    """What Keycloak says of the users whom aliases name."""
    if host.users is None:
        return
    users = host.users
    known = [(alias, users.get(alias.username)) for alias in enabled if alias.username not in host.users_not_looked_up]
    missing = [f"{alias.address} ({alias.username})" for alias, user in known if not user]
    disabled = [f"{alias.address} ({alias.username})" for alias, user in known if user and not user.receives]
    text = "these aliases lead to users who {} in Keycloak, and their mail is still taken"
    remedy = "mailcloakctl aliases add ADDRESS USERNAME --replace, or aliases disable ADDRESS"
    yield from about(missing, warning("alias-user-missing", text.format("do not exist"), remedy))
    yield from about(disabled, warning("alias-user-disabled", text.format("are disabled"), remedy))
    holders: Dict[str, List[str]] = defaultdict(list)
    for user in users.values():
        if user.receives and user.email:
            holders[user.email].append(user.username)
    shadows = [
        f"{alias.address} (alias of {alias.username}, e-mail of {', '.join(holders[alias.address])})"
        for alias in enabled
        if alias.address in holders and alias.username not in holders[alias.address]
    ]
    text = "these aliases take the mail of users whose primary e-mail they are"
    yield from about(shadows, warning("alias-shadow", text, "mailcloakctl aliases del ADDRESS, unless it is meant so"))


def check_users(host: Installation) -> Findings:
    """Users whose mail would end in another's mailbox, or who cannot send."""
    if host.users is None or host.policy is None:
        return
    policy, users = host.policy, host.users
    ours = [user for user in users.values() if user.receives and mailcloak.normalise_address(user.email).domain in policy.domain]
    if host.keycloak and users and not ours:
        text = f"none of the {len(users)} users of Keycloak has an e-mail in policy.domain, so nobody but aliases receives mail"
        yield problem("users", text, "look for a typing error in policy.domain, or give the users e-mails in it")
        return
    good = ok("users", f"{counted(ours, 'user')} with an e-mail in policy.domain, each with a mailbox of his own")
    yield from list(find_odd_users(policy, users, ours)) or [good]


def find_odd_users(policy: mailcloak.PolicyConfig, users: Mapping[str, mailcloak.User], ours: Sequence[mailcloak.User]) -> Findings:
    by_address: Dict[str, List[str]] = defaultdict(list)
    for user in ours:
        by_address[user.email].append(user.username)
    shared = [f"{address} ({', '.join(names)})" for address, names in by_address.items() if len(names) > 1]
    text = "these e-mails are those of several users, none of whom may send as it"
    yield from about(shared, warning("primary-shared", text, "give all of them but one another e-mail in Keycloak"))
    ambiguous = [
        f"{name} (e-mail of {', '.join(by_address[name])})"
        for name in users
        if "@" in name and set(by_address.get(name, ())) - {name}
    ]
    text = "these usernames are another user's e-mail, so neither can send by that login"
    yield from about(ambiguous, problem("login-ambiguous", text, "rename the users, or change the e-mails, in Keycloak"))
    if not policy.mailbox_domain:
        yield from check_mailbox_names(users, ours)
    cut = [
        user.username
        for user in ours
        if mailcloak.split_extension(user.username.rpartition("@")[0] or user.username, policy.recipient_delimiter)[1]
    ]
    text = "these usernames hold a character of recipient_delimiter, so their mail goes to the mailbox of what stands before it"
    remedy = "rename the users in Keycloak, or take the character out of recipient_delimiter in config.yaml, main.cf and Dovecot"
    yield from about(cut, warning("username-delimiter", text, remedy))


def check_mailbox_names(users: Mapping[str, mailcloak.User], ours: Sequence[mailcloak.User]) -> Findings:
    """Without policy.mailbox_domain a primary e-mail is delivered as it stands: to the mailbox of its local part."""
    taken: List[str] = []
    others: List[str] = []
    for user in ours:
        local_part = user.email.rpartition("@")[0]
        if user.username not in (local_part, user.email):
            (taken if local_part in users else others).append(f"{user.email} ({user.username})")
    remedy = "set policy.mailbox_domain, so that every address leads to the mailbox of its user; or change the e-mails in Keycloak"
    text = "these e-mails have another user's name before the @, and may end in his mailbox"
    yield from about(taken, problem("primary-name", text, remedy))
    text = "these e-mails have another name before the @ than their user, so he has one mailbox for it and one for his aliases"
    yield from about(others, warning("mailbox-name", text, remedy))


def check_apps(host: Installation) -> Findings:
    """Apps that no longer count, or are called like a user."""
    if host.apps is None:
        return
    enabled = [app for app in host.apps if app.enabled]
    expired = [app.app_id for app in enabled if app.expires_at is not None and app.expires_at <= time.time()]
    remedy = "mailcloakctl apps set APP_ID --expires 90d, or apps del APP_ID"
    found = about(expired, warning("app-expired", "these apps have expired, so they cannot send", remedy))
    if host.users is not None:
        users = host.users
        named = [app.app_id for app in host.apps if app.app_id in users]
        text = "these apps are called like a user, who is taken for the app wherever he logs in without a token"
        found += about(named, warning("app-name", text, "mailcloakctl apps add under another name, then apps del APP_ID"))
        owned = [(app, users.get(app.owner)) for app in enabled if app.owner and app.owner not in host.users_not_looked_up]
        missing = [f"{app.app_id} ({app.owner})" for app, owner in owned if not owner]
        disabled = [f"{app.app_id} ({app.owner})" for app, owner in owned if owner and not owner.enabled]
        text = "these apps belong to users who {} in Keycloak, so they cannot send"
        remedy = "mailcloakctl apps set APP_ID --owner USERNAME, or apps del APP_ID"
        found += about(missing, warning("app-owner-missing", text.format("do not exist"), remedy))
        found += about(disabled, warning("app-owner-disabled", text.format("are disabled"), remedy))
    yield from found or [ok("apps", counted(enabled, "enabled app"))]


CHECKS: Tuple[Callable[[Installation], Findings], ...] = (  # as one needs the other: the first problem is the one to begin with
    check_config,
    check_config_files,
    check_database,
    check_daemon,
    check_sockets,
    check_postfix,
    check_dovecot,
    check_keycloak,
    check_role_addresses,
    check_aliases,
    check_users,
    check_apps,
)


def run_doctor(context: Context) -> int:
    """Run every check, and say what to do next; 0 all is well, 1 there are warnings, 2 there are problems."""
    host = Installation(context.options)
    findings: List[Finding] = []
    for check in CHECKS:
        for finding in run_check(check, host):
            show_progress("")
            findings.append(finding)
            if not context.options.json:
                print_finding(finding)
    show_progress("")
    if context.options.json:
        print_json([{**finding._asdict(), "items": list(finding.items)} for finding in findings])
    else:
        print_summary(findings)
    states = {finding.state for finding in findings}
    return 2 if "problem" in states else 1 if "warning" in states else 0


def run_check(check: Callable[[Installation], Findings], host: Installation) -> Findings:
    """The findings of a check; a fault of the check itself is one more, and the next ones run."""
    try:
        yield from check(host)
    except BrokenPipeError:
        raise
    except Exception as exc:
        where = mailcloak._describe_exception(exc)
        yield problem("doctor", f"{check.__name__} failed: {where}", "report this line; the other checks are not touched by it")


def print_finding(finding: Finding) -> None:
    width = terminal_width()
    first, *rest = hang(f"{finding.state:<8} {finding.check:<22} ", finding.text, width)
    rest += hang(" " * 32 + "-> ", finding.remedy, width) if finding.remedy else []
    print("\n".join([paint(first[:8], STATES[finding.state]) + first[8:].rstrip(), *rest]), flush=True)


def print_summary(findings: Sequence[Finding]) -> None:
    counts = Counter(finding.state for finding in findings)
    plural = {state: "s" if counts[state] > 1 and state != "ok" else "" for state in STATES}
    print("\n" + paint(", ".join(f"{counts[state]} {state}{plural[state]}" for state in reversed(STATES) if counts[state]), BOLD))
    wrong = [finding for finding in findings if finding.state != "ok"]
    first = min(wrong, key=lambda finding: (finding.state != "problem", finding.remedy.startswith(SEE_FINDINGS)), default=None)
    if first:
        print_field("next", f"{first.check}: {first.remedy}; then mailcloakctl doctor again")
    else:
        print_field("next", "nothing; mailcloakctl ask recipient ADDRESS shows what becomes of mail for an address")


# ---------------------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------------------


class Command(NamedTuple):
    run: Callable[[Context], Optional[int]]  # its exit code, None for 0
    help: str
    example: str
    arguments: Sequence[str]
    creates: bool = False  # may it make a database that is missing?


COMMANDS: Dict[str, Dict[str, Command]] = {  # the verb is "" where there is none
    "aliases": {
        "add": Command(
            aliases_add, "let an address lead to a user", "aliases add info@example.org alice", ("address", "username"), True
        ),
        "list": Command(aliases_list, "show all aliases", "aliases list --json", ()),
        "del": Command(delete, "delete an alias", "aliases del info@example.org", ("address",)),
        "enable": Command(set_enabled, "let a disabled alias count again", "aliases enable info@example.org", ("address",)),
        "disable": Command(set_enabled, "keep an alias, but let it lead nowhere", "aliases disable info@example.org", ("address",)),
    },
    "apps": {
        "add": Command(apps_add, "make an app, or give one a new token", "apps add printer --generate", ("app_id",), True),
        "set": Command(apps_set, "set owner or expiry, leaving the token alone", "apps set printer --expires 90d", ("app_id",)),
        "list": Command(apps_list, "show all apps and what they may send as", "apps list", ()),
        "allow": Command(apps_allow, "let an app send as an address", "apps allow printer scan@example.org", ("app_id", "address")),
        "disallow": Command(
            apps_disallow, "take an address from an app", "apps disallow printer scan@example.org", ("app_id", "address")
        ),
        "del": Command(delete, "delete an app and its addresses", "apps del printer", ("app_id",)),
        "enable": Command(set_enabled, "let a disabled app in again", "apps enable printer", ("app_id",)),
        "disable": Command(set_enabled, "keep an app, but let it neither log in nor send", "apps disable printer", ("app_id",)),
    },
    "ask": {
        "recipient": Command(
            ask_recipient, "say whether mail for an address comes in, and why", "ask recipient info@example.org", ("address",)
        ),
        "sender": Command(
            ask_sender,
            "say whether a client may use a sender, and why",
            "ask sender info@example.org --user alice --method XOAUTH2",
            ("address",),
        ),
        "alias": Command(ask_alias, "say where an address leads, and why", "ask alias info@example.org", ("address",)),
    },
    "status": {"": Command(show_status, "show what the daemon has answered so far, and how it is", "status --watch", ())},
    "doctor": {"": Command(run_doctor, "check the whole installation, and say what to do next", "doctor", ())},
    "flush": {
        "": Command(flush, "have the daemon forget what it remembers of Keycloak", "flush alice@example.org", ("[address]",))
    },
}
_ARGUMENT_HELP = {
    "address": "an e-mail address; for an app '<>' is the null sender",
    "username": "the Keycloak username that mail goes to",
    "app_id": "the app's login name",
    "[address]": "an e-mail address or a login; all that is remembered, unless one is named",
}


class ArgumentParser(mailcloak.ArgumentParser):
    usage_exit_code = 2  # argparse's own


def build_parser() -> argparse.ArgumentParser:
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
    epilog = f"example: mailcloakctl {command.example}"
    parser = parsers.add_parser(verb or noun, help=command.help, description=f"{command.help}.", epilog=epilog, parents=[common])
    parser.set_defaults(noun=noun, verb=verb)
    for argument in command.arguments:
        name = argument.strip("[]")
        optional = {"nargs": "?", "default": None} if name != argument else {}
        parser.add_argument(name, metavar=name.upper(), help=_ARGUMENT_HELP[argument], **optional)
    if (noun, verb) == ("aliases", "add"):
        parser.add_argument("--replace", action="store_true", help="also when the address leads to somebody else now")
        parser.add_argument("--force", action="store_true", help="also when that makes aliases of aliases")
    if (noun, verb) == ("apps", "add"):
        token = parser.add_mutually_exclusive_group()
        token.add_argument(
            "token", nargs="?", metavar="TOKEN", help="the password; others on this host can see it in the process list"
        )
        token.add_argument("--token-stdin", action="store_true", help="read the token from one line of standard input")
        token.add_argument("--generate", action="store_true", help="make a strong token and show it, once")
    if noun == "apps" and verb in ("add", "set"):
        parser.add_argument("--owner", metavar="USERNAME", help="the Keycloak user without whom it does not count; '' for none")
        parser.add_argument("--expires", metavar="DATE", help="its last day, 2027-01-31, or so many days from now, 90d; never")
    if (noun, verb) == ("ask", "sender"):
        parser.add_argument("--user", metavar="NAME", default="", help="who has logged in: a username, an e-mail or an app")
        parser.add_argument(
            "--method", metavar="M", help="how: XOAUTH2 or OAUTHBEARER with a token, else PLAIN (the default) or LOGIN"
        )
    if noun == "status":
        form = parser.add_mutually_exclusive_group()
        form.add_argument("--watch", action="store_true", help=f"again every {WATCH_SECONDS:.0f} seconds, in place, until Ctrl-C")
        form.add_argument(
            "--prometheus", action="store_true", help="in the text format of Prometheus, for node_exporter's textfile folder"
        )
    if noun == "doctor":
        parser.add_argument(
            "--postfix-config",
            metavar="DIR",
            action="append",
            help="Postfix's configuration, else postconf's own; once for each instance",
        )
        parser.add_argument("--dovecot-config", metavar="FILE", help="Dovecot's configuration, else doveconf's own")


def take_late_argument(parser: argparse.ArgumentParser, options: argparse.Namespace, rest: Sequence[str]) -> None:
    """apps add APP_ID --json TOKEN: argparse lets an optional argument stand only directly after the one before it."""
    if options.noun == "flush" and options.address is None and len(rest) == 1 and not rest[0].startswith("-"):
        options.address = rest[0]
        return
    if (options.noun, options.verb) != ("apps", "add"):
        parser.error("unrecognized arguments")
    if len(rest) > 1 or rest[0].startswith("-"):
        # without showing what may be the token
        parser.error("an unknown option or a second TOKEN; a TOKEN that begins with - goes after --")
    if options.token is not None or options.token_stdin or options.generate:
        parser.error("TOKEN, --token-stdin and --generate exclude each other")
    options.token = rest[0]


def repair_streams() -> None:
    """Something to read from and write to where a standard stream was closed; characters that a locale lacks are escaped."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  open as long as the program runs
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Let what is still in the buffer of standard output go, so that the end of the program does not fail on it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_command(options: argparse.Namespace) -> int:
    command = COMMANDS[options.noun][options.verb]
    with contextlib.closing(Context(options, create=command.creates)) as context:
        try:
            exit_code = command.run(context)
        except sqlite3.Error as exc:
            raise Refused(f"database {context.path!r}: {exc}, nothing was changed{database_hint(exc, context.path)}") from exc
        sys.stdout.flush()
    return exit_code or EXIT_DONE


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command; returns its exit code."""
    defaults = argparse.Namespace(config=None, db=None, json=False)
    parser = build_parser()
    options, rest = parser.parse_known_args(argv, defaults)
    if rest:
        take_late_argument(parser, options, rest)
    if options.config is not None and options.db is not None:
        parser.error("--config and --db both name the database, give one of them")
    if "" in (options.config, options.db):
        parser.error("--config or --db is empty, it must name a file")
    if options.noun == "status" and options.json and (options.watch or options.prometheus):
        parser.error("--json, --watch and --prometheus exclude each other")
    if (options.noun, options.verb) == ("ask", "sender") and options.method and not options.user:
        parser.error("--method says how --user has logged in, name both")
    repair_streams()
    try:
        return run_command(options)
    except mailcloak.ConfigError as exc:
        for problem in exc.problems:
            say(problem)
        if options.noun in ("aliases", "apps"):
            say("mailcloakctl: the configuration names the database; mend it, or name the database with --db")
        else:
            say(
                "mailcloakctl: the configuration names the daemon's sockets; mend it, name another with --config, or run this as root"
            )
    except Refused as exc:
        say(f"mailcloakctl: {exc}")
    except BrokenPipeError:  # the reader of our list has seen enough
        drop_output()
        return EXIT_DONE
    except OSError as exc:
        drop_output()
        say(f"mailcloakctl: the list cannot be written: {exc.strerror or exc}, send it elsewhere")
    except KeyboardInterrupt:
        say("mailcloakctl: interrupted, nothing was changed")
    return EXIT_REFUSED


if __name__ == "__main__":
    sys.exit(main())
