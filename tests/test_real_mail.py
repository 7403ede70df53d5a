"""The whole chain, nothing imitated: Keycloak, Dovecot, Postfix and mailcloak on the files of examples/.

A client logs in to Postfix through Dovecot, with a Keycloak token or an app password; mailcloak decides; Postfix delivers to Dovecot over
LMTP; the message is read back over IMAP, where the user logs in with a token.
"""

import contextlib
import imaplib
import json
import os
import re
import secrets
import smtplib
import sqlite3
import statistics
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT, once_for_all, run_ctl, running, wait_until
from real.dovecot import make_certificate, new_source
from real.keycloak import MAIL_CLIENT, PASSWORD, service_client, user
from real.mail import (
    CACHE_SECONDS,
    DAEMON_USER,
    PASSWORD_MECHANISMS,
    TOKEN_MECHANISMS,
    MailHost,
    initial_response,
    log_in,
    send,
)
from real.postfix import FORGED, NO_SUCH_USER, expected, refusal

pytestmark = [pytest.mark.real("postfix", "dovecot", "keycloak", "root"), pytest.mark.timeout(600)]

REALM = "mail"
SECRET = "a-client-secret-of-the-tests"
USERS = [
    user("alice", "alice@d1.test"),
    user("bob", "bob@d1.test"),
    user("chris", "chris@d2.test"),
    user("dora", "dora@d1.test", enabled=False),
    user("eve", "eve@d1.test"),
    user("frank", "frank@d1.test"),
    user("gina", "gina@d1.test"),
    user("c.smith", "carol@d1.test"),
]
CROWD = [f"user{number:02}@d{number % 2 + 1}.test" for number in range(50)]
ALIASES = {"info@d1.test": "alice", "news@d2.test": "bob", "taken@d1.test": "bob"}
NOT_OWNED = (553, "5.7.1 <{}>: Sender address rejected: Sender not owned by authenticated user")
NO_RELAY = (554, "5.7.1 <{}>: Relay access denied")
WRONG_LOGIN = 535


@pytest.fixture(scope="session")
def realm(real_keycloak, pytestconfig):
    """The realm of most tests, with the client that examples/keycloak/setup makes: (its name, the client's secret)."""

    def make():
        users = [*USERS, *({"username": address.partition("@")[0], "email": address, "enabled": True} for address in CROWD)]
        real_keycloak.create_realm(REALM, users)
        output = real_keycloak.setup(REALM, "client")
        return output.rpartition("keycloak.client_secret: ")[2].strip()

    return REALM, once_for_all(pytestconfig, "client-secret", make)


@pytest.fixture(scope="session")
def host(real_keycloak, realm, pytestconfig):
    """The mail host of most tests."""
    started = time.monotonic()
    with running(MailHost(real_keycloak, *realm)) as instance:
        seconds = time.monotonic() - started + real_keycloak.start_seconds
        reporter = pytestconfig.pluginmanager.get_plugin("terminalreporter")
        if reporter:  # which pytest-xdist's workers do not have
            reporter.write_line(f"\nKeycloak {real_keycloak.version}, Dovecot and Postfix were up in {seconds:.1f} s")
        for address, username in ALIASES.items():
            instance.daemon.ctl("aliases", "add", address, username)
        instance.add_app("printer", "scan@d1.test", "<>")
        yield instance


@pytest.fixture
def new_app(host):
    """A factory of apps that are there for one test."""
    made = []

    def make(*addresses, options=(), app_id=None):
        app_id = app_id or f"app-{secrets.token_hex(4)}"
        made.append(app_id)
        host.add_app(app_id, *addresses, options=options)
        return app_id

    yield make
    for app_id in made:
        host.daemon.ctl("apps", "del", app_id, check=False)


def assert_auth_processes_only_read_the_database(host):
    """By their users and groups, and by owners and modes of the file and its directory."""
    assert login_code(host, "PLAIN", "printer", host.passwords["printer"]) == 235  # so that there is a worker
    path = host.daemon.database
    processes = host.dovecot.processes("dovecot/auth")
    workers = [process for process in processes if process.command.endswith(" -w")]
    assert 0 < len(workers) < len(processes)
    assert all(process.uid not in (0, path.stat().st_uid) for process in processes)
    assert all(path.stat().st_gid in process.groups for process in workers)
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o7777) == (0o640, 0o2750)
    assert (path.owner(), path.parent.owner()) == (DAEMON_USER, DAEMON_USER)


def login_code(host, mechanism, username, secret, **options):
    """What Postfix says to AUTH: 235 or the code of the refusal."""
    with host.submission() as client:
        try:
            log_in(client, mechanism, username, secret, **options)
        except smtplib.SMTPAuthenticationError as exc:
            return exc.smtp_code
    return 235


def login_codes(host, *logins):
    """The same for several logins at a time: a refusal takes two seconds."""
    with ThreadPoolExecutor(len(logins)) as pool:
        return list(pool.map(lambda login: login_code(host, *login), logins))


def set_app(host, app_id, **columns):
    """Change columns of an app behind mailcloakctl's back, as a clock that goes on does with expires_at."""
    with contextlib.closing(sqlite3.connect(host.daemon.database, timeout=30)) as database, database:
        for column, value in columns.items():
            database.execute(f"UPDATE apps SET {column} = ? WHERE app_id = ?", (value, app_id))


# ---- The samples


def test_samples_are_taken_by_postfix_and_dovecot_without_a_complaint(host):
    assert host.postfix.complaints() == ""
    assert host.dovecot.complaints() == ""


def run_readme(host, real_keycloak, folder, *changes):
    """The commands by which the README sends first messages of an app and of a user, with this host's names, after these changes.

    Each gets its password where the README has somebody type it.
    """
    step = re.search(r"^7\. (.*?)^## ", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[1]
    blocks = "".join(re.findall(r"^   ```\n(.*?)^   ```\n", step, re.MULTILINE | re.DOTALL))
    commands = [re.sub(r"\\?\n *", " ", command) for command in re.split(r"^   # ", blocks, flags=re.MULTILINE)]
    replaced = {
        "smtps://localhost": f"smtps://127.0.0.1:{host.postfix.ports['submissions']}",
        "https://sso.example.org": real_keycloak.url,
        "client_id=mail ": f"client_id={MAIL_CLIENT} ",
        "--user printer": f"--user printer:{host.passwords['printer']}",
        "example.org": "d1.test",
    }
    script = "\n".join(command for command in commands if re.match("(echo|token=|curl) ?", command))
    for old, new in (*changes, *replaced.items()):
        assert old in script
        script = script.replace(old, new)
    environment = {**os.environ, "password": PASSWORD}
    command = ["bash", "-c", script]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=60)
    return script.count("smtps://"), result.stderr


def test_first_messages_of_the_readme_are_sent_by_an_app_and_by_a_user(host, real_keycloak, tmp_path):
    marker = secrets.token_hex(8)
    mark = ("echo 'Subject: ", f"echo -e 'X-Marker: {marker}\\nSubject: ")
    number, said = run_readme(host, real_keycloak, tmp_path, mark)
    assert (number, re.findall(r"curl: .*", said)) == (2, [])

    def senders():
        with host.mailbox("alice") as client:
            found = client.search(None, "HEADER", "X-Marker", marker)[1][0].split()
            texts = [client.fetch(each, "(RFC822)")[1][0][1].decode() for each in found]
        return {re.search(r"^Return-Path: <(.*)>\r$", text, re.MULTILINE)[1] for text in texts}

    wait_until(lambda: senders() == {"scan@d1.test", "alice@d1.test"}, 20, what="both messages")
    strangers = (("--mail-from scan", "--mail-from alice"), ("--mail-from alice@", "--mail-from bob@"))
    assert re.findall(r"curl: .*", run_readme(host, real_keycloak, tmp_path, *strangers)[1]) == ["curl: (55) RCPT failed: 553"] * 2


def test_setup_of_the_client_gives_it_view_users_alone_and_may_be_repeated(host, real_keycloak, realm):
    assert realm[1] in real_keycloak.setup(REALM, "client")
    roles = real_keycloak.admin("GET", f"/{REALM}/users/{real_keycloak.user_id(REALM, 'service-account-mailcloak')}/role-mappings")
    assert roles.keys() == {"clientMappings"}
    assert [role["name"] for client in roles["clientMappings"].values() for role in client["mappings"]] == ["view-users"]
    (client,) = real_keycloak.admin("GET", f"/{REALM}/clients", clientId="mailcloak")
    ways = ("publicClient", "standardFlowEnabled", "implicitFlowEnabled", "directAccessGrantsEnabled", "serviceAccountsEnabled")
    assert [client[way] for way in ways] == [False, False, False, False, True]


def test_auth_processes_run_as_a_user_that_can_read_the_database_and_not_write_it(host):
    assert_auth_processes_only_read_the_database(host)


def test_submission_ports_let_nobody_send_without_a_login(host):
    for port in ("submission", "submissions"):
        with host.submission(port) as client:
            code, text = refusal(client, "x@elsewhere.test", "alice@d1.test")
            assert (code, text.partition(">: ")[2]) == (554, "Client host rejected: Access denied")


def test_port_25_offers_no_login(host):
    with host.postfix.smtp() as client:
        assert "auth" not in client.esmtp_features


def test_login_after_thirty_in_a_minute_from_one_address_is_deferred_and_other_addresses_are_not(host):
    source = new_source()
    with host.submission(source=source) as client:
        codes = [client.docmd("AUTH NONSENSE")[0] for _ in range(30)]
        assert 450 not in codes
        with pytest.raises(smtplib.SMTPAuthenticationError) as refused:
            log_in(client, "PLAIN", "printer", host.passwords["printer"])
        assert refused.value.smtp_code == 450
    assert login_code(host, "PLAIN", "printer", host.passwords["printer"]) == 235


# ---- Port 25, nobody logged in


@pytest.mark.parametrize(
    ("recipient", "username", "delivered_to"),
    [
        pytest.param("alice@d1.test", "alice", "alice@d1.test", id="primary"),
        pytest.param("Alice@D1.Test", "alice", "alice@d1.test", id="primary-in-mixed-case"),
        pytest.param("alice+tag@d1.test", "alice", "alice+tag@d1.test", id="tagged-primary"),
        pytest.param("chris@d2.test", "chris", "chris@d2.test", id="primary-in-second-domain"),
        pytest.param("info@d1.test", "alice", "alice@d1.test", id="alias"),
        pytest.param("INFO@d1.TEST", "alice", "alice@d1.test", id="alias-in-mixed-case"),
        pytest.param("info+tag@d1.test", "alice", "alice+tag@d1.test", id="tagged-alias"),
        pytest.param("news@d2.test", "bob", "bob@d2.test", id="alias-in-second-domain"),
    ],
)
@pytest.mark.parametrize("sender", [pytest.param("x@elsewhere.test", id="foreign-sender"), pytest.param("", id="null-sender")])
def test_message_for_a_recipient_with_an_owner_is_in_the_owners_mailbox(host, sender, recipient, username, delivered_to):
    with host.postfix.smtp() as client:
        received = host.read(username, send(client, sender, recipient))
    assert received.delivered_to.lower() == delivered_to
    assert received.text.startswith(f"Return-Path: <{sender}>")


@pytest.mark.parametrize(
    ("sender", "recipient", "answer", "named"),
    [
        pytest.param("x@elsewhere.test", "stranger@d1.test", NO_SUCH_USER, "recipient", id="stranger"),
        pytest.param("x@elsewhere.test", "alice@d2.test", NO_SUCH_USER, "recipient", id="local-part-of-another-domain"),
        pytest.param("x@elsewhere.test", "dora@d1.test", NO_SUCH_USER, "recipient", id="disabled-user"),
        pytest.param("x@elsewhere.test", "scan@d1.test", NO_SUCH_USER, "recipient", id="address-of-an-app"),
        pytest.param("x@elsewhere.test", "printer@d1.test", NO_SUCH_USER, "recipient", id="name-of-an-app"),
        pytest.param("", "stranger@d1.test", NO_SUCH_USER, "recipient", id="stranger-from-the-null-sender"),
        pytest.param("bob@d1.test", "alice@d1.test", FORGED, "sender", id="forged-primary"),
        pytest.param("info@d1.test", "alice@d1.test", FORGED, "sender", id="forged-alias"),
        pytest.param("scan@d1.test", "alice@d1.test", FORGED, "sender", id="forged-address-of-an-app"),
        pytest.param("stranger@d2.test", "alice@d1.test", FORGED, "sender", id="forged-stranger"),
        pytest.param("x@elsewhere.test", "y@third.test", NO_RELAY, "recipient", id="foreign-domain-is-refused-by-postfix"),
    ],
)
def test_message_from_outside_is_refused(host, sender, recipient, answer, named):
    with host.postfix.smtp() as client:
        assert refusal(client, sender, recipient) == expected(answer, sender if named == "sender" else recipient)


@pytest.mark.alone
def test_message_to_fifty_recipients_waits_for_no_recipient(host, capsys):
    """With nobody remembered, so that Keycloak is asked for each. A connection that is closed costs Postfix a second a recipient.

    How long it takes is printed: under a second on a machine that does nothing else, so it is tried for a minute.
    """
    times, end = [], time.monotonic() + 60
    while min(times, default=1) >= 1 and time.monotonic() < end:
        forgotten = time.monotonic() + CACHE_SECONDS
        wait_until(lambda forgotten=forgotten: time.monotonic() > forgotten)
        with host.postfix.smtp() as client:
            started = time.monotonic()
            marker = send(client, "x@elsewhere.test", *CROWD)
            times.append(time.monotonic() - started)
        wait_until(lambda marker=marker: copies(host, marker) == 50, 30, what="50 deliveries")
    with capsys.disabled():
        print(f" 50 recipients: {', '.join(f'{seconds:.2f} s' for seconds in times)} ", end="")
    assert min(times) < 25


def copies(host, marker):
    return sum(marker in path.read_text() for path in host.dovecot.mail.glob("user*/Maildir/new/*"))


# ---- Users with a Keycloak token


@pytest.mark.parametrize("mechanism", TOKEN_MECHANISMS)
@pytest.mark.parametrize("sender", ["alice@d1.test", "Alice@D1.TEST", "info@d1.test", "alice+tag@d1.test", "info+tag@d1.test", ""])
def test_user_with_a_token_sends_as_an_own_address(host, mechanism, sender):
    with host.logged_in(mechanism, "alice") as client:
        received = host.read("bob", send(client, sender, "bob@d1.test"), mechanism)
    assert received.text.startswith(f"Return-Path: <{sender}>")


@pytest.mark.parametrize("mechanism", TOKEN_MECHANISMS)
@pytest.mark.parametrize(
    "sender",
    [
        pytest.param("bob@d1.test", id="primary-of-another"),
        pytest.param("taken@d1.test", id="alias-of-another"),
        pytest.param("alice@d2.test", id="own-local-part-in-another-domain"),
        pytest.param("scan@d1.test", id="address-of-an-app"),
        pytest.param("stranger@d1.test", id="stranger"),
        pytest.param("alice@elsewhere.test", id="foreign"),
    ],
)
def test_user_with_a_token_cannot_send_as_an_address_of_nobody_or_another(host, mechanism, sender):
    with host.logged_in(mechanism, "alice") as client:
        assert refusal(client, sender, "bob@d1.test") == expected(NOT_OWNED, sender)


def test_user_sends_over_starttls_on_the_submission_port(host):
    with host.logged_in("OAUTHBEARER", "chris", port="submission") as client:
        assert host.read("bob", send(client, "chris@d2.test", "bob@d1.test")).delivered_to == "bob@d1.test"
        assert refusal(client, "bob@d1.test", "bob@d1.test") == expected(NOT_OWNED, "bob@d1.test")


@pytest.mark.parametrize("mechanism", TOKEN_MECHANISMS)
def test_token_logs_in_nobody_but_its_own_user(host, mechanism):
    assert login_code(host, mechanism, "bob", host.token("alice")) == WRONG_LOGIN
    assert login_code(host, mechanism, "alice", host.token("alice")[:-8] + "AAAAAAAA") == WRONG_LOGIN


@pytest.mark.parametrize("mechanism", PASSWORD_MECHANISMS)
def test_token_is_no_password(host, mechanism):
    assert login_code(host, mechanism, "alice", host.token("alice")) == WRONG_LOGIN


# ---- Apps


@pytest.mark.parametrize("mechanism", PASSWORD_MECHANISMS)
@pytest.mark.parametrize("sender", [pytest.param("scan@d1.test", id="address"), pytest.param("", id="null-sender")])
def test_app_sends_as_an_allowed_address(host, mechanism, sender):
    with host.logged_in(mechanism, "printer") as client:
        received = host.read("bob", send(client, sender, "bob@d1.test"))
    assert received.text.startswith(f"Return-Path: <{sender}>")


@pytest.mark.parametrize("mechanism", PASSWORD_MECHANISMS)
@pytest.mark.parametrize("sender", ["alice@d1.test", "scan+tag@d1.test", "printer@d1.test", "info@d1.test", "scan@elsewhere.test"])
def test_app_cannot_send_as_an_address_that_it_is_not_allowed(host, mechanism, sender):
    with host.logged_in(mechanism, "printer") as client:
        assert refusal(client, sender, "bob@d1.test") == expected(NOT_OWNED, sender)


@pytest.mark.parametrize("mechanism", PASSWORD_MECHANISMS)
def test_app_logs_in_for_sending_and_with_its_own_password_alone(host, new_app, daemon_state, mechanism):
    app_id, disabled, expired, lasting = (new_app("scan@d1.test") for _ in range(4))
    host.daemon.ctl("apps", "disable", disabled)
    set_app(host, expired, expires_at=int(time.time()) - 1)
    set_app(host, lasting, expires_at=int(time.time()) + 3600)
    passwords = host.passwords
    good = [(mechanism, name, passwords[name.lower()]) for name in (app_id, app_id.upper(), lasting)]
    wrong = [(mechanism, app_id, passwords[app_id][:-1]), (mechanism, app_id, ""), (mechanism, app_id, passwords[disabled])]
    wrong += [(mechanism, name, passwords[name]) for name in (disabled, expired)]
    assert login_codes(host, *good, *wrong) == [235] * len(good) + [WRONG_LOGIN] * len(wrong)


def test_app_cannot_log_in_to_imap(host, new_app, daemon_state):
    app_id = new_app("scan@d1.test")
    password = host.passwords[app_id]
    with host.dovecot.imap() as client, pytest.raises(imaplib.IMAP4.error, match="AUTHENTICATIONFAILED"):
        client.login(app_id, password)
    with host.dovecot.imap() as client, pytest.raises(imaplib.IMAP4.error, match="AUTHENTICATIONFAILED"):
        client.authenticate("PLAIN", lambda _: initial_response("PLAIN", app_id, password))
    assert login_code(host, "PLAIN", app_id, password) == 235


def test_app_cannot_log_in_to_lmtp(host, new_app, daemon_state):
    password = host.passwords[new_app("scan@d1.test", app_id="over-lmtp")]
    with smtplib.LMTP(str(host.postfix.private / "dovecot-lmtp")) as client:
        client.ehlo("client.test")  # LHLO, as smtplib speaks LMTP
        assert "auth" not in client.esmtp_features
        with pytest.raises(smtplib.SMTPAuthenticationError) as refused:
            log_in(client, "PLAIN", "over-lmtp", password)
        assert 500 <= refused.value.smtp_code < 510
    services = ("smtp", "submission", "lmtp", "imap", "pop3", "sieve", "doveadm")
    assert [host.dovecot.accepts_password("over-lmtp", password, service) for service in services] == [True] * 2 + [False] * 5


def test_changed_token_of_an_app_works_at_once_and_the_old_one_no_longer(host, new_app, daemon_state):
    app_id = new_app("scan@d1.test")
    old = host.passwords[app_id]
    assert login_code(host, "PLAIN", app_id, old) == 235
    host.add_app(app_id, options=("--replace",))
    assert login_code(host, "PLAIN", app_id, host.passwords[app_id]) == 235
    assert login_code(host, "PLAIN", app_id, old) == WRONG_LOGIN


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda host, app_id: host.daemon.ctl("apps", "disable", app_id), id="disabled"),
        pytest.param(lambda host, app_id: host.daemon.ctl("apps", "disallow", app_id, "scan@d1.test"), id="disallowed"),
        pytest.param(lambda host, app_id: host.daemon.ctl("apps", "del", app_id), id="deleted"),
        pytest.param(lambda host, app_id: set_app(host, app_id, expires_at=int(time.time()) - 1), id="expired"),
    ],
)
def test_app_that_changes_while_it_is_logged_in_is_refused_from_the_next_message_on(host, new_app, change):
    app_id = new_app("scan@d1.test")
    with host.logged_in("PLAIN", app_id) as client:
        assert refusal(client, "scan@d1.test", "bob@d1.test") is None
        change(host, app_id)
        assert refusal(client, "scan@d1.test", "bob@d1.test") == expected(NOT_OWNED, "scan@d1.test")


# ---- An app and a user of one name


@pytest.fixture(scope="module")
def scram_host(real_keycloak, realm):
    """A host with SCRAM-SHA-256 added to both places of the sample that its comment names."""
    changes = [
        ("plain login oauthbearer", "plain login scram-sha-256 oauthbearer"),
        ("plain login\n", "plain login scram-sha-256\n"),
    ]
    with running(MailHost(real_keycloak, *realm, changes=changes)) as instance:
        instance.add_app("alice", "scan@d1.test")
        instance.add_app("printer", "scan@d1.test")
        instance.daemon.ctl("aliases", "add", "info@d1.test", "alice", "--force")
        yield instance


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN", "SCRAM-SHA-256"])
def test_app_with_the_name_of_a_user_cannot_act_as_the_user(scram_host, mechanism):
    with scram_host.logged_in(mechanism, "alice") as client:
        assert refusal(client, "scan@d1.test", "bob@d1.test") is None
        for sender in ("alice@d1.test", "info@d1.test", "alice+tag@d1.test", ""):
            assert refusal(client, sender, "bob@d1.test") == expected(NOT_OWNED, sender)


@pytest.mark.parametrize("mechanism", TOKEN_MECHANISMS)
def test_password_of_an_app_with_the_name_of_a_user_is_no_token(scram_host, mechanism):
    assert login_code(scram_host, mechanism, "alice", scram_host.passwords["alice"]) == WRONG_LOGIN


@pytest.mark.parametrize("mechanism", TOKEN_MECHANISMS)
def test_user_with_the_name_of_an_app_stays_that_user(scram_host, mechanism):
    with scram_host.logged_in(mechanism, "alice") as client:
        assert refusal(client, "alice@d1.test", "bob@d1.test") is None
        assert refusal(client, "scan@d1.test", "bob@d1.test") == expected(NOT_OWNED, "scan@d1.test")


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256"])
def test_app_cannot_log_in_on_behalf_of_a_user(scram_host, mechanism):
    assert login_code(scram_host, mechanism, "printer", scram_host.passwords["printer"], authorize_as="bob") == WRONG_LOGIN


def test_wrong_password_is_refused_by_scram(scram_host):
    assert login_code(scram_host, "SCRAM-SHA-256", "printer", "not the password") == WRONG_LOGIN


# ---- Changes in Keycloak


def seconds_until(condition):
    started = time.monotonic()
    wait_until(condition, 20, what="change in Keycloak")
    return time.monotonic() - started


def is_refused_as_recipient(host, address):
    with host.postfix.smtp() as client:
        return refusal(client, "x@elsewhere.test", address) == expected(NO_SUCH_USER, address)


def test_user_disabled_in_keycloak_is_refused_within_the_cache_time(host, real_keycloak):
    token = host.token("eve")
    with host.logged_in("OAUTHBEARER", "eve", token) as client:
        assert refusal(client, "eve@d1.test", "bob@d1.test") is None
        assert not is_refused_as_recipient(host, "eve@d1.test")
        real_keycloak.change_user(REALM, "eve", enabled=False)
        assert login_code(host, "OAUTHBEARER", "eve", token) == WRONG_LOGIN
        sends = seconds_until(lambda: refusal(client, "eve@d1.test", "bob@d1.test") == expected(NOT_OWNED, "eve@d1.test"))
        receives = seconds_until(lambda: is_refused_as_recipient(host, "eve@d1.test"))
    assert sends + receives < CACHE_SECONDS + 1


def test_user_given_another_address_in_keycloak_has_that_one_and_no_longer_the_old_within_the_cache_time(host, real_keycloak):
    with host.logged_in("OAUTHBEARER", "frank") as client:
        assert refusal(client, "frank@d1.test", "bob@d1.test") is None
        assert refusal(client, "francis@d1.test", "bob@d1.test") == expected(NOT_OWNED, "francis@d1.test")
        assert is_refused_as_recipient(host, "francis@d1.test")
        real_keycloak.change_user(REALM, "frank", email="francis@d1.test")
        old = seconds_until(lambda: refusal(client, "frank@d1.test", "bob@d1.test") == expected(NOT_OWNED, "frank@d1.test"))
        receives = seconds_until(lambda: is_refused_as_recipient(host, "frank@d1.test"))
        new = seconds_until(lambda: refusal(client, "francis@d1.test", "bob@d1.test") is None)
        receives_new = seconds_until(lambda: not is_refused_as_recipient(host, "francis@d1.test"))
    assert old + receives + new + receives_new < CACHE_SECONDS + 2


def test_app_counts_only_while_its_owner_is_enabled_in_keycloak(host, new_app, real_keycloak):
    app_id = new_app("scan@d1.test", options=("--owner", "Gina"))
    with host.logged_in("PLAIN", app_id) as client:
        assert refusal(client, "scan@d1.test", "bob@d1.test") is None
        real_keycloak.change_user(REALM, "gina", enabled=False)
        refused = seconds_until(lambda: refusal(client, "scan@d1.test", "bob@d1.test") == expected(NOT_OWNED, "scan@d1.test"))
        real_keycloak.change_user(REALM, "gina", enabled=True)
        again = seconds_until(lambda: refusal(client, "scan@d1.test", "bob@d1.test") is None)
    assert max(refused, again) < CACHE_SECONDS + 1


def test_app_whose_owner_is_not_in_keycloak_is_refused(host, new_app):
    with host.logged_in("LOGIN", new_app("scan@d1.test", options=("--owner", "nobody-there"))) as client:
        assert refusal(client, "scan@d1.test", "bob@d1.test") == expected(NOT_OWNED, "scan@d1.test")


def test_app_past_its_expiry_neither_logs_in_nor_sends(host, new_app):
    app_id = new_app("scan@d1.test")
    with host.logged_in("PLAIN", app_id) as client:
        set_app(host, app_id, expires_at=int(time.time()) + 3)
        assert refusal(client, "scan@d1.test", "bob@d1.test") is None
        wait_until(lambda: refusal(client, "scan@d1.test", "bob@d1.test") == expected(NOT_OWNED, "scan@d1.test"), 10, what="expiry")
    assert login_code(host, "PLAIN", app_id, host.passwords[app_id]) == WRONG_LOGIN


# ---- Under load


def test_no_login_fails_while_mailcloakctl_writes_in_a_loop(host, capsys):
    done, writes = threading.Event(), []

    def write(number):
        while not done.is_set():
            host.daemon.ctl("aliases", "add", f"loop{number}@d1.test", "bob")
            host.daemon.ctl("apps", "add", f"loop{number}", "--generate", "--replace")
            host.daemon.ctl("aliases", "del", f"loop{number}@d1.test")
            writes.append(3)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for writer in writers:
        writer.start()
    try:
        codes = []
        while len(codes) < 40 or sum(writes) < 30:
            codes.append(login_code(host, PASSWORD_MECHANISMS[len(codes) % 2], "printer", host.passwords["printer"]))
    finally:
        done.set()
        for writer in writers:
            writer.join()
    with capsys.disabled():
        print(f" {len(codes)} logins during {sum(writes)} writes ", end="")
    assert codes == [235] * len(codes)


@pytest.mark.alone
def test_good_logins_succeed_under_forty_parallel_wrong_ones(host, new_app, capsys):
    """The app that is guessed has a token that a person chose: its 100,000 iterations are the dearest that mailcloakctl stores.

    A generated token is checked in no time and must never wait. On a busy machine the dear one can take longer than the ten seconds
    after which Postfix says 454; then the client tries again, as clients do.
    """
    guessed = new_app("scan@d1.test")
    host.daemon.ctl("apps", "add", guessed, "--token-stdin", input="chosen by a person\n")
    done, wrong, started = threading.Event(), [], threading.Barrier(41)

    def guess():
        started.wait()
        while not done.is_set():
            wrong.append(login_code(host, "PLAIN", guessed, secrets.token_hex(8)))

    def log_in_ten_times(app_id, password):
        codes, times = [], []
        while codes.count(235) < 10 and WRONG_LOGIN not in codes:
            before = time.monotonic()
            codes.append(login_code(host, "PLAIN", app_id, password))
            times.append(time.monotonic() - before)
        return codes, times

    guessers = [threading.Thread(target=guess) for _ in range(40)]
    for guesser in guessers:
        guesser.start()
    try:
        started.wait()
        wait_until(lambda: wrong, 30, what="first wrong login")
        generated, generated_times = log_in_ten_times("printer", host.passwords["printer"])
        chosen, chosen_times = log_in_ten_times(guessed, "chosen by a person")
    finally:
        done.set()
        for guesser in guessers:
            guesser.join()
    with capsys.disabled():
        for kind, times in (("generated", generated_times), ("chosen", chosen_times)):
            print(
                f" {kind} token: {len(times)} logins, median {statistics.median(times):.2f} s, longest {max(times):.2f} s;", end=""
            )
        print(f" {len(wrong)} wrong ones meanwhile ", end="")
    assert generated == [235] * 10
    assert set(chosen) <= {235, 454}
    assert set(wrong) <= {WRONG_LOGIN, 454}
    assert len(wrong) >= 40


# ---- One mailbox a user


@pytest.fixture(scope="module")
def one_mailbox_host(real_keycloak, realm):
    """policy.mailbox_domain: whatever a user's addresses are, they lead to one mailbox."""
    settings = {"virtual_mailbox_domains": "d1.test, d2.test, mailbox.internal"}
    with running(MailHost(real_keycloak, *realm, policy={"mailbox_domain": "mailbox.internal"}, settings=settings)) as instance:
        instance.daemon.ctl("aliases", "add", "smith@d2.test", "c.smith")
        yield instance


@pytest.mark.parametrize(
    ("recipient", "tag"),
    [
        pytest.param("carol@d1.test", "", id="primary"),
        pytest.param("Carol@D1.TEST", "", id="primary-in-mixed-case"),
        pytest.param("carol+tag@d1.test", "+tag", id="tagged-primary"),
        pytest.param("smith@d2.test", "", id="alias"),
        pytest.param("smith+tag@d2.test", "+tag", id="tagged-alias"),
    ],
)
def test_every_address_of_a_user_leads_to_the_one_mailbox(one_mailbox_host, recipient, tag):
    with one_mailbox_host.postfix.smtp() as client:
        received = one_mailbox_host.read("c.smith", send(client, "x@elsewhere.test", recipient))
    assert received.delivered_to == f"c.smith{tag}@mailbox.internal"


def test_mailbox_domain_takes_nothing_from_outside(one_mailbox_host):
    assert is_refused_as_recipient(one_mailbox_host, "c.smith@mailbox.internal")


@pytest.mark.parametrize("sender", ["carol@d1.test", "carol+tag@d1.test", "smith@d2.test"])
def test_user_sends_as_each_own_address_with_a_mailbox_domain(one_mailbox_host, sender):
    with one_mailbox_host.logged_in("XOAUTH2", "c.smith") as client:
        assert refusal(client, sender, "bob@d1.test") is None
        assert refusal(client, "c.smith@d1.test", "bob@d1.test") == expected(NOT_OWNED, "c.smith@d1.test")


def test_without_a_mailbox_domain_mail_for_an_email_of_another_name_cannot_be_read_by_its_user_and_doctor_says_so(host):
    with host.postfix.smtp() as client:
        marker = send(client, "x@elsewhere.test", "carol@d1.test")
    mail = host.dovecot.mail
    (path,) = wait_until(lambda: [each for each in mail.rglob("new/*") if marker in each.read_text()], 20, what="the message")
    assert path.is_relative_to(mail / "carol")
    assert not host.holds("c.smith", marker)
    shown = run_ctl("--config", host.daemon.config_path, "--json", "doctor", check=False).stdout
    found = {each["check"]: each for each in json.loads(shown)}
    assert found["mailbox-name"]["state"] == "problem"
    assert "carol@d1.test (c.smith)" in found["mailbox-name"]["items"]  # other tests add users to the realm
    assert "these users cannot read mail for their e-mail" in found["mailbox-name"]["text"]


# ---- E-mail as username


@pytest.fixture(scope="module")
def by_address_host(real_keycloak):
    """A realm with e-mail as username, and Dovecot as the sample's comment says for it."""
    client, account = service_client("mailcloak", SECRET, "view-users")
    users = [user(address, address) for address in ("erin@d1.test", "erin@d2.test")]
    real_keycloak.create_realm("by-address", [*users, account], [client], registrationEmailAsUsername=True)
    lines = "  auth_username_format = %Ln\n  #auth_username_format = %Lu\n"
    changes = [(lines, "  #auth_username_format = %Ln\n  auth_username_format = %Lu\n")]
    with running(MailHost(real_keycloak, "by-address", SECRET, changes=changes)) as instance:
        instance.daemon.ctl("aliases", "add", "sales@d1.test", "erin@d2.test")
        yield instance


def assert_only_one_receives(host, recipient, username, other):
    """Mail from outside for the recipient is in the one user's mailbox and not in the other's."""
    with host.postfix.smtp() as client:
        marker = send(client, "x@elsewhere.test", recipient)
    assert host.read(username, marker)
    assert not host.holds(other, marker)


@pytest.mark.parametrize(
    ("recipient", "username", "other"),
    [
        pytest.param("erin@d1.test", "erin@d1.test", "erin@d2.test", id="primary"),
        pytest.param("erin@d2.test", "erin@d2.test", "erin@d1.test", id="same-local-part-in-second-domain"),
        pytest.param("erin+tag@d1.test", "erin@d1.test", "erin@d2.test", id="tagged-primary"),
        pytest.param("sales@d1.test", "erin@d2.test", "erin@d1.test", id="alias-in-another-domain"),
    ],
)
def test_user_whose_username_is_the_own_address_receives_and_nobody_else_does(by_address_host, recipient, username, other):
    assert_only_one_receives(by_address_host, recipient, username, other)


@pytest.mark.parametrize("mechanism", TOKEN_MECHANISMS)
def test_user_whose_username_is_the_own_address_sends_as_it_and_as_own_aliases_alone(by_address_host, mechanism):
    with by_address_host.logged_in(mechanism, "erin@d2.test") as client:
        assert refusal(client, "erin@d2.test", "erin@d1.test") is None
        assert refusal(client, "sales@d1.test", "erin@d1.test") is None
        assert refusal(client, "erin@d1.test", "erin@d1.test") == expected(NOT_OWNED, "erin@d1.test")


# ---- Whose address is it really?


def test_setup_reaches_a_keycloak_whose_certificate_is_of_a_ca_of_its_own_by_ca_file(real_keycloak, realm, tmp_path):
    certificate, key = make_certificate(tmp_path)
    bundle = tmp_path / "bundle.pem"
    (tmp_path / "other").mkdir()
    bundle.write_text(make_certificate(tmp_path / "other")[0].read_text() + certificate.read_text())
    with real_keycloak.behind_https(certificate, key) as url:
        result = real_keycloak.try_setup(REALM, "client", KEYCLOAK_URL=url)
        assert (result.returncode, result.stdout) == (1, "")
        assert "PKIX path building failed" in result.stderr
        result = real_keycloak.try_setup(REALM, "client", KEYCLOAK_URL=url, CA_FILE=str(bundle))
        assert (result.returncode, realm[1] in result.stdout) == (0, True), result
    result = real_keycloak.try_setup(REALM, "client", CA_FILE=str(key))
    assert (result.returncode, result.stderr.startswith(f"setup: {key} holds no certificate that keytool reads: ")) == (1, True)


def test_setup_says_that_the_realm_does_not_exist(real_keycloak, realm):
    result = real_keycloak.try_setup(REALM.upper(), "client")
    assert (result.returncode, result.stdout) == (1, "")
    says = f"setup: there is no realm '{REALM.upper()}' for admin at {real_keycloak.url}; capital letters count\n"
    assert result.stderr.endswith(says)


@pytest.mark.parametrize(
    ("step", "require_verified_email", "status", "stolen"),
    [
        pytest.param("", False, 204, True, id="stock-realm"),
        pytest.param("", True, 204, False, id="require-verified-email-alone"),
        pytest.param("email-by-administrators", False, 400, False, id="e-mail-by-administrators"),
        pytest.param("verify-email", True, 204, False, id="verified-e-mail"),
    ],
)
def test_user_who_takes_an_address_has_it_only_on_a_stock_realm(real_keycloak, step, require_verified_email, status, stolen):
    name = f"theft-{step}-{require_verified_email}".lower()
    client, account = service_client("mailcloak", SECRET, "view-users")
    real_keycloak.create_realm(name, [user("mallory", "mallory@d1.test"), user("bob", "bob@d1.test"), account], [client])
    if step:
        real_keycloak.setup(name, step)
    token = real_keycloak.token(name, "mallory")
    with running(MailHost(real_keycloak, name, SECRET, require_verified_email=require_verified_email)) as host:
        with host.logged_in("OAUTHBEARER", "mallory", token) as client:
            assert refusal(client, "mallory@d1.test", "bob@d1.test") is None
        assert real_keycloak.edit_own_email(name, token, "ceo@d1.test") == status
        time_over = time.monotonic() + CACHE_SECONDS
        wait_until(lambda: time.monotonic() > time_over)  # until nothing of before is remembered
        with host.logged_in("OAUTHBEARER", "mallory", token) as client:
            sends = refusal(client, "ceo@d1.test", "bob@d1.test") is None
        assert (sends, not is_refused_as_recipient(host, "ceo@d1.test")) == (stolen, stolen)
