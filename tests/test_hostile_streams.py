"""Streams that no Postfix sends, each over a separate connection to a running daemon, generated from a fixed seed.

Each is a mutation of good requests. The daemon must answer what the parsers and decisions say about the same bytes, and after each
stream a good question on an open connection gets its answer. At the end the daemon has neither grown nor kept a thread or descriptor.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import sqlite3
import struct
from collections import Counter
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest
from conftest import USERS, wait_until
from fuzz.stream_checks import drain

import mailcloak

SEED = 1998
MAX_STREAM_BYTES = 64 * 1024

ALIASES = {"info@d1.test": "alice", "sales@d2.test": "bob"}
APPS = {"printer": ("scan@d1.test",)}
POLICY = mailcloak.PolicyConfig(domain=frozenset({"d1.test", "d2.test"}), recipient_delimiter="+")  # as in make_config


def policy_request(**attributes):
    attributes = {"request": "smtpd_access_policy", "protocol_state": "RCPT", **attributes}
    return "".join(f"{name}={value}\n" for name, value in attributes.items()).encode() + b"\n"


def netstring(payload):
    return b"%d:%s," % (len(payload), payload)


POSTFIX = {
    "protocol_name": "ESMTP", "helo_name": "client.elsewhere.test", "queue_id": "8045F2AB23", "recipient_count": "0",
    "client_address": "192.0.2.7", "client_name": "client.elsewhere.test", "instance": "123.456.7", "size": "12345",
    "sasl_method": "", "sasl_username": "", "encryption_protocol": "TLSv1.3", "client_port": "40000", "policy_context": "",
}  # fmt: skip
POLICY_REQUESTS = (
    policy_request(**POSTFIX, sender="someone@elsewhere.test", recipient="alice@d1.test"),
    policy_request(**POSTFIX, sender="someone@elsewhere.test", recipient="stranger@d1.test"),
    policy_request(recipient="info+shop@d1.test"),
    policy_request(recipient="carol@d2.test", sender="alice@d1.test"),
    policy_request(recipient="büro@bücher.test", sender="<>"),
    policy_request(recipient="bob%d1.test@elsewhere.test", policy_context="recipient"),
    policy_request(sender="info@d1.test", sasl_username="alice", sasl_method="XOAUTH2", policy_context="sender"),
    policy_request(protocol_state="MAIL", sender="bob@d1.test", sasl_username="alice", sasl_method="OAUTHBEARER"),
    policy_request(protocol_state="MAIL", sender="scan@d1.test", sasl_username="printer", sasl_method="PLAIN"),
    policy_request(protocol_state="DATA"),
)
SOCKETMAP_QUERIES = tuple(
    netstring(query.encode())
    for query in ("alias info@d1.test", "alias info+shop@d1.test", "alias Sales@D2.test", "alias stranger@d1.test", "alias bob@d1.test",
                  "alias büro@bücher.test", "alias", "alias ", "", "passwd root", 'alias "a b"@d1.test', "alias info%d1.test")
)  # fmt: skip


# ---- streams


def truncated(rng, data, _):
    return data[: rng.randrange(len(data) + 1)]


def spliced(rng, data, other):
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def cut_out(rng, data, _):
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.randrange(40) :]


def bytes_inserted(rng, data, _):
    return inserted(rng, data, rng.randbytes(rng.randrange(1, 30)))


NASTY = (
    b"\0", b"\0\0\0\0", b"\r", b"\r\n", b"\n", b"\n\n", b"=", b":", b",", b" ", b"@", b"\x1b[2J", b"\x7f", b"\xff", b"\xed\xa0\x80",
    "\u2028".encode(), "\u202e".encode(), b'"', b"'", b"> reason=ok", b"%", b"*", b"' OR 1=1 --", b"\\", b"0:,", b"action=OK\n\n",
)  # fmt: skip


def nasty_text_inserted(rng, data, _):
    return inserted(rng, data, rng.choice(NASTY))


def bits_flipped(rng, data, _):
    flipped = bytearray(data)
    for _ in range(rng.randrange(1, 6) if data else 0):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def attribute_repeated(rng, data, other):
    lines = data.split(b"\n")
    line = rng.choice(lines + other.split(b"\n"))
    for _ in range(rng.choice((1, 2, 50))):
        lines.insert(rng.randrange(len(lines) + 1), line)
    return b"\n".join(lines)


def lines_shuffled(rng, data, _):
    lines = data.split(b"\n")
    rng.shuffle(lines)
    return b"\n".join(lines)


NUMBERS = (b"0", b"00", b"1", b"9999", b"10000", b"10001", b"99999", b"100000", b"4294967296", b"-1", b"9" * 400, "٣".encode(), b"")


def number_changed(rng, data, _):
    found = list(re.finditer(rb"[0-9]+", data))
    if not found:
        return data
    start, end = rng.choice(found).span()
    close = (b"%d" % max(0, int(data[start:end][:9]) + rng.choice((-2, -1, 1, 2))),)
    return data[:start] + rng.choice(NUMBERS + close) + data[end:]


def wrapped(rng, data, _):
    return b"%d:%s," % (max(0, len(data) + rng.choice((0, 0, 0, -1, 1, 7))), data)


def oversized(rng, data, _):
    return inserted(
        rng, data, rng.choice((b"a", b"x=", b"\n", b"\0", b"9", b"@:", b"a!", "ü".encode())) * rng.randrange(500, 20_000)
    )


def doubled(rng, data, _):
    return data * rng.choice((2, 2, 3, 30))


def pipelined_before(_, data, other):
    return other + data


def pipelined_after(_, data, other):
    return data + other


def inserted(rng, data, more):
    place = rng.randrange(len(data) + 1)
    return data[:place] + more + data[place:]


MUTATIONS = (
    truncated, spliced, cut_out, bytes_inserted, nasty_text_inserted, bits_flipped, attribute_repeated, lines_shuffled, number_changed,
    wrapped, doubled, pipelined_before, pipelined_after,
)  # fmt: skip


def hostile_stream(rng, requests, foreign):
    """A good request, or several, after one to four mutations; one stream in thirty is oversized as well."""
    data = rng.choice(requests)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        data = rng.choice(MUTATIONS)(rng, data, rng.choice(requests if rng.random() < 0.9 else foreign))
    if rng.random() < 1 / 30:
        data = oversized(rng, data, b"")
    return data[:MAX_STREAM_BYTES]


# ---- what the daemon must answer


class World(mailcloak.Facts):
    """The daemon's users, aliases and apps as values."""

    def find_alias(self, address):
        return mailcloak.Alias((ALIASES[address.text],), True) if address.text in ALIASES else None

    def find_app(self, app_id, sender):
        return mailcloak.App("enabled", sender.text in APPS[app_id]) if app_id in APPS else None

    def find_holders(self, address):
        return tuple(mailcloak.User(name, email, True) for name, email in USERS.items() if email == address.text)

    def has_left(self, username):
        return False

    def find_login(self, sasl_username):
        named = tuple(mailcloak.User(name, email, True) for name, email in USERS.items() if name == sasl_username)
        address = mailcloak.normalise_address(sasl_username)
        is_email = sasl_username == address.text
        return mailcloak.resolve_login(named, self.find_holders(address) if is_email else ())


def expected_answer(request):
    """A pattern of what the daemon says to a request: the very words, but for the one answer that quotes the client."""
    if isinstance(request, mailcloak.PolicyRequest):
        return re.escape(mailcloak.decide_policy(request, POLICY, World()).text)
    if request.name != "alias":
        return r"PERM unknown map [^\s\"<>]{0,64}"
    return re.escape(mailcloak.decide_alias(request.key, POLICY, World()).text) if request.key else "PERM no key"


def split_policy_answers(data):
    *answers, rest = data.split(b"\n\n")
    assert rest == b"", "an answer without its end"
    assert all(answer.startswith(b"action=") for answer in answers)
    return [answer[len(b"action=") :].decode() for answer in answers]


def split_netstrings(data):
    answers = []
    while data:
        digits, _, rest = data.partition(b":")
        length = int(digits)
        assert rest[length : length + 1] == b",", "a netstring without its comma"
        answers.append(rest[:length].decode())
        data = rest[length + 1 :]
    return answers


class Protocol(NamedTuple):
    stream_class: Any
    split_answers: Callable
    requests: tuple
    good_questions: tuple  # (bytes, answer)


POLICY_PROTOCOL = Protocol(
    mailcloak.PolicyStream,
    split_policy_answers,
    POLICY_REQUESTS,
    (
        (policy_request(recipient="alice@d1.test"), "DUNNO"),
        (policy_request(recipient="stranger@d1.test"), "550 5.1.1 No such user"),
        (policy_request(recipient="bob@d1.test", sender="bob@d1.test", sasl_username="bob"), "DUNNO"),
        (
            policy_request(recipient="bob@d1.test", sender="bob@d1.test", sasl_username="alice"),
            "553 5.7.1 Sender not owned by authenticated user",
        ),
        (policy_request(protocol_state="MAIL", sender="scan@d1.test", sasl_username="printer"), "DUNNO"),
    ),
)
SOCKETMAP_PROTOCOL = Protocol(
    mailcloak.SocketmapStream,
    split_netstrings,
    SOCKETMAP_QUERIES,
    (
        (netstring(b"alias info@d1.test"), "OK alice@d1.test"),
        (netstring(b"alias stranger@d1.test"), "NOTFOUND "),
        (netstring(b"alias sales+x@d2.test"), "OK bob+x@d2.test"),
    ),
)


# ---- a running daemon


def talk(path, pieces):
    """All that the daemon answers to a stream in pieces that ends here, until it closes the connection."""
    answers = []
    with socket.socket(socket.AF_UNIX) as client:
        # Not settimeout(): it makes Python wait until the buffer is three quarters free, and a daemon that waits for us to read its
        # answers would never come to that.
        for timeout in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            client.setsockopt(socket.SOL_SOCKET, timeout, struct.pack("ll", 20, 0))
        client.connect(path)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # after a protocol error it does not read on
            for piece in pieces:
                client.sendall(piece)
            client.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while True:
                received = client.recv(64 * 1024)
                if not received:
                    break
                answers.append(received)
    return b"".join(answers)


class Process:
    """What a process uses, from /proc."""

    def __init__(self, pid):
        self._directory = Path(f"/proc/{pid}")

    @property
    def resident_kib(self):
        return int(re.search(r"VmRSS:\s+(\d+) kB", (self._directory / "status").read_text())[1])

    @property
    def threads(self):
        return len(os.listdir(self._directory / "task"))

    @property
    def descriptors(self):
        return len(os.listdir(self._directory / "fd"))


@pytest.fixture
def filled_daemon(make_daemon):
    """A daemon that is starting, has USERS, ALIASES and APPS, and logs what is wrong alone."""
    daemon = make_daemon(level="warning", static_users=USERS)
    mailcloak.prepare_database(str(daemon.database), 1)
    with contextlib.closing(sqlite3.connect(daemon.database)) as database, database:
        database.executemany("INSERT INTO aliases (alias_email, username) VALUES (?, ?)", ALIASES.items())
        for app_id, senders in APPS.items():
            database.execute("INSERT INTO apps (app_id, secret_hash) VALUES (?, 'x')", (app_id,))
            database.executemany("INSERT INTO app_from (app_id, from_addr) VALUES (?, ?)", [(app_id, sender) for sender in senders])
    return daemon.launch()


def connect(make_client):
    """A connection to a daemon that is starting."""

    def try_it():
        with contextlib.suppress(OSError):
            return make_client()

    return wait_until(try_it, what="start of the daemon")


def send_hostile_streams(sides, rng, count, seen):
    """Send this many streams, check the daemon's answers to each, and count in seen what they were."""
    for number in range(count):
        (protocol, path, kept), (other_protocol, *_) = rng.sample(sides, 2)
        data = hostile_stream(rng, protocol.requests, other_protocol.requests)
        cut = rng.choice((0, 0, rng.randrange(len(data) + 1)))
        received = talk(path, (data[:cut], data[cut:]))
        stream = protocol.stream_class()
        stream.feed(data)
        outcome = drain(stream)
        shown = f"stream {number}, {len(data)} bytes, {data[:400]!r}, answered {received[:400]!r}"
        answers = protocol.split_answers(received)
        assert len(answers) == len(outcome.requests), f"{len(outcome.requests)} requests in {shown}"
        for request, answer in zip(outcome.requests, answers):
            assert re.fullmatch(expected_answer(request), answer), f"{request} in {shown}"
            assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", answer), shown
        question, right_answer = rng.choice(protocol.good_questions)
        kept.send_bytes(question)
        assert kept.receive() == right_answer, f"a good question after {shown}"
        seen["answers"] += len(outcome.requests)
        seen["bad"] += outcome.error is not None
        seen["answered, then bad"] += bool(outcome.requests and outcome.error)
        seen["nothing whole, nothing bad"] += not outcome.requests and not outcome.error


LOG_LINE = re.compile(r"\S+ \S+ (warning|error) (policy|socketmap): \S.*")


@pytest.mark.parametrize(
    ("count", "warm_up", "max_growth_kib"),
    [
        pytest.param(3_000, 1_000, 2 * 1024, id="3000-streams"),
        pytest.param(100_000, 5_000, 10 * 1024, id="100000-streams", marks=[pytest.mark.long, pytest.mark.timeout(1200)]),
    ],
)
def test_hostile_streams_are_answered_as_parsed_and_leave_nothing_behind(filled_daemon, count, warm_up, max_growth_kib):
    sockets = filled_daemon.config["sockets"]
    sides = [
        (POLICY_PROTOCOL, sockets["policy_socket"], connect(filled_daemon.policy)),
        (SOCKETMAP_PROTOCOL, sockets["socketmap_socket"], connect(filled_daemon.socketmap)),
    ]
    rng, seen, process = random.Random(SEED), Counter(), Process(filled_daemon.process.pid)
    for protocol, _, kept in sides:  # each kept connection has its thread, and that its database, from here on
        kept.send_bytes(protocol.good_questions[0][0])
        assert kept.receive() == protocol.good_questions[0][1]
    threads, descriptors = process.threads, process.descriptors
    send_hostile_streams(sides, rng, warm_up, seen)
    before_kib = process.resident_kib
    send_hostile_streams(sides, rng, count - warm_up, seen)
    wait_until(lambda: process.threads <= threads and process.descriptors <= descriptors, what="threads and descriptors as before")
    grown_kib = process.resident_kib - before_kib
    assert grown_kib < max_growth_kib
    lines = [line for line in filled_daemon.log().splitlines() if "RFC 5321" not in line]  # there is no postmaster
    assert [line for line in lines if not LOG_LINE.fullmatch(line) or not line.isprintable()] == []
    assert [line for line in lines if "internal error" in line or "Traceback" in line] == []
    assert sum(": bad request, connection closed reason=" in line for line in lines) == seen["bad"]
    assert all(seen[kind] > count // 50 for kind in ("answers", "bad", "answered, then bad", "nothing whole, nothing bad")), seen
    print(f"{count} streams, {dict(seen)}, grown by {grown_kib} KiB")
