"""Pairs that are put together from shards of a pool, by an index that is drawn once and never learned (MoS, arXiv 2410.00938).

The vectors of a pair are the rows of A and the columns of B. In the pool they are cut into shards of equal length. Row i of A is the
concatenation of `per_vector` shards of the pool's A; columns of B are made of shards of its B, by another index.

Shapes: S slots, N blocks of a pool, C elements of a block, E experts, r rank, e equivalent rank, l shards of a vector, W elements of a
shard, M = r · l shards of a pair, I inputs and O outputs of a projection.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from hecate.errors import UserError
from hecate.experts.pairs.gradient_rules import ruled_pairs
from hecate.experts.pairs.source_facts import SourceFacts
from hecate.experts.pairs.sources.plain import PlainPairs, plain_pairs
from hecate.experts.seeding import digest_of_drawn, generator
from hecate.parallel.values.expert_kinds import ONLY_PROJECTION, LoraShape, PairSizes, UnitSizes
from hecate.parallel.values.layout import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from hecate.experts.family import Site
    from hecate.kernels.common.low_rank import LowRankPairs


def shard_pairs(sizes: UnitSizes, projections: Iterable[str], lora: LoraShape) -> PairSizes:
    """Of pairs that are put together from shards of a pool (MoS, arXiv 2410.00938): a block has equivalent_rank rows of A, and as many
    columns of B, which lie as rows, too.

    Raises:
        UserError: per_vector does not divide a projection's inputs or outputs.
    """
    projections, shards = tuple(projections), lora.shards
    for name in projections:
        inputs, outputs = sizes.of_projection(name)
        if inputs % shards.per_vector or outputs % shards.per_vector:
            raise UserError(
                f"lora.shards.per_vector: {shards.per_vector} does not divide the {inputs} inputs and the {outputs} outputs of "
                f"{'one of lora.target_modules' if name == ONLY_PROJECTION else name}\n"
                "  vectors are cut into shards of equal length: give a number that divides the sizes of all target modules"
            )
    whole = plain_pairs(sizes, projections, lora)
    block = plain_pairs(sizes, projections, replace(lora, rank=shards.equivalent_rank)).trained
    pooled = tuple(spec if spec.name.endswith(".A") else TensorSpec(spec.name, spec.shape[::-1]) for spec in block)
    return PairSizes((), whole.flops, computed_numel=whole.trained_numel, pooled=pooled)


def require_public_shards(lora: LoraShape, consumers: int) -> None:
    """Check that a pool of so many experts has the shards that one of them takes.

    Raises:
        UserError: an expert takes more public shards than there are.
    """
    shards = lora.shards
    taken, each = lora.rank - shards.private_rank, shards.equivalent_rank - shards.private_rank
    if taken > each * consumers:
        raise UserError(
            f"lora.shards: a pair takes the shards of {taken} public vectors (lora.r {lora.rank} - private_rank {shards.private_rank}), "
            f"but its pool has {each * consumers}\n"
            f"  of each of the {consumers} pairs that share it {each} are public: equivalent_rank {shards.equivalent_rank} - private_rank\n"
            "  raise lora.shards.equivalent_rank, or lower lora.r"
        )


class ShardPairs:
    """A `PairSource`: nothing of an expert's chunk is trained; its pairs are shards of the pool of the units of its place and shape.

    Of a block's e · l shards the first private_rank · l are the block's expert's alone, and the others are public. Each expert takes
    (r - private_rank) · l public ones of the whole pool, none of them twice, and then its private ones.

    The index is drawn from the seed and the expert's name. It is the same on every rank, and neither stored nor sent.
    """

    def __init__(self, site: Site, lora: LoraShape, projections: tuple[str, ...]) -> None:
        """Raises UserError: sizes cannot be cut into shards, or the pool has fewer public shards than an expert takes."""
        import torch

        assert projections, "an expert needs an adapter on at least one projection"
        assert lora.gradient_rule == "none", "rows of A and B have no gradients of their own"
        self.lora = lora
        self.sizes = shard_pairs(site.sizes, projections, lora)
        self.projections = tuple(spec.name.removesuffix(".A") for spec in self.sizes.pooled[::2])
        blocks = sum(experts for _, experts in site.alike)
        require_public_shards(lora, blocks)
        self._block = PlainPairs(replace(lora, rank=lora.shards.equivalent_rank), projections, site.sizes)
        """The plain pairs whose numbers a block has."""
        first = _experts_before(site)
        names = [(site.seed, "shards", str(site.unit), expert) for expert in range(site.num_experts)]
        self._index_EM = {
            spec.name: torch.stack([shard_index(lora, blocks, first + expert, *name, spec.name) for expert, name in enumerate(names)])
            for spec in self.sizes.pooled
        }
        self._on_device = {name: index_EM.to(site.device) for name, index_EM in self._index_EM.items()}

    @property
    def drawn_digest(self) -> str:
        return digest_of_drawn(self._index_EM.values())

    def index(self, tensor: str) -> Tensor:
        """int64 [E, M]: which of the pool's shards each expert takes of a tensor, such as `gate_proj.A`, in their order; block n has those
        from n · e · l on."""
        return self._index_EM[tensor]

    def initial(self, expert: int, *key: int | str) -> Tensor:
        """float64 [C], of a block: A as that of plain pairs of rank e, and B zero, so that an expert begins as the base."""
        return self._block.initial(expert, *key)

    def stacked(self, replicas_SC: Tensor, expert_S: Tensor) -> dict[str, LowRankPairs]:
        """New tensors: the pairs of the experts in the slots, whose numbers come from the whole pool.

        Args:
            replicas_SC: [N, C], all blocks of the pool.
        """
        per_block = self.lora.shards.equivalent_rank * self.lora.shards.per_vector
        vectors: dict[str, Tensor] = {}
        parts = replicas_SC.split([spec.numel for spec in self.sizes.pooled], dim=1)
        for spec, part in zip(self.sizes.pooled, parts, strict=True):
            shard_SM = self._on_device[spec.name][expert_S]
            # Plain indexing, whose backward pass adds up in one order on a GPU, too.
            taken_SMW = part.unflatten(1, (per_block, -1))[shard_SM // per_block, shard_SM % per_block]
            vectors[spec.name] = taken_SMW.reshape(-1, self.lora.rank, spec.shape[1])
        return {
            name: ruled_pairs(self.lora, vectors[f"{name}.A"], vectors[f"{name}.B"].transpose(1, 2).contiguous())
            for name in self.projections
        }

    def chunk_of(self, expert: int, pairs: dict[str, tuple[Tensor, Tensor]]) -> NoReturn:
        """Raises UserError: A and B of an adapter do not say by which shards they were made."""
        raise UserError(
            "lora.pairs: shards: training cannot begin with an adapter's A and B, which do not say by which shards they were made\n"
            "  leave lora.init_from out, or use lora.pairs=plain, which trains the adapter's own A and B on"
        )


def shard_index(lora: LoraShape, blocks: int, block: int, *name: int | str) -> Tensor:
    """int64 [M]: the shards that the expert of a block takes, public ones in a random order before its private ones.

    Args:
        name: by which its random numbers are named.
    """
    import torch

    shards = lora.shards
    per_block, private = shards.equivalent_rank * shards.per_vector, shards.private_rank * shards.per_vector
    public_of_block = per_block - private
    taken = (lora.rank - shards.private_rank) * shards.per_vector
    drawn = torch.randperm(blocks * public_of_block, generator=generator(*name))[:taken]
    if taken:
        drawn = drawn // public_of_block * per_block + private + drawn % public_of_block
    return torch.cat([drawn, block * per_block + torch.arange(private)])


def _experts_before(site: Site) -> int:
    """The block of the unit's first expert."""
    before = 0
    for unit, experts in site.alike:
        if unit == site.unit:
            return before
        before += experts
    raise AssertionError(f"unit {site.unit} is none of those that share its pool: {site.alike}")


SOURCE = SourceFacts(sizes=shard_pairs, make=ShardPairs, check_pool=require_public_shards)
