"""What "make demo" shows: each answer beside where it came from."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

from conftest import ROOT, run_ctl, wait_until

ROWS = {
    "mail for a user, ": "directory: a user's primary e-mail",
    "mail for an alias, ": "SQLite: an enabled alias",
    "mail for an unknown user, ": "neither SQLite nor the directory",
    "alice sends as her alias ": "SQLite: the alias belongs to the user",
    "a client without a login ": "our own domain, and no login",
    "where does bob@demo.test lead?": "SQLite: no such alias",
}


def test_each_answer_stands_beside_its_own_source():
    """A thread writes the log from which it is read, some time after the answer."""
    result = subprocess.run([sys.executable, ROOT / "demo/demo.py"], capture_output=True, text=True, timeout=100, check=True)
    for question, source in ROWS.items():
        (row,) = [line for line in result.stdout.splitlines() if line.startswith(question)]
        assert row.endswith(f"  {source}")
    assert "13 of 13 answers are as they should be" in result.stdout


@contextlib.contextmanager
def left_running(directory):
    """What "make run" leaves running; yields its folder. What it printed is in the file said."""
    environment = {**os.environ, "TMPDIR": str(directory)}
    with open(directory / "said", "w") as said:
        command = [sys.executable, ROOT / "demo/demo.py", "run"]
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: "daemon: started" in (directory / "said").read_text() or process.poll() is not None, what="start")
        yield directory / f"mailcloak-demo-{os.getuid()}", process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


def test_each_run_begins_afresh_and_only_one_runs(short_dir):
    with left_running(short_dir) as (folder, _):
        assert "not looked up" not in (short_dir / "said").read_text()
        run_ctl("--db", folder / "state.db", "aliases", "add", "info@demo.test", "bob", "--replace")
        first = (folder / "config.yaml").stat().st_ino
        with left_running(short_dir) as (_, second):
            assert second.wait(10) == 1
            assert f"a daemon runs in {folder} already" in (short_dir / "said").read_text()
        assert (folder / "config.yaml").stat().st_ino == first
    with left_running(short_dir) as (folder, process):
        assert process.poll() is None
        assert "aliases: info@demo.test leads to alice\n" in (short_dir / "said").read_text()
        assert run_ctl("--db", folder / "state.db", "aliases", "show", "info@demo.test").stdout.count("alice") == 2
