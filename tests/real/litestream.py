"""Mail hosts that share aliases and apps through the real Litestream, run by the commands of examples/litestream.

Only paths, the storage (a folder) and the intervals differ from the examples.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import ROOT, USERS, Daemon, _find_program, config_in, run_ctl, wait_until

EXAMPLES = ROOT / "examples" / "litestream"
WRITER, FOLLOWER = ("publish", "replicate"), ("follow", "mirror")  # the services of each role
INTERVAL = "200ms"


def command_of(service, kind="ExecStart"):
    """What the unit of a service runs, as words."""
    (line,) = re.findall(rf"^{kind}=(.*)$", (EXAMPLES / f"mailcloak-{service}.service").read_text(), re.MULTILINE)
    return shlex.split(line)


class ReplicatedHost:
    """One mail host in a directory of its own; storage is the folder for all, leader the name of the host that writes there."""

    def __init__(self, name, storage, leader):
        self.name = name
        self.directory = Path(tempfile.mkdtemp(prefix="mr", dir="/tmp"))
        self.directory.chmod(0o755)
        self.database, self.shared = self.directory / "state.db", self.directory / "shared" / "shared.db"
        self.shared.parent.mkdir()
        self.storage = storage
        self.set_leader(leader)
        self.daemon = Daemon(self.directory, config_in(self.directory, static_users=USERS))
        self.processes = {}

    def set_leader(self, leader):
        """What litestream.yml says."""
        text = (EXAMPLES / "litestream.yml").read_text()
        replaced = {
            "s3://mail-aliases.example.org/mx1": f"file://{self.storage}/{leader}",
            "/var/lib/mailcloak-shared": str(self.shared.parent),
            "interval: 1s": f"interval: {INTERVAL}",
            "      region: eu-central-1\n": "",
        }
        for old, new in replaced.items():
            assert old in text, old
            text = text.replace(old, new)
        (self.directory / "litestream.yml").write_text(text)

    def words(self, service, kind="ExecStart"):
        """The command of a service on this host."""
        replaced = {
            "/usr/local/sbin/mailcloakctl": [sys.executable, str(ROOT / "mailcloakctl.py")],
            "/usr/bin/litestream": [_find_program("litestream")],
            "/etc/mailcloak/litestream.yml": [str(self.directory / "litestream.yml")],
            "/var/lib/mailcloak-shared/shared.db": [str(self.shared)],
            "/var/lib/mailcloak/state.db": [str(self.database)],
            "1s": [INTERVAL],
        }
        return [each for word in command_of(service, kind) for each in replaced.get(word, [word])]

    def start(self, *services):
        """Start services as their units do."""
        for service in services:
            if service == "follow":
                subprocess.run(self.words(service, "ExecStartPre"), check=True, cwd=self.shared.parent)
            with open(self.directory / f"{service}.log", "ab") as log:
                command = self.words(service)
                self.processes[service] = subprocess.Popen(
                    command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.shared.parent
                )
        return self

    def end(self, *services, with_signal=signal.SIGTERM):
        """End services, and give their exit codes."""
        codes = []
        for service in services:
            process = self.processes.pop(service)
            process.send_signal(signal.SIGCONT)
            process.send_signal(with_signal)
            codes.append(process.wait(20))
        return codes

    def close(self):
        self.daemon.close()
        self.end(*self.processes, with_signal=signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)

    # ---- looking at it

    def log(self, service):
        return (self.directory / f"{service}.log").read_text(errors="replace")

    def ctl(self, *arguments, **options):
        return run_ctl("--db", self.database, *arguments, **options)

    def rows(self, select="SELECT * FROM aliases ORDER BY alias_email"):
        with contextlib.closing(sqlite3.connect(self.database, timeout=20)) as database:
            return database.execute(select).fetchall()

    def has_rows_of(self, other):
        """Are all its rows those of the other host?"""
        tables = ("aliases", "apps", "app_from")
        return os.path.exists(self.database) and all(
            self.rows(f"SELECT * FROM {table} ORDER BY 1, 2") == other.rows(f"SELECT * FROM {table} ORDER BY 1, 2")
            for table in tables
        )

    def await_rows_of(self, other, seconds=30):
        wait_until(lambda: self.has_rows_of(other), seconds, what=f"rows of {other.name} on {self.name}")


@contextlib.contextmanager
def mail_hosts(count):
    """(the writer mx1, its followers mx2, mx3 ...), all equal, with their services."""
    with contextlib.ExitStack() as stack:
        storage = stack.enter_context(tempfile.TemporaryDirectory(prefix="mr", dir="/tmp"))
        hosts = [ReplicatedHost(f"mx{number}", storage, "mx1") for number in range(1, count + 2)]
        for host in hosts:
            stack.callback(host.close)
        writer, *followers = hosts
        writer.ctl("aliases", "add", "info@d1.test", "alice")
        writer.ctl("apps", "add", "printer", "a token of many signs")
        writer.start(*WRITER)
        wait_until(lambda: any(Path(storage, "mx1").rglob("*.ltx")), what="the first copy in the storage")
        for host in followers:
            host.start(*FOLLOWER)
        for host in followers:
            host.await_rows_of(writer)
        yield writer, followers
