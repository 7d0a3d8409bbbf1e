"""Styles of methods and rules: the same colour, marker and line in every figure of an experiment."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmdiff_ray.plotting import POINTS, spread

RULE = "rule: "
MAIN = "#D55E00"
COLORS = (
    "#332288", "#44AA99", "#DDAA33", "#882255", "#88CCEE", "#117733", "#AA4499", "#999933", "#4477AA",
    "#661100", "#EE8899", "#222222", "#BBCC33",
)  # fmt: skip
"""Colours of the other methods: Paul Tol's qualitative schemes, distinguishable for colour-blind readers."""
MARKERS = "sD^vPX<>ph"
DASHES = ((0, (6, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (10, 3)), (0, (3, 1, 1, 1, 1, 1)))


@dataclass(frozen=True)
class Style:
    """The style of a method or a rule. line: a line style of matplotlib."""

    label: str
    color: str
    marker: str | None
    line: Any = "-"
    width: float = 1.4
    size: float = 5.5
    is_main: bool = False

    @property
    def weight(self) -> str:
        """The font weight of the label."""
        return "bold" if self.is_main else "normal"

    @property
    def drawn(self) -> dict[str, Any]:
        """Keyword arguments of `axes.plot`."""
        return {
            "color": self.color, "marker": self.marker, "markersize": self.size, "linestyle": self.line,
            "linewidth": self.width, "zorder": 3 if self.is_main else 2,
        }  # fmt: skip


def styles(values: Mapping[str, Any]) -> dict[str, Style]:
    """Return the style of every method and rule of a result, by name.

    The main method has a style of its own. No two methods share both colour and marker. Rules are
    dashed grey.
    """
    main = values["main"]
    found = {main: Style(values["methods"][main], MAIN, "o", width=2.8, size=8, is_main=True)}
    for at, name in enumerate(name for name in values["methods"] if name != main):
        found[name] = numbered(at, values["methods"][name])
    rules = dict.fromkeys(line["method"] for line in values["figures"] if line["method"].startswith(RULE))
    for at, name in enumerate(rules):
        label = name.removeprefix(RULE) + " (rule)"
        found[name] = Style(label, "0.45", None, DASHES[at % len(DASHES)], 1.3, 0)
    return found


def numbered(at: int, label: str) -> Style:
    """Return the style of the line with this index."""
    return Style(label, COLORS[at % len(COLORS)], MARKERS[at % len(MARKERS)])


def wrapped(text: str, width: int) -> str:
    """Wrap text at a width into as few lines as possible, of similar length."""
    count = len(textwrap.wrap(text, width))
    filled = (textwrap.wrap(text, narrow) for narrow in range(1, width + 1))
    return "\n".join(next((lines for lines in filled if len(lines) <= count), [text]))


def label_ends(axes: Any, ends: Sequence[tuple[float, float, Style]], width: int = 44) -> None:
    """Label lines to the right of their last points, without overlaps.

    ends: (x, y, style) of each line's last point. Call this last: positions depend on the axis limits.
    """
    axes.autoscale_view()
    ends = sorted(ends, key=lambda end: end[1])
    labels = [wrapped(style.label, width) for _, _, style in ends]
    inside = axes.transData + axes.transAxes.inverted()
    places = [inside.transform((x, y)) for x, y, _ in ends]
    inches = axes.figure.get_figheight() - 1.2  # without titles
    heights = [(label.count("\n") + 1.4) * POINTS * 1.2 / 72 / inches for label in labels]
    levels = spread([float(y) for _, y in places], heights, 0.0, 1.0)
    for label, (x, y), level, (_, _, style) in zip(labels, places, levels, ends, strict=True):
        leader = style.drawn | {"linewidth": 0.7}
        axes.plot([x, 1.04], [y, level], transform=axes.transAxes, markevery=[1], clip_on=False, **leader)
        axes.text(
            1.055, level, label, transform=axes.transAxes, va="center", fontsize=POINTS,
            fontweight=style.weight, linespacing=1.1,
        )  # fmt: skip
