"""Private trainings of several sources' adapters at once, held to each adapter alone, clipped sample by sample with plain autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hecate.apps.federate.privacy.hidden_samples import HiddenSamples, Privacy
from hecate.data.batches import Batch
from hecate.errors import UserError
from hecate.experts.seeding import generator
from hecate.model.causal_head import LanguageModelHead
from hecate.model.moe_model import MoeModel
from hecate.optim.optimizer import ExpertOptimizer
from hecate.parallel.values.units import Unit
from hecate.report.events import StepResult
from hecate.train.extensions.separate_adapters import SeparateAdapters
from hecate.train.steps.step import StepBatches, StepRules, train_step
from tests.hecate.equivalence_cases import LEARNING_RATE, ROWS, WEIGHT_DECAY, Case, assert_groups_equal, initial_values, sharded, tiny_llama
from tests.hecate.separate_adapters import (
    SOURCES,
    TOLERANCE,
    first_sample,
    given_case,
    labels_of_source,
    mixed_batch,
    optimizer_of,
    samples_of,
)
from tests.plain_lora import PlainAdapter

NAMES = ("chain", "gcd", "bits")
CLIP = 0.1
"""clips some samples, and others not"""


def single_samples(step: int, empty_rows: range, idle: bool) -> list[Batch]:
    """A batch for each row, with the row's first sample alone."""
    batch = mixed_batch(step, 0, empty_rows, idle)
    return [first_sample(batch, row) for row in range(ROWS)]


def samples_of_source(batches: list[Batch]) -> list[int]:
    return [len(samples_of(batches, source)) for source in range(SOURCES)]


def private_step(
    moe: MoeModel,
    head: LanguageModelHead,
    optimizer: ExpertOptimizer,
    batches: list[Batch],
    step: int,
    privacy: Privacy | None,
    own: slice = slice(None),
) -> StepResult:
    """A training step of all `batches`, of which this rank computes its own."""
    return train_step(
        moe,
        head,
        optimizer,
        StepBatches(number=step, micro_batches=batches[own], num_labels=sum(labels_of_source(batches))),
        StepRules(aux_coef=0.0, max_grad_norm=None),
        [
            SeparateAdapters(labels_of_source(batches)),
            *([] if privacy is None else [HiddenSamples(privacy, moe.engine.shards, samples_of_source(batches), step)]),
        ],
    )


def plain_of(case: Case, moe: MoeModel, source: int) -> PlainAdapter:
    """A source's adapter alone, with the values that its experts begin with."""
    values = []
    for unit in moe.layers:
        family = moe.engine.shards.families[unit]
        chunk = initial_values(unit, source, family.layout().trainable_numel).to(case.dtype)
        pairs = family.pair_source.stacked(chunk[None], torch.tensor([source]))
        of_layer = {f"{name}.A": pair.a_SrI[0].clone() for name, pair in pairs.items()}
        values.append(of_layer | {f"{name}.B": pair.b_SOr[0].clone() for name, pair in pairs.items()})
    plain = PlainAdapter(tiny_llama(case.dtype), values, case.lora.scale, LEARNING_RATE, WEIGHT_DECAY)
    if case.pairs == "fixed_a":
        for layer in plain.layers:
            for name in [name for name in layer if name.endswith(".A")]:
                layer.pop(name).requires_grad_(False)
        plain.parameters = [parameter for layer in plain.layers for parameter in layer.values()]
        plain.optimizer = torch.optim.AdamW(plain.parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    return plain


def plain_private_step(plain: PlainAdapter, samples: list[tuple[Tensor, Tensor]], privacy: Privacy, source: int, step: int) -> list[bool]:
    """One step with the gradient of each sample computed and clipped by itself; for each sample, whether it was clipped.

    The mean is taken before the backward pass: parts of transformers' Llama compute in float32, and round another gradient otherwise.
    """
    if not samples:
        return []
    limit = privacy.clip / len(samples)
    total = [torch.zeros_like(parameter) for parameter in plain.parameters]
    clipped = []
    for ids, targets in samples:
        loss = F.cross_entropy(plain.model(input_ids=ids[None], use_cache=False).logits[0], targets, ignore_index=-100) / len(samples)
        gradients = torch.autograd.grad(loss, plain.parameters)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        clipped.append(bool(norm > limit))
        for whole, gradient in zip(total, gradients, strict=True):
            whole += gradient * min(1.0, limit / float(norm))
    for number, layer in enumerate(plain.layers):
        drawn = torch.randn(
            sum(parameter.numel() for parameter in layer.values()),
            generator=generator(privacy.seed, "privacy", privacy.sources[source], step, str(Unit(number))),
            dtype=torch.float64,
        )
        parts = drawn.split([parameter.numel() for parameter in layer.values()])
        for parameter, part in zip(layer.values(), parts, strict=True):
            whole = total[next(i for i, other in enumerate(plain.parameters) if other is parameter)]
            whole += part.view_as(parameter) * privacy.noise * limit
    for parameter, whole in zip(plain.parameters, total, strict=True):
        parameter.grad = whole
    plain.optimizer.step()
    plain.optimizer.zero_grad()
    return clipped


def check_private(rank: int, world: int, case: Case) -> None:
    """Raises AssertionError where an adapter differs from the one that is trained alone."""
    moe, head = sharded(case, world)
    optimizer = optimizer_of(moe, case)
    privacy = Privacy(clip=CLIP, noise=0.3, seed=7, sources=NAMES)
    alone = [plain_of(case, moe, source) for source in range(SOURCES)]
    clipped: list[bool] = []
    empty = range((world - 1) * ROWS // world, ROWS) if case.scenario == "empty rank" and world > 1 else range(0)
    for step in range(case.steps):
        batches = single_samples(step, empty, case.scenario == "idle experts")
        private_step(moe, head, optimizer, batches, step, privacy, slice(rank * ROWS // world, (rank + 1) * ROWS // world))
        for source, plain in enumerate(alone):
            clipped += plain_private_step(plain, samples_of(batches, source), privacy, source, step)
        for (unit, expert), chunk in moe.engine.shards.named_parameters().items():
            expected = torch.cat([parameter.detach().flatten() for parameter in alone[expert].layers[unit.layer].values()])
            error = float((chunk.detach() - expected).abs().max())
            assert error <= TOLERANCE, f"step {step}, layer {unit} of adapter {expert}: off by {error:.2e}"
    assert_groups_equal(moe, optimizer)
    assert any(clipped), "no sample was clipped"
    assert not all(clipped) or case.scenario == "empty rank", "every sample was clipped"


def check_all_private(rank: int, world: int, cases: list[Case]) -> None:
    for case in cases:
        try:
            check_private(rank, world, case)
        except BaseException as error:
            raise AssertionError(f"{case}: {error}") from error
    if world > 1:
        check_refusals(rank, world)


def check_refusals(rank: int, world: int) -> None:
    """Tokens that leave their rank, and gradients that are reduced in each micro-step."""
    for case in (given_case("static_ep", "balanced"), given_case("full", "balanced", rematerialize=True)):
        moe, head = sharded(case, world)
        own = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
        with pytest.raises(UserError, match=r"set fssdp\.policy=full"):
            private_step(moe, head, optimizer_of(moe, case), single_samples(0, range(0), False), 0, Privacy(clip=1.0, sources=NAMES), own)
