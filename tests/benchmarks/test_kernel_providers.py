"""The layers that `benchmarks.kernels` times against ours compute the right results: small, in float32, on the CPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import kernel_providers
from benchmarks.kernel_cases import Inputs, LayerShape, errors, expected, make_inputs

SHARED = LayerShape("tiny", hidden=32, ffn=48, rank=8, experts=5, k=2, tokens=40)
OWN = dataclasses.replace(SHARED, k=3, shared_base=False)
CPU = torch.device("cpu")


def small(shape: LayerShape) -> Inputs:
    return make_inputs(shape, CPU, torch.float32)


@pytest.mark.parametrize(("provider", "shape"), [("stock_torch", SHARED), ("grouped_mm", SHARED), ("grouped_mm", OWN)])
def test_a_provider_gives_output_and_every_gradient_of_the_reference(provider: str, shape: LayerShape) -> None:
    inputs = small(shape)
    found = errors(getattr(kernel_providers, provider)(inputs, False).results(inputs.dy_TD), expected(inputs))
    assert set(found) == {"y", *inputs.leaves()}
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("shape", [SHARED, OWN])
def test_the_frozen_ffn_is_the_layer_without_pairs(shape: LayerShape) -> None:
    inputs = small(shape)
    for lora in inputs.loras.values():
        lora.b_SOr.detach().zero_()
    wanted = expected(inputs)
    y, (dx,) = kernel_providers.frozen_ffn(inputs, False).step(inputs.dy_TD)
    found = errors({"y": y.detach(), "x": dx}, wanted)
    assert max(found.values()) < 1e-5, found


def test_a_wrong_result_is_seen() -> None:
    wanted = expected(small(SHARED))
    spoilt = {name: value.clone() for name, value in wanted.items()}
    spoilt["x"][3] = 0.0
    spoilt["weight"][0, 0] = torch.nan
    spoilt["y"] = spoilt["y"][:-1]
    found = errors(spoilt, wanted)
    assert found["x"] > 0.02
    assert found["weight"] == found["y"] == float("inf")
    assert found["up_proj.A"] == 0.0


def test_inputs_are_the_same_each_time_and_weights_lead_with_the_largest() -> None:
    first, second = small(SHARED), small(SHARED)
    for name, leaf in first.leaves().items():
        torch.testing.assert_close(leaf, second.leaves()[name], rtol=0, atol=0)
    assert bool((first.weight_TK[:, 0] >= first.weight_TK[:, 1]).all())
    torch.testing.assert_close(first.weight_TK.sum(1), torch.ones(SHARED.tokens))
