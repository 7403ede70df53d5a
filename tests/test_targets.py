"""Aliases with several users or addresses elsewhere, and aliases that belong to a job: mailcloakctl, files, backups, a daemon."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3

import pytest
import yaml
from conftest import run_ctl, wait_until
from test_backup import contents
from test_mailcloakctl import Ctl

import mailcloak
import mailcloakcommon

TEAM = "team@d1.test"


class Configured(Ctl):
    """The command with a configuration, which says which domains are ours."""

    def __init__(self, path, config):
        super().__init__(path)
        self.config = config

    def __call__(self, *arguments, check=True, **options):
        return run_ctl("--config", self.config, *arguments, check=check, **options)


@pytest.fixture
def ctl(tmp_path):
    """The command on a database in which team@d1.test leads to alice and bob."""
    path = tmp_path / "state.db"
    assert mailcloak.prepare_database(str(path), 5)
    command = Ctl(path)
    command("aliases", "add", TEAM, "bob", "Alice")
    return command


def alias_of(ctl, address=TEAM):
    """(users, addresses elsewhere, source) as aliases show --json says them."""
    shown = json.loads(ctl("aliases", "show", address, "--json").stdout)
    return shown["users"], shown["external"], shown["source"]


def write(ctl, text, name="aliases.csv"):
    path = ctl.path.parent / name
    path.write_text(text, encoding="utf-8")
    return path


# ---- mailcloakctl


def test_add_of_the_same_users_is_done_already_in_any_order(ctl):
    before = ctl.path.read_bytes()
    assert ctl("aliases", "add", TEAM, "alice", "BOB").stderr == f"aliases: {TEAM} leads to alice, bob already\n"
    assert ctl.path.read_bytes() == before


@pytest.mark.parametrize("users", [["alice"], ["alice", "bob", "carol"], ["carol"]])
def test_add_of_other_users_needs_replace(ctl, users):
    assert f"{TEAM} leads to alice, bob already, --replace changes that" in ctl.refuses("aliases", "add", TEAM, *users)
    said = ctl("aliases", "add", TEAM, *users, "--replace")
    lost = ", ".join(user for user in ("alice", "bob") if user not in users)
    assert said.stderr == f"aliases: {TEAM} now leads to {', '.join(users)}{lost and f', no longer to {lost}'}\n"
    assert alias_of(ctl) == (users, [], None)


def test_users_are_added_and_removed(ctl):
    assert ctl("aliases", "add-user", TEAM, "carol", "alice").stderr == f"aliases: {TEAM} now leads to alice, bob, carol\n"
    assert ctl("aliases", "add-user", TEAM, "carol").stderr == f"aliases: {TEAM} leads to alice, bob, carol already\n"
    assert (
        ctl("aliases", "remove-user", TEAM, "alice", "absent").stderr
        == f"aliases: {TEAM} now leads to bob, carol, no longer to alice\naliases: {TEAM} did not lead to absent\n"
    )
    said = ctl("aliases", "remove-user", TEAM, "absent").stderr
    assert said == f"aliases: {TEAM} leads to bob, carol already\naliases: {TEAM} did not lead to absent\n"
    changed = json.loads(ctl("aliases", "remove-user", TEAM, "carol", "--json").stdout)
    assert changed == {"changed": True, "aliases": [TEAM], "username": "bob", "before": "bob, carol"}
    assert "would lead to nobody" in ctl.refuses("aliases", "remove-user", TEAM, "bob")
    for verb in ("add-user", "remove-user"):
        assert "absent@d1.test does not exist" in ctl.refuses("aliases", verb, "absent@d1.test", "bob")


def test_disabled_alias_stays_disabled(ctl):
    ctl("aliases", "disable", TEAM)
    assert f"{TEAM} is disabled, aliases enable {TEAM} makes it count" in ctl("aliases", "add-user", TEAM, "carol").stderr
    ctl("aliases", "add", TEAM, "dora", "--replace")
    assert ctl.rows("SELECT enabled FROM aliases") == [(0,)]


def test_deleted_alias_takes_its_targets_with_it_and_a_new_one_has_none_of_them(ctl):
    ctl("aliases", "del", TEAM)
    assert ctl.rows("SELECT * FROM alias_targets") == []
    with contextlib.closing(sqlite3.connect(ctl.path)) as database, database:  # another program, without foreign keys
        database.execute("INSERT INTO alias_targets (alias_email, target) VALUES (?, 'mallory')", (TEAM,))
    ctl("aliases", "add", TEAM, "alice")
    assert alias_of(ctl) == (["alice"], [], None)


def test_user_with_the_address_as_e_mail_may_share_it(make_daemon, keycloak):
    keycloak.add_user("alice", TEAM)
    keycloak.add_user("bob", "bob@d1.test")
    daemon = make_daemon(keycloak=keycloak.config()).start()
    config = ("--config", daemon.config_path, "aliases")
    refused = run_ctl(*config, "add", TEAM, "bob", check=False)
    assert f"{TEAM} is the primary e-mail of alice, whose mail this alias would take" in refused.stderr
    run_ctl(*config, "add", TEAM, "alice")
    assert run_ctl(*config, "add-user", TEAM, "bob").stderr == f"aliases: {TEAM} now leads to alice, bob\n"
    path = daemon.database.parent / "aliases.csv"
    path.write_text(f"{TEAM},alice;bob;carol\n", encoding="utf-8")
    said = run_ctl(*config, "sync", path)
    assert (said.stdout, said.stderr) == ("aliases: 1 changed, 0 unchanged\n", "warning: carol is not a user in Keycloak\n")
    assert daemon.ask_map(f"alias {TEAM}") == "OK alice@d1.test,bob@d1.test,carol@d1.test"  # carol was never seen as a user


def test_address_elsewhere_needs_external_and_is_no_user(ctl, tmp_path):
    config = tmp_path / "config.yaml"
    blocks = {"policy": {"domain": "d1.test", "mailbox_domain": "mbx.test"}, "sqlite": {"path": str(ctl.path)}}
    config.write_text(yaml.safe_dump(blocks), encoding="utf-8")
    ctl = Configured(ctl.path, config)
    assert "an address elsewhere needs --external" in ctl.refuses("aliases", "add-user", TEAM, "jo@elsewhere.test")
    ctl("aliases", "add-user", TEAM, "Jo@Elsewhere.test", "zoe@d1.test", "--external")
    assert alias_of(ctl) == (["alice", "bob", "zoe@d1.test"], ["jo@elsewhere.test"], None)
    mailboxes = json.loads(ctl("aliases", "show", TEAM, "--json").stdout)["mailbox"]
    assert mailboxes == "alice@mbx.test, bob@mbx.test, zoe@d1.test, jo@elsewhere.test"
    ctl("aliases", "remove-user", TEAM, "<jo@elsewhere.test>", "alice", "zoe@d1.test")
    assert alias_of(ctl) == (["bob"], [], None)
    ctl("aliases", "add", "out@d1.test", "jo@elsewhere.test", "--external")
    assert ctl.rows("SELECT username, external FROM aliases WHERE alias_email = 'out@d1.test'") == [("jo@elsewhere.test", 1)]
    assert "'j o@elsewhere.test' is not an address" in ctl.refuses("aliases", "add-user", TEAM, "j o@elsewhere.test", "--external")


def test_alias_that_only_receives_is_another_one(ctl):
    message = ctl.refuses("aliases", "add", TEAM, "alice", "bob", "--receive-only")
    assert "--replace changes that" in message
    said = ctl("aliases", "add", TEAM, "alice", "bob", "--receive-only", "--replace").stderr
    assert said == f"aliases: {TEAM} now leads to alice, bob, and only receives\n"
    assert "which only receives, already" in ctl.refuses("aliases", "add", TEAM, "alice", "bob")
    ctl("aliases", "add-user", TEAM, "carol")
    assert ctl.rows("SELECT receive_only FROM aliases") == [(1,)]


def test_more_targets_than_postfix_takes_are_refused(ctl):
    users = [f"user{number}" for number in range(mailcloakcommon.MAX_TARGETS)]
    ctl("aliases", "add", "all@d1.test", *users)
    assert "would lead to 1001 targets" in ctl.refuses("aliases", "add-user", "all@d1.test", "one-more")
    long = [f"{'x' * 200}{number}" for number in range(500)]
    message = ctl.refuses("aliases", "add", "long@d1.test", *long)
    assert "use a mailing list for so many" in message
    path = write(ctl, f"long@d1.test,{';'.join(users)};one-more\n")
    assert "line 1: long@d1.test would lead to 1001 targets" in ctl.refuses("aliases", "import", path)


def test_aliases_of_a_user_are_found_and_moved_where_there_are_several(ctl):
    ctl("aliases", "add", "info@d1.test", "bob")
    assert ctl("aliases", "list", "--user", "Bob", "--quiet").stdout == f"info@d1.test\n{TEAM}\n"
    assert ctl("aliases", "list", "--user", "alice", "--count").stdout == "1\n"
    assert "2 aliases now lead to alice" in ctl("aliases", "move", "bob", "alice").stderr
    assert (alias_of(ctl), alias_of(ctl, "info@d1.test")) == ((["alice"], [], None), (["alice"], [], None))


def test_chain_through_a_further_user_is_refused(ctl):
    ctl("aliases", "add", "sales@d1.test", "carol")
    assert "the mailbox of sales is sales@d1.test" in ctl.refuses("aliases", "add-user", TEAM, "sales")
    assert "this alias would carry that mail on to carol" in ctl.refuses("aliases", "add", "bob@d1.test", "carol")


def test_address_elsewhere_is_checked_as_a_user_is(make_daemon, keycloak):
    keycloak.add_user("alice", "alice@d1.test")
    keycloak.add_user("bob", "bob@d1.test")
    daemon = make_daemon(keycloak=keycloak.config()).start()
    config = ("--config", daemon.config_path, "aliases")

    def refused(*words):
        result = run_ctl(*config, *words, check=False)
        assert result.returncode == 1, result
        return result.stderr

    taken = "alice@d1.test is the primary e-mail of alice, whose mail this alias would take"
    assert taken in refused("add", "alice@d1.test", "jo@elsewhere.test", "--external")
    path = daemon.database.parent / "aliases.csv"
    path.write_text("alice@d1.test,<jo@elsewhere.test>\n", encoding="utf-8")
    assert taken in refused("import", path, "--external")
    run_ctl(*config, "add", "alice@d1.test", "alice", "bob")
    assert taken in refused("remove-user", "alice@d1.test", "alice")
    path.write_text("alice@d1.test,bob\n", encoding="utf-8")
    assert taken in refused("sync", path)
    run_ctl(*config, "remove-user", "alice@d1.test", "alice", "--force")
    assert "catch-all" in refused("add", "*@d1.test", "jo@elsewhere.test", "--external")


def test_chain_through_an_address_elsewhere_is_refused(ctl):
    assert "this alias would carry that mail on to jo@elsewhere.test" in ctl.refuses(
        "aliases", "add", "bob@d1.test", "jo@elsewhere.test", "--external"
    )
    ctl("aliases", "add", "carol@d1.test", "jo@elsewhere.test", "--external")
    assert "which is itself an alias and leads to jo@elsewhere.test" in ctl.refuses("aliases", "add", "info@d1.test", "carol")


def test_name_that_is_a_user_and_elsewhere_is_refused(ctl):
    path = write(ctl, "a@d1.test,x@e.test;<x@e.test>\n")
    message = ctl.refuses("aliases", "import", path, "--external", "--force")
    assert "line 1: a@d1.test: x@e.test cannot be both a user and an address elsewhere" in message


# ---- jobs


def test_jobs_with_a_source_do_not_delete_each_others_aliases(ctl):
    ctl("aliases", "sync", write(ctl, "a@d1.test,alice\nb@d1.test,bob\n"), "--source", "hr")
    ctl("aliases", "sync", write(ctl, "c@d1.test,carol\n"), "--source", "shop")
    result = ctl("aliases", "sync", write(ctl, "a@d1.test,alice\n"), "--source", "hr", "-v")
    assert result.stdout == "delete b@d1.test bob\naliases: 1 deleted, 1 unchanged\n"
    assert ctl("aliases", "list", "--source", "hr", "--quiet").stdout == "a@d1.test\n"
    assert ctl("aliases", "list", "--source", "", "--quiet").stdout == f"{TEAM}\n"
    assert alias_of(ctl, "c@d1.test") == (["carol"], [], "shop")
    assert "c@d1.test     carol       yes      shop" in ctl("aliases", "list").stdout


def test_alias_made_by_hand_that_a_job_changes_is_said(ctl):
    """The next file without it deletes it."""
    ctl("aliases", "add", "a@d1.test", "alice")
    ctl("aliases", "add", "b@d1.test", "bob")
    path = write(ctl, "a@d1.test,carol\nb@d1.test,bob\n")
    said = "warning: were made by hand, and {} changed and taken over by this job: a@d1.test\n"
    assert ctl("aliases", "sync", path, "--source", "hr", "--dry-run").stderr == said.format("would be")
    assert ctl("aliases", "sync", path, "--source", "hr").stderr == said.format("were")
    assert ctl("aliases", "sync", path, "--source", "hr").stderr == ""


@pytest.mark.parametrize("option", ["--source", "--scope"])
@pytest.mark.parametrize("verb", ["sync", "import"])
def test_job_without_a_name_is_a_usage_error(ctl, verb, option):
    """A variable of a script that is not set would make it a job that owns all aliases."""
    message = ctl.refuses("aliases", verb, write(ctl, "a@d1.test,alice\n"), option, "", code=2)
    assert "--scope or --source is empty, it must name a domain or a job" in message


def test_what_a_file_does_not_say_of_receiving_only_stays(ctl):
    ctl("aliases", "add", "in@d1.test", "alice", "--receive-only")
    for name, text in (("a.csv", "in@d1.test,alice\n"), ("a.virtual", "in@d1.test alice@d1.test\n")):
        assert "nothing to change" in ctl("aliases", "import", write(ctl, text, name)).stdout
    ctl("aliases", "import", write(ctl, "in@d1.test,bob\n"))
    assert ctl.rows("SELECT username, receive_only FROM aliases WHERE alias_email = 'in@d1.test'") == [("bob", 1)]
    said = ctl("aliases", "import", write(ctl, "alias,username,receive_only\nin@d1.test,bob,0\n"), "-v").stdout
    assert said.startswith("change in@d1.test bob, may send\n")


def test_alias_that_changes_hands_is_said(ctl):
    ctl("aliases", "sync", write(ctl, "a@d1.test,alice\n"), "--source", "hr")
    before = ctl.path.read_bytes()
    path = write(ctl, f"a@d1.test,alice\n{TEAM},carol\n")
    result = ctl("aliases", "sync", path, "--source", "shop", "--dry-run", "-v")
    assert result.stdout == (
        f"claim a@d1.test alice, taken from hr\nchange {TEAM} alice, bob -> carol, taken from no job\n"
        "aliases: 1 would be changed, 1 would be claimed, 0 unchanged\n"
    )
    assert ctl.path.read_bytes() == before
    changes = json.loads(ctl("aliases", "sync", path, "--source", "shop", "--json").stdout)["changes"]
    assert [(change["old"]["source"], change["new"]["source"]) for change in changes] == [("hr", "shop"), (None, "shop")]
    ctl("aliases", "sync", write(ctl, f"a@d1.test,alice\n{TEAM},carol\n"))  # a job that owns nothing takes nothing
    assert alias_of(ctl, "a@d1.test") == (["alice"], [], "shop")


def test_what_a_job_takes_from_others_counts_for_the_limit(ctl):
    rows = "".join(f"a{number}@d1.test,alice\n" for number in range(30))
    ctl("aliases", "sync", write(ctl, rows), "--source", "hr")
    result = ctl("aliases", "sync", write(ctl, rows), "--source", "shop", check=False)
    assert result.returncode == 3
    assert "of 30 aliases 30 would be claimed: more than --max-change 20%" in result.stderr


def test_file_that_leads_elsewhere_needs_external(ctl):
    path = write(ctl, "a@d1.test,alice;<jo@elsewhere.test>\n")
    assert "its target 'jo@elsewhere.test' is elsewhere, and is taken only with --external" in ctl.refuses(
        "aliases", "import", path
    )
    ctl("aliases", "import", path, "--external")
    assert alias_of(ctl, "a@d1.test") == (["alice"], ["jo@elsewhere.test"], None)


def test_export_names_the_column_of_aliases_that_only_receive_where_there_are_some(ctl):
    assert ctl("aliases", "export").stdout == f"alias,username,enabled\n{TEAM},alice;bob,1\n"
    ctl("aliases", "add", "in@d1.test", "bob", "--receive-only")
    assert ctl("aliases", "export").stdout == (f"alias,username,enabled,receive_only\nin@d1.test,bob,1,1\n{TEAM},alice;bob,1,0\n")
    message = ctl.refuses("aliases", "export", "--format", "virtual")
    assert "in@d1.test cannot be in this file: its users may only receive" in message


# ---- backups and the check


def test_backup_brings_all_targets_back(ctl):
    ctl("aliases", "sync", write(ctl, f"{TEAM},alice;bob;<jo@e.test>\n"), "--source", "hr", "--external")
    before, copy = contents(ctl.path), ctl.path.parent / "backup.db"
    ctl("backup", copy)
    ctl("aliases", "add", TEAM, "carol", "dora", "--replace")
    ctl("restore", copy)
    assert contents(ctl.path) == before
    assert alias_of(ctl) == (["alice", "bob"], ["jo@e.test"], "hr")


def test_restore_of_a_backup_from_before_there_were_several_targets(ctl):
    copy = ctl.path.parent / "backup.db"
    ctl("backup", copy)
    with contextlib.closing(sqlite3.connect(copy)) as database, database:
        database.execute("DROP TABLE alias_targets")
        database.execute("CREATE TABLE older AS SELECT alias_email, username, enabled, updated_at FROM aliases")
        database.execute("DROP TABLE aliases")
        database.execute("ALTER TABLE older RENAME TO aliases")
        database.execute("PRAGMA user_version = 2")
    ctl("restore", copy)
    assert alias_of(ctl) == (["alice"], [], None)
    assert ctl.rows("SELECT receive_only, external FROM aliases") == [(0, 0)]


@pytest.mark.parametrize(
    ("statement", "fault", "left"),
    [
        ("UPDATE alias_targets SET target = 'BOB'", "the username 'BOB' is stored for bob", (["alice", "bob"], [])),
        (
            "INSERT INTO alias_targets VALUES ('team@d1.test', 'Jo@E.test', 1)",
            "the address 'Jo@E.test' is stored for jo@e.test",
            (["alice", "bob"], ["jo@e.test"]),
        ),
        ("INSERT INTO alias_targets VALUES ('gone@d1.test', 'bob', 0)", "belongs to nothing in aliases", (["alice", "bob"], [])),
        ("INSERT INTO alias_targets VALUES ('team@d1.test', 'no address', 1)", "is not an address", None),
        ("INSERT INTO alias_targets VALUES ('team@d1.test', 'two words', 0)", "holds a space", None),
    ],
    ids=["username in capitals", "address in capitals", "no alias", "no address", "no username"],
)
def test_check_looks_at_further_targets(ctl, statement, fault, left):
    assert ctl("db", "check").stdout == "db: nothing is wrong: 1 alias, 0 apps\n"
    with contextlib.closing(sqlite3.connect(ctl.path)) as database, database:
        database.execute(statement)
    result = ctl("db", "check", check=False)
    assert (result.returncode, fault in result.stdout) == (1, True), result.stdout
    assert ctl("db", "check", "--fix", check=False).returncode == (0 if left else 1)
    if left:
        assert alias_of(ctl)[:2] == left


def test_check_does_not_join_two_aliases_of_one_address(ctl):
    with contextlib.closing(sqlite3.connect(ctl.path)) as database, database:
        database.execute("UPDATE aliases SET alias_email = 'TEAM@d1.test'")
        database.execute("UPDATE alias_targets SET alias_email = 'TEAM@d1.test'")
        database.execute("INSERT INTO aliases (alias_email, username) VALUES ('Team@d1.test', 'carol')")
        database.execute("INSERT INTO alias_targets VALUES ('Team@d1.test', 'mallory', 0)")
    result = ctl("db", "check", "--fix", check=False)
    assert (result.returncode, "has another state" in result.stdout) == (1, True)
    assert alias_of(ctl)[:2] == (["alice", "bob"], [])


def test_target_without_its_alias_harms_no_command(ctl):
    with contextlib.closing(sqlite3.connect(ctl.path)) as database, database:
        database.execute("INSERT INTO alias_targets VALUES ('gone@d1.test', 'bob', 0)")
    assert ctl("aliases", "list", "--user", "bob", "--quiet").stdout == f"{TEAM}\n"
    assert "1 alias now leads to carol" in ctl("aliases", "move", "bob", "carol").stderr


def test_check_corrects_an_alias_with_its_targets(ctl):
    with contextlib.closing(sqlite3.connect(ctl.path)) as database, database:
        database.execute("UPDATE aliases SET alias_email = 'TEAM@d1.test'")
        database.execute("UPDATE alias_targets SET alias_email = 'TEAM@d1.test'")
    assert ctl("db", "check", "--fix").returncode == 0
    assert alias_of(ctl)[:2] == (["alice", "bob"], [])


# ---- a daemon


def test_who_has_left_gets_no_mail_after_the_grace_and_bounces_none(make_daemon, keycloak):
    for name in ("alice", "bob"):
        keycloak.add_user(name, f"{name}@d1.test")
    policy = {"cache_ttl_seconds": 0.1, "negative_cache_ttl_seconds": 0.1, "disappearance_grace_seconds": 1}
    daemon = make_daemon(keycloak=keycloak.config(timeout_seconds=1), policy=policy).start()
    daemon.ctl("aliases", "add", TEAM, "alice", "bob")
    both = "OK alice@d1.test,bob@d1.test"
    assert daemon.ask_map(f"alias {TEAM}") == both
    sender = {"sender": TEAM, "sasl_username": "bob", "sasl_method": "XOAUTH2", "policy_context": "sender"}
    assert daemon.ask(**sender) == "DUNNO"
    keycloak.users = [user for user in keycloak.users if user["username"] != "bob"]
    wait_until(lambda: daemon.ask(**sender).startswith("451"), what="grace")
    assert (daemon.ask(recipient=TEAM), daemon.ask_map(f"alias {TEAM}")) == ("DUNNO", both)
    wait_until(lambda: daemon.ask_map(f"alias {TEAM}") == "OK alice@d1.test", what="end of the grace")
    assert (daemon.ask(recipient=TEAM), daemon.ask(**sender)[:3]) == ("DUNNO", "553")
    keycloak.users = [{**user, "enabled": False} for user in keycloak.users]
    wait_until(lambda: daemon.ask(recipient=TEAM) == "550 5.1.1 No such user", what="nobody left")
    assert daemon.ask_map(f"alias {TEAM}") == "TEMP all users have left"
    assert "reason=alias-users-gone" in daemon.log()
    explained = run_ctl("--config", daemon.config_path, "ask", "recipient", TEAM).stdout
    assert "each of its several users has left Keycloak or is disabled there" in explained
    assert f"mailcloakctl aliases add-user {TEAM} USERNAME" in explained
    assert re.search(r"has the user left: alice +yes, gone or disabled", explained)
    keycloak.fault = "status-503"
    wait_until(lambda: daemon.ask_map(f"alias {TEAM}") == both, what="an outage, in which nobody is left out")
