"""Dropout from a counter: an element's fate depends on who it is, not on where or when it is computed.

The mask is a pure function of (key, stream, token, column), so it is the same on any rank, in any order of tokens, and when the
forward pass is run again for a checkpoint.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

_ODD = -0x61C88647
"""2^32 over the golden ratio, as a signed word"""


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
        row_T = (_mix64(_mix64(token_T ^ self.key) ^ stream) | 1).to(torch.int32)
        column_W = _columns(width, token_T.device)
        # A product of two odd random words and one more round, in 32 bits, which processors multiply in vectors: a sixth of a full hash.
        bits = row_T[:, None] * column_W[None, :]
        bits.bitwise_xor_(bits >> 15).mul_(_ODD)
        keep = bits >= round(self.p * 2.0**32) - 2**31
        return keep.to(dtype).mul_(1.0 / (1.0 - self.p))


@functools.lru_cache(maxsize=64)
def _columns(width: int, device: torch.device) -> Tensor:
    """int32 [width]: an odd random word for each column."""
    return (_mix64(torch.arange(width, device=device) + 1) | 1).to(torch.int32)


def dropout_key(*parts: int) -> int:
    """One key from the seed, the step, the layer, ..."""
    key = torch.tensor(0x2545F4914F6CDD1D)
    for part in parts:
        key = _mix64(key ^ part)
    return int(key)


def _mix64(x: Tensor) -> Tensor:
    """A bijection of 64-bit words whose output bits look independent (Stafford's mix 13), on int64 tensors, whose products wrap."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
