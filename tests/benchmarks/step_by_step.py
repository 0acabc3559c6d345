"""Is the reasoning worth learning? GSM8K answers step by step, and answers alone.

A part of quality.py, as ``journeyman run jobs/recipes/rationales.yaml`` trains them: real runs on a
Ray of this machine, on one label dataset. Held-out figures are of the answers in both.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import sentences

from journeyman import recipe, steps
from journeyman.report import comparison

RECIPE = sentences.ROOT / "jobs" / "recipes" / "rationales.yaml"
HELD_OUT = 200
BOTH, ANSWERS = "answers and reasonings", "answers alone"
_WEIGHTS = {BOTH: 1.0, ANSWERS: 0.0}  # training.rationale_weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """nll: nats a token of the held-out answers; seconds: of training."""

    nll: float
    agreement: float
    exact: float
    seconds: float


def study(folder: Path, seeds: int, problems: int) -> dict[str, list[Answered]]:
    found: dict[str, list[Answered]] = {BOTH: [], ANSWERS: []}
    for seed in range(seeds):
        for name in found:
            got = _run(folder, name, seed, problems)
            found[name].append(got)
            print(
                f"  seed {seed}  {name:<22} -log P {got.nll:.4f}  agreement {got.agreement:.3f}  "
                f"{got.seconds:5.0f} s",
                flush=True,
            )
    return found


def _run(folder: Path, name: str, seed: int, problems: int) -> Answered:
    settings = (
        f"output={folder}",
        f"labels.destination={folder / 'labels'}",
        f"corpus.limits={{train: {problems}, calibrate: {HELD_OUT}}}",
        f"name={name.replace(' ', '-')}-{seed}",
        f"training.seed={seed}",
        f"training.rationale_weight={_WEIGHTS[name]}",
    )
    run = steps.Run(recipe.load(RECIPE, settings))
    for step in ("prepare", "label"):
        run.execute(step)
    started = time.monotonic()
    run.execute("train")
    student = comparison.read(run.directory)
    assert student.perplexity is not None and student.exact_match is not None
    return Answered(
        nll=math.log(student.perplexity),
        agreement=student.agreement,
        exact=student.exact_match,
        seconds=time.monotonic() - started,
    )


def table(found: dict[str, list[Answered]], problems: int) -> str:
    lines = [
        f"{problems} problems once, {HELD_OUT} held out, {len(found[BOTH])} seeds; median (range)",
        f"  {'':<24} {'-log P, nats a token':<26} {'agreement':<22} to the letter  seconds",
    ]
    for name, each in found.items():
        lines.append(
            f"  {name:<24} {middle([a.nll for a in each], '.3f'):<26} "
            f"{middle([a.agreement for a in each], '.3f'):<22} "
            f"{statistics.median(a.exact for a in each):13.3f}  "
            f"{statistics.median(a.seconds for a in each):7.0f}"
        )
    return "\n".join(lines)


def middle(values: list[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return f"{format(statistics.median(values), form)} ({low}-{high})"
