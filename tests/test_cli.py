"""The command line: help, exit codes, what is written, and what is not."""

import argparse
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdiff_ray import __version__
from mmdiff_ray import config as configuration
from mmdiff_ray.cli import main, make_parser
from mmdiff_ray.data.manifest import read_manifest
from mmdiff_ray.datasets.embedders import make_embedder
from mmdiff_ray.tracking import store
from mmdiff_ray.training.checkpoint import complete
from tests import sprites as tiny


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def config_file(sprites, tmp_path_factory) -> Path:
    """Return a configuration in another folder than this one, with its runs there."""
    return tiny.write_config(tmp_path_factory.mktemp("config"), sprites)


def data_of(config_file: Path) -> str:
    """Return the URI of a configuration's data set."""
    return configuration.load([config_file]).data.sources[0].uri


def commands(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the words of every command."""
    nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not nested:
        yield words
    for action in nested:
        for name, inner in action.choices.items():
            yield from commands(inner, (*words, name))


def run(capsys, *words: str) -> tuple[int, str, str]:
    """Return the exit code of a command, what it said, and its errors."""
    try:
        code = main(words)
    except SystemExit as stop:  # argparse's own way out
        code = int(stop.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


# --- help ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", list(commands(make_parser())), ids=" ".join)
def test_help_of_every_command_shows_an_example_that_parses(capsys, words):
    code, out, _ = run(capsys, *words, "--help")
    assert code == 0
    example = shlex.split(out.split("example:")[1].strip().splitlines()[0])
    assert example[: 1 + len(words)] == ["mmdiff", *words]
    known, extra = make_parser().parse_known_args(example[1:])
    assert known.command == " ".join(words)
    assert not extra or words == ("data", "build")


def test_help_tells_the_options_of_the_pipeline_that_was_named_or_of_all(capsys):
    code, out, _ = run(capsys, "data", "build", "folder", "--help")
    assert code == 0 and "options of folder" in out and "embed_captions" in out
    assert "options of sprites" not in out
    for words in (("--help",), ("foldr", "--help")):
        code, out, _ = run(capsys, "data", "build", *words)
        assert code == 0 and "options of folder" in out and "options of sprites" in out


def test_version_is_that_of_the_package(capsys):
    assert run(capsys, "--version") == (0, f"mmdiff {__version__}\n", "")


@pytest.mark.parametrize(
    "words", [(), ("fly",), ("data",), ("sample",), ("train", "--sideways"), ("sample", "x", "y")]
)
def test_what_is_no_command_exits_with_2(capsys, words):
    code, _, errors = run(capsys, *words)
    assert code == 2 and errors


# --- what is wrong is said before anything is started or written -----------------------------------------


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["train.sample=9"], "train.sample: unknown key 'sample'; known: samples, .*did you mean 'samples'"),
        (["trian.samples=9"], "trian: unknown key .*did you mean 'train'"),
        (["train.samples=many"], "train.samples: .*many"),
        (["train.samples"], "override 'train.samples' must have the form key=value"),
        (["model.backbone=unet2"], "model.backbone: unknown 'unet2'.*did you mean 'unet'"),
        (["evaluate.evaluators=[joints]"], "evaluate.evaluators: .*joints.*joint"),
        (["data.sources=[{uri: nowhere}]"], "no data set at nowhere.*data build PIPELINE --out nowhere"),
        (["modalities.color={type: label}"], "modalities.color needs the column 'color'.*it has: pixels"),
        (
            ["train.global_batch=20"],
            r"train.global_batch \(20\) must be a multiple of .* \(8\); try 16 or 24",
        ),
        (["workers.count=17"], r"train.global_batch \(16\) must have a row for each of 17 workers"),
        (["train.device=cuda:99"], r"train.device is cuda|train.device: "),
        (["tracking.uri=some/folder"], r"tracking.uri \(some/folder\) is a folder"),
    ],
)
def test_mistake_is_told_with_its_key_and_exit_code_2(capsys, config_file, overrides, message):
    code, _, errors = run(capsys, "train", str(config_file), *overrides)
    assert code == 2
    assert errors.startswith("mmdiff: ") and len(errors.splitlines()) == 1
    assert_matches(message, errors)
    assert not (config_file.parent / "runs").exists() and list(Path.cwd().iterdir()) == []


def assert_matches(pattern: str, text: str) -> None:
    with pytest.raises(AssertionError, match=pattern):
        raise AssertionError(text)


@pytest.mark.parametrize(
    "words, message",
    [
        (["train"], "train needs a config file"),
        (["train", "nowhere.yaml"], "no config file nowhere.yaml"),
        (["train", "."], "mmdiff: . is a folder, not a config file"),
        (["train", "--resume", "nothing"], "no run 'nothing' in runs/; there are: none yet"),
        (["train", "x.yaml", "--resume", "r", "--dry-run"], "--dry-run cannot be combined with --resume"),
        (["sample", "nothing"], "no run 'nothing'"),
        (["evaluate", "nothing"], "no run 'nothing'"),
        (["data", "embed", "minilm", "a cat", "--out", "x.txt"], "--out: got 'x.txt', want .*npy"),
        (["data", "embed", "efficientnet-lite0", "a cat", "--out", "x.npy"], "takes image, not text"),
        (["data", "inspect", "nowhere"], "no data set at nowhere"),
        (["data", "build", "sprite", "--out", "x"], "sprite.*sprites"),
        (
            ["data", "build", "sprites", "--out", "/proc/x"],
            "^mmdiff: out: cannot write to /proc/x: [^\n]*\n$",
        ),
        (["data", "build", "sprites", "--out", "x", "--colour", "9"], "colour"),
        (["data", "build", "sprites", "--out", "x", "--size"], "option '--size' must have the form"),
    ],
)
def test_what_is_not_there_is_told_with_exit_code_2(capsys, words, message):
    code, _, errors = run(capsys, *words)
    assert code == 2
    assert_matches(message, errors)
    assert list(Path.cwd().iterdir()) == []


def test_an_error_that_nobody_foresaw_is_one_line_that_names_the_file_of_its_traceback(capsys, config_file):
    Path("broken.py").write_text("1 / int('0' and 'http://me:hidden@host' == '')")
    code, _, errors = run(capsys, "train", str(config_file), "plugins=[broken]")
    assert code == 1 and len(errors.splitlines()) == 1
    found = re.fullmatch(r"mmdiff: unexpected ZeroDivisionError: .*traceback is in (\S+)\n", errors)
    log = Path(found[1]).read_text()
    Path(found[1]).unlink()
    assert "Traceback" in log and "broken.py" in log and "hidden" not in log


def test_mistakes_are_told_before_ray_or_mlflow_are_so_much_as_imported(config_file):
    program = f"""
import sys
from mmdiff_ray.cli import main
for wrong in ("train.sam=9", "data.sources=[{{uri: x}}]", "modalities.x={{type: label}}", "workers.count=99"):
    assert main(["train", {str(config_file)!r}, wrong]) == 2
assert main(["train", {str(config_file)!r}, "--dry-run", "workers.count=2"]) == 0
print(sorted({{"ray", "mlflow"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert len(done.stderr.splitlines()) == 4


def test_run_is_called_after_its_file_where_it_has_no_name(capsys, config_file):
    file = config_file.with_name("mine.yaml")
    file.write_text(
        "\n".join(line for line in config_file.read_text().splitlines() if "name: tiny" not in line)
    )
    assert run(capsys, "train", str(file), "train.samples=16", "evaluate.evaluators=[]")[0] == 0
    assert (config_file.parent / "runs" / "mine" / "export").is_dir()
    assert not (config_file.parent / "runs" / "mine" / "evaluation.json").exists()


def test_runs_that_cannot_be_written_are_told(capsys, config_file):
    code, _, errors = run(capsys, "train", str(config_file), "runs=/proc/runs")
    assert code == 2 and "/proc/runs" in errors


def test_data_without_held_out_rows_are_refused_where_they_are_needed(capsys, config_file):
    run(
        capsys,
        "data",
        "build",
        "sprites",
        "--out",
        "set",
        "--workers",
        "0",
        "--count=3",
        "--val_share=0.0001",
    )
    for words in (["--dry-run"], []):
        code, _, errors = run(capsys, "train", str(config_file), "data.sources=[{uri: set}]", *words)
        assert code == 2 and "evaluate.split: the data have no rows in val" in errors


def test_store_that_does_not_answer_is_told_and_no_run_is_left(capsys, config_file):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        dead_uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    code, _, errors = run(capsys, "train", str(config_file), f"tracking.uri={dead_uri}")
    assert code == 2 and f"tracking.uri ({dead_uri}): the run cannot be recorded there" in errors
    assert not (config_file.parent / "runs").exists()


# --- dry run, training, going on -------------------------------------------------------------------------


def test_dry_run_prints_sizes_and_cost_and_starts_nothing(capsys, config_file):
    code, out, errors = run(capsys, "train", str(config_file), "--dry-run", "workers.count=2")
    assert (code, errors) == (0, "")
    rows = read_manifest(data_of(config_file)).splits["train"].rows
    for word in ("pixels (anchor)", "parameters  ", "forward  ", f"{rows} training rows", "a step  "):
        assert word in out
    assert out.splitlines()[-1].startswith("nothing was started")
    assert not (config_file.parent / "runs").exists() and list(Path.cwd().iterdir()) == []


def test_dry_run_names_settings_that_change_nothing(capsys, config_file):
    _, out, _ = run(capsys, "train", str(config_file), "--dry-run", "modalities.pixels.weights.scale=2")
    assert "note        modalities.pixels.weights: the anchor's profile is sqrt(abar)" in out


def test_training_that_fails_exits_with_1_and_says_so_everywhere(capsys, config_file):
    code, _, errors = run(capsys, "train", str(config_file), "train.learning_rate=1e30")
    assert code == 1
    assert_matches("mmdiff: not finite: .* at step [2-9] .*lower train.learning_rate", errors)
    folder = config_file.parent / "runs" / "tiny"
    facts = json.loads((folder / "run.json").read_text())
    assert facts["state"] == "failed"
    assert store.client(facts["tracking_uri"]).get_run(facts["run_id"]).info.status == "FAILED"
    code, _, errors = run(capsys, "evaluate", str(folder))
    assert code == 2 and "tiny has no trained model yet; resume training: mmdiff train --resume" in errors


def test_finished_run_can_be_made_longer(capsys, config_file):
    runs = config_file.parent / "runs"
    assert run(capsys, "train", str(config_file), "train.samples=64")[0] == 0
    code, out, _ = run(capsys, "train", "--resume", "tiny", "--runs", str(runs), "train.samples=128")
    assert code == 0 and "from the checkpoint at 64 samples" in out
    assert json.loads((runs / "tiny" / "evaluation.json").read_text())["samples_seen"] == 128
    written = (runs / "tiny" / "evaluation.json").stat().st_mtime_ns
    code, out, _ = run(capsys, "train", "--resume", "tiny", "--runs", str(runs))
    assert code == 0 and "is finished at 128 samples; to train longer" in out
    assert (runs / "tiny" / "evaluation.json").stat().st_mtime_ns == written
    code, _, errors = run(capsys, "train", "--resume", str(runs / "tiny"), "seed=5")
    assert code == 2 and "seed: a resumed run keeps 0, got 5" in errors


def test_command_with_continue_begins_its_run_and_goes_on_with_it_as_often_as_it_is_given(
    capsys, config_file
):
    runs = config_file.parent / "runs"
    cut_short = runs / "tiny" / "tracking" / "0-1-a"  # a driver that was killed before its run had a name
    cut_short.mkdir(parents=True)
    words = ["train", str(config_file), "--continue", "evaluate.evaluators=[joint]", "train.decay=constant"]
    code, out, _ = run(capsys, *words, "train.samples=64")
    assert code == 0 and "from the checkpoint" not in out
    first = json.loads((runs / "tiny" / "run.json").read_text())
    code, out, _ = run(capsys, *words, "train.samples=128")
    assert code == 0 and "from the checkpoint at 64 samples" in out
    code, out, _ = run(capsys, *words, "train.samples=128")
    assert code == 0 and "is finished at 128 samples" in out
    assert json.loads((runs / "tiny" / "run.json").read_text())["run_id"] == first["run_id"]
    assert len(list(runs.glob("*/run.json"))) == 1
    code, _, errors = run(capsys, *words, "seed=5")
    assert code == 2 and "seed: a resumed run keeps 0, got 5" in errors


@pytest.mark.slow
def test_continue_goes_on_with_a_run_that_still_says_running_because_its_driver_was_killed(
    capsys, config_file
):
    """As where a submitted job's head is lost: nobody told MLflow, or the folder, that the run ended."""
    folder = config_file.parent / "runs" / "tiny"
    words = ["train", str(config_file), "--continue", "evaluate.evaluators=[]", "train.decay=constant"]
    driver = subprocess.Popen([sys.executable, "-m", "mmdiff_ray.cli", *words, "train.samples=1000000"])
    while not complete(folder / "checkpoints"):
        assert driver.poll() is None
        time.sleep(0.1)
    driver.kill()
    driver.wait()
    seen = int(complete(folder / "checkpoints")[-1].name)

    def state() -> tuple[str, str]:
        facts = json.loads((folder / "run.json").read_text())
        return facts["state"], store.client(facts["tracking_uri"]).get_run(facts["run_id"]).info.status

    assert state() == ("running", "RUNNING")
    code, out, errors = run(capsys, *words, f"train.samples={seen + 64}")
    assert code == 0, errors
    assert f"from the checkpoint at {seen:,} samples" in out and state() == ("finished", "FINISHED")


def test_continue_takes_no_folder_for_a_run_that_holds_anything_else(capsys, config_file):
    other = config_file.parent / "runs" / "tiny" / "checkpoints"
    other.mkdir(parents=True)
    code, _, errors = run(capsys, "train", str(config_file), "--continue")
    assert code == 2 and "tiny exists but is not a run; choose another name" in errors and other.is_dir()
    code, _, errors = run(capsys, "train", str(config_file), "--continue", "--dry-run")
    assert code == 2 and "--continue" in errors


# --- evaluate --------------------------------------------------------------------------------------------


def test_evaluation_prints_figures_beside_floors(capsys, finished):
    words = ["evaluate.rows=6", "evaluate.evaluators=[labels]"]
    code, out, _ = run(capsys, "evaluate", "tiny", *words, "--runs", finished.runs)
    assert code == 0 and "shape/accuracy" in out and "majority class" in out
    assert "6 held-out rows" in out


def test_labels_are_compared_with_those_of_the_nearest_training_rows(capsys, finished):
    words = ["evaluate.rows=16", "evaluate.evaluators=[labels]", "evaluate.neighbours=factors"]
    code, out, _ = run(capsys, "evaluate", "tiny", *words, "--runs", finished.runs)
    assert code == 0, out
    found = max(
        (finished.folder / "evaluations").glob("*/evaluation.json"), key=lambda file: file.stat().st_mtime_ns
    )
    figures = {one["key"]: one["floors"] for one in json.loads(found.read_text())["figures"]}
    assert 0 <= figures["shape/accuracy_likely"]["5 nearest rows by factors"] <= 1
    shutil.rmtree(found.parent)
    code, _, errors = run(
        capsys, "evaluate", "tiny", words[1], "evaluate.neighbours=shapes", "--runs", finished.runs
    )
    assert code == 2 and "evaluate.neighbours" in errors and "factors" in errors


def test_evaluation_with_overrides_leaves_the_runs_own_alone(capsys, finished):
    own = (finished.folder / "evaluation.json").read_bytes()
    code, out, _ = run(
        capsys, "evaluate", str(finished.folder), "evaluate.rows=5", "evaluate.evaluators=[labels]"
    )
    place = Path(re.search(r"figures\s+(\S+)", out)[1])
    assert code == 0 and place.parent.parent == finished.folder / "evaluations"
    assert {figure["rows"] for figure in json.loads(place.read_text())["figures"]} == {5}
    assert (finished.folder / "evaluation.json").read_bytes() == own
    assert (place.parent / "config.yaml").is_file()


@pytest.mark.parametrize(
    "override, message",
    [
        ("evaluate.evaluators=[truth]", "evaluate.evaluators: .*truth"),
        ("train.samples=5", "train.samples: an evaluation keeps 160, got 5"),
        ("data.sources=[{uri: nowhere}]", "no data set at nowhere"),
    ],
)
def test_evaluation_of_something_else_is_refused(capsys, finished, override, message):
    code, _, errors = run(capsys, "evaluate", str(finished.folder), override)
    assert code == 2
    assert_matches(message, errors)


# --- sample ----------------------------------------------------------------------------------------------


def sampled(capsys, finished, *words: str) -> tuple[Path, dict]:
    """Return the folder that `mmdiff sample` wrote, and its `samples.json`."""
    code, out, errors = run(capsys, "sample", str(finished.folder), "--num", "3", "--out", "out", *words)
    assert (code, errors) == (0, "")
    assert "picture  out/grid.png" in out
    with Image.open("out/grid.png") as grid:
        assert min(grid.size) > 50
    return Path("out"), json.loads(Path("out/samples.json").read_text())


def test_joint_samples_are_written_with_their_data(capsys, finished):
    out, facts = sampled(capsys, finished)
    assert facts["given"] == {} and set(facts["generated"]) == {"pixels", "shapes", "shape", "factors"}
    assert facts["settings"]["num"] == 3
    assert Image.open(out / facts["generated"]["pixels"][2]).size == (8, 8)
    names = read_manifest(data_of(finished.config_file)).columns["shape"]["names"]
    assert (out / facts["generated"]["shape"][0]).read_text().strip() in names
    assert all((out / name).is_file() for names in facts["generated"].values() for name in names)


@pytest.mark.parametrize("named", ["shape", "label"])
def test_given_label_comes_back_with_images(capsys, finished, named):
    out, facts = sampled(capsys, finished, "--given", f"{named}=star", "--guidance", "2", "--steps", "2")
    assert (out / facts["given"]["shape"]).read_text() == "star\n"
    assert set(facts["generated"]) == {"pixels", "shapes", "factors"}


def picture(path: str, alpha: bool = False) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    if alpha:
        pixels[2:5, 3:6, 3] = 0
    Image.fromarray(pixels if alpha else pixels[..., :3]).save(path)
    return pixels


def test_given_image_comes_back_unchanged_with_masks_labels_and_embeddings(capsys, finished):
    pixels = picture("some.png")
    out, facts = sampled(capsys, finished, "--given", "pixels=some.png")
    assert np.array_equal(np.asarray(Image.open(out / facts["given"]["pixels"])), pixels[..., :3])
    assert set(facts["generated"]) == {"shapes", "shape", "factors"}


def test_given_masked_image_has_its_hole_where_alpha_is_0(capsys, finished):
    pixels = picture("some.png", alpha=True)
    out, facts = sampled(capsys, finished, "--given", "masked=some.png", "--sampler", "ddim")
    masked = np.asarray(Image.open(out / facts["given"]["masked"]))
    assert np.array_equal(masked[..., 3], pixels[..., 3])
    assert np.array_equal(masked[..., :3], pixels[..., :3] * (pixels[..., 3:] > 0))
    for file in facts["generated"]["pixels"]:  # what was visible stays
        restored = np.asarray(Image.open(out / file))
        assert np.array_equal(restored[pixels[..., 3] > 0], pixels[..., :3][pixels[..., 3] > 0])


def test_pictures_of_other_proportions_are_cut_not_squeezed(capsys, finished):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    Image.fromarray(wide).save("wide.png")
    out, facts = sampled(capsys, finished, "--given", "pixels=wide.png")
    assert (np.asarray(Image.open(out / facts["given"]["pixels"])) == 200).all()


def test_samples_that_are_there_are_never_written_over(capsys, finished):
    words = ("sample", str(finished.folder), "--num", "1")
    for _ in range(2):
        assert run(capsys, *words)[0] == 0
    assert sorted(path.name for path in Path("samples").iterdir()) == ["tiny-joint", "tiny-joint-2"]
    code, _, errors = run(capsys, *words, "--out", "samples/tiny-joint")
    assert code == 2 and "is not empty; use a new folder" in errors


def test_hole_can_be_a_picture_of_its_own(capsys, finished):
    pixels = picture("some.png")
    hole = np.zeros((8, 8), np.uint8)
    hole[:4] = 255
    Image.fromarray(hole).save("hole.png")
    out, facts = sampled(capsys, finished, "--given", "masked=some.png", "--hole", "hole.png")
    masked = np.asarray(Image.open(out / facts["given"]["masked"]))
    assert (masked[:4] == 0).all()
    assert np.array_equal(masked[4:, :, :3], pixels[4:, :, :3])


def test_samples_of_one_seed_are_the_same_files(capsys, finished):
    for out in ("a", "b"):
        assert run(capsys, "sample", str(finished.folder), "--num", "2", "--seed", "4", "--out", out)[0] == 0
    first, second = ({p.name: p.read_bytes() for p in Path(out).iterdir()} for out in ("a", "b"))
    assert first == second


@pytest.mark.parametrize(
    "words, message",
    [
        (["--given", "shape=sta"], "shape: no label 'sta'; did you mean 'star'"),
        (["--given", "colour=red"], "no modality 'colour'; it has: pixels, shapes"),
        (["--given", "shape"], "--given 'shape' must be instance=value"),
        (["--given", "pixels=nowhere.png"], "pixels: no file 'nowhere.png'; a picture is given as a file$"),
        (["--given", "pixels=."], "pixels: '.' is a folder"),
        (
            ["--given", "factors=a cat"],
            "factors: no file 'a cat'; an embedding is given as a .npy file of 9 numbers.*"
            "mmdiff data embed EMBEDDER 'a cat' --out factors.npy",
        ),
        (["--hole", "x.png"], "--hole needs a masked image"),
        (["--num", "0"], r"--?num \(0\) must be at least 1"),
        (["--guidance", "-3"], r"--guidance \(-3\) must be at least 0"),
        (["--num", "1", "--out", "/proc/x"], "--out /proc/x cannot be created"),
        (["--steps", "0"], r"steps \(0\) must be at least 1"),
        (["--sampler", "fast"], "sampler: .*fast.*ancestral, ddim, dpm2"),
    ],
)
def test_what_cannot_be_sampled_is_told_with_exit_code_2_and_not_written(capsys, finished, words, message):
    code, _, errors = run(capsys, "sample", str(finished.folder), *words)
    assert code == 2
    assert_matches(message, errors)
    assert list(Path.cwd().iterdir()) == []


def test_folder_with_other_files_is_not_written_into(capsys, finished):
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear")
    code, _, errors = run(capsys, "sample", str(finished.folder), "--num", "1", "--out", "mine")
    assert code == 2 and "mine is not empty" in errors
    assert [path.name for path in Path("mine").iterdir()] == ["letter.txt"]


# --- data ------------------------------------------------------------------------------------------------


def test_data_are_built_with_options_and_not_overwritten(capsys):
    words = ["data", "build", "sprites", "--out", "set", "--workers", "0"]
    words += ["--count", "20", "--size=8", "most=2"]
    code, out, _ = run(capsys, *words)
    assert code == 0 and "set: " in out and "mmdiff data inspect set" in out
    manifest = read_manifest("set")
    assert sum(split.rows for split in manifest.splits.values()) == 20
    code, _, errors = run(capsys, *words)
    assert code == 2 and "--force" in errors and read_manifest("set").digest == manifest.digest
    assert run(capsys, *words, "--force", "seed=1")[0] == 0
    assert read_manifest("set").digest != manifest.digest


def test_pictures_that_were_left_out_are_told(capsys):
    Path("photos").mkdir()
    for name in "ab":
        Image.new("RGB", (9, 9)).save(f"photos/{name}.png")
    Path("list.csv").write_text("file,label\na.png,x\n")
    words = ["data", "build", "folder", "--source", "photos", "--csv", "list.csv", "--size", "8"]
    code, out, _ = run(capsys, *words, "--out", "set", "--workers", "0")
    assert code == 0 and "1 picture is not in list.csv and left out\n" in out


def test_data_are_shown(capsys, sprites):
    code, out, _ = run(capsys, "data", "inspect", sprites, "--picture", "rows.png")
    assert code == 0 and "pixels" in out and "star" in out
    assert Path("rows.png").is_file()


def test_embeddings_of_texts_and_pictures_are_written(capsys):
    code, out, errors = run(capsys, "data", "embed", "minilm", "a red cat", "--out", "new/cat.npy")
    assert (code, out, errors) == (0, "new/cat.npy: 384 numbers\n", "")
    wanted = make_embedder("minilm", "text")(["a red cat"])[0]
    assert np.array_equal(np.load("new/cat.npy"), wanted)
    picture("some.png")
    assert run(capsys, "data", "embed", "efficientnet-lite0", "some.png", "--out", "look.npy")[0] == 0
    assert np.load("look.npy").shape == (1280,)


# --- doctor ----------------------------------------------------------------------------------------------


def test_doctor_finds_this_machine_sound(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and "BROKEN" not in out
    for name in ("python", "packages", "device", "disk", "MLflow store"):
        assert name in out
    assert list(Path.cwd().iterdir()) == []  # looking leaves nothing behind


def test_doctor_names_what_is_broken_and_exits_with_1(capsys):
    Path("runs").mkdir()
    Path("runs/mlflow.db").write_bytes(b"no database" * 1000)
    code, out, _ = run(capsys, "doctor")
    assert code == 1
    (line,) = [line for line in out.splitlines() if line.startswith("BROKEN")]
    assert "MLflow store" in line
