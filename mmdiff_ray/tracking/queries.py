"""Read from MLflow: runs by name or job, their children, artifacts and metrics."""

import contextlib
from pathlib import Path, PurePosixPath
from typing import Any

from mmdiff_ray.config import ConfigError, without_passwords
from mmdiff_ray.tracking import store
from mmdiff_ray.tracking.provenance import JOB_TAG
from mmdiff_ray.tracking.sender import LOCAL_PREFIX, Sender

Run = Any
"""mlflow.entities.Run"""


def find_run(uri: str, reference: str) -> Run:
    """Return the run with an id or local id, or the newest run with a name or a run folder's name.

    Raises ConfigError with the newest top-level runs if there is none.
    """
    if reference.startswith(LOCAL_PREFIX):
        return store.client(uri).get_run(Sender(uri, reference).run_id)
    name = PurePosixPath(reference).name.replace("'", "")
    for condition in (f"attributes.run_id = '{name}'", f"attributes.run_name = '{name}'"):
        if found := _search(uri, condition):
            return found[0]
    newest = [run for run in _search(uri) if "mlflow.parentRunId" not in run.data.tags]
    names = ", ".join(run.info.run_name for run in newest[:5]) or "none"
    raise ConfigError(f"no run {reference!r} in {without_passwords(uri)}; newest: {names}")


def children(uri: str, parent: Run) -> list[Run]:
    """Return the child runs of a run, oldest first."""
    client, found, token = store.client(uri), [], None
    condition = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    while token != "":
        experiments, order = [parent.info.experiment_id], ["start_time ASC"]
        page = client.search_runs(experiments, condition, order_by=order, page_token=token)
        found += page
        token = page.token or ""
    return found


def artifact(uri: str, run_id: str, path: str, place: Path) -> Path | None:
    """Download an artifact of a run to `place/<run id>`; return None if the run lacks it."""
    client, folder = store.client(uri), str(PurePosixPath(path).parent)
    if path not in [file.path for file in client.list_artifacts(run_id, "" if folder == "." else folder)]:
        return None
    target = place / run_id
    target.mkdir(parents=True, exist_ok=True)
    return Path(client.download_artifacts(run_id, path, str(target)))


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """Return a metric as sorted (step, value); of a step recorded twice, after a resume, the later value."""
    points = store.client(uri).get_metric_history(run_id, key)
    ordered = sorted(points, key=lambda point: (point.step, point.timestamp))
    return sorted({point.step: point.value for point in ordered}.items())


def runs_of_job(uri: str, job: str) -> list[Run]:
    """Return the runs of a submitted job, newest first; none if the store does not answer this user.

    uri: as in the job's metadata, without the password; MLFLOW_TRACKING_URI may contain it.
    """
    server = store.is_server(uri)
    if not (store.reachable(uri) if server else uri and store.sqlite_file(uri).is_file()):
        return []
    store.prepare(uri)
    from mlflow.exceptions import MlflowException

    try:
        return _search(uri, f"tags.`{JOB_TAG}` = '{job}'")
    except MlflowException:
        return []


def page_of_job(uri: str, experiment: str, job: str) -> str:
    """Return the link to MLflow's page of a job's runs, or how to find them.

    uri: "" if only the cluster knows its store. Raises ConfigError if the experiment was deleted.
    """
    condition = f"tags.`{JOB_TAG}` = '{job}'"
    if uri and not store.is_server(uri):
        return store.ui_link(uri)
    if uri and store.reachable(uri):
        store.prepare(uri)
        from mlflow.exceptions import MlflowException

        with contextlib.suppress(MlflowException):  # the server does not show its experiments to this user
            return store.ui_link(uri, store.get_or_create_experiment(uri, experiment), search=condition)
    place = without_passwords(uri) or "MLFLOW_TRACKING_URI of the cluster"
    return f"{place} (search there: {condition})"


def _search(uri: str, condition: str = "") -> list[Run]:
    """Return up to 1,000 matching runs of all experiments, newest first."""
    client = store.client(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, condition, order_by=["start_time DESC"]))
