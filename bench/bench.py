#!/usr/bin/env python3
"""Measure mailcloak, and write what comes out to bench/RESULTS.md.

bench.py all        the five below, one after another; make bench does this
bench.py table      requests a second beside those of a bare server (bench/bare.py)
bench.py lock       what one system call more costs that bare server, if it gives up Python's global lock and if it keeps it
bench.py growth     many aliases, many users, many connections: rate, p99, memory, start-up
bench.py postfix    messages a second through a private Postfix, with mailcloak and without; needs root and postfix
bench.py cold       users whom mailcloak does not know yet
bench.py profile    where the time goes, on the terminal alone; needs py-spy or perf

Each of the five writes its own section of RESULTS.md and leaves the others as they are. Exits 0 also where a goal is missed; the section
says so beside each figure. Questions are asked by build/bench/load, made of load.c: a compiled program, so that it is not what is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import platform
import pwd
import random
import re
import select
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
BUILD = ROOT / "build" / "bench"
RESULTS = BENCH / "RESULTS.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import Daemon  # noqa: E402

import mailcloak  # noqa: E402

DOMAIN = "bench.test"
OUTSIDE = "friend@elsewhere.test"
SETTLED_SECONDS = mailcloak.DATABASE_SETTLED_SECONDS + 0.5  # so long after a change of the database, answers are remembered again
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


def ask_policy(number: int, recipient: str, sender: str = OUTSIDE, username: str = "") -> Question:
    """A full request; number makes it differ from others where Postfix's requests differ."""
    attributes = {
        "recipient": recipient,
        "sender": sender,
        "sasl_username": username,
        "sasl_method": "XOAUTH2" if username else "",
        "client_port": 32768 + number % 28232,
        "instance": number % 0xFFFFF,
    }
    return Question(POLICY_REQUEST.format(**attributes).encode(), b"action=DUNNO\n\n")


def ask_map(number: int, users: int) -> Question:
    mailbox = f"OK user{number % users}@{DOMAIN}".encode()
    return Question(netstring(f"alias alias{number}@{DOMAIN}".encode()), netstring(mailbox))


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
    """The stand-in for Keycloak, with so many users."""

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
    """A database of these (address, username), made in one transaction, and of the address that the daemon itself asks about."""
    mailcloak.prepare_database(str(path), 30)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        rows = itertools.chain([(f"postmaster@{DOMAIN}", "user0")], aliases)
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


@contextlib.contextmanager
def running(home: Path, users: int, aliases: int, latency_seconds: float = 0, **policy: Any) -> Iterator[tuple[Daemon, StandIn]]:
    """A daemon with so many users and aliases, ready and with nothing remembered yet."""
    with contextlib.closing(StandIn(users, latency_seconds)) as keycloak:
        make_database(home / "state.db", numbered_aliases(aliases, users))
        with contextlib.closing(make_daemon(home, keycloak.config, **policy)) as daemon:
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


def policy_server(daemon: Daemon) -> Server:
    return Server(Path(daemon.config["sockets"]["policy_socket"]), daemon.process.pid)


def map_server(daemon: Daemon) -> Server:
    return Server(Path(daemon.config["sockets"]["socketmap_socket"]), daemon.process.pid)


def wait_until_settled(daemon: Daemon) -> None:
    time.sleep(max(0.0, daemon.database.stat().st_ctime + SETTLED_SECONDS - time.time()))


def processor_seconds(pid: int) -> float:
    """Used by a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int, *, peak: bool = False) -> int:
    """Of memory now, or at most since forget_peak()."""
    name = "VmHWM" if peak else "VmRSS"
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE).group(1)) * 1024


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


# ---- Load


class Figures(NamedTuple):
    rate: float  # answers a second
    p50_us: float
    p99_us: float
    max_us: float
    load_share: float  # of one processor, used by load itself
    server_share: float  # and by the server
    resident: int  # the most bytes of memory that the server had meanwhile
    held: int  # and those it had at the end


HOLD_SECONDS = 3.0


def ask(
    server: Server, connections: int, seconds: float, questions: Path, *, keep_changing: Path | None = None, hold: bool = False
) -> Figures:
    """Ask a server for so many seconds; 0: until each question has been asked once.

    keep_changing is a file whose times change meanwhile: a database whose answers shall not be remembered. hold keeps the connections
    open for HOLD_SECONDS more, and says how much memory the server has at the end of these.
    """
    time.sleep(0.05)  # for the threads of the run before to end
    hold_seconds = HOLD_SECONDS if hold else 0.0
    command = [str(BUILD / "load"), *map(str, (server.path, connections, seconds, hold_seconds))]
    forget_peak(server.pid)
    processor = processor_seconds(server.pid)
    deadline = time.monotonic() + 300
    if keep_changing:
        os.utime(keep_changing)
    with open(questions, "rb") as file, subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, text=True) as process:
        try:
            while not select.select([process.stdout], [], [], 0.1)[0] and time.monotonic() < deadline:
                if keep_changing:
                    os.utime(keep_changing)
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
    load_share, server_share = took["processor_seconds"] / took["seconds"], processor / took["seconds"]
    rate = took["answers"] / took["seconds"]
    return Figures(rate, took["p50_us"], took["p99_us"], took["max_us"], load_share, server_share, peak, held)


# ---- Text


def spread(values: Sequence[float], form: str) -> str:
    """Median and, in brackets, the least and the greatest."""
    shown = [format(value, form) for value in (statistics.median(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


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


TITLE = """\
# What mailcloak costs

Written by `make bench` (`bench/bench.py`, which says what it does); bench/NOTES.md says what the figures mean. Each section names what it
was taken on and with which command. Every figure that has a goal stands beside it.
"""
SECTIONS = ("table", "lock", "growth", "postfix", "cold")


def write_section(name: str, text: str, preamble: str) -> None:
    """Put a section into RESULTS.md in place of the one of before."""
    old = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else ""
    sections = dict(re.findall(r"^<!-- begin (\w+) -->\n(.*?)^<!-- end \1 -->$", old, re.MULTILINE | re.DOTALL))
    title, _, rest = text.partition("\n")
    sections[name] = f"{title}\n\n{preamble}\n{rest}"
    parts = [TITLE, *(f"<!-- begin {each} -->\n{sections[each]}<!-- end {each} -->\n" for each in SECTIONS if each in sections)]
    RESULTS.write_text("\n".join(parts), encoding="utf-8")
    say(f"{name}: written to {RESULTS.relative_to(ROOT)}")


# ---- table


class Asked(NamedTuple):
    """A question of the table."""

    title: str
    at_least: float  # of the bare server's rate
    aim: float
    server: Server
    questions: Path


TABLE_USERS = 100
REPEATED = 20  # requests for each user or alias, alike but for instance and client_port


def table_questions(home: Path, daemon: Daemon) -> list[Asked]:
    policy = policy_server(daemon)
    numbers = range(TABLE_USERS * REPEATED)

    def user(number: int) -> str:
        return f"user{number % TABLE_USERS}"

    primary = (ask_policy(n, f"{user(n)}@{DOMAIN}") for n in numbers)
    alias = (ask_policy(n, f"alias{n % TABLE_USERS}@{DOMAIN}") for n in numbers)
    own = (ask_policy(n, f"{user(n)}@elsewhere.test", f"{user(n)}@{DOMAIN}", user(n)) for n in numbers)
    mapped = (ask_map(n % TABLE_USERS, TABLE_USERS) for n in numbers)
    return [
        Asked("policy, known primary address", 0.5, 0.8, policy, write_questions(home / "q-primary", primary)),
        Asked("policy, alias", 0.5, 0.8, policy, write_questions(home / "q-alias", alias)),
        Asked("policy, authenticated user, own address", 0.5, 0.8, policy, write_questions(home / "q-own", own)),
        Asked("socketmap alias", 0.7, 1.0, map_server(daemon), write_questions(home / "q-map", mapped)),
    ]


class Row(NamedTuple):
    """A question in one round, and the bare server before and after it."""

    figures: Figures
    bare_rate: float
    bare_p99_us: float


def measure_round(asked: Sequence[Asked], bare: Server, connections: int, seconds: float) -> tuple[list[Row], list[Figures]]:
    """bare, question, bare, question, ..., bare: a row for each question, and what the bare server did."""
    bare_questions = asked[0].questions
    bares = [ask(bare, connections, seconds, bare_questions)]
    rows = []
    for question in asked:
        figures = ask(question.server, connections, seconds, question.questions)
        bares.append(ask(bare, connections, seconds, bare_questions))
        before, after = bares[-2:]
        rows.append(Row(figures, (before.rate + after.rate) / 2, (before.p99_us + after.p99_us) / 2))
    return rows, bares


def table(quick: bool) -> str:
    rounds, seconds = (2, 0.5) if quick else (5, 1.5)
    all_connections = (1, 10, 50)
    rows: dict[tuple[str, int], list[Row]] = {}
    bares: dict[int, list[Figures]] = {connections: [] for connections in all_connections}
    echoes: dict[int, Figures] = {}
    with directory() as home, running(home, TABLE_USERS, TABLE_USERS) as (daemon, _):
        asked = table_questions(home, daemon)
        with listening(home / "echo", str(BUILD / "echo"), str(home / "echo"), "action=DUNNO\\n\\n") as echo:
            for connections in all_connections:
                echoes[connections] = ask(echo, connections, seconds, asked[0].questions)
                say(f"table: {connections} connections, C echo server {echoes[connections].rate:,.0f}/s")
        wait_until_settled(daemon)
        for question in asked:
            ask(question.server, 10, 0, question.questions)
        with listening(home / "bare", sys.executable, str(BENCH / "bare.py"), str(home / "bare")) as bare:
            for number in range(rounds):
                for connections in all_connections:
                    of_round, of_bare = measure_round(asked, bare, connections, seconds)
                    bares[connections] += of_bare
                    for question, row in zip(asked, of_round):
                        rows.setdefault((question.title, connections), []).append(row)
                    ratios = ", ".join(f"{row.figures.rate / row.bare_rate:.2f}" for row in of_round)
                    say(f"table: round {number + 1} of {rounds}, {connections} connections, share of the bare server: {ratios}")
    return table_text(asked, rows, bares, echoes, f"{rounds} interleaved rounds of {seconds} s a measurement")


def table_text(
    asked: Sequence[Asked],
    rows: dict[tuple[str, int], list[Row]],
    bares: dict[int, list[Figures]],
    echoes: dict[int, Figures],
    how: str,
) -> str:
    lines = []
    for question in asked:
        for connections in bares:
            rounds = rows[question.title, connections]
            ratios = [row.figures.rate / row.bare_rate for row in rounds]
            p99_ratios = [row.figures.p99_us / row.bare_p99_us for row in rounds]
            ratio, p99_ratio = statistics.median(ratios), statistics.median(p99_ratios)
            p99_goal = f" (3.0: {verdict(p99_ratio <= 3)})" if connections == 50 else ""
            lines.append(
                [
                    question.title,
                    connections,
                    spread([row.figures.rate for row in rounds], ",.0f"),
                    f"**{ratio:.2f}** ({min(ratios):.2f} to {max(ratios):.2f})",
                    f"{question.at_least}: {verdict(ratio >= question.at_least)}",
                    f"{question.aim}: {verdict(ratio >= question.aim)}",
                    shown_ms(statistics.median(row.figures.p99_us for row in rounds)),
                    f"{p99_ratio:.2f}{p99_goal}",
                ]
            )
    header = ["question", "connections", "requests/s", "share of bare", "at least", "aim", "p99 ms", "p99, times bare's"]
    answers = markdown_table(header, lines)
    header = ["server", "connections", "requests/s", "p99 ms", "load, of one processor", "server, of one processor"]
    lines = [
        [
            "bare (Python)",
            connections,
            spread([each.rate for each in figures], ",.0f"),
            shown_ms(statistics.median(each.p99_us for each in figures)),
            f"{statistics.median(each.load_share for each in figures):.0%}",
            f"{statistics.median(each.server_share for each in figures):.0%}",
        ]
        for connections, figures in bares.items()
    ]
    lines += [
        ["echo (C)", connections, f"{each.rate:,.0f}", shown_ms(each.p99_us), f"{each.load_share:.0%}", f"{each.server_share:.0%}"]
        for connections, each in echoes.items()
    ]
    return f"""## An answer beside a bare socket round trip

{how}: bare, question, bare, question, ..., bare. Medians, in brackets the least and the
greatest; the share is taken within each round, of the mean of the two bare measurements around the question. Each connection keeps one
request in flight. {TABLE_USERS} users and {TABLE_USERS} aliases, each asked before; policy requests have all the attributes of Postfix 3.7
and differ in instance and client_port, with recipient and sender checked in one request. The bare server (bench/bare.py) gets the requests
of the first question.

{answers}
The questions come from a compiled program (bench/load.c, one thread, epoll). It is not what is measured: on a C echo server
(bench/echo.c) it goes as far as the last three rows, and beside the bare server its processor is idle for part of the time. On one
connection server and load take turns, so that neither can be busy all the time.

{markdown_table(header, lines)}"""


# ---- lock


def lock(quick: bool) -> str:
    """What system calls cost beside the bare server, by whether they give up Python's global lock."""
    rounds, seconds = (2, 0.5) if quick else (5, 1.5)
    all_connections = (1, 10, 50)
    calls = [(name, count) for name in ("stat", "statx") for count in (1, 2)]
    ratios: dict[tuple[str, int, int], list[float]] = {}
    with directory() as home, contextlib.ExitStack() as servers:
        questions = write_questions(home / "q", (ask_policy(n, f"user{n % TABLE_USERS}@{DOMAIN}") for n in range(REPEATED)))
        command = [sys.executable, str(BENCH / "bare.py")]
        bare = servers.enter_context(listening(home / "bare", *command, str(home / "bare")))
        others = {}
        for name, count in calls:
            path = home / f"{name}{count}"
            others[name, count] = servers.enter_context(listening(path, *command, str(path), str(count), name))
        for number, connections in itertools.product(range(rounds), all_connections):
            before = ask(bare, connections, seconds, questions).rate
            for (name, count), server in others.items():
                rate = ask(server, connections, seconds, questions).rate
                after = ask(bare, connections, seconds, questions).rate
                ratios.setdefault((name, count, connections), []).append(2 * rate / (before + after))
                before = after
            say(f"lock: round {number + 1} of {rounds}, {connections} connections")
    header = ["more system calls an answer", *(f"share of bare, {connections} connections" for connections in all_connections)]
    lines = [
        [f"{count}, which {does} the lock", *(spread(ratios[name, count, connections], ".2f") for connections in all_connections)]
        for (name, does), count in itertools.product((("stat", "give up"), ("statx", "keep")), (1, 2))
    ]
    return f"""## A system call more

{rounds} interleaved rounds of {seconds} s a measurement: the bare server, and the same with one or two more system calls an answer (bench/bare.py),
os.stat, which gives up Python's global lock, or statx by ctypes.PyDLL, which keeps it. Medians, in brackets the least and the greatest.

{markdown_table(header, lines)}"""


# ---- growth


class Series(NamedTuple):
    """A daemon of one size, by connections: right after a change of the database, and with answers it remembers."""

    name: str
    idle_resident: int
    asked_once: Figures  # with the most connections, by each
    anew: dict[int, Figures]
    again: dict[int, Figures]


GROWTH_CONNECTIONS = (1, 50, 500)
MAX_SAMPLE = 200_000
GROWTH_USERS = 100


class SeriesQuestions(NamedTuple):
    all: Path
    remembered: Path  # so many of them as are remembered at most
    one_each: Path  # for each of the most connections


def write_series(home: Path, questions: Sequence[Question]) -> SeriesQuestions:
    one_each = itertools.islice(itertools.cycle(questions), GROWTH_CONNECTIONS[-1])
    return SeriesQuestions(
        write_questions(home / "q-all", questions),
        write_questions(home / "q-remembered", questions[: mailcloak.MAX_REMEMBERED_ANSWERS]),
        write_questions(home / "q-one-each", one_each),
    )


def measure_series(daemon: Daemon, server: Server, name: str, questions: SeriesQuestions, seconds: float) -> Series:
    """The daemon has not been asked by many connections yet."""
    idle = resident_bytes(server.pid)
    once = ask(server, GROWTH_CONNECTIONS[-1], 0, questions.one_each, keep_changing=daemon.database, hold=True)
    time.sleep(1)  # for these connections to end
    anew, again = {}, {}
    for connections in GROWTH_CONNECTIONS:
        anew[connections] = ask(server, connections, seconds, questions.all, keep_changing=daemon.database)
        say(f"growth: {name}, {connections} connections, made anew {anew[connections].rate:,.0f}/s")
    wait_until_settled(daemon)
    ask(server, 10, 0, questions.remembered)
    for connections in GROWTH_CONNECTIONS:
        again[connections] = ask(server, connections, seconds, questions.remembered)
        resident = shown_mib(again[connections].resident)
        say(f"growth: {name}, {connections} connections, remembered {again[connections].rate:,.0f}/s, {resident} MiB")
    return Series(name, idle, once, anew, again)


def random_order(count: int) -> list[int]:
    """The numbers below count in random order, at most MAX_SAMPLE of them; the same in every run."""
    return random.Random(20260101).sample(range(count), min(count, MAX_SAMPLE))  # noqa: S311


def grow_aliases(count: int, seconds: float) -> tuple[Series, list[float]]:
    """The series, and how long each of five starts took."""
    with directory() as home:
        say(f"growth: {count:,} aliases, making the database")
        with running(home, GROWTH_USERS, count) as (daemon, _):
            questions = write_series(home, [ask_map(number, GROWTH_USERS) for number in random_order(count)])
            series = measure_series(daemon, map_server(daemon), f"{count:,} aliases", questions, seconds)
            starts = [measure_start(daemon) for _ in range(5)]
        say(f"growth: {count:,} aliases, start-up {spread(starts, '.2f')} s")
    return series, starts


def measure_start(daemon: Daemon) -> float:
    """Seconds from exec to the first answer of a new process."""
    daemon.stop()
    question = ask_map(0, GROWTH_USERS)
    started = time.monotonic()
    daemon.launch()
    with contextlib.closing(connect(map_server(daemon).path, started + 10)) as client:
        client.sendall(question.request)
        answer = client.recv(4096)
    took = time.monotonic() - started
    if answer != question.answer:
        sys.exit(f"bench: another answer: {answer!r}")
    return took


def grow_users(count: int, seconds: float) -> tuple[Series, float]:
    """The series, and how many users a second were looked up first."""
    with directory() as home, running(home, count, GROWTH_USERS, cache_ttl_seconds=3600) as (daemon, keycloak):
        questions = write_series(home, [ask_policy(n, f"user{n}@{DOMAIN}") for n in random_order(count)])
        say(f"growth: {count:,} users, asking for each")
        wait_until_settled(daemon)
        rate = ask(policy_server(daemon), 10, 0, questions.all).rate
        series = measure_series(daemon, policy_server(daemon), f"{count:,} users", questions, seconds)
        searches = keycloak.counts()["users"]
    if searches != count:
        sys.exit(f"bench: {searches} searches at Keycloak for {count} users, each of whom should be asked about once")
    return series, rate


def measure_bare(seconds: float) -> dict[int, Figures]:
    """The bare server, by connections."""
    with directory() as home, listening(home / "bare", sys.executable, str(BENCH / "bare.py"), str(home / "bare")) as bare:
        questions = write_questions(home / "q", (ask_policy(n, f"user{n}@{DOMAIN}") for n in range(1000)))
        return {connections: ask(bare, connections, seconds, questions) for connections in GROWTH_CONNECTIONS}


def growth(quick: bool) -> str:
    seconds = 0.5 if quick else 1.5
    bare = measure_bare(seconds)
    aliases = (1000, 10_000) if quick else (1000, 100_000, 1_000_000)
    users = (100, 1000) if quick else (100, 10_000, 100_000)
    by_aliases = {count: grow_aliases(count, seconds) for count in aliases}
    by_users = {count: grow_users(count, seconds) for count in users}
    return growth_text(bare, by_aliases, by_users, seconds)


def growth_text(
    bare: dict[int, Figures], aliases: dict[int, tuple[Series, list[float]]], users: dict[int, tuple[Series, float]], seconds: float
) -> str:
    many = GROWTH_CONNECTIONS[-1]
    lines = [
        ["the bare server", connections, "", "", f"{each.rate:,.0f}", shown_ms(each.p99_us), "", shown_mib(each.resident)]
        for connections, each in bare.items()
    ]
    for series in [*(each for each, _ in aliases.values()), *(each for each, _ in users.values())]:
        for connections in GROWTH_CONNECTIONS:
            anew, again = series.anew[connections], series.again[connections]
            lines.append(
                [
                    series.name,
                    connections,
                    f"{anew.rate:,.0f}",
                    shown_ms(anew.p99_us),
                    f"{again.rate:,.0f}",
                    shown_ms(again.p99_us),
                    shown_mib(anew.resident),
                    shown_mib(again.resident),
                ]
            )
    header = ["size", "connections", "anew/s", "p99 ms", "remembered/s", "p99 ms", "MiB anew", "MiB remembered"]
    figures = markdown_table(header, lines)
    lines = []
    for kind, group in (("aliases", aliases), ("users", users)):
        for name in ("anew", "again"):
            rates = [
                [getattr(series, name)[connections].rate for series, _ in group.values()] for connections in GROWTH_CONNECTIONS
            ]
            shares = ", ".join(f"{each[-1] / each[0]:.2f}" for each in rates)
            title = {"anew": "made anew", "again": "remembered"}[name]
            sizes = list(group)
            lines.append([f"{kind}, {title}", f"{sizes[-1]:,} beside {sizes[0]:,}", shares])
    flat = markdown_table(
        ["rate", "greatest beside smallest", f"share at {', '.join(map(str, GROWTH_CONNECTIONS))} connections"], lines
    )
    lines = []
    for series in [*(each for each, _ in aliases.values()), *(each for each, _ in users.values())]:
        sizes = (series.asked_once.held, series.asked_once.resident, series.anew[many].resident, series.again[many].resident)
        shown = [f"{size / MEBIBYTE:.1f}: {verdict(size < 100 * MEBIBYTE)}" for size in sizes]
        each_kib = (series.asked_once.held - series.idle_resident) / many / 1024
        lines.append([series.name, f"{series.idle_resident / MEBIBYTE:.1f}", *shown, f"{each_kib:.0f}"])
    header = ["size", "before, MiB", f"each asked once, {HOLD_SECONDS:.0f} s later", "the peak of that"]
    header += [f"peak of {seconds} s, anew", f"peak of {seconds} s, remembered", "KiB a connection that asked once"]
    memory = markdown_table(header, lines)
    lines = [
        [f"{count:,}", f"{spread(starts, '.3f')}", verdict(statistics.median(starts) < 0.5)]
        for count, (_, starts) in aliases.items()
    ]
    starts = markdown_table(["aliases", "start-up, s", "goal: under 0.5 s"], lines)
    cold = ", ".join(f"{count:,} users {rate:,.0f}/s" for count, (_, rate) in users.items())
    return f"""## Growth

{seconds} s a measurement, each taken once. Aliases are asked over the socketmap, users as recipients over the policy socket, in random
order with a fixed seed; of more than {MAX_SAMPLE:,} aliases a random {MAX_SAMPLE:,}. "Anew": the database is touched ten times a second,
so that nothing is remembered and SQLite is asked each time (and for users the directory's cache). "Remembered": each was asked before;
of more than {mailcloak.MAX_REMEMBERED_ANSWERS:,} aliases, so many as are remembered at most. The bare server is that of the first table, with policy
requests. Memory is the peak of the resident set (VmHWM) during the measurement, in one process for all rows of a size.

{figures}
Flat where it should be flat:

{flat}
Memory with {many} connections that have all asked, goal: under 100 MiB. In the first two columns each asks one question, all at the same
time, gets its answer from SQLite, and stays connected; in the next two all ask without a pause:

{memory}
Start-up, from exec to the first answer of a new process, median of five:

{starts}
The users were looked up before that, once each, at a stand-in without latency over 10 connections: {cold}. Here they are remembered
for an hour (cache_ttl_seconds); by default it is two minutes.
"""


# ---- postfix

# Beside the sample's own port, in the same Postfix, one that asks nobody, and one whose policy service is the bare server.
POSTFIX_SERVICES = """\
127.0.0.1:{without} inet n - y - - smtpd
  -o cleanup_service_name=cleanup-without
  -o virtual_alias_maps=
  -o smtpd_sender_restrictions=reject_non_fqdn_sender
  -o smtpd_recipient_restrictions=reject_non_fqdn_recipient
127.0.0.1:{bare} inet n - y - - smtpd
  -o cleanup_service_name=cleanup-without
  -o virtual_alias_maps=
  -o {{ smtpd_sender_restrictions = reject_non_fqdn_sender, check_policy_service unix:private/bare }}
  -o {{ smtpd_recipient_restrictions = reject_non_fqdn_recipient, check_policy_service unix:private/bare }}
cleanup-without unix n - y - 0 cleanup
  -o virtual_alias_maps=
"""
POSTFIX_ALIASES = 3000
POSTFIX_GOAL = 0.95
POSTFIX_PORTS = ("without", "bare", "smtp")


class Errand(NamedTuple):
    """What smtp-source does."""

    title: str
    messages: int
    sessions: int
    recipients: int = 1


def postfix(quick: bool) -> str:
    from real.postfix import PATH, PrivatePostfix

    source = shutil.which("smtp-source", path=PATH)
    if os.geteuid() != 0 or not source or not shutil.which("postfix", path=PATH):
        say("postfix: LEFT OUT, its section stays as it is: this part needs root, postfix and smtp-source")
        return ""
    rounds, share = (2, 10) if quick else (5, 1)
    errands = [
        Errand("1 session", 400 // share, 1),
        Errand("20 sessions", 1000 // share, 20),
        Errand("1 session, 100 recipients a message", 20 // share, 1, 100),
    ]
    settings = {"virtual_transport": "discard:", "in_flow_delay": "0"}
    taken: dict[tuple[str, str], list[float]] = {}
    with contextlib.ExitStack() as stack:
        instance = PrivatePostfix(
            domains=(DOMAIN, "d2.test"), settings=settings, services=POSTFIX_SERVICES, ports=["without", "bare"]
        )
        stack.callback(instance.close)
        instance.start()
        keycloak = stack.enter_context(contextlib.closing(StandIn(GROWTH_USERS)))
        home = instance.directory / "mailcloak"
        home.mkdir()
        names = ["info", *(f"{n}info" for n in range(POSTFIX_ALIASES))]  # those that smtp-source makes of info
        make_database(home / "state.db", ((f"{name}@{DOMAIN}", f"user{n % GROWTH_USERS}") for n, name in enumerate(names)))
        for path in (home, home / "state.db"):
            shutil.chown(path, "nobody")
        daemon = stack.enter_context(contextlib.closing(make_daemon(home, keycloak.config, instance.private, "nobody")))
        daemon.start()
        wait_until_settled(daemon)
        bare = stack.enter_context(
            listening(instance.private / "bare", sys.executable, str(BENCH / "bare.py"), str(instance.private / "bare"))
        )
        shutil.chown(bare.path, "postfix")
        check_postfix(instance)
        for number in range(rounds + 1):  # the first is not counted
            for errand in errands:
                for port in POSTFIX_PORTS:
                    seconds = send_messages(source, instance, errand, port)
                    if number:
                        taken.setdefault((errand.title, port), []).append(seconds)
                if number:
                    without, bare_rate, rate = (errand.messages / taken[errand.title, port][-1] for port in POSTFIX_PORTS)
                    rates = f"{rate:,.1f}/s, without {without:,.1f}/s, with the bare server {bare_rate:,.1f}/s"
                    say(f"postfix: round {number} of {rounds}, {errand.title}: {rates}")
        version = instance.postconf("mail_version")
    return postfix_text(errands, taken, version, rounds)


def check_postfix(instance: Any) -> None:
    """See that one port asks mailcloak and the other does not."""
    found = {}
    for port in ("smtp", "without"):
        (delivery,) = instance.deliveries(instance.send(OUTSIDE, f"1info@{DOMAIN}", port=port))
        found[port] = delivery.recipient
    if found != {"smtp": f"user2@{DOMAIN}", "without": f"1info@{DOMAIN}"}:
        sys.exit(f"bench: Postfix delivers elsewhere: {found}")


def send_messages(source: str, instance: Any, errand: Errand, port: str) -> float:
    """Seconds until smtp-source has got rid of all messages; then waits until Postfix has delivered them."""
    command = [source, "-s", str(errand.sessions), "-m", str(errand.messages), "-l", "2000", "-f", OUTSIDE, "-t", f"info@{DOMAIN}"]
    command += ["-r", str(errand.recipients)] if errand.recipients > 1 else ["-N"]
    started = time.monotonic()
    result = subprocess.run(
        [*command, f"inet:127.0.0.1:{instance.ports[port]}"], check=False, capture_output=True, text=True, timeout=120
    )
    seconds = time.monotonic() - started
    if result.returncode != 0:
        sys.exit(f"bench: smtp-source has failed: {result.stderr}{instance.log()[-2000:]}")
    deadline = time.monotonic() + 60
    while instance.queue():
        if time.monotonic() > deadline:
            sys.exit("bench: Postfix does not get its queue empty")
        time.sleep(0.1)
    return seconds


def postfix_text(errands: Sequence[Errand], taken: dict[tuple[str, str], list[float]], version: str, rounds: int) -> str:
    lines = []
    for errand in errands:
        without, bare, with_it = (taken[errand.title, port] for port in POSTFIX_PORTS)
        shares = [each_without / each_with for each_without, each_with in zip(without, with_it)]
        median = statistics.median(shares)
        bare_share = statistics.median(each_without / each_bare for each_without, each_bare in zip(without, bare))
        lines.append(
            [
                errand.title,
                errand.messages,
                spread([errand.messages / each for each in with_it], ",.1f"),
                spread([errand.messages / each for each in without], ",.1f"),
                f"**{median:.1%}** ({min(shares):.1%} to {max(shares):.1%})",
                verdict(median >= POSTFIX_GOAL),
                f"{bare_share:.1%}",
                *(f"{1000 * statistics.median(each) / errand.messages * errand.sessions:.2f}" for each in (with_it, without)),
            ]
        )
    header = [
        "smtp-source",
        "messages",
        "messages/s",
        "without",
        "share",
        f"goal: {POSTFIX_GOAL:.0%}",
        "share with the bare server",
    ]
    header += ["ms a message", "without"]
    return f"""## Through Postfix

Postfix {version} on the settings of examples/postfix, its own instance, with discard as transport and in_flow_delay = 0. smtp-source sends
messages of 2,000 bytes, a session for each, to aliases that differ from message to message; {rounds} rounds in turn, after one that is not
counted. "Without": another port of the same Postfix, with neither the policy service nor the alias map. With mailcloak each recipient costs
Postfix five questions: two policy requests, one to the socketmap from smtpd and two from cleanup. "The bare server": a third port, whose policy
service is bench/bare.py, two requests a recipient, without an alias map; what Postfix itself pays for asking anybody. Medians, in brackets the least and the greatest.

{markdown_table(header, lines)}"""


# ---- cold

COLD_LATENCY_SECONDS = 0.005


def cold(quick: bool) -> str:
    users = 200 if quick else 2000
    lines = []
    kinds = {
        "recipients, each another user": (50, lambda n: ask_policy(n, f"user{n}@{DOMAIN}"), users),
        "recipients, each another user, one connection": (1, lambda n: ask_policy(n, f"user{n}@{DOMAIN}"), users // 10),
        "senders, each another user logged in, with his own address": (
            50,
            lambda n: ask_policy(n, "x@elsewhere.test", f"user{n}@{DOMAIN}", f"user{n}"),
            users // 2,
        ),
        "recipients, 50 connections ask for the same user at a time": (
            50,
            lambda n: ask_policy(n, f"user{n // 50}@{DOMAIN}"),
            users,
        ),
    }
    distinct = {"recipients, 50 connections ask for the same user at a time": users // 50}
    lookups_each = {
        "senders, each another user logged in, with his own address": 2
    }  # whom the login names, and whose the address is
    for title, (connections, question, count) in kinds.items():
        with directory() as home, running(home, users, 100, COLD_LATENCY_SECONDS) as (daemon, keycloak):
            questions = write_questions(home / "q", map(question, range(count)))
            figures = ask(policy_server(daemon), connections, 0, questions)
            counts = keycloak.counts()
        lookups = distinct.get(title, count) * lookups_each.get(title, 1)
        per_lookup = counts["users"] / lookups
        say(f"cold: {title}: {figures.rate:,.0f}/s, {per_lookup:.2f} searches a lookup, {counts['token']} token requests")
        lines.append(
            [
                title,
                connections,
                count,
                f"{figures.rate:,.0f}",
                shown_ms(figures.p50_us),
                shown_ms(figures.p99_us),
                lookups,
                f"{per_lookup:.3f}",
                verdict(per_lookup <= 1),
                f"{counts['token']}: {verdict(counts['token'] == 1)}",
                counts["self-check"] + counts["profile"],
            ]
        )
    header = ["questions", "connections", "asked", "requests/s", "p50 ms", "p99 ms", "lookups", "searches a lookup", "goal: 1.0"]
    header += ["tokens, goal: 1", "other requests"]
    return f"""## The cold path

A new daemon that knows nobody, a stand-in for Keycloak (Python, a process of its own on the same processors) that takes
{1000 * COLD_LATENCY_SECONDS:.0f} ms for each search, at most 8 requests there at a time (max_requests); each measured once. A lookup is one thing to
find out: who has an address, whom a login names. Other requests: may users edit their e-mail, do we see users at all.

{markdown_table(header, lines)}"""


# ---- profile


def profile(quick: bool) -> str:
    """Where the time goes in the daemon, for each question of the table with 10 connections; on the terminal and in build/bench."""
    seconds = 2 if quick else 8
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    commands = {
        "py-spy": ["record", "--gil", "--format", "raw", "--rate", "500", "--duration", str(seconds), "--output"],
        "perf": ["record", "-q", "-F", "999", "-e", "cpu-clock", "-o"],
        "strace": ["-f", "-c", "-o"],
    }
    with directory() as home, running(home, TABLE_USERS, TABLE_USERS) as (daemon, _):
        asked = table_questions(home, daemon)
        wait_until_settled(daemon)
        for question in asked:
            ask(question.server, 10, 0, question.questions)
            for tool, arguments in commands.items():
                if not shutil.which(tool, path=path):
                    say(f"profile: LEFT OUT: {tool} is not installed")
                    continue
                output = BUILD / f"profile-{question.questions.name}-{tool}"
                command = [shutil.which(tool, path=path), *arguments, str(output), "-p", str(question.server.pid)]
                command += ["--", "sleep", str(seconds)] if tool == "perf" else []
                command = ["timeout", "-s", "INT", str(seconds), *command] if tool == "strace" else command
                # a second later, when all connections are there: perf does not see threads that begin after it
                watcher = subprocess.Popen(
                    ["sh", "-c", 'sleep 1; exec "$@"', "sh", *command],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                try:
                    figures = ask(question.server, 10, seconds + 2, question.questions)
                    watcher.wait(60)
                finally:
                    end(watcher)
                print(f"\n==== {question.title}, {tool} (10 connections; while watched {figures.rate:,.0f}/s)", flush=True)
                show_profile(tool, output)
    return ""


def show_profile(tool: str, output: Path) -> None:
    if tool == "perf":
        for what in ("dso", "dso,symbol"):
            command = ["perf", "report", "-i", str(output), "--stdio", "--no-children", "--percent-limit", "0.7", "--sort", what]
            report = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60).stdout
            print("\n".join(line for line in report.splitlines() if line and not line.startswith("#")), "\n")
    elif tool == "py-spy":
        show_stacks(output)
    else:
        print(output.read_text())


def show_stacks(output: Path) -> None:
    """Of the time in which a thread holds the interpreter's lock, the share of each function itself, and with all it calls."""
    itself: Counter[str] = Counter()
    with_callees: Counter[str] = Counter()
    for line in output.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        functions = [re.sub(r":\d+\)$", ")", frame) for frame in stack.split(";")]
        itself[functions[-1]] += int(count)
        for function in set(functions):
            with_callees[function] += int(count)
    total = max(1, sum(itself.values()))
    print(f"{total} samples\nitself  with callees")
    for function, count in with_callees.most_common(30):
        print(f"{itself[function] / total:6.1%} {count / total:7.1%}  {function}")


# ---- all of it


def main() -> int:
    parts = {"table": table, "lock": lock, "growth": growth, "postfix": postfix, "cold": cold, "profile": profile}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*parts, "all"])
    parser.add_argument(
        "--quick", action="store_true", help="short runs and small sizes, to try this program itself; writes nothing"
    )
    options = parser.parse_args()
    for signal_number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, lambda number, _: sys.exit(128 + number))
    for name in ("load", "echo"):
        if not (BUILD / name).exists():
            parser.error(f"build/bench/{name} is missing: make bench builds it")
    started = time.monotonic()
    for name in SECTIONS if options.part == "all" else [options.part]:
        part_started = time.monotonic()
        load_average = os.getloadavg()[0]
        text = parts[name](options.quick)
        seconds = time.monotonic() - part_started
        if text and options.quick:
            print(text)
        elif text:
            command = "make bench" if options.part == "all" else f"bench/bench.py {name}"
            when = f"{time.strftime('%Y-%m-%d')}, `{command}`, {seconds:.0f} s, load average {load_average:.1f} before. "
            write_section(name, text, f"{when}{machine()}.")
        say(f"{name}: {seconds:.0f} s")
    say(f"done in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
