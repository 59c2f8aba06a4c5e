"""Holds a rank's part of one layer's experts: the chunks that it owns, and the replicas of one iteration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hecate.parallel.comm.collectives import Handle, sparse_all_gather, sparse_all_gather_many, sparse_reduce_scatter
from hecate.parallel.comm.device_tables import to_device
from hecate.parallel.comm.ordered_sums import gather_in_order, reduce_in_order
from hecate.parallel.transfer.transfer_plan import PlacementChange, TransferPlan, fused_gathers
from hecate.parallel.values.layout import ChunkSize
from hecate.parallel.values.summation import SumOrder, TreeSum


class ExpertStore:
    """One layer's owned chunks (master parameters, stepped by the owner's optimizer) and this iteration's replicas.

    In one iteration: `gather` (starts the SparseAllGather) → `replicas` (waits for it; a leaf that collects gradients) → `reduce` (starts
    the SparseReduceScatter and drops the replicas) → `reduced` (waits for it). All ranks of the group call `gather` and `reduce` of
    all layers in the same order, each with its own `TransferPlan` of the same placement. Outside training `drop` takes the place of
    `reduce`.

    An iteration may be a step or a micro-step: the results of several calls of `reduce` are added up until `reduced` takes them. Between
    forward and backward `free` frees the replicas' memory; `gather` and `replicas` then fill the same leaf again (Hecate-RM).

    Other sharding groups may have the same experts (`hecate.parallel.cluster.mesh`). Then, after a step's last `reduce`, `sum_over_groups`
    starts adding what the other groups' owners have, so that `reduced` returns the same bits in all of them.

    Where sums must not depend on ranks, `reduce_in_order` takes the place of `reduce`, once a step.
    """

    def __init__(
        self,
        owner_E: list[int],
        init: Callable[[int], Tensor],
        none_nC: Tensor,
        group: dist.ProcessGroup,
        replicate_group: dist.ProcessGroup | None = None,
        *,
        replica_dtype: torch.dtype | None = None,
    ) -> None:
        """Args:
        owner_E: the owner rank of each expert.
        init: the initial flat chunk of an expert; called for owned experts only.
        none_nC: [0, C]: what a rank that owns nothing has, whose collectives need a chunk's size, dtype and device.
        group: the ranks that share one copy of all experts.
        replicate_group: the owners of the same experts in all sharding groups; None: there is one sharding group.
        replica_dtype: of the replicas, which are rounded before they travel; None: that of the chunks. Gradients have that of the chunks.
        """
        rank = dist.get_rank(group)
        self._group, self._replicate_group = group, replicate_group
        self.experts = [expert for expert, owner in enumerate(owner_E) if owner == rank]
        """owned experts, ascending"""
        self._owned_nC = torch.stack([init(expert) for expert in self.experts]) if self.experts else none_nC
        self._replica_dtype = none_nC.dtype if replica_dtype is None else replica_dtype
        self.parameters = [nn.Parameter(chunk) for chunk in self._owned_nC]
        """one parameter an owned expert, views of one tensor"""
        self.bytes_to = np.zeros(dist.get_world_size(group), dtype=np.int64)
        """bytes of chunks and gradients sent so far to each rank of the group"""
        self.ring_bytes = 0
        """bytes sent so far to the next rank of the replicate group"""
        self._plan: TransferPlan | None = None
        """of this iteration; None: nothing is gathered"""
        self._gathering: Handle[Tensor] | None = None
        self._replicas_SC: Tensor | None = None
        self._filled = False
        """whether the leaf holds the replicas; False: it has been freed"""
        self._watched = False
        """whether a function is called when the leaf's gradient is complete"""
        self._reducing: Handle[Tensor] | None = None
        self._sum_nC: Tensor | None = None
        """sum of the gradients of earlier iterations"""
        self._summing: dist.Work | None = None
        """of those, over the sharding groups"""
        self._in_order: Handle[TreeSum[Tensor]] | None = None
        """takes the place of `_reducing`"""
        self._gathering_sums: Handle[Tensor] | None = None
        """takes the place of `_summing`"""
        self._order: SumOrder | None = None
        """of those two"""

    @property
    def bytes_sent(self) -> int:
        """Bytes sent to other ranks so far."""
        return int(self.bytes_to.sum()) + self.ring_bytes

    @property
    def owned(self) -> Tensor:
        """[owned experts, C]: the master parameters, by expert ascending."""
        return self._owned_nC

    @property
    def chunk_numel(self) -> int:
        return self._owned_nC.shape[1]

    @property
    def chunk_bytes(self) -> int:
        return self.chunk.num_bytes

    @property
    def device(self) -> torch.device:
        return self._owned_nC.device

    @property
    def chunk(self) -> ChunkSize:
        return ChunkSize(self.chunk_numel, self._owned_nC.element_size())

    @property
    def replica_bytes(self) -> int:
        """Bytes of the replicas that have arrived or are on their way."""
        return self._plan.chunks.replica_bytes if self._plan is not None and (self._filled or self._gathering) else 0

    @property
    def reduce_started(self) -> bool:
        return self._reducing is not None or self._order is not None or self._sum_nC is not None

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

    def gather(self, plan: TransferPlan) -> None:
        """Start materializing; does nothing where this iteration's replicas have arrived or are on their way."""
        gather_together([(self, plan)])

    def replicas(self, when_complete: Callable[[], None] | None = None) -> Tensor:
        """[slots, C], a leaf that requires grad, in the type of replicas: slot s holds expert `plan.chunks.tables.expert_S[s]`.

        Its gradient has the owned chunks' type: sums over tokens and ranks are not rounded to that of the replicas.

        Args:
            when_complete: called in each backward pass as soon as the leaf's gradient is complete; the first one given counts.
        """
        if self._gathering is not None:
            if self._replicas_SC is None:
                self._replicas_SC = self._leaf(self._gathering.wait())
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

    def exchange(self, plan: TransferPlan, change: PlacementChange) -> None:
        """Have the replicas of another plan in place of those that have arrived or are on their way, of which nothing was computed yet.

        Only what is missing travels. Every rank of the group must call it, in the same order, with plans of the same placements.

        Args:
            change: from the plan of the last `gather` to `plan`.
        """
        assert self._plan is not None, "exchange() before gather()"
        assert (change.before, change.after) == (self._plan.chunks, plan.chunks), "the change is one between other placements"
        gathering = sparse_all_gather(self._rounded_nC(), change.missing, self._group)
        self.bytes_to += gathering.bytes_to
        before_SC = self.replicas().detach()
        replicas_SC = before_SC.new_empty((plan.chunks.num_slots, self.chunk_numel))
        old_M, kept_slot_M, new_M, new_slot_M = to_device([*change.kept, *change.fetched], self.device)
        replicas_SC[kept_slot_M] = before_SC[old_M]
        replicas_SC[new_slot_M] = gathering.wait()[new_M]
        self.drop()
        self._plan = plan
        self._replicas_SC, self._filled = self._leaf(replicas_SC), True

    def free(self) -> None:
        """Give the replicas' memory back, but keep the leaf, of which autograd has saved views, and its gradient."""
        assert self._replicas_SC is not None
        assert self._gathering is None
        self._replicas_SC.untyped_storage().resize_(0)
        self._filled = False

    def take_gradient(self) -> Tensor:
        """[slots, C]: what backward passes have left at the replicas since the last call. The replicas have no gradient afterwards."""
        assert self._replicas_SC is not None
        grad_SC, self._replicas_SC.grad = self._replicas_SC.grad, None
        assert grad_SC is not None
        return grad_SC

    def reduce(self, grad_SC: Tensor | None = None) -> None:
        """Start summing the replicas' gradients onto the owners, and drop the replicas.

        Args:
            grad_SC: [slots, C], the gradients; None: those that backward passes have left at the replicas.
        """
        assert self._plan is not None
        assert self._replicas_SC is not None
        self.wait_for_reduction()
        self._reducing = sparse_reduce_scatter(self.take_gradient() if grad_SC is None else grad_SC, self._plan.chunks, self._group)
        self.bytes_to += self._reducing.bytes_to
        self.drop()

    def reduce_in_order(self, sums: TreeSum[Tensor], order: SumOrder) -> None:
        """Start summing gradients of experts that are all replicated everywhere onto the owners, as `order` says, and drop the replicas.

        Args:
            sums: those of this rank's positions, [experts, C] each; they must not change before `reduced` returns.
        """
        assert self._plan is not None
        assert self._plan.chunks.num_slots == len(self._plan.placement.owner_E), "an expert is missing"
        rank, world, first = dist.get_rank(self._group), dist.get_world_size(self._group), self._first_of_group()
        rows_of: list[list[int]] = [[] for _ in range(world)]
        for expert, owner in enumerate(self._plan.placement.owner_E.tolist()):
            rows_of[owner].append(expert)
        assert rows_of[rank] == self.experts, (rows_of[rank], self.experts)
        blocks_of = [order.blocks([first + peer]) for peer in range(world)]
        self._order, self._in_order = order, reduce_in_order(sums, rows_of, blocks_of, order.size, self._owned_nC, self._group)
        self.bytes_to += self._in_order.bytes_to
        self.drop()

    def _first_of_group(self) -> int:
        """The number in the job of the sharding group's first rank."""
        return 0 if self._replicate_group is None else dist.get_rank(self._replicate_group) * dist.get_world_size(self._group)

    def add_gradients(self, grad_nC: Tensor) -> None:
        """Add gradients of the owned experts, by expert ascending, that were summed elsewhere: no replicas were gathered. Kept."""
        self.wait_for_reduction()
        self._sum_nC = grad_nC if self._sum_nC is None else self._sum_nC.add_(grad_nC)

    def wait_for_reduction(self) -> None:
        """Wait for the reduction under way, so that nothing is left of the gradients it was made from but the owners' sums."""
        if self._reducing is not None:
            grad_nC = self._reducing.wait()
            self._sum_nC = grad_nC if self._sum_nC is None else self._sum_nC.add_(grad_nC)
            self._reducing = None

    def sum_over_groups(self) -> None:
        """Wait for the last reduction, and start summing over the sharding groups where there are several and that has not begun.

        Every rank of the replicate group must call it for all layers in the same order, once the step's last `reduce` was called.
        """
        if self._in_order is not None:
            self._sum_groups_in_order()
        self.wait_for_reduction()
        if self._replicate_group is None or self._summing is not None or self._order is not None or not self.experts:
            return
        assert self._sum_nC is not None, "sum_over_groups() before reduce()"
        self._summing = dist.all_reduce(self._sum_nC, group=self._replicate_group, async_op=True)
        groups = dist.get_world_size(self._replicate_group)
        self.ring_bytes += 2 * (groups - 1) * self._sum_nC.numel() * self._sum_nC.element_size() // groups  # in a ring

    def _sum_groups_in_order(self) -> None:
        """Wait for the sums of this sharding group's positions, and start exchanging them with those of the other groups."""
        assert self._in_order is not None
        assert self._order is not None
        sums, self._in_order = self._in_order.wait(), None
        if self._replicate_group is None:
            self._sum_nC = sums.total
        elif self.experts:
            size, groups = dist.get_world_size(self._group), dist.get_world_size(self._replicate_group)
            blocks_of = [self._order.blocks(range(group * size, (group + 1) * size)) for group in range(groups)]
            self._gathering_sums = gather_in_order(sums, blocks_of, self._order.size, self._owned_nC, self._replicate_group)
            self.ring_bytes += sum(self._gathering_sums.bytes_to)
        else:
            self._sum_nC = self._owned_nC

    def reduced(self) -> Tensor:
        """[owned experts, C]: the summed gradients, by expert ascending."""
        self.sum_over_groups()
        if self._gathering_sums is not None:
            self._sum_nC, self._gathering_sums = self._gathering_sums.wait(), None
        self._order = None
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
        self._plan = self._replicas_SC = None
        self._watched = False

    def _begin_gather(self, plan: TransferPlan) -> bool:
        """Whether there is anything to gather."""
        if self._gathering is not None or self._filled:
            return False
        if self._replicas_SC is None:
            self._plan = plan
        assert self._plan is not None
        assert self._plan.chunks == plan.chunks, "freed replicas come back as they were"
        return True

    def _rounded_nC(self) -> Tensor:
        """[owned experts, C]: the owned chunks as they travel to replicas."""
        return self._owned_nC.to(self._replica_dtype)

    def _leaf(self, replicas_SC: Tensor) -> Tensor:
        leaf_SC = replicas_SC.requires_grad_()
        leaf_SC.grad_dtype = self._owned_nC.dtype
        return leaf_SC

    def _into_SC(self) -> Tensor | None:
        """The freed leaf. Through `.data`, which counts no version: autograd's saved views are to hold good when it is filled again."""
        return None if self._replicas_SC is None else self._replicas_SC.data

    def _gather_begun(self, gathering: Handle[Tensor]) -> None:
        self._gathering = gathering
        self.bytes_to += gathering.bytes_to


def gather_together(layers: Sequence[tuple[ExpertStore, TransferPlan]]) -> None:
    """`ExpertStore.gather` of layers of one model at one moment: flat ones of small chunks in one all-to-all (see `fused_gathers`).

    Every rank of the group must call it, with the same layers in the order in which they are needed.
    """
    starting = [(store, plan.chunks) for store, plan in layers if store._begin_gather(plan)]
    for together in fused_gathers([plan for _, plan in starting]):
        parts = [(store._rounded_nC(), plan, store._into_SC()) for store, plan in (starting[number] for number in together)]
        group = starting[together[0]][0]._group
        handles = [sparse_all_gather(*parts[0][:2], group, parts[0][2])] if len(parts) == 1 else sparse_all_gather_many(parts, group)
        for number, handle in zip(together, handles, strict=True):
            starting[number][0]._gather_begun(handle)
