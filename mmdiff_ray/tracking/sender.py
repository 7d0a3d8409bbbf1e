"""Replay the log of a run into MLflow, in order and idempotently.

A process can die between sending records and marking them as sent, so every record may be sent twice. MLflow
ignores a metric with the same key, step, time and value and replaces equal parameters and tags. File names
contain the record's id. Runs and models are looked up by a tag before they are created; if MLflow's client
retried a request and created two, the second is deleted.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mmdiff_ray.config import without_passwords
from mmdiff_ray.tracking import store
from mmdiff_ray.tracking.log import Log, Record
from mmdiff_ray.tracking.recorder import MAX_METRICS

LOCAL_PREFIX = "local-"
LOCAL_TAG = "mmdiff.local_id"
RECORD_TAG = "mmdiff.record_id"
PERMANENT_ERRORS = ("INVALID_PARAMETER_VALUE", "MALFORMED_REQUEST", "REQUEST_LIMIT_EXCEEDED")
"""MLflow's error codes for requests that no retry can fix."""
ACTIVE_ONLY, DELETED_ONLY = 1, 2  # mlflow.entities.ViewType
READ_LINES = 200
THUMBNAIL_SIZE = 256


class RunMissing(RuntimeError):
    """The run is not in the store: its start was not sent yet, or it was deleted."""


class InvalidRecord(RuntimeError):
    """A record that cannot be read, or whose files are missing or corrupt."""


@dataclass(frozen=True)
class Replayed:
    """Result of `replay`: records sent, unsent (`waiting`) and refused. error: why records are unsent."""

    root: Path
    sent: int
    waiting: int
    refused: int
    error: str | None

    def __str__(self) -> str:
        refused = f", {self.refused} of them refused, see {self.root}/refused.jsonl" if self.refused else ""
        reason = self.error or "another process is sending"
        waiting = f", {self.waiting} wait: {reason}" if self.waiting else ""
        return f"{self.sent} records sent{refused}{waiting}"


def replay(root: str | Path, uri: str | None = None) -> Replayed:
    """Send the unsent records of a run; stop at the first error and return it in the result.

    uri: the store's new URI, if it has moved. Does nothing while another process sends.
    """
    log, sent, error = Log(root), 0, None
    refused = log.refused
    try:
        with log.sending() as locked:
            if locked and log.waiting:
                sender = Sender(**(log.target | ({"uri": uri} if uri else {})))
                while done := sender.send_next(log):
                    sent += done
    except Exception as problem:
        error = reason(problem)
    return Replayed(log.root, sent, log.waiting, log.refused - refused, error)


def reason(error: Exception) -> str:
    """Describe an error in one line: a failed request's cause, else the first line, else the type."""
    line = str(error).split("\n")[0]
    cause = line.rpartition("Caused by ")[2].rpartition(": ")[2].strip("\"')")
    return (cause if "Caused by " in line else line)[:300] or type(error).__name__


def is_missing(error: Exception | None) -> bool:
    """Return whether an error means that the store does not have the run."""
    return isinstance(error, RunMissing) or getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"


class Sender:
    """Send records to one run of one store."""

    def __init__(self, uri: str, run_id: str):
        self.uri = uri
        self._id = run_id
        # MLflow's id; None until a run that started offline is found in the store.
        self.found: str | None = None if run_id.startswith(LOCAL_PREFIX) else run_id

    @cached_property
    def client(self) -> Any:
        """MLflow's client, created at first use because this takes seconds."""
        return store.client(self.uri)

    @property
    def run_id(self) -> str:
        """The run's id in MLflow. Raises RunMissing if a run that started offline was not sent yet."""
        self.found = self.found or next(iter(self._local_runs()), None)
        if self.found is None:
            raise RunMissing(f"the start of run {self._id} is not in {without_passwords(self.uri)} yet")
        return self.found

    @property
    def deleted(self) -> bool:
        """Whether the run was deleted in MLflow; False if it started offline and was not sent yet."""
        if self.found:
            return self.client.get_run(self.found).info.lifecycle_stage == "deleted"
        return not self._local_runs() and bool(self._local_runs(view=DELETED_ONLY))

    def send_next(self, log: Log) -> int:
        """Send the oldest records of a log and return their number. Raises the store's errors."""
        records = log.read(READ_LINES)
        for group in _requests(records):
            self._send(group, log)
            log.mark_sent(group)
        return len(records)

    def _send(self, records: Sequence[Record], log: Log) -> None:
        """Send records. If MLflow rejects the request, split it to lose as few values as possible."""
        first = records[0]
        try:
            self._request(records, log.files(first.id))
        except Exception as error:
            if not self._is_permanent(error):
                raise
            values = first.body.get("values", {}).items()
            parts = [[record] for record in records]
            if len(parts) == 1:
                parts = [[replace(first, body={**first.body, "values": {k: v}})] for k, v in values]
            if len(parts) > 1:
                for part in parts:
                    self._send(part, log)
            else:
                log.refuse(first, reason(error))

    def _is_permanent(self, error: Exception) -> bool:
        """Return whether no retry can fix a request. Raises RunMissing if the run was deleted."""
        if getattr(error, "error_code", None) not in PERMANENT_ERRORS:
            return isinstance(error, InvalidRecord)
        if self.found and self.deleted:
            raise RunMissing(f"run {self.run_id} was deleted in {without_passwords(self.uri)}") from error
        return True

    def _request(self, records: Sequence[Record], files: Path) -> None:
        from mlflow.entities import Metric, Param, RunTag

        record, kind, body = records[0], records[0].kind, records[0].body
        if record.problem:
            raise InvalidRecord(record.problem)
        if kind in ("image", "artifact", "model") and not (files.is_dir() and any(files.iterdir())):
            raise InvalidRecord("its files are missing")
        if kind in ("metrics", "params", "tags"):
            values = [(one, *item) for one in records for item in one.body["values"].items()]
            rows: list[Any]
            if kind == "metrics":
                rows = [Metric(key, value, one.time_ms, one.body["step"]) for one, key, value in values]
            else:
                rows = [(Param if kind == "params" else RunTag)(key, value) for _, key, value in values]
            self.client.log_batch(self.run_id, **{kind: rows}, synchronous=True)
        elif kind == "start":
            self._start(record)
        elif kind == "status" and body["status"] == "RUNNING":
            self.client.update_run(self.run_id, "RUNNING")
        elif kind == "status":
            self.client.set_terminated(self.run_id, body["status"], record.time_ms)
        elif kind == "datasets":
            self.client.log_inputs(self.run_id, [_dataset_input(**facts) for facts in body["datasets"]])
        elif kind == "artifact":
            self.client.log_artifact(self.run_id, str(files / body["name"]), body["folder"] or None)
        elif kind == "image":
            self._image(record, files)
        else:
            self._model(record, files / "model")

    def _start(self, record: Record) -> None:
        experiment = store.get_or_create_experiment(self.uri, record.body["experiment"])
        start = (experiment, record.time_ms, {LOCAL_TAG: self._id}, record.body["name"])
        _create_once(self._local_runs, lambda: self.client.create_run(*start), self.client.delete_run)

    def _local_runs(self, view: int = ACTIVE_ONLY) -> list[str]:
        """Return the sorted MLflow ids of the runs with this local id."""
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        found = self.client.search_runs(experiments, f"tags.`{LOCAL_TAG}` = '{self._id}'", view)
        return sorted(run.info.run_id for run in found)

    def _image(self, record: Record, files: Path) -> None:
        """Send an image and its thumbnail; MLflow's UI reads step and time from the file names."""
        from PIL import Image, UnidentifiedImageError

        key, step = record.body["key"].replace("/", "~"), record.body["step"]
        stem = f"{key}+step+{step}+timestamp+{record.time_ms}+{record.id}"
        full, small = files / f"{stem}.png", files / f"{stem}+compressed.webp"
        if not full.exists():
            (files / "image.png").rename(full)
        try:
            with Image.open(full) as image:
                image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
                image.save(small)
        except UnidentifiedImageError:  # truncated by a power cut
            raise InvalidRecord("its image is corrupt") from None
        for file in (full, small):
            self.client.log_artifact(self.run_id, str(file), "images")
        self.client.set_tag(self.run_id, "mlflow.loggedImages", True)

    def _model(self, record: Record, folder: Path) -> None:
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        run = self.client.get_run(self.run_id)
        experiment, name, tags = run.info.experiment_id, record.body["name"], {RECORD_TAG: record.id}

        def find() -> list[str]:
            found = self.client.search_logged_models([experiment], f"tags.`{RECORD_TAG}` = '{record.id}'")
            return sorted(model.model_id for model in found)

        def create() -> None:
            self.client.create_logged_model(experiment, name, self.run_id, tags)

        model = _create_once(find, create, self.client.delete_logged_model)
        description = Model.load(str(folder))
        description.model_id, description.run_id = model, self.run_id
        description.save(str(folder / "MLmodel"))
        self.client.log_model_artifacts(model, str(folder))
        if model not in [output.model_id for output in run.outputs.model_outputs]:
            self.client.log_outputs(self.run_id, [LoggedModelOutput(model, record.body["step"])])
        self.client.finalize_logged_model(model, "READY")


def _create_once(
    find: Callable[[], list[str]], create: Callable[[], Any], delete: Callable[[str], Any]
) -> str:
    """Return the id that `find` finds; create it if missing; delete duplicates of a retried request."""
    if not find():
        create()
    first, *duplicates = find()
    for duplicate in duplicates:
        delete(duplicate)
    return first


def _requests(records: Sequence[Record]) -> Iterator[list[Record]]:
    """Group records in order: metrics share a request, up to MLflow's limit; others get one each."""
    group: list[Record] = []
    size = 0
    for record in records:
        count = len(record.body["values"]) if record.kind == "metrics" else MAX_METRICS + 1
        if group and size + count > MAX_METRICS:
            yield group
            group, size = [], 0
        group, size = [*group, record], size + count
    if group:
        yield group


def _dataset_input(name: str, uri: str, digest: str, rows: dict[str, int]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    scheme = urlsplit(uri).scheme
    kind = "local" if scheme in ("", "file") else scheme
    profile = json.dumps({"rows": rows, "manifest_sha256": digest})
    source, short = json.dumps({"uri": uri}), digest[:36]  # MLflow's limit
    dataset = Dataset(name, short, kind, source, profile=profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])
