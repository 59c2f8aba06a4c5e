"""What flex and flash attention must compute, in plain torch, behind the interfaces of their kernels; on any device and in any type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Shapes: B rows, S positions, H heads of queries, G heads of keys and values, E their width; T tokens of all samples


def plain_flex(
    query_BHSE: Tensor, key_BGSE: Tensor, value_BGSE: Tensor, *, score_mod: Any, block_mask: Any, scale: float, enable_gqa: bool
) -> Tensor:
    """`flex_attention` of torch, which reads the tables of the block mask as its compiled kernel does."""
    assert enable_gqa == (query_BHSE.shape[1] != key_BGSE.shape[1])
    rows, length, device = query_BHSE.shape[0], query_BHSE.shape[2], query_BHSE.device
    row = torch.arange(rows, device=device)[:, None, None]
    position = torch.arange(length, device=device)
    mask = dense_of_blocks(block_mask, rows)[:, :length, :length]
    scores = _scores(query_BHSE, key_BGSE, scale)
    if score_mod is not None:
        scores = score_mod(scores, row[..., None], 0, position[:, None], position)
    return _weighed(scores, mask[:, None], value_BGSE)


def dense_of_blocks(block_mask: Any, rows: int) -> Tensor:
    """bool [B, S', S'], S' in whole blocks: what the tables and the function of a block mask allow."""
    block = block_mask.BLOCK_SIZE[0]
    partly = _chosen(block_mask.kv_num_blocks, block_mask.kv_indices)
    wholly = _chosen(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    assert partly.dim() == 3
    length = block_mask.seq_lengths[0]
    position = torch.arange(partly.shape[1] * block, device=partly.device).clamp(max=length - 1)
    row = torch.arange(rows, device=partly.device)[:, None, None]
    allowed = block_mask.mask_mod(row, 0, position[:, None], position)
    spread = [blocks.repeat_interleave(block, 1).repeat_interleave(block, 2) for blocks in (partly, wholly)]
    return (spread[0] & allowed) | spread[1]


def _chosen(counts_B1Q: Tensor, order_B1QK: Tensor) -> Tensor:
    """bool [B, Q, K]: the blocks that a table names."""
    named = torch.arange(order_B1QK.shape[-1], device=order_B1QK.device) < counts_B1Q[..., None]
    return torch.zeros_like(order_B1QK).scatter(-1, order_B1QK.long(), named.to(order_B1QK.dtype))[:, 0].bool()


def plain_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    deterministic: bool,
) -> Tensor:
    """`flash_attn_varlen_func` of the package flash-attn, [T, H, E]."""
    assert causal
    assert cu_seqlens_q is cu_seqlens_k
    assert max_seqlen_q == max_seqlen_k
    return _over_samples(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, window_size[0], softcap)


def plain_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn`, [T, H, E]."""
    assert window_size[1] == 0, "not causal"
    assert cu_seq_q is cu_seq_k
    assert max_q == max_k
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return _over_samples(query, key, value, cu_seq_q, max_q, scale, window_size[0], 0.0)


def _over_samples(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float, before: int, softcap: float
) -> Tensor:
    """Args: before: a query attends to this many positions before its own; -1: to all."""
    assert bounds.dtype == torch.int32
    assert query.shape[-1] == key.shape[-1] == value.shape[-1], "kernels take one width"
    assert query.stride(-1) == 1
    at = torch.arange(len(query), device=query.device)
    sample = torch.searchsorted(bounds, at, right=True)
    distance = at[:, None] - at
    # Of a sample longer than is said the kernel would not compute the rest.
    mask = (sample[:, None] == sample) & (distance >= 0) & (at - bounds.long()[sample - 1] < longest)[:, None]
    if before >= 0:
        mask = mask & (distance <= before)
    scores = _scores(query.transpose(0, 1)[None], key.transpose(0, 1)[None], scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return _weighed(scores, mask, value.transpose(0, 1)[None])[0].transpose(0, 1)


def _scores(query_BHSE: Tensor, key_BGSE: Tensor, scale: float) -> Tensor:
    repeats = query_BHSE.shape[1] // key_BGSE.shape[1]
    return query_BHSE @ key_BGSE.repeat_interleave(repeats, 1).transpose(2, 3) * scale


def _weighed(scores_BHSS: Tensor, mask: Tensor, value_BGSE: Tensor) -> Tensor:
    weights = scores_BHSS.masked_fill(~mask, float("-inf")).softmax(-1).to(value_BGSE.dtype)
    return weights @ value_BGSE.repeat_interleave(scores_BHSS.shape[1] // value_BGSE.shape[1], 1)
