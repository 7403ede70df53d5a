"""Known secrets go in by every way and come out by none: no log line, error, list, file, process argument or child shows one."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import itertools
import json
import math
import os
import resource
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import subprocess
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path

import keycloak_stand_in
import pytest
import yaml
from conftest import ROOT, USERS, Daemon, as_nobody, read_of_threads, run_ctl, wait_until

import mailcloak
import mailcloakcommon
import mailcloakctl

DEFER = "451 4.3.0 Temporary authentication/lookup failure"
REJECT = "550 5.1.1 No such user"

# With the characters that URLs, forms, YAML, shells and logs write in ways of their own.
SECRET = "9vKq2/ZpXw+T7mLs=4Rb!8Nc"  # of the client
ROTATED_SECRET = "uH6$eC3&gY0#jA9 kV1*dS5z"  # the one after it
TOKEN = "tJ5!xW8 qP/3mD+6yK=2nF"  # of an app
BARE_SECRET = "M4xTq8RwZ2nKc7VbL5sJ"  # for places where any other character would end it
LOWER_SECRET = "qzvkwjxhtrpmsdlfgbnc"


# ---- looking for a secret


@functools.cache
def pieces_of(secret):
    """Every piece of 8 characters of the secret, as it stands and as URLs, JSON, logs, base64 and hex write it; in lower case."""
    data = secret.encode("utf-8", "surrogateescape")
    spellings = [secret, urllib.parse.quote(data, safe=""), urllib.parse.quote_plus(data), json.dumps(secret)[1:-1]]
    spellings.append(mailcloak.escape_for_log(secret))
    for offset in range(3):  # in base64 a text looks different after one and after two other bytes
        encoded = base64.b64encode(bytes(offset) + data).decode()[(0, 2, 3)[offset] : (offset + len(data)) * 8 // 6]
        spellings += [encoded, encoded.translate(str.maketrans("+/", "-_"))]
    pieces = {text[at : at + 8] for text in spellings for at in range(len(text) - 7)}
    pieces |= {data.hex()[at : at + 16] for at in range(0, len(data) * 2 - 14, 2)}
    return frozenset(piece.lower() for piece in pieces)


def assert_hidden(text, *secrets):
    """Fail where the text holds a piece of a secret, naming the line."""
    text = (text.decode("latin-1") if isinstance(text, bytes) else text).lower()
    for secret in secrets:
        assert len(secret) >= 8
        for piece in pieces_of(secret):
            at = text.find(piece)
            assert at < 0, f"{piece!r} shows in: {text[max(0, at - 200) : at + 100]}"


def files_below(directory, but=()):
    """The names and contents of all files below the directory, as bytes; but: files into which the test itself put a secret."""
    parts = []
    for path in sorted(Path(directory).rglob("*")):
        parts.append(os.fsencode(path))
        if stat.S_ISREG(path.lstat().st_mode) and path not in but:
            parts.append(path.read_bytes())
    return b"\n".join(parts)


@pytest.mark.parametrize(
    "text",
    [
        f"error='{SECRET}'",
        f"...{SECRET[5:13]}...",
        SECRET.upper(),
        urllib.parse.urlencode({"client_secret": SECRET}),
        "Basic " + base64.b64encode(f"mailcloak:{SECRET}".encode()).decode(),
        "Basic " + base64.b64encode(f"mailcloak2:{SECRET}".encode()).decode(),
        "Basic " + base64.urlsafe_b64encode(f"mailcloak33:{SECRET}!".encode()).decode(),
        SECRET.encode().hex(),
        mailcloak.escape_for_log(f"<{SECRET}>"),
        SECRET.encode(),
    ],
    ids=["whole", "piece", "upper case", "form", "base64", "base64+1", "base64+2", "hex", "escaped", "bytes"],
)
def test_every_spelling_of_a_secret_would_be_found(text):
    with pytest.raises(AssertionError, match="shows in"):
        assert_hidden(text, SECRET)
    assert_hidden(text, ROTATED_SECRET, TOKEN, BARE_SECRET, LOWER_SECRET)


# ---- programs that say all they can

# Read by every Python that finds it in PYTHONPATH: all libraries log all they have to standard error, and a file tells which processes
# were started and which files were opened for writing.
SITECUSTOMIZE = """\
import logging, os, sys
logging.basicConfig(level=logging.DEBUG)
logging.debug("libraries log at debug level")
audit = os.open(os.environ["AUDIT_FILE"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
os.write(audit, b"file " + os.fsencode(os.environ["AUDIT_FILE"]) + b"\\n")
starts = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "pty.spawn")
def note(event, arguments):
    if event in starts:
        os.write(audit, f"process {event} {arguments!r}\\n".encode())
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        os.write(audit, b"file " + os.fsencode(arguments[0]) + b"\\n")
    elif event == "sqlite3.connect":
        os.write(audit, b"file " + os.fsencode(arguments[0]) + b"\\n")
sys.addaudithook(note)
"""


def loud_environment(directory):
    """An environment in which Python and all libraries say all they can; see SITECUSTOMIZE."""
    folder = Path(directory) / "loud"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return {
        "PYTHONPATH": str(folder),
        "AUDIT_FILE": str(folder / "audit"),
        "PYTHONDEVMODE": "1",
        "PYTHONWARNINGS": "always",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def audited(directory, kind):
    """What the audit file says of "process" or "file", and that it says anything."""
    lines = (Path(directory) / "loud" / "audit").read_text().splitlines()
    assert any(line.startswith("file ") for line in lines)
    return [line.partition(" ")[2] for line in lines if line.startswith(f"{kind} ")]


def assert_only_written_below(directory):
    for path in audited(directory, "file"):
        path = urllib.parse.unquote(path.removeprefix("file:")) if path.startswith("file:") else path
        assert path.startswith((f"{directory}/", "/dev/null", "/proc/self/fd/")), path


@pytest.fixture(scope="module", autouse=True)
def _secret_of_the_stand_in():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keycloak_stand_in, "CLIENT_SECRET", SECRET)
        yield


def record_tokens(keycloak):
    """A list to which each token that the stand-in gives out from now on is added."""
    tokens, issue = [], keycloak.issue_token
    keycloak.issue_token = lambda: tokens.append(issue()) or tokens[-1]
    return tokens


# ---- the daemon, from its start to its end


def process_shows(pid):
    """What other users of the host can see of a process, and its environment."""
    parts = [Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ", "status", "comm")]
    return b"\n".join(parts + read_of_threads(pid, "comm"))


def maps_say(daemon):
    """What the maps for administrators answer."""
    questions = [{"alias": "alice@d1.test"}, {"policy": {"protocol_state": "RCPT", "recipient": "alice@d1.test"}}]
    sender = {"protocol_state": "MAIL", "sender": "alice@d1.test", "sasl_username": "alice", "sasl_method": "XOAUTH2"}
    app = {"protocol_state": "MAIL", "sender": "scan@d1.test", "sasl_username": "printer", "sasl_method": "PLAIN"}
    questions += [{"policy": sender}, {"policy": app}]
    answers = [daemon.ask_map("stats *"), *(daemon.ask_map(f"explain {json.dumps(question)}") for question in questions)]
    assert all(answer.startswith("OK {") for answer in answers), answers
    return "\n".join(answers)


def children_of(pid):
    return b"".join(read_of_threads(pid, "children")).decode().split()


@pytest.mark.parametrize("way", ["client_secret", "client_secret_file"])
def test_secrets_stay_hidden_from_start_to_end(make_daemon, keycloak, short_dir, monkeypatch, way):
    secret_file = short_dir / "secret"
    secret_file.write_text(f"{SECRET}\n")
    tokens = record_tokens(keycloak)
    for username, email in USERS.items():
        keycloak.add_user(username, email)
    block = keycloak.config(timeout_seconds=1)
    if way == "client_secret_file":
        del block["client_secret"]
        block["client_secret_file"] = str(secret_file)
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)  # a service manager, which is told how the daemon is
    manager.bind(str(short_dir / "notify"))
    environment = {**loud_environment(short_dir), "NOTIFY_SOCKET": str(short_dir / "notify")}
    daemon = make_daemon(keycloak=block, policy={"cache_ttl_seconds": 0.001}, environment=environment).start()
    daemon.ctl("apps", "add", "printer", TOKEN)
    daemon.ctl("apps", "allow", "printer", "scan@d1.test")

    def ask_everything():
        asked = [daemon.ask(recipient=f"{name}@d1.test") for name in ("alice", "nobody-of-this-name")]
        asked += [daemon.ask(sender="alice@d1.test", sasl_username="alice", sasl_method="XOAUTH2", protocol_state="MAIL")]
        asked += [daemon.ask(sender="scan@d1.test", sasl_username="printer", sasl_method="PLAIN", protocol_state="MAIL")]
        return [*asked, daemon.ask_map("alias alice@d1.test")]

    assert ask_everything() == ["DUNNO", REJECT, "DUNNO", "DUNNO", "NOTFOUND "]
    assert_hidden(process_shows(daemon.process.pid), SECRET, TOKEN, *tokens)
    said = [maps_say(daemon)]
    keycloak.revoke_tokens()
    ask_everything()
    assert len(tokens) >= 2
    for fault in ("status-500", "html", "not-json"):
        keycloak.fault = fault
        ask_everything()
    keycloak.fault = None
    monkeypatch.setattr(keycloak_stand_in, "CLIENT_SECRET", ROTATED_SECRET)
    keycloak.revoke_tokens()
    ask_everything()
    daemon.wait_for_log("token refused (HTTP 401 unauthorized_client)")
    said.append(maps_say(daemon))
    assert "token refused" in said[-1]
    secret_file.write_text(f"{ROTATED_SECRET}\n")
    if way == "client_secret":
        daemon.config["keycloak"]["client_secret"] = ROTATED_SECRET
    daemon.reload()
    wait_until(lambda: ask_everything()[0] == "DUNNO")
    daemon.config["keycloak"]["base_url"] = f"https://mailcloak:{SECRET}@127.0.0.1"
    daemon.reload()
    keycloak.stop()
    ask_everything()
    said.append(maps_say(daemon))
    said.append(daemon.ask_map("flush *"))
    assert children_of(daemon.process.pid) == []
    assert daemon.stop() == 0
    log = daemon.log()
    assert "libraries log at debug level" in log
    assert "Traceback" not in log
    assert "holds the client secret and every user of this host can read it" in log
    hashes = app_hashes(daemon.database)
    manager.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            said.append(manager.recv(4096).decode())
    manager.close()
    assert "STOPPING=1" in said[-1]
    assert_hidden("\n".join(said), SECRET, ROTATED_SECRET, TOKEN, *tokens, *hashes)
    assert_hidden(log, SECRET, ROTATED_SECRET, TOKEN, *tokens, *hashes)
    assert_hidden(files_below(short_dir, but=[daemon.config_path, secret_file]), SECRET, ROTATED_SECRET, TOKEN, *tokens)
    assert audited(short_dir, "process") == []
    assert_only_written_below(short_dir)


def make_certificate(directory, name):
    """(certificate, key) for a server of this name, signed by itself."""
    paths = directory / "cert.pem", directory / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=x", "-addext"]
    command += [f"subjectAltName={name}", "-out", str(paths[0]), "-keyout", str(paths[1])]
    subprocess.run(command, check=True, capture_output=True)
    return paths


@pytest.mark.parametrize(
    ("names", "trusts", "says"),
    [
        (None, False, "directory: realm 'mail': "),
        ("IP:127.0.0.1", False, "certificate refused (self"),
        ("DNS:other.test", True, "certificate refused ("),  # and why, in the words of OpenSSL or, with urllib3 1.26, our own
        ("IP:127.0.0.1", True, ""),
    ],
    ids=["server without TLS", "unknown authority", "other name", "good certificate"],
)
def test_secrets_stay_hidden_over_tls(make_daemon, short_dir, names, trusts, says):
    keycloak = keycloak_stand_in.KeycloakStandIn()
    tokens = record_tokens(keycloak)
    block = {**keycloak.config(timeout_seconds=3), "base_url": keycloak.url.replace("http:", "https:")}
    if names:
        certificate, key = make_certificate(short_dir, names)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        keycloak._server.socket = context.wrap_socket(keycloak._server.socket, server_side=True)
        if trusts:
            block["ca_file"] = str(certificate)
    with keycloak:
        daemon = make_daemon(keycloak=block, environment=loud_environment(short_dir)).start()
        assert daemon.ask(recipient="x@d1.test") == (DEFER if says else REJECT)
        daemon.wait_for_log(says)
        assert daemon.stop() == 0
    assert bool(tokens) == (not says)
    assert "Traceback" not in daemon.log()
    assert_hidden(files_below(short_dir, but=[daemon.config_path]), SECRET, *tokens)


@pytest.mark.real("root")
def test_memory_of_a_daemon_that_gave_up_root_is_open_to_nobody_and_leaves_no_core(make_daemon, short_dir, monkeypatch):
    """Other processes of daemon.user included, since the kernel closes what has changed its user."""
    state = short_dir / "state"
    state.mkdir()
    shutil.chown(state, "nobody")
    monkeypatch.chdir(state)  # where a core would be written
    keycloak = {"base_url": "http://127.0.0.1:9", "realm": "mail", "client_id": "mailcloak", "client_secret": SECRET}
    limits = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (limits[1], limits[1]))
    try:
        daemon = make_daemon(keycloak=keycloak, daemon={"user": "nobody"}, sqlite={"path": str(state / "state.db")}).start()
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, limits)
    pid = daemon.process.pid
    for name in ("environ", "mem", "maps"):
        outcome = as_nobody(Path(f"/proc/{pid}/{name}").read_bytes)
        assert outcome.startswith("PermissionError"), name
    daemon.process.send_signal(signal.SIGABRT)
    daemon.process.wait(10)
    assert_hidden(files_below(short_dir, but=[daemon.config_path]), SECRET)


# ---- Keycloak, or whoever stands in its place, sends the secrets back


def answer(status, body=b"", *headers):
    body = body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Content-Type: application/json", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


ECHOES = {  # what is sent for an answer, made from the secrets
    "400 error": lambda words: answer("400 Bad Request", {"error": words}),
    "401 error": lambda words: answer("401 Unauthorized", {"error": words}),
    "401 error_description": lambda words: answer(
        "401 Unauthorized", {"error": "invalid_client", "error_description": f"Invalid secret: {words}"}
    ),
    "401 header": lambda words: answer("401 Unauthorized", b"", f'WWW-Authenticate: Bearer realm="mail", error="{words}"'),
    "403 body": lambda words: answer("403 Forbidden", {"error": words}),
    "404 body": lambda words: answer("404 Not Found", {"error": words}),
    "500 request echoed": lambda words: answer("500 Internal Server Error", f"POST / HTTP/1.1\r\nAuthorization: {words}\r\n"),
    "500 header": lambda words: answer("500 Internal Server Error", b"", f"X-Request: {words}"),
    "503 reason phrase": lambda words: answer(f"503 {words}"),
    "302 location": lambda words: answer("302 Found", b"", f"Location: /login?{urllib.parse.quote(words)}"),
    "302 location with user": lambda words: answer("302 Found", b"", f"Location: http://{words}@127.0.0.1/"),
    "302 location no URL": lambda words: answer("302 Found", b"", f"Location: http://[{words}/"),
    "200 half JSON": lambda words: answer("200 OK", '{"access_token": "' + words),
    "200 text": lambda words: answer("200 OK", json.dumps(words)),
    "200 list of texts": lambda words: answer("200 OK", [words]),
    "200 HTML": lambda words: answer("200 OK", f"<html>{words}</html>"),
    "200 wrong types": lambda words: answer("200 OK", [{"username": words, "email": [words], "enabled": words}]),
    "200 token with line break": lambda words: answer("200 OK", {"access_token": f"{words}\nX-Y: z", "expires_in": 300}),
    "200 life that is text": lambda words: answer("200 OK", {"access_token": "x", "expires_in": words}),
    "200 life without end": lambda words: answer("200 OK", {"access_token": words.replace(" ", ""), "expires_in": 10**400}),
    "200 number too long": lambda words: answer("200 OK", f'["{words}", {"9" * 5000}]'),
    "200 not UTF-8": lambda words: answer("200 OK", b'["\xff' + words.encode() + b'"]'),
    "200 not gzip": lambda words: answer("200 OK", words, "Content-Encoding: gzip"),
    "200 more than a MiB": lambda words: answer("200 OK", f"{words} " * 20_000),
    "status line": lambda words: f"{words}\r\n\r\n".encode(),
    "protocol version": lambda words: f"HTTP/{words.replace(' ', '')} 200 OK\r\n\r\n".encode(),
    "status no number": lambda words: f"HTTP/1.1 {words.replace(' ', '')}\r\n\r\n".encode(),
    "header without colon": lambda words: f"HTTP/1.1 500 X\r\nContent-Length: 0\r\nno colon\r\nX: {words}\r\n\r\n".encode(),
    "header too long": lambda words: answer("200 OK", b"", "X: " + words * 2000),
    "headers too many": lambda words: answer("200 OK", b"", *[f"X: {words}"] * 150),
    "content length": lambda words: f"HTTP/1.1 200 OK\r\nContent-Length: {words}\r\n\r\n{{}}".encode(),
    "content lengths": lambda words: answer("200 OK", b"", f"Content-Length: 5, {words}"),
    "chunk size": lambda words: f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{words}\r\n\r\n".encode(),
    "transfer encoding": lambda words: answer("200 OK", words, f"Transfer-Encoding: chunked, {words}"),
    "cookie": lambda words: answer("500 X", b"", f"Set-Cookie: a={words}; expires={words}; domain={words}; max-age={words}"),
    "cut off": lambda words: answer("200 OK", f'["{words}').replace(b"Content-Length: ", b"Content-Length: 9"),
    "held": lambda words: answer("200 OK", f'["{words}').replace(b"Content-Length: ", b"Content-Length: 9"),
}


class EchoHandler(keycloak_stand_in._Handler):
    def _misbehave(self, fault):
        keycloak = self.keycloak
        place = "token" if self.command == "POST" else "search"
        if keycloak.echo is None or keycloak.echo_at != place:
            return super()._misbehave(fault)
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.write(ECHOES[keycloak.echo](f"{SECRET} {self.headers.get('Authorization', keycloak.tokens[-1])}"))
            self.wfile.flush()
        keycloak.echoed = True
        if keycloak.echo == "held":
            keycloak.wait(1.5)
        return True


@pytest.fixture(scope="module")
def echoing():
    """A daemon that says all it can, with a stand-in that sends secrets back when told to; one for the module."""
    directory = Path(tempfile.mkdtemp(prefix="mc", dir="/tmp"))
    keycloak = keycloak_stand_in.KeycloakStandIn()
    keycloak._server.RequestHandlerClass = type("Handler", (EchoHandler,), {"keycloak": keycloak})
    keycloak.echo, keycloak.echo_at, keycloak.tokens = None, "", record_tokens(keycloak)
    config = {
        "keycloak": keycloak.config(timeout_seconds=1),
        "policy": {"domain": "d1.test"},
        "sqlite": {"path": str(directory / "state.db")},
        "sockets": {
            "policy_socket": str(directory / "policy"),
            "socketmap_socket": str(directory / "socketmap"),
            "socket_owner_user": "",
            "socket_owner_group": "",
        },
        "daemon": {"user": ""},
    }
    with keycloak:
        daemon = Daemon(directory, config, environment=loud_environment(directory))
        daemon.keycloak, daemon.names = keycloak, (f"stranger{number}@d1.test" for number in itertools.count())
        yield daemon
        daemon.close()
    shutil.rmtree(directory)


@pytest.fixture
def loud_daemon(echoing):
    """The daemon of the module, running, and Keycloak is well."""
    echoing.keycloak.echo = None
    if echoing.process is None or echoing.process.poll() is not None:
        echoing.start()
    wait_until(lambda: echoing.ask(recipient=next(echoing.names)) == REJECT, what="Keycloak is well")
    return echoing


@pytest.mark.parametrize("kind", ECHOES)
def test_keycloak_that_sends_the_secrets_back_brings_none_into_the_log(loud_daemon, kind):
    keycloak, before = loud_daemon.keycloak, len(loud_daemon.log())

    def is_deferred():
        if keycloak.echo_at == "token":
            keycloak.revoke_tokens()  # the probe may have been getting a new one just now
        return loud_daemon.ask(recipient=next(loud_daemon.names)) == DEFER

    for place in ("search", "token"):
        keycloak.echoed, keycloak.echo_at, keycloak.echo = False, place, kind
        wait_until(is_deferred, what=f"a failure of the {place}")
        wait_until(lambda: keycloak.echoed, what=f"echo at the {place}")
        assert_hidden(loud_daemon.ask_map("stats *"), SECRET, *keycloak.tokens)
    keycloak.echo = None
    wait_until(lambda: loud_daemon.ask(recipient=next(loud_daemon.names)) == REJECT, what="end of the outage")
    log = loud_daemon.log()[before:]
    assert " directory: realm 'mail': " in log
    assert "Traceback" not in log
    assert_hidden(log, SECRET, *keycloak.tokens)
    others = files_below(loud_daemon.directory, but=[loud_daemon.config_path, loud_daemon.log_path])
    assert_hidden(others, SECRET, *keycloak.tokens)


def test_error_that_is_a_secret_in_lower_case_is_not_logged_as_an_error_code(make_daemon):
    """What looks like an OAuth error code is shown, so that an administrator knows; that must be none that the server made up."""
    keycloak = keycloak_stand_in.KeycloakStandIn()

    class Handler(keycloak_stand_in._Handler):
        def _misbehave(self, fault):
            if self.command == "POST":
                self._send(401, {"error": LOWER_SECRET})
            return self.command == "POST"

    Handler.keycloak = keycloak
    keycloak._server.RequestHandlerClass = Handler
    with keycloak:
        daemon = make_daemon(keycloak=keycloak.config(client_secret=LOWER_SECRET)).start()
        daemon.wait_for_log("token refused (HTTP 401")
        assert_hidden(daemon.log(), LOWER_SECRET)


# ---- configurations that are wrong

HEAD = "keycloak:\n  base_url: https://sso.example.org\n  realm: mail\n"
S = BARE_SECRET

WRONG_CONFIGS = {
    "another key wrong": f"{HEAD}  client_id: 5\n  client_secret: {S}\n",
    "another block wrong": f"{HEAD}  client_id: mailcloak\n  client_secret: {S}\npolicy: 5\n",
    "key misspelled": f"{HEAD}  client_id: mailcloak\n  client_secrt: {S}\n",
    "key in the wrong block": f"client_secret: {S}\nsqlite:\n  client_secret: {S}\n",
    "placeholder around it": f"{HEAD}  client_id: mailcloak\n  client_secret: <{S}>\n",
    "a list": f"{HEAD}  client_id: mailcloak\n  client_secret: [{S}]\n",
    "a block": f"{HEAD}  client_id: mailcloak\n  client_secret: {{value: {S}}}\n",
    "with a control character": f'{HEAD}  client_id: mailcloak\n  client_secret: "{S}\\a"\n',
    "with a line break": f"{HEAD}  client_id: mailcloak\n  client_secret: |\n    {S}\n",
    "a number": f"{HEAD}  client_id: mailcloak\n  client_secret: 0x{S.encode().hex()}\n",
    "given twice": f"{HEAD}  client_id: mailcloak\n  client_secret: {S}\n  client_secret: {S}\n",
    "secret and file": f"{HEAD}  client_id: mailcloak\n  client_secret: {S}\n  client_secret_file: {S}\n",
    "in place of the block": f"keycloak: {S}\n",
    "block as a list": f"keycloak:\n  - client_secret: {S}\n",
    "block as key=value": f"keycloak:\n  client_secret={S}\n",
    "file is the secret": f"{S}\n",
    "file is a list": f"- client_secret: {S}\n",
    "tab before": f"{HEAD}  client_id: mailcloak\n\tclient_secret: {S}\n",
    "tab after the colon": f"{HEAD}  client_id: mailcloak\n  client_secret:\t{S}\n",
    "tab in it": f'{HEAD}  client_id: mailcloak\n  client_secret: "{S}\t"\n',
    "no space after the colon": f"{HEAD}  client_id: mailcloak\n  client_secret:{S}\n",
    "no space after the colon, last line": f"keycloak:\n  client_secret:{S}\n",
    "no space after the colon, in braces": f"keycloak: {{realm: mail, client_secret:{S}}}\n",
    "no space after the colon, twice": f"keycloak: {{client_secret:{S}, client_secret:{S}}}\n",
    "indented less": f"{HEAD}  client_id: mailcloak\n client_secret: {S}\n",
    "indented more": f"{HEAD}  client_id: mailcloak\n    client_secret: {S}\n",
    "indented more, below an empty key": f"{HEAD}  client_id:\n    client_secret: {S}\n",
    "below an empty number": f"{HEAD}  client_id: x\n  timeout_seconds:\n    client_secret: {S}\n",
    "below an empty choice": f"{HEAD}  client_id: x\npolicy:\n  foreign_sender:\n    client_secret: {S}\n",
    "in a list below an empty key": f"{HEAD}  client_id:\n  - client_secret: {S}\n",
    "in a text of several lines": f"{HEAD}  client_id: |\n    client_secret: {S}\n",
    "behind a quote never closed": f'{HEAD}  client_id: "mailcloak\n  client_secret: {S}\n',
    "behind a quote closed late": f'keycloak:\n  base_url: "https://sso.example.org\n  client_secret: {S}"\n',
    "quote in it": f"{HEAD}  client_id: mailcloak\n  client_secret: '{S}'{S}'\n",
    "unknown escape": f'{HEAD}  client_id: mailcloak\n  client_secret: "{S}\\q{S}"\n',
    "colon in it": f"{HEAD}  client_id: mailcloak\n  client_secret: {S}: {S}\n",
    "begins with @": f"{HEAD}  client_id: mailcloak\n  client_secret: @{S}\n",
    "begins with `": f"{HEAD}  client_id: mailcloak\n  client_secret: `{S}\n",
    "begins with %": f"{HEAD}  client_id: mailcloak\n  client_secret: %{S}\n",
    "begins with *": f"{HEAD}  client_id: mailcloak\n  client_secret: *{S}\n",
    "begins with &": f"{HEAD}  client_id: &{S} x\n  client_secret: &{S} y\n  realm: *{S}z\n",
    "begins with !": f"{HEAD}  client_id: mailcloak\n  client_secret: !{S} x\n",
    "begins with ! and has another": f"{HEAD}  client_id: mailcloak\n  client_secret: !{S}!x\n",
    "begins with !<": f"{HEAD}  client_id: mailcloak\n  client_secret: !<{S}> x\n",
    "begins with |": f"{HEAD}  client_id: mailcloak\n  client_secret: |{S}\n",
    "begins with [": f"{HEAD}  client_id: mailcloak\n  client_secret: [{S}\n",
    "begins with {": f"{HEAD}  client_id: mailcloak\n  client_secret: {{{S}\n",
    "begins with ]": f"{HEAD}  client_id: mailcloak\n  client_secret: ]{S}\n",
    "tagged bool": f"{HEAD}  client_id: mailcloak\n  client_secret: !!bool {S}\n",
    "tagged int": f"{HEAD}  client_id: mailcloak\n  client_secret: !!int {S}\n",
    "tagged float": f"{HEAD}  client_id: mailcloak\n  client_secret: !!float {S}\n",
    "tagged timestamp": f"{HEAD}  client_id: mailcloak\n  client_secret: !!timestamp {S}\n",
    "tagged binary": f"{HEAD}  client_id: mailcloak\n  client_secret: !!binary {S}=\n",
    "tagged set": f"{HEAD}  client_id: mailcloak\n  client_secret: !!set {S}\n",
    "tagged omap": f"{HEAD}  client_id: mailcloak\n  client_secret: !!omap [{S}]\n",
    "tagged pairs": f"{HEAD}  client_id: mailcloak\n  client_secret: !!pairs [{{a: {S}, b: {S}}}]\n",
    "tagged Python": f"{HEAD}  client_id: mailcloak\n  client_secret: !!python/name:{S} x\n",
    "tagged int, empty": f'{HEAD}  client_id: !!int ""\n  client_secret: {S}\n',
    "tagged float, empty": f'{HEAD}  client_id: !!float ""\n  client_secret: {S}\n',
    "merged": f"{HEAD}  client_id: mailcloak\n  <<: {S}\n",
    "a key that is a list": f"{HEAD}  ? [client_secret, {S}]\n  : x\n",
    "control character beside it": f"{HEAD}  client_id: mailcloak\n  client_secret: {S}\x01\n",
    "second document": f"{HEAD}  client_secret: {S}\n---\nclient_secret: {S}\n",
    "in client_secret_file": f"{HEAD}  client_id: mailcloak\n  client_secret_file: {S}\n",
    "in client_secret_file, begins with /": f"{HEAD}  client_id: mailcloak\n  client_secret_file: /{S}\n",
    "in client_secret_file, with / in it": f"{HEAD}  client_id: mailcloak\n  client_secret_file: /{S}/{S}\n",
    **{
        f"in base_url, {name}": f"keycloak:\n  base_url: '{url}'\n  realm: mail\n  client_id: mailcloak\n  client_secret: x\n"
        for name, url in {
            "with user": f"https://mailcloak:{S}@sso.example.org",
            "as user": f"https://{S}@sso.example.org/auth",
            "with user and a path": f"https://mailcloak:{S}@sso.example.org/auth",
            "with / in it": f"https://mailcloak:a/{S}@sso.example.org",
            "with @ in it": f"https://mailcloak:a@{S}@sso.example.org",
            "with ? in it": f"https://mailcloak:a?{S}@sso.example.org",
            "with # in it": f"https://mailcloak:a#{S}@sso.example.org",
            "with space in it": f"https://mailcloak:a {S}@sso.example.org",
            "with [ in it": f"https://mailcloak:[{S}@sso.example.org",
            "in [ ]": f"https://[{S}]@sso.example.org",
            "with a wide question mark": f"https://mailcloak:{S}\uff1f@sso.example.org",
            "without scheme": f"mailcloak:{S}@sso.example.org",
            "with one slash": f"https:/mailcloak:{S}@sso.example.org",
            "with another scheme": f"ftp://mailcloak:{S}@sso.example.org",
            "with a wrong port": f"https://mailcloak:{S}@sso.example.org:port",
        }.items()
    },
}


def rest_of(config):
    """The blocks other than keycloak as YAML, where the text does not bring its own."""
    return lambda text: (
        text
        + yaml.safe_dump({name: block for name, block in config.items() if name != "keycloak" and f"\n{name}:" not in "\n" + text})
    )


def say_in_process(capfd, main, *arguments):
    """(exit code, all output) of a program that runs inside the test, which is quick."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as exc:
        code = exc.code
    return code, "".join(capfd.readouterr())


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_wrong_config_is_refused_without_its_secret(echoing, capfd, tmp_path, name):
    path = tmp_path / "config.yaml"
    path.write_text(rest_of(echoing.config)(WRONG_CONFIGS[name]), encoding="utf-8")
    code, output = say_in_process(capfd, mailcloak.main, "--check-config", path)
    assert code == 78, output
    assert output.startswith("config: ")
    assert_hidden(output, S)
    with pytest.raises(mailcloak.ConfigError) as caught:
        mailcloak.load_config(str(path))
    assert_hidden(f"{caught.value} {caught.value!r} {caught.value.problems} {caught.value.args}", S)


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_mailcloakctl_with_a_wrong_config_shows_no_secret(echoing, capfd, tmp_path, name):
    path = tmp_path / "config.yaml"
    path.write_text(rest_of(echoing.config)(WRONG_CONFIGS[name]), encoding="utf-8")
    for arguments in (("aliases", "list"), ("--json", "apps", "list"), ("aliases", "add", "a@d1.test", "alice", "--force")):
        code, output = say_in_process(capfd, mailcloakctl.main, "--config", path, *arguments)
        assert code in (0, 1)  # it needs but one key of the file
        assert_hidden(output, S)


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_reload_of_a_wrong_config_is_refused_without_its_secret(loud_daemon, name):
    before = len(loud_daemon.log())
    try:
        loud_daemon.config_path.write_text(rest_of(loud_daemon.config)(WRONG_CONFIGS[name]), encoding="utf-8")
        loud_daemon.process.send_signal(signal.SIGHUP)
        wait_until(
            lambda: "daemon: reload" in loud_daemon.log()[before:] or loud_daemon.process.poll() is not None,
            what="end of the reload",
        )
    finally:
        loud_daemon.write_config()
    log = loud_daemon.log()[before:]
    assert loud_daemon.process.poll() is None, log
    assert "daemon: reload refused, the old configuration stays in force" in log
    assert_hidden(log, S)


@pytest.mark.parametrize("way", ["client_secret", "client_secret_file"])
def test_good_config_that_others_can_read_is_warned_about_without_its_secret(echoing, capfd, tmp_path, way):
    path, secret_file = tmp_path / "config.yaml", tmp_path / "secret"
    secret_file.write_text(SECRET)
    value = SECRET if way == "client_secret" else str(secret_file)
    keycloak = {"base_url": "http://sso.example.org", "realm": "mail", "client_id": "mailcloak", way: value}
    path.write_text(yaml.safe_dump({**echoing.config, "keycloak": keycloak}))
    for each in (path, secret_file):
        each.chmod(0o644)
    code, output = say_in_process(capfd, mailcloak.main, "--check-config", path)
    assert code == 0
    assert "every user of this host can read it" in output
    assert "http sends the client secret unencrypted" in output
    assert_hidden(output, SECRET)


def test_program_that_check_config_asks_is_told_no_secret(echoing, tmp_path):
    """postconf is the only program that mailcloak ever starts: it sees its own arguments, and the environment as it was."""
    script, seen = tmp_path / "postconf", tmp_path / "seen"
    script.write_text(f"""#!/bin/sh
        exec >{seen}; echo "$0 $@"; env; ls -l /proc/$$/fd; cat; for descriptor in 3 4 5 6 7 8; do eval "cat <&$descriptor"; done
        """)
    script.chmod(0o755)
    path, secret_file = tmp_path / "config.yaml", tmp_path / "secret"
    secret_file.write_text(SECRET)
    for way, value in (("client_secret", SECRET), ("client_secret_file", str(secret_file))):
        keycloak = {"base_url": "http://sso.example.org", "realm": "mail", "client_id": "mailcloak", way: value}
        path.write_text(yaml.safe_dump({**echoing.config, "keycloak": keycloak}))
        result = subprocess.run(
            [sys.executable, str(ROOT / "mailcloak.py"), "--check-config", str(path)],
            env={**os.environ, **loud_environment(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
        )
        assert f"{script} -xh queue_directory".encode() in seen.read_bytes()
        assert_hidden(result.stdout + result.stderr + seen.read_bytes(), SECRET)
        seen.unlink()
    started = audited(tmp_path, "process")
    assert started
    assert all("postconf" in each for each in started), started
    assert_hidden("\n".join(started), SECRET)


@pytest.mark.parametrize(
    "content", [f"\n{S}", f"{S}\x00", f"{S}\x1b[0m", f"{S}\xff"], ids=["second line", "NUL", "escape", "latin-1"]
)
def test_secret_file_without_a_usable_secret_is_named_and_not_shown(echoing, capfd, tmp_path, content):
    path, secret_file = tmp_path / "config.yaml", tmp_path / "secret-file"
    secret_file.write_bytes(content.encode("latin-1"))
    keycloak = {"base_url": "http://sso.example.org", "realm": "mail", "client_id": "m", "client_secret_file": str(secret_file)}
    path.write_text(yaml.safe_dump({**echoing.config, "keycloak": keycloak}))
    code, output = say_in_process(capfd, mailcloak.main, "--check-config", path)
    assert code == 78
    assert str(secret_file) in output
    assert_hidden(output, S)


# ---- the objects that hold them


def test_no_object_that_holds_a_secret_shows_it(echoing, tmp_path):
    """As a debugger, a log line or an exception that names the object would."""
    (tmp_path / "secret").write_text(SECRET)
    keycloak = {**echoing.config["keycloak"], "client_secret_file": str(tmp_path / "secret"), "base_url": "http://127.0.0.1:9"}
    del keycloak["client_secret"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**echoing.config, "keycloak": keycloak, "sqlite": {"path": str(tmp_path / "state.db")}}))
    config = mailcloak.load_config(str(path))
    assert config.keycloak.client_secret == SECRET
    service = mailcloak.Service(config)
    directory = service.directory._source
    directory._api._token = mailcloak.Token(TOKEN, math.inf, 0.0)
    try:
        objects = [config, config.keycloak, service, service.directory, directory, directory._api, mailcloak.Daemon(config, print)]
        objects += [mailcloak.LiveFacts(service), directory.outage, service.saved, service.store, service.recalled]
        for thing in objects:
            assert_hidden(f"{thing} {thing!r} {[thing]} {thing:}", SECRET, TOKEN)
        with pytest.raises(mailcloak.DirectoryUnavailable) as caught:
            directory.find_users(("email", "x@d1.test"), time.monotonic() + 2)
        error = caught.value
        while error is not None:
            assert_hidden(f"{error} {error!r} {error.args}", SECRET, TOKEN)
            error = error.__cause__
    finally:
        service.directory.close()
        service.saved.close()


@pytest.mark.parametrize(
    "arguments",
    [(f"--client-secret={SECRET}",), ("--client-secret", "/no/such/file", SECRET), (f"--check-config={SECRET}",), (f"-h{SECRET}",)],
    ids=["option that does not exist", "one argument too many", "value for an option without", "behind a letter"],
)
def test_usage_error_of_the_daemon_shows_no_argument(capfd, arguments):
    code, output = say_in_process(capfd, mailcloak.main, *arguments)
    assert code == 64 or (code == 0 and arguments[0].startswith("-h"))  # newer Pythons
    assert output.startswith("usage: ")
    assert_hidden(output, SECRET)


# ---- mailcloakctl and the tokens of apps


def app_hashes(path):
    """Of each app, the parts of its hash that are secret: stored key and server key."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        rows = database.execute("SELECT secret_hash FROM apps").fetchall()
    return [part for (secret_hash,) in rows for part in secret_hash.split(",")[1:]]


@pytest.fixture
def database(tmp_path):
    """An empty database in a folder of its own."""
    path = tmp_path / "db" / "state.db"
    path.parent.mkdir()
    assert mailcloak.prepare_database(str(path), 5) == "created"
    return path


WAYS = {
    "TOKEN": (("printer", TOKEN), None),
    "TOKEN after an option": (("printer", "--json", TOKEN), None),
    "TOKEN after --": (("printer", "--", f"-{TOKEN}"), None),
    "--token-stdin": (("printer", "--token-stdin"), f"{TOKEN}\nsecond line\n"),
    "--token-stdin --json": (("printer", "--token-stdin", "--json"), TOKEN),
    "--generate": (("printer", "--generate"), None),
    "--generate --json": (("printer", "--generate", "--json"), None),
}


@pytest.mark.parametrize("way", WAYS)
def test_token_is_shown_by_generate_once_and_by_nothing_else(database, way):
    """Said, stored and listed; each command in an environment where all libraries say all they can."""
    (arguments, stdin), home = WAYS[way], database.parent
    options = {"env": {**os.environ, **loud_environment(home)}, "cwd": home}
    result = run_ctl("--db", database, "apps", "add", *arguments, **options, **({"input": stdin} if stdin else {}))
    token = TOKEN
    if "--generate" in arguments:
        token = json.loads(result.stdout)["token"] if "--json" in arguments else result.stdout.strip()
        assert len(token) == 43
        assert result.stdout.count(token) == 1
        assert_hidden(result.stdout.replace(token, ""), token)
    else:
        assert_hidden(result.stdout, token)
    assert "libraries log at debug level" in result.stderr
    hashes = app_hashes(database)
    assert len(hashes) == 3
    assert_hidden(result.stderr, token, *hashes)
    result = run_ctl("--db", database, "apps", "list", "--json", **options)
    assert [app["app_id"] for app in json.loads(result.stdout)] == ["printer"]
    assert_hidden(result.stdout + result.stderr, token, *hashes)
    assert_hidden(files_below(home), token)
    assert audited(home, "process") == []
    assert_only_written_below(home)


@pytest.mark.parametrize("as_json", [False, True], ids=["table", "--json"])
def test_no_command_shows_a_token_or_its_hash_later_on(database, capfd, as_json):
    run_ctl("--db", database, "apps", "add", "printer", TOKEN)
    hashes = app_hashes(database)
    for command in (
        "apps list",
        "apps allow printer scan@d1.test",
        "apps set printer --owner alice --expires 90d",
        "apps disable printer",
        "apps enable printer",
        "aliases list",
        "apps list",
        "apps disallow printer scan@d1.test",
        "apps del printer",
    ):
        options = ["--json"] if as_json else []
        code, output = say_in_process(capfd, mailcloakctl.main, "--db", database, *command.split(), *options)
        assert code == 0
        assert_hidden(output, TOKEN, *hashes)


def test_token_from_standard_input_is_in_no_process_list(database):
    command = [sys.executable, str(ROOT / "mailcloakctl.py"), "--db", str(database), "apps", "add", "printer", "--token-stdin"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(TOKEN.encode())  # not yet its end
        process.stdin.flush()
        wait_until(lambda: Path(f"/proc/{process.pid}/wchan").read_text().startswith(("pipe", "anon_pipe", "0")), what="reading")
        assert_hidden(process_shows(process.pid), TOKEN)
        assert children_of(process.pid) == []
        _, said = process.communicate(b"\n", timeout=30)
    assert process.returncode == 0
    assert_hidden(said, TOKEN)


def alias_of_the_app(path, monkeypatch):
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("INSERT INTO aliases (alias_email, username) VALUES ('x@d1.test', 'printer')")


def locked_by_another(path, monkeypatch):
    monkeypatch.setattr(mailcloakcommon, "BUSY_SECONDS", 0.05)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    return other


def of_a_newer_version(path, monkeypatch):
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 99")


def without_its_tables(path, monkeypatch):
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("DROP TABLE app_from")
        database.execute("DROP TABLE apps")


def refusing_each_row(path, monkeypatch):
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TRIGGER t BEFORE INSERT ON apps BEGIN SELECT RAISE(ABORT, 'not today'); END")


def no_database(path, monkeypatch):
    path.write_bytes(b"something else" * 100)


def directory_in_its_place(path, monkeypatch):
    path.unlink()
    path.mkdir()


def folder_missing(path, monkeypatch):
    shutil.rmtree(path.parent)


def as_it_is(path, monkeypatch):
    pass


REFUSALS = {
    "app id is a username": (alias_of_the_app, ("printer", TOKEN)),
    "locked": (locked_by_another, ("printer", TOKEN)),
    "newer version": (of_a_newer_version, ("printer", TOKEN)),
    "tables missing": (without_its_tables, ("printer", TOKEN)),
    "row refused": (refusing_each_row, ("printer", TOKEN)),
    "no database": (no_database, ("printer", TOKEN)),
    "directory": (directory_in_its_place, ("printer", TOKEN)),
    "folder missing": (folder_missing, ("printer", TOKEN)),
    "owner impossible": (as_it_is, ("printer", TOKEN, "--owner", "a\a")),
    "expiry impossible": (as_it_is, ("printer", TOKEN, "--expires", "soon")),
    "expiry past": (as_it_is, ("printer", TOKEN, "--expires", "2001-01-01")),
    "app id impossible": (as_it_is, ("my printer", TOKEN)),
    "token and app id exchanged": (as_it_is, (TOKEN, "printer")),
    "control character": (as_it_is, ("printer", TOKEN + "\x1b")),
    "line break": (as_it_is, ("printer", TOKEN + "\n")),
    "not UTF-8": (as_it_is, ("printer", TOKEN + "\udcff")),
    "not Unicode": (as_it_is, ("printer", TOKEN + "\ud800")),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_token_is_not_shown(database, monkeypatch, capfd, name):
    prepare, arguments = REFUSALS[name]
    holder = prepare(database, monkeypatch)
    code, output = say_in_process(capfd, mailcloakctl.main, "--db", database, "apps", "add", *arguments)
    if holder:
        holder.close()
    assert code == 1, output
    assert output.startswith(("mailcloakctl: ", "warning: "))
    assert_hidden(output, TOKEN)


@pytest.mark.parametrize(
    ("stdin", "code"),
    [(TOKEN.encode() + b"\xff\n", 1), (TOKEN.encode() + b"\x00\n", 1), (TOKEN[:12].encode() + b"\r\n", 0)],
    ids=["not UTF-8", "NUL", "short"],
)
def test_doubtful_token_from_standard_input_is_not_shown(database, monkeypatch, capfd, stdin, code):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    result, output = say_in_process(capfd, mailcloakctl.main, "--db", database, "apps", "add", "printer", "--token-stdin")
    assert result == code
    assert_hidden(output, TOKEN)


GOOD_ARGUMENTS = {
    "address": "info@d1.test",
    "addresses": "info@d1.test",
    "users": "alice",
    "username": "alice",
    "app_id": "printer",
    "glob": "*@d1.test",
    "old_user": "alice",
    "new_user": "bob",
    "file": "/absent/aliases.csv",
    "source": "/absent/shared.db",
}
# Those without a verb, such as flush ADDRESS, and those that take several addresses may take the word for an address, and name it.
COMMANDS = [(noun, verb) for noun, verbs in mailcloakctl.COMMANDS.items() for verb in verbs if verb]


@pytest.mark.parametrize(("noun", "verb"), COMMANDS, ids=[" ".join(command) for command in COMMANDS])
@pytest.mark.parametrize("token", [TOKEN.replace(" ", ""), BARE_SECRET], ids=["odd token", "plain token"])
def test_usage_error_shows_no_token(capfd, tmp_path, noun, verb, token):
    """Whatever the mistake: an argument too many, an option that takes no value or does not exist, a word in the wrong place."""
    arguments = [GOOD_ARGUMENTS[argument.strip("[]")] for argument in mailcloakctl.COMMANDS[noun][verb].arguments]
    good = [noun, verb, *arguments]
    adds_token = (noun, verb) == ("apps", "add")
    takes_more = bool({"addresses", "users"} & set(mailcloakctl.COMMANDS[noun][verb].arguments))
    mistakes = [
        *([] if takes_more else [[*good, token, "too many"] if adds_token else [*good, token], [*good, "too many", token]]),
        [*good, f"--token={token}"],
        [*good, "--token", token, token],
        [*good, f"--token-stdin={token}"],
        [*good, f"--password={token}"],
        [*good, "--password", token],
        [*good, f"--json={token}"],
        [*good, f"--generate={token}"],
        [*good, f"--={token}"],
        [*good, f"-{token}"],
        [*good, f"-h{token}"],
        [f"-{token}", *good],
        [f"--token={token}", *good],
        [f"--json={token}", *good],
        [noun, f"-h{token}", verb],
        [noun, token],
        [noun, token, verb],
        [token, *good],
        [verb, noun, token],
    ]
    if adds_token:
        mistakes += [[*good, token, "--generate"], [*good, "--generate", token], [*good, token, "--token-stdin"]]
    for mistake in mistakes:
        code, output = say_in_process(capfd, mailcloakctl.main, "--db", tmp_path / "state.db", *mistake)
        asks_for_help = any(argument.startswith("-h") for argument in mistake)  # for newer Pythons -hTOKEN is -h
        assert code == 2 or (code == 0 and asks_for_help), mistake
        assert output.startswith("usage: mailcloakctl")
        assert_hidden(output, token)
    assert not (tmp_path / "state.db").exists()
