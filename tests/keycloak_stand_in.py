"""A stand-in for Keycloak: its token endpoint and its user search, with faults on demand. Part of the tests, not of the product.

Answers as Keycloak 26 does: form-encoded token requests, bearer tokens that expire and can be revoked, 401 for an unknown token, 403
without a role, an empty list for the role query-users alone, exact searches that ignore case, all users for an empty value.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
import urllib.parse
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CLIENT_ID = "mailcloak"
CLIENT_SECRET = "stand-in-secret-7Qz"


SELF_CHECK = {"max": "1", "briefRepresentation": "true"}  # by which the daemon proves that it sees users


class KeycloakStandIn:
    """Users and faults of one realm; set the attributes while it runs.

    fault is None or one of FAULTS; fault_seconds says how long "stall" and "drip" go on at most.
    """

    FAULTS = (
        "stall", "drip", "drip-headers", "close", "html", "redirect", "truncated", "huge", "not-json", "object", "numbers", "wrong-types",
        "deep", "empty", "other-user", "gzip", "status-400", "status-404", "status-500", "status-503", "no-content",
    )  # fmt: skip

    def __init__(self, realm="mail", port=0, path=""):
        self.realm, self.path = realm, path
        self.users = []
        self.profile_edit = ["admin"]  # who may edit the attribute email; None: the profile cannot be read
        self.role = "view-users"  # "view-users", "query-users" or ""
        self.refused_word = None  # a search with it is refused, as by a proxy
        self.token_seconds = 300
        self.latency_seconds = 0.0
        self.fault = None
        self.token_fault = None  # as fault, but of the token endpoint alone
        self.profile_fault = None  # as fault, but of the user profile alone
        self.fault_seconds = 30.0
        self.ignore_exact = False
        self.empty_value_finds_all = True  # as 26.7.0; 26.0.7 finds nobody
        self.requests = []  # (path, query) of each user search, ("token", {}) of each token request
        self.most_at_once = 0
        self.at_once = 0
        self._lock = threading.Lock()  # guards the four around it and _tokens
        self._tokens = {}
        self._stopping = threading.Event()
        stand_in = self

        class Handler(_Handler):
            keycloak = stand_in

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256
            block_on_close = False

            def handle_error(self, request, client_address):
                pass  # clients that give up are part of the tests

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self.add_user("administrator")  # without an e-mail; a realm that shows nobody at all is a fault
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}{self.path}"

    def config(self, **more):
        """The keycloak block of a configuration."""
        return {"base_url": self.url, "realm": self.realm, "client_id": CLIENT_ID, "client_secret": CLIENT_SECRET, **more}

    def add_user(self, username, email=None, enabled=True, verified=True, **more):
        user = {
            "id": str(uuid.uuid4()),
            "username": username,
            "firstName": username.title(),
            "lastName": "Test",
            "emailVerified": verified,
            "enabled": enabled,
            "createdTimestamp": 1700000000000,
            "totp": False,
            "disableableCredentialTypes": [],
            "requiredActions": [],
            "notBefore": 0,
            **more,
        }
        if email is not None:
            user["email"] = email
        self.users.append(user)
        return user

    def user(self, username):
        return next(user for user in self.users if user["username"] == username)

    def revoke_tokens(self):
        with self._lock:
            self._tokens.clear()

    @property
    def searches(self):
        """The queries of the user searches so far."""
        with self._lock:
            return [query for kind, query in self.requests if kind == "users" and query != SELF_CHECK]

    @property
    def self_checks(self):
        """How often the daemon asked whether it sees any user at all."""
        with self._lock:
            return self.requests.count(("users", SELF_CHECK))

    @property
    def token_requests(self):
        with self._lock:
            return sum(kind == "token" for kind, _ in self.requests)

    def forget_requests(self):
        with self._lock:
            self.requests.clear()
            self.most_at_once = 0

    def start(self):
        self._thread.start()
        return self

    def stop(self):
        """Refuse connections from now on, and end those that are stalled."""
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def stop_listening(self):
        """Before a start: leave the port to somebody else."""
        self._stopping.set()
        self._server.server_close()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        if not self._stopping.is_set():
            self.stop()

    # ---- what a request does

    def note(self, kind, query):
        with self._lock:
            self.requests.append((kind, query))

    @contextlib.contextmanager
    def counted(self):
        with self._lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            yield
        finally:
            with self._lock:
                self.at_once -= 1

    def issue_token(self):
        token = secrets.token_urlsafe(24)
        with self._lock:
            self._tokens[token] = time.monotonic() + self.token_seconds
        return token

    def accepts(self, token):
        with self._lock:
            return self._tokens.get(token, 0) > time.monotonic()

    def search(self, query):
        found = self.users
        for attribute in ("username", "email"):
            if query.get(attribute) == "" and not self.empty_value_finds_all:
                return []
            if query.get(attribute):
                wanted = query[attribute].lower()
                exact = query.get("exact") == "true" and not self.ignore_exact
                found = [
                    u
                    for u in found
                    if (u.get(attribute, "").lower() == wanted if exact else wanted in u.get(attribute, "").lower())
                ]
        found = found[: int(query.get("max", 100))]
        brief = (
            "id",
            "username",
            "firstName",
            "lastName",
            "email",
            "emailVerified",
            "enabled",
            "createdTimestamp",
            "federationLink",
        )
        if query.get("briefRepresentation") == "true":
            found = [{name: user[name] for name in brief if name in user} for user in found]
        return found

    def wait(self, seconds):
        """Until the time is over or the stand-in ends; True when it ends."""
        return self._stopping.wait(seconds)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 64 * 1024
    keycloak: KeycloakStandIn

    def log_message(self, *_):
        pass

    def do_POST(self):
        if self.keycloak.wait(0):  # stopped: a kept connection gets no answer either
            self.close_connection = True
            return
        with self.keycloak.counted():
            self._post()
        self.wfile.flush()

    def do_GET(self):
        if self.keycloak.wait(0):
            self.close_connection = True
            return
        with self.keycloak.counted():
            self._get()
        self.wfile.flush()

    def _post(self):
        keycloak = self.keycloak
        form = dict(urllib.parse.parse_qsl(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()))
        if self.path != f"{keycloak.path}/realms/{keycloak.realm}/protocol/openid-connect/token":
            self._send(404, {"error": "Realm does not exist"})
            return
        keycloak.note("token", {})
        if self._misbehave(keycloak.token_fault or keycloak.fault):
            return
        assert form.get("grant_type") == "client_credentials"
        error = {"error_description": "Invalid client or Invalid client credentials"}
        if form.get("client_id") != CLIENT_ID:
            self._send(401, {"error": "invalid_client", **error})
            return
        if form.get("client_secret") != CLIENT_SECRET:
            self._send(401, {"error": "unauthorized_client", **error})
            return
        answer = {
            "access_token": keycloak.issue_token(),
            "expires_in": keycloak.token_seconds,
            "token_type": "Bearer",
            "scope": "email profile",
        }
        self._send(200, answer)

    def _get(self):
        keycloak = self.keycloak
        path, _, query_string = self.path.partition("?")
        query = dict(urllib.parse.parse_qsl(query_string, keep_blank_values=True))
        if path == f"{keycloak.path}/elsewhere":  # where "redirect" leads: a client that follows would take this for an answer
            self._send(200, keycloak.users)
            return
        users_path = f"{keycloak.path}/admin/realms/{keycloak.realm}/users"
        if path not in (users_path, f"{users_path}/profile"):
            self._send(404, {"error": "Realm not found."})
            return
        asks_profile = path != users_path
        keycloak.note("profile" if asks_profile else "users", query)
        if keycloak.latency_seconds:
            keycloak.wait(keycloak.latency_seconds)
        if self._misbehave(keycloak.profile_fault if asks_profile and keycloak.profile_fault else keycloak.fault):
            return
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if scheme != "Bearer" or not keycloak.accepts(token):
            self._send(401, {"error": "HTTP 401 Unauthorized"})
        elif not keycloak.role or (keycloak.refused_word and keycloak.refused_word in str(query)):
            self._send(403, {"error": "HTTP 403 Forbidden"})
        elif asks_profile:
            profile = {"attributes": [{"name": "username"}, {"name": "email", "permissions": {"edit": keycloak.profile_edit}}]}
            self._send(403 if keycloak.profile_edit is None else 200, profile)
        elif keycloak.role == "query-users":
            self._send(200, [])
        else:
            self._send(200, keycloak.search(query))

    def _misbehave(self, fault):
        """Do what fault says instead of answering; False when there is none."""
        keycloak = self.keycloak
        if fault is None:
            return False
        self.close_connection = fault not in ("object", "numbers", "wrong-types", "empty", "other-user", "html")
        if fault == "stall":
            keycloak.wait(keycloak.fault_seconds)
        elif fault == "drip":
            self._drip(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n[")
        elif fault == "drip-headers":
            self._drip(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        elif fault == "close":
            pass
        elif fault == "html":
            self._send(200, b"<html><body>Welcome to the captive portal</body></html>", "text/html")
        elif fault == "redirect":
            self._send(302, b"", location=keycloak.url + "/elsewhere")
        elif fault == "truncated":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n\r\n[{")
        elif fault == "huge":
            self._send(200, b"[" + b" " * (2 * 1024 * 1024) + b"]")
        elif fault == "not-json":
            self._send(200, b"[{]")
        elif fault == "object":
            self._send(200, {"users": []})
        elif fault == "numbers":
            self._send(200, [1, 2, 3])
        elif fault == "wrong-types":
            self._send(200, [{"username": ["alice"], "email": {"a": 1}, "enabled": "yes"}])
        elif fault == "deep":
            self._send(200, b"[" * 100_000)
        elif fault == "empty":
            self._send(200, [])
        elif fault == "other-user":
            self._send(200, [{"username": "mallory", "email": "mallory@evil.test", "enabled": True, "emailVerified": True}])
        elif fault == "gzip":
            self._send(200, b"\x1f\x8b\x08\x00\x00\x00\x00\x00", encoding="gzip")
        elif fault == "no-content":
            self._send(204, b"")
        elif fault.startswith("status-"):
            self._send(int(fault[len("status-") :]), {"error": "unknown_error"})
        else:
            raise AssertionError(fault)
        return True

    def _drip(self, beginning):
        self.wfile.write(beginning)
        end = time.monotonic() + self.keycloak.fault_seconds
        with contextlib.suppress(OSError):
            while time.monotonic() < end and not self.keycloak.wait(0.05):
                self.wfile.write(b" ")
                self.wfile.flush()

    def _send(self, status, body, content_type="application/json", location=None, encoding=None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        if location:
            self.send_header("Location", location)
        if encoding:
            self.send_header("Content-Encoding", encoding)
        self.end_headers()
        self.wfile.write(data)
