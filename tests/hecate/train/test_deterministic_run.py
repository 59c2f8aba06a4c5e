"""With `deterministic` a run ends with the same bits at every number of ranks, wherever experts are and whenever they move."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hecate.config import load_config
from hecate.elastic.move_experts import move_experts
from hecate.errors import UserError
from hecate.train.steps.passes_in_order import prepare_for_order
from hecate.train.training import Training
from testing.byte_tokenizer import build_byte_tokenizer
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.hecate.train.in_process import Losses, ranks_of_default_group, settings_of, train_until
from tests.plain_moe_lora import save_tiny

STEPS = 3
SEQUENCES = 12
"""of a micro-step, which 1, 2, 3 and 4 ranks share out evenly"""
# In float64 sums often round to the same bits by chance. The order in which norms are summed does not show here: nor does it with float64.
ALWAYS = ("model.dtype=float32", "deterministic=true", "max_grad_norm=0.5", "lora.dropout=0.1", "moe.num_experts=11")
KINDS: dict[str, tuple[str, ...]] = {
    "LoRA over frozen experts": (
        "moe.family=moe_lora",
        "moe.train_router=true",
        "model.name_or_path={workshop}/moe",
        "moe.num_experts=null",
    ),
    "adapters of sources": (
        *("moe.num_experts=2", "moe.top_k=1", "moe.router_aux_loss_coef=0", "moe.router={{input: given}}"),
        "lora.target_modules=[gate_proj,up_proj,down_proj]",
    ),
    "full experts": ("moe.family=full", "moe.upcycle_noise=0.1", "model.train_non_experts=true", "lora.dropout=0"),
    "LoRA over linears": ("moe.unit=linear", "moe.router={{balance: sample}}"),
    "shards of pools": ("moe.unit=linear", "lora.pairs=shards", "lora.r=5"),
    "LoRA in float64": ("model.dtype=float64", "moe.num_experts=23"),
    "packed sequences in bfloat16": ("data.packing=true", "model.dtype=bfloat16"),
}
PLACES = {
    "two sharding groups": ("fssdp.shard_size=2",),
    "four sharding groups": ("fssdp.shard_size=1",),
    "backups": ("fssdp.redundancy=1", "fssdp.policy=smartmoe"),
    "freed between passes": ("fssdp.rematerialize=true", "fssdp.prefetch=2"),
    "freed and computed again": ("fssdp.rematerialize=true", "gradient_checkpointing=true", "fssdp.shard_size=2"),
}

Bits = tuple[Losses, dict[str, str]]
"""losses and norms of the steps, and digests of parameters and moments by name"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With a dense model and one that has experts."""
    made = make_workshop(tmp_path_factory.mktemp("workshop"))
    tokenizer = build_byte_tokenizer()
    save_tiny("qwen3_moe", made / "moe", vocab_size=len(tokenizer), eos_token_id=257, bos_token_id=256, pad_token_id=257)
    tokenizer.save_pretrained(made / "moe")
    return str(made)


def trained(workshop: str, name: str, world: int, *overrides: str, until: int = STEPS, share: int | None = None) -> Bits:
    """A run of `world` ranks, until it has done so many steps."""
    name = name.replace(" ", "-")
    given = (*ALWAYS, f"micro_batch_size={share or SEQUENCES // world}", *overrides)
    steps = run_ranks(world, train_until, workshop, name, until, given)
    assert all(of_rank == steps[0] for of_rank in steps)
    return steps[0], digests(workshop, name, until)


def digests(workshop: str, name: str, step: int) -> dict[str, str]:
    manifest = json.loads((Path(workshop) / f"runs/{name}/checkpoint-{step}/manifest.json").read_text(encoding="utf-8"))
    found = {name: entry["xxh3_128"] for name, entry in manifest["tensors"].items()}
    assert {name.rpartition("/")[2] for name in found} >= {"exp_avg", "exp_avg_sq"}
    return found


@pytest.fixture(scope="module")
def alone(workshop: str) -> Bits:
    return trained(workshop, "alone", 1)


@pytest.mark.parametrize(
    ("world", "policy"),
    [(3, "hecate_paper"), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, "static_ep"), (4, "auto"), (4, "full")))],
)
def test_any_number_of_ranks(workshop: str, alone: Bits, world: int, policy: str) -> None:
    assert trained(workshop, f"{policy}-{world}", world, f"fssdp.policy={policy}") == alone


@pytest.mark.slow
@pytest.mark.parametrize("where", PLACES)
def test_wherever_experts_and_their_copies_are(workshop: str, alone: Bits, where: str) -> None:
    assert trained(workshop, where, 4, *PLACES[where]) == alone


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_experts(workshop: str, kind: str) -> None:
    one = trained(workshop, f"{kind} alone", 1, *KINDS[kind])
    for world, where in ((3, "fssdp.redundancy=1"), (4, "fssdp.shard_size=2")):
        assert trained(workshop, f"{kind} {world}", world, *KINDS[kind], where) == one


@pytest.mark.slow
def test_a_run_that_goes_on_with_other_ranks(workshop: str, alone: Bits) -> None:
    """Eight ranks have one or two sequences each, and sixteen one or none."""
    steps = trained(workshop, "resumed", 4, until=1)[0]
    steps += trained(workshop, "resumed", 8, "resume=true", until=2, share=3)[0]
    end = trained(workshop, "resumed", 16, "resume=true", until=3, share=3)
    assert (steps + end[0], end[1]) == alone


GROUPED, IN_GROUPS = "deterministic_group=2", 8
"""a setting, and the number of sequences of a micro-step that are shared out in such groups"""


def grouped(workshop: str, name: str, world: int, *overrides: str, until: int = STEPS) -> Bits:
    """As `trained`, in groups of two sequences."""
    return trained(workshop, name, world, GROUPED, *overrides, until=until, share=IN_GROUPS // world)


@pytest.fixture(scope="module")
def grouped_alone(workshop: str) -> Bits:
    return grouped(workshop, "groups alone", 1)


def test_groups_on_two_ranks(workshop: str, grouped_alone: Bits) -> None:
    assert grouped(workshop, "groups 2", 2) == grouped_alone


@pytest.mark.slow
def test_groups_on_ranks_of_one_group_each(workshop: str, grouped_alone: Bits) -> None:
    assert grouped(workshop, "groups 4", 4, "fssdp.shard_size=2") == grouped_alone


@pytest.mark.slow
def test_groups_of_frozen_experts(workshop: str) -> None:
    kind = KINDS["LoRA over frozen experts"]
    one = grouped(workshop, "frozen groups alone", 1, *kind)
    for world in (2, 4):
        assert grouped(workshop, f"frozen groups {world}", world, *kind) == one


@pytest.mark.slow
def test_whole_groups_are_dealt_to_other_ranks(workshop: str, grouped_alone: Bits) -> None:
    """Four groups: three ranks have two, one and one of them, and the fifth of five none."""
    steps = grouped(workshop, "groups resumed", 4, until=1)[0]
    steps += trained(workshop, "groups resumed", 3, GROUPED, "resume=true", until=2, share=2)[0]
    end = trained(workshop, "groups resumed", 5, GROUPED, "resume=true", until=3, share=2)
    assert (steps + end[0], end[1]) == grouped_alone


@pytest.mark.slow
def test_groups_of_another_size_are_the_same_training_within_rounding(workshop: str, grouped_alone: Bits) -> None:
    one_by_one = trained(workshop, "one by one", 1, share=IN_GROUPS)
    assert one_by_one[1] != grouped_alone[1]
    double = ("model.dtype=float64",)
    ones, twos, fours = (
        torch.tensor(trained(workshop, f"groups of {size}", 2, *double, f"deterministic_group={size}", share=4)[0], dtype=torch.float64)
        for size in (1, 2, 4)
    )
    assert ones.sub(twos).abs().max() <= 1e-10
    assert ones.sub(fours).abs().max() <= 1e-10


@pytest.mark.slow
def test_eight_ranks_begin_as_one_does(workshop: str) -> None:
    assert trained(workshop, "begun by 8", 8, until=1, share=1) == trained(workshop, "begun by 1", 1, until=1, share=8)


def moving(rank: int, world: int, workshop: str, settings: tuple[str, ...]) -> None:
    """A run whose experts get any owners after each step."""
    config = load_config(f"{workshop}/config.yaml", settings, claim_output=False)
    run = Training(config, ranks_of_default_group(rank, world))
    random = np.random.default_rng(5)
    while run.run_state.step < STEPS:
        run.train_one()
        owners = {unit: random.integers(0, world, size=len(owner_E)) for unit, owner_E in run.parts.moe.engine.shards.owners.items()}
        move_experts(run.parts.moe.engine, run.parts.optimizer, owners)
    run.save()


@pytest.mark.slow
def test_experts_that_move(workshop: str, alone: Bits) -> None:
    run_ranks(3, moving, workshop, settings_of(workshop, "moved", (*ALWAYS, "micro_batch_size=4")))
    assert digests(workshop, "moved", STEPS) == alone[1]


def on_threads(rank: int, world: int, *arguments: object) -> tuple[Losses, int]:
    torch.set_num_threads(3)
    return train_until(rank, world, *arguments), torch.get_num_threads()  # type: ignore[arg-type]


def test_a_rank_computes_on_one_thread(workshop: str, alone: Bits) -> None:
    """How a sum over a whole tensor is cut depends on the number of threads, and so do its bits."""
    given = (*ALWAYS, f"micro_batch_size={SEQUENCES}")
    (found,) = run_ranks(1, on_threads, workshop, "threads", STEPS, given)
    assert found == (alone[0], 1)


@pytest.mark.slow
def test_it_is_the_training_without_it_within_rounding(workshop: str) -> None:
    for kind in ("LoRA over frozen experts", "adapters of sources"):
        double = ("model.dtype=float64", *KINDS[kind])
        ordered = torch.tensor(trained(workshop, f"{kind} ordered", 3, *double)[0], dtype=torch.float64)
        plain = torch.tensor(trained(workshop, f"{kind} plain", 3, *double, "deterministic=false")[0], dtype=torch.float64)
        assert ordered.sub(plain).abs().max() <= 1e-10


def test_a_gpu_is_refused() -> None:
    config = SimpleNamespace(deterministic=True)
    prepare_for_order(config, torch.device("cpu"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="deterministic: holds on CPUs only"):
        prepare_for_order(config, torch.device("cuda:0"))  # type: ignore[arg-type]
