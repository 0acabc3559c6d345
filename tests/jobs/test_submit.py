"""``journeyman submit`` and ``jobs`` against a Ray cluster with a dashboard and a token."""

import asyncio
import dataclasses
import json
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import yaml

from journeyman import corpus, recipe
from journeyman.errors import ClusterError
from journeyman.jobs import Jobs
from journeyman.labels.store import LabelStore
from tests import ray_head
from tests.conftest import DEMO, ROOT, SMALL
from tests.ray_head import Head, until

ROWS = [{"text": f"request {i}", "label": "banking"} for i in range(50)]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder of a user's own machine, with a recipe and its rows."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({
        "name": "tickets",
        "output": str(tmp_path / "runs"),
        "corpus": {"sources": ["rows.jsonl"], "columns": {"label": "label"}},
        "teacher": {"model": "Qwen/Qwen3-8B"},
        "labels": {"scoring": "direct", "classes": {"banking": " bank", "travel": " trip"},
                   "prompt": "{{ text }}"},
    }))  # fmt: skip
    return folder


def submitted(head: Head, work: Path, *arguments: str):
    at = ("--address", head.dashboard, "--step", "prepare")
    return head.journeyman("submit", "recipe.yaml", *at, *arguments, cwd=work)


def test_a_recipe_is_a_job_once(head: Head, work: Path, tmp_path: Path):
    done = submitted(head, work)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "prepare   done in" in done.stdout and "succeeded" in done.stdout
    assert corpus.read_manifest(tmp_path / "runs" / "tickets" / "corpus")["rows"] == len(ROWS)
    job = done.stdout.split()[1]
    assert job.startswith("tickets-prepare-")

    again = submitted(head, work)
    assert again.returncode == 0 and f"{job} has succeeded before; --again" in again.stdout
    anew = submitted(head, work, "--again")
    assert anew.returncode == 0 and f"{job}-2 succeeded" in anew.stdout, anew.stderr
    listed = head.journeyman("jobs", "list", "--address", head.dashboard).stdout
    # Other tests' jobs are on this cluster as well.
    assert [line.split()[:2] for line in listed.splitlines() if line.startswith(job)] == [
        [job, "succeeded"], [f"{job}-2", "succeeded"],
    ]  # fmt: skip
    log = head.journeyman("jobs", "logs", job, "--address", head.dashboard)
    assert log.stdout and log.stdout in done.stdout


def test_a_running_job_is_let_go_followed_and_stopped(head: Head, work: Path, tmp_path: Path):
    os.mkfifo(tmp_path / "never.jsonl")  # nobody writes there: the job waits
    waiting = f"--set=corpus.sources=[{tmp_path / 'never.jsonl'}]"
    first = submitted(head, work, waiting, "--detach")
    assert first.returncode == 0, first.stderr
    job = first.stdout.split()[1]
    assert f"jobs logs {job} --follow --address {head.dashboard}" in first.stdout

    at = ("--address", head.dashboard, "--step", "prepare", waiting)
    with head.started("submit", "recipe.yaml", *at, cwd=work) as follower:
        line = follower.stdout.readline()
        assert job in line and "already, and is not started again" in line
        follower.send_signal(signal.SIGINT)
        out, err = follower.communicate(timeout=60)
    assert follower.returncode == 130 and f"Let go of {job}, which goes on" in out, err

    stopped = head.journeyman("jobs", "stop", job, "--address", head.dashboard)
    assert stopped.stdout.split() == ["job", job, "stopped"], stopped.stderr
    ended = submitted(head, work, waiting)
    assert ended.returncode == 1 and "ended as stopped" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_ctrl_c_that_the_client_takes_for_a_broken_line_still_lets_go():
    class Client:
        async def tail_job_logs(self, _: str):
            yield "begun\n"
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError as error:
                raise RuntimeError("the line is broken") from error

    said: list[str] = []
    jobs = Jobs.__new__(Jobs)
    jobs._client = Client()
    with pytest.raises(KeyboardInterrupt):
        jobs.follow("a-job", said.append)
    assert said == ["begun\n"]


def details(id: str, status: str) -> SimpleNamespace:
    return SimpleNamespace(submission_id=id, status=status, message="", metadata={}, start_time=1,
                           end_time=None)  # fmt: skip


def test_what_a_job_wrote_while_the_line_was_broken_is_shown_when_it_has_ended():
    class Client:
        async def tail_job_logs(self, _: str):
            yield "begun\n"
            raise RuntimeError("the line is broken")

        def list_jobs(self):
            return [details("a-job", "SUCCEEDED")]

        def get_job_logs(self, _: str) -> str:
            return "begun\nall of it done\n"

    said: list[str] = []
    jobs = Jobs.__new__(Jobs)
    jobs._client, jobs.address = Client(), "http://head:8265"
    assert jobs.follow("a-job", said.append).status == "SUCCEEDED"
    assert "".join(said) == "begun\nall of it done\n"


def test_who_submits_the_same_at_the_same_moment_gets_the_other_ones_job():
    submitted_by_another: list[SimpleNamespace] = []
    settings = recipe.load(DEMO, ["output=/shared/runs"])

    class Client:
        def list_jobs(self):
            return submitted_by_another

        def submit_job(self, submission_id: str, **_: object):
            if not refused:
                submitted_by_another.append(details(submission_id, "RUNNING"))
            raise RuntimeError(
                "Request failed with status code 500: Traceback (most recent call last):\n"
                '  File "job_agent.py", line 5, in submit_job\n'
                "ValueError: it exists already, or worse.\n"
            )

    jobs = Jobs.__new__(Jobs)
    jobs._client, jobs.address = Client(), "http://head:8265"
    refused = False
    assert jobs.submit(settings, "label", {}).active
    submitted_by_another.clear()
    refused = True
    words = r"refused \(ValueError: it exists already, or worse\)\.$"
    with pytest.raises(ClusterError, match=words):
        jobs.submit(settings, "label", {})


@pytest.mark.slow  # ten seconds, and the one beside it meets the same code
def test_a_job_that_fails_says_why_and_ends_with_1(head: Head, work: Path):
    (work / "rows.jsonl").write_text("no JSON\n")
    failed = submitted(head, work, "--env", "HOME")
    assert failed.returncode == 1, failed.stdout
    assert "journeyman: " in failed.stdout and "empty" in failed.stdout
    assert "failed" in failed.stderr and failed.stderr.count("\n") == 1


def test_who_has_no_token_and_who_names_a_wrong_address_gets_a_sentence(head: Head, work: Path):
    stranger = dataclasses.replace(
        head, environment=head.environment | {"RAY_AUTH_TOKEN": "0" * 64}
    )
    nowhere = dataclasses.replace(head, dashboard=f"http://127.0.0.1:{ray_head.free_ports(1)[0]}")
    for one, words in ((stranger, "asks for a token"), (nowhere, "no Ray cluster answers there")):
        listed = one.journeyman("jobs", "list", "--address", one.dashboard)
        assert listed.returncode == 1 and words in listed.stderr
        assert listed.stderr.count("\n") == 1, listed.stderr
    unknown = head.journeyman("jobs", "stop", "none", "--address", head.dashboard)
    assert unknown.returncode == 1 and "none: no such job" in unknown.stderr
    unset = submitted(head, work, "--env", "NOT_SET")
    assert unset.returncode == 1 and "no such environment variable" in unset.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_is_submitted_from_elsewhere_and_its_cascade_deployed(tmp_path: Path):
    """A whole run on a cluster of two nodes, by a command that shares nothing with them but a disk:
    four to seven minutes."""
    work = tmp_path / "laptop"
    work.mkdir()
    (work / "jobs").symlink_to(ROOT / "jobs")  # the demo names its rows from the root
    [port] = ray_head.free_ports(1)
    with ray_head.cluster(2, [{}], cwd=ROOT) as head:
        at = ("--address", head.dashboard)
        settings = [f"--set={each}" for each in (*SMALL, f"output={tmp_path / 'runs'}")]
        checked = head.journeyman("doctor", str(DEMO), *settings, *at, cwd=work)
        assert checked.returncode == 0, checked.stdout
        done = head.journeyman("submit", str(DEMO), *settings, *at, cwd=work, timeout_s=600)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "answered by the student" in done.stdout
        run = tmp_path / "runs" / "small"
        assert (run / "report" / "index.html").is_file()
        assert LabelStore(run / "labels").manifest()["totals"]["ok"] == 190

        head.deploy(tmp_path, port, run / "bundle")
        url = f"http://127.0.0.1:{port}"
        until(lambda: ray_head.is_up(f"{url}/readyz", 200), 200)
        answer = httpx.post(f"{url}/v1/classify", json={"input": "is my card blocked"}, timeout=60)
        assert answer.json()["results"][0]["label"] in recipe.load(DEMO).classes().classes
