#!/usr/bin/env python3
# mailcloakctl: edit the aliases and apps that mailcloak answers from. MIT licence, see LICENSE.
"""Edit the aliases and apps of mailcloak, by hand and from cron jobs.

  mailcloakctl aliases add ADDRESS USERNAME     an address that leads to a user's mailbox
  mailcloakctl apps add APP_ID --generate       a login that may send, and only as the addresses it is allowed
  mailcloakctl apps allow APP_ID ADDRESS

The database is --db, else sqlite.path of the configuration, else /var/lib/mailcloak/state.db. A change counts from the daemon's next
answer on; nothing has to be reloaded.

Exit codes: 0 done, or already so; 1 refused, not found or not possible, and then nothing was changed; 2 usage; 3 a safety limit
stopped it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import datetime
import functools
import getpass
import hashlib
import hmac
import io
import json
import os
import pwd
import re
import secrets
import sqlite3
import sys
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # mailcloak.py lies beside this file, also behind a symlink

import mailcloak

Columns = Dict[str, Callable[[Any], str]]  # the columns of a table, each with the function that makes its value readable

EXIT_DONE, EXIT_REFUSED = 0, 1  # 2 is argparse's; 3 is kept for safety limits
BUSY_SECONDS = 60.0  # how long to wait for another mailcloakctl that is writing
GENERATED_TOKEN_BYTES = 32
GENERATED_ITERATIONS = 4096  # 256 random bits cannot be guessed, however fast a guess is checked
CHOSEN_ITERATIONS = 100_000  # Dovecot checks one login at a time: more would let wrong logins keep good ones waiting
SHORT_TOKEN_CHARS = 16


class Refused(mailcloak.MailcloakError):
    """The command cannot be done as asked; nothing was changed."""


class Context:
    """What a command works with. policy is None when no configuration says which domains are ours."""

    def __init__(self, options: argparse.Namespace, path: str, policy: Optional[mailcloak.PolicyConfig], *, create: bool) -> None:
        self.options, self.path, self.policy, self._create = options, path, policy, create

    @functools.cached_property
    def database(self) -> sqlite3.Connection:
        """The database, opened at its first use: arguments are checked before, so that a refused command does not create it."""
        return open_database(self.path, create=self._create)

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


def read_owner(text: str) -> Optional[str]:
    """The Keycloak user whom an app belongs to; "" takes the owner away."""
    return read_username(text) if text else None


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
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (TypeError, ValueError, OverflowError, OSError):
        return str(seconds)  # a row that somebody else wrote


def shown_text(text: Any) -> str:
    """Text that may come from anywhere, with control characters escaped: it moves no cursor and forges no line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def print_list(options: argparse.Namespace, rows: Sequence[Dict[str, Any]], columns: Columns) -> None:
    """The rows as a table, or as one JSON array with all that is in them, in ASCII so that any locale can print it."""
    if options.json:
        print(json.dumps(rows, indent=2, default=repr))
        return
    table = [[name.upper().replace("_", " ") for name in columns]]
    table += [[shown_text(show(row[name])) for name, show in columns.items()] for row in rows]
    widths = [max(len(line[index]) for line in table) for index in range(len(columns))]
    for line in table if rows else []:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())


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
    if "is empty" in str(exc):
        return ""
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


def set_enabled(context: Context, table: str, column: str, key: str, enabled: bool) -> None:
    word = "enabled" if enabled else "disabled"
    touch = ", updated_at = strftime('%s', 'now')" if table == "aliases" else ""
    with transaction(context.database):
        row = context.database.execute(f"SELECT enabled FROM {table} WHERE {column} = ?", (key,)).fetchone()  # noqa: S608
        if row is None:
            raise Refused(f"{table}: {key} does not exist, {table} list shows what does")
        if row["enabled"] != enabled:
            context.database.execute(f"UPDATE {table} SET enabled = ?{touch} WHERE {column} = ?", (int(enabled), key))  # noqa: S608
    say(f"{table}: {key} {'is ' + word + ' already' if row['enabled'] == enabled else word}")


def delete(context: Context, table: str, column: str, key: str) -> None:
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


def aliases_del(context: Context) -> None:
    delete(context, "aliases", "alias_email", read_address(context.options.address))


def aliases_enable(context: Context) -> None:
    set_enabled(context, "aliases", "alias_email", read_address(context.options.address), True)


def aliases_disable(context: Context) -> None:
    set_enabled(context, "aliases", "alias_email", read_address(context.options.address), False)


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
        changes["owner"] = read_owner(options.owner)
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
    rows = [
        dict(row)
        for row in context.database.execute("SELECT app_id, enabled, created_at, owner, expires_at FROM apps ORDER BY app_id")
    ]
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
            "INSERT INTO app_from (app_id, from_addr) VALUES (?, ?) ON CONFLICT DO UPDATE SET enabled = 1 WHERE enabled = 0",
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


def apps_del(context: Context) -> None:
    delete(context, "apps", "app_id", read_app_id(context.options.app_id))


def apps_enable(context: Context) -> None:
    set_enabled(context, "apps", "app_id", read_app_id(context.options.app_id), True)


def apps_disable(context: Context) -> None:
    set_enabled(context, "apps", "app_id", read_app_id(context.options.app_id), False)


# ---------------------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------------------


class Command(NamedTuple):
    run: Callable[[Context], None]
    help: str
    example: str
    arguments: Sequence[str]
    creates: bool = False  # may it make a database that is missing?


COMMANDS: Dict[str, Dict[str, Command]] = {
    "aliases": {
        "add": Command(
            aliases_add, "let an address lead to a user", "aliases add info@example.org alice", ("address", "username"), True
        ),
        "list": Command(aliases_list, "show all aliases", "aliases list --json", ()),
        "del": Command(aliases_del, "delete an alias", "aliases del info@example.org", ("address",)),
        "enable": Command(aliases_enable, "let a disabled alias count again", "aliases enable info@example.org", ("address",)),
        "disable": Command(
            aliases_disable, "keep an alias, but let it lead nowhere", "aliases disable info@example.org", ("address",)
        ),
    },
    "apps": {
        "add": Command(apps_add, "make an app, or give one a new token", "apps add printer --generate", ("app_id",), True),
        "set": Command(apps_set, "set owner or expiry, leaving the token alone", "apps set printer --expires 90d", ("app_id",)),
        "list": Command(apps_list, "show all apps and what they may send as", "apps list", ()),
        "allow": Command(apps_allow, "let an app send as an address", "apps allow printer scan@example.org", ("app_id", "address")),
        "disallow": Command(
            apps_disallow, "take an address from an app", "apps disallow printer scan@example.org", ("app_id", "address")
        ),
        "del": Command(apps_del, "delete an app and its addresses", "apps del printer", ("app_id",)),
        "enable": Command(apps_enable, "let a disabled app in again", "apps enable printer", ("app_id",)),
        "disable": Command(apps_disable, "keep an app, but let it neither log in nor send", "apps disable printer", ("app_id",)),
    },
}
_ARGUMENT_HELP = {
    "address": "an e-mail address; for an app '<>' is the null sender",
    "username": "the Keycloak username that mail goes to",
    "app_id": "the app's login name",
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
    common.add_argument("--json", action="store_true", help="lists as one JSON array of objects")
    parser = ArgumentParser(prog="mailcloakctl", description=(__doc__ or "").split("\n", 1)[0], parents=[common])
    parser.add_argument("--version", action="version", version=f"mailcloakctl {mailcloak.__version__}")
    nouns = parser.add_subparsers(metavar="NOUN", dest="noun", required=True)
    for noun, verbs in COMMANDS.items():
        noun_parser = nouns.add_parser(noun, help=f"{', '.join(verbs)}", parents=[common])
        verb_parsers = noun_parser.add_subparsers(metavar="VERB", dest="verb", required=True)
        for verb, command in verbs.items():
            epilog = f"example: mailcloakctl {command.example}"
            verb_parser = verb_parsers.add_parser(
                verb, help=command.help, description=f"{command.help}.", epilog=epilog, parents=[common]
            )
            for argument in command.arguments:
                verb_parser.add_argument(argument, metavar=argument.upper(), help=_ARGUMENT_HELP[argument])
            if (noun, verb) == ("aliases", "add"):
                verb_parser.add_argument("--replace", action="store_true", help="also when the address leads to somebody else now")
                verb_parser.add_argument("--force", action="store_true", help="also when that makes aliases of aliases")
            if (noun, verb) == ("apps", "add"):
                token = verb_parser.add_mutually_exclusive_group()
                token.add_argument(
                    "token", nargs="?", metavar="TOKEN", help="the password; others on this host can see it in the process list"
                )
                token.add_argument("--token-stdin", action="store_true", help="read the token from one line of standard input")
                token.add_argument("--generate", action="store_true", help="make a strong token and show it, once")
            if noun == "apps" and verb in ("add", "set"):
                verb_parser.add_argument(
                    "--owner", metavar="USERNAME", help="the Keycloak user without whom it does not count; '' for none"
                )
                verb_parser.add_argument(
                    "--expires", metavar="DATE", help="its last day, 2027-01-31, or so many days from now, 90d; never"
                )
    return parser


def find_database(options: argparse.Namespace) -> str:
    """--db, else sqlite.path of the configuration, else the default."""
    if options.db:
        return str(os.path.abspath(options.db))
    if not options.config and not os.path.exists(mailcloak.DEFAULT_CONFIG_PATH):
        return mailcloak.DEFAULT_DATABASE_PATH
    problems: List[str] = []
    raw = mailcloak.read_yaml(options.config or mailcloak.DEFAULT_CONFIG_PATH)
    block = mailcloak.read_block(mailcloak.SqliteConfig, "sqlite", raw.get("sqlite", {}), problems)
    if block is None:
        raise mailcloak.ConfigError(problems)
    return str(block.path)


def read_policy(options: argparse.Namespace) -> Optional[mailcloak.PolicyConfig]:
    """The policy block of the configuration where there is one; its problems are the daemon's to report, not ours."""
    with contextlib.suppress(mailcloak.ConfigError):
        if options.config or (not options.db and os.path.exists(mailcloak.DEFAULT_CONFIG_PATH)):
            raw = mailcloak.read_yaml(options.config or mailcloak.DEFAULT_CONFIG_PATH)
            policy: Optional[mailcloak.PolicyConfig] = mailcloak.read_block(
                mailcloak.PolicyConfig, "policy", raw.get("policy", {}), []
            )
            return policy
    return None


def take_late_token(parser: argparse.ArgumentParser, options: argparse.Namespace, rest: Sequence[str]) -> None:
    """apps add APP_ID --json TOKEN: argparse lets an optional argument stand only directly after the one before it."""
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


def run_command(options: argparse.Namespace) -> None:
    command = COMMANDS[options.noun][options.verb]
    with contextlib.closing(Context(options, find_database(options), read_policy(options), create=command.creates)) as context:
        try:
            command.run(context)
        except sqlite3.Error as exc:
            raise Refused(f"database {context.path!r}: {exc}, nothing was changed{database_hint(exc, context.path)}") from exc
        sys.stdout.flush()


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command; returns its exit code."""
    defaults = argparse.Namespace(config=None, db=None, json=False)
    parser = build_parser()
    options, rest = parser.parse_known_args(argv, defaults)
    if rest:
        take_late_token(parser, options, rest)
    if options.config is not None and options.db is not None:
        parser.error("--config and --db both name the database, give one of them")
    if "" in (options.config, options.db):
        parser.error("--config or --db is empty, it must name a file")
    repair_streams()
    try:
        run_command(options)
    except mailcloak.ConfigError as exc:
        for problem in exc.problems:
            say(problem)
        say("mailcloakctl: the configuration names the database; mend it, or name the database with --db")
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
    else:
        return EXIT_DONE
    return EXIT_REFUSED


if __name__ == "__main__":
    sys.exit(main())
