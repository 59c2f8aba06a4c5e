"""Tensor parallelism and sharding groups against one rank: beginning, gradients, losses, checkpoints, the folder that is left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from safetensors.numpy import load_file
from torch import Tensor

from hecate.config import ConfigError
from hecate.errors import UserError
from hecate.model.sizes.run_shape import run_shape
from hecate.parallel.cluster.mesh import Mesh, make_mesh
from hecate.parallel.cost.cost_model import LayerCost
from hecate.ranks.ranks import Ranks
from hecate.train.evaluate import evaluate
from hecate.train.training import Training
from testing.ranks import run_ranks
from tests.hecate.apps.megatron.making import FOUR_HEADS, config_of, tensor_ranks_of, write_parts

STEPS, SAVED = 5, 2
COMMON = ("model.dtype=float64", f"max_steps={STEPS}", "max_grad_norm=0.5")

Steps = list[tuple[float, ...]]
"""loss, aux loss and gradient norm of each step; at last the held-out loss"""


@dataclass(frozen=True)
class Found:
    """By one rank."""

    gradients: dict[str, np.ndarray]
    """of the first step, before clipping; of parts the whole, of experts those that the rank owns"""
    steps: Steps
    resumed: Steps
    loads: list[list[int]]
    """by layer and expert, over all ranks, in the first step"""
    parameters: tuple[int, int]
    """outside experts: alike on every rank, and of this rank's parts"""
    cost: LayerCost
    shares: tuple[int, ...]
    """rows of a micro-step, by copy of the model"""


def _numpy(tensor: Tensor | None) -> np.ndarray:
    assert tensor is not None
    return tensor.detach().numpy().copy()


def _watch_gradients(run: Training) -> dict[str, np.ndarray]:
    """They are there when the first step was taken."""
    found: dict[str, np.ndarray] = {}
    optimizer, step = run.parts.optimizer, run.parts.optimizer.step

    def watched(*given: Any) -> bool:
        if not found:
            named = {**optimizer.owned, **optimizer.replicated}
            found.update({name: _numpy(parameter.grad) for name, parameter in named.items() if parameter.grad is not None})
            for name, parameter in optimizer.parts.parameters.items() if optimizer.parts else ():
                assert optimizer.parts is not None
                assert parameter.grad is not None
                found[name] = _numpy(optimizer.parts.whole(name, parameter.grad))
        return step(*given)

    optimizer.step = watched  # type: ignore[method-assign]
    return found


def _go_on(run: Training, save_at: int | None = None) -> tuple[Steps, list[list[int]]]:
    steps: Steps = []
    loads: list[list[int]] = []
    while run.run_state.step < run.parts.config.max_steps:
        result = run.train_one().result
        steps.append((result.loss, result.aux_loss, result.grad_norm))
        loads = loads or [result.loads[layer].sum(1).tolist() for layer in sorted(result.loads)]
        if run.run_state.step == save_at:
            run.save()
    (held_out,) = evaluate(run.parts.config, run.ranks, run.parts.base, run.parts.moe, run.parts.eval_sources).scores.values()
    return [*steps, (held_out.loss,)], loads


def _train(ranks: Ranks, folder: Path, *overrides: str) -> Found:
    run = Training(config_of(folder, *COMMON, *overrides), ranks)
    run.parts.output.replace(Path(run.parts.config.output_dir), run.parts.moe, ranks)
    parts = run.parts.moe.parts.parameters.values() if run.parts.moe.parts else ()
    numbers = tuple(sum(p.numel() for p in some) for some in (run.parts.moe.replicated_parameters().values(), parts))
    ((_, given),) = run.parts.moe.engine.shards.plans.inputs()
    gradients = _watch_gradients(run)
    steps, loads = _go_on(run, SAVED)
    resumed, _ = _go_on(Training(config_of(folder, *COMMON, *overrides, "resume=true"), ranks))
    return Found(gradients, steps, resumed, loads, (numbers[0], numbers[1]), given.cost, run.shares)


VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": ("fssdp.policy=static_ep",),
    "checkpointed": ("fssdp.policy=full", "fssdp.rematerialize=true", "gradient_checkpointing=true"),
}
ALONE: dict[str, tuple[str, ...]] = {**VARIANTS, "megatrons": ("fssdp.policy=megatron_ep",)}
"""Megatron's MoE layers do not go together with its tensor parallelism here"""
UNEQUAL = {"unequal": (*VARIANTS["plain"], "topology={folder}/unequal.yaml")}
UNEQUAL_NODES = """
nodes: [{devices: 2, flops: 9e9, memory: 1e9}, {devices: 2, flops: 1e9, memory: 1e9}]
intra_node: {bandwidth: 1e9, latency: 1e-6}
inter_node: {bandwidth: 1e9, latency: 1e-6}
"""
"""so unequal that the second copy of the model gets no rows"""


def _job(rank: int, world: int, folder: str, tensor: int, shard: int, variants: tuple[str, ...], rows: int) -> dict[str, Found]:
    ranks = tensor_ranks_of(rank, world, tensor, shard)
    _check_process_groups(ranks, make_mesh(world, shard, tensor))
    own = (f"model.tensor_parallel={tensor}", f"fssdp.shard_size={shard}", f"micro_batch_size={rows}")
    out = f"{folder}/{world}-{tensor}-{shard}"
    found = {}
    for name in variants:
        given = [override.format(folder=folder) for override in {**ALONE, **UNEQUAL}[name]]
        found[name] = _train(ranks, Path(folder), *own, *given, f"output_dir={out}-{name}")
    return found


def _check_process_groups(ranks: Ranks, mesh: Mesh) -> None:
    """Megatron gets the groups of our mesh."""
    from hecate.apps.megatron.imports import quietly

    with quietly():
        from hecate.apps.megatron.gpt import process_groups
    groups = process_groups(ranks.groups, ranks.tensor)
    alone, everyone = [[rank] for rank in range(mesh.world_size)], [list(range(mesh.world_size))]
    wanted = {
        "tp": mesh.tensor_groups(),
        "dp": mesh.data_groups(),
        "dp_cp": mesh.data_groups(),
        "tp_dp_cp": everyone,
        "ep": mesh.sharding_groups(),
        "expt_dp": mesh.replicate_groups(),
        "pp": alone,
        "cp": alone,
    }
    for name, members in wanted.items():
        (own,) = (group for group in members if ranks.rank in group)
        assert dist.get_process_group_ranks(getattr(groups, name)) == own, name


def _elsewhere(rank: int, world: int, folder: str, tensor: int, rows: int, checkpoint_of: str) -> Steps:
    own = (f"model.tensor_parallel={tensor}", f"micro_batch_size={rows}", f"output_dir={folder}/{checkpoint_of}", "resume=true")
    return _go_on(Training(config_of(Path(folder), *COMMON, *own, *VARIANTS["plain"]), tensor_ranks_of(rank, world, tensor)))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tensor")
    write_parts(made)
    (made / "tiny.yaml").write_text(FOUR_HEADS)
    (made / "unequal.yaml").write_text(UNEQUAL_NODES)
    return made


@pytest.fixture(scope="module")
def alone(folder: Path) -> Found:
    (found,) = run_ranks(1, _job, str(folder), 1, 1, ("plain",), 4)
    return found["plain"]


@pytest.fixture(scope="module")
def one_copy(folder: Path) -> tuple[str, list[dict[str, Found]]]:
    return "2-2-2", run_ranks(2, _job, str(folder), 2, 2, tuple(VARIANTS), 4)


@pytest.fixture(scope="module")
def two_copies(folder: Path) -> tuple[str, list[dict[str, Found]]]:
    return "4-2-4", run_ranks(4, _job, str(folder), 2, 4, ("plain", *UNEQUAL), 2)


@pytest.fixture(scope="module")
def two_groups(folder: Path) -> tuple[str, list[dict[str, Found]]]:
    """Each copy of the model with its own copy of the experts."""
    return "4-2-2", run_ranks(4, _job, str(folder), 2, 2, ("plain",), 2)


@pytest.fixture(scope="module")
def across_groups(folder: Path) -> tuple[str, list[dict[str, Found]]]:
    """One copy of the model over two of the experts."""
    return "2-2-1", run_ranks(2, _job, str(folder), 2, 1, ("plain",), 4)


@pytest.fixture(scope="module")
def groups_of_one(folder: Path) -> tuple[str, list[dict[str, Found]]]:
    return "2-1-1", run_ranks(2, _job, str(folder), 1, 1, tuple(ALONE), 2)


_LESS_TELLING = [pytest.param(name, marks=pytest.mark.slow) for name in ("one_copy", "two_copies", "two_groups", "groups_of_one")]


@pytest.fixture(scope="module", params=[*_LESS_TELLING, "across_groups"])
def job(request: pytest.FixtureRequest) -> tuple[str, list[dict[str, Found]]]:
    """WORLD-PARTS-SHARD SIZE, and what each rank found by variant."""
    found: tuple[str, list[dict[str, Found]]] = request.getfixturevalue(request.param)
    return found


def test_losses_and_norms_are_those_of_one_rank(alone: Found, job: tuple[str, list[dict[str, Found]]]) -> None:
    assert alone.steps[STEPS - 1][0] < alone.steps[0][0] - 0.3
    for rank in job[1]:
        for name, found in rank.items():
            assert found.loads == alone.loads, "routed otherwise, or a token more than once"
            for got, wanted in zip(found.steps, alone.steps, strict=True):
                assert got == pytest.approx(wanted, rel=1e-6 if name == "megatrons" else 1e-9), name  # Megatron's router is in float32


def test_gradients_are_those_of_one_rank(alone: Found, job: tuple[str, list[dict[str, Found]]]) -> None:
    for name in job[1][0]:
        together: dict[str, np.ndarray] = {}
        for rank in job[1]:
            for key, gradient in rank[name].gradients.items():
                np.testing.assert_array_equal(together.setdefault(key, gradient), gradient, err_msg=f"ranks differ in {key}")
        assert together.keys() == alone.gradients.keys()
        for key, wanted in alone.gradients.items():
            rtol = 1e-5 if name == "megatrons" else 1e-8  # Megatron's router works in float32
            np.testing.assert_allclose(together[key], wanted, rtol=rtol, atol=rtol / 100 * np.abs(wanted).max(), err_msg=f"{name}: {key}")


def test_the_model_begins_and_is_left_whole(folder: Path, alone: Found, job: tuple[str, list[dict[str, Found]]]) -> None:
    def tensors(name: str) -> dict[str, Any]:
        files = sorted((folder / name / "model").glob("*.safetensors"))
        return {key: value for file in files for key, value in load_file(file).items()}

    wanted, got = tensors("1-1-1-plain"), tensors(f"{job[0]}-plain")
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)


def test_a_resumed_run_goes_on_bit_for_bit(job: tuple[str, list[dict[str, Found]]]) -> None:
    for rank in job[1]:
        for found in rank.values():
            assert found.resumed == found.steps[SAVED:]


@pytest.mark.slow
def test_a_copy_on_slow_devices_may_have_no_rows(two_copies: tuple[str, list[dict[str, Found]]]) -> None:
    assert [(rank["plain"].shares, rank["unequal"].shares) for rank in two_copies[1]] == [((2, 2), (4, 0))] * 4


@pytest.mark.slow
@pytest.mark.usefixtures("one_copy", "two_copies")  # have left their checkpoints
@pytest.mark.parametrize(
    ("world", "tensor", "rows", "of"),
    [(1, 1, 4, "2-2-2-plain"), (2, 2, 4, "1-1-1-plain"), pytest.param(2, 1, 2, "4-2-4-plain", marks=pytest.mark.slow)],
)
def test_a_checkpoint_knows_nothing_of_parts(folder: Path, alone: Found, world: int, tensor: int, rows: int, of: str) -> None:
    for steps in run_ranks(world, _elsewhere, str(folder), tensor, rows, of):
        for got, wanted in zip(steps, alone.steps[SAVED:], strict=True):
            assert got == pytest.approx(wanted, rel=1e-9)


def test_each_rank_holds_what_is_planned(folder: Path, job: tuple[str, list[dict[str, Found]]]) -> None:
    world, tensor, shard = map(int, job[0].split("-"))
    found = job[1][0]["plain"]
    own = (f"model.tensor_parallel={tensor}", f"fssdp.shard_size={shard}", f"micro_batch_size={4 * tensor // world}")
    planned = run_shape(config_of(folder, *COMMON, *own), None, world)
    assert (planned.replicated_parameters, planned.parts_parameters) == found.parameters
    assert planned.groups[0].cost == found.cost


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.tensor_parallel=4", "must divide the model's 2 heads of keys and values, got 4\n    hint: give one of 1, 2: each"),
        ("model.tensor_parallel=3", "must divide the model's 4 attention heads, got 3\n    hint: give one of 1, 2: each"),
    ],
)
def test_each_rank_has_whole_heads(folder: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config_of(folder, override)


def test_a_vocabulary_that_cannot_be_shared_out_is_refused(folder: Path) -> None:
    from hecate.model.files.tokenizer import vocabulary_of

    config = config_of(folder, "model.tensor_parallel=2")
    with pytest.raises(UserError, match=r"must divide the 259 tokens of the vocabulary, got 2\n  give one of 1, 7, 37"):
        vocabulary_of(config, range(259))
