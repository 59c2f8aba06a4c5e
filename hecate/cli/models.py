"""Verbs that write data for a model and use what a run has trained: eval, export, make-tasks. `answers` has generate and chat."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hecate.cli.arguments import ConfigFile, Overrides


def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    adapter: Annotated[Path | None, typer.Option(help="adapter, model, checkpoint or run folder; default: the one in output_dir")] = None,
) -> None:
    """Show held-out loss and exact accuracy, on data.eval, of what a run has trained. Uses one process.

    In the place of CONFIG the folder of a run, of a checkpoint or of an adapter may stand, wherever it is now.
    """
    from hecate.config import load_config
    from hecate.errors import UserError
    from hecate.train.trained import run_config_of

    file, given = config, list(overrides or ())
    if config.is_dir():
        found = run_config_of(config)
        if found is None:
            raise UserError(f"{config}: not the folder of a run, nor one in it\n  give the configuration, and --adapter {config}")
        # The folder may have been moved since its configuration was written.
        file, adapter = found, adapter or config
        given += [f"output_dir={found.parent}"] * (not any(one.startswith("output_dir=") for one in given))
    loaded = load_config(file, given, claim_output=False)
    from hecate.train.inference import evaluate_trained
    from hecate.train.trained import default_trained

    evaluate_trained(loaded, adapter or default_trained(loaded))


def export(
    trained: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run, a checkpoint or an adapter, such as runs/quickstart")],
    folder: Annotated[Path | None, typer.Argument(metavar="OUT", help="new folder to write")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="new folder to write, in place of OUT")] = None,
    to: Annotated[
        str | None, typer.Option(help="mixlora, mixtral, peft, per-expert or merged; default: a checkpoint becomes what its run leaves")
    ] = None,
    model: Annotated[str | None, typer.Option(help="base model; default: the one that was trained on")] = None,
    user: Annotated[str | None, typer.Option(help="the user whose LoRA is written, of an adapter whose experts are mixed by users")] = None,
    features: Annotated[Path | None, typer.Option(help="the .npz file with that user's features")] = None,
) -> None:
    """Write what a run has trained in the form that another program reads: an adapter, or a whole model (docs/adapters.md)."""
    from hecate.errors import UserError

    if (folder is None) == (out is None):
        raise UserError("hecate export: name the new folder once: hecate export RUN --to FORM -o OUT")
    new = out or folder
    assert new is not None
    from hecate.train.trained import export as export_trained

    for line in export_trained(trained, new, to=to, user=user, features=features, model=model):
        print(line)
    print(f"wrote {new}")


def make_tasks(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="where to write {task}.train.jsonl and {task}.eval.jsonl")],
    tasks: Annotated[str, typer.Option(help="task names separated by commas")] = "chain_sum,gcd,letter_counting,count_bits",
    train_size: Annotated[int, typer.Option(min=1, help="samples for training, of each task")] = 1000,
    eval_size: Annotated[int, typer.Option(min=1, help="held-out samples, of each task")] = 50,
    seed: Annotated[int, typer.Option(help="seed of the samples")] = 0,
) -> None:
    """Write data of several tasks with the package reasoning-gym (extra `quickstart`)."""
    from hecate.data.synthetic_tasks import write_tasks

    for written in write_tasks(folder, tasks.split(","), train_size, eval_size, seed):
        every = ", which are all the different prompts of this task" if written.exhausted else ""
        print(f"{written.task}: {written.train_samples} for training, {written.eval_samples} held out{every}")
