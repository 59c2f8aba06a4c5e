"""Values that others imply: what `adapter: lora` leaves no room for, and the number of adapters of several sources."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hecate.config import load_config
from hecate.config.effective import to_yaml
from hecate.config.rules.implied import NO_EXPERTS, with_implied
from hecate.errors import UserError
from testing.tiny_run import make_workshop


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def test_nothing_is_implied_without_the_key() -> None:
    values = {"moe.num_experts": 4, "adapter": "mixture"}
    assert with_implied(values, pytest.fail) == values
    assert with_implied({"adapter": "lora"}, pytest.fail) == {"adapter": "lora", **NO_EXPERTS}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("moe.num_experts=4", "moe.num_experts: is about experts, of which there are none with adapter=lora"),
        ("moe.router.dense=true", "moe.router.dense: is about experts"),
        ("fssdp.policy=full", "fssdp.policy: is about experts"),
        ("moe.unit=ffn", "moe.unit: is about experts"),
        ("trace=true", "trace: records the loads of experts"),
        ("lora.pairs=nola", "lora.pairs: must be plain or fixed_a with adapter=lora, got nola"),
        ("lora.r=[4,2]", "lora.r: must be one number with adapter=lora"),
    ],
)
def test_what_is_about_experts_is_refused(workshop: Path, override: str, said: str) -> None:
    given = [f"model.name_or_path={workshop}/model", f"data.train={workshop}/up.train.jsonl", f"output_dir={workshop}/runs/refused"]
    with pytest.raises(UserError, match=re.escape(said)):
        load_config("lora", [*given, override], claim_output=False)


def test_a_runs_own_configuration_is_read_back(workshop: Path) -> None:
    given = [f"model.name_or_path={workshop}/model", f"data.train={workshop}/up.train.jsonl", f"output_dir={workshop}/runs/read"]
    config = load_config("lora", given, claim_output=False)
    (workshop / "own.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(workshop / "own.yaml", claim_output=False) == config


def test_adapters_of_several_sources_are_as_many_as_the_sources(workshop: Path) -> None:
    given = [f"model.name_or_path={workshop}/model", f"data.train=[{workshop}/up.train.jsonl, {workshop}/echo.train.jsonl]"]
    assert load_config("adapters", [*given, f"output_dir={workshop}/runs/many"], claim_output=False).moe.num_experts == 2
