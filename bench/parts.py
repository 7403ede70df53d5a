"""Where the time of a remembered policy answer goes: each part of it by itself, in microseconds, without sockets.

bench/parts.py            with the Python whose answer is wanted; takes about ten seconds
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
import timeit
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench
import mailcloak


def microseconds(function, calls=20_000):
    return min(timeit.repeat(function, number=calls, repeat=5)) / calls * 1e6


def make_service(directory):
    """A service on static users and an empty database that has not changed for long enough."""
    path = f"{directory}/state.db"
    mailcloak.prepare_database(path, 1)
    problems = []
    policy = mailcloak.read_block(mailcloak.PolicyConfig, "policy", {"domain": "d1.test", "foreign_sender": "dunno"}, problems)
    assert not problems
    config = mailcloak.Config("", None, {"alice": "alice@d1.test"}, policy, mailcloak.SqliteConfig(path), None, None)
    time.sleep(mailcloak.DATABASE_SETTLED_SECONDS + 0.2)
    return mailcloak.Service(config)


class Server:
    """What a handler knows of its server."""

    def __init__(self, service):
        self.service = service


def main():
    with tempfile.TemporaryDirectory() as directory:
        service = make_service(directory)
        request_bytes = bench.ask_policy(1, "x@elsewhere.test", "alice@d1.test", "alice").request
        stream = mailcloak.PolicyStream()
        handler = mailcloak.PolicyHandler.__new__(mailcloak.PolicyHandler)
        handler.server = Server(service)
        handler.tally = mailcloak.Tally()

        def read():
            stream.feed(request_bytes)
            return stream.next_request(), stream.next_request()

        request = read()[0]
        action = handler._answer(request)
        text = "\n" + request_bytes[:-2].decode()
        question = mailcloak.policy_question(request, service.policy)
        state = service.database.state()
        assert service.recall(question, state) == action, "the answer is not remembered"
        parts = [
            ("take the request from the stream", read),
            ("- parse it", lambda: mailcloak.parse_policy_request(request_bytes[:-2])),
            ("- - search for the attributes that decide", lambda: mailcloak._POLICY_ATTRIBUTE.findall(text)),
            ("answer it", lambda: handler._answer(request)),
            ("- the state of the file: a system call", service.database.state),
            ("- what decides", lambda: mailcloak.policy_question(request, service.policy)),
            ("- recall: find the answer, look at its facts", lambda: service.recall(question, state)),
            ("- not remembered: decide from SQLite and the cache", lambda: decide_anew(request, service)),
            ("encode the answer", lambda: stream.encode(action)),
        ]
        print(f"| part | us, Python {sys.version.split()[0]} |\n|---|---|")
        for name, function in parts:
            print(f"| {name} | {microseconds(function):.2f} |", flush=True)
        service.database.close()
    for count in (1_000, 100_000):
        print(
            f"| a pass of Python's collector, {count:,} users and as many remembered answers | {collector_microseconds(count):,.0f} |"
        )


def collector_microseconds(count):
    """How long the collector of cycles stops all threads when it goes over everything, with so many users and answers in memory."""
    cache, remembered = mailcloak.Cache(count), mailcloak.RememberedAnswers(count)
    for number in range(count):
        address = f"user{number}@bench.test"
        entry = mailcloak.Entry(
            (mailcloak.User(f"user{number}", address, True),), True, float(number), float(number), float(number)
        )
        cache.put(("holders", address), entry)
        answer = mailcloak.Remembered(mailcloak.Action("DUNNO", "primary"), None, ((("holders", address), entry),))
        remembered.put(("RCPT", "", address, "sender-not-local"), answer)
    return microseconds(gc.collect, 1)


def decide_anew(request, service):
    return mailcloak.decide_policy(request, service.policy, mailcloak.LiveFacts(service))


if __name__ == "__main__":
    main()
