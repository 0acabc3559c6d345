"""Is a cluster fit for a recipe? Asked before money is spent; every finding says what to mend.

Each node reports for itself (``node_report``); what follows from the reports is decided here.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from journeyman import cluster, corpus, files, node_report
from journeyman.errors import JourneymanError
from journeyman.labels import resources
from journeyman.node_report import NodeReport
from journeyman.recipe import Cluster, Recipe, Teacher

_REPORT_S = 300.0  # for a node to answer; one that dequantises a GGUF file takes a while
_WEIGHTS_ROOM = 1.15  # memory over the weights, for activations, beside the KV cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at; words: how it is, or what is wrong and what to do."""

    what: str
    ok: bool
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node as Ray has it; memory in bytes."""

    id: str
    name: str
    cpus: float
    gpus: float
    memory: float


def examine(recipe: Recipe | None, wait_s: float) -> Iterator[Finding]:
    """Look at the cluster that is connected to, one finding after another.

    wait_s: for a replica's resources to be free, autoscaling included.
    """
    settings = recipe.cluster if recipe else Cluster()
    if recipe:
        yield _sources(recipe)
        yield _a_replica_fits(recipe, wait_s)
    nodes = _nodes()
    with _note(recipe) as note:
        reports, silent = _reports(nodes, recipe, note)
    yield _counted(nodes)
    yield from silent
    if not reports:
        return
    yield versions(reports)
    yield gpus(settings, nodes, reports)
    if recipe:
        yield from _in_reach(recipe, reports)
        yield memory(recipe, nodes, reports)
        yield from other_gpus(recipe)
        yield disk(reports)


# --- what follows from the reports ---


def versions(reports: Sequence[NodeReport]) -> Finding:
    """Whether all nodes have the same."""
    first = reports[0]
    for other in reports[1:]:
        for name, version in other.versions.items():
            if version != first.versions[name]:
                return Finding(what="versions", ok=False, words=(
                    f"{name} is {first.versions[name]} on {first.node} and {version} on "
                    f"{other.node}: install the same pins (requirements/) on every node"
                ))  # fmt: skip
    return Finding(what="versions", ok=True, words=", ".join(map(" ".join, first.versions.items())))


def gpus(settings: Cluster, nodes: Sequence[Node], reports: Sequence[NodeReport]) -> Finding:
    """Whether Ray offers what the driver sees, and what replicas ask for."""
    offered = {node.name: int(node.gpus) for node in nodes}
    for report in reports:
        if offered[report.node] != len(report.gpu_bytes):
            return Finding(what="GPUs", ok=False, words=(
                f"{report.node} offers {offered[report.node]} to Ray, and its driver sees "
                f"{len(report.gpu_bytes)}: mend the driver or the image, or the node's resources"
            ))  # fmt: skip
    total = sum(offered.values())
    if settings.gpus_per_replica and not total:
        return Finding(what="GPUs", ok=False, words=(
            f"no node has one, and cluster.gpus_per_replica is {settings.gpus_per_replica:g}: wait "
            "for nodes to come with --wait SECONDS, or set it to 0"
        ))  # fmt: skip
    return Finding(what="GPUs", ok=True, words=f"{total} on {len(nodes)} nodes")


def other_gpus(recipe: Recipe) -> Iterator[Finding]:
    """Where labeling is on GPUs, what of the rest would not be."""
    if not recipe.cluster.gpus_per_replica or recipe.student is None:
        return
    served = recipe.labels.kind == "classes" and not recipe.teacher.gives_text_alone
    lacking = []
    if not recipe.training.gpus_per_worker:
        lacking.append(("training.gpus_per_worker", "the student trains on CPUs"))
    if served and not recipe.cascade.teacher_gpus:
        taken = "a teacher that serves takes a GPU that Ray believes to be free"
        lacking.append(("cascade.teacher_gpus", taken))
    for name, otherwise in lacking:
        words = f"labeling is on GPUs, and {name} is 0: {otherwise}; set it to 1"
        yield Finding(what="GPUs", ok=False, words=words)


def memory(recipe: Recipe, nodes: Sequence[Node], reports: Sequence[NodeReport]) -> Finding:
    """Whether the teacher fits a node that can hold a replica."""
    teacher, settings = recipe.teacher, recipe.cluster
    weights = next((r.weights["teacher"] for r in reports if "teacher" in r.weights), 0)
    if teacher.gives_text_alone or not weights:
        return Finding(what="memory", ok=True, words="no model of the teacher's to hold")
    on_gpus = settings.gpus_per_replica > 0
    most = max((_room(teacher, settings, n, r) for n, r in _pairs(nodes, reports)), default=0.0)
    needed = weights * _WEIGHTS_ROOM + (0 if on_gpus else teacher.cpu_kv_cache_gib * 2**30)
    words = f"{needed / 1e9:,.1f} GB for a replica, {most / 1e9:,.1f} GB there"
    if needed <= most:
        return Finding(what="memory", ok=True, words=words)
    more = "raise teacher.tensor_parallel_size, or take larger GPUs" if on_gpus else (
        "lower teacher.cpu_kv_cache_gib, or take larger nodes"
    )  # fmt: skip
    return Finding(what="memory", ok=False, words=f"{words}: {more}, or a smaller teacher")


def disk(reports: Sequence[NodeReport]) -> Finding:
    """Whether what has to be fetched from the hub has room."""
    for report in reports:
        if (needed := sum(report.to_fetch.values())) > report.disk_free:
            return Finding(what="disk", ok=False, words=(
                f"{report.node} has {report.disk_free / 1e9:,.1f} GB free, and models of "
                f"{needed / 1e9:,.1f} GB to fetch: give it a larger disk, or set HF_HOME to one"
            ))  # fmt: skip
    least = min((report.disk_free for report in reports), default=0)
    most = max((sum(report.to_fetch.values()) for report in reports), default=0)
    words = f"{least / 1e9:,.1f} GB free at least, {most / 1e9:,.1f} GB to fetch at most"
    return Finding(what="disk", ok=True, words=words)


def _room(teacher: Teacher, settings: Cluster, node: Node, report: NodeReport) -> float:
    """Bytes that a replica may use of a node; 0 where none fits."""
    n_gpus = teacher.n_workers
    if not settings.gpus_per_replica:
        return node.memory if node.cpus >= settings.cpus_per_replica else 0.0
    if not teacher.spread:
        return sum(sorted(report.gpu_bytes)[-n_gpus:]) * teacher.gpu_memory_utilization
    return max(report.gpu_bytes, default=0) * n_gpus * teacher.gpu_memory_utilization


def _pairs(
    nodes: Sequence[Node], reports: Sequence[NodeReport]
) -> Iterator[tuple[Node, NodeReport]]:
    by_name = {report.node: report for report in reports}
    return ((node, by_name[node.name]) for node in nodes if node.name in by_name)


def _in_reach(recipe: Recipe, reports: Sequence[NodeReport]) -> Iterator[Finding]:
    """Models, folders and stores: a finding for each, of the first node that lacks it."""
    stores = node_report.stores(recipe)
    models = {name for report in reports for name in (*report.weights, *report.refused)}
    for name in [*stores, *sorted(models - stores.keys())]:
        lacking = [report for report in reports if name in report.refused]
        if lacking:
            others = f" ({len(lacking)} nodes of {len(reports)})" if len(reports) > 1 else ""
            words = f"on {lacking[0].node}{others}: {lacking[0].refused[name]}"
            yield Finding(what=name, ok=False, words=words)
        else:
            done = "can be written by" if name in stores else "in reach of"
            yield Finding(what=name, ok=True, words=f"{done} {len(reports)} nodes")


# --- asking the cluster ---


def _nodes() -> list[Node]:
    import ray

    nodes = []
    for told in ray.nodes():
        if told["Alive"]:
            has = told["Resources"]
            nodes.append(
                Node(
                    id=told["NodeID"],
                    name=f"{told['NodeManagerHostname']}/{told['NodeID'][:6]}",
                    cpus=has.get("CPU", 0.0),
                    gpus=has.get("GPU", 0.0),
                    memory=has.get("memory", 0.0) + has.get("object_store_memory", 0.0),
                )
            )
    return nodes


def _counted(nodes: Sequence[Node]) -> Finding:
    cpus, n_gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    words = f"{len(nodes)} alive, {cpus:g} CPUs, {n_gpus:g} GPUs"
    return Finding(what="nodes", ok=True, words=words)


def _reports(
    nodes: Sequence[Node], recipe: Recipe | None, note: Path | None
) -> tuple[list[NodeReport], list[Finding]]:
    """What the nodes tell, and findings on those that tell nothing."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(node_report.report)
    waiting = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node.id, soft=False)
        waiting[node.name] = task.options(scheduling_strategy=there).remote(node.name, recipe, note)
    reports, silent = [], []
    for name, told in waiting.items():
        try:
            reports.append(ray.get(told, timeout=_REPORT_S))
        except ray.exceptions.RayError as error:
            reason = str(cluster.reason_of(error, "its report")).split(" What was finished")[0]
            silent.append(Finding(what="nodes", ok=False, words=f"{name}: {reason}"))
    return reports, silent


def _sources(recipe: Recipe) -> Finding:
    try:
        urls = corpus.source_urls(recipe.corpus)
    except JourneymanError as error:
        return Finding(what="corpus", ok=False, words=str(error).rstrip("."))
    return Finding(what="corpus", ok=True, words=f"{len(urls)} source files")


def _a_replica_fits(recipe: Recipe, wait_s: float) -> Finding:
    """Have the resources of one replica reserved, and give them back."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    bundles = resources.bundles(recipe, recipe.teacher)
    asked = ", ".join(
        f"{sum(b.get(k, 0) for b in bundles):g} {k}"
        for k in ("CPU", "GPU")
        if any(k in b for b in bundles)
    )
    labels = [recipe.cluster.node_labels] * len(bundles)
    group = placement_group(bundles, strategy="PACK", bundle_label_selector=labels)
    try:
        ray.get(group.ready(), timeout=wait_s)
    except ray.exceptions.GetTimeoutError:
        return Finding(what="replica", ok=False, words=(
            f"no node{_labeled(recipe)} gave {asked} within {wait_s:g} s: set "
            "cluster.cpus_per_replica, gpus_per_replica and node_labels to what a node has, wait "
            "for other work to end, or for nodes to come with --wait SECONDS"
        ))  # fmt: skip
    finally:
        remove_placement_group(group)
    return Finding(what="replica", ok=True, words=f"{asked} are free for one")


def _labeled(recipe: Recipe) -> str:
    labels = recipe.cluster.node_labels
    return f" with {', '.join(f'{name}={value}' for name, value in labels.items())}" * bool(labels)


@contextlib.contextmanager
def _note(recipe: Recipe | None) -> Iterator[Path | None]:
    """A file in the recipe's output folder, to be found by other nodes; None if there can be none,
    or need be none, since output is an object store.

    That the folder cannot be written is told by each node that tries to.
    """
    if recipe is None or recipe.run_url:
        yield None
        return
    path = Path(recipe.output).resolve() / f".doctor-{uuid.uuid4().hex}"
    try:
        files.write_bytes(path, b"")
    except JourneymanError:
        yield None
        return
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
