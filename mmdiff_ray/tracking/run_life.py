"""The one MLflow run of a job, as the driver starts, resumes and ends it."""

import logging
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdiff_ray.config import ConfigError
from mmdiff_ray.tracking import provenance, store
from mmdiff_ray.tracking.jobs import reachable
from mmdiff_ray.tracking.links import is_server, where_to_look
from mmdiff_ray.tracking.log import Log
from mmdiff_ray.tracking.recorder import DatasetFacts
from mmdiff_ray.tracking.sender import LOCAL_PREFIX, LOCAL_TAG, RunMissing, Sender
from mmdiff_ray.tracking.tracker import Say, Tracker

STATUSES = ("FINISHED", "FAILED", "KILLED")
CHECK_S = 20.0
UNFINISHED_WAIT_S = 30.0
_log = logging.getLogger(__name__)


def start_run(
    uri: str,
    experiment: str,
    name: str,
    root: str | Path,
    settings: Mapping[str, Any],
    config_yaml: str,
    datasets: Sequence[DatasetFacts] = (),
    tags: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
    required: bool = True,
    timeout_s: float = 60.0,
) -> str:
    """Begin a run and return its id, which the caller keeps: it names the run through all restarts.

    root: the folder of the run's log; metrics of an earlier MLflow run in it are recorded again.
    settings: the resolved configuration as dotted keys. config_yaml: the same as YAML, kept as the artifact
    `config.yaml`. texts: other files, name -> what is in them.
    Where the store does not answer: raises ConfigError, or, if it is not required, returns a local id that
    every function here takes in place of MLflow's; the run then appears in MLflow when its log is sent.
    """
    local_id = f"{LOCAL_PREFIX}{uuid.uuid4().hex}"
    history = Log(root).begin_again()
    tracker = Tracker(uri, local_id, root)
    tracker.start(experiment, name)
    tracker.params({key: _plain(value) for key, value in settings.items()})
    tracker.tags({key: _plain(value) for key, value in {**provenance.tags(), **(tags or {})}.items()})
    tracker.datasets(datasets)
    for name, text in {"config.yaml": config_yaml, **(texts or {})}.items():
        tracker.text(store.without_passwords(text), name)
    left = tracker.flush(timeout_s, failures=1)
    error = tracker.error or f"no answer within {timeout_s:g} s"
    if left and required:
        tracker.discard()
        raise _unrecorded(uri, error)
    run_id = local_id if left else tracker.run_id
    tracker.close(timeout_s=0.0)
    Log(root).extend(history)
    return run_id


def check_store(uri: str) -> None:
    """Raise ConfigError where the store is a server that does not answer; quick, and nothing is recorded."""
    if is_server(uri) and not reachable(uri, CHECK_S):
        raise _unrecorded(uri, "no server answers")


def is_local(run_id: str) -> bool:
    """Return whether a run began without its store."""
    return run_id.startswith(LOCAL_PREFIX)


def check_run(uri: str, run_id: str, otherwise: str = "") -> None:
    """Raise ConfigError where the store answers that it has no such run, or that it was deleted.

    otherwise: what can be done instead of restoring the run.
    """
    if is_server(uri) and not reachable(uri):
        return  # records wait
    try:
        stages = _stages(uri, run_id)
    except Exception as error:  # a locked database raises what its driver raises; records wait for it
        if not store.is_unknown(error):
            return
        fix = f"check tracking.uri{otherwise and ', or '}{otherwise}"
        raise ConfigError(f"there is no run {run_id} in MLflow at {store.shown(uri)}; {fix}") from None
    if set(stages) == {"deleted"}:
        fix = f"restore it: mlflow runs restore --run-id {run_id}{otherwise and ', or '}{otherwise}"
        raise ConfigError(f"run {run_id} was deleted in MLflow at {store.shown(uri)}; {fix}")


def _stages(uri: str, run_id: str) -> list[str]:
    """Return "active" or "deleted" for a run; nothing where one begun without its store is not there yet."""
    from mlflow.entities import ViewType

    client = store.client(uri)
    if not is_local(run_id):
        return [client.get_run(run_id).info.lifecycle_stage]
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`{LOCAL_TAG}` = '{run_id}'", ViewType.ALL)
    return [run.info.lifecycle_stage for run in found]


def resume_run(uri: str, run_id: str, root: str | Path, timeout_s: float = 30.0) -> int:
    """Mark a run as running again, with the versions of now, and return how many records wait for the store.

    A store that does not answer is no error: the record waits. Raises ConfigError as `check_run`.
    """
    check_run(uri, run_id)
    tracker = Tracker(uri, run_id, root)
    tracker.status("RUNNING")
    tracker.tags(provenance.tags())
    tracker.flush(timeout_s, failures=1)
    return tracker.close(timeout_s=0.0)


def end_run(
    uri: str,
    run_id: str,
    status: str,
    root: str | Path,
    timeout_s: float | None = None,
    say: Say = _log.warning,
) -> int:
    """Send what the run's processes have left, mark the run as ended, return how many records still wait.

    status: FINISHED, FAILED or KILLED. timeout_s, say: as of `Tracker.finish`; a run that did not finish is
    not held up for long.
    """
    if status not in STATUSES:
        raise ValueError(f"status ({status}) must be one of {', '.join(STATUSES)}")
    if timeout_s is None and status != "FINISHED":
        timeout_s = UNFINISHED_WAIT_S
    tracker = Tracker(uri, run_id, root)
    tracker.status(status)
    return tracker.finish(timeout_s, say)


def run_id_at(uri: str, run_id: str) -> str | None:
    """Return MLflow's id of a run that may have begun without the store; None while it is not there."""
    try:
        return Sender(uri, run_id).run_id
    except RunMissing:
        return None


def run_page(uri: str, run_id: str) -> str:
    """Return a link to a run's page, to the list of experiments while the store is away, or what to type."""
    if not is_server(uri) or not reachable(uri):
        return where_to_look(uri)
    from mlflow.exceptions import MlflowException

    try:
        run = store.client(uri).get_run(run_id_at(uri, run_id) or "")
    except MlflowException:
        return where_to_look(uri)
    return where_to_look(uri, run.info.experiment_id, run.info.run_id)


def _unrecorded(uri: str, why: str) -> ConfigError:
    return ConfigError(
        f"tracking.uri ({store.shown(uri)}): the run cannot be recorded there: {why}; start that server, "
        "name another store, or train without it for now: tracking.required=false (records wait on disk)"
    )


def _plain(value: Any) -> Any:
    return store.without_passwords(value) if isinstance(value, str) else value
