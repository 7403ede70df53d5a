"""The systemd units: what they say fits the daemon; sockets that are handed over, and what the daemon tells the service manager."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import yaml
from conftest import ROOT, USERS, Daemon, wait_until

import mailcloak

UNITS = ROOT / "systemd"
SERVICE, SOCKETS = UNITS / "mailcloak.service", (UNITS / "mailcloak.socket", UNITS / "mailcloak-socketmap.socket")
PROGRAM = "/usr/local/sbin/mailcloak"


def settings(path):
    """The unit's settings, each with all values it is given, in order."""
    found = {}
    for line in path.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith(("#", "[")):
            found.setdefault(name, []).append(value)
    return found


def setting(path, name):
    (value,) = settings(path)[name]
    return value


# ---- what the units say


def test_socket_units_are_those_of_the_configuration_sample():
    sample = yaml.safe_load((ROOT / "config.yaml.sample").read_text(encoding="utf-8"))["sockets"]
    assert {setting(path, "FileDescriptorName"): setting(path, "ListenStream") for path in SOCKETS} == {
        "policy": sample["policy_socket"],
        "socketmap": sample["socketmap_socket"],
    }


@pytest.mark.parametrize("path", SOCKETS, ids=lambda path: path.stem)
def test_socket_unit_has_the_defaults_of_the_daemon(path):
    defaults = {
        field: mailcloak.SocketsConfig.__dataclass_fields__[field].default for field in mailcloak.SocketsConfig.__dataclass_fields__
    }
    assert setting(path, "SocketUser") == defaults["socket_owner_user"]
    assert setting(path, "SocketGroup") == defaults["socket_owner_group"]
    assert setting(path, "SocketMode") == defaults["socket_mode"]
    assert int(setting(path, "Backlog")) == mailcloak.LISTEN_BACKLOG
    assert setting(path, "AssertPathIsDirectory") == os.path.dirname(setting(path, "ListenStream"))


def test_service_takes_both_sockets_and_has_room_for_all_connections():
    connections = mailcloak.DaemonConfig().max_connections
    soft, hard = map(int, setting(SERVICE, "LimitNOFILE").split(":"))
    assert soft >= mailcloak.SPARE_FILES + 2 * connections
    assert hard > soft
    assert int(setting(SERVICE, "TasksMax")) >= 2 * connections + 100
    assert setting(SERVICE, "Sockets").split() == [path.name for path in SOCKETS]
    assert float(setting(SERVICE, "TimeoutStopSec")) > mailcloak.SHUTDOWN_TOTAL_SECONDS + 2


def test_service_keeps_its_state_where_the_daemon_looks_and_runs_as_its_user():
    assert f"/var/lib/{setting(SERVICE, 'StateDirectory')}" == os.path.dirname(mailcloak.DEFAULT_DATABASE_PATH)
    assert setting(SERVICE, "User") == setting(SERVICE, "Group") == mailcloak.DaemonConfig().user
    sysusers = [line.split()[:2] for line in (UNITS / "mailcloak.sysusers").read_text().splitlines() if not line.startswith("#")]
    assert sysusers == [["u", mailcloak.DaemonConfig().user]]


def test_daemon_reports_to_the_watchdog_well_before_systemd_loses_patience():
    """A server is seen at work every POLL_SECONDS, unless it waits for room. systemd ends a daemon that hangs by SIGABRT."""
    assert (setting(SERVICE, "LimitCORE"), setting(SERVICE, "Environment")) == ("0", "PYTHONFAULTHANDLER=1")
    assert float(setting(SERVICE, "WatchdogSec")) / 2 > 10 * (mailcloak.POLL_SECONDS + mailcloak.ROOM_SECONDS)


def test_reload_checks_the_configuration_first():
    assert settings(SERVICE)["ExecReload"] == [f"{PROGRAM} --check-config", "/bin/kill -HUP $MAINPID"]


@pytest.fixture
def units(tmp_path):
    """The units with a program that is there, in place of ours and of what the smallest system lacks (/bin/kill, of procps)."""
    for path in (SERVICE, *SOCKETS):
        (tmp_path / path.name).write_text(path.read_text().replace(PROGRAM, "/bin/true").replace("/bin/kill", "/bin/true"))
    return tmp_path


def analyze(*words):
    return subprocess.run(["systemd-analyze", *map(str, words)], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.real("systemd")
@pytest.mark.parametrize("drop_in", [None, "without-sockets.conf"], ids=["as-it-is", "without-sockets"])
def test_systemd_understands_every_line_of_the_units(units, drop_in):
    if drop_in:
        (units / "mailcloak.service.d").mkdir()
        (units / "mailcloak.service.d" / drop_in).write_text((UNITS / drop_in).read_text().replace(PROGRAM, "/bin/true"))
    result = analyze("verify", "--man=no", units / SERVICE.name, *(units / path.name for path in SOCKETS))
    said = [line for line in result.stderr.splitlines() if "mailcloak" in line]  # faults in other units of this host are not ours
    assert (result.returncode, said) == (0, [])


@pytest.mark.real("systemd")
def test_unit_explains_what_systemd_finds_fault_with(units):
    result = analyze("security", "--offline=true", "--json=short", units / SERVICE.name)
    comments = "".join(line for line in SERVICE.read_text().splitlines() if line.startswith("#"))
    faults = {entry["name"]: float(entry["exposure"]) for entry in json.loads(result.stdout) if float(entry["exposure"] or 0)}
    assert faults, result.stdout
    assert [name for name in faults if not re.search(rf"{re.escape(name)}(,| {{2,}})", comments)] == []
    assert sum(faults.values()) <= 1.6


# ---- the sandbox: what the daemon does is among what the unit lets it do


def allowed_system_calls(path):
    """Names that pass the unit's SystemCallFilter, with each group of it written out."""
    groups, name = {}, ""
    for line in analyze("syscall-filter").stdout.splitlines():
        word = line.strip()
        if line.startswith("@"):
            name = word
        elif word and not word.startswith("#"):
            groups.setdefault(name, []).append(word)

    def expand(word):
        return {each for part in groups[word] for each in expand(part)} if word.startswith("@") else {word}

    allowed = set()
    for value in settings(path)["SystemCallFilter"]:
        named = {each for word in value.lstrip("~").split() for each in expand(word)}
        allowed = set() if not value else allowed - named if value.startswith("~") else allowed | named
    return allowed


@pytest.mark.real("root", "systemd", "strace")
@pytest.mark.parametrize("unit", ["mailcloak.service", "without-sockets.conf"])
def test_daemon_uses_no_system_call_that_its_unit_forbids(activated, keycloak, unit):
    keycloak.add_user("alice", "alice@d1.test")
    activated.config.pop("static_users")
    activated.config["keycloak"] = keycloak.config()
    trace = activated.directory / "trace"
    trace.touch()
    trace.chmod(0o666)
    if unit == "without-sockets.conf":
        activated.hands_over = False
    activated.wrapper = ["strace", "-D", "-f", "-q", "-o", str(trace), "--"]
    activated.start()
    activated.ctl("aliases", "add", "info@d1.test", "alice")
    with contextlib.closing(activated.socketmap()) as client:
        assert client.ask("alias info@d1.test") == "OK alice@d1.test"
    assert activated.ask(recipient="alice@d1.test") == "DUNNO"
    activated.reload()
    assert activated.stop() == 0
    end = re.compile(rf"^{activated.process.pid} +\+\+\+ exited with 0", re.MULTILINE)
    wait_until(lambda: end.search(trace.read_text(errors="replace")), what="end of the trace")
    launching, _, text = trace.read_text(errors="replace").rpartition('"/launched"')
    used, used_before = (set(re.findall(r"^\d+ +(\w+)\(", part, re.MULTILINE)) for part in (text, launching))
    assert {"accept4", "prlimit64"} <= used
    assert used | used_before - {"setgroups", "setresgid", "setresuid"} <= allowed_system_calls(UNITS / unit)
    families = set(re.findall(r"\bsocket\((AF_\w+)", text))
    assert families - set(setting(SERVICE, "RestrictAddressFamilies").split()) == set()


# ---- sockets that are handed over


LAUNCHER = """
import os, pwd, sys
root, user, numbers, *arguments = sys.argv[1:]
sys.path.insert(0, root)
import mailcloak
exec(os.environ.get("FAULT", ""))
mailcloak.import_http()
copies = [os.dup(int(number)) for number in numbers.split(",")]  # in rising order, so that none is overwritten below
for target, copy in enumerate(copies, 3):
    os.dup2(copy, target)
if user:
    entry = pwd.getpwnam(user)
    os.setgroups([])
    os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
    os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
os.environ["LISTEN_PID"] = str(os.getpid())
os.path.lexists("/launched")
sys.exit(mailcloak.main(arguments))
"""  # not by exec, since the user may not reach an interpreter that is in root's home


class Manager(Daemon):
    """A daemon with a service manager such as systemd, which makes its sockets, hands them over, and listens to what it says."""

    def __init__(self, directory, config):
        super().__init__(directory, config)
        self.names, self.hands_over, self.user, self.wrapper = ["policy", "socketmap"], True, "", []
        self.listeners, self.environment = [], {}
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.bind(str(self.directory / "notify"))
        (self.directory / "notify").chmod(0o777)
        self.manager.settimeout(15)

    def listen(self):
        for name in ("policy", "socketmap"):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(self.config["sockets"][f"{name}_socket"])
            listener.listen(128)
            self.listeners.append(listener)

    def launch(self):
        self.write_config()
        environment = {**os.environ, "NOTIFY_SOCKET": str(self.directory / "notify"), **self.environment}
        command, numbers = [str(ROOT / "mailcloak.py")], []
        if self.hands_over:
            if not self.listeners:
                self.listen()
            numbers = [listener.fileno() for listener in self.listeners]
            environment.update(LISTEN_FDS=str(len(numbers)), LISTEN_FDNAMES=":".join(self.names))
            command = ["-c", LAUNCHER, str(ROOT), self.user, ",".join(map(str, numbers))]
        command = [*self.wrapper, sys.executable, *command, "--config", str(self.config_path)]
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, pass_fds=numbers)
        return self

    def heard(self):
        """The next message, as a mapping."""
        return dict(line.split("=", 1) for line in self.manager.recv(4096).decode().splitlines())

    def close(self):
        super().close()
        for each in (*self.listeners, self.manager):
            each.close()


@pytest.fixture
def activated(short_dir, make_config):
    """A daemon under a manager, not started yet; run by root it is nobody's, from its first line on where sockets are handed over."""
    state = short_dir / "state"
    state.mkdir()
    config = make_config(static_users=USERS, sqlite={"path": str(state / "state.db")})
    manager = Manager(short_dir, config)
    if os.geteuid() == 0:
        manager.config["daemon"]["user"] = manager.user = "nobody"
        shutil.chown(state, "nobody", "nogroup")
    yield manager
    manager.close()


def test_handed_over_sockets_are_served_by_name(activated):
    activated.start()
    assert activated.ask(recipient="alice@d1.test") == "DUNNO"
    assert activated.ask_map("alias x@d1.test") == "NOTFOUND "
    assert f"policy_socket={activated.directory}/policy socketmap_socket={activated.directory}/socketmap" in activated.log()


def test_handed_over_sockets_are_told_apart_by_name_not_by_order(activated):
    activated.listen()
    activated.listeners.reverse()
    activated.names.reverse()
    activated.start()
    assert activated.ask(recipient="alice@d1.test") == "DUNNO"
    assert activated.ask_map("alias x@d1.test") == "NOTFOUND "


@pytest.mark.parametrize("names", [["policy", "map"], ["policy", "policy"], ["policy"], ["unknown", "unknown"]], ids=":".join)
def test_handed_over_sockets_of_other_names_are_refused_with_the_reason(activated, names):
    activated.listen()
    activated.names = names
    del activated.listeners[len(names) :]
    assert activated.launch().process.wait(15) == 1
    assert f"named {':'.join(names)!r}" in activated.log()
    assert "named policy and socketmap" in activated.log()
    assert "Traceback" not in activated.log()


@pytest.mark.parametrize("count", ["3", "", "two"])
def test_handed_over_sockets_of_another_number_than_their_names_are_refused(monkeypatch, count):
    for name, value in {"PID": os.getpid(), "FDS": count, "FDNAMES": "policy:socketmap"}.items():
        monkeypatch.setenv(f"LISTEN_{name}", str(value))
    with pytest.raises(mailcloak.StartError, match=f"got {count} named 'policy:socketmap'"):
        mailcloak.take_over_sockets()


def test_sockets_meant_for_another_process_are_not_taken(make_daemon):
    daemon = make_daemon(
        static_users=USERS, environment={"LISTEN_PID": "1", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "policy:socketmap"}
    )
    daemon.start()
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"


def test_handed_over_sockets_stay_at_the_end_and_what_arrives_meanwhile_is_answered_by_the_next(activated):
    activated.start()
    assert activated.stop() == 0
    assert "left behind" not in activated.log()
    policy, maps = activated.policy(), activated.socketmap()
    policy.send(recipient="alice@d1.test")
    maps.send("alias x@d1.test")
    activated.start()
    assert policy.receive() == "DUNNO"
    assert maps.receive() == "NOTFOUND "


def test_restart_refuses_no_connection(activated):
    """Postfix opens connections all the time; one that the old daemon closes unanswered is opened again, as Postfix does."""
    activated.start()
    ended, failures, answered = threading.Event(), [], [0]

    def ask():
        while not ended.is_set():
            try:
                answers = [activated.ask(recipient="alice@d1.test")]
                while answers[-1] is None and len(answers) < 3:
                    answers.append(activated.ask(recipient="alice@d1.test"))
                if answers[-1] != "DUNNO":
                    failures.append(answers)
                answered[0] += 1
            except OSError as exc:
                if not isinstance(exc, BrokenPipeError):
                    failures.append(repr(exc))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        before = answered[0]
        wait_until(lambda before=before: answered[0] > before + 20, what="answers between restarts")
        assert activated.stop() == 0
        activated.start()
    before = answered[0]
    wait_until(lambda: answered[0] > before + 20, what="answers after the restarts")
    ended.set()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.real("root")
def test_administrators_maps_answer_where_the_daemon_may_not_look_into_postfix_own_directory(activated):
    private = activated.directory / "private"
    private.mkdir(mode=0o700)
    activated.config["sockets"].update(policy_socket=str(private / "mailcloak"), socketmap_socket=str(private / "map"))
    activated.start()
    for query in ("stats *", "flush *", 'explain {"alias": "x@d1.test"}'):
        assert activated.ask_map(query).startswith("OK {"), query


@pytest.mark.real("systemd")
def test_systemd_socket_activate_starts_the_daemon_at_the_first_question(activated):
    activated.write_config()
    paths = [activated.config["sockets"][f"{name}_socket"] for name in ("policy", "socketmap")]
    environment = {**os.environ, "NOTIFY_SOCKET": str(activated.directory / "notify")}
    command = [
        "systemd-socket-activate",
        *(f"--listen={path}" for path in paths),
        "--fdname=policy:socketmap",
        "-E",
        "NOTIFY_SOCKET",
    ]
    command += [sys.executable, str(ROOT / "mailcloak.py"), "--config", str(activated.config_path)]
    with open(activated.log_path, "ab") as log:
        activated.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd="/")
    wait_until(lambda: all(map(os.path.exists, paths)), what="sockets of systemd-socket-activate")
    assert "daemon: started" not in activated.log()
    assert activated.ask(recipient="alice@d1.test") == "DUNNO"
    assert activated.ask_map("alias x@d1.test") == "NOTFOUND "
    assert activated.heard()["READY"] == "1"
    assert activated.stop() == 0
    assert all(map(os.path.exists, paths))


# ---- what the daemon tells the service manager. Source: sd_notify(3)


def test_ready_is_said_when_questions_are_answered(activated):
    activated.launch()
    heard = activated.heard()
    assert heard["READY"] == "1"
    assert heard["STATUS"]
    assert activated.ask(recipient="alice@d1.test") == "DUNNO"


def test_start_that_fails_is_never_ready(activated):
    activated.config["policy"]["domian"] = "x"
    assert activated.launch().process.wait(15) == 78
    activated.manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        activated.heard()


def test_reload_is_announced_with_its_time_and_its_outcome(activated):
    activated.launch()
    activated.heard()
    outcomes = []
    for domain in ("d1.test", "no domain"):
        activated.config["policy"]["domain"] = domain
        activated.write_config()
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        activated.process.send_signal(signal.SIGHUP)
        heard = activated.heard()
        assert heard["RELOADING"] == "1"
        assert before <= int(heard["MONOTONIC_USEC"]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        heard = activated.heard()
        assert heard["READY"] == "1"
        outcomes.append(heard["STATUS"])
    assert "refused" not in outcomes[0]
    assert "refused" in outcomes[1]


def test_stop_is_announced(activated):
    activated.launch()
    activated.heard()
    activated.process.terminate()
    heard = activated.heard()
    assert heard["STOPPING"] == "1"
    assert "SIGTERM" in heard["STATUS"]
    assert activated.process.wait(15) == 0


def test_watchdog_hears_from_the_daemon_also_between_reloads(activated):
    activated.environment["WATCHDOG_USEC"] = str(400_000)
    activated.launch()
    assert activated.heard()["READY"] == "1"
    activated.process.send_signal(signal.SIGHUP)
    heard = [activated.heard() for _ in range(8)]
    assert {"RELOADING", "READY", "WATCHDOG"} <= {name for message in heard for name in message}
    assert [message["WATCHDOG"] for message in heard[-3:]] == ["1"] * 3
    assert activated.stop() == 0


@pytest.mark.parametrize(
    "fault",
    [
        "mailcloak.Server.process_request = lambda *_: time.sleep(60)",  # the thread that accepts connections hangs
        "mailcloak.UserDirectory.report = lambda *_: time.sleep(60)",  # as for a lock
    ],
    ids=["server", "directory"],
)
@pytest.mark.long
def test_watchdog_hears_nothing_more_once_questions_are_not_answered(activated, fault):
    activated.environment.update(WATCHDOG_USEC=str(1_000_000), FAULT=f"import time; {fault}")
    activated.launch()
    assert activated.heard()["READY"] == "1"
    with contextlib.closing(activated.policy()) as client:
        client.send(recipient="alice@d1.test")
        activated.manager.settimeout(4)
        with pytest.raises(TimeoutError):
            for _ in range(10):
                activated.heard()
    activated.process.kill()


def test_watchdog_of_another_process_is_not_answered(monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    assert mailcloak.find_watchdog_seconds() == 1
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert mailcloak.find_watchdog_seconds() == 1
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert mailcloak.find_watchdog_seconds() == 0


def test_manager_in_the_abstract_namespace_is_told(make_daemon):
    name = f"mailcloak-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}")
        manager.settimeout(15)
        make_daemon(static_users=USERS, environment={"NOTIFY_SOCKET": f"@{name}"}).start()
        assert b"READY=1" in manager.recv(4096)


def test_manager_that_is_gone_does_not_matter(make_daemon, short_dir):
    daemon = make_daemon(static_users=USERS, environment={"NOTIFY_SOCKET": str(short_dir / "nobody-listens")}).start()
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"
    assert daemon.stop() == 0
