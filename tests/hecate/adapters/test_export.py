"""`hecate export`: which form holds which adapter, and what is said of one that it cannot hold."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hecate.adapters.description import Adapter
from hecate.adapters.export import FORMS, write_form
from hecate.adapters.folder import save_adapter
from hecate.adapters.format_table import read_adapter
from hecate.config import RouterConfig
from hecate.errors import UserError
from tests.hecate.adapters.exporting import (
    damaged,
    export,
    hecate_logits,
    save_dense,
    save_mixlora,
    save_moe,
    save_peft,
    save_stacked,
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
        "mixlora", "is a LoRA, without routers of its own, which the form mixlora cannot hold\n  give --to merged or peft or per-expert"
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


def every_form(folder: Path) -> dict[str, Path]:
    """A sound adapter of each form that is read."""
    dense, moe = save_dense("llama", folder / "dense"), save_moe("qwen3_moe", folder / "moe")
    mixture = save_mixlora(folder / "mixture", dense)
    experts, _ = save_peft(folder / "experts", moe, ["q_proj"])
    names = [f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{one}.weight" for layer in range(3) for one in ("A_0", "B_0")]
    save_adapter(folder / "linears", {name: torch.ones(2, 2) for name in names}, linear_config_of(base_model_name_or_path=str(dense)))
    return {
        "peft": save_peft(folder / "lora", dense, ["q_proj"], experts=False)[0],
        "peft's experts": experts,
        "per-expert": export(experts, "per-expert", folder / "per-expert"),
        "three axes": save_stacked(folder / "stacked", experts, first=True),
        "mixlora": mixture,
        "adapter_model.bin": export(mixture, "mixlora", folder / "library"),
        "experts over linears": folder / "linears",
    }


def test_numbers_that_are_not_finite_or_whole_are_refused_in_every_form(tmp_path: Path) -> None:
    for form, adapter in every_form(tmp_path).items():
        read_adapter(adapter)
        file = adapter / ("adapter_model.bin" if form == "adapter_model.bin" else "adapter_model.safetensors")
        sound = torch.load(file, weights_only=True) if file.suffix == ".bin" else load_file(file)
        name = next(name for name in sound if ".lora_B" in name)
        for spoilt in (torch.nan, torch.inf, -torch.inf, torch.int32, torch.float8_e4m3fn):
            tensor = sound[name].clone()
            if isinstance(spoilt, torch.dtype):
                tensor, reason = tensor.to(spoilt), f"{name} is {spoilt}, not a dense tensor of floating point of 16 bits or more"
            else:
                tensor.flatten()[-1], reason = spoilt, f"{name} holds NaN or infinity"
            save: Callable[..., None] = torch.save if file.suffix == ".bin" else save_file
            save({**sound, name: tensor}, file)
            with pytest.raises(UserError, match=f"{file}: tensor {reason}"):
                read_adapter(adapter)


@pytest.mark.parametrize("kind", ["IA3", None, ["LORA"]])
def test_another_kind_of_adapter_is_refused_with_those_that_are_read(tmp_path: Path, kind: Any) -> None:
    adapter = save_mixlora(tmp_path / "adapter", save_dense("llama", tmp_path / "dense"))
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": kind}))
    for read in (read_adapter, hecate_logits):
        with pytest.raises(UserError, match=f"peft_type is {re.escape(repr(str(kind)))}; supported: LORA, MIXLORA, MOLA"):
            read(adapter)


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
        write_form(form, Adapter(tmp_path / "left", {}, description), tmp_path / "out")
    assert not (tmp_path / "out").exists()
