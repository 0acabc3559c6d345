"""The rule by which a replica answers: while it is not known how strict it must be, and of texts
that are longer than any that was certified; and how its student reads long ones."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from journeyman.cascade.answering import Cascade
from journeyman.cascade.policy import Decision, Escalation
from journeyman.cascade.refusals import TeacherUnavailable
from journeyman.columns import packed
from journeyman.recipe import Cascade as Settings
from journeyman.teacher.answers import ClassLabels
from serve import loading, students
from serve.students import Encoders, Rule, readers
from tests.serve import tiny


def loaded_with(run: tiny.Run, **changes: object) -> loading.Loaded:
    """The run's bundle with other fields."""
    loaded = loading.load(run.bundle_dir)
    return replace(loaded, bundle=loaded.bundle.model_copy(update=changes))


def by_student(decisions: Sequence[Decision | Escalation]) -> list[bool]:
    return [isinstance(decision, Decision) for decision in decisions]


def test_a_rule_that_is_held_answers_nothing_until_it_is_told(run: tiny.Run):
    loaded = loading.load(run.bundle_dir)
    rule, changes = Rule(loaded), []
    student = Encoders(loaded, readers(loaded), rule)
    rule.when_changed = lambda: changes.append(rule.policy.accept_above)
    accepts = (run.scores > run.bundle.accept_above).tolist()
    assert by_student(student.decide(tiny.TEXTS)) == accepts and any(accepts)
    rule.hold()
    assert not any(by_student(student.decide(tiny.TEXTS)))
    assert not rule.is_tightened, "nothing has been found yet"
    rule.tighten(run.bundle.accept_above)
    assert by_student(student.decide(tiny.TEXTS)) == accepts
    assert not rule.is_tightened
    stricter = float(np.sort(run.scores[accepts])[0])
    rule.hold()
    rule.tighten(stricter)
    assert rule.is_tightened
    assert sum(by_student(student.decide(tiny.TEXTS))) == sum(accepts) - 1
    rule.tighten(run.bundle.accept_above)  # never looser again
    assert rule.is_tightened
    assert changes == [run.bundle.accept_above, stricter]


class Teacher:
    """Says the first label to all, or is away."""

    def __init__(self, is_away: bool = False) -> None:
        self.asked: list[str] = []
        self.is_away = is_away

    async def labels(self, texts: Sequence[str], hear: object = None) -> list[ClassLabels]:
        self.asked += texts
        if self.is_away:
            raise TeacherUnavailable("away")
        said = np.log(np.array([0.8, 0.1, 0.1], np.float32))
        return [
            ClassLabels(class_logprobs=said, label_mass=None, n_prompt_tokens=9, n_output_tokens=1)
            for _ in texts
        ]


def test_a_text_longer_than_any_that_was_certified_is_the_teachers_however_sure_the_student(
    run: tiny.Run,
):
    accepted = sorted(run.accepted, key=len)
    longest, long = accepted[0], next(text for text in accepted if len(text) > len(accepted[0]))
    loaded = loaded_with(run, longest=len(longest))
    rule, teacher = Rule(loaded), Teacher()

    async def test() -> None:
        student = Encoders(loaded, readers(loaded), rule)
        student.start()
        cascade = Cascade(rule.policy, student, teacher, Settings())
        short, escalated = (await cascade.answer([longest, long])).decisions
        assert (short.answered_by, escalated.answered_by) == ("student", "teacher")
        assert escalated.confidence is None and teacher.asked == [long]
        [alone] = (await cascade.answer([long], "student")).decisions
        assert alone.label and alone.confidence is None
        assert (rule.is_outside(longest), rule.is_outside(long)) == (False, True)
        degrading = Settings(when_teacher_fails="degrade")
        cascade = Cascade(rule.policy, student, Teacher(is_away=True), degrading)
        answers = await cascade.answer([long])
        assert answers.void == {0} and answers.decisions[0].answered_by == "student"
        await student.close()

    asyncio.run(test())


def test_a_bundle_that_does_not_say_how_long_its_rows_were_takes_texts_of_any_length(
    run: tiny.Run,
):
    loaded = loading.load(run.bundle_dir)
    assert loaded.bundle.longest is None
    assert "longest" not in (run.bundle_dir / "bundle.json").read_text()
    rule = Rule(loaded)
    sure = Decision(
        answered_by="student", label="travel", confidence=1.0, probabilities=np.array([0, 1, 0])
    )
    assert rule.within(["x" * 30_000], [sure]) == [sure]


@pytest.mark.parametrize(("passage", "is_within"), [("four", True), ("fives", False)])
def test_all_columns_of_a_row_count(run: tiny.Run, passage: str, is_within: bool):
    """Together, and not what holds them together in one text."""
    columns = ("passage", "text")
    rule = Rule(loaded_with(run, columns=columns, longest=7))
    sure = Decision(
        answered_by="student", label="travel", confidence=1.0, probabilities=np.array([0, 1, 0])
    )
    [decided] = rule.within([packed({"text": "who", "passage": passage}, columns)], [sure])
    assert isinstance(decided, Decision) == is_within


def test_one_long_text_among_many_short_ones_is_read_by_itself(
    run: tiny.Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(students, "_TOKENS_A_PASS", 32)
    loaded = loading.load(run.bundle_dir)
    cascade = loaded.recipe.cascade.model_copy(update={"max_batch_tokens": 16})
    loaded = replace(loaded, recipe=loaded.recipe.model_copy(update={"cascade": cascade}))
    [reader] = readers(loaded)
    shapes: list[tuple[int, ...]] = []
    reader.classifier.model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    short, long = "book a flight", " ".join(["please"] * 60)

    async def test() -> None:
        student = Encoders(loaded, [reader], Rule(loaded))
        student.start()
        await student.submit([long, *[short] * 31])
        await student.close()

    asyncio.run(test())
    assert shapes[0] == (1, 32), "cut at what the student reads"
    assert sum(rows for rows, _ in shapes[1:]) == 31
    assert {length for _, length in shapes[1:]} == {5}
    assert max(rows for rows, _ in shapes) == 4, "of four tokens each, by their characters"
