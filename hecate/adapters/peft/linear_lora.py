"""An ordinary LoRA of a model's linear layers in PEFT's format: what training leaves that has one pair for each linear and no router.

    adapter_model.safetensors    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight [r, inputs]   .lora_B.weight [outputs, r]

Any program that reads PEFT's LoRA reads such a folder. Whatever program has written one, it goes into a model as the linears' only experts.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from hecate.adapters.linear_experts import path_of
from hecate.adapters.mixlora.export import pairs_on_first, refuse_different, with_drawn_digest
from hecate.adapters.mixlora.tensors import require_tensors
from hecate.adapters.peft.by_source import lora_config, refuse_other_targets
from hecate.adapters.peft.lora_folder import load_lora
from hecate.adapters.peft.peft_moe import PeftMoeConfig, linear_names, save_peft_adapter
from hecate.config import Config, adapter_in
from hecate.experts.linear import MoeLinear
from hecate.model.base import BaseModel
from hecate.model.moe_model import MoeModel
from hecate.parallel.values.expert_kinds import ONLY_PROJECTION
from hecate.parallel.values.units import Unit
from hecate.ranks.ranks import Ranks


def export_linear_lora(folder: Path, description: PeftMoeConfig, moe: MoeModel, ranks: Ranks) -> None:
    """Gather all pairs on rank 0, one linear at a time, and write the adapter there. Every rank must call it.

    Raises:
        UserError: the folder exists, a tensor is not finite, or the disk fails.
    """
    tensors: dict[str, Tensor] = {}
    for unit, pairs in pairs_on_first(moe, sorted(moe.layers), ranks):
        pair = pairs[ONLY_PROJECTION]
        name_a, name_b = linear_names(path_of(moe.model, unit))
        tensors[name_a], tensors[name_b] = pair.a_SrI[0].detach().cpu().clone(), pair.b_SOr[0].detach().cpu().clone()
    if ranks.is_first:
        plain = {name: matrix.detach().cpu().clone() for name, matrix in _plain(moe).items()}
        save_peft_adapter(folder, tensors | plain, with_drawn_digest(description, moe))


def begin_with_lora(config: Config, base: BaseModel, moe: MoeModel) -> None:
    """Set all that trains to the values of the adapter that `lora.init_from` names. Every rank must call it.

    Raises:
        UserError: the adapter cannot be read, or differs from the configured rank, scale or target modules.
    """
    assert config.lora.init_from is not None
    folder = adapter_in(config.lora.init_from)
    tensors, theirs = load_lora(folder)
    ours = lora_config(config, base)
    refuse_different(
        folder,
        ("lora.r", theirs.r, ours.r),
        ("lora.alpha, scaled", theirs.scale, ours.scale),
    )
    refuse_other_targets(folder, theirs, ours, base)
    _set_values(moe, tensors, folder)


def _set_values(moe: MoeModel, tensors: dict[str, Tensor], where: Path) -> None:
    """Set plain pairs and this rank's owned experts from an adapter's tensors.

    Raises:
        UserError: a tensor is missing, superfluous or of another shape than the model needs, or A is drawn, and is another.
    """
    wanted = {name: tuple(matrix.shape) for name, matrix in _plain(moe).items()}
    names = {}
    for unit, layer in moe.layers.items():
        assert isinstance(layer, MoeLinear)
        names[unit] = name_a, name_b = linear_names(path_of(moe.model, unit))
        rank = moe.engine.shards.families[unit].pair_source.lora.rank
        wanted |= {name_a: (rank, layer.linear.in_features), name_b: (layer.linear.out_features, rank)}
    require_tensors(tensors, wanted, where)
    with torch.no_grad():
        for (layer_number, module), lora in moe.attention.items():
            name_a, name_b = linear_names(path_of(moe.model, Unit(layer_number, module)))
            lora.set_pair(tensors[name_a], tensors[name_b])
        for (unit, expert), chunk in moe.engine.shards.named_parameters().items():
            name_a, name_b = names[unit]
            source = moe.engine.shards.families[unit].pair_source
            chunk.copy_(source.chunk_of(expert, {ONLY_PROJECTION: (tensors[name_a], tensors[name_b])}))


def _plain(moe: MoeModel) -> dict[str, Tensor]:
    """The pairs of linears without experts, which every rank has, by the tensors' names."""
    named: dict[str, Tensor] = {}
    for (layer, module), lora in moe.attention.items():
        name_a, name_b = linear_names(path_of(moe.model, Unit(layer, module)))
        named |= {name_a: lora.lora_A, name_b: lora.lora_B}
    return named
