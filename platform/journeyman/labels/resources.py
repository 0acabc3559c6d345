"""What a labeling replica asks of the cluster."""

from __future__ import annotations

from typing import Any

from journeyman.recipe import Recipe, Teacher

KNOBS = "cluster.cpus_per_replica or cluster.gpus_per_replica"  # that say how much it is


def bundles(recipe: Recipe, teacher: Teacher) -> list[dict[str, float]]:
    """By Ray's names, node by node: the replica's actor, which holds the GPUs of a teacher on one
    node; of one that is spread over nodes each GPU is for itself."""
    settings = recipe.cluster
    actor = {"CPU": settings.cpus_per_replica}
    if not settings.gpus_per_replica or teacher.gives_text_alone:
        return [actor]
    if teacher.spread:
        return [actor, *({"GPU": 1.0} for _ in range(teacher.n_workers))]
    return [actor | {"GPU": settings.gpus_per_replica * teacher.n_workers}]


def needed(recipe: Recipe, teacher: Teacher) -> dict[str, float]:
    """Of one replica, all in all."""
    total: dict[str, float] = {}
    for bundle in bundles(recipe, teacher):
        for name, amount in bundle.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def of_actor(recipe: Recipe, teacher: Teacher) -> dict[str, Any]:
    """Ray's options for a replica's actor."""
    bundle, labels = bundles(recipe, teacher)[0], recipe.cluster.node_labels
    placed = {"label_selector": labels} if labels else {}
    return {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU"), **placed}
