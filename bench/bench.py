#!/usr/bin/env python3
"""Measure mailcloak, and write the results to bench/RESULTS.md, results.json and results.svg.

bench.py all        the five below, one after another; make bench does this
bench.py table      requests per second, compared with a bare server (bench/bare.py): while nothing changes, under commits, in WAL
                    mode, and for questions that are new
bench.py lock       what one more system call costs that bare server, if it releases Python's global lock and if it keeps it
bench.py growth     many aliases, many users, many connections: rate, p99, memory, pauses of Python's collector, start-up
bench.py postfix    messages per second through a private Postfix, with mailcloak and with bare servers; needs root and postfix
bench.py cold       users that mailcloak does not know yet
bench.py stall      the longest time without any answer, in 200 short runs (--times) with 100,000 users and 500 connections
bench.py profile    where the time goes; needs py-spy or perf

Each of the five writes its own section of RESULTS.md and does not change the others; it compares the section with that of the run before,
and names each ratio that got worse by more than 15 %. It also exits 0 if a goal is missed; the section says so beside the figure. stall
writes only to the terminal, profile also to build/bench. The questions come from build/bench/load, built from load.c: a compiled program,
so that it does not limit the figures.

The modules: measure.py (questions, servers, load, commits), regimes.py (table), lock.py, growth.py (and stall), through_postfix.py, cold.py,
profiles.py, results.py (the three files), plot.py (results.svg). Processes of their own: load.c, echo.c, bare.py, stand_in.py, watched.py.
parts.py is by itself.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from cold import cold
from growth import growth, stall
from lock import lock
from measure import BENCH, BUILD, say
from profiles import profile
from regimes import table
from results import SECTIONS, Section, store
from through_postfix import postfix

PARTS = {"table": table, "lock": lock, "growth": growth, "postfix": postfix, "cold": cold}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["all", *PARTS, "stall", "profile"])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="short runs and small sizes, to try this program itself; writes only --into a directory",
    )
    parser.add_argument("--into", type=Path, metavar="DIRECTORY", help="where the three files are, in place of bench/")
    parser.add_argument("--times", type=int, default=200, help="how often stall measures (default: 200)")
    options = parser.parse_args()
    for signal_number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, lambda number, _: sys.exit(128 + number))
    for name in ("load", "echo"):
        if not (BUILD / name).exists():
            parser.error(f"build/bench/{name} is missing: make bench builds it")
    started = time.monotonic()
    if options.part == "stall":
        stall(options.quick, options.times)
    elif options.part == "profile":
        profile(options.quick)
    else:
        took = [run_part(name, options) for name in (SECTIONS if options.part == "all" else [options.part])]
        say("; ".join(took))
    say(f"done in {time.monotonic() - started:.0f} s")
    return 0


def run_part(name: str, options: argparse.Namespace) -> str:
    """Measure one section and write it; how long that took, in words."""
    started, load_average = time.monotonic(), os.getloadavg()[0]
    section: Section = PARTS[name](options.quick)
    seconds = time.monotonic() - started
    if options.quick:
        print(section.text)
    if section.text and (options.into or not options.quick):
        command = "make bench" if options.part == "all" else f"bench/bench.py {name}"
        command += " --quick" if options.quick else ""
        store(options.into or BENCH, name, section, command=command, seconds=seconds, load_average=load_average)
    return f"{name}: {seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
