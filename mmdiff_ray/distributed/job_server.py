"""The job server of a cluster: which one, with which token, and its errors in words."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdiff_ray.config import ConfigError, UnreachableError, without_passwords
from mmdiff_ray.distributed import local_cluster
from mmdiff_ray.distributed.local_cluster import LocalCluster

ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
HOW_TO_TOKEN = "set RAY_AUTH_TOKEN_PATH to the file of the cluster's token, or RAY_AUTH_TOKEN to the token"

NOISY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


@dataclass(frozen=True)
class Place:
    """Where a cluster's job server is. said_by: what named it; local: the cluster, if it is that of this
    folder."""

    url: str
    said_by: str
    local: LocalCluster | None = None

    def __str__(self) -> str:
        return without_passwords(self.url)


def find_place(given: str | None, folder: Path = local_cluster.FOLDER) -> Place:
    """Return the job server of `--address`, of the environment, or of the folder's local cluster.

    Raises ConfigError where nothing names one, or what does is no address of a job server.
    """
    local = local_cluster.read(folder)
    named = [("--address", given), *((name, os.environ.get(name)) for name in ADDRESSES)]
    for said_by, url in named:
        if url:
            url = _checked(url, said_by)
            return Place(url, said_by, local if local and local.address == url else None)
    if local is None:
        raise ConfigError(
            "no cluster is named: give --address http://HEAD:8265, set RAY_API_SERVER_ADDRESS to it, or "
            "start one on this machine: mmdiff cluster up"
        )
    return Place(local.address, f"{folder}/{local_cluster.STATE}", local)


def connect(place: Place) -> Any:
    """Return Ray's client of a job server. Raises ConfigError where none answers, or not to this token."""
    from ray.job_submission import JobSubmissionClient

    for name in NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    token = _token(place)
    headers = {"Authorization": f"Bearer {token}"} if token else None
    with server_errors(place, asked_with_token=bool(token)), _ray_finds(place.url), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return JobSubmissionClient(place.url, headers=headers)


@contextmanager
def server_errors(place: Place, job: str = "", asked_with_token: bool = True) -> Iterator[None]:
    """Turn what Ray's client raises in the block into ConfigError, in words."""
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError:
        found = "the token is not that of the cluster" if asked_with_token else "it asks for a token"
        raise ConfigError(f"the cluster at {_named(place)} refused: {found}; {HOW_TO_TOKEN}") from None
    except aiohttp.ClientError as error:  # of the connection that sends a job's output
        said = without_passwords(_first_line(error))
        raise UnreachableError(f"the cluster at {_named(place)} cannot be listened to: {said}") from None
    except (ConnectionError, requests.exceptions.RequestException):
        mend = "mmdiff cluster up" if place.local else "is its dashboard reachable from here?"
        raise ConfigError(f"no cluster answers at {_named(place)}; {mend}") from None
    except RuntimeError as error:
        if job and "does not exist" in str(error):
            raise ConfigError(f"there is no job {job!r} at {place}; see: mmdiff jobs list") from None
        raise ConfigError(f"the cluster at {_named(place)} refused: {_first_line(error)}") from None


def _token(place: Place) -> str | None:
    """Return the token to ask with: the local cluster's own, else as Ray looks for it; None for none."""
    if place.local is not None:
        return _read(Path(place.local.token_path), place.said_by)
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return _read(Path(path).expanduser(), "RAY_AUTH_TOKEN_PATH")
    default = Path.home() / ".ray" / "auth_token"
    wanted = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    return _read(default, "RAY_AUTH_MODE=token") if wanted else None


def _read(path: Path, said_by: str) -> str:
    try:
        return path.read_text(encoding="utf8").strip()
    except OSError as error:
        raise ConfigError(f"{said_by}: no token in {path}: {error.strerror}; {HOW_TO_TOKEN}") from None


def _checked(url: str, said_by: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ConfigError(
            f"{said_by} ({without_passwords(url)}) must be the address of the cluster's dashboard, where "
            "jobs are submitted: http://HEAD:8265 (--address goes before the environment)"
        )
    return url.rstrip("/")


def _named(place: Place) -> str:
    return f"{place} ({place.said_by})"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


@contextmanager
def _ray_finds(url: str) -> Iterator[None]:
    """Make Ray's client use an address: it lets the environment outrank the one that it is given."""
    before = os.environ.get(ADDRESSES[0])
    os.environ[ADDRESSES[0]] = url
    try:
        yield
    finally:
        if before is None:
            del os.environ[ADDRESSES[0]]
        else:
            os.environ[ADDRESSES[0]] = before
