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
    """Written before rows run, removed when their shard is committed.

    running: ids of the group under way, None for all rows at once; deaths: of the shard's replica
    so far; alone: how often a row died alone, by id; blamed: rows not to run again.
    """

    running: tuple[str, ...] | None = None
    deaths: int = 0
    alone: dict[str, int] = dataclasses.field(default_factory=dict)
    blamed: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Note:
        running = value["running"]
        return cls(
            running=None if running is None else tuple(running),
            deaths=value["deaths"],
            alone=dict(value["alone"]),
            blamed=tuple(value["blamed"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Groups of ids to run one after another; the note to write before a group is ``before``."""

    groups: list[list[str]]
    note: Note

    @property
    def careful(self) -> bool:
        """Whether no rows of other shards should run beside these."""
        return len(self.groups) > 1

    def before(self, group: Sequence[str]) -> Note:
        running = tuple(group) if self.careful else None
        return dataclasses.replace(self.note, running=running)


def plan(left: Note | None, ids: Sequence[str], max_attempts: int) -> Plan:
    """How to run a shard's rows, given the note that the attempt before left behind, if any."""
    if left is None:
        return Plan(groups=[list(ids)], note=Note())
    note = dataclasses.replace(left, deaths=left.deaths + 1, running=None)
    died = left.running
    if died is not None and len(died) == 1:
        alone = note.alone | {died[0]: note.alone.get(died[0], 0) + 1}
        note = dataclasses.replace(note, alone=alone)
        if alone[died[0]] >= max_attempts:
            note = dataclasses.replace(note, blamed=(*note.blamed, died[0]), deaths=0)
    rows = [row for row in ids if row not in note.blamed]
    if note.deaths <= _TRUSTED_DEATHS:
        return Plan(groups=[rows], note=note)
    suspects = [row for row in rows if died is None or row in died]
    rest = [row for row in rows if row not in set(suspects)]
    groups = [*_split(suspects), *([rest] if rest else [])]
    # A group alone would run as "all rows": give a lone suspect a group of its own.
    return Plan(groups=groups if len(groups) > 1 else [*groups, []], note=note)


def _split(rows: list[str]) -> list[list[str]]:
    size = max(1, -(-len(rows) // _GROUPS))
    return [rows[i : i + size] for i in range(0, len(rows), size)]
