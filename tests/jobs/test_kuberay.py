"""KubeRay manifests: fields and types by ray.io/v1's reference, and what Ray says of their insides.

The models below name what our manifests use, out of KubeRay's published API reference (v1.7) and
the Kubernetes API's; a field that is misspelt, misplaced or of another type is refused.

KubeRay's own CRDs come in no Python package. Where KUBERAY_CRDS names a folder that has them, as
``helm pull kuberay/kuberay-operator --untar`` leaves one in kuberay-operator/crds, the manifests
are held to these, too, as strictly as ``kubectl apply --validate=strict``.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel
from ray.runtime_env import RuntimeEnv
from ray.serve.schema import ServeDeploySchema

from journeyman import recipe
from tests.conftest import DEMO, ROOT
from tests.jobs.test_cluster_file import recipe_of_documents

JOBS = sorted((ROOT / "jobs" / "kuberay").glob("*.yaml"))
SERVICE = ROOT / "serve" / "kuberay" / "cascade.yaml"

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Quantity = int | Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti|k|M|G|T)?$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class EnvVar(Strict):
    name: str
    value: str


class VolumeMount(Strict):
    name: Name
    mount_path: str


class Claim(Strict):
    claim_name: Name


class ConfigMap(Strict):
    name: Name


class Volume(Strict):
    name: Name
    persistent_volume_claim: Claim | None = None
    config_map: ConfigMap | None = None


class Resources(Strict):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]


class Container(Strict):
    name: Name
    image: str
    env: list[EnvVar]
    resources: Resources
    volume_mounts: list[VolumeMount]


class Toleration(Strict):
    key: str
    operator: Literal["Exists", "Equal"]
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class PodSpec(Strict):
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume]
    node_selector: dict[str, str] = {}
    tolerations: list[Toleration] = []
    termination_grace_period_seconds: int = 30


class PodTemplate(Strict):
    spec: PodSpec


class HeadGroup(Strict):
    ray_start_params: dict[str, str]
    template: PodTemplate


class WorkerGroup(Strict):
    group_name: Name
    labels: dict[str, str]
    replicas: Annotated[int, Field(ge=0)]
    min_replicas: Annotated[int, Field(ge=0)]
    max_replicas: Annotated[int, Field(ge=0)]
    ray_start_params: dict[str, str]
    template: PodTemplate


class AuthOptions(Strict):
    mode: Literal["disabled", "token"]


class AutoscalerOptions(Strict):
    idle_timeout_seconds: int


class RayClusterSpec(Strict):
    ray_version: str
    auth_options: AuthOptions
    enable_in_tree_autoscaling: bool
    autoscaler_options: AutoscalerOptions
    head_group_spec: HeadGroup
    worker_group_specs: list[WorkerGroup]


class Metadata(Strict):
    # What the operator derives from it is longer, and the name of a service.
    name: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=47)]


class RayJobSpec(Strict):
    entrypoint: str
    backoff_limit: Annotated[int, Field(ge=0)]
    shutdown_after_job_finishes: bool
    ttl_seconds_after_finished: Annotated[int, Field(ge=0)]
    ray_cluster_spec: RayClusterSpec


class RayJob(Strict):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


class RayServiceSpec(Strict):
    serve_config_v2: str
    exclude_head_pod_from_serve_svc: bool
    ray_cluster_config: RayClusterSpec


class RayService(Strict):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: RayServiceSpec


def job(path: Path) -> RayJob:
    return RayJob.model_validate(yaml.safe_load(path.read_text()))


def service() -> RayService:
    return RayService.model_validate(yaml.safe_load(SERVICE.read_text()))


def clusters() -> list[RayClusterSpec]:
    return [*(job(path).spec.ray_cluster_spec for path in JOBS), service().spec.ray_cluster_config]


@pytest.mark.skipif("KUBERAY_CRDS" not in os.environ, reason="KUBERAY_CRDS names no folder")
@pytest.mark.parametrize("path", [*JOBS, SERVICE], ids=lambda path: path.stem)
def test_manifests_are_as_the_published_crds_ask(path: Path):
    manifest = yaml.safe_load(path.read_text())
    documents = Path(os.environ["KUBERAY_CRDS"]).glob("*.yaml")
    kinds = {crd["spec"]["names"]["kind"]: crd for crd in map(yaml.safe_load, map(read, documents))}
    refused(manifest, kinds[manifest["kind"]])


def read(path: Path) -> str:
    return path.read_text()


def refused(manifest: dict[str, Any], crd: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError where an API server with this CRD would refuse it."""
    group, _, asked = manifest["apiVersion"].partition("/")
    assert group == crd["spec"]["group"]
    [version] = [v for v in crd["spec"]["versions"] if v["name"] == asked and v["served"]]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own matter
    jsonschema.Draft202012Validator(schema).validate(manifest)


def strict(schema: Any) -> Any:
    """A structural schema in which a field that it does not name is an error."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: strict(value) for name, value in schema.items()}
    named = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if named and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    return schema


def test_a_field_that_a_crd_does_not_name_is_refused():
    quantity = {"anyOf": [{"type": "integer"}, {"type": "string"}],
                "x-kubernetes-int-or-string": True}  # fmt: skip
    spec = {"type": "object", "required": ["entrypoint"], "properties": {
        "entrypoint": {"type": "string"},
        "limits": {"type": "object", "additionalProperties": quantity},
        "anything": {"type": "object", "properties": {"named": {"type": "string"}},
                     "x-kubernetes-preserve-unknown-fields": True},
    }}  # fmt: skip
    named = {"apiVersion": {"type": "string"}, "kind": {"type": "string"},
             "metadata": {"type": "object"}, "spec": spec}  # fmt: skip
    schema = {"openAPIV3Schema": {"type": "object", "properties": named}}
    versions = [{"name": "v1", "served": True, "schema": schema}]
    crd = {"spec": {"group": "ray.io", "versions": versions}}

    def manifest(**spec: Any) -> dict[str, Any]:
        return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "a"},
                "spec": spec}  # fmt: skip

    refused(manifest(entrypoint="a", limits={"cpu": 1, "memory": "1Gi"}, anything={"b": 1}), crd)
    for wrong, words in (({"entrypoint": "a", "entryPoint": "b"}, "entryPoint"),
                         ({"entrypoint": 1}, "'string'"), ({}, "required"),
                         ({"entrypoint": "a", "limits": {"cpu": 1.5}}, "not valid")):  # fmt: skip
        with pytest.raises(jsonschema.ValidationError, match=words):
            refused(manifest(**wrong), crd)


def test_there_is_a_job_for_labeling_training_and_the_whole():
    assert [path.stem for path in JOBS] == ["label", "pipeline", "train"]
    groups = {p.stem: [g.group_name for g in job(p).spec.ray_cluster_spec.worker_group_specs]
              for p in JOBS}  # fmt: skip
    assert groups == {
        "label": ["label", "cpu"], "pipeline": ["label", "train", "cpu"], "train": ["train"],
    }  # fmt: skip


def test_nodes_have_the_labels_that_the_documents_recipe_asks_for():
    asked = recipe_of_documents()
    wanted = [settings.node_labels for settings in (asked.cluster, asked.training, asked.cascade)]
    of = {p.stem: job(p).spec.ray_cluster_spec.worker_group_specs for p in JOBS}
    groups = {name: [group.labels for group in found] for name, found in of.items()}
    assert wanted[0] in groups["label"] and wanted[1] in groups["train"]
    assert all(labels in groups["pipeline"] for labels in wanted)
    assert service().spec.ray_cluster_config.worker_group_specs[0].labels == wanted[2]


def test_the_documents_doctor_is_a_job_like_labeling():
    [line] = [li for li in (ROOT / "docs/kubernetes.md").read_text().splitlines()
              if li.startswith("sed ")]  # fmt: skip
    made = subprocess.run(
        ["bash", "-c", line.partition(" | kubectl")[0]], cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    doctor = RayJob.model_validate(yaml.safe_load(made.stdout))
    assert doctor.metadata.name == "journeyman-doctor" and doctor.spec.backoff_limit == 0
    script, *given = shlex.split(doctor.spec.entrypoint)[1:]
    assert script.endswith("/jobs/doctor.py") and given[1:] == ["--wait", "900"]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_runs_a_script_of_the_image_on_the_mounted_recipe(path: Path):
    interpreter, script, given = shlex.split(job(path).spec.entrypoint)
    assert interpreter == "python"
    assert (ROOT / Path(script).relative_to(image_root())).is_file()
    head = job(path).spec.ray_cluster_spec.head_group_spec.template.spec
    mounts = {m.mount_path: m.name for m in head.containers[0].volume_mounts}
    assert mounts[str(Path(given).parent)] == "recipe"


def image_root() -> str:
    lines = (ROOT / "jobs" / "kuberay" / "Dockerfile").read_text().splitlines()
    [root] = [line.split()[1] for line in lines if line.startswith("WORKDIR")]
    copied = [line.split()[1:] for line in lines if line.startswith("COPY")]
    assert all(source == to and (ROOT / source).is_dir() for source, to in copied)
    [path] = [line.split("=", 1)[1] for line in lines if line.startswith("ENV PYTHONPATH")]
    assert path == f"{root}/platform:{root}"
    return root


def test_ray_serve_takes_the_services_configuration():
    config = ServeDeploySchema.model_validate(yaml.safe_load(service().spec.serve_config_v2))
    [application] = config.applications
    assert application.import_path == "serve.app:app"
    environment = RuntimeEnv(**application.runtime_env)["env_vars"]
    assert environment["PYTHONPATH"] == f"{image_root()}/platform:{image_root()}"


def test_pods_are_alike_in_image_and_version_and_mount_what_they_have():
    base = (ROOT / "jobs" / "kuberay" / "Dockerfile").read_text()
    for cluster in clusters():
        assert f"FROM rayproject/ray:{cluster.ray_version}-py311" in base
        for group in (cluster.head_group_spec, *cluster.worker_group_specs):
            spec = group.template.spec
            [container] = spec.containers
            assert container.image == "journeyman:0.1.0"
            assert {m.name for m in container.volume_mounts} == {v.name for v in spec.volumes}
            assert "/shared" in [m.mount_path for m in container.volume_mounts]
            assert container.resources.requests == container.resources.limits


def test_work_fits_gpu_workers_and_none_of_it_the_head():
    asked = recipe.load(DEMO, ["cluster.gpus_per_replica=1"]).cluster
    for cluster in clusters():
        assert cluster.head_group_spec.ray_start_params["num-cpus"] == "0"
        for group in cluster.worker_group_specs:
            has = group.template.spec.containers[0].resources.limits
            assert int(has["cpu"]) >= asked.cpus_per_replica
            gpus = has.get("nvidia.com/gpu", 0)
            assert gpus >= asked.gpus_per_replica or group.labels == {"journeyman": "cpu"}
            assert group.min_replicas <= group.replicas <= group.max_replicas
