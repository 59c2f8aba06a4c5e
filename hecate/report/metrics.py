"""metrics.jsonl: one JSON object a line. docs/use/metrics.md is its schema."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np

from hecate.errors import UserError
from hecate.io.durable import open_to_append, replace_file, sync_folder
from hecate.io.plain_files import open_plain
from hecate.io.strict_json import JsonError, parse_json
from hecate.parallel.values.loads import imbalance as max_over_mean
from hecate.report.events import EvalScore, Resharding, ShownAnswer, StepEvent

Record = dict[str, Any]
SAVED, STOPPED, RESUMED, REGROUPED, REPLANNED = "saved ", "stopped by a signal", "resumed after", "ranks go on", "re-planned"
ENDED_EARLY = "ended early"
"""in the texts of events: by these words a report knows what happened"""


def step_record(event: StepEvent) -> Record:
    """What one optimizer step did. Numbers that are not finite become null."""
    result = event.result
    aux_loss, imbalance, static_imbalance = expert_figures(event)
    totals = {unit: np.asarray(loads_ED).sum(axis=1) for unit, loads_ED in sorted(result.loads.items())}
    return {
        "kind": "step",
        "step": int(event.step),
        "epoch": _finite(event.epoch),
        "epoch_samples": event.epoch_samples,
        "loss": _finite(result.loss),
        "aux_loss": _finite(aux_loss),
        "learning_rate": _finite(event.learning_rate),
        "grad_norm": _finite(result.grad_norm),
        "skipped": bool(result.skipped),
        "tokens": int(event.tokens),
        "tokens_per_s": _finite(event.tokens / event.seconds) if event.seconds > 0 else None,
        "step_seconds": _finite(event.seconds),
        "parts": {part: _finite(seconds) for part, seconds in event.parts.items()},
        "ranks": len(result.peak_bytes),
        "imbalance": _finite(imbalance),
        "static_imbalance": _finite(static_imbalance),
        "copies": int(event.copies),
        "new_copies": int(event.new_copies),
        "bytes_sent": int(event.result.bytes_sent),
        "bytes_between_nodes": int(event.result.bytes_between_nodes),
        "peak_bytes": [int(peak) for peak in result.peak_bytes],
        "calibrations": int(event.calibrations),
        "plan_modes": {str(unit): mode for unit, mode in sorted(event.plan_modes.items())},
        "routing_differs": None if result.differing is None else int(result.differing),
        "loads": {str(unit): total_E.tolist() for unit, total_E in totals.items()},
        "layer_balance": {str(unit): max_over_mean(total_E) for unit, total_E in totals.items()},
    }


def expert_figures(event: StepEvent) -> tuple[float, float, float] | tuple[None, None, None]:
    """The load-balancing loss, the imbalance, and that of static expert parallelism; None where there are no experts."""
    if not event.result.loads:
        return None, None, None
    return event.result.aux_loss, event.imbalance, event.static_imbalance


def eval_record(step: int, scores: Mapping[str, EvalScore], answers: Mapping[str, Sequence[ShownAnswer]] = MappingProxyType({})) -> Record:
    """What an evaluation after `step` optimizer steps found, by source. `answers`: some of those that were generated."""
    sources = {
        name: {
            "loss": _finite(score.loss),
            "accuracy": None if score.accuracy is None else _finite(score.accuracy),
            "samples": int(score.samples),
            "answers": [asdict(one) for one in answers.get(name, ())],
        }
        for name, score in scores.items()
    }
    return {"kind": "eval", "step": int(step), "sources": sources}


def event_record(step: int, text: str) -> Record:
    """Something that happened after `step` optimizer steps: a checkpoint, a signal, a resume."""
    return {"kind": "event", "step": int(step), "text": text}


def reshard_record(step: int, done: Resharding) -> Record:
    """A re-sharding after `step` optimizer steps."""
    return {
        "kind": "reshard",
        "step": int(step),
        "experts": int(done.move.experts),
        "bytes_sent": int(done.move.num_bytes),
        "seconds": _finite(done.seconds),
        "saved_seconds": _finite(done.gain.saved),
        "moving_seconds": _finite(done.gain.moving),
    }


class MetricsWriter:
    """Appends records to a file. One rank, 0, makes one; a context manager.

    Raises UserError where the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.set_aside: Path | None = None
        """where `truncate_after` has left a file in whose midst there were lines that are no records; None: there were none"""
        self._file = self._open()

    def write(self, record: Record) -> None:
        """Append one line, which a kill of this process right afterwards does not lose. If the disk refuses, no part of it stays."""
        line = json.dumps(record, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"
        end = os.fstat(self._file.fileno()).st_size
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(end)
            raise self._refused(error) from error

    def truncate_after(self, step: int) -> int:
        """Remove the records of later steps than `step`, and what is no record; returns how many lines went.

        Call it once before the first write of a run that resumes at `step`. A kill on the way leaves the file as it was. A file with lines
        in its midst that are no records, as a power cut leaves it, is kept under another name (`set_aside`).

        Raises:
            UserError: the disk refuses.
        """
        lines = kept = leading = size = bad = 0
        torn = False
        for line, its_step in self._read():
            bad += torn
            torn = its_step is None
            is_kept = its_step is not None and its_step <= step
            if is_kept and kept == lines:  # no line before it goes
                leading, size = leading + 1, size + len(line)
            lines, kept = lines + 1, kept + is_kept
        try:
            if bad:
                self.set_aside = _free_name(self.path)
                os.link(self.path, self.set_aside)
            if bad or kept > leading:  # a file that is set aside is a second name of this one, which must not be cut
                self._rewrite(step)
            elif size > (found := os.fstat(self._file.fileno()).st_size):  # the last line is whole but for its newline
                self._file.write(b"\n")
            elif size < found:  # takes no room, which a disk may lack
                self._file.truncate(size)
                os.fsync(self._file.fileno())
        except OSError as error:
            raise self._refused(error) from error
        return lines - kept

    def _rewrite(self, step: int) -> None:
        kept = (line for line, its_step in self._read() if its_step is not None and its_step <= step)
        self._file.close()
        try:
            replace_file(self.path, kept)
        finally:
            self._file = self._open()

    def has_record(self, kind: str, step: int) -> bool:
        """Whether there is such a record, as "eval", of so many steps done."""
        return any(its_step == step and parse_json(line).get("kind") == kind for line, its_step in self._read())

    def scores_after(self, step: int) -> dict[str, EvalScore]:
        """By source, what the last evaluation after so many steps has found; empty: none is recorded."""
        found: dict[str, EvalScore] = {}
        for line, its_step in self._read():
            if its_step == step and (record := parse_json(line)).get("kind") == "eval":
                found = {
                    name: EvalScore(math.nan if score["loss"] is None else score["loss"], score["accuracy"], score["samples"])
                    for name, score in record["sources"].items()
                }
        return found

    def steps_without_record(self, last: int, every: int) -> list[int]:
        """The steps up to `last` that should have a record, of which there is one every so many steps, and have none."""
        found = {its_step for line, its_step in self._read() if its_step is not None and parse_json(line).get("kind") == "step"}
        return [step for step in range(every, last + 1, every) if step not in found]

    def sync(self) -> None:
        """Have all records survive a power cut."""
        try:
            os.fsync(self._file.fileno())
            sync_folder(self.path.parent)
        except OSError as error:
            raise self._refused(error) from error

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        try:
            self._file.close()
        except OSError as error:
            raise self._refused(error) from error

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open(self) -> FileIO:
        try:
            return open_to_append(self.path)
        except OSError as error:
            raise self._refused(error) from error

    def _read(self) -> Iterator[tuple[bytes, int | None]]:
        """Each line with its newline, and its step: None for one that is no record. No prefix of a record looks whole."""
        with open_plain(self.path) as file:
            for line in file:
                line = line.removesuffix(b"\n") + b"\n"
                try:
                    step = _step_of(line)
                except JsonError:
                    yield line, None
                else:
                    yield line, step

    def _refused(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: metrics cannot be written: {error.strerror or error}")


def _free_name(path: Path) -> Path:
    return next(name for n in itertools.count(1) if not os.path.lexists(name := path.with_name(f"{path.stem}.damaged-{n}{path.suffix}")))


def _step_of(line: bytes) -> int:
    record = parse_json(line)
    step = record.get("step") if isinstance(record, dict) else None
    if type(step) is not int:
        raise JsonError("it has no step")
    return step


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
