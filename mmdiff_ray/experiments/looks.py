"""How methods and rules look in the figures of an experiment: the same in all of them."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmdiff_ray.sweeps.drawing import spread

RULE = "rule: "
MAIN = "#D55E00"
COLORS = (
    "#332288", "#44AA99", "#DDAA33", "#882255", "#88CCEE", "#117733", "#AA4499", "#999933", "#4477AA",
    "#661100", "#EE8899", "#222222", "#BBCC33",
)  # fmt: skip
"""Of methods beside the main one; after Paul Tol's qualitative schemes, which the colour-blind tell apart."""
MARKERS = "sD^vPX<>ph"
DASHES = ((0, (6, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (10, 3)), (0, (3, 1, 1, 1, 1, 1)))
POINTS = 8.5
"""Of the labels at lines and rows."""


@dataclass(frozen=True)
class Look:
    """How a method or a rule is drawn. line: a style of matplotlib."""

    label: str
    color: str
    marker: str | None
    line: Any
    width: float
    size: float
    is_main: bool = False

    @property
    def weight(self) -> str:
        """The weight of the label's font."""
        return "bold" if self.is_main else "normal"


def looks(values: Mapping[str, Any]) -> dict[str, Look]:
    """Return the looks of a result's methods and rules by name.

    The main method stands out; no two others share colour and marker, nor colours while these suffice; rules
    are grey and differ in their dashes.
    """
    main, found = values["main"], {}
    found[main] = Look(values["methods"][main], MAIN, "o", "-", 2.8, 8, is_main=True)
    others = [name for name in values["methods"] if name != main]
    for at, name in enumerate(others):
        found[name] = numbered(at, values["methods"][name])
    rules = dict.fromkeys(line["method"] for line in values["figures"] if line["method"].startswith(RULE))
    for at, name in enumerate(rules):
        found[name] = Look(
            name.removeprefix(RULE) + " (rule)", "0.45", None, DASHES[at % len(DASHES)], 1.3, 0
        )
    return found


def numbered(at: int, label: str) -> Look:
    """Return the look of one of many lines by its number."""
    return Look(label, COLORS[at % len(COLORS)], MARKERS[at % len(MARKERS)], "-", 1.4, 5.5)


def wrapped(words: str, width: int) -> str:
    """Return words in as few lines as a width allows, of about equal length."""
    count = len(textwrap.wrap(words, width))
    filled = (textwrap.wrap(words, narrow) for narrow in range(1, width + 1))
    return "\n".join(next((lines for lines in filled if len(lines) <= count), [words]))


def direction(better: str) -> str:
    """Return the words for where better values lie."""
    return f"{better} is better"


def label_ends(axes: Any, ends: Sequence[tuple[float, float, Look]], width: int = 44) -> None:
    """Name lines at the right of their axes, each beside its last point, moved up or down where names meet.

    ends: of every line the last point's x and y, and its look. What changes the axes must have been done.
    """
    axes.autoscale_view()
    ends = sorted(ends, key=lambda end: end[1])
    names = [wrapped(look.label, width) for _, _, look in ends]
    inside = axes.transData + axes.transAxes.inverted()
    places = [inside.transform((x, y)) for x, y, _ in ends]
    inches = axes.figure.get_figheight() - 1.2  # what titles leave of the height
    heights = [(name.count("\n") + 1.4) * POINTS * 1.2 / 72 / inches for name in names]
    levels = spread([float(y) for _, y in places], heights, 0.0, 1.0)
    for name, (x, y), level, (_, _, look) in zip(names, places, levels, ends, strict=True):
        axes.plot(
            [x, 1.04], [y, level], transform=axes.transAxes, color=look.color, linestyle=look.line,
            linewidth=0.7, marker=look.marker, markevery=[1], markersize=look.size, clip_on=False,
        )  # fmt: skip
        axes.text(
            1.055, level, name, transform=axes.transAxes, va="center", fontsize=POINTS,
            fontweight=look.weight, linespacing=1.1,
        )  # fmt: skip
