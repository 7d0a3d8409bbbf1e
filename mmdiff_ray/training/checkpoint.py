"""Checkpoints: complete or absent, written while training goes on, kept by age and by merit.

A checkpoint is a folder named by samples_seen with PyTorch's distributed checkpoint in it (one file per
worker) and `state.json`: format version, progress, configuration, metric. It is written under a `.partial`
name and renamed when every worker is done, so a folder with its final name is complete.
"""

import json
import math
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from mmdiff_ray.config import CheckpointConfig, ConfigError
from mmdiff_ray.training.parallel import world

FORMAT_VERSION = 1
MIGRATIONS: dict[int, Any] = {}
"""version -> a function from the `state.json` of that version to the next one's."""


class CheckpointStore:
    """The checkpoints of one run in a folder that all workers see.

    Workers call its methods together. better: "min" or "max", which metric value counts as the best.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, better: str = "min") -> None:
        self.folder = folder
        self.keep_last = config.keep_last
        self.better = better
        self._pending: tuple[Future, int, dict[str, Any]] | None = None
        # Two groups of its own: the thread that writes sends messages while training, and this store in the
        # training thread, send theirs. In one group they would meet in another order on every worker.
        self._writer_group, self._group = _new_group(), _new_group()

    def save(self, trainer: Any, facts: dict[str, Any], metric: float | None = None) -> Path:
        """Begin to write the trainer's state; wait first for the one before. Return where it will be.

        facts: plain values for `state.json` (the configuration, versions).
        """
        self.wait()
        samples = trainer.progress.samples_seen
        partial = self.folder / f"{samples:012d}.partial"
        if world()[0] == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        if self._group is not None:
            dist.barrier(self._group)
        state = {
            "format_version": FORMAT_VERSION,
            "progress": vars(trainer.progress).copy(),
            "metric": metric,
            **facts,
        }
        future = _quietly(
            dcp.async_save,
            _tensors(trainer),
            checkpoint_id=str(partial),
            process_group=self._writer_group,
            no_dist=self._writer_group is None,
        )
        self._pending = (future, samples, state)
        return partial.with_suffix("")

    def wait(self) -> None:
        """Wait until the checkpoint begun last is complete, and drop those that need not be kept."""
        if self._pending is None:
            return
        future, samples, state = self._pending
        self._pending = None
        future.result()
        if world()[0] == 0:
            partial = self.folder / f"{samples:012d}.partial"
            write_json(partial / "state.json", state)
            final = partial.with_suffix("")
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            self._drop_old()
        if self._group is not None:
            dist.barrier(self._group)

    def poll(self) -> None:
        """Finish the checkpoint begun last if it is written on every worker (one small message between
        them)."""
        if self._pending is None:
            return
        done = torch.tensor(int(self._pending[0].done()))
        if self._group is not None:
            dist.all_reduce(done, dist.ReduceOp.MIN, group=self._group)
        if done:
            self.wait()

    def _drop_old(self) -> None:
        kept = complete(self.folder)
        best = self.best()
        for path in kept[: -self.keep_last] if self.keep_last else []:
            if path != best:
                shutil.rmtree(path, ignore_errors=True)

    def best(self) -> Path | None:
        """Return the complete checkpoint of the best metric, or None where none has one."""
        scored = [(read_state(path).get("metric"), path) for path in complete(self.folder)]
        scored = [(metric, path) for metric, path in scored if metric is not None and math.isfinite(metric)]
        pick = min if self.better == "min" else max
        return pick(scored)[1] if scored else None

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint, or None."""
        found = complete(self.folder)
        return found[-1] if found else None


def _new_group() -> Any:
    return dist.new_group(backend="gloo") if world()[1] > 1 else None


def restore(trainer: Any, path: Path) -> None:
    """Set a trainer to the state in a checkpoint; the number of workers may differ from when it was
    written."""
    tensors = _tensors(trainer)
    _quietly(dcp.load, tensors, checkpoint_id=str(path), no_dist=world()[1] == 1)
    set_state_dict(
        trainer.denoiser,
        trainer.optimizer,
        model_state_dict=tensors["model"],
        optim_state_dict=tensors["optimizer"],
    )
    trainer.ema.model.load_state_dict(tensors["ema"])
    trainer.go_on(type(trainer.progress)(**read_state(path)["progress"]))


def complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if path.name.isdigit() and (path / "state.json").is_file()
    )


def read_state(path: Path) -> dict[str, Any]:
    """Return a checkpoint's `state.json`, brought to the present format. Raises ConfigError if it is
    newer."""
    state = json.loads((path / "state.json").read_text(encoding="utf8"))
    version = state.get("format_version", 0)
    while version in MIGRATIONS:
        state = MIGRATIONS[version](state)
        version = state["format_version"]
    if version != FORMAT_VERSION:
        raise ConfigError(f"{path}: checkpoint format {version}, this version reads {FORMAT_VERSION}")
    return state


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1), encoding="utf8")
    partial.replace(path)


def _tensors(trainer: Any) -> dict[str, Any]:
    model, optimizer = get_state_dict(trainer.denoiser, trainer.optimizer)
    return {"model": model, "optimizer": optimizer, "ema": trainer.ema.model.state_dict()}


def _quietly(function: Any, *args: Any, **kwargs: Any) -> Any:
    # Said in a thread of its own, after this returns: only a lasting filter hears it.
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)
