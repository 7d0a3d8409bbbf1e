"""The job on Ray that this process was submitted as."""

import json
import os

from mmdiff_ray.tracking.jobs import JOB_VARIABLE, RUN_KEY


def note_run(run_id: str) -> None:
    """Add a run's id to the metadata of this process's job; do nothing where it is no job.

    Ray has no public way for a job to add to its own metadata. Where the private one is another, only the
    run says what belongs together, by its tag. Ray need not run in this process: a job knows its cluster.
    """
    job, cluster = os.environ.get(JOB_VARIABLE), os.environ.get("RAY_ADDRESS")
    if not job or not cluster:
        return
    try:
        from ray._private.ray_constants import KV_NAMESPACE_JOB
        from ray._raylet import GcsClient  # type: ignore[attr-defined]
        from ray.dashboard.modules.job.common import JobInfoStorageClient

        store = GcsClient(address=cluster)
        key = JobInfoStorageClient.JOB_DATA_KEY.format(job_id=job).encode()
        known = json.loads(store.internal_kv_get(key, KV_NAMESPACE_JOB) or b"")
        known["metadata"] = {**(known.get("metadata") or {}), RUN_KEY: run_id}
        store.internal_kv_put(key, json.dumps(known).encode(), True, KV_NAMESPACE_JOB)
    except Exception:  # private names
        return
