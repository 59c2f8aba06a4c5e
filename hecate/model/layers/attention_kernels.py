"""Causal attention over the rows of a forward pass in three ways: torch's fused attention, flex attention, flash attention.

All three keep the samples of packed rows apart and know sliding windows. They compute the same values within rounding. No function of
this file makes the host wait for a GPU.
"""

# Shapes: B rows, S positions, H heads of queries, G heads of keys and values, E their width; T = B·S
from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hecate.data.batches import PackedSamples

HALF = (torch.bfloat16, torch.float16)
"""The types in which flash attention computes."""
FLEX_BLOCK = 128
"""The number of positions of queries, and of keys, that flex attention computes or leaves out as a block."""

MaskMod = Callable[[Any, Any, Tensor, Tensor], Tensor]
"""Returns whether a query attends to a key, from the row, the head, the position of the query and that of the key."""


@dataclass(frozen=True)
class Scores:
    """What a layer does with the products of queries and keys."""

    scale: float
    window: int | None = None
    """The number of positions, its own included, that a token attends to; None: all before it."""
    softcap: float | None = None
    """The c of a soft cap, by which scores become c · tanh(score / c), as in Gemma 2; None: there is none."""


class AttentionRows:
    """The rows of one forward pass, as attention sees them. Masks are made when the first layer asks, and kept for the others.

    Args:
        samples: of packed rows; None: each row has one sample, and padding comes behind it, where causal attention does not look.
    """

    def __init__(self, samples: PackedSamples | None, rows: int, length: int, device: torch.device) -> None:
        self._samples, self._rows, self._length, self._device = samples, rows, length, device
        self._dense: dict[int | None, Tensor | None] = {}
        self._blocks: dict[int | None, Any] = {}

    @cached_property
    def bounds(self) -> Tensor:
        """int32 [M + 1]: where in [B·S] each of the M samples begins, and B·S. A row of one sample counts with its padding."""
        if self._samples is not None:
            return self._samples.bounds
        return torch.arange(0, self._rows * self._length + 1, self._length, dtype=torch.int32, device=self._device)

    @property
    def longest(self) -> int:
        """The most positions from one bound to the next."""
        return self._length if self._samples is None else self._samples.longest

    def dense_mask(self, window: int | None) -> Tensor | None:
        """bool [B or 1, 1, S, S], true where a query attends to a key; None: to every key that is not behind it."""
        if self._samples is None and (window is None or window >= self._length):
            return None
        if window not in self._dense:
            row = torch.arange(self._rows, device=self._device)[:, None, None]
            position = torch.arange(self._length, device=self._device)
            mask = self._mask_mod(window)(row, 0, position[:, None], position)
            self._dense[window] = mask.view(-1, 1, self._length, self._length)
        return self._dense[window]

    def block_mask(self, window: int | None) -> Any:
        """The `BlockMask` of flex attention. Its tables come from the samples at the ends of blocks, without a mask of [S, S]."""
        if window not in self._blocks:
            self._blocks[window] = self._block_mask(window)
        return self._blocks[window]

    @cached_property
    def _documents(self) -> Tensor | None:
        """[B, S]: the samples' numbers, which never fall along a row: padding has the largest."""
        if self._samples is None:
            return None
        ids = self._samples.segment_ids
        return torch.where(ids > 0, ids, self._length + 1)

    def _block_mask(self, window: int | None) -> Any:
        from torch.nn.attention.flex_attention import BlockMask

        first = torch.arange(0, self._length, FLEX_BLOCK, device=self._device)
        last = (first + FLEX_BLOCK - 1).clamp(max=self._length - 1)
        some = last[:, None] >= first
        whole = (first[:, None] >= last) & (last - first == FLEX_BLOCK - 1)[:, None]
        if window is not None:
            some, whole = some & (first[:, None] - last < window), whole & (last[:, None] - first < window)
        some, whole = some[None], whole[None]
        if self._documents is not None:
            begin, end = self._documents[:, first], self._documents[:, last]
            some = some & (end[:, None, :] >= begin[:, :, None])
            whole = whole & (begin[:, None, :] == end[:, :, None])
        tables = (*_ordered(some & ~whole), *_ordered(whole))
        return BlockMask.from_kv_blocks(
            *tables, BLOCK_SIZE=FLEX_BLOCK, mask_mod=self._mask_mod(window), seq_lengths=(self._length, self._length)
        )

    def _mask_mod(self, window: int | None) -> MaskMod:
        # A function for each case, because the kernel is compiled for what the function reads.
        if self._documents is None:
            return _causal if window is None else lambda b, h, q, k: (q >= k) & (q - k < window)
        documents = self._documents
        if window is None:
            return lambda b, h, q, k: (q >= k) & (documents[b, q] == documents[b, k])
        return lambda b, h, q, k: (q >= k) & (q - k < window) & (documents[b, q] == documents[b, k])


def _causal(b: Any, h: Any, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def _ordered(blocks_BQK: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, int32 [B, 1, Q], and which, these first, int32 [B, 1, Q, K]."""
    chosen = blocks_BQK[:, None].to(torch.int32)
    return chosen.sum(-1, dtype=torch.int32), chosen.argsort(dim=-1, descending=True, stable=True).to(torch.int32)


def sdpa(query_BHSE: Tensor, key_BGSE: Tensor, value_BGSE: Tensor, rows: AttentionRows, scores: Scores) -> Tensor:
    """torch's fused attention, [B, H, S, E]: without a mask where each row has one sample, else with a dense one of [B, S, S]."""
    assert scores.softcap is None, "torch's fused attention has no soft cap"
    return fused_attention(query_BHSE, key_BGSE, value_BGSE, rows.dense_mask(scores.window), scores.scale)


def fused_attention(query_BHSE: Tensor, key_BGSE: Tensor, value_BGSE: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """torch's scaled_dot_product_attention, [B, H, S, E], by a fused kernel also where heads of queries share one of keys.

    Args:
        mask: bool, [B or 1, 1, S, S], true where a query attends to a key; None: to every key that is not behind it.
        scale: of the scores; None: 1 / sqrt(E).
    """
    repeats = query_BHSE.shape[1] // key_BGSE.shape[1]
    if repeats > 1 and not takes_fewer_keys(query_BHSE.device.type, query_BHSE.dtype, masked=mask is not None):
        key_BGSE, value_BGSE = (x.repeat_interleave(repeats, dim=1) for x in (key_BGSE, value_BGSE))
        repeats = 1
    return F.scaled_dot_product_attention(
        query_BHSE, key_BGSE, value_BGSE, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=repeats > 1
    )


def takes_fewer_keys(device: str, dtype: torch.dtype, *, masked: bool) -> bool:
    """Whether torch has a fused kernel for fewer heads of keys than of queries.

    On a GPU flash attention has one; it takes 16-bit types, and no mask. For all else torch would multiply the scores out, [B, H, S, S] in
    memory several times.
    """
    return device != "cuda" or (dtype in HALF and not masked)


def flex(query_BHSE: Tensor, key_BGSE: Tensor, value_BGSE: Tensor, rows: AttentionRows, scores: Scores) -> Tensor:
    """Flex attention, [B, H, S, E]: of [S, S] it computes the blocks in which some query attends to some key."""
    cap = scores.softcap
    capped = None if cap is None else lambda score, b, h, q, k: cap * torch.tanh(score / cap)
    return flex_kernel(query_BHSE.shape[2])(
        query_BHSE,
        key_BGSE,
        value_BGSE,
        score_mod=capped,
        block_mask=rows.block_mask(scores.window),
        scale=scores.scale,
        enable_gqa=query_BHSE.shape[1] != key_BGSE.shape[1],
    )


def flex_kernel(length: int) -> Callable[..., Tensor]:
    """torch's `flex_attention` for rows of this length. It is compiled when it is called with shapes that are new to it, but for rows
    shorter than a block, which no training has: with such rows `LanguageModelHead` looks at a model.
    """
    return _flex_uncompiled if length < FLEX_BLOCK else _compiled_flex()


def _flex_uncompiled(*given: Any, **named: Any) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        return flex_attention(*given, **named)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flash(query_BHSE: Tensor, key_BGSE: Tensor, value_BGSE: Tensor, rows: AttentionRows, scores: Scores) -> Tensor:
    """Flash attention over the samples of all rows, laid end to end, [B, H, S, E]."""
    kernel = flash_kernel()
    assert kernel is not None, "no flash attention is installed"
    width, narrower = value_BGSE.shape[-1], query_BHSE.shape[-1] - value_BGSE.shape[-1]
    if narrower:  # as in DeepSeek's models; the kernels take one width
        value_BGSE = F.pad(value_BGSE, (0, narrower))
    query_THE, key_TGE, value_TGE = (x.transpose(1, 2).flatten(0, 1) for x in (query_BHSE, key_BGSE, value_BGSE))
    out_THE = kernel.compute(query_THE, key_TGE, value_TGE, rows.bounds, rows.longest, scores)
    return out_THE.view(query_BHSE.shape[0], -1, *out_THE.shape[1:]).transpose(1, 2)[..., :width]


@dataclass(frozen=True)
class FlashKernel:
    """Flash attention over samples of many lengths that lie end to end."""

    compute: Callable[[Tensor, Tensor, Tensor, Tensor, int, Scores], Tensor]
    """Computes (query [T, H, E], key and value [T, G, E], bounds and longest as in `AttentionRows`, scores) -> [T, H, E]."""
    has_softcap: bool


@cache
def flash_kernel() -> FlashKernel | None:
    """Flash attention of the package flash-attn, or of torch itself; None: the package is not installed, and torch was built without."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return torchs_flash() if torch.backends.cuda.is_flash_attention_available() else None
    return package_flash(flash_attn_varlen_func)


def package_flash(function: Callable[..., Tensor]) -> FlashKernel:
    """The kernel by flash-attn's `flash_attn_varlen_func`. Its backward pass is deterministic where torch is told to be."""

    def compute(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scores: Scores) -> Tensor:
        return function(
            query,
            key,
            value,
            bounds,
            bounds,
            longest,
            longest,
            softmax_scale=scores.scale,
            causal=True,
            window_size=(-1, -1) if scores.window is None else (scores.window - 1, 0),
            softcap=scores.softcap or 0.0,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )

    return FlashKernel(compute, has_softcap=True)


def torchs_flash() -> FlashKernel:
    """The kernel by torch's `varlen_attn`, or by the operator below it where `varlen_attn` lacks something, as in torch 2.10 and 2.11."""
    from torch.nn.attention.varlen import varlen_attn

    if not {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters):
        return FlashKernel(_by_operator, has_softcap=False)
    function: Callable[..., Any] = varlen_attn

    def compute(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scores: Scores) -> Tensor:
        assert scores.softcap is None, "torch's flash attention has no soft cap"
        return function(
            query,
            key,
            value,
            bounds,
            bounds,
            longest,
            longest,
            scale=scores.scale,
            window_size=(-1, 0) if scores.window is None else (scores.window - 1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )

    return FlashKernel(compute, has_softcap=False)


def _by_operator(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scores: Scores) -> Tensor:
    """As `FlashKernel.compute`. The operator is not told which heads of queries share a head of keys: it sees it by their number."""
    assert scores.softcap is None, "torch's flash attention has no soft cap"
    no_dropout, causal, with_mask = 0.0, scores.window is None, False
    before, after = -1 if scores.window is None else scores.window - 1, 0
    found = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        no_dropout,
        causal,
        with_mask,
        scale=scores.scale,
        window_size_left=before,
        window_size_right=after,
    )
    out: Tensor = found[0]
    return out
