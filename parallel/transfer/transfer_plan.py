"""How one placement of a layer's experts is carried out, seen from one rank: a value that planning makes and that stores, collectives and
dispatch only execute.

A `ChunkPlan` says which chunks this rank sends to whom and receives from whom in a SparseAllGather and in a SparseReduceScatter, by which
route (`hecate.parallel.transfer.routes`), and holds the index tables that the collectives read rows by. A `TokenPlan` says which ranks
serve this rank's assignments. A `TransferPlan` is both. Equal inputs give equal plans, and the functions below return the same object for
them as long as their caches, each of `CACHED` plans, hold it.

Shapes: E experts, D ranks, B = D - 1 bounds between them, S slots of this rank, n experts that this rank owns, M chunks that it sends or
receives in one exchange. Where chunks are cut into slices, tables count slices: those of row r are r · slices, r · slices + 1, ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Generic, TypeVar, get_args

import numpy as np

from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.cost_model import (
    HISTORY,
    ROUTE_NUMBERS,
    LayerCost,
    Route,
    busiest_port_seconds,
    cost_numbers,
    topology_numbers,
    transfer_seconds,
)
from hecate.parallel.cost.gather_bytes import PortBytes
from hecate.parallel.cost.route_loops import fastest_routes
from hecate.parallel.loops.replica_lists import no_replicas
from hecate.parallel.transfer.routes import Moves, PeerChunks, flat_moves, most_wanting, sliced_moves, slices_of, two_level_moves
from hecate.parallel.values.layout import ChunkSize
from hecate.parallel.values.placement import Placement

CACHED = 512
"""plans that each cache holds: some placements of each layer of a large model"""

Table = TypeVar("Table")
OnDevice = TypeVar("OnDevice")


@dataclass(frozen=True, eq=False)
class Exchange:
    """One rank's part of one exchange of chunks."""

    sent: PeerChunks
    received: PeerChunks
    idle: bool
    """whether no rank of the group sends anything"""


@dataclass(frozen=True)
class SumTerm(Generic[Table]):
    """The chunks that one peer adds to some sums."""

    exchange: int
    """the number of the exchange in which the chunks arrive"""
    rows: slice | Table
    """which of the chunks that arrive in that exchange are added"""
    sums: Table | None
    """the sum that each of the chunks is added to; None: the chunks are added to all sums, in order"""


@dataclass(frozen=True)
class SumTables(Generic[Table]):
    """How a rank adds up gradients, the terms of each sum by sending rank ascending."""

    own_slot_n: Table
    """the slot of this rank's own term of each sum"""
    terms: tuple[SumTerm[Table], ...]
    """the terms of other ranks, by rank ascending"""
    own_after: int | None
    """this rank's own terms come after so many of `terms`; None: they come first, as the first two terms of a sum may change places"""

    def map(self, convert: Callable[[Table], OnDevice]) -> SumTables[OnDevice]:
        terms = tuple(
            SumTerm(
                term.exchange,
                term.rows if isinstance(term.rows, slice) else convert(term.rows),
                None if term.sums is None else convert(term.sums),
            )
            for term in self.terms
        )
        return SumTables(convert(self.own_slot_n), terms, self.own_after)


@dataclass(frozen=True)
class ChunkTables(Generic[Table]):
    """The rows that the collectives read and write, int64: arrays in a plan, tensors on a device (`hecate.parallel.comm.device_tables`)."""

    expert_S: Table
    """the expert in each slot"""
    own_slot_n: Table
    """the slot of each owned chunk"""
    owned_row_M: Table
    """a gather's first exchange sends these owned chunks"""
    arrived_slot_M: tuple[Table, ...]
    """each exchange of a gather brings chunks for these slots"""
    sent_on_M: Table
    """a gather's second exchange sends these chunks, of those that its first has brought"""
    grad_slot_M: Table
    """a reduction's first exchange sends the gradients of these slots"""
    leader_sums: SumTables[Table]
    """the sums that this rank makes as a leader in a reduction, by expert ascending"""
    leader_row_M: Table
    """a reduction's second exchange sends these sums, of `leader_sums`"""
    owner_sums: SumTables[Table]
    """the sums of the owned experts in a reduction, by expert ascending"""

    def map(self, convert: Callable[[Table], OnDevice]) -> ChunkTables[OnDevice]:
        """The same tables, each converted, always in the same order."""
        return ChunkTables(
            convert(self.expert_S),
            convert(self.own_slot_n),
            convert(self.owned_row_M),
            tuple(convert(slot_M) for slot_M in self.arrived_slot_M),
            convert(self.sent_on_M),
            convert(self.grad_slot_M),
            self.leader_sums.map(convert),
            convert(self.leader_row_M),
            self.owner_sums.map(convert),
        )


@dataclass(frozen=True)
class ChunkPlan:
    """How the chunks of one placement move, seen from one rank. Plans are equal if they were made from equal values."""

    placement: Placement
    rank: int
    chunk: ChunkSize
    topology: Topology | None
    """the links between the group's ranks; None: nothing is known of them, and the route is flat"""
    route: Route
    slices: int
    """the number of slices that every chunk is cut into; 1 unless the route is sliced"""
    gather: tuple[Exchange, ...] = field(compare=False, repr=False)
    """one exchange, or two over leaders, the second after the first"""
    reduce: tuple[Exchange, ...] = field(compare=False, repr=False)
    """as many exchanges as `gather` has, for the gradients"""
    tables: ChunkTables[np.ndarray] = field(compare=False, repr=False)

    @property
    def num_slots(self) -> int:
        return len(self.tables.expert_S)

    @property
    def num_owned(self) -> int:
        return int((self.placement.owner_E == self.rank).sum())

    @property
    def replica_bytes(self) -> int:
        """Bytes of this rank's replicas."""
        return self.num_slots * self.chunk.num_bytes


@dataclass(frozen=True, eq=False)
class TokenPlan:
    """Which rank serves which of this rank's assignments. Plans are equal if their tables are."""

    bound_EB: np.ndarray
    """float64 [experts, ranks - 1]: cumulative shares; the part of an expert's assignments from bound r - 1 to bound r goes to rank r"""
    slot_DE: np.ndarray
    """int64 [ranks, experts]: the slot of each expert on each rank, -1 where it has none"""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenPlan) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    @cached_property
    def _value(self) -> tuple[bytes, bytes, tuple[int, ...]]:
        return self.bound_EB.tobytes(), self.slot_DE.tobytes(), self.slot_DE.shape


@dataclass(frozen=True)
class TransferPlan:
    """All that a rank needs to carry out one placement of a layer: where chunks go, and where tokens go."""

    chunks: ChunkPlan
    tokens: TokenPlan | None
    """None: every token stays on its rank, which holds every expert, and no rank asks another what it sends"""

    @property
    def placement(self) -> Placement:
        return self.chunks.placement


@dataclass(frozen=True)
class PlacementChange(Generic[Table]):
    """How the replicas of another placement take the place of those at hand, of which only what is missing travels."""

    before: ChunkPlan
    after: ChunkPlan
    missing: ChunkPlan
    """the plan that brings, from the owners, what `after` has and `before` lacks"""
    kept: tuple[Table, Table]
    """the rows of the replicas of `before` that stay, and the slots that they move to"""
    fetched: tuple[Table, Table]
    """the rows of the replicas of `missing`, and the slots that they move to"""


def plan_transfer(placement: Placement, split_ED: np.ndarray | None, chunk: ChunkSize, topology: Topology, rank: int) -> TransferPlan:
    """The plan by which one rank carries out a placement. A pure function: all ranks choose the same route.

    Args:
        split_ED: float64 [experts, ranks]: the shares of this rank's assignments of each expert that go to each rank (see `token_split`);
            None where every token of every rank stays on its rank.
        chunk: of what a SparseAllGather moves.
        topology: of the group's ranks.
    """
    tokens = None if split_ED is None else plan_tokens(placement, split_ED)
    return TransferPlan(plan_chunks(placement, chunk, topology, rank), tokens)


def plan_tokens(placement: Placement, split_ED: np.ndarray) -> TokenPlan:
    """Where one rank's assignments go; see `plan_transfer`."""
    assert split_ED.shape == placement.where_ED.shape, (split_ED.shape, placement.where_ED.shape)
    return _cached_tokens(placement, np.ascontiguousarray(split_ED, dtype=np.float64).tobytes())


@lru_cache(maxsize=CACHED)
def _cached_tokens(placement: Placement, split: bytes) -> TokenPlan:
    split_ED = np.frombuffer(split, dtype=np.float64).reshape(placement.where_ED.shape)
    bound_EB = np.ascontiguousarray(np.cumsum(split_ED, axis=1)[:, :-1])
    return TokenPlan(bound_EB, np.stack([placement.slot_of_expert(rank) for rank in range(placement.world_size)]))


@lru_cache(maxsize=CACHED)
def plan_chunks(placement: Placement, chunk: ChunkSize, topology: Topology | None, rank: int) -> ChunkPlan:
    """Where the chunks of a placement go, by the fastest route; see `plan_transfer`."""
    if topology is None or topology.world_size == 2:  # a leader would have nobody to send on to
        return plan_chunks_by("flat", placement, chunk, topology, rank)
    return plan_chunks_by(fastest_route(placement, chunk, topology), placement, chunk, topology, rank)


def plan_chunks_by(route: Route, placement: Placement, chunk: ChunkSize, topology: Topology | None, rank: int) -> ChunkPlan:
    """Where the chunks of a placement go by the given route; those over leaders need a topology."""
    slices, sliced = 1, placement
    gather: tuple[Moves, ...] = (flat_moves(placement),)
    reduce = gather
    if route != "flat":
        assert topology is not None, f"the route {route} needs a topology"
        if route == "two_level":
            moves = two_level_moves(placement, topology)
        else:
            slices = slices_of(chunk.numel, most_wanting(placement, topology))
            sliced, moves = sliced_moves(placement, topology, slices)
        gather, reduce = moves.gather, moves.reduce
    along = tuple(exchange_of(moves, rank) for moves in gather)
    against = tuple(exchange_of(moves, rank, back=True) for moves in reduce)
    tables = _tables(placement.experts_on(rank), sliced, rank, along, against)
    return ChunkPlan(placement, rank, chunk, topology, route, slices, along, against, tables)


def fastest_route(placement: Placement, chunk: ChunkSize, topology: Topology) -> Route:
    """The fastest route of a layer's SparseAllGather, and of its SparseReduceScatter, which takes the same way back; of equals the simpler.

    The two exchanges of a route over leaders follow one another, so their seconds add up. The cost model asks the same loops, so a plan is
    priced by the route that it takes. A pure function: all ranks choose alike. Chunks without numbers never travel.
    """
    if not chunk.numel:
        return "flat"
    cost = LayerCost(trainable_bytes=float(chunk.num_bytes), chunk_numel=chunk.numel)
    route_L = np.empty(1, np.int64)
    fastest_routes(
        np.array(placement.owner_E[None], dtype=np.int64),
        placement.where_ED[None].copy(),
        topology_numbers(topology),
        cost_numbers(cost, topology, HISTORY),
        no_replicas(placement.num_experts, placement.world_size),
        route_L,
    )
    return next(route for route in get_args(Route) if ROUTE_NUMBERS[route] == route_L[0])


def exchange_of(moves: Moves, rank: int, *, back: bool = False) -> Exchange:
    """One rank's part of the exchange in which all moves are made; with `back` against the moves, as gradients go."""
    along, against, idle = moves.sent(rank), moves.received(rank), not (moves.source_ED >= 0).any()
    return Exchange(against, along, idle) if back else Exchange(along, against, idle)


@lru_cache(maxsize=CACHED)
def fused_gathers(plans: tuple[ChunkPlan, ...]) -> tuple[tuple[int, ...], ...]:
    """Which gathers that start at one moment travel in one exchange: for each exchange the numbers of its plans.

    Gathers over leaders travel alone and come first; flat ones follow in runs, in order (see `fuse_gathers`). All plans are of one
    topology.
    """
    over_leaders = [(number,) for number, plan in enumerate(plans) if plan.route != "flat"]
    flat = [number for number, plan in enumerate(plans) if plan.route == "flat"]
    topology = plans[flat[0]].topology if flat else None
    if topology is None or len(flat) == 1:
        return (*over_leaders, *((number,) for number in flat))
    runs = fuse_gathers([(plans[number].placement, plans[number].chunk.num_bytes) for number in flat], topology)
    return (*over_leaders, *(tuple(flat[place] for place in run) for run in runs))


def fuse_gathers(layers: Sequence[tuple[Placement, float]], topology: Topology) -> list[list[int]]:
    """Which flat gathers that start at one moment travel in one exchange: the layers' numbers in runs, in order.

    One exchange pays its latency once, but no layer has its experts before all have. So a layer joins a run while all that joined it takes
    no longer than one latency: then the run's first layer waits at most that much longer than alone, and every other one no longer than it
    would after those before it. This also bounds the bytes in flight. A pure function: all ranks fuse alike.

    Args:
        layers: placement and bytes of a chunk of each, in the order in which they are needed.
    """
    runs: list[list[int]] = []
    total_PD, first, latency = np.zeros((4, topology.world_size)), 0.0, 0.0
    for layer, (placement, chunk_bytes) in enumerate(layers):
        ports = flat_moves(placement).ports(topology)
        bytes_PD = chunk_bytes * np.stack([ports.near_out_D, ports.near_in_D, ports.far_out_D, ports.far_in_D])
        joined = PortBytes(*(total_PD + bytes_PD))
        if runs and float(busiest_port_seconds(joined, 1.0, topology)) - first <= latency:
            runs[-1].append(layer)
            total_PD = total_PD + bytes_PD
        else:
            runs.append([layer])
            total_PD, first = bytes_PD, float(busiest_port_seconds(ports, chunk_bytes, topology))
            latency = float(transfer_seconds(ports, chunk_bytes, topology)) - first
    return runs


@lru_cache(maxsize=CACHED)
def plan_change(before: ChunkPlan, after: ChunkPlan) -> PlacementChange[np.ndarray]:
    """How to get from one placement's replicas to another's, between equal owners."""
    old, new, rank = before.placement, after.placement, after.rank
    owned_ED = new.owner_E[:, None] == np.arange(new.world_size)
    fetched = Placement(new.owner_E.copy(), (new.where_ED & ~old.where_ED) | owned_ED)
    missing = plan_chunks(fetched, after.chunk, after.topology, rank)

    def rows_and_slots(source: Placement) -> tuple[np.ndarray, np.ndarray]:
        expert_M = np.flatnonzero(source.where_ED[:, rank] & new.where_ED[:, rank])
        return source.slot_of_expert(rank)[expert_M], new.slot_of_expert(rank)[expert_M]

    return PlacementChange(before, after, missing, rows_and_slots(old), rows_and_slots(fetched))


def _tables(
    expert_S: np.ndarray, placement: Placement, rank: int, gather: tuple[Exchange, ...], reduce: tuple[Exchange, ...]
) -> ChunkTables[np.ndarray]:
    """`placement` is that of the slices, where chunks are cut; `expert_S` counts whole experts."""
    owned, slot_E = placement.owned_by(rank), placement.slot_of_expert(rank)
    none_M = np.empty(0, dtype=np.int64)
    sent_on_M, leader_row_M, led = none_M, none_M, none_M
    if len(gather) == 2:
        # A leader sends on some of what it received; each chunk came once, so its row is found by its expert.
        expert_M = gather[0].received.expert_M
        order_M = np.argsort(expert_M)
        sent_on_M = order_M[np.searchsorted(expert_M, gather[1].sent.expert_M, sorter=order_M)]
        led = np.sort(reduce[1].sent.expert_M)
        leader_row_M = np.searchsorted(led, reduce[1].sent.expert_M)
    return ChunkTables(
        expert_S=expert_S,
        own_slot_n=slot_E[owned],
        owned_row_M=np.searchsorted(owned, gather[0].sent.expert_M),
        arrived_slot_M=tuple(slot_E[exchange.received.expert_M] for exchange in gather),
        sent_on_M=sent_on_M,
        grad_slot_M=slot_E[reduce[0].sent.expert_M],
        leader_sums=_sums(led, slot_E, rank, reduce[:1]),
        leader_row_M=leader_row_M,
        owner_sums=_sums(owned, slot_E, rank, reduce),
    )


def _sums(expert_n: np.ndarray, slot_E: np.ndarray, rank: int, exchanges: tuple[Exchange, ...]) -> SumTables[np.ndarray]:
    """The sums of the given experts, ascending, of which this rank holds a replica: its own terms, and those that others send.

    A peer that sends in two exchanges is taken in their order.
    """
    terms: list[tuple[int, SumTerm[np.ndarray]]] = []
    for number, exchange in enumerate(exchanges):
        for peer, piece in exchange.received.pieces:
            expert_M = exchange.received.expert_M[piece]
            rows_M = piece.start + np.flatnonzero(np.isin(expert_M, expert_n))
            if not len(rows_M):
                continue
            rows = slice(int(rows_M[0]), int(rows_M[-1]) + 1) if rows_M[-1] - rows_M[0] + 1 == len(rows_M) else rows_M
            sums_M = np.searchsorted(expert_n, exchange.received.expert_M[rows_M])
            terms.append((peer, SumTerm(number, rows, None if len(sums_M) == len(expert_n) else sums_M)))
    terms.sort(key=lambda term: term[0])
    before = sum(peer < rank for peer, _ in terms)
    return SumTables(slot_E[expert_n], tuple(term for _, term in terms), None if before <= 1 else before)
