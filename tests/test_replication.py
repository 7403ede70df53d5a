"""Several mail hosts through the real Litestream: equal after load, kill and stall, true answers within the lag, promotion and return."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import re
import shutil
import signal
import sqlite3
import statistics
import threading
import time

import pytest
from conftest import ROOT, wait_until
from real.litestream import EXAMPLES, FOLLOWER, S3, WRITER, S3WithPolicies, mail_hosts
from real.mail import send
from real.postfix import NO_SUCH_USER, expected, refusal
from test_systemd import allowed_system_calls, setting

import mailcloakcommon

SPEC = importlib.util.spec_from_file_location("loss", ROOT / "bench" / "loss.py")
loss = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(loss)

pytestmark = [pytest.mark.real("litestream"), pytest.mark.timeout(300)]

CHANGES = 4000  # of aliases under load; 10,000 with --long
LAG_SECONDS = 30.0  # in which an answer is true again at the latest, on a machine that does all of it at once, and more


@pytest.fixture(scope="module")
def hosts():
    """A writer and three followers, for the tests that leave them as they were: equal, with all services."""
    with mail_hosts(3) as (writer, followers):
        yield writer, followers


@pytest.fixture(autouse=True)
def services_are_there(request):
    """What a test has killed was started again."""
    yield
    if "hosts" in request.fixturenames:
        writer, followers = request.getfixturevalue("hosts")
        for host in (writer, *followers):
            ended = {service: host.log(service)[-500:] for service, process in host.processes.items() if process.poll() is not None}
            assert not ended, host.name
            host.await_rows_of(writer)


def write_commit(database, number, rows):
    """One commit of so many rows, of which each says its number."""
    with database:
        addresses = random.sample(range(5000), rows)
        database.executemany(
            "INSERT INTO aliases (alias_email, username) VALUES (?, ?) ON CONFLICT (alias_email) DO UPDATE SET username = excluded.username",
            [(f"a{address}@d1.test", f"user{number}") for address in addresses],
        )
        database.execute(
            "INSERT INTO aliases (alias_email, username) VALUES ('last@d1.test', ?) ON CONFLICT (alias_email)"
            " DO UPDATE SET username = excluded.username",
            (f"user{number}",),
        )


class Watcher(threading.Thread):
    """Asks the daemon of a follower for the number of the last commit, and notes when it answers which."""

    def __init__(self, host):
        super().__init__()
        self.host, self.seen, self.ended = host, [], threading.Event()

    def run(self):
        with contextlib.closing(self.host.daemon.socketmap()) as client:
            while not self.ended.is_set():
                begun = time.monotonic()
                answer = client.ask("alias last@d1.test")
                self.seen.append((begun, time.monotonic(), int(answer.partition("user")[2].partition("@")[0])))
                time.sleep(0.01)


@pytest.mark.parametrize("changes", [CHANGES, pytest.param(10_000, marks=pytest.mark.long)])
def test_followers_answer_as_the_writer_did_within_the_lag_and_are_equal_at_the_end(hosts, changes):
    writer, followers = hosts
    writer.ctl("aliases", "add", "last@d1.test", "user0", "--replace")
    for host in followers:
        host.await_rows_of(writer)
        if not host.daemon.process:
            host.daemon.start()
    watchers = [Watcher(host) for host in followers]
    for watcher in watchers:
        watcher.start()
    commits = [(0.0, 0.0)]  # when each began and had ended
    with contextlib.closing(sqlite3.connect(writer.database, timeout=20)) as database:
        done = 0
        while done < changes:
            rows = random.choice([1, 1, 2, 5, 20, 100, 500])
            begun = time.monotonic()
            write_commit(database, len(commits), rows)
            commits.append((begun, time.monotonic()))
            done += rows
            time.sleep(random.uniform(0, 0.3))
    for host in followers:
        host.await_rows_of(writer)
    wait_until(lambda: all(watcher.seen[-1][2] == len(commits) - 1 for watcher in watchers), 30, what="the last answer")
    for watcher in watchers:
        watcher.ended.set()
        watcher.join()
    lags = [lag for watcher in watchers for lag in check_answers(watcher.seen, commits)]
    print(
        f"\n{len(commits) - 1} commits, {done} changes: p50 {statistics.median(lags):.2f} s, p99 {sorted(lags)[int(len(lags) * 0.99)]:.2f} s"
    )
    assert max(lags) < LAG_SECONDS
    assert [host.database.read_bytes()[18:20] for host in (writer, *followers)] == [b"\1\1"] * 4


def check_answers(seen, commits):
    """How long each commit, or one after it, took until the follower answered with it; each answer was true at some moment before."""
    lags, number = [], 1
    for begun, ended, answer in seen:
        assert commits[answer][0] <= ended, "an answer from before its commit"
        newest = max(index for index, (_, committed) in enumerate(commits) if committed < begun - LAG_SECONDS or index == 0)
        assert answer >= newest, "an answer that was no longer true"
        while number <= answer:
            lags.append(max(0.0, ended - commits[number][1]))
            number += 1
    assert [answer for _, _, answer in seen] == sorted(answer for _, _, answer in seen), "an older state came back"
    return lags


@pytest.fixture(scope="module")
def mail_servers(hosts):
    """The same hosts, each follower with Postfix and Dovecot too."""
    writer, followers = hosts
    for host in followers:
        host.start_mail()
    return writer, followers


@contextlib.contextmanager
def changes_meanwhile(database_path):
    """Commits of 1 to 500 rows, until the end."""
    ended = threading.Event()

    def change():
        with contextlib.closing(sqlite3.connect(database_path, timeout=20)) as database:
            while not ended.wait(random.uniform(0, 0.3)):
                write_commit(database, 1, random.choice([1, 20, 500]))

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def await_answer(followers, address, refused):
    """Until Postfix of each follower takes mail to the address, or refuses it as one that nobody has."""
    wanted = expected(NO_SUCH_USER, address) if refused else None
    for host in followers:
        with host.postfix.smtp() as client:
            wait_until(lambda: refusal(client, "x@other.test", address) == wanted, LAG_SECONDS, what=f"{wanted} on {host.name}")


def await_user(followers, address, username):
    """Until the alias leads to this user on each follower."""
    for host in followers:
        with contextlib.closing(host.daemon.socketmap()) as client:
            wait_until(
                lambda: client.ask(f"alias {address}") == f"OK {username}@d1.test", LAG_SECONDS, what=f"{username} on {host.name}"
            )


def deliver(host, address, username):
    """A message over SMTP, which comes to this user's mailbox and to no other."""
    with host.postfix.smtp() as client:
        marker = send(client, "x@other.test", address)
    wait_until(lambda: any(marker in text for text in host.mailbox("*")), what=f"the message on {host.name}")
    assert any(marker in text for text in host.mailbox(username))


@pytest.mark.real("postfix", "dovecot", "root")
def test_mail_over_smtp_of_each_follower_goes_where_the_aliases_of_the_writer_lead(mail_servers):
    writer, followers = mail_servers
    with changes_meanwhile(writer.database):
        for host in followers:
            assert host.postfix.refusal("x@other.test", "new@d1.test") == expected(NO_SUCH_USER, "new@d1.test")
        writer.ctl("aliases", "add", "new@d1.test", "alice")
        await_answer(followers, "new@d1.test", refused=False)
        for host in followers:
            deliver(host, "new@d1.test", "alice")
            assert host.postfix.refusal("x@other.test", "nobody@d1.test") == expected(NO_SUCH_USER, "nobody@d1.test")
        writer.ctl("aliases", "add", "new@d1.test", "bob", "--replace")
        await_user(followers, "new@d1.test", "bob")
        for host in followers:
            deliver(host, "new+shop@d1.test", "bob")
        writer.ctl("aliases", "disable", "new@d1.test")
        await_answer(followers, "new@d1.test", refused=True)
    writer.ctl("aliases", "del", "new@d1.test")


@pytest.mark.real("dovecot", "postfix", "root")
def test_app_that_is_disabled_is_refused_by_dovecot_of_each_follower(mail_servers):
    writer, followers = mail_servers
    writer.ctl("apps", "enable", "printer")
    for host in followers:
        host.await_rows_of(writer)

    def accepted():
        return [host.dovecot.accepts_password("printer", "a token of many signs", "submission") for host in followers]

    assert accepted() == [True] * 3
    writer.ctl("apps", "disable", "printer")
    begun = time.monotonic()
    for host in followers:
        host.await_rows_of(writer)
    assert time.monotonic() - begun < LAG_SECONDS
    assert accepted() == [False] * 3


@pytest.mark.parametrize("service", ["publish", "replicate", "follow", "mirror"])
def test_service_that_is_killed_under_load_and_started_again_loses_nothing(hosts, service):
    writer, followers = hosts
    host = writer if service in WRITER else followers[0]
    with contextlib.closing(sqlite3.connect(writer.database, timeout=20)) as database:
        for number in range(3):
            for _ in range(5):
                write_commit(database, 10_000 + number, random.choice([1, 20, 500]))
                time.sleep(random.uniform(0, 0.1))
            assert host.end(service, with_signal=signal.SIGKILL) == [-signal.SIGKILL]
            write_commit(database, 10_000 + number, 50)
            host.start(service)
    for each in followers:
        each.await_rows_of(writer)


def test_writer_that_is_killed_in_a_change_publishes_none_of_it(hosts):
    """With mailcloakctl, publish and Litestream of the writer killed at once, as at a loss of power."""
    writer, followers = hosts
    before = writer.rows()
    pid = os.fork()
    if pid == 0:
        database = sqlite3.connect(writer.database, isolation_level=None)
        database.execute("PRAGMA cache_size = 1")
        database.execute("BEGIN IMMEDIATE")
        for number in range(3000):
            database.execute("INSERT INTO aliases (alias_email, username) VALUES (?, 'x')", (f"killed{number}@d1.test",))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    writer.end(*WRITER, with_signal=signal.SIGKILL)
    writer.start(*WRITER)
    writer.ctl("aliases", "add", "after@d1.test", "alice", "--replace")
    for host in followers:
        host.await_rows_of(writer)
        assert {row[0] for row in host.rows()} == {row[0] for row in before} | {"after@d1.test"}


@pytest.mark.long
def test_stall_of_litestream_shows_and_ends_with_an_empty_copy(hosts):
    writer, followers = hosts
    stalled, other = followers[:2]
    stalled.processes["follow"].send_signal(signal.SIGSTOP)
    try:
        writer.ctl("aliases", "add", "stall@d1.test", "bob", "--replace")
        other.await_rows_of(writer)
        stalled_age = lambda: mailcloakcommon.read_replication(str(stalled.database), 12)  # noqa: E731
        wait_until(lambda: stalled_age()["late"], 30, what="the warning")
        assert not mailcloakcommon.read_replication(str(other.database), 12)["late"]
        assert "stall@d1.test" not in {row[0] for row in stalled.rows()}
    finally:
        stalled.end("follow", with_signal=signal.SIGKILL)
        stalled.start("follow")
    stalled.await_rows_of(writer)
    wait_until(lambda: not stalled_age()["late"], seconds=30, what="the end of the warning")


@pytest.mark.long
def test_changes_that_are_lost_with_the_writer_are_those_of_the_seconds_that_readme_says():
    (said,) = re.findall(r"the changes of its last (\d+) seconds", (ROOT / "README.md").read_text())
    losses = loss.measure(3)
    assert 0 < min(losses) < float(said)
    assert max(losses) < LAG_SECONDS


@pytest.mark.parametrize("fault", ["cut", "flipped"])
def test_copy_that_is_cut_or_has_flipped_bits_is_refused_and_the_host_serves_on(hosts, fault):
    writer, followers = hosts
    host = followers[1]
    if not host.daemon.process:
        host.daemon.start()
    with contextlib.closing(sqlite3.connect(writer.database, timeout=20)) as database:
        write_commit(database, 1, 500)  # pages that the next change does not touch
    host.await_rows_of(writer)
    before, follow = host.rows(), host.processes["follow"]
    lines = host.log("mirror").count("\n")
    follow.send_signal(signal.SIGSTOP)
    with open(host.shared, "r+b") as file:
        data = file.read()
        if fault == "cut":
            file.truncate(len(data) // 2)
        else:
            file.seek(data.index(b"info@d1.testalice") + len("info@d1.test"))
            file.write(b"bob")
    follow.send_signal(signal.SIGCONT)
    writer.ctl("aliases", "add", "good@d1.test", "alice", "--replace")  # Litestream writes its pages into the damaged copy
    wait_until(lambda: host.log("mirror").count("\n") > lines, seconds=30, what="the reason")
    assert "is refused" in host.log("mirror").splitlines()[-1]
    assert host.rows() == before
    assert host.daemon.ask_map("alias info@d1.test") == "OK alice@d1.test"
    host.end("follow", with_signal=signal.SIGKILL)
    host.start("follow")
    host.await_rows_of(writer)
    writer.ctl("aliases", "del", "good@d1.test")


def test_host_whose_storage_is_gone_serves_on(hosts):
    """A folder that cannot be read stands for it; the writer goes on too, and what it wrote comes later."""
    writer, followers = hosts
    host = followers[2]
    path = writer.storage.path
    moved = f"{path}.away"
    os.rename(path, moved)
    path.touch()
    try:
        writer.ctl("aliases", "add", "later@d1.test", "alice", "--replace")
        time.sleep(2)
        assert "later@d1.test" not in {row[0] for row in host.rows()}
    finally:
        path.unlink()
        os.rename(moved, path)
    host.await_rows_of(writer)


@pytest.mark.real("moto")
def test_storage_of_s3_hangs_and_is_lost_under_the_services():
    storage = S3()
    with mail_hosts(1, storage) as (writer, (follower,)):
        writer.ctl("aliases", "add", "a@d1.test", "alice")
        follower.await_rows_of(writer)
        storage.process.send_signal(signal.SIGSTOP)
        writer.ctl("aliases", "add", "b@d1.test", "alice")
        time.sleep(2)
        assert not follower.has_rows_of(writer)
        storage.process.send_signal(signal.SIGCONT)
        follower.await_rows_of(writer)
        storage.close()
        writer.ctl("aliases", "add", "c@d1.test", "alice")
        storage.start()  # empty
        writer.ctl("aliases", "add", "d@d1.test", "alice")
        follower.await_rows_of(writer, 60)


@pytest.mark.real("moto")
def test_key_of_a_follower_reads_the_storage_and_cannot_write_there():
    with mail_hosts(1, S3WithPolicies()) as (writer, (follower,)):
        writer.ctl("aliases", "add", "a@d1.test", "alice")
        follower.await_rows_of(writer)
        follower.end(*FOLLOWER)
        follower.ctl("db", "promote")
        refusals = "put object {}/.*AccessDenied"
        for role, leader in (("follower", "mx2"), ("follower", "mx1"), ("writer", "mx2")):  # a writer's key is for its own folder
            follower.role = role
            follower.set_leader(leader)
            (follower.directory / "replicate.log").unlink(missing_ok=True)
            shutil.rmtree(follower.shared.parent)
            follower.shared.parent.mkdir()
            follower.start(*WRITER)
            wait_until(lambda: re.search(refusals.format(leader), follower.log("replicate")), 30, what="the refusal")  # noqa: B023
            assert "snapshot complete" not in follower.log("replicate")
            follower.end(*WRITER, with_signal=signal.SIGKILL)  # Litestream would try again for 30 s


@pytest.mark.real("root", "systemd", "strace", "moto")
def test_services_use_no_system_call_and_no_socket_that_their_units_forbid(short_dir):
    wrapper = ["strace", "-D", "-f", "-q", "-o", f"{short_dir}/SERVICE", "--"]
    with mail_hosts(1, S3(), wrapper) as (writer, (follower,)):
        writer.ctl("aliases", "add", "a@d1.test", "alice")
        follower.await_rows_of(writer, 60)
        assert {code for host in (writer, follower) for code in host.end(*host.processes)} == {0}
    for service in (*WRITER, *FOLLOWER):
        unit, text = EXAMPLES / f"mailcloak-{service}.service", (short_dir / service).read_text(errors="replace")
        used = set(re.findall(r"^\d+ +(\w+)\(", text, re.MULTILINE))
        assert len(used) > 30
        as_root = {"setresuid", "setresgid", "fchown"}  # to make files as the owner of the directory
        assert used - as_root <= allowed_system_calls(unit), service
        families = set(re.findall(r"\bsocket\((AF_\w+)", text)) - {"AF_NETLINK"}
        assert families <= set(setting(unit, "RestrictAddressFamilies").split()), service


def test_follower_is_promoted_and_the_old_writer_comes_back_as_a_follower():
    with mail_hosts(2) as (old, (new, third)):
        old.ctl("aliases", "add", "before@d1.test", "alice")
        for host in (new, third):
            host.await_rows_of(old)
        old.end(*WRITER, with_signal=signal.SIGKILL)  # the host is lost
        # README, "The writer is lost"
        assert new.end(*reversed(FOLLOWER)) == [0, 0]
        new.ctl("db", "promote")
        for file in new.shared.parent.iterdir():
            file.unlink()
        new.set_leader("mx2")
        new.start(*WRITER)
        new.await_copy()
        new.ctl("aliases", "add", "after@d1.test", "bob")
        third.end("follow")
        third.set_leader("mx2")
        third.start("follow")
        third.await_rows_of(new)
        # the old writer comes back, and does not know
        old.start(*WRITER)
        old.ctl("aliases", "add", "lost@d1.test", "carol")
        time.sleep(2)
        assert third.has_rows_of(new)
        # also a host that still looks there takes nothing from it
        third.end("follow")
        third.set_leader("mx1")
        third.start("follow")
        wait_until(lambda: "is no longer the writer" in third.log("mirror"), 30, what="refusal")
        assert third.has_rows_of(new)
        third.end("follow")
        third.set_leader("mx2")
        third.start("follow")
        # it becomes a follower
        assert old.end(*WRITER) == [0, 0]
        shutil.rmtree(old.shared.parent)
        old.shared.parent.mkdir()
        old.set_leader("mx2")
        old.start("follow")
        wait_until(old.shared.exists, what="the copy")
        wait_until(lambda: old.ctl("db", "mirror", old.shared, "--adopt", check=False).returncode == 0, seconds=30, what="adopted")
        old.start("mirror")
        new.ctl("aliases", "add", "end@d1.test", "alice")
        for host in (old, third):
            host.await_rows_of(new)
        assert "follows that of" in old.ctl("aliases", "add", "x@d1.test", "alice", check=False).stderr
