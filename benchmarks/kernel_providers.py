"""The layers that `benchmarks.kernels` compares with hecate's and that need only torch.

Each is a function of `Inputs` and of `compiled`, which says whether torch.compile compiles it (on a GPU; checks of its formula do not).

Shapes: T tokens, D hidden, F ffn hidden, E experts, K assignments of a token, r rank, P assignments sorted by expert.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_cases import Inputs, Layer
from hecate.kernels.common.ffn import PROJECTIONS

Provider = Callable[[Inputs, bool], Layer]


def frozen_ffn(inputs: Inputs, compiled: bool) -> Layer:
    """Compute only the frozen FFN, which every layer needs: once per token, or once per assignment if experts have their own weights.

    It is differentiated in x only. Its output is not that of the MoE layer.
    """
    leaves = {"x": inputs.x_TD}
    if inputs.base is None:
        operands = (inputs.x_TD, inputs.slot_TK, inputs.weight_TK.detach(), *frozen_experts(inputs))
        return Layer(functools.partial(_maybe(_frozen_experts, compiled), *operands), leaves, lambda found: {})
    base = inputs.base
    return Layer(
        functools.partial(_maybe(_dense_ffn, compiled), inputs.x_TD, base.gate_FD, base.up_FD, base.down_DF), leaves, lambda found: {}
    )


def stock_torch(inputs: Inputs, compiled: bool) -> Layer:
    """Compute the layer in the way that is natural without kernels: the base once per token, all experts' LoRA in masked dense GEMMs.

    This form does not exist for experts with their own weights; for those see `grouped_mm`.
    """
    assert inputs.base is not None
    base = (inputs.base.gate_FD, inputs.base.up_FD, inputs.base.down_DF)
    layer = functools.partial(_maybe(_masked_dense, compiled), inputs.x_TD, inputs.slot_TK, inputs.weight_TK, *base, *_pairs(inputs))
    return Layer(layer, inputs.leaves())


def grouped_mm(inputs: Inputs, compiled: bool) -> Layer:
    """Compute every assignment with its expert's whole FFN by torch's grouped GEMM. Each expert has a copy of a shared base."""
    operands = (inputs.x_TD, inputs.slot_TK, inputs.weight_TK, *frozen_experts(inputs))
    layer = functools.partial(_maybe(_grouped, compiled), *operands, *_pairs(inputs))
    return Layer(layer, inputs.leaves())


def _pairs(inputs: Inputs) -> tuple[list[Tensor], list[float]]:
    """Return A and B of gate, up and down, and their scales."""
    loras = [inputs.loras[name] for name in PROJECTIONS]
    return [tensor for lora in loras for tensor in (lora.a_SrI, lora.b_SOr)], [lora.scale for lora in loras]


def _maybe(function: Callable[..., Tensor], compiled: bool) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False) if compiled else function


def _dense_ffn(x_TD: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    return (F.silu(x_TD @ gate_FD.T) * (x_TD @ up_FD.T)) @ down_DF.T


def _masked_dense(
    x_TD: Tensor,
    slot_TK: Tensor,
    weight_TK: Tensor,
    gate_FD: Tensor,
    up_FD: Tensor,
    down_DF: Tensor,
    pairs: list[Tensor],
    scales: list[float],
) -> Tensor:
    a_gate, b_gate, a_up, b_up, a_down, b_down = pairs
    num_experts, rank, _ = a_gate.shape
    # [T, K, E·r]: 1 where a column belongs to the assignment's expert.
    mask = F.one_hot(slot_TK, num_experts).to(x_TD.dtype).repeat_interleave(rank, dim=2)
    low_gate, low_up = (x_TD @ torch.cat([a_gate, a_up]).flatten(0, 1).T).chunk(2, dim=1)
    b_gate, b_up, b_down = (b.permute(0, 2, 1).flatten(0, 1) for b in (b_gate, b_up, b_down))
    gate_TF, up_TF = x_TD @ gate_FD.T, x_TD @ up_FD.T
    weight = weight_TK.to(x_TD.dtype)
    hidden, low_down = [], []
    for k in range(slot_TK.shape[1]):
        gate = gate_TF + scales[0] * ((low_gate * mask[:, k]) @ b_gate)
        up = up_TF + scales[1] * ((low_up * mask[:, k]) @ b_up)
        h = F.silu(gate) * up
        low_down.append((h @ a_down.flatten(0, 1).T) * (mask[:, k] * weight[:, k, None]))
        hidden.append(weight[:, k, None] * h)
    return sum(hidden[1:], hidden[0]) @ down_DF.T + scales[2] * (sum(low_down[1:], low_down[0]) @ b_down)


def frozen_experts(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return frozen weights stacked for grouped GEMMs: gate and up as [E, D, 2F], down as [E, F, D], with the strides of linear layers."""
    shape = inputs.shape
    if inputs.base is not None:
        gate_up = torch.cat([inputs.base.gate_FD, inputs.base.up_FD]).repeat(shape.experts, 1, 1)
        down = inputs.base.down_DF.repeat(shape.experts, 1, 1)
    else:
        assert inputs.frozen_EC is not None
        gate_up, down = inputs.frozen_EC.split((2 * shape.ffn * shape.hidden, shape.ffn * shape.hidden), dim=1)
        gate_up, down = gate_up.view(shape.experts, 2 * shape.ffn, shape.hidden), down.view(shape.experts, shape.hidden, shape.ffn)
    return gate_up.transpose(1, 2), down.transpose(1, 2)


def _sorted_pairs(slot_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the assignments sorted by expert, their tokens, and the end of each expert's range (int32)."""
    sorted_P, order_P = slot_TK.flatten().sort(stable=True)
    ends_E = torch.searchsorted(sorted_P, torch.arange(num_experts, device=slot_TK.device), right=True)
    return order_P, order_P // slot_TK.shape[1], ends_E.to(torch.int32)


def _combine(y_PD: Tensor, order_P: Tensor, weight_TK: Tensor) -> Tensor:
    place_TK = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(len(order_P), device=order_P.device)).view_as(weight_TK)
    return (y_PD[place_TK] * weight_TK.to(y_PD.dtype)[:, :, None]).sum(1)


def _frozen_experts(x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    order_P, token_P, ends_E = _sorted_pairs(slot_TK, len(gate_up))
    gate, up = F.grouped_mm(x_TD[token_P], gate_up, offs=ends_E).chunk(2, dim=1)
    return _combine(F.grouped_mm(F.silu(gate) * up, down, offs=ends_E), order_P, weight_TK)


def _grouped(
    x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, gate_up: Tensor, down: Tensor, pairs: list[Tensor], scales: list[float]
) -> Tensor:
    a_gate, b_gate, a_up, b_up, a_down, b_down = pairs
    rank = a_gate.shape[1]
    order_P, token_P, ends_E = _sorted_pairs(slot_TK, len(gate_up))
    x_PD = x_TD[token_P]
    low = F.grouped_mm(x_PD, torch.cat([a_gate, a_up], dim=1).transpose(1, 2), offs=ends_E)
    gate, up = F.grouped_mm(x_PD, gate_up, offs=ends_E).chunk(2, dim=1)
    gate = gate + scales[0] * F.grouped_mm(low[:, :rank].contiguous(), b_gate.transpose(1, 2), offs=ends_E)
    up = up + scales[1] * F.grouped_mm(low[:, rank:].contiguous(), b_up.transpose(1, 2), offs=ends_E)
    h = F.silu(gate) * up
    low_down = F.grouped_mm(h, a_down.transpose(1, 2), offs=ends_E)
    y_PD = F.grouped_mm(h, down, offs=ends_E) + scales[2] * F.grouped_mm(low_down, b_down.transpose(1, 2), offs=ends_E)
    return _combine(y_PD, order_P, weight_TK)
