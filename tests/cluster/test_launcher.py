"""The files of Ray's cluster launcher are what Ray, EC2 and Compute Engine take."""

import json
import re
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import googleapiclient
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from mmdiff_ray import config as configuration
from mmdiff_ray.distributed.cluster import cpus_needed
from tests.cluster.files import CLUSTER, README, ROOT, documents, pairs

FILES = ("aws", "gcp")
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf8"))
DISCOVERY = Path(googleapiclient.__file__).parent / "discovery_cache/documents/compute.v1.json"


def read(name: str) -> dict[str, Any]:
    """Return a launcher file."""
    (config,) = documents(f"{name}.yaml")
    return config


def with_roles(name: str) -> dict[str, Any]:
    """Return a launcher file with its lines on the role of the workers in force."""
    lines = (CLUSTER / f"{name}.yaml").read_text(encoding="utf8").splitlines(keepends=True)
    return yaml.safe_load("".join(re.sub(r"^( {6})# (?= *[-\w]+:| +- )", r"\1", line) for line in lines))


def workers(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the types of nodes beside the head's."""
    return {
        name: node
        for name, node in config["available_node_types"].items()
        if name != config["head_node_type"]
    }


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_file(name):
    config = read(name)
    assert config["provider"].keys() <= SCHEMA["properties"]["provider"]["properties"].keys() | {"project_id"}
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["head_start_ray_commands"] == config["head_start_ray_commands"]
    for commands in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert prepared[commands] == []  # the image has all; Ray's defaults would install another Ray


def test_ec2_accepts_the_machines_and_workers_alone_are_spot():
    shape = (
        botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    )
    config = with_roles("aws")
    for node in config["available_node_types"].values():
        asked = {**node["node_config"], "MinCount": 1, "MaxCount": 1}
        report = botocore.validate.ParamValidator().validate(asked, shape)
        assert not report.has_errors(), report.generate_report()
    assert "InstanceMarketOptions" not in config["available_node_types"]["head"]["node_config"]
    for node in workers(config).values():
        assert node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_compute_engine_accepts_the_machines_and_workers_alone_are_spot():
    schemas = json.loads(DISCOVERY.read_text(encoding="utf8"))["schemas"]
    config = with_roles("gcp")
    for node in config["available_node_types"].values():
        check(node["node_config"], {"$ref": "Instance"}, schemas, "node_config")
    assert "scheduling" not in config["available_node_types"]["head"]["node_config"]
    for node in workers(config).values():
        assert node["node_config"]["scheduling"]["provisioningModel"] == "SPOT"


@pytest.mark.parametrize(("name", "role"), [("aws", "IamInstanceProfile"), ("gcp", "serviceAccounts")])
def test_every_type_of_worker_can_be_given_a_role_and_the_head_keeps_rays(name, role):
    assert not list(pairs(read(name), role))
    roles = {
        kind: node["node_config"].get(role) for kind, node in with_roles(name)["available_node_types"].items()
    }
    assert roles.pop("head") is None and all(roles.values()) and len(roles) == 2
    assert f"`{role}`" in README


def check(value: Any, schema: dict[str, Any], schemas: dict[str, Any], where: str) -> None:
    """Raise AssertionError for a key or value that a schema of a discovery document does not have."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    if "properties" in schema:
        assert isinstance(value, dict), f"{where} is to be an object"
        for key, inner in value.items():
            assert key in schema["properties"], f"{where}.{key}: no such field"
            check(inner, schema["properties"][key], schemas, f"{where}.{key}")
    elif schema.get("type") == "array":
        assert isinstance(value, list), f"{where} is to be a list"
        for inner in value:
            check(inner, schema["items"], schemas, where)
    else:
        python = {"boolean": bool, "string": (str, int), "integer": int}[schema["type"]]
        assert isinstance(value, python) and value in schema.get("enum", [value]), f"{where}: {value!r}"


@pytest.mark.parametrize("name", FILES)
def test_head_does_no_work_and_idle_workers_go(name):
    config = read(name)
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0} and "min_workers" not in head
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]
    assert 0 < config["idle_timeout_minutes"] <= 10
    assert config["provider"]["cache_stopped_nodes"] is False
    for node in workers(config).values():
        assert node["min_workers"] == 0 < node["max_workers"]
    assert sum(node["max_workers"] for node in workers(config).values()) <= config["max_workers"]


@pytest.mark.parametrize("name", FILES)
def test_containers_have_our_images_the_shared_folder_and_the_tracking_server(name):
    config = read(name)
    options = config["docker"]["run_options"]
    assert config["docker"]["image"] == "registry.example.com/mmdiff:cpu"
    for node in config["available_node_types"].values():
        gpu = "GPU" in node["resources"]
        assert ("docker" in node) == gpu
        assert not gpu or node["docker"]["worker_image"] == "registry.example.com/mmdiff:gpu"
    assert "--volume /mnt/mmdiff:/mnt/mmdiff" in options and "--workdir /mnt/mmdiff" in options
    assert any(option.startswith("--env MLFLOW_TRACKING_URI=http") for option in options)
    assert config["file_mounts"] == {}
    assert any(
        "mount -t nfs" in line and line.rstrip().endswith("/mnt/mmdiff")
        for line in config["initialization_commands"]
    )


@pytest.mark.parametrize("name", FILES)
def test_every_type_of_worker_has_its_name_as_a_label(name):
    assert {kind: node["labels"] for kind, node in workers(read(name)).items()} == {
        kind: {"pool": kind} for kind in ("cpu", "gpu")
    }


@pytest.mark.parametrize("name", FILES)
def test_one_worker_of_each_type_holds_the_run_of_the_page(name):
    settings = configuration.load([ROOT / "pipelines/configs/openmoji_gpu.yaml"]).workers
    nodes = workers(read(name)).values()
    assert sum(node["resources"]["CPU"] for node in nodes) >= cpus_needed(settings)
    assert sum(node["resources"].get("GPU", 0) for node in nodes) >= settings.count * settings.gpus
