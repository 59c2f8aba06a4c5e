"""What a GPU's memory holds beside the bytes of tensors: the CUDA context, NCCL's buffers, and what torch's allocator rounds up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hecate.parallel.cluster.mesh import Mesh

CONTEXT_BYTES = 512 * 2**20
"""
the bytes that a process takes of a GPU before its first tensor: the driver's state and the machine code of the kernels in use.
Reports from machines: 120 to 550 MB by the kind of GPU (llama.cpp, pull request 20595), about 300 MB with torch and CUDA 11.7 or later,
which load only the kernels that run (PyTorch, issue 107667).
"""
COMMUNICATOR_BYTES = 0.6e9
"""The bytes that NCCL takes of each GPU for a group of several ranks. Reported are 0.5 to 0.7 GB (NCCL, issue 964)."""
EXCHANGE_BYTES = 3e9 / 7
"""The bytes that NCCL takes besides for each other rank on the same node, in a group with all-to-alls. Reported are 3 GB for eight H100
(NCCL, issue 1685). What ranks on other nodes take is not known, and not counted."""
_BLOCK = 512
"""The bytes of which each tensor takes a whole multiple: `kMinBlockSize` of torch's CUDACachingAllocator."""
_SMALL_PAGE, _LARGE_PAGE = 2 * 2**20, 20 * 2**20
"""The bytes that the allocator takes from the driver at a time for tensors of up to 1 MiB, and for larger ones, in expandable segments
(`kSmallBuffer`, `kLargeBuffer`)."""


def nccl_bytes(mesh: Mesh, node_of_rank: Sequence[int], *, sharded_layers: bool) -> np.ndarray:
    """Return an estimate of what NCCL's groups take of each rank's GPU, float64 [ranks] (`hecate.ranks.groups`).

    Args:
        node_of_rank: the number of each rank's node.
        sharded_layers: `model.shard_non_experts`, for which the sharding group exists once more.
    """
    groups = mesh.sharding_groups() * (3 if sharded_layers else 2)  # for experts, for tokens, and for weights
    if mesh.num_sharding_groups > 1:
        groups += [*mesh.replicate_groups(), list(range(mesh.world_size))]
    if mesh.tp_size > 1:
        groups += [*mesh.tensor_groups(), *mesh.data_groups()]
    total_D = np.zeros(mesh.world_size)
    for ranks in groups:
        if len(ranks) > 1:
            total_D[ranks] += COMMUNICATOR_BYTES
    node_D = np.asarray(node_of_rank)
    for ranks in mesh.sharding_groups() * 2:
        total_D[ranks] += EXCHANGE_BYTES * ((node_D[ranks][:, None] == node_D[ranks]).sum(1) - 1)
    return total_D


def rounding_bytes(tensors_D: np.ndarray) -> np.ndarray:
    """Return the most bytes that the allocator holds beyond those of tensors, float64 [ranks], if its segments are expandable.

    Each tensor fills its last block in part, and the last page of each of the two sizes is filled in part. Gaps between tensors of
    different lifetimes are not counted.

    Args:
        tensors_D: the number of tensors of each rank.
    """
    return np.asarray(_BLOCK * tensors_D + _SMALL_PAGE + _LARGE_PAGE, dtype=np.float64)
