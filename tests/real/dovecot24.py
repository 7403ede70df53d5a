"""A private Dovecot 2.4 on the sample file of examples/dovecot-2.4, and a mail host around it without Keycloak.

Only paths, ports, hosts and the names of accounts differ from the sample. Needs root.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from conftest import ROOT
from real.dovecot import MAIL_GROUP, MAIL_USER, PATH, PrivateDovecot
from real.mail import MailHost


def installed_version():
    """The version of the Dovecot that is installed, as (major, minor); (0, 0) where there is none."""
    program = shutil.which("dovecot", path=PATH)
    if not program:
        return 0, 0
    output = subprocess.run([program, "--version"], check=True, capture_output=True, text=True, timeout=30).stdout
    major, minor, *_ = output.split(".")
    return int(major), int(minor)


class PrivateDovecot24(PrivateDovecot):
    """One instance; the arguments are those of PrivateDovecot."""

    sample = ROOT / "examples" / "dovecot-2.4"
    files = ("dovecot.conf",)
    accounts = (("uid = vmail", f"uid = {MAIL_USER}"), ("gid = vmail", f"gid = {MAIL_GROUP}"))

    @staticmethod
    def _add_settings(text, settings):
        return text + settings  # dovecot_config_version must come first


class UserinfoStandIn:
    """Keycloak's userinfo endpoint: whose token it is, or 401. Nothing else of Keycloak is there."""

    def __init__(self):
        self.tokens = {}  # username by token
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                scheme, _, token = self.headers.get("Authorization", "").partition(" ")
                username = stand_in.tokens.get(token) if scheme == "Bearer" else None
                if not self.path.endswith("/realms/mail/protocol/openid-connect/userinfo"):
                    self._answer(404, {"error": "Realm does not exist"})
                elif username is None:
                    self._answer(401, {"error": "invalid_token", "error_description": "Token verification failed"})
                else:
                    self._answer(200, {"sub": "0a1b2c", "email_verified": True, "preferred_username": username})

            def _answer(self, status, body):
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextlib.contextmanager
    def running(self):
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()

    def token(self, realm, username):
        token = secrets.token_urlsafe(24)
        self.tokens[token] = username
        return token


class MailHost24(MailHost):
    """MailHost with Dovecot 2.4 and with a directory of its own, users being username: address pairs."""

    dovecot_class = PrivateDovecot24

    def __init__(self, userinfo: UserinfoStandIn, users, changes=()):
        super().__init__(userinfo, "mail", "", changes=changes)
        del self.daemon.config["keycloak"]
        self.daemon.config["static_users"] = users
