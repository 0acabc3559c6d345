"""Requests made from the endpoints' own description: no 500, and nothing but what it describes."""

from collections import Counter

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from journeyman.cascade.answering import Cascade
from journeyman.cascade.policy import Policy
from journeyman.recipe import Cascade as Settings
from journeyman.teacher.answers import ClassLabels
from serve.http import api
from tests.serve import tiny


class Teacher:
    """Takes any text, by its length alone."""

    async def labels(self, texts: list[str]) -> list[ClassLabels]:
        return [
            ClassLabels(
                class_logprobs=np.log(np.roll([0.7, 0.2, 0.1], len(text)).astype(np.float32)),
                label_mass=None,
                n_prompt_tokens=len(text),
                n_output_tokens=1,
            )
            for text in texts
        ]


class Student:
    """Decides by the text's length, with the real policy."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    async def submit(self, items: list[str]) -> list:
        return self._policy.decide_batch([np.roll([3.0, 1.0, 0.5], len(x)) for x in items])


PATHS = ("/v1/classify", "/v1/chat/completions", "/v1/completions")


@pytest.fixture(scope="module")
def described(run: tiny.Run):
    policy = Policy.from_bundle(run.bundle)
    cascade = Cascade(policy, Student(policy), Teacher(), Settings(request_timeout_s=5.0))
    app = api(tiny.live(cascade, run.bundle), lambda: None)
    return schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", PATHS)
def test_no_request_gets_a_500_or_an_answer_that_is_not_described(
    described, path: str, mode: GenerationMode
):
    statuses: Counter[int] = Counter()  # a few rules (logprobs for top_logprobs) are in no schema

    @given(case=described[path]["POST"].as_strategy(generation_mode=mode))
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    def check(case) -> None:
        answer = case.call_and_validate(timeout=20, excluded_checks=[positive_data_acceptance])
        statuses[answer.status_code] += 1

    check()
    assert set(statuses) <= {200, 400, 422}  # 422: columns that this bundle has not
    assert statuses[200 if mode is GenerationMode.POSITIVE else 400] > 5
