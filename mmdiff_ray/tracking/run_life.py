"""Start, resume and end the MLflow run of a job, from the driver."""

import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmdiff_ray.config import ConfigError, without_passwords
from mmdiff_ray.tracking import provenance, store
from mmdiff_ray.tracking.log import Log
from mmdiff_ray.tracking.recorder import DatasetFacts
from mmdiff_ray.tracking.sender import LOCAL_PREFIX, RunMissing, Sender, is_missing
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
    """Start a run and return its id, which all restarts reuse.

    If the store does not answer, raises ConfigError, or, with required=False, returns a local id, which all
    functions here accept. The run appears in MLflow when its log is sent.

    root: folder of the log. Metrics that an earlier MLflow run left in it are recorded again in this run.
    settings: the resolved configuration as dotted keys. config_yaml: the same as YAML.
    texts: more artifacts, name -> text.
    """
    local_id = f"{LOCAL_PREFIX}{uuid.uuid4().hex}"
    earlier = Log(root).rotate()
    tracker = Tracker(uri, local_id, root)
    tracker.record("start", experiment=experiment, name=name)
    tracker.params(_public(settings))
    tracker.tags(_public({**provenance.tags(), **(tags or {})}))
    if datasets:
        tracker.record("datasets", datasets=[asdict(facts) for facts in datasets])
    for path, text in {"config.yaml": config_yaml, **(texts or {})}.items():
        tracker.text(without_passwords(text), path)
    left = tracker.flush(timeout_s, failures=1)
    if left and required:
        tracker.discard()
        raise _unrecorded(uri, tracker.error or f"no answer within {timeout_s:g} s")
    run_id = local_id if left else tracker.run_id
    tracker.close(timeout_s=0.0)
    Log(root).extend(earlier)
    return run_id


def check_store(uri: str) -> None:
    """Raise ConfigError if the MLflow server does not answer. Records nothing."""
    if store.is_server(uri) and not store.reachable(uri, CHECK_S):
        raise _unrecorded(uri, "no server answers")


def is_local(run_id: str) -> bool:
    """Return whether a run id is local: the run started while its store did not answer."""
    return run_id.startswith(LOCAL_PREFIX)


def check_run(uri: str, run_id: str, alternative: str = "") -> None:
    """Raise ConfigError if the run was deleted in MLflow or never existed there.

    Passes if the store does not answer, or if the run started offline and was not sent yet.
    alternative: what the user can do instead of restoring the run, for the message.
    """
    if store.is_server(uri) and not store.reachable(uri):
        return
    place, other = without_passwords(uri), f", or {alternative}" if alternative else ""
    try:
        deleted = Sender(uri, run_id).deleted
    except Exception as error:  # a locked database raises its driver's errors
        if not is_missing(error):
            return
        raise ConfigError(
            f"there is no run {run_id} in MLflow at {place}; check tracking.uri{other}"
        ) from None
    if deleted:
        raise ConfigError(
            f"run {run_id} was deleted in MLflow at {place}; restore it: "
            f"mlflow runs restore --run-id {run_id}{other}"
        )


def resume_run(uri: str, run_id: str, root: str | Path, timeout_s: float = 30.0) -> int:
    """Set a run to RUNNING, tag it with the current versions, and return the number of unsent records.

    Raises ConfigError as `check_run`.
    """
    check_run(uri, run_id)
    tracker = Tracker(uri, run_id, root)
    tracker.record("status", status="RUNNING")
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
    """Set a run's final status, send all records, and return the number of unsent ones.

    status: FINISHED, FAILED or KILLED. timeout_s, say: as in `Tracker.finish`; the default timeout is shorter
    for a run that did not finish.
    """
    if status not in STATUSES:
        raise ValueError(f"status ({status}) must be one of {', '.join(STATUSES)}")
    if timeout_s is None and status != "FINISHED":
        timeout_s = UNFINISHED_WAIT_S
    tracker = Tracker(uri, run_id, root)
    tracker.record("status", status=status)
    return tracker.finish(timeout_s, say)


def run_page(uri: str, run_id: str) -> str:
    """Return a link to a run (or to the experiments if MLflow does not answer), or the UI's command."""
    if not store.is_server(uri) or not store.reachable(uri):
        return store.ui_link(uri)
    from mlflow.exceptions import MlflowException

    try:
        run = store.client(uri).get_run(Sender(uri, run_id).run_id)
    except (MlflowException, RunMissing):
        return store.ui_link(uri)
    return store.ui_link(uri, run.info.experiment_id, run.info.run_id)


def _unrecorded(uri: str, why: str) -> ConfigError:
    return ConfigError(
        f"tracking.uri ({without_passwords(uri)}): the run cannot be recorded there: {why}; start that "
        "server, set another tracking.uri, or record on disk for now: tracking.required=false"
    )


def _public(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: without_passwords(v) if isinstance(v, str) else v for k, v in values.items()}
