"""Settings that are changed after certifying reach the bundle that is served, and the certificate
stays what it was. No Ray."""

from pathlib import Path
from typing import Any

import pytest

from journeyman import cli, recipe, steps
from journeyman.certify import bundle as bundles
from journeyman.certify import bundle_recipe
from journeyman.certify.bundle_recipe import recipe_of, take_up
from journeyman.certify.ledger import Ledger
from journeyman.certify.step import write_down
from journeyman.errors import BundleMismatch, ClusterError
from journeyman.mirror import Mirror
from journeyman.recipe import Recipe
from tests.conftest import DEMO
from tests.journeyman.certify.test_bundle import a_bundle
from tests.journeyman.labels.object_server import serving

CERTIFIED_ARGUMENTS = "teacher.engine_args={quantization: fp8, enforce_eager: true}"


def asked(*overrides: str) -> Recipe:
    return recipe.load(DEMO, [CERTIFIED_ARGUMENTS, *overrides])


def certified(folder: Path, settings: Recipe | None = None) -> Mirror:
    write_down(a_bundle(), Ledger(), settings or asked(), folder, inputs="i", started=0.0)
    return Mirror(local=folder)


def test_keys_feedback_limits_and_prices_that_came_later_are_served_by(tmp_path: Path):
    bundle = certified(tmp_path)
    before = (tmp_path / "bundle.json").read_bytes()
    later = asked(
        "cascade.api_keys=/etc/keys",
        "cascade.state=/var/spent",
        "cascade.feedback={to: kept}",
        "cascade.when_teacher_fails=degrade",
        "cascade.max_queued_requests=7",
        "teacher.price.per_million_prompt_tokens=3",
        "teacher.gpu_memory_utilization=0.45",
        "teacher.engine_args={quantization: fp8, enable_prefix_caching: true}",
    )
    found = take_up(bundle, later)
    served = recipe_of(tmp_path)
    assert served.cascade == later.cascade and served.teacher == later.teacher
    assert (tmp_path / "bundle.json").read_bytes() == before
    assert bundles.load(tmp_path) == a_bundle()
    assert found.text() == (
        "the bundle takes up cascade.api_keys, cascade.feedback, cascade.max_queued_requests, "
        "cascade.state, cascade.when_teacher_fails, teacher.engine_args.enable_prefix_caching, "
        "teacher.engine_args.enforce_eager, teacher.gpu_memory_utilization, "
        "teacher.price.per_million_prompt_tokens"
    )
    assert take_up(bundle, later).text() == ""


def test_what_audits_found_of_a_bundle_is_not_left_behind(tmp_path: Path):
    """A threshold that they tightened would be the certified one again."""
    bundle = certified(tmp_path, asked("cascade.feedback={to: kept, audit_rate: 0.5}"))
    found = take_up(bundle, asked("cascade.feedback={to: elsewhere, audit_rate: 0.25}"))
    served = recipe_of(tmp_path).cascade.feedback
    assert served and (served.to, served.audit_rate) == ("kept", 0.25)
    assert found.text() == (
        "the bundle takes up cascade.feedback.audit_rate; cascade.feedback.to stays as certified"
    )
    take_up(bundle, asked())
    assert recipe_of(tmp_path).cascade.feedback is None


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ("teacher.model=another", "teacher.model"),
        ("teacher.revision=main", "teacher.revision"),
        ("teacher.lora=another", "teacher.lora"),
        ("teacher.dtype=float16", "teacher.dtype"),
        ("teacher.max_model_len=64", "teacher.max_model_len"),
        ("teacher.engine_args={enforce_eager: true}", "teacher.engine_args.quantization"),
        (
            "teacher.engine_args={quantization: fp8, enforce_eager: true, hf_overrides: {a: 1}}",
            "teacher.engine_args.hf_overrides",
        ),
        ("cascade.combine=mixture", "cascade.combine"),
        ("labels.target='Q {{ text }}'", ""),
        ("student.text='Q {{ text }}'", ""),
        ("certify.alpha=0.3", ""),
        ("certify.guarantee=selective_agreement", ""),
        ("name=another", ""),
    ],
)
def test_what_the_certificate_rests_on_stays(tmp_path: Path, change: str, kept: str):
    bundle = certified(tmp_path)
    before = recipe_of(tmp_path)
    found = take_up(bundle, asked(change))
    assert recipe_of(tmp_path) == before and not found.taken_up
    assert found.text() == (f"{kept} stays as certified" if kept else "")
    both = take_up(bundle, asked(change, "cascade.max_batch_size=3"))
    assert both.taken_up == ("cascade.max_batch_size",)
    after = before.cascade.model_copy(update={"max_batch_size": 3})
    assert recipe_of(tmp_path) == before.model_copy(update={"cascade": after})


def test_a_layout_of_the_engine_is_taken_up_with_the_cluster_that_it_goes_with(tmp_path: Path):
    bundle = certified(tmp_path, asked("cluster.gpus_per_replica=0.5"))
    spread = "{quantization: fp8, distributed_executor_backend: ray}"
    later = asked(
        f"teacher.engine_args={spread}",
        "teacher.tensor_parallel_size=2",
        "cluster.gpus_per_replica=1",
    )
    take_up(bundle, later)
    assert recipe_of(tmp_path).teacher.spread


def test_a_bundle_without_its_recipe_is_certified_again_as_serving_asks_for(tmp_path: Path):
    certified(tmp_path)
    assert bundle_recipe.certified(tmp_path, "i") and not bundle_recipe.certified(tmp_path, "j")
    (tmp_path / "recipe.json").unlink()
    assert bundle_recipe.certified(tmp_path, "i") is None
    with pytest.raises(BundleMismatch, match="Run `journeyman certify` again"):
        recipe_of(tmp_path)


def test_in_a_store_other_nodes_see_them_also_where_it_was_away_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with serving(monkeypatch) as (_, url):
        one, other = (Mirror(local=tmp_path / name, url=url) for name in ("one", "other"))
        certified(one.local, asked("cascade.max_batch_size=8"))
        one.push()
        later = asked("cascade.max_batch_size=9")  # a file of the same size
        with monkeypatch.context() as away:
            away.setattr(Mirror, "push", _away)
            with pytest.raises(ClusterError):
                take_up(one, later)
        assert one.pull()
        assert take_up(one, later).taken_up == ("cascade.max_batch_size",)
        assert other.pull()
        assert recipe_of(other.local).cascade.max_batch_size == 9
        assert bundles.load(other.local) == a_bundle()


def _away(_: Mirror) -> None:
    raise ClusterError("the store does not answer")


def test_certify_takes_them_up_where_it_has_nothing_else_to_do_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run = steps.Run(asked(f"output={tmp_path}", "cascade.api_keys=/etc/keys"))
    certified(run.path("certify"))
    done: Any = ({"bundle": "b"}, False)
    monkeypatch.setattr(run, "_certify", lambda: done)
    result = run.execute("certify")
    assert recipe_of(run.path("certify")).cascade.api_keys == "/etc/keys"
    cli._print_result(result)
    assert capsys.readouterr().out == (
        "certify   already done for the same inputs; the bundle takes up cascade.api_keys\n"
    )
    assert run.execute("certify").note == ""
