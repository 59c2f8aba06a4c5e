"""Gated FFNs found by what they compute, not by their class."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor, nn

from hecate.errors import UserError
from hecate.experts.family import FfnSource
from hecate.kernels.common.ffn import ACTIVATIONS, PROJECTIONS, FfnBase, FfnShape, activation
from hecate.parallel.values.units import Unit


class PlaceWithoutExperts:
    """What the places of a dense model where experts may be put have in common; see `hecate.model.insert.FoundUnit`."""

    path: str

    @property
    def block_path(self) -> str:
        """The module itself is all that is no attention."""
        return self.path

    @property
    def router_path(self) -> None:
        return None

    @property
    def own_experts(self) -> int:
        return 0


@dataclass(frozen=True)
class GatedFfn(PlaceWithoutExperts):
    """One gated FFN of a model."""

    layer: int
    path: str
    """The dotted name of the module, such as model.layers.3.mlp."""
    shape: FfnShape
    projection_names: dict[str, str]
    """The names that this model gives gate_proj, up_proj and down_proj."""

    @property
    def unit(self) -> Unit:
        return Unit(self.layer)

    def base(self, model: nn.Module) -> FfnBase:
        """Its weights in the model."""
        gate, up, down = (model.get_submodule(f"{self.path}.{self.projection_names[name]}") for name in PROJECTIONS)
        return FfnBase(gate.weight, up.weight, down.weight, self.shape.activation)  # type: ignore[arg-type]

    def source(self, model: nn.Module) -> FfnSource:
        """The FFN as the model holds it."""
        return FfnSource(base=self.base(model))


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The dotted name and the list of a model's decoder layers: the longest ModuleList of one class. Raises UserError: there is none."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    uniform = [(name, m) for name, m in lists if len({type(child) for child in m}) == 1]
    if not uniform:
        raise UserError(f"{type(model).__name__}: no list of equal decoder layers found; only decoder-only transformers are supported")
    return max(uniform, key=lambda item: len(item[1]))


def find_gated_ffns(model: nn.Module) -> list[GatedFfn]:
    """Every decoder layer's gated FFN, in order.

    A gated FFN is a module with exactly three bias-free linear children, two [F, D] and one [D, F], that computes
    down(act(gate(x)) * up(x)); which child is which, and the activation, are found by trying. On the meta device, where nothing is
    computed, shapes alone are compared.

    Raises:
        UserError: a layer has none or several, with the reason.
    """
    name, layers = decoder_layers(model)
    found = []
    for index, layer in enumerate(layers):
        candidates = [(path, module) for path, module in layer.named_modules() if len(_linear_children(module)) == 3]
        described = [(path, module, _describe(module)) for path, module in candidates]
        fits = [(path, fit) for path, _, fit in described if isinstance(fit, tuple)]
        where = f"{type(model).__name__}, {name}.{index}"
        if len(fits) != 1:
            reasons = [f"{path} ({type(module).__name__}): {fit}" for path, module, fit in described if isinstance(fit, str)]
            detail = "; ".join(reasons[:3]) or "no module with three linear children (fused or expert projections are not supported)"
            count = "no gated FFN" if not fits else f"{len(fits)} gated FFNs"
            raise UserError(
                f"unsupported architecture: {where} has {count}; exactly one is needed.\n  why: {detail}\n"
                f"  a gated FFN computes down(act(gate(x)) * up(x)) with bias-free linears and act one of {', '.join(ACTIVATIONS)}"
            )
        path, (shape, names) = fits[0]
        found.append(GatedFfn(index, f"{name}.{index}.{path}", shape, names))
    return found


def _linear_children(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, child) for name, child in module.named_children() if type(child) is nn.Linear]


def _describe(module: nn.Module) -> tuple[FfnShape, dict[str, str]] | str:
    """The module as a gated FFN, or why it is none."""
    linears = _linear_children(module)
    if any(linear.bias is not None for _, linear in linears):
        return "its linears have biases"
    x_TD: Tensor | None = None
    for (gate_name, gate), (up_name, up), (down_name, down) in permutations(linears):
        if gate.weight.shape != up.weight.shape or down.weight.shape != gate.weight.T.shape:
            continue
        if x_TD is None:
            x_TD = torch.randn(4, gate.in_features, generator=torch.Generator().manual_seed(0)).to(gate.weight)
        try:
            with torch.no_grad():
                expected = module(x_TD)
        except Exception as error:  # noqa: BLE001 - a module of unknown code is being tried; the reason is reported
            return f"cannot be called with [tokens, hidden] ({type(error).__name__})"
        if not isinstance(expected, Tensor):
            return "does not return a tensor"
        for act in ACTIVATIONS:
            with torch.no_grad():
                got = down(activation(act, gate(x_TD)) * up(x_TD))
            if got.shape == expected.shape and (got.is_meta or torch.equal(got, expected)):
                shape = FfnShape(gate.in_features, gate.out_features, act)
                return shape, {"gate_proj": gate_name, "up_proj": up_name, "down_proj": down_name}
    if x_TD is None:
        return "its three linears do not have the shapes [F, D], [F, D], [D, F]"
    return "it does not compute down(act(gate(x)) * up(x)) for any known activation"
