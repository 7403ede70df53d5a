"""A private Postfix, made of the sample settings in examples/postfix, in a directory and on ports of its own.

The system's own Postfix and its configuration are not touched: everything is done with `postfix -c DIRECTORY`. Needs root.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import smtplib
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT, Daemon, wait_until

SAMPLE = ROOT / "examples" / "postfix"
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"

# What makes an instance independent of its host. None of it may be a setting of the sample; __init__ checks that.
TEST_SETTINGS = """\
compatibility_level = 3.6
queue_directory = {directory}/queue
data_directory = {directory}/data
maillog_file = {directory}/mail.log
maillog_file_prefixes = {directory}
multi_instance_name =
import_environment = MAIL_CONFIG
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
myhostname = mx.test
mydestination =
local_recipient_maps =
alias_maps =
alias_database =
smtpd_peername_lookup = no
smtp_dns_support_level = disabled
lmtp_dns_support_level = disabled
smtpd_error_sleep_time = 0
smtpd_soft_error_limit = 1000
smtpd_hard_error_limit = 1000
smtpd_client_connection_count_limit = 0
bounce_queue_lifetime = 0
default_transport = discard:
"""

# Of master.cf everything but the lines of the sample. {chroot} is y or n, as in the packages of Debian and of others.
TEST_SERVICES = """\
cleanup unix n - {chroot} - 0 cleanup
qmgr unix n - n 300 1 qmgr
tlsmgr unix - - {chroot} 1000? 1 tlsmgr
rewrite unix - - {chroot} - - trivial-rewrite
bounce unix - - {chroot} - 0 bounce
defer unix - - {chroot} - 0 bounce
trace unix - - {chroot} - 0 bounce
verify unix - - {chroot} - 1 verify
flush unix n - {chroot} 1000? 0 flush
proxymap unix - - n - - proxymap
smtp unix - - {chroot} - - smtp
lmtp unix - - {chroot} - - lmtp
showq unix n - {chroot} - - showq
error unix - - {chroot} - - error
retry unix - - {chroot} - - error
discard unix - - {chroot} - - discard
local unix - n n - - local
virtual unix - n n - - virtual
anvil unix - - {chroot} - 1 anvil
scache unix - - {chroot} - 1 scache
postlog unix-dgram n - n - 1 postlogd
"""


GIVEN_PORTS: set[int] = set()  # two services of one Postfix on one port would be one


def free_port():
    """A port that nobody listens on.

    It stays free until a server has started on it, which can take seconds: it is below those that the kernel chooses for clients,
    and each of pytest-xdist's workers has a thousand of its own.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 20
    while True:
        port = 12_000 + 1_000 * worker + secrets.randbelow(1_000)
        if port in GIVEN_PORTS:
            continue
        GIVEN_PORTS.add(port)
        with contextlib.closing(socket.socket()) as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


# Refusals as a client reads them, {} being the address.
NO_SUCH_USER = (550, "5.1.1 <{}>: Recipient address rejected: No such user")
FORGED = (553, "5.7.1 <{}>: Sender address rejected: Sending from local domains requires authentication")


class Delivery(NamedTuple):
    """A line of the log that says what became of a recipient; orig_to is "" where nothing was rewritten."""

    recipient: str
    orig_to: str
    relay: str
    status: str


class PrivatePostfix:
    """One instance. domains take the place of the sample's example.org and example.net.

    settings are main.cf parameters of the test, by name; one that is in the sample as well takes the sample's place (so that
    virtual_transport can be discard: or a private LMTP server). services are further lines of master.cf, in which {name} stands for
    self.ports[name] (so that a port can be added: ports=["open"], services="127.0.0.1:{open} inet ..."). Of the sample's own services
    there are port 25, called smtp, the one for sendmail(1), and those of submission and submissions that ports names.
    """

    def __init__(self, domains=("d1.test", "d2.test"), settings=None, services="", ports=(), chroot="y"):
        self.directory = Path(tempfile.mkdtemp(prefix="pf", dir="/tmp"))
        self.directory.chmod(0o755)
        self.config = self.directory / "etc"
        self.queue_directory = self.directory / "queue"
        self.log_path = self.directory / "mail.log"
        self.config.mkdir()
        for name in ("queue", "data"):
            (self.directory / name).mkdir()
        shutil.chown(self.directory / "data", "postfix")
        self.ports = {name: free_port() for name in ("smtp", "sendmail", *ports)}
        self.settings = dict(settings or {})
        self._domains = domains
        self._services = services
        self._chroot = chroot
        self.configure()
        self.run("check")  # makes the directories of the queue, QUEUE/private among them, with their owners

    @property
    def port(self):
        return self.ports["smtp"]

    @property
    def private(self):
        """Where the sockets of mailcloak and of Dovecot go."""
        return self.queue_directory / "private"

    # ---- configuration

    def sample(self, name):
        """A file of examples/postfix with the test's domains."""
        text = (SAMPLE / name).read_text(encoding="utf-8")
        for placeholder, domain in zip(("example.org", "example.net"), self._domains):
            text = text.replace(placeholder, domain)
        return text

    def configure(self, *uncommented, commented=(), chroot=None):
        """Write main.cf and master.cf from the sample, changed as its comments tell an administrator to: uncommented lines lose
        their #, commented ones get one. A running instance wants a restart afterwards."""
        main = self.sample("main.cf")
        for text in uncommented:
            assert re.search(rf"^#   {re.escape(text)}$", main, re.MULTILINE), f"the sample has no commented line {text!r}"
            main = re.sub(rf"^#   {re.escape(text)}$", f"    {text}", main, flags=re.MULTILINE)
        for name in commented:
            assert re.search(rf"^{name} =", main, re.MULTILINE), f"the sample has no line {name} ="
            main = re.sub(rf"^{name} =", f"#{name} =", main, flags=re.MULTILINE)
        base = TEST_SETTINGS.format(directory=self.directory)
        twice = set(re.findall(r"^(\w+) =", base, re.MULTILINE)) & set(re.findall(r"^(\w+) =", main, re.MULTILINE))
        assert not twice, f"the sample's own value would win over the test's: {twice}"
        (self.config / "main.cf").write_text(base + main, encoding="utf-8")
        services = self.sample("master.cf")
        for name in ("smtp", "submission", "submissions"):
            line = rf"127.0.0.1:{self.ports[name]}\1" if name in self.ports else ""
            services, count = re.subn(rf"^{name}( +inet .*\n(?: .*\n)*)", line, services, flags=re.MULTILINE)
            assert count == 1, f"the sample has {count} services {name}"
        assert services.count("127.0.0.1]:10027") == services.count("\n127.0.0.1:10027 ") == 1
        services = re.sub(r"(127\.0\.0\.1\]?):10027", rf"\1:{self.ports['sendmail']}", services)
        services += TEST_SERVICES.format(chroot=chroot or self._chroot) + self._services.format(**self.ports)
        (self.config / "master.cf").write_text(services, encoding="utf-8")
        if chroot:
            self._run("postconf", "-F", f"*/inet/chroot={chroot}")
        if self.settings:
            self.set(**self.settings)
        self._age_files()

    def set(self, **settings):
        """Parameters of main.cf, in place of those that are there."""
        self._run("postconf", "-e", *(f"{name}={value}" for name, value in settings.items()))
        self._age_files()

    def _age_files(self):
        """Every program of Postfix waits a second before it reads a configuration that was written just now."""
        for name in ("main.cf", "master.cf"):
            os.utime(self.config / name, (0, 0))

    def postconf(self, name):
        """The value in force."""
        return self._run("postconf", "-h", name).stdout.strip()

    def complaints(self):
        """What Postfix says against its configuration: unused or doubled parameters, wrong owners."""
        results = [self._run("postconf", "-n"), self._run("postconf", "-M"), self.run("check")]
        return "".join(result.stderr for result in results)

    # ---- running

    def run(self, command):
        return self._run("postfix", command)

    def _run(self, program, *arguments, check=True, **options):
        command = [shutil.which(program, path=PATH) or program, "-c", str(self.config), *arguments]
        result = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
            env={"PATH": PATH},
            **options,
        )
        if check:
            assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}{self.log()}"
        return result

    @property
    def pid(self):
        """The process id of master(8), None when it does not run."""
        try:
            pid = int((self.queue_directory / "pid" / "master.pid").read_text())
            os.kill(pid, 0)
        except (OSError, ValueError):
            return None
        return pid

    def start(self):
        """Start it and wait until each port answers."""
        self.run("start")
        for name, port in self.ports.items():
            wait_until(lambda port=port: self._answers(port), what=f"start of Postfix ({name})")
        return self

    @staticmethod
    def _answers(port):
        with contextlib.suppress(OSError), contextlib.closing(socket.create_connection(("127.0.0.1", port), 5)):
            return True
        return False

    def reload(self):
        """Have master(8) read the configuration again, while connections that are there go on."""
        already = self.log().count("reload -- version")
        self.run("reload")
        wait_until(lambda: self.log().count("reload -- version") > already, what="reload of Postfix")

    def restart(self):
        """Stop and start. After a reload an idle smtpd of before may still take one connection; after this none is left."""
        self.stop()
        self.start()

    def stop(self):
        """postfix stop; where that fails, SIGKILL to the master's own process group, known from its pid file."""
        pid = self.pid
        if pid is None:
            return
        self._run("postfix", "stop", check=False)
        with contextlib.suppress(ProcessLookupError):
            if self.pid == pid:
                os.killpg(pid, signal.SIGKILL)

    def close(self):
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    # ---- what it did

    def log(self):
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def wait_for_log(self, pattern, seconds=10.0):
        """The first match of a regular expression in the log."""
        return wait_until(lambda: re.search(pattern, self.log()), seconds, what=f"line {pattern!r} in mail.log")

    def queue(self):
        """What waits in the queue, as dicts of postqueue -j."""
        return [json.loads(line) for line in self._run("postqueue", "-j").stdout.splitlines()]

    def deliveries(self, queue_id):
        """What became of each recipient of a message; waits until the message has left the queue."""
        self.wait_for_log(rf"qmgr\[\d+\]: {queue_id}: removed")
        pattern = rf"\]: {queue_id}: to=<(.*?)>, (?:orig_to=<(.*?)>, )?relay=(\S+), .*status=(\w+)"
        return [Delivery(*match) for match in re.findall(pattern, self.log())]

    def envelope_sender(self, queue_id):
        """The sender as Postfix rewrote it, and as it would go out."""
        return self.wait_for_log(rf"\]: {queue_id}: from=<(.*)>, size=").group(1)

    def postmap(self, key, table):
        """postmap -q KEY TABLE: exit code, value, and what it says on stderr."""
        result = self._run("postmap", "-q", key, table, check=False)
        return result.returncode, result.stdout.strip(), result.stderr.strip()

    # ---- a client

    @contextlib.contextmanager
    def smtp(self, port="smtp", source="127.0.0.1"):
        """A connection after EHLO; source is the client's own address."""
        with smtplib.SMTP("127.0.0.1", self.ports[port], timeout=30, source_address=(source, 0)) as client:
            client.ehlo("client.test")
            yield client

    def send(self, sender, *recipients, **options):
        """A message to all recipients: its queue id, or the first refusal as an SMTPResponseException.

        The addresses go out byte for byte between < and >, which smtplib's own functions would not do.
        """
        with self.smtp(**options) as client:
            return send(client, sender, *recipients)

    def refusal(self, sender, *recipients, **options):
        """Code and text of the refusal that a message meets; None if it is taken."""
        with self.smtp(**options) as client:
            return refusal(client, sender, *recipients)


def daemon_behind(postfix, user="nobody", group=None, level="debug", **blocks):
    """A daemon, not started yet, whose sockets are where the sample tells this Postfix to look; it keeps its files in Postfix's directory.

    It is to be started as root and becomes user, who owns the directory of the database; group may read there, as Dovecot wants to.
    blocks are of its configuration.
    """
    home = postfix.directory / "mailcloak"
    state = home / "state"
    state.mkdir(parents=True)
    shutil.chown(state, user, group)
    if group:
        state.chmod(0o2750)  # as the README says
    sockets = {
        "policy_socket": str(postfix.private / "mailcloak"),
        "socketmap_socket": str(postfix.private / "mailcloak-socketmap"),
    }
    config = {"sqlite": {"path": str(state / "state.db")}, "sockets": sockets, "daemon": {"user": user}, **blocks}
    return Daemon(home, config, level=level)


def envelope(client, sender, *recipients):
    """MAIL FROM and RCPT TO, as they stand; the first refusal is raised as an SMTPResponseException."""
    for command in (f"MAIL FROM:<{sender}>", *(f"RCPT TO:<{recipient}>" for recipient in recipients)):
        code, text = client.docmd(command)
        if code != 250:
            client.rset()
            raise smtplib.SMTPResponseException(code, text.decode(errors="replace"))


def send(client, sender, *recipients, headers=""):
    """A message over a connection that is there; its queue id."""
    envelope(client, sender, *recipients)
    code, text = client.data(f"Subject: test\r\n{headers}\r\ntest\r\n")
    if code != 250:
        raise smtplib.SMTPResponseException(code, text.decode())
    return re.search(r"queued as (\w+)", text.decode()).group(1)


def refusal(client, sender, *recipients):
    """Code and text of the refusal that a message meets over this connection; None if it is taken."""
    try:
        send(client, sender, *recipients)
    except smtplib.SMTPResponseException as exc:
        return exc.smtp_code, exc.smtp_error
    return None


def expected(answer, address):
    """The refusal that names this address, as refusal() gives it."""
    code, text = answer
    return code, text.format(address)
