"""Several students that are asked in turn, on test rows: who answers, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from journeyman.certify.bundle import PolicyBundle
from journeyman.certify.parts import Stages
from journeyman.certify.thresholds import read_threshold
from journeyman.report.data import TestRows
from journeyman.report.tables import NOTHING, Table, rate_and_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class OfStage:
    """One of several students, or at last the teacher, on test rows.

    Attributes:
        n_asked: rows that come to it.
        n_accepted: those that it answers.
        n_differs: of these, otherwise than the teacher.
        cost: of a row that comes to it.
    """

    n_asked: int
    n_accepted: int
    n_differs: int
    cost: float
    is_teacher: bool = False


def of_stages(rows: TestRows, stages: Stages) -> tuple[OfStage, ...]:
    """Every student in turn, and the teacher."""
    assert rows.stage is not None, "the rows of a bundle with stages say to whom they go"
    found, escalated = [], ~rows.accepted
    for i, student in enumerate(stages.students):
        answered = rows.accepted & (rows.stage == i)
        found.append(
            OfStage(
                n_asked=int((rows.stage >= i).sum()),
                n_accepted=int(answered.sum()),
                n_differs=int((answered & rows.differs).sum()),
                cost=student.cost,
            )
        )
    n = int(escalated.sum())
    teacher = OfStage(
        n_asked=n, n_accepted=n, n_differs=0, cost=stages.teacher_cost, is_teacher=True
    )
    return (*found, teacher)


def expected_cost(stages: Sequence[OfStage]) -> float:
    """Mean of a row: it pays for all that it comes to."""
    return sum(one.n_asked * one.cost for one in stages) / stages[0].n_asked


def table(bundle: PolicyBundle, rows: TestRows) -> Table | None:
    """Several students in turn, and the teacher behind them; None where there is one."""
    if bundle.stages is None:
        return None
    seen, n = of_stages(rows, bundle.stages), bundle.served.n
    lines = []
    for place, (one, came) in enumerate(zip(bundle.stages.students, seen, strict=False), start=1):
        threshold = read_threshold(one.threshold)
        own = NOTHING if one.guarantee is None else f"{one.guarantee.upper_bound:.2%}"
        lines.append(
            (
                f"{place}: {one.student}",
                f"{one.score.replace('_', ' ')} above {threshold:.4g}",
                f"{one.cost:.3g}",
                f"{one.n_accepted / n:.1%}",
                f"{one.errors:,}",
                own,
                f"{came.n_accepted / len(rows):.1%}",
                *rate_and_interval(came.n_differs, len(rows)),
            )
        )
    escalated = 1 - sum(one.n_accepted for one in bundle.stages.students) / n
    lines.append(
        (f"{len(seen)}: the teacher", NOTHING, f"{bundle.stages.teacher_cost:.3g}",
         f"{escalated:.1%}", NOTHING, NOTHING, f"{seen[-1].n_accepted / len(rows):.1%}",
         NOTHING, NOTHING)
    )  # fmt: skip
    seconds = bundle.stages.cost_unit == "seconds"
    return Table(
        caption="Who is asked, in this order, until one is sure enough. A request costs "
        f"{bundle.stages.expected_cost:.3g} in the mean on certify rows and "
        f"{expected_cost(seen):.3g} on {len(rows):,} test rows"
        + (", in seconds as they were measured." if seconds else ", in the recipe's unit.")
        + " Errors are answers that differ from the teacher's; on test, of all rows, with exact "
        "95% intervals.",
        columns=("who", "answers", "cost", "answered", "errors", "proved of it alone",
                 "answered on test", "differs on test", "interval"),
        rows=tuple(lines),
        n_words=2,
    )  # fmt: skip
