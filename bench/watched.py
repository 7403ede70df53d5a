#!/usr/bin/env python3
"""mailcloak, with a line in a file for each pass of Python's collector that takes a millisecond or longer.

watched.py FILE ARGUMENTS_OF_MAILCLOAK

A line: when it ended (seconds of time.monotonic(), which all processes share), generation, milliseconds by the clock, and milliseconds of
processor time. On busy processors the first is longer: the thread of the collector must wait for one of them.
"""

import gc
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mailcloak


def watch(path):
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    started = processor = 0.0

    def note(phase, info):
        nonlocal started, processor
        now = time.monotonic()
        if phase == "start":
            started, processor = now, time.thread_time()
        elif now - started >= 0.001:
            times = 1000 * (now - started), 1000 * (time.thread_time() - processor)
            os.write(file, b"%.6f %d %.3f %.3f\n" % (now, info["generation"], *times))

    gc.callbacks.append(note)


if __name__ == "__main__":
    watch(sys.argv[1])
    sys.exit(mailcloak.main(sys.argv[2:]))
