"""A LoRA of an MoE model's experts in PEFT's format: what a run with `moe.family: moe_lora` leaves, and what other trainers leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hecate.adapters.adapter_format import AdapterFormat, ReadAdapter, with_experts
from hecate.adapters.card import how_trained
from hecate.adapters.description import Adapter, Description
from hecate.adapters.folder import CONFIG, described_template, save_adapter
from hecate.adapters.model_tensors import TensorNames, linear_path
from hecate.adapters.peft.chosen_experts import for_chosen_experts
from hecate.adapters.peft.description import PEFT_TYPE, LoraDescription, expert_names, linear_names, saved_name
from hecate.adapters.peft.reading import is_lora, load_lora
from hecate.adapters.peft.targets import adapted_linears
from hecate.adapters.places import Place
from hecate.config import Config, named_model
from hecate.errors import UserError
from hecate.kernels.common.ffn import PROJECTIONS
from hecate.model.base import BaseChoice, BaseModel, build_base
from hecate.model.files.load import pick_dtype, resolve_model
from hecate.model.files.load_moe import OwnExperts
from hecate.model.files.memory_check import require_room
from hecate.model.gated_ffn import decoder_layers
from hecate.model.insert import InsertionPlan
from hecate.model.linears import find_linears
from hecate.model.moe_model import MoeModel
from hecate.parallel.values.expert_kinds import GATE_UP, LoraShape, kind_written_as
from hecate.parallel.values.units import Unit
from hecate.ranks.ranks import Ranks


class PeftExperts(AdapterFormat):
    """A LoRA of an MoE model's experts. `export` writes what else PEFT reads, too."""

    name = "peft"
    what = LoraDescription.what
    peft_type = PEFT_TYPE
    holds = (LoraDescription,)

    def recognises(self, folder: Path) -> bool:
        return is_lora(folder, of_experts=True)

    def read(self, folder: Path) -> Adapter:
        return Adapter(folder, *load_lora(folder))

    def describe(self, config: Config, base: BaseModel) -> LoraDescription:
        ends = {_end(base, layer.block.experts_path): None for layer in base.own_experts}
        projections = _in_peft(config.moe.kind.projections(config.lora.target_modules))
        routers = {_end(base, layer.block.router_path): None for layer in base.own_experts if config.moe.trains_routers}
        linears = tuple(name for name in config.lora.target_modules if name not in PROJECTIONS)
        rank = config.lora.shape_of_experts(config.moe).rank
        return LoraDescription(
            base_model_name_or_path=named_model(config.model.name_or_path),
            r=config.lora.rank if linears else rank,
            expert_r=None if not linears or rank == config.lora.rank else rank,
            alpha=config.lora.stored_alpha,
            use_rslora=config.lora.use_rslora,
            target_modules=linears,
            target_parameters=tuple(f"{end}.{name}" for end in ends for name in projections),
            modules_to_save=tuple(routers),
            dropout=config.lora.dropout,
            extra={
                "router_aux_loss_coef": config.moe.router_aux_loss_coef,
                "model_dtype": config.model.dtype,
                "training": how_trained(config),
                **described_template(base.chat_template),
            },
        )

    def names(self, base: BaseModel, moe: MoeModel) -> TensorNames:
        blocks = {layer.unit: layer.block for layer in base.own_experts}

        def pair(unit: Unit, projection: str, expert: int) -> Place:
            projections = _in_peft(moe.engine.shards.families[unit].pair_source.projections)
            own = _HALVES.index(projection) if projection in _HALVES else None
            name = projection if own is None else GATE_UP
            return Place(*expert_names(blocks[unit].experts_path, projections)[name], expert, own)

        return TensorNames(
            pair,
            lambda layer, module: linear_names(linear_path(base.model, layer, module)),
            lambda unit, part: saved_name(blocks[unit].router_path) if part == "weight" else None,
        )

    def compared(self, theirs: Adapter, ours: Description, base: BaseModel, moe: MoeModel) -> list[tuple[str, Any, Any]]:
        assert isinstance(ours, LoraDescription)
        found = _require_experts(theirs).rank_of_experts
        return [*super().compared(theirs, ours, base, moe), ("lora.moe_rank_scaling, rank of experts", found, ours.rank_of_experts)]

    def begin(self, config: Config, base: BaseModel, moe: MoeModel, read: ReadAdapter) -> None:
        lora = config.lora.shape_of_experts(config.moe)
        super().begin(config, base, moe, lambda folder: for_chosen_experts(read(folder), lora))

    def open_for_answers(self, folder: Path, ranks: Ranks, choice: BaseChoice) -> tuple[BaseModel, MoeModel]:
        adapter = self.read(folder)
        description = _require_experts(adapter)
        name = choice.name_for(folder, description.base_model_name_or_path)
        source = resolve_model(name)
        if source.gguf_file is None and choice.num_hidden_layers is None:
            require_room(source.folder, pick_dtype(choice.dtype, ranks.device), ranks.device)
        base = build_base(name, choice.dtype, choice.num_hidden_layers, ranks.device, kind_written_as(self.name), choice.attention)
        linears = adapted_linears(description.target_modules, [one.path for one in find_linears(base.model)], folder)
        plan = _plan(adapter, tuple(linears), base.own_experts, choice)
        moe = with_experts(base, plan, ranks)
        self.load(adapter, base, moe)
        return base, moe

    def export(self, adapter: Adapter, out: Path) -> list[str]:
        save_adapter(out, adapter.tensors, adapter.description)
        return ["for PEFT"]


FORMAT = PeftExperts()
_HALVES = ("gate_proj", "up_proj")


def _require_experts(adapter: Adapter) -> LoraDescription:
    """The description. Raises UserError: the adapter is of parameters that are not an MoE model's experts."""
    description = adapter.description
    assert isinstance(description, LoraDescription)
    parameters = description.target_parameters
    if not parameters or not all(name.rpartition(".")[2] in ("gate_up_proj", "down_proj") for name in parameters):
        raise UserError(
            f"{adapter.folder / CONFIG}: target_parameters are {list(parameters)}: this is not an adapter of an MoE model's experts\n"
            "  they must be an experts module's gate_up_proj, down_proj, or both"
        )
    return description


def _plan(adapter: Adapter, linears: tuple[str, ...], layers: tuple[OwnExperts, ...], choice: BaseChoice) -> InsertionPlan:
    """The pairs and routers that a model needs for the adapter to be loaded into it.

    Args:
        linears: the dotted names of those that are adapted.

    Raises:
        UserError: the adapter has trained modules other than routers.
    """
    description, where = adapter.description, adapter.folder
    assert isinstance(description, LoraDescription)
    routers = description.modules_to_save
    for name in routers:
        if not all(layer.block.router_path.endswith(f".{name}") for layer in layers):
            raise UserError(f"{where}: modules_to_save has {name}, which is not a router of the base model; only routers are supported")
    halves = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    projections = tuple(half for name in description.projections for half in halves[name])
    return InsertionPlan(
        kind=kind_written_as(FORMAT.name),
        lora=LoraShape(description.r, description.scale, 0.0),
        lora_of_experts=LoraShape(description.rank_of_experts, description.scale_of_experts, 0.0),
        target_modules=(*linears, *projections),
        train_router=bool(routers),
        seed=0,
        kernels=choice.kernels,
    )


def _in_peft(projections: tuple[str, ...]) -> tuple[str, ...]:
    """The parameters that PEFT adapts for pairs of these projections, in their order: it has none for gate or up alone."""
    return tuple(GATE_UP if name in _HALVES else name for name in projections)


def _end(base: BaseModel, path: str) -> str:
    """Return the part of a dotted name that follows its decoder layer, such as mlp.experts."""
    return path.removeprefix(f"{decoder_layers(base.model)[0]}.").partition(".")[2]
