"""The watch over a bundle's promise as it serves: its ladder of thresholds, and its written form.

Audits come from many replicas and the state must outlive them all, so it is one JSON file for each
bundle, beside the feedback.
"""

from __future__ import annotations

import json
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


def stored(folder: Folder, bundle_id: str) -> Watch | None:
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


def store(folder: Folder, bundle_id: str, watch: Watch) -> None:
    """Raises ClusterError."""
    folder.put(_name(bundle_id), to_json(watch, bundle_id))


def to_json(watch: Watch, bundle_id: str) -> bytes:
    content = {
        "bundle": bundle_id,
        "kind": watch.kind,
        "alpha": watch.alpha,
        "bound": watch.bound,
        "n_audits": watch.n_audits,
        "thresholds": watch.thresholds.tolist(),
        "alarmed": watch.alarmed.tolist(),
        # null before the first audit: -inf, which JSON has no word for.
        "log_detectors": [
            [None if np.isneginf(value) else float(value) for value in rung]
            for rung in watch.log_detectors
        ],
    }
    return json.dumps(content, indent=1, allow_nan=False).encode()


def from_json(written: bytes) -> Watch:
    """Raises ValueError, KeyError or TypeError if it is none."""
    content: dict[str, Any] = json.loads(written)
    if "detectors" in content:  # of before, and not of long enough a series of errors
        with np.errstate(divide="ignore"):
            log_detectors = np.log(np.array(content["detectors"], dtype=np.float64))
    else:
        log_detectors = np.array(
            [[-np.inf if value is None else value for value in rung]
             for rung in content["log_detectors"]], dtype=np.float64,
        )  # fmt: skip
    return Watch(
        kind=content["kind"],
        alpha=content["alpha"],
        thresholds=np.array(content["thresholds"], dtype=np.float64),
        log_detectors=log_detectors,
        alarmed=np.array(content["alarmed"], dtype=np.bool_),
        n_audits=content["n_audits"],
        bound=content["bound"],
    )


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
