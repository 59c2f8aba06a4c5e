"""Greedy decoding pads on the left, and gives the answers in the prompts' order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hecate.train.generation import Decoding, generate


class Successor(nn.Module):
    """Answers with the successor of the last token, and stops with token 0; keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.generation_config = SimpleNamespace(eos_token_id=0)
        self.seen: list[tuple[list[list[int]], list[list[int]]]] = []

    def get_decoder(self) -> SimpleNamespace:
        return SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"))

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **given: Any) -> Tensor:
        assert not given["do_sample"]
        self.seen.append((input_ids.tolist(), attention_mask.tolist()))
        return torch.cat([input_ids, input_ids[:, -1:] + 1, torch.zeros_like(input_ids[:, :1])], 1)


def test_prompts_of_like_length_share_a_batch_and_keep_their_order() -> None:
    model = Successor()
    tokenizer = SimpleNamespace(eos_token_id=0, decode=lambda ids, skip_special_tokens: f" {int(ids[0])} ")
    answers = generate(SimpleNamespace(model=model, tokenizer=tokenizer), [[5, 6, 7], [1], [3, 4]], Decoding(2), batch_size=2)  # type: ignore[arg-type]
    assert [answer.text for answer in answers] == ["8", "2", "5"]
    assert model.seen == [([[0, 1], [3, 4]], [[0, 1], [1, 1]]), ([[5, 6, 7]], [[1, 1, 1]])]
