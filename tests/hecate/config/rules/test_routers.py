"""Choices of a router that do not go together are refused, with what is wrong, where, and how to mend it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hecate.config import ConfigError, RouterConfig
from hecate.config.rules.routers import check_router
from hecate.config.rules.users import check_user
from tests.hecate.config.making import MINIMAL, load

REFUSED = [
    (["moe.router.weights=one"], "moe.router.weights: one needs moe.top_k=1, got 2.*set moe.top_k=1"),
    (["moe.router.weights=one", "moe.top_k=3"], "moe.router.weights: one needs moe.top_k=1, got 3"),
    (["moe.router={weights: one, dense: true}"], "moe.router.weights: one needs moe.top_k=1, but with moe.router.dense"),
    (["moe.router={score: sigmoid, bias: balancing}"], "moe.router_aux_loss_coef: must be 0 with .*balancing.*got 0.001.*coef=0"),
    (
        ["moe.router={bias: balancing, balance: sample}", "moe.router_aux_loss_coef=0"],
        "moe.router.balance: has no effect with moe.router.bias=balancing.*leave it out",
    ),
    (["moe.router={bias: learned, bias_rate: 0.1}"], "moe.router.bias_rate: applies to moe.router.bias=balancing only.*bias is learned"),
    (["moe.router.bias_in_weights=true"], "moe.router.bias_in_weights: applies to moe.router.bias=balancing only.*leave it out"),
    (["moe.router={bias: balancing, bias_rate: -1}", "moe.router_aux_loss_coef=0"], "moe.router.bias_rate: must be > 0, got -1"),
    (
        ["moe.router={dense: true, bias: balancing}", "moe.router_aux_loss_coef=0"],
        "moe.router.bias: balancing has no effect with moe.router.dense.*leave moe.router.dense out",
    ),
    (["moe.router.dense=true", "moe.top_k=2"], "moe.top_k: is 2, but with moe.router.dense every token goes to all experts"),
    (["moe.router.weights=gate"], "moe.router.weights: gate does not fit moe.family=mixlora.*use renormalised"),
    (["moe.router={weights: gate, dense: true, score: sigmoid}"], "moe.router.weights: gate does not fit moe.family=mixlora"),
    (["moe.router.score=sigmoid", "moe.family=full"], "moe.router.score: applies to moe.family=mixlora only, but the family is full"),
    (["moe.router.score=cosine"], "moe.router.score: must be one of softmax, sigmoid, got cosine"),
    (["moe.router.weights=renormalized"], "moe.router.weights: must be one of .*did you mean renormalised"),
    (["moe.router.colour=red"], "moe.router.colour: unknown key"),
    (["moe.router=softmax"], "moe.router: is a section and must hold keys.*its keys are .*score"),
    (
        ["moe.unit=linear", "moe.router={score: sigmoid, bias: balancing}"],
        "moe.router_aux_loss_coef: must be 0 with .*balancing",
    ),
    (["moe.router_type=softmax"], "moe.router_type: unknown key"),
    (
        ["moe.unit=linear", "moe.num_experts=1", "moe.top_k=1", "moe.router.score=sigmoid"],
        "moe.router.score: has no effect with one expert for each linear.*raise moe.num_experts",
    ),
]

GIVEN = (
    "data.train=[a.jsonl,b.jsonl]",
    "lora.target_modules=[gate_proj,up_proj,down_proj]",
    "moe={num_experts: 2, top_k: 1, router_aux_loss_coef: 0, router: {input: given}}",
)
NOT_GIVEN = [
    (
        "moe.num_experts=3",
        "moe.num_experts: must be 2 with moe.router.input=given, one expert for each item of data.train, got 3.*num_experts=2",
    ),
    ("moe.num_experts=null", "moe.num_experts: must be 2 .* got 8"),
    ("moe.num_experts=[2,2]", r"moe.num_experts: must be 2 .* got \[2, 2\]"),
    ("moe.top_k=2", "moe.top_k: must be 1 with moe.router.input=given: a sample has one source, got 2.*moe.top_k=1"),
    ("moe.top_k=null", "moe.top_k: must be 1 .* got 2"),
    ("moe.router_aux_loss_coef=0.1", "moe.router_aux_loss_coef: must be 0 with moe.router.input=given.*got 0.1"),
    ("moe.router.score=sigmoid", "moe.router.score: has no effect with moe.router.input=given"),
    ("data.eval=[{path: a.jsonl, name: c}]", r"data.eval\[0\].name: c has no expert.*same name.*one of the names a, b"),
    (
        "lora.target_modules=[q_proj,up_proj]",
        "lora.target_modules: names q_proj, whose adapter all experts would share.*gate_proj, up_proj.*set moe.unit=linear",
    ),
]


@pytest.mark.parametrize(("overrides", "reason"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_choices_that_do_not_go_together_are_refused(folder: Path, overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){reason}") as error:
        load(MINIMAL, *overrides)
    assert len(error.value.problems) == 1


@pytest.mark.parametrize(("override", "reason"), NOT_GIVEN, ids=[override for override, _ in NOT_GIVEN])
def test_what_does_not_go_with_given_routing_is_refused(folder: Path, override: str, reason: str) -> None:
    separately = [f"moe.{pair}" for pair in ("num_experts=2", "top_k=1", "router_aux_loss_coef=0", "router.input=given")]
    assert load(MINIMAL, *GIVEN, "data.eval=[b.jsonl]").moe.by_source
    kept = [given for given in (*GIVEN[:2], *separately) if given.partition("=")[0] != override.partition("=")[0]]
    with pytest.raises(ConfigError, match=f"(?s){reason}") as error:
        load(MINIMAL, *kept, override)
    assert len(error.value.problems) == 1


BY_USER = {
    "moe.unit": "linear",
    "moe.num_experts": "4",
    "moe.router_aux_loss_coef": "0",
    "moe.router.input": "user",
    "data.features": "users.npz",
}
NOT_BY_USER = [
    ("moe.unit=ffn", "moe.router.input: user needs moe.unit=linear.*set moe.unit=linear"),
    ("moe.top_k=2", "moe.top_k: is 2, but with moe.router.input=user every token goes to all experts"),
    ("moe.router_aux_loss_coef=0.001", "moe.router_aux_loss_coef: must be 0 with moe.router.input=user.*nothing is to balance, got 0.001"),
    ("moe.router.dense=true", "moe.router.dense: has no effect with moe.router.input=user, whose gates give every token to all experts"),
    ("moe.router.score=sigmoid", "moe.router.score: has no effect with moe.router.input=user"),
    ("moe.router.temperature=0", "moe.router.temperature: must be > 0, got 0"),
    ("data.features=null", "data.features: must be given with moe.router.input=user.*examples/reclora/movielens.py makes one"),
    ("data.features=none.npz", "data.features: no such file: none.npz"),
    ("data.train=corpus", r"data.train\[0\].path: is an indexed data set, whose documents name no users.*key \"user\" in each line"),
    (
        "fssdp.memory_slots=3",
        "fssdp.memory_slots: must be 4 at least with moe.router.mix=factors, which needs all experts on every rank, got 3",
    ),
    (
        "lora.r=[2,4,4,8]",
        "lora.r: must be one rank with moe.router.mix=factors: pairs of several ranks, each scaled by its own, have no sum.*mix=products",
    ),
    (
        "lora={gradient_rule: row_norm, eta: 1.0, dropout: 0}",
        "lora.gradient_rule: row_norm is about the rows of one pair, but moe.router.mix=factors adds up those of all pairs.*mix=products",
    ),
    (
        "moe.num_experts=1",
        "moe.num_experts: gives each linear one expert, but moe.router.input=user mixes several.*give 2 experts at least",
    ),
    ("moe.router.input=token", "data.features: is read with moe.router.input=user only"),
]


@pytest.mark.parametrize(("override", "reason"), NOT_BY_USER, ids=[override for override, _ in NOT_BY_USER])
def test_what_does_not_go_with_users_is_refused(folder: Path, override: str, reason: str) -> None:
    for name in ("users.npz", "corpus.idx", "corpus.bin"):
        (folder / name).write_bytes(b"")
    given = [f"{key}={value}" for key, value in BY_USER.items()]
    config = load(MINIMAL, *given)
    assert (config.moe.top_k, config.moe.router.mix, config.moe.router.temperature) == (4, "factors", 5.0)
    assert load(MINIMAL, *given, "moe.router.mix=products", "fssdp.memory_slots=1").fssdp.memory_slots == 1
    with pytest.raises(ConfigError, match=f"(?s){reason}") as error:
        load(MINIMAL, *(one for one in given if one.partition("=")[0] != override.partition("=")[0]), override)
    assert len(error.value.problems) == 1
    assert len(str(error.value).splitlines()) <= 8


@pytest.mark.parametrize("override", ["moe.router.temperature=2", "moe.router.mix=products"])
def test_choices_about_users_are_refused_without_them(folder: Path, override: str) -> None:
    for unit in ("moe.unit=ffn", "moe.unit=linear"):
        with pytest.raises(ConfigError, match=f"{override.partition('=')[0]}: applies to moe.router.input=user only") as error:
            load(MINIMAL, unit, override)
        assert len(error.value.problems) == 1


def test_missing_values_of_a_router_by_users_are_not_said_again() -> None:
    problems: list[tuple[str, str, str]] = []
    check_user({"moe.router.mix": "factors", "fssdp.memory_slots": 1}, {}, lambda *problem: problems.append(problem))
    assert not problems


def test_a_section_in_a_section_is_read_from_both_places(folder: Path) -> None:
    config = load(
        MINIMAL + "moe:\n  top_k: 1\n  router: {bias: learned, weights: one}\n", "moe.router.balance=sample", "moe={num_experts: 3}"
    )
    assert config.moe.router == RouterConfig(bias="learned", weights="one", balance="sample")
    assert (config.moe.num_experts, config.moe.top_k) == (3, 1)


def test_over_linears_a_router_has_every_choice(folder: Path) -> None:
    """An expert adds to W x, so its weight may be any; and each linear may have an adapter of a source's own."""
    choices = load(MINIMAL, "moe.unit=linear", "moe.router={weights: gate, score: sigmoid, bias: learned, balance: sample}").moe.router
    assert choices == RouterConfig(weights="gate", score="sigmoid", bias="learned", balance="sample")
    given = load(MINIMAL, GIVEN[0], GIVEN[2], "moe.unit=linear", "lora.target_modules=[q_proj,up_proj]")
    assert given.moe.output == "peft_by_source"
    with pytest.raises(ConfigError, match=r"lora.init_from: no adapter_config.json in "):
        load(MINIMAL, GIVEN[0], GIVEN[2], "moe.unit=linear", f"lora.init_from={folder}")
    for source in given.data.train:
        (folder / source.name).mkdir()
        (folder / source.name / "adapter_config.json").write_text("{}")
    load(MINIMAL, GIVEN[0], GIVEN[2], "moe.unit=linear", f"lora.init_from={folder}")


def test_given_routing_has_as_many_experts_in_every_layer(folder: Path) -> None:
    separately = [f"moe.{pair}" for pair in ("allocation=[2,2]", "top_k=1", "router_aux_loss_coef=0", "router.input=given")]
    with pytest.raises(
        ConfigError, match=r"(?s)moe.allocation: cannot be given with moe.router.input=given.*moe.num_experts in its"
    ) as error:
        load(MINIMAL, *GIVEN[:2], *separately)
    assert len(error.value.problems) == 1


@pytest.mark.parametrize(("experts", "top_k"), [("5", 5), ("1", 1), ("[2,4]", 4)])
def test_a_dense_router_takes_all_experts(folder: Path, experts: str, top_k: int) -> None:
    assert load(MINIMAL, "moe.router.dense=true", f"moe.num_experts={experts}").moe.top_k == top_k


def test_what_has_a_problem_already_is_not_said_again() -> None:
    problems: list[tuple[str, str, str]] = []
    check_router({"moe.router.weights": "one"}, lambda *problem: problems.append(problem))
    assert not problems
    check_router({"moe.router.weights": "one", "moe.top_k": None}, lambda *problem: problems.append(problem))
    assert [key for key, *_ in problems] == ["moe.router.weights"]


def test_a_dotted_key_in_a_file_is_shown_nested(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"in a file, nest it: moe: \{router: \{score: \.\.\.\}\}"):
        load(MINIMAL + "moe.router.score: sigmoid\n")
