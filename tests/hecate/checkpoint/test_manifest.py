"""Forged manifests are refused, and no file outside the checkpoint's folder is opened."""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hecate.checkpoint import CheckpointError, read_manifest
from hecate.checkpoint.manifest import parse_manifest
from hecate.io.strict_json import parse_json
from tests.hecate.checkpoint.disk import watched_disk
from tests.hecate.checkpoint.saving import load, rewrite_manifest, save, shards_of

SHARD = "rank-00000-of-00002.safetensors"
MASTER = "expert.0.master"  # F32 (3, 5), 60 bytes
HUGE = 10**4000


def set_in(*path_and_value: Any):  # type: ignore[no-untyped-def]
    *path, last, new = path_and_value

    def change(value: Any) -> None:
        for key in path:
            value = value[key]
        value[last] = new

    return change


def drop(*path: str):  # type: ignore[no-untyped-def]
    def change(value: Any) -> None:
        for key in path[:-1]:
            value = value[key]
        del value[path[-1]]

    return change


def point_all_at(file: str):  # type: ignore[no-untyped-def]
    """Rename rank 0's file to `file` everywhere, sizes kept: consistent but for where it lies."""

    def change(value: Any) -> bytes:
        return json.dumps(value).replace(SHARD, file).encode()

    return change


def text(old: str, new: str):  # type: ignore[no-untyped-def]
    def change(value: Any) -> bytes:
        assert old in json.dumps(value)
        return json.dumps(value).replace(old, new, 1).encode()

    return change


HOSTILE = {
    "path up": point_all_at("../outside/" + SHARD),
    "path absolute": point_all_at("/etc/passwd"),
    "path in a subfolder": point_all_at("sub/" + SHARD),
    "path with a NUL": point_all_at("rank\\u0000"),
    "path empty": point_all_at(""),
    "path is the manifest": point_all_at("manifest.json"),
    "tensor's file unknown": set_in("tensors", MASTER, "file", "rank-00002-of-00002.safetensors"),
    "tensor's file a number": set_in("tensors", MASTER, "file", 7),
    "tensor in another rank's file": set_in("tensors", MASTER, "file", "rank-00001-of-00002.safetensors"),
    "no files": set_in("files", {}),
    "files a list": set_in("files", [SHARD]),
    "one file missing": drop("files", SHARD),
    "size wrong": set_in("files", SHARD, 1),
    "size negative": set_in("files", SHARD, -1),
    "size huge": set_in("files", SHARD, HUGE),
    "size true": set_in("files", SHARD, True),
    "size text": set_in("files", SHARD, "100"),
    "world size 0": set_in("world_size", 0),
    "world size huge": set_in("world_size", HUGE),
    "world size 1": set_in("world_size", 1),
    "world size 99999": set_in("world_size", 99999),
    "world size float": set_in("world_size", 2.0),
    "step of another": set_in("step", 4),
    "step negative": set_in("step", -3),
    "step huge": set_in("step", HUGE),
    "step null": set_in("step", None),
    "newer version": set_in("version", 2),
    "version huge": set_in("version", HUGE),
    "version text": set_in("version", "1"),
    "another format": set_in("format", "other"),
    "no format": drop("format"),
    "no tensors": drop("tensors"),
    "no meta": drop("meta"),
    "unknown field": set_in("extra", 1),
    "tensors a list": set_in("tensors", []),
    "tensor a list": set_in("tensors", MASTER, []),
    "tensor's name blank": set_in("tensors", " ", {}),
    "tensor's name reserved": text(MASTER, "__metadata__"),
    "tensor's name not ASCII": text(MASTER, "expert.\\ud800"),
    "tensor without digest": drop("tensors", MASTER, "xxh3_128"),
    "tensor with more": set_in("tensors", MASTER, "code", "import os"),
    "digest short": set_in("tensors", MASTER, "xxh3_128", "00"),
    "digest a number": set_in("tensors", MASTER, "xxh3_128", 0),
    "dtype unknown": set_in("tensors", MASTER, "dtype", "O"),
    "dtype a list": set_in("tensors", MASTER, "dtype", ["F32"]),
    "dtype wider": set_in("tensors", MASTER, "dtype", "F64"),
    "shape negative": set_in("tensors", MASTER, "shape", [-3, -5]),
    "shape huge": set_in("tensors", MASTER, "shape", [HUGE]),
    "shape overflows": set_in("tensors", MASTER, "shape", [2**32, 2**32]),
    "shape empty but overflowing": set_in("tensors", MASTER, "shape", [0, 2**61, 2**61]),
    "shape of true": set_in("tensors", MASTER, "shape", [True, 15]),
    "shape of floats": set_in("tensors", MASTER, "shape", [3.0, 5.0]),
    "shape a number": set_in("tensors", MASTER, "shape", 15),
    "shape of 1000 dims": set_in("tensors", MASTER, "shape", [1] * 1000 + [15]),
    "shape larger": set_in("tensors", MASTER, "shape", [3, 6]),
    "not an object": lambda value: [value],
    "null": lambda value: b"null",
    "nothing": lambda value: b"",
    "not JSON": lambda value: b"\x80\x04cposix\nsystem\n",
    "not UTF-8": lambda value: b'{"format": "\xff"}',
    "nested deep": lambda value: b"[" * 200_000 + b"]" * 200_000,
    "nested deep in meta": text('"config"', '"x": ' + "[" * 100_000 + "]" * 100_000 + ', "config"'),
    "NaN": text("2.5", "NaN"),
    "infinite": text("2.5", "1e999"),
    "number of 5000 digits": text('"step": 3', '"step": ' + "3" * 5000),
    "field twice": text('"step": 3', '"step": 3, "step": 3'),
    "tensor twice": text('"tensors": {', '"tensors": {"' + MASTER + '": {}, '),
    "two values": lambda value: json.dumps(value).encode() * 2,
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("run"), 3, shards_of(1.0))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused_and_nothing_outside_is_opened(tmp_path: Path, sound: Path, name: str) -> None:
    folder = tmp_path / "run" / "checkpoint-3"
    shutil.copytree(sound, folder)
    for outside in (tmp_path / "run" / "outside", folder / "sub"):  # the bait is a sound shard
        outside.mkdir()
        shutil.copy(sound / SHARD, outside)
    rewrite_manifest(folder, HOSTILE[name])
    opened: list[Path] = []

    def note(number: int, operation: str, args: tuple) -> None:
        opened.append(Path(args[0]))

    with pytest.raises(CheckpointError) as caught, watched_disk(note):
        load(folder)
    assert opened
    assert all(path.parent == folder for path in opened)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_rewriting_the_manifest_alone_changes_nothing(tmp_path: Path, sound: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(sound, folder)
    rewrite_manifest(folder, lambda value: None)
    assert len(load(folder)) == 4


@pytest.mark.parametrize("file", [SHARD, "manifest.json", "COMMIT"])
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder", "missing"])
def test_only_plain_files_are_read(tmp_path: Path, sound: Path, file: str, kind: str) -> None:
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(sound, folder)
    shutil.move(folder / file, tmp_path / "moved")
    if kind == "link":
        (folder / file).symlink_to(tmp_path / "moved")
    elif kind == "dangling":
        (folder / file).symlink_to(tmp_path / "nowhere")
    elif kind == "pipe":
        os.mkfifo(folder / file)
    elif kind == "folder":
        (folder / file).mkdir()
    with pytest.raises(CheckpointError, match=file.replace(".", r"\.")):
        load(folder)


def test_a_sparse_file_that_keeps_a_huge_promise_is_refused_without_its_memory(tmp_path: Path, sound: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(sound, folder)
    terabytes = 2**43

    def grow(value: Any) -> None:
        old = value["tensors"][MASTER]["shape"]
        value["tensors"][MASTER]["shape"] = [terabytes // 4]
        # The header is rewritten with other digits; build it as the reader will.
        entries = parse_entries_of(value)
        value["files"][SHARD] = file_size(entries)
        with open(folder / SHARD, "r+b") as file:
            file.write(file_layout(entries)[0])
            file.truncate(file_size(entries))
        assert old == [3, 5]

    from hecate.checkpoint.layout import file_layout, file_size
    from hecate.checkpoint.manifest import parse_entries

    def parse_entries_of(value: Any) -> Any:
        return {name: entry for name, entry in parse_entries(value["tensors"]).items() if entry.file == SHARD}

    rewrite_manifest(folder, grow)
    with pytest.raises(CheckpointError, match=rf"{SHARD}: tensor {MASTER}: no memory for {terabytes} bytes"):
        load(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="checkpoint-9: there is no such folder"):
        read_manifest(tmp_path / "checkpoint-9")


def test_a_copy_under_another_name_is_read_but_not_under_another_step(tmp_path: Path, sound: Path) -> None:
    shutil.copytree(sound, tmp_path / "best")
    assert read_manifest(tmp_path / "best").step == 3
    shutil.copytree(sound, tmp_path / "checkpoint-30")
    with pytest.raises(CheckpointError, match="is of step 3"):
        read_manifest(tmp_path / "checkpoint-30")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_value_anywhere_is_read_or_refused(sound: Path, data: st.DataObject) -> None:
    value = parse_json((sound / "manifest.json").read_bytes())
    spot, key = {"": value}, ""
    while isinstance(spot[key], dict) and spot[key] and data.draw(st.integers(0, 4)):
        spot, key = spot[key], data.draw(st.sampled_from(sorted(spot[key])))
    original = copy.deepcopy(spot[key])
    spot[key] = data.draw(JSON)
    changed = json.loads(json.dumps(value)) if key else spot[key]
    try:
        manifest, _ = parse_manifest(changed)
    except CheckpointError:
        assert spot[key] != original or type(spot[key]) is not type(original)
    else:
        assert manifest.world_size == 2
