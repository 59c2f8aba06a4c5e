"""What NCCL takes of a GPU, by the groups that a run has."""

from __future__ import annotations

import pytest

from hecate.parallel.cluster.gpu_memory import COMMUNICATOR_BYTES, EXCHANGE_BYTES, nccl_bytes
from hecate.parallel.cluster.mesh import Mesh

GROUP, PEER = COMMUNICATOR_BYTES, EXCHANGE_BYTES


def test_each_group_of_several_ranks_takes_its_share() -> None:
    assert 0.5e9 <= GROUP <= 0.7e9, "what is reported from machines"
    assert 2.5e9 <= 7 * PEER <= 3.5e9, "what is reported for eight H100"
    assert nccl_bytes(Mesh(1, 1), [0], sharded_layers=True).tolist() == pytest.approx([0])
    assert nccl_bytes(Mesh(2, 2), [0, 0], sharded_layers=False).tolist() == pytest.approx([2 * GROUP + 2 * PEER] * 2)
    assert nccl_bytes(Mesh(2, 2), [0, 0], sharded_layers=True).tolist() == pytest.approx([3 * GROUP + 2 * PEER] * 2)
    two_nodes = nccl_bytes(Mesh(3, 3), [0, 1, 0], sharded_layers=False).tolist()
    assert two_nodes == pytest.approx([2 * GROUP + 2 * PEER, 2 * GROUP, 2 * GROUP + 2 * PEER])


def test_several_sharding_groups_and_tensor_groups_have_groups_of_their_own() -> None:
    one_node = [0] * 4
    replicated = nccl_bytes(Mesh(4, 2), one_node, sharded_layers=False).tolist()  # with groups to replicate, and of everyone
    assert replicated == pytest.approx([4 * GROUP + 2 * PEER] * 4)
    assert nccl_bytes(Mesh(4, 1), one_node, sharded_layers=True).tolist() == pytest.approx([2 * GROUP] * 4)
    assert nccl_bytes(Mesh(4, 4, tp_size=2), one_node, sharded_layers=False).tolist() == pytest.approx([4 * GROUP + 6 * PEER] * 4)
    assert nccl_bytes(Mesh(4, 4, tp_size=4), one_node, sharded_layers=False).tolist() == pytest.approx([3 * GROUP + 6 * PEER] * 4)
