"""Replay the log of a run into MLflow: in order, in batches, and again without harm.

Everything may be sent twice (a process can die between sending and noting it): MLflow ignores a metric it has
with the same time, parameters and tags are replaced by themselves, files have names fixed by their record,
and runs and models are looked up by their record's id before they are made. MLflow's client asks again on its
own where an answer is lost: what was made twice by that is taken away at once.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mmdiff_ray.tracking import store
from mmdiff_ray.tracking.log import WITH_FILES, Entry, Log, Record
from mmdiff_ray.tracking.recorder import MAX_DIGEST_CHARS, MAX_METRICS, MAX_VALUES

LOCAL_PREFIX = "local-"
LOCAL_TAG = "mmdiff.local_id"
RECORD_TAG = "mmdiff.record_id"
REFUSALS = ("INVALID_PARAMETER_VALUE", "MALFORMED_REQUEST", "REQUEST_LIMIT_EXCEEDED")
"""MLflow's error codes for a request that it has understood and will never take."""
BATCHED = ("metrics", "params", "tags")
READ_LINES = 200
BATCH_CHARS = 500_000  # MLflow refuses requests of more than 1 MB
THUMBNAIL_SIZE = 256


class RunMissing(RuntimeError):
    """The store has no such run: its beginning was not sent yet, or somebody has deleted it."""


class FilesMissing(RuntimeError):
    """The files of a record are gone, or cannot be read."""


@dataclass(frozen=True)
class Replayed:
    """What `replay` did with a log: records sent, still waiting, and refused; and why records wait."""

    root: Path
    sent: int
    waiting: int
    refused: int
    error: str | None


def replay(root: str | Path, uri: str | None = None) -> Replayed:
    """Send what waits in the log of a run; stop at the first error, and never raise for one.

    uri: the store, if it has moved. Where another process is sending at this moment, it is left to that.
    """
    log, sent, error = Log(root), 0, None
    refused = log.refused
    try:
        with log.sending() as ours:
            if ours and log.waiting:
                sender = Sender(**(log.target | ({"uri": uri} if uri else {})))
                while done := sender.send_next(log):
                    sent += done
    except Exception as problem:
        error = reason(problem)
    return Replayed(log.root, sent, log.waiting, log.refused - refused, error)


def reason(error: Exception) -> str:
    """Return the first line of an error, of a failed request its cause, of a silent error its kind."""
    line = str(error).split("\n")[0]
    cause = line.rpartition("Caused by ")[2].rpartition(": ")[2].strip("\"')")
    return (cause if "Caused by " in line else line)[:300] or type(error).__name__


class Sender:
    """Send records to one run of one store."""

    def __init__(self, uri: str, run_id: str):
        self.uri = uri
        self._wanted = run_id
        self._found: str | None = None if run_id.startswith(LOCAL_PREFIX) else run_id
        self._made_client: Any = None

    @property
    def client(self) -> Any:
        """MLflow's client, made at the first use since this takes seconds."""
        self._made_client = self._made_client or store.client(self.uri)
        return self._made_client

    @property
    def run_id(self) -> str:
        """The id of the run in MLflow. Raises RunMissing while a run begun without it is not there."""
        self._found = self._found or next(iter(self._local_runs()), None)
        if self._found is None:
            raise RunMissing(f"the beginning of run {self._wanted} is not in {store.shown(self.uri)} yet")
        return self._found

    @property
    def unbegun(self) -> bool:
        """Whether the run began without its store, and has not been seen there; asks nobody."""
        return self._found is None

    def send_next(self, log: Log) -> int:
        """Send the oldest records of a log and return how many. Raises what the store raised."""
        entries = log.read(READ_LINES)
        for group in _groups(entries):
            for entry in group:
                if entry.record is None:
                    log.set_aside(entry.line, entry.problem)
            self._send([entry.record for entry in group if entry.record is not None], log)
            log.acknowledge(group)
        return len(entries)

    def _send(self, records: Sequence[Record], log: Log) -> None:
        """Send records; if MLflow refuses them, one by one, then value by value, to set few aside."""
        try:
            self._request(records, log)
        except Exception as error:
            if not self._is_refusal(error):
                raise
            parts = [[record] for record in records] if len(records) > 1 else _single_values(records[0])
            if len(parts) < 2:
                log.set_aside(records[0], reason(error))
                return
            for part in parts:
                self._send(part, log)

    def _is_refusal(self, error: Exception) -> bool:
        """Return whether a record can never be sent. Raises RunMissing where its run was deleted."""
        if getattr(error, "error_code", None) not in REFUSALS:
            return isinstance(error, FilesMissing)
        if not self.unbegun and self.client.get_run(self.run_id).info.lifecycle_stage == "deleted":
            raise RunMissing(f"run {self.run_id} was deleted in {store.shown(self.uri)}") from error
        return True

    def _request(self, records: Sequence[Record], log: Log) -> None:
        if not records:
            return
        record, kind = records[0], records[0].kind
        files, body = log.files(record.id), record.body
        if kind in WITH_FILES and not (files.is_dir() and any(files.iterdir())):
            raise FilesMissing("its files are gone")
        if kind in BATCHED:
            self._batch(records)
        elif kind == "start":
            self._start(record)
        elif kind == "status" and body["status"] == "RUNNING":
            self.client.update_run(self.run_id, "RUNNING")
        elif kind == "status":
            self.client.set_terminated(self.run_id, body["status"], record.time_ms)
        elif kind == "datasets":
            inputs = [_dataset_input(**facts) for facts in body["datasets"]]
            self.client.log_inputs(self.run_id, inputs)
        elif kind == "artifact":
            self.client.log_artifact(self.run_id, str(files / body["name"]), body["folder"] or None)
        elif kind == "image":
            self._image(record, files)
        else:
            self._model(record, files)

    def _batch(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        sent: dict[str, list[Any]] = {kind: [] for kind in BATCHED}
        for record in records:
            for key, value in record.body["values"].items():
                if record.kind == "metrics":
                    sent["metrics"].append(Metric(key, value, record.time_ms, record.body["step"]))
                else:
                    sent[record.kind].append((Param if record.kind == "params" else RunTag)(key, value))
        self.client.log_batch(self.run_id, **sent, synchronous=True)

    def _start(self, record: Record) -> None:
        experiment = store.get_or_create_experiment(self.uri, record.body["experiment"])
        if not self._local_runs():
            self.client.create_run(experiment, record.time_ms, {LOCAL_TAG: self._wanted}, record.body["name"])
        for twin in self._local_runs()[1:]:
            self.client.delete_run(twin)

    def _local_runs(self) -> list[str]:
        """Return the ids of the runs that have this local id, always in the same order."""
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        found = self.client.search_runs(experiments, f"tags.`{LOCAL_TAG}` = '{self._wanted}'")
        return sorted(run.info.run_id for run in found)

    def _image(self, record: Record, files: Path) -> None:
        """Send a picture and its thumbnail under the names that MLflow's page reads steps and times from."""
        from PIL import Image, UnidentifiedImageError

        key = record.body["key"].replace("/", "~")
        stem = f"{key}+step+{record.body['step']}+timestamp+{record.time_ms}+{record.id}"
        full, small = files / f"{stem}.png", files / f"{stem}+compressed.webp"
        if not full.exists():
            (files / "image.png").rename(full)
        try:
            with Image.open(full) as image:
                image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
                image.save(small)
        except UnidentifiedImageError:  # torn by a power cut
            raise FilesMissing("its picture cannot be read") from None
        for file in (full, small):
            self.client.log_artifact(self.run_id, str(file), "images")
        self.client.set_tag(self.run_id, "mlflow.loggedImages", True)

    def _model(self, record: Record, files: Path) -> None:
        from mlflow.entities import LoggedModelOutput

        run = self.client.get_run(self.run_id)
        model = self._logged_model(record, run.info.experiment_id)
        _sign_model(files / "model", model.model_id, self.run_id)
        self.client.log_model_artifacts(model.model_id, str(files / "model"))
        if model.model_id not in [output.model_id for output in run.outputs.model_outputs]:
            self.client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, record.body["step"])])
        self.client.finalize_logged_model(model.model_id, "READY")

    def _logged_model(self, record: Record, experiment: str) -> Any:
        """Return MLflow's model of a record, made where it is not there."""

        def models() -> list[Any]:
            found = self.client.search_logged_models([experiment], f"tags.`{RECORD_TAG}` = '{record.id}'")
            return sorted(found, key=lambda model: model.model_id)

        if not models():
            self.client.create_logged_model(
                experiment, record.body["name"], source_run_id=self.run_id, tags={RECORD_TAG: record.id}
            )
        model, *twins = models()
        for twin in twins:
            self.client.delete_logged_model(twin.model_id)
        return model


def _groups(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Yield the entries in order, in groups that fit one request each."""
    limits = (MAX_METRICS, MAX_VALUES, BATCH_CHARS)
    group: list[Entry] = []
    used = (0, 0, 0)
    for entry in entries:
        size = _size(entry)
        total = (used[0] + size[0], used[1] + size[1], used[2] + size[2])
        if group and any(part > limit for part, limit in zip(total, limits, strict=True)):
            yield group
            group, total = [], size
        group, used = [*group, entry], total
    if group:
        yield group


def _size(entry: Entry) -> tuple[int, int, int]:
    """Return what an entry adds to a request: values, how many are texts, and their characters."""
    if entry.record is None or entry.record.kind not in BATCHED:
        return MAX_METRICS + 1, 0, 0  # fits with no other
    count = len(entry.record.body["values"])
    return (count, 0, 0) if entry.record.kind == "metrics" else (count, count, len(entry.line))


def _single_values(record: Record) -> list[list[Record]]:
    values = record.body.get("values", {}).items()
    return [[replace(record, body={**record.body, "values": {key: value}})] for key, value in values]


def _dataset_input(name: str, uri: str, digest: str, rows: dict[str, int]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    scheme = urlsplit(uri).scheme
    source = json.dumps({"uri": uri})
    profile = json.dumps({"rows": rows, "manifest_sha256": digest})
    kind = "local" if scheme in ("", "file") else scheme
    dataset = Dataset(name, digest[:MAX_DIGEST_CHARS], kind, source, profile=profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def _sign_model(folder: Path, model_id: str, run_id: str) -> None:
    """Write into a model's own description which run made it."""
    from mlflow.models import Model

    description = Model.load(str(folder))
    description.model_id, description.run_id = model_id, run_id
    description.save(str(folder / "MLmodel"))
