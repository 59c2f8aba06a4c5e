"""The output of a finished run: an adapter for the base model, or a whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hecate.adapters.card import full_model_card
from hecate.adapters.export_mixtral import MixtralFolder, dense_weights, export_mixtral, mixtral_config
from hecate.adapters.linear_experts import begin_with_linear_adapter, export_linear_adapter, linear_adapter_config
from hecate.adapters.mixlora.export import adapter_config, begin_with_mixlora, export_adapter
from hecate.adapters.peft.by_source import begin_with_loras, export_by_source, lora_config, paths_of
from hecate.adapters.peft.linear_lora import begin_with_lora, export_linear_lora
from hecate.adapters.peft.peft_experts import begin_with_peft, export_peft_adapter, peft_config
from hecate.config import Config, named_model
from hecate.errors import UserError
from hecate.io.durable import put_in_place, successor_of
from hecate.model.base import BaseModel
from hecate.model.front_ends import other_front_end
from hecate.model.gated_ffn import decoder_layers
from hecate.model.moe_model import MoeModel
from hecate.ranks.ranks import Ranks


@dataclass(frozen=True)
class TrainedOutput:
    """The output that a run will write. It is decided before training, so that what a format cannot hold is refused early."""

    name: str
    """the name of the folder in output_dir and of the summary's key: adapter, adapters or model"""
    write: Callable[[Path, MoeModel, Ranks], None]
    """a function that writes the new folder; every rank must call it"""

    def replace(self, run_folder: Path, moe: MoeModel, ranks: Ranks) -> Path:
        """Write the folder. One that an earlier end of the same run wrote stays until it is written. Every rank must call it.

        Raises:
            UserError: the disk refuses.
        """
        folder = run_folder / self.name
        successor = successor_of(folder) if ranks.is_first else folder  # the first rank alone writes
        self.write(successor, moe, ranks)
        if ranks.is_first:
            try:
                put_in_place(successor, folder)
            except OSError as error:
                raise UserError(f"{folder}: cannot be replaced: {error.strerror or error}; the new one is {successor}") from error
        return folder


def output_of(config: Config, base: BaseModel) -> TrainedOutput:
    """Return the output that a run of this configuration will write. `base` is the loaded model.

    Raises:
        UserError: the format cannot hold the trained model.
    """
    if other := other_front_end(config.model.front_end):
        return cast(TrainedOutput, other.output(config, base))
    return _FORMATS[config.moe.output](config, base)


def begin_with_adapter(config: Config, base: BaseModel, moe: MoeModel) -> None:
    """Set all that trains to the values of the adapter that `lora.init_from` names. Every rank must call it.

    Raises:
        UserError: the adapter cannot be read, or is not for the configured model and experts.
    """
    _BEGIN[config.moe.output](config, base, moe)


def _mixlora(config: Config, base: BaseModel) -> TrainedOutput:
    description = adapter_config(config, base)
    return TrainedOutput("adapter", lambda folder, moe, ranks: export_adapter(folder, description, moe, ranks))


def _peft(config: Config, base: BaseModel) -> TrainedOutput:
    description = peft_config(config, base)
    return TrainedOutput("adapter", lambda folder, moe, ranks: export_peft_adapter(folder, description, base, moe, ranks))


def _peft_by_source(config: Config, base: BaseModel) -> TrainedOutput:
    description, names, paths = lora_config(config, base), [source.name for source in config.data.train], paths_of(base)
    return TrainedOutput("adapters", lambda folder, moe, ranks: export_by_source(folder, names, description, paths, moe, ranks))


def _mixtral(config: Config, base: BaseModel) -> TrainedOutput:
    experts = config.moe.experts_per_layer(len(decoder_layers(base.model)[1]))
    dense: Any = base.model.config
    described = mixtral_config(dense, experts, config.moe.experts_per_token, config.moe.router_aux_loss_coef)
    card = full_model_card(config, named_model(config.model.name_or_path), described.num_local_experts)
    description = MixtralFolder(described, base.tokenizer, next(base.model.parameters()).dtype, card)
    return TrainedOutput("model", lambda folder, moe, ranks: export_mixtral(folder, description, dense_weights(base.model), moe, ranks))


def _linears(config: Config, base: BaseModel) -> TrainedOutput:
    description = linear_adapter_config(config, base)
    return TrainedOutput("adapter", lambda folder, moe, ranks: export_linear_adapter(folder, description, moe, ranks))


def _lora(config: Config, base: BaseModel) -> TrainedOutput:
    description = lora_config(config, base)
    return TrainedOutput("adapter", lambda folder, moe, ranks: export_linear_lora(folder, description, moe, ranks))


_FORMATS: dict[str, Callable[[Config, BaseModel], TrainedOutput]] = {
    "mixlora": _mixlora,
    "peft": _peft,
    "peft_by_source": _peft_by_source,
    "mixtral": _mixtral,
    "linears": _linears,
    "lora": _lora,
}
"""the formats by the name in `MoeConfig.output`"""
_BEGIN: dict[str, Callable[[Config, BaseModel, MoeModel], None]] = {
    "mixlora": begin_with_mixlora,
    "peft": begin_with_peft,
    "linears": begin_with_linear_adapter,
    "lora": begin_with_lora,
    "peft_by_source": begin_with_loras,
}
"""the formats that a run can begin with; the rules of configurations refuse the others"""
