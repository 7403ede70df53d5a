"""Mail hosts that share aliases and apps through the real Litestream, run by the commands of examples/litestream.

Only paths, the storage (a folder, or a stand-in for S3) and the intervals differ from the examples.
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
import urllib.parse
import urllib.request
from pathlib import Path

from conftest import REAL_SERVERS, ROOT, USERS, Daemon, _find_program, config_in, run_ctl, running, wait_until
from real.dovecot import PrivateDovecot
from real.postfix import PrivatePostfix, free_port

EXAMPLES = ROOT / "examples" / "litestream"
WRITER, FOLLOWER = ("publish", "replicate"), ("follow", "mirror")  # the services of each role
INTERVAL = "200ms"


def command_of(service, kind="ExecStart"):
    """What the unit of a service runs, as words."""
    (line,) = re.findall(rf"^{kind}=(.*)$", (EXAMPLES / f"mailcloak-{service}.service").read_text(), re.MULTILINE)
    return shlex.split(line)


class Folder:
    """A folder as the storage."""

    def environment(self, _):
        """The keys of a role, for Litestream."""
        return {}

    def start(self):
        self.path = Path(tempfile.mkdtemp(prefix="mr", dir="/tmp"))
        return self

    def replaced(self, leader):
        """What stands in litestream.yml in place of the lines of the sample."""
        return {"s3://mail-aliases.example.org/mx1": f"file://{self.path}/{leader}", "      region: eu-central-1\n": ""}

    def close(self):
        shutil.rmtree(self.path, ignore_errors=True)


class S3:
    """The stand-in moto for S3, which keeps all in memory."""

    def __init__(self):
        self.port, self.process = free_port(), None

    def environment(self, _):
        """The keys of a role, for Litestream: any will do."""
        return {"LITESTREAM_ACCESS_KEY_ID": "key", "LITESTREAM_SECRET_ACCESS_KEY": "secret"}

    def start(self):
        """Start it, with an empty bucket."""
        command = [REAL_SERVERS["moto"][0], "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        wait_until(self._make_bucket, 60, what="moto")
        return self

    def _make_bucket(self):
        with contextlib.suppress(OSError):
            return self._ask("/aliases", "s3", method="PUT") is not None
        return False

    def _ask(self, path, service, method="POST", data=None, kind="application/x-www-form-urlencoded"):
        key = f"AWS4-HMAC-SHA256 Credential=key/20270101/us-east-1/{service}/aws4_request"
        headers = {"Authorization": key, "Content-Type": kind}
        request = urllib.request.Request(f"{self.url}{path}", data=data, headers=headers, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as answer:
            return answer.read().decode()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def replaced(self, leader):
        bucket = f"s3://aliases/{leader}\n      endpoint: {self.url}"
        return {"s3://mail-aliases.example.org/mx1": bucket, "region: eu-central-1": "region: us-east-1"}

    def close(self):
        self.process.kill()
        self.process.wait()


class S3WithPolicies(S3):
    """The same where a key may do what the policy of its role in examples/litestream allows, and nothing else."""

    def start(self):
        super().start()
        self.keys = {role: self._make_key(role) for role in ("writer", "follower")}
        self._ask("/moto-api/reset-auth", "s3", data=b"0", kind="text/plain")  # from now on
        return self

    def _make_key(self, role):
        policy = (EXAMPLES / f"s3-{role}.json").read_text().replace("mail-aliases.example.org", "aliases")
        self._ask_iam("CreateUser", UserName=role)
        self._ask_iam("PutUserPolicy", UserName=role, PolicyName=role, PolicyDocument=policy)
        answer = self._ask_iam("CreateAccessKey", UserName=role)
        return [re.search(f"<{name}>(.*?)</{name}>", answer)[1] for name in ("AccessKeyId", "SecretAccessKey")]

    def _ask_iam(self, action, **parameters):
        return self._ask(
            "/", "iam", data=urllib.parse.urlencode({"Action": action, "Version": "2010-05-08", **parameters}).encode()
        )

    def environment(self, role):
        """The keys of a role, for Litestream."""
        return dict(zip(("LITESTREAM_ACCESS_KEY_ID", "LITESTREAM_SECRET_ACCESS_KEY"), self.keys[role]))


class ReplicatedHost:
    """One mail host in a directory of its own; leader is the name of the host that writes to the storage."""

    def __init__(self, name, storage, leader, interval=INTERVAL):
        self.name, self.interval = name, interval
        self.directory = Path(tempfile.mkdtemp(prefix="mr", dir="/tmp"))
        self.directory.chmod(0o755)
        self.database, self.shared = self.directory / "state.db", self.directory / "shared" / "shared.db"
        self.shared.parent.mkdir()
        self.storage = storage
        self.set_leader(leader)
        self.daemon = Daemon(self.directory, config_in(self.directory, static_users=USERS))
        self.postfix = self.dovecot = None
        self.role = "writer" if name == leader else "follower"  # whose keys it has
        self.processes = {}
        self.wrapper = []  # before each command

    def set_leader(self, leader):
        """What litestream.yml says."""
        text = (EXAMPLES / "litestream.yml").read_text()
        replaced = {
            **self.storage.replaced(leader),
            "/var/lib/mailcloak-shared": str(self.shared.parent),
            "interval: 1s": f"interval: {self.interval}",
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
            "1s": [self.interval],
        }
        return [each for word in command_of(service, kind) for each in replaced.get(word, [word])]

    def start(self, *services):
        """Start services as their units do."""
        environment = {name: value for name, value in os.environ.items() if name != "AWS_CA_BUNDLE"}  # Litestream ends with it
        for service in services:
            if service == "follow":
                subprocess.run(self.words(service, "ExecStartPre"), check=True, cwd=self.shared.parent)
            with open(self.directory / f"{service}.log", "ab") as log:
                command = [each.replace("SERVICE", service) for each in self.wrapper] + self.words(service)
                self.processes[service] = subprocess.Popen(
                    command,
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                    cwd=self.shared.parent,
                    env={**environment, **self.storage.environment(self.role)},
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

    def start_mail(self):
        """Postfix and Dovecot on the sample files, and the daemon again, where Postfix looks for it."""
        self.daemon.close()
        self.postfix = PrivatePostfix(settings={"mynetworks": "127.0.0.2/32"})
        private = self.postfix.private
        sockets = {
            "policy_socket": str(private / "mailcloak"),
            "socketmap_socket": str(private / "mailcloak-socketmap"),
            "socket_owner_user": "postfix",
        }
        self.daemon = Daemon(self.directory, config_in(self.directory, static_users=USERS, sockets=sockets)).start()
        self.dovecot = PrivateDovecot(private, "http://127.0.0.1:9/realms/mail", self.database).start()
        self.postfix.start()

    def close(self):
        for server in (self.postfix, self.dovecot, self.daemon):
            if server:
                server.close()
        self.end(*self.processes, with_signal=signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)

    # ---- looking at it

    def mailbox(self, username):
        """The messages that Dovecot has stored for a user."""
        return [path.read_text() for path in self.dovecot.mail.glob(f"{username}/Maildir/new/*")]

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

    def await_copy(self):
        """Until Litestream has put the first copy of this host into the storage."""
        wait_until(lambda: "snapshot complete" in self.log("replicate"), 30, what="the first copy in the storage")

    def await_rows_of(self, other, seconds=30):
        wait_until(lambda: self.has_rows_of(other), seconds, what=f"rows of {other.name} on {self.name}")


@contextlib.contextmanager
def mail_hosts(count, storage=None, wrapper=()):
    """(the writer mx1, its followers mx2, mx3 ...), all equal, with their services. wrapper stands before each command of them."""
    with contextlib.ExitStack() as stack:
        storage = stack.enter_context(running(storage or Folder()))
        hosts = [ReplicatedHost(f"mx{number}", storage, "mx1") for number in range(1, count + 2)]
        for host in hosts:
            stack.callback(host.close)
            host.wrapper = list(wrapper)
        writer, *followers = hosts
        writer.ctl("aliases", "add", "info@d1.test", "alice")
        writer.ctl("apps", "add", "printer", "a token of many signs")
        writer.start(*WRITER)
        writer.await_copy()
        for host in followers:
            host.start(*FOLLOWER)
        for host in followers:
            host.await_rows_of(writer)
        yield writer, followers
