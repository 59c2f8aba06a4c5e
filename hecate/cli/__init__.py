"""The command line, `hecate`. Each verb is a function in the room of its subject; the modules it needs are imported inside it.

`jobs` starts training and watches it, `sweeps` trains many runs and rounds of clients, `forecasts` measures and predicts, `machine` tells
what one needs before a run, `checkpoints` tells of those that a run has saved, `models` writes data for a model and uses what a run has
trained, `answers` asks it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from inspect import signature
from typing import Annotated, NoReturn

import typer

import hecate
from hecate.cli import answers, checkpoints, drills, forecasts, jobs, machine, models, sweeps
from hecate.errors import USER_ERROR_EXIT, UserError
from hecate.io.process_end import run_and_end
from hecate.io.terminal import show_messages, show_text

_log = logging.getLogger(__name__)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fully sharded sparse data parallel (FSSDP) training of mixtures of LoRA experts.",
)
_VERBS: dict[str, dict[str, Callable[..., None]]] = {
    "Train": {
        "train": jobs.train,
        "sweep": sweeps.sweep,
        "federate": sweeps.federate,
        "replay-step": jobs.replay_step,
        "launch": jobs.launch,
        "ray": jobs.ray,
        "submit": jobs.submit,
        "status": jobs.status,
        "report": jobs.report,
    },
    "Measure and predict": {
        "plan": forecasts.plan,
        "simulate": forecasts.simulate,
        "profile": forecasts.profile,
        "doctor": machine.doctor,
        "drill": drills.drill,
        "schema": machine.schema,
    },
    "Data and trained models": {
        "eval": models.evaluate,
        "generate": answers.generate,
        "chat": answers.chat,
        "export": models.export,
        "merge": models.merge,
        "make-tasks": models.make_tasks,
        "convert": models.convert,
    },
}
for _panel, _functions in _VERBS.items():
    for _name, _function in _functions.items():
        # A verb that takes KEY=VALUE gets --key=value, too, and answers it with the key that is meant.
        _settings = {"ignore_unknown_options": "overrides" in signature(_function).parameters}
        app.command(name=_name, rich_help_panel=_panel, context_settings=_settings)(_function)
app.add_typer(checkpoints.verbs, name="checkpoint", rich_help_panel="Train")


def main() -> NoReturn:
    """Run the command line, and end the process. A user's mistake ends it with a short text and status 2, never with a traceback."""
    run_and_end(_command)


def _command() -> None:
    show_messages()
    try:
        app()
    except UserError as error:
        _log.error(f"hecate: {error}")
        sys.exit(USER_ERROR_EXIT)


def _show_version(wanted: bool) -> None:
    if wanted:
        show_text(f"hecate {hecate.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show the version and end")] = False,
) -> None:
    pass
