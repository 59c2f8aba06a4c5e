"""Runs whose decoder layers are sharded lose a rank, and gain one: frozen weights are sharded anew, and no bit of the result changes."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor

from hecate.config import load_config
from hecate.errors import UserError
from hecate.model.gated_ffn import decoder_layers
from hecate.parallel.cluster.topology import local_topology
from hecate.ranks.ranks import connect
from hecate.train.build import shard_layers_again
from hecate.train.training import Training
from testing.ranks import run_ranks
from testing.tiny_run import STEPS, make_workshop
from tests.hecate.elastic.losing import DEATH_STEP, PHASES, VICTIM, Dead, die_in, make_run_in_groups, regroup, steps_until
from tests.hecate.train.in_process import OVERRIDES, Losses
from tests.plain_moe_lora import save_tiny

SHARDED = ("model.shard_non_experts=true", "moe.family=moe_lora", "moe.train_router=true", "gradient_checkpointing=true")
SETTINGS = (*SHARDED, "deterministic=true", "fssdp.redundancy=1", "lora.dropout=0.1")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny run's folder with an MoE model in the place of the dense one."""
    folder = make_workshop(tmp_path_factory.mktemp("workshop"))
    sizes = {"vocab_size": 258, "eos_token_id": 257, "bos_token_id": 256, "pad_token_id": 257, "max_position_embeddings": 128}
    save_tiny("qwen2_moe", folder / "model", torch.float32, **sizes)
    return str(folder)


@pytest.fixture(scope="module")
def whole(workshop: str) -> Losses:
    return run_ranks(3, undisturbed, workshop)[0]


def undisturbed(rank: int, world: int, workshop: str) -> Losses:
    losses: dict[int, tuple[float, float, float]] = {}
    steps_until(make_run_in_groups(workshop, "whole", rank, world, None, *SETTINGS), STEPS, losses)
    return [losses[step] for step in sorted(losses)]


def frozen_of_layers(run: Training) -> tuple[int, int]:
    """Numbers in the frozen weights of all layers, and those of them that this rank holds."""
    weights = [one for one in decoder_layers(run.parts.moe.model)[1].parameters() if not one.requires_grad]
    assert all(isinstance(one, DTensor) for one in weights)
    return sum(one.numel() for one in weights), sum(one.to_local().numel() for one in weights if isinstance(one, DTensor))


def leaving_and_coming(rank: int, world: int, workshop: str, phase: str) -> tuple[list[tuple[int, int]], Losses]:
    """Three ranks lose one in a step, and a step later another process takes its place: what each rank held of the layers
    (`frozen_of_layers`) when there were two and when there were three again, and the losses of its steps."""
    losses: dict[int, tuple[float, float, float]] = {}
    run = make_run_in_groups(workshop, phase, rank, world, None, *SETTINGS)
    steps_until(run, DEATH_STEP, losses)
    held = []
    try:
        if rank == VICTIM:
            die_in(phase)
        steps_until(run, STEPS, losses)
    except Dead:
        run.ranks.leave()
        alone = connect(dist.HashStore(), 0, 1, sharded_layers=True)
        given = (*OVERRIDES, f"output_dir={workshop}/runs/{phase}", *SETTINGS)
        config = load_config(f"{workshop}/config.yaml", given, claim_output=False)
        run = Training(config, alone, local_topology(1, cuda=False), joins=True)
    except RuntimeError:
        regroup(run, f"{workshop}/{phase}-two", rank - (rank > VICTIM), world - 1)
        assert run.run_state.step == DEATH_STEP
        held.append(frozen_of_layers(run))
        steps_until(run, DEATH_STEP + 1, losses)
    regroup(run, f"{workshop}/{phase}-three", rank, world)
    held.append(frozen_of_layers(run))
    steps_until(run, STEPS, losses)
    return held, [losses[step] for step in sorted(losses)]


@pytest.mark.slow
@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase != "gradients"])
def test_sharded_layers_outlive_a_rank(workshop: str, whole: Losses, phase: str) -> None:
    results = run_ranks(3, leaving_and_coming, workshop, phase)
    assert results[0][1] == results[2][1] == whole
    assert results[VICTIM][1] == whole[:DEATH_STEP] + whole[DEATH_STEP + 1 :], "but for the step that it was not there in"
    for held in ([results[0][0][0], results[2][0][0]], [result[0][-1] for result in results]):
        assert sum(own for _, own in held) == held[0][0] > 0, "the ranks share out every number once"
        assert max(own for _, own in held) < held[0][0]


def hooks_of(model: nn.Module) -> list[int]:
    """Of each module, all kinds together."""
    return [sum(len(kept) for name, kept in vars(one).items() if name.endswith("_hooks")) for one in model.modules()]


def shares_in_memory() -> int:
    gc.collect()
    return sum(type(one) is FSDPParam for one in gc.get_objects())


def sharded_again(rank: int, world: int, workshop: str) -> str:
    """One rank shards its layers again between two steps, and then again from other files: what it says of these."""
    run = make_run_in_groups(workshop, "again", rank, world, None, *SETTINGS)
    parts, layers = run.parts, decoder_layers(run.parts.moe.model)[1]
    steps_until(run, 1, {})
    before = {path: one.full_tensor() if isinstance(one, DTensor) else one for path, one in layers.named_parameters()}
    kept, shares = hooks_of(parts.moe.model), shares_in_memory()
    assert shares > 0
    shard_layers_again(parts.config, parts.base, parts.moe, run.ranks)
    after = dict(layers.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(one.full_tensor(), before[path]) for path, one in after.items() if isinstance(one, DTensor))
    assert all(one is before[path] for path, one in after.items() if not isinstance(one, DTensor)), "what trains is another parameter"
    steps_until(run, 2, {})
    assert hooks_of(parts.moe.model) == kept, "some of the layers as they were sharded before"
    assert shares_in_memory() == shares, "some of the layers as they were sharded before"
    (weights,) = Path(workshop, "model").glob("*.safetensors")
    stored = weights.read_bytes()
    try:
        weights.write_bytes(stored[:-1] + bytes([stored[-1] ^ 1]))
        shard_layers_again(parts.config, parts.base, parts.moe, run.ranks)
    except UserError as error:
        return str(error)
    finally:
        weights.write_bytes(stored)
    return ""


def test_weights_are_read_again_but_from_no_other_model(workshop: str) -> None:
    assert "is not the model any more that the run began with" in run_ranks(1, sharded_again, workshop)[0]
