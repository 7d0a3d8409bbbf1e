"""Samples of a trained model as files: one picture of them all, and the data of every sample."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mmdiff_ray.config import ConfigError
from mmdiff_ray.evaluation.grids import Panel, grid, mosaic
from mmdiff_ray.evaluation.tiles import text_tile
from mmdiff_ray.modalities.image import to_png
from mmdiff_ray.sampling.generator import Generator, Samples


@dataclass(frozen=True)
class Gallery:
    """What was written. grid: the picture; files: how many data files lie in `folder`."""

    folder: Path
    grid: Path
    files: int
    samples: Samples


def parse_given(model: Generator, given: list[str], hole: str | None = None) -> dict[str, np.ndarray]:
    """Return instance -> one row's data from `instance=value` texts. Raises ConfigError for an unknown
    instance or a value that is none. hole: a picture whose white part is missing from the one masked image
    that is given."""
    rows = {}
    for text in given:
        name, value = split_given(text)
        name = model.instance(name)
        modality = model.modality(name)
        rows[name] = modality.parse(f"{value},{hole}" if hole and modality.only_given else value)
    if hole and not any(model.modality(name).only_given for name in rows):
        raise ConfigError("--hole goes with a masked image: --given masked=picture.png --hole hole.png")
    return rows


def split_given(text: str) -> tuple[str, str]:
    """Return the instance and the value of an `instance=value` text. Raises ConfigError for another form."""
    name, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(
            f"--given {text!r} must read instance=value, for example --given label='Food & Drink'"
        )
    return name, value


def write_gallery(
    model: Generator,
    given: Mapping[str, np.ndarray],
    num: int,
    out: Path,
    *,
    steps: int | None = None,
    sampler: str | None = None,
    guidance: float = 1.0,
    seed: int = 0,
    likely: bool | None = None,
) -> Gallery:
    """Draw samples and write `grid.png`, one file per sample and instance, and `samples.json` into a folder.

    Given instances are written once, as they were read. Raises ConfigError if the folder holds anything, or
    cannot be made.
    """
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"--out {out} is a folder with files in it; name a new one")
    likely = model.is_likely(list(given)) if likely is None else likely
    samples = model.draw(
        given, num, steps=steps, sampler=sampler, guidance=guidance, seed=seed, likely=likely
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made: {error.strerror}") from None
    names = [*given, *[name for name in samples.data if name not in given]]
    files = {}
    for name in names:
        rows = samples.data[name].cpu()
        modality = model.denoiser.modalities[name]
        if name in given:
            files[name] = [modality.write(rows[0], out / f"given_{name}").name]
        else:
            files[name] = [
                modality.write(row, out / f"{index:04d}_{name}").name for index, row in enumerate(rows)
            ]
    facts = {
        "given": {name: files[name][0] for name in given},
        "generated": {name: files[name] for name in names if name not in given},
        "agreement_of_answer_and_code": samples.agreement,
        "settings": {
            "num": num,
            "steps": steps,
            "sampler": sampler,
            "guidance": guidance,
            "seed": seed,
            "readout": "likely" if likely else "sample",
        },
    }
    (out / "grid.png").write_bytes(to_png(picture(model, samples, list(given), num)))
    (out / "samples.json").write_text(json.dumps(facts, indent=1), encoding="utf8")
    return Gallery(out, out / "grid.png", sum(len(paths) for paths in files.values()), samples)


def free_folder(out: Path, taken: Collection[str] = ()) -> Path:
    """Return a folder's path, or the next one with a number that is not there, nor its name taken."""
    numbered = (out.with_name(f"{out.name}-{number}") for number in range(2, 100_000))
    return next(path for path in (out, *numbered) if not path.exists() and path.name not in taken)


def picture(model: Generator, samples: Samples, given: list[str], num: int) -> Image.Image:
    """Return the samples as one grid: what was given first, then every generated modality side by side."""
    panels = []
    for name in [*given, *[name for name in samples.data if name not in given]]:
        shown = model.denoiser.modalities[name].picture(samples.data[name].cpu())
        tiles = np.stack([text_tile(text) for text in shown]) if isinstance(shown, list) else shown
        panels.append(Panel(name, tiles, "given" if name in given else "generated"))
    if len(panels) == 1:
        return mosaic(panels[0])
    title = f"given {', '.join(given)}" if given else "joint samples"
    return grid(panels, title=title, blocks=2 if num > 8 else 1)
