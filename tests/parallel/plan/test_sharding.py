from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hecate.errors import UserError
from hecate.parallel.cluster.topology import Link, Topology
from hecate.parallel.cost.cost_model import LayerCost
from hecate.parallel.plan.sharding import better_owners, heterogeneous_owners, owned_slots, reshard_pays, reshard_seconds
from hecate.parallel.planners import POLICIES, PlanInput
from testing.unit_cases import layer_input, unit_topology


def owners(loads: list[list[float]], on: Topology, degree: list[int], memory: Sequence[float] = ()) -> list[list[int]]:
    """Experts of one byte."""
    found = heterogeneous_owners([np.array(row) for row in loads], on, degree, [1.0] * len(loads), memory or on.memory)
    return [owner_E.tolist() for owner_E in found]


def test_the_least_loaded_node_then_its_least_loaded_device() -> None:
    """Ranks 0, 1 | 2, 3, two slots each; loads 10 9 8 7 4 3 2 1.

    10: all empty, rank 0. 9: node 1, rank 2. 8: nodes 10 : 9, rank 3. 7: 10 : 17, rank 1. 4: 17 : 17, node 0, devices 10 : 7, rank 1,
    full. 3: 21 : 17, devices 9 : 8, rank 3, full. 2: 21 : 20, rank 2, node 1 full. 1: rank 0.
    """
    assert owners([[10, 9, 8, 7, 4, 3, 2, 1]], unit_topology((0, 0, 1, 1)), [0]) == [[0, 2, 3, 1, 1, 3, 2, 0]]


def test_hot_experts_are_set_aside_and_fill_what_is_left() -> None:
    """Two ranks, three slots each; the hottest of each layer set aside. Leftovers 5 1 and 7 2, so layer 1 goes first.

    Layer 1: 7 to rank 0, 2 to rank 1. Layer 0 anew: 5 to rank 0, 1 to rank 1. A slot each is left: 9 to rank 0, 8 to rank 1.
    """
    assert owners([[9, 5, 1], [2, 8, 7]], unit_topology((0, 0)), [1, 1]) == [[0, 0, 1], [1, 1, 0]]


def test_the_layer_with_the_hottest_leftover_chooses_first() -> None:
    """Two ranks, slots 1 and 3. Layer 1's 6 comes before layer 0's 5 although layer 0's hottest, set aside, has 9.

    6: rank 0 has fewer free slots, and is full. 1, 5: rank 1. The 9 takes what is left, on rank 1.
    """
    assert owners([[9, 5], [6, 1]], unit_topology((0, 0)), [1, 0], memory=[1, 3]) == [[1, 1], [0, 1]]


def test_of_equally_loaded_devices_the_one_with_fewer_free_slots() -> None:
    """Slots 3 and 1: the first of four equal experts goes to rank 1, which is then full."""
    assert owners([[1, 1, 1, 1]], unit_topology((0, 0)), [0], memory=[3, 1]) == [[1, 0, 0, 0]]


def test_a_fast_device_gets_more_load() -> None:
    """Rank 0 twice as fast, two slots each: 6 to rank 0, 3 to rank 1, both busy for 3 s; 2 to rank 0; 1 to rank 1, for rank 0 is full."""
    assert owners([[6, 3, 2, 1]], unit_topology((0, 0), flops=(2.0, 1.0)), [0]) == [[0, 1, 0, 1]]


def test_a_node_counts_by_the_rate_of_all_its_devices() -> None:
    """Ranks 0, 1, 2 | 3, two slots each; loads 6 5 3 1 1 1 1 1.

    6: node 1 has fewer free slots, rank 3. Node 1 is now at 6 a device, node 0 stays below it until it is full, at 11 : 3.
    5: rank 0. 3: rank 1. 1, 1: rank 2. 1: devices 5 : 3, rank 1. 1: rank 0. The last: rank 3.
    """
    assert owners([[6, 5, 3, 1, 1, 1, 1, 1]], unit_topology((0, 0, 0, 1)), [0]) == [[3, 0, 1, 2, 2, 1, 0, 3]]


def test_hot_experts_of_a_layer_spread_over_the_uplinks() -> None:
    """All are hot, two nodes of one device: each node sends one expert of each layer, whatever their loads, not one node both.

    With an uplink twice as fast at node 1: the first to node 0, the second and third to node 1, and the fourth where a slot is left.
    """
    on = unit_topology((0, 1))
    assert owners([[9, 1], [5, 4]], on, [2, 2]) == [[0, 1], [0, 1]]
    assert owners([[9, 8, 7, 6]], replace(on, uplink_bandwidth=(1.0, 2.0)), [4]) == [[0, 1, 1, 0]]


def test_bytes_are_shared_by_memory() -> None:
    assert owned_slots({1.0: 7}, [1e3, 2e3, 4e3])[1.0].tolist() == [1, 2, 4]
    # 7 bytes, 3.5 each. 3 to rank 0; then 1 + 1 + 1 to rank 1 up to 3; the last, on a tie at half a byte short, to rank 0.
    slots = owned_slots({1.0: 4, 3.0: 1}, [1e3, 1e3])
    assert (slots[3.0].tolist(), slots[1.0].tolist()) == ([1, 0], [1, 3])


def test_no_device_owns_more_than_its_memory() -> None:
    """By memory a small device's share is 1.8 of 100; it has room for one."""
    assert owned_slots({1.0: 100}, [1.9, 1.9, 1.9, 100])[1.0].tolist() == [1, 1, 1, 97]
    with pytest.raises(UserError, match="no device has memory left for one more expert of 2 bytes"):
        owned_slots({2.0: 3}, [3.0, 3.0])
    with pytest.raises(UserError, match="no device has memory left"):
        owners([[1, 1], [1, 1]], unit_topology((0, 0), memory=1.5), [0, 0])


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[list[int]], list[int], list[float], Topology, list[float]]:
    """Loads, degrees, sizes of an expert, topology, memories: from scarce to plenty."""
    world, number = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    loads = [draw(st.lists(st.integers(0, 20), min_size=1, max_size=9)) for _ in range(number)]
    degree = [draw(st.integers(0, 10)) for _ in range(number)]
    sizes = [float(draw(st.integers(1, 3))) for _ in range(number)]
    nodes = (0, *draw(st.lists(st.integers(0, 1), min_size=world - 1, max_size=world - 1)))
    flops = draw(st.lists(st.integers(1, 3), min_size=world, max_size=world))
    scale = draw(st.sampled_from([1, 4, 1000]))
    memory = [float(scale * m) for m in draw(st.lists(st.integers(1, 9), min_size=world, max_size=world))]
    return loads, degree, sizes, unit_topology(nodes, flops=[float(f) for f in flops]), memory


@given(layers())
def test_every_expert_has_one_owner_and_every_device_its_share(drawn: object) -> None:
    loads, degree, sizes, on, memory = drawn  # type: ignore[misc]
    arrays = [np.array(row) for row in loads]
    total = sum(size * len(row) for size, row in zip(sizes, loads, strict=True))
    try:
        found = heterogeneous_owners(arrays, on, degree, sizes, memory)
    except UserError:
        # Each device can waste less than one expert.
        assert total > sum(memory) - len(memory) * max(sizes)
        return
    again = heterogeneous_owners(arrays, on, degree, sizes, memory)
    owned = [0.0] * len(memory)
    for layer, owner_E in enumerate(found):
        assert owner_E.tolist() == again[layer].tolist()
        assert arrays[layer].tolist() == loads[layer]
        assert len(owner_E) == len(loads[layer])
        for owner in owner_E.tolist():
            owned[owner] += sizes[layer]  # an owner below zero or beyond the last fails in the next line or here
    assert sum(owned) == total
    for rank, taken in enumerate(owned):
        assert taken <= memory[rank]
        share = total * memory[rank] / sum(memory)
        if all(share_ + max(sizes) <= m for share_, m in ((total * m / sum(memory), m) for m in memory)):
            assert abs(taken - share) <= max(sizes), f"rank {rank} owns {taken} bytes, its share is {share}"
    if len(set(memory)) == 1 and memory[0] >= total:
        assert max(owned) - min(owned) <= max(sizes)


def test_moving_takes_as_long_as_the_busiest_port_of_each_layer() -> None:
    """Ranks 0, 1 | 2, 3; 20 bytes an expert; ports of 10 bytes/s, uplinks of 4; latencies 0.25 and 0.5.

    Layer 0: one expert leaves rank 0 for rank 1 and one for rank 2, one leaves 3 for 2: near 2 s, far 5 s, two messages 1 s.
    Layer 1: two experts leave rank 3 for rank 2, near 4 s and 0.5 s. Layer 2: nothing.
    """
    on = unit_topology((0, 0, 1, 1), near=Link(10.0, 0.25), far=Link(4.0, 0.5))
    cost = LayerCost(trainable_bytes=1.0, state_bytes=12.0, frozen_bytes=8.0)
    old = np.array([[0, 0, 3, 1], [3, 3, 0, 1], [0, 1, 2, 3]])
    new = np.array([[1, 2, 2, 1], [2, 2, 0, 1], [0, 1, 2, 3]])
    assert reshard_seconds(old, new, on, cost) == pytest.approx(6.0 + 4.5)


def two_ranks(loads: list[float], *, hidden: float = 0.0) -> PlanInput:
    """One layer of four experts, two a rank; 3 s of compute an assignment, 100 s to move an expert, nothing else takes time."""
    cost = LayerCost(trainable_bytes=1e-9, state_bytes=100.0, assignment_flops=1.0, non_moe_flops=hidden)
    on = unit_topology((0, 0), memory_bandwidth=1e30)
    return layer_input([0, 0, 1, 1], [loads, [0.0] * 4], 4, on=on, cost=cost)


def test_resharding_pays_when_the_steps_repay_the_move() -> None:
    """Loads 4 4 1 1, ranks 8 : 2. Swapping an expert for another makes it 5 : 5: 24 s become 15; it moves 100 bytes each way at once."""
    now, static = two_ranks([4, 4, 1, 1]), POLICIES["static_ep"]
    swapped = [np.array([[0, 1, 0, 1]])]
    assert reshard_pays(static, [now], swapped, 11) is None
    gain = reshard_pays(static, [now], swapped, 12)
    assert gain is not None
    assert (gain.saved, gain.moving, gain.net) == pytest.approx((9.0, 100.0, 8.0))
    assert better_owners(static, [now], 11) is None
    found = better_owners(static, [now], 12)
    assert found is not None
    assert [owner_LE.tolist() for owner_LE in found[0]] == [[[0, 1, 0, 1]]]
    assert found[1] == gain


def test_where_nothing_is_replicated_no_expert_is_set_aside() -> None:
    """Loads 5 4 3 1, all of which could travel hidden, but static_ep sends none: by load 5 1 : 4 3, not in turn 5 3 : 4 1."""
    found = better_owners(POLICIES["static_ep"], [two_ranks([5, 4, 3, 1], hidden=1.0)], 1000)
    assert found is not None
    assert found[0][0].tolist() == [[0, 1, 1, 0]]


def test_nothing_moves_before_a_load_is_known_nor_to_where_it_is() -> None:
    now = two_ranks([4, 1, 4, 1])
    unknown = PlanInput(now.owner_LE, None, now.topology, now.cost, now.slots_D)
    for static in (POLICIES["static_ep"], POLICIES["full"]):
        assert better_owners(static, [unknown], 1000) is None
        assert better_owners(static, [now], 1000) is None
        assert better_owners(static, [], 1000) is None


def test_layers_of_two_shapes_are_placed_together() -> None:
    """Two groups of one layer each, owners all on rank 0: each rank ends up with half of the bytes of both together."""
    given_ = []
    for size in (10.0, 20.0):
        one = two_ranks([4, 4, 1, 1])
        cost = LayerCost(trainable_bytes=1e-9, state_bytes=size, assignment_flops=1.0)
        given_.append(PlanInput(np.zeros((1, 4), dtype=np.int64), one.loads_LED, one.topology, cost, one.slots_D))
    found = better_owners(POLICIES["static_ep"], given_, 1000)
    assert found is not None
    owned = [sum(size * int((owner_LE == rank).sum()) for size, owner_LE in zip((10, 20), found[0], strict=True)) for rank in (0, 1)]
    assert owned == [60, 60]
