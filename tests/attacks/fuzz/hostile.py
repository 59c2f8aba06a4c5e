"""Files made to do harm, other than checkpoints: each tries to run code, to lead outside, or to take memory or time without end."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hecate.adapters.folder import CONFIG, OLD_WEIGHTS, WEIGHTS
from hecate.adapters.sets.set_files import read_set
from hecate.apps.check.drill.outcome import DrillCase
from hecate.apps.federate.codec import decode
from hecate.config import load_config
from hecate.data.files.formats import Fault, read_samples
from hecate.data.files.user_features import read_user_features
from hecate.data.routed_experts import RoutingShape
from hecate.errors import UserError
from hecate.launch.ray_job.status import read_status
from hecate.model.files.safetensors_headers import INDEX, stored_tensors
from hecate.model.files.tensor_shapes import tensor_shapes
from hecate.parallel.cluster.topology_file import load_topology
from hecate.parallel.cost.model_shapes import load_model_shape
from hecate.parallel.values.traces import load_trace
from hecate.report.run_records import read_run
from tests.attacks.fuzz import model_files
from tests.attacks.fuzz.guard import TooLong, watched

SECONDS = 10.0
_MIB = 96
_NOTHING = 1 << 36
"""bytes of a file that has none of them on the disk"""

_HAS_PYARROW = importlib.util.find_spec("pyarrow") is not None


@dataclass(frozen=True)
class HostileFile:
    """One file, or a folder of them."""

    name: str
    write: Callable[[Path], object]
    """write(folder)"""
    read: Callable[[Path], object]
    """read(folder), which must raise a UserError"""
    most_mib: int = _MIB
    """memory that reading may take"""


def tried_file(one: HostileFile, folder: Path, bait: Path) -> DrillCase:
    """Write a file into a folder and read it.

    Args:
        folder: empty.
        bait: a pipe that nobody may open.
    """
    one.write(folder)
    try:
        with watched(SECONDS) as seen:
            problem = not_refused(lambda: one.read(folder), folder)
    except TooLong as late:
        problem = f"took {late}"
    if seen.done:
        problem = f"did {seen.done[0]}"
    elif str(bait) in map(os.path.realpath, seen.opened):
        problem = f"{bait} was opened"
    elif seen.grown > one.most_mib * 2**20:
        problem = f"took {seen.grown / 2**20:.0f} MiB, more than {one.most_mib}"
    return DrillCase(one.name, problem)


def not_refused(read: Callable[[], object], folder: Path) -> str:
    """What is wrong where a file should be refused with a short text that names it or a file in its folder."""
    try:
        read()
    except UserError as error:
        text = str(error)
        return "" if str(folder) in text and len(text) < 1000 else f"the text does not name the file, or is long: {text[:100]}"
    except TooLong:
        raise
    except BaseException as error:  # noqa: BLE001 - any other error is a fault of the reader
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return "was read"


def _file(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def _sparse(name: str, content: bytes) -> Callable[[Path], object]:
    """The content, and 64 GiB of zeros that take no room on the disk."""

    def write(folder: Path) -> None:
        (folder / name).write_bytes(content)
        os.truncate(folder / name, _NOTHING)

    return write


def _samples(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        for one in read_samples(folder / name):
            if isinstance(one, Fault):
                raise UserError(f"{one.place}: {one.reason}")

    return read


def _config(folder: Path) -> object:
    return load_config(folder / "config.yaml")


def _topology(folder: Path) -> object:
    return load_topology(folder / "topology.yaml")


def _adapter(folder: Path) -> object:
    return read_set(folder / "adapter")


def _trace(folder: Path) -> object:
    return load_trace(folder / "loads.npz")


def _gguf(folder: Path) -> object:
    return tensor_shapes(folder / "model.gguf")


_CALL = b"cposix\nsystem\n(S'touch ran'\ntR."
"""a pickle that calls os.system"""


def _with(change: Callable[[dict[str, Any]], object], write: Callable[[Path], None]) -> Callable[[Path], object]:
    """An adapter with another description."""

    def write_changed(folder: Path) -> None:
        write(folder)
        path = folder / "adapter" / CONFIG
        value = json.loads(path.read_bytes())
        change(value)
        path.write_text(json.dumps(value), encoding="utf-8")

    return write_changed


def _instead(write: Callable[[Path], None], name: str, content: bytes, sparse: bool = False) -> Callable[[Path], object]:
    """An adapter with other bytes for its tensors."""

    def write_changed(folder: Path) -> None:
        write(folder)
        (folder / "adapter" / WEIGHTS).unlink()
        (_sparse if sparse else _file)(name, content)(folder / "adapter")

    return write_changed


def _torch_file() -> bytes:
    """What torch.save writes, with a pickle that calls os.system."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as packed:
        packed.writestr("a/data.pkl", _CALL)
        packed.writestr("a/version", "3\n")
    return made.getvalue()


def _safetensors(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def _index(name: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}), encoding="utf-8")
        (folder.parent / "beside.safetensors").write_bytes(_safetensors({}))

    return write


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _gguf_file(keys: int, key: bytes) -> Callable[[Path], object]:
    return _file("model.gguf", struct.pack("<4sIQQ", b"GGUF", 3, 0, keys) + _text("a") + key)


def _npy(shape: str, kind: str = "'<i4'", numbers: bytes = b"") -> bytes:
    text = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + numbers


def _npz(name: str, **arrays: bytes) -> Callable[[Path], object]:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as packed:
        for array, content in arrays.items():
            packed.writestr(f"{array}.npy", content)
    return _file(name, made.getvalue())


def _packed(megabytes: int, before: bytes) -> bytes:
    """A gzip file of `before` and so many MiB of blanks, a thousandth as long. It has no end, where its checksum would stand."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    head = packer.compress(before) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(b" " * 2**20) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + block * megabytes


def _repeated_text(folder: Path) -> None:
    """A Parquet file of some KB in whose rows one text of a MiB stands 100,000 times."""
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100_000, pyarrow.int32()), pyarrow.array(["x" * 2**20]))
    # The type in the file is that of plain text: who reads it gets each text anew.
    pyarrow.parquet.write_table(pyarrow.table({"note": texts}), folder / "data.parquet", store_schema=False, compression="gzip")


def _routing(folder: Path) -> None:
    import base64

    promise = base64.b64encode(_npy("(1099511627776, 2, 2)")).decode()
    (folder / "data.jsonl").write_text(json.dumps({"text": "a", "routed_experts": promise}), encoding="utf-8")


def _read_routing(folder: Path) -> None:
    record = json.loads((folder / "data.jsonl").read_bytes())
    try:
        RoutingShape((3, 3), 2).routing(record)
    except Exception as error:
        raise (UserError(f"{folder}: {error}") if type(error).__name__ == "BadRoutingError" else error) from error


_LAUGHS = b"".join(b"x%d: &x%d [%s]\n" % (n, n, b", ".join([b"*x%d" % (n - 1)] * 9) if n else b"a, a") for n in range(14))
_LINKS = b"intra_node: {bandwidth: 1.0e+9, latency: 1.0e-5}\n"
_HEADER = json.dumps(
    {"version": 1, "steps": [1], "layers": [0], "num_experts": [1], "top_k": 1, "tokens_per_rank": 1, "model": "", "notes": {}}
).encode()
_TRACE_HEADER = _npy(f"({len(_HEADER)},)", "'|u1'", _HEADER)
_LORA, _MIXTURE = model_files.write_lora, model_files.write_mixture

HOSTILE: tuple[HostileFile, ...] = (
    HostileFile(
        "a configuration with a tag that calls",
        _file("config.yaml", b"output_dir: !!python/object/apply:os.system ['touch ran']\n"),
        _config,
    ),
    HostileFile("a configuration of aliases of aliases", _file("config.yaml", b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"), _config),
    HostileFile("a configuration nested 20,000 times", _file("config.yaml", b"x: " + b"[" * 20_000 + b"\n"), _config),
    HostileFile("a configuration that asks for a secret", _file("config.yaml", b"output_dir: ${oc.env:HOME}\n"), _config),
    HostileFile("a configuration that is a pipe", lambda folder: os.mkfifo(folder / "config.yaml"), _config),
    HostileFile("a configuration that never ends", lambda folder: (folder / "config.yaml").symlink_to("/dev/zero"), _config),
    HostileFile("a topology with a tag that calls", _file("topology.yaml", b"!!python/object/apply:os.system ['touch ran']\n"), _topology),
    HostileFile("a topology of aliases of aliases", _file("topology.yaml", _LAUGHS + b"nodes: *x13\n" + _LINKS), _topology),
    HostileFile("a topology that holds itself", _file("topology.yaml", b"nodes: &a [*a]\n" + _LINKS), _topology),
    HostileFile("a topology nested 100,000 times", _file("topology.yaml", b"nodes: " + b"[" * 100_000), _topology),
    HostileFile(
        "a topology of 10^15 devices",
        _file("topology.yaml", b"nodes: [{devices: 1000000000000000, flops: 1, memory: 1}]\n" + _LINKS),
        _topology,
    ),
    HostileFile("a topology of 64 GiB", _sparse("topology.yaml", b"nodes: []\n"), _topology),
    HostileFile(
        "a model's shape with a day that there is not",
        _file("shape.yaml", b"kind: 2001-99-99\n"),
        lambda folder: load_model_shape(folder / "shape.yaml"),
    ),
    HostileFile("JSON nested 100,000 times", _file("a.json", b"[" * 100_000), _samples("a.json")),
    HostileFile("JSON objects nested 50,000 times", _file("b.json", b'{"a": ' * 50_000), _samples("b.json")),
    HostileFile("a packed file that is broken", _file("c.jsonl.gz", b"\x1f\x8b\x08\x00broken"), _samples("c.jsonl.gz")),
    HostileFile("a packed line of 4 GiB in 4 MB", _file("d.jsonl.gz", _packed(4096, b'{"text": "')), _samples("d.jsonl.gz"), 400),
    HostileFile("a packed list whose text has 4 GiB", _file("e.json.gz", _packed(4096, b'[{"text": "')), _samples("e.json.gz"), 1000),
    HostileFile("a packed cell of 4 GiB", _file("f.csv.gz", _packed(4096, b'text\n"')), _samples("f.csv.gz"), 1000),
    HostileFile(
        "a packed file and 64 GiB of zeros", _sparse("g.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0)), _samples("g.jsonl.gz")
    ),
    HostileFile("samples that are a pipe", lambda folder: os.mkfifo(folder / "a.jsonl"), _samples("a.jsonl")),
    HostileFile("samples that never end", lambda folder: (folder / "a.jsonl").symlink_to("/dev/zero"), _samples("a.jsonl")),
    HostileFile("a table of 300,000 columns", _file("a.csv", b"a," * 300_000 + b"b\n1\n"), _samples("a.csv")),
    *([HostileFile("a table that says 100,000 times the same MiB", _repeated_text, _samples("data.parquet"), 400)] if _HAS_PYARROW else []),
    HostileFile("routing that promises 16 TB", _routing, _read_routing),
    HostileFile("an adapter that is a pickle", _instead(_MIXTURE, OLD_WEIGHTS, _CALL), _adapter),
    HostileFile("an adapter of torch's that holds a call", _instead(_MIXTURE, OLD_WEIGHTS, _torch_file()), _adapter),
    HostileFile(
        "an adapter of a million layers",
        _with(lambda value: value["hecate"].update(num_layers=10**6, num_experts=None), _MIXTURE),
        _adapter,
    ),
    HostileFile("an adapter of 10^18 layers", _with(lambda value: value["hecate"].update(num_layers=10**18), _MIXTURE), _adapter),
    HostileFile(
        "an adapter whose pattern takes years", _with(lambda value: value.update(rank_pattern={"(([a-z0-9._])+)+!": 2}), _LORA), _adapter
    ),
    HostileFile("an adapter with a header of 2^60 bytes", _instead(_LORA, WEIGHTS, struct.pack("<Q", 2**60) + bytes(99)), _adapter),
    HostileFile(
        "an adapter that keeps a promise of 64 GiB",
        _instead(_LORA, WEIGHTS, _safetensors({"a": {"dtype": "F32", "shape": [2**33], "data_offsets": [0, 2**35]}}), sparse=True),
        _adapter,
    ),
    HostileFile("a base model that leads up", _index("../beside.safetensors"), stored_tensors),
    HostileFile("a base model in /etc", _index("/etc/passwd"), stored_tensors),
    HostileFile("a base model in a device", _index("/dev/zero"), stored_tensors),
    HostileFile(
        "a base model that begins at infinity",
        _file("model.safetensors", _safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [float("inf"), 4]}})),
        stored_tensors,
    ),
    HostileFile("GGUF arrays nested 50,000 times", _gguf_file(1, struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50_000), _gguf),
    HostileFile("a GGUF array of 2^63 numbers", _gguf_file(2, struct.pack("<IIQ", 9, 10, 2**63)), _gguf),
    HostileFile("2^62 GGUF keys", _gguf_file(2**62, struct.pack("<II", 4, 1)), _gguf),
    HostileFile("a trace of Python objects", _npz("loads.npz", header=_TRACE_HEADER, loads=_npy("(1,)", "'|O'", _CALL)), _trace),
    HostileFile("a trace that promises 1 TB", _npz("loads.npz", header=_TRACE_HEADER, loads=_npy("(1, 1, 1, 268435456000)")), _trace),
    HostileFile("a trace that is no archive but a pickle", _file("loads.npz", _CALL), _trace),
    HostileFile(
        "users' names of 2 GB each",
        _npz("users.npz", ids=_npy("(1,)", "'<U500000000'"), features=_npy("(1, 1)", "'<f4'", bytes(4))),
        lambda folder: read_user_features(folder / "users.npz"),
    ),
    HostileFile("a status nested 200,000 times", _file("status.json", b"[" * 200_000), read_status),
    HostileFile("a status of 64 GiB", _sparse("status.json", b"{"), read_status),
    HostileFile("metrics of 64 GiB in one line", _sparse("metrics.jsonl", b'{"kind": "step"'), read_run, 256),
    HostileFile(
        "a message of 2^60 numbers",
        _file("message", struct.pack("<4sBBBxQQQ", b"HECV", 1, 1, 0, 2**60, 2**60, 0)),
        lambda folder: _message(folder),
    ),
)


def _message(folder: Path) -> None:
    try:
        decode((folder / "message").read_bytes(), 2**40)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
