"""Expert families: what a unit's experts are made of and what they compute, behind one protocol that the engine drives.

Shapes: T tokens, D hidden, S slots (experts that are materialized on this rank), C elements of a chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hecate.experts.pairs.pool import Pool
from hecate.experts.pairs.source import PairSource
from hecate.experts.seeding import name_number, unit_numbers
from hecate.kernels.backend import Backend, ExpertKernels, expert_kernels
from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.dropout import Dropout, dropout_key
from hecate.kernels.common.ffn import FfnBase, FfnShape
from hecate.parallel.cost.cost_model import LayerCost
from hecate.parallel.cost.expert_cost import UnitPlace, expert_layer_cost, ffn_place, number_bytes
from hecate.parallel.values.expert_kinds import NO_PAIRS, ExpertKind, FfnSizes, LinearSizes, LoraShape, UnitSizes
from hecate.parallel.values.layout import ExpertLayout, TensorSpec
from hecate.parallel.values.units import Unit


@dataclass(frozen=True)
class ExpertReplicas:
    """The experts that are materialized on this rank for one layer's tokens, by slot. Which they are, `RoutedTokens.expert_S` says."""

    chunks_SC: Tensor
    """The trainable chunks of the experts, in the family's `replica_dtype`; of a family with a pool, all blocks of the pool, whatever the
    slots hold."""
    frozen_S: Sequence[Tensor] = ()
    """The frozen chunk of each expert; nothing for a family without frozen parts."""


class OwnedChunks(Protocol):
    """Chunks that ranks own, gather and reduce: those of a unit's experts, or the blocks of a pool."""

    @property
    def num_experts(self) -> int:
        """The number of chunks."""

    @property
    def replica_dtype(self) -> torch.dtype:
        """The type in which chunks are gathered and computed with; gradients have that of `init_chunk` nonetheless."""

    def layout(self) -> ExpertLayout:
        """The tensors of one expert."""

    def init_chunk(self, expert: int) -> Tensor:
        """The initial flat chunk of one expert, [C] in master precision; a function of (seed, unit, expert) alone."""

    def no_chunks(self) -> Tensor:
        """[0, C], of the dtype and on the device of `init_chunk`: the chunks of a rank that owns no expert."""


class ExpertFamily(OwnedChunks, Protocol):
    """One unit's experts of some kind. The engine moves their chunks and tokens and never looks inside."""

    @property
    def pool(self) -> Pool | None:
        """The pool that the experts share with those of other units, whose numbers they train in place of chunks of their own, which are
        then empty; None: each expert trains its chunk."""

    def frozen_chunk(self, expert: int) -> Tensor:
        """The flat frozen chunk of one expert, in the dtype it is computed in; empty for a family without frozen parts.

        It is asked for on the expert's first owner only.
        """

    def no_frozen_chunks(self) -> Tensor:
        """[0, C], of the dtype and on the device of `frozen_chunk`."""

    @property
    def trains_E(self) -> np.ndarray:
        """bool [experts]: whether each expert trains. The gradients of the others are zero, and nobody needs them."""

    def cost(self, top_k: int, non_moe_flops: float) -> LayerCost:
        """The layer's cost, from which planners plan. `non_moe_flops` are the forward FLOPs of one rank that hide transfers."""

    @property
    def sizes(self) -> UnitSizes:
        """Of the projections that pairs stand beside."""
        ...

    @property
    def pair_source(self) -> PairSource:
        """The source of the family's pairs, through which adapters are written and read. Only for a family that has pairs."""

    @property
    def drawn_digest(self) -> str:
        """See `PairSource.drawn_digest`; empty for a family without pairs."""

    def compute(self, routed: RoutedTokens, replicas: ExpertReplicas, step: int | None) -> Tensor:
        """The weighted sum of each token's experts that are in the slots, [T, D]; differentiable in chunks, tokens and weights.

        The result must depend on `replicas.chunks_SC` in autograd's eyes even if there is no token. What is saved of the chunks for the
        backward pass must be views of them: their memory may be freed in between, and filled again.

        Args:
            step: the optimizer step, which keys dropout; None outside training.
        """


@dataclass(frozen=True)
class Site:
    """The place of a unit's experts in the model, their number, and their types."""

    unit: Unit
    num_experts: int
    shape: FfnShape | LinearSizes
    """The sizes of an expert's FFN, or of the FFN that all share; or those of the linear layer that the unit is."""
    seed: int
    master_dtype: torch.dtype
    """The type of what trains."""
    compute_dtype: torch.dtype
    """The type of frozen weights and hidden states."""
    device: torch.device
    kernels: Backend = "auto"
    units_per_layer: int = 1
    """The number of units in the decoder layer, which are gathered in one message."""
    peers: tuple[tuple[Unit, int], ...] = ()
    """The units of the model in the same place with the same sizes, ascending, with the number of their experts. This unit is among them;
    nothing: there is no other."""
    names: tuple[str, ...] = ()
    """The names of the experts, by which everything random about an expert is drawn, whatever other experts there are; nothing: it is drawn
    by the expert's number."""

    def key(self, unit: Unit, expert: int) -> tuple[int | str, ...]:
        """The key by which the initial numbers of an expert of the unit are drawn."""
        return self.seed, "expert", str(unit), self.names[expert] if self.names else expert

    @property
    def alike(self) -> tuple[tuple[Unit, int], ...]:
        """`peers`, and if there is no other, this unit."""
        return self.peers or ((self.unit, self.num_experts),)

    @property
    def inputs(self) -> int:
        """The size of a token's row, which the unit's router reads."""
        return self.shape.inputs if isinstance(self.shape, LinearSizes) else self.shape.hidden

    @property
    def sizes(self) -> UnitSizes:
        """The sizes of the projections that get pairs."""
        return self.shape if isinstance(self.shape, LinearSizes) else FfnSizes(self.shape.hidden, self.shape.ffn)


@dataclass(frozen=True)
class FfnSource:
    """What the base model has where experts are to be. A family takes what it needs."""

    base: FfnBase | None = None
    """The dense FFN."""
    own_expert: Callable[[int], Tensor] | None = None
    """Returns the flat weights of one of the model's own experts, as `FfnShape` lays them out, on the device and in the dtype of
    computation."""


@dataclass(frozen=True)
class ExpertChoices:
    """What is chosen for the experts of a whole model."""

    lora: LoraShape | None = None
    """The shape of the low-rank pairs; None: a family without pairs."""
    projections: tuple[str, ...] = ()
    """The projections that get a pair."""
    upcycle_noise: float = 0.0
    """The noise on the copies of a dense FFN (`hecate.experts.full.noisy_copies`)."""
    mix: str = "products"
    """The way in which experts over linears are mixed, by its name in `hecate.experts.linear.MIXES`."""


class UnitExperts(ABC):
    """What all families have in common: layout, cost and dropout follow from the kind and the pair source."""

    on_every_rank = False
    """Whether a token's rank must have all experts of the unit (`LayerCost.on_every_rank`)."""

    def __init__(self, kind: ExpertKind, site: Site, pairs: PairSource | None, place: UnitPlace, ffn: tuple[TensorSpec, ...] = ()) -> None:
        """`ffn`: the weights of one FFN, the expert's own or the one that all share."""
        self.kind = kind
        self.site = site
        self.num_experts = site.num_experts
        self._pairs = pairs
        self._pair_sizes = NO_PAIRS if pairs is None else pairs.sizes
        self._number_E = torch.tensor([name_number(name) for name in site.names], dtype=torch.int64, device=site.device)
        self._place, self._ffn_numel = place, sum(spec.numel for spec in ffn)
        self._layout = kind.layout(ffn, self._pair_sizes)

    @property
    def pool(self) -> Pool | None:
        if not self._pair_sizes.pooled:
            return None
        site, initial = self.site, self.pair_source.initial
        return Pool(
            site.alike,
            self._pair_sizes.pooled,
            lambda unit, expert: initial(expert, *site.key(unit, expert)),
            site.master_dtype,
            site.device,
        )

    @property
    def sizes(self) -> UnitSizes:
        return self.site.sizes

    @property
    def pair_source(self) -> PairSource:
        assert self._pairs is not None, f"experts of kind {self.kind.name} have no pairs"
        return self._pairs

    @property
    def drawn_digest(self) -> str:
        return "" if self._pairs is None else self._pairs.drawn_digest

    @property
    def replica_dtype(self) -> torch.dtype:
        master, computed = self.site.master_dtype, self.site.compute_dtype
        return computed if self.kind.gathers_rounded and computed.itemsize < master.itemsize else master

    @abstractmethod
    def compute(self, routed: RoutedTokens, replicas: ExpertReplicas, step: int | None) -> Tensor:
        """See `ExpertFamily.compute`."""

    def layout(self) -> ExpertLayout:
        return self._layout

    def init_chunk(self, expert: int) -> Tensor:
        """An expert starts as the base: its pairs add nothing at first. Its chunk is empty if it trains in a pool."""
        if self._pair_sizes.pooled:
            return self.no_chunks().new_empty(0)
        chunk = self.pair_source.initial(expert, *self.site.key(self.site.unit, expert))
        return chunk.to(device=self.site.device, dtype=self.site.master_dtype)

    def frozen_chunk(self, expert: int) -> Tensor:
        """Nothing."""
        return torch.empty(0, dtype=self.site.compute_dtype, device=self.site.device)

    @property
    def trains_E(self) -> np.ndarray:
        if self._pairs is None:
            return np.ones(self.num_experts, dtype=bool)
        return np.isin(np.arange(self.num_experts), self._pairs.lora.chosen_of(self.site.unit.layer, self.num_experts))

    def no_chunks(self) -> Tensor:
        return torch.empty((0, self._layout.trainable_numel), dtype=self.site.master_dtype, device=self.site.device)

    def no_frozen_chunks(self) -> Tensor:
        return torch.empty((0, self._layout.frozen_numel), dtype=self.site.compute_dtype, device=self.site.device)

    def forget_initial(self) -> None:  # noqa: B027 - most families keep nothing
        """Free whatever initial chunks are computed from, once there is an engine; later ones may begin otherwise."""

    def cost(self, top_k: int, non_moe_flops: float) -> LayerCost:
        pairs = self._pair_sizes
        return expert_layer_cost(
            self.kind.parameters(self._ffn_numel, pairs.trained_numel, pairs.flops, pairs.spared_flops),
            place=self._place,
            top_k=top_k,
            number=number_bytes(self.kind, master=self.site.master_dtype.itemsize, computed=self.site.compute_dtype.itemsize),
            non_moe_flops=non_moe_flops,
            on_every_rank=self.on_every_rank,
        )

    def _dropout(self, step: int | None) -> Dropout | None:
        rate = self.pair_source.lora.dropout
        if step is None or rate == 0:
            return None
        return Dropout(rate, dropout_key(self.site.seed, step, *unit_numbers(self.site.unit)))

    def _numbered_for(self, dropout: Dropout | None, routed: RoutedTokens) -> RoutedTokens:
        """The tokens with the numbers of experts that dropout is hashed from: where experts have names, these stand for them."""
        if dropout is None or not self.site.names:
            return routed
        return replace(routed, expert_S=self._number_E[routed.experts_in_slots])

    def _kernels(self, x_TD: Tensor) -> ExpertKernels:
        return expert_kernels(self.site.kernels, x_TD, 0 if self._pairs is None else self._pairs.lora.widest)


class FfnExperts(UnitExperts):
    """What families over gated FFNs have in common."""

    def __init__(self, kind: ExpertKind, site: Site, pairs: PairSource | None) -> None:
        assert isinstance(site.shape, FfnShape), site.shape
        self.shape = site.shape
        super().__init__(kind, site, pairs, ffn_place(self.shape.hidden), FfnSizes(self.shape.hidden, self.shape.ffn).specs())
