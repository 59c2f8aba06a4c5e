"""A model with experts in it, and the parts of it that the trainer drives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hecate.engine.protocol import ExpertEngine
from hecate.experts.layer import MoeLayer
from hecate.experts.routers.router import BalanceLoss, Router, RouterStats
from hecate.experts.seeding import combined_digest
from hecate.model.layers.lora import LoraLinear
from hecate.model.parameter_parts import TensorParts
from hecate.parallel.values.units import Unit


@dataclass(frozen=True)
class MoeModel:
    """A model with experts in it, and the parts that the trainer drives."""

    model: nn.Module
    engine: ExpertEngine
    layers: Mapping[Unit, MoeLayer]
    attention: dict[tuple[int, str], LoraLinear]
    """The adapters by layer and module name, such as (3, "self_attn.q_proj")."""
    others: dict[str, nn.Parameter] = field(default_factory=dict)
    """The model's own parameters that train, by their names in it."""
    parts: TensorParts | None = None
    """The parameters among `others` of which this rank has only a part; None: it has all of each."""

    @property
    def routers(self) -> dict[Unit, nn.Parameter]:
        """The weights [experts, hidden] of the routers that train one, by unit."""
        trained = {unit: layer.trained_router.get("weight") for unit, layer in sorted(self.layers.items())}
        return {unit: weight for unit, weight in trained.items() if weight is not None}

    @property
    def router_modules(self) -> dict[Unit, Router]:
        """The routers, trained or not, by unit; none where Megatron's own layers have theirs."""
        modules = {unit: layer.router for unit, layer in sorted(self.layers.items())}
        return {unit: router for unit, router in modules.items() if isinstance(router, Router)}

    @property
    def separate_experts(self) -> int:
        """The number of experts, if each is an adapter of its own (`Router.separates`); otherwise 0."""
        families = self.engine.shards.families
        return max((families[unit].num_experts for unit, router in self.router_modules.items() if router.separates), default=0)

    @property
    def user_width(self) -> int | None:
        """The size of the vectors of users by which routers decide; None: they decide by something else."""
        return next((width for router in self.router_modules.values() if (width := router.user_width) is not None), None)

    @property
    def drawn_digest(self) -> str:
        """The digest of all that the experts' pairs have drawn from names; empty: nothing. It takes a pass over those matrices."""
        return combined_digest(family.drawn_digest for _, family in sorted(self.engine.shards.families.items()))

    def balance_loss(self, stats: Mapping[Unit, RouterStats], group: dist.ProcessGroup) -> Tensor | None:
        """This rank's share of the load-balancing losses; None: no unit has one. Every rank of the group must call it.

        Args:
            stats: what the routers of all units have done in one forward pass. Units with the same loss are given to it at once.
        """
        by_loss: dict[BalanceLoss, dict[Unit, RouterStats]] = {}
        for unit, layer in self.layers.items():
            if layer.balance is not None:
                by_loss.setdefault(layer.balance, {})[unit] = stats[unit]
        if not by_loss:
            return None
        first, *more = (loss(of_units, group) for loss, of_units in by_loss.items())
        return sum(more, first)

    def replicated_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters that every rank holds alike: routers, attention adapters and the model's own, by stable names."""
        named: dict[str, nn.Parameter] = {}
        for unit, router in self.routers.items():
            named[f"layers.{unit}.router"] = router
        for unit, layer in sorted(self.layers.items()):
            named |= {f"layers.{unit}.router.{name}": part for name, part in layer.trained_router.items() if name != "weight"}
        for (index, path), lora in sorted(self.attention.items()):
            named |= {f"layers.{index}.{path}.{matrix}": parameter for matrix, parameter in lora.trained().items()}
        alike = self.others if self.parts is None else {name: p for name, p in self.others.items() if name not in self.parts.parameters}
        return named | alike

    def whole_others(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the whole value of each of `others`, put together from the parts of a tensor group's ranks.

        Every rank of a tensor group must go through all of them, in the same order: each whole value is a collective.
        """
        for name, parameter in self.others.items():
            partial = self.parts is not None and name in self.parts.parameters
            yield name, self.parts.whole(name, parameter) if partial and self.parts else parameter.detach()


def adapter_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """Adapters, routers and their optimizer states: float32, or the model's own where that is wider."""
    return model_dtype if model_dtype.itemsize > 4 else torch.float32
