"""What a replica asks of Ray, for teachers of one GPU, of several, and over several nodes."""

from typing import Any

import pytest

from journeyman import recipe
from journeyman.errors import RecipeError
from journeyman.labels import resources
from journeyman.recipe import Recipe
from tests.conftest import DEMO

RAY = "teacher.engine_args={distributed_executor_backend: ray}"


def with_cluster(*overrides: str) -> Recipe:
    return recipe.load(DEMO, ["cluster.cpus_per_replica=2", *overrides])


@pytest.mark.parametrize(
    ("overrides", "actor", "in_all"),
    [
        ([], {"num_cpus": 2, "num_gpus": None}, {"CPU": 2}),
        (["cluster.gpus_per_replica=0.5"], {"num_cpus": 2, "num_gpus": 0.5},
         {"CPU": 2, "GPU": 0.5}),
        (["cluster.gpus_per_replica=1", "teacher.tensor_parallel_size=4"],
         {"num_cpus": 2, "num_gpus": 4}, {"CPU": 2, "GPU": 4}),
        (["cluster.gpus_per_replica=1", "teacher.tensor_parallel_size=4",
          "teacher.pipeline_parallel_size=2", RAY],
         {"num_cpus": 2, "num_gpus": None}, {"CPU": 2, "GPU": 8}),
    ],
)  # fmt: skip
def test_a_replica_asks_for_its_teachers_gpus(
    overrides: list[str], actor: dict[str, Any], in_all: dict[str, float]
):
    made = with_cluster(*overrides)
    assert resources.of_actor(made, made.teacher) == actor
    assert resources.needed(made, made.teacher) == in_all


def test_labels_of_nodes_go_with_it():
    made = with_cluster("cluster.node_labels={ray.io/accelerator-type: L4}")
    asked = resources.of_actor(made, made.teacher)
    assert asked["label_selector"] == {"ray.io/accelerator-type": "L4"}


def test_workers_on_several_nodes_need_whole_gpus():
    with pytest.raises(RecipeError, match=r"gpus_per_replica to 1, it is 0\.$"):
        with_cluster("teacher.tensor_parallel_size=2", RAY)
    with_cluster(RAY)  # one worker is no spread
