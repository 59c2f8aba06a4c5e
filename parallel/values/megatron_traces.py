"""Read Megatron's routing traces (`--moe-routing-trace-path`) as a `Trace`. A line is a JSON object for one forward pass of a router:

    {"step": 0, "layer": 3, "rank": 0, "num_tokens": 2, "topk": 2, "top_indices": [[12, 45], [3, 12]]}

Several micro-batches of a step are several records of the same step, layer and rank.
Source of the format: megatron/core/transformer/moe/router_trace.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np

from hecate.errors import UserError
from hecate.io.plain_files import open_plain
from hecate.parallel.values.traces import Trace
from hecate.parallel.values.units import Unit

_LONGEST_LINE = 1 << 27
"""bytes of a record"""
_NUMBERS = ("step", "layer", "rank", "num_tokens", "topk")
_Triple = tuple[int, int, int]
"""a step, a layer and a rank"""


@dataclass
class _Found:
    """The sum over the records of one triple read so far."""

    loads_E: np.ndarray
    records: int = 0
    tokens: int = 0


def load_megatron_trace(path: Path, num_experts: int, *, model: str = "") -> Trace:
    """Read one file, or all *.jsonl files of a folder (Megatron writes one per rank). The micro-batches of a step are summed.

    Steps, layers and ranks keep their numbers. Layers of multi-token prediction (whose `block` is not `decoder`) are left out, because
    decoder layers have the same numbers.

    Args:
        num_experts: the number of experts of each layer, which the records do not contain.

    Raises:
        UserError: a line is not such a record (the text gives file:line), or a step lacks records of some layer and rank.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: has no *.jsonl file in it")
    found: dict[_Triple, _Found] = {}
    top_k = 0
    for where, record in _records(files):
        top_k = top_k or record["topk"]
        if record["topk"] != top_k:
            raise UserError(f"{where}: topk is {record['topk']}, but {top_k} in the records before; a trace has one")
        triple = (record["step"], record["layer"], record["rank"])
        entry = found.setdefault(triple, _Found(np.zeros(num_experts, dtype=np.int64)))
        entry.loads_E += np.bincount(_experts_of_tokens(record, num_experts, where), minlength=num_experts)
        entry.records += 1
        entry.tokens += record["num_tokens"]
    if not found:
        raise UserError(f"{path}: has no record of a decoder layer")
    _refuse_gaps(found, path)
    steps, layers, ranks = (sorted({triple[axis] for triple in found}) for axis in range(3))
    loads = np.empty((len(steps), len(layers), num_experts, len(ranks)), dtype=np.int64)
    for at_step, at_layer, at_rank in np.ndindex(len(steps), len(layers), len(ranks)):
        loads[at_step, at_layer, :, at_rank] = found[steps[at_step], layers[at_layer], ranks[at_rank]].loads_E
    most = max(1, *(entry.tokens for entry in found.values()))
    units = tuple(Unit(layer) for layer in layers)
    return Trace(loads, tuple(steps), units, (num_experts,) * len(units), top_k, most, model, {"source": f"Megatron, {path.name}"})


def _records(files: list[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file:line, record) for the decoder's layers, with the types of numbers checked."""
    for path in files:
        try:
            with open_plain(path) as file:
                number = 0
                while line := file.readline(_LONGEST_LINE + 1):
                    number += 1
                    where = f"{path}:{number}"
                    if len(line) > _LONGEST_LINE:
                        raise UserError(f"{where}: the line has more than {_LONGEST_LINE >> 20} MiB; is this a trace of routing?")
                    record = _record(line, where)
                    if record.get("block", "decoder") == "decoder":
                        yield where, record
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        hint = "remove the line; if the run was killed, remove its last step from all files"
        raise UserError(f"{where}: not sound JSON: {str(error)[:200]}\n  {hint}") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: must be an object with {', '.join(_NUMBERS)} and top_indices")
    for name in _NUMBERS:
        if type(record.get(name)) is not int or not (name == "topk") <= record[name] < 2**31:
            raise UserError(f"{where}: {name} must be a number >= {int(name == 'topk')}, got {str(record.get(name))[:40]}")
    return record


def _experts_of_tokens(record: dict[str, Any], num_experts: int, where: str) -> np.ndarray:
    """Return the experts of all tokens as a flat array."""
    tokens, top_k = record["num_tokens"], record["topk"]
    try:
        chosen = np.array(record.get("top_indices"))
    except (ValueError, OverflowError, TypeError):  # lists of unequal lengths
        chosen = np.array(None)
    if chosen.size == 0 == tokens:
        return np.empty(0, dtype=np.int64)
    if chosen.dtype != np.int64 or chosen.shape not in ((tokens, top_k), (tokens * top_k,)):
        raise UserError(f"{where}: top_indices must be {tokens} lists of {top_k} experts, or all of them in one list")
    if chosen.min() < 0 or chosen.max() >= num_experts:
        wrong = chosen.min() if chosen.min() < 0 else chosen.max()
        raise UserError(f"{where}: expert {wrong} is not one of 0 to {num_experts - 1}; is the number of experts {num_experts}?")
    ordered = np.sort(chosen.reshape(tokens, top_k), axis=1)
    twice = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(1))
    if len(twice):
        raise UserError(f"{where}: token {twice[0]} has the same expert twice among its {top_k}")
    return chosen.ravel()


def _refuse_gaps(found: dict[_Triple, _Found], path: Path) -> None:
    """Raise UserError unless every layer and rank has the same number of records in a step, one per micro-batch."""
    steps, layers, ranks = (sorted({triple[axis] for triple in found}) for axis in range(3))
    wanted = dict.fromkeys(steps, 0)
    for (step, _, _), entry in found.items():
        wanted[step] = max(wanted[step], entry.records)
    triples = product(steps, layers, range(len(ranks)))  # if ranks are not numbered 0..n-1, one of these is missing
    gaps = ((t, found[t].records if t in found else 0) for t in triples)
    short = list(islice(((t, have) for t, have in gaps if have < wanted[t[0]]), 4))
    if short:
        lines = [f"  step {s}, layer {layer}, rank {rank}: {have} of {wanted[s]}" for (s, layer, rank), have in short[:3]]
        more = ["  ..."] if len(short) > 3 else []
        raise UserError("\n".join([f"{path}: every layer and rank must have as many records in a step; found of expected:", *lines, *more]))
