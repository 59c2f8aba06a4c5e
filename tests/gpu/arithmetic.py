"""Operators that the hot path uses with unusual types, on the GPU and on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ATTENTION = (2, 8, 64, 64)
"""batch, heads of queries, tokens, elements of a head; keys and values have a quarter of the heads"""


def figures() -> dict[str, float | str]:
    """How many operators agree with the CPU's. Raises AssertionError: one does not."""
    torch.manual_seed(0)
    for name, compute in operators().items():
        got, wanted = compute(torch.device("cuda")), compute(torch.device("cpu"))
        assert got.device.type == "cuda", name
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    return {"operators": float(len(operators()))}


def operators() -> dict[str, Callable[[torch.device], Tensor]]:
    """Name -> what it computes of fixed numbers on a device."""
    bits = torch.randint(-(2**15), 2**15, (7, 33), dtype=torch.int16)
    slots = torch.randint(0, 9, (1000,), dtype=torch.int16)
    rows, places = torch.randn(50, 8), torch.randint(0, 10, (50,))
    batch, heads, tokens, width = ATTENTION
    query = torch.randn(ATTENTION)
    key, value = (torch.randn(batch, heads // 4, tokens, width) for _ in range(2))
    packed = torch.arange(tokens)[:, None].div(16, rounding_mode="floor") == torch.arange(tokens)[None].div(16, rounding_mode="floor")
    mask = packed & torch.ones(tokens, tokens).tril().bool()

    def compared(device: torch.device) -> Tensor:
        out = torch.empty(bits.shape, dtype=torch.bfloat16, device=device)
        return torch.ge(bits.to(device), 1234, out=out)

    def attention(device: torch.device, mask: Tensor | None) -> Tensor:
        of_device = [tensor.to(device) for tensor in (query, key, value)]
        where = None if mask is None else mask.to(device)
        return F.scaled_dot_product_attention(*of_device, attn_mask=where, is_causal=mask is None, enable_gqa=True)

    return {
        "a comparison of int16 into bfloat16": compared,
        "a stable sort of int16": lambda device: torch.sort(slots.to(device), stable=True).indices,
        "searchsorted of int16": lambda device: torch.searchsorted(
            torch.sort(slots.to(device)).values, torch.arange(10, dtype=torch.int16, device=device), out_int32=True
        ),
        "sums into rows": lambda device: torch.zeros(10, 8, device=device).index_add_(0, places.to(device), rows.to(device)),
        "counts by scatter_add": lambda device: torch.zeros(10, dtype=torch.int64, device=device).scatter_add_(
            0, places.to(device), torch.ones(50, dtype=torch.int64, device=device)
        ),
        "causal attention with grouped keys": lambda device: attention(device, None),
        "attention of packed samples": lambda device: attention(device, mask),
    }
