"""Loads an MoE model without its experts, and finds where each expert's weights lie: their owners alone read them later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hecate.errors import UserError
from hecate.experts.family import FfnSource
from hecate.kernels.common.ffn import FfnShape
from hecate.model.files.load import ModelSource, load_without, outline_of, read_config
from hecate.model.files.read_experts import read_expert
from hecate.model.files.safetensors_headers import stored_tensors
from hecate.model.files.stored_experts import LayerExperts, expert_layers, no_gguf
from hecate.model.moe_blocks import MoeBlock, find_moe_blocks
from hecate.parallel.values.expert_kinds import ExpertKind, kinds_for
from hecate.parallel.values.units import Unit


@dataclass(frozen=True)
class OwnExperts:
    """A layer's router and experts in an MoE model, which was loaded without them, and where the experts' weights are."""

    block: MoeBlock
    files: LayerExperts

    @property
    def unit(self) -> Unit:
        return Unit(self.block.layer)

    @property
    def path(self) -> str:
        return self.block.experts_path

    @property
    def block_path(self) -> str:
        """The block that holds both, and shared experts."""
        return self.block.path

    @property
    def router_path(self) -> str:
        return self.block.router_path

    @property
    def own_experts(self) -> int:
        return self.block.num_experts

    @property
    def shape(self) -> FfnShape:
        return FfnShape(self.block.hidden, self.block.ffn, self.block.activation)

    def source(self, model: nn.Module) -> FfnSource:
        """Each expert as it is read from the files by its owner, in the model's dtype and on its device."""
        like = next(model.parameters())
        dtype, device = like.dtype, like.device
        return FfnSource(own_expert=lambda expert: read_expert(self.files, expert, dtype, device))


def load_moe_model(
    source: ModelSource, dtype: torch.dtype, device: torch.device, kind: ExpertKind, num_hidden_layers: int | None = None
) -> tuple[nn.Module, tuple[OwnExperts, ...]]:
    """The causal language model, frozen, on `device`, with `LeftOut` in the place of its experts; and its layers that have experts.

    Raises:
        UserError: as `find_own_experts`, or the model is damaged.
    """
    model_class, config, layers = find_own_experts(source, kind, num_hidden_layers)
    model = load_without([layer.path for layer in layers], model_class, config, source, dtype, device)
    return model, layers


def find_own_experts(
    source: ModelSource, kind: ExpertKind, num_hidden_layers: int | None = None
) -> tuple[type, Any, tuple[OwnExperts, ...]]:
    """The model's class, its configuration and its layers that have experts, from headers and an outline on the meta device.

    Raises:
        UserError: the model is dense, quantised, a GGUF file, of an architecture that is not supported, or incomplete.
    """
    if source.gguf_file is not None:
        raise no_gguf(source.gguf_file, kind)
    config = read_config(source, num_hidden_layers)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{source.folder}: config.json has a quantization_config: quantised models are not supported by moe.family {kind.name}\n"
            "  take a checkpoint in bfloat16 or float32, or dequantise this one and save it anew"
        )
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False  # the trainer has a load-balancing loss of its own, over all ranks
    outline = outline_of(config, source)
    blocks = find_moe_blocks(outline)
    if not blocks:
        raise UserError(
            f"{source.folder}: {type(outline).__name__} has no experts, but moe.family is {kind.name}\n"
            f"  for a dense model take {kinds_for(moe_base=False)}"
        )
    if len({block.top_k for block in blocks}) > 1:
        raise UserError(f"{source.folder}: layers whose routers choose different numbers of experts are not supported")
    files = expert_layers(stored_tensors(source.folder), source.folder)
    layers = []
    for block in blocks:
        stored = files.get(block.layer)
        wanted = block.num_experts, block.hidden, block.ffn
        got = None if stored is None else (stored.num_experts, stored.hidden, stored.ffn)
        if stored is None or got != wanted:
            held = "none in a known layout" if got is None else f"{got[0]} of {got[1]} and {got[2]}"
            raise UserError(
                f"{source.folder}: layer {block.layer}: config.json says {wanted[0]} experts of hidden size {wanted[1]} and ffn size "
                f"{wanted[2]}, but the files have {held}; is the download complete?"
            )
        layers.append(OwnExperts(block, stored))
    return type(outline), config, tuple(layers)
