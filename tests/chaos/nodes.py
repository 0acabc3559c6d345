"""A Ray cluster of several raylets on this machine, apart from the process that tests it.

    python nodes.py N [GPUS]

A head without CPUs and N nodes of one CPU, and what Ray takes for so many GPUs. Says, in a line of
JSON, its address and the process ids of the nodes' raylets; then again whenever a line comes in:
what is left of nodes whose raylets have been killed is cleared away, and nodes are added until
there are as many as the line says. Ends when its input does.
"""

import ctypes
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time

from ray._private.node import Node
from ray.cluster_utils import Cluster

OWN_DISK = "JOURNEYMAN_TEST_OWN_DISK"  # a folder of which each node has one of its own
_CLONE_NEWNS = 0x00020000
# Ray takes 15 s by default to call a node dead that does not answer.
_HEALTH_CHECK = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}


def main() -> None:
    # Its address is written there, and `ray.init` of anyone who names none would join it.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        run()


def run() -> None:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": False,
            "_system_config": _HEALTH_CHECK,
        },
    )
    n_gpus = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    for wanted in itertools.chain([sys.argv[1]], sys.stdin):
        # No more than there are: then one has been killed, and may take a while to die.
        while not (dead := dead_nodes(cluster)) and len(cluster.worker_nodes) >= int(wanted):
            time.sleep(0.05)
        for node in dead:
            cluster.remove_node(node, allow_graceful=False)
        while len(cluster.worker_nodes) < int(wanted):
            if folder := os.environ.get(OWN_DISK):
                mount_own_disk(folder)
            cluster.add_node(num_cpus=1, num_gpus=n_gpus)
        say(cluster)
    cluster.shutdown()


def mount_own_disk(folder: str) -> None:
    """Over that folder, for what this process starts from now on: no other node sees it."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)


def dead_nodes(cluster: Cluster) -> list[Node]:
    return [node for node in cluster.worker_nodes if node.dead_processes()]


def say(cluster: Cluster) -> None:
    raylets = [node.all_processes["raylet"][0].process.pid for node in cluster.worker_nodes]
    print(json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)


if __name__ == "__main__":
    main()
