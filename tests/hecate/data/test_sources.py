"""A share of a source is held out by the contents of its samples, and by nothing else."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from hecate.config import DataConfig, DataSource
from hecate.data.content import cache_folder
from hecate.data.evaluation import generation_items
from hecate.data.sources import SourcePart, hold_out, read_source
from hecate.errors import UserError
from tests.hecate.data.making import chat, write_index, write_jsonl

RULES: dict[str, Any] = {"seq_len": 64, "vocab_size": 258}
WORDS = [f"word {number}" for number in range(200)]


def parts_of(path: Path, tokenizer: Any, share: float = 0.25, **options: Any) -> tuple[SourcePart, SourcePart]:
    """What is trained on, and what is held out."""
    source = DataSource(path=str(path), name="a")
    data = DataConfig(train=(source,), eval_share=share)
    (trained,), (held,) = hold_out(data, [read_source(source, tokenizer, **RULES | options)])
    assert isinstance(trained, SourcePart)
    return trained, held


def texts_of(part: SourcePart, tokenizer: Any) -> list[str]:
    """The questions of its samples."""
    return [tokenizer.decode(sample.input_ids).split("\n")[1].removesuffix("<e>") for sample in part]


def chats(folder: Path, name: str, words: list[str]) -> Path:
    return write_jsonl(folder / name, [chat(word, word.upper()) for word in words])


def test_every_sample_is_in_one_part_in_its_order(tmp_path: Path, byte_tokenizer: Any) -> None:
    path = chats(tmp_path, "a.jsonl", WORDS)
    trained, held = parts_of(path, byte_tokenizer)
    whole = read_source(DataSource(path=str(path)), byte_tokenizer, **RULES)
    assert sorted([*trained.lines.tolist(), *held.lines.tolist()]) == list(range(1, 201))
    for part in (trained, held):
        assert part.lines.tolist() == sorted(part.lines.tolist())
        lengths = [len(sample.input_ids) for sample in part]
        assert part.starts.tolist() == [sum(lengths[:count]) for count in range(len(lengths) + 1)]
        for sample in part:
            assert sample.input_ids.tolist() == whole[sample.line - 1].input_ids.tolist()
    assert len({whole.digest(), trained.digest(), held.digest()}) == 3
    assert 30 <= len(held) <= 70, "a quarter of 200, within three standard deviations"


def test_the_same_are_held_out_for_good(tmp_path: Path, byte_tokenizer: Any) -> None:
    """Written down: another digest would have a run, or another machine, train on what was held out."""
    _, held = parts_of(chats(tmp_path, "a.jsonl", WORDS[:24]), byte_tokenizer)
    assert texts_of(held, byte_tokenizer) == ["word 0", "word 5", "word 14", "word 16"]


def test_neither_order_files_form_nor_model_matter_nor_what_else_there_is(tmp_path: Path, byte_tokenizer: Any) -> None:
    _, held = parts_of(chats(tmp_path, "a.jsonl", WORDS), byte_tokenizer)
    wanted = set(texts_of(held, byte_tokenizer))
    shuffled = random.Random(0).sample(WORDS, len(WORDS))
    (tmp_path / "files").mkdir()
    chats(tmp_path / "files", "0.jsonl", shuffled[:70])
    chats(tmp_path / "files", "1.jsonl", shuffled[70:])
    asked = write_jsonl(tmp_path / "b.jsonl", [{"prompt": word, "completion": word.upper(), "id": n} for n, word in enumerate(WORDS)])
    fewer = chats(tmp_path, "c.jsonl", WORDS[50:100])
    _, in_files = parts_of(tmp_path / "files", byte_tokenizer)
    _, in_form = parts_of(asked, byte_tokenizer, cache=cache_folder(str(tmp_path / "cache")))
    _, of_fewer = parts_of(fewer, byte_tokenizer, seq_len=48)
    assert set(texts_of(in_files, byte_tokenizer)) == set(texts_of(in_form, byte_tokenizer)) == wanted
    assert set(texts_of(of_fewer, byte_tokenizer)) == wanted & set(WORDS[50:100])


def test_a_larger_share_holds_out_more_and_the_same(tmp_path: Path, byte_tokenizer: Any) -> None:
    path = chats(tmp_path, "a.jsonl", WORDS)
    held = [set(parts_of(path, byte_tokenizer, share)[1].lines.tolist()) for share in (0.05, 0.25, 0.9)]
    assert held[0] < held[1] < held[2]


def test_copies_are_on_one_side(tmp_path: Path, byte_tokenizer: Any) -> None:
    twice = [{**chat(word, word.upper()), "id": number} for number, word in enumerate([*WORDS, *WORDS])]
    trained, held = parts_of(write_jsonl(tmp_path / "a.jsonl", twice), byte_tokenizer)
    assert not set(texts_of(trained, byte_tokenizer)) & set(texts_of(held, byte_tokenizer))
    assert len(held) == 2 * len(set(texts_of(held, byte_tokenizer)))


def test_the_cache_and_memory_hold_out_the_same_and_pieces_of_a_document_stay_together(tmp_path: Path, byte_tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{word}: {'long ' * 40}"} for word in WORDS])
    folder = cache_folder(str(tmp_path / "cache"))
    found = [parts_of(path, byte_tokenizer, cache=cache) for cache in (None, folder, folder)]
    assert all([part.lines.tolist() for part in parts] == [part.lines.tolist() for part in found[0]] for parts in found[1:])
    trained, held = found[0]
    assert not set(trained.lines.tolist()) & set(held.lines.tolist())
    assert len(held) >= 3 * len(set(held.lines.tolist())), "each document has several pieces"


def test_documents_of_an_indexed_data_set_are_held_out_by_their_ids(tmp_path: Path, byte_tokenizer: Any) -> None:
    documents = [[number % 50, 7, 9, number % 50] * 30 for number in range(100)]
    trained, held = parts_of(Path(write_index(tmp_path / "a", documents)), byte_tokenizer)
    sides = [{int(sample.input_ids[0]) for sample in part} - {7, 9} for part in (trained, held)]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert not set(trained.lines.tolist()) & set(held.lines.tolist())
    with pytest.raises(UserError, match="no answers"):
        generation_items(held, "auto", byte_tokenizer)


def test_rows_of_tokens_are_held_out_by_their_ids_and_masks(tmp_path: Path, byte_tokenizer: Any) -> None:
    rows = [{"input_ids": [number % 200, 1, 2, 257], "labels": [-100, 1, 2, 257]} for number in range(60)]
    trained, held = parts_of(write_jsonl(tmp_path / "a.jsonl", [*rows, *rows]), byte_tokenizer)
    ids = [{tuple(sample.input_ids.tolist()) for sample in part} for part in (trained, held)]
    assert all(ids)
    assert not ids[0] & ids[1], "copies are on one side"
    assert len(trained) + len(held) == 120


def test_questions_are_those_of_the_held_out_samples(tmp_path: Path, byte_tokenizer: Any) -> None:
    _, held = parts_of(chats(tmp_path, "a.jsonl", WORDS), byte_tokenizer)
    items = generation_items(held, DataSource(path=held.path), byte_tokenizer)
    assert [item.answer_text.lower() for item in items] == texts_of(held, byte_tokenizer)


@pytest.mark.parametrize(("share", "what", "other"), [(1e-6, "none", "larger"), (0.999999, "all", "smaller")])
def test_too_little_data_is_refused(tmp_path: Path, byte_tokenizer: Any, share: float, what: str, other: str) -> None:
    path = chats(tmp_path, "a.jsonl", WORDS[:9])
    with pytest.raises(UserError) as error:
        parts_of(path, byte_tokenizer, share)
    first, hint = str(error.value).splitlines()
    assert first == f"data.eval_share: {share:g} of {path} would hold out {what} of its 9 samples, by their contents"
    assert hint == f"  give a {other} share, more samples, or evaluation data in data.eval under the name a"


def test_a_source_with_evaluation_data_of_its_own_is_whole(tmp_path: Path, byte_tokenizer: Any) -> None:
    sources = [DataSource(path=str(chats(tmp_path, f"{name}.jsonl", WORDS)), name=name) for name in "ab"]
    data = DataConfig(train=tuple(sources), eval=(sources[0],), eval_share=0.25)
    read = [read_source(source, byte_tokenizer, **RULES) for source in sources]
    trained, held = hold_out(data, read)
    assert trained[0] is read[0]
    assert [part.name for part in held] == ["b"]
    assert len(trained[1]) + len(held[0]) == 200
    assert asdict(data)["eval_share"] == 0.25
