"""A rank's share of the experts: owned shards for good, replicas for one iteration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hecate.parallel.comm.collectives import Handle, index, sparse_all_gather, sparse_all_gather_many, sparse_reduce_scatter
from hecate.parallel.comm.sliced import sliced_all_gather, sliced_reduce_scatter
from hecate.parallel.comm.two_level import two_level_all_gather, two_level_reduce_scatter
from hecate.parallel.cost_model import choose_collective, fuse_gathers
from hecate.parallel.placement import Placement
from hecate.parallel.routes import SlicedMoves, TwoLevelMoves, most_wanting, sliced_moves, slices_of, two_level_moves
from hecate.parallel.topology import Topology

OverLeaders = TwoLevelMoves | SlicedMoves


class LayerStore:
    """One layer's owned chunks (master parameters, stepped by the owner's optimizer) and this iteration's replicas.

    In one iteration: `gather` (starts the SparseAllGather) → `replicas` (waits for it; a leaf that collects gradients) → `reduce` (starts
    the SparseReduceScatter and drops the replicas) → `reduced` (waits for it). All ranks of the group call `gather` and `reduce` of
    all layers in the same order. Outside training `drop` takes the place of `reduce`.

    An iteration may be a step or a micro-step: what several calls of `reduce` bring is added up until `reduced` takes it. Between forward
    and backward `free` gives the replicas' memory back; `gather` and `replicas` then fill the same leaf again (Hecate-RM).

    Other sharding groups may have the same experts (`hecate.parallel.mesh`). Then, after a step's last `reduce`, `sum_over_groups` starts
    adding what the other groups' owners have, so that `reduced` returns the same bits in all of them.
    """

    def __init__(
        self,
        owner_E: list[int],
        init: Callable[[int], Tensor],
        group: dist.ProcessGroup,
        topology: Topology | None = None,
        replicas: dist.ProcessGroup | None = None,
    ) -> None:
        """Args:
        owner_E: the owner rank of each expert.
        init: the initial flat chunk of an expert; called for owned experts only.
        topology: of the group's ranks, by which to choose collectives; None: always the flat ones.
        replicas: the owners of the same experts in all sharding groups; None: there is one group.
        """
        rank = dist.get_rank(group)
        self._group, self._replicas = group, replicas
        self._topology = topology
        self.experts = [expert for expert, owner in enumerate(owner_E) if owner == rank]
        """owned experts, ascending"""
        # A rank that owns nothing still needs the chunk's size and dtype to take part in the collectives.
        chunks = [init(expert) for expert in self.experts] or [init(0)[None][:0]]
        self._owned_nC = torch.stack(chunks) if self.experts else chunks[0]
        self.parameters = [nn.Parameter(chunk) for chunk in self._owned_nC]
        """one parameter an owned expert, views of one tensor"""
        self.bytes_sent = 0
        self._placement: Placement | None = None
        self._over_leaders: OverLeaders | None = None
        """the way of this iteration's collectives; None: flat"""
        self._gathering: Handle[Tensor] | None = None
        self._replicas_SC: Tensor | None = None
        self._filled = False
        """does the leaf hold the replicas, or has it been freed?"""
        self._watched = False
        """does somebody hear of the leaf's gradient?"""
        self._reducing: Handle[Tensor] | None = None
        self._sum_nC: Tensor | None = None
        """gradients that earlier iterations brought"""
        self._summing: dist.Work | None = None
        """of those, over the sharding groups"""

    @property
    def owned(self) -> Tensor:
        """[owned experts, C]: the master parameters, by expert ascending."""
        return self._owned_nC

    @property
    def chunk_numel(self) -> int:
        return self._owned_nC.shape[1]

    @property
    def chunk_bytes(self) -> int:
        return self.chunk_numel * self._owned_nC.element_size()

    @property
    def device(self) -> torch.device:
        return self._owned_nC.device

    @property
    def materialized(self) -> bool:
        """Are this iteration's replicas here?"""
        return self._filled

    @property
    def replica_bytes(self) -> int:
        """Bytes of the replicas that are here or on their way."""
        if self._placement is None or not (self._filled or self._gathering):
            return 0
        return self.placement_bytes(self._placement)

    @property
    def reduce_started(self) -> bool:
        return self._reducing is not None or self._sum_nC is not None

    def placement_bytes(self, placement: Placement) -> int:
        """Bytes of this rank's replicas under a placement."""
        return int(placement.where_ED[:, dist.get_rank(self._group)].sum()) * self.chunk_bytes

    def change_owners(self, owner_E: list[int], chunks: Mapping[int, Tensor]) -> None:
        """Own other experts from now on, between two iterations, with parameters that are new.

        Args:
            chunks: the flat chunk of each expert that this rank owns by `owner_E`; copied.
        """
        assert self._gathering is None, "owners change between iterations"
        assert self._replicas_SC is None, "owners change between iterations"
        assert self._reducing is None, "owners change between iterations"
        rank = dist.get_rank(self._group)
        self.experts = [expert for expert, owner in enumerate(owner_E) if owner == rank]
        assert sorted(chunks) == self.experts, (sorted(chunks), self.experts)
        self._owned_nC = torch.stack([chunks[e].detach() for e in self.experts]) if self.experts else self._owned_nC[:0].clone()
        self.parameters = [nn.Parameter(chunk) for chunk in self._owned_nC]

    def gather(self, placement: Placement) -> None:
        """Start materializing; does nothing where this iteration's replicas are here or on their way."""
        gather_together([(self, placement)])

    def replicas(self, when_complete: Callable[[], None] | None = None) -> Tensor:
        """[slots, C], a leaf that requires grad: slot s holds expert `placement.experts_on(rank)[s]`.

        Args:
            when_complete: called in each backward pass as soon as the leaf's gradient is complete; the first one given counts.
        """
        if self._gathering is not None:
            if self._replicas_SC is None:
                self._replicas_SC = self._gathering.wait().requires_grad_()
            else:
                self._replicas_SC.untyped_storage().resize_(self._replicas_SC.numel() * self._replicas_SC.element_size())
                self._gathering.wait()
            self._gathering, self._filled = None, True
        assert self._replicas_SC is not None, "replicas() before gather()"
        assert self._filled, "replicas() of a freed leaf before gather()"
        if when_complete is not None and not self._watched:
            self._replicas_SC.register_post_accumulate_grad_hook(lambda _: when_complete())
            self._watched = True
        return self._replicas_SC

    def exchange(self, placement: Placement) -> None:
        """Have the replicas of another placement in place of those under way or here, of which nothing has been computed yet.

        Only what is missing travels. Every rank of the group must call it, in the same order, with the same placement.
        """
        assert self._placement is not None, "exchange() before gather()"
        rank, before = dist.get_rank(self._group), self._placement
        owned_ED = placement.owner_E[:, None] == np.arange(placement.world_size)
        missing = Placement(placement.owner_E.copy(), (placement.where_ED & ~before.where_ED) | owned_ED)
        gathering = self._start_gather(missing, self._way_over_leaders(missing), None)
        before_SC = self.replicas().detach()
        replicas_SC = before_SC.new_empty((len(placement.experts_on(rank)), self.chunk_numel))
        slot_of, arrived_SC = placement.slot_of_expert(rank), gathering.wait()
        for rows_SC, old in ((before_SC, before), (arrived_SC, missing)):
            kept = old.where_ED[:, rank] & placement.where_ED[:, rank]
            replicas_SC[index(slot_of[kept], self.device)] = rows_SC[index(old.slot_of_expert(rank)[kept], self.device)]
        self.drop()
        self._placement, self._over_leaders = placement, self._way_over_leaders(placement)
        self._replicas_SC, self._filled = replicas_SC.requires_grad_(), True

    def free(self) -> None:
        """Give the replicas' memory back, but keep the leaf, of which autograd has saved views, and its gradient."""
        assert self._replicas_SC is not None
        assert self._gathering is None
        self._replicas_SC.untyped_storage().resize_(0)
        self._filled = False

    def reduce(self) -> None:
        """Start summing the replicas' gradients onto the owners, and drop the replicas."""
        assert self._placement is not None
        assert self._replicas_SC is not None
        assert self._replicas_SC.grad is not None
        self.settle()
        grad_SC, over_leaders = self._replicas_SC.grad, self._over_leaders
        if isinstance(over_leaders, SlicedMoves):
            self._reducing = sliced_reduce_scatter(grad_SC, over_leaders, self._group)
        elif isinstance(over_leaders, TwoLevelMoves):
            self._reducing = two_level_reduce_scatter(grad_SC, self._placement, over_leaders, self._group)
        else:
            self._reducing = sparse_reduce_scatter(grad_SC, self._placement, self._group)
        self.bytes_sent += self._reducing.bytes_sent
        self.drop()

    def bring(self, grad_nC: Tensor) -> None:
        """Add gradients of the owned experts, by expert ascending, that were summed elsewhere: no replicas were gathered. Kept."""
        self.settle()
        self._sum_nC = grad_nC if self._sum_nC is None else self._sum_nC.add_(grad_nC)

    def settle(self) -> None:
        """Wait for the reduction under way, so that nothing is left of the gradients it was made from but the owners' sums."""
        if self._reducing is not None:
            grad_nC = self._reducing.wait()
            self._sum_nC = grad_nC if self._sum_nC is None else self._sum_nC.add_(grad_nC)
            self._reducing = None

    def sum_over_groups(self) -> None:
        """Wait for the last reduction and start summing over the sharding groups; nothing where that has happened or there is one group.

        Every rank of the replicate group must call it for all layers in the same order, once the step's last `reduce` was called.
        """
        if self._replicas is None or self._summing is not None or not self.experts:
            return
        self.settle()
        assert self._sum_nC is not None, "sum_over_groups() before reduce()"
        self._summing = dist.all_reduce(self._sum_nC, group=self._replicas, async_op=True)
        groups = dist.get_world_size(self._replicas)
        self.bytes_sent += 2 * (groups - 1) * self._sum_nC.numel() * self._sum_nC.element_size() // groups  # in a ring

    def reduced(self) -> Tensor:
        """[owned experts, C]: the summed gradients, by expert ascending."""
        self.sum_over_groups()
        self.settle()
        if self._summing is not None:
            self._summing.wait()
            self._summing = None
        assert self._sum_nC is not None, "reduced() before reduce()"
        grad_nC, self._sum_nC = self._sum_nC, None
        return grad_nC

    def drop(self) -> None:
        """Forget this iteration's replicas (a gather still under way is waited for first)."""
        if self._gathering is not None:
            self.replicas()
        if self._replicas_SC is not None:
            self._replicas_SC.grad = None
            self.free()  # autograd's graph may outlive this, and with it the leaf
        self._placement = self._replicas_SC = None
        self._watched = False

    def _begin_gather(self, placement: Placement) -> bool:
        """Is there anything to gather? If so, decide on its way."""
        if self._gathering is not None or self._filled:
            return False
        if self._replicas_SC is None:
            self._placement = placement
            self._over_leaders = self._way_over_leaders(placement)
        assert self._placement is placement, "freed replicas come back as they were"
        return True

    def _into_SC(self) -> Tensor | None:
        """The freed leaf. Through `.data`, which counts no version: autograd's saved views are to hold good when it is filled again."""
        return None if self._replicas_SC is None else self._replicas_SC.data

    def _start_gather(self, placement: Placement, over_leaders: OverLeaders | None, into_SC: Tensor | None) -> Handle[Tensor]:
        if isinstance(over_leaders, SlicedMoves):
            gathering = sliced_all_gather(self._owned_nC, over_leaders, self._group, into_SC)
        elif isinstance(over_leaders, TwoLevelMoves):
            gathering = two_level_all_gather(self._owned_nC, placement, over_leaders, self._group, into_SC)
        else:
            gathering = sparse_all_gather(self._owned_nC, placement, self._group, into_SC)
        self.bytes_sent += gathering.bytes_sent
        return gathering

    def _way_over_leaders(self, placement: Placement) -> OverLeaders | None:
        topology = self._topology
        if topology is None or topology.world_size == 2:  # nobody to hand anything on to
            return None
        way = choose_collective(placement, self.chunk_numel, self._owned_nC.element_size(), topology)
        if way == "sliced":
            return sliced_moves(placement, topology, slices_of(self.chunk_numel, most_wanting(placement, topology)))
        return two_level_moves(placement, topology) if way == "two_level" else None


def gather_together(layers: Sequence[tuple[LayerStore, Placement]]) -> None:
    """`LayerStore.gather` of layers of one model at one moment: flat ones of small chunks in one all-to-all (see `fuse_gathers`).

    Every rank of the group must call it, with the same layers in the order in which they are needed.
    """
    starting = [(store, placement) for store, placement in layers if store._begin_gather(placement)]
    flat = [(store, placement) for store, placement in starting if store._over_leaders is None]
    for store, placement in starting:
        if store._over_leaders is not None:
            store._gathering = store._start_gather(placement, store._over_leaders, store._into_SC())
    for run in _fused(flat):
        if len(run) == 1:
            store, placement = run[0]
            store._gathering = store._start_gather(placement, None, store._into_SC())
            continue
        parts = sparse_all_gather_many([(store._owned_nC, placement, store._into_SC()) for store, placement in run], run[0][0]._group)
        for (store, _), part in zip(run, parts, strict=True):
            store._gathering = part
            store.bytes_sent += part.bytes_sent


def _fused(flat: list[tuple[LayerStore, Placement]]) -> list[list[tuple[LayerStore, Placement]]]:
    topology = flat[0][0]._topology if flat else None
    if topology is None or len(flat) == 1:
        return [[one] for one in flat]
    return [[flat[layer] for layer in run] for run in fuse_gathers([(p, store.chunk_bytes) for store, p in flat], topology)]
