"""The documents say what the program does: the schema, the configuration sample, the README, the licence."""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import dataclasses
import grp
import os
import pwd
import re
import sqlite3

import pytest
import yaml
from conftest import MODULES, ROOT

import mailcloak
import mailcloakctl

BLOCKS = {
    "keycloak": mailcloak.KeycloakConfig,
    "policy": mailcloak.PolicyConfig,
    "sqlite": mailcloak.SqliteConfig,
    "sockets": mailcloak.SocketsConfig,
    "daemon": mailcloak.DaemonConfig,
    "replication": mailcloak.ReplicationConfig,
}
KEYS = [f"{name}.{field.name}" for name, block in BLOCKS.items() for field in dataclasses.fields(block)]
SAMPLE = ROOT / "config.yaml.sample"
FILLED = {
    "base_url": "https://sso.example.org",
    "realm": "mail",
    "client_id": "mailcloak",
    "client_secret": "x" * 20,
    "domain": "example.org",
}
ACCOUNTS = [("sockets", "socket_owner_user"), ("sockets", "socket_owner_group"), ("daemon", "user")]  # a test host may lack them


def sample_as_it_is():
    return yaml.safe_load(SAMPLE.read_text(encoding="utf-8"))


def sample_uncommented():
    """The sample with every key that is commented out put in force: "#key: value", while "# text" stays a comment."""
    return yaml.safe_load(re.sub(r"^( *)#(\w+:)", r"\1\2", SAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE))


def fill_in(config):
    """The configuration with each placeholder replaced, and accounts of this host in place of those that it may lack."""
    config = copy.deepcopy(config)
    for block in config.values():
        block.update({key: FILLED[key] for key, value in block.items() if re.fullmatch(r"<.*>", str(value))})
    user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(os.getegid()).gr_name
    for (block, key), name in zip(ACCOUNTS, (user, group, user)):
        config.setdefault(block, {})[key] = name
    return config


@pytest.fixture
def load(tmp_path):
    def load(config):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        path.chmod(0o600)
        return mailcloak.load_config(str(path))

    return load


def test_sample_with_its_placeholders_is_refused_naming_each(load):
    config = sample_as_it_is()
    for block, key in ACCOUNTS:
        config.setdefault(block, {})[key] = ""
    with pytest.raises(mailcloak.ConfigError) as caught:
        load(config)
    hint = "expected your own value in place of the placeholder"
    assert all(hint in problem.text for problem in caught.value.problems), caught.value.problems
    keys = [problem.key for problem in caught.value.problems]
    assert sorted(keys) == ["keycloak.base_url", "keycloak.client_id", "keycloak.client_secret", "keycloak.realm", "policy.domain"]


def test_sample_filled_in_loads_without_warning(load):
    assert load(fill_in(sample_as_it_is())).warnings == ()


def test_sample_with_all_keys_uncommented_loads_with_the_defaults(load):
    uncommented = sample_uncommented()
    del uncommented["static_users"]  # the other way to name users
    del uncommented["keycloak"]["client_secret_file"]  # the other way to give the secret
    required = {
        name: {
            key: value
            for key, value in (block or {}).items()
            if default_of(name, key) is dataclasses.MISSING or key == "client_secret"
        }
        for name, block in uncommented.items()
    }
    assert load(fill_in(uncommented)) == load(fill_in(required))
    for block, key in ACCOUNTS:
        assert uncommented[block][key] == default_of(block, key)


def default_of(block, key):
    return {field.name: field.default for field in dataclasses.fields(BLOCKS[block])}[key]


def test_sample_with_static_users_loads(load):
    uncommented = sample_uncommented()
    del uncommented["keycloak"]
    users = uncommented.pop("static_users")
    assert dict(load({**fill_in(uncommented), "static_users": users}).static_users) == users


def test_sample_leaves_required_keys_in_force_and_comments_the_others_out():
    in_force = [f"{name}.{key}" for name, block in sample_as_it_is().items() for key in block]
    required = [key for key in KEYS if default_of(*key.split(".")) is dataclasses.MISSING]
    assert sorted(in_force) == sorted([*required, "keycloak.client_secret"])


def test_sample_names_every_key_and_no_other():
    sample = sample_uncommented()
    del sample["static_users"]
    assert sorted(f"{name}.{key}" for name, block in sample.items() for key in block) == sorted(KEYS)


def test_sample_explains_every_key():
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()
    for key in KEYS:
        name = key.split(".")[1]
        (number,) = [index for index, line in enumerate(lines) if re.match(rf" +#?{name}:", line)]
        before = lines[number - 1].strip()
        assert re.match(r"# +\S", before) or before.startswith("#socket_owner_user"), f"{key} has no explanation"


def test_sample_offers_every_choice_of_a_key():
    text = SAMPLE.read_text(encoding="utf-8")
    for key in ("keycloak_failure_mode", "unauthenticated_local_sender", "foreign_sender"):
        with pytest.raises(ValueError, match="expected one of") as caught:
            mailcloak.PolicyConfig.__dataclass_fields__[key].metadata["read"]("no such choice")
        paragraph = text[: text.index(f"#{key}:")].rpartition("\n\n")[2]
        for choice in caught.value.args[0].removeprefix("expected one of ").split(", "):
            assert re.search(rf"\b{choice}\b", paragraph), f"{key}: {choice}"


def test_sample_fits_a_wide_terminal():
    assert max(map(len, SAMPLE.read_text(encoding="utf-8").splitlines())) <= 132


def test_schema_file_is_the_schema_of_the_program():
    assert (ROOT / "schema.sql").read_text(encoding="utf-8") == mailcloak.SCHEMA


def test_schema_has_the_columns_that_other_programs_rely_on():
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.executescript(mailcloak.SCHEMA)
        columns = {
            table: [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
            for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        }
        database.execute("INSERT INTO aliases (alias_email, username) VALUES ('info@d1.test', 'alice')")
        assert database.execute("SELECT enabled, typeof(updated_at) FROM aliases").fetchall() == [(1, "integer")]
        with pytest.raises(sqlite3.IntegrityError):
            database.execute("UPDATE aliases SET enabled = 2")
    assert columns == {
        "aliases": ["alias_email", "username", "enabled", "updated_at", "source", "receive_only", "external"],
        "alias_targets": ["alias_email", "target", "external"],
        "apps": ["app_id", "secret_hash", "enabled", "created_at", "owner", "expires_at"],
        "app_from": ["app_id", "from_addr", "enabled"],
    }


def test_licence_is_mit():
    text = " ".join((ROOT / "LICENSE").read_text(encoding="utf-8").split())
    assert text.startswith("MIT License Copyright (c) ")
    for part in (
        "Permission is hereby granted, free of charge",
        "to deal in the Software without restriction",
        'PROVIDED "AS IS", WITHOUT WARRANTY',
    ):
        assert part in text
    for program in MODULES:
        assert "MIT licence" in "".join((ROOT / program).read_text(encoding="utf-8").splitlines()[:2])


def parsers_of(parser, words=()):
    """Every parser below parser, with the nouns and verbs that lead to it."""
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, below in action.choices.items():
                yield from parsers_of(below, (*words, word))


PARSERS = list(parsers_of(mailcloakctl.build_parser()))
VERBS = [" ".join(words) for words, _ in PARSERS if len(words) == 2]
OPTIONS = sorted(
    {option for _, parser in PARSERS for action in parser._actions for option in action.option_strings if option.startswith("--")}
)


def test_commands_are_those_of_the_reference():
    assert [
        *(
            f"aliases {verb}"
            for verb in (
                "add",
                "add-user",
                "remove-user",
                "list",
                "show",
                "move",
                "del",
                "enable",
                "disable",
                "export",
                "import",
                "sync",
            )
        ),
        *(f"apps {verb}" for verb in ("add", "set", "list", "allow", "disallow", "del", "enable", "disable")),
        *(f"ask {verb}" for verb in ("recipient", "sender", "alias")),
        *(f"db {verb}" for verb in ("check", "mirror", "promote")),
    ] == [verb for verb in VERBS if " " in verb]
    assert {"--config", "--db", "--json", "--replace", "--force", "--token-stdin", "--generate"} <= set(OPTIONS)


def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("verb", VERBS)
def test_readme_names_every_command(verb):
    assert re.search(rf"\b{verb}\b", readme()), f"README.md does not name: mailcloakctl {verb}"


@pytest.mark.parametrize("option", [option for option in OPTIONS if option not in ("--help", "--version")])
def test_readme_names_every_option(option):
    assert re.search(rf"{option}(?![\w-])", readme()), f"README.md does not name {option}"


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_command_has_an_example_that_parses(verb):
    parser = dict(PARSERS)[tuple(verb.split())]
    example = parser.epilog.removeprefix("example: mailcloakctl ").split()
    options = mailcloakctl.build_parser().parse_args(example, argparse.Namespace(config=None, db=None, json=False))
    assert f"{options.noun} {options.verb}" == verb


def security_rows():
    """(threat, defence, tests) of each row of the tables of threats in SECURITY.md."""
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+) \| (.+) \| (.+) \|$", text[text.index("\n## Threats") :], re.MULTILINE)
    return [row for row in rows if row[0] != "threat"]


@pytest.mark.parametrize("row", security_rows(), ids=[row[0] for row in security_rows()])
def test_security_names_tests_that_exist_for_each_threat(row):
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row[2])
    assert named
    assert re.sub(r"`test_\w+\.py::test_\w+`", "", row[2]).strip() == "", "anything but the names of tests"
    for file, name in named:
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"
