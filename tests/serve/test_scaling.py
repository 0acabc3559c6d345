"""As many replicas of the ingress as their students have work for; one that is lost."""

import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import psutil
import pytest
from scipy import stats

from serve.scaling import BUSY, BusyStudents, RisingLoad, rise
from tests import ray_head
from tests.conftest import ROOT, children
from tests.ray_head import free_ports, is_up, until
from tests.serve import tiny
from tests.serve.asking import asking


def wanted(busy: Mapping[str, float], target: int = 2) -> float:
    metrics = {BUSY: dict(busy)} if busy else {}
    context = SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=target)
    return BusyStudents(wanted=0.5)(context)[0]  # type: ignore[arg-type]


def test_students_are_as_busy_as_is_asked_for():
    assert wanted({"a": 0.9, "b": 0.6}) == pytest.approx(3)
    assert wanted({"a": 0.1, "b": 0.0}) == pytest.approx(0.2)  # Serve's bounds make it one
    assert wanted({}) == 2  # nobody has reported: as it is


class Teachers:
    """A policy asked ten times a second, as Serve asks it, with loads meant over five seconds."""

    def __init__(self, ahead_s: float, running: int = 1) -> None:
        self.policy, self.running = RisingLoad(ahead_s), running
        self.loads: list[float] = []
        self.state: dict[str, object] = {}

    def wanted(self, load: float) -> float:
        """Of replicas that are to have 32 requests each."""
        self.loads.append(load)
        config = SimpleNamespace(look_back_period_s=5.0, get_target_ongoing_requests=lambda: 32)
        context = SimpleNamespace(
            current_num_replicas=self.running,
            target_num_replicas=self.running,
            total_num_requests=float(np.mean(self.loads[-50:])),
            current_time=1.7e9 + len(self.loads) / 10,
            policy_state=self.state,
            config=config,
        )
        replicas, self.state = self.policy(context)  # type: ignore[arg-type]
        return replicas


def test_where_the_load_rises_teachers_are_wanted_that_much_earlier():
    ahead, at_once = Teachers(ahead_s=60), Teachers(ahead_s=0)
    ramp = [8 + 0.4 * i / 10 for i in range(1200)]  # to 56 in two minutes

    first = next(i for i, load in enumerate(ramp) if ahead.wanted(load) > 1) / 10
    then = next(i for i, load in enumerate(ramp) if at_once.wanted(load) > 1) / 10

    assert then == pytest.approx(62.5, abs=1)  # 8 + 0.4 * 60 = 32, as meant over five seconds
    assert then - first > 45  # of the 60 that it could be, less what a trend takes to show


@pytest.mark.parametrize("mean", [4, 24, 200])
def test_an_even_load_wants_no_more_for_its_chance_ups_and_downs(mean: int):
    """Requests in work where none waits: Poisson arrivals, each there for two seconds."""
    rng = np.random.default_rng(mean)
    arrivals = rng.poisson(mean / 20, 9_020)
    loads = np.convolve(arrivals, np.ones(20), "valid")  # a quarter of an hour
    teachers = Teachers(ahead_s=60)

    wanted = np.array([teachers.wanted(load) for load in loads])

    plain = np.convolve(loads, np.ones(50) / 50, "valid") / 32
    assert np.mean(wanted[49:] - plain) < 0.05 * mean / 32 + 0.01
    assert np.quantile(wanted[49:] - plain, 0.99) < 0.5 * mean / 32 + 0.1


def test_a_falling_load_is_not_foreseen():
    teachers = Teachers(ahead_s=60)

    wanted = [teachers.wanted(64 - 0.4 * i / 10) for i in range(600)]

    assert wanted[-1] == pytest.approx(np.mean(teachers.loads[-50:]) / 32)


def test_a_teacher_that_starts_from_none_is_left_to_serve():
    assert Teachers(ahead_s=60, running=0).wanted(7) == 0


def test_a_rise_is_what_least_squares_is_sure_of():
    """Against SciPy's slope and its standard error, of points that do not repeat one another."""
    rng = np.random.default_rng(0)
    times = np.arange(30.0)
    loads = 10 + 0.5 * times + rng.normal(0, 1, 30)
    fit = stats.linregress(times, loads)

    got = rise(list(zip(times, loads, strict=True)), smoothed_s=1.0)

    assert got == pytest.approx(fit.slope - 2 * fit.stderr)
    assert rise(list(zip(times, loads[::-1], strict=True)), smoothed_s=1.0) == 0


def with_settings(run: tiny.Run, folder: Path, **cascade: object) -> Path:
    """The run's bundle, to be served otherwise."""
    bundle = folder / "bundle"
    settings = run.recipe.model_dump(mode="json")
    settings["cascade"] |= cascade
    bundle.mkdir()
    (bundle / "bundle.json").write_bytes((run.bundle_dir / "bundle.json").read_bytes())
    (bundle / "recipe.json").write_text(json.dumps(settings))
    return bundle


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rising_load_starts_a_second_teacher_before_the_first_has_its_fill(
    run: tiny.Run, tmp_path: Path
):
    full, most = 48, 32
    replicas = {"min": 1, "max": 2, "requests_per_replica": full, "ahead_s": 120, "idle_s": 600}
    bundle = with_settings(run, tmp_path, teacher_replicas=replicas)
    [port] = free_ports(1)
    url = f"http://127.0.0.1:{port}"

    def teachers() -> list[psutil.Process]:
        return children("ServeReplica:cascade:Teacher")

    with ray_head.cluster(4, cwd=ROOT) as head, ExitStack() as clients:
        head.deploy(tmp_path, port, bundle)
        until(lambda: is_up(f"{url}/readyz", 200), 300)
        assert len(teachers()) == 1
        n_clients = 0
        while len(teachers()) == 1 and n_clients < most:  # one more every two seconds
            clients.enter_context(asking(url, run.escalated[:1], 1))
            n_clients += 1
            time.sleep(2)
        until(lambda: len(teachers()) == 2, 10)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_busy_ingress_gets_a_second_replica_and_one_that_is_killed_takes_only_its_own_along(
    run: tiny.Run, tmp_path: Path
):
    replicas = {"min": 1, "max": 2, "busy": 0.02, "idle_s": 600}
    bundle = with_settings(run, tmp_path, student_replicas=replicas)
    [port] = free_ports(1)
    url, n_clients = f"http://127.0.0.1:{port}", 4

    def ingresses() -> list[psutil.Process]:
        return children("ServeReplica:cascade:Cascade")

    with ray_head.cluster(4, cwd=ROOT) as head:
        head.deploy(tmp_path, port, bundle)
        until(lambda: is_up(f"{url}/readyz", 200), 300)
        assert len(ingresses()) == 1
        with asking(url, run.accepted[:4], n_clients) as asked:
            until(lambda: len(ingresses()) == 2, 200)
            until(lambda: asked.outcomes["200"] > 50, 60)
        assert set(asked.outcomes) == {"200"}
        n_texts = 4 * asked.outcomes["200"]
        for _ in range(10):  # whichever of the two is asked counts for both
            until(lambda: httpx.get(f"{url}/v1/figures").json()["totals"]["student"] == n_texts, 5)
        with asking(url, run.accepted[:4], n_clients) as asked:
            until(lambda: asked.outcomes["200"] > 50, 60)
            ingresses()[0].kill()
            until(lambda: len(ingresses()) == 2, 200)
            at_least = asked.outcomes["200"] + 50
            until(lambda: asked.outcomes["200"] > at_least, 60)
        assert asked.outcomes["silence"] == 0 and asked.n_lost <= 2 * n_clients, asked.errors
