#!/usr/bin/env python3
"""What the followers never get if the writer and its disk are lost: the seconds of changes that were not in the storage yet.

    bench/loss.py [REPETITIONS]     30 of them take some minutes; needs litestream (make real-servers)

The writer runs the two services of examples/litestream with the intervals that stand there, on a folder as storage, while each 20 ms a
change is committed. At a random moment both services are killed. What a follower would get now is restored from the storage, and compared
with the changes: lost are the seconds from the first commit that is missing there until the kill. Storage over a network adds the time
of a request.
"""

from __future__ import annotations

import contextlib
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from real.litestream import WRITER, Folder, ReplicatedHost

EVERY_SECONDS = 0.02
NUMBER = "last@d1.test"  # the alias that leads to the number of the last change


class Changes(threading.Thread):
    """Commits changes until it is ended, and notes when each was committed: (the number, the time)."""

    def __init__(self, path: Path, first: int) -> None:
        super().__init__()
        self.path, self.number, self.committed = path, first, []
        self.ended = threading.Event()

    def run(self) -> None:
        with contextlib.closing(sqlite3.connect(self.path, timeout=20)) as database:
            while not self.ended.wait(EVERY_SECONDS):
                with database:
                    database.execute("REPLACE INTO aliases (alias_email, username) VALUES (?, ?)", (NUMBER, str(self.number)))
                self.committed.append((self.number, time.monotonic()))
                self.number += 1


def stored_number(host: ReplicatedHost) -> int:
    """The last change that is in the storage; -1 where there is none."""
    copy = host.directory / "restored.db"
    for path in host.directory.glob("restored.db*"):
        path.unlink()
    litestream, config, shared = host.words("replicate")[0], host.directory / "litestream.yml", host.shared
    command = [litestream, "restore", "-config", str(config), "-o", str(copy), str(shared)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        return -1
    with contextlib.closing(sqlite3.connect(copy)) as database:
        row = database.execute("SELECT username FROM aliases WHERE alias_email = ?", (NUMBER,)).fetchone()
    return int(row[0]) if row else -1


def lose_once(host: ReplicatedHost, first: int) -> tuple[float, int]:
    """Kill the writer while it changes: the seconds that are lost, and the number for the next change."""
    host.start(*WRITER)
    changes = Changes(host.database, first)
    changes.start()
    deadline = time.monotonic() + 60
    while stored_number(host) < first:  # until all services have begun
        if time.monotonic() > deadline:
            sys.exit(f"bench: nothing comes to the storage: {host.log('replicate')[-2000:]}")
        time.sleep(0.2)
    time.sleep(random.uniform(2, 5))  # noqa: S311
    host.end(*WRITER, with_signal=signal.SIGKILL)
    killed = time.monotonic()
    changes.ended.set()
    changes.join()
    stored = stored_number(host)
    missing = [committed for number, committed in changes.committed if number > stored and committed < killed]
    return killed - missing[0] if missing else 0.0, changes.number


def measure(repetitions: int) -> list[float]:
    """The seconds that were lost each time."""
    storage = Folder().start()
    host = ReplicatedHost("mx1", storage, "mx1", interval="1s")
    try:
        host.ctl("aliases", "add", "info@d1.test", "alice")
        losses, first = [], 1
        for _ in range(repetitions):
            seconds, first = lose_once(host, first)
            losses.append(seconds)
            print(f"{seconds:.2f} s", flush=True)
        return losses
    finally:
        host.close()
        storage.close()


if __name__ == "__main__":
    found = measure(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
    print(f"{len(found)} times: {statistics.median(found):.2f} s lost in the median, {max(found):.2f} s at most")
