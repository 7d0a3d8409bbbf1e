"""The tracking server's options are MLflow's, the compose file is Compose's, the page's commands work."""

import json
import os
import re
import shlex
import shutil
import subprocess
from typing import Any

import compose_pydantic
import pytest
import sqlalchemy

from mmdiff_ray import config as configuration
from mmdiff_ray.cli import make_parser
from mmdiff_ray.distributed.cluster import cpus_needed
from tests.cluster.files import CLUSTER, COMMANDS, README, ROOT, documents, pairs

(COMPOSE,) = documents("compose.yaml")
EXAMPLE = (CLUSTER / ".env.example").read_text(encoding="utf8")
(DEPLOYMENT,) = [item for item in documents("kuberay/mlflow.yaml") if item["kind"] == "Deployment"]
(SERVER,) = DEPLOYMENT["spec"]["template"]["spec"]["containers"]


def filled(text: str) -> str:
    """Return a text of compose.yaml with its variables at their defaults."""
    return re.sub(r"\$\{(\w+):[-?]([^}]*)\}", r"\2", text)


SERVERS = {
    "compose": [filled(word) for word in COMPOSE["services"]["mlflow"]["command"]][2:],
    "kubernetes": [word.replace("$(ARTIFACTS_BUCKET)", "mlflow") for word in SERVER["args"]],
}


def test_compose_file_has_only_what_compose_has():
    compose_pydantic.ComposeSpecification.model_validate(COMPOSE)


def test_compose_itself_reads_the_file(tmp_path):
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("no `docker compose` here")
    filled_in = re.sub(r"^(\w+)=$", r"\1=secret", EXAMPLE, flags=re.M)
    (tmp_path / ".env").write_text(filled_in)
    command = [docker, "compose", "--env-file", str(tmp_path / ".env"), "-f", str(CLUSTER / "compose.yaml")]
    done = subprocess.run([*command, "config", "--format", "json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (port,) = json.loads(done.stdout)["services"]["mlflow"]["ports"]
    assert port["host_ip"] == "127.0.0.1"


def test_every_service_is_watched_restarted_and_keeps_its_data_in_a_named_volume():
    services, kept = COMPOSE["services"], COMPOSE["volumes"].keys()
    for name, service in services.items():
        assert service["healthcheck"]["test"][0] == "CMD" and service["restart"] == "unless-stopped"
        assert ":" in service["image"] and not service["image"].endswith(":latest")
        volumes = {volume.split(":")[0] for volume in service.get("volumes", [])}
        assert volumes == ({name} & kept or {"scratch"})
    assert services["mlflow"]["read_only"] and services["mlflow"]["volumes"] == ["scratch:/tmp"]
    waits = services["mlflow"]["depends_on"]
    assert waits == {name: {"condition": "service_healthy"} for name in ("postgres", "store")}


def test_only_mlflow_is_published_and_on_loopback():
    published = {
        name: service["ports"] for name, service in COMPOSE["services"].items() if "ports" in service
    }
    assert {name: [filled(port) for port in ports] for name, ports in published.items()} == {
        "mlflow": ["127.0.0.1:5000:5000"]
    }
    assert "MLFLOW_BIND=127.0.0.1\n" in EXAMPLE


def test_secrets_come_from_a_file_that_is_never_committed():
    text = (CLUSTER / "compose.yaml").read_text(encoding="utf8")
    for name in set(re.findall(r"\$\{(\w+)", text)):
        assert re.search(rf"^{name}=", EXAMPLE, re.M), f"{name} is not in .env.example"
    for name in ("POSTGRES_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert re.search(rf"^{name}=$", EXAMPLE, re.M), f"{name} has a value in .env.example"
        assert f"${{{name}:?" in text and f"${{{name}:-" not in text
    for key in ("POSTGRES_PASSWORD", "PGPASSWORD", "AWS_SECRET_ACCESS_KEY"):
        assert all(value.startswith("${") for value in pairs(COMPOSE, key))
    if shutil.which("git") and (ROOT / ".git").exists():
        ignored = subprocess.run(["git", "check-ignore", "-q", "cluster/.env"], cwd=ROOT)
        assert ignored.returncode == 0


@pytest.mark.parametrize("where", SERVERS)
def test_mlflow_takes_the_servers_options(where):
    from mlflow.cli import server

    options = server.make_context("server", list(SERVERS[where])).params
    assert options["artifacts_destination"] == "s3://mlflow" and options["serve_artifacts"]
    assert options["host"] == "0.0.0.0" and options["port"] == 5000
    assert "mlflow:*" in options["allowed_hosts"].split(",")
    assert not sqlalchemy.make_url(options["backend_store_uri"]).password
    dialect = sqlalchemy.create_engine(options["backend_store_uri"]).dialect  # imports the driver
    assert (dialect.name, dialect.driver) == ("postgresql", "psycopg2")


def test_variables_of_the_servers_are_mlflows():
    from mlflow import environment_variables

    named = {entry["name"] for entry in SERVER["env"]} | COMPOSE["services"]["mlflow"]["environment"].keys()
    for name in named:
        assert not name.startswith("MLFLOW_") or hasattr(environment_variables, name), name
    assert DEPLOYMENT["spec"]["template"]["spec"]["enableServiceLinks"] is False


def arguments_of(words: list[str]) -> list[str] | None:
    """Return the arguments of `mmdiff` in a command, or None where it is not called."""
    return words[words.index("mmdiff") + 1 :] if "mmdiff" in words else None


def mmdiff_commands() -> list[list[str]]:
    """Return the arguments of every `mmdiff` on the page, those inside other commands too."""
    found = []
    for line in COMMANDS:
        words = shlex.split(line)
        for part in [words, *(shlex.split(word) for word in words if word.startswith("mmdiff "))]:
            if (arguments := arguments_of(part)) and not arguments[0].startswith("--"):
                found.append(arguments)
    return found


def test_mmdiff_takes_every_command_of_the_page():
    parser, found = make_parser(), 0
    known = parser.format_help()
    for arguments in mmdiff_commands():
        inner = arguments[arguments.index("--") + 1 :] if "--" in arguments else None
        for words in filter(None, (arguments, inner)):
            if not re.search(rf"^ +{words[0]} ", known, re.M) and words[0] in ("submit", "jobs"):
                continue  # not merged yet
            parsed: Any = parser.parse_args(words)
            found += 1
            if getattr(parsed, "config", None):
                assert (ROOT / parsed.config).is_file(), parsed.config
    assert found >= 4
    makefile = (ROOT / "Makefile").read_text(encoding="utf8")
    for line in COMMANDS:
        if line.startswith("make ") and " submit " in known:
            assert re.search(rf"^{line.split()[1]}:", makefile, re.M), line


def test_job_that_a_cluster_elsewhere_may_lose_can_be_submitted_again_as_it_is():
    lines = [line for line in COMMANDS if "mmdiff submit --address" in line]
    assert len(lines) == 2 and all(line.endswith(" --continue") for line in lines)


def test_page_says_what_the_run_needs():
    workers = configuration.load([ROOT / "pipelines/configs/openmoji_gpu.yaml"]).workers
    needed = f"{cpus_needed(workers) - 1} CPUs and {workers.count * workers.gpus:g} GPU"
    assert f"{needed}:" in README


def test_every_file_that_the_page_names_is_there():
    named = set(re.findall(r"\b(?:cluster|pipelines)/[\w./-]*\w", README)) - {"cluster/.env"}
    loops = re.findall(r"for file in ([\w ]+); do .*?cluster/kuberay/\$file\.yaml", README)
    named |= {f"cluster/kuberay/{name}.yaml" for loop in loops for name in loop.split()}
    named = {name for name in named if not name.endswith("kuberay")}
    assert {"cluster/compose.yaml", "cluster/kuberay/raycluster.yaml", "cluster/aws.yaml"} <= named
    for name in named:
        assert (ROOT / name).exists(), name


def test_every_line_to_change_is_marked():
    for name in ("aws.yaml", "gcp.yaml"):
        for line in (CLUSTER / name).read_text(encoding="utf8").splitlines():
            placeholder = re.search(
                r"example\.com|0000000|my-project|10\.0\.0\.2|region:|_zone:|us-(west|central)", line
            )
            assert not placeholder or "(yours)" in line or "/mnt/mmdiff" in line, line
    assert "(yours)" in README


def test_shell_reads_every_command_of_the_page():
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    done = subprocess.run([bash, "-n"], input="\n".join(COMMANDS), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not any(os.sep + "home" + os.sep in line for line in COMMANDS)
