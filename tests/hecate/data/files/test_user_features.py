"""Users' features are read as numbers alone, and each sample must name a user who has some."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hecate.config import DataSource
from hecate.data.batches import collate
from hecate.data.encode import BadSamples, encode_source
from hecate.data.evaluation import generation_items
from hecate.data.files.syntax import check_syntax
from hecate.data.files.user_features import read_user_features
from hecate.data.sequences import build_sequence, empty_sequence, piece_of
from hecate.errors import UserError

VALUES = np.arange(6, dtype=np.float32).reshape(3, 2)


def features(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "users.npz", **{"ids": np.array(["7", "anna", "b"]), "features": VALUES, **arrays})
    return folder / "users.npz"


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"ids": np.array(["a", {}, None], dtype=object)}, "it holds Python objects, which are not read"),
        ({"ids": np.array([1.0, 2, 3])}, r"ids must be a list of texts or whole numbers, got float64 of shape \[3\]"),
        ({"ids": np.array(["a", "b", "a"])}, "the id 'a' is there twice"),
        ({"features": VALUES[:2]}, r"features must be floats of shape \[3, width\], a row for each id, got float32 of shape \[2, 2\]"),
        ({"features": VALUES.astype(int)}, "features must be floats of shape .* got int64"),
        ({"features": np.where(VALUES == 3, np.nan, VALUES)}, r"the features of user 'anna' \(1 such\) are not finite"),
    ],
)
def test_a_file_that_is_no_table_of_numbers_is_refused(tmp_path: Path, arrays: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        read_user_features(features(tmp_path, **arrays))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", vectors=VALUES)
    with pytest.raises(UserError, match=r"has no array 'ids', but vectors\n  it must hold ids "):
        read_user_features(tmp_path / "other.npz")
    np.save(tmp_path / "one.npy", VALUES)
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("one.npy", "text.npz", "missing.npz"):
        with pytest.raises(UserError, match=rf"{name}: no sound \.npz file of users' features"):
            read_user_features(tmp_path / name)


def write(folder: Path, *users: Any) -> DataSource:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    lines = [{"messages": turns} | ({} if user is None else {"user": user}) for user in users]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return DataSource(path=str(folder / "data.jsonl"), name="data")


@pytest.mark.parametrize(
    ("user", "reason"),
    [
        (None, r'data\.jsonl:2: there is no key "user", by which the router decides'),
        ("carl", r"data\.jsonl:2: user 'carl' has no features in .*users\.npz"),
        (1.5, r"data\.jsonl:2: user is '1\.5': it must be text or a whole number"),
    ],
)
def test_a_sample_without_features_is_refused_with_its_line(tmp_path: Path, byte_tokenizer: Any, user: Any, reason: str) -> None:
    source, users = write(tmp_path, 7, user, "anna"), read_user_features(features(tmp_path))
    with pytest.raises(UserError, match=reason):
        check_syntax([source], "error", users)
    with pytest.raises(UserError, match=reason):
        encode_source(source, byte_tokenizer, seq_len=64, vocab_size=300, users=users)
    kept = encode_source(source, byte_tokenizer, seq_len=64, vocab_size=300, bad=BadSamples("skip"), users=users)
    assert kept.users is not None
    assert kept.users.tolist() == [0, 1]
    assert kept.counts.skipped == 1


def test_users_travel_with_their_samples(tmp_path: Path, byte_tokenizer: Any) -> None:
    source, users = write(tmp_path, "b", 7, "7"), read_user_features(features(tmp_path))
    encoded = encode_source(source, byte_tokenizer, seq_len=64, vocab_size=300, users=users)
    length = len(encoded[0].input_ids)
    packed = build_sequence(0, [piece_of([encoded], 0, 0), piece_of([encoded], 0, 1)], [encoded])
    batch = collate([packed, empty_sequence()], 0, 2 * length + 3)
    assert batch.user is not None
    width = batch.user.shape[1]
    assert batch.user.tolist() == [[2] * length + [0] * length + [-1] * (width - 2 * length), [-1] * width]
    assert [item.user for item in generation_items(encoded, source, byte_tokenizer)] == [2, 0, 0]
    without = encode_source(source, byte_tokenizer, seq_len=64, vocab_size=300)
    moved = read_user_features(features(tmp_path, features=VALUES + 1))
    others = encode_source(source, byte_tokenizer, seq_len=64, vocab_size=300, users=moved)
    assert len({encoded.digest(), without.digest(), others.digest()}) == 3
