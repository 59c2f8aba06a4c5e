"""Verbs that write data and recipes for a model and use what a run has trained: eval, export, merge, make-tasks, convert. `answers` has
generate and chat."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from hecate.cli.arguments import ConfigFile, Overrides, check_json
from hecate.errors import USER_ERROR_EXIT
from hecate.io.terminal import show_progress, show_text


def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    adapter: Annotated[Path | None, typer.Option(help="adapter, model, checkpoint or run folder; default: the one in output_dir")] = None,
    models: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="several such folders side by side; base is the base model, with nothing added")
    ] = None,
    choices: Annotated[
        list[Path] | None, typer.Option(help='JSONL with "question" or "prompt", "choices" and "answer"; may be given several times')
    ] = None,
    tasks: Annotated[str | None, typer.Option(metavar="A,B,...", help="tasks of lm-eval (extra `lm-eval`)")] = None,
    task_folder: Annotated[Path | None, typer.Option(help="folder with the YAML files of the tasks; default: lm-eval's own")] = None,
    apply_chat_template: Annotated[bool, typer.Option("--apply-chat-template", help="ask the tasks' questions as conversations")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="write all figures to this file; - prints them alone")] = None,
    record_routing: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write the records of data.eval, each with its routing, for moe.replay")
    ] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="ranks on this machine that share the work; default: this process alone")] = None,
) -> None:
    """Show what a trained model makes of held-out data: loss, exact and verified answers, choices, tasks of lm-eval (docs/use/answers.md).

    In the place of CONFIG the folder of a run, of a checkpoint or of an adapter may stand, wherever it is now; of any model, with --choices
    or --tasks.
    """
    from hecate.apps.answers.evaluation_main import EvaluationRequest, evaluate_as_rank
    from hecate.apps.answers.trained import run_config_of
    from hecate.data.files.choices import read_choices
    from hecate.errors import UserError

    if adapter is not None and models is not None:
        raise UserError("--adapter and --models were given\n  name all of them in --models")
    if tasks is None and (task_folder is not None or apply_chat_template):
        raise UserError(f"{'--task-folder' if task_folder else '--apply-chat-template'} was given without --tasks")
    check_json(json_path)
    if record_routing is not None and not record_routing.absolute().parent.is_dir():
        raise UserError(f"--record-routing {record_routing}: there is no folder {record_routing.parent}; make it first")
    if record_routing is not None and nproc not in (None, 1):
        raise UserError("--record-routing and --nproc were given: one process records\n  leave --nproc out")
    read = {path.stem: read_choices(path) for path in choices or ()}
    if len(read) < len(choices or ()):
        raise UserError("--choices: two files have the same name, and figures are shown by name; rename one")
    if tasks is not None:
        # Nothing is downloaded: data sets are local files, or were fetched before.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
        from hecate.apps.answers.lm_eval_tasks import require_lm_eval

        require_lm_eval()
    file: Path | None = config
    given = list(overrides or ())
    if config.is_dir():
        file, adapter = run_config_of(config), adapter or config
        if file is None and not read and tasks is None:
            raise UserError(f"{config}: not the folder of a run, nor one in it\n  give the configuration, and --adapter {config}")
        if file is None and given:
            raise UserError(f"{config}: without the configuration of a run there is nothing that {given[0]} could change")
    names = models.split(",") if models is not None else None if adapter is None else [str(adapter)]
    request = EvaluationRequest(
        config=None if file is None else str(file),
        overrides=tuple(given),
        models=None if names is None else tuple(names),
        choices=tuple(map(str, choices or ())),
        tasks=None if tasks is None else tuple(tasks.split(",")),
        task_folder=None if task_folder is None else str(task_folder),
        apply_chat_template=apply_chat_template,
        json_path=None if json_path is None else str(json_path),
        record_routing=None if record_routing is None else str(record_routing),
    )
    if nproc in (None, 1):
        evaluate_as_rank(request)
        return
    if "RANK" in os.environ:
        raise UserError("--nproc: torchrun has started the ranks already; give it --nproc-per-node instead")
    if tasks is not None:
        raise UserError("--tasks and --nproc were given: tasks of lm-eval are asked in one process\n  leave --nproc out")
    from hecate.apps.answers.compare import BASE, require_no_checkpoint
    from hecate.apps.answers.trained import default_trained, find_trained
    from hecate.config import load_config
    from hecate.launch.local_launcher import launch_local
    from hecate.train.preflight import check_devices

    # What can be told now is told before any process starts.
    assert nproc is not None
    check_devices(nproc, "--nproc")
    loaded = None if file is None else load_config(file, given, claim_output=False, trains=False)
    for name in names if names is not None else [] if loaded is None else [str(default_trained(loaded))]:
        if name != BASE:
            require_no_checkpoint(find_trained(Path(name), says=False))
    raise typer.Exit(launch_local("hecate.apps.answers.evaluation_main", [request.as_text()], nproc))


def export(
    trained: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run, a checkpoint or an adapter, such as runs/quickstart")],
    folder: Annotated[Path | None, typer.Argument(metavar="OUT", help="new folder to write")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="new folder to write, in place of OUT")] = None,
    to: Annotated[
        str | None,
        typer.Option(help="the form; left out, a checkpoint becomes what its run leaves, and of an adapter it is said which forms hold it"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="base model; default: the one that was trained on")] = None,
    user: Annotated[str | None, typer.Option(help="the user whose LoRA is written, of an adapter whose experts are mixed by users")] = None,
    features: Annotated[Path | None, typer.Option(help="the .npz file with that user's features")] = None,
) -> None:
    """Write what a run has trained in the form that another program reads: an adapter, or a whole model (docs/use/adapters.md)."""
    from hecate.config.files.paths import require_trained
    from hecate.errors import UserError

    if (folder is None) == (out is None):
        raise UserError("hecate export: name the new folder once: hecate export RUN --to FORM -o OUT")
    new = out or folder
    assert new is not None
    require_trained(trained)
    from hecate.apps.answers.trained import export as export_trained

    for line in export_trained(trained, new, to=to, user=user, features=features, model=model):
        show_text(line)
    show_text(f"wrote {new}")


def merge(
    adapters: Annotated[list[Path], typer.Argument(metavar="A B ...", help="folders of adapters, or of runs that have left them")],
    out: Annotated[Path, typer.Option("--out", "-o", help="new folder to write")],
    method: Annotated[str, typer.Option(help="lego, stack, average, linear, ties or refine")],
    weights: Annotated[str | None, typer.Option(metavar="W,W,...", help="of each adapter, with the sum 1; default: equal ones")] = None,
    rank: Annotated[int | None, typer.Option(help="lego, stack: of the result; default: lego the largest, stack all together")] = None,
    experts: Annotated[int | None, typer.Option(help="lego: of one mixture, the most experts that a layer keeps")] = None,
    reweight: Annotated[str | None, typer.Option(help="lego: none, parameter, output or both, the default")] = None,
    inexact: Annotated[bool, typer.Option("--inexact", help="average: take the means of A and of B where A differ, too")] = False,
    density: Annotated[float | None, typer.Option(help="ties: share of the numbers that take part; default: 0.2")] = None,
    ridge: Annotated[float | None, typer.Option(help="refine: how much a change of B counts; default: 0.01")] = None,
    distance: Annotated[str | None, typer.Option(help="refine: frobenius, the default, or cosine")] = None,
    model: Annotated[str | None, typer.Option(help="base model; default: the one that each adapter names")] = None,
) -> None:
    """Merge adapters of one base model into one, or make an adapter's ranks or experts fewer (docs/use/adapters.md)."""
    from hecate.errors import UserError

    try:
        shares = None if weights is None else [float(weight) for weight in weights.split(",")]
    except ValueError:
        raise UserError(f"--weights {weights}: must be numbers separated by commas, one for each adapter") from None
    from hecate.apps.answers.trained import merge as merge_trained

    def show(done: int, of: int, module: str) -> None:
        show_progress(f"{done}/{of} {module}")

    live = sys.stderr.isatty()
    options = {"rank": rank, "experts": experts, "reweight": reweight, "density": density, "ridge": ridge, "distance": distance}
    try:
        lines = merge_trained(adapters, out, method, shares, model, show if live else None, inexact=inexact or None, **options)
    finally:
        if live:
            show_progress()
    for line in lines:
        show_text(line)
    show_text(f"wrote {out}")


def make_tasks(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="where to write {task}.train.jsonl and {task}.eval.jsonl")],
    tasks: Annotated[str, typer.Option(help="task names separated by commas")] = "chain_sum,gcd,letter_counting,count_bits",
    train_size: Annotated[int, typer.Option(min=1, help="samples for training, of each task")] = 1000,
    eval_size: Annotated[int, typer.Option(min=1, help="held-out samples, of each task")] = 50,
    seed: Annotated[int, typer.Option(help="seed of the samples")] = 0,
) -> None:
    """Write data of several tasks with the package reasoning-gym (extra `quickstart`)."""
    from hecate.data.files.synthetic_tasks import write_tasks

    for written in write_tasks(folder, tasks.split(","), train_size, eval_size, seed):
        every = ", which are all the different prompts of this task" if written.exhausted else ""
        show_text(f"{written.task}: {written.train_samples} for training, {written.eval_samples} held out{every}")


def convert(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML file of axolotl, LLaMA-Factory or TRL")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="RECIPE", help="new YAML file; left out, only the table is shown")
    ] = None,
    drop: Annotated[list[str] | None, typer.Option(help="a key that is refused, to be left out; may be given several times")] = None,
) -> None:
    """Make a recipe of a configuration of axolotl, LLaMA-Factory or TRL, and say of each of its keys what becomes of it.

    If a key is refused nothing is written, and the exit status is 2.
    """
    from hecate.apps.convert.convert import convert_file, write

    converted = convert_file(file, drop or ())
    show_text(converted.table())
    if out is not None:
        write(converted, file, out)
        show_text(f"wrote {out}")
    elif converted.refused:
        raise typer.Exit(USER_ERROR_EXIT)
