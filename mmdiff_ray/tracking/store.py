"""Where runs are recorded: the address of MLflow's store, its client, its experiments."""

import logging
import os
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mmdiff_ray.config import ConfigError, without_passwords

# A request to a server that does not answer must end; the tracker tries again. (MLflow's own: 120 s and 7
# retries.)
CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # its links do not open the view of training runs
}
SQLITE = "sqlite:///"
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Opens the experiment in MLflow's view of training runs rather than that of language-model applications."""


def tracking_uri(explicit: str | None, runs: str | Path) -> str:
    """Return the store's address: the explicit one, else MLFLOW_TRACKING_URI, else SQLite beside the runs.

    The path of an SQLite file is made absolute, since workers have working folders of their own.
    Raises ConfigError for a plain folder, which MLflow no longer records into, and where runs lie in storage
    (s3://...) and no store is named.
    """
    named = explicit or os.environ.get("MLFLOW_TRACKING_URI")
    if not named and "://" in str(runs):
        raise ConfigError(
            f"tracking.uri: runs in {runs} have no folder for MLflow's own file; name a store, "
            "tracking.uri=http://host:5000 or sqlite:////path/to/mlflow.db, or set MLFLOW_TRACKING_URI"
        )
    uri = full(named or f"{SQLITE}{Path(runs).absolute() / 'mlflow.db'}")
    if uri.startswith("file:") or ("://" not in uri and not uri.startswith("databricks")):
        raise ConfigError(
            f"tracking.uri ({shown(uri)}) is a folder, which MLflow no longer records into; "
            "write sqlite:////path/to/mlflow.db or the address of a server, http://host:5000"
        )
    return f"{SQLITE}{sqlite_file(uri)}" if uri.startswith(SQLITE) else uri


def sqlite_file(uri: str) -> Path:
    """Return the absolute path of the file of an SQLite address."""
    return Path(uri.removeprefix(SQLITE)).absolute()


def shown(uri: str) -> str:
    """Return an address as it is stored and shown: without the user, password or token it may carry."""
    return without_passwords(uri)


def full(uri: str, *known: str) -> str:
    """Return a stored address with the user and password that a known one of the same store has, or that in
    MLFLOW_TRACKING_URI."""
    around = [*known, os.environ.get("MLFLOW_TRACKING_URI", "")]
    return next((address for address in around if address and shown(address) == uri), uri)


def ui_command(uri: str) -> str:
    """Return what a person types, or opens, to look at the runs of a store."""
    if uri.startswith(("http://", "https://")):
        return f"open {shown(uri)}"
    return f"mlflow ui --backend-store-uri {shlex.quote(shown(uri))}"


def is_unknown(error: Exception | None) -> bool:
    """Return whether an error is the store's answer that there is no such run."""
    return getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"


def prepare(uri: str) -> None:
    """Import MLflow and set its request limits for this process, where the environment does not set its own.

    To be called before a thread uses MLflow: its modules import each other in circles, so that two threads
    which import it at the same time both fail.
    """
    for name, value in CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow

    if not uri.startswith(("http://", "https://")):
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


def client(uri: str) -> Any:
    """Return MLflow's client of a store, whose address may be the stored one. A missing SQLite file is
    created, which takes seconds."""
    prepare(uri)
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils", "urllib3.connectionpool"):  # a line per table, per retry
        logging.getLogger(name).setLevel(logging.ERROR)
    return MlflowClient(full(uri))


def get_or_create_experiment(uri: str, name: str) -> str:
    """Return the id of the experiment of a name.

    With SQLite its artifacts lie beside the file, in `mlartifacts`; a server decides itself.
    Raises ConfigError where the experiment was deleted.
    """
    mlflow_client = client(uri)
    found = mlflow_client.get_experiment_by_name(name) or _create(mlflow_client, uri, name)
    if found.lifecycle_stage == "deleted":
        raise ConfigError(
            f"tracking.experiment ({name}) was deleted in {shown(uri)}; restore it or name another"
        )
    return found.experiment_id


def _create(mlflow_client: Any, uri: str, name: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        mlflow_client.create_experiment(name, artifact_location=_artifacts(uri, name), tags=KIND)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was faster
            raise
    return mlflow_client.get_experiment_by_name(name)


def _artifacts(uri: str, name: str) -> str | None:
    if not uri.startswith(SQLITE):
        return None
    return (sqlite_file(uri).parent / "mlartifacts" / quote(name, safe="")).as_uri()
