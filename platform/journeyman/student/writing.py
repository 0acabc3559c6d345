"""A student in the teacher's place: the recipe by which its own answers become a label dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from journeyman.recipe import Filters, Generate, Rationales, Recipe
from journeyman.student import architecture
from journeyman.student.row_makers import ANSWER

# Of the distributions only what says how likely each token was.
LIKELIEST = {"k": 1, "codec": "topk_fp16"}
ALONE: dict[str, Any] = LIKELIEST | {"filters": Filters(), "cache": None, "destination": None}


def asked_of_student(labels: Generate | Rationales, **settings: Any) -> Generate:
    """What the student is asked for its answer: what it was trained on. settings: of sampling."""
    shared = {n: getattr(labels, n) for n in Generate.model_fields if hasattr(labels, n)}
    if isinstance(labels, Rationales):
        shared |= {"prompt": ANSWER + labels.prompt}
    changes = {"kind": "generate", **ALONE, **settings}
    return Generate.model_validate(shared | changes)


def written_by(recipe: Recipe, student: Path, asked: Generate | Rationales) -> Recipe:
    """Run as the teacher is, but for what is only said of the teacher's own weights."""
    context = recipe.teacher.max_model_len
    if context is not None:  # vLLM refuses a longer one than the model's own
        config = architecture.read_config(student).get_text_config(decoder=True)
        context = min(context, getattr(config, "max_position_embeddings", None) or context)
    engine: dict[str, Any] = {
        "model": str(student), "revision": None, "lora": None, "engine_args": {}, "url": None,
        "column": None, "tensor_parallel_size": 1, "pipeline_parallel_size": 1,
        "max_model_len": context,
    }  # fmt: skip
    teacher = recipe.teacher.model_copy(update=engine)
    return recipe.model_copy(update={"labels": asked, "teacher": teacher, "ensemble": {}})
