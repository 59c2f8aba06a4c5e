"""Megatron's own MoELayer with expert parallelism, the baseline beside our layer. It trains on a CPU, too.

Experts stand in order, as many on each rank, and every assignment travels in an all-to-all.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from hecate.apps.megatron.gpt import transformer_config
from hecate.apps.megatron.tensor_parallel import call_newest_collectives
from hecate.apps.megatron.without_cuda import answer_for_cuda
from hecate.config.gpt_shape import GptShape
from hecate.experts.forward_pass import CurrentPass
from hecate.experts.routers.router import Routing, load_balancing_loss
from hecate.parallel.values.units import Unit


def expert_parallel_config(shape: GptShape, dtype: torch.dtype, world_size: int, *, aux_loss_coef: float = 0.0) -> TransformerConfig:
    """Megatron's configuration of the model with its own experts.

    Args:
        aux_loss_coef: of Megatron's own loss over all ranks' tokens, which is a k-th of ours per layer and a sum over layers.
    """
    return transformer_config(
        shape,
        dtype,
        num_moe_experts=shape.experts,
        moe_router_topk=shape.top_k,
        moe_ffn_hidden_size=shape.ffn,
        moe_router_load_balancing_type="global_aux_loss" if aux_loss_coef else "none",
        moe_aux_loss_coeff=aux_loss_coef,
        moe_router_dtype="fp64" if dtype == torch.float64 else "fp32",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=False,
        expert_model_parallel_size=world_size,
    )


def expert_parallel_spec(current: CurrentPass | None = None) -> ModuleSpec:
    """What stands in the place of a layer's FFN.

    Args:
        current: whose passes routers note their routing in, as ours do; None: they note it nowhere.
    """
    answer_for_cuda()
    call_newest_collectives()
    spec = get_moe_module_spec(use_te=False, num_experts=1, moe_grouped_gemm=False)  # the number is asked for, and not used
    # A specification up to Megatron 0.17, and from 0.18 on a function that makes the layer.
    submodules = spec.submodules if isinstance(spec, ModuleSpec) else spec.keywords["submodules"]
    submodules.router = functools.partial(RecordingRouter, current=current)
    return ModuleSpec(module=MoELayer, submodules=submodules)


def build_layer(
    config: TransformerConfig, groups: ProcessGroupCollection, layer: int, current: CurrentPass | None = None
) -> ExpertParallelLayer:
    """One layer by itself. Every rank must call it."""
    spec = expert_parallel_spec(current)
    made = ExpertParallelLayer(config, spec.submodules, layer_number=layer + 1, pg_collection=groups)
    made.set_layer_number(layer + 1)
    return made


class ExpertParallelLayer(MoELayer):
    """Megatron's, among the layers of a `MoeModel`."""

    balance = staticmethod(load_balancing_loss)

    @property
    def trained_router(self) -> dict[str, nn.Parameter]:
        return {"weight": self.router.weight}


class RecordingRouter(TopKRouter):
    """Megatron's, on any device, that notes probabilities and counts for our load-balancing loss."""

    def __init__(self, *, current: CurrentPass | None, **named: Any) -> None:
        super().__init__(**named)
        self._current = current

    def gating(self, input: Tensor) -> Tensor:
        wide = torch.promote_types(input.dtype, torch.float32)
        return F.linear(input.to(wide), self.weight.to(wide))

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        prob_TE, map_TE = super().routing(logits, padding_mask)
        if self._current is not None:
            current = self._current.required()
            # Megatron's layers route padding, too; its outputs and gradients reach no label, and it is not counted.
            by_sequence = [tensor.view_as(logits).transpose(0, 1).flatten(0, 1) for tensor in (logits, prob_TE, map_TE)]
            valid = current.tokens.valid
            routing = self._routing(*(part if valid is None else part[valid] for part in by_sequence))
            current.note_routing(Unit(self.layer_number - 1), routing)
        return prob_TE, map_TE

    def _routing(self, logits_TE: Tensor, prob_TE: Tensor, map_TE: Tensor) -> Routing:
        weight_TK, expert_TK = torch.where(map_TE, prob_TE, -1).topk(self.topk)
        return Routing(logits_TE.softmax(-1), expert_TK, weight_TK)


def put_experts(layer: MoELayer, chunks_nC: Tensor) -> None:
    """Have the local experts compute with their rows of `chunks_nC`, as `FfnShape` lays them out, and without gradients: with views of
    them, or, where the layer computes in another type, with copies."""
    for expert, chunk in zip(layer.local_expert_indices, chunks_nC.detach().to(layer.config.params_dtype), strict=True):
        for parameter, part in zip(expert_weights(layer, expert), _split(layer, expert, chunk), strict=True):
            parameter.data, parameter.grad = part.view_as(parameter), None


def write_gradients(layer: MoELayer, grad_nC: Tensor) -> None:
    """Copy the local experts' gradients to their rows of `grad_nC`, zeros where an expert has none, and forget them in the layer."""
    for expert, row in zip(layer.local_expert_indices, grad_nC, strict=True):
        for parameter, part in zip(expert_weights(layer, expert), _split(layer, expert, row), strict=True):
            if parameter.grad is None:
                part.zero_()
            else:
                part.copy_(parameter.grad.flatten())
            parameter.grad = None


def expert_weights(layer: MoELayer, expert: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Gate and up as one matrix, and down: our chunk's order."""
    mlp = layer.experts.local_experts[layer.local_expert_indices.index(expert)]
    return mlp.linear_fc1.weight, mlp.linear_fc2.weight


def _split(layer: MoELayer, expert: int, chunk: Tensor) -> tuple[Tensor, ...]:
    return chunk.split([parameter.numel() for parameter in expert_weights(layer, expert)])
