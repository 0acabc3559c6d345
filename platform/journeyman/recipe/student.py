"""The small model, and how it learns."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from journeyman.recipe.base import Count, Section, Share

Weight = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
RowWeight = Literal["none", "confidence", "agreement"]
_OF_LABELS = {"num_labels", "id2label", "label2id"}  # values of a config


class Lora(Section):
    """Low-rank matrices that learn in place of the weights (Hu et al. 2021)."""

    rank: Count = Field(16, description="Columns of each of the two matrices.")
    alpha: Annotated[float, Field(gt=0)] = Field(
        32.0, description="Their product is added times alpha / rank."
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of the inputs that they do not see in a step."
    )
    target_modules: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="Names of the modules that get them, such as q_proj; default all linear ones "
        "but the output projection, or a classifier's head.",
    )


class Student(Section):
    """The small model that learns."""

    model: str = Field(
        description="Where it starts from: hub id, local folder or package://NAME/RESOURCE. "
        "classifier: an encoder, or a language model, whose last token is classified. causal: a "
        "language model. With start: pruned the teacher itself, as a rule."
    )
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit).")
    kind: Literal["classifier", "causal"] = Field(
        "classifier",
        description="classifier: an encoder, or a language model with a head in the place of its "
        "output projection, that learns labels.kind: classes. causal: a language model that learns "
        "labels.kind: logits, generate or rationales.",
    )
    max_length: Count = Field(128, description="Longest input in tokens; longer ones are cut.")
    text: str = Field(
        "{{ text }}",
        description="classifier: Jinja template over the row's columns of what it reads.",
    )
    text_pair: str | None = Field(
        None,
        description="classifier: template of a second text, read beside the first as the encoder "
        "reads pairs (a cross-encoder); of a pair that is too long the longer text is cut.",
    )
    start: Literal["pretrained", "pruned", "fresh"] = Field(
        "pretrained",
        description="pretrained: the model's weights. pruned: some of its layers, all else as it "
        "is. fresh: random weights, with its config and tokenizer. A classifier's head is new.",
    )
    layers: Count | None = Field(
        None,
        description="pruned or fresh: how many transformer layers it has; default, for "
        "fresh, as many as the model.",
    )
    layer_choice: Literal["even", "similarity"] = Field(
        "even",
        description="pruned: which layers stay. even: the first, the last and evenly "
        "spaced ones between. similarity: those that change the hidden states of sample texts "
        "most, by cosine (Block Influence of ShortGPT, Men et al. 2024).",
    )
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="fresh: values of the model's config to change, such as hidden_size.",
    )
    lora: Lora | None = Field(
        None,
        description="Train low-rank matrices only, through the package peft, and merge them into "
        "the weights at the end. A classifier's head learns whole beside them.",
    )

    def templates(self) -> dict[str, str]:
        """The templates over a row's columns, by YAML path; a gold label is no column of theirs."""
        pair = {} if self.text_pair is None else {"student.text_pair": self.text_pair}
        return {"student.text": self.text} | pair

    @model_validator(mode="after")
    def _templates_are_of_classifiers(self) -> Student:
        if self.kind == "causal" and (self.text_pair is not None or self.text != "{{ text }}"):
            raise ValueError("text and text_pair go with kind: classifier")
        return self

    @model_validator(mode="after")
    def _start_fits(self) -> Student:
        if self.start == "pruned" and self.layers is None:
            raise ValueError("start: pruned needs layers: how many to keep")
        if self.start == "pretrained" and self.layers is not None:
            raise ValueError("layers goes with start: pruned or fresh")
        if self.layer_choice != "even" and self.start != "pruned":
            raise ValueError("layer_choice goes with start: pruned")
        if self.config and self.start != "fresh":
            raise ValueError("config goes with start: fresh")
        if self.kind == "classifier" and (said := sorted(_OF_LABELS & self.config.keys())):
            raise ValueError(f"config.{said[0]} is what labels.classes says; leave it out")
        if self.layers is not None and "num_hidden_layers" in self.config:
            raise ValueError("layers and config.num_hidden_layers say the same; give layers only")
        if self.start == "fresh" and self.lora:
            raise ValueError("lora adds to weights that have learned; start: fresh has none")
        return self


class OnPolicy(Section):
    """Rounds in which the student learns from its own answers (GKD, Agarwal et al. 2024): it
    answers train prompts, the teacher scores each of its tokens, and the student learns that."""

    rounds: Count = Field(2, description="Rounds, each with the student of the one before.")
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.25,
        description="Share of the train prompts that a round takes; the next one takes those that "
        "follow.",
    )
    max_tokens: Count = Field(128, description="Tokens of an answer at most.")
    temperature: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Of the student's sampling; 0 is greedy."
    )
    divergence: Literal["reverse_kl", "jsd"] = Field(
        "reverse_kl", description="What a round learns by; jsd with training.beta."
    )
    epochs: Count = Field(1, description="Passes over a round's answers.")
    learning_rate: Positive | None = Field(
        None, description="Of a round; default training.learning_rate."
    )


class Training(Section):
    """How the student is trained: Ray Train, DDP or FSDP."""

    workers: Count = Field(1, description="Data-parallel workers.")
    min_workers: Count | None = Field(
        None,
        description="Workers with which a run begins, or goes on from its last checkpoint, where "
        "the cluster has no room for all; it restarts with more as soon as it has. Rows of a step "
        "and of a micro-batch stay the same. Default, as many as workers.",
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="ddp: each worker holds the whole student. fsdp: each holds a part of every "
        "tensor, with its gradient and its optimizer state, for students that do not fit (PyTorch "
        "FSDP2); a layer is put together while it is computed. May change between two starts.",
    )
    cpus_per_worker: Annotated[float, Field(gt=0)] = Field(1.0, description="Ray CPUs a worker.")
    gpus_per_worker: Annotated[float, Field(ge=0)] = Field(0.0, description="Ray GPUs a worker.")
    node_labels: dict[str, str] = Field(
        default_factory=dict,
        description="Ray labels that a worker's node must have: {journeyman: serve} keeps training "
        "off the spot nodes of cluster.yaml.",
    )
    epochs: Count = Field(4, description="Passes over the train rows.")
    batch_size: Count = Field(32, description="Rows of one optimizer step, over all workers.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        5e-5, description="Of what has learned: all but a classifier's head."
    )
    head_learning_rate: Annotated[float, Field(gt=0)] = Field(
        2e-3, description="Of a classifier's head."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="AdamW weight decay.")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Gradients of a step are scaled down to this norm; by default they are "
        "left as they are (Trainer and TRL take 1.0).",
    )  # fmt: skip
    warmup: Share = Field(0.1, description="Share of the steps with a rising learning rate.")
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Softens both distributions in the loss (Hinton et al. 2015)."
    )
    gold_weight: Share = Field(
        0.0,
        description="classifier: weight of cross-entropy on gold labels, for rows that have one.",
    )
    row_weight: RowWeight = Field(
        "none",
        description="What a row's loss is multiplied with, 1 on average over the train rows. "
        "confidence: how sure the teacher was. agreement: rationales: the share of its samples "
        "with the majority's answer.",
    )
    hard_labels: bool = Field(
        False,
        description="classifier: learn the teacher's most likely class alone, instead of its "
        "distribution.",
    )
    class_weight: Literal["none", "balanced"] | dict[str, Positive] = Field(
        "none",
        description="classifier: weight of each class in the loss. balanced: rows / (classes · the "
        "class's rows), counted by the teacher's probabilities on train rows (with hard_labels, by "
        "its choices). Or label to weight; labels left out weigh 1.",
    )
    divergence: Literal[
        "forward_kl", "reverse_kl", "jsd", "skewed_kl", "total_variation", "uld"
    ] = Field(
        "forward_kl",
        description="causal: of the student from the teacher at each token; jsd as in GKD (Agarwal "
        "et al. 2024), skewed_kl as in DistiLLM (Ko et al. 2024). uld: of the two sorted "
        "distributions, for a student with another tokenizer (Universal Logit Distillation, "
        "Boizard et al. 2024); it goes with a share of cross_entropy.",
    )
    tail: Literal["bucket", "renormalised"] = Field(
        "bucket",
        description="causal: tokens outside the teacher's record are one outcome (bucket), or are "
        "left out on both sides (renormalised, which is biased).",
    )
    beta: Weight = Field(0.5, description="jsd: the teacher's weight in the mixture.")
    skew: Weight = Field(0.1, description="skewed_kl: the teacher's weight in the mixture.")
    cross_entropy: Share = Field(
        0.0, description="causal: weight of cross-entropy on the text's own next token."
    )
    rationale_weight: Annotated[float, Field(ge=0)] = Field(
        1.0,
        description="rationales: what the loss on the reasonings counts beside the loss on the "
        "answers, each a mean over its tokens (Distilling step-by-step, Hsieh et al. 2023). 0: "
        "learn the answers alone.",
    )
    label_smoothing: Share = Field(
        0.0,
        description="causal: of that cross-entropy. classifier: share of every target, the "
        "teacher's and gold, that is spread evenly over the classes.",
    )
    accumulate: Count = Field(
        1, description="Parts in which a worker takes its share of a batch, to save memory."
    )
    activation_checkpointing: bool = Field(
        False,
        description="Keep each layer's input only and compute the rest again in backward; less "
        "memory, about a third more time a step.",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Of matrix products in training; weights, losses and evaluations are float32. "
        "auto: bf16 on GPUs that have it, else fp32.",
    )
    compile: bool = Field(
        False,
        description="Have torch.compile make code of the student: some minutes at the start, "
        "faster steps after them.",
    )
    on_policy: OnPolicy | None = Field(
        None,
        description="causal, labels.kind: generate: after the teacher's answers, rounds over the "
        "student's own; default, none.",
    )
    evaluate_every: Count | None = Field(
        None,
        description="Optimizer steps from one evaluation on calibrate rows to the next; default, "
        "as many as an epoch has. The last step is always followed by one.",
    )
    patience: Count | None = Field(
        None,
        description="Evaluations without a better one than before, after which training stops; "
        "default, never.",
    )
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        (),
        description="Where the curve also goes, each by its own package. tensorboard: files in the "
        "run's folder. mlflow: to MLFLOW_TRACKING_URI, default the run's folder. wandb: as "
        "WANDB_MODE and wandb login say.",
    )
    checkpoint_every_s: Annotated[float, Field(ge=0)] = Field(
        300.0,
        description="Seconds between checkpoints; an evaluation that is the best so far, or that "
        "ends an epoch or the training, makes one too.",
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(
        2, description="Worker failures from which a run restarts at its last checkpoint."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="Of row order and of the head's first weights."
    )

    @field_validator("class_weight", mode="before")
    @classmethod
    def _class_weight_is_known(cls, value: Any) -> Any:
        """One sentence, where the union's two branches would each give one."""
        if not isinstance(value, dict) and value not in ("none", "balanced"):
            raise ValueError(f"none, balanced or a mapping of label to weight, got {value!r}")
        for label, weight in value.items() if isinstance(value, dict) else ():
            if not isinstance(weight, int | float) or not 0 < weight < math.inf:
                raise ValueError(f"the weight of {label} must be a number above 0, got {weight!r}")
        return value

    @model_validator(mode="after")
    def _hard_labels_stay_hard(self) -> Training:
        if self.hard_labels and self.temperature != 1:
            raise ValueError("hard_labels has no distribution to soften: leave temperature at 1")
        return self

    @model_validator(mode="after")
    def _workers_are_ordered(self) -> Training:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(
                f"min_workers ({self.min_workers}) must not exceed workers ({self.workers})"
            )
        return self

    @model_validator(mode="after")
    def _compiles_whole_students(self) -> Training:
        if self.parallel == "fsdp" and self.compile:
            raise ValueError("compile goes with parallel: ddp")
        return self

    @model_validator(mode="after")
    def _uld_is_of_ranks(self) -> Training:
        if self.divergence != "uld":
            return self
        if self.temperature != 1 or self.tail != "bucket":
            raise ValueError("divergence: uld goes with temperature: 1 and tail: bucket")
        if not 0 < self.cross_entropy < 1:
            raise ValueError(
                "divergence: uld compares sorted probabilities and does not know which token is "
                f"which: give cross_entropy a share between 0 and 1, got {self.cross_entropy:g}"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Training:
        if self.batch_size % self.workers:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of workers ({self.workers})"
            )
        return self

    def resources(self) -> dict[str, float]:
        """What must be there before the first step, by Ray's names."""
        n = self.min_workers or self.workers
        return {"CPU": n * self.cpus_per_worker, "GPU": n * self.gpus_per_worker}

    def decisive(self) -> dict[str, Any]:
        """The settings that decide what is learned, but for rounding and the draws of dropout.

        The others may change between two starts of a run.
        """
        # Those from before there was a norm are the same without.
        later = {"max_grad_norm"} if self.max_grad_norm is None else set()
        return self.model_dump(mode="json", exclude=_WHERE_AND_HOW | later)


_WHERE_AND_HOW = {
    "workers", "min_workers", "parallel", "cpus_per_worker", "gpus_per_worker", "node_labels",
    "accumulate", "activation_checkpointing", "compile", "checkpoint_every_s", "max_failures",
    "trackers",
}  # fmt: skip
