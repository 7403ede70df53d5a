# mailcloakdovecot: the checks of Dovecot. MIT licence, see LICENSE.
"""Check Dovecot 2.3 and 2.4: the checks of mailcloakctl doctor with names that begin with dovecot. mailcloakdoctor.py explains each.

Dovecot is asked, not read: doveconf says what its files set. Those of SQL and OAuth 2.0 in 2.3, which it only names, are read as well.
The query by which apps log in is tried, on a database in memory with an app of each kind: any query that answers rightly is good.

Contents: what doveconf says, the check, logins and tokens, mailboxes and the certificate, apps.
"""

from __future__ import annotations

import contextlib
import functools
import grp
import os
import pwd
import re
import shlex
import socket
import sqlite3
import ssl
import textwrap
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Optional

import mailcloak
import mailcloakcommon as common
from mailcloakfindings import (
    AS_ROOT,
    EXAMPLES,
    NO_CONFIG,
    NO_DATABASE,
    NO_USERS,
    TOKENS,
    CommandFailed,
    Finding,
    Findings,
    Installation,
    about,
    access_remedy,
    check_certificate,
    ok,
    problem,
    run_program,
    same_path,
    skipped,
    split_list,
    try_as,
    warning,
    why_not,
)

SQL_SAMPLES = f"{EXAMPLES}/dovecot-2.3/dovecot-sql.conf.ext or {EXAMPLES}/dovecot-2.4/dovecot.conf"
OAUTH2_SAMPLES = f"{EXAMPLES}/dovecot-2.3/dovecot-oauth2.conf.ext or {EXAMPLES}/dovecot-2.4/dovecot.conf"
TOKEN_URLS = {  # that name a realm, and whether Dovecot itself asks them or compares them; the last is told to mail programs
    "introspection_url": True,
    "tokeninfo_url": True,
    "issuers": False,  # a name, whatever the way to Keycloak is
    "openid_configuration_url": False,
}
UNREACHED = "no answer"  # also what try_as() says
PASSWORDS = {"plain", "login", "scram-sha-256"}


# ---------------------------------------------------------------------------------------------------------------------------------
# What doveconf says
# ---------------------------------------------------------------------------------------------------------------------------------


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
        self.delimiter = self._value("recipient_delimiter", "-f", "protocol=lmtp")
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


def read_settings(text: str) -> dict[str, str]:
    """The settings of a file or block of Dovecot; a line goes on in the next where it ends in a backslash."""
    lines = re.sub(r"[ \t]*\\\n[ \t]*", " ", text).splitlines()
    pairs = (line.partition("=") for line in lines if not line.lstrip().startswith("#"))
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}


# ---------------------------------------------------------------------------------------------------------------------------------
# The check
# ---------------------------------------------------------------------------------------------------------------------------------


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
        yield from check_logins(dovecot.settings)
        yield from check_mailboxes(dovecot.settings)
        yield from check_names(host, dovecot)
        yield from check_delimiter(host, dovecot)
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


# ---------------------------------------------------------------------------------------------------------------------------------
# How anybody logs in, and with whose tokens
# ---------------------------------------------------------------------------------------------------------------------------------


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


def check_logins(settings: str) -> Findings:
    """Does Dovecot ask at each login, and keep the whole name? Source: auth_cache_size, auth_username_format in Dovecot's documentation."""
    check = "dovecot-logins"
    top = read_top(settings)
    found: list[Finding] = []
    size, name_format = top.get("auth_cache_size", "0"), top.get("auth_username_format", "").strip('"')
    if not re.match(r"0+\b", size):
        text = f"auth_cache_size = {size}: an app's old token still logs in after it was replaced, or the app disabled"
        found.append(problem(check, text, "dovecot.conf: take auth_cache_size out, then restart Dovecot"))
    if not re.fullmatch(r"(%L?(u|\{ *user *(\| *lower *)?\}))?", name_format):
        text = f"auth_username_format = {name_format}: it changes the name of a login, which then counts as the user or app of the new name"
        remedy = "dovecot.conf: take auth_username_format out where it is in no protocol { }, then doveadm reload"
        found.append(problem(check, text, remedy))
    yield from found or [ok(check, "each login is asked for, under its whole name")]


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


# ---------------------------------------------------------------------------------------------------------------------------------
# Mailboxes and the certificate
# ---------------------------------------------------------------------------------------------------------------------------------


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
    yield from about(lost, elsewhere) or [ok(check, "mail for USERNAME@DOMAIN is delivered to the mailbox that this user reads")]


def check_delimiter(host: Installation, dovecot: Dovecot) -> Findings:
    """Does Dovecot cut off the same extensions? A mailbox that it does not find bounces, and another one may be found."""
    if host.policy is None:
        yield skipped("dovecot-delimiter", f"which recipient_delimiter should Dovecot have? {NO_CONFIG}")
        return
    ours, theirs, place = host.policy.recipient_delimiter, dovecot.delimiter, "the configuration of mailcloak"
    if host.postfix_delimiter is not None:  # postfix-delimiter says where mailcloak has another one
        ours, place = host.postfix_delimiter, "main.cf"
    differ = f"recipient_delimiter is {theirs!r} in Dovecot and {ours!r} in {place}"
    remedy = f"dovecot.conf: recipient_delimiter = {ours}, then doveadm reload"
    if set(ours) - set(theirs):
        yield problem("dovecot-delimiter", f"{differ}, so mail for tagged addresses bounces", remedy)
    elif set(theirs) - set(ours):
        yield warning(
            "dovecot-delimiter", f"{differ}, so mail for a user with such a character in their name goes to another one", remedy
        )
    elif ours:
        yield ok("dovecot-delimiter", f"recipient_delimiter is {ours!r} in Dovecot and in {place}")


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


# ---------------------------------------------------------------------------------------------------------------------------------
# Apps
# The query by which they log in is tried on a database in memory; and can its user read the real one?
# ---------------------------------------------------------------------------------------------------------------------------------


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
