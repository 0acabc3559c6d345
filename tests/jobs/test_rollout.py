"""Where `--from-feedback` ends: configs that Ray Serve takes, and words that lead on."""

import argparse
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from journeyman import cli, recipe
from journeyman.certify import bundle as bundles
from journeyman.certify.bundle import PolicyBundle
from journeyman.certify.certificate import certify_system_agreement
from journeyman.certify.ledger import Ledger
from journeyman.certify.step import write_down
from journeyman.cli import rollout
from journeyman.errors import ClusterError, DataError, RecipeError
from journeyman.run_folder import RunFolder
from serve.live import UserConfig
from tests.conftest import DEMO, ROOT
from tests.journeyman.certify.test_bundle import DIFFERS, SCORES, a_bundle


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Of the second student, whose bundle is certified; the first one's lies beside it."""
    settings = recipe.load(DEMO, [f"output={tmp_path}", "name=loop-feedback"])
    certified(a_bundle(), settings, tmp_path / "loop" / "bundle")
    certified(a_bundle(student_digest="n" * 32), settings, tmp_path / "loop-feedback" / "bundle")
    return RunFolder(settings)


def certified(bundle: PolicyBundle, settings: recipe.Recipe, folder: Path) -> None:
    write_down(bundle, Ledger(entries=bundle.ledger), settings, folder, inputs="i", started=0.0)


def deployed(run: RunFolder, bundle: Path | None = None) -> Path:
    """The repository's own config, with a bundle of one's own."""
    config = yaml.safe_load((ROOT / "serve" / "cascade.yaml").read_text())
    first = run.directory.parent / "loop" / "bundle"
    config["applications"][0]["args"]["bundle"] = str(bundle or first)
    path = run.directory.parent / "cascade.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def asked(shadow: Path | None = None, **given: Any) -> argparse.Namespace:
    return argparse.Namespace(**({"from_feedback": "f", "shadow": shadow, "deploy": False} | given))


def user_config(path: Path) -> UserConfig:
    """Of the deployment Cascade; the file is one that `serve deploy` takes."""
    config = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    [deployment] = config.applications[0].deployments
    assert deployment.name == "Cascade"
    return UserConfig.model_validate(deployment.user_config)


def test_a_run_leaves_a_config_that_shadows_and_one_that_promotes(run: RunFolder, capsys):
    config = deployed(run)
    rollout.check(asked(config), run)
    rollout.end(asked(config), run)
    shadow, promote = (run.directory / name for name in ("shadow.yaml", "promote.yaml"))
    new = str(run.path("certify").resolve())
    first = user_config(shadow)
    assert first.bundle == str(run.directory.parent / "loop" / "bundle")
    assert first.candidate and first.candidate.bundle == new and first.candidate.mode == "shadow"
    assert user_config(promote).model_dump(exclude_none=True) == {"bundle": new}
    said = capsys.readouterr().out
    for words in (f"serve deploy {shadow}", "journeyman cascade status", f"serve deploy {promote}"):
        assert words in said


def test_a_bundle_on_the_cluster_alone_is_taken_on_trust_where_its_config_is_named(run: RunFolder):
    config = deployed(run, Path("/on/the/nodes/bundle"))
    rollout.end(asked(config), run)
    assert user_config(run.directory / "shadow.yaml").bundle == "/on/the/nodes/bundle"


def test_another_recipes_cascade_is_left_alone(run: RunFolder, capsys, monkeypatch):
    other = run.directory.parent / "other"
    certified(a_bundle(prompt_digest="another"), run.recipe, other)
    with pytest.raises(DataError, match="same teacher, prompt and labels"):
        rollout.end(asked(deployed(run, other)), run)
    monkeypatch.chdir(run.directory.parent)  # where the usual config is the other's, too
    Path("serve").mkdir()
    deployed(run, other).rename("serve/cascade.yaml")
    rollout.end(asked(), run)
    assert "--shadow FILE" in capsys.readouterr().out
    assert not (run.directory / "shadow.yaml").exists()


def test_a_cascade_whose_teacher_runs_in_another_way_is_left_alone(run: RunFolder):
    config = deployed(run)
    first = run.directory.parent / "loop" / "bundle"
    certified(a_bundle(), recipe.load(DEMO, ["teacher.dtype=bfloat16"]), first)
    with pytest.raises(DataError, match="same teacher, prompt and labels"):
        rollout.end(asked(config), run)
    certified(a_bundle(), recipe.load(DEMO, ["teacher.max_num_seqs=3"]), first)
    rollout.end(asked(config), run)


def test_a_run_that_would_write_over_the_bundle_that_answers_is_refused(run: RunFolder):
    config = deployed(run, run.path("certify"))
    with pytest.raises(DataError, match=r"would write over it; .* --set name=loop-2"):
        rollout.check(asked(config), run)


def test_a_bundle_that_answers_nothing_is_not_tried(run: RunFolder, capsys):
    few = certify_system_agreement(SCORES[:20], DIFFERS[:20], 0.01, 0.05)
    bundles.save(a_bundle(few), run.path("certify"))
    rollout.end(asked(deployed(run)), run)
    assert "the teacher answers all" in capsys.readouterr().out
    assert not (run.directory / "shadow.yaml").exists()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "cannot be read"),
        ("kind: RayService", "serveConfigV2"),
        ("applications: [x]", "no config of Ray Serve"),
    ],
)
def test_what_is_no_serve_config_is_refused_before_the_run(run: RunFolder, text: str, why: str):
    path = run.directory.parent / "x.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=why):
        rollout.check(asked(path), run)


@pytest.mark.parametrize("flag", [{"shadow": Path("x.yaml")}, {"deploy": True}])
def test_the_flags_go_with_from_feedback(run: RunFolder, flag: dict[str, Any]):
    with pytest.raises(RecipeError, match="goes with --from-feedback"):
        rollout.check(asked(**{"from_feedback": None, **flag}), run)


class Cluster(ThreadingHTTPServer):
    """As much of a dashboard as `serve deploy` asks for, and of a cascade as `status` does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.deployed: list[dict[str, Any]] = []
        self.told: dict[str, dict[str, Any]] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    server: Cluster

    def do_GET(self) -> None:
        versions = {"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "s"}
        self._say(self.server.told.get(self.path, versions))

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.deployed.append(json.loads(body))
        self._say({})

    def _say(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def a_cluster() -> Iterator[Cluster]:
    with Cluster() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def test_a_run_may_deploy_the_shadow_itself(run: RunFolder, a_cluster: Cluster, monkeypatch):
    monkeypatch.setenv("RAY_DASHBOARD_ADDRESS", a_cluster.url)
    rollout.end(asked(deployed(run), deploy=True), run)
    [config] = a_cluster.deployed
    [deployment] = config["applications"][0]["deployments"]
    assert deployment["user_config"]["candidate"]["bundle"] == str(run.path("certify").resolve())


def test_a_cluster_that_is_away_is_told_in_one_sentence(run: RunFolder, monkeypatch):
    monkeypatch.setenv("RAY_DASHBOARD_ADDRESS", "http://127.0.0.1:9")
    with pytest.raises(ClusterError, match="RAY_DASHBOARD_ADDRESS") as raised:
        rollout.end(asked(deployed(run), deploy=True), run)
    assert "\n" not in str(raised.value)


def test_status_says_how_a_candidate_does_and_how_it_is_promoted(a_cluster: Cluster, capsys):
    counts = {"student": 90, "teacher": 10, "void": 0, "remembered": 0, "refused": 0}
    figures = {
        "last_minute": counts,
        "totals": counts,
        "escalation_rate": 0.1,
        "replicas": 3,
        "waiting": 0,
        "waiting_for_student": 7,
        "breaker_open": False,
        "teacher_dollars": 1.5,
        "audit_dollars": 0.25,
        "feedback_lost": 3,
        "saved_dollars": 1234.5,
        "population_stability": None,
        "watch": None,
        "feedback_failure": None,
        "agreement_failure": None,
    }
    candidate = {
        **figures,
        "bundle": "b2",
        "mode": "shadow",
        "share": 0.5,
        "not_shadowed": 3,
        "unready": None,
        "totals": counts | {"student": 196, "teacher": 4},
        "last_minute": dict.fromkeys(counts, 0),
    }
    guarantee = {"kind": "system_agreement", "alpha": 0.1, "delta": 0.1}
    card = {"id": "b1", "threshold": 0.5, "score": "margin", "guarantees": [guarantee],
            "served_guarantee": "system_agreement"}  # fmt: skip
    a_cluster.told = {
        "/readyz": {"status": "ready"},
        "/v1/bundle": card,
        "/v1/figures": {**figures, "candidate": candidate, "reload_failure": None},
    }
    assert cli.main(["cascade", "status", a_cluster.url]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "b2, a shadow: it decides on 50% of texts, 3 left out" in said
    assert "last minute nothing yet" in said
    assert "since tried 2.0% of 200 texts would be escalated" in said
    assert "serve deploy promote.yaml" in said
    assert "promise system_agreement at most 0.1, confidence 90% threshold" in said
    assert "lost 3 rows of feedback" in said
    assert "requests refused, of the 3 replicas that run" in said
    assert "waiting 0 texts for the teacher, 7 with the student" in said
    assert "dollars 1.50 for the teacher's answers, 0.25 for audits, some 1,234.50 saved" in said
    a_cluster.told["/v1/figures"] |= {"candidate": None, "guarantee": "tightened"}
    assert cli.main(["cascade", "status", a_cluster.url]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "candidate" not in said
    assert "confidence 90%, as certified: audits found it broken" in said
    in_turn = [{"score": "margin", "threshold": 0.25}, {"score": "entropy", "threshold": None}]
    a_cluster.told["/v1/bundle"] = card | {"threshold": 0.0, "stages": {"students": in_turn}}
    a_cluster.told["/v1/figures"]["by_stage"] = {"1": 1200, "2": 30}
    assert cli.main(["cascade", "status", a_cluster.url]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "threshold margin above 0.2500, then nothing" in said
    assert "of these by student 1: 1,200, 2: 30" in said
