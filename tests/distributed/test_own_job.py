"""A job's metadata name its run, also where the job trains in its own process."""

import json
import os
import subprocess
import sys

import pytest

from mmdiff_ray.tracking.jobs import JOB_VARIABLE, RUN_KEY

NOTE = """
import ray
from mmdiff_ray.distributed.own_job import note_run
note_run("the run")
assert not ray.is_initialized()
"""


@pytest.mark.slow
@pytest.mark.ray
def test_job_that_has_not_started_ray_itself_gets_its_run_beside_what_it_has(ray_cluster):
    import ray
    from ray._private.ray_constants import KV_NAMESPACE_JOB
    from ray._raylet import GcsClient
    from ray.dashboard.modules.job.common import JobInfoStorageClient

    address = ray.get_runtime_context().gcs_address
    store = GcsClient(address=address)  # Ray's own one of this process goes with any cluster that ends in it
    key = JobInfoStorageClient.JOB_DATA_KEY.format(job_id="tiny-1a2b3c").encode()
    facts = {"status": "RUNNING", "metadata": {"mmdiff.command": "train tiny.yaml"}}
    store.internal_kv_put(key, json.dumps(facts).encode(), True, KV_NAMESPACE_JOB)
    job = {JOB_VARIABLE: "tiny-1a2b3c", "RAY_ADDRESS": address}
    subprocess.run([sys.executable, "-c", NOTE], env=os.environ | job, check=True)
    noted = json.loads(store.internal_kv_get(key, KV_NAMESPACE_JOB))
    assert noted == {**facts, "metadata": {**facts["metadata"], RUN_KEY: "the run"}}
