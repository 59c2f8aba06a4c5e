"""Counter-based dropout: the mask is a pure function of (key, stream, token, column).

It is therefore the same on any rank, in any order of tokens, and when a checkpointed forward pass is recomputed. The stream
distinguishes the masks that one token needs in one layer, by expert and matrix.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hecate.kernels.common.assignments import RoutedTokens

_ODD = -0x61C88647
"""2^32 over the golden ratio, as a signed word"""
_LEVELS = 1 << 16
"""an element is dropped by 16 random bits"""


@dataclass(frozen=True)
class Dropout:
    """Dropout with probability `p`, rounded to a multiple of 1/65536. `key` identifies the seed, step and layer (see `dropout_key`)."""

    p: float
    key: int

    @property
    def dropped_levels(self) -> int:
        """How many of the 65536 equally likely words of an element drop it."""
        return min(round(self.p * _LEVELS), _LEVELS - 1)

    @property
    def scale(self) -> float:
        """The factor of kept elements, which preserves the mean."""
        return _scale(self.dropped_levels)

    def rows(self, token_T: Tensor, stream: int | Tensor) -> RowDropout:
        """Return the dropout of one row for each token.

        Args:
            token_T: int64 [tokens], the global number of each token.
            stream: one stream for all rows, or int64 [tokens].
        """
        word_T = (_mix64(_mix64(token_T ^ self.key) ^ stream) | 1).to(torch.int32)
        return RowDropout(word_T, self.dropped_levels)

    def mask(self, token_T: Tensor, stream: int | Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """Return the mask, [tokens, width]: the scale where an element is kept, 0 where it is dropped."""
        rows = self.rows(token_T, stream)
        return rows.keep(width, dtype).mul_(rows.scale)


@dataclass(frozen=True)
class RowDropout:
    """The dropout of some rows, without a mask in memory: kernels compute the mask from one word per row."""

    word_R: Tensor
    """int32 [rows]: the random word of each row"""
    dropped_levels: int
    """the number of the 65536 equally likely words of an element that drop it"""

    @property
    def scale(self) -> float:
        """See `Dropout.scale`."""
        return _scale(self.dropped_levels)

    def of(self, rows: Tensor | slice) -> RowDropout:
        """Return the dropout of some of the rows."""
        return RowDropout(self.word_R[rows], self.dropped_levels)

    def keep_into(self, scratch: Tensor, out: Tensor) -> Tensor:
        """Write 1 into `out` [rows, width] where an element is kept and 0 where it is dropped.

        Args:
            scratch: a buffer from `dropout_scratch` for this or a larger `out`, which is overwritten. Allocating it on each call would
                cost more than the hash.
        """
        rows, width = out.shape
        words = (width + 1) // 2
        bits, shifted = scratch[: 2 * rows * words].view(2, rows, words)
        # The hash is a product of two odd random words and one more round, in 32 bits, which processors multiply in vectors. That costs
        # a sixth of a full hash. Each word decides two elements.
        torch.mul(self.word_R[:, None], _columns(words, self.word_R.device)[None, :], out=bits)
        torch.bitwise_right_shift(bits, 15, out=shifted)
        bits.bitwise_xor_(shifted).mul_(_ODD)
        return torch.ge(bits.view(torch.int16)[:, :width], self.dropped_levels - _LEVELS // 2, out=out)

    def keep(self, width: int, dtype: torch.dtype) -> Tensor:
        """Return the mask without scale, [rows, width]: 1 where an element is kept, 0 where it is dropped."""
        out = torch.empty((len(self.word_R), width), dtype=dtype, device=self.word_R.device)
        return self.keep_into(dropout_scratch(out), out)


@dataclass(frozen=True)
class TokenDropout:
    """The dropout of some tokens' rows in one stream, with nothing hashed yet: a kernel that drops elements hashes the rows itself."""

    dropout: Dropout
    token_T: Tensor
    """int64, the global number of each token"""
    stream: int

    def rows(self) -> RowDropout:
        return self.dropout.rows(self.token_T, self.stream)


def dropout_scratch(out: Tensor) -> Tensor:
    """Return a buffer for `RowDropout.keep_into` with this `out` or a smaller one."""
    rows, width = out.shape
    return torch.empty(rows * (width + 1), dtype=torch.int32, device=out.device)


@dataclass(frozen=True)
class FfnDropout:
    """The dropout of the two inputs of an expert's low-rank pairs, with a row for each assignment."""

    gate_up: RowDropout
    """the dropout of x, which gate and up share"""
    down: RowDropout
    """the dropout of the gated hidden state"""

    @property
    def scale(self) -> float:
        return self.down.scale


def ffn_dropout(dropout: Dropout | None, routed: RoutedTokens, order_P: Tensor) -> FfnDropout | None:
    """Return the dropout of the assignments `order_P` (int64, indices into the flattened [tokens, k]); None without dropout.

    With dropout, `routed` must have `token_T` and `expert_S`.
    """
    if dropout is None:
        return None
    assert routed.token_T is not None, "dropout needs the tokens' numbers"
    assert routed.expert_S is not None, "dropout needs the experts in the slots"
    slot_TK = routed.slot_TK
    token_P = routed.token_T[order_P // slot_TK.shape[1]]
    expert_P = routed.expert_S.to(slot_TK.device)[slot_TK.flatten()[order_P]]
    gate_up, down = (dropout.rows(token_P, dropout_stream(expert_P, projection)) for projection in ("gate_proj", "down_proj"))
    return FfnDropout(gate_up, down)


def dropout_stream(expert: int | Tensor, projection: str) -> int | Tensor:
    """Return the dropout stream of an expert's projection (see `Dropout.rows`). Gate and up have the same, because they share an input."""
    return expert * 2 + int(projection == "down_proj")


class DropoutMasks:
    """The dropout masks of one tile of assignments at a time, in buffers that are allocated once per call."""

    def __init__(self, dropout: FfnDropout | None, rows: int, gate_up: int, down: int, like: Tensor) -> None:
        """Allocate buffers of `rows` rows and of `gate_up` and `down` columns, of the type and on the device of `like`."""
        self._dropout = dropout
        if dropout is not None:
            self._gate_up, self._down = like.new_empty((rows, gate_up)), like.new_empty((rows, down))
            self._scratch = dropout_scratch(max(self._gate_up, self._down, key=Tensor.numel))

    def gate_up(self, span: slice) -> Tensor | None:
        """Return 1 where dropout keeps an element of x and 0 where it drops it; None without dropout. The next call overwrites it."""
        return None if self._dropout is None else self._mask(self._dropout.gate_up.of(span), self._gate_up)

    def down(self, span: slice) -> Tensor | None:
        """Return the mask of the gated hidden state, as `gate_up` does that of x."""
        return None if self._dropout is None else self._mask(self._dropout.down.of(span), self._down)

    def _mask(self, rows: RowDropout, out: Tensor) -> Tensor:
        return rows.keep_into(self._scratch, out[: len(rows.word_R)])


def masked(values: Tensor, mask: Tensor | None, out: Tensor) -> Tensor:
    """Return values · mask, written into `out`, or the values themselves if there is no mask."""
    return values if mask is None else torch.mul(values, mask, out=out)


@functools.lru_cache(maxsize=64)
def _columns(width: int, device: torch.device) -> Tensor:
    """Return odd random words, int32 [width], each for two columns."""
    return (_mix64(torch.arange(width, device=device) + 1) | 1).to(torch.int32)


@functools.lru_cache(maxsize=1024)
def dropout_key(*parts: int) -> int:
    """Hash the seed, the step, the layer and so on into one key, a signed word of 64 bits."""
    key = 0x2545F4914F6CDD1D
    for part in parts:
        key = _mix_word((key ^ part) & _WORD)
    return key - (_WORD + 1) if key >> 63 else key


_WORD = (1 << 64) - 1


def _mix_word(x: int) -> int:
    """`_mix64` of one unsigned word, without a tensor."""
    x = ((x ^ (x >> 30)) * -0x40A7B892E31B1A47) & _WORD
    x = ((x ^ (x >> 27)) * -0x6B2FB644ECCEEE15) & _WORD
    return x ^ (x >> 31)


def _mix64(x: Tensor) -> Tensor:
    """A bijection of 64-bit words whose output bits look independent (Stafford's mix 13), on int64 tensors, whose products wrap."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _scale(dropped_levels: int) -> float:
    return _LEVELS / (_LEVELS - dropped_levels)
