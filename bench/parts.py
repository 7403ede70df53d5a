"""Where the time of a recalled policy answer goes: each part of it by itself, in microseconds, without sockets.

bench/parts.py            run it with the Python to be measured; it takes about ten seconds
"""

from __future__ import annotations

import gc
import math
import sys
import tempfile
import timeit
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import measure

import mailcloak


def microseconds(function, calls=20_000):
    return min(timeit.repeat(function, number=calls, repeat=5)) / calls * 1e6


def make_service(directory):
    """A service on static users and an empty database."""
    path = f"{directory}/state.db"
    mailcloak.prepare_database(path, 1)
    problems = []
    policy = mailcloak.read_block(mailcloak.PolicyConfig, "policy", {"domain": "d1.test", "foreign_sender": "dunno"}, problems)
    assert not problems
    config = mailcloak.Config("", None, {"alice": "alice@d1.test"}, policy, mailcloak.SqliteConfig(path), None, None)
    return mailcloak.Service(config)


class Server:
    """What a handler knows of its server."""

    def __init__(self, service):
        self.service = service


def main():
    with tempfile.TemporaryDirectory() as directory:
        service = make_service(directory)
        request_bytes = measure.ask_policy(1, "x@elsewhere.test", "alice@d1.test", "alice").request
        stream = mailcloak.PolicyStream()
        handler = mailcloak.PolicyHandler.__new__(mailcloak.PolicyHandler)
        handler.server = Server(service)
        handler.tally = mailcloak.Tally()

        def read():
            stream.feed(request_bytes)
            return stream.next_request(), stream.next_request()

        request = read()[0]
        for _ in range(2):  # what the second look-up says of alice is news for the first
            action = handler._answer(request)
        question = mailcloak.policy_question(request, service.policy)
        version = service.database.version()
        assert service.recalled.recall(question, version) == action, "the answer is not recalled"
        parts = [
            ("take the request from the stream", read),
            ("- parse it", lambda: mailcloak.parse_policy_request(request_bytes[:-2])),
            ("answer it", lambda: handler._answer(request)),
            ("- the version of the file: two system calls", service.database.version),
            ("- what decides", lambda: mailcloak.policy_question(request, service.policy)),
            ("- recall: find the answer, look at its facts", lambda: service.recalled.recall(question, version)),
            ("- not recalled: decide from remembered rows and the cache", lambda: decide_again(request, service)),
            ("- neither: a row from SQLite", lambda: read_row(service.database)),
            ("encode the answer", lambda: stream.encode(action)),
        ]
        print(f"| part | us, Python {sys.version.split()[0]} |\n|---|---|")
        for name, function in parts:
            print(f"| {name} | {microseconds(function):.2f} |", flush=True)
        service.database.close()
    for count in (1_000, 100_000):
        whole, rest = collector_microseconds(count)
        print(f"| a pass of Python's collector over {count:,} users and as many recalled answers | {whole:,.0f} |")
        print(f"| the same after a pass whose survivors are left out | {rest:,.0f} |")


def collector_microseconds(count):
    """How long the collector of cycles stops all threads with so many users and answers in memory: over everything; over the rest."""
    policy = mailcloak.read_block(mailcloak.PolicyConfig, "policy", {"domain": "bench.test", "cache_max_entries": count}, [])
    store, recalled = mailcloak.UserStore(policy), {}
    for number in range(count):
        address = f"user{number}@bench.test"
        user = mailcloak.User(f"user{number}", address, True, user_id=f"{number:08x}-0000-4000-8000-000000000000")
        known, _ = store.learn(("email", address), mailcloak.Answer((user,), float(number)))
        question = ("RCPT", "", address, "sender-not-local")
        recalled[question] = mailcloak.Recalled(mailcloak.Action("DUNNO", "primary"), None, (known,), float(number), math.inf)
    whole = microseconds(gc.collect, 1)
    gc.freeze()
    rest = microseconds(gc.collect, 1)
    gc.unfreeze()
    return whole, rest


def read_row(database):
    """One that is not remembered."""
    database._rows = mailcloak.BoundedMap(0)
    return database.find_alias("alias@d1.test")


def decide_again(request, service):
    return mailcloak.decide_policy(request, service.policy, mailcloak.LiveFacts(service))


if __name__ == "__main__":
    main()
