"""The soak of `make soak`, for a minute; and that it ends when it is told to."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from conftest import ROOT, wait_until

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

COMMAND = [sys.executable, str(ROOT / "tests" / "soak.py"), "--json"]


def test_minute_of_mixed_load_gives_no_wrong_answer_and_leaves_nothing_behind():
    result = subprocess.run([*COMMAND, "60"], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert (figures["wrong"], figures["problems"]) == (0, [])
    assert figures["answers"] > 5000
    assert figures["answers_with_one_right"] > 0.8  # else nearly anything would have been right
    assert figures["commits"] > 100
    assert figures["runs_of_mailcloakctl"] >= 5
    assert figures["reloads"] >= 5
    assert len(figures["outages"]) >= 3
    assert figures["deferred"]["Keycloak away"] > 10
    assert figures["keycloak_slow_seconds"] < 20  # a machine too busy for the soak to show anything


def processes_with(text):
    """The commands of all processes whose environment holds this."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if text.encode() in entry.read_bytes():
                found.append(entry.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            pass  # it has ended, or it is somebody else's
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
def test_soak_that_is_interrupted_takes_everything_with_it(number):
    mark = f"SOAK_OF_THIS_TEST={uuid.uuid4()}"
    environment = {**os.environ, **dict([mark.split("=")])}
    with subprocess.Popen([*COMMAND, "600"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as soak:
        wait_until(lambda: any("mailcloakctl.py" in command for command in processes_with(mark)), 60, "a soak under way")
        commands = processes_with(mark)
        assert len(commands) >= 5  # itself, two that ask, Keycloak, the daemon
        directory = re.search(r"--config (/tmp/mc\w+)/config.yaml", "".join(commands)).group(1)
        started = time.monotonic()
        soak.send_signal(number)
        output, _ = soak.communicate(timeout=120)
    assert soak.returncode == (130 if number == signal.SIGINT else -number)
    wait_until(lambda: not processes_with(mark), 30, "end of its processes")
    assert time.monotonic() - started < 60
    if number == signal.SIGKILL:
        shutil.rmtree(directory)  # all that nobody is left to remove
    else:
        assert not os.path.exists(directory)
        assert json.loads(output)["problems"] == []


def test_soak_that_finds_a_leak_fails_and_keeps_the_log(tmp_path):
    text = (ROOT / "mailcloak.py").read_text(encoding="utf-8")
    for place, leak in (
        ("        self.tally = Tally()\n", "        self.tally = Tally()\n        LEAK.append(bytes(300))\n"),
        ("\nclass MailcloakError", "\nLEAK = []\n\n\nclass MailcloakError"),
    ):
        assert text.count(place) == 1
        text = text.replace(place, leak)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("mailcloak?*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "mailcloak.py").write_text(text, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "tests" / "soak.py"), "24"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert result.returncode == 1, result.stderr
    log_path = Path(re.fullmatch(r"soak: the daemon's log is (/tmp/mailcloak-soak-\w+\.log)", result.stderr.splitlines()[-1])[1])
    log = log_path.read_text(encoding="utf-8", errors="replace")
    log_path.unlink()
    assert "memory: entries after 8 s" in result.stderr
    assert log.count("daemon: started") == 1
    assert log.count("policy: reject") > 100
