"""Where it runs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from journeyman.recipe.base import Count, Range, Section

Cloud = Literal["aws", "gcp"]


class Replicas(Range):
    """The autoscaling pool of labeling replicas."""

    min: Count = Field(1, description="Replicas at least.")
    max: Count = Field(1, description="Replicas at most.")


class Cluster(Section):
    """Where it runs."""

    address: str | None = Field(
        None, description="Ray address; default RAY_ADDRESS, else a cluster on this machine."
    )
    replicas: Replicas = Field(default_factory=Replicas)
    cpus_per_replica: Annotated[float, Field(ge=0)] = Field(1.0, description="Ray CPUs a replica.")
    gpus_per_replica: Annotated[float, Field(ge=0)] = Field(0.0, description="Ray GPUs a replica.")
    node_labels: dict[str, str] = Field(
        default_factory=dict,
        description="Ray labels that a replica's node must have, in the form of Ray's label "
        "selectors: {ray.io/accelerator-type: L4}, or {journeyman: label} with cluster.yaml.",
    )
    spot: Cloud | None = Field(
        None,
        description="Whose spot nodes replicas may be on: each asks the cloud's metadata service "
        "for its notice, and has Ray drain the node when it comes.",
    )
