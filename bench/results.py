"""RESULTS.md, results.json and results.svg: what was measured, compared with the run of before, and the truth of it in a few sentences."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from measure import ROOT, machine, say, verdict
from plot import draw

SECTIONS = ("table", "lock", "growth", "postfix", "cold")
KEPT = ("data",)  # written by hand, of bench/data.py
WORSE = 0.15  # a ratio that got worse by more than this is named


class Record(NamedTuple):
    """One measurement, or the median of several. None: not measured."""

    regime: str
    question: str
    connections: int
    rate: float  # answers a second, or messages
    share: Optional[float] = None  # of the rate of the bare server
    p99_us: Optional[float] = None
    p99_times: Optional[float] = None  # as long as the bare server's, where that has a goal


class Goal(NamedTuple):
    """One goal and the worst figure that counts for it. group: goals that the first sentences name together."""

    group: str
    name: str
    figure: float
    limit: float
    is_met: bool
    unit: str = ""  # of figure and limit; "": a share
    aim: Optional[float] = None  # more than the goal asks for


class Section(NamedTuple):
    """What a part of the bench has found."""

    text: str
    records: Sequence[Record] = ()
    goals: Sequence[Goal] = ()


def at_least(group: str, name: str, figures: Iterable[float], limit: float, aim: Optional[float] = None) -> Goal:
    figure = min(figures)
    return Goal(group, name, figure, limit, figure >= limit, aim=aim)


def at_most(group: str, name: str, figures: Iterable[float], limit: float, unit: str = "") -> Goal:
    figure = max(figures)
    return Goal(group, name, figure, limit, figure <= limit, unit)


# ---- Writing


def store(directory: Path, name: str, section: Section, *, command: str, seconds: float, load_average: float) -> None:
    """Compare a section with the stored one, then put it in its place, in all three files."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "results.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    old = stored.get(name)
    new: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "command": command,
        "seconds": round(seconds, 1),
        "load_average": round(load_average, 2),
        "machine": machine(),
        "records": [record._asdict() for record in section.records],
        "goals": [goal._asdict() for goal in section.goals],
    }
    new["compared_with"] = old["date"] if old else ""
    new["worse"] = what_got_worse(old["records"], new["records"]) if old else []
    for line in new["worse"]:
        say(f"{name}: WORSE than on {old['date']}: {line}")
    stored[name] = new
    path.write_text(json.dumps({each: stored[each] for each in SECTIONS if each in stored}, indent=1) + "\n", encoding="utf-8")
    if name == "table":
        (directory / "results.svg").write_text(draw(new["records"]), encoding="utf-8")
    write_text(directory / "RESULTS.md", stored, name, section.text)
    say(f"{name}: written to {directory / 'RESULTS.md'}".replace(f"{ROOT}/", ""))


def what_got_worse(old: Iterable[dict[str, Any]], new: Iterable[dict[str, Any]]) -> list[str]:
    """Each ratio of the new records that is worse by more than WORSE than that of the old ones, in words."""

    def key(record: dict[str, Any]) -> tuple[str, str, int]:
        return record["regime"], record["question"], record["connections"]

    before = {key(record): record for record in old}
    lines = []
    for record in new:
        known = before.get(key(record), {})
        where = f"{record['regime']}; {record['question']}; connections: {record['connections']}"
        for name, title, sign in (("share", "share of the bare server", -1), ("p99_times", "p99, times the bare server's", 1)):
            was, is_now = known.get(name), record[name]
            if was and is_now is not None and sign * (is_now / was - 1) > WORSE:
                lines.append(f"{where}: {title} {is_now:.2f}, was {was:.2f}")
    return lines


def write_text(path: Path, stored: dict[str, Any], name: str, text: str) -> None:
    """RESULTS.md with this section in place of the one of before; the others stay as they are."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    sections = dict(re.findall(r"^<!-- begin (\w+) -->\n(.*?)^<!-- end \1 -->$", old, re.MULTILINE | re.DOTALL))
    took = stored[name]
    title, _, rest = text.partition("\n")
    preamble = f"{took['date']}, `{took['command']}`, {took['seconds']:.0f} s, load average {took['load_average']:.1f} before."
    sections[name] = f"{title}\n\n{preamble} {took['machine']}.\n{rest}"
    parts = [first_screen(stored)]
    parts += [f"<!-- begin {each} -->\n{sections[each]}<!-- end {each} -->\n" for each in (*SECTIONS, *KEPT) if each in sections]
    path.write_text("\n".join(parts), encoding="utf-8")


# ---- The first screen of RESULTS.md


def first_screen(stored: dict[str, Any]) -> str:
    goals = [Goal(**goal) for each in SECTIONS for goal in stored.get(each, {}).get("goals", ())]
    by_group: dict[str, list[Goal]] = {}
    for goal in goals:
        by_group.setdefault(goal.group, []).append(goal)
    sentences = [sentence(group, by_group[group]) for group in SENTENCES if group in by_group]
    missed = sum(not goal.is_met for goal in goals)
    met = f"{len(goals) - missed} of {len(goals)} goals are met, {missed} are missed.\n\n" if goals else ""
    image = "![requests per second by connections, one panel for each regime](results.svg)\n\n" if "table" in stored else ""
    took = ", ".join(f"{name} {stored[name]['seconds']:.0f} s" for name in SECTIONS if name in stored)
    listed = "\n".join(f"* {sentence}" for sentence in sentences)
    return f"""# What mailcloak costs

{met}{listed}

{image}`make bench` writes this file (`bench/bench.py` says what it does); bench/NOTES.md says what the figures mean, results.json has them for
programs. Each section names the machine, the versions and the command, and holds for the program whose SHA-256 it names. A figure that has
a goal has the goal beside it. The sections took: {took}.

{comparison(stored)}"""


SENTENCES = {
    "policy": "Policy, as a share of a bare Python server's rate, the least of any question and number of connections",
    "map": "The map, the same",
    "p99": "p99 at 50 connections, as a multiple of the bare server's, the worst of any question",
    "memory": "Memory, pauses of Python's collector, start-up, and what Keycloak is asked",
    "postfix": "Messages per second through Postfix, as a share of those with a bare policy server and a bare map server",
}


def sentence(group: str, goals: Sequence[Goal]) -> str:
    return f"{SENTENCES[group]}: {'; '.join(map(figure_in_words, goals))}."


def figure_in_words(goal: Goal) -> str:
    aim = f", aim {goal.aim:g}: {verdict(goal.figure >= goal.aim)}" if goal.aim else ""
    figure = f"{goal.figure:,.1f} {goal.unit}" if goal.unit else f"{goal.figure:.2f}"
    return f"{goal.name} {figure} (goal {goal.limit:g}: {verdict(goal.is_met)}{aim})"


def comparison(stored: dict[str, Any]) -> str:
    """What got worse since the run of before, by section."""
    lines = []
    for name in SECTIONS:
        if stored.get(name, {}).get("compared_with"):
            worse = stored[name]["worse"]
            text = "\n".join(f"  * {line}" for line in worse) if worse else ""
            lines.append(f"* {name}, compared with {stored[name]['compared_with']}: {len(worse) or 'none'}\n{text}".rstrip() + "\n")
    return f"Ratios that got worse by more than {WORSE:.0%}:\n\n{''.join(lines)}" if lines else ""
