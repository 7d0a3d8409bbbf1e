"""The tie between a job on a cluster and its runs: every run that it begins or goes on with has its id as a
tag."""

import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from mmdiff_ray.tracking import store

JOB_TAG = "mmdiff.job_id"
"""On a run: the job that began it or went on with it last."""
RUN_KEY = "mmdiff.run_id"
"""In a job's metadata: the run that it began or went on with."""
JOB_VARIABLE = "MMDIFF_JOB_ID"
"""Set for a job's processes at its submission."""
REVISION_VARIABLE = "MMDIFF_REVISION"
"""The commit of a submitted job's code and how many files differ from it."""
ANSWER_S = 5.0


@dataclass(frozen=True)
class RunOfJob:
    """One run of a job. page: its address in MLflow's page, or how to open that page."""

    run_id: str
    name: str
    status: str
    page: str


def condition(job: str) -> str:
    """Return what finds a job's runs in MLflow's search."""
    return f"tags.`{JOB_TAG}` = '{job}'"


def page_of_job(uri: str, experiment: str, job: str) -> str:
    """Return the address of MLflow's page with a job's runs alone, or how to find them.

    uri: nothing where only the cluster knows its store. Raises ConfigError where the experiment was deleted.
    """
    if not uri:
        return f"where MLFLOW_TRACKING_URI of the cluster says (search there: {condition(job)})"
    if not is_server(uri):
        return store.ui_command(uri)
    number = _experiment(uri, experiment) if reachable(uri) else None
    if number is None:
        return f"{store.shown(uri)} (search there: {condition(job)})"
    return f"{_base(uri)}/experiments/{number}/runs?searchFilter={quote(condition(job), safe='')}"


def runs_of_job(uri: str, job: str) -> list[RunOfJob]:
    """Return the runs that a job began or went on with, the newest first; none where the store is away, or
    tells nothing to this person.

    uri: as a job carries it, without a password; MLFLOW_TRACKING_URI of the same store may have it.
    """
    gone = uri.startswith(store.SQLITE) and not store.sqlite_file(uri).is_file()
    if not uri or gone or (is_server(uri) and not reachable(uri)):
        return []
    client = store.client(uri)
    from mlflow.exceptions import MlflowException

    try:
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        found = client.search_runs(experiments, condition(job), order_by=["start_time DESC"])
    except MlflowException:
        return []
    return [RunOfJob(run.info.run_id, run.info.run_name, run.info.status, _page(uri, run)) for run in found]


def reachable(uri: str, wait_s: float = ANSWER_S) -> bool:
    """Return whether a server answers soon, with whatever: MLflow's own client would wait for minutes."""
    try:
        with urllib.request.urlopen(f"{store.shown(uri).rstrip('/')}/health", timeout=wait_s):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError) as error:  # whose certificate is to be trusted, MLflow's client knows
        return isinstance(getattr(error, "reason", None), ssl.SSLError)


def _experiment(uri: str, name: str) -> str | None:
    """Return an experiment's id; None where the server refuses to tell it."""
    store.prepare(uri)
    from mlflow.exceptions import MlflowException

    try:
        return store.get_or_create_experiment(uri, name)
    except MlflowException:
        return None


def _page(uri: str, run: Any) -> str:
    if not is_server(uri):
        return store.ui_command(uri)
    return f"{_base(uri)}/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


def _base(uri: str) -> str:
    return f"{store.shown(uri).rstrip('/')}/#"


def is_server(uri: str) -> bool:
    """Return whether a store is asked over the network."""
    return uri.startswith(("http://", "https://"))
