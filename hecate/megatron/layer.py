"""What stands in a Megatron layer in the place of its own: our experts, torch's attention and norms, rotary embeddings of any device.

Shapes: S positions, B sequences, N heads, G key-value heads, H of a head, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from hecate.parallel.units import Unit


class MoeMlp(MegatronModule):
    """A transformer layer's `mlp`. It calls the MoE layer of its unit: hecate's (`hecate.experts.layer.MoeLayer`) or Megatron's own.

    A ModuleSpec builds it with the parameters `layers` and `sequences_first`. It takes its MoE layer when Megatron says which transformer
    layer it is in.
    """

    def __init__(self, config: Any, *, layers: Mapping[Unit, nn.Module], sequences_first: bool, submodules: Any = None, **_: Any) -> None:
        """Args:
        layers: the MoE layers by their units.
        sequences_first: they map [B, S, D] to [B, S, D], and tokens are numbered in that order; False: as Megatron's own, they map
            [S, B, D] to an output like it and a bias, which is None.
        """
        super().__init__(config=config)
        self._layers = layers
        self._sequences_first = sequences_first

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron counts from 1."""
        self.moe = self._layers[Unit(layer_number - 1)]

    def forward(self, hidden_SBD: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """The experts' output, [S, B, D], and no bias."""
        if self._sequences_first:
            return self.moe(hidden_SBD.transpose(0, 1)).transpose(0, 1), None
        return self.moe(hidden_SBD)


class TorchAttention(nn.Module):
    """scaled_dot_product_attention in the place of Megatron's `core_attention`."""

    def __init__(self, config: Any, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
        super().__init__()
        assert config.attention_dropout == 0
        assert config.context_parallel_size == 1
        self._scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """[S, B, N, H], [S, B, G, H] twice -> [S, B, N · H].

        Args:
            attention_mask: bool [B, 1, S, S], true where a query may attend, which is the opposite of Megatron's masks; None: causal.
        """
        q_BNSH, k_BGSH, v_BGSH = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if not takes_groups(q_BNSH.device.type, q_BNSH.dtype, masked=attention_mask is not None):
            k_BGSH, v_BGSH = (with_a_copy_for_each_query(tensor, q_BNSH.shape[1]) for tensor in (k_BGSH, v_BGSH))
        y_BNSH = F.scaled_dot_product_attention(
            q_BNSH,
            k_BGSH,
            v_BGSH,
            attn_mask=attention_mask,
            is_causal=attention_mask is None,
            scale=self._scale,
            enable_gqa=q_BNSH.shape[1] != k_BGSH.shape[1],
        )
        return y_BNSH.permute(2, 0, 1, 3).flatten(2)


def takes_groups(device: str, dtype: torch.dtype, *, masked: bool) -> bool:
    """Whether torch has a fused kernel for several query heads to a key-value head.

    On a GPU flash attention has one; it takes 16-bit types, and no mask. The kernel for all else wants as many key-value heads as query
    heads; otherwise torch multiplies the scores out, [B, N, S, S] in memory several times.
    """
    return device != "cuda" or (dtype.itemsize == 2 and not masked)


def with_a_copy_for_each_query(heads_BGSH: Tensor, num_queries: int) -> Tensor:
    """[B, G, S, H] -> [B, N, S, H]: head n is the one that query head n belongs to, which is n // (N / G)."""
    size_B, size_G, size_S, size_H = heads_BGSH.shape
    each = num_queries // size_G
    return heads_BGSH if each == 1 else heads_BGSH[:, :, None].expand(-1, -1, each, -1, -1).reshape(size_B, num_queries, size_S, size_H)


class TorchNorm:
    """torch's RMSNorm in the model's type. Megatron's own wrapper refuses sequence parallelism, whose sums of gradients it would leave out;
    the trainer makes them."""

    def __new__(cls, config: Any, hidden_size: int, eps: float, **_: Any) -> nn.RMSNorm:  # type: ignore[misc]
        assert config.normalization == "RMSNorm"
        return nn.RMSNorm(hidden_size, eps, dtype=config.params_dtype)


class AnyDeviceRotary(RotaryEmbedding):
    """Megatron's, which would move itself to a GPU."""

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        freqs = self.get_freqs_non_repeated(max_seq_len, offset)
        return torch.cat((freqs, freqs), dim=-1)[:, None, None, :]
