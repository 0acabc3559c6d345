"""The sentence a user reads first: answer, escalate, or drop the teacher.

Agreement with the teacher is the wrong promise where the student is the better of the two: there
the certificate against gold is recommended.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from journeyman.certify import paired
from journeyman.certify.certificate import Certificate


def recommend(
    certificate: Certificate,
    student_right: npt.ArrayLike | None = None,
    teacher_right: npt.ArrayLike | None = None,
    whose: str = "the teacher's",
) -> str:
    """Say what to do with this certificate, given gold or without it.

    Args:
        certificate: the one that serving will use.
        student_right: bool[n] against gold, or None without gold.
        teacher_right: bool[n] against gold on the same rows, or None without gold; of what an
            escalated row is answered with.
        whose: that answer, in words.
    """
    plan = _plan(certificate)
    if student_right is None or teacher_right is None or not len(np.asarray(student_right)):
        return f"{plan} There is no gold to tell whether the student or the teacher is right."
    student, teacher = np.asarray(student_right, bool), np.asarray(teacher_right, bool)
    accuracies = (
        f"{student.mean():.3f} against {whose} {teacher.mean():.3f} on {len(student):,} calibrate "
        "rows"
    )
    if _better(student, teacher):
        if certificate.kind == "accuracy":
            return (
                f"{plan} The student is the better of the two ({accuracies}), so that each "
                "request it does not answer costs accuracy besides money."
            )
        return (
            f"Against gold the student is better than its teacher: {accuracies}. Agreement with "
            "the teacher is the wrong promise then: serve the student alone, or certify against "
            "gold (certify.guarantee: accuracy). If agreement is what you need: "
            f"{plan[0].lower()}{plan[1:]}"
        )
    if _better(teacher, student):
        return f"{plan} Against gold the student alone has {accuracies}: escalation pays."
    return (
        f"{plan} Against gold the student alone has {accuracies}, too close to tell them apart: "
        "where the teacher's cost matters, consider the student alone."
    )


def caveats(certificate: Certificate, spent: float, n_groups: int | None) -> str:
    """What the certificate leaves unsaid of its rows; empty where there is nothing.

    Args:
        certificate: the one that serving will use.
        spent: delta over all promises that were made on these rows, in this use and before.
        n_groups: how many groups the rows are of; None where they are in none.
    """
    said = []
    if spent > certificate.delta * (1 + 1e-9):
        left = f"holds together with confidence {1 - spent:g}" if spent < 1 - 1e-9 else (
            "need not hold together with any confidence"
        )  # fmt: skip
        said.append(f"All that was promised on these certify rows so far {left}.")
    if n_groups is not None and n_groups < certificate.n:
        said.append(
            f"The {certificate.n:,} certify rows are of {n_groups:,} groups, and rows of one group "
            "are alike: the promise is for rows like these drawn one by one, and of new groups it "
            "says less; certify with more groups and fewer rows of each."
        )
    return "".join(f" {sentence}" for sentence in said)


def repeated(
    certificate: Certificate, counts: npt.ArrayLike, scores: npt.ArrayLike, differs: npt.ArrayLike
) -> str:
    """That the promise is over distinct texts, where the certify rows are of more; else empty.

    What the counts say of requests is shown and not promised: a text lies in one split as a whole,
    so repeated rows are draws from the traffic of these texts alone (docs/certificates.md).

    Args:
        certificate: the one that serving will use.
        counts: int[n], how often each certify row stood in the sources.
        scores: float[n], higher is more confident.
        differs: bool[n], whether the student's answer is another.
    """
    n_times = np.asarray(counts, dtype=np.int64)
    if n_times.sum() == len(n_times):
        return ""
    said = (
        f" The {len(n_times):,} certify rows are distinct texts, which stood {n_times.sum():,} "
        "times in the sources, and the promise counts each text once: where requests repeat like "
        "that, it is none about the share of requests"
    )
    answered = np.asarray(scores, dtype=np.float64) > certificate.threshold
    wrong = answered & np.asarray(differs, dtype=bool)
    of = answered if certificate.kind == "selective_agreement" else np.ones_like(answered)
    if certificate.kind == "accuracy" or not of.any():
        return f"{said}."
    by_count = n_times[wrong].sum() / n_times[of].sum()
    return (
        f"{said} (by these counts, without any bound, {by_count:.2%} are answered otherwise, in "
        f"place of {wrong.sum() / of.sum():.2%})."
    )


def _plan(certificate: Certificate) -> str:
    if not certificate.feasible:
        return f"Escalate everything to the teacher. {certificate.reason}"
    risk = {
        "system_agreement": "of all requests, those that the student answers and the teacher would "
        "have answered differently are",
        "selective_agreement": "of the requests that the student answers, those that the teacher "
        "would have answered differently are",
        "accuracy": "against gold, the share of requests on which the cascade is right less often "
        "than its teacher alone is",
    }[certificate.kind]
    return (
        f"Let the student answer {certificate.coverage:.1%} of requests: {risk} at most "
        f"{certificate.upper_bound:.2%}, with confidence {1 - certificate.delta:g}."
    )


def _better(one: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> bool:
    return paired.is_better(int((one & ~other).sum()), int((other & ~one).sum()))
