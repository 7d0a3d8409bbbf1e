"""`mmdiff compare`: figures with paired intervals, settings that differ, and samples side by side."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdiff_ray.cli import main
from mmdiff_ray.evaluation.statistics import Interval
from mmdiff_ray.runs.compare import compare_configs, compare_figures, compare_pictures


@pytest.fixture(scope="module")
def longer(finished, tmp_path_factory) -> Path:
    """The finished run, trained on and evaluated again."""
    folder = tmp_path_factory.mktemp("compare") / "longer"
    shutil.copytree(finished.folder, folder)
    assert main(["train", "--resume", str(folder), "train.samples=192", "tracking.log_model=false"]) == 0
    return folder


def by_key(folder: Path) -> dict[str, float]:
    figures = json.loads((folder / "evaluation.json").read_text())["figures"]
    return {figure["key"]: figure["value"] for figure in figures}


def test_figures_differ_by_what_their_files_say_with_an_interval_over_the_same_rows(finished, longer):
    lines = {line.key: line for line in compare_figures([finished.folder, longer])}
    first, second = by_key(finished.folder), by_key(longer)
    assert lines.keys() == first.keys() == second.keys()
    line = lines["factors/cosine"]
    assert line.values == [first["factors/cosine"], second["factors/cosine"]] and line.better == "higher"
    (gap,) = line.differences
    assert isinstance(gap, Interval) and gap.low < gap.value < gap.high
    assert gap.value == pytest.approx(second["factors/cosine"] - first["factors/cosine"], abs=1e-6)
    (gap,) = lines["shape/code_agreement"].differences  # no sum over rows
    assert isinstance(gap, float)


def test_a_run_and_its_copy_differ_in_nothing(finished, tmp_path):
    copy = shutil.copytree(finished.folder, tmp_path / "copy")
    lines = compare_figures([finished.folder, copy])
    values = [gap.value if isinstance(gap, Interval) else gap for line in lines for gap in line.differences]
    assert values and not any(values) and compare_configs([finished.folder, copy]) == {}
    (copy / "evaluation.json").unlink()
    assert all(line.differences == [None] for line in compare_figures([finished.folder, copy]))


def test_page_shows_settings_that_differ_and_samples_of_one_seed_and_the_same_rows(
    finished, longer, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", str(finished.folder), str(longer)]) == 0
    out = capsys.readouterr().out
    assert "factors/cosine" in out and "train.samples" in out and "192" in out
    page = Path("comparisons/tiny-longer/index.html").read_text()
    assert "<td>train.samples</td><td>160</td><td>192</td>" in page
    for picture in ("from_noise", "given_pixels", "given_masked"):
        assert (
            f'src="{picture}.png"' in page
            and Image.open(f"comparisons/tiny-longer/{picture}.png").width > 300
        )


def test_samples_of_runs_with_other_seeds_start_from_the_same_noise(finished, tmp_path):
    copy = shutil.copytree(finished.folder, tmp_path / finished.folder.name)
    config = copy / "export" / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 5"))
    same, other = (compare_pictures([finished.folder, folder], rows=2) for folder in (finished.folder, copy))
    assert same.keys() == other.keys() >= {"from noise", "given pixels"}
    for title, picture in same.items():
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(other[title]), title)


def test_one_run_is_nothing_to_compare(capsys):
    assert main(["compare", "demo"]) == 2
    assert capsys.readouterr().err == "mmdiff: compare needs two runs or more, got demo\n"
