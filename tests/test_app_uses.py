"""When and from where each app was last used: what the daemon notes of it, and what apps list makes of that."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import time

import pytest
from conftest import ROOT, USERS, as_nobody, run_ctl, wait_until
from test_database_faults import fill_disk, small_disk  # noqa: F401  a fixture

import mailcloak
import mailcloakcommon
import mailcloakctl

DAY = 86400
AS_APP = {"sasl_username": "printer", "sasl_method": "PLAIN", "sender": "scan@d1.test", "client_address": "192.0.2.7"}
CANNOT = "warning last-used: cannot be used, tried again until it can path="


@pytest.fixture
def daemon(make_daemon):
    """A running daemon; printer may send as scan, shop as shop."""
    return with_apps(make_daemon(static_users=USERS))


def with_apps(daemon):
    daemon.start()
    for app in ("printer", "shop"):
        sender = {"printer": "scan@d1.test", "shop": "shop@d1.test"}[app]
        change(
            daemon.database,
            f"INSERT INTO apps (app_id, secret_hash, created_at) VALUES ('{app}', '{{X}}hash', 1700000000)",
            f"INSERT INTO app_from (app_id, from_addr) VALUES ('{app}', '{sender}')",
        )
    wait_until(uses_path(daemon).exists, what="the file of uses")
    return daemon


def change(database, *statements):
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def uses_path(daemon):
    return daemon.database.parent / "last-used.json"


def clients(daemon):
    """From where each app was last used, as the file says."""
    return {app: use["client"] for app, use in json.loads(uses_path(daemon).read_text())["apps"].items()}


def wait_for_uses(daemon, **expected):
    wait_until(lambda: clients(daemon) == expected, what=f"uses {expected}")


def listed(daemon, *arguments):
    """What apps list says of uses, by app."""
    rows = json.loads(daemon.ctl("apps", "list", "--json", *arguments).stdout)
    return {row["app_id"]: (row["last_used"], row["client"]) for row in rows}


# ---- what the daemon notes


@pytest.mark.parametrize(
    "request_", [{"recipient": "x@elsewhere.test"}, {"recipient": "alice@d1.test"}, {"protocol_state": "MAIL"}], ids=str
)
def test_use_of_an_app_is_noted_with_time_and_client(daemon, request_):
    before = int(time.time())
    assert daemon.ask(**AS_APP, **request_) == "DUNNO"
    wait_for_uses(daemon, printer="192.0.2.7")
    found = listed(daemon)
    assert found["shop"] == (None, None)
    assert found["printer"][1] == "192.0.2.7"
    assert before <= found["printer"][0] <= time.time()
    heading, row, _ = daemon.ctl("apps", "list").stdout.splitlines()
    assert re.fullmatch(r".*  LAST USED         CLIENT     FROM ADDR", heading)
    assert row.endswith(f"  {mailcloakcommon.shown_time(found['printer'][0])}  192.0.2.7  scan@d1.test")


@pytest.mark.parametrize(
    "request_",
    [
        {"sender": "alice@d1.test"},
        {"sasl_username": "alice", "sender": "alice@d1.test"},
        {"sasl_method": "XOAUTH2"},
        {"sasl_username": "", "sender": "x@elsewhere.test"},
        {"recipient": "nobody@d1.test"},
        {"client_address": ""},
    ],
    ids=["foreign sender", "user", "token", "no login", "unknown recipient", "no client"],
)
def test_request_that_is_no_use_of_an_app_is_not_noted(daemon, request_):
    daemon.ask(**{**AS_APP, **request_})
    daemon.ask(sasl_username="shop", sasl_method="PLAIN", sender="shop@d1.test", client_address="192.0.2.8")
    wait_for_uses(daemon, shop="192.0.2.8")


def test_question_of_mailcloakctl_is_no_use(daemon):
    asked = run_ctl("--config", daemon.config_path, "ask", "sender", "scan@d1.test", "--user", "printer")
    assert "reason" in asked.stdout
    assert "DUNNO" in asked.stdout
    daemon.ask(sasl_username="shop", sasl_method="PLAIN", sender="shop@d1.test", client_address="192.0.2.8")
    wait_for_uses(daemon, shop="192.0.2.8")


def test_uses_within_a_minute_are_one_write_though_answers_are_recalled(daemon):
    client = daemon.policy()
    assert client.ask(**AS_APP) == "DUNNO"
    wait_for_uses(daemon, printer="192.0.2.7")
    file = uses_path(daemon).stat()
    for number in range(200):
        assert client.ask(**{**AS_APP, "client_address": f"198.51.100.{number}"}) == "DUNNO"
    assert client.ask(sasl_username="shop", sasl_method="PLAIN", sender="shop@d1.test", client_address="192.0.2.8") == "DUNNO"
    wait_for_uses(daemon, printer="192.0.2.7", shop="192.0.2.8")
    assert uses_path(daemon).stat().st_ino != file.st_ino
    assert json.loads(daemon.ask_map("stats *").partition(" ")[2])["recalled_answers"]["given"] >= 199


def test_recalled_answer_is_noted_when_its_minute_is_over(tmp_path):
    uses = mailcloak.AppUses(str(tmp_path / "last-used.json"))
    for now, client in ((100.0, "192.0.2.1"), (159.9, "192.0.2.2"), (160.0, "192.0.2.3"), (219.9, "192.0.2.4")):
        uses.note("printer", mailcloak.PolicyRequest(text=f"\nclient_address={client}\n"), now)
    uses.close(5)
    assert mailcloak.read_app_uses(str(tmp_path / "last-used.json"))["apps"]["printer"]["client"] == "192.0.2.3"


def test_use_is_kept_over_a_restart(daemon):
    daemon.ask(**AS_APP)
    assert daemon.stop() == 0
    since = json.loads(uses_path(daemon).read_text())["since"]
    assert clients(daemon) == {"printer": "192.0.2.7"}, "the end waits for what is noted"
    daemon.start()
    daemon.ask(sasl_username="Shop", sasl_method="PLAIN", sender="shop@d1.test", client_address="2001:db8::8")
    wait_for_uses(daemon, printer="192.0.2.7", shop="2001:db8::8")
    assert json.loads(uses_path(daemon).read_text())["since"] == since


@pytest.mark.long
def test_use_that_is_on_the_disk_outlives_a_kill(daemon):
    daemon.ask(**AS_APP)
    wait_for_uses(daemon, printer="192.0.2.7")
    for number in range(20):
        change(daemon.database, f"INSERT INTO apps (app_id, secret_hash) VALUES ('app{number}', '{{X}}hash')")
        change(daemon.database, f"INSERT INTO app_from (app_id, from_addr) VALUES ('app{number}', 'shop@d1.test')")
        daemon.ask(**{**AS_APP, "sasl_username": f"app{number}", "sender": "shop@d1.test"})
        time.sleep(number / 10_000)
        daemon.process.send_signal(signal.SIGKILL)
        daemon.process.wait()
        assert "printer" in clients(daemon), "whole, as it was before or after"
        daemon.start()
    daemon.ask(**{**AS_APP, "sasl_username": "shop", "sender": "shop@d1.test"})
    wait_until(lambda: clients(daemon).get("shop") == "192.0.2.7", what="a use after the kills")
    assert CANNOT not in daemon.log()


def test_file_is_the_daemons_alone_and_the_database_is_not_written(daemon):
    os.chmod(daemon.database, 0o444)
    before = daemon.database.read_bytes()
    daemon.ask(**AS_APP)
    wait_for_uses(daemon, printer="192.0.2.7")
    assert stat.S_IMODE(uses_path(daemon).stat().st_mode) == 0o600
    assert daemon.database.read_bytes() == before


def test_client_cannot_write_anything_but_text(daemon):
    daemon.ask(**{**AS_APP, "client_address": '"\x1b[2J\udcff' + "x" * 5000})
    wait_until(lambda: clients(daemon), what="the use")
    assert clients(daemon)["printer"].startswith(r"\x22\x1b[2J\udcffxxx")
    assert len(clients(daemon)["printer"]) < 400
    assert "\x1b" not in daemon.ctl("apps", "list").stdout


# ---- faults of the file


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ("[]", "it is not what the daemon writes"),
        ('{"since": "x", "apps": {}}', "it is not what the daemon writes"),
        ("[" * 100_000, "while decoding a JSON array"),
        ("\xff", "utf-8"),
    ],
    ids=["cut", "empty", "list", "time", "deep", "bytes"],
)
@pytest.mark.long
def test_file_that_makes_no_sense_stays_and_is_a_warning_until_it_is_deleted(daemon, content, reason):
    uses_path(daemon).write_text(content, encoding="latin-1")
    assert daemon.ask(**AS_APP) == "DUNNO"
    daemon.wait_for_log(CANNOT)
    assert reason in daemon.log()
    time.sleep(1.5)  # it is tried again meanwhile
    assert daemon.log().count(CANNOT) == 1
    assert uses_path(daemon).read_text(encoding="latin-1") == content
    said = daemon.ctl("apps", "list").stderr
    assert said.startswith(
        f"warning: it is not known when apps were last used: {uses_path(daemon)}: it is not what the daemon writes; "
    )
    assert said.count("\n") == 1
    uses_path(daemon).unlink()
    wait_for_uses_of_a_new_file(daemon)
    assert daemon.log().count("warning last-used: written again path=") == 1


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.symlink_to("/dev/zero"), "Too many levels of symbolic links"),
        (lambda path: (path.touch(), os.truncate(path, 2**40)), "it is not what the daemon writes"),
        (os.mkfifo, "it is not a regular file"),
        (os.mkdir, "it is not a regular file"),
    ],
    ids=["link", "sparse", "fifo", "directory"],
)
def test_what_is_no_file_of_uses_is_read_in_little_memory_and_no_link_is_followed(tmp_path, make, reason):
    database = tmp_path / "state.db"
    mailcloak.prepare_database(str(database), 5)
    path = tmp_path / "last-used.json"
    make(path)
    limit = f"ulimit -v 1000000; exec {sys.executable} {ROOT}/mailcloakctl.py --db {database} apps list"
    said = subprocess.run(["/bin/sh", "-c", limit], capture_output=True, text=True, timeout=60, check=False)
    warning = f"warning: it is not known when apps were last used: {path}: {reason}; delete it, and the daemon begins a new one\n"
    assert (said.returncode, said.stderr) == (0, warning)


def wait_for_uses_of_a_new_file(daemon):
    wait_until(uses_path(daemon).exists, what="a new file")
    wait_for_uses(daemon, printer="192.0.2.7")


def test_what_the_file_says_that_makes_no_sense_of_one_app_stays(daemon):
    known = {"since": 1, "apps": {"old": 7, "other": {"last_used": "x", "client": 5}, "gone": {"last_used": 1e400, "client": "a"}}}
    uses_path(daemon).write_text(json.dumps(known))
    daemon.ask(**AS_APP)
    wait_until(lambda: "printer" in json.loads(uses_path(daemon).read_text())["apps"], what="the use")
    apps = json.loads(uses_path(daemon).read_text())["apps"]
    assert {**apps, "printer": None} == {**known["apps"], "printer": None}


@pytest.mark.real("root")
@pytest.mark.parametrize("what", ["room", "files"])
def test_full_disk_keeps_what_is_in_the_file(make_daemon, small_disk, what):  # noqa: F811
    daemon = with_apps(make_daemon(static_users=USERS, sqlite={"path": str(small_disk / "state.db")}))
    daemon.ask(**AS_APP)
    wait_for_uses(daemon, printer="192.0.2.7")
    clear = fill_disk(small_disk, what)
    assert daemon.ask(sasl_username="shop", sasl_method="PLAIN", sender="shop@d1.test", client_address="192.0.2.8") == "DUNNO"
    daemon.wait_for_log(CANNOT)
    assert 'reason="No space left on device"' in daemon.log()
    assert clients(daemon) == {"printer": "192.0.2.7"}
    clear()
    wait_for_uses(daemon, printer="192.0.2.7", shop="192.0.2.8")


def test_file_that_cannot_be_replaced_stops_no_answer_and_no_end(daemon):
    (daemon.directory / "last-used.json.new").mkdir()
    assert daemon.ask(**AS_APP) == "DUNNO"
    daemon.wait_for_log(CANNOT)
    assert daemon.ask(**AS_APP) == "DUNNO"
    assert daemon.stop() == 0


def test_end_writes_what_could_not_be_written_before(daemon):
    (daemon.directory / "last-used.json.new").mkdir()
    daemon.ask(**AS_APP)
    daemon.wait_for_log(CANNOT)
    (daemon.directory / "last-used.json.new").rmdir()
    assert daemon.stop() == 0
    assert clients(daemon) == {"printer": "192.0.2.7"}


# ---- apps list


@pytest.fixture
def noted(daemon):
    """The daemon, ended; a function that writes what it would have noted: days ago, by app."""
    daemon.stop()

    def noted(since, **apps):
        uses = {app: {"last_used": int(time.time() - days * DAY), "client": "192.0.2.7"} for app, days in apps.items()}
        uses_path(daemon).write_text(json.dumps({"since": int(time.time() - since * DAY), "apps": uses}))

    noted.daemon = daemon
    return noted


def test_unused_lists_apps_that_were_not_used_for_so_long(noted):
    change(noted.daemon.database, "INSERT INTO apps (app_id, secret_hash) VALUES ('new', '{X}hash')")
    noted(200, printer=89, shop=91)
    assert set(listed(noted.daemon, "--unused", "90d")) == {"shop"}
    assert set(listed(noted.daemon, "--unused", "80d")) == {"printer", "shop"}
    noted(200, printer=10)
    assert set(listed(noted.daemon, "--unused", "90d")) == {"shop"}, "never used, and made before; new was made a moment ago"
    assert listed(noted.daemon)["new"] == (None, None)


def test_unused_lists_no_app_that_may_have_been_used_before_uses_were_noted(noted):
    noted(30, printer=10)
    result = noted.daemon.ctl("apps", "list", "--unused", "20d")
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["APP", "shop"]
    assert result.stderr == ""
    result = noted.daemon.ctl("apps", "list", "--unused", "90d")
    assert result.stdout == ""
    since = mailcloakcommon.shown_time(time.time() - 30 * DAY)[:-3]
    assert result.stderr.startswith(f"warning: uses are noted since {since}")
    assert result.stderr.endswith(" only, apps without one are not listed yet\n")


def test_use_of_an_app_that_had_the_name_before_is_not_shown(noted):
    noted(200, printer=100)
    change(noted.daemon.database, f"UPDATE apps SET created_at = {int(time.time()) - 99 * DAY} WHERE app_id = 'printer'")
    assert listed(noted.daemon)["printer"] == (None, None)
    assert "printer" not in listed(noted.daemon, "--unused", "100d")
    assert "printer" in listed(noted.daemon, "--unused", "90d")


@pytest.mark.parametrize("use", [7, None, [], {}, {"last_used": "x", "client": "y"}, {"last_used": 1e400, "client": "y"}], ids=str)
def test_use_that_makes_no_sense_is_shown_as_none(noted, use):
    uses_path(noted.daemon).write_text(json.dumps({"since": 1, "apps": {"printer": use}}))
    assert listed(noted.daemon)["printer"] == (None, None)
    row = next(line for line in noted.daemon.ctl("apps", "list").stdout.splitlines() if line.startswith("printer"))
    assert row.split()[-3:] == ["-", "-", "scan@d1.test"]


@pytest.mark.parametrize("days", ["", "0d", "90", "d", "-1d", "90 d", "123456d"])
def test_days_that_make_no_sense_are_refused(daemon, days):
    result = daemon.ctl("apps", "list", f"--unused={days}", check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert f"{days!r} is not a number of days such as 90d" in result.stderr


def test_where_nothing_was_noted_yet_nothing_is_said_of_uses_and_nobody_is_unused(noted):
    uses_path(noted.daemon).unlink()
    assert noted.daemon.ctl("apps", "list").stderr == ""
    assert listed(noted.daemon) == {"printer": (None, None), "shop": (None, None)}
    result = noted.daemon.ctl("apps", "list", "--unused", "90d", check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert "apps: it is not known which are unused: " in result.stderr
    assert result.stderr.endswith("; the daemon makes it when it starts\n")


@pytest.mark.real("root")
@pytest.mark.parametrize("options", [[], ["--json"], ["--unused", "90d"]], ids=" ".join)
def test_user_who_may_not_read_the_file_is_told_so_once(noted, options):
    noted(200, printer=10)
    noted.daemon.database.chmod(0o644)

    def list_apps():
        shown, said = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(said):
            code = mailcloakctl.main(["--db", str(noted.daemon.database), "apps", "list", *options])
        return json.dumps([code, shown.getvalue(), said.getvalue()])

    code, shown, said = json.loads(as_nobody(list_apps))
    assert said.count(f"{uses_path(noted.daemon)}: Permission denied; run mailcloakctl as user root or as root\n") == 1
    assert said.count("\n") == 1
    if options == ["--unused", "90d"]:
        assert (code, shown) == (1, "")
    else:
        assert code == 0
        assert "192.0.2.7" not in shown
        assert ('"last_used": null' if options else "  -          -       scan@d1.test") in shown
