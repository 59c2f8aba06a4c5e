"""Record the expert loads of a training run: a value, its file (docs/traces.md), and a writer that adds one step at a time.

In memory loads are [..., experts, source ranks], as everywhere; in the file they are [..., source ranks, experts].
"""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hecate.errors import UserError

_VERSION = 1
_HEADER = ("steps", "layers", "num_experts", "top_k", "tokens_per_rank", "model", "notes")


@dataclass(frozen=True, eq=False)
class Trace:
    """The loads (see `hecate.parallel.loads`) of some steps and layers of a run.

    Raises:
        UserError: the fields do not fit together.
    """

    loads: np.ndarray
    """int32 or int64 [steps, layers, experts, source ranks]; 0 beyond a layer's own number of experts"""
    steps: tuple[int, ...]
    """the numbers of the steps, ascending; gaps are allowed"""
    layers: tuple[int, ...]
    """the numbers of the layers in the model, ascending"""
    num_experts: tuple[int, ...]
    """the number of experts of each layer"""
    top_k: int
    tokens_per_rank: int
    """the most tokens that a rank may have in a step; its actual number is `loads.sum(-2) / top_k`"""
    model: str = ""
    notes: dict[str, Any] = field(default_factory=dict)
    """further information about the run, as JSON values"""

    def __post_init__(self) -> None:
        shape = self.loads.shape
        if self.loads.dtype not in (np.int32, np.int64) or len(shape) != 4 or 0 in shape:
            raise UserError(f"loads must be int32 or int64 [steps, layers, experts, sources], got {self.loads.dtype} {list(shape)}")
        for name in ("steps", "layers", "num_experts"):
            if not all(type(number) is int and number >= 0 for number in getattr(self, name)):
                raise UserError(f"{name} must be numbers >= 0, got {_short(getattr(self, name))}")
        for name in ("steps", "layers"):
            numbers = getattr(self, name)
            if any(later <= earlier for earlier, later in pairwise(numbers)):
                raise UserError(f"{name} must ascend, got {_short(numbers)}")
        expected = (len(self.steps), len(self.layers), len(self.num_experts), max(self.num_experts, default=0))
        if expected != (*shape[:2], shape[1], shape[2]):
            sizes = f"{expected[0]} steps, {expected[1]} layers and experts {_short(self.num_experts)}"
            raise UserError(f"loads {list(shape)} do not fit {sizes}")
        for name in ("top_k", "tokens_per_rank"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise UserError(f"{name} must be a number >= 1, got {getattr(self, name)!r}")
        if type(self.model) is not str or type(self.notes) is not dict:
            raise UserError("model must be text and notes a mapping")
        beyond_LE = np.arange(shape[2]) >= np.array(self.num_experts)[:, None]
        most = np.where(beyond_LE, 0, self.tokens_per_rank)[None, :, :, None]
        if ((self.loads < 0) | (self.loads > most)).any() or (self.loads.sum(-2) > self.tokens_per_rank * self.top_k).any():
            raise UserError(f"loads exceed top_k {self.top_k} experts for each of {self.tokens_per_rank} tokens a rank, or are negative")


def save_trace(trace: Trace, path: Path) -> None:
    """Write the file, replacing an existing one in a single step.

    Raises:
        UserError: the file cannot be written; an existing one is then unchanged.
    """
    header = {"version": _VERSION} | {name: getattr(trace, name) for name in _HEADER}
    text = json.dumps(header, allow_nan=False).encode("ascii")
    loads = np.ascontiguousarray(np.swapaxes(trace.loads, 2, 3))
    staged = path.with_name(path.name + ".tmp")
    try:
        with open(staged, "wb") as file:
            np.savez_compressed(file, header=np.frombuffer(text, dtype=np.uint8), loads=loads)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)
        raise UserError(f"{path}: the trace cannot be written: {error.strerror or error}") from error


def load_trace(path: Path) -> Trace:
    """Read a file that `save_trace` has written.

    Raises:
        UserError: the file cannot be read, is not a trace, or was written by a later version.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            header, loads = json.loads(arrays["header"].tobytes()), arrays["loads"]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not a trace of expert loads, or damaged: {error}") from error
    if not isinstance(header, dict) or type(header.get("version")) is not int:
        raise UserError(f"{path}: not a trace of expert loads: its header has no version")
    if header["version"] != _VERSION:
        raise UserError(f"{path}: version {header['version']} of the format; this hecate reads version {_VERSION}")
    if set(header) != {"version", *_HEADER} or not all(type(header[name]) is list for name in _HEADER[:3]):
        raise UserError(f"{path}: damaged: its header must have the lists {', '.join(_HEADER[:3])} and {', '.join(_HEADER[3:])}")
    facts: dict[str, Any] = {name: tuple(header[name]) if name in _HEADER[:3] else header[name] for name in _HEADER}
    try:
        return Trace(np.swapaxes(loads, 2, 3) if loads.ndim == 4 else loads, **facts)
    except UserError as error:
        raise UserError(f"{path}: damaged: {error}") from error


class TraceWriter:
    """A writer that collects a run's loads and writes them to a file. Only rank 0 has one.

    If the run resumes after step `after`, the steps of the existing file up to `after` are kept, and later ones are dropped.

    Raises:
        UserError: the file cannot be read, or is another run's.
    """

    def __init__(self, path: Path, *, top_k: int, tokens_per_rank: int, model: str, notes: dict[str, Any], after: int) -> None:
        self.path = path
        self._facts: dict[str, Any] = {"top_k": top_k, "tokens_per_rank": tokens_per_rank, "model": model, "notes": notes}
        self._dtype = np.int32 if tokens_per_rank < 2**31 else np.int64
        self._steps: list[int] = []
        self._loads: list[np.ndarray] = []
        self._layers: tuple[int, ...] = ()
        self._num_experts: tuple[int, ...] = ()
        if after and path.exists():
            before = load_trace(path)
            self._facts["tokens_per_rank"] = max(tokens_per_rank, before.tokens_per_rank)
            for step, loads in zip(before.steps, before.loads, strict=True):
                if step <= after:
                    self._steps.append(step)
                    self._loads.append(loads.astype(self._dtype))
                    self._layers, self._num_experts = before.layers, before.num_experts

    def append(self, step: int, loads: Mapping[int, np.ndarray]) -> None:
        """Add a step, later than all before: layer -> int [experts, source ranks], with as many experts as each layer has."""
        layers = tuple(sorted(loads))
        num_experts = tuple(len(loads[layer]) for layer in layers)
        loads_LED = np.zeros((len(layers), max(num_experts), loads[layers[0]].shape[1]), dtype=self._dtype)
        for index, layer in enumerate(layers):
            loads_LED[index, : num_experts[index]] = loads[layer]
        if self._steps:
            assert step > self._steps[-1], (step, self._steps[-1])
            if (self._layers, self._num_experts) != (layers, num_experts):
                raise UserError(
                    f"{self.path}: holds loads of other layers or experts than this run's; move it to another folder and resume again"
                )
        self._layers, self._num_experts = layers, num_experts
        self._steps.append(step)
        self._loads.append(loads_LED)

    def save(self) -> None:
        """Write all steps so far. Before the first step nothing is written."""
        if self._steps:
            # The number of ranks may have changed during the run. A rank that does not exist in a step has no loads.
            ranks = max(loads_LED.shape[2] for loads_LED in self._loads)
            padded = [np.pad(loads_LED, ((0, 0), (0, 0), (0, ranks - loads_LED.shape[2]))) for loads_LED in self._loads]
            save_trace(Trace(np.stack(padded), tuple(self._steps), self._layers, self._num_experts, **self._facts), self.path)


def _short(numbers: tuple[Any, ...]) -> str:
    return ", ".join(str(number)[:20] for number in numbers[:6]) + (", ..." if len(numbers) > 6 else "")
