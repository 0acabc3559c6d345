"""cluster.yaml: Ray's own schema and launcher take it, and it keeps what it promises."""

import copy
import re
from pathlib import Path
from typing import Any

import boto3
import moto
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from journeyman import recipe
from tests.conftest import DEMO, ROOT

PAGE = ROOT / "docs" / "cluster.md"


@pytest.fixture(scope="module")
def config() -> dict:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_rays_launcher_takes_it(config: dict):
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["provider"]["type"] == "aws" and prepared["head_node_type"] == "head"


def blocks(page: Path) -> list[dict[str, Any]]:
    """The page's pieces of YAML."""
    found = re.findall(r"```yaml\n(.*?)```", page.read_text(), flags=re.DOTALL)
    return [yaml.safe_load(block) for block in found]


def recipe_of_documents() -> recipe.Recipe:
    """The demo's with what docs/cluster.md says of a cluster."""
    [said] = [block for block in blocks(PAGE) if "output" in block]
    values = recipe.load(DEMO).model_dump(mode="json")
    for name, section in said.items():
        values[name] = values[name] | section if isinstance(section, dict) else section
    return recipe.parse(values)


def test_rays_launcher_makes_of_it_what_aws_takes(config: dict, monkeypatch, tmp_path: Path):
    from ray.autoscaler._private.aws.config import bootstrap_aws

    monkeypatch.setenv("HOME", str(tmp_path))  # where the launcher keeps the key that it makes
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with moto.mock_aws():
        made = bootstrap_aws(prepare_config(copy.deepcopy(config)))
        ec2 = boto3.client("ec2", region_name=config["provider"]["region"])
        for node in (kind["node_config"] for kind in made["available_node_types"].values()):
            assert node["ImageId"].startswith("resolve:ssm:/aws/service/deeplearning/")
            assert node["KeyName"] and node["SubnetIds"] and node["SecurityGroupIds"]
            assert ec2.describe_security_groups(GroupIds=node["SecurityGroupIds"])
    assert "IamInstanceProfile" not in made.get("head_node", {})  # ours, and not Ray's own


def test_workers_reach_the_store_as_the_head_does(config: dict):
    roles = {n: k["node_config"]["IamInstanceProfile"]["Name"]
             for n, k in config["available_node_types"].items()}  # fmt: skip
    assert roles.pop("head") == "journeyman-head" and set(roles.values()) == {"journeyman-worker"}
    page = PAGE.read_text()
    assert all(f"journeyman-{role}" in page for role in ("head", "worker"))
    region = config["provider"]["region"]
    assert f"-e AWS_REGION={region}" in config["docker"]["run_options"]


def test_nodes_that_are_not_there_yet_have_the_labels_that_recipes_ask_for(config: dict):
    kinds = config["available_node_types"]
    asked = recipe_of_documents()
    assert asked.cluster.node_labels.items() <= kinds["label-spot"]["labels"].items()
    for section in (asked.training, asked.cascade):
        assert section.node_labels.items() <= kinds["serve-on-demand"]["labels"].items()
    assert asked.training.gpus_per_worker and asked.cascade.teacher_gpus
    gpus = {name for name, kind in kinds.items() if kind.get("resources", {}).get("GPU")}
    for name in gpus:  # as Ray calls the GPU of a g6
        assert kinds[name]["labels"]["ray.io/accelerator-type"] == "L4"


def test_the_page_says_the_whole_of_what_another_cloud_needs(config: dict):
    [overlay] = [block for block in blocks(PAGE) if "provider" in block]
    prepared = prepare_config(copy.deepcopy(config) | overlay)
    validate_config(prepared)
    assert prepared["provider"]["type"] == "gcp"
    assert set(overlay["available_node_types"]) == set(config["available_node_types"])
    for name, kind in overlay["available_node_types"].items():
        own = config["available_node_types"][name]
        assert kind["labels"] == own.get("labels", {})
        assert kind["node_config"]["disks"] and "machineType" in kind["node_config"]
        assert "ImageId" not in kind["node_config"]


def test_labeling_runs_on_spot_and_the_rest_on_nodes_that_stay(config: dict):
    kinds = config["available_node_types"]
    nodes = {name: kind["node_config"] for name, kind in kinds.items()}
    asked = {name: node.get("InstanceMarketOptions", {}) for name, node in nodes.items()}
    spot = {name for name, market in asked.items() if market.get("MarketType") == "spot"}
    assert spot == {"label-spot"}
    assert kinds["head"]["resources"] == {"CPU": 0, "GPU": 0} and kinds["head"]["max_workers"] == 0
    workers = {name: kind for name, kind in kinds.items() if name != "head"}
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in workers.values())
    assert sum(kind["max_workers"] for kind in workers.values()) == config["max_workers"]


def test_a_replica_of_the_default_recipe_fits_a_worker(config: dict):
    workers = [k for k in config["available_node_types"].values() if k["resources"]["GPU"]]
    needed = recipe.Cluster(gpus_per_replica=1)
    for worker in workers:
        assert worker["resources"]["GPU"] >= needed.gpus_per_replica
        assert worker["resources"]["CPU"] >= needed.cpus_per_replica


def test_every_node_has_the_environment_that_is_tested(config: dict):
    [(there, here)] = config["file_mounts"].items()
    assert (ROOT / here / "gpu.txt").is_file()
    assert any(f"{there}/gpu.txt" in command for command in config["setup_commands"])
    pins = (ROOT / "requirements" / "gpu.txt").read_text()
    [ray] = [line for line in pins.splitlines() if line.startswith("ray==")]
    assert config["docker"]["image"].startswith(f"rayproject/ray:{ray.removeprefix('ray==')}-py311")
