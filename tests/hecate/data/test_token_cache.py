"""Tokenized sources on disk are what tokenizing in memory gives, are written once, and are not believed when they are damaged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from hecate.config.schema import DataSource, FieldNames
from hecate.data import content, token_cache
from hecate.data.content import cache_folder
from hecate.data.encode import BadSamples, EncodedSource, encode_samples, encode_source
from hecate.data.files.syntax import check_syntax
from hecate.data.files.user_features import UserFeatures
from hecate.data.sources import read_source
from hecate.data.stream import TrainStream
from hecate.data.token_cache import MappedSource, _host, cached_source
from hecate.errors import UserError
from testing.byte_tokenizer import build_byte_tokenizer
from tests.hecate.data.making import chat, write_jsonl

RULES: dict[str, Any] = {"seq_len": 64, "vocab_size": 258, "bad": BadSamples("skip")}
RECORDS: list[Any] = [chat("q" * (i % 7), "a" * (i % 90)) | {"user": f"u{i % 3}"} for i in range(1, 400)]
USERS = UserFeatures("users.npz", np.eye(3), {"u0": 0, "u1": 1, "u2": 2})


@pytest.fixture
def data(tmp_path: Path) -> DataSource:
    return DataSource(path=str(write_jsonl(tmp_path / "data.jsonl", [*RECORDS, b"{oops\n"])), name="data")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = cache_folder(str(tmp_path / "cache"))
    assert found is not None
    return found


@pytest.fixture
def tokenizings() -> Iterator[mock.Mock]:
    """Counts how often a source is tokenized."""
    with mock.patch.object(token_cache, "encode_samples", wraps=token_cache.encode_samples) as counted:
        yield counted


def sources_in(folder: Path) -> list[Path]:
    return [path.parent for path in folder.glob("*/meta.json")]


def same(one: EncodedSource, other: EncodedSource) -> bool:
    arrays = [(source.input_ids, source.targets, source.starts, source.lines, source.users) for source in (one, other)]
    equal = all(np.array_equal(a, b) for a, b in zip(*arrays, strict=True) if a is not None)
    return equal and (one.digest(), one.counts) == (other.digest(), other.counts)


@pytest.mark.parametrize("users", [None, USERS])
@pytest.mark.parametrize("buffered", [1, 1 << 20])
def test_the_disk_holds_what_memory_would(
    data: DataSource, folder: Path, byte_tokenizer: Any, users: Any, buffered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "_BUFFERED", buffered)
    monkeypatch.setattr(token_cache, "_BLOCK", 100)
    mapped = cached_source(data, byte_tokenizer, folder, users=users, **RULES)
    plain = encode_source(data, byte_tokenizer, users=users, **RULES)
    assert same(mapped, plain)
    assert mapped.counts.skipped > 50
    streams = [TrainStream([source], seq_len=64, packing=True, sequences_per_step=4, seed=1) for source in (mapped, plain)]
    for _ in range(60):
        first, second = (stream.next_step() for stream in streams)
        assert [(one.input_ids.tolist(), one.targets.tolist()) for one in first] == [
            (one.input_ids.tolist(), one.targets.tolist()) for one in second
        ]
    assert mapped.compared.all()
    assert json.dumps(streams[0].state_dict()) == json.dumps(streams[1].state_dict())


def test_a_source_is_tokenized_once_wherever_its_file_lies(
    data: DataSource, folder: Path, tmp_path: Path, byte_tokenizer: Any, tokenizings: mock.Mock, caplog: pytest.LogCaptureFixture
) -> None:
    first = cached_source(data, byte_tokenizer, folder, **RULES | {"bad": BadSamples("skip", tmp_path / "first")})
    moved = DataSource(path=str(tmp_path / "moved.jsonl"), name="other", weight=3.0)
    os.rename(data.path, moved.path)
    caplog.clear()
    again = cached_source(moved, byte_tokenizer, folder, **RULES | {"bad": BadSamples("skip", tmp_path / "again")})
    assert tokenizings.call_count == 1
    assert same(first, again)
    assert (again.name, again.weight, again.path) == ("other", 3.0, moved.path)
    assert f"samples skipped; the first is {moved.path}:" in caplog.text
    before, after = ((tmp_path / name).read_text().replace("moved.jsonl", "data.jsonl") for name in ("first", "again"))
    assert before == after
    assert json.loads(before.splitlines()[-1])["raw"] == "{oops"


def test_whatever_changes_the_tokens_makes_another_folder(
    data: DataSource, folder: Path, tmp_path: Path, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    long = DataSource(path=str(write_jsonl(tmp_path / "long.jsonl", [chat("q", "a"), chat("q", "a" * 100)])))
    for name in ("a.csv", "a.tsv"):  # a table of one column either way, whose cells only a tab ends
        Path(name).write_text("text\na\tb\nc\n")
    others = [
        (data, byte_tokenizer, {}),
        (data, byte_tokenizer, {"seq_len": 65}),
        (data, byte_tokenizer, {"vocab_size": 300}),
        (data, byte_tokenizer, {"bad": BadSamples("skip"), "users": USERS}),
        (DataSource(path=data.path, format="messages"), byte_tokenizer, {}),
        (data, build_byte_tokenizer(chat_template="{# another #}" + byte_tokenizer.chat_template), {}),
        (data, build_byte_tokenizer(additional_special_tokens=["aa"]), {}),
        (data, build_byte_tokenizer(split_special_tokens=True), {}),
        (DataSource(path=data.path, fields=FieldNames(messages="messages")), byte_tokenizer, {}),
        *((long, byte_tokenizer, {"bad": BadSamples(rule)}) for rule in ("skip", "skip_long", "truncate")),
        *((DataSource(path=path), byte_tokenizer, {}) for path in ("a.csv", "a.tsv")),
    ]
    for source, tokenizer, rules in others:
        cached_source(source, tokenizer, folder, **RULES | rules)
    # In place, of the same size and with the old time of change.
    stat = os.stat(data.path)
    raw = Path(data.path).read_bytes()
    Path(data.path).write_bytes(raw.replace(b"qqq", b"qrq"))
    os.utime(data.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    cached_source(data, byte_tokenizer, folder, **RULES)
    assert len(sources_in(folder)) == len(others) + 1


def test_a_file_that_lies_still_is_not_digested_again(data: DataSource, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = content.digest_of_files(data.path, folder)
    assert not list(folder.glob("files/*")), "it has just changed, and may change again within one tick of the clock"
    monkeypatch.setattr(content, "_SETTLED", -1)
    assert content.digest_of_files(data.path, folder) == digest
    with mock.patch.object(content.xxhash, "xxh3_128", side_effect=AssertionError("digested again")):
        assert content.digest_of_files(data.path, folder) == digest
    Path(data.path).write_bytes(b"{}\n")
    assert content.digest_of_files(data.path, folder) != digest


def test_processes_that_come_at_once_tokenize_once(data: DataSource, folder: Path, byte_tokenizer: Any, tokenizings: mock.Mock) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: cached_source(data, byte_tokenizer, folder, **RULES), range(4)))
    assert tokenizings.call_count == 1
    assert all(same(found[0], other) for other in found)


def spoil(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("name", ["meta.json", "starts.i64", "numbers.i64", "sums.u64", "skipped.jsonl", "ids.i32"])
@pytest.mark.parametrize("damage", ["gone", "cut off", "changed"])
def test_a_damaged_folder_is_made_again(
    data: DataSource, folder: Path, byte_tokenizer: Any, tokenizings: mock.Mock, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = encode_source(data, byte_tokenizer, **RULES)
    cached_source(data, byte_tokenizer, folder, **RULES)
    (place,) = sources_in(folder)
    if damage == "gone":
        (place / name).unlink()
    elif damage == "cut off":
        (place / name).write_bytes((place / name).read_bytes()[:-8])
    elif name == "ids.i32":
        return  # noticed when it is used; see below
    else:
        counts = (place / "meta.json").read_bytes().index(b'"kept": ') + 8
        spoil(place / name, counts if name == "meta.json" else -16)  # another number, but sound JSON
    assert same(cached_source(data, byte_tokenizer, folder, **RULES), whole)
    assert tokenizings.call_count == 2
    assert f"{place} is damaged: it is made again" in caplog.text


@pytest.mark.parametrize("name", ["ids.i32", "targets.i32"])
def test_tokens_that_have_changed_are_refused_when_they_are_used(
    data: DataSource, folder: Path, byte_tokenizer: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "_BLOCK", 100)
    cached_source(data, byte_tokenizer, folder, **RULES)
    (place,) = sources_in(folder)
    spoil(place / name, -1)
    source = cached_source(data, byte_tokenizer, folder, **RULES)
    assert len(source[0].input_ids) > 0
    with pytest.raises(UserError, match=rf"{place}: the tokenized data of .* have changed on the disk .*\ndelete that folder, and resume"):
        source[-1]


def test_nothing_is_left_of_a_source_that_cannot_be_tokenized(data: DataSource, folder: Path, byte_tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"data.jsonl:90: an assistant turn is empty"):
        cached_source(data, byte_tokenizer, folder, seq_len=640, vocab_size=258)
    with pytest.raises(UserError, match="no usable sample: all 400 are bad"):
        cached_source(data, byte_tokenizer, folder, **RULES | {"seq_len": 2})
    assert [path for path in folder.iterdir() if path.is_dir() and path.name not in ("files", "checked")] == []


def test_data_that_change_while_they_are_tokenized_are_not_kept(data: DataSource, folder: Path, byte_tokenizer: Any) -> None:
    def meanwhile(*given: Any, **rules: Any) -> Iterator[Any]:
        yield from encode_samples(*given, **rules)
        write_jsonl(Path(data.path), RECORDS[:9])

    told = f"{data.path}: the data have changed while they were tokenized\nstart the run again"
    with mock.patch.object(token_cache, "encode_samples", meanwhile), pytest.raises(UserError, match=told):
        cached_source(data, byte_tokenizer, folder, **RULES)
    assert sources_in(folder) == []


def test_what_a_killed_writer_has_left_is_removed(data: DataSource, folder: Path, byte_tokenizer: Any) -> None:
    cached_source(data, byte_tokenizer, folder, **RULES)
    (place,) = sources_in(folder)
    stale = place.with_name(f"{place.name}.tmp-{_host()}-1234")
    shutil.move(place, stale)
    cached_source(data, byte_tokenizer, folder, **RULES)
    assert sources_in(folder) == [place]
    assert not stale.exists()


def test_a_folder_that_cannot_be_written_is_refused_with_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HECATE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=f"cannot be written to {tmp_path}/file/tokens: "):
        cache_folder("auto")
    with pytest.raises(
        UserError, match=r"tokenized data cannot be written to .*/file: .*\nname another folder with data.cache, or set it to null"
    ):
        cache_folder(str(tmp_path / "file"))


def test_the_folder_is_the_environments_or_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder(None) is None
    monkeypatch.setenv("HECATE_CACHE", str(tmp_path / "own"))
    assert cache_folder("auto") == tmp_path / "own" / "tokens"
    assert (tmp_path / "own" / "tokens").stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("HECATE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("auto") == tmp_path / "hecate" / "tokens"
    (tmp_path / "hecate" / "tokens").chmod(0o775)
    with pytest.raises(UserError, match="others can write to it"):
        cache_folder("auto")
    assert cache_folder(str(tmp_path / "hecate" / "tokens")) == tmp_path / "hecate" / "tokens"  # whoever names it shares it on purpose


def test_a_source_is_cached_where_a_folder_is_given(data: DataSource, folder: Path, byte_tokenizer: Any) -> None:
    assert type(read_source(data, byte_tokenizer, **RULES)) is EncodedSource
    assert type(read_source(data, byte_tokenizer, cache=folder, **RULES)) is MappedSource


def test_records_that_were_found_good_are_not_checked_again(tmp_path: Path, folder: Path) -> None:
    good = DataSource(path=str(write_jsonl(tmp_path / "good.jsonl", RECORDS)))
    with mock.patch("hecate.data.files.syntax.samples_of") as read:
        read.side_effect = lambda *_, **__: iter(())
        for _ in range(2):
            check_syntax([good], "error", None, folder)
        assert read.call_count == 1
        check_syntax([DataSource(path=good.path, format="messages")], "error", None, folder)
        assert read.call_count == 2
        check_syntax([good], "error", None, folder, routed=True)
        assert read.call_count == 3, "without routing they were good"
    bad = DataSource(path=str(write_jsonl(tmp_path / "bad.jsonl", [b"{\n"])))
    for _ in range(2):
        with pytest.raises(UserError, match="not valid JSON"):
            check_syntax([bad], "error", None, folder)
