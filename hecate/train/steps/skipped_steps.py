"""The end of a run whose steps are skipped one after another: a folder from which the last of them can be done again, and the error.

    skipped-step-N/config.yaml      the run's configuration
                   step.json        what the step has found, its sequences as token ids and targets, and where its samples stand
                   checkpoint-N-1/  the state before the step, as any checkpoint

`hecate.train.steps.replay_step` does the step again, on one process.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from hecate import __version__
from hecate.checkpoint.files import CheckpointError
from hecate.checkpoint.history import latest_good
from hecate.checkpoint.save_run import save_state
from hecate.checkpoint.train_state import TrainedParts, TrainState
from hecate.config import Config, DataSource, to_yaml
from hecate.config.files.paths import indexed_prefix
from hecate.data.files.formats import how_read
from hecate.data.files.records import places_of_records
from hecate.data.sequences import PackedSequence
from hecate.errors import UserError
from hecate.io.durable import replace_file
from hecate.ranks.ranks import Ranks
from hecate.report.events import StepResult

CONFIG_FILE, STEP_FILE = "config.yaml", "step.json"
_SHOWN_SAMPLES = 4


@dataclass(frozen=True)
class StepInputs:
    """What a step begins with."""

    before: TrainState
    sequences: list[PackedSequence]


def too_many_skipped(
    config: Config, ranks: Ranks, parts: TrainedParts, inputs: StepInputs, state: TrainState, result: StepResult
) -> UserError:
    """Write the folder of the step that was skipped last, and return the error that ends the run. Every rank must call it.

    A skipped step has changed nothing, so that what `parts` hold now is what they held before it. Only where each source has an adapter
    of its own, adapters whose gradients were finite have taken the step. If the disk refuses, the error says so. A run that has no
    checkpoint yet gets one, from which it can be resumed.

    Args:
        state: where the run stands after the step.
    """
    step = inputs.before.step + 1
    folder = Path(config.output_dir) / f"skipped-step-{step}"
    shown = refused = ""
    if ranks.is_first:
        places = _places(config, parts, inputs.sequences)
        known = [place for of_sequence in places for place in of_sequence]
        shown = ", ".join(known[:_SHOWN_SAMPLES]) + (f" and {len(known) - _SHOWN_SAMPLES} more" if len(known) > _SHOWN_SAMPLES else "")
        refused = _write_files(folder, config, ranks, inputs, result, places)
    shown, refused = (ranks.broadcast_from(0, text.encode() if ranks.is_first else None).decode() for text in (shown, refused))
    refused = refused or _save(replace(config, output_dir=str(folder), save_total_limit=None), ranks, parts, inputs.before)
    is_lacking = ranks.is_first and latest_good(Path(config.output_dir)) is None
    unsaved = _save(config, ranks, parts, state) if ranks.all_max(float(is_lacking)) else ""
    own = shlex.quote(str(Path(config.output_dir) / "config.yaml"))
    go_on = f"hecate train {own} resume=true max_skipped_steps={10 * config.max_skipped_steps}"
    look = f"to see where it begins: hecate replay-step {shlex.quote(str(folder))}"
    if refused:
        look = f"{folder} could not be written: {refused}"
    return UserError(
        f"the last {config.max_skipped_steps} steps, up to step {step}, were skipped, as many as max_skipped_steps allows\n"
        f"  step {step}: {result.why_skipped}\n"
        f"  its samples: {shown}\n"
        f"  {look}\n"
        "  mend the samples in a new run, or begin it with a lower learning_rate; to train on over these steps:\n"
        f"  {f'this run cannot be resumed, because it has no checkpoint: {unsaved}' if unsaved else go_on}"
    )


def _save(config: Config, ranks: Ranks, parts: TrainedParts, state: TrainState) -> str:
    """Save; returns why the disk has refused, or nothing. Every rank must call it."""
    try:
        save_state(config, ranks, parts, state)
    except CheckpointError as error:
        return str(error).splitlines()[0]
    return ""


def sequences_as_json(sequences: Sequence[PackedSequence]) -> list[dict[str, Any]]:
    """Token ids, targets (-100: none) and the position of each token in its sample, by sequence."""
    return [
        {
            "number": int(packed.number),
            "input_ids": packed.input_ids.tolist(),
            "targets": packed.targets.tolist(),
            "position_ids": packed.position_ids.tolist(),
        }
        for packed in sequences
    ]


def _places(config: Config, parts: TrainedParts, sequences: Sequence[PackedSequence]) -> list[list[str]]:
    """File and line of each sample, by sequence."""
    numbers = [[(source, int(parts.stream.sources[source].lines[sample])) for source, sample in packed.samples] for packed in sequences]
    of_source: dict[int, set[int]] = {}
    for source, number in chain.from_iterable(numbers):
        of_source.setdefault(source, set()).add(number)
    places = {source: _places_in(config.data.train[source], wanted) for source, wanted in of_source.items()}
    return [[places[source][number] for source, number in of_sequence] for of_sequence in numbers]


def _places_in(source: DataSource, numbers: Collection[int]) -> dict[int, str]:
    """Where the samples of a source with these numbers, from 1, are; by their numbers where the data set has no lines or has gone."""
    path = source.path
    if indexed_prefix(path) is not None:
        return {number: f"document {number} of {path}" for number in numbers}
    found: dict[int, str] = {}
    with suppress(UserError):
        found = places_of_records(path, numbers, **how_read(source))
    return {number: found.get(number, f"record {number} of {path}") for number in numbers}


def _write_files(
    folder: Path, config: Config, ranks: Ranks, inputs: StepInputs, result: StepResult, places: Sequence[Sequence[str]]
) -> str:
    """Write what one rank knows; returns why the disk has refused, or nothing."""
    facts = {
        "step": inputs.before.step + 1,
        "why": result.why_skipped,
        "loss": _finite(result.loss),
        "aux_loss": _finite(result.aux_loss),
        "grad_norm": _finite(result.grad_norm),
        "norm_limit": _finite(result.norm_limit),
        "ranks": ranks.world_size,
        "seed": config.seed,
        "versions": {"hecate": __version__, "torch": torch.__version__},
        "samples": places,
        "sequences": sequences_as_json(inputs.sequences),
    }
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        replace_file(folder / CONFIG_FILE, [to_yaml(config).encode()])
        replace_file(folder / STEP_FILE, [json.dumps(facts, allow_nan=False).encode()])
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
