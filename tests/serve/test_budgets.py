"""Keys with a budget, where the replica that holds a lease on it is lost: real Ray Serve."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from journeyman.cascade import keys
from tests.conftest import children
from tests.ray_head import until
from tests.serve.conftest import Running
from tests.serve.test_overload import slow_classes
from tests.serve.test_scaling import with_settings


@pytest.mark.slow
def test_a_key_may_pay_again_as_soon_as_a_lost_replica_has_a_successor(
    cascade: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from ray import serve

    from serve import app

    teacher, _ = slow_classes()
    actor: Callable[..., Any] = app._actor
    monkeypatch.setattr(app, "Teacher", teacher)
    monkeypatch.setattr(app, "_actor", lambda settings, *_: actor(settings, 0))
    key, file = keys.new_key(), tmp_path / "keys"
    file.write_text(keys.line_of("shop", key, None, dollars_per_day=5.0) + "\n")
    bundle = with_settings(cascade.run, tmp_path, api_keys=str(file), state=str(tmp_path / "state"))
    recipe = json.loads((bundle / "recipe.json").read_text())
    recipe["teacher"]["price"] = {"per_million_prompt_tokens": 1.0}
    (bundle / "recipe.json").write_text(json.dumps(recipe))
    serve.run(app.build(bundle), name="paid", route_prefix="/paid")
    bearer = {"Authorization": f"Bearer {key}"}
    codes: list[str] = []
    try:
        with httpx.Client(base_url=f"{cascade.url}/paid", headers=bearer, timeout=60) as client:

            def answers() -> bool:
                response = client.post("v1/classify", json={"input": cascade.run.accepted[0]})
                if response.status_code == 429:
                    codes.append(response.json()["error"]["code"])
                    assert int(response.headers["Retry-After"]) <= 2
                return response.status_code == 200

            until(answers, 30)
            [ingress] = children("ServeReplica:paid:Cascade")
            ingress.kill()
            until(lambda: children("ServeReplica:paid:Cascade") not in ([], [ingress]), 60)
            back = time.monotonic()
            until(answers, 60)
            assert time.monotonic() - back < 50, "the lost one's lease is free only after a minute"
    finally:
        serve.delete("paid")
    assert set(codes) <= {"budget_not_settled"}
