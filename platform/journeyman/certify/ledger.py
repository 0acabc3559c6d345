"""What the `certify` rows were used for. A second use of a row spends delta again, or is refused.

Rows that were looked at once no longer answer like fresh ones; the ledger keeps that in sight. It
charges by the row: a set that shares rows with another has spent what the most used of its rows
has. What was certified before, of the same rows and in the same way, is no new use. ``spending``
keeps it in files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from journeyman.errors import DataError

MARK_BYTES = 8  # two sets of a million rows share one by chance once in 18 million such pairs
Marks = npt.NDArray[np.uint64]
What = tuple[str, str, float, str | None]


class LedgerEntry(BaseModel):
    """One use of a set of `certify` rows, as it is written into a bundle.

    Attributes:
        use: what for, such as "system_agreement at 0.05, student 3f2a91c07b44".
        rows_digest: which rows, by `rows_digest`.
        delta: the chance of a broken promise that this use spent.
        way: digest of what else decides the outcome; None in bundles from before it was kept.
        run: name of the run that was the first to do so; None there, too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    use: str = Field(min_length=1)
    rows_digest: str = Field(min_length=1)
    delta: float = Field(gt=0, lt=1)
    # Not written where there is none: the digests of earlier bundles are as they were.
    way: str | None = Field(default=None, exclude_if=lambda way: way is None)
    run: str | None = Field(default=None, exclude_if=lambda run: run is None)

    @property
    def what(self) -> What:
        """By which a use is the same again, whichever run it is of."""
        return self.use, self.rows_digest, self.delta, self.way

    @property
    def words(self) -> str:
        return self.use + (f" (run {self.run})" if self.run else "")


def rows_digest(ids: Iterable[str]) -> str:
    """Digest of a set of row ids; their order does not matter, their multiplicity does."""
    digest = blake2b(digest_size=16)
    for row_id in sorted(ids):
        # The length in front keeps ["ab", "c"] and ["a", "bc"] apart.
        encoded = row_id.encode()
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowSet:
    """A set of `certify` rows: its digest, and uint64[n], a mark for each row by its id."""

    digest: str
    marks: Marks

    @classmethod
    def of(cls, ids: Sequence[str]) -> RowSet:
        packed = b"".join(blake2b(i.encode(), digest_size=MARK_BYTES).digest() for i in ids)
        return cls(digest=rows_digest(ids), marks=np.sort(np.frombuffer(packed, dtype=np.uint64)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ledger:
    """Uses in the order in which they came, and the marks of the rows of each set, by its digest.

    Of a set without marks (of a bundle from before they were kept) only the very same is known.
    """

    entries: tuple[LedgerEntry, ...] = ()
    marks: Mapping[str, Marks] = field(default_factory=dict)

    def joined(self, *others: Ledger) -> Ledger:
        """All that several have on record; see ``together``."""
        marks = dict(self.marks)
        for other in others:
            marks |= other.marks
        return Ledger(entries=together(self.entries, *(o.entries for o in others)), marks=marks)

    def touching(self, rows: RowSet) -> Ledger:
        """The uses that had any of these rows."""
        entries = tuple(entry for entry in self.entries if self._had(entry, rows).any())
        digests = {entry.rows_digest for entry in entries}
        return Ledger(entries=entries, marks={d: m for d, m in self.marks.items() if d in digests})

    def lacking(self, uses: Iterable[LedgerEntry]) -> tuple[LedgerEntry, ...]:
        """Those of the uses that are not on record."""
        there = {entry.what for entry in self.entries}
        return tuple(use for use in uses if use.what not in there)

    def delta_spent(self, rows: RowSet) -> npt.NDArray[np.float64]:
        """float64[n]: of each of these rows, the sum of delta over its uses."""
        spent = np.zeros(len(rows.marks))
        for entry in self.entries:
            spent += entry.delta * self._had(entry, rows)
        return spent

    def delta_promised(self, ids: Sequence[str]) -> float:
        """Sum of delta over all uses that had any of these rows: by the union bound at least the
        chance that any of their promises is broken; may exceed 1."""
        return sum(entry.delta for entry in self.touching(RowSet.of(ids)).entries)

    def spending(self, uses: Sequence[LedgerEntry], rows: RowSet, max_delta: float) -> Ledger:
        """With these uses of these rows, each that is there already as it is.

        Raises DataError where any row would spend more than max_delta.
        """
        fresh = self.lacking(uses)
        spent, more = self.delta_spent(rows), sum(use.delta for use in fresh)
        # Ten times .01 is a little more than .1 in binary.
        if fresh and spent.max(initial=0.0) + more > max_delta * (1 + 1e-9):
            raise DataError(self._refusal(fresh, rows, spent, max_delta))
        marks = dict(self.marks) | {rows.digest: rows.marks}
        return Ledger(entries=(*self.entries, *fresh), marks=marks)

    def _had(self, entry: LedgerEntry, rows: RowSet) -> npt.NDArray[np.bool_]:
        """bool[n]: which of these rows a use had."""
        if entry.rows_digest == rows.digest:
            return np.ones(len(rows.marks), dtype=np.bool_)
        return np.isin(rows.marks, self.marks.get(entry.rows_digest, ()))

    def _refusal(
        self,
        fresh: Sequence[LedgerEntry],
        rows: RowSet,
        spent: npt.NDArray[np.float64],
        max_delta: float,
    ) -> str:
        n, uses = len(rows.marks), []
        for entry in self.touching(rows).entries:
            had = int(self._had(entry, rows).sum())
            uses.append(entry.words + (f", on {had:,} of these {n:,}" if had < n else ""))
        which = "These" if spent.min() == spent.max() else "Some of these"
        wanted = " and ".join(repr(use.use) for use in fresh)
        return (
            f"{which} certify rows have spent {spent.max():g} of {max_delta:g} on: "
            f"{'; '.join(uses) or 'nothing'}. {wanted} would take "
            f"{sum(use.delta for use in fresh):g} more. Draw fresh certify rows (rows that none of "
            "these had), plan all uses beforehand with a share of delta each, or raise "
            "certify.max_delta: what was promised on these rows then holds together with less "
            "confidence."
        )


def together(*ledgers: Iterable[LedgerEntry]) -> tuple[LedgerEntry, ...]:
    """All uses that several ledgers have on record, in their order; what some of them have alike is
    one use."""
    found: list[LedgerEntry] = []
    for ledger in ledgers:
        known = Counter(entry.what for entry in found)
        for entry in ledger:
            if known[entry.what]:
                known[entry.what] -= 1
            else:
                found.append(entry)
    return tuple(found)
