"""Rows of token ids are trained on as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hecate.data.encode import IGNORED
from hecate.data.files.formats import Fault, read_samples
from hecate.data.files.token_rows import take_token_row
from hecate.errors import UserError
from tests.hecate.data.making import encode_records, write_jsonl

IDS = [5, 6, 7, 8, 9]


def expected(learned: list[int]) -> tuple[list[int], list[int]]:
    """Inputs and targets by the definition: up to the last target, and the target of a token is the next one if that is learned."""
    targets = [IDS[at + 1] if learned[at + 1] else IGNORED for at in range(len(IDS) - 1)]
    last = max(at for at, target in enumerate(targets) if target != IGNORED)
    return IDS[: last + 1], targets[: last + 1]


@pytest.mark.parametrize(
    ("more", "learned"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"labels": [-100, -100, 7, 8, -100]}, [0, 0, 1, 1, 0]),
        ({"loss_mask": [0, 1, 0, 1, 0]}, [0, 1, 0, 1, 0]),
        ({"completion_mask": [False, False, True, True, True], "assistant_masks": [1, 1, 0, 1, 1]}, [0, 0, 0, 1, 1]),
        ({"labels": IDS, "attention_mask": [1] * 5}, [1, 1, 1, 1, 1]),
    ],
)
def test_labels_and_masks_say_what_is_learned(tmp_path: Path, byte_tokenizer: Any, more: dict[str, Any], learned: list[int]) -> None:
    (sample,) = encode_records(tmp_path, [{"input_ids": IDS} | more], byte_tokenizer)
    assert (sample.input_ids.tolist(), sample.targets.tolist()) == expected(learned)


def test_padding_is_left_out_and_other_keys_are_kept() -> None:
    record = {"input_ids": [0, 0, *IDS, 0], "labels": [-100, -100, *IDS, -100], "attention_mask": [0, 0, 1, 1, 1, 1, 1, 0], "id": 3}
    row = take_token_row(record)
    assert (row.ids.tolist(), row.learned.tolist(), row.masked, record) == (IDS, [True] * 5, True, {"id": 3})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input_ids": "5 6"}, "input_ids must be a list of whole numbers"),
        ({"input_ids": [5, 6.5]}, "input_ids must be a list of whole numbers"),
        ({"input_ids": [True, False]}, "input_ids must be a list of whole numbers"),
        ({"input_ids": [[5], [6, 7]]}, "input_ids must be a list of whole numbers"),
        ({"input_ids": []}, "input_ids must be a list of token ids"),
        ({"input_ids": [5, -1]}, "input_ids has a number that is no token id"),
        ({"input_ids": [5, 2**31]}, "input_ids has a number that is no token id"),
        ({"input_ids": [5, 2**70]}, "input_ids must be a list of whole numbers"),
        ({"input_ids": IDS, "labels": IDS[1:]}, "labels has 4 numbers, but input_ids has 5"),
        ({"input_ids": IDS, "labels": [*IDS[1:], -100]}, "labels[0] is 6, but input_ids[0] is 5: a label is its own token"),
        ({"input_ids": IDS, "loss_mask": [0, 1, 2, 1, 1]}, "loss_mask must be a list of 0 and 1"),
        ({"input_ids": IDS, "attention_mask": [1, 0, 1, 1, 1]}, "attention_mask leaves out tokens between others"),
    ],
)
def test_a_bad_row_is_a_fault_with_its_line(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    fault = list(read_samples(write_jsonl(tmp_path / "data.jsonl", [{"input_ids": IDS}, row])))[1]
    assert isinstance(fault, Fault)
    assert (fault.line, fault.reason[: len(reason)]) == (2, reason)


def test_a_row_without_a_mask_is_cut_like_a_document_and_one_with_a_mask_is_too_long(tmp_path: Path, byte_tokenizer: Any) -> None:
    pieces = encode_records(tmp_path, [{"input_ids": IDS}], byte_tokenizer, seq_len=3)
    assert [(piece.input_ids.tolist(), piece.targets.tolist()) for piece in pieces] == [([5, 6, 7], [6, 7, 8]), ([8], [9])]
    rows = [{"input_ids": IDS, "labels": IDS}, {"input_ids": IDS[:3], "labels": IDS[:3]}]
    kept = encode_records(tmp_path, rows, byte_tokenizer, seq_len=3, on_bad_sample="skip_long")
    assert (kept.counts.kept, kept.counts.skipped) == (1, 1)


def test_ids_beyond_the_vocabulary_and_rows_without_a_target_name_their_line(tmp_path: Path, byte_tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"data\.jsonl:1: token id 258 is beyond the model's vocabulary"):
        encode_records(tmp_path, [{"input_ids": [5, 258]}], byte_tokenizer)
    with pytest.raises(UserError, match=r"data\.jsonl:1: there is no token to learn"):
        encode_records(tmp_path, [{"input_ids": IDS, "labels": [5, -100, -100, -100, -100]}], byte_tokenizer)
