"""The MLflow store: its URI, client, experiments and UI links."""

import logging
import os
import shlex
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from mmdiff_ray.config import ConfigError, without_passwords

CLIENT_SETTINGS = {
    # The tracker retries itself, so requests must fail fast. (MLflow's defaults: 120 s and 7 retries.)
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # its links open the GenAI view
}
SQLITE = "sqlite:///"
TRAINING_VIEW = {"workflowType": "machine_learning"}
"""Query of the UI's view of training runs; without it, MLflow 3 opens its GenAI view."""
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
HEALTH_S = 5.0


def tracking_uri(explicit: str | None, runs: str | Path) -> str:
    """Return the tracking URI: the explicit one, else MLFLOW_TRACKING_URI, else SQLite in the runs folder.

    The path of an SQLite file becomes absolute, because workers run in other working folders.
    Raises ConfigError for a plain folder, or if runs are in object storage and no URI is set.
    """
    given = explicit or os.environ.get("MLFLOW_TRACKING_URI")
    if not given and "://" in str(runs):
        raise ConfigError(
            f"tracking.uri: runs in {runs} need an MLflow store; set tracking.uri=http://host:5000, "
            "tracking.uri=sqlite:////path/to/mlflow.db or MLFLOW_TRACKING_URI"
        )
    uri = with_credentials(given or f"{SQLITE}{Path(runs).absolute() / 'mlflow.db'}")
    if uri.startswith("file:") or ("://" not in uri and not uri.startswith("databricks")):
        raise ConfigError(
            f"tracking.uri ({without_passwords(uri)}) is a folder, which MLflow 3 does not support; "
            "use sqlite:////path/to/mlflow.db or a server, http://host:5000"
        )
    return f"{SQLITE}{sqlite_file(uri)}" if uri.startswith(SQLITE) else uri


def sqlite_file(uri: str) -> Path:
    """Return the absolute path of an SQLite URI's file."""
    return Path(uri.removeprefix(SQLITE)).absolute()


def with_credentials(uri: str, *known: str) -> str:
    """Add the user and password of a known URI, or of MLFLOW_TRACKING_URI, to the same URI without them."""
    candidates = [*known, os.environ.get("MLFLOW_TRACKING_URI", "")]
    return next((one for one in candidates if one and without_passwords(one) == uri), uri)


def prepare(uri: str) -> None:
    """Import MLflow and set its request limits, unless the environment sets them.

    Call this before any thread uses MLflow: two threads that import its modules at once both fail.
    """
    for name, value in CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow

    if not is_server(uri):
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


def client(uri: str) -> Any:
    """Return an MLflow client. Creates a missing SQLite file, which takes seconds."""
    prepare(uri)
    from mlflow import MlflowClient

    for name in (
        "alembic",
        "mlflow.store.db.utils",
        "urllib3.connectionpool",
    ):  # they log a line per table or retry
        logging.getLogger(name).setLevel(logging.ERROR)
    return MlflowClient(with_credentials(uri))


def get_or_create_experiment(uri: str, name: str) -> str:
    """Return the id of an experiment. Raises ConfigError if it was deleted.

    An SQLite store keeps artifacts in `mlartifacts` beside its file; a server chooses their location itself.
    """
    from mlflow.exceptions import MlflowException

    mlflow, place = client(uri), None
    if uri.startswith(SQLITE):
        place = (sqlite_file(uri).parent / "mlartifacts" / quote(name, safe="")).as_uri()
    if mlflow.get_experiment_by_name(name) is None:
        try:
            mlflow.create_experiment(name, artifact_location=place, tags=EXPERIMENT_TAGS)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was faster
                raise
    found = mlflow.get_experiment_by_name(name)
    if found.lifecycle_stage == "deleted":
        raise ConfigError(
            f"tracking.experiment ({name}) was deleted in {without_passwords(uri)}; restore it or use another"
        )
    return found.experiment_id


def is_server(uri: str) -> bool:
    """Return whether a URI is an MLflow server, not an SQLite file."""
    return uri.startswith(("http://", "https://"))


def reachable(uri: str, timeout_s: float = HEALTH_S) -> bool:
    """Return whether a server answers in time. MLflow's own client would wait for minutes."""
    try:
        with urllib.request.urlopen(f"{without_passwords(uri).rstrip('/')}/health", timeout=timeout_s):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError) as error:  # MLflow's client may trust certificates that Python does not
        return isinstance(getattr(error, "reason", None), ssl.SSLError)


def ui_link(uri: str, experiment: str = "", run: str = "", search: str = "") -> str:
    """Return a link into the UI of a server, or the command that opens the UI of an SQLite file.

    experiment, run: ids. Without both, the link opens the list of experiments; without run, the experiment's
    runs. search: filter for those runs, in MLflow's search syntax.
    """
    uri = without_passwords(uri)
    if not is_server(uri):
        return f"MLFLOW_TRACKING_URI={shlex.quote(uri)} mmdiff ui"
    page = f"/{experiment}/runs" + (f"/{run}" if run else "") if experiment else ""
    query = ({"searchFilter": search} if search else {}) | TRAINING_VIEW
    return f"{uri.rstrip('/')}/#/experiments{page}?{urlencode(query, quote_via=quote)}"
