"""Held-out figures of a round's result and of its clients, by `hecate eval` in a process of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hecate.apps.federate.plans import base_of_round, round_folder
from hecate.apps.federate.section.settings import without_rounds
from hecate.config import Config, to_yaml
from hecate.errors import UserError
from hecate.io.durable import replace_file
from hecate.io.plain_files import read_plain
from hecate.io.python_module import RUN_MODULE
from hecate.io.strict_json import JsonError, parse_json
from hecate.launch.many_runs.processes import reason_of

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
    if list(read_figures(found)) != list(map(str, adapters.values())):
        model = replace(config.model, name_or_path=base_of_round(config, number))
        data = replace(config.data, separate=False)
        evaluated = replace(without_rounds(config), model=model, data=data, output_dir=str(folder), resume=False)
        replace_file(settings, [to_yaml(evaluated).encode()])
        command = [*RUN_MODULE, "hecate", "eval", str(settings), "--models", ",".join(map(str, adapters.values()))]
        done = subprocess.run([*command, "--json", str(found)], capture_output=True, text=True, check=False)
        replace_file(log, [(done.stdout + done.stderr).encode()])
        if done.returncode:
            raise UserError(f"the held-out sets of round {number} were not evaluated: {reason_of(done.stdout + done.stderr)}\n  see {log}")
    return dict(zip(adapters, read_figures(found).values(), strict=True))


def read_figures(found: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Return what `hecate eval` has written of each adapter, by its name; nothing if it was not asked yet.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        models = parse_json(read_plain(found))["models"]
        return {str(model["name"]): _numbers(model["tasks"]) for model in models}
    except FileNotFoundError:
        return {}
    except (OSError, JsonError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"{type(error).__name__}: {error}" if not isinstance(error, OSError | JsonError) else error
        raise UserError(f"{found}: cannot be read as held-out figures: {what}\n  remove it, and they are measured again") from error


def _numbers(tasks: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {task: {key: float(value) for key, value in figures.items() if key != "samples"} for task, figures in tasks.items()}
