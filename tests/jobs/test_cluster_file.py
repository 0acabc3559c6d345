"""cluster.yaml: Ray's own schema and preparation take it, and it keeps what it promises."""

from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from journeyman import recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config() -> dict:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_rays_launcher_takes_it(config: dict):
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["provider"]["type"] == "aws" and prepared["head_node_type"] == "head"


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
    workers = [k for name, k in config["available_node_types"].items() if name != "head"]
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
