"""Curves of a sweep: weights over time of the best trial, values over samples of a population."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mmdiff_ray.config import Config
from mmdiff_ray.denoiser import build_modalities, build_process
from mmdiff_ray.diffusion.weights import w_from_b
from mmdiff_ray.sweeps.drawing import Drawn, axes_of, file_name, page_of, short
from mmdiff_ray.sweeps.findings import best_of
from mmdiff_ray.sweeps.journal import Trial
from mmdiff_ray.sweeps.record import Record
from mmdiff_ray.sweeps.spec import Sweep


def profiles(record: Record) -> list[Drawn]:
    """Draw b(t) and w_t of every swept modality: of the best trial, and of the configuration without a sweep.

    The first of the step weights, which holds what all others do not, is told beside the curve.
    """
    sweep = record.sweep
    swept = dict.fromkeys(key.split(".")[1] for key in sweep.space if ".weights." in key)
    known = [trial for trial in record.trials if trial.number in record.configs]
    if not swept or not known:
        return []
    best_trial = best_of(sweep, known)
    best = record.configs[best_trial.number]
    default = _default(record, best)
    pictures = []
    for name in swept:
        for kind, label in (("b", "profile b(t)"), ("w", "step weights w_t (100 steps)")):
            title = f"{name}: {label}"
            page = page_of(title, "t (0: the data, 1: noise)", kind)
            figure, axes = axes_of(title, xlabel="t (0: the data, 1: noise)", ylabel=kind)
            lines = ((default, "default", "0.5"), (best, f"best: trial {best_trial.number}", "#d62728"))
            for config, line, color in lines:
                t, values = _line(config, name, kind)
                if kind == "w":
                    line = f"{line} (first step: {values[0]:.3g})"
                    t, values = t[1:], values[1:]
                page.add_scatter(x=t, y=values, name=line)
                axes.plot(t, values, color=color, label=line)
            axes.legend(frameon=False)
            pictures.append(Drawn(f"{kind}-{file_name(name)}", title, page, figure))
    return pictures


def _default(record: Record, best: Config) -> Config:
    """Return the best trial's configuration with the weights that the base configuration has."""
    plain = record.sweep.config({})
    modalities = {
        name: dataclasses.replace(options, weights=plain.modalities[name].weights)
        for name, options in best.modalities.items()
    }
    return dataclasses.replace(best, modalities=modalities)


def _line(config: Config, name: str, kind: str, steps: int = 100) -> tuple[list[float], list[float]]:
    process = build_process(config, build_modalities(config))
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    b = process.profiles[name](t[1:])
    if kind == "b":
        return t[1:].tolist(), b.tolist()
    a = process.schedule.log_abar(t).diff().exp()
    return t[1:].tolist(), w_from_b(b, a).round(decimals=9).tolist()  # 0 is 0, and no rounding error


def lineage(sweep: Sweep, trials: Sequence[Trial]) -> list[Drawn]:
    """Draw every swept value over the samples of every trial, and whose state each copied when."""
    names, pictures = short(list(sweep.space)), []
    best = best_of(sweep, trials)
    for key in sweep.space:
        title = f"{names[key]} while the population trains"
        page = page_of(title, "samples seen", key)
        figure, axes = axes_of(title, xlabel="samples seen", ylabel=key)
        for trial in trials:
            x, y = _steps(trial, key)
            color, width = ("#d62728", 2.5) if trial is best else ("#1f77b4", 1.0)
            page.add_scatter(
                x=x, y=y, mode="lines", name=f"trial {trial.number}", line={"color": color, "width": width}
            )
            axes.plot(x, y, color=color, linewidth=width, alpha=1 if trial is best else 0.5)
            for change in trial.changes:
                if change["source"] != trial.number and key in change["values"]:
                    axes.annotate(
                        f"from {change['source']}", (change["at"], change["values"][key]), fontsize=6
                    )
        if sweep.space[key].kind == "loguniform":
            page.update_yaxes(type="log")
            axes.set_yscale("log")
        pictures.append(Drawn(f"lineage-{file_name(names[key])}", title, page, figure))
    return pictures


def _steps(trial: Trial, key: str) -> tuple[list[float], list[Any]]:
    """Return a value of a trial over its samples, as a line of steps."""
    x, y = [0.0], [trial.values.get(key, np.nan)]
    for change in trial.changes:
        if key in change["values"]:
            x += [change["at"], change["at"]]
            y += [y[-1], change["values"][key]]
    return [*x, trial.samples], [*y, y[-1]]
