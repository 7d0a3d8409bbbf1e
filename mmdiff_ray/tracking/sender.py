"""Send the records of spools to MLflow: in order, in batches, and again without harm.

Everything may be sent twice (a process can die between sending and noting it): MLflow ignores a metric it has
with the same time, parameters and tags are replaced by themselves, files have names fixed by their record,
and runs and models are looked up by their record's id before they are made. MLflow's client asks again on its
own where an answer is lost: what was made twice by that is taken away at once.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mmdiff_ray.tracking import store
from mmdiff_ray.tracking.recorder import MAX_DIGEST_CHARS, MAX_METRICS, MAX_VALUES
from mmdiff_ray.tracking.spool import Entry, Record, Spool, waiting

LOCAL_PREFIX = "local-"
LOCAL_TAG = "mmdiff.local_id"
RECORD_TAG = "mmdiff.record_id"
REFUSALS = ("INVALID_PARAMETER_VALUE", "MALFORMED_REQUEST", "REQUEST_LIMIT_EXCEEDED")
READ_LINES = 200
BATCH_CHARS = 500_000  # MLflow refuses requests of more than 1 MB
THUMBNAIL_SIZE = 256
_log = logging.getLogger(__name__)


class RunUnknown(RuntimeError):
    """The run began while the store was away, and the record of its beginning has not been sent yet."""


@dataclass(frozen=True)
class Replayed:
    """What `replay` did: records sent, records still waiting, and the reason why they wait."""

    sent: int
    waiting: int
    error: str | None


def replay(root: str | Path, uri: str | None = None) -> Replayed:
    """Send what the spools under a root still hold. Spools of living processes are left to them.

    uri: the store, where it has moved. Stops a spool at the first error, and never raises for one.
    """
    sent, left, error = 0, 0, None
    for folder in waiting(root):
        if (spool := Spool.adopt(folder)) is None:
            continue
        before = len(spool)
        try:
            sender = Sender(**(spool.target | ({"uri": uri} if uri else {})))
            while sender.send_next(spool):
                pass
        except Exception as problem:
            error = reason(problem)
        sent, left = sent + before - len(spool), left + len(spool)
        spool.close()
    return Replayed(sent, left, error)


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
        """The id of the run in MLflow. Raises RunUnknown while a run begun without it is not there."""
        self._found = self._found or self._find_local()
        if self._found is None:
            raise RunUnknown(
                f"the beginning of run {self._wanted} has not reached {store.shown(self.uri)} yet"
            )
        return self._found

    @property
    def unbegun(self) -> bool:
        """Whether the run began without its store, and has not been seen there; asks nobody."""
        return self._found is None

    def send_next(self, spool: Spool) -> int:
        """Send the oldest records of a spool and return how many left it. Raises what the store raised."""
        entries = spool.read(READ_LINES)
        for group in _groups(entries):
            self._send(group, spool)
            spool.acknowledge(group)
        return len(entries)

    def _send(self, group: Sequence[Entry], spool: Spool) -> None:
        """Send a group; where it is refused, its records one by one, then a record's values one by one."""
        records = [entry.record for entry in group if entry.record is not None]
        try:
            self._send_records(records, spool)
        except Exception as error:
            if not _is_refusal(error):
                raise
            if len(records) > 1:
                for entry in group:
                    self._send([entry], spool)
            elif len(records[0].body.get("values", ())) > 1:
                for single in _singles(records[0]):
                    self._send([Entry(single, group[0].end)], spool)
            else:
                spool.refuse(records[0], reason(error))
                _log.warning("MLflow refused a record, kept in %s: %s", spool.folder.parent, reason(error))

    def _send_records(self, records: Sequence[Record], spool: Spool) -> None:
        if not records:
            return
        if records[0].kind in ("metrics", "params", "tags"):
            self._batch(records)
        else:
            send = {
                "start": self._start,
                "status": self._status,
                "datasets": self._datasets,
                "artifact": self._artifact,
                "image": self._image,
                "model": self._model,
            }[records[0].kind]
            send(records[0], spool.files(records[0].id))

    def _batch(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        metrics, params, tags = [], [], []
        for record in records:
            values = record.body["values"].items()
            if record.kind == "metrics":
                metrics += [Metric(key, value, record.time_ms, record.body["step"]) for key, value in values]
            elif record.kind == "params":
                params += [Param(key, value) for key, value in values]
            else:
                tags += [RunTag(key, value) for key, value in values]
        self.client.log_batch(self.run_id, metrics, params, tags, synchronous=True)

    def _start(self, record: Record, files: Path) -> None:
        experiment = store.get_or_create_experiment(self.uri, record.body["experiment"])
        if not self._local_runs():
            self.client.create_run(experiment, record.time_ms, {LOCAL_TAG: self._wanted}, record.body["name"])
        for twin in self._local_runs()[1:]:
            self.client.delete_run(twin)

    def _status(self, record: Record, files: Path) -> None:
        status = record.body["status"]
        if status == "RUNNING":
            self.client.update_run(self.run_id, status)
        else:
            self.client.set_terminated(self.run_id, status, record.time_ms)

    def _datasets(self, record: Record, files: Path) -> None:
        self.client.log_inputs(self.run_id, [_dataset_input(**facts) for facts in record.body["datasets"]])

    def _artifact(self, record: Record, files: Path) -> None:
        self.client.log_artifact(self.run_id, str(files / record.body["name"]), record.body["folder"] or None)

    def _image(self, record: Record, files: Path) -> None:
        """Send a picture and its thumbnail under the names that MLflow's page reads steps and times from."""
        from PIL import Image

        key = record.body["key"].replace("/", "~")
        stem = f"{key}+step+{record.body['step']}+timestamp+{record.time_ms}+{record.id}"
        full, small = files / f"{stem}.png", files / f"{stem}+compressed.webp"
        if not full.exists():
            (files / "image.png").rename(full)
        with Image.open(full) as image:
            image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
            image.save(small)
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
        if not self._models(record, experiment):
            self.client.create_logged_model(
                experiment, record.body["name"], source_run_id=self.run_id, tags={RECORD_TAG: record.id}
            )
        model, *twins = self._models(record, experiment)
        for twin in twins:
            self.client.delete_logged_model(twin.model_id)
        return model

    def _models(self, record: Record, experiment: str) -> list[Any]:
        found = self.client.search_logged_models([experiment], f"tags.`{RECORD_TAG}` = '{record.id}'")
        return sorted(found, key=lambda model: model.model_id)

    def _find_local(self) -> str | None:
        return next(iter(self._local_runs()), None)

    def _local_runs(self) -> list[str]:
        """Return the ids of the runs that have this local id, always in the same order."""
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        found = self.client.search_runs(experiments, f"tags.`{LOCAL_TAG}` = '{self._wanted}'")
        return sorted(run.info.run_id for run in found)


def _groups(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Yield the entries in order, in groups that fit one request each."""
    group: list[Entry] = []
    for entry in entries:
        if group and not _fits([*group, entry]):
            yield group
            group = []
        group.append(entry)
    if group:
        yield group


def _fits(group: Sequence[Entry]) -> bool:
    records = [entry.record for entry in group if entry.record is not None]
    if any(record.kind not in ("metrics", "params", "tags") for record in records):
        return len(group) == 1
    metrics = sum(len(record.body["values"]) for record in records if record.kind == "metrics")
    others = sum(len(record.body["values"]) for record in records if record.kind != "metrics")
    chars = sum(len(str(record.body)) for record in records if record.kind != "metrics")
    return metrics + others <= MAX_METRICS and others <= MAX_VALUES and chars <= BATCH_CHARS


def _singles(record: Record) -> list[Record]:
    values = record.body["values"].items()
    return [replace(record, body={**record.body, "values": {key: value}}) for key, value in values]


def _is_refusal(error: Exception) -> bool:
    """Say whether the store has understood a record and will never take it."""
    return getattr(error, "error_code", None) in REFUSALS or isinstance(error, KeyError | FileNotFoundError)


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
