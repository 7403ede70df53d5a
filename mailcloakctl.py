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
import getpass
import hashlib
import hmac
import json
import os
import re
import secrets
import sqlite3
import sys
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # mailcloak.py lies beside this file, also behind a symlink

import mailcloak

Columns = Dict[str, Callable[[Any], str]]  # the columns of a table, each with the function that makes its value readable

EXIT_DONE, EXIT_REFUSED, EXIT_USAGE, EXIT_LIMIT = 0, 1, 2, 3
BUSY_SECONDS = 60.0  # how long to wait for another mailcloakctl that is writing
GENERATED_TOKEN_BYTES = 32
GENERATED_ITERATIONS = 4096  # 256 random bits cannot be guessed, however fast a guess is checked
CHOSEN_ITERATIONS = 100_000  # Dovecot checks one login at a time: more would let wrong logins keep good ones waiting
SHORT_TOKEN_CHARS = 16


class Refused(mailcloak.MailcloakError):
    """The command cannot be done as asked; nothing was changed."""


class Context(NamedTuple):
    """What a command works with. policy is None when no configuration says which domains are ours."""

    options: argparse.Namespace
    database: sqlite3.Connection
    policy: Optional[mailcloak.PolicyConfig]


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
        raise Refused("a username cannot be empty or hold control characters")
    if len(text) > mailcloak.MAX_ADDRESS_CHARS:
        raise Refused(f"a username cannot be longer than {mailcloak.MAX_ADDRESS_CHARS} characters")
    return text.strip().lower()


def read_app_id(text: str) -> str:
    """Dovecot lets no other characters of a username through to its query (auth_username_chars)."""
    if not re.fullmatch(r"[a-z0-9._@-]{1,254}", text.lower(), re.ASCII):
        raise Refused(f"{text!r} is not an app id: only letters a-z, digits and . _ - @ are possible")
    return text.lower()


def check_token(token: str) -> str:
    if not token or not token.isprintable():
        raise Refused("a token cannot be empty or hold control characters")
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
        line = sys.stdin.buffer.readline(65536)
        try:
            return check_token(line.decode("utf-8").rstrip("\r\n"))
        except UnicodeDecodeError:
            raise Refused("the token on standard input is not UTF-8") from None
    if options.token is not None:
        return check_token(options.token)
    if not sys.stdin.isatty():
        raise Refused("no token: name one, or use --generate or --token-stdin")
    token = getpass.getpass(f"token of {options.app_id}: ")
    if token != getpass.getpass("again: "):
        raise Refused("the two tokens differ")
    return check_token(token)


# ---------------------------------------------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------------------------------------------


def say(message: str) -> None:
    """A line for people: standard output belongs to lists and generated tokens."""
    print(message, file=sys.stderr)


def shown_sender(sender: str) -> str:
    return sender or "<>"


def shown_time(seconds: Any) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (TypeError, ValueError, OverflowError, OSError):
        return str(seconds)  # a row that somebody else wrote


def shown_text(text: Any) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def print_list(options: argparse.Namespace, rows: Sequence[Dict[str, Any]], columns: Columns) -> None:
    """The rows as a table, or as one JSON array with all that is in them."""
    if options.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
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
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


def open_database(path: str, *, create: bool) -> sqlite3.Connection:
    if not create and not os.path.exists(path):
        raise Refused(f"database {path!r} does not exist yet; a command that adds something creates it")
    try:
        if mailcloak.prepare_database(path):
            say(f"database {path} created")
        database = mailcloak.connect_database(path, BUSY_SECONDS)
    except (mailcloak.StartError, mailcloak.DatabaseUnavailable) as exc:
        raise Refused(str(exc)) from exc
    database.row_factory = sqlite3.Row
    return database


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
        if row and row["username"].lower() != username and not context.options.replace:
            raise Refused(f"aliases: {address} leads to {row['username']} already, --replace changes that")
        if not context.options.force:
            refuse_chain(context, address, username)
        database.execute(
            "INSERT INTO aliases (alias_email, username) VALUES (?, ?) ON CONFLICT (alias_email)"
            " DO UPDATE SET username = excluded.username, updated_at = strftime('%s', 'now') WHERE username <> excluded.username",
            (address, username),
        )
    if row and row["username"] == username:
        say(f"aliases: {address} leads to {username} already")
    else:
        say(f"aliases: {address} {'now ' if row else ''}leads to {username}")
    if row and not row["enabled"]:
        say(f"aliases: {address} is disabled, aliases enable {address} makes it count")
    if context.policy and mailcloak.normalise_address(address).domain not in context.policy.domain:
        say(f"warning: {address} is not in policy.domain ({', '.join(sorted(context.policy.domain))}), so it leads nowhere")


def refuse_chain(context: Context, address: str, username: str) -> None:
    """Postfix looks the answer of an alias up again, so an alias that leads to another alias would carry mail past its user.

    With policy.mailbox_domain set an answer is never an alias, and nothing needs to be refused.
    """
    if context.policy and context.policy.mailbox_domain:
        return
    local_part, _, domain = address.rpartition("@")
    mailbox = mailcloak.format_mailbox(username, "", domain)
    if mailbox == address:
        return
    find = context.database.execute
    for other in find(
        "SELECT alias_email, username FROM aliases WHERE username IN (?, ?) AND alias_email <> ? ORDER BY alias_email",
        (local_part, address, address),
    ):
        if (
            mailcloak.format_mailbox(other["username"], "", other["alias_email"].rpartition("@")[2])
            == address
            != other["alias_email"]
        ):
            raise Refused(
                f"aliases: {other['alias_email']} leads to {other['username']}, whose mailbox is {address}:"
                f" this alias would carry that mail on to {username}; --force does it all the same"
            )
    other = find("SELECT alias_email, username FROM aliases WHERE alias_email = ?", (mailbox,)).fetchone()
    if other and mailcloak.format_mailbox(other["username"], "", domain) != mailbox:
        raise Refused(
            f"aliases: the mailbox of {username} is {mailbox}, which is itself an alias and leads to {other['username']};"
            f" name {other['username']} instead, or use --force"
        )


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
    database = context.database
    with transaction(database):
        alias = database.execute("SELECT alias_email FROM aliases WHERE lower(username) = ? LIMIT 1", (app_id,)).fetchone()
        if alias:
            raise Refused(f"apps: {app_id} is a username, {alias['alias_email']} leads to it; an app needs a name of its own")
        known = database.execute("SELECT enabled FROM apps WHERE app_id = ?", (app_id,)).fetchone()
        database.execute(
            "INSERT INTO apps (app_id, secret_hash) VALUES (?, ?) ON CONFLICT (app_id) DO UPDATE SET secret_hash = excluded.secret_hash",
            (app_id, secret_hash),
        )
    if generated:
        print(json.dumps({"app_id": app_id, "token": generated}) if context.options.json else generated)
    say(f"apps: {app_id} {'has a new token, the old one no longer works' if known else 'added'}")
    if known and not known["enabled"]:
        say(f"apps: {app_id} is disabled, apps enable {app_id} lets it in again")
    if not known:
        say(f"apps: it may not send yet, apps allow {app_id} ADDRESS lets it use an address")


def apps_list(context: Context) -> None:
    rows = [dict(row) for row in context.database.execute("SELECT app_id, enabled, created_at FROM apps ORDER BY app_id")]
    allowed: Dict[str, List[str]] = {row["app_id"]: [] for row in rows}
    for row in context.database.execute("SELECT app_id, from_addr FROM app_from WHERE enabled = 1 ORDER BY app_id, from_addr"):
        allowed.setdefault(row["app_id"], []).append(row["from_addr"])
    for entry in rows:
        entry["from_addr"] = allowed[entry["app_id"]]
    columns: Columns = {
        "app_id": str,
        "enabled": yes_no,
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


def build_parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(
        add_help=False, argument_default=argparse.SUPPRESS
    )  # so that they stand before or after the verb
    place = common.add_mutually_exclusive_group()
    place.add_argument(
        "--config", metavar="FILE", help=f"the daemon's configuration, {mailcloak.DEFAULT_CONFIG_PATH} if it is there"
    )
    place.add_argument("--db", metavar="FILE", help="the database itself")
    common.add_argument("--json", action="store_true", help="lists as one JSON array of objects")
    parser = argparse.ArgumentParser(prog="mailcloakctl", description=(__doc__ or "").split("\n", 1)[0], parents=[common])
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
    return parser


def find_database(options: argparse.Namespace) -> str:
    """--db, else sqlite.path of the configuration, else the default."""
    if options.db:
        return os.path.abspath(options.db)
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


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command; returns its exit code."""
    defaults = argparse.Namespace(config=None, db=None, json=False)
    parser = build_parser()
    options = parser.parse_args(argv, defaults)
    if options.config and options.db:
        parser.error("--config and --db both name the database, give one of them")
    command = COMMANDS[options.noun][options.verb]
    try:
        with contextlib.closing(open_database(find_database(options), create=command.creates)) as database:
            command.run(Context(options, database, read_policy(options)))
            sys.stdout.flush()
    except mailcloak.ConfigError as exc:
        say("\n".join(exc.problems))
    except Refused as exc:
        say(f"mailcloakctl: {exc}")
    except sqlite3.Error as exc:
        say(f"mailcloakctl: database {find_database(options)}: {exc}, nothing was changed")
    except BrokenPipeError:  # the reader of our list has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except KeyboardInterrupt:
        say("mailcloakctl: interrupted, nothing was changed")
    else:
        return EXIT_DONE
    return EXIT_REFUSED


if __name__ == "__main__":
    sys.exit(main())
