"""The linear layers of a model's decoder layers, as units that experts may stand over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from hecate.errors import UserError
from hecate.experts.family import FfnSource
from hecate.model.gated_ffn import PlaceWithoutExperts, decoder_layers
from hecate.parallel.values.expert_kinds import LinearSizes
from hecate.parallel.values.units import Unit

_QKV = ("qkv_proj", "query_key_value", "c_attn", "W_pack", "Wqkv", "in_proj_qkv", "in_proj_qkvz")
FUSED = {
    **dict.fromkeys(_QKV, ("q_proj", "k_proj", "v_proj")),
    **dict.fromkeys(("gate_up_proj", "input_linear"), ("gate_proj", "up_proj")),
}
"""The names of linears that compute several projections at once, and those projections."""


@dataclass(frozen=True)
class FoundLinear(PlaceWithoutExperts):
    """One linear layer of a decoder layer."""

    unit: Unit
    path: str
    """The dotted name of the module, such as model.layers.3.self_attn.q_proj."""
    shape: LinearSizes

    @property
    def name(self) -> str:
        """The last part of its name."""
        return self.path.rpartition(".")[2]

    def source(self, model: nn.Module) -> FfnSource:
        """Nothing: the linear stays in the model, and its experts are pairs beside it."""
        return FfnSource()


def find_linears(model: nn.Module) -> list[FoundLinear]:
    """Every linear of the decoder layers, by layer and in the order of the layer's modules, which is about that of their use.

    Raises:
        UserError: there are no decoder layers.
    """
    name, layers = decoder_layers(model)
    return [
        FoundLinear(Unit(index, module), f"{name}.{index}.{module}", LinearSizes(child.in_features, child.out_features))
        for index, layer in enumerate(layers)
        for module, child in layer.named_modules()
        if type(child) is nn.Linear
    ]


def ends_of(path: str) -> set[str]:
    """Return a dotted name and each of its ends from a dot on. A target is one of them, as PEFT has it."""
    parts = path.split(".")
    return {".".join(parts[start:]) for start in range(len(parts))}


def target_linears(
    found: Sequence[FoundLinear], target_modules: Sequence[str], model: str, *, without_routers: bool = False
) -> list[FoundLinear]:
    """The linears whose last names are targets, in their order.

    Args:
        model: the name of the model's class, for messages.
        without_routers: no linear gets a router, so that one which computes several projections may be a target as any other.

    Raises:
        UserError: a target matches none, or one that computes several projections at once.
    """
    names = dict.fromkeys(linear.name for linear in found)
    for target in target_modules:
        holder = next((name for name, parts in FUSED.items() if name in names and target in (name, *parts)), None)
        if holder is not None and ((target == holder and not without_routers) or target not in names):
            parts = ", ".join(FUSED[holder])
            raise UserError(
                f"lora.target_modules: {target}: {model} computes {parts} with one weight, {holder}, whose parts cannot be told apart\n"
                f"  with moe.unit=linear each projection needs a router of its own: leave {parts} and {holder} out, or take a model with "
                "separate projections"
            )
        if target not in names:
            raise UserError(f"lora.target_modules: {target} matches no linear of {model}'s decoder layers; they have {', '.join(names)}")
    return [linear for linear in found if linear.name in target_modules]
