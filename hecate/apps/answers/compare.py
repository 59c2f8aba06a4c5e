"""Evaluate one model or several on held-out data, questions with choices, and tasks of lm-eval; and show them side by side."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from hecate.adapters.adapter_format import AdapterFormat
from hecate.adapters.format_table import format_of, read_adapter
from hecate.adapters.formats.lora import with_loras
from hecate.adapters.formats.peft_by_source import sources_in
from hecate.adapters.formats.whole_model import is_model_folder, load_plain_model
from hecate.apps.answers.checkpointed import is_checkpoint
from hecate.apps.answers.likelihood import accuracies
from hecate.apps.answers.lm_eval_tasks import LmEvalTasks, lm_eval_figures
from hecate.apps.answers.opened import as_opened, in_template_beside, load_trained, require_users
from hecate.apps.answers.record_routing import RoutingRecord, require_routers
from hecate.apps.answers.trained import find_trained
from hecate.config import Config
from hecate.config.files.paths import is_gguf_name
from hecate.data.chat.templates import read_template, template_beside
from hecate.data.evaluation import GenerationItem
from hecate.data.files.choices import ChoiceItem
from hecate.data.files.synthetic_tasks import has_verifiers, verdict
from hecate.data.files.user_features import users_of
from hecate.data.sources import hold_out
from hecate.errors import UserError, install_hint
from hecate.model.base import BaseChoice, BaseModel
from hecate.model.files.load import pick_dtype, resolve_model
from hecate.model.layers.attention import AttentionChoice
from hecate.model.moe_model import MoeModel
from hecate.ranks.ranks import Ranks
from hecate.report.summary import print_facts, summary_console
from hecate.train.build import encode_sources, in_chosen_template, on_device
from hecate.train.evaluate import evaluate

_log = logging.getLogger(__name__)

BASE = "base"
"""the name of the configuration's base model, with nothing added, among the models to compare"""
_BATCH = 16
"""choices that are computed together where no configuration says eval.batch_size"""


@dataclass(frozen=True)
class Questions:
    """What models are asked beside the configuration's held-out data."""

    choices: Mapping[str, Sequence[ChoiceItem]] = field(default_factory=dict)
    """by the name that the table shows"""
    lm_eval: LmEvalTasks | None = None
    record_routing: Path | None = None
    """a file that gets the records of data.eval with what the routers make of them; None: nobody asks"""


@dataclass(frozen=True)
class TaskFigures:
    """What was measured of one model on one task."""

    samples: int
    figures: Mapping[str, float]
    """loss, exact (the share of answers that are the file's), verified (the mean of a verifier's scores), acc, acc_norm, or lm-eval's"""


@dataclass(frozen=True)
class ModelFigures:
    """What was measured of one model."""

    name: str
    folder: Path
    what: str
    """adapter, checkpoint, model or base"""
    tasks: Mapping[str, TaskFigures]


def compare(config: Config | None, names: Sequence[str], questions: Questions, ranks: Ranks) -> list[ModelFigures]:
    """Evaluate models, one after another. Every rank must call it.

    Args:
        config: whose `data.evaluated` is used, and how it computes; None: only `questions` are asked.
        names: folders of what was trained, or `BASE`.

    Raises:
        UserError: there is nothing to evaluate on, a name stands for two things, or a model cannot be opened or evaluated.
    """
    sources = [source.name for source in config.data.evaluated] if config is not None else []
    named = [*sources, *questions.choices, *(questions.lm_eval.names if questions.lm_eval is not None else ())]
    if not named:
        raise UserError(
            "data.eval is empty\n  name held-out files, as in hecate eval runs/qwen data.eval=held_out.jsonl, or give --choices or --tasks"
        )
    if twice := [name for name in named if named.count(name) > 1]:
        raise UserError(f"{twice[0]}: two files or tasks have this name, and figures are shown by name; rename one")
    if questions.record_routing is not None and (len(sources), len(names), ranks.world_size) != (1, 1, 1):
        raise UserError(
            f"--record-routing: records one file by one model in one process, but there are {len(sources)} evaluated sources, "
            f"{len(names)} models and {ranks.world_size} ranks\n  name one of each"
        )
    found: list[ModelFigures] = []
    loaded: tuple[Path, BaseModel, MoeModel] | None = None
    for name in names:
        folder = None if name == BASE else _folder_of(name, ranks)
        if loaded is not None and folder is not None and _exchanged(config, loaded, folder):
            loaded = folder, *loaded[1:]  # which takes no time, unlike loading the base model again
        else:
            loaded = None
            gc.collect()  # before the next model is loaded
            if ranks.device.type == "cuda":
                torch.cuda.empty_cache()
            loaded = _load(config, folder, ranks)
        found.append(_figures(config, name, loaded, questions, ranks))
    return found


def require_no_checkpoint(found: Path) -> None:
    """Raises UserError: what `find_trained` has found is a checkpoint, which several ranks cannot open."""
    if is_checkpoint(found):
        raise UserError(f"{found}: a checkpoint is opened by one process\n  leave --nproc out, or give what hecate export makes of it")


def show_figures(models: Sequence[ModelFigures]) -> None:
    """Print a line for each task and figure, with a column for each model. No number is cut, whatever the width."""
    console = summary_console()
    table = Table(title="Held-out data", title_justify="left")
    table.add_column("task", overflow="fold")
    table.add_column("samples", justify="right", no_wrap=True)
    table.add_column("figure", no_wrap=True)
    for model in models:
        table.add_column(Text(model.name), justify="right", overflow="fold", min_width=8)
    for task in dict.fromkeys(task for model in models for task in model.tasks):
        of_task = [model.tasks.get(task) for model in models]
        samples = dict.fromkeys(str(one.samples) for one in of_task if one is not None)
        for figure in dict.fromkeys(figure for one in of_task if one is not None for figure in one.figures):
            values = [None if one is None else one.figures.get(figure) for one in of_task]
            shown = ["-" if value is None else f"{value:.3f}" for value in values]
            table.add_row(Text(task), ", ".join(samples), figure, *shown)
    console.print(table)
    print_facts(console, [(model.what, str(model.folder)) for model in models])


def figures_json(models: Sequence[ModelFigures]) -> str:
    """All figures, with all their digits."""
    value = [
        {
            "name": model.name,
            "folder": str(model.folder),
            "what": model.what,
            "tasks": {task: {"samples": one.samples, **one.figures} for task, one in model.tasks.items()},
        }
        for model in models
    ]
    return json.dumps({"models": value}, indent=1, ensure_ascii=False)


def _figures(
    config: Config | None, name: str, loaded: tuple[Path, BaseModel, MoeModel], questions: Questions, ranks: Ranks
) -> ModelFigures:
    folder, base, moe = loaded
    asks = bool(questions.choices) or questions.lm_eval is not None
    opened = as_opened(folder, base, moe, ranks) if asks else None  # first, since it may refuse
    tasks: dict[str, TaskFigures] = {}
    if config is not None and config.data.evaluated:
        tasks |= _held_out(config, base, moe, ranks, name, questions.record_routing)
    if opened is not None:
        batch_size, most = (_BATCH, None) if config is None else (config.eval.batch_size, config.eval.max_samples)
        in_lockstep = moe.engine.runs_in_lockstep and questions.lm_eval is None  # one process alone asks lm-eval's tasks

        def passes(mine: int) -> int:
            return int(ranks.all_max(float(mine))) if in_lockstep else mine

        with moe.engine.evaluation(in_lockstep=in_lockstep) as evaluation:
            for task, all_items in questions.choices.items():
                items = all_items[:most]
                mine = items[ranks.rank :: ranks.world_size]
                judged = accuracies(opened, evaluation, mine, batch_size=batch_size, passes=passes)
                right = ranks.all_sum(torch.tensor([float(sum(one)) for one in judged])).tolist()
                tasks[task] = TaskFigures(len(items), {"acc": right[0] / len(items), "acc_norm": right[1] / len(items)})
            if questions.lm_eval is not None:
                asked = lm_eval_figures(opened, evaluation, questions.lm_eval, batch_size=batch_size, limit=most)
                tasks |= {task: TaskFigures(samples, figures) for task, (samples, figures) in asked.items()}
    return ModelFigures(name, folder, _what(name, folder), tasks)


def _folder_of(name: str, ranks: Ranks) -> Path:
    """Return the folder that a name means. Raises UserError: there is none, or several ranks cannot open it."""
    found = find_trained(Path(name), says=ranks.is_first)
    if ranks.world_size > 1:
        require_no_checkpoint(found)
    return found


def _exchanged(config: Config | None, loaded: tuple[Path, BaseModel, MoeModel], folder: Path) -> bool:
    """Whether the adapter in the folder was put in the place of the one that is loaded."""
    before, base, moe = loaded
    formats = [_format_of_adapter(config, one) for one in (before, folder)]
    if formats[0] is None or formats[0] is not formats[1] or template_beside(before) != template_beside(folder):
        return False
    return formats[0].exchange(base, moe, before, folder)


def _format_of_adapter(config: Config | None, folder: Path) -> AdapterFormat | None:
    """The format of a folder with one adapter; None: it holds several that are taken together, or none."""
    several = config is not None and config.moe.by_source and sources_in(folder)
    no_adapter = several or is_checkpoint(folder) or is_model_folder(folder) or is_gguf_name(str(folder))
    return None if no_adapter else format_of(folder)


def _load(config: Config | None, folder: Path | None, ranks: Ranks) -> tuple[Path, BaseModel, MoeModel]:
    """Load what a folder holds, or the base model alone, with the chat template of its training, or else the configuration's.

    Raises:
        UserError: the two differ, or nothing can be loaded.
    """
    found, base, moe = _loaded(config, folder, ranks)
    if config is None:
        return found, base, moe
    given = config.data.chat_template
    if not base.chat_template:
        return found, in_chosen_template(config, base, ranks), moe
    if given is not None and read_template(given) != base.chat_template:
        raise UserError(
            f"{found}: was trained with another chat template than data.chat_template, {given}\n"
            "  give data.chat_template=null: what was trained brings its own"
        )
    return found, base, moe


def _loaded(config: Config | None, folder: Path | None, ranks: Ranks) -> tuple[Path, BaseModel, MoeModel]:
    choice = BaseChoice()
    if config is not None:
        model, attention = config.model, AttentionChoice(config.model.attention, config.data.packing)
        choice = BaseChoice(model.name_or_path, model.dtype, model.num_hidden_layers, attention, config.kernels)
    if folder is None:
        if choice.name is None:
            raise UserError("base: without a configuration there is no base model\n  give its folder")
        source = resolve_model(choice.name)
        # In the type in which the trained ones compute, not the one of the files.
        dtype = str(pick_dtype(choice.dtype, ranks.device)).removeprefix("torch.")
        return source.folder, *load_plain_model(source, ranks, dtype, choice.attention, choice.num_hidden_layers)
    if config is not None and config.moe.by_source and sources_in(folder):
        read = [read_adapter(folder / source.name) for source in config.data.train]
        base, moe = with_loras(read, ranks, choice)
        return folder, in_template_beside(read[0].folder, base), moe
    return folder, *load_trained(folder, ranks, choice)


def _held_out(
    config: Config, base: BaseModel, moe: MoeModel, ranks: Ranks, name: str, record_routing: Path | None
) -> dict[str, TaskFigures]:
    if record_routing is not None:
        require_routers(moe, name)
    users = users_of(config) if name != BASE else None
    if name != BASE:
        require_users(Path(name), moe, users)
    _, held_out = hold_out(config.data, encode_sources(config.data.held_out, config, base, ranks, users))
    sources = [*encode_sources(config.data.eval, config, base, ranks, users), *held_out]
    verified: dict[str, float] = {}

    def heard(source: str, items: Sequence[GenerationItem], answers: Sequence[str]) -> None:
        score = _verified(source, items, answers, ranks)
        if score is not None:
            verified[source] = score

    record = None if record_routing is None else RoutingRecord()
    features_UF = None if users is None else on_device(users, ranks)
    scores = evaluate(config, ranks, base, moe, sources, features_UF, heard, None if record is None else record.note).scores
    if record is not None and record_routing is not None:
        written = record.write(record_routing, sources[0], config.data.evaluated[0])
        _log.info(f"hecate: {written} records with their routing are in {record_routing}")
    found = {}
    for source, score in scores.items():
        figures = {"loss": score.loss}
        if score.accuracy is not None:
            figures["exact"] = score.accuracy
        if source in verified:
            figures["verified"] = verified[source]
        found[source] = TaskFigures(score.samples, figures)
    return found


def _verified(source: str, items: Sequence[GenerationItem], answers: Sequence[str], ranks: Ranks) -> float | None:
    """The mean score of the answers whose samples carry an entry, over all ranks; None: none does, or there is no verifier."""
    judged = [(item, answer) for item, answer in zip(items, answers, strict=True) if item.entry is not None]
    (count,) = ranks.all_sum(torch.tensor([float(len(judged))])).tolist()
    if not count:
        return None
    if not has_verifiers():
        if ranks.is_first:
            hint = install_hint("quickstart")
            _log.warning(f"hecate: {source}: answers are not verified, since reasoning-gym is not installed: {hint}")
        return None
    total = sum(verdict(item.entry or {}, answer, task=item.task, place=f"{item.file}:{item.line}") for item, answer in judged)
    return float(ranks.all_sum(torch.tensor([total], dtype=torch.float64)).item() / count)


def _what(name: str, folder: Path) -> str:
    if name == BASE:
        return BASE
    return "checkpoint" if is_checkpoint(folder) else "model" if is_model_folder(folder) else "adapter"
