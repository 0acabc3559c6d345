"""A bundle of two students in turn, beside that of ``tiny``."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from journeyman import models
from journeyman.certify import bundle as bundles
from journeyman.certify.bundle import Guarantee, PolicyBundle
from journeyman.certify.calibration import Calibrator
from journeyman.certify.parts import Stage, Stages
from journeyman.certify.scores import score
from journeyman.student.models import Classifier
from tests.serve import tiny

SMALL_TEMPERATURE = 0.8
LEFT_TO_TEACHER = 12  # of TEXTS


@dataclass(frozen=True)
class Several:
    """A bundle that asks a small student first, beside the run's own of one student.

    by: of each text who answers it, from 0, 2 being the teacher; confidence, labels: of the student
    that it goes to.
    """

    folder: Path
    by: list[int]
    confidence: list[float]
    labels: list[str]

    @property
    def bundle(self) -> PolicyBundle:
        return bundles.load(self.folder)


def write(run: tiny.Run) -> Several:
    folder = run.folder / "several"
    small = folder / bundles.folder_before(0)
    tiny.write_student(small, seed=2)
    logits = [Classifier.load(small).logits(tiny.TEXTS), run.logits]
    temperatures = (SMALL_TEMPERATURE, tiny.TEMPERATURE)
    scores = [score(Calibrator(temperature=t).probabilities(own), "margin")
              for t, own in zip(temperatures, logits, strict=True)]  # fmt: skip
    first = float(np.sort(scores[0])[24:26].mean())  # fifteen of forty
    left = np.sort(scores[1][scores[0] <= first])
    thresholds = (first, float(left[LEFT_TO_TEACHER - 1 : LEFT_TO_TEACHER + 1].mean()))
    by, confidence, labels = [], [], []
    for i in range(len(tiny.TEXTS)):
        place = next((s for s in (0, 1) if scores[s][i] > thresholds[s]), 2)
        asked = min(place, 1)
        by.append(place)
        confidence.append(float(scores[asked][i] - thresholds[asked]))
        labels.append(tiny.LABELS[int(logits[asked][i].argmax())])
    write_bundle(run, folder, thresholds, by)
    return Several(folder, by, confidence, labels)


def write_bundle(
    run: tiny.Run, folder: Path, thresholds: tuple[float, float], by: list[int]
) -> None:
    small, n_accepted = folder / bundles.folder_before(0), sum(place < 2 for place in by)
    students = [models.resolve(str(folder)) for folder in (small, run.folder / "student")]
    stages = [
        Stage(
            student=model.reference,
            student_digest=model.weights_digest,
            student_tokenizer_digest=model.tokenizer_digest,
            text="{{ text }}",
            score="margin",
            temperature=temperature,
            threshold=threshold,
            n_accepted=by.count(i),
            errors=0,
            cost=1.0,
        )
        for i, (model, temperature, threshold) in enumerate(
            zip(students, (SMALL_TEMPERATURE, tiny.TEMPERATURE), thresholds, strict=True)
        )
    ]
    one = tiny.a_bundle(run.folder, run.recipe, 0.0)
    served: Guarantee = one.served.model_copy(update={"n_accepted": n_accepted})
    in_turn = Stages(students=tuple(stages), teacher_cost=9.0, cost_unit="given", expected_cost=3.0)
    bundle = PolicyBundle(
        **one.model_dump(exclude={"guarantees", "stages"}), guarantees=(served,), stages=in_turn
    )
    bundles.save(bundle, folder)
    shutil.copy(run.bundle_dir / "recipe.json", folder / "recipe.json")
