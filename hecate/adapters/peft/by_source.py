"""Adapters of several sources, trained at once as experts of FFNs or linears: each is written as its own folder, in PEFT's LoRA format.

    adapters/SOURCE/adapter_model.safetensors    base_model.model.model.layers.3.mlp.gate_proj.lora_A.weight [r, D]   .lora_B.weight [F, r]

Any program that reads PEFT's LoRA reads such a folder. Here one folder, or those of several sources, go into the model as experts again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hecate.adapters.card import how_trained
from hecate.adapters.folder import described_template, refuse_existing
from hecate.adapters.mixlora.config import CONFIG
from hecate.adapters.mixlora.export import pairs_on_first, refuse_different, with_drawn_digest
from hecate.adapters.mixlora.tensors import require_tensors
from hecate.adapters.peft.lora_folder import load_lora
from hecate.adapters.peft.peft_moe import PeftMoeConfig, linear_names, save_peft_adapter
from hecate.adapters.peft.peft_targets import adapted_linears, adapts, listed, unknown_targets
from hecate.adapters.peft.per_expert import pad_rank, scaled
from hecate.config import Config, RouterConfig, adapter_in, named_model
from hecate.engine.step_plans import EngineConfig
from hecate.errors import UserError
from hecate.io.durable import delete_files, new_folder
from hecate.model.base import BaseChoice, BaseModel, build_base
from hecate.model.files.stored_experts import holds_experts
from hecate.model.gated_ffn import GatedFfn, find_gated_ffns
from hecate.model.insert import InsertionPlan, insert_experts
from hecate.model.linears import target_linears
from hecate.model.moe_model import MoeModel
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.planners import POLICIES
from hecate.parallel.values.expert_kinds import ONLY_PROJECTION, PROJECTIONS, ExpertKind, LoraShape, kind_written_as
from hecate.parallel.values.units import Unit
from hecate.ranks.ranks import Ranks

_ALIKE = ("base_model_name_or_path", "r", "scale", "target_modules")
"""what the descriptions of adapters must have in common to be used together"""


def lora_config(config: Config, base: BaseModel) -> PeftMoeConfig:
    """Return the description that the adapters of a run have in common. It is made before training.

    Raises:
        UserError: experts stand over linears, and a target module is none of the model's.
    """
    targets = config.lora.target_modules
    if base.linears:
        target_linears(base.linears, targets, type(base.model).__name__)
    else:
        targets = tuple(base.ffns[0].projection_names[name] for name in config.moe.kind.projections(targets))
    return PeftMoeConfig(
        base_model_name_or_path=named_model(config.model.name_or_path),
        r=config.lora.rank,
        alpha=config.lora.stored_alpha,
        use_rslora=config.lora.use_rslora,
        target_modules=targets,
        target_parameters=(),
        dropout=config.lora.dropout,
        extra={"model_dtype": config.model.dtype, "training": how_trained(config), **described_template(base.chat_template)},
    )


Paths = Mapping[Unit, Mapping[str, str]]
"""of each unit of a dense model, the dotted names of the linears that its projections are"""


def paths_of(base: BaseModel) -> Paths:
    """Return where the pairs of units stand in a base model, as it was loaded."""
    if base.linears:
        return {one.unit: {ONLY_PROJECTION: one.path} for one in base.linears}
    return {ffn.unit: {name: f"{ffn.path}.{theirs}" for name, theirs in ffn.projection_names.items()} for ffn in base.ffns}


def export_by_source(folder: Path, sources: Sequence[str], description: PeftMoeConfig, paths: Paths, moe: MoeModel, ranks: Ranks) -> None:
    """Gather all experts on rank 0, one unit at a time, and write a folder for each source there. Every rank must call it.

    Args:
        sources: the names, in the order of the experts.
        paths: of the base model's units.

    Raises:
        UserError: a folder exists, a tensor is not finite, or the disk fails.
    """
    tensors: list[dict[str, Tensor]] = [{} for _ in sources]
    for unit, pairs in pairs_on_first(moe, sorted(moe.layers), ranks):
        for projection, lora in pairs.items():
            name_a, name_b = linear_names(paths[unit][projection])
            for expert, of_source in enumerate(tensors):
                of_source[name_a] = lora.a_SrI[expert].detach().cpu().contiguous()
                of_source[name_b] = lora.b_SOr[expert].detach().cpu().contiguous()
    if ranks.is_first:
        refuse_existing(folder)
        write_sources(folder, dict(zip(sources, tensors, strict=True)), with_drawn_digest(description, moe))


def write_sources(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], description: PeftMoeConfig) -> None:
    """Write the new folder `folder` with an adapter for each source, all or none: commands take what is there for all that there is.

    Raises:
        UserError: a tensor is not finite, or the disk fails.
    """
    try:
        with new_folder(folder) as staging:
            try:
                for source, of_source in tensors.items():
                    save_peft_adapter(staging / source, of_source, description)
            except Exception:
                for source in tensors:
                    delete_files(staging / source)
                raise
    except OSError as error:
        raise UserError(f"{folder}: the adapters cannot be written: {error.strerror}") from error


def begin_with_loras(config: Config, base: BaseModel, moe: MoeModel) -> None:
    """Set each expert to the values of an adapter: that of its source in the folder that `lora.init_from` names, or the folder's only one.

    Every rank must call it. An adapter may have a smaller rank than the widest expert's; its expert must not have a smaller one.

    Raises:
        UserError: an adapter cannot be read, or differs from the configured rank, scale, target modules or base model.
    """
    assert config.lora.init_from is not None
    given, names = Path(config.lora.init_from), [source.name for source in config.data.train]
    folders = [given / name if (given / name / CONFIG).is_file() else adapter_in(given) for name in names]
    shape, ours = config.lora.shape, lora_config(config, base)
    read = []
    for expert, folder in enumerate(folders):
        tensors, theirs = load_lora(folder)
        rank, scale = shape.of_experts[expert] if shape.of_experts else (shape.rank, shape.scale)
        whole = (shape.rank, shape.scale)
        refuse_different(
            folder,
            ("rank and scale", (theirs.r, theirs.scale), whole if (theirs.r, theirs.scale) == whole else (rank, scale)),
        )
        refuse_other_targets(folder, theirs, ours, base)
        factor, fitting = theirs.scale / shape.scale, {}
        for name, tensor in tensors.items():
            is_a = name.endswith("lora_A.weight")
            fitting[name] = pad_rank(tensor if is_a else scaled(tensor, factor), shape.rank, a=is_a)
        read.append(fitting)
    _fill(moe, base, folders, read)


def refuse_other_targets(folder: Path, theirs: PeftMoeConfig, ours: PeftMoeConfig, base: BaseModel) -> None:
    """Raises UserError: an adapter is for other linears of the base model than the run's."""
    paths = [path for of_unit in paths_of(base).values() for path in of_unit.values()]
    same = [adapts(theirs.target_modules, path) for path in paths] == [adapts(ours.target_modules, path) for path in paths]
    if not same or unknown_targets(theirs.target_modules, paths):
        refuse_different(folder, ("lora.target_modules", sorted(listed(theirs.target_modules)), sorted(listed(ours.target_modules))))


def sources_in(folder: Path) -> list[str]:
    """Return the names of the sources whose adapters the folder holds, sorted; none, if it is no such folder."""
    if (folder / CONFIG).exists() or not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if (path / CONFIG).is_file())


def refuse_several(folder: Path) -> None:
    """Raises UserError: the folder holds the adapters of several sources, where one is wanted."""
    if sources := sources_in(folder):
        raise UserError(f"{folder}: holds the adapters of several sources: {', '.join(sources)}\n  name one: {folder / sources[0]}")


def with_lora_adapters(folders: Sequence[Path], ranks: Ranks, choice: BaseChoice) -> tuple[BaseModel, MoeModel]:
    """Return the base model with these adapters as its experts, in their order, for evaluation. A single one takes all tokens.

    Raises:
        UserError: an adapter or the model cannot be read, one does not fit the other, or the adapters differ in rank, scale or modules.
    """
    read = [load_lora(folder) for folder in folders]
    description = read[0][1]
    for folder, (_, other) in zip(folders, read, strict=True):
        for key in _ALIKE:
            if getattr(other, key) != getattr(description, key):
                raise UserError(
                    f"{folder}: {key} is {getattr(other, key)}, but {getattr(description, key)} in {folders[0]}\n"
                    "  adapters are used together only if they are alike; use them one by one"
                )
    name = choice.name_for(folders[0], description.base_model_name_or_path)
    base, kind, modules = _base_for(folders[0], name, description, ranks, choice)
    plan = InsertionPlan(
        kind=kind,
        experts_per_layer=(len(folders),) * len({one.unit.layer for one in base.found}),
        router=RouterConfig(input="given"),
        lora=LoraShape(description.r, description.scale, 0.0),
        target_modules=modules,
        seed=0,
        kernels=choice.kernels,
    )
    topology = local_topology(ranks.world_size, cuda=ranks.device.type == "cuda")
    moe = insert_experts(base.model, base.found, plan, EngineConfig(POLICIES["full"], topology), ranks.groups)
    _fill(moe, base, folders, [tensors for tensors, _ in read])
    return base, moe


def exchange_lora(base: BaseModel, moe: MoeModel, before: Path, folder: Path) -> bool:
    """Put an adapter in the place of the single one that `with_lora_adapters` has read from `before`, if both are alike.

    Returns:
        False, and nothing is changed, if they differ in base model, rank, scale or modules.

    Raises:
        UserError: the adapter cannot be read, or does not fit the model.
    """
    (tensors, description), (_, described_before) = load_lora(folder), load_lora(before)
    if any(getattr(description, key) != getattr(described_before, key) for key in _ALIKE):
        return False
    _fill(moe, base, [folder], [tensors])
    return True


def _fill(moe: MoeModel, base: BaseModel, folders: Sequence[Path], read: Sequence[dict[str, Tensor]]) -> None:
    """Give each expert its folder's tensors. Raises UserError: those of a folder are not the ones that the model needs."""
    paths = paths_of(base)
    for folder, tensors in zip(folders, read, strict=True):
        _refuse_misfit(folder, tensors, moe, paths)
    with torch.no_grad():
        for (unit, expert), chunk in moe.engine.shards.named_parameters().items():
            source, tensors = moe.engine.shards.families[unit].pair_source, read[expert]
            names = {projection: linear_names(paths[unit][projection]) for projection in source.projections}
            chunk.copy_(source.chunk_of(expert, {name: (tensors[name_a], tensors[name_b]) for name, (name_a, name_b) in names.items()}))


def _base_for(
    folder: Path, name: str, description: PeftMoeConfig, ranks: Ranks, choice: BaseChoice
) -> tuple[BaseModel, ExpertKind, tuple[str, ...]]:
    """The base model, the kind of experts that adapters of these modules are, and the modules as experts of that kind have them.

    Any model with linears will do, also one with experts of its own, whose pairs an ordinary LoRA does not have.

    Raises:
        UserError: a module is no linear of the base model.
    """
    over_linears = kind_written_as("linears")
    base = build_base(name, choice.dtype, choice.num_hidden_layers, ranks.device, over_linears, choice.attention, experts_stay=True)
    adapted = adapted_linears(description.target_modules, [one.path for one in base.linears], folder)
    ffns = _dense_ffns(base)
    of_ffn = ffns[0].projection_names if ffns else {}
    last = {path.rpartition(".")[2] for path in adapted}
    if set(adapted) == {f"{ffn.path}.{name}" for ffn in ffns for name in last}:
        modules = tuple(name for name in PROJECTIONS if of_ffn[name] in last)
        return replace(base, ffns=ffns, linears=()), kind_written_as("mixlora"), modules
    return replace(base, linears=tuple(one for one in base.linears if one.path in adapted)), over_linears, tuple(sorted(last))


def _dense_ffns(base: BaseModel) -> tuple[GatedFfn, ...]:
    """The gated FFNs of a dense model; none where it has experts, or FFNs of another kind, whose linears are then adapted one by one."""
    if holds_experts(base.model.state_dict()):
        return ()
    try:
        return tuple(find_gated_ffns(base.model))
    except UserError:
        return ()


def _refuse_misfit(folder: Path, tensors: dict[str, Tensor], moe: MoeModel, paths: Paths) -> None:
    wanted: dict[str, tuple[int, ...]] = {}
    for unit, family in moe.engine.shards.families.items():
        sizes = family.pair_source.sizes
        for spec in (*sizes.trained, *sizes.seeded):  # a fixed A is in the file as well
            projection, _, matrix = spec.name.rpartition(".")
            wanted[linear_names(paths[unit][projection])["AB".index(matrix)]] = spec.shape
    require_tensors(tensors, wanted, folder)
