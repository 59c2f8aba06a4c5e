from __future__ import annotations

from dataclasses import replace

import pytest

from hecate.errors import UserError
from hecate.parallel.cluster.mesh import make_mesh, owners_topology, shard_size_for
from hecate.parallel.cluster.topology import Link, uniform_topology


def test_sharding_groups_are_neighbours_and_replicate_groups_cross_them() -> None:
    mesh = make_mesh(8, 2, 4)
    assert mesh.num_sharding_groups == 4
    assert mesh.sharding_groups() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert mesh.replicate_groups() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert mesh.tensor_groups() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert mesh.data_groups() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_null_is_the_world() -> None:
    mesh = make_mesh(3)
    assert mesh.sharding_groups() == [[0, 1, 2]]
    assert mesh.replicate_groups() == [[0], [1], [2]]


@pytest.mark.parametrize("size", [4, 12])
def test_a_size_that_does_not_divide_the_ranks_is_refused(size: int) -> None:
    with pytest.raises(UserError, match=f"fssdp.shard_size: must divide .* is 6, got {size}\n  give one of 1, 2, 3, 6,"):
        make_mesh(6, size)


def test_tensor_groups_must_fill_the_world() -> None:
    with pytest.raises(UserError, match=r"model\.tensor_parallel: must divide the number of ranks, which is 6, got 4"):
        make_mesh(6, tp_size=4)


def test_owners_are_decided_for_the_weakest_device_of_each_place() -> None:
    whole = uniform_topology(2, 2, flops=4.0, memory=8.0, intra_node=Link(10.0, 0.0), inter_node=Link(1.0, 0.1))
    whole = replace(whole, flops=(4.0, 3.0, 2.0, 5.0), memory=(8.0, 6.0, 9.0, 5.0))
    common = owners_topology(whole, make_mesh(4, 2))
    assert common.flops == (2.0, 3.0)
    assert common.memory == (8.0, 5.0)
    assert common.num_nodes == 1
    assert owners_topology(whole, make_mesh(4)) == whole


def test_a_run_goes_on_in_the_smallest_groups_that_hold_each_expert_often_enough() -> None:
    assert [shard_size_for(world, 2, 1) for world in (8, 7, 6, 4, 3, 2, 1)] == [2, 7, 2, 2, 3, 2, 1]
    assert [shard_size_for(world, 4, 1) for world in (16, 15, 12, 8, 6)] == [4, 5, 4, 4, 6]
    assert [shard_size_for(world, 2, 2) for world in (8, 6, 4)] == [2, 2, 4], "two groups are too few for two more copies"
    assert shard_size_for(7, None, 1) is None
