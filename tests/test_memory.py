"""What comes and goes leaves nothing in the daemon's memory: counted at rest, after some of it and after more."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT, Daemon, wait_until

NUMBERS = itertools.count()


class CountedDaemon(Daemon):
    """mailcloak.py, or a copy of it, by soak_daemon.py, which says what it holds."""

    program = ROOT / "mailcloak.py"

    def launch(self):
        self.write_config()
        command = [sys.executable, str(ROOT / "tests" / "soak_daemon.py"), str(self.program), "--config", str(self.config_path)]
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0)
        return self

    def threads(self):
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def held(self):
        """(objects, entries) once two looks in a row show the same, with nothing cached and no thread left over."""
        self.reload()
        ask_somebody(self)  # so that the only worker has its connection
        assert self.ask_map("flush *").startswith("OK")
        wait_until(lambda: self.threads() == self.fresh_threads, 20, "end of what was replaced")
        time.sleep(2 * self.config["keycloak"]["timeout_seconds"] + 0.2)  # the service that was replaced stays for this time
        looks = []

        def is_settled():
            self.process.stdin.write(b"?")
            found = json.loads(self.process.stdout.readline())
            looks.append((found["objects"], found["entries"]))
            return looks[-2:] == 2 * looks[-1:]

        wait_until(is_settled, 20, "rest")
        return looks[-1]

    def close(self):
        super().close()
        self.process.stdin.close()
        self.process.stdout.close()


def make_counted(keycloak, short_dir, make_config):
    keycloak.add_user("alice", "alice@d1.test")
    policy = {"negative_cache_ttl_seconds": 1}
    return CountedDaemon(
        short_dir, make_config(keycloak=keycloak.config(timeout_seconds=1, max_requests=1), policy=policy), level="info"
    )


def ask_somebody(daemon):
    number = next(NUMBERS)
    return daemon.ask(
        recipient=f"nobody{number}@d1.test", sender=f"x{number}@d1.test", sasl_username=f"login{number}", sasl_method="PLAIN"
    )


def reload_with_other_settings(daemon, _):
    number = next(NUMBERS)
    daemon.config["keycloak"]["timeout_seconds"] = 1 + number % 2 / 10  # replaces the workers
    daemon.reload()
    daemon.config["keycloak"]["timeout_seconds"] = 1
    daemon.reload()


def connect(daemon, _):
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"
    assert daemon.ask_map("alias nobody@elsewhere.test") == "NOTFOUND "


def ask(daemon, _):
    ask_somebody(daemon)


def go_away(daemon, keycloak):
    already = daemon.log().count("answers again, after")
    keycloak.fault = "status-503"
    for _ in range(4):
        assert ask_somebody(daemon).startswith("451")
    keycloak.fault = None
    wait_until(lambda: daemon.log().count("answers again, after") > already, 20, "end of the outage")


STEPS = {"reload": (reload_with_other_settings, 12), "connection": (connect, 40), "question": (ask, 40), "outage": (go_away, 8)}


def growth(daemon, keycloak, what):
    """How many (objects, entries) more there are after twice as much of it."""
    step, count = STEPS[what]
    wait_until(lambda: connect(daemon, None) is None, what="first answer")
    daemon.wait_for_log("postmaster@", 20)
    daemon.fresh_threads = daemon.threads()
    found = []
    for _ in range(2):
        for _ in range(count):
            step(daemon, keycloak)
        found.append(daemon.held())
    return tuple(after - before for before, after in zip(*found))


@pytest.mark.long
@pytest.mark.parametrize("what", STEPS)
def test_what_comes_and_goes_leaves_nothing(keycloak, short_dir, make_config, what):
    daemon = make_counted(keycloak, short_dir, make_config).launch()
    try:
        daemon.wait_for_log("daemon: started", 20)
        assert max(growth(daemon, keycloak, what)) < 6
    finally:
        daemon.close()


LEAKS = {
    "reload": ("        self._retire(old_service, service)\n", "        LEAK.append(bytes(300))\n"),
    "connection": ("        self.tally = Tally()\n", "        LEAK.append(bytes(300))\n"),
    "question": ("            del self._pending[lookup.question]\n", "            LEAK.append(bytes(300))\n"),
    "outage": ("        if ends:\n", "            LEAK.append(bytes(300))\n"),
}


@pytest.mark.long
@pytest.mark.parametrize("what", STEPS)
def test_some_bytes_left_behind_are_found(keycloak, short_dir, make_config, tmp_path, what):
    text = (ROOT / "mailcloak.py").read_text(encoding="utf-8")
    place, leak = LEAKS[what]
    assert text.count(place) == 1
    text = text.replace(place, place + leak).replace("\nclass MailcloakError", "\nLEAK = []\n\n\nclass MailcloakError")
    daemon = make_counted(keycloak, short_dir, make_config)
    daemon.program = tmp_path / "mailcloak.py"
    daemon.program.write_text(text, encoding="utf-8")
    daemon.launch()
    try:
        daemon.wait_for_log("daemon: started", 20)
        assert max(growth(daemon, keycloak, what)) >= 6
    finally:
        daemon.close()


def test_what_has_survived_a_pass_of_the_collector_is_left_out_of_the_next(make_daemon):
    daemon = make_daemon(static_users={"alice": "alice@d1.test"})
    place = daemon._command.index("-c") + 1
    say = """
import gc, threading, time
def count():
    for least in (10_000, 90_000):  # those of the start, then of what comes later
        while gc.get_freeze_count() < least:
            time.sleep(0.1)
        print("frozen", gc.get_freeze_count(), flush=True)
        kept = [[] for _ in range(100_000)]
threading.Thread(target=count, daemon=True).start()
"""
    daemon._command[place] = f"{say}\n{daemon._command[place]}"
    daemon.start()
    wait_until(lambda: daemon.log().count("frozen ") == 2, 20, "objects that are frozen")
    assert daemon.stop() == 0


@pytest.mark.parametrize("what", ["found", "nobody", "away", "in the grace", "database"])
def test_no_answer_leaves_a_cycle_of_objects(short_dir, what):
    """The collector would not find all of them, since it leaves out what has survived a pass."""
    command = [sys.executable, str(ROOT / "tests" / "count_garbage.py"), str(short_dir), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    garbage = json.loads(done.stdout)
    assert sum(garbage.values()) < 25, garbage  # a probe of Keycloak may leave some
