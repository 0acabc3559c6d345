"""A cascade that runs as long as a ``with`` block, in a Ray that the caller has started.

Ray's head must be on this machine: the HTTP port is taken there, and asked for here.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import ray
from ray import serve
from ray.serve.config import ProxyLocation
from ray.serve.schema import DeploymentStatus

from journeyman.cascade.keys import Key
from journeyman.errors import ClusterError
from serve.app import build
from serve.loading import here, recipe_of
from serve.ports import check_port, free_port

_NAME = "cascade"
_POLL_INTERVAL_S = 0.25
_EXTRA_START_S = 60.0  # workers, imports and the student, besides the teacher's engine
_STOP_TIMEOUT_S = 30.0  # Serve's own


@contextlib.contextmanager
def running(
    bundle: str | Path,
    host: str = "127.0.0.1",
    port: int = 0,
    may_ask: tuple[Key, ...] | None = None,
    keeps_feedback: bool = True,
) -> Iterator[str]:
    """Serve a bundle; yields the base URL once the cascade is ready, and shuts Serve down.

    port: 0 takes a free one; may_ask: as ``build``; keeps_feedback: whether requests are traffic,
    kept and audited as the recipe says. Raises ClusterError: the port is taken, Serve runs there
    already, or the cascade does not get ready in time; BundleMismatch, ModelError, RecipeError as
    ``build``.
    """
    application = build(bundle, may_ask, keeps_feedback)
    timeout_s = recipe_of(here(bundle)).teacher.start_timeout_s + _EXTRA_START_S
    port = port or free_port(host)
    check_port(host, port)
    if serve.status().proxies:
        raise ClusterError(
            "Ray Serve runs on this Ray cluster already, and has one HTTP address only; stop it "
            "(serve shutdown), or deploy the cascade there: serve deploy serve/cascade.yaml."
        )
    with _quiet_serve():
        try:
            serve.start(
                proxy_location=ProxyLocation.HeadOnly, http_options={"host": host, "port": port}
            )
            target = serve.RunTarget(target=application, name=_NAME, route_prefix="/")
            serve.run_many([target], wait_for_applications_running=False)
            base_url = f"http://{host}:{port}"
            _wait_until_ready(base_url, timeout_s)
            yield base_url
        finally:
            _shut_down()


def _wait_until_ready(base_url: str, timeout_s: float) -> None:
    """Raises ClusterError once an application failed to start, or the time is up."""
    deadline = time.monotonic() + timeout_s
    while True:
        reason = _unready(base_url)
        if reason is None:
            return
        if failure := _failure():
            raise ClusterError(f"the cascade did not start: {failure}")
        if time.monotonic() > deadline:
            raise ClusterError(
                f"the cascade is not ready after {timeout_s:g} s ({_slowness() or reason}); look "
                "at `ray status` for free CPUs (cascade.teacher_cpus, and one for the student), "
                "and at Serve's log files (/tmp/ray/session_latest/logs/serve)."
            )
        time.sleep(_POLL_INTERVAL_S)


def _unready(base_url: str) -> str | None:
    """Why the cascade cannot answer yet, in its own words where it has some."""
    try:
        response = httpx.get(f"{base_url}/readyz", timeout=10.0)
    except httpx.HTTPError as error:
        return f"no answer over HTTP: {type(error).__name__}"
    if response.status_code == 200:
        return None
    # Until the ingress is there, Serve's proxy answers by itself, in plain text.
    is_ours = response.headers.get("content-type") == "application/json"
    return response.json()["error"]["message"] if is_ours else "the ingress is starting"


def _failure() -> str | None:
    """The last words of a deployment that Serve gave up."""
    for deployment in serve.status().applications[_NAME].deployments.values():
        if deployment.status == DeploymentStatus.DEPLOY_FAILED:
            last = deployment.message.strip().splitlines()[-1]
            return re.sub(r"^[\w.]+(Error|Mismatch): ", "", last)  # the class of an exception
    return None


def _slowness() -> str:
    """What Serve says of deployments that are not there yet, such as a lack of CPUs."""
    deployments = serve.status().applications[_NAME].deployments.values()
    return " ".join(d.message.strip() for d in deployments if d.message)


def _shut_down() -> None:
    """``serve.shutdown()``, without the line about a failed task that Ray prints for it.

    Serve (2.60) waits in a call on the controller that only ends when the controller is killed.
    """
    with contextlib.suppress(ValueError):  # there is no such actor, or no longer
        controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        ray.get(controller.graceful_shutdown.remote(wait=False), timeout=_STOP_TIMEOUT_S)
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        while time.monotonic() < deadline:
            ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
            time.sleep(_POLL_INTERVAL_S)
    serve.shutdown()


@contextlib.contextmanager
def _quiet_serve() -> Iterator[None]:
    """Keep Serve's own lines off the terminal; its log files have them."""
    logger = logging.getLogger("ray.serve")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
