"""What all tests share."""

from collections.abc import Iterator

import pytest
import torch


def pytest_configure() -> None:
    """Use one thread: on tensors as small as the tests' more threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a data set of 200 sprites."""
    from tests.sprites import build_sprites

    return build_sprites(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster, one for all tests that use it."""
    from mmdiff_ray.distributed.cluster import cluster

    with cluster(8):
        yield
