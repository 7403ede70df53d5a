"""A private Dovecot 2.3 on the sample files of examples/dovecot-2.3, in a directory and on a port of its own.

Only paths, ports, hosts and the names of accounts differ from the sample. The system's own Dovecot is not touched. Needs root.
"""

from __future__ import annotations

import contextlib
import imaplib
import itertools
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT, wait_until
from real.postfix import free_port

PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
MAIL_USER, MAIL_GROUP = "nobody", "nogroup"  # in place of vmail

# What makes an instance independent of its host. None of it is in the sample.
TEST_SETTINGS = """\
base_dir = {directory}/run
state_dir = {directory}/state
log_path = {directory}/dovecot.log
listen = 127.0.0.1
auth_verbose = yes
"""


_source_numbers = itertools.count(10)


def new_source():
    """A client address that nobody has used yet, so that neither Postfix nor Dovecot hold earlier logins against it."""
    number = next(_source_numbers)
    return f"127.1.{number // 250}.{number % 250 + 1}"


class Process(NamedTuple):
    command: str
    uid: int
    groups: list[int]


class _ImapClient(imaplib.IMAP4_SSL):
    """From an address of its own."""

    def _create_socket(self, *_):
        plain = socket.create_connection((self.host, self.port), 30, source_address=(new_source(), 0))
        return self.ssl_context.wrap_socket(plain, server_hostname=self.host)


def make_certificate(directory, days=30):
    """A certificate of its own for 127.0.0.1, and its key: two files."""
    certificate, key = Path(directory) / "server.pem", Path(directory) / "server.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", str(days), "-subj", "/CN=mail.test"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", certificate, "-keyout", key]
    subprocess.run(command, check=True, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    return certificate, key


class PrivateDovecot:
    """One instance.

    sockets is the folder that Postfix looks for auth and dovecot-lmtp in, realm_url the address of the Keycloak realm, database mailcloak's
    file, whose group is what the auth worker gets. changes are pairs of (text of the sample, other text), as its comments tell.
    """

    # What is of this version: the sample, its files, and where it names the account of the mailboxes, as pairs like changes.
    sample = ROOT / "examples" / "dovecot-2.3"
    files = ("dovecot.conf", "dovecot-sql.conf.ext", "dovecot-oauth2.conf.ext")
    accounts = (("uid=vmail gid=vmail", f"uid={MAIL_USER} gid={MAIL_GROUP}"),)

    def __init__(self, sockets, realm_url, database, changes=()):
        self.directory = Path(tempfile.mkdtemp(prefix="dc", dir="/tmp"))
        self.directory.chmod(0o755)
        self.config = self.directory / "etc"
        self.mail = self.directory / "mail"
        self.log_path = self.directory / "dovecot.log"
        self.port = free_port()
        self.sockets = Path(sockets)
        for path in (self.config, self.mail, self.directory / "run", self.directory / "state"):
            path.mkdir()
        shutil.chown(self.mail, MAIL_USER, MAIL_GROUP)
        self.certificate, key = make_certificate(self.config)
        self.tls = ssl.create_default_context(cafile=str(self.certificate))
        self.process = None
        replaced = {
            "/etc/dovecot/private/dovecot.pem": self.certificate,
            "/etc/dovecot/private/dovecot.key": key,
            "/etc/dovecot/": f"{self.config}/",
            "/var/spool/postfix/private/": f"{sockets}/",
            "/var/vmail/": f"{self.mail}/",
            "port = 993": f"port = {self.port}",
            "extra_groups = mailcloak": f"extra_groups = {Path(database).group()}",
            "/var/lib/mailcloak/state.db": database,
            "https://sso.example.org/realms/mail/": f"{realm_url}/",
        }
        texts = {name: (self.sample / name).read_text(encoding="utf-8") for name in self.files}
        for old, new in (*changes, *self.accounts, *replaced.items()):
            assert any(old in text for text in texts.values()), f"the sample has no {old!r}"
            texts = {name: text.replace(old, str(new)) for name, text in texts.items()}
        texts["dovecot.conf"] = self._add_settings(texts["dovecot.conf"], TEST_SETTINGS.format(directory=self.directory))
        for name, text in texts.items():
            (self.config / name).write_text(text, encoding="utf-8")

    @staticmethod
    def _add_settings(text, settings):
        return settings + text

    # ---- running

    def start(self):
        """Start it and wait until IMAP and both sockets of Postfix answer."""
        self.process = subprocess.Popen(
            [shutil.which("dovecot", path=PATH), "-F", "-c", self.config / "dovecot.conf"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PATH": PATH},
            start_new_session=True,
        )
        wait_until(lambda: self.process.poll() is not None or "starting up" in self.log(), what="start of Dovecot")
        assert self.process.poll() is None, f"{self.log()}{self._run('doveconf', '-n').stderr}"
        return self

    def close(self):
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(10)
        shutil.rmtree(self.directory, ignore_errors=True)

    def log(self):
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def _run(self, program, *arguments):
        command = [shutil.which(program, path=PATH), "-c", str(self.config / "dovecot.conf"), *arguments]
        return subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, env={"PATH": PATH}
        )

    def complaints(self):
        """What Dovecot says against its configuration."""
        return self._run("doveconf", "-n").stderr

    def accepts_password(self, username, password, service):
        """Does a plain password log in to this service, by the word of doveadm auth test?"""
        path = f"{self.directory}/run/auth-client"
        result = self._run(
            "doveadm", "auth", "test", "-a", path, "-x", f"service={service}", "-x", f"rip={new_source()}", "--", username, password
        )
        assert result.returncode in (0, 77), f"{result}{self.log()}"
        return result.returncode == 0

    def processes(self, name):
        """The processes of this instance whose command begins so."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                process_group = int((path / "stat").read_text(errors="replace").rpartition(")")[2].split()[2])
                command = (path / "cmdline").read_text(errors="replace").rstrip("\0").replace("\0", " ")
                if process_group == self.process.pid and command.startswith(name):
                    status = (path / "status").read_text(errors="replace")
                    uid, groups = (re.search(rf"^{key}:(.*)$", status, re.MULTILINE).group(1).split() for key in ("Uid", "Groups"))
                    found.append(Process(command, int(uid[1]), [int(group) for group in groups]))
        return found

    # ---- a client

    @contextlib.contextmanager
    def imap(self):
        """A connection that nobody has logged in to yet."""
        client = _ImapClient("127.0.0.1", self.port, ssl_context=self.tls)
        try:
            yield client
        finally:
            with contextlib.suppress(OSError, imaplib.IMAP4.error):
                client.logout()
