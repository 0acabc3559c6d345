"""What the `certify` rows were used for. A second use spends delta again, or is refused.

Rows that were looked at once no longer answer like fresh ones; the ledger keeps that in sight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from hashlib import blake2b

from pydantic import BaseModel, ConfigDict, Field

from journeyman.errors import DataError


class LedgerEntry(BaseModel):
    """One use of a set of `certify` rows, as it is written into a bundle.

    Attributes:
        use: what for, such as "system_agreement at .05".
        rows_digest: which rows, by `rows_digest`.
        delta: the chance of a broken promise that this use spent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    use: str = Field(min_length=1)
    rows_digest: str = Field(min_length=1)
    delta: float = Field(gt=0, lt=1)


def rows_digest(ids: Iterable[str]) -> str:
    """Digest of a set of row ids; their order does not matter, their multiplicity does."""
    digest = blake2b(digest_size=16)
    for row_id in sorted(ids):
        # The length in front keeps ["ab", "c"] and ["a", "bc"] apart.
        encoded = row_id.encode()
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()


def delta_spent(ledger: Iterable[LedgerEntry], digest: str) -> float:
    """Sum of delta over all uses of these rows: by the union bound, the chance that any broke."""
    return sum(entry.delta for entry in ledger if entry.rows_digest == digest)


def together(*ledgers: Iterable[LedgerEntry]) -> tuple[LedgerEntry, ...]:
    """All uses that several ledgers have on record, in their order; what some of them have alike is
    one use."""
    found: list[LedgerEntry] = []
    for ledger in ledgers:
        known = Counter(found)
        for entry in ledger:
            if known[entry]:
                known[entry] -= 1
            else:
                found.append(entry)
    return tuple(found)


def spend(
    ledger: tuple[LedgerEntry, ...], entry: LedgerEntry, delta_budget: float
) -> tuple[LedgerEntry, ...]:
    """The ledger with one more use, or DataError if it would spend more than the budget.

    Args:
        ledger: uses so far.
        entry: the next use.
        delta_budget: the most that all uses of the same rows may spend together.
    """
    spent = delta_spent(ledger, entry.rows_digest)
    # Ten times .01 is a little more than .1 in binary.
    if spent + entry.delta > delta_budget * (1 + 1e-9):
        uses = "; ".join(e.use for e in ledger if e.rows_digest == entry.rows_digest)
        raise DataError(
            f"These certify rows have spent {spent:g} of {delta_budget:g} on: {uses or 'nothing'}. "
            f"{entry.use!r} would take {entry.delta:g} more. Draw fresh certify rows, or plan both "
            "uses beforehand with a share of delta each."
        )
    return (*ledger, entry)
