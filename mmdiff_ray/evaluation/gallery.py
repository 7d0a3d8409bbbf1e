"""Samples of a trained model as files: one picture of all samples, and the data of each sample."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmdiff_ray.config import ConfigError
from mmdiff_ray.evaluation.grids import Panel, grid, mosaic
from mmdiff_ray.modalities.image import to_png
from mmdiff_ray.sampling.generator import Generator, Samples


@dataclass(frozen=True)
class Gallery:
    """The written files. grid: the picture; files: number of data files in `folder`."""

    folder: Path
    grid: Path
    files: int
    samples: Samples


def parse_given(model: Generator, given: list[str], hole: str | None = None) -> dict[str, np.ndarray]:
    """Return instance -> one row's data from `instance=value` texts.

    hole: an image that is white in the hole of the given masked image. Raises ConfigError for an unknown
    instance or a value that cannot be parsed.
    """
    rows = {}
    for text in given:
        name, value = split_given(text)
        name = model.instance(name)
        modality = model.modality(name)
        rows[name] = modality.parse(f"{value},{hole}" if hole and modality.only_given else value)
    if hole and not any(model.modality(name).only_given for name in rows):
        raise ConfigError("--hole needs a masked image: --given masked=picture.png --hole hole.png")
    return rows


def split_given(text: str) -> tuple[str, str]:
    """Split an `instance=value` text. Raises ConfigError for another form."""
    name, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"--given {text!r} must be instance=value, as in --given label='Food & Drink'")
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

    Given instances are written once. Raises ConfigError if the folder is not empty or cannot be created.
    """
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"--out {out} is not empty; use a new folder")
    likely = model.is_likely(list(given)) if likely is None else likely
    settings: dict[str, Any] = {"steps": steps, "sampler": sampler, "guidance": guidance, "seed": seed}
    samples = model.draw(given, num, **settings, likely=likely)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be created: {error.strerror}") from None
    sources, generated = {}, {}
    for name in [*given, *[name for name in samples.data if name not in given]]:
        rows, modality = samples.data[name].cpu(), model.denoiser.modalities[name]
        if name in given:
            sources[name] = modality.write(rows[0], out / f"given_{name}").name
        else:
            files = [modality.write(row, out / f"{index:04d}_{name}") for index, row in enumerate(rows)]
            generated[name] = [file.name for file in files]
    facts = {
        "given": sources,
        "generated": generated,
        "agreement_of_answer_and_code": samples.agreement,
        "settings": {"num": num, **settings, "readout": "likely" if likely else "sample"},
    }
    (out / "grid.png").write_bytes(to_png(picture(model, samples, list(given), num)))
    (out / "samples.json").write_text(json.dumps(facts, indent=1), encoding="utf8")
    count = len(sources) + sum(len(files) for files in generated.values())
    return Gallery(out, out / "grid.png", count, samples)


def free_folder(out: Path, taken: Collection[str] = ()) -> Path:
    """Return the first of `out`, `out-2`, `out-3`, ... that does not exist and is not in `taken`."""
    numbered = (out.with_name(f"{out.name}-{number}") for number in range(2, 100_000))
    return next(path for path in (out, *numbered) if not path.exists() and path.name not in taken)


def picture(model: Generator, samples: Samples, given: list[str], num: int) -> Image.Image:
    """Return the samples as one grid: given instances first, then every generated one."""
    panels = [
        Panel.of(
            model.denoiser.modalities[name],
            name,
            samples.data[name].cpu(),
            "given" if name in given else "generated",
        )
        for name in [*given, *[name for name in samples.data if name not in given]]
    ]
    if len(panels) == 1:
        return mosaic(panels[0])
    title = f"given {', '.join(given)}" if given else "joint samples"
    return grid(panels, title=title, blocks=2 if num > 8 else 1)
