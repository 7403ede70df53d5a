"""results.svg: answers per second by connections, a panel for each regime, as plain SVG text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 300, 240, 52, 14, 34, 42  # of a panel, and its margins
COLUMNS = 3
KEY_LINE = 21  # height of a line of the legend

# The lines in the order of the questions: colours on light and on dark, and a mark, so that nobody needs the colours.
COLOURS = (
    ("#0b62c4", "#5aa9f5"),
    ("#c2410c", "#fb923c"),
    ("#0f7a4f", "#3ecf8e"),
    ("#8b2fc9", "#c084fc"),
    ("#a8790a", "#e9c046"),
    ("#c11d6b", "#f472b6"),
    ("#0c7c8c", "#3cc8da"),
)
LIGHT = ("#ffffff", "#222222", "#dcdfe4", "#6b7280")  # ground, text, grid, the bare servers
DARK = ("#16181d", "#e6e6e6", "#3a3f47", "#a3a9b3")
MARKS = (
    '<circle cx="{x}" cy="{y}" r="3.6"/>',
    '<rect x="{x}" y="{y}" width="6.4" height="6.4" transform="translate(-3.2 -3.2)"/>',
    '<path d="M{x} {y}m0 -4.4l4.2 7.4h-8.4z"/>',
    '<path d="M{x} {y}m0 -4.6l4.6 4.6l-4.6 4.6l-4.6 -4.6z"/>',
    '<path d="M{x} {y}m0 4.4l4.2 -7.4h-8.4z"/>',
    '<path d="M{x} {y}m-3.8 0h7.6m-3.8 -3.8v7.6" class="cross"/>',
    '<path d="M{x} {y}m-3.2 -3.2l6.4 6.4m0 -6.4l-6.4 6.4" class="cross"/>',
)


def style() -> str:
    """Colours by class and without variables, which some programs that show SVG do not know."""

    def colours(dark: bool) -> str:
        ground, ink, faint, bare = DARK if dark else LIGHT
        of_lines = {"bare": bare, **{f"q{number}": pair[dark] for number, pair in enumerate(COLOURS)}}
        rules = [f".ground {{ fill: {ground} }} text {{ fill: {ink} }} .grid {{ stroke: {faint} }}"]
        rules += [f".{name} {{ stroke: {colour} }} .{name} .mark {{ fill: {colour} }}" for name, colour in of_lines.items()]
        return "\n".join(rules)

    return f"""<style>
text {{ font: 11px system-ui, sans-serif }}
.title {{ font-weight: 600; font-size: 12px }}
.line {{ fill: none; stroke-width: 1.8 }}
.bare .line {{ stroke-width: 2.2 }}
.dash {{ stroke-dasharray: 6 4 }}
.dot {{ stroke-dasharray: 1.5 4; stroke-linecap: round }}
.cross {{ stroke-width: 2 }}
{colours(False)}
@media (prefers-color-scheme: dark) {{
{colours(True)}
}}
</style>"""


def draw(records: Sequence[dict[str, Any]]) -> str:
    """The records of the table; the bare servers are those whose question begins with "bare server"."""
    regimes = list(dict.fromkeys(record["regime"] for record in records))
    questions = list(dict.fromkeys(record["question"] for record in records))
    bare = [question for question in questions if question.startswith("bare server")]
    asked = [question for question in questions if question not in bare]
    drawn = {question: ("bare", number) for number, question in enumerate(bare)}
    drawn.update({question: ("question", number % len(COLOURS)) for number, question in enumerate(asked)})
    step = tick_step(max(record["rate"] for record in records))
    top = step * math.ceil(max(record["rate"] for record in records) / step)
    cells = [panel(regime, [each for each in records if each["regime"] == regime], drawn, top, step) for regime in regimes]
    cells.append(legend(drawn))
    rows = math.ceil(len(cells) / COLUMNS)
    width, height = COLUMNS * WIDTH, rows * HEIGHT + 8
    placed = [
        f'<g transform="translate({number % COLUMNS * WIDTH} {number // COLUMNS * HEIGHT})">{cell}</g>'
        for number, cell in enumerate(cells)
    ]
    newline = "\n"
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">
<title>Requests per second by connections, for each regime, beside a bare Python server</title>
{style()}
<rect class="ground" width="{width}" height="{height}"/>
{newline.join(placed)}
</svg>
"""


def tick_step(greatest: float) -> float:
    """A round number, of which four to eight make the axis."""
    size = 10 ** math.floor(math.log10(greatest))
    return next(size * part for part in (0.2, 0.5, 1, 2) if greatest / (size * part) <= 8)


def panel(regime: str, records: Sequence[dict[str, Any]], drawn: dict[str, tuple[str, int]], top: float, step: float) -> str:
    connections = sorted({record["connections"] for record in records})
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    # at equal distances: 1, 10 and 50 are three kinds of host more than points of a scale
    across = {each: LEFT + inner_width * (number + 0.5) / len(connections) for number, each in enumerate(connections)}

    def up(rate: float) -> float:
        return round(TOP + inner_height * (1 - rate / top), 1)

    parts = [f'<text class="title" x="{LEFT}" y="18">{escape(regime)}</text>']
    for number in range(round(top / step) + 1):
        y = up(number * step)
        label = f"{number * step / 1000:g}k" if number else "0"
        parts.append(
            f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/><text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{label}</text>'
        )
    for each, x in across.items():
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{each}</text>')
    middle = TOP + inner_height / 2
    parts.append(f'<text x="{LEFT + inner_width / 2:.1f}" y="{HEIGHT - BOTTOM + 31}" text-anchor="middle">connections</text>')
    parts.append(f'<text x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">requests/s</text>')
    for question, how in drawn.items():
        points = sorted((each["connections"], each["rate"]) for each in records if each["question"] == question)
        if points:
            parts.append(line([(round(across[x], 1), up(rate)) for x, rate in points], how))
    return "\n".join(parts)


def line(points: Sequence[tuple[float, float]], how: tuple[str, int]) -> str:
    path = "L".join(f"{x} {y}" for x, y in points)
    kind, number = how
    if kind == "bare":
        return f'<g class="bare"><path class="line {("dash", "dot")[number % 2]}" d="M{path}"/></g>'
    marks = "".join(MARKS[number].format(x=x, y=y) for x, y in points)
    return f'<g class="q{number}"><path class="line" d="M{path}"/><g class="mark">{marks}</g></g>'


def legend(drawn: dict[str, tuple[str, int]]) -> str:
    parts = []
    for number, (question, how) in enumerate(drawn.items()):
        y = TOP + KEY_LINE * number
        parts.append(line([(20, y), (36, y), (52, y)] if how[0] == "bare" else [(20, y), (52, y)], how))
        parts.append(f'<text x="62" y="{y + 4}">{escape(question)}</text>')
    return "\n".join(parts)
