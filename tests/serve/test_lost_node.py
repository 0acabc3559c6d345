"""A node that is lost under load: what becomes of the requests that were in work there."""

import signal
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests import ray_head
from tests.conftest import ROOT, children
from tests.ray_head import Node, free_ports, is_up, until
from tests.serve import tiny
from tests.serve.asking import asking
from tests.serve.test_scaling import with_settings

N_CLIENTS = 6


def ingresses(of: Node | None = None) -> list[psutil.Process]:
    return children("ServeReplica:cascade:Cascade", of and psutil.Process(of.pid))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_that_is_lost_takes_along_what_was_in_work_there_which_ends_with_an_error(
    run: tiny.Run, tmp_path: Path
):
    """Two ingresses on two nodes, the teacher on the one that stays. Two minutes."""
    # So many CPUs has only the node that stays.
    bundle = with_settings(run, tmp_path, student_replicas={"min": 2, "max": 2}, teacher_cpus=2)
    port, port_of_workers = free_ports(2)
    variables = {
        # By default a proxy asks the replica beside it, and no other.
        "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",
        "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(port_of_workers),
    }
    url = f"http://127.0.0.1:{port}"
    with ray_head.cluster(3, [{}], cwd=ROOT, **variables) as head:
        head.deploy(tmp_path, port, bundle, options={"max_replicas_per_node": 1})
        [node] = head.workers
        until(lambda: is_up(f"{url}/readyz", 200) and len(ingresses()) == 2, 300)
        until(lambda: is_up(f"http://127.0.0.1:{port_of_workers}/readyz", 200), 60)
        [ingress] = ingresses(node)
        with asking(url, run.accepted[:4], N_CLIENTS) as asked:
            until(lambda: asked.outcomes["200"] > 50, 60)
            assert set(asked.outcomes) == {"200"}
            ingress.send_signal(signal.SIGSTOP)  # so that some requests are in work there
            time.sleep(2)
            ray_head.kill([node])
            at_least = asked.outcomes["200"] + 200
            until(lambda: asked.outcomes["200"] > at_least, 60)
            other = head.start_worker()
            until(lambda: len(ingresses(other)) == 1, 200)
            at_least = asked.outcomes["200"] + 200
            until(lambda: asked.outcomes["200"] > at_least, 60)
        print(asked)
        until(lambda: is_up(f"http://127.0.0.1:{port_of_workers}/readyz", 200), 60)
        hard = httpx.post(f"{url}/v1/classify", json={"input": run.escalated[0]}, timeout=60)
    assert set(asked.outcomes) == {"200", "500"}, asked.errors
    assert 1 <= asked.n_lost <= N_CLIENTS, asked.errors  # one at a time of each client
    assert asked.slowest_s < run.recipe.cascade.request_timeout_s
    assert hard.headers["x-journeyman-answered-by"] == "teacher", hard.text
