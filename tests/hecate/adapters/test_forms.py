"""`hecate export`: which form holds which adapter, and what is said of one that it cannot hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hecate.adapters.forms import FORMS, ReadAdapter, write_form
from hecate.config import RouterConfig
from hecate.errors import UserError
from tests.hecate.adapters.exporting import (
    damaged,
    export,
    save_moe,
    save_peft,
    with_router,
)
from tests.hecate.adapters.making import linear_config_of


def test_what_a_form_cannot_hold_of_a_lora_is_refused(tmp_path: Path) -> None:
    model = save_moe("qwen3_moe", tmp_path / "model")
    q_proj = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    experts = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    number = iter(range(100))

    def refused(form: str, reason: str, change: Any = None, **of_adapter: Any) -> None:
        adapter, _ = save_peft(tmp_path / f"adapter{next(number)}", model, ["q_proj"], **of_adapter)
        if change is not None:
            change(adapter)
        with pytest.raises(UserError, match=f"(?s){adapter}.*: .*{reason}"):
            export(adapter, form, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused(
        "mixlora", "is a LoRA, without routers of its own, which the form mixlora cannot hold\n  give --to peft or per-expert or merged"
    )
    refused("per-expert", "adapts linears and no experts", experts=False)
    refused("per-expert", r"has trained routers \(mlp.gate\).*give --to merged", with_router)
    refused("merged", f"has no tensor {q_proj}A.weight", lambda one: damaged(one, f"{q_proj}A.weight", None))
    refused("merged", "has no tensor", lambda one: damaged(one, experts, None))
    stranger = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"
    refused("merged", f"has no tensor {stranger.replace('A', 'B')}", lambda one: damaged(one, stranger, torch.ones(4, 16)))

    def with_strangers(adapter: Path) -> None:
        damaged(adapter, stranger, torch.ones(4, 16))
        damaged(adapter, stranger.replace("A", "B"), torch.ones(16, 4))

    refused("merged", rf"the tensor {stranger} \(2 such\) belongs to no weight", with_strangers)
    refused(
        "merged", r"has the shape \[16, 17\], but the base model's is", lambda one: damaged(one, f"{q_proj}A.weight", torch.ones(4, 17))
    )

    def zero(adapter: Path) -> None:
        file = adapter / "adapter_model.safetensors"
        save_file({name: 0 * one if ".lora_B." in name else one for name, one in load_file(file).items()}, file)

    refused("merged", "all its B are zero: it was never trained", zero)


OVER_LINEARS = {
    "mola": (RouterConfig(), "which of its pairs are at work depends on the token, so that no LoRA equals it"),
    "smora": (
        RouterConfig(score="sigmoid", bias="balancing", bias_in_weights=True),
        "at work depends on the token, so that no LoRA equals it",
    ),
    "reclora": (RouterConfig(input="user"), "for each user it is another LoRA: give --user ID and --features FILE.npz"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("system", OVER_LINEARS)
def test_mixtures_over_linears_have_no_form_and_it_is_said_why(tmp_path: Path, system: str, form: str) -> None:
    router, reason = OVER_LINEARS[system]
    description = linear_config_of(router=router)
    with pytest.raises(
        UserError, match=f"(?s)/left: is a mixture of experts over single linears.*the form {form} cannot hold\n  .*{reason}"
    ):
        write_form(form, ReadAdapter(tmp_path / "left", {}, description), tmp_path / "out")
    assert not (tmp_path / "out").exists()
