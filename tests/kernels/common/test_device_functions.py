"""What kernels compute on the device against torch: activations with their derivatives, and dropout's mask."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from hecate.kernels.common.device_functions import activate, activate_with_derivative, dropout_keep, dropout_word
from hecate.kernels.common.dropout import Dropout
from hecate.kernels.common.ffn import ACTIVATIONS, activation


@triton.jit
def _activations_kernel(p_x, p_act, p_same, p_slope, ACTIVATION: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(p_x + at)
    tl.store(p_act + at, activate(x, ACTIVATION))
    act, slope = activate_with_derivative(x, ACTIVATION)
    tl.store(p_same + at, act)
    tl.store(p_slope + at, slope)


@triton.jit
def _keep_kernel(p_word, p_keep, dropped_levels, M: tl.constexpr, N: tl.constexpr):
    o_M, o_N = tl.arange(0, M), tl.arange(0, N)
    keep = dropout_keep(tl.load(p_word + o_M), o_N, dropped_levels)
    tl.store(p_keep + o_M[:, None] * N + o_N[None, :], keep.to(tl.int32))


@triton.jit(do_not_specialize=["stream", "key"])
def _word_kernel(p_token, p_word, stream, key, M: tl.constexpr):
    o_M = tl.arange(0, M)
    tl.store(p_word + o_M, dropout_word(tl.load(p_token + o_M), stream, key))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_derivatives(name: str, device: torch.device) -> None:
    x = torch.linspace(-6, 6, 64, device=device)
    act, same, slope = (torch.empty_like(x) for _ in range(3))
    _activations_kernel[(1,)](x, act, same, slope, ACTIVATION=name, N=64)
    wide = x.double().requires_grad_()
    want = activation(name, wide)
    (derivative,) = torch.autograd.grad(want.sum(), wide)
    torch.testing.assert_close(act.double(), want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(same.double(), want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope.double(), derivative, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_is_torch_s_bit_for_bit(p: float, device: torch.device) -> None:
    rows = Dropout(p, key=7).rows(torch.arange(32, device=device) * 1000, 3)
    kept = torch.empty(32, 64, dtype=torch.int32, device=device)
    _keep_kernel[(1,)](rows.word_R, kept, rows.dropped_levels, M=32, N=64)
    assert torch.equal(kept, rows.keep(64, torch.int32))


@pytest.mark.parametrize("key", [7, -7, 0x2545F4914F6CDD1D, -(2**63)])
@pytest.mark.parametrize("stream", [0, 3, 1 << 30])
def test_words_are_torch_s_bit_for_bit(key: int, stream: int, device: torch.device) -> None:
    token = torch.arange(32, device=device) * (1 << 28)
    word = torch.empty(32, dtype=torch.int32, device=device)
    _word_kernel[(1,)](token, word, stream, key, M=32)
    assert torch.equal(word, Dropout(0.5, key).rows(token, stream).word_R)
