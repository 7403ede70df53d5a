# mailcloakdoctor: the checks of mailcloakctl doctor. MIT licence, see LICENSE.
"""Check a whole installation of mailcloak: what "mailcloakctl doctor" runs, and no other command loads.

A check changes nothing, and waits for nothing longer than mailcloakcommon.ANSWER_SECONDS. What it finds has one of four states:
  ok        looked at, and good
  skipped   could not be looked at, and why; with a remedy it counts as a warning, without one there is nothing to do about it
  warning   works, but not as it should, or not for long; exit code 1
  problem   mail is lost, refused or wrongly let through, or will be; exit code 2
Where the first check of a group is skipped or a problem, those of the group that need it do not run and are not listed.

The checks: what each looks at, and the remedy.
  config                  does the daemon accept the file? Fix what is named; mailcloak --check-config says when it is good
  config-mode             can others change it, the secret or the certificates, or read the secret? chmod, chown
  config-access           can the daemon's user read them at a reload? chgrp, chmod

  database                is it there, whole and of this schema? Start the daemon, which makes or migrates it; restore a backup
  database-mode           can strangers read, change or replace it? chmod
  database-room           has its disk 10 MB left? Make room
  database-access         can the daemon's user write it and its directory, and last-known.db there? chown, chmod
  database-journal        can Dovecot read it as an ordinary user: not in WAL mode? PRAGMA journal_mode = DELETE

  replication             with several mail hosts: is what was brought or published last new enough? Look on the host that it names

  daemon                  does it run, and is it of this version? Start it, restart it
  daemon-config           has it read the file that is there now? Reload it
  daemon-database         can it use the database, and is it this one? The findings about the database; reload it
  daemon-keycloak         does Keycloak answer the daemon? The findings about Keycloak
  socket-policy, socket-aliases   does the socket answer, with the owner and mode of the configuration? Restart the daemon

  keycloak                all of the following, where they are skipped or fail as a whole
  keycloak-token          does Keycloak give the client a token? URL, realm, client and secret of the configuration
  keycloak-clock          is Keycloak's clock that of this host? Set the clock
  keycloak-role           may the client see users, and do nothing more? Roles of its service account
  keycloak-email          may users change their own e-mail, and so take an address? share/doc/mailcloak/examples/keycloak/setup
  keycloak-users          can all users be read, and can the daemon use them? Correct the user in Keycloak
  keycloak-canary         is there a canary for each user federation, and is it there? keycloak.canary
  keycloak-cache-policy   is it noticed when a canary is gone: cache policy NO_CACHE? Keycloak, User federation

  postfix                 can postconf read main.cf? Name its folder with --postfix-config
  postfix-running         does it run? postfix start
  postfix-sockets         does main.cf ask the sockets of the configuration? Typing errors in one of the two
  postfix-access          can Postfix connect to mailcloak and Dovecot, from its chroot? socket_owner_user; start Dovecot
  postfix-smtpd           does each smtpd ask about each recipient and each sender? check_policy_service
  postfix-permit          does a permission stand before mailcloak in its list? Move check_policy_service to the front
  postfix-trial           is mailcloak behind warn_if_reject? Take it out after the trial
  postfix-default-action  is mail deferred while mailcloak does not answer? default_action
  postfix-timeout         does Postfix wait longer for mailcloak than mailcloak for Keycloak? timeout=30s
  postfix-aliases         does cleanup ask for aliases, directly and by the right name? virtual_alias_maps
  postfix-domains         does Postfix take mail for policy.domain, and not for unchecked domains? virtual_mailbox_domains
  postfix-delivery        does what it takes reach a mailbox, and has master.cf what delivers? virtual_transport, mailbox_transport, transport_maps
  postfix-recipients      does a list of its own refuse users? virtual_mailbox_maps, local_recipient_maps
  postfix-relay           does each smtpd take mail for us, and relay for nobody else? smtpd_relay_restrictions, mynetworks
  postfix-login           can users and apps log in, by Dovecot? smtpd_sasl_auth_enable, smtpd_sasl_type
  postfix-certificate     have its smtpds a certificate with its key, that has not ended? smtpd_tls_cert_file
  postfix-sendmail        is mail by sendmail(1), which meets no smtpd, checked as well? pickup in share/doc/mailcloak/examples/postfix/master.cf
  postfix-delimiter       is recipient_delimiter the same in Postfix and mailcloak? policy.recipient_delimiter
  postfix-rewriting       does Postfix rewrite addresses after mailcloak was asked? Its defaults in main.cf
  postfix-settings        does main.cf set what Postfix does not know, or one thing twice? Typing errors, one line of each

  dovecot-mechanisms      do users log in with a token, apps with a password, and nobody otherwise? auth_mechanisms
  dovecot-logins          is each login asked for, under its whole name? auth_cache_size, auth_username_format
  dovecot-realm           does Dovecot take tokens of the realm that the daemon asks? introspection_url
  dovecot-trust           does Dovecot trust Keycloak's certificate? tls_ca_cert_file, in 2.4 ssl_client_ca_file
  dovecot-certificate     has Dovecot a certificate with its key, that has not ended? ssl_cert, in 2.4 ssl_server_cert_file
  dovecot-mailboxes       are the user and group there to which the mailboxes belong? useradd
  dovecot-delimiter       is recipient_delimiter the same in Dovecot and mailcloak? recipient_delimiter
  dovecot-names           is the mailbox to which a user's mail is delivered the one that the user reads? auth_username_format
  dovecot                 can Dovecot read its configuration, and SQLite, and does it look for apps in this database? The examples
  dovecot-query           does its query let apps in only while they are enabled, and only to send? The query of the examples
  dovecot-access          can the process that asks the database read it? extra_groups, chmod

  postmaster, abuse       does a user receive mail for them, in each domain (RFC 5321, RFC 2142)? aliases add
  aliases, users, apps    is anything wrong with one of them? Else they are ok, or skipped:
  alias-spelling          is each alias stored in the form in which it is looked up? db check --fix
  alias-domain            is each alias in policy.domain? policy.domain, aliases del
  alias-chain             does the mailbox of an alias lead on to another user? aliases add --replace, policy.mailbox_domain
  alias-user-missing, alias-user-disabled   is its user there, and enabled? aliases add --replace
  alias-shadow            does an alias take the mail of a user with this primary e-mail? aliases del
  primary-shared          have several users the same e-mail? Change it in Keycloak
  login-ambiguous         is the username of one user the e-mail of another? Rename the user in Keycloak
  primary-name, mailbox-name                does a user's e-mail lead to another mailbox than theirs? policy.mailbox_domain
  username-ascii          is the name of a mailbox outside ASCII, with policy.mailbox_domain? Rename the user in Keycloak
  username-delimiter      does a username hold a character of recipient_delimiter? Rename the user in Keycloak
  app-expired             has an enabled app expired? apps set --expires
  app-name                has an app the name of a user? apps add under another name
  app-owner-missing, app-owner-disabled     is its owner there, and enabled? apps set --owner
  doctor                  did a check itself fail? Report it; the others run in any case

The checks of Postfix are in mailcloakpostfix.py, those of Dovecot in mailcloakdovecot.py, and what all checks share in
mailcloakfindings.py.

Contents: the run of the checks, and what is printed of it; configuration, database, daemon, sockets; Keycloak; Postfix and Dovecot;
addresses, users, apps.
"""

from __future__ import annotations

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import functools
import grp
import json
import os
import pwd
import re
import shlex
import sqlite3
import stat
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, Optional

import mailcloak
import mailcloakask
import mailcloakcommon as common
import mailcloakdovecot
import mailcloakowner
import mailcloakpostfix
from mailcloakfindings import (
    AS_ROOT,
    EXAMPLES,
    FIX_CONFIG,
    NO_CONFIG,
    NO_DATABASE,
    NO_USERS,
    SEE_FINDINGS,
    Finding,
    Findings,
    Installation,
    about,
    access_remedy,
    grouped,
    ok,
    problem,
    skipped,
    try_as,
    warning,
    why_not,
)

# ---------------------------------------------------------------------------------------------------------------------------------
# The run of the checks, and what is printed of it
# ---------------------------------------------------------------------------------------------------------------------------------

Check = Callable[[Installation], Findings]
CHECKS: list[Check] = []  # as they stand below: a check comes after those it needs, so the first problem is solved first


def listed(check: Check) -> Check:
    """Put a check into the list of those that run."""
    CHECKS.append(check)
    return check


def run_checks(options: argparse.Namespace) -> Findings:
    """What every check finds, as it comes."""
    host = Installation(options)
    for check in CHECKS:
        yield from run_check(check, host)


def run_check(check: Check, host: Installation) -> Findings:
    """The findings of a check; a fault of the check itself is one more, and the next ones run."""
    try:
        yield from check(host)
    except Exception as exc:
        where = mailcloak.describe_exception(exc)
        yield problem("doctor", f"{check.__name__} failed: {where}", "report this line; the other checks are not affected")


# Of a finding, each with its colour, the worst last.
STATES = {"ok": common.GREEN, "skipped": common.YELLOW, "warning": common.YELLOW, "problem": common.RED}


def run_doctor(context: common.Context) -> int:
    """Print what the checks find, and what to do next; 0 all is well, 1 there are warnings, 2 there are problems, 3 it could not run.

    A reader who goes away changes neither the checks nor the code.
    """
    findings: list[Finding] = []
    errors: list[Optional[OSError]] = []
    try:
        for finding in run_checks(context.options):
            common.show_progress("")
            findings.append(finding)
            if not context.options.json:
                errors.append(common.try_to_print(functools.partial(print_finding, finding)))
        common.show_progress("")
        if context.options.json:
            rows = [{**finding._asdict(), "items": list(finding.items)} for finding in findings]
            errors.append(common.try_to_print(functools.partial(common.print_json, rows)))
        else:
            errors.append(common.try_to_print(functools.partial(print_summary, findings)))
    except KeyboardInterrupt:
        common.say("mailcloakctl: doctor: interrupted, not all was checked")
        return common.EXIT_NOT_RUN
    for error in errors:
        if error and not isinstance(error, BrokenPipeError):
            common.say(f"mailcloakctl: doctor: the findings could not be printed: {error.strerror or error}, send them elsewhere")
            return common.EXIT_NOT_RUN
    states = {finding.state for finding in findings if finding.remedy}
    return 2 if "problem" in states else 1 if states else 0


def print_finding(finding: Finding) -> None:
    """One finding as a row of the table, its remedy below."""
    width = common.terminal_width()
    first, *rest = common.hang(f"{finding.state:<8} {finding.check:<22} ", finding.text, width)
    rest += common.hang(" " * 32 + "-> ", finding.remedy, width) if finding.remedy else []
    print("\n".join([common.paint(first[:8], STATES[finding.state]) + first[8:].rstrip(), *rest]))


def print_summary(findings: Sequence[Finding]) -> None:
    """How many findings there are of each state, and the remedy to begin with; not one that begins with SEE_FINDINGS, if possible."""
    counts = collections.Counter(finding.state for finding in findings)
    plural = {state: "s" if counts[state] > 1 and state in ("warning", "problem") else "" for state in STATES}
    totals = ", ".join(f"{counts[state]} {state}{plural[state]}" for state in reversed(STATES) if counts[state])
    print("\n" + common.paint(totals, common.BOLD))
    wrong = [finding for finding in findings if finding.remedy]
    first = min(wrong, key=lambda finding: (finding.state != "problem", finding.remedy.startswith(SEE_FINDINGS)), default=None)
    if first:
        common.print_field("next", f"{first.check}: {first.remedy}; then mailcloakctl doctor again")
    else:
        common.print_field("next", "nothing; mailcloakctl ask recipient ADDRESS shows what becomes of mail for an address")


# ---------------------------------------------------------------------------------------------------------------------------------
# Configuration, database, daemon, sockets
# ---------------------------------------------------------------------------------------------------------------------------------


NEEDED_BYTES = 10 * 1024 * 1024  # that the disk of the database should have left
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@listed
def check_config(host: Installation) -> Findings:
    """The file as the daemon reads it."""
    path = host.config_path
    try:
        config = mailcloak.load_config(path)
    except mailcloak.ConfigError as exc:
        for each in exc.problems:
            remedy = each.remedy or "fix it; mailcloak --check-config says when it is good"
            if each.kind == "unreadable" and not os.path.exists(path):
                remedy = "make it of config.yaml.sample, which make install puts into /etc/mailcloak; or name another with --config"
            elif each.kind == "unreadable" and os.geteuid() != 0:
                yield skipped("config", f"{each.key}: {each.text}", AS_ROOT)
                continue
            yield problem("config", f"{each.key}: {each.text}", remedy)
        return
    yield ok("config", f"{path} is good")
    is_local = config.keycloak is not None and urllib.parse.urlsplit(config.keycloak.base_url).hostname in LOOPBACK
    for each in config.warnings:
        # config-mode says more of the secret, and a Keycloak on this very host needs no https
        if each.kind != "secret-exposed" and not (each.kind == "plain-http" and is_local):
            yield warning("config", f"{each.key}: {each.text}", each.remedy or "change it in the configuration")


@listed
def check_config_files(host: Installation) -> Findings:
    """Who may read and change the configuration, the secret and the certificates."""
    keycloak = host.keycloak
    secret_file = (keycloak.client_secret_file or host.config_path) if keycloak else ""
    found: list[Finding] = []
    for path in dict.fromkeys(filter(None, (host.config_path, secret_file, keycloak.ca_file if keycloak else ""))):
        try:
            mode = os.stat(path).st_mode
        except OSError as exc:
            found.append(skipped("config-mode", f"{path}: {exc.strerror}", AS_ROOT if isinstance(exc, PermissionError) else ""))
            continue
        if mode & 0o022:
            remedy = f"chmod go-w {shlex.quote(path)}"
            found.append(problem("config-mode", f"{path} can be changed by others than its owner", remedy))
        found += check_owner(host, path)
        found += check_directory(os.path.dirname(path), 0o022, "config-mode", path)
        if path == secret_file and mode & 0o004:
            text = f"{path} holds the client secret, and every user of this host can read it"
            remedy = f"chmod o-r {shlex.quote(path)}, and make a new secret in Keycloak if others have had an account here"
            found.append(problem("config-mode", text, remedy))
        remedy = f"chgrp {host.daemon_group} {{path}}; chmod g+{{bit}} {{path}}"
        failure = warning("config-access", "a reload will fail: ", remedy)
        found += check_daemon_access(host, functools.partial(why_not, path, os.R_OK), failure)
    if not keycloak and host.static_users is None:
        found.append(skipped("config-mode", f"which file holds the client secret is not known: {NO_CONFIG}"))
    yield from dict.fromkeys(found) or [ok("config-mode", "only its owner changes it, and no stranger reads the secret")]


def check_daemon_access(host: Installation, work: Callable[[], str], failure: Finding) -> list[Finding]:
    """The failure, with why the user that the daemon becomes may not do the work behind its text; nothing where it may.

    The remedy of failure is the argument otherwise of access_remedy().
    """
    if host.daemon is None:
        return [skipped(failure.check, f"the user that the daemon becomes is not known: {NO_CONFIG}")]
    user = host.daemon.user
    why, found = try_as(user, work, failure.check, "may the daemon use it?") if user else ("", [])
    if not why:
        return found
    remedy = access_remedy(why, user, failure.remedy)
    return [failure._replace(text=f"{failure.text}user {user}, which the daemon becomes, {why}", remedy=remedy)]


def check_owner(host: Installation, path: str) -> list[Finding]:
    """A finding where the owner is not root, not the daemon's user and not the user who asks."""
    uid = os.stat(path).st_uid
    trusted = [0, os.geteuid()]
    with contextlib.suppress(KeyError):  # there is no such user; config-access reports it
        trusted.append(pwd.getpwnam((host.daemon.user if host.daemon else "") or "root").pw_uid)
    text = f"{path} belongs to {common.owner_name(path)}, who can change it"
    return [] if uid in trusted else [problem("config-mode", text, f"chown root {shlex.quote(path)}")]


def check_directory(directory: str, bits: int, check: str, path: str) -> list[Finding]:
    """A finding where others, by these bits of its mode, may put another file in place of the path."""
    mode = os.stat(directory).st_mode
    if not mode & bits or mode & stat.S_ISVTX:
        return []
    remedy = f"chmod {'o' if bits == 0o002 else 'go'}-w {shlex.quote(directory)}"
    return [problem(check, f"others may put another file in place of {path}, since they can write {directory}", remedy)]


@listed
def check_database(host: Installation) -> Findings:
    """The file, opened as the programs open it, and read whole; what the daemon may do with it."""
    path = host.database_path
    if not path:
        yield skipped("database", f"which file it is is not known: {NO_CONFIG}", FIX_CONFIG)
        return
    try:
        status = os.stat(path)
    except FileNotFoundError:
        remedy = "on a new host start the daemon, which makes it; else name the right one in sqlite.path"
        if os.path.exists(mailcloak.last_known_path(path)):  # a daemon has run on one
            remedy = "restore it from a backup, or name the right one in sqlite.path; a daemon that runs needs no restart"
        yield problem("database", f"{path} does not exist", remedy)
        return
    except OSError as exc:
        make, remedy = (skipped, AS_ROOT) if isinstance(exc, PermissionError) else (problem, "correct the path in sqlite.path")
        yield make("database", f"{path}: {exc.strerror}", remedy)
        return
    try:
        with contextlib.closing(mailcloakowner.connect(path, common.ANSWER_SECONDS)) as database:
            yield from read_database(host, database)
    except mailcloak.SQLITE_ERRORS as exc:
        if os.geteuid() != 0 and not os.access(path, os.R_OK | os.W_OK):
            yield skipped("database", f"this user may not use {path}", AS_ROOT)
        else:
            yield problem("database", f"{path}: {mailcloak.describe_sqlite(exc)}", common.database_remedy(exc, path))
    if os.path.islink(path):
        yield warning("database-mode", f"who may use the file that {path} leads to was not looked at", common.LINK_REMEDY)
        return
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
    failure = problem("database-access", "", f"chown -h {host.daemon.user if host.daemon else ''}: {{path}}")
    yield from check_daemon_access(host, lambda: why_not(path, mode) or why_not(directory, mode), failure)
    yield from check_saved_users(mailcloak.last_known_path(path), host.daemon.user if host.daemon else "")


def check_saved_users(path: str, user: str) -> Findings:
    """Does last-known.db belong to the user that the daemon becomes? Only the owner may set its mode."""
    with contextlib.suppress(OSError, KeyError):  # no such file or user, or not to be seen from here
        if os.stat(path).st_uid != pwd.getpwnam(user).pw_uid:
            text = f"{path} does not belong to user {user}, which the daemon becomes, so a restart in an outage knows no users"
            yield problem("database-access", text, f"chown {user}: {shlex.quote(os.path.realpath(path))}")


@listed
def check_replication(host: Installation) -> Findings:
    """The age of what the writer has published, or of what has come from it; nothing where there is one mail host alone."""
    found = common.read_replication(host.database_path, host.max_lag_seconds) if host.database_path else None
    if not found or found["role"] == "single":
        yield from check_unused_copy(host, is_readable=found is not None)
        return
    text = common.describe_replication(found)
    if found["late"]:
        limit = f"replication.max_lag_seconds is {host.max_lag_seconds:g}"
        yield warning("replication", f"{text}; {limit}", common.LATE_REMEDIES[found["role"]])
    else:
        yield ok("replication", text)


def check_unused_copy(host: Installation, *, is_readable: bool) -> Findings:
    """Where a copy of another host's rows is there, in the place of the example units, though the database does not follow it."""
    if not host.database_path or not os.path.exists(f"{os.path.dirname(host.database_path)}-shared/shared.db"):
        return
    if is_readable:
        remedy = "the log of mailcloak-mirror or mailcloak-publish says why; README, Several mail hosts"
        yield warning("replication", "shared.db is there, but this database neither follows another host nor is published", remedy)
    else:
        remedy = (
            "on a follower no backup: start mailcloak-mirror, which makes it again if it is missing; move a damaged one away first"
        )
        yield warning("replication", "shared.db is there, but the database of this host cannot be read", remedy)


def read_database(host: Installation, database: sqlite3.Connection) -> Findings:
    """Schema, aliases and apps, damage, and the kind of its journal."""
    path = host.database_path
    if os.stat(path).st_size == 0:
        yield problem("database", f"{path} is empty", "restore it from a backup; a daemon that runs needs no restart")
        return
    database.execute("PRAGMA query_only = ON")
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version > mailcloak.SCHEMA_VERSION:
        remedy = "install the newer mailcloak again, or restore the older database"
        yield problem("database", f"{path} has schema version {version}, this mailcloak knows {mailcloak.SCHEMA_VERSION}", remedy)
        return
    if version < mailcloak.SCHEMA_VERSION:
        remedy = "restart the daemon: it migrates the file, and leaves a copy of it as it was"
        yield warning("database", f"{path} has schema version {version}, older than {mailcloak.SCHEMA_VERSION}", remedy)
    columns = mailcloak.ALIAS_COLUMNS if version == mailcloak.SCHEMA_VERSION else "'0' || username, enabled, 0"
    rows = database.execute(f"SELECT alias_email, {columns} FROM aliases ORDER BY alias_email")  # noqa: S608
    host.aliases = {str(address): mailcloak.read_alias(*values) for address, *values in rows}
    database.row_factory = sqlite3.Row
    apps = [{"owner": None, "expires_at": None, **row} for row in database.execute("SELECT * FROM apps ORDER BY app_id")]
    database.row_factory = None
    host.apps = {str(row["app_id"]): mailcloak.App(common.shown_state(row), False, str(row["owner"] or "").lower()) for row in apps}
    damage = list(check_damage(path, database))
    yield from damage
    if version == mailcloak.SCHEMA_VERSION and not any(finding.state == "problem" for finding in damage):
        yield ok(
            "database", f"{path} has {common.counted(host.aliases, 'alias', 'aliases')} and {common.counted(host.apps, 'app')}"
        )
    if database.execute("PRAGMA journal_mode").fetchone()[0] == "wal":
        text = f"{path} is in WAL mode: Dovecot cannot read it as an ordinary user while no other program has it open"
        remedy = f"stop the daemon, then sqlite3 {shlex.quote(path)} 'PRAGMA journal_mode = DELETE'; Dovecot 2.4 needs sqlite_readonly = yes, or it brings WAL back"
        yield warning("database-journal", text, remedy)
    else:
        yield ok("database-journal", "a rollback journal, which everybody who may read the file can use")


def check_damage(path: str, database: sqlite3.Connection) -> Findings:
    """Search the whole file for damage, as far as there is time."""
    deadline = time.monotonic() + common.ANSWER_SECONDS
    database.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
    try:
        damage = str(database.execute("PRAGMA quick_check(1)").fetchone()[0])
        if damage != "ok":
            yield problem("database", f"{path} is damaged: {damage}", "restore it from a backup")
    except sqlite3.OperationalError as exc:
        yield skipped("database", f"{path} was not searched for damage to its end, within {common.ANSWER_SECONDS:.0f} s: {exc}")
    finally:
        database.set_progress_handler(None, 0)


@listed
def check_daemon(host: Installation) -> Findings:
    """Is it running, is it this version, and does it work with what is on the disk now?"""
    if host.sockets is None:
        yield skipped("daemon", "the configuration does not say where its sockets are", FIX_CONFIG)
        return
    daemon = mailcloakask.RunningDaemon(host.sockets, common.ANSWER_SECONDS, mailcloakask.where_log(host.daemon))
    try:
        yield from daemon.ask_json("stats", "*", lambda stats: list(check_stats(host, stats)))
    except mailcloakask.OtherVersion as exc:
        yield warning("daemon", exc.text, "restart the daemon")
    except common.Refused as exc:
        yield no_answer("daemon", exc)


def check_stats(host: Installation, stats: dict[str, Any]) -> Findings:
    """What the daemon says of itself."""
    yield ok(
        "daemon", f"it runs: version {stats['version']}, pid {stats['pid']}, up {common.shown_seconds(stats['uptime_seconds'])}"
    )
    yield from check_read_config(host, stats)
    used = stats["database"]
    if not used["works"]:
        remedy = f"{SEE_FINDINGS} about the database, and at its log ({mailcloakask.where_log(host.daemon)})"
        yield problem("daemon-database", "the daemon cannot use the database", remedy)
    elif host.database_path and used["path"] != host.database_path:
        if os.path.lexists(host.database_path):
            yield warning("daemon-database", f"the daemon uses {used['path']}", f"restart it, so that it uses {host.database_path}")
        else:
            text = f"the daemon uses {used['path']}; a restart begins an empty {host.database_path}, and refuses the mail of all aliases"
            yield problem("daemon-database", text, f"{mailcloak.MOVE_DATABASE}; or correct sqlite.path")
    keycloak = stats["keycloak"]
    if keycloak and keycloak["state"] == "away":
        text = f"for the daemon Keycloak is {mailcloakask.describe_keycloak(keycloak)[0]}"
        yield problem("daemon-keycloak", text, f"{SEE_FINDINGS} about Keycloak")


def no_answer(check: str, exc: common.Refused) -> Finding:
    """Why the daemon did not answer; where this user may not ask, nothing was looked at."""
    return skipped(check, exc.text, AS_ROOT) if isinstance(exc.__cause__, PermissionError) else problem(check, exc.text, exc.remedy)


def check_read_config(host: Installation, stats: dict[str, Any]) -> Findings:
    """Did the daemon read the file that is there now?"""
    path, reload = host.config_path, stats["last_reload"]
    if os.path.realpath(stats["config"]) != os.path.realpath(path):
        remedy = "name that file with --config, or restart the daemon"
        yield warning("daemon-config", f"the daemon reads {stats['config']}, not {path}", remedy)
        return
    if reload and not reload["ok"]:
        text = f"the reload of {common.shown_time(reload['at'])} was refused, the configuration of before is in force"
        yield problem("daemon-config", text, "fix the configuration, and reload the daemon")
        return
    try:
        changed_at = os.stat(path).st_mtime
    except OSError as exc:
        yield skipped("daemon-config", f"{path}: {exc.strerror}", AS_ROOT if isinstance(exc, PermissionError) else "")
        return
    if changed_at > (reload["at"] if reload else stats["started_at"]):
        text = f"{path} was changed at {common.shown_time(changed_at)}, after the daemon read it"
        remedy = "reload the daemon (rc-service mailcloak reload, systemctl reload mailcloak); sockets and daemon need a restart"
        yield warning("daemon-config", text, remedy)
    else:
        yield ok("daemon-config", "the daemon has read the configuration as it is now")


@listed
def check_sockets(host: Installation) -> Findings:
    """Both sockets: who owns them, and whether they answer."""
    if host.sockets is None:
        yield skipped("socket-policy", NO_CONFIG)
        yield skipped("socket-aliases", NO_CONFIG)
        return
    daemon = mailcloakask.RunningDaemon(host.sockets, common.ANSWER_SECONDS, mailcloakask.where_log(host.daemon))
    for check, path in (("socket-policy", host.sockets.policy_socket), ("socket-aliases", host.sockets.socketmap_socket)):
        try:
            status = os.lstat(path)
        except OSError as exc:
            text, remedy = f"{path}: {exc.strerror}", "start the daemon, which makes it; restart one that runs"
            if not os.path.isdir(os.path.dirname(path)):
                remedy = "its directory is missing: start Postfix, which makes its own, or correct the path; then start the daemon"
            yield skipped(check, text, AS_ROOT) if isinstance(exc, PermissionError) else problem(check, text, remedy)
            continue
        if not stat.S_ISSOCK(status.st_mode):
            yield problem(check, f"{path} is not a socket", "move it away, and restart the daemon")
            continue
        try:
            is_policy = check == "socket-policy"
            answer = daemon.ask_policy(protocol_state="CONNECT") if is_policy else daemon.ask_map("alias", "no-domain")[0]
        except common.Refused as exc:
            yield no_answer(check, exc)
            continue
        if answer not in ("DUNNO", "NOTFOUND"):
            yield problem(check, f"{path} answers {answer!r} where it should have no objection", "restart the daemon")
        elif stat.S_IMODE(status.st_mode) != host.sockets.socket_mode or not has_owner(status, host.sockets):
            remedy = "restart the daemon; where a service manager makes the sockets, set owner, group and mode there"
            yield warning(check, f"{path} has another owner or mode than sockets of the configuration says", remedy)
        else:
            yield ok(check, f"{path} answers")


def has_owner(status: os.stat_result, sockets: mailcloak.SocketsConfig) -> bool:
    """Does the socket belong to the user and the group that the configuration names?"""
    user, group = sockets.socket_owner_user, sockets.socket_owner_group  # which are there, else the block would not be good
    has_user = not user or pwd.getpwnam(user).pw_uid == status.st_uid
    return has_user and (not group or grp.getgrnam(group).gr_gid == status.st_gid)


# ---------------------------------------------------------------------------------------------------------------------------------
# Keycloak
# Asked directly, with a session and a token of our own: so it shows whether Keycloak or the daemon is at fault.
# ---------------------------------------------------------------------------------------------------------------------------------

PAGE_USERS = 500  # of one request; a brief record is about 500 bytes, and an answer may have a megabyte
MAX_USERS = 20_000  # that are read; some 40 requests
MAX_SINGLE_LOOKUPS = 200  # of users that aliases and apps name, where there are more users than MAX_USERS
MAX_CLOCK_SECONDS = 60.0  # by which two clocks may differ
MAX_TIME = 2**40  # in seconds since 1970; what is beyond is no time
NEEDED_ROLES = {"view-users", "query-users", "query-groups"}  # the last two are part of the first
READING_ROLES = NEEDED_ROLES | {"view-realm"}  # with which doctor can also read the cache policy of a federation
NONSENSE = (ValueError, RecursionError, LookupError, TypeError, AttributeError)  # raised for JSON that is none, or has another form


class Federation(NamedTuple):
    """What the checks look at in a user federation of Keycloak."""

    id: str
    name: str
    cache_policy: str


class KeycloakReader:
    """Requests to Keycloak, each given up after common.ANSWER_SECONDS. Raises DirectoryUnavailable."""

    def __init__(self, config: mailcloak.KeycloakConfig) -> None:
        self.config = config
        self.api = mailcloak.KeycloakApi(config)
        self._session = mailcloak.new_session(config.ca_file)
        self._admin_url = f"{config.base_url}/admin/realms/{urllib.parse.quote(config.realm, safe='')}"

    def ask(self, work: Callable[..., common.Result], *arguments: Any, **query: str) -> common.Result:
        """What a method of the api returns or raises. Name resolution, which knows no deadline, is left behind in its thread."""
        outcome: concurrent.futures.Future[common.Result] = concurrent.futures.Future()

        def run() -> None:
            try:
                outcome.set_result(work(self._session, time.monotonic() + common.ANSWER_SECONDS, *arguments, **query))
            except BaseException as exc:
                outcome.set_exception(exc)

        threading.Thread(target=run, daemon=True).start()
        try:
            return outcome.result(common.ANSWER_SECONDS + 1)
        except concurrent.futures.TimeoutError:
            raise mailcloak.DirectoryUnavailable(self.api.failure(f"no answer within {common.ANSWER_SECONDS + 1:.0f} s")) from None

    def find(self, **query: str) -> list[dict[str, Any]]:
        """The records of the users with exactly this username or e-mail."""
        query.update(exact="true", briefRepresentation="true", max=str(mailcloak.MAX_DIRECTORY_MATCHES))
        return self.ask(self.api.get_users, **query)

    def federations(self) -> Optional[list[Federation]]:
        """Those that are turned on; None where this client may not see them, or the answer makes no sense. Source: GET .../components."""
        url, query = f"{self._admin_url}/components", {"type": "org.keycloak.storage.UserStorageProvider"}
        status, body = self.ask(self.api.get, url, query)
        if status != 200:
            return None
        try:
            return [
                Federation(str(each["id"]), clip(each["name"]), clip((config.get("cachePolicy") or ["DEFAULT"])[0]))
                for each in json.loads(body)
                if (config := each.get("config", {})).get("enabled") != ["false"]
            ]
        except NONSENSE:
            return None


def clip(name: Any) -> str:
    """A name for a finding, though Keycloak may give it any length."""
    return str(name)[: mailcloak.MAX_NAME_CHARS]


@listed
def check_keycloak(host: Installation) -> Findings:
    """Token, role, clock, who may change an e-mail, canaries, and the users themselves."""
    if host.static_users is not None:
        pairs = host.static_users.items()
        host.users = {name: mailcloak.User(name, mailcloak.normalise_address(text).text, True) for name, text in pairs}
        yield ok("keycloak", f"{common.counted(host.users, 'user')} of static_users of the configuration take its place")
        return
    if host.keycloak is None:
        yield skipped("keycloak", NO_CONFIG, FIX_CONFIG)
        return
    check = "keycloak-token"
    try:
        reader = KeycloakReader(host.keycloak)
        common.show_progress("asking Keycloak for a token ...")
        claims = read_claims(reader.ask(reader.api.access_token).text)
        who = f"{host.keycloak.base_url}, realm {host.keycloak.realm}, gives client {host.keycloak.client_id} a token"
        yield ok("keycloak-token", who)
        yield from check_clock(claims)
        check = "keycloak-role"
        sees_users = bool(reader.ask(reader.api.get_users, max="1"))
        yield from check_roles(reader, find_roles(claims), sees_users)
        if not sees_users:
            return
        check = "keycloak"
        yield from check_email_edit(reader)
        yield from list_users(host, reader)
        yield from check_canaries(host, reader)
    except (mailcloak.DirectoryMisconfigured, mailcloak.StartError) as exc:
        yield problem(check, exc.text, exc.remedy)
    except mailcloak.DirectoryUnavailable as exc:
        remedy = exc.remedy or "look whether Keycloak runs, and whether keycloak.base_url can be reached from this host"
        if check == "keycloak":  # it has answered until now
            remedy = "run mailcloakctl doctor again; if it is so again, look at Keycloak's log"
        yield problem(check, exc.text, remedy)


def read_claims(token: str) -> dict[str, Any]:
    """What a token of Keycloak says; nothing where it cannot be read. Source: RFC 7519, section 3."""
    try:
        return dict(json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "===")))
    except NONSENSE:
        return {}


def find_roles(claims: Mapping[str, Any]) -> Optional[set[str]]:
    """The roles in realm-management that a token names; None where it names none."""
    try:
        roles = claims["resource_access"]["realm-management"]["roles"]
        return {role for role in roles if re.fullmatch(r"[a-z-]{1,60}", role)}
    except (LookupError, TypeError):
        return None


def check_roles(reader: KeycloakReader, roles: Optional[set[str]], sees_users: bool) -> Findings:
    """May the client see users, and nothing more?"""
    remedy = f"client {reader.config.client_id}, page Service accounts roles: the role view-users of realm-management, and no other"
    if not sees_users:
        yield problem("keycloak-role", "the token is good, but shows no user at all (query-users is not enough)", remedy)
    elif roles is None:
        yield skipped("keycloak-role", "the client sees users; may it do more? Its token does not name its roles")
    else:
        more = warning("keycloak-role", "the client may do more than see users", remedy)
        yield from about(sorted(roles - READING_ROLES), more) or [ok("keycloak-role", "the client sees users, and may do no more")]


def check_clock(claims: Mapping[str, Any]) -> Findings:
    """Do Keycloak and this host agree what time it is? By the time at which a token was made just now (iat in RFC 7519)."""
    made_at = claims.get("iat")
    ahead = made_at - time.time() if isinstance(made_at, (int, float)) and 0 <= made_at <= MAX_TIME else None
    if ahead is None:
        yield skipped("keycloak-clock", "is Keycloak's clock that of this host? Its token does not say when it was made")
    elif abs(ahead) > MAX_CLOCK_SECONDS:
        lead = f"{common.shown_seconds(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'}"
        text = f"Keycloak's clock is {lead} this host's, so tokens and apps may count too long or not long enough"
        yield warning("keycloak-clock", text, "set the clock that is wrong: timedatectl, chronyc tracking")
    else:
        yield ok("keycloak-clock", "the clocks of Keycloak and of this host agree")


def check_email_edit(reader: KeycloakReader) -> Findings:
    """Can a user take over an address by changing their e-mail?"""
    if reader.config.require_verified_email:
        yield ok("keycloak-email", "an e-mail counts only when Keycloak has verified it (require_verified_email)")
        return
    may_edit = reader.ask(reader.api.users_may_edit_email)
    if may_edit is None:
        yield skipped("keycloak-email", "may users change their own e-mail? The user profile of the realm cannot be read")
    elif may_edit:
        remedy = (
            f"{EXAMPLES}/keycloak/setup email-by-administrators; or setup verify-email, with keycloak.require_verified_email: true"
        )
        yield problem("keycloak-email", "users may change their own e-mail and so take over any address that is free", remedy)
    else:
        yield ok("keycloak-email", "only administrators change a user's e-mail")


def list_users(host: Installation, reader: KeycloakReader) -> Findings:
    """Read the users page by page; where there are more than MAX_USERS, also those that aliases and apps name."""
    users: dict[str, mailcloak.User] = {}
    read, is_whole = 0, False
    while read < MAX_USERS:
        records = reader.ask(reader.api.get_users, first=str(read), max=str(PAGE_USERS), briefRepresentation="true")
        known = len(users)
        users.update(understand(host, reader, records))
        read += len(records)
        common.show_progress(f"{read} users of Keycloak read ...")
        is_whole = len(records) < PAGE_USERS
        if is_whole or len(users) == known:  # the latter: a server that gives the same page again
            break
    host.users, host.has_all_users = users, is_whole
    if is_whole:
        yield ok("keycloak-users", common.counted(users, "user"))
    else:
        yield look_up_named_users(host, reader, users)
    unusable = problem("keycloak-users", "the daemon cannot use these users of Keycloak", "correct them in Keycloak")
    yield from about(list(dict.fromkeys(host.unusable_users)), unusable)


def look_up_named_users(host: Installation, reader: KeycloakReader, users: dict[str, mailcloak.User]) -> Finding:
    """Add the users that aliases and apps name to those read; from now on a holder of an e-mail is looked up as well."""
    named = {user for alias in (host.aliases or {}).values() if alias.enabled for user in alias.users}
    named |= {app.owner for app in (host.apps or {}).values() if app.owner}
    missing, read_before = sorted(named - set(users)), len(users)
    for done, username in enumerate(missing[:MAX_SINGLE_LOOKUPS]):
        common.show_progress(f"{done} of {len(missing)} users that aliases and apps name looked up ...")
        users.update(understand(host, reader, reader.find(username=username)))
    host.users_not_looked_up = set(missing[MAX_SINGLE_LOOKUPS:])
    host.look_up_holders = functools.partial(look_up_holders, host, reader)
    looked_up, rest = min(len(missing), MAX_SINGLE_LOOKUPS), len(host.users_not_looked_up)
    text = f"more than can be read: the first {read_before} were looked at, and {looked_up} more that aliases and apps name"
    return skipped("keycloak-users", f"{text}; not {rest} others of these" if rest else text)


def look_up_holders(host: Installation, reader: KeycloakReader, address: str) -> mailcloak.Users:
    """The users that Keycloak finds with this primary e-mail."""
    users = understand(host, reader, reader.find(email=address)).values()
    return tuple(user for user in users if user.email == address)


def understand(host: Installation, reader: KeycloakReader, records: Sequence[dict[str, Any]]) -> dict[str, mailcloak.User]:
    """The users by name, as the daemon understands Keycloak's records; host is told their federations, and what cannot be used."""
    users = {}
    for record in records:
        try:
            user = mailcloak.read_user(record, reader.config)
        except mailcloak.DirectoryUnavailable as exc:
            host.unusable_users.append(f"{clip(record.get('username'))} ({exc.text})")
            continue
        users[user.username] = user
        if user.federation:
            host.federations.add(user.federation)
    return users


def check_canaries(host: Installation, reader: KeycloakReader) -> Findings:
    """Are the canaries there, is there one for each federation, and would it be noticed if they were gone?"""
    config, providers = reader.config, reader.federations()
    federations = host.federations | {provider.id for provider in providers or []}
    watched = set()
    for address in config.canary:
        users = look_up_holders(host, reader, address)
        if not any(user.enabled for user in users):
            text = f"canary {address} is missing or disabled, so no user counts as such, and unknown recipients get 451"
            remedy = "make or enable that user in Keycloak; or take the address out of keycloak.canary"
            yield problem("keycloak-canary", text, remedy)
        watched |= {user.federation for user in users if user.federation}
    if not federations and providers is None and not host.has_all_users:
        text = "is one needed? Not all users were read, and to read the federations the client needs view-realm"
        yield skipped("keycloak-canary", text)
    elif not federations:
        good = "no federation was seen" if config.canary else "no user comes from a federation, so none is needed"
        yield ok("keycloak-canary", good)
    elif not config.canary:
        text = "users come from a federation, and there is no canary: while it is down, mail to users that mailcloak has never seen is refused"
        remedy = "keycloak.canary: the address of a user of the federation that always exists; and its cache policy in Keycloak: NO_CACHE"
        yield warning("keycloak-canary", text, remedy)
    elif not federations <= watched:
        remedy = "keycloak.canary: one address of each federation that always exists"
        yield warning("keycloak-canary", f"{len(federations - watched)} of {len(federations)} federations have no canary", remedy)
    if config.canary and federations:
        yield from check_cache_policy(providers)


def check_cache_policy(providers: Optional[Sequence[Federation]]) -> Findings:
    """Does Keycloak ask each federation for the canary every time, or answer from its own cache?"""
    if providers is None:
        text = "is the federation's cache policy in Keycloak NO_CACHE? A canary protects only then; to read it the client needs the role view-realm"
        yield skipped("keycloak-cache-policy", text)
        return
    for _, name, policy in providers:
        if policy != "NO_CACHE":
            text = f"federation {name}: cache policy {policy}: while it is down, Keycloak still answers for the canary from its cache, so the canary protects no user"
            yield warning("keycloak-cache-policy", text, f"Keycloak, User federation, {name}: Cache policy NO_CACHE")
        else:
            yield ok("keycloak-cache-policy", f"federation {name}: NO_CACHE, so it is noticed when a canary is gone")


# ---------------------------------------------------------------------------------------------------------------------------------
# Postfix and Dovecot
# Their checks are in mailcloakpostfix.py and mailcloakdovecot.py.
# ---------------------------------------------------------------------------------------------------------------------------------

CHECKS += [mailcloakpostfix.check_postfix, mailcloakdovecot.check_dovecot]

# ---------------------------------------------------------------------------------------------------------------------------------
# Addresses, users, apps
# What the database says is compared with what Keycloak says.
# ---------------------------------------------------------------------------------------------------------------------------------


@listed
def check_role_addresses(host: Installation) -> Findings:
    """postmaster@ and abuse@ of each of our domains."""
    facts: Any = SimpleNamespace(  # all that find_owner() asks for
        find_alias=lambda address: (host.aliases or {}).get(address.text),
        find_holders=lambda address: host.find_holders(address.text),
    )
    for local_part, source in (("postmaster", "RFC 5321, section 4.5.1, demands it"), ("abuse", "RFC 2142 asks for it")):
        if host.policy is None or host.aliases is None:
            yield skipped(local_part, NO_DATABASE if host.policy else NO_CONFIG)
            continue
        addresses = [mailcloak.Address(local_part, domain) for domain in sorted(host.policy.domain)]
        owners = {address.text: mailcloak.find_owner(address, host.policy, facts).source for address in addresses}
        missing = [address for address, owner in owners.items() if owner == "nobody"]
        unknown = [address for address, owner in owners.items() if owner == "directory-unavailable"]
        if missing:
            text = f"no user receives mail for {common.shorten(missing)}; {source}"
            remedy = f"mailcloakctl aliases {'enable' if missing[0] in host.aliases else 'add'} {missing[0]}"
            remedy += "" if missing[0] in host.aliases else " USERNAME"
            yield warning(local_part, text, remedy)._replace(items=tuple(missing))
        if unknown:
            yield skipped(local_part, f"does a user have {common.shorten(unknown)}? {NO_USERS}")
        if not missing and not unknown:
            yield ok(local_part, f"users receive mail for {common.shorten(list(owners))}")


@listed
def check_aliases(host: Installation) -> Findings:
    """Aliases that lead nowhere, to no user, in circles, or past a user."""
    if host.aliases is None:
        yield skipped("aliases", NO_DATABASE)
        return
    enabled = {address: alias.users for address, alias in host.aliases.items() if alias.enabled}
    found = [*check_stored_aliases(host, enabled), *check_alias_users(host, enabled)]
    yield from found
    if enabled and host.policy is None:
        yield skipped("aliases", f"are they in policy.domain, and do they lead on to other aliases? {NO_CONFIG}")
    if enabled and host.users is None:
        yield skipped("aliases", f"do their users exist? {NO_USERS}")
    elif host.users_not_looked_up:
        yield skipped("aliases", f"do all their users exist? {len(host.users_not_looked_up)} were not looked up")
    elif host.policy and not found:
        yield ok("aliases", f"{common.counted(enabled, 'enabled alias', 'enabled aliases')}, each leading to a user")


def check_stored_aliases(host: Installation, enabled: Mapping[str, Sequence[str]]) -> Findings:
    """What the database shows by itself; enabled: the users by address."""
    misspelled = [address for address in enabled if mailcloak.normalise_address(address).text != address]
    text = "these aliases are not stored in the form in which they are looked up, so they are never found"
    yield from about(misspelled, warning("alias-spelling", text, "mailcloakctl db check --fix"))
    if host.policy is None:
        return
    outside = [address for address in enabled if mailcloak.normalise_address(address).domain not in host.policy.domain]
    remedy = "policy.domain, if the domain is ours; else mailcloakctl aliases del ADDRESS"
    yield from about(outside, warning("alias-domain", "these aliases are not in policy.domain, so they lead nowhere", remedy))
    if not host.policy.mailbox_domain:
        mailboxes = {address: [common.mailbox_of(address, user) for user in users] for address, users in enabled.items()}
        delimiters = host.policy.recipient_delimiter
        # by mailbox: what comes for it, and for it with an extension
        aliases_at = grouped((spelling, address) for address in enabled for spelling in common.spellings_of(address, delimiters))
        chains = [
            f"{address} -> {other} -> {', '.join(mailboxes[other])}"
            for address, users in enabled.items()
            for user, mailbox in zip(users, mailboxes[address])
            for other in aliases_at.get(mailbox, ())
            if mailbox != address and mailboxes[other] != [mailbox] and common.meets(address, user, other, delimiters)
        ]
        text = "the mailbox of an alias is an alias itself, so the mail goes past its user"
        remedy = "mailcloakctl aliases add ADDRESS USERNAME --replace with the last user, or set policy.mailbox_domain"
        yield from about(chains, problem("alias-chain", text, remedy))


def check_alias_users(host: Installation, enabled: Mapping[str, Sequence[str]]) -> Findings:
    """What Keycloak says of the users that aliases name."""
    if host.users is None:
        return
    users = host.users
    named = [(address, name) for address, names in enabled.items() for name in names if name not in host.users_not_looked_up]
    known = [(f"{address} ({username})", users.get(username)) for address, username in named]
    missing = [alias for alias, user in known if not user]
    disabled = [alias for alias, user in known if user and not user.receives]
    text = "these aliases lead to users who {} in Keycloak; with no other user, their mail is still taken"
    remedy = (
        "mailcloakctl aliases add ADDRESS USERNAME --replace, aliases remove-user where it has others, or aliases disable ADDRESS"
    )
    yield from about(missing, warning("alias-user-missing", text.format("do not exist"), remedy))
    yield from about(disabled, warning("alias-user-disabled", text.format("are disabled"), remedy))
    holders = grouped((user.email, user.username) for user in users.values() if user.receives and user.email)
    shadows = [
        f"{address} (alias of {', '.join(names)}, e-mail of {', '.join(holders[address])})"
        for address, names in enabled.items()
        if address in holders and not set(names) & set(holders[address])
    ]
    text = "these aliases take the mail of users who have them as their primary e-mail"
    yield from about(shadows, warning("alias-shadow", text, "mailcloakctl aliases del ADDRESS, unless this is intended"))


@listed
def check_users(host: Installation) -> Findings:
    """Users who cannot send, or with mail that would end in the mailbox of another user."""
    if host.users is None or host.policy is None:
        yield skipped("users", NO_USERS if host.policy else NO_CONFIG)
        return
    policy, users = host.policy, host.users
    ours = [user for user in users.values() if user.receives and mailcloak.normalise_address(user.email).domain in policy.domain]
    if host.keycloak and users and not ours and host.has_all_users:
        text = f"none of the {len(users)} users of Keycloak has an e-mail in policy.domain, so only aliases receive mail"
        yield problem("users", text, "look for a typing error in policy.domain, or give the users e-mails in it")
        return
    good = ok("users", f"{common.counted(ours, 'user')} with an e-mail in policy.domain, each with a mailbox of their own")
    if not host.has_all_users:
        good = skipped("users", f"nothing is wrong with the {len(users)} that were read; not all were")
    yield from list(find_odd_users(policy, users, ours)) or [good]


def find_odd_users(policy: mailcloak.PolicyConfig, users: Mapping[str, mailcloak.User], ours: Sequence[mailcloak.User]) -> Findings:
    """What is wrong with single users; ours: those with an e-mail in our domains."""
    by_address = grouped((user.email, user.username) for user in ours)
    shared = [f"{address} ({', '.join(names)})" for address, names in by_address.items() if len(names) > 1]
    text = "several users have these e-mails, and none of them may send as that address"
    yield from about(shared, warning("primary-shared", text, "give all of them but one another e-mail in Keycloak"))
    ambiguous = [
        f"{name} (e-mail of {', '.join(by_address[name])})"
        for name in users
        if "@" in name and set(by_address.get(name, ())) - {name}
    ]
    text = "these usernames are the e-mail of another user, so neither of the two can send by that login"
    yield from about(ambiguous, problem("login-ambiguous", text, "rename the users, or change the e-mails, in Keycloak"))
    if not policy.mailbox_domain:
        yield from check_mailbox_names(users, ours)
    names = [name for user in ours for name in (user.username, "" if policy.mailbox_domain else user.email)]
    cut = [name for name in names if mailcloak.holds_delimiter(name, policy.recipient_delimiter)]
    text = "Dovecot would cut the names of these mailboxes at a character of recipient_delimiter, so mail for them waits (451)"
    remedy = "rename the users in Keycloak, or take the character out of recipient_delimiter in config.yaml, main.cf and Dovecot"
    yield from about(cut, problem("username-delimiter", text, remedy))
    odd = [user.username for user in ours if policy.mailbox_domain and not user.username.isascii()]
    text = "these usernames are not ASCII, and Dovecot 2.3 takes no mail for such a mailbox: all mail for these users bounces"
    yield from about(odd, warning("username-ascii", text, "rename the users in Keycloak; their e-mails may stay"))


def check_mailbox_names(users: Mapping[str, mailcloak.User], ours: Sequence[mailcloak.User]) -> Findings:
    """Without policy.mailbox_domain a primary e-mail is delivered as it stands: to the mailbox of its local part."""
    taken: list[str] = []
    others: list[str] = []
    for user in ours:
        local_part = user.email.rpartition("@")[0]
        if user.username not in (local_part, user.email):
            (taken if local_part in users else others).append(f"{user.email} ({user.username})")
    remedy = "set policy.mailbox_domain, so that every address leads to the mailbox of its user; or change the e-mails in Keycloak"
    text = "these e-mails have another user's name before the @, and their mail may end in that user's mailbox"
    yield from about(taken, problem("primary-name", text, remedy))
    text = "these users cannot read mail for their e-mail: it goes to the mailbox of the name before the @"
    yield from about(others, problem("mailbox-name", text, remedy))


@listed
def check_apps(host: Installation) -> Findings:
    """Apps that no longer count, or have the name of a user."""
    if host.apps is None:
        yield skipped("apps", NO_DATABASE)
        return
    enabled = {app_id: app for app_id, app in host.apps.items() if app.state != "disabled"}
    expired = [app_id for app_id, app in enabled.items() if app.state == "expired"]
    remedy = "mailcloakctl apps set APP_ID --expires 90d, or apps del APP_ID"
    found = about(expired, warning("app-expired", "these apps have expired, so they cannot send", remedy))
    if host.users is not None:
        users = host.users
        named = [app_id for app_id in host.apps if app_id in users]
        text = "these apps have the name of a user, who is taken for the app at each login without a token"
        found += about(named, warning("app-name", text, "mailcloakctl apps add under another name, then apps del APP_ID"))
        owners = {app_id: app.owner for app_id, app in enabled.items() if app.owner and app.owner not in host.users_not_looked_up}
        owned = [(f"{app_id} ({owner})", users.get(owner)) for app_id, owner in owners.items()]
        missing = [app for app, owner in owned if not owner]
        disabled = [app for app, owner in owned if owner and not owner.enabled]
        text = "these apps belong to users who {} in Keycloak, so they cannot send"
        remedy = "mailcloakctl apps set APP_ID --owner USERNAME, or apps del APP_ID"
        found += about(missing, warning("app-owner-missing", text.format("do not exist"), remedy))
        found += about(disabled, warning("app-owner-disabled", text.format("are disabled"), remedy))
    elif host.apps:
        found.append(skipped("apps", f"do their owners exist, and is one called like a user? {NO_USERS}"))
    yield from found or [ok("apps", common.counted(enabled, "enabled app"))]
