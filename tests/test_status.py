"""mailcloakctl status and flush, what they say about a daemon that does not answer, and how tables and colours fit a terminal."""

# ruff: noqa: F811  the fixtures of test_ask are used here as well
from __future__ import annotations

import contextlib
import grp
import io
import json
import os
import pwd
import re
import resource
import shutil
import socket
import sqlite3

import pytest
import yaml
from conftest import ROOT, USERS, Terminal, as_nobody, run_ctl, wait_until
from prometheus_client.parser import text_string_to_metric_families
from test_ask import FakeDaemon, config_path, ctl, fake  # noqa: F401  fixtures

import mailcloak
import mailcloakask
import mailcloakcommon
import mailcloakctl

STATS = {
    "version": mailcloak.__version__,
    "pid": 4711,
    "config": "/etc/mailcloak/config.yaml",
    "started_at": 1763900000.0,
    "uptime_seconds": 274980.5,
    "last_reload": {"at": 1763990000.0, "ok": True},
    "answers": [
        {"service": "policy", "answer": "DUNNO", "reason": "primary,sender-not-local", "count": 30},
        {"service": "policy", "answer": "550", "reason": "unknown-recipient", "count": 700},
        {"service": "socketmap", "answer": "OK", "reason": "alias", "count": 5},
    ],
    "recalled_answers": {"given": 10, "kept": 4},
    "seconds": {
        "policy": {"bounds": [0.0001, 0.001, 0.01, 0.1, 1.0, 10.0], "counts": [600, 100, 27, 2, 1, 0, 0], "sum": 1.46},
        "socketmap": {"bounds": [0.0001, 0.001, 0.01, 0.1, 1.0, 10.0], "counts": [0, 0, 0, 0, 0, 0, 5], "sum": 60.0},
    },
    "lookups": {"cache": 11, "keycloak": 7, "outage": 2, "failed": 1},
    "cache": {"users": 812, "missing": 3, "limit": 100000},
    "saved": {"path": "/var/lib/mailcloak/last-known.db", "works": True, "waiting": 0},
    "keycloak": {"state": "answers", "since_seconds": None, "failure": "", "requests": 30, "failed": 2, "seconds": 0.6},
    "database": {"path": "/var/lib/mailcloak/state.db", "works": True},
    "connections": {"policy": 3, "socketmap": 2, "limit": 1000},
}


def changed(**changes):
    return {**STATS, **changes}


def status_lines(stats, width=None):
    return "\n".join(mailcloakask.format_status(stats, width, "its place"))


# ---- for people


def test_status_shows_how_the_daemon_is_and_its_answers_most_frequent_first(fake, ctl):
    fake.maps["stats"] = f"OK {json.dumps(STATS)}"
    code, shown, said = ctl("status")
    assert (code, said) == (0, "")
    assert fake.asked == [("socketmap", "7:stats *,")]
    lines = shown.splitlines()
    assert lines[0] == f"mailcloak {mailcloak.__version__}, pid 4711, up 3 d 4 h"
    assert lines[1] == f"configuration  /etc/mailcloak/config.yaml, reloaded {mailcloakcommon.shown_time(1763990000)}"
    assert lines[2] == "Keycloak       answers; 30 requests, 2 failed, 20 ms each"
    assert lines[3] == "database       /var/lib/mailcloak/state.db, works"
    assert lines[4] == "connections    policy 3, socketmap 2; at most 1000 each"
    assert lines[5] == "cached         users 812, names without a user 3; at most 100000"
    assert lines[6] == "saved          /var/lib/mailcloak/last-known.db, works"
    assert lines[7] == "lookups        in the cache 11, at Keycloak 7, in the cache in an outage 2, without an answer 1"
    assert lines[8] == "answers        735, of which 10 were recalled; 4 can be recalled now"
    assert lines[9] == "policy time    2 ms on average, 99 of 100 within 10 ms"
    assert lines[10] == "socketmap time 12 s on average, more than 1 of 100 longer than 10 s"
    assert [re.split("  +", line) for line in lines[12:]] == [
        ["SERVICE", "ANSWER", "COUNT", "REASON"],
        ["policy", "550", "700", "unknown-recipient"],
        ["policy", "DUNNO", "30", "primary,sender-not-local"],
        ["socketmap", "OK", "5", "alias"],
    ]


def test_status_names_what_is_wrong():
    stats = changed(
        last_reload={"at": 1763990000.0, "ok": False},
        keycloak={**STATS["keycloak"], "state": "away", "since_seconds": 130.0, "failure": "timed out"},
        database={"path": "/x.db", "works": False},
        saved={"path": "/y.db", "works": False, "waiting": 7},
    )
    shown = status_lines(stats)
    assert "/y.db, cannot be used, its log (its place) says why, 7 changes are not on the disk yet\n" in shown
    assert ": refused, the one before it is in force\n" in shown
    assert "Keycloak       away for 2 min 10 s: timed out; 30 requests" in shown
    assert "/x.db, cannot be used\n" in shown


def test_status_of_a_daemon_that_was_never_reloaded_and_asks_no_keycloak():
    shown = status_lines(changed(last_reload=None, keycloak=None, saved=None))
    assert f", read at start, {mailcloakcommon.shown_time(1763900000)}\n" in shown
    assert "Keycloak       not asked: static_users" in shown


def test_time_that_the_daemon_does_not_tell_is_not_said_to_be_now():
    assert ", read at start, -\n" in status_lines(changed(started_at=None, last_reload=None))


@pytest.mark.parametrize(
    "stats",
    [{}, dict.fromkeys(STATS), changed(version="0.0.9"), changed(version=7)],
    ids=["empty", "null", "older", "number"],
)
def test_statistics_of_another_version_are_refused_with_both_versions(fake, ctl, stats):
    fake.maps["stats"] = f"OK {json.dumps(stats)}"
    theirs = stats.get("version", "unknown")
    says = f"mailcloakctl: the running daemon is version {theirs}, this is {mailcloak.__version__}; restart it\n"
    assert ctl("status") == (1, "", says)
    assert ctl("status", "--json") == (1, "", says)
    code, shown, said = ctl("status", "--prometheus", "-")
    assert (code, said) == (0, says)
    assert values(parsed(shown)["mailcloak_up"]) == {("",): 1}, "it answers, so it is up"
    assert len(parsed(shown)) == 1


def test_status_escapes_what_the_daemon_says():
    stats = changed(config="/etc/\x1b[2J", keycloak={**STATS["keycloak"], "state": "away", "failure": "\x1b]0;x\x07"})
    assert "\x1b" not in status_lines({**stats, "version": "\x1b", "answers": [{**STATS["answers"][0], "reason": "\x1b"}]})


def test_status_as_json_is_what_the_daemon_says(fake, ctl):
    fake.maps["stats"] = f"OK {json.dumps(STATS)}"
    assert json.loads(ctl("status", "--json")[1]) == STATS


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.00012, "0.12 ms"),
        (1.5, "1.5 s"),
        (59.99, "60 s"),
        (60, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (7230, "2 h 0 min"),
        (90000, "1 d 1 h"),
        (float("nan"), "nan d nan h"),
    ],
)
def test_span_of_time_in_words(seconds, shown):
    assert mailcloakcommon.shown_seconds(seconds) == shown


# ---- for Prometheus


def parsed(text):
    """The families by name, by the reference parser; each must be there once."""
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    samples = [(sample.name, tuple(sorted(sample.labels.items()))) for family in families for sample in family.samples]
    assert len(samples) == len(set(samples)), "a sample is there twice"
    assert all(name.startswith("mailcloak_") for name in names)
    assert all(family.documentation and family.type != "unknown" for family in families)
    return {family.name: family for family in families}


def metrics_of(stats):
    return mailcloakask.format_metrics(mailcloakask.daemon_metrics(stats))


def values(family):
    return {(sample.name.partition(family.name)[2], *sample.labels.values()): sample.value for sample in family.samples}


def test_metrics_are_valid_and_complete():
    families = parsed(metrics_of(STATS))
    assert values(families["mailcloak_up"]) == {("",): 1}
    assert values(families["mailcloak_info"]) == {("", mailcloak.__version__): 1}
    assert families["mailcloak_answers"].type == "counter"
    assert values(families["mailcloak_answers"]) == {
        ("_total", "policy", "DUNNO", "primary,sender-not-local"): 30,
        ("_total", "policy", "550", "unknown-recipient"): 700,
        ("_total", "socketmap", "OK", "alias"): 5,
    }
    assert values(families["mailcloak_lookups"]) == {
        ("_total", "cache"): 11,
        ("_total", "keycloak"): 7,
        ("_total", "outage"): 2,
        ("_total", "failed"): 1,
    }
    singles = {name: next(iter(values(family).values())) for name, family in families.items() if len(family.samples) == 1}
    expected = {
        "start_time_seconds": 1763900000,
        "last_reload_time_seconds": 1763990000,
        "last_reload_success": 1,
        "recalled_answers_given": 10,
        "recalled_answers": 4,
        "cache_users": 812,
        "cache_missing": 3,
        "cache_limit": 100000,
        "saved_up": 1,
        "saved_waiting": 0,
        "keycloak_up": 1,
        "keycloak_requests": 30,
        "keycloak_failed_requests": 2,
        "keycloak_request_seconds": 0.6,
        "database_up": 1,
        "connections_limit": 1000,
    }
    assert {
        name[len("mailcloak_") :]: value for name, value in singles.items() if name not in ("mailcloak_up", "mailcloak_info")
    } == (expected)
    assert values(families["mailcloak_connections"]) == {("", "policy"): 3, ("", "socketmap"): 2}


def test_histogram_is_cumulative_and_ends_in_infinity():
    family = parsed(metrics_of(STATS))["mailcloak_answer_seconds"]
    assert family.type == "histogram"
    policy = [(sample.labels.get("le"), sample.value) for sample in family.samples if sample.labels["service"] == "policy"]
    assert policy == [
        ("0.0001", 600),
        ("0.001", 700),
        ("0.01", 727),
        ("0.1", 729),
        ("1.0", 730),
        ("10.0", 730),
        ("+Inf", 730),
        (None, 1.46),
        (None, 730),
    ]


def test_no_text_forges_a_sample():
    answers = [{"service": "policy", "answer": "550", "reason": 'x"} 1\nevil{a="\\', "count": 4}]
    text = metrics_of(changed(answers=answers, config="/home/alice"))
    assert values(parsed(text)["mailcloak_answers"]) == {("_total", "policy", "550", 'x"} 1\nevil{a="\\'): 4}
    assert "alice" not in text


def test_metrics_of_an_outage_and_of_static_users():
    away = {**STATS["keycloak"], "state": "away", "since_seconds": 12.5}
    families = parsed(metrics_of(changed(keycloak=away, last_reload=None, database={"works": False})))
    assert values(families["mailcloak_keycloak_up"]) == {("",): 0}
    assert values(families["mailcloak_keycloak_state_seconds"]) == {("",): 12.5}
    assert values(families["mailcloak_database_up"]) == {("",): 0}
    assert not any("reload" in name for name in families)
    assert not any("keycloak_" in name for name in parsed(metrics_of(changed(keycloak=None))))


def test_metrics_say_that_the_daemon_is_down(ctl):
    code, shown, said = ctl("status", "--prometheus", "-")
    assert code == 0
    assert values(parsed(shown)["mailcloak_up"]) == {("",): 0}
    assert "the daemon is not running" in said
    assert ctl("status", "--json")[1] == ""


@pytest.fixture
def prom(tmp_path):
    """A file of metrics, in a folder of its own."""
    path = tmp_path / "textfile" / "mailcloak.prom"
    path.parent.mkdir()
    path.write_text("mailcloak_up 1.0\n")
    return path


def up_in(path):
    return values(parsed(path.read_text())["mailcloak_up"])[("",)]


def test_file_of_metrics_is_replaced_as_a_whole_and_may_be_read_by_all(fake, ctl, prom):
    fake.maps["stats"] = f"OK {json.dumps(STATS)}"
    prom.chmod(0o600)
    with open(prom) as before:
        mask = os.umask(0o077)
        try:
            assert ctl("status", "--prometheus", str(prom)) == (0, "", "")
        finally:
            os.umask(mask)
        assert before.read() == "mailcloak_up 1.0\n", "a reader of the old file sees the old file"
    assert prom.read_text() == metrics_of(STATS)
    assert prom.stat().st_mode & 0o7777 == 0o644
    assert os.listdir(prom.parent) == ["mailcloak.prom"]


def test_file_of_metrics_is_made_where_there_is_none_also_by_a_name_alone(fake, ctl, prom, monkeypatch):
    fake.maps["stats"] = f"OK {json.dumps(STATS)}"
    prom.unlink()
    monkeypatch.chdir(prom.parent)
    assert ctl("status", "--prometheus", prom.name) == (0, "", "")
    assert up_in(prom) == 1


def test_file_of_metrics_says_that_the_daemon_is_down(ctl, prom):
    code, shown, said = ctl("status", "--prometheus", str(prom))
    assert (code, shown) == (0, "")
    assert prom.read_text().splitlines()[2:] == ["mailcloak_up 0.0"]
    assert "the daemon is not running" in said


def test_file_of_metrics_stays_where_the_configuration_cannot_be_read(config_path, ctl, prom):
    config_path.unlink()
    code, shown, said = ctl("status", "--prometheus", str(prom))
    assert (code, shown) == (1, "")
    assert "cannot be read: No such file or directory" in said
    assert prom.read_text() == "mailcloak_up 1.0\n"


def make_link(path):
    path.rename(path.parent / "target")
    path.symlink_to("target")


def make_pipe(path):
    path.unlink()
    os.mkfifo(path)


def make_folder(path):
    path.unlink()
    path.mkdir()


def remove_folder(path):
    path.unlink()
    path.parent.rmdir()


NOT_WRITTEN = {
    "link": (make_link, "not a regular file"),
    "pipe": (make_pipe, "not a regular file"),
    "folder": (make_folder, "not a regular file"),
    "no folder": (remove_folder, "No such file or directory"),
}


@pytest.mark.parametrize(("make", "why"), NOT_WRITTEN.values(), ids=NOT_WRITTEN)
def test_file_of_metrics_that_cannot_be_written_names_file_and_reason(fake, ctl, prom, make, why):
    fake.maps["stats"] = f"OK {json.dumps(STATS)}"
    make(prom)
    before = os.path.lexists(prom) and os.lstat(prom)
    code, shown, said = ctl("status", "--prometheus", str(prom))
    assert (code, shown) == (1, "")
    assert said == f"mailcloakctl: status: {str(prom)!r} cannot be written: {why}; what was there stays\n"
    assert (os.path.lexists(prom) and os.lstat(prom)) == before


def test_full_disk_leaves_the_old_file_of_metrics_and_no_other(fake, config_path, prom):
    fake.maps["stats"] = f"OK {json.dumps(STATS)}"
    limit = 1000  # bytes of a file, the same to a program as a full disk
    assert len(metrics_of(STATS)) > limit
    result = run_ctl(
        *("--config", config_path, "status", "--prometheus", prom),
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},  # Python would keep compiled modules that end at the limit
    )
    assert result.returncode == 1
    assert f"{str(prom)!r} cannot be written: File too large" in result.stderr
    assert prom.read_text() == "mailcloak_up 1.0\n"
    assert os.listdir(prom.parent) == ["mailcloak.prom"]


@pytest.mark.parametrize("arguments", [("--prometheus",), ("--prometheus", ""), ("--prometheus=",)], ids=" ".join)
def test_metrics_without_a_file_are_a_usage_error_that_names_both_forms(arguments):
    result = run_ctl("status", *arguments, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.endswith(
        "mailcloakctl status: argument --prometheus: expected a FILE to replace, or - for standard output\n"
    )


# ---- examples/prometheus

PROMETHEUS = ROOT / "examples" / "prometheus"
OTHER_LABELS = {"instance", "alertname", "alertstate", "file"}  # that Prometheus and node_exporter add


def expressions_in(value):
    """(expression, legend) of each target, rule and variable, wherever it stands."""
    if isinstance(value, dict):
        for name in ("expr", "definition"):
            if name in value:
                yield value[name], value.get("legendFormat", "")
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from expressions_in(each)


def test_alerts_and_dashboard_use_names_and_labels_that_the_daemon_has(keycloak_daemon, keycloak):
    keycloak_daemon.ask(recipient="alice@d1.test")
    keycloak_daemon.reload()
    keycloak.stop()
    run_ctl("--db", keycloak_daemon.database.with_name("shared.db"), "db", "mirror", keycloak_daemon.database, "--publish")
    with contextlib.closing(sqlite3.connect(keycloak_daemon.database)) as database, database:
        database.execute("INSERT INTO aliases (alias_email, username) VALUES ('odd@d1.test', 'a+b')")  # the map answers TEMP
    keycloak_daemon.ask(recipient="bob@d1.test")
    keycloak_daemon.ask_map("alias odd@d1.test")
    families = parsed(run_ctl("--config", keycloak_daemon.config_path, "status", "--prometheus", "-").stdout)
    labels = {}
    for sample in (sample for family in families.values() for sample in family.samples):
        for name, value in sample.labels.items():
            labels.setdefault(sample.name, {}).setdefault(name, set()).add(value)
        labels.setdefault(sample.name, {})
    rules = list(expressions_in(yaml.safe_load((PROMETHEUS / "mailcloak.rules.yml").read_text())))
    dashboard = list(expressions_in(json.loads((PROMETHEUS / "mailcloak.json").read_text())))
    assert len(rules) > 5
    assert len(dashboard) > 20
    for expression, legend in rules + dashboard:
        metrics = set(re.findall(r"\bmailcloak_\w+", expression))
        assert metrics <= set(labels), expression
        of_these = {name for metric in metrics for name in labels[metric]} | OTHER_LABELS
        kept = {name for names in re.findall(r"\b(?:by|on|ignoring) \(([^)]*)\)", expression) for name in names.split(", ")}
        matched = re.findall(r"(\w+)(?:=~|!~|!=|=)\"([^\"]*)\"", expression)
        assert kept | {name for name, _ in matched} <= of_these, expression
        assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= kept | {"instance"}, legend
        for name, pattern in matched:
            if name not in OTHER_LABELS:
                found = {value for metric in metrics for value in labels[metric].get(name, ())}
                assert set(pattern.split("|")) <= found, expression


def test_alert_of_old_metrics_knows_the_file_that_the_readme_names():
    (expression,) = [
        text for text, _ in expressions_in(yaml.safe_load((PROMETHEUS / "mailcloak.rules.yml").read_text())) if "mtime" in text
    ]
    pattern = re.search(r'file=~"(.*)"}', expression)[1]
    files = re.findall(r"--prometheus (/\S+)", (ROOT / "README.md").read_text())
    assert files
    assert all(re.fullmatch(pattern, file) for file in files)


def test_every_alert_says_what_to_do_and_has_its_test():
    groups = yaml.safe_load((PROMETHEUS / "mailcloak.rules.yml").read_text())["groups"]
    tests = (PROMETHEUS / "mailcloak.rules.test.yml").read_text()
    for rule in (rule for group in groups for rule in group["rules"]):
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert f'alertname="{rule["alert"]}"' in tests


# ---- flush


def test_flush_forgets_all_or_one_and_says_how_much(fake, ctl):
    fake.maps["flush"] = 'OK {"forgotten": 3}'
    assert ctl("flush") == (0, "", "flush: 3 cached answers forgotten, Keycloak is asked again\n")
    fake.maps["flush"] = 'OK {"forgotten": 1}'
    assert ctl("flush", "Alice@Bücher.Test")[2] == (
        "flush: 1 cached answer of alice@xn--bcher-kva.test forgotten, Keycloak is asked again\n"
    )
    fake.maps["flush"] = 'OK {"forgotten": 0}'
    assert ctl("flush", "Bob") == (0, "", "flush: nothing of bob was cached\n")
    assert [question.partition(":")[2] for _, question in fake.asked] == [
        "flush *,",
        "flush alice@xn--bcher-kva.test,",
        "flush bob,",
    ]


def test_flush_as_json(fake, ctl):
    fake.maps["flush"] = 'OK {"forgotten": 3}'
    for arguments in (("flush", "--json", "bob"), ("flush", "bob", "--json")):
        code, shown, said = ctl(*arguments)
        assert (code, json.loads(shown), said) == (0, {"forgotten": 3}, "")


@pytest.mark.parametrize("text", ["", "  ", "alice@", "a\nb", "a@b@c"])
def test_flush_of_what_is_no_address_is_refused(fake, ctl, text):
    assert ctl("flush", text)[:2] == (1, "")
    assert fake.asked == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("status", "x"),
        ("status", "--watch", "--json"),
        ("status", "--prometheus", "-", "--json"),
        ("status", "--prometheus", "-", "--watch"),
        ("status", "--prometheus", "--watch"),
        ("flush", "a@b.test", "c@d.test"),
        ("flush", "--all"),
    ],
    ids=" ".join,
)
def test_usage_error_of_status_and_flush_exits_2(arguments):
    result = run_ctl(*arguments, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("usage: mailcloakctl")


# ---- a daemon that does not answer

LOG = mailcloakask.where_log(None)


def own_version(**values):
    """What a program answers that has heard of our version."""
    return f"OK {json.dumps({**values, 'version': mailcloak.__version__})}"


COMMANDS = {"status": ("status",), "flush": ("flush",), "ask": ("ask", "alias", "x@d1.test")}
BROKEN = {
    "bad JSON": ("OK {", "makes no sense; something else listens there, or a daemon of another version: restart it"),
    "deep JSON": ("OK " + "[" * 100_000, "makes no sense"),
    "no object": ("OK 7", "makes no sense"),
    "not found": ("NOTFOUND ", "makes no sense"),
    "unknown status": ("YES {}", "makes no sense"),
    "no netstring": (b"action=DUNNO\n\n", "makes no sense"),
    "no comma": (b"4:OK 7;", "makes no sense"),
    "no end": (b"9" * 10, "makes no sense"),
    "closed": (b"", f"closed the connection without an answer; its log ({LOG}) says why, or something else listens there"),
    "half": (b"100:OK ", "closed the connection without an answer"),
    "refused": (
        "PERM stats is for root",
        "the daemon says: stats is for root; run mailcloakctl as root, as the daemon's own user or",
    ),
    "older": ("PERM unknown map stats", "does not understand 'stats' (unknown map stats): it is of another version; restart it"),
    "not now": ("TEMP internal error", f"the daemon says: internal error; its log ({LOG}) says why"),
    "hangs": ("hang", f"within 6 s; look at its log ({LOG}), and restart it"),
    "nothing but our version": (own_version(), "makes no sense"),
    "texts for numbers": (own_version(**{name: "x" for name in STATS if name != "version"}), "makes no sense"),
    "lists for blocks": (own_version(**{name: [[]] for name in STATS if name != "version"}), "makes no sense"),
    "numbers beyond all bounds": (own_version(**{**STATS, "uptime_seconds": 10**400}), "makes no sense"),
}


@pytest.mark.parametrize(("answer", "says"), BROKEN.values(), ids=BROKEN)
def test_answer_that_makes_no_sense_exits_1_and_names_the_next_step(fake, ctl, answer, says):
    fake.maps["stats"] = answer
    code, shown, said = ctl("status")
    assert (code, shown) == (1, "")
    assert says in said
    assert said.startswith("mailcloakctl: ")
    assert said.count("\n") == 1


NONSENSE = {
    "status": ("stats", ("status",)),
    "ask": ("explain", ("ask", "alias", "x@d1.test")),
    "ask in JSON": ("explain", ("ask", "alias", "x@d1.test", "--json")),
    "flush": ("flush", ("flush",)),
}


@pytest.mark.parametrize("values", [{}, {"steps": [{}]}, {"steps": 7, "forgotten": []}, {"forgotten": None}], ids=str)
@pytest.mark.parametrize(("name", "command"), NONSENSE.values(), ids=NONSENSE)
def test_answer_of_our_version_that_makes_no_sense_is_one_line(fake, ctl, name, command, values):
    fake.maps[name] = own_version(**values)
    code, shown, said = ctl(*command)
    assert "the answer at " in shown + said
    assert "makes no sense" in shown + said
    assert (code, said.count("\n")) == ((0, 0) if name == "explain" else (1, 1))


def test_metrics_say_that_a_daemon_whose_statistics_make_no_sense_is_not_up(fake, ctl):
    fake.maps["stats"] = own_version()
    code, shown, said = ctl("status", "--prometheus", "-")
    assert (code, "mailcloak_up 0.0\n" in shown, said.count("\n")) == (0, True, 1)


@pytest.mark.parametrize("answer", [pytest.param("hang", marks=pytest.mark.long), b""], ids=["hangs", "closes"])
def test_flush_without_an_answer_may_be_done_and_says_so(fake, ctl, answer):
    fake.maps["flush"] = answer
    code, shown, said = ctl("flush")
    assert (code, shown) == (1, "")
    assert "the flush may be done all the same; repeat it; if there is no answer again, " in said
    assert f"its log ({LOG})" in said


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_daemon_that_is_not_running_exits_1_and_names_the_next_step(ctl, command):
    code, shown, said = ctl(*command)
    assert (code, shown) == (1, "")
    assert "there is no socket at " in said
    assert "start it (rc-service mailcloak start, systemctl start mailcloak), or name its configuration with --config" in said


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_socket_that_a_killed_daemon_left_behind_is_named(config_path, ctl, command):
    for path in yaml.safe_load(config_path.read_text())["sockets"].values():
        if path.startswith("/"):
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as dead:
                dead.bind(path)
    code, _, said = ctl(*command)
    assert code == 1
    assert "nobody listens at " in said
    assert "the daemon is not running" in said


@pytest.mark.real("root")
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_socket_that_may_not_be_connected_to_names_who_may(fake, config_path, command):
    for path in yaml.safe_load(config_path.read_text())["sockets"].values():
        if path.startswith("/"):
            os.chmod(path, 0o600)

    def run():
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = mailcloakctl.main(["--config", str(config_path), *command])
        return f"{code} {said.getvalue()}"

    outcome = as_nobody(run)
    assert outcome.startswith("1 ")
    assert "this user may not connect to " in outcome
    assert outcome.endswith("; run mailcloakctl as root\n")


def test_policy_answer_that_makes_no_sense_is_refused(fake, ctl):
    fake.policy = b"HTTP/1.1 400 Bad Request\r\n\r\n\n\n"
    code, _, said = ctl("ask", "recipient", "x@d1.test")
    assert code == 1
    assert "makes no sense" in said


def test_configuration_that_cannot_be_used_names_the_way_out(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    assert mailcloakctl.main(["--config", str(path), "status"]) == 1
    assert "cannot be read: No such file or directory" in capsys.readouterr().err
    path.write_text("sockets: {policy_socket: relative, socketmap: /x}\n")
    assert mailcloakctl.main(["--config", str(path), "status"]) == 1
    said = capsys.readouterr().err
    assert "config: sockets.policy_socket: expected an absolute path, got 'relative'\n" in said
    assert "config: sockets.socketmap: unknown key; did you mean 'socketmap_socket'?\n" in said
    assert said.endswith(
        "mailcloakctl: the configuration names the daemon's sockets; fix it, name another with --config, or run this as root\n"
    )


# ---- the real daemon


def test_status_of_the_real_daemon(keycloak_daemon):
    keycloak_daemon.ask(recipient="alice@d1.test")
    keycloak_daemon.ask(recipient="ghost@d1.test", policy_context="recipient")
    shown = run_ctl("--config", keycloak_daemon.config_path, "status").stdout
    assert shown.startswith(f"mailcloak {mailcloakctl.mailcloak.__version__}, pid {keycloak_daemon.process.pid}, up ")
    assert "Keycloak       answers; " in shown
    assert re.search(r"\npolicy +550 +1 +unknown-recipient\n", shown)
    assert "- " not in shown.replace("-> ", ""), "something is not known"
    families = parsed(run_ctl("--config", keycloak_daemon.config_path, "status", "--prometheus", "-").stdout)
    assert values(families["mailcloak_answers"])["_total", "policy", "550", "unknown-recipient"] == 1
    assert values(families["mailcloak_answers"])["_total", "policy", "DUNNO", "primary,sender-not-local"] == 1
    assert "other" not in {label for family in families.values() for sample in family.samples for label in sample.labels.values()}
    assert "mailcloak_answer_seconds" in families
    stats = json.loads(run_ctl("--config", keycloak_daemon.config_path, "status", "--json").stdout)
    assert set(stats) == {*STATS, "replication"}
    assert stats["replication"] == {"role": "single"}
    assert {name: set(stats[name]) for name in ("cache", "connections", "database", "keycloak", "lookups", "seconds")} == {
        name: set(STATS[name]) for name in ("cache", "connections", "database", "keycloak", "lookups", "seconds")
    }


def test_reload_of_the_real_daemon_is_shown(static_daemon):
    assert ", read at start, " in run_ctl("--config", static_daemon.config_path, "status").stdout
    static_daemon.reload()
    wait_until(lambda: "reloaded 2" in run_ctl("--config", static_daemon.config_path, "status").stdout, what="reload shown")
    static_daemon.config["policy"]["domain"] = 7
    static_daemon.reload()
    assert ": refused, the one before it is in force" in run_ctl("--config", static_daemon.config_path, "status").stdout


def test_flush_has_the_daemon_ask_again(keycloak_daemon, keycloak):
    flush = ("--config", keycloak_daemon.config_path, "flush")
    for address in ("alice@d1.test", "bob@d1.test"):
        assert keycloak_daemon.ask(recipient=address) == "DUNNO"
    keycloak.user("alice")["enabled"] = False
    assert keycloak_daemon.ask(recipient="alice@d1.test") == "DUNNO"
    assert "of alice@d1.test forgotten" in run_ctl(*flush, "Alice@D1.test").stderr
    assert keycloak_daemon.ask(recipient="alice@d1.test")[:3] == "550"
    keycloak.user("bob")["enabled"] = False
    assert keycloak_daemon.ask(recipient="bob@d1.test") == "DUNNO"
    assert "Keycloak is asked again" in run_ctl(*flush).stderr
    assert keycloak_daemon.ask(recipient="bob@d1.test")[:3] == "550"


def test_flush_forgets_what_is_saved(keycloak_daemon, keycloak):
    keycloak_daemon.ask(recipient="alice@d1.test")
    path = keycloak_daemon.database.parent / "last-known.db"

    def known():
        with contextlib.closing(sqlite3.connect(path)) as database:
            return database.execute("SELECT count(*) FROM users").fetchone()[0]

    wait_until(lambda: path.exists() and known() == 1, what="answer on disk")
    run_ctl("--config", keycloak_daemon.config_path, "flush")
    assert known() == 0
    keycloak.stop()
    assert keycloak_daemon.ask(recipient="alice@d1.test")[:3] == "451"


@pytest.mark.real("root")
def test_flush_is_refused_to_a_user_who_may_only_connect(make_daemon):
    daemon = make_daemon(static_users=USERS, sockets={"socket_mode": "0666"}).start()
    daemon.config_path.chmod(0o644)

    def run():
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = mailcloakctl.main(["--config", str(daemon.config_path), "flush"])
        return f"{code} {said.getvalue()}"

    assert re.match(
        r"1 mailcloakctl: the daemon says: .*; run mailcloakctl as root, as the daemon's own user or as ", as_nobody(run)
    )


@pytest.mark.real("root")
def test_user_of_the_daemon_asks_by_the_group_of_the_sockets(make_daemon):
    """Where the directory of the sockets lets the user in: Postfix's own, private, is closed to all but Postfix and root."""
    group, nobody = grp.getgrnam("nogroup").gr_name, pwd.getpwnam("nobody").pw_name
    sockets = {"socket_owner_user": "root", "socket_owner_group": group, "socket_mode": "0660"}
    daemon = make_daemon(static_users=USERS, sockets=sockets, daemon={"user": nobody})
    shutil.chown(daemon.config_path.parent, nobody)
    daemon.start()
    daemon.config_path.chmod(0o644)

    def run():
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            codes = [
                mailcloakctl.main(["--config", str(daemon.config_path), *command])
                for command in (["status"], ["ask", "recipient", "alice@d1.test"], ["flush"])
            ]
        return f"{codes} {said.getvalue()}"

    said = as_nobody(run)
    assert said.startswith("[0, 0, 0] "), said
    assert "reason         primary" in said


# ---- terminals


def test_table_is_as_wide_as_the_terminal_and_cuts_no_address(tmp_path):
    path = tmp_path / "state.db"
    address = "a-rather-long-address@d1.test"
    run_ctl("--db", path, "aliases", "add", address, "alice")
    code, shown = Terminal("--db", path, "aliases", "list", columns=60).end()
    assert code == 0
    assert max(map(len, shown.splitlines())) <= 60
    assert address in shown
    for columns in (20, 40, 300):  # where there is not enough room, a line is longer than the terminal is wide
        assert address in Terminal("--db", path, "aliases", "list", columns=columns).end()[1]


def test_tables_of_every_width_keep_their_text():
    table = [["A", "BB", "A LONG HEADING"], ["x" * 30, "two words", "y"], ["", "z " * 30, ""]]
    whole = "".join("".join(row) for row in table).replace(" ", "")
    for width in (None, 1, 10, 30, 40, 60, 200):
        lines = list(mailcloakcommon.format_table(table, width))
        assert sorted("".join(lines).replace(" ", "")) == sorted(whole)
        assert width is None or max(map(len, lines)) <= max(width, 30 + 2 + 5 + 2 + 7)  # the longest word of each column


def test_colours_are_for_terminals_that_want_them(fake, config_path):
    fake.maps["stats"] = f"OK {json.dumps(changed(database={'path': '/x', 'works': False}))}"
    status = ("--config", config_path, "status")
    assert "\x1b[31m/x, cannot be used\x1b[0m" in Terminal(*status).end()[1]
    assert "\x1b" not in Terminal(*status, NO_COLOR="1").end()[1]
    assert "\x1b" not in Terminal(*status, TERM="dumb").end()[1]
    assert "\x1b" not in run_ctl(*status).stdout
    assert "\x1b[31m/x" in Terminal(*status, NO_COLOR="").end()[1], "an empty NO_COLOR is none (https://no-color.org)"


def test_answer_is_coloured_on_a_terminal(fake, config_path):
    fake.policy = "550 5.1.1 No such user"
    shown = Terminal("--config", config_path, "ask", "recipient", "ghost@d1.test", columns=60).end()[1]
    assert "\x1b[31m550 5.1.1 No such user (refused for good)\x1b[0m" in shown
    assert max(len(line) for line in re.sub(r"\x1b\[\d*m", "", shown).splitlines()) <= 60


@pytest.mark.long
def test_watch_refreshes_in_place_and_outlives_a_restart(config_path):
    with FakeDaemon(yaml.safe_load(config_path.read_text())) as fake:
        fake.maps["stats"] = f"OK {json.dumps(changed(answers=STATS['answers'] * 20))}"
        terminal = Terminal("--config", config_path, "status", "--watch", columns=70, rows=20)
        first = terminal.read_until(lambda text: text.count("\x1b[H") == 1 and text.endswith("\x1b[J"))
        lines = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", first).splitlines()
        assert len(lines) < 20
        assert max(map(len, lines)) <= 70
        assert re.fullmatch(r"\(\d+ more lines\)", lines[-1])
        terminal.read_until(lambda text: text.count("\x1b[H") == 2)
    terminal.read_until(lambda text: "there is no socket at" in text)
    with FakeDaemon(yaml.safe_load(config_path.read_text())) as fake:
        fake.maps["stats"] = f"OK {json.dumps(changed(pid=4712))}"
        terminal.read_until(lambda text: "pid 4712" in text)
        terminal.type("\x03")
        code, shown = terminal.end()
    assert code == 0
    assert "Traceback" not in shown
    assert "nothing was changed" not in shown


def test_watch_without_a_terminal_is_refused(fake, ctl):
    code, shown, said = ctl("status", "--watch")
    assert (code, shown) == (1, "")
    assert "--watch needs a terminal; --json and --prometheus are for programs" in said
