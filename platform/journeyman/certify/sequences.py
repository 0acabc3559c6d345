"""Fixed sequences of thresholds: tested in order, each at the full level, up to the first failure.

The promise breaks only if the first threshold of the sequence that violates it passes, so that many
tests cost no more than one; the price is that a failure ends the sequence. `calibrate` rows say
which thresholds, and where to begin. A sequence that stumbles at its first step certifies nothing:
it is paired with a rule that cannot, and delta is shared between the two.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from journeyman.certify.thresholds import IntArray, ThresholdTable
from journeyman.probabilities import FloatArray

_CANDIDATES = 100
# Evidence, as a share of the level, that leaves room for the noise of the `calibrate` rows.
_CLEAR = 0.01
# Of delta, for the rule that `calibrate` rows forecast more of; the rest is for the other.
FAVOURED_SHARE = 0.9


def candidates(table: ThresholdTable) -> IntArray:
    """Entries at even steps of coverage, ever looser: int64[k], at most 100."""
    wanted = np.linspace(0, 1, _CANDIDATES + 1)[1:]
    return np.unique(np.searchsorted(table.n_accepted / max(table.n, 1), wanted).clip(1))


def start_where_clear(p_values: FloatArray, level: float) -> tuple[int, int]:
    """Where to begin among candidates, ever looser, and how many will pass from there, by forecast.

    The strictest with clear evidence, since a failure ends all; where none has so much, the one
    with the most. Forecast to end with the last that passes: dips between are noise as a rule.
    """
    passing = np.flatnonzero(p_values <= level)
    if not len(passing):
        return 0, 0
    clear = np.flatnonzero(p_values <= _CLEAR * level)
    start = int(clear[0]) if len(clear) else int(np.argmin(p_values))
    return start, int(passing[-1]) + 1 - start


def start_in_last_run(p_values: FloatArray, level: float) -> tuple[int, int]:
    """The same for a risk that may rise and fall again: beyond the last failure by forecast, the
    candidate with the most evidence, the loosest among equals."""
    passing = np.flatnonzero(p_values <= level)
    if not len(passing):
        return 0, 0
    end = int(passing[-1])
    failing = np.flatnonzero(p_values[:end] > level)
    first = int(failing[-1]) + 1 if len(failing) else 0
    start = end - int(np.argmin(p_values[first : end + 1][::-1]))
    return start, end + 1 - start


def leading(passes: npt.NDArray[np.bool_]) -> int:
    """How many pass before the first that does not."""
    return len(passes) if passes.all() else int(np.argmin(passes))
