"""growth: many aliases, many users, many connections: rate, p99, memory, the collector's pauses, start-up. stall: the longest silence."""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from measure import (
    DOMAIN,
    HOLD_SECONDS,
    MEBIBYTE,
    Commits,
    Daemon,
    Figures,
    Question,
    Server,
    StandIn,
    ask,
    ask_alias,
    ask_bare_map,
    ask_policy,
    bare_server,
    connect,
    directory,
    map_server,
    markdown_table,
    median_of,
    part,
    policy_server,
    resident_bytes,
    running,
    say,
    shown_mib,
    shown_ms,
    spread,
    verdict,
    write_questions,
)
from results import Goal, Record, Section, at_most

import mailcloak

CONNECTIONS = (1, 50, 500)
MANY = CONNECTIONS[-1]
MAX_SAMPLE = 200_000
MAX_RECALLED = getattr(mailcloak, "MAX_RECALLED_ANSWERS", 100_000)
FEW_USERS = 100
COMMITS_EACH_SECOND = 10
REGIMES = (f"{COMMITS_EACH_SECOND} commits a second", "nothing changes")
CONNECTIONS_MIB = 100  # 500 connections
USERS_MIB = 150  # 100,000 users that are known, before there are many connections
START_SECONDS = 0.5
PAUSE_MS = 20.0  # of processor time, of a pass of Python's collector


class Pauses(NamedTuple):
    """Passes of Python's collector, of a millisecond or longer."""

    longest_ms: float  # of processor time
    over_the_goal: int  # also of that
    longest_by_clock_ms: float
    count: int


class Series(NamedTuple):
    """A daemon of one size."""

    name: str
    service: str
    is_of_many_users: bool
    idle_resident: int  # when all users are known, before there are many connections
    asked_once: Figures  # with the most connections, by each
    by_regime: dict[str, dict[int, Figures]]  # and by connections


class SeriesQuestions(NamedTuple):
    all: Path
    recalled: Path  # as many of them as are kept at most
    one_each: Path  # for each of the most connections


def growth(quick: bool) -> Section:
    seconds = 0.3 if quick else 1.0
    bare = measure_bare(seconds)
    aliases = (1000, 5000) if quick else (1000, 1_000_000)
    users = (100, 500) if quick else (100, 100_000)
    by_aliases = {count: grow_aliases(count, seconds) for count in aliases}
    by_users = {count: grow_users(count, seconds) for count in users}
    all_series = [*(each for each, _ in by_aliases.values()), *(each for each, _, _ in by_users.values())]
    pauses = {count: each for count, (_, _, each) in by_users.items()}
    text = growth_text(seconds, bare, by_aliases, by_users, all_series)
    return Section(
        text, growth_records(bare, all_series), growth_goals(all_series, pauses, [start for _, start in by_aliases.values()])
    )


# ---- Measuring


def random_order(count: int) -> list[int]:
    """The numbers below count in random order, at most MAX_SAMPLE of them; the same in every run."""
    return random.Random(20260101).sample(range(count), min(count, MAX_SAMPLE))  # noqa: S311


def write_series(home: Path, questions: Sequence[Question]) -> SeriesQuestions:
    one_each = itertools.islice(itertools.cycle(questions), MANY)
    return SeriesQuestions(
        write_questions(home / "q-all", questions),
        write_questions(home / "q-recalled", questions[:MAX_RECALLED]),
        write_questions(home / "q-one-each", one_each),
    )


def measure_series(daemon: Daemon, server: Server, name: str, questions: SeriesQuestions, seconds: float) -> Series:
    """The daemon has not been asked by many connections yet."""
    idle = resident_bytes(server.pid)
    by_regime: dict[str, dict[int, Figures]] = {}
    with Commits(daemon.database, COMMITS_EACH_SECOND):
        once = ask(server, MANY, 0, questions.one_each, hold=True)
        time.sleep(1)  # for these connections to end
        by_regime[REGIMES[0]] = {connections: ask(server, connections, seconds, questions.all) for connections in CONNECTIONS}
    ask(server, 10, 0, questions.recalled)
    by_regime[REGIMES[1]] = {connections: ask(server, connections, seconds, questions.recalled) for connections in CONNECTIONS}
    for regime, figures in by_regime.items():
        shown = ", ".join(f"{each.rate:,.0f}/s {shown_mib(each.resident)} MiB" for each in figures.values())
        say(f"growth: {name}, {regime}: {shown}")
    service = "map" if server == map_server(daemon) else "policy"
    return Series(name, service, False, idle, once, by_regime)


def grow_aliases(count: int, seconds: float) -> tuple[Series, list[float]]:
    """The series, and how long each of five starts took."""
    with directory() as home, running(home, FEW_USERS, count) as (daemon, _):
        questions = write_series(home, [ask_alias(number, FEW_USERS) for number in random_order(count)])
        series = measure_series(daemon, map_server(daemon), f"{count:,} aliases", questions, seconds)
        starts = [measure_start(daemon) for _ in range(5)]
    say(f"growth: {count:,} aliases, start-up {spread(starts, '.2f')} s")
    return series, starts


def measure_start(daemon: Daemon) -> float:
    """Seconds from exec to the first answer of a new process."""
    daemon.stop()
    question = ask_alias(0, FEW_USERS)
    started = time.monotonic()
    daemon.launch()
    with contextlib.closing(connect(map_server(daemon).path, started + 10)) as client:
        client.sendall(question.request)
        answer = client.recv(4096)
    took = time.monotonic() - started
    if answer != question.answer:
        sys.exit(f"bench: another answer: {answer!r}")
    return took


@contextlib.contextmanager
def knowing(count: int) -> Iterator[tuple[Path, Daemon, SeriesQuestions, float]]:
    """A watched daemon that has looked up this many users, and how many a second it looked up."""
    with directory() as home, running(home, count, FEW_USERS, watched=True, cache_ttl_seconds=3600) as (daemon, keycloak):
        questions = write_series(home, [ask_policy(n, f"user{n}@{DOMAIN}") for n in random_order(count)])
        say(f"{count:,} users, asking for each")
        rate = ask(policy_server(daemon), 10, 0, questions.all).rate
        yield home, daemon, questions, rate
        check_searches(keycloak, count)


def check_searches(keycloak: StandIn, count: int) -> None:
    searches = keycloak.counts()["users"]
    if searches != count:
        sys.exit(f"bench: {searches} searches at Keycloak for {count} users, and one for each was expected")


def grow_users(count: int, seconds: float) -> tuple[Series, float, Pauses]:
    """The series, how many users a second were looked up first, and the pauses in all of that."""
    with knowing(count) as (home, daemon, questions, rate):
        series = measure_series(daemon, policy_server(daemon), f"{count:,} users", questions, seconds)
        pauses = read_pauses(home)
    say(f"growth: {count:,} users, the longest pause of the collector {pauses.longest_ms:.1f} ms")
    return series._replace(is_of_many_users=count > FEW_USERS), rate, pauses


class Pass(NamedTuple):
    """A line of bench/watched.py."""

    ended: float
    generation: float
    by_clock_ms: float
    processor_ms: float


def read_passes(home: Path) -> list[Pass]:
    return [Pass(*map(float, line.split())) for line in (home / "passes").read_text().splitlines()]


def read_pauses(home: Path) -> Pauses:
    passes = read_passes(home)
    return Pauses(
        max((each.processor_ms for each in passes), default=0.0),
        sum(each.processor_ms > PAUSE_MS for each in passes),
        max((each.by_clock_ms for each in passes), default=0.0),
        len(passes),
    )


def measure_bare(seconds: float) -> dict[tuple[str, int], Figures]:
    """The bare servers, by service and connections."""
    figures = {}
    with directory() as home:
        questions = {
            "policy": write_questions(home / "policy", (ask_policy(n, f"user{n}@{DOMAIN}") for n in range(1000))),
            "map": write_questions(home / "map", map(ask_bare_map, range(1000))),
        }
        for service, arguments in (("policy", ()), ("map", ("map",))):
            with bare_server(home / "bare", *arguments) as bare:
                for connections in CONNECTIONS:
                    figures[service, connections] = ask(bare, connections, seconds, questions[service])
            (home / "bare").unlink()
    return figures


# ---- Results


def growth_records(bare: dict[tuple[str, int], Figures], all_series: Iterable[Series]) -> list[Record]:
    records = [
        Record("", f"bare server, {service}", connections, each.rate, None, each.p99_us)
        for (service, connections), each in bare.items()
    ]
    for series in all_series:
        for regime, figures in series.by_regime.items():
            for connections, each in figures.items():
                share = part(each.rate, bare[series.service, connections].rate)
                records.append(Record(regime, series.name, connections, each.rate, share, each.p99_us))
    return records


def growth_goals(all_series: Sequence[Series], pauses: dict[int, Pauses], starts: Iterable[Sequence[float]]) -> list[Goal]:
    """Those of memory, pauses and start-up. What 500 connections need is measured where not many users are known."""
    few = [series for series in all_series if not series.is_of_many_users]
    once = [max(series.asked_once.held, series.asked_once.resident) / MEBIBYTE for series in few]
    without_pause = [figures[MANY].resident / MEBIBYTE for series in few for figures in series.by_regime.values()]
    most = max(pauses)
    known = [series.idle_resident / MEBIBYTE for series in all_series if series.is_of_many_users]
    return [
        at_most("memory", f"{MANY} connections that asked once", once, CONNECTIONS_MIB, "MiB"),
        at_most("memory", f"{MANY} connections that ask without a pause", without_pause, CONNECTIONS_MIB, "MiB"),
        at_most("memory", f"{most:,} known users", known, USERS_MIB, "MiB"),
        at_most("memory", f"the longest pause with {most:,} users", [pauses[most].longest_ms], PAUSE_MS, "ms"),
        at_most("memory", "start-up", map(statistics.median, starts), START_SECONDS, "s"),
    ]


def growth_text(
    seconds: float,
    bare: dict[tuple[str, int], Figures],
    aliases: dict[int, tuple[Series, list[float]]],
    users: dict[int, tuple[Series, float, Pauses]],
    all_series: Sequence[Series],
) -> str:
    cold = ", ".join(f"{count:,} users {rate:,.0f}/s" for count, (_, rate, _) in users.items())
    return f"""## Growth

{seconds} s for each measurement, each taken once. Aliases are asked over the socketmap, users as recipients over the policy socket, in random
order with a fixed seed; of more than {MAX_SAMPLE:,} aliases, a random {MAX_SAMPLE:,} are asked. "{REGIMES[0]}": to the row of an
alias that nobody asks about. "{REGIMES[1]}": each was asked before; of more than {MAX_RECALLED:,}, this many are asked, the most
that are kept. The bare servers are those of the first table. Memory is the peak of the resident set (VmHWM) during the measurement, in one
process for all rows of a size.

{figures_table(bare, all_series)}
Rates that should not depend on the size:

{flat_table({"aliases": [each for each, _ in aliases.values()], "users": [each for each, _, _ in users.values()]})}
Memory with {MANY} connections that have all asked; the goal is under {CONNECTIONS_MIB} MiB. In the first two columns each asks one question,
all at the same time, and stays connected. In the next two all ask without a pause. "Before" is with all users known and few connections: with
{max(users):,} users the goal is under {USERS_MIB} MiB there, and their connections have no goal of their own.

{memory_table(all_series, seconds)}
How long Python's collector stops all threads: all passes in the life of a daemon (bench/watched.py), from its start to the last of the
measurements above. The goal is for the processor time of a pass; by the clock it is longer where the processors are busy.

{pauses_table({count: each for count, (_, _, each) in users.items()})}
Start-up time, from exec to the first answer of a new process, median of five:

{starts_table({count: each for count, (_, each) in aliases.items()})}
Before the measurement each user was looked up once, over 10 connections, at a stand-in without latency: {cold}. Here the users
are cached for an hour (cache_ttl_seconds); the default is two minutes.
"""


def figures_table(bare: dict[tuple[str, int], Figures], all_series: Iterable[Series]) -> str:
    header = ["size", "connections"]
    for regime in REGIMES:
        header += [f"{regime}: requests/s", "share of bare", "p99 ms", "MiB"]
    lines = [
        [
            f"the bare server, {service}",
            connections,
            *[""] * 4,
            f"{each.rate:,.0f}",
            "",
            shown_ms(each.p99_us),
            shown_mib(each.resident),
        ]
        for (service, connections), each in bare.items()
    ]
    for series, connections in itertools.product(all_series, CONNECTIONS):
        line = [series.name, connections]
        for regime in REGIMES:
            each = series.by_regime[regime][connections]
            share = part(each.rate, bare[series.service, connections].rate)
            line += [f"{each.rate:,.0f}", f"{share:.2f}", shown_ms(each.p99_us), shown_mib(each.resident)]
        lines.append(line)
    return markdown_table(header, lines)


def flat_table(groups: dict[str, list[Series]]) -> str:
    lines = []
    for (kind, group), regime in itertools.product(groups.items(), REGIMES):
        least, most = group[0], group[-1]
        shares = [part(most.by_regime[regime][each].rate, least.by_regime[regime][each].rate) for each in CONNECTIONS]
        lines.append([f"{kind}, {regime}", f"{most.name} against {least.name}", ", ".join(f"{share:.2f}" for share in shares)])
    return markdown_table(
        ["rate", "largest size against smallest", f"share at {', '.join(map(str, CONNECTIONS))} connections"], lines
    )


def memory_table(all_series: Iterable[Series], seconds: float) -> str:
    lines = []
    for series in all_series:
        once = series.asked_once
        sizes = [once.held, once.resident, *(series.by_regime[regime][MANY].resident for regime in REGIMES)]
        before = f"{series.idle_resident / MEBIBYTE:.1f}"
        shown = [f"{size / MEBIBYTE:.1f}" for size in sizes]
        if series.is_of_many_users:
            before += f": {verdict(series.idle_resident <= USERS_MIB * MEBIBYTE)}"
        else:
            shown = [f"{text}: {verdict(size <= CONNECTIONS_MIB * MEBIBYTE)}" for text, size in zip(shown, sizes)]
        lines.append([series.name, before, *shown, f"{(once.held - series.idle_resident) / MANY / 1024:.0f}"])
    header = ["size", "before, MiB", f"each asked once, {HOLD_SECONDS:.0f} s later", "the peak of that"]
    header += [*(f"peak of {seconds} s, {regime}" for regime in REGIMES), "KiB for each connection that asked once"]
    return markdown_table(header, lines)


def pauses_table(pauses: dict[int, Pauses]) -> str:
    lines = [
        [
            f"{count:,}",
            f"{each.longest_ms:.1f}",
            verdict(each.longest_ms <= PAUSE_MS),
            each.over_the_goal,
            f"{each.longest_by_clock_ms:.1f}",
            each.count,
        ]
        for count, each in pauses.items()
    ]
    header = [
        "users",
        "longest, ms",
        f"goal: {PAUSE_MS:.0f} ms",
        "longer than that",
        "longest by the clock, ms",
        "of 1 ms and more",
    ]
    return markdown_table(header, lines)


def starts_table(starts: dict[int, list[float]]) -> str:
    lines = [
        [f"{count:,}", spread(each, ".3f"), verdict(statistics.median(each) <= START_SECONDS)] for count, each in starts.items()
    ]
    return markdown_table(["aliases", "start-up, s", f"goal: {START_SECONDS} s"], lines)


# ---- stall

STALL_SECONDS = 1.0
STALL_MS = 200.0  # longer than that without an answer is worth a line


def stall(quick: bool, times: int) -> None:
    """Many users, many connections, recalled answers, again and again: how long is nobody answered? On the terminal.

    Once, a measurement of this kind had 32 answers and then nothing for 1.4 s. Each silence is shown with the longest pass of the
    collector that ended in that run.
    """
    users, seconds = (500, 0.2) if quick else (100_000, STALL_SECONDS)
    silences = []
    with knowing(users) as (home, daemon, questions, _):
        server = policy_server(daemon)
        ask(server, 10, 0, questions.recalled)
        for number in range(times):
            began = time.monotonic()
            figures = ask(server, MANY, seconds, questions.recalled)
            passed = max((each.by_clock_ms for each in read_passes(home) if each.ended >= began), default=0.0)
            silences.append(figures.gap_us / 1000)
            if silences[-1] > STALL_MS or (number + 1) % 20 == 0:
                shown = f"{figures.rate:,.0f}/s, nothing for {silences[-1]:.0f} ms, longest pass of the collector {passed:.0f} ms"
                say(f"stall: {number + 1} of {times}: {shown}{'  STALL' if silences[-1] > STALL_MS else ''}")
    over = sum(each > STALL_MS for each in silences)
    say(
        f"stall: {times} times {seconds} s, {users:,} users, {MANY} connections: the longest time without any answer {max(silences):.0f} ms, "
        f"median {median_of(silences):.1f} ms; longer than {STALL_MS:.0f} ms: {over}"
    )
