"""The rule by which a replica answers: while it is not known how strict it must be;
and how its student reads long texts."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from journeyman.cascade.policy import Decision, Escalation
from serve import loading, students
from serve.students import Encoders, Rule, classifiers
from tests.serve import tiny


def by_student(decisions: Sequence[Decision | Escalation]) -> list[bool]:
    return [isinstance(decision, Decision) for decision in decisions]


def test_a_rule_that_is_held_answers_nothing_until_it_is_told(run: tiny.Run):
    loaded = loading.load(run.bundle_dir)
    rule, changes = Rule(loaded), []
    student = Encoders(loaded, classifiers(loaded), rule)
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


def test_one_long_text_among_many_short_ones_is_read_by_itself(
    run: tiny.Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(students, "_TOKENS_A_PASS", 32)
    loaded = loading.load(run.bundle_dir)
    cascade = loaded.recipe.cascade.model_copy(update={"max_batch_tokens": 16})
    loaded = replace(loaded, recipe=loaded.recipe.model_copy(update={"cascade": cascade}))
    [classifier] = classifiers(loaded)
    shapes: list[tuple[int, ...]] = []
    classifier.model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    short, long = "book a flight", " ".join(["please"] * 60)

    async def test() -> None:
        student = Encoders(loaded, [classifier], Rule(loaded))
        student.start()
        await student.submit([long, *[short] * 31])
        await student.close()

    asyncio.run(test())
    assert shapes[0] == (1, 32), "cut at what the student reads"
    assert sum(rows for rows, _ in shapes[1:]) == 31
    assert {length for _, length in shapes[1:]} == {5}
    assert max(rows for rows, _ in shapes) == 4, "of four tokens each, by their characters"
