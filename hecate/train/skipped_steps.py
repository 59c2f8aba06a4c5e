"""The end of a run whose steps are skipped one after another: a folder from which the last of them can be done again, and the error.

    skipped-step-N/config.yaml      the run's configuration
                   step.json        what the step has found, its sequences as token ids and targets, and where its samples stand
                   checkpoint-N-1/  the state before the step, as any checkpoint

`hecate.train.replay_step` does the step again, on one process.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hecate import __version__
from hecate.checkpoint.files import CheckpointError
from hecate.checkpoint.save_run import save_state
from hecate.checkpoint.train_state import TrainedParts, TrainState
from hecate.config import Config, to_yaml
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


def too_many_skipped(config: Config, ranks: Ranks, parts: TrainedParts, inputs: StepInputs, result: StepResult) -> UserError:
    """Write the folder of the step that was skipped last, and return the error that ends the run. Every rank must call it.

    A skipped step has changed nothing, so that what `parts` hold now is what they held before it. Only where each source has an adapter
    of its own, adapters whose gradients were finite have taken the step. If the disk refuses, the error says so.
    """
    step = inputs.before.step + 1
    folder = Path(config.output_dir) / f"skipped-step-{step}"
    places = _places(config, parts, inputs.sequences)
    refused = _write_files(folder, config, ranks, inputs, result, places) if ranks.is_first else ""
    refused = ranks.broadcast_from(0, refused.encode() if ranks.is_first else None).decode()
    if not refused:
        try:
            save_state(replace(config, output_dir=str(folder), save_total_limit=None), ranks, parts, inputs.before)
        except CheckpointError as error:
            refused = str(error).splitlines()[0]
    known = [place for of_sequence in places for place in of_sequence]
    shown = ", ".join(known[:_SHOWN_SAMPLES]) + (f" and {len(known) - _SHOWN_SAMPLES} more" if len(known) > _SHOWN_SAMPLES else "")
    look = f"{folder} could not be written: {refused}" if refused else f"to see where it begins: hecate replay-step {folder}"
    return UserError(
        f"the last {config.max_skipped_steps} steps, up to step {step}, were skipped, as many as max_skipped_steps allows\n"
        f"  step {step}: {result.why_skipped}\n"
        f"  its samples: {shown}\n"
        f"  {look}\n"
        "  mend the samples in a new run, or begin it with a lower learning_rate; to train on over these steps:\n"
        f"  hecate train {Path(config.output_dir) / 'config.yaml'} resume=true max_skipped_steps={10 * config.max_skipped_steps}"
    )


def sequences_as_json(sequences: Sequence[PackedSequence]) -> list[dict[str, Any]]:
    """Token ids, targets (-100: none) and the position of each token in its sample, by sequence."""
    return [
        {
            "number": int(one.number),
            "input_ids": one.input_ids.tolist(),
            "targets": one.targets.tolist(),
            "position_ids": one.position_ids.tolist(),
        }
        for one in sequences
    ]


def _places(config: Config, parts: TrainedParts, sequences: Sequence[PackedSequence]) -> list[list[str]]:
    """PATH:NUMBER of each sample, by sequence; the number is the sample's in its source, from 1: the line of a JSONL file."""
    sources, paths = parts.stream.sources, [source.path for source in config.data.train]
    return [[f"{paths[source]}:{int(sources[source].lines[sample])}" for source, sample in one.samples] for one in sequences]


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
