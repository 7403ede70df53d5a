#!/usr/bin/env python3
"""mailcloak's memory of users against the model, for as long as wanted: python tests/model.py [SECONDS] (600).

Each example is a new order of events. A failing one is made smaller, printed, and the end: exit code 1. SIGINT ends the run cleanly: 130.
"""

from __future__ import annotations

import logging
import random
import sys
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from hypothesis import HealthCheck, seed, settings  # noqa: E402
from hypothesis.stateful import run_state_machine_as_test  # noqa: E402
from user_model import UserModel  # noqa: E402

ROUND = settings(
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)


def run(seconds: float) -> int:
    end, done = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        number = random.getrandbits(64)
        machine = seed(number)(type("UserModel", (UserModel,), {}))
        try:
            run_state_machine_as_test(machine, settings=ROUND)
        except Exception as exc:
            print(f"\nseed {number}, after {done} examples that were right")
            traceback.print_exception(type(exc), exc, exc.__traceback__, limit=1, file=sys.stdout)
            return 1
        done += ROUND.max_examples
        if sys.stderr.isatty():
            print(f"\r{done} examples, {max(0, end - time.monotonic()):.0f} s left ", end="", file=sys.stderr, flush=True)
    print(f"{done} examples of {ROUND.stateful_step_count} steps, none wrong")
    return 0


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    try:
        sys.exit(run(float(sys.argv[1]) if len(sys.argv) > 1 else 600))
    except KeyboardInterrupt:
        sys.exit(130)
