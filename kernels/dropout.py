"""Dropout from a counter: an element's fate depends on who it is, not on where or when it is computed.

The mask is a pure function of (key, stream, token, column), so it is the same on any rank, in any order of tokens, and when the
forward pass is run again for a checkpoint. Streams tell apart the masks that one token needs in one layer (expert and matrix).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

_ODD = -0x61C88647
"""2^32 over the golden ratio, as a signed word"""
_LEVELS = 1 << 16
"""an element is dropped by 16 random bits"""


@dataclass(frozen=True)
class Dropout:
    """Dropout with probability `p` (to the next 65536th); `key` names the seed, step and layer (see `dropout_key`)."""

    p: float
    key: int

    @property
    def dropped_levels(self) -> int:
        """Of 65536 equally likely words of an element, those that drop it."""
        return min(round(self.p * _LEVELS), _LEVELS - 1)

    @property
    def scale(self) -> float:
        """What kept elements are multiplied by, so that the mean stays."""
        return _LEVELS / (_LEVELS - self.dropped_levels)

    def rows(self, token_T: Tensor, stream: int | Tensor) -> Tensor:
        """int32 [tokens]: what `keep_into` needs to know of each row.

        Args:
            token_T: int64 [tokens], the global number of each token.
            stream: of all rows, or int64 [tokens].
        """
        return (_mix64(_mix64(token_T ^ self.key) ^ stream) | 1).to(torch.int32)

    def keep_into(self, row_T: Tensor, scratch: Tensor, out: Tensor) -> Tensor:
        """Writes 1 into `out` [tokens, width] where an element is kept and 0 where it is dropped.

        Args:
            scratch: from `scratch(out)` or of a larger `out`; its contents are lost. Fresh memory would cost more than the hash.
        """
        rows, width = out.shape
        words = (width + 1) // 2
        bits, shifted = scratch[: 2 * rows * words].view(2, rows, words)
        # A product of two odd random words and one more round, in 32 bits, which processors multiply in vectors: a sixth of a full
        # hash. Each word decides two elements.
        torch.mul(row_T[:, None], _columns(words, row_T.device)[None, :], out=bits)
        torch.bitwise_right_shift(bits, 15, out=shifted)
        bits.bitwise_xor_(shifted).mul_(_ODD)
        return torch.ge(bits.view(torch.int16)[:, :width], self.dropped_levels - _LEVELS // 2, out=out)

    @staticmethod
    def scratch(out: Tensor) -> Tensor:
        """A buffer for `keep_into` with this `out` or a smaller one."""
        rows, width = out.shape
        return torch.empty(rows * (width + 1), dtype=torch.int32, device=out.device)

    def mask(self, token_T: Tensor, stream: int | Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """[tokens, width]: `scale` where an element is kept, 0 where it is dropped."""
        out = torch.empty((len(token_T), width), dtype=dtype, device=token_T.device)
        return self.keep_into(self.rows(token_T, stream), self.scratch(out), out).mul_(self.scale)


@functools.lru_cache(maxsize=64)
def _columns(width: int, device: torch.device) -> Tensor:
    """int32 [width]: odd random words, each for two columns."""
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
