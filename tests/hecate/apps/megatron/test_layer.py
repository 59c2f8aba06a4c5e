"""What stands in a Megatron layer, worked out by hand, and how its own layers are set up on machines without CUDA."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hecate.apps.megatron.imports import quietly
from hecate.config.gpt_shape import GptShape
from hecate.errors import UserError
from hecate.model.layers import attention_kernels
from hecate.model.layers.attention_kernels import takes_fewer_keys
from hecate.parallel.values.units import Unit
from testing.byte_tokenizer import build_byte_tokenizer
from tests.hecate.apps.megatron.making import require_megatron

require_megatron()
with quietly():
    from hecate.apps.megatron.expert_parallel_engine import check_equal_experts
    from hecate.apps.megatron.export import mixtral_config_of, mixtral_weights
    from hecate.apps.megatron.gpt import transformer_config
    from hecate.apps.megatron.layer import AnyDeviceRotary, MoeMlp, TorchAttention, TorchNorm
    from hecate.apps.megatron.tensor_parallel import prepare_sharded_layers
    from hecate.apps.megatron.without_cuda import answer_for_cuda

SHAPE = GptShape(layers=2, hidden=3, heads=4, key_value_heads=2, head_dim=2, ffn=6, experts=5, top_k=3, seq_len=32)
with quietly():
    CONFIG = transformer_config(SHAPE, torch.float64)


def attended(mask: Tensor | None) -> list[list[float]]:
    """Two positions, two heads that share keys 1, 0 and values 1, 5. The queries of head 0 are ln 3, those of head 1 are 0."""
    query = torch.tensor([[[[np.log(3)], [0.0]]]] * 2)
    key, value = torch.tensor([[[[1.0]]], [[[0.0]]]]), torch.tensor([[[[1.0]]], [[[5.0]]]])
    y_SBD = TorchAttention(CONFIG, softmax_scale=1.0)(query.float(), key, value, mask)
    assert y_SBD.shape == (2, 1, 2)
    rows: list[list[float]] = y_SBD[:, 0].tolist()
    return rows


def test_attention_without_a_mask_is_causal() -> None:
    """Position 0 sees itself alone. Position 1 weighs 3 : 1 in head 0, (3 + 5) / 4 = 2; and 1 : 1 in head 1."""
    assert attended(None) == [pytest.approx([1.0, 1.0]), pytest.approx([2.0, 3.0])]


def test_a_mask_is_true_where_a_query_attends() -> None:
    """Position 0 sees both, position 1 itself alone."""
    assert attended(torch.tensor([[[[True, True], [False, True]]]])) == [pytest.approx([2.0, 3.0]), pytest.approx([5.0, 5.0])]


@pytest.mark.parametrize("masked", [False, True])
def test_keys_with_a_copy_for_each_query_give_the_same_attention(monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    """Six heads of queries over two of keys, forward and backward, where torch has no kernel for fewer keys and where it has."""
    random = torch.Generator().manual_seed(5)
    given = [torch.randn(7, 3, heads, 4, generator=random, dtype=torch.float64) for heads in (6, 2, 2)]
    weight = torch.randn(7, 3, 24, generator=random, dtype=torch.float64)
    mask = torch.randint(0, 2, (3, 1, 7, 7), generator=random).bool() | torch.eye(7, dtype=torch.bool) if masked else None

    def attention() -> list[Tensor]:
        query, key, value = (tensor.clone().requires_grad_() for tensor in given)
        y_SBD = TorchAttention(CONFIG)(query, key, value, mask)
        (y_SBD * weight).sum().backward()
        return [y_SBD, *(tensor.grad for tensor in (query, key, value) if tensor.grad is not None)]

    wanted = attention()
    asked: list[tuple[int, bool]] = []
    plain = F.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, *rest: Tensor, enable_gqa: bool, **named: Any) -> Tensor:
        asked.append((key.shape[1], enable_gqa))
        return plain(query, key, *rest, enable_gqa=enable_gqa, **named)

    monkeypatch.setattr(attention_kernels, "takes_fewer_keys", lambda *_, **__: False)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    for got, one in zip(attention(), wanted, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-13, atol=1e-14)
    assert asked == [(6, False)]


@pytest.mark.parametrize(
    ("device", "dtype", "masked", "takes"),
    [
        ("cuda", torch.bfloat16, False, True),
        ("cuda", torch.bfloat16, True, False),
        ("cuda", torch.float32, False, False),
        ("cuda", torch.float64, True, False),
        ("cpu", torch.float32, True, True),
    ],
)
def test_flash_attention_alone_takes_fewer_keys_on_a_gpu(device: str, dtype: torch.dtype, masked: bool, takes: bool) -> None:
    assert takes_fewer_keys(device, dtype, masked=masked) is takes


class Numbering(nn.Module):
    """Adds to each token its number, in the order of its dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(x[..., 0].numel()).view(x.shape[:2])[..., None]


class Megatrons(Numbering):
    """Returns a bias, too."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


@pytest.mark.parametrize(
    ("layer", "first", "numbers"),
    [(Numbering(), True, [[0, 3], [1, 4], [2, 5]]), (Megatrons(), False, [[0, 1], [2, 3], [4, 5]])],
)
def test_our_layers_number_tokens_by_sequence_and_megatrons_by_position(layer: nn.Module, first: bool, numbers: list[list[int]]) -> None:
    """Three positions of two sequences, in the MoE layer of the second transformer layer."""
    mlp = MoeMlp(CONFIG, layers={Unit(0): nn.Identity(), Unit(1): layer}, sequences_first=first)
    mlp.set_layer_number(2)
    y_SBD, bias = mlp(torch.zeros(3, 2, 4))
    assert bias is None
    assert y_SBD[..., 0].tolist() == numbers


def test_a_norm_is_kept_in_the_models_type() -> None:
    norm: Any = TorchNorm(CONFIG, 2, 0.0)
    assert norm.weight.dtype == torch.float64
    assert norm(torch.tensor([3.0, 4.0], dtype=torch.float64)).tolist() == pytest.approx([3 / 12.5**0.5, 4 / 12.5**0.5])


def test_rotary_angles_on_any_device() -> None:
    """Of heads of 4: position times 1 and times 1 / sqrt(10000), both halves alike."""
    rotary = AnyDeviceRotary(4, rotary_percent=1.0, rotary_base=10_000, use_cpu_initialization=True, cp_group=None)
    assert rotary.get_emb(3)[:, 0, 0].tolist() == [pytest.approx([p, p / 100, p, p / 100]) for p in range(3)]


def test_queries_keys_and_values_lie_group_by_group() -> None:
    """Two groups of two queries, a key and a value, heads of 2 rows: rows 0..7 and 8..15."""
    qkv = torch.arange(16.0)[:, None].expand(16, 3)
    given = {
        "embedding.word_embeddings.weight": torch.zeros(7, 3),
        "decoder.final_layernorm.weight": torch.ones(3),
        "decoder.layers.1.input_layernorm.weight": torch.ones(3) * 2,
        "decoder.layers.1.pre_mlp_layernorm.weight": torch.ones(3) * 3,
        "decoder.layers.1.self_attention.linear_proj.weight": torch.ones(3, 8),
        "decoder.layers.1.self_attention.linear_qkv.weight": qkv,
    }
    found = mixtral_weights(SHAPE, given)
    rows = {part: found.pop(f"model.layers.1.self_attn.{part}_proj.weight") for part in "qkv"}
    assert {part: tensor[:, 0].tolist() for part, tensor in rows.items()} == {
        "q": [0, 1, 2, 3, 8, 9, 10, 11],
        "k": [4, 5, 12, 13],
        "v": [6, 7, 14, 15],
    }
    assert {name: (tuple(tensor.shape), float(tensor.max())) for name, tensor in found.items()} == {
        "model.embed_tokens.weight": ((7, 3), 0.0),
        "model.norm.weight": ((3,), 1.0),
        "model.layers.1.input_layernorm.weight": ((3,), 2.0),
        "model.layers.1.post_attention_layernorm.weight": ((3,), 3.0),
        "model.layers.1.self_attn.o_proj.weight": ((3, 8), 1.0),
    }


def test_the_configuration_that_is_left_has_the_models_sizes() -> None:
    config = mixtral_config_of(SHAPE, build_byte_tokenizer(), 0.25)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (258, 3, 6, 2)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 2)
    assert (config.num_local_experts, config.num_experts_per_tok, config.router_aux_loss_coef) == (5, 3, 0.25)
    assert (config.max_position_embeddings, config.tie_word_embeddings, config.eos_token_id) == (32, True, 257)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


def test_experts_that_cannot_be_shared_out_equally_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda _group: 3)
    groups: Any = type("Groups", (), {"experts": None})()
    check_equal_experts(6, groups)
    with pytest.raises(UserError, match=r"equally many experts on each rank, but 5 experts are on 3 ranks\n  take a number"):
        check_equal_experts(5, groups)


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, it is asked")
def test_megatron_is_told_of_a_device_and_torch_stays_as_it_is() -> None:
    for _ in range(2):
        answer_for_cuda()
    theirs: Any = import_module("megatron.core.transformer.moe.token_dispatcher")
    assert theirs.torch.cuda.current_device() == torch.device("cpu")
    stream = theirs.torch.cuda.current_stream()
    stream.record_event().synchronize()
    with theirs.torch.cuda.stream(stream):
        assert theirs.torch.arange is torch.arange
    assert isinstance(theirs.maybe_move_tensor_to_cpu(torch.ones(2), as_numpy=True), np.ndarray)
    assert torch.is_tensor(theirs.maybe_move_tensor_to_cpu(torch.ones(2)))
    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.current_device()


def test_megatrons_sharded_layers_draw_nothing_and_warn_of_nothing() -> None:
    for _ in range(2):
        prepare_sharded_layers()
    random: Any = import_module("megatron.core.tensor_parallel.random")
    before = torch.get_rng_state()
    with random.get_cuda_rng_tracker().fork("model-parallel-rng"):
        torch.rand(1)
    torch.set_rng_state(before)
    assert import_module("megatron.core.parallel_state").get_global_memory_buffer() is not None
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for module in ("layers", "mappings"):
                theirs: Any = import_module(f"megatron.core.tensor_parallel.{module}")
                gathered, reduced = torch.empty(2), torch.empty(2)
                theirs.dist_all_gather_func(gathered, torch.tensor([1.0, 2.0]))
                theirs.dist_reduce_scatter_func(reduced, torch.tensor([3.0, 4.0]))
                assert (gathered.tolist(), reduced.tolist()) == ([1.0, 2.0], [3.0, 4.0])
    finally:
        dist.destroy_process_group()
