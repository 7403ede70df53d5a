"""Fixtures: a short directory for sockets, a stand-in for Keycloak, a running daemon, a client for each protocol, a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import pty
import pwd
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections import defaultdict
from fcntl import ioctl
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path.name for path in ROOT.glob("mailcloak*.py"))
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # with it each run of mailcloakctl would compile mailcloak.py again

from ctl_server import CtlServer  # noqa: E402
from keycloak_stand_in import KeycloakStandIn  # noqa: E402

import mailcloak  # noqa: E402

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no mistake
hypothesis.settings.load_profile("untimed")

MAY_LACK = {"litestream", "moto"}  # also with CI set: not every machine reaches the Go module proxy
# What a test marked real(NAME) needs: the programs, and the packages that bring them.
REAL_SERVERS = {
    "postfix": ("postfix", "postfix"),
    "dovecot": ("dovecot doveadm", "dovecot-core dovecot-imapd dovecot-lmtpd dovecot-sqlite"),
    "keycloak": ("java mvn", "default-jre-headless maven"),
    "slapd": ("slapd slapadd", "slapd"),
    "ldapsearch": ("ldapsearch", "ldap-utils"),
    "strace": ("strace", "strace"),
    "litestream": ("litestream", ""),
    "moto": ("/usr/local/bin/moto_server", ""),  # of make real-servers: one of before 5.2.5 refuses good signatures
    "openrc": ("rc-service supervise-daemon", "openrc"),
    "systemd": ("systemd-socket-activate systemd-analyze", "systemd"),
    "mandoc": ("mandoc", "mandoc"),
    "zsh": ("zsh", "zsh"),
    "make": ("make", "make"),
    "deb": (
        "dpkg-buildpackage dh dh_python3 lintian",
        "build-essential debhelper dh-python lintian python3 python3-yaml python3-requests",
    ),
    "apparmor": ("apparmor_parser", "apparmor"),
    "checkmodule": ("checkmodule", "checkpolicy"),
    "debootstrap": ("debootstrap", "debootstrap"),
    "root": ("", ""),
}


# The modules whose outcome a version of Python or of a library can change. What is left to the one full run: documents, man pages,
# completions, doctor, installing, and what asks the same code again with more data.
EVERY_PYTHON = (
    *("addresses", "cache", "clients", "config", "database", "hostile_streams", "keycloak", "lifecycle", "mailcloakctl"),
    *("maps", "policy_decisions", "recalled", "sockets", "status", "wire"),
)

SHARED_KEYCLOAK, GROUPS = "keycloak", "groups"  # what pytest-xdist's workers share: where it runs, which tests stay together


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also run the tests that take long, as with CI set")
    parser.addoption("--every-python", action="store_true", help="run the modules alone that are worth running on each Python")


def _find_program(name):
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/local/bin")


def _needs(item, server):
    return any(server in marker.args for marker in item.iter_markers("real"))


def _lacks(item):
    """(what, how to get it) of the first thing that the test needs and that is not here; None if nothing is lacking."""
    for marker in item.iter_markers("real"):
        for name in marker.args:
            programs, package = REAL_SERVERS[name]
            if name == "root" and os.geteuid() != 0:
                return name, "run the tests as root"
            if not all(map(_find_program, programs.split())):
                return name, "make real-servers" + (f", or: apt-get install {package}" if package else "")
    return None


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config, items):
    _leave_out(config, items)
    if hasattr(config, "workerinput"):
        groups = _find_groups(items)
        items.sort(key=lambda item: _rank(item, item.nodeid in groups))
        once_for_all(config, GROUPS, lambda: groups)


def _rank(item, is_grouped):
    """Tests of a lower rank begin earlier: what takes long, so that no worker is left with it at the end."""
    has = item.get_closest_marker
    return bool(has("alone")), not has("long"), not is_grouped, not _needs(item, "keycloak")


@pytest.hookimpl(hookwrapper=True, tryfirst=True)  # before pytest-timeout looks at its clock
def pytest_runtest_protocol(item):
    """A test marked alone waits until pytest-xdist's other workers have ended theirs, and they wait for it."""
    if not hasattr(item.config, "workerinput"):
        yield
        return
    folder, alone = Path(item.config.workerinput["shared_folder"]), item.get_closest_marker("alone")
    with open(folder / "gate", "w") as gate, open(folder / "running", "w") as running_tests:
        fcntl.flock(gate, fcntl.LOCK_EX)  # who waits here for the others keeps new ones out
        fcntl.flock(running_tests, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        if not alone:
            fcntl.flock(gate, fcntl.LOCK_UN)
        yield


def _find_groups(items):
    """Which tests stay together in one of pytest-xdist's workers: {test: group}.

    They are those with one xdist_group, and those that use a fixture of their whole module, so that it is made once. A fixture of
    the whole session is made in each worker that needs it, or shared by all with once_for_all().
    """
    shared, together = {}, {}  # the fixtures that a test shares with others; a fixture, and all that must be in the same worker
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs.items()
        names = {f"{item.module.__name__}.{name}" for name, found in fixtures if found[-1].scope == "module" and name[0] != "_"}
        names.update(marker.args[0] for marker in item.iter_markers("xdist_group"))
        shared[item.nodeid] = names
        all_names = names.union(*(together.get(name, ()) for name in names))
        together.update(dict.fromkeys(all_names, all_names))
    return {test: min(together[min(names)]) for test, names in shared.items() if names}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """In place of --dist loadgroup, which does nothing with pytest 9.2 (pytest-xdist's issue 1386) and renames tests with others."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        groups = None

        def _split_scope(self, nodeid):
            if self.groups is None:  # all workers have collected by now
                self.groups = json.loads((Path(config.shared_folder) / GROUPS).read_text())
            return self.groups.get(nodeid, nodeid)

    config.option.loadscopereorder = False  # the order is that of pytest_collection_modifyitems
    return GroupScheduling(config, log)


def _leave_out(config, items):
    """Take out what cannot run here, or takes long; where CI is set everything stays, and fails where something is lacking."""
    config.left_out = []
    if config.getoption("--every-python"):
        other = [item for item in items if item.module.__name__.removeprefix("test_") not in EVERY_PYTHON]
        items[:] = [item for item in items if item not in set(other)]
        config.hook.pytest_deselected(items=other)
        missing = [name for name in EVERY_PYTHON if not (ROOT / "tests" / f"test_{name}.py").exists()]
        if missing:
            raise pytest.UsageError(f"EVERY_PYTHON in conftest.py names modules that are not there: {missing}")
    kept, deselected = [], []
    for item in items:
        lacks = _lacks(item)
        if os.environ.get("CI") and not (lacks and lacks[0] in MAY_LACK):
            kept.append(item)
            continue
        if not lacks and item.get_closest_marker("long") and not config.getoption("--long"):
            lacks = "long", "takes long: make test PYTEST_OPTIONS=--long, or set CI"
        if lacks:
            config.left_out.append((f"needs {lacks[0]}: {lacks[1]}", item.nodeid))
        (deselected if lacks else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=deselected)


def pytest_runtest_setup(item):
    lacks = _lacks(item)
    if lacks:
        pytest.fail(f"{lacks[0]} is missing and CI is set: {lacks[1]}", pytrace=False)


def pytest_sessionfinish(session):
    if ctl_server.cache_info().currsize:
        ctl_server().close()
    if hasattr(session.config, "workeroutput"):  # one of pytest-xdist's workers, each of which has collected the same
        session.config.workeroutput["left_out"] = session.config.left_out


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    if hasattr(node, "workeroutput"):  # not of a worker that has crashed
        node.config.left_out = [tuple(each) for each in node.workeroutput.get("left_out", ())]


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """A folder for what pytest-xdist's workers share."""
    if not hasattr(node.config, "shared_folder"):
        node.config.shared_folder = tempfile.mkdtemp(prefix="mc", dir="/tmp")
    node.workerinput["shared_folder"] = node.config.shared_folder


def pytest_unconfigure(config):
    """When all workers are gone, the end of what they shared."""
    folder = getattr(config, "shared_folder", None)
    if folder:
        for path in Path(folder).glob(SHARED_KEYCLOAK):
            from real.keycloak import PrivateKeycloak

            PrivateKeycloak(**json.loads(path.read_text())).close()
        shutil.rmtree(folder)


def once_for_all(config, name, make):
    """What make() returns, made once for all of pytest-xdist's workers; it must be of JSON."""
    if not hasattr(config, "workerinput"):
        return make()
    path = Path(config.workerinput["shared_folder"]) / name
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            path.write_text(json.dumps(make()))
        return json.loads(path.read_text())


def pytest_terminal_summary(terminalreporter, config):
    """What did not run, by name, and how to make it run."""
    left_out = defaultdict(list)
    for reason, test in getattr(config, "left_out", ()):
        left_out[reason].append(test)
    if left_out:
        terminalreporter.section("not run")
    for reason, tests in sorted(left_out.items()):
        terminalreporter.write_line(f"{len(tests)} tests, {reason}")
        for test in sorted(tests):
            terminalreporter.write_line(f"    {test}")


class Clock:
    """In place of time.monotonic, moved by the test."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def wait_until(condition, seconds=10.0, what="condition"):
    """The condition's first true value; fails the test after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"{what} not met within {seconds} s")
        time.sleep(0.01)


@contextlib.contextmanager
def running(server):
    """A server of any kind, started; closed at the end, also where it did not start."""
    try:
        yield server.start()
    finally:
        server.close()


@contextlib.contextmanager
def short_directory():
    """A directory whose path leaves room in sun_path, whatever the test's name; other users may look into it."""
    path = tempfile.mkdtemp(prefix="mc", dir="/tmp")
    os.chmod(path, 0o755)
    try:
        yield Path(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(autouse=True)
def unblock_signals():
    """mailcloakcommon.commit() leaves them blocked, which processes that are started later would inherit."""
    yield
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})


@pytest.fixture
def short_dir():
    """A short_directory() for one test."""
    with short_directory() as path:
        yield path


@pytest.fixture
def keycloak():
    """A stand-in for Keycloak on a free port."""
    with KeycloakStandIn() as stand_in:
        yield stand_in


class Certificate(NamedTuple):
    file: str
    context: ssl.SSLContext


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A certificate of its own authority for 127.0.0.1, and the context of a server that has it."""
    folder = tmp_path_factory.mktemp("tls")
    key, file = folder / "key.pem", folder / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    subprocess.run(
        [*command, "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(file)],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, key)
    return Certificate(str(file), context)


@pytest.fixture(scope="session")
def real_keycloak(pytestconfig):
    """A real Keycloak for the whole run, one for all of pytest-xdist's workers; each module makes its own realms."""
    from real.keycloak import PrivateKeycloak

    def start():
        server = PrivateKeycloak()
        try:
            return server.start().description()
        except BaseException:
            server.close()
            raise

    if hasattr(pytestconfig, "workerinput"):
        yield PrivateKeycloak(**once_for_all(pytestconfig, SHARED_KEYCLOAK, start))  # its end: pytest_unconfigure
    else:
        with running(PrivateKeycloak()) as server:
            yield server


@pytest.fixture(params=["daemon-running", "daemon-stopped"])
def daemon_state(request, host):
    """For a module with a mail host as its fixture: Dovecot checks apps by itself, with mailcloak or without."""
    if request.param == "daemon-stopped":
        host.daemon.stop()
    yield request.param
    if host.daemon.process.poll() is not None:
        host.daemon.start()


class PolicyClient:
    """A connection of the policy protocol, kept open from request to request as Postfix does."""

    def __init__(self, path, timeout=20):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout)
        self.socket.connect(str(path))
        self.buffer = b""

    def send(self, **attributes):
        attributes = {"request": "smtpd_access_policy", "protocol_state": "RCPT", **attributes}
        data = "".join(f"{name}={value}\n" for name, value in attributes.items()) + "\n"
        self.send_bytes(data.encode("utf-8", "surrogateescape"))

    def send_bytes(self, data):
        self.socket.sendall(data)

    def receive(self):
        """The next action, or None when the daemon closed the connection."""
        while b"\n\n" not in self.buffer:
            if not self._read_more():
                return None
        answer, _, self.buffer = self.buffer.partition(b"\n\n")
        assert answer.startswith(b"action=")
        return answer[len(b"action=") :].decode()

    def _read_more(self):
        """More into the buffer; False when the daemon closed the connection."""
        try:
            data = self.socket.recv(65536)
        except ConnectionResetError:
            return False
        if not data:
            assert not self.buffer, f"half an answer: {self.buffer!r}"
            return False
        self.buffer += data
        return True

    def ask(self, **attributes):
        self.send(**attributes)
        return self.receive()

    def close(self):
        self.socket.close()


class SocketmapClient(PolicyClient):
    """A connection of the socketmap protocol."""

    def send(self, query):
        data = query.encode("utf-8", "surrogateescape")
        self.send_bytes(b"%d:%s," % (len(data), data))

    def receive(self):
        while True:
            digits, colon, rest = self.buffer.partition(b":")
            if colon and len(rest) > int(digits):
                break
            if not self._read_more():
                return None
        length = int(digits)
        assert rest[length : length + 1] == b","
        self.buffer = rest[length + 1 :]
        return rest[:length].decode()

    def ask(self, query):
        self.send(query)
        return self.receive()


# Not mailcloak.py itself, which Python would compile at each start: that is most of the start.
START_DAEMON = "import sys; sys.path.insert(0, sys.argv.pop(1)); import mailcloak; sys.exit(mailcloak.main())"


class Daemon:
    """mailcloak.py as a process of its own, with its config, sockets and log in one directory."""

    def __init__(self, directory, config, python=sys.executable, level="debug", environment=None):
        self.directory = Path(directory)
        self.config_path = self.directory / "config.yaml"
        self.config = {**config, "daemon": {"log_level": level, **config.get("daemon", {})}}
        self.log_path = self.directory / "log"
        self.process = None
        self._command = [python, "-c", START_DAEMON, str(ROOT), "--config", str(self.config_path)]
        self._environment = {**os.environ, **(environment or {})}
        self._clients = []

    @property
    def database(self):
        return Path(self.config["sqlite"]["path"])

    def write_config(self):
        self.config_path.write_text(yaml.safe_dump(self.config, allow_unicode=True), encoding="utf-8")

    def launch(self):
        """Start the process without waiting for it to be ready."""
        self.write_config()
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(self._command, stderr=log, stdout=log, stdin=subprocess.DEVNULL, env=self._environment)
        return self

    def start(self):
        """Start the process and wait until it serves."""
        already = self.log().count("daemon: started")
        self.launch()
        wait_until(
            lambda: self.process.poll() is not None or self.log().count("daemon: started") > already, what="start of the daemon"
        )
        assert self.process.poll() is None, self.log()
        return self

    def log(self):
        """With all that the daemon has said so far."""
        self.await_log()
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def await_log(self):
        """A thread of the daemon writes the log: all is written when none has had work for longer than it gathers lines."""
        looked_at = worked_at = time.monotonic()
        end = looked_at + 1
        while self.process and looked_at < min(end, worked_at + 2 * mailcloak.LOG_GATHER_SECONDS):
            time.sleep(0.001)
            looked_at = time.monotonic()
            worked_at = looked_at if self._is_at_work() else worked_at

    def _is_at_work(self):
        return any(status.rpartition(b")")[2].split()[0] in (b"R", b"D") for status in read_of_threads(self.process.pid, "stat"))

    def wait_for_log(self, text, seconds=10.0):
        wait_until(lambda: text in self.log(), seconds, what=f"log line with {text!r}")

    def policy(self, **options):
        client = PolicyClient(self.config["sockets"]["policy_socket"], **options)
        self._clients.append(client)
        return client

    def socketmap(self, **options):
        client = SocketmapClient(self.config["sockets"]["socketmap_socket"], **options)
        self._clients.append(client)
        return client

    def ask(self, **attributes):
        """One question over a policy connection of its own."""
        with contextlib.closing(PolicyClient(self.config["sockets"]["policy_socket"])) as client:
            return client.ask(**attributes)

    def ask_map(self, query):
        """One query over a socketmap connection of its own."""
        with contextlib.closing(SocketmapClient(self.config["sockets"]["socketmap_socket"])) as client:
            return client.ask(query)

    def ctl(self, *arguments, check=True, **options):
        """mailcloakctl.py on this daemon's database."""
        return run_ctl("--db", str(self.database), *arguments, check=check, **options)

    def reload(self):
        self.write_config()
        already = self.log().count("daemon: reload")
        self.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self.log().count("daemon: reload") > already, what="reload")

    def stop(self, seconds=10):
        """SIGTERM, then the exit code."""
        self.process.terminate()
        return self.process.wait(seconds)

    def close(self):
        for client in self._clients:
            client.close()
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def read_of_threads(pid, name):
    """The files /proc/PID/task/*/NAME, as bytes; a thread or process that ends meanwhile is left out."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob(f"*/{name}"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.append(path.read_bytes())
    return found


def in_own_dev(command, syslog_path=None):
    """The command with a /dev of its own, whatever this host logs to: /dev/log leads to that socket, or is not there. As root."""
    link = f"ln -s {syslog_path} /dev/log &&" if syslog_path else ""
    devices = "mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9"
    # what is mounted now stays here; in a chroot, as of tests/real/debian13, / itself may be no mount
    private = "{ mount --make-rprivate / 2>/dev/null || mount --make-private /dev; }"
    script = f'{private} && mount -t tmpfs tmpfs /dev && {devices} && {link} exec "$@"'
    return ["unshare", "--mount", "--propagation", "unchanged", "sh", "-c", script, "sh", *command]


def as_nobody(function):
    """What function() returns or raises, as text, in a process without privileges."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.setgroups([])
            os.setgid(nobody.pw_gid)
            os.setuid(nobody.pw_uid)
        try:
            text = str(function())
        except Exception as exc:
            text = f"{type(exc).__name__}: {exc}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader) as pipe:
        return pipe.read()


def run_ctl(*arguments, check=True, **options):
    """mailcloakctl, with the options of subprocess.run(); in a process of its own where there are more than input and text."""
    run = run_ctl_in_fork if options.keys() <= {"input", "text"} else run_ctl_process
    result = run(*map(str, arguments), **options)
    if check:
        assert result.returncode == 0, result.stderr
    return result


def run_ctl_process(*arguments, **options):
    """mailcloakctl.py as people run it."""
    command = [sys.executable, str(ROOT / "mailcloakctl.py"), *arguments]
    options = {"capture_output": True, "text": True, "timeout": 60, **options}
    if "input" not in options:
        options["stdin"] = subprocess.DEVNULL
    return subprocess.run(command, check=False, **options)


ctl_server = functools.cache(CtlServer)


def run_ctl_in_fork(*arguments, input="", text=True):
    """The same without Python's start, see ctl_server.py."""
    with contextlib.ExitStack() as stack:
        stdin, stdout, stderr = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        stdin.write(input.encode() if text else input)
        stdin.seek(0)
        code = ctl_server().run(arguments, stdin=stdin, stdout=stdout, stderr=stderr, timeout=60)
        outputs = []
        for file in (stdout, stderr):
            file.seek(0)
            outputs.append(file.read().decode() if text else file.read())
    return subprocess.CompletedProcess(["mailcloakctl", *arguments], code, *outputs)


class Terminal:
    """mailcloakctl.py on a terminal of its own, of a size of its own."""

    def __init__(self, *arguments, columns=80, rows=24, **environment):
        self.output = ""
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in the background
            ioctl(0, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
            inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
            command = [sys.executable, str(ROOT / "mailcloakctl.py"), *map(str, arguments)]
            # not os.execv, which would also hand on what readline has put into the C library's own environment: COLUMNS
            os.execve(command[0], command, {**inherited, "TERM": "xterm", **environment})

    def read_until(self, is_enough, seconds=30):
        """All that was shown, when it is enough or the command has ended."""
        deadline = time.monotonic() + seconds
        while not is_enough(self.output):
            assert select.select([self._terminal], [], [], max(0.0, deadline - time.monotonic()))[0], self.output
            try:
                data = os.read(self._terminal, 65536)
            except OSError:  # EIO: the other side is closed
                data = b""
            if not data:
                break
            self.output += data.decode()
        return self.output.replace("\r\n", "\n")

    def expect(self, text):
        """Read until the text has come, once more than before."""
        start = len(self.output)
        self.read_until(lambda output: text in output[start:])
        assert text in self.output[start:], self.output

    def type(self, text):
        os.write(self._terminal, text.encode())

    def end(self):
        """(exit code, all that was shown)."""
        shown = self.read_until(lambda _: False)
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1]), shown


def config_in(directory, **blocks):
    """A configuration for a daemon in this directory; blocks given are merged over the defaults, None takes a block out."""
    config = {
        "policy": {"domain": ["d1.test", "d2.test"], "recipient_delimiter": "+"},
        "sqlite": {"path": str(directory / "state.db")},
        "sockets": {
            "policy_socket": str(directory / "policy"),
            "socketmap_socket": str(directory / "socketmap"),
            "socket_owner_user": pwd.getpwuid(os.geteuid()).pw_name,
            "socket_owner_group": "",
        },
        "daemon": {"user": ""},
    }
    for name, block in blocks.items():
        if isinstance(block, dict) and name != "static_users":
            config[name] = {**config.get(name, {}), **block}
        else:
            config[name] = block
    return {name: block for name, block in config.items() if block is not None}


@pytest.fixture
def make_config(short_dir):
    """A factory of configurations for daemons in short_dir."""
    return functools.partial(config_in, short_dir)


@pytest.fixture
def make_daemon(short_dir, make_config):
    """A factory of daemons, not started yet; all are ended after the test."""
    daemons = []

    def make(level="debug", environment=None, python=sys.executable, **blocks):
        daemon = Daemon(short_dir, make_config(**blocks), level=level, environment=environment, python=python)
        daemons.append(daemon)
        return daemon

    yield make
    for daemon in daemons:
        daemon.close()


USERS = {"alice": "alice@d1.test", "bob": "bob@d1.test", "carol": "carol@d2.test"}


@pytest.fixture
def static_daemon(make_daemon):
    """A running daemon on static_users: alice, bob, carol."""
    return make_daemon(static_users=USERS).start()


@pytest.fixture
def keycloak_daemon(make_daemon, keycloak):
    """A running daemon that asks the stand-in, which knows alice, bob and carol."""
    for username, email in USERS.items():
        keycloak.add_user(username, email)
    return make_daemon(keycloak=keycloak.config()).start()
