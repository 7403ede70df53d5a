"""On which processors the daemon's threads run: one while it is busy, all while it is calm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, wait_until
from test_wire import FULL_REQUEST

import mailcloak

HERE = os.sched_getaffinity(0)

# Looks at given times of the clock and of the processor; prints for each on how many processors each thread may run.
LOOK = """
import json, os, sys, threading, time
sys.path.insert(0, sys.argv[1])
import mailcloak
exec(sys.argv[3])
processors = mailcloak.Processors()
now, used = time.monotonic(), time.process_time()
ended = threading.Event()
def begin_thread():
    threading.Thread(target=ended.wait, daemon=True).start()
begin_thread()
for seconds, processor_seconds in json.loads(sys.argv[2]):
    processors.look(now + seconds, used + processor_seconds)
    begin_thread()
    print(json.dumps(sorted({len(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")})))
"""


def look(times, fault=""):
    command = [sys.executable, "-c", LOOK, str(ROOT), json.dumps(times), fault]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


ONE, ALL = [1], [len(HERE)]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([(0.3, 0.1), (0.6, 0.2)], [ALL, ALL]),
        ([(0.3, 0.25)], [ONE]),
        ([(0.1, 0.1)], [ALL]),  # too early to say
        ([(0.3, 0.25), (1.3, 0.55), (3.3, 1.15)], [ONE, ONE, ONE]),  # less than made it busy, more than calm
        ([(0.3, 0.25), (1.3, 0.25), (2.2, 0.25), (2.4, 0.25)], [ONE, ONE, ONE, ALL]),
        ([(0.3, 0.25), (2.4, 0.25), (2.7, 0.5), (4.8, 0.5)], [ONE, ALL, ONE, ALL]),
    ],
    ids=["calm", "busy", "at once", "less busy", "calm again", "to and fro"],
)
def test_threads_of_a_busy_daemon_run_on_one_processor_and_those_of_a_calm_one_on_all(times, expected):
    assert look(times) == expected


def test_it_is_the_processors_that_the_administrator_allows():
    fault = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    assert look([(0.3, 0.25), (2.4, 0.25)], fault) == [ONE, ONE]


MOVED = """
processors = mailcloak.Processors()
now = time.monotonic()
def move(where):
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), where)
start = os.sched_getaffinity(0)
first, last = {min(start)}, {max(start)}
"""


def run(script):
    command = [
        sys.executable,
        "-c",
        f"import os, sys, time\nsys.path.insert(0, sys.argv[1])\nimport mailcloak\n{MOVED}{script}",
        str(ROOT),
    ]
    subprocess.run(command, check=True, timeout=30)


def test_threads_that_an_administrator_moves_while_the_daemon_is_calm_stay_there():
    run("""
move(first)
processors.look(now + 0.3, 100)
processors.look(now + 2.4, 100)
assert os.sched_getaffinity(0) == first
move(start)
processors.look(now + 3, 100)
processors.look(now + 6, 200)
processors.look(now + 9, 200)
assert os.sched_getaffinity(0) == start
""")


def test_threads_that_an_administrator_moves_while_the_daemon_is_busy_stay_there():
    run("""
processors.look(now + 0.3, 100)
other = last if os.sched_getaffinity(0) == first else first
move(other)
processors.look(now + 0.6, 200)
assert os.sched_getaffinity(0) == other
processors.look(now + 3, 200)
assert os.sched_getaffinity(0) == other
""")


def test_move_that_fails_is_tried_again():
    run("""
processors.look(now + 0.3, 100)
real, os.listdir = os.listdir, None
def refuse(path): raise OSError(24, "Too many open files")
os.listdir = refuse
processors.look(now + 3, 100)
assert len(os.sched_getaffinity(0)) == 1
os.listdir = real
processors.look(now + 3.3, 100)
assert os.sched_getaffinity(0) == start
""")


@pytest.mark.parametrize("name", ["sched_setaffinity", "listdir"])
def test_system_that_does_not_allow_it_is_no_fault(name):
    fault = f"real = os.{name}\ndef refuse(*_): os.{name} = real; raise PermissionError\nos.{name} = refuse"
    assert look([(0.3, 0.25), (2.4, 0.25), (2.7, 0.5)], fault) == [ALL, ALL, ONE]  # and the next time it may be allowed


@pytest.mark.alone
def test_daemon_that_is_asked_without_a_pause_keeps_to_one_processor_until_it_is_calm(static_daemon):
    tasks = Path(f"/proc/{static_daemon.process.pid}/task")

    def processors():
        return {len(os.sched_getaffinity(int(task.name))) for task in tasks.iterdir()}

    assert processors() == set(ALL)
    ended, answered = threading.Event(), []

    def ask():
        client = static_daemon.policy()
        while not ended.is_set():
            client.send_bytes(FULL_REQUEST * 100)
            answered.extend(client.receive() for _ in range(100))

    clients = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        wait_until(lambda: processors() == {1}, what="one processor", seconds=30)
    finally:
        ended.set()
        for client in clients:
            client.join(30)
    assert set(answered) == {"DUNNO"}
    wait_until(lambda: processors() == set(ALL), what="all processors")


def test_daemon_looks_more_often_than_it_has_to():
    assert mailcloak.POLL_SECONDS <= mailcloak.LOAD_SECONDS < mailcloak.CALM_SECONDS
