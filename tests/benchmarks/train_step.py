"""Training speed and memory beside a plain loop, dense distillation and TRL: same model, same rows.

    .venv/bin/python tests/benchmarks/train_step.py --quick     # six minutes on two cores
    .venv/bin/pip install --no-deps trl && .venv/bin/python tests/benchmarks/train_step.py

The student is ten layers of SmolLM2-135M (64M parameters), the teacher all thirty; a step is 16
texts of 128 tokens, float32, AdamW. Each system is a process of its own, and they take turns on the
same rows. Journeyman's step starts at encoded labels (top-64) on disk. Memory is the peak of the
process, its imports included. At the end the plain loop and Journeyman with one worker and with
two of one core each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import sentences
import torch

from journeyman import recipe
from journeyman.labels.codec import Codec
from journeyman.recipe import Training
from journeyman.student import causal, token_dataset, worker
from journeyman.student.causal_learner import Causal
from journeyman.student.checkpoints import Checkpoints
from journeyman.student.lesson import Task, load, prepare
from journeyman.student.place import Place
from journeyman.student.plan import Plan

RECIPE = sentences.ROOT / "jobs" / "recipes" / "logits.yaml"
ROWS, LENGTH = 16, 128  # of a step
TOKENS = ROWS * LENGTH
RATE = 1e-4
_TIMEOUT_S = 300.0


class PlainLoop:
    """Cross-entropy on the text, as a PyTorch user writes it, in DistributedDataParallel."""

    name = "plain cross-entropy"

    def __init__(self, folder: Path, rank: int = 0, world_size: int = 1) -> None:
        self._texts = torch.from_numpy(np.load(folder / "texts.npy").astype(np.int64))
        self._rows = np.arange(ROWS)[rank::world_size]
        base = recipe.load(RECIPE)
        model = causal.build(Path((folder / "model").read_text()), base.learner(), seed=0)
        self._model = self._parallel(model, folder, rank, world_size)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=RATE, fused=True)

    def _parallel(self, model: Any, folder: Path, rank: int, world_size: int) -> Any:
        meet(folder, self.name, rank, world_size)
        return torch.nn.parallel.DistributedDataParallel(model)

    def step(self, number: int) -> None:
        ids = self._texts[number * ROWS + self._rows]
        self._optimizer.zero_grad()
        self._loss(ids).backward()
        self._optimizer.step()

    def _loss(self, ids: torch.Tensor) -> torch.Tensor:
        return self._model(input_ids=ids, labels=ids).loss


class DenseLoop(PlainLoop):
    """KL from the teacher's whole output, made in each step."""

    name = "dense distillation"

    def __init__(self, folder: Path, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(folder, rank, world_size)
        self._teacher = causal.load(Path((folder / "model").read_text())).eval()

    def _loss(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = self._teacher(input_ids=ids).logits[:, :-1].log_softmax(-1)
        own = self._model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        each = torch.nn.functional.kl_div(own, target, reduction="none", log_target=True)
        return each.sum(-1).mean()


class Trl(PlainLoop):
    """TRL's GKDTrainer on given texts (lmbda 0), forward KL (beta 0)."""

    name = "TRL GKDTrainer"

    def __init__(self, folder: Path, *_: int) -> None:
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        super().__init__(folder)
        path = Path((folder / "model").read_text())
        turn = {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        }
        self._trainer = GKDTrainer(
            model=self._model,
            teacher_model=causal.load(path).eval(),
            args=GKDConfig(
                output_dir=str(folder / "trl"), lmbda=0.0, beta=0.0, temperature=1.0, use_cpu=True,
                learning_rate=RATE, per_device_train_batch_size=ROWS, report_to=[], bf16=False,
                gradient_checkpointing=False, optim="adamw_torch_fused", save_strategy="no",
            ),
            train_dataset=Dataset.from_list([turn] * ROWS),
            processing_class=AutoTokenizer.from_pretrained(path),
        )  # fmt: skip
        self._trainer.create_optimizer()
        self._trainer.current_gradient_accumulation_steps = 1  # train() would set it

    def _parallel(self, model: Any, folder: Path, rank: int, world_size: int) -> Any:
        return model

    def step(self, number: int) -> None:
        ids = self._texts[number * ROWS : (number + 1) * ROWS]
        batch = {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids,
            "prompts": ids[:, :1], "prompt_attention_mask": torch.ones_like(ids[:, :1]),
        }  # fmt: skip
        self._trainer.optimizer.zero_grad()
        self._trainer.training_step(self._trainer.model, batch)
        self._trainer.optimizer.step()


class Journeyman:
    """A worker of ours, from encoded labels to the optimizer's step."""

    name = "journeyman"
    training: dict[str, Any] = {}  # noqa: RUF012 - read only

    def __init__(self, folder: Path, rank: int = 0, world_size: int = 1) -> None:
        if world_size > 1:
            meet(folder, self.name, rank, world_size)
        self._place = Place(rank=rank, world_size=world_size, device=torch.device("cpu"))
        base = recipe.load(RECIPE)
        settings = {"workers": 1, "epochs": 1, "batch_size": ROWS, "learning_rate": RATE}
        training = Training.model_validate(
            base.training.model_dump(mode="json") | settings | self.training
        )
        self._task = Task(
            training=training,
            checkpoints=Checkpoints(folder, "none"),
            load=partial(
                Causal,
                model_dir=Path((folder / "model").read_text()),
                student=base.learner(),
                training=training,
                rows_dir=folder / "rows",
            ),
        )
        learner = load(self._task, None, torch.device("cpu"))
        self._lesson = prepare(self._task, None, learner, self._place)
        plan = Plan.of(training, self._lesson.state.total_steps)
        self._steps = worker.Steps(self._task, self._lesson, self._place, plan, None)

    def step(self, number: int) -> None:
        batch = np.arange(number * ROWS, (number + 1) * ROWS)
        share = worker.share(batch, self._task.training, self._place)
        self._steps.take(number, share, self._lesson.learner.batches(iter(share.parts)))


class JourneymanText(Journeyman):
    """The same with cross-entropy only."""

    name = "journeyman, cross-entropy"
    training = {"cross_entropy": 1.0}  # noqa: RUF012


def meet(folder: Path, name: str, rank: int, world_size: int) -> None:
    url = f"file://{folder}/meet-{name.replace(' ', '-')}-{world_size}"
    torch.distributed.init_process_group("gloo", init_method=url, rank=rank, world_size=world_size)


SYSTEMS: dict[str, Any] = {
    s.name: s for s in (PlainLoop, DenseLoop, Trl, Journeyman, JourneymanText)
}


class Process:
    """A system in a process of its own."""

    def __init__(
        self, name: str, folder: Path, threads: int, rank: int = 0, world: int = 1
    ) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (name, folder, theirs, threads, rank, world)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def ready(self) -> None:
        """Raises RuntimeError with the reason if it did not start."""
        self.answer()

    def ask(self, number: int) -> None:
        self._pipe.send(number)

    def answer(self) -> tuple[float, float]:
        """Seconds of the step, and the process's peak memory so far, GiB."""
        if not self._pipe.poll(_TIMEOUT_S):
            raise RuntimeError(f"{self.name}: no answer in {_TIMEOUT_S:.0f} s")
        value = self._pipe.recv()
        if isinstance(value, str):
            raise RuntimeError(f"{self.name}: {value}")
        return value

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(10)
        self._process.kill()


def _serve(name: str, folder: Path, pipe: Connection, threads: int, rank: int, world: int) -> None:
    torch.set_num_threads(threads)
    try:
        system = SYSTEMS[name](folder, rank, world)
        pipe.send((0.0, 0.0))
        while (number := pipe.recv()) is not None:
            started = time.perf_counter()
            system.step(number)
            seconds = time.perf_counter() - started
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            pipe.send((seconds, peak))
    except BaseException:
        pipe.send(traceback.format_exc()[-1500:])


@contextlib.contextmanager
def started(
    names: Sequence[str], folder: Path, threads: int, world: int = 1
) -> Iterator[list[Process]]:
    """The systems that start; the others are named with their error."""
    running: list[Process] = []
    try:
        for name in names:
            ranks = [Process(name, folder, threads, rank, world) for rank in range(world)]
            running += ranks
            try:
                for process in ranks:
                    process.ready()
            except RuntimeError as error:
                print(f"\n{error}\n", flush=True)
                running = [p for p in running if p not in ranks]
        yield running
    finally:
        for process in running:
            process.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three steps of each system, not ten")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there too")
    options = parser.parse_args()
    rounds = 1 + (3 if options.quick else 10)
    os.chdir(sentences.ROOT)
    packages = ("journeyman", "torch", "transformers", "numpy")
    print(f"{platform.machine()}, {os.cpu_count()} cores;",
          {name: metadata.version(name) for name in packages}, flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, rounds)
        with started(list(SYSTEMS), folder, threads=os.cpu_count() or 1) as systems:
            seconds, peaks = compare(systems, rounds)
        scaling = {
            name: {world: scaled(name, folder, world, rounds) for world in (1, 2)}
            for name in (PlainLoop.name, Journeyman.name)
        }
    if options.json:
        numbers = {"seconds": seconds, "peak_gib": peaks, "workers": scaling}
        options.json.write_text(json.dumps(numbers, indent=1))
    return close(seconds, peaks, scaling)


def write_rows(folder: Path, rounds: int) -> None:
    path, model, tokenizer = sentences.teacher()
    texts = sentences.blocks(tokenizer, rounds * ROWS, LENGTH)
    codec = Codec(name="topk_fp16", vocab_size=model.config.vocab_size, k=64)
    rows = [
        sentences.token_row(i, text, payloads[0])
        for i, (text, payloads) in enumerate(sentences.labeled(model, texts, [codec]))
    ]
    for split in ("train", "calibrate"):
        token_dataset.write(folder / "rows" / split, rows, codec)
    np.save(folder / "texts.npy", np.stack(texts))
    (folder / "model").write_text(str(path))


def compare(systems: list[Process], rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each step and peak GiB, by system; the first step warms up and is left out."""
    seconds: dict[str, list[float]] = {s.name: [] for s in systems}
    peaks: dict[str, float] = {}
    for number in range(rounds):
        turn = number % len(systems)
        for system in systems[turn:] + systems[:turn]:
            system.ask(number)
            took, peaks[system.name] = system.answer()
            seconds[system.name].append(took)
        print(f"  round {number + 1} of {rounds} of all systems in turn", flush=True)
    return {name: took[1:] for name, took in seconds.items()}, peaks


def scaled(name: str, folder: Path, world: int, rounds: int) -> list[float]:
    """Seconds of a step with so many workers of one core each."""
    (folder / f"meet-{name.replace(' ', '-')}-{world}").unlink(missing_ok=True)
    with started([name], folder, threads=1, world=world) as workers:
        found = []
        for number in range(rounds):
            for one in workers:
                one.ask(number)
            found.append(max(one.answer()[0] for one in workers))
        print(f"  {name}, {world} of one core each: {rounds} steps taken", flush=True)
    return found[1:]


def close(
    seconds: dict[str, list[float]],
    peaks: dict[str, float],
    scaling: dict[str, dict[int, list[float]]],
) -> int:
    print(f"\na step of {ROWS} texts of {LENGTH} tokens; tokens/s, median (range), and peak memory")
    for name, took in seconds.items():
        print(
            f"  {name:<26} {middle([TOKENS / s for s in took], ',.0f'):<22} {peaks[name]:.2f} GiB"
        )
    for name, took in scaling.items():
        one, two = (statistics.median(took[world]) for world in (1, 2))
        print(f"  {name}: {TOKENS / one:,.0f} with one core, {TOKENS / two:,.0f} with two workers "
              f"of a core each, {one / two:.2f} times one")  # fmt: skip
    print()
    goals = [("step/cross-entropy vs plain loop", JourneymanText.name, PlainLoop.name, 0.97)]
    if Trl.name in seconds:
        goals.append(("step/distillation vs TRL", Journeyman.name, Trl.name, 1.0))
    met = Trl.name in seconds
    for goal, ours, theirs, target in goals:
        ratios = [b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
        met &= say(goal, ">=", target, ratios)
    if Trl.name in seconds:
        ratio = peaks[Journeyman.name] / peaks[Trl.name]
        met &= say("memory/distillation vs TRL", "<=", 0.5, [ratio])
    return int(not met)


def say(goal: str, relation: str, target: float, ratios: list[float]) -> bool:
    got = statistics.median(ratios)
    ok = got >= target if relation == ">=" else got <= target
    print(f"goal  {goal:<34} {relation} {target:.2f}   got {middle(ratios, '.2f')}   "
          f"{'ok' if ok else 'SHORT'}")  # fmt: skip
    return ok


def middle(values: list[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return f"{format(statistics.median(values), form)} ({low}-{high})"


if __name__ == "__main__":
    sys.exit(main())
