"""The kinds of experts, as facts and sizes without weights. Where they differ, a kind is asked for the fact, never which kind it is.

A kind is a choice of the unit that its experts sit in, of what an expert's gated FFN is (trained, frozen, one frozen FFN that all experts
of a layer share, or none) and of whether low-rank pairs train beside it. What computes it is registered by the same name in
`hecate.experts.families`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

from hecate.parallel.values.layout import ExpertLayout, TensorSpec

Family = Literal["mixlora", "full", "moe_lora"]
"""what `moe.family` gives"""
KindName = Literal["mixlora", "full", "moe_lora", "linears"]
"""the family, or with `moe.unit: linear` the kind that takes its place"""
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
GATE_UP = "gate_up_proj"
"""gate and up as one projection [2F, D], whose pair has one A"""
ONLY_PROJECTION = "linear"
"""the one projection of experts over a linear layer, whatever the layer is called"""
PROJECTION_ORDER = ("gate_proj", "up_proj", GATE_UP, "down_proj", ONLY_PROJECTION)


@dataclass(frozen=True)
class FfnSizes:
    """A gated FFN, down(act(gate(x)) * up(x)), without biases."""

    hidden: int
    ffn: int
    """the inner size"""

    def of_projection(self, name: str) -> tuple[int, int]:
        """(inputs, outputs) of a projection."""
        if name == GATE_UP:
            return self.hidden, 2 * self.ffn
        return (self.ffn, self.hidden) if name == "down_proj" else (self.hidden, self.ffn)

    def specs(self) -> tuple[TensorSpec, ...]:
        """Its weights in the order in which a chunk holds them."""
        return tuple(TensorSpec(name, self.of_projection(name)[::-1]) for name in PROJECTIONS)


@dataclass(frozen=True)
class LinearSizes:
    """One linear layer."""

    inputs: int
    outputs: int

    def of_projection(self, name: str) -> tuple[int, int]:
        """(inputs, outputs) of its one projection."""
        assert name == ONLY_PROJECTION, name
        return self.inputs, self.outputs


UnitSizes = FfnSizes | LinearSizes


DEFAULT_BASES = 256
MIXES_ON_EVERY_RANK = frozenset({"factors"})
"""the ways to mix a token's pairs for which its rank must have all of the unit's; by the others each rank may add what it has"""


GATE_WIDTH = 60
"""numbers inside the gate of a router that decides by users, as in RecLoRA's code"""


def gate_parameters(user_width: int, experts: int) -> int:
    """Parameters of such a gate: a layer norm over the user's vector, and two linears with biases."""
    return 2 * user_width + GATE_WIDTH * (user_width + 1) + experts * (GATE_WIDTH + 1)


def lora_scale(alpha: float, rank: int, *, rslora: bool) -> float:
    """Return what B A x is multiplied by: alpha / r, or with rsLoRA (arXiv 2312.03732) alpha / sqrt(r)."""
    return alpha / (rank**0.5 if rslora else rank)


@dataclass(frozen=True)
class ShardShape:
    """The numbers of the source shards (MoS, arXiv 2410.00938): how large a pool is for each expert, and how vectors are cut."""

    equivalent_rank: int = 2
    """rank of the plain pairs that would have as many trained numbers as the pool has for each expert"""
    per_vector: int = 4
    """shards that a row of A or a column of B is put together from"""
    private_rank: int = 1
    """the part of an expert's rank that it alone takes from the pool"""


@dataclass(frozen=True)
class LoraShape:
    """Hyper-parameters of low-rank pairs. A pair source with numbers of its own has them here."""

    rank: int
    scale: float
    """what B A x is multiplied by (`lora_scale`)"""
    dropout: float
    source: str = "plain"
    """a file of `hecate.experts.pairs.sources`"""
    gradient_rule: str = "none"
    """a file of `hecate.experts.pairs.rules`, or none"""
    eta: float | None = None
    """the eta of the gradient rule row_norm (`hecate.experts.pairs.gradient_rules.row_norm`); None: there is no rule"""
    bases: int = DEFAULT_BASES
    """the number of drawn matrices whose sum is A, and of those whose sum is B, with the source nola"""
    shards: ShardShape = ShardShape()
    """the numbers of the source shards"""
    of_experts: tuple[tuple[int, float], ...] = ()
    """the rank and scale of each expert of a unit, where they differ; pairs are then padded to `rank`, the largest. Empty: all are alike"""
    chosen: tuple[int | tuple[int, ...], ...] = ()
    """the experts of every unit that train, or those of each decoder layer's; the pairs of the others are zero and stay so. Empty: all"""

    @property
    def widest(self) -> int:
        """The rank that kernels must be able to take: under a gradient rule they multiply with two matrices B side by side."""
        return self.rank if self.gradient_rule == "none" else 2 * self.rank

    def chosen_of(self, layer: int, experts: int) -> tuple[int, ...]:
        """The experts that train of a decoder layer with so many."""
        if not self.chosen:
            return tuple(range(experts))
        return cast("tuple[int, ...]", self.chosen[layer] if isinstance(self.chosen[0], tuple) else self.chosen)


@dataclass(frozen=True)
class PairSizes:
    """What is to be known of an expert's low-rank pairs before there are any. What trains need not be the pairs' own matrices."""

    trained: tuple[TensorSpec, ...]
    """what is trained: owned, gathered and reduced as the pairs' part of the expert's chunk"""
    flops: float
    """forward FLOPs of one assignment in the products with the pairs, however few numbers of them are trained"""
    seeded: tuple[TensorSpec, ...] = ()
    """what every rank draws from names, once for all experts of a unit: it is not owned, never travels, and is never stored"""
    spared_flops: float = 0.0
    """backward FLOPs of one assignment in gradients that plain pairs have and these have not"""
    seeded_of_model: bool = False
    """whether all units of a model share the seeded tensors that have the same name and shape"""
    computed_numel: int = 0
    """the numbers of A and B that are computed for each replica from what is trained, and kept from the unit's forward to its backward
    pass; 0: A and B are parts of the replica, or seeded"""
    pooled: tuple[TensorSpec, ...] = ()
    """what is trained in a pool that the units of one place and shape have in common (`hecate.experts.pairs.pool`), not in `trained`: the
    pool has one block of these tensors for each of their experts"""

    @property
    def trained_numel(self) -> int:
        return sum(spec.numel for spec in self.trained)

    @property
    def pooled_numel(self) -> int:
        return sum(spec.numel for spec in self.pooled)


NO_PAIRS = PairSizes((), 0.0)


@dataclass(frozen=True)
class ExpertParameters:
    """Parameters of one expert, and what its pairs cost."""

    trained_ffn: int
    """the parameters of an FFN of its own that trains"""
    frozen_ffn: int
    """the parameters of an FFN of its own that does not train"""
    shared_ffn: int
    """the parameters of the frozen FFN that it has in common with its layer's other experts"""
    pairs: int
    """the trained parameters of its low-rank pairs"""
    pair_flops: float
    """forward FLOPs of one assignment in the products with the pairs"""
    pair_backward: float
    """backward over forward FLOPs of the pairs"""

    @property
    def trained(self) -> int:
        return self.trained_ffn + self.pairs


@dataclass(frozen=True, kw_only=True)
class ExpertKind:
    """What is to be known of a kind of experts before there are any."""

    name: KindName
    what: str
    """what it makes of a model, for messages"""
    over_linears: bool = False
    """whether its units are the linear layers that `lora.target_modules` names, and not a decoder layer's FFN"""
    ffn: Literal["trained", "frozen", "shared", "none"]
    """an expert's FFN is its own and trains; is its own and frozen; is one frozen FFN of the layer; or it has none: its pairs stand beside
    a linear layer that every rank computes for its own tokens"""
    has_pairs: bool
    """low-rank pairs train, on the experts' projections and on the attention's"""
    pair_backward: float = 0.0
    """see `ExpertParameters.pair_backward`: what is computed again, and two products for the gradients"""
    joins_gate_and_up: bool = False
    """gate and up are one projection, with one pair, where both are adapted"""
    of_moe_base: bool = False
    """the base model has experts and routers already, and these stand over its own"""
    output: Literal["mixlora", "mixtral", "peft", "linears"]
    """the format in which a finished run is written"""

    @property
    def shares_ffn(self) -> bool:
        """Whether products with the FFN's weights are computed once for each token, however many experts it goes to."""
        return self.ffn == "shared"

    @property
    def keeps_base(self) -> bool:
        """Whether every rank holds all of the base model."""
        return self.ffn in ("shared", "none")

    @property
    def gathers_rounded(self) -> bool:
        """Whether replicas have the type of computation: an expert's FFN, which trains, is most of the bytes that travel. Pairs are few,
        and travel as their owners have them."""
        return self.ffn == "trained"

    @property
    def output_folder(self) -> str:
        """Where a finished run is found in its folder."""
        return "adapter" if self.has_pairs else "model"

    def one_pair_each(self, experts: Iterable[int]) -> bool:
        """Whether units with so many experts in each layer are linears with one pair each, where nothing is to be chosen."""
        return self.over_linears and max(experts) <= 1

    def projections(self, target_modules: Iterable[str]) -> tuple[str, ...]:
        """The projections of an expert that get a pair, in the order of its chunk."""
        targets = set(target_modules)
        if not self.has_pairs:
            return ()
        if self.over_linears:
            return (ONLY_PROJECTION,)
        if self.joins_gate_and_up and targets >= {"gate_proj", "up_proj"}:
            return (GATE_UP,) + ("down_proj",) * ("down_proj" in targets)
        return tuple(name for name in PROJECTIONS if name in targets)

    def layout(self, ffn: tuple[TensorSpec, ...], pairs: PairSizes) -> ExpertLayout:
        """The tensors of one expert.

        Args:
            ffn: of one FFN (`FfnSizes.specs`); nothing for experts without.
        """
        return ExpertLayout((*(ffn if self.ffn == "trained" else ()), *pairs.trained), ffn if self.ffn == "frozen" else ())

    def parameters(self, ffn: int, pairs: int, pair_flops: float, spared_flops: float = 0.0) -> ExpertParameters:
        """Parameters of one expert.

        Args:
            ffn: of one FFN, the expert's own or the one that all share.
            pairs: of one expert's pairs, those that are trained.
            pair_flops: see `PairSizes.flops`.
            spared_flops: see `PairSizes.spared_flops`.
        """
        return ExpertParameters(
            trained_ffn=ffn if self.ffn == "trained" else 0,
            frozen_ffn=ffn if self.ffn == "frozen" else 0,
            shared_ffn=ffn if self.ffn == "shared" else 0,
            pairs=pairs if self.has_pairs else 0,
            pair_flops=pair_flops if self.has_pairs else 0.0,
            pair_backward=self.pair_backward - (spared_flops / pair_flops if pair_flops else 0.0),
        )


MIXLORA = ExpertKind(
    name="mixlora",
    what="LoRA experts over a dense model's FFNs",
    ffn="shared",
    has_pairs=True,
    pair_backward=3.0,  # the pairs run once more
    output="mixlora",
)
FULL = ExpertKind(
    name="full",
    what="a dense model's FFNs copied to experts",
    ffn="trained",
    has_pairs=False,
    output="mixtral",
)
MOE_LORA = ExpertKind(
    name="moe_lora",
    what="LoRA over an MoE model's own experts",
    ffn="frozen",
    has_pairs=True,
    pair_backward=2.5,  # the pairs shrink their inputs once more
    joins_gate_and_up=True,
    of_moe_base=True,
    output="peft",
)
LINEARS = ExpertKind(
    name="linears",
    what="LoRA experts over a dense model's linear layers",
    over_linears=True,
    ffn="none",
    has_pairs=True,
    pair_backward=2.0,
    output="linears",
)
KINDS: dict[KindName, ExpertKind] = {kind.name: kind for kind in (MIXLORA, FULL, MOE_LORA, LINEARS)}
"""all of them"""


def kind_of(family: str, unit: str) -> ExpertKind | None:
    """The kind for values of `moe.family` and `moe.unit`; None: there is none, or the values are unknown."""
    if unit == "linear":
        return LINEARS if family == MIXLORA.name else None
    return KINDS.get(family) if unit == "ffn" and family != LINEARS.name else None  # type: ignore[call-overload]


def kind_written_as(output: str) -> ExpertKind:
    """The kind whose finished runs are written in this format."""
    return next(kind for kind in KINDS.values() if kind.output == output)


def kinds_for(*, moe_base: bool) -> str:
    """The kinds for base models with experts of their own, or for those without, as a message names them."""
    kinds = [kind for kind in KINDS.values() if kind.of_moe_base == moe_base]
    return " or ".join(f"{'moe.unit=linear' if kind.over_linears else f'moe.family={kind.name}'} ({kind.what})" for kind in kinds)
