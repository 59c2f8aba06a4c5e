"""The experts and routers of an MoE model, found by their shapes and by what they compute, not by their class.

The model may be on the meta device: what a module computes is tried on a copy of it with small random weights of its own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hecate.errors import UserError
from hecate.kernels.common.ffn import ACTIVATIONS, activation
from hecate.model.gated_ffn import decoder_layers

_SMALL_HIDDEN, _SMALL_FFN, _TOKENS = 4, 3, 5
GATE_UP, DOWN = "gate_up_proj", "down_proj"


@dataclass(frozen=True)
class MoeBlock:
    """One layer's router and experts."""

    layer: int
    path: str
    """The dotted name of the module that holds both, such as model.layers.3.mlp."""
    experts: str
    """The name of the experts in the module."""
    router: str
    """The name of the router in the module."""
    num_experts: int
    hidden: int
    ffn: int
    activation: str
    top_k: int

    @property
    def experts_path(self) -> str:
        return f"{self.path}.{self.experts}"

    @property
    def router_path(self) -> str:
        return f"{self.path}.{self.router}"


def find_moe_blocks(model: nn.Module) -> list[MoeBlock]:
    """The decoder layers that have experts, in order; none for a dense model.

    Experts are a module with gate_up_proj [E, 2F, D] and down_proj [E, D, F] that, called as experts(x [T, D], index [T, K],
    weight [T, K]), computes the weighted sum of gated FFNs; their router is the sibling with a weight [E, D] that returns the
    logits, the weights and the indices of the k largest softmax probabilities, renormalized or not.

    Raises:
        UserError: a layer has experts of another kind, with the reason.
    """
    name, layers = decoder_layers(model)
    blocks = []
    for index, layer in enumerate(layers):
        found = [(path, module) for path, module in layer.named_modules() if any(weight.dim() == 3 for weight in module.parameters(False))]
        if not found:
            continue
        where = f"{type(model).__name__}, {name}.{index}"
        if len(found) > 1:
            raise UserError(f"unsupported architecture: {where} has {len(found)} groups of experts; one is supported")
        path, experts = found[0]
        described = _describe_experts(experts)
        if isinstance(described, str):
            raise UserError(
                f"unsupported architecture: {where}.{path} ({type(experts).__name__}): {described}\n"
                f"  experts must compute down(act(gate(x)) * up(x)), without biases, from {GATE_UP} [E, 2F, D] and {DOWN} [E, D, F],\n"
                f"  act one of {', '.join(ACTIVATIONS)}"
            )
        num_experts, hidden, ffn, act = described
        parent_path, _, last = path.rpartition(".")
        parent = layer.get_submodule(parent_path)
        router, top_k = _find_router(parent, num_experts, hidden, f"{where}.{parent_path}")
        blocks.append(MoeBlock(index, f"{name}.{index}.{parent_path}", last, router, num_experts, hidden, ffn, act, top_k))
    return blocks


def _describe_experts(module: nn.Module) -> tuple[int, int, int, str] | str:
    """(experts, hidden, ffn, activation), or why they are not supported."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
    if set(shapes) != {GATE_UP, DOWN}:
        return f"its parameters are {', '.join(sorted(shapes))}"
    (num_experts, double, hidden), down = shapes[GATE_UP], shapes[DOWN]
    ffn = double // 2
    if down != (num_experts, hidden, ffn):
        return f"its weights are {list(shapes[GATE_UP])} and {list(down)}: another order of dimensions"
    random = torch.Generator().manual_seed(0)
    gate_up = torch.randn(num_experts, 2 * _SMALL_FFN, _SMALL_HIDDEN, generator=random, dtype=torch.float64)
    down_weight = torch.randn(num_experts, _SMALL_HIDDEN, _SMALL_FFN, generator=random, dtype=torch.float64)
    x_TD = torch.randn(_TOKENS, _SMALL_HIDDEN, generator=random, dtype=torch.float64)
    index_TK = torch.randint(0, num_experts, (_TOKENS, 1), generator=random)
    weight_TK = torch.rand(_TOKENS, 1, generator=random, dtype=torch.float64)
    try:
        with torch.no_grad():
            expected = _with_weights(module, {GATE_UP: gate_up, DOWN: down_weight})(x_TD, index_TK, weight_TK)
    except Exception as error:  # noqa: BLE001 - a module of unknown code is being tried; the reason is reported
        return f"cannot be called as experts(x, index, weight) ({type(error).__name__})"
    gate, up = torch.einsum("tfd,td->tf", gate_up[index_TK[:, 0]], x_TD).chunk(2, dim=1)
    for act in ACTIVATIONS:
        got = torch.einsum("tdf,tf->td", down_weight[index_TK[:, 0]], activation(act, gate) * up) * weight_TK
        if isinstance(expected, Tensor) and expected.shape == got.shape and torch.allclose(got, expected):
            return num_experts, hidden, ffn, act
    return "they do not compute down(act(gate(x)) * up(x)) for any known activation"


def _find_router(parent: nn.Module, num_experts: int, hidden: int, where: str) -> tuple[str, int]:
    """The router's name in the block, and how many experts it chooses."""
    candidates = [
        (name, child)
        for name, child in parent.named_children()
        if [tuple(parameter.shape) for parameter in child.parameters()] == [(num_experts, hidden)]
    ]
    described = [(name, _describe_router(child, num_experts, hidden)) for name, child in candidates]
    fits = [(name, top_k) for name, top_k in described if isinstance(top_k, int)]
    if len(fits) == 1:
        return fits[0]
    reasons = "; ".join(f"{name}: {reason}" for name, reason in described if isinstance(reason, str))
    raise UserError(
        f"unsupported architecture: {where} has {len(fits) or 'no'} router{'s' if len(fits) > 1 else ''} that is known here\n"
        f"  why: {reasons or f'no module with the one weight [{num_experts}, {hidden}]'}\n"
        "  a router returns logits = W x, and the weights and indices of the k largest softmax probabilities"
    )


def _describe_router(module: nn.Module, num_experts: int, hidden: int) -> int | str:
    """k, or why it is no router that is known."""
    try:
        x_TD, weight, result = _tried(module, num_experts, hidden)
    except Exception as error:  # noqa: BLE001 - as above
        return f"cannot be called with [tokens, hidden] ({type(error).__name__})"
    if not (isinstance(result, tuple) and len(result) == 3 and all(isinstance(part, Tensor) for part in result)):
        return "does not return logits, weights and indices"
    logits, weights, indices = result
    if logits.shape != (_TOKENS, num_experts) or not torch.allclose(logits, F.linear(x_TD, weight), rtol=1e-4, atol=1e-4):
        return "its logits are not W x"
    top, chosen = torch.softmax(logits.float(), dim=1).topk(indices.shape[1], dim=1)
    plain, normalized = top, top / top.sum(1, keepdim=True)
    if not torch.equal(chosen, indices) or not any(torch.allclose(weights.float(), w, rtol=1e-4) for w in (plain, normalized)):
        return "it does not choose the k largest softmax probabilities"
    return int(indices.shape[1])


def renormalises(router: nn.Module) -> bool:
    """Whether a router that was found here divides the probabilities of a token's experts by their sum."""
    (weight,) = router.parameters()
    _, _, (_, weights, _) = _tried(router, *weight.shape)
    return torch.allclose(weights.float().sum(1), torch.ones(_TOKENS))


def _tried(router: nn.Module, num_experts: int, hidden: int) -> tuple[Tensor, Tensor, Any]:
    """Some tokens, a weight, and what the router makes of them with it."""
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(num_experts, hidden, generator=random)
    x_TD = torch.randn(_TOKENS, hidden, generator=random)
    (name,) = [name for name, _ in router.named_parameters()]
    with torch.no_grad():
        return x_TD, weight, _with_weights(router, {name: weight})(x_TD)


def _with_weights(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """The module with other weights, the original untouched; an experts module in transformers' plain implementation."""
    twin = copy.copy(module)
    twin._parameters = {name: nn.Parameter(weight, requires_grad=False) for name, weight in weights.items()}
    config: Any = getattr(module, "config", None)
    if hasattr(config, "_experts_implementation"):
        plain = copy.copy(config)
        plain._experts_implementation = "eager"
        twin.config = plain
    return twin
