"""The manifests are what Kubernetes and KubeRay take, agree with each other, and a retried job goes on."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonpatch
import jsonschema
import kubernetes_validate
import pytest
import yaml

from mmdiff_ray import config as configuration
from mmdiff_ray.cli import make_parser
from mmdiff_ray.distributed.cluster import cpus_needed
from tests.cluster.files import CLUSTER, COMMANDS, README, ROOT, documents, locked, pairs

KUBERNETES = "1.34"
SCHEMA = json.loads((Path(__file__).parent / "schemas/kuberay.json").read_text(encoding="utf8"))
FULL = "MMDIFF_KUBERAY_SCHEMAS"
(CLUSTER_FILE,) = documents("kuberay/raycluster.yaml")
(JOB_FILE,) = documents("kuberay/rayjob.yaml")
RAY_FILES = {"RayCluster": CLUSTER_FILE, "RayJob": JOB_FILE}
SPECS = {"RayCluster": CLUSTER_FILE["spec"], "RayJob": JOB_FILE["spec"]["rayClusterSpec"]}
CORE = [*documents("kuberay/mlflow.yaml"), *documents("kuberay/storage.yaml")]
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "m": 1e-3, "": 1}
JOBS_CONFIG = configuration.load([ROOT / "pipelines/configs/openmoji_gpu.yaml"])


def amount(quantity: str | int) -> float:
    """Return a quantity of Kubernetes as a number: 2Gi, 500m, 4."""
    number, unit = re.fullmatch(r"([0-9.]+)(\w*)", str(quantity)).groups()
    return float(number) * UNITS[unit]


def groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the head's group and the workers'."""
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def pods() -> list[tuple[str, dict[str, Any]]]:
    """Return every pod that the manifests make, by a name."""
    found = [
        (f"{kind} {group.get('groupName', 'head')}", group["template"])
        for kind, spec in SPECS.items()
        for group in groups(spec)
    ]
    found.append(("submitter", JOB_FILE["spec"]["submitterPodTemplate"]))
    found += [
        (item["metadata"]["name"], item["spec"]["template"]) for item in CORE if "template" in item["spec"]
    ]
    return found


def capacity(spec: dict[str, Any], resource: str) -> float:
    """Return how much of a resource the workers have that are always there."""
    return sum(
        group["minReplicas"] * amount(container["resources"]["limits"].get(resource, 0))
        for group in spec["workerGroupSpecs"]
        for container in group["template"]["spec"]["containers"]
    )


def holds(spec: dict[str, Any]) -> bool:
    """Return whether those workers can hold a run of the config that the job trains."""
    workers = JOBS_CONFIG.workers
    needed = {"cpu": cpus_needed(workers) - 1, "nvidia.com/gpu": workers.count * workers.gpus}
    return all(capacity(spec, resource) >= number for resource, number in needed.items())


@pytest.mark.parametrize("kind", RAY_FILES)
def test_ray_manifest_has_only_fields_that_kuberay_has(kind):
    jsonschema.validate(RAY_FILES[kind], SCHEMA)
    assert RAY_FILES[kind]["kind"] == kind


@pytest.mark.parametrize("kind", RAY_FILES)
def test_ray_manifest_fits_the_operators_own_schema(kind):
    file = os.environ.get(FULL)
    if not file:
        pytest.skip(f"{FULL} names no file with the schemas of KubeRay's resources, by kind (JSON, or .gz)")
    data = Path(file).read_bytes()
    schemas = json.loads(gzip.decompress(data) if file.endswith(".gz") else data)
    schema = closed(schemas[kind]["properties"]["spec"])
    jsonschema.validate(RAY_FILES[kind]["spec"], schema)


def closed(schema: Any) -> Any:
    """Return a schema that refuses the keys it does not name, as the API server does with strict fields."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(part) for key, part in schema.items()}
    return {"additionalProperties": False, **inner} if isinstance(schema.get("properties"), dict) else inner


@pytest.mark.parametrize(
    ("name", "template"), pods(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_pod_is_one_that_kubernetes_takes(name, template):
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": template["metadata"], "spec": template["spec"]}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("item", CORE, ids=lambda item: f"{item['kind']}-{item['metadata']['name']}")
def test_core_manifest_is_one_that_kubernetes_takes(item):
    kubernetes_validate.validate(item, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    ("name", "template"), pods(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_pod_keeps_the_restricted_security_standard_and_its_memory(name, template):
    spec = template["spec"]
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert (
        spec.get("automountServiceAccountToken") is False or "head" in name
    )  # its autoscaler asks Kubernetes
    volumes = {volume["name"] for volume in spec.get("volumes", [])} | {"data"}
    for container in spec["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        asked, most = container["resources"]["requests"], container["resources"]["limits"]
        assert asked["memory"] == most["memory"]
        assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes


@pytest.mark.parametrize("kind", SPECS)
def test_object_store_fits_into_shared_memory_and_that_into_the_container(kind):
    for group in groups(SPECS[kind]):
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        (shm,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
        (volume,) = [volume["emptyDir"] for volume in spec["volumes"] if volume["name"] == shm]
        store = int(group["rayStartParams"]["object-store-memory"])
        assert volume["medium"] == "Memory"
        assert store < amount(volume["sizeLimit"]) <= amount(container["resources"]["limits"]["memory"]) / 2


@pytest.mark.parametrize("kind", SPECS)
def test_cluster_has_the_locked_ray_a_token_and_workers_from_zero_upwards(kind):
    spec = SPECS[kind]
    assert {spec["rayVersion"]} == locked()["ray"]
    assert spec["authOptions"] == {"mode": "token"} and spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert "gpu" not in group["groupName"] or group["template"]["spec"]["tolerations"]
    for group in groups(spec):
        assert group["template"]["spec"]["restartPolicy"] == "Never"
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "MLFLOW_TRACKING_URI", "value": "http://mlflow:5000"} in container["env"]
        assert container["image"].endswith(":gpu") == ("nvidia.com/gpu" in container["resources"]["limits"])


@pytest.mark.parametrize("kind", SPECS)
def test_every_group_of_workers_has_its_name_as_a_label(kind):
    """Ray's labels, which `workers.labels` and `workers.data_labels` name."""
    for group in SPECS[kind]["workerGroupSpecs"]:
        assert group["labels"] == {"pool": group["groupName"]}


def test_applied_manifests_name_the_images_that_were_pushed_and_the_registrys_secret():
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    page = "\n".join(COMMANDS)
    applying = [line for line in COMMANDS if "cluster/kuberay/" in line and "sed " in line]
    pushing = re.search(r"^for name in .*docker push .*$", page, re.M).group()
    program = ["kubectl() { cat; echo ---; }", "docker() { echo $2 >&2; }", *applying, pushing]
    variables = {"PATH": os.environ["PATH"], "REGISTRY": "here.example.com/us", "TAG": "1a2b3c4"}
    done = subprocess.run(
        [bash, "-c", "\n".join(program)], capture_output=True, text=True, cwd=ROOT, env=variables, check=True
    )
    pushed = {f"here.example.com/us/mmdiff:{name}-1a2b3c4" for name in ("cpu", "gpu", "mlflow")}
    assert set(done.stderr.split()) == pushed
    specs = [
        spec
        for item in yaml.safe_load_all(done.stdout)
        for spec in pairs(item, "spec")
        if "containers" in spec
    ]
    ours = [(spec, spec["containers"][0]["image"]) for spec in specs if "imagePullSecrets" in spec]
    assert {image for _, image in ours} == pushed and len(ours) == len(specs) - 1
    for spec, _ in ours:
        assert spec["imagePullSecrets"] == [{"name": "mmdiff-registry"}]
    assert "docker-registry mmdiff-registry" in README


def test_jobs_cluster_is_the_other_one_but_for_the_workers_that_must_be_there():
    def alike(spec: dict[str, Any]) -> dict[str, Any]:
        workers = [{**group, "replicas": 0, "minReplicas": 0} for group in spec["workerGroupSpecs"]]
        return {**spec, "workerGroupSpecs": workers}

    assert alike(SPECS["RayJob"]) == alike(SPECS["RayCluster"]) == SPECS["RayCluster"]
    assert holds(SPECS["RayJob"]) and not holds(SPECS["RayCluster"])


def test_patch_on_the_page_brings_up_workers_that_hold_the_run():
    (line,) = [line for line in COMMANDS if line.startswith("kubectl patch raycluster mmdiff ")]
    patch = re.search(r"--patch '(.*)'$", line).group(1)
    assert holds(jsonpatch.apply_patch(CLUSTER_FILE, json.loads(patch))["spec"])


def test_retried_job_goes_on_with_its_run(tmp_path):
    """The entrypoint is read as on its way: the submitter's shell, `ray job submit`, the job's shell."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/mmdiff").write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$@"\n')
    (tmp_path / "bin/mmdiff").chmod(0o755)
    entrypoint = JOB_FILE["spec"]["entrypoint"].replace("/mnt/mmdiff", str(tmp_path))
    show = f"{sys.executable} -c 'import sys; print(chr(0).join(sys.argv[1:]), end=str())' {entrypoint}"
    words = subprocess.run([bash, "-c", show], capture_output=True, text=True, check=True).stdout.split("\0")
    submitted = subprocess.list2cmdline(words)  # what Ray's command line makes of them
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}

    done = subprocess.run(
        [bash, "-c", submitted], capture_output=True, text=True, env=environment, check=True
    )
    folder, *given = done.stdout.splitlines()
    command = make_parser().parse_args(given)
    assert folder == str(tmp_path), "where runs/ is"
    assert command.command == "train" and command.resume_or_start and command.overrides == []
    assert (ROOT / Path(command.config).relative_to("/app")) == ROOT / "pipelines/configs/openmoji_gpu.yaml"
    assert JOB_FILE["spec"]["backoffLimit"] > 0 and JOB_FILE["spec"]["shutdownAfterJobFinishes"]


def test_what_is_referred_to_is_there():
    claims = {item["metadata"]["name"] for item in CORE if item["kind"] == "PersistentVolumeClaim"}
    named = {claim["claimName"] for claim in pairs([*SPECS.values()], "persistentVolumeClaim")}
    assert named == claims == {"mmdiff-shared"}
    example = (CLUSTER / ".env.example").read_text(encoding="utf8")
    for reference in pairs([*RAY_FILES.values(), *CORE], "secretKeyRef"):
        assert reference["name"] == "mmdiff-storage"
        needed = "" if not reference.get("optional") else "# "
        assert re.search(rf"^{needed}{reference['key']}=", example, re.M), reference
    services = {item["metadata"]["name"]: item["spec"] for item in CORE if item["kind"] == "Service"}
    for item in CORE:
        if "template" in item["spec"]:
            labels = item["spec"]["template"]["metadata"]["labels"]
            assert services[item["metadata"]["name"]]["selector"].items() <= labels.items()
            assert item["spec"]["selector"]["matchLabels"].items() <= labels.items()
