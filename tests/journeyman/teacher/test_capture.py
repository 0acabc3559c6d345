"""Arrays that vLLM's engine core sends for each step, as one request's."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from journeyman.teacher import capture


def step(*entries: tuple[int, float]) -> Any:
    """Of one position: the token itself, and the likeliest ones behind it."""
    ids, values = zip(*entries, strict=True)
    return SimpleNamespace(
        logprob_token_ids=np.array([ids], np.int32), logprobs=np.array([values], np.float32)
    )


def test_a_request_beside_one_that_asks_for_more_entries_has_its_own_in_every_step():
    kept = [step((3, -0.5), (9, -0.1)), step((4, -0.7)), step((5, -0.2), (5, -0.2))]
    ids, values = capture.generated(SimpleNamespace(logprobs=kept))  # type: ignore[arg-type]
    assert ids.tolist() == [[3], [4], [5]]
    np.testing.assert_allclose(values[:, 0], [-0.5, -0.7, -0.2])
