"""The program of one rank of `hecate eval`: `python -m hecate.apps.answers.evaluation_main REQUEST`, a request as JSON.

`hecate eval` runs it in its own process, or starts a process of it for each rank (`--nproc`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hecate.errors import UserError
from hecate.io.process_end import run_and_end
from hecate.io.terminal import show_messages
from hecate.ranks.launcher_files import exit_with_user_error


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What `hecate eval` was asked for."""

    config: str | None
    """file of the configuration; None: there is none, and only questions are asked"""
    overrides: tuple[str, ...]
    models: tuple[str, ...] | None
    """folders, or `hecate.apps.answers.compare.BASE`; None: what the configuration's run has left"""
    choices: tuple[str, ...] = ()
    """files"""
    tasks: tuple[str, ...] | None = None
    """of lm-eval"""
    task_folder: str | None = None
    apply_chat_template: bool = False
    json_path: str | None = None
    record_routing: str | None = None
    """file"""

    def as_text(self) -> str:
        """For the rank's command."""
        return json.dumps(asdict(self))


def preload() -> None:
    """Import the modules that a rank needs. The fork server calls this once, for all ranks of a machine."""
    from hecate.train.rank_main import preload as preload_training

    preload_training()


def main(arguments: Sequence[str]) -> None:
    """Evaluate as one rank.

    Args:
        arguments: a request as JSON.

    Raises:
        SystemExit: with status 2 after a user's mistake, whose text is printed.
    """
    show_messages()
    try:
        given: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in json.loads(arguments[0]).items()}
        evaluate_as_rank(EvaluationRequest(**given))
    except UserError as error:
        exit_with_user_error(error)


def evaluate_as_rank(request: EvaluationRequest) -> None:
    """Join the ranks that the environment describes, evaluate with them, and show the figures on rank 0.

    Raises:
        UserError: a file cannot be read or written, or as `hecate.apps.answers.compare.compare`.
    """
    from hecate.apps.answers.compare import Questions
    from hecate.apps.answers.inference import evaluate_models
    from hecate.apps.answers.lm_eval_tasks import LmEvalTasks
    from hecate.apps.answers.trained import default_trained
    from hecate.config import load_config
    from hecate.data.files.choices import read_choices

    config = None if request.config is None else load_config(Path(request.config), request.overrides, claim_output=False, trains=False)
    models = request.models
    if models is None:
        assert config is not None
        models = (str(default_trained(config)),)
    lm_eval = None
    if request.tasks is not None:
        folder = None if request.task_folder is None else Path(request.task_folder)
        lm_eval = LmEvalTasks(request.tasks, folder, request.apply_chat_template)
    record = None if request.record_routing is None else Path(request.record_routing)
    questions = Questions({Path(name).stem: read_choices(Path(name)) for name in request.choices}, lm_eval, record)
    evaluate_models(config, models, questions, None if request.json_path is None else Path(request.json_path))


if __name__ == "__main__":
    run_and_end(lambda: main(sys.argv[1:]))
