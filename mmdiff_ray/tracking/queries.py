"""Read runs back from MLflow: find one, its numbers, their history."""

from pathlib import Path, PurePosixPath
from typing import Any

from mmdiff_ray.config import ConfigError
from mmdiff_ray.tracking import store
from mmdiff_ray.tracking.sender import LOCAL_PREFIX, Sender

Run = Any
"""MLflow's run: `info` and `data`."""


def find_run(uri: str, reference: str) -> Any:
    """Return the run of an id or local id, or else the newest of a name or of a folder of that name.

    Raises ConfigError where there is none, naming the newest runs that are no other run's child.
    """
    if reference.startswith(LOCAL_PREFIX):
        return store.client(uri).get_run(Sender(uri, reference).run_id)
    name = PurePosixPath(reference).name.replace("'", "")
    for condition in (f"attributes.run_id = '{name}'", f"attributes.run_name = '{name}'"):
        if found := _search(uri, condition, 1):
            return found[0]
    newest = [run for run in _search(uri, "", 1000) if "mlflow.parentRunId" not in run.data.tags]
    names = ", ".join(run.info.run_name for run in newest[:5]) or "none"
    raise ConfigError(f"no run {reference!r} in {store.shown(uri)}; newest: {names}")


def children(uri: str, parent: Run) -> list[Run]:
    """Return the child runs of a run, the oldest first."""
    client, found, token = store.client(uri), [], None
    condition = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    while True:
        page = client.search_runs(
            [parent.info.experiment_id], condition, order_by=["start_time ASC"], page_token=token
        )
        found += page
        token = page.token
        if not token:
            return found


def artifact(uri: str, run_id: str, path: str, place: Path) -> Path | None:
    """Return a file among a run's artifacts, brought into a folder of its own; None where there is none."""
    client = store.client(uri)
    folder = str(PurePosixPath(path).parent)
    if path not in [file.path for file in client.list_artifacts(run_id, "" if folder == "." else folder)]:
        return None
    target = place / run_id
    target.mkdir(parents=True, exist_ok=True)
    return Path(client.download_artifacts(run_id, path, str(target)))


def latest(uri: str, run_id: str) -> dict[str, float]:
    """Return the last value of each metric of a run."""
    return dict(store.client(uri).get_run(run_id).data.metrics)


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """Return a metric over the steps, in order.

    A run that went back to a checkpoint records steps again: the last value of a step counts.
    """
    points = store.client(uri).get_metric_history(run_id, key)
    ordered = sorted(points, key=lambda point: (point.step, point.timestamp))
    return sorted({point.step: point.value for point in ordered}.items())


def _search(uri: str, condition: str, limit: int) -> list[Any]:
    client = store.client(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, condition, max_results=limit, order_by=["start_time DESC"]))
