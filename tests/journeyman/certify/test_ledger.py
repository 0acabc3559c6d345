"""The ledger of certify rows: each row has its own account, and the same use is paid for once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from journeyman.certify.ledger import Ledger, LedgerEntry, RowSet, rows_digest, together
from journeyman.certify.recommendation import caveats
from journeyman.errors import DataError
from tests.journeyman.certify.test_bundle import a_bundle

MAX_DELTA = 0.5


def use_of(ids: list[str], name: str = "a", delta: float = 0.1, **more: str) -> LedgerEntry:
    return LedgerEntry(use=name, rows_digest=rows_digest(ids), delta=delta, **more)


def spent(*uses: tuple[str, list[str]]) -> Ledger:
    """A ledger with uses by these names of these rows, at a delta of 0.1 each."""
    ledger = Ledger()
    for name, ids in uses:
        ledger = ledger.spending([use_of(ids, name)], RowSet.of(ids), 1.0)
    return ledger


def test_digest_of_rows_ignores_their_order_and_nothing_else():
    assert rows_digest(["a", "b"]) == rows_digest(["b", "a"])
    different = [["a", "b"], ["ab"], ["a", "b", "b"], ["a"], [], ["", "ab"]]
    assert len({rows_digest(ids) for ids in different}) == len(different)


def test_second_use_of_the_same_rows_spends_delta_or_is_refused():
    ids, rows = ["a", "b"], RowSet.of(["a", "b"])
    first, second, third = (use_of(ids, name, 0.05) for name in ("system", "selective", "more"))
    ledger = Ledger().spending([first], rows, 0.1).spending([second], rows, 0.1)
    assert ledger.delta_spent(rows).tolist() == pytest.approx([0.1, 0.1])
    words = (
        r"These certify rows have spent 0\.1 of 0\.1 on: system; selective\. 'more' would take "
        r"0\.05 more\. Draw fresh certify rows"
    )
    with pytest.raises(DataError, match=words):
        ledger.spending([third], rows, 0.1)
    fresh = RowSet.of(["c"])
    assert len(ledger.spending([use_of(["c"], "more", 0.05)], fresh, 0.1).entries) == 3


@given(
    uses=st.lists(
        st.tuples(
            st.sets(st.sampled_from("abcdefgh"), min_size=1),
            st.sampled_from([0.05, 0.1, 0.2]),
        ),
        max_size=8,
    ),
    ids=st.sets(st.sampled_from("abcdefgh"), min_size=1),
)
def test_a_set_has_spent_what_the_most_used_of_its_rows_has(uses, ids):
    ledger = Ledger()
    for i, (used, delta) in enumerate(uses):
        names = sorted(used)
        ledger = ledger.spending([use_of(names, str(i), delta)], RowSet.of(names), 10.0)
    most = max(sum(delta for used, delta in uses if row in used) for row in ids)
    rows = RowSet.of(sorted(ids))
    assert ledger.delta_spent(rows).max() == pytest.approx(most)
    promised = sum(delta for used, delta in uses if used & ids)
    assert ledger.delta_promised(sorted(ids)) == pytest.approx(promised)
    one_more = use_of(sorted(ids), "one more", 0.1)
    if most + 0.1 > MAX_DELTA + 1e-6:
        with pytest.raises(DataError, match="have spent"):
            ledger.spending([one_more], rows, MAX_DELTA)
    else:
        assert ledger.spending([one_more], rows, MAX_DELTA).entries[-1] == one_more


def test_a_refusal_names_each_use_its_run_and_how_many_of_the_rows_it_had():
    ids = [str(i) for i in range(1_200)]
    ledger = spent(("first", ids[:1_000]))
    ledger = ledger.spending([use_of(ids, "second", run="longer")], RowSet.of(ids), 1.0)
    words = (
        r"^Some of these certify rows have spent 0\.2 of 0\.25 on: first, on 1,000 of these 1,200; "
        r"second \(run longer\)\. 'third'"
    )
    with pytest.raises(DataError, match=words):
        ledger.spending([use_of(ids, "third")], RowSet.of(ids), 0.25)


def test_the_same_use_is_paid_for_once_whichever_run_it_is_of_and_another_way_is_another_use():
    ids, rows = ["a", "b"], RowSet.of(["a", "b"])
    first = use_of(ids, "system", 0.3, way="margin", run="one")
    ledger = Ledger().spending([first], rows, 0.5)
    again = ledger.spending([first.model_copy(update={"run": "two"})], rows, 0.5)
    assert again.entries == (first,)
    with pytest.raises(DataError, match=r"would take 0\.3 more"):
        ledger.spending([first.model_copy(update={"way": "entropy"})], rows, 0.5)
    assert together((first,), (first.model_copy(update={"run": "two"}),)) == (first,)


def test_bundles_from_before_rows_were_marked_count_where_the_rows_are_the_very_same():
    ids = ["a", "b"]
    earlier = Ledger(entries=(use_of(ids), use_of(ids)))  # the same, written twice: two uses
    assert earlier.delta_spent(RowSet.of(ids)).max() == pytest.approx(0.2)
    assert earlier.delta_spent(RowSet.of(["a"])).max() == 0
    content = a_bundle(ledger=(use_of(ids),)).model_dump(mode="json")
    assert set(content["ledger"][0]) == {"use", "rows_digest", "delta"}  # as they were digested


def test_what_is_left_of_the_confidence_is_said_and_where_nothing_is_that():
    served = a_bundle().served
    assert "holds together with confidence 0.7." in caveats(served, 0.3, None)
    for all_of_it in (1.0, 1.3):
        assert "need not hold together with any confidence." in caveats(served, all_of_it, None)
