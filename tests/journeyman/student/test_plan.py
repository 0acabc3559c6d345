"""When a run evaluates, and when it gives up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from journeyman.recipe import Training
from journeyman.student.checkpoints import Evaluation
from journeyman.student.plan import Plan


def plan(per_epoch: int = 10, epochs: int = 3, **training: object) -> Plan:
    settings = Training.model_validate({"epochs": epochs, **training})
    return Plan.of(settings, per_epoch * epochs)


def evaluations(agreements: list[float]) -> list[Evaluation]:
    return [
        Evaluation(epoch=1, step=i, agreement=a, kl=0.5, n_rows=9)
        for i, a in enumerate(agreements, 1)
    ]


def test_evaluates_at_each_epochs_end_unless_told_otherwise() -> None:
    assert [s for s in range(1, 31) if plan().evaluates(s)] == [10, 20, 30]
    assert [s for s in range(1, 31) if plan(evaluate_every=8).evaluates(s)] == [8, 16, 24, 30]
    assert [s for s in range(1, 31) if plan(evaluate_every=99).evaluates(s)] == [30]


def test_steps_belong_to_epochs() -> None:
    assert [plan().epoch(s) for s in (1, 10, 11, 20, 21, 30)] == [1, 1, 2, 2, 3, 3]


@given(st.lists(st.sampled_from([0.5, 0.6, 0.7]), min_size=1, max_size=12), st.integers(1, 4))
def test_gives_up_after_as_many_evaluations_without_a_better_one(
    agreements: list[float], patience: int
) -> None:
    best, waited = -1.0, 0
    for agreement in agreements:
        waited = 0 if agreement > best else waited + 1
        best = max(best, agreement)
    asked = plan(per_epoch=100, patience=patience).gives_up(evaluations(agreements))
    assert asked == (waited >= patience)


def test_the_last_step_and_a_run_without_patience_end_nothing_early() -> None:
    same = evaluations([0.5] * 30)
    assert not plan().gives_up(same[:20])
    assert plan(patience=2).gives_up(same[:20]) and not plan(patience=2).gives_up(same)
