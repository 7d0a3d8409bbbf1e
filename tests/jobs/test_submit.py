"""What `mmdiff submit` sends, passes on, and refuses before it asks a cluster."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from mmdiff_ray.cli import main, parse
from mmdiff_ray.config import ConfigError
from mmdiff_ray.jobs import package
from mmdiff_ray.jobs.package import with_named_files
from mmdiff_ray.jobs.submit import environment, lock_file
from mmdiff_ray.tracking import provenance
from tests import sprites as tiny
from tests.sweeps import tiny as tiny_sweep

pytestmark = pytest.mark.usefixtures("nothing_around")
SECRET = "a-very-long-secret"
WEIGHTS = str(package.code_folder() / "pipelines/configs/experiments/weights.yaml")


@pytest.fixture
def refused(capsys, dead_url):
    """Return a function that submits words to a cluster that does not answer and returns what is printed, the
    one line of the error last."""

    def submit(*words: str) -> str:
        assert main(["submit", "--address", dead_url, *words]) == 2
        printed = capsys.readouterr()
        assert len(printed.err.splitlines()) == 1
        return printed.out + printed.err

    return submit


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


# --- files -------------------------------------------------------------------------------------------------

SENT = ("mine.yaml", "plugins/mine.py", "pipelines/configs/mine.yaml", "environment.yaml", "keys.py")
NOT_SENT = ("data/a.parquet", "runs/x/run.json", ".venv/x.py", "env/pyvenv.cfg", "env/lib/x.py", ".env")
NOT_SENT += ("plugins/__pycache__/mine.pyc", "plugins/.env.local")
KEYS = ("credentials.json", "deploy/server.pem", "id_rsa", "prod.env", "service-account-1.json")


@pytest.mark.parametrize("with_git", [True, False])
def test_package_has_code_and_folder_but_no_data_runs_environments_ignored_files_or_keys(tmp_path, with_git):
    fill(tmp_path, *SENT, *NOT_SENT, *KEYS, "big/ignored.bin", "removed.txt")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    if with_git:
        (tmp_path / ".gitignore").write_text("big/\n")
        subprocess.run(["git", "init", "-q"], check=True)
        subprocess.run(["git", "add", "mine.yaml", "removed.txt"], check=True)
        (tmp_path / "removed.txt").unlink()
    files, keys = package.select(tmp_path)
    assert {*SENT, "mmdiff_ray/data/plan.py", "pipelines/configs/demo.yaml"} <= files.keys()
    assert keys == sorted(KEYS) and not files.keys() & {*NOT_SENT, *KEYS, ".gitignore"}
    assert ("big/ignored.bin" in files) == ("removed.txt" in files) == (not with_git)
    assert not [name for name in files if name.startswith(("link", "tests/")) or "__pycache__" in name]


def test_checkout_is_sent_without_tests_and_results():
    files, _ = package.select(package.code_folder())
    assert {"pyproject.toml", "mmdiff_ray/cli/train.py", "sweeps/quickstart.yaml"} <= files.keys()
    assert not [name for name in files if name.startswith(("tests/", "results/", "data/", "runs/"))]


def test_unpacked_zip_is_what_python_imports(tmp_path):
    fill(tmp_path, "mine.py")
    package.pack(package.select(tmp_path)[0], tmp_path / "package.zip")
    zipfile.ZipFile(tmp_path / "package.zip").extractall(tmp_path / "there")
    program = (
        "import mine, mmdiff_ray, pipelines; print(mine.__file__, mmdiff_ray.__file__, pipelines.__file__)"
    )
    (tmp_path / "there/mine.py").write_text("")
    plain = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "there", env=plain, capture_output=True, text=True
    )
    assert all(file.startswith(f"{tmp_path}/there/") for file in done.stdout.split()), done.stderr


def test_package_that_is_too_large_is_refused_with_its_largest_files(tmp_path, monkeypatch):
    for number in range(8):
        (tmp_path / f"{number}.bin").write_bytes(bytes(number * 2**18))
    files = {f"{number}.bin": tmp_path / f"{number}.bin" for number in range(8)}
    assert package.pack(files, tmp_path / "fits.zip") == 7 * 2**20
    monkeypatch.setattr(package, "LIMIT_BYTES", 6 * 2**20)
    with pytest.raises(
        ConfigError, match=r"7.0 MiB .* exceed 6 MiB; .*: 7.bin \(1.8 MiB\), 6.bin .*gitignore"
    ):
        package.pack(files, tmp_path / "large.zip")


def words_on_the_cluster(words: list[str], folder: str | None = None) -> list[str]:
    """Return the words that a job gets from its shell, which runs in the unpacked files that they name."""
    stage = Path("stage").absolute()
    there = stage / "a package"
    there.mkdir(parents=True)
    command, files = with_named_files(words, parse(words), folder, stage)
    package.pack(files, stage / "package.zip")
    zipfile.ZipFile(stage / "package.zip").extractall(there)
    assert command.startswith("exec python -m mmdiff_ray.cli ")
    program = command.replace("exec python -m mmdiff_ray.cli", r"printf '%s\0'", 1)
    done = subprocess.run(["/bin/sh", "-c", program], cwd=there, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def test_command_comes_through_the_shell_word_by_word_with_its_config(tmp_path):
    fill(tmp_path, "my configs/a.yaml")
    words = ["train", "my configs/a.yaml", "evaluate.evaluators=[joint, bound]", "name=it's $HOME"]
    found = words_on_the_cluster(words, "/mnt/a b")
    assert found[:3] == ["-C", "/mnt/a b", "train"] and found[4:] == words[2:]
    assert Path(found[3]).read_text() == "my configs/a.yaml" and "/a package/" in found[3]


def test_files_elsewhere_are_sent_even_if_they_have_the_same_name(tmp_path, tmp_path_factory, monkeypatch):
    fill(tmp_path, "here/c/x.png", "b/x.png")
    monkeypatch.chdir(tmp_path / "here")
    away = tmp_path_factory.mktemp("away")
    fill(away, "a/x.png")
    given = [f"m={away}/a/x.png", "n=../b/x.png", "o=c/x.png", "category=cats"]
    words = ["generate", "demo", "--out", "o", *(word for value in given for word in ("--given", value))]
    found = words_on_the_cluster(words)
    values = dict(word.split("=") for word in found if "=" in word)
    assert {key: Path(value).read_text() for key, value in values.items() if key != "category"} == {
        "m": "a/x.png",
        "n": "b/x.png",
        "o": "here/c/x.png",
    }
    assert values["category"] == "cats" and all(str(tmp_path / "here/stage") in values[key] for key in "mno")


def test_experiment_of_this_folder_is_sent_by_name_and_an_override_is_no_file(tmp_path):
    fill(tmp_path, "pipelines/configs/experiments/mine.yaml", "demo")
    name, file = words_on_the_cluster(["experiment", "mine"])
    assert name == "experiment" and Path(file).read_text() == "pipelines/configs/experiments/mine.yaml"
    words = ["train", "--resume", "demo", "train.samples=9"]
    assert with_named_files(words, parse(words), None, tmp_path)[1] == {}


def test_sweep_is_sent_with_its_base_config_in_it(tmp_path_factory):
    file = tiny_sweep.write(tmp_path_factory.mktemp("away"), "data/x")
    plain = yaml.safe_load(file.read_text())
    Path("base.yaml").write_text(yaml.safe_dump(plain["base"]))
    file.write_text(yaml.safe_dump({**plain, "base": "base.yaml"}))
    sent = yaml.safe_load(Path(words_on_the_cluster(["sweep", str(file)])[1]).read_text())
    assert sent["base"] == plain["base"] and sent["name"] == "tiny"


# --- variables ---------------------------------------------------------------------------------------------


def test_job_gets_variables_of_stores_and_those_of_env_but_no_files_and_roles_of_this_machine(tmp_path):
    around = {
        "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_PROFILE": "me",
        "HOME": "/home/me",
        "MINE": "1",
    }
    found = environment(["MINE", "OTHER=a=b", "EMPTY="], here=False, around=around)
    assert found == {
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "MINE": "1",
        "OTHER": "a=b",
        "EMPTY": "",
    }
    machine = ("AWS_CONFIG_FILE", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_EC2_METADATA_DISABLED")
    machine += ("AWS_PROFILE", "AWS_ROLE_ARN", "MLFLOW_TRACKING_CLIENT_CERT_PATH")
    for name in machine:
        assert environment([], here=False, around={name: "/here"}) == {}
        assert environment([], here=True, around={name: "/here"}) == {name: "/here"}
        assert environment([f"{name}=/there"], here=False, around={name: "/here"}) == {name: "/there"}


@pytest.mark.parametrize(
    "word", ["NOT_THERE", f"9={SECRET}", f"A B={SECRET}", "=", "RAY_JOB_STOP_WAIT_TIME_S=10m"]
)
def test_wrong_variable_is_refused_without_its_value(word):
    with pytest.raises(ConfigError, match=r"^--env ") as error:
        environment([word], here=True, around={})
    assert SECRET not in str(error.value)


def test_names_of_variables_are_printed_and_their_values_are_not(refused, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    printed = refused("--env", f"MINE={SECRET}", "--", "data", "inspect", "s3://b/x")
    assert "variables MINE, MLFLOW_TRACKING_TOKEN\n" in printed and SECRET not in printed


def test_pip_installs_the_lock_of_this_folder_else_of_the_code(tmp_path, monkeypatch):
    assert lock_file() == package.code_folder() / "requirements.lock"
    fill(tmp_path, "requirements.lock")
    assert lock_file() == tmp_path / "requirements.lock"
    monkeypatch.setattr(package, "code_folder", lambda: tmp_path / "site-packages")
    (tmp_path / "requirements.lock").unlink()
    with pytest.raises(ConfigError, match=r"--pip installs from requirements.lock, which is neither"):
        lock_file()


def test_run_of_a_job_has_tags_for_the_job_and_for_the_revision_that_was_sent(monkeypatch, tmp_path):
    assert "mmdiff.job_id" not in provenance.tags(tmp_path)
    monkeypatch.setenv("MMDIFF_JOB_ID", "demo-1a2b3c")
    monkeypatch.setenv("MMDIFF_REVISION", "0123abc 4")
    tags = provenance.tags(tmp_path)
    assert tags["mmdiff.job_id"] == "demo-1a2b3c"
    assert (tags["mlflow.source.git.commit"], tags["git.changed_files"]) == ("0123abc", "4")


# --- checks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["train", "a.yaml", f"tracking.uri=http://me:{SECRET}@host:5000"],
        ["train", "--resume", "a", "--runs", f"s3://KEY:{SECRET}@bucket/runs"],
        ["data", "build", "digits", "--out", f"s3://{SECRET}@bucket/x"],
    ],
)
def test_command_with_a_password_is_refused_and_not_repeated(refused, words):
    printed = refused("--folder", "/mnt", "--", *words)
    assert printed.startswith("mmdiff: submit: a key in a URI would be recorded") and SECRET not in printed


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "submit needs a command"),
        (("--",), "submit needs a command"),
        (("--", "sample", "x"), "submit runs one of train, evaluate"),
        (("--", "train"), "train needs a config file"),
        (("--", "train", "nowhere.yaml"), "no config file nowhere.yaml"),
        (("--num-workers", "2", "--", "evaluate", "x"), "--num-workers is for train"),
        (("--folder", "here", "--", "evaluate", "x"), "--folder (here) must be an absolute path"),
        (("--", "evaluate", "x"), "--runs (runs) is a relative path"),
        (("--", "sync", "runs/x"), "--folder (runs/x) is a relative path"),
        (("--", "data", "build", "digits", "--out", "y"), "--out (y) is a relative path"),
        (("--", "generate", "s3://b/runs/x", "--out", "y"), "set --folder DIR"),
        (("--", "experiment", "nothing"), "experiment: unknown 'nothing'"),
        (("--", "experiment", WEIGHTS, "--cells", "no-*"), "cells: unknown 'no-*'"),
        (("--", "sweep", "nothing.yaml"), "nothing.yaml"),
        (("--", "sweep", "x.yaml", "--dry-run"), "--dry-run cannot be submitted"),
        (("--", "train", "--resume", "x", "train.samplez=3"), "train.samplez: unknown key 'samplez'"),
        (("--", "evaluate", "x", "evaluate.rowz=3"), "evaluate.rowz: unknown key 'rowz'"),
        (("--", "generate", "x", "--out", "y", "--num", "-4"), "--num (-4) must be at least 1"),
        (("--", "data", "build", "nosuch", "--out", "y"), "unknown pipeline 'nosuch'; registered: "),
    ],
)
def test_wrong_command_is_refused_before_the_cluster_is_asked(refused, words, message):
    assert message in refused(*words)


@pytest.mark.parametrize(
    "words",
    [
        ("data", "build", "digits", "--out", "s3://b/digits", "--label", "kind=disk", "--workers", "2"),
        ("evaluate", "s3://b/runs/x", "evaluate.rows=3", "data.sources.0.uri=s3://b/x"),
        ("generate", "x", "--runs", "s3://b/runs", "--out", "/mnt/y", "--steps", "4", "--sampler", "ddim"),
        ("train", "--resume", "x", "runs=s3://b/runs", "train.samples=9", "tasks.joint.frequency=2"),
        ("sync", "/mnt/shared/runs/x"),
    ],
)
def test_command_without_relative_paths_needs_no_folder(refused, words):
    assert "no cluster answers" in refused("--", *words)


def test_sweep_in_storage_needs_no_folder_unless_its_data_do(refused):
    words = ("--", "sweep", "tiny.yaml", "--runs", "s3://bucket/runs?region=us-east-1")
    tiny_sweep.write(Path.cwd(), "data/x")
    assert "data.sources (data/x) is a relative path" in refused(*words)
    tiny_sweep.write(Path.cwd(), "s3://bucket/x?region=us-east-1")
    assert "no cluster answers" in refused(*words)


@pytest.mark.parametrize(
    "words, message",
    [
        (["trian.samples=9"], "trian: unknown key"),
        (["evaluate.evaluators=[joints]"], "evaluate.evaluators: "),
        (["modalities.color={type: label}"], "modalities.color needs the column 'color'"),
        (["data.lanes=7"], "train.global_batch (16) must be a multiple of data.lanes (7)"),
    ],
)
def test_config_that_cannot_run_is_refused_before_the_cluster_is_asked(refused, sprites, words, message):
    file = tiny.write_config(Path.cwd(), sprites)
    assert message in refused("--folder", "/mnt", "--", "train", str(file), *words)


def test_num_workers_is_checked_as_workers_count(refused, sprites):
    file = tiny.write_config(Path.cwd(), sprites)
    assert "train.global_batch (16) must have a row for each of 17 workers" in refused(
        "--num-workers", "17", "--", "train", str(file)
    )


@pytest.mark.parametrize(
    "data", ["data/x", "/mnt/nowhere/x", "s3://toys/x?scheme=http&endpoint_override={dead}"]
)
def test_config_is_checked_with_its_data_or_the_output_says_why_not(refused, dead_url, sprites, data):
    file = tiny.write_config(Path.cwd(), sprites)
    assert refused("--", "train", str(file)).startswith(
        "config    tiny: checked against its data\nmmdiff: no "
    )
    uri = data.format(dead=dead_url.removeprefix("http://"))
    first, note, *_ = refused(
        "--folder", "/mnt", "--", "train", str(file), f"data.sources=[{{uri: '{uri}'}}]"
    ).split("\n")
    assert first == "config    tiny: checked without its data: names, numbers, tasks"
    assert note.startswith("note      not checked: ") and uri in note


@pytest.mark.parametrize(
    "variable, overrides, warned",
    [
        ("http://me:hidden@localhost:5000", [], "http://localhost:5000"),
        ("http://mlflow:5000", ["tracking.uri=http://[::1]:5000"], "http://[::1]:5000"),
        ("http://127.0.0.1:5000", ["tracking.uri=http://mlflow:5000"], None),
    ],
)
def test_mlflow_address_of_this_machine_is_warned_of(
    refused, sprites, monkeypatch, variable, overrides, warned
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
    file = tiny.write_config(Path.cwd(), sprites)
    printed = refused("--folder", "/mnt", "--", "train", str(file), *overrides)
    assert f"warning   MLflow at {warned}: " in printed if warned else "warning" not in printed
    assert "hidden" not in printed
