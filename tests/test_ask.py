"""mailcloakctl ask: the answer that Postfix would get, and why, of the running daemon and of fakes that misbehave."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import socket
import sys
import threading
import time

import pytest
import yaml
from conftest import ROOT, USERS, Daemon, as_nobody, config_in, run_ctl, running, short_directory
from keycloak_stand_in import KeycloakStandIn

import mailcloak
import mailcloakask
import mailcloakcommon
import mailcloakctl

EXPLAINED = {
    "version": mailcloak.__version__,
    "answer": "550 5.1.1 No such user",
    "reason": "unknown-recipient",
    "rule": "nobody has the address: refused",
    "change": "mailcloakctl aliases add ghost@d1.test USERNAME, or give a user this e-mail in Keycloak",
    "steps": [
        {"asked": "alias", "value": "ghost@d1.test", "found": None, "source": "database", "age_seconds": None, "error": ""},
        {"asked": "holders", "value": "ghost@d1.test", "found": [], "source": "cache", "age_seconds": 3.2, "error": ""},
    ],
}
NO_SUCH_USER = "550 5.1.1 No such user"


def explained(**changes):
    """What the map "explain" answers."""
    return f"OK {json.dumps({**EXPLAINED, **changes})}"


class FakeDaemon:
    """The two sockets of a configuration; policy and maps say what is answered: text, bytes that are sent as they are, or "hang"."""

    def __init__(self, config):
        self.policy = "DUNNO"
        self.maps = {
            "alias": "NOTFOUND ",
            "explain": explained(),
            "stats": f'OK {{"version": "{mailcloak.__version__}"}}',
            "flush": 'OK {"forgotten": 0}',
        }
        self.asked = []  # (socket, question) in the order in which they came
        self._paths = {name: config["sockets"][f"{name}_socket"] for name in ("policy", "socketmap")}
        self._listeners = []
        self._ending = threading.Event()

    def __enter__(self):
        for name, path in self._paths.items():
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path)
            listener.listen()
            self._listeners.append(listener)
            threading.Thread(target=self._serve, args=(name, listener), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._ending.set()
        for listener, path in zip(self._listeners, self._paths.values()):
            listener.close()
            os.unlink(path)

    def _serve(self, name, listener):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with contextlib.closing(connection), contextlib.suppress(OSError):
                    self._answer(name, connection)

    def _answer(self, name, connection):
        question = connection.recv(65536).decode()
        if not question:  # a client that only tested whether it may connect
            return
        self.asked.append((name, question))
        if name == "policy":
            answer, frame = self.policy, "action={}\n\n".format
        else:
            answer, frame = self.maps[question.partition(":")[2].partition(" ")[0]], self._netstring
        if answer == "hang":
            self._ending.wait(20)
        elif isinstance(answer, bytes):
            connection.sendall(answer)
        else:
            connection.sendall(frame(answer).encode())

    @staticmethod
    def _netstring(text):
        return f"{len(text.encode())}:{text},"


@pytest.fixture
def config_path(short_dir, make_config):
    """The path of a configuration whose sockets nobody has made yet."""
    path = short_dir / "config.yaml"
    path.write_text(yaml.safe_dump(make_config(static_users=USERS)))
    return path


@pytest.fixture
def fake(config_path):
    with FakeDaemon(yaml.safe_load(config_path.read_text())) as fake:
        yield fake


@pytest.fixture
def ctl(config_path, capsys, monkeypatch):
    """The command in this process: (exit code, standard output, standard error)."""
    monkeypatch.setattr(mailcloakcommon, "ANSWER_SECONDS", 1.0)

    def ctl(*arguments):
        code = mailcloakctl.main(["--config", str(config_path), *arguments])
        return (code, *capsys.readouterr())

    return ctl


def asked_json(daemon, *arguments):
    return json.loads(run_ctl("--config", daemon.config_path, "ask", *arguments, "--json").stdout)


# ---- every reason of the daemon is explained


@pytest.mark.parametrize("name", mailcloak.REASONS)
def test_explanation_of_a_reason_can_be_filled_in(name):
    reason = mailcloak.REASONS[name]
    assert reason.rule
    change = reason.change.format(address="x@d1.test", alias="y@d1.test", user="bob")
    assert not re.search(r"[{}]", reason.rule + change)


# ---- what is asked


def test_recipient_is_asked_as_postfix_asks_and_explained_by_the_same_question(fake, ctl):
    fake.policy = NO_SUCH_USER
    code, shown, said = ctl("ask", "recipient", "<Ghost@D1.test>")
    assert (code, said) == (0, "")
    (_, explain), (name, policy) = fake.asked
    assert json.loads(explain.partition(" ")[2].rstrip(",")) == {
        "policy": {"protocol_state": "RCPT", "policy_context": "recipient", "recipient": "Ghost@D1.test"}
    }
    assert (name, set(policy.split("\n"))) == (
        "policy",
        {"request=smtpd_access_policy", "protocol_state=RCPT", "policy_context=recipient", "recipient=Ghost@D1.test", ""},
    )
    assert "answer         550 5.1.1 No such user (refused for good)\n" in shown


def test_sender_is_asked_with_login_and_method(fake, ctl):
    ctl("ask", "sender", "x@d1.test", "--user", "Alice", "--method", "xoauth2")
    ctl("ask", "sender", "x@d1.test", "--user", "printer")
    ctl("ask", "sender", "<>")
    asked = [question for name, question in fake.asked if name == "policy"]
    assert "sender=x@d1.test\nsasl_username=alice\nsasl_method=XOAUTH2\n" in asked[0]
    assert "sasl_username=printer\nsasl_method=PLAIN\n" in asked[1]
    assert "sender=\nsasl_username=\nsasl_method=\n" in asked[2]


def test_recipient_that_may_come_in_is_shown_with_where_it_leads(fake, ctl):
    fake.maps["alias"] = "OK alice@d1.test"
    assert "leads to       alice@d1.test\n" in ctl("ask", "recipient", "info@d1.test")[1]
    fake.maps["alias"] = "NOTFOUND "
    assert "leads to" not in ctl("ask", "recipient", "info@d1.test")[1]
    fake.maps["alias"] = "TEMP lookup failed"
    assert "leads to       TEMP lookup failed\n" in ctl("ask", "recipient", "info@d1.test")[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["recipient", "<>"], "'<>' receives no mail"),
        (["alias", ""], "'<>' is no alias"),
        (["recipient", "a@d1.test\nsender=x"], "holds control characters"),
        (["sender", "a" * 2001], "is too long"),
        (["sender", "a@d1.test", "--user", "a\nb"], "is not a username"),
        (["sender", "a@d1.test", "--user", "a", "--method", "PLAIN\nrequest=x"], "is not a SASL mechanism"),
    ],
    ids=["null recipient", "null alias", "newline", "long", "newline in user", "newline in method"],
)
def test_what_cannot_be_asked_is_refused_and_not_sent(fake, ctl, arguments, says):
    code, shown, said = ctl("ask", *arguments)
    assert (code, shown) == (1, "")
    assert says in said
    assert fake.asked == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("ask",),
        ("ask", "user", "alice"),
        ("ask", "recipient"),
        ("ask", "recipient", "x@d1.test", "--user", "alice"),
        ("ask", "sender", "x@d1.test", "--method", "PLAIN"),
    ],
    ids=" ".join,
)
def test_usage_error_of_ask_exits_2(arguments):
    result = run_ctl(*arguments, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("usage: mailcloakctl")


# ---- what is shown


def test_explanation_names_steps_sources_and_what_would_have_to_change(fake, ctl):
    fake.policy = NO_SUCH_USER
    lines = ctl("ask", "recipient", "ghost@d1.test")[1].splitlines()
    assert "reason         unknown-recipient" in lines
    assert "change         mailcloakctl aliases add ghost@d1.test USERNAME, or give a user this e-mail in Keycloak" in lines
    assert [re.split(r"  +", line) for line in lines[-3:]] == [
        ["", "ASKED", "FOUND", "FROM"],
        ["1.", "is there an alias ghost@d1.test", "no", "database"],
        ["2.", "whose e-mail is ghost@d1.test", "nobody's", "cached, 3.2 s old"],
    ]


def test_sender_of_an_alias_that_only_receives_is_told_what_lets_users_send(make_daemon):
    daemon = make_daemon(static_users=USERS).start()
    daemon.ctl("aliases", "add", "team@d1.test", "bob", "--receive-only")
    said = run_ctl("--config", daemon.config_path, "ask", "sender", "team@d1.test", "--user", "alice").stdout
    assert "reason         sender-not-owned" in said
    assert "mailcloakctl aliases add team@d1.test --replace, with all its users and without --receive-only" in " ".join(
        said.split()
    )


BOB = {"users": ["bob"], "enabled": True, "external": [], "receive_only": False}
STEPS = {
    "disabled alias": (
        {"asked": "alias", "value": "x", "found": {**BOB, "enabled": False}, "source": "database"},
        ("is there an alias x", "leads to bob, but is disabled", "database"),
    ),
    "alias of several that only receives": (
        {
            "asked": "alias",
            "value": "x",
            "found": {**BOB, "users": ["al", "bob"], "external": ["jo@e.test"], "receive_only": True},
            "source": "database",
        },
        ("is there an alias x", "leads to al, bob, <jo@e.test>, and only receives", "database"),
    ),
    "user of an alias": (
        {"asked": "leaver", "value": "a", "found": False, "source": "static"},
        ("has the user left: a", "no", "static_users"),
    ),
    "user of an alias who has left": (
        {"asked": "leaver", "value": "a", "found": True, "source": "keycloak"},
        ("has the user left: a", "yes, gone or disabled", "Keycloak, just now"),
    ),
    "app": (
        {"asked": "app", "value": "p", "found": {"state": "expired", "may_send": True, "owner": "bob"}, "source": "database"},
        ("is there an app p", "expired, may use the sender, owner bob", "database"),
    ),
    "app without an owner": (
        {"asked": "app", "value": "p", "found": {"state": "enabled", "may_send": False, "owner": ""}, "source": "database"},
        ("is there an app p", "enabled, may not use the sender", "database"),
    ),
    "holders": (
        {
            "asked": "holders",
            "value": "x",
            "found": [
                {"username": "a", "enabled": True, "locked_out": False, "federation": "ldap-1"},
                {"username": "b", "enabled": False, "locked_out": True, "federation": ""},
                {"username": "c", "enabled": False, "locked_out": False, "federation": ""},
            ],
            "source": "keycloak",
        },
        ("whose e-mail is x", "a, enabled, federated, b, locked out, c, disabled", "Keycloak, just now"),
    ),
    "login": (
        {"asked": "login", "value": "x", "found": {"username": "a", "state": "enabled"}, "source": "outage", "age_seconds": 7200},
        ("whose login is x", "a, enabled", "cached, used in an outage, 2 h 0 min old"),
    ),
    "ambiguous login": (
        {"asked": "login", "value": "x", "found": {"username": "", "state": "ambiguous"}, "source": "static"},
        ("whose login is x", "ambiguous", "static_users"),
    ),
    "no answer": (
        {"asked": "login", "value": "x", "found": None, "source": "keycloak", "error": "directory: realm 'mail': away"},
        ("whose login is x", "no answer: directory: realm 'mail': away", "Keycloak, just now"),
    ),
}


@pytest.mark.parametrize(("step", "shown"), STEPS.values(), ids=STEPS)
def test_step_in_words(step, shown):
    assert mailcloakask.describe_step({"age_seconds": None, "error": "", **step}) == shown


def test_rule_and_change_are_the_daemons(fake, ctl):
    fake.policy = NO_SUCH_USER
    fake.maps["explain"] = explained(rule="a rule", change="a change")
    lines = ctl("ask", "recipient", "ghost@d1.test")[1].splitlines()
    assert "rule           a rule" in lines
    assert "change         a change" in lines
    shown = json.loads(ctl("ask", "recipient", "ghost@d1.test", "--json")[1])
    assert (shown["reason"], shown["rule"], shown["change"]) == ("unknown-recipient", "a rule", "a change")
    assert "change         ask for it with its domain" in ctl("ask", "recipient", "ghost")[1]


def test_step_that_was_asked_twice_is_shown_once(fake, ctl):
    steps = [{**EXPLAINED["steps"][0], "value": value} for value in ("b", "a", "b")]
    fake.maps["explain"] = explained(answer="NOTFOUND ", reason="no-alias", steps=steps)
    lines = ctl("ask", "alias", "x@d1.test")[1].splitlines()
    assert [re.split("  +", line)[:2] for line in lines[-2:]] == [["1.", "is there an alias a"], ["2.", "is there an alias b"]]


def test_answer_that_differs_from_its_explanation_is_shown_with_a_note(fake, ctl):
    fake.policy = "451 4.3.0 Temporary internal error"
    shown = ctl("ask", "recipient", "ghost@d1.test")[1]
    assert "answer         451 4.3.0 Temporary internal error (deferred, the other side tries again)\n" in shown
    assert f"note           the answer to the very same question was {NO_SUCH_USER} a moment before" in shown
    fake.policy = NO_SUCH_USER
    assert "note" not in ctl("ask", "recipient", "ghost@d1.test")[1]


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ("PERM explain is for root", "the reason is told only to root, to the daemon's own user and to the sockets' owner"),
        (
            "PERM unknown map explain",
            "the reason cannot be told: the running daemon does not understand 'explain' (unknown map explain): it is of another version",
        ),
        ("PERM not a question", "the reason cannot be told: the running daemon does not understand 'explain' (not a question)"),
        ("TEMP internal error", "the reason cannot be told: the daemon says: internal error"),
        ("OK [1]", "the reason cannot be told: the answer at "),
        ("OK {", "the reason cannot be told: the answer at "),
        (b"", "closed the connection without an answer"),
        (
            explained(version="0.0.9"),
            f"the reason cannot be told: the running daemon is version 0.0.9, this is {mailcloak.__version__}; restart it",
        ),
        ('OK {"steps": 7}', "the reason cannot be told: the running daemon is version unknown"),
    ],
    ids=["not allowed", "older", "not understood", "TEMP", "no object", "no JSON", "closed", "other version", "no version"],
)
def test_answer_is_shown_alone_where_it_is_not_explained(fake, ctl, told, says):
    fake.maps["explain"] = told
    fake.policy = NO_SUCH_USER
    code, shown, _ = ctl("ask", "recipient", "ghost@d1.test")
    assert code == 0
    assert NO_SUCH_USER in shown
    assert says in shown
    assert "change" not in shown
    code, shown, _ = ctl("ask", "recipient", "ghost@d1.test", "--json")
    assert (code, json.loads(shown)["answer"], json.loads(shown)["steps"]) == (0, NO_SUCH_USER, [])


def test_text_of_the_daemon_moves_no_cursor(fake, ctl):
    fake.policy = "550 \x1b[2J"
    user = {"username": "\x1b]0;x\x07", "enabled": True, "locked_out": False, "federation": ""}
    steps = [{**EXPLAINED["steps"][1], "value": "\x1b[2J", "found": [user]}]
    fake.maps["explain"] = explained(answer="x", reason="a\x1bb", rule="\x1b", change="\x1b", steps=steps)
    shown = ctl("ask", "recipient", "x@d1.test")[1]
    assert "550 \\x1b[2J" in shown
    assert "\x1b" not in shown


# ---- the real daemon

ASKED = {
    "alias with a tag": (["recipient", "Info+Tag@D1.test"], "DUNNO", "alias", "alice+tag@d1.test"),
    "primary": (["recipient", "bob@d1.test"], "DUNNO", "primary", None),
    "stranger": (["recipient", "ghost@d1.test"], NO_SUCH_USER, "unknown-recipient", None),
    "elsewhere": (["recipient", "x@elsewhere.test"], "DUNNO", "recipient-not-local", None),
    "sender elsewhere": (["sender", "x@elsewhere.test"], "DUNNO", "sender-not-local", None),
    "sender of ours": (
        ["sender", "bob@d1.test"],
        "553 5.7.1 Sending from local domains requires authentication",
        "local-sender-unauthenticated",
        None,
    ),
    "own alias": (["sender", "info@d1.test", "--user", "alice"], "DUNNO", "own-alias", None),
    "own primary": (
        ["sender", "alice@d1.test", "--user", "alice@d1.test", "--method", "OAUTHBEARER"],
        "DUNNO",
        "own-primary",
        None,
    ),
    "somebody else's": (
        ["sender", "bob@d1.test", "--user", "alice"],
        "553 5.7.1 Sender not owned by authenticated user",
        "sender-not-owned",
        None,
    ),
    "app": (["sender", "scan@d1.test", "--user", "printer"], "DUNNO", "app", None),
    "app's name with a token": (
        ["sender", "scan@d1.test", "--user", "printer", "--method", "XOAUTH2"],
        "553 5.7.1 Sender not owned by authenticated user",
        "login-missing",
        None,
    ),
    "alias": (["alias", "info+tag@d1.test"], "OK alice+tag@d1.test", "alias", None),
    "no alias": (["alias", "bob@d1.test"], "NOTFOUND", "no-alias", None),
}


@pytest.fixture(scope="module")
def filled_daemon():
    """A running daemon on the stand-in, with an alias and an app."""
    with short_directory() as directory, KeycloakStandIn() as keycloak:
        for username, email in USERS.items():
            keycloak.add_user(username, email)
        config = config_in(directory, keycloak=keycloak.config(), sockets={"socket_mode": "0666"})
        with running(Daemon(directory, config)) as daemon:
            daemon.ctl("aliases", "add", "info@d1.test", "alice")
            daemon.ctl("apps", "add", "printer", "--generate")
            daemon.ctl("apps", "allow", "printer", "scan@d1.test")
            yield daemon


@pytest.mark.parametrize(("arguments", "answer", "reason", "leads_to"), ASKED.values(), ids=ASKED)
def test_answer_and_reason_of_the_daemon(filled_daemon, arguments, answer, reason, leads_to):
    shown = asked_json(filled_daemon, *arguments)
    assert (shown["answer"], shown["reason"], shown["leads_to"]) == (answer, reason, leads_to)
    assert "note" not in shown
    assert shown["rule"] == mailcloak.REASONS[reason].rule


@pytest.mark.parametrize(("user", "method"), [("alice", "XOAUTH2"), ("printer", "PLAIN"), ("nobody-yet", "XOAUTH2")])
def test_login_is_by_token_where_no_method_is_named_and_there_is_no_such_app(filled_daemon, user, method):
    shown = asked_json(filled_daemon, "sender", "scan@d1.test", "--user", user)
    assert shown["asked"] == f"may {user}, logged in by {method}, send as <scan@d1.test>?"
    assert any(step["asked"] == "app" for step in shown["steps"]) == (method == "PLAIN")


def test_user_who_would_send_as_another_users_email_is_advised_an_alias_of_their_own(filled_daemon):
    shown = asked_json(filled_daemon, "sender", "bob@d1.test", "--user", "alice")
    command = shown["change"].partition(" gives ")[0].replace("ADDRESS", "sales@d1.test").replace("USERNAME", "alice")
    assert command.startswith("mailcloakctl aliases add sales@d1.test")
    filled_daemon.ctl(*command.split()[1:])
    assert asked_json(filled_daemon, "sender", "sales@d1.test", "--user", "alice")["reason"] == "own-alias"
    filled_daemon.ctl("aliases", "del", "sales@d1.test")


def test_login_by_email_is_advised_an_alias_of_the_user_who_has_it(filled_daemon):
    """An alias that leads to the e-mail itself lets nobody send."""
    shown = asked_json(filled_daemon, "sender", "info@d1.test", "--user", "bob@d1.test")
    assert shown["reason"] == "sender-not-owned"
    assert "mailcloakctl aliases add-user info@d1.test bob lets this user send as it" in shown["change"]


def test_steps_of_the_daemon_say_where_each_fact_comes_from(filled_daemon):
    question = ("ask", "sender", "carol@d2.test", "--user", "carol", "--method", "PLAIN")
    shown = run_ctl("--config", filled_daemon.config_path, *question).stdout
    assert "is there an app carol" in shown
    assert re.search(r"whose login is carol +carol, enabled +Keycloak, just now", shown)
    shown = run_ctl("--config", filled_daemon.config_path, "ask", "sender", "carol@d2.test", "--user", "carol").stdout
    assert re.search(r"whose login is carol +carol, enabled +cached, [0-9.]+ m?s old", shown)


@pytest.mark.parametrize("question", [("recipient", "bob@d1.test"), ("sender", "bob@d1.test", "--user", "bob")])
def test_step_without_an_answer_is_shown_to_people_too(keycloak_daemon, keycloak, question):
    keycloak.fault = "status-500"
    shown = run_ctl("--config", keycloak_daemon.config_path, "ask", *question).stdout
    assert re.search(r"^answer +451 ", shown, re.MULTILINE)
    assert "no answer: directory: realm 'mail':" in shown
    assert shown.rstrip().endswith("-")  # where it is from


def test_what_keycloak_said_in_an_outage_is_shown(keycloak_daemon, keycloak):
    keycloak.fault = "status-500"
    shown = asked_json(keycloak_daemon, "recipient", "bob@d1.test")
    assert (shown["answer"][:3], shown["reason"]) == ("451", "directory-unavailable")
    assert "search failed (HTTP 500)" in shown["steps"][-1]["error"]


@pytest.mark.real("root")
@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (("recipient", "ghost@d1.test"), NO_SUCH_USER),
        (("sender", "ghost@d1.test", "--user", "alice"), "553 5.7.1 Sender not owned by authenticated user"),
    ],
    ids=["recipient", "sender"],
)
def test_user_who_may_only_connect_is_told_the_answer_alone(filled_daemon, question, answer):
    def ask():
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            code = mailcloakctl.main(["--config", str(filled_daemon.config_path), "ask", *question])
        return f"{code} {said.getvalue()}"

    filled_daemon.config_path.chmod(0o644)
    outcome = as_nobody(ask)
    assert outcome.startswith("0 ")
    assert answer in outcome
    assert "the reason is told only to root, to the daemon's own user and to the sockets' owner" in outcome
    assert "\nreason" not in outcome
    assert "\nrule" not in outcome


@pytest.mark.long
def test_hanging_daemon_is_given_up(fake, ctl):
    fake.maps["alias"] = "hang"
    started = time.monotonic()
    code, shown, said = ctl("ask", "alias", "x@d1.test")
    assert (code, shown) == (1, "")
    assert "within 6 s; look at its log (" in said  # ANSWER_SECONDS and keycloak.timeout_seconds
    assert time.monotonic() - started < 15


def test_alias_is_added_with_a_warning_where_the_file_that_asks_the_daemon_is_missing(ctl, monkeypatch):
    monkeypatch.setitem(sys.modules, "mailcloakask", None)
    code, shown, said = ctl("aliases", "add", "info@d1.test", "alice")
    assert (code, shown) == (0, "")
    why = f"{ROOT / 'mailcloakask.py'} cannot be loaded: "
    assert said.startswith(f"warning: info@d1.test and its users were not looked up in Keycloak: {why}")
    assert said.endswith("aliases: info@d1.test leads to alice\n")
