"""A Ray cluster as users have it: nodes of their own, a dashboard, a token, no driver in it yet."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from tests.conftest import ROOT

BIN = Path(sys.executable).parent
Node = subprocess.Popen[bytes]  # `ray start`, above all processes of one
_OWN = ("RAY_ADDRESS", "PYTHONPATH", "RAY_API_SERVER_ADDRESS")


@dataclass(frozen=True)
class Head:
    """environment: of commands that may use the cluster; workers: nodes besides the head;
    start_worker: adds one of one CPU."""

    address: str
    dashboard: str
    environment: dict[str, str]
    workers: list[Node]
    start_worker: Callable[..., Node]

    def journeyman(
        self, *arguments: str, cwd: Path = ROOT, timeout_s: float = 240
    ) -> subprocess.CompletedProcess[str]:
        """The command as a user's own machine runs it."""
        with self.started(*arguments, cwd=cwd) as process:
            try:
                out, err = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def deploy(
        self,
        folder: Path,
        http_port: int,
        bundle: Path,
        user_config: dict[str, Any] | None = None,
        import_path: str = "serve.app:app",
        options: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """``serve deploy`` of the cascade; the nodes were started at the repository's root.

        options: further ones of the ingress; settings: of Serve.
        """
        application = {
            "name": "cascade",
            "route_prefix": "/",
            "import_path": import_path,
            "args": {"bundle": str(bundle)},
            "runtime_env": {"env_vars": {"PYTHONPATH": ".:platform"}},
            "deployments": [
                {"name": "Cascade", "user_config": user_config or {}, **(options or {})}
            ],
        }
        http = {"host": "127.0.0.1", "port": http_port}
        config = {"proxy_location": "EveryNode", "http_options": http,
                  "applications": [application], **settings}  # fmt: skip
        self.serve_deploy(folder, config)

    @staticmethod
    def deployed(folder: Path) -> dict[str, Any]:
        """The config of the last ``deploy``."""
        config: dict[str, Any] = yaml.safe_load((folder / "serve.yaml").read_text())
        return config

    def serve_deploy(self, folder: Path, config: dict[str, Any]) -> None:
        path = folder / "serve.yaml"
        path.write_text(yaml.safe_dump(config))
        subprocess.run(
            [BIN / "serve", "deploy", "--address", self.dashboard, str(path)],
            cwd=ROOT, env=self.environment, check=True, capture_output=True, timeout=200,
        )  # fmt: skip

    def n_nodes(self) -> int:
        """That are alive, the head included."""
        told = self._told("v0/nodes")
        return sum(node["state"] == "ALIVE" for node in told["data"]["result"]["result"])

    def replica_states(self, deployment: str) -> list[str]:
        """Of the cascade, as Serve names them."""
        [cascade] = self._told("serve/applications/")["applications"].values()
        return [one["state"] for one in cascade["deployments"][deployment]["replicas"]]

    def _told(self, what: str) -> dict[str, Any]:
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        told = httpx.get(f"{self.dashboard}/api/{what}", headers=token, timeout=30)
        answer: dict[str, Any] = told.raise_for_status().json()
        return answer

    def started(self, *arguments: str, cwd: Path = ROOT) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "journeyman.cli", *arguments],
            cwd=cwd, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def until(holds: Callable[[], Any], timeout_s: float) -> Any:
    """Wait for something, and return it."""
    deadline = time.monotonic() + timeout_s
    while not (held := holds()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.2)
    return held


def is_up(url: str, *statuses: int) -> bool:
    """Whether it answers, with one of these if there are any."""
    try:
        found = httpx.get(url, timeout=5).status_code
        return found in statuses if statuses else found < 500
    except httpx.HTTPError:
        return False


@contextlib.contextmanager
def cluster(
    n_cpus: int = 1,
    workers: Sequence[dict[str, str]] = (),
    cwd: Path = Path("/"),
    max_workers: int = 0,
    **variables: str,
) -> Iterator[Head]:
    """A head with so many CPUs, and for each of workers a node of one CPU with these variables.

    max_workers: nodes of one CPU that Ray's autoscaler may start on this machine, and remove again.
    """
    gcs, dashboard = free_ports(2)
    with tempfile.TemporaryDirectory(
        prefix="jm-", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:
        environment = {
            **{k: v for k, v in os.environ.items() if k not in _OWN},
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT / "platform"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            **variables,
        }
        # What workers inherit must not lead them to this checkout: a job brings its own code.
        of_nodes = environment | {"PYTHONPATH": variables.get("PYTHONPATH", "")}
        options = [f"--temp-dir={folder}/0", "--head", f"--port={gcs}",
                   f"--dashboard-port={dashboard}"]  # fmt: skip
        if max_workers:
            options += _autoscaling(Path(folder) / "autoscaling.json", gcs, max_workers)
            of_nodes |= _AUTOSCALER
        url, address = f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}"
        nodes: list[Node] = []

        def start_worker(**own: str) -> Node:
            there = f"--temp-dir={folder}/{len(nodes) + 1}"  # a disk of its own, as it were
            nodes.append(_node(1, cwd, of_nodes | own, there, f"--address={address}"))
            return nodes[-1]

        first = _node(n_cpus, cwd, of_nodes, *options)
        try:
            until(lambda: is_up(f"{url}/api/version"), 120)
            for own in workers:
                start_worker(**own)
            head = Head(address, url, environment, nodes, start_worker)
            until(lambda: head.n_nodes() == len(nodes) + 1, 240)
            yield head
        finally:
            kill([first, *nodes])


_HEAD_ID = "f" * 51 + "00000"  # as Ray's provider of fake nodes has it
_AUTOSCALER = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
}


def _autoscaling(path: Path, gcs_port: int, max_workers: int) -> list[str]:
    """What ``ray.cluster_utils.AutoscalingCluster`` does, whose file the wheel lacks (Ray 2.60)."""
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
        "head_node_id": _HEAD_ID,
        "gcs_address": f"127.0.0.1:{gcs_port}",
    }
    head = {"resources": {}, "node_config": {}, "max_workers": 0}
    worker = {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0,
              "max_workers": max_workers}  # fmt: skip
    settings = {
        "cluster_name": "fake",
        "max_workers": max_workers,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 1.0,
        "provider": provider,
        "available_node_types": {"ray.head.default": head, "worker": worker},
        "head_node_type": "ray.head.default",
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{
            name: []
            for name in (
                "cluster_synced_files", "initialization_commands", "setup_commands",
                "head_setup_commands", "worker_setup_commands", "head_start_ray_commands",
                "worker_start_ray_commands", "rsync_exclude", "rsync_filter",
            )
        },
        "file_mounts_sync_continuously": False,
    }  # fmt: skip
    path.write_text(json.dumps(settings))
    return [f"--autoscaling-config={path}", f"--system-config={json.dumps(_HEALTH_CHECK)}"]


# Ray takes 15 s by default to call a node dead that does not answer.
_HEALTH_CHECK = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}


def kill(nodes: Sequence[Node]) -> None:
    """All processes of the nodes at once: to be asked first, they take half a minute."""
    trees = [processes(node) for node in nodes]
    for process in itertools.chain(*trees):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs([process for tree in trees for process in tree[1:]], timeout=30)
    for node in nodes:
        node.wait(30)


def processes(node: Node) -> list[psutil.Process]:
    """Of a node, none where it has ended."""
    if node.poll() is not None:
        return []
    of_node = psutil.Process(node.pid)
    return [of_node, *of_node.children(recursive=True)]


def _node(n_cpus: int, cwd: Path, environment: dict[str, str], *options: str) -> Node:
    agent, client = free_ports(2)
    ports = [f"--dashboard-agent-listen-port={agent}"]
    if "--head" in options:
        ports.append(f"--ray-client-server-port={client}")
    return subprocess.Popen(
        [BIN / "ray", "start", "--block", f"--num-cpus={n_cpus}", "--disable-usage-stats",
         "--min-worker-port=0", "--max-worker-port=0", *ports, *options],
        cwd=cwd, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
