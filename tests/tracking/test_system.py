import threading

from mmdiff_ray.tracking import queries
from mmdiff_ray.tracking.system import SystemMonitor
from mmdiff_ray.tracking.tracker import Tracker


def test_the_load_of_the_machine_is_recorded_at_the_samples_seen_then(uri, run_id, tmp_path):
    tracker, asked = Tracker(uri, run_id, tmp_path), threading.Semaphore(0)
    seen = iter(range(0, 10**9, 64))

    def step() -> int:
        asked.release()
        return next(seen)

    monitor = SystemMonitor(tracker, step, node="node-0", interval_s=0.01)
    for _ in range(3):
        assert asked.acquire(timeout=60)
    monitor.stop()
    assert tracker.close(30) == 0
    memory = queries.history(uri, run_id, "system/node-0/system_memory_usage_percentage")
    assert [point[0] for point in memory[:3]] == [0, 64, 128]
    assert all(0 < value < 100 for _, value in memory)
    recorded = queries.latest(uri, run_id)
    assert {f"system/node-0/{key}" for key in ("cpu_utilization_percentage", "disk_usage_percentage")} <= set(
        recorded
    )
