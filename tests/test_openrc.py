"""The init script, run by the real rc-service and supervise-daemon, as a service of its own name."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, USERS, PolicyClient, wait_until

pytestmark = [pytest.mark.real("root", "openrc"), pytest.mark.xdist_group("openrc")]  # whose state is of the whole host

RUN = Path("/run/openrc")
STATE_OF_SERVICES = ("started", "stopping", "starting", "failed", "inactive", "wasinactive", "hotplugged", "exclusive")
OTHER_STATE = ("daemons", "options", "scheduled", "tmp")


def remove_if_empty(directory):
    with contextlib.suppress(OSError):  # another run of the tests is using it
        directory.rmdir()


class Service:
    """An init script of this repository under a name of its own, with its state, log and sockets in one directory."""

    def __init__(self, directory, config):
        self.name = f"mailcloak-test-{os.getpid()}"
        self.directory, self.config = directory, config
        self.script, self.settings = Path("/etc/init.d") / self.name, Path("/etc/conf.d") / self.name
        self.config_path, self.log_path, self.state = directory / "config.yaml", directory / "log", directory / "state"
        self.private = directory / "private"
        self._undo = contextlib.ExitStack()

    def install(self):
        if not (RUN / "softlevel").exists():  # a host that another init system has booted
            if not RUN.exists():
                self._undo.callback(shutil.rmtree, RUN, ignore_errors=True)
            for name in (*STATE_OF_SERVICES, *OTHER_STATE):
                (RUN / name).mkdir(parents=True, exist_ok=True)
            (RUN / "softlevel").touch()
        if not self.settings.parent.exists():
            self.settings.parent.mkdir()
            self._undo.callback(remove_if_empty, self.settings.parent)
        program = self.directory / "mailcloak"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/mailcloak.py" "$@"\n')
        program.chmod(0o755)
        self.private.mkdir(mode=0o700)
        shutil.chown(self.private, "daemon", "daemon")
        self.write_config()
        self._undo.callback(self.settings.unlink)
        self.settings.write_text(
            f'mailcloak_command="{program}"\nmailcloak_config="{self.config_path}"\nmailcloak_log="{self.log_path}"\n'
            f'mailcloak_state_dir="{self.state}"\nmailcloak_state_owner="nobody:nogroup"\n'
        )
        self._undo.callback(self.script.unlink)
        shutil.copy(ROOT / "openrc/mailcloak.initd", self.script)
        self.script.chmod(0o755)

    def write_config(self):
        self.config_path.write_text(yaml.safe_dump(self.config))

    def rc(self, *words, check=True):
        """rc-service on the test's service; what it says goes to a file, since the supervisor keeps a pipe open."""
        with open(self.directory / "said", "w+", encoding="utf-8") as said:
            command = ["rc-service", "--nocolor", self.name, *words]
            code = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, check=False, timeout=60, cwd="/"
            ).returncode
            said.seek(0)
            text = said.read()
        assert not check or code == 0, text + self.log()
        return code, text

    def log(self):
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def start(self):
        already = self.log().count("daemon: started")
        self.rc("start")
        wait_until(lambda: self.log().count("daemon: started") > already, what="start of the daemon")

    def pid(self):
        """That of the daemon itself, by its last word on it."""
        return int(re.findall(r"daemon: started .*pid=(\d+)", self.log())[-1])

    def ask(self, **attributes):
        with contextlib.closing(PolicyClient(self.private / "mailcloak")) as client:
            return client.ask(**attributes)

    def processes(self):
        """Every process whose command line names the service or its configuration."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().split(b"\0")
                if os.fsencode(self.config_path) in words or (self.name.encode() in words and b"supervise-daemon" in words[0]):
                    found.append(int(path.parent.name))
        return found

    def remove(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.rc("stop", check=False)
            self.rc("zap", check=False)
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._undo.close()
        for path in [RUN / state / self.name for state in (*STATE_OF_SERVICES, *OTHER_STATE)]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@pytest.fixture
def service(short_dir, make_config):
    config = make_config(static_users=USERS, daemon={"user": "nobody"}, sqlite={"path": str(short_dir / "state" / "state.db")})
    config["sockets"].update(
        policy_socket=str(short_dir / "private/mailcloak"),
        socketmap_socket=str(short_dir / "private/mailcloak-socketmap"),
        socket_owner_user="daemon",
        socket_owner_group="daemon",
    )
    service = Service(short_dir, config)
    try:
        service.install()
        yield service
    finally:
        service.remove()


def owner_and_mode(path):
    status = path.stat()
    return pwd.getpwuid(status.st_uid).pw_name, oct(stat.S_IMODE(status.st_mode))


def test_start_makes_what_it_needs_and_stop_leaves_nothing_running(service):
    service.start()
    assert service.ask(recipient="alice@d1.test") == "DUNNO"
    assert owner_and_mode(service.state) == ("nobody", "0o2750")
    assert owner_and_mode(service.state / "state.db") == ("nobody", "0o640")
    assert owner_and_mode(service.log_path) == ("root", "0o640")
    assert owner_and_mode(service.private) == ("daemon", "0o700")  # Postfix's own: as it was
    assert Path(f"/proc/{service.pid()}").owner() == "nobody"
    assert "started" in service.rc("status")[1]
    service.rc("stop")
    assert service.processes() == []
    code, text = service.rc("status", check=False)
    assert (code, "stopped" in text) == (3, True)
    service.start()  # past the sockets that a daemon without root's rights had to leave
    assert service.ask(recipient="alice@d1.test") == "DUNNO"


def test_start_of_a_bad_config_is_refused_with_the_reason(service):
    service.config["policy"]["domian"] = "d1.test"
    service.write_config()
    code, text = service.rc("start", check=False)
    assert code != 0
    assert "policy.domian: unknown key; did you mean 'domain'?" in text
    assert service.processes() == []
    assert service.rc("checkconfig", check=False)[0] != 0


def test_start_without_a_config_is_refused(service):
    service.config_path.unlink()
    code, text = service.rc("start", check=False)
    assert code != 0
    assert str(service.config_path) in text
    assert service.processes() == []


def test_reload_puts_a_good_config_in_force_and_refuses_a_bad_one(service):
    service.start()
    pid = service.pid()
    service.config["static_users"] = {"zoe": "zoe@d1.test"}
    service.write_config()
    service.rc("reload")
    wait_until(lambda: "daemon: reloaded" in service.log(), what="reload")
    assert service.ask(recipient="zoe@d1.test") == "DUNNO"
    service.config["policy"]["domian"] = "d1.test"
    service.write_config()
    code, text = service.rc("reload", check=False)
    assert code != 0
    assert "policy.domian" in text
    assert "reload refused" not in service.log()  # the daemon was not even asked
    assert service.ask(recipient="zoe@d1.test") == "DUNNO"
    assert (service.pid(), "started" in service.rc("status")[1]) == (pid, True)


def test_restart_with_a_bad_config_leaves_the_daemon_running(service):
    service.start()
    pid = service.pid()
    service.config["policy"]["domian"] = "d1.test"
    service.write_config()
    code, text = service.rc("restart", check=False)
    assert code != 0
    assert "policy.domian" in text
    assert service.ask(recipient="alice@d1.test") == "DUNNO"
    del service.config["policy"]["domian"]
    service.write_config()
    service.rc("restart")
    wait_until(lambda: service.pid() != pid, what="restart")
    assert service.ask(recipient="alice@d1.test") == "DUNNO"


def test_daemon_that_crashes_is_started_again(service):
    service.start()
    for _ in range(2):
        pid = service.pid()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: service.pid() != pid, 15, what="respawn")
        assert service.ask(recipient="alice@d1.test") == "DUNNO"
    assert "started" in service.rc("status")[1]


def dependencies(name):
    """What OpenRC has understood of a service's depend(), by kind."""
    tree = (RUN / "deptree").read_text()
    (number,) = re.findall(rf"^depinfo_(\d+)_service='{re.escape(name)}'$", tree, re.MULTILINE)
    found = {}
    for kind, value in re.findall(rf"^depinfo_{number}_(i\w+)_\d+='(.*)'$", tree, re.MULTILINE):
        found.setdefault(kind, []).append(value)
    return found


def test_nothing_is_needed_and_postfix_comes_after_it(service):
    subprocess.run(["rc-update", "-u"], check=True, stdout=subprocess.DEVNULL, timeout=60)
    found = dependencies(service.name)
    assert "ineed" not in found
    assert "net" in found["iuse"]
    assert "postfix" in found["ibefore"]


def test_network_service_may_be_there_and_may_go(service):
    """The other tests run without one."""
    network = service.script.with_name(f"{service.name}-net")
    network.write_text("#!/sbin/openrc-run\ndepend() {\n\tprovide net\n}\nstart() {\n\t:\n}\nstop() {\n\t:\n}\n")
    network.chmod(0o755)
    try:
        subprocess.run(["rc-service", network.name, "start"], check=True, timeout=30, capture_output=True, cwd="/")
        service.start()
        subprocess.run(["rc-service", network.name, "stop"], check=True, timeout=30, capture_output=True, cwd="/")
        assert service.ask(recipient="alice@d1.test") == "DUNNO"
        assert "started" in service.rc("status")[1]
    finally:
        subprocess.run(["rc-service", network.name, "zap"], check=False, timeout=30, capture_output=True, cwd="/")
        network.unlink()


def test_uninstall_is_refused_while_it_runs_and_names_what_stops_it(service, tmp_path):
    folders = {"PREFIX": str(tmp_path), "SYSCONFDIR": str(tmp_path / "etc"), "UNITDIR": str(tmp_path / "units"), "DESTDIR": ""}
    environment = {**os.environ, **folders, "PYTHON": sys.executable, "ANY_PYTHON": "yes", "INIT": "openrc"}

    def run(target):
        command = ["./install", target]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60)

    assert run("install").returncode == 0
    script, program = tmp_path / "etc/init.d/mailcloak", tmp_path / "sbin/mailcloak"
    script.write_text(f'#!/bin/sh\nexec "{service.script}" "$@"\n')
    service.start()
    result = run("uninstall")
    assert (result.returncode, script.exists(), program.exists()) == (1, True, True)
    assert "stop it first: rc-service mailcloak stop" in result.stderr
    service.rc("stop")
    assert run("uninstall").returncode == 0
    assert not script.exists()
    assert not program.exists()
