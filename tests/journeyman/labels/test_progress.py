"""What is told of a labeling while it runs."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from journeyman.labels.progress import _GONE_AFTER_S, Counts, Meter, Tally
from journeyman.labels.replica import _REPORTS_PER_S, report_interval_s
from journeyman.recipe import Price
from tests.conftest import scraped


def test_the_live_views_figures_are_metrics_of_ray(ray_cluster: None) -> None:
    """As Prometheus reads them from the node."""
    import ray

    tally = ray.remote(num_cpus=0)(Tally).remote("a run")
    for replica, rows in (("one", 30), ("two", 12)):
        counts = Counts(rows=rows, prompt_tokens=10 * rows, quarantined=1)
        ray.get(tally.add.remote(replica, counts))
    total, replicas = ray.get(tally.total.remote())
    progress = Meter(100, 50, Price()).read(total, replicas, shards_waiting=4)
    ray.get(tally.show.remote(progress))

    wanted = {"rows_total": 42, "prompt_tokens_total": 420, "quarantined_total": 2, "replicas": 2,
              "shards_waiting": 4}  # fmt: skip
    deadline, found = time.monotonic() + 60, {}
    while found != wanted and time.monotonic() < deadline:
        told = scraped("ray_journeyman_label_", "a run")
        found = {name: value for name, value in told.items() if name in wanted}
        time.sleep(1)
    assert found == wanted


@given(st.integers(1, 1_500))
def test_many_replicas_report_together_no_more_often_than_the_tally_can_take(n_replicas: int):
    assert n_replicas / report_interval_s(n_replicas) <= _REPORTS_PER_S + 1e-6
    assert 2 * report_interval_s(10**6) < _GONE_AFTER_S  # with nothing to say
