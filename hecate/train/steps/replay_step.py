"""Do a skipped step again on one process, from the folder that the run has left (`skipped_steps`), and see where it begins."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hecate.config import Config, load_config
from hecate.errors import UserError
from hecate.io.plain_files import read_plain
from hecate.io.strict_json import JsonError, parse_json
from hecate.optim.optimizer import ExpertOptimizer
from hecate.ranks.ranks import Ranks
from hecate.report.events import StepResult
from hecate.train.steps.skipped_steps import CONFIG_FILE, STEP_FILE, sequences_as_json
from hecate.train.training import Training

_MOST_BYTES = 1 << 28
"""The largest step.json that is read, in bytes: a token of a step takes some 20."""


@dataclass(frozen=True)
class Replayed:
    """What a step has found the first time, and again."""

    then: dict[str, Any]
    """The values of step.json."""
    now: StepResult
    first_module: str | None
    """The module of the model that was first to return a number that is not finite; None: none did."""
    bad_gradients: tuple[str, ...]
    """The parameters whose gradients are not finite, in the order in which the backward pass comes to their layers."""

    def in_words(self) -> str:
        """Lines for the terminal."""
        rows = [("", "then", "now")]
        for label, key in (("loss", "loss"), ("aux loss", "aux_loss"), ("gradient norm", "grad_norm")):
            before = self.then[key]
            rows.append((label, "not finite" if before is None else f"{before:.6g}", f"{getattr(self.now, key):.6g}"))
        if self.then["norm_limit"] is not None:
            rows.append(("limit of the norm", f"{self.then['norm_limit']:.6g}", f"{self.now.norm_limit:.6g}"))
        return "\n".join(
            [
                f"step {self.then['step']}, skipped on {self.then['ranks']} ranks: {self.then['why']}",
                *(f"  {label:18}{before:>14}{now:>14}" for label, before, now in rows),
                f"first module whose output is not finite: {self.first_module or 'none'}",
                f"gradients that are not finite: {_listed(self.bad_gradients)}",
            ]
        )


def replay_step(folder: Path, ranks: Ranks) -> Replayed:
    """Load the state before the step, and do the step. Nothing is saved.

    The base model and the data must be where the run had them.

    Args:
        folder: skipped-step-N in output_dir of the run; it may have been moved.
        ranks: this process alone.

    Raises:
        UserError: there is no such folder, the configuration does not fit this machine, or the data yield other tokens.
    """
    assert ranks.world_size == 1, ranks.world_size
    then = read_step(folder)
    run = Training(_for_one_rank(load_config(folder / CONFIG_FILE, claim_output=False), folder), ranks)
    stream = run.parts.stream
    if sequences_as_json(stream.next_step()) != then["sequences"]:
        raise UserError(f"{folder}: the data yield other tokens for step {then['step']} than they did\n  give the data as they were")
    stream.load_state_dict(dict(run.run_state.stream))
    found: list[str] = []

    def look() -> tuple[()]:
        """Called when all gradients are complete, and before they are used."""
        found.extend(_bad_gradients(run.parts.optimizer))
        return ()

    with _watched(run.parts.base.model) as modules:
        now = run.train_one(look).result
    return Replayed(then, now, modules[0] if modules else None, tuple(found))


def read_step(folder: Path) -> dict[str, Any]:
    """Return step.json of a skipped step. Raises UserError: it cannot be read, or is another file."""
    path = folder / STEP_FILE
    try:
        then = parse_json(read_plain(path, _MOST_BYTES))
        numbers = [then[name] for name in ("loss", "aux_loss", "grad_norm", "norm_limit")]
        if not all(number is None or isinstance(number, int | float) for number in numbers) or type(then["step"]) is not int:
            raise JsonError("its figures are no numbers")
        if not isinstance(then["why"], str) or type(then["ranks"]) is not int or not isinstance(then["sequences"], list):
            raise JsonError("its reason, ranks or sequences are of another kind")
    except (OSError, JsonError, KeyError, TypeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: is not what a run leaves of a skipped step: {reason}\n  give OUTPUT_DIR/skipped-step-N") from error
    found: dict[str, Any] = then
    return found


def _for_one_rank(config: Config, folder: Path) -> Config:
    """The configuration of a run that goes on from the folder's checkpoint in one process."""
    return replace(
        config,
        output_dir=str(folder),
        resume=True,
        topology="auto",
        model=replace(config.model, tensor_parallel=1, shard_non_experts=False),
        data=replace(config.data, eval=()),
        fssdp=replace(config.fssdp, shard_size=None, redundancy=0, reshard_interval=None),
    )


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Yield a list that gets the name of each module that returns numbers that are not finite, in their order."""
    names: list[str] = []

    def hook(name: str) -> Any:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            for value in output if isinstance(output, tuple) else (output,):
                if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                    names.append(name)

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def _bad_gradients(optimizer: ExpertOptimizer) -> list[str]:
    """Names of parameters whose gradients are not finite, the last layer first; what belongs to no layer comes at the end."""
    named: dict[str, nn.Parameter] = {}
    for name, parameter in optimizer.owned.items():
        unit, _, number = name.rpartition(".")
        named[f"layers.{unit}.experts.{number}"] = parameter
    named |= optimizer.replicated
    named |= optimizer.parts.parameters if optimizer.parts else {}
    bad = [name for name, parameter in named.items() if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())]
    return sorted(bad, key=lambda name: -_layer(name))


def _layer(name: str) -> int:
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _listed(names: Sequence[str], most: int = 4) -> str:
    if not names:
        return "none"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more, which the backward pass comes to later" if len(names) > most else "")
