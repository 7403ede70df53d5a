"""A whole mail host: Postfix, Dovecot and mailcloak on the sample files, in front of a realm of a Keycloak that is there already."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import re
import secrets
import smtplib
from typing import NamedTuple

from conftest import wait_until
from real import postfix
from real.dovecot import PrivateDovecot, make_certificate, new_source
from real.keycloak import PrivateKeycloak
from real.postfix import PrivatePostfix, daemon_behind

DAEMON_USER = "daemon"  # in place of mailcloak: an account that has nothing to do with mail and is on every host
CACHE_SECONDS = 1  # short, so that tests need not wait long for a change in Keycloak
TOKEN_MECHANISMS = ("OAUTHBEARER", "XOAUTH2")
PASSWORD_MECHANISMS = ("PLAIN", "LOGIN")


class Received(NamedTuple):
    """A message in a mailbox: the recipient that Postfix delivered it to, and the mailbox that it came from."""

    delivered_to: str
    text: str


class MailHost:
    """One host for d1.test and d2.test.

    policy and keycloak_block are keys of those blocks of its configuration, changes those of PrivateDovecot, settings those of
    PrivatePostfix.
    """

    dovecot_class = PrivateDovecot

    def __init__(self, keycloak: PrivateKeycloak, realm, client_secret, policy=None, changes=(), settings=None, **keycloak_block):
        self.keycloak, self.realm = keycloak, realm
        settings = {"mynetworks": "127.0.0.2/32", **(settings or {})}
        self.postfix = PrivatePostfix(ports=["submission", "submissions"], settings=settings)
        self.daemon = daemon_behind(
            self.postfix,
            user=DAEMON_USER,
            group=DAEMON_USER,
            keycloak={
                "base_url": keycloak.url,
                "realm": realm,
                "client_id": "mailcloak",
                "client_secret": client_secret,
                **keycloak_block,
            },
            policy={
                "domain": ["d1.test", "d2.test"],
                "recipient_delimiter": "+",
                "cache_ttl_seconds": CACHE_SECONDS,
                "negative_cache_ttl_seconds": CACHE_SECONDS,
                "disappearance_grace_seconds": 0,  # who moves or is deleted is believed at once
                **(policy or {}),
            },
        )
        self.dovecot = None
        self._changes = changes
        self.passwords = {}  # of apps, by their ids

    def start(self):
        self.daemon.start()  # makes the database
        realm_url = f"{self.keycloak.url}/realms/{self.realm}"
        self.dovecot = self.dovecot_class(self.postfix.private, realm_url, self.daemon.database, self._changes).start()
        certificate, key = make_certificate(self.postfix.config)
        self.postfix.set(smtpd_tls_cert_file=certificate, smtpd_tls_key_file=key)
        self.tls = self.dovecot.tls
        self.tls.load_verify_locations(str(certificate))
        self.postfix.start()
        return self

    def close(self):
        for server in (self.daemon, self.dovecot, self.postfix):
            if server:
                server.close()

    # ---- setting it up

    def add_app(self, app_id, *addresses, options=()):
        """An app with a generated password that may send from these addresses."""
        self.passwords[app_id] = self.daemon.ctl("apps", "add", app_id, "--generate", *options).stdout.strip()
        for address in addresses:
            self.daemon.ctl("apps", "allow", app_id, address)

    def token(self, username):
        return self.keycloak.token(self.realm, username)

    # ---- sending

    @contextlib.contextmanager
    def submission(self, port="submissions", source=None):
        """A connection over TLS to a port of the users, before the login."""
        options = {"timeout": 30, "source_address": (source or new_source(), 0)}
        if port == "submissions":
            client = smtplib.SMTP_SSL("127.0.0.1", self.postfix.ports[port], context=self.tls, **options)
        else:
            client = smtplib.SMTP("127.0.0.1", self.postfix.ports[port], **options)
            client.starttls(context=self.tls)
        with client:
            client.ehlo("client.test")
            yield client

    @contextlib.contextmanager
    def logged_in(self, mechanism, username, secret=None, **options):
        """A connection after the login: of a user with a token, of an app with its password."""
        if secret is None:
            secret = self.token(username) if mechanism in TOKEN_MECHANISMS else self.passwords[username]
        with self.submission(**options) as client:
            log_in(client, mechanism, username, secret)
            yield client

    # ---- receiving

    @contextlib.contextmanager
    def mailbox(self, username, mechanism="OAUTHBEARER"):
        """The user's INBOX over IMAP, opened with a token."""
        with self.dovecot.imap() as client:
            response = initial_response(mechanism, username, self.token(username))
            client.authenticate(mechanism, lambda challenge: b"\x01" if challenge else response)
            assert client.select("INBOX")[0] == "OK"
            yield client

    def read(self, username, marker, mechanism="OAUTHBEARER"):
        """The one message with this marker, read over IMAP; waits until it is there."""

        def search():
            client.noop()
            return client.search(None, "HEADER", "X-Marker", marker)[1][0].split()

        with self.mailbox(username, mechanism) as client:
            (number,) = wait_until(search, 20, what=f"message {marker} in the mailbox of {username}")
            text = client.fetch(number, "(RFC822)")[1][0][1].decode()
        return Received(re.search(r"^Delivered-To: <?(.*?)>?\r$", text, re.MULTILINE).group(1), text)

    def holds(self, username, marker):
        """Is the message there now?"""
        with self.mailbox(username) as client:
            return client.search(None, "HEADER", "X-Marker", marker)[1] != [b""]


def send(client, sender, *recipients):
    """A message over a connection that is there; the marker by which it is found again. The first refusal is raised."""
    marker = secrets.token_hex(8)
    postfix.send(client, sender, *recipients, headers=f"X-Marker: {marker}\r\n")
    return marker


def initial_response(mechanism, username, secret, authorize_as=""):
    """The first message of a SASL client (RFC 4616, RFC 7628, and Google's description of XOAUTH2)."""
    if mechanism == "PLAIN":
        return f"{authorize_as}\0{username}\0{secret}".encode()
    if mechanism == "OAUTHBEARER":
        return f"n,a={authorize_as or username},\x01host=mail.test\x01port=465\x01auth=Bearer {secret}\x01\x01".encode()
    assert mechanism == "XOAUTH2"
    return f"user={username}\x01auth=Bearer {secret}\x01\x01".encode()


def log_in(client, mechanism, username, secret, **options):
    """AUTH of SMTP; a refusal is raised as SMTPAuthenticationError."""
    if mechanism == "SCRAM-SHA-256":
        code, text = _scram(client, username, secret, **options)
    elif mechanism == "LOGIN":
        assert not options
        code, text = client.docmd("AUTH LOGIN")
        for answer in (username, secret):
            if code == 334:
                code, text = _reply(client, answer.encode())
    else:
        code, text = client.docmd(f"AUTH {mechanism}")  # without the initial response: a token may be longer than a command line
        if code == 334:
            code, text = _reply(client, initial_response(mechanism, username, secret, **options))
        if code == 334:  # an error in JSON; the client has to answer before it is refused (RFC 7628, section 3.2.3)
            code, text = _reply(client, b"\x01")
    if code != 235:
        raise smtplib.SMTPAuthenticationError(code, text)


def _reply(client, message):
    return client.docmd(base64.b64encode(message).decode())


def _scram(client, username, secret, authorize_as=""):
    """SCRAM-SHA-256 (RFC 5802, RFC 7677) without channel binding."""
    header = f"n,a={authorize_as}," if authorize_as else "n,,"
    code, text = client.docmd("AUTH SCRAM-SHA-256")
    if code != 334:
        return code, text
    bare = f"n={username},r={secrets.token_hex(12)}"
    code, text = _reply(client, f"{header}{bare}".encode())
    if code != 334:
        return code, text
    server_first = base64.b64decode(text).decode()
    nonce, salt, iterations = re.fullmatch(r"r=(.*),s=(.*),i=(\d+)", server_first).groups()
    without_proof = f"c={base64.b64encode(header.encode()).decode()},r={nonce}"
    salted = hashlib.pbkdf2_hmac("sha256", secret.encode(), base64.b64decode(salt), int(iterations))
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    signature = hmac.digest(hashlib.sha256(client_key).digest(), f"{bare},{server_first},{without_proof}".encode(), "sha256")
    proof = base64.b64encode(bytes(a ^ b for a, b in zip(client_key, signature))).decode()
    code, text = _reply(client, f"{without_proof},p={proof}".encode())
    return _reply(client, b"") if code == 334 else (code, text)
