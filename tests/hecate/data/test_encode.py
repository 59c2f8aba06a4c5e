import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, pre_tokenizers, processors

from hecate.config.schema import LEAVES
from hecate.data.encode import IGNORED, encode_source
from hecate.errors import UserError
from testing.byte_tokenizer import TEMPLATE, build_byte_tokenizer
from tests.hecate.data.making import Source, chat, encode_records, write_jsonl


def learned_text(tokenizer: Any, source: Any, index: int = 0) -> list[str]:
    """What each run of targets spells."""
    targets = source[index].targets
    cuts = np.flatnonzero(np.diff(np.concatenate([[False], targets != IGNORED, [False]]).astype(int)))
    return [tokenizer.decode(targets[start:end]) for start, end in zip(cuts[::2], cuts[1::2], strict=True)]


def test_loss_is_on_assistant_content_and_end_mark_only(tmp_path: Path, byte_tokenizer: Any) -> None:
    source = encode_records(tmp_path, [chat("2 + 2 =", "4", "why?", " so\n it is ", "bye", system="s")], byte_tokenizer)
    assert learned_text(byte_tokenizer, source) == ["4<e>", " so\n it is <e>"]
    sample = source[0]
    # Nothing after the last target: neither the end mark itself, the line break nor the last question.
    assert byte_tokenizer.decode(sample.input_ids) == (
        "<s>system\ns<e>\n<s>user\n2 + 2 =<e>\n<s>assistant\n4<e>\n<s>user\nwhy?<e>\n<s>assistant\n so\n it is "
    )


@pytest.mark.parametrize("trim", [True, False])
def test_a_token_before_the_answer_that_strips_white_space_is_not_learned(tmp_path: Path, trim: bool) -> None:
    """Phi-3's `<|assistant|>` takes away all white space behind it: the template's line break, and that with which an answer begins."""
    turn = "{{ ('<a>' if message['role'] == 'assistant' else '<s>') + '\\n' + message['content'] + '<e>\\n' }}"
    template = "{% for message in messages %}" + turn + "{% endfor %}{% if add_generation_prompt %}{{ '<a>\\n' }}{% endif %}"
    tokenizer = build_byte_tokenizer(chat_template=template)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim)
    tokenizer.add_tokens([AddedToken("<a>", special=True, rstrip=True)])
    source = encode_records(tmp_path, [chat("u", "\n yes", "u", "no")], tokenizer, vocab_size=259)
    assert learned_text(tokenizer, source) == ["yes<e>", "no<e>"]
    assert tokenizer.decode(source[0].input_ids).startswith("<s>\nu<e>\n<a>yes<e>\n<s>\nu<e>\n<a>n")


def test_target_is_the_next_token(tmp_path: Path, byte_tokenizer: Any) -> None:
    sample = encode_records(tmp_path, [chat("u", "abc")], byte_tokenizer)[0]
    last = byte_tokenizer("\nabc<e>", add_special_tokens=False)["input_ids"]
    assert sample.input_ids[-4:].tolist() == last[:-1]
    assert sample.targets[-4:].tolist() == last[1:]
    assert (sample.targets[:-4] == IGNORED).all()


@given(turns=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=2))
def test_every_assistant_turn_is_learned_whole(tmp_path_factory: Any, byte_tokenizer: Any, turns: list[str]) -> None:
    turns = [turn.replace("<", "(") for turn in turns]
    folder = tmp_path_factory.mktemp("turns")
    source = encode_records(folder, [chat(*turns)], byte_tokenizer, seq_len=10**6)
    assert learned_text(byte_tokenizer, source) == [turn + "<e>" for turn in turns[1::2]]


def test_text_is_learned_throughout_and_ended(tmp_path: Path, byte_tokenizer: Any) -> None:
    sample = encode_records(tmp_path, [{"text": "abc"}], byte_tokenizer)[0]
    assert byte_tokenizer.decode(sample.input_ids) == "abc"
    assert byte_tokenizer.decode(sample.targets) == "bc<e>"


@pytest.mark.parametrize(("letters", "pieces"), [(7, [7]), (8, [8]), (9, [8, 1]), (16, [8, 8]), (20, [8, 8, 4])])
def test_long_text_is_cut_without_losing_a_target(tmp_path: Path, byte_tokenizer: Any, letters: int, pieces: list[int]) -> None:
    text = "abcdefghijklmnopqrstuvwxyz"[:letters]
    source = encode_records(tmp_path, [{"text": text}, {"text": "xyz"}], byte_tokenizer, seq_len=8)
    assert [len(sample.input_ids) for sample in source] == [*pieces, 3]
    document = source[:-1]
    assert byte_tokenizer.decode(np.concatenate([piece.input_ids for piece in document])) == text
    assert byte_tokenizer.decode(np.concatenate([piece.targets for piece in document])) == text[1:] + "<e>"
    assert source.lines.tolist() == [1] * len(pieces) + [2]


def test_source_reads_as_a_sequence(tmp_path: Path, byte_tokenizer: Any) -> None:
    source = encode_records(tmp_path, [{"text": "a"}, {"text": "bcd"}], byte_tokenizer)
    assert [byte_tokenizer.decode(sample.input_ids) for sample in source] == ["a", "bcd"]
    assert source[-1].line == 2
    with pytest.raises(IndexError):
        source[2]


LONG = chat("q", "a" * 300)
BAD = [
    (b"{oops\n", "not valid JSON"),
    ({"messages": [{"role": "user", "content": "q"}]}, "no assistant turn"),
    (chat("q", " \n"), "an assistant turn is empty"),
    ({"messages": [{"role": "assistant", "content": "q"}]}, "begins with an assistant turn"),
    (LONG, "320 tokens are more than data.seq_len 256"),
]


@pytest.mark.parametrize(("record", "reason"), BAD)
def test_bad_sample_is_refused_with_its_line(tmp_path: Path, byte_tokenizer: Any, record: Any, reason: str) -> None:
    with pytest.raises(UserError, match=rf"data.jsonl:2: .*{reason}"):
        encode_records(tmp_path, [chat("q", "a"), record, chat("q", "b")], byte_tokenizer)


def test_skip_leaves_out_counts_and_quarantines(tmp_path: Path, byte_tokenizer: Any, caplog: Any) -> None:
    good = [chat("q", letter) for letter in "abcdef"]
    mixed = [record for pair in zip(good, [bad for bad, _ in BAD] + [b'{"messages": "\xff"}\n'], strict=True) for record in pair]
    quarantine = tmp_path / "run" / "quarantine.jsonl"
    source = encode_records(tmp_path, mixed, byte_tokenizer, on_bad_sample="skip", quarantine=quarantine)
    assert [text for i in range(len(source)) for text in learned_text(byte_tokenizer, source, i)] == [f"{letter}<e>" for letter in "abcdef"]
    assert source.lines.tolist() == [1, 3, 5, 7, 9, 11]
    assert (source.counts.kept, source.counts.skipped, source.counts.truncated) == (6, 6, 0)
    assert "6 of 12 samples skipped" in caplog.text
    records = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [record["line"] for record in records] == [2, 4, 6, 8, 10, 12]
    assert all(reason in record["reason"] for record, (_, reason) in zip(records[:5], BAD, strict=True))
    assert [record["raw"] for record in records][::5] == ["{oops", '{"messages": "\\xff"}']
    assert json.loads(records[4]["raw"]) == LONG


def test_only_long_samples_are_skipped_by_default(tmp_path: Path, byte_tokenizer: Any, caplog: Any) -> None:
    policy = LEAVES["data.on_bad_sample"].default
    options = {"on_bad_sample": policy, "quarantine": tmp_path / "bad"}
    source = encode_records(tmp_path, [LONG, chat("q", "b")], byte_tokenizer, **options)
    assert (source.lines.tolist(), source.counts.skipped) == ([2], 1)
    assert f"1 of 2 samples skipped; the first is {tmp_path}/data.jsonl:1: 320 tokens are more than data.seq_len 256" in caplog.text
    assert [json.loads(line)["line"] for line in (tmp_path / "bad").read_text().splitlines()] == [1]
    caplog.clear()
    encode_records(tmp_path, [LONG, chat("q", "b")], byte_tokenizer, on_bad_sample=policy, speaks=False)
    assert not caplog.text
    for record, reason in BAD[:-1]:
        with pytest.raises(UserError, match=rf"data.jsonl:1: .*{reason}"):
            encode_records(tmp_path, [record, chat("q", "b")], byte_tokenizer, **options)


def test_no_quarantine_file_without_bad_samples(tmp_path: Path, byte_tokenizer: Any) -> None:
    encode_records(tmp_path, [chat("q", "a")], byte_tokenizer, on_bad_sample="skip", quarantine=tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_truncate_cuts_long_samples_and_refuses_the_rest(tmp_path: Path, byte_tokenizer: Any) -> None:
    source = encode_records(tmp_path, [LONG, chat("q", "b")], byte_tokenizer, on_bad_sample="truncate")
    assert [len(sample.input_ids) for sample in source] == [256, 21]
    # 20 tokens of prompt, the last of which predicts the first letter.
    assert learned_text(byte_tokenizer, source) == ["a" * 237]
    assert source.counts.truncated == 1
    with pytest.raises(UserError, match=r":2: an assistant turn is empty"):
        encode_records(tmp_path, [LONG, chat("q", "")], byte_tokenizer, on_bad_sample="truncate")
    with pytest.raises(UserError, match=r":1: the first 256 tokens .* have no token to learn"):
        encode_records(tmp_path, [chat("q" * 300, "a")], byte_tokenizer, on_bad_sample="truncate")


@pytest.mark.parametrize("record", [chat("q", "a"), {"text": "abc"}])
def test_token_beyond_the_vocabulary(tmp_path: Path, byte_tokenizer: Any, record: Any) -> None:
    # The last id, 257, ends both samples: once it is a target only.
    encode_records(tmp_path, [record], byte_tokenizer, vocab_size=258)
    with pytest.raises(UserError, match=r"data.jsonl:1: token id 257 is beyond the model's vocabulary of 257"):
        encode_records(tmp_path, [record], byte_tokenizer, vocab_size=257)


def test_empty_text(tmp_path: Path, byte_tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"data.jsonl:2: the text is empty"):
        encode_records(tmp_path, [{"text": "a"}, {"text": " \n"}], byte_tokenizer)


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_tokenizers_that_cannot_do_it(tmp_path: Path, policy: str) -> None:
    with pytest.raises(UserError, match="has no chat template"):
        encode_records(tmp_path, [chat("q", "a")], build_byte_tokenizer(chat_template=None), on_bad_sample=policy)
    with pytest.raises(UserError, match="no end-of-sequence token"):
        encode_records(tmp_path, [{"text": "a"}], build_byte_tokenizer(eos_token=None), on_bad_sample=policy)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length > 2 }}" + TEMPLATE,  # a longer conversation begins otherwise
        # an answer ends otherwise once a question follows
        TEMPLATE.replace("'<e>", "('!' if loop.last and message['role'] == 'assistant' else '') + '<e>"),
    ],
)
def test_a_conversation_that_the_template_rewrites_is_a_bad_sample(tmp_path: Path, template: str) -> None:
    tokenizer = build_byte_tokenizer(chat_template=template)
    records = [chat("q", "a", "q", "b"), chat("q", "a")]
    with pytest.raises(UserError, match=r"data.jsonl:1: the chat template cannot be used .* rewrites earlier turns"):
        encode_records(tmp_path, records, tokenizer)
    assert encode_records(tmp_path, records, tokenizer, on_bad_sample="skip").lines.tolist() == [2]


# As Phi-3's: a turn ends with <t>, and one <e> ends the whole. `generation` marks what transformers says is the assistant's.
_CLOSING = (
    "{% for message in messages %}{{ '<s>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<t>' }}{{ '\n' + eos_token if loop.last else '' }}"
    "{% endgeneration %}{{ '' if loop.last else '\n' }}"
    "{% else %}{{ message.content + '<t>\n' }}{{ eos_token if loop.last and not add_generation_prompt else '' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def test_a_token_that_a_template_writes_once_at_the_end_is_the_last_answers(tmp_path: Path) -> None:
    """What is learned is what transformers' mask of the assistant's tokens has."""
    tokenizer = build_byte_tokenizer(chat_template=_CLOSING, additional_special_tokens=["<t>"])
    talks = [chat("q", "a"), chat("q", "a", "<r", "<b "), chat("q", "a", "r", "b", "s", "c", system="x"), chat("q", "a", "r", "<e")]
    encoded = encode_records(tmp_path, talks, tokenizer, vocab_size=259)
    for talk, sample in zip(talks, encoded, strict=True):
        options = {"return_assistant_tokens_mask": True, "return_dict": True}
        theirs = tokenizer.apply_chat_template(talk["messages"], **options)
        learned = [token for token, mine in zip(theirs["input_ids"], theirs["assistant_masks"], strict=True) if mine]
        assert [token for token in sample.targets.tolist() if token != IGNORED] == learned
    assert [tokenizer.decode([token for token in sample.targets if token != IGNORED]) for sample in encoded] == [
        "a<t>\n<e>",
        "a<t><b <t>\n<e>",
        "a<t>b<t>c<t>\n<e>",
        "a<t><e<t>\n<e>",
    ]


def test_tokenizers_own_beginning_is_for_documents_only(tmp_path: Path) -> None:
    tokenizer = build_byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    document, conversation = (encode_records(tmp_path, [record], tokenizer)[0] for record in ({"text": "abc"}, chat("q", "a")))
    assert tokenizer.decode(document.input_ids) == "<s>abc"
    assert tokenizer.decode(document.targets) == "abc<e>"
    assert tokenizer.decode(conversation.input_ids) == "<s>user\nq<e>\n<s>assistant\na"


def test_refusal_by_the_template_is_a_bad_sample(tmp_path: Path) -> None:
    picky = build_byte_tokenizer(
        chat_template="{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    )
    records = [chat("q", "a", system="s"), chat("q", "b")]
    with pytest.raises(UserError, match=r":1: the chat template cannot be used for training on this conversation: no system"):
        encode_records(tmp_path, records, picky)
    assert encode_records(tmp_path, records, picky, on_bad_sample="skip").lines.tolist() == [2]


def test_rendering_does_not_depend_on_the_day(tmp_path: Path) -> None:
    dated = build_byte_tokenizer(
        chat_template="{% if not date_string is defined %}{% set date_string = strftime_now('%f') %}{% endif %}{{ date_string }}" + TEMPLATE
    )
    first, second = (encode_records(tmp_path, [chat("q", "a")], dated).digest() for _ in range(2))
    assert first == second
    always = build_byte_tokenizer(chat_template="{{ strftime_now('%f on %B %d, %Y') }}" + TEMPLATE)  # as SmolLM3's has it
    first, second = (encode_records(tmp_path, [chat("q", "a")], always) for _ in range(2))
    assert first.digest() == second.digest()
    assert "July 26, 2024" in always.decode(first.input_ids)


def test_nothing_left(tmp_path: Path, byte_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="no usable sample: all 2 are bad"):
        encode_records(tmp_path, [chat("q", ""), chat("q", " ")], byte_tokenizer, on_bad_sample="skip")


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weight_must_be_positive(tmp_path: Path, byte_tokenizer: Any, weight: float) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [chat("q", "a")])
    with pytest.raises(UserError, match="must be a positive number"):
        encode_source(Source(str(path), weight=weight), byte_tokenizer, seq_len=64, vocab_size=258)


def test_unknown_policy(tmp_path: Path, byte_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="one of skip_long, error, skip, truncate"):
        encode_records(tmp_path, [chat("q", "a")], byte_tokenizer, on_bad_sample="ignore")


def test_more_samples_than_one_tokenizer_call(tmp_path: Path, byte_tokenizer: Any) -> None:
    records: list[Any] = [{"text": str(i)} for i in range(1300)]
    records[700] = b"broken\n"
    source = encode_records(tmp_path, records, byte_tokenizer, on_bad_sample="skip")
    texts = [byte_tokenizer.decode(sample.input_ids) for sample in source]
    assert texts == [str(i) for i in range(1300) if i != 700]


def test_digest_notices_targets_and_borders(tmp_path: Path, byte_tokenizer: Any) -> None:
    source = encode_records(tmp_path, [{"text": "ab"}, {"text": "c"}], byte_tokenizer)
    others = [
        replace(source, input_ids=source.input_ids + 1),
        replace(source, targets=np.where(source.targets == 257, IGNORED, source.targets)),
        replace(source, starts=np.array([0, 1, 3])),
    ]
    assert len({other.digest() for other in [source, *others]}) == 4
    assert encode_records(tmp_path, [{"text": "ab"}, {"text": "c"}], byte_tokenizer).digest() == source.digest()


def test_smollm2(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    source = encode_records(
        tmp_path, [chat("4 + 3 =", "7", "and in words?", "seven 🙂", system="sum")], smollm2_tokenizer, vocab_size=49152
    )
    assert learned_text(smollm2_tokenizer, source) == ["7<|im_end|>", "seven 🙂<|im_end|>"]
