"""Atomic checkpoints, written asynchronously; the newest ones and the best one are kept.

A checkpoint is a folder named by samples_seen. It has PyTorch's distributed checkpoint, with one file per
worker, and `state.json`: format version, progress, configuration, metric. It is written under a `.partial`
name, renamed when every worker has finished, and renamed again before removal, so a folder with a final name
is complete. For a run in storage (see `remote`), the files are in a subfolder named by the state's `mark`,
and `files` lists them. PyTorch's checkpoint module takes a second to import, so it is imported on first use.
"""

import copy
import json
import math
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mmdiff_ray.config import CheckpointConfig, ConfigError
from mmdiff_ray.training.parallel import world

if TYPE_CHECKING:
    from mmdiff_ray.training.remote_checkpoints import RemoteCheckpoints

FORMAT_VERSION = 1
MIGRATIONS: dict[int, Any] = {}
"""version -> function that converts the `state.json` of that version to the next version."""


class CheckpointStore:
    """The checkpoints of one run, in a shared folder, or in local folders plus storage.

    All methods are collective: every worker must call them. The best checkpoint has the lowest metric.
    run: the run's id. Checkpoints of other runs in the folder are ignored; "" accepts all.
    remote: the run's checkpoints in storage. With it, each machine may have its own folder.
    completed: without `remote`, called on the first worker for every complete checkpoint.
    unsent: after `close`, the checkpoints that did not reach storage.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        run: str = "",
        remote: "RemoteCheckpoints | None" = None,
        completed: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self.keep_last = config.keep_last
        self.run = remote.run if remote is not None else run
        self.remote = remote
        self.completed = completed
        self.unsent: list[str] = []
        self._pending: tuple[Future[Any], int, dict[str, Any]] | None = None
        # The writer thread and the training thread communicate at the same time. In one process group, the
        # order of their messages could differ between workers, so each thread has its own group.
        self._writer_group, self._group = _new_group(), _new_group()

    def save(self, trainer: Any, facts: dict[str, Any], metric: float | None = None) -> Path:
        """Start to write the trainer's state and return its path. Waits for the previous checkpoint first.

        metric: by which the best checkpoint is chosen, the lower the better. facts: plain values for
        `state.json` (the configuration, versions).
        """
        from torch.distributed.checkpoint import async_save

        self.wait()
        samples = trainer.progress.samples_seen
        partial = self.folder / f"{samples:012d}.partial"
        mark = self.remote.mark() if self.remote is not None else ""
        if self._first_here:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        if self._group is not None:
            dist.barrier(self._group)
        state = {
            "format_version": FORMAT_VERSION,
            "progress": vars(trainer.progress).copy(),
            "metric": metric,
            "figure": trainer.config.evaluate.best,
            "run": self.run,
            **facts,
        }
        if self.remote is not None:
            state["mark"] = mark
        future = quietly(
            async_save,
            _tensors(trainer),
            checkpoint_id=str(partial / mark),
            process_group=self._writer_group,
            no_dist=self._writer_group is None,
        )
        self._pending = (future, samples, state)
        return partial.with_suffix("")

    def wait(self) -> None:
        """Wait until the last checkpoint is complete, then remove old ones."""
        if self._pending is None:
            return
        future, samples, state = self._pending
        self._pending = None
        future.result()
        partial = self.folder / f"{samples:012d}.partial"
        if self.remote is not None:
            state["files"] = self.remote.files_everywhere(partial, self._first_here)
        if self._first_here:
            write_json(partial / "state.json", state)
            final = partial.with_suffix("")
            drop(final)
            partial.rename(final)
            self._drop_old()
        if self._group is not None:
            dist.barrier(self._group)
        if self.remote is not None:
            self.remote.add(partial.with_suffix("").name, state)
        elif self._first_here:
            self.completed()

    def poll(self) -> None:
        """Complete the last checkpoint if all workers have written it, and its upload if that has finished.

        Does not block, apart from one small message between workers.
        """
        remote = self.remote if self.remote is not None and self.remote.held else None
        if self._pending is None and remote is None:
            return
        written = self._pending is not None and self._pending[0].done()
        done = torch.tensor([int(written), int(remote is not None and remote.sent())])
        if self._group is not None:
            dist.all_reduce(done, dist.ReduceOp.MIN, group=self._group)
        if done[0]:
            self.wait()
        if done[1] and remote is not None:
            remote.complete()

    def close(self) -> None:
        """Wait until the last checkpoint is complete, and uploaded if storage is available."""
        self.wait()
        if self.remote is not None:
            self.unsent = self.remote.close()

    @cached_property
    def _first_here(self) -> bool:
        return self.remote.is_first_here() if self.remote is not None else world()[0] == 0

    def _drop_old(self) -> None:
        states = {path: read_state(path) for path in written(self.folder)}
        kept = worth_keeping({path.name: state for path, state in states.items()}, self.keep_last)
        held = self.remote.held if self.remote is not None else set()
        for path in states:
            if path.name not in kept | held:
                drop(path)

    def best(self) -> Path | None:
        """Return the complete checkpoint with the best metric, or None if none has a metric."""
        name = best_of({path.name: read_state(path) for path in complete(self.folder)})
        return None if name is None else self.folder / name

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint, or None. Downloads it from storage if necessary."""
        if self.remote is not None:
            return self.remote.latest()
        found = complete(self.folder)
        if self.run:
            found = [path for path in found if read_state(path).get("run", self.run) == self.run]
        return found[-1] if found else None


def _new_group() -> Any:
    return dist.new_group(backend="gloo") if world()[1] > 1 else None


def restore(trainer: Any, path: Path) -> None:
    """Load a checkpoint into a trainer. The number of workers may differ from when it was saved.

    Restores the optimizer's moments; its settings (weight decay, betas) stay the trainer's. Raises RunError
    for files that are damaged or contain code.
    """
    from torch.distributed.checkpoint.state_dict import set_state_dict

    from mmdiff_ray.training.checkpoint_reader import load_files

    tensors = _tensors(trainer)
    groups = copy.deepcopy(tensors["optimizer"]["param_groups"])
    files = path / read_state(path).get("mark", "")
    quietly(load_files, tensors, files, no_dist=world()[1] == 1)
    tensors["optimizer"]["param_groups"] = groups  # keep the settings of the current config
    set_state_dict(
        trainer.denoiser,
        trainer.optimizer,
        model_state_dict=tensors["model"],
        optim_state_dict=tensors["optimizer"],
    )
    trainer.ema.model.load_state_dict(tensors["ema"])
    trainer.resume_from(type(trainer.progress)(**read_state(path)["progress"]))


def complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first."""
    return [path for path in written(folder) if _has_all(path)]


def written(folder: Path) -> list[Path]:
    """Return the checkpoints whose local files are all in the folder, oldest first.

    On several machines, each has only the files of its own workers.
    """
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if path.name.isdigit() and (path / "state.json").is_file()
    )


def drop(path: Path) -> None:
    """Remove a checkpoint if it exists. An interrupted removal leaves no complete checkpoint."""
    gone = path.with_suffix(".dropped")
    shutil.rmtree(gone, ignore_errors=True)
    if path.exists():
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _has_all(path: Path) -> bool:
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf8"))
    except FileNotFoundError:  # removed in the meantime
        return False
    return len(files_of(path, state)) == len(state.get("files", {}))


def files_of(path: Path, state: Mapping[str, Any]) -> set[str]:
    """Return the files that the state lists and that exist with their full size."""
    return {name for name, size in state.get("files", {}).items() if _size(path / name) == size}


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return None


def worth_keeping(states: Mapping[str, Mapping[str, Any]], keep_last: int) -> set[str]:
    """Return the names of the checkpoints to keep: the last ones and the best. states: name -> state."""
    return {*sorted(states)[-keep_last:], *filter(None, [best_of(states)])}


def best_of(states: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the name of the checkpoint with the lowest metric, or None if none has a metric.

    Ignores metrics of another figure (`evaluate.best`) than that of the newest checkpoint.
    """
    figure = states[max(states)].get("figure") if states else None
    scored = [
        (state["metric"], name)
        for name, state in states.items()
        if state.get("figure") == figure
        and state.get("metric") is not None
        and math.isfinite(state["metric"])
    ]
    return min(scored)[1] if scored else None


def read_state(path: Path) -> dict[str, Any]:
    """Return a checkpoint's `state.json`, migrated to the current format. ConfigError if it is newer."""
    state = json.loads((path / "state.json").read_text(encoding="utf8"))
    version = state.get("format_version", 0)
    while version in MIGRATIONS:
        state = MIGRATIONS[version](state)
        version = state["format_version"]
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{path}: checkpoint format {version}, but this release reads {FORMAT_VERSION}; update it"
        )
    return state


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1), encoding="utf8")
    partial.replace(path)


def _tensors(trainer: Any) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = get_state_dict(trainer.denoiser, trainer.optimizer)
    return {"model": model, "optimizer": optimizer, "ema": trainer.ema.model.state_dict()}


def quietly(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function of PyTorch's distributed checkpoint without its warnings about a single process."""
    # The warning comes from another thread after this returns, so a temporary filter would miss it.
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)
