"""Checkpoints in storage: uploaded while training continues, fetched to resume on another machine.

In storage, a checkpoint is the folder `checkpoints/SAMPLES/`. It has `state.json`, and a subfolder named by
the save's `mark` with the files of all workers. The first worker writes `state.json`, which lists all files
with their sizes, after every worker has uploaded its files. A checkpoint is complete if and only if
`state.json` exists and all listed files have their size. Each save has a unique mark, so the files of two
saves never mix.
"""

import functools
import json
import logging
import secrets
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mmdiff_ray.config import OutageError, RunError
from mmdiff_ray.storage.filesystem import (
    download,
    filesystem,
    folders_in,
    list_files,
    read_bytes,
    remove,
    write_atomic,
)
from mmdiff_ray.storage.mirror import Mirror
from mmdiff_ray.storage.retry import OUTAGE_S, retry
from mmdiff_ray.storage.upload import STALL_S, Upload
from mmdiff_ray.training.checkpoint import drop, files_of, read_state, worth_keeping, write_json, written
from mmdiff_ray.training.parallel import world

FOLDER = "checkpoints"
STATE = "state.json"

_log = logging.getLogger(__name__)


class RemoteCheckpoints:
    """The checkpoints of a run in storage. All methods are collective.

    mirror: of the run's folder on this machine, which may be shared between machines.
    run: the run's id; checkpoints of another run with the same name are ignored.
    keep_last: as in `CheckpointStore`.
    completed: called in a thread of the first worker for every checkpoint that is complete in storage.
    stored_only: ignore checkpoints that are only on disk, since other machines may have resumed from an
    earlier one.
    """

    def __init__(
        self,
        mirror: Mirror,
        run: str,
        keep_last: int,
        completed: Callable[[], None] = lambda: None,
        stored_only: bool = False,
    ) -> None:
        self.mirror = mirror
        self.folder = mirror.folder / FOLDER
        self.run = run
        self.keep_last = keep_last
        self.completed = completed
        self.stored_only = stored_only
        # In `close`, all workers wait for the slowest upload.
        self._group: Any = (
            dist.new_group(backend="gloo", timeout=timedelta(days=1)) if world()[1] > 1 else None
        )
        self._queue: list[tuple[str, dict[str, Any]]] = []  # the one being uploaded, then the newest
        self._uploads: list[Upload] = []  # of this worker: the completion before, and files of the first

    @property
    def held(self) -> set[str]:
        """Names of the checkpoints that must stay on disk until they are in storage."""
        return {name for name, _ in self._queue}

    def mark(self) -> str:
        """Return a new name for the files of one save, the same on all workers."""
        return self._gather(secrets.token_hex(4))[0]

    def is_first_here(self) -> bool:
        """Return whether this worker has the lowest rank of all that share its local folder."""
        rank, place = world()[0], self.folder / f".workers-{self.mark()}"
        place.mkdir(parents=True, exist_ok=True)
        (place / str(rank)).touch()
        self._gather(None)  # wait until all workers have written their file
        is_first = min(int(path.name) for path in place.iterdir()) == rank
        self._gather(None)
        if is_first:
            shutil.rmtree(place, ignore_errors=True)
        return is_first

    def files_everywhere(self, folder: Path, first_here: bool) -> dict[str, int]:
        """Return name -> bytes for the files in the folder, over all workers' machines."""
        found = (path for path in folder.rglob("*") if path.is_file()) if first_here else ()
        own = {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}
        return {name: size for theirs in self._gather(own) for name, size in theirs.items()}

    def add(self, name: str, state: dict[str, Any]) -> None:
        """Queue a checkpoint for upload. It replaces a checkpoint that is still waiting."""
        self._queue[1:] = [(name, state)]
        if len(self._queue) == 1:
            self._upload()

    def _upload(self) -> None:
        """Start to upload the first checkpoint of the queue. One worker per file uploads it."""
        name, state = self._queue[0]
        seen = self._gather(files_of(self.folder / name, state))
        for number, file in enumerate(sorted(set().union(*seen))):
            ranks = [rank for rank, theirs in enumerate(seen) if file in theirs]
            if ranks[number % len(ranks)] == world()[0]:
                self._uploads.append(self.mirror.send_file(f"{FOLDER}/{name}/{file}", _label(name)))

    def sent(self) -> bool:
        """Return whether this worker has finished its part of the current upload."""
        return all(upload.done for upload in self._uploads)

    def complete(self) -> None:
        """Complete the checkpoint that all workers have uploaded, and start the next upload."""
        name, state = self._queue.pop(0)
        self._uploads = []
        if world()[0] == 0:
            action = functools.partial(self._complete, name, state)
            self._uploads.append(self.mirror.uploads.add(_label(name), action, lane=FOLDER))
        if self._queue:
            self._upload()

    def _complete(self, name: str, state: dict[str, Any]) -> None:
        """Write a checkpoint's state, then remove old and incomplete checkpoints."""
        data = json.dumps(state, indent=1).encode()
        write_atomic(self.mirror.fs, self.mirror.path(f"{FOLDER}/{name}/{STATE}"), data)
        self.completed()
        try:
            kept = worth_keeping(self.stored(), self.keep_last)
            _remove(self.mirror, lambda old: old < name and old not in kept)
        except OSError as error:  # the next checkpoint retries
            _log.warning("cannot remove old checkpoints in %s: %s", self.mirror.uri, error)

    def close(self) -> list[str]:
        """Wait for all uploads while they make progress; return the checkpoints that are not in storage."""
        while self._queue:
            self.mirror.uploads.flush(uploads=self._uploads)
            if not all(self._gather(self.sent())):
                break
            self.complete()
        else:
            self.mirror.uploads.flush(uploads=self._uploads)
        left = {_label(name) for name in self.held} | {u.name for u in self._uploads if not u.done}
        return sorted(set().union(*self._gather(left)))

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint in storage or on the workers' disks, or None.

        Downloads it if necessary. If only the disks have it, uploads it first, even if each machine has just
        a part. If storage has another save at the same samples, that one wins. Raises RunError on all
        workers; OutageError if storage is unavailable, unless all workers have a checkpoint.
        """
        local = {path.name: read_state(path) for path in written(self.folder)}
        local = {name: state for name, state in local.items() if state.get("run") == self.run}
        # Of two saves at the same samples, the first worker's wins.
        states = {name: state for theirs in reversed(self._gather(local)) for name, state in theirs.items()}
        seen = self._gather({name: files_of(self.folder / name, state) for name, state in states.items()})
        joint, everywhere = set(), set()
        for name, state in states.items() if not self.stored_only else ():
            files = set(state["files"])
            joint |= {name} if set().union(*(theirs[name] for theirs in seen)) >= files else set()
            everywhere |= {name} if all(theirs[name] >= files for theirs in seen) else set()
        stored = self._gather(self._stored_or_error(bool(everywhere)) if world()[0] == 0 else None)[0]
        if isinstance(stored, RunError):
            raise stored
        newest = max(joint | stored.keys(), default=None)
        if newest is None:
            return None
        if newest not in stored:
            if newest not in self.held:
                self.add(newest, states[newest])
            if newest not in everywhere and self.close():
                raise RunError(
                    f"no machine has all of {_label(newest)}, and the upload to {self.mirror.uri} failed"
                )
        state, root = stored.get(newest) or states[newest], self.mirror.path(f"{FOLDER}/{newest}")
        fetch = functools.partial(download_files, self.mirror.fs, root, self.folder / newest, state)
        what = f"fetch checkpoint {newest} from {self.mirror.uri}"
        for error in filter(None, self._gather(_attempt(fetch, what) if self.is_first_here() else None)):
            raise error
        return self.folder / newest

    def stored(self) -> dict[str, dict[str, Any]]:
        """Return name -> state of the complete checkpoints in storage. Raises OSError."""
        fs, path = self.mirror.fs, self.mirror.path
        found = {name: _read_complete(fs, path(f"{FOLDER}/{name}"), self.run) for name in _names(self.mirror)}
        return {name: state for name, state in found.items() if state is not None}

    def _stored_or_error(self, has_local: bool) -> dict[str, dict[str, Any]] | RunError:
        """Return `stored()`. If storage is unavailable: {} with a local checkpoint, else the error."""
        what = f"look for checkpoints in {self.mirror.uri}"
        found = _attempt(self.stored, what, STALL_S if has_local else None)
        if isinstance(found, RunError) and has_local:
            _log.warning("%s", found)
            return {}
        return found

    def _gather(self, value: Any) -> list[Any]:
        values = [value] * world()[1]
        if self._group is not None:
            dist.all_gather_object(values, value, group=self._group)
        return values


def roll_back(folder: Path, mirror: Mirror | None, samples: int) -> None:
    """Remove the checkpoints of a run after `samples`, on this machine and in storage.

    folder: the checkpoints on this machine. Raises OutageError if storage is unavailable.
    """
    for path in written(folder):
        if int(path.name) > samples:
            drop(path)
    if mirror is not None:
        roll_back_storage = functools.partial(_remove, mirror, lambda name: int(name) > samples)
        retry(roll_back_storage, f"look for checkpoints in {mirror.uri}")


def copy_checkpoint(source: str, donor: str, folder: Path, mirror: Mirror | None, run: str) -> bool:
    """Replace all checkpoints of a run with one checkpoint of another run.

    Returns False and changes nothing if that checkpoint no longer exists. Raises OutageError if storage is
    unavailable.
    source: path or URI of the checkpoint. donor: id of the run that it belongs to. run: id of the run that
    gets the copy; folder: its checkpoints on this machine; mirror: its mirror if it is in storage.
    """
    fs, root = filesystem(source)
    name = root.rpartition("/")[2]
    partial = folder / f"{name}.partial"

    def fetch() -> dict[str, Any]:
        shutil.rmtree(partial, ignore_errors=True)
        if (state := _read_complete(fs, root, donor)) is None:
            raise FileNotFoundError(source)
        download_files(fs, root, partial, state := {**state, "run": run})
        return state

    try:
        state = retry(fetch, f"copy {source}")
    except FileNotFoundError:
        shutil.rmtree(partial, ignore_errors=True)
        return False
    roll_back(folder, mirror, -1)
    drop(folder / name)  # an incomplete checkpoint may have this name
    partial.rename(folder / name)
    if mirror is not None:
        for file in (*sorted(state["files"]), STATE):
            mirror.send_file(f"{FOLDER}/{name}/{file}", _label(name))
        if left := mirror.uploads.flush(OUTAGE_S):
            raise OutageError(f"cannot upload {', '.join(left)} to {mirror.uri}")
    return True


def _attempt(action: Callable[[], Any], what: str, timeout_s: float | None = None) -> Any:
    """Run an action on storage with `retry`; return its result, or its error as a RunError."""
    try:
        return retry(action, what, timeout_s=timeout_s)
    except (OutageError, OSError) as error:
        return error if isinstance(error, RunError) else RunError(f"cannot {what}: {error}")


def _names(mirror: Mirror) -> list[str]:
    """Return the names of the checkpoints in storage, complete or not. Raises OSError."""
    return list(filter(str.isdigit, folders_in(mirror.fs, mirror.path(FOLDER))))


def _read_complete(fs: Any, root: str, run: str) -> dict[str, Any] | None:
    """Return the state of a checkpoint, or None if it is incomplete or of another run. Raises OSError."""
    try:
        state = json.loads(read_bytes(fs, f"{root}/{STATE}"))
    except (ValueError, FileNotFoundError):
        return None
    sizes = {file: info.size for file, info in list_files(fs, root).items() if file != STATE}
    files = state.setdefault("files", sizes)  # runs in local folders do not list files
    is_complete = all(sizes.get(file) == size for file, size in files.items())
    return state if is_complete and state.get("run", run) == run else None


def download_files(fs: Any, root: str, place: Path, state: dict[str, Any]) -> None:
    """Download the missing files of a checkpoint, and its state last, which marks it as complete."""
    missing = state["files"].keys() - files_of(place, state)
    if missing:
        (place / STATE).unlink(missing_ok=True)
    for file in sorted(missing):
        download(fs, f"{root}/{file}", place / file, state["files"][file])
    write_json(place / STATE, state)


def _remove(mirror: Mirror, is_old: Callable[[str], bool]) -> None:
    """Remove checkpoints from storage, the state first: an interrupted removal leaves none complete."""
    for name in filter(is_old, _names(mirror)):
        remove(mirror.fs, mirror.path(f"{FOLDER}/{name}/{STATE}"))
        mirror.fs.delete_dir(mirror.path(f"{FOLDER}/{name}"))


def _label(name: str) -> str:
    return f"checkpoint {name}"
