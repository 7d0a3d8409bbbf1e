"""Raw files that lie in object storage: every machine that reads them copies them first."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmdiff_ray.config import ConfigError
from mmdiff_ray.storage.filesystem import (
    FileInfo,
    FileType,
    download,
    filesystem,
    is_inside,
    is_uri,
    list_files,
)
from mmdiff_ray.storage.mirror import cached
from mmdiff_ray.storage.retry import retry

AT_ONCE = 16


class RawFiles:
    """The files and folders that the options of a pipeline name. uris: those in storage."""

    def __init__(self) -> None:
        self.uris: list[str] = []
        self._here = True

    def __getstate__(self) -> dict[str, Any]:
        return {"uris": self.uris, "_here": False}

    def place(self, text: str) -> Path:
        """Return the path of a file or folder on this machine; what lies at a URI is copied into the cache.

        A copy is kept as long as names, sizes and times stay. Raises ConfigError where nothing is.
        """
        if not is_uri(text):
            return Path(text).expanduser().resolve()
        if text not in self.uris:
            self.uris.append(text)
        fs, root = filesystem(text)
        try:
            found = retry(lambda: _listed(fs, root), f"read {text}")
        except OSError as error:
            raise ConfigError(f"source: cannot read {text}: {error}") from None
        if not found:
            raise ConfigError(f"source: there is nothing at {text}")
        state = repr([(name, info.size, info.mtime_ns) for name, info in found.items()])
        place = cached(text)
        here = place.parent / hashlib.sha256(state.encode()).hexdigest()[:12] / place.name

        def copy(name: str) -> None:
            path = f"{root}/{name}" if name else root
            retry(lambda: download(fs, path, here / name), f"read {text}")

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(copy, [name for name in found if not (here / name).is_file()]))
        return here

    def copy_here(self) -> None:
        """Copy the files to this machine, once in a process that the pipeline was sent to."""
        if not self._here:
            for uri in self.uris:
                self.place(uri)
        self._here = True


def _listed(fs: Any, root: str) -> dict[str, FileInfo]:
    """Return the files in a folder, or of a file itself as "", by name."""
    info = fs.get_file_info(root)
    if info.type == FileType.File:
        return {"": info}
    return {name: one for name, one in list_files(fs, root).items() if is_inside(name)}
