"""Jobs on a Ray cluster, over its dashboard's HTTP interface: submit, follow, list, stop.

A job is called after its recipe's hash, so that the same one is not started twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from journeyman import job_folder
from journeyman.errors import ClusterError
from journeyman.recipe import Recipe

SCRIPTS = ("pipeline", "prepare", "estimate", "label", "train", "certify")  # of jobs/
_DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_ADDRESS = "RAY_API_SERVER_ADDRESS"
_POLL_S = 0.5
_STOP_S = 60.0  # for a job to end that was told to
_SILENCE_S = 60.0  # of a cluster that does not answer, before a job is no longer followed


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A submitted job; times in seconds since the epoch."""

    id: str
    status: str  # PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED, as Ray calls them
    message: str
    recipe: str | None  # hash of the recipe; None of a job that journeyman did not submit
    started: float | None
    ended: float | None

    @property
    def active(self) -> bool:
        return self.status in ("PENDING", "RUNNING")


def job_id(recipe: Recipe | None, script: str) -> str:
    """What the first job of a recipe is called; later ones end in -2, -3 and so on."""
    return f"{recipe.name}-{script}-{recipe.hash[:12]}" if recipe else script


class Jobs:
    """The jobs of one cluster; every method raises ClusterError if it does not answer."""

    def __init__(self, address: str | None = None) -> None:
        """address: of the cluster's dashboard; default as Ray's own commands have it."""
        named = os.environ.get("RAY_ADDRESS", "")
        address = (
            address
            or os.environ.get(_ADDRESS)
            or (named if named.startswith("http") else _DEFAULT_ADDRESS)
        )
        if not address.startswith(("http://", "https://")):
            raise ClusterError(
                f"{address}: name the dashboard of the cluster, such as {_DEFAULT_ADDRESS}."
            )
        self.address = address.rstrip("/")
        with self._errors():
            self._client = _client(self.address)

    def list(self) -> list[Job]:
        """All jobs that the cluster remembers, oldest first."""
        with self._errors():
            told = self._client.list_jobs()
        jobs = [_job(details) for details in told if details.submission_id]
        return sorted(jobs, key=lambda job: job.started or 0.0)

    def get(self, id: str) -> Job:
        """Raises ClusterError if the cluster has none of this name."""
        for job in self.list():
            if job.id == id:
                return job
        raise ClusterError(
            f"{id}: no such job at {self.address}; journeyman jobs list --address {self.address} "
            "has their names."
        )

    def latest(self, recipe: Recipe | None, script: str) -> Job | None:
        """The last job of this very recipe."""
        first = job_id(recipe, script)
        found = {_number(job.id, first): job for job in self.list()}
        found.pop(0, None)
        return found[max(found)] if found else None

    def submit(
        self,
        recipe: Recipe | None,
        script: str,
        environment: Mapping[str, str],
        arguments: Sequence[str] = (),
    ) -> Job:
        """Start a job of this recipe, or return the one that runs.

        script: of jobs/; arguments: for it, behind the recipe.
        environment: further variables of its processes, which the dashboard shows.
        """
        there = self.latest(recipe, script)
        if there and there.active:
            return there
        first = job_id(recipe, script)
        id = f"{first}-{_number(there.id, first) + 1}" if there else first
        given = [job_folder.RECIPE] if recipe else []
        with tempfile.TemporaryDirectory(prefix="journeyman-") as folder:
            job_folder.pack(recipe, Path(folder))
            try:
                with self._errors():
                    self._client.submit_job(
                        entrypoint=shlex.join(["python", f"jobs/{script}.py", *given, *arguments]),
                        submission_id=id,
                        metadata={"recipe": recipe.hash} if recipe else {},
                        runtime_env={
                            "working_dir": folder,
                            # From the job's own folder, where every process of it starts.
                            "env_vars": {**environment, "PYTHONPATH": "platform:."},
                        },
                    )
            except ClusterError:
                # Someone else may have started the very same in the meantime.
                there = self.latest(recipe, script)
                if not (there and there.id == id and there.active):
                    raise
        return self.get(id)

    def follow(self, id: str, write: Callable[[str], None]) -> Job:
        """Hand on what the job writes until it has ended, however often the line breaks."""
        n_written, answered = 0, time.monotonic()
        while True:
            try:
                n_written = asyncio.run(self._tail(id, n_written, write))
                job = self.get(id)
                if not job.active:
                    write(self.log(id)[n_written:])  # where the line broke before its end
                    return job
                answered = time.monotonic()
            except ClusterError:
                if time.monotonic() - answered > _SILENCE_S:
                    raise
            time.sleep(_POLL_S)

    async def _tail(self, id: str, n_written: int, write: Callable[[str], None]) -> int:
        """Follow a job's output from character n_written on; returns where it broke off."""
        import aiohttp

        n_told = 0
        with contextlib.suppress(aiohttp.ClientError, RuntimeError, OSError):
            async for text in self._client.tail_job_logs(id):
                n_told += len(text)
                if n_told > n_written:
                    write(text[n_written - n_told :])
                    n_written = n_told
        task = asyncio.current_task()
        if task and task.cancelling():
            raise asyncio.CancelledError  # Ctrl-C, which the client took for a broken line
        return n_written

    def log(self, id: str) -> str:
        """All that a job has written so far."""
        self.get(id)
        with self._errors():
            return str(self._client.get_job_logs(id))

    def stop(self, id: str) -> Job:
        """End a job and wait until it has; what it finished is kept."""
        if not (job := self.get(id)).active:
            return job
        with self._errors():
            self._client.stop_job(id)
        deadline = time.monotonic() + _STOP_S
        while (job := self.get(id)).active:
            if time.monotonic() > deadline:
                raise ClusterError(f"{id}: told to stop, and still runs after {_STOP_S:g} s.")
            time.sleep(_POLL_S)
        return job

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise ClusterError(
                f"{self.address}: asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
                "RAY_AUTH_TOKEN_PATH to the cluster's own (on its head: ~/.ray/auth_token; with "
                "KubeRay in the secret that is called as the cluster: docs/kubernetes.md)."
            ) from error
        except (ConnectionError, requests.RequestException) as error:
            raise ClusterError(
                f"{self.address}: no Ray cluster answers there; see whether its dashboard runs and "
                "its port is open (`ray dashboard cluster.yaml` keeps one open), or name another "
                "with --address."
            ) from error
        except (RuntimeError, ValueError) as error:  # what the cluster says of a request
            raise ClusterError(f"{self.address}: refused ({_reason(error)}).") from error


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    for handler in logging.getLogger("ray").handlers:  # each upload would be two lines
        handler.setLevel(logging.WARNING)
    # RAY_ADDRESS would go before an address that is passed on.
    before = os.environ.get(_ADDRESS)
    os.environ[_ADDRESS] = address
    try:
        return JobSubmissionClient(address)
    finally:
        os.environ.pop(_ADDRESS)
        if before is not None:
            os.environ[_ADDRESS] = before


def _reason(error: Exception) -> str:
    """The one line that says why: of a traceback, which a cluster may answer with, the last."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip(" .'\"}")]
    if not lines:
        return type(error).__name__
    return lines[-1 if any("Traceback" in line for line in lines) else 0].rstrip(".")


def _job(details: Any) -> Job:
    return Job(
        id=details.submission_id,
        status=str(details.status),
        message=details.message or "",
        recipe=(details.metadata or {}).get("recipe"),
        started=details.start_time and details.start_time / 1000,
        ended=details.end_time and details.end_time / 1000,
    )


def _number(id: str, first: str) -> int:
    """1 of a recipe's first job, n of the one that ends in -n, 0 of others."""
    if id == first:
        return 1
    rest = id.removeprefix(f"{first}-")
    return int(rest) if rest != id and rest.isdigit() else 0
