"""Greedy decoding pads on the left, and gives the answers in the prompts' order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hecate.errors import UserError
from hecate.train.generation import Decoding, arguments, generate


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


def test_logits_that_are_no_numbers_are_no_answer() -> None:
    """Of weights that are damaged; -inf forbids a token and is none."""
    allowed = arguments(
        SimpleNamespace(model=Successor(), tokenizer=SimpleNamespace(eos_token_id=0)), Decoding(2), 1, ["0"], torch.device("cpu")
    )  # type: ignore[arg-type]
    (check,) = allowed["logits_processor"]
    logits = torch.tensor([[0.0, float("-inf"), 1.0]])
    assert check(torch.zeros(1, 1), logits) is logits
    with pytest.raises(UserError, match="not numbers"):
        check(torch.zeros(1, 1), logits.where(logits != 0, float("nan")))
