"""Each optimizer of `optim` steps as its library's own does in one process, bit for bit, wherever experts are and however they move."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hecate.elastic.backups import copy_to_backup_ranks
from hecate.elastic.move_experts import move_experts
from hecate.engine.engine import Engine
from hecate.engine.step_plans import EngineConfig
from hecate.experts.family import Site
from hecate.experts.mixlora import MixLoraExperts
from hecate.experts.pairs.sources.plain import PlainPairs
from hecate.kernels.common.ffn import FfnBase, FfnShape
from hecate.optim import bitsandbytes_steps
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables, owned_parameters, schedule
from hecate.optim.rule import kind_of_parameter
from hecate.parallel.cluster.mesh import make_mesh
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.planners import POLICIES
from hecate.parallel.values.expert_kinds import FfnSizes, LoraShape
from hecate.parallel.values.layout import TensorSpec
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import expert_groups
from testing.ranks import run_ranks
from tests.hecate.optim.library_steps import OPTIM, PEAK, dtype_of, gradient, library_steps, rule

STEPS = 5
FACTOR = schedule("linear", STEPS, 0.4)
CHUNK = (TensorSpec("up_proj.A", (4, 96)), TensorSpec("up_proj.B", (80, 4)), TensorSpec("down_proj.A", (64, 70)), TensorSpec("scale", (5,)))
"""the third has moments of 8 bits, and a last block that is not full"""
REPLICATED = {
    "layers.3.self_attn.q_proj.A": (4, 96),
    "layers.3.router": (8, 96),
    "model.layers.3.self_attn.o_proj.weight": (70, 64),
    "model.layers.3.input_layernorm.weight": (96,),
    "model.layers.3.self_attn.o_proj.bias": (70,),
    "model.embed_tokens.weight": (60, 96),
    "lm_head.weight": (60, 96),
}
BY_ADAMW = ("layers.3.router", "model.embed_tokens.weight", "lm_head.weight")
"""of the matrices: what is within no decoder layer, and the router"""


def drawn(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(map(ord, name))), dtype=torch.float64).to(dtype)


def parts_of(expert: str, chunk: tuple[TensorSpec, ...], flat: Tensor) -> dict[str, Tensor]:
    sizes = [spec.numel for spec in chunk]
    return {f"{expert}.{spec.name}": part.view(spec.shape) for spec, part in zip(chunk, flat.split(sizes), strict=True)}


def gradient_of(name: str, step: int, like: Tensor) -> Tensor | None:
    """Some are idle in a step, so that they count fewer steps than others."""
    expert = name[:3]
    return None if expert[0] in "03" and (int(expert[2]) + step) % 4 == 0 else gradient(name, step, like)


def chunk_gradient(expert: str, chunk: tuple[TensorSpec, ...], step: int, like: Tensor) -> Tensor | None:
    found = [gradient_of(name, step, part) for name, part in parts_of(expert, chunk, like).items()]
    return None if found[0] is None else torch.cat([one.flatten() for one in found if one is not None])


@pytest.mark.parametrize(("optim", "adjust"), [*((optim, "match_rms_adamw") for optim in OPTIM), ("muon", "original")])
def test_experts_and_what_all_ranks_have_are_stepped_as_by_the_library(optim: str, adjust: str) -> None:
    dtype = dtype_of(optim)
    owned = {f"3.{expert}": nn.Parameter(drawn(f"3.{expert}", (sum(spec.numel for spec in CHUNK),), dtype)) for expert in range(3)}
    replicated = {name: nn.Parameter(drawn(name, shape, dtype)) for name, shape in REPLICATED.items()}
    of_view = "model.layers.3.self_attn.o_proj.weight"
    replicated[of_view] = nn.Parameter(replicated[of_view].detach().T.contiguous().T)
    before = {name: part for expert, flat in owned.items() for name, part in parts_of(expert, CHUNK, flat.detach().clone()).items()}
    before |= {name: one.detach().clone() for name, one in replicated.items()}
    settings = {"adjust_lr_fn": adjust} if optim == "muon" else {}
    trainables = Trainables(owned, replicated, chunks={Unit(3): CHUNK})
    optimizer = ExpertOptimizer(
        trainables, rule(optim, exclude=("norms", "biases"), **settings), LearningRate(PEAK, FACTOR), torch.device("cpu")
    )
    for step in range(STEPS):
        for name, parameter in owned.items():
            parameter.grad = chunk_gradient(name, CHUNK, step, parameter.detach())
        for name, parameter in replicated.items():
            parameter.grad = torch.empty_like(parameter).copy_(gradient(name, step, parameter))
        optimizer.step(1.0, max_grad_norm=None)
    vectors = [name for name, tensor in before.items() if tensor.dim() == 1]
    excluded = tuple(name for name in vectors if name in replicated)
    by_adamw = (*BY_ADAMW, *vectors) if optim == "muon" else ()
    wanted, kept = library_steps(
        optim,
        before,
        STEPS,
        FACTOR,
        lambda name, step: gradient_of(name, step, before[name]),
        by_adamw=by_adamw,
        excluded=excluded,
        adjust=adjust,
    )
    found = {name: part for expert, flat in owned.items() for name, part in parts_of(expert, CHUNK, flat.detach()).items()} | replicated
    # In another order of memory, sums over a matrix may round otherwise, and 8 bits have other blocks.
    close = {of_view: {"adafactor": 1e-12, "adamw_8bit": 0.02}.get(optim, 0.0)} if optim != "muon" else {of_view: 1e-3}
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].detach(), tensor, rtol=close.get(name, 0.0), atol=close.get(name, 0.0), msg=name)
        assert (found[name].detach() - before[name]).abs().max() > 1e-4, f"{name} was not trained"
    assert_same_state(optimizer, owned, kept)


def assert_same_state(optimizer: ExpertOptimizer, owned: dict[str, nn.Parameter], kept: dict[str, dict[str, object]]) -> None:
    """What is kept of each expert is what the library keeps of its matrices, what it looks bytes up in and dead counts aside."""
    state = optimizer.state_tensors()
    for expert in owned:
        of_expert = {name.split("/")[2]: tensor for name, tensor in state.items() if name.startswith(f"owned/{expert}/")}
        assert of_expert
        whole = "." not in next(iter(of_expert))  # chunks that are stepped as a whole have whole moments
        for key, tensor in of_expert.items():
            matrices = [f"{expert}.{spec.name}" for spec in CHUNK] if whole else [f"{expert}.{key.rpartition('.')[0]}"]
            wanted = [torch.as_tensor(kept[matrix][key.rpartition(".")[2]]).flatten() for matrix in matrices]
            joined = wanted[0] if tensor.dim() == 0 else torch.cat(wanted)
            assert torch.equal(tensor.flatten(), joined.to(tensor.dtype)), (expert, key)


def test_two_sizes_of_moments() -> None:
    state = rule("adamw_8bit").state_specs
    from hecate.parallel.values.optimizer_state import ParameterSpec

    assert {key: spec.dtype for key, spec in state(ParameterSpec((64, 64))).items()}["state1"] == "uint8"
    assert {key: spec.dtype for key, spec in state(ParameterSpec((64, 63))).items()}["state1"] == "float32"
    assert state(ParameterSpec((64, 70)))["absmax1"].shape == (18,)


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("layers.3.router", (2, 2), "routers"),
        ("layers.3.router.gate", (2, 2), "routers"),
        ("layers.3.self_attn.q_proj.A", (2, 2), None),
        ("model.layers.3.self_attn.q_proj.weight", (2, 2), None),
        ("decoder.layers.0.self_attention.linear_qkv.weight", (2, 2), None),
        ("model.embed_tokens.weight", (2, 2), "embeddings"),
        ("output_layer.weight", (2, 2), "embeddings"),
        ("model.norm.weight", (2,), "norms"),
        ("model.layers.3.mlp.bias", (2,), "biases"),
    ],
)
def test_kinds_of_parameters(name: str, shape: tuple[int, ...], kind: str | None) -> None:
    assert kind_of_parameter(name, torch.empty(shape)) == kind


EXPERTS, RANK, HIDDEN, FFN = 5, 64, 64, 72
"""A and B of each projection have 4,096 numbers or more"""


def small_engine(dtype: torch.dtype) -> Engine:
    world, shape = dist.get_world_size(), FfnShape(HIDDEN, FFN, "silu")
    weights = [torch.zeros(size, dtype=dtype) for size in ((FFN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN))]
    site = Site(Unit(0), EXPERTS, shape, 3, dtype, dtype, torch.device("cpu"))
    pairs = PlainPairs(LoraShape(rank=RANK, scale=0.5, dropout=0.0), ("up_proj", "down_proj"), FfnSizes(HIDDEN, FFN))
    family = MixLoraExperts(site, FfnBase(*weights, "silu"), pairs)
    config = EngineConfig(POLICIES["static_ep"], local_topology(world, cuda=False))
    made = Engine({Unit(0): family}, config, expert_groups(make_mesh(world, None)))
    for (unit, expert), parameter in made.shards.named_parameters().items():
        parameter.data.copy_(drawn(f"{unit}.{expert}", tuple(parameter.shape), dtype))
    return made


def trained_on_ranks(rank: int, world: int, optim: str) -> dict[str, Tensor]:
    """Five steps, after two of which all experts go to other owners. From the third on each has a backup, which must be equal to it."""
    made = small_engine(dtype_of(optim))
    chunk = made.shards.families[Unit(0)].layout().trainable
    trainables = Trainables(owned_parameters(made), {}, chunks={Unit(0): chunk})
    optimizer = ExpertOptimizer(trainables, rule(optim), LearningRate(PEAK, FACTOR), torch.device("cpu"))
    for step in range(STEPS):
        for name, parameter in (*optimizer.owned.items(), *optimizer.backups.items()):
            parameter.grad = chunk_gradient(name, chunk, step, parameter.detach())
        optimizer.step(1.0, max_grad_norm=None)
        if step == 1:
            owners = (made.shards.owners[Unit(0)] + 1 + np.arange(EXPERTS) % 2) % world
            move_experts(made, optimizer, {Unit(0): owners})
        if step == 2:
            copy_to_backup_ranks(made, optimizer, 1)
    rows: list[dict[str, dict[str, Tensor]]] = [{} for _ in range(world)]
    dist.all_gather_object(rows, {name: optimizer.row(one) for name, one in optimizer.owned.items()})
    everywhere = {name: row for of_rank in rows for name, row in of_rank.items()}
    assert len(everywhere) == EXPERTS
    backed: list[list[str]] = [[] for _ in range(world)]
    dist.all_gather_object(backed, [*optimizer.backups])
    assert sorted(name for of_rank in backed for name in of_rank) == (sorted(everywhere) if world > 1 else [])
    for name, backup in optimizer.backups.items():
        row = optimizer.row(backup)
        assert row.keys() == everywhere[name].keys()
        assert all(torch.equal(tensor, everywhere[name][key]) for key, tensor in row.items()), f"the backup of {name} differs"
    return {name: row["master"] for name, row in everywhere.items()}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("optim", OPTIM)
def test_owners_and_backups_step_as_the_library_while_experts_move(world: int, optim: str) -> None:
    dtype = dtype_of(optim)
    pairs = PlainPairs(LoraShape(rank=RANK, scale=0.5, dropout=0.0), ("up_proj", "down_proj"), FfnSizes(HIDDEN, FFN))
    chunk = pairs_chunk(pairs)
    flat = {f"0.{expert}": drawn(f"0.{expert}", (sum(spec.numel for spec in chunk),), dtype) for expert in range(EXPERTS)}
    before = {name: part for expert, one in flat.items() for name, part in parts_of(expert, chunk, one).items()}
    wanted, _ = library_steps(optim, before, STEPS, FACTOR, lambda name, step: gradient_of(name, step, before[name]))
    for found in run_ranks(world, trained_on_ranks, optim):
        for expert in flat:
            for name, part in parts_of(expert, chunk, found[expert]).items():
                assert torch.equal(part, wanted[name]), name


def pairs_chunk(pairs: PlainPairs) -> tuple[TensorSpec, ...]:
    found = []
    for name, (outputs, inputs) in (("up_proj", (FFN, HIDDEN)), ("down_proj", (HIDDEN, FFN))):
        found += [TensorSpec(f"{name}.A", (RANK, inputs)), TensorSpec(f"{name}.B", (outputs, RANK))]
    return tuple(found)


def test_bitsandbytes_is_imported_without_its_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package `kernels` is not seen while it is imported, and is there again afterwards."""
    import sys
    import types

    seen = []

    class Finder:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "bitsandbytes":
                seen.append(sys.modules["kernels"])

    package = types.ModuleType("kernels")
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "kernels", package)
    monkeypatch.setattr(sys, "meta_path", [Finder, type("None_", (), {"find_spec": staticmethod(_missing)})])
    bitsandbytes_steps.updates.cache_clear()
    with pytest.raises(ModuleNotFoundError, match="bitsandbytes"):
        bitsandbytes_steps.updates()
    assert seen == [None]
    assert sys.modules["kernels"] is package


def _missing(name: str, *_: object) -> None:
    if name == "bitsandbytes":
        raise ModuleNotFoundError(f"No module named {name}", name=name)
