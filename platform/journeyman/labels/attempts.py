"""What rows did to their replica: which ones to run beside others, which to blame.

A replica that dies with its process (out of memory, a lost node) leaves a note of what it was
running. Two deaths of one shard are taken for its own: from then on its rows run in ever smaller
groups, one group at a time, until the row that does it stands alone. Pure: notes in, notes out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_TRUSTED_DEATHS = 1  # after more of them, something in the shard is suspected
_GROUPS = 8  # parts of a suspected group: fewer restarts than halves, less waiting than one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Stands beside the dataset while a shard is in work, removed when it is committed.

    running: ids in the replica now, None for all rows at once; suspects: ids of the group that
    died last, None for all rows; deaths: of the replica while the shard's rows ran; alone: how
    often a row died alone, by id; blamed: rows not to run again.
    """

    running: tuple[str, ...] | None = ()
    suspects: tuple[str, ...] | None = None
    deaths: int = 0
    alone: dict[str, int] = dataclasses.field(default_factory=dict)
    blamed: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Note:
        running, suspects = value["running"], value["suspects"]
        return cls(
            running=None if running is None else tuple(running),
            suspects=None if suspects is None else tuple(suspects),
            deaths=value["deaths"],
            alone=dict(value["alone"]),
            blamed=tuple(value["blamed"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Groups of ids to run one after another; the note to leave while none of them runs."""

    groups: list[list[str]]
    note: Note

    @property
    def careful(self) -> bool:
        """Whether no rows of other shards may run beside these: what dies is then to blame."""
        return self.note.deaths > _TRUSTED_DEATHS

    def before(self, group: Sequence[str]) -> Note:
        """The note to leave before a group runs."""
        return dataclasses.replace(self.note, running=tuple(group) if self.careful else None)


def plan(left: Note | None, ids: Sequence[str], max_attempts: int) -> Plan:
    """How to run a shard's rows, given the note that the attempt before left behind, if any."""
    note = Note() if left is None else _after_death(left, max_attempts)
    rows = [row for row in ids if row not in note.blamed]
    if note.deaths <= _TRUSTED_DEATHS:
        return Plan(groups=[rows], note=note)
    suspected = set(rows if note.suspects is None else note.suspects)
    suspects = [row for row in rows if row in suspected]
    rest = [row for row in rows if row not in suspected]
    return Plan(groups=[*_split(suspects), *([rest] if rest else [])], note=note)


def _after_death(left: Note, max_attempts: int) -> Note:
    died = left.running
    if died == ():  # another shard's rows were running
        return left
    note = dataclasses.replace(left, running=(), suspects=died, deaths=left.deaths + 1)
    if died is None or len(died) > 1:
        return note
    (row,) = died
    alone = left.alone | {row: left.alone.get(row, 0) + 1}
    if alone[row] < max_attempts:
        return dataclasses.replace(note, alone=alone)
    return dataclasses.replace(
        note, suspects=None, deaths=0, alone=alone, blamed=(*left.blamed, row)
    )


def _split(rows: list[str]) -> list[list[str]]:
    size = max(1, -(-len(rows) // _GROUPS))
    return [rows[i : i + size] for i in range(0, len(rows), size)]
