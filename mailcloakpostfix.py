# mailcloakpostfix: the checks of Postfix. MIT licence, see LICENSE.
"""Check Postfix: the checks of mailcloakctl doctor with names that begin with postfix. mailcloakdoctor.py explains each.

Postfix is asked, not read: postconf says what is in force, as Postfix's own programs see it. There may be several instances, each with
its own directory (--postfix-config). An smtpd is judged by what applies to it: the -o options of its line in master.cf take the place of
main.cf's settings.

Contents: one instance; the check of all, and whether Postfix can connect; what each smtpd asks; clients and logins; mail of this host,
aliases, domains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import os
import re
import socket
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Optional

import mailcloak
import mailcloakcommon as common
from mailcloakfindings import (
    AS_ROOT,
    EXAMPLES,
    FIX_CONFIG,
    NO_CONFIG,
    SEE_FINDINGS,
    TOKENS,
    CommandFailed,
    Finding,
    Findings,
    Installation,
    about,
    check_certificate,
    grouped,
    ok,
    problem,
    run_program,
    same_path,
    skipped,
    split_list,
    try_as,
    warning,
)

MAIN_CF, MASTER_CF = f"{EXAMPLES}/postfix/main.cf", f"{EXAMPLES}/postfix/master.cf"
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


# ---------------------------------------------------------------------------------------------------------------------------------
# One instance
# What postconf says of main.cf and of each smtpd of master.cf, where -o options take the place of main.cf's settings.
# ---------------------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------------------
# The check of all instances, and whether Postfix can connect
# ---------------------------------------------------------------------------------------------------------------------------------


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
        host.postfix_delimiter = postfix.main["recipient_delimiter"]
        yield ok("postfix", f"{postfix.directory} has {common.counted(postfix.smtpds, 'smtpd service')}")
        yield from check_running(postfix)
        if not postfix.smtpds:
            text = f"{postfix.directory}/master.cf has no smtpd: no mail comes in"
            yield problem("postfix-smtpd", text, f"compare {MASTER_CF}")
        remedy = f"sockets.socket_owner_user: {postfix.main['mail_owner']}, with access to its directory; then restart the daemon"
        asked: dict[str, Any] = {}
        values = "\n".join(postfix.main.values())
        for path, each in mailcloak.misnamed_sockets(host.sockets, postfix.main["queue_directory"], values):
            yield problem("postfix-sockets", f"{each.key}: {each.text}", each.remedy)
            asked[each.key.partition(".")[2]] = path
        sockets = dataclasses.replace(host.sockets, **asked)  # so that it is said once
        for path in (sockets.policy_socket, sockets.socketmap_socket):
            yield from check_connection(postfix, postfix.smtpds, path, remedy, f"{SEE_FINDINGS} about the daemon and its sockets")
        for smtpd in postfix.smtpds:
            yield from check_smtpd(host, sockets, postfix, smtpd)
        yield from check_clients(postfix)
        yield from check_logins(postfix)
        yield from check_smtpd_certificates(postfix)
        yield from check_local_mail(host.policy, sockets, postfix)
        yield from check_alias_maps(sockets, postfix)
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


def try_to_connect(path: str) -> str:
    """Why this process cannot connect to the socket; "" if it can."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
        connection.settimeout(common.ANSWER_SECONDS)
        try:
            connection.connect(path)
        except OSError as exc:
            return exc.strerror or str(exc)
    return ""


# ---------------------------------------------------------------------------------------------------------------------------------
# What each smtpd asks mailcloak
# ---------------------------------------------------------------------------------------------------------------------------------


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
    context = use.options.get("policy_context", "")
    if context not in ("", "recipient", "sender"):
        text = f"{smtpd.name}: policy_context={context} in {use.list_name} says nothing, so refusals may name the wrong address"
        remedy = f"policy_context=recipient or policy_context=sender, as in {MAIN_CF}; then postfix reload"
        yield problem("postfix-smtpd", text, remedy)
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


# ---------------------------------------------------------------------------------------------------------------------------------
# Which clients an smtpd takes mail from, and how they log in
# ---------------------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------------------
# Mail of this host, aliases, domains
# What meets no smtpd, what cleanup asks, and where the mail for a domain goes.
# ---------------------------------------------------------------------------------------------------------------------------------


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
