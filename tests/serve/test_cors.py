"""Which web pages may ask from a browser: those of the origins that are named, and no others."""

import asyncio
import dataclasses

import httpx
import pytest

from journeyman import recipe
from journeyman.cascade.answering import Answers
from journeyman.errors import RecipeError
from serve.http import api
from serve.schema import ANSWER_HEADERS
from tests.serve import tiny
from tests.serve.test_gate import KEY, bearer, ring
from tests.serve.test_openai import Cascade

OURS, THEIRS = "https://app.example.com", "https://evil.example.com"


@pytest.fixture(scope="module")
def bundle(run: tiny.Run):
    return run.bundle


class OfTwoStudents(Cascade):
    """The second one answers."""

    async def answer(self, texts: list[str], asked: str) -> Answers:
        answers = await super().answer(texts, asked)
        [decision] = answers.decisions
        return Answers(decisions=(dataclasses.replace(decision, stage=2),))


def send(
    bundle,
    origins: tuple[str, ...],
    method: str,
    headers: dict[str, str],
    cascade: Cascade | None = None,
) -> httpx.Response:
    live = tiny.live(cascade or Cascade(), bundle)  # type: ignore[arg-type]
    app = api(live, lambda: None, ring(), cors_origins=origins)

    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://cascade") as client:
            body = {"json": {"input": "x"}} if method == "POST" else {}
            return await client.request(method, "/v1/classify", headers=headers, **body)

    return asyncio.run(call())


def preflight(bundle, origins: tuple[str, ...], origin: str, method: str = "POST"):
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }
    return send(bundle, origins, "OPTIONS", asked)


def test_by_default_no_page_may_ask(bundle):
    for response in (
        preflight(bundle, (), OURS),
        send(bundle, (), "POST", bearer(KEY) | {"Origin": OURS}),
    ):
        assert not [name for name in response.headers if name.startswith("access-control-")]


def test_a_preflight_of_a_named_origin_needs_no_key_and_allows_what_clients_send(bundle):
    response = preflight(bundle, (OURS,), OURS)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == OURS
    assert "access-control-allow-credentials" not in response.headers
    allowed = response.headers["access-control-allow-headers"].lower()
    assert {"authorization", "content-type", "x-stainless-lang"} <= set(
        allowed.replace(" ", "").split(",")
    )
    assert "POST" in response.headers["access-control-allow-methods"]


@pytest.mark.parametrize(
    "origin", [THEIRS, OURS.replace("https", "http"), OURS + ".evil.com", OURS + ":8443", "null"]
)
def test_that_of_another_origin_is_refused(bundle, origin: str):
    response = preflight(bundle, (OURS,), origin)
    assert response.status_code == 400
    assert "access-control-allow-origin" not in response.headers


def test_so_is_that_of_a_method_that_no_endpoint_has(bundle):
    assert preflight(bundle, (OURS,), OURS, "DELETE").status_code == 400


def test_a_page_reads_answers_refusals_and_our_headers_with_a_key_alone(bundle):
    answered = send(bundle, (OURS,), "POST", bearer(KEY) | {"Origin": OURS})
    refused = send(bundle, (OURS,), "POST", {"Origin": OURS})
    other = send(bundle, (OURS,), "POST", bearer(KEY) | {"Origin": THEIRS})
    assert (answered.status_code, refused.status_code) == (200, 401)
    for response in (answered, refused):
        assert response.headers["access-control-allow-origin"] == OURS
        assert response.headers["vary"] == "Origin"
    exposed = answered.headers["access-control-expose-headers"].lower().split(", ")
    ours = [name for name in answered.headers if name.startswith("x-journeyman-")]
    assert ours and {*ours, "retry-after", "x-should-retry"} <= set(exposed)
    assert "access-control-allow-origin" not in other.headers


def test_a_page_reads_every_header_that_an_answer_can_have(bundle):
    answered = send(bundle, (OURS,), "POST", bearer(KEY) | {"Origin": OURS}, OfTwoStudents())
    exposed = answered.headers["access-control-expose-headers"].lower().split(", ")
    ours = {name for name in answered.headers if name.startswith("x-journeyman-")}
    assert answered.headers["x-journeyman-stage"] == "2"
    assert ours == set(ANSWER_HEADERS) <= set(exposed)


@pytest.mark.parametrize("origin", ["*", "https://*.example.com", "app.example.com", OURS + "/"])
def test_what_is_no_origin_is_refused_where_the_recipe_is_loaded(run: tiny.Run, origin: str):
    values = run.recipe.model_dump(mode="json", exclude_unset=True)
    values["cascade"]["cors_origins"] = [origin]
    with pytest.raises(RecipeError, match=r"cascade\.cors_origins"):
        recipe.parse(values)
