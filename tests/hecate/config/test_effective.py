import hashlib
from dataclasses import replace
from pathlib import Path

import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hecate.config import Config, DataConfig, DataSource, ModelConfig, config_hash, load_config, to_yaml
from hecate.config.scalars import read_text
from hecate.config.yaml_text import Mapping, Scalar, parse
from tests.hecate.config.test_load import MINIMAL, load

reuse_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)


def again(config: Config) -> Config:
    Path("saved.yaml").write_text(to_yaml(config), encoding="utf-8")
    return load_config("saved.yaml", [])


def test_round_trip(folder: Path) -> None:
    config = load(
        MINIMAL.replace("a.jsonl", "[a.jsonl, {path: b.jsonl, name: 'NO', weight: 0.1}]").replace("runs/first", "'012'"),
        "data.eval=[b.jsonl]",
        "learning_rate=1e-20",
        "moe.num_experts=[4,0,3]",
        "max_grad_norm=null",
        "eval={generate: true, max_samples: 3}",
        "output_dir='runs/${seed}'",
    )
    assert again(config) == config
    assert "${" not in to_yaml(config)


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


def test_hash_tells_computations_apart_and_nothing_else(folder: Path) -> None:
    base = config_hash(load(MINIMAL))
    assert len(base) == 64
    elsewhere = [
        "output_dir=runs/second",
        "resume=true",
        "nproc=4",
        "topology=cluster",
        "kernels=torch",
        "logging_steps=7",
        "save_steps=7",
        "save_total_limit=2",
        "trace=true",
        "data.eval=b.jsonl",
        "eval.max_samples=3",
        "lora.r=16",
    ]
    assert [o for o in elsewhere if config_hash(load(MINIMAL, o)) != base] == []
    assert config_hash(load(MINIMAL, "data.eval=b.jsonl", "eval_steps=3")) == base
    other = ["seed=1", "max_steps=11", "lora.r=8", "moe.num_experts=[8]", "fssdp.policy=full", "data.train=b.jsonl"]
    hashes = {config_hash(load(MINIMAL, o)) for o in other}
    assert len(hashes) == len(other)
    assert base not in hashes


def test_hash_is_stable() -> None:
    """The text is written by hand from the schema: who changes a default or a name must change it here too."""
    config = Config(
        model=ModelConfig(name_or_path="m"),
        data=DataConfig(train=(DataSource(path="a", name="a"),)),
        output_dir="o",
        max_steps=1,
    )
    text = (
        '{"data":{"on_bad_sample":"error","packing":true,"seq_len":512,'
        '"train":[{"format":"auto","name":"a","path":"a","weight":1.0}]},'
        '"fssdp":{"load_window":5,"max_imbalance":null,"memory_slots":null,"plan":"history","policy":"auto",'
        '"prefetch":1,"rematerialize":false,"reshard_interval":null},'
        '"gradient_accumulation_steps":1,"gradient_checkpointing":false,"learning_rate":0.0002,'
        '"lora":{"alpha":32.0,"dropout":0.05,"init_from":null,"r":16,'
        '"target_modules":["q_proj","k_proj","v_proj","o_proj","gate_proj","up_proj","down_proj"],"use_rslora":false},'
        '"lr_scheduler_type":"cosine","max_grad_norm":1.0,"max_steps":1,"micro_batch_size":1,'
        '"model":{"dtype":"auto","front_end":"transformers","name_or_path":"m","num_hidden_layers":null,"shard_non_experts":false,'
        '"tokenizer":null,"train_non_experts":false},'
        '"moe":{"family":"mixlora","num_experts":null,"router_aux_loss_coef":0.001,"top_k":null,"train_router":false,"upcycle_noise":0.01},'
        '"seed":0,"warmup_ratio":0.0,"weight_decay":0.0}'
    )
    assert config_hash(config) == hashlib.sha256(text.encode()).hexdigest()
