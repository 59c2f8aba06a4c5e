"""Arrays are read as numpy reads them, unless their headers promise what is not there."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from hecate.io.npz import ArrayError, array_of, read_npz


def promising(shape: str, kind: str = "<i4") -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def test_arrays_that_numpy_has_written_are_read(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6).reshape(2, 3).T, "b": np.array(["x", "yz"]), "c": np.zeros((1000, 1000))}
    for write in (np.savez, np.savez_compressed):
        write(tmp_path / "a.npz", **arrays)
        found = read_npz(tmp_path / "a.npz", ("b", "a", "c"))
        assert all(np.array_equal(found[name], arrays[name]) and found[name].dtype == arrays[name].dtype for name in arrays)
    made = io.BytesIO()
    np.save(made, arrays["a"])
    assert np.array_equal(array_of(made.getvalue()), arrays["a"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (promising("(1099511627776,)"), "are not in the file"),
        (promising("(0, -1)"), "shape"),
        (promising("(1,)", "|O") + bytes(8), "Python objects"),
        (promising("(2,)") + bytes(7), "expected 8 bytes got 7|are not in the file"),
        (promising("(" * 300 + ")" * 300), "."),
        (b"\x80\x04", "magic"),
    ],
    ids=["a promise", "negative", "objects", "cut", "nested", "a pickle"],
)
def test_what_is_not_there_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as packed:
        packed.writestr("a.npy", content)
    with pytest.raises(ArrayError, match=words):
        read_npz(tmp_path / "a.npz", ("a",))
    with pytest.raises(ArrayError):
        array_of(content)


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, a=np.zeros(9))
    with pytest.raises(ArrayError, match="no array 'b', but a"):
        read_npz(path, ("b",))
    monkeypatch.setattr("os.sysconf", lambda _: 10)  # a machine of 100 bytes
    with pytest.raises(ArrayError, match="a quarter of the memory"):
        read_npz(path, ("a",))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ArrayError, match="not a zip file"):
        read_npz(path, ("a",))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as packed:
        packed.writestr("a.npy", promising("(0,)"))
    with pytest.raises(ArrayError, match="another way"):
        read_npz(path, ("a",))
