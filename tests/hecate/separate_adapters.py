"""Trainings of several sources' adapters at once, held to each adapter trained alone."""

from __future__ import annotations

from dataclasses import replace

import torch

from hecate.config import RouterConfig
from hecate.data.batches import Batch
from hecate.model.moe_model import MoeModel
from hecate.optim.adamw import AdamW
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables
from hecate.parallel.values.units import FFN, Unit
from hecate.report.events import StepResult
from hecate.train.extensions.separate_adapters import SeparateAdapters
from hecate.train.steps.step import StepBatches, StepRules, train_step
from tests.hecate.equivalence_cases import (
    LEARNING_RATE,
    MICRO_STEPS,
    ROWS,
    WEIGHT_DECAY,
    Case,
    micro_batch,
    rows_of,
    sharded,
    tiny_llama,
)
from tests.hecate.linear_cases import LinearCase, sharded_linears, tiny_with_biases, values_of
from tests.plain_lora import PlainAdapter

TOLERANCE = 1e-10
SOURCES = 3
FFN_ONLY = ("gate_proj", "up_proj", "down_proj")
GIVEN = RouterConfig(input="given")
MAX_NORM = 0.05
"""clips some adapters in some steps, and others not"""


def given_case(policy: str, scenario: str, **changes: object) -> Case:
    return replace(Case(policy, SOURCES, 1, scenario, router=GIVEN, targets=FFN_ONLY), **changes)  # type: ignore[arg-type]


def mixed_batch(step: int, micro: int, empty_rows: range, idle: bool) -> Batch:
    """As `micro_batch`, whose packed samples now come from several sources; with `idle`, the last one has samples in odd steps only."""
    batch = micro_batch(step, micro, empty_rows)
    used = SOURCES - 1 if idle and step % 2 == 0 else SOURCES
    rows = torch.arange(ROWS)[:, None]
    source = (rows * (rows % 3) + batch.segment_ids + micro) % used
    return replace(batch, task=torch.where(batch.segment_ids > 0, source, -1))


def first_sample(batch: Batch, row: int) -> Batch:
    """A batch of one row, with the row's first sample alone."""
    one = Batch(**{name: part[row : row + 1] for name in batch.__dataclass_fields__ if (part := getattr(batch, name)) is not None})
    padding = one.segment_ids != 1
    return replace(
        one,
        targets=one.targets.masked_fill(padding, -100),
        position_ids=one.position_ids.masked_fill(padding, 0),
        segment_ids=one.segment_ids.masked_fill(padding, 0),
        task=one.task.masked_fill(padding, -1),
    )


def samples_of(batches: list[Batch], source: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, targets) of each of a source's samples."""
    samples = []
    for batch in batches:
        for row in range(len(batch.input_ids)):
            for segment in range(1, int(batch.segment_ids[row].max()) + 1):
                here = batch.segment_ids[row] == segment
                if bool((batch.task[row, here] == source).all()):
                    samples.append((batch.input_ids[row, here], batch.targets[row, here]))
    return samples


def labels_of_source(batches: list[Batch]) -> list[int]:
    return [sum(int((b.targets[b.task == source] != -100).sum()) for b in batches) for source in range(SOURCES)]


def optimizer_of(moe: MoeModel, case: Case | LinearCase) -> ExpertOptimizer:
    return ExpertOptimizer(Trainables.of(moe), AdamW(weight_decay=WEIGHT_DECAY), LearningRate(LEARNING_RATE), torch.device("cpu"))


def one_step(
    moe: MoeModel, head: object, optimizer: ExpertOptimizer, batches: list[Batch], step: int, rank: int = 0, world: int = 1
) -> StepResult:
    return train_step(
        moe,
        head,
        optimizer,
        StepBatches(
            number=step,
            micro_batches=[rows_of(batch, rank, world) for batch in batches] if world > 1 else batches,
            num_labels=sum(labels_of_source(batches)),
        ),
        StepRules(aux_coef=0.0, max_grad_norm=MAX_NORM),
        [SeparateAdapters(labels_of_source(batches))],
    )


def plain_adapters(case: Case, moe: MoeModel) -> list[PlainAdapter]:
    """Each source's adapter alone, with the values that `sharded` gives its expert."""
    specs = moe.engine.shards.families[Unit(0)].layout().trainable
    adapters = []
    for expert in range(SOURCES):
        values = []
        for layer in range(2):
            random = torch.Generator().manual_seed(1000 + 50 * layer + expert)
            flat = torch.randn(sum(s.numel for s in specs), generator=random, dtype=torch.float64) * 0.2
            parts = flat.split([s.numel for s in specs])
            values.append({s.name: part.view(s.shape) for s, part in zip(specs, parts, strict=True)})
        adapters.append(PlainAdapter(tiny_llama(case.dtype), values, 0.7, LEARNING_RATE, WEIGHT_DECAY))
    return adapters


def plain_linear_adapters(case: LinearCase, moe: MoeModel) -> list[PlainAdapter]:
    """As `plain_adapters`, of experts over all linears."""
    adapters = []
    for expert in range(SOURCES):
        values: list[dict[str, torch.Tensor]] = [{}, {}]
        for unit in moe.layers:
            a, b = (part.to(case.dtype) for part in values_of(case, moe, unit, expert))
            name = unit.place.rpartition(".")[2]
            values[unit.layer] |= {f"{name}.A": a, f"{name}.B": b}
        places = [unit.place for unit in moe.layers if unit.layer == 0]
        model = tiny_with_biases(case.dtype)
        adapters.append(PlainAdapter(model, values, case.lora.scale, LEARNING_RATE, WEIGHT_DECAY, places))
    return adapters


def given_linear_case(policy: str, scenario: str, **changes: object) -> LinearCase:
    return replace(LinearCase(policy, scenario, (SOURCES, SOURCES), 1, router=GIVEN), **changes)  # type: ignore[arg-type]


def flat_of(adapter: PlainAdapter, unit: Unit) -> torch.Tensor:
    """What of the adapter stands in a unit, as its chunk holds it."""
    if unit.place == FFN:
        return adapter.flat(unit.layer)
    name = unit.place.rpartition(".")[2]
    return torch.cat([adapter.layers[unit.layer][f"{name}.{matrix}"].detach().flatten() for matrix in "AB"])


def check_separate(rank: int, world: int, case: Case | LinearCase) -> None:
    """Raises AssertionError where an adapter differs from the one that is trained alone."""
    if isinstance(case, LinearCase):
        moe, head = sharded_linears(case, world)
        alone = plain_linear_adapters(case, moe)
    else:
        moe, head = sharded(case, world)
        alone = plain_adapters(case, moe)
    assert moe.separate_experts == SOURCES
    optimizer = optimizer_of(moe, case)
    empty_rows = range((world - 1) * ROWS // world, ROWS) if case.scenario == "empty rank" and world > 1 else range(0)
    clipped: list[bool] = []
    for step in range(case.steps):
        batches = [mixed_batch(step, micro, empty_rows, case.scenario == "idle experts") for micro in range(MICRO_STEPS)]
        result = one_step(moe, head, optimizer, batches, step, rank, world)
        single = [adapter.step(samples_of(batches, source), MAX_NORM) for source, adapter in enumerate(alone)]
        active = [loss for loss, _ in single if loss]
        assert abs(result.loss - sum(active) / len(active)) <= TOLERANCE, f"step {step}: loss {result.loss}"
        for (_, norm), got in zip(single, optimizer.last_norms, strict=True):
            assert abs(norm - got) <= TOLERANCE * max(1, norm), f"step {step}: norms {optimizer.last_norms} against {single}"
            clipped.append(norm > MAX_NORM)
        for unit in moe.layers:
            for source in range(SOURCES):
                assert int(result.loads[unit][source].sum()) == sum(len(ids) for ids, _ in samples_of(batches, source))
        for (unit, expert), chunk in moe.engine.shards.named_parameters().items():
            error = float((chunk.detach() - flat_of(alone[expert], unit)).abs().max())
            assert error <= TOLERANCE, f"step {step}, layer {unit} of adapter {expert}: off by {error:.2e}"
        assert case.scenario != "idle experts" or step % 2 or len(active) < SOURCES, "no adapter was idle"
    assert any(clipped), "no adapter's gradient was clipped"
    assert not all(clipped) or case.scenario == "empty rank", "every adapter's gradient was clipped"


def check_all_separate(rank: int, world: int, cases: list[Case | LinearCase]) -> None:
    for case in cases:
        try:
            check_separate(rank, world, case)
        except BaseException as error:
            raise AssertionError(f"{case}: {error}") from error
