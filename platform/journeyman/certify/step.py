"""The certify step: a student, its labels and a recipe in; a policy bundle out.

``calibrate`` rows fit the temperature and pick the score, ``certify`` rows carry the guarantee,
``test`` rows are scored for the report and decide nothing.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from journeyman import corpus, files
from journeyman.certify import bundle as bundles
from journeyman.certify.asked import AskedStudent, StudentScorer
from journeyman.certify.bundle import Bundle, Guarantee, PolicyBundle
from journeyman.certify.bundle_recipe import RECIPE_FILE
from journeyman.certify.certificate import Certificate
from journeyman.certify.chain import Chain, Routed
from journeyman.certify.curve import cost_quality_curve
from journeyman.certify.decisions import ScoredRows, decide, design, mix, rows_of
from journeyman.certify.guarantees import ScoredOutcomes
from journeyman.certify.ledger import Ledger
from journeyman.certify.recommendation import caveats, recommend, repeated
from journeyman.certify.several import OneOfSeveral, Several, certify_several
from journeyman.certify.spending import spend_rows, write_beside
from journeyman.columns import n_characters
from journeyman.errors import DataError
from journeyman.folder import Folder
from journeyman.labels.dataset import ClassRows
from journeyman.models import Model
from journeyman.probabilities import IntArray
from journeyman.recipe import Certify, Recipe
from journeyman.student.inputs import Inputs
from journeyman.teacher.tasks import prompt_digest

SCORED_FILE = "test.npz"


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
    n_groups: int | None = None,
    before: Sequence[AskedStudent] = (),
    teacher_seconds: float = 0.0,
    repeats: Mapping[str, int] | None = None,
    shared: Folder | None = None,
) -> PolicyBundle:
    """Write a bundle for this student; rows: of calibrate, certify and test.

    inputs: digest of all that the bundle is made of, for the step's manifest; n_groups: how many
    groups the certify rows are of, None where they are in none; before: students that are asked
    before this one; teacher_seconds: of a row's labeling, where nothing is known 0; repeats: how
    often each row stood in the sources, of those that did more than once; shared: the ledger of the
    runs beside this one.
    Raises DataError: an empty split, certify rows whose delta is spent, or a cost that is missing.
    """
    started = time.monotonic()
    students = (*before, AskedStudent(model=student, scorer=scorer, reads=recipe.learner()))
    seen = [_seen(rows, one) for one in students]
    mixture = None
    if recipe.cascade.combine == "mixture":  # of one student: a recipe with several has none
        mixture, parts = mix(seen[-1].parts)
        seen = [replace(seen[-1], parts=parts)]
    settings = recipe.certify
    decided = _decided(settings, seen, teacher_seconds)
    ledger = spend_rows(
        recipe,
        {split: part.rows.ids for split, part in seen[-1].parts.items()},
        [one.model for one in students],
        (*decided.certificates, *(decided.of_classes or ())),
        out_dir,
        shared,
        *(one.ledger for one in before),
    )
    (calibrate, _), (certified, routed) = (
        _as_one(decided.chain, [one.parts[split] for one in seen])
        for split in ("calibrate", "certify")
    )
    served, several, last = decided.certificates[0], decided.several, decided.chain.confidences[-1]
    curve = cost_quality_curve(routed.confidence, certified.differs, *(certified.right() or ()))
    own, right = last.class_thresholds, calibrate.right_where_known()
    whose = "the mixture's" if mixture else "the teacher's"
    columns = tuple(corpus.prompt_columns(recipe))
    bundle = PolicyBundle(
        **bundles.of_models(student, teacher),
        prompt_digest=prompt_digest(recipe.classes()),
        columns=columns,
        longest=max(n_characters(row, columns) for row in rows.columns),
        label_names=rows.labels,
        score=last.score,
        deferral_head=last.head,
        class_thresholds=None if own is None else tuple(own.tolist()),
        temperature=last.calibrator.temperature,
        teacher_log_prior=None if log_prior is None else tuple(log_prior),
        mixture=mixture,
        threshold=served.threshold,
        served_guarantee=settings.guarantee,
        guarantees=_written(decided.certificates),
        class_guarantees=decided.of_classes and _written(decided.of_classes),
        stages=several and several.written(students, certified.differs),
        curve=curve.to_points(keep=served.threshold),
        student_accuracy=curve.student_accuracy,
        teacher_accuracy=curve.teacher_accuracy,
        ledger=ledger.entries,
        recommendation=recommend(served, right[0], right[1], whose)
        + (several.in_words() if several else "")
        + caveats(served, ledger.delta_promised(certified.rows.ids), n_groups)
        + repeated(
            served,
            times(repeats or {}, certified.rows.ids),
            routed.confidence,
            certified.differs,
        ),
    )
    with files.replaced_directory(out_dir) as fresh:
        np.savez(fresh / SCORED_FILE, *(one.parts["test"].logits for one in seen))
        for i, one in enumerate(before):
            shutil.copytree(one.model.path, fresh / bundles.folder_before(i))
        write_down(bundle, ledger, recipe, fresh, inputs=inputs, started=started)
    return bundle


def write_down(
    bundle: Bundle,
    ledger: Ledger,
    recipe: Recipe,
    folder: Path,
    *,
    inputs: str,
    started: float,
    test: Mapping[str, int] | None = None,
) -> None:
    """A bundle, the rows of its ledger, the recipe that it is served by, and the step's manifest,
    last; started: by ``time.monotonic``; test: what came of the promise, where nothing else keeps
    it."""
    write_beside(ledger, folder)
    bundles.save(bundle, folder)
    files.write_json(folder / RECIPE_FILE, recipe.model_dump(mode="json"))
    files.write_json(
        folder / "manifest.json",
        {
            "step": "certify",
            "inputs": inputs,
            "bundle": bundle.bundle_id,
            "seconds": round(time.monotonic() - started, 3),
            "recommendation": bundle.recommendation,
            **({"test": dict(test)} if test else {}),
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """The rows of each split as one student sees them, and what a certify row took it."""

    parts: dict[str, ScoredRows]
    seconds_a_row: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decided:
    """What is promised, and for which way to answer; of_classes: the promises of each answer;
    several: where there are several students."""

    chain: Chain
    certificates: tuple[Certificate, ...]
    of_classes: tuple[Certificate, ...] | None = None
    several: Several | None = None


def _decided(settings: Certify, seen: Sequence[_Seen], teacher_seconds: float) -> _Decided:
    if len(seen) == 1:
        [one] = seen
        confidence, certificates, of_classes = decide(
            settings, one.parts["calibrate"], one.parts["certify"]
        )
        return _Decided(
            chain=Chain(confidences=(confidence,)), certificates=certificates, of_classes=of_classes
        )
    measured = [*(one.seconds_a_row for one in seen), teacher_seconds]
    several = certify_several(settings, [_one_of_several(settings, one) for one in seen], measured)
    return _Decided(chain=several.chain, certificates=(several.certificate,), several=several)


def _one_of_several(settings: Certify, seen: _Seen) -> OneOfSeveral:
    certified = seen.parts["certify"]
    found = design(settings, seen.parts["calibrate"], certified.outcomes)
    scores = found.confidence.of(certified.logits)[1]
    return OneOfSeveral(
        confidence=found.confidence,
        calibrate=found.scored,
        certify=ScoredOutcomes(scores=scores, outcomes=certified.outcomes),
    )


def _as_one(chain: Chain, parts: Sequence[ScoredRows]) -> tuple[ScoredRows, Routed]:
    """Rows as all students together see them: each with the logits of the one that it goes to."""
    routed = chain.of([part.logits for part in parts])
    logits = np.stack([part.logits for part in parts])
    return replace(parts[-1], logits=logits[routed.stage, np.arange(len(routed.stage))]), routed


def _written(certificates: Sequence[Certificate]) -> tuple[Guarantee, ...]:
    return tuple(map(Guarantee.from_certificate, certificates))


def times(repeats: Mapping[str, int], ids: Sequence[str]) -> IntArray:
    """int64[n]: how often each row stood in the sources; repeats: of those that did again."""
    return np.array([repeats.get(row_id, 1) for row_id in ids], dtype=np.int64)


def read_test_logits(bundle_dir: Path) -> list[npt.NDArray[np.float32]]:
    """float32[n, c] of each student in turn: its logits on test rows, in corpus order."""
    try:
        with np.load(bundle_dir / SCORED_FILE) as arrays:
            return [np.asarray(arrays[name], dtype=np.float32) for name in arrays.files]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{bundle_dir / SCORED_FILE}: cannot be read ({error}); run journeyman certify again."
        ) from error


def _seen(rows: ClassRows, student: AskedStudent) -> _Seen:
    inputs, parts, seconds = Inputs(student.reads), {}, 0.0
    for name in ("calibrate", "certify", "test"):
        part = rows_of(rows, name)
        began = time.monotonic()
        parts[name] = ScoredRows(rows=part, logits=student.scorer.logits(inputs.all(part.columns)))
        if name == "certify":  # the first batches of all are slow
            seconds = time.monotonic() - began
    return _Seen(parts=parts, seconds_a_row=seconds / len(parts["certify"].rows))
