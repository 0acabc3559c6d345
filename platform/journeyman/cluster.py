"""Ray as we start it and as it fails: connect, and turn its errors into ours."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from journeyman.errors import ClusterError, JourneymanError
from journeyman.recipe import Cluster

_SOURCE_ROOT = Path(__file__).resolve().parent.parent
CHECKOUT = _SOURCE_ROOT.parent


def connect(settings: Cluster) -> None:
    """Connect to the recipe's cluster, or start one on this machine; raises ClusterError."""
    import ray

    if ray.is_initialized():
        return
    # Ray Train's and Ray Data's own lines would tear ours; their log files keep them.
    for name in ("ray.data", "ray.train", "ray.tune", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # Of tasks that fail at once Ray logs the stacks of all but the one that is raised.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    if not settings.address:
        # Ray's C++ core warns on the terminal about Ray Data's own actors (ray issue 53727).
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        with _without_c_stderr():
            ray.init(
                address=settings.address,
                logging_level=logging.ERROR,
                log_to_driver=False,
                include_dashboard=False if not settings.address else None,
                runtime_env=_runtime_env(),
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"cannot connect to Ray at {settings.address or 'this machine'} ({error}); look at "
            "cluster.address, RAY_ADDRESS, or `ray status`."
        ) from error


def _runtime_env() -> dict[str, Any]:
    """Workers import journeyman wherever it was imported from here.

    A submitted job may have said so itself, and Ray refuses to be told twice.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    told = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {} if "PYTHONPATH" in told else {"env_vars": {"PYTHONPATH": python_path()}}


def lacking(needed: dict[str, float], knobs: str) -> str:
    """What the cluster has too little of now, in words, empty if nothing; needed: by Ray's names.

    Raises ClusterError where it cannot grow: a Ray of this process's own. knobs: settings that
    lower what is needed.
    """
    import ray

    have = ray.cluster_resources()
    short = [
        f"{amount:g} {name}s, where the cluster has {have.get(name, 0):g}"
        for name, amount in needed.items()
        if amount > have.get(name, 0)
    ]
    words = " and ".join(short)
    if words and _is_own():
        raise ClusterError(
            f"this needs {words}: this machine alone. Lower {knobs}, or name a larger cluster "
            "(cluster.address)."
        )
    return words


def hardware() -> dict[str, Any]:
    """What Ray has, for the manifest of a step whose figures depend on it."""
    import ray

    have = ray.cluster_resources()
    kinds = sorted(name.partition(":")[2] for name in have if name.startswith("accelerator_type:"))
    return {
        "nodes": sum(node["Alive"] for node in ray.nodes()),
        "cpus": int(have.get("CPU", 0)),
        "gpus": int(have.get("GPU", 0)),
        "accelerators": kinds,
        "architecture": platform.machine(),
    }


def _is_own() -> bool:
    """Whether this process started the Ray that it uses; Ray has no public way to ask."""
    from ray._private.worker import global_worker

    return bool(global_worker.node and global_worker.node.head)


@contextlib.contextmanager
def _without_c_stderr() -> Iterator[None]:
    """Drop what native code writes to stderr: Ray's core announces its log level there."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def quiet_ray_data() -> None:
    """Keep Ray Data's lines off the terminal; call it once a dataset exists.

    Ray Data sets its loggers up anew when it is imported, console included.
    """
    logger = logging.getLogger("ray.data")
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler) and not hasattr(handler, "baseFilename"):
            handler.setLevel(logging.CRITICAL)


def python_path() -> str:
    """PYTHONPATH with which a Ray worker finds this package and the checkout's serve/."""
    others = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    return os.pathsep.join(dict.fromkeys([str(_SOURCE_ROOT), str(CHECKOUT), *others]))


class InTask(Exception):  # noqa: N818 - no error of its own
    """Carries an error of ours out of a task of Ray Data, which writes into messages that it sees;
    ``reason_of`` finds it."""

    def __init__(self, error: JourneymanError, *added: str) -> None:
        super().__init__(error, *added)
        self.cause = error


def reason_of(error: BaseException, doing: str) -> JourneymanError:
    """The error of ours inside one of Ray's, or a ClusterError that names Ray's last words."""
    from ray.exceptions import RayError

    seen: set[int] = set()
    node: BaseException | None = error
    while node is not None and id(node) not in seen:
        # Ray's own of a task is of both classes, and its words are the task's stack.
        if isinstance(node, JourneymanError) and not isinstance(node, RayError):
            return node
        seen.add(id(node))
        cause = getattr(node, "cause", None)
        node = cause if isinstance(cause, BaseException) else node.__cause__ or node.__context__
    last = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    return ClusterError(
        f"{doing} stopped: {last}. What was finished is kept: the same command goes on from there. "
        "Ray's log files (/tmp/ray/session_latest/logs) say more."
    )


def serve_module(name: str) -> ModuleType:
    """A module of the checkout's ``serve/`` folder, which lies beside the source root."""
    if not (CHECKOUT / "serve" / f"{name}.py").is_file():
        raise ClusterError(
            f"serve/{name}.py is not beside {_SOURCE_ROOT}: serving runs from a checkout of the "
            "repository (pip install --editable .)."
        )
    if str(CHECKOUT) not in sys.path:
        sys.path.append(str(CHECKOUT))
    return importlib.import_module(f"serve.{name}")
