# mailcloakfindings: what the checks of mailcloakctl doctor share. MIT licence, see LICENSE.
"""What the checks of mailcloakctl doctor share: those in mailcloakdoctor.py, mailcloakpostfix.py and mailcloakdovecot.py.

  Finding          one line of doctor: ok(), skipped(), warning(), problem() make it; about() adds the items that it speaks of
  Installation     what the checks look at, and what they find out for those after them
  try_as()         whether another user could do something, tried as that user; access_remedy() says what would let it
  run_program()    what a command of another program says, such as postconf and doveconf

A check takes the Installation and yields what it finds. Nothing here waits longer than mailcloakcommon.ANSWER_SECONDS.

Contents: findings, what the checks look at, other users, other programs.
"""

from __future__ import annotations

import argparse
import contextlib
import grp
import os
import pwd
import re
import select
import shlex
import shutil
import signal
import ssl
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Optional

import mailcloak
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
        self.postfix_delimiter: Optional[str] = None  # recipient_delimiter of main.cf, by which the others are set

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


# ---------------------------------------------------------------------------------------------------------------------------------
# Other programs
# What the checks of Postfix and those of Dovecot have in common.
# ---------------------------------------------------------------------------------------------------------------------------------

SYSTEM_PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin:/usr/local/sbin"
TOKENS = {"oauthbearer", "xoauth2"}  # the mechanisms by which users log in
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
