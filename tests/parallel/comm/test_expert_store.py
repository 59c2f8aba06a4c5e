"""A layer's store chooses its collectives by the topology; several layers' share one where chunks are small."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hecate.parallel.cluster.topology import Link, Topology
from hecate.parallel.comm.expert_store import ExpertStore, gather_layers
from hecate.parallel.transfer.transfer_plan import TransferPlan, plan_change, plan_chunks
from hecate.parallel.values.layout import ChunkSize
from hecate.parallel.values.placement import Placement
from testing.ranks import counted_all_to_alls, run_ranks
from testing.unit_cases import unit_topology
from tests.parallel.comm.collective_cases import world_group

OWNERS = [0, 0, 1, 3]
NUMEL = 6


def placement() -> Placement:
    """Expert 0 everywhere, expert 1 at home, expert 2 of rank 1 also on 0, expert 3 of rank 3 also on 1."""
    where = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 1]], dtype=bool)
    return Placement(np.array(OWNERS), where)


def store_of(numel: int, first: int = 0) -> ExpertStore:
    return ExpertStore(OWNERS, lambda e: torch.full((numel,), float(e + first)), torch.empty(0, numel), world_group())


def plan(rank: int, where: Placement, on: Topology | None, numel: int) -> TransferPlan:
    return TransferPlan(plan_chunks(where, ChunkSize(numel, 4), on, rank), None)


def _iterate(rank: int, world: int, nodes: tuple[int, ...] | None, near: float, numel: int) -> tuple[int, int]:
    """Two iterations; returns the bytes that this rank sent in the first: to gather and to reduce."""
    store, on, sent = store_of(numel), None if nodes is None else unit_topology(nodes, near=Link(near, 0.0)), []
    for _ in range(2):
        where = placement()
        store.gather(plan(rank, where, on, numel))
        replicas = store.replicas()
        held = where.experts_on(rank)
        assert torch.equal(replicas.detach(), torch.from_numpy(held)[:, None].float().expand(-1, numel))
        sent.append(store.bytes_sent)
        replicas.grad = torch.full_like(replicas, float(10**rank))
        store.reduce()
        assert store.replica_bytes == 0
        sent.append(store.bytes_sent)
        sums = [1111.0, 1.0, 11.0, 1010.0]
        assert store.reduced()[:, 0].tolist() == [sums[e] for e in store.experts]
    assert sent[3] == 2 * sent[1]
    return sent[0], sent[1] - sent[0]


@pytest.mark.parametrize(
    ("nodes", "near", "numel", "gathered", "reduced"),
    [
        # Flat: 0 sends expert 0 to three, 1 sends expert 2 to one, 3 sends expert 3 to one; each replica's gradient
        # leaves its rank once, whatever the way.
        (None, 10.0, 6, [18, 6, 0, 6], [6, 12, 6, 6]),
        # Sliced: 0 sends each third of expert 0 to another rank, which hands it to two.
        ((0, 0, 0, 0), 10.0, 6, [6, 6 + 4, 4, 6 + 4], [6, 12, 6, 6]),
        # A prime number of elements is not cut.
        ((0, 0, 0, 0), 10.0, 7, [21, 7, 0, 7], [7, 14, 7, 7]),
        # Two-level. Nodes {0, 2} and {1, 3}: 0 sends expert 0 to 2 and to leader 1, which hands it to 3.
        ((0, 1, 0, 1), 10.0, 7, [14, 14, 0, 7], [7, 14, 7, 7]),
        # Sliced: 1 and 3 each receive and hand on a half.
        ((0, 1, 0, 1), 10.0, 6, [12, 6 + 3, 0, 6 + 3], [6, 12, 6, 6]),
        # Where near is as slow as far and the chunk cannot be cut, nothing is gained by leaders.
        ((0, 1, 0, 1), 1.0, 7, [21, 7, 0, 7], [7, 14, 7, 7]),
    ],
)
def test_an_iteration(nodes: tuple[int, ...] | None, near: float, numel: int, gathered: list[int], reduced: list[int]) -> None:
    """Elements that each rank sends."""
    counts = run_ranks(4, _iterate, nodes, near, numel)
    assert [gather // 4 for gather, _ in counts] == gathered
    assert [reduce // 4 for _, reduce in counts] == reduced


def _chunks(experts: np.ndarray, numel: int = NUMEL) -> torch.Tensor:
    return torch.from_numpy(experts)[:, None].float().expand(-1, numel)


def _freed(rank: int, world: int, nodes: tuple[int, ...], numel: int) -> None:
    """A leaf that is freed between forward and backward: saved views hold good, and sums of two iterations add up."""
    store, heard, where = store_of(numel), [], placement()
    on = unit_topology(nodes, near=Link(10.0, 0.0))
    held = _chunks(where.experts_on(rank), numel)
    for _ in range(2):
        store.gather(plan(rank, where, on, numel))
        assert store.replica_bytes == held.numel() * 4, "on their way"
        leaf = store.replicas(lambda: heard.append(rank))
        y = (leaf[:, 1:] ** 2).sum()  # saves a view
        store.free()
        assert (store.replica_bytes, leaf.untyped_storage().nbytes()) == (0, 0)
        with pytest.raises(AssertionError, match="freed"):
            store.replicas()
        store.gather(plan(rank, placement(), on, numel))  # an equal plan of an equal placement, in new objects
        assert store.replicas(lambda: heard.append(-1)) is leaf
        y.backward()
        wanted = 2 * held
        wanted[:, 0] = 0
        assert torch.equal(leaf.grad, wanted)  # type: ignore[arg-type]
        store.reduce()
        assert leaf.untyped_storage().nbytes() == 0
        assert leaf.grad is None
    assert heard == [rank] * 2, "the first listener of each leaf hears of it once"
    copies = where.where_ED.sum(1)
    assert store.reduced()[:, 1:].tolist() == [[2 * 2.0 * e * copies[e]] * (numel - 1) for e in store.experts]


@pytest.mark.parametrize(("nodes", "numel"), [((0, 1, 0, 1), 7), ((0, 0, 0, 0), 6), ((0, 0, 0, 0), 7)], ids=["two-level", "sliced", "flat"])
def test_freed_replicas_come_back_for_the_backward_pass(nodes: tuple[int, ...], numel: int) -> None:
    run_ranks(4, _freed, nodes, numel)


def _exchanged(rank: int, world: int, nodes: tuple[int, ...]) -> int:
    """Expert 0 leaves ranks 1 and 2, expert 3 comes to rank 2, expert 2 stays on rank 0. Returns the bytes sent."""
    store, on = store_of(NUMEL), unit_topology(nodes, near=Link(10.0, 0.0))
    before = plan(rank, placement(), on, NUMEL)
    store.gather(before)
    sent = store.bytes_sent
    where = Placement(np.array(OWNERS), np.array([[1, 0, 0, 1], [1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 1]], dtype=bool))
    after = plan(rank, where, on, NUMEL)
    store.exchange(after, plan_change(before.chunks, after.chunks))
    assert store.replica_bytes == after.chunks.replica_bytes == where.where_ED[:, rank].sum() * NUMEL * 4
    replicas = store.replicas()
    assert torch.equal(replicas.detach(), _chunks(where.experts_on(rank)))
    replicas.grad = torch.full_like(replicas, float(10**rank))
    exchanged = store.bytes_sent - sent
    store.reduce()
    sums = [1001.0, 1.0, 11.0, 1110.0]
    assert store.reduced()[:, 0].tolist() == [sums[e] for e in store.experts]
    return exchanged


@pytest.mark.parametrize("nodes", [(0, 0, 0, 0), (0, 1, 0, 1)])
def test_only_what_another_placement_lacks_travels(nodes: tuple[int, ...]) -> None:
    assert [sent // (NUMEL * 4) for sent in run_ranks(4, _exchanged, nodes)] == [0, 0, 0, 1]


def _rounded(rank: int, world: int, nodes: tuple[int, ...]) -> tuple[int, int]:
    """Chunks and gradients that bfloat16 cannot hold. Returns the elements' bytes sent: to gather and exchange, and to reduce."""
    fine, on = 1 + 2**-12, unit_topology(nodes, near=Link(10.0, 0.0))
    store = ExpertStore(
        OWNERS, lambda e: torch.full((NUMEL,), e + fine), torch.empty(0, NUMEL), world_group(), replica_dtype=torch.bfloat16
    )

    def planned(where: Placement) -> TransferPlan:
        return TransferPlan(plan_chunks(where, ChunkSize(NUMEL, 2), on, rank), None)

    less = Placement(np.array(OWNERS), np.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 1]], dtype=bool))
    before, after = planned(less), planned(placement())
    store.gather(before)
    store.exchange(after, plan_change(before.chunks, after.chunks))
    leaf = store.replicas()
    store.free()
    store.gather(after)
    assert store.replica_bytes == len(leaf) * NUMEL * 2
    gathered = store.bytes_sent
    assert torch.equal(store.replicas().detach(), (_chunks(placement().experts_on(rank)) + fine).bfloat16())
    for _ in range(2):
        (leaf.float() * 0).sum().backward()
        assert leaf.grad is not None
        leaf.grad += fine * 10**rank
    assert leaf.grad.dtype == torch.float32
    store.reduce()
    assert store.reduced()[:, 0].tolist() == [pytest.approx(2 * fine * s, rel=1e-7) for s in _sums(store.experts)]
    return gathered, store.bytes_sent - gathered


def _sums(experts: list[int]) -> list[float]:
    return [[1111.0, 1.0, 11.0, 1010.0][e] for e in experts]


@pytest.mark.parametrize("nodes", [(0, 0, 0, 0), (0, 1, 0, 1)])
def test_replicas_are_rounded_before_they_travel_and_gradients_are_not(nodes: tuple[int, ...]) -> None:
    sent = run_ranks(4, _rounded, nodes)
    # Expert 0 to rank 1, 2 to rank 0, 3 to rank 1; then 0 to ranks 2 and 3; then all again: 10 chunks of two bytes an element.
    assert sum(gathered for gathered, _ in sent) == (3 + 2 + 5) * NUMEL * 2
    assert sum(reduced for _, reduced in sent) == 5 * NUMEL * 4


def _together(rank: int, world: int, latency: float) -> tuple[int, list[int]]:
    """Three layers started at once, the second of them refilled, waited for last first; how many all-to-alls, and each layer's bytes."""
    nodes, where = unit_topology((0,) * 4, near=Link(1.0, latency)), placement()
    stores = [store_of(n, n) for n in (7, 5, 11)]
    plans = [plan(rank, where, nodes, n) for n in (7, 5, 11)]
    stores[1].gather(plans[1])
    stores[1].replicas()
    stores[1].free()
    stores[2].gather(plans[2])
    with counted_all_to_alls() as calls:
        before = [store.bytes_sent for store in stores]
        gather_layers(list(zip(stores, plans, strict=True)))
        gather_layers(list(zip(stores, plans, strict=True)))
    for store in stores[::-1]:
        numel = store.chunk_numel
        assert torch.equal(store.replicas().detach(), _chunks(where.experts_on(rank) + numel, numel))
    return len(calls), [store.bytes_sent - sent for store, sent in zip(stores, before, strict=True)]


@pytest.mark.parametrize(("latency", "calls"), [(100.0, 1), (0.0, 2)])
def test_layers_that_start_together_travel_together_where_latency_counts(latency: float, calls: int) -> None:
    """But what is under way already, which the third layer is."""
    sent = [3, 1, 0, 1]
    assert run_ranks(4, _together, latency) == [(calls, [sent[rank] * 7 * 4, sent[rank] * 5 * 4, 0]) for rank in range(4)]
