"""What a format of adapters can do. Each file of `hecate.adapters.formats` is one; `hecate.adapters.format_table` has them by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

from hecate.adapters.description import Adapter, Description, MixtureDescription
from hecate.adapters.folder import peft_type_of, save_adapter
from hecate.adapters.model_tensors import TensorNames, gathered, put_into
from hecate.config import Config, RouterConfig, adapter_in
from hecate.engine.step_plans import EngineConfig
from hecate.errors import UserError
from hecate.model.base import BaseChoice, BaseModel, build_base
from hecate.model.gated_ffn import decoder_layers
from hecate.model.insert import InsertionPlan, insert_experts
from hecate.model.moe_model import MoeModel
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.planners import POLICIES
from hecate.parallel.values.expert_kinds import LoraShape, kind_written_as
from hecate.ranks.ranks import Ranks

WriteTrained = Callable[[Path, MoeModel, Ranks], None]
"""a function that writes what was trained to a new folder; every rank must call it"""


ReadAdapter = Callable[[Path], Adapter]
"""a function that reads an adapter's folder of any format; it raises UserError"""


class AdapterFormat:
    """A format of adapters, or of whole models. What one cannot do, it refuses by `refusal`, which is what every method does at first.

    A format whose adapters are pairs in one model gives `read`, `describe`, `names` and `compared`; the other methods go by these.
    """

    name: ClassVar[str]
    """by which `MoeConfig.output` and `hecate export --to` know it"""
    what: ClassVar[str]
    """what a folder in it holds, for messages"""
    instead: ClassVar[str] = "give the folder of an adapter"
    """the hint of a refusal"""
    peft_type: ClassVar[str] = ""
    """what adapter_config.json says; empty: it has no such file, or none of its own"""
    holds: ClassVar[tuple[type[Description], ...]] = ()
    """the descriptions of the adapters that `export` can write; nothing: `hecate export --to` does not know the format"""

    def refusal(self, folder: Path, operation: str) -> UserError:
        """Return the error that says what cannot be done with a folder of this format.

        Args:
            operation: what goes on after "which cannot".
        """
        return UserError(f"{folder}: is {self.what}, which cannot {operation}\n  {self.instead}")

    def recognises(self, folder: Path) -> bool:
        """Return whether a folder is of this format; it is of one at most. Raises UserError: its adapter_config.json cannot be read."""
        return bool(self.peft_type) and peft_type_of(folder) == self.peft_type

    def read(self, folder: Path) -> Adapter:
        """Read an adapter's folder. Tensors are on the CPU; whether they are those that a model needs is not checked.

        Raises:
            UserError: a file cannot be read, a key or a tensor is missing or wrong, or the format has no adapters.
        """
        raise self.refusal(folder, "be read as an adapter")

    def adapters_in(self, folder: Path) -> list[Path]:
        """Return the folders of the adapters that a folder holds. Raises UserError: the format has none."""
        return [folder]

    def describe(self, config: Config, base: BaseModel) -> Description:
        """Return the description of what a run trains. It is made before training, so that what the format cannot hold is refused early.

        Raises:
            UserError: the format cannot hold it.
        """
        raise self.refusal(Path(config.output_dir), "be written at the end of a run")

    def names(self, _base: BaseModel, _moe: MoeModel) -> TensorNames:
        """Return what the format calls the tensors of a model."""
        raise NotImplementedError(f"{self.name}: of a format that gives no names, `output`, `begin` and `open_for_answers` are its own")

    def output(self, config: Config, base: BaseModel) -> WriteTrained:
        """Return how a run of this configuration will write what it has trained. `base` is the loaded model.

        Raises:
            UserError: as `describe`.
        """
        description = self.describe(config, base)
        return lambda folder, moe, ranks: self.write(folder, description, base, moe, ranks)

    def write(self, folder: Path, description: Description, base: BaseModel, moe: MoeModel, ranks: Ranks) -> None:
        """Gather what was trained on rank 0 and write the new folder there. Every rank must call it.

        Raises:
            UserError: the folder exists, a tensor is not as the format has it, or the disk fails.
        """
        description = self.as_trained(with_drawn_digest(description, moe), moe)
        tensors = gathered(moe, self.names(base, moe), ranks)
        if tensors is not None:
            save_adapter(folder, tensors, description)

    def as_trained(self, description: Description, _moe: MoeModel) -> Description:
        """Return the description with what only the model says."""
        return description

    def begin(self, config: Config, base: BaseModel, moe: MoeModel, read: ReadAdapter) -> None:
        """Set all that trains to the values of the adapter that `lora.init_from` names, of any format. Every rank must call it.

        Raises:
            UserError: the adapter cannot be read, or is not for the configured model and experts.
        """
        assert config.lora.init_from is not None
        theirs, ours = read(adapter_in(config.lora.init_from)), self.describe(config, base)
        require_kind(theirs, ours)
        for key, of_file, configured in self.compared(theirs, ours, base, moe):
            refuse_different(theirs.folder, key, of_file, configured)
        self.load(theirs, base, moe)

    def compared(self, theirs: Adapter, ours: Description, _base: BaseModel, moe: MoeModel) -> list[tuple[str, Any, Any]]:
        """Return what an adapter must have as a run has it, to begin it: of each key the adapter's value and the configuration's."""
        found = theirs.description
        alike = [("lora.r", found.ranks, ours.ranks), ("lora.alpha, scaled", found.scale, ours.scale)]
        if not isinstance(found, MixtureDescription) or not isinstance(ours, MixtureDescription):
            return alike
        return [
            *alike,
            ("lora.target_modules", sorted(found.target_modules), sorted(ours.target_modules)),
            ("moe.num_experts", list(found.experts_per_layer), list(ours.experts_per_layer)),
            ("moe.top_k", found.top_k, ours.top_k),
            ("moe.router", *_different_choices(found.router, ours.router)),
            ("data.features, whose width is", found.user_width(theirs.tensors), moe.user_width),
        ]

    def load(self, adapter: Adapter, base: BaseModel, moe: MoeModel) -> None:
        """Give a model an adapter's values. Raises UserError: as `put_into`."""
        put_into(moe, self.names(base, moe), adapter.tensors, adapter.folder)

    def open_for_answers(self, folder: Path, ranks: Ranks, choice: BaseChoice) -> tuple[BaseModel, MoeModel]:
        """Return the base model with an adapter in it, for evaluation and answers: here one of experts with routers of their own.

        Raises:
            UserError: the adapter or the model cannot be read, one does not fit the other, or memory is too small for the model.
        """
        adapter = self.read(folder)
        description, kind = adapter.description, kind_written_as(self.name)
        assert isinstance(description, MixtureDescription), self.name
        try:
            router = description.router
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
        name = choice.name_for(folder, description.base_model_name_or_path)
        base = build_base(name, choice.dtype, choice.num_hidden_layers, ranks.device, kind, choice.attention)
        layers, counts = len(decoder_layers(base.model)[1]), description.experts_per_layer
        if layers != len(counts):
            raise UserError(f"{folder}: made for {len(counts)} layers, but the base model has {layers}")
        plan = InsertionPlan(
            kind=kind,
            experts_per_layer=counts,
            top_k=max(counts) if router.takes_all else description.top_k,
            router=router,
            user_width=description.user_width(adapter.tensors),
            lora=LoraShape(description.r, description.scale, 0.0),
            target_modules=description.target_modules,
            seed=0,
            kernels=choice.kernels,
        )
        moe = with_experts(base, plan, ranks)
        self.load(adapter, base, moe)
        return base, moe

    def exchange(self, _base: BaseModel, _moe: MoeModel, _before: Path, _folder: Path) -> bool:
        """Put an adapter in the place of the one that `open_for_answers` has read from `before`, which spares loading the base model again.

        Returns:
            False, and nothing is changed: the two are not alike, or the format cannot do it.

        Raises:
            UserError: the adapter cannot be read, or does not fit the model.
        """
        return False

    def export(self, adapter: Adapter, out: Path) -> list[str]:
        """Write an adapter that `holds` names in this format, to the new folder `out`; what the user should know, line by line.

        Raises:
            UserError: it cannot be written so, in words that go on after the adapter's folder; a file cannot be read; or the disk fails.
        """
        raise self.refusal(out, "be made of another adapter")


def with_experts(base: BaseModel, plan: InsertionPlan, ranks: Ranks) -> MoeModel:
    """Put experts into a base model for evaluation and answers."""
    planner = EngineConfig(POLICIES["full"], local_topology(ranks.world_size, cuda=ranks.device.type == "cuda"))
    return insert_experts(base.model, base.found, plan, planner, ranks.groups)


def with_drawn_digest(description: Description, moe: MoeModel) -> Description:
    """Return a description with the digest of what the pairs' A and B were made of; as it is, if nothing was drawn for them."""
    drawn = moe.drawn_digest
    return replace(description, extra={**description.extra, "drawn": drawn}) if drawn else description


def require_kind(theirs: Adapter, ours: Description) -> None:
    """Raises UserError: an adapter that training is to begin with is another kind of thing than what the run trains."""
    if not isinstance(theirs.description, type(ours)):
        raise UserError(
            f"lora.init_from: {theirs.folder} is {theirs.description.what}, but the run trains {ours.what}\n"
            "  give moe.family, moe.unit and moe.num_experts as the adapter has them, or leave lora.init_from out"
        )


def refuse_different(folder: Path, key: str, of_file: object, configured: object) -> None:
    """Raises UserError: an adapter that training is to begin with has another value of a key than the configuration."""
    if of_file != configured:
        named = {"lora.alpha, scaled": "lora.alpha and lora.use_rslora", "rank and scale": "lora.r, lora.alpha and lora.use_rslora"}
        hint = f"give {named.get(key, key.partition(',')[0])} as the adapter has it, or leave lora.init_from out"
        raise UserError(f"lora.init_from: {folder} has {key} {of_file}, but the configuration has {configured}\n  {hint}")


def _different_choices(theirs: RouterConfig, ours: RouterConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The choices that differ between two kinds of routers; how a router is trained, a run may change."""
    of_file, configured = asdict(theirs), asdict(ours)
    keys = [key for key in configured if of_file[key] != configured[key] and key not in ("bias_rate", "balance")]
    return {key: of_file[key] for key in keys}, {key: configured[key] for key in keys}
