"""The exported student: a Hugging Face folder with a model card and our own record beside it.

Takes a checkpoint's model folder as it is; knows nothing of torch.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

import journeyman
from journeyman.files import disk_errors, replaced_directory, write_bytes, write_json
from journeyman.models import Model
from journeyman.recipe import Generate, Logits, Recipe, Student
from journeyman.student.checkpoints import Evaluation, State
from journeyman.student.learner import AGREES_WITH, LOSS

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where an exported student comes from."""

    recipe: Recipe
    parent: Model
    inputs: str  # digest of all that went into the training
    labels_digest: str  # of the label dataset
    world_size: int
    hardware: Mapping[str, Any]  # as ``cluster.hardware`` has it


def write(
    out_dir: Path, model_dir: Path, curve: Path, best: Evaluation, state: State, origin: Provenance
) -> None:
    """Replace ``out_dir`` by the best checkpoint's model, whole or not at all."""
    with replaced_directory(out_dir) as fresh:
        shutil.copytree(
            model_dir,
            fresh,
            dirs_exist_ok=True,
            copy_function=partial(_copy, where=out_dir.parent),
        )
        shutil.copyfile(curve, fresh / "training.jsonl")
        write_json(fresh / "journeyman.json", _record(best, state, origin))
        write_card(fresh, best, state, origin)


def write_card(
    folder: Path, best: Evaluation, state: State, origin: Provenance, rounds: Sequence[State] = ()
) -> None:
    """rounds: on-policy ones, behind the training that ``state`` is of; best is of the last one."""
    write_bytes(folder / "README.md", _card(best, state, origin, rounds).encode())


def state_of(record: Mapping[str, Any]) -> State:
    """A training's end, from the student's own record (``journeyman.json``)."""
    return State(
        step=record["steps"],
        total_steps=record["planned_steps"],
        seconds=record["seconds"],
        n_rows=record["rows"],
        evaluations=(),
        stopped_early=record["stopped_early"],
    )


def _copy(source: str, target: str, where: Path) -> None:
    """copytree would gather OSErrors into one of its own, without their numbers."""
    with disk_errors(where):
        shutil.copy2(source, target)


def _record(best: Evaluation, state: State, origin: Provenance) -> dict[str, object]:
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "student",
        "journeyman": journeyman.__version__,
        "inputs": origin.inputs,
        "recipe": origin.recipe.hash,
        "labels": origin.labels_digest,
        "parent": origin.parent.identity,
        "max_length": origin.recipe.learner().max_length,
        "reads": origin.recipe.learner().model_dump(include={"text", "text_pair"}),
        "best": dataclasses.asdict(best),
        "evaluations": [dataclasses.asdict(e) for e in state.evaluations],
        "steps": state.step,
        "planned_steps": state.total_steps,
        "stopped_early": state.stopped_early,
        "rows": state.n_rows,
        "seconds": round(state.seconds, 3),
        "world_size": origin.world_size,
        "hardware": dict(origin.hardware),
    }


def _card(best: Evaluation, state: State, origin: Provenance, rounds: Sequence[State] = ()) -> str:
    recipe = origin.recipe
    last, seconds = [state, *rounds][-1], sum(one.seconds for one in (state, *rounds))
    classifies = recipe.learner().kind == "classifier"
    what = _classifier(recipe) if classifies else _causal(recipe, best)
    return f"""{_header(recipe, origin.parent)}
# {recipe.name}: {what.title}

{what.use}
## Where it comes from

- Teacher: `{recipe.teacher.model}`, {what.labels}.
- {_start(recipe.learner(), origin.parent)}
- {state.n_rows} train rows, {recipe.training.epochs} epochs{_stopped(state)}, batches of
  {recipe.training.batch_size}, {what.loss}; {seconds:.0f} s on {origin.world_size}
  worker(s). Texts are cut at {recipe.learner().max_length} tokens.
{_rounds(recipe, rounds)}
## How good it is

After {best.step} of {last.total_steps} steps{" of the last round" * bool(rounds)} (epoch \
{best.epoch}), on {best.n_rows} held-out rows
(the split `calibrate`; the checkpoint was picked on these rows, so a little optimistic):

| | |
|---|---|
| agreement with {AGREES_WITH[best.against]} | {best.agreement:.3f} |
| {LOSS[best.against]}, nats{"" if classifies else " a token"} | {best.loss:.3f} |
{_further(best)}
It has the teacher's mistakes and adds its own: {what.warning}. Digests and the loss curve are in
`journeyman.json` and `training.jsonl`.

## Licence

{_whose(recipe.learner(), origin.parent)} The labels come from the teacher, whose licence may limit
what its output is used for, and the texts keep their own.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Words:
    """What a card says of one kind of student."""

    title: str
    use: str
    labels: str
    loss: str
    warning: str


def _classifier(recipe: Recipe) -> _Words:
    asked, training = recipe.classes(), recipe.training
    labels = "\n".join(f"| `{name}` | {words} |" for name, words in asked.classes.items())
    mixed = f", {training.gold_weight:g} of the loss on gold labels" * bool(training.gold_weight)
    learned = f"soft labels at\n  temperature {training.temperature:g}"
    if training.hard_labels:
        learned = "the teacher's\n  most likely class"
    return _Words(
        title="a distilled classifier",
        use=f"""A small model that answers like a large one: it sorts a text into one of
{len(asked.classes)} classes. Made by Journeyman {journeyman.__version__}.

```python
from transformers import pipeline

classify = pipeline("text-classification", model="PATH_OF_THIS_FOLDER")
```

| class | in the teacher's prompt |
|---|---|
{labels}
""",
        labels=f"labels by `{asked.scoring}` scoring, prior correction `{asked.prior_correction}`",
        loss=f"learning rate {training.learning_rate:g} (head {training.head_learning_rate:g}), "
        f"{learned}{mixed}",
        warning="a confident answer is not a guarantee",
    )


def _causal(recipe: Recipe, best: Evaluation) -> _Words:
    training, labels = recipe.training, recipe.labels
    learned, codec = "cross-entropy on the teacher's own words", ""
    by_rank = training.divergence == "uld"  # which is measured on text, and learns more
    if isinstance(labels, Logits | Generate) and (best.against != "text" or by_rank):
        learned = (
            f"`{training.divergence}` at temperature {training.temperature:g}, tail "
            f"`{training.tail}`"
        )
        if best.against == "draws":
            learned = f"`{training.divergence}` by true draws"
        codec = f", distributions in codec `{labels.codec}`"
        if share := training.cross_entropy:
            of_text = "cross-entropy on the text's own tokens"
            learned = of_text if share == 1 else f"{learned},\n  {share:g} of the loss {of_text}"
    return _Words(
        title="a distilled language model",
        use=f"""A small language model that writes like a large one. Made by Journeyman
{journeyman.__version__}.

```python
from transformers import pipeline

write = pipeline("text-generation", model="PATH_OF_THIS_FOLDER")
```
""",
        labels=f"labels of kind `{labels.kind}`{codec}",
        loss=f"learning rate {training.learning_rate:g},\n  {learned}",
        warning="fluent text is not true text",
    )


def _rounds(recipe: Recipe, rounds: Sequence[State]) -> str:
    settings = recipe.training.on_policy
    if settings is None or not rounds:
        return ""
    rows = ", ".join(f"{one.n_rows}{_stopped(one)}" for one in rounds)
    return (
        f"- Then {len(rounds)} on-policy round(s) on answers of its own, whose tokens the teacher\n"
        f"  scored: {rows} rows, `{settings.divergence}`. The seconds are of all of it.\n"
    )


def _start(student: Student, parent: Model) -> str:
    """Its first weights: where they are from, which of its layers, what learned in their place."""
    found = f"`{parent.reference}` (SHA-256 `{parent.weights_digest}`)"
    if student.start == "fresh":
        changed = {"num_hidden_layers": student.layers} if student.layers else {}
        values = ", ".join(f"{name}: {value}" for name, value in (changed | student.config).items())
        changes = f" and {values}" * bool(values)
        return f"Weights it started from: random ones, with the config of\n  {found}{changes}."
    kept = {
        "even": "evenly spaced",
        "similarity": "those that change hidden states most",
    }[student.layer_choice]
    layers = f",\n  {student.layers} of its layers ({kept})" * (student.start == "pruned")
    said = f"Weights it started from: {found}{layers}."
    if student.lora:
        head = ", beside a head that learned whole" * (student.kind == "classifier")
        rank, alpha = student.lora.rank, student.lora.alpha
        said += (
            f"\n- LoRA: low-rank matrices (rank {rank}, alpha {alpha:g}) learned in place of the"
        )
        said += f"\n  weights{head}, and were merged into them."
    return said


def _stopped(state: State) -> str:
    return f" (stopped early, after step {state.step})" * state.stopped_early


def _further(best: Evaluation) -> str:
    rows = [
        ("accuracy against gold labels", best.gold_accuracy),
        ("perplexity of the text's own tokens", best.perplexity),
        ("texts written to the letter, greedily", best.exact_match),
        ("expected calibration error against the teacher", best.calibration_error),
        ("the same against gold labels", best.gold_calibration_error),
    ]
    return "".join(f"| {name} | {value:.3f} |\n" for name, value in rows if value is not None)


def _header(recipe: Recipe, parent: Model) -> str:
    """The card's YAML header; base_model only where the reference is a hub id."""
    task = "text-classification"
    if recipe.learner().kind == "causal":
        task = "text-generation"
    header: dict[str, object] = {
        "library_name": "transformers",
        "pipeline_tag": task,
        "tags": [task, "distillation", "journeyman"],
        "license": "other",
        "license_name": "see-base-model",
    }
    is_derived = recipe.learner().start != "fresh"
    if not is_derived:
        header["license_name"] = "see-teacher"
    if (
        is_derived
        and "://" not in parent.reference
        and not Path(parent.reference).expanduser().exists()
    ):
        header["base_model"] = parent.reference
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n"


def _whose(student: Student, parent: Model) -> str:
    declared = _declared(parent)
    if student.start == "fresh":
        return f"""The weights were trained from random ones. Config and tokenizer are those of
`{parent.reference}`, under that model's licence{declared}."""
    return f"""This folder holds weights derived from `{parent.reference}`, which keep that model's
licence{declared}."""


def _declared(parent: Model) -> str:
    """What the parent's own card says of its licence, if anything."""
    card = parent.path / "README.md"
    lines: Sequence[str] = card.read_text(encoding="utf-8").splitlines() if card.is_file() else ()
    if not lines or lines[0].strip() != "---":
        return ""
    for line in lines[1:]:
        if line.strip() == "---":
            break
        key, _, value = line.partition(":")
        if key.strip() == "license" and value.strip():
            return f" (its card says: {value.strip()})"
    return ""
