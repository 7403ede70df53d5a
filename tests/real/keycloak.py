"""A private Keycloak: the real server from Maven Central, on a free port of 127.0.0.1, with its database in memory.

What is fetched and unpacked is kept outside the tree, in $XDG_CACHE_HOME or ~/.cache, below mailcloak-tests. A run never writes there:
it has a folder of its own in which lib is a link. KEYCLOAK_VERSION chooses another version than the default.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import socketserver
import ssl
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import quote

import requests
from conftest import ROOT, wait_until
from real.postfix import free_port

VERSION = os.environ.get("KEYCLOAK_VERSION") or "26.7.0"
SETUP = ROOT / "examples" / "keycloak" / "setup"
ADMIN, ADMIN_PASSWORD = "admin", "only-for-these-tests"
PASSWORD = "the-password-of-every-user"
MAIL_CLIENT = "mail-program"  # what the users' mail programs log in with
BUILD_OPTIONS = ("--db=dev-mem",)
FAST_JVM = "-XX:TieredStopAtLevel=1"  # starts sooner, runs slower


def cache_directory():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mailcloak-tests"


def fetch(version):
    """The folder of an unpacked Keycloak that is built for its in-memory database; fetched where the cache does not have it."""
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    home = cache / f"keycloak-{version}"
    with open(cache / f"keycloak-{version}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not home.exists():
            with tempfile.TemporaryDirectory(
                dir=cache
            ) as work:  # moved into its place when all is done: half a fetch leaves nothing
                artifact = f"org.keycloak:keycloak-quarkus-dist:{version}:tar.gz"
                plugin = "org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy"
                run("mvn", "-q", "-B", plugin, f"-Dartifact={artifact}", f"-DoutputDirectory={work}", cwd=work)
                run("tar", "-xzf", f"keycloak-quarkus-dist-{version}.tar.gz", cwd=work)
                run(f"{work}/keycloak-{version}/bin/kc.sh", "build", *BUILD_OPTIONS, cwd=work)
                os.rename(f"{work}/keycloak-{version}", home)
    return home


def run(*command, **options):
    """Output of a command that must not fail."""
    options = {"check": False, "stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 300, **options}
    result = subprocess.run(command, **options)
    assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
    return result.stdout


def user(username, email, **more):
    """A user as Keycloak imports one: enabled, with a verified e-mail and the password of every user."""
    credentials = [{"type": "password", "value": PASSWORD, "temporary": False}]
    names = {"firstName": username.title(), "lastName": "Test"}
    return {
        "username": username,
        "email": email,
        "emailVerified": True,
        "enabled": True,
        **names,
        "credentials": credentials,
        **more,
    }


def service_client(client_id, secret, *roles):
    """A client with a service account, and the user record that gives the account roles of realm-management."""
    client = {"clientId": client_id, "secret": secret, "publicClient": False, "serviceAccountsEnabled": True}
    client.update({"standardFlowEnabled": False, "directAccessGrantsEnabled": False})
    account = {"username": f"service-account-{client_id}", "enabled": True, "serviceAccountClientId": client_id}
    return client, {**account, "clientRoles": {"realm-management": list(roles)} if roles else {}}


def pump(source, sink):
    """Bytes from one socket to the other until it ends; then both are at their end."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for each in (source, sink):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


class PrivateKeycloak:
    """One server. Realms are made by create_realm; their users are changed by add_user and change_user.

    What description() says of a server that runs makes another object for it, in another process too.
    """

    def __init__(self, version=VERSION, directory=None, port=None, process_group=None, start_seconds=0.0):
        self.version = version
        self.directory = Path(directory or tempfile.mkdtemp(prefix="kc", dir="/tmp"))
        self.directory.chmod(0o755)
        self.log_path = self.directory / "log"
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = None
        self.process_group, self.start_seconds = process_group, start_seconds
        self._session = requests.Session()
        self._session.trust_env = False
        self._admin_token, self._admin_token_good_until = "", 0.0

    # ---- running

    def description(self):
        names = ("version", "port", "process_group", "start_seconds")
        return {"directory": str(self.directory), **{name: getattr(self, name) for name in names}}

    def start(self):
        """Start it and wait until it answers."""
        started = time.monotonic()
        built = fetch(self.version)
        home = self.directory / "home"
        home.mkdir()
        for name in ("bin", "conf"):  # kc.sh finds its home from where it really is
            shutil.copytree(built / name, home / name)
        for name in ("lib", "providers", "themes"):
            (home / name).symlink_to(built / name)
        environment = {
            **os.environ,
            "KC_BOOTSTRAP_ADMIN_USERNAME": ADMIN,
            "KC_BOOTSTRAP_ADMIN_PASSWORD": ADMIN_PASSWORD,
            "JAVA_OPTS_KC_HEAP": "-Xms128m -Xmx768m",
            "JAVA_OPTS_APPEND": FAST_JVM,
        }
        options = ["--cache=local", "--http-enabled=true", "--hostname-strict=false", "--log-level=warn"]
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                [home / "bin" / "kc.sh", "start", "--optimized", *options, f"--http-port={self.port}", "--http-host=127.0.0.1"],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=home,
                start_new_session=True,  # kc.sh starts a child; both are ended by their process group
            )
        self.process_group = self.process.pid
        wait_until(lambda: self.process.poll() is not None or self._answers(), 100, what="start of Keycloak")
        assert self.process.poll() is None, self.log()
        self.start_seconds = time.monotonic() - started  # with the fetch, where it was one
        return self

    def _answers(self):
        with contextlib.suppress(requests.RequestException):
            return self._session.get(f"{self.url}/realms/master", timeout=5).status_code == 200
        return False

    def close(self):
        if self.process_group and not (self.process and self.process.poll() is not None):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process_group, signal.SIGKILL)  # there is nothing to save
        if self.process:
            self.process.wait(20)
        self._session.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def log(self):
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    # ---- setting it up

    def admin(self, method, path, body=None, **query):
        """A request to the admin interface, path being relative to admin/realms; its answer decoded, None when it is empty."""
        if time.monotonic() > self._admin_token_good_until:
            form = {"grant_type": "password", "client_id": "admin-cli", "username": ADMIN, "password": ADMIN_PASSWORD}
            self._admin_token, self._admin_token_good_until = self.request_token("master", **form), time.monotonic() + 40
        headers = {"Authorization": f"Bearer {self._admin_token}"}
        url = f"{self.url}/admin/realms{path}"
        response = self._session.request(method, url, json=body, params=query, headers=headers, timeout=60)
        assert response.ok, f"{method} {path}: {response.status_code} {response.text}"
        return response.json() if response.content else None

    def setup(self, realm, step):
        """What an administrator does with examples/keycloak/setup; its output."""
        result = self.try_setup(realm, step)
        assert result.returncode == 0, result
        return result.stdout

    def try_setup(self, realm, step, **more):
        """The same, which may fail, with more variables."""
        environment = {
            **os.environ,
            "KEYCLOAK_URL": self.url,
            "KEYCLOAK_ADMIN": ADMIN,
            "KC_CLI_PASSWORD": ADMIN_PASSWORD,
            "REALM": realm,
            "KCADM": str(self.directory / "home" / "bin" / "kcadm.sh"),
            "KC_OPTS": FAST_JVM,
            **more,
        }
        options = {"capture_output": True, "text": True, "check": False, "timeout": 300, "stdin": subprocess.DEVNULL}
        return subprocess.run([str(SETUP), step], env=environment, **options)

    @contextlib.contextmanager
    def behind_https(self, certificate, key):
        """The address of a proxy of its own that has this certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        keycloak = "127.0.0.1", self.port

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                with contextlib.ExitStack() as stack:
                    stack.enter_context(contextlib.suppress(OSError))
                    client = stack.enter_context(context.wrap_socket(self.request, server_side=True))
                    server = stack.enter_context(socket.create_connection(keycloak))
                    back = threading.Thread(target=pump, args=(server, client))
                    back.start()
                    pump(client, server)
                    back.join()

        with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
            server.daemon_threads = True
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
            thread.start()
            try:
                yield f"https://127.0.0.1:{server.server_address[1]}"
            finally:
                server.shutdown()
                thread.join()

    def create_realm(self, name, users=(), clients=(), **more):
        """A stock realm but for what is given, with a public client for mail programs."""
        mail_client = {
            "clientId": MAIL_CLIENT,
            "publicClient": True,
            "directAccessGrantsEnabled": True,
            "standardFlowEnabled": False,
        }
        users = [
            {"realmRoles": [f"default-roles-{name.lower()}"], **user} for user in users
        ]  # which an import does not give by itself
        realm = {"realm": name, "enabled": True, "sslRequired": "none", "clients": [mail_client, *clients], "users": users}
        with open(self.directory / "realms.lock", "w") as lock:  # of two that are made at a time Keycloak refuses one
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.admin("POST", "", {**realm, **more})

    def user_id(self, realm, username):
        (found,) = self.admin("GET", f"/{realm}/users", username=username, exact="true")
        return found["id"]

    def change_user(self, realm, username, **changes):
        """Change fields of a user: enabled=False, email=..."""
        path = f"/{realm}/users/{self.user_id(realm, username)}"
        self.admin("PUT", path, {**self.admin("GET", path), **changes})

    def add_user(self, realm, username, email, **more):
        self.admin("POST", f"/{realm}/users", user(username, email, **more))

    # ---- as a client of it

    def request_token(self, realm, **form):
        url = f"{self.url}/realms/{quote(realm)}/protocol/openid-connect/token"
        response = self._session.post(url, data=form, timeout=30)
        assert response.ok, f"token of {realm}: {response.status_code} {response.text}"
        return response.json()["access_token"]

    def token(self, realm, username):
        """What the user's mail program gets at a login."""
        form = {"grant_type": "password", "client_id": MAIL_CLIENT, "username": username, "password": PASSWORD, "scope": "openid"}
        return self.request_token(realm, **form)

    def edit_own_email(self, realm, token, email):
        """What a user does on their own account page; the HTTP status."""
        url = f"{self.url}/realms/{realm}/account/"
        headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
        profile = self._session.get(url, headers=headers, timeout=30)
        assert profile.ok, f"{url}: {profile.status_code} {profile.text}"
        return self._session.post(url, headers=headers, json={**profile.json(), "email": email}, timeout=30).status_code
