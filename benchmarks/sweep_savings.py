"""Measure how many samples a sweep needs until it reaches what random search finds with all of its own.

    .venv/bin/python benchmarks/sweep_savings.py [--seeds 0 1 2 3 4] [--runs FOLDER]

Real runs: a small network on digits, four swept keys, judged by the label's loss at t = 1. For each seed
random search trains all its trials to the end; ASHA over random configurations, TPE with ASHA, and
population based training then look for as good a figure. What counts is the samples trained with, by all
trials together, until a report first reaches it. Trials run one at a time (a population at once), so that
nothing depends on the machine. Replay: the curves that random search recorded, in other orders, through the
same searcher and scheduler; a population cannot be replayed, for its members copy each other. Goes on where
it stopped if --runs is the same. Writes benchmarks/results/sweep_savings.json and .png.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
import torch
import yaml
from optuna.trial import TrialState

from mmdiff_ray.distributed.cluster import cluster
from mmdiff_ray.distributed.tune.schedulers import make_scheduler
from mmdiff_ray.distributed.tune.sweep import begin_sweep, check_sweep, make_configs, run_sweep
from mmdiff_ray.distributed.tune.trial import SCORE
from mmdiff_ray.plotting import panels
from mmdiff_ray.sweeps.journal import Trial, read_trials
from mmdiff_ray.sweeps.spec import Sweep, load_sweep
from mmdiff_ray.sweeps.study import as_frozen, distribution, make_study
from mmdiff_ray.tracking import run_life

METRIC = "label/head_nll"
SAMPLES, REPORTS = 8000, 8
RANDOM_TRIALS, TRIALS, MEMBERS = 20, 48, 6
REPLAYS = 200
SPEC: dict[str, Any] = {
    "title": "Savings",
    "base": {
        "space": {"height": 8, "width": 8},
        "modalities": {"pixels": {"type": "image"}, "label": {"type": "label", "weights": {"scale": 0.2}}},
        "tasks": {
            "joint": {"roles": {"pixels": "generated", "label": "generated"}},
            "classify": {"drop": 0, "roles": {"pixels": "given", "label": "generated"}},
        },
        "loss": {"modalities": {"label": 0.05}, "channels": {"label": 0.05}},
        "model": {
            "backbone": "unet",
            "preset": "nano",
            "options": {"multipliers": [1, 2], "blocks": [1, 1], "attention": [1]},
        },
        "train": {
            "global_batch": 40,
            "warmup_samples": 400,
            "ema_samples": 400,
            "learning_rate": 4.0e-3,
            "log_every_samples": 1000,
        },
        "workers": {"count": 1, "threads": 1},
        "evaluate": {"evaluators": ["calibration"], "rows": 256},
    },
    "space": {
        "modalities.label.weights.scale": {"loguniform": [0.005, 1.5]},
        "modalities.label.weights.shape": {"loguniform": [0.3, 3]},
        "loss.modalities.label": {"loguniform": [0.005, 0.5]},
        "train.learning_rate": {"loguniform": [5.0e-4, 2.0e-2]},
    },
    "metrics": {METRIC: "min"},
}
ASHA = {"name": "asha", "grace": 0.125, "reduction": 3}
STRATEGIES: dict[str, dict[str, Any]] = {
    "random": {
        "title": "random search, all trials to the end",
        "searcher": {"name": "random"},
        "scheduler": {"name": "fifo"},
        "budget": {"trials": RANDOM_TRIALS, "concurrent": 1},
    },
    "asha": {
        "title": "ASHA over random configurations",
        "searcher": {"name": "random"},
        "scheduler": ASHA,
        "budget": {"trials": TRIALS, "concurrent": 1},
    },
    "tpe_asha": {
        "title": "TPE and ASHA",
        "searcher": {"name": "tpe", "startup": 10},
        "scheduler": ASHA,
        "budget": {"trials": TRIALS, "concurrent": 1},
    },
    "pbt": {
        "title": "population based training",
        "searcher": {"name": "random"},
        "scheduler": {"name": "pbt", "grace": 0.125, "quantile": 0.25},
        "budget": {"trials": MEMBERS},
    },
}
Seen = list[tuple[int, float]]
"""What a sweep saw: (samples trained with by all trials so far, the figure of a report), in order."""


def main() -> None:
    """Run what is not done yet, replay, print and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path)
    given = parser.parse_args()
    runs = given.runs or Path(tempfile.mkdtemp())
    data = build_digits(runs)
    real: dict[str, list[Seen]] = {name: [] for name in STRATEGIES}
    curves: list[Trial] = []
    with cluster(MEMBERS + 1):
        for seed in given.seeds:
            for name in STRATEGIES:
                trials = swept(name, seed, data, runs)
                real[name].append(by_round(trials) if name == "pbt" else one_by_one(trials))
                if name == "random":
                    curves += trials
    replayed = replays(write_spec("asha", 0, data, runs / "replay"), curves)
    write(
        {
            "command": f"benchmarks/sweep_savings.py --seeds {' '.join(map(str, given.seeds))}",
            "metric": METRIC,
            "random_search": f"{RANDOM_TRIALS} trials of {SAMPLES:,} samples",
            "strategies": {name: part["title"] for name, part in STRATEGIES.items()},
            "real": {"seeds": given.seeds, **summary(real)},
            "across": across(real),
            "replay": {"orders": REPLAYS, "curves": len(curves), **summary(replayed)},
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
            "versions": {"torch": torch.__version__, "ray": ray.__version__},
        },
        real,
    )


def build_digits(runs: Path) -> str:
    """Return the path of the digits' shards, built once."""
    from mmdiff_ray.datasets.build import build

    place = runs / "digits"
    if not (place / "manifest.json").is_file():
        build("digits", str(place), {}, workers=0, progress=False)
    return str(place)


def write_spec(name: str, seed: int, data: str, folder: Path) -> Sweep:
    """Return a strategy as a sweep, from the file that is written for it."""
    part = {key: value for key, value in STRATEGIES[name].items() if key != "title"}
    budget = {**part["budget"], "samples": SAMPLES, "reports": REPORTS}
    base = {**SPEC["base"], "data": {"sources": [{"uri": data}]}, "seed": seed, "runs": str(folder)}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-{seed}.yaml"
    plain = {**SPEC, **part, "base": base, "budget": budget, "name": f"{name}-{seed}", "seed": seed}
    file.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf8")
    return load_sweep(file)


def swept(name: str, seed: int, data: str, runs: Path) -> list[Trial]:
    """Return the trials of a strategy with a seed, run now unless they are done."""
    sweep = write_spec(name, seed, data, runs)
    folder = runs / "sweeps" / sweep.name
    if not (folder / "sweep.json").is_file():
        seen, _ = check_sweep(sweep)
        text = (runs / f"{sweep.name}.yaml").read_text(encoding="utf8")
        begin_sweep(sweep, seen, text, "benchmarks/sweep_savings.py", str(runs))
    run_sweep(sweep, folder, lambda line: None)
    facts = json.loads((folder / "sweep.json").read_text(encoding="utf8"))
    run_life.end_run(facts["tracking_uri"], facts["run_id"], "FINISHED", folder / "tracking")
    trials = list(read_trials(folder))
    best = min((value for _, value in one_by_one(trials)), default=math.nan)
    print(f"{sweep.name}: {len(trials)} trials, best {best:.4f}", flush=True)
    return trials


def one_by_one(trials: Sequence[Trial]) -> Seen:
    """Return what was seen where each trial began after the one before had ended."""
    seen, before = [], 0
    for trial in trials:
        seen += [(before + report["samples"], report["figures"][METRIC]) for report in trial.reports]
        before += trial.samples
    return seen


def by_round(trials: Sequence[Trial]) -> Seen:
    """Return what was seen of a population, whose members train side by side."""
    rounds = sorted({report["samples"] for trial in trials for report in trial.reports})
    return [
        (at * len(trials), report["figures"][METRIC])
        for at in rounds
        for trial in trials
        for report in trial.reports
        if report["samples"] == at
    ]


def replays(sweep: Sweep, curves: Sequence[Trial]) -> dict[str, list[Seen]]:
    """Return what strategies would have seen, had their trials been the recorded ones in other orders."""
    found: dict[str, list[Seen]] = {"random": [], "asha": [], "tpe_asha": []}
    whole = [trial for trial in curves if trial.outcome == "finished"]
    for order in range(REPLAYS):
        rng = np.random.default_rng(order)
        shuffled = [whole[i] for i in rng.permutation(len(whole))]
        found["random"].append(one_by_one(shuffled[:RANDOM_TRIALS]))
        found["asha"].append(one_by_one(list(through_scheduler(sweep, iter(shuffled[:TRIALS])))))
        found["tpe_asha"].append(one_by_one(with_tpe(sweep, shuffled, order)))
    return found


def through_scheduler(sweep: Sweep, trials: Iterator[Trial]) -> Iterator[Trial]:
    """Yield trials as far as the scheduler lets them go on."""
    scheduler = make_scheduler(sweep, make_configs(sweep), [])
    for number, trial in enumerate(trials):
        stand_in = SimpleNamespace(trial_id=f"trial-{number}")
        scheduler.on_trial_add(None, stand_in)
        kept: list[dict[str, Any]] = []
        for report in trial.reports:
            kept.append(report)
            told = {SCORE: -report["figures"][METRIC], "samples_seen": report["samples"]}
            if scheduler.on_trial_result(None, stand_in, told) == scheduler.STOP:
                break
        outcome = "finished" if len(kept) == len(trial.reports) else "stopped"
        yield Trial(number, trial.values, reports=kept, outcome=outcome)


def with_tpe(sweep: Sweep, trials: Sequence[Trial], seed: int) -> list[Trial]:
    """Return the trials of TPE, which takes for each point that it asks for the nearest one recorded."""
    tpe = with_seed(sweep, seed)
    study, left = make_study(tpe), list(trials)
    space = {key: distribution(dimension) for key, dimension in sweep.space.items()}

    def chosen() -> Iterator[Trial]:
        for _ in range(min(TRIALS, len(trials))):
            asked = study.ask(space)
            nearest = min(left, key=lambda trial: distance(sweep, asked.params, trial.values))
            study.tell(asked, state=TrialState.FAIL)
            left.remove(nearest)
            yield nearest

    done = []
    for trial in through_scheduler(sweep, chosen()):
        study.add_trial(as_frozen(tpe, trial))
        done.append(trial)
    return done


def with_seed(sweep: Sweep, seed: int) -> Sweep:
    """Return a sweep with TPE for its searcher, and another seed."""
    searcher = dataclasses.replace(sweep.searcher, name="tpe", startup=10)
    return dataclasses.replace(sweep, searcher=searcher, seed=seed)


def distance(sweep: Sweep, first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    """Return how far two points are from each other, in parts of the range of each key's logarithm."""
    parts = [
        math.log(first[key] / second[key]) / math.log(dimension.high / dimension.low)
        for key, dimension in sweep.space.items()
    ]
    return math.hypot(*parts)


def first_at(path: Seen, goal: float) -> int | None:
    """Return the samples after which a figure is as good as the goal, or None."""
    return next((samples for samples, value in path if value <= goal), None)


def summary(paths: Mapping[str, Sequence[Seen]]) -> dict[str, Any]:
    """Return for every strategy the share of random search's samples after which it found as good a figure.

    Where it did not, it counts with all samples that it had: the mean is then a lower bound, and `reached`
    says how often it was. interval: 95 %, of the mean, by bootstrap over seeds or orders.
    """
    rng, result = np.random.default_rng(0), {}
    goals = [min(value for _, value in path) for path in paths["random"]]
    totals = [path[-1][0] for path in paths["random"]]
    for name, found in paths.items():
        at = [first_at(path, goal) for path, goal in zip(found, goals, strict=True)]
        shares = np.array(
            [
                (path[-1][0] if reached is None else reached) / total
                for path, reached, total in zip(found, at, totals, strict=True)
            ]
        )
        means = shares[rng.integers(0, len(shares), (10_000, len(shares)))].mean(1)
        result[name] = {
            "share_of_samples": round(float(shares.mean()), 4),
            "interval": [round(float(value), 4) for value in np.quantile(means, [0.025, 0.975])],
            "reached": f"{sum(reached is not None for reached in at)} of {len(at)}",
        }
        if len(at) <= 20:
            result[name]["by_seed"] = [
                {
                    "samples": reached,
                    "trained_in_all": path[-1][0],
                    "best": round(min(v for _, v in path), 5),
                }
                for reached, path in zip(at, found, strict=True)
            ]
    return result


def across(paths: Mapping[str, Sequence[Seen]]) -> dict[str, Any]:
    """Return the same with the goal of one seed and the sweep of another, for all pairs of different seeds.

    With one seed, random search, ASHA and the start of TPE draw the same points, so that the one which set
    the goal is among theirs. Here it is not. interval: 95 %, of the mean over pairs, by bootstrap over seeds.
    """
    rng, result = np.random.default_rng(0), {}
    goals = [min(value for _, value in path) for path in paths["random"]]
    totals = [path[-1][0] for path in paths["random"]]
    count = len(goals)
    draws = rng.integers(0, count, (4000, count))
    for name in ("random", "asha", "tpe_asha"):
        at = [[first_at(path, goal) for path in paths[name]] for goal in goals]
        shares = np.array(
            [
                [
                    (path[-1][0] if reached is None else reached) / total
                    for path, reached in zip(paths[name], row, strict=True)
                ]
                for row, total in zip(at, totals, strict=True)
            ]
        )
        means = []
        for draw in draws:
            one, other = np.meshgrid(draw, draw)
            if (one != other).any():
                means.append(shares[one, other][one != other].mean())
        apart = ~np.eye(count, dtype=bool)
        found = sum(at[i][j] is not None for i, j in zip(*np.nonzero(apart), strict=True))
        result[name] = {
            "share_of_samples": round(float(shares[apart].mean()), 4),
            "interval": [round(float(value), 4) for value in np.quantile(means, [0.025, 0.975])],
            "reached": f"{found} of {count * (count - 1)}",
        }
    return result


def write(result: dict[str, Any], real: Mapping[str, Sequence[Seen]]) -> None:
    """Write the result and its picture."""
    place = Path(__file__).parent / "results"
    (place / "sweep_savings.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
    draw(real).savefig(place / "sweep_savings.png", dpi=110)
    print(json.dumps({name: result[name] for name in ("real", "replay")}, indent=1))


def draw(real: Mapping[str, Sequence[Seen]]) -> Any:
    """Draw the best figure so far against samples: each seed thin, their median thick."""
    figure, (axes,) = panels(1, 1, (9, 5))
    axes.set(title="Best value so far", xlabel="samples of all trials", ylabel="label NLL, nats")
    grid = np.linspace(SAMPLES / 2, RANDOM_TRIALS * SAMPLES, 400)
    for color, (name, paths) in zip(("0.35", "#1f77b4", "#d62728", "#2ca02c"), real.items(), strict=True):
        lines = np.array([best_so_far(path, grid) for path in paths])
        for line in lines:
            axes.plot(grid, line, color=color, alpha=0.2, linewidth=0.8)
        axes.plot(grid, np.median(lines, axis=0), color=color, linewidth=2.2, label=STRATEGIES[name]["title"])
    axes.legend(frameon=False)
    return figure


def best_so_far(path: Seen, grid: np.ndarray) -> np.ndarray:
    """Return the best figure at each number of samples; NaN before the first and after the last report."""
    at, values = np.array(path).T
    best = np.minimum.accumulate(values)
    index = np.searchsorted(at, grid, side="right") - 1
    return np.where((index < 0) | (grid > at[-1] + SAMPLES), np.nan, best[np.maximum(index, 0)])


if __name__ == "__main__":
    main()
