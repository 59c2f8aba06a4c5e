"""Adapters of several sources, trained at once as experts of FFNs or linears: each is written as its own folder, in PEFT's LoRA format.

    adapters/SOURCE/adapter_model.safetensors    base_model.model.model.layers.3.mlp.gate_proj.lora_A.weight [r, D]   .lora_B.weight [F, r]

Any program that reads PEFT's LoRA reads such a folder. Here one folder, or those of several sources, go into the model as experts again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from hecate.adapters.adapter_format import AdapterFormat, ReadAdapter, WriteTrained, refuse_different, require_kind, with_drawn_digest
from hecate.adapters.description import Adapter, Description
from hecate.adapters.folder import CONFIG, refuse_existing, save_adapter
from hecate.adapters.formats.lora import FORMAT as LORA
from hecate.adapters.formats.lora import fill_experts, other_targets
from hecate.adapters.model_tensors import pairs_on_first
from hecate.adapters.peft.per_expert import pad_rank, scaled
from hecate.config import Config, adapter_in
from hecate.errors import UserError
from hecate.io.durable import delete_files, new_folder
from hecate.model.base import BaseModel
from hecate.model.moe_model import MoeModel
from hecate.ranks.ranks import Ranks


class PeftBySource(AdapterFormat):
    """A folder with a LoRA for each source of the training data."""

    name = "peft_by_source"
    what = "the adapters of several sources"

    def refusal(self, folder: Path, operation: str) -> UserError:
        sources = sources_in(folder)
        named = f"{folder}: holds the adapters of several sources: {', '.join(sources)}"
        return UserError(f"{named}\n  name one: {folder / sources[0]}") if sources else super().refusal(folder, operation)

    def recognises(self, folder: Path) -> bool:
        return bool(sources_in(folder))

    def adapters_in(self, folder: Path) -> list[Path]:
        return [folder / source for source in sources_in(folder)]

    def output(self, config: Config, base: BaseModel) -> WriteTrained:
        description, sources = LORA.describe(config, base), [source.name for source in config.data.train]
        return lambda folder, moe, ranks: write_by_source(folder, sources, description, base, moe, ranks)

    def begin(self, config: Config, base: BaseModel, moe: MoeModel, read: ReadAdapter) -> None:
        """Set each expert to the values of an adapter: that of its source in the folder that `lora.init_from` names, or the folder's only
        one. An adapter may have a smaller rank than the widest expert's; its expert must not have a smaller one.
        """
        assert config.lora.init_from is not None
        given, names = Path(config.lora.init_from), [source.name for source in config.data.train]
        folders = [given / name if (given / name / CONFIG).is_file() else adapter_in(given) for name in names]
        shape, ours, found = config.lora.shape, LORA.describe(config, base), []
        for expert, folder in enumerate(folders):
            adapter = read(folder)
            require_kind(adapter, ours)
            theirs = adapter.description
            of_expert = shape.of_experts[expert] if shape.of_experts else (shape.rank, shape.scale)
            whole, has = (shape.rank, shape.scale), (theirs.r, theirs.scale)
            refuse_different(folder, "rank and scale", has, whole if has == whole else of_expert)
            for key, of_file, configured in other_targets(adapter, ours, base):
                refuse_different(folder, key, of_file, configured)
            found.append(replace(adapter, tensors=_fitting(adapter, shape.rank, theirs.scale / shape.scale)))
        fill_experts(found, base, moe)


FORMAT = PeftBySource()


def write_by_source(folder: Path, sources: Sequence[str], description: Description, base: BaseModel, moe: MoeModel, ranks: Ranks) -> None:
    """Gather all experts on rank 0, one unit at a time, and write a folder for each source there. Every rank must call it.

    Args:
        sources: the names, in the order of the experts.

    Raises:
        UserError: a folder exists, a tensor is not finite, or the disk fails.
    """
    names, tensors = LORA.names(base, moe), {source: dict[str, Tensor]() for source in sources}
    for unit, pairs in pairs_on_first(moe, sorted(moe.layers), ranks):
        for projection, lora in pairs.items():
            place = names.pair(unit, projection, 0)
            for expert, of_source in enumerate(tensors.values()):
                of_source[place.name_a] = lora.a_SrI[expert].detach().cpu()
                of_source[place.name_b] = lora.b_SOr[expert].detach().cpu()
    if ranks.is_first:
        refuse_existing(folder)
        write_sources(folder, tensors, with_drawn_digest(description, moe))


def _fitting(adapter: Adapter, rank: int, factor: float) -> dict[str, Tensor]:
    """An adapter's pairs with zeros up to a rank, B multiplied by a factor."""
    fitting = {}
    for name, tensor in adapter.tensors.items():
        is_a = name.endswith("lora_A.weight")
        fitting[name] = pad_rank(tensor if is_a else scaled(tensor, factor), rank, a=is_a)
    return fitting


def write_sources(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], description: Description) -> None:
    """Write the new folder `folder` with an adapter for each source, all or none: commands take what is there for all that there is.

    Raises:
        UserError: a tensor is not finite, or the disk fails.
    """
    try:
        with new_folder(folder) as staging:
            try:
                for source, of_source in tensors.items():
                    save_adapter(staging / source, of_source, description)
            except Exception:
                for source in tensors:
                    delete_files(staging / source)
                raise
    except OSError as error:
        raise UserError(f"{folder}: the adapters cannot be written: {error.strerror}") from error


def sources_in(folder: Path) -> list[str]:
    """Return the names of the sources whose adapters the folder holds, sorted; none, if it is no such folder."""
    if (folder / CONFIG).exists() or not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if (path / CONFIG).is_file())
