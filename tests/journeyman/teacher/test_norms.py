"""Fused norms against float64, in a model's modules as vLLM builds them."""

import numpy as np
import pytest
import torch

from journeyman.teacher import norms

WIDTH, EPSILON = 96, 1e-5


@pytest.fixture
def norm(vllm_config):
    from vllm.model_executor.layers.layernorm import RMSNorm

    norm = RMSNorm(WIDTH, eps=EPSILON)
    norm.weight.data.copy_(torch.linspace(0.5, 2, WIDTH))
    return norm


@pytest.fixture
def vllm_config():
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


def rows(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(0, 3, shape).astype(np.float32))


def expected(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Zhang and Sennrich 2019, Root Mean Square Layer Normalization."""
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * weight


@pytest.mark.parametrize("shape", [(1, WIDTH), (37, WIDTH), (5, 3, WIDTH)])
def test_a_fused_norm_is_what_its_formula_says(norm, shape):
    assert norms.fuse(torch.nn.ModuleList([norm])) == 1

    x = rows(*shape)
    got = norm(x)

    np.testing.assert_allclose(got.numpy(), expected(x.numpy(), norm.weight.detach().numpy()),
                               rtol=1e-5, atol=1e-6)  # fmt: skip
    assert torch.equal(x, rows(*shape))  # as it was


def test_with_a_residual_it_is_of_the_sum_which_is_given_as_well(norm):
    norms.fuse(torch.nn.ModuleList([norm]))
    x, residual = rows(16, WIDTH), rows(16, WIDTH).flip(0).contiguous()
    total = x.numpy().astype(np.float64) + residual.numpy()

    got, summed = norm(x, residual)

    np.testing.assert_allclose(summed.numpy(), total, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.numpy(), expected(total, norm.weight.detach().numpy()),
                               rtol=1e-5, atol=1e-5)  # fmt: skip


def test_what_the_kernel_is_not_for_stays_vllms_own(norm):
    norms.fuse(torch.nn.ModuleList([norm]))
    apart = rows(16, 2 * WIDTH)[:, :WIDTH]  # a view with gaps, as a split of one projection is

    np.testing.assert_allclose(norm(apart).numpy(),
                               expected(apart.numpy(), norm.weight.detach().numpy()),
                               rtol=1e-5, atol=1e-6)  # fmt: skip


def test_a_norm_of_another_kind_is_left_alone(vllm_config):
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

    model = torch.nn.ModuleList([GemmaRMSNorm(WIDTH), RMSNorm(WIDTH, var_hidden_size=8)])

    assert norms.fuse(model) == 0
