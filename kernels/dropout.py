"""Dropout from a counter: an element's fate depends on who it is, not on where or when it is computed.

The mask is a pure function of (key, stream, token, column), so it is the same on any rank, in any order of tokens, and when the
forward pass is run again for a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Dropout:
    """Dropout with probability `p`; `key` names the seed, step and layer (see `dropout_key`)."""

    p: float
    key: int

    def mask(self, token_T: Tensor, stream: int, width: int, dtype: torch.dtype) -> Tensor:
        """[tokens, width]: 1 / (1 - p) where an element is kept, 0 where it is dropped.

        Args:
            token_T: int64 [tokens], the global number of each token.
            stream: tells apart the masks that one token needs in one layer (expert and matrix).
        """
        row_T = _mix(_mix(token_T ^ (self.key & _MASK32)) + stream * 0x9E3779B1 + (token_T >> 32))
        column = torch.arange(width, device=token_T.device) * 0x85EBCA6B
        bits = _mix(row_T[:, None] + column[None, :])
        keep = bits >= int(self.p * (_MASK32 + 1))
        return keep.to(dtype) / (1.0 - self.p)


def dropout_key(*parts: int) -> int:
    """One 32-bit key from the seed, the step, the layer, ..."""
    key = 0x2545F491
    for part in parts:
        key = int(_mix(torch.tensor((key * 31 + part) & _MASK32)))
    return key


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words whose output bits look independent (Wellons' lowbias32), on int64 tensors."""
    x = x & _MASK32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)
