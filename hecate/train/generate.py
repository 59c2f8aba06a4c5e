"""Greedy decoding with the model as it is, for exact-match scores and for trying an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hecate.model.base import BaseModel


def generate(
    base: BaseModel, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, batch_size: int, together: bool = False
) -> list[str]:
    """The greedy continuation of each prompt (token ids), as text without special tokens, in the prompts' order.

    Args:
        together: all ranks call it, with as many prompts, and run each forward pass at the same time, until the longest answer is there.
    """
    model: Any = base.model
    device = next(model.parameters()).device
    stop = _stop_tokens(model, base.tokenizer)
    # Prompts of like lengths together: the least padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.full((len(chosen), width), stop[0])
        mask = torch.zeros((len(chosen), width), dtype=torch.int64)
        for row, i in enumerate(chosen):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        with torch.no_grad():
            out = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=stop,
                pad_token_id=stop[0],
                synced_gpus=together,
            )
        for row, i in enumerate(chosen):
            answers[i] = base.tokenizer.decode(out[row, width:], skip_special_tokens=True).strip()
    return answers


def _stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The model's own end tokens, and the tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    tokens = configured if isinstance(configured, list) else [configured]
    found = [token for token in [*tokens, tokenizer.eos_token_id] if token is not None]
    return list(dict.fromkeys(found)) or [0]
