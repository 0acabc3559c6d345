"""What labeling costs and how it is shown: arithmetic checked by hand."""

import io

import pytest

from journeyman.labels import cost
from journeyman.labels.progress import LabelProgress, Meter, added
from journeyman.labels.replica import Counts, Trial
from journeyman.progress import LiveLine
from journeyman.recipe import Price

PRICE = Price(
    per_replica_hour=3.6,
    per_million_prompt_tokens=2,
    per_million_cached_tokens=0.5,
    per_million_output_tokens=10,
)


def test_dollars_count_replica_time_and_each_kind_of_token():
    counts = Counts(
        prompt_tokens=3_000_000, cached_tokens=1_000_000, output_tokens=500_000,
        replica_seconds=1000,
    )  # fmt: skip
    assert cost.dollars(PRICE, counts) == pytest.approx(1.0 + 4.0 + 0.5 + 5.0)
    same = PRICE.model_copy(update={"per_million_cached_tokens": None})
    assert cost.dollars(same, counts) == pytest.approx(1.0 + 6.0 + 5.0)


def test_without_a_price_there_is_no_cost():
    totals = {"rows": 1, "prompt_tokens": 1, "cached_tokens": 0, "output_tokens": 1,
              "replica_seconds": 1.0}  # fmt: skip
    assert cost.facts(Price(), totals)["dollars"] is None
    assert cost.facts(PRICE, totals)["dollars"] > 0


def test_an_estimate_scales_its_sample_and_holds_the_truth_of_a_larger_one():
    rows = [Counts(rows=1, prompt_tokens=100 + i % 7, output_tokens=1) for i in range(200)]
    rows[0] = Counts(rows=1, quarantined=1)
    trial = Trial(rows=rows, seconds=20, start_seconds=30, bytes=4000)
    got = cost.estimate([trial], rows=10_000, replicas=2, price=PRICE)
    assert (got.rows, got.sampled, got.quarantined) == (10_000, 200, 1)
    mean = sum(r.prompt_tokens for r in rows) / 200
    low, high = got.prompt_tokens
    assert low < mean * 10_000 < high
    assert got.replica_hours == pytest.approx((20 * 50 + 2 * 30) / 3600)
    assert got.bytes == 4000 * 50
    assert got.dollars is not None
    assert got.dollars[0] < got.dollars[1]
    assert "10,000 to label; 200 tried, 1 of them" in got.text()
    free = cost.estimate([trial], rows=10_000, replicas=2, price=Price())
    assert "no price" in free.text()


def progress(**changes: object) -> LabelProgress:
    meter = Meter(rows=1000, rows_before=100, price=PRICE)
    counts = added(Counts(rows=50, prompt_tokens=5000), Counts(rows=10, quarantined=2))
    return meter.read(counts, replicas=3, shards_waiting=1)


def test_progress_counts_what_was_done_before():
    view = progress()
    assert (view.rows, view.rows_done, view.quarantined, view.replicas) == (1000, 160, 2, 3)
    text = view.text()
    assert "160 of 1,000 rows (16%)" in text
    assert "3 replicas, 1 shard left, 2 in quarantine" in text


def test_the_view_says_what_a_run_waits_for_before_its_first_row():
    meter = Meter(rows=10, rows_before=0, price=PRICE)
    nobody = meter.read(Counts(), replicas=0, shards_waiting=1, waiting_for="2 GPUs, where ...")
    assert "0 of 10 rows (0%), waiting for a node (a replica takes 2 GPUs" in nobody.text()
    assert "the teacher is starting\n" in meter.read(Counts(), 1, shards_waiting=1).text()


def test_a_view_of_several_lines_is_one_line_where_there_is_no_terminal():
    stream = io.StringIO()
    with LiveLine(stream) as line:
        line.show("label  1 of 2\n       fast")
        line.show("label  2 of 2\n       fast")  # too soon after the first to be printed
    assert stream.getvalue() == "label  1 of 2  fast\n"


def test_a_view_is_redrawn_in_place_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "12")
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    with LiveLine(stream) as line:
        line.show("one\nand a second line")
        line.show("two\nand")
    assert stream.getvalue() == "\r\x1b[Jone\nand a secon\x1b[1A\r\x1b[Jtwo\nand\n"
