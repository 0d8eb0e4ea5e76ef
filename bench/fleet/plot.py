"""Line plots on two logarithmic axes, as SVG that can be read on light and on dark pages.

A page shows the picture as an image, which takes no colours from it; the picture itself asks which scheme is preferred.
Lines are told apart by a label at their end, not by colour alone.

Deliberately absent: every other kind of plot.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Line", "plot"]

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 78, 190, 46, 52
STYLE = """\
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 15px }
.grid { stroke: #d0d7de; stroke-width: 1 }
.line { fill: none; stroke-width: 2.5 }
.limit { fill: none; stroke: #6e7781; stroke-width: 1.5; stroke-dasharray: 6 5 }
.a { stroke: #0969da } .b { stroke: #cf222e } .c { stroke: #1a7f37 } .d { stroke: #8250df }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .grid { stroke: #3d444d }
  .limit { stroke: #9198a1 }
  .a { stroke: #58a6ff } .b { stroke: #ff7b72 } .c { stroke: #3fb950 } .d { stroke: #bc8cff }
}"""


@dataclass(frozen=True, slots=True)
class Line:
    """One line, or a limit that is drawn dashed.

    Attributes:
        points: Above zero, by growing first number.
    """

    label: str
    points: Sequence[tuple[float, float]]
    limit: bool = False


def plot(title: str, x_name: str, y_name: str, lines: Sequence[Line]) -> str:
    """The picture as the text of an SVG file."""
    x_axis = _Axis([x for line in lines for x, _ in line.points], LEFT, WIDTH - RIGHT)
    y_axis = _Axis([y for line in lines for _, y in line.points], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>\n{STYLE}\n</style>",
        _text(LEFT, 24, title, "title"),
        *_grid(x_axis, y_axis),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_name, anchor="middle"),
        _text(LEFT, TOP - 6, y_name),
        *_drawn(lines, x_axis, y_axis),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


class _Axis:
    """Whole decades around some values, on a stretch of the picture."""

    def __init__(self, values: Iterable[float], begins: float, ends: float) -> None:
        known = list(values)
        self.first = math.floor(math.log10(min(known)) + 1e-9)
        self.last = max(self.first + 1, math.ceil(math.log10(max(known)) - 1e-9))
        self._begins, self._ends = begins, ends

    def at(self, value: float) -> float:
        share = (math.log10(value) - self.first) / (self.last - self.first)
        return round(self._begins + share * (self._ends - self._begins), 1)

    @property
    def decades(self) -> list[float]:
        return [10.0**power for power in range(self.first, self.last + 1)]


def _grid(x_axis: _Axis, y_axis: _Axis) -> Iterable[str]:
    for value in x_axis.decades:
        x = x_axis.at(value)
        yield f'<path class="grid" d="M{x} {TOP}V{HEIGHT - BOTTOM}"/>'
        yield _text(x, HEIGHT - BOTTOM + 18, f"{value:,.0f}", anchor="middle")
    for value in y_axis.decades:
        y = y_axis.at(value)
        yield f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>'
        yield _text(LEFT - 8, y + 4, f"{value:,.0f}" if value >= 1 else f"{value:g}", anchor="end")


def _drawn(lines: Sequence[Line], x_axis: _Axis, y_axis: _Axis) -> Iterable[str]:
    colours = iter("abcd")
    taken: list[float] = []
    for line in sorted(lines, key=lambda line: line.points[-1][1]):
        steps = "L".join(f"{x_axis.at(x)} {y_axis.at(y)}" for x, y in line.points)
        yield f'<path class="{"limit" if line.limit else f"line {next(colours)}"}" d="M{steps}"/>'
        # From the lowest up, so that a label which would cover the one below it moves up.
        y = y_axis.at(line.points[-1][1])
        y = min([y, *(below - 16 for below in taken)])
        taken.append(y)
        yield _text(WIDTH - RIGHT + 8, y + 4, line.label)


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>'
