"""profile: where the time of the daemon goes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from measure import BUILD, ask, end, say
from regimes import ASKED, REGIMES, prepared


def profile(quick: bool) -> None:
    """Where the time goes in the daemon, for each question of the table with 10 connections; on the terminal and in build/bench."""
    seconds = 2 if quick else 8
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    commands = {
        "py-spy": ["record", "--gil", "--format", "raw", "--rate", "500", "--duration", str(seconds), "--output"],
        "perf": ["record", "-q", "-F", "999", "-e", "cpu-clock", "-o"],
        "strace": ["-f", "-c", "-o"],
    }
    with prepared(REGIMES[0], ASKED, 1) as (_, asked):
        for question in asked:
            for tool, arguments in commands.items():
                if not shutil.which(tool, path=path):
                    say(f"profile: LEFT OUT: {tool} is not installed")
                    continue
                output = BUILD / f"profile-{question.file(0).name}-{tool}"
                command = [shutil.which(tool, path=path), *arguments, str(output), "-p", str(question.server.pid)]
                command += ["--", "sleep", str(seconds)] if tool == "perf" else []
                command = ["timeout", "-s", "INT", str(seconds), *command] if tool == "strace" else command
                # a second later, when all connections are there: perf does not see threads that begin after it
                watcher = subprocess.Popen(
                    ["sh", "-c", 'sleep 1; exec "$@"', "sh", *command],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                try:
                    figures = ask(question.server, 10, seconds + 2, question.file(0))
                    watcher.wait(60)
                finally:
                    end(watcher)
                print(f"\n==== {question.title}, {tool} (10 connections; while watched {figures.rate:,.0f}/s)", flush=True)
                show_profile(tool, output)


def show_profile(tool: str, output: Path) -> None:
    if tool == "perf":
        for what in ("dso", "dso,symbol"):
            command = ["perf", "report", "-i", str(output), "--stdio", "--no-children", "--percent-limit", "0.7", "--sort", what]
            report = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60).stdout
            print("\n".join(line for line in report.splitlines() if line and not line.startswith("#")), "\n")
    elif tool == "py-spy":
        show_stacks(output)
    else:
        print(output.read_text())


def show_stacks(output: Path) -> None:
    """Of the time in which a thread holds the interpreter's lock, the share of each function itself, and with all it calls."""
    itself: Counter[str] = Counter()
    with_callees: Counter[str] = Counter()
    for line in output.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        functions = [re.sub(r":\d+\)$", ")", frame) for frame in stack.split(";")]
        itself[functions[-1]] += int(count)
        for function in set(functions):
            with_callees[function] += int(count)
    total = max(1, sum(itself.values()))
    print(f"{total} samples\nitself  with callees")
    for function, count in with_callees.most_common(30):
        print(f"{itself[function] / total:6.1%} {count / total:7.1%}  {function}")
