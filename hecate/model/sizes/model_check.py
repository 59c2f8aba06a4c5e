"""Checks that a base model can have the configured experts, before any process of a job starts."""

from __future__ import annotations

from hecate.config import Config, find_model
from hecate.model.files.stored_experts import expert_layers, holds_experts, no_experts, no_gguf, refuse_experts
from hecate.model.files.tensor_shapes import tensor_shapes, tensors_of
from hecate.model.sizes.base_shape import LAYER
from hecate.model.sizes.pair_check import check_pair_sizes


def check_model(config: Config, local_ranks: int | None = None) -> None:
    """Check, from the headers of the model's files, whether it has experts of its own, its number of layers, and `check_pairs`.

    What else is wrong with a model is left to those who load it.

    Args:
        local_ranks: see `check_pairs`.

    Raises:
        UserError: the model has experts, or has none, where `moe.family` wants the other kind; or its experts are of a form that is not
            supported; or `moe` lists another number of layers; or what `check_pairs` raises.
    """
    if config.model.front_end == "transformers":
        _check_experts(config)
    check_pair_sizes(config, local_ranks)


def _check_experts(config: Config) -> None:
    kind, path = config.moe.kind, find_model(config.model.name_or_path)
    if kind.of_moe_base and path.suffix == ".gguf":
        raise no_gguf(path, kind)
    names = tensor_shapes(path)
    layers = {int(match[1]) for name in names if (match := LAYER.search(name))}
    if not layers:
        return
    if not kind.of_moe_base:
        refuse_experts(names, path, kind)
        config.moe.experts_per_layer(min(config.model.num_hidden_layers or len(layers), len(layers)))
    elif not holds_experts(names):
        raise no_experts(path, kind)
    else:
        expert_layers(tensors_of(path), path)
