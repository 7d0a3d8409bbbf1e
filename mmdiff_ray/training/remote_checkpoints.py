"""Checkpoints in storage: brought there while training goes on, and back to go on from.

In storage a checkpoint is `checkpoints/SAMPLES/` with the files of all workers in a folder of their own,
which has the mark of the saving as its name, and `state.json`, which lists them with their sizes. The first
worker writes that last, when every worker's files are there: a checkpoint is complete if and only if its
`state.json` is there and all that it lists has its size. No two savings have the same mark, so their files
are never mixed.
"""

import json
import logging
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mmdiff_ray.config import OutageError, RunError
from mmdiff_ray.storage.filesystem import filesystem, read_bytes, remove, sizes_under, write_bytes_atomic
from mmdiff_ray.storage.mirror import Mirror, download
from mmdiff_ray.storage.retry import OUTAGE_S, patiently
from mmdiff_ray.storage.upload import Errand
from mmdiff_ray.training.checkpoint import drop, files_of, read_state, worth_keeping, write_json, written
from mmdiff_ray.training.parallel import world

STILL_S = 30.0
"""At the end of a run, for how many seconds nothing may move before an upload is given up."""
SLICE_S = 5.0
FOLDER = "checkpoints"
STATE = "state.json"

_log = logging.getLogger(__name__)


class RemoteCheckpoints:
    """The checkpoints of a run in storage. Workers call its methods together.

    mirror: of the run's folder on this machine, which other workers may see or not. run: the run's id: what
    another run of the same name left does not count. keep_last, better: as of `CheckpointStore`. completed:
    called on the first worker, in a thread, for every checkpoint that is complete in storage. stored_only:
    whether what storage does not have does not count either: other machines may have gone on since it was
    written here, from an earlier state or from another run's.
    """

    def __init__(
        self,
        mirror: Mirror,
        run: str,
        keep_last: int,
        better: str = "min",
        completed: Callable[[], None] = lambda: None,
        stored_only: bool = False,
    ) -> None:
        self.mirror = mirror
        self.run = run
        self.keep_last = keep_last
        self.better = better
        self.completed = completed
        self.stored_only = stored_only
        self._group: Any = dist.new_group(backend="gloo") if world()[1] > 1 else None
        self._now: tuple[str, dict[str, Any]] | None = None
        self._next: tuple[str, dict[str, Any]] | None = None
        self._errands: list[Errand] = []
        self._there: dict[str, float | None] = {}

    @property
    def folder(self) -> Path:
        """Return where the checkpoints lie on this machine."""
        return self.mirror.folder / FOLDER

    @property
    def busy(self) -> bool:
        """Return whether a checkpoint is on its way."""
        return self._now is not None

    @property
    def held(self) -> set[str]:
        """Return the names of the checkpoints that must stay on this machine until they are in storage."""
        return {name for name, _ in filter(None, (self._now, self._next))}

    def mark(self) -> str:
        """Return a new name for the files of one saving, the same on all workers."""
        return self._of_first(secrets.token_hex(4))

    def is_first_here(self) -> bool:
        """Return whether this worker is the first of those that see the same folder on a disk."""
        rank, place = world()[0], self.folder / f".workers-{self.mark()}"
        place.mkdir(parents=True, exist_ok=True)
        (place / str(rank)).touch()
        self._barrier()
        first = min(int(path.name) for path in place.iterdir()) == rank
        self._barrier()
        if first:
            shutil.rmtree(place, ignore_errors=True)
        return first

    def files_everywhere(self, folder: Path, first_here: bool) -> dict[str, int]:
        """Return the files that lie in a folder on each worker's machine: name -> bytes."""
        found = (path for path in folder.rglob("*") if path.is_file()) if first_here else ()
        mine = {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}
        return {name: size for theirs in self._of_all(mine) for name, size in theirs.items()}

    def add(self, name: str, state: dict[str, Any]) -> None:
        """Bring a checkpoint to storage once the one on its way is there; meanwhile only the newest waits."""
        self._next = (name, state)
        if self._now is None:
            self._start()

    def sent(self) -> bool:
        """Return whether this worker's share of the checkpoint on its way is in storage."""
        return all(errand.done for errand in self._errands)

    def go_on(self) -> None:
        """Complete the checkpoint on its way, which every worker has sent, and begin with the next."""
        assert self._now is not None
        if world()[0] == 0:
            name, state = self._now
            self.mirror.uploader.add(_called(name), lambda _: self._complete(name, state), lane=FOLDER)
        self._now = None
        if self._next is not None:
            self._start()

    def close(self) -> list[str]:
        """Wait until all is in storage, as long as something moves; return what is not, on all workers
        alike."""
        begun, patience_s = time.monotonic(), self.mirror.uploader.patience(STILL_S)
        while self._now is not None:
            self.mirror.uploader.flush(STILL_S, SLICE_S)
            still_s = min(self.mirror.uploader.still_for(), time.monotonic() - begun)
            found = self._of_all((self.sent(), not self.sent() and still_s > patience_s))
            if all(sent for sent, _ in found):
                self.go_on()
            elif any(stuck for _, stuck in found):
                break
        left = self.mirror.uploader.flush(STILL_S) if self._now is None else []
        own = {_called(name) for name in self.held} | {name for name in left if name.startswith(_called(""))}
        return sorted(set().union(*self._of_all(own)))

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint of storage and of these machines, brought here, or None.

        One that storage does not have is brought there, also by several machines that have a part each.
        Storage's saving counts where these machines have another of the same samples.
        Raises OutageError on all workers where storage does not answer, unless all have one here.
        """
        mine = {path.name: read_state(path) for path in written(self.folder)}
        mine = {name: state for name, state in mine.items() if state.get("run") == self.run}
        states, seen = self._in_sight(mine)
        here = {
            name
            for name, files in seen.items()
            if all(theirs >= set(states[name]["files"]) for theirs in files)
        }
        joint = {name for name, files in seen.items() if set().union(*files) >= set(states[name]["files"])}
        if self.stored_only:
            joint = set()
        there = self._of_first(self._look(here & joint) if world()[0] == 0 else None)
        if isinstance(there, RunError):
            raise there
        newest = max(joint | there.keys(), default=None)
        if newest is None:
            return None
        if newest not in there:
            self.add(newest, states[newest])
        elif newest in here and states[newest]["mark"] != there[newest]["mark"]:
            here.remove(newest)
        if newest not in here:
            if newest not in there and (left := self.close()):
                raise RunError(
                    f"no machine has all of {', '.join(left)}, and {self.mirror.uri} does not take it"
                )
            self._fetch(newest, there.get(newest) or states[newest])
        return self.folder / newest

    def _in_sight(self, mine: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, list[set[str]]]]:
        """Return the states of the checkpoints that any worker has, and of each the files every worker has.

        mine: this worker's states by name. Of two savings at the same samples the first worker's counts.
        """
        states = {name: state for theirs in reversed(self._of_all(mine)) for name, state in theirs.items()}
        own = {name: files_of(self.folder / name, state) for name, state in states.items()}
        everyones = self._of_all(own)
        return states, {name: [theirs[name] for theirs in everyones] for name in states}

    def stored(self) -> dict[str, dict[str, Any]]:
        """Return the states of the complete checkpoints in storage by name. Raises OSError."""
        sizes, found = self.mirror.names(FOLDER), {}
        for name in sorted(file.partition("/")[0] for file in sizes if file.endswith(f"/{STATE}")):
            state = _stored_state(self.mirror, name)
            if state.get("run") == self.run and all(
                sizes.get(f"{name}/{file}") == size for file, size in state["files"].items()
            ):
                found[name] = state
        return found

    def _look(self, here: set[str]) -> dict[str, dict[str, Any]] | RunError:
        """Return what is in storage; where it does not answer, nothing if there is something here."""
        looking = f"look for checkpoints in {self.mirror.uri}"
        try:
            found = patiently(self.stored, looking, longest_s=STILL_S if here else None)
        except (OSError, OutageError) as error:
            if here:
                _log.warning("%s", error)
                return {}
            return error if isinstance(error, OutageError) else RunError(f"cannot {looking}: {error}")
        self._there = {name: state.get("metric") for name, state in found.items()}
        return found

    def _fetch(self, name: str, state: dict[str, Any]) -> None:
        """Bring a checkpoint here, once for all workers that see the same folder."""
        problem: RunError | None = None
        bringing = f"bring checkpoint {name} from {self.mirror.uri}"
        if self.is_first_here():
            try:
                patiently(lambda: self._download(name, state), bringing)
            except OutageError as error:
                problem = error
            except OSError as error:
                problem = RunError(f"cannot {bringing}: {error}")
        problems = [problem for problem in self._of_all(problem) if problem is not None]
        if problems:
            raise problems[0]

    def _download(self, name: str, state: dict[str, Any]) -> None:
        """Write the files that are not here yet, and the state last."""
        place = self.folder / name
        (place / STATE).unlink(missing_ok=True)
        for file, size in state["files"].items():
            if not (place / file).is_file() or (place / file).stat().st_size != size:
                download(self.mirror.fs, self.mirror.path(f"{FOLDER}/{name}/{file}"), place / file, size)
        write_json(place / STATE, state)

    def _start(self) -> None:
        """Begin to send the checkpoint that waits: each file by one of the workers that have it."""
        assert self._next is not None
        self._now, self._next = self._next, None
        name, state = self._now
        seen = self._of_all(files_of(self.folder / name, state))
        self._errands = []
        for number, file in enumerate(sorted(set().union(*seen))):
            having = [rank for rank, theirs in enumerate(seen) if file in theirs]
            if having[number % len(having)] == world()[0]:
                self._errands.append(self.mirror.send_file(f"{FOLDER}/{name}/{file}", _called(name)))

    def _complete(self, name: str, state: dict[str, Any]) -> None:
        write_bytes_atomic(
            self.mirror.fs, self.mirror.path(f"{FOLDER}/{name}/{STATE}"), json.dumps(state, indent=1).encode()
        )
        self._there[name] = state.get("metric")
        self.completed()
        try:
            self._drop_old()
        except OSError as error:  # the next one tries again
            _log.warning("old checkpoints stay in %s: %s", self.mirror.uri, error)

    def _drop_old(self) -> None:
        """Remove what need not be kept, and what was never completed before the newest."""
        kept = worth_keeping(self._there, self.keep_last, self.better)
        newest = max(self._there)
        for name in _names(self.mirror):
            if name < newest and name not in kept:
                _remove(self.mirror, name)
                self._there.pop(name, None)

    def _of_all(self, value: Any) -> list[Any]:
        if self._group is None:
            return [value]
        values: list[Any] = [None] * world()[1]
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _of_first(self, value: Any) -> Any:
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0, group=self._group)
        return values[0]

    def _barrier(self) -> None:
        if self._group is not None:
            dist.barrier(self._group)


def set_back(folder: Path, mirror: Mirror | None, samples: int) -> None:
    """Remove the checkpoints of a run that were written after so many samples, here and in storage.

    folder: the checkpoints' on this machine. Raises OutageError where storage does not answer.
    """
    for path in written(folder):
        if int(path.name) > samples:
            drop(path)
    if mirror is not None:
        patiently(lambda: _set_storage_back(mirror, samples), f"look for checkpoints in {mirror.uri}")


def _set_storage_back(mirror: Mirror, samples: int) -> None:
    for name in _names(mirror):
        if int(name) > samples:
            _remove(mirror, name)


def copy_checkpoint(source: str, donor: str, folder: Path, mirror: Mirror | None, run: str) -> bool:
    """Make another run's checkpoint the only one of a run; return False, and do nothing, where it is gone.

    source: where it lies, a path or a URI. donor: whose it must be, run: whose the copy is, as of
    `CheckpointStore`. folder: the run's checkpoints on this machine, mirror: of the run, to whose storage the
    copy is brought, too. Raises OutageError where storage does not answer.
    """
    fs, root = filesystem(source)
    name = root.rpartition("/")[2]
    partial = folder / f"{name}.partial"

    def bring() -> dict[str, Any]:
        state, there = json.loads(read_bytes(fs, f"{root}/{STATE}")), sizes_under(fs, root)
        files = state.get("files", there)
        if state.get("run", donor) != donor:
            raise FileNotFoundError(f"{source} is of {state['run']}")
        if any(there.get(file) != size for file, size in files.items()):
            raise FileNotFoundError(f"{source} is not whole")
        shutil.rmtree(partial, ignore_errors=True)
        for file in files.keys() - {STATE}:
            download(fs, f"{root}/{file}", partial / file, files[file])
        return state

    try:
        state = patiently(bring, f"copy {source}")
    except FileNotFoundError:
        shutil.rmtree(partial, ignore_errors=True)
        return False
    write_json(partial / STATE, {**state, "run": run})
    set_back(folder, mirror, -1)
    drop(folder / name)  # what is no checkpoint, but has its name
    partial.rename(folder / name)
    if mirror is not None:
        for file in (*sorted(files_of(folder / name, state)), STATE):
            mirror.send_file(f"{FOLDER}/{name}/{file}", _called(name))
        if left := mirror.uploader.flush(OUTAGE_S):
            raise OutageError(f"{mirror.uri} does not take {', '.join(left)}")
    return True


def _names(mirror: Mirror) -> list[str]:
    """Return the names of what storage has of checkpoints, complete or not. Raises OSError."""
    return sorted(filter(str.isdigit, {file.partition("/")[0] for file in mirror.names(FOLDER)}))


def _stored_state(mirror: Mirror, name: str) -> dict[str, Any]:
    """Return a checkpoint's state; an empty one where it is not whole JSON."""
    try:
        return json.loads(read_bytes(mirror.fs, mirror.path(f"{FOLDER}/{name}/{STATE}")))
    except (ValueError, FileNotFoundError):
        return {}


def _remove(mirror: Mirror, name: str) -> None:
    """Remove a checkpoint from storage; its state first: what is left of it is none."""
    remove(mirror.fs, mirror.path(f"{FOLDER}/{name}/{STATE}"))
    mirror.fs.delete_dir(mirror.path(f"{FOLDER}/{name}"))


def _called(name: str) -> str:
    return f"checkpoint {name}"
