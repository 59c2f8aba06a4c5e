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
from hecate.parallel.transfer.transfer_plan import ChunkPlan, PlacementChange, TransferPlan, fused_gathers
from hecate.parallel.values.layout import ChunkSize
from hecate.parallel.values.summation import SumOrder, TreeSum


class ExpertStore:
    """One layer's owned chunks (master parameters, stepped by the owner's optimizer) and this iteration's replicas.

    An iteration calls `gather` (starts the SparseAllGather) → `replicas` (waits for it; a leaf that collects gradients) → `reduce`
    (starts the SparseReduceScatter and drops the replicas) → `reduced` (waits for it). All ranks of the group call `gather` and `reduce`
    of all layers in the same order, each with its own `TransferPlan` of the same placement. Outside training `drop` takes the place of
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
        """the experts that this rank owns, ascending"""
        self._owned_nC = torch.stack([init(expert) for expert in self.experts]) if self.experts else none_nC
        self._replica_dtype = none_nC.dtype if replica_dtype is None else replica_dtype
        self.parameters = [nn.Parameter(chunk) for chunk in self._owned_nC]
        """a parameter for each owned expert, all of them views of one tensor"""
        self.bytes_to = np.zeros(dist.get_world_size(group), dtype=np.int64)
        """the bytes of chunks and gradients sent so far to each rank of the group"""
        self.ring_bytes = 0
        """the bytes sent so far to the next rank of the replicate group"""
        self._plan: TransferPlan | None = None
        """the plan of this iteration; None: nothing is gathered"""
        self._gathering: Handle[Tensor] | None = None
        self._replicas_SC: Tensor | None = None
        self._filled = False
        """whether the leaf `_replicas_SC` holds the replicas; False: its memory has been freed"""
        self._watched = False
        """whether a function is called when the leaf's gradient is complete"""
        self._reducing: Handle[Tensor] | None = None
        self._sum_nC: Tensor | None = None
        """the sum of this step's gradients whose reduction is over"""
        self._summing: dist.Work | None = None
        """the sum of `_sum_nC` over the sharding groups, under way"""
        # In a fixed order of sums, these two take the places of `_reducing` and `_summing`.
        self._reducing_in_order: Handle[TreeSum[Tensor]] | None = None
        self._summing_in_order: Handle[Tensor] | None = None
        self._order: SumOrder | None = None
        """the order in which those two add up, from `reduce_in_order` to `reduced`"""

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
        assert all(part is None for part in (self._gathering, self._replicas_SC, self._reducing)), "owners change between iterations"
        rank = dist.get_rank(self._group)
        self.experts = [expert for expert, owner in enumerate(owner_E) if owner == rank]
        assert sorted(chunks) == self.experts, (sorted(chunks), self.experts)
        self._owned_nC = torch.stack([chunks[e].detach() for e in self.experts]) if self.experts else self._owned_nC[:0].clone()
        self.parameters = [nn.Parameter(chunk) for chunk in self._owned_nC]

    def gather(self, plan: TransferPlan) -> None:
        """Start materializing; does nothing where this iteration's replicas have arrived or are on their way."""
        gather_layers([(self, plan)])

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
                # The freed leaf gets its memory back before the wait, which writes the replicas into it.
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
        # What is missing starts to travel before the gather that is under way is waited for.
        gathering = sparse_all_gather(self._owned_nC.to(self._replica_dtype), change.missing, self._group)
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
        # The last micro-step's sum is added first, so that micro-steps are added up in their order; its buffers are free again, too.
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
        rank, world = dist.get_rank(self._group), dist.get_world_size(self._group)
        first = 0 if self._replicate_group is None else dist.get_rank(self._replicate_group) * world  # of this sharding group, in the job
        rows_of: list[list[int]] = [[] for _ in range(world)]
        for expert, owner in enumerate(self._plan.placement.owner_E.tolist()):
            rows_of[owner].append(expert)
        assert rows_of[rank] == self.experts, (rows_of[rank], self.experts)
        blocks_of = [order.blocks([first + peer]) for peer in range(world)]
        self._order = order
        self._reducing_in_order = reduce_in_order(sums, rows_of, blocks_of, order.size, self._owned_nC, self._group)
        self.bytes_to += self._reducing_in_order.bytes_to
        self.drop()

    def add_gradients(self, grad_nC: Tensor) -> None:
        """Add gradients of the owned experts, by expert ascending, that were summed elsewhere: no replicas were gathered.

        The store keeps the tensor and adds to it.
        """
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
        if self._reducing_in_order is not None:
            self._sum_groups_in_order()
        self.wait_for_reduction()
        # A rank that owns nothing may leave: the others of its replicate group own the same, nothing, and leave, too.
        if self._replicate_group is None or self._summing is not None or self._order is not None or not self.experts:
            return
        assert self._sum_nC is not None, "sum_over_groups() before reduce()"
        self._summing = dist.all_reduce(self._sum_nC, group=self._replicate_group, async_op=True)
        groups = dist.get_world_size(self._replicate_group)
        # A ring sends each element once around to be summed, and once to be handed out.
        self.ring_bytes += 2 * (groups - 1) * self._sum_nC.numel() * self._sum_nC.element_size() // groups

    def _sum_groups_in_order(self) -> None:
        """Wait for the sums of this sharding group's positions, and start exchanging them with those of the other groups."""
        assert self._reducing_in_order is not None
        assert self._order is not None
        sums, self._reducing_in_order = self._reducing_in_order.wait(), None
        if self._replicate_group is None:
            self._sum_nC = sums.total
        elif self.experts:
            size, groups = dist.get_world_size(self._group), dist.get_world_size(self._replicate_group)
            blocks_of = [self._order.blocks(range(group * size, (group + 1) * size)) for group in range(groups)]
            self._summing_in_order = gather_in_order(sums, blocks_of, self._order.size, self._owned_nC, self._replicate_group)
            self.ring_bytes += sum(self._summing_in_order.bytes_to)
        else:
            self._sum_nC = self._owned_nC  # [0, C]: this rank owns nothing

    def reduced(self) -> Tensor:
        """[owned experts, C]: the summed gradients, by expert ascending."""
        self.sum_over_groups()
        if self._summing_in_order is not None:
            self._sum_nC, self._summing_in_order = self._summing_in_order.wait(), None
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
        """Take the plan for this iteration; returns whether its replicas are still to be gathered."""
        if self._gathering is not None or self._filled:
            return False
        if self._replicas_SC is None:
            self._plan = plan
        assert self._plan is not None
        assert self._plan.chunks == plan.chunks, "freed replicas come back as they were"
        return True

    def _gather_arguments(self, plan: TransferPlan) -> tuple[Tensor, ChunkPlan, Tensor | None]:
        """What `sparse_all_gather_many` takes of a layer: the owned chunks as they travel to replicas, the plan, and the freed leaf."""
        # Through `.data`, which counts no version: autograd's saved views are to hold good when the leaf is filled again.
        into_SC = None if self._replicas_SC is None else self._replicas_SC.data
        return self._owned_nC.to(self._replica_dtype), plan.chunks, into_SC

    def _leaf(self, replicas_SC: Tensor) -> Tensor:
        leaf_SC = replicas_SC.requires_grad_()
        leaf_SC.grad_dtype = self._owned_nC.dtype  # else autograd would round gradients to the type of replicas
        return leaf_SC


def gather_layers(layers: Sequence[tuple[ExpertStore, TransferPlan]]) -> None:
    """`ExpertStore.gather` of layers of one model at one moment: flat ones of small chunks in one all-to-all (see `fused_gathers`).

    Every rank of the group must call it, with the same layers in the order in which they are needed.
    """
    starting = [(store, plan) for store, plan in layers if store._begin_gather(plan)]
    for fused in fused_gathers(tuple(plan.chunks for _, plan in starting)):
        stores = [starting[number][0] for number in fused]
        parts = [store._gather_arguments(plan) for store, plan in (starting[number] for number in fused)]
        group = stores[0]._group
        handles = [sparse_all_gather(*parts[0][:2], group, parts[0][2])] if len(parts) == 1 else sparse_all_gather_many(parts, group)
        for store, handle in zip(stores, handles, strict=True):
            store._gathering = handle
            store.bytes_to += handle.bytes_to
