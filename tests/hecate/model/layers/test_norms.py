"""Which norms torch's fused kernel replaces, and that a model with it computes what it computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hecate.model.files.load import load_model, resolve_model
from hecate.model.layers.norms import fuse_norms, rms_epsilon
from tests.hecate.model.tiny import tiny, token_ids


class Norm(nn.Module):
    """A norm as transformers writes them; subclasses change one thing each."""

    def __init__(self, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.any_name = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.any_name))

    def scaled(self, normed: Tensor) -> Tensor:
        return self.weight * normed


class OnePlusWeight(Norm):
    def scaled(self, normed: Tensor) -> Tensor:
        return (1 + self.weight) * normed


class OtherEpsilon(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 2 * self.any_name))


class Centered(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class Gated(Norm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x) if gate is None else super().forward(x) * gate


class WithBias(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(16))


class OfImages(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.conv2d(x, torch.ones(1)))


def loss_and_gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    ids = token_ids()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_an_rms_norm_is_known_by_what_it_computes() -> None:
    assert rms_epsilon(Norm(1e-5)) == 1e-5
    assert rms_epsilon(Norm(0.25)) == 0.25


@pytest.mark.parametrize("other", [OnePlusWeight, OtherEpsilon, Centered, Gated, WithBias, OfImages, nn.Identity, lambda: nn.LayerNorm(16)])
def test_another_module_is_none(other: Callable[[], nn.Module]) -> None:
    assert rms_epsilon(other()) is None


@pytest.mark.parametrize(("model_type", "norms"), [("llama", 7), ("qwen3", 13), ("olmo2", 13), ("mixtral", 7)])
def test_a_model_computes_with_fused_norms_what_it_computed(model_type: str, norms: int) -> None:
    """In float32, the widest type that transformers computes norms in: its loss, and the gradients of all weights under their old names."""
    plain, fused = tiny(model_type, torch.float32), tiny(model_type, torch.float32)
    for model in (plain, fused):
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.normal_(1, 0.3, generator=torch.Generator().manual_seed(len(name)))
    fuse_norms(fused, torch.float32)
    assert sum(type(module) is nn.RMSNorm for module in fused.modules()) == norms
    (loss, gradients), (wanted, wanted_gradients) = loss_and_gradients(fused), loss_and_gradients(plain)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize(("model_type", "dtype"), [("gemma2", torch.float32), ("starcoder2", torch.float32), ("llama", torch.float64)])
def test_other_norms_and_models_in_float64_are_left_alone(model_type: str, dtype: torch.dtype) -> None:
    model = tiny(model_type, dtype)
    before = [type(module) for module in model.modules()]
    fuse_norms(model, dtype)
    assert [type(module) for module in model.modules()] == before


def test_a_norm_whose_weight_has_another_type_is_left_alone() -> None:
    model = tiny("llama", torch.bfloat16)
    model.model.norm.float()
    fuse_norms(model, torch.bfloat16)
    assert type(model.model.norm) is not nn.RMSNorm
    assert type(model.model.layers[0].input_layernorm) is nn.RMSNorm


def test_a_model_on_the_cpu_keeps_its_norms(tmp_path: Path) -> None:
    tiny("llama", torch.float32).save_pretrained(tmp_path)
    model = load_model(resolve_model(str(tmp_path)), torch.float32, torch.device("cpu"))
    assert not any(type(module) is nn.RMSNorm for module in model.modules())
