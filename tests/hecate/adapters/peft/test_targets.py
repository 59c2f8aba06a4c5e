"""Which linears an adapter's target_modules name, beside PEFT's own function."""

from __future__ import annotations

from pathlib import Path

import pytest

from hecate.adapters.peft.targets import adapted_linears, adapts, require_sound, without_experts
from hecate.errors import UserError

PATHS = [
    f"model.layers.{layer}.{name}"
    for layer in (1, 11)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.shared_expert.up_proj", "cross.my_q_proj")
]
TARGETS = [
    ("q_proj",),
    ("proj",),
    ("1.self_attn.q_proj", "up_proj"),
    ("model.layers.11.mlp.up_proj",),
    ("mlp.up_proj", "k_proj"),
    r".*q_proj",
    r"model\.layers\.1\..*",
    r"layers",
    r".*\.(self_attn\.k|mlp\.up)_proj",
]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_a_linear_is_adapted_where_peft_adapts_it(targets: tuple[str, ...] | str) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    from peft.tuners.tuners_utils import check_target_module_exists

    config = peft.LoraConfig(target_modules=targets if isinstance(targets, str) else list(targets))
    assert {path: adapts(targets, path) for path in PATHS} == {path: bool(check_target_module_exists(config, path)) for path in PATHS}


def test_targets_without_a_linear_are_named() -> None:
    assert adapted_linears(("1.self_attn.q_proj",), PATHS, Path("a")) == ["model.layers.1.self_attn.q_proj"]
    with pytest.raises(UserError, match=r"^a: adapts a0, a1, a2, a3, a4 and 2 more, which is no linear .*: q_proj, k_proj, up_proj"):
        adapted_linears(tuple(f"a{number}" for number in range(7)), PATHS, Path("a"))


def test_targets_of_experts_alone_are_left_out() -> None:
    experts = ["model.layers.1.mlp.experts.0.up_proj", "model.layers.1.mlp.experts"]
    given = ("experts", "experts.0.up_proj", "k_proj", "up_proj", "gone")
    assert without_experts(given, experts, ["model.layers.1.mlp.shared.up_proj"]) == ("k_proj", "up_proj", "gone")
    assert without_experts(given, experts, []) == ("k_proj", "gone")


@pytest.mark.parametrize("pattern", [r"(a+)+b", r"(a|aa)*b", r"a*a*a*a*a*b", r"(a)\1", "a" * 10_001, "(" * 5_000, "[", "a{99999999999}"])
def test_expressions_that_are_none_or_could_take_years_are_refused(pattern: str) -> None:
    with pytest.raises(UserError, match="target_modules: "):
        require_sound(pattern, "target_modules")


@pytest.mark.parametrize("pattern", [r".*q_proj", r"(?:\d+\.\d+|[0-9]+.\d{1,}|[\d]+\.\d+)", r".*a.*b.*c.*d"])
def test_ordinary_expressions_are_taken(pattern: str) -> None:
    require_sound(pattern, "target_modules")
