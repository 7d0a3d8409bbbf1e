"""Submit a command to a Ray cluster: check it on this machine, pack the code, send both to the job server."""

import argparse
import dataclasses
import os
import re
import secrets
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from mmdiff_ray import config as configuration
from mmdiff_ray.config import (
    IN_STORAGE,
    IN_TRACKING,
    Config,
    ConfigError,
    UnreachableError,
    check_changes,
    named,
    refuse_password,
    without_passwords,
)
from mmdiff_ray.data.manifest import Manifest
from mmdiff_ray.distributed import jobs
from mmdiff_ray.jobs import package
from mmdiff_ray.runs import folder as runs
from mmdiff_ray.runs import job
from mmdiff_ray.storage.filesystem import is_uri
from mmdiff_ray.storage.retry import with_timeout
from mmdiff_ray.sweeps.spec import first_valid_config, load_sweep
from mmdiff_ray.tracking.provenance import JOB_VARIABLE, REVISION_VARIABLE, git_revision
from mmdiff_ray.tracking.queries import page_of_job
from mmdiff_ray.tracking.store import tracking_uri

COMMANDS = (
    *("train", "evaluate", "generate", "experiment", "sweep", "sync"),
    *("data build", "data inspect", "data embed"),
)
LOCK = "requirements.lock"
ANSWER_S = 20.0
PASSED_ON = ("MLFLOW_", "AWS_")
OF_THIS_MACHINE = (
    *("AWS_CA_BUNDLE", "AWS_CONFIG_FILE", "AWS_CONTAINER_", "AWS_DEFAULT_PROFILE", "AWS_EC2_METADATA_"),
    *("AWS_PROFILE", "AWS_ROLE_", "AWS_SHARED_CREDENTIALS_FILE", "AWS_WEB_IDENTITY_TOKEN_FILE"),
    *("MLFLOW_TRACKING_CLIENT_CERT_PATH", "MLFLOW_TRACKING_SERVER_CERT_PATH"),
)
"""Prefixes of variables that refer to files or roles of this machine. On another cluster they would override
its own credentials, so they are sent there only by `--env`."""


def submit(
    given: argparse.Namespace, words: Sequence[str], known: argparse.Namespace, console: Console
) -> str:
    """Submit a command and return the job's id.

    given: arguments of `mmdiff submit`. words: the command. known: the command's parsed arguments.
    Raises ConfigError, before any upload, if the command cannot run.
    """

    def say(label: str, text: str) -> None:
        console.print(f"{label:10}{text}", soft_wrap=True)

    words = _with_workers(words, known, given.num_workers)
    _check_command(words, known)
    server = jobs.find_server(given.address)
    here = server.local is not None
    config = None
    if known.command == "train" and not known.resume:
        config = configuration.load([known.config], known.overrides, {"name": Path(known.config).stem})
    folder = given.folder or (str(Path.cwd()) if here else None)
    check_paths(folder, config, known)
    for label, text in check_ahead(config, known, here and folder == str(Path.cwd())):
        say(label, text)
    variables = environment(given.env, here)
    if not here and (warning := loopback_warning(config, variables)):
        say("warning", warning)
    if variables:
        say("variables", ", ".join(sorted(variables)))
    client = jobs.connect(server)
    job_id = f"{_slug(given.name or _name(known, config))}-{secrets.token_hex(3)}"
    store = _store(known, config, variables, folder if here else None)
    page = page_of_job(store, config.tracking.experiment if config else "mmdiff", job_id)
    metadata = {
        jobs.COMMAND_KEY: without_passwords(shlex.join(words)),
        jobs.TRACKING_KEY: without_passwords(store),
    }
    runtime: dict[str, Any] = {"env_vars": _job_variables(job_id) | variables}
    if given.pip:
        runtime["pip"] = str(lock_file())
    files, keys = package.select(Path.cwd())
    with tempfile.TemporaryDirectory(prefix="mmdiff-") as stage, jobs.server_errors(server):
        runtime["working_dir"] = str(Path(stage) / "package.zip")
        entrypoint, sent = package.with_named_files(words, known, folder, Path(stage))
        if keys := [key for key in keys if key not in sent]:
            say("note", f"not sent, because they look like keys: {', '.join(keys)}")
        size = package.pack(files | sent, Path(runtime["working_dir"]))
        client.submit_job(
            entrypoint=entrypoint,
            submission_id=job_id,
            runtime_env=runtime,
            metadata=metadata | {jobs.PAGE_KEY: page},
        )
    say("sent", f"{len(files | sent)} files, {size / 2**20:.1f} MiB")
    say("job", f"{job_id}, at {without_passwords(server.url)}")
    say("MLflow", page)
    return job_id


def _with_workers(words: Sequence[str], known: argparse.Namespace, count: int | None) -> list[str]:
    if count is None:
        return list(words)
    if known.command != "train":
        raise ConfigError("--num-workers is for train; other commands have --workers")
    known.overrides = [*known.overrides, f"workers.count={count}"]
    return [*words, f"workers.count={count}"]


def _check_command(words: Sequence[str], known: argparse.Namespace) -> None:
    """Raise ConfigError for a command that clusters cannot run, or that contains a password."""
    if known.command not in COMMANDS:
        names = ", ".join(COMMANDS)
        raise ConfigError(f"submit runs one of {names}; got {' '.join(words[:2])}")
    for word in words:  # Ray's dashboard and `ps` show a job's command to everyone
        with named("submit"):
            refuse_password(word, IN_TRACKING if word.startswith("tracking.") else IN_STORAGE)


def check_paths(folder: str | None, config: Config | None, known: argparse.Namespace) -> None:
    """Raise ConfigError for a relative path, unless a folder on the cluster is given to resolve it."""
    paths: list[tuple[str, Any]]
    if folder is not None:
        if not Path(folder).is_absolute():
            raise ConfigError(f"--folder ({folder}) must be an absolute path on the cluster")
        return
    if known.command == "sweep" and known.file not in (None, "report"):
        config = dataclasses.replace(
            first_valid_config(load_sweep(known.file, known.overrides)), runs=known.runs
        )
    if config is not None:
        paths = [("runs", config.runs), *(("data.sources", source.uri) for source in config.data.sources)]
    else:
        run = getattr(known, "model", None) or getattr(known, "resume", None) or ""
        paths = [(f"--{name}", getattr(known, name, None)) for name in ("folder", "uri", "out")]
        paths += [("--runs", run if is_uri(run) else getattr(known, "runs", None))]
    for name, path in paths:
        if path is not None and not is_uri(str(path)) and not Path(path).is_absolute():
            raise ConfigError(
                f"{name} ({path}) is a relative path, which means nothing on another machine; use an "
                "absolute path or URI, or set --folder DIR to a folder on the cluster's shared disk"
            )


def check_ahead(config: Config | None, known: argparse.Namespace, here: bool) -> list[tuple[str, str]]:
    """Check a command as far as this machine can; return lines to print, as (label, text).

    here: whether the cluster's paths are valid on this machine. Raises ConfigError if the command cannot run.
    """
    notes: list[tuple[str, str]] = []

    def answer(what: str, function: Callable[[], Any]) -> Any:
        try:
            return with_timeout(ANSWER_S, function, f"{what} does not answer this machine")
        except UnreachableError as error:
            notes.append(("note", f"not checked: {error}"))

    where = str(config.runs if config else getattr(known, "runs", ""))
    if is_uri(where):
        answer(f"runs: {where}", lambda: runs.open_storage(where))
    if config is None:
        return notes
    if here:
        job.prepare(config, Path("unused"))
        return [("config", f"{config.name}: checked against its data"), *notes]
    from mmdiff_ray.evaluation.run import evaluators

    evaluators(config)
    check_changes(config)
    manifests = answer("data.sources", lambda: _manifests(config))
    if manifests is None:
        return [("config", f"{config.name}: checked without its data: names, numbers, tasks"), *notes]
    job.fit(config, manifests)
    return [("config", f"{config.name}: checked against its data"), *notes]


def _manifests(config: Config) -> list[Manifest]:
    """Return the manifests of a job's data. Raises UnreachableError if they are on the cluster only."""
    for uri in (source.uri for source in config.data.sources):
        if not is_uri(uri) and not (Path(uri).is_absolute() and Path(uri).exists()):
            raise UnreachableError(f"{uri} is a folder on the cluster")
    return job.read_sources(config)


def environment(given: Sequence[str], here: bool, around: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment variables of a job: MLFLOW_*, AWS_*, overridden by those of --env.

    given: NAME=VALUE, or NAME for this machine's value. here: whether the cluster is this machine.
    """
    found = {
        name: value
        for name, value in around.items()
        if name.startswith(PASSED_ON) and (here or not name.startswith(OF_THIS_MACHINE))
    }
    if uri := found.get("MLFLOW_TRACKING_URI"):
        found["MLFLOW_TRACKING_URI"] = tracking_uri(uri, ".")
    for word in given:
        name, equals, value = word.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError("--env must be NAME=VALUE or NAME, a name of letters, digits and _")
        if not equals and name not in around:
            raise ConfigError(f"--env {name}: no such variable here; write --env {name}=VALUE")
        found[name] = value if equals else around[name]
    stop_s = found.get(jobs.STOP_VARIABLE, "1")
    if not re.fullmatch(r"[0-9]+", stop_s):
        raise ConfigError(
            f"--env {jobs.STOP_VARIABLE} ({stop_s}) must be whole seconds, such as {jobs.STOP_S}"
        )
    return found


def loopback_warning(config: Config | None, variables: Mapping[str, str]) -> str | None:
    """Return a warning if MLflow's address is localhost, which on the cluster is the node itself."""
    uri = (config.tracking.uri if config else None) or variables.get("MLFLOW_TRACKING_URI") or ""
    host = urlsplit(uri).hostname or ""
    if host not in ("localhost", "::1") and not host.startswith("127."):
        return None
    return (
        f"MLflow at {without_passwords(uri)}: on the cluster, that address is each node itself. Set "
        "MLFLOW_TRACKING_URI to MLflow's address there, or unset it (env -u MLFLOW_TRACKING_URI)"
    )


def lock_file() -> Path:
    """Return the lock file that `--pip` installs: in this folder, else beside the imported code."""
    for folder in (Path.cwd(), package.code_folder()):
        if (folder / LOCK).is_file():
            return folder / LOCK
    raise ConfigError(f"--pip installs from {LOCK}, which is neither in this folder nor beside the code")


def _job_variables(job_id: str) -> dict[str, str]:
    revision = git_revision(package.code_folder() / package.CODE[0])
    return {jobs.STOP_VARIABLE: str(jobs.STOP_S), JOB_VARIABLE: job_id} | (
        {REVISION_VARIABLE: f"{revision[0]} {revision[1]}"} if revision else {}
    )


def _store(
    known: argparse.Namespace, config: Config | None, variables: Mapping[str, str], folder: str | None
) -> str:
    """Return the tracking URI of the job's runs; "" if only the cluster knows it.

    folder: base of relative paths, if the cluster is this machine.
    """
    uri = (config.tracking.uri if config else None) or variables.get("MLFLOW_TRACKING_URI")
    where = str(config.runs if config else getattr(known, "runs", "runs"))
    return tracking_uri(uri, Path(folder or ".") / where) if uri or (folder and not is_uri(where)) else ""


def _name(known: argparse.Namespace, config: Config | None) -> str:
    keys = ("resume", "model", "name", "file")
    named = next((value for key in keys if (value := getattr(known, key, None))), None)
    return config.name if config else Path(named).stem if named else known.command


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-") or "job"
