"""Start, sockets, privileges, signals, reload, the end."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, USERS, as_nobody, config_in, in_own_dev, run_ctl, wait_until

import mailcloak

root_only = pytest.mark.real("root")


def launch_and_fail(daemon):
    """The log of a daemon that must not start."""
    assert daemon.launch().process.wait(10) == 1, daemon.log()
    assert "Traceback" not in daemon.log()
    return daemon.log()


def nobody_daemon(make_daemon, **blocks):
    """A daemon that is started as root, becomes nobody, and whose database directory is nobody's."""
    daemon = make_daemon(static_users=USERS, daemon={"user": "nobody"}, **blocks)
    state = daemon.directory / "state"
    state.mkdir()
    shutil.chown(state, "nobody", "nogroup")
    daemon.config["sqlite"]["path"] = str(state / "state.db")
    return daemon


def wait_for_self_check(keycloak):
    """Until the daemon's own questions at start are answered, so that what comes next is a client's."""
    wait_until(lambda: ("profile", {}) in keycloak.requests and keycloak.at_once == 0)


# ---- sockets


def test_socket_has_the_mode_asked_for(make_daemon):
    daemon = make_daemon(static_users=USERS, sockets={"socket_mode": "0606"}).start()
    for name in ("policy", "socketmap"):
        status = os.lstat(daemon.directory / name)
        assert stat.S_ISSOCK(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o606


def test_sockets_are_removed_at_the_end(static_daemon):
    assert static_daemon.stop() == 0
    assert not [name for name in ("policy", "socketmap") if os.path.lexists(static_daemon.directory / name)]


def test_stale_socket_of_a_killed_daemon_is_removed_with_a_line(static_daemon):
    static_daemon.process.kill()
    static_daemon.process.wait()
    assert (static_daemon.directory / "policy").exists()
    static_daemon.start()
    assert static_daemon.log().count("info server: stale socket removed path=") == 2
    assert static_daemon.ask(recipient="alice@d1.test") == "DUNNO"


def test_socket_of_a_running_daemon_is_not_stolen(static_daemon, make_daemon):
    other = make_daemon(static_users=USERS, sqlite={"path": str(static_daemon.directory / "other.db")})
    other.log_path = static_daemon.directory / "other.log"
    log = launch_and_fail(other)
    assert "sockets.policy_socket: " in log
    assert "is served by another running daemon, stop it first" in log
    assert static_daemon.ask(recipient="alice@d1.test") == "DUNNO"


def another(daemon, make_daemon):
    """A daemon for the same sockets, with another configuration file, log and database."""
    other = make_daemon(static_users=USERS, sqlite={"path": str(daemon.directory / "other.db")})
    other.log_path, other.config_path = daemon.directory / "other.log", daemon.directory / "other.yaml"
    other._command[-1] = str(other.config_path)
    return other


def test_socket_that_is_of_another_daemon_by_now_is_not_removed_at_the_end(static_daemon, make_daemon):
    other = another(static_daemon, make_daemon)
    (static_daemon.directory / "policy").unlink()
    (static_daemon.directory / "socketmap").unlink()
    other.start()
    assert static_daemon.stop() == 0
    assert other.ask(recipient="alice@d1.test") == "DUNNO"
    assert other.ask_map("alias x@d1.test") == "NOTFOUND "
    (static_daemon.directory / "policy").unlink()
    assert other.stop() == 0
    assert "left behind" not in other.log()
    assert not (static_daemon.directory / "socketmap").exists()


def test_of_daemons_started_at_once_one_serves_and_the_others_say_so(make_daemon):
    daemons = [make_daemon(static_users=USERS)]
    daemons += [another(daemons[0], make_daemon)]
    for _ in range(5):
        for daemon in daemons:
            daemon.launch()
        wait_until(lambda: sum(daemon.process.poll() is None for daemon in daemons) == 1, what="end of one of the two")
        (serving,) = [daemon for daemon in daemons if daemon.process.poll() is None]
        (refused,) = [daemon for daemon in daemons if daemon is not serving]
        serving.wait_for_log("daemon: started")
        assert refused.process.returncode == 1
        assert "is served by another running daemon, stop it first" in refused.log()
        assert serving.ask(recipient="alice@d1.test") == "DUNNO"
        assert serving.ask_map("alias x@d1.test") == "NOTFOUND "
        serving.process.kill()  # so that the next two find stale sockets
        serving.process.wait()
        for daemon in daemons:
            daemon.log_path.unlink()


def bind_at_once(path, count):
    """Bind the path in so many processes at once; how many could, and whether the path leads to one of them."""
    go, going, done, ending = *os.pipe(), *os.pipe()
    told, telling = os.pipe()
    children = []
    for _ in range(count):
        children.append(os.fork())
        if children[-1] == 0:
            os.close(going)
            os.close(ending)
            os.read(go, 1)  # until the parent closes it
            try:
                _listener = mailcloak.bind_socket(path, "x", mailcloak.SocketsConfig(path, "", "", "", 0o660))
                os.write(telling, b"+")
            except BaseException:
                os.write(telling, b"-")
            os.read(done, 1)
            os._exit(0)
    os.close(going)
    answers = ""
    while len(answers) < count:
        answers += os.read(told, count).decode()
    with socket.socket(socket.AF_UNIX) as client:
        is_served = client.connect_ex(path) == 0
    os.close(ending)
    for child in children:
        os.waitpid(child, 0)
    for descriptor in (go, done, told, telling):
        os.close(descriptor)
    return answers.count("+"), is_served


@pytest.mark.long
def test_stale_socket_is_replaced_by_one_of_many_that_find_it_at_once(short_dir):
    outcomes = {bind_at_once(str(short_dir / "policy"), 4) for _ in range(100)}
    assert outcomes == {(1, True)}


def test_directory_that_cannot_be_locked_is_told_and_used(short_dir, monkeypatch, caplog):
    caplog.set_level("INFO", "mailcloak")
    monkeypatch.setattr(mailcloak, "LOCK_SECONDS", 0.2)
    path = str(short_dir / "policy")
    descriptor = os.open(short_dir, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    try:
        mailcloak.bind_socket(path, "x", mailcloak.SocketsConfig(path, "", "", "", 0o660)).close()
    finally:
        os.close(descriptor)
    assert f'server: directory not locked path={short_dir} reason="Resource temporarily unavailable"' in caplog.text


@pytest.mark.parametrize("kind", ["file", "directory", "symlink"])
def test_what_is_not_a_socket_is_not_deleted(make_daemon, kind):
    daemon = make_daemon(static_users=USERS)
    path = daemon.directory / "socketmap"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/etc/passwd")
    log = launch_and_fail(daemon)
    assert "sockets.socketmap_socket: " in log
    assert "is there and is not a socket" in log
    assert os.path.lexists(path)
    assert not (daemon.directory / "policy").exists()


def test_missing_socket_directory_is_named(make_daemon):
    daemon = make_daemon(static_users=USERS)
    daemon.config["sockets"]["policy_socket"] = str(daemon.directory / "nowhere" / "policy")
    assert f"its directory '{daemon.directory}/nowhere' does not exist" in launch_and_fail(daemon)


def test_socket_path_that_is_too_long_is_a_config_problem(make_daemon):
    daemon = make_daemon(static_users=USERS)
    daemon.config["sockets"]["policy_socket"] = "/tmp/" + "x" * 103
    assert daemon.launch().process.wait(10) == 78
    assert "config: sockets.policy_socket: expected a path of at most 107 bytes" in daemon.log()


def test_missing_database_directory_is_named(make_daemon):
    daemon = make_daemon(static_users=USERS)
    daemon.config["sqlite"]["path"] = str(daemon.directory / "nowhere" / "state.db")
    log = launch_and_fail(daemon)
    assert f"sqlite.path: directory '{daemon.directory}/nowhere' does not exist" in log
    assert not (daemon.directory / "policy").exists()


@root_only
def test_socket_of_root_belongs_to_its_owner_and_group(make_daemon):
    daemon = make_daemon(static_users=USERS, sockets={"socket_owner_user": "daemon", "socket_owner_group": "mail"}).start()
    status = (daemon.directory / "policy").stat()
    assert (pwd.getpwuid(status.st_uid).pw_name, status.st_gid, stat.S_IMODE(status.st_mode)) == ("daemon", 8, 0o660)


@root_only
def test_socket_in_a_directory_of_its_owner_is_made_there(make_daemon):
    daemon = make_daemon(static_users=USERS, sockets={"socket_owner_user": "daemon", "socket_owner_group": "daemon"})
    private = daemon.directory / "private"
    private.mkdir(mode=0o700)
    shutil.chown(private, "daemon", "daemon")
    daemon.config["sockets"].update(policy_socket=str(private / "mailcloak"), socketmap_socket=str(private / "map"))
    daemon.start()
    status = (private / "mailcloak").stat()
    assert (pwd.getpwuid(status.st_uid).pw_name, stat.S_IMODE(status.st_mode)) == ("daemon", 0o660)


def test_socket_for_another_user_needs_root(short_dir):
    sockets = mailcloak.SocketsConfig("", "", socket_owner_user="root", socket_owner_group="", socket_mode=0o660)
    outcome = as_nobody(lambda: mailcloak.bind_socket(str(short_dir / "s"), "sockets.policy_socket", sockets))
    assert outcome.startswith("StartError: sockets.policy_socket: only root can give a socket to another user")


# ---- privileges


@root_only
def test_daemon_started_as_root_becomes_its_user_for_good(make_daemon):
    daemon = nobody_daemon(make_daemon).start()
    status = Path(f"/proc/{daemon.process.pid}/status").read_text().splitlines()
    fields = {line.split(":")[0]: line.split(":")[1].split() for line in status}
    nobody = pwd.getpwnam("nobody")
    assert set(fields["Uid"]) == {str(nobody.pw_uid)}
    assert set(fields["Gid"]) == {str(nobody.pw_gid)}
    assert fields["Groups"] == [str(nobody.pw_gid)]
    assert fields["CapEff"] == ["0000000000000000"]
    assert daemon.database.owner() == "nobody"
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"


@root_only
def test_sockets_its_user_may_not_remove_are_left_and_removed_at_the_next_start(make_daemon):
    daemon = nobody_daemon(make_daemon, sockets={"socket_owner_user": "daemon"})
    private = daemon.directory / "private"
    private.mkdir(mode=0o700)
    shutil.chown(private, "daemon")
    daemon.config["sockets"].update(policy_socket=str(private / "mailcloak"), socketmap_socket=str(private / "map"))
    daemon.start()
    assert daemon.stop() == 0
    assert "info server: socket left behind path=" in daemon.log()
    daemon.start()
    assert "info server: stale socket removed path=" in daemon.log()
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"


@root_only
def test_database_directory_that_its_user_may_not_write_is_named(make_daemon):
    daemon = make_daemon(static_users=USERS, daemon={"user": "nobody"})
    log = launch_and_fail(daemon)
    assert "sqlite.path: " in log
    said = "cannot be created: Permission denied, as user 'nobody', let this user write and enter its directory: chown nobody "
    assert f"{said}{daemon.database.parent}\n" in log


@root_only
def test_config_its_user_cannot_read_is_warned_about(make_daemon):
    daemon = nobody_daemon(make_daemon)
    daemon.write_config()
    daemon.config_path.chmod(0o600)
    daemon.start()
    assert "not readable by user 'nobody', a reload will fail" in daemon.log()


NOTES_LATE_IMPORTS = """
import sys

import mailcloak

dropped = []
drop_privileges = mailcloak.drop_privileges
mailcloak.drop_privileges = lambda user: (drop_privileges(user), dropped.append(user))


def note(event, arguments):
    if dropped and event == "import" and arguments[0] not in sys.builtin_module_names:
        print("late import", arguments[0], file=sys.stderr)


sys.addaudithook(note)
sys.exit(mailcloak.main())
"""


def no_memory(*_, **__):
    raise MemoryError


NO_MEMORY = """
import sys, threading
sys.path.insert(0, sys.argv.pop(1))
import mailcloak
from test_lifecycle import no_memory
"""
PLACES_WITHOUT_MEMORY = {
    "answer": "mailcloak.LiveFacts.find_holders = no_memory",
    "connection": "mailcloak.PolicyHandler.setup = no_memory",
    "lookup": "mailcloak.read_user = no_memory",
    "request": "mailcloak.KeycloakApi._exchange_once = no_memory",
    "last-known": "mailcloak.SavedUsers._save = no_memory",
    "log": "mailcloak._text_of = no_memory",
    "thread": "mailcloak.UserDirectory._ask = no_memory",
    "start of a thread": "threading.Thread._set_ident = no_memory",
}


@pytest.mark.parametrize("place", PLACES_WITHOUT_MEMORY)
def test_without_memory_the_process_ends(make_daemon, keycloak, place):
    """What was half done is not known, so the service manager starts it again."""
    keycloak.add_user("alice", "alice@d1.test")
    daemon = make_daemon(keycloak=keycloak.config())
    daemon._command[2] = f"{NO_MEMORY}{PLACES_WITHOUT_MEMORY[place]}\nsys.exit(mailcloak.main())"
    daemon._environment["PYTHONPATH"] = str(ROOT / "tests")
    daemon.launch()

    def has_ended():
        with contextlib.suppress(OSError, EOFError):  # not there yet, or no longer
            daemon.ask(recipient="alice@d1.test")
        return daemon.process.poll() is not None

    wait_until(has_ended, 10, "the end")
    assert daemon.process.returncode == 1
    assert "error daemon: out of memory, it ends" in daemon.log()
    assert "Traceback" not in daemon.log()


def test_daemon_that_accepts_no_connection_any_more_ends(make_daemon):
    """As where the start of a thread waits for ever, since that thread ended for lack of memory. systemd's watchdog ends it otherwise."""
    daemon = make_daemon(static_users={"alice": "alice@d1.test"})
    stuck = "mailcloak.LOOK_SECONDS = 1\nmailcloak.Server.process_request = lambda *_: threading.Event().wait()"
    daemon._command[2] = f"{NO_MEMORY}{stuck}\nsys.exit(mailcloak.main())"
    daemon._environment["PYTHONPATH"] = str(ROOT / "tests")
    daemon.launch()
    daemon.wait_for_log("daemon: started", 10)
    time.sleep(2.5)
    assert daemon.process.poll() is None
    with contextlib.suppress(OSError, EOFError):
        assert not daemon.ask(recipient="alice@d1.test")
    assert daemon.process.wait(10) == 1
    assert "error daemon: no connection is accepted any more, it ends" in daemon.log()


def test_daemon_outlives_stops_of_the_process(make_daemon):
    """As by docker pause, or a debugger: longer than it waits for a signal."""
    daemon = make_daemon(static_users={"alice": "alice@d1.test"})
    daemon._command[2] = f"{NO_MEMORY}mailcloak.LOOK_SECONDS = 0.5\nsys.exit(mailcloak.main())"
    daemon._environment["PYTHONPATH"] = str(ROOT / "tests")
    daemon.start()
    for _ in range(3):
        daemon.process.send_signal(signal.SIGSTOP)
        time.sleep(0.8)
        daemon.process.send_signal(signal.SIGCONT)
        assert daemon.ask(recipient="alice@d1.test") == "DUNNO"
        time.sleep(0.1)
    assert daemon.stop() == 0


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_nothing_is_imported_after_root_is_given_up(make_daemon, keycloak, certificate, scheme):
    """Its user may not be able to read the directories of Python's modules, wherever these are installed."""
    daemon = make_daemon(static_users=USERS)
    daemon._command = [sys.executable, "-c", NOTES_LATE_IMPORTS, str(daemon.config_path)]
    daemon._environment["PYTHONPATH"] = str(ROOT)
    daemon.start()
    assert daemon.ask(recipient="jürgen@bücher.test") == "DUNNO"
    del daemon.config["static_users"]
    if scheme == "https":
        keycloak._server.socket = certificate.context.wrap_socket(keycloak._server.socket, server_side=True)
    url = keycloak.url.replace("http:", f"{scheme}:")
    daemon.config["keycloak"] = keycloak.config(base_url=url, ca_file=certificate.file, timeout_seconds=2)
    daemon.config["policy"]["domain"] = ["d1.test", "xn--bcher-kva.test"]
    keycloak.add_user("ulla", "ulla@bücher.test")
    daemon.reload()
    assert daemon.ask(recipient="ulla@xn--bcher-kva.test") == "DUNNO"
    assert daemon.ask(recipient="stranger@d1.test") == "550 5.1.1 No such user"
    for fault in ("gzip", "redirect", "truncated", "not-json", "status-503"):
        keycloak.fault = fault
        daemon.reload()
        assert daemon.ask(recipient=f"{fault}@d1.test").startswith("451 ")
    for host in ("no-such-host.invalid", "bücher.invalid"):
        daemon.config["keycloak"]["base_url"] = f"{scheme}://{host}"
        daemon.reload()
        assert daemon.ask(recipient="stranger@d1.test").startswith("451 ")
    assert daemon.stop() == 0
    assert [line for line in daemon.log().splitlines() if "late import" in line] == []


def test_command_that_asks_no_keycloak_imports_no_library_for_it(static_daemon):
    command = [
        sys.executable,
        "-X",
        "importtime",
        str(ROOT / "mailcloakctl.py"),
        "--db",
        str(static_daemon.database),
        "aliases",
        "list",
    ]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "mailcloak" in imported
    assert imported & {"requests", "urllib3", "http.client", "charset_normalizer", "certifi", "encodings.idna"} == set()


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_signal_ends_the_daemon_with_idle_connections_at_once(static_daemon, number):
    clients = [static_daemon.policy() for _ in range(5)] + [static_daemon.socketmap()]
    for client in clients[:5]:
        assert client.ask(recipient="alice@d1.test") == "DUNNO"
    started = time.monotonic()
    static_daemon.process.send_signal(number)
    assert static_daemon.process.wait(10) == 0
    assert time.monotonic() - started < 2
    assert [client.receive() for client in clients] == [None] * 6
    assert f"info daemon: stopping signal={number.name}" in static_daemon.log()


def test_request_that_was_read_is_answered_before_the_end(keycloak_daemon, keycloak):
    keycloak.latency_seconds = 1
    client = keycloak_daemon.policy()
    client.send(recipient="alice@d1.test")
    wait_until(lambda: keycloak.searches)
    keycloak_daemon.process.terminate()
    assert client.receive() == "DUNNO"
    assert client.receive() is None
    assert keycloak_daemon.process.wait(10) == 0


@pytest.fixture
def hanging(make_daemon, keycloak):
    """(a daemon, its client): the client's question hangs at Keycloak."""
    daemon = make_daemon(keycloak=keycloak.config(timeout_seconds=30)).start()
    wait_for_self_check(keycloak)
    keycloak.fault = "stall"
    client = daemon.policy()
    client.send(recipient="alice@d1.test")
    wait_until(lambda: keycloak.searches)
    return daemon, client


def test_lookup_that_hangs_at_the_end_gets_the_failure_mode_after_three_seconds(hanging):
    daemon, client = hanging
    started = time.monotonic()
    daemon.process.terminate()
    assert client.receive() == "451 4.3.0 Temporary authentication/lookup failure"
    assert 2 < time.monotonic() - started < 4
    assert daemon.process.wait(10) == 0
    assert time.monotonic() - started < 5


def test_second_signal_ends_at_once(hanging):
    daemon, _ = hanging
    daemon.process.terminate()
    daemon.wait_for_log("daemon: stopping")
    started = time.monotonic()
    daemon.process.terminate()
    daemon.process.wait(10)
    assert time.monotonic() - started < 1


def test_restart_serves_again_at_once(static_daemon):
    for _ in range(3):
        assert static_daemon.stop() == 0
        static_daemon.start()
        assert static_daemon.ask(recipient="alice@d1.test") == "DUNNO"


@pytest.mark.long
def test_client_that_does_not_read_does_not_hold_up_the_end(static_daemon):
    client = static_daemon.policy()
    client.socket.setblocking(False)
    request = b"request=smtpd_access_policy\nprotocol_state=DATA\n\n" * 300
    try:
        while True:
            client.socket.send(request)
    except BlockingIOError:
        pass
    started = time.monotonic()
    assert static_daemon.stop() == 0
    assert time.monotonic() - started < 5.5
    assert "Traceback" not in static_daemon.log()


# ---- reload


def test_reload_puts_a_new_config_in_force_without_closing_a_connection(static_daemon):
    client = static_daemon.policy()
    assert client.ask(recipient="alice@d9.test") == "DUNNO"
    static_daemon.config["policy"]["domain"] = ["d9.test"]
    static_daemon.config["static_users"] = {"zoe": "zoe@d9.test"}
    static_daemon.reload()
    assert client.ask(recipient="alice@d9.test") == "550 5.1.1 No such user"
    assert client.ask(recipient="zoe@d9.test") == "DUNNO"
    assert "info daemon: reloaded config=" in static_daemon.log()


def test_reload_of_a_bad_config_changes_nothing(static_daemon):
    static_daemon.config["policy"]["domian"] = "x.test"
    static_daemon.reload()
    log = static_daemon.log()
    assert "error config: policy.domian: unknown key; did you mean 'domain'?" in log
    assert "error daemon: reload refused, the old configuration stays in force" in log
    assert static_daemon.ask(recipient="alice@d1.test") == "DUNNO"


def test_reload_for_which_there_are_no_threads_changes_nothing(make_daemon, keycloak, monkeypatch):
    """In process: how many threads there may be cannot be limited for a single one of several daemons of a user."""
    keycloak.add_user("alice", "alice@d1.test")
    raw = make_daemon(keycloak=keycloak.config(), policy={"domain": "d1.test"}).config
    mailcloak.prepare_database(raw["sqlite"]["path"], 2)

    def config(**changes):
        blocks = {
            name: mailcloak.read_block(cls, name, {**raw.get(name, {}), **changes.get(name, {})}, [])
            for name, cls in mailcloak._BLOCKS.items()
        }
        return mailcloak.Config(path="", static_users=None, **blocks)

    service = mailcloak.Service(config())
    start, left = threading.Thread.start, [0]

    def threads():
        return [thread for thread in threading.enumerate() if thread.name.startswith(("keycloak-", "refresh", "last-known"))]

    before = len(threads())

    def start_some(thread):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    try:
        monkeypatch.setattr(threading.Thread, "start", start_some)
        for count in (0, 3, 9, 10):  # 8 workers, the probe, what writes saved users, the refresh
            left[0] = count
            other = {"timeout_seconds": 3, "realm": "other"}
            with pytest.raises(RuntimeError):
                mailcloak.Service(config(keycloak=other, policy={"disappearance_grace_seconds": 0}), service)
            assert service.store.policy.disappearance_grace_seconds == 3600
            wait_until(lambda: len(threads()) <= before, what="the end of the threads that began")
    finally:
        monkeypatch.undo()
        for each in (service.directory, service.source, service.saved):
            each.close()


def test_reload_names_what_needs_a_restart(static_daemon):
    static_daemon.config["sockets"]["policy_socket"] += "-other"
    static_daemon.reload()
    assert "warning config: sockets.policy_socket: a change here needs a restart" in static_daemon.log()
    static_daemon.config["sockets"]["policy_socket"] = static_daemon.config["sockets"]["policy_socket"][: -len("-other")]
    assert static_daemon.ask(recipient="alice@d1.test") == "DUNNO"


def test_reload_with_another_database_goes_on_with_the_one_before_and_says_so(static_daemon):
    static_daemon.ctl("aliases", "add", "info@d1.test", "alice")
    before = str(static_daemon.database)
    static_daemon.config["sqlite"]["path"] = f"{static_daemon.directory}/nowhere/state.db"
    for count in (1, 2):
        static_daemon.reload()
        assert static_daemon.log().count("warning config: sqlite.path: a change here needs a restart") == count
        assert (
            static_daemon.log().count("nowhere/state.db does not exist: to keep the database, stop the daemon, move the") == count
        )
        assert static_daemon.ask_map("alias info@d1.test") == "OK alice@d1.test"
    (static_daemon.directory / "nowhere").mkdir()
    refused = run_ctl("--config", static_daemon.config_path, "aliases", "add", "team@d1.test", "alice", check=False)
    assert refused.returncode == 1
    assert f"nowhere/state.db' does not exist, the daemon uses '{before}'; to keep the database, stop" in refused.stderr
    assert not any((static_daemon.directory / "nowhere").iterdir())
    static_daemon.config["sqlite"]["path"] = before
    static_daemon.reload()
    assert static_daemon.log().count("a change here needs a restart") == 2


@pytest.mark.parametrize("change", [None, "keycloak", "realm", "policy"])
def test_reloads_in_a_row_pile_up_no_threads(make_daemon, keycloak, change):
    daemon = make_daemon(keycloak=keycloak.config(timeout_seconds=30)).start()

    def threads():
        return len(os.listdir(f"/proc/{daemon.process.pid}/task"))

    assert daemon.ask(recipient="x@d1.test") == "550 5.1.1 No such user"
    wait_for_self_check(keycloak)
    before = threads()
    for number in range(10):
        if change == "keycloak":
            daemon.config["keycloak"]["timeout_seconds"] = 31 + number
        elif change == "realm":
            daemon.config["keycloak"]["realm"] = f"mail{number}"
        elif change == "policy":
            daemon.config["policy"]["cache_ttl_seconds"] = 100 + number
        daemon.reload()
    # the one before may go on for those who ask it: eight workers, a probe and the timer that ends them
    most = before + (10 if change in ("keycloak", "realm") else 0)
    wait_until(lambda: threads() <= most, 5, "end of the threads of all configurations but two")


def test_client_of_keycloak_that_a_reload_replaced_ends_when_nobody_can_need_it(make_daemon, keycloak):
    daemon = make_daemon(keycloak=keycloak.config(timeout_seconds=0.5)).start()

    def threads():
        return len(os.listdir(f"/proc/{daemon.process.pid}/task"))

    assert daemon.ask(recipient="x@d1.test") == "550 5.1.1 No such user"
    before = threads()
    daemon.config["keycloak"]["timeout_seconds"] = 0.6
    daemon.reload()
    wait_until(lambda: threads() <= before, what="end of the old lookup threads")


def test_reload_with_the_same_keycloak_keeps_its_connections_and_token(make_daemon, keycloak):
    daemon = make_daemon(keycloak=keycloak.config()).start()
    wait_for_self_check(keycloak)
    for number in range(3):
        daemon.config["policy"]["cache_ttl_seconds"] = 100 + number
        daemon.reload()
        assert daemon.ask(recipient=f"u{number}@d1.test") == "550 5.1.1 No such user"
    assert keycloak.token_requests == 1
    assert keycloak.requests.count(("profile", {})) == 1


# ---- the one file


def test_daemon_is_one_file_that_runs_from_anywhere(short_dir, make_config):
    shutil.copy(ROOT / "mailcloak.py", short_dir / "copied.py")
    (short_dir / "c.yaml").write_text(yaml.safe_dump(make_config(static_users=USERS)))
    result = subprocess.run(
        [sys.executable, str(short_dir / "copied.py"), "--check-config", "c.yaml"],
        cwd=short_dir,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, "good" in result.stdout + result.stderr) == (0, True)


def test_hundreds_of_clients_at_once_are_all_answered(static_daemon):
    failures = []

    def work():
        client = static_daemon.policy()
        for _ in range(20):
            if client.ask(recipient="alice@d1.test") != "DUNNO":
                failures.append(client)

    threads = [threading.Thread(target=work) for _ in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_backlog_takes_a_burst_that_the_daemon_has_no_time_for(static_daemon):
    static_daemon.process.send_signal(signal.SIGSTOP)
    clients = []
    for _ in range(520):
        client = socket.socket(socket.AF_UNIX)
        client.setblocking(False)
        client.connect(str(static_daemon.directory / "policy"))  # as Postfix: BlockingIOError with a full backlog
        clients.append(client)
    static_daemon.process.send_signal(signal.SIGCONT)
    for client in clients:
        client.close()
    assert static_daemon.ask(recipient="alice@d1.test") == "DUNNO"


# ---- requests under way while the daemon changes


def test_request_under_way_is_answered_across_a_reload(make_daemon, keycloak):
    keycloak.add_user("alice", "alice@d1.test")
    keycloak.latency_seconds = 0.5
    daemon = make_daemon(keycloak=keycloak.config()).start()
    client = daemon.policy()
    own = {"sasl_username": "alice", "sasl_method": "XOAUTH2", "sender": "alice@d1.test", "recipient": "alice+x@d1.test"}
    client.send(**own)  # four lookups, one after the other
    wait_until(lambda: keycloak.searches)
    daemon.reload()
    started = time.monotonic()
    assert client.receive() == "DUNNO"
    assert time.monotonic() - started < 4


@pytest.mark.long
def test_request_with_several_lookups_is_answered_at_the_end_after_a_reload_too(make_daemon, keycloak):
    daemon = make_daemon(keycloak=keycloak.config(timeout_seconds=30), policy={"keycloak_failure_mode": "dunno-recipients"}).start()
    wait_for_self_check(keycloak)
    keycloak.fault = "stall"
    clients = [daemon.policy(), daemon.policy()]
    clients[0].send(recipient="a@d1.test", sender="c@d1.test", sasl_username="e", sasl_method="XOAUTH2")
    wait_until(lambda: keycloak.searches)
    keycloak.fault = None
    daemon.config["keycloak"]["timeout_seconds"] = 29  # so that another client of Keycloak takes over
    daemon.reload()
    wait_until(lambda: keycloak.requests.count(("profile", {})) == 2)
    keycloak.fault = "stall"
    clients[1].send(recipient="b@d1.test", sender="d@d1.test", sasl_username="f", sasl_method="XOAUTH2")
    wait_until(lambda: len(keycloak.searches) == 2)
    daemon.process.terminate()
    assert [client.receive() for client in clients] == ["451 4.3.0 Temporary authentication/lookup failure"] * 2
    assert daemon.process.wait(10) == 0


# ---- the log


@pytest.mark.long
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_log_that_nobody_reads_makes_nobody_wait(make_daemon, kind):
    """The socket is what systemd gives a service."""
    daemon = make_daemon(static_users=USERS)
    daemon.write_config()
    ends = [os.fdopen(end, "rb") for end in os.pipe()] if kind == "pipe" else socket.socketpair()
    with contextlib.ExitStack() as stack:
        ours, theirs = map(stack.enter_context, ends)
        daemon.process = subprocess.Popen(daemon._command, stderr=theirs, env=daemon._environment)
        os.set_blocking(ours.fileno(), False)
        said = b""

        def read():
            nonlocal said
            with contextlib.suppress(BlockingIOError):
                while data := os.read(ours.fileno(), 65536):
                    said += data
            return said.decode()

        wait_until(lambda: "daemon: started" in read(), what="start")
        client = daemon.policy()
        for number in range(12000):  # more than waits in memory and in the pipe
            assert client.ask(recipient=f"nobody{number}@d1.test").startswith("550")
        wait_until(lambda: f"nobody{mailcloak.MAX_LOG_LINES_WAITING}@" in read(), what="the lines that waited")
        assert "were lost" not in read()
        assert client.ask(recipient="last@d1.test").startswith("550")
        wait_until(lambda: "<last@d1.test>" in read(), what="a line after those that were lost")
        lines = read().splitlines()
        lost = re.fullmatch(r"[\d-]+ [\d:,]+ warning daemon: (\d+) lines of the log were lost, it took no more", lines[-2])
        assert int(lost[1]) + sum("reason=unknown-recipient" in line for line in lines) == 12001
        assert "<last@d1.test>" in lines[-1]
        for number in range(8000):
            assert client.ask(recipient=f"nobody{number}@d1.test").startswith("550")
        daemon.process.terminate()
        assert daemon.process.wait(10) == 0


def test_line_that_cannot_be_made_is_counted_and_the_next_is_written():
    """The text of a decision's line is made by the log's thread, which must not end where that fails."""
    script = """
import mailcloak
log = mailcloak.configure_logging(mailcloak.DaemonConfig(user=""))
log.put(20, lambda: 1 / 0)
log.flush()
log.put(30, lambda: "policy: made later")
log.flush()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    lost, made = done.stderr.splitlines()
    assert lost.endswith(" warning daemon: 1 lines of the log were lost, it took no more")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} warning policy: made later", made)


@pytest.mark.parametrize(("name", "is_made_at_once"), [("other", False), ("o" * 3000, True)])
def test_long_request_is_not_kept_until_its_line_is_made(name, is_made_at_once):
    """Thousands of lines may wait where the log hangs."""
    lines = []
    handler = mailcloak.SocketmapHandler.__new__(mailcloak.SocketmapHandler)  # without a connection
    handler.tally = mailcloak.Tally()
    service, daemon = SimpleNamespace(note_error=lambda text: False), SimpleNamespace(log_line=lambda *line: lines.append(line))
    handler.server = SimpleNamespace(service=service, daemon=daemon)
    handler._answer(mailcloak.SocketmapQuery(name, "x@d1.test"))
    ((level, text),) = lines
    assert (level, isinstance(text, str)) == (logging.ERROR, is_made_at_once)


@root_only
def test_syslog_that_hangs_makes_nobody_wait(make_daemon, short_dir):
    path = short_dir / "dev-log"
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as syslog:
        syslog.bind(str(path))
        path.chmod(0o666)
        daemon = with_own_dev(make_daemon(static_users=USERS), path)
        daemon.launch()
        wait_until(lambda: os.path.exists(daemon.config["sockets"]["socketmap_socket"]), what="start")
        client = daemon.policy()
        for number in range(5000):
            assert client.ask(recipient=f"nobody{number}@d1.test").startswith("550")
        daemon.process.terminate()
        assert daemon.process.wait(10) == 0


def as_journal(daemon):
    """The daemon, told that its standard error leads to the journal, as systemd tells it."""
    daemon.log_path.touch()
    status = daemon.log_path.stat()
    daemon._environment["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
    return daemon


def test_line_in_the_journal_has_its_priority_and_not_its_time(make_daemon):
    daemon = as_journal(make_daemon(static_users=USERS)).start()
    daemon.ask(recipient="alice@d1.test")
    daemon.ask(recipient="nobody@d1.test")
    daemon.ask_map("no-such-map x")
    lines = daemon.log().splitlines()
    found = {re.fullmatch(r"<(\d)>(\w+) \w[\w-]*: .*", line).groups() for line in lines}
    assert (
        {("7", "debug"), ("6", "info"), ("4", "warning"), ("3", "error")}
        >= found
        >= {("7", "debug"), ("6", "info"), ("4", "warning")}
    )
    daemon.config["policy"]["domain"] = 5
    assert daemon.stop() == 0
    already = len(daemon.log())
    assert daemon.launch().process.wait(10) == mailcloak.EXIT_CONFIG
    assert all(line.startswith("<3>config: ") for line in daemon.log()[already:].splitlines())


def test_line_elsewhere_has_its_time_and_no_priority(make_daemon):
    """The variable is inherited, and the stream that it names may no longer be standard error."""
    daemon = as_journal(make_daemon(static_users=USERS))
    daemon._environment["JOURNAL_STREAM"] += "1"
    daemon.start()
    assert all(re.match(r"\d{4}-\d\d-\d\d [\d:,]+ \w+ ", line) for line in daemon.log().splitlines())


def test_log_whose_reader_has_gone_ends_nothing(make_daemon):
    daemon = make_daemon(static_users=USERS)
    daemon.write_config()
    ours, theirs = os.pipe()
    daemon.process = subprocess.Popen(daemon._command, stderr=theirs, env=daemon._environment)
    os.close(ours)
    os.close(theirs)
    wait_until(lambda: os.path.exists(daemon.config["sockets"]["socketmap_socket"]), what="start")
    assert [daemon.ask(recipient="nobody@d1.test")[:3] for _ in range(3)] == ["550"] * 3
    daemon.process.terminate()
    assert daemon.process.wait(10) == 0


def with_own_dev(daemon, syslog_path=None):
    """The daemon with a /dev of its own, logging to syslog."""
    daemon._command = in_own_dev(daemon._command, syslog_path)
    daemon.config["daemon"]["log"] = "syslog"
    return daemon


@root_only
def test_lines_go_to_syslog_with_their_priority_and_without_their_time(make_daemon, short_dir):
    path = short_dir / "dev-log"
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as syslog:
        syslog.bind(str(path))
        path.chmod(0o666)
        syslog.settimeout(10)
        daemon = with_own_dev(make_daemon(static_users=USERS), path)
        daemon.launch()
        lines = [syslog.recv(2000).decode()]
        while "daemon: started" not in lines[-1]:
            lines.append(syslog.recv(2000).decode())
        assert re.fullmatch(r"<22>\w+ +\d+ [\d:]+ mailcloak\[\d+\]: info daemon: started version=.*", lines[-1].rstrip("\0\n"))
        daemon.ask(recipient="nobody@d1.test")
        while "nobody@d1.test" not in lines[-1]:
            lines.append(syslog.recv(2000).decode())
        assert re.match(r"<22>.*\]: info policy: reject .*recipient=<nobody@d1.test> .*reason=unknown-recipient", lines[-1])
        assert {line[:4] for line in lines if "]: warning " in line} == {"<20>"}  # facility mail, priority warning
        assert daemon.log() == ""


@root_only
def test_syslog_without_a_syslog_daemon_is_refused_at_the_start(make_daemon):
    daemon = with_own_dev(make_daemon(static_users=USERS))
    assert "daemon.log: there is no /dev/log, start a syslog daemon or set it to stderr" in launch_and_fail(daemon)


@pytest.mark.parametrize(
    ("module", "program", "arguments", "said"),
    [
        ("yaml", "mailcloak.py", ["--check-config"], "mailcloak: No module named 'yaml': install PyYAML (python3-yaml; "),
        ("yaml", "mailcloakctl.py", ["aliases", "list"], "mailcloak: No module named 'yaml': install PyYAML (python3-yaml; "),
        ("requests", "mailcloak.py", [], "error No module named 'requests', install requests (python3-requests; "),
        ("requests", "mailcloakctl.py", ["doctor"], "install requests (python3-requests; "),
    ],
)
def test_library_that_is_missing_is_named_with_its_package(tmp_path, short_dir, module, program, arguments, said):
    """A script in place of the library says what Python says where there is none."""
    (tmp_path / f"{module}.py").write_text(f"raise ImportError(\"No module named '{module}'\")\n")
    config = config_in(
        short_dir, keycloak={"base_url": "https://127.0.0.1:1", "realm": "r", "client_id": "c", "client_secret": "s"}
    )
    (short_dir / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, str(ROOT / program), "--config", str(short_dir / "config.yaml"), *arguments]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode != 0
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
