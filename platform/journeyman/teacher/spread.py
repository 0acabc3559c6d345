"""GPUs on several nodes for one engine: a Ray placement group that lives no longer than it."""

from __future__ import annotations

from typing import Any


class Spread:
    """Has Ray reserve a whole GPU for each worker of an engine; used in the actor that starts it.

    Ray gives the group back when that actor ends. An actor that Ray starts again after a crash
    keeps its id, by which it finds what it left behind.
    """

    def __init__(self, n_workers: int, node_labels: dict[str, str]) -> None:
        self._bundles = [{"GPU": 1.0}] * n_workers
        self._labels = [node_labels] * n_workers

    def place(self) -> Any:
        """A new group, once the cluster has room for it, be that in an hour. Where the engine died,
        a node may have gone with it: its old group is of no use."""
        import ray
        from ray.util.placement_group import placement_group

        self.give_back()
        group = placement_group(
            self._bundles, strategy="PACK", name=_name(), bundle_label_selector=self._labels
        )
        ray.get(group.ready())
        return group

    def give_back(self) -> None:
        from ray.util.placement_group import get_placement_group, remove_placement_group

        try:
            group = get_placement_group(_name())
        except ValueError:  # there is none
            return
        remove_placement_group(group)


def _name() -> str:
    import ray

    return f"journeyman-teacher-{ray.get_runtime_context().get_actor_id()}"
