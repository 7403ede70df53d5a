"""The directory client against a stand-in for Keycloak: what it asks, how it reads answers, and what it does without an answer."""

from __future__ import annotations

import contextlib
import gc
import gzip
import json
import math
import re
import socket
import threading
import time
import tracemalloc
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from conftest import wait_until
from keycloak_stand_in import CLIENT_SECRET, SELF_CHECK, KeycloakStandIn

import mailcloak

DEFER = "451 4.3.0 Temporary authentication/lookup failure"
REJECT = "550 5.1.1 No such user"
NOT_OWNED = "553 5.7.1 Sender not owned by authenticated user"


@pytest.fixture
def directory(keycloak):
    """A client of the stand-in with a timeout of one second."""
    client = make_directory(keycloak)
    wait_until(lambda: any(kind == "profile" for kind, _ in keycloak.requests), what="self-check")
    wait_until(lambda: keycloak.at_once == 0, what="its end")
    keycloak.forget_requests()
    client._api._token = mailcloak.Token("", -math.inf, time.monotonic())  # as if nothing had been asked yet
    yield client
    client.close()


def make_directory(keycloak, **more):
    problems = []
    config = mailcloak.read_block(mailcloak.KeycloakConfig, "keycloak", keycloak.config(timeout_seconds=1, **more), problems)
    assert not problems
    return mailcloak.KeycloakUsers(config)


def find(directory, attribute, value, seconds=1.0):
    """The users of the answer."""
    return directory.find_users((attribute, value), time.monotonic() + seconds).users


# ---- what is asked


def test_search_asks_exactly_one_question_with_one_token(keycloak, directory):
    user_id = keycloak.add_user("alice", "alice@d1.test")["id"]
    for _ in range(3):
        assert find(directory, "email", "alice@d1.test") == (mailcloak.User("alice", "alice@d1.test", True, user_id=user_id),)
    query = {"email": "alice@d1.test", "exact": "true", "briefRepresentation": "true", "max": "10"}
    assert keycloak.searches == [query] * 3
    assert keycloak.token_requests == 1


@pytest.mark.parametrize(
    "value", ["a+b@d1.test", "a&b=c@d1.test", "a%2bb@d1.test", "a#b?c@d1.test", "jürgen@d1.test", "a'b@d1.test", "a;b@d1.test"]
)
def test_characters_of_an_address_reach_keycloak_unharmed(keycloak, directory, value):
    keycloak.add_user("odd", value)
    assert [user.username for user in find(directory, "email", value)] == ["odd"]
    assert keycloak.searches[0]["email"] == value


def test_base_url_with_a_path_and_a_realm_with_a_slash_work():
    with KeycloakStandIn(realm="a%2Fb%20c", path="/auth") as keycloak:
        keycloak.add_user("alice", "alice@d1.test")
        config = {**keycloak.config(timeout_seconds=1), "realm": "a/b c", "base_url": keycloak.url + "/"}
        directory = mailcloak.KeycloakUsers(mailcloak.read_block(mailcloak.KeycloakConfig, "keycloak", config, []))
        assert find(directory, "username", "alice")
        directory.close()


def test_token_is_renewed_at_four_fifths_of_its_life(keycloak, directory, monkeypatch):
    keycloak.token_seconds = 100
    clock, later = time.monotonic, 0
    monkeypatch.setattr(mailcloak.time, "monotonic", lambda: clock() + later)
    find(directory, "email", "a@d1.test")
    later = 78
    find(directory, "email", "b@d1.test")
    assert keycloak.token_requests == 1
    later = 81
    find(directory, "email", "c@d1.test")
    assert keycloak.token_requests == 2


def test_revoked_token_is_renewed_once_and_the_question_asked_again(keycloak, directory):
    keycloak.add_user("alice", "alice@d1.test")
    find(directory, "email", "alice@d1.test")
    keycloak.revoke_tokens()
    assert find(directory, "email", "alice@d1.test")
    assert (keycloak.token_requests, len(keycloak.searches)) == (2, 3)


def test_tokens_that_never_work_end_after_one_renewal(keycloak, directory):
    keycloak.token_seconds = 1e-9
    with pytest.raises(mailcloak.DirectoryUnavailable, match="HTTP 401"):
        find(directory, "email", "alice@d1.test")
    assert keycloak.requests.count(("token", {})) <= 4  # two of the probe among them
    assert len(keycloak.searches) == 2


def test_many_questions_at_once_fetch_one_token_and_are_eight_at_a_time(keycloak, directory):
    keycloak.latency_seconds = 0.2  # long enough that eight meet on a busy machine
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda number: find(directory, "email", f"u{number}@d1.test", 5), range(20)))
    assert keycloak.token_requests == 1
    assert keycloak.most_at_once == 8


def test_equal_questions_at_once_are_asked_once(keycloak, directory):
    keycloak.add_user("alice", "alice@d1.test")
    keycloak.latency_seconds = 0.3
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: find(directory, "email", "alice@d1.test"), range(20)))
    assert len(keycloak.searches) == 1
    assert all(answers)


def test_connection_is_kept_from_question_to_question(keycloak, directory):
    sockets = set()
    original = keycloak.search
    keycloak.search = lambda query: sockets.add(threading.current_thread().ident) or original(query)
    for number in range(5):
        find(directory, "email", f"u{number}@d1.test")
    assert len(sockets) <= 5
    assert keycloak.token_requests == 1


def test_restarted_keycloak_is_asked_again_over_a_new_connection():
    first = KeycloakStandIn().start()
    first.add_user("alice", "alice@d1.test")
    directory = make_directory(first)
    assert find(directory, "email", "alice@d1.test")
    first.stop()
    with KeycloakStandIn(port=first.port) as second:
        second.add_user("alice", "alice@d1.test")
        assert find(directory, "email", "alice@d1.test")  # with a token the second has never seen
    directory.close()


def test_proxies_and_netrc_of_the_environment_are_not_used(make_daemon, keycloak, short_dir):
    (short_dir / ".netrc").write_text("machine 127.0.0.1 login evil password evil\n")
    keycloak.add_user("alice", "alice@d1.test")
    environment = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    daemon = make_daemon(keycloak=keycloak.config(), environment={**environment, "HOME": str(short_dir), "no_proxy": ""}).start()
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"


# ---- what is made of answers


@pytest.mark.parametrize(
    ("user", "found"),
    [
        pytest.param({"username": "Alice", "email": "Alice@D1.test"}, True, id="other-case"),
        pytest.param({"username": "alice", "email": "alice@d1.test", "enabled": False}, True, id="disabled-is-found"),
        pytest.param({"username": "malice", "email": "malice@d1.test"}, False, id="longer-address"),
        pytest.param({"username": "x", "email": "alice@d1.test.evil.test"}, False, id="longer-domain"),
    ],
)
def test_server_that_ignores_exact_gives_no_other_user(keycloak, directory, user, found):
    keycloak.ignore_exact = True
    keycloak.add_user(**user)
    assert [each.email for each in find(directory, "email", "alice@d1.test")] == (["alice@d1.test"] if found else [])


def test_full_list_without_the_user_is_no_answer(keycloak, directory):
    keycloak.ignore_exact = True
    for number in range(12):
        keycloak.add_user(f"malice{number}", f"{number}alice@d1.test")
    keycloak.add_user("alice", "alice@d1.test")
    with pytest.raises(mailcloak.DirectoryUnavailable, match="no exact match"):
        find(directory, "email", "alice@d1.test")


@pytest.mark.parametrize(("count", "email"), [(10, "alice@d1.test"), (11, "alice@d1.test"), (101, "{n}@d1.test")])
def test_more_users_than_were_asked_for_are_no_answer(keycloak, directory, count, email):
    keycloak.search = lambda query: [{**keycloak.users[0], "id": str(n), "email": email.format(n=n)} for n in range(count)]
    with pytest.raises(mailcloak.DirectoryUnavailable, match=f"{count} users for one email, (there may be more|more than)"):
        find(directory, "email", "alice@d1.test")


@pytest.mark.parametrize("email", ["alice@\uff441.test", "alice@d1\u3002test", "alice@d1.test.", "alice%d1.test"])
def test_email_that_is_another_spelling_of_an_address_is_no_address(keycloak, directory, email):
    """Keycloak takes it for another e-mail than alice@d1.test, so two users may have the two."""
    keycloak.add_user("alice", "Alice@D1.test")
    keycloak.add_user("mallory", email)
    assert [user.email for user in find(directory, "username", "mallory")] == [""]
    assert [user.email for user in find(directory, "username", "alice")] == ["alice@d1.test"]


def test_unverified_address_counts_unless_verification_is_required(keycloak):
    keycloak.add_user("alice", "alice@d1.test", verified=False)
    lax, strict = make_directory(keycloak), make_directory(keycloak, require_verified_email=True)
    assert find(lax, "email", "alice@d1.test")
    assert [user.email for user in find(strict, "email", "alice@d1.test")] == [""]
    assert [user[:3] for user in find(strict, "username", "alice")] == [("alice", "", True)]
    keycloak.user("alice")["emailVerified"] = True
    assert find(strict, "email", "alice@d1.test")
    lax.close()
    strict.close()


def test_service_account_has_no_address(keycloak, directory):
    keycloak.add_user("service-account-shop", "shop@d1.test")
    keycloak.add_user("robot", "robot@d1.test", serviceAccountClientId="robot")
    keycloak.search = lambda query: keycloak.users[-1:] if query.get("email") == "robot@d1.test" else keycloak.users[-2:-1]
    for name in ("shop", "robot"):
        assert [user.email for user in find(directory, "email", f"{name}@d1.test")] == [""]


@pytest.mark.parametrize("stored", ["ulla@bücher.test", "ulla@BÜCHER.test", "ulla@xn--bcher-kva.test"])
def test_international_domain_is_found_in_either_spelling(keycloak, directory, stored):
    keycloak.add_user("ulla", stored)
    assert [user[:3] for user in find(directory, "email", "ulla@xn--bcher-kva.test")] == [("ulla", "ulla@xn--bcher-kva.test", True)]


# ---- no usable answer is an outage, never "no such user"

FAULTS = [fault for fault in KeycloakStandIn.FAULTS if fault not in ("empty", "other-user")]


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_a_search_is_an_outage_within_the_timeout(keycloak, directory, fault):
    keycloak.add_user("alice", "alice@d1.test")
    assert find(directory, "email", "alice@d1.test")
    keycloak.fault = fault
    started = time.monotonic()
    with pytest.raises(mailcloak.DirectoryUnavailable):
        find(directory, "email", "alice@d1.test")
    assert time.monotonic() - started < 1.5
    keycloak.fault = None
    wait_until(lambda: not directory.outage.established)
    assert find(directory, "email", "alice@d1.test", 3)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_the_token_endpoint_is_an_outage_within_the_timeout(keycloak, directory, fault):
    keycloak.add_user("alice", "alice@d1.test")
    keycloak.token_fault = fault
    started = time.monotonic()
    with pytest.raises(mailcloak.DirectoryUnavailable):
        find(directory, "email", "alice@d1.test")
    assert time.monotonic() - started < 1.5
    keycloak.token_fault = None

    def is_found():
        with contextlib.suppress(mailcloak.DirectoryUnavailable):  # the probe's own request for a token may still be under way
            return find(directory, "email", "alice@d1.test", 3)

    wait_until(is_found)


@pytest.mark.long
@pytest.mark.parametrize("fault", ["stall", "drip", "drip-headers"])
def test_worker_is_free_again_soon_after_a_hanging_answer(keycloak, directory, fault):
    keycloak.fault = fault
    keycloak.fault_seconds = 4 if fault == "stall" else 60  # one that drips notices by itself that its client is gone
    with ThreadPoolExecutor(16) as pool:
        lookups = [pool.submit(find, directory, "email", f"u{number}@d1.test") for number in range(16)]
    assert {type(lookup.exception()) for lookup in lookups} == {mailcloak.DirectoryUnavailable}
    keycloak.fault = None
    wait_until(lambda: not directory.outage.established)
    wait_until(lambda: keycloak.at_once == 0)
    keycloak.forget_requests()
    keycloak.latency_seconds = 0.5
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: find(directory, "email", f"w{number}@d1.test", 5), range(8)))
    assert keycloak.most_at_once == 8  # all eight are back


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"client_secret": "wrong"},
            "token refused (HTTP 401 unauthorized_client), host HOST, check keycloak.realm, client_id and client_secret, and that the client"
            " has Service accounts roles on",
            id="secret",
        ),
        pytest.param(
            {"realm": "nowhere"}, "no such realm (HTTP 404), host HOST, check keycloak.realm and keycloak.base_url", id="realm"
        ),
        pytest.param({"base_url": "http://127.0.0.1:9"}, "connection refused, host 127.0.0.1:9", id="refused"),
        pytest.param({"base_url": "https://no-such-host.invalid"}, ", host no-such-host.invalid:443", id="usual-port"),
        pytest.param({"base_url": "http://no-such-host.invalid"}, ", host no-such-host.invalid:80", id="name"),
    ],
)
def test_wrong_setting_is_named_in_the_log_once(keycloak, make_daemon, change, message):
    daemon = make_daemon(keycloak=keycloak.config(**change)).start()
    for _ in range(3):
        assert daemon.ask(recipient="alice@d1.test") == DEFER
    daemon.wait_for_log(" directory: realm ")
    wait_until(lambda: re.search("(warning|error) directory: realm", daemon.log()))
    lines = [line for line in daemon.log().splitlines() if re.search("(warning|error) directory: ", line)]
    assert len(lines) == 1
    assert message.replace("HOST", f"127.0.0.1:{keycloak.port}") in lines[0]


def test_missing_role_is_named_in_the_log(keycloak_daemon, keycloak):
    keycloak.role = ""
    assert keycloak_daemon.ask(recipient="alice@d1.test") == DEFER
    keycloak_daemon.wait_for_log(
        f"search refused (HTTP 403), host 127.0.0.1:{keycloak.port}, give the service account of client 'mailcloak' the"
        " realm-management role view-users"
    )


def test_outage_is_logged_once_and_its_end_with_a_count(keycloak_daemon, keycloak):
    assert keycloak_daemon.ask(recipient="alice@d1.test") == "DUNNO"
    keycloak.fault = "status-503"
    for name in ("bob", "stranger", "other", "one-more"):
        assert keycloak_daemon.ask(recipient=f"{name}@d1.test") == DEFER
    assert keycloak_daemon.ask(recipient="alice@d1.test") == "DUNNO"  # still fresh in the cache
    keycloak_daemon.wait_for_log("warning directory: realm 'mail': search failed (HTTP 503)")
    keycloak.fault = None
    keycloak_daemon.wait_for_log("answers again")
    assert keycloak_daemon.ask(recipient="stranger@d1.test") == REJECT
    log = keycloak_daemon.log()
    assert log.count("warning directory: realm 'mail': search failed (HTTP 503)") == 1
    assert re.search(r"answers again, after \d+ s; 0 answers came from the cache, 4 were deferred", log)


def test_secrets_and_tokens_are_not_logged_at_debug(keycloak_daemon, keycloak):
    tokens = []
    issue = keycloak.issue_token
    keycloak.issue_token = lambda: tokens.append(issue()) or tokens[-1]
    for fault in (None, *FAULTS[3:]):
        keycloak.revoke_tokens()
        keycloak.fault = fault
        keycloak_daemon.ask(recipient=f"{fault}@d1.test")
    assert tokens
    log = keycloak_daemon.log()
    assert not any(secret in log for secret in [*tokens, CLIENT_SECRET])


# ---- what is done once for all who need it


def share(first_seconds, first_result, second_since=0.0):
    """What two threads get from shared work: the second asks while the first is at it, with time enough. (results, how often done)."""
    shared, calls = mailcloak.Shared("a test"), []

    def work(number):
        calls.append(number)
        if number == 1:
            time.sleep(0.3)
        result = first_result if number == 1 else "good"
        if result != "good":
            raise mailcloak.DirectoryUnavailable(result)
        return result

    def get(number, since, seconds):
        try:
            return shared.get(since, time.monotonic() + seconds, lambda: work(number))
        except mailcloak.DirectoryUnavailable as exc:
            return str(exc)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(get, 1, 0.0, first_seconds)
        wait_until(lambda: calls)
        second = pool.submit(get, 2, time.monotonic() if second_since is None else second_since, 5.0)
        return (first.result(), second.result()), calls


def test_result_serves_those_who_wait_for_it():
    assert share(5.0, "good") == (("good", "good"), [1])


def test_failure_is_one_of_all_who_wait_for_it():
    assert share(5.0, "refused") == (("refused", "refused"), [1])


def test_failure_for_lack_of_time_is_none_of_those_who_have_more():
    assert share(0.2, "timed out") == (("timed out", "good"), [1, 2])


@pytest.mark.parametrize("result", ["good", "refused"])
def test_work_that_began_before_it_was_needed_is_done_again(result):
    assert share(5.0, result, second_since=None) == ((result, "good"), [1, 2])


# ---- the self-check

SEES_NOBODY = (
    "sees no users at all (query-users is not enough), give the service account of client 'mailcloak' the realm-management role"
)


@pytest.mark.parametrize(
    ("role", "change", "message"),
    [
        pytest.param(
            "view-users",
            {"client_secret": "wrong"},
            "token refused (HTTP 401 unauthorized_client), host HOST, check keycloak.realm, client_id",
            id="secret",
        ),
        pytest.param("view-users", {"realm": "nowhere"}, "no such realm (HTTP 404), host HOST, check keycloak.realm", id="realm"),
        pytest.param(
            "",
            {},
            "search refused (HTTP 403), host HOST, give the service account of client 'mailcloak' the realm-management role",
            id="no-role",
        ),
        pytest.param("query-users", {}, SEES_NOBODY, id="role-that-sees-nobody"),
    ],
)
def test_wrong_setting_is_one_error_line_at_start_before_any_question(keycloak, make_daemon, role, change, message):
    keycloak.role = role
    daemon = make_daemon(keycloak=keycloak.config(**change)).start()
    daemon.wait_for_log(message.replace("HOST", f"127.0.0.1:{keycloak.port}"))
    (line,) = [line for line in daemon.log().splitlines() if " directory: " in line]
    assert " error directory: realm " in line


def test_wrong_setting_that_shows_after_keycloak_is_up_is_an_error_line_too(make_daemon):
    keycloak = KeycloakStandIn()
    keycloak.stop_listening()
    daemon = make_daemon(keycloak=keycloak.config(client_secret="wrong")).start()
    daemon.wait_for_log("warning directory: realm 'mail': connection refused")
    with KeycloakStandIn(port=keycloak.port):
        daemon.wait_for_log("error directory: realm 'mail': token refused (HTTP 401 ")
    assert daemon.log().count("token refused") == 1


def test_self_check_uses_the_token_endpoint_and_one_user_alone(keycloak, directory):
    client = make_directory(keycloak, require_verified_email=True)
    wait_until(lambda: keycloak.self_checks)
    wait_until(lambda: keycloak.at_once == 0)
    assert keycloak.requests == [("token", {}), ("users", SELF_CHECK)]
    client.close()


def test_daemon_answers_while_the_self_check_hangs(keycloak, make_daemon):
    keycloak.token_fault = "stall"
    daemon = make_daemon(keycloak=keycloak.config()).start()
    assert daemon.ask(recipient="x@elsewhere.test") == "DUNNO"
    assert daemon.ask_map("alias x@d1.test") == "NOTFOUND "


def test_empty_answer_of_a_role_that_sees_nobody_is_no_proof_until_it_is_mended(keycloak_daemon, keycloak):
    keycloak.role = "query-users"
    for _ in range(2):
        keycloak_daemon.reload()
        assert keycloak_daemon.ask(recipient="stranger@d1.test") == DEFER
        assert keycloak_daemon.ask(recipient="alice@d1.test") == DEFER
    keycloak_daemon.wait_for_log(SEES_NOBODY)
    keycloak.role = "view-users"
    wait_until(lambda: keycloak_daemon.ask(recipient="stranger@d1.test") == REJECT)
    assert keycloak_daemon.ask(recipient="alice@d1.test") == "DUNNO"


def test_each_empty_answer_is_believed_after_a_proof_asked_for_after_it(keycloak, directory):
    for number in range(3):
        assert find(directory, "email", f"stranger{number}@d1.test") == ()
    asked = [(kind, query.get("email") or query.get("max")) for kind, query in keycloak.requests if kind == "users"]
    assert asked == [("users", each) for number in range(3) for each in (f"stranger{number}@d1.test", "1")]


NO_ANSWERS = {
    "nothing in it": [{}],
    "an error": [{"error": "unknown_error"}],
    "without the e-mail": [{"id": "2", "username": "bob", "enabled": True}],
}


@pytest.mark.parametrize("what", NO_ANSWERS)
def test_records_without_what_was_asked_for_do_not_say_that_nobody_is_there(keycloak, directory, what):
    keycloak.add_user("bob", "bob@d1.test")
    original = keycloak.search
    keycloak.search = lambda query: NO_ANSWERS[what] if "email" in query else original(query)
    with pytest.raises(mailcloak.DirectoryUnavailable):
        find(directory, "email", "bob@d1.test")


def test_records_without_names_do_not_prove_that_keycloak_shows_users(keycloak, directory):
    original = keycloak.search
    keycloak.search = lambda query: [{}] if query == SELF_CHECK else original(query)
    with pytest.raises(mailcloak.DirectoryUnavailable):
        find(directory, "email", "stranger@d1.test")


def test_question_that_is_refused_alone_is_no_outage(keycloak_daemon, keycloak):
    """By a proxy that dislikes a word in it."""
    keycloak.refused_word = "union"
    for number in range(2):
        assert keycloak_daemon.ask(recipient=f"union{number}@d1.test") == DEFER
        assert keycloak_daemon.ask(recipient=f"stranger{number}@d1.test") == REJECT
    assert "counts as away" not in keycloak_daemon.log()


def test_answer_that_shows_only_a_disabled_user_is_believed_after_the_same_proof_but_for_a_username_without_federation(
    keycloak, directory
):
    keycloak.add_user("alice", "alice@d1.test")
    assert find(directory, "email", "alice@d1.test")
    keycloak.user("alice")["enabled"] = False
    assert find(directory, "username", "alice")
    assert keycloak.self_checks == 0
    assert find(directory, "email", "alice@d1.test")  # another user may have the same
    assert keycloak.self_checks == 1
    keycloak.user("alice")["federationLink"] = "ldap"
    assert find(directory, "username", "alice")
    assert keycloak.self_checks == 2


@pytest.mark.long
def test_proof_is_shared_by_those_who_wait_for_it(keycloak, directory):
    keycloak.latency_seconds = 0.2
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda number: find(directory, "email", f"u{number}@d1.test", 10), range(40)))
    assert answers == [()] * 40
    assert 1 <= keycloak.self_checks < 20


@pytest.mark.parametrize("known_before", [True, False])
def test_role_lost_at_run_time_refuses_nobody(keycloak, make_daemon, known_before):
    """Not even the first question after it, though another one was answered just before."""
    names = [f"user{number}" for number in range(20)]
    for name in names:
        keycloak.add_user(name, f"{name}@d1.test")
    policy = {"domain": "d1.test", "cache_ttl_seconds": 0.01, "negative_cache_ttl_seconds": 0, "disappearance_grace_seconds": 0}
    daemon = make_daemon(keycloak=keycloak.config(), policy=policy).start()
    if known_before:
        assert {daemon.ask(recipient=f"{name}@d1.test") for name in names} == {"DUNNO"}
    assert daemon.ask(recipient="stranger@d1.test") == REJECT
    keycloak.role = "query-users"
    clients = [daemon.policy() for _ in names]
    for name, client in zip(names, clients):
        client.send(recipient=f"{name}@d1.test", sender=f"{name}@d1.test", sasl_username=name, sasl_method="XOAUTH2")
    assert {client.receive() for client in clients} <= {DEFER, "DUNNO"}
    assert daemon.ask(recipient="stranger@d1.test") == DEFER
    daemon.wait_for_log(SEES_NOBODY)


@pytest.mark.parametrize("name", ["username", "email", "id", "federationLink"])
def test_name_that_is_over_long_or_no_text_is_no_answer(keycloak, directory, name):
    user = keycloak.add_user("alice", "alice@d1.test", federationLink="ldap")
    original = keycloak.search
    for value in ("a" * 256 + "@d1.test", 5, ["alice"]):
        keycloak.search = lambda query, value=value: [{**user, name: value}] if query != SELF_CHECK else original(query)
        with pytest.raises(mailcloak.DirectoryUnavailable, match=f"a user record whose {name} "):
            find(directory, "email", "alice@d1.test")
        keycloak.search = original
        wait_until(lambda: not directory.outage._failures)
    (found,) = find(directory, "email", "alice@d1.test")
    assert (found.federation, found.user_id, found.key) == ("ldap", user["id"], user["id"])


def test_self_check_is_repeated_in_an_outage_until_it_is_over(keycloak):
    keycloak.token_fault = "status-503"
    directory = make_directory(keycloak)
    wait_until(lambda: directory.outage.established)
    keycloak.token_fault = None
    wait_until(lambda: not directory.outage.established)
    assert keycloak.self_checks == 1
    directory.close()


TAKEN = "users may change their own e-mail and so take over any address"


@pytest.mark.parametrize(
    ("edit", "verified", "said"),
    [
        pytest.param(["admin", "user"], False, 1, id="users-may-edit"),
        pytest.param(["admin"], False, 0, id="admins-alone"),
        pytest.param(["admin", "user"], True, 0, id="verified-required"),
        pytest.param(None, False, 0, id="unreadable"),
    ],
)
def test_email_that_users_may_edit_is_one_error_line(keycloak, make_daemon, edit, verified, said):
    keycloak.profile_edit = edit
    keycloak.add_user("alice", "alice@d1.test")
    daemon = make_daemon(keycloak=keycloak.config(require_verified_email=verified)).start()
    wait_until(lambda: keycloak.self_checks and keycloak.at_once == 0)
    if not verified:
        wait_until(lambda: ("profile", {}) in keycloak.requests and keycloak.at_once == 0)
    if said:
        daemon.wait_for_log(TAKEN)
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"
    assert daemon.stop() == 0
    assert daemon.log().count(f" error directory: realm 'mail': {TAKEN}") == said


# ---- the bytes of an answer


class RawServer:
    """A server that reads a request without a body and lets behave(connection) write what it likes, on one connection after the other."""

    def __init__(self, behave, context=None):
        self.requests, self.connections, self.stopping = [], 0, threading.Event()
        self._behave, self._context = behave, context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve_connection, args=[connection], daemon=True).start()

    def _serve_connection(self, connection):
        with contextlib.suppress(OSError):
            if self._context:
                connection = self._context.wrap_socket(connection, server_side=True)
            with connection, connection.makefile("rb") as lines:
                head = ""
                for line in lines:
                    head += line.decode()
                    if line == b"\r\n":
                        self.requests.append(head)
                        self._behave(connection)
                        head = ""
        self.stopping.set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


class Client:
    """Requests with one session, as a worker of the directory makes them."""

    def __init__(self, server, ca_file=""):
        self.session = mailcloak.new_session(ca_file)
        self.url = server.url
        block = {"base_url": server.url, "realm": "mail", "client_id": "x", "client_secret": "y"}
        self._api = mailcloak.KeycloakApi(mailcloak.read_block(mailcloak.KeycloakConfig, "keycloak", block, []))

    def get(self, seconds=5.0):
        return self._api._exchange(self.session, time.monotonic() + seconds, "GET", self.url)


def answer_once(data):
    return RawServer(lambda connection: connection.sendall(data))


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
# What is sent once, then for ever.
ENDLESS = {
    "100 Continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "lines of a 100 Continue": (b"HTTP/1.1 100 Continue\r\n", b"X: y\r\n"),
    "status line": (b"HTTP/1.1 200 ", b"O"),
    "header": (b"HTTP/1.1 200 OK\r\nX: ", b"y"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "chunk size": (CHUNKED, b"0"),
    "chunk extension": (CHUNKED + b"1;", b"x"),
    "small chunks": (CHUNKED, b"1\r\n \r\n"),
    "trailer": (CHUNKED + b"2\r\n[]\r\n0\r\nX: ", b"y"),
    "trailers": (CHUNKED + b"2\r\n[]\r\n0\r\n", b"X: y\r\n"),
    "body without a length": (b"HTTP/1.0 200 OK\r\n\r\n", b" "),
}


def send_for_ever(beginning, unit, pause):
    """A server that goes on until its client has gone, for four seconds at most, so that a client that stays fails its test."""

    def behave(connection):
        end = time.monotonic() + 4
        connection.sendall(beginning)
        while time.monotonic() < end:
            connection.sendall(unit)
            if pause:
                time.sleep(pause)

    return behave


@pytest.mark.parametrize("what", ENDLESS)
@pytest.mark.parametrize("speed", ["drips", "floods"])
def test_answer_without_an_end_ends_at_the_deadline(what, speed):
    beginning, unit = ENDLESS[what]
    behave = send_for_ever(beginning, unit, 0.02) if speed == "drips" else send_for_ever(beginning, unit * (16384 // len(unit)), 0)
    with RawServer(behave) as server:
        client = Client(server)
        started = time.monotonic()
        with pytest.raises(mailcloak.DirectoryUnavailable):
            client.get(0.5)
        assert time.monotonic() - started < 1.0
        client.session.close()


def test_answer_without_an_end_ends_at_the_deadline_over_tls_too(certificate):
    with RawServer(send_for_ever(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.02), certificate.context) as server:
        client = Client(server, certificate.file)
        started = time.monotonic()
        with pytest.raises(mailcloak.DirectoryUnavailable, match="timed out"):
            client.get(0.5)
        assert time.monotonic() - started < 1.0
        client.session.close()


LINE = b"X: " + b"y" * 11_000 + b"\r\n"  # 95 are more than 1 MiB, and less than what http.client itself allows


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda lines: b"HTTP/1.1 200 OK\r\n" + lines + b"Content-Length: 2\r\n\r\n[]", id="headers"),
        pytest.param(
            lambda lines: b"HTTP/1.1 100 Continue\r\n" + lines + b"\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
            id="100-continue",
        ),
        pytest.param(
            lambda lines: CHUNKED + lines.replace(b"X: ", b"1;").replace(b"\r\n", b"\r\n \r\n") + b"2\r\n[]\r\n0\r\n\r\n",
            id="chunk-extensions",
        ),
        pytest.param(lambda lines: CHUNKED + b"2\r\n[]\r\n0\r\n" + lines + b"\r\n", id="trailers"),
        pytest.param(
            lambda lines: b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n[]" % (len(lines) + 2) + b" " * len(lines), id="body"
        ),
    ],
)
def test_all_bytes_of_an_answer_count_towards_its_limit(make):
    with answer_once(make(LINE * 90)) as server:
        client = Client(server)
        status, body = client.get()
        assert (status, body.strip()) == (200, b"[]")
        client.session.close()
    with answer_once(make(LINE * 96)) as server:
        client = Client(server)
        with pytest.raises(mailcloak.DirectoryUnavailable, match="an answer of more than 1048576 bytes"):
            client.get()
        client.session.close()


@pytest.mark.parametrize("status", ["200 OK", "302 Found\r\nLocation: /elsewhere", "401 Unauthorized"])
@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "deflate", "gzip, gzip", "br", "x"])
def test_answer_in_a_content_encoding_is_no_answer_and_is_not_decoded(status, encoding):
    """A few hundred bytes that would become a hundred megabytes: urllib3 1.26, which Debian 12 has, decodes any number of layers at once."""
    bomb = gzip.compress(gzip.compress(bytes(30 * 1024 * 1024)))
    head = f"HTTP/1.1 {status}\r\nContent-Encoding: {encoding}\r\nContent-Length: {len(bomb)}\r\n\r\n".encode()
    with answer_once(head + bomb) as server:
        client = Client(server)
        tracemalloc.start()
        try:
            with pytest.raises(mailcloak.DirectoryUnavailable, match="Content-Encoding"):
                client.get()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 4 * 1024 * 1024
        client.session.close()


def test_answer_that_says_that_it_is_not_encoded_is_good():
    with answer_once(b"HTTP/1.1 200 OK\r\nContent-Encoding: Identity\r\nContent-Length: 2\r\n\r\n[]") as server:
        client = Client(server)
        assert client.get() == (200, b"[]")
        assert "\r\nAccept-Encoding: identity\r\n" in server.requests[0]
        client.session.close()


def test_cookies_are_neither_kept_nor_sent():
    head = b"HTTP/1.1 200 OK\r\nSet-Cookie: a=b; Path=/; Max-Age=1000\r\nSet-Cookie: c=d; Domain=127.0.0.1\r\nContent-Length: 2\r\n\r\n"
    with answer_once(head + b"[]") as server:
        client = Client(server)
        for _ in range(3):
            assert client.get() == (200, b"[]")
            assert not client.session.cookies
        assert not [request for request in server.requests if "cookie" in request.lower()]
        client.session.close()


def test_cookie_that_makes_no_sense_is_not_looked_at():
    """http.cookiejar prints a warning with a traceback for a year of thousands of digits."""
    head = f"HTTP/1.1 200 OK\r\nSet-Cookie: a=b; expires=Fri, 01-Jan-{'9' * 5000} 00:00:00 GMT\r\nContent-Length: 2\r\n\r\n"
    with answer_once(head.encode() + b"[]") as server, warnings.catch_warnings():
        warnings.simplefilter("error")
        client = Client(server)
        assert client.get() == (200, b"[]")
        client.session.close()


def test_answer_with_a_byte_order_mark_is_read_and_one_in_another_encoding_is_no_answer(keycloak):
    api = mailcloak.KeycloakApi(mailcloak.read_block(mailcloak.KeycloakConfig, "keycloak", keycloak.config(), []))
    assert api._json(b"\xef\xbb\xbf[]") == []
    for encoding in ("utf-16", "utf-16-le", "utf-32-be"):
        with pytest.raises(mailcloak.DirectoryUnavailable, match="not JSON"):
            api._json("[{}]".encode(encoding))


def test_second_answer_about_a_disabled_user_is_held_to_the_same_limits(keycloak_daemon, keycloak):
    disabled = keycloak.add_user("dora", "dora@d1.test", enabled=False)
    others = [{**disabled, "id": f"id{number}", "username": f"u{number}", "enabled": True} for number in range(1000)]
    search = keycloak.search
    keycloak.search = lambda query: search(query) if query.get("briefRepresentation") == "true" or "email" not in query else others
    assert keycloak_daemon.ask(recipient="dora@d1.test") == "DUNNO"
    assert (
        keycloak_daemon.ask(protocol_state="MAIL", sender="dora@d1.test", sasl_username="dora", sasl_method="XOAUTH2") == NOT_OWNED
    )
    assert json.loads(keycloak_daemon.ask_map("stats *")[3:])["cache"]["users"] == 1


WHY_IS_NOT_TOLD = {"too long": "x" * 2_000_000, "no list": None, "slow": 20.0}


@pytest.mark.parametrize("way", WHY_IS_NOT_TOLD.values(), ids=WHY_IS_NOT_TOLD)
@pytest.mark.parametrize(("federation", "sends", "receives"), [("", NOT_OWNED, "DUNNO"), ("ldap", DEFER, DEFER)])
def test_disabled_user_sends_nothing_where_keycloak_does_not_tell_why(make_daemon, keycloak, way, federation, sends, receives):
    """Who may be locked out by wrong passwords receives mail, but not one whose user storage may be at fault: that is the grace."""
    keycloak.add_user("dora", "dora@d1.test", federationLink=federation or None)
    daemon = make_daemon(keycloak=keycloak.config(timeout_seconds=2), policy={"domain": "d1.test", "cache_ttl_seconds": 1}).start()
    sending = {"protocol_state": "MAIL", "sender": "dora@d1.test", "sasl_username": "dora", "sasl_method": "XOAUTH2"}
    assert daemon.ask(**sending) == daemon.ask(recipient="dora@d1.test") == "DUNNO"
    keycloak.user("dora").update(enabled=False, attributes={"photo": [way if isinstance(way, str) else ""]})
    search = keycloak.search

    def answer(query):
        if query["briefRepresentation"] == "false":
            if way is None:
                return {"error": "unknown_error"}
            time.sleep(way if isinstance(way, float) else 0)
        return search(query)

    keycloak.search = answer
    wait_until(lambda: daemon.ask(**sending) == sends)
    for _ in range(3):
        assert daemon.ask(**sending) == daemon.ask(**{**sending, "sender": ""}) == sends
        assert daemon.ask(recipient="dora@d1.test") == receives
    assert "Keycloak counts as away" not in daemon.log()


def test_keycloak_that_goes_away_before_it_tells_why_has_given_no_answer(keycloak, directory):
    """Whether somebody else has the e-mail is not proven then; the username is the user's in any case."""
    keycloak.add_user("dora", "dora@d1.test", enabled=False)
    search = keycloak.search
    keycloak.search = lambda query: search(query) if query.get("briefRepresentation") == "true" and query != SELF_CHECK else {}
    with pytest.raises(mailcloak.DirectoryUnavailable):
        find(directory, "email", "dora@d1.test")
    (user,) = find(directory, "username", "dora")
    assert (user.enabled, user.receives) == (False, True)


def test_first_user_with_a_record_of_more_than_a_megabyte_is_no_outage(keycloak_daemon, keycloak):
    """By attributes that users may edit. The proof that Keycloak shows users asks for no attributes."""
    keycloak.users[0]["attributes"] = {f"a{number}": ["x" * 2000] for number in range(700)}
    assert keycloak_daemon.ask(recipient="stranger@d1.test") == REJECT


def test_whatever_the_libraries_make_of_a_servers_bytes_is_a_failed_request(keycloak, directory, monkeypatch):
    """requests 2.32 ends with AttributeError at "Content-Type: application/json; charset"."""
    api = directory._api
    with mailcloak.new_session("") as session:
        monkeypatch.setattr(session, "request", lambda *_, **__: None.strip)
        with pytest.raises(mailcloak.DirectoryUnavailable, match="connection failed \\(AttributeError\\)"):
            api.get_users(session, time.monotonic() + 5, max="1")
        assert api.users_may_edit_email(session, time.monotonic() + 5) is None


def test_disabled_user_is_so_whatever_their_email_is():
    config = mailcloak.read_block(
        mailcloak.KeycloakConfig,
        "keycloak",
        {"base_url": "https://k.test", "realm": "r", "client_id": "c", "client_secret": "s"},
        [],
    )
    for email in ("\ud800@d1.test", "x" * 300 + "@d1.test", 7):
        record = {"username": "mallory", "email": email, "enabled": False}
        assert mailcloak.read_user(record, config)[:3] == ("mallory", "", False)
        with pytest.raises(mailcloak.QuestionFailed):
            mailcloak.read_user({**record, "enabled": True}, config)


def test_probe_asks_over_a_connection_of_its_own_each_time(keycloak, monkeypatch):
    """New connections may be what hangs, while one that was kept still works."""
    sessions, new_session = [], mailcloak.new_session
    monkeypatch.setattr(
        mailcloak, "new_session", lambda ca_file: (sessions.append(threading.current_thread().name), new_session(ca_file))[1]
    )
    users = mailcloak.KeycloakUsers(mailcloak.read_block(mailcloak.KeycloakConfig, "keycloak", keycloak.config(), []))
    try:
        for number in (1, 2):
            wait_until(lambda number=number: keycloak.self_checks == number)
            assert sessions.count("keycloak-probe") == number
            users.outage.note_failure(mailcloak.DirectoryUnavailable("x"))
    finally:
        users.close()


class LateServer:
    """Sends an answer that is none, and the real one a moment later; counts connections. Each request is for a record of its own."""

    def __init__(self, first):
        self.first, self.connections = first, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with connection, contextlib.suppress(OSError):
            asked = b""
            while data := connection.recv(65536):
                asked += data
                while b"\r\n\r\n" in asked:
                    head, _, asked = asked.partition(b"\r\n\r\n")
                    body = head.split(b" ")[1]
                    connection.sendall(self.first)
                    time.sleep(0.05)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.mark.parametrize(
    ("first", "status"),
    [
        ("103 Early Hints\r\nLink: </x>", 200),
        ("102 Processing", 200),
        ("100 Continue", 200),
        ("199 Whatever", 200),
        ("101 Switching Protocols\r\nUpgrade: h2c", None),
        ("204 No Content", 204),
        ("304 Not Modified", 304),
        ("503 Service Unavailable\r\nContent-Length: 0", 503),
        ("504 Gateway Time-out\r\nContent-Length: 4\r\n\r\nlate", 504),
    ],
)
def test_no_question_gets_the_answer_to_another(keycloak, directory, first, status):
    """Of a server, or a proxy that gave up too soon, whose real answer comes later on the same connection."""
    server = LateServer(f"HTTP/1.1 {first}\r\n\r\n".replace("late\r\n\r\n", "late").encode())
    try:
        with mailcloak.new_session("") as session:
            for path in ("one", "two", "three"):
                try:
                    answer = directory._api._exchange(session, time.monotonic() + 5, "GET", server.url + path)
                except mailcloak.DirectoryUnavailable:
                    assert status is None
                else:
                    assert answer == (status, f"/{path}".encode() if status == 200 else b"late" if status == 504 else b"")
                time.sleep(0.1)
        assert server.connections == (1 if status == 200 else 6 if status is None else 3)
    finally:
        server.close()


def test_question_that_failed_holds_on_to_nothing(keycloak, monkeypatch):
    """Not even until Python's collector runs: an answer may have a megabyte, and anybody can go on asking."""
    directory = mailcloak.KeycloakUsers(mailcloak.read_block(mailcloak.KeycloakConfig, "keycloak", keycloak.config(), []))
    answers = []

    class Records(list):
        pass

    def get_users(*_, **query):
        records = Records([{"username": "x", "enabled": True}] * (1 if query == SELF_CHECK else 1000))
        answers.append(weakref.ref(records))
        return records

    monkeypatch.setattr(directory._api, "get_users", get_users)
    gc.disable()
    try:
        for number in range(5):
            with contextlib.suppress(mailcloak.DirectoryUnavailable):
                directory.find_users(("username", f"x{number}"), time.monotonic() + 5)
                raise AssertionError
        wait_until(lambda: not any(answer() for answer in answers[-5:]), 3, "end of what was answered")
    finally:
        gc.enable()
        directory.close()


def test_session_keeps_one_connection_and_closes_it_at_its_end():
    """urllib3 2 would leave the end to the garbage collector."""
    answers = [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", CHUNKED + b"2\r\n[]\r\n0\r\n\r\n"] * 3
    with RawServer(lambda connection: connection.sendall(answers.pop())) as server:
        client = Client(server)
        while answers:
            assert client.get() == (200, b"[]")
        assert server.connections == 1
        gc.disable()
        try:
            client.session.close()
            assert server.stopping.wait(5)
        finally:
            gc.enable()


# ---- what is remembered


def test_found_user_is_asked_for_once_and_a_missing_one_too(keycloak_daemon, keycloak):
    for _ in range(3):
        assert keycloak_daemon.ask(recipient="alice@d1.test") == "DUNNO"
        assert keycloak_daemon.ask(recipient="stranger@d1.test") == REJECT
    assert [query["email"] for query in keycloak.searches] == ["alice@d1.test", "stranger@d1.test"]


def test_new_user_receives_after_the_negative_cache_time(keycloak, make_daemon):
    daemon = make_daemon(keycloak=keycloak.config(), policy={"domain": "d1.test", "negative_cache_ttl_seconds": 0.3}).start()
    assert daemon.ask(recipient="new@d1.test") == REJECT
    keycloak.add_user("new", "new@d1.test")
    deadline = time.monotonic() + 5
    while daemon.ask(recipient="new@d1.test") != "DUNNO":
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    "change",
    [pytest.param({"enabled": False}, id="disabled"), pytest.param({"email": "moved@d1.test"}, id="other-address")],
)
def test_changed_user_is_noticed_after_the_cache_time(keycloak, make_daemon, change):
    keycloak.add_user("alice", "alice@d1.test")
    daemon = make_daemon(
        keycloak=keycloak.config(), policy={"domain": "d1.test", "cache_ttl_seconds": 0.3, "disappearance_grace_seconds": 0}
    ).start()
    own = {"protocol_state": "MAIL", "sender": "alice@d1.test", "sasl_username": "alice", "sasl_method": "XOAUTH2"}
    assert (daemon.ask(recipient="alice@d1.test"), daemon.ask(**own)) == ("DUNNO", "DUNNO")
    keycloak.user("alice").update(change)
    deadline = time.monotonic() + 5
    while daemon.ask(recipient="alice@d1.test") != REJECT or not daemon.ask(**own).startswith("553"):
        assert time.monotonic() < deadline


def test_one_request_waits_no_longer_than_one_timeout(keycloak, make_daemon):
    daemon = make_daemon(keycloak=keycloak.config(timeout_seconds=1), policy={"keycloak_failure_mode": "dunno"}).start()
    keycloak.fault = "stall"
    started = time.monotonic()
    answer = daemon.ask(recipient="a+b@d1.test", sender="c+d@d1.test", sasl_username="e@d1.test", sasl_method="XOAUTH2")
    assert answer == "DUNNO"
    assert time.monotonic() - started < 2


# ---- TLS


def test_certificate_of_an_unknown_authority_is_refused_and_ca_file_admits_it(certificate, keycloak):
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.socket = certificate.context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"https://127.0.0.1:{server.server_port}"
    for ca_file, message in (("", "certificate refused (self"), (certificate.file, "no token (HTTP 501)")):
        config = {**keycloak.config(timeout_seconds=5), "base_url": url, "ca_file": ca_file}
        directory = mailcloak.KeycloakUsers(mailcloak.read_block(mailcloak.KeycloakConfig, "keycloak", config, []))
        with pytest.raises(mailcloak.DirectoryUnavailable) as caught:
            find(directory, "email", "alice@d1.test", 5)
        assert message in str(caught.value)
        directory.close()
    server.shutdown()
    server.server_close()


def test_port_that_accepts_and_says_nothing_is_an_outage(keycloak):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = {**keycloak.config(timeout_seconds=1), "base_url": f"https://127.0.0.1:{listener.getsockname()[1]}"}
        directory = mailcloak.KeycloakUsers(mailcloak.read_block(mailcloak.KeycloakConfig, "keycloak", config, []))
        with pytest.raises(mailcloak.DirectoryUnavailable, match=r"timed out|no answer within"):
            find(directory, "email", "alice@d1.test")
        directory.close()
