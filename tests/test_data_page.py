"""The page "Your data": every command on it runs, from the raw files of each format to samples."""

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmdiff_ray.cli import main
from tests.datasets.test_layouts import box, write_city
from tests.datasets.test_streamed import hub_table, tar_bytes

PAGE = (Path(__file__).parent.parent / "docs/data.md").read_text(encoding="utf8")
PUBLIC = "Public data to try"
ELSEWHERE = ("Latents", "Splits", "Few annotations")
"""Sections whose commands other tests run: of latents, OpenMoji's folds and annotations."""
TINY = [
    *("model.preset=nano", "train.samples=32", "train.global_batch=16", "train.warmup_samples=16"),
    *("workers.count=0", "evaluate.evaluators=[]", "evaluate.steps=2"),
    *("tracking.log_model=false", "tracking.system_metrics=false"),
]
EXTRA = {"build": ["--workers", "0", "--force"], "train": TINY, "sample": ["--num", "2", "--steps", "2"]}

pytestmark = pytest.mark.slow


def sections() -> dict[str, str]:
    """Return heading -> text of the page's parts; what stands before the first heading is ""."""
    parts = re.split(r"^## (.+)$", PAGE, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def commands(text: str) -> Iterator[str]:
    """Write the files that a part of the page shows into the working folder, and yield its commands."""
    for config in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        Path(config.split()[1]).write_text(config, encoding="utf8")
    for block in re.findall(
        r"```\n(.*?)```", re.sub(r"```yaml\n.*?```", "", text, flags=re.DOTALL), re.DOTALL
    ):
        yield from filter(None, block.replace("\\\n", " ").splitlines())


def run(command: str, *more: str) -> None:
    """Run one of our commands in this process, on a tiny model."""
    words = shlex.split(command, comments=True)
    assert words[0] == "mmdiff", command
    action = words[2] if words[1] == "data" else words[1]
    assert main([*words[1:], *EXTRA.get(action, []), *more]) == 0, command


def picture(file: Path, seed: int, size=(24, 24)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """Return a folder with the raw files that the page speaks of."""
    folder = tmp_path_factory.mktemp("raw")
    photos = [f"{label}/{number:02d}.png" for label in ("cat", "dog") for number in range(12)]
    for seed, name in enumerate(photos):
        picture(folder / "photos" / name, seed)
        depth = np.random.default_rng(seed).integers(0, 4000, (24, 24)).astype(np.uint16)
        (folder / "photos_depth" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(depth).save(folder / "photos_depth" / name)
        picture(folder / "val2017" / f"{seed}.jpg", seed)
    rows = [f"{name},{text} {index}" for index, name in enumerate(photos) for text in ("a pet", "an animal")]
    (folder / "captions.csv").write_text("\n".join(["file,caption", *rows]))
    np.save(folder / "vectors.npy", np.random.default_rng(0).normal(size=(24, 8)).astype(np.float16))
    (folder / "names.txt").write_text("\n".join(photos))
    _write_coco(folder, len(photos))
    for index in range(24):
        ids = np.random.default_rng(index).choice([7, 26], (48, 96)).astype(np.uint8)
        part = "train" if index < 20 else "val"
        write_city(folder / "cityscapes", part, "ulm", f"ulm_{index:06d}_000019", ids)
        picture(
            folder / f"cityscapes/leftImg8bit/{part}/ulm/ulm_{index:06d}_000019_leftImg8bit.png",
            index,
            (96, 48),
        )
    (folder / "hub").mkdir()
    pq.write_table(hub_table(range(24)), folder / "hub/train.parquet", row_group_size=8)
    (folder / "shards").mkdir()
    (folder / "shards/00000.tar").write_bytes(tar_bytes(range(24)))
    return folder


def _write_coco(folder: Path, count: int) -> None:
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 24, "height": 24} for i in range(count)]
    objects = [
        {"image_id": i, "category_id": 1 + i % 2, "area": 64, "segmentation": [box(4, 4, 12, 12)]}
        for i in range(count)
    ]
    categories = [{"id": 1, "name": "car"}, {"id": 2, "name": "cat"}]
    content = {"images": images, "annotations": objects, "categories": categories}
    (folder / "instances_val2017.json").write_text(json.dumps(content))
    texts = [{"id": 2 * i + j, "image_id": i, "caption": f"thing {i}"} for i in range(count) for j in (0, 1)]
    (folder / "captions_val2017.json").write_text(json.dumps({"annotations": texts}))


HERE = [name for name, text in sections().items() if "```\n" in text and name not in (PUBLIC, *ELSEWHERE)]


@pytest.mark.parametrize("section", HERE)
def test_every_command_of_the_page_runs(section, raw, monkeypatch):
    if section == "COCO and Cityscapes":
        pytest.importorskip("pycocotools", reason="pip install 'mmdiff-ray[coco]'")
    monkeypatch.chdir(raw)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{raw}/mlflow.db")
    if section:
        list(commands(sections()[""]))  # writes the first config, which others use
    for command in commands(sections()[section]):
        run(command)


@pytest.mark.parametrize("package, first", [("tango-icon-theme", 0), ("tuxpaint-stamps-default", 1)])
def test_public_data_sets_go_from_their_package_to_samples(package, first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    lines = list(commands(sections()[PUBLIC]))
    starts = [index for index, line in enumerate(lines) if line.startswith("apt-get")]
    fetch, *ours = lines[starts[first] : [*starts, len(lines)][first + 1]]
    assert package in fetch
    done = subprocess.run(["bash", "-c", fetch], capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"{package} cannot be fetched here: {done.stderr.strip().splitlines()[-1:]}")
    for command in ours:
        run(command, *(["limit=160"] if "data build" in command else []))
    assert len(list(Path("samples").rglob("*.png"))) >= 1
