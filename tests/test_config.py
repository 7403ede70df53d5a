"""The configuration: each possible mistake has its message, all problems of a file are reported at once, secrets stay hidden."""

from __future__ import annotations

import copy
import dataclasses
import grp
import os
import pwd
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

import mailcloak

SECRET = "hunter2-not-to-be-seen"
USER = pwd.getpwuid(os.geteuid()).pw_name
GROUP = grp.getgrgid(os.getegid()).gr_name

KEYCLOAK = {"base_url": "https://sso.example.org", "realm": "mail", "client_id": "mailcloak", "client_secret": SECRET}
GOOD = {
    "keycloak": KEYCLOAK,
    "policy": {"domain": "example.org"},
    "sockets": {
        "policy_socket": "/run/mc/policy",
        "socketmap_socket": "/run/mc/socketmap",
        "socket_owner_user": USER,
        "socket_owner_group": GROUP,
    },
    "daemon": {"user": ""},
}
STATIC = {**{name: block for name, block in GOOD.items() if name != "keycloak"}, "static_users": {"alice": "alice@example.org"}}
MISSING = object()


@pytest.fixture
def load(tmp_path):
    """Write a configuration, a dict or the text itself, and load it."""
    path = tmp_path / "config.yaml"

    def load(config):
        text = config if isinstance(config, (str, bytes)) else yaml.safe_dump(config, allow_unicode=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        path.chmod(0o600)
        return mailcloak.load_config(str(path))

    load.path = path
    return load


@pytest.fixture
def problems_of(load):
    """The problems of a configuration that cannot be used."""

    def problems_of(config):
        with pytest.raises(mailcloak.ConfigError) as caught:
            load(config)
        problems = [str(problem) for problem in caught.value.problems]
        assert str(caught.value) == "\n".join(problems)
        return problems

    return problems_of


def with_key(key, value, base=GOOD):
    """The good configuration with one key ("policy.domain", or "policy" for a block) set to another value, or taken out."""
    config = copy.deepcopy(base)
    *blocks, name = key.split(".")
    block = config.setdefault(blocks[0], {}) if blocks else config
    if value is MISSING:
        del block[name]
    else:
        block[name] = value
    return config


# ---- what is good


def test_defaults_are_those_of_the_reference(load):
    config = load(GOOD)
    assert config.keycloak == mailcloak.KeycloakConfig(
        base_url="https://sso.example.org",
        realm="mail",
        client_id="mailcloak",
        client_secret=SECRET,
        client_secret_file="",
        ca_file="",
        timeout_seconds=5,
        require_verified_email=False,
    )
    assert config.policy == mailcloak.PolicyConfig(
        domain=frozenset({"example.org"}),
        mailbox_domain="",
        cache_ttl_seconds=120,
        negative_cache_ttl_seconds=10,
        cache_max_entries=100_000,
        stale_if_error_seconds=86400,
        keycloak_failure_mode="tempfail",
        recipient_delimiter="",
        unauthenticated_local_sender="reject",
        foreign_sender="reject",
    )
    assert config.sqlite.path == "/var/lib/mailcloak/state.db"
    assert config.sockets.socket_mode == 0o660
    assert config.static_users is None
    assert config.warnings == ()


def test_defaults_that_name_accounts_are_those_of_the_reference():
    defaults = {
        field.name: field.default
        for block in (mailcloak.SocketsConfig, mailcloak.DaemonConfig)
        for field in dataclasses.fields(block)
    }
    assert (defaults["socket_owner_user"], defaults["socket_owner_group"], defaults["user"]) == ("postfix", "postfix", "mailcloak")


@pytest.mark.parametrize(
    ("key", "value", "loaded"),
    [
        ("keycloak.base_url", "https://sso.example.org/auth/", "https://sso.example.org/auth"),
        ("keycloak.base_url", "http://[::1]:8080", "http://[::1]:8080"),
        ("keycloak.timeout_seconds", 0.5, 0.5),
        ("keycloak.require_verified_email", True, True),
        ("policy.domain", ["Example.org", "bücher.example", "example.org"], frozenset({"example.org", "xn--bcher-kva.example"})),
        ("policy.mailbox_domain", "Mailbox.Internal", "mailbox.internal"),
        ("policy.negative_cache_ttl_seconds", 0, 0),
        ("policy.stale_if_error_seconds", 0, 0),
        ("policy.cache_max_entries", 1, 1),
        ("policy.keycloak_failure_mode", "dunno-recipients", "dunno-recipients"),
        ("policy.keycloak_failure_mode", "dunno", "dunno"),
        ("policy.recipient_delimiter", "+-", "+-"),
        ("policy.unauthenticated_local_sender", "warn", "warn"),
        ("policy.unauthenticated_local_sender", "dunno", "dunno"),
        ("policy.foreign_sender", "dunno", "dunno"),
        ("sqlite.path", "/srv/mail/state.db", "/srv/mail/state.db"),
        ("sockets.policy_socket", "/" + "s" * 106, "/" + "s" * 106),
        ("sockets.socket_mode", "0600", 0o600),
        ("sockets.socket_mode", "600", 0o600),
        ("sockets.socket_owner_user", "", ""),
        ("sockets.socket_owner_group", "", ""),
        ("daemon.user", USER, USER),
    ],
)
def test_value_that_is_possible_is_loaded(load, key, value, loaded):
    block, name = key.split(".")
    assert getattr(getattr(load(with_key(key, value)), block), name) == loaded


def test_static_users_are_loaded_in_normalised_form(load):
    config = load({**STATIC, "static_users": {"Alice": "Alice@Example.ORG", "jörg": "jörg@bücher.example"}})
    assert config.keycloak is None
    assert dict(config.static_users) == {"alice": "alice@example.org", "jörg": "jörg@xn--bcher-kva.example"}


def test_block_whose_keys_all_have_defaults_may_be_left_out(load):
    assert load(with_key("sqlite", MISSING, {**GOOD, "sqlite": {}})) == load(with_key("sqlite", {}))


# ---- what is wrong with one key: the whole message

EXACT = {
    "unknown key": ("policy.colour", "red", "config: policy.colour: unknown key"),
    "unknown key, near miss": (
        "policy.cache_tll_seconds",
        60,
        "config: policy.cache_tll_seconds: unknown key; did you mean 'cache_ttl_seconds'?",
    ),
    "unknown block, near miss": ("polcy", {}, "config: polcy: unknown key; did you mean 'policy'?"),
    "key that is a number": ("policy.5", 1, "config: policy.5: unknown key"),
    "block that is text": (
        "policy",
        "example.org",
        "config: policy: expected a block of keys, got text; is there a space after each colon?",
    ),
    "block that is empty": ("sockets", None, "config: sockets: expected a block of keys, got nothing"),
    "required key missing": ("policy.domain", MISSING, "config: policy.domain: missing, this key is required"),
    "required key empty": ("keycloak.realm", None, "config: keycloak.realm: expected text, got nothing"),
    "text that is a number": ("keycloak.realm", 5, "config: keycloak.realm: expected text, got 5"),
    "text that is empty": ("keycloak.client_id", "", "config: keycloak.client_id: expected text, got ''"),
    "control character": (
        "keycloak.realm",
        "ma\nil",
        "config: keycloak.realm: expected text without control characters, got 'ma\\nil'",
    ),
    "negative time": ("policy.cache_ttl_seconds", -1, "config: policy.cache_ttl_seconds: expected a positive number, got -1"),
    "no time": ("policy.cache_ttl_seconds", 0, "config: policy.cache_ttl_seconds: expected a positive number, got 0"),
    "number as text": (
        "policy.cache_ttl_seconds",
        "120",
        "config: policy.cache_ttl_seconds: expected a positive number, got '120'",
    ),
    "number as boolean": (
        "policy.cache_ttl_seconds",
        True,
        "config: policy.cache_ttl_seconds: expected a positive number, got True",
    ),
    "number that is NaN": (
        "policy.stale_if_error_seconds",
        float("nan"),
        "config: policy.stale_if_error_seconds: expected a number, 0 or more, got nan",
    ),
    "number that is infinite": (
        "policy.negative_cache_ttl_seconds",
        float("inf"),
        "config: policy.negative_cache_ttl_seconds: expected a number, 0 or more, got inf",
    ),
    "number that is empty": (
        "policy.cache_ttl_seconds",
        None,
        "config: policy.cache_ttl_seconds: expected a positive number, got nothing",
    ),
    "last-known.db": (
        "sqlite.path",
        "/var/lib/mailcloak/last-known.db",
        "config: sqlite.path: expected another name than last-known.db, the file in which the daemon saves users",
    ),
    "last-used.json": (
        "sqlite.path",
        "/var/lib/mailcloak/last-used.json",
        "config: sqlite.path: expected another name than last-used.json, the file in which the daemon notes uses of apps",
    ),
    "fraction": ("policy.cache_max_entries", 1.5, "config: policy.cache_max_entries: expected a whole number, 1 or more, got 1.5"),
    "whole number as boolean": (
        "policy.cache_max_entries",
        True,
        "config: policy.cache_max_entries: expected a whole number, 1 or more, got True",
    ),
    "timeout too long": (
        "keycloak.timeout_seconds",
        61,
        "config: keycloak.timeout_seconds: expected a number from 0.1 to 60, got 61",
    ),
    "timeout zero": ("keycloak.timeout_seconds", 0, "config: keycloak.timeout_seconds: expected a number from 0.1 to 60, got 0"),
    "boolean as number": (
        "keycloak.require_verified_email",
        1,
        "config: keycloak.require_verified_email: expected true or false, got 1",
    ),
    "boolean as text": (
        "keycloak.require_verified_email",
        "yes",
        "config: keycloak.require_verified_email: expected true or false, got 'yes'",
    ),
    "choice, near miss": (
        "policy.keycloak_failure_mode",
        "temp-fail",
        "config: policy.keycloak_failure_mode: expected one of tempfail, dunno-recipients, dunno, got 'temp-fail'; did you mean 'tempfail'?",
    ),
    "choice that is a boolean": (
        "policy.foreign_sender",
        False,
        "config: policy.foreign_sender: expected one of reject, dunno, got False",
    ),
    "choice of another key": (
        "policy.foreign_sender",
        "warn",
        "config: policy.foreign_sender: expected one of reject, dunno, got 'warn'",
    ),
    "URL without scheme": (
        "keycloak.base_url",
        "sso.example.org",
        "config: keycloak.base_url: expected a URL such as https://sso.example.org, got 'sso.example.org'",
    ),
    "URL with a bad port": (
        "keycloak.base_url",
        "https://sso.example.org:https",
        "config: keycloak.base_url: expected a URL such as https://sso.example.org, got 'https://sso.example.org:https'",
    ),
    "URL with a query": (
        "keycloak.base_url",
        "https://sso.example.org/?realm=mail",
        "config: keycloak.base_url: expected a URL such as https://sso.example.org, got 'https://sso.example.org/?realm=mail'",
    ),
    "URL of a realm": (
        "keycloak.base_url",
        "https://sso.example.org/realms/mail",
        "config: keycloak.base_url: expected a URL without /realms/... and /admin/..., which mailcloak adds, got "
        "'https://sso.example.org/realms/mail'",
    ),
    "domain with an at": (
        "policy.domain",
        "@example.org",
        "config: policy.domain: expected a domain such as example.org, got '@example.org'",
    ),
    "domain list that is empty": (
        "policy.domain",
        [],
        "config: policy.domain: expected a domain such as example.org, or a list of them, got []",
    ),
    "domain list with a number": (
        "policy.domain",
        ["example.org", 5],
        "config: policy.domain: expected a domain such as example.org, got ['example.org', 5]",
    ),
    "mailbox_domain is ours": (
        "policy.mailbox_domain",
        "Example.org",
        "config: policy.mailbox_domain: expected a domain that is not in policy.domain, got 'example.org'",
    ),
    "delimiter that is a letter": (
        "policy.recipient_delimiter",
        "x",
        "config: policy.recipient_delimiter: expected the delimiter characters themselves, such as + or +-,"
        " as in Postfix's recipient_delimiter, got 'x'",
    ),
    "delimiter that is an at": (
        "policy.recipient_delimiter",
        "@",
        "config: policy.recipient_delimiter: expected the delimiter characters themselves, such as + or +-,"
        " as in Postfix's recipient_delimiter, got '@'",
    ),
    "path that is relative": ("sqlite.path", "state.db", "config: sqlite.path: expected an absolute path, got 'state.db'"),
    "socket path that is relative": (
        "sockets.policy_socket",
        "private/mailcloak",
        "config: sockets.policy_socket: expected an absolute path, got 'private/mailcloak'",
    ),
    "socket path too long": (
        "sockets.policy_socket",
        "/" + "s" * 107,
        "config: sockets.policy_socket: expected a path of at most 107 bytes, the limit of a Unix socket (108 bytes),"
        " got '/" + "s" * 55 + "...",
    ),
    "socket path too long in bytes": (
        "sockets.socketmap_socket",
        "/" + "ü" * 54,
        "config: sockets.socketmap_socket: expected a path of at most 107 bytes, the limit of a Unix socket (109 bytes),"
        " got '/" + "ü" * 54 + "'",
    ),
    "both sockets the same": (
        "sockets.socketmap_socket",
        "/run/mc/policy",
        "config: sockets.socketmap_socket: expected another path than policy_socket",
    ),
    "octal mode as number": (
        "sockets.socket_mode",
        0o660,
        'config: sockets.socket_mode: expected an octal mode as text, in quotes, such as "0660", got 432',
    ),
    "mode that is not octal": (
        "sockets.socket_mode",
        "0690",
        "config: sockets.socket_mode: expected an octal mode as text, in quotes, such as \"0660\", got '0690'",
    ),
    "mode with more bits": (
        "sockets.socket_mode",
        "1777",
        "config: sockets.socket_mode: expected an octal mode as text, in quotes, such as \"0660\", got '1777'",
    ),
    "user missing": (
        "sockets.socket_owner_user",
        "no-such-user-here",
        "config: sockets.socket_owner_user: expected an existing user, got 'no-such-user-here'",
    ),
    "user missing, whose name is like another's": (  # which would not do
        "sockets.socket_owner_user",
        USER + "x",
        f"config: sockets.socket_owner_user: expected an existing user, got '{USER}x'",
    ),
    "group missing, whose name is like another's": (
        "sockets.socket_owner_group",
        GROUP + "x",
        f"config: sockets.socket_owner_group: expected an existing group, got '{GROUP}x'",
    ),
    "placeholder": (
        "keycloak.realm",
        "<realm>",
        "config: keycloak.realm: expected your own value in place of the placeholder, got '<realm>'",
    ),
    "placeholder in an optional key": (
        "sqlite.path",
        "<path>",
        "config: sqlite.path: expected your own value in place of the placeholder, got '<path>'",
    ),
    "neither client_secret nor client_secret_file": (
        "keycloak.client_secret",
        MISSING,
        "config: keycloak.client_secret: expected exactly one of client_secret and client_secret_file",
    ),
    "both client_secret and client_secret_file": (
        "keycloak.client_secret_file",
        "/etc/mailcloak/client_secret",
        "config: keycloak.client_secret: expected exactly one of client_secret and client_secret_file",
    ),
    "client_secret that is a number": (
        "keycloak.client_secret",
        4711471147114711,
        "config: keycloak.client_secret: expected text, got a value that is not shown",
    ),
    "client_secret that is a placeholder": (
        "keycloak.client_secret",
        "<client secret>",
        "config: keycloak.client_secret: expected your own value in place of the placeholder, got a value that is not shown",
    ),
    "neither keycloak nor static_users": (
        "keycloak",
        MISSING,
        "config: keycloak: expected exactly one of the blocks keycloak and static_users",
    ),
    "both keycloak and static_users": (
        "static_users",
        {"alice": "alice@example.org"},
        "config: keycloak: expected exactly one of the blocks keycloak and static_users",
    ),
}


@pytest.mark.parametrize(("key", "value", "message"), EXACT.values(), ids=EXACT)
def test_key_that_is_wrong_has_its_message(problems_of, key, value, message):
    assert problems_of(with_key(key, value)) == [message]


@pytest.mark.real("root")  # daemon.user counts for root only
def test_daemon_user_missing_has_its_message(problems_of):
    for name in ("no-such-user-here", "mailx"):  # mail is there
        assert problems_of(with_key("daemon.user", name)) == [
            f"config: daemon.user: expected an existing user, got '{name}'"
            "; make it by useradd --system --user-group, or by systemd-sysusers, as the README says"
        ]


@pytest.mark.parametrize(
    "value",
    ["https://<host>", "https://sso.example.org/<path>", ["<domain>"], {"<a>": "<b>"}],
    ids=["in a URL", "in a path", "in a list", "in a mapping"],
)
@pytest.mark.parametrize("key", ["keycloak.base_url", "policy.domain"])
def test_placeholder_inside_a_value_is_no_value(problems_of, key, value):
    (problem,) = problems_of(with_key(key, value))
    assert problem.startswith(f"config: {key}: expected ")


@pytest.mark.parametrize(
    ("users", "message"),
    [
        (None, "config: static_users: expected pairs of username: address"),
        ({}, "config: static_users: expected pairs of username: address"),
        (["alice@example.org"], "config: static_users: expected pairs of username: address"),
        ({5: "five@example.org"}, "config: static_users: expected usernames as text, got 5; put it in quotes"),
        ({"alice": "alice"}, "config: static_users: alice: expected an e-mail address: it has no @"),
        ({"alice": None}, "config: static_users: alice: expected an e-mail address: it has no @"),
        ({"alice": "a@b.test", "Alice": "c@d.test"}, "config: static_users: expected each username once, got 'alice' twice"),
        ({"al\nice": "a@b.test"}, "config: static_users: expected usernames as text, got 'al\\nice'; put it in quotes"),
    ],
    ids=["empty", "no pairs", "list", "number as username", "no address", "no value", "twice in other case", "control character"],
)
def test_static_users_that_are_wrong_have_their_message(problems_of, users, message):
    assert problems_of({**STATIC, "static_users": users}) == [message]


# ---- the file as a whole


ALIASES_OF_ALIASES = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10 if n else ['x'])}]\n" for n in range(12))


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("policy:\n  domain: [a.test\n", 3, "expected ',' or ']'"),
        ("policy:\n\tdomain: a.test\n", 2, "a tab, where YAML takes only spaces"),
        ("policy:\n  domain:\ta.test\n", 2, "a tab, where YAML takes only spaces"),
        ("policy:\n  domain: @a.test\n", 2, "a value that begins with a character such as @ or % needs quotes"),
        ("policy:\n  domain: a.test\n sockets:\n", 3, "wrong indentation, or a quote that is not closed or"),
        ("policy:\n  domain: a.test\n    foreign_sender: dunno\n", 3, "or wrong indentation"),
        ("  policy:\n    domain: a.test\nsockets: {}\n", 3, "wrong indentation"),
        ("policy:\n  domain:a.test\n  foreign_sender: dunno\n", 3, "no space after a colon further up, "),
        ("policy:\n  foreign_sender: dunno\n  domain:a.test\nsockets:\n", 3, "no colon with a space after it"),
        ('policy:\n  domain: "a.test\n  foreign_sender: dunno\n', 2, "a quote that is not closed"),
        ("policy:\n  domain: 'a.test\n  foreign_sender: 'dunno'\n", 3, "or a quote that is not closed or stands inside a value"),
        ("policy:\n  domain: a: b\n", 2, "two colons in this line (a value with one needs quotes), "),
        ("policy:\n  domain: &a a.test\n  mailbox_domain: !!python/name:os.system\n", 3, "tag"),
        ("policy:\n  domain: a.test\nsockets: {}\npolicy: {}\n", 4, "key given twice: policy"),
        ("policy:\n  domain: a.test\n  foreign_sender: dunno\n  domain: b.test\n", 4, "key given twice: domain"),
        ("policy:\n  ? [a]\n  : b\n", 2, "unhashable key"),
        (ALIASES_OF_ALIASES, 2, "an alias (*name): write out what it stands for"),
    ],
    ids=[
        "bracket",
        "tab",
        "tab after a colon",
        "at sign",
        "less indentation",
        "more indentation",
        "first block indented",
        "no space in the first key",
        "no space in another key",
        "open quote",
        "open quote before another",
        "colon",
        "tag",
        "block twice",
        "key twice",
        "key that is a list",
        "aliases of aliases",
    ],
)
def test_text_that_is_not_good_yaml_is_refused_with_its_line(load, problems_of, text, line, says):
    (problem,) = problems_of(text)
    assert problem.startswith(f"config: {load.path}: line {line}: ")
    assert says in problem


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"# nothing\n",
        b"- a\n- b\n",
        b"policy\n",
        b"\xff\xfe\x00",
        b"policy: \xe9\n",
        b"\x00",
        b"--- {}\n--- {}\n",
        b"{" * 5000,
    ],
    ids=["empty", "comment", "list", "word", "UTF-16", "Latin-1", "NUL", "two documents", "nested too deep"],
)
def test_file_that_is_no_mapping_is_one_problem(load, problems_of, content):
    (problem,) = problems_of(content)
    assert problem.startswith(f"config: {load.path}: ")


def test_file_that_is_too_long_is_one_problem(load, problems_of):
    assert problems_of("#" + "x" * 2**20) == [f"config: {load.path}: cannot be read: File too large"]


@pytest.mark.parametrize("key", ["client_secret_file", "ca_file", ""])
def test_fifo_in_place_of_a_file_is_a_problem_and_not_waited_for(tmp_path, key):
    fifo, path = tmp_path / "fifo", tmp_path / "config.yaml"
    os.mkfifo(fifo)
    config = with_key(f"keycloak.{key}", str(fifo))
    if key == "client_secret_file":
        del config["keycloak"]["client_secret"]
    path.write_text(yaml.safe_dump(config))
    result = run("--config", path if key else fifo, "--check-config")
    assert result.returncode == 78
    assert result.stderr.endswith("it is not a regular file\n")
    assert result.stderr.count("\n") == 1


def test_block_whose_only_key_has_no_space_says_so(problems_of):
    assert "config: policy: expected a block of keys, got text; is there a space after each colon?" in problems_of(
        "policy:\n  domain:a.test\n"
    )


def test_file_that_is_missing_is_one_problem(tmp_path):
    with pytest.raises(mailcloak.ConfigError) as caught:
        mailcloak.load_config(str(tmp_path / "absent.yaml"))
    assert [str(problem) for problem in caught.value.problems] == [
        f"config: {tmp_path / 'absent.yaml'}: cannot be read: No such file or directory"
    ]


def test_merge_key_may_be_overridden(load):
    text = yaml.safe_dump(STATIC).replace(
        "policy:\n", "policy:\n  <<: {foreign_sender: dunno, cache_ttl_seconds: 60}\n  cache_ttl_seconds: 30\n"
    )
    policy = load(text).policy
    assert (policy.foreign_sender, policy.cache_ttl_seconds) == ("dunno", 30)


def test_every_problem_of_a_file_is_reported_at_once(problems_of):
    config = {
        "keycloak": {"base_url": "<url>", "client_id": 5, "colour": "red"},
        "policy": {"domain": "a..b", "cache_ttl_seconds": "x", "foreign_sender": "rejct"},
        "sqlite": {"path": "state.db"},
        "sockets": {"policy_socket": "p", "socket_mode": 432, "socket_owner_user": USER, "socket_owner_group": GROUP},
        "daemon": "mailcloak",
        "polic": {},
    }
    assert sorted(problem.split(": ")[1] for problem in problems_of(config)) == [
        "daemon",
        "keycloak.base_url",
        "keycloak.client_id",
        "keycloak.client_secret",
        "keycloak.colour",
        "keycloak.realm",
        "polic",
        "policy.cache_ttl_seconds",
        "policy.domain",
        "policy.foreign_sender",
        "sockets.policy_socket",
        "sockets.socket_mode",
        "sockets.socketmap_socket",
        "sqlite.path",
    ]


@pytest.mark.parametrize(
    ("block", "wrong", "also"),
    [
        (
            "keycloak",
            {"timeout_seconds": 0, "client_secret": MISSING, "client_secret_file": "/no/such/file"},
            "keycloak.client_secret_file",
        ),
        ("keycloak", {"timeout_seconds": 0, "client_secret_file": "/no/such/file"}, "keycloak.client_secret"),
        ("policy", {"cache_ttl_seconds": 0, "mailbox_domain": "example.org"}, "policy.mailbox_domain"),
        ("sockets", {"socket_mode": 432, "socketmap_socket": "/run/mc/policy"}, "sockets.socketmap_socket"),
    ],
    ids=["secret file unreadable", "both secrets", "mailbox_domain is ours", "both sockets the same"],
)
def test_problem_between_two_keys_is_reported_beside_that_of_a_third(problems_of, block, wrong, also):
    config = copy.deepcopy(GOOD)
    config[block] = {key: value for key, value in {**config[block], **wrong}.items() if value is not MISSING}
    assert sorted(problem.split(": ")[1] for problem in problems_of(config)) == sorted([f"{block}.{next(iter(wrong))}", also])


# ---- secrets


def with_secret_file(path):
    return {**GOOD, "keycloak": {**{k: v for k, v in KEYCLOAK.items() if k != "client_secret"}, "client_secret_file": str(path)}}


@pytest.mark.parametrize(
    "content",
    [SECRET, SECRET + "\n", SECRET + "\r\nsecond line\n", f" {SECRET} \n"],
    ids=["bare", "newline", "more lines", "spaces"],
)
def test_client_secret_file_gives_its_first_line(load, tmp_path, content):
    (tmp_path / "secret").write_bytes(content.encode())
    (tmp_path / "secret").chmod(0o600)
    config = load(with_secret_file(tmp_path / "secret"))
    assert config.keycloak.client_secret == SECRET
    assert config.warnings == ()


@pytest.mark.parametrize(
    "content", [b"", b"\n" + SECRET.encode(), b"\xff\xfe", b"a\x00b"], ids=["empty", "second line", "not UTF-8", "NUL"]
)
def test_client_secret_file_without_a_secret_is_a_problem(problems_of, tmp_path, content):
    (tmp_path / "secret").write_bytes(content)
    (problem,) = problems_of(with_secret_file(tmp_path / "secret"))
    assert problem.startswith(f"config: keycloak.client_secret_file: {tmp_path / 'secret'}: ")
    assert SECRET not in problem


def test_client_secret_file_that_is_missing_is_a_problem(problems_of, tmp_path):
    assert problems_of(with_secret_file(tmp_path / "secret")) == [
        f"config: keycloak.client_secret_file: {tmp_path / 'secret'}: cannot be read: No such file or directory"
    ]


@pytest.mark.parametrize(
    "keycloak",
    [
        {**KEYCLOAK, "realm": 5},
        {**KEYCLOAK, "client_secret": [SECRET]},
        {**KEYCLOAK, "client_secret": SECRET + "\n"},
        {**KEYCLOAK, "client_secret": f"<{SECRET}>"},
        {**KEYCLOAK, "client_secret": MISSING, "client_secret_file": SECRET},
        {**KEYCLOAK, "client_secret": MISSING, "client_secrt": SECRET},
        {**KEYCLOAK, "base_url": f"https://mailcloak:{SECRET}@sso.example.org"},
        [{"client_secret": SECRET}],
        f"client_secret={SECRET}",
    ],
    ids=[
        "other key wrong",
        "list",
        "control character",
        "placeholder",
        "in client_secret_file",
        "misspelled key",
        "in base_url",
        "list of keys",
        "text",
    ],
)
def test_problem_never_shows_the_secret(problems_of, keycloak):
    if isinstance(keycloak, dict):
        keycloak = {key: value for key, value in keycloak.items() if value is not MISSING}
    problems = problems_of({**GOOD, "keycloak": keycloak})
    assert problems
    assert SECRET not in "\n".join(problems)


@pytest.mark.parametrize(
    "text",
    [
        f"keycloak:\n  client_secret: *{SECRET}\n",
        f"keycloak:\n  client_secret: !{SECRET} x\n",
        f"keycloak:\n  client_secret: @{SECRET}\n",
        f"keycloak:\n  client_secret: a: {SECRET}\n",
        f'keycloak:\n  client_secret: "{SECRET}\n',
        f"keycloak:\n  client_secret: {SECRET}\n  {SECRET}:x\n  realm: x\n",
        f"keycloak:\n  client_secret: '{SECRET}'{SECRET}'\n",
        f"keycloak:\n  realm: x\n  client_secret:{SECRET}\n  client_id: x\n",
        f"keycloak:\n  client_secret: !!bool {SECRET}\n",
        f"keycloak:\n  client_secret: !!timestamp {SECRET}\n",
        f"keycloak:\n  client_secret: !!int {SECRET}\n",
        f"{SECRET}\n",
        f"- {SECRET}\n",
    ],
    ids=[
        *("alias", "tag", "at sign", "colon", "open quote", "second line", "quote inside", "no space"),
        *("bool", "timestamp", "int", "the secret file itself", "list"),
    ],
)
def test_yaml_error_never_shows_the_secret(problems_of, text):
    (problem,) = problems_of(text)
    assert SECRET not in problem


def test_repr_never_shows_the_secret(load):
    config = load(GOOD)
    assert config.keycloak.client_secret == SECRET
    assert SECRET not in repr(config)
    assert SECRET not in str(config.keycloak)


# ---- warnings


def as_text(problems):
    """Each as the log shows it."""
    return tuple(str(problem) for problem in problems)


def test_config_with_a_secret_that_others_can_read_is_warned_about(load):
    load(GOOD)
    load.path.chmod(0o644)
    assert as_text(mailcloak.load_config(str(load.path)).warnings) == (
        f"config: {load.path}: holds the client secret and every user of this host can read it, chmod o-r",
    )


def test_secret_file_that_others_can_read_is_warned_about(load, tmp_path):
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "secret").chmod(0o644)
    assert as_text(load(with_secret_file(tmp_path / "secret")).warnings) == (
        f"config: {tmp_path / 'secret'}: holds the client secret and every user of this host can read it, chmod o-r",
    )


def test_config_without_a_secret_that_others_can_read_is_not_warned_about(load):
    load(STATIC)
    load.path.chmod(0o644)
    assert mailcloak.load_config(str(load.path)).warnings == ()


@pytest.mark.parametrize(
    ("config", "warning"),
    [
        (
            with_key("keycloak.base_url", "http://sso.example.org"),
            "config: keycloak.base_url: http sends the client secret unencrypted",
        ),
        (
            with_key("static_users.eve", "eve@other.test", STATIC),
            "config: static_users.eve: <eve@other.test> is not in policy.domain",
        ),
        (with_key("sockets.socket_mode", "0666"), "config: sockets.socket_mode: every user of this host may connect"),
    ],
    ids=["http", "user outside policy.domain", "socket open to all"],
)
def test_doubtful_value_is_warned_about(load, config, warning):
    (given,) = as_text(load(config).warnings)
    assert given.startswith(warning)


def test_program_tells_from_the_kind_what_a_problem_is(load, tmp_path):
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "secret").chmod(0o644)
    config = with_secret_file(tmp_path / "secret")
    config["keycloak"]["base_url"] = "http://sso.example.org"
    config["sockets"] = {**config["sockets"], "socket_mode": "0666"}
    assert [(warning.key, warning.kind) for warning in load(config).warnings] == [
        (str(tmp_path / "secret"), "secret-exposed"),
        ("keycloak.base_url", "plain-http"),
        ("sockets.socket_mode", ""),
    ]
    with pytest.raises(mailcloak.ConfigError) as caught:
        mailcloak.load_config(str(tmp_path / "absent.yaml"))
    assert [problem.kind for problem in caught.value.problems] == ["unreadable"]


# ---- the command line


def run(*arguments):
    command = [sys.executable, str(ROOT / "mailcloak.py"), *map(str, arguments)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--check-config", "PATH"),
        ("PATH", "--check-config"),
        ("--config", "PATH", "--check-config"),
        ("--check-config", "--config=PATH"),
    ],
)
def test_check_config_of_a_good_file_warns_and_exits_0(load, arguments):
    load(with_key("sockets.socket_mode", "0666"))
    result = run(*(argument.replace("PATH", str(load.path)) for argument in arguments))
    assert (result.returncode, result.stdout) == (0, "")
    warning, *of_postfix, good = result.stderr.splitlines()
    assert warning.startswith("config: sockets.socket_mode: ")
    assert all("Postfix" in line for line in of_postfix)  # of this host
    assert good == f"config: {load.path}: good"


@pytest.mark.real("postfix")
def test_check_config_warns_of_what_does_not_fit_postfix(load):
    queue_directory, delimiter = subprocess.run(
        ["postconf", "-h", "queue_directory", "recipient_delimiter"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    load(with_key("policy.recipient_delimiter", "#"))
    warnings = run("--check-config", load.path).stderr
    assert f"sockets.policy_socket: {GOOD['sockets']['policy_socket']} is not below Postfix's queue_directory" in warnings
    assert f"policy.recipient_delimiter: '#' here, {delimiter!r} in Postfix's main.cf" in warnings
    raw = with_key("policy.recipient_delimiter", delimiter)
    raw["sockets"] = {**raw["sockets"], "policy_socket": f"{queue_directory}/mailcloak"}
    raw["sockets"]["socketmap_socket"] = f"{queue_directory}/mailcloak-socketmap"
    load(raw)
    assert "Postfix" not in run("--check-config", load.path).stderr


@pytest.mark.real("postfix")
def test_check_config_reads_settings_of_postfix_that_name_others(load, tmp_path):
    (tmp_path / "main.cf").write_text(
        "compatibility_level = 3.6\nx = /\nqueue_directory = ${x}spool\nd = #\nrecipient_delimiter = $d\n"
    )
    load(with_key("policy.recipient_delimiter", "+"))
    command = [sys.executable, str(ROOT / "mailcloak.py"), "--check-config", str(load.path)]
    environment = {**os.environ, "MAIL_CONFIG": str(tmp_path)}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr
    assert "Postfix's queue_directory /spool, where" in said
    assert "policy.recipient_delimiter: '+' here, '#' in Postfix's main.cf" in said


@pytest.mark.real("postfix")
def test_check_config_warns_of_a_socket_that_main_cf_calls_otherwise(load, tmp_path):
    sample = (ROOT / "examples" / "postfix" / "main.cf").read_text(encoding="utf-8")
    (tmp_path / "main.cf").write_text(f"compatibility_level = 3.6\nqueue_directory = {tmp_path}\n{sample}")
    raw = with_key("policy.recipient_delimiter", "+")
    private = tmp_path / "private"
    private.mkdir()

    def said(policy, socketmap):
        raw["sockets"] = {**raw["sockets"], "policy_socket": f"{private}/{policy}", "socketmap_socket": f"{private}/{socketmap}"}
        load(raw)
        command = [sys.executable, str(ROOT / "mailcloak.py"), "--check-config", str(load.path)]
        environment = {**os.environ, "MAIL_CONFIG": str(tmp_path)}
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr
        return [line for line in output.splitlines() if "Postfix" in line]

    assert said("mailcloak", "mailcloak-socketmap") == []
    end = "in Postfix's main.cf; both must be the same, correct the one that is wrong"
    assert said("mailclaok", "mailcloak-sockmap") == [
        f"config: sockets.policy_socket: {private}/mailclaok here, {private}/mailcloak {end}",
        f"config: sockets.socketmap_socket: {private}/mailcloak-sockmap here, {private}/mailcloak-socketmap {end}",
    ]


def test_directory_of_a_socket_that_is_missing_is_said_by_check_config_and_by_the_start(load, tmp_path):
    raw = with_key("sqlite.path", str(tmp_path / "state.db"))
    directory = str(tmp_path / "no" / "directory")
    raw["sockets"] = {**raw["sockets"], "policy_socket": f"{directory}/p", "socketmap_socket": f"{tmp_path}/s"}
    load(raw)
    said = run("--check-config", load.path).stderr
    remedy = "start Postfix once, which makes its own, or correct the path"
    assert f"config: sockets.policy_socket: directory {directory!r} does not exist, {remedy}\n" in said
    assert "sockets.socketmap_socket: directory" not in said
    started = run(load.path)
    assert started.returncode == 1
    assert f"its directory {directory!r} does not exist" in started.stderr


@pytest.mark.parametrize("check", [["--check-config"], []], ids=["check", "start"])
def test_bad_file_exits_78_with_every_problem(load, problems_of, check):
    problems = problems_of(with_key("policy", {"domain": "a..b", "foreign_sender": "maybe"}))
    assert len(problems) == 2
    result = run(load.path, *check)
    assert (result.returncode, result.stdout) == (78, "")
    assert result.stderr.splitlines() == problems


def test_missing_file_exits_78(tmp_path):
    result = run("--config", tmp_path / "absent.yaml")
    assert result.returncode == 78
    assert result.stderr == f"config: {tmp_path / 'absent.yaml'}: cannot be read: No such file or directory\n"


@pytest.mark.parametrize(
    "arguments",
    [["--no-such-option"], ["a", "b"], ["a", "--config", "b"], ["--config"]],
    ids=["option", "two files", "file twice", "no value"],
)
def test_usage_error_exits_64(arguments):
    result = run(*arguments)
    assert (result.returncode, result.stdout) == (64, "")
    assert result.stderr.startswith("usage: mailcloak ")


def test_version_names_the_program(tmp_path):
    result = run("--version")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"mailcloak {mailcloak.__version__}\n"
    assert re.fullmatch(r"mailcloak \d+\.\d+\.\d+\n", result.stdout)


def test_link_that_is_taken_away_while_the_configuration_is_read_is_no_traceback(load, monkeypatch):
    """Python's realpath() raises where a link goes between its two looks at it."""

    def gone(path):
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr(mailcloak.os.path, "realpath", gone)
    assert load(STATIC).sockets.policy_socket == STATIC["sockets"]["policy_socket"]
