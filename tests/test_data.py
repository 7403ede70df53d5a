"""Aliases as files: formats, what is compared and written, what is refused, and that a kill leaves the old state or the new."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, run_ctl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_mailcloakctl import Ctl

import mailcloak
import mailcloakcommon
import mailcloakctl
import mailcloakdata
from mailcloakdata import Change, Row

FORMATS = ("csv", "jsonl", "virtual", "postfixadmin")


@pytest.fixture
def ctl(tmp_path):
    """The command on an empty database."""
    path = tmp_path / "state.db"
    assert mailcloak.prepare_database(str(path), 5)
    return Ctl(path)


@pytest.fixture
def filled(ctl):
    """The command on a database with 30 aliases, a00@d1.test to a29@d1.test, of user0 to user2."""
    fill(ctl, [(f"a{number:02}@d1.test", f"user{number % 3}") for number in range(30)])
    return ctl


def fill(ctl, rows):
    with contextlib.closing(sqlite3.connect(ctl.path)) as database, database:
        database.executemany("INSERT INTO aliases (alias_email, username) VALUES (?, ?)", rows)


def write(ctl, text, name="aliases.csv"):
    path = ctl.path.parent / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def csv_of(rows):
    return "".join(f"{','.join(map(str, row))}\n" for row in rows)


# ---- decisions


names = st.text("abc", min_size=1, max_size=2)
targets = st.builds(
    lambda users, external: mailcloakdata.join_targets(users, external),
    st.lists(names, min_size=1, max_size=3),
    st.lists(names.map("{}@e.test".format), max_size=2),
)
states = st.tuples(targets, st.integers(0, 1), st.integers(0, 1), st.sampled_from(["", "hr", "shop"]))
tables = st.dictionaries(names, states, max_size=8)


def rows_of(table):
    return [Row(address, *table[address]) for address in sorted(table)]


def store(database, rows):
    """As mailcloakctl stores them."""
    aliases = [(address, mailcloak.read_alias(*state[:3]), state[3] or None) for address, *state in rows]
    mailcloakcommon.store_aliases(database, [mailcloakcommon.Stored(*alias) for alias in aliases])


@given(tables, tables, st.sampled_from(["delete", "disable", "keep"]), st.sampled_from(["", "hr"]))
def test_plan_then_apply_gives_what_is_wanted(stored, wanted, missing, source):
    wanted = {address: (*state[:3], source) for address, state in wanted.items()}
    shown = {address: (*state[:3], state[3] if source else "") for address, state in stored.items()}
    changes = list(mailcloakdata.plan(rows_of(shown), rows_of(wanted), missing, source))
    expected = {address: state for address, state in stored.items() if source and state[3] != source}
    if missing != "delete":
        disabled = {address: (state[0], 0, *state[2:]) for address, state in stored.items()}
        expected = {**(disabled if missing == "disable" else stored), **expected}
    expected.update({address: (*state[:3], source or stored.get(address, ("",))[-1]) for address, state in wanted.items()})
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
        database.executescript(mailcloak.SCHEMA + "PRAGMA foreign_keys = ON;")
        store(database, rows_of(stored))
        mailcloakdata.apply(database, changes)
        assert list(mailcloakdata.stored_rows(database, source="any")) == rows_of(expected)
        assert database.execute("PRAGMA foreign_key_check").fetchall() == []
    for change in changes:  # each says what was there, and no row is touched that does not differ
        old = shown.get(change.address, (None,) * 4)
        assert change[1:5] == old
        assert change[1:5] != change[5:]
    assert [change.address for change in changes] == sorted({change.address for change in changes})


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        (None, ("0x", 0, 0, ""), "add"),
        (("0x", 1, 0, ""), None, "delete"),
        (("0x", 1, 0, ""), ("0y", 0, 0, ""), "change"),
        (("0x", 1, 0, ""), ("0x\n0y", 1, 0, ""), "change"),
        (("0x", 1, 0, ""), ("0x", 1, 1, ""), "change"),
        (("0x", 0, 0, ""), ("0x", 1, 0, ""), "enable"),
        (("0x", 1, 0, ""), ("0x", 0, 0, ""), "disable"),
        (("0x", 1, 0, "shop"), ("0x", 1, 0, "hr"), "claim"),
    ],
)
def test_change_has_its_kind(old, new, kind):
    assert Change("a", *(old or mailcloakdata.NOTHING), *(new or mailcloakdata.NOTHING)).kind == kind


@pytest.mark.parametrize(
    ("counts", "stored", "wanted", "is_over"),
    [
        ({"delete": 21}, 100, 79, True),
        ({"delete": 20}, 100, 80, False),
        ({"change": 11, "disable": 10}, 100, 100, True),
        ({"add": 1000}, 100, 1100, False),
        ({"delete": 20}, 20, 1, False),
        ({"delete": 5}, 5, 0, True),
        ({}, 0, 0, False),
    ],
)
def test_limit_counts_what_changes_or_goes(counts, stored, wanted, is_over):
    assert mailcloakdata.is_over_limit(counts, stored, wanted, 20) == is_over


def test_address_twice_is_reported_unless_both_lines_say_the_same():
    reports = []
    rows = [("a", "0x", 1, 0, 3), ("a", "0x", 1, 0, 5), ("a", "0y", 1, 0, 6), ("a", "0x", 0, 0, 7), ("b", "0x", 1, 0, 1)]
    found = list(mailcloakdata.take_once(rows, lambda *report: reports.append(report), "hr"))
    assert found == [("a", "0x", 1, 0, "hr"), ("b", "0x", 1, 0, "hr")]
    assert reports == [
        (6, "a leads to another user in line 3; all targets of an alias stand in one line"),
        (7, "a has another state in line 3; all targets of an alias stand in one line"),
    ]


# ---- formats


def line(address, users, external="", enabled=1, receive_only=None):
    return mailcloakdata.Line(address, users.split(), external.split() if external else [], enabled, receive_only)


ALICE = line("info@d1.test", "alice")
BOTH = line("info@d1.test", "alice bob", "jo@elsewhere.test")
READ = {
    "csv": ("csv", "info@d1.test,alice", ALICE),
    "csv, disabled": ("csv", "info@d1.test,alice,0", line("info@d1.test", "alice", enabled=0)),
    "csv, in words": ("csv", "info@d1.test , alice , No", line("info@d1.test", "alice", enabled=0)),
    "csv, quoted": ("csv", '"info@d1.test","al""ice"', line("info@d1.test", 'al"ice')),
    "csv, empty line": ("csv", "  ", None),
    "csv, several": ("csv", "info@d1.test,alice; bob;<jo@elsewhere.test>", BOTH),
    "jsonl": ("jsonl", '{"alias": "info@d1.test", "username": "alice"}', ALICE),
    "jsonl, disabled": (
        "jsonl",
        '{"username": "alice", "enabled": false, "alias": "i@d1.test"}',
        line("i@d1.test", "alice", enabled=0),
    ),
    "jsonl, several": (
        "jsonl",
        '{"alias": "info@d1.test", "users": ["alice", "bob"], "external": ["jo@elsewhere.test"], "receive_only": true}',
        BOTH._replace(receive_only=1),
    ),
    "virtual": ("virtual", "info@d1.test\t alice@d1.test", ALICE),
    "virtual, domain in capitals": ("virtual", "info@d1.test alice@D1.Test", ALICE),
    "virtual, U-label": ("virtual", "info@bücher.test alice@xn--bcher-kva.test", line("info@bücher.test", "alice")),
    "virtual, quoted": ("virtual", 'info@d1.test "al;ice"@d1.test', line("info@d1.test", "al;ice")),
    "virtual, comment": ("virtual", "# info@d1.test alice@d1.test", None),
    "virtual, several": ("virtual", "info@d1.test alice@d1.test, bob@d1.test,\tjo@elsewhere.test", BOTH),
    "postfixadmin": ("postfixadmin", "info@d1.test,alice@d1.test,1", ALICE),
    "postfixadmin, not active": ("postfixadmin", "info@d1.test,alice@d1.test,NO", line("info@d1.test", "alice", enabled=0)),
    "postfixadmin, several": ("postfixadmin", 'info@d1.test,"alice@d1.test,jo@elsewhere.test,bob@d1.test",1', BOTH),
}


@pytest.mark.parametrize(("name", "text", "fields"), READ.values(), ids=READ)
def test_line_is_read(name, text, fields):
    assert mailcloakdata.FORMATS[name]("local").read(text) == fields


BAD = {
    "csv, one field": ("csv", "info@d1.test", "it has 1 field, expected 2 or 3;"),
    "csv, second user": ("csv", "info@d1.test,alice,bob", "it says 'bob' where 1 or 0"),
    "csv, third user": ("csv", "info@d1.test,alice,bob,carol", "it has 4 fields"),
    "csv, quote not closed": ("csv", 'info@d1.test,"alice', "it is not CSV"),
    "jsonl, no JSON": ("jsonl", '{"alias": ', "it is not JSON"),
    "jsonl, deep": ("jsonl", "[" * 60_000, "it is not JSON"),
    "jsonl, list": ("jsonl", "[]", "it is not an object"),
    "jsonl, other key": ("jsonl", '{"alias": "a@d1.test", "username": "x", "team": 1}', "it has 'team'"),
    "jsonl, users is a text": ("jsonl", '{"alias": "a@d1.test", "users": "x"}', "as lists of texts"),
    "jsonl, username is a list": ("jsonl", '{"alias": "a@d1.test", "username": ["x", "y"]}', "as lists of texts"),
    "jsonl, username and users": ("jsonl", '{"alias": "a@d1.test", "username": "x", "users": ["y"]}', "as lists of texts"),
    "jsonl, no alias": ("jsonl", '{"users": ["x"]}', "alias must be a text"),
    "jsonl, enabled is text": ("jsonl", '{"alias": "a@d1.test", "username": "x", "enabled": "no"}', "true or false"),
    "virtual, no target": ("virtual", "info@d1.test", "it has no target"),
    "virtual, only commas": ("virtual", "info@d1.test , ,", "it has no target"),
    "virtual, no domain": ("virtual", "info@d1.test alice", "has no domain"),
}


@pytest.mark.parametrize(("name", "text", "reason"), BAD.values(), ids=BAD)
def test_bad_line_has_its_reason(name, text, reason):
    with pytest.raises(ValueError, match=reason.replace("(", r"\(")):
        mailcloakdata.FORMATS[name]("local").read(text)


def test_usernames_that_are_addresses_are_whole_targets():
    form = mailcloakdata.Virtual("address")
    assert form.read("info@d1.test alice@elsewhere.example") == line("info@d1.test", "alice@elsewhere.example")
    assert form.write(Row("info@d1.test", "0alice@d1.test", 1, 0, "")) == "info@d1.test alice@d1.test\n"


def test_line_of_virtual_goes_on_in_lines_that_begin_with_a_space():
    text = ["info@d1.test", "# of the shop", "", "  alice@d1.test", "sales@d1.test bob@d1.test"]
    joined = list(mailcloakdata.Virtual("local").join(enumerate(text, 1)))
    assert joined == [(1, "info@d1.test  alice@d1.test"), (5, "sales@d1.test bob@d1.test")]


def test_first_line_of_virtual_that_begins_with_a_space_has_its_number(ctl):
    result = ctl("aliases", "import", write(ctl, "# of the shop\n  info@d1.test alice\n"), "--format", "virtual", check=False)
    assert "line 2: its target 'alice' has no domain" in result.stderr


def test_csv_of_postfixadmin_is_read_as_it_exports_it(ctl):
    """A mark of byte order, an empty line, columns in English and more of them than are needed."""
    text = '\ufeff\nAlias,To,"Last modified",Active\ninfo@d1.test,alice@d1.test,"2026-01-01 10:00:00",1\nsales@d1.test,bob@d1.test,-,0\n'
    ctl("aliases", "sync", write(ctl, text), "--format", "postfixadmin")
    assert ctl.aliases() == [("info@d1.test", "alice", 1), ("sales@d1.test", "bob", 0)]


def test_csv_with_a_header_has_its_columns_in_any_order(ctl):
    ctl("aliases", "import", write(ctl, "enabled,Username,alias\r\n0,alice,info@d1.test\r\n"))
    assert ctl.aliases() == [("info@d1.test", "alice", 0)]


@pytest.mark.parametrize("header", ["alias,enabled", "alias,username,team", "alias,username,username", "name"])
def test_csv_with_other_columns_is_refused(ctl, header):
    message = ctl.refuses("aliases", "import", write(ctl, header + "\na@d1.test,alice,1\n"))
    assert "its first line names the columns" in message
    assert "expected alias,username,enabled" in message


# ---- export and sync on another host

local_parts = st.from_regex(r"[a-zäß0-9!#$%&'*+/=?^_`{|}~-]{1,6}(\.[a-z0-9]{1,3})?", fullmatch=True)
usernames = st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0x17F, exclude_characters="@,;\x7f\xa0\xad"), min_size=1, max_size=8
)


elsewhere = st.lists(st.sampled_from(["jo@elsewhere.test", "al+x@elsewhere.test"]), max_size=2)


def storable(address, users, external):
    """Address and targets as aliases add stores them; None where it refuses them."""
    context = SimpleNamespace(policy=None)
    with contextlib.suppress(mailcloakcommon.Refused):
        row = mailcloakdata.check_names(context, mailcloakdata.Line(address, users, external))
        again = mailcloakdata.check_names(context, mailcloakdata.Line(row[0], *mailcloakdata.split_targets(row[1])))
        return row if again == row else None


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            local_parts,
            st.sampled_from(["d1.test", "bücher.test"]),
            st.lists(usernames, max_size=3),
            elsewhere,
            st.integers(0, 1),
            st.integers(0, 1),
        ),
        max_size=8,
    ),
    st.data(),
)
@pytest.mark.long
@pytest.mark.parametrize("name", FORMATS)
def test_export_and_sync_on_another_host_give_equal_tables(tmp_path, name, aliases, data):
    whole = data.draw(st.booleans()) if name in ("virtual", "postfixadmin") else False
    stored = {}
    for local_part, domain, users, external, enabled, receive_only in aliases:
        row = storable(f"{local_part}@{domain}", [f"{user}@d9.test" if whole else user for user in users], external)
        if row:
            stored[row[0]] = (row[1], enabled, receive_only, "")
    here, there = (Ctl(tmp_path / f"{place}.db") for place in ("here", "there"))
    for each in (here, there):
        each.path.unlink(missing_ok=True)
        mailcloak.prepare_database(str(each.path), 5)
    with contextlib.closing(sqlite3.connect(here.path)) as database, database:
        store(database, rows_of(stored))
    form = ("--format", name, "--usernames", "address" if whole else "local")
    force = ("--force", "--external")  # an alias of an alias is made by force here, and there
    # what a format cannot hold is named, and nothing else is left out
    exported = here("aliases", "export", *form, "--skip-bad")
    unholdable = {line.split()[1] for line in exported.stderr.splitlines() if "cannot be in this file" in line}
    for address in unholdable:
        targets, enabled, receive_only, _ = stored[address]
        is_bare = name == "virtual" and (address.startswith("#") or not enabled)
        assert is_bare or (name in ("virtual", "postfixadmin") and (receive_only or (whole and "\n1" in f"\n{targets}")))
    there("aliases", "sync", "-", *form, *force, input=exported.stdout)
    expected = [row for row in rows_of(stored) if row.address not in unholdable]
    with contextlib.closing(sqlite3.connect(there.path)) as database:
        assert list(mailcloakdata.stored_rows(database)) == expected
    again = there("aliases", "sync", "-", *form, *force, input=exported.stdout)
    assert f"nothing to change, {len(expected)} unchanged" in again.stdout


def test_export_to_a_format_that_cannot_hold_an_alias_is_refused_naming_each(ctl):
    fill(ctl, [("info@d1.test", "alice"), ("sales@d1.test", "bob"), ("x@d1.test", "carol@d1.test")])
    ctl("aliases", "disable", "sales@d1.test")
    path = ctl.path.parent / "aliases.virtual"
    message = ctl.refuses("aliases", "export", path)
    assert "sales@d1.test cannot be in this file: it is disabled" in message
    assert "x@d1.test cannot be in this file: its username 'carol@d1.test' needs --usernames address" in message
    assert "2 cannot be in this file, nothing was written" in message
    assert not path.exists()
    ctl("aliases", "export", path, "--skip-bad")
    assert path.read_text() == "info@d1.test alice@d1.test\n"


def test_export_replaces_the_file_as_a_whole(filled):
    path = write(filled, "old\n")
    filled("aliases", "export", path)
    assert path.read_text() == "alias,username,enabled\n" + csv_of(filled.aliases())
    assert [each.name for each in path.parent.iterdir() if each.name.startswith(".mailcloak")] == []
    assert "cannot be written: No such file" in filled.refuses("aliases", "export", path.parent / "absent" / "aliases.csv")


def test_export_keeps_no_lock_while_its_reader_waits(ctl):
    fill(ctl, [(f"a{number}@d1.test", "alice") for number in range(20_000)])
    command = [sys.executable, str(ROOT / "mailcloakctl.py"), "--db", str(ctl.path), "aliases", "export"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as export:
        assert export.stdout.readline() == b"alias,username,enabled\n"
        ctl("aliases", "add", "new@d1.test", "bob")
        assert export.poll() is None, "it has ended, so this shows nothing"
        assert b"new@d1.test" not in export.stdout.read()


# ---- sync and import


def test_sync_adds_changes_enables_and_deletes(ctl):
    fill(ctl, [("a@d1.test", "alice"), ("b@d1.test", "alice"), ("c@d1.test", "carol"), ("d@d1.test", "dora")])
    ctl("aliases", "disable", "d@d1.test")
    path = write(ctl, "A@D1.test,Alice\nb@d1.test,bob,0\nd@d1.test,dora\ne@d1.test,eve\n")
    result = ctl("aliases", "sync", path, "-v")
    assert result.stdout == (
        "change b@d1.test alice -> bob, disabled\ndelete c@d1.test carol\nenable d@d1.test dora\nadd e@d1.test eve\n"
        "aliases: 1 added, 1 changed, 1 enabled, 1 deleted, 1 unchanged\n"
    )
    assert result.stderr == ""
    assert ctl.aliases() == [("a@d1.test", "alice", 1), ("b@d1.test", "bob", 0), ("d@d1.test", "dora", 1), ("e@d1.test", "eve", 1)]


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["sync"], []),
        (["sync", "--missing", "disable"], [("b@d1.test", "bob", 0)]),
        (["sync", "--missing", "keep"], [("b@d1.test", "bob", 1)]),
        (["import"], [("b@d1.test", "bob", 1)]),
    ],
    ids=["delete", "disable", "keep", "import"],
)
def test_alias_that_is_not_in_the_file(ctl, options, left):
    fill(ctl, [("a@d1.test", "alice"), ("b@d1.test", "bob")])
    ctl("aliases", options[0], write(ctl, "a@d1.test,alice\n"), *options[1:])
    assert ctl.aliases() == [("a@d1.test", "alice", 1), *left]


def test_jobs_with_a_scope_leave_the_aliases_of_others_alone(ctl):
    fill(ctl, [("a@d1.test", "alice"), ("b@d1.test", "bob"), ("a@d2.test", "carol"), ("a@sub.d1.test", "dave")])
    path = write(ctl, "b@D1.test,alice\nc@d1.test,bob\n")
    result = ctl("aliases", "sync", path, "--scope", "D1.test", "--json")
    assert json.loads(result.stdout)["counts"] == {
        "added": 1, "changed": 1, "enabled": 0, "disabled": 0, "claimed": 0, "deleted": 1, "unchanged": 0, "skipped": 0
    }  # fmt: skip
    wanted = [("a@d2.test", "carol", 1), ("a@sub.d1.test", "dave", 1), ("b@d1.test", "alice", 1), ("c@d1.test", "bob", 1)]
    assert ctl.aliases() == wanted
    for verb in ("sync", "import"):
        result = ctl("aliases", verb, write(ctl, "x@d2.test,alice\n"), "--scope", "d1.test", check=False)
        assert (result.returncode, "line 1: x@d2.test is not in d1.test, the domain of --scope" in result.stderr) == (1, True)
    result = ctl("aliases", "sync", path, "--scope", "no domain", check=False)
    assert result.returncode == 1
    assert ctl.aliases() == wanted


def test_sync_touches_only_rows_that_differ(filled):
    with contextlib.closing(sqlite3.connect(filled.path)) as database, database:
        database.execute("UPDATE aliases SET updated_at = 1")
    rows = filled.aliases()
    filled("aliases", "sync", write(filled, csv_of([("a00@d1.test", "new"), *rows[1:]])))
    assert filled.rows("SELECT alias_email FROM aliases WHERE updated_at <> 1") == [("a00@d1.test",)]
    assert abs(filled.rows("SELECT max(updated_at) FROM aliases")[0][0] - time.time()) < 60


def test_sync_without_a_difference_writes_nothing(filled):
    path, before = write(filled, csv_of(filled.aliases())), filled.path.read_bytes()
    time_before = os.stat(filled.path).st_mtime_ns
    assert filled("aliases", "sync", path).stdout == "aliases: nothing to change, 30 unchanged\n"
    assert (filled.path.read_bytes(), os.stat(filled.path).st_mtime_ns) == (before, time_before)


@pytest.mark.parametrize("number", [2, 101])
def test_dry_run_says_what_would_change_and_changes_nothing(filled, number):
    rows = [*filled.aliases(), *((f"new{each}@d1.test", "bob", 1) for each in range(number))]
    path, before = write(filled, csv_of(rows)), filled.path.read_bytes()
    assert filled("aliases", "sync", path, "--dry-run").stdout == f"aliases: {number} would be added, 30 unchanged\n"
    assert filled.path.read_bytes() == before


def test_dry_run_creates_no_database(tmp_path):
    missing = Ctl(tmp_path / "state.db")
    result = missing("aliases", "import", write(missing, "a@d1.test,alice\n"), "--dry-run")
    assert result.stdout == "aliases: 1 would be added, 0 unchanged\n"
    assert not missing.path.exists()


def test_import_creates_the_database_unless_the_file_is_bad(tmp_path):
    missing = Ctl(tmp_path / "state.db")
    assert "line 1: 'a' is not an address" in missing.refuses("aliases", "import", write(missing, "a,alice@x\n"))
    assert not missing.path.exists()
    missing("aliases", "import", write(missing, "a@d1.test,alice\n"))
    assert missing.aliases() == [("a@d1.test", "alice", 1)]


def test_json_has_each_change_with_its_old_and_new_value(ctl):
    fill(ctl, [("a@d1.test", "alice"), ("b@d1.test", "bob")])
    result = ctl("aliases", "sync", write(ctl, "a@d1.test,carol,0\nc@d1.test,carol\n"), "--json")
    assert json.loads(result.stdout) == {
        "changed": True,
        "dry_run": False,
        "counts": {"added": 1, "changed": 1, "enabled": 0, "disabled": 0, "claimed": 0, "deleted": 1, "unchanged": 0, "skipped": 0},
        "changes": [
            {
                "alias": "a@d1.test",
                "old": {"username": "alice", "enabled": 1, "receive_only": False, "source": None},
                "new": {"username": "carol", "enabled": 0, "receive_only": False, "source": None},
            },
            {"alias": "b@d1.test", "old": {"username": "bob", "enabled": 1, "receive_only": False, "source": None}, "new": None},
            {"alias": "c@d1.test", "old": None, "new": {"username": "carol", "enabled": 1, "receive_only": False, "source": None}},
        ],
    }
    again = json.loads(ctl("aliases", "sync", ctl.path.parent / "aliases.csv", "--json").stdout)
    assert (again["changed"], again["changes"], again["counts"]["unchanged"]) == (False, [], 2)


# ---- limits


def test_empty_export_does_not_empty_the_mail_host(filled):
    message = filled.refuses("aliases", "sync", write(filled, ""), code=3)
    assert message == (
        "mailcloakctl: aliases: sync: of 30 aliases 30 would be deleted: more than --max-change 20%, nothing was changed;"
        " look with --dry-run -v, and if this is right, allow it with --max-change 100%\n"
    )
    filled("aliases", "sync", filled.path.parent / "aliases.csv", "--max-change", "100%")
    assert filled.aliases() == []


@pytest.mark.parametrize(("number", "code"), [(6, 0), (7, 3)])
def test_limit_is_a_fifth_of_what_is_stored(filled, number, code):
    rows = [(address, "new" if index < number else username) for index, (address, username, _) in enumerate(filled.aliases())]
    assert filled("aliases", "sync", write(filled, csv_of(rows)), check=False).returncode == code
    assert ("new" in {row[1] for row in filled.aliases()}) == (code == 0)


def test_few_aliases_may_all_change_but_not_all_go(ctl):
    fill(ctl, [("a@d1.test", "alice"), ("b@d1.test", "bob")])
    ctl.refuses("aliases", "sync", write(ctl, "alias,username\n"), code=3)
    ctl("aliases", "sync", write(ctl, "a@d1.test,carol\n"))
    assert ctl.aliases() == [("a@d1.test", "carol", 1)]


def test_dry_run_over_the_limit_shows_the_changes_and_has_the_code_of_the_limit(filled):
    result = filled("aliases", "sync", write(filled, ""), "--dry-run", "-v", check=False)
    assert result.returncode == 3
    assert "delete a00@d1.test user0\n" in result.stdout
    assert len(filled.aliases()) == 30


@pytest.mark.parametrize("share", ["101%", "-1", "a lot", "", "1e2"])
def test_share_that_is_none_is_refused(filled, share):
    assert "expected a share such as 20%" in filled.refuses("aliases", "sync", write(filled, ""), f"--max-change={share}")


# ---- files that are refused


def test_each_bad_line_is_reported_and_one_stops_the_whole(filled):
    text = "info@d1.test,alice\ninfo,bob\nx@d1.test,a b\n*@d1.test,bob\ny@d1.test,al,ice\nz@d1.test," + "u" * 300 + "\n"
    message = filled.refuses("aliases", "import", write(filled, text))
    numbers = [int(line.split("line ")[1].split(":")[0]) for line in message.splitlines()[:-1]]
    assert numbers == [2, 3, 4, 5, 6]
    assert "line 2: 'info' is not an address for this: it has no @" in message
    assert "line 4: *@d1.test would be a catch-all" in message
    assert "5 lines are bad, nothing was changed; correct them, or leave them out with --skip-bad" in message
    result = filled("aliases", "import", filled.path.parent / "aliases.csv", "--skip-bad")
    assert "1 added, 30 unchanged, 5 bad lines left out" in result.stdout
    assert ("info@d1.test", "alice", 1) in filled.aliases()


def test_address_with_two_users_is_a_bad_line(filled):
    path = write(filled, "info@d1.test,alice\nx@d1.test,bob\nINFO@d1.test,bob\n")
    message = filled.refuses("aliases", "import", path)
    assert "line 3: info@d1.test leads to another user in line 1; all targets of an alias stand in one line" in message
    filled("aliases", "import", path, "--skip-bad")
    assert ("info@d1.test", "alice", 1) in filled.aliases()


REFUSED = {
    "not UTF-8": (b"a@d1.test,alice\nb@d1.test,j\xf6rg\n", "line 2 is not UTF-8"),
    "cut": (b"a@d1.test,alice\nb@d1.te", "its last line, 2, has no end: it may have been cut"),
    "long line": (b"a@d1.test," + b"a" * 300_000 + b"\n", "line 1 is longer than 262144 bytes"),
}


@pytest.mark.parametrize("place", ["file", "standard input"])
@pytest.mark.parametrize(("data", "says"), REFUSED.values(), ids=REFUSED)
def test_file_that_is_not_whole_is_refused_even_with_skip_bad(filled, data, says, place):
    arguments = ("aliases", "import", "--skip-bad")
    if place == "file":
        message = filled.refuses(*arguments, write(filled, data))
    else:
        before = filled.aliases()
        result = run_ctl("--db", filled.path, *arguments, "-", check=False, input=data, text=False)
        assert (result.returncode, filled.aliases()) == (1, before)
        message = result.stderr.decode()
    assert says in message
    assert "nothing was changed" in message


def test_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "aliases.csv"
    for change in (lambda: path.write_text("a\nb\nc\n"), lambda: os.utime(path, (1, 1)), lambda: replace(path)):
        path.write_text("a\nb\n")
        lines = mailcloakdata.Source(str(path)).lines()
        assert next(lines) == (1, "a")
        change()
        with pytest.raises(mailcloakcommon.Refused, match="it has changed while it was read"):
            list(lines)


def replace(path):
    new = path.with_suffix(".new")
    new.write_text("a\nb\n")
    os.rename(new, path)


def test_file_that_is_not_there_or_of_an_unknown_format_is_refused(filled):
    assert "cannot be read: No such file" in filled.refuses("aliases", "import", filled.path.parent / "absent.csv")
    assert "cannot be read: Is a directory" in filled.refuses("aliases", "import", filled.path.parent, "--format", "csv")
    assert "name it with --format csv|jsonl|virtual|postfixadmin" in filled.refuses("aliases", "import", "aliases.txt")


def test_username_is_checked_as_by_aliases_add(ctl, make_config):
    """A delimiter, a foreign domain, and an alias of an alias, each refused without --force if it can be forced."""
    config_path = ctl.path.parent / "config.yaml"
    config_path.write_text(yaml.safe_dump(make_config(sqlite={"path": str(ctl.path)}, static_users={"bob": "bob@d1.test"})))
    command = ("--config", config_path, "aliases", "import", "-")
    for line, says in (
        ("info@d1.test,bob+x\n", "line 1: bob+x holds a character of policy.recipient_delimiter"),
        ("info@d1.test,bob@elsewhere.example\n", "line 1: bob@elsewhere.example is in elsewhere.example"),
        ("info@d1.test,bob\nbob@d1.test,carol\n", "this alias would carry that mail on to carol; --force"),
    ):
        result = run_ctl(*command, input=line, check=False)
        assert (result.returncode, ctl.aliases()) == (1, []), result.stderr
        assert says in result.stderr
    result = run_ctl(*command, "--force", input="info@d3.test,bob\nbob@d3.test,carol\n")
    assert "warning: 2 aliases in d3.test, which is not in policy.domain" in result.stderr
    assert len(ctl.aliases()) == 2


# ---- the daemon


def test_sync_asks_the_daemon_about_what_is_new(static_daemon):
    command = ("--config", static_daemon.config_path, "aliases", "import", "-")
    result = run_ctl(*command, input="bob@d1.test,alice\n", check=False)
    assert result.returncode == 1
    assert "bob@d1.test is the primary e-mail of bob" in result.stderr
    assert static_daemon.ask_map("alias info@d1.test") == "NOTFOUND "
    result = run_ctl(*command, input="info@d1.test,alice\nsales@d1.test,nobody\n")
    assert "warning: nobody is not a user in Keycloak" in result.stderr
    assert static_daemon.ask_map("alias info@d1.test") == "OK alice@d1.test"
    many = "".join(f"a{number}@d1.test,alice\n" for number in range(101))
    assert "the daemon was not asked" in run_ctl(*command, input=many).stderr
    assert run_ctl(*command, input=many).stderr == ""


def test_commit_of_another_program_meanwhile_refuses_the_sync(filled, monkeypatch):
    """Between comparing and writing, while Keycloak is asked."""

    def ask(context, elsewhere):
        fill(filled, [("meanwhile@d1.test", "bob")])

    monkeypatch.setattr(mailcloakdata, "ask_about", ask)
    path = write(filled, csv_of(filled.aliases()) + "new@d1.test,alice\n")
    assert mailcloakctl.main(["--db", str(filled.path), "aliases", "sync", str(path)]) == 1
    addresses = [row[0] for row in filled.aliases()]
    assert "meanwhile@d1.test" in addresses
    assert "new@d1.test" not in addresses


# ---- what stays after a kill


@pytest.mark.long
@pytest.mark.parametrize("kills", [15, 200])
def test_kill_at_any_instant_leaves_the_old_state_or_the_new(ctl, kills):
    rows = [Row(f"a{number:05}@d1.test", f"0user{number % 7}", 1, 0, "") for number in range(3000)]
    with contextlib.closing(sqlite3.connect(ctl.path)) as database, database:
        store(database, rows)
    new = [Row(row.address, "0alice\n0other", 0, 0, "") for row in rows[::2]]
    states = {"old": rows, "new": [*new, *(Row(f"b{number:05}@d1.test", "0bob", 1, 0, "") for number in range(3000))]}
    files = {
        name: write(ctl, csv_of((row.address, row.targets.replace("\n0", ";")[1:], row.enabled) for row in state), f"{name}.csv")
        for name, state in states.items()
    }
    command = [sys.executable, "-c", IN_CHILD, str(ROOT), "--db", str(ctl.path), "aliases", "sync", "--max-change=100%", "--force"]
    # How busy the machine is changes: the instant follows what was found, and so stays around the commit.
    commit_seconds = max(timed(command, files[name]) for name in ("new", "old"))
    chance, seen, now = random.Random(16), [], "old"
    for _ in range(kills):
        target = "new" if now == "old" else "old"
        with subprocess.Popen([*command, str(files[target])], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            time.sleep(chance.uniform(0.2, 1.05) * commit_seconds)
            process.send_signal(signal.SIGKILL)
        with contextlib.closing(sqlite3.connect(ctl.path)) as database:
            found = list(mailcloakdata.stored_rows(database))
        now = next((name for name, state in states.items() if found == state), "neither")
        assert now != "neither"
        commit_seconds *= 0.9 if now == target else 1.1
        assert ctl.rows("PRAGMA integrity_check") == [("ok",)]
        seen.append(now)
    assert len(set(seen)) == 2, "each kill came too early or too late"


IN_CHILD = "import sys; sys.path.insert(0, sys.argv.pop(1)); import mailcloakctl; sys.exit(mailcloakctl.main())"


def timed(command, path):
    began = time.monotonic()
    subprocess.run([*command, str(path)], check=True, capture_output=True)
    return time.monotonic() - began


# ---- many aliases


def test_progress_is_shown_on_a_terminal_alone(ctl, monkeypatch, capsys):
    monkeypatch.setattr(mailcloakdata, "PROGRESS_SECONDS", 0.0)
    shown = []
    monkeypatch.setattr(mailcloakcommon, "show_progress", shown.append)
    assert len(list(mailcloakdata.watch(range(10_000), "lines read", lambda: 0.5))) == 10_000
    assert [text for text in shown if "aliases: lines read: 4,096," in text and " left" in text]
    assert shown[-1] == ""


def test_modules_of_other_commands_are_not_loaded():
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import mailcloakctl; sys.argv[1:] = ['aliases', 'list', '--db', '/absent'];"
    script += "mailcloakctl.main(); print('mailcloakdata' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout == "False\n"


# ---- the jobs of README.md


def cron_lines(word):
    """The jobs of README.md that hold this word, without their time and user."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    return [line.split(None, 6)[6] for line in lines if line.startswith(tuple("0123456789*")) and " root " in line and word in line]


def run_job(line, ctl, directory, replacements=()):
    """Run a job as cron does, with our mailcloakctl in place of the installed one, on this database."""
    program = directory / "mailcloakctl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/mailcloakctl.py --db {ctl.path} "$@"\n')
    program.chmod(0o755)
    for old, new in (("/usr/local/sbin/mailcloakctl", str(program)), *replacements):
        assert old in line
        line = line.replace(old, str(new))
    environment = {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}"}
    return subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, env=environment, check=False)


def test_job_of_readme_syncs_a_file_and_says_nothing_unless_it_is_refused(filled, tmp_path):
    (job,) = cron_lines("aliases sync /srv/hr/aliases.csv")
    with contextlib.closing(sqlite3.connect(filled.path)) as database, database:
        database.execute("UPDATE aliases SET source = 'hr'")  # as the first run leaves them
    path = write(filled, csv_of([("a00@d1.test", "new"), *filled.aliases()[1:]]))
    result = run_job(job, filled, tmp_path, [("/srv/hr/aliases.csv", path)])
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert filled.aliases()[0] == ("a00@d1.test", "new", 1)
    write(filled, "a00@d1.test,new\nhalf a li")
    result = run_job(job, filled, tmp_path, [("/srv/hr/aliases.csv", path)])
    assert (result.returncode, result.stdout) == (1, "")
    assert "its last line, 2, has no end" in result.stderr


def test_job_of_readme_copies_the_aliases_of_another_host_and_keeps_them_when_it_is_away(filled, tmp_path):
    (job,) = cron_lines("ssh mx1.example.org")
    other = Ctl(tmp_path / "other.db")
    other("aliases", "import", "-", input=csv_of([*filled.aliases(), ("new@d1.test", "alice")]))
    ssh = tmp_path / "ssh"
    ssh.write_text(f'#!/bin/sh\nshift 2; exec {sys.executable} {ROOT}/mailcloakctl.py --db {other.path} "$@"\n')
    ssh.chmod(0o755)
    assert run_job(job, filled, tmp_path).stderr == ""
    assert filled.aliases() == other.aliases()
    filled("aliases", "import", "-", input="".join(f"b{number}@d1.test,bob\n" for number in range(9)))
    ssh.write_text("#!/bin/sh\nexit 255\n")
    result = run_job(job, filled, tmp_path)
    assert (result.returncode, len(filled.aliases())) == (3, 40)
    assert result.stderr in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.real("slapd")
@pytest.mark.real("ldapsearch")
def test_job_of_readme_takes_the_aliases_from_a_directory_and_keeps_them_when_it_is_away(filled, tmp_path):
    from real.ldap import PEOPLE, PrivateSlapd

    (job,) = cron_lines("ldapsearch")
    people = {f"user{user}": "\nmail: ".join(row[0] for row in filled.aliases() if row[1] == f"user{user}") for user in range(3)}
    people["user0"] += "\nmail: Sales@d1.test"
    with contextlib.closing(PrivateSlapd(people)) as slapd:
        slapd.start()
        replacements = [("ldap://ldap.example.org", slapd.url), ("ou=people,dc=example,dc=org", PEOPLE)]
        before = filled.aliases()
        result = run_job(job, filled, tmp_path, replacements)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        assert filled.aliases() == [*before, ("sales@d1.test", "user0", 1)]
        slapd.stop()
        result = run_job(job, filled, tmp_path, replacements)
    assert result.returncode == 3
    assert "Can't contact LDAP server" in result.stderr
    assert "of 31 aliases 31 would be deleted: more than --max-change 20%, nothing was changed" in result.stderr
    assert len(filled.aliases()) == 31
