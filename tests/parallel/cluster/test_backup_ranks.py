"""Which ranks hold the backups of a rank's experts (`hecate.parallel.cluster.backup_ranks`)."""

from __future__ import annotations

import numpy as np
import pytest

from hecate.parallel.cluster.backup_ranks import backup_ranks
from hecate.parallel.cluster.topology import CPU_DEVICE, uniform_topology


def test_backups_are_on_other_nodes_and_shared_out_evenly() -> None:
    three_nodes = uniform_topology(3, 2, **CPU_DEVICE)
    backup_rank_DB = backup_ranks(three_nodes, 2)
    node_D = np.array(three_nodes.node_of_rank)
    for rank, own in enumerate(backup_rank_DB):
        assert len({node_D[rank], *node_D[own]}) == 3, "all three copies are on nodes of their own"
    assert np.bincount(backup_rank_DB.ravel()).tolist() == [2] * 6
    assert (backup_rank_DB[:, :1] == backup_ranks(three_nodes, 1)).all(), "one more backup does not move the first"


def test_where_there_are_fewer_nodes_a_node_holds_several() -> None:
    two_nodes = uniform_topology(2, 2, **CPU_DEVICE)
    assert [sorted(own) for own in backup_ranks(two_nodes, 2).tolist()] == [[2, 3], [2, 3], [0, 1], [0, 1]]
    one_node = uniform_topology(1, 3, **CPU_DEVICE)
    assert backup_ranks(one_node, 1).tolist() == [[1], [2], [0]]
    assert backup_ranks(one_node, 2).tolist() == [[1, 2], [2, 0], [0, 1]]


def test_backups_are_in_other_tensor_groups() -> None:
    six = uniform_topology(1, 6, **CPU_DEVICE)
    for rank, own in enumerate(backup_ranks(six, 2, 2).tolist()):
        assert len({rank // 2, *(one // 2 for one in own)}) == 3, "all three copies are in groups of their own"
    assert np.bincount(backup_ranks(six, 1, 3).ravel()).tolist() == [1] * 6
    assert backup_ranks(six, 2, 3).shape == (6, 1), "there is one other group"


@pytest.mark.parametrize(("world", "columns"), [(1, 0), (2, 1), (3, 2)])
def test_there_are_no_more_backups_than_other_ranks(world: int, columns: int) -> None:
    assert backup_ranks(uniform_topology(1, world, **CPU_DEVICE), 2).shape == (world, columns)
