"""The decisions of the Ray controller beside who goes on: which devices to use, and what is slow."""

from __future__ import annotations

from typing import Any

import pytest

from hecate.elastic.stragglers import changed_ranks, relative_speeds, with_speeds
from hecate.errors import UserError
from hecate.launch.policy.devices import ACCELERATOR_LABEL, choose_devices, devices_of, one_machine, parse_labels
from hecate.launch.policy.work_shares import NewShares, WorkShares
from hecate.parallel.cluster.topology import Link, Topology
from hecate.parallel.cluster.topology_file import topology_text
from hecate.report.events import DenseWork


def node(name: str, *, cpus: float = 4, gpus: float = 0, address: str = "10.0.0.1", alive: bool = True, **labels: str) -> dict[str, Any]:
    resources = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
    return {"NodeID": name, "Alive": alive, "NodeManagerAddress": address, "Resources": resources, "Labels": labels}


def test_processors_are_devices_where_there_is_no_gpu() -> None:
    devices = devices_of([node("b", cpus=5), node("a", cpus=2), node("c", alive=False)], {}, cpus_per_worker=2)
    assert [device.node_id for device in devices] == ["a", "b", "b"]
    assert devices[0].resources == (("CPU", 2.0),)
    assert devices[0].kind == "CPU"


def test_only_gpus_count_where_there_are_some() -> None:
    h100 = node("h", cpus=16, gpus=8, **{ACCELERATOR_LABEL: "H100"})
    devices = devices_of([node("head", cpus=64), h100, node("l", cpus=4, gpus=2, **{ACCELERATOR_LABEL: "L4"})], {}, cpus_per_worker=4)
    assert [device.kind for device in devices] == ["H100"] * 8 + ["L4"] * 2
    assert devices[0].resources == (("CPU", 2.0), ("GPU", 1.0)), "16 processors for 8 ranks"
    assert devices[0].selector == ((ACCELERATOR_LABEL, "H100"),)


def test_labels_choose_nodes_and_what_may_replace_them() -> None:
    wanted = parse_labels(["kind=in(fast, slow)", "zone=a"])
    assert wanted == {"kind": ("fast", "slow"), "zone": ("a",)}
    nodes = [node("1", kind="slow", zone="a"), node("2", kind="fast", zone="a", disk="x"), node("3", kind="fast", zone="b"), node("4")]
    devices = devices_of(nodes, wanted, cpus_per_worker=4)
    assert [device.node_id for device in devices] == ["2", "1"]
    assert devices[0].selector == (("kind", "fast"), ("zone", "a")), "the disk may be another"


def test_too_few_devices_are_refused_with_what_there_is() -> None:
    devices = devices_of([node("a", cpus=3)], {}, cpus_per_worker=1)
    assert len(choose_devices(devices, 2, 1)) == 2
    assert len(choose_devices(devices, 9, 3)) == 3
    with pytest.raises(UserError, match=r"needs 4, the cluster has 3 that fit \(3 CPU\)"):
        choose_devices(devices, None, 4)


def test_one_machine_by_addresses() -> None:
    assert one_machine(devices_of([node("a"), node("b")], {}, 4))
    assert not one_machine(devices_of([node("a"), node("b", address="10.0.0.2")], {}, 4))
    assert one_machine(devices_of([node("a")], {}, 4), [node("a"), node("driver")])
    assert not one_machine(devices_of([node("a")], {}, 4), [node("a"), node("driver", address="10.0.0.2")])


MACHINES = Topology(
    (0, 0, 1, 2), (3e9, 3e9, 1e9, 1e9), (4.0, 3.0, 2.0, 1.0), Link(1e9, 0.0), Link(1e8, 0.0), uplink_bandwidth=(3e8, 2e8, 1e8)
)

TWO_ALIKE = Topology((0, 0), (3e9, 3e9), (4.0, 4.0), Link(1e9, 0.0), Link(1e9, 0.0))


def test_speeds_are_relative_to_the_plan_and_to_the_others() -> None:
    as_planned = {rank: DenseWork(tokens, 2.0) for rank, tokens in enumerate((600, 600, 200, 200))}
    assert relative_speeds(as_planned, MACHINES) == {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}
    one_slow = {**as_planned, 1: DenseWork(300, 2.0)}
    assert relative_speeds(one_slow, MACHINES)[1] == 0.5
    two = MACHINES.take([0, 2])
    assert relative_speeds({0: DenseWork(300, 2.0), 1: DenseWork(200, 2.0)}, two) == {0: 0.5, 1: 1.0}, "of two the faster is the measure"
    assert relative_speeds({0: DenseWork(0, 0.0)}, MACHINES) == {}


def test_a_straggler_is_one_in_every_window() -> None:
    slow, fine = {0: 0.5, 1: 1.0}, {0: 1.0, 1: 1.0}
    assert changed_ranks([slow]) == {}
    assert changed_ranks([slow, fine]) == {}
    assert changed_ranks([fine, slow, {0: 0.6, 1: 1.1}]) == {0: 0.55}
    assert changed_ranks([{0: 1.5}, {0: 1.7}]) == {0: 1.6}, "faster than planned, too"


def test_a_topology_follows_speeds_and_losses() -> None:
    assert with_speeds(MACHINES, {1: 0.5}).flops == (3e9, 1.5e9, 1e9, 1e9)
    left = MACHINES.take([1, 3])
    assert (left.node_of_rank, left.flops, left.memory, left.uplink_bandwidth) == ((0, 1), (3e9, 1e9), (3.0, 1.0), (3e8, 1e8))


def test_two_slow_windows_give_a_slow_device_fewer_sequences() -> None:
    """Devices 4 and 7 are planned alike and share 12 sequences. Device 7 shows half its speed in two windows: 8 and 4."""
    shares = WorkShares(TWO_ALIKE, [4, 7])
    assert shares.begin_generation([4, 7]) == TWO_ALIKE
    shares.generation_begun((6, 6), "")
    for step, found in ((1, {}), (2, {1: 0.5})):
        assert shares.add_report(0, step, DenseWork(600, 0.2)) == {}, "one report is missing"
        assert shares.add_report(1, step, DenseWork(600, 0.4)) == found
        assert shares.speeds == {4: 1.0, 7: 0.5}
    assert shares.share_anew({1: 0.5}) == NewShares(1, (3e9, 1.5e9), (8, 4))
    assert shares.topology == with_speeds(TWO_ALIKE, {1: 0.5})
    # With the new plan device 7 is as fast as planned.
    for step in (3, 4):
        assert shares.add_report(0, step, DenseWork(800, 0.2)) == {}
        assert shares.add_report(1, step, DenseWork(400, 0.2)) == {}


def test_groups_of_sequences_stay_whole_when_they_are_shared_anew() -> None:
    shares = WorkShares(TWO_ALIKE, [0, 1], group_size=3)
    shares.begin_generation([0, 1])
    shares.generation_begun((6, 6), "")
    assert shares.share_anew({1: 0.5}).sequences == (9, 3)


def test_windows_too_short_to_mean_anything_are_added_up() -> None:
    shares = WorkShares(TWO_ALIKE, [0, 1])
    shares.begin_generation([0, 1])
    shares.generation_begun((1, 1), "")
    for step in (1, 2):
        for rank in (0, 1):
            assert shares.add_report(rank, step, DenseWork(10, 0.06)) == {}
        assert shares.speeds == ({} if step == 1 else {0: 1.0, 1: 1.0}), "0.06 s are less than a window, 0.12 s are one"


def test_a_generation_with_fewer_devices_has_their_part_of_the_topology() -> None:
    shares = WorkShares(MACHINES, [0, 1, 2, 3])
    assert shares.begin_generation([3, 1]) == MACHINES.take([3, 1])
    assert not shares.describes([1, 4])
    assert shares.begin_generation([1, 4]) is None, "device 4 is not described: the ranks are to measure"
    shares.generation_begun((1, 1), topology_text(TWO_ALIKE))
    assert shares.describes([1, 4])
    assert shares.topology == TWO_ALIKE
