"""Run a command on a cluster: check it here, pack the code, hand both to the cluster's job server."""

import argparse
import dataclasses
import os
import re
import secrets
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from mmdiff_ray import config as configuration
from mmdiff_ray.config import IN_STORAGE, IN_TRACKING, Config, ConfigError, named, refuse_password
from mmdiff_ray.data.storage import is_uri
from mmdiff_ray.distributed import package
from mmdiff_ray.distributed.ahead import check_ahead, check_paths, look_at_runs
from mmdiff_ray.distributed.job_server import Place, connect, find_place, server_errors
from mmdiff_ray.sweeps.spec import any_config, load_sweep, whole_text
from mmdiff_ray.tracking.jobs import JOB_VARIABLE, REVISION_VARIABLE, page_of_job
from mmdiff_ray.tracking.provenance import git_revision
from mmdiff_ray.tracking.store import shown, tracking_uri, without_passwords

COMMANDS = (
    "train",
    "evaluate",
    "generate",
    "experiment",
    "sweep",
    "sync",
    "data_build",
    "data_inspect",
    "data_embed",
)
EXPERIMENTS = Path("pipelines/configs/experiments")
NAMED = ("uri", "out")
"""Arguments of commands that name a folder or a URI, beside `--runs`."""
PASSED_ON = ("MLFLOW_", "AWS_")
OF_THIS_MACHINE = (
    "AWS_CA_BUNDLE",
    "AWS_CONFIG_FILE",
    "AWS_CONTAINER_",
    "AWS_DEFAULT_PROFILE",
    "AWS_EC2_METADATA_",
    "AWS_PROFILE",
    "AWS_ROLE_",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
)
"""How variables begin that name files here (a profile is in one), or say where this machine finds its
credentials, which would hide those of the cluster's machines; another cluster gets them by --env alone."""
CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_CONFIG_FILE",
    "AWS_CONTAINER_",
    "AWS_DEFAULT_PROFILE",
    "AWS_PROFILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
)
"""How variables begin that lead a job to credentials for S3."""
STOP_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
STOP_S = 120
"""How long a job that is stopped may take for its checkpoint before Ray kills it (Ray's own: 3 s)."""


def submit(
    given: argparse.Namespace, words: Sequence[str], known: argparse.Namespace, console: Console
) -> str:
    """Hand a command to a cluster and return the job's id.

    given: the arguments of `mmdiff submit`; words: the command; known: the command's own arguments. Raises
    ConfigError for all that is wrong with it before anything is uploaded.
    """
    if known.run not in COMMANDS:
        names = ", ".join(name.replace("_", " ") for name in COMMANDS)
        raise ConfigError(f"submit runs one of {names}; got {' '.join(words[:2])}")
    for word in words:  # Ray shows a job's command to everyone, and so does `ps` on its machines
        with named("submit"):
            refuse_password(word, IN_TRACKING if word.startswith("tracking.") else IN_STORAGE)
    words = _with_workers(words, known, given.num_workers)
    place = find_place(given.address)
    config = _config(known)
    folder = _folder(given.folder, place, config, known)
    here = place.local is not None and folder == str(Path.cwd())
    for sentence in _checked(config, known, here):
        console.print(sentence, soft_wrap=True)
    variables = environment(given.env, here=place.local is not None)
    named_files = [file for _, file in _named(words, known).values()]
    files = package.contents(Path.cwd(), named_files)
    if keys := package.left_keys(Path.cwd(), files):
        named_keys = ", ".join(keys[: package.SHOWN_FILES]) + (", ..." if keys[package.SHOWN_FILES :] else "")
        console.print(f"note      not sent, for these are names of keys: {named_keys}", soft_wrap=True)
    if place.local is None:
        for sentence in [*_loopback(config, variables), *_no_keys(words, named_files, config, variables)]:
            console.print(sentence, soft_wrap=True)
    if passed := sorted(variables.keys() - {STOP_VARIABLE}):
        console.print(f"variables {', '.join(passed)}", soft_wrap=True)
    size = package.check_size(files)
    client = connect(place)
    job = f"{_slug(given.name or _name(known, config))}-{secrets.token_hex(3)}"
    store = _store(known, config, variables, folder if place.local else None)
    experiment = config.tracking.experiment if config else "mmdiff"
    page = page_of_job(store, experiment, job)  # first: an experiment that was deleted is told here
    with tempfile.TemporaryDirectory(prefix="mmdiff-") as stage, server_errors(place):
        package.stage(files, Path(stage))
        if known.run == "sweep":  # relative names in it are of this folder, and the job starts in another
            for file, place_there in package.places(named_files, Path.cwd()).items():
                (Path(stage) / place_there).write_text(whole_text(file), encoding="utf8")
        _send(
            client, job, stage, entrypoint(words, known, folder), variables, given.pip, _facts(words, store)
        )
    console.print(f"sent      {len(files)} files, {size / 2**20:.1f} MiB")
    console.print(f"job       {job}, at {place}", soft_wrap=True)
    console.print(f"MLflow    {page}", soft_wrap=True)
    return job


def environment(given: Sequence[str], here: bool, around: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that a job gets: MLFLOW_*, AWS_*, and those of --env, which go before.

    given: NAME=VALUE, or NAME for the value here. here: whether the cluster is this machine.
    """
    found = {
        name: value
        for name, value in around.items()
        if name.startswith(PASSED_ON) and (here or not name.startswith(OF_THIS_MACHINE))
    }
    if uri := found.get("MLFLOW_TRACKING_URI"):
        found["MLFLOW_TRACKING_URI"] = tracking_uri(uri, ".")
    found[STOP_VARIABLE] = str(STOP_S)
    for word in given:
        name, equals, value = word.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError("--env wants NAME=VALUE or NAME, a name of letters, digits and _")
        if not equals and name not in around:
            raise ConfigError(f"--env {name}: there is no such variable here; write --env {name}=VALUE")
        found[name] = value if equals else around[name]
    if not re.fullmatch(r"[0-9]+", found[STOP_VARIABLE]):
        raise ConfigError(
            f"--env {STOP_VARIABLE}: got {found[STOP_VARIABLE]!r}, want whole seconds, such as {STOP_S}"
        )
    return found


def entrypoint(words: Sequence[str], known: argparse.Namespace, folder: str | None) -> str:
    """Return the shell command of a job, which starts in the package and goes to the folder.

    `exec` leaves no shell between Ray and the driver, which gets Ray's SIGTERM itself.
    """
    named = _named(words, known)
    places = package.places([file for _, file in named.values()], Path.cwd())
    there = {word: (before, places[file]) for word, (before, file) in named.items()}
    at = ["-C", shlex.quote(folder)] if folder else []
    shell = [_shell(*there[word]) if word in there else shlex.quote(word) for word in words]
    return " ".join(["exec python -m mmdiff_ray.cli", *at, *shell])


def _shell(before: str, place: str) -> str:
    """Return a word for the shell that names a file of the package by its place there."""
    return f'{shlex.quote(before) if before else ""}"$PWD"/{shlex.quote(place)}'


def _named(words: Sequence[str], known: argparse.Namespace) -> dict[str, tuple[str, Path]]:
    """Return the words that name a file which the job needs: word -> (what stands before the name, file)."""
    found: dict[str, tuple[str, Path]] = {}
    for word in words:
        before, _, value = word.partition("=")
        if known.run == "train" and word == known.config:
            found[word] = ("", Path(word))
        elif known.run == "experiment" and word == known.name:
            file = Path(word) if word.endswith(".yaml") else EXPERIMENTS / f"{word}.yaml"
            found |= {word: ("", file)} if file.is_file() else {}
        elif known.run == "sweep" and word == known.file and Path(word).is_file():
            found[word] = ("", Path(word))
        elif word in getattr(known, "given", []) and Path(value).is_file():
            found[word] = (f"{before}=", Path(value))
    return found


def _with_workers(words: Sequence[str], known: argparse.Namespace, count: int | None) -> list[str]:
    if count is None:
        return list(words)
    if known.run != "train":
        raise ConfigError("--num-workers is for train; other commands have --workers of their own")
    known.overrides = [*known.overrides, f"workers.count={count}"]
    return [*words, f"workers.count={count}"]


def _config(known: argparse.Namespace) -> Config | None:
    """Return the configuration that would be trained; None for what has none here."""
    if known.run != "train" or known.resume:
        return None
    return configuration.load([known.config], known.overrides, {"name": Path(known.config).stem})


def _folder(given: str | None, place: Place, config: Config | None, known: argparse.Namespace) -> str | None:
    """Return the folder of the cluster that relative paths start from; None where there are none."""
    if given is not None:
        if not Path(given).is_absolute():
            raise ConfigError(f"--folder ({given}) must be an absolute path, on the cluster")
        return given
    if place.local is not None:
        return str(Path.cwd())
    elsewhere = known.run == "sync" and Path(known.folder).is_absolute()
    if config is None and not elsewhere and not all(map(is_uri, _places(known))):
        raise ConfigError(
            "give --folder DIR: the folder, shared by all nodes of the cluster, where runs/ and data/ are"
        )
    if config is not None:
        check_paths(config)
    elif known.run == "sweep" and known.file not in (None, "report"):
        check_paths(dataclasses.replace(any_config(load_sweep(known.file, known.overrides)), runs=known.runs))
    return None


def _places(known: argparse.Namespace) -> list[str]:
    """Return what a command names of the cluster: where runs are, what is read, where the result goes."""
    if known.run == "sync":
        return [known.folder]
    run = getattr(known, "model", None) or getattr(known, "resume", None) or ""
    named = (
        run if is_uri(run) else getattr(known, "runs", None),
        *(getattr(known, name, None) for name in NAMED),
    )
    return [str(place) for place in named if place is not None]


def _checked(config: Config | None, known: argparse.Namespace, here: bool) -> list[str]:
    if config is None:
        where = str(getattr(known, "runs", ""))
        return [f"note      {note}" for note in look_at_runs(where)] if is_uri(where) else []
    first, *notes = check_ahead(config, here)
    return [f"config    {config.name}: {first}", *(f"note      {note}" for note in notes)]


def _store(
    known: argparse.Namespace, config: Config | None, variables: Mapping[str, str], folder: str | None
) -> str:
    """Return where the job's runs will be recorded; nothing where only the cluster knows.

    folder: where relative paths start, on a cluster of this machine; None elsewhere.
    """
    named = (config.tracking.uri if config else None) or variables.get("MLFLOW_TRACKING_URI")
    runs = str(config.runs if config else getattr(known, "runs", "runs"))
    if named or (folder and not is_uri(runs)):
        return tracking_uri(named, Path(folder or ".") / runs)
    return ""


def _no_keys(
    words: Sequence[str], files: Sequence[Path], config: Config | None, variables: Mapping[str, str]
) -> list[str]:
    """Return a note where a command uses S3 and no credentials go along; else nothing."""
    texts = [*words, *(file.read_text(encoding="utf8") for file in files if file.suffix in (".yaml", ".yml"))]
    texts += [config.runs, *(source.uri for source in config.data.sources)] if config else []
    if any(name.startswith(CREDENTIALS) for name in variables) or not any("s3://" in text for text in texts):
        return []
    return ["note      no AWS credentials go with the job: the cluster's machines need their own for s3://"]


def _loopback(config: Config | None, variables: Mapping[str, str]) -> list[str]:
    """Return a warning where a cluster elsewhere would look for MLflow on its own nodes; else nothing."""
    named = {
        "tracking.uri": config.tracking.uri if config else None,
        "MLFLOW_TRACKING_URI": variables.get("MLFLOW_TRACKING_URI"),
    }
    for name, uri in named.items():
        if uri:
            host = urlsplit(uri).hostname or ""
            if host != "localhost" and not host.startswith("127.") and host != "::1":
                return []
            return [
                f"warning   {name} ({shown(uri)}) is this machine alone: on the cluster that address leads "
                "each node to itself. If MLflow is not there, name it as the nodes reach it, or leave it out "
                "(env -u MLFLOW_TRACKING_URI)"
            ]
    return []


def _facts(words: Sequence[str], store: str) -> dict[str, str]:
    """Return what a job carries for those who look at it; no secret."""
    return {"mmdiff.command": without_passwords(shlex.join(words)), "mmdiff.tracking_uri": shown(store)}


def _send(
    client: Any,
    job: str,
    stage: str,
    command: str,
    variables: Mapping[str, str],
    pip: bool,
    facts: Mapping[str, str],
) -> None:
    revision = git_revision(package.code_folder() / package.CODE[0])
    own = {JOB_VARIABLE: job, **({REVISION_VARIABLE: f"{revision[0]} {revision[1]}"} if revision else {})}
    runtime: dict[str, Any] = {"working_dir": stage, "env_vars": {**variables, **own}}
    if pip:
        runtime["pip"] = requirements(Path(stage))
    client.submit_job(entrypoint=command, submission_id=job, runtime_env=runtime, metadata=dict(facts))


def requirements(stage: Path) -> list[str]:
    """Return what a job with --pip installs first. Raises ConfigError where nothing says it."""
    lock = stage / package.LOCK
    if not lock.is_file():
        raise ConfigError(f"--pip installs from {package.LOCK}, which is not in this folder")
    lines = (line.partition("#")[0].strip() for line in lock.read_text(encoding="utf8").splitlines())
    return [line for line in lines if line]


def _name(known: argparse.Namespace, config: Config | None) -> str:
    if config is not None:
        return config.name
    named = (
        getattr(known, "resume", None)
        or getattr(known, "model", None)
        or getattr(known, "name", None)
        or getattr(known, "file", None)
    )
    return Path(named).stem if named else known.run


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-") or "job"
