"""Record metrics, parameters, tags, files, models and system metrics in a run's log."""

import contextlib
import importlib
import json
import math
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from mmdiff_ray.tracking.log import Log

MAX_METRICS, MAX_VALUES = 1000, 100  # MLflow's limits per request: metrics, and parameters or tags
MAX_PARAM_CHARS = 6000  # MLflow silently truncates longer values
MAX_KEY_CHARS = 250
DESCRIPTION_TAG = "mlflow.note.content"
"""MLflow's tag for a run's description, in Markdown."""


@dataclass(frozen=True)
class DatasetFacts:
    """A dataset as logged to MLflow. digest: of its manifest. rows: split -> count."""

    name: str
    uri: str
    digest: str
    rows: dict[str, int] = field(default_factory=dict)


class Recorder:
    """Append to a run's log. An unreachable server or a full disk raises no error."""

    def __init__(self, log: Log):
        self._log = log

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics at a step (samples seen).

        A non-finite value becomes the metric `nonfinite/<key>` = 1 and a tag with the value, because MLflow
        stores infinity as 1.8e308.
        """
        numbers = {safe_key(key): float(value) for key, value in values.items()}
        odd = {f"nonfinite/{key}": value for key, value in numbers.items() if not math.isfinite(value)}
        finite = {key: value for key, value in numbers.items() if math.isfinite(value)}
        for part in _parts(finite | dict.fromkeys(odd, 1.0), MAX_METRICS):
            self._log.append("metrics", {"values": part, "step": int(step)})
        if odd:
            self.tags({key: f"{value} at step {step}" for key, value in odd.items()})

    def params(self, values: Mapping[str, Any]) -> None:
        """Record parameters, which cannot change later. Omits values too long for MLflow."""
        texts = {
            safe_key(key): json.dumps(value) if isinstance(value, dict | list) else str(value)
            for key, value in values.items()
        }
        short = {key: text for key, text in texts.items() if len(text) <= MAX_PARAM_CHARS}
        for part in _parts(short, MAX_VALUES):
            self._log.append("params", {"values": part})

    def tags(self, values: Mapping[str, Any]) -> None:
        """Record tags; a later value replaces an earlier one. MLflow truncates them at 8,000 characters."""
        for part in _parts({safe_key(key): str(value) for key, value in values.items()}, MAX_VALUES):
            self._log.append("tags", {"values": part})

    def image(self, key: str, png: bytes, step: int) -> None:
        """Record an image at a step. MLflow shows images of one key with a slider over steps."""
        body = {"key": safe_key(key), "step": int(step)}
        self._log.append("image", body, lambda files: (files / "image.png").write_bytes(png))

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Record a copy of a file or folder under its name, in `folder` of the run's artifacts."""
        path, body = Path(path), {"name": Path(path).name, "folder": folder}
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        self._log.append("artifact", body, lambda files: copy(path, files / path.name))

    def text(self, text: str, path: str) -> None:
        """Record a text as an artifact at `path`."""
        folder, name = str(PurePosixPath(path).parent), PurePosixPath(path).name
        body = {"name": name, "folder": "" if folder == "." else folder}
        self._log.append("artifact", body, lambda files: (files / name).write_text(text))

    def table(self, path: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Record a table as a JSON artifact that MLflow's UI shows as a table."""
        self.text(json.dumps({"columns": list(columns), "data": [list(row) for row in rows]}), path)
        self.tags({"mlflow.loggedArtifacts": json.dumps([{"path": path, "type": "table"}])})

    def model(self, folder: Path, name: str, step: int) -> None:
        """Record a model in MLflow's format. Moves the folder."""
        body = {"name": name, "step": int(step)}
        self._log.append("model", body, lambda files: shutil.move(folder, files / "model"))

    def record(self, kind: str, **body: Any) -> None:
        """Record one of the log's kinds without files: `start`, `status`, `datasets`."""
        self._log.append(kind, body)


class SystemMonitor:
    """Record `system/...` metrics every few seconds in a daemon thread.

    MLflow's own monitor stops at the first failed request, so this class uses only its gauges: CPU, memory,
    disk, network, and GPU if `nvidia-ml-py` or `pyrsmi` is installed.
    """

    def __init__(self, recorder: Recorder, step: Callable[[], int], node: str = "", interval_s: float = 10.0):
        """Start. step: returns the samples seen so far. node: part of the metric names of multi-node runs."""
        self._recorder, self._step, self._interval_s = recorder, step, interval_s
        self._prefix = f"system/{node}/" if node else "system/"
        self._gauges = _gauges()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system-monitor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread. Call before closing the tracker."""
        self._stopped.set()
        self._thread.join(self._interval_s)

    def _work(self) -> None:
        self._read()  # discard the first reading: its interval is unknown
        while not self._stopped.wait(self._interval_s):
            self._recorder.metrics(self._read(), self._step())

    def _read(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for gauge in self._gauges:
            gauge.collect_metrics()
            values |= gauge.aggregate_metrics()
            gauge.clear_metrics()
        return {self._prefix + key: value for key, value in values.items()}


def _gauges() -> list[Any]:
    """Return MLflow's gauges for the devices of this machine."""
    gauges = []
    for device in ("CPU", "Disk", "Network", "GPU", "ROCM"):
        module = importlib.import_module(f"mlflow.system_metrics.metrics.{device.lower()}_monitor")
        with contextlib.suppress(Exception):  # no such device or driver
            gauges.append(getattr(module, f"{device}Monitor")())
    return gauges


def safe_key(key: str) -> str:
    """Make a valid MLflow name: letters, digits and `_-. /`, no empty path parts, at most 250 characters."""
    plain = re.sub(r"[^A-Za-z0-9_\-. /]", "_", key)
    parts = [part for part in plain.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:MAX_KEY_CHARS].rstrip("/") or "_"


def _parts(values: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    items = iter(values.items())
    while part := dict(islice(items, size)):
        yield part
