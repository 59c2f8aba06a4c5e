"""Differential privacy in a training step: the clip of each sample, the noise, and the ordinary step where there is neither."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from hecate.apps.federate.privacy.hidden_samples import Privacy, SampleShares, add_noise
from hecate.train.steps import passes
from testing.ranks import run_ranks
from tests.hecate.apps.federate.privacy.private_adapters import NAMES, check_all_private, check_private, private_step, single_samples
from tests.hecate.equivalence_cases import sharded
from tests.hecate.separate_adapters import SOURCES, given_case, optimizer_of

SCENARIOS = ("balanced", "idle experts", "empty rank")


@pytest.mark.parametrize("pairs", ["plain", "fixed_a"])
def test_on_one_rank_a_step_is_that_of_gradients_clipped_one_by_one(one_rank: dist.ProcessGroup, pairs: str) -> None:
    check_private(0, 1, given_case("full", "idle experts", pairs=pairs, steps=3))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_on_several_ranks(world: int) -> None:
    cases = [given_case("full", scenario, pairs=pairs) for scenario in SCENARIOS for pairs in ("plain", "fixed_a")]
    run_ranks(world, check_all_private, [*cases, given_case("full", "idle experts", checkpointing=True)], timeout=480)


@pytest.mark.slow
def test_in_sharding_groups() -> None:
    run_ranks(4, check_all_private, [given_case("full", "idle experts", shard_size=2)], timeout=480)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_noise_and_clip_a_step_is_the_ordinary_one_to_the_bit(one_rank: dist.ProcessGroup, dtype: torch.dtype) -> None:
    """Where the samples have equally many label tokens, so that the mean of their means is the mean over all tokens."""
    states, losses = [], []
    for privacy in (None, Privacy(clip=math.inf, sources=NAMES)):
        case = given_case("full", "balanced", dtype=dtype)
        moe, head = sharded(case, 1)
        optimizer = optimizer_of(moe, case)
        for step in range(3):
            drawn = [*single_samples(3 * step, range(0), False), *single_samples(3 * step + 1, range(0), False)]
            batches = [batch for batch in drawn if len(batch.layout.labelled) == 2]
            assert len({int(batch.task.max()) for batch in batches}) > 1, "samples of one source only"
            losses.append(private_step(moe, head, optimizer, batches, step, privacy).loss)
        states.append({name: tensor.clone() for name, tensor in optimizer.state_tensors().items()})
    assert losses[:3] == losses[3:]
    assert any(name.endswith("exp_avg") for name in states[0])
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_the_noise_has_its_variance_and_no_two_steps_or_sources_share_it(one_rank: dist.ProcessGroup) -> None:
    """100,000 draws and more: their standard deviation has a relative standard error of 0.2 %."""
    moe, _ = sharded(given_case("full", "balanced"), 1)
    parameters = moe.engine.shards.named_parameters()
    privacy = Privacy(clip=2.0, noise=0.7, seed=3, sources=NAMES)
    samples, drawn = [4, 1, 7], [list[torch.Tensor]() for _ in range(SOURCES)]
    for step in range(150):
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        add_noise(moe.engine.shards, privacy, samples, step)
        for (_, expert), parameter in parameters.items():
            assert parameter.grad is not None
            drawn[expert].append((parameter.grad - 1) * samples[expert] / (0.7 * 2.0))
    flat = torch.stack([torch.cat(parts) for parts in drawn])
    assert flat.shape[1] >= 100_000
    assert float((flat.std(1) - 1).abs().max()) < 0.012
    assert float(flat.mean(1).abs().max()) < 0.016
    assert len(flat.unique()) == flat.numel(), "the same numbers were drawn twice"
    again = Privacy(clip=2.0, noise=0.7, seed=3, sources=NAMES[::-1])
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    add_noise(moe.engine.shards, again, samples, 0)
    of_last = [
        (parameter.grad - 1) * samples[2] for (_, expert), parameter in parameters.items() if expert == 2 and parameter.grad is not None
    ]
    torch.testing.assert_close(torch.cat(of_last) / (0.7 * 2.0), torch.cat(drawn[0][: len(of_last)]))


def test_an_idle_source_gets_no_noise(one_rank: dist.ProcessGroup) -> None:
    """Its expert has no gradient, and is left untouched."""
    moe, _ = sharded(given_case("full", "balanced"), 1)
    add_noise(moe.engine.shards, Privacy(clip=1.0, noise=1.0, sources=NAMES), [1, 1, 0], 0)
    assert all(parameter.grad is None for parameter in moe.engine.shards.named_parameters().values())


def test_a_gradient_that_is_not_finite_is_of_its_own_adapter_alone(one_rank: dist.ProcessGroup) -> None:
    """The others are stepped as they are where that source has no samples."""
    real, states = passes.forward_loss, []
    for poisoned in (True, False):
        moe, head = sharded(given_case("full", "balanced"), 1)
        batches = single_samples(0, range(0), False)
        bad = [batch for batch in batches if int(batch.task.max()) == 2]
        assert 0 < len(bad) < len(batches)

        def forward_loss(head: Any, batch: Any, *given: Any, bad: list[Any] = bad) -> torch.Tensor:
            loss = real(head, batch, *given)
            if any(batch is one for one in bad):
                loss.register_hook(lambda gradient: gradient * math.nan)
            return loss

        with mock.patch.object(passes, "forward_loss", forward_loss):
            chosen = batches if poisoned else [batch for batch in batches if int(batch.task.max()) != 2]
            private_step(moe, head, optimizer_of(moe, given_case("full", "balanced")), chosen, 0, Privacy(clip=0.1, sources=NAMES))
        states.append({name: parameter.detach().clone() for name, parameter in moe.engine.shards.named_parameters().items()})
    assert states[0].keys() == states[1].keys()
    for name, parameter in states[0].items():
        assert torch.equal(parameter, states[1][name]), name


def test_a_sample_counts_by_its_source_and_a_rank_without_one_by_none() -> None:
    batch = next(batch for batch in single_samples(0, range(0), False) if int(batch.task.max()) == 2)
    shares = SampleShares.of(Privacy(clip=3.0), [1, 2, 4], torch.device("cpu"))
    assert float(shares.limit(batch)) == 0.75
    assert float(shares.weight_of_source(batch)[2]) == 1 / (4 * len(batch.layout.labelled))
    empty = replace(batch, task=torch.full_like(batch.task, -1), targets=torch.full_like(batch.targets, -100))
    assert bool(torch.isfinite(shares.limit(empty)))
    assert bool(torch.isfinite(shares.weight_of_source(empty)).all())
