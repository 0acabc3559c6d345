"""What a student loses by learning from a sparse record in place of the teacher's whole output.

    .venv/bin/python tests/benchmarks/quality.py --quick     # one seed, few steps
    .venv/bin/python tests/benchmarks/quality.py             # an hour on two cores

A pruned student (ten of SmolLM2-135M's thirty layers) learns Wikipedia sentences for equally many
steps over the same batches, by: cross-entropy on the text; the teacher's 64 and 512 largest
probabilities with the rest as one more outcome, and 64 renormalised; 50 true draws; and the
teacher's whole output, made anew in each step, as the ceiling. Measured on held-out sentences:
KL(teacher ‖ student) over the whole vocabulary and perplexity, median and range over seeds. Goals
are on the share of the ceiling's gain in KL over cross-entropy that a record keeps: of the 512
largest probabilities and of the draws, which both take less than a twentieth of the bytes; the
default record's share stands beside them. Then step_by_step.py: GSM8K answers, learned with and
without the reasonings behind them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import sentences
import step_by_step
import torch
from step_by_step import middle

from journeyman import recipe
from journeyman.labels.codec import Codec
from journeyman.recipe import Training
from journeyman.student import batches, token_dataset, worker
from journeyman.student.causal_learner import Causal
from journeyman.student.checkpoints import Checkpoints
from journeyman.student.lesson import Task, load, prepare
from journeyman.student.place import Place
from journeyman.student.plan import Plan
from journeyman.student.token_dataset import TokenBatch

RECIPE = sentences.ROOT / "jobs" / "recipes" / "logits.yaml"
BATCH = 16
HELD_OUT = 200
KEPT = 0.97  # of the ceiling's gain
CE, TOP, WIDE, RENORMALISED, SAMPLED, FULL = (
    "cross-entropy", "top-64, tail bucket", "top-512, tail bucket", "top-64, renormalised",
    "50 draws", "full logits",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to learn: the record it reads, and what it changes in the training."""

    name: str
    record: str
    training: dict[str, Any]


METHODS = (
    Method(name=CE, record="top", training={"cross_entropy": 1.0}),
    Method(name=TOP, record="top", training={}),
    Method(name=WIDE, record="wide", training={}),
    Method(name=RENORMALISED, record="top", training={"tail": "renormalised"}),
    Method(name=SAMPLED, record="sampled", training={}),
    Method(name=FULL, record="top", training={}),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    kl: float
    perplexity: float
    seconds: float


class FullLogits(Causal):
    """Learns from the teacher's whole output, made anew for each batch."""

    teacher: Any

    def loss(self, parallel: Any, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        arguments = self._arguments(batch)
        hidden, weight, _ = parallel(**arguments)
        logits = hidden @ weight.T
        with torch.no_grad():
            whole = self.teacher(input_ids=arguments["input_ids"]).logits
            target = whole.flatten(0, 1)[arguments["at"]].log_softmax(-1)
        each = torch.nn.functional.kl_div(
            logits.log_softmax(-1), target, reduction="none", log_target=True
        ).sum(-1)
        of_rows = torch.zeros(batch.n_rows)
        return each.sum(), of_rows.index_add_(0, torch.from_numpy(batch.token_rows), each.detach())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed and 60 steps, not 3 and 180")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there too")
    parser.add_argument("--seeds", type=int, metavar="N")
    parser.add_argument("--steps", type=int, metavar="N")
    parser.add_argument("--problems", type=int, metavar="N", help="of GSM8K; 0 leaves it out")
    options = parser.parse_args()
    started = time.monotonic()
    seeds = options.seeds or (1 if options.quick else 3)
    steps = options.steps or (60 if options.quick else 180)
    problems = (32 if options.quick else 96) if options.problems is None else options.problems
    os.chdir(sentences.ROOT)
    packages = ("journeyman", "torch", "transformers", "numpy")
    print(f"{platform.machine()}, {os.cpu_count()} cores;",
          {name: metadata.version(name) for name in packages}, flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        study = Study(Path(folder), steps)
        outcomes: dict[str, list[Outcome]] = {method.name: [] for method in METHODS}
        for seed in range(seeds):
            for method in METHODS:
                outcome = study.run(method, seed)
                outcomes[method.name].append(outcome)
                print(
                    f"  seed {seed}  {method.name:<22} KL {outcome.kl:.4f}  perplexity "
                    f"{outcome.perplexity:8.1f}  {outcome.seconds:5.0f} s",
                    flush=True,
                )
        answered = step_by_step.study(Path(folder), seeds, problems) if problems else {}
    seconds = time.monotonic() - started
    if options.json:
        numbers = {
            "steps": steps,
            "seconds": seconds,
            "bytes_per_token": study.bytes_per_token,
            "gain_kept": kept_gains(outcomes),
            "outcomes": {name: [dataclasses.asdict(one) for one in of]
                         for name, of in (outcomes | answered).items()},
        }  # fmt: skip
        options.json.write_text(json.dumps(numbers, indent=1))
    if answered:
        print(f"\n{step_by_step.table(answered, problems)}")
    return close(outcomes, steps, study.bytes_per_token, seconds)


class Study:
    """The teacher, its records, and the sentences held out."""

    def __init__(self, folder: Path, steps: int) -> None:
        self._folder = folder
        self._path, self._teacher, tokenizer = sentences.teacher()
        texts = sentences.sentences(tokenizer, steps * BATCH + HELD_OUT)
        self._held_out = texts[:HELD_OUT]
        vocabulary = self._teacher.config.vocab_size
        codecs = {
            "top": Codec(name="topk_fp16", vocab_size=vocabulary, k=64),
            "wide": Codec(name="topk_fp16", vocab_size=vocabulary, k=512),
            "sampled": Codec(name="sampled", vocab_size=vocabulary, k=50),
        }
        started = time.monotonic()
        labeled = sentences.labeled(self._teacher, texts, list(codecs.values()))
        self.bytes_per_token = {FULL: 2.0 * vocabulary}
        for i, (name, codec) in enumerate(codecs.items()):
            rows = [sentences.token_row(n, text, payloads[i])
                    for n, (text, payloads) in enumerate(labeled)]  # fmt: skip
            token_dataset.write(folder / name / "calibrate", rows[:HELD_OUT], codec)
            token_dataset.write(folder / name / "train", rows[HELD_OUT:], codec)
            n_tokens = sum(row.n_encoded for row in rows)
            size = sum(len(row.payload or b"") for row in rows) / n_tokens
            self.bytes_per_token[{"top": TOP, "wide": WIDE, "sampled": SAMPLED}[name]] = size
        print(f"{len(texts):,} sentences labeled in {time.monotonic() - started:.0f} s", flush=True)

    def run(self, method: Method, seed: int) -> Outcome:
        """Train from the same start, over the seed's own order, and measure."""
        base = recipe.load(RECIPE)
        training = Training.model_validate(
            base.training.model_dump(mode="json")
            | {"workers": 1, "epochs": 1, "batch_size": BATCH, "seed": seed}
            | method.training
        )
        task = Task(
            training=training,
            checkpoints=Checkpoints(self._folder, "none"),
            load=partial(
                FullLogits if method.name == FULL else Causal,
                model_dir=self._path,
                student=base.learner(),
                training=training,
                rows_dir=self._folder / method.record,
            ),
        )
        place = Place(rank=0, world_size=1, device=torch.device("cpu"))
        learner: Any = load(task, None, place.device)
        learner.teacher = self._teacher
        lesson = prepare(task, None, learner, place)
        order = batches.epoch_batches(learner.lengths, BATCH, seed=seed, epoch=0)
        shares = [worker.share(batch, training, place) for batch in order]
        loaded = learner.batches(part for share in shares for part in share.parts)
        plan = Plan.of(training, lesson.state.total_steps)
        steps = worker.Steps(task, lesson, place, plan, None)
        started = time.monotonic()
        for step, share in enumerate(shares):
            steps.take(step, share, loaded)
        seconds = time.monotonic() - started
        kl, perplexity = self._measure(learner.module.model.eval())
        return Outcome(kl=kl, perplexity=perplexity, seconds=seconds)

    def _measure(self, student: Any) -> tuple[float, float]:
        """KL over the whole vocabulary, nats a token, and perplexity, on the held-out sentences."""
        kl = nll = 0.0
        n_tokens = 0
        both = (sentences.logprobs(m, self._held_out) for m in (self._teacher, student))
        pairs = zip(*both, self._held_out, strict=True)
        for teacher, own, text in pairs:
            kl += (teacher.exp() * (teacher - own)).sum().item()
            targets = torch.from_numpy(text[1:].astype(np.int64))
            nll -= own.gather(1, targets[:, None]).sum().item()
            n_tokens += len(targets)
        return kl / n_tokens, float(np.exp(nll / n_tokens))


def kept_gains(outcomes: dict[str, list[Outcome]]) -> dict[str, list[float]]:
    """Of each method and seed, the share of the ceiling's gain in KL over cross-entropy."""
    return {
        name: [
            (ce.kl - one.kl) / (ce.kl - full.kl)
            for ce, one, full in zip(outcomes[CE], found, outcomes[FULL], strict=True)
        ]
        for name, found in outcomes.items()
    }


def close(
    outcomes: dict[str, list[Outcome]], steps: int, sizes: dict[str, float], seconds: float
) -> int:
    """The table, the goals and what all of it took; the exit status."""
    print(f"\n{steps} steps of {BATCH} sentences, {len(outcomes[CE])} seeds; median (range)")
    print(f"  {'':<22} {'KL to the teacher':<26} {'perplexity':<24} gain kept   bytes/token")
    kept = kept_gains(outcomes)
    for name, found in outcomes.items():
        size = sizes.get(TOP if name == RENORMALISED else name)
        print(
            f"  {name:<22} {middle([o.kl for o in found], '.4f'):<26} "
            f"{middle([o.perplexity for o in found], ',.1f'):<24} "
            f"{statistics.median(kept[name]):9.3f}   {'' if size is None else f'{size:,.0f}'}"
        )
    print()
    met = True
    for name in (WIDE, SAMPLED):
        got, share = kept[name], sizes[name] / sizes[FULL]
        ok = statistics.median(got) >= KEPT
        met &= ok and share < 0.05
        print(f"goal  quality/{name} of full logits' gain      >= {KEPT:.2f}   got "
              f"{middle(got, '.3f')}   {'ok' if ok else 'SHORT'}")  # fmt: skip
        print(f"goal  bytes/{name} of full logits' bytes     <= 0.05   got {share:.4f}   "
              f"{'ok' if share <= 0.05 else 'SHORT'}")  # fmt: skip
    print(
        f"info  quality/{TOP} of full logits' gain   got "
        f"{middle(kept[TOP], '.3f')}   the default, {sizes[TOP] / sizes[FULL]:.4f} of the bytes"
    )
    print(f"\n{seconds:,.0f} s in all")
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
