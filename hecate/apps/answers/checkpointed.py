"""The model that a checkpoint holds, built in one process: for evaluation, answers and exports, as if its run had ended there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hecate.adapters.trained_output import output_of
from hecate.checkpoint import latest_good, read_manifest
from hecate.checkpoint.manifest import MANIFEST, Manifest, step_of
from hecate.checkpoint.meta import config_text, template_in
from hecate.checkpoint.shard import read_tensors
from hecate.checkpoint.train_state import refuse_other_run, state_of
from hecate.config import Config, FssdpConfig, saved_config
from hecate.errors import UserError
from hecate.model.base import BaseChoice, BaseModel
from hecate.model.files.load import base_of, pick_dtype, resolve_model
from hecate.model.files.memory_check import require_room
from hecate.model.moe_model import MoeModel
from hecate.optim.optimizer import owned_parameters
from hecate.parallel.cluster.topology import local_topology
from hecate.ranks.ranks import Ranks
from hecate.report.run_records import read_run_config
from hecate.train.build import build_moe, config_of_model, front_end


def is_checkpoint(folder: Path) -> bool:
    """Return whether the folder is a checkpoint."""
    return (folder / MANIFEST).is_file()


def newest_checkpoint(run_folder: Path) -> tuple[Path, int] | None:
    """Return a run's newest sound checkpoint and its step; None: there is none."""
    found = latest_good(run_folder)
    step = None if found is None else step_of(found.name)
    return None if found is None or step is None else (found, step)


def best_left_by(run_folder: Path, newest: Path) -> int | None:
    """The step of the best model that a run's newest checkpoint knows, if the run leaves that; None: it leaves its last, or knows none."""
    if not read_run_config(run_folder / "config.yaml").get("load_best_model_at_end"):
        return None
    return state_of(newest, read_manifest(newest)).best.step


def model_of_checkpoint(folder: Path, ranks: Ranks, choice: BaseChoice) -> tuple[Config, BaseModel, MoeModel]:
    """Return a run's configuration, its base model, and the experts in it with the values of a checkpoint. There must be one rank.

    The configuration's last step is that of the checkpoint.

    Args:
        choice: the base model, in place of the one that the run had; how it computes; `auto` is as the run had it.

    Raises:
        UserError: the checkpoint cannot be read, or the base model is missing or another than its run's.
    """
    assert ranks.world_size == 1, "a checkpoint is opened by one process"
    manifest = read_manifest(folder)
    try:
        config = saved_config(config_text(folder, manifest.meta))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    model = replace(config.model, name_or_path=choice.name or config.model.name_or_path)
    config = replace(config, model=model)
    _refuse_sizes(folder, manifest, config)
    if model.front_end == "transformers":
        base_of(folder, model.name_or_path)
    dtype = model.dtype if choice.dtype == "auto" else choice.dtype
    # What says how ranks share the work means nothing to one process that trains nothing.
    alone = replace(
        config,
        model=replace(model, dtype=dtype, attention=choice.attention.asked, shard_non_experts=False, tensor_parallel=1),  # type: ignore[arg-type]
        fssdp=FssdpConfig(policy="full"),
        max_steps=manifest.step,
        kernels=choice.kernels,
    )
    if config.moe.kind.of_moe_base and model.num_hidden_layers is None:
        require_room(resolve_model(model.name_or_path).folder, pick_dtype(dtype, ranks.device), ranks.device)
    topology = local_topology(1, cuda=ranks.device.type == "cuda")
    try:
        base = front_end(alone, ranks, topology)
    except UserError as error:  # it names keys of a configuration that the user has not given
        raise UserError(f"{folder}: {error}") from error
    if template := template_in(folder, manifest.meta):
        base = base.with_chat_template(template)
    alone = config_of_model(alone, base)
    moe = build_moe(alone, base, ranks, topology, _user_width(manifest))
    refuse_other_run(folder, manifest.meta, replace(config, moe=alone.moe), base.digest, moe.drawn_digest, template)
    _load(folder, manifest, moe)
    return alone, base, moe


def write_checkpointed(folder: Path, out_parent: Path, ranks: Ranks, model: str | None = None) -> Path:
    """Write what a run that ended at a checkpoint would have left into the folder `out_parent`; the new folder: adapter, adapters or model.

    Args:
        model: the base model, in place of the one that the run had.

    Raises:
        UserError: as `model_of_checkpoint`; or the disk fails.
    """
    config, base, moe = model_of_checkpoint(folder, ranks, BaseChoice(model))
    output = output_of(config, base)
    written = out_parent / output.name
    output.write(written, moe, ranks)
    return written


def _refuse_sizes(folder: Path, manifest: Manifest, config: Config) -> None:
    """Raises UserError: the configuration, which may be forged, has far larger experts than the tensors, which are there."""
    longest = max((max(entry.shape, default=0) for entry in manifest.tensors.values()), default=0)
    for key, value, most in (
        ("lora.r", config.lora.r, longest),
        ("moe.num_experts", config.moe.num_experts, longest + len(manifest.tensors)),
    ):
        largest = max(value, default=0) if isinstance(value, tuple) else value or 0
        if largest > most:
            raise UserError(f"{folder}: {key} is {str(largest)[:30]} in its configuration, more than its tensors have room for")


def _user_width(manifest: Manifest) -> int | None:
    """See `Router.user_width`: of a gate's first part, which is a norm of the user's vector."""
    ends = ".router.norm.weight"
    return next((entry.shape[0] for name, entry in manifest.tensors.items() if name.endswith(ends)), None)


def _load(folder: Path, manifest: Manifest, moe: MoeModel) -> None:
    buffers = {f"layers.{unit}.router.{name}": one for unit, router in moe.router_modules.items() for name, one in router.named_buffers()}
    alike: Mapping[str, Tensor] = {**moe.replicated_parameters(), **buffers}
    held = {f"owned/{name}": one for name, one in owned_parameters(moe.engine).items()}
    held |= {f"replicated/{name}": one for name, one in alike.items()}  # type: ignore[misc]
    if missing := [name for name in held if name not in manifest.tensors]:
        raise UserError(f"{folder}: has no tensor {missing[0]} ({len(missing)} missing)")
    owned = [name for name in manifest.tensors if name.startswith("owned/")]
    if more := [name for name in owned if not {name, name.rpartition("/")[0]} & held.keys()]:  # beside a value are the optimizer's states
        raise UserError(f"{folder}: has the tensor {more[0][:200]}, of which the model that its configuration describes has none")
    for name, tensor in read_tensors(folder, manifest, held).items():
        if tensor.shape != held[name].shape:
            raise UserError(f"{folder}: {name} has the shape {list(tensor.shape)}, but the model needs {list(held[name].shape)}")
        with torch.no_grad():
            held[name].copy_(tensor)
