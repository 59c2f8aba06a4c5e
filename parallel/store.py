"""A rank's share of the experts: owned shards for good, replicas for one iteration."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hecate.parallel.collectives import Handle, sparse_all_gather, sparse_reduce_scatter
from hecate.parallel.cost_model import choose_collective
from hecate.parallel.placement import Placement
from hecate.parallel.routes import TwoLevelMoves, two_level_moves
from hecate.parallel.topology import Topology
from hecate.parallel.two_level import two_level_all_gather, two_level_reduce_scatter


class LayerStore:
    """One layer's owned chunks (master parameters, stepped by the owner's optimizer) and this iteration's replicas.

    In one iteration: `gather` (starts the SparseAllGather) → `replicas` (waits for it; a leaf that collects gradients) → `reduce` (starts
    the SparseReduceScatter and drops the replicas) → `reduced` (waits for it). All ranks of the group call `gather` and `reduce` of
    all layers in the same order. Outside training `drop` takes the place of `reduce`.
    """

    def __init__(
        self, owner_E: list[int], init: Callable[[int], Tensor], group: dist.ProcessGroup, topology: Topology | None = None
    ) -> None:
        """Args:
        owner_E: the owner rank of each expert.
        init: the initial flat chunk of an expert; called for owned experts only.
        topology: of the group's ranks, by which to choose collectives; None: always the flat ones.
        """
        rank = dist.get_rank(group)
        self._group = group
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
        self._over_leaders: TwoLevelMoves | None = None
        """the way of this iteration's collectives; None: flat"""
        self._gathering: Handle[Tensor] | None = None
        self._replicas_SC: Tensor | None = None
        self._reducing: Handle[Tensor] | None = None

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
        return self._replicas_SC is not None

    @property
    def replica_bytes(self) -> int:
        """Bytes of the replicas held now."""
        return 0 if self._replicas_SC is None else self._replicas_SC.numel() * self._replicas_SC.element_size()

    @property
    def reduce_started(self) -> bool:
        return self._reducing is not None

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
        if self._gathering is None and self._replicas_SC is None:
            self._placement = placement
            self._over_leaders = self._way_over_leaders(placement)
            if self._over_leaders is None:
                self._gathering = sparse_all_gather(self._owned_nC, placement, self._group)
            else:
                self._gathering = two_level_all_gather(self._owned_nC, placement, self._over_leaders, self._group)
            self.bytes_sent += self._gathering.bytes_sent

    def replicas(self) -> Tensor:
        """[slots, C], a leaf that requires grad: slot s holds expert `placement.experts_on(rank)[s]`."""
        if self._replicas_SC is None:
            assert self._gathering is not None, "replicas() before gather()"
            self._replicas_SC = self._gathering.wait().requires_grad_()
            self._gathering = None
        return self._replicas_SC

    def reduce(self) -> None:
        """Start summing the replicas' gradients onto the owners, and drop the replicas."""
        assert self._placement is not None
        assert self._replicas_SC is not None
        assert self._replicas_SC.grad is not None
        if self._over_leaders is None:
            self._reducing = sparse_reduce_scatter(self._replicas_SC.grad, self._placement, self._group)
        else:
            self._reducing = two_level_reduce_scatter(self._replicas_SC.grad, self._placement, self._over_leaders, self._group)
        self.bytes_sent += self._reducing.bytes_sent
        self.drop()

    def reduced(self) -> Tensor:
        """[owned experts, C]: the summed gradients, by expert ascending."""
        assert self._reducing is not None, "reduced() before reduce()"
        grad_nC = self._reducing.wait()
        self._reducing = None
        return grad_nC

    def drop(self) -> None:
        """Forget this iteration's replicas (a gather still under way is waited for first)."""
        if self._gathering is not None:
            self._gathering.wait()
        self._placement = self._gathering = self._replicas_SC = None

    def _way_over_leaders(self, placement: Placement) -> TwoLevelMoves | None:
        topology = self._topology
        if topology is None or topology.num_nodes == 1:
            return None
        if choose_collective(placement.owner_E, placement.where_ED, self.chunk_bytes, topology) == "flat":
            return None
        return two_level_moves(placement, topology)
