"""SIGTERM, SIGKILL and restarts while the daemon has work: no request that was read is left without an answer, no message is lost."""

from __future__ import annotations

import collections
import itertools
import re
import signal
import smtplib
import threading
import time

import pytest
from conftest import USERS, SocketmapClient, running, wait_until
from real.postfix import PrivatePostfix, daemon_behind, send
from test_lifecycle import wait_for_self_check
from test_outages import DEFER, SHORT

import mailcloak

CONNECTIONS = 20
TEMP = "TEMP lookup failed"

# ---- SIGTERM under busy connections


def encode(recipient):
    """A policy request as it goes over the wire."""
    return f"request=smtpd_access_policy\nprotocol_state=RCPT\npolicy_context=recipient\nrecipient={recipient}\n\n".encode()


def encode_query(key):
    data = f"alias {key}".encode()
    return b"%d:%s," % (len(data), data)


@pytest.fixture
def daemon(make_daemon, keycloak):
    """A daemon that has seen alice, whose answer has ended since; aliases that lead to bob; and then a Keycloak that stalls."""
    for username, email in USERS.items():
        keycloak.add_user(username, email)
    instance = make_daemon(keycloak=keycloak.config(timeout_seconds=30), policy=SHORT).start()
    wait_for_self_check(keycloak)
    instance.ctl("aliases", "add", "info@d1.test", "bob")
    assert instance.ask(recipient="alice@d1.test") == "DUNNO"
    time.sleep(SHORT["cache_ttl_seconds"])
    keycloak.forget_requests()
    keycloak.fault = "stall"
    return instance


def send_to_all(daemon):
    """Twenty connections with something sent over each: [(client, the answers that are due when nothing more comes of Keycloak)]."""
    work = []
    for number in range(4):
        work += [
            (daemon.policy(), encode(f"u{number}@d1.test"), [DEFER]),
            (daemon.policy(), encode("alice@d1.test"), ["DUNNO"]),
            (
                daemon.policy(),
                b"".join(map(encode, ("info@d1.test", f"v{number}@d1.test", "x@elsewhere.test", "alice@d1.test", "info@d1.test"))),
                ["DUNNO", DEFER, "DUNNO", "DUNNO", "DUNNO"],
            ),
            (daemon.socketmap(), encode_query(f"info+{number}@d1.test") + encode_query("info@d1.test"), [TEMP, "OK bob@d1.test"]),
            (daemon.policy(), encode(f"w{number}@d1.test") + encode("info@d1.test")[:-1], [DEFER]),
        ]
    assert len(work) == CONNECTIONS
    for client, _, _ in work:  # accepted, not only connected
        client.send("alias info@d1.test") if isinstance(client, SocketmapClient) else client.send(recipient="x@elsewhere.test")
        assert client.receive() in ("OK bob@d1.test", "DUNNO")
    for client, data, _ in work:
        client.send_bytes(data)
    return [(client, due) for client, _, due in work]


def test_sigterm_with_twenty_connections_waiting_for_keycloak_answers_every_request_that_was_read(daemon, keycloak):
    work = send_to_all(daemon)
    wait_until(lambda: keycloak.at_once == 8, what="as many lookups at Keycloak as it is asked at a time")
    started = time.monotonic()
    daemon.process.terminate()
    answers = [[client.receive() for _ in range(len(due) + 1)] for client, due in work]
    elapsed_seconds = time.monotonic() - started
    assert answers == [[*due, None] for _, due in work]  # and nothing after them
    assert daemon.process.wait(10) == 0
    assert elapsed_seconds > mailcloak.SHUTDOWN_LOOKUP_SECONDS - 0.5
    assert time.monotonic() - started < 5
    assert "Traceback" not in daemon.log()


def test_sigterm_and_keycloak_that_answers_within_three_seconds_gives_what_it_says(daemon, keycloak):
    answering = threading.Event()
    keycloak.fault, keycloak.latency_seconds = None, 30
    keycloak.wait = lambda seconds: seconds > 0 and answering.wait(seconds) and False
    for username in (f"{letter}{number}" for letter in "uvw" for number in range(4)):
        keycloak.add_user(username, f"{username}@d1.test")
    work = send_to_all(daemon)
    wait_until(lambda: keycloak.at_once == 8, what="as many lookups at Keycloak as it is asked at a time")
    daemon.process.terminate()
    daemon.wait_for_log("daemon: stopping")
    answering.set()
    answers = [[client.receive() for _ in range(len(due) + 1)] for client, due in work]
    said = {DEFER: "DUNNO"}
    for number, (_, due) in enumerate(work):
        mailbox = f"OK bob+{number // 5}@d1.test"
        assert answers[number] == [*(mailbox if each == TEMP else said.get(each, each) for each in due), None]
    assert daemon.process.wait(10) == 0


def test_second_sigterm_with_twenty_connections_waiting_ends_at_once(daemon, keycloak):
    work = send_to_all(daemon)
    wait_until(lambda: keycloak.at_once == 8, what="as many lookups at Keycloak as it is asked at a time")
    daemon.process.terminate()
    daemon.wait_for_log("daemon: stopping")
    started = time.monotonic()
    daemon.process.terminate()
    assert daemon.process.wait(10) == -signal.SIGTERM
    assert time.monotonic() - started < 1
    for client, due in work:
        received = list(iter(client.receive, None))
        assert received == due[: len(received)]  # what had been answered, and the connection's end


def test_sigterm_under_twenty_connections_that_never_rest_answers_all_that_was_sent(make_daemon, keycloak):
    """What a client could send has arrived, and what has arrived is answered."""
    for username, email in USERS.items():
        keycloak.add_user(username, email)
    daemon = make_daemon(level="info", keycloak=keycloak.config(), policy=SHORT).start()
    daemon.ctl("aliases", "add", "info@d1.test", "bob")
    sent, answered, wrong = [0] * CONNECTIONS, [0] * CONNECTIONS, []

    def ask(number):
        client = daemon.policy()
        requests = [encode(recipient) for recipient in ("info@d1.test", "alice@d1.test", "x@elsewhere.test")]
        for size in itertools.cycle((1, 2, 5, 11)):
            try:
                client.send_bytes(b"".join(requests[index % 3] for index in range(size)))
                sent[number] += size
            except OSError:  # the daemon reads no more
                size = 0
            answers = [client.receive() for _ in range(size)]
            answered[number] += size - answers.count(None)
            wrong.extend(answer for answer in answers if answer not in ("DUNNO", None))
            if not size or None in answers:
                return

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    wait_until(lambda: min(answered) > 20, what="answers to everybody")
    started = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - started < 5
    for thread in threads:
        thread.join()
    assert (answered, wrong) == (sent, [])


# ---- kill -9 and restarts under a load through Postfix

MESSAGES, SESSIONS = 400, 8
DISTURBANCES = ("SIGKILL", "SIGTERM") * 3
ALIASES = {"info@d1.test": "carol", "news@d2.test": "bob"}
RECIPIENTS = ("alice@d1.test", "carol@d2.test", "info@d1.test", "news+{}@d2.test", "bob+{}@d1.test")  # {}: the message's number
MAILBOXES = ("alice@d1.test", "carol@d2.test", "carol@d1.test", "bob+{}@d2.test", "bob+{}@d1.test")


class Load:
    """Clients that send message after message, each again and again until Postfix has taken it for all its recipients."""

    def __init__(self, postfix):
        self._postfix = postfix
        self._numbers = iter(range(MESSAGES))  # each next() is one step, for whichever thread takes it
        self._deadline = time.monotonic() + 90
        self.accepted = []  # (the message's number, its queue id)
        self.answers = []  # the codes of all other answers
        self._threads = [threading.Thread(target=self._work) for _ in range(SESSIONS)]

    def start(self):
        for thread in self._threads:
            thread.start()

    def finish(self):
        for thread in self._threads:
            thread.join()

    def _work(self):
        client = None
        for number in self._numbers:
            while True:
                try:
                    client = client or self._connect()
                    queue_id = send(client, "sender@elsewhere.test", *(recipient.format(number) for recipient in RECIPIENTS))
                    self.accepted.append((number, queue_id))
                    break
                except smtplib.SMTPResponseException as exc:
                    self.answers.append(exc.smtp_code)
                except (smtplib.SMTPException, OSError):
                    client = None
                if time.monotonic() > self._deadline:
                    return
                time.sleep(0.1)

    def _connect(self):
        client = smtplib.SMTP("127.0.0.1", self._postfix.port, timeout=30)
        client.ehlo("client.test")
        return client


@pytest.fixture
def postfix():
    # notify_classes: no mail of Postfix's own to the postmaster about look-ups that failed
    with running(PrivatePostfix(settings={"virtual_transport": "discard:", "notify_classes": ""})) as instance:
        yield instance


@pytest.fixture
def mail_daemon(postfix, keycloak):
    for username, email in USERS.items():
        keycloak.add_user(username, email)
    policy = {"domain": ["d1.test", "d2.test"], "recipient_delimiter": "+"}
    with running(daemon_behind(postfix, level="info", keycloak=keycloak.config(), policy=policy)) as instance:
        for address, username in ALIASES.items():
            instance.ctl("aliases", "add", address, username)
        yield instance


@pytest.mark.long
@pytest.mark.real("postfix", "root")
def test_killed_and_restarted_under_load_postfix_delivers_every_message(postfix, mail_daemon, capsys):
    started = time.monotonic()
    load = Load(postfix)
    load.start()
    for number, name in enumerate(DISTURBANCES, 1):
        wait_until(lambda number=number: len(load.accepted) > number * MESSAGES // 8, 30, what=f"mail before disturbance {number}")
        mail_daemon.process.send_signal(signal.Signals[name])
        assert mail_daemon.process.wait(10) == (-signal.SIGKILL if name == "SIGKILL" else 0)
        time.sleep(0.3)  # so that mail meets no daemon
        assert len(load.accepted) < MESSAGES, "the load was over too soon to show anything"
        mail_daemon.start()
    load.finish()
    assert sorted(number for number, _ in load.accepted) == list(range(MESSAGES))  # each of them, and none twice
    assert load.answers, "nobody noticed that the daemon was away"
    assert {code // 100 for code in load.answers} == {4}

    wait_until(lambda: not postfix.queue(), 20, what="empty queue")
    log = postfix.log()
    deliveries = collections.defaultdict(list)
    for queue_id, mailbox, status in re.findall(r"\]: (\w+): to=<(.*?)>, .*status=(\w+)", log):
        deliveries[queue_id].append((mailbox, status))
    expected = {queue_id: sorted((mailbox.format(number), "sent") for mailbox in MAILBOXES) for number, queue_id in load.accepted}
    assert {queue_id: sorted(found) for queue_id, found in deliveries.items()} == expected
    assert not re.search(r"status=(bounced|deferred|expired)|non-delivery|reject: RCPT from \S+: 5", log)
    assert "Traceback" not in mail_daemon.log()
    with capsys.disabled():
        print(
            f" {MESSAGES} messages, {sum(map(len, deliveries.values()))} deliveries, 0 lost, 0 bounced; {len(DISTURBANCES)} ends of the"
            f" daemon, {len(load.answers)} times 4xx, {time.monotonic() - started:.0f} s ",
            end="",
        )
