#!/usr/bin/env python3
"""What it costs a follower that the writer renews its origin every 10 seconds: a commit, after which answers are made again.

    bench/renewal.py        some seconds

A daemon is asked for 1,000 aliases over one connection, before and after each of 40 renewals.
"""

from __future__ import annotations

import contextlib
import sqlite3
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from conftest import USERS, Daemon, config_in

import mailcloak
import mailcloakmirror

ADDRESSES = [f"a{number}@d1.test" for number in range(1000)]
RENEWALS = 40


def measure(folder: Path) -> tuple[list[float], list[float], list[float]]:
    """Seconds: of a question whose answer is recalled, of one after a renewal, and of bringing the renewal itself."""
    state, shared, own = (str(folder / name) for name in ("writer.db", "shared.db", "state.db"))
    mailcloak.prepare_database(state, 5)
    with contextlib.closing(sqlite3.connect(state)) as database, database:
        rows = [(address, "alice") for address in ADDRESSES]
        database.executemany("INSERT INTO aliases (alias_email, username) VALUES (?, ?)", rows)
    mailcloakmirror.publish(shared, state, thorough=True)
    mailcloakmirror.follow(own, shared, thorough=True)
    daemon = Daemon(folder, config_in(folder, static_users=USERS), level="info").start()
    recalled, renewed, brought = [], [], []
    try:
        client = daemon.policy()

        def ask_all() -> float:
            begun = time.perf_counter()
            for address in ADDRESSES:
                client.ask(protocol_state="RCPT", recipient=address, sender="x@other.test", policy_context="recipient")
            return (time.perf_counter() - begun) / len(ADDRESSES)

        ask_all()
        for number in range(RENEWALS):
            recalled.append(ask_all())
            with contextlib.closing(sqlite3.connect(shared)) as database, database:
                database.execute("UPDATE origin SET published_at = ?", (number,))
            begun = time.perf_counter()
            mailcloakmirror.follow(own, shared, thorough=False)
            brought.append(time.perf_counter() - begun)
            renewed.append(ask_all())
    finally:
        daemon.close()
    return recalled, renewed, brought


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        for text, seconds in zip(("recalled", "after a renewal", "a renewal itself"), measure(Path(name))):
            print(f"{text}: {1e6 * statistics.median(seconds):,.0f} microseconds")
