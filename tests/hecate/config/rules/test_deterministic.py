"""What goes together with `deterministic`."""

from __future__ import annotations

from pathlib import Path

import pytest

from hecate.config import ConfigError
from hecate.config.rules.deterministic import check_deterministic
from tests.hecate.config.making import MINIMAL, load


def test_every_policy_and_copies_of_experts_go_with_it(folder: Path) -> None:
    given = ("deterministic=true", "fssdp.policy=laer", "fssdp.redundancy=1", "fssdp.rematerialize=true", "moe.replay=force")
    assert load(MINIMAL, *given).deterministic
    assert not load(MINIMAL).deterministic
    for plan in ("auto", "history"):
        assert load(MINIMAL, "deterministic=true", f"fssdp.plan={plan}").plan_choice == "history"


def test_layers_plan_from_history_where_there_is_nothing_to_choose(folder: Path) -> None:
    assert load(MINIMAL).plan_choice == "auto"
    for change in ("fssdp.policy=static_ep", "fssdp.policy=full", "lora.pairs=shards"):
        assert load(MINIMAL, change).plan_choice == "history"
        assert change == "lora.pairs=shards" or load(MINIMAL, change, "fssdp.plan=exact").plan_choice == "exact", "who asks for it gets it"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("fssdp.plan=exact", "fssdp.plan: does not go together with deterministic: it has nothing to decide"),
        ("fssdp.memory_slots=2", "fssdp.memory_slots: does not go together with deterministic"),
        ("kernels=triton", "kernels: triton does not go together with deterministic, which holds on CPUs only"),
    ],
)
def test_what_does_not_is_refused(folder: Path, change: str, message: str) -> None:
    load(MINIMAL, change)
    with pytest.raises(ConfigError, match=message) as error:
        load(MINIMAL, "deterministic=true", change)
    assert len(error.value.problems) == 1


def test_groups_are_whole_on_each_rank(folder: Path) -> None:
    assert load(MINIMAL, "deterministic=true", "micro_batch_size=6", "deterministic_group=3").deterministic_group == 3
    with pytest.raises(ConfigError, match="deterministic_group: must divide micro_batch_size, which is 6"):
        load(MINIMAL, "deterministic=true", "micro_batch_size=6", "deterministic_group=4")
    with pytest.raises(ConfigError, match="deterministic_group: applies with deterministic only, got 3"):
        load(MINIMAL, "micro_batch_size=6", "deterministic_group=3")


@pytest.mark.parametrize(("key", "value"), [("model.front_end", "megatron"), ("fssdp.memory_slots", 2)])
def test_other_ways_to_train_are_refused(key: str, value: object) -> None:
    problems: list[str] = []
    check_deterministic({"deterministic": True, key: value}, lambda key, what, hint: problems.append(key))
    assert problems == [key]
    check_deterministic({"deterministic": False, key: value}, lambda key, what, hint: problems.append(key))
    assert problems == [key]
