"""Find the runs of a submitted job in MLflow: a run has the id of the job that last trained it as a tag."""

import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass

from mmdiff_ray.tracking import store
from mmdiff_ray.tracking.links import is_server, link, where_to_look

JOB_TAG = "mmdiff.job_id"
JOB_VARIABLE = "MMDIFF_JOB_ID"
"""The job's id, in the environment of its processes."""
REVISION_VARIABLE = "MMDIFF_REVISION"
"""The commit of a submitted job's code and how many files differ from it."""
ANSWER_S = 5.0


@dataclass(frozen=True)
class RunOfJob:
    """One run of a job. page: its address in MLflow's UI, or the command that opens the UI."""

    run_id: str
    name: str
    status: str
    page: str


def page_of_job(uri: str, experiment: str, job: str) -> str:
    """Return the address of MLflow's page of a job's runs, or how to find them.

    uri: "" if only the cluster knows its store. Raises ConfigError if the experiment was deleted.
    """
    if uri and not is_server(uri):
        return where_to_look(uri)
    condition = f"tags.`{JOB_TAG}` = '{job}'"
    if uri and reachable(uri):
        store.prepare(uri)
        from mlflow.exceptions import MlflowException

        try:
            number = store.get_or_create_experiment(uri, experiment)
            return link(uri, number, search=condition)
        except MlflowException:  # the server does not show its experiments to this person
            pass
    return f"{store.shown(uri) or 'MLFLOW_TRACKING_URI of the cluster'} (search there: {condition})"


def runs_of_job(uri: str, job: str) -> list[RunOfJob]:
    """Return a job's runs, the newest first; none if the store does not answer this person.

    uri: as in the job's metadata, without a password, which MLFLOW_TRACKING_URI may have.
    """
    here = uri.startswith(store.SQLITE) and store.sqlite_file(uri).is_file()
    if not uri or not (reachable(uri) if is_server(uri) else here):
        return []
    client, runs = store.client(uri), []
    from mlflow.exceptions import MlflowException

    try:
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        found = client.search_runs(experiments, f"tags.`{JOB_TAG}` = '{job}'", order_by=["start_time DESC"])
    except MlflowException:
        return []
    for info in (run.info for run in found):
        page = where_to_look(uri, info.experiment_id, info.run_id)
        runs.append(RunOfJob(info.run_id, info.run_name, info.status, page))
    return runs


def reachable(uri: str, wait_s: float = ANSWER_S) -> bool:
    """Return whether a server answers soon. MLflow's own client would wait for minutes."""
    try:
        with urllib.request.urlopen(f"{store.shown(uri).rstrip('/')}/health", timeout=wait_s):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError) as error:  # MLflow's client knows which certificates to trust
        return isinstance(getattr(error, "reason", None), ssl.SSLError)
