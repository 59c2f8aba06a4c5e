"""Reads back what a run has recorded: the records of its metrics.jsonl as columns over the steps, and its configuration as written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hecate.errors import UserError
from hecate.io.plain_files import open_plain, read_plain_text
from hecate.io.strict_json import JsonError, parse_json
from hecate.io.strict_yaml import MOST_BYTES, YamlError, parse_yaml
from hecate.parallel.values.units import Unit, parse_unit

Record = dict[str, Any]
MOST_BINS = 120
"""largest number of stretches of time over which loads are summed up: a picture has no room for more columns"""
_CONFIG = "config.yaml"
_LONGEST_LINE = 1 << 24
"""bytes of a record"""
_MOST, _LARGEST = 1 << 53, 1e100
"""what counts, and other figures, are below"""


@dataclass(frozen=True, eq=False)
class LoadTimeline:
    """The assignments of all experts over the run, in stretches of equally many recorded steps (the last one may have fewer).

    Shapes: B stretches, N experts of all units together, in the units' order.
    """

    experts: Mapping[Unit, int]
    """unit -> its number of experts"""
    first_B: np.ndarray
    """int64: the first step of each stretch"""
    loads_BN: np.ndarray
    """int64"""

    def of(self, unit: Unit) -> np.ndarray:
        """int64 [B, experts] of one unit."""
        before = sum(count for other, count in self.experts.items() if other < unit)
        return self.loads_BN[:, before : before + self.experts[unit]]


@dataclass(frozen=True, eq=False)
class RunRecords:
    """What a run has recorded. Shapes: S records of steps."""

    name: str
    config: Mapping[str, Any]
    """as config.yaml has it; empty if there is none"""
    step_S: np.ndarray
    """int64: the steps that are recorded"""
    columns: Mapping[str, np.ndarray]
    """field of a step -> float64 [S]; NaN where a record lacks it or has null"""
    parts: Mapping[str, np.ndarray]
    """part of a step's time -> float64 [S], seconds; a record without the part has NaN"""
    peak_bytes: tuple[int, ...]
    """of the last step that has it, by rank; empty: not recorded"""
    loads: LoadTimeline
    evals: tuple[Record, ...]
    events: tuple[Record, ...]
    """also the re-shardings, in the order of the file"""
    torn: bool
    """whether the last line is no record, because the run was killed while it wrote it"""

    def column(self, name: str) -> np.ndarray | None:
        """float64 [S]; None: no record has a number of this name."""
        values = self.columns.get(name)
        return None if values is None or not np.isfinite(values).any() else values

    def config_value(self, name: str) -> Any:
        """The configuration's value of a dotted key; None: the run has left none."""
        value: Any = self.config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value


def read_run(folder: Path) -> RunRecords:
    """Read a run's folder, whatever state it is in.

    Raises:
        UserError: there is no metrics.jsonl, a line before its last is no record, or its steps are of different models.
    """
    path = folder / "metrics.jsonl"
    steps, bins = _Steps(), _Bins()
    evals, events, torn = [], [], False
    for record in _records(path):
        kind = None if record is None else record.get("kind")
        if record is None:
            torn = True
        elif kind == "step":
            steps.add(record)
            bins.add(record, path)
        elif kind == "eval":
            evals.append(record)
        elif kind in ("event", "reshard"):
            events.append(record)
    return RunRecords(
        name=folder.resolve().name,
        config=read_run_config(folder / _CONFIG),
        step_S=np.array(steps.numbers, dtype=np.int64),
        columns={name: steps.column(name) for name in steps.names},
        parts={name.removeprefix("parts."): steps.column(name) for name in steps.part_names},
        peak_bytes=steps.peak_bytes,
        loads=bins.timeline(),
        evals=tuple(evals),
        events=tuple(events),
        torn=torn,
    )


def _records(path: Path) -> Iterator[Record | None]:
    """Each record of the file; None for a last line that is none."""
    bad: tuple[int, str] | None = None
    try:
        with open_plain(path) as file:
            number = 0
            while line := file.readline(_LONGEST_LINE):
                number += 1
                if bad is not None:
                    raise UserError(f"{path}:{bad[0]}: not a record of metrics: {bad[1]}\n  remove that line, and give the command again")
                try:
                    record = parse_json(line)
                    _check(record)
                    yield record
                except JsonError as error:
                    bad = number, str(error)
    except OSError as error:
        raise UserError(
            f"{path}: metrics cannot be read: {error.strerror or error}\n  give the output_dir of a run that has begun to train"
        ) from error
    if bad is not None:
        yield None


def _check(record: Any) -> None:
    """Raises JsonError: the value is no record of a run."""
    if not isinstance(record, dict) or type(record.get("step")) is not int or not 0 <= record["step"] < _MOST:
        raise JsonError("it has no step")
    kind = record.get("kind")
    objects = {"step": ("parts", "loads"), "eval": ("sources",)}.get(kind if isinstance(kind, str) else "", ())
    for name in objects:
        if not isinstance(record.get(name) or {}, dict) or (kind == "eval" and name not in record):
            raise JsonError(f"its {name} are no object")
    numbers: list[Any] = [value for value in record.values() if isinstance(value, int | float)]
    if kind == "step":
        numbers += (record.get("parts") or {}).values()
        peaks, loads = record.get("peak_bytes") or [], record.get("loads") or {}
        if not isinstance(peaks, list) or not all(isinstance(one, list) for one in loads.values()):
            raise JsonError("its peak_bytes or loads are no lists")
        try:
            for unit in loads:
                parse_unit(unit)
        except ValueError as error:
            raise JsonError(f"its loads are of {str(error)[:100]}") from error
        counts = [*peaks, *(count for one in loads.values() for count in one)]
        if not all(type(one) is int and 0 <= one < _MOST for one in counts):
            raise JsonError("its peak_bytes or loads are no whole numbers")
    elif kind == "eval":
        if not all(isinstance(one, dict) for one in record["sources"].values()):
            raise JsonError("one of its sources is no object")
        numbers += [one.get(name) for one in record["sources"].values() for name in ("loss", "accuracy", "samples")]
        if not all(_are_answers(one.get("answers", [])) for one in record["sources"].values()):
            raise JsonError("its answers are no texts")
    elif kind == "event" and not isinstance(record.get("text"), str):
        raise JsonError("it has no text")
    elif kind == "reshard":
        moved = [record.get(name) for name in ("experts", "bytes_sent", "seconds", "saved_seconds", "moving_seconds")]
        if not all(isinstance(one, int | float) for one in moved[:2]):
            raise JsonError("it does not say what has moved")
        numbers += moved
    if not all(one is None or (isinstance(one, int | float) and abs(one) < _LARGEST) for one in numbers):
        raise JsonError("one of its figures is no number")


def _are_answers(found: Any) -> bool:
    return isinstance(found, list) and all(
        isinstance(one, dict) and all(isinstance(one.get(name), str) for name in ("prompt", "expected", "answer")) for one in found
    )


@dataclass
class _Steps:
    """The numbers of all steps so far, by name; a step that lacks a name has None in its place."""

    numbers: list[int] = field(default_factory=list)
    values: dict[str, list[float | None]] = field(default_factory=dict)
    peak_bytes: tuple[int, ...] = ()

    @property
    def names(self) -> list[str]:
        return [name for name in self.values if not name.startswith("parts.")]

    @property
    def part_names(self) -> list[str]:
        return [name for name in self.values if name.startswith("parts.")]

    def add(self, record: Record) -> None:
        before = len(self.numbers)
        self.numbers.append(record["step"])
        flat = {name: value for name, value in record.items() if isinstance(value, (int, float))}
        flat |= {f"parts.{name}": seconds for name, seconds in (record.get("parts") or {}).items()}
        for name, value in flat.items():
            column = self.values.setdefault(name, [None] * before)
            column.append(value)
        for column in self.values.values():
            if len(column) == before:
                column.append(None)
        if record.get("peak_bytes"):
            self.peak_bytes = tuple(record["peak_bytes"])

    def column(self, name: str) -> np.ndarray:
        return np.array([math.nan if value is None else float(value) for value in self.values[name]])


class _Bins:
    """Sums up loads over stretches of steps, which get twice as long whenever there are too many of them."""

    def __init__(self) -> None:
        self._experts: dict[Unit, int] | None = None
        self._names: list[str] = []
        self._width = 1
        self._bins: list[tuple[int, int, np.ndarray]] = []
        """first step, number of steps, int64 [N]"""

    def add(self, record: Record, path: Path) -> None:
        loads = record.get("loads") or {}
        experts = {parse_unit(name): len(counts) for name, counts in loads.items()}
        if self._experts is None:
            self._experts = dict(sorted(experts.items()))
            self._names = [str(unit) for unit in self._experts]
        if experts != self._experts:
            raise UserError(
                f"{path}: step {record['step']} has other layers or numbers of experts than the steps before it\n"
                "  a report is of one run; give the folder of one"
            )
        counts_N = np.concatenate([np.asarray(loads[name], dtype=np.int64) for name in self._names] or [np.zeros(0, dtype=np.int64)])
        if self._bins and self._bins[-1][1] < self._width:
            first, steps, sum_N = self._bins[-1]
            self._bins[-1] = first, steps + 1, sum_N + counts_N
            return
        if len(self._bins) == MOST_BINS:
            pairs = zip(self._bins[::2], self._bins[1::2], strict=True)
            self._bins = [(one[0], one[1] + two[1], one[2] + two[2]) for one, two in pairs]
            self._width *= 2
        self._bins.append((record["step"], 1, counts_N))

    def timeline(self) -> LoadTimeline:
        experts = self._experts or {}
        loads = [sum_N for _, _, sum_N in self._bins]
        return LoadTimeline(
            experts=experts,
            first_B=np.array([first for first, _, _ in self._bins], dtype=np.int64),
            loads_BN=np.stack(loads) if loads else np.zeros((0, sum(experts.values())), dtype=np.int64),
        )


def read_run_config(path: Path) -> Mapping[str, Any]:
    """Return the configuration in a run's folder, or {} if it is not there. No file that it names has to be there any more.

    Raises:
        UserError: it is damaged.
    """
    try:
        read = parse_yaml(read_plain_text(path, MOST_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, YamlError) as error:
        raise UserError(f"{path}: the run's configuration cannot be read: {str(error).splitlines()[0]}\n  move the file away") from error
    return read if isinstance(read, dict) else {}
