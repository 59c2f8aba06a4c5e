"""The addresses of the weights of a layer's slots for grouped kernels: one tensor with a stride, or separate tensors in memory.

Shapes: S slots, N rows and K columns of a slot's matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hecate.kernels.common.kernel_launch import addresses_of, begins_aligned


@dataclass(frozen=True)
class SlotWeights:
    """A matrix [N, K] per slot, with contiguous rows. Slot s starts s · `stride` elements after the start of `base`, or `offset_S[s]`."""

    base: Tensor
    rows: int
    columns: int
    row_stride: int
    stride: int
    offset_S: Tensor | None = None
    """int64 [S] on the device: where each slot's matrix begins; None: by `stride`"""
    aligned: bool = True
    """whether all of `offset_S` are multiples of 16 bytes"""
    others: tuple[Tensor, ...] = ()
    """the tensors that `offset_S` points to, which must live as long as this record"""

    @property
    def takes_descriptors(self) -> bool:
        """Whether TMA can address every slot's matrix."""
        itemsize = self.base.element_size()
        strides = (self.row_stride, self.stride) if self.offset_S is None else (self.row_stride,)
        return self.aligned and begins_aligned(self.base) and all(stride * itemsize % 16 == 0 for stride in strides)


def stacked_weights(matrices_SNK: Tensor) -> SlotWeights:
    """Return the addresses in one tensor, [S, N, K], or in a view of it, whose last stride is 1."""
    assert matrices_SNK.stride(2) == 1 or matrices_SNK.shape[2] == 1, matrices_SNK.stride()
    _, rows, columns = matrices_SNK.shape
    return SlotWeights(matrices_SNK, rows, columns, matrices_SNK.stride(1), matrices_SNK.stride(0))


def separate_weights(matrix_S: Sequence[Tensor]) -> SlotWeights:
    """Return the addresses of one contiguous matrix [N, K] per slot, all of one type and shape, anywhere in the device's memory.

    The table of addresses is sent to the device without waiting for it, and kept for the next call with matrices equally far apart. There
    is a table even for one matrix, since whether there is one is compiled into the kernel.
    """
    base = matrix_S[0]
    rows, columns = base.shape
    for matrix in matrix_S:
        assert (matrix.shape, matrix.dtype, matrix.device) == (base.shape, base.dtype, base.device)
        assert matrix.is_contiguous()
    addresses = addresses_of(matrix_S)
    if addresses is None:
        return SlotWeights(base, rows, columns, columns, 0, base.new_empty(len(matrix_S), dtype=torch.int64), others=tuple(matrix_S))
    places = tuple((address - addresses[0]) // base.element_size() for address in addresses)
    aligned = all(place * base.element_size() % 16 == 0 for place in places)
    return SlotWeights(base, rows, columns, columns, 0, _table(places, base.device), aligned, tuple(matrix_S))


@functools.lru_cache(maxsize=1024)
def _table(places: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(places, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
