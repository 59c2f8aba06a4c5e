"""An ordinary LoRA of a model's linear layers in PEFT's format: what training leaves that has one pair for each linear and no router.

    adapter_model.safetensors    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight [r, inputs]   .lora_B.weight [outputs, r]

Any program that reads PEFT's LoRA reads such a folder. Whatever program has written one, it goes into a model as the linears' only experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hecate.adapters.adapter_format import AdapterFormat, with_experts
from hecate.adapters.card import how_trained
from hecate.adapters.description import Adapter, Description
from hecate.adapters.folder import described_template
from hecate.adapters.model_tensors import TensorNames, linear_path, pair_shapes, require_tensors, set_pairs
from hecate.adapters.peft.description import PEFT_TYPE, LoraDescription, linear_names
from hecate.adapters.peft.reading import is_lora, load_lora
from hecate.adapters.peft.targets import adapted_linears, adapts, listed, unknown_targets
from hecate.adapters.places import Place
from hecate.config import Config, RouterConfig, named_model
from hecate.errors import UserError
from hecate.model.base import BaseChoice, BaseModel, build_base
from hecate.model.files.stored_experts import holds_experts
from hecate.model.gated_ffn import GatedFfn, find_gated_ffns
from hecate.model.insert import InsertionPlan
from hecate.model.linears import target_linears
from hecate.model.moe_model import MoeModel
from hecate.parallel.values.expert_kinds import ONLY_PROJECTION, PROJECTIONS, ExpertKind, LoraShape, kind_written_as
from hecate.parallel.values.units import Unit
from hecate.ranks.ranks import Ranks

_ALIKE = ("base_model_name_or_path", "r", "scale", "target_modules")
"""what the descriptions of adapters must have in common to be used together"""


class Lora(AdapterFormat):
    """A LoRA of linears."""

    name = "lora"
    what = LoraDescription.what
    peft_type = PEFT_TYPE

    def recognises(self, folder: Path) -> bool:
        return is_lora(folder, of_experts=False)

    def read(self, folder: Path) -> Adapter:
        return Adapter(folder, *load_lora(folder))

    def describe(self, config: Config, base: BaseModel) -> LoraDescription:
        """Of several adapters that a run trains, what they have in common. Raises UserError: a target module is no linear of the model."""
        targets = config.lora.target_modules
        if base.linears:
            target_linears(base.linears, targets, type(base.model).__name__)
        else:
            targets = tuple(base.ffns[0].projection_names[name] for name in config.moe.kind.projections(targets))
        return LoraDescription(
            base_model_name_or_path=named_model(config.model.name_or_path),
            r=config.lora.rank,
            alpha=config.lora.stored_alpha,
            use_rslora=config.lora.use_rslora,
            target_modules=targets,
            target_parameters=(),
            dropout=config.lora.dropout,
            extra={"model_dtype": config.model.dtype, "training": how_trained(config), **described_template(base.chat_template)},
        )

    def names(self, base: BaseModel, _moe: MoeModel) -> TensorNames:
        paths = paths_of(base)
        return TensorNames(
            lambda unit, projection, _: Place(*linear_names(paths[unit][projection])),
            lambda layer, module: linear_names(linear_path(base.model, layer, module)),
        )

    def compared(self, theirs: Adapter, ours: Description, base: BaseModel, moe: MoeModel) -> list[tuple[str, Any, Any]]:
        return [*super().compared(theirs, ours, base, moe), *other_targets(theirs, ours, base)]

    def open_for_answers(self, folder: Path, ranks: Ranks, choice: BaseChoice) -> tuple[BaseModel, MoeModel]:
        """As the only expert, which takes all tokens."""
        return with_loras([self.read(folder)], ranks, choice)

    def exchange(self, base: BaseModel, moe: MoeModel, before: Path, folder: Path) -> bool:
        """The two must have base model, rank, scale and modules in common."""
        adapter, adapter_before = self.read(folder), self.read(before)
        if any(getattr(adapter.description, key) != getattr(adapter_before.description, key) for key in _ALIKE):
            return False
        fill_experts([adapter], base, moe)
        return True


FORMAT = Lora()
Paths = Mapping[Unit, Mapping[str, str]]
"""of each unit of a dense model, the dotted names of the linears that its projections are"""


def paths_of(base: BaseModel) -> Paths:
    """Return where the pairs of units stand in a base model, as it was loaded."""
    if base.linears:
        return {one.unit: {ONLY_PROJECTION: one.path} for one in base.linears}
    return {ffn.unit: {name: f"{ffn.path}.{theirs}" for name, theirs in ffn.projection_names.items()} for ffn in base.ffns}


def other_targets(theirs: Adapter, ours: Description, base: BaseModel) -> list[tuple[str, Any, Any]]:
    """Return the targets of an adapter and of a run, as `compared` has them, if they are for other linears of the base model."""
    assert isinstance(theirs.description, LoraDescription)
    assert isinstance(ours, LoraDescription)
    targets, paths = theirs.description.target_modules, [path for of_unit in paths_of(base).values() for path in of_unit.values()]
    same = [adapts(targets, path) for path in paths] == [adapts(ours.target_modules, path) for path in paths]
    if same and not unknown_targets(targets, paths):
        return []
    return [("lora.target_modules", sorted(listed(targets)), sorted(listed(ours.target_modules)))]


def with_loras(read: Sequence[Adapter], ranks: Ranks, choice: BaseChoice) -> tuple[BaseModel, MoeModel]:
    """Return the base model with these adapters as its experts, in their order, for evaluation. A single one takes all tokens.

    Raises:
        UserError: the model cannot be read, one does not fit the other, or the adapters differ in rank, scale or modules.
    """
    folder, description = read[0].folder, read[0].description
    assert isinstance(description, LoraDescription)
    for one in read:
        if not isinstance(one.description, LoraDescription):
            raise UserError(f"{one.folder}: is {one.description.what}, and only LoRAs are used together\n  give the folders of LoRAs")
        for key in _ALIKE:
            if getattr(one.description, key) != getattr(description, key):
                raise UserError(
                    f"{one.folder}: {key} is {getattr(one.description, key)}, but {getattr(description, key)} in {folder}\n"
                    "  adapters are used together only if they are alike; use them one by one"
                )
    name = choice.name_for(folder, description.base_model_name_or_path)
    base, kind, modules = _base_for(folder, name, description, ranks, choice)
    plan = InsertionPlan(
        kind=kind,
        experts_per_layer=(len(read),) * len({one.unit.layer for one in base.found}),
        router=RouterConfig(input="given"),
        lora=LoraShape(description.r, description.scale, 0.0),
        target_modules=modules,
        seed=0,
        kernels=choice.kernels,
    )
    moe = with_experts(base, plan, ranks)
    fill_experts(read, base, moe)
    return base, moe


def fill_experts(read: Sequence[Adapter], base: BaseModel, moe: MoeModel) -> None:
    """Give each expert the values of an adapter of its own. Raises UserError: its tensors are not those that the model needs."""
    names = FORMAT.names(base, moe)
    for one in read:
        require_tensors(one.tensors, pair_shapes(moe, names), one.folder)
    set_pairs(moe, lambda unit, projection, expert, rank: names.pair(unit, projection, 0).pair(read[expert].tensors, rank))


def _base_for(
    folder: Path, name: str, description: LoraDescription, ranks: Ranks, choice: BaseChoice
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
