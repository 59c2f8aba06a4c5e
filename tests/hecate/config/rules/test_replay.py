"""What goes together with routing that samples bring."""

from __future__ import annotations

from pathlib import Path

import pytest

from hecate.config import ConfigError
from hecate.config.rules.replay import check_replay
from tests.hecate.config.making import MINIMAL, load

REFUSED = [
    (["moe.unit=linear"], "moe.unit: linear does not go together with fssdp.plan=replay: it gives each linear a router of its own"),
    (["moe.router.dense=true"], "moe.router.dense: true does not go together with fssdp.plan=replay: it gives every token to all experts"),
    (
        ["moe={num_experts: 1, top_k: 1, router_aux_loss_coef: 0, router: {input: given}}", "lora.target_modules=[gate_proj]"],
        "moe.router.input: given does not go together with fssdp.plan=replay: it lets the sample's source decide",
    ),
    (["lora={pairs: shards, r: 4}"], "fssdp.plan: gathers in each micro-step, but with lora.pairs=shards"),
]


def test_a_plan_from_replayed_routing_forces_the_routers_unless_they_are_only_checked(folder: Path) -> None:
    """And an ordinary plan may serve forced routing."""
    assert load(MINIMAL).moe.replay is None
    assert load(MINIMAL, "fssdp.plan=replay").moe.replay == "force"
    assert load(MINIMAL, "fssdp.plan=replay", "moe.replay=check").moe.replay == "check"
    assert load(MINIMAL, "moe.replay=force").plan_choice == "auto"
    assert load(MINIMAL, "fssdp.plan=replay").fssdp.per_micro_step


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_has_nothing_to_replay_is_refused(folder: Path, changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load(MINIMAL, "fssdp.plan=replay", *changes)
    assert len(error.value.problems) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model.front_end": "megatron"}, "model.front_end: megatron does not go together with moe.replay=check"),
        ({"moe.router.input": "user"}, "moe.router.input: user does not go together with moe.replay=check"),
    ],
)
def test_other_front_ends_and_routers_are_refused(values: dict[str, object], message: str) -> None:
    problems: list[str] = []
    check_replay({"moe.replay": "check", **values}, lambda key, what, hint: problems.append(f"{key}: {what}"))
    assert len(problems) == 1
    assert problems[0].startswith(message)


def test_an_indexed_data_set_brings_no_routing(folder: Path) -> None:
    for suffix in (".idx", ".bin"):
        Path(f"ids{suffix}").touch()
    with pytest.raises(ConfigError, match=r"data.train\[0\].path: is an indexed data set, whose documents bring no routing"):
        load(MINIMAL, "fssdp.plan=replay", "data.train=ids")
