"""The cluster a command runs on."""

import os

import pytest

from mmdiff_ray.config import ConfigError, WorkersConfig
from mmdiff_ray.distributed.cluster import check_resources, cluster, cpus_needed, log_folder, resources


def test_cpus_for_workers_their_readers_and_the_rest():
    assert cpus_needed(WorkersConfig(count=2, cpus=1, data_workers=1)) == 5
    assert cpus_needed(WorkersConfig(count=3, cpus=2, data_workers=4)) == 19


def test_training_in_this_process_asks_for_no_cluster():
    import ray

    before = ray.is_initialized()
    with resources(WorkersConfig(count=0)):
        assert ray.is_initialized() == before


@pytest.mark.parametrize(
    "address, message",
    [
        ("http://head:8265", "is a dashboard; set the cluster's own address, HEAD:6379"),
        ("https://me:hidden@head", r"\(https://head\) is a dashboard"),
        ("nonsense", "Invalid address: nonsense; want HEAD:6379, or none"),
    ],
)
def test_address_that_is_none_of_a_cluster_is_told(monkeypatch, address, message):
    import ray

    def init(address: str, **options: object) -> None:
        raise ValueError(f"Invalid address: {address}")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=f"^RAY_ADDRESS .*{message}") as error, cluster():
        raise AssertionError("the block must not run")
    assert "hidden" not in str(error.value)


@pytest.mark.ray
def test_cluster_in_use_is_shared_and_outlives_the_block(ray_cluster):
    import ray

    with cluster(1000):
        assert ray.is_initialized()
    assert ray.is_initialized()
    assert os.path.isdir(log_folder())


@pytest.mark.ray
@pytest.mark.parametrize(
    "wanted, message",
    [
        (
            WorkersConfig(count=40, cpus=2, data_workers=1),
            r"workers.cpus and workers.data_workers: 40 workers need 120 CPUs, the cluster has \d+; "
            r"try fewer workers \(workers.count=20\)",
        ),
        (WorkersConfig(count=80, least=40, cpus=2), "40 workers need 120 CPUs, the cluster has"),
        (WorkersConfig(count=1, gpus=64), "workers.gpus: 1 worker needs 64 GPUs, the cluster has [0-9.]+$"),
        (
            WorkersConfig(count=2, resources={"fast": 1.5}),
            "workers.resources: 2 workers need 3 of `fast`, the cluster has 0",
        ),
    ],
)
def test_too_small_a_cluster_is_told_before_it_is_asked(ray_cluster, wanted, message):
    with pytest.raises(ConfigError, match=message):
        check_resources(wanted)
    with pytest.raises(ConfigError, match=message), resources(wanted):
        raise AssertionError("the block must not run")


@pytest.mark.ray
def test_cluster_that_holds_all_is_provided(ray_cluster):
    with resources(WorkersConfig(count=2, cpus=1, data_workers=1)):
        pass
