"""What can be recorded about a run, written into its log: no call waits for a server."""

import json
import math
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mmdiff_ray.tracking.log import Log

MAX_METRICS, MAX_VALUES = 1000, 100  # MLflow's limits for one request: metrics, and parameters or tags
MAX_PARAM_CHARS = 6000  # MLflow cuts longer ones silently
MAX_KEY_CHARS = 250
MAX_DIGEST_CHARS = 36
DESCRIPTION_TAG = "mlflow.note.content"
"""Holds a run's description as Markdown."""


@dataclass(frozen=True)
class DatasetFacts:
    """What a run says about a data set: name, where it lies, the digest of its manifest, rows by split."""

    name: str
    uri: str
    digest: str
    rows: dict[str, int] = field(default_factory=dict)


class Recorder:
    """Write what is known about one run into its log, in order.

    Each call takes the time of a line, and of copying its files. None raises because of a server or a full
    disk.
    """

    def __init__(self, log: Log):
        self._log = log

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers at a step (samples seen).

        MLflow stores infinity as 1.8e308, so a value that is not finite becomes the metric `nonfinite/<key>`
        = 1 at that step and a tag `nonfinite/<key>` that says which value it was.
        """
        numbers = {safe_key(key): float(value) for key, value in values.items()}
        odd = {f"nonfinite/{key}": value for key, value in numbers.items() if not math.isfinite(value)}
        finite = {key: value for key, value in numbers.items() if math.isfinite(value)} | dict.fromkeys(
            odd, 1.0
        )
        for part in _parts(finite, MAX_METRICS):
            self._log.append("metrics", {"values": part, "step": int(step)})
        if odd:
            self.tags({key: f"{value} at step {step}" for key, value in odd.items()})

    def params(self, values: Mapping[str, Any]) -> None:
        """Record settings, which cannot change afterwards. Values too long for MLflow are left out."""
        texts = {safe_key(key): _as_text(value) for key, value in values.items()}
        short = {key: text for key, text in texts.items() if len(text) <= MAX_PARAM_CHARS}
        for part in _parts(short, MAX_VALUES):
            self._log.append("params", {"values": part})

    def tags(self, values: Mapping[str, Any]) -> None:
        """Record texts that may be replaced later; MLflow cuts them at 8,000 characters."""
        texts = {safe_key(key): str(value) for key, value in values.items()}
        for part in _parts(texts, MAX_VALUES):
            self._log.append("tags", {"values": part})

    def image(self, key: str, image: bytes | np.ndarray, step: int) -> None:
        """Record a picture at a step; pictures of one key form a slider over the steps.

        image: the bytes of a PNG, or uint8 (H, W), (H, W, 3) or (H, W, 4).
        """
        data = image if isinstance(image, bytes) else _png(image)
        self._with_files(
            "image",
            {"key": safe_key(key), "step": int(step)},
            lambda files: (files / "image.png").write_bytes(data),
        )

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Record a copy of a file, or of a folder under its own name, in a folder of the run's artifacts."""
        path = Path(path)
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        self._with_files(
            "artifact", {"name": path.name, "folder": folder}, lambda files: copy(path, files / path.name)
        )

    def text(self, text: str, path: str) -> None:
        """Record a text as an artifact of a name that may hold folders."""
        folder, name = str(PurePosixPath(path).parent), PurePosixPath(path).name
        self._with_files(
            "artifact",
            {"name": name, "folder": "" if folder == "." else folder},
            lambda files: (files / name).write_text(text),
        )

    def table(self, path: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Record a table as a JSON artifact that MLflow's page shows as a table."""
        self.text(json.dumps({"columns": list(columns), "data": [list(row) for row in rows]}), path)
        self.tags({"mlflow.loggedArtifacts": json.dumps([{"path": path, "type": "table"}])})

    def model(self, folder: Path, name: str, step: int) -> None:
        """Record a model in MLflow's format. The folder is moved, not copied."""
        self._with_files(
            "model", {"name": name, "step": int(step)}, lambda files: shutil.move(folder, files / "model")
        )

    def datasets(self, facts: Sequence[DatasetFacts]) -> None:
        """Record the data sets that the run reads."""
        if facts:
            self._log.append("datasets", {"datasets": [asdict(fact) for fact in facts]})

    def start(self, experiment: str, name: str) -> None:
        """Record the beginning of a run that MLflow does not know yet."""
        self._log.append("start", {"experiment": experiment, "name": name})

    def status(self, status: str) -> None:
        """Record that the run goes on (RUNNING) or has ended (FINISHED, FAILED, KILLED)."""
        self._log.append("status", {"status": status})

    def _with_files(self, kind: str, body: dict[str, Any], write: Callable[[Path], Any]) -> None:
        """Record something with the files that `write` puts into a folder."""
        record_id = str(uuid.uuid4())
        files = self._log.files(record_id)
        try:
            files.mkdir(parents=True)
            write(files)
        except FileNotFoundError:  # what is to be copied is not there
            raise
        except OSError as error:
            shutil.rmtree(files, ignore_errors=True)
            self._log.lose(error)
        else:
            self._log.append(kind, body, record_id)


def safe_key(key: str) -> str:
    """Return a name that MLflow takes: letters, digits and `_-. /`, no empty path parts, 250 characters."""
    plain = re.sub(r"[^A-Za-z0-9_\-. /]", "_", key)
    parts = [part for part in plain.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:MAX_KEY_CHARS].rstrip("/") or "_"


def _parts(values: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    items = iter(values.items())
    while part := dict(islice(items, size)):
        yield part


def _as_text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def _png(image: np.ndarray) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
