"""Checks of what one configuration needs: its model, its data, and room for what the run leaves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from hecate.apps.check.doctor.finding import Checks, Finding, ok, problem, warning
from hecate.config import Config
from hecate.errors import UserError
from hecate.model.files.safetensors_headers import INDEX, files_of_index


def checks_of(load: Callable[[], Config]) -> Checks:
    """The checks of a configuration. If `load` refuses it, that is the only finding.

    Args:
        load: returns the configuration, or raises a UserError.
    """
    try:
        config = load()
    except UserError as error:
        refusal = problem(str(error), "mend these keys")
        return {"configuration": lambda: refusal}
    of_config = {
        "configuration": _configuration,
        "model": _model,
        "data": _data,
        "kernels and attention": _kernels_and_attention,
        "packages": _packages,
        "output folder": _output_folder,
    }
    return {name: partial(check, config) for name, check in of_config.items()}


def _configuration(config: Config) -> Finding:
    length = f"{config.max_steps} steps" if config.num_train_epochs is None else f"{config.num_train_epochs:g} epochs"
    return ok(f"{'lora' if config.adapter == 'lora' else config.moe.family}, {length}, output in {config.output_dir}")


def _model(config: Config) -> Finding:
    if config.model.front_end == "megatron":
        return ok(f"{config.model.name_or_path}, made by megatron-core")
    from hecate.config.files.paths import find_model
    from hecate.model.files.tensor_shapes import model_config

    try:
        path = find_model(config.model.name_or_path)
    except UserError as error:
        return problem(str(error).splitlines()[0], "give model.name_or_path a folder that transformers has saved, or a .gguf file")
    if path.is_file():
        return ok(f"{path}: {path.stat().st_size / 1e9:.2f} GB")
    index = path / INDEX
    try:
        named = files_of_index(index) if index.is_file() else []
        kind = model_config(path).get("model_type", "of no type")
    except UserError as error:
        return problem(str(error).splitlines()[0], "download the file again")
    if missing := [name for name in named if not (path / name).is_file()]:
        return problem(f"{path}: {len(missing)} of {len(named)} files of weights are missing, such as {missing[0]}", "download them again")
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return ok(f"{path}: {kind}, {size / 1e9:.2f} GB")


def _data(config: Config) -> Finding:
    from hecate.train.preflight import check_data

    try:
        check_data(config)
    except UserError as error:
        return problem(str(error), "mend the data")
    share = f", and {config.data.eval_share:g} of the samples of {len(config.data.held_out)}" if config.data.held_out else ""
    return ok(f"{len(config.data.train)} for training, {len(config.data.eval)} held out{share}")


def _kernels_and_attention(config: Config) -> Finding:
    from hecate.train.preflight import check_attention, check_kernels

    try:
        check_kernels(config.kernels)
        check_attention(config.model)
    except UserError as error:
        return _problem_of(error, "use auto")
    return ok(f"kernels {config.kernels}, attention {config.model.attention}")


def _packages(config: Config) -> Finding:
    """What `hecate train` checks of this machine beside kernels and attention."""
    from hecate.train.preflight import check_machine

    try:
        check_machine(replace(config, kernels="auto", model=replace(config.model, attention="auto")))
    except UserError as error:
        return _problem_of(error, "install what is missing, or leave it out")
    return ok("what the run's trackers and its privacy need is installed")


def _problem_of(error: UserError, otherwise: str) -> Finding:
    """The error as a problem: its first line, and how to mend it, which is `otherwise` where the error does not say it."""
    what, _, mend = str(error).partition("\n")
    return problem(what, mend.strip() or otherwise)


def _output_folder(config: Config) -> Finding:
    folder = Path(config.output_dir)
    nearest = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    what = f"{folder}: {free / 2**30:.1f} GiB free"
    return warning(what, "checkpoints need room: set save_total_limit, or output_dir on another disk") if free < 2**31 else ok(what)
