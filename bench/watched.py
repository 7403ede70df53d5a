#!/usr/bin/env python3
"""mailcloak, with a line in a file for each pass of Python's collector that takes a millisecond or longer.

watched.py FILE ARGUMENTS_OF_MAILCLOAK

A line: when it was written, up to 0.1 s after the pass (seconds of time.monotonic(), which all processes share), generation, and milliseconds.
The collector itself says them (gc.DEBUG_STATS): a function of gc.callbacks would give up Python's lock in the middle of each pass.
"""

import gc
import io
import os
import re
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mailcloak

PASS = re.compile(r"gc: collecting generation (\d)\.\.\.\n(?:gc: objects.*\n)*gc: done.* ([0-9.]+)s elapsed")


def watch(path):
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    sys.stderr = io.StringIO()  # the daemon's log is written past it

    def note():
        rest = ""
        while True:
            time.sleep(0.1)
            said, sys.stderr = sys.stderr, io.StringIO()
            text, passes, end = rest + said.getvalue(), [], 0
            for found in PASS.finditer(text):
                end = found.end()
                if float(found[2]) >= 0.001:
                    passes.append(f"{time.monotonic():.6f} {found[1]} {1000 * float(found[2]):.3f}\n")
            rest = text[end:]
            os.write(file, "".join(passes).encode())

    gc.set_debug(gc.DEBUG_STATS)
    threading.Thread(target=note, name="watch", daemon=True).start()


if __name__ == "__main__":
    watch(sys.argv[1])
    sys.exit(mailcloak.main(sys.argv[2:]))
