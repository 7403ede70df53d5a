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

In this file: what changes single aliases and apps, and the command line. mailcloakcommon.py beside it has what all commands share. The
others are loaded by the commands that need them: mailcloakask.py asks the daemon, mailcloakdata.py works with files of aliases and with
backups, mailcloakmirror.py keeps the databases of several mail hosts equal, mailcloakdoctor.py explains and runs the checks of doctor.

Contents: aliases and apps (enable, disable, del), aliases, apps, the command line.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() waits for it, Ctrl-C ends the program without a traceback

import argparse
import base64
import contextlib
import datetime
import functools
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # the modules lie beside this file, also behind a symlink

try:
    import mailcloak
    import mailcloakcommon as common
except (ImportError, SyntaxError) as exc:  # a file that is missing, or was cut
    sys.exit(f"mailcloakctl: {exc}; install mailcloak again (make install)")

GENERATED_TOKEN_BYTES = 32
GENERATED_ITERATIONS = 4096  # 256 random bits cannot be guessed, however fast a guess is checked
CHOSEN_ITERATIONS = 100_000  # Dovecot checks one login at a time: more would let wrong logins delay good ones
SHORT_TOKEN_CHARS = 16
LEAST_TOKEN_CHARS = 8

# ---------------------------------------------------------------------------------------------------------------------------------
# aliases and apps: enable, disable, del
# ---------------------------------------------------------------------------------------------------------------------------------


def named_rows(context: common.Context) -> tuple[str, str, list[str]]:
    """Table, key column and keys of the aliases or of the app that the arguments name."""
    if context.options.noun == "aliases":
        return "aliases", "alias_email", common.read_addresses(context.options.addresses)
    return "apps", "app_id", [common.read_app_id(context.options.app_id)]


def fetch_rows(context: common.Context, table: str, column: str, keys: Sequence[str]) -> dict[str, Any]:
    """The rows by their keys; raises Refused unless all are there."""
    select = f"SELECT * FROM {table} WHERE {column} = ?"  # noqa: S608  two names of this file
    rows = {key: context.database.execute(select, (key,)).fetchone() for key in keys}
    absent = [key for key, row in rows.items() if row is None]
    if absent:
        verb = "does" if len(absent) == 1 else "do"
        raise common.Refused(f"{table}: {common.shorten(absent)} {verb} not exist, {table} list shows what does")
    return rows


def set_enabled(context: common.Context) -> None:
    """Enable or disable aliases or an app."""
    table, column, keys = named_rows(context)
    enabled = context.options.verb == "enable"
    word = "enabled" if enabled else "disabled"
    touch = ", updated_at = strftime('%s', 'now')" if table == "aliases" else ""
    with common.transaction(context.database):
        changed = [key for key, row in fetch_rows(context, table, column, keys).items() if row["enabled"] != enabled]
        update = f"UPDATE {table} SET enabled = ?{touch} WHERE {column} = ?"  # noqa: S608
        context.database.executemany(update, [(int(enabled), key) for key in changed])
    for key in changed:
        common.note_change(f"{table}: {context.options.verb}", key)
    warn_of_jobs(context, changed)
    common.answer(context, changed, *(f"{table}: {key} {word if key in changed else f'is {word} already'}" for key in keys))


def warn_of_jobs(context: common.Context, aliases: Sequence[str]) -> None:
    """Say whose aliases these are, where a job made them, whose next run makes them again as its file says."""
    if context.options.noun == "aliases":
        for address in aliases:
            row = context.database.execute("SELECT source FROM aliases WHERE alias_email = ?", (address,)).fetchone()
            if row and row["source"]:
                common.say(f"warning: {address} belongs to the job {row['source']}, whose next run may undo this: change its file")


def delete(context: common.Context) -> None:
    """Delete aliases, or an app with its addresses."""
    table, column, keys = named_rows(context)
    warn_of_jobs(context, keys)
    with common.transaction(context.database):
        rows = fetch_rows(context, table, column, keys)
        found = {key: common.find_alias(context.database, key) for key in keys} if table == "aliases" else {}
        targets = {key: common.shown_targets(alias) for key, alias in found.items() if alias}
        context.database.executemany(f"DELETE FROM {table} WHERE {column} = ?", [(key,) for key in keys])  # noqa: S608
    for key in rows:
        common.note_change(f"{table}: del", key, username=targets.get(key))
    common.answer(context, keys, *(f"{table}: {key} deleted" for key in keys))


# ---------------------------------------------------------------------------------------------------------------------------------
# aliases
# ---------------------------------------------------------------------------------------------------------------------------------


def aliases_add(context: common.Context) -> None:
    """Let an address lead to a user, or to several."""
    options = context.options
    wanted = read_targets(context, common.read_address(options.address), receive_only=options.receive_only)

    def decide(address: str, before: Optional[mailcloak.Alias]) -> mailcloak.Alias:
        after = wanted._replace(enabled=before.enabled if before else True)
        if before and before != after and not options.replace:
            receives = ", which only receives," if before.receive_only else ""
            raise common.Refused(
                f"aliases: {address} leads to {common.shown_targets(before)}{receives} already, --replace changes that"
            )
        return after

    change_alias(context, decide)


def aliases_add_user(context: common.Context) -> None:
    """Let an alias lead to further users as well."""
    wanted = read_targets(context, common.read_address(context.options.address))

    def decide(address: str, before: Optional[mailcloak.Alias]) -> mailcloak.Alias:
        if not before:
            raise common.Refused(f"aliases: {address} does not exist, aliases add makes it")
        users, external = (
            tuple(sorted({*old, *new})) for old, new in ((before.users, wanted.users), (before.external, wanted.external))
        )
        return before._replace(users=users, external=external)

    change_alias(context, decide)


def aliases_remove_user(context: common.Context) -> None:
    """Let an alias with several targets no longer lead to some of them."""
    names = {common.read_username(name.strip("<>")) for name in context.options.users}

    def decide(address: str, before: Optional[mailcloak.Alias]) -> mailcloak.Alias:
        if not before:
            raise common.Refused(f"aliases: {address} does not exist, aliases list shows what does")
        users, external = (tuple(name for name in old if name not in names) for old in (before.users, before.external))
        if not users and not external:
            raise common.Refused(f"aliases: {address} would lead to nobody, aliases del {address} deletes it")
        return before._replace(users=users, external=external)

    before = change_alias(context, decide)
    absent = sorted(names - {*before.users, *before.external}) if before else ()
    if absent:
        common.say(f"aliases: {common.read_address(context.options.address)} did not lead to {common.shorten(absent)}")


def read_targets(context: common.Context, address: str, *, receive_only: bool = False) -> mailcloak.Alias:
    """The alias that the arguments describe; raises Refused for names that it cannot have.

    With --external a name with @ is an address elsewhere, unless it is in one of our domains.
    """
    names = [name.strip("<>") for name in context.options.users]
    own = context.policy.domain if context.policy else {address.rpartition("@")[2]}
    is_elsewhere = {name: "@" in name and mailcloak.normalise_address(name).domain not in own for name in names}
    external = {common.read_external(context, name) for name in names if is_elsewhere[name]} if context.options.external else set()
    users = {common.read_username(name) for name in names if not (is_elsewhere[name] and context.options.external)}
    common.refuse_catch_all(address)
    for user in sorted(users):
        common.refuse_names(context, user)
        if not user.isascii():
            common.say(
                f"warning: {user} is not ASCII, and Dovecot 2.3 takes no mail for such a mailbox: it bounces; rename the user"
            )
    return mailcloak.Alias(tuple(sorted(users)), True, tuple(sorted(external)), receive_only)


def change_alias(
    context: common.Context, decide: Callable[[str, Optional[mailcloak.Alias]], mailcloak.Alias]
) -> Optional[mailcloak.Alias]:
    """Store what decide() makes of the alias that is there, and say so; what was there."""
    options, address = context.options, common.read_address(context.options.address)
    # aliases add may have to make the database, and does not do so before its arguments are looked up
    is_new = context.creates and not os.path.exists(context.path)
    stored = None if is_new else common.patiently(lambda: common.find_alias(context.database, address))
    wanted = decide(address, stored)
    if not stored or (stored.users, stored.external) != (wanted.users, wanted.external):
        common.check_with_keycloak(context, f"{address} and its users were", [(address, stored, wanted)])
    database = context.database
    with common.transaction(database):
        before = common.find_alias(database, address)
        after = decide(address, before)
        common.refuse_number(context, address, after)
        added = common.new_targets(before, after)
        for target in added if not options.force else ():
            common.refuse_chain(context, address, target)
        apps = [user for user in added if database.execute("SELECT 1 FROM apps WHERE app_id = ?", (user,)).fetchone()]
        if before != after:
            common.store_aliases(database, [common.Stored(address, after)])
    targets, old = common.shown_targets(after), common.shown_targets(before) if before else None
    if before != after:
        common.note_change(f"aliases: {options.verb}", address, username=targets, before=old)
    now = "now leads" if before and before != after else "leads"
    text = f"aliases: {address} {now} to {targets}{', and only receives' if after.receive_only else ''}"
    if before:
        users = tuple(user for user in before.users if user not in after.users)
        external = tuple(other for other in before.external if other not in after.external)
        lost = common.shown_targets(before._replace(users=users, external=external))
        text += f", no longer to {lost}" if lost else ""
    values = {"username": targets, "before": old}
    common.answer(context, [address] if before != after else [], text + (" already" if before == after else ""), **values)
    if not after.enabled:
        common.say(f"aliases: {address} is disabled, aliases enable {address} makes it count")
    warn_of_domain(context, address, "so it leads nowhere")
    for app in apps:
        common.say(f"warning: {app} is an app, and apps receive no mail; name the user who should get it")
    return before


def warn_of_domain(context: common.Context, address: str, so: str) -> None:
    """Say so where the address is not in one of our domains, and what that means."""
    policy = context.policy
    if policy and mailcloak.normalise_address(address).domain not in policy.domain:
        common.say(f"warning: {address} is not in policy.domain ({', '.join(sorted(policy.domain))}), {so}")


def aliases_list(context: common.Context) -> None:
    """Print the aliases that all of the options let through, sorted by address."""
    options = context.options
    filters = [
        ("alias_email GLOB ?", options.glob and options.glob.lower()),
        (
            f"alias_email IN (SELECT alias_email FROM {common.ALIAS_USERS} WHERE lower(username) = ?)",  # noqa: S608
            options.user and common.read_username(options.user),
        ),
        ("substr(alias_email, instr(alias_email, '@') + 1) = ?", options.domain and common.read_domain(options.domain)),
        ("COALESCE(source, '') = ?", options.source),
        ("enabled <> ?", 1 if options.disabled else None),
    ]
    where = " AND ".join(condition for condition, value in filters if value is not None) or "1"
    values = [value for _, value in filters if value is not None]
    what = "count(*)" if options.count else f"alias_email, updated_at, source, {mailcloak.ALIAS_COLUMNS}"
    select = f"SELECT {what} FROM aliases WHERE {where} ORDER BY alias_email"  # noqa: S608  no text of a user
    rows = common.patiently(lambda: context.database.execute(select, values).fetchall())
    warn_of_username(context, options.glob or "")
    if options.count:
        common.print_json({"count": rows[0][0]}) if options.json else print(rows[0][0])
    elif options.quiet and options.json:
        common.print_json([row["alias_email"] for row in rows])
    elif options.quiet:
        for row in rows:
            print(common.shown_text(row["alias_email"]))
    else:
        columns: common.Columns = {"alias_email": str, "username": str, "enabled": common.yes_no}
        if any(row["source"] for row in rows):
            columns["source"] = lambda name: name or "-"
        common.print_list(options, [describe_alias(row) for row in rows], {**columns, "updated_at": common.shown_time})


def warn_of_username(context: common.Context, glob: str) -> None:
    """Say so where a pattern for addresses is the name of a user who has aliases: without an @ or a wildcard it is like none."""
    if not glob or re.search(r"[@*?[]", glob):
        return
    select = f"SELECT 1 FROM {common.ALIAS_USERS} WHERE lower(username) = ?"  # noqa: S608
    if common.patiently(lambda: context.database.execute(select, (glob.lower(),)).fetchone()):
        common.say(f"warning: {glob} is like no address; aliases list --user {glob} shows the aliases of this user")


def describe_alias(row: Any) -> dict[str, Any]:
    """An alias as a list shows it; row: address, time, owner, and ALIAS_COLUMNS."""
    address, updated_at, source, *columns = row
    alias = mailcloak.read_alias(*columns)
    values = {
        "alias_email": address,
        "username": common.shown_targets(alias),
        "enabled": int(alias.enabled),
        "updated_at": updated_at,
    }
    return {**values, "source": source, **alias._asdict(), "enabled": int(alias.enabled)}


def aliases_show(context: common.Context) -> None:
    """Print one alias, and the mailboxes that it leads to."""
    address = common.read_address(context.options.address)
    select = f"SELECT alias_email, updated_at, source, {mailcloak.ALIAS_COLUMNS} FROM aliases WHERE alias_email = ?"  # noqa: S608
    row = common.patiently(lambda: context.database.execute(select, (address,)).fetchone())
    if not row:
        raise common.Refused(f"aliases: {address} does not exist, aliases list shows what does")
    alias = describe_alias(row)
    mailboxes = common.mailboxes_of(context, address, mailcloak.read_alias(*row[3:]))
    if context.options.json:
        common.print_json({**alias, "mailbox": ", ".join(mailboxes)})
        return
    for label, text in (
        ("alias", address),
        ("username", alias["username"]),
        ("mailbox", ", ".join(mailboxes)),
        ("enabled", common.yes_no(alias["enabled"])),
        ("may send", common.yes_no(not alias["receive_only"])),
        ("source", alias["source"] or "-"),
        ("updated at", common.shown_time(alias["updated_at"])),
    ):
        common.print_field(label, str(text))


# ---------------------------------------------------------------------------------------------------------------------------------
# What an app has: a last day, a token
# ---------------------------------------------------------------------------------------------------------------------------------


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
        raise common.Refused(f"{text!r} is not a date such as 2027-01-31, a number of days such as 90d, or never") from None
    if seconds <= time.time():
        raise common.Refused(f"{text} is in the past; apps disable takes an app out of use at once")
    return seconds


def check_token(token: str) -> str:
    """The token itself; raises Refused for one that cannot be typed, warns about one that can be guessed."""
    if not token or not token.isprintable():
        raise common.Refused("a token cannot be empty or hold control characters, --generate makes a good one")
    if len(token) < LEAST_TOKEN_CHARS:
        raise common.Refused(f"a token of {len(token)} characters is too short: use at least {LEAST_TOKEN_CHARS}, or --generate")
    if len(token) < SHORT_TOKEN_CHARS:
        common.say(f"warning: a token of {len(token)} characters can be guessed, --generate makes a strong one")
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
            raise common.Refused("the token on standard input is not UTF-8, --generate makes a good one") from None
    if options.token is not None:
        return check_token(options.token)
    if not sys.stdin.isatty():
        raise common.Refused("no token: name one, or use --generate or --token-stdin")
    import getpass

    try:
        token = getpass.getpass(f"token of {options.app_id}: ")
        again = getpass.getpass("again: ")
    except EOFError:
        raise common.Refused("no token: type it twice, or use --generate") from None
    if token != again:
        raise common.Refused("the two tokens differ, try again or use --generate")
    return check_token(token)


# ---------------------------------------------------------------------------------------------------------------------------------
# apps
# ---------------------------------------------------------------------------------------------------------------------------------


def apps_add(context: common.Context) -> None:
    """Make an app, or give one a new token; nothing is changed where it has this token already."""
    import secrets

    options, app_id = context.options, common.read_app_id(context.options.app_id)
    generated = secrets.token_urlsafe(GENERATED_TOKEN_BYTES) if options.generate else None
    token = generated or read_token(options)
    changes = read_app_changes(options)
    login = common.look_up(context, f"{app_id} was", lambda: common.ask_login(context, app_id))
    warn_of_owner(context, changes)
    database = context.database
    with common.transaction(database):
        alias = database.execute("SELECT alias_email FROM aliases WHERE lower(username) = ? LIMIT 1", (app_id,)).fetchone()
        if alias:
            raise common.Refused(
                f"apps: {app_id} is a username, the alias {alias['alias_email']} leads to it; choose another app id"
            )
        known = database.execute("SELECT * FROM apps WHERE app_id = ?", (app_id,)).fetchone()
        if not known and login and login["state"] != "missing" and not options.force:
            raise common.Refused(
                f"apps: {app_id} is a user in Keycloak, who could no longer log in; choose another app id, or use --force"
            )
        if known and generated and not options.replace:
            raise common.Refused(f"apps: {app_id} exists already, --replace gives it a new token in place of the old one")
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
        common.note_change(f"apps: {'token' if known else 'add'}", app_id)
    if generated:  # its answer was the token
        common.say(f"apps: {app_id} {texts[done]}")
    else:
        is_changed = done or any(before != now for before, now in changed.values())
        common.answer(context, [app_id] if is_changed else [], f"apps: {app_id} {texts[done]}")
    if known and not known["enabled"]:
        common.say(f"apps: {app_id} is disabled, apps enable {app_id} lets it in again")
    say_app_changes(app_id, changed)
    if not known:
        common.say(f"apps: it may not send yet, apps allow {app_id} ADDRESS lets it use an address")


def apps_set(context: common.Context) -> None:
    """Set owner or expiry of an app."""
    app_id, changes = common.read_app_id(context.options.app_id), read_app_changes(context.options)
    if not changes:
        raise common.Refused("apps set: nothing to set, name --owner, --expires or both")
    warn_of_owner(context, changes)
    with common.transaction(context.database):
        require_app(context, app_id)
        changed = change_app(context, app_id, changes)
    if context.options.json:
        common.answer(context, [app_id] if any(before != now for before, now in changed.values()) else [])
    say_app_changes(app_id, changed)


def read_app_changes(options: argparse.Namespace) -> dict[str, Any]:
    """The columns that --owner and --expires set, with their values; None takes a value away."""
    changes: dict[str, Any] = {}
    if options.owner is not None:
        changes["owner"] = common.read_username(options.owner) if options.owner else None
    if options.expires is not None:
        changes["expires_at"] = read_expiry(options.expires)
    return changes


def warn_of_owner(context: common.Context, changes: dict[str, Any]) -> None:
    """Say so where an app gets an owner who does not count; raises Refused for an e-mail, which never does."""
    owner = changes.get("owner")
    if owner:
        login = common.look_up(context, f"{owner} was", lambda: common.ask_login(context, owner))
        if login and login["username"] not in ("", owner):
            raise common.Refused(
                f"apps: {owner} is the e-mail of {login['username']}, and an owner is a username", f"--owner {login['username']}"
            )
        common.warn_of_login(owner, login)


def change_app(context: common.Context, app_id: str, changes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
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
            common.note_change("apps: set", app_id, **{column: "none" if now is None else now, "before": before})
        if column == "owner":
            common.say(
                f"apps: {app_id} counts only while {now} is enabled in Keycloak" if now else f"apps: {app_id} has no owner now"
            )
        else:
            common.say(f"apps: {app_id} expires at {common.shown_time(now)}" if now else f"apps: {app_id} does not expire now")


def show_token(options: argparse.Namespace, app_id: str, token: str) -> None:
    """Print a generated token; raises Refused where it cannot be printed, since it is never shown again."""
    if not options.has_output:
        raise common.Refused("the token cannot be shown: standard output is closed; nothing was changed, try again on a terminal")
    try:
        print(json.dumps({"app_id": app_id, "token": token}) if options.json else token, flush=True)
    except OSError as exc:
        common.drop_output()
        raise common.Refused(f"the token cannot be shown: {exc.strerror}; nothing was changed, try again on a terminal") from exc


def read_uses(context: common.Context) -> dict[str, Any]:
    """What the daemon of this host has noted of the uses of apps; where that cannot be read, {}, or Refused if --unused needs it."""
    path = mailcloak.last_used_path(context.path)
    try:
        return mailcloak.read_app_uses(path)
    except (OSError, ValueError, RecursionError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not what the daemon writes"
        remedy = "delete it, and the daemon begins a new one"
        if isinstance(exc, PermissionError):
            remedy = f"run mailcloakctl as {common.owner_name(path)} or as root"
        if isinstance(exc, FileNotFoundError):
            remedy = "the daemon makes it when it starts"
        if context.options.unused:
            raise common.Refused(f"apps: it is not known which are unused: {path}: {reason}", remedy) from exc
        if not isinstance(exc, FileNotFoundError):
            common.say(f"warning: it is not known when apps were last used: {path}: {reason}; {remedy}")
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


def apps_list(context: common.Context) -> None:
    """Print all apps and what they may send as, or those that are unused."""
    unused = context.options.unused
    days = None if unused is None else read_days(unused)
    if unused is not None and not days:
        raise common.Refused(f"{unused!r} is not a number of days such as 90d")
    selects = (
        "SELECT app_id, enabled, created_at, owner, expires_at FROM apps ORDER BY app_id",
        "SELECT app_id, from_addr FROM app_from WHERE enabled = 1 ORDER BY app_id, from_addr",
    )
    stored, senders = common.patiently(lambda: [context.database.execute(select).fetchall() for select in selects])
    rows, uses = [dict(row) for row in stored], read_uses(context)
    allowed: dict[str, list[str]] = {row["app_id"]: [] for row in rows}
    for row in senders:
        allowed.setdefault(row["app_id"], []).append(row["from_addr"])
    for entry in rows:
        entry["from_addr"] = allowed[entry["app_id"]]
        entry["state"] = common.shown_state(entry)
        entry["last_used"], entry["client"] = last_use(entry, uses)
    if days:
        limit, since = time.time() - days * 86400, uses["since"]
        if since > limit:
            common.say(f"warning: uses are noted since {common.shown_time(since)} only, apps without one are not listed yet")
        rows = [entry for entry in rows if is_unused(entry, since, limit)]
    columns: common.Columns = {
        "app_id": str,
        "state": str,
        "owner": lambda owner: owner or "-",
        "expires_at": lambda expires_at: "never" if expires_at is None else common.shown_time(expires_at),
        "created_at": common.shown_time,
        "last_used": common.shown_time,
        "client": lambda client: client or "-",
        "from_addr": lambda senders: ", ".join(map(str, map(common.shown_sender, senders))) or "(none: may not send)",
    }
    common.print_list(context.options, rows, columns)


def apps_allow(context: common.Context) -> None:
    """Let an app send as an address."""
    app_id, sender = common.read_app_id(context.options.app_id), common.read_sender(context.options.address)
    others = common.look_up(context, f"{sender} was", lambda: common.find_others(context, sender, ())) if sender else None
    with common.transaction(context.database):
        require_app(context, app_id)
        changed = context.database.execute(
            "INSERT INTO app_from (app_id, from_addr) VALUES (?, ?) ON CONFLICT (app_id, from_addr) DO UPDATE SET enabled = 1 WHERE enabled = 0",
            (app_id, sender),
        ).rowcount
    if changed:
        common.note_change("apps: allow", app_id, sender=common.shown_sender(sender))
        if others:
            common.say(f"warning: {sender} is the primary e-mail of {common.shorten(others)}")
    if sender:
        warn_of_domain(context, sender, "and the app may use it all the same")
    text = f"apps: {app_id} may {'now ' if changed else ''}send as {common.shown_sender(sender)}{'' if changed else ' already'}"
    common.answer(context, [app_id] if changed else [], text, sender=sender)


def apps_disallow(context: common.Context) -> None:
    """Take an address from an app."""
    app_id, sender = common.read_app_id(context.options.app_id), common.read_sender(context.options.address)
    with common.transaction(context.database):
        require_app(context, app_id)
        if not context.database.execute("DELETE FROM app_from WHERE app_id = ? AND from_addr = ?", (app_id, sender)).rowcount:
            raise common.Refused(
                f"apps: {app_id} was not allowed to send as {common.shown_sender(sender)}, apps list shows what it is allowed"
            )
    common.note_change("apps: disallow", app_id, sender=common.shown_sender(sender))
    common.answer(context, [app_id], f"apps: {app_id} may no longer send as {common.shown_sender(sender)}", sender=sender)


def require_app(context: common.Context, app_id: str) -> None:
    """Raise Refused where there is no such app."""
    if not context.database.execute("SELECT 1 FROM apps WHERE app_id = ?", (app_id,)).fetchone():
        raise common.Refused(f"apps: {app_id} does not exist, apps add {app_id} --generate makes it")


# ---------------------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------------------


def in_module(module: str, name: str) -> Callable[[common.Context], Optional[int]]:
    """A function of a module of its own, which is loaded when the command runs: no other command waits for it."""

    def run(context: common.Context) -> Optional[int]:
        code: Optional[int] = getattr(common.load(module, name), name)(context)
        return code

    return run


from_ask = functools.partial(in_module, "mailcloakask")
from_data = functools.partial(in_module, "mailcloakdata")
from_mirror = functools.partial(in_module, "mailcloakmirror")
DOCTOR_MODULES = ("mailcloakask", "mailcloakfindings", "mailcloakpostfix", "mailcloakdovecot", "mailcloakdoctor")


def run_doctor(context: common.Context) -> int:
    """Run the checks; where a file of theirs is missing or cut, they did not run."""
    try:
        for module in DOCTOR_MODULES:  # each after those that it needs itself, so that the right one is named
            doctor = common.load(module)
    except common.Refused as exc:
        common.say(f"mailcloakctl: doctor: {exc}")
        return common.EXIT_NOT_RUN
    code: int = doctor.run_doctor(context)
    return code


class Command(NamedTuple):
    """A verb of the command line: what does it, and what its help says."""

    run: Callable[[common.Context], Optional[int]]  # its exit code, None for 0
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
        "recipient": Command(
            from_ask("ask_recipient"), "say whether mail for an address comes in, and why", "info@example.org", ("address",)
        ),
        "sender": Command(
            from_ask("ask_sender"),
            "say whether a client may use a sender, and why",
            "info@example.org --user alice --method XOAUTH2",
            ("address",),
        ),
        "alias": Command(from_ask("ask_alias"), "say where an address leads, and why", "info@example.org", ("address",)),
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
            from_mirror("mirror"),
            "make the database equal to that of another host",
            "/var/lib/mailcloak-shared/shared.db --watch",
            ("source",),
        ),
        "promote": Command(from_mirror("promote"), "make this host, which follows another, the writer", "", ()),
    },
    "migrate-from-go": {
        "": Command(
            from_data("migrate_from_go"), "take over the data of the Go program", "/srv/old-mailcloak/state.db", ("file",), True
        )
    },
    "status": {"": Command(from_ask("show_status"), "show what the daemon has answered so far, and how it is", "--watch", ())},
    "doctor": {"": Command(run_doctor, "check the whole installation, and say what to do next", "", ())},
    "flush": {
        "": Command(from_ask("flush"), "have the daemon forget which users it has cached", "alice@example.org", ("[address]",))
    },
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
            if found[1] == "remove" and "del" in choices:
                near = f"; did you mean {' or '.join(repr(word) for word in ('del', 'remove-user') if word in choices)}?"
            message = f"unknown word {found[1]!r}{near}" if near else f"unknown word, expected one of {', '.join(choices)}"
        super().error(message)


def build_parser() -> ArgumentParser:
    """The parser of the whole command line, made of COMMANDS."""
    shared = ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)  # so that they stand before or after the verb
    place = shared.add_mutually_exclusive_group()
    place.add_argument(
        "--config", metavar="FILE", help=f"the daemon's configuration, {mailcloak.DEFAULT_CONFIG_PATH} if it is there"
    )
    place.add_argument("--db", metavar="FILE", help="the database itself")
    shared.add_argument("--json", action="store_true", help="JSON in place of text; of a list, one array of objects")
    parser = ArgumentParser(prog="mailcloakctl", description=(__doc__ or "").split("\n", 1)[0], parents=[shared])
    parser.add_argument("--version", action="version", version=f"mailcloakctl {mailcloak.__version__}")
    nouns = parser.add_subparsers(metavar="NOUN", dest="noun", required=True)
    for noun, verbs in COMMANDS.items():
        if "" in verbs:
            add_command(nouns, shared, noun, "", verbs[""])
            continue
        noun_parser = nouns.add_parser(noun, help=f"{', '.join(verbs)}", parents=[shared])
        verb_parsers = noun_parser.add_subparsers(metavar="VERB", dest="verb", required=True)
        for verb, command in verbs.items():
            add_command(verb_parsers, shared, noun, verb, command)
    return parser


def add_command(parsers: Any, shared: argparse.ArgumentParser, noun: str, verb: str, command: Command) -> None:
    """Add the parser of one command to those of its noun, or to the nouns."""
    example = " ".join(filter(None, (noun, verb, command.example)))
    epilog = f"example: mailcloakctl {example}"
    parser = parsers.add_parser(verb or noun, help=command.help, description=f"{command.help}.", epilog=epilog, parents=[shared])
    parser.set_defaults(noun=noun, verb=verb, parser=parser)
    if noun == "doctor":
        parser.usage_exit_code = common.EXIT_NOT_RUN  # 2 says that there are problems
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
            "--force", action="store_true", help="also an alias of an alias, another user's e-mail, a username in a foreign domain"
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
        form.add_argument(
            "--watch", action="store_true", help=f"again every {common.WATCH_SECONDS:.0f} seconds, in place, until Ctrl-C"
        )
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
        is_option = any(word.startswith("-") for word in rest)
        parser.error("an unknown option" if is_option else f"{common.counted(rest, 'word')} too many")
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


def run_command(options: argparse.Namespace) -> int:
    """Run the command that the options name; its exit code. An error of the database becomes a Refused."""
    command = COMMANDS[options.noun][options.verb]
    with contextlib.closing(common.Context(options, create=command.creates)) as context:
        try:
            exit_code = command.run(context)
        except mailcloak.SQLITE_ERRORS as exc:
            text = f"database {context.path!r}: {mailcloak.describe_sqlite(exc)}, nothing was changed"
            raise common.Refused(text, common.database_remedy(exc, context.path)) from exc
        sys.stdout.flush()
    return exit_code or common.EXIT_DONE


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command; returns its exit code."""
    mask, handlers = (
        signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        {number: signal.getsignal(number) for number in common.ENDING_SIGNALS},
    )
    options = argparse.Namespace(config=None, db=None, json=False, noun="")
    try:
        for number, handler in handlers.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler)
        return run(argv, options)
    except KeyboardInterrupt:
        for number in handlers:
            signal.signal(number, signal.SIG_DFL)
        common.say(f"mailcloakctl: interrupted{', no alias or app was changed' if options.noun in DATABASE_NOUNS else ''}")
        return common.EXIT_NOT_RUN if options.noun == "doctor" else common.EXIT_REFUSED
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
        top.usage_exit_code = common.EXIT_NOT_RUN
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
        common.say("mailcloakctl: the working directory is gone, change to another")
        return common.EXIT_NOT_RUN if options.noun == "doctor" else common.EXIT_REFUSED
    try:
        return run_command(options)
    except mailcloak.ConfigError as exc:
        for problem in exc.problems:
            common.say(str(problem))
        if options.noun in DATABASE_NOUNS:
            common.say(
                "mailcloakctl: the configuration names the database; fix it, name the database with --db, or run this as root"
            )
        else:
            remedy = "fix it, name another with --config, or run this as root"
            common.say(f"mailcloakctl: the configuration names the daemon's sockets; {remedy}")
    except common.Refused as exc:
        common.say(f"mailcloakctl: {exc}")
        return exc.exit_code
    except BrokenPipeError:  # the reader of our list has seen enough
        common.drop_output()
        return common.EXIT_DONE
    except OSError as exc:
        common.drop_output()
        common.say(f"mailcloakctl: the list cannot be written: {exc.strerror or exc}, send it elsewhere")
    return common.EXIT_REFUSED


if __name__ == "__main__":
    sys.exit(main())
