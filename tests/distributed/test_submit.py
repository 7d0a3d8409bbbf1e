"""Commands for a cluster: what is packed, what is passed on, what is refused here."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from mmdiff_ray.cli import main, parse
from mmdiff_ray.config import ConfigError, UnreachableError
from mmdiff_ray.distributed import job_commands, package, submit
from mmdiff_ray.distributed.ahead import check_ahead, within
from mmdiff_ray.distributed.commands import make_console
from mmdiff_ray.distributed.job_commands import without_secrets
from mmdiff_ray.distributed.job_server import Place, connect, find_place
from mmdiff_ray.distributed.submit import entrypoint, environment, requirements
from mmdiff_ray.tracking import jobs, provenance
from tests import sprites as tiny
from tests.surroundings import is_somebodys
from tests.sweeps import tiny as tiny_sweep

SECRET = "a-very-long-secret"
WEIGHTS = str(package.code_folder() / "pipelines/configs/experiments/weights.yaml")


@pytest.fixture(autouse=True)
def nothing_around(tmp_path, monkeypatch):
    """Work in an empty folder, with no address, token or store in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if is_somebodys(name):
            monkeypatch.delenv(name)


@pytest.fixture
def dead_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def refused(capsys, *words: str) -> str:
    """Return why a command is refused as wrong input."""
    assert main(words) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1
    return said.err


# --- what is packed ----------------------------------------------------------------------------------------


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


GO = ("mine.yaml", "plugins/mine.py", "notes.txt")
STAY = (
    "data/a.parquet",
    "runs/x/run.json",
    ".venv/lib/x.py",
    ".env",
    "plugins/__pycache__/mine.pyc",
    "big.bin",
)


@pytest.mark.parametrize("with_git", [True, False])
def test_package_holds_the_code_and_the_folder_without_data_runs_hidden_files_and_caches(tmp_path, with_git):
    fill(tmp_path, *GO, *STAY)
    if with_git:
        fill(tmp_path, ".gitignore", "gone.txt")
        (tmp_path / ".gitignore").write_text("big.bin\n")
        subprocess.run(["git", "init", "-q"], check=True)
        subprocess.run(["git", "add", "mine.yaml", "gone.txt"], check=True)
        (tmp_path / "gone.txt").unlink()
    found = package.contents(tmp_path)
    stays = STAY if with_git else STAY[:-1]
    assert {*GO, "mmdiff_ray/cli.py", "pipelines/configs/demo.yaml", package.LOCK} <= set(found)
    assert not set(found) & {*stays, ".gitignore", "gone.txt"}
    assert not [name for name in found if "__pycache__" in name or name.startswith((".", "tests/"))]


def test_code_of_a_checkout_is_taken_from_it_and_its_tests_and_results_stay(tmp_path):
    found = package.contents(package.code_folder())
    assert found["mmdiff_ray/cli.py"].is_file()
    assert "pyproject.toml" in found and "README.md" in found
    assert not [name for name in found if name.startswith(("tests/", "results/", "data/", "runs/"))]


def test_named_file_goes_along_from_wherever_it_is(tmp_path, tmp_path_factory):
    there = tmp_path_factory.mktemp("there") / "far.yaml"
    fill(there.parent, "far.yaml")
    fill(tmp_path, "data/near.yaml")
    found = package.contents(tmp_path, [there, Path("data/near.yaml")])
    assert found["submitted/far.yaml"] == there
    assert found["data/near.yaml"] == Path("data/near.yaml")


KEYS = (
    "id_rsa",
    "deploy/server.pem",
    "credentials.json",
    "service-account-1.json",
    "prod.env",
    "a/.env.local",
)


@pytest.mark.parametrize("with_git", [True, False])
def test_files_named_like_keys_stay_here_and_are_told_unless_a_command_names_them(
    tmp_path, capsys, dead_url, with_git
):
    fill(tmp_path, *KEYS, "keys.py", "environment.yaml")
    if with_git:
        subprocess.run(["git", "init", "-q"], check=True)
    found = package.contents(tmp_path, [Path("prod.env")])
    assert {"keys.py", "environment.yaml", "prod.env"} <= set(found) and not set(found) & set(KEYS[:4])
    refused_with = ["submit", "--address", dead_url, "--", "data", "inspect", "gs://b/x"]
    assert main(refused_with) == 2
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert package.left_keys(tmp_path, found) == sorted(set(KEYS[:4]))
    assert told == [f"note      not sent, for these are names of keys: {', '.join(sorted(KEYS[:5]))}"]


def test_named_files_of_one_name_both_go_along_and_are_found_there(tmp_path, tmp_path_factory):
    there = tmp_path_factory.mktemp("there")
    fill(there, "a/pic.png", "b/pic.png")
    fill(tmp_path, "submitted/3/pic.png")
    given = [
        f"--given={name}={there}/{place}/pic.png" for name, place in (("x", "a"), ("y", "b"), ("z", "a"))
    ]
    words = ["generate", "demo", "--out", "o"]
    for word in given:
        words += word.split("=", 1)
    known = parse(words)
    named = [Path(word.partition("=")[2]) for word in known.given]
    stage = tmp_path / "stage"
    package.stage(package.contents(tmp_path, named), stage)
    shell = words_in_a_shell(entrypoint(words, known, None), stage)
    read = {word[0]: Path(word[2:]).read_text() for word in shell if word[1:2] == "="}
    assert read == {"x": "a/pic.png", "y": "b/pic.png", "z": "a/pic.png"}
    assert (stage / "submitted/3/pic.png").read_text() == "submitted/3/pic.png"


def test_staged_package_is_what_python_imports_there(tmp_path):
    fill(tmp_path, "mine.py")
    stage = tmp_path / "stage"
    package.stage(package.contents(tmp_path), stage)
    program = "import mmdiff_ray.arguments, pipelines; print(mmdiff_ray.__file__, pipelines.__file__)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=stage, env=environment, capture_output=True, text=True
    )
    assert all(path.startswith(str(stage)) for path in done.stdout.split()), done.stderr
    assert (stage / "mine.py").read_text() == "mine.py"


def test_package_that_is_too_large_is_told_with_its_largest_files(tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.bin").write_bytes(bytes(number * 2**20 // 4))
    found = {name: file for name, file in package.contents(tmp_path).items() if name.endswith(".bin")}
    assert package.check_size(found, 7 * 2**20) == 7 * 2**20
    with pytest.raises(
        ConfigError, match=r"7.0 MiB, more than 6.0 MiB; .*: 7.bin \(1.8 MiB\), 6.bin .*gitignore"
    ):
        package.check_size(found, 6 * 2**20)


# --- what is passed on -------------------------------------------------------------------------------------


def test_settings_of_stores_go_with_the_job_and_files_of_this_machine_do_not():
    around = {
        "MLFLOW_TRACKING_URI": "http://tracking:5000",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_PROFILE": "me",
        "HOME": "/home/me",
        "MINE": "1",
    }
    found = environment(["MINE", "OTHER=a=b", "EMPTY="], here=False, around=around)
    assert found == {
        "MLFLOW_TRACKING_URI": "http://tracking:5000",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "RAY_JOB_STOP_WAIT_TIME_S": "120",
        "MINE": "1",
        "OTHER": "a=b",
        "EMPTY": "",
    }
    assert "AWS_PROFILE" in environment([], here=True, around=around)
    assert environment(["AWS_PROFILE"], here=False, around=around)["AWS_PROFILE"] == "me"


@pytest.mark.parametrize(
    "name",
    [
        "AWS_CONFIG_FILE",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_EC2_METADATA_DISABLED",
        "AWS_ROLE_ARN",
        "AWS_SHARED_CREDENTIALS_FILE",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "MLFLOW_TRACKING_CLIENT_CERT_PATH",
        "MLFLOW_TRACKING_SERVER_CERT_PATH",
    ],
)
def test_files_and_roles_of_this_machine_go_elsewhere_only_where_they_are_asked_for(name):
    around = {name: "/here/file"}
    assert name not in environment([], here=False, around=around)
    assert environment([], here=True, around=around)[name] == "/here/file"
    assert environment([f"{name}=/there"], here=False, around=around)[name] == "/there"


NO_KEYS = "note      no AWS credentials go with the job: the cluster's machines need their own for s3://"


@pytest.mark.parametrize(
    "words, noted",
    [
        (["--", "data", "inspect", "s3://b/x"], True),
        (["--", "data", "inspect", "gs://b/x"], False),
        (["--folder", "/mnt", "--", "sweep", "s.yaml"], True),
        (["--env", "AWS_ACCESS_KEY_ID=AKIA", "--", "data", "inspect", "s3://b/x"], False),
        (["--env", "AWS_PROFILE=there", "--", "data", "inspect", "s3://b/x"], False),
    ],
)
def test_storage_without_keys_is_noted_and_sent_variables_are_named(
    capsys, monkeypatch, tmp_path, dead_url, words, noted
):
    monkeypatch.setenv("AWS_PROFILE", "here")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    tiny_sweep.write(tmp_path, "s3://b/data").rename("s.yaml")
    assert main(["submit", "--address", dead_url, *words]) == 2
    said = capsys.readouterr().out
    assert (NO_KEYS in said) == noted
    asked = [word.partition("=")[0] for word in words if word.startswith("AWS_")]
    assert f"variables {', '.join([*asked, 'MLFLOW_TRACKING_TOKEN'])}\n" in said and SECRET not in said


def test_given_variable_goes_before_ours_and_an_sqlite_path_is_made_absolute(tmp_path):
    around = {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}
    found = environment(["RAY_JOB_STOP_WAIT_TIME_S=5"], here=True, around=around)
    assert found["RAY_JOB_STOP_WAIT_TIME_S"] == "5"
    assert found["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.parametrize("value", ["abc", "-1", "1.5", "", "inf"])
def test_time_to_stop_that_ray_could_not_read_is_refused(value):
    with pytest.raises(ConfigError, match=r"RAY_JOB_STOP_WAIT_TIME_S: got '.*', want whole seconds"):
        environment([f"RAY_JOB_STOP_WAIT_TIME_S={value}"], here=True, around={})


@pytest.mark.parametrize("word", ["NOT_THERE", f"9={SECRET}", f"A B={SECRET}", "="])
def test_wrong_variable_is_told_without_its_value(word):
    with pytest.raises(ConfigError) as error:
        environment([word], here=True, around={})
    assert SECRET not in str(error.value)


def test_text_of_ray_is_shown_without_secrets_but_with_all_else():
    variables = {
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "MY_TOKEN": "t0ken",
        "EMPTY_KEY": "",
        "MLFLOW_TRACKING_URI": "https://me:pa55word@host/x",
        "MODE": "fast",
    }
    job = SimpleNamespace(runtime_env={"env_vars": variables})
    text = f"fast: {variables} at https://me:pa55word@host/x"
    shown = without_secrets(text, job)
    assert not [secret for secret in (SECRET, "t0ken", "pa55word") if secret in shown]
    assert shown.startswith("fast: {") and shown.endswith("at https://me:***@host/x")
    assert without_secrets(text, SimpleNamespace(runtime_env=None)) == text


def test_lone_token_of_an_address_is_hidden_where_it_stands_and_no_word_is():
    job = SimpleNamespace(runtime_env={"env_vars": {"MLFLOW_TRACKING_URI": "http://me@host"}})
    assert without_secrets("some text of http://me@host", job) == "some text of http://***@host"


@pytest.mark.parametrize(
    "words",
    [
        ["train", "a.yaml", f"tracking.uri=http://me:{SECRET}@host:5000"],
        ["train", "--resume", "a", "--runs", f"s3://KEY:{SECRET}@bucket/runs"],
        ["data", "build", "digits", "--out", f"s3://{SECRET}@bucket/x"],
    ],
)
def test_command_with_a_password_is_not_sent_and_it_is_not_repeated(capsys, dead_url, words):
    said = refused(capsys, "submit", "--address", dead_url, "--folder", "/mnt", "--", *words)
    assert said.startswith("mmdiff: submit: a key in a URI would be recorded") and SECRET not in said


def test_password_of_a_job_server_is_not_shown(dead_url):
    place = Place(dead_url.replace("://", f"://me:{SECRET}@"), "--address")
    with pytest.raises(ConfigError, match=rf"no cluster answers at {dead_url} \(--address\)") as error:
        connect(place)
    assert SECRET not in str(error.value)


def words_in_a_shell(command: str, cwd: Path) -> list[str]:
    """Return the words that a shell makes of a job's command, without running it."""
    assert command.startswith("exec python -m mmdiff_ray.cli ")
    program = command.replace("exec python -m mmdiff_ray.cli", r"printf '%s\0'", 1)
    done = subprocess.run(["/bin/sh", "-c", program], cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def test_command_comes_through_the_shell_word_by_word_with_its_config_from_the_package(tmp_path):
    fill(tmp_path, "my configs/a.yaml")
    words = ["train", "my configs/a.yaml", "evaluate.evaluators=[joint, bound]", "name=it's $HOME"]
    package_folder = tmp_path / "unpacked"
    package_folder.mkdir()
    shell = words_in_a_shell(entrypoint(words, parse(words), "/mnt/a b"), package_folder)
    assert shell == ["-C", "/mnt/a b", "train", f"{package_folder}/my configs/a.yaml", *words[2:]]


def test_override_behind_resume_is_no_config(tmp_path):
    words = ["train", "--resume", "mine", "train.samples=9"]
    assert words_in_a_shell(entrypoint(words, parse(words), None), tmp_path) == words


def test_given_picture_and_shipped_experiment_come_from_the_package(tmp_path):
    fill(tmp_path, "hole.png", "pipelines/configs/experiments/mine.yaml")
    words = ["generate", "hole.png", "--given", "masked=hole.png", "--given", "category=cats", "--out", "x"]
    shell = words_in_a_shell(entrypoint(words, parse(words), None), tmp_path)
    assert shell == [*words[:3], f"masked={tmp_path}/hole.png", *words[4:]]
    words = ["experiment", "mine"]
    shell = words_in_a_shell(entrypoint(words, parse(words), None), tmp_path)
    assert shell == ["experiment", f"{tmp_path}/pipelines/configs/experiments/mine.yaml"]


def test_requirements_are_the_lines_of_the_lock(tmp_path):
    with pytest.raises(ConfigError, match=r"--pip installs from requirements.lock, which is not"):
        requirements(tmp_path)
    (tmp_path / package.LOCK).write_text("# all\na==1 ; python_version < '3.12'\n\nb==2  # why\n")
    assert requirements(tmp_path) == ["a==1 ; python_version < '3.12'", "b==2"]


def test_run_of_a_job_is_tagged_with_it_and_with_the_revision_that_was_sent(monkeypatch, tmp_path):
    assert jobs.JOB_TAG not in provenance.tags(tmp_path)
    monkeypatch.setenv(jobs.JOB_VARIABLE, "demo-1a2b3c")
    monkeypatch.setenv(jobs.REVISION_VARIABLE, "0123abc 4")
    tags = provenance.tags(tmp_path)
    assert tags[jobs.JOB_TAG] == "demo-1a2b3c"
    assert (tags["mlflow.source.git.commit"], tags["git.changed_files"]) == ("0123abc", "4")


def test_page_of_a_server_that_is_not_there_is_told_at_once_and_without_its_password(dead_url):
    uri = dead_url.replace("://", f"://me:{SECRET}@")
    page = jobs.page_of_job(uri, "mmdiff", "demo-1a2b3c")
    assert page == f"{dead_url} (search there: tags.`mmdiff.job_id` = 'demo-1a2b3c')"
    assert jobs.runs_of_job(uri, "demo-1a2b3c") == []
    assert "MLFLOW_TRACKING_URI of the cluster" in jobs.page_of_job("", "mmdiff", "demo-1a2b3c")
    assert jobs.runs_of_job("", "demo-1a2b3c") == []


@pytest.mark.parametrize(
    "variable, overrides, named",
    [
        ("http://127.0.0.1:5000", [], "MLFLOW_TRACKING_URI (http://127.0.0.1:5000)"),
        ("http://me:hidden@localhost:5000", [], "MLFLOW_TRACKING_URI (http://localhost:5000)"),
        ("http://mlflow:5000", ["tracking.uri=http://[::1]:5000"], "tracking.uri (http://[::1]:5000)"),
        ("http://127.0.0.1:5000", ["tracking.uri=http://mlflow:5000"], None),
        ("http://mlflow:5000", [], None),
    ],
)
def test_store_that_is_this_machine_alone_is_warned_of_where_the_cluster_is_elsewhere(
    sprites, tmp_path, monkeypatch, capsys, dead_url, variable, overrides, named
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
    file = tiny.write_config(tmp_path, sprites)
    words = ["--address", dead_url, "--folder", "/mnt/all", "--", "train", str(file), *overrides]
    assert main(["submit", *words]) == 2
    said = capsys.readouterr()
    assert "no cluster answers" in said.err
    if named is None:
        assert "warning" not in said.out
    else:
        assert f"warning   {named} is this machine alone" in said.out and "hidden" not in said.out


# --- what is refused here ----------------------------------------------------------------------------------


def test_place_is_the_given_one_or_the_environments_or_this_folders(monkeypatch):
    with pytest.raises(ConfigError, match=r"no cluster is named: give --address .* mmdiff cluster up"):
        find_place(None)
    note = {
        "name": "x",
        "address": "http://127.0.0.1:7",
        "gcs": "",
        "token_path": "t",
        "temp": "",
        "workers": 1,
    }
    fill(Path.cwd(), ".cluster/cluster.json")
    Path(".cluster/cluster.json").write_text(json.dumps(note | {"processes": []}))
    assert find_place(None).local is not None and find_place(None).url == "http://127.0.0.1:7"
    assert find_place("http://127.0.0.1:7/").local is not None
    monkeypatch.setenv("RAY_ADDRESS", "http://b:1")
    assert find_place(None) == Place("http://b:1", "RAY_ADDRESS")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://c:1")
    assert find_place(None) == Place("http://c:1", "RAY_API_SERVER_ADDRESS")
    assert find_place("http://d:1") == Place("http://d:1", "--address")


@pytest.mark.parametrize("address", ["auto", "head:6379", "ray://head:10001"])
def test_address_that_is_no_dashboard_is_refused(capsys, address):
    assert f"--address ({address}) must be the address of" in refused(
        capsys, "jobs", "list", "--address", address
    )


def test_cluster_that_does_not_answer_is_told_and_the_environment_stays(dead_url, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:1")
    with pytest.raises(ConfigError, match=rf"no cluster answers at {dead_url} \(--address\)"):
        connect(Place(dead_url, "--address"))
    assert os.environ["RAY_ADDRESS"] == "http://elsewhere:1" and "RAY_API_SERVER_ADDRESS" not in os.environ


def test_token_file_that_is_not_there_is_told(dead_url, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/no/token")
    with pytest.raises(ConfigError, match=r"RAY_AUTH_TOKEN_PATH: no token in /no/token: No such file"):
        connect(Place(dead_url, "--address"))


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "submit needs a command"),
        (("--",), "submit needs a command"),
        (("--", "sample", "x"), "submit runs one of train, evaluate"),
        (("--", "ui"), "submit runs one of train, evaluate"),
        (("--", "train"), "train needs a config file"),
        (("--", "train", "nowhere.yaml"), "no config file nowhere.yaml"),
        (("--num-workers", "2", "--", "evaluate", "x"), "--num-workers is for train"),
        (("--", "evaluate", "x"), "give --folder DIR"),
        (("--", "sync"), "give --folder DIR"),
        (("--", "sync", "runs/x"), "give --folder DIR"),
        (("--folder", "here", "--", "evaluate", "x"), "--folder (here) must be an absolute path"),
        (("--", "experiment", "nothing"), "experiment: unknown 'nothing'"),
        (("--", "sweep", "nothing.yaml"), "nothing.yaml"),
        (("--", "experiment", WEIGHTS, "--cells", "no-*"), "cells: unknown 'no-*'"),
        (("--", "sweep", "--resume", "x", "budget.trails=2"), "budget.trails=2: a sweep goes on as it began"),
        (("--", "sweep", "x.yaml", "--dry-run"), "--dry-run starts nothing and is for this machine"),
        (("--", "train", "x.yaml", "--dry-run"), "--dry-run starts nothing and is for this machine"),
        (("--", "train", "x.yaml", "--continue", "--resume", "x"), "--continue begins a run or goes on"),
        (("--", "train", "--resume", "x", "train.samplez=3"), "train.samplez: unknown key 'samplez'"),
        (("--", "train", "--resume", "x", "train.samples=many"), "train.samples: "),
        (("--", "evaluate", "x", "evaluate.rowz=3"), "evaluate.rowz: unknown key 'rowz'"),
        (("--", "evaluate", "x", "evaluate.rows"), "override 'evaluate.rows' must read key=value"),
        (("--", "evaluate", "x", "--workers", "-3"), "--workers (-3) must be at least 0"),
        (("--", "generate", "x", "--out", "y", "--num", "-4"), "--num (-4) must be at least 1"),
        (("--", "generate", "x", "--out", "y", "--sampler", "fast"), "sampler: unknown sampler 'fast'"),
        (("--", "generate", "x", "--out", "y", "--given", "red"), "--given 'red' must read instance=value"),
        (("--", "generate", "x", "--out", "y", "--workers", "-1"), "--workers (-1) must be at least 0"),
        (("--", "data", "build", "nosuch", "--out", "y"), "unknown pipeline 'nosuch'; registered: "),
        (("--", "data", "build", "openmoji", "--out", "y", "--bogus", "3"), "bogus: unknown key 'bogus'"),
        (
            ("--", "data", "build", "digits", "--out", "y", "--label", "nope"),
            "--label (nope) wants KEY=VALUE",
        ),
        (("--", "data", "build", "digits", "--out", "y", "--workers", "-1"), "--workers (-1) must be at"),
        (("--", "data", "embed", "nosuch", "a", "--out", "y.npy"), "unknown embedder 'nosuch'"),
        (("--", "data", "build", "digits", "--out", "y"), "give --folder DIR"),
        (("--", "generate", "s3://b/runs/x", "--out", "y"), "give --folder DIR"),
    ],
)
def test_wrong_command_is_refused_before_a_cluster_is_asked(capsys, dead_url, words, message):
    assert message in refused(capsys, "submit", "--address", dead_url, *words)


@pytest.mark.parametrize(
    "words",
    [
        ("data", "build", "digits", "--out", "s3://b/digits", "--label", "kind=disk", "--workers", "2"),
        ("data", "inspect", "s3://b/digits"),
        ("evaluate", "s3://b/runs/x", "evaluate.rows=3", "data.sources.0.uri=s3://b/x"),
        ("generate", "x", "--runs", "s3://b/runs", "--out", "s3://b/y", "--steps", "4", "--sampler", "ddim"),
        ("train", "--resume", "x", "runs=s3://b/runs", "train.samples=9", "tasks.joint.frequency=2"),
    ],
)
def test_command_that_names_no_folder_of_the_cluster_needs_none(capsys, dead_url, words):
    assert "no cluster answers" in refused(capsys, "submit", "--address", dead_url, "--", *words)


def test_unknown_option_of_the_command_is_refused_by_its_parser(capsys, dead_url):
    with pytest.raises(SystemExit) as stop:
        main(["submit", "--address", dead_url, "--", "train", "x.yaml", "--sideways"])
    assert stop.value.code == 2 and "--sideways" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["trian.samples=9"], "trian: unknown key"),
        (["evaluate.evaluators=[joints]"], "evaluate.evaluators: "),
        (["modalities.color={type: label}"], "modalities.color needs the column 'color'"),
        (["data.lanes=7"], "train.global_batch (16) must be a multiple of data.lanes (7)"),
    ],
)
def test_config_that_cannot_run_fails_before_a_cluster_is_asked(capsys, dead_url, sprites, words, message):
    file = tiny.write_config(Path.cwd(), sprites)
    error = refused(
        capsys, "submit", "--address", dead_url, "--folder", "/mnt", "--", "train", str(file), *words
    )
    assert message in error


def test_num_workers_is_checked_as_workers_count(capsys, dead_url, sprites):
    file = tiny.write_config(Path.cwd(), sprites)
    words = ["submit", "--address", dead_url, "--num-workers", "17", "--", "train", str(file)]
    assert "train.global_batch (16) must have a row for each of 17 workers" in refused(capsys, *words)


def test_good_config_comes_as_far_as_the_cluster(capsys, dead_url, sprites):
    file = tiny.write_config(Path.cwd(), sprites)
    assert main(["submit", "--address", dead_url, "--", "train", str(file)]) == 2
    said = capsys.readouterr()
    assert said.out == "config    tiny: checked against its data\n"
    assert f"no cluster answers at {dead_url}" in said.err


def test_path_of_this_machine_is_refused_where_no_folder_of_the_cluster_is_named(capsys, dead_url, sprites):
    file = tiny.write_config(Path.cwd(), sprites)
    for word in ("runs=runs", "data.sources=[{uri: data/x}]"):
        error = refused(capsys, "submit", "--address", dead_url, "--", "train", str(file), word)
        assert "is a path of this machine; give --folder DIR" in error


def test_sweep_in_storage_needs_no_folder_unless_its_data_do(capsys, dead_url, tmp_path):
    words = (
        "submit",
        "--address",
        dead_url,
        "--",
        "sweep",
        "tiny.yaml",
        "--runs",
        "s3://bucket/runs?region=us-east-1",
    )
    tiny_sweep.write(Path.cwd(), "data/x")
    assert "data.sources (data/x) is a path of this machine; give --folder" in refused(capsys, *words)
    tiny_sweep.write(Path.cwd(), "s3://bucket/x?region=us-east-1")
    assert f"no cluster answers at {dead_url}" in refused(capsys, *words)
    assert "give --folder DIR" in refused(capsys, *words[:-2])


@pytest.mark.parametrize("where", ["s3://bucket/runs/x", "/mnt/shared/runs/x"])
def test_records_are_sent_from_where_the_nodes_see_them(capsys, dead_url, where):
    assert f"no cluster answers at {dead_url}" in refused(
        capsys, "submit", "--address", dead_url, "--", "sync", where
    ), "nothing else is wrong with it"


def test_data_of_the_cluster_alone_are_no_error_and_it_is_said(dead_url):
    host = dead_url.removeprefix("http://")
    bucket = f"s3://toys/x?scheme=http&region=us-east-1&endpoint_override={host}"
    for uri in ("data/x", "/mnt/nowhere/x", bucket):
        first, note = check_ahead(tiny.config(uri), here=False)
        assert first.startswith("checked without its data") and note.startswith("not checked: ")
        assert uri in note


def test_answer_that_takes_too_long_is_not_waited_for():
    with pytest.raises(UnreachableError, match=r"the store is silent within 0.05 s"):
        within(0.05, threading.Event().wait, "the store is silent")
    assert within(5.0, lambda: 3, "") == 3
    with pytest.raises(KeyError):
        within(5.0, {}.popitem, "")


class Taker:
    """A job server's client that keeps what it is given."""

    def submit_job(self, runtime_env: dict, **job: object) -> None:
        stage = Path(runtime_env["working_dir"])
        self.job, self.variables = job, runtime_env["env_vars"]
        self.files = {file.relative_to(stage).as_posix() for file in stage.rglob("*") if file.is_file()}
        self.sweep = yaml.safe_load((stage / "submitted/tiny.yaml").read_text())


def test_sweep_from_elsewhere_is_sent_whole_with_named_variables_and_no_secret_beside_them(
    capsys, monkeypatch, tmp_path_factory
):
    taker, there = Taker(), tmp_path_factory.mktemp("there")
    monkeypatch.setattr(submit, "connect", lambda place: taker)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    fill(Path.cwd(), "mine.py", "server.pem")
    file = tiny_sweep.write(there, "data/x")
    plain = yaml.safe_load(file.read_text())
    Path("base.yaml").write_text(yaml.safe_dump(plain["base"]))
    file.write_text(yaml.safe_dump({**plain, "base": "base.yaml"}))
    words = ["--address", "http://u:pw@head:1", "--folder", "/mnt/all", "--", "sweep", str(file)]
    assert main(["submit", *words]) == 0
    assert taker.sweep["base"] == plain["base"] and taker.sweep["name"] == "tiny"
    assert "mine.py" in taker.files and "server.pem" not in taker.files
    assert taker.job["entrypoint"] == (
        'exec python -m mmdiff_ray.cli -C /mnt/all sweep "$PWD"/submitted/tiny.yaml'
    )
    assert taker.variables["MLFLOW_TRACKING_PASSWORD"] == SECRET
    said = capsys.readouterr().out
    assert "variables MLFLOW_TRACKING_PASSWORD\n" in said and ", at http://head:1\n" in said
    assert not [secret for secret in (SECRET, "pw@") if secret in f"{said}{taker.job}"]


# --- following a job ---------------------------------------------------------------------------------------


class JobServer(ThreadingHTTPServer):
    """A job server behind a proxy that lets no websocket through; it knows one job, of a growing output.

    gone_after: how often the job is asked for before the server fails.
    """

    daemon_threads = True
    parts = ("first\n", "second\n", "last\n")

    def __init__(self, gone_after: float = float("inf")) -> None:
        super().__init__(("127.0.0.1", 0), JobServerAnswer)
        self.asked, self.gone_after = 0, gone_after
        self.url = f"http://127.0.0.1:{self.server_port}"


class JobServerAnswer(BaseHTTPRequestHandler):
    server: JobServer

    def do_GET(self) -> None:
        job = {"type": "SUBMISSION", "entrypoint": "x", "submission_id": "demo-1"}
        if self.path.endswith("/version"):
            return self.answer(
                {"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "x"}
            )
        if self.path.endswith("/logs/tail"):
            return self.answer({}, 502)
        if self.path.endswith("/logs"):
            return self.answer({"logs": "".join(self.server.parts[: self.server.asked])})
        self.server.asked += 1
        if self.server.asked > self.server.gone_after:
            return self.answer({}, 503)
        ended = self.server.asked > len(self.server.parts)
        self.answer({**job, "status": "SUCCEEDED" if ended else "RUNNING"})

    def answer(self, values: dict, status: int = 200) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(values).encode())

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def proxied(monkeypatch):
    """Return a function that starts a job server, which ends with the test."""
    monkeypatch.setattr(job_commands, "AGAIN_S", 0.0)
    with contextlib.ExitStack() as stack:

        def start(**options: float) -> JobServer:
            server = stack.enter_context(JobServer(**options))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            return server

        yield start


def test_output_that_cannot_be_listened_to_is_asked_for_until_the_job_ends(proxied, capsys):
    server = proxied()
    assert main(["jobs", "logs", "--follow", "--address", server.url, "demo-1"]) == 0
    said = capsys.readouterr().out
    assert said.count("cannot be listened to: 502") == said.count("note: the cluster at") == 1
    assert [line for line in said.splitlines(keepends=True) if line in server.parts] == list(server.parts)
    assert said.splitlines()[-1].startswith("demo-1: SUCCEEDED")


def test_job_whose_server_goes_away_is_said_to_go_on(proxied, capsys):
    server = proxied(gone_after=2)
    assert main(["jobs", "logs", "--follow", "--address", server.url, "demo-1"]) == 1
    said = capsys.readouterr()
    assert "the job goes on if its cluster does, see: mmdiff jobs logs --follow demo-1" in said.err
    assert len(said.err.splitlines()) == 1 and "second" in said.out


def test_output_is_shown_once_however_often_it_is_sent_from_its_beginning(capsys):
    class Client:
        sent = 0
        status = "RUNNING"

        async def tail_job_logs(self, job_id):
            self.sent += 1
            yield "one\n"
            if self.sent == 1:
                raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
            yield "two\nthree\n"
            self.status = "SUCCEEDED"

        def get_job_info(self, job_id):
            return SimpleNamespace(status=SimpleNamespace(value=self.status), start_time=None, runtime_env={})

        def get_job_logs(self, job_id):
            return "one\ntwo\n" if self.sent == 1 else "one\ntwo\nthree\nfour\n"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_commands, "AGAIN_S", 0.0)
        assert job_commands.follow_job(Client(), Place("http://h:1", "--address"), "x", make_console()) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(("note", "x:"))]
    assert shown == ["one", "two", "three", "four"]
