from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from hecate.config import Config, load_config, saved_config
from hecate.config.effective import Change, changed_computation, to_yaml
from hecate.config.scalars import read_text
from hecate.config.schema import LEAVES
from hecate.config.yaml_text import Mapping, Scalar, parse
from hecate.errors import UserError
from tests.hecate.config.making import MINIMAL, load, reuse_folder


def again(config: Config) -> Config:
    """Read back as a run's file; and as a checkpoint holds it, which must be the same."""
    Path("saved.yaml").write_text(to_yaml(config), encoding="utf-8")
    read = load_config("saved.yaml", [])
    assert saved_config(to_yaml(config)) == config
    return read


def test_round_trip(folder: Path) -> None:
    config = load(
        MINIMAL.replace("a.jsonl", "[a.jsonl, {path: b.jsonl, name: 'NO', weight: 0.1}]").replace("runs/first", "'012'"),
        "data.eval=[b.jsonl, {path: '*.jsonl', fields: {prompt: question, completion: 'NO'}}]",
        "learning_rate=1e-20",
        "moe.num_experts=[4,0,3]",
        "max_grad_norm=null",
        "eval={generate: true, max_samples: 3}",
        "output_dir='runs/${seed}'",
    )
    assert again(config) == config
    assert "${" not in to_yaml(config)


LINEAR = ("moe.unit=linear", "moe.router_aux_loss_coef=0")
SYSTEMS = {
    "all experts": ("moe.router.dense=true", "moe.num_experts=3"),
    "all experts, layer by layer": ("moe.router.dense=true", "moe.num_experts=[4,0,3]"),
    "users": (*LINEAR, "moe.router.input=user", "data.features=users.npz"),
    "given": ("moe.router.input=given", "moe.num_experts=1", "moe.top_k=1", "lora.target_modules=[up_proj]", "moe.router_aux_loss_coef=0"),
    "mola": (*LINEAR, "moe.allocation=[2,4,6,8]"),
    "smora": (*LINEAR, "lora.r=1", "moe.num_experts=64", "moe.router={score: sigmoid, bias: balancing, bias_in_weights: true}"),
    "one pair each": (*LINEAR, "moe.num_experts=1", "moe.top_k=1", "lora.pairs=shards"),
    "nola": ("lora.pairs=nola",),
    "allora": ("lora.gradient_rule=row_norm", "lora.eta=2.0", "lora.alpha=null", "lora.dropout=0"),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_file_of_a_run_of_any_system_is_a_configuration(folder: Path, system: str) -> None:
    np.savez("users.npz", ids=np.array(["a"]), features=np.ones((1, 8), dtype=np.float32))
    config = load(MINIMAL, *SYSTEMS[system])
    assert again(config) == config


@reuse_folder
@given(
    rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    dropout=st.floats(min_value=0, max_value=1, exclude_max=True),
    experts=st.integers(2, 2**31 - 1) | st.lists(st.integers(2, 99) | st.just(0), min_size=1).filter(any),
)
def test_valid_values_are_taken_exactly_and_come_back(folder: Path, rate: float, dropout: float, experts: int | list[int]) -> None:
    config = load(MINIMAL, f"learning_rate={rate!r}", f"lora.dropout={dropout!r}", f"moe.num_experts={experts}")
    assert (config.learning_rate, config.lora.dropout) == (rate, dropout)
    assert config.moe.num_experts == (experts if isinstance(experts, int) else tuple(experts))
    assert again(config) == config


words = st.sampled_from(["NO", "y", "012", "08", "12:30", "1_0", "1e3", "nan", ".inf", "~", "2020-01-01", "a: b", "#", "*a", "=", "- a"])


@reuse_folder
@example(text="\x85")
@example(text="a\u2028b\n")
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1) | words)
def test_any_text_is_written_so_that_it_reads_back(folder: Path, text: str) -> None:
    config = replace(load(MINIMAL), topology=text)
    root = parse(to_yaml(config))
    assert isinstance(root, Mapping)
    node = next(value for key, value in root.pairs if isinstance(key, Scalar) and key.text == "topology")
    assert isinstance(node, Scalar)
    if text != "???":
        assert read_text(node.text, node.plain) == text
    assert yaml.safe_load(to_yaml(config))["topology"] == text


ELSEWHERE = (
    "output_dir=runs/second",
    "resume=true",
    "nproc=4",
    "topology=four-cpu-ranks",
    "kernels=torch",
    "model.attention=sdpa",
    "logging_steps=7",
    "save_steps=7",
    "save_total_limit=2",
    "trace=true",
    "data.train=b.jsonl",
    "data.eval=b.jsonl",
    "eval.max_samples=3",
    "max_steps=11",
    "gradient_checkpointing=true",
    "fssdp.policy=full",
    "fssdp.prefetch=2",
    "fssdp.memory_slots=1",
    "fssdp.rematerialize=true",
    "lora.r=16",
)
OTHER_TRAININGS = {
    "seed=1": ("seed", 0, 1),
    "lora.r=8": ("lora.r", 16, 8),
    "moe.num_experts=[8]": ("moe.num_experts", 8, [8]),
    "learning_rate=1e-3": ("learning_rate", 2e-4, 1e-3),
    "data.seq_len=64": ("data.seq_len", 512, 64),
    "fssdp.plan=replay": ("moe.replay", None, "force"),
}


def saved(config: Config) -> dict[str, Any]:
    """The configuration as a checkpoint holds it."""
    read: dict[str, Any] = yaml.safe_load(to_yaml(config))
    return read


@pytest.mark.parametrize("override", ELSEWHERE)
def test_a_key_that_does_not_change_the_computation_may_differ(folder: Path, override: str) -> None:
    assert changed_computation(saved(load(MINIMAL)), load(MINIMAL, override)) == []


@pytest.mark.parametrize("override", OTHER_TRAININGS)
def test_a_key_that_makes_it_another_training_is_named_with_both_values(folder: Path, override: str) -> None:
    assert changed_computation(saved(load(MINIMAL)), load(MINIMAL, override)) == [Change(*OTHER_TRAININGS[override])]


def test_changes_are_named_in_the_order_of_keys_and_what_is_no_key_is_passed_over(folder: Path) -> None:
    then = saved(load(MINIMAL, "seed=3", "lora.r=8"))
    then |= {"gone": 1, "fssdp": {"retired": {"r": 2}}}
    assert changed_computation(then, load(MINIMAL)) == [Change("lora.r", 8, 16), Change("seed", 3, 0)]


def test_text_with_line_breaks_stays_on_one_line(folder: Path) -> None:
    """So that a reader of YAML 1.1, which folds lines between single quotes, finds the same text."""
    lines = to_yaml(replace(load(MINIMAL), topology="a\nb\u2028c")).splitlines()
    assert [line for line in lines if line.startswith("topology")] == ['topology: "a\\nb\\Lc"']


def test_every_key_says_whether_it_changes_the_computation() -> None:
    """Written by hand: who adds a key decides on it here, too."""
    free = {name for name, leaf in LEAVES.items() if not leaf.computes}
    assert {name for name in LEAVES if name not in free} == {
        "model.front_end",
        "model.name_or_path",
        "model.tokenizer",
        "model.dtype",
        "model.num_hidden_layers",
        "model.train_non_experts",
        "data.separate",
        "data.skip_steps",
        "data.eval_share",
        "data.seq_len",
        "data.packing",
        "seed",
        "deterministic",
        "deterministic_group",
        "micro_batch_size",
        "gradient_accumulation_steps",
        "optim",
        "muon.momentum",
        "muon.adjust_lr_fn",
        "muon.adamw_learning_rate",
        "learning_rate",
        "lr_scheduler_type",
        "lr_scheduler_kwargs.min_lr_rate",
        "lr_scheduler_kwargs.decay_ratio",
        "warmup_ratio",
        "warmup_steps",
        "weight_decay",
        "weight_decay_exclude",
        "adapter",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "skip_step_sigma_factor",
        "lora.r",
        "lora.alpha",
        "lora.dropout",
        "lora.eta",
        "lora.gradient_rule",
        "lora.nola.bases",
        "lora.pairs",
        "lora.shards.equivalent_rank",
        "lora.shards.per_vector",
        "lora.shards.private_rank",
        "lora.use_rslora",
        "lora.moe_rank_scaling",
        "lora.experts",
        "lora.target_modules",
        "moe.allocation",
        "moe.family",
        "moe.num_experts",
        "moe.top_k",
        "moe.router.balance",
        "moe.router.bias",
        "moe.router.bias_in_weights",
        "moe.router.bias_rate",
        "moe.router.dense",
        "moe.router.input",
        "moe.router.mix",
        "moe.router.score",
        "moe.router.temperature",
        "moe.router.weights",
        "moe.replay",
        "moe.train_router",
        "moe.unit",
        "moe.upcycle_noise",
        "moe.router_aux_loss_coef",
        "rounds.count",
        "rounds.local_steps",
        "rounds.clients",
        "rounds.aggregate",
        "rounds.refine.ridge",
        "rounds.refine.distance",
        "rounds.server.optimizer",
        "rounds.server.learning_rate",
        "rounds.server.weight_decay",
        "privacy.clip",
        "privacy.noise",
        "rounds.codec.error_feedback",
        "rounds.codec.down",
        "rounds.codec.up",
        "rounds.merge_into_base",
        "rounds.isolation",
        "rounds.drop",
    }


def test_a_configuration_of_version_0_1_is_the_same_training_as_the_defaults(folder: Path) -> None:
    """The text is what 0.1.0 wrote. Who changes a default that changes the computation breaks the resumption of old runs."""
    written = {
        "model": {"front_end": "transformers", "name_or_path": "model", "tokenizer": None, "tensor_parallel": 1, "dtype": "auto"}
        | {"num_hidden_layers": None, "shard_non_experts": False, "train_non_experts": False},
        "data": {"train": [{"path": "a.jsonl", "name": "a", "weight": 1.0, "format": "auto"}], "eval": [], "seq_len": 512}
        | {"packing": True, "on_bad_sample": "error"},
        "output_dir": "runs/first",
        "seed": 0,
        "max_steps": 10,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.0002,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "lora": {"r": 16, "alpha": 32.0, "dropout": 0.05, "use_rslora": False, "init_from": None}
        | {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
        "moe": {"family": "mixlora", "num_experts": 8, "top_k": 2, "train_router": False, "upcycle_noise": 0.01}
        | {"router_aux_loss_coef": 0.001},
        "fssdp": {"policy": "auto", "plan": "history", "rematerialize": False, "prefetch": 1, "max_imbalance": None}
        | {"load_window": 5, "memory_slots": None, "shard_size": None, "redundancy": 0, "verify_copies_steps": None}
        | {"reshard_interval": None},
        "kernels": "auto",
    }
    assert changed_computation(written, load(MINIMAL)) == []


def test_megatrons_own_layers_are_another_training(folder: Path) -> None:
    then = saved(load(MINIMAL))
    then["fssdp"]["policy"] = "megatron_ep"
    assert changed_computation(then, load(MINIMAL)) == [Change("fssdp.policy", "megatron_ep", "auto")]


def test_a_saved_configuration_with_a_policys_former_name(folder: Path) -> None:
    config = load(MINIMAL, "fssdp.policy=hecate_paper")
    older = to_yaml(config).replace("policy: hecate_paper", "policy: hecate")
    assert "policy: hecate\n" in older
    assert saved_config(older) == config


def test_a_saved_configuration_of_another_version_or_a_damaged_one(folder: Path) -> None:
    config = load(MINIMAL)
    older = {key: value for key, value in yaml.safe_load(to_yaml(config)).items() if key != "eval"}
    assert saved_config(yaml.dump({**older, "a_later_key": 3})) == config
    for text in ("{", "[]", "model: 3"):
        with pytest.raises(UserError, match="the configuration in it cannot be read"):
            saved_config(text)


ENVIRONMENT = "${oc.env:HOME}"


@pytest.mark.parametrize("value", [ENVIRONMENT, f"a {ENVIRONMENT} b", "${seed}", "${" * 400 + "x" + "}" * 400])
@pytest.mark.parametrize("key", ["output_dir", "model.name_or_path", "lora.init_from", "data.train"])
def test_a_forged_checkpoint_gets_no_variable_of_the_environment(folder: Path, key: str, value: str) -> None:
    """What its configuration names is written into an adapter's configuration and card, which are published."""
    values = yaml.safe_load(to_yaml(load(MINIMAL)))
    section, _, name = key.rpartition(".")
    (values[section] if section else values)[name] = [{"path": value}] if key == "data.train" else value
    with pytest.raises(UserError, match=rf"{key} refers to something else, as none is saved"):
        saved_config(yaml.safe_dump(values))


def test_nor_does_one_that_writes_it_in_another_way(folder: Path) -> None:
    text = yaml.safe_dump(yaml.safe_load(to_yaml(load(MINIMAL))) | {"output_dir": "HERE"})
    with pytest.raises(UserError, match="output_dir refers to something else"):
        saved_config(text.replace("HERE", r'"\x24\x7boc.env:HOME}"'))
