"""What a GPU's memory holds beside the bytes of tensors: the CUDA context, and what torch's allocator rounds up."""

from __future__ import annotations

import numpy as np

CONTEXT_BYTES = 512 * 2**20
"""
the bytes that a process takes of a GPU before its first tensor: the driver's state and the machine code of the kernels in use.
Reports from machines: 120 to 550 MB by the kind of GPU (llama.cpp, pull request 20595), about 300 MB with torch and CUDA 11.7 or later,
which load only the kernels that run (PyTorch, issue 107667).
"""
_BLOCK = 512
"""The bytes of which each tensor takes a whole multiple: `kMinBlockSize` of torch's CUDACachingAllocator."""
_SMALL_PAGE, _LARGE_PAGE = 2 * 2**20, 20 * 2**20
"""The bytes that the allocator takes from the driver at a time for tensors of up to 1 MiB, and for larger ones, in expandable segments
(`kSmallBuffer`, `kLargeBuffer`)."""


def rounding_bytes(tensors_D: np.ndarray) -> np.ndarray:
    """Return the most bytes that the allocator holds beyond those of tensors, float64 [ranks], if its segments are expandable.

    Each tensor fills its last block in part, and the last page of each of the two sizes is filled in part. Gaps between tensors of
    different lifetimes are not counted.

    Args:
        tensors_D: the number of tensors of each rank.
    """
    return np.asarray(_BLOCK * tensors_D + _SMALL_PAGE + _LARGE_PAGE, dtype=np.float64)
