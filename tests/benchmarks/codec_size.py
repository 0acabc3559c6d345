"""Bytes on disk of a token's distribution, and what they cost in KL, beside other formats.

    .venv/bin/python tests/benchmarks/codec_size.py --quick
    .venv/bin/python tests/benchmarks/codec_size.py --json codec_size.json

The demo's teacher reads texts (wikitext sentences where they lie beside the repository, else the
demo's requests) in a plain float32 forward pass. Every format writes the same distributions to one
Parquet file, a row a text, zstd level 3, no statistics, with Parquet's dictionaries or without,
whichever is smaller. Peers:

- structs: what ray.data.llm returns, list<list<struct<token_id, logprob, rank, decoded_token>>>;
- lists: list<list<int32>> beside list<list<float32>>;
- DistillKit at its two published settings, 114 and 312 bytes a token with ids of 16 bits.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from journeyman import models, recipe
from journeyman.labels.codec import Codec, Distributions

ROOT = Path(__file__).resolve().parents[2]
WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext" / "wiki_sentences.txt"
REQUESTS = ROOT / "jobs" / "recipes" / "clinc150" / "requests.jsonl.gz"
DRAWS = 50
MOST = 224  # entries kept of the forward pass: more than any format stores at 312 bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One text's exact distributions, as far as the measures need them."""

    token_ids: np.ndarray  # int32[positions, MOST], by falling probability
    logprobs: np.ndarray  # float64[positions, MOST]
    sum_p_log_p: np.ndarray  # float64[positions], over the whole vocabulary
    draws: np.ndarray  # int32[positions, DRAWS]


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillKit:
    """A published setting of its `logprob_compressor` (README of arcee-ai/DistillKit)."""

    k: int
    exact_k: int  # the largest logprobs, as bfloat16
    powers: tuple[float, ...]  # of the rank; least-squares coefficients for the others, as float32
    published_bytes: int


DISTILLKIT = (
    DistillKit(k=50, exact_k=1, powers=(0, 1, 0.5), published_bytes=114),
    DistillKit(k=128, exact_k=16, powers=(0, 1, 2, 3, 4, 0.5), published_bytes=312),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a fifth of the texts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there too")
    options = parser.parse_args()
    os.chdir(ROOT)
    report = Report()
    report.machine()

    model = models.resolve(recipe.load("jobs/recipes/routing.yaml").teacher.model)
    rows, pieces = teacher_rows(model.path, texts(40 if options.quick else 200))
    n_tokens = sum(len(row.token_ids) for row in rows)
    report.show(f"{n_tokens} tokens in {len(rows)} texts, vocabulary of {len(pieces)}")

    sizes(rows, pieces, report)
    errors(rows, len(pieces), report)
    distillkit(rows, len(pieces), report)
    speed(rows, len(pieces), 3 if options.quick else 7, report)
    if options.json:
        options.json.write_text(json.dumps(report.numbers, indent=1))
    return report.close()


def sizes(rows: list[Row], pieces: list[str], report: Report) -> None:
    """Ours beside structs and lists, entry for entry."""
    report.title("bytes/token on disk")
    for k in (16, 64):
        peers = {
            "ray.data.llm structs": on_disk([structs(rows, k, pieces)], rows),
            "Arrow lists": on_disk(lists([r.token_ids[:, :k] for r in rows],
                                         [r.logprobs[:, :k] for r in rows]), rows),
        }  # fmt: skip
        for name in ("topk_fp16", "topk_q8"):
            compare(f"size/{name}/k{k}", our_size(rows, name, len(pieces), k), peers, report)
    unique = [[np.unique(drawn, return_counts=True) for drawn in row.draws] for row in rows]
    peers = {
        "Arrow lists of ids and counts": on_disk(
            [pa.array([[ids for ids, _ in row] for row in unique],
                      pa.list_(pa.list_(pa.int32()))),
             pa.array([[counts for _, counts in row] for row in unique],
                      pa.list_(pa.list_(pa.int32())))], rows)
    }  # fmt: skip
    sampled = our_size(rows, "sampled", len(pieces), DRAWS)
    compare(f"size/sampled/draws{DRAWS}", sampled, peers, report)


def compare(goal: str, ours: float, peers: dict[str, float], report: Report) -> None:
    report.value(goal, ours)
    for peer, size in peers.items():
        report.value(f"  {peer}", size)
        report.goal(f"{goal} vs {peer}", ">=", 1.0, size / ours)


def errors(rows: list[Row], vocab_size: int, report: Report) -> None:
    """The promises of the codecs, kept on real distributions."""
    report.title("error against the float32 forward pass")
    k = 64
    exact, tail, _ = stacked(rows, k)
    decoded, log_tail = round_trip(rows, Codec(name="topk_fp16", vocab_size=vocab_size, k=k))
    worst = max(np.abs(decoded - exact).max(), np.abs(log_tail - np.log(tail)).max())
    report.goal(f"error/topk_fp16/k{k} largest, nat", "<=", 2e-3, float(worst))
    decoded, log_tail = round_trip(rows, Codec(name="topk_q8", vocab_size=vocab_size, k=k))
    kl, _ = kl_errors(rows, k, vocab_size, decoded, log_tail)
    report.value("KL of topk_q8, mean", float(kl.mean()))
    report.goal(f"error/topk_q8/k{k} largest KL, nat", "<=", 2e-3, float(kl.max()))


def distillkit(rows: list[Row], vocab_size: int, report: Report) -> None:
    """At equal k the bytes; at equal bytes the KL, over the whole vocabulary and over a partition.

    `partition`: the stored tokens and the rest as one bucket, blind to what was left out.
    `vocabulary`: the rest spread evenly over all other tokens. DistillKit stores no tail mass: it
    gets the exact one for free here, which is kinder than its own 1 - sum (also shown).
    """
    for setting in DISTILLKIT:
        k = setting.k
        disk = on_disk(distillkit_columns(rows, setting), rows)
        report.title(f"DistillKit, {setting.published_bytes} bytes/token, k={k}")
        published = {"DistillKit published": setting.published_bytes}
        compare(f"size/topk_q8/k{k}", our_size(rows, "topk_q8", vocab_size, k), published, report)
        report.value("DistillKit in zstd", disk)

        _, tail, _ = stacked(rows, k)
        stored = np.concatenate([distillkit_logprobs(row, setting) for row in rows])
        log_mass = np.logaddexp.reduce(stored, axis=1, keepdims=True)
        kind = stored - log_mass + np.log1p(-tail)[:, None]
        theirs = kl_errors(rows, k, vocab_size, kind, np.log(tail))
        as_is = np.log(np.maximum(1 - np.exp(log_mass[:, 0]), 1e-6))
        total = np.logaddexp(log_mass[:, 0], as_is)
        own_tail = kl_errors(rows, k, vocab_size, stored - total[:, None], as_is - total)
        for name, got in (("exact tail", theirs), ("its own tail", own_tail)):
            report.value(f"DistillKit's KL, partition, {name}", float(got[0].mean()))
            report.value(f"DistillKit's KL, vocabulary, {name}", float(got[1].mean()))

        for label, budget in {**published, "DistillKit in zstd": disk}.items():
            for codec in ("topk_q8", "topk_fp16"):
                k_ours = largest_k(rows, codec, vocab_size, budget)
                ours = kl_errors(
                    rows, k_ours, vocab_size,
                    *round_trip(rows, Codec(name=codec, vocab_size=vocab_size, k=k_ours)),
                )  # fmt: skip
                for i, measure in enumerate(("partition", "vocabulary")):
                    name = f"KL/{codec}/k{k_ours} {measure} vs {label} at {budget:.1f} bytes"
                    report.value(f"our KL, {measure}, {codec} k={k_ours}", float(ours[i].mean()))
                    ratio = theirs[i].mean() / ours[i].mean()
                    if codec == "topk_q8":
                        report.goal(name, ">=", 1.0, float(ratio), folds(theirs[i], ours[i]))


def speed(rows: list[Row], vocab_size: int, repeats: int, report: Report) -> None:
    """Microseconds a position, row by row; the codecs take turns."""
    report.title("microseconds/position, median (range)")
    cases = [(name, k) for k in (16, 64) for name in ("topk_fp16", "topk_q8")]
    taken: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, k in [*cases, ("sampled", DRAWS)]:
            codec = Codec(name=name, vocab_size=vocab_size, k=k)
            given = list(inputs(rows, codec))
            start = time.perf_counter()
            written = [codec.encode(ids, logprobs) for ids, logprobs in given]
            middle = time.perf_counter()
            for data, row in zip(written, rows, strict=True):
                codec.decode(data, len(row.token_ids))
            end = time.perf_counter()
            taken.setdefault(f"encode {name} {k}", []).append(middle - start)
            taken.setdefault(f"decode {name} {k}", []).append(end - middle)
    n = sum(len(row.token_ids) for row in rows)
    for name, seconds in taken.items():
        low, mid, high = (f(seconds) / n * 1e6 for f in (min, statistics.median, max))
        report.numbers["values"][f"us/position {name}"] = mid
        report.show(f"  {name:<44} {mid:8.2f} ({low:.2f}-{high:.2f})")


# The teacher


def texts(n: int) -> list[str]:
    """n texts of 1 to 11 sentences."""
    if WIKITEXT.exists():
        sentences = WIKITEXT.read_text().splitlines()
    else:
        with gzip.open(REQUESTS, "rt") as lines:
            sentences = [json.loads(line)["text"] for line in lines]
    lengths = np.random.default_rng(0).integers(1, 12, size=n)
    ends = np.cumsum(lengths)
    return [". ".join(sentences[a:b]) for a, b in zip(ends - lengths, ends, strict=True)]


def teacher_rows(path: Path, texts: list[str]) -> tuple[list[Row], list[str]]:
    """Rows of distributions, and each token's text."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    pieces = [tokenizer.decode([i]) for i in range(model.config.vocab_size)]
    torch.manual_seed(0)
    rows = []
    for text in texts:
        token_ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512)
        with torch.inference_mode():
            logits = model(**token_ids).logits[0]
        # Float32 log-probabilities, as any capture gives them; then exact sums over them.
        logprobs = torch.log_softmax(logits, dim=-1).double()
        values, ids = logprobs.topk(MOST, dim=-1)
        row = Row(
            token_ids=ids.int().numpy(),
            logprobs=values.numpy(),
            sum_p_log_p=(logprobs.exp() * logprobs).sum(dim=-1).numpy(),
            draws=torch.multinomial(logprobs.exp(), DRAWS, replacement=True).int().numpy(),
        )
        rows.append(row)
    return rows, pieces


# Formats


def inputs(rows: list[Row], codec: Codec) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    for row in rows:
        if codec.name == "sampled":
            yield row.draws, np.zeros(row.draws.shape, np.float32)
        else:
            logprobs = row.logprobs[:, : codec.k].astype(np.float32)
            yield np.ascontiguousarray(row.token_ids[:, : codec.k]), logprobs


def our_size(rows: list[Row], name: str, vocab_size: int, k: int) -> float:
    codec = Codec(name=name, vocab_size=vocab_size, k=k)
    return on_disk([pa.array([codec.encode(*given) for given in inputs(rows, codec)])], rows)


def largest_k(rows: list[Row], name: str, vocab_size: int, budget: float) -> int:
    """The most entries that fit; sizes rise with k."""
    low, high = 1, MOST
    while low < high:
        k = (low + high + 1) // 2
        low, high = (k, high) if our_size(rows, name, vocab_size, k) <= budget else (low, k - 1)
    return low


def structs(rows: list[Row], k: int, pieces: list[str]) -> pa.Array:
    ids = np.concatenate([row.token_ids[:, :k].ravel() for row in rows])
    values = np.concatenate([row.logprobs[:, :k].ravel() for row in rows])
    fields = {
        "token_id": pa.array(ids),
        "logprob": pa.array(values.astype(np.float32)),
        "rank": pa.array(np.tile(np.arange(1, k + 1, dtype=np.int32), len(ids) // k)),
        "decoded_token": pa.array(pieces).take(pa.array(ids)),
    }
    return nested(pa.StructArray.from_arrays(list(fields.values()), list(fields)), rows, k)


def lists(token_ids: list[np.ndarray], logprobs: list[np.ndarray]) -> list[pa.Array]:
    k = token_ids[0].shape[1]
    ids, values = np.concatenate(token_ids), np.concatenate(logprobs).astype(np.float32)
    return [nested(pa.array(column.ravel()), token_ids, k) for column in (ids, values)]


def nested(values: pa.Array, rows: list[Any], n_each: int) -> pa.Array:
    """list<list<value>>: n_each values a position, and the positions of each row."""
    lengths = [len(row.token_ids if isinstance(row, Row) else row) for row in rows]
    starts = np.arange(sum(lengths) + 1, dtype=np.int32) * n_each
    positions = pa.ListArray.from_arrays(starts, values)
    return pa.ListArray.from_arrays(np.cumsum([0, *lengths]).astype(np.int32), positions)


def on_disk(columns: list[pa.Array], rows: list[Row]) -> float:
    """Bytes a token of a Parquet file with these columns."""
    table = pa.table({f"column_{i}": column for i, column in enumerate(columns)})
    written = []
    for dictionary in (True, False):
        file = io.BytesIO()
        pq.write_table(
            table, file, compression="zstd", compression_level=3, write_statistics=False,
            use_dictionary=dictionary,
        )  # fmt: skip
        written.append(len(file.getvalue()))
    return min(written) / sum(len(row.token_ids) for row in rows)


# DistillKit's compression, written anew from its documentation and format: the largest `exact_k`
# logprobs as bfloat16, for the others a least-squares curve over their rank, ids packed in
# ceil(log2(vocabulary)) bits (16 for this teacher); two columns list<list<uint8>>.


def distillkit_logprobs(row: Row, setting: DistillKit) -> np.ndarray:
    """float64[positions, k]: what it decodes."""
    exact = bfloat16(row.logprobs[:, : setting.exact_k])
    design, coefficients = distillkit_fit(row, setting)
    return np.hstack([exact, coefficients.astype(np.float64) @ design.T])


def distillkit_fit(row: Row, setting: DistillKit) -> tuple[np.ndarray, np.ndarray]:
    rank = np.arange(setting.k - setting.exact_k, dtype=np.float64)
    design = np.stack([rank**power for power in setting.powers], axis=1)
    curve = row.logprobs[:, setting.exact_k : setting.k]
    return design, np.linalg.lstsq(design, curve.T, rcond=None)[0].T.astype(np.float32)


def distillkit_columns(rows: list[Row], setting: DistillKit) -> list[pa.Array]:
    logprobs, ids = [], []
    for row in rows:
        top = bfloat16(row.logprobs[:, : setting.exact_k]).astype(np.float32).view(np.uint32) >> 16
        coefficients = distillkit_fit(row, setting)[1]
        logprobs.append(
            np.hstack([np.ascontiguousarray(top.astype(np.uint16)).view(np.uint8),
                       np.ascontiguousarray(coefficients).view(np.uint8)])
        )  # fmt: skip
        ids.append(row.token_ids[:, : setting.k].astype(np.uint16).view(np.uint8))
    columns = [np.concatenate(part) for part in (logprobs, ids)]
    assert sum(column.shape[1] for column in columns) == setting.published_bytes
    return [nested(pa.array(column.ravel()), rows, column.shape[1]) for column in columns]


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to nearest, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


# Measures


def stacked(rows: list[Row], k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Exact logprobs of the first k entries, the tail's mass, and sum p log p, of all positions."""
    exact = np.concatenate([row.logprobs[:, :k] for row in rows])
    tail = -np.expm1(exact[:, 0]) - np.exp(exact[:, 1:]).sum(axis=1)
    return exact, tail.clip(1e-9), np.concatenate([row.sum_p_log_p for row in rows])


def round_trip(rows: list[Row], codec: Codec) -> tuple[np.ndarray, np.ndarray]:
    """float64 logprobs[positions, k] and log tail mass[positions], after writing and reading."""
    decoded: list[Distributions] = [
        codec.decode(codec.encode(ids, logprobs), len(ids)) for ids, logprobs in inputs(rows, codec)
    ]
    logprobs = np.concatenate([d.logprobs for d in decoded]).astype(np.float64)
    log_tail = np.concatenate([d.log_tail_mass for d in decoded]).astype(np.float64)
    return logprobs, log_tail.clip(np.log(1e-9))


def kl_errors(
    rows: list[Row], k: int, vocab_size: int, logprobs: np.ndarray, log_tail: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """KL(exact || decoded) a position: over the partition, and over the whole vocabulary."""
    exact, tail, sum_p_log_p = stacked(rows, k)
    total = np.logaddexp(np.logaddexp.reduce(logprobs, axis=1), log_tail)
    p = np.exp(exact)
    entries = (p * (exact - logprobs)).sum(axis=1) + total * (1 - tail)
    partition = entries + tail * (np.log(tail) - log_tail + total)
    tail_p_log_p = sum_p_log_p - (p * exact).sum(axis=1)
    spread = log_tail - total - np.log(vocab_size - k)
    return partition, entries + tail_p_log_p - tail * spread


def folds(theirs: np.ndarray, ours: np.ndarray) -> tuple[float, float]:
    """Smallest and largest ratio of means over five parts of the corpus."""
    pairs = zip(np.array_split(theirs, 5), np.array_split(ours, 5), strict=True)
    ratios = [float(a.mean() / b.mean()) for a, b in pairs]
    return min(ratios), max(ratios)


# The report


class Report:
    """Prints as it goes, keeps the numbers, and remembers the goals for the end."""

    def __init__(self) -> None:
        self.numbers: dict[str, Any] = {"values": {}, "goals": []}
        self._section = ""

    def show(self, line: str) -> None:
        print(line, flush=True)

    def machine(self) -> None:
        packages = ("journeyman", "numpy", "pyarrow", "torch", "transformers")
        versions = {name: metadata.version(name) for name in packages}
        self.numbers["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
        self.numbers["versions"] = {"python": platform.python_version(), **versions}
        self.show(f"{self.numbers['machine']}; {self.numbers['versions']}")

    def title(self, text: str) -> None:
        self._section = text
        self.show(f"\n{text}")

    def value(self, name: str, value: float) -> None:
        self.numbers["values"][f"{self._section}: {name.strip()}"] = value
        self.show(f"  {name:<60} {value:10.6g}")

    def goal(
        self,
        name: str,
        relation: str,
        target: float,
        got: float,
        spread: tuple[float, float] | None = None,
    ) -> None:
        reached = got >= target if relation == ">=" else got <= target
        self.numbers["goals"].append(
            {"name": name, "relation": relation, "target": target, "got": got,
             "range": spread, "ok": bool(reached)}
        )  # fmt: skip

    def close(self) -> int:
        """The goals, each on a line; the exit status."""
        self.show("")
        for goal in self.numbers["goals"]:
            spread = f" ({goal['range'][0]:.3g}-{goal['range'][1]:.3g})" if goal["range"] else ""
            self.show(
                f"goal  {goal['name']:<68} {goal['relation']} {goal['target']:<6g} "
                f"got {goal['got']:.4g}{spread}  {'ok' if goal['ok'] else 'SHORT'}"
            )
        return int(not all(goal["ok"] for goal in self.numbers["goals"]))


if __name__ == "__main__":
    sys.exit(main())
