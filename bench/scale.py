#!/usr/bin/env python3
"""How often Keycloak is asked as users and mail hosts grow: a formula, a year of arrivals that checks it, and a plot.

    bench/scale.py check            simulate a year on 1, 2, 10 and 100 hosts, beside the formula (some minutes)
    bench/scale.py table            the formula for 1,000 to 1,000,000 users, and docs/scale.svg

Arrivals (mail for a user, or a login) are a Poisson process; of which user is Zipf's law: the second most asked has half of what the
first has, the third a third. Each goes to a host at random. A host has the daemon's cache: a user is asked for when not cached, counts for
cache_ttl_seconds, is asked for again in the background when used in the last fifth of this time (REFRESH_AHEAD), and is evicted when
cache_max_entries others were used since.

The formula: after a user was asked for, the next question to Keycloak is at the first arrival after four fifths of the TTL. So a user with
the rate r on a host costs 1 / (0.8 TTL + 1/r) questions a second, if no eviction comes before.
"""

from __future__ import annotations

import collections
import itertools
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mailcloak

PER_USER_AND_DAY = 20.0  # arrivals: mail and logins
TTL_SECONDS = mailcloak.PolicyConfig.__dataclass_fields__["cache_ttl_seconds"].default
ENTRIES = mailcloak.PolicyConfig.__dataclass_fields__["cache_max_entries"].default
KEPT = 1 - mailcloak.REFRESH_AHEAD  # of the TTL: until then no question goes to Keycloak
DAY, YEAR = 86_400.0, 365 * 86_400.0
HOSTS = (1, 2, 10, 100)
SVG = Path(__file__).resolve().parent.parent / "docs" / "scale.svg"


def rates_of(users: int) -> list[float]:
    """Arrivals a second for each user, by Zipf's law."""
    weights = [1 / rank for rank in range(1, users + 1)]
    factor = users * PER_USER_AND_DAY / DAY / math.fsum(weights)
    return [factor * weight for weight in weights]


def lookups(rates: Sequence[float], hosts: int, ttl: float) -> float:
    """Questions to Keycloak a second, of all hosts, by the formula."""
    return math.fsum(hosts / (KEPT * ttl + hosts / rate) for rate in rates)


def active(rates: Sequence[float], seconds: float) -> float:
    """How many different users arrive in so many seconds."""
    return math.fsum(-math.expm1(-rate * seconds) for rate in rates)


def simulate(rates: Sequence[float], hosts: int, ttl: float, entries: int, seconds: float) -> float:
    """The same by arrivals one after the other, on caches with the daemon's rules."""
    chance = random.Random(1)  # noqa: S311  the same in each run
    cumulated = list(itertools.accumulate(rates))
    users, batch = range(len(rates)), 100_000
    caches: list[collections.OrderedDict[int, float]] = [collections.OrderedDict() for _ in range(hosts)]
    now, asked = 0.0, 0
    while now < seconds:
        for user in chance.choices(users, cum_weights=cumulated, k=batch):
            now += chance.expovariate(cumulated[-1])
            cache = caches[int(chance.random() * hosts)]
            asked_at = cache.pop(user, -math.inf)
            if now - asked_at >= KEPT * ttl:  # missing, too old, or asked for ahead
                asked_at = now
                asked += 1
            cache[user] = asked_at
            if len(cache) > entries:
                cache.popitem(last=False)
    return asked / now


def check() -> None:
    """Print the simulated year beside the formula."""
    print("| users | hosts | cache_ttl_seconds | cache_max_entries | questions a second, simulated | by the formula | difference |")
    print("|---|---|---|---|---|---|---|")
    for users, hosts, ttl, entries, seconds in (
        *((1_000, hosts, TTL_SECONDS, ENTRIES, YEAR) for hosts in HOSTS),
        (1_000, 10, 10 * TTL_SECONDS, ENTRIES, YEAR),
        (100_000, 2, TTL_SECONDS, ENTRIES, YEAR / 100),
        (100_000, 2, TTL_SECONDS, 1_000, YEAR / 100),
    ):
        rates = rates_of(users)
        found, expected = simulate(rates, hosts, ttl, entries, seconds), lookups(rates, hosts, ttl)
        difference = f"{found / expected - 1:+.1%}"
        print(f"| {users:,} | {hosts} | {ttl} | {entries:,} | {found:.3f} | {expected:.3f} | {difference} |", flush=True)


def table() -> None:
    """Print the formula for many sizes, and write the plot."""
    print(
        f"| users | arrivals a second | {' | '.join(f'{hosts} hosts' for hosts in HOSTS)} | 10 hosts, TTL 1200 | active in 120 s | in a day |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for users in (1_000, 10_000, 100_000, 1_000_000):
        rates = rates_of(users)
        cells = [users * PER_USER_AND_DAY / DAY, *(lookups(rates, hosts, TTL_SECONDS) for hosts in HOSTS)]
        cells += [lookups(rates, 10, 10 * TTL_SECONDS)]
        counts = [active(rates, seconds) for seconds in (TTL_SECONDS, DAY)]
        print(f"| {users:,} | {' | '.join(f'{cell:.2f}' for cell in cells)} | {' | '.join(f'{count:,.0f}' for count in counts)} |")
    SVG.write_text(plot(), encoding="utf-8")


def plot() -> str:
    """Questions to Keycloak a second by the number of hosts, 100,000 users, a line for each TTL, as SVG."""
    rates = rates_of(100_000)
    hosts = [1, 2, 3, 5, 10, 20, 30, 50, 100]
    lines = {ttl: [lookups(rates, number, ttl) for number in hosts] for ttl in (120, 600, 1200, 3600)}
    limit = 100_000 * PER_USER_AND_DAY / DAY
    width, height, left, bottom = 560, 300, 50, 40

    def x(number: float) -> float:
        return left + math.log10(number) / 2 * (width - left - 110)

    def y(value: float) -> float:
        return height - bottom - value / (1.1 * limit) * (height - bottom - 20)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">']
    parts += [f'<rect width="{width}" height="{height}" fill="#fff"/>']
    for value in range(0, int(1.1 * limit) + 1, 5):
        parts.append(
            f'<path d="M{left} {y(value):.1f}H{x(100):.1f}" stroke="#dcdfe4"/><text x="{left - 22}" y="{y(value) + 4:.1f}">{value}</text>'
        )
    for number in hosts:
        parts.append(f'<text x="{x(number):.1f}" y="{height - bottom + 16}" text-anchor="middle">{number}</text>')
    parts.append(f'<path d="M{left} {y(limit):.1f}H{x(100):.1f}" stroke="#6b7280" stroke-dasharray="6 4"/>')
    parts.append(f'<text x="{x(100) + 6:.1f}" y="{y(limit) - 2:.1f}">all arrivals</text>')
    for colour, (ttl, values) in zip(("#0b62c4", "#c2410c", "#0f7a4f", "#8b2fc9"), lines.items()):
        points = " ".join(f"{x(number):.1f},{y(value):.1f}" for number, value in zip(hosts, values))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        parts.append(f'<text x="{x(100) + 6:.1f}" y="{y(values[-1]) + 9:.1f}" fill="{colour}">TTL {ttl} s</text>')
    parts.append(
        f'<text x="{left}" y="{height - 6}">mail hosts; questions to Keycloak a second, 100,000 users with 20 arrivals a day</text></svg>'
    )
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    commands = {"check": check, "table": table}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit((__doc__ or "").strip())
    commands[sys.argv[1]]()
