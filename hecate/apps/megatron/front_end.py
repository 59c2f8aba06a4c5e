"""From a configuration to a GPT of Megatron's with our experts in it, and the parts that the trainer drives.

The engine, the router and all that trains them are those of the transformers path; Megatron's are embeddings, attention, norms, head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from hecate.apps.megatron.imports import quietly
from hecate.apps.megatron.master_weights import train_in_float32
from hecate.config import Config
from hecate.config.gpt_shape import GptShape, gpt_shape
from hecate.config.schema import MEGATRON_EP
from hecate.data.batches import PackedSamples, block_diagonal_mask
from hecate.engine.engine import Engine
from hecate.engine.from_config import engine_config
from hecate.engine.protocol import ExpertEngine
from hecate.engine.step_plans import EngineConfig, SlotsByMemory
from hecate.experts.family import Site
from hecate.experts.forward_pass import CurrentPass
from hecate.experts.full import FullExperts
from hecate.experts.layer import MoeLayer
from hecate.experts.routers.by_input.token import TopKRouter
from hecate.experts.routers.router import RouterSite
from hecate.experts.seeding import generator
from hecate.kernels.common.ffn import FfnShape
from hecate.model.base import BaseModel
from hecate.model.causal_head import VocabularyPart, chunked_cross_entropy
from hecate.model.files.load import pick_dtype
from hecate.model.files.tokenizer import tokenizer_of, vocabulary_of
from hecate.model.insert import prefetch_during_attention
from hecate.model.moe_model import MoeModel, adapter_dtype
from hecate.model.parameter_parts import TensorParts
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import TensorGroups
from hecate.ranks.ranks import Ranks

with quietly():
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
    from megatron.core.transformer.spec_utils import ModuleSpec

    from hecate.apps.megatron.gpt import INIT_STD, build_gpt, process_groups, transformer_config
    from hecate.apps.megatron.layer import MoeMlp
    from hecate.apps.megatron.tensor_parallel import prepare_sharded_layers, replace_groups


@dataclass(frozen=True)
class MegatronModel(BaseModel):
    """A model of Megatron's, which begins with experts in it."""

    shape: GptShape = field(kw_only=True)

    def rejoin(self, ranks: Ranks) -> None:
        """Put the tensor groups of these ranks in the place of those before; every one of them has the part that it had."""
        if ranks.tensor is None:
            return
        assert self.moe is not None
        assert self.moe.parts is not None
        assert isinstance(self.head, GptHead)
        before, after = self.moe.parts.groups, ranks.tensor
        assert (after.tp_size, after.tp_rank) == (self.head.tp_size, self.head.tp_rank), "a tensor group was not lost as a whole"
        replace_groups(self.model, [(before.tensor, after.tensor), (before.data, after.data)])
        self.moe.parts.groups = after
        self.head.rejoin(after)


class GptHead:
    """A GPTModel taken apart into its decoder and its output projection, as `LanguageModelHead` does with transformers' models.

    Under tensor parallelism the ranks of a group give it the same rows. Between their shared projections each keeps some of the positions
    (Megatron's sequence parallelism), so that no token is routed twice; hidden states come out whole, logits of a part of the vocabulary.
    """

    def __init__(self, model: Any, tensor: TensorGroups | None = None) -> None:
        self._model = model
        self._tensor = tensor
        self.tp_size, self.tp_rank = (tensor.tp_size, tensor.tp_rank) if tensor else (1, 0)

    def rejoin(self, tensor: TensorGroups) -> None:
        """Compute in another tensor group of the same size, with the same part of the model."""
        self._tensor = tensor

    def own_positions(self, length: int) -> slice:
        """The positions, of sequences of `length` tokens, that the layers of this rank compute."""
        if self._tensor is None:
            return slice(length)
        assert length % self._tensor.tp_size == 0, (length, self._tensor.tp_size)
        each = length // self._tensor.tp_size
        return slice(self._tensor.tp_rank * each, (self._tensor.tp_rank + 1) * each)

    def row_multiple(self, seq_len: int) -> int:
        """Of 8 positions."""
        return 8

    def hidden(self, input_ids: Tensor, samples: PackedSamples | None, position_ids: Tensor) -> Tensor:
        """[B, S] -> [B, S, D]. Position numbers are not needed: rotary embeddings are relative, and no sample sees another."""
        # Of one sample each, padded behind, causal attention alone cannot look where it must not, and is faster than any mask.
        attention_mask = None if samples is None else block_diagonal_mask(samples.segment_ids)
        model = self._model
        rotary = model.rotary_pos_emb(input_ids.shape[1])
        embedded_SBD = model.embedding(input_ids=input_ids, position_ids=position_ids)
        hidden_SBD = model.decoder(hidden_states=embedded_SBD, attention_mask=attention_mask, rotary_pos_emb=rotary)
        if self._tensor is not None:
            hidden_SBD = gather_from_sequence_parallel_region(hidden_SBD, group=self._tensor.tensor)
        return hidden_SBD.transpose(0, 1)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, D] -> [N, vocabulary], or this rank's part of it. Megatron's output layer would gather the positions again."""
        return F.linear(hidden_ND, self._model.shared_embedding_or_output_weight())

    def loss_sum(self, hidden_ND: Tensor, target_N: Tensor, weight_N: Tensor | None = None) -> Tensor:
        """Summed cross-entropy of N label tokens; of the ranks of a tensor group, which give the same ones, each has a share of the sum."""
        weight = self._model.shared_embedding_or_output_weight()
        part = VocabularyPart(self._tensor.tp_rank * len(weight), self._tensor.tensor) if self._tensor else None
        return chunked_cross_entropy(hidden_ND, target_N, self.logits, [weight], part, weight_N)


def gpt_of(config: Config) -> GptShape:
    """The model section of a configuration, with the numbers of layers and experts, and the top-k, that the model has."""
    named, experts = gpt_shape(config.model.name_or_path), config.moe.num_experts
    assert isinstance(experts, int)
    layers = config.model.num_hidden_layers or named.layers
    return replace(named, layers=layers, experts=experts, top_k=config.moe.experts_per_token, seq_len=config.data.seq_len)


def build_megatron(
    config: Config, ranks: Ranks, topology: Topology | None = None, slots_by_memory: SlotsByMemory | None = None
) -> MegatronModel:
    """The model from scratch, the same on every rank but for the experts, of which each makes its own. Every rank must call it.

    Args:
        topology: see `engine_config`, as for `slots_by_memory`.

    Raises:
        UserError: megatron-core or the tokenizer is missing.
    """
    shape, tokenizer = gpt_of(config), tokenizer_of(config)
    vocabulary, dtype = vocabulary_of(config, tokenizer), computed_dtype(config.model.dtype, ranks.device)
    trained_dtype = adapter_dtype(dtype)
    non_moe_flops = 2.0 * shape.attention_parameters * config.micro_batch_size * config.data.seq_len / ranks.tp_size
    families = {Unit(layer): _family(config, shape, Unit(layer), dtype, ranks.device) for layer in range(shape.layers)}
    settings = engine_config(config, ranks, non_moe_flops, topology, slots_by_memory)
    routers = {
        unit: TopKRouter(
            RouterSite(
                unit=unit,
                hidden=shape.hidden,
                num_experts=shape.experts,
                top_k=shape.top_k,
                seed=config.seed,
                dtype=trained_dtype,
                device=ranks.device,
            )
        )
        for unit in families
    }
    engine: ExpertEngine
    layers: dict[Unit, Any]
    if config.fssdp.policy == MEGATRON_EP:
        engine, layers = _megatrons(shape, families, routers, settings, ranks, dtype)
    else:
        engine = Engine(dict(families), settings, ranks.groups)
        layers = {unit: MoeLayer(unit, router, engine.current) for unit, router in routers.items()}
    model = gpt_with(shape, vocabulary, layers, ranks, dtype=trained_dtype, seed=config.seed)
    prefetch_during_attention(model.decoder.layers, engine.current, layers, config.fssdp.prefetch)
    trained = outside_experts(model)
    cut = {name: parameter.partition_dim for name, parameter in trained.items() if getattr(parameter, "tensor_model_parallel", False)}
    if dtype != trained_dtype:
        trained = train_in_float32(model.embedding, trained, dtype)
    parts = TensorParts({name: trained[name] for name in cut}, cut, ranks.tensor) if ranks.tensor else None
    moe = MoeModel(model, engine, layers, {}, trained, parts=parts)
    digest = xxhash.xxh3_128_hexdigest(f"{shape} {vocabulary}".encode())
    return MegatronModel(model, GptHead(model, ranks.tensor), tokenizer, vocabulary, moe=moe, shape=shape, digest=digest)


def computed_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type in which the model computes. `auto`: bfloat16 on a GPU that has it, else float32, on every CPU."""
    return torch.float32 if name == "auto" and device.type == "cpu" else pick_dtype(name, device)


def _megatrons(
    shape: GptShape,
    families: dict[Unit, FullExperts],
    routers: dict[Unit, TopKRouter],
    settings: EngineConfig,
    ranks: Ranks,
    dtype: torch.dtype,
) -> tuple[ExpertEngine, dict[Unit, Any]]:
    """Megatron's own MoE layers, and the engine for them, with the weights that ours would begin with. Every rank must call it.

    Raises:
        UserError: the experts cannot be shared out equally.
    """
    with quietly():
        from hecate.apps.megatron.expert_parallel import build_layer, expert_parallel_config
        from hecate.apps.megatron.expert_parallel_engine import ExpertParallelEngine, check_equal_experts

        check_equal_experts(shape.experts, ranks.groups)
        config = expert_parallel_config(shape, dtype, dist.get_world_size(ranks.groups.experts))
        groups = process_groups(ranks.groups)
        current = CurrentPass()
        layers = {unit: build_layer(config, groups, unit.layer, current).to(ranks.device) for unit in families}
    for unit, router in routers.items():
        layers[unit].router.weight.data = router.weight.detach()
    return ExpertParallelEngine(families, settings, ranks.groups, layers, current), layers


def gpt_with(shape: GptShape, vocabulary: int, layers: Mapping[Unit, nn.Module], ranks: Ranks, *, dtype: torch.dtype, seed: int) -> Any:
    """A GPTModel whose FFNs are `layers`, on this rank's device. Every rank must call it.

    Each rank draws all weights and keeps its parts, so what the model begins with does not depend on their number.
    """
    parallel: dict[str, Any] = {}
    if ranks.tensor is not None:
        prepare_sharded_layers()
        parallel = {"tensor_model_parallel_size": ranks.tp_size, "sequence_parallel": True}
    ours = all(isinstance(layer, MoeLayer) for layer in layers.values())
    with quietly():
        model = build_gpt(
            shape,
            vocabulary,
            transformer_config(shape, dtype, **parallel),
            ModuleSpec(module=MoeMlp, params={"layers": layers, "sequences_first": ours}),
            process_groups(ranks.groups, ranks.tensor),
            seed=seed,
        )
    model.rotary_pos_emb.inv_freq = model.rotary_pos_emb.inv_freq.to(ranks.device)
    return model.to(ranks.device)


def outside_experts(model: nn.Module) -> dict[str, Any]:
    """The model's parameters beside those of experts and routers, by their names in it."""
    return {name: parameter for name, parameter in model.named_parameters() if ".mlp." not in name}


def _family(config: Config, shape: GptShape, unit: Unit, dtype: torch.dtype, device: torch.device) -> FullExperts:
    ffn, seed = FfnShape(shape.hidden, shape.ffn, "silu"), config.seed
    return FullExperts(
        Site(unit, shape.experts, ffn, seed, adapter_dtype(dtype), dtype, device, config.kernels), _initial(shape, unit, seed)
    )


def _initial(shape: GptShape, unit: Unit, seed: int) -> Callable[[int], Tensor]:
    """Initial weights of an expert, drawn like those of Megatron's layers: normal, and narrower where the output is added to the stream."""
    size = shape.hidden * shape.ffn
    stds = {"gate_proj": INIT_STD, "up_proj": INIT_STD, "down_proj": INIT_STD / math.sqrt(2 * shape.layers)}

    def initial(expert: int) -> Tensor:
        parts = []
        for name, std in stds.items():
            random = generator(seed, "expert", str(unit), expert, name)
            parts.append(torch.randn(size, generator=random, dtype=torch.float64) * std)
        return torch.cat(parts)

    return initial
