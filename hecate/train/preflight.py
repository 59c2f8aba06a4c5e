"""Checks a training run before any of its processes starts.

Every command that starts ranks makes these checks first, so that a mistake costs a second and not the start of a job.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from hecate.config import Config
from hecate.config.rules.of_apps import refuse_training, require_packages
from hecate.config.rules.optimizers import require_optimizer
from hecate.config.schema import ModelConfig
from hecate.errors import UserError
from hecate.io.plain_files import refuse_links
from hecate.ranks.cores import usable_cores
from hecate.ranks.launcher_files import COLLECTIVES_VARIABLE, SHARED_GPU_VARIABLE, may_share_gpus
from hecate.report.tracking.trackers import check_trackers

_log = logging.getLogger(__name__)

_GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""The files of the drivers of NVIDIA's and AMD's GPUs, and of GPUs under WSL."""


def check_machine(config: Config) -> None:
    """Check that this machine can run the kernels and the attention that the configuration asks for, and has its packages.

    Only a machine that trains is checked: `hecate plan` accepts the same configuration anywhere.

    Raises:
        UserError: it cannot.
    """
    refuse_training(config)
    check_kernels(config.kernels)
    check_attention(config.model)
    check_trackers(config.report_to)
    require_packages(config)
    require_optimizer(config)


def check_kernels(kernels: str) -> None:
    """Check that this machine can run these kernels. Raises UserError: `kernels` is "triton", and Triton cannot run."""
    if kernels != "triton":
        return
    import torch

    from hecate.kernels.backend import triton_problem

    problem = triton_problem("cuda" if torch.cuda.is_available() else "cpu")
    if problem is not None:
        raise UserError(problem)


def check_attention(model: ModelConfig) -> None:
    """Check that this machine can compute attention as `model` asks.

    Raises:
        UserError: `model.attention` is "flex" or "flash", which need a GPU, and flash attention also a package or a newer torch.
    """
    if model.attention not in ("flex", "flash"):
        return
    import torch

    from hecate.model.files.load import pick_dtype
    from hecate.model.layers.attention import way_problem

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = way_problem(model.attention, pick_dtype(model.dtype, device), device)
    if problem is not None:
        raise UserError(problem)


def check_data(config: Config) -> None:
    """Check the data files, except for what only a tokenizer can find.

    Raises:
        UserError: a file cannot be read, or has a broken line, or one whose user has no features although the router decides by users, or
            one without the routing that is to be replayed; or it holds conversations, and there is no chat template, or one that cannot
            be used for the first of them; or data.chat_template is none; or held-out data are documents although answers are to be
            generated.
    """
    from hecate.config import find_model
    from hecate.data.chat.template_check import check_template
    from hecate.data.chat.templates import check_template_file
    from hecate.data.content import cache_folder
    from hecate.data.files.syntax import check_answers, check_syntax
    from hecate.data.files.user_features import users_of

    data = config.data
    if data.chat_template is not None:
        check_template_file(data.chat_template)
    if config.model.front_end == "transformers":
        named = data.settled((*data.train, *data.eval))
        check_template(named, find_model(config.model.name_or_path), data.chat_template, data.on_bad_sample)
    if config.eval.generate:
        check_answers(data.evaluated)
    users, cache = users_of(config), cache_folder(data.cache)
    check_syntax(data.train, data.on_bad_sample, users, cache, routed=config.moe.replay is not None)
    check_syntax(data.eval, data.on_bad_sample, users, cache)


def check_architecture(config: Config) -> None:
    """Check that the model can get experts, that its own can be trained, or that another front end can build it.

    No weights are read; importing transformers takes seconds.

    Raises:
        UserError: they cannot.
    """
    if config.model.front_end == "transformers":
        from hecate.model.base import check_base

        check_base(config.model.name_or_path, config.model.num_hidden_layers, config.moe.kind)
        return
    from hecate.model.front_ends import other_front_end

    if other := other_front_end(config.model.front_end):
        other.require()


def check_first_adapter(config: Config) -> None:
    """Check that the adapter that training begins with has numbers for no expert that `lora.experts` leaves out.

    The ranks check more: whether it is for the configured model and experts.

    Raises:
        UserError: it has, or cannot be read; or as `hecate.model.sizes.run_shape.base_shape_of`.
    """
    lora = config.lora
    if lora.init_from is None or config.resume or (lora.experts is None and lora.hottest_experts is None):
        return
    from hecate.adapters.format_table import read_adapter
    from hecate.adapters.peft.chosen_experts import for_chosen_experts
    from hecate.config import adapter_in
    from hecate.model.sizes.run_shape import base_shape_of

    _, of_model = base_shape_of(config)
    for_chosen_experts(read_adapter(adapter_in(lora.init_from)), of_model.lora.shape_of_experts(of_model.moe))


def check_resume(config: Config) -> None:
    """Check that there is a checkpoint to resume from, and that its run computed what the configuration says.

    The ranks check more: whether files are damaged, and whether the base model is the same.

    Raises:
        UserError: there is none, or it belongs to another run; or the run's folder holds a link.
    """
    if not config.resume:
        return
    root = Path(config.output_dir)
    refuse_links(root)
    from hecate.checkpoint import CheckpointError, committed, read_manifest, stopped_early
    from hecate.checkpoint.meta import config_values
    from hecate.config.effective import changed_computation, other_configuration
    from hecate.report.run_records import read_run_config

    if folders := committed(root):
        place = folders[0]
        try:
            then = config_values(place, read_manifest(place).meta)
        except CheckpointError:
            return  # the ranks say why, and look for an older one
    elif stopped_early(root):
        place = root / "config.yaml"
        then = read_run_config(place)
    else:
        raise UserError(
            f"resume=true, but {root} has no checkpoint\n"
            "  if the run's folder was moved, give output_dir=FOLDER; else start a new run with resume=false"
        )
    # A key that is null may get its value from the base model.
    if changes := [change for change in changed_computation(then, config, same_base=bool(folders)) if change.now is not None]:
        raise UserError(other_configuration(str(place), changes))


def check_vocabulary(config: Config) -> None:
    """Check that the tensor groups can split the vocabulary, whose size is known from the tokenizer only.

    Raises:
        UserError: `model.tensor_parallel` does not divide it.
    """
    if config.model.tensor_parallel == 1:
        return
    from hecate.model.files.tokenizer import tokenizer_of, vocabulary_of

    vocabulary_of(config, tokenizer_of(config))


def check_devices(ranks: int, key: str) -> None:
    """Check that there is a GPU for each rank of this machine, if it has GPUs at all and ranks may not share one (`may_share_gpus`).

    Args:
        ranks: on this machine.
        key: how the user sets this number.

    Raises:
        UserError: there are fewer GPUs than ranks.
    """
    if may_share_gpus() or not any(map(os.path.exists, _GPU_FILES)):
        return  # without importing torch, which takes seconds
    import torch

    gpus = torch.cuda.device_count()
    if gpus and ranks > gpus:
        raise UserError(
            f"{key}: {ranks} ranks, but this machine has {gpus} GPUs, and each rank takes one\n"
            f"  set {key} to {gpus} at most; {COLLECTIVES_VARIABLE}=gloo lets ranks share a GPU, which is slow,\n"
            f"  and so does {SHARED_GPU_VARIABLE}=1 with NCCL 2.30 or newer"
        )


def warn_of_cores(ranks: int, key: str) -> None:
    """Print a warning if this machine has no GPU and fewer than half as many cores as ranks: they would wait for each other.

    Args:
        key: how the user sets this number.
    """
    cores = usable_cores()
    if ranks > 2 * cores and not any(map(os.path.exists, _GPU_FILES)):
        _log.warning(f"hecate: warning: {key}: {ranks} ranks on {cores} cores wait for each other; {key}={cores} is faster")


def default_ranks() -> int:
    """The number of ranks on this machine when no number is given: one for each GPU, or 2 without GPUs."""
    import torch

    return torch.cuda.device_count() or 2
