"""What mailcloakctl asks the daemon before a change, what it refuses, and what syslog keeps of a change."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, Terminal, in_own_dev, run_ctl, wait_until

TOKEN = "a-token-of-some-length"
INTERRUPTIBLE = ("env", "--default-signal=INT")  # where the tests run in the background SIGINT is ignored, and inherited so


@pytest.fixture
def change(keycloak_daemon):
    """mailcloakctl with the configuration of a running daemon; (exit code, standard error)."""

    def run(*arguments, **options):
        result = run_ctl("--config", keycloak_daemon.config_path, *arguments, check=False, **options)
        return result.returncode, result.stderr

    run.daemon = keycloak_daemon
    return run


def rows(daemon, statement="SELECT alias_email, username FROM aliases"):
    with contextlib.closing(sqlite3.connect(daemon.database)) as database:
        return database.execute(statement).fetchall()


# ---- aliases add


def test_alias_that_is_another_users_email_is_refused_unless_force(change):
    code, said = change("aliases", "add", "BOB@d1.test", "alice")
    assert (code, rows(change.daemon)) == (1, [])
    assert said == (
        "mailcloakctl: aliases: bob@d1.test is the primary e-mail of bob, whose mail this alias would take;"
        " name that user too, and both get it, or use --force\n"
    )
    assert change("aliases", "add", "bob@d1.test", "alice", "--force") == (0, "aliases: bob@d1.test leads to alice\n")


@pytest.mark.parametrize("address", ["bob+list@d1.test", "info@d1.test"], ids=["extension", "alias that is there"])
def test_alias_that_takes_another_users_mail_in_other_ways_is_refused(change, keycloak, address):
    if address == "info@d1.test":
        assert change("aliases", "add", address, "carol")[0] == 0
        keycloak.user("bob")["email"] = address
        change("flush")
    code, said = change("aliases", "add", address, "alice", "--replace")
    assert (code, said) == (
        1,
        f"mailcloakctl: aliases: {address} is the primary e-mail of bob, whose mail this alias would take;"
        " name that user too, and both get it, or use --force\n",
    )
    assert change("aliases", "add", address, "alice", "--replace", "--force")[0] == 0


def test_alias_that_takes_no_more_of_another_users_mail_than_before_is_no_question(change):
    assert change("aliases", "add", "bob@d1.test", "alice", "carol", "--force")[0] == 0
    assert change("aliases", "add", "bob@d1.test", "alice", "carol") == (0, "aliases: bob@d1.test leads to alice, carol already\n")
    code, said = change("aliases", "remove-user", "bob@d1.test", "carol")
    assert (code, said) == (0, "aliases: bob@d1.test now leads to alice, no longer to carol\n")
    assert change("aliases", "add-user", "bob@d1.test", "bob")[0] == 0
    code, said = change("aliases", "remove-user", "bob@d1.test", "bob")
    assert code == 1
    assert "is the primary e-mail of bob, whose mail this alias would take" in said


def test_alias_of_an_address_whose_holder_is_in_the_grace_is_refused_unless_force(change, keycloak):
    change.daemon.ask(recipient="bob@d1.test")
    keycloak.users.remove(keycloak.user("bob"))
    change.daemon.config["policy"].update(cache_ttl_seconds=0.1, negative_cache_ttl_seconds=0.1)
    change.daemon.reload()
    wait_until(lambda: change.daemon.ask(recipient="bob@d1.test").startswith("451"), what="the grace")
    code, said = change("aliases", "add", "bob@d1.test", "alice")
    assert (code, rows(change.daemon)) == (1, [])
    assert "has disappeared" in said
    assert said.endswith("; wait until it is certain, or use --force\n")
    assert change("aliases", "add", "bob@d1.test", "alice", "--force")[0] == 0


def test_alias_that_is_its_users_own_email_is_added(change):
    assert change("aliases", "add", "bob@d1.test", "bob") == (0, "aliases: bob@d1.test leads to bob\n")


@pytest.mark.parametrize(
    ("username", "says"),
    [
        ("ghost", "warning: ghost is not a user in Keycloak\n"),
        ("nomail", "warning: nomail is a user without an e-mail in Keycloak\n"),
        ("dora", "warning: dora is disabled in Keycloak\n"),
        ("carol@d2.test", "warning: carol@d2.test is not a username but the e-mail of carol; name carol instead\n"),
    ],
)
def test_alias_of_a_user_who_does_not_count_is_added_with_a_warning(change, keycloak, username, says):
    keycloak.add_user("dora", "dora@d1.test", enabled=False)
    keycloak.add_user("nomail")
    code, said = change("aliases", "add", "info@d1.test", username)
    assert (code, said) == (0, f"{says}aliases: info@d1.test leads to {username}\n")


def test_alias_is_added_with_a_warning_while_keycloak_gives_no_answer(change, keycloak):
    keycloak.fault = "status-500"
    code, said = change("aliases", "add", "info@d1.test", "alice")
    assert code == 0
    assert re.match(
        r"warning: info@d1\.test and its users were not looked up in Keycloak: directory: realm 'mail': .*HTTP 500", said
    )
    assert rows(change.daemon) == [("info@d1.test", "alice")]


def test_alias_is_added_with_a_warning_while_the_daemon_does_not_run(change):
    change.daemon.stop()
    code, said = change("aliases", "add", "info@d1.test", "alice")
    assert code == 0
    assert said.startswith("warning: info@d1.test and its users were not looked up in Keycloak: there is no socket at ")
    assert said.endswith("aliases: info@d1.test leads to alice\n")


@pytest.mark.parametrize(
    ("address", "username", "says"),
    [
        ("*@d1.test", "alice", "*@d1.test would be a catch-all for a whole domain, which is not supported: name each address"),
        ("@d1.test", "alice", "there is nothing before the @, and a catch-all for a whole domain is not supported"),
        (
            "info@d1.test",
            "alice,bob",
            "'alice,bob' holds a space, a comma, a semicolon or an angle bracket; name each user by itself",
        ),
        ("info@d1.test", "alice bob", "'alice bob' holds a space"),
        ("info@d1.test", "a@b@d1.test", "a@b@d1.test is neither a username nor an address: it has more than one @"),
        ("info@d1.test", "al+ice", "al+ice holds a character of policy.recipient_delimiter (+)"),
        ("info@d1.test", "bob@elsewhere.example", "is in elsewhere.example, which is not in policy.domain (d1.test, d2.test)"),
    ],
)
def test_alias_that_cannot_work_is_refused(change, address, username, says):
    code, said = change("aliases", "add", address, username)
    assert (code, rows(change.daemon)) == (1, [])
    assert says in said


# ---- what ask proposes


def proposed(change, *question):
    result = run_ctl("--config", change.daemon.config_path, "ask", *question)
    return re.search(r"change +(.*(?:\n {15}.*)*)", result.stdout)[1]


@pytest.mark.parametrize("question", [("recipient", "new@d1.test"), ("sender", "new@d1.test", "--user", "alice")])
def test_alias_that_ask_proposes_is_not_refused(change, question):
    command = re.search(r"mailcloakctl (aliases add new@d1\.test) USERNAME", proposed(change, *question))
    assert change(*command[1].split(), "alice")[0] == 0


@pytest.mark.parametrize(
    "question",
    [
        ("sender", "bob@d1.test", "--user", "alice"),
        ("recipient", '"a b"@d1.test'),
        ("recipient", "nobody@" + "d" * 250 + ".d1.test"),
    ],
)
def test_alias_that_would_be_refused_is_not_proposed(change, question):
    assert not re.search("aliases add (?!ADDRESS )", proposed(change, *question))  # which is another one


def test_what_is_disabled_is_enabled_and_not_made_again(change, keycloak):
    keycloak.add_user("dora", "dora@d1.test", enabled=False)
    assert proposed(change, "recipient", "dora@d1.test") == "enable the user in Keycloak"
    change("aliases", "add", "info@d1.test", "alice")
    change("aliases", "disable", "info@d1.test")
    for question in (("recipient", "info@d1.test"), ("alias", "info@d1.test"), ("sender", "info@d1.test", "--user", "alice")):
        assert proposed(change, *question) == "mailcloakctl aliases enable info@d1.test"


# ---- apps


def test_address_of_a_user_is_allowed_to_an_app_with_a_warning(change):
    change("apps", "add", "printer", TOKEN)
    said = change("apps", "allow", "printer", "bob@d1.test")[1]
    assert said == "warning: bob@d1.test is the primary e-mail of bob\napps: printer may now send as bob@d1.test\n"
    assert "warning" not in change("apps", "allow", "printer", "scan@d1.test")[1]


def test_token_that_the_app_has_already_changes_nothing(change):
    assert change("apps", "add", "printer", TOKEN, "--owner", "alice")[0] == 0
    before = change.daemon.database.read_bytes()
    code, said = change("apps", "add", "Printer", TOKEN)
    assert (code, said) == (0, "apps: printer has this token already\n")
    assert change.daemon.database.read_bytes() == before
    assert change("apps", "add", "printer", TOKEN + "x")[1] == "apps: printer has a new token, the old one no longer works\n"


@pytest.mark.parametrize("secret_hash", ["{PLAIN}" + TOKEN, "{SCRAM-SHA-256}4096,!,x,y", "{SCRAM-SHA-256}0,YQ==,x,y", ""])
def test_token_of_a_hash_that_cannot_be_compared_is_set(change, secret_hash):
    change("apps", "add", "printer", TOKEN)
    with contextlib.closing(sqlite3.connect(change.daemon.database)) as database, database:
        database.execute("UPDATE apps SET secret_hash = ?", (secret_hash,))
    assert "has a new token" in change("apps", "add", "printer", TOKEN)[1]


def test_generate_for_an_app_that_exists_needs_replace(change):
    change("apps", "add", "printer", TOKEN)
    before = rows(change.daemon, "SELECT * FROM apps")
    code, said = change("apps", "add", "printer", "--generate")
    assert (code, rows(change.daemon, "SELECT * FROM apps")) == (1, before)
    assert said == "mailcloakctl: apps: printer exists already, --replace gives it a new token in place of the old one\n"
    assert "has a new token" in change("apps", "add", "printer", "--generate", "--replace")[1]


@pytest.mark.parametrize("app_id", ["alice", "alice@d1.test", "dora", "nomail"])
def test_app_with_the_name_of_a_user_is_refused_unless_force(change, keycloak, app_id):
    keycloak.add_user("dora", "dora@d1.test", enabled=False)
    keycloak.add_user("nomail")
    code, said = change("apps", "add", app_id, TOKEN)
    assert (code, rows(change.daemon, "SELECT * FROM apps")) == (1, [])
    assert said == (
        f"mailcloakctl: apps: {app_id} is a user in Keycloak, who could no longer log in; choose another app id, or use --force\n"
    )
    assert change("apps", "add", app_id, TOKEN, "--force")[0] == 0
    assert change("apps", "add", app_id, TOKEN) == (0, f"apps: {app_id} has this token already\n")


@pytest.mark.parametrize("verb", ["add", "set"])
def test_owner_who_does_not_exist_is_warned_about(change, verb):
    change("apps", "add", "printer", TOKEN)
    token = [TOKEN] if verb == "add" else []
    code, said = change("apps", verb, "printer", *token, "--owner", "ghost")
    assert (code, "warning: ghost is not a user in Keycloak\n" in said) == (0, True)
    assert rows(change.daemon, "SELECT owner FROM apps") == [("ghost",)]


def test_token_of_seven_characters_is_refused(change):
    code, said = change("apps", "add", "printer", "1234567")
    assert (code, rows(change.daemon, "SELECT * FROM apps")) == (1, [])
    assert said == "mailcloakctl: a token of 7 characters is too short: use at least 8, or --generate\n"
    assert change("apps", "add", "printer", "12345678")[0] == 0


def test_token_stdin_on_a_terminal_prompts(change):
    terminal = Terminal("--config", change.daemon.config_path, "apps", "add", "printer", "--token-stdin")
    for prompt in ("token of printer: ", "again: "):
        terminal.expect(prompt)
        terminal.type(TOKEN + "\n")
    assert terminal.end()[0] == 0


# ---- Ctrl-C


@pytest.mark.parametrize("verb", ["add", "list"])
def test_interrupt_ends_a_wait_for_the_lock_at_once(change, verb):
    arguments = ["add", "info@d1.test", "alice"] if verb == "add" else ["list"]
    command = [*INTERRUPTIBLE, sys.executable, ROOT / "mailcloakctl.py", "--db", change.daemon.database, "aliases", *arguments]
    with contextlib.closing(sqlite3.connect(change.daemon.database, isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        # it looks again and again, so its processor time goes on
        wait_until(lambda: opens(process.pid, change.daemon.database), what="the wait for the lock")
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        _, said = process.communicate(timeout=30)
    assert time.monotonic() - started < 5
    assert (process.returncode, said) == (1, "mailcloakctl: interrupted, no alias or app was changed\n")
    assert rows(change.daemon) == []


def opens(pid, path):
    """Has the process opened this file?"""
    with contextlib.suppress(FileNotFoundError):
        return any(os.path.realpath(f"/proc/{pid}/fd/{name}") == os.path.realpath(path) for name in os.listdir(f"/proc/{pid}/fd"))
    return False


@pytest.mark.parametrize("milliseconds", range(0, 400, 20))
def test_interrupt_shows_no_traceback_at_any_moment(change, milliseconds):
    """And what it says is true."""
    arguments = ["--db", change.daemon.database, "aliases", "add", "info@d1.test", "alice"]
    command = [*INTERRUPTIBLE, sys.executable, ROOT / "mailcloakctl.py", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    time.sleep(milliseconds / 1000)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    lines = list(
        map(int, re.findall(r'mailcloakctl\.py", line (\d+)', said))
    )  # none but of Python's own start, which is before these
    assert max(lines, default=0) <= 1 + (ROOT / "mailcloakctl.py").read_text().split("\n").index("import signal")
    if "no alias or app was changed" in said:
        assert rows(change.daemon) == []
    if process.returncode == 0:
        assert rows(change.daemon) == [("info@d1.test", "alice")]


# ---- words of the command line that are wrong


@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [
        (("aliases", "list", "--jsn"), "unknown option --jsn; did you mean '--json'?", 2),
        (("apps", "add", "printer", "--generat"), "unknown option --generat; did you mean '--generate'?", 2),
        (("apps", "add", "printer", "--token", "abc"), "unknown option --token; did you mean '--token-stdin'?", 2),
        (("apps", "add", "printer", "--genrate"), "unknown option --genrate; did you mean '--generate'?", 2),
        (("--jsn", "aliases", "list"), "unknown option --jsn; did you mean '--json'?", 2),
        (("alias", "list"), "unknown word 'alias'; did you mean 'aliases'?", 2),
        (("aliases", "dell", "info@d1.test"), "unknown word 'dell'; did you mean 'del'?", 2),
        (("aliases", "remove", "info@d1.test"), "unknown word 'remove'; did you mean 'del' or 'remove-user'?", 2),
        (("apps", "remove", "printer"), "unknown word 'remove'; did you mean 'del'?", 2),
        (("flush", "a", "b"), "mailcloakctl flush: 1 word too many", 2),
        (("ask", "sender", "info@d1.test", "bob"), "mailcloakctl ask sender: 1 word too many", 2),
        (("ask", "recipient", "info@d1.test", "--user", "bob"), "mailcloakctl ask recipient: an unknown option", 2),
        (
            ("aliases", "hunter2"),
            "unknown word, expected one of add, add-user, remove-user, list, show, move, del, enable, disable, export, import, sync",
            2,
        ),
        (("doctor", "--jsn"), "unknown option --jsn; did you mean '--json'?", 3),
    ],
)
def test_usage_error_names_the_word_that_is_wrong(tmp_path, arguments, says, code):
    result = run_ctl("--db", tmp_path / "none" / "state.db", *arguments, check=False)
    assert result.returncode == code
    assert says in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("apps", "add", "printer", "--secret-of-mine"),
        ("apps", "hunter22hunter22"),
        ("hunter22hunter22",),
        ("apps", "allow", "printer", "a@d1.test", "hunter22hunter22"),
        ("apps", "add", "printer", "first", "hunter22hunter22"),
    ],
)
def test_token_in_the_wrong_place_is_not_shown(tmp_path, arguments):
    result = run_ctl("--db", tmp_path / "state.db", *arguments, check=False)
    assert result.returncode == 2
    assert arguments[-1] not in result.stdout + result.stderr


# ---- syslog


def noted_in_syslog(directory, *commands):
    """What mailcloakctl writes to syslog when it runs these commands on one database, one line each."""
    path, database = directory / "dev-log", directory / "state.db"
    lines = []
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as syslog:
        syslog.bind(str(path))
        reader = threading.Thread(target=lambda: [lines.append(line) for line in iter(lambda: syslog.recv(2000), b"end")])
        reader.start()
        for arguments in commands:
            command = [sys.executable, ROOT / "mailcloakctl.py", "--db", database, *arguments]
            subprocess.run(in_own_dev(map(str, command), path), check=False, env={**os.environ, "SUDO_USER": "joe"}, timeout=60)
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"end", str(path))
        reader.join(10)
    return [re.fullmatch(r"<21>\w+ +\d+ [\d:]+ mailcloakctl\[\d+\]: (.*)\0?\n?", line.decode())[1] for line in lines]


@pytest.mark.real("root")
def test_each_change_is_a_line_in_syslog_without_a_token(short_dir):
    found = noted_in_syslog(
        short_dir,
        ("aliases", "add", "info@d1.test", "alice"),
        ("aliases", "add", "info@d1.test", "alice"),  # is so already: no line
        ("aliases", "add", "info@d1.test", "bob", "--replace"),
        ("aliases", "disable", "info@d1.test"),
        ("aliases", "del", "info@d1.test"),
        ("aliases", "del", "info@d1.test"),  # refused: no line
        ("apps", "add", "printer", TOKEN, "--owner", "al ice"),
        ("apps", "allow", "printer", "<>"),
        ("apps", "set", "printer", "--owner", ""),
        ("apps", "disallow", "printer", "<>"),
    )
    assert found == [
        f"{text} uid=0 sudo_user=joe"
        for text in (
            "aliases: add <info@d1.test> username=alice",
            "aliases: add <info@d1.test> username=bob before=alice",
            "aliases: disable <info@d1.test>",
            "aliases: del <info@d1.test> username=bob",
            "apps: add <printer>",
            "apps: set <printer> owner=al\\x20ice",
            "apps: allow <printer> sender=\\x3c\\x3e",
            "apps: set <printer> owner=none before=al\\x20ice",
            "apps: disallow <printer> sender=\\x3c\\x3e",
        )
    ]


@pytest.mark.real("root")
def test_sync_writes_a_line_for_each_of_the_first_changes_and_one_for_all(short_dir):
    few, many, copy = (short_dir / name for name in ("few.csv", "many.csv", "copy.db"))
    few.write_text("a@d1.test,alice\nb@d1.test,bob,0\n")
    many.write_text("a@d1.test,carol\n" + "".join(f"n{number:03}@d1.test,dora\n" for number in range(120)))
    found = noted_in_syslog(
        short_dir,
        ("aliases", "import", few),
        ("aliases", "import", few, "--dry-run"),  # changes nothing: no line
        ("aliases", "import", few),
        ("backup", copy),
        ("aliases", "sync", many, "--missing", "disable"),
        ("aliases", "move", "carol", "eve"),
        ("restore", copy),
    )
    assert [line.removesuffix(" uid=0 sudo_user=joe") for line in found] == [
        "aliases: import: add <a@d1.test> username=alice",
        "aliases: import: add <b@d1.test> username=bob enabled=no",
        f"aliases: import <{few}> added=2",
        "aliases: sync: change <a@d1.test> username=carol before=alice",
        *(f"aliases: sync: add <n{number:03}@d1.test> username=dora" for number in range(99)),
        f"aliases: sync <{many}> changed=1 added=120",
        "aliases: move: change <a@d1.test> username=eve before=carol",
        "aliases: move <carol> changed=1",
        f"restore <{copy}> rows=121",
    ]
