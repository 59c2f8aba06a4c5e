"""Tensors are read back bit for bit, other safetensors readers accept the files, and every changed bit is detected."""

import random
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hecate.checkpoint import CheckpointError, read_manifest
from hecate.checkpoint.shard import DTYPES, read_tensors
from tests.hecate.checkpoint.saving import load, save, shards_of


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any dtype, 0 to 3 dims of 0 to 4, any bits (NaNs with payload too)."""
    dtype = draw(st.sampled_from(sorted(DTYPES.values(), key=str)))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    numel = int(torch.tensor(shape, dtype=torch.int64).prod())
    raw = draw(st.binary(min_size=8 * numel, max_size=8 * numel))
    if numel == 0:
        return torch.empty(shape, dtype=dtype)
    if dtype is torch.bool:
        return torch.tensor([byte % 2 == 1 for byte in raw[:numel]]).reshape(shape)
    return torch.frombuffer(bytearray(raw), dtype=dtype)[:numel].reshape(shape)


@settings(max_examples=40, deadline=None)
@given(st.lists(tensors(), max_size=6), st.integers(1, 3))
def test_round_trip_of_any_bits(tmp_path_factory: pytest.TempPathFactory, given: list, world_size: int) -> None:
    shards = [{f"t{i}": t for i, t in enumerate(given) if i % world_size == rank} for rank in range(world_size)]
    folder = save(tmp_path_factory.mktemp("run"), 1, shards)
    found = load(folder)
    assert set(found) == {f"t{i}" for i in range(len(given))}
    for i, tensor in enumerate(given):
        assert found[f"t{i}"].dtype == tensor.dtype
        assert found[f"t{i}"].shape == tensor.shape
        assert bits(found[f"t{i}"]) == bits(tensor)


def test_named_dtypes_and_shapes(tmp_path: Path) -> None:
    shard = {
        "bf16": torch.tensor([1.5, -2.0, float("nan")], dtype=torch.bfloat16),
        "fp64": torch.tensor([[1e-300, 2.0]], dtype=torch.float64),
        "int64": torch.tensor([2**62, -1]),
        "empty": torch.empty(0, 7),
        "scalar": torch.tensor(3.25),
        "transposed": torch.arange(6).reshape(2, 3).t(),
        "view_of_one_row": torch.arange(6.0).reshape(2, 3)[1],
        "trained": torch.nn.Parameter(torch.ones(2)),
    }
    found = load(save(tmp_path, 1, [shard]))
    assert found["scalar"].shape == ()
    assert found["empty"].shape == (0, 7)
    assert found["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert found["view_of_one_row"].tolist() == [3.0, 4.0, 5.0]
    for name in shard:
        assert (found[name].dtype, bits(found[name])) == (shard[name].dtype, bits(shard[name].detach())), name


def test_other_readers_of_safetensors_read_a_shard(tmp_path: Path) -> None:
    shard = {
        "b": torch.arange(3, dtype=torch.bfloat16),
        "a": torch.arange(5.0),
        "z": torch.empty(0),
        "s": torch.tensor(2),
    }
    folder = save(tmp_path, 1, [shard])
    found = load_file(folder / "rank-00000-of-00001.safetensors")
    assert found.keys() == shard.keys()
    assert all(torch.equal(found[name], shard[name]) for name in shard)


def test_shards_of_four_ranks_read_by_one_and_by_name(tmp_path: Path) -> None:
    folder = save(tmp_path, 3, shards_of(10.0, world_size=4))
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.world_size, len(manifest.files)) == (3, 4, 4)
    found = read_tensors(folder, manifest, ["expert.2.master", "expert.0.step"])
    assert list(found) == ["expert.2.master", "expert.0.step"]
    assert found["expert.2.master"].tolist() == [[12.0] * 5] * 3
    assert [load(folder)[f"expert.{rank}.master"][0, 0].item() for rank in range(4)] == [10.0, 11.0, 12.0, 13.0]


def test_a_name_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 3, shards_of(1.0))
    with pytest.raises(CheckpointError, match=r"no tensor 'expert\.9\.master'"):
        read_tensors(folder, read_manifest(folder), ["expert.0.master", "expert.9.master"])


def test_a_damaged_tensor_is_named_with_its_file(tmp_path: Path) -> None:
    folder = save(tmp_path, 3, shards_of(1.0))
    path = folder / "rank-00001-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # the 4-byte items come after the 8-byte ones: the file ends with the master
    path.write_bytes(data)
    manifest = read_manifest(folder)
    with pytest.raises(CheckpointError, match=r"rank-00001-of-00002\.safetensors: tensor expert\.1\.master"):
        read_tensors(folder, manifest)
    assert read_tensors(folder, manifest, ["expert.0.master", "expert.1.step"])["expert.1.step"] == 1


def test_every_bit_flip_is_found(tmp_path: Path) -> None:
    folder = save(tmp_path, 3, shards_of(1.0))
    files = [(path, path.read_bytes()) for path in sorted(folder.iterdir())]
    assert len(files) == 4
    draw = random.Random(0)
    flips = [(path, data, draw.randrange(8 * len(data))) for path, data in files for _ in range(150)]
    header = struct.unpack("<Q", files[2][1][:8])[0]
    flips += [(files[2][0], files[2][1], bit) for bit in range(8 * 8)]  # the header's length
    flips += [(files[2][0], files[2][1], 8 * (8 + header) - 1)]  # the last bit of the header, often only padding
    for path, data, bit in flips:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            load(folder)
        path.write_bytes(data)
    assert load(folder)


@pytest.mark.parametrize("cut", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b""])
def test_a_file_of_another_length_is_found(tmp_path: Path, cut) -> None:  # type: ignore[no-untyped-def]
    folder = save(tmp_path, 3, shards_of(1.0))
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        path.write_bytes(cut(data))
        with pytest.raises(CheckpointError, match=path.name.replace(".", r"\.") if "rank" in path.name else "manifest"):
            read_manifest(folder)
        path.write_bytes(data)


@pytest.mark.parametrize(
    "shard",
    [{"has blank": torch.ones(1)}, {"__metadata__": torch.ones(1)}, {"c": torch.ones(1, dtype=torch.complex64)}],
)
def test_what_the_format_cannot_hold_is_our_own_mistake(tmp_path: Path, shard: dict) -> None:
    with pytest.raises(AssertionError):
        save(tmp_path, 1, [shard])
