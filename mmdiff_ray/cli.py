"""`mmdiff`: the one front door."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdiff_ray.arguments import make_parser
from mmdiff_ray.config import ConfigError, RunError
from mmdiff_ray.words import check, check_to_send, labels_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 well, 1 failed, 2 wrong input, 130 interrupted."""
    known = parse(arguments)
    try:
        if known.working_folder:
            _go_to(known.working_folder)
        check(known)
        return RUNS[known.run](known)
    except ConfigError as error:
        print(f"mmdiff: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"mmdiff: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mmdiff: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of a command; ends the program with 2 where they are none."""
    parser = make_parser()
    known, extra = parser.parse_known_args(arguments)
    known.extra = extra
    if hasattr(known, "overrides"):  # argparse gives up on positional words behind an option
        known.overrides += [word for word in extra if not word.startswith("-")]
        extra = [word for word in extra if word.startswith("-")]
    if extra and known.run != "data_build":
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if known.run in ("train", "sweep") and known.resume:
        _take_overrides(known)
    return known


def _take_overrides(known: argparse.Namespace) -> None:
    """Make all words of a command that goes on with something its overrides: it has no file to begin with."""
    file = "config" if known.run == "train" else "file"
    if (word := getattr(known, file)) is not None:
        known.overrides.insert(0, word)
        setattr(known, file, None)
    if known.run == "train":
        named = [word for word in known.overrides if word.startswith("runs=")]
        known.overrides = [word for word in known.overrides if word not in named]
        known.runs = named[-1].partition("=")[2] if named else known.runs


def _go_to(folder: str) -> None:
    try:
        os.chdir(folder)
    except OSError as error:
        raise ConfigError(f"-C: cannot work in {folder}: {error.strerror}") from None


def _data_build(given: argparse.Namespace) -> int:
    from pipelines.base import build
    from pipelines.options import pipeline_options

    options = pipeline_options([*given.options, *given.extra])
    labels = labels_of(given.label)
    built = build(given.pipeline, given.out, options, force=given.force, workers=given.workers, labels=labels)
    for key, reason in list(built.bad.items())[:10]:
        print(f"left out {key}: {reason}")
    for note in built.notes:
        print(note)
    splits = ", ".join(
        f"{split.rows:,} {name}"
        for name, split in built.manifest.splits.items()
        if split.rows or name != "test"
    )
    print(f"{given.out}: {splits} rows. Look at it: mmdiff data inspect {given.out}")
    return 0


def _data_inspect(given: argparse.Namespace) -> int:
    from pipelines.inspect import inspect

    inspect(given.uri, given.picture)
    return 0


def _data_embed(given: argparse.Namespace) -> int:
    from pipelines.embedders import write_embedding

    dim = write_embedding(given.embedder, given.value, given.out)
    print(f"{given.out}: {dim} numbers")
    return 0


def _train(given: argparse.Namespace) -> int:
    from mmdiff_ray import config as configuration
    from mmdiff_ray.distributed.commands import dry_run, train_and_evaluate
    from mmdiff_ray.distributed.job import begun

    if given.resume:
        return train_and_evaluate(None, given.resume, given.runs, given.overrides, given.new_mlflow_run)
    config = configuration.load([given.config], given.overrides, {"name": Path(given.config).stem})
    if given.go_on and (folder := begun(config)):
        return train_and_evaluate(None, str(folder), config.runs, given.overrides)
    return dry_run(config) if given.dry_run else train_and_evaluate(config, None, config.runs, [])


def _sample(given: argparse.Namespace) -> int:
    from mmdiff_ray.distributed.commands import sample

    return sample(given)


def _generate(given: argparse.Namespace) -> int:
    from mmdiff_ray.data.storage import join
    from mmdiff_ray.distributed.job import find_run
    from mmdiff_ray.distributed.runs import address
    from pipelines.base import build

    options = {
        "model": join(address(find_run(given.model, given.runs)), "export"),
        "given": ";".join(given.given),
        **{key: getattr(given, key) for key in ("num", "sampler", "steps", "guidance", "seed")},
        "likely": bool(given.likely),
    }
    built = build("samples", given.out, options, force=given.force, workers=given.workers)
    rows = sum(split.rows for split in built.manifest.splits.values())
    print(f"{given.out}: {rows:,} samples. Look at them: mmdiff data inspect {given.out}")
    return 0


def _evaluate(given: argparse.Namespace) -> int:
    from mmdiff_ray.distributed.commands import evaluate

    return evaluate(given.model, given.runs, given.overrides, given.workers)


def _experiment(given: argparse.Namespace) -> int:
    from mmdiff_ray.experiments.command import run
    from mmdiff_ray.experiments.spec import load_experiment

    experiment = load_experiment(given.name, given.preset)
    if not given.table:
        for data in experiment.data_sets():
            _build_missing(data)
    return run(experiment, Path(given.runs), given.out, given.table, given.cells)


def _build_missing(data: Mapping[str, Any]) -> None:
    """Build a data set that a file names by `pipeline`, `uri` and `options`, where it is not there."""
    if data and not (Path(data["uri"]) / "manifest.json").is_file():
        from pipelines.base import build

        options = {key: str(value) for key, value in data.get("options", {}).items()}
        build(data["pipeline"], data["uri"], options, workers=0)


def _sweep(given: argparse.Namespace) -> int:
    from mmdiff_ray.distributed.sweep_commands import dry_run, report, resume, sweep
    from mmdiff_ray.sweeps.spec import load_sweep

    if given.file == "report":
        return report(given.overrides[0], given.runs)
    if given.resume:
        return resume(given.resume, given.runs, given.overrides)
    spec = load_sweep(given.file, given.overrides)
    _build_missing(spec.data)
    return (dry_run if given.dry_run else sweep)(spec, given.file, given.overrides, given.runs)


def _submit(given: argparse.Namespace) -> int:
    from mmdiff_ray.distributed.display import make_console
    from mmdiff_ray.distributed.jobs import show_logs
    from mmdiff_ray.distributed.submit import submit

    words = given.words[1:] if given.words[:1] == ["--"] else given.words
    if not words:
        raise ConfigError("submit needs a command: mmdiff submit -- train pipelines/configs/demo.yaml")
    known = parse(words)
    check_to_send(known)
    console = make_console()
    job = submit(given, words, known, console)
    if given.follow:
        return show_logs(given.address, job, True, console)
    for action in ("logs --follow", "stop"):
        console.print(f"next      mmdiff jobs {action} {job}", soft_wrap=True)
    return 0


def _jobs(given: argparse.Namespace) -> int:
    from mmdiff_ray.distributed import jobs
    from mmdiff_ray.distributed.display import make_console

    console = make_console()
    if given.run == "jobs_list":
        return jobs.list_jobs(given.address, console)
    if given.run == "jobs_status":
        return jobs.show_job(given.address, given.job, console)
    if given.run == "jobs_logs":
        return jobs.show_logs(given.address, given.job, given.follow, console)
    return jobs.stop_job(given.address, given.job, not given.no_wait, console)


def _cluster_up(given: argparse.Namespace) -> int:
    from mmdiff_ray.distributed import local_cluster

    cluster = local_cluster.read()
    if cluster is not None and local_cluster.nodes(cluster) == 1 + cluster.workers:
        print("the cluster is already up")
    else:
        print("starting a head and workers; this takes half a minute ...", flush=True)
        cluster = local_cluster.up(given.workers, given.cpus)
        print("the cluster is up")
    print(local_cluster.describe(cluster))
    return 0


def _cluster_down(given: argparse.Namespace) -> int:
    from mmdiff_ray.distributed import local_cluster

    cluster = local_cluster.read()
    if cluster is not None and local_cluster.nodes(cluster):
        from mmdiff_ray.distributed.display import make_console
        from mmdiff_ray.distributed.jobs import stop_all

        stop_all(cluster, make_console())
    print("the cluster is down" if local_cluster.down() else "there is no cluster in this folder")
    return 0


def _cluster_status(given: argparse.Namespace) -> int:
    from mmdiff_ray.distributed import local_cluster

    cluster = local_cluster.read()
    if cluster is None:
        print("there is no cluster in this folder; start one: mmdiff cluster up")
        return 1
    wanted, found = 1 + cluster.workers, local_cluster.nodes(cluster)
    if found < wanted:
        print(f"{found} of {wanted} nodes answer; restart: mmdiff cluster down, mmdiff cluster up")
        return 1
    print(f"the cluster is up, with {found} nodes\n{local_cluster.describe(cluster)}")
    return 0


def _ui(given: argparse.Namespace) -> int:
    from mmdiff_ray.tracking.ui import serve

    return serve(given.runs, given.host, given.port)


def _sync(given: argparse.Namespace) -> int:
    if "://" in given.folder:
        from mmdiff_ray.distributed import records

        return records.sync(given.folder)
    from mmdiff_ray.tracking.sync import sync

    return sync(Path(given.folder))


def _doctor(given: argparse.Namespace) -> int:
    from mmdiff_ray.doctor import examine

    return examine(given.runs)


RUNS: dict[str, Callable[[argparse.Namespace], int]] = {
    "data_build": _data_build,
    "data_inspect": _data_inspect,
    "data_embed": _data_embed,
    "train": _train,
    "sample": _sample,
    "generate": _generate,
    "evaluate": _evaluate,
    "experiment": _experiment,
    "sweep": _sweep,
    "submit": _submit,
    "jobs_list": _jobs,
    "jobs_status": _jobs,
    "jobs_logs": _jobs,
    "jobs_stop": _jobs,
    "cluster_up": _cluster_up,
    "cluster_down": _cluster_down,
    "cluster_status": _cluster_status,
    "ui": _ui,
    "sync": _sync,
    "doctor": _doctor,
}
"""What runs each command (`run` of its parser)."""


if __name__ == "__main__":
    sys.exit(main())
