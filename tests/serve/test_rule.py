"""The rule by which a replica answers, while it is not known how strict it must be."""

from collections.abc import Sequence

import numpy as np

from journeyman.cascade.policy import Decision, Escalation
from serve import loading
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
