"""Check all runs of a sweep before the first of them starts, and report what is wrong with all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from hecate.config import Config, ConfigError, Problem, load_config
from hecate.config.load import COMMAND_LINE
from hecate.config.problems import MAX_PRINTED
from hecate.errors import UserError
from hecate.launch.many_runs.ledger import SweepEntry, changed_values
from hecate.launch.many_runs.sweep import Sweep, SweepRun

_MOST_NAMED = 3


def checked_configs(sweep: Sweep, entries: Mapping[str, SweepEntry], check: Callable[[Config], None]) -> dict[str, Config]:
    """Return the configuration of every run by its name.

    Args:
        entries: what is known of the runs that were begun, by name. Only the folders of the others must be free.
        check: raises UserError if something else is wrong with a configuration, such as its data.

    Raises:
        UserError: with all problems: of configurations; runs that are the same; runs that were begun with other values.
    """
    configs: dict[str, Config] = {}
    wrong: dict[str, list[str]] = {}
    for run in sweep.runs:
        try:
            config = load_config(sweep.run, run.overrides, claim_output=run.name not in entries)
            configs[run.name] = config
            check(config)
        except ConfigError as error:
            for problem in error.problems:
                wrong.setdefault(str(_in_sweep(problem, run, sweep.file)), []).append(run.name)
        except UserError as error:
            wrong.setdefault(str(error), []).append(run.name)
    for text in [*_same_runs(configs), *_changed_runs(configs, entries)]:
        wrong.setdefault(text, []).extend(run.name for run in sweep.runs)
    if wrong:
        raise UserError(_all_texts(wrong, len(sweep.runs)))
    return configs


def _in_sweep(problem: Problem, run: SweepRun, file: str) -> Problem:
    """The problem, located in the sweep file if its value is from there; what is checked as a command line is one only inside hecate."""
    line = run.line_of(problem.key)
    if problem.source != COMMAND_LINE or line is None:
        return problem
    return replace(problem, source=file, line=line)


def _same_runs(configs: Mapping[str, Config]) -> list[str]:
    first: dict[Config, str] = {}
    texts = []
    for name, config in configs.items():
        earlier = first.setdefault(replace(config, output_dir=""), name)
        if earlier != name:
            texts.append(f"{name}: is the same run as {earlier}\n    hint: give each value once")
    return texts


def _changed_runs(configs: Mapping[str, Config], entries: Mapping[str, SweepEntry]) -> list[str]:
    texts = []
    for name, config in configs.items():
        changes = changed_values(entries[name].config, config) if name in entries else []
        if changes:
            first = changes[0]
            more = f", and {len(changes) - 1} more keys" if len(changes) > 1 else ""
            texts.append(
                f"{config.output_dir}: was begun with other values: {first.key} was {first.then}, and is {first.now} now{more}\n"
                "    hint: take another output_dir, or remove that folder, or go back to the values"
            )
    return texts


def _all_texts(wrong: Mapping[str, Sequence[str]], runs: int) -> str:
    """Each problem once, with the runs that have it unless all have."""
    lines = [text if len(names) == runs else f"{text}\n    in {_named(names)}" for text, names in wrong.items()]
    more = [f"... and {len(lines) - MAX_PRINTED} more"] if len(lines) > MAX_PRINTED else []
    return "\n".join([*lines[:MAX_PRINTED], *more])


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMED])
    return shown if len(names) <= _MOST_NAMED else f"{shown} and {len(names) - _MOST_NAMED} more runs"
