"""Read checkpoint files without running code that they may contain.

PyTorch's distributed checkpoint unpickles `.metadata` and all values that are not tensors, which can run
arbitrary code. This reader allows only the classes of the checkpoint format.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from mmdiff_ray.config import RunError, decoding
from mmdiff_ray.storage.filesystem import is_inside

METADATA = ".metadata"
_DCP = "torch.distributed.checkpoint"
_ALLOWED = {
    f"{_DCP}.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "TensorStorageMetadata"),
        *("TensorProperties", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    f"{_DCP}.filesystem": {"_StorageInfo"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
}


def load_files(tensors: dict[str, Any], files: Path, no_dist: bool) -> None:
    """Load a checkpoint's tensors in place. Raises RunError for files that are damaged or contain code."""
    try:
        load(tensors, storage_reader=_Reader(files), planner=_Planner(), no_dist=no_dist)
    except CheckpointException as error:  # a BaseException
        first, _ = next(iter(error.failures.values()))
        raise _unfit(files, first) from None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it contains {module}.{name}, which checkpoints never use")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """Reads `.metadata` in the constructor: PyTorch reports later errors as a missing file."""

    def __init__(self, files: Path) -> None:
        super().__init__(str(files))
        try:
            with decoding(), (files / METADATA).open("rb") as stream:
                self._metadata = _Unpickler(stream).load()
                if not isinstance(self._metadata, Metadata):
                    raise ValueError(f"{METADATA} holds a {type(self._metadata).__name__}")
                places = {str(one.relative_path) for one in self._metadata.storage_data.values()}
                if outside := [place for place in places if not is_inside(place)]:
                    raise ValueError(f"{METADATA} names {outside[0]!r}, which is not in the checkpoint")
        except (OSError, ValueError) as error:
            raise _unfit(files, error) from None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata.storage_meta is None:
            self._metadata.storage_meta = StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


class _Planner(DefaultLoadPlanner):
    """Loads non-tensor values through the weights-only unpickler."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        clean = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), clean)
        clean.seek(0)
        super().load_bytes(read_item, clean)


def _unfit(files: Path, error: BaseException) -> RunError:
    reason = str(error).partition("\n")[0] or type(error).__name__
    return RunError(f"cannot load the checkpoint {files}: {reason}; remove it to resume from an earlier one")
