"""Who may connect, from the first moment: how the sockets are created, what a swapped file can cause, and that root is given up."""

from __future__ import annotations

import contextlib
import grp
import itertools
import json
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import threading
import time
from pathlib import Path

import pytest
from conftest import USERS, SocketmapClient, as_nobody, read_of_threads, wait_until

import mailcloak

DAEMON, BIN, NOBODY = (pwd.getpwnam(name) for name in ("daemon", "bin", "nobody"))
ATTACK_SECONDS = 4.0  # of a file swapped thousands of times, for each directory
STARTS = 30  # of the daemon at the most, within twice that; three at the least


def in_child(function):
    """What function() returns, in a process of its own that is root to begin with; a failed assertion fails the test."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            outcome = {"value": function()}
        except BaseException as exc:
            outcome = {"error": f"{type(exc).__name__}: {exc}"}
        os.write(writer, json.dumps(outcome).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        outcome = json.load(pipe)
    os.waitpid(child, 0)
    assert "error" not in outcome, outcome["error"]
    return outcome["value"]


def daemon_with_two_users(make_daemon, folder, **sockets):
    """A daemon that is started as root, becomes bin, and whose sockets, in the folder, belong to the user daemon."""
    sockets = {"policy_socket": str(folder / "policy"), "socketmap_socket": str(folder / "socketmap"), **sockets}
    owner = {"socket_owner_user": "daemon", "socket_owner_group": "daemon"}
    daemon = make_daemon(static_users=USERS, daemon={"user": "bin"}, sockets={**owner, **sockets})
    state = daemon.directory / "state"
    state.mkdir()
    shutil.chown(state, "bin")
    daemon.config["sqlite"]["path"] = str(state / "state.db")
    return daemon


# ---- how they are made

CALLS = (
    *(
        "umask",
        "setresuid",
        "setresgid",
        "setreuid",
        "setregid",
        "setuid",
        "setgid",
        "setgroups",
        "bind",
        "listen",
        "accept",
        "accept4",
    ),
    *("chown", "lchown", "fchown", "fchownat", "chmod", "fchmod", "fchmodat", "fchmodat2", "mknod", "mknodat", "link", "linkat"),
    *("rename", "renameat", "renameat2", "openat"),
)


def traced_start(daemon, trace):
    """The system calls of a start, of one answer and of the end, in their order: those that make a file or change who is who."""
    calls = ",".join(f"?{call}" for call in CALLS)  # ? for those that this machine does not have
    daemon._command = ["strace", "-f", "-qq", "-o", str(trace), "-e", f"trace={calls}", *daemon._command]
    daemon.start()
    try:
        assert daemon.ask(recipient="alice@d1.test") == "DUNNO"
    finally:
        os.kill(int(re.search(r"daemon: started .* pid=(\d+)", daemon.log())[1]), signal.SIGTERM)
    assert daemon.process.wait(10) == 0
    return [line.split(None, 1)[1] for line in trace.read_text().splitlines() if "resumed>" not in line]


def without_reading(calls):
    """The calls but for files that are opened to be read, of which Python opens hundreds."""
    return [call for call in calls if not (call.startswith("openat") and "O_RDONLY" in call and "O_PATH" not in call)]


def assert_in_order(calls, *patterns):
    """Each pattern is found after the one before it, and nothing that is a change of owner or mode stands between them."""
    at = -1
    for pattern in patterns:
        found = next((index for index in range(at + 1, len(calls)) if re.search(pattern, calls[index])), None)
        assert found is not None, f"{pattern} not found after {calls[at]!r} in:\n" + "\n".join(calls)
        between = [call for call in calls[at + 1 : found] if re.match(r"[fl]?ch(own|mod)|link|rename|mknod|umask", call)]
        assert at < 0 or not between, f"{between} before {pattern}"
        at = found
    return calls[at + 1 :]


def assert_root_is_given_up(calls):
    """Fail unless root is given up, is tried for once more in vain, and no connection is taken before that."""
    rest = assert_in_order(
        calls,
        rf"^setgroups\(1, \[{BIN.pw_gid}\]\) += 0",
        rf"^setresgid\({BIN.pw_gid}, {BIN.pw_gid}, {BIN.pw_gid}\) += 0",
        rf"^setresuid\({BIN.pw_uid}, {BIN.pw_uid}, {BIN.pw_uid}\) += 0",
        r"^setresuid\(0, 0, 0\) += -1 EPERM",
        r"^openat\(.*state\.db.*O_CREAT.*\) += \d+",  # the database is made by the daemon's own user
    )
    rest = assert_in_order(rest, r"^accept4?\(")
    assert not [call for call in calls[: len(calls) - len(rest) - 1] if call.startswith("accept")]


@pytest.mark.real("strace", "root")
def test_socket_in_a_directory_of_its_owner_is_made_by_its_owner_and_never_touched_again(make_daemon, short_dir):
    """bind() makes the file with owner, group and mode at once; no chown, no chmod, no moment of another umask."""
    private = short_dir / "private"
    private.mkdir(mode=0o700)
    shutil.chown(private, "daemon", "daemon")
    daemon = daemon_with_two_users(make_daemon, private)
    calls = without_reading(traced_start(daemon, short_dir / "trace"))
    rest = calls
    for name in ("policy", "socketmap"):
        rest = assert_in_order(
            rest,
            r"^umask\(0117\)",
            rf"^setresgid\(-1, {DAEMON.pw_gid}, -1\) += 0",
            rf"^setresuid\(-1, {DAEMON.pw_uid}, -1\) += 0",
            rf"^bind\(.*/private/{name}\".*\) += 0",
            r"^setresuid\(-1, 0, -1\) += 0",
            r"^setresgid\(-1, 0, -1\) += 0",
            r"^listen\(.*\) += 0",
            r"^umask\(",
        )
    assert_root_is_given_up(rest)
    assert not [call for call in calls if re.match(r"l?chown|fchownat|chmod|fchmodat", call)], calls


@pytest.mark.real("strace", "root")
def test_socket_in_a_directory_closed_to_its_owner_is_handed_over_as_the_file_itself(make_daemon, short_dir):
    """Made with mode 0, opened without following a link, given away by its descriptor; nothing is done by its name."""
    private = short_dir / "private"
    private.mkdir(mode=0o711)
    daemon = daemon_with_two_users(make_daemon, private)
    calls = without_reading(traced_start(daemon, short_dir / "trace"))
    rest = calls
    for name in ("policy", "socketmap"):
        rest = assert_in_order(
            rest,
            r"^umask\(0117\)",
            rf"^bind\(.*/private/{name}\".*\) += -1 EACCES",
        )
        rest = assert_in_order(
            rest,
            r"^setresuid\(-1, 0, -1\) += 0",
            r"^umask\(0777\)",
        )
        rest = assert_in_order(
            rest,
            rf"^bind\(.*/private/{name}\".*\) += 0",
            rf"^openat\(AT_FDCWD, \"[^\"]*/private/{name}\", (?=.*O_NOFOLLOW)(?=.*O_PATH).*\) += \d+",
            rf"^(chown|fchownat)\((AT_FDCWD, )?\"/proc/self/fd/\d+\", {DAEMON.pw_uid}, {DAEMON.pw_gid}(, 0)?\) += 0",
        )
        rest = assert_in_order(rest, r"^f?chmod(at)?\((AT_FDCWD, )?\"/proc/self/fd/\d+\", 0660\) += 0")
        rest = assert_in_order(rest, r"^listen\(.*\) += 0", r"^umask\(")
    assert_root_is_given_up(rest)
    by_name = [call for call in calls if re.match(r"l?chown|fchownat|chmod|fchmodat", call) and "/proc/self/fd/" not in call]
    assert not by_name, by_name


@pytest.mark.real("root")
@pytest.mark.parametrize("mode", [0o755, 0o711], ids=["owner may write", "owner may not write"])
def test_socket_in_a_directory_that_passes_on_its_group_has_its_own_group(short_dir, mode):
    """As Postfix's own directory public, which is setgid postdrop."""
    folder = short_dir / "public"
    folder.mkdir()
    os.chown(folder, DAEMON.pw_uid if mode == 0o755 else 0, BIN.pw_gid)
    folder.chmod(mode | stat.S_ISGID)
    path = str(folder / "policy")
    sockets = mailcloak.SocketsConfig(path, "", "daemon", "daemon", 0o660)

    def make():
        mailcloak.bind_socket(path, "sockets.policy_socket", sockets)
        status = os.lstat(path)
        return [status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)]

    assert in_child(make) == [DAEMON.pw_uid, DAEMON.pw_gid, 0o660]


@pytest.mark.real("root")
def test_socket_of_an_ordinary_user_has_the_group_asked_for_before_anybody_can_connect(short_dir, monkeypatch):
    """A group of the owner that is not the first: the file is created with the first one, and nothing listens until that is changed."""
    folder = short_dir / "run"
    folder.mkdir()
    shutil.chown(folder, "nobody")
    path = str(folder / "policy")
    sockets = mailcloak.SocketsConfig(path, "", "nobody", "bin", 0o660)
    events = []

    class Listener(socket.socket):
        def bind(self, address):
            super().bind(address)
            events.append("bind")

        def listen(self, *backlog):
            events.append(f"listen group={os.lstat(path).st_gid}")
            super().listen(*backlog)

    def make():
        os.setgroups([BIN.pw_gid])
        os.setgid(NOBODY.pw_gid)
        os.setuid(NOBODY.pw_uid)
        mailcloak.socket.socket = Listener
        mailcloak.bind_socket(path, "sockets.policy_socket", sockets)
        return events

    assert in_child(make) == ["bind", f"listen group={BIN.pw_gid}"]
    assert stat.S_IMODE(os.lstat(path).st_mode) == 0o660


@pytest.mark.real("root")
@pytest.mark.parametrize(
    ("user", "groups", "outcome"),
    [
        ("daemon", [], "connected"),
        ("nobody", ["daemon"], "connected"),
        ("nobody", [], "PermissionError"),
        ("bin", [], "PermissionError"),
    ],
    ids=["owner", "member of the group", "anybody", "the daemon's own user"],
)
@pytest.mark.parametrize("mode", [0o777, 0o711], ids=["owner may write", "owner may not write"])
def test_owner_and_group_may_connect_and_nobody_else(make_daemon, short_dir, mode, user, groups, outcome):
    folder = short_dir / "run"
    folder.mkdir()
    folder.chmod(mode)
    daemon = daemon_with_two_users(make_daemon, folder).start()

    def connect():
        account = pwd.getpwnam(user)
        os.setgroups([grp.getgrnam(name).gr_gid for name in groups])
        os.setgid(account.pw_gid)
        os.setuid(account.pw_uid)
        outcomes = set()
        for name in ("policy", "socketmap"):
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as client:
                try:
                    client.connect(str(folder / name))
                    outcomes.add("connected")
                except OSError as exc:
                    outcomes.add(type(exc).__name__)
        return sorted(outcomes)

    assert in_child(connect) == [outcome]
    assert daemon.stop() == 0


# ---- somebody who may write in the same directory


class Folder:
    """A directory in which the user nobody may write, files that this user would like to have, and this user's own files."""

    def __init__(self, directory, owner):
        self.path = directory / "run"
        self.path.mkdir()
        if owner == "nobody":  # and the sockets' owner may not write there, so that root makes them
            shutil.chown(self.path, "nobody")
        else:
            self.path.chmod(0o777)
        self.secret, self.shared = directory / "shadow", directory / "shared"
        self.secret.write_text("precious")
        self.secret.chmod(0o600)
        self.shared.write_text("precious")
        self.shared.chmod(0o666)  # the kernel lets a user make a hard link to a file only if the user may write it
        self.own = self.path / "own"
        self.socket = self.path / "own-socket"
        as_nobody(self._make_own)
        self.before = self.state()

    def _make_own(self):
        self.own.write_text("")
        os.umask(0o777)  # as a socket is that root has just made
        socket.socket(socket.AF_UNIX).bind(str(self.socket))

    def state(self):
        """Owner, group and mode of all that was there before the daemon, and what is in the files."""
        paths = (self.secret, self.shared, self.own, self.socket, self.path)
        states = [(path.name, *(getattr(path.lstat(), f"st_{field}") for field in ("uid", "gid", "mode"))) for path in paths]
        return [*states, self.secret.read_text(), self.shared.read_text()]

    def attack(self):
        """Swap the sockets for something else until it is enough, and try to connect to what the daemon makes; as nobody."""
        rounds = swapped = moved = connected = 0
        aside = self.path / "aside"
        ways = itertools.cycle(
            [
                lambda path: os.symlink(self.secret, path),
                lambda path: os.link(self.shared, path),
                lambda path: os.link(self.own, path),
                lambda path: os.link(self.socket, path),
                lambda path: os.link(aside, path, follow_symlinks=False),  # a socket of the daemon from an earlier round
                lambda path: None,  # let the daemon have its way for once
            ]
        )
        (self.path / "begun").touch()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (self.path / "enough").exists():
            rounds += 1
            for name in ("policy", "socketmap"):
                path = self.path / name
                with contextlib.closing(socket.socket(socket.AF_UNIX)) as client, contextlib.suppress(OSError):
                    client.connect(str(path))
                    connected += 1
                with contextlib.suppress(OSError):
                    os.rename(path, aside)
                    moved += 1
                with contextlib.suppress(OSError):
                    next(ways)(path)
                    swapped += path.exists()
                if rounds % 50:  # and leave it there now and then
                    with contextlib.suppress(OSError):
                        os.unlink(path)
        return json.dumps({"rounds": rounds, "swapped": swapped, "moved": moved, "connected": connected})


@contextlib.contextmanager
def attacked(folder):
    """While the block runs, the user nobody attacks; yields the attacker's report, filled in at the end."""
    report = {}
    attacker = threading.Thread(target=lambda: report.update(json.loads(as_nobody(folder.attack))))
    attacker.start()
    wait_until((folder.path / "begun").exists)  # a fork while the test starts a daemon would take descriptors along
    try:
        yield report
    finally:
        (folder.path / "enough").touch()
        attacker.join()


def assert_nothing_was_gained(folder, report):
    assert report["rounds"] > 1000, report
    assert report["moved"] > 0, report  # what the daemon made, it did come upon
    assert report["connected"] == 0, report
    assert folder.state() == folder.before


@pytest.fixture(params=["everybody's", "nobody's"])
def folder(request, short_dir):
    """A directory where everybody may make and remove files; and one that belongs to the attacker."""
    return Folder(short_dir, "nobody" if request.param == "nobody's" else "root")


@pytest.mark.real("root")
def test_swapped_socket_path_gains_nothing_while_sockets_are_made(folder):
    """bind_socket() alone, again and again, so that each of its steps is hit; it fails or it makes the socket."""
    path = str(folder.path / "policy")
    sockets = mailcloak.SocketsConfig(path, "", "daemon", "daemon", 0o660)

    def make():
        made = refused = 0
        deadline = time.monotonic() + ATTACK_SECONDS
        while time.monotonic() < deadline:
            try:
                mailcloak.bind_socket(path, "sockets.policy_socket", sockets).close()
                made += 1
            except mailcloak.StartError:
                refused += 1
            with contextlib.suppress(OSError):
                os.unlink(path)
        return [made, refused]

    with attacked(folder) as report:
        made, refused = in_child(make)
    assert made > 10, (made, refused, report)
    assert refused > 10, (made, refused, report)
    assert_nothing_was_gained(folder, report)


@pytest.mark.long
@pytest.mark.real("root")
def test_swapped_socket_path_gains_nothing_while_the_daemon_starts_and_stops(make_daemon, folder):
    daemon = daemon_with_two_users(make_daemon, folder.path)
    starts = 0
    with attacked(folder) as report:
        deadline = time.monotonic() + 2 * ATTACK_SECONDS
        while starts < 3 or (time.monotonic() < deadline and starts < STARTS):
            already = daemon.log().count("daemon: started")
            daemon.launch()
            starts += 1
            wait_until(
                lambda already=already: daemon.process.poll() is not None or daemon.log().count("daemon: started") > already,
                seconds=30,
                what="start or refusal",
            )
            if daemon.process.poll() is None:
                assert daemon.stop() == 0
            assert daemon.process.returncode in (0, 1)
    assert "Traceback" not in daemon.log()
    assert_nothing_was_gained(folder, report)


@pytest.mark.real("root")
def test_owner_of_a_file_put_in_place_of_the_socket_is_not_taken_for_its_owner(make_daemon, short_dir):
    """Everybody may connect here; to empty the cache is for root, the daemon's user and the owner of the socket that was made."""
    folder = short_dir / "run"
    folder.mkdir()
    folder.chmod(0o777)
    daemon_with_two_users(make_daemon, folder, socket_mode="0666").start()

    def ask():
        os.rename(folder / "socketmap", folder / "moved")
        (folder / "socketmap").touch()
        with contextlib.closing(SocketmapClient(folder / "moved")) as client:
            return client.ask("flush *")

    assert as_nobody(ask).startswith("PERM ")


@pytest.mark.real("root")
def test_owner_is_known_when_the_name_of_the_socket_is_gone(make_daemon, short_dir):
    folder = short_dir / "run"
    folder.mkdir()
    folder.chmod(0o777)
    daemon = daemon_with_two_users(make_daemon, folder).start()
    client = daemon.socketmap()
    (folder / "socketmap").unlink()
    assert client.ask("flush *").startswith("OK ")


# ---- root is gone


def root_is_gone(groups):
    """Every way back to root that the kernel might offer fails, and the files of root are closed; returns the groups that remain."""
    attempts = [
        lambda: os.setuid(0),
        lambda: os.seteuid(0),
        lambda: os.setreuid(0, 0),
        lambda: os.setreuid(-1, 0),
        lambda: os.setresuid(-1, -1, 0),
        lambda: os.setgid(0),
        lambda: os.setegid(0),
        lambda: os.setresgid(0, 0, 0),
        lambda: os.setgroups([0]),
        lambda: os.initgroups("root", 0),
        lambda: os.chroot("/"),
        lambda: os.chown("/", 0, 0),
        lambda: os.open("/proc/1/mem", os.O_RDWR),
        lambda: os.kill(1, 0),
    ]
    for number, attempt in enumerate(attempts):
        try:
            attempt()
        except PermissionError:
            continue
        raise AssertionError(f"attempt {number} succeeded")
    assert os.getresuid() == (BIN.pw_uid,) * 3
    assert os.getresgid() == (BIN.pw_gid,) * 3
    assert sorted(os.getgroups()) == sorted(groups)
    status = Path("/proc/self/status").read_text()
    assert re.findall(r"^Cap(?:Inh|Prm|Eff|Amb):\t(\w+)$", status, re.MULTILINE) == ["0" * 16] * 4
    return True


@pytest.mark.real("root")
@pytest.mark.parametrize("before", [[], [0], [0, 4, 6, 42]], ids=["no groups", "group of root", "many groups"])
def test_after_the_drop_groups_are_the_users_and_root_cannot_be_regained(before):
    def drop():
        os.setgroups(before)
        mailcloak.drop_privileges("bin")
        return root_is_gone(os.getgrouplist("bin", BIN.pw_gid))

    assert in_child(drop)


@pytest.mark.real("root")
def test_every_thread_of_the_daemon_has_given_up_root(make_daemon, short_dir):
    daemon = daemon_with_two_users(make_daemon, short_dir).start()
    daemon.ask(recipient="alice@d1.test")
    clients = [daemon.policy() for _ in range(3)]
    assert [client.ask(recipient="alice@d1.test") for client in clients] == ["DUNNO"] * 3
    threads = read_of_threads(daemon.process.pid, "status")
    assert len(threads) >= 6
    groups = sorted(os.getgrouplist("bin", BIN.pw_gid))
    for thread in threads:
        fields = dict(line.split(":", 1) for line in thread.decode().splitlines())
        assert fields["Uid"].split() == [str(BIN.pw_uid)] * 4
        assert fields["Gid"].split() == [str(BIN.pw_gid)] * 4
        assert sorted(map(int, fields["Groups"].split())) == groups
        assert {fields[f"Cap{kind}"].strip() for kind in ("Inh", "Prm", "Eff", "Amb")} == {"0" * 16}


def become_bin():
    """Why the daemon would not go on."""
    try:
        mailcloak.drop_privileges("bin")
    except mailcloak.StartError as exc:
        return str(exc)
    return "went on"


@pytest.mark.real("root")
@pytest.mark.parametrize("call", ["setresuid", "setresgid", "initgroups"])
def test_user_that_cannot_be_taken_on_ends_the_start(call):
    def drop():
        def refuse(*_):
            raise PermissionError(1, "Operation not permitted")

        setattr(mailcloak.os, call, refuse)
        return become_bin()

    assert in_child(drop) == "daemon.user: cannot become 'bin': Operation not permitted"


@pytest.mark.real("root")
def test_root_that_could_be_regained_ends_the_start():
    """As it would be where the saved user id stays root's."""

    def drop():
        really = os.setresuid
        mailcloak.os.setresuid = lambda real, effective, saved: really(real, effective, 0)
        return become_bin()

    assert in_child(drop) == "daemon.user: root could be regained after becoming 'bin'"


@pytest.mark.real("root")
def test_start_that_fails_after_the_sockets_were_made_leaves_none(make_daemon, short_dir):
    """The user cannot write its database: the sockets, made as root, must not stay behind without a daemon."""
    daemon = daemon_with_two_users(make_daemon, short_dir, socket_owner_user="bin", socket_owner_group="bin")
    short_dir.chmod(0o777)
    (short_dir / "closed").mkdir(mode=0o755)
    daemon.config["sqlite"]["path"] = str(short_dir / "closed" / "state.db")
    assert daemon.launch().process.wait(10) == 1, daemon.log()
    assert "cannot be created: Permission denied, as user 'bin'" in daemon.log()
    assert not [name for name in ("policy", "socketmap") if os.path.lexists(short_dir / name)]
