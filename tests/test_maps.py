"""The maps that mailcloakctl asks: stats, explain and flush."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time

import pytest
from conftest import USERS, SocketmapClient, as_nobody, wait_until
from test_policy_decisions import each_state, start_in_state

import mailcloak


def ask(daemon, query):
    """The JSON that a map answers."""
    answer = daemon.ask_map(query)
    assert answer.startswith("OK "), answer
    return json.loads(answer[3:])


def counted(stats, service):
    return {(each["answer"], each["reason"]): each["count"] for each in stats["answers"] if each["service"] == service}


# ---- stats


def test_stats_count_every_answer_by_kind_and_reason(static_daemon):
    static_daemon.ctl("aliases", "add", "info@d1.test", "alice")
    client = static_daemon.policy()
    for _ in range(3):
        client.ask(recipient="alice@d1.test")
    client.ask(recipient="stranger@d1.test")
    client.close()
    other = static_daemon.policy()
    other.ask(sender="alice@d1.test")
    map_client = static_daemon.socketmap()
    map_client.ask("alias info@d1.test")
    map_client.ask("aliases info@d1.test")
    stats = ask(static_daemon, "stats *")
    assert counted(stats, "policy") == {
        ("DUNNO", "primary,sender-not-local"): 3,
        ("550", "unknown-recipient"): 1,
        ("553", "local-sender-unauthenticated"): 1,
    }
    assert counted(stats, "socketmap") == {("OK", "alias"): 1, ("PERM", "unknown-map"): 1}
    assert sum(stats["seconds"]["policy"]["counts"]) == 5
    assert 0 < stats["seconds"]["policy"]["sum"] < 5
    assert (stats["version"], stats["pid"]) == (mailcloak.__version__, static_daemon.process.pid)
    now = {"policy": 1, "socketmap": 2, "limit": 1000}  # once the end of the others has been noticed
    wait_until(lambda: ask(static_daemon, "stats *")["connections"] == now, what="the count of connections that are open")
    assert stats["database"] == {"path": str(static_daemon.database), "works": True}
    assert stats["keycloak"] is None
    assert 0 < stats["uptime_seconds"] < time.time() - stats["started_at"] + 1


def test_stats_count_remembered_answers(static_daemon):
    client = static_daemon.policy()
    for _ in range(5):
        client.ask(recipient="alice@d1.test")
    assert ask(static_daemon, "stats *")["recalled_answers"] == {"given": 4, "kept": 1}


def test_stats_tell_where_users_were_found_and_how_keycloak_is(make_daemon, keycloak):
    keycloak.add_user("alice", "alice@d1.test")
    daemon = make_daemon(keycloak=keycloak.config(), policy={"cache_ttl_seconds": 0.5}).start()
    client = daemon.policy()
    for recipient in ("alice@d1.test", "Alice@d1.test", "ALICE@d1.test"):  # another question each
        assert client.ask(recipient=recipient) == "DUNNO"
    stats = ask(daemon, "stats *")
    assert stats["lookups"] == {"cache": 2, "keycloak": 1, "outage": 0, "failed": 0}
    assert stats["cache"]["users"] == 1
    assert stats["keycloak"]["state"] == "answers"
    assert stats["keycloak"]["requests"] >= 2
    keycloak.fault = "status-503"
    time.sleep(0.6)
    for _ in range(4):
        assert client.ask(recipient="alice@d1.test") == "DUNNO"
        assert client.ask(recipient="bob@d1.test").startswith("451")
    wait_until(lambda: ask(daemon, "stats *")["keycloak"]["state"] == "away", what="outage")
    stats = ask(daemon, "stats *")
    assert stats["lookups"]["outage"] == 4
    assert stats["lookups"]["failed"] == 4
    assert "HTTP 503" in stats["keycloak"]["failure"]
    assert stats["keycloak"]["since_seconds"] > 0


def test_username_that_dovecot_would_cut_is_one_error_line_for_each_user(make_daemon):
    """However often its mail is asked about; a reload says it again."""
    daemon = make_daemon(policy={"domain": "d1.test", "recipient_delimiter": "+"}, static_users=USERS)
    daemon.start()
    with contextlib.closing(sqlite3.connect(daemon.database)) as database, database:
        rows = [("one@d1.test", "alice+x"), ("two@d1.test", "alice+x"), ("three@d1.test", "bob+y")]
        database.executemany("INSERT INTO aliases (alias_email, username) VALUES (?, ?)", rows)
    for address, username in rows * 3:
        assert daemon.ask_map(f"alias {address}") == f"TEMP username {username} holds a recipient delimiter"
    lines = [line for line in daemon.log().splitlines() if "reason=username-with-delimiter" in line]
    assert [" error " in line for line in lines] == [True, False, True] + [False] * 6
    daemon.reload()
    daemon.ask_map("alias two@d1.test")
    assert " error socketmap: defer map=alias key=<two@d1.test> reason=username-with-delimiter" in daemon.log()


def test_stats_hold_the_last_reload(static_daemon):
    assert ask(static_daemon, "stats *")["last_reload"] is None
    static_daemon.reload()
    wait_until(lambda: (ask(static_daemon, "stats *")["last_reload"] or {}).get("ok") is True)
    static_daemon.config["policy"]["domain"] = "not a domain"
    static_daemon.reload()
    wait_until(lambda: ask(static_daemon, "stats *")["last_reload"]["ok"] is False)


# ---- explain


@each_state
def test_explanation_is_of_the_answer_that_is_given(state, rows, make_daemon, keycloak):
    client = start_in_state(state, make_daemon, keycloak).socketmap()
    explained = {}
    for row in rows:
        name, _, key = row.ask.get("query", "").partition(" ")
        if "query" in row.ask and (name != "alias" or not key):
            explained[row.id] = row.answer
            continue
        question = {"alias": key} if name else {"policy": {"protocol_state": "RCPT", **row.ask}}
        answer = client.ask(f"explain {json.dumps(question)}")
        assert answer.startswith("OK "), (row.id, answer)
        explained[row.id] = json.loads(answer[3:])["answer"]
    assert explained == {row.id: row.answer for row in rows}


def test_steps_name_what_was_asked_what_was_found_and_where(make_daemon, keycloak):
    keycloak.add_user("alice", "alice@d1.test")
    daemon = make_daemon(keycloak=keycloak.config(), policy={"cache_ttl_seconds": 0.5}).start()
    daemon.ctl("aliases", "add", "info@d1.test", "alice")
    question = "explain " + json.dumps({"policy": {"protocol_state": "RCPT", "recipient": "ALICE@d1.test"}})

    def steps():
        return [(step["asked"], step["value"], step["source"], step["error"]) for step in ask(daemon, question)["steps"]]

    alias = ("alias", "alice@d1.test", "database", "")
    assert steps() == [alias, ("holders", "alice@d1.test", "keycloak", "")]
    assert steps() == [alias, ("holders", "alice@d1.test", "cache", "")]
    explained = ask(daemon, question)
    assert explained["reason"] == "primary,sender-not-local"
    assert explained["steps"][0]["found"] is None
    assert explained["steps"][1]["found"][0]["username"] == "alice"
    assert 0 <= explained["steps"][1]["age_seconds"] < 5
    keycloak.fault = "status-503"
    time.sleep(0.6)
    assert steps() == [alias, ("holders", "alice@d1.test", "outage", "")]
    (step,) = ask(daemon, "explain " + json.dumps({"alias": "info@d1.test"}))["steps"][-1:]
    assert step["found"] == {"users": ["alice"], "enabled": True, "external": [], "receive_only": False}
    stranger = ask(daemon, "explain " + json.dumps({"policy": {"protocol_state": "RCPT", "recipient": "bob@d1.test"}}))
    assert "HTTP 503" in stranger["steps"][-1]["error"] or "away" in stranger["steps"][-1]["error"]


@pytest.mark.parametrize(
    "question", ["x", "[]", "{}", '{"policy": 1}', '{"policy": {"no_such_attribute": "x"}}', "[" * 5000, '"alias"', "null", "1"]
)
def test_what_is_no_question_is_said_so(static_daemon, question):
    assert static_daemon.ask_map(f"explain {question}") == "PERM not a question"
    assert "internal error" not in static_daemon.log()


# ---- flush


def test_flush_forgets_a_user_in_memory_and_on_disk(make_daemon, keycloak):
    for name in ("alice", "bob"):
        keycloak.add_user(name, f"{name}@d1.test")
    daemon = make_daemon(keycloak=keycloak.config()).start()
    for name in ("alice", "bob"):
        assert daemon.ask(recipient=f"{name}@d1.test") == "DUNNO"
        assert daemon.ask(sender=f"{name}@d1.test", sasl_username=name) == "DUNNO"
    assert ask(daemon, "flush Alice@D1.test") == {"forgotten": 1}
    assert ask(daemon, "flush nobody@d1.test") == {"forgotten": 0}
    keycloak.users.clear()
    keycloak.add_user("carol", "carol@d1.test")
    assert daemon.ask(recipient="alice@d1.test") == "550 5.1.1 No such user"
    assert daemon.ask(recipient="bob@d1.test") == "DUNNO"
    daemon.stop()
    keycloak.fault = "status-503"
    daemon.start()
    assert daemon.ask(recipient="alice@d1.test").startswith("451")
    assert daemon.ask(recipient="bob@d1.test") == "DUNNO"
    assert ask(daemon, "flush *")["forgotten"] >= 1
    assert daemon.ask(recipient="bob@d1.test").startswith("451")
    daemon.stop()
    daemon.start()
    assert daemon.ask(recipient="bob@d1.test").startswith("451")


@pytest.mark.parametrize("name", ["alice", "ALICE", "alice@d1.test", "alice+shop@d1.test"])
def test_flush_of_any_name_of_a_user_forgets_all_of_the_user(make_daemon, keycloak, name):
    for username in ("alice", "bob"):
        keycloak.add_user(username, f"{username}@d1.test")
    daemon = make_daemon(keycloak=keycloak.config()).start()
    daemon.ask(recipient="alice+x@d1.test")
    daemon.ask(recipient="bob@d1.test")
    if "@" not in name:
        daemon.ask(sender="alice@d1.test", sasl_username="alice")
        daemon.ask(sender="alice@d1.test", sasl_username="alice@d1.test")
    assert ask(daemon, f"flush {name}")["forgotten"] > 0
    keycloak.users.remove(keycloak.user("alice"))
    assert daemon.ask(recipient="alice@d1.test") == "550 5.1.1 No such user"
    assert daemon.ask(sender="alice@d1.test", sasl_username="alice").startswith("553")
    assert daemon.ask(sender="alice@d1.test", sasl_username="alice@d1.test").startswith("553")
    daemon.stop()
    keycloak.fault = "status-503"
    daemon.start()
    assert daemon.ask(recipient="alice@d1.test").startswith("451")
    assert daemon.ask(recipient="bob@d1.test") == "DUNNO"


def test_flush_forgets_a_username_with_an_international_domain(make_daemon, keycloak):
    keycloak.add_user("zoe@b\u00fccher.test", "zoe@d1.test")
    daemon = make_daemon(keycloak=keycloak.config()).start()
    assert daemon.ask(recipient="zoe@d1.test") == "DUNNO"
    assert ask(daemon, "flush zoe@b\u00fccher.test")["forgotten"] > 0
    keycloak.users.clear()
    keycloak.add_user("other")
    assert daemon.ask(recipient="zoe@d1.test").startswith("550")


def test_flush_makes_a_removed_user_count_where_the_answer_was_remembered(make_daemon, keycloak):
    keycloak.add_user("alice", "alice@d1.test")
    keycloak.add_user("bob", "bob@d1.test")
    daemon = make_daemon(keycloak=keycloak.config()).start()
    client = daemon.policy()
    for _ in range(3):
        assert client.ask(recipient="alice@d1.test") == "DUNNO"
    keycloak.users.remove(keycloak.user("alice"))
    assert client.ask(recipient="alice@d1.test") == "DUNNO"
    ask(daemon, "flush alice@d1.test")
    assert client.ask(recipient="alice@d1.test") == "550 5.1.1 No such user"


# ---- who may ask


@pytest.mark.real("root")
def test_stats_are_for_all_who_may_connect_and_the_others_for_the_owner(make_daemon):
    daemon = make_daemon(static_users=USERS, sockets={"socket_mode": "0666"}).start()
    path = daemon.config["sockets"]["socketmap_socket"]
    assert as_nobody(lambda: SocketmapClient(path).ask("stats *")[:3]) == "OK "
    for query in ('explain {"alias": "info@d1.test"}', "flush *"):
        assert "PERM" in as_nobody(lambda query=query: SocketmapClient(path).ask(query))
    assert "warning socketmap: error map=flush key=<*> reason=not-permitted" in daemon.log()
