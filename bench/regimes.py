"""table: answers per second beside a bare server, while nothing changes, under commits, in WAL mode, and for new questions."""

from __future__ import annotations

import contextlib
import itertools
import random
import sqlite3
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Optional

from measure import (
    BUILD,
    DOMAIN,
    ONCE_WARM,
    OUTSIDE,
    Commits,
    Daemon,
    Figures,
    Question,
    Server,
    add_apps,
    ask,
    ask_alias,
    ask_bare_map,
    ask_map,
    ask_policy,
    bare_server,
    directory,
    listening,
    make_database,
    map_server,
    markdown_table,
    median_of,
    numbered_aliases,
    part,
    policy_answer,
    policy_server,
    running,
    say,
    shown_ms,
    spread,
    verdict,
    write_questions,
)
from results import Goal, Record, Section, at_least, at_most

import mailcloak

USERS = 100
ASKED = 100  # of the aliases and of the unknown addresses
ALIASES = 100_000
APPS, SENDERS = 10, 10
REPEATED = 20  # requests for each user or alias, alike but for instance and client_port
CONNECTIONS = (1, 10, 50)
BARE_SECONDS = 0.3
P99_GOAL = 3.0  # times the bare server's, at 50 connections
SERVICES = ("policy", "map")


class Regime(NamedTuple):
    name: str
    least: tuple[float, float]  # share of the bare server: policy, map
    seconds: float  # of one measurement
    aim: tuple[Optional[float], Optional[float]] = (None, None)
    commits_each_second: float = 0
    wal: bool = False
    asks_anew: bool = False  # each question for the first time


REGIMES = (
    Regime("nothing changes", (0.7, 0.85), 0.5, aim=(0.85, 1.0)),
    Regime("one commit a second", (0.6, 0.75), 1.0, commits_each_second=1),
    Regime("ten commits a second", (0.4, 0.5), 1.0, commits_each_second=10),
    Regime("WAL mode", (0.6, 0.75), 0.5, wal=True),
    Regime("each question for the first time", (0.25, 0.3), ONCE_WARM, asks_anew=True),
)


class Asked(NamedTuple):
    """A question of the table. By connections and round, if each is asked only once; else one file for all of these."""

    title: str
    service: str
    server: Server
    files: Sequence[Path]

    def file(self, number: int) -> Path:
        return self.files[number % len(self.files)]


class Row(NamedTuple):
    """A question in one round, and the bare server before and after it."""

    figures: Figures
    bare_rate: float
    bare_p99_us: float
    commits: int

    @property
    def share(self) -> float:
        return part(self.figures.rate, self.bare_rate)

    @property
    def p99_times(self) -> float:
        return part(self.figures.p99_us, self.bare_p99_us)


class Taken(NamedTuple):
    """All of one regime. By (question, connections), and by (service, connections)."""

    rows: dict[tuple[str, int], list[Row]]
    bares: dict[tuple[str, int], list[Figures]]
    commits: int
    seconds: float  # in which these were made


# ---- Questions


def repeated_questions(home: Path, daemon: Daemon) -> list[Asked]:
    """Those that are asked again and again."""
    numbers = range(ASKED * REPEATED)
    unknown = policy_answer(mailcloak.NO_SUCH_USER)

    def user(number: int) -> str:
        return f"user{number % USERS}"

    def app(number: int) -> Question:
        sender = f"shop{number // APPS % SENDERS}@{DOMAIN}"
        return ask_policy(number, "x@elsewhere.test", sender, f"app{number % APPS}", "PLAIN")

    policy = {
        "policy, known primary address": lambda n: ask_policy(n, f"{user(n)}@{DOMAIN}"),
        "policy, alias": lambda n: ask_policy(n, f"alias{n % ASKED}@{DOMAIN}"),
        "policy, user, own sender": lambda n: ask_policy(n, "x@elsewhere.test", f"{user(n)}@{DOMAIN}", user(n)),
        "policy, app, one of its senders": app,
        "policy, unknown recipient": lambda n: ask_policy(n, f"nobody{n % ASKED}@{DOMAIN}")._replace(answer=unknown),
    }
    maps = {
        "map, alias": lambda n: ask_alias(n % ASKED, USERS),
        "map, no alias": lambda n: ask_map(f"{user(n)}@{DOMAIN}", "NOTFOUND "),
    }
    asked = []
    for service, server, kinds in (("policy", policy_server(daemon), policy), ("map", map_server(daemon), maps)):
        for title, question in kinds.items():
            file = write_questions(home / title.replace(",", "").replace(" ", "-"), map(question, numbers))
            asked.append(Asked(title, service, server, [file]))
    return asked


def new_questions(home: Path, daemon: Daemon, aliases: int, parts: int) -> list[Asked]:
    """An alias for the policy service and for the map, each asked in one part only: half of the aliases are for each service."""
    order = random.Random(20260101).sample(range(aliases), aliases)  # noqa: S311
    length = aliases // 2 // parts
    slices = [order[number * length : (number + 1) * length] for number in range(2 * parts)]
    kinds = {
        "policy, alias": ("policy", policy_server(daemon), lambda n: ask_policy(n, f"alias{n}@{DOMAIN}")),
        "map, alias": ("map", map_server(daemon), lambda n: ask_alias(n, USERS)),
    }
    asked = []
    for half, (title, (service, server, question)) in enumerate(kinds.items()):
        numbers = slices[half * parts : (half + 1) * parts]
        files = [write_questions(home / f"q{half}-{place}", map(question, each)) for place, each in enumerate(numbers)]
        asked.append(Asked(title, service, server, files))
    return asked


def bare_questions(home: Path) -> dict[str, Path]:
    """For the bare servers: requests like those of the questions."""
    numbers = range(ASKED * REPEATED)
    return {
        "policy": write_questions(home / "bare-policy", (ask_policy(n, f"user{n % USERS}@{DOMAIN}", OUTSIDE) for n in numbers)),
        "map": write_questions(home / "bare-map", (ask_bare_map(n % ASKED) for n in numbers)),
    }


# ---- Measuring


def table(quick: bool) -> Section:
    rounds, aliases = (1, 5000) if quick else (3, ALIASES)
    regimes = (
        [regime if regime.asks_anew else regime._replace(seconds=regime.seconds / 3) for regime in REGIMES] if quick else REGIMES
    )
    taken = {}
    with directory() as home:
        files = bare_questions(home)
        with bare_server(home / "bp") as bare_policy, bare_server(home / "bm", "map") as bare_map:
            bares = {"policy": (bare_policy, files["policy"]), "map": (bare_map, files["map"])}
            for regime in regimes:
                started = time.monotonic()
                taken[regime.name] = measure_regime(regime, bares, rounds, aliases)
                say(f"table: {regime.name}: {time.monotonic() - started:.0f} s")
        echoes = measure_echo(home, files["policy"])
    return Section(
        table_text(regimes, taken, echoes, rounds, aliases),
        table_records(regimes, taken),
        table_goals(regimes, taken),
    )


@contextlib.contextmanager
def prepared(regime: Regime, aliases: int, parts: int) -> Iterator[tuple[Daemon, list[Asked]]]:
    """A daemon that knows all users and, unless each question must be new, has been asked each question twice."""
    with directory() as home:
        make_database(home / "state.db", numbered_aliases(aliases, USERS))
        add_apps(home / "state.db", APPS, SENDERS)
        if regime.wal:
            with contextlib.closing(sqlite3.connect(home / "state.db")) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
        # as long as a run takes at least: what the stand-in for Keycloak costs is in the section on the cold path
        lives = {"cache_ttl_seconds": 3600, "negative_cache_ttl_seconds": 3600}
        with running(home, USERS, aliases, **lives) as (daemon, _):
            known = repeated_questions(home, daemon)
            for question in (known[0], known[2]) if regime.asks_anew else 2 * known:
                ask(question.server, 10, 0, question.file(0))
            yield daemon, new_questions(home, daemon, aliases, parts) if regime.asks_anew else known


def measure_regime(regime: Regime, bares: dict[str, tuple[Server, Path]], rounds: int, aliases: int) -> Taken:
    taken = Taken({}, {}, 0, 0)
    with prepared(regime, aliases, rounds * len(CONNECTIONS)) as (daemon, asked), contextlib.ExitStack() as stack:
        commits = Commits(daemon.database, regime.commits_each_second) if regime.commits_each_second else None
        if commits:
            stack.enter_context(commits)
        began = time.monotonic()
        for number, (_, connections) in enumerate(itertools.product(range(rounds), CONNECTIONS)):
            for service, (bare, bare_file) in bares.items():
                before = ask(bare, connections, BARE_SECONDS, bare_file)
                taken.bares.setdefault((service, connections), []).append(before)
                for question in asked:
                    if question.service != service:
                        continue
                    started = time.monotonic()
                    figures = ask(question.server, connections, regime.seconds, question.file(number))
                    during = commits.between(started, time.monotonic()) if commits else 0
                    after = ask(bare, connections, BARE_SECONDS, bare_file)
                    taken.bares[service, connections].append(after)
                    row = Row(figures, (before.rate + after.rate) / 2, (before.p99_us + after.p99_us) / 2, during)
                    taken.rows.setdefault((question.title, connections), []).append(row)
                    before = after
            shares = " ".join(f"{taken.rows[question.title, connections][-1].share:.2f}" for question in asked)
            say(f"table: {regime.name}, {connections} connections, share of the bare server: {shares}")
        seconds = time.monotonic() - began
        return taken._replace(commits=commits.between(began, time.monotonic()) if commits else 0, seconds=seconds)


def measure_echo(home: Path, questions: Path) -> dict[int, Figures]:
    """How much load could ask for: a server in C."""
    with listening(home / "echo", str(BUILD / "echo"), str(home / "echo"), "action=DUNNO\\n\\n") as echo:
        return {connections: ask(echo, connections, BARE_SECONDS, questions) for connections in CONNECTIONS}


# ---- Results


def service_of(title: str) -> str:
    return title.partition(",")[0]


def titles(taken: Taken) -> list[str]:
    return list(dict.fromkeys(title for title, _ in taken.rows))


def table_records(regimes: Sequence[Regime], taken: dict[str, Taken]) -> list[Record]:
    records = []
    for regime in regimes:
        for (title, connections), rows in taken[regime.name].rows.items():
            rate, share = median_of(row.figures.rate for row in rows), median_of(row.share for row in rows)
            p99_times = median_of(row.p99_times for row in rows) if connections == CONNECTIONS[-1] else None
            p99_us = median_of(row.figures.p99_us for row in rows)
            records.append(Record(regime.name, title, connections, rate, share, p99_us, p99_times))
        for (service, connections), figures in taken[regime.name].bares.items():
            rate, p99_us = median_of(each.rate for each in figures), median_of(each.p99_us for each in figures)
            records.append(Record(regime.name, f"bare server, {service}", connections, rate, None, p99_us))
    return records


def table_goals(regimes: Sequence[Regime], taken: dict[str, Taken]) -> list[Goal]:
    goals = []
    for regime in regimes:
        rows = taken[regime.name].rows
        for service, least, aim in zip(SERVICES, regime.least, regime.aim):
            shares = [median_of(row.share for row in each) for (title, _), each in rows.items() if service_of(title) == service]
            goals.append(at_least(service, regime.name, shares, least, aim))
        times = [
            median_of(row.p99_times for row in each) for (_, connections), each in rows.items() if connections == CONNECTIONS[-1]
        ]
        goals.append(at_most("p99", regime.name, times, P99_GOAL, "times"))
    return goals


def table_text(regimes: Sequence[Regime], taken: dict[str, Taken], echoes: dict[int, Figures], rounds: int, aliases: int) -> str:
    parts = [regime_text(regime, taken[regime.name]) for regime in regimes]
    return f"""## An answer beside a bare socket round trip

{rounds} rounds for each regime; in each round: bare, question, bare, question, ..., bare, with {BARE_SECONDS} s for each measurement of the
bare server. The figures are medians; the share is taken within each round, from the mean of the two bare measurements around the question,
and has the smallest and the largest in brackets. The bare server (bench/bare.py) gets policy requests beside policy, and map requests beside
the map. Each connection has one request in flight. Policy requests have all attributes of Postfix 3.7, differ in instance and client_port,
and check recipient and sender in one. A new daemon for each regime, with {USERS} users, {aliases:,} aliases and {APPS} apps with {SENDERS} senders each. All users and
unknown addresses are cached, for an hour. Of the aliases and the unknown addresses, {ASKED} are asked again and again; each has been asked
before, unless the regime says otherwise. Commits are an UPDATE of an alias that nobody asks about; they go on at the same rate during the
whole regime.

{"".join(parts)}### What could limit the figures

The questions come from a compiled program (bench/load.c, one thread, epoll). It does not limit the figures: with a C echo server
(bench/echo.c) it reaches the last rows, and with the bare server its processor is idle for part of the time. On one connection, server
and load take turns, so neither can be busy all the time. The figures of the bare server are those of the regime {regimes[0].name!r}.

{bare_text(taken[regimes[0].name], echoes)}"""


def regime_text(regime: Regime, taken: Taken) -> str:
    header = ["question", "goal, each", *(f"requests/s at {each}, share" for each in CONNECTIONS), f"p99 ms at {CONNECTIONS[-1]}"]
    header.append(f"times bare's, goal {P99_GOAL:g}")
    header += ["commits meanwhile"] if regime.commits_each_second else []
    lines = []
    for title in titles(taken):
        place = SERVICES.index(service_of(title))
        least, aim = regime.least[place], regime.aim[place]
        last = taken.rows[title, CONNECTIONS[-1]]
        p99_times = median_of(row.p99_times for row in last)
        line = [title, f"{least} (aim {aim})" if aim else f"{least}"]
        line += [share_cell(taken.rows[title, connections], least, aim) for connections in CONNECTIONS]
        line += [shown_ms(median_of(row.figures.p99_us for row in last)), f"{p99_times:.2f}: {verdict(p99_times <= P99_GOAL)}"]
        if regime.commits_each_second:
            line.append(str(sum(row.commits for each in CONNECTIONS for row in taken.rows[title, each])))
        lines.append(line)
    said = f"{regime.seconds:.2g} s for each measurement." if not regime.asks_anew else "Each question once."
    if regime.commits_each_second:
        said += f" {taken.commits} commits in {taken.seconds:.0f} s, {taken.commits / taken.seconds:.2f} a second."
    return f"### {regime.name[0].upper()}{regime.name[1:]}\n\n{said}\n\n{markdown_table(header, lines)}\n"


def share_cell(rows: Sequence[Row], least: float, aim: Optional[float]) -> str:
    shares = [row.share for row in rows]
    median = statistics.median(shares)
    missed = " **missed**" if median < least else " (aim missed)" if aim and median < aim else ""
    return f"{median_of(row.figures.rate for row in rows):,.0f}, **{median:.2f}** ({min(shares):.2f} to {max(shares):.2f}){missed}"


def bare_text(taken: Taken, echoes: dict[int, Figures]) -> str:
    header = ["server", "connections", "requests/s", "p99 ms", "load, of one processor", "server, of one processor"]
    lines = [
        [
            f"bare (Python), {service}",
            connections,
            spread([each.rate for each in figures], ",.0f"),
            shown_ms(median_of(each.p99_us for each in figures)),
            f"{median_of(each.load_share for each in figures):.0%}",
            f"{median_of(each.server_share for each in figures):.0%}",
        ]
        for (service, connections), figures in sorted(taken.bares.items(), key=lambda item: SERVICES.index(item[0][0]))
    ]
    lines += [
        ["echo (C)", connections, f"{each.rate:,.0f}", shown_ms(each.p99_us), f"{each.load_share:.0%}", f"{each.server_share:.0%}"]
        for connections, each in echoes.items()
    ]
    return markdown_table(header, lines)
