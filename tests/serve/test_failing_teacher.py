"""A teacher that hangs, is killed or answers garbage, under load and by each policy: what the
student may answer goes on unharmed, and what becomes of the rest is as the recipe says."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from journeyman.certify.bundle import save
from tests.serve import tiny
from tests.serve.asking import Asked, asking
from tests.serve.test_app import teachers_engines, teachers_replicas
from tests.serve.test_scaling import with_settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

POLICIES = ("reject", "degrade", "wait")
TIMEOUT_S = 6  # of a request


@contextmanager
def both(url: str, run: tiny.Run) -> Iterator[tuple[Asked, Asked]]:
    """Clients with texts for the student, and clients with texts for the teacher."""
    with asking(url, run.accepted[:2], 2) as easy, asking(url, run.escalated[:1], 3) as hard:
        yield easy, hard


def more(asked: Asked, requests: int) -> None:
    """Wait until it has had so many more answers or refusals."""
    enough = asked.outcomes.total() + requests
    deadline = time.monotonic() + 120
    while asked.outcomes.total() < enough:
        assert time.monotonic() < deadline, asked
        time.sleep(0.05)


def unharmed(easy: Asked) -> None:
    assert set(easy.outcomes) == {"200"}, easy.errors
    assert set(easy.answered_by) == {"student"}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_teacher_that_hangs(ray_cluster: None, run: tiny.Run, tmp_path: Path, policy: str):
    from serve.running import running

    bundle = with_settings(run, tmp_path, when_teacher_fails=policy, request_timeout_s=TIMEOUT_S)
    with running(bundle) as url, both(url, run) as (easy, hard):
        more(hard, 10)
        assert set(hard.answered_by) == {"teacher"} and not hard.n_lost, hard.errors
        [engine] = teachers_engines()
        engine.suspend()
        more(hard, 12)  # all that were asked meanwhile have come to their end
        more(easy, 50)
        meanwhile = hard.answered_by.copy(), hard.outcomes.copy()
        engine.resume()
        answers_again(hard)
    print(policy, meanwhile, hard)
    unharmed(easy)
    as_the_policy_says(policy, hard, meanwhile[0]["student"])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("what", ["engine", "replica"])
def test_a_teacher_that_is_killed(
    ray_cluster: None, run: tiny.Run, tmp_path: Path, policy: str, what: str
):
    """engine: the replica starts another one; replica: Serve does."""
    from serve.running import running

    bundle = with_settings(run, tmp_path, when_teacher_fails=policy, request_timeout_s=TIMEOUT_S)
    with running(bundle) as url, both(url, run) as (easy, hard):
        more(hard, 10)
        assert set(hard.answered_by) == {"teacher"} and not hard.n_lost, hard.errors
        [victim] = teachers_engines() if what == "engine" else teachers_replicas()
        victim.kill()
        more(easy, 50)
        more(hard, 4)
        answers_again(hard)
    print(policy, what, hard)
    unharmed(easy)
    as_the_policy_says(policy, hard, hard.answered_by["student"])


def answers_again(hard: Asked) -> None:
    before = hard.answered_by["teacher"]
    while hard.answered_by["teacher"] < before + 10:
        more(hard, 1)


def as_the_policy_says(policy: str, hard: Asked, n_degraded: int) -> None:
    """Of a teacher that is away for longer than a request may take."""
    assert "silence" not in hard.outcomes and "connection" not in hard.outcomes, hard.errors
    if policy == "degrade":
        assert set(hard.outcomes) == {"200"} and n_degraded >= 3, hard.errors
    else:  # 504: its time was up while the teacher was asked; 503: the breaker kept it from asking
        assert set(hard.outcomes) <= {"200", "503", "504"} and hard.n_lost >= 3, hard.errors
        assert set(hard.answered_by) == {"teacher"}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_teacher_that_answers_garbage(
    ray_cluster: None, run: tiny.Run, tmp_path: Path, policy: str
):
    """Weights that are no numbers, as a damaged file or an overflow makes them."""
    from serve.running import running

    garbage = write_garbage(tmp_path / "run")
    bundle = with_settings(
        garbage, tmp_path, when_teacher_fails=policy, request_timeout_s=TIMEOUT_S
    )
    with running(bundle) as url, both(url, garbage) as (easy, hard):
        more(hard, 20)
        more(easy, 50)
        said = httpx.post(f"{url}/v1/classify", json={"input": garbage.escalated[0]}, timeout=60)
    unharmed(easy)
    if policy == "degrade":
        assert set(hard.outcomes) == {"200"} and set(hard.answered_by) == {"student"}, hard.errors
        assert said.headers["x-journeyman-guarantee"] == "void"
    elif policy == "reject":
        assert set(hard.outcomes) == {"503"}, hard.errors
        assert said.json()["error"]["code"] == "teacher_unavailable"
        assert int(said.headers["Retry-After"]) >= 1
    else:  # 504: its deadline came while the teacher was asked once more
        assert set(hard.outcomes) <= {"503", "504"}, hard.errors
        assert said.json()["error"]["code"] in ("teacher_unavailable", "deadline_passed")


def write_garbage(folder: Path) -> tiny.Run:
    from safetensors.torch import load_file, save_file

    run = tiny.write_run(folder)
    weights = load_file(run.teacher_dir / "model.safetensors")
    weights["lm_head.weight"].fill_(float("nan"))
    save_file(weights, run.teacher_dir / "model.safetensors", metadata={"format": "pt"})
    bundle = tiny.a_bundle(folder, run.recipe, run.bundle.threshold)
    save(bundle, run.bundle_dir)
    return dataclasses.replace(run, bundle=bundle)
