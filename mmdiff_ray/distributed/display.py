"""Progress output on the terminal: one line per run, and progress bars."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table

LINE_EVERY_S = 15.0
"""Seconds between progress lines if output is not a terminal."""


def make_console() -> Console:
    """Return the console of a command. Redirected output gets 120 columns, not rich's 80."""
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=120)


class Display:
    """Show a run's progress: samples, speed, time left, losses and the fraction of time waiting for data."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, markup=False)
        self._live: Live | None = None
        self._printed = 0.0
        self._losses: dict[str, float] = {}

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a line above the progress line."""
        self.console.print(text, soft_wrap=True)

    def show(self, event: dict[str, Any]) -> None:
        """Update the progress line from a progress event of rank 0."""
        progress, metrics = event["progress"], event["metrics"]
        self._losses.update({k: v for k, v in metrics.items() if k.startswith(("loss/", "val/loss/total"))})
        line = progress_line(progress, metrics, self._losses)
        if self._live is not None:
            share = progress["samples_seen"] / max(1, progress["total_samples"])
            table = Table.grid(padding=(0, 1))
            table.add_row(ProgressBar(total=1.0, completed=share, width=24), line)
            self._live.update(table)
        elif time.monotonic() - self._printed > LINE_EVERY_S:
            self._printed = time.monotonic()
            self.say(line)


def progress_line(progress: dict[str, Any], metrics: dict[str, float], losses: dict[str, float]) -> str:
    """Format progress as one line."""
    seen, total, rate = (
        progress["samples_seen"],
        progress["total_samples"],
        metrics.get("train/samples_per_s", 0.0),
    )
    left = (total - seen) / rate if rate else float("nan")
    parts = [f"{seen:,} of {total:,} samples", f"{rate:.0f}/s", f"{duration(left)} left"]
    if "loss/total" in losses:
        parts.append(f"loss {losses['loss/total']:.3f} ({_loss_terms(losses)})")
    if "val/loss/total" in losses:
        parts.append(f"held out {losses['val/loss/total']:.3f}")
    if "train/data_wait_share" in metrics:
        parts.append(f"data wait {metrics['train/data_wait_share']:.0%}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Format seconds: 45 s, 3 min 20 s, 2 h 05 min."""
    if seconds != seconds:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _loss_terms(losses: dict[str, float]) -> str:
    """Format the losses L1 to L3, each summed over modalities without coefficients."""
    sums: dict[str, float] = {}
    for key, value in losses.items():
        part = key.split("/")
        if part[0] == "loss" and len(part) == 3:
            sums[part[1]] = sums.get(part[1], 0.0) + value
    return " ".join(f"{term.upper()} {value:.2f}" for term, value in sorted(sums.items()) if term != "l0")


@contextmanager
def show_progress(title: str, total: int, visible: bool) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on standard error during the block; yield the function that advances it.

    The bar writes to a copy of file descriptor 2, since `flow.quiet_stderr` captures the descriptor itself.
    """
    parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with open(os.dup(2), "w") as terminal:
        console = Console(file=terminal)
        with Progress(*parts, console=console, disable=not visible, refresh_per_second=4) as bar:
            task = bar.add_task(title, total=total)
            yield lambda rows: bar.advance(task, rows)
