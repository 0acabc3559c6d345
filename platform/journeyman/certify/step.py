"""The certify step: a student, its labels and a recipe in; a policy bundle out.

``calibrate`` rows fit the temperature and pick the score, ``certify`` rows carry the guarantee,
``test`` rows are scored for the report and decide nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from journeyman import files
from journeyman.certify import bundle as bundles
from journeyman.certify.bundle import Guarantee, PolicyBundle
from journeyman.certify.calibration import Calibrator, fit_temperature
from journeyman.certify.certificate import Certificate, certify_system_agreement
from journeyman.certify.curve import cost_quality_curve
from journeyman.certify.design import ScoreChoice, choose_score, walk_start
from journeyman.certify.ledger import LedgerEntry, rows_digest, spend
from journeyman.certify.recommendation import recommend
from journeyman.certify.scores import score
from journeyman.certify.selective import certify_selective_agreement
from journeyman.errors import DataError
from journeyman.labels.dataset import ClassRows
from journeyman.models import Model
from journeyman.recipe import Certify, Recipe
from journeyman.teacher.tasks import prompt_digest

RECIPE_FILE = "recipe.json"
SCORED_FILE = "test.npz"
_MIN_FORECAST_ROWS = 1000


class StudentScorer(Protocol):
    """What certification needs of a student: see ``student.models.Classifier``."""

    def logits(self, texts: Sequence[str], batch_size: int = 32) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRows:
    """Rows as teacher and student see them.

    teacher: float64[n, c], probabilities, prior corrected; logits: float32[n, c], the student's.
    """

    rows: ClassRows
    logits: npt.NDArray[np.float32]

    @property
    def teacher(self) -> npt.NDArray[np.float64]:
        return np.exp(self.rows.logprobs)

    @property
    def differs(self) -> npt.NDArray[np.bool_]:
        return np.asarray(self.logits.argmax(axis=1) != self.rows.logprobs.argmax(axis=1))

    def right(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]] | None:
        """Student's and teacher's answers against gold, bool[n] each; None unless all have it."""
        gold = self.rows.gold
        if not len(gold) or (gold < 0).any():
            return None
        return self.logits.argmax(axis=1) == gold, self.rows.logprobs.argmax(axis=1) == gold


def certify(
    recipe: Recipe,
    rows: ClassRows,
    log_prior: Sequence[float] | None,
    scorer: StudentScorer,
    student: Model,
    teacher: Model,
    out_dir: Path,
    *,
    inputs: str,
) -> PolicyBundle:
    """Write a bundle for this student; rows: of calibrate, certify and test.

    inputs: digest of all that the bundle is made of, for the step's manifest.
    Raises DataError: an empty split, or certify rows whose delta is spent.
    """
    started = time.monotonic()
    parts = {name: _scored(rows, name, scorer) for name in ("calibrate", "certify", "test")}
    settings, certified = recipe.certify, parts["certify"]
    calibrator, choice = _design(settings, parts["calibrate"], len(certified.rows))
    ledger = _spend(settings, certified.rows.ids, student, out_dir)
    confidence = score(calibrator.probabilities(certified.logits), choice.name)
    n_calibrate = len(parts["calibrate"].rows)
    certificate = _certificate(settings, confidence, certified.differs, choice, n_calibrate)
    curve = cost_quality_curve(confidence, certified.differs, *(certified.right() or ()))
    bundle = PolicyBundle(
        student=student.reference,
        teacher=teacher.reference,
        student_digest=student.weights_digest,
        teacher_digest=teacher.weights_digest,
        student_tokenizer_digest=student.tokenizer_digest,
        teacher_tokenizer_digest=teacher.tokenizer_digest,
        prompt_digest=prompt_digest(recipe.classes()),
        label_names=rows.labels,
        score=choice.name,
        temperature=calibrator.temperature,
        teacher_log_prior=None if log_prior is None else tuple(log_prior),
        threshold=certificate.threshold,
        served_guarantee=settings.guarantee,
        guarantees=(Guarantee.from_certificate(certificate),),
        curve=curve.to_points(keep=certificate.threshold),
        student_accuracy=curve.student_accuracy,
        teacher_accuracy=curve.teacher_accuracy,
        ledger=ledger,
        recommendation=recommend(certificate, *(parts["calibrate"].right() or ())),
    )
    with files.replaced_directory(out_dir) as fresh:
        bundles.save(bundle, fresh)
        files.write_json(fresh / RECIPE_FILE, recipe.model_dump(mode="json"))
        np.savez(fresh / SCORED_FILE, logits=parts["test"].logits)
        seconds = round(time.monotonic() - started, 3)
        manifest = {"inputs": inputs, "bundle": bundle.bundle_id, "seconds": seconds}
        files.write_json(fresh / "manifest.json", {"step": "certify", **manifest})
    return bundle


def read_test_logits(bundle_dir: Path) -> npt.NDArray[np.float32]:
    """float32[n, c]: the student's logits on test rows, in corpus order."""
    try:
        with np.load(bundle_dir / SCORED_FILE) as arrays:
            return np.asarray(arrays["logits"], dtype=np.float32)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{bundle_dir / SCORED_FILE}: cannot be read ({error}); run journeyman certify again."
        ) from error


def _scored(rows: ClassRows, split: str, scorer: StudentScorer) -> ScoredRows:
    part = rows.split(split)
    if not len(part):
        raise DataError(
            f"split {split} has no labeled rows; give it some with corpus.split_map or "
            "corpus.shares."
        )
    return ScoredRows(rows=part, logits=scorer.logits(part.texts))


def _design(
    settings: Certify, calibrate: ScoredRows, n_certify: int
) -> tuple[Calibrator, ScoreChoice]:
    """What calibrate rows decide: the temperature and the confidence score."""
    # Fitted on the teacher's answers: a probability then says how likely the two agree.
    answers = calibrate.rows.logprobs.argmax(axis=1)
    calibrator = Calibrator(temperature=fit_temperature(calibrate.logits, answers))
    choice = choose_score(
        calibrator.probabilities(calibrate.logits),
        calibrate.differs,
        settings.alpha,
        settings.delta,
        n_certify,
        settings.guarantee,
        settings.scores,
    )
    return calibrator, choice


def _certificate(
    settings: Certify,
    confidence: npt.NDArray[np.float64],
    differs: npt.NDArray[np.bool_],
    choice: ScoreChoice,
    n_calibrate: int,
) -> Certificate:
    if settings.guarantee == "system_agreement":
        return certify_system_agreement(confidence, differs, settings.alpha, settings.delta)
    # On few calibrate rows the forecast is too rough to narrow the walk by.
    narrow = n_calibrate >= _MIN_FORECAST_ROWS
    start = walk_start(choice.coverage, len(differs), settings.alpha) if narrow else 0
    return certify_selective_agreement(confidence, differs, settings.alpha, settings.delta, start)


def _spend(
    settings: Certify, ids: Sequence[str], student: Model, out_dir: Path
) -> tuple[LedgerEntry, ...]:
    """The ledger with this use of the certify rows, after those of the bundle that stands there."""
    spent = bundles.load(out_dir).ledger if (out_dir / bundles.BUNDLE_FILE).exists() else ()
    entry = LedgerEntry(
        use=f"{settings.guarantee} at {settings.alpha:g}, student {student.weights_digest[:12]}",
        rows_digest=rows_digest(ids),
        delta=settings.delta,
    )
    return spend(spent, entry, settings.max_delta)
