"""Sample the load of this machine into a tracker, under the names that MLflow's system page shows.

MLflow's own monitor asks the store before every sample and ends at the first answer that does not come; this
one only borrows its gauges (processors, memory, disk, network; GPUs where `nvidia-ml-py` or `pyrsmi` is
installed).
"""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from mmdiff_ray.tracking.recorder import Recorder


class SystemMonitor:
    """Record `system/...` metrics every few seconds in a daemon thread."""

    def __init__(self, recorder: Recorder, step: Callable[[], int], node: str = "", interval_s: float = 10.0):
        """Begin to sample.

        step: asked at each sample, the samples seen so far. node: a name put into the keys, for the runs of
        several machines.
        """
        self._recorder, self._step, self._interval_s = recorder, step, interval_s
        self._prefix = f"system/{node}/" if node else "system/"
        self._gauges = _gauges()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system-monitor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the sampling; the tracker may be closed afterwards."""
        self._ended.set()
        self._thread.join(self._interval_s)

    def _work(self) -> None:
        for gauge in self._gauges:  # the first reading of a load counts from an unknown moment
            gauge.collect_metrics()
            gauge.clear_metrics()
        while not self._ended.wait(self._interval_s):
            values = {key: value for gauge in self._gauges for key, value in _read(gauge).items()}
            self._recorder.metrics({self._prefix + key: value for key, value in values.items()}, self._step())


def _read(gauge: Any) -> dict[str, float]:
    gauge.collect_metrics()
    values = gauge.aggregate_metrics()
    gauge.clear_metrics()
    return values


def _gauges() -> list[Any]:
    """Return MLflow's gauges for what this machine has."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    gauges = []
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor, ROCMMonitor):
        with contextlib.suppress(Exception):  # whatever a missing device or driver raises
            gauges.append(kind())
    return gauges
