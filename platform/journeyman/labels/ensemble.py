"""Several teachers over one corpus: each one's labels are kept, the dataset holds their mean.

The mean is of probabilities, a linear opinion pool (Stone, The opinion pool, 1961), over the
classes, each teacher's prior corrected first, or over the next token, see ``pooled``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from journeyman.errors import DataError
from journeyman.labels.codec import Codec, Distributions
from journeyman.labels.prior import corrected
from journeyman.labels.schema import Commit, Filtered, Quarantined, label_schema
from journeyman.labels.store import LabelStore
from journeyman.recipe import digest

_TOKENS = ("n_prompt_tokens", "n_cached_tokens", "n_output_tokens")

_Rows = Sequence[dict[str, Any]]  # one corpus row's records, a teacher each
_Mean = Callable[[_Rows], dict[str, Any]]


def member(where: str, name: str) -> str:
    """Where a teacher's own labels lie, inside the ensemble's dataset."""
    return f"{where.rstrip('/')}/members/{name}"


def identity(members: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The ensemble's, from those of its teachers' datasets; raises DataError where these give
    probabilities to different tokens."""
    first = next(iter(members.values()))
    teachers = {name: facts["teacher"] for name, facts in members.items()}
    names = " and ".join(facts["model"] for facts in teachers.values())
    tokenizers = [facts["tokenizer"] for facts in teachers.values()]
    together = {
        "model": f"the mean of {names}",
        "weights": digest([facts["weights"] for facts in teachers.values()]),
        "tokenizer": tokenizers[0] if len(set(tokenizers)) == 1 else digest(tokenizers),
    }
    others = [t["model"] for t in teachers.values() if t["tokenizer"] != tokenizers[0]]
    if first["kind"] == "logits" and others:
        raise DataError(
            f"ensemble: {others[0]} has another tokenizer than {first['teacher']['model']}, so "
            "their probabilities are of different tokens and have no mean; with labels.kind: "
            "logits take teachers of one tokenizer, or label with each for itself."
        )
    return first | {"teacher": together, "members": members}


def codec_of(described: Sequence[Mapping[str, Any] | None]) -> Codec | None:
    """The mean's codec, from its teachers' as their manifests describe them: as many largest
    probabilities as each has, or all their draws together."""
    codecs = [Codec.described(of) for of in described if of]
    if not codecs:
        return None
    k = sum(c.k for c in codecs) if codecs[0].name == "sampled" else codecs[0].k
    return Codec(name=codecs[0].name, vocab_size=max(c.vocab_size for c in codecs), k=k)


def combine(store: LabelStore, members: Sequence[LabelStore], shards: Sequence[str]) -> None:
    """Commit the mean of every shard that has none yet. A row is labeled if every teacher
    labeled it; else it shares the fate that the first of the others gave it.

    Raises DataError where teachers read a row as different tokens.
    """
    done = store.done()
    commits = [member.commits() for member in members]
    manifests = [member.manifest() for member in members]
    kind = store.manifest()["identity"]["kind"]
    mean = _mean_logits(manifests) if kind == "logits" else _mean_classes(manifests)
    for shard in shards:
        if shard not in done:
            _combine_shard(store, members, [c[shard] for c in commits], kind, mean)


def _combine_shard(
    store: LabelStore,
    members: Sequence[LabelStore],
    commits: Sequence[Commit],
    kind: str,
    mean: _Mean,
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
    labeled = [_summed_row(rows) | mean(rows) for rows in zip(*records, strict=True)]
    summed = _summed(commits)
    store.write(
        Commit(**summed | {"ok": len(labeled), "quarantined": len(quarantined),
                           "filtered": len(left_out)}),
        pa.Table.from_pylist(labeled, schema=label_schema(kind)),
        list(quarantined.values()),
        list(left_out.values()),
    )  # fmt: skip


def _mean_classes(manifests: Sequence[Mapping[str, Any]]) -> _Mean:
    priors = [None if m["log_prior"] is None else np.array(m["log_prior"]) for m in manifests]

    def mean(rows: _Rows) -> dict[str, Any]:
        logprobs = np.array(
            [
                corrected(np.array(row["class_logprobs"]), prior)
                for row, prior in zip(rows, priors, strict=True)
            ]
        )
        masses = [row["label_mass"] for row in rows]
        return {
            "class_logprobs": np.logaddexp.reduce(logprobs, axis=0) - np.log(len(rows)),
            "label_mass": None if None in masses else float(np.mean(masses)),
        }

    return mean


def _mean_logits(manifests: Sequence[Mapping[str, Any]]) -> _Mean:
    codecs = [Codec.described(m["codec"]) for m in manifests]
    own = codec_of([m["codec"] for m in manifests])
    assert own is not None  # teachers of logits always record

    def mean(rows: _Rows) -> dict[str, Any]:
        tokens = [c.unpack_ids(r["token_ids"]) for c, r in zip(codecs, rows, strict=True)]
        n = rows[0]["n_positions"]
        if any(r["n_positions"] != n or not np.array_equal(t, tokens[0])
               for t, r in zip(tokens, rows, strict=True)):  # fmt: skip
            raise DataError(
                f"ensemble: its teachers read row {rows[0]['id']} as different tokens, for one cut "
                "it and another did not, or their chat templates differ; give all the same "
                "max_model_len."
            )
        decoded = [c.decode(r["logprobs"], n) for c, r in zip(codecs, rows, strict=True)]
        if own.name == "sampled":
            pairs = zip(decoded, codecs, strict=True)
            draws = np.concatenate([_draws(d, c.k) for d, c in pairs], axis=1)
            payload = own.encode(draws, np.empty(0))
        else:
            payload = own.encode(*pooled(decoded, own.vocab_size, own.k))
        return {
            "n_prompt_tokens": rows[0]["n_prompt_tokens"],  # training finds the text's end by it
            "token_ids": own.pack_ids(tokens[0]),
            "logprobs": payload,
        }

    return mean


def pooled(
    members: Sequence[Distributions], vocab_size: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """token_ids int32[positions, k] and logprobs float32[positions, k] of the mean's largest.

    Of a token that a teacher's record has not, that teacher is taken to give it an even share of
    the mass behind its entries, and no more than its smallest entry. So a token's mean is off by
    no more than those teachers' smallest entries, summed, over the number of all teachers; that of
    a token which all have recorded is exact. Where fewer than k tokens are recorded the rest is
    -inf, with token 0.
    """
    n_positions = len(members[0].log_tail_mass)
    keys, shares = [], []  # of each recorded entry: position * vocab_size + token; what it adds
    unseen = np.zeros(n_positions)  # what the mean gives to a token that nobody recorded
    for member in members:
        there = member.token_ids >= 0
        p = np.exp(member.logprobs.astype(np.float64))
        left = np.maximum(vocab_size - there.sum(axis=1), 1)
        even = np.minimum(np.exp(member.log_tail_mass.astype(np.float64)) / left,
                          np.where(there, p, np.inf).min(axis=1, initial=np.inf))  # fmt: skip
        unseen += even / len(members)
        position = np.nonzero(there)[0]
        keys.append(position * vocab_size + member.token_ids[there])
        shares.append((p[there] - even[position]) / len(members))
    unique, place = np.unique(np.concatenate(keys), return_inverse=True)
    position, token = np.divmod(unique, vocab_size)
    mean = np.bincount(place, weights=np.concatenate(shares)) + unseen[position]
    order = np.lexsort((token, -mean, position))
    position, token, mean = position[order], token[order], mean[order]
    rank = np.arange(len(position)) - np.searchsorted(position, position)
    kept = rank < k
    token_ids = np.zeros((n_positions, k), dtype=np.int32)
    logprobs = np.full((n_positions, k), -np.inf, dtype=np.float32)
    token_ids[position[kept], rank[kept]] = token[kept]
    logprobs[position[kept], rank[kept]] = np.log(mean[kept])
    return token_ids, logprobs


def _draws(of: Distributions, n: int) -> np.ndarray:
    """int32[positions, n]: the draws that a record counted, in the order of their ids."""
    there = of.token_ids >= 0
    counts = np.rint(np.exp(of.logprobs[there]) * n).astype(int)
    return np.repeat(of.token_ids[there], counts).reshape(len(there), n)


def _summed_row(rows: _Rows) -> dict[str, Any]:
    return rows[0] | {
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
