"""The exported student: a Hugging Face folder with a model card and our own record beside it.

Takes a checkpoint's model folder as it is; knows nothing of torch.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

import journeyman
from journeyman.files import disk_errors, replaced_directory, write_bytes, write_json
from journeyman.models import Model
from journeyman.recipe import Recipe
from journeyman.student.checkpoints import Evaluation, State

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where an exported student comes from."""

    recipe: Recipe
    parent: Model
    inputs: str  # digest of all that went into the training
    labels_digest: str  # of the label dataset
    world_size: int


def write(
    out_dir: Path, model_dir: Path, curve: Path, best: Evaluation, state: State, origin: Provenance
) -> None:
    """Replace ``out_dir`` by the best checkpoint's model, whole or not at all."""
    with replaced_directory(out_dir) as fresh, disk_errors(out_dir.parent):
        shutil.copytree(model_dir, fresh, dirs_exist_ok=True)
        shutil.copyfile(curve, fresh / "training.jsonl")
        write_json(fresh / "journeyman.json", _record(best, state, origin))
        write_bytes(fresh / "README.md", _card(best, state, origin).encode())


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
        "best": dataclasses.asdict(best),
        "evaluations": [dataclasses.asdict(e) for e in state.evaluations],
        "steps": state.total_steps,
        "rows": state.n_rows,
        "seconds": round(state.seconds, 3),
        "world_size": origin.world_size,
    }


def _card(best: Evaluation, state: State, origin: Provenance) -> str:
    recipe, training = origin.recipe, origin.recipe.training
    asked = recipe.classes()
    labels = "\n".join(f"| `{name}` | {words} |" for name, words in asked.classes.items())
    gold = (
        ""
        if best.gold_accuracy is None
        else f"| accuracy against gold labels | {best.gold_accuracy:.3f} |\n"
    )
    mixed = f", {training.gold_weight:g} of the loss on gold labels" * bool(training.gold_weight)
    return f"""{_header(recipe, origin.parent)}
# {recipe.name}: a distilled classifier

A small encoder that answers like a large language model: it sorts a text into one of
{len(asked.classes)} classes. Made by Journeyman {journeyman.__version__}.

```python
from transformers import pipeline

classify = pipeline("text-classification", model="PATH_OF_THIS_FOLDER")
```

| class | in the teacher's prompt |
|---|---|
{labels}

## Where it comes from

- Teacher: `{recipe.teacher.model}`, labels by `{asked.scoring}` scoring, prior correction
  `{asked.prior_correction}`.
- Weights it started from: `{origin.parent.reference}` (SHA-256 `{origin.parent.weights_digest}`).
- {state.n_rows} train rows, {training.epochs} epochs, batches of {training.batch_size}, learning
  rate {training.learning_rate:g} (head {training.head_learning_rate:g}), soft labels at
  temperature {training.temperature:g}{mixed}; {state.seconds:.0f} s on {origin.world_size}
  worker(s). Texts are cut at {recipe.learner().max_length} tokens.

## How good it is

After epoch {best.epoch} of {training.epochs}, on {best.n_rows} held-out rows (the split
`calibrate`; the epoch was picked on these rows, so a little optimistic):

| | |
|---|---|
| agreement with the teacher's first choice | {best.agreement:.3f} |
| KL(teacher ‖ student), nats | {best.kl:.3f} |
{gold}
It has the teacher's mistakes and adds its own: a confident answer is not a guarantee. Digests
and the loss curve are in `journeyman.json` and `training.jsonl`.

## Licence

This folder holds weights derived from `{origin.parent.reference}`, which keep that model's
licence{_declared(origin.parent)}. The labels come from the teacher, whose licence may limit what
its output is used for, and the texts keep their own.
"""


def _header(recipe: Recipe, parent: Model) -> str:
    """The card's YAML header; base_model only where the reference is a hub id."""
    header: dict[str, object] = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["text-classification", "distillation", "journeyman"],
        "license": "other",
        "license_name": "see-base-model",
    }
    if "://" not in parent.reference and not Path(parent.reference).expanduser().exists():
        header["base_model"] = parent.reference
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n"


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
