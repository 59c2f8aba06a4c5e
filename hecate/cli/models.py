"""Verbs that write data for a model and use what a run has trained: eval, generate, export, make-tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hecate.cli.arguments import ConfigFile, Overrides


def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    adapter: Annotated[Path | None, typer.Option(help="adapter or model folder; default: the one in output_dir")] = None,
) -> None:
    """Show held-out loss and exact accuracy, on data.eval, of the adapter or model that a run has trained. Uses one process."""
    from hecate.config import load_config

    loaded = load_config(config, overrides or (), claim_output=False)
    from hecate.train.inference import evaluate_trained

    evaluate_trained(loaded, adapter or Path(loaded.output_dir) / loaded.moe.output_folder)


def generate(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="adapter or model folder, such as runs/quickstart/adapter")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="the user's message")],
    system: Annotated[str | None, typer.Option(help="system message")] = None,
    model: Annotated[str | None, typer.Option(help="base model; default: the one that the adapter names")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="length of the answer at most")] = 64,
    user: Annotated[str | None, typer.Option(help="who asks, for an adapter whose experts are mixed by users")] = None,
    features: Annotated[Path | None, typer.Option(help="the .npz file with that user's features")] = None,
) -> None:
    """Answer one prompt, without sampling, with a trained adapter and its base model, or with a trained model."""
    from hecate.train.inference import answer

    print(answer(adapter, prompt, system=system, model=model, max_new_tokens=max_new_tokens, user=user, features=features))


def export(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="adapter folder, such as runs/reclora/adapter")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="new folder to write")],
    user: Annotated[str | None, typer.Option(help="the user whose LoRA is written")] = None,
    features: Annotated[Path | None, typer.Option(help="the .npz file with that user's features")] = None,
) -> None:
    """Write what an adapter whose experts are mixed by users is for one of them: an ordinary LoRA in PEFT's format."""
    from hecate.train.inference import bake

    bake(adapter, out, user, features)
    print(f"wrote {out}")


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
