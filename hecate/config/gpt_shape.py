"""The sizes of a GPT with experts in every layer, which the Megatron front end builds from scratch. Importing it needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from hecate.config.files.presets import find_preset
from hecate.parallel.cost.model_shapes import ModelShape, load_model_shape

HEAD_DIM = 64


@dataclass(frozen=True)
class GptShape:
    """The sizes of a model of Llama's architecture with experts in every layer.

    That is RMSNorm, RoPE, gated FFNs with SiLU, no biases and tied embeddings.
    """

    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_dim: int
    ffn: int
    """the inner size of an expert"""
    experts: int
    top_k: int
    seq_len: int

    @property
    def attention_parameters(self) -> int:
        """The number of parameters of one layer's attention projections."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.key_value_heads)


def gpt_shape(name_or_path: str) -> GptShape:
    """Return the sizes of a GPT like a model in configs/models, or in a YAML file of the same form (`ModelShape`).

    An FFN without a gate (`matrices: 2`) becomes a gated one of two thirds of its width, which has as many parameters. A model that
    is not causal becomes causal. Each head has 64 channels, and there is at least one head.

    Raises:
        UserError: there is no such model, or the file is wrong.
    """
    model: ModelShape = load_model_shape(find_preset("models", "model", name_or_path))
    query = model.hidden if model.query_width is None else model.query_width
    heads = max(1, query // HEAD_DIM)
    head_dim = query // heads
    key_value = query if model.key_value_width is None else model.key_value_width
    return GptShape(
        layers=model.layers,
        hidden=model.hidden,
        heads=heads,
        key_value_heads=max(1, key_value // head_dim),
        head_dim=head_dim,
        ffn=model.ffn if model.matrices == 3 else model.ffn * 2 // 3,
        experts=model.experts,
        top_k=model.top_k,
        seq_len=model.seq,
    )
