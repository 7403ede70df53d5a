"""mailcloakctl as a command: what it does, what it says, what it refuses, and that a refusal leaves the database as it was."""

from __future__ import annotations

import base64
import contextlib
import datetime
import grp
import hashlib
import hmac
import io
import json
import os
import pwd
import re
import sqlite3
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, Terminal, as_nobody, run_ctl, run_ctl_in_fork, run_ctl_process, wait_until

import mailcloak
import mailcloakcommon
import mailcloakctl

TOKEN = "a token of twenty-eight signs"
AS_ROOT = os.geteuid() == 0


class Ctl:
    """The command on one database, and a look into it."""

    def __init__(self, path):
        self.path = path

    def __call__(self, *arguments, check=True, **options):
        return run_ctl("--db", self.path, *arguments, check=check, **options)

    def rows(self, statement, *parameters):
        with contextlib.closing(sqlite3.connect(self.path)) as database:
            return database.execute(statement, parameters).fetchall()

    def aliases(self):
        return self.rows("SELECT alias_email, username, enabled FROM aliases ORDER BY alias_email")

    def apps(self):
        return self.rows("SELECT app_id, secret_hash, enabled FROM apps ORDER BY app_id")

    def senders(self):
        return self.rows("SELECT app_id, from_addr, enabled FROM app_from ORDER BY app_id, from_addr")

    def insert(self, table, *values):
        """A row as another program writes it, with as few columns as the schema allows."""
        columns = {"aliases": "alias_email, username", "apps": "app_id, secret_hash", "app_from": "app_id, from_addr"}[table]
        with contextlib.closing(sqlite3.connect(self.path)) as database, database:
            database.execute(f"INSERT INTO {table} ({columns}) VALUES (?, ?)", values)

    def refuses(self, *arguments, code=1, **options):
        """The message of a refusal that changed nothing, not a byte."""
        before = self.path.read_bytes() if self.path.exists() else None
        result = self(*arguments, check=False, **options)
        assert (result.returncode, result.stdout) == (code, ""), result.stderr
        assert "Traceback" not in result.stderr
        assert (self.path.read_bytes() if self.path.exists() else None) == before
        return result.stderr


@pytest.fixture
def missing(tmp_path):
    """The command on a database that is not there yet."""
    return Ctl(tmp_path / "state.db")


@pytest.fixture
def ctl(missing):
    """The command on an empty database."""
    assert mailcloak.prepare_database(str(missing.path), 5)
    return missing


@pytest.fixture
def filled(ctl):
    """The command on a database with an alias, info of alice, and an app, printer, that may send as scan."""
    ctl.insert("aliases", "info@d1.test", "alice")
    ctl.insert("apps", "printer", "{SHA256}x")
    ctl.insert("app_from", "printer", "scan@d1.test")
    return ctl


def scram_is_right(secret_hash, token, iterations):
    """Is this the token's hash as Dovecot computes it (RFC 5802, section 3)?"""
    scheme, _, rest = secret_hash.partition("}")
    count, salt, stored_key, server_key = rest.split(",")
    assert (scheme, int(count)) == ("{SCRAM-SHA-256", iterations)
    salt = base64.b64decode(salt, validate=True)
    assert len(salt) == 16
    salted = hashlib.pbkdf2_hmac("sha256", token.encode(), salt, iterations)
    client_key = hmac.new(salted, b"Client Key", hashlib.sha256).digest()
    expected = hashlib.sha256(client_key).digest(), hmac.new(salted, b"Server Key", hashlib.sha256).digest()
    return expected == (base64.b64decode(stored_key, validate=True), base64.b64decode(server_key, validate=True))


# ---- aliases


def test_aliases_add_stores_address_and_username_lower_cased(ctl):
    result = ctl("aliases", "add", "Info@D1.Test", "Alice")
    assert (result.stdout, result.stderr) == ("", "aliases: info@d1.test leads to alice\n")
    assert ctl.aliases() == [("info@d1.test", "alice", 1)]
    assert abs(ctl.rows("SELECT updated_at FROM aliases")[0][0] - time.time()) < 60


@pytest.mark.parametrize(
    ("address", "stored"),
    [
        ("Jörg@Bücher.test", "jörg@xn--bcher-kva.test"),
        ("info@XN--BCHER-KVA.test", "info@xn--bcher-kva.test"),
        ("info@d1.test.", "info@d1.test"),
    ],
    ids=["U-label", "A-label", "trailing dot"],
)
def test_aliases_add_stores_the_normalised_address(ctl, address, stored):
    ctl("aliases", "add", address, "alice")
    assert ctl.aliases() == [(stored, "alice", 1)]
    assert ctl("aliases", "del", address).stderr == f"aliases: {stored} deleted\n"


def test_aliases_add_of_what_is_there_is_done_already(filled):
    before = filled.rows("SELECT * FROM aliases")
    result = filled("aliases", "add", "INFO@d1.test", "ALICE")
    assert result.stderr == "aliases: info@d1.test leads to alice already\n"
    assert filled.rows("SELECT * FROM aliases") == before


def test_aliases_add_of_what_is_there_by_force_is_done_without_force(filled):
    filled("aliases", "add", "alice@d1.test", "bob", "--force")
    assert "already" in filled("aliases", "add", "alice@d1.test", "bob").stderr


def test_aliases_add_with_another_username_is_refused_unless_replace(filled):
    assert filled.refuses("aliases", "add", "info@d1.test", "bob") == (
        "mailcloakctl: aliases: info@d1.test leads to alice already, --replace changes that\n"
    )
    assert (
        filled("aliases", "add", "info@d1.test", "bob", "--replace").stderr
        == "aliases: info@d1.test now leads to bob, no longer to alice\n"
    )
    assert filled.aliases() == [("info@d1.test", "bob", 1)]


def test_aliases_add_with_force_does_not_replace(filled):
    assert "--replace changes that" in filled.refuses("aliases", "add", "info@d1.test", "bob", "--force")


def test_aliases_add_of_a_disabled_alias_leaves_it_disabled_and_says_so(filled):
    filled("aliases", "disable", "info@d1.test")
    assert "aliases enable info@d1.test makes it count" in filled("aliases", "add", "info@d1.test", "bob", "--replace").stderr
    assert filled.aliases() == [("info@d1.test", "bob", 0)]


def test_aliases_add_for_an_app_is_done_with_a_warning(filled):
    assert "warning: printer is an app" in filled("aliases", "add", "scans@d1.test", "printer").stderr


CHAINS = {
    "mailbox of another alias's user": ([("info@d1.test", "bob")], "bob@d1.test", "carol", "would carry that mail on to carol"),
    "mailbox of a user written in upper case": (
        [("info@d1.test", "Bob")],
        "bob@d1.test",
        "carol",
        "would carry that mail on to carol",
    ),
    "mailbox that is a whole address": (
        [("info@d1.test", "bob@d2.test")],
        "bob@d2.test",
        "carol",
        "would carry that mail on to carol",
    ),
    "mailbox is an alias": ([("bob@d1.test", "carol")], "info@d1.test", "bob", "name carol instead"),
    "mailbox is an alias elsewhere": ([("bob@d2.test", "carol")], "info@d1.test", "bob@d2.test", "name carol instead"),
    "circle of two": ([("bob@d1.test", "carol")], "carol@d1.test", "bob", "would close a circle"),
    "circle of three": ([("a@d1.test", "b"), ("b@d1.test", "c")], "c@d1.test", "a", "is itself an alias"),
}


@pytest.mark.parametrize(("there", "address", "username", "says"), CHAINS.values(), ids=CHAINS)
def test_alias_of_an_alias_is_refused_unless_force(ctl, there, address, username, says):
    for row in there:
        ctl.insert("aliases", *row)
    message = ctl.refuses("aliases", "add", address, username)
    assert says in message
    assert "--force" in message
    ctl("aliases", "add", address, username, "--force")
    assert (address, username, 1) in ctl.aliases()


@pytest.mark.parametrize(
    ("there", "address", "username"),
    [
        ([("info@d1.test", "bob")], "bob@d1.test", "bob"),
        ([("bob@d1.test", "bob")], "info@d1.test", "bob"),
        ([("info@d1.test", "bob")], "bob@d2.test", "carol"),
        ([("info@d1.test", "bob")], "sales@d1.test", "bob"),
        ([("bob@d2.test", "bob")], "info@d1.test", "bob@d2.test"),
    ],
    ids=["own mailbox", "own mailbox is there", "other domain", "second alias", "own mailbox elsewhere"],
)
def test_alias_that_forms_no_chain_is_added(ctl, there, address, username):
    for row in there:
        ctl.insert("aliases", *row)
    ctl("aliases", "add", address, username)
    assert (address, username, 1) in ctl.aliases()


CHAINS_BY_EXTENSION = {
    "mailbox with an extension is an alias": ([("bob+x@d1.test", "carol")], "info@d1.test", "bob", "and bob+x@d1.test is itself"),
    "mailbox of another alias's user, with an extension": (
        [("info@d1.test", "bob")],
        "bob-x@d1.test",
        "carol",
        "would carry mail with that extension on to carol",
    ),
    "without its extension it is an alias": ([("bob@d1.test", "carol")], "bob+x@d1.test", "bob", "which is itself an alias"),
    "circle by an extension": ([("bob+x@d1.test", "info")], "info@d1.test", "bob", "would close a circle"),
}


@pytest.mark.parametrize(("there", "address", "username", "says"), CHAINS_BY_EXTENSION.values(), ids=CHAINS_BY_EXTENSION)
def test_alias_of_an_alias_with_an_extension_is_refused_unless_force(ctl, make_config, there, address, username, says):
    """Mail for info+x leads to bob+x, since the map puts the extension back behind the username."""
    config_path = ctl.path.parent / "config.yaml"
    blocks = make_config(sqlite={"path": str(ctl.path)}, policy={"recipient_delimiter": "+-"}, static_users={"bob": "bob@d1.test"})
    config_path.write_text(yaml.safe_dump(blocks))
    for row in there:
        ctl.insert("aliases", *row)
    command = ("--config", config_path, "aliases", "add", address, username)
    result = run_ctl(*command, check=False)
    assert (result.returncode, ctl.aliases()) == (1, [(*row, 1) for row in there])
    assert says in result.stderr
    run_ctl(*command, "--force")
    assert (address, username, 1) in ctl.aliases()


@pytest.mark.parametrize(
    ("there", "address", "username"),
    [
        ([("info@d1.test", "bob")], "bob+x@d1.test", "bob"),
        ([("bob+x@d1.test", "bob")], "info@d1.test", "bob"),
        ([("bob@d1.test", "bob")], "bob+x@d1.test", "carol"),
        ([("bob+x@d2.test", "carol")], "info@d1.test", "bob"),
        ([("bob_x@d1.test", "carol")], "info@d1.test", "bob"),
        ([("owner-x@d1.test", "carol")], "info@d1.test", "owner"),
        ([("bob+x@d1.test", "carol")], "info+y@d1.test", "bob"),
        ([("info+y@d1.test", "bob")], "bob+x@d1.test", "carol"),
        ([("bob+x@d1.test", "carol")], "info@d1.test", "bob@d1.test"),
    ],
    ids=[
        *("own mailbox", "own mailbox is there", "its base is an alias", "other domain", "no delimiter", "never cut"),
        *("extension of its own", "other with an extension of its own", "username that is an address"),
    ],
)
def test_alias_with_an_extension_that_forms_no_chain_is_added(ctl, make_config, there, address, username):
    config_path = ctl.path.parent / "config.yaml"
    blocks = make_config(sqlite={"path": str(ctl.path)}, policy={"recipient_delimiter": "+-"}, static_users={"bob": "bob@d1.test"})
    config_path.write_text(yaml.safe_dump(blocks))
    for row in there:
        ctl.insert("aliases", *row)
    run_ctl("--config", config_path, "aliases", "add", address, username)
    assert (address, username, 1) in ctl.aliases()


def test_replace_that_forms_a_chain_is_refused_unless_force(ctl):
    ctl.insert("aliases", "info@d1.test", "bob")
    ctl.insert("aliases", "carol@d1.test", "dora")
    assert "name dora instead" in ctl.refuses("aliases", "add", "info@d1.test", "carol", "--replace")
    ctl("aliases", "add", "info@d1.test", "carol", "--replace", "--force")
    assert ("info@d1.test", "carol", 1) in ctl.aliases()


def test_aliases_del_deletes_one(filled):
    filled.insert("aliases", "sales@d1.test", "alice")
    assert filled("aliases", "del", "INFO@d1.test").stderr == "aliases: info@d1.test deleted\n"
    assert filled.aliases() == [("sales@d1.test", "alice", 1)]


@pytest.mark.parametrize(
    ("noun", "name", "rows"), [("aliases", "info@d1.test", Ctl.aliases), ("apps", "printer", Ctl.apps)], ids=["alias", "app"]
)
def test_disable_and_enable_turn_it_off_and_on(filled, noun, name, rows):
    assert filled(noun, "disable", name.upper()).stderr == f"{noun}: {name} disabled\n"
    assert rows(filled)[0][2] == 0
    assert filled(noun, "disable", name).stderr == f"{noun}: {name} is disabled already\n"
    assert filled(noun, "enable", name).stderr == f"{noun}: {name} enabled\n"
    assert rows(filled)[0][2] == 1
    assert filled(noun, "enable", name).stderr == f"{noun}: {name} is enabled already\n"


def test_disable_notes_the_time_of_the_change_to_an_alias(filled):
    with contextlib.closing(sqlite3.connect(filled.path)) as database, database:
        database.execute("UPDATE aliases SET updated_at = 1")
    filled("aliases", "enable", "info@d1.test")
    assert filled.rows("SELECT updated_at FROM aliases") == [(1,)]
    filled("aliases", "disable", "info@d1.test")
    assert abs(filled.rows("SELECT updated_at FROM aliases")[0][0] - time.time()) < 60


@pytest.mark.parametrize("verb", ["del", "enable", "disable"])
@pytest.mark.parametrize(("noun", "name"), [("aliases", "absent@d1.test"), ("apps", "absent")])
def test_change_of_what_does_not_exist_is_refused(filled, noun, name, verb):
    assert filled.refuses(noun, verb, name) == f"mailcloakctl: {noun}: {name} does not exist, {noun} list shows what does\n"


@pytest.fixture
def several(ctl):
    """The command on a database with four aliases, one of them disabled."""
    for address, username in (
        ("info@d1.test", "alice"),
        ("info@d2.test", "bob"),
        ("old@d1.test", "alice"),
        ("x1@d1.test", "Alice"),
    ):
        ctl.insert("aliases", address, username)
    ctl("aliases", "disable", "old@d1.test")
    return ctl


@pytest.mark.parametrize(
    ("options", "addresses"),
    [
        ([], ["info@d1.test", "info@d2.test", "old@d1.test", "x1@d1.test"]),
        (["INFO@*"], ["info@d1.test", "info@d2.test"]),
        (["--quiet", "x?@d1.test"], ["x1@d1.test"]),
        (["--user", "ALICE"], ["info@d1.test", "old@d1.test", "x1@d1.test"]),
        (["--domain", "D1.test."], ["info@d1.test", "old@d1.test", "x1@d1.test"]),
        (["--domain", "1.test"], []),
        (["--disabled"], ["old@d1.test"]),
        (["--domain", "d1.test", "--user", "alice", "i*"], ["info@d1.test"]),
    ],
    ids=["all", "pattern", "pattern behind an option", "user", "domain", "end of a domain", "disabled", "several"],
)
def test_aliases_list_shows_what_all_filters_let_through(several, options, addresses):
    quiet = [] if "--quiet" in options else ["--quiet"]
    assert json.loads(several("aliases", "list", *options, *quiet, "--json").stdout) == addresses
    assert several("aliases", "list", *options, *quiet).stdout == "".join(f"{address}\n" for address in addresses)
    if quiet:
        assert several("aliases", "list", *options, "--count").stdout == f"{len(addresses)}\n"
        assert json.loads(several("aliases", "list", *options, "--count", "--json").stdout) == {"count": len(addresses)}
        assert [row["alias_email"] for row in json.loads(several("aliases", "list", *options, "--json").stdout)] == addresses


def test_aliases_show_shows_one_with_its_mailbox(several):
    shown = several("aliases", "show", "X1@d1.test").stdout
    assert re.search(r"^username +alice$", shown, re.MULTILINE)
    assert re.search(r"^mailbox +alice@d1.test$", shown, re.MULTILINE)
    value = json.loads(several("aliases", "show", "old@d1.test", "--json").stdout)
    assert (value["alias_email"], value["username"], value["enabled"], value["mailbox"]) == (
        "old@d1.test",
        "alice",
        0,
        "alice@d1.test",
    )
    assert several.refuses("aliases", "show", "absent@d1.test").endswith("does not exist, aliases list shows what does\n")


def test_aliases_move_lets_all_of_a_user_lead_to_another(several):
    result = several("aliases", "move", "alice", "Carol")
    assert result.stderr == "aliases: 3 aliases now lead to carol: info@d1.test, old@d1.test, x1@d1.test\n"
    assert several.aliases() == [
        ("info@d1.test", "carol", 1),
        ("info@d2.test", "bob", 1),
        ("old@d1.test", "carol", 0),
        ("x1@d1.test", "carol", 1),
    ]
    assert "no alias leads to alice" in several.refuses("aliases", "move", "alice", "carol")


def test_aliases_move_leaves_rows_that_are_no_alias(several):
    with contextlib.closing(sqlite3.connect(several.path)) as database, database:
        database.execute("INSERT INTO alias_targets (alias_email, target) VALUES (x'61', 'alice'), ('gone@d1.test', 'alice')")
        database.execute("INSERT INTO aliases (alias_email, username) VALUES (x'62', 'alice')")
    assert several("aliases", "move", "alice", "dave").stderr.startswith("aliases: 3 aliases now lead to dave: info@d1.test, ")


def test_aliases_move_that_forms_a_chain_is_refused_as_a_whole_unless_force(several):
    several.insert("aliases", "carol@d1.test", "dora")
    assert "name dora instead" in several.refuses("aliases", "move", "alice", "carol")
    several("aliases", "move", "alice", "carol", "--force")
    assert ("info@d1.test", "carol", 1) in several.aliases()


def test_several_aliases_are_changed_together_or_not_at_all(several):
    for verb in ("disable", "enable", "del"):
        message = several.refuses("aliases", verb, "info@d1.test", "a@d1.test", "b@d1.test")
        assert message == "mailcloakctl: aliases: a@d1.test, b@d1.test do not exist, aliases list shows what does\n"
    result = several("aliases", "disable", "info@d1.test", "-", "old@d1.test", input="info@d2.test\n\n INFO@d1.test \n")
    assert result.stderr == (
        "aliases: info@d1.test disabled\naliases: info@d2.test disabled\naliases: old@d1.test is disabled already\n"
    )
    assert [row[2] for row in several.aliases()] == [0, 0, 0, 1]
    several("aliases", "del", "-", input=several("aliases", "list", "--disabled", "--quiet").stdout)
    assert [row[0] for row in several.aliases()] == ["x1@d1.test"]
    result = run_ctl("--db", several.path, "aliases", "del", "-", input=b"x1@d1.test\xff\n", text=False, check=False)
    assert (result.returncode, b"standard input is not UTF-8" in result.stderr) == (1, True)
    assert len(several.aliases()) == 1


ANSWERS = {
    "aliases add": (["aliases", "add", "new@d1.test", "bob"], ["new@d1.test"], {"username": "bob", "before": None}),
    "aliases add, as it is": (["aliases", "add", "info@d1.test", "alice"], [], {"username": "alice", "before": "alice"}),
    "aliases disable": (["aliases", "disable", "info@d1.test"], ["info@d1.test"], {}),
    "aliases enable, as it is": (["aliases", "enable", "info@d1.test"], [], {}),
    "aliases del": (["aliases", "del", "info@d1.test"], ["info@d1.test"], {}),
    "aliases move": (["aliases", "move", "alice", "bob"], ["info@d1.test"], {"username": "bob", "before": "alice"}),
    "apps add": (["apps", "add", "shop", TOKEN], ["shop"], {}),
    "apps set": (["apps", "set", "printer", "--owner", "bob"], ["printer"], {}),
    "apps set, as it is": (["apps", "set", "printer", "--owner", ""], [], {}),
    "apps allow": (["apps", "allow", "printer", "<>"], ["printer"], {"sender": ""}),
    "apps allow, as it is": (["apps", "allow", "printer", "scan@d1.test"], [], {"sender": "scan@d1.test"}),
    "apps disallow": (["apps", "disallow", "printer", "scan@d1.test"], ["printer"], {"sender": "scan@d1.test"}),
    "apps disable": (["apps", "disable", "printer"], ["printer"], {}),
    "apps del": (["apps", "del", "printer"], ["printer"], {}),
}


@pytest.mark.parametrize(("command", "changed", "values"), ANSWERS.values(), ids=ANSWERS)
def test_command_that_changes_something_says_so_in_json(filled, command, changed, values):
    before = filled.path.read_bytes()
    result = filled(*command, "--json")
    assert json.loads(result.stdout) == {"changed": bool(changed), command[0]: changed, **values}
    assert (filled.path.read_bytes() != before) == bool(changed)


def test_change_that_cannot_be_shown_is_done_and_says_so(filled):
    with open("/dev/full", "w") as full:
        result = run_ctl_process(
            "--db",
            str(filled.path),
            "aliases",
            "del",
            "info@d1.test",
            "--json",
            capture_output=False,
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert (result.returncode, result.stderr) == (0, "warning: it is done, but cannot be shown: No space left on device\n")
    assert filled.aliases() == []


# ---- apps


def test_apps_add_with_a_chosen_token_stores_its_scram_hash(ctl):
    result = ctl("apps", "add", "Printer", TOKEN)
    assert result.stdout == ""
    assert result.stderr == "apps: printer added\napps: it may not send yet, apps allow printer ADDRESS lets it use an address\n"
    ((app_id, secret_hash, enabled),) = ctl.apps()
    assert (app_id, enabled) == ("printer", 1)
    assert scram_is_right(secret_hash, TOKEN, 100_000)
    assert not scram_is_right(secret_hash, TOKEN + "x", 100_000)


def test_apps_add_generate_shows_the_token_once_and_stores_its_scram_hash(ctl):
    result = ctl("apps", "add", "printer", "--generate")
    token = result.stdout.removesuffix("\n")
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", token)  # 32 bytes
    assert token not in result.stderr
    assert scram_is_right(ctl.apps()[0][1], token, 4096)
    assert token not in ctl("apps", "list").stdout + ctl("apps", "list", "--json").stdout
    assert token.encode() not in ctl.path.read_bytes()
    assert ctl("apps", "add", "printer", "--generate", "--replace").stdout != result.stdout


def test_apps_add_generate_as_json_is_an_object(ctl):
    shown = json.loads(ctl("apps", "add", "printer", "--generate", "--json").stdout)
    assert set(shown) == {"app_id", "token"}
    assert scram_is_right(ctl.apps()[0][1], shown["token"], 4096)


@pytest.mark.parametrize(
    "line", [TOKEN, TOKEN + "\n", TOKEN + "\r\n", TOKEN + "\nsecond line\n"], ids=["no newline", "newline", "CRLF", "more lines"]
)
def test_apps_add_token_stdin_reads_one_line_without_its_newline(ctl, line):
    result = ctl("apps", "add", "printer", "--token-stdin", input=line)
    assert TOKEN not in result.stdout + result.stderr
    assert scram_is_right(ctl.apps()[0][1], TOKEN, 100_000)


def test_apps_add_token_keeps_spaces_and_other_scripts(ctl):
    token = "  Zwölf Boxkämpfer  "
    ctl("apps", "add", "printer", "--token-stdin", input=(token + "\n").encode(), text=False)
    assert scram_is_right(ctl.apps()[0][1], token, 100_000)


@pytest.mark.parametrize(
    ("options", "given"),
    [
        (["x" * 15], None),
        (["--token-stdin"], "x" * 15 + "\n"),
    ],
    ids=["argument", "stdin"],
)
def test_short_token_is_taken_with_a_warning(ctl, options, given):
    assert "warning: a token of 15 characters" in ctl("apps", "add", "printer", *options, input=given or "").stderr
    assert scram_is_right(ctl.apps()[0][1], "x" * 15, 100_000)
    assert "warning" not in ctl("apps", "add", "printer", "x" * 16).stderr


def test_apps_add_of_an_existing_app_replaces_its_token_and_keeps_the_rest(filled):
    filled("apps", "disable", "printer")
    before = filled.rows("SELECT app_id, enabled, created_at FROM apps")
    result = filled("apps", "add", "PRINTER", TOKEN)
    assert "apps: printer has a new token, the old one no longer works" in result.stderr
    assert "apps: printer is disabled, apps enable printer lets it in again" in result.stderr
    assert filled.rows("SELECT app_id, enabled, created_at FROM apps") == before
    assert filled.senders() == [("printer", "scan@d1.test", 1)]
    assert scram_is_right(filled.apps()[0][1], TOKEN, 100_000)


def test_apps_add_of_a_username_that_an_alias_names_is_refused(filled):
    filled.insert("aliases", "sales@d1.test", "Bob")
    assert "apps: alice is a username, the alias info@d1.test leads to it; choose" in filled.refuses(
        "apps", "add", "Alice", "--generate"
    )
    assert "apps: bob is a username" in filled.refuses("apps", "add", "bob", TOKEN)


def test_apps_add_without_a_token_and_without_a_terminal_is_refused(ctl):
    assert ctl.refuses("apps", "add", "printer") == "mailcloakctl: no token: name one, or use --generate or --token-stdin\n"


@pytest.mark.parametrize("app_id", ["a", "A.b_c-d@e.test", "0" * 254], ids=["short", "every kind", "254 characters"])
def test_app_id_that_dovecot_lets_through_is_taken(ctl, app_id):
    ctl("apps", "add", app_id, TOKEN)
    assert ctl.apps()[0][0] == app_id.lower()


def refuse_app_id(ctl, *arguments):
    message = ctl.refuses("apps", *arguments)
    assert "is not an app id: it takes 1 to 254 letters a-z, digits and . _ - @" in message
    assert message.count("\n") == 1
    assert "\x1b" not in message


@pytest.mark.parametrize(
    "app_id",
    ["", "my printer", "büro", "a/b", "a+b", "a\n", "a\x1b[2J", "\u212aa", "0" * 255],
    ids=["empty", "space", "umlaut", "slash", "plus", "newline", "escape", "kelvin sign", "255 characters"],
)
def test_app_id_that_dovecot_does_not_let_through_is_refused(ctl, app_id):
    refuse_app_id(ctl, "add", app_id, TOKEN)


@pytest.mark.parametrize(
    ("verb", "more"), [("allow", ["x@d1.test"]), ("disallow", ["x@d1.test"]), ("del", []), ("enable", []), ("disable", [])]
)
def test_app_id_that_cannot_be_is_refused_by_every_verb(filled, verb, more):
    refuse_app_id(filled, verb, "my printer", *more)


def test_apps_allow_lets_an_app_use_an_address_once(filled):
    assert (
        filled("apps", "allow", "Printer", "Shop@Bücher.test").stderr == "apps: printer may now send as shop@xn--bcher-kva.test\n"
    )
    assert (
        filled("apps", "allow", "printer", "shop@bücher.test").stderr
        == "apps: printer may send as shop@xn--bcher-kva.test already\n"
    )
    assert filled.senders() == [("printer", "scan@d1.test", 1), ("printer", "shop@xn--bcher-kva.test", 1)]


def test_apps_allow_null_sender_is_stored_as_the_empty_string(filled):
    assert filled("apps", "allow", "printer", "<>").stderr == "apps: printer may now send as <>\n"
    assert ("printer", "", 1) in filled.senders()
    assert "<>, scan@d1.test" in filled("apps", "list").stdout
    assert json.loads(filled("apps", "list", "--json").stdout)[0]["from_addr"] == ["", "scan@d1.test"]
    assert filled("apps", "disallow", "printer", "<>").stderr == "apps: printer may no longer send as <>\n"
    assert filled.senders() == [("printer", "scan@d1.test", 1)]


def test_apps_allow_of_a_disabled_row_enables_it(filled):
    with contextlib.closing(sqlite3.connect(filled.path)) as database, database:
        database.execute("UPDATE app_from SET enabled = 0")
    assert "may now send as scan@d1.test" in filled("apps", "allow", "printer", "scan@d1.test").stderr
    assert filled.senders() == [("printer", "scan@d1.test", 1)]


def test_apps_disallow_of_what_was_not_allowed_is_refused(filled):
    assert "was not allowed to send as bob@d1.test, apps list shows" in filled.refuses("apps", "disallow", "printer", "bob@d1.test")


@pytest.mark.parametrize("verb", ["allow", "disallow"])
def test_address_of_an_app_that_does_not_exist_is_refused(filled, verb):
    message = filled.refuses("apps", verb, "absent", "scan@d1.test")
    assert message == "mailcloakctl: apps: absent does not exist, apps add absent --generate makes it\n"


def test_apps_del_takes_its_addresses_with_it(filled):
    filled.insert("apps", "shop", "{SHA256}y")
    filled.insert("app_from", "shop", "shop@d1.test")
    assert filled("apps", "del", "printer").stderr == "apps: printer deleted\n"
    assert filled.apps() == [("shop", "{SHA256}y", 1)]
    assert filled.senders() == [("shop", "shop@d1.test", 1)]


# ---- what a person types and what is refused

BAD_ADDRESSES = {
    "empty": "",
    "no at": "info",
    "two at": "info@d1.test@d2.test",
    "catch-all": "@d1.test",
    "no domain": "info@",
    "space": "in fo@d1.test",
    "newline": "info@d1.test\n",
    "escape": "\x1b[2Jinfo@d1.test",
    "C1 control": "info\x85@d1.test",
    "null sender": "<>",
    "angle brackets": "<info@d1.test>",
    "over 254 characters": "i" * 247 + "@d1.test",
    "not UTF-8": "info\udcff@d1.test",
}


def refuse_address(ctl, *arguments):
    message = ctl.refuses(*arguments)
    assert re.fullmatch(r"mailcloakctl: '.*' is not an address for this: [^\n]+\n", message)
    assert "\x1b" not in message


@pytest.mark.parametrize("address", BAD_ADDRESSES.values(), ids=BAD_ADDRESSES)
def test_what_is_no_plain_address_is_refused(filled, address):
    refuse_address(filled, "aliases", "add", address, "alice")
    if address != "<>":
        refuse_address(filled, "apps", "allow", "printer", address)


@pytest.mark.parametrize(
    "before", [("aliases", "del"), ("aliases", "enable"), ("aliases", "disable"), ("apps", "disallow", "printer")], ids=" ".join
)
def test_what_is_no_plain_address_is_refused_by_every_verb(filled, before):
    refuse_address(filled, *before, "@d1.test")


@pytest.mark.parametrize(
    "username", ["", "  ", "al\nice", "alice\x7f", "a" * 255], ids=["empty", "blank", "newline", "delete", "255 characters"]
)
def test_username_that_cannot_be_is_refused(ctl, username):
    assert "username" in ctl.refuses("aliases", "add", "info@d1.test", username)


@pytest.mark.parametrize("token", ["", "a\tb", "a\x1bb", "a\x7fb"], ids=["empty", "tab", "escape", "delete"])
def test_token_that_cannot_be_is_refused(ctl, token):
    says = "mailcloakctl: a token cannot be empty or hold control characters, --generate makes a good one\n"
    assert ctl.refuses("apps", "add", "printer", token) == says
    assert ctl.refuses("apps", "add", "printer", "--token-stdin", input=token + "\n") == says


def test_token_that_is_not_utf8_is_refused(ctl):
    result = ctl("apps", "add", "printer", "--token-stdin", input=b"\xff\xfe" * 10 + b"\n", text=False, check=False)
    assert result.returncode == 1
    assert b"is not UTF-8" in result.stderr
    assert ctl.apps() == []


# ---- lists


def test_aliases_list_is_a_table(filled):
    filled.insert("aliases", "a-long-address@d1.test", "bob")
    filled("aliases", "disable", "info@d1.test")
    lines = filled("aliases", "list").stdout.splitlines()
    assert [re.split(r"  +", line)[:3] for line in lines] == [
        ["ALIAS EMAIL", "USERNAME", "ENABLED"],
        ["a-long-address@d1.test", "bob", "yes"],
        ["info@d1.test", "alice", "no"],
    ]
    assert len({line.index(word) for line, word in zip(lines, ("USERNAME", "bob", "alice"))}) == 1


def test_aliases_list_as_json_has_the_column_names(filled):
    (row,) = json.loads(filled("aliases", "list", "--json").stdout)
    assert abs(row.pop("updated_at") - time.time()) < 60
    names = {"username": "alice", "users": ["alice"], "external": []}
    assert row == {"alias_email": "info@d1.test", **names, "enabled": 1, "receive_only": False, "source": None}


def test_apps_list_shows_the_allowed_addresses_and_no_hash(filled):
    filled.insert("app_from", "printer", "fax@d1.test")
    filled.insert("apps", "shop", "{SHA256}y")
    table = filled("apps", "list").stdout
    lines = [re.split(r"  +", line) for line in table.splitlines()]
    assert [line[:4] + line[5:] for line in lines] == [
        ["APP ID", "STATE", "OWNER", "EXPIRES AT", "LAST USED", "CLIENT", "FROM ADDR"],
        ["printer", "enabled", "-", "never", "-", "-", "fax@d1.test, scan@d1.test"],
        ["shop", "enabled", "-", "never", "-", "-", "(none: may not send)"],
    ]
    shown = filled("apps", "list", "--json").stdout
    assert [set(row) for row in json.loads(shown)] == [
        {"app_id", "enabled", "state", "created_at", "owner", "expires_at", "last_used", "client", "from_addr"}
    ] * 2
    assert [row["from_addr"] for row in json.loads(shown)] == [["fax@d1.test", "scan@d1.test"], []]
    assert "SHA256" not in table + shown


# ---- owner and expiry


def app_row(ctl, app_id="printer"):
    (row,) = ctl.rows("SELECT owner, expires_at, secret_hash, enabled FROM apps WHERE app_id = ?", app_id)
    return row


def midnight_after(day):
    return int((datetime.datetime.fromisoformat(day) + datetime.timedelta(days=1)).timestamp())


def test_apps_add_takes_owner_and_expiry(ctl):
    said = ctl("apps", "add", "new", "--generate", "--owner", "Alice", "--expires", "2099-01-31").stderr
    assert app_row(ctl, "new")[:2] == ("alice", midnight_after("2099-01-31"))
    assert "apps: new counts only while alice is enabled in Keycloak" in said
    assert "apps: new expires at 2099-02-01 00:00" in said


def test_apps_set_changes_what_is_named_and_leaves_the_token_alone(filled):
    before = app_row(filled)
    filled("apps", "set", "printer", "--owner", "alice")
    assert app_row(filled) == ("alice", None, *before[2:])
    days = {(datetime.date.today() + datetime.timedelta(90)).isoformat()}
    filled("apps", "set", "Printer", "--expires", "90d")
    days.add((datetime.date.today() + datetime.timedelta(90)).isoformat())  # perhaps it is after midnight now
    owner, expires_at, *rest = app_row(filled)
    assert (owner, rest) == ("alice", list(before[2:]))
    assert expires_at in set(map(midnight_after, days))
    filled("apps", "set", "printer", "--expires", "never", "--owner", "")
    assert app_row(filled) == before


def test_apps_add_of_an_existing_app_keeps_owner_and_expiry(filled):
    filled("apps", "set", "printer", "--owner", "alice", "--expires", "2099-01-31")
    filled("apps", "add", "printer", "--generate", "--replace")
    assert app_row(filled)[:2] == ("alice", midnight_after("2099-01-31"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["set", "printer"], "nothing to set, name --owner, --expires or both"),
        (["set", "absent", "--owner", "alice"], "absent does not exist"),
        (["set", "printer", "--owner", "a\nb"], "it cannot be empty or hold control characters"),
        (
            ["set", "printer", "--expires", "soon"],
            "'soon' is not a date such as 2027-01-31, a number of days such as 90d, or never",
        ),
        (["set", "printer", "--expires", "0d"], "is not a date"),
        (["set", "printer", "--expires=-5d"], "is not a date"),  # Python 3.14 takes "-5d" behind a space as a value, too
        (["set", "printer", "--expires", "2027-02-30"], "is not a date"),
        (["set", "printer", "--expires", "2001-01-01"], "2001-01-01 is in the past; apps disable takes an app out of use at once"),
        (["set", "printer", "--expires", "9999-12-31"], "is not a date"),
        (["set", "printer", "--owner", "bob", "--expires", "soon"], "is not a date"),
        (["add", "printer", "--generate", "--expires", "soon"], "is not a date"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_owner_or_expiry_that_makes_no_sense_changes_nothing(filled, arguments, message):
    before = app_row(filled)
    result = filled("apps", *arguments, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert message in result.stderr
    assert app_row(filled) == before


def test_apps_list_shows_owner_expiry_and_state(filled):
    filled.insert("apps", "old", "x")
    filled.insert("apps", "off", "x")
    filled.rows("SELECT 1")
    with contextlib.closing(sqlite3.connect(filled.path)) as database, database:
        database.execute("UPDATE apps SET expires_at = 1700000000, owner = 'alice' WHERE app_id = 'old'")
        database.execute("UPDATE apps SET enabled = 0 WHERE app_id = 'off'")
    rows = json.loads(filled("apps", "list", "--json").stdout)
    assert {row["app_id"]: (row["state"], row["owner"], row["expires_at"]) for row in rows} == {
        "off": ("disabled", None, None),
        "old": ("expired", "alice", 1700000000),
        "printer": ("enabled", None, None),
    }
    assert re.search(r"^old +expired +alice +2023-11-1[45] ", filled("apps", "list").stdout, re.MULTILINE)


@pytest.mark.parametrize("noun", ["aliases", "apps"])
def test_list_of_nothing_is_empty(ctl, noun):
    assert ctl(noun, "list").stdout == ""
    assert json.loads(ctl(noun, "list", "--json").stdout) == []


def test_list_escapes_what_another_program_wrote(ctl):
    ctl.insert("aliases", "info@d1.test", "al\x1b[2j\nice")
    assert "al\\x1b[2j?ice" in ctl("aliases", "list").stdout
    assert json.loads(ctl("aliases", "list", "--json").stdout)[0]["username"] == "al\x1b[2j?ice"
    assert "al\\x1b[2j?ice" in ctl.refuses("aliases", "add", "info@d1.test", "bob")


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "json"])
def test_list_in_a_locale_without_the_characters_is_still_printed(ctl, options):
    ctl.insert("aliases", "jörg@d1.test", "jörg")
    result = ctl("aliases", "list", *options, env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert "rg@d1.test" in result.stdout
    if options:
        assert json.loads(result.stdout)[0]["username"] == "jörg"


@pytest.mark.parametrize("read_first", [0, 1], ids=["at once", "after a line"])
def test_list_into_a_closed_pipe_ends_quietly(ctl, read_first):
    with contextlib.closing(sqlite3.connect(ctl.path)) as database, database:
        rows = ((f"{number:050}@d1.test", "alice") for number in range(5000))  # far more than a pipe holds
        database.executemany("INSERT INTO aliases (alias_email, username) VALUES (?, ?)", rows)
    command = [sys.executable, str(ROOT / "mailcloakctl.py"), "--db", str(ctl.path), "aliases", "list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(read_first):
            assert process.stdout.readline().startswith("ALIAS EMAIL")
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(30) == 0


def test_list_that_cannot_be_written_fails(filled):
    with open("/dev/full", "w") as full:
        result = filled("aliases", "list", check=False, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 1
    assert result.stderr == "mailcloakctl: the list cannot be written: No space left on device, send it elsewhere\n"


def test_generated_token_that_cannot_be_shown_changes_nothing(filled):
    before = filled.apps()
    command = ("apps", "add", "printer", "--generate", "--replace")
    with open("/dev/full", "w") as full:
        result = filled(*command, check=False, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 1
    assert result.stderr.startswith("mailcloakctl: the token cannot be shown: No space left on device; nothing was changed")
    closed = ["sh", "-c", '"$@" >&-', "sh", sys.executable, ROOT / "mailcloakctl.py", "--db", filled.path, *command]
    result = subprocess.run(closed, stderr=subprocess.PIPE, text=True, check=False, timeout=30)
    assert result.returncode == 1
    assert result.stderr.startswith("mailcloakctl: the token cannot be shown: standard output is closed; nothing was changed")
    assert filled.apps() == before


# ---- the command line


@pytest.mark.parametrize(
    "arguments",
    [
        ("--json", "--db", "DB", "aliases", "list"),
        ("aliases", "--json", "--db", "DB", "list"),
        ("aliases", "list", "--json", "--db", "DB"),
        ("--db", "DB", "aliases", "list", "--json"),
        ("--json", "aliases", "--db=DB", "list"),
    ],
    ids=" ".join,
)
def test_options_count_before_and_after_the_verb(filled, arguments):
    result = run_ctl(*(argument.replace("DB", str(filled.path)) for argument in arguments))
    assert [row["alias_email"] for row in json.loads(result.stdout)] == ["info@d1.test"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("printer", TOKEN),
        ("--json", "printer", TOKEN),
        ("printer", "--json", TOKEN),
        ("printer", TOKEN, "--json"),
        ("printer", "--", TOKEN),
    ],
    ids=["alone", "option first", "option between", "option last", "after --"],
)
def test_token_counts_wherever_options_stand(ctl, arguments):
    ctl("apps", "add", *arguments)
    assert scram_is_right(ctl.apps()[0][1], TOKEN, 100_000)


USAGE_ERRORS = {
    "nothing": (),
    "no verb": ("aliases",),
    "unknown noun": ("users", "list"),
    "unknown verb": ("aliases", "rename"),
    "unknown option": ("aliases", "list", "--yaml"),
    "argument missing": ("aliases", "add", "info@d1.test"),
    "argument too many": ("aliases", "show", "info@d1.test", "alice"),
    "two forms of a list": ("aliases", "list", "--quiet", "--count"),
    "option of another verb": ("aliases", "del", "info@d1.test", "--force"),
    "option without value": ("aliases", "list", "--db"),
    "--config and --db": ("--config", "/no/such/file", "aliases", "list"),
    "--config and --db after": ("aliases", "list", "--config", "/no/such/file"),
    "TOKEN and --generate": ("apps", "add", "printer", TOKEN, "--generate"),
    "--generate and TOKEN": ("apps", "add", "printer", "--generate", TOKEN),
    "TOKEN and --token-stdin": ("apps", "add", "printer", TOKEN, "--token-stdin"),
    "--generate and --token-stdin": ("apps", "add", "printer", "--generate", "--token-stdin"),
    "two TOKENs": ("apps", "add", "printer", TOKEN, TOKEN),
    "unknown option and TOKEN": ("apps", "add", "printer", "--yaml", TOKEN),
}


@pytest.mark.parametrize("arguments", USAGE_ERRORS.values(), ids=USAGE_ERRORS)
def test_usage_error_exits_2_and_shows_no_token(filled, arguments):
    message = filled.refuses(*arguments, code=2)
    assert message.startswith("usage: mailcloakctl")
    assert TOKEN not in message


@pytest.mark.parametrize(
    "arguments",
    [
        ("aliases", "list"),
        ("aliases", "add", "bücher@d1.test", "Zoë"),
        ("aliases", "add", "info@d1.test", "bob"),
        ("apps", "add", "printer", "--token-stdin"),
        ("no", "such", "noun"),
        ("--version",),
    ],
    ids=" ".join,
)
def test_process_does_and_says_what_the_forks_of_the_other_tests_do(filled, arguments):
    command = ("--db", str(filled.path), *arguments)
    content = filled.path.read_bytes()
    expected = run_ctl_process(*command, input=TOKEN)
    assert "Traceback" not in expected.stderr
    filled.path.write_bytes(content)
    result = run_ctl_in_fork(*command, input=TOKEN)
    assert (result.returncode, result.stdout, result.stderr) == (expected.returncode, expected.stdout, expected.stderr)


def test_help_and_version_exit_0():
    assert run_ctl("--version").stdout == f"mailcloakctl {mailcloak.__version__}\n"
    assert "example: mailcloakctl apps allow printer" in run_ctl("apps", "allow", "--help").stdout


def test_closed_standard_streams_are_no_failure(filled):
    command = [sys.executable, str(ROOT / "mailcloakctl.py"), "--db", str(filled.path), "aliases", "add", "x@d1.test", "alice"]
    result = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], timeout=60, check=False)
    assert result.returncode == 0
    assert ("x@d1.test", "alice", 1) in filled.aliases()


def test_symlink_in_another_folder_works(ctl, tmp_path):
    (tmp_path / "bin").mkdir()
    link = tmp_path / "bin" / "mailcloakctl"
    link.symlink_to(ROOT / "mailcloakctl.py")
    command = [sys.executable, str(link), "--db", str(ctl.path), "aliases", "add", "info@d1.test", "alice"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}  # since Python 3.11: do not look beside the program by itself
    result = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert ctl.aliases() == [("info@d1.test", "alice", 1)]


def test_command_starts_without_the_modules_that_only_others_need(filled):
    """mailcloakctl is run in loops of scripts, and its start is most of its time."""
    program = """if True:
        import sys, mailcloakctl
        mailcloakctl.main(sys.argv[1:])
        mine = "mailcloakask mailcloakdata mailcloakdoctor mailcloakdovecot mailcloakfindings mailcloakmirror mailcloakpostfix"
        rare = mine + " difflib email getpass hashlib http idna requests ssl subprocess unicodedata urllib3"
        print(*(set(rare.split()) & set(sys.modules)), file=sys.stderr)"""
    command = [sys.executable, "-c", program, "--db", str(filled.path), "aliases", "list"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=ROOT)
    assert (result.stdout.count("info@d1.test"), result.stderr) == (1, "\n")


# ---- the prompt


def test_apps_add_on_a_terminal_asks_twice_without_echo(ctl):
    terminal = Terminal("--db", ctl.path, "apps", "add", "printer")
    terminal.expect("token of printer: ")
    terminal.type(TOKEN + "\n")
    terminal.expect("again: ")
    terminal.type(TOKEN + "\n")
    assert terminal.end()[0] == 0
    assert "apps: printer added" in terminal.output
    assert TOKEN not in terminal.output
    assert scram_is_right(ctl.apps()[0][1], TOKEN, 100_000)


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (TOKEN + "\n", TOKEN + "x\n", "the two tokens differ, try again or use --generate"),
        ("\n", "\n", "a token cannot be empty"),
        ("\x04", None, "no token: type it twice, or use --generate"),
        ("\x03", None, "interrupted, no alias or app was changed"),
    ],
    ids=["mismatch", "empty", "end of file", "interrupt"],
)
def test_apps_add_on_a_terminal_without_two_equal_tokens_is_refused(filled, first, second, says):
    before = filled.path.read_bytes()
    terminal = Terminal("--db", filled.path, "apps", "add", "printer")
    terminal.expect("token of printer: ")
    terminal.type(first)
    if second:
        terminal.expect("again: ")
        terminal.type(second)
    assert terminal.end()[0] == 1
    assert says in terminal.output
    assert "Traceback" not in terminal.output
    assert TOKEN not in terminal.output
    assert filled.path.read_bytes() == before


# ---- the database file


@pytest.mark.parametrize("umask", [0, 0o077], ids=["open umask", "closed umask"])
@pytest.mark.parametrize(
    "arguments", [("aliases", "add", "info@d1.test", "alice"), ("apps", "add", "printer", TOKEN)], ids=["alias", "app"]
)
def test_database_that_is_missing_is_created_by_add_which_says_so(missing, arguments, umask):
    old = os.umask(umask)
    try:
        result = missing(*arguments)
    finally:
        os.umask(old)
    assert f"database {missing.path} created\n" in result.stderr
    assert missing.path.stat().st_mode & 0o7777 == 0o640
    assert missing.rows("PRAGMA user_version") == [(mailcloak.SCHEMA_VERSION,)]
    assert missing.rows("PRAGMA journal_mode") == [("delete",)]
    assert len(missing.aliases()) + len(missing.apps()) == 1
    assert "created" not in missing(*arguments).stderr


@pytest.mark.real("root")
def test_database_that_root_creates_belongs_to_the_owner_of_its_directory(missing, short_dir):
    owner, group = pwd.getpwnam("nobody").pw_uid, grp.getgrnam("daemon").gr_gid
    os.chown(short_dir, owner, group)
    short_dir.chmod(0o2750)
    missing.path = short_dir / "state.db"
    missing("aliases", "add", "info@d1.test", "alice")
    status = missing.path.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (owner, group, 0o640)


@pytest.mark.real("root")
def test_database_in_a_directory_that_its_owner_cannot_reach_is_not_created(missing, short_dir):
    directory = short_dir / "state"
    directory.mkdir()
    os.chown(directory, pwd.getpwnam("nobody").pw_uid, -1)
    short_dir.chmod(0o700)
    missing.path = directory / "state.db"
    result = missing("aliases", "add", "info@d1.test", "alice", check=False)
    said = "cannot be created: Permission denied, as user 'nobody'; let this user enter each directory above "
    assert (result.returncode, f"{said}{str(directory)!r}" in result.stderr) == (1, True)


@pytest.mark.real("root")
def test_database_in_a_directory_of_another_user_is_for_that_user_to_create(short_dir):
    def add():
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            mailcloakctl.main(["--db", str(short_dir / "state.db"), "aliases", "add", "x@d1.test", "alice"])
        return said.getvalue()

    outcome = as_nobody(add)
    assert (
        "cannot be created: Permission denied, as user 'nobody'; run mailcloakctl as user root, who owns this database" in outcome
    )
    assert "chown" not in outcome


def test_owner_group_and_mode_of_an_existing_database_stay(filled):
    if AS_ROOT:
        os.chown(filled.path, pwd.getpwnam("nobody").pw_uid, grp.getgrnam("daemon").gr_gid)
    filled.path.chmod(0o604)
    before = filled.path.stat()
    filled("aliases", "add", "sales@d1.test", "alice")
    filled("apps", "del", "printer")
    after = filled.path.stat()
    assert (after.st_uid, after.st_gid, after.st_mode, after.st_ino) == (
        before.st_uid,
        before.st_gid,
        before.st_mode,
        before.st_ino,
    )
    assert os.listdir(filled.path.parent) == ["state.db"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("aliases", "list"),
        ("aliases", "del", "x@d1.test"),
        ("apps", "list"),
        ("apps", "allow", "printer", "x@d1.test"),
        ("apps", "enable", "printer"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_database_that_is_missing_is_not_created_by_other_verbs(missing, arguments):
    assert missing.refuses(*arguments) == (
        f"mailcloakctl: database '{missing.path}' does not exist yet, aliases add and apps add create it; --db names another\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("aliases", "add", "info", "alice"),
        ("aliases", "add", "info@d1.test", ""),
        ("apps", "add", "my printer", TOKEN),
        ("apps", "add", "printer", ""),
    ],
    ids=["address", "username", "app id", "token"],
)
def test_database_that_is_missing_is_not_created_by_a_refused_add(missing, arguments):
    missing.refuses(*arguments)
    assert not missing.path.exists()


def test_directory_that_is_missing_is_named(tmp_path):
    result = run_ctl("--db", tmp_path / "absent" / "state.db", "aliases", "add", "info@d1.test", "alice", check=False)
    assert result.returncode == 1
    assert result.stderr == (
        f"mailcloakctl: sqlite.path: directory '{tmp_path / 'absent'}' does not exist, create it for the user that runs mailcloak\n"
    )


@pytest.mark.parametrize("arguments", [("aliases", "list"), ("aliases", "add", "x@d1.test", "alice")], ids=" ".join)
def test_database_of_a_newer_version_is_refused(filled, arguments):
    with contextlib.closing(sqlite3.connect(filled.path)) as database:
        database.execute("PRAGMA user_version = 4711")
    message = filled.refuses(*arguments)
    assert f"has schema version 4711, this mailcloak knows {mailcloak.SCHEMA_VERSION}: install a newer one" in message


def test_file_that_is_no_database_is_refused_and_left_alone(missing):
    missing.path.write_bytes(b"not a database, but a letter to my aunt\n" * 30)
    message = missing.refuses("aliases", "add", "info@d1.test", "alice")
    assert "file is not a database; name the right one with --db or sqlite.path" in message


def test_directory_in_place_of_the_database_is_refused(tmp_path):
    result = run_ctl("--db", tmp_path, "aliases", "list", check=False)
    assert result.returncode == 1
    assert "this is a directory, name the file in it with --db or sqlite.path" in result.stderr


def test_database_that_may_not_be_written_is_refused_with_its_owner(short_dir):
    ctl = Ctl(short_dir / "state.db")
    ctl("aliases", "add", "info@d1.test", "alice")
    ctl.path.chmod(0o444)
    before = ctl.aliases()

    def add():
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = mailcloakctl.main(["--db", str(ctl.path), "aliases", "add", "x@d1.test", "alice"])
        return f"{code} {said.getvalue()}"

    outcome = as_nobody(add)
    assert outcome.startswith("1 ")
    assert f"run mailcloakctl as user {pwd.getpwuid(os.geteuid()).pw_name}" in outcome
    assert ctl.aliases() == before


def start_add(ctl, number):
    command = [
        sys.executable,
        str(ROOT / "mailcloakctl.py"),
        "--db",
        str(ctl.path),
        "aliases",
        "add",
        f"a{number}@d1.test",
        "alice",
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_writers_at_once_all_succeed_also_where_they_create_the_database(missing):
    writers = [start_add(missing, number) for number in range(8)]
    errors = [writer.communicate(timeout=60)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 8, errors
    assert sum("created" in error for error in errors) == 1
    assert len(missing.aliases()) == 8


def test_writer_waits_for_another_that_is_in_the_middle(filled):
    with contextlib.closing(sqlite3.connect(filled.path, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        database.execute("INSERT INTO aliases (alias_email, username) VALUES ('first@d1.test', 'alice')")
        writer = start_add(filled, 2)
        wait_until(lambda: has_open(writer.pid, filled.path), what="second writer at the database")
        assert writer.poll() is None
        database.execute("COMMIT")
    assert writer.communicate(timeout=60)[1] == "aliases: a2@d1.test leads to alice\n"
    assert [row[0] for row in filled.aliases()] == ["a2@d1.test", "first@d1.test", "info@d1.test"]


def has_open(pid, path):
    directory = f"/proc/{pid}/fd"
    links = []
    for name in os.listdir(directory):
        with contextlib.suppress(OSError):  # closed meanwhile
            links.append(os.readlink(f"{directory}/{name}"))
    return str(path) in links


def test_change_is_written_so_that_no_power_failure_brings_the_journal_back(tmp_path):
    """Source: SQLite, PRAGMA synchronous: only EXTRA, 3, syncs the directory after the journal was deleted."""
    mailcloak.prepare_database(str(tmp_path / "state.db"), 5)
    database = mailcloakcommon.open_database(str(tmp_path / "state.db"), create=False)
    with contextlib.closing(database), mailcloakcommon.transaction(database):
        assert database.execute("PRAGMA synchronous").fetchone()[0] == 3


ORIGINS = {  # role, writer, host, epoch, serial, published_at, digest, file
    "nothing of a follower": ("follower", *[None] * 7),
    "nothing of a writer": ("writer", *[None] * 7),
    "another role": ("king", "w", "h", 1, 1, 1, "d", "/x"),
    "no next epoch": ("follower", "w", "h", 2**63 - 1, 1, 1, "d", "/x"),
    "time before time": ("follower", "w", "h", 1, 1, -1, "d", "/x"),
}


@pytest.mark.parametrize("origin", ORIGINS.values(), ids=ORIGINS)
def test_origin_that_makes_no_sense_is_said_and_ends_no_status(tmp_path, make_config, origin):
    config = make_config(static_users={"alice": "alice@d1.test"})
    database, path, metrics = config["sqlite"]["path"], tmp_path / "config.yaml", tmp_path / "mailcloak.prom"
    path.write_text(yaml.safe_dump(config))
    mailcloak.prepare_database(database, 5)
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("CREATE TABLE origin (role, writer, host, epoch, serial, published_at, digest, file)")
        connection.execute("INSERT INTO origin VALUES (?, ?, ?, ?, ?, ?, ?, ?)", origin)
    result = run_ctl("--config", path, "status", "--prometheus", metrics, check=False)
    assert "Traceback" not in result.stderr
    assert "mailcloak_up 0.0" in metrics.read_text(encoding="utf-8")
    for arguments in (
        ("--db", database, "db", "promote"),
        ("--db", tmp_path / "shared.db", "db", "mirror", database, "--publish"),
    ):
        result = run_ctl(*arguments, check=False)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert "its origin makes no sense" in result.stderr


def test_view_without_an_end_in_place_of_the_origin_counts_as_none(tmp_path):
    database = tmp_path / "state.db"
    mailcloak.prepare_database(str(database), 5)
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        endless = "WITH RECURSIVE x(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM x) SELECT count(*) FROM x"
        others = ", ".join(f"1 {name}" for name in mailcloakcommon.Origin._fields[1:])
        connection.execute(f"CREATE VIEW origin AS SELECT ({endless}) role, {others}")
    run_ctl("--db", database, "aliases", "add", "info@d1.test", "alice", timeout=20)


# ---- the configuration


@pytest.fixture
def config(ctl, tmp_path):
    """Write a configuration that names the database; gives its path."""

    def config(text):
        path = tmp_path / "config.yaml"
        path.write_text(text.replace("DB", str(ctl.path)), encoding="utf-8")
        return path

    return config


@pytest.mark.parametrize("glob", ["alice", "ALICE"])
def test_list_of_a_username_in_place_of_a_pattern_names_the_option(filled, glob):
    result = filled("aliases", "list", glob)
    assert result.stdout == ""
    assert result.stderr == f"warning: {glob} is like no address; aliases list --user {glob} shows the aliases of this user\n"
    for other in ("nobody", "alice@*", "*alice"):
        assert filled("aliases", "list", other).stderr == ""


def test_config_names_the_database(ctl, config):
    path = config("policy: {domain: d1.test}\nsqlite: {path: DB}\n")
    result = run_ctl("--config", path, "aliases", "add", "info@d1.test", "alice")
    assert result.stderr == (
        "warning: info@d1.test and its users were not looked up in Keycloak: no configuration names the daemon's sockets\n"
        "aliases: info@d1.test leads to alice\n"
    )
    assert run_ctl("aliases", "list", "--config", path).stdout.splitlines()[1].startswith("info@d1.test")
    assert ctl.aliases() == [("info@d1.test", "alice", 1)]


def test_app_is_allowed_an_address_outside_policy_domain_with_a_warning(filled, config):
    path = config("policy: {domain: d1.test}\nsqlite: {path: DB}\n")
    for address, warned in (("scan@other.test", True), ("scan@d1.test", False), ("<>", False)):
        said = run_ctl("--config", path, "apps", "allow", "printer", address).stderr
        assert ("is not in policy.domain (d1.test), and the app may use it all the same\n" in said) == warned


def test_alias_outside_policy_domain_is_added_with_a_warning(ctl, config):
    path = config("policy: {domain: [d1.test, bücher.test]}\nsqlite: {path: DB}\n")
    result = run_ctl("--config", path, "aliases", "add", "info@other.test", "alice")
    assert "warning: info@other.test is not in policy.domain (d1.test, xn--bcher-kva.test), so it leads nowhere\n" in result.stderr
    assert "policy.domain" not in run_ctl("--config", path, "aliases", "add", "info@bücher.test", "alice").stderr
    assert len(ctl.aliases()) == 2


@pytest.mark.parametrize("username", ["anne-marie", "alice+x", "anne-marie@d1.test"])
def test_username_that_dovecot_would_cut_is_refused(ctl, config, username):
    path = config("policy: {domain: d1.test, recipient_delimiter: +-}\nsqlite: {path: DB}\n")
    result = run_ctl("--config", path, "aliases", "add", "info@d1.test", username, check=False)
    assert result.returncode == 1
    assert f"aliases: {username} holds a character of policy.recipient_delimiter (+-)" in result.stderr
    assert ctl.aliases() == []
    assert run_ctl("--config", path, "aliases", "add", "info@d1.test", "anne.marie").returncode == 0


def test_alias_of_an_alias_is_added_where_mailbox_domain_makes_chains_impossible(ctl, config):
    path = config("policy: {domain: d1.test, mailbox_domain: mailbox.internal}\nsqlite: {path: DB}\n")
    ctl.insert("aliases", "info@d1.test", "bob")
    run_ctl("--config", path, "aliases", "add", "bob@d1.test", "carol")
    assert ("bob@d1.test", "carol", 1) in ctl.aliases()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sqlite: {path: state.db}\n", "config: sqlite.path: expected an absolute path, got 'state.db'"),
        ("sqlite: {pth: DB}\n", "config: sqlite.pth: unknown key; did you mean 'path'?"),
        ("sqlite: [\n", "line 2: "),
    ],
    ids=["relative path", "misspelled key", "not YAML"],
)
def test_config_that_cannot_name_the_database_is_refused(ctl, config, text, says):
    path = config(text)
    result = run_ctl("--config", path, "aliases", "list", check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert says in result.stderr
    assert "name the database with --db, or run this as root" in result.stderr


def test_config_that_is_missing_is_refused(tmp_path):
    result = run_ctl("--config", tmp_path / "absent.yaml", "aliases", "list", check=False)
    assert result.returncode == 1
    assert result.stderr.startswith(f"config: {tmp_path / 'absent.yaml'}: cannot be read: No such file or directory\n")


def test_db_option_does_without_the_configuration(filled):
    assert "info@d1.test" in filled("aliases", "list").stdout


@pytest.mark.parametrize("option", ["--db", "--config"])
def test_option_that_is_empty_is_a_usage_error(option):
    result = run_ctl(option, "", "aliases", "list", check=False)
    assert result.returncode == 2
    assert "it must name a file" in result.stderr


@pytest.mark.parametrize(
    ("disk", "way_out"),
    [
        (SimpleNamespace(f_flag=os.ST_RDONLY, f_favail=9), "mounted read-only, mount it for writing"),
        (SimpleNamespace(f_flag=0, f_favail=0), "make room on its disk"),
        (PermissionError(13, "Permission denied"), "or restore this one from a backup"),
    ],
    ids=["read-only", "no-inodes", "not-to-be-entered"],
)
def test_way_out_of_an_error_fits_the_disk(tmp_path, monkeypatch, disk, way_out):
    def statvfs(path):
        if isinstance(disk, OSError):
            raise disk
        return disk

    monkeypatch.setattr(os, "statvfs", statvfs)
    (tmp_path / "state.db").touch()
    assert way_out in mailcloakcommon.database_remedy(sqlite3.OperationalError("disk I/O error"), str(tmp_path / "state.db"))


def test_app_is_allowed_no_whole_domain(filled):
    assert "would stand for a whole domain" in filled.refuses("apps", "allow", "printer", "*@d1.test")


def test_alias_of_an_alias_by_its_address_is_refused_with_a_mailbox_domain_too(ctl, tmp_path):
    config = tmp_path / "config.yaml"
    policy = {"domain": "d1.test", "mailbox_domain": "mbx.test"}
    config.write_text(yaml.safe_dump({"policy": policy, "sqlite": {"path": str(ctl.path)}}), encoding="utf-8")

    def add(*words):
        return run_ctl("--config", config, "aliases", "add", *words, check=False)

    assert add("info@d1.test", "bob").returncode == 0
    assert "which is itself an alias and leads to bob" in add("x@d1.test", "info@d1.test").stderr
    assert add("y@d1.test", "carol@d1.test").returncode == 0
    assert "this alias would carry that mail on to dora" in add("carol@d1.test", "dora").stderr
    assert add("bob@d1.test", "dora").returncode == 0  # bob's mailbox is in mbx.test
