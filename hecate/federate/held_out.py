"""Held-out figures of a round's result and of its clients, by `hecate eval` in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hecate.config import Config, to_yaml
from hecate.config.schema import RoundsConfig
from hecate.errors import UserError
from hecate.federate.plans import base_of_round, round_folder
from hecate.io.durable import replace_file
from hecate.sweep.processes import reason_of

Figures = dict[str, dict[str, dict[str, float]]]
"""of each adapter by name, of each held-out set by name: loss, and what else was measured"""


def held_out_figures(config: Config, number: int, adapters: Mapping[str, Path]) -> Figures:
    """Evaluate adapters of a round on all held-out sets, unless that was done before.

    Args:
        adapters: folders by name.

    Raises:
        UserError: the evaluation has failed.
    """
    folder = round_folder(config, number).path
    found, settings, log = folder / "held_out.json", folder / "held_out.yaml", folder / "held_out.log"
    if [model["name"] for model in _models(found)] != list(map(str, adapters.values())):
        model = replace(config.model, name_or_path=base_of_round(config, number))
        data = replace(config.data, separate=False)
        evaluated = replace(config, rounds=RoundsConfig(), model=model, data=data, output_dir=str(folder), resume=False)
        replace_file(settings, [to_yaml(evaluated).encode()])
        command = [sys.executable, "-m", "hecate", "eval", str(settings), "--models", ",".join(map(str, adapters.values()))]
        done = subprocess.run([*command, "--json", str(found)], capture_output=True, text=True, check=False)
        replace_file(log, [(done.stdout + done.stderr).encode()])
        if done.returncode:
            raise UserError(f"the held-out sets of round {number} were not evaluated: {reason_of(done.stdout + done.stderr)}\n  see {log}")
    return {name: _numbers(model["tasks"]) for name, model in zip(adapters, _models(found), strict=True)}


def _models(found: Path) -> list[dict[str, Any]]:
    """What `hecate eval` has written of each adapter; nothing if it was not asked yet."""
    models: list[dict[str, Any]] = json.loads(found.read_bytes())["models"] if found.exists() else []
    return models


def _numbers(tasks: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {task: {key: float(value) for key, value in figures.items() if key != "samples"} for task, figures in tasks.items()}
