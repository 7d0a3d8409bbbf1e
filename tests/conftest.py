"""What all tests share."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import s3


def pytest_configure() -> None:
    """Use one thread: on tensors as small as the tests' more threads only wait for each other.

    Start Ray's workers when they are wanted, and keep few that are idle: each holds a gigabyte once it has
    imported torch. Let them have their share of the processors: by Ray's default they wait behind all others.
    """
    torch.set_num_threads(1)
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    os.environ.setdefault("RAY_num_workers_soft_limit", "2")
    os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Have one process run all tests of a file that uses Ray, for they share a cluster.

    They wait most of the time, and count the processes below their own alone: two such files run at once.
    """
    from xdist.scheduler import LoadScopeScheduling

    class FilesOfRay(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if _uses_ray(file) else nodeid

    return FilesOfRay(config, log)


@functools.cache
def _uses_ray(file: str) -> bool:
    return "pytest.mark.ray" in (Path(__file__).parents[1] / file).read_text(encoding="utf8")


@pytest.fixture(scope="session")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a data set of 200 sprites."""
    from tests.sprites import build_sprites

    return build_sprites(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def finished(sprites: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny run, trained and evaluated by `mmdiff train` in this process (`tests.sprites.Finished`)."""
    from tests.sprites import finish

    return finish(tmp_path_factory.mktemp("finished"), sprites)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster, one for all tests that use it."""
    from mmdiff_ray.distributed.cluster import cluster

    with cluster(8):
        yield


@pytest.fixture(scope="module")
def bucket() -> Iterator[s3.Bucket]:
    """An empty bucket on a real S3 server, with its keys in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.KEYS.items():
            patch.setenv(name, value)
        with s3.serve() as bucket:
            yield bucket
