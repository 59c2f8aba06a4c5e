"""Tiny random models of many architectures."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(model_type: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A causal language model in evaluation mode, its weights large enough that nothing is nearly linear."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, "initializer_range": 0.3, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def token_ids() -> torch.Tensor:
    return torch.randint(3, 32, (2, 9), generator=torch.Generator().manual_seed(1))
