"""Configs that take a new bundle up: what changes in them, and that nothing else does."""

import copy
from typing import Any

import pytest

from journeyman.cascade import rollout
from journeyman.errors import DataError

NEW = "/shared/runs/july/bundle"


def a_config(*applications: dict[str, Any]) -> dict[str, Any]:
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 80},
        "applications": list(applications) or [a_cascade()],
    }


def a_cascade(bundle: str = "runs/june/bundle", **more: Any) -> dict[str, Any]:
    return {
        "name": "cascade",
        "import_path": "serve.app:app",
        "args": {"bundle": bundle},
        "runtime_env": {"env_vars": {"PYTHONPATH": ".:platform"}},
        **more,
    }


def anything(_: str) -> bool:
    return True


def user_config(config: dict[str, Any], place: int = 0) -> dict[str, Any]:
    [ours] = [d for d in config["applications"][place]["deployments"] if d["name"] == "Cascade"]
    return ours["user_config"]


def test_the_bundle_that_answers_goes_on_and_the_new_one_is_tried_beside_it():
    planned = rollout.plan(a_config(), NEW, anything)
    assert planned.present == "runs/june/bundle"
    assert user_config(planned.shadow) == {
        "bundle": "runs/june/bundle", "candidate": {"bundle": NEW},
    }  # fmt: skip
    assert user_config(planned.promote) == {"bundle": NEW}


def test_nothing_else_of_a_config_changes():
    other = {"name": "other", "import_path": "shop:app", "route_prefix": "/shop"}
    teacher = {"name": "Teacher", "num_replicas": 2}
    ingress = {"name": "Cascade", "max_queued_requests": 7, "user_config": {"bundle": "a"}}
    config = a_config(other, a_cascade(deployments=[teacher, ingress]))
    before = copy.deepcopy(config)
    planned = rollout.plan(config, NEW, anything)
    assert config == before
    for changed in (planned.shadow, planned.promote):
        changed["applications"][1]["deployments"][1]["user_config"] = {"bundle": "a"}
        assert changed == before


def test_a_bundle_that_took_over_while_the_cascade_ran_is_the_present_one():
    tried = {"bundle": "runs/june/bundle", "candidate": {"bundle": "x", "mode": "canary"}}
    config = a_config(
        a_cascade("runs/may/bundle", deployments=[{"name": "Cascade", "user_config": tried}])
    )
    assert rollout.present(config) == ["runs/june/bundle"]
    planned = rollout.plan(config, NEW, anything)
    assert planned.present == "runs/june/bundle"
    assert user_config(planned.shadow)["candidate"] == {"bundle": NEW}


def test_of_several_cascades_it_is_the_one_that_the_bundle_fits():
    config = a_config(a_cascade("routing"), a_cascade("policy", name="policy"))
    planned = rollout.plan(config, NEW, lambda bundle: bundle == "policy")
    assert planned.present == "policy" and user_config(planned.promote, 1) == {"bundle": NEW}
    assert planned.shadow["applications"][0] == a_cascade("routing")


@pytest.mark.parametrize(
    ("applications", "n"),
    [
        ([{"import_path": "shop:app"}], 0),
        ([a_cascade(args={})], 0),
        ([a_cascade("a"), a_cascade("b")], 2),
    ],
)
def test_no_cascade_or_several_are_refused(applications: list[dict[str, Any]], n: int):
    with pytest.raises(DataError, match=rf"^{n} of its applications are cascades"):
        rollout.plan(a_config(*applications), NEW, anything)
