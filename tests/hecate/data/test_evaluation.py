from pathlib import Path
from typing import Any

import pytest

from hecate.data.evaluation import eval_sequences, generation_items, share_of_rank
from hecate.errors import UserError
from testing.byte_tokenizer import TEMPLATE, build_byte_tokenizer
from tests.hecate.data.making import Source, chat, encode_records, source_of_lengths

LENGTHS = [5, 7, 4, 3, 6, 1, 9, 2]


@pytest.mark.parametrize(("max_samples", "count"), [(None, 8), (3, 3), (100, 8)])
@pytest.mark.parametrize("packing", [True, False])
def test_rows_hold_the_first_samples_once(packing: bool, max_samples: int | None, count: int) -> None:
    sources = [source_of_lengths([2]), source_of_lengths(LENGTHS)]
    sequences = eval_sequences(sources, 1, seq_len=10, packing=packing, max_samples=max_samples)
    assert sorted(sample for sequence in sequences for sample in sequence.samples) == [(1, i) for i in range(count)]
    assert [sequence.number for sequence in sequences] == list(range(len(sequences)))
    if not packing:
        assert [sequence.samples for sequence in sequences] == [((1, i),) for i in range(count)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 11])
@pytest.mark.parametrize("sequences_per_batch", [1, 3])
def test_ranks_share_all_rows_in_equally_many_batches(world_size: int, sequences_per_batch: int) -> None:
    sequences = eval_sequences([source_of_lengths(LENGTHS)], 0, seq_len=10, packing=False)
    shares = [share_of_rank(sequences, rank, world_size, sequences_per_batch) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert all(len(batch) == sequences_per_batch for share in shares for batch in share)
    for rank, share in enumerate(shares):
        numbers = [sequence.number for batch in share for sequence in batch]
        mine = list(range(rank, len(sequences), world_size))
        assert numbers == mine + [-1] * (len(numbers) - len(mine))


def test_generation_items(tmp_path: Path, byte_tokenizer: Any) -> None:
    records = [chat("q", "a", "r", "b", "bye", system="s"), chat("q", ""), chat("x", "y"), chat("z", "w")]
    source = encode_records(tmp_path, records, byte_tokenizer, on_bad_sample="skip")
    items = generation_items(source, Source(source.path), byte_tokenizer)
    assert [(item.answer_text, item.line) for item in items] == [("b", 1), ("y", 3), ("w", 4)]
    assert items[0].file == source.path
    assert byte_tokenizer.decode(items[0].prompt_ids) == (
        "<s>system\ns<e>\n<s>user\nq<e>\n<s>assistant\na<e>\n<s>user\nr<e>\n<s>assistant\n"
    )
    assert [item.line for item in generation_items(source, Source(source.path), byte_tokenizer, max_items=2)] == [1, 3]


def test_prompt_ids_are_those_trained_on(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    source = encode_records(tmp_path, [chat("4 + 3 =", "7", system="sum")], smollm2_tokenizer, vocab_size=49152)
    (item,) = generation_items(source, Source(source.path), smollm2_tokenizer)
    assert source[0].input_ids[: len(item.prompt_ids)].tolist() == item.prompt_ids
    assert (source[0].targets[len(item.prompt_ids) - 1 :] >= 0).all()


def test_documents_have_no_answers(tmp_path: Path, byte_tokenizer: Any) -> None:
    source = encode_records(tmp_path, [{"text": "abc"}], byte_tokenizer)
    with pytest.raises(UserError, match="no answers to generate"):
        generation_items(source, Source(source.path), byte_tokenizer)


def test_an_answer_that_the_template_rewrites_is_what_it_writes(tmp_path: Path) -> None:
    tokenizer = build_byte_tokenizer(chat_template=TEMPLATE.replace("message['content']", "message['content'] | upper"))
    source = encode_records(tmp_path, [chat("q", "four")], tokenizer)
    (item,) = generation_items(source, Source(source.path), tokenizer)
    assert (item.before, item.answer_text, item.after) == ("", "FOUR", "")
