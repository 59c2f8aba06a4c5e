"""The layers that `benchmarks.kernels` times, the inputs of each, and the check that a layer's results are right.

Shapes: T tokens, D hidden, F ffn hidden, E experts, K assignments of a token, r rank, C elements of an expert's chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.ffn import PROJECTIONS, FfnBase, FfnShape
from hecate.kernels.common.low_rank import LowRankPairs
from hecate.kernels.experts.reference import moe_lora_ffn_reference
from hecate.kernels.mixlora.reference import mixlora_ffn_reference

TOLERANCE = 0.02
"""the largest relative difference, in the Frobenius norm, of a bfloat16 result from the float32 reference; a wrong formula has far more"""
LORA_SCALE = 2.0


@dataclass(frozen=True)
class LayerShape:
    name: str
    hidden: int
    ffn: int
    rank: int
    experts: int
    k: int
    tokens: int
    shared_base: bool = True
    """whether all experts share one frozen FFN; otherwise each has its own frozen weights"""


SHAPES = (
    LayerShape("7B", hidden=4096, ffn=14336, rank=16, experts=8, k=2, tokens=8192),
    LayerShape("1B", hidden=2048, ffn=5632, rank=8, experts=8, k=2, tokens=16384),
    LayerShape("135M", hidden=576, ffn=1536, rank=8, experts=8, k=2, tokens=8192),
    LayerShape("fine-grained", hidden=2048, ffn=768, rank=16, experts=128, k=8, tokens=8192, shared_base=False),
)


@dataclass(frozen=True)
class Inputs:
    """The inputs and parameters of a layer. Tensors that are differentiated are leaves."""

    shape: LayerShape
    x_TD: Tensor
    slot_TK: Tensor
    weight_TK: Tensor
    """float32, positive; each token's weights sum to 1, and the largest comes first"""
    base: FfnBase | None
    frozen_EC: Tensor | None
    """the chunks of the frozen experts, in the layout of `FfnShape`"""
    loras: Mapping[str, LowRankPairs]
    dy_TD: Tensor

    @property
    def routed(self) -> RoutedTokens:
        return RoutedTokens(self.x_TD, self.slot_TK, self.weight_TK)

    @property
    def ffn_shape(self) -> FfnShape:
        return FfnShape(self.shape.hidden, self.shape.ffn, "silu")

    def leaves(self) -> dict[str, Tensor]:
        """Return x, weight, and A and B of each projection, by name."""
        pairs = {f"{name}.{part}": tensor for name, lora in self.loras.items() for part, tensor in (("A", lora.a_SrI), ("B", lora.b_SOr))}
        return {"x": self.x_TD, "weight": self.weight_TK, **pairs}


def make_inputs(shape: LayerShape, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Inputs:
    """Return the same inputs for the same arguments. Values are as large as in a trained layer, and no LoRA pair is zero."""
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=random, device=device) * std).to(dtype)

    hidden, ffn = shape.hidden, shape.ffn
    base = frozen = None
    if shape.shared_base:
        gate, up = normal(ffn, hidden, std=hidden**-0.5), normal(ffn, hidden, std=hidden**-0.5)
        base = FfnBase(gate, up, normal(hidden, ffn, std=ffn**-0.5), "silu")
    else:
        frozen = torch.cat(
            [normal(shape.experts, 2 * ffn * hidden, std=hidden**-0.5), normal(shape.experts, ffn * hidden, std=ffn**-0.5)], dim=1
        )
    loras = {}
    for name in PROJECTIONS:
        wide, narrow = (ffn, hidden) if name == "down_proj" else (hidden, ffn)
        a, b = (
            normal(shape.experts, shape.rank, wide, std=wide**-0.5),
            normal(shape.experts, narrow, shape.rank, std=0.2 * shape.rank**-0.5),
        )
        loras[name] = LowRankPairs(a.requires_grad_(), b.requires_grad_(), LORA_SCALE)
    logits = torch.randn(shape.tokens, shape.experts, generator=random, device=device)
    weight, slot = logits.softmax(1).topk(shape.k)
    return Inputs(
        shape,
        normal(shape.tokens, hidden).requires_grad_(),
        slot,
        (weight / weight.sum(1, keepdim=True)).requires_grad_(),
        base,
        frozen,
        loras,
        normal(shape.tokens, hidden),
    )


@dataclass(frozen=True)
class Layer:
    """A provider's layer over some inputs, ready to run."""

    forward: Callable[[], Tensor]
    leaves: Mapping[str, Tensor]
    """the tensors that it differentiates"""
    gradients: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda found: found
    """a function that returns its gradients by the names and in the layout of `Inputs.leaves`; some may be missing"""

    def step(self, dy_TD: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the forward and the backward pass. This is what is timed."""
        y_TD = self.forward()
        return y_TD, torch.autograd.grad(y_TD, list(self.leaves.values()), dy_TD)

    def results(self, dy_TD: Tensor) -> dict[str, Tensor]:
        """Return the output and the gradients by name."""
        y_TD, found = self.step(dy_TD)
        return {"y": y_TD.detach(), **self.gradients(dict(zip(self.leaves, found, strict=True)))}


def reference(inputs: Inputs) -> Layer:
    """Return the layer of the plain formula, in float32 and with the same values."""
    leaves = {name: leaf.detach().float().requires_grad_() for name, leaf in inputs.leaves().items()}
    loras = {name: LowRankPairs(leaves[f"{name}.A"], leaves[f"{name}.B"], lora.scale) for name, lora in inputs.loras.items()}
    routed = RoutedTokens(leaves["x"], inputs.slot_TK, leaves["weight"])
    if inputs.base is not None:
        base = FfnBase(inputs.base.gate_FD.float(), inputs.base.up_FD.float(), inputs.base.down_DF.float(), inputs.base.activation)
        return Layer(functools.partial(mixlora_ffn_reference, routed, base, loras), leaves)
    assert inputs.frozen_EC is not None
    frozen = list(inputs.frozen_EC.float())
    return Layer(functools.partial(moe_lora_ffn_reference, routed, frozen, loras, inputs.ffn_shape), leaves)


def expected(inputs: Inputs) -> dict[str, Tensor]:
    """Return the results that every layer over these inputs must have: those of `reference`."""
    return reference(inputs).results(inputs.dy_TD.float())


def errors(results: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the relative error of each result in the Frobenius norm; infinite if it is not finite or of another shape."""
    found = {}
    for name, result in results.items():
        right = wanted[name].float()
        if result.shape != right.shape or not bool(result.isfinite().all()):
            found[name] = float("inf")
        else:
            found[name] = float((result.float() - right).norm() / right.norm())
    return found
