"""Rows that kill their replica are found in few deaths, and nobody else is blamed."""

import json
import math
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from journeyman.labels import attempts
from journeyman.labels.attempts import Note, Plan

GROUPS = 8


def stored(note: Note) -> Note:
    """As the next replica reads it."""
    return Note.from_json(json.loads(json.dumps(note.to_json())))


@dataclass
class Shard:
    """A shard's rows on one replica after another; culprits kill whichever runs them."""

    ids: list[str]
    culprits: set[str]
    max_attempts: int
    note: Note | None = None
    deaths: int = 0
    accidents_alone: Counter[str] = field(default_factory=Counter)

    def attempt(self, accident: int | None = None) -> Plan | None:
        """One replica's attempt; None if it died. accident: before which group, counted round,
        the replica dies of something else (of an innocent row alone, so often at most that the
        row stays above suspicion)."""
        plan = attempts.plan(self.note, self.ids, self.max_attempts)
        for i, group in enumerate(plan.groups):
            self.note = stored(plan.before(group))
            by_accident = accident is not None and i == accident % len(plan.groups)
            if by_accident and len(group) == 1 and not self.culprits & set(group):
                self.accidents_alone[group[0]] += 1
                by_accident = self.accidents_alone[group[0]] < self.max_attempts
            if by_accident or self.culprits & set(group):
                self.deaths += 1
                return None
        return plan

    def finish(self, accidents: list[int | None]) -> Plan:
        waiting = iter(accidents)
        while True:
            if plan := self.attempt(next(waiting, None)):
                return plan


@st.composite
def shards(draw) -> Shard:
    n = draw(st.integers(1, 300))
    ids = [f"row {i}" for i in range(n)]
    n_culprits = draw(st.integers(0, min(n, 5)))
    culprits = draw(st.sets(st.sampled_from(ids), min_size=n_culprits, max_size=n_culprits))
    return Shard(ids=ids, culprits=culprits, max_attempts=draw(st.integers(1, 4)))


@given(shards(), st.lists(st.none() | st.integers(0, 20), max_size=12))
def test_culprits_are_blamed_and_nobody_else_whatever_else_dies(
    shard: Shard, accidents: list[int | None]
):
    plan = shard.finish(accidents)
    assert set(plan.note.blamed) == shard.culprits
    assert len(plan.note.blamed) == len(shard.culprits)
    ran = [row for group in plan.groups for row in group]
    assert sorted(ran) == sorted(set(shard.ids) - shard.culprits)


@given(shards(), st.lists(st.none() | st.integers(0, 20), max_size=6))
def test_a_culprit_costs_as_many_deaths_as_its_row_has_attempts_and_a_logarithm(
    shard: Shard, accidents: list[int | None]
):
    shard.finish(accidents)
    # Two deaths of all rows, one in each smaller group; an accident may lead astray once.
    levels = max(0, math.ceil(math.log(len(shard.ids), GROUPS)) - 1)
    each = 2 + levels + shard.max_attempts
    astray = sum(a is not None for a in accidents) * (levels + 2)
    assert shard.deaths <= len(shard.culprits) * each + astray


def test_one_culprit_of_512_rows_is_found_in_seven_deaths():
    shard = Shard(ids=[str(i) for i in range(512)], culprits={"300"}, max_attempts=3)
    shard.finish([])
    assert shard.deaths == 2 + 2 + 3  # of all rows; among 64 and among 8; alone


def test_rows_run_beside_others_until_a_second_replica_dies():
    ids = ["a", "b", "c"]
    first = attempts.plan(None, ids, 3)
    assert (first.groups, first.careful, first.before(ids).running) == ([ids], False, None)
    second = attempts.plan(stored(first.before(ids)), ids, 3)
    assert (second.groups, second.careful) == ([ids], False)
    third = attempts.plan(stored(second.before(ids)), ids, 3)
    assert (third.groups, third.careful) == ([["a"], ["b"], ["c"]], True)


def test_a_replica_that_dies_while_a_shard_waits_says_nothing_about_its_rows():
    """Another shard's rows were running: a lone row that waits again and again stays innocent."""
    ids = ["a", "b", "c"]
    suspected = Note(running=("b",), suspects=("a", "b"), deaths=4)
    plan = attempts.plan(suspected, ids, 3)
    assert plan.groups == [["b"], ["a", "c"]]
    for _ in range(10):
        waited = attempts.plan(stored(plan.note), ids, 3)
        assert waited == plan
    assert waited.note.alone == {"b": 1} and not waited.note.blamed


def test_a_shard_of_which_all_rows_are_blamed_runs_none():
    shard = Shard(ids=["a"], culprits={"a"}, max_attempts=1)
    assert shard.finish([]).groups == [[]]
    assert shard.deaths == 3


def test_rows_that_are_gone_since_are_not_run():
    """Copied from a cache that another run has filled."""
    note = Note(running=("a", "b"), suspects=None, deaths=2, blamed=("c",))
    plan = attempts.plan(note, ["b", "d"], 3)
    assert plan.groups == [["b"], ["d"]]


notes = st.builds(
    Note,
    running=st.none() | st.lists(st.text()).map(tuple),
    suspects=st.none() | st.lists(st.text()).map(tuple),
    deaths=st.integers(0),
    alone=st.dictionaries(st.text(), st.integers(0)),
    blamed=st.lists(st.text()).map(tuple),
)


@given(notes)
def test_a_note_survives_json(note: Note):
    assert stored(note) == note


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 64, 65, 1000])
def test_suspects_are_split_into_eight_groups_at_most_that_hold_each_once(n: int):
    ids = [str(i) for i in range(n)]
    groups = attempts.plan(Note(running=None, deaths=1), ids, 3).groups
    assert len(groups) <= GROUPS
    assert [row for group in groups for row in group] == ids
