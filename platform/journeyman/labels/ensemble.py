"""Several teachers over one corpus: each one's labels are kept, the dataset holds their mean.

The mean is of probabilities (a linear opinion pool), each teacher's prior corrected first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from journeyman.labels.prior import corrected
from journeyman.labels.schema import Commit, Filtered, Quarantined, label_schema
from journeyman.labels.store import LabelStore
from journeyman.recipe import digest

_TOKENS = ("n_prompt_tokens", "n_cached_tokens", "n_output_tokens")


def member(where: str, name: str) -> str:
    """Where a teacher's own labels lie, inside the ensemble's dataset."""
    return f"{where.rstrip('/')}/members/{name}"


def identity(members: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The ensemble's, from those of its teachers' datasets."""
    first = next(iter(members.values()))
    teachers = {name: facts["teacher"] for name, facts in members.items()}
    names = " and ".join(facts["model"] for facts in teachers.values())
    together = {
        "model": f"the mean of {names}",
        "weights": digest([facts["weights"] for facts in teachers.values()]),
        "tokenizer": digest([facts["tokenizer"] for facts in teachers.values()]),
    }
    return first | {"teacher": together, "members": members}


def combine(store: LabelStore, members: Sequence[LabelStore], shards: Sequence[str]) -> None:
    """Commit the mean of every shard that has none yet. A row is labeled if every teacher
    labeled it; else it shares the fate that the first of the others gave it."""
    done = store.done()
    commits = [member.commits() for member in members]
    log_priors = [member.manifest()["log_prior"] for member in members]
    for shard in shards:
        if shard not in done:
            _combine_shard(store, members, [c[shard] for c in commits], log_priors)


def _combine_shard(
    store: LabelStore,
    members: Sequence[LabelStore],
    commits: Sequence[Commit],
    log_priors: Sequence[list[float] | None],
) -> None:
    import pyarrow as pa

    tables = [m.read_shard(c) for m, c in zip(members, commits, strict=True)]
    quarantined: dict[str, Quarantined] = {}
    left_out: dict[str, Filtered] = {}
    for store_, commit in zip(members, commits, strict=True):
        for bad in store_.read_quarantine(commit):
            quarantined.setdefault(bad.id, bad)
        for out in store_.read_filtered(commit):
            left_out.setdefault(out.id, out)
    left_out = {k: v for k, v in left_out.items() if k not in quarantined}
    records = [
        [r for r in table.to_pylist() if r["id"] not in quarantined and r["id"] not in left_out]
        for table in tables
    ]
    mean = [_mean(rows, log_priors) for rows in zip(*records, strict=True)]
    summed = _summed(commits)
    store.write(
        Commit(**summed | {"ok": len(mean), "quarantined": len(quarantined),
                           "filtered": len(left_out)}),
        pa.Table.from_pylist(mean, schema=label_schema("classes")),
        list(quarantined.values()),
        list(left_out.values()),
    )  # fmt: skip


def _mean(rows: Sequence[dict[str, Any]], log_priors: Sequence[Any]) -> dict[str, Any]:
    logprobs = np.array(
        [
            corrected(np.array(row["class_logprobs"]), None if p is None else np.array(p))
            for row, p in zip(rows, log_priors, strict=True)
        ]
    )
    masses = [row["label_mass"] for row in rows]
    return rows[0] | {
        "class_logprobs": np.logaddexp.reduce(logprobs, axis=0) - np.log(len(rows)),
        "label_mass": None if None in masses else float(np.mean(masses)),
        "truncated": any(row["truncated"] for row in rows),
        **{name: sum(row[name] for row in rows) for name in _TOKENS},
    }


def _summed(commits: Sequence[Commit]) -> dict[str, Any]:
    names = ("prompt_tokens", "cached_tokens", "output_tokens", "replica_seconds", "seconds",
             "engine_restarts", "copied", "truncated")  # fmt: skip
    return {
        "shard": commits[0].shard,
        "generation": 0,
        "data": "",
        "quarantine": None,
        "filtered_file": None,
        "sha256": "",
        "bytes": 0,
        "rows": commits[0].rows,
        **{name: sum(getattr(commit, name) for commit in commits) for name in names},
    }
