"""The directory client against a stand-in for Keycloak: what it asks, what it makes of answers, and of no answer."""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from conftest import wait_until
from keycloak_stand_in import CLIENT_SECRET, KeycloakStandIn

import mailcloak

DEFER = "451 4.3.0 Temporary authentication/lookup failure"
REJECT = "550 5.1.1 No such user"


@pytest.fixture
def directory(keycloak):
    """A client of the stand-in with a timeout of one second."""
    client = make_directory(keycloak)
    wait_until(lambda: any(kind == "profile" for kind, _ in keycloak.requests), what="self-check")
    wait_until(lambda: keycloak.at_once == 0, what="its end")
    keycloak.forget_requests()
    client._api._token = ""  # as if nothing had been asked yet
    yield client
    client.close()


def make_directory(keycloak, **more):
    problems = []
    config = mailcloak.read_block(mailcloak.KeycloakConfig, "keycloak", keycloak.config(timeout_seconds=1, **more), problems)
    assert not problems
    return mailcloak.KeycloakDirectory(config)


def find(directory, attribute, value, seconds=1.0):
    return directory.find_users(attribute, value, time.monotonic() + seconds)


# ---- what is asked


def test_search_asks_exactly_one_question_with_one_token(keycloak, directory):
    keycloak.add_user("alice", "alice@d1.test")
    for _ in range(3):
        assert find(directory, "email", "alice@d1.test") == (mailcloak.User("alice", "alice@d1.test", True),)
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
        directory = mailcloak.KeycloakDirectory(mailcloak.read_block(mailcloak.KeycloakConfig, "keycloak", config, []))
        assert find(directory, "username", "alice")
        directory.close()


def test_token_is_renewed_at_four_fifths_of_its_life(keycloak, directory, monkeypatch):
    keycloak.token_seconds = 100
    now = time.monotonic()
    monkeypatch.setattr(mailcloak.time, "monotonic", lambda: now)
    find(directory, "email", "a@d1.test")
    now += 79
    find(directory, "email", "b@d1.test")
    assert keycloak.token_requests == 1
    now += 2
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
    keycloak.latency_seconds = 0.05
    with ThreadPoolExecutor(40) as pool:
        list(pool.map(lambda number: find(directory, "email", f"u{number}@d1.test", 5), range(40)))
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


def test_unverified_address_counts_unless_verification_is_required(keycloak):
    keycloak.add_user("alice", "alice@d1.test", verified=False)
    lax, strict = make_directory(keycloak), make_directory(keycloak, require_verified_email=True)
    assert find(lax, "email", "alice@d1.test")
    assert not find(strict, "email", "alice@d1.test")
    assert find(strict, "username", "alice") == (mailcloak.User("alice", "", True),)
    keycloak.user("alice")["emailVerified"] = True
    assert find(strict, "email", "alice@d1.test")
    lax.close()
    strict.close()


def test_service_account_has_no_address(keycloak, directory):
    keycloak.add_user("service-account-shop", "shop@d1.test")
    keycloak.add_user("robot", "robot@d1.test", serviceAccountClientId="robot")
    keycloak.search = lambda query: keycloak.users[-1:] if query.get("email") == "robot@d1.test" else keycloak.users[-2:-1]
    assert find(directory, "email", "shop@d1.test") == ()
    assert find(directory, "email", "robot@d1.test") == ()


@pytest.mark.parametrize("stored", ["ulla@bücher.test", "ulla@BÜCHER.test", "ulla@xn--bcher-kva.test"])
def test_international_domain_is_found_in_either_spelling(keycloak, directory, stored):
    keycloak.add_user("ulla", stored)
    assert find(directory, "email", "ulla@xn--bcher-kva.test") == (mailcloak.User("ulla", "ulla@xn--bcher-kva.test", True),)


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
    wait_until(lambda: not directory.outage.established)
    assert find(directory, "email", "alice@d1.test", 3)


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
            "token refused (HTTP 401 unauthorized_client), check keycloak.client_id and keycloak.client_secret and that the client"
            " has Service accounts roles on",
            id="secret",
        ),
        pytest.param({"realm": "nowhere"}, "no such realm (HTTP 404), check keycloak.realm and keycloak.base_url", id="realm"),
        pytest.param({"base_url": "http://127.0.0.1:9"}, "connection refused", id="refused"),
        pytest.param({"base_url": "http://no-such-host.invalid"}, "name", id="name"),
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
    assert message in lines[0]


def test_missing_role_is_named_in_the_log(keycloak_daemon, keycloak):
    keycloak.role = ""
    assert keycloak_daemon.ask(recipient="alice@d1.test") == DEFER
    keycloak_daemon.wait_for_log(
        "search refused (HTTP 403), give the service account of client 'mailcloak' the realm-management role view-users"
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
    assert re.search(r"answers again, after \d+ s, 0 answers were kept ones, 4 deferred", log)


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
            "token refused (HTTP 401 unauthorized_client), check keycloak.client_id",
            id="secret",
        ),
        pytest.param("view-users", {"realm": "nowhere"}, "no such realm (HTTP 404), check keycloak.realm", id="realm"),
        pytest.param(
            "",
            {},
            "search refused (HTTP 403), give the service account of client 'mailcloak' the realm-management role",
            id="no-role",
        ),
        pytest.param("query-users", {}, SEES_NOBODY, id="role-that-sees-nobody"),
    ],
)
def test_wrong_setting_is_one_error_line_at_start_before_any_question(keycloak, make_daemon, role, change, message):
    keycloak.role = role
    daemon = make_daemon(keycloak=keycloak.config(**change)).start()
    daemon.wait_for_log(message)
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
    assert keycloak.requests == [("token", {}), ("users", {"max": "1"})]
    client.close()


def test_daemon_answers_while_the_self_check_hangs(keycloak, make_daemon):
    keycloak.token_fault = "stall"
    daemon = make_daemon(keycloak=keycloak.config()).start()
    assert daemon.ask(recipient="x@elsewhere.test") == "DUNNO"
    assert daemon.ask_map("alias x@d1.test") == "NOTFOUND "


def test_empty_answer_of_a_role_that_sees_nobody_is_no_proof_until_it_is_mended(keycloak_daemon, keycloak):
    keycloak.role = "query-users"
    for _ in range(2):
        keycloak_daemon.reload()  # forgets the check that succeeded at start
        assert keycloak_daemon.ask(recipient="stranger@d1.test") == DEFER
        assert keycloak_daemon.ask(recipient="alice@d1.test") == DEFER
    keycloak_daemon.wait_for_log(SEES_NOBODY)
    keycloak.role = "view-users"
    wait_until(lambda: keycloak_daemon.ask(recipient="stranger@d1.test") == REJECT)
    assert keycloak_daemon.ask(recipient="alice@d1.test") == "DUNNO"


def test_role_lost_at_run_time_is_noticed_at_the_first_empty_answer_of_a_minute(keycloak, directory, monkeypatch):
    assert find(directory, "email", "stranger@d1.test") == ()
    checks = keycloak.self_checks
    assert find(directory, "email", "other@d1.test") == ()
    assert keycloak.self_checks == checks
    keycloak.role = "query-users"
    now = time.monotonic() + 61
    monkeypatch.setattr(mailcloak.time, "monotonic", lambda: now)
    with pytest.raises(mailcloak.DirectoryUnavailable, match="sees no users at all"):
        directory.find_users("email", "alice@d1.test", now + 1)
    assert keycloak.self_checks > checks


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


def test_certificate_of_an_unknown_authority_is_refused_and_ca_file_admits_it(tmp_path, keycloak):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    subprocess.run(
        [*command, "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"https://127.0.0.1:{server.server_port}"
    for ca_file, message in (("", "certificate refused (self"), (str(certificate), "no token (HTTP 501)")):
        config = {**keycloak.config(timeout_seconds=5), "base_url": url, "ca_file": ca_file}
        directory = mailcloak.KeycloakDirectory(mailcloak.read_block(mailcloak.KeycloakConfig, "keycloak", config, []))
        with pytest.raises(mailcloak.DirectoryUnavailable) as caught:
            find(directory, "email", "alice@d1.test", 5)
        assert message in str(caught.value)
        directory.close()
    server.shutdown()
    server.server_close()


def test_port_that_accepts_and_says_nothing_is_an_outage(keycloak):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = {**keycloak.config(timeout_seconds=1), "base_url": f"https://127.0.0.1:{listener.getsockname()[1]}"}
        directory = mailcloak.KeycloakDirectory(mailcloak.read_block(mailcloak.KeycloakConfig, "keycloak", config, []))
        with pytest.raises(mailcloak.DirectoryUnavailable, match=r"timed out|no answer within"):
            find(directory, "email", "alice@d1.test")
        directory.close()
