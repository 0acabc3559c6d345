"""Spot nodes: heed the cloud's notice that a node is about to be taken away.

Neither Ray nor its launcher asks for the notice (Ray 2.60). Who works on such a node does, has Ray
drain it, so that no further work is sent there, and begins nothing new: what is under way may end
before the node does.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime

import httpx

from journeyman.recipe.cluster import Cloud

# Both variables are the clouds' own, for machines that reach the service elsewhere.
_AWS = ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254")
_GCP = ("GCE_METADATA_HOST", "169.254.169.254")
_GCP_NOTICE_S = 30.0
_POLL_S = 5.0
_PATIENCE_S = 2.0  # with an answer
_LATE_S = 60.0  # a node that is still there so long after its time stays, for all anyone knows
_TOKEN_S = 300  # that AWS lets a token live
_log = logging.getLogger(__name__)


def seconds_left(cloud: Cloud, client: httpx.Client) -> float | None:
    """Until this node is taken away; None if nothing was said of it.

    Sources: AWS, "Spot Instance interruption notices" (IMDSv2); Google Cloud, "Handle preemption".
    Raises httpx.HTTPError where the service does not answer.
    """
    return _aws(client) if cloud == "aws" else _gcp(client)


def _aws(client: httpx.Client) -> float | None:
    base = os.environ.get(*_AWS).rstrip("/")
    ttl = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_S)}
    token = client.put(f"{base}/latest/api/token", headers=ttl).raise_for_status().text
    told = client.get(
        f"{base}/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token}
    )
    if told.status_code == httpx.codes.NOT_FOUND:
        return None
    at = datetime.fromisoformat(told.raise_for_status().json()["time"])
    return max(0.0, (at - datetime.now(UTC)).total_seconds())


def _gcp(client: httpx.Client) -> float | None:
    told = client.get(
        f"http://{os.environ.get(*_GCP)}/computeMetadata/v1/instance/preempted",
        headers={"Metadata-Flavor": "Google"},
    )
    return _GCP_NOTICE_S if told.raise_for_status().text.strip() == "TRUE" else None


class Notice:
    """Looks for the notice while this process lives, and has Ray drain the node once it comes."""

    def __init__(self, cloud: Cloud) -> None:
        self._gone_at: float | None = None  # by time.monotonic
        threading.Thread(target=self._watch, args=(cloud,), name="spot notice", daemon=True).start()

    @property
    def given(self) -> bool:
        """Whether the node is about to go."""
        return self._gone_at is not None and time.monotonic() < self._gone_at + _LATE_S

    def _watch(self, cloud: Cloud) -> None:
        left_s = _wait_for_notice(cloud)
        self._gone_at = time.monotonic() + left_s
        _drain(left_s)


def _wait_for_notice(cloud: Cloud) -> float:
    """Seconds that are left when it comes."""
    pause = threading.Event()
    unheard = False
    with httpx.Client(timeout=_PATIENCE_S) as client:
        while True:
            pause.wait(_POLL_S)
            try:
                left = seconds_left(cloud, client)
                unheard = False
            except (httpx.HTTPError, ValueError, KeyError) as error:
                if not unheard:
                    _log.warning(
                        "no answer about spot notices (cluster.spot: %s): %s", cloud, error
                    )
                unheard = True
                continue
            if left is not None:
                return left


def _drain(left_s: float) -> None:
    import ray

    here, gone_at = ray.get_runtime_context(), time.monotonic() + left_s
    _log.warning("this node is taken away in %.0f s: draining it", left_s)
    while True:
        left_s = max(0.0, gone_at - time.monotonic())
        done = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "drain-node",
             f"--address={here.gcs_address}", f"--node-id={here.get_node_id()}",
             "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot notice",
             f"--deadline-remaining-seconds={int(left_s)}"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if not done.returncode or not left_s:
            return
        _log.error("the node could not be drained: %s", done.stderr.strip())
        time.sleep(_POLL_S)
