#!/usr/bin/env python3
"""Measure mailcloakctl aliases import, sync and export with many aliases, and what a running daemon answers meanwhile.

bench/data.py [NUMBER]     one line for each step: seconds, memory, the daemon's slowest answer, and answers that were not right

Two clients ask the daemon's map, one question at a time, for aliases of the file and for some that are never there. Writes to the
terminal only; the database is below TMPDIR.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import Daemon, SocketmapClient, config_in  # noqa: E402

CLIENTS = 2


class Client(threading.Thread):
    """Asks until it is told to stop; any answer of OK and NOTFOUND is right, since the aliases come and go."""

    def __init__(self, path: str, number: int) -> None:
        super().__init__(daemon=True)
        self._path, self._number, self._stop_asking = path, number, threading.Event()
        self.asked, self.slowest, self.wrong = 0, 0.0, 0

    def run(self) -> None:
        chance = random.Random()  # noqa: S311
        with contextlib.closing(SocketmapClient(self._path)) as client:
            while not self._stop_asking.is_set():
                number = chance.randrange(self._number + self._number // 10)
                began = time.monotonic()
                answer = client.ask(f"alias {address(number)}")
                self.slowest = max(self.slowest, time.monotonic() - began)
                self.asked += 1
                self.wrong += not answer.startswith(("OK ", "NOTFOUND"))

    def stop(self) -> None:
        self._stop_asking.set()
        self.join()


def address(number: int) -> str:
    return f"alias.{number:07d}@d{number % 2 + 1}.test"


def write_file(path: Path, number: int, step: int, every: int) -> Path:
    """So many aliases; one of every so many leads to another user than in step 0."""
    with open(path, "w", encoding="ascii") as file:
        for each in range(number):
            user = each // 3 + (step if each % every == 0 else 0)
            file.write(f"{address(each)},user{user:06d}\n")
    return path


def measure(daemon: Daemon, what: str, number: int, *arguments: str) -> None:
    clients = [Client(daemon.config["sockets"]["socketmap_socket"], number) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    began = time.monotonic()
    command = [sys.executable, str(ROOT / "mailcloakctl.py"), "--db", str(daemon.database), "aliases", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - began
    for client in clients:
        client.stop()
    asked, wrong = (sum(getattr(client, name) for client in clients) for name in ("asked", "wrong"))
    slowest = max(client.slowest for client in clients)
    print(
        f"{what:<42} {seconds:6.1f} s  {usage.ru_maxrss / 1024:4.0f} MiB  slowest of {asked} answers {slowest * 1000:6.1f} ms,"
        f" {wrong} not right{'' if os.waitstatus_to_exitcode(status) == 0 else '  FAILED: ' + said}",
        flush=True,
    )


def main() -> int:
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory(prefix="mc") as name:
        directory = Path(name)
        daemon = Daemon(directory, config_in(directory, static_users={"alice": "alice@d1.test"}), level="error")
        daemon.config["daemon"]["log_level"] = "info"
        daemon.start()
        try:
            steps = (("one in 100 changed", 1, 100), ("one in 10 changed", 2, 10), ("all changed", 3, 1))
            first = write_file(directory / "0.csv", number, 0, 1)
            measure(daemon, f"import of {number:,}", number, "import", str(first))
            measure(daemon, "sync without a difference", number, "sync", str(first))
            for what, step, every in steps:
                path = write_file(directory / f"{step}.csv", number, step, every)
                measure(daemon, f"sync, {what}", number, "sync", str(path), "--max-change", "100%")
            measure(daemon, "export", number, "export", str(directory / "out.csv"))
            measure(daemon, "sync, all gone", number, "sync", os.devnull, "--format", "csv", "--max-change", "100%")
        finally:
            daemon.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
