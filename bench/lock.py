"""lock: what one more system call costs the bare server."""

from __future__ import annotations

import contextlib
import itertools

from measure import DOMAIN, ask, ask_policy, bare_server, directory, markdown_table, median_of, part, say, spread, write_questions
from results import Record, Section


def lock(quick: bool) -> Section:
    """What system calls cost beside the bare server, by whether they give up Python's global lock."""
    rounds, seconds = (1, 0.2) if quick else (2, 0.5)
    all_connections = (1, 10, 50)
    calls = [(name, count) for name in ("stat", "statx") for count in (1, 2)]
    ratios: dict[tuple[str, int, int], list[float]] = {}
    rates: dict[tuple[str, int, int], list[float]] = {}
    with directory() as home, contextlib.ExitStack() as servers:
        questions = write_questions(home / "q", (ask_policy(n, f"user{n}@{DOMAIN}") for n in range(20)))
        bare = servers.enter_context(bare_server(home / "bare"))
        others = {}
        for name, count in calls:
            others[name, count] = servers.enter_context(bare_server(home / f"{name}{count}", str(count), name))
        for number, connections in itertools.product(range(rounds), all_connections):
            before = ask(bare, connections, seconds, questions).rate
            for (name, count), server in others.items():
                rate = ask(server, connections, seconds, questions).rate
                after = ask(bare, connections, seconds, questions).rate
                rates.setdefault((name, count, connections), []).append(rate)
                ratios.setdefault((name, count, connections), []).append(part(2 * rate, before + after))
                before = after
            say(f"lock: round {number + 1} of {rounds}, {connections} connections")
    header = ["more system calls per answer", *(f"share of bare, {connections} connections" for connections in all_connections)]
    titles = {(name, count): f"{count}, which {'release' if name == 'stat' else 'keep'} the lock" for name, count in calls}
    lines = [
        [title, *(spread(ratios[name, count, connections], ".2f") for connections in all_connections)]
        for (name, count), title in titles.items()
    ]
    records = [
        Record("the bare server", titles[name, count], connections, median_of(rates[name, count, connections]), median_of(each))
        for (name, count, connections), each in ratios.items()
    ]
    text = f"""## One more system call

{rounds} interleaved rounds, {seconds} s for each measurement: the bare server, and the same server with one or two more system calls for each
answer (bench/bare.py). The call is os.stat, which releases Python's global lock, or statx by ctypes.PyDLL, which keeps it. The figures are
medians, with the smallest and the largest in brackets.

{markdown_table(header, lines)}"""
    return Section(text, records)
