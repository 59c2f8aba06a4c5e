from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hecate.errors import UserError
from hecate.model.gated_ffn import decoder_layers, find_gated_ffns
from tests.hecate.model.tiny import tiny

FOUND = {"llama": "silu", "mistral": "silu", "qwen2": "silu", "qwen3": "silu", "gemma": "gelu_tanh", "gemma2": "gelu_tanh"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("model_type", FOUND)
def test_ffns_are_found(model_type: str, dtype: torch.dtype) -> None:
    model = tiny(model_type, dtype)
    ffns = find_gated_ffns(model)
    assert [ffn.layer for ffn in ffns] == [0, 1, 2]
    for ffn in ffns:
        assert ffn.path == f"model.layers.{ffn.layer}.mlp"
        mlp = model.model.layers[ffn.layer].mlp
        assert ffn.base(model).gate_FD is mlp.gate_proj.weight
        assert ffn.base(model).up_FD is mlp.up_proj.weight
        assert ffn.base(model).down_DF is mlp.down_proj.weight
        assert ffn.shape.activation == FOUND[model_type]
        assert ffn.projection_names == {name: name for name in ("gate_proj", "up_proj", "down_proj")}


class OddFfn(nn.Module):
    """Named and ordered otherwise; and as wide as its input, so that shapes tell nothing either."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w2 = nn.Linear(width, width, bias=False)
        self.w3 = nn.Linear(width, width, bias=False)
        self.w1 = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w3(F.gelu(self.w2(x)) * self.w1(x))


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(layers)


class Layer(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def test_an_oddly_named_ffn_is_found_by_what_it_does() -> None:
    model = Stack(Layer(ff=OddFfn(8)), Layer(ff=OddFfn(8))).double()
    ffns = find_gated_ffns(model)
    assert [ffn.path for ffn in ffns] == ["blocks.0.ff", "blocks.1.ff"]
    for layer, ffn in zip(model.blocks, ffns, strict=True):
        assert isinstance(layer.ff, OddFfn)
        assert ffn.base(model).gate_FD is layer.ff.w2.weight
        assert ffn.base(model).up_FD is layer.ff.w1.weight
        assert ffn.base(model).down_DF is layer.ff.w3.weight
        assert ffn.shape.activation == "gelu"
        assert ffn.projection_names == {"gate_proj": "w2", "up_proj": "w1", "down_proj": "w3"}


class Unknown(OddFfn):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w3(torch.relu(self.w2(x)) * self.w1(x))


class Needy(OddFfn):
    def forward(self, x: torch.Tensor, more: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x + more


class Pair(OddFfn):
    def forward(self, x: torch.Tensor) -> Any:
        return x, x


def narrow() -> nn.Module:
    ffn = OddFfn(8)
    ffn.w1 = nn.Linear(8, 4, bias=False)
    return ffn


REFUSED = {
    "GPT-2": (lambda: tiny("gpt2", n_embd=16, n_layer=2, n_head=2), "transformer.h.0.*no gated FFN.*no module with three linear"),
    "Phi-3, fused projections": (lambda: tiny("phi3"), "model.layers.0.*no gated FFN.*fused"),
    "Mixtral, experts": (lambda: tiny("mixtral", num_local_experts=2), "model.layers.0.*no gated FFN.*expert projections"),
    "Llama with biases": (lambda: tiny("llama", mlp_bias=True), r"mlp \(LlamaMLP\): its linears have biases"),
    "Llama with ReLU": (lambda: tiny("llama", hidden_act="relu"), "does not compute.*any known activation"),
    "another function": (lambda: Stack(Layer(ff=Unknown(8))), r"ff \(Unknown\): it does not compute"),
    "two arguments": (lambda: Stack(Layer(ff=Needy(8))), "cannot be called.*TypeError"),
    "two results": (lambda: Stack(Layer(ff=Pair(8))), "does not return a tensor"),
    "other shapes": (lambda: Stack(Layer(ff=narrow())), "do not have the shapes"),
    "two in a layer": (lambda: Stack(Layer(one=OddFfn(8), two=OddFfn(8))), "2 gated FFNs"),
    "only some layers": (lambda: Stack(Layer(ff=OddFfn(8)), Layer(ff=Unknown(8))), "blocks.1 has no gated FFN"),
    "no layers": (lambda: nn.Linear(3, 3), "Linear: no list of equal decoder layers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_others_are_refused_with_the_reason(case: str) -> None:
    build, reason = REFUSED[case]
    with pytest.raises(UserError) as error:
        find_gated_ffns(build())
    text = str(error.value)
    assert re.search(reason, text, re.DOTALL), text
    assert "Traceback" not in text
    assert len(text.splitlines()) <= 8


def test_looking_draws_no_random_numbers() -> None:
    model = tiny("llama")
    state = torch.get_rng_state()
    find_gated_ffns(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_decoder_layers_are_the_longest_list() -> None:
    model = Stack(*(Layer(ff=OddFfn(2), parts=nn.ModuleList([nn.Identity(), nn.Identity()])) for _ in range(3)))
    name, layers = decoder_layers(model)
    assert (name, len(layers)) == ("blocks", 3)
