"""The job on Ray that this process was submitted as."""

import json
import os

from mmdiff_ray.tracking.jobs import JOB_VARIABLE, RUN_KEY


def note_run(run_id: str) -> None:
    """Add a run's id to the metadata of this process's job; do nothing where it is no job.

    Ray has no public way for a job to add to its own metadata. Where the private one is another, only the
    run says what belongs together, by its tag.
    """
    import ray

    job = os.environ.get(JOB_VARIABLE)
    if not job or not ray.is_initialized():
        return
    try:
        from ray._private.ray_constants import KV_NAMESPACE_JOB
        from ray.dashboard.modules.job.common import JobInfoStorageClient
        from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

        key = JobInfoStorageClient.JOB_DATA_KEY.format(job_id=job)
        known = json.loads(_internal_kv_get(key, namespace=KV_NAMESPACE_JOB) or b"")
        known["metadata"] = {**(known.get("metadata") or {}), RUN_KEY: run_id}
        _internal_kv_put(key, json.dumps(known), overwrite=True, namespace=KV_NAMESPACE_JOB)
    except Exception:  # private names
        return
