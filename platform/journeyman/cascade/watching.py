"""The watch over a bundle's promise as it serves: its ladder of thresholds, and its written form.

Audits come from many replicas and the state must outlive them all, so it is one JSON file for each
bundle, beside the feedback:

    <to>/watch/<bundle>.json                       what the audits found, and what each member owes
    <to>/watch/<bundle>/<member>.json              last words of one that stopped and was not heard

A member is a replica as long as it answers by one bundle.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from journeyman.cascade.drift import Audit, Watch, start_watch
from journeyman.certify.bundle import Bundle
from journeyman.certify.thresholds import ESCALATE_EVERYTHING
from journeyman.errors import DataError
from journeyman.folder import Folder

# Stricter rungs, by the share that they leave of what the certified threshold lets answer.
LADDER = (0.75, 0.5, 0.25)

# What an audit counts as whose outcome is lost: the student answered it, wrongly, on every rung.
LOST = Audit(score=float(np.finfo(np.float64).max), loss=1)

# And one of a text to which the student has no answer: no rung lets it give one.
UNANSWERED = Audit(score=-np.inf, loss=0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one audit. number: among its member's, from 1, in the order of their requests. They rise,
    so that none counts twice; those of texts that are left out are missing."""

    number: int
    audit: Audit

    def written(self) -> list[Any]:
        """For JSON."""
        return [self.number, _finite(self.audit.score), self.audit.loss]

    @classmethod
    def read(cls, written: Sequence[Any]) -> Outcome:
        """Raises ValueError or TypeError."""
        number, score, loss = written
        return cls(number, Audit(score=_number(score), loss=loss))


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """Of one member. last: the number of its last audit that counted; n_owed: of audits whose
    outcome is to come."""

    last: int = 0
    n_owed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What is kept of a bundle's audits: each is in the watch, or owed by a member.

    What a member owes that is gone is taken up by another one, and goes on under its name and its
    numbers (see ``spooling``). Where nobody can read it, the series ends sooner, as outcomes leave
    it in the order in which their requests came. The first of those that it owed may be missing for
    what it is (it waited for the teacher since the student had answered it), so it counts as an
    error. The others are missing because that one was not there yet, whatever is in them: a series
    that ends at a place that was settled before is as valid as the whole, so they are left out.
    Were they errors, each replica that is lost with a queue would break a promise that holds. The
    one error is no honest audit either: with several losses in quick succession the watch may
    tighten without cause, at an alpha of .02 after some five.
    """

    watch: Watch
    members: Mapping[str, Heard] = field(default_factory=dict)

    def told(self, member: str, outcomes: Sequence[Outcome], n_owed: int) -> Kept:
        """After a member's report."""
        watch, last = self.watch, self.last_of(member)
        for one in outcomes:
            if one.number > last:
                watch, last = watch.audited(one.audit), one.number
        kept = Kept(watch=watch, members=self.members)
        return kept._heard(member, Heard(last=last, n_owed=n_owed))

    def last_of(self, member: str) -> int:
        return self.members.get(member, Heard()).last

    def owed_by(self, member: str) -> int:
        return self.members.get(member, Heard()).n_owed

    def gone(self, member: str, n_owed: int) -> Kept:
        """After the last of a member that owed so many, of which the first counts. Its number
        stays: it may only have been thought to be gone, and tell its outcomes again."""
        watch, last = self.watch, self.last_of(member)
        if n_owed:
            watch, last = watch.audited(LOST), last + 1
        return Kept(watch=watch, members=self.members)._heard(member, Heard(last=last))

    def forgot(self, names: Collection[str]) -> Kept:
        """Members that nobody hears of any more."""
        if not self.members.keys() & set(names):
            return self
        others = {name: heard for name, heard in self.members.items() if name not in names}
        return Kept(watch=self.watch, members=others)

    def _heard(self, member: str, heard: Heard) -> Kept:
        members = {**self.members, member: heard}
        if heard == Heard():  # nothing yet
            del members[member]
        return Kept(watch=self.watch, members=members)


def watch_of(bundle: Bundle) -> Watch | None:
    """The watch before its first audit; None where there is nothing to watch: the student answers
    nothing, or the promise is one against gold, which traffic does not bring along.

    It is over the quantity that was certified, at the same alpha: how often the student answers
    and its answer differs from the teacher's (of ``selective_agreement``: among what it answers),
    by the certificate's own ``match``. Of ``match: judge`` that is the rate of the judge's
    verdicts, "different" or none at all, as the promise is about those: the judge's measured
    errors are shown beside it, and correct neither the certificate's bound nor this watch.
    """
    served = bundle.served
    if served.kind == "accuracy" or bundle.accept_above == ESCALATE_EVERYTHING:
        return None
    return start_watch(served.kind, served.alpha, _rungs(bundle))


def stored(folder: Folder, bundle_id: str) -> Kept | None:
    """What audits have found so far; None if nobody has audited. Raises DataError, ClusterError."""
    try:
        return from_json(folder.get(_name(bundle_id)))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder.path(_name(bundle_id))}: damaged ({type(error).__name__}), so what the "
            "audits found is lost; delete it to begin anew with the certified threshold."
        ) from error


def store(folder: Folder, bundle_id: str, kept: Kept) -> None:
    """Raises ClusterError."""
    folder.put(_name(bundle_id), to_json(kept, bundle_id))


def last_words(
    bundle_id: str, member: str, outcomes: Sequence[Outcome], n_owed: int
) -> tuple[str, bytes]:
    """Name and content of a file that says what a member that stops could tell nobody."""
    content = {"audits": [one.written() for one in outcomes], "n_owed": n_owed}
    return _name_of_words(bundle_id, member), json.dumps(content).encode()


def read_last_words(
    folder: Folder, bundle_id: str, member: str, last: int
) -> tuple[list[Outcome], int] | None:
    """And how many it owed; None where it left none, or damaged ones; raises ClusterError. last:
    the number of its last audit that counted."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        content = json.loads(folder.get(_name_of_words(bundle_id, member)))
        if "batches" in content:
            return _of_batches(content["batches"], last), 0
        return [Outcome.read(one) for one in content["audits"]], int(content["n_owed"])
    return None


def _of_batches(batches: Sequence[tuple[int, Sequence[Any]]], last: int) -> list[Outcome]:
    """Of a replica of before, which had numbers of batches, and owed none that was to come. Theirs
    are higher than any of these, so that they, too, count once."""
    found = [audit for number, audits in batches if number > last for audit in audits]
    highest = max((number for number, _ in batches), default=0)
    return [Outcome.read((highest + i, *audit)) for i, audit in enumerate(found, 1)]


def who_left_words(folder: Folder, bundle_id: str) -> list[str]:
    """Members; raises ClusterError."""
    return [PurePosixPath(one.name).stem for one in folder.walk(f"watch/{bundle_id}")]


def forget_last_words(folder: Folder, bundle_id: str, member: str) -> None:
    """Raises ClusterError."""
    folder.delete(_name_of_words(bundle_id, member))


def to_json(kept: Kept, bundle_id: str) -> bytes:
    watch = kept.watch
    content = {
        "bundle": bundle_id,
        "kind": watch.kind,
        "alpha": watch.alpha,
        "bound": watch.bound,
        "n_audits": watch.n_audits,
        "thresholds": watch.thresholds.tolist(),
        "alarmed": watch.alarmed.tolist(),
        # null before the first audit: -inf, which JSON has no word for.
        "log_detectors": [[_finite(value) for value in rung] for rung in watch.log_detectors],
        "members": {name: [one.last, one.n_owed] for name, one in kept.members.items()},
    }
    return json.dumps(content, indent=1, allow_nan=False).encode()


def from_json(written: bytes) -> Kept:
    """Raises ValueError, KeyError or TypeError if it is none."""
    content: dict[str, Any] = json.loads(written)
    if "detectors" in content:  # of before, and not of long enough a series of errors
        with np.errstate(divide="ignore"):
            log_detectors = np.log(np.array(content["detectors"], dtype=np.float64))
    else:
        log_detectors = np.array(
            [[_number(value) for value in rung] for rung in content["log_detectors"]],
            dtype=np.float64,
        )  # fmt: skip
    watch = Watch(
        kind=content["kind"],
        alpha=content["alpha"],
        thresholds=np.array(content["thresholds"], dtype=np.float64),
        log_detectors=log_detectors,
        alarmed=np.array(content["alarmed"], dtype=np.bool_),
        n_audits=content["n_audits"],
        bound=content["bound"],
    )
    members = content.get("members", {})  # before, they were kept by nobody
    return Kept(
        watch=watch,
        members={name: Heard(last=last, n_owed=n) for name, (last, n) in members.items()},
    )


def _finite(value: float) -> float | None:
    """-inf is null: JSON has no word for it."""
    return None if np.isneginf(value) else float(value)


def _number(value: float | None) -> float:
    return -np.inf if value is None else value


def _name_of_words(bundle_id: str, member: str) -> str:
    return f"watch/{bundle_id}/{member}.json"


def _name(bundle_id: str) -> str:
    return f"watch/{bundle_id}.json"


def _rungs(bundle: Bundle) -> list[float]:
    """Rising thresholds; only the certified one where the curve has no stricter ones."""
    certified = bundle.accept_above
    covered = [
        (point.coverage, point.threshold)
        for point in bundle.curve
        if point.threshold is not None and point.threshold > certified and point.coverage > 0
    ]
    whole = max((p.coverage for p in bundle.curve if p.threshold == bundle.threshold), default=1.0)
    rungs = {certified}
    for share in LADDER:
        if covered:
            rungs.add(min(covered, key=lambda c: abs(c[0] - share * whole))[1])
    return sorted(rungs)
