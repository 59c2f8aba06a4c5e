"""A micro-batch starts its forward pass without a question to the device: tensors on `meta` have no values to ask for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from hecate.data.batches import Batch, PackedSamples, collate
from hecate.data.encode import IGNORED
from hecate.data.sequences import PackedSequence
from hecate.train.steps.passes import forward_loss, pass_tokens

VOCABULARY, HIDDEN = 7, 3


def sequence(number: int, lengths: tuple[int, ...]) -> PackedSequence:
    """Samples of these lengths, of each of which all but the first position have labels."""
    position = np.concatenate([np.arange(length) for length in lengths])
    ids = (position + number) % VOCABULARY
    targets = np.where(position > 0, ids, IGNORED)
    segment = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return PackedSequence(number, ids, targets, position, segment, np.zeros_like(ids), ())


@dataclass(frozen=True)
class Head:
    """A causal model of two matrices; of a tensor group of two ranks this is the second."""

    weight: Tensor
    halves: bool = False

    def own_positions(self, length: int) -> slice:
        return slice(length // 2, length) if self.halves else slice(length)

    def hidden(self, input_ids: Tensor, samples: PackedSamples | None, position_ids: Tensor) -> Tensor:
        return self.weight[input_ids]

    def loss_sum(self, hidden_ND: Tensor, target_N: Tensor, weight_N: Tensor | None = None) -> Tensor:
        assert weight_N is None
        return torch.nn.functional.cross_entropy(hidden_ND @ self.weight.T, target_N, reduction="sum")


BATCHES = {
    "full": collate([sequence(0, (8,)), sequence(1, (8,))], 0, 8),
    "padded": collate([sequence(0, (5,)), sequence(1, (8,))], 0, 8),
    "packed": collate([sequence(0, (5, 3)), sequence(1, (2, 2, 3))], 0, 8),
}


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_a_forward_pass_asks_the_device_nothing(name: str, halves: bool) -> None:
    batch, weight = BATCHES[name], torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(0))
    host, head = Head(weight, halves), Head(weight.to("meta"), halves)
    moved = batch.to("meta")
    tokens, wanted = pass_tokens(head, moved), pass_tokens(host, batch)
    assert forward_loss(head, moved).device.type == "meta"
    assert (tokens.valid is None) == (wanted.valid is None)
    for got, one in ((tokens.valid, wanted.valid), (tokens.number, wanted.number)):
        assert (got is None) == (one is None)
        assert got is None or one is None or (got.device.type == "meta" and got.shape == one.shape)


@pytest.mark.parametrize("name", BATCHES)
def test_padding_and_labels_are_found_by_their_definition(name: str) -> None:
    batch = BATCHES[name]
    weight = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    real = [b * 8 + s for b in range(2) for s in range(8) if int(batch.segment_ids[b, s]) > 0]
    tokens = pass_tokens(Head(weight), batch)
    assert list(range(16) if tokens.valid is None else tokens.valid.tolist()) == real
    assert (tokens.valid is None) == (len(real) == 16)
    second_half = pass_tokens(Head(weight, halves=True), batch)
    kept = [b * 4 + s - 4 for b in range(2) for s in range(4, 8) if int(batch.segment_ids[b, s]) > 0]
    assert list(range(8) if second_half.valid is None else second_half.valid.tolist()) == kept
    loss = sum(
        -(weight[batch.input_ids[b, s]] @ weight.T).log_softmax(0)[batch.targets[b, s]]
        for b in range(2)
        for s in range(8)
        if int(batch.targets[b, s]) != IGNORED
    )
    torch.testing.assert_close(forward_loss(Head(weight), batch), loss)
    assert (batch.layout.samples is None) == (name != "packed")


def test_a_batch_on_a_device_keeps_its_layout() -> None:
    batch = BATCHES["padded"]
    moved: Batch = batch.to("meta")
    assert moved.layout.is_token is batch.layout.is_token
    assert moved.layout.labelled.shape == batch.layout.labelled.shape
    with pytest.raises(AssertionError, match="meta"):
        moved.to("meta")
