"""Megatron's indexed data sets against text files of the same documents."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hecate.config import ConfigError, load_config
from hecate.config.files.paths import indexed_prefix
from hecate.data.batches import collate
from hecate.data.encode import encode_source
from hecate.data.files.indexed import IndexedSource
from hecate.data.files.indexed_files import open_indexed
from hecate.data.files.syntax import check_syntax
from hecate.data.sources import TokenSource, read_source
from hecate.data.stream import TrainStream
from hecate.errors import UserError
from tests.hecate.data.making import Source, ids_of, with_bad_samples, write_index, write_jsonl

EOS, VOCABULARY, SEQ_LEN = 257, 258, 24
TEXTS = ["a", "The first.", "x" * 200, *(f"Document {number} is {'very ' * (number % 9)}long." for number in range(40))]


def read(path: str, tokenizer: Any, **options: Any) -> TokenSource:
    return read_source(Source(path), tokenizer, **{"seq_len": SEQ_LEN, "vocab_size": VOCABULARY} | with_bad_samples(options))


@pytest.mark.parametrize(
    ("ended", "pieces", "dtype"), [(True, 1, np.uint16), (False, 1, np.int32), (True, 3, np.int64)], ids=["ended", "open", "in sequences"]
)
@pytest.mark.parametrize("packing", [True, False])
def test_the_batches_are_those_of_the_same_text(
    tmp_path: Path, byte_tokenizer: Any, ended: bool, pieces: int, dtype: Any, packing: bool
) -> None:
    """`ended`: as preprocess_data.py --append-eod writes them."""
    lines = write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in TEXTS])
    documents = [ids + [EOS] * ended for ids in ids_of(TEXTS, byte_tokenizer)]
    prefix = write_index(tmp_path / "corpus", documents, dtype, pieces)
    indexed = read(prefix, byte_tokenizer)
    assert isinstance(indexed, IndexedSource)
    text = encode_source(Source(str(lines)), byte_tokenizer, seq_len=SEQ_LEN, vocab_size=VOCABULARY)
    streams = [TrainStream([source], seq_len=SEQ_LEN, packing=packing, sequences_per_step=8, seed=5) for source in (indexed, text)]
    assert len(indexed) == len(text) > len(TEXTS)
    assert indexed.lines.tolist() == text.lines.tolist()
    for step in range(12):
        ours, theirs = (collate(stream.next_step(), EOS, SEQ_LEN) for stream in streams)
        for name, tensor in vars(ours).items():
            assert tensor is None or tensor.equal(getattr(theirs, name)), f"{name} of step {step}"
    state = json.loads(json.dumps(streams[0].state_dict()))
    again = TrainStream([read(prefix + ".idx", byte_tokenizer)], seq_len=SEQ_LEN, packing=packing, sequences_per_step=8, seed=5)
    again.load_state_dict(state)
    assert [sequence.samples for sequence in again.next_step()] == [sequence.samples for sequence in streams[0].next_step()]


def test_other_ids_of_the_same_lengths_are_other_data(tmp_path: Path, byte_tokenizer: Any) -> None:
    digests = [read(write_index(tmp_path / f"corpus{extra}", [[1, 2, 3], [4, extra]]), byte_tokenizer).digest() for extra in (5, 6)]
    assert digests[0] != digests[1]


@pytest.mark.parametrize("given", ["corpus", "corpus.idx", "corpus.bin"])
def test_either_file_and_the_prefix_mean_the_data_set(tmp_path: Path, byte_tokenizer: Any, given: str) -> None:
    write_index(tmp_path / "corpus", [[1, 2, 3]])
    path = str(tmp_path / given)
    assert indexed_prefix(path) == str(tmp_path / "corpus")
    check_syntax([Source(path)], "error")
    assert read(path, byte_tokenizer)[0].targets.tolist() == [2, 3, EOS]
    (tmp_path / "corpus").write_text('{"text": "a"}\n')
    assert indexed_prefix(str(tmp_path / "corpus")) is None, "a file of that very name is itself"


def test_ids_beyond_the_vocabulary_are_refused_whatever_the_policy(tmp_path: Path, byte_tokenizer: Any) -> None:
    prefix = write_index(tmp_path / "corpus", [[1, 2], [3, 4, VOCABULARY], [5]])
    for policy in ("error", "skip"):
        with pytest.raises(UserError, match=r"corpus.bin: document 2 has token id 258, but the model's vocabulary is 0 to 257"):
            read(prefix, byte_tokenizer, on_bad_sample=policy)
    with pytest.raises(UserError, match="document 1 has token id -1"):
        read(write_index(tmp_path / "negative", [[-1, 2]], np.int32), byte_tokenizer)


def test_documents_without_a_token_to_learn(tmp_path: Path, byte_tokenizer: Any) -> None:
    prefix = write_index(tmp_path / "corpus", [[1, 2], [EOS], [], [3]])
    with pytest.raises(UserError, match=r"corpus.bin:2: the document has no token to learn"):
        read(prefix, byte_tokenizer)
    left_out = tmp_path / "left_out.jsonl"
    source = read(prefix, byte_tokenizer, on_bad_sample="skip", quarantine=left_out)
    assert [sample.input_ids.tolist() for sample in source] == [[1, 2], [3]]
    assert (source.counts.kept, source.counts.skipped) == (2, 2)
    assert [(record["line"], record["raw"]) for record in map(json.loads, left_out.open())] == [(2, "[257]"), (3, "[]")]
    with pytest.raises(UserError, match="no usable sample"):
        read(write_index(tmp_path / "empty", [[]]), byte_tokenizer, on_bad_sample="skip")


@pytest.mark.parametrize(
    ("suffix", "change", "words"),
    [
        (".idx", lambda raw: raw[:-3], "it seems cut off"),
        (".idx", lambda raw: b"{}" + raw[2:], "is not an index of Megatron's"),
        (".idx", lambda raw: b"", "is not an index of Megatron's"),
        (".idx", lambda raw: raw[:17] + b"\x07" + raw[18:], "type 7, which are no token ids"),
        (".idx", lambda raw: raw[:9] + b"\x02" + raw[10:], "has version 2"),
        (".idx", lambda raw: raw[:18] + b"\xff" * 8 + raw[26:], "it seems cut off"),
        (".idx", lambda raw: raw[:34] + b"\x01" + raw[35:], "one after the other"),
        (".idx", lambda raw: raw[:-8] + b"\x01" + raw[-7:], "documents that do not hold all"),
        (".bin", lambda raw: raw[:-2], "do not belong together"),
        (".bin", None, "cannot be read"),
    ],
)
def test_damaged_files_are_refused_before_any_process_starts(tmp_path: Path, suffix: str, change: Any, words: str) -> None:
    prefix = write_index(tmp_path / "corpus", [[1, 2, 3], [4, 5]])
    path = tmp_path / f"corpus{suffix}"
    raw = path.read_bytes()
    path.unlink()
    if change is not None:
        path.write_bytes(change(raw))
    with pytest.raises(UserError, match=words):
        check_syntax([Source(prefix + ".idx")], "skip")


def test_megatron_reads_the_same_documents(tmp_path: Path) -> None:
    prefix = write_index(tmp_path / "corpus", [[7, 8, 9], [], [10, 11]], pieces=2)
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    theirs, ours = IndexedDataset(prefix), open_indexed(prefix)
    bounds = theirs.document_indices
    assert [[int(token) for sequence in range(start, end) for token in theirs[sequence]] for start, end in itertools.pairwise(bounds)] == [
        ours.ids[start:end].tolist() for start, end in itertools.pairwise(ours.bounds)
    ]


def test_the_configuration_takes_and_refuses_paths(tmp_path: Path, byte_tokenizer: Any) -> None:
    prefix = write_index(tmp_path / "wiki.v2", ids_of(TEXTS, byte_tokenizer))
    byte_tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {{front_end: megatron, name_or_path: gpt-moe-s, tokenizer: {tmp_path}/tokenizer}}\n"
        f"data: {{train: {prefix}}}\noutput_dir: {tmp_path}/run\nmax_steps: 1\nmoe: {{family: full}}\n"
    )
    assert [source.name for source in load_config(config).data.train] == ["wiki.v2"]
    with pytest.raises(ConfigError, match="applies to text files only"):
        load_config(config, [f"data.train=[{{path: {prefix}, format: text}}]"])
    with pytest.raises(ConfigError, match="fields: applies to files of records only"):
        load_config(config, [f"data.train=[{{path: {prefix}, fields: {{text: body}}}}]"])
    (tmp_path / "wiki.v2.bin").unlink()
    for path in (prefix, prefix + ".idx"):
        with pytest.raises(ConfigError, match="no such file or folder"):
            load_config(config, [f"data.train={path}"])
