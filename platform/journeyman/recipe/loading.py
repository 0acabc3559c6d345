"""One recipe: all sections together, loaded from YAML, and the sentences about wrong ones."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args
from urllib.parse import unquote

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from journeyman.errors import RecipeError
from journeyman.mirror import copy_of
from journeyman.object_store import PROTOCOLS
from journeyman.recipe import unread
from journeyman.recipe.base import Section, digest
from journeyman.recipe.cluster import Cluster
from journeyman.recipe.corpus import Corpus
from journeyman.recipe.labels import Classes, Generate, Labels, Logits, Rationales
from journeyman.recipe.report import Report
from journeyman.recipe.serving import Cascade, Certify
from journeyman.recipe.student import Student, Training
from journeyman.recipe.teacher import Teacher

_KINDS: dict[str, type[BaseModel]] = {
    "classes": Classes,
    "logits": Logits,
    "generate": Generate,
    "rationales": Rationales,
}


class Recipe(Section):
    """One distillation, from its corpus to its cascade."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run.")
    output: str = Field(
        "runs",
        description="Folder in which the run's folder, called by its name, is made: on a cluster "
        "on a disk that all nodes share, or an object store's URL (s3://, gs://, az://).",
    )
    corpus: Corpus
    teacher: Teacher
    ensemble: dict[str, Teacher] = Field(
        default_factory=dict,
        description="classes and logits: further teachers by name; each labels the corpus, each "
        "one's labels are kept, and the dataset holds the mean of their probabilities.",
    )
    labels: Labels
    student: Student | None = Field(
        None, description="The model that learns; labeling alone needs none."
    )
    training: Training = Field(default_factory=Training)
    certify: Certify = Field(default_factory=Certify)
    cascade: Cascade = Field(default_factory=Cascade)
    cluster: Cluster = Field(default_factory=Cluster)
    report: Report = Field(default_factory=Report)

    @property
    def run_url(self) -> str | None:
        """Where the run's folder lies; None where that is on a disk."""
        if "://" not in self.output or self.output.startswith("file://"):
            return None
        return f"{self.output.rstrip('/')}/{self.name}"

    @property
    def run_dir(self) -> Path:
        """The run's folder on this machine's disk; of a URL, this machine's copy."""
        if self.run_url:
            return copy_of(self.run_url)
        return Path(unquote(self.output.removeprefix("file://"))) / self.name

    @property
    def hash(self) -> str:
        """Digest of every setting, defaults included; equal recipes have equal hashes."""
        return digest(self.model_dump(mode="json"))

    def templates(self) -> dict[str, str]:
        """All templates over a row's columns, by YAML path."""
        return self.labels.templates() | (self.student.templates() if self.student else {})

    def classes(self) -> Classes:
        """The labels section, for the steps that work on class distributions only."""
        if not isinstance(self.labels, Classes):
            raise RecipeError(
                f"labels.kind is {self.labels.kind}, and this is for classes. Labels of this kind "
                "are read with journeyman.labels.dataset.read, or written out by journeyman labels "
                "export."
            )
        return self.labels

    def learner(self) -> Student:
        """The student section; raises RecipeError where the recipe has none."""
        if self.student is None:
            raise RecipeError("student is missing: name the model that learns in student.model.")
        return self.student

    @model_validator(mode="before")
    @classmethod
    def _kind_is_classes_by_default(cls, data: Any) -> Any:
        labels = data.get("labels") if isinstance(data, dict) else None
        if isinstance(labels, dict) and "kind" not in labels:
            return data | {"labels": {"kind": "classes", **labels}}
        return data

    @field_validator("output")
    @classmethod
    def _output_is_a_folder(cls, value: str) -> str:
        kind, _, rest = value.partition("://")
        if rest and kind not in (*PROTOCOLS, "file"):
            raise ValueError(
                f"a folder, or a URL of s3://, gs:// or az://, and {value} is none of these"
            )
        if rest and ("?" in rest or "#" in rest):
            raise ValueError(f"an object store's URL has no folder behind ? or #, as in {value}")
        return value

    @model_validator(mode="after")
    def _rounds_share_a_disk(self) -> Recipe:
        if self.run_url and self.training.on_policy:
            raise ValueError(
                "training.on_policy keeps its rounds' corpora and labels below output, which must "
                f"be a folder on a disk that all nodes share for it, and {self.output} is a URL"
            )
        return self

    @model_validator(mode="after")
    def _ensemble_of_distributions(self) -> Recipe:
        if self.ensemble and self.labels.kind not in ("classes", "logits"):
            raise ValueError(
                "ensemble averages what its teachers say of the same text, so it goes with "
                f"labels.kind: classes or logits, and not with {self.labels.kind}"
            )
        return self

    @model_validator(mode="after")
    def _spread_over_gpus(self) -> Recipe:
        gpus = self.cluster.gpus_per_replica
        if gpus != 1 and any(t.spread for t in (self.teacher, *self.ensemble.values())):
            raise ValueError(
                "engine_args.distributed_executor_backend: ray gives each of a teacher's workers a "
                f"GPU of its own: set cluster.gpus_per_replica to 1, it is {gpus:g}"
            )
        return self

    @model_validator(mode="after")
    def _column_holds_answers(self) -> Recipe:
        column, labels = self.teacher.column, self.labels
        if column is None:
            return self
        if column not in self.corpus.columns.meta:
            raise ValueError(
                f"teacher.column: {column} is no column of corpus.columns.meta "
                f"({', '.join(self.corpus.columns.meta) or 'which is empty'}); add it there"
            )
        written = isinstance(labels, Generate) or (
            isinstance(labels, Rationales) and labels.samples == 1 and not labels.classes
        )
        if not written:
            raise ValueError(
                "teacher.column holds one text a row: labels.kind must be generate, or rationales "
                "with samples: 1 and without classes"
            )
        if self.corpus.feedback:
            raise ValueError(
                "teacher.column: what a cascade kept has no such column; to label it, leave that "
                "out and name the teacher in teacher.model"
            )
        return self

    @model_validator(mode="after")
    def _gold_is_shown_to_nobody(self) -> Recipe:
        columns = self.corpus.columns
        if columns.label and columns.label in columns.meta:
            raise ValueError(
                f"corpus.columns.meta: {columns.label} is the gold label, which a template could "
                "show to the teacher or the student from there; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _gold_is_there(self) -> Recipe:
        if self.training.gold_weight and not self.corpus.columns.label:
            raise ValueError("training.gold_weight needs gold labels: set corpus.columns.label")
        if self.certify.needs_gold and not self.corpus.columns.label:
            raise ValueError(
                "certify.guarantee accuracy needs gold labels: set corpus.columns.label"
            )
        if self.cascade.combine == "mixture" and not self.corpus.columns.label:
            raise ValueError(
                "cascade.combine: mixture is weighted by gold labels: set corpus.columns.label"
            )
        return self

    @model_validator(mode="after")
    def _class_weights_have_classes(self) -> Recipe:
        wanted = self.training.class_weight
        if not isinstance(wanted, dict) or not isinstance(self.labels, Classes):
            return self
        for label in wanted:
            if label not in self.labels.classes:
                near = difflib.get_close_matches(label, self.labels.classes, n=1)
                hint = f"did you mean {near[0]}" if near else "labels.classes has them"
                raise ValueError(f"training.class_weight.{label} is no label; {hint}")
        return self

    @model_validator(mode="after")
    def _positive_is_a_label(self) -> Recipe:
        positive = self.report.positive
        known = self.labels.classes if isinstance(self.labels, Classes) else {}
        if positive is not None and positive not in known:
            raise ValueError(
                f"report.positive: {positive} is no label; labels.classes has "
                f"{', '.join(known) or 'none'}"
            )
        by = self.report.rank_by
        if by is not None and positive is None:
            raise ValueError("report.rank_by needs report.positive, the label that is ranked by")
        if by is not None and by not in ("text", *self.corpus.columns.meta):
            raise ValueError(
                f"report.rank_by: {by} is neither text nor a column of corpus.columns.meta"
            )
        return self

    @model_validator(mode="after")
    def _distributions_fit_the_divergence(self) -> Recipe:
        labels, training = self.labels, self.training
        plain = training.divergence == "forward_kl" and training.temperature == 1
        drawn = isinstance(labels, Logits | Generate) and labels.codec == "sampled"
        if training.divergence == "uld" and drawn:
            raise ValueError(
                "training.divergence: uld compares the likeliest tokens, which true draws do "
                "not hold: take labels.codec: topk_fp16"
            )
        if self.student and drawn and not plain:
            raise ValueError(
                "labels.codec: sampled estimates forward_kl at temperature 1, and nothing else "
                "without bias: set training.divergence and temperature so, or take labels.codec: "
                "topk_fp16"
            )
        return self

    @model_validator(mode="after")
    def _on_policy_has_prompts(self) -> Recipe:
        if self.training.on_policy is None:
            return self
        if not isinstance(self.labels, Generate):
            raise ValueError(
                "training.on_policy needs prompts that the student answers: labels.kind: generate, "
                f"got {self.labels.kind}"
            )
        if self.teacher.gives_text_alone:
            raise ValueError(
                "training.on_policy needs the teacher's distributions over the student's tokens, "
                "which a teacher behind a URL or in a column does not give"
            )
        longest = self.training.on_policy.max_tokens
        rooms = {"teacher.max_model_len": self.teacher.max_model_len}
        if self.student:
            rooms["student.max_length"] = self.student.max_length
        for name, room in rooms.items():
            if room and longest >= room:
                raise ValueError(
                    f"training.on_policy.max_tokens ({longest}) leaves no room for a prompt in "
                    f"{name} ({room}); lower the one, or raise the other"
                )
        if self.labels.codec == "sampled":
            raise ValueError(
                "training.on_policy learns by reverse_kl or jsd, which true draws give no unbiased "
                "estimate of: take labels.codec: topk_fp16"
            )
        return self

    @model_validator(mode="after")
    def _students_before_classify(self) -> Recipe:
        if not self.certify.before:
            return self
        if self.student and self.student.kind != "classifier":
            raise ValueError("certify.before goes with student.kind: classifier")
        if self.cascade.combine == "mixture":
            raise ValueError("certify.before goes with cascade.combine: teacher")
        return self

    @model_validator(mode="after")
    def _row_weight_is_there(self) -> Recipe:
        wanted, labels = self.training.row_weight, self.labels
        reasoned = labels if isinstance(labels, Rationales) else None
        if wanted == "agreement" and (reasoned is None or reasoned.samples == 1):
            raise ValueError(
                "training.row_weight: agreement needs labels.kind: rationales with labels.samples "
                "of 2 or more"
            )
        if wanted != "confidence":
            return self
        if reasoned and not reasoned.classes:
            raise ValueError(
                "training.row_weight: confidence of rationales needs labels.classes; or take "
                "agreement"
            )
        if isinstance(labels, Logits) and labels.codec == "sampled":
            raise ValueError(
                "training.row_weight: confidence needs the teacher's largest probabilities, which "
                "true draws do not hold: take labels.codec: topk_fp16"
            )
        if isinstance(labels, Generate) and self.teacher.gives_text_alone:
            raise ValueError(
                "training.row_weight: confidence needs the answer's probability, which a teacher "
                "behind a URL does not give, nor a column"
            )
        return self


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply ``a.b=c`` overrides (values in YAML).

    Raises RecipeError with a sentence that names the file and the YAML path.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: the recipe cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}, column {where.column + 1}" if where else ""
        problem = getattr(error, "problem", None) or error
        raise RecipeError(f"{path}: not valid YAML{line}: {problem}.") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: the recipe must be a mapping of sections, got {_kind(data)}.")
    for override in overrides:
        _apply(data, override)
    return parse_new(data, str(path))


def parse_new(data: dict[str, Any], where: str) -> Recipe:
    """Validate a mapping that nothing was made by yet: settings that nothing would read are refused
    too. Raises RecipeError with one sentence a mistake."""
    loaded = parse(data, where)
    if said := unread.sentences(loaded):
        raise RecipeError("\n".join(f"{where}: {one}" for one in said))
    return loaded


def parse(data: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a mapping; raises RecipeError with one sentence a mistake."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError("\n".join(_sentence(e, where) for e in error.errors())) from error


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override}: write it as key=value, e.g. training.epochs=3.")
    *parents, last = key.split(".")
    node = data
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise RecipeError(f"--set {override}: {parent} is {_kind(node)}, not a section.")
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: {text!r} is not a YAML value.") from error


def _kind(value: object) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", type(None): "nothing"}
    return names.get(type(value), f"a {type(value).__name__}")


def _sentence(error: Any, where: str) -> str:
    # Union branches and dict-key markers are pydantic's own steps, not keys of the user's YAML.
    loc = [p for p in error["loc"] if not (isinstance(p, str) and p.endswith((")", "]")))]
    kind = loc[1] if loc[0:1] == ["labels"] and loc[1:2] and loc[1] in _KINDS else None
    loc = [*loc[:1], *loc[2:]] if kind else loc  # the union's tag is no key of the YAML either
    path = ".".join(str(p) for p in loc)
    if error["type"] == "extra_forbidden":
        known = _known_keys(loc[:-1], kind)
        near = difflib.get_close_matches(str(loc[-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}."
        return f"{where}: unknown key {path}; {hint}"
    if error["type"] == "missing":
        return f"{where}: {path} is missing; {_describe(loc, kind)}"
    if error["type"] == "value_error":
        return f"{where}: {path + ': ' if path else ''}{error['ctx']['error']}."
    if error["type"] == "union_tag_invalid":
        kinds = ", ".join(_KINDS)
        return f"{where}: {path}.kind is {error['ctx']['tag']!r}; it must be one of {kinds}."
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{where}: {path}: {message}, got {error['input']!r}."


def _section_at(loc: Sequence[object], kind: object) -> type[BaseModel] | None:
    model: type[BaseModel] = Recipe
    for part in loc:
        if model is Recipe and part == "labels":
            model = _KINDS[str(kind)]
            continue
        field = model.model_fields.get(str(part))
        candidates = (field.annotation, *get_args(field.annotation)) if field else ()
        found = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)),
                     None)  # fmt: skip
        if found is None:
            return None
        model = found
    return model


def _known_keys(loc: Sequence[object], kind: object) -> list[str]:
    section = _section_at(loc, kind)
    return list(section.model_fields) if section else []


def _describe(loc: Sequence[object], kind: object) -> str:
    section = _section_at(loc[:-1], kind)
    field = section.model_fields.get(str(loc[-1])) if section else None
    return (field.description if field else None) or "it has no default."
