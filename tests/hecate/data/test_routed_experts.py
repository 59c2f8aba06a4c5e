"""A sample's routing is read in the forms in which it is returned, held to the sample's tokens, and goes wherever these go."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hecate.config.schema import DataSource, FieldNames
from hecate.data import token_cache
from hecate.data.batches import collate
from hecate.data.content import cache_folder
from hecate.data.encode import EncodedSource, encode_source
from hecate.data.files.syntax import check_syntax
from hecate.data.routed_experts import RoutingShape, routing_text
from hecate.data.sequences import build_sequence, empty_sequence, piece_of
from hecate.data.token_cache import cached_source
from hecate.errors import UserError
from tests.hecate.data.making import chat, with_bad_samples, write_jsonl

SHAPE = RoutingShape((4, 0, 300), 2)
"""of three layers, the second of which has no experts"""
SAMPLE = chat("hi", "yes")
TOKENS = len("suser\nhie\nsassistant\nyese\n")  # <s> and <e> are one token each
READ = TOKENS - 2
"""all tokens before the last one that is learned, which is <e>, and a newline comes after that"""


def routing(tokens: int, *, layers: int = 2, seed: int = 0) -> NDArray[np.int16]:
    """Of experts 0 to 3, a token's two always different."""
    first = np.random.default_rng(seed).integers(0, 4, (tokens, layers, 1))
    return np.concatenate([first, (first + 1) % 4], axis=-1).astype(np.int16)


def npy(array: NDArray[Any]) -> str:
    """As vLLM's server returns it: numpy writes the file, and base64 makes text of it."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def encode(folder: Path, tokenizer: Any, records: list[Any], **options: Any) -> EncodedSource:
    source = DataSource(path=str(write_jsonl(folder / "data.jsonl", records)), name="data", fields=options.pop("fields", None))
    return encode_source(source, tokenizer, **{"seq_len": 64, "vocab_size": 300, "routing": SHAPE, **with_bad_samples(options)})


@pytest.mark.parametrize("tokens", [READ, TOKENS - 1, TOKENS])
def test_lists_and_npy_are_read_alike_with_and_without_the_tokens_that_nothing_is_read_of(
    tmp_path: Path, byte_tokenizer: Any, tokens: int
) -> None:
    known = routing(tokens)
    whole = np.insert(known, 1, 99, axis=1)  # a row for each decoder layer, that of the dense one without meaning
    for value in (known.tolist(), npy(known), npy(known.astype(np.uint8)), routing_text(known), npy(whole)):
        encoded = encode(tmp_path, byte_tokenizer, [SAMPLE | {"routed_experts": value}])
        assert encoded.routed is not None
        assert np.array_equal(encoded.routed, known[:READ])
    named = encode(tmp_path, byte_tokenizer, [SAMPLE | {"experts": npy(known)}], fields=FieldNames(routed_experts="experts"))
    assert np.array_equal(named.routed, known[:READ])  # type: ignore[arg-type]


def changed(place: tuple[int, int, int], expert: int) -> list[Any]:
    known = routing(READ)
    known[place] = expert
    return known.tolist()  # type: ignore[no-any-return]


WRONG = [
    (None, "no 'routed_experts' beside the text, but moe.replay needs it; hecate eval --record-routing FILE writes it"),
    (
        routing(READ - 1).tolist(),
        f"is of {READ - 1} tokens, but the sample has {TOKENS}, of which the first {READ} are read: .*chat template",
    ),
    (routing(TOKENS + 1).tolist(), f"is of {TOKENS + 1} tokens, but the sample has {TOKENS}"),
    (routing(READ, layers=1).tolist(), rf"must be integers \[tokens, 2 layers, 2 experts\], got int64 of the shape \[{READ}, 1, 2\]"),
    (routing(READ)[..., :1].tolist(), rf"must be integers \[tokens, 2 layers, 2 experts\], got int64 of the shape \[{READ}, 2, 1\]"),
    (routing(READ).astype(float).tolist(), "must be integers .* got float64"),
    ([[[0, 1]], [[0]]], "must be integers .* got lists of several lengths"),
    ("AAAA", r"is a text, but not the base64 text of a \.npy file"),
    (npy(np.array([{}])), r"is a text, but not the base64 text of a \.npy file"),
    (changed((3, 0, 1), 4), "names expert 4 for token 3, but layer 0 has 0 to 3"),
    (changed((5, 1, 0), 300), "names expert 300 for token 5, but layer 2 has 0 to 299"),
    (changed((5, 1, 0), -1), "names expert -1 for token 5, but layer 2 has 0 to 299"),
    (changed((2, 1, 0), int(routing(READ)[2, 1, 1])), "names expert . twice for token 2 in layer 2"),
]


@pytest.mark.parametrize(("value", "reason"), WRONG)
def test_routing_that_does_not_fit_is_refused_with_its_line(tmp_path: Path, byte_tokenizer: Any, value: Any, reason: str) -> None:
    good = SAMPLE | {"routed_experts": routing(READ).tolist()}
    records = [good, SAMPLE if value is None else SAMPLE | {"routed_experts": value}, good]
    with pytest.raises(UserError, match=rf"(?s)data\.jsonl:2: .*{reason}.*\ncorrect the sample, or set data.on_bad_sample"):
        encode(tmp_path, byte_tokenizer, records)
    left = encode(tmp_path, byte_tokenizer, records, on_bad_sample="skip")
    assert (left.counts.kept, left.counts.skipped, left.lines.tolist()) == (2, 1, [1, 3])


def test_a_missing_routing_is_told_before_any_rank_starts(tmp_path: Path) -> None:
    source = DataSource(path=str(write_jsonl(tmp_path / "data.jsonl", [SAMPLE])), name="data")
    check_syntax([source], "error")
    with pytest.raises(UserError, match=r"data\.jsonl:1: no 'routed_experts' beside the text"):
        check_syntax([source], "error", routed=True)


def test_routing_travels_with_tokens_that_are_truncated_packed_and_padded(tmp_path: Path, byte_tokenizer: Any) -> None:
    long = chat("hi", "yes" * 10)
    known = [routing(READ, seed=1), routing(TOKENS + 27, seed=2)]
    records = [record | {"routed_experts": npy(one)} for record, one in zip((SAMPLE, long), known, strict=True)]
    encoded = encode(tmp_path, byte_tokenizer, records, seq_len=READ + 3, on_bad_sample="truncate")
    assert encoded.counts.truncated == 1
    packed = build_sequence(0, [piece_of([encoded], 0, 1), piece_of([encoded], 0, 0)], [encoded])
    batch = collate([packed, empty_sequence()], 0, 64)
    assert batch.routed is not None
    cut = READ + 3
    assert np.array_equal(batch.routed[0, :cut], known[1][:cut])
    assert np.array_equal(batch.routed[0, cut : cut + READ], known[0])
    assert not batch.routed[0, cut + READ :].any()
    assert not batch.routed[1].any()
    assert batch.routed.shape[1] == batch.input_ids.shape[1] > cut + READ


def test_a_long_document_is_cut_with_its_routing(tmp_path: Path, byte_tokenizer: Any) -> None:
    known = routing(10)
    encoded = encode(tmp_path, byte_tokenizer, [{"text": "a" * 10, "routed_experts": known.tolist()}], seq_len=4)
    pieces = [encoded[number].routed for number in range(len(encoded))]
    assert [len(piece) for piece in pieces if piece is not None] == [4, 4, 2]
    assert np.array_equal(np.concatenate(pieces), known)  # type: ignore[arg-type]


@pytest.mark.parametrize("buffered", [1, 1 << 20])
def test_on_disk_it_is_as_in_memory_and_is_not_believed_when_damaged(
    tmp_path: Path, byte_tokenizer: Any, buffered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "_BUFFERED", buffered)
    records = [SAMPLE | {"routed_experts": npy(routing(READ, seed=seed))} for seed in range(5)]
    other = encode(tmp_path, byte_tokenizer, [*records[1:], records[0]])
    wanted, folder = encode(tmp_path, byte_tokenizer, records), cache_folder(str(tmp_path / "cache"))
    assert folder is not None
    source, rules = DataSource(path=wanted.path, name="data"), {"seq_len": 64, "vocab_size": 300}
    plain = cached_source(source, byte_tokenizer, folder, **rules)  # type: ignore[arg-type]
    mapped = cached_source(source, byte_tokenizer, folder, routing=SHAPE, **rules)  # type: ignore[arg-type]
    assert plain.routed is None
    assert np.array_equal(mapped.routed, wanted.routed)  # type: ignore[arg-type]
    assert mapped.digest() == wanted.digest() != plain.digest()
    assert other.digest() != wanted.digest(), "the same tokens with another routing are other data"
    file = mapped.folder / "routed.i16"
    file.chmod(0o600)
    file.write_bytes(bytes([1 ^ file.read_bytes()[0]]) + file.read_bytes()[1:])
    again = cached_source(source, byte_tokenizer, folder, routing=SHAPE, **rules)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="have changed on the disk"):
        again[0]
