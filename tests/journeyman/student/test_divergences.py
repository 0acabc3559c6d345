"""The divergences themselves, on a few outcomes, against the same sums in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp, rel_entr, softmax

from journeyman.student.divergences import Objective, SparseTeacher, sparse_loss, within

DIVERGENCES = ["forward_kl", "reverse_kl", "jsd", "skewed_kl", "total_variation"]
N, K = 7, 5
# The last outcome is the bucket.
TEACHER = log_softmax(np.random.default_rng(0).normal(size=(N, K + 1)) * 2, axis=1)
STUDENT = log_softmax(np.random.default_rng(1).normal(size=(N, K + 1)) * 2, axis=1)


def teacher(logprobs: np.ndarray) -> SparseTeacher:
    return SparseTeacher(
        token_ids=torch.arange(K).repeat(len(logprobs), 1),
        logprobs=torch.tensor(logprobs[:, :K]),
        log_tail_mass=torch.tensor(logprobs[:, K]),
    )


def reference(p: np.ndarray, q: np.ndarray, objective: Objective) -> np.ndarray:
    def kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return rel_entr(a, b).sum(axis=1)

    n_outcomes = K + 1 if objective.tail == "bucket" else K
    p, q = (softmax(x[:, :n_outcomes] / objective.temperature, axis=1) for x in (p, q))
    beta, skew = objective.beta, objective.skew
    mixture = beta * p + (1 - beta) * q
    return (
        objective.temperature**2
        * {
            "forward_kl": kl(p, q),
            "reverse_kl": kl(q, p),
            "jsd": beta * kl(p, mixture) + (1 - beta) * kl(q, mixture),
            "skewed_kl": kl(p, skew * p + (1 - skew) * q),
            "total_variation": np.abs(p - q).sum(axis=1) / 2,
        }[objective.divergence]
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", ["bucket", "renormalised"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 20.0])
@pytest.mark.parametrize("weight", [0.1, 0.5, 0.9])
def test_divergence_is_the_sum_over_outcomes(
    divergence: str, tail: str, temperature: float, weight: float
) -> None:
    objective = Objective(
        divergence=divergence, tail=tail, temperature=temperature, beta=weight, skew=weight
    )
    student = torch.tensor(STUDENT)
    got = sparse_loss(student[:, :K], student[:, K], teacher(TEACHER), objective)
    np.testing.assert_allclose(got, reference(TEACHER, STUDENT, objective), rtol=1e-10)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", ["bucket", "renormalised"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient_is_that_of_finite_differences(
    divergence: str, tail: str, temperature: float
) -> None:
    objective = Objective(divergence=divergence, tail=tail, temperature=temperature)

    def loss(entries: torch.Tensor, log_rest: torch.Tensor) -> torch.Tensor:
        return sparse_loss(entries, log_rest, teacher(TEACHER), objective)

    student = torch.tensor(STUDENT)
    inputs = student[:, :K].clone().requires_grad_(), student[:, K].clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 20.0])
@pytest.mark.parametrize("recorded_tail", [-np.inf, -36.0])
def test_with_every_token_on_record_there_is_no_bucket(
    divergence: str, temperature: float, recorded_tail: float
) -> None:
    p, q = (x[:, :K] - logsumexp(x[:, :K], axis=1, keepdims=True) for x in (TEACHER, STUDENT))
    # What rounding leaves for a tail is no outcome either.
    record = teacher(np.concatenate((p, np.full((N, 1), recorded_tail)), axis=1))
    got = sparse_loss(
        torch.tensor(q),
        torch.full((N,), -torch.inf, dtype=torch.float64),
        record,
        Objective(divergence=divergence, temperature=temperature),
    )
    expected = reference(
        p, q, Objective(divergence=divergence, temperature=temperature, tail="renormalised")
    )
    np.testing.assert_allclose(got, expected, rtol=1e-9)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_that_the_student_does_not_have_are_among_the_others(divergence: str) -> None:
    random, n_tokens = np.random.default_rng(2), 6  # of the teacher's 9
    p = log_softmax(2 * random.normal(size=(N, 9)), axis=1)
    q = torch.tensor(log_softmax(random.normal(size=(N, n_tokens)), axis=1))
    ids = np.argsort(-p, axis=1)[:, :K]
    recorded = np.take_along_axis(p, ids, axis=1)
    record = SparseTeacher(
        token_ids=torch.tensor(ids),
        logprobs=torch.tensor(recorded),
        log_tail_mass=torch.tensor(np.log1p(-np.exp(recorded).sum(axis=1))),
    )
    known = within(record, n_tokens)
    assert (known.token_ids[:, 0] >= 0).all() and (known.token_ids < 0).any()
    at = torch.where(known.token_ids < 0, known.token_ids[:, :1], known.token_ids)
    rest = q.scatter(1, at, -torch.inf)
    objective = Objective(divergence=divergence)
    got = sparse_loss(q.gather(1, at), rest.logsumexp(-1), known, objective)
    for i in range(N):
        entries = [token for token in ids[i] if token < n_tokens]
        both = [np.array([*np.exp(x[entries]), 1 - np.exp(x[entries]).sum()])
                for x in (p[i], q[i].numpy())]  # fmt: skip
        expected = {
            "forward_kl": rel_entr(*both).sum(),
            "reverse_kl": rel_entr(*both[::-1]).sum(),
            "total_variation": np.abs(both[0] - both[1]).sum() / 2,
        }
        if divergence in expected:
            assert got[i] == pytest.approx(expected[divergence], rel=1e-9)
        assert torch.isfinite(got[i]) and got[i] >= 0
    assert within(record, 9) is record


def test_draws_of_tokens_that_the_student_does_not_have_are_left_out() -> None:
    shares = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]], dtype=torch.float64)
    record = SparseTeacher(
        token_ids=torch.tensor([[7, 2, 3], [8, -1, -1]]),
        logprobs=shares.log(),
        log_tail_mass=torch.full((2,), -torch.inf, dtype=torch.float64),
        sampled=True,
    )
    known = within(record, 7)
    assert known.token_ids.tolist() == [[2, 3, -1], [-1, -1, -1]]
    np.testing.assert_allclose(known.logprobs.exp(), [[0.6, 0.4, 0], [0, 0, 0]])
    student = torch.log(torch.full((2, 3), 0.25, dtype=torch.float64))
    got = sparse_loss(student, torch.log(torch.ones(2) / 4), known, Objective())
    np.testing.assert_allclose(got, [rel_entr([0.6, 0.4], 0.25).sum(), 0], atol=1e-12)


def test_counts_weigh_the_log_probabilities_of_draws() -> None:
    counts = np.array([[5, 2, 1, 0, 0]])
    record = SparseTeacher(
        token_ids=torch.tensor([[0, 1, 2, -1, -1]]),
        logprobs=torch.tensor(np.log(np.where(counts, counts / 8, np.nan))).nan_to_num(-torch.inf),
        log_tail_mass=torch.tensor([-torch.inf]),
        sampled=True,
    )
    student = torch.tensor(STUDENT[:1])
    got = sparse_loss(student[:, :K], student[:, K], record, Objective())
    share = counts[0, :3] / 8
    np.testing.assert_allclose(got, [(share * (np.log(share) - STUDENT[0, :3])).sum()], rtol=1e-12)
