"""Find runs and models by what a person types: a name, a folder, a URI, or `pretrained:NAME`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mmdiff_ray.config import ConfigError
from mmdiff_ray.runs import folder as runs
from mmdiff_ray.sampling.export import PRETRAINED, export_files, need_export
from mmdiff_ray.storage.filesystem import is_uri, join, parent


def find_run(
    name: str, where: str = "runs", marked_by: str = runs.RUN, small: Sequence[str] = runs.SMALL
) -> Path:
    """Return the folder of a run, or a sweep, given by its name, its path or its URI; where: of all runs.

    Downloads the small files of one in storage. Raises ConfigError with the names that exist.
    """
    if is_uri(name):
        where, name = parent(name)
    if is_uri(where):
        known = runs.runs_in(where, marked_by)
        if name in known:
            return runs.open_run(join(where, name), small)
    else:
        for folder in (Path(name), Path(where) / name):
            if (folder / marked_by).is_file():
                origin = runs.address(folder.absolute())
                return runs.open_run(origin, small) if is_uri(origin) else folder.absolute()
        known = sorted(path.parent.name for path in Path(where).glob(f"*/{marked_by}"))
    kind, place = marked_by.removesuffix(".json"), where if is_uri(where) else f"{where}/"
    raise ConfigError(f"no {kind} {name!r} in {place}; there are: {', '.join(known) or 'none yet'}")


class Model(NamedTuple):
    """An exported model. where: the path or URI of its folder, or `pretrained:NAME`. name: for titles. run:
    the folder of its run on this machine, if it is a run's."""

    where: str
    name: str
    run: Path | None = None

    @property
    def samples_seen(self) -> int:
        """The samples that it was trained on."""
        config, _ = need_export(self.where)
        if config.suffix == ".json":
            return int(json.loads(config.read_text(encoding="utf8"))["samples_seen"])
        file = config.parent / "facts.json"
        return int(json.loads(file.read_text(encoding="utf8"))["progress"]["samples_seen"])


def find_model(name: str, where: str = "runs") -> Model:
    """Return the model of a run (its name, folder or URI), in the folder of a published one, or
    `pretrained:NAME`. Raises ConfigError."""
    if name.startswith(PRETRAINED):
        need_export(name)
        return Model(name, name.removeprefix(PRETRAINED))
    folder = Path(name).absolute()
    if not is_uri(name) and not (folder / runs.RUN).is_file() and export_files(folder) is not None:
        return Model(str(folder), folder.name)
    run = find_run(name, where)
    return Model(join(runs.address(run), "export"), run.name, run)
