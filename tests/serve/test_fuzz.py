"""Requests made from the endpoints' own description: no 500, and nothing but what it describes."""

from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.serve import fuzzing, tiny
from tests.serve.test_gate import KEY, bearer, ring

EXAMPLES = [10, pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
POSTS = ("/v1/classify", "/v1/chat/completions", "/v1/completions")
GETS = ("/v1/models", "/v1/models/{name}", "/v1/bundle", "/v1/figures", "/healthz", "/readyz")
# A few rules (logprobs for top_logprobs) are in no schema; a 503 is no failure of ours.
LEFT_OUT = [positive_data_acceptance, not_a_server_error]
MODES = pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)


@pytest.fixture(scope="module")
def classifying(run: tiny.Run):
    return schemathesis.openapi.from_asgi("/openapi.json", fuzzing.classifying(run.bundle, ring()))


@pytest.fixture(scope="module")
def writing():
    app = fuzzing.writing(ring(), request_timeout_s=0.3)
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def asked(operation: Any, mode: GenerationMode, n: int) -> Counter[int]:
    """Statuses, of answers that are all as they are described."""
    statuses: Counter[int] = Counter()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=n, deadline=None, suppress_health_check=list(HealthCheck))
    def check(case) -> None:
        answer = case.call_and_validate(timeout=20, headers=bearer(KEY), excluded_checks=LEFT_OUT)
        statuses[answer.status_code] += 1

    check()
    return statuses


@pytest.mark.parametrize("n", EXAMPLES)
@pytest.mark.parametrize("path", POSTS)
@MODES
def test_no_request_gets_a_500_or_an_answer_that_is_not_described(
    classifying, path: str, mode: GenerationMode, n: int
):
    statuses = asked(classifying[path]["POST"], mode, n)
    assert set(statuses) <= {200, 400, 401, 422}  # 422: columns that this bundle has not
    assert statuses[200 if mode is GenerationMode.POSITIVE else 400] > n / 5


@pytest.mark.parametrize("n", EXAMPLES)
@pytest.mark.parametrize("path", POSTS)
@MODES
def test_nor_does_one_to_a_student_that_writes_beside_a_teacher_that_is_not_well(
    writing, path: str, mode: GenerationMode, n: int
):
    statuses = asked(writing[path]["POST"], mode, n)
    assert set(statuses) <= {200, 400, 401, 422, 503, 504}
    assert path != "/v1/classify" or 200 not in statuses


@pytest.mark.parametrize("n", EXAMPLES)
@pytest.mark.parametrize("path", GETS)
def test_nor_does_one_that_only_asks(classifying, path: str, n: int):
    statuses = asked(classifying[path]["GET"], GenerationMode.POSITIVE, n)
    assert set(statuses) <= ({200, 404} if "{" in path else {200})
