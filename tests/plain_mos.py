"""Mixture of Shards (arXiv 2410.00938) without any of this project's machinery: a pool of shards, and pairs picked from it by index_select.

It shares no code with hecate: only values are handed over, those of the pool's blocks and of the index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class PlainPool(nn.Module):
    """All shards of some projections' A and B. A block has e rows of A and e columns of B, as rows, of one projection after the other."""

    def __init__(self, blocks_NC: Tensor, vectors: Sequence[tuple[str, int, int]], per_vector: int) -> None:
        """`vectors`: name, number in a block and length of the vectors of each tensor, such as ("gate_proj.A", 2, 16)."""
        super().__init__()
        self.vectors = vectors
        self.shards: dict[str, nn.Parameter] = {}
        start = 0
        for name, number, length in vectors:
            part = blocks_NC[:, start : start + number * length]
            self.shards[name] = nn.Parameter(part.reshape(-1, length // per_vector).clone())
            start += number * length

    def pair(self, projection: str, index: Mapping[str, Tensor], rank: int) -> tuple[Tensor, Tensor]:
        """A [r, inputs] and B [outputs, r], by the numbers of their shards."""
        a, b = (self.shards[f"{projection}.{of}"].index_select(0, index[f"{projection}.{of}"]).reshape(rank, -1) for of in ("A", "B"))
        return a, b.T

    def block(self, number: int, *, grad: bool) -> Tensor | None:
        """The values of a block, or its gradient; None: the pool has none."""
        parts = []
        for name, vectors, length in self.vectors:
            shards = self.shards[name].grad if grad else self.shards[name].detach()
            if shards is None:
                return None
            parts.append(shards.reshape(-1, vectors * length)[number])
        return torch.cat(parts)
