"""Record the expert loads of a training run: a value, its files (docs/use/traces.md), and a writer that adds steps while the run lasts.

A trace is stored as one file, or as a folder of such files (chunks), each of which holds some consecutive steps. In memory loads are
[..., experts, source ranks], as everywhere; in files they are [..., source ranks, experts].
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hecate.errors import UserError
from hecate.io.durable import replace_file, sync_folder
from hecate.io.npz import ArrayError, read_npz
from hecate.io.strict_json import JsonError, parse_json
from hecate.parallel.values.units import FFN, Unit, parse_unit

_VERSION = 1
_HEADER = ("steps", "layers", "num_experts", "top_k", "tokens_per_rank", "model", "notes")
"""the fields of a file's header, after its version; `layers` holds the units"""
_SAME_IN_ALL_CHUNKS = ("units", "num_experts", "top_k")
_CHUNK = re.compile(r"step-([0-9]{8,16})\.npz")
MOST_WAITING_BYTES = 64 << 20
"""a writer writes a chunk at the latest when the loads that wait in memory are this large"""


@dataclass(frozen=True, eq=False)
class Trace:
    """The loads (see `hecate.parallel.values.loads`) of some steps and units of a run.

    Raises:
        UserError: the fields do not fit together.
    """

    loads: np.ndarray
    """int32 or int64 [steps, units, experts, source ranks]; 0 beyond a unit's own number of experts"""
    steps: tuple[int, ...]
    """the numbers of the steps, ascending; gaps are allowed"""
    units: tuple[Unit, ...]
    """the units in the model, ascending"""
    num_experts: tuple[int, ...]
    """the number of experts of each unit"""
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
        layers = tuple(unit.layer for unit in self.units)
        for name, numbers in (("steps", self.steps), ("layers", layers), ("num_experts", self.num_experts)):
            if not all(type(number) is int and number >= 0 for number in numbers):
                raise UserError(f"{name} must be numbers >= 0, got {_short(numbers)}")
        for name, ascend, given in (
            ("steps", all(earlier < later for earlier, later in pairwise(self.steps)), self.steps),
            ("layers", all(earlier < later for earlier, later in pairwise(self.units)), self.units),
        ):
            if not ascend:
                raise UserError(f"{name} must ascend, got {_short(given)}")
        expected = (len(self.steps), len(self.units), len(self.num_experts), max(self.num_experts, default=0))
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
    """Write one file, replacing an existing one in a single step.

    Raises:
        UserError: the file cannot be written; an existing one is then unchanged.
    """
    facts = {name: getattr(trace, name) for name in _HEADER if name != "layers"}
    header = {"version": _VERSION, "steps": trace.steps, "layers": [_as_written(unit) for unit in trace.units]} | facts
    text = json.dumps(header, allow_nan=False).encode("ascii")
    data = io.BytesIO()
    loads = np.ascontiguousarray(np.swapaxes(trace.loads, 2, 3))
    np.savez_compressed(data, header=np.frombuffer(text, dtype=np.uint8), loads=loads)
    try:
        replace_file(path, [data.getbuffer()])
    except OSError as error:
        raise UserError(f"{path}: the trace cannot be written: {error.strerror or error}") from error


def load_trace(path: Path) -> Trace:
    """Read a file that `save_trace` has written, or a folder of a `TraceWriter`, whose chunks are put together.

    Where the number of ranks changed during the run, a rank that does not exist in a step has no loads in it.

    Raises:
        UserError: a file cannot be read, is not a trace, or was written by a later version; or the chunks do not fit together.
    """
    if not path.is_dir():
        return _load_file(path)
    chunks = [_load_file(file) for file in chunk_files(path).values()]
    if not chunks:
        raise UserError(f"{path}: cannot be read: the folder has no recorded loads (files such as step-00000001.npz) in it")
    for chunk in chunks:
        for name in _SAME_IN_ALL_CHUNKS:
            if getattr(chunk, name) != getattr(chunks[0], name):
                raise UserError(f"{path}: damaged: its files have different {name}, so they are not of one run")
    ranks = max(chunk.loads.shape[3] for chunk in chunks)
    try:
        return replace(
            chunks[-1],
            loads=np.concatenate([_padded(chunk.loads, ranks) for chunk in chunks]),
            steps=tuple(step for chunk in chunks for step in chunk.steps),
            tokens_per_rank=max(chunk.tokens_per_rank for chunk in chunks),
        )
    except UserError as error:
        raise UserError(f"{path}: damaged: {error}") from error


def chunk_files(folder: Path) -> dict[int, Path]:
    """Return the files of a folder of a `TraceWriter` by the first step that each holds, ascending."""
    found = ((_CHUNK.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def _load_file(path: Path) -> Trace:
    try:
        arrays = read_npz(path, ("header", "loads"))
        header, loads = parse_json(arrays["header"].tobytes()), arrays["loads"]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ArrayError, JsonError) as error:
        raise UserError(f"{path}: not a trace of expert loads, or damaged: {error}") from error
    if not isinstance(header, dict) or type(header.get("version")) is not int:
        raise UserError(f"{path}: not a trace of expert loads: its header has no version")
    if header["version"] != _VERSION:
        raise UserError(f"{path}: version {header['version']} of the format; this hecate reads version {_VERSION}")
    if set(header) != {"version", *_HEADER} or not all(type(header[name]) is list for name in _HEADER[:3]):
        raise UserError(f"{path}: damaged: its header must have the lists {', '.join(_HEADER[:3])} and {', '.join(_HEADER[3:])}")
    facts: dict[str, Any] = {name: tuple(header[name]) if name in _HEADER[:3] else header[name] for name in _HEADER}
    try:
        units = tuple(_as_read(value) for value in facts.pop("layers"))
        return Trace(np.swapaxes(loads, 2, 3) if loads.ndim == 4 else loads, units=units, **facts)
    except (UserError, OverflowError) as error:  # a whole number beyond all of numpy's
        raise UserError(f"{path}: damaged: {error}") from error


class TraceWriter:
    """A writer that records a run's loads into a folder while the run lasts. Only rank 0 has one.

    Each `save` writes the steps since the last one to a file of their own, so a step is written once however long the run is, and only
    steps that are not written yet are in memory. The folder can be read at any time, whatever the writer was killed in.

    If the run resumes after step `after`, the steps of the folder up to `after` are kept, and later ones are deleted before the first new
    one is written. A file `FOLDER.npz`, which earlier versions wrote, becomes the folder's first chunk.

    Raises:
        UserError: the last file that is kept cannot be read.
    """

    def __init__(self, folder: Path, *, top_k: int, tokens_per_rank: int, model: str, notes: dict[str, Any], after: int) -> None:
        self.folder = folder
        self._facts: dict[str, Any] = {"top_k": top_k, "model": model, "notes": notes}
        self._tokens_per_rank = tokens_per_rank
        self._dtype = np.int32 if tokens_per_rank < 2**31 else np.int64
        self._after = after
        self._last_step = after
        """later steps alone may be appended"""
        self._steps: list[int] = []
        self._loads: list[np.ndarray] = []
        self._waiting_bytes = 0
        kept = self._last_kept()
        self._kind = (kept.units, kept.num_experts) if kept else None
        """the units and their numbers of experts, which are the same in every step; None: no step yet"""
        self._is_cut = False
        """whether the folder's steps that do not belong to this run have been deleted"""

    def append(self, step: int, loads: Mapping[Unit, np.ndarray]) -> None:
        """Add a step, later than all before: unit -> int [experts, source ranks], with as many experts as each unit has.

        Raises:
            UserError: the folder holds loads of other layers or experts; or it had to be written to, and that failed.
        """
        assert step > self._last_step, (step, self._last_step)
        units = tuple(sorted(loads))
        kind = units, tuple(len(loads[unit]) for unit in units)
        if self._kind not in (None, kind):
            raise UserError(
                f"{self.folder}: holds loads of other layers or experts than this run's; move it to another folder and resume again"
            )
        self._kind = kind
        loads_LED = np.zeros((len(units), max(kind[1]), loads[units[0]].shape[1]), dtype=self._dtype)
        for index, unit in enumerate(units):
            loads_LED[index, : kind[1][index]] = loads[unit]
        self._last_step = step
        self._steps.append(step)
        self._loads.append(loads_LED)
        self._waiting_bytes += loads_LED.nbytes
        if self._waiting_bytes >= MOST_WAITING_BYTES:
            self.save()

    def save(self) -> None:
        """Write the steps since the last call. Before the first step nothing is written.

        Raises:
            UserError: the disk refuses.
        """
        if not self._steps:
            return
        self._cut()
        ranks = max(loads_LED.shape[2] for loads_LED in self._loads)
        loads_SLED = np.stack([_padded(loads_LED, ranks) for loads_LED in self._loads])
        # Ranks may have been given more tokens since the writer was made: others were lost, or a slow one was relieved.
        each = -(-loads_SLED.sum(2).max() // self._facts["top_k"])
        most = max(self._tokens_per_rank, int(each), int(loads_SLED.max()))
        assert self._kind is not None
        units, num_experts = self._kind
        chunk = Trace(loads_SLED, tuple(self._steps), units, num_experts, tokens_per_rank=most, **self._facts)
        save_trace(chunk, self._file_of(self._steps[0]))
        self._steps.clear()
        self._loads.clear()
        self._waiting_bytes = 0

    def _file_of(self, first_step: int) -> Path:
        return self.folder / f"step-{first_step:08d}.npz"

    @property
    def _old_file(self) -> Path:
        return self.folder.with_name(self.folder.name + ".npz")

    def _kept_files(self) -> dict[int, Path]:
        """By first step, the files with steps up to `after`; a run that begins keeps none."""
        if not self._after or not self.folder.is_dir():
            return {}
        return {first: file for first, file in chunk_files(self.folder).items() if first <= self._after}

    def _last_kept(self) -> Trace | None:
        """Read the last of the files that are kept, or the file of an earlier version."""
        if files := self._kept_files():
            return _load_file(files[max(files)])
        return _load_file(self._old_file) if self._after and self._old_file.exists() else None

    def _cut(self) -> None:
        """Once: leave the steps up to `after` in the folder, and no others.

        Each file is deleted or replaced in a single step, the last one first, so a kill leaves the beginning of the old trace.
        """
        if self._is_cut:
            return
        last, kept_files = self._last_kept(), self._kept_files()
        try:
            self.folder.mkdir(exist_ok=True)
            for first, file in reversed(chunk_files(self.folder).items()):
                if first not in kept_files:
                    file.unlink()
            sync_folder(self.folder)
        except OSError as error:
            raise UserError(f"{self.folder}: the trace cannot be written: {error.strerror or error}") from error
        if last is not None and (not kept_files or last.steps[-1] > self._after):
            count = sum(step <= self._after for step in last.steps)
            if count:
                save_trace(replace(last, loads=last.loads[:count], steps=last.steps[:count]), self._file_of(last.steps[0]))
        with contextlib.suppress(OSError):
            self._old_file.unlink(missing_ok=True)
        self._is_cut = True


def _as_written(unit: Unit) -> int | str:
    """A unit in a file: a layer's FFN by the layer's number, another unit by its text."""
    return unit.layer if unit.place == FFN else str(unit)


def _as_read(value: object) -> Unit:
    """The unit that `_as_written` has made this of.

    Raises:
        UserError: no unit is written like that.
    """
    with contextlib.suppress(ValueError):
        unit = Unit(value) if type(value) is int else parse_unit(value) if isinstance(value, str) else None
        if unit is not None and _as_written(unit) == value:
            return unit
    raise UserError(f"layers must be numbers, or units as LAYER.PLACE, got {str(value)[:40]!r}")


def _padded(loads: np.ndarray, ranks: int) -> np.ndarray:
    """The loads [..., source ranks] with as many source ranks; those that are added have none."""
    return np.pad(loads, [(0, 0)] * (loads.ndim - 1) + [(0, ranks - loads.shape[-1])])


def _short(numbers: tuple[Any, ...]) -> str:
    return ", ".join(str(number)[:20] for number in numbers[:6]) + (", ..." if len(numbers) > 6 else "")
