"""Nodes that an autoscaler starts when a run needs them, and nodes with labels."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from mmdiff_ray.runs.job import read_run
from tests import sprites as tiny
from tests.autoscaling import autoscaling_cluster
from tests.distributed.placed import placed
from tests.sweeps import tiny as sweeps

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

SHORT = ("train.samples=64", "evaluate.evaluators=[]", "workers.count=2", "workers.threads=1")


def environment(address: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {**kept, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}


def mmdiff(address: str, *words: object) -> tuple[int, str, str]:
    """Run a command on a cluster and return its exit code, what it printed, and its errors."""
    done = subprocess.run(
        [sys.executable, "-m", "mmdiff_ray.cli", *map(str, words)],
        capture_output=True,
        text=True,
        env=environment(address),
        timeout=240,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def growing(tmp_path_factory) -> Iterator[str]:
    """The address of a cluster without workers whose autoscaler may start two nodes of two CPUs."""
    node = {"resources": {"CPU": 2}, "min_workers": 0, "max_workers": 2, "labels": {"kind": "small"}}
    with autoscaling_cluster(tmp_path_factory.mktemp("growing"), {"small": node}) as address:
        yield address


@pytest.mark.parametrize(
    "wanted, message",
    [
        (
            ["workers.count=4"],
            "workers.cpus and workers.data_workers: 4 workers need 8 CPUs, the cluster has 0, and its",
        ),
        (
            ["workers.labels={kind: huge}"],
            "workers.labels: 2 workers need 2 CPUs on nodes with the labels kind=huge, the cluster",
        ),
    ],
)
def test_what_no_autoscaler_could_bring_is_told_before_anything_starts(
    growing, sprites, tmp_path, wanted, message
):
    file = tiny.write_config(tmp_path, sprites, *SHORT, *wanted)
    code, said, errors = mmdiff(growing, "train", file)
    assert code == 2 and message in errors, said + errors
    assert "waiting for the cluster to start nodes" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.faults
def test_training_waits_for_the_nodes_that_it_needs_and_finishes(growing, sprites, tmp_path):
    file = tiny.write_config(tmp_path, sprites, *SHORT)
    code, said, errors = mmdiff(growing, "train", file)
    assert code == 0, said + errors
    assert "waiting for the cluster to start nodes: 2 workers need 4 CPUs, the cluster has 0\n" in said
    assert "training on 2 workers" in said
    assert read_run(tmp_path / "runs" / "tiny")["state"] == "finished"


def test_a_sweep_waits_for_the_node_that_a_trial_needs(growing, sprites, tmp_path):
    file = sweeps.write(tmp_path, sprites, budget={"trials": 1, "samples": 32, "reports": 1})
    code, said, errors = mmdiff(growing, "sweep", file, "workers.cpus=2", "--runs", tmp_path / "runs")
    assert code == 0 and "trial 0: finished" in said, said + errors


def test_data_are_built_on_nodes_that_are_started_for_it(tmp_path):
    node = {"resources": {"CPU": 2}, "min_workers": 0, "max_workers": 1, "labels": {"kind": "small"}}
    words = ["data", "build", "sprites", "--count", "40", "--size", "16", "--out", tmp_path / "sprites"]
    with autoscaling_cluster(tmp_path, {"small": node}) as address:
        code, said, errors = mmdiff(address, *words)
    assert code == 0 and "train" in said, said + errors
    assert "waiting for the cluster to start nodes: the work needs 1 CPU, the cluster has 0\n" in said


@pytest.fixture(scope="module")
def mixed() -> Iterator[str]:
    """The address of a cluster of a node that trains and a node that reads."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        patch.setenv("RAY_AUTH_MODE", "disabled")  # as its commands have it
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(num_cpus=4, labels={"kind": "trainer"}, resources={"fast": 1})
        cluster.add_node(num_cpus=4, labels={"kind": "reader"}, resources={"fast": 1})
    yield cluster.address
    cluster.shutdown()


def test_workers_and_their_readers_run_on_the_nodes_that_are_labelled_for_them(mixed, sprites, tmp_path):
    labels = ("workers.labels={kind: trainer}", "workers.data_labels={kind: reader}")
    found = placed(tiny.write_config(tmp_path, sprites, *SHORT, *labels), environment(mixed))
    assert where(found, "TrainWorker") == {"trainer"}, found
    assert where(found, "MapWorker") == {"reader"}, found


def test_workers_share_a_node_only_as_far_as_it_has_the_resource_that_they_ask_for(mixed, sprites, tmp_path):
    file = tiny.write_config(tmp_path, sprites, *SHORT, "workers.resources={fast: 1}")
    assert where(placed(file, environment(mixed)), "TrainWorker") == {"trainer", "reader"}


@pytest.mark.parametrize(
    "wanted, message",
    [
        (
            ["workers.count=1", "workers.cpus=5"],
            "workers.cpus: 1 worker needs 5 CPUs on one node, no node has that many",
        ),
        (
            [
                "workers.count=2",
                "workers.cpus=3",
                "workers.resources={fast: 0.5}",
                "workers.labels={kind: reader}",
            ],
            "workers.labels: 2 workers need 6 CPUs on nodes",
        ),
        (
            ["workers.count=3", "workers.resources={fast: 0.6}"],
            "3 workers need 1 CPU and 0.6 of `fast` each, the nodes have room for 2; try fewer workers",
        ),
    ],
)
def test_workers_that_no_node_has_room_for_are_told_before_anything_starts(
    mixed, sprites, tmp_path, wanted, message
):
    code, said, errors = mmdiff(mixed, "train", tiny.write_config(tmp_path, sprites, *SHORT, *wanted))
    assert code == 2 and message in errors, said + errors
    assert not (tmp_path / "runs").exists()


def where(found: dict[str, set[str | None]], part: str) -> set[str | None]:
    """Return the kinds of the nodes of all that ran whose class has a part in its name."""
    return {kind for name, kinds in found.items() if part in name for kind in kinds}


def test_data_are_built_on_the_nodes_that_are_labelled_for_it(mixed, tmp_path):
    words = ["data", "build", "sprites", "--count", "40", "--size", "16", "--out", tmp_path / "sprites"]
    code, said, errors = mmdiff(mixed, *words, "--label", "kind=reader")
    assert code == 0 and "train" in said, errors
    code, said, errors = mmdiff(mixed, *words, "--force", "--label", "kind=nobody")
    assert code == 2, said + errors
    assert "--label: no node of the cluster has all of {'kind': 'nobody'}; there are kind=reader" in errors


def test_label_that_no_node_has_is_told_before_anything_starts(mixed, sprites, tmp_path):
    file = tiny.write_config(tmp_path, sprites, *SHORT, "workers.data_labels={kind: fast}")
    code, said, errors = mmdiff(mixed, "train", file)
    assert code == 2 and not (tmp_path / "runs").exists(), said + errors
    assert "workers.data_labels: 2 workers need 2 CPUs on nodes with the labels kind=fast" in errors
    assert "waiting" not in said
