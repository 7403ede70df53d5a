"""Clients that are slow, silent or too many: they delay nobody else, and leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import threading
import time
from pathlib import Path

import pytest
from conftest import PolicyClient, as_nobody, read_of_threads, wait_until
from test_wire import FULL_REQUEST, netstring

import mailcloak


def threads_of(daemon):
    return len(os.listdir(f"/proc/{daemon.process.pid}/task"))


def files_of(daemon):
    return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))


def processor_seconds(daemon):
    fields = Path(f"/proc/{daemon.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def all_threads_sleep(daemon):
    """None runs or waits for a processor: each has taken note of what it did last."""
    return all(stat.rpartition(b")")[2].split()[0] == b"S" for stat in read_of_threads(daemon.process.pid, "stat"))


def is_closed(client):
    """Has the daemon closed this connection, on which no answer is due?"""
    client.socket.setblocking(False)
    try:
        return client.socket.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
    finally:
        client.socket.setblocking(True)


# ---- slow


def drip(client, data, pause, stop):
    """Send data byte by byte until it is sent, stop is set, or the daemon has had enough."""
    with contextlib.suppress(OSError):
        for byte in data:
            client.send_bytes(bytes([byte]))
            if stop.wait(pause):
                return


@pytest.mark.long
def test_request_that_is_not_finished_is_given_up_and_others_are_not(static_daemon):
    """Ten seconds of a real clock, once for all kinds of slowness."""
    threads, files = threads_of(static_daemon), files_of(static_daemon)
    stop = threading.Event()
    resting = [static_daemon.policy(), static_daemon.socketmap()]
    used = static_daemon.policy()
    assert used.ask(recipient="alice@d1.test") == "DUNNO"
    silent = [static_daemon.policy(), static_daemon.socketmap()]
    silent[0].send_bytes(FULL_REQUEST[:-1])
    silent[1].send_bytes(b"1")
    after_an_answer = static_daemon.policy()
    after_an_answer.send_bytes(FULL_REQUEST + FULL_REQUEST[:20])
    assert after_an_answer.receive() == "DUNNO"
    dripping = [static_daemon.policy(), static_daemon.socketmap()]
    many = [static_daemon.policy() for _ in range(400)]  # more than any mail host has smtpd processes
    for client in many:
        client.send_bytes(b"request=smtpd")
    steady = static_daemon.policy()  # always in the middle of a request, each of which is finished in time
    work = [
        threading.Thread(target=drip, args=(dripping[0], FULL_REQUEST, 0.3, stop)),
        threading.Thread(target=drip, args=(dripping[1], netstring(b"alias " + b"x" * 5000), 0.01, stop)),
    ]
    for thread in work:
        thread.start()
    begun = time.monotonic()
    answers = 0
    while time.monotonic() < begun + mailcloak.REQUEST_SECONDS + 2:
        steady.send_bytes(FULL_REQUEST[10:] + FULL_REQUEST[:10] if answers else FULL_REQUEST + FULL_REQUEST[:10])
        answers += 1
        assert steady.receive() == "DUNNO"
        assert static_daemon.ask(recipient="stranger@d1.test") == "550 5.1.1 No such user"
        stop.wait(0.2)
    for client in (*silent, after_an_answer, *dripping, *many):
        wait_until(lambda client=client: is_closed(client), what="the end of a slow connection")
    stop.set()
    for thread in work:
        thread.join()
    steady.send_bytes(FULL_REQUEST[10:])
    assert steady.receive() == "DUNNO"
    for client in (*resting[:1], used):
        assert client.ask(recipient="alice@d1.test") == "DUNNO"
    assert resting[1].ask("alias xxx@d1.test") == "NOTFOUND "
    assert static_daemon.log().count("not whole after 10 s") == len(many) + 5
    wait_until(lambda: threads_of(static_daemon) <= threads + 4, what="the end of their threads")
    wait_until(lambda: files_of(static_daemon) <= files + 8, what="the end of their descriptors")


@pytest.mark.long
def test_client_that_does_not_read_its_answers_is_dropped(static_daemon):
    threads = threads_of(static_daemon)
    client = static_daemon.policy()
    client.socket.settimeout(1)
    with contextlib.suppress(socket.timeout):
        while True:  # until neither side's buffer takes any more
            client.send_bytes(FULL_REQUEST * 100)
    assert threads_of(static_daemon) == threads + 1
    wait_until(lambda: threads_of(static_daemon) == threads, mailcloak.SEND_TIMEOUT_SECONDS + 5, "the end of its thread")
    assert static_daemon.ask(recipient="alice@d1.test") == "DUNNO"


@pytest.mark.long
def test_client_that_reads_its_answers_a_little_now_and_then_is_dropped(static_daemon):
    threads = threads_of(static_daemon)
    client = static_daemon.policy()
    client.socket.settimeout(0.5)
    with contextlib.suppress(socket.timeout):
        while True:
            client.send_bytes(FULL_REQUEST * 100)

    def is_dropped():
        time.sleep(0.5)
        with contextlib.suppress(OSError):
            client.socket.recv(4)
        return threads_of(static_daemon) == threads

    wait_until(is_dropped, mailcloak.SEND_TIMEOUT_SECONDS * 2 + 5, "the end of its thread")


# ---- many


def test_at_the_limit_the_connection_that_has_rested_longest_makes_room(make_daemon):
    daemon = make_daemon(static_users={"alice": "alice@d1.test"}, daemon={"user": "", "max_connections": 5}).start()
    clients = [daemon.policy() for _ in range(5)]
    for client in clients:
        assert client.ask(recipient="alice@d1.test") == "DUNNO"
    assert clients[0].ask(recipient="alice@d1.test") == "DUNNO"  # so that the second has rested longest
    wait_until(lambda: all_threads_sleep(daemon) and all_threads_sleep(daemon), what="the rest of all connections")
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"
    wait_until(lambda: is_closed(clients[1]), what="the end of the second")
    for client in (clients[0], *clients[2:]):
        assert client.ask(recipient="alice@d1.test") == "DUNNO"
    assert "warning server: full, resting connections are closed for new ones" in daemon.log()
    map_clients = [daemon.socketmap() for _ in range(5)]  # a limit of its own
    for client in map_clients:
        assert client.ask("alias xxx@d1.test") == "NOTFOUND "


def test_connection_for_which_there_is_no_room_waits_for_some(make_daemon):
    daemon = make_daemon(static_users={"alice": "alice@d1.test"}, daemon={"user": "", "max_connections": 3}).start()
    busy = [daemon.policy() for _ in range(3)]
    for client in busy:
        client.send_bytes(FULL_REQUEST + FULL_REQUEST[:30])
        assert client.receive() == "DUNNO"
    late = daemon.policy()
    late.send(recipient="alice@d1.test")
    before = processor_seconds(daemon)
    late.socket.settimeout(1)
    with pytest.raises(socket.timeout):
        late.receive()
    assert processor_seconds(daemon) - before < 0.5  # it waits rather than spins
    late.socket.settimeout(20)
    busy[0].send_bytes(FULL_REQUEST[30:])
    assert busy[0].receive() == "DUNNO"
    assert late.receive() == "DUNNO"
    assert "Traceback" not in daemon.log()


def test_open_files_running_out_ends_nothing_and_does_not_spin(static_daemon):
    clients = [static_daemon.policy() for _ in range(5)]
    for client in clients:
        assert client.ask(recipient="alice@d1.test") == "DUNNO"
    free = files_of(static_daemon) + 4
    limits = resource.prlimit(static_daemon.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(static_daemon.process.pid, resource.RLIMIT_NOFILE, (free, limits[1]))
    before = processor_seconds(static_daemon)
    more = []
    for _ in range(20):
        client = PolicyClient(static_daemon.config["sockets"]["policy_socket"])
        more.append(client)
        assert client.ask(sender="x@elsewhere.test", recipient="x@elsewhere.test") == "DUNNO"  # of which SQLite knows nothing
    time.sleep(1)
    assert processor_seconds(static_daemon) - before < 0.8
    assert "warning server: full, resting connections are closed for new ones" in static_daemon.log()
    resource.prlimit(static_daemon.process.pid, resource.RLIMIT_NOFILE, limits)
    for client in more:
        client.close()
    assert static_daemon.ask(recipient="alice@d1.test") == "DUNNO"
    assert static_daemon.ask(recipient="stranger@d1.test") == "550 5.1.1 No such user"
    assert "Traceback" not in static_daemon.log()


def test_connections_given_up_at_once_end_nothing(static_daemon):
    threads = threads_of(static_daemon)
    for _ in range(500):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(static_daemon.config["sockets"]["policy_socket"])
    assert static_daemon.ask(recipient="alice@d1.test") == "DUNNO"
    wait_until(lambda: threads_of(static_daemon) == threads, what="the end of their threads")
    assert "Traceback" not in static_daemon.log()


def test_limit_of_open_files_is_raised_for_the_connections_wanted():
    def allowed(limits, wanted):
        def in_child():
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            return mailcloak.allow_connections(wanted), resource.getrlimit(resource.RLIMIT_NOFILE)[0]

        return as_nobody(in_child)

    assert allowed((256, 20_000), 1000) == "(1000, 2200)"
    assert allowed((256, 1000), 1000) == "(400, 1000)"
    assert allowed((256, 256), 1000) == "(28, 256)"
    assert allowed((9000, 20_000), 1000) == "(1000, 9000)"


def test_limit_of_open_files_that_cannot_be_raised_lowers_the_connections_with_a_warning(make_daemon, monkeypatch):
    daemon = make_daemon(static_users={"alice": "alice@d1.test"}, daemon={"user": "", "max_connections": 100_000})
    daemon._command = ["sh", "-c", 'ulimit -n 1000 && exec "$@"', "sh", *daemon._command]
    if os.geteuid() == 0:  # who could raise it again; the capability is taken away
        daemon._command = ["setpriv", "--bounding-set", "-sys_resource", "--inh-caps", "-sys_resource", *daemon._command]
    daemon.start()
    assert "warning config: daemon.max_connections: lowered to 400" in daemon.log()
    assert daemon.ask(recipient="alice@d1.test") == "DUNNO"
