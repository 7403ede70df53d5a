# mailcloakdoctor: the checks of mailcloakctl doctor. MIT licence, see LICENSE.
"""Check a whole installation of mailcloak: what "mailcloakctl doctor" runs, and nothing else loads.

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
  database-access         can the daemon's user write it and its directory? chown, chmod
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
  dovecot-realm           does Dovecot take tokens of the realm that the daemon asks? introspection_url
  dovecot-trust           does Dovecot trust Keycloak's certificate? tls_ca_cert_file, in 2.4 ssl_client_ca_file
  dovecot-certificate     has Dovecot a certificate with its key, that has not ended? ssl_cert, in 2.4 ssl_server_cert_file
  dovecot-mailboxes       are the user and group there to which the mailboxes belong? useradd
  dovecot-names           is the mailbox to which a user's mail is delivered the one that the user reads? auth_username_format
  dovecot                 can Dovecot read its configuration, and SQLite, and does it look for apps in this database? The examples
  dovecot-query           does its query let apps in only while they are enabled, and only to send? The query of the examples
  dovecot-access          can the process that asks the database read it? extra_groups, chmod

  postmaster, abuse       does a user receive mail for them, in each domain (RFC 5321, RFC 2142)? aliases add
  aliases, users, apps    is anything wrong with one of them? Else they are ok, or skipped:
  alias-spelling          is each alias stored in the form in which it is looked up? aliases add, and delete the old row
  alias-domain            is each alias in policy.domain? policy.domain, aliases del
  alias-chain             does the mailbox of an alias lead on to another user? aliases add --replace, policy.mailbox_domain
  alias-user-missing, alias-user-disabled   is its user there, and enabled? aliases add --replace
  alias-shadow            does an alias take the mail of a user with this primary e-mail? aliases del
  primary-shared          have several users the same e-mail? Change it in Keycloak
  login-ambiguous         is the username of one user the e-mail of another? Rename the user in Keycloak
  primary-name, mailbox-name                does a user's e-mail lead to another mailbox? policy.mailbox_domain
  username-delimiter      does a username hold a character of recipient_delimiter? Rename the user in Keycloak
  app-expired             has an enabled app expired? apps set --expires
  app-name                has an app the name of a user? apps add under another name
  app-owner-missing, app-owner-disabled     is its owner there, and enabled? apps set --owner
  doctor                  did a check itself fail? Report it; the others run in any case
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import contextlib
import errno
import functools
import grp
import json
import os
import pwd
import re
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import subprocess
import textwrap
import threading
import time
import urllib.parse
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, Optional

import mailcloak
import mailcloakask
import mailcloakcommon as common

# ---------------------------------------------------------------------------------------------------------------------------------
# Findings
# ---------------------------------------------------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """One line of doctor."""

    check: str  # the name of the check, for programs
    state: str  # ok, skipped, warning or problem
    text: str
    remedy: str = ""
    items: tuple[str, ...] = ()  # all that the text speaks of; people are shown the first few


Findings = Iterator[Finding]
EXAMPLES = common.real_paths("share/doc/mailcloak/examples")
MAIN_CF, MASTER_CF = f"{EXAMPLES}/postfix/main.cf", f"{EXAMPLES}/postfix/master.cf"
AS_ROOT = "run mailcloakctl doctor as root"
FIX_CONFIG = "fix the configuration first"
SEE_FINDINGS = "look at the findings"  # of other checks, whose remedies come first
NO_USERS = "the users of Keycloak were not read"
NO_DATABASE = "the database was not read"
NO_CONFIG = "the configuration is not good"


def ok(check: str, text: str) -> Finding:
    """Looked at, and good."""
    return Finding(check, "ok", text)


def skipped(check: str, why: str, remedy: str = "") -> Finding:
    """Not looked at, and why; the remedy is for what an administrator can do about that."""
    return Finding(check, "skipped", why, remedy)


def warning(check: str, text: str, remedy: str) -> Finding:
    """Works, but not as it should."""
    return Finding(check, "warning", text, remedy)


def problem(check: str, text: str, remedy: str) -> Finding:
    """Does not work, or lets through what it should not."""
    return Finding(check, "problem", text, remedy)


def grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The second of each pair, by the first."""
    groups: dict[str, list[str]] = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return dict(groups)


def about(items: Sequence[str], finding: Finding) -> list[Finding]:
    """The finding, with the items that it speaks of behind its text; nothing where there are none."""
    return [finding._replace(text=f"{finding.text}: {common.shorten(items)}", items=tuple(items))] if items else []


# ---------------------------------------------------------------------------------------------------------------------------------
# What the checks look at
# ---------------------------------------------------------------------------------------------------------------------------------


class Installation:
    """What the checks look at, and what they find out for those after them; None is what is not known."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.config_path = os.path.abspath(options.config or mailcloak.DEFAULT_CONFIG_PATH)
        blocks: dict[str, Any] = {}
        with contextlib.suppress(mailcloak.ConfigError):  # check_config reports it; the good blocks of a bad file are used
            blocks = mailcloak.read_blocks(self.config_path)[0]
        self.keycloak: Optional[mailcloak.KeycloakConfig] = blocks.get("keycloak")
        self.static_users: Optional[Mapping[str, str]] = blocks.get("static_users")
        self.policy: Optional[mailcloak.PolicyConfig] = blocks.get("policy")
        self.sockets: Optional[mailcloak.SocketsConfig] = blocks.get("sockets")
        self.daemon: Optional[mailcloak.DaemonConfig] = blocks.get("daemon")
        self.max_lag_seconds: float = blocks.get("replication", mailcloak.ReplicationConfig()).max_lag_seconds
        path = options.db or (blocks["sqlite"].path if "sqlite" in blocks else "")
        self.database_path = os.path.abspath(path) if path else ""  # "" where nothing that can be read names one
        self.aliases: Optional[dict[str, mailcloak.Alias]] = None  # by address
        self.apps: Optional[dict[str, mailcloak.App]] = None  # by app_id; who may send as what is not read
        self.users: Optional[dict[str, mailcloak.User]] = None  # by username
        self.has_all_users = True
        self.users_not_looked_up: set[str] = set()  # of those that aliases and apps name
        self.look_up_holders: Optional[Callable[[str], mailcloak.Users]] = None  # where not all users were read
        self.unusable_users: list[str] = []  # with records that the daemon does not understand, and why
        self.federations: set[str] = set()  # from which users come

    @property
    def daemon_group(self) -> str:
        """The group of the user that the daemon becomes."""
        with contextlib.suppress(KeyError):
            return grp.getgrgid(pwd.getpwnam(self.daemon.user if self.daemon else "").pw_gid).gr_name
        return "mailcloak"

    def find_holders(self, address: str) -> mailcloak.Users:
        """The users with this primary e-mail. Raises DirectoryUnavailable."""
        if self.users is None:
            raise mailcloak.DirectoryUnavailable("not asked")
        if self.look_up_holders:
            return self.look_up_holders(address)
        return tuple(user for user in self.users.values() if user.email == address)


# ---------------------------------------------------------------------------------------------------------------------------------
# The run of the checks
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


# ---------------------------------------------------------------------------------------------------------------------------------
# Other users
# Whether another user could do something is tried by a process of that user, for which doctor has to be root.
# ---------------------------------------------------------------------------------------------------------------------------------


def try_as(
    user: str, work: Callable[[], str], check: str, question: str, *, groups: Sequence[int] = (), root: str = ""
) -> tuple[str, list[Finding]]:
    """What work() says in a process of that user, "" for nothing wrong; and a finding of that check where it cannot be asked.

    root: the path to make its root directory first, if any. An error of work() is given as its text.
    """
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        return "", [problem(check, f"{question} There is no user {user!r}", "make that user, or name another")]
    if entry.pw_uid == os.geteuid() != 0 and not root:
        return work(), []
    if os.geteuid() != 0:
        return "", [skipped(check, f"{question} Only root can act as user {user!r}", AS_ROOT)]
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
        if select.select([reader], [], [], common.ANSWER_SECONDS)[0]:
            return os.read(reader, 4096).decode(), []
        os.kill(child, signal.SIGKILL)
        return f"no answer within {common.ANSWER_SECONDS:.0f} s", []
    finally:
        os.close(reader)
        os.waitpid(child, 0)


def why_not(path: str, mode: int) -> str:
    """Why this process may not read (os.R_OK) or write (os.W_OK) the path; "" if it may."""
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


def access_remedy(why: str, user: str, otherwise: str, *, groups: Sequence[int] = ()) -> str:
    """What lets a process of the user, which has these groups besides the user's, do what why_not() says is not allowed.

    otherwise: the remedy for a path of other users and groups, with {path} in it, and {bit} for the letter of chmod.
    """
    match = re.fullmatch(r"may not (enter|read|write) (/.*)", why)
    if not match:
        return "restore what is missing"
    path, bit = shlex.quote(match[2]), {"enter": "x", "read": "r", "write": "w"}[match[1]]
    status, entry = os.stat(match[2]), pwd.getpwnam(user)
    if bit == "w" and os.statvfs(match[2]).f_flag & os.ST_RDONLY:
        return "mount its file system for writing, it is mounted read-only"
    if status.st_uid == entry.pw_uid:
        return f"chmod u+{bit} {path}"
    all_groups = (*os.getgrouplist(user, entry.pw_gid), *groups)
    if status.st_gid in all_groups and bit != "w":  # Dovecot is in the group too, and only reads
        return f"chmod g+{bit} {path}"
    return otherwise.replace("{path}", path).replace("{bit}", bit)


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


# ---------------------------------------------------------------------------------------------------------------------------------
# Other programs
# What the checks of Postfix and those of Dovecot have in common.
# ---------------------------------------------------------------------------------------------------------------------------------

SYSTEM_PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin:/usr/local/sbin"
LAST_DAYS = 7  # of a certificate: what renews it (certbot, from 30 days before its end on) has failed for weeks by then


class CommandFailed(mailcloak.MailcloakError):
    """A command of another program hangs or fails; is_there: there is such a command; has_refused: it ended by itself."""

    def __init__(self, text: str, *, is_there: bool = True, has_refused: bool = False) -> None:
        super().__init__(text)
        self.is_there, self.has_refused = is_there, has_refused


def run_program(name: str, *arguments: str, text: str = "", directory: str = "/", may_fail: bool = False) -> tuple[str, str]:
    """Standard output and standard error of a command; the text is its input. It may fail without a word but warnings, or must not fail."""
    program = shutil.which(name, path=SYSTEM_PATH)
    if not program:
        raise CommandFailed(f"there is no {name} in the PATH", is_there=False)
    try:
        result = subprocess.run(
            [program, *arguments],
            check=False,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=common.ANSWER_SECONDS,
            input=text,
            cwd=directory,
            # with the last, doveconf does not look up the name of this host, for which it could wait until it is given up
            env={**os.environ, "LC_ALL": "C", "PATH": SYSTEM_PATH, "DOVECOT_HOSTDOMAIN": "localhost"},
        )
    except subprocess.TimeoutExpired:
        raise CommandFailed(f"{name} gave no answer within {common.ANSWER_SECONDS:.0f} s") from None
    except OSError as exc:
        raise CommandFailed(f"{name}: {exc.strerror}") from exc
    said_lines = [line for line in result.stderr.strip().splitlines() if not (may_fail and ": warning: " in line)]
    if result.returncode != 0 and (said_lines or not may_fail):
        said = (said_lines or ["without a word"])[0]
        raise CommandFailed(f"{name} failed: {said}", has_refused=True)
    return result.stdout, result.stderr


def split_list(text: str) -> list[str]:
    """The words of a list of Postfix or Dovecot, separated by commas and white space; what stands in braces is one word."""
    words, word, depth = [], "", 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if depth <= 0 and (character == "," or character.isspace()):
            words.append(word)
            word = ""
        else:
            word += character
    return [each for each in (*words, word) if each]


def same_path(one: str, other: str) -> bool:
    """Do both lead to the same file?"""
    return bool(one and other) and os.path.realpath(one) == os.path.realpath(other)


def try_to_connect(path: str) -> str:
    """Why this process cannot connect to the socket; "" if it can."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
        connection.settimeout(common.ANSWER_SECONDS)
        try:
            connection.connect(path)
        except OSError as exc:
            return exc.strerror or str(exc)
    return ""


def check_certificate(check: str, server: str, path: str, key: str, remedy: str) -> Findings:
    """Is the certificate there, with its key, and has it not ended? Postfix and Dovecot read both files as root.

    key: "" where it is not said which of several files holds what.
    """
    subject = f"{server}: the certificate in {path}"
    restart = remedy.rpartition(", then ")[2]
    why = why_not(path, os.R_OK) or (key and why_not(key, os.R_OK))
    if why and os.geteuid() and not why.startswith("finds no"):
        yield skipped(check, f"{server}: has it a certificate? This user {why}", AS_ROOT)
        return
    if why:
        yield problem(check, f"{server} {why}, so no client can begin TLS", remedy)
        return
    if not key:
        yield ok(check, f"{server} can read {path}")
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(path, key, password=lambda: "")
        printed = run_program("openssl", "x509", "-noout", "-enddate", "-in", path)[0]
        end = ssl.cert_time_to_seconds(printed.strip().partition("=")[2])
    except (OSError, ValueError):
        yield problem(check, f"{server}: {path} and {key} are not a certificate and its key", remedy)
        return
    except CommandFailed as exc:
        yield skipped(check, f"{server}: until when is the certificate in {path} good? {exc}")
        return
    day, days = time.strftime("%Y-%m-%d", time.gmtime(end)), (end - time.time()) / 86400
    if days < 0:
        yield problem(check, f"{subject} ended on {day}, and clients refuse it", f"renew it, then {restart}")
    elif days < LAST_DAYS:
        yield warning(check, f"{subject} ends on {day}", f"renew it, then {restart}; does the job still run that does so?")
    else:
        yield ok(check, f"{subject} is good until {day}")


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
        remedy = "start the daemon, which makes it; or name the right one in sqlite.path"
        if os.path.exists(mailcloak.last_known_path(path)):  # a daemon has run on one
            remedy = "restore it from a backup, or name the right one in sqlite.path; a daemon that runs needs no restart"
        yield problem("database", f"{path} does not exist", remedy)
        return
    except OSError as exc:
        make, remedy = (skipped, AS_ROOT) if isinstance(exc, PermissionError) else (problem, "correct the path in sqlite.path")
        yield make("database", f"{path}: {exc.strerror}", remedy)
        return
    try:
        with contextlib.closing(mailcloak.connect_database(path, common.ANSWER_SECONDS, as_owner=True)) as database:
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
        yield warning("daemon-database", f"the daemon uses {used['path']}", f"reload it, so that it uses {host.database_path}")
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
    reader, check = KeycloakReader(host.keycloak), "keycloak-token"
    try:
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
    except mailcloak.DirectoryMisconfigured as exc:
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
# Postfix
# What postconf says of main.cf and of each smtpd of master.cf, where -o options take the place of main.cf's settings.
# ---------------------------------------------------------------------------------------------------------------------------------

ALWAYS_AT_RCPT = ("smtpd_relay_restrictions", "smtpd_recipient_restrictions")
DELAYED_TO_RCPT = ("smtpd_client_restrictions", "smtpd_helo_restrictions", "smtpd_sender_restrictions")  # by smtpd_delay_reject
LATER = ("smtpd_data_restrictions", "smtpd_end_of_data_restrictions")
LISTS = (*ALWAYS_AT_RCPT, *DELAYED_TO_RCPT, *LATER)
ENDS_RELAYING = {"reject_unauth_destination", "defer_unauth_destination"}
REFUSES = {"reject", "defer", "defer_if_permit"}
CLASSES = {  # where Postfix knows a domain from, in its order; what delivers there, and who exists there (ADDRESS_CLASS_README)
    "mydestination": ("local_transport", "local_recipient_maps"),
    "virtual_alias_domains": ("", ""),
    "virtual_mailbox_domains": ("virtual_transport", "virtual_mailbox_maps"),
    "relay_domains": ("relay_transport", "relay_recipient_maps"),
}
CLIENTS = {"lmtp": "lmtp", "smtp": "smtp", "relay": "smtp"}  # of Postfix's own master.cf, with their programs
TO_DOVECOT = "lmtp:unix:private/dovecot-lmtp"
FROM_DOVECOT = f"start Dovecot (if it does not start, see the findings about it), with this socket as in {EXAMPLES}/dovecot-2.3 or {EXAMPLES}/dovecot-2.4"
UNTRIED = "Only Unix sockets are tried"
REWRITING = {"append_dot_mydomain": "no", "allow_percent_hack": "yes", "swap_bangpath": "yes", "allow_untrusted_routing": "no"}


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
    permits: tuple[str, ...]  # what stands before it and ends the list with a permission
    tables: tuple[str, ...]  # what stands before it and may do so
    warn_only: bool  # behind warn_if_reject


class Postfix:
    """One instance, as postconf shows it."""

    def __init__(self, directory: Optional[str]) -> None:
        self._where = ("-c", directory) if directory else ()
        self.directory = self._postconf("-h", "config_directory").strip()
        if not self.directory:
            raise CommandFailed("postconf says nothing")
        self.main: dict[str, str] = defaultdict(str)  # the values in force, with all that they refer to put in
        for line in self._postconf("-x").splitlines():
            name, _, value = line.partition(" =")
            self.main[name] = value.strip()
        overrides: dict[str, dict[str, str]] = defaultdict(dict)
        for line in self._postconf("-x", "-P").splitlines():
            match = re.fullmatch(r"(\S+/[a-z-]+)/(\S+) =(.*)", line)
            if match:
                overrides[match[1]][match[2]] = match[3].strip()
        is_old = self.main["compatibility_level"].partition(".")[0] in ("", "0")  # then "-" stands for y (COMPATIBILITY_README)
        confined = ("y", "-") if is_old else ("y",)
        lines = [line.split() for line in self._postconf("-M").splitlines()]
        self.services = {
            name: PostfixService(name, chroot in confined, command, overrides.get(name, {}))
            for name, chroot, command in ((f"{words[0]}/{words[1]}", words[4], words[7]) for words in lines if len(words) >= 8)
        }
        self.smtpds = [service for service in self.services.values() if service.command == "smtpd"]
        complaints = run_program("postconf", *self._where, "-n")[1]
        self.unused = re.findall(r"unused parameter: (\w+)=", complaints)
        self.doubled = list(dict.fromkeys(re.findall(r"overriding earlier entry: (\w+)=", complaints)))

    def _postconf(self, *arguments: str) -> str:
        return run_program("postconf", *self._where, *arguments)[0]

    def value(self, service: Optional[PostfixService], name: str) -> str:
        """The value in force for this service; without one, that of main.cf."""
        return service.overrides.get(name, self.main[name]) if service else self.main[name]

    def service(self, command: str) -> Optional[PostfixService]:
        """The first service of that program."""
        return next((service for service in self.services.values() if service.command == command), None)

    def find(self, name: str, keys: Sequence[str]) -> dict[str, str]:
        """Those of the keys that a list or table of main.cf has, with their values there. Raises CommandFailed and OSError.

        Of the patterns of a list, which are names, /files, type:tables, and any of these behind a !, the first that fits counts.
        """
        found: dict[str, str] = {}
        for word in split_list(self.main[name]):
            pattern, rest = word.lstrip("!"), [key for key in keys if key not in found]
            if not rest:
                break
            if pattern.startswith("/"):
                with open(pattern, encoding="utf-8", errors="replace") as file:
                    hits = dict.fromkeys(re.sub("#.*", "", file.read()).lower().split(), pattern)
            elif ":" in pattern:  # proxy: would need a Postfix that runs; a relative path is one in the queue directory
                table = pattern[len("proxy:") :] if pattern.startswith("proxy:") else pattern
                if re.match("(regexp|pcre):", table) and any(
                    "@" in key for key in keys
                ):  # they are asked for whole addresses alone
                    rest = [key for key in rest if "@" in key]
                arguments, directory = (*self._where, "-q", "-", table), self.main["queue_directory"]
                rows = run_program("postmap", *arguments, text="\n".join(rest), directory=directory, may_fail=True)[0]
                hits = {key: value for key, _, value in (row.partition("\t") for row in rows.splitlines())}
            else:
                hits = {pattern.lower(): pattern}
            found = {**{key: "" if word.startswith("!") else value for key, value in hits.items()}, **found}
        return {key: found[key] for key in keys if found.get(key)}

    def takes(self, smtpd: PostfixService, *, known: bool = False, ours: bool = True) -> bool:
        """Would this smtpd take mail for us (else for others), of a client for which each permit_* holds (else of a stranger)?

        Refusals with a condition (a table, a policy service, reject_non_fqdn_sender) are left out. Source: access lists of postconf(5).
        """
        permits = {"permit"} | ({"permit_auth_destination"} if ours else set())
        if any(re.search(r"/0$|^static:", word) for word in split_list(self.value(smtpd, "mynetworks"))):
            permits.add("permit_mynetworks")
        refusals = REFUSES if ours else REFUSES | ENDS_RELAYING
        for list_name in LISTS:
            before = ""
            for word in self.words(smtpd, list_name):
                if word in permits or (known and word.startswith("permit_")):
                    break
                if word in refusals and before != "warn_if_reject":
                    return False
                before = word
        return self.may_start(smtpd)

    def may_start(self, smtpd: PostfixService) -> bool:
        """Does one of the two lists end relaying? Else smtpd(8) ends at once ("specify at least one working instance of")."""
        return any(word in REFUSES | ENDS_RELAYING for name in ALWAYS_AT_RCPT for word in self.words(smtpd, name))

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
            permits: tuple[str, ...] = ()
            tables: tuple[str, ...] = ()
            before = ""
            words = self.words(smtpd, list_name)
            for word in words:
                if word == "check_policy_service":
                    endpoint, options = read_policy_service(next(words, ""))
                    if same_path(self.path_of(endpoint, smtpd.chroot), socket_path):
                        yield PolicyUse(list_name, options, permits, tables, before == "warn_if_reject")
                elif re.fullmatch(r"permit(_\w+)?", word):
                    permits += (word,)
                elif re.fullmatch(r"check_\w+_access", word):
                    tables += (word,)
                before = word

    def words(self, service: PostfixService, name: str) -> Iterator[str]:
        """The words of a list, each restriction class replaced by what it stands for."""
        rest, classes = split_list(self.value(service, name)), split_list(self.main["smtpd_restriction_classes"])
        for _ in range(1000):  # also where classes name one another in a circle
            if not rest:
                return
            word = rest.pop(0)
            if word in classes:
                rest[:0] = split_list(self.main[word])
            else:
                yield word


def read_policy_service(text: str) -> tuple[str, dict[str, str]]:
    """Endpoint and options behind check_policy_service: unix:PATH or { unix:PATH, name=value, { name = value } }."""
    words = split_list(text[1:-1]) if text.startswith("{") else [text]
    options = {}
    for word in words[1:]:
        name, _, value = word.strip("{}").partition("=")
        options[name.strip()] = value.strip()
    return words[0] if words else "", options


@listed
def check_postfix(host: Installation) -> Findings:
    """Each instance of Postfix that was named, or the one that postconf finds."""
    if host.sockets is None or host.policy is None:
        yield skipped("postfix", NO_CONFIG, FIX_CONFIG)
        return
    for directory in host.options.postfix_config or [None]:
        try:
            postfix = Postfix(directory)
        except CommandFailed as exc:
            if exc.has_refused:
                remedy = "fix main.cf, or name its folder with --postfix-config; then postfix check"
                yield problem("postfix", f"not checked: {exc}", remedy)
            else:
                yield skipped("postfix", exc.text, "install Postfix, or name the folder of its main.cf with --postfix-config")
            continue
        yield ok("postfix", f"{postfix.directory} has {common.counted(postfix.smtpds, 'smtpd service')}")
        yield from check_running(postfix)
        if not postfix.smtpds:
            text = f"{postfix.directory}/master.cf has no smtpd: no mail comes in"
            yield problem("postfix-smtpd", text, f"compare {MASTER_CF}")
        remedy = f"sockets.socket_owner_user: {postfix.main['mail_owner']}, with access to its directory; then restart the daemon"
        for path in (host.sockets.policy_socket, host.sockets.socketmap_socket):
            yield from check_connection(postfix, postfix.smtpds, path, remedy, f"{SEE_FINDINGS} about the daemon and its sockets")
        for smtpd in postfix.smtpds:
            yield from check_smtpd(host, host.sockets, postfix, smtpd)
        yield from check_clients(postfix)
        yield from check_logins(postfix)
        yield from check_smtpd_certificates(postfix)
        yield from check_local_mail(host.policy, host.sockets, postfix)
        yield from check_alias_maps(host.sockets, postfix)
        yield from check_domains(host.policy, postfix)
        yield from check_transports(postfix)
        yield from check_main_settings(host.policy, postfix)


def check_running(postfix: Postfix) -> Findings:
    """Does Postfix run? Its master listens for its own programs, of which each configuration has this one."""
    check = "postfix-running"
    if "rewrite/unix" not in postfix.services:
        yield skipped(check, "does it run? Its master.cf has no service rewrite")
    elif os.geteuid() != 0:
        yield skipped(check, "does it run? Only root may ask its own sockets", AS_ROOT)
    elif try_to_connect(os.path.join(postfix.main["queue_directory"], "private/rewrite")):
        yield problem(check, "Postfix does not run, so no mail comes in or goes out", "postfix start, or systemctl start postfix")
    else:
        yield ok(check, "it runs")


def check_connection(postfix: Postfix, services: Sequence[PostfixService], path: str, remedy: str, start: str = "") -> Findings:
    """Can these services connect, as Postfix's own user and from inside the queue directory where one of them is confined to it?

    start: the remedy where nobody listens there, if it is another one.
    """
    queue_directory, user = os.path.realpath(postfix.main["queue_directory"]), postfix.main["mail_owner"]
    chrooted = [service.name for service in services if service.chroot]
    if chrooted and not os.path.realpath(os.path.dirname(path)).startswith(f"{queue_directory}/"):
        text = f"{path} is not below the queue directory {queue_directory}, where {chrooted[0]} is confined"
        yield problem("postfix-access", text, f"sockets: put both below {queue_directory}/private, then restart the daemon")
        return
    seen = os.path.join("/", os.path.relpath(os.path.realpath(path), queue_directory)) if chrooted else path
    connect, root = functools.partial(try_to_connect, seen), queue_directory if chrooted else ""
    why, untried = try_as(user, connect, "postfix-access", f"can Postfix connect to {path}?", root=root)
    yield from untried
    if why:
        is_down = why in (os.strerror(errno.ENOENT), os.strerror(errno.ECONNREFUSED))
        text = f"user {user} cannot connect to {path}: {why.lower()}"
        yield problem("postfix-access", text, (start if is_down else "") or remedy)
    elif not untried:
        yield ok("postfix-access", f"user {user} can connect to {path}{' from its chroot' if chrooted else ''}")


def check_smtpd(host: Installation, sockets: mailcloak.SocketsConfig, postfix: Postfix, smtpd: PostfixService) -> Findings:
    """Is mailcloak asked about each recipient and each sender of this smtpd, and does its answer count?"""
    uses = list(postfix.uses(smtpd, sockets.policy_socket))
    delayed = postfix.value(smtpd, "smtpd_delay_reject") == "yes"
    if not uses and is_reentry(smtpd):
        yield ok("postfix-smtpd", f"{smtpd.name} does not ask mailcloak, as a filter's re-entry port may")
        return
    found: list[Finding] = []
    for aspect in ("recipient", "sender"):
        asking = [use for use in uses if aspect in checked_by(use, delayed)]
        found += check_aspect(smtpd, aspect, asking, postfix.endpoint(sockets.policy_socket))
    for use in uses:
        found += check_use(host, postfix, smtpd, use)
    tables = ", ".join(dict.fromkeys(table for use in uses for table in use.tables))
    but = tables and f", where {tables} before it permits none"
    yield from found or [ok("postfix-smtpd", f"{smtpd.name} asks mailcloak about each recipient and each sender{but}")]


def is_reentry(smtpd: PostfixService) -> bool:
    """Where a content filter hands mail back: only on this host, and with the filter taken out (Postfix's FILTER_README)."""
    local = re.match(r"(127\.[0-9.]+|localhost|\[::1\]|::1):", smtpd.name)
    return bool(local) and smtpd.overrides.get("content_filter") == ""


def checked_by(use: PolicyUse, delayed: bool) -> tuple[str, ...]:
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
        service = f"check_policy_service {{ {endpoint}, policy_context={aspect} }}"
        remedy = f"main.cf: put {service} into {list_name}, then postfix reload"
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
    """What Postfix does with mailcloak's answer, and what it does without one."""
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
        remedy = f"default_action = 451 4.3.0 Temporary lookup failure, as in {MAIN_CF}"
        yield problem("postfix-default-action", text, remedy)
    timeout = use.options.get("timeout") or postfix.value(smtpd, "smtpd_policy_service_timeout")
    seconds = read_postfix_time(timeout)
    needed = host.keycloak.timeout_seconds if host.keycloak else 1.0
    if seconds is not None and seconds <= needed:
        text = f"{smtpd.name}: Postfix waits {timeout} for mailcloak, which may wait {needed:g} s for Keycloak"
        yield warning("postfix-timeout", text, "timeout=30s in check_policy_service, or a lower keycloak.timeout_seconds")


def read_postfix_time(text: str) -> Optional[float]:
    """Seconds of a time such as 30s; None for what is none."""
    match = re.fullmatch(r"([0-9]+)([smhdw]?)", text)
    return int(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[match[2]] if match else None


def check_clients(postfix: Postfix) -> Findings:
    """Can other hosts bring mail for our domains, and not have mail relayed to everybody?"""
    check = "postfix-relay"
    doors = [smtpd for smtpd in postfix.smtpds if not is_reentry(smtpd)]
    found: list[Finding] = []
    usual = "permit_mynetworks, permit_sasl_authenticated, reject_unauth_destination"
    remedy = f"smtpd_relay_restrictions = {usual}, then postfix reload; mynetworks may hold only hosts of yours"
    for smtpd in doors:
        if postfix.takes(smtpd, ours=False):
            found.append(problem(check, f"{smtpd.name} relays the mail of everybody to everywhere", remedy))
        elif not postfix.may_start(smtpd):
            found.append(problem(check, f"{smtpd.name} takes no mail: without an end of relaying, smtpd(8) does not start", remedy))
        elif not postfix.takes(smtpd, known=True):
            text = f"{smtpd.name} takes no mail from anybody: reject or defer in one of its lists, with no permit before it"
            found.append(problem(check, text, f"take it out, then postfix reload; compare {MAIN_CF}"))
    if doors and not found and not any(postfix.takes(smtpd) for smtpd in doors):
        text = "no smtpd takes mail of other hosts: each wants a login or a client in mynetworks"
        found.append(warning(check, text, f"compare the line smtp of {MASTER_CF}"))
    tables = any("_access" in postfix.value(smtpd, name) for smtpd in doors for name in LISTS)
    but = ", if tables permit nothing else" if tables else ""
    yield from found or [ok(check, f"other hosts can bring mail for our domains, and have none relayed{but}")]


def check_logins(postfix: Postfix) -> Findings:
    """Can users and apps log in somewhere, and is it Dovecot that checks their tokens and passwords?"""
    doors = [smtpd for smtpd in postfix.smtpds if postfix.value(smtpd, "smtpd_sasl_auth_enable") == "yes"]
    if not doors:
        remedy = f"take the lines submissions and submission from {MASTER_CF}, then postfix reload"
        yield warning("postfix-login", "no smtpd has smtpd_sasl_auth_enable = yes, so nobody can log in to send", remedy)
    sockets: dict[str, list[PostfixService]] = defaultdict(list)
    for smtpd in doors:
        kind, path, offered = (postfix.value(smtpd, f"smtpd_sasl_{name}") for name in ("type", "path", "mechanism_filter"))
        if kind != "dovecot":
            text, setting = "not Dovecot decides who has logged in", "smtpd_sasl_type = dovecot, smtpd_sasl_path = private/auth"
            yield problem("postfix-login", f"{smtpd.name}: {text}", f"main.cf: {setting}, then postfix reload")
        elif offered and not any(offers(split_list(offered.lower()), name) for name in TOKENS):
            text, setting = "no user can log in with a token", "smtpd_sasl_mechanism_filter = !external, static:rest"
            yield problem("postfix-login", f"{smtpd.name}: {text}", f"main.cf: {setting}, then postfix reload")
        else:
            yield ok("postfix-login", f"{smtpd.name}: Dovecot decides who has logged in")
            if path.startswith("inet:"):
                yield skipped("postfix-access", f"can Postfix connect to {path}? {UNTRIED}")
            else:
                sockets[postfix.path_of(f"unix:{path.replace('unix:', '', 1)}", smtpd.chroot)].append(smtpd)
    for path, services in sockets.items():
        yield from check_connection(postfix, services, path, f"{FROM_DOVECOT}; smtpd_sasl_path = private/auth")


def check_smtpd_certificates(postfix: Postfix) -> Findings:
    """Can each smtpd that offers TLS begin it? One that cannot says so in its log alone, and no login without TLS is allowed."""
    check = "postfix-certificate"
    remedy = "main.cf: let smtpd_tls_cert_file and smtpd_tls_key_file name a certificate and its key, then postfix reload"
    shown: dict[tuple[str, str], str] = {}  # by certificate and key: who shows it to clients
    for smtpd in postfix.smtpds:
        is_forced = postfix.value(smtpd, "smtpd_tls_wrappermode") == "yes"
        is_forced = is_forced or postfix.value(smtpd, "smtpd_tls_security_level") in ("encrypt", "dane", "dane-only")
        chain = split_list(postfix.value(smtpd, "smtpd_tls_chain_files"))  # which takes the place of the others
        found = [(path, path if len(chain) == 1 else "") for path in chain]
        for names in () if chain else (("cert", "key"), ("eccert", "eckey"), ("dcert", "dkey")):
            path, key = (postfix.value(smtpd, f"smtpd_tls_{name}_file") for name in names)
            found += [(path, key)] if path not in ("", "none") else []
        if is_forced and not found:
            yield problem(check, f"{smtpd.name} demands TLS and has no certificate, so nobody can use it", remedy)
        elif is_forced or postfix.value(smtpd, "smtpd_tls_security_level") == "may":
            shown.update((certificate, smtpd.name) for certificate in found if certificate not in shown)
    for (path, key), name in shown.items():
        yield from check_certificate(check, name, path, key, remedy)


def offers(mechanism_filter: Sequence[str], name: str) -> bool:
    """Does smtpd_sasl_mechanism_filter let this mechanism through?"""
    fitting = (word for word in mechanism_filter if word.lstrip("!").startswith("static:") or word.lstrip("!") == name)
    return not next(fitting, "!").startswith("!")


def check_local_mail(policy: mailcloak.PolicyConfig, sockets: mailcloak.SocketsConfig, postfix: Postfix) -> Findings:
    """Mail by sendmail(1), of cron, PHP or mail(1), meets no smtpd: is mailcloak asked about it all the same?"""
    check = "postfix-sendmail"
    pickup, origin = postfix.service("pickup"), postfix.main["myorigin"]
    port = re.search(r":(\w+)$", postfix.value(pickup, "content_filter"))
    doors = [smtpd for smtpd in postfix.smtpds if port and re.fullmatch(rf"(.*:)?{port[1]}/inet", smtpd.name)]
    users = [user for user in split_list(postfix.main["authorized_submit_users"]) if user != "root"]  # who always may
    with contextlib.suppress(OSError):
        if origin.startswith("/"):  # Debian: /etc/mailname
            with open(origin, encoding="utf-8", errors="replace") as file:
                origin = file.readline().strip()
    sample = f"as in {MASTER_CF}, then postfix reload"
    if not pickup:
        yield ok(check, "master.cf has no pickup, so no program of this host can send by sendmail(1)")
    elif any(list(postfix.uses(smtpd, sockets.policy_socket)) for smtpd in doors):  # check_smtpd says whether it is asked well
        if "no_address_mappings" not in postfix.value(pickup, "receive_override_options"):
            text = "mail by sendmail(1) goes through an smtpd, but its aliases are replaced before, and some are then refused"
            yield problem(check, text, f"master.cf, pickup: -o receive_override_options=no_address_mappings, {sample}")
        elif origin.lower() in policy.domain:
            text = f"mail of cron is from USER@{origin} (myorigin), and so refused as mail of a client that has not logged in"
            yield warning(check, text, "main.cf: myorigin = $myhostname, or another name that is not in policy.domain")
        else:
            yield ok(check, f"mail by sendmail(1) goes through {doors[0].name}, which asks mailcloak")
    elif not any("static:" in word for word in users):
        who = " and ".join(["root", *users])
        yield ok(check, f"only {who} may use sendmail(1); mailcloak is not asked about their mail")
    else:
        text = "every user of this host can send by sendmail(1), as any sender and to anybody: mailcloak is not asked"
        yield warning(check, text, f"master.cf: pickup through an smtpd, {sample}; or main.cf: authorized_submit_users = root")


def check_alias_maps(sockets: mailcloak.SocketsConfig, postfix: Postfix) -> Findings:
    """Does cleanup, which rewrites recipients, ask for aliases?"""
    askers = {name: service for name, service in postfix.services.items() if service.command in ("cleanup", "smtpd")}
    places = [("main.cf", postfix.main["virtual_alias_maps"], any(service.chroot for service in askers.values()))]
    for name, service in askers.items():
        if "virtual_alias_maps" in service.overrides:
            places.append((f"master.cf, {name}", service.overrides["virtual_alias_maps"], service.chroot))
    for smtpd in postfix.smtpds:
        options = postfix.value(smtpd, "receive_override_options")
        if "no_address_mappings" in options and not postfix.value(smtpd, "content_filter"):
            text = f"{smtpd.name}: no_address_mappings without a content_filter, so no alias leads anywhere"
            yield problem("postfix-aliases", text, f"take no_address_mappings out of receive_override_options of {smtpd.name}")
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
    """Does Postfix take mail for our domains and deliver it, and take none for others of which it does not know the recipients?"""
    domains = sorted(policy.domain | ({policy.mailbox_domain} - {""}))
    try:
        lists = {name: postfix.find(name, domains) for name in CLASSES}
        transports = postfix.find("transport_maps", [key for domain in domains for key in transport_keys(domain)])
    except (CommandFailed, OSError) as exc:
        yield skipped("postfix-domains", f"does Postfix take mail for {', '.join(domains)}, and deliver it? {exc}")
        return
    found: list[Finding] = []
    routes: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for domain in domains:
        places = [name for name in CLASSES if domain in lists[name]]
        if places == ["mydestination", "relay_domains"]:  # as by default in an old Postfix; only the first counts
            places.pop()
        if len(places) > 1:
            text, remedy = f"{domain} is in {' and in '.join(places)}", "leave it only in virtual_mailbox_domains"
        elif places == ["virtual_alias_domains"]:
            text, remedy = f"{domain} is in virtual_alias_domains, where it has no mailboxes", "move it to virtual_mailbox_domains"
        elif not places:
            text = f"Postfix takes no mail for {domain}"
            key = "mailbox_domain" if domain == policy.mailbox_domain else "domain"
            remedy = f"correct policy.{key}; if it is right, main.cf: add {domain} to virtual_mailbox_domains, then postfix reload"
        else:
            setting = "transport_maps"
            transport = next((transports[key] for key in transport_keys(domain) if key in transports), ":")
            if transport.startswith(":"):  # as a line "example.org :" says as well: that of the class
                setting = CLASSES[places[0]][0]
                transport = postfix.value(postfix.service("trivial-rewrite"), setting)
            routes[places[0], setting, transport].append(domain)
            continue
        found.append(problem("postfix-domains", text, remedy))
    unchecked = [
        word
        for word in split_list(postfix.main["virtual_mailbox_domains"].lower())
        if mailcloak.domain_to_ascii(word) not in (*policy.domain, policy.mailbox_domain) and not re.search("[:/!]", word)
    ]
    text = "Postfix takes mail for domains that are not in policy.domain, and does not know which recipients exist"
    remedy = "add them to policy.domain, or take them out of virtual_mailbox_domains"
    found += about(unchecked, warning("postfix-domains", text, remedy))
    yield from found or [ok("postfix-domains", f"Postfix takes mail for {', '.join(domains)}")]
    for (name, setting, transport), handled in routes.items():
        yield from check_route(postfix, CLASSES[name][1], setting, transport, ", ".join(handled))


def transport_keys(domain: str) -> list[str]:
    """What Postfix looks up in transport_maps for all addresses of a domain: the first that is there counts. Source: transport(5)."""
    labels = domain.split(".")
    return [f"mailcloak-doctor@{domain}", domain, *(f".{'.'.join(labels[start:])}" for start in range(1, len(labels))), "*"]


def check_route(postfix: Postfix, table: str, setting: str, transport: str, domains: str) -> Findings:
    """Is mail for these domains delivered by what this setting names, and is nobody refused by a table besides mailcloak?"""
    service = postfix.services.get(f"{transport.partition(':')[0]}/unix")
    if service and service.command == "local":
        setting = "mailbox_transport"
        transport = postfix.value(service, setting) or postfix.value(service, "fallback_transport") or transport
        service = postfix.services.get(f"{transport.partition(':')[0]}/unix")
    command, mailboxes = service.command if service else "", postfix.value(service, "virtual_mailbox_maps")
    why = {
        "": f"master.cf has no service {transport.partition(':')[0]}",
        "error": "error(8) delivers nothing",
        "discard": "discard(8) throws it away",
        "local": "local(8) delivers only to accounts of this host, which users of Keycloak do not have",
    }
    if command == "virtual" and not mailboxes:
        why["virtual"] = "virtual(8) delivers only to who is in virtual_mailbox_maps, which is empty"
    if command in why:
        text = f"{setting} = {transport}: mail for {domains} is lost or waits: {why[command]}"
        remedy = f"main.cf: {setting} = {TO_DOVECOT}, then postfix reload"
        if setting == "transport_maps":
            remedy = f"transport_maps: let {domains} lead to {TO_DOVECOT}, then postfix reload"
        if not service:
            remedy = add_client(transport) or remedy
        yield problem("postfix-delivery", text, remedy)
    elif command == "virtual":
        yield skipped("postfix-delivery", f"has {mailboxes} a mailbox for each user? virtual(8) delivers to no other")
    elif service and (path := postfix.path_of(transport.partition(":")[2], service.chroot)):
        yield ok("postfix-delivery", f"mail for {domains} goes to {transport}")
        yield from check_connection(postfix, [service], path, FROM_DOVECOT)
    else:
        yield skipped("postfix-delivery", f"mail for {domains} goes to {transport}; does it arrive? {UNTRIED}")
    asking = (smtpd for smtpd in postfix.smtpds if postfix.value(smtpd, "smtpd_reject_unlisted_recipient") == "yes")
    lists = {postfix.value(smtpd, table) for smtpd in asking} - {""} if command != "virtual" else ()
    for value in sorted(lists):
        text = f"Postfix refuses who is not in {table} = {value}, whatever mailcloak says"
        make = problem if "passwd.byname" in value else warning
        yield make("postfix-recipients", text, f"main.cf: leave {table} empty, then postfix reload: mailcloak knows who exists")


def add_client(transport: str) -> str:
    """How to give master.cf a service of Postfix's own that this transport names; "" where it names another."""
    name = transport.partition(":")[0]
    return f"master.cf: add the line {name} unix - - n - - {CLIENTS[name]}, then postfix reload" if name in CLIENTS else ""


def check_transports(postfix: Postfix) -> Findings:
    """Has master.cf what takes mail to other hosts, and to the content filters, the one for mail by sendmail(1) among them?"""
    uses = [("default_transport", postfix.value(postfix.service("trivial-rewrite"), "default_transport"))]
    for service in postfix.services.values():
        if service.command in ("smtpd", "pickup"):
            uses.append((f"content_filter of {service.name}", postfix.value(service, "content_filter")))
    for name, places in grouped((transport.partition(":")[0], place) for place, transport in uses if transport).items():
        if f"{name}/unix" in postfix.services:
            continue
        text = f"master.cf has no service {name}, and the mail waits that {' and '.join(places)} would send there"
        yield problem("postfix-delivery", text, add_client(name) or "add it to master.cf, or name another; then postfix reload")


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
    twice = warning("postfix-settings", "main.cf sets these twice, and the last line counts", "main.cf: keep one line of each")
    yield from about(postfix.doubled, twice)


# ---------------------------------------------------------------------------------------------------------------------------------
# Dovecot
# The query by which it lets apps in is tried on a database in memory; and can its user read the real one?
# ---------------------------------------------------------------------------------------------------------------------------------

SQL_SAMPLES = f"{EXAMPLES}/dovecot-2.3/dovecot-sql.conf.ext or {EXAMPLES}/dovecot-2.4/dovecot.conf"
OAUTH2_SAMPLES = f"{EXAMPLES}/dovecot-2.3/dovecot-oauth2.conf.ext or {EXAMPLES}/dovecot-2.4/dovecot.conf"
TOKEN_URLS = {  # that name a realm, and whether Dovecot itself asks them or compares them; the last is told to mail programs
    "introspection_url": True,
    "tokeninfo_url": True,
    "issuers": False,  # a name, whatever the way to Keycloak is
    "openid_configuration_url": False,
}
UNREACHED = "no answer"  # also what try_as() says
TOKENS, PASSWORDS = {"oauthbearer", "xoauth2"}, {"plain", "login", "scram-sha-256"}


class PasswordQuery(NamedTuple):
    """How Dovecot asks for an app's password."""

    place: str
    query: str
    database: str  # the path; "" if it is not said
    percent_doubled: bool  # 2.3: %% is a percent sign, %u a variable; 2.4: only %{name} is one


class Trust(NamedTuple):
    """Whose certificates Dovecot takes when it asks Keycloak; with neither a file nor a folder, those that OpenSSL takes on this host."""

    setting: str  # by which a file is named
    file: str  # of CA certificates
    folder: str
    takes_all: str  # the setting by which it takes all certificates, if it does
    by_root: bool  # 2.4: the process that reads the configuration reads the file as well


class TokenUrl(NamedTuple):
    """One address that says whose tokens are good."""

    place: str
    setting: str  # of TOKEN_URLS
    url: str
    trust: Trust


class Dovecot:
    """Dovecot, as doveconf shows it. Raises CommandFailed, and OSError where a file that it names cannot be read."""

    def __init__(self, path: Optional[str]) -> None:
        self._where = ("-c", path) if path else ()
        self.settings = run_program("doveconf", *self._where, "-n", "-P")[0]  # with URLs that hold a password, which are not shown
        if not self.settings:
            raise CommandFailed("doveconf says nothing")
        self.mechanisms = set(split_list(self._value("auth_mechanisms").lower()))
        self.auth_user, self.worker_user = self._user_of("auth"), self._user_of("auth-worker")
        self.worker_groups = self._value("service/auth-worker/extra_groups")
        self.delivery_format = self._value("auth_username_format", "-f", "protocol=lmtp")
        self.queries = list(find_password_queries(self.settings))
        self.token_urls = list(find_token_urls(self.settings))

    def _value(self, name: str, *options: str) -> str:
        return run_program("doveconf", *self._where, *options, "-h", name)[0].strip()

    def _user_of(self, service: str) -> str:
        internal = self._value("default_internal_user")
        return re.sub(r"\$(SET:)?default_internal_user", internal, self._value(f"service/{service}/user"))

    def missing_driver(self) -> str:
        """The file of its driver for SQLite if that is not installed, "" if Dovecot has it. Raises CommandFailed."""
        drivers = re.findall("^SQL driver( plugin)?s:(.*)$", run_program("dovecot", "--build-options")[0], re.MULTILINE)
        if any("sqlite" in names.split() and not is_plugin for is_plugin, names in drivers):
            return ""
        path = os.path.join(self._value("mail_plugin_dir", "-d"), "auth", "libdriver_sqlite.so")  # where it was built to look
        return "" if os.path.exists(path) else path


@listed
def check_dovecot(host: Installation) -> Findings:
    """Who may log in, and the passdb for apps: on this database, with a good query, and allowed to read."""
    try:
        dovecot = Dovecot(host.options.dovecot_config)
    except CommandFailed as exc:
        yield from explain_doveconf(exc)
        return
    except OSError as exc:
        remedy = AS_ROOT if os.geteuid() else "correct args of the passdb"
        yield skipped("dovecot", f"{exc.filename}: {exc.strerror}", remedy)
        return
    offered, queries = dovecot.mechanisms, dovecot.queries
    yield from check_mechanisms(host, offered)
    if queries or dovecot.token_urls:  # else nobody has set it up for mailcloak yet
        yield from check_passdbs(dovecot.settings)
        yield from check_mailboxes(dovecot.settings)
        yield from check_names(host, dovecot)
        yield from check_dovecot_certificate(dovecot.settings)
    if offered & TOKENS and host.static_users is None:
        yield from check_realm(host, dovecot.settings, dovecot.token_urls)
        yield from check_trust(host, dovecot)
    if not queries:
        if host.apps:
            remedy = f"take the passdb from {SQL_SAMPLES}"
            yield warning("dovecot", f"Dovecot has no SQLite passdb, so {common.counted(host.apps, 'app')} cannot log in", remedy)
        elif host.apps is None:
            yield skipped("dovecot", f"Dovecot asks no SQLite database; are there apps that would need one? {NO_DATABASE}")
        else:
            yield ok("dovecot", "it asks no SQLite database, and there are no apps")
        return
    yield from check_driver(dovecot)
    for found in queries:
        if host.database_path and not same_path(found.database, host.database_path):
            remedy = f"name {host.database_path} there, then doveadm reload"
            yield problem("dovecot", f"{found.place} reads {found.database or 'no file'}, not {host.database_path}", remedy)
        yield from check_query(found)
    path = host.database_path or queries[0].database
    yield from check_dovecot_access(host, path, dovecot.worker_user, dovecot.worker_groups)


def explain_doveconf(exc: CommandFailed) -> Findings:
    """Why doveconf says nothing of Dovecot's settings; where it refuses them, Dovecot does not start."""
    if exc.has_refused and os.geteuid() != 0 and "Permission denied" in exc.text:
        yield skipped("dovecot", exc.text, AS_ROOT)
    elif exc.has_refused:
        remedy = "fix it until doveconf -n is content, or name another file with --dovecot-config"
        if "dovecot_config_version" in exc.text:  # what only 2.4 knows, and what it wants first
            theirs, ours, sample = "2.3", "2.4", f"{EXAMPLES}/dovecot-2.4"
            if "Unknown" in exc.text:
                theirs, ours, sample = "2.4", "2.3", f"{EXAMPLES}/dovecot-2.3"
            remedy = f"this file is for Dovecot {theirs}, and {ours} is installed: take the files of {sample}, then restart Dovecot"
        if "Unknown setting: sqlite" in exc.text:
            remedy = "install the package dovecot-sqlite (apt-get install dovecot-sqlite), then restart Dovecot"
        yield problem("dovecot", f"Dovecot cannot read its configuration: {exc.text}", remedy)
    else:
        yield skipped("dovecot", exc.text, "name Dovecot's configuration with --dovecot-config" if exc.is_there else "")


def check_driver(dovecot: Dovecot) -> Findings:
    """Can Dovecot open a database of SQLite? In the packages of most systems the driver is one of its own."""
    try:
        missing = dovecot.missing_driver()
    except CommandFailed as exc:
        yield skipped("dovecot", f"has Dovecot its driver for SQLite? {exc}")
        return
    if missing:
        text = f"Dovecot has no driver for SQLite, so its auth process does not start, and nobody can log in: there is no {missing}"
        yield problem("dovecot", text, "install the package dovecot-sqlite (apt-get install dovecot-sqlite), then restart Dovecot")


def check_mailboxes(settings: str) -> Findings:
    """Are the accounts there to which Dovecot gives the mailboxes?"""
    check = "dovecot-mailboxes"
    named = {(kind, name) for kind, name in find_owners(settings) if "%" not in name}  # a variable is another one for each user
    users = sorted(name for kind, name in named if kind == "uid")
    missing = sorted(name for kind, name in named if kind == "uid" and not is_account(pwd.getpwnam, name))
    groups = sorted(name for kind, name in named if kind == "gid" and not is_account(grp.getgrnam, name) and name not in missing)
    for kind, names, command in (
        ("user", missing, "useradd --system --create-home --home-dir /var/vmail --shell /usr/sbin/nologin"),  # makes the group too
        ("group", groups, "groupadd --system"),
    ):
        for name in names:
            text = f"Dovecot's settings give the mailboxes to {kind} {name}, and there is no such {kind}, so it stores no mail"
            yield problem(check, text, f"{command} {shlex.quote(name)}, then restart Dovecot; or name another {kind}")
    if not users:
        yield skipped(check, "which user owns the mailboxes? Dovecot's settings name none")
    elif not missing and not groups:
        yield ok(check, f"the mailboxes belong to user {', '.join(users)}")


def check_names(host: Installation, dovecot: Dovecot) -> Findings:
    """Does mail arrive in the mailbox that its user reads? The user logs in by a claim of the token, mail comes for USERNAME@DOMAIN."""
    check = "dovecot-names"
    named = [user for user in (host.users or {}).values() if user.email]
    good_claims = ["preferred_username"]
    if named and all(user.email == user.username for user in named):
        good_claims.append("email")
    wrong = [(place, claim) for place, claim in find_login_names(dovecot.settings) if claim not in good_claims]
    for place, claim in wrong:
        text = f"users read the mailbox that is named by their {claim}, and mail goes to the one that is named by their username"
        yield problem(check, text, f"{place}: username_attribute = preferred_username, then doveadm reload")
    if wrong:  # first things first: with another claim, other mailboxes are right
        return
    words = [word.strip() for word in re.sub(r"^%L?\{?|\}$", "", dovecot.delivery_format).split("|")]
    cuts = words[0] in ("n", "username") or "username" in words[1:]
    if not cuts and (words[0] not in ("u", "user") or set(words[1:]) - {"lower"}):
        yield skipped(check, f"to which mailboxes does mail go with auth_username_format = {dovecot.delivery_format}?")
        return
    if host.users is None:
        yield skipped(check, f"is the domain part of a mailbox's name? {NO_USERS}")
        return
    lost = [user.username for user in host.users.values() if user.receives and ("@" in user.username) == cuts]
    named_how, other = "with", '%{user | username | lower}" in 2.4, "%Ln" in 2.3'
    if cuts:
        named_how, other = "without", '%{user | lower}" in 2.4, "%Lu" in 2.3'
    text = f"these users do not read the mailbox to which Dovecot delivers their mail, which is named {named_how} the domain"
    elsewhere = problem(check, text, f'protocol lmtp {{ auth_username_format = "{other} }}, then doveadm reload')
    yield from about(lost, elsewhere) or [ok(check, "mail is delivered to the mailbox that its user reads")]


def find_login_names(settings: str) -> Iterator[tuple[str, str]]:
    """Where it is said which claim of a token is the name of its user, and the claim. Raises OSError."""
    places = [("dovecot.conf", find_block(settings, "oauth2"))]
    places += [(passdb["args"], text) for _, passdb, text in find_passdbs(settings) if passdb.get("driver") == "oauth2" and text]
    for place, text in places:
        if text:
            options = read_settings(text)
            yield place, options.get("username_attribute") or options.get("oauth2_username_attribute") or "email"  # its default


def check_dovecot_certificate(settings: str) -> Findings:
    """Can mail programs begin TLS?"""
    check = "dovecot-certificate"
    block = {f"ssl_server_{name}": value for name, value in read_settings(find_block(settings, "ssl_server")).items()}
    top = {**block, **read_top(settings)}
    is_new = "dovecot_config_version" in top
    names = ("ssl_server_cert_file", "ssl_server_key_file") if is_new else ("ssl_cert", "ssl_key")
    path, key = (top.get(name, "").lstrip("<") for name in names)
    remedy = f"dovecot.conf: let {' and '.join(names)} name a certificate and its key, then doveadm reload"
    if top.get("ssl") == "no" or any("key_password" in name for name in top):
        yield skipped(check, "is Dovecot's certificate good? It offers no TLS, or its key has a password")
    elif not path or not key:
        yield problem(check, f"Dovecot has no {names[1] if path else names[0]}, so no mail program can begin TLS", remedy)
    elif not is_new and not all(top[name].startswith("<") for name in names):
        text = f"{names[0]} and {names[1]} of Dovecot 2.3 are a < and a path; without it the path itself is the certificate"
        yield problem(check, text, f"dovecot.conf: {names[0]} = <{path}, {names[1]} = <{key}, then doveadm reload")
    else:
        yield from check_certificate(check, "Dovecot", path, key, remedy)


def find_owners(settings: str) -> Iterator[tuple[str, str]]:
    """("uid" or "gid", name or number) of each owner of mailboxes in the output of doveconf -n."""
    top = read_top(settings)
    yield from ((kind, top[f"mail_{kind}"]) for kind in ("uid", "gid") if top.get(f"mail_{kind}"))
    for body in re.findall(r"^userdb\b[^{\n]*\{\n(.*?)^\}", settings, re.MULTILINE | re.DOTALL):
        for name, value in read_settings(body).items():
            kind = name.partition(":")[0]
            if kind in ("uid", "gid"):  # 2.4
                yield kind, value
            elif name in ("args", "default_fields", "override_fields"):  # 2.3
                yield from re.findall(r"(?:^|\s)([ug]id)=(\S+)", value)


def is_account(look_up: Callable[[str], Any], name: str) -> bool:
    """Is there an account of this name? A number needs none."""
    try:
        return name.isdigit() or bool(look_up(name))
    except KeyError:
        return False


def check_mechanisms(host: Installation, offered: set[str]) -> Findings:
    """Can users log in with a token, apps with a password, and nobody in another way?"""
    remedy = "auth_mechanisms = plain login oauthbearer xoauth2, then doveadm reload"
    found: list[Finding] = []
    if not offered & TOKENS:
        found.append(warning("dovecot-mechanisms", "no user can log in with a token: neither OAUTHBEARER nor XOAUTH2", remedy))
    if not offered & PASSWORDS and host.apps:
        found.append(warning("dovecot-mechanisms", "no app can log in: neither PLAIN nor LOGIN", remedy))
    others = warning("dovecot-mechanisms", "mailcloak believes logins by these too, whatever Dovecot checks for them", remedy)
    found += about(sorted(offered - TOKENS - PASSWORDS), others)
    yield from found or [ok("dovecot-mechanisms", f"users log in with a token, apps with a password: {' '.join(sorted(offered))}")]


def check_passdbs(settings: str) -> Findings:
    """Does anything else than a token or an app's token let somebody log in? mailcloak takes such a login for the user of that name."""
    for head, passdb, _ in find_passdbs(settings):
        driver = passdb.get("driver") or head.partition(" ")[2]
        mechanisms = set(split_list(passdb.get("mechanisms", passdb.get("mechanisms_filter", "")).lower()))
        if driver not in ("oauth2", "sql") and passdb.get("deny") != "yes" and not (mechanisms and mechanisms <= TOKENS):
            text = f"passdb {driver} lets others than apps log in by password, and mailcloak takes each for the user of that name"
            yield problem("dovecot-mechanisms", text, "take this passdb out of Dovecot's configuration, then doveadm reload")


def find_passdbs(settings: str) -> Iterator[tuple[str, dict[str, str], str]]:
    """Head, settings and text of the args file (2.3, "" without one) of each passdb in the output of doveconf -n. Raises OSError."""
    for head, body in re.findall(r"^(passdb\b[^{\n]*?) *\{\n(.*?)^\}", settings, re.MULTILINE | re.DOTALL):
        passdb, text = read_settings(body), ""
        if passdb.get("driver") in ("sql", "oauth2") and "args" in passdb:
            with open(passdb["args"], encoding="utf-8", errors="replace") as file:
                text = file.read()
        yield head, passdb, text


def find_block(settings: str, head: str) -> str:
    """What stands in the block of this head in the output of doveconf -n, itself in that form; "" if there is none."""
    match = re.search(rf"^{head} *\{{\n(.*?)^\}}", settings, re.MULTILINE | re.DOTALL)
    return textwrap.dedent(match[1]) if match else ""


def read_top(settings: str) -> dict[str, str]:
    """The settings of the output of doveconf -n that stand in no block."""
    return read_settings(re.sub(r"^\s.*\n", "", settings, flags=re.MULTILINE))


def find_token_urls(settings: str) -> Iterator[TokenUrl]:
    """All that says whose tokens are good: oauth2 of doveconf -n (2.4), args of a passdb (2.3). Raises OSError."""
    client = {}
    for block in (settings, find_block(settings, "oauth2")):
        client.update(read_settings(find_block(block, "ssl_client")))
    takes_all = "ssl_client_require_valid_cert" if client.get("require_valid_cert") == "no" else ""
    trust = Trust("ssl_client_ca_file", client.get("ca_file", ""), client.get("ca_dir", ""), takes_all, by_root=True)
    texts = [("dovecot.conf", settings, trust)]
    for _, passdb, text in find_passdbs(settings):
        if passdb.get("driver") == "oauth2" and text:
            options = read_settings(text)
            paths = options.get("tls_ca_cert_file", ""), options.get("tls_ca_cert_dir", "")
            takes_all = "tls_allow_invalid_cert" if options.get("tls_allow_invalid_cert") == "yes" else ""
            trust = Trust("tls_ca_cert_file", *paths, takes_all, by_root=False)
            texts.append((passdb["args"], text, trust))
    for place, text, trust in texts:
        for setting, value in re.findall(rf"^[ \t]*(?:oauth2_)?({'|'.join(TOKEN_URLS)})[ \t]*=[ \t]*(.*)$", text, re.MULTILINE):
            yield from (TokenUrl(place, setting, url, trust) for url in value.split())


def check_trust(host: Installation, dovecot: Dovecot) -> Findings:
    """Does Dovecot trust Keycloak's certificate? Tried as the user that Dovecot is, with the CA certificates that it knows."""
    check = "dovecot-trust"
    ours = host.keycloak.ca_file if host.keycloak else ""
    for place, setting, url, trust in dovecot.token_urls:
        if not TOKEN_URLS[setting] or not url.lower().startswith("https:"):
            continue
        user, server = "root" if trust.by_root else dovecot.auth_user or "root", urllib.parse.urlsplit(url).hostname
        if trust.takes_all:
            text = f"Dovecot takes any certificate for that of {server}, so who answers in its place decides who may log in"
            yield problem(check, text, f"{place}: take {trust.takes_all} out, then doveadm reload")
            continue
        question = f"does Dovecot trust the certificate of {server}?"
        why, untried = try_as(user, functools.partial(try_certificate, url, trust), check, question)
        yield from untried
        text = f"Dovecot does not trust the certificate of {server}, so no user can log in with a token"
        if why.startswith(UNREACHED):
            yield skipped(check, f"{question} It gave {why}")
        elif why.startswith("may not"):
            yield problem(check, f"{text}: user {user} {why}", access_remedy(why, user, "chmod o+{bit} {path}"))
        elif why:
            change = f"{trust.setting} = FILE with the certificate of its CA, as in keycloak.ca_file"
            if ours and not same_path(ours, trust.file):
                change = f"{trust.setting} = {ours}, as in keycloak.ca_file"
            elif trust.file and not ours:
                change = f"take {trust.setting} out, to trust what this host trusts"
            yield problem(check, f"{text}: {why}", f"{place}: {change}; then doveadm reload")
        elif not untried:
            yield ok(check, f"Dovecot trusts the certificate of {server}")


def try_certificate(url: str, trust: Trust) -> str:
    """Why this process does not trust the server of an https URL; "" if it does. It begins with UNREACHED where that is not known."""
    server = urllib.parse.urlsplit(url)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for path in filter(None, (trust.file, trust.folder)):
        why = why_not(path, os.R_OK)
        if why:
            return why
    try:
        if trust.file or trust.folder:
            context.load_verify_locations(trust.file or None, trust.folder or None)
        else:
            context.set_default_verify_paths()
    except OSError:
        return f"there is no certificate in {trust.file}"
    try:
        with socket.create_connection((server.hostname or "", server.port or 443), common.ANSWER_SECONDS) as connection:
            context.wrap_socket(connection, server_hostname=server.hostname).close()
    except ssl.SSLCertVerificationError as exc:
        return exc.verify_message
    except OSError as exc:
        return f"{UNREACHED}: {exc.strerror or exc}"
    return ""


def check_realm(host: Installation, settings: str, token_urls: Sequence[TokenUrl]) -> Findings:
    """Are the users who log in those that the daemon knows? Of a URL only host and realm are shown: it may hold a secret."""
    check = "dovecot-realm"
    keycloak = host.keycloak
    if keycloak is None:
        yield skipped(check, f"which realm should Dovecot take tokens of? {NO_CONFIG}")
        return
    if not re.search(r"\boauth2", settings):
        remedy = f"take the oauth2 settings from {OAUTH2_SAMPLES}, then doveadm reload"
        yield warning(check, "no user can log in with a token: Dovecot has no oauth2 settings", remedy)
        return
    server = urllib.parse.urlsplit(keycloak.base_url).hostname
    ours = f"{keycloak.base_url}/realms/{urllib.parse.quote(keycloak.realm)}"
    found: list[Finding] = []
    for place, setting, url, _ in token_urls:
        parts = urllib.parse.urlsplit(url)
        realm = re.search("/realms/([^/]+)", parts.path)
        # where Keycloak gave the users, the realm of the configuration is there
        unless = "" if host.users else "correct keycloak.realm; if it is right, "
        remedy = f"{unless}{place}: let {setting} begin with {ours}, as in {OAUTH2_SAMPLES}; then doveadm reload"
        if realm and urllib.parse.unquote(realm[1]) != keycloak.realm:
            names = f"{setting} names realm {urllib.parse.unquote(realm[1])}, and the daemon asks realm {keycloak.realm}"
            text = f"{names}: who logs in may be another user than it thinks, or one that it does not know"
            found.append(problem(check, text, remedy))
        elif parts.hostname != server and TOKEN_URLS[setting]:
            remedy = remedy.replace("keycloak.realm", "keycloak.base_url")
            text = f"{setting} names {parts.hostname}, and the daemon asks {server}: if they differ, so do their users"
            found.append(warning(check, text, remedy))
    if not any("/realms/" in each.url for each in token_urls):
        found.append(skipped(check, "of which realm are the tokens that Dovecot takes? Its settings name none"))
    yield from found or [ok(check, f"Dovecot takes tokens of realm {keycloak.realm}")]


def find_password_queries(settings: str) -> Iterator[PasswordQuery]:
    """The queries of all SQLite passdbs in the output of doveconf -n. Raises OSError where a file that it names cannot be read."""
    top = read_top(settings)
    for head, passdb, text in find_passdbs(settings):
        if passdb.get("driver") == "sql" and "args" in passdb:  # 2.3
            options = read_settings(text)
            if options.get("driver") == "sqlite":
                yield PasswordQuery(passdb["args"], options.get("password_query", ""), options.get("connect", ""), True)
        elif "query" in passdb and {**top, **passdb}.get("sql_driver") == "sqlite":  # 2.4
            yield PasswordQuery(head, passdb["query"], {**top, **passdb}.get("sqlite_path", ""), False)


def read_settings(text: str) -> dict[str, str]:
    """The settings of a file or block of Dovecot; a line goes on in the next where it ends in a backslash."""
    lines = re.sub(r"[ \t]*\\\n[ \t]*", " ", text).splitlines()
    pairs = (line.partition("=") for line in lines if not line.lstrip().startswith("#"))
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}


def check_query(found: PasswordQuery) -> Findings:
    """Try the query on apps, some of which may log in and some not; their names are those of the finding."""
    apps = (("apps", 1, None), ("apps that expire later", 1, 2**40), ("disabled apps", 0, None), ("expired apps", 1, 1))
    remedy = f"take the query from {SQL_SAMPLES}, then doveadm reload"
    try:
        with contextlib.closing(sqlite3.connect(":memory:")) as database:
            database.executescript(mailcloak.SCHEMA)
            rows = [(app[0], *app) for app in apps]
            database.executemany("INSERT INTO apps (secret_hash, app_id, enabled, expires_at) VALUES (?, ?, ?, ?)", rows)
            answers = {
                (app_id, service): database.execute(fill_query(found, app_id, service)).fetchall()
                for app_id in (*(app[0] for app in apps), "anybody")
                for service in ("smtp", "submission", "imap", "pop3", "lmtp")
            }
    except (sqlite3.Error, sqlite3.Warning) as exc:
        yield problem("dovecot-query", f"{found.place}: its query fails: {exc}", remedy)
        return
    except ValueError as exc:
        yield skipped("dovecot-query", f"{found.place}: {exc}", remedy)
        return
    good = ("apps", "apps that expire later")
    wrong = []
    if not all(len(answers[app_id, "smtp"]) == 1 and set(good) & set(answers[app_id, "smtp"][0]) for app_id in good):
        wrong.append("does not give the hash of an app that sends")
    let_in = [login for login, rows in answers.items() if rows]
    wrong += dict.fromkeys(f"lets {app_id} log in" for app_id, _ in let_in if app_id not in good)
    if any(app_id in good and service not in ("smtp", "submission") for app_id, service in let_in):
        wrong.append("lets apps log in to read mail")
    if wrong:
        yield problem("dovecot-query", f"{found.place}: its query {' and '.join(wrong)}", remedy)
    else:
        yield ok("dovecot-query", f"{found.place}: apps log in to send, while they are enabled and not expired")


def fill_query(found: PasswordQuery, user: str, service: str) -> str:
    """The query with Dovecot's variables put in. Raises ValueError for a variable that is not known here."""
    values = {"u": user, "n": user, "user": user, "username": user, "s": service, "service": service, "protocol": service}
    values.update({"d": "", "domain": "", "%": "%"})

    def put_in(match: re.Match[str]) -> str:
        value = values.get(match[1] or match[2])
        if value is None:
            raise ValueError(f"its query uses {match[0]}, which is not known here")
        return value

    one_letter = "[LU]?([A-Za-z%])" if found.percent_doubled else "()(?!)"
    return re.sub(rf"%(?:[LU]?\{{ *(\w*)[^}}]*\}}|{one_letter})", put_in, found.query)


def check_dovecot_access(host: Installation, path: str, user: str, groups: str) -> Findings:
    """Can the process that asks the database read it?"""
    if not user or user == "root":
        yield ok("dovecot-access", "Dovecot's auth-worker reads the database as root")
        return
    names = split_list(groups)
    missing = [name for name in names if not is_account(grp.getgrnam, name)]
    if missing:
        text = (
            f"Dovecot does not start: extra_groups of service auth-worker names {' and '.join(missing)}, and there is no such group"
        )
        group = host.daemon_group
        remedy = f"name {group} there, the group of the database"
        if group in missing:
            remedy = f"make it, with the daemon's user, by useradd --system --user-group {shlex.quote(group)}, as the README says"
        yield problem("dovecot-access", text, f"{remedy}; then restart Dovecot")
        return
    group_ids = [grp.getgrnam(name).gr_gid for name in names]
    why, untried = try_as(user, lambda: why_not(path, os.R_OK), "dovecot-access", f"can Dovecot read {path}?", groups=group_ids)
    yield from untried
    if why:
        group = host.daemon_group
        remedy = f"chgrp {group} {{path}}; chmod g+{{bit}} {{path}}"
        if group not in names:
            remedy = f"service auth-worker {{ extra_groups = {group} }}, the group of the database, then doveadm reload"
        remedy = access_remedy(why, user, remedy, groups=group_ids)
        yield problem("dovecot-access", f"Dovecot's auth-worker runs as user {user}, who {why}", remedy)
    elif not untried:
        yield ok("dovecot-access", f"Dovecot's auth-worker can read the database as user {user}")


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
    delete = f"sqlite3 {shlex.quote(host.database_path)} \"DELETE FROM aliases WHERE alias_email = 'ADDRESS'\""  # noqa: S608
    remedy = f"mailcloakctl aliases add ADDRESS USERNAME, which stores it in the right form; then {delete}"
    yield from about(misspelled, warning("alias-spelling", text, remedy))
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
    text = "these aliases lead to users who {} in Keycloak, and their mail is still taken"
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
    taken: list[str] = []
    others: list[str] = []
    for user in ours:
        local_part = user.email.rpartition("@")[0]
        if user.username not in (local_part, user.email):
            (taken if local_part in users else others).append(f"{user.email} ({user.username})")
    remedy = "set policy.mailbox_domain, so that every address leads to the mailbox of its user; or change the e-mails in Keycloak"
    text = "these e-mails have another user's name before the @, and their mail may end in that user's mailbox"
    yield from about(taken, problem("primary-name", text, remedy))
    text = "these e-mails have another name before the @ than their user, so the user has one mailbox for it and another one for their aliases"
    yield from about(others, warning("mailbox-name", text, remedy))


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
