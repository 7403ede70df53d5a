"""What every part of the bench uses: questions, servers, load, commits, text."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import platform
import pwd
import re
import select
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
BUILD = ROOT / "build" / "bench"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import Daemon  # noqa: E402

import mailcloak  # noqa: E402

DOMAIN = "bench.test"
OUTSIDE = "friend@elsewhere.test"
OTHER_ALIAS = f"other@{DOMAIN}"  # of its own in each database, for Commits; nobody asks about it
MEBIBYTE = 1024 * 1024

# What smtpd of Postfix 3.7.11 sent, in its order, with values as long as those of mail from the Internet.
POLICY_REQUEST = """\
request=smtpd_access_policy
protocol_state=RCPT
protocol_name=ESMTP
client_address=192.0.2.7
client_name=client.elsewhere.test
client_port={client_port}
reverse_client_name=client.elsewhere.test
server_address=192.0.2.1
server_port=25
helo_name=client.elsewhere.test
sender={sender}
recipient={recipient}
recipient_count=0
queue_id=
instance=2fe4.6b0460f2.{instance:05x}.0
size=12345
etrn_domain=
stress=
sasl_method={sasl_method}
sasl_username={sasl_username}
sasl_sender=
ccert_subject=
ccert_issuer=
ccert_fingerprint=
ccert_pubkey_fingerprint=
encryption_protocol=TLSv1.3
encryption_cipher=TLS_AES_256_GCM_SHA384
encryption_keysize=256
policy_context=

"""


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


# ---- Questions


class Question(NamedTuple):
    request: bytes
    answer: bytes


def netstring(data: bytes) -> bytes:
    return b"%d:%s," % (len(data), data)


def policy_answer(action: str) -> bytes:
    return f"action={action}\n\n".encode()


DUNNO = policy_answer("DUNNO")


def ask_policy(number: int, recipient: str, sender: str = OUTSIDE, username: str = "", method: str = "XOAUTH2") -> Question:
    """A full request that gets DUNNO; number makes it differ from others where Postfix's requests differ."""
    attributes = {
        "recipient": recipient,
        "sender": sender,
        "sasl_username": username,
        "sasl_method": method if username else "",
        "client_port": 32768 + number % 28232,
        "instance": number % 0xFFFFF,
    }
    return Question(POLICY_REQUEST.format(**attributes).encode(), DUNNO)


def ask_map(address: str, answer: str) -> Question:
    return Question(netstring(f"alias {address}".encode()), netstring(answer.encode()))


def ask_alias(number: int, users: int) -> Question:
    """One of numbered_aliases(), of the map."""
    return ask_map(f"alias{number}@{DOMAIN}", f"OK user{number % users}@{DOMAIN}")


def ask_bare_map(number: int) -> Question:
    """The same request, with the answer of bench/bare.py."""
    return ask_map(f"alias{number}@{DOMAIN}", f"OK to-alias{number}@{DOMAIN}")


def write_questions(path: Path, questions: Iterable[Question]) -> Path:
    with open(path, "wb") as file:
        for question in questions:
            file.write(netstring(question.request) + netstring(question.answer) + b"\n")
    return path


# ---- Servers


class Server(NamedTuple):
    path: Path  # of its socket
    pid: int


class StandIn:
    """The stand-in for Keycloak, with this many users."""

    def __init__(self, users: int, latency_seconds: float = 0) -> None:
        command = [sys.executable, str(BENCH / "stand_in.py"), str(users), str(latency_seconds)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.config = json.loads(self._read_line())

    def counts(self) -> Counter[str]:
        """How many requests of each kind it has had."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return Counter(json.loads(self._read_line()))

    def _read_line(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            sys.exit("bench: the stand-in for Keycloak has ended")
        return line

    def close(self) -> None:
        end(self.process)


def end(process: subprocess.Popen[Any]) -> None:
    """End a process that was started here."""
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()
    process.wait()


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    """A directory for a daemon and all of its files; short, for its sockets."""
    path = Path(tempfile.mkdtemp(prefix="mcb"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def make_database(path: Path, aliases: Iterable[tuple[str, str]]) -> None:
    """A database of these (address, username), of the address that the daemon itself asks about, and of OTHER_ALIAS; one transaction."""
    mailcloak.prepare_database(str(path), 30)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        rows = itertools.chain([(f"postmaster@{DOMAIN}", "user0"), (OTHER_ALIAS, "user0")], aliases)
        connection.executemany("INSERT INTO aliases (alias_email, username) VALUES (?, ?)", rows)
        connection.commit()


def numbered_aliases(count: int, users: int) -> Iterator[tuple[str, str]]:
    return ((f"alias{number}@{DOMAIN}", f"user{number % users}") for number in range(count))


def make_daemon(home: Path, keycloak: dict[str, Any], sockets: Path | None = None, user: str = "", **policy: Any) -> Daemon:
    """A daemon of its own process at log level info, not started; sockets is the directory of its sockets."""
    sockets = sockets or home
    names = ("policy", "socketmap") if sockets == home else ("mailcloak", "mailcloak-socketmap")
    config = {
        "keycloak": keycloak,
        "policy": {"domain": DOMAIN, "recipient_delimiter": "+", **policy},
        "sqlite": {"path": str(home / "state.db")},
        "sockets": {"policy_socket": str(sockets / names[0]), "socketmap_socket": str(sockets / names[1])},
        "daemon": {"user": user},
    }
    if not user:
        config["sockets"].update(socket_owner_user=pwd.getpwuid(os.geteuid()).pw_name, socket_owner_group="")
    return Daemon(home, config, level="info")


def add_apps(path: Path, apps: int, senders: int) -> None:
    """Apps app0, app1 ... with senders shop0@bench.test, shop1@bench.test ... each, as mailcloakctl adds them."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        names = [f"app{number}" for number in range(apps)]
        connection.executemany("INSERT INTO apps (app_id, secret_hash) VALUES (?, '{PLAIN}secret')", ((name,) for name in names))
        rows = ((name, f"shop{number}@{DOMAIN}") for name in names for number in range(senders))
        connection.executemany("INSERT INTO app_from (app_id, from_addr) VALUES (?, ?)", rows)
        connection.commit()


@contextlib.contextmanager
def running(
    home: Path, users: int, aliases: int, latency_seconds: float = 0, *, watched: bool = False, **policy: Any
) -> Iterator[tuple[Daemon, StandIn]]:
    """A daemon with this many users and aliases, ready and with an empty cache; its database may be there already.

    watched: home / "passes" gets the passes of its collector, see bench/watched.py.
    """
    with contextlib.closing(StandIn(users, latency_seconds)) as keycloak:
        if not (home / "state.db").exists():
            make_database(home / "state.db", numbered_aliases(aliases, users))
        with contextlib.closing(make_daemon(home, keycloak.config, **policy)) as daemon:
            if watched:
                command = [sys.executable, str(BENCH / "watched.py"), str(home / "passes")]
                daemon._command = [*command, "--config", str(daemon.config_path)]
            daemon.start()
            yield daemon, keycloak


@contextlib.contextmanager
def listening(path: Path, *command: str) -> Iterator[Server]:
    """A server started with this command."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        connect(path, time.monotonic() + 10).close()
        yield Server(path, process.pid)
    finally:
        end(process)


def connect(path: Path, deadline: float) -> socket.socket:
    """A connection to a server that may still be about to start."""
    while True:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(10)
        try:
            client.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            client.close()
            if time.monotonic() > deadline:
                sys.exit(f"bench: nobody listens on {path}")
            time.sleep(0.001)
        else:
            return client


def bare_server(path: Path, *arguments: str) -> contextlib.AbstractContextManager[Server]:
    """bench/bare.py."""
    return listening(path, sys.executable, str(BENCH / "bare.py"), str(path), *arguments)


def policy_server(daemon: Daemon) -> Server:
    return Server(Path(daemon.config["sockets"]["policy_socket"]), daemon.process.pid)


def map_server(daemon: Daemon) -> Server:
    return Server(Path(daemon.config["sockets"]["socketmap_socket"]), daemon.process.pid)


def processor_seconds(pid: int) -> float:
    """The processor time that a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int, *, peak: bool = False) -> int:
    """Of memory now, or at most since forget_peak()."""
    name = "VmHWM" if peak else "VmRSS"
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE).group(1)) * 1024


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


# ---- Commits


class Commits:
    """Commits to the row of an alias that nobody asks about, at a steady rate from a thread of their own, and when each was made."""

    def __init__(self, database: Path, each_second: float) -> None:
        self.times: list[float] = []
        self._database, self._period = database, 1 / each_second
        self._over = threading.Event()
        self._failure: Optional[sqlite3.Error] = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Commits:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._failure:
            sys.exit(f"bench: a commit has failed: {self._failure}")

    def between(self, start: float, end: float) -> int:
        return sum(start <= each < end for each in self.times)

    def _run(self) -> None:
        with contextlib.closing(sqlite3.connect(self._database, timeout=30)) as connection:
            due = time.monotonic()
            while not self._over.wait(max(0.0, due - time.monotonic())):
                try:
                    connection.execute("UPDATE aliases SET updated_at = updated_at + 1 WHERE alias_email = ?", (OTHER_ALIAS,))
                    connection.commit()
                except sqlite3.Error as exc:
                    self._failure = exc
                    return
                self.times.append(time.monotonic())
                due = max(due + self._period, time.monotonic())


# ---- Load


class Figures(NamedTuple):
    rate: float  # answers a second
    p50_us: float
    p99_us: float
    max_us: float
    gap_us: float  # the longest time in which no connection got an answer
    load_share: float  # of one processor, used by load itself
    server_share: float  # and by the server
    resident: int  # the most bytes of memory that the server had meanwhile
    held: int  # and those it had at the end


HOLD_SECONDS = 3.0
ONCE_WARM = -1.0


def ask(server: Server, connections: int, seconds: float, questions: Path, *, hold: bool = False) -> Figures:
    """Ask a server for this many seconds; 0: until each question has been asked once; ONCE_WARM: the same, from when each connection
    has asked once.

    hold keeps the connections open for HOLD_SECONDS more, and says how much memory the server has at the end of these.
    """
    time.sleep(0.05)  # for the threads of the run before to end
    hold_seconds = HOLD_SECONDS if hold else 0.0
    command = [str(BUILD / "load"), *map(str, (server.path, connections, seconds, hold_seconds))]
    forget_peak(server.pid)
    processor = processor_seconds(server.pid)
    with open(questions, "rb") as file, subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, text=True) as process:
        try:
            select.select([process.stdout], [], [], 1200)
            processor = processor_seconds(server.pid) - processor
            peak = resident_bytes(server.pid, peak=True)
            time.sleep(0.9 * hold_seconds)
            held = resident_bytes(server.pid)
            output = process.communicate(timeout=hold_seconds + 5)[0]
        finally:
            process.kill()
    if process.returncode != 0:
        sys.exit(f"bench: load has failed: {' '.join(command)}")
    took = json.loads(output)
    times = [took[name] for name in ("p50_us", "p99_us", "max_us", "gap_us")]
    shares = [took["processor_seconds"] / took["seconds"], processor / took["seconds"]]
    return Figures(took["answers"] / took["seconds"], *times, *shares, peak, held)


# ---- Text


def spread(values: Sequence[float], form: str) -> str:
    """Median and, in brackets, the least and the greatest."""
    shown = [format(value, form) for value in (statistics.median(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def median_of(values: Iterable[float]) -> float:
    return statistics.median(list(values))


def part(figure: float, whole: float) -> float:
    """A ratio. Where there was no answer at all, in a short measurement, the whole counts as 1."""
    return figure / max(whole, 1.0)


def verdict(is_met: bool) -> str:
    return "met" if is_met else "**missed**"


def shown_ms(microseconds: float) -> str:
    return f"{microseconds / 1000:.2f}"


def shown_mib(size: float) -> str:
    return f"{size / MEBIBYTE:.0f}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def machine() -> str:
    """What the figures were taken on and with."""
    model = re.search(r"^(?:model name|Model)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    digest = hashlib.sha256((ROOT / "mailcloak.py").read_bytes()).hexdigest()[:12]
    return (
        f"{os.cpu_count()} processors ({model.group(1) if model else platform.machine()}), Linux {platform.release()}, "
        f"{platform.python_implementation()} {platform.python_version()}, SQLite {sqlite3.sqlite_version}; "
        f"mailcloak {mailcloak.__version__}, SHA-256 {digest}..."
    )
