"""adapter_config.json is what other programs need, is read back without loss, and is refused if its meaning would be lost."""

import logging
import math
from typing import Any

import pytest

from hecate.adapters.mixlora.description import mixlora_from_json
from hecate.errors import UserError
from tests.hecate.adapters.making import config_of

# As `mixlora` 0.2.3 writes it.
FOREIGN: dict[str, Any] = {
    "bias": "none",
    "peft_type": "MIXLORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "TinyLlama/TinyLlama_v1.1",
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
    "routing_strategy": "mixlora",
    "num_experts": 8,
    "act_fn": "silu",
    "top_k": 2,
}


def test_the_file_word_for_word() -> None:
    config = config_of(use_rslora=True, extra={"router_aux_loss_coef": 0.01})
    assert config.to_json() == {
        "bias": "none",
        "peft_type": "MIXLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "models/tiny",
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 1e-9,
        "use_rslora": True,
        "target_modules": ["q_proj", "gate_proj", "down_proj"],
        "routing_strategy": "mixlora",
        "num_experts": 3,
        "act_fn": "silu",
        "top_k": 2,
        "hecate": {
            "format_version": 1,
            "lora_dropout": 0.05,
            "num_layers": 2,
            "extra": {"router_aux_loss_coef": 0.01},
        },
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout": 0.0},
        {"use_rslora": True},
        {"num_experts": (2, 4)},
        {"extra": {"family": "mixlora", "router": {"z": [1, None]}}},
        {"num_layers": 1},
    ],
)
def test_back_without_loss(changes: dict) -> None:
    config = config_of(**changes)
    assert mixlora_from_json(config.to_json(), num_layers_seen=7) == config


def test_experts_per_layer_stand_under_hecate_and_the_maximum_above() -> None:
    value = config_of(num_experts=(2, 4)).to_json()
    assert value["num_experts"] == 4
    assert value["hecate"]["num_experts"] == [2, 4]


def test_a_file_of_another_program() -> None:
    config = mixlora_from_json(FOREIGN, num_layers_seen=22)
    assert (config.r, config.alpha, config.dropout, config.num_layers, config.num_experts) == (16, 32, 0.05, 22, 8)
    assert config.target_modules == ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    assert (config.top_k, config.act_fn, config.use_rslora, config.scale) == (2, "silu", False, 2.0)


def test_the_older_dialect() -> None:
    chosen = {"q_proj": True, "k_proj": False, "w1_proj": True, "w2_proj": True, "w3_proj": False, "dense": False}
    config = mixlora_from_json(FOREIGN | {"routing_strategy": "mixtral", "target_modules": chosen}, num_layers_seen=1)
    assert config.target_modules == ("q_proj", "gate_proj", "down_proj")


def test_scale() -> None:
    assert config_of(r=16, alpha=32).scale == 2.0
    assert config_of(r=16, alpha=32, use_rslora=True).scale == 8.0
    assert config_of(r=2, alpha=1, use_rslora=True).scale == pytest.approx(1 / math.sqrt(2), abs=1e-16)


def test_unused_keys_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        mixlora_from_json(FOREIGN | {"jitter_noise": 0.1, "use_dora": False, "zeta": 1}, num_layers_seen=1)
    assert caplog.messages == ["adapter_config.json: keys not used: jitter_noise, zeta"]


@pytest.mark.parametrize("key", sorted(set(FOREIGN) - {"bias"}))
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(UserError, match=f"'{key}' is missing"):
        mixlora_from_json({k: v for k, v in FOREIGN.items() if k != key}, num_layers_seen=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LORA"}, "peft_type is 'LORA'"),
        ({"routing_strategy": "mixlora-switch"}, "routing_strategy is 'mixlora-switch'; supported: mixlora, mixtral"),
        ({"task_type": ["CAUSAL_LM"]}, "task_type"),
        ({"bias": "all"}, "bias"),
        ({"use_dora": True}, "DoRA"),
        ({"expert_lora": {"r": 8}}, "expert_lora"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"r": 16.0}, "r must be a whole number from 1"),
        ({"r": True}, "r must be a whole number"),
        ({"r": 0}, "r must be a whole number"),
        ({"lora_alpha": "32"}, "alpha must be a whole number"),
        ({"lora_dropout": 1.0}, "dropout must be a number from 0.0 to below 1.0, not 1.0"),
        ({"lora_dropout": "0.1"}, "dropout"),
        ({"num_experts": 0}, "num_experts must be a whole number from 1"),
        ({"num_experts": 10**4000}, "num_experts must be a whole number"),
        ({"num_experts": [8]}, "num_experts"),
        ({"top_k": 9}, "top_k must be from 1 to a layer's experts, 8, not 9"),
        ({"act_fn": None}, "act_fn must be text"),
        ({"base_model_name_or_path": ""}, "base_model_name_or_path must be text"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": "q_proj"}, "target_modules must be a list"),
        ({"target_modules": {"q_proj": 1}}, "target_modules"),
        ({"target_modules": ["q_proj", 3]}, "target_modules"),
        ({"target_modules": ["q_proj", "q_proj"]}, "target_modules must name each module once"),
        ({"target_modules": ["gate_proj", "w1_proj"]}, "target_modules must name each module once"),
        ({"target_modules": ["gate_up_proj"]}, "'gate_up_proj' is not one of q_proj"),
        ({"hecate": 3}, "format_version"),
        ({"hecate": {"format_version": 2}}, "newer"),
        ({"hecate": {"format_version": 1}}, "'lora_dropout' is missing"),
        ({"hecate": {"format_version": 1, "x": 1}}, "hecate.x: unknown"),
    ],
)
def test_what_no_adapter_can_be_is_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mixlora_from_json(FOREIGN | change, num_layers_seen=1)


@pytest.mark.parametrize(
    "ours",
    [
        {"num_experts": [2, 9]},
        {"num_experts": [8, 8, 8]},
        {"num_experts": ["8", 8]},
        {"num_experts": [8, 1]},
        {"num_experts": 8},
        {"extra": []},
        {"num_layers": 2.0},
        {"lora_dropout": None},
    ],
)
def test_a_wrong_part_of_ours_is_refused(ours: dict) -> None:
    sound = {"format_version": 1, "lora_dropout": 0.1, "num_layers": 2, "extra": {}}
    assert mixlora_from_json(FOREIGN | {"hecate": sound}, num_layers_seen=1).num_layers == 2
    with pytest.raises(UserError):
        mixlora_from_json(FOREIGN | {"hecate": sound | ours}, num_layers_seen=1)
