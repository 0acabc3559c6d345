"""``journeyman doctor``: whether a cluster is fit for a recipe, before money is spent."""

from __future__ import annotations

import argparse
import os
from typing import Any

from journeyman.cli.arguments import add_overrides, command
from journeyman.cli.jobs import add_address, add_variables, follow, variables

_DESCRIPTION = """\
Look at a cluster, and say what to mend: are all nodes alike, does Ray offer the GPUs that are
there, is room for a replica and for the teacher's weights, is every model in reach of every node,
can each of them write where the run writes. Without a recipe, at the nodes alone. Ends with 1 if
anything is to be mended.

With --address it goes as a job to the cluster behind that dashboard, as journeyman submit does;
without, it looks at the cluster that the recipe's cluster.address or RAY_ADDRESS names.
"""
_EXAMPLES = """\
examples:
  journeyman doctor my.yaml --address http://127.0.0.1:8265
  journeyman doctor my.yaml --address http://127.0.0.1:8265 --wait 900    new nodes included
  journeyman doctor
"""


def add_command(commands: Any) -> None:
    words = "check that a cluster is fit for a recipe"
    doctor = command(commands, "doctor", words, _doctor, _DESCRIPTION, _EXAMPLES)
    doctor.add_argument("recipe", metavar="RECIPE", nargs="?", help="the recipe, a YAML file")
    add_overrides(doctor)
    add_address(doctor)
    add_variables(doctor)
    doctor.add_argument(
        "--wait", metavar="SECONDS", type=float, default=30.0,
        help="for room for a replica, new nodes included (default 30)",
    )  # fmt: skip


def _doctor(options: argparse.Namespace) -> int:
    from journeyman import cluster, doctor, recipe

    loaded = recipe.load(options.recipe, options.overrides) if options.recipe else None
    if options.address:
        return _as_job(options, loaded)
    cluster.connect(loaded.cluster if loaded else recipe.Cluster())
    found = 0
    for finding in doctor.examine(loaded, options.wait):
        print(f"{'ok' if finding.ok else 'MEND':<5} {finding.what:<9} {finding.words}", flush=True)
        found += not finding.ok
    return 1 if found else 0


def _as_job(options: argparse.Namespace, loaded: Any) -> int:
    from journeyman import job_folder
    from journeyman.jobs import Jobs

    if loaded:
        job_folder.check(loaded, os.environ)
    cluster = Jobs(options.address)
    given = variables(options.variables)
    job = cluster.submit(loaded, "doctor", given, ["--wait", f"{options.wait:g}"])
    return follow(cluster, job.id)
