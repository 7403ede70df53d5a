#!/usr/bin/env python3
# mailcloak: who may receive and who may send, asked by Postfix, answered from Keycloak and SQLite. MIT licence, see LICENSE.
"""Tell Postfix whether a recipient exists, whether a sender may use an address, and where an alias leads.

Postfix asks over two Unix sockets:

  policy      smtpd access policy delegation (SMTPD_POLICY_README). At RCPT: is there such a recipient, and may this client use this
              sender? At MAIL: the sender alone. Answers DUNNO, 550, 553 or 451.
  socketmap   virtual_alias_maps (socketmap_table(5)), map name "alias": the mailbox that an alias leads to. The maps "stats",
              "explain" and "flush" are mailcloakctl's.

Read at start:  the configuration, /etc/mailcloak/config.yaml unless another is named; config.yaml.sample explains each key.
Asked:          Keycloak, by its admin REST interface, for users: their username, primary e-mail, and whether they are enabled;
                one SQLite file, written by mailcloakctl, for aliases and for apps (logins that may only send).
Signals:        SIGTERM and SIGINT answer what was read and end; SIGHUP reads the configuration again.
Environment:    LISTEN_FDS and NOTIFY_SOCKET of a service manager (sd_listen_fds(3), sd_notify(3)).
Exit codes:     0 ended by a signal, or the configuration is good; 64 usage; 78 configuration; 1 anything else.

Security: started as root, the daemon binds its sockets and becomes daemon.user. It never answers OK or any other permission, only
DUNNO ("no objection"). When it cannot know, it says 451 ("try later"), since a wrong 550 loses a message for good. It sees envelopes,
never message headers. No secret, token or password is logged.

Implements SMTPD_POLICY_README, access(5), socketmap_table(5), the extension rules of Postfix's recipient_delimiter, RFC 3463 status
codes, the OAuth 2.0 client credentials grant (RFC 6749, section 4.4) and the user search of Keycloak's admin REST interface.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import functools
import grp
import http.client
import io
import json
import logging
import math
import operator
import os
import pwd
import queue
import random
import re
import resource
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import stat
import struct
import subprocess
import sys
import syslog
import threading
import time
import urllib.parse
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from types import MappingProxyType
from typing import (
    Any,
    Callable,
    Dict,
    FrozenSet,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Type,
    TypeVar,
)

import idna  # a dependency of requests itself, so it is there wherever requests is
import requests
import requests.adapters
import urllib3
import yaml

__version__ = "0.1.0"

# ---------------------------------------------------------------------------------------------------------------------------------
# 1. Constants and errors
# Limits of the protocols, each with its unit and source, and the tree of exceptions. "Not found" is never an exception.
# ---------------------------------------------------------------------------------------------------------------------------------

DEFAULT_CONFIG_PATH = "/etc/mailcloak/config.yaml"
DEFAULT_DATABASE_PATH = "/var/lib/mailcloak/state.db"

MAX_POLICY_REQUEST_BYTES = 16 * 1024  # a full request of Postfix 3.7 is about 700 bytes; its longest attributes are addresses
MAX_SOCKETMAP_QUERY_BYTES = 10_000  # Postfix itself never sends a key longer than an SMTP line
MAX_ADDRESS_CHARS = 254  # RFC 5321, section 4.5.3.1.3: a path of 256 octets with its angle brackets
MAX_ROUTES = 20  # hosts in one address, such as c!b!user@a; nobody writes more than two
MAX_SOCKET_PATH_BYTES = 107  # unix(7): sun_path holds 108 bytes, a terminating NUL included
LISTEN_BACKLOG = 1024  # a full backlog fails Postfix's non-blocking connect at once; the kernel caps it at net.core.somaxconn
RECEIVE_BYTES = 16 * 1024  # one recv; takes any whole request
REQUEST_SECONDS = 10  # a request that was begun must be whole after this; between requests a client may rest for ever
SEND_TIMEOUT_SECONDS = 10  # a client that does not read its answers is dropped after this
ROOM_SECONDS = 0.05  # how often a server that has no room for a connection looks for some
FILES_PER_CONNECTION = 4  # the socket, and SQLite's database, WAL and its index
SPARE_FILES = 200  # for Keycloak, last-known.db, listeners, the log
IDLE_SECONDS = 1  # after which a connection is without its SQLite connection until it is asked again

MAX_DIRECTORY_BODY_BYTES = 1024 * 1024  # of one HTTP answer; ten brief user records are about 4 kB
MAX_DIRECTORY_MATCHES = 10  # asked for in one search; more users than that with one address is no answer
MAX_DIRECTORY_WAITING = 2000  # lookups waiting their turn; above it a question fails at once instead of queueing
TOKEN_LIFE_USED = 0.8  # of a token's life; the rest is margin for clocks and requests under way

OUTAGE_FAILURES = 3  # in a row establish an outage; from then on nobody waits for Keycloak, and a probe alone asks it
PROBE_SECONDS = 5.0  # after which a probe is given up
PROBE_PAUSE_SECONDS = 3.0  # at most between two probes; with the above, service is back within 8 s of Keycloak
REFRESH_AHEAD = 0.2  # of a positive answer's life: used within this last part of it, it is asked for again in the background
MAX_REFRESHES_WAITING = 1000  # beyond, an answer is not refreshed ahead but asked for when it has ended
PROOF_SECONDS = 60.0  # how long a check that we see users at all makes empty answers believable
PROOF_RETRY_SECONDS = 2.0  # how often it is repeated while we see none

LAST_KNOWN_WAITING = 10_000  # positive answers waiting to be written to last-known.db
DATABASE_KEPT_CONNECTIONS = 64  # beyond, a thread's connection ends with its question; each takes about 150 KiB
DATABASE_BUSY_SECONDS = 2.0  # how long a question waits for a writer's lock
DATABASE_SETTLED_SECONDS = 3.0  # unchanged for so long, its next change shows in its times; vfat's are 2 s apart, others' less
MAX_REMEMBERED_ANSWERS = 100_000  # each about 400 bytes; 0 makes every answer anew, and nothing but the time it takes changes
MAX_REMEMBERED_CHARS = 600  # of one question; two addresses of the greatest length have 508
POSTMASTER_SECONDS = 10.0  # after the start, Keycloak is asked whether each domain has a postmaster
SHUTDOWN_LOOKUP_SECONDS = 3.0  # after SIGTERM, lookups still pending at Keycloak are given up and get the failure mode
SHUTDOWN_TOTAL_SECONDS = 4.5  # and all that is left is cut off

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_CONFIG = 0, 1, 64, 78  # the last two from sysexits.h

log = logging.getLogger("mailcloak")


def call_with_lock(name: str, *argument_types: Any) -> Optional[Callable[..., int]]:
    """A function of the C library to be called without giving up Python's global lock; None if the library lacks it.

    For system calls that never wait: with many busy connections, to get that lock back takes longer than all the rest of an answer
    (bench/NOTES.md).
    """
    function = getattr(ctypes.PyDLL(None), name, None)
    if function:
        function.argtypes = argument_types
    return function


def escape_for_log(text: str) -> str:
    """Text of a client for a log line: nothing in it can end the line, a quoted value or an address in angle brackets."""
    text = text if len(text) <= 300 else text[:300] + "..."
    if text.isprintable() and not re.search(r'[ <>"\\]', text):
        return text
    return "".join(f"\\x{ord(c):02x}" if c in ' <>"\\' else c if c.isprintable() else ascii(c)[1:-1] for c in text)


class MailcloakError(Exception):
    """Anything mailcloak itself reports; its text is fit for an administrator."""


class ConfigError(MailcloakError):
    """The configuration cannot be used. problems holds one line for each thing wrong."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class ProtocolError(MailcloakError):
    """The peer's bytes make no sense; its connection is closed."""


class DirectoryUnavailable(MailcloakError):
    """Keycloak gave no usable answer, which is not the same as "no such user"."""


class DirectoryMisconfigured(DirectoryUnavailable):
    """Keycloak answers, and will go on refusing until an administrator changes something; the text says what."""


class Disappeared(DirectoryUnavailable):
    """Keycloak says that a user is gone whom it knew until now: not believed yet, and no reason to go on as if he were there."""


class NoSingleAnswer(DirectoryUnavailable):
    """Keycloak answers, but not this question; no sign that it is away."""


class DatabaseUnavailable(MailcloakError):
    """SQLite gave no usable answer."""


class StartError(MailcloakError):
    """A socket, a user or the database file does not allow the daemon to start."""


# ---------------------------------------------------------------------------------------------------------------------------------
# 2. Config
# The YAML file as frozen dataclasses. Each field carries the reader that checks its value, so a key is described in one place, and
# every problem of a file is found in one pass. Later sections never see a raw dict. Only the main thread enters here.
# ---------------------------------------------------------------------------------------------------------------------------------

_REQUIRED: Any = object()
# A YAML value to the field's value; raises ValueError("expected ...") or ValueError("expected ...", hint).
_Reader = Callable[[Any], Any]
_DOMAIN = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")


def domain_to_ascii(domain: str) -> str:
    """A domain lower-cased and in A-label form, as it travels in DNS; "" if it is not convertible.

    Source: RFC 5891; UTS 46 without transitional mapping, as Postfix does it unless enable_idna2003_compatibility is set.
    """
    if domain.isascii():
        return domain.lower()
    if len(domain) > MAX_ADDRESS_CHARS:  # old versions of idna take time quadratic in the length
        return ""
    try:
        return idna.encode(domain, uts46=True).decode("ascii").lower()
    except (UnicodeError, ValueError, IndexError):
        return ""


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("expected text")
    if not value.isprintable():
        raise ValueError("expected text without control characters")
    return value


def _optional_text(value: Any) -> str:
    return "" if value == "" else _text(value)


def _absolute_path(value: Any) -> str:
    if not os.path.isabs(_text(value)):
        raise ValueError("expected an absolute path")
    return str(value)


def _optional_path(value: Any) -> str:
    return "" if value == "" else _absolute_path(value)


def _socket_path(value: Any) -> str:
    path = _absolute_path(value)
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise ValueError(
            f"expected a path of at most {MAX_SOCKET_PATH_BYTES} bytes, the limit of a Unix socket ({len(os.fsencode(path))} bytes)"
        )
    return path


def _url(value: Any) -> str:
    if "@" in _text(value):
        raise ValueError("expected a URL without user and password; put the secret into keycloak.client_secret")
    with contextlib.suppress(ValueError):  # urlsplit() quotes parts of the URL in it; .port raises it when it is not a number
        parts = urllib.parse.urlsplit(value)
        is_plain = re.fullmatch(r"[^<>\s?#]+", value) and re.fullmatch(r"[\w.:\[\]-]+", parts.netloc)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and is_plain:
            return str(value).rstrip("/")
    raise ValueError("expected a URL such as https://sso.example.org")


def _number(minimum: float, maximum: float = 1e9, *, whole: bool = False, wanted: str) -> _Reader:
    def read(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int,) if whole else (int, float)) or not minimum <= value <= maximum:
            raise ValueError(f"expected {wanted}")
        return value

    return read


_positive_seconds = _number(0.001, wanted="a positive number")
_any_seconds = _number(0, wanted="a number, 0 or more")


def _choice(*choices: str) -> _Reader:
    def read(value: Any) -> str:
        if value in choices:
            return str(value)
        raise ValueError(f"expected one of {', '.join(choices)}", _near_miss(value, choices))

    return read


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _domain(value: Any) -> str:
    domain = domain_to_ascii(value) if isinstance(value, str) else ""
    domain = domain[:-1] if domain.endswith(".") else domain
    if not _DOMAIN.fullmatch(domain):
        raise ValueError("expected a domain such as example.org")
    return domain


def _optional_domain(value: Any) -> str:
    return "" if value == "" else _domain(value)


def _domains(value: Any) -> FrozenSet[str]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError("expected a domain such as example.org, or a list of them")
    return frozenset(_domain(each) for each in values)


def _addresses(value: Any) -> Tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    try:
        return tuple(parse_plain_address(each if isinstance(each, str) else "").text for each in values)
    except ValueError as exc:
        raise ValueError(f"expected an e-mail address or a list of them: {exc}") from None


def _delimiters(value: Any) -> str:
    if not isinstance(value, str) or any(not 33 <= ord(c) <= 126 or c.isalnum() or c in '@"\\<>' for c in value):
        raise ValueError("expected the delimiter characters themselves, such as + or +-, as in Postfix's recipient_delimiter")
    return value


def _octal_mode(value: Any) -> int:
    if not isinstance(value, str) or not re.fullmatch(r"0?[0-7]{3}", value):
        raise ValueError('expected an octal mode as text, in quotes, such as "0660"')
    return int(value, 8)


def _account(find: Callable[[str], Any], names: Callable[[], List[str]], kind: str) -> _Reader:
    def read(value: Any) -> str:
        name = _optional_text(value)
        if name:
            try:
                find(name)
            except KeyError:
                raise ValueError(f"expected an existing {kind}", _near_miss(name, names())) from None
        return name

    return read


_user = _account(pwd.getpwnam, lambda: [entry.pw_name for entry in pwd.getpwall()], "user")
_group = _account(grp.getgrnam, lambda: [entry.gr_name for entry in grp.getgrall()], "group")


def _daemon_user(value: Any) -> str:
    return str(_user(value)) if os.geteuid() == 0 else _optional_text(value)  # nobody else can become that user anyway


def _static_users(value: Any) -> Mapping[str, str]:
    if not isinstance(value, dict) or not value:
        raise ValueError("expected pairs of username: address")
    users: Dict[str, str] = {}
    for username, address in value.items():
        if not isinstance(username, str) or not username or not username.isprintable():
            raise ValueError(f"expected usernames as text, got {username!r}; put it in quotes")
        if username.lower() in users:
            raise ValueError(f"expected each username once, got {username.lower()!r} twice")
        try:
            users[username.lower()] = parse_plain_address(address if isinstance(address, str) else "").text
        except ValueError as exc:
            raise ValueError(f"{username}: expected an e-mail address: {exc}") from None
    return MappingProxyType(users)


def _key(read: _Reader, default: Any = _REQUIRED, *, secret: bool = False) -> Any:
    """A dataclass field with its reader; a secret is never shown, neither in a problem nor in repr()."""
    options: Dict[str, Any] = {"metadata": {"read": read, "secret": secret}, "repr": not secret}
    return dataclasses.field(**options) if default is _REQUIRED else dataclasses.field(default=default, **options)


@dataclass(frozen=True)
class KeycloakConfig:
    base_url: str = _key(_url)
    realm: str = _key(_text)
    client_id: str = _key(_text)
    client_secret: str = _key(_text, "", secret=True)
    client_secret_file: str = _key(_absolute_path, "", secret=True)  # not shown: it might be the secret itself
    ca_file: str = _key(_optional_path, "")
    timeout_seconds: float = _key(_number(0.1, 60, wanted="a number from 0.1 to 60"), 5)
    max_requests: int = _key(_number(1, 100, whole=True, wanted="a whole number from 1 to 100"), 8)
    require_verified_email: bool = _key(_boolean, False)
    receive_when_locked_out: bool = _key(_boolean, True)
    canary: Tuple[str, ...] = _key(_addresses, ())


@dataclass(frozen=True)
class PolicyConfig:
    domain: FrozenSet[str] = _key(_domains)
    mailbox_domain: str = _key(_optional_domain, "")
    cache_ttl_seconds: float = _key(_positive_seconds, 120)
    negative_cache_ttl_seconds: float = _key(_any_seconds, 10)
    cache_max_entries: int = _key(_number(1, whole=True, wanted="a whole number, 1 or more"), 100_000)
    stale_if_error_seconds: float = _key(_any_seconds, 86400)
    disappearance_grace_seconds: float = _key(_any_seconds, 3600)
    keycloak_failure_mode: str = _key(_choice("tempfail", "dunno-recipients", "dunno"), "tempfail")
    recipient_delimiter: str = _key(_delimiters, "")
    unauthenticated_local_sender: str = _key(_choice("reject", "warn", "dunno"), "reject")
    foreign_sender: str = _key(_choice("reject", "dunno"), "reject")


@dataclass(frozen=True)
class SqliteConfig:
    path: str = _key(_absolute_path, DEFAULT_DATABASE_PATH)


@dataclass(frozen=True)
class SocketsConfig:
    policy_socket: str = _key(_socket_path)
    socketmap_socket: str = _key(_socket_path)
    socket_owner_user: str = _key(_user, "postfix")
    socket_owner_group: str = _key(_group, "postfix")
    socket_mode: int = _key(_octal_mode, "0660")


@dataclass(frozen=True)
class DaemonConfig:
    user: str = _key(_daemon_user, "mailcloak")
    log: str = _key(_choice("stderr", "syslog"), "stderr")
    log_level: str = _key(_choice("debug", "info", "warning", "error"), "info")
    max_connections: int = _key(_number(1, 100_000, whole=True, wanted="a whole number from 1 to 100000"), 1000)


_BLOCKS: Mapping[str, Type[Any]] = MappingProxyType(
    {"keycloak": KeycloakConfig, "policy": PolicyConfig, "sqlite": SqliteConfig, "sockets": SocketsConfig, "daemon": DaemonConfig}
)


@dataclass(frozen=True)
class Config:
    """One configuration file, checked. Exactly one of keycloak and static_users is there; warnings are for the log."""

    path: str
    keycloak: Optional[KeycloakConfig]
    static_users: Optional[Mapping[str, str]]
    policy: PolicyConfig
    sqlite: SqliteConfig
    sockets: SocketsConfig
    daemon: DaemonConfig
    warnings: Tuple[str, ...] = ()


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, since the loser would silently have no effect."""


def _construct_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> Dict[Any, Any]:
    seen: Set[Any] = set()
    for key, _ in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else key
        if name in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key given twice: {_shown_key(name)}", key.start_mark)
        seen.add(name)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def _near_miss(value: Any, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(value), choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _shown(value: Any) -> str:
    """A value of the file, short enough for a message, without the password of a URL and without a secret from the next line.

    A line with too much indentation, or behind a quote that is not closed, becomes part of the value of the line before it.
    """
    text = "nothing" if value is None else re.sub(r".*[:/].*@", "'...@", repr(value))
    if isinstance(value, dict) or "secret" in text:
        return _kind(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _shown_key(key: Any) -> str:
    """A key of the file without what follows where the space after its colon was forgotten."""
    text = str(key)
    name = re.match(r"[\w.-]*", text)
    return text if not name or name[0] == text else f"{name[0]}..."


def _kind(value: Any) -> str:
    """What sort of value it is, where the value itself might hold a secret."""
    names = {type(None): "nothing", str: "text", list: "a list", dict: "a block of keys", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else "something else")


def read_yaml(path: str) -> Dict[str, Any]:
    """The file as a mapping of blocks, unchecked; raises ConfigError with the file's line where YAML itself fails."""
    try:
        with open(path, encoding="utf-8") as file:
            raw = yaml.load(file, Loader=_StrictLoader)  # noqa: S506  a SafeLoader by descent, builds plain values only
    except OSError as exc:
        raise ConfigError([f"config: {path}: cannot be read: {exc.strerror}"]) from exc
    except yaml.MarkedYAMLError as exc:  # not str(exc), which quotes the line and so might show a secret
        line = exc.problem_mark.line + 1 if exc.problem_mark else 1
        problem = re.sub(r"(alias|tag|handle) '.*'", r"\1 '...'", exc.problem or "not YAML")
        raise ConfigError([f"config: {path}: line {line}: {problem}"]) from exc
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as exc:
        # the last five are what PyYAML lets out for values such as "!!bool x" and "!!int ''"; UnicodeDecodeError is a ValueError
        raise ConfigError([f"config: {path}: not YAML in UTF-8 ({type(exc).__name__})"]) from exc
    if not isinstance(raw, dict):
        raise ConfigError([f"config: {path}: expected blocks such as policy: and sockets:, got {_kind(raw)}"])
    return raw


def read_block(cls: Type[Any], name: str, raw: Any, problems: List[str]) -> Any:
    """One block of the file as its dataclass, or None with its problems appended."""
    if not isinstance(raw, dict):
        problems.append(f"config: {name}: expected a block of keys, got {_kind(raw)}")
        return None
    before = len(problems)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in raw:
        if key not in fields:
            problems.append(f"config: {name}.{_shown_key(key)}: unknown key{_near_miss(key, list(fields))}")
    values: Dict[str, Any] = {}
    for key, field in fields.items():
        if key not in raw and field.default is dataclasses.MISSING:
            problems.append(f"config: {name}.{key}: missing, this key is required")
            continue
        value = raw.get(key, field.default)
        shown = "a value that is not shown" if field.metadata["secret"] else _shown(value)
        try:
            if isinstance(value, str) and re.fullmatch(r"\s*<[^<>]*>\s*", value):
                raise ValueError("expected your own value in place of the placeholder")
            values[key] = field.metadata["read"](value) if key in raw or value else value
        except ValueError as exc:
            expected, *hint = exc.args
            problems.append(f"config: {name}.{key}: {expected}, got {shown}{''.join(hint)}")
    check = _BLOCK_CHECKS.get(cls)
    if check:
        problems.extend(f"config: {name}.{problem}" for problem in check(raw, values))
    return cls(**values) if len(problems) == before else None


def _check_keycloak(raw: Mapping[str, Any], values: Dict[str, Any]) -> Iterator[str]:
    yield from _check_secret(raw, values)
    ca_file = values.get("ca_file")
    if ca_file:
        try:
            ssl.create_default_context(**{"capath" if os.path.isdir(ca_file) else "cafile": ca_file})
        except OSError as exc:  # ssl.SSLError is one
            reason = "no such certificates in it" if isinstance(exc, ssl.SSLError) else exc.strerror
            yield f"ca_file: {ca_file}: expected a file of CA certificates in PEM form: {reason}"


def _check_secret(raw: Mapping[str, Any], values: Dict[str, Any]) -> Iterator[str]:
    """Put the secret in place, from the key itself or from the file that client_secret_file names."""
    if bool(raw.get("client_secret")) == bool(raw.get("client_secret_file")):
        yield "client_secret: expected exactly one of client_secret and client_secret_file"
        return
    path = values.get("client_secret_file")
    if not path:
        return
    try:
        with open(path, encoding="utf-8") as file:
            secret = file.readline(4096).strip()
    except (OSError, UnicodeDecodeError) as exc:
        # A secret may begin with a slash; a file that is there, or could be, is none.
        is_path = os.path.exists(path) or (os.path.dirname(path) != "/" and os.path.isdir(os.path.dirname(path)))
        shown = path if is_path else "a path that is not shown"
        yield f"client_secret_file: {shown}: cannot be read: {exc.strerror if isinstance(exc, OSError) else 'not UTF-8'}"
        return
    if not secret or not secret.isprintable():
        yield f"client_secret_file: {path}: expected the secret in the first line"
    values["client_secret"] = secret


def _check_mailbox_domain(_: Mapping[str, Any], values: Dict[str, Any]) -> Iterator[str]:
    if values.get("mailbox_domain") in values.get("domain", ()):
        yield f"mailbox_domain: expected a domain that is not in policy.domain, got {values['mailbox_domain']!r}"


def _check_socket_paths(_: Mapping[str, Any], values: Dict[str, Any]) -> Iterator[str]:
    if "policy_socket" in values and values["policy_socket"] == values.get("socketmap_socket"):
        yield "socketmap_socket: expected another path than policy_socket"


_BLOCK_CHECKS: Mapping[Type[Any], Callable[[Mapping[str, Any], Dict[str, Any]], Iterator[str]]] = MappingProxyType(
    {KeycloakConfig: _check_keycloak, PolicyConfig: _check_mailbox_domain, SocketsConfig: _check_socket_paths}
)  # what one key demands of another; each is told the keys that are there, and the values that could be read


def _config_warnings(path: str, config: Config) -> Iterator[str]:
    keycloak = config.keycloak
    if keycloak:
        secret_file = keycloak.client_secret_file or path
        with contextlib.suppress(OSError):
            if os.stat(secret_file).st_mode & stat.S_IROTH:
                yield f"config: {secret_file}: holds the client secret and every user of this host can read it, chmod o-r"
        if keycloak.base_url.startswith("http:"):
            yield "config: keycloak.base_url: http sends the client secret unencrypted, use https beyond this host"
    for username, address in (config.static_users or {}).items():
        if normalise_address(address).domain not in config.policy.domain:
            yield f"config: static_users.{username}: <{address}> is not in policy.domain and owns nothing"
    if config.sockets.socket_mode & 0o006:
        yield "config: sockets.socket_mode: every user of this host may connect, 0660 is usual"


def load_config(path: str) -> Config:
    """The file, checked as a whole; raises ConfigError with every problem of the file."""
    raw = read_yaml(path)
    problems: List[str] = []
    known = [*_BLOCKS, "static_users"]
    problems.extend(f"config: {_shown_key(key)}: unknown key{_near_miss(key, known)}" for key in raw if key not in known)
    blocks = {
        name: read_block(cls, name, raw.get(name, {}), problems)
        for name, cls in _BLOCKS.items()
        if name in raw or name != "keycloak"
    }
    static_users = None
    if "static_users" in raw:
        try:
            static_users = _static_users(raw["static_users"])
        except ValueError as exc:
            problems.append(f"config: static_users: {exc}")
    if ("keycloak" in raw) == ("static_users" in raw):
        problems.append("config: keycloak: expected exactly one of the blocks keycloak and static_users")
    if problems:
        raise ConfigError(problems)
    config = Config(path=path, static_users=static_users, **{"keycloak": None, **blocks})
    return dataclasses.replace(config, warnings=tuple(_config_warnings(path, config)))


# ---------------------------------------------------------------------------------------------------------------------------------
# 3. Addresses
# One form for an address from whichever side it comes: the form that Postfix will act on. Pure.
# ---------------------------------------------------------------------------------------------------------------------------------

_ATOM = r"[^.\s\x00-\x1f\x7f\"(),:;<>@\[\\\]]+"  # RFC 5322 atext with the letters of RFC 6531
_DOT_STRING = re.compile(rf"{_ATOM}(\.{_ATOM})*")  # what needs no quotes in an address
_NEVER_SPLIT = frozenset({"postmaster", "mailer-daemon", "double-bounce"})


class Address(NamedTuple):
    """An address as Postfix will act on it, lower-cased, the domain in A-label form. ("", "") is the null sender."""

    local_part: str
    domain: str  # "" when there is none: Postfix will append $myorigin

    @property
    def text(self) -> str:
        return f"{self.local_part}@{self.domain}" if self.domain else self.local_part

    @property
    def is_plain(self) -> bool:
        """Can this be somebody's address at all? What cannot is never asked of SQLite or Keycloak."""
        text = self.text
        return bool(self.local_part and self.domain) and len(text) <= MAX_ADDRESS_CHARS and text.isprintable() and " " not in text


@functools.lru_cache(maxsize=1000)  # the sender comes with each recipient of a message
def normalise_address(raw: str) -> Address:
    """The form in which Postfix will deliver to, or send from, the address: whatever a client writes, it cannot slip past.

    raw is an address of an SMTP envelope, without angle brackets; "" is the null sender. Raises nothing.
    Source: Postfix trivial-rewrite(8): source routes, resolve_dequoted_address, swap_bangpath, allow_percent_hack, trailing dot.
    """
    text = raw.lower()
    while text.startswith("@") and ":" in text[:-1]:
        text = text.partition(":")[2]
    if "@" not in text and _DOT_STRING.fullmatch(text):  # anything else Postfix puts into quotes and leaves as it is
        if "!" in text:
            site, _, user = text.partition("!")
            text = f"{user}@{site}"
        elif "%" in text:
            user, _, site = text.rpartition("%")
            text = f"{user}@{site}"
    local_part, at_sign, domain = text.rpartition("@")
    if not at_sign:
        return Address(text, "")
    if not domain:
        return Address(local_part or at_sign, "")
    domain = domain_to_ascii(domain) or domain
    if domain.endswith(".") and len(domain) > 1 and not domain.endswith(".."):
        domain = domain[:-1]
    return Address(local_part, domain)


def routing_steps(address: Address) -> Iterator[Address]:
    """The address, and what Postfix would deliver to if each outer domain were one of its own hosts.

    Postfix drops the domain of user%domain@host, domain!user@host and "user@domain"@host when the host is itself ($mydestination or
    its IP address in brackets) and reads the rest again, so such an address may lead to a domain of ours.
    Source: Postfix trivial-rewrite(8), resolve.c.
    """
    while address.domain:
        yield address
        address = normalise_address(address.local_part)


def parse_plain_address(text: str) -> Address:
    """An address as a person types it into a command or a config; raises ValueError saying what is wrong with it."""
    if not text.isprintable() or re.search(r"\s", text):
        raise ValueError("it holds a space or a control character")
    if text.count("@") != 1:
        raise ValueError("it has no @" if "@" not in text else "it has more than one @")
    local_part, domain = text.lower().split("@")
    if not local_part:
        raise ValueError("there is nothing before the @, and a catch-all for a whole domain is not supported")
    if not _DOT_STRING.fullmatch(local_part):
        raise ValueError("the part before the @ would need quotes")
    too_long = f"it is longer than {MAX_ADDRESS_CHARS} characters"
    if len(text) > MAX_ADDRESS_CHARS:
        raise ValueError(too_long)
    try:
        address = Address(local_part, _domain(domain))
    except ValueError:
        raise ValueError(f"{domain!r} is not a domain") from None
    if len(address.text) > MAX_ADDRESS_CHARS:
        raise ValueError(f"{too_long}, with its domain in A-label form")
    return address


def split_extension(local_part: str, delimiters: str) -> Tuple[str, str]:
    """(base, extension): the extension begins with its delimiter, and is "" where there is none to cut off.

    Source: Postfix split_addr.c, and postconf(5) recipient_delimiter, owner_request_special.
    """
    if local_part in _NEVER_SPLIT:
        return local_part, ""
    if "-" in delimiters and (local_part.startswith("owner-") or local_part.endswith("-request")):
        return local_part, ""
    cut = next((index for index, character in enumerate(local_part) if character in delimiters), 0)
    return (local_part[:cut], local_part[cut:]) if cut else (local_part, "")


def address_spellings(address: Address, delimiters: str) -> List[Tuple[Address, str]]:
    """(address, extension) to look up, in this order: the address itself, then without its extension if it has one."""
    base, extension = split_extension(address.local_part, delimiters)
    return [(address, "")] + ([(Address(base, address.domain), extension)] if extension else [])


def quote_local_part(local_part: str) -> str:
    """The local part as it must stand in an address of a lookup table's answer (RFC 5322, section 3.2.4)."""
    if _DOT_STRING.fullmatch(local_part):
        return local_part
    return '"' + re.sub(r'(["\\])', r"\\\1", local_part) + '"'


def format_mailbox(username: str, extension: str, domain: str) -> str:
    """Where the mail of username goes: username+extension@domain; a username that is an address already stays as it is."""
    return username if "@" in username else f"{quote_local_part(username + extension)}@{domain}"


# ---------------------------------------------------------------------------------------------------------------------------------
# 4. Cache
# Answers of the directory: fresh for their time to live, positive ones kept longer for an outage. Bounded; negative answers have a
# tenth of the room and are pushed out first, so that a dictionary attack cannot make the daemon forget the users it knows. All handler
# threads enter here.
# ---------------------------------------------------------------------------------------------------------------------------------


class Missing(NamedTuple):
    """How long Keycloak has said that somebody is gone whom it knew before."""

    seconds: float  # for so long, counted only while it confirmed other users
    seen_at: float  # when it said so last, of the cache's clock


class Entry(NamedTuple):
    """One remembered answer. A positive one is kept beyond its end, for an outage."""

    value: Any
    positive: bool
    confirmed_at: float  # all three in seconds of the cache's clock
    fresh_until: float
    kept_until: float
    missing: Optional[Missing] = None  # of a positive answer that Keycloak takes back now


class Cache:
    """A least-recently-used store with a time to live, in seconds of the clock passed in."""

    def __init__(self, max_entries: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_entries = max_entries
        self._max_negative = max(1, max_entries // 10)
        self._clock = clock
        self._lock = threading.Lock()  # guards the two dicts
        self._positive: OrderedDict[Any, Entry] = OrderedDict()  # oldest use first
        self._negative: OrderedDict[Any, Entry] = OrderedDict()

    def get(self, key: Any) -> Optional[Entry]:
        """What is remembered, fresh or kept; None when there is nothing."""
        now = self._clock()
        with self._lock:
            for store in (self._positive, self._negative):
                entry = store.get(key)
                if entry is None:
                    continue
                if now < entry.kept_until:
                    store.move_to_end(key)
                    return entry
                del store[key]
        return None

    def put(self, key: Any, entry: Entry) -> None:
        """Remember entry; it replaces what was known of key, positive or negative, unless that is the newer one."""
        with self._lock:
            known = self._positive.get(key) or self._negative.get(key)
            if known and known.confirmed_at > entry.confirmed_at:
                return
            self._positive.pop(key, None)
            self._negative.pop(key, None)
            if not entry.positive and len(self._positive) >= self._max_entries:
                return  # full of users we know: they stay
            (self._positive if entry.positive else self._negative)[key] = entry
            while len(self._negative) > self._max_negative or (self._negative and len(self) > self._max_entries):
                self._negative.popitem(last=False)
            while len(self) > self._max_entries:
                self._positive.popitem(last=False)

    def holds(self, key: Any, entry: Entry) -> bool:
        """Is entry still what is known of key? No lock: one look at a dict is atomic, and no use of the entry is noted."""
        return self._positive.get(key) is entry

    def revise(self, change: Callable[[Entry], Optional[Entry]]) -> None:
        """Put in place of every positive answer what change makes of it; None forgets it."""
        with self._lock:
            for key, entry in list(self._positive.items()):
                revised = change(entry)
                if revised is None:
                    del self._positive[key]
                elif revised is not entry:
                    self._positive[key] = revised

    def forget(self, is_meant: Callable[[Any, Entry], bool]) -> int:
        """Forget the entries that are meant; how many these were."""
        with self._lock:
            stores = (self._positive, self._negative)
            meant = [(store, key) for store in stores for key, entry in store.items() if is_meant(key, entry)]
            for store, key in meant:
                del store[key]
        return len(meant)

    def sizes(self) -> Tuple[int, int]:
        """(positive, negative) entries."""
        return len(self._positive), len(self._negative)

    def __len__(self) -> int:
        return sum(self.sizes())


class Durations:
    """How long something took, as a histogram. Entered by many threads without a lock: it may miss one in a great many."""

    BOUNDS = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)  # seconds

    def __init__(self) -> None:
        self.counts = [0] * (len(self.BOUNDS) + 1)  # of those up to each bound, then of those beyond
        self.seconds = 0.0

    def note(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(self.BOUNDS, seconds)] += 1
        self.seconds += seconds

    def add(self, other: Durations) -> None:
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts)]
        self.seconds += other.seconds

    def to_json(self) -> Dict[str, Any]:
        return {"bounds": self.BOUNDS, "counts": self.counts, "sum": self.seconds}


# ---------------------------------------------------------------------------------------------------------------------------------
# 5. Database
# Every SQL statement of the daemon. One connection a thread, since sqlite3 connections must not be shared. No row is kept beyond the
# answer it was read for, and no answer beyond the state of the file it was made from (section 9), so a change by mailcloakctl counts
# from the next request on.
# ---------------------------------------------------------------------------------------------------------------------------------

SCHEMA_VERSION = 2

SCHEMA = """\
-- The state of mailcloak: aliases and apps. Written by mailcloakctl, read by mailcloak and by Dovecot.
-- The version of this schema is PRAGMA user_version. Addresses and names are stored in lower case, domains in A-label form.

-- An address that leads to a user's mailbox. The address counts only if its domain is one of policy.domain.
CREATE TABLE IF NOT EXISTS aliases (
    alias_email TEXT PRIMARY KEY,                                  -- local-part@domain, without an extension
    username    TEXT NOT NULL,                                     -- the Keycloak user who receives and may send as it
    enabled     INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)), -- 0: the address exists for nobody
    updated_at  INTEGER NOT NULL DEFAULT (strftime('%s', 'now'))   -- seconds since 1970, UTC
);
-- For all aliases of one user.
CREATE INDEX IF NOT EXISTS aliases_username ON aliases (username);

-- A login that may send but never receives: a printer, a shop, a monitoring system. Dovecot checks its password.
CREATE TABLE IF NOT EXISTS apps (
    app_id      TEXT PRIMARY KEY,                                  -- the SASL username
    secret_hash TEXT NOT NULL,                                     -- {SCHEME}hash as in Dovecot, never the password itself
    enabled     INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)), -- 0: may neither log in nor send
    created_at  INTEGER NOT NULL DEFAULT (strftime('%s', 'now')),  -- seconds since 1970, UTC
    owner       TEXT,                                              -- the app counts only while this Keycloak user is enabled
    expires_at  INTEGER                                            -- seconds since 1970, UTC: from then on as if disabled
);

-- The sender addresses that an app may use.
CREATE TABLE IF NOT EXISTS app_from (
    app_id    TEXT NOT NULL,
    from_addr TEXT NOT NULL,                                       -- the exact sender; the empty string is the null sender <>
    enabled   INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)), -- 0: as if the row were not there
    PRIMARY KEY (app_id, from_addr),                               -- an address is allowed once
    FOREIGN KEY (app_id) REFERENCES apps (app_id) ON DELETE CASCADE -- an app takes its addresses with it
);
"""


# (table, column, type): what a file of an older version lacks. Tables that are missing come from SCHEMA.
ADDED_COLUMNS = (("apps", "owner", "TEXT"), ("apps", "expires_at", "INTEGER"))


class Alias(NamedTuple):
    username: str
    enabled: bool


class App(NamedTuple):
    state: str  # "enabled", "disabled" or "expired"
    may_send: bool  # is the sender asked about in its list?
    owner: str = ""  # the app counts only while this user is enabled; "" if it has no owner


def connect_database(path: str, busy_seconds: float) -> sqlite3.Connection:
    """A connection to an existing file, in autocommit mode; raises sqlite3.Error.

    Opened for writing even to read: only then can SQLite roll back the journal that a killed writer left behind. SQLite falls back
    to reading by itself where the file may not be written. The connection may be closed, though not used, by another thread.
    """
    uri = f"file:{urllib.parse.quote(os.fsencode(path))}?mode=rw"
    connection = sqlite3.connect(uri, uri=True, timeout=busy_seconds, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _create_database_file(path: str) -> bool:
    """Make an empty file that belongs to the owner and group of its directory; False if there is one already."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o640)
    except FileExistsError:
        return False
    except FileNotFoundError as exc:
        raise StartError(
            f"sqlite.path: directory {os.path.dirname(path)!r} does not exist, create it for the user that runs mailcloak"
        ) from exc
    except OSError as exc:
        raise StartError(
            f"sqlite.path: {path!r} cannot be created: {exc.strerror}, as user {pwd.getpwuid(os.geteuid()).pw_name!r}"
        ) from exc
    try:
        os.fchmod(descriptor, 0o640)
        directory = os.stat(os.path.dirname(path))
        if os.geteuid() == 0:
            os.fchown(descriptor, directory.st_uid, directory.st_gid)
    finally:
        os.close(descriptor)
    return True


def last_known_path(database_path: str) -> str:
    """Of the file that LastKnown keeps beside the database."""
    return os.path.join(os.path.dirname(database_path), "last-known.db")


def prepare_database(path: str, busy_seconds: float, *, create: bool = True) -> str:
    """Create the file with its schema if it is missing, migrate an older one; says what was done, "" if nothing.

    Raises StartError where it cannot be made or belongs to a newer mailcloak; DatabaseUnavailable where it is there and cannot be used,
    or is missing and must not be created: a new one in place of a lost one would refuse the mail of every alias.
    """
    lost = f"restore it from a backup; only where there was none of worth, remove it and {last_known_path(path)!r}: then a new one is made"
    if create and not os.path.lexists(path):
        if os.path.exists(last_known_path(path)):
            raise DatabaseUnavailable(f"database: {path!r} is missing, though a daemon has run on it: {lost}")
        if _create_database(path):
            return "created"
    try:
        if os.stat(path).st_size == 0:  # somebody has emptied it
            raise DatabaseUnavailable(f"database: {path!r} is empty: {lost}")
        with contextlib.closing(connect_database(path, busy_seconds)) as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise StartError(
                    f"sqlite.path: {path!r} has schema version {version}, this mailcloak knows {SCHEMA_VERSION}: install a newer one"
                )
            copy = _migrate(connection, path) if version < SCHEMA_VERSION else ""
    except (sqlite3.Error, OSError) as exc:
        raise DatabaseUnavailable(f"database: {path!r}: {exc}") from exc
    return f"migrated to schema version {SCHEMA_VERSION}, the file as it was is {copy}" if copy else ""


def _create_database(path: str) -> bool:
    """Put a new database at path, which nobody ever sees without its schema; False if there is one meanwhile."""
    new = f"{path}.new-{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)
    _create_database_file(new)
    try:
        with contextlib.closing(connect_database(new, 0)) as connection:
            _migrate(connection, new)
        os.link(new, path)
    except FileExistsError:
        return False
    except (sqlite3.Error, OSError) as exc:
        raise StartError(f"sqlite.path: {path!r} cannot be created: {exc}") from exc
    finally:
        os.unlink(new)
    return True


def _migrate(connection: sqlite3.Connection, path: str) -> str:
    """Bring the file to SCHEMA_VERSION in one transaction; the path of the copy that was made first, "" if there was nothing to copy."""
    connection.execute("BEGIN IMMEDIATE")  # left open by an error, rolled back when the connection is closed
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version >= SCHEMA_VERSION:  # another process was faster
        connection.execute("ROLLBACK")
        return ""
    copy = _copy_database(path, version) if connection.execute("SELECT 1 FROM sqlite_master").fetchone() else ""
    for statement in SCHEMA.split(";\n"):
        connection.execute(statement)
    for table, column, kind in ADDED_COLUMNS:
        if column not in {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}:
            connection.execute(f"ALTER TABLE {table} ADD COLUMN {column} {kind}")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.execute("COMMIT")
    return copy


def _copy_database(path: str, version: int) -> str:
    """Copy the file beside itself, with its owner, group and mode; the copy's path."""
    copies = (f"{path}.version-{version}{suffix}" for suffix in ("", *(f".{number}" for number in range(1, 1000))))
    copy = next(candidate for candidate in copies if _create_database_file(candidate))
    status = os.stat(path)
    with contextlib.suppress(PermissionError):  # a copy of an unprivileged user stays his own
        os.chown(copy, status.st_uid, status.st_gid)
    os.chmod(copy, stat.S_IMODE(status.st_mode))
    with contextlib.closing(connect_database(path, 30)) as source, contextlib.closing(connect_database(copy, 30)) as target:
        source.backup(target)
    return copy


# What tells one content of the file from the next: inode, when it changed (s since 1970 and ns; no program can set that), device.
FileState = Tuple[int, int, int, int, int]

_statx = call_with_lock("statx", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)  # not in old musl
_AT_FDCWD, _STATX_INO_CTIME, _STATX_BYTES = -100, 0x180, 256  # statx(2)
_STATX_STATE = struct.Struct("=32xQ56xqI28xII")  # stx_ino, stx_ctime, stx_dev_major, stx_dev_minor; the same on each architecture


class _ThreadsOwn(threading.local):
    """What a thread keeps of the database."""

    connection: Optional[sqlite3.Connection] = None
    state: Optional[FileState] = None  # of the file that it was opened on
    page_bytes = 0

    def __init__(self) -> None:
        self.status = ctypes.create_string_buffer(_STATX_BYTES)


class Database:
    """The daemon's view of the file. Every method raises DatabaseUnavailable when SQLite gives no usable answer."""

    def __init__(self, path: str, busy_seconds: float = DATABASE_BUSY_SECONDS) -> None:
        self._path = path
        self._path_bytes = os.fsencode(path)
        self._busy_seconds = busy_seconds
        self._local = _ThreadsOwn()
        self._lock = threading.Lock()  # guards the two below
        self._connections = 0  # that are open, of all threads
        self._fails = False  # for one line in the log when it begins and one when it ends

    def find_alias(self, address: str) -> Optional[Alias]:
        """The alias row of this exact, normalised address."""
        rows = self._rows("SELECT CAST(username AS TEXT), enabled FROM aliases WHERE alias_email = ?", (address,))
        return Alias(rows[0][0].lower(), rows[0][1] == 1) if rows else None

    def find_app(self, app_id: str, sender: str) -> Optional[App]:
        """The app, and whether the normalised sender ("" is <>) is in its list; None if no app has that id."""
        rows = self._rows(
            "SELECT CASE WHEN enabled <> 1 THEN 'disabled'"
            " WHEN expires_at <= CAST(strftime('%s', 'now') AS INTEGER) THEN 'expired' ELSE 'enabled' END,"
            " EXISTS (SELECT 1 FROM app_from WHERE app_id = apps.app_id AND from_addr = ? AND enabled = 1),"
            " CAST(COALESCE(owner, '') AS TEXT) FROM apps WHERE app_id = ?",
            (sender, app_id),
        )
        return App(rows[0][0], rows[0][1] == 1, rows[0][2].lower()) if rows else None

    def check(self) -> None:
        """Raise DatabaseUnavailable if a question could not be answered now."""
        self._rows("SELECT 1 FROM aliases, apps, app_from LIMIT 1", ())

    def works(self) -> bool:
        """Are questions answered? Tried again where the last one was not, so that a fault counts no longer than it lasts."""
        if self._fails:
            with contextlib.suppress(DatabaseUnavailable):
                self.check()
        return not self._fails

    def state(self) -> Optional[FileState]:
        """What tells one content of the file from the next, a commit or another file put in its place; None if there is no file."""
        status = self._local.status
        if _statx and _statx(_AT_FDCWD, self._path_bytes, 0, _STATX_INO_CTIME, status) == 0:
            return _STATX_STATE.unpack_from(status)
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_ino, *divmod(found.st_ctime_ns, 10**9), os.major(found.st_dev), os.minor(found.st_dev)

    def shows_commits(self, state: Optional[FileState], seen_at: float) -> bool:
        """Does every commit after seen_at, in seconds since 1970, change the state that was seen then?

        So it is in rollback-journal mode, where moreover nobody can read between the first page that a commit writes and its end:
        while the state is the same, all that was read since it was first seen still holds. Not so soon after a change, since the
        next could bear the same time, and in WAL mode, where a commit does not change the file itself.
        """
        if state is None or seen_at - (state[1] + state[2] / 1e9) < DATABASE_SETTLED_SECONDS:
            return False
        with contextlib.suppress(DatabaseUnavailable):
            return bool(self._rows("PRAGMA journal_mode", ())[0][0] != "wal")
        return False

    def close(self) -> None:
        """Close this thread's connection, if it has one."""
        connection, self._local.connection = self._local.connection, None
        if connection is not None:
            connection.close()
            with self._lock:
                self._connections -= 1

    def _rows(self, statement: str, parameters: Tuple[str, ...]) -> List[Any]:
        try:
            rows = self._connection().execute(statement, parameters).fetchall()
            if os.stat(self._path).st_size % self._local.page_bytes:  # SQLite reads zeros behind the end of such a file
                raise DatabaseUnavailable("the file ends within a page, it was truncated")
        except (sqlite3.Error, OSError, StartError, DatabaseUnavailable) as exc:
            self.close()  # a fresh connection next time: the file may have been replaced or mended meanwhile
            error = DatabaseUnavailable(f"database: {self._path!r}: {exc}")
            if self._turns(fails=True):
                log.error("%s; answers that need it are deferred until it is mended", error)
            raise error from exc
        if self._connections > DATABASE_KEPT_CONNECTIONS:
            self.close()
        if self._fails and self._turns(fails=False):
            log.warning("database: works again path=%s", self._path)
        return rows

    def _turns(self, *, fails: bool) -> bool:
        with self._lock:
            turns, self._fails = self._fails != fails, fails
        return turns

    def _connection(self) -> sqlite3.Connection:
        """This thread's connection, made anew when the file has changed.

        SQLite itself notices a commit, but neither a file put in place by rename nor a copy written over it whose change counter
        happens to be the one it knows.
        """
        state = self.state()
        connection = self._local.connection
        if connection is None or self._local.state != state:
            self.close()
            self._local.connection = connection = connect_database(self._path, self._busy_seconds)
            with self._lock:
                self._connections += 1
            self._local.state = state
            self._local.page_bytes = connection.execute("PRAGMA page_size").fetchone()[0]
            if 0 < connection.execute("PRAGMA user_version").fetchone()[0] < SCHEMA_VERSION:
                prepare_database(self._path, self._busy_seconds, create=False)  # an older file was put in place of ours
            connection.execute("PRAGMA query_only = ON")
        return connection


_Statements = List[Tuple[str, Tuple[Any, ...]]]  # with their parameters


class LastKnown:
    """Positive answers of Keycloak in a file of the daemon's own, so that a restart in an outage still knows everyone it knew.

    Written by one thread in the background. The file costs nothing but memory when it is lost: any fault of it is a warning, and it is
    begun anew. Negative answers are never in it. It belongs to one Keycloak and one realm (origin); another's is wiped.
    """

    SCHEMA = (
        "CREATE TABLE IF NOT EXISTS origin (origin TEXT NOT NULL)",
        "CREATE TABLE IF NOT EXISTS known (kind TEXT, name TEXT, usernames TEXT NOT NULL, value TEXT NOT NULL, confirmed_at REAL NOT NULL,"
        " missing_seconds REAL, missing_at REAL, PRIMARY KEY (kind, name)) WITHOUT ROWID",
    )

    def __init__(self, path: str, origin: str, max_entries: int) -> None:
        self.identity = (path, origin, max_entries)
        self._path, self._origin, self._max_entries = self.identity
        self._steps: queue.Queue[Optional[Tuple[_Statements, Optional[threading.Event]]]] = queue.Queue(LAST_KNOWN_WAITING)
        self._thread = threading.Thread(target=self._write, name="last-known", daemon=True)
        self._thread.start()

    def load(self) -> List[Tuple[str, str, str, float, Optional[float], Optional[float]]]:
        """(kind, name, value, confirmed at, missing seconds, missing at) of all that is known, what waits to be written included.

        Times are in seconds since 1970; missing seconds and missing at are None for who is not missing.
        """
        written = threading.Event()
        with contextlib.suppress(queue.Full):
            self._steps.put(([], written), timeout=1)
            written.wait(5)
        try:
            with contextlib.closing(self._open()) as connection:
                return connection.execute(
                    "SELECT kind, name, value, confirmed_at, missing_seconds, missing_at FROM known"
                ).fetchall()
        except (sqlite3.Error, OSError, StartError):
            return []  # the writer has said why

    def remember(self, key: Tuple[str, str], usernames: Sequence[str], value: str, confirmed_at: float) -> None:
        """Keep a positive answer; left out when the writer is far behind, since it is confirmed again before long."""
        statement = "INSERT OR REPLACE INTO known VALUES (?, ?, ?, ?, ?, NULL, NULL)"
        with contextlib.suppress(queue.Full):
            self._steps.put_nowait(([(statement, (*key, " ".join(usernames), value, confirmed_at))], None))

    def take_back(self, key: Tuple[str, str], gone: Iterable[str], missing: Optional[Tuple[float, float]] = None) -> None:
        """Forget the answer and the other logins of the users who are gone; with missing, only note that they are missing.

        missing is (seconds, missing at). Returns when the file says so, or after a second.
        """
        kind, name = key
        statements: _Statements
        if missing:
            seconds, missing_at = missing
            others = (
                "UPDATE known SET missing_seconds = COALESCE(missing_seconds, 0), missing_at = ?"
                " WHERE kind = 'login' AND usernames = ? AND name <> ?"
            )
            statements = [(others, (missing_at, username, name)) for username in gone]
            itself = "UPDATE known SET missing_seconds = ?, missing_at = ? WHERE kind = ? AND name = ?"
            statements.append((itself, (seconds, missing_at, kind, name)))
        else:
            others = "DELETE FROM known WHERE kind = 'login' AND usernames = ? AND name <> ?"
            statements = [(others, (username, name)) for username in gone]
            statements.append(("DELETE FROM known WHERE kind = ? AND name = ?", (kind, name)))
        self._write_now(statements)

    def forget(self, names: Optional[Iterable[str]]) -> None:
        """Forget what is known by these addresses and logins, and of the users of these names; None forgets all."""
        if names is None:
            self._write_now([("DELETE FROM known", ())])
        else:
            statement = "DELETE FROM known WHERE name = ? OR instr(' ' || usernames || ' ', ' ' || ? || ' ')"
            self._write_now([(statement, (name, name)) for name in names])

    def _write_now(self, statements: _Statements) -> None:
        """Returns when the file says so, or after a second."""
        written = threading.Event()
        try:
            self._steps.put((statements, written), timeout=1)
            written.wait(1)
        except queue.Full:
            log.warning("last-known: the disk is slow path=%s", self._path)

    def close(self) -> None:
        """Write what is waiting, for a second at the most."""
        with contextlib.suppress(queue.Full):
            self._steps.put_nowait(None)
            self._thread.join(1)

    def _open(self) -> sqlite3.Connection:
        _create_database_file(self._path)
        os.chmod(self._path, 0o600)
        connection = connect_database(self._path, 1)
        try:
            for statement in self.SCHEMA:
                connection.execute(statement)
            if connection.execute("SELECT origin FROM origin").fetchall() != [(self._origin,)]:
                for statement in ("DELETE FROM origin", "DELETE FROM known"):
                    connection.execute(statement)
                connection.execute("INSERT INTO origin VALUES (?)", (self._origin,))
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _begin_anew(self, exc: Exception) -> None:
        log.warning(
            "last-known: begun anew, what was known before a restart is forgotten path=%s reason=%s", self._path, f'"{exc}"'
        )
        with contextlib.suppress(OSError):
            os.unlink(self._path)

    def _write(self) -> None:
        steps: List[Any] = []
        while None not in steps:
            steps = [self._steps.get()]
            with contextlib.suppress(queue.Empty):
                while len(steps) < 1000:
                    steps.append(self._steps.get_nowait())
            try:
                with contextlib.closing(self._open()) as connection:
                    # where somebody waits, somebody else lost a right, and a power failure must not undo that
                    urgent = any(step and step[1] for step in steps)
                    connection.execute(f"PRAGMA synchronous = {'FULL' if urgent else 'OFF'}")
                    connection.execute("BEGIN IMMEDIATE")
                    for statements, _ in filter(None, steps):
                        for statement, parameters in statements:
                            connection.execute(statement, parameters)
                    excess = connection.execute("SELECT count(*) FROM known").fetchone()[0] - self._max_entries
                    if excess > 0:
                        oldest = "SELECT kind || ' ' || name FROM known ORDER BY confirmed_at LIMIT ?"
                        connection.execute(f"DELETE FROM known WHERE kind || ' ' || name IN ({oldest})", (excess,))  # noqa: S608
                    connection.execute("COMMIT")
            except Exception as exc:
                self._begin_anew(exc)
            for _, written in filter(None, steps):
                if written:
                    written.set()


# ---------------------------------------------------------------------------------------------------------------------------------
# 6. Directory
# Who the users are: Keycloak, or static_users of the config. Lookups at Keycloak run in a few worker threads; a handler thread
# waits for its answer until its deadline and not longer, whatever DNS, TLS or a dripping body may do to the worker.
# ---------------------------------------------------------------------------------------------------------------------------------


class User(NamedTuple):
    username: str  # lower-cased
    email: str  # primary e-mail, normalised; "" if there is none that counts
    enabled: bool  # may log in and send
    locked_out: bool = False  # by guessed passwords, which anybody can bring about: still receives
    federated: bool = False  # from a user storage behind Keycloak, such as LDAP

    @property
    def receives(self) -> bool:
        return self.enabled or self.locked_out


class Login(NamedTuple):
    """Whom a sasl_username names. username is "" unless state is "enabled"."""

    username: str
    state: str  # "enabled", "disabled", "missing", or "ambiguous": one user's name and another's e-mail
    federated: bool = False


Users = Tuple[User, ...]
Deadline = float  # of time.monotonic()


class StaticDirectory:
    """static_users of the config: the embedded directory for trials, tests and small hosts."""

    def __init__(self, users: Mapping[str, str]) -> None:
        self._users = [User(username, address, True) for username, address in users.items()]

    def find_users(self, attribute: str, value: str, deadline: Deadline) -> Users:
        """All users whose "email" or "username" is value."""
        return tuple(user for user in self._users if getattr(user, attribute) == value)

    def report(self) -> None:
        """There is nothing to say of Keycloak."""

    def give_up(self) -> None:
        """Nothing is ever pending here."""

    def close(self) -> None:
        """Nothing to end here."""


class _DeadlineReader(io.RawIOBase):
    """A socket's bytes for as long as the thread's deadline allows: a timeout alone would start anew with each byte that drips in."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, deadline: Callable[[], float]) -> None:
        self._raw, self._sock, self._deadline = raw, sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Optional[int]:
        self._sock.settimeout(max(0.001, self._deadline() - time.monotonic()))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


_thread = threading.local()  # .deadline: until when the request of this worker thread may take


class _DeadlineResponse(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_DeadlineReader(self.fp.detach(), sock, lambda: float(_thread.deadline)))


class _HTTPConnection(urllib3.connection.HTTPConnection):
    response_class = _DeadlineResponse


class _HTTPSConnection(urllib3.connection.HTTPSConnection):
    response_class = _DeadlineResponse


class _HTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _HTTPConnection


class _HTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _HTTPSConnection


class _DeadlineAdapter(requests.adapters.HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}

    def close(self) -> None:
        """Close the connections now: urllib3 2 leaves that to the garbage collector, which a daemon at rest does not reach."""
        for key in self.poolmanager.pools.keys():  # noqa: SIM118  the container cannot be iterated otherwise
            self.poolmanager.pools[key].close()
        super().close()


def _system_ca() -> Any:
    """The host's own CA bundle or folder rather than the one that pip may have brought with requests."""
    paths = ssl.get_default_verify_paths()
    return paths.cafile or paths.capath or True


class _Session(requests.Session):
    def get_redirect_target(self, resp: requests.Response) -> None:
        """Nowhere, ever: even without allow_redirects requests would read the whole body of a redirect, whatever its length."""


def _new_session(ca_file: str) -> requests.Session:
    """An HTTP session for one thread, deaf to proxies and .netrc of the environment: requests does not promise thread safety."""
    session = _Session()
    session.trust_env = False
    session.verify = ca_file or _system_ca()
    session.headers.update({"User-Agent": f"mailcloak/{__version__}", "Accept": "application/json", "Accept-Encoding": "identity"})
    for scheme in ("http://", "https://"):
        session.mount(scheme, _DeadlineAdapter(pool_connections=1, pool_maxsize=1))
    return session


def _describe_failure(exc: BaseException) -> str:
    """Why an HTTP request failed, from the innermost cause; never a URL, a header or a body."""
    chain: List[BaseException] = []
    current: Optional[BaseException] = exc
    while current is not None and current not in chain:
        chain.append(current)
        nested = [each for each in (*current.args, getattr(current, "reason", None)) if isinstance(each, BaseException)]
        current = nested[0] if nested else current.__cause__ or current.__context__
    for each in reversed(chain):
        if isinstance(each, ssl.SSLCertVerificationError):
            return f"certificate refused ({each.verify_message}), check keycloak.ca_file"
        if isinstance(each, (socket.timeout, requests.Timeout)):
            return "timed out"
        if isinstance(each, OSError) and each.strerror:
            return str(each.strerror).lower()
    return f"connection failed ({type(chain[-1]).__name__})"


EMAIL_MAY_BE_TAKEN = (
    "users may change their own e-mail and so take over any address: in the realm's user profile let only admins edit the attribute"
    " email, or turn on Verify email and set keycloak.require_verified_email"
)


# RFC 6749, section 5.2, and what Keycloak says of a realm that is turned off; any other text could be anything, a secret included
TOKEN_ERRORS = (
    "invalid_request",
    "invalid_client",
    "invalid_grant",
    "unauthorized_client",
    "unsupported_grant_type",
    "invalid_scope",
    "access_denied",
)


class _Lookup:
    """One question under way at Keycloak; those who ask the same meanwhile wait for it too."""

    __slots__ = ("attribute", "deadline", "done", "error", "users", "value")

    def __init__(self, attribute: str, value: str, deadline: Deadline) -> None:
        self.attribute, self.value, self.deadline = attribute, value, deadline
        self.done = threading.Event()
        self.users: Users = ()
        self.error: Optional[DirectoryUnavailable] = None


class KeycloakApi:
    """Requests to Keycloak for one configuration, with one access token for all of them. Entered by the worker threads below."""

    def __init__(self, config: KeycloakConfig) -> None:
        self._config = config
        realm = urllib.parse.quote(config.realm, safe="")
        self._token_url = f"{config.base_url}/realms/{realm}/protocol/openid-connect/token"
        self._users_url = f"{config.base_url}/admin/realms/{realm}/users"
        self.took = Durations()  # of requests, the failed ones too
        self.failed = 0  # of them; counted by several threads without a lock, so it may miss one
        self._token_turn = threading.Condition()  # guards the three below
        self._token = ""
        self._token_good_until = 0.0
        self._token_being_fetched = False

    def get_users(self, session: requests.Session, deadline: Deadline, **query: str) -> List[Dict[str, Any]]:
        """The user records that a search gives. Source: GET /admin/realms/{realm}/users."""
        status, body = self._get(session, deadline, self._users_url, query)
        if status == 403:
            raise DirectoryMisconfigured(self.message(f"search refused (HTTP 403), {self.role_remedy}"))
        if status != 200:
            raise DirectoryUnavailable(self.message(f"search failed (HTTP {status})"))
        records = self._json(body)
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise DirectoryUnavailable(self.message("the answer to a search is not a list of users"))
        return records

    def users_may_edit_email(self, session: requests.Session, deadline: Deadline) -> bool:
        """Does the realm's user profile let users change their own e-mail? False also where the profile cannot be read.

        Source: GET /admin/realms/{realm}/users/profile, attributes[].permissions.edit.
        """
        status, body = self._get(session, deadline, f"{self._users_url}/profile", {})
        if status != 200:
            return False
        try:
            attributes = {attribute["name"]: attribute for attribute in self._json(body)["attributes"]}
            return "user" in attributes["email"]["permissions"]["edit"]
        except (KeyError, TypeError):
            return False

    def message(self, what: str) -> str:
        return f"directory: realm {self._config.realm!r}: {what}"

    @property
    def role_remedy(self) -> str:
        return f"give the service account of client {self._config.client_id!r} the realm-management role view-users"

    def _get(self, session: requests.Session, deadline: Deadline, url: str, query: Mapping[str, str]) -> Tuple[int, bytes]:
        """(status, body); the token is renewed once if Keycloak says 401."""
        token = self._access_token(session, deadline, rejected="")
        status, body = self._exchange(session, deadline, "GET", url, params=query, headers={"Authorization": f"Bearer {token}"})
        if status == 401:
            token = self._access_token(session, deadline, rejected=token)
            status, body = self._exchange(session, deadline, "GET", url, params=query, headers={"Authorization": f"Bearer {token}"})
        return status, body

    def _access_token(self, session: requests.Session, deadline: Deadline, rejected: str) -> str:
        """A token that is not the rejected one. One thread fetches, the others wait for it."""
        with self._token_turn:
            while self._token_being_fetched:
                if not self._token_turn.wait(max(0.0, deadline - time.monotonic())):
                    raise DirectoryUnavailable(self.message("timed out waiting for a token"))
            if self._token not in ("", rejected) and time.monotonic() < self._token_good_until:
                return self._token
            self._token_being_fetched = True
        token, life_seconds = "", 0.0
        try:
            asked_at = time.monotonic()
            token, life_seconds = self._fetch_token(session, deadline)
        finally:
            with self._token_turn:
                self._token_being_fetched = False
                self._token, self._token_good_until = token, asked_at + life_seconds * TOKEN_LIFE_USED
                self._token_turn.notify_all()
        return token

    def _fetch_token(self, session: requests.Session, deadline: Deadline) -> Tuple[str, float]:
        """(access_token, its life in seconds) by the client credentials grant (RFC 6749, section 4.4)."""
        form = {
            "grant_type": "client_credentials",
            "client_id": self._config.client_id,
            "client_secret": self._config.client_secret,
        }
        status, body = self._exchange(session, deadline, "POST", self._token_url, data=form)
        if status == 404:
            raise DirectoryMisconfigured(self.message("no such realm (HTTP 404), check keycloak.realm and keycloak.base_url"))
        if status in (400, 401):
            reason = ""
            with contextlib.suppress(DirectoryUnavailable, AttributeError, TypeError):
                error = self._json(body).get("error")
                reason = f" {error}" if error in TOKEN_ERRORS else ""
            remedy = "check keycloak.client_id and keycloak.client_secret and that the client has Service accounts roles on"
            raise DirectoryMisconfigured(self.message(f"token refused (HTTP {status}{reason}), {remedy}"))
        if status != 200:
            raise DirectoryUnavailable(self.message(f"no token (HTTP {status})"))
        answer = self._json(body)
        token = answer.get("access_token") if isinstance(answer, dict) else None
        life = answer.get("expires_in") if isinstance(answer, dict) else None
        if (
            not isinstance(token, str)
            or not re.fullmatch(r"[!-~]+", token)
            or not isinstance(life, (int, float))
            or not 0 < life < 1e12
        ):
            raise DirectoryUnavailable(self.message("the answer to the token request holds no token"))
        return token, float(life)

    def _exchange(self, session: requests.Session, deadline: Deadline, method: str, url: str, **options: Any) -> Tuple[int, bytes]:
        """(status, body) of one request, finished by the deadline."""
        try:
            try:
                return self._exchange_once(session, deadline, method, url, options)
            except requests.ConnectionError:  # most likely a kept connection that the server has closed meanwhile
                return self._exchange_once(session, deadline, method, url, options)
        except (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError) as exc:
            raise DirectoryUnavailable(self.message(_describe_failure(exc))) from exc

    def _exchange_once(
        self, session: requests.Session, deadline: Deadline, method: str, url: str, options: Mapping[str, Any]
    ) -> Tuple[int, bytes]:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise DirectoryUnavailable(self.message("timed out"))
        _thread.deadline = deadline
        started = time.monotonic()
        try:
            with session.request(method, url, timeout=remaining, allow_redirects=False, stream=True, **options) as response:
                return response.status_code, self._read_body(response)
        except Exception:
            self.failed += 1
            raise
        finally:
            self.took.note(time.monotonic() - started)

    def _read_body(self, response: requests.Response) -> bytes:
        body = bytearray()
        for chunk in response.iter_content(64 * 1024):
            body += chunk
            if len(body) > MAX_DIRECTORY_BODY_BYTES:
                raise DirectoryUnavailable(self.message(f"an answer of more than {MAX_DIRECTORY_BODY_BYTES} bytes"))
        return bytes(body)

    def _json(self, body: bytes) -> Any:
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as exc:
            raise DirectoryUnavailable(self.message("the answer is not JSON")) from exc


class Outage:
    """Whether Keycloak counts as away: from so many failures in a row until the first success. One line in the log each way."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.suspected = threading.Event()  # wakes the probe
        self.established = False  # read without the lock: a moment's delay is no harm
        self._clock = clock
        self._lock = threading.Lock()  # guards the fields below, and the writing of established
        self._failures = 0
        self._said = ""  # what the log says of this outage
        self._since = 0.0
        self._kept = 0
        self._deferred = 0

    def note_failure(self, error: DirectoryUnavailable) -> None:
        """A request to Keycloak failed. What an administrator must mend is an outage at once."""
        with self._lock:
            self._failures += 1
            begins = not self.established and (self._failures >= OUTAGE_FAILURES or isinstance(error, DirectoryMisconfigured))
            if self._failures == 1:
                self._since, self._kept, self._deferred = self._clock(), 0, 0
            self.established = self.established or begins
            is_new = begins or (isinstance(error, DirectoryMisconfigured) and str(error) != self._said)
            self._said = str(error) if is_new else self._said
            established = self.established
        self.suspected.set()
        if is_new:
            log.log(logging.ERROR if isinstance(error, DirectoryMisconfigured) else logging.WARNING, "%s", error)
        elif not established:
            log.info("%s", error)

    def note_success(self, message: Callable[[str], str]) -> None:
        """A request to Keycloak was answered."""
        if not self._failures:  # read without the lock: the common case
            return
        with self._lock:
            self._failures, self._said, ends, self.established = 0, "", self.established, False
            seconds, kept, deferred = self._clock() - self._since, self._kept, self._deferred
        if ends:
            log.warning("%s", message(f"answers again, after {seconds:.0f} s, {kept} answers were kept ones, {deferred} deferred"))

    def report(self) -> Dict[str, Any]:
        """What the map stats says of it."""
        with self._lock:
            away = self.established
            return {
                "state": "away" if away else "answers",
                "since_seconds": self._clock() - self._since if away else None,
                "failure": self._said if away else "",
            }

    def count_answer(self, *, kept: bool) -> None:
        """An answer that Keycloak should have given was a kept one, or there was none."""
        with self._lock:
            self._kept += kept
            self._deferred += not kept


class KeycloakDirectory:
    """Users by e-mail or username from Keycloak."""

    def __init__(self, config: KeycloakConfig) -> None:
        self.outage = Outage()
        self._config = config
        self._api = KeycloakApi(config)
        self._queue: queue.SimpleQueue[Optional[_Lookup]] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._lock = threading.Lock()  # guards the two below
        self._given_up = False
        self._pending: Dict[Tuple[str, str], _Lookup] = {}
        self._canary_turn = threading.Condition()  # guards the three below
        self._canaries_being_asked = False
        self._canaries_there_at = -math.inf
        self._canary_failure: Tuple[float, Optional[DirectoryUnavailable]] = (-math.inf, None)  # (asked at, how it failed)
        self._proof: Tuple[float, bool] = (-math.inf, True)  # when we last asked whether we see any user at all, and the answer
        for number in range(config.max_requests):
            threading.Thread(target=self._work, name=f"keycloak-{number}", daemon=True).start()
        threading.Thread(target=self._probe, name="keycloak-probe", daemon=True).start()

    def find_users(self, attribute: str, value: str, deadline: Deadline) -> Users:
        """All users whose "email" or "username" is value, which is normalised and not empty; disabled ones too.

        Raises DirectoryUnavailable, at the deadline at the latest, and at once in an established outage.
        Source: Keycloak admin REST interface, GET /admin/realms/{realm}/users with exact and briefRepresentation.
        """
        if self.outage.established:
            raise DirectoryUnavailable(self._message("away"))
        key = (attribute, value)
        with self._lock:
            if self._given_up:
                raise DirectoryUnavailable(self._message("shutting down"))
            lookup = self._pending.get(key)
            if lookup is None:
                if self._queue.qsize() >= MAX_DIRECTORY_WAITING:
                    raise DirectoryUnavailable(self._message("too many lookups are waiting"))
                lookup = self._pending[key] = _Lookup(attribute, value, deadline)
                self._queue.put(lookup)
        if not lookup.done.wait(max(0.0, deadline - time.monotonic())):
            error = DirectoryUnavailable(self._message(f"no answer within {self._config.timeout_seconds:g} s"))
            self._end(lookup, error)  # who asks from now on does not wait for this one too
            raise error
        if lookup.error is not None:
            raise DirectoryUnavailable(str(lookup.error)) from lookup.error
        return lookup.users

    def report(self) -> Dict[str, Any]:
        """What the map stats says of Keycloak."""
        took = self._api.took
        return {**self.outage.report(), "requests": sum(took.counts), "failed": self._api.failed, "seconds": took.seconds}

    def give_up(self) -> None:
        """Fail every lookup from now on, those pending too: at shutdown nobody waits longer."""
        with self._lock:
            self._given_up = True
            pending, self._pending = list(self._pending.values()), {}
        for lookup in pending:
            lookup.error = lookup.error or DirectoryUnavailable(self._message("shutting down"))
            lookup.done.set()

    def close(self) -> None:
        """End the threads, the workers after what is queued."""
        self._closed.set()
        self.outage.suspected.set()
        for _ in range(self._config.max_requests):
            self._queue.put(None)

    def _end(self, lookup: _Lookup, error: Optional[DirectoryUnavailable]) -> None:
        """Take the lookup out of those under way; the first who does so notes how it went, so that a failure counts once."""
        with self._lock:
            if self._pending.get((lookup.attribute, lookup.value)) is not lookup:
                return
            del self._pending[(lookup.attribute, lookup.value)]
        if error is None:
            self.outage.note_success(self._message)
        elif not isinstance(error, NoSingleAnswer):
            self.outage.note_failure(error)

    # ---- worker threads

    def _work(self) -> None:
        with _new_session(self._config.ca_file) as session:
            while True:
                lookup = self._queue.get()
                if lookup is None:
                    return
                self._serve(session, lookup)

    def _serve(self, session: requests.Session, lookup: _Lookup) -> None:
        try:
            lookup.users = self._search(session, lookup)
        except DirectoryUnavailable as exc:
            lookup.error = exc
        except Exception as exc:  # a bug or bytes nobody thought of: an outage for this question, never the end of the worker
            log.error("directory: internal error %s", _describe_exception(exc))
            lookup.error = DirectoryUnavailable(self._message("internal error"))
        self._end(lookup, lookup.error)
        lookup.done.set()

    def _search(self, session: requests.Session, lookup: _Lookup) -> Users:
        users = self._search_once(session, lookup)
        if any(user.enabled for user in users):
            return users
        answered_at = time.monotonic()
        if not users:
            self._prove_that_we_see_users(session, lookup.deadline)
        if self._config.canary:
            self._ask_canaries(session, lookup.deadline, answered_at)
            # Of two searches at once for somebody whom Keycloak is just importing from LDAP, one is told that he does not exist.
            users = users or self._search_once(session, lookup)
        return users

    def _search_once(self, session: requests.Session, lookup: _Lookup) -> Users:
        spellings = [lookup.value]
        if lookup.attribute == "email" and "xn--" in lookup.value:
            spellings.append(_to_unicode_domain(lookup.value))  # Keycloak stores an internationalised domain as it was typed
        found: Dict[str, User] = {}
        for spelling in dict.fromkeys(spellings):
            query = {lookup.attribute: spelling, "exact": "true", "briefRepresentation": "true", "max": str(MAX_DIRECTORY_MATCHES)}
            records = self._api.get_users(session, lookup.deadline, **query)
            matches = [record for record in records if self._matches(record, lookup)]
            if len(records) >= MAX_DIRECTORY_MATCHES and not matches:
                raise NoSingleAnswer(self._message(f"{len(records)} users for one {lookup.attribute} and no exact match"))
            if any(record.get("enabled") is False for record in matches):
                # Why a user is disabled is an attribute, which Keycloak 26.0 leaves out of the brief form.
                records = self._api.get_users(session, lookup.deadline, **{**query, "briefRepresentation": "false"})
                matches = [record for record in records if self._matches(record, lookup)]
            found.update(
                (user.username, user) for user in map(self._to_user, matches) if user.email or lookup.attribute == "username"
            )
        return tuple(found.values())

    def _ask_canaries(self, session: requests.Session, deadline: Deadline, answered_at: float) -> None:
        """Raise DirectoryUnavailable unless every canary is there, asked after the negative answer came.

        While its user storage is down Keycloak may say of anybody that he is missing or disabled, and then of the canaries too. One
        thread asks, the others that need it wait.
        """
        with self._canary_turn:
            while self._canaries_being_asked and self._canaries_there_at < answered_at:
                if not self._canary_turn.wait(max(0.0, deadline - time.monotonic())):
                    raise DirectoryUnavailable(self._message("timed out waiting for the canaries"))
                asked_at, error = self._canary_failure
                if error and asked_at >= answered_at:
                    raise DirectoryUnavailable(str(error))
            if self._canaries_there_at >= answered_at:
                return
            self._canaries_being_asked = True
        asked_at = time.monotonic()
        failure: Optional[DirectoryUnavailable] = DirectoryUnavailable(self._message("the canaries could not be asked"))
        try:
            for address in self._config.canary:
                records = self._api.get_users(session, deadline, email=address, exact="true", briefRepresentation="true", max="2")
                if not any(
                    normalise_address(self._string(each, "email")).text == address and each.get("enabled") is True
                    for each in records
                ):
                    raise DirectoryUnavailable(
                        self._message(f"canary <{address}> is missing or disabled, no such answer is believed")
                    )
            failure = None
        except DirectoryUnavailable as exc:
            failure = exc
            raise
        finally:
            with self._canary_turn:
                self._canaries_being_asked = False
                self._canary_failure = (asked_at, failure)
                if failure is None:
                    self._canaries_there_at = asked_at
                self._canary_turn.notify_all()

    def _prove_that_we_see_users(self, session: requests.Session, deadline: Deadline) -> None:
        """Raise DirectoryMisconfigured where an empty answer proves nothing: with the role query-users alone every search is empty.

        Asked again at the first empty answer of each minute, since a role can be lost at run time.
        """
        asked_at, sees_users = self._proof  # one read of a tuple needs no lock
        if time.monotonic() - asked_at > (PROOF_SECONDS if sees_users else PROOF_RETRY_SECONDS):
            sees_users = self._ask_for_any_user(session, deadline)
        if not sees_users:
            raise DirectoryMisconfigured(
                self._message(f"sees no users at all (query-users is not enough), {self._api.role_remedy}")
            )

    def _ask_for_any_user(self, session: requests.Session, deadline: Deadline) -> bool:
        asked_at = time.monotonic()
        sees_users = bool(self._api.get_users(session, deadline, max="1"))
        self._proof = (asked_at, sees_users)
        return sees_users

    def _matches(self, record: Mapping[str, Any], lookup: _Lookup) -> bool:
        """Is this really the user asked for? Older servers ignore exact=true and send everybody whose name contains the value."""
        if lookup.attribute == "username":
            return self._string(record, "username").lower() == lookup.value
        return normalise_address(self._string(record, "email")).text == lookup.value

    def _to_user(self, record: Mapping[str, Any]) -> User:
        username, email = self._string(record, "username").lower(), self._string(record, "email")
        enabled, verified = record.get("enabled"), record.get("emailVerified", False)
        if not username or not isinstance(enabled, bool) or not isinstance(verified, bool):
            raise DirectoryUnavailable(self._message("a user record without username or enabled"))
        is_service_account = bool(record.get("serviceAccountClientId")) or username.startswith("service-account-")
        if is_service_account or (self._config.require_verified_email and not verified):
            email = ""
        attributes = record.get("attributes")
        reason = attributes.get("disabledReason") if isinstance(attributes, dict) else None
        locked_out = not enabled and reason in ("permanentLockout", ["permanentLockout"]) and self._config.receive_when_locked_out
        return User(username, normalise_address(email).text, enabled, locked_out, bool(record.get("federationLink")))

    def _string(self, record: Mapping[str, Any], name: str) -> str:
        value = record.get(name)
        if value is not None and not isinstance(value, str):
            raise DirectoryUnavailable(self._message(f"a user record whose {name} is not text"))
        return value or ""

    def _message(self, what: str) -> str:
        return self._api.message(what)

    # ---- the probe: a self-check at start, and from the first failure on until Keycloak answers

    def _probe(self) -> None:
        profile_seen = self._config.require_verified_email
        pause = 0.0
        with _new_session(self._config.ca_file) as session:
            while True:
                self.outage.suspected.clear()
                if self._closed.is_set():
                    return
                deadline = time.monotonic() + min(self._config.timeout_seconds, PROBE_SECONDS)
                try:
                    self._ask_for_any_user(session, deadline)
                    self._prove_that_we_see_users(session, deadline)
                    if self._config.canary:
                        self._ask_canaries(session, deadline, time.monotonic())
                    email_may_be_taken = not profile_seen and self._api.users_may_edit_email(session, deadline)
                except Exception as exc:
                    if not isinstance(exc, DirectoryUnavailable):
                        log.error("directory: internal error %s", _describe_exception(exc))
                        exc = DirectoryUnavailable(self._message("internal error"))
                    self.outage.note_failure(exc)
                    pause = min(PROBE_PAUSE_SECONDS, pause * 2 or 0.25)
                    self._closed.wait(pause * random.uniform(0.5, 1))  # noqa: S311  jitter, so that many hosts do not ask at once
                    continue
                self.outage.note_success(self._message)
                if email_may_be_taken:
                    log.error("%s", self._message(EMAIL_MAY_BE_TAKEN))
                profile_seen, pause = True, 0.0
                self.outage.suspected.wait()


def _to_unicode_domain(address: str) -> str:
    local_part, _, domain = address.rpartition("@")
    try:
        return f"{local_part}@{idna.decode(domain)}"
    except (UnicodeError, ValueError, IndexError):
        return address


def _describe_exception(exc: BaseException) -> str:
    """Type, text and place of an unexpected exception on one line."""
    frame = exc.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    place = f"{os.path.basename(frame.tb_frame.f_code.co_filename)}:{frame.tb_lineno}" if frame else "?"
    return f"error={type(exc).__name__} text={escape_for_log(str(exc))} at={place}"


class CachedDirectory:
    """The directory behind the cache, as the decisions want it: who has this address, and whom does this login name.

    An answer is remembered for its time to live. A positive one is asked for again in the background when it is used near its end, and
    serves on while Keycloak is away, until policy.stale_if_error_seconds after it was confirmed.
    """

    def __init__(
        self,
        directory: Any,
        policy: PolicyConfig,
        timeout_seconds: float,
        last_known: Optional[LastKnown] = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._policy = policy
        self._timeout_seconds = timeout_seconds
        self._last_known = last_known
        self._clock = clock
        self._cache: Cache = Cache(policy.cache_max_entries, clock)
        self._refresh_seconds = REFRESH_AHEAD * policy.cache_ttl_seconds
        self.lookups = dict.fromkeys(("cache", "keycloak", "kept", "failed"), 0)  # no lock: it may miss one in a great many
        self.closed = threading.Event()
        self._confirmed = ("", -math.inf)  # the username that Keycloak confirmed last, and when
        self._refreshes: queue.Queue[Optional[Tuple[str, str]]] = queue.Queue(MAX_REFRESHES_WAITING)
        self._refreshing: Set[Tuple[str, str]] = set()  # what is in the queue; each use of a set is one atomic step
        if last_known:
            self._take_up(last_known)
        threading.Thread(target=self._refresh, name="refresh", daemon=True).start()

    def _take_up(self, last_known: LastKnown) -> None:
        """Begin with what was known before: not fresh, but to be kept in an outage."""
        now, wall_clock = self._clock(), time.time()
        for kind, name, text, confirmed_at, missing_seconds, missing_at in last_known.load():
            with contextlib.suppress(ValueError, TypeError):
                value = Login(text, "enabled") if kind == "login" else tuple(User(*each) for each in json.loads(text))
                confirmed = now - max(0.0, wall_clock - confirmed_at)
                kept_until = confirmed + self._policy.stale_if_error_seconds
                missing = None
                if missing_seconds is not None and missing_at is not None:
                    missing = Missing(missing_seconds, now - max(0.0, wall_clock - missing_at))
                    kept_until = max(kept_until, missing.seen_at + self._policy.disappearance_grace_seconds)
                self._cache.put((kind, name), Entry(value, True, confirmed, -math.inf, kept_until, missing))

    def find_holders(self, address: str, deadline: Deadline) -> Users:
        """The users whose primary e-mail this is, disabled ones too. Raises DirectoryUnavailable."""
        holders: Users = self._find(("holders", address), deadline)
        return holders

    def find_login(self, sasl_username: str, deadline: Deadline) -> Login:
        """Whom sasl_username, lower-cased, names: a username or, where there is no such username, a primary e-mail."""
        login: Login = self._find(("login", sasl_username), deadline)
        return login

    def find_entry(self, key: Tuple[str, str]) -> Optional[Entry]:
        """What is remembered of ("holders", address) or ("login", sasl_username), fresh or not."""
        return self._cache.get(key)

    def holds(self, entries: Iterable[Tuple[Tuple[str, str], Entry]]) -> bool:
        """Is each entry still what is remembered of its key, fresh, and not yet to be asked for again?"""
        end = self._clock() + self._refresh_seconds
        for key, entry in entries:  # noqa: SIM110  all() of a generator takes twice as long
            if end >= entry.fresh_until or not self._cache.holds(key, entry):
                return False
        return True

    def forget(self, address: Optional[str]) -> int:
        """Forget all that is known of the users whom this address, with an extension or without, or login means, on disk too.

        None forgets everybody. Returns how many answers these were.
        """
        if address is None:
            if self._last_known:
                self._last_known.forget(None)
            return self._cache.forget(lambda key, entry: True)
        spellings = address_spellings(normalise_address(address), self._policy.recipient_delimiter)
        names = {spelling.text for spelling, _ in spellings}
        entries = [self._cache.get((kind, name)) for kind in ("holders", "login") for name in names]
        names.update(*(_usernames(entry.value) for entry in entries if entry))
        if self._last_known:
            self._last_known.forget(names)
        return self._cache.forget(lambda key, entry: key[1] in names or not names.isdisjoint(_usernames(entry.value)))

    def report(self) -> Dict[str, Any]:
        """What the map stats says of users and Keycloak."""
        users, missing = self._cache.sizes()
        cache = {"users": users, "missing": missing, "limit": self._policy.cache_max_entries}
        return {"lookups": dict(self.lookups), "cache": cache, "keycloak": self._directory.report()}

    def give_up(self) -> None:
        """Fail every lookup from now on, those pending too."""
        self._directory.give_up()

    def close(self) -> None:
        """End the threads; the directory gives no answer after this."""
        self.closed.set()
        self._directory.close()
        self._refreshes.put(None)

    def _find(self, key: Tuple[str, str], deadline: Deadline) -> Any:
        entry = self._cache.get(key)
        if entry is not None:
            remaining = entry.fresh_until - self._clock()
            if remaining > 0 and entry.missing:
                raise Disappeared(f"directory: {key[1]} has disappeared")
            if remaining > 0:
                if entry.positive and remaining <= self._refresh_seconds:
                    self._refresh_soon(key)
                self.lookups["cache"] += 1
                return entry.value
        try:
            value = self._ask(key, deadline)
        except DirectoryUnavailable as exc:
            kept = entry is not None and entry.positive and not entry.missing and not isinstance(exc, Disappeared)
            self._directory.outage.count_answer(kept=kept)
            self.lookups["kept" if kept else "failed"] += 1
            if entry is not None and kept:
                return entry.value
            raise
        self.lookups["keycloak"] += 1
        return value

    def _ask(self, key: Tuple[str, str], deadline: Deadline) -> Any:
        """Ask the directory itself, and remember the answer."""
        kind, name = key
        asked_at = self._clock()
        if kind == "holders":
            value: Any = self._directory.find_users("email", name, deadline)
            positive = any(user.receives for user in value)
            gone = {user.username for user in value if not user.enabled}
            usernames = [user.username for user in value]
            may_be_a_lie = not value or all(user.federated for user in value)
        else:
            value = self._ask_login(name, deadline)
            positive = value.state == "enabled"
            gone = set() if positive else {name}
            usernames = [value.username]
            may_be_a_lie = value.state == "missing" or value.federated
        known = self._cache.get(key)
        doubtful = may_be_a_lie and self._policy.disappearance_grace_seconds > 0
        if gone:  # who may not send any more may not do so under another of his names either
            self._cache.revise(lambda entry: _take_back_login(entry, gone, Missing(0.0, asked_at) if doubtful else None))
        if positive:
            if gone and self._last_known:
                self._last_known.take_back(key, gone)
            self._confirmed = (usernames[0], asked_at)
            self._keep(key, value, usernames, asked_at)
            return value
        if doubtful and known and known.positive:
            self._defer_disappearance(key, known, gone, asked_at)
        until = asked_at + self._policy.negative_cache_ttl_seconds
        self._cache.put(key, Entry(value, False, asked_at, until, until))
        if self._last_known and (gone or (known and known.positive)):
            self._last_known.take_back(key, gone)
        return value

    def _keep(self, key: Tuple[str, str], value: Any, usernames: Sequence[str], asked_at: float) -> None:
        policy = self._policy
        kept_seconds = max(policy.cache_ttl_seconds, policy.stale_if_error_seconds)
        self._cache.put(key, Entry(value, True, asked_at, asked_at + policy.cache_ttl_seconds, asked_at + kept_seconds))
        if self._last_known:
            text = value.username if key[0] == "login" else json.dumps(value)
            self._last_known.remember(key, usernames, text, time.time())

    def _defer_disappearance(self, key: Tuple[str, str], known: Entry, gone: Set[str], asked_at: float) -> None:
        """Raise Disappeared until Keycloak has said for long enough that a user is gone whom it knew; then log that it is believed.

        The time counts only while it confirms other users: a realm whose storage is down, and which lies about everybody, never gets
        there. Until then the answer is 451, neither the 550 of the lie nor what was known before.
        """
        policy = self._policy
        seconds, seen_at = known.missing or (0.0, asked_at)
        confirmed_username, confirmed_at = self._confirmed
        known_usernames = [known.value.username] if key[0] == "login" else [user.username for user in known.value]
        if confirmed_at > seen_at and confirmed_username not in known_usernames:
            seconds += asked_at - seen_at
        if seconds >= policy.disappearance_grace_seconds:
            log.warning(
                "directory: %s <%s> has been gone for %.0f s, believed from now on", key[0], escape_for_log(key[1]), seconds
            )
            return
        missing = Missing(seconds, asked_at)
        kept_until = asked_at + max(policy.stale_if_error_seconds, policy.disappearance_grace_seconds)
        self._cache.put(
            key, known._replace(fresh_until=asked_at + policy.negative_cache_ttl_seconds, kept_until=kept_until, missing=missing)
        )
        if self._last_known:
            self._last_known.take_back(key, gone, (seconds, time.time()))
        raise Disappeared(f"directory: {key[1]} has disappeared")

    def _ask_login(self, sasl_username: str, deadline: Deadline) -> Login:
        named = self._directory.find_users("username", sasl_username, deadline)
        address = normalise_address(sasl_username)
        # user%domain and the like are names here, not addresses
        may_be_email = address.is_plain and sasl_username.startswith(f"{address.local_part}@")
        holders = self._directory.find_users("email", address.text, deadline) if may_be_email else ()
        return resolve_login(named, holders)

    def _refresh_soon(self, key: Tuple[str, str]) -> None:
        if key not in self._refreshing:
            self._refreshing.add(key)
            try:
                self._refreshes.put_nowait(key)
            except queue.Full:
                self._refreshing.discard(key)

    def _refresh(self) -> None:
        while True:
            key = self._refreshes.get()
            if key is None:
                return
            try:
                self._ask(key, time.monotonic() + self._timeout_seconds)
            except DirectoryUnavailable:
                pass  # the entry stays as it is
            except Exception as exc:
                log.error("directory: internal error %s", _describe_exception(exc))
            self._refreshing.discard(key)


def _usernames(value: Any) -> Set[str]:
    """Of the users in an answer of the cache."""
    return {user.username for user in ((value,) if isinstance(value, Login) else value)} - {""}


def _take_back_login(entry: Entry, gone: Set[str], missing: Optional[Missing]) -> Optional[Entry]:
    """What remains of a kept login of somebody who is gone: with missing, one that is not kept until he is found again."""
    if not isinstance(entry.value, Login) or entry.value.username not in gone:
        return entry
    return entry._replace(fresh_until=-math.inf, missing=entry.missing or missing) if missing else None


def resolve_login(named: Users, holders: Users) -> Login:
    """The login of users found by username (named) and by primary e-mail (holders). A user without an e-mail does not exist."""
    usernames = {user.username for user in named + holders}
    if len(usernames) > 1:
        return Login("", "ambiguous")
    users = [user for user in named + holders if user.email]
    if not users:
        return Login("", "missing")
    if all(user.enabled for user in users):
        return Login(users[0].username, "enabled")
    return Login("", "disabled", any(user.federated for user in users))


# ---------------------------------------------------------------------------------------------------------------------------------
# 7. Decisions
# From a request and the facts to an answer: the decision tables, row by row. Pure: no socket, log line or clock. Facts are asked for
# only when a row needs them, so that an alias is answered while Keycloak is away; a test hands in facts made of plain values.
# ---------------------------------------------------------------------------------------------------------------------------------


class PolicyRequest(NamedTuple):
    """The attributes of a policy request that decide, as the client sent them. Source: SMTPD_POLICY_README."""

    protocol_state: str = ""
    policy_context: str = ""
    recipient: str = ""
    sender: str = ""
    sasl_username: str = ""
    sasl_method: str = ""
    text: str = ""  # all of it, where the log finds the others


_DECIDING = PolicyRequest._fields[:-1]


class Action(NamedTuple):
    """An answer to Postfix, and why, for the log. level is the level at which it is logged."""

    text: str
    reason: str
    level: int = logging.INFO


class Owner(NamedTuple):
    """Whose an address is. username is "" for nobody, and also where two users share a primary e-mail."""

    username: str
    source: str  # "alias", "primary", "nobody", or why it is not known: "directory-unavailable", "database-unavailable"
    extension: str = ""  # what was cut off the address to find the owner, with its delimiter
    is_certain: bool = True  # False for a primary e-mail while SQLite cannot say whether it is an alias as well


class Facts:
    """What a decision may ask. The daemon's are looked up (section 9); a test's are values."""

    def find_alias(self, address: Address) -> Optional[Alias]:
        """Raises DatabaseUnavailable."""
        raise NotImplementedError

    def find_app(self, app_id: str, sender: Address) -> Optional[App]:
        """Raises DatabaseUnavailable."""
        raise NotImplementedError

    def find_holders(self, address: Address) -> Users:
        """Raises DirectoryUnavailable."""
        raise NotImplementedError

    def find_login(self, sasl_username: str) -> Login:
        """Raises DirectoryUnavailable."""
        raise NotImplementedError


NO_SUCH_USER = "550 5.1.1 No such user"
LOCAL_SENDER_UNAUTHENTICATED = "553 5.7.1 Sending from local domains requires authentication"
SENDER_NOT_OWNED = "553 5.7.1 Sender not owned by authenticated user"
DIRECTORY_FAILED = "451 4.3.0 Temporary authentication/lookup failure"
INTERNAL_ERROR = "451 4.3.0 Temporary internal error"
TOKEN_METHODS = frozenset({"xoauth2", "oauthbearer"})  # a Keycloak token; by any other method the login may be an app's


@functools.lru_cache(maxsize=100)  # there are a dozen reasons
def accept(reason: str) -> Action:
    """No objection. Never OK, which would end Postfix's restriction list and skip the checks after this one (access(5))."""
    return Action("DUNNO", reason, logging.DEBUG)


def is_local(address: Address, policy: PolicyConfig) -> bool:
    """In our domains, or without a domain, to which Postfix will append one of ours."""
    return address.domain in policy.domain or bool(address.local_part and not address.domain)


def find_owner(address: Address, policy: PolicyConfig, facts: Facts) -> Owner:
    """Whose address this is: enabled alias, primary e-mail, disabled alias (nobody), then the same without the extension.

    Without SQLite a primary e-mail still counts; without Keycloak only an exact, enabled alias does, since the address might be
    somebody's primary e-mail. Raises nothing.
    """
    if address.domain not in policy.domain or not address.is_plain:
        return Owner("", "nobody")
    database_failed = False
    for spelling, extension in address_spellings(address, policy.recipient_delimiter):
        alias = None
        try:
            alias = facts.find_alias(spelling)
        except DatabaseUnavailable:
            database_failed = True
        if alias and alias.enabled and alias.username:
            return Owner(alias.username, "alias", extension)
        try:
            holders = facts.find_holders(spelling)
        except DirectoryUnavailable:
            return Owner("", "directory-unavailable")
        if any(user.receives for user in holders):
            return Owner(holders[0].username if len(holders) == 1 else "", "primary", extension, not database_failed)
        if alias:
            return Owner("", "nobody")
    return Owner("", "database-unavailable" if database_failed else "nobody")


def decide_recipient(recipient: Address, policy: PolicyConfig, facts: Facts) -> Action:
    """May mail for recipient come in?

    DUNNO for an address that has an owner and for domains that are not ours, 550 when it has none, 451 when that is not known.
    """
    # XXX: user%ours@elsewhere gets 550 if Postfix is not elsewhere and there is no such user of ours: an address form that nobody has
    # used in this century. Knowing $mydestination would end that.
    for number, step in enumerate(routing_steps(recipient)):
        if number == MAX_ROUTES:
            return Action(NO_SUCH_USER, "too-many-routes")
        if step.domain in policy.domain or step.domain == policy.mailbox_domain:
            recipient = step
            break
    if policy.mailbox_domain and recipient.domain == policy.mailbox_domain:
        return Action(NO_SUCH_USER, "mailbox-domain")
    if not is_local(recipient, policy):
        return accept("recipient-not-local")
    owner = find_owner(recipient, policy, facts)
    if owner.source in ("alias", "primary"):
        return accept(owner.source)
    if owner.source == "directory-unavailable":
        if policy.keycloak_failure_mode == "tempfail":
            return Action(DIRECTORY_FAILED, owner.source)
        return Action("DUNNO", owner.source)
    if owner.source == "database-unavailable":
        return Action(INTERNAL_ERROR, owner.source)
    return Action(NO_SUCH_USER, "unknown-recipient")


def decide_sender(request: PolicyRequest, policy: PolicyConfig, facts: Facts) -> Action:
    """May this client, logged in or not, use this sender?"""
    sender = normalise_address(request.sender)
    if not request.sasl_username:
        return decide_unauthenticated_sender(sender, policy)
    sasl_username = request.sasl_username.lower()
    if request.sasl_method.lower() not in TOKEN_METHODS:
        try:
            app = facts.find_app(sasl_username, sender)
        except DatabaseUnavailable:
            return Action(INTERNAL_ERROR, "database-unavailable")
        if app:  # in whatever state: an app that has a user's name must never become that user
            return _decide_app(app, policy, facts)
    return _decide_user(sasl_username, sender, policy, facts)


def _decide_app(app: App, policy: PolicyConfig, facts: Facts) -> Action:
    if app.state != "enabled":
        return Action(SENDER_NOT_OWNED, f"app-{app.state}")
    if not app.may_send:
        return Action(SENDER_NOT_OWNED, "app-sender")
    if app.owner:
        try:
            owner = facts.find_login(app.owner)
        except DirectoryUnavailable:
            return _fail_sender(policy)
        if owner.state != "enabled":
            return Action(SENDER_NOT_OWNED, f"app-owner-{owner.state}")
    return accept("app")


def decide_unauthenticated_sender(sender: Address, policy: PolicyConfig) -> Action:
    if not is_local(sender, policy):
        return accept("sender-not-local")
    if policy.unauthenticated_local_sender == "reject":
        return Action(LOCAL_SENDER_UNAUTHENTICATED, "local-sender-unauthenticated")
    level = logging.INFO if policy.unauthenticated_local_sender == "warn" else logging.DEBUG
    return Action("DUNNO", "local-sender-unauthenticated", level)


def _decide_user(sasl_username: str, sender: Address, policy: PolicyConfig, facts: Facts) -> Action:
    try:
        login = facts.find_login(sasl_username)
    except DirectoryUnavailable:
        return _decide_user_in_outage(sasl_username, sender, policy, facts)
    if login.state == "ambiguous":
        return Action(SENDER_NOT_OWNED, "login-ambiguous", logging.WARNING)
    if login.state != "enabled":
        return Action(SENDER_NOT_OWNED, f"login-{login.state}")
    if sender.text == "":
        return accept("null-sender")
    if not is_local(sender, policy):
        return accept("foreign-sender") if policy.foreign_sender == "dunno" else Action(SENDER_NOT_OWNED, "foreign-sender")
    owner = find_owner(sender, policy, facts)
    if owner.username and owner.username == login.username:
        return accept(f"own-{owner.source}")
    if owner.source == "directory-unavailable":
        return _fail_sender(policy)
    if owner.source == "database-unavailable" or not owner.is_certain:
        return Action(INTERNAL_ERROR, "database-unavailable")
    return Action(SENDER_NOT_OWNED, "sender-not-owned")


def _decide_user_in_outage(sasl_username: str, sender: Address, policy: PolicyConfig, facts: Facts) -> Action:
    owner = find_owner(sender, policy, facts)
    if owner.source == "alias" and owner.username == sasl_username:
        return accept("own-alias")
    return _fail_sender(policy)


def _fail_sender(policy: PolicyConfig) -> Action:
    return Action("DUNNO" if policy.keycloak_failure_mode == "dunno" else DIRECTORY_FAILED, "directory-unavailable")


def decide_alias(key: str, policy: PolicyConfig, facts: Facts) -> Action:
    """The socketmap's answer for a key of the alias map: "OK mailbox", "NOTFOUND ", or "TEMP reason".

    "NOTFOUND " keeps its space: Postfix wants one after every status word (socketmap_table(5)).
    """
    address = normalise_address(key)
    quoted = not _DOT_STRING.fullmatch(address.local_part)
    if "@" not in key or quoted or not address.is_plain or address.domain not in policy.domain:
        return Action("NOTFOUND ", "not-local", logging.DEBUG)
    not_found = Action("NOTFOUND ", "no-alias", logging.DEBUG)
    try:
        aliases = [facts.find_alias(spelling) for spelling, _ in address_spellings(address, policy.recipient_delimiter)]
    except DatabaseUnavailable:
        return Action("TEMP database not usable", "database-unavailable")
    if not policy.mailbox_domain and not any(alias and alias.enabled for alias in aliases):
        return not_found  # no alias can own it, so Keycloak need not be asked
    owner = find_owner(address, policy, facts)
    if owner.source.endswith("unavailable"):
        return Action("TEMP lookup failed", owner.source)
    if owner.source == "nobody" or (owner.source == "primary" and not policy.mailbox_domain):
        return not_found
    if not owner.username:
        return Action("TEMP several users have this address", "shared-primary", logging.ERROR)
    mailbox = format_mailbox(owner.username, owner.extension, policy.mailbox_domain or address.domain)
    return Action(f"OK {mailbox}", owner.source, logging.DEBUG)


def decide_policy(request: PolicyRequest, policy: PolicyConfig, facts: Facts) -> Action:
    """The answer to one policy request: at RCPT the recipient, then the sender; at MAIL the sender; else no objection."""
    if request.protocol_state not in ("RCPT", "MAIL"):
        return accept("other-state")
    recipient = None
    if request.protocol_state == "RCPT" and request.policy_context != "sender":
        recipient = decide_recipient(normalise_address(request.recipient), policy, facts)
        if recipient.text != "DUNNO" or request.policy_context == "recipient":
            return recipient
    elif request.policy_context == "recipient":
        return accept("nothing-to-check")
    sender = decide_sender(request, policy, facts)
    if not recipient or sender.text != "DUNNO":
        return sender
    return Action("DUNNO", f"{recipient.reason},{sender.reason}", max(recipient.level, sender.level))


Question = Tuple[str, ...]


def policy_question(request: PolicyRequest, policy: PolicyConfig) -> Question:
    """What of the request decides: requests with the same question have the same answer while policy and facts are the same.

    Of a sender who has not logged in that is only whether he is one of ours, which needs no facts. Mail comes from ever new senders.
    """
    if request.sasl_username:
        return request[: len(_DECIDING)]
    sender = decide_unauthenticated_sender(normalise_address(request.sender), policy)
    return (request.protocol_state, request.policy_context, request.recipient, sender.reason)


# ---------------------------------------------------------------------------------------------------------------------------------
# 8. Wire protocols
# Bytes to requests and answers to bytes. A stream object holds the bytes of one connection that are not a whole request yet. No I/O.
# ---------------------------------------------------------------------------------------------------------------------------------


def _decode(data: bytes) -> str:
    """Bytes of a client as text; what is not UTF-8 becomes characters that no stored address or name can hold."""
    return data.decode("utf-8", "surrogateescape")


class _Stream:
    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> None:
        self._buffer += data

    @property
    def has_begun(self) -> bool:
        """Are there bytes of a request that is not whole yet?"""
        return self._buffer != b""


class PolicyStream(_Stream):
    """Requests of the policy protocol: lines of name=value, ended by an empty line. Source: SMTPD_POLICY_README."""

    def next_request(self) -> Optional[PolicyRequest]:
        """The next whole request, None when there is none yet; raises ProtocolError for bytes that can never be one."""
        if not self._buffer:
            return None
        if self._buffer.startswith(b"\n"):
            raise ProtocolError("empty request")
        end = self._buffer.find(b"\n\n", 0, MAX_POLICY_REQUEST_BYTES)
        if end < 0:
            if len(self._buffer) >= MAX_POLICY_REQUEST_BYTES:
                raise ProtocolError(f"request longer than {MAX_POLICY_REQUEST_BYTES} bytes")
            return None
        request, self._buffer = self._buffer[:end], self._buffer[end + 2 :]
        return parse_policy_request(request)

    @staticmethod
    def encode(action: Action) -> bytes:
        return b"action=" + action.text.encode("utf-8", "replace") + b"\n\n"


_values_of = operator.itemgetter(*_DECIDING)
_POLICY_ATTRIBUTE = re.compile(rf"\n(request|{'|'.join(_DECIDING)})=([^\n]*)")
_LOGGED_ATTRIBUTE = re.compile(r"\n(client_address|queue_id)=([^\n]*)")


def parse_policy_request(data: bytes) -> PolicyRequest:
    """One request without its empty line. Any line but those of the attributes listed is ignored; raises ProtocolError."""
    text = _decode(b"\n" + data)
    attributes = dict(_POLICY_ATTRIBUTE.findall(text))
    if attributes.get("request") != "smtpd_access_policy":
        raise ProtocolError(f"request={escape_for_log(attributes.get('request', ''))}, expected smtpd_access_policy")
    try:
        return PolicyRequest._make((*_values_of(attributes), text))
    except KeyError:  # Postfix sends them all
        return PolicyRequest(**{name: value for name, value in attributes.items() if name != "request"}, text=text)


class SocketmapQuery(NamedTuple):
    name: str
    key: str


class SocketmapStream(_Stream):
    """Queries of the socketmap protocol: netstrings that hold a map name, a space and a key. Source: socketmap_table(5)."""

    def next_request(self) -> Optional[SocketmapQuery]:
        """The next whole query, None when there is none yet; raises ProtocolError for bytes that are not a netstring."""
        if not self._buffer:
            return None
        digits, colon, rest = self._buffer.partition(b":")
        if not re.fullmatch(rb"(0|[1-9][0-9]{0,4})?", digits) or (colon and not digits):
            raise ProtocolError("not a netstring")
        if not colon:
            return None
        length = int(digits)
        if length > MAX_SOCKETMAP_QUERY_BYTES:
            raise ProtocolError(f"query longer than {MAX_SOCKETMAP_QUERY_BYTES} bytes")
        if len(rest) <= length:
            return None
        if rest[length : length + 1] != b",":
            raise ProtocolError("netstring without its comma")
        self._buffer = rest[length + 1 :]
        name, _, key = _decode(rest[:length]).partition(" ")
        return SocketmapQuery(name, key)

    @staticmethod
    def encode(action: Action) -> bytes:
        return encode_netstring(action.text.encode("utf-8", "replace"))


def encode_netstring(payload: bytes) -> bytes:
    """Source: D. J. Bernstein, Netstrings, 1997."""
    return b"%d:%s," % (len(payload), payload)


# ---------------------------------------------------------------------------------------------------------------------------------
# 9. Servers
# One server a socket, one thread a connection. A handler reads, asks the sections above, writes, and logs one line a decision. A
# connection stays open after an answer until Postfix closes it: a policy client that is closed on waits a second before it
# reconnects (smtpd_policy_service_retry_delay), and that second would be paid for every recipient.
# ---------------------------------------------------------------------------------------------------------------------------------


class Remembered(NamedTuple):
    """An answer, and all that it was made from besides the configuration."""

    action: Action
    file_state: Optional[FileState]
    entries: Sequence[Tuple[Tuple[str, str], Entry]]  # of the directory's cache, with their keys


class RememberedAnswers:
    """Answers by their question, the longest known pushed out first. What makes them fast is also why they may be wrong: see LiveFacts."""

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._lock = threading.Lock()  # guards the order of the dict; a look-up needs none
        self._answers: OrderedDict[Question, Remembered] = OrderedDict()
        self.get = self._answers.get

    def put(self, question: Question, remembered: Remembered) -> None:
        """Remember the answer, unless the question is longer than any that is asked twice."""
        if sum(map(len, question)) > MAX_REMEMBERED_CHARS:
            return
        with self._lock:
            self._answers[question] = remembered
            if len(self._answers) > self._max_entries:
                self._answers.popitem(last=False)

    def __len__(self) -> int:
        return len(self._answers)


class Service:
    """All that answers come from, for one configuration. A reload makes a new one and swaps it in."""

    def __init__(self, config: Config, old: Optional[Service] = None) -> None:
        self.config = config
        self.policy = config.policy
        self.database: Database = old.database if old and old.config.sqlite == config.sqlite else Database(config.sqlite.path)
        self.timeout_seconds = config.keycloak.timeout_seconds if config.keycloak else 1.0
        directory: Any = KeycloakDirectory(config.keycloak) if config.keycloak else StaticDirectory(config.static_users or {})
        self.last_known: Optional[LastKnown] = None
        if config.keycloak:
            path = last_known_path(config.sqlite.path)
            origin = (path, f"{config.keycloak.base_url} {config.keycloak.realm}", config.policy.cache_max_entries)
            same = old.last_known if old else None
            self.last_known = same if same and same.identity == origin else LastKnown(*origin)
        self.directory = CachedDirectory(directory, config.policy, self.timeout_seconds, self.last_known)
        self.remembered = RememberedAnswers(MAX_REMEMBERED_ANSWERS)

    def recall(self, question: Question, file_state: Optional[FileState]) -> Optional[Action]:
        """The remembered answer, if all that it was made from still holds: see LiveFacts."""
        known = self.remembered.get(question)
        if known is not None and known.file_state == file_state and self.directory.holds(known.entries):
            return known.action
        return None


class LiveFacts(Facts):
    """Facts looked up for one request. All its lookups at Keycloak share one deadline, so that nobody waits twice.

    An answer is remembered with all that it was made from: the state of the database file when the request came, and entries of the
    directory's cache. It is given again while the file is in that state and each entry is what the cache holds, so it never outlives
    its facts; a reload begins with none. Only positive entries count: the others end soon, and anybody can bring them about.
    """

    __slots__ = ("_deadline", "_entries", "_file_state", "_lasting", "_lookups", "_seen_at", "_service")

    def __init__(self, service: Service, file_state: Optional[FileState] = None) -> None:
        self._service = service
        self._seen_at = time.time()
        self._file_state = file_state or service.database.state()
        self._deadline: Deadline = time.monotonic() + service.timeout_seconds
        self._lookups = 0
        self._lasting = 0  # of the lookups, those whose answer can be remembered
        self._entries: List[Tuple[Tuple[str, str], Entry]] = []

    def remember(self, question: Question, action: Action) -> Action:
        """The answer itself, made from these facts; remembered if they can be held against it later."""
        # An answer that needed no lookup is made as fast as found.
        if 0 < self._lookups == self._lasting and self._service.database.shows_commits(self._file_state, self._seen_at):
            self._service.remembered.put(question, Remembered(action, self._file_state, tuple(self._entries)))
        return action

    def find_alias(self, address: Address) -> Optional[Alias]:
        self._lookups += 1
        alias = self._service.database.find_alias(address.text)
        self._lasting += 1
        return alias

    def find_app(self, app_id: str, sender: Address) -> Optional[App]:
        if not app_id.isprintable():
            return None
        self._lookups += 1
        # a sender that is not printable is never stored
        app = self._service.database.find_app(app_id, sender.text if sender.text.isprintable() else " ")
        self._lasting += app is None  # an app may expire without a change of the file
        return app

    def find_holders(self, address: Address) -> Users:
        self._lookups += 1
        users = self._service.directory.find_holders(address.text, self._deadline)
        self._note(("holders", address.text), users)
        return users

    def find_login(self, sasl_username: str) -> Login:
        if not sasl_username.isprintable() or len(sasl_username) > MAX_ADDRESS_CHARS:
            return Login("", "missing")
        self._lookups += 1
        login = self._service.directory.find_login(sasl_username, self._deadline)
        self._note(("login", sasl_username), login)
        return login

    def _note(self, key: Tuple[str, str], value: Any) -> None:
        entry = self._service.directory.find_entry(key)
        if entry and entry.value is value and entry.positive and not entry.missing:
            self._entries.append((key, entry))
            self._lasting += 1


_Found = TypeVar("_Found")


class ExplainedFacts(Facts):
    """Facts looked up anew for a decision that is to be explained, each noted as a step: asked, value, found, source, age, error."""

    def __init__(self, service: Service) -> None:
        self._facts = LiveFacts(service)
        self._service = service
        self.steps: List[Dict[str, Any]] = []

    def find_alias(self, address: Address) -> Optional[Alias]:
        return self._note("alias", address.text, lambda: self._facts.find_alias(address))

    def find_app(self, app_id: str, sender: Address) -> Optional[App]:
        return self._note("app", app_id, lambda: self._facts.find_app(app_id, sender))

    def find_holders(self, address: Address) -> Users:
        return self._note("holders", address.text, lambda: self._facts.find_holders(address))

    def find_login(self, sasl_username: str) -> Login:
        return self._note("login", sasl_username, lambda: self._facts.find_login(sasl_username))

    def _note(self, asked: str, value: str, find: Callable[[], _Found]) -> _Found:
        is_directory = asked in ("holders", "login")
        before = self._service.directory.find_entry((asked, value)) if is_directory else None
        was_fresh = before is not None and time.monotonic() < before.fresh_until
        source = "database" if not is_directory else "static" if self._service.config.static_users else "keycloak"
        step: Dict[str, Any] = {"asked": asked, "value": value, "found": None, "source": source, "age_seconds": None, "error": ""}
        self.steps.append(step)
        try:
            found = find()
        except MailcloakError as exc:
            step["error"] = str(exc)
            raise
        step["found"] = _to_json(found)
        if before and found is before.value:
            step["source"] = "cache" if was_fresh else "kept"
            step["age_seconds"] = time.monotonic() - before.confirmed_at
        return found


def _to_json(found: Any) -> Any:
    """A fact as JSON takes it: its fields by name, or a list of such, or None."""
    if hasattr(found, "_asdict"):
        return found._asdict()
    return None if found is None else [_to_json(each) for each in found]


def explain_policy(request: PolicyRequest, service: Service) -> Dict[str, Any]:
    """The answer to a policy request and the steps that led to it, by the daemon's own decision."""
    facts = ExplainedFacts(service)
    action = decide_policy(request, service.policy, facts)
    return {"answer": action.text, "reason": action.reason, "steps": facts.steps}


def explain_alias(key: str, service: Service) -> Dict[str, Any]:
    """The same for a query of the alias map."""
    facts = ExplainedFacts(service)
    action = decide_alias(key, service.policy, facts)
    return {"answer": action.text, "reason": action.reason, "steps": facts.steps}


ANSWERS = MappingProxyType({"DUN": "DUNNO", "OK ": "OK", "NOT": "NOTFOUND", "TEM": "TEMP", "PER": "PERM"})  # the others are codes


class Tally:
    """How many answers of which kind, and how long they took. Each connection has its own, so that counting needs no lock."""

    def __init__(self) -> None:
        self.answers: Dict[Tuple[str, str], int] = defaultdict(int)  # by the first three characters of the answer, and the reason
        self.remembered = 0  # of them; each took some microseconds
        self.took = Durations()  # of the others

    def add(self, other: Tally) -> None:
        for key, count in list(other.answers.items()):
            self.answers[key] += count
        self.remembered += other.remembered
        self.took.add(other.took)

    def all_took(self) -> Durations:
        """The times of all answers: a remembered one counts as within the least bound, without a clock's being asked."""
        took = Durations()
        took.add(self.took)
        took.counts[0] += self.remembered
        return took


_send = call_with_lock("send", ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)
_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class Handler(socketserver.BaseRequestHandler):
    """One connection: request after request until the client closes it. Subclasses say what a request and an answer are."""

    component = ""
    stream_class: Type[Any]
    internal_error = Action("", "internal-error")
    server: Server

    def setup(self) -> None:
        self.tally = Tally()
        self.rests = False  # between two requests, so that it may make room for another connection
        self.used_at = time.monotonic()
        self._set_timeout(socket.SO_SNDTIMEO, SEND_TIMEOUT_SECONDS)
        self._set_timeout(socket.SO_RCVTIMEO, IDLE_SECONDS)
        self.server.connections[self.request] = self

    def handle(self) -> None:
        stream, begun_at = self.stream_class(), 0.0
        try:
            while True:
                request = stream.next_request()
                if request is not None:
                    self._send(stream.encode(self._answer(request)))
                    begun_at = 0.0
                    continue
                if stream.has_begun:
                    begun_at = begun_at or time.monotonic()
                    data = self._receive_until(begun_at + REQUEST_SECONDS)
                else:
                    data = self._receive()
                if not data:
                    return
                stream.feed(data)
        except ProtocolError as exc:
            log.warning("%s: bad request, connection closed reason=%s", self.component, f'"{exc}"')
        except BlockingIOError:
            log.info("%s: client does not read its answers, connection closed", self.component)
        except OSError as exc:
            log.debug("%s: connection lost reason=%s", self.component, f'"{exc.strerror}"')

    def _receive(self) -> bytes:
        """The first bytes of a request, however long the client rests before; b"" at the connection's end."""
        self.rests = True
        try:
            data: bytes = self.request.recv(RECEIVE_BYTES)
        except BlockingIOError:
            self.server.service.database.close()
            self._set_timeout(socket.SO_RCVTIMEO, 0)
            data = self.request.recv(RECEIVE_BYTES)
            self._set_timeout(socket.SO_RCVTIMEO, IDLE_SECONDS)
        self.rests = False
        return data

    def _receive_until(self, deadline: Deadline) -> bytes:
        """More bytes of a request that has begun; raises ProtocolError at the deadline."""
        self._set_timeout(socket.SO_RCVTIMEO, max(0.001, deadline - time.monotonic()))
        try:
            data: bytes = self.request.recv(RECEIVE_BYTES)
        except BlockingIOError:
            raise ProtocolError(f"request not whole after {REQUEST_SECONDS} s") from None
        self._set_timeout(socket.SO_RCVTIMEO, IDLE_SECONDS)
        return data

    def _send(self, data: bytes) -> None:
        """Send all of it; raises BlockingIOError where the client does not make room for it in time."""
        sent = _send(self.request.fileno(), data, len(data), _SEND_FLAGS) if _send else 0
        if sent != len(data):
            self.request.sendall(data[max(0, sent) :])

    def _set_timeout(self, option: int, seconds: float) -> None:
        """The kernel's own timeout, 0 for none: unlike settimeout() it costs no further system call for each answer."""
        timeval = "qq" if option > 60 else "ll"  # the options whose times have 64 bits where a long has 32 (socket.h)
        timeout = struct.pack(timeval, int(seconds), int(seconds % 1 * 1_000_000))
        self.request.setsockopt(socket.SOL_SOCKET, option, timeout)

    def _answer(self, request: Any) -> Action:
        self.used_at = started = time.monotonic()
        try:
            action = self.decide(request, self.server.service)
            if log.isEnabledFor(action.level):
                elapsed_ms = (time.monotonic() - started) * 1000
                event = self.describe(request, action)
                log.log(action.level, "%s: %s reason=%s elapsed_ms=%.0f", self.component, event, action.reason, elapsed_ms)
        except Exception as exc:  # the edge: whatever went wrong, the answer is "try later", never a permission
            log.error("%s: internal error %s", self.component, _describe_exception(exc))
            action = self.internal_error
        self.tally.answers[action.text[:3], action.reason] += 1
        return action

    def _recall_or(self, decide: Callable[[LiveFacts], Action], question: Question, service: Service) -> Action:
        """The remembered answer to the question, else that of decide, which is remembered if it can be."""
        file_state = service.database.state()
        action = service.recall(question, file_state)
        if action is not None:
            self.tally.remembered += 1
            return action
        facts = LiveFacts(service, file_state)
        action = facts.remember(question, decide(facts))
        self.tally.took.note(time.monotonic() - self.used_at)
        return action

    def decide(self, request: Any, service: Service) -> Action:
        """The answer to one request of the stream."""
        raise NotImplementedError

    def describe(self, request: Any, action: Action) -> str:
        """What happened, for the log: an event and its key=value pairs."""
        raise NotImplementedError


class PolicyHandler(Handler):
    component = "policy"
    stream_class = PolicyStream
    internal_error = Action(INTERNAL_ERROR, "internal-error")

    def decide(self, request: PolicyRequest, service: Service) -> Action:
        question = policy_question(request, service.policy)
        return self._recall_or(lambda facts: decide_policy(request, service.policy, facts), question, service)

    def describe(self, request: PolicyRequest, action: Action) -> str:
        event = {"5": "reject", "4": "defer"}.get(action.text[0], "accept")
        fields = [f"{event} state={escape_for_log(request.protocol_state)}", f"recipient=<{escape_for_log(request.recipient)}>"]
        others = dict(_LOGGED_ATTRIBUTE.findall(request.text))
        fields += [f"sender=<{escape_for_log(request.sender)}>", f"client={escape_for_log(others.get('client_address', ''))}"]
        fields += [
            f"{name}={escape_for_log(value)}"
            for name, value in (("queue_id", others.get("queue_id")), ("sasl_username", request.sasl_username))
            if value
        ]
        return " ".join(fields)


class SocketmapHandler(Handler):
    component = "socketmap"
    stream_class = SocketmapStream
    internal_error = Action("TEMP internal error", "internal-error")

    def decide(self, request: SocketmapQuery, service: Service) -> Action:
        if request.name not in ("alias", "stats", "explain", "flush"):
            return Action(f"PERM unknown map {escape_for_log(request.name)[:64]}", "unknown-map", logging.ERROR)
        if not request.key:
            return Action("PERM no key", "no-key", logging.ERROR)
        if request.name != "alias":
            return self._administer(request, service)
        return self._recall_or(lambda facts: decide_alias(request.key, service.policy, facts), ("alias", request.key), service)

    def _administer(self, request: SocketmapQuery, service: Service) -> Action:
        """The maps that mailcloakctl asks: stats for everybody who may connect, the others for who could change the answers anyway."""
        if request.name == "stats":
            return Action(f"OK {json.dumps(self.server.daemon.report())}", "stats", logging.DEBUG)
        peer = struct.unpack("3i", self.request.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        owner = service.config.sockets.socket_owner_user
        if peer[1] not in (0, os.geteuid(), *([pwd.getpwnam(owner).pw_uid] if owner else [])):
            return Action(
                f"PERM {request.name} is for root, daemon.user and the owner of the socket", "not-permitted", logging.WARNING
            )
        if request.name == "flush":
            address = None if request.key == "*" else normalise_address(request.key).text
            return Action(f"OK {json.dumps({'forgotten': service.directory.forget(address)})}", "flush")
        try:
            question = json.loads(request.key)
            if "alias" in question:
                return Action(f"OK {json.dumps(explain_alias(str(question['alias']), service))}", "explain", logging.DEBUG)
            asked = PolicyRequest(**{name: str(value) for name, value in question["policy"].items()})
            return Action(f"OK {json.dumps(explain_policy(asked, service))}", "explain", logging.DEBUG)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return Action("PERM not a question", "bad-question", logging.WARNING)

    def describe(self, request: SocketmapQuery, action: Action) -> str:
        status, _, text = action.text.partition(" ")
        event = {"OK": "found", "NOTFOUND": "not-found", "TEMP": "defer"}.get(status, "error")
        mailbox = f" mailbox=<{escape_for_log(text)}>" if status == "OK" and request.name == "alias" else ""
        return f"{event} map={escape_for_log(request.name)} key=<{escape_for_log(request.key)}>{mailbox}"


class Server(socketserver.ThreadingUnixStreamServer):
    """A listening socket, bound beforehand, and the connections that came in over it.

    Where there is room for no other connection, the one that has rested longest is closed: Postfix opens a new one when it needs it.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(
        self, listener: socket.socket, handler: Type[Handler], service: Service, max_connections: int, daemon: Daemon
    ) -> None:
        super().__init__(str(listener.getsockname()), handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.service = service  # replaced as a whole by a reload; a request uses the one it began with
        self.component = handler.component
        self.daemon = daemon
        self.max_connections = max_connections
        self.ended = Tally()  # of connections that have ended; guarded by _connections_changed
        self._full_said_at = -math.inf
        self._connections_changed = threading.Condition()  # guards the keys of connections
        self.connections: Dict[socket.socket, Optional[Handler]] = {}  # None until its thread runs

    def get_request(self) -> Tuple[socket.socket, Any]:
        """The next connection; raises OSError where there is none or no room, upon which the server looks again."""
        if len(self.connections) >= self.max_connections:
            self._make_room(f"{self.max_connections} connections")
            raise BlockingIOError
        try:
            return super().get_request()
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._make_room(exc.strerror or type(exc).__name__)
            raise

    def _make_room(self, reason: str) -> None:
        """Close the connection that has rested longest, and wait a moment for one to end, whichever it is."""
        if time.monotonic() > self._full_said_at + 60:
            self._full_said_at = time.monotonic()
            log.warning(
                "server: full, resting connections are closed for new ones path=%s reason=%s", self.server_address, f'"{reason}"'
            )
        with self._connections_changed:
            resting = [handler for handler in self.connections.values() if handler and handler.rests]
            if resting:
                with contextlib.suppress(OSError):
                    min(resting, key=lambda handler: handler.used_at).request.shutdown(socket.SHUT_RDWR)
            self._connections_changed.wait(ROOM_SECONDS)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._connections_changed:
            self.connections[request] = None
        try:
            super().process_request(request, client_address)
        except RuntimeError as exc:  # no more threads to be had
            log.error("server: connection refused reason=%s", f'"{exc}"')
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        self.service.database.close()  # this thread's own
        super().shutdown_request(request)
        with self._connections_changed:
            handler = self.connections.pop(request, None)
            if handler:
                self.ended.add(handler.tally)
            self._connections_changed.notify_all()

    def tally(self) -> Tally:
        """Of all connections so far."""
        total = Tally()
        with self._connections_changed:
            for tally in (self.ended, *(handler.tally for handler in self.connections.values() if handler)):
                total.add(tally)
        return total

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.error("server: internal error %s", _describe_exception(sys.exc_info()[1] or Exception()))

    def stop_accepting(self) -> None:
        """Take no further connection, and wake handlers that wait for a request: what has arrived is still read and answered."""
        self.shutdown()
        self.server_close()
        with self._connections_changed:
            for connection in self.connections:
                with contextlib.suppress(OSError):  # the client was faster
                    connection.shutdown(socket.SHUT_RD)

    def wait_for_connections(self, deadline: Deadline) -> bool:
        """True once no connection is left, False at the deadline."""
        with self._connections_changed:
            return self._connections_changed.wait_for(lambda: not self.connections, max(0.0, deadline - time.monotonic()))


# ---------------------------------------------------------------------------------------------------------------------------------
# 10. Process lifecycle
# Sockets, privileges, signals, reload, the end. Runs in the main thread, before and after the servers' own threads.
# ---------------------------------------------------------------------------------------------------------------------------------


def remove_stale_socket(path: str, key: str) -> None:
    """Remove the socket that a killed daemon left behind; raise StartError if the path is anything else that is there."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as exc:
        raise StartError(f"{key}: {path!r}: {exc.strerror}") from exc
    if not stat.S_ISSOCK(status.st_mode):
        raise StartError(f"{key}: {path!r} is there and is not a socket, move it away or choose another path")
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            pass
        except FileNotFoundError:
            return
        except OSError as exc:
            raise StartError(f"{key}: {path!r} is there and cannot be tried: {exc.strerror or exc}") from exc
        else:
            raise StartError(f"{key}: {path!r} is served by another running daemon, stop it first")
    try:
        os.unlink(path)
    except OSError as exc:
        raise StartError(f"{key}: {path!r} is stale and cannot be removed: {exc.strerror}") from exc
    log.info("server: stale socket removed path=%s", path)


@contextlib.contextmanager
def _acting_as(uid: int, gid: int) -> Iterator[None]:
    """For a moment, create files as another user; only root can."""
    old_uid, old_gid = os.geteuid(), os.getegid()
    os.setegid(gid)
    try:
        os.seteuid(uid)
        try:
            yield
        finally:
            os.seteuid(old_uid)
    finally:
        os.setegid(old_gid)


def _hand_over_socket(path: str, uid: int, gid: int, mode: int) -> None:
    """Give the socket that root has just bound, with mode 0, to its owner. Works on the file itself, not on whatever has its name."""
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != 0:
            raise StartError(f"sockets: {path!r} was replaced while it was made, its directory must not be writable by others")
        itself = f"/proc/self/fd/{descriptor}"
        os.chown(itself, uid, gid)
        os.chmod(itself, mode)
    finally:
        os.close(descriptor)


def _bind_in_group(listener: socket.socket, path: str, gid: int) -> None:
    """Bind as an ordinary user, who can give away only what is his own; a directory with setgid makes files of its own group."""
    listener.bind(path)
    if os.lstat(path).st_gid != gid:
        os.chown(path, -1, gid, follow_symlinks=False)


def bind_socket(path: str, key: str, sockets: SocketsConfig) -> socket.socket:
    """A listening socket with its owner, group and mode; raises StartError.

    As root the socket is made under the owner's own ids and with the umask that leaves the mode asked for, so there is no moment
    in which anybody else could connect, and nothing that a swapped file could be chowned for. Only where the owner may not write
    the directory, root makes it, closed to everybody, and hands it over.
    """
    uid = pwd.getpwnam(sockets.socket_owner_user).pw_uid if sockets.socket_owner_user else os.geteuid()
    gid = grp.getgrnam(sockets.socket_owner_group).gr_gid if sockets.socket_owner_group else os.getegid()
    if os.geteuid() != 0 and (uid != os.geteuid() or gid not in (os.getegid(), *os.getgroups())):
        raise StartError(
            f"{key}: only root can give a socket to another user, start as root or set socket_owner_user and socket_owner_group to ''"
        )
    remove_stale_socket(path, key)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old_umask = os.umask(0o777 & ~sockets.socket_mode)
    try:
        if os.geteuid() != 0:
            _bind_in_group(listener, path, gid)
        else:
            try:
                with _acting_as(uid, gid):
                    _bind_in_group(listener, path, gid)
            except PermissionError:
                os.umask(0o777)
                listener.bind(path)
                _hand_over_socket(path, uid, gid, sockets.socket_mode)
    except StartError:
        listener.close()
        raise
    except OSError as exc:
        listener.close()
        raise StartError(f"{key}: {path!r} cannot be made: {exc.strerror or exc}{_socket_hint(exc, path)}") from exc
    finally:
        os.umask(old_umask)
    listener.listen(LISTEN_BACKLOG)
    return listener


def _socket_hint(exc: OSError, path: str) -> str:
    if exc.errno == errno.ENOENT:
        return f", its directory {os.path.dirname(path)!r} does not exist"
    return f", as user {pwd.getpwuid(os.geteuid()).pw_name!r}" if exc.errno == errno.EACCES else ""


def take_over_sockets() -> Dict[str, socket.socket]:
    """The listening sockets that a service manager hands over, by name, {} if none; raises StartError for others than ours.

    Source: sd_listen_fds(3): descriptors from 3 on, LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    count = os.environ.pop("LISTEN_FDS", "0")
    if sorted(names) != ["policy", "socketmap"] or count != str(len(names)):
        raise StartError(f"sockets: expected two handed over, named policy and socketmap, got {count} named {':'.join(names)!r}")
    listeners = {name: socket.socket(fileno=number) for number, name in enumerate(names, 3)}
    for name, listener in listeners.items():
        listener.set_inheritable(False)
        if (listener.family, listener.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            raise StartError(f"sockets: the one handed over as {name} is not a Unix stream socket")
    return listeners


def notify(**state: object) -> None:
    """Tell the service manager that started us, if it wants to know. Source: sd_notify(3)."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.setblocking(False)
            lines = "\n".join(f"{name}={value}" for name, value in state.items())
            manager.sendto(lines.encode(), "\0" + path[1:] if path.startswith("@") else path)


def drop_privileges(user: str) -> None:
    """Become user for good, with its groups; raises StartError if root could be regained."""
    if os.geteuid() != 0 or not user:
        return
    entry = pwd.getpwnam(user)
    try:
        os.initgroups(user, entry.pw_gid)
        os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
        os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    except OSError as exc:
        raise StartError(f"daemon.user: cannot become {user!r}: {exc.strerror}") from exc
    if entry.pw_uid == 0:
        return
    try:
        os.setresuid(0, 0, 0)
    except OSError:
        return
    raise StartError(f"daemon.user: root could be regained after becoming {user!r}")


def allow_connections(wanted: int) -> int:
    """Raise the limit of open files for so many connections to each socket; how many of them the limit then allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = SPARE_FILES + 2 * FILES_PER_CONNECTION * wanted
    for soft_limit, hard_limit in ((needed, max(needed, hard)), (min(needed, hard), hard)):
        if 0 <= soft < needed:  # RLIM_INFINITY is -1
            with contextlib.suppress(ValueError, OSError):  # only root may raise the hard limit
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft_limit, hard_limit))
                soft = soft_limit
    return wanted if soft < 0 else max(1, min(wanted, (soft - SPARE_FILES) // (2 * FILES_PER_CONNECTION)))


def warn_of_missing_postmasters(service: Service) -> None:
    """One line for the domains whose postmaster nobody is, as far as can be told now (RFC 5321, section 4.5.1)."""
    facts = LiveFacts(service)
    missing = [
        f"postmaster@{domain}"
        for domain in sorted(service.policy.domain)
        if find_owner(Address("postmaster", domain), service.policy, facts).source == "nobody"
    ]
    if missing:
        remedy = f"mailcloakctl aliases add {missing[0]} USERNAME"
        log.warning("config: policy.domain: nobody has %s, which RFC 5321 asks for: %s", " or ".join(missing), remedy)
    service.database.close()


class Daemon:
    """The running program: two servers, one service, the signals."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self, config: Config) -> None:
        self._config = config
        self._servers: List[Server] = []
        self._listeners: Dict[str, socket.socket] = {}  # by the component that serves it
        self._owns_sockets = True
        self._started, self._started_at = time.monotonic(), time.time()
        self._last_reload: Optional[Dict[str, Any]] = None  # {"at": seconds since 1970, "ok": bool}
        self._retired: List[CachedDirectory] = []  # of configurations that a reload replaced, until they are closed

    def run(self) -> None:
        """Serve until a signal says stop; raises StartError if that cannot begin."""
        # before any thread, so that each inherits it and only sigwait() sees them
        signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)
        for warning in self._config.warnings:
            log.warning("%s", warning)
        self._listeners = take_over_sockets()
        self._owns_sockets = not self._listeners  # those that were handed over stay for the next daemon
        sockets = self._config.sockets
        paths = {"policy": sockets.policy_socket, "socketmap": sockets.socketmap_socket}
        try:
            if self._owns_sockets:
                for name, path in paths.items():
                    self._listeners[name] = bind_socket(path, f"sockets.{name}_socket", sockets)
            max_connections = allow_connections(self._config.daemon.max_connections)
            drop_privileges(self._config.daemon.user)
            self._open_database()
        except MailcloakError:
            self._remove_sockets()
            raise
        self._warn_of_unreadable_files()
        service = Service(self._config)
        if max_connections < self._config.daemon.max_connections:
            log.warning(
                "config: daemon.max_connections: lowered to %d, the limit of open files allows no more; raise that limit",
                max_connections,
            )
        for handler in (PolicyHandler, SocketmapHandler):
            server = Server(self._listeners[handler.component], handler, service, max_connections, self)
            self._servers.append(server)
            # shutdown() must be called from another thread than serve_forever() runs in, or it waits for itself
            threading.Thread(
                target=server.serve_forever, kwargs={"poll_interval": 0.2}, name=handler.component, daemon=True
            ).start()
        user = pwd.getpwuid(os.geteuid()).pw_name
        log.info(
            "daemon: started version=%s pid=%d user=%s policy_socket=%s socketmap_socket=%s",
            __version__,
            os.getpid(),
            user,
            *(str(self._listeners[name].getsockname()) for name in paths),
        )
        notify(READY=1, STATUS=f"serving, configuration {self._config.path}")
        if self._config.keycloak:  # not at once: it may be starting with us, and the first minute belongs to those who ask
            timer = threading.Timer(POSTMASTER_SECONDS, warn_of_missing_postmasters, [service])
            timer.daemon = True
            timer.start()
        else:
            warn_of_missing_postmasters(service)
        while True:
            received = signal.Signals(signal.sigwait(self.SIGNALS))
            if received != signal.SIGHUP:
                break
            notify(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)
            is_good = self._reload()
            self._last_reload = {"at": time.time(), "ok": is_good}
            notify(READY=1, STATUS="reloaded" if is_good else "reload refused, the old configuration stays in force")
        notify(STOPPING=1, STATUS=f"stopping on {received.name}")
        self._stop(received)

    def report(self) -> Dict[str, Any]:
        """What the map stats answers: counters since the start, and the state of things. No address and no name is in it."""
        service = self._servers[0].service
        tallies = {server.component: server.tally() for server in self._servers}
        return {
            "version": __version__,
            "pid": os.getpid(),
            "config": self._config.path,
            "started_at": self._started_at,
            "uptime_seconds": time.monotonic() - self._started,
            "last_reload": self._last_reload,
            "answers": [
                {"service": name, "answer": ANSWERS.get(answer, answer), "reason": reason, "count": count}
                for name, tally in tallies.items()
                for (answer, reason), count in sorted(tally.answers.items())
            ],
            "remembered_answers": {
                "given": sum(tally.remembered for tally in tallies.values()),
                "kept": len(service.remembered),
            },
            "seconds": {name: tally.all_took().to_json() for name, tally in tallies.items()},
            **service.directory.report(),
            "database": {"path": service.config.sqlite.path, "works": service.database.works()},
            "connections": {
                **{server.component: len(server.connections) for server in self._servers},
                "limit": self._servers[0].max_connections,
            },
        }

    def _open_database(self) -> None:
        path = self._config.sqlite.path
        try:
            done = prepare_database(path, DATABASE_BUSY_SECONDS)
            if done:
                log.warning("database: %s path=%s", "created, there was none" if done == "created" else done, path)
            with contextlib.closing(Database(path)) as database:
                database.check()
        except DatabaseUnavailable as exc:
            log.error("%s; answers that need it are deferred until it is mended", exc)

    def _warn_of_unreadable_files(self) -> None:
        keycloak = self._config.keycloak
        files = [self._config.path] + ([keycloak.client_secret_file, keycloak.ca_file] if keycloak else [])
        for path in filter(None, files):
            if not os.access(path, os.R_OK):
                log.warning("config: %s: not readable by user %r, a reload will fail", path, pwd.getpwuid(os.geteuid()).pw_name)

    def _reload(self) -> bool:
        """Read the config again and put it in force as a whole; False for a bad one, which changes nothing."""
        try:
            config = load_config(self._config.path)
        except ConfigError as exc:
            for problem in exc.problems:
                log.error("%s", problem)
            log.error("daemon: reload refused, the old configuration stays in force")
            return False
        for warning in config.warnings:
            log.warning("%s", warning)
        for block in ("sockets", "daemon"):
            for field in dataclasses.fields(getattr(config, block)):
                old, new = (getattr(getattr(each, block), field.name) for each in (self._config, config))
                if old != new and field.name != "log_level":
                    log.warning("config: %s.%s: a change here needs a restart", block, field.name)
        old_service = self._servers[0].service
        try:
            service = Service(config, old_service)
        except RuntimeError as exc:  # no more threads to be had
            log.error("daemon: reload refused, the old configuration stays in force reason=%s", f'"{exc}"')
            return False
        self._config = config
        for server in self._servers:
            server.service = service
        # Requests that began with the old one may still look something up there, for as long as one request may take.
        self._retired = [directory for directory in self._retired if not directory.closed.is_set()] + [old_service.directory]
        timer = threading.Timer(2 * old_service.timeout_seconds, old_service.directory.close)
        timer.daemon = True
        timer.start()
        if old_service.last_known and old_service.last_known is not service.last_known:
            old_service.last_known.close()
        log.setLevel(config.daemon.log_level)
        log.info("daemon: reloaded config=%s", config.path)
        return True

    def _stop(self, received: signal.Signals) -> None:
        log.info("daemon: stopping signal=%s", received.name)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))  # a second one ends the program at once
        started = time.monotonic()
        self._remove_sockets()
        for server in self._servers:
            server.stop_accepting()
        if not all(server.wait_for_connections(started + SHUTDOWN_LOOKUP_SECONDS) for server in self._servers):
            for directory in (self._servers[0].service.directory, *self._retired):
                directory.give_up()
        if not all(server.wait_for_connections(started + SHUTDOWN_TOTAL_SECONDS) for server in self._servers):
            log.warning("daemon: connections cut off at the end of the time to stop")
        last_known = self._servers[0].service.last_known
        if last_known:
            last_known.close()
        log.info("daemon: stopped")

    def _remove_sockets(self) -> None:
        """Take our sockets' names away, so that nobody connects any more."""
        for listener in self._listeners.values() if self._owns_sockets else ():
            path = str(listener.getsockname())
            try:
                os.unlink(path)
            except OSError as exc:  # daemon.user may not write there; the next start removes it
                log.info("server: socket left behind path=%s reason=%s", path, f'"{exc.strerror}"')


# ---------------------------------------------------------------------------------------------------------------------------------
# 11. main
# ---------------------------------------------------------------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors repeat no argument: one of them may be a secret in the wrong place."""

    usage_exit_code = EXIT_USAGE

    def error(self, message: str) -> Any:
        message = re.sub(r"(unrecognized arguments|ignored explicit argument).*", r"\1", message, flags=re.DOTALL)
        message = re.sub(r"(invalid choice|ambiguous option).*?( \(choose from| could match|$)", r"\1\2", message, flags=re.DOTALL)
        self.print_usage(sys.stderr)
        self.exit(self.usage_exit_code, f"{self.prog}: {message}\n")


def _parse_arguments(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="mailcloak",
        description="Answer Postfix from Keycloak and SQLite: who may receive, who may send, where an alias leads.",
        epilog="Stays in the foreground and logs to stderr. SIGHUP reads the configuration again.",
    )
    parser.add_argument("config", nargs="?", help=f"the configuration, {DEFAULT_CONFIG_PATH} if none is named")
    parser.add_argument("--config", dest="config_option", metavar="FILE", help="the same as an option")
    parser.add_argument("--check-config", action="store_true", help="say what is wrong with the configuration, then end")
    parser.add_argument("--version", action="version", version=f"mailcloak {__version__}")
    options = parser.parse_args(argv)
    if options.config and options.config_option:
        parser.error("the configuration is named twice")
    options.config = os.path.abspath(options.config or options.config_option or DEFAULT_CONFIG_PATH)
    return options


class _Syslog(logging.Handler):
    """The host's syslog, facility mail, ident mailcloak."""

    def __init__(self) -> None:
        super().__init__()
        if not os.path.exists("/dev/log"):
            raise StartError("daemon.log: there is no /dev/log, start a syslog daemon or set it to stderr")
        syslog.openlog("mailcloak", syslog.LOG_PID, syslog.LOG_MAIL)

    def emit(self, record: logging.LogRecord) -> None:
        priorities = {logging.DEBUG: syslog.LOG_DEBUG, logging.INFO: syslog.LOG_INFO, logging.WARNING: syslog.LOG_WARNING}
        syslog.syslog(priorities.get(record.levelno, syslog.LOG_ERR), self.format(record))


def configure_logging(config: DaemonConfig) -> None:
    """Log to stderr, each line with its time, or to syslog, which has its own; raises StartError where there is no syslog."""
    handler = _Syslog() if config.log == "syslog" else logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s %(message)s" if config.log == "stderr" else "%(levelname)s %(message)s")
    )
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logging.addLevelName(level, logging.getLevelName(level).lower())
    log.addHandler(handler)
    log.propagate = False
    for library in ("urllib3", "requests"):  # whoever listens at the root logger: urllib3 quotes the headers of a server there
        logging.getLogger(library).propagate = False
    log.setLevel(config.log_level)


def postfix_warnings(config: Config) -> Iterator[str]:
    """What does not fit the Postfix of this host, if there is one. Source: postconf(1)."""
    postconf = shutil.which("postconf", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if not postconf:
        return
    try:
        command = [postconf, "-h", "queue_directory", "recipient_delimiter"]
        output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout
        queue_directory, delimiter = output.splitlines()
    except (OSError, ValueError, subprocess.SubprocessError) as exc:
        yield f"config: postconf could not be asked whether this fits Postfix: {type(exc).__name__}"
        return
    for key in ("policy_socket", "socketmap_socket"):
        path = getattr(config.sockets, key)
        if os.path.commonpath([path, queue_directory]) != queue_directory:
            yield f"config: sockets.{key}: {path} is not below Postfix's queue_directory {queue_directory}, where a chrooted smtpd looks"
    if delimiter != config.policy.recipient_delimiter:
        ours = config.policy.recipient_delimiter
        yield f"config: policy.recipient_delimiter: {ours!r} here, {delimiter!r} in Postfix's main.cf; both must be the same"


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the daemon; returns its exit code."""
    options = _parse_arguments(argv)
    try:
        config = load_config(options.config)
    except ConfigError as exc:
        print("\n".join(exc.problems), file=sys.stderr)
        return EXIT_CONFIG
    if options.check_config:
        print("\n".join((*config.warnings, *postfix_warnings(config), f"config: {config.path}: good")), file=sys.stderr)
        return EXIT_OK
    try:
        configure_logging(config.daemon)
        Daemon(config).run()
    except StartError as exc:
        if log.handlers:
            log.error("%s", exc)
        else:
            print(exc, file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
