"""``journeyman submit`` and ``journeyman jobs``: recipes as jobs of a Ray cluster."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from journeyman import jobs
from journeyman.cli.arguments import add_recipe, command, load
from journeyman.cli.text import table
from journeyman.errors import ClusterError, RecipeError
from journeyman.jobs import Job, Jobs
from journeyman.progress import duration

_SUBMIT = """\
Run a recipe as a job of a Ray cluster, and follow what it writes. The job takes along this code,
the recipe as it will run and the small files that it names by relative paths; nothing else of this
machine. Ctrl-C lets go of the job, which goes on.

A job is called after its recipe: while it runs, the same command follows it instead of starting
another, and once it has ended, --again starts it anew; what was finished is not done twice.
"""
_SUBMIT_EXAMPLES = """\
examples:
  journeyman submit my.yaml --address http://127.0.0.1:8265
  journeyman submit my.yaml --step label --env HF_TOKEN
  journeyman submit my.yaml --set output=/shared/runs --again
"""
_JOBS_EXAMPLES = """\
examples:
  journeyman jobs list --address http://127.0.0.1:8265
  journeyman jobs logs routing-pipeline-0d1f6a27c3b5 --follow
  journeyman jobs stop routing-pipeline-0d1f6a27c3b5
"""


def add_commands(commands: Any) -> None:
    submit = command(
        commands, "submit", "run a recipe as a job of a cluster", _submit, _SUBMIT, _SUBMIT_EXAMPLES
    )
    add_recipe(submit)
    add_address(submit)
    submit.add_argument(
        "--step", choices=jobs.SCRIPTS, default=jobs.SCRIPTS[0],
        help="one step alone; by default all that are not done yet",
    )  # fmt: skip
    add_variables(submit)
    submit.add_argument("--again", action="store_true", help="also if the same job has ended")
    submit.add_argument("--detach", action="store_true", help="do not follow it")
    group = commands.add_parser(
        "jobs",
        help="look after the jobs of a cluster: list, logs, stop",
        epilog=_JOBS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = group.add_subparsers(required=True, metavar="ACTION")
    add_address(command(actions, "list", "the jobs of a cluster", _list))
    logs = command(actions, "logs", "what a job wrote", _logs)
    stop = command(actions, "stop", "end a job; what it finished is kept", _stop)
    for action in (logs, stop):
        action.add_argument("job", metavar="JOB", help="its name, see journeyman jobs list")
        add_address(action)
    logs.add_argument("--follow", action="store_true", help="until the job has ended")


def add_variables(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--env", dest="variables", metavar="NAME", action="append", default=[],
        help="hand this environment variable to the job, such as HF_TOKEN; may be given again. "
        "Who may look at the cluster's dashboard can read it: the nodes' own role is better",
    )  # fmt: skip


def add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address", metavar="URL",
        help="of the cluster's dashboard; default RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or "
        "http://127.0.0.1:8265",
    )  # fmt: skip


def _submit(options: argparse.Namespace) -> int:
    from journeyman import job_folder

    recipe = load(options)
    environment = variables(options.variables)
    job_folder.check(recipe, os.environ)
    cluster = Jobs(options.address)
    there = cluster.latest(recipe, options.step)
    if there and not there.active and not options.again:
        return _ended_before(there)
    job = cluster.submit(recipe, options.step, environment)
    known = there is not None and job.id == there.id
    words = f"is {job.status.lower()} already, and is not started again" if known else "submitted"
    if options.detach:
        print(f"job       {job.id} {words}\n{_how_to_come_back(job.id, cluster)}")
        return 0
    return follow(cluster, job.id, f"job       {job.id} {words}\n")


def variables(names: Sequence[str]) -> dict[str, str]:
    """Those of this environment, by name; raises RecipeError where one is not set."""
    for name in names:
        if name not in os.environ:
            raise RecipeError(f"--env {name}: no such environment variable is set here.")
    return {name: os.environ[name] for name in names}


def _ended_before(job: Job) -> int:
    if job.status != "SUCCEEDED":
        raise ClusterError(
            f"{job.id}: this recipe was run, and ended as {job.status.lower()}; journeyman jobs "
            f"logs {job.id} says why, and --again goes on where it stopped."
        )
    print(f"job       {job.id} has succeeded before; --again runs it once more")
    return 0


def follow(cluster: Jobs, id: str, first_line: str = "") -> int:
    """Show what a job writes until it has ended; returns the exit status."""

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        write(first_line)
        job = cluster.follow(id, write)
    except KeyboardInterrupt:
        print(f"\nLet go of {id}, which goes on. {_how_to_come_back(id, cluster)}")
        return 130
    if job.status == "SUCCEEDED":
        print(f"job       {id} succeeded")
        return 0
    reason = next(iter(job.message.splitlines()), "").partition(", last available logs")[0]
    raise ClusterError(f"{id}: {job.status.lower()} ({reason.strip(' .')}).")


def _how_to_come_back(id: str, cluster: Jobs) -> str:
    at = f"--address {cluster.address}"
    return (
        f"Follow it with: journeyman jobs logs {id} --follow {at}\n"
        f"End it with:    journeyman jobs stop {id} {at}"
    )


def _list(options: argparse.Namespace) -> int:
    rows = [("job", "status", "started", "took")]
    for job in Jobs(options.address).list():
        since = job.started and datetime.fromtimestamp(job.started).strftime("%Y-%m-%d %H:%M")
        took = job.started and duration((job.ended or time.time()) - job.started)
        rows.append((job.id, job.status.lower(), since or "", took or ""))
    print(table(rows) if len(rows) > 1 else "No job was submitted to this cluster.")
    return 0


def _logs(options: argparse.Namespace) -> int:
    cluster = Jobs(options.address)
    if options.follow:
        cluster.get(options.job)
        return follow(cluster, options.job)
    print(cluster.log(options.job), end="")
    return 0


def _stop(options: argparse.Namespace) -> int:
    job = Jobs(options.address).stop(options.job)
    print(f"job       {job.id} {job.status.lower()}")
    return 0
