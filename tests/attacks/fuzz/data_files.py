"""Kinds of files that hold data: samples in every form, their cache, users' features, and recorded loads of experts."""

from __future__ import annotations

import gzip
import importlib.util
import json
import struct
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from hecate.apps.check.drill.tiny_run import build_byte_tokenizer
from hecate.config.schema import DataSource
from hecate.data.chat.template_check import check_template
from hecate.data.encode import BadSamples
from hecate.data.files.syntax import check_syntax
from hecate.data.files.user_features import read_user_features
from hecate.data.routed_experts import RoutingShape, routing_text
from hecate.data.sources import read_source
from hecate.parallel.values.megatron_traces import load_megatron_trace
from hecate.parallel.values.traces import Trace, load_trace, save_trace
from hecate.parallel.values.units import Unit
from tests.attacks.fuzz.file_kinds import FileKind

_ROUTING = RoutingShape((3, 0, 3), 2)
_RECORD_MIB = 400
"""of a text that may be one record of 128 MiB"""


@cache
def _tokenizer() -> Any:
    return build_byte_tokenizer()


_CALLS = [{"id": "1", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}]
_TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
_RECORDS: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {"messages": _TURNS, "id": 7},
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": None, "tool_calls": _CALLS},
                {"role": "tool", "content": "3", "tool_call_id": "1"},
                {"role": "assistant", "content": "a"},
            ],
            "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
        },
    ],
    "prompts": [{"prompt": "q", "completion": "a"}, {"prompt": [{"role": "user", "content": "q"}], "completion": _TURNS[2:]}],
    "alpaca": [{"instruction": "q", "input": "b", "output": "a"}, {"instruction": "q", "output": "a", "history": [["x", "y"]]}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}] * 2,
    "text": [{"text": "once upon a time"}, {"text": "there was", "source": {"a": [1, None]}}],
}
"""sound records of each format"""


def _lines(records: Sequence[Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def _writes(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def _reads(name: str, routing: RoutingShape | None = None, *, cached: bool = False) -> Callable[[Path], object]:
    """Checks the file as a launcher does, and then tokenizes it; bad records are skipped, so that all of them are read."""

    def read(folder: Path) -> None:
        source = DataSource(path=str(folder / name), name="data")
        check_syntax([source], "skip", routed=routing is not None)
        found = read_source(
            source,
            _tokenizer(),
            seq_len=64,
            vocab_size=len(_tokenizer()),
            bad=BadSamples("skip", speaks=False),
            routing=routing,
            cache=folder / "cache" if cached else None,
        )
        for index in range(len(found)):
            found.sample(index)

    return read


def _cached(folder: Path) -> None:
    _writes("data.jsonl", _lines(_RECORDS["text"]))(folder)
    (folder / "cache" / "files").mkdir(parents=True)
    (folder / "cache" / "checked").mkdir()
    _reads("data.jsonl", cached=True)(folder)


def _routed() -> list[dict[str, Any]]:
    routing = np.zeros((16, 2, 2), np.int16)
    routing[..., 1] = 2
    return [
        {"text": "once upon a time", "routed_experts": routing.tolist()},
        {"text": "once upon a time", "routed_experts": routing_text(routing)},
    ]


def _tables(form: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist([*_RECORDS["messages"][:1], {"messages": _TURNS[1:], "id": None}] * 3)
        if form == "parquet":
            pyarrow.parquet.write_table(table, folder / "data.parquet")
        else:
            make = pyarrow.ipc.new_file if form == "file" else pyarrow.ipc.new_stream
            with make(str(folder / "data.arrow"), table.schema) as file:
                file.write_table(table)

    return write


def _indexed(folder: Path) -> None:
    ids, lengths = np.arange(12, dtype=np.int32), np.array([5, 7], np.int32)
    (folder / "data.bin").write_bytes(ids.tobytes())
    head = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, 2, 3)
    pointers, documents = np.array([0, 20], np.int64), np.array([0, 1, 2], np.int64)
    (folder / "data.idx").write_bytes(head + lengths.tobytes() + pointers.tobytes() + documents.tobytes())


def _features(folder: Path) -> None:
    np.savez(folder / "users.npz", ids=np.array(["ann", "bob"]), features=np.ones((2, 3), np.float32))


def _trace(first: int, name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        loads = np.ones((2, 2, 3, 2), np.int32)
        save_trace(Trace(loads, (first, first + 1), (Unit(0), Unit(1)), (3, 3), 1, 8, "tiny", {"a": [1]}), folder / name)

    return write


def _chunks(folder: Path) -> None:
    for first in (1, 3):
        _trace(first, f"loads/step-{first:08d}.npz")(folder)


def _megatron() -> bytes:
    record = {"layer": 1, "rank": 0, "num_tokens": 2, "topk": 2, "top_indices": [[0, 2], [1, 2]], "block": "decoder"}
    return _lines([{"step": step, **record} for step in (0, 1)])


_PACKED = gzip.compress(_lines(_RECORDS["messages"] * 4), mtime=0)
_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _with_data(folder: Path) -> None:
    """Write a tokenizer's settings, and a conversation that their chat template can write."""
    _writes("tokenizer_config.json", json.dumps({"chat_template": _TEMPLATE, "eos_token": "e"}).encode())(folder)
    talk = [{"role": role, "content": role[0]} for role in ("user", "assistant")]
    _writes("data.jsonl", _lines([{"messages": talk}]))(folder)


KINDS = (
    *(
        FileKind(
            name=f"samples, {name}",
            file="data.jsonl",
            write=_writes("data.jsonl", _lines(records)),
            read=_reads("data.jsonl"),
            form="lines",
            closed=True,
            most_mib=_RECORD_MIB,
        )
        for name, records in _RECORDS.items()
    ),
    FileKind(
        name="samples, JSON list",
        file="data.json",
        write=_writes("data.json", json.dumps(_RECORDS["messages"], indent=1).encode()),
        read=_reads("data.json"),
        form="json",
        closed=True,
        most_mib=_RECORD_MIB,
    ),
    FileKind(
        name="samples, with routing",
        file="data.jsonl",
        write=_writes("data.jsonl", _lines(_routed())),
        read=_reads("data.jsonl", _ROUTING),
        form="lines",
        closed=True,
        most_mib=_RECORD_MIB,
    ),
    FileKind(
        name="samples, CSV",
        file="data.csv",
        write=_writes("data.csv", b'instruction,output\nq,a\n"q, r","a ""b"""\n'),
        read=_reads("data.csv"),
        closed=True,
        most_mib=_RECORD_MIB,
    ),
    FileKind(
        name="samples, TSV",
        file="data.tsv",
        write=_writes("data.tsv", b"prompt\tcompletion\nq\ta\n"),
        read=_reads("data.tsv"),
        closed=True,
        most_mib=_RECORD_MIB,
    ),
    FileKind(
        name="samples, packed",
        file="data.jsonl.gz",
        write=_writes("data.jsonl.gz", _PACKED),
        read=_reads("data.jsonl.gz"),
        closed=True,
        most_mib=_RECORD_MIB,
    ),
    *(
        FileKind(
            name=f"samples, {name}",
            file=f"data.{end}",
            write=_tables(form),
            read=_reads(f"data.{end}"),
            closed=True,
            most_mib=200,
        )
        for name, end, form in (("Parquet", "parquet", "parquet"), ("Arrow file", "arrow", "file"), ("Arrow stream", "arrow", "stream"))
        if importlib.util.find_spec("pyarrow")
    ),
    FileKind(name="indexed data, index", file="data.idx", write=_indexed, read=_reads("data.idx"), closed=True),
    FileKind(name="indexed data, tokens", file="data.bin", write=_indexed, read=_reads("data.idx"), closed=True),
    FileKind(name="token cache, counts", file="meta.json", write=_cached, read=_reads("data.jsonl", cached=True), form="json"),
    FileKind(name="token cache, where samples begin", file="starts.i64", write=_cached, read=_reads("data.jsonl", cached=True)),
    FileKind(name="token cache, tokens", file="ids.i32", write=_cached, read=_reads("data.jsonl", cached=True)),
    FileKind(
        name="users' features",
        file="users.npz",
        write=_features,
        read=lambda folder: read_user_features(folder / "users.npz"),
        form="npz",
        closed=True,
    ),
    FileKind(
        name="trace of loads",
        file="loads.npz",
        write=_trace(1, "loads.npz"),
        read=lambda folder: load_trace(folder / "loads.npz"),
        form="npz",
        closed=True,
    ),
    FileKind(
        name="trace of loads, in chunks",
        file="step-00000003.npz",
        write=_chunks,
        read=lambda folder: load_trace(folder / "loads"),
        form="npz",
        closed=True,
    ),
    FileKind(
        name="Megatron's trace of routing",
        file="trace.jsonl",
        write=_writes("trace.jsonl", _megatron()),
        read=lambda folder: load_megatron_trace(folder / "trace.jsonl", 3),
        form="lines",
        closed=True,
        most_mib=_RECORD_MIB,
    ),
    FileKind(
        name="tokenizer's settings",
        file="tokenizer_config.json",
        write=_with_data,
        read=lambda folder: check_template([DataSource(path=str(folder / "data.jsonl"), name="data")], folder, None, "error"),
        form="json",
        closed=True,
    ),
)
