"""A cascade of several students, as a recipe asks for it: against routing row by row."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from journeyman import recipe
from journeyman.cascade.policy import Decision, Policy
from journeyman.certify import bundle as bundles
from journeyman.certify.asked import AskedStudent
from journeyman.certify.bundle import PolicyBundle
from journeyman.certify.calibration import Calibrator
from journeyman.certify.certificate import certify_system_agreement
from journeyman.certify.ledger import Ledger, LedgerEntry, rows_digest, together
from journeyman.certify.scores import ScoreName, score
from journeyman.certify.step import certify, read_test_logits
from journeyman.errors import BundleMismatch, DataError, RecipeError
from journeyman.labels.dataset import ClassRows
from journeyman.models import Model
from tests.journeyman.certify.test_step import DEMO, LABELS, Scorer

N = {"calibrate": 300, "certify": 700, "test": 60}
COSTS = "certify.stage_costs=[1, 5, 100]"


def some_rows(*skills: float) -> tuple[ClassRows, list[np.ndarray]]:
    """Rows of a teacher, and the logits of students with these skills, float32[n, 4] each."""
    rng = np.random.default_rng(0)
    n = sum(N.values())
    gold = rng.integers(0, 4, n)
    hard = rng.normal(size=(n, 4))

    def logits(skill: float) -> np.ndarray:
        return skill * np.eye(4)[gold] + hard + 0.6 * rng.normal(size=(n, 4))

    teacher = logits(2.8)
    rows = ClassRows(
        labels=LABELS,
        ids=[f"{i:032x}" for i in range(n)],
        texts=[str(i) for i in range(n)],
        splits=np.array([name for name, k in N.items() for _ in range(k)], dtype=object),
        gold=gold,
        logprobs=teacher - np.logaddexp.reduce(teacher, axis=1, keepdims=True),
    )
    return rows, [logits(skill).astype(np.float32) for skill in skills]


def a_model(folder: Path, name: str) -> Model:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "config.json").write_text(f'{{"of": "{name}"}}')
    return Model(reference=name, path=folder / name, weights_digest=name, tokenizer_digest="t",
                 size_bytes=1)  # fmt: skip


def certified(
    folder: Path,
    rows: ClassRows,
    students: list[np.ndarray],
    *overrides: str,
    ledger: tuple[LedgerEntry, ...] = (),
    teacher_seconds: float = 0.0,
) -> PolicyBundle:
    names = [f"runs/{i}" for i in range(len(students) - 1)]
    wanted = ["certify={alpha: 0.1, besides: []}", *([f"certify.before={names}"] if names else [])]
    settings = recipe.load(DEMO, [*wanted, *overrides])
    before = [
        AskedStudent(
            model=a_model(folder, f"before-{i}"),
            scorer=Scorer(logits),
            reads=settings.learner(),
            ledger=Ledger(entries=ledger),
        )
        for i, logits in enumerate(students[:-1])
    ]
    return certify(
        settings,
        rows,
        None,
        Scorer(students[-1]),
        a_model(folder, "own"),
        a_model(folder, "teacher"),
        folder / "bundle",
        inputs="i",
        before=before,
        teacher_seconds=teacher_seconds,
    )


def score_of(logits: np.ndarray, temperature: float, name: ScoreName) -> float:
    """Of one row by itself."""
    return float(score(Calibrator(temperature=temperature).probabilities(logits[None]), name)[0])


@pytest.mark.parametrize("skills", [(1.2, 2.2), (1.0, 1.8, 2.4)])
@pytest.mark.parametrize("each", [False, True])
def test_rows_go_to_the_first_student_that_is_sure_and_served_as_certified(tmp_path, skills, each):
    rows, students = some_rows(*skills)
    costs = [1.0, 5.0, 20.0, 100.0][-len(skills) - 1 :]
    made = certified(
        tmp_path, rows, students, "certify.scores=[margin,entropy]", f"certify.stage_costs={costs}",
        f"certify.each_stage={str(each).lower()}", "certify.alpha=0.14",
    )  # fmt: skip
    bundle = bundles.load(tmp_path / "bundle")
    assert bundle == made and bundle.bundle_id == made.bundle_id and bundle.stages is not None
    stages, policy = bundle.stages, Policy.from_bundle(bundle)
    answered, errors, paid = [0] * len(skills), [0] * len(skills), 0.0
    teacher = rows.logprobs.argmax(axis=1)
    for row in np.flatnonzero(rows.splits == "certify"):
        place = None
        for i, stage in enumerate(stages.students):
            paid += costs[i]
            above = math.inf if stage.threshold is None else stage.threshold
            if score_of(students[i][row], stage.temperature, stage.score) > above:
                place = i
                break
        decided = policy.decide_batch(students[0][row][None], 0)[0]
        for i in range(1, len(skills)):
            if policy.goes_on(decided, i - 1):
                decided = policy.decide_batch(students[i][row][None], i)[0]
        if place is None:
            paid += costs[-1]
            assert not isinstance(decided, Decision)
            assert decided.student is not None and decided.student.stage == len(skills)
            continue
        answered[place] += 1
        errors[place] += int(students[place][row].argmax() != teacher[row])
        assert isinstance(decided, Decision) and decided.stage == place + 1
        assert decided.label == LABELS[students[place][row].argmax()]
    assert [stage.n_accepted for stage in stages.students] == answered and all(answered)
    assert [stage.errors for stage in stages.students] == errors
    assert stages.expected_cost == pytest.approx(paid / N["certify"])
    served = bundle.served
    assert (served.n_accepted, served.errors) == (sum(answered), sum(errors))
    assert served.upper_bound <= 0.14 and sum(errors) <= served.k_star
    assert "asked in turn" in bundle.recommendation and len(bundle.ledger) == 1
    if each:
        for logits, stage in zip(students, stages.students, strict=True):
            certify_rows = rows.splits == "certify"
            scores = np.array([score_of(row, stage.temperature, stage.score)
                               for row in logits[certify_rows]])  # fmt: skip
            differs = (logits.argmax(axis=1) != teacher)[certify_rows]
            k = len(skills)
            alone = certify_system_agreement(scores, differs, 0.14 / k, 0.1 / k)
            assert stage.guarantee is not None and stage.guarantee.delta == 0.1 / k
            assert stage.guarantee.n_accepted == alone.n_accepted
            assert stage.threshold == alone.threshold


def test_test_rows_and_the_students_before_are_kept_with_the_bundle(tmp_path):
    rows, students = some_rows(1.2, 2.2)
    certified(tmp_path, rows, students, COSTS)
    kept = read_test_logits(tmp_path / "bundle")
    of_test = rows.splits == "test"
    for logits, found in zip(students, kept, strict=True):
        np.testing.assert_array_equal(found, logits[of_test])
    copied = tmp_path / "bundle" / bundles.folder_before(0) / "config.json"
    assert copied.read_text() == '{"of": "before-0"}'


def test_one_student_is_written_as_it_was_before_there_could_be_several(tmp_path):
    rows, students = some_rows(2.2)
    bundle = certified(tmp_path, rows, students)
    assert bundle.stages is None and bundle.before == ()
    assert "stages" not in json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    content = bundle.model_dump(mode="json")
    assert "stages" not in content and bundles.load(tmp_path / "bundle") == bundle


def test_one_promise_over_the_whole_costs_less_than_one_for_each(tmp_path):
    rows, students = some_rows(1.2, 2.2)
    whole = certified(tmp_path / "whole", rows, students, COSTS)
    each = certified(tmp_path / "each", rows, students, COSTS, "certify.each_stage=true")
    assert whole.stages is not None and each.stages is not None
    assert whole.stages.expected_cost < each.stages.expected_cost < 100


def test_a_stricter_threshold_sends_to_the_teacher_and_to_no_other_student(tmp_path):
    rows, students = some_rows(1.2, 2.2)
    policy = Policy.from_bundle(certified(tmp_path, rows, students, COSTS))
    decided = policy.decide_batch(students[0], 0)
    confidence = np.array([d.confidence for d in decided if isinstance(d, Decision)])
    stricter = policy.tightened(float(np.median(confidence)))
    again = stricter.decide_batch(students[0], 0)
    answered = [isinstance(d, Decision) for d in again]
    assert 0 < sum(answered) < len(confidence)
    for before, after in zip(decided, again, strict=True):
        was = policy.goes_on(before, 0)
        assert stricter.goes_on(after, 0) == was
        assert was != isinstance(before, Decision)
    assert not any(map(isinstance, policy.tightened(math.inf).decide_batch(students[1], 1),
                       [Decision] * len(students[1])))  # fmt: skip


def test_what_the_other_runs_spent_of_the_same_rows_counts_once(tmp_path):
    rows, students = some_rows(1.2, 2.2)
    digest = rows_digest(rows.split("certify").ids)
    of_its_run = LedgerEntry(
        use="system_agreement at 0.1, student a", rows_digest=digest, delta=0.2
    )
    first = certified(tmp_path, rows, students, COSTS, ledger=(of_its_run,))
    assert [entry.delta for entry in first.ledger] == [0.2, 0.1]
    assert "holds together with confidence 0.7" in first.recommendation
    again = certified(tmp_path, rows, students, COSTS, ledger=(of_its_run,))
    assert again.ledger == first.ledger
    other = certified(tmp_path, rows, students, COSTS, "certify.alpha=0.2", ledger=(of_its_run,))
    assert [entry.delta for entry in other.ledger] == [0.2, 0.1, 0.1]
    assert first.ledger[1].use == "system_agreement at 0.1, student own behind before-0"
    with pytest.raises(DataError, match=r"have spent 0\.45 of 0\.5 on"):
        more = (of_its_run.model_copy(update={"delta": 0.25}),)
        certified(tmp_path / "other", rows, students, COSTS, "certify.delta=0.2", ledger=(
            *more, of_its_run))  # fmt: skip


def test_ledgers_are_put_together_in_order_and_a_use_that_is_in_both_is_one():
    a, b, c = (LedgerEntry(use=use, rows_digest="r", delta=0.1) for use in "abc")
    assert together((a, b, a), (a, c), (a, a, c)) == (a, b, a, c)
    assert together((), (a, a)) == (a, a) and together((b, a, b)) == (b, a, b)


def test_costs_are_measured_unless_they_are_given_and_refused_where_none_could_pay(tmp_path):
    rows, students = some_rows(1.2, 2.2)
    measured = certified(tmp_path, rows, students, teacher_seconds=1000.0)
    assert measured.stages is not None and measured.stages.cost_unit == "seconds"
    assert measured.stages.teacher_cost == 1000.0
    with pytest.raises(DataError, match=r"no student would be worth asking.*certify\.stage_costs"):
        certified(tmp_path / "none", rows, students, teacher_seconds=0.0)


def test_too_few_rows_escalate_everything(tmp_path):
    rows, students = some_rows(1.2, 2.2)
    bundle = certified(tmp_path, rows, students, COSTS, "certify.alpha=0.001")
    assert bundle.threshold is None and bundle.stages is not None
    assert [stage.threshold for stage in bundle.stages.students] == [None, None]
    assert bundle.stages.expected_cost == 106
    decided = Policy.from_bundle(bundle).decide_batch(students[1])
    assert not any(isinstance(one, Decision) for one in decided)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("certify.guarantee=accuracy", "before goes with guarantee: system_agreement alone"),
        ("certify.per_class=true", "before goes with guarantee: system_agreement alone"),
        ("certify.stage_costs=[1, 2]", "stage_costs has 2 numbers for 2 students and the teacher"),
        ("certify.before=[a, a]", "before names a run twice"),
        ("cascade.combine=mixture", "certify.before goes with cascade.combine: teacher"),
    ],
)
def test_settings_that_do_not_go_together_are_one_sentence(override, words):
    with pytest.raises(RecipeError, match=words) as caught:
        recipe.load(DEMO, ["certify={alpha: 0.1, before: [runs/a]}", override])
    assert "\n" not in str(caught.value)


def test_stages_that_are_not_the_bundles_own_are_refused(tmp_path):
    rows, students = some_rows(1.2, 2.2)
    content = certified(tmp_path, rows, students, COSTS).model_dump(mode="json")
    content["temperature"] = 1.5
    bundle_id = bundles.content_digest(content)
    path = tmp_path / "bundle" / "bundle.json"
    path.write_text(json.dumps({"bundle_id": bundle_id, **content}))
    with pytest.raises(BundleMismatch, match="`temperature` is not that of the last of `stages`"):
        bundles.load(tmp_path / "bundle")
