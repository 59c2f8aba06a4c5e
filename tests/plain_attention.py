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


def plain_operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`aten::_flash_attention_forward` [T, H, E], whose other results are nothing."""
    assert window_size_right == 0, "not causal"
    assert is_causal == (window_size_left == -1), "the kernel ignores a window where it is told to be causal"
    assert torch.equal(cum_seq_q, cum_seq_k)
    assert max_q == max_k
    assert (dropout_p, return_debug_mask) == (0.0, False)
    out = _over_samples(query, key, value, cum_seq_q, max_q, scale, window_size_left, 0.0)
    return out, query.new_zeros(query.shape[1], len(query)), query.new_zeros(2), query.new_zeros(0), query.new_zeros(0)


def plain_operators_gradients(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, *given: Any, **named: Any
) -> tuple[Tensor, ...]:
    """`aten::_flash_attention_backward`: the gradients of query, key and value."""
    bounds, _, longest, _, _, is_causal, *_ = given
    scale, repeats = named["scale"], query.shape[1] // key.shape[1]
    query_HTE, grad_HTE = query.transpose(0, 1), grad_out.transpose(0, 1)
    key_HTE, value_HTE = (x.transpose(0, 1).repeat_interleave(repeats, 0) for x in (key, value))
    mask = _within_samples(len(query), bounds, longest, -1 if is_causal else named["window_size_left"])
    weights = (query_HTE @ key_HTE.mT * scale).masked_fill(~mask, float("-inf")).softmax(-1)
    of_weights = grad_HTE @ value_HTE.mT
    of_scores = scale * weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
    of_query, of_key, of_value = of_scores @ key_HTE, of_scores.mT @ query_HTE, weights.mT @ grad_HTE
    shared_key, shared_value = (x.unflatten(0, (-1, repeats)).sum(1).transpose(0, 1) for x in (of_key, of_value))
    return of_query.transpose(0, 1), shared_key, shared_value


def _over_samples(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float, before: int, softcap: float
) -> Tensor:
    """Args: before: a query attends to this many positions before its own; -1: to all."""
    assert bounds.dtype == torch.int32
    assert query.shape[-1] == key.shape[-1] == value.shape[-1], "kernels take one width"
    assert query.stride(-1) == 1
    mask = _within_samples(len(query), bounds, longest, before)
    scores = _scores(query.transpose(0, 1)[None], key.transpose(0, 1)[None], scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return _weighed(scores, mask, value.transpose(0, 1)[None])[0].transpose(0, 1)


def _within_samples(tokens: int, bounds: Tensor, longest: int, before: int) -> Tensor:
    """bool [T, T]: the tokens that each attends to."""
    at = torch.arange(tokens, device=bounds.device)
    sample = torch.searchsorted(bounds, at, right=True)
    distance = at[:, None] - at
    # Of a sample longer than is said the kernel would not compute the rest.
    mask = (sample[:, None] == sample) & (distance >= 0) & (at - bounds.long()[sample - 1] < longest)[:, None]
    return mask & (distance <= before) if before >= 0 else mask


def _scores(query_BHSE: Tensor, key_BGSE: Tensor, scale: float) -> Tensor:
    repeats = query_BHSE.shape[1] // key_BGSE.shape[1]
    return query_BHSE @ key_BGSE.repeat_interleave(repeats, 1).transpose(2, 3) * scale


def _weighed(scores_BHSS: Tensor, mask: Tensor, value_BGSE: Tensor) -> Tensor:
    weights = scores_BHSS.masked_fill(~mask, float("-inf")).softmax(-1).to(value_BGSE.dtype)
    return weights @ value_BGSE.repeat_interleave(scores_BHSS.shape[1] // value_BGSE.shape[1], 1)
