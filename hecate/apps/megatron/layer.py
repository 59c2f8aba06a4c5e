"""What stands in a Megatron layer in the place of its own: our experts, torch's attention and norms, rotary embeddings of any device.

Shapes: S positions, B sequences, N heads, G key-value heads, H of a head, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from hecate.model.layers.attention_kernels import fused_attention
from hecate.parallel.values.units import Unit


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
        y_BNSH = fused_attention(q_BNSH, k_BGSH, v_BGSH, attention_mask, self._scale)
        return y_BNSH.permute(2, 0, 1, 3).flatten(2)


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
