"""The page's first words: who is better, who answers, what is promised, what came of it.

Every sentence is chosen by the numbers; none says more than they do.
"""

from __future__ import annotations

from dataclasses import dataclass

from journeyman.certify.bundle import Bundle, Guarantee, PolicyBundle
from journeyman.report.measure import (
    BROKEN,
    AgainstGold,
    Measured,
    chance_of_as_many,
    chance_of_drop,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Plain words.

    Attributes:
        headline: one sentence.
        sentences: what a reader must know, in order.
        warning: title and text of what argues against the promise; None if nothing does.
    """

    headline: str
    sentences: tuple[str, ...]
    warning: tuple[str, str] | None


def verdict(measured: Measured, bundle: Bundle) -> Verdict:
    """Put the test rows and the certificate into words."""
    guarantee = bundle.served
    return Verdict(
        headline=_headline(measured),
        sentences=(
            _who_is_right(measured),
            _who_answers(measured, guarantee),
            *_both(bundle),
            *_several(bundle),
            _promise(guarantee),
            *_others(bundle),
            _realised(measured, guarantee),
            *_realised_of_each(measured, bundle),
        ),
        warning=_warning(measured, guarantee),
    )


def share(count: int, n: int) -> str:
    """`5.5% (22 of 400)`."""
    return f"{count / n:.1%} ({count:,} of {n:,})" if n else "none (0 of 0)"


def percent(rate: float) -> str:
    """`10%`, `2.5%`: as many digits as a person would write."""
    return f"{100 * rate:.4g}%"


def beside_teacher(gold: AgainstGold) -> str:
    """`+3.0% (+0.1% to +5.9%), better`: the student's share of right answers less its teacher's."""
    low, high = gold.lead_interval
    words = "too close to tell"
    if gold.student_is_better:
        words = "better"
    elif gold.teacher_is_better:
        words = "worse"
    return f"{gold.lead:+.1%} ({low:+.1%} to {high:+.1%}), {words}"


def realised_of_each(
    measured: Measured, bundle: PolicyBundle
) -> tuple[tuple[str, Guarantee, int, int], ...]:
    """Label, promise, and what it bounds on test rows (how many of how many) of each answer that
    has a promise of its own, the worst first; empty where there are none."""
    promised = zip(
        bundle.label_names, bundle.class_guarantees or (), measured.by_answer, strict=False
    )
    known = [
        (label, own, *seen.risk(own.kind))
        for label, own, seen in promised
        if own.feasible and seen.risk(own.kind)[1]
    ]
    return tuple(sorted(known, key=lambda one: -one[2] / one[3]))


def promised_words(guarantee: Guarantee) -> str:
    """What the guarantee bounds, as a clause."""
    at_most = f"at most {percent(guarantee.alpha)} of"
    if guarantee.kind == "system_agreement":
        return (
            f"{at_most} all requests are answered by the student otherwise than its teacher would "
            "have answered them"
        )
    if guarantee.kind == "accuracy":
        return (
            f"against gold, the cascade is right on at most {percent(guarantee.alpha)} of all "
            "requests fewer than its teacher alone would be"
        )
    return (
        f"{at_most} the requests that the student answers would have been answered otherwise by "
        "its teacher"
    )


def _headline(measured: Measured) -> str:
    gold = measured.gold
    if gold is None:
        agreed = 1 - measured.n_differs / measured.n
        return f"The student gives its teacher's answer to {agreed:.1%} of the test rows."
    if gold.student_is_better:
        return "Against gold, the student is better than its teacher."
    if gold.teacher_is_better:
        return "Against gold, the teacher is better than the student."
    return "Against gold, student and teacher cannot be told apart on these rows."


def _who_is_right(measured: Measured) -> str:
    gold = measured.gold
    if gold is None:
        return (
            "The test rows have no gold labels, so nothing here says which of the two is right: "
            "only how often they agree."
        )
    low, high = gold.lead_interval
    words = (
        f"The student is right in {share(gold.student, gold.n)}, its teacher in "
        f"{share(gold.teacher, gold.n)}, of the test rows with gold; only the student is right in "
        f"{gold.only_student:,}, only the teacher in {gold.only_teacher:,}. The student's share "
        f"less its teacher's is {gold.lead:+.1%}, 95% interval {low:+.1%} to {high:+.1%} (Tango's, "
        "for paired answers)."
    )
    if gold.student_is_better or gold.teacher_is_better:
        return words
    return (
        f"{words} Equals are at least so far apart, either way, in {gold.chance:.0%} of draws "
        "(exact sign test)."
    )


def _who_answers(measured: Measured, guarantee: Guarantee) -> str:
    if not guarantee.feasible:
        return f"The student answers nothing: everything is escalated. {guarantee.reason}"
    return (
        f"At the certified threshold the student answers {share(measured.n_accepted, measured.n)} "
        "of the test rows, and the teacher answers the rest."
    )


def _both(bundle: Bundle) -> list[str]:
    if not isinstance(bundle, PolicyBundle) or bundle.mixture is None:
        return []
    return [
        "An escalated request is answered with two opinions: the student's weighs "
        f"{bundle.mixture.student_weight:.0%}, the teacher's the rest. Where this page says how "
        "often the student differs from the teacher, or on how many rows fewer the cascade is "
        "right than the teacher, it means that mixture; what it says of the teacher alone is the "
        "teacher's own."
    ]


def _several(bundle: Bundle) -> list[str]:
    if not isinstance(bundle, PolicyBundle) or bundle.stages is None:
        return []
    return [
        f"There are {len(bundle.stages.students)} students, asked in turn, and one promise over "
        "them all. Where this page says the student, it means the one that a row goes to: the "
        "first that is sure enough of it, or else the last. Its confidence is its score less its "
        "own threshold."
    ]


def _promise(guarantee: Guarantee) -> str:
    if not guarantee.feasible:
        return (
            f"The promise asked for: {promised_words(guarantee)}, with confidence "
            f"{percent(1 - guarantee.delta)}. It holds only because the student answers nothing."
        )
    promised = (
        f"Promised, with {percent(1 - guarantee.delta)} confidence: {promised_words(guarantee)}. "
        f"It rests on {guarantee.n:,} certify rows, distinct texts, of which the student answers "
        f"{guarantee.n_accepted:,}"
    )
    if guarantee.kind == "accuracy":
        return (
            f"{promised}: on {guarantee.errors:,} of them only the teacher is right, on "
            f"{guarantee.gains:,} only the student."
        )
    return (
        f"{promised}, {guarantee.errors:,} of them otherwise than the teacher; they prove at most "
        f"{guarantee.upper_bound:.2%}."
    )


def _others(bundle: Bundle) -> list[str]:
    """What the guarantees that are not served would let the student answer."""
    words = []
    for other in bundle.guarantees:
        if other.kind != bundle.served_guarantee:
            answers = (
                f"the student would answer {share(other.n_accepted, other.n)} of the certify rows"
                if other.feasible
                else "everything would be escalated"
            )
            words.append(f"Certified beside it: {promised_words(other)}; then {answers}.")
    if isinstance(bundle, PolicyBundle) and bundle.class_guarantees is not None:
        n_feasible = sum(g.feasible for g in bundle.class_guarantees)
        words.append(
            f"It holds for each of the student's answers by itself: {n_feasible} of "
            f"{len(bundle.class_guarantees)} have a threshold, the others are escalated."
        )
    return words


def _realised(measured: Measured, guarantee: Guarantee) -> str:
    if guarantee.kind == "accuracy":
        return _realised_accuracy(measured, guarantee)
    if not measured.n_accepted:
        return "Realised on test: the student answered no row, so nothing could differ."
    system = guarantee.kind == "system_agreement"
    of = measured.n if system else measured.n_accepted
    errors = measured.n_accepted_differs
    words = f"Realised on test: {share(errors, of)} of the {'rows' if system else 'answered rows'}"
    if errors <= guarantee.alpha * of:
        return f"{words}, within the promise."
    chance = chance_of_as_many(errors, of, guarantee.alpha)
    if chance >= BROKEN:
        return (
            f"{words}, more than promised, but so many come by chance in {chance:.0%} of draws "
            "from a risk just as promised: no sign that the promise is broken."
        )
    return (
        f"{words}, more than promised, and so many come by chance in {chance:.1%} of draws at "
        "most. Do not rely on the promise: the test rows are unlike the certify rows, or rows "
        "are not independent of each other."
    )


def _realised_of_each(measured: Measured, bundle: Bundle) -> list[str]:
    if not isinstance(bundle, PolicyBundle) or bundle.class_guarantees is None:
        return []
    seen = realised_of_each(measured, bundle)
    if not seen:
        return ["No test row has an answer with a promise of its own to see it by."]
    kept = sum(errors <= own.alpha * of for _, own, errors, of in seen)
    label, _, errors, of = seen[0]
    words = (
        f"Of the answers by themselves, {kept:,} of {len(seen):,} are within their promise on "
        f"test; the worst is {label}, {share(errors, of)}"
    )
    if kept == len(seen):
        return [f"{words}."]
    # The least of so many chances is that small by itself (Bonferroni).
    chance = len(seen) * min(chance_of_as_many(k, n, own.alpha) for _, own, k, n in seen)
    if chance >= BROKEN:
        return [f"{words}: no more than comes by chance among so many."]
    return [f"{words}, beyond chance: do not rely on the promise of each answer."]


def _realised_accuracy(measured: Measured, guarantee: Guarantee) -> str:
    gold = measured.gold
    if gold is None:
        return "The test rows have no gold labels to see the promise by."
    drop = (gold.escalated - gold.cascade) / gold.n
    side = "fewer" if drop > 0 else "more"
    words = (
        f"Realised on test: the cascade is right on {abs(drop):.1%} of the rows {side} than the "
        "teacher"
    )
    if drop <= guarantee.alpha:
        return f"{words}, within the promise."
    chance = chance_of_drop(gold, guarantee.alpha)
    if chance >= BROKEN:
        return (
            f"{words}, more than promised, but such a drop comes by chance in {chance:.0%} of "
            "draws from one just as promised: no sign that the promise is broken."
        )
    return (
        f"{words}, more than promised, and such a drop comes by chance in {chance:.1%} of draws. "
        "Do not rely on the promise: the test rows are unlike the certify rows, or rows are not "
        "independent of each other."
    )


def _warning(measured: Measured, guarantee: Guarantee) -> tuple[str, str] | None:
    gold = measured.gold
    if gold is None or gold.student <= gold.escalated:
        return None
    accuracies = (
        f"On the {gold.n:,} test rows with gold, the student alone is right in "
        f"{gold.student / gold.n:.1%}, this cascade in {gold.cascade / gold.n:.1%}, the teacher "
        f"alone in {gold.teacher / gold.n:.1%}."
    )
    if guarantee.kind == "accuracy":
        if measured.n_accepted == measured.n or gold.cascade >= gold.student:
            return None
        return (
            "Escalation lowers accuracy",
            f"{accuracies} The promise against gold is kept by escalating, but the student needs "
            "no help: more certify rows with gold would let it answer more.",
        )
    if gold.student_is_better:
        title, advice = _wrong_promise(gold, answers_all=measured.n_accepted == measured.n)
        return title, f"{accuracies} {advice}"
    return (
        "The student may be the better one",
        f"{accuracies} The lead is within chance, so agreement may or may not be the right "
        "promise. Recommended: collect more gold rows before paying for escalation.",
    )


def _wrong_promise(gold: AgainstGold, *, answers_all: bool) -> tuple[str, str]:
    """Title and advice where the student is better than its teacher."""
    why = (
        "Agreement with the teacher is the wrong promise here: it counts as an error every row in "
        "which the student is right and its teacher wrong."
    )
    if answers_all:
        return (
            "Agreement is the wrong promise",
            f"{why} Nothing is lost by it, since the student answers everything. Recommended: "
            "keep it so, and certify against gold (certify.guarantee: accuracy).",
        )
    if gold.cascade > gold.student:
        return (
            "Agreement is the wrong promise",
            f"{why} Yet on these rows the cascade is right more often than either alone. "
            "Recommended: keep escalating the least confident requests, but choose and certify "
            "the threshold against gold (certify.guarantee: accuracy).",
        )
    effect = (
        ("Escalation lowers accuracy", "Escalating replaces better answers by worse ones.")
        if gold.cascade < gold.student
        else ("Escalation gains nothing", "Escalating pays for answers that are no better.")
    )
    return (
        f"{effect[0]}, and agreement is the wrong promise",
        f"{effect[1]} {why} Recommended: let the student answer everything, certify it against "
        "gold (certify.guarantee: accuracy), and stop paying for escalation. Keep this threshold "
        "only if the aim is to stand in for the teacher, mistakes included.",
    )
