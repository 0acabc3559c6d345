"""The whole configuration of a distillation: one validated model, loaded from YAML.

Owns the names, units and defaults of every setting and the sentences said about wrong ones.
Knows nothing of what the steps do with them.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from journeyman.errors import RecipeError

Split = Literal["train", "calibrate", "certify", "test"]
SPLITS: tuple[Split, ...] = ("train", "calibrate", "certify", "test")

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Columns(Section):
    """Names of the source's columns."""

    text: str = Field("text", description="Column with the request's text.")
    label: str | None = Field(
        None, description="Column with the gold label, if any; never shown to the teacher."
    )
    split: str | None = Field(None, description="Column with the source's own split names.")
    group: str | None = Field(
        None, description="Rows that share this column's value fall into one split."
    )
    meta: tuple[str, ...] = Field(
        (), description="Further columns to carry along, for templates and for reading."
    )


class Corpus(Section):
    """Where the rows come from and how they are split."""

    sources: tuple[str, ...] = Field(
        min_length=1,
        description="Paths, globs or fsspec URLs of Parquet, JSONL, CSV, TSV or text files "
        "(.gz, .bz2, .xz, .zst too) or of Hugging Face dataset folders.",
    )
    format: Literal["auto", "parquet", "jsonl", "csv", "tsv", "text", "hf"] = Field(
        "auto", description="Format of every source; auto goes by the file's name."
    )
    columns: Columns = Field(default_factory=Columns)
    where: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="Keep only rows whose column (key) holds one of these values.",
    )
    split_map: dict[str, Split | dict[Split, Share]] = Field(
        default_factory=dict,
        description="The source's split name to ours, or to shares of ours (drawn by a hash of "
        "the id, so stable when the corpus grows). Splits it does not name are left out.",
    )
    shares: dict[Split, Share] = Field(
        default={"train": 0.7, "calibrate": 0.1, "certify": 0.1, "test": 0.1},
        description="Shares of the splits where the source has none of its own.",
    )
    limits: dict[Split, Count] = Field(
        default_factory=dict,
        description="At most so many rows of a split (those with the lowest hashes of the id).",
    )
    rows_per_shard: Count = Field(
        2000,
        description="Rows of a corpus shard, the unit of work, commit and resume: aim at one to "
        "three minutes of a replica (some hundred rows on a CPU, thousands on a GPU).",
    )
    max_malformed: Share = Field(
        0.01, description="Stop if more than this share of the source's rows is malformed."
    )

    @model_validator(mode="after")
    def _splits_make_sense(self) -> Corpus:
        def check(shares: dict[Split, float], name: str) -> None:
            if abs(sum(shares.values()) - 1) > 1e-6:
                raise ValueError(f"{name} must add up to 1, got {sum(shares.values()):g}")

        check(self.shares, "shares")
        for source_split, target in self.split_map.items():
            if isinstance(target, dict):
                check(target, f"split_map.{source_split}")
        if self.split_map and not self.columns.split:
            raise ValueError("split_map needs columns.split, the column with the source's splits")
        return self


class Teacher(Section):
    """The large model that labels, as vLLM runs it."""

    model: str = Field(
        description="Hub id, local folder, .gguf file, or package://NAME/RESOURCE (a file or "
        "folder that an installed Python package carries)."
    )
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit).")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Weights and activations; on a CPU float32 is often the fastest."
    )
    max_model_len: Count | None = Field(
        None, description="Longest prompt plus output in tokens; default the model's own."
    )
    max_num_seqs: Count = Field(256, description="Sequences in the engine at a time.")
    max_num_batched_tokens: Count | None = Field(
        None, description="Tokens of one engine step; default vLLM's."
    )
    tensor_parallel_size: Count = Field(1, description="GPUs that share one replica.")
    gpu_memory_utilization: Share = Field(0.9, description="Share of a GPU's memory to use.")
    cpu_kv_cache_gib: Annotated[float, Field(gt=0)] = Field(
        2.0, description="KV cache of a CPU replica in GiB."
    )
    start_timeout_s: Seconds = Field(600.0, description="Deadline of an engine's start.")
    request_timeout_s: Seconds = Field(300.0, description="Deadline of one request.")
    engine_args: dict[str, Any] = Field(
        default_factory=dict, description="Any other vLLM engine argument, passed on as it is."
    )


class Labels(Section):
    """What the teacher is asked, and what is kept of its answer."""

    kind: Literal["classes"] = Field(
        "classes", description="classes: the distribution over label words."
    )
    classes: dict[str, str] = Field(
        min_length=2,
        description="Label (as in the gold column) to the words that name it in the prompt.",
    )
    scoring: Literal["direct", "channel"] = Field(
        "direct",
        description="direct: log P(label word | prompt), one prefill. channel: log P(target | "
        "prompt with the label), one prefill a label (Min et al. 2022); far better with small "
        "teachers.",
    )
    prompt: str = Field(
        description="Jinja template over the row's columns (text, and those of columns.meta); "
        "with channel scoring also over label, the label's words."
    )
    target: str = Field(
        "{{ text }}", description="channel: template of what is scored behind the prompt."
    )
    prior_correction: Literal["batch", "none"] = Field(
        "batch",
        description="batch: divide by the mean class probability over train rows (Batch "
        "Calibration, Zhou et al. 2024).",
    )
    shards_in_flight: Count = Field(
        2, description="Shards that one replica works on at a time, to keep its batches full."
    )
    max_attempts: Count = Field(3, description="Attempts at a row before it is quarantined.")

    @model_validator(mode="after")
    def _prompt_fits_scoring(self) -> Labels:
        if self.scoring == "channel" and "label" not in self.prompt:
            raise ValueError("prompt must name {{ label }} when scoring is channel")
        if self.scoring == "direct" and len(set(self.classes.values())) < len(self.classes):
            raise ValueError("classes must have label words that differ from one another")
        return self


class Student(Section):
    """The small model that learns."""

    model: str = Field(
        description="Pretrained encoder: hub id, local folder or package://NAME/RESOURCE."
    )
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit).")
    kind: Literal["classifier"] = Field("classifier", description="classifier: an encoder.")
    max_length: Count = Field(128, description="Longest input in tokens; longer ones are cut.")


class Training(Section):
    """How the student is trained: Ray Train, DDP."""

    workers: Count = Field(1, description="Data-parallel workers.")
    cpus_per_worker: Annotated[float, Field(gt=0)] = Field(1.0, description="Ray CPUs a worker.")
    gpus_per_worker: Annotated[float, Field(ge=0)] = Field(0.0, description="Ray GPUs a worker.")
    epochs: Count = Field(4, description="Passes over the train rows.")
    batch_size: Count = Field(32, description="Rows of one optimizer step, over all workers.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(5e-5, description="Of the encoder.")
    head_learning_rate: Annotated[float, Field(gt=0)] = Field(2e-3, description="Of the head.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="AdamW weight decay.")
    warmup: Share = Field(0.1, description="Share of the steps with a rising learning rate.")
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Softens both distributions in the loss (Hinton et al. 2015)."
    )
    gold_weight: Share = Field(
        0.0, description="Weight of cross-entropy on gold labels, for rows that have one."
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(
        2, description="Worker failures from which a run restarts at its last checkpoint."
    )
    seed: int = Field(0, description="Of row order and of the head's first weights.")

    @model_validator(mode="after")
    def _batch_divides(self) -> Training:
        if self.batch_size % self.workers:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of workers ({self.workers})"
            )
        return self


class Certify(Section):
    """The promise that the escalation threshold carries."""

    guarantee: Literal["system_agreement", "selective_agreement"] = Field(
        "system_agreement",
        description="system_agreement: P(student answers and differs from the teacher) <= alpha. "
        "selective_agreement: P(differs | student answers) <= alpha.",
    )
    alpha: Annotated[float, Field(gt=0, lt=1)] = Field(0.05, description="The promised rate.")
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="Chance that the promise is broken by bad luck in the draw of rows."
    )
    max_delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5,
        description="Certify rows that are used again (for another student, say) spend delta each "
        "time; once so much is spent they are refused.",
    )
    scores: tuple[Literal["max_probability", "margin", "entropy"], ...] = Field(
        ("max_probability", "margin", "entropy"),
        min_length=1,
        description="Confidence scores to choose from, on calibrate rows.",
    )

    @model_validator(mode="after")
    def _delta_fits(self) -> Certify:
        if self.delta > self.max_delta:
            raise ValueError(f"delta ({self.delta:g}) must not exceed max_delta "
                             f"({self.max_delta:g})")  # fmt: skip
        return self


class Cascade(Section):
    """Serving: the student answers what it may, the teacher the rest."""

    request_timeout_s: Seconds = Field(30.0, description="Deadline of one request.")
    max_batch_size: Count = Field(32, description="Rows that the student scores at a time.")
    max_queued_requests: Count = Field(
        512, description="Requests waiting for the teacher before further ones get 503."
    )
    teacher_cpus: Annotated[float, Field(ge=0)] = Field(1.0, description="Ray CPUs a teacher.")
    teacher_gpus: Annotated[float, Field(ge=0)] = Field(0.0, description="Ray GPUs a teacher.")


class Replicas(Section):
    """The autoscaling pool of labeling replicas."""

    min: Count = Field(1, description="Replicas at least.")
    max: Count = Field(1, description="Replicas at most.")

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) must not exceed max ({self.max})")
        return self


class Cluster(Section):
    """Where it runs."""

    address: str | None = Field(
        None, description="Ray address; default RAY_ADDRESS, else a cluster on this machine."
    )
    replicas: Replicas = Field(default_factory=Replicas)
    cpus_per_replica: Annotated[float, Field(ge=0)] = Field(1.0, description="Ray CPUs a replica.")
    gpus_per_replica: Annotated[float, Field(ge=0)] = Field(0.0, description="Ray GPUs a replica.")


class Recipe(Section):
    """One distillation, from its corpus to its cascade."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run.")
    output: str = Field(
        "runs", description="Folder in which the run's folder, called by its name, is made."
    )
    corpus: Corpus
    teacher: Teacher
    labels: Labels
    student: Student
    training: Training = Field(default_factory=Training)
    certify: Certify = Field(default_factory=Certify)
    cascade: Cascade = Field(default_factory=Cascade)
    cluster: Cluster = Field(default_factory=Cluster)

    @property
    def run_dir(self) -> Path:
        return Path(self.output) / self.name

    @property
    def hash(self) -> str:
        """Digest of every setting, defaults included; equal recipes have equal hashes."""
        return digest(self.model_dump(mode="json"))

    @model_validator(mode="after")
    def _gold_is_there(self) -> Recipe:
        if self.training.gold_weight and not self.corpus.columns.label:
            raise ValueError("training.gold_weight needs gold labels: set corpus.columns.label")
        return self


def digest(value: object) -> str:
    """128-bit BLAKE2b of a JSON-like value's canonical form, in hex."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


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
    return parse(data, str(path))


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
    path = ".".join(str(p) for p in loc)
    if error["type"] == "extra_forbidden":
        known = _known_keys(loc[:-1])
        near = difflib.get_close_matches(str(loc[-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}."
        return f"{where}: unknown key {path}; {hint}"
    if error["type"] == "missing":
        return f"{where}: {path} is missing; {_describe(loc)}"
    if error["type"] == "value_error":
        return f"{where}: {path + ': ' if path else ''}{error['ctx']['error']}."
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{where}: {path}: {message}, got {error['input']!r}."


def _section_at(loc: Sequence[object]) -> type[BaseModel] | None:
    model: type[BaseModel] = Recipe
    for part in loc:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        model = annotation
    return model


def _known_keys(loc: Sequence[object]) -> list[str]:
    section = _section_at(loc)
    return list(section.model_fields) if section else []


def _describe(loc: Sequence[object]) -> str:
    section = _section_at(loc[:-1])
    field = section.model_fields.get(str(loc[-1])) if section else None
    return (field.description if field else None) or "it has no default."
