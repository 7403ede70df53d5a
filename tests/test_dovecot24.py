"""Postfix, mailcloak and Dovecot 2.4 on examples/postfix and examples/dovecot-2.4; `make test-debian13` runs this on Debian 13.

There is no Keycloak: the daemon has its users from static_users, and a stand-in answers Dovecot for the userinfo endpoint. The
real Keycloak is in test_real_mail.py, with the Dovecot 2.3 of Debian 12.
"""

import imaplib
import secrets
import smtplib
import threading
import time

import pytest
from conftest import running
from real.dovecot24 import MailHost24, UserinfoStandIn, installed_version
from real.mail import PASSWORD_MECHANISMS, TOKEN_MECHANISMS, initial_response, log_in, send
from real.postfix import FORGED, NO_SUCH_USER, expected, refusal
from test_real_mail import (
    NOT_OWNED,
    WRONG_LOGIN,
    assert_auth_processes_only_read_the_database,
    assert_only_one_receives,
    login_code,
    login_codes,
    set_app,
)

__test__ = installed_version() >= (2, 4)  # an older Dovecot does not understand the sample
pytestmark = [pytest.mark.real("postfix", "dovecot", "root"), pytest.mark.timeout(600)]

USERS = {"alice": "alice@d1.test", "bob": "bob@d1.test"}


@pytest.fixture(scope="session")
def userinfo():
    with UserinfoStandIn().running() as stand_in:
        yield stand_in


@pytest.fixture(scope="session")
def host(userinfo):
    """The mail host of most tests."""
    with running(MailHost24(userinfo, USERS)) as instance:
        instance.daemon.ctl("aliases", "add", "info@d1.test", "alice")
        instance.add_app("printer", "scan@d1.test")
        yield instance


@pytest.fixture
def new_app(host):
    """A factory of apps that are there for one test."""
    made = []

    def make():
        made.append(f"app-{secrets.token_hex(4)}")
        host.add_app(made[-1], "scan@d1.test")
        return made[-1]

    yield make
    for app_id in made:
        host.daemon.ctl("apps", "del", app_id)


def test_samples_are_taken_by_postfix_and_dovecot_without_a_complaint(host):
    assert host.postfix.complaints() == ""
    assert host.dovecot.complaints() == ""


def test_auth_processes_run_as_a_user_that_can_read_the_database_and_not_write_it(host):
    assert_auth_processes_only_read_the_database(host)


def test_database_that_is_gone_is_not_made_by_a_worker_that_could_write_it(userinfo):
    changes = [("user = $SET:default_internal_user", "user = root")]
    with running(MailHost24(userinfo, USERS, changes=changes)) as host:
        host.add_app("printer", "scan@d1.test")
        host.daemon.stop()
        host.daemon.database.unlink()
        assert login_code(host, "PLAIN", "printer", host.passwords["printer"]) != 235
        assert 0 in [process.uid for process in host.dovecot.processes("dovecot/auth")]
        assert not host.daemon.database.exists()


# ---- Mail from outside


@pytest.mark.parametrize(
    ("recipient", "delivered_to"),
    [
        pytest.param("alice@d1.test", "alice@d1.test", id="primary"),
        pytest.param("alice+tag@d1.test", "alice+tag@d1.test", id="tagged-primary"),
        pytest.param("INFO@d1.test", "alice@d1.test", id="alias-in-mixed-case"),
        pytest.param("info+tag@d1.test", "alice+tag@d1.test", id="tagged-alias"),
    ],
)
def test_message_for_a_recipient_with_an_owner_is_in_the_owners_mailbox(host, recipient, delivered_to):
    with host.postfix.smtp() as client:
        received = host.read("alice", send(client, "x@elsewhere.test", recipient))
    assert received.delivered_to == delivered_to
    assert received.text.startswith("Return-Path: <x@elsewhere.test>")


@pytest.mark.parametrize(
    ("sender", "recipient", "answer", "named"),
    [
        pytest.param("x@elsewhere.test", "stranger@d1.test", NO_SUCH_USER, "stranger@d1.test", id="stranger"),
        pytest.param("x@elsewhere.test", "scan@d1.test", NO_SUCH_USER, "scan@d1.test", id="address-of-an-app"),
        pytest.param("bob@d1.test", "alice@d1.test", FORGED, "bob@d1.test", id="forged-sender"),
    ],
)
def test_message_from_outside_is_refused(host, sender, recipient, answer, named):
    with host.postfix.smtp() as client:
        assert refusal(client, sender, recipient) == expected(answer, named)


# ---- Users with a token


@pytest.mark.parametrize("mechanism", TOKEN_MECHANISMS)
def test_user_with_a_token_sends_as_an_own_address_and_as_no_other(host, mechanism):
    with host.logged_in(mechanism, "alice") as client:
        received = host.read("bob", send(client, "info@d1.test", "bob@d1.test"), mechanism)
        assert refusal(client, "bob@d1.test", "bob@d1.test") == expected(NOT_OWNED, "bob@d1.test")
    assert received.text.startswith("Return-Path: <info@d1.test>")


@pytest.mark.parametrize("mechanism", TOKEN_MECHANISMS)
def test_token_logs_in_nobody_but_its_own_user_and_only_while_it_is_good(host, userinfo, mechanism):
    token = host.token("alice")
    assert login_code(host, mechanism, "alice", token) == 235
    assert login_code(host, mechanism, "bob", token) == WRONG_LOGIN
    assert login_code(host, mechanism, "alice", token[:-4] + "AAAA") == WRONG_LOGIN
    del userinfo.tokens[token]
    assert login_code(host, mechanism, "alice", token) == WRONG_LOGIN


@pytest.mark.parametrize("mechanism", PASSWORD_MECHANISMS)
def test_token_is_no_password(host, mechanism):
    assert login_code(host, mechanism, "alice", host.token("alice")) == WRONG_LOGIN


@pytest.mark.parametrize("mechanism", TOKEN_MECHANISMS)
def test_password_of_an_app_is_no_token(host, mechanism):
    assert login_code(host, mechanism, "printer", host.passwords["printer"]) == WRONG_LOGIN


# ---- Apps


@pytest.mark.parametrize("port", ["submission", "submissions"])
@pytest.mark.parametrize("mechanism", PASSWORD_MECHANISMS)
def test_app_sends_as_an_allowed_address_and_as_no_other(host, mechanism, port):
    with host.logged_in(mechanism, "printer", port=port) as client:
        received = host.read("bob", send(client, "scan@d1.test", "bob@d1.test"))
        assert refusal(client, "alice@d1.test", "bob@d1.test") == expected(NOT_OWNED, "alice@d1.test")
    assert received.text.startswith("Return-Path: <scan@d1.test>")


@pytest.mark.parametrize("mechanism", PASSWORD_MECHANISMS)
def test_app_logs_in_with_its_own_password_while_it_is_enabled_and_not_expired(host, new_app, daemon_state, mechanism):
    app_id, disabled, expired, lasting = (new_app() for _ in range(4))
    host.daemon.ctl("apps", "disable", disabled)
    set_app(host, expired, expires_at=int(time.time()) - 1)
    set_app(host, lasting, expires_at=int(time.time()) + 3600)
    passwords = host.passwords
    good = [(mechanism, name, passwords[name.lower()]) for name in (app_id, app_id.upper(), lasting)]
    wrong = [(mechanism, app_id, ""), (mechanism, app_id, passwords[lasting])]
    wrong += [(mechanism, name, passwords[name]) for name in (disabled, expired)]
    assert login_codes(host, *good, *wrong) == [235] * len(good) + [WRONG_LOGIN] * len(wrong)


def test_app_logs_in_for_sending_alone(host, new_app, daemon_state):
    app_id, password = new_app(), "chosen by this test"  # a generated one may begin with -, which doveadm would take for an option
    host.daemon.ctl("apps", "add", app_id, "--token-stdin", input=f"{password}\n")
    with host.dovecot.imap() as client, pytest.raises(imaplib.IMAP4.error, match="AUTHENTICATIONFAILED"):
        client.login(app_id, password)
    with host.dovecot.imap() as client, pytest.raises(imaplib.IMAP4.error, match="AUTHENTICATIONFAILED"):
        client.authenticate("PLAIN", lambda _: initial_response("PLAIN", app_id, password))
    services = ("smtp", "submission", "lmtp", "imap", "pop3", "sieve", "doveadm")
    assert [host.dovecot.accepts_password(app_id, password, service) for service in services] == [True] * 2 + [False] * 5


def test_app_cannot_log_in_to_lmtp(host):
    with smtplib.LMTP(str(host.postfix.private / "dovecot-lmtp")) as client:
        client.ehlo("client.test")  # which is LHLO here
        assert "auth" not in client.esmtp_features
        with pytest.raises(smtplib.SMTPAuthenticationError) as refused:
            log_in(client, "PLAIN", "printer", host.passwords["printer"])
        assert 500 <= refused.value.smtp_code < 510


def test_changed_token_of_an_app_works_at_once_and_the_old_one_no_longer(host, new_app, daemon_state):
    app_id = new_app()
    old = host.passwords[app_id]
    assert login_code(host, "PLAIN", app_id, old) == 235
    host.add_app(app_id, options=("--replace",))
    assert login_code(host, "PLAIN", app_id, host.passwords[app_id]) == 235
    assert login_code(host, "PLAIN", app_id, old) == WRONG_LOGIN


def test_no_login_fails_while_mailcloakctl_writes_in_a_loop(host):
    done, writes = threading.Event(), []

    def write():
        while not done.is_set():
            host.daemon.ctl("apps", "add", "loop", "--generate", "--replace")
            writes.append(1)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        codes = []
        while len(codes) < 20 or len(writes) < 10:
            codes.append(login_code(host, PASSWORD_MECHANISMS[len(codes) % 2], "printer", host.passwords["printer"]))
    finally:
        done.set()
        writer.join()
    assert codes == [235] * len(codes)


# ---- What the sample's comments offer


@pytest.fixture(scope="module")
def changed_host(userinfo):
    """The line for realms with e-mail as username, and SCRAM-SHA-256 in both places that the sample names."""
    one, other = "auth_username_format = %{user | username | lower}\n", "auth_username_format = %{user | lower}\n"
    changes = [
        (f"  {one}  #{other}", f"  #{one}  {other}"),
        ("plain login oauthbearer", "plain login scram-sha-256 oauthbearer"),
        ("mechanisms_filter = plain login\n", "mechanisms_filter = plain login scram-sha-256\n"),
    ]
    users = {"erin@d1.test": "erin@d1.test", "erin@d2.test": "erin@d2.test"}
    with running(MailHost24(userinfo, users, changes=changes)) as instance:
        instance.daemon.ctl("aliases", "add", "sales@d1.test", "erin@d2.test")
        instance.add_app("erin@d1.test", "scan@d1.test")
        yield instance


@pytest.mark.parametrize(
    ("recipient", "username", "other"),
    [
        pytest.param("erin@d1.test", "erin@d1.test", "erin@d2.test", id="primary"),
        pytest.param("erin+tag@d2.test", "erin@d2.test", "erin@d1.test", id="tagged-primary-in-second-domain"),
        pytest.param("sales@d1.test", "erin@d2.test", "erin@d1.test", id="alias-in-another-domain"),
    ],
)
def test_user_whose_username_is_the_own_address_receives_and_nobody_else_does(changed_host, recipient, username, other):
    assert_only_one_receives(changed_host, recipient, username, other)


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN", "SCRAM-SHA-256"])
def test_app_with_the_name_of_a_user_cannot_act_as_the_user(changed_host, mechanism):
    assert login_code(changed_host, mechanism, "erin@d1.test", "not the password") == WRONG_LOGIN
    with changed_host.logged_in(mechanism, "erin@d1.test") as client:
        assert refusal(client, "scan@d1.test", "erin@d2.test") is None
        assert refusal(client, "erin@d1.test", "erin@d2.test") == expected(NOT_OWNED, "erin@d1.test")
