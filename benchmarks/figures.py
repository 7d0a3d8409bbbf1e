"""Figures of a benchmark and their table: value, baseline, ratio, target, whether it is met."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

COLUMNS = ("figure", "value", "baseline", "ratio", "target", "met")


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured number. baseline: what it is compared with. target: the limit that `met` refers to.

    lower: whether the target is an upper limit. Without a target the figure only informs.
    """

    figure: str
    value: float | None
    baseline: float | None = None
    target: float | None = None
    lower: bool = True
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Return value / baseline."""
        return self.value / self.baseline if self.value is not None and self.baseline else None

    @property
    def met(self) -> bool | None:
        """Return whether the ratio, or without a baseline the value, keeps to the target."""
        measured = self.value if self.baseline is None else self.ratio
        if self.target is None or measured is None:
            return None
        return measured <= self.target if self.lower else measured >= self.target

    def plain(self) -> dict[str, Any]:
        """Return the figure with its ratio and whether the target is met, for JSON."""
        return {**dataclasses.asdict(self), "ratio": self.ratio, "met": self.met}


def plain_figures(figures: Iterable[Figure]) -> list[dict[str, Any]]:
    """Return figures for JSON."""
    return [figure.plain() for figure in figures]


def render(figures: Sequence[Mapping[str, Any]]) -> str:
    """Return the table as aligned text. figures: as `Figure.plain` returns them."""
    lines = [COLUMNS, *(_cells(figure) for figure in figures)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(COLUMNS))]
    rows = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    notes = ["", *(figure["note"] for figure in figures)]
    return "".join(f"{row}  {note}".rstrip() + "\n" for row, note in zip(rows, notes, strict=True))


def _cells(figure: Mapping[str, Any]) -> tuple[str, ...]:
    sign = "<=" if figure["lower"] else ">="
    target = "" if figure["target"] is None else f"{sign} {_number(figure['target'])}"
    met = {None: "", True: "yes", False: "NO"}[figure["met"]]
    numbers = (_number(figure[key]) for key in ("value", "baseline", "ratio"))
    return (figure["figure"], *numbers, target, met)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
