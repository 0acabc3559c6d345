"""Whether the promise is kept, and how much the student may answer: Journeyman and published rules.

    .venv/bin/python tests/benchmarks/certificate.py --quick
    .venv/bin/python tests/benchmarks/certificate.py                     # 1,000 resplits, minutes
    .venv/bin/python tests/benchmarks/certificate.py --run runs/routing     # on your own run

Pools are 800 rows that the student of a demo run with 400 labels did not learn from
(tests/benchmarks/demo_scores.npz, written by --run RUN --write FILE), and synthetic ones: a good
student, one that is far too sure of itself, and one whose confidence says nothing, with a risk just
above the target. Each resplit draws calibrate and certify rows from the whole pool, with
replacement, and the pool is the truth: half-and-half resplits would inflate the broken shares
(the two halves of a pool are not independent). A promise is broken where the true risk of the
chosen threshold is above the target. A rule keeps a promise if on every pool it is broken in at
most delta of the resplits, and their sampling error. Its coverage is the mean share of the pool
that the student answers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import get_args

import numpy as np
from certificate_rules import AGAINST_GOLD, RULES, Draw, Pool, Promise, oracle
from scipy.special import log_softmax
from scipy.stats import binom

DEMO_SCORES = Path(__file__).with_name("demo_scores.npz")
DELTA = 0.1
N_CALIBRATE, N_CERTIFY = 200, 500
N_POOL = 20_000
# Targets within reach and not trivial, for the demo, good, overconfident and uninformative pools.
ALPHAS: dict[Promise, tuple[float, float, float, float]] = {
    "system_agreement": (0.1, 0.05, 0.05, 0.1),
    "selective_agreement": (0.1, 0.05, 0.1, 0.1),
    "accuracy": (0.02, 0.02, 0.05, 0.1),
}
CHANCE = 0.01  # that a rule which breaks its promise in just delta of resplits is called broken
OURS = "journeyman"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="50 resplits in place of 1,000")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there too")
    parser.add_argument("--resplits", type=int, metavar="N")
    parser.add_argument("--run", type=Path, metavar="RUN", help="a run's folder, for the demo's")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="write the run's scores, and end"
    )
    options = parser.parse_args()
    n_resplits = options.resplits or (50 if options.quick else 1000)
    demo = run_pool(options.run) if options.run else stored_pool(DEMO_SCORES)
    if options.write:
        np.savez_compressed(
            options.write, logits=demo.logits, logprobs=demo.logprobs.astype(np.float32),
            gold=demo.gold.astype(np.int8),
        )  # fmt: skip
        return 0
    print(f"{platform.machine()}, {os.cpu_count()} cores;",
          {name: metadata.version(name) for name in ("journeyman", "numpy", "scipy")})  # fmt: skip
    pools = (demo, good_pool(), overconfident_pool(), uninformative_pool())
    limit = binom.ppf(1 - CHANCE / len(pools), n_resplits, DELTA) / n_resplits
    print(f"{n_resplits:,} resplits of {N_CALIBRATE} calibrate and {N_CERTIFY} certify rows; delta "
          f"{DELTA:g}, broken in more than {limit:.3f} is called broken", flush=True)  # fmt: skip
    numbers, met = {}, True
    for promise in get_args(Promise):
        started = time.monotonic()
        alphas = dict(zip((pool.name for pool in pools), ALPHAS[promise], strict=True))
        outcomes = {p.name: resplit(p, promise, alphas[p.name], n_resplits) for p in pools}
        numbers[promise] = outcomes
        show(promise, outcomes, alphas, limit, time.monotonic() - started)
        met &= goals(promise, outcomes, limit)
    if options.json:
        options.json.write_text(json.dumps({"resplits": n_resplits, "limit": limit,
                                            "broken and coverage": numbers}, indent=1))  # fmt: skip
    return int(not met)


def resplit(
    pool: Pool, promise: Promise, alpha: float, n_resplits: int
) -> dict[str, tuple[float, float]]:
    """Rule to the share of resplits that break the promise, and to its mean coverage."""
    rules = RULES | (AGAINST_GOLD if promise == "accuracy" else {})
    rng = np.random.default_rng(0)
    found: dict[str, list[tuple[bool, float]]] = {name: [] for name in rules}
    for _ in range(n_resplits):
        draw = Draw(
            pool=pool,
            calibrate=rng.integers(0, len(pool.gold), N_CALIBRATE),
            certify=rng.integers(0, len(pool.gold), N_CERTIFY),
            promise=promise,
            alpha=alpha,
            delta=DELTA,
        )
        for name, rule in rules.items():  # interleaved: each on the very same rows
            answered = rule(draw)
            found[name].append((pool.risk(promise, answered) > alpha, float(answered.mean())))
    best = oracle(draw)
    means = {name: tuple(np.mean(of, axis=0).tolist()) for name, of in found.items()}
    return means | {"oracle": (0.0, float(best.mean()))}


def show(
    promise: str,
    outcomes: dict[str, dict[str, tuple[float, float]]],
    alphas: dict[str, float],
    limit: float,
    seconds: float,
) -> None:
    heads = [f"{name} {alpha:g}" for name, alpha in alphas.items()]
    print(f"\n{promise}: broken share / coverage ({seconds:.0f} s)")
    print(f"  {'':<22} " + " ".join(f"{head:>20}" for head in heads) + "   keeps it")
    for name in next(iter(outcomes.values())):
        cells = [of[name] for of in outcomes.values()]
        kept = "" if name == "oracle" else "yes" if max(b for b, _ in cells) <= limit else "no"
        print(f"  {name:<22} " + " ".join(f"{b:>13.3f} / {c:.2f}" for b, c in cells) + f"   {kept}")


def goals(promise: str, outcomes: dict[str, dict[str, tuple[float, float]]], limit: float) -> bool:
    """Print the promise's goals; whether they are met."""
    names = [name for name in next(iter(outcomes.values())) if name != "oracle"]
    worst = {name: max(of[name][0] for of in outcomes.values()) for name in names}
    coverage = {name: float(np.mean([of[name][1] for of in outcomes.values()])) for name in names}
    keepers = [name for name in names if worst[name] <= limit and name != OURS]
    kept = worst[OURS] <= limit
    print(f"goal  certificate/{promise} broken, worst pool   <= {limit:.3f}   got {worst[OURS]:.3f}"
          f"   {'ok' if kept else 'SHORT'}")  # fmt: skip
    if not keepers:
        print(f"goal  certificate/{promise} coverage: no other rule keeps this promise   ok")
        return kept
    best = max(keepers, key=coverage.__getitem__)
    lead = coverage[OURS] - coverage[best]
    print(f"goal  certificate/{promise} coverage over {best}, the best that keeps it   >= 0.000   "
          f"got {lead:+.3f} ({coverage[OURS]:.3f} against {coverage[best]:.3f})   "
          f"{'ok' if lead >= 0 else 'SHORT'}")  # fmt: skip
    return kept and lead >= 0


def stored_pool(file: Path) -> Pool:
    with np.load(file) as arrays:
        return Pool("demo", arrays["logits"], arrays["logprobs"].astype(np.float64),
                    arrays["gold"].astype(np.int64))  # fmt: skip


def run_pool(folder: Path) -> Pool:
    """The rows of a finished run that its student did not learn from, as it and its teacher see
    them; those without gold are left out."""
    from journeyman.labels import dataset
    from journeyman.student.models import Classifier

    splits = ("calibrate", "certify", "test")
    rows = dataset.read_classes(folder / "labels", folder / "corpus", splits)
    rows = rows.take(np.flatnonzero(rows.gold >= 0))
    logits = Classifier.load(folder / "student").logits(rows.texts)
    return Pool(folder.name, logits, rows.logprobs, rows.gold)


def good_pool() -> Pool:
    """A student that is nearly as good as its teacher, and knows when it is not."""
    return _noisy_pool("good", student_skill=3.1, teacher_skill=3.6, sharpness=1.0)


def overconfident_pool() -> Pool:
    """A weaker student that is four times as sure as it should be."""
    return _noisy_pool("overconfident", student_skill=2.2, teacher_skill=3.2, sharpness=4.0)


def _noisy_pool(name: str, student_skill: float, teacher_skill: float, sharpness: float) -> Pool:
    """Both models see the right class through noise, some of which they share."""
    rng = np.random.default_rng(1)
    gold = rng.integers(0, 4, N_POOL)
    shared = rng.normal(size=(N_POOL, 4))

    def logits(skill: float) -> np.ndarray:
        return skill * np.eye(4)[gold] + shared + 0.6 * rng.normal(size=(N_POOL, 4))

    student = (sharpness * logits(student_skill)).astype(np.float32)
    return Pool(name, student, log_softmax(logits(teacher_skill), axis=1), gold)


def uninformative_pool() -> Pool:
    """Confidence says nothing, and the risk of answering everything is a little above a tenth."""
    rng = np.random.default_rng(2)
    student = rng.normal(0, 2, (N_POOL, 4)).astype(np.float32)
    teacher = student.argmax(axis=1)
    differs = rng.permutation(N_POOL) < 0.102 * N_POOL
    teacher[differs] = (teacher[differs] + rng.integers(1, 4, differs.sum())) % 4
    return Pool("uninformative", student, log_softmax(5 * np.eye(4)[teacher], axis=1), teacher)


if __name__ == "__main__":
    sys.exit(main())
