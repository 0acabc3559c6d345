"""`serve run serve.app:app` refuses in one sentence, and with a code that says so."""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ray.serve import Application

from journeyman.cascade import keys
from journeyman.certify.bundle import load
from journeyman.errors import BundleMismatch
from serve import loading
from serve.app import build
from tests.serve import tiny

ROOT = Path(__file__).resolve().parents[2]


def serve_run(*arguments: str) -> list[str]:
    """What it prints but for its own first line; it must fail, and soon."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        [Path(sys.executable).with_name("serve"), "run", "serve.app:app", *arguments],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": "platform"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    lines = (done.stdout + done.stderr).splitlines()
    return [line for line in lines if "Running import path" not in line]


@pytest.fixture
def copied(run: tiny.Run, tmp_path: Path) -> Path:
    """A copy of the run, to be spoilt."""
    return Path(shutil.copytree(run.folder, tmp_path / "copied"))


def test_a_missing_bundle_is_one_sentence(tmp_path: Path):
    [line] = serve_run(f"bundle={tmp_path}/bundle")
    assert line.startswith(f"Error: There is no policy bundle at {tmp_path}/bundle/bundle.json.")


def test_a_wrong_argument_is_one_sentence():
    assert serve_run("bundel=runs/routing/bundle") == [
        "Error: unknown argument bundel; there is one: bundle=FOLDER-or-URL."
    ]


def test_another_prompt_than_the_certified_one_is_one_sentence(copied: Path):
    path = copied / "bundle" / "recipe.json"
    content = json.loads(path.read_text())
    content["labels"]["prompt"] = "Something about {{ label }}: "
    path.write_text(json.dumps(content))
    [line] = serve_run(f"bundle={copied}/bundle")
    bundle_id = load(copied / "bundle").bundle_id
    assert line.startswith(f"Error: policy bundle {bundle_id} was made for something else: ")
    assert "the recipe's prompt" in line


def test_a_taken_port_is_one_sentence(run: tiny.Run):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # then it is taken by someone else, which is as good
            other.bind(("127.0.0.1", 8000))
            other.listen()
        [line] = serve_run(f"bundle={run.bundle_dir}")
    assert line.startswith("Error: 127.0.0.1:8000: cannot listen there (Address already in use)")


def test_other_weights_than_the_certified_ones_are_refused(copied: Path):
    weights = copied / "student" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    # The certified student's own folder is tried first, so it has to be gone.
    moved = load(copied / "bundle").student
    Path(moved).rename(moved + ".away")
    try:
        with pytest.raises(BundleMismatch, match="does not fit the student's weights"):
            build(copied / "bundle")
    finally:
        Path(moved + ".away").rename(moved)


def test_a_replica_that_starts_late_does_not_take_a_student_that_was_trained_since(copied: Path):
    """Under the bundle of the one before, whose threshold says nothing of it."""
    loaded = loading.load(copied / "bundle")
    student = dataclasses.replace(loaded.student, path=copied / "student")
    loaded = dataclasses.replace(loaded, student=student)
    assert loading.student_here(loaded) == copied / "student"
    weights = copied / "student" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(BundleMismatch, match="it was trained again since"):
        loading.student_here(loaded)


def test_a_bundle_without_its_recipe_is_refused(copied: Path):
    (copied / "bundle" / "recipe.json").unlink()
    with pytest.raises(BundleMismatch, match=r"recipe\.json: missing or damaged"):
        build(copied / "bundle")


def test_who_measures_alone_may_ask_and_without_a_limit(
    run: tiny.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "keys").write_text(keys.line_of("shop", keys.new_key(), per_minute=1))
    monkeypatch.setenv("JOURNEYMAN_API_KEYS", str(tmp_path / "keys"))
    key = keys.new_key()

    def allowed(application: Application) -> list[str]:
        [spec, *_] = application._bound_deployment.init_args
        return [one.name for one in spec.keys]

    assert allowed(build(run.bundle_dir)) == ["shop"]
    own = keys.alone(key)
    assert allowed(build(run.bundle_dir, own)) == [own[0].name]
    ring = keys.Keyring(own, time.monotonic)
    found = ring.find(key)
    assert found and all(ring.wait_s(found) == 0 for _ in range(10_000))
    assert found.dollars_per_day is None and ring.find(keys.new_key()) is None


def test_what_is_sent_to_measure_a_cascade_is_no_traffic(copied: Path):
    """Rows of the corpus would be trained on, or certified on, and audits watch over traffic."""
    settings = json.loads((copied / "bundle" / "recipe.json").read_text())
    settings["cascade"]["feedback"] = {"to": str(copied / "feedback")}
    (copied / "bundle" / "recipe.json").write_text(json.dumps(settings))

    def feedback(**kept: bool) -> object:
        [spec, *_] = build(copied / "bundle", **kept)._bound_deployment.init_args
        return spec.loaded.recipe.cascade.feedback

    assert feedback() is not None and feedback(keeps_feedback=False) is None


def test_a_replica_that_goes_has_time_for_the_longest_request(run: tiny.Run):
    deadline_s = run.recipe.cascade.request_timeout_s
    names = set()

    def look(application: Any) -> None:
        deployment = application._bound_deployment
        names.add(deployment.name)
        assert deployment._deployment_config.graceful_shutdown_timeout_s == deadline_s + 5
        for given in deployment.init_args:
            if isinstance(given, Application):
                look(given)

    look(build(run.bundle_dir))
    assert names == {"Cascade", "Teacher", "Agreement"}


def test_so_many_requests_of_one_text_come_to_a_replica_that_its_own_bounds_refuse_first(
    run: tiny.Run,
):
    """What Serve holds back waits without a deadline, and is refused in plain text."""
    settings = run.recipe.cascade
    ingress = build(run.bundle_dir)._bound_deployment._deployment_config
    own = settings.max_queued_requests + settings.max_student_queue
    assert ingress.max_ongoing_requests >= own + 100
    assert 0 < ingress.max_queued_requests <= 1000, "the proxies' memory has a bound, too"
    assert ingress.backpressure_config.status_code == 503
    assert ingress.backpressure_config.retry_after_s
