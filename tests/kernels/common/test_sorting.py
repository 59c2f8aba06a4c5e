"""Sorting and cutting in Triton against the same in torch: equal in every place, with the words of dropout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hecate.kernels.common.assignments import AssignmentBlocks, RoutedTokens
from hecate.kernels.common.dropout import Dropout, ffn_dropout
from hecate.kernels.common.operands import flattened
from hecate.kernels.common.sorting import Unsorted, blocks_of, sorted_assignments, words_dropout
from hecate.kernels.common.sorting import kept_tile_map as tile_map_triton
from tests.kernels.common.order_cases import CASES, random_slots
from tests.kernels.grouping import poisoned
from tests.kernels.plain_orders import assignment_blocks, assignment_order, tile_map

__all__ = ["poisoned"]

pytestmark = pytest.mark.usefixtures("poisoned")
FEW = [name for name in CASES if CASES[name][2] < 100]


def routed(name: str) -> RoutedTokens:
    slot_TK, slots = random_slots(*CASES[name]), CASES[name][2]
    token_T = torch.randperm(len(slot_TK), generator=torch.Generator().manual_seed(1)) + (1 << 33)
    return RoutedTokens(torch.ones(len(slot_TK), 1), slot_TK, torch.ones(slot_TK.shape), token_T, torch.arange(slots) * 3 + 1)


def tensors_of(blocks: AssignmentBlocks) -> list[torch.Tensor]:
    return [*flattened(blocks.order), blocks.tiles, blocks.chunks, blocks.first_chunk]


@pytest.mark.parametrize("name", FEW)
def test_order_and_blocks_are_torch_s(name: str) -> None:
    slot_TK, slots = routed(name).slot_TK, CASES[name][2]
    order, words = sorted_assignments(Unsorted(slot_TK, slot_TK.numel()), slots)
    wanted = assignment_blocks(assignment_order(slot_TK, slots), 4, 16)
    assert words.numel() == 0
    for mine, torch_s in zip(tensors_of(blocks_of(order, 4, 16)), tensors_of(wanted), strict=True):
        assert mine.dtype == torch_s.dtype
        assert torch.equal(mine, torch_s)
    assert torch.equal(tile_map_triton(order, 3), tile_map(wanted.order, 3))
    assert tile_map_triton(order, 3) is tile_map_triton(order, 3)


def test_slots_may_be_a_view_of_columns() -> None:
    """As dispatch returns them, beside the tokens' numbers."""
    slot_TK = routed("plain").slot_TK
    view_TK = torch.cat([slot_TK, slot_TK[:, :1] + 9], dim=1)[:, :-1]
    order, _ = sorted_assignments(Unsorted(view_TK, view_TK.numel()), 4)
    assert all(map(torch.equal, flattened(order), flattened(assignment_order(slot_TK, 4))))


@pytest.mark.parametrize("name", [name for name in FEW if CASES[name][2]])
def test_words_of_dropout_are_torch_s(name: str) -> None:
    tokens, dropout = routed(name), Dropout(0.3, key=-77)
    order, words = sorted_assignments(Unsorted.of(tokens, dropout), CASES[name][2])
    mine, torch_s, here = words_dropout(words, dropout.dropped_levels), ffn_dropout(dropout, tokens, order.order_P), order.starts[-1]
    assert mine is not None
    assert torch_s is not None
    for which in ("gate_up", "down"):
        assert torch.equal(getattr(mine, which).word_R[:here], getattr(torch_s, which).word_R[:here])
    assert mine.scale == torch_s.scale


def test_what_is_not_dropped_is_not_hashed() -> None:
    """A probability that rounds to nothing of 65536, and none at all."""
    tokens = replace(routed("plain"), token_T=None)
    for unsorted in (Unsorted.of(tokens), Unsorted.of(tokens, Dropout(1e-9, key=1))):
        assert (unsorted.numbers, unsorted.key) == ((), 0)
