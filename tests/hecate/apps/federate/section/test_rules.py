"""Which federated rounds are refused, and what clients are as keys of an ordinary run (`hecate.apps.federate.section.rules`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hecate.config import ConfigError, to_yaml
from tests.hecate.config.making import load

ROUNDS = """
model: {name_or_path: model}
output_dir: runs/rounds
rounds:
  local_steps: 20
  count: 2
  clients: [{data: a.jsonl, eval: b.jsonl}, {data: b.jsonl, name: other}]
"""
UNEQUAL = "rounds.clients=[{data: a.jsonl, r: 4}, {data: b.jsonl, r: 8}]"


def test_clients_are_experts_over_linears_with_data_of_their_own(folder: Path) -> None:
    config = load(ROUNDS)
    assert [(source.path, source.name) for source in config.data.train] == [("a.jsonl", "a"), ("b.jsonl", "other")]
    assert [(source.path, source.name) for source in config.data.eval] == [("b.jsonl", "a")]
    moe = config.moe
    assert (config.max_steps, moe.unit, moe.router.input, moe.num_experts, moe.top_k) == (20, "linear", "given", 2, 1)
    assert (config.lora.r, config.data.separate, config.moe.router_aux_loss_coef) == (16, True, 0)
    assert load(ROUNDS, UNEQUAL).lora.r == (4, 8)
    assert load(ROUNDS, "rounds.clients=[{data: a.jsonl, r: 4}, {data: b.jsonl, r: 4}]").lora.r == 4
    assert "local_steps: 20" in to_yaml(config)


REFUSED = [
    (("rounds.clients=[{data: a.jsonl, weight: 0.5}, {data: b.jsonl, weight: 0.6}]",), "rounds.clients: the weights have the sum 1.1, .*"),
    (("rounds.clients=[{data: a.jsonl, weight: 1}, {data: b.jsonl}]",), "rounds.clients: b has no weight, but others have one"),
    (("rounds.clients=[{data: a.jsonl, weight: 0}]",), r"rounds.clients\[0\].weight: must be a number > 0, got 0"),
    (("rounds.clients=[{data: c.jsonl}]",), r"rounds.clients\[0\].data: no such file or folder: c.jsonl"),
    (("rounds.clients=[{data: a.jsonl, eval: c.jsonl}]",), r"rounds.clients\[0\].eval: no such file or folder: c.jsonl"),
    (("rounds.clients=[{data: a.jsonl}, {data: b.jsonl, name: a}]",), r"rounds.clients\[1\].name: a is already the name of"),
    (("rounds.clients=[{data: a.jsonl, name: union}]",), r"rounds.clients\[0\].name: union is the name of a file beside"),
    (("rounds.clients=[{data: a.jsonl, r: 0}]",), r"rounds.clients\[0\].r: must be an integer >= 1, got 0"),
    (("rounds.clients=[{name: a}]",), r"rounds.clients\[0\].data: must be given"),
    (("rounds.local_steps=null",), "rounds.local_steps: must be given with rounds.clients"),
    (("max_steps=3",), "max_steps: cannot be given with rounds.clients.*give rounds.local_steps"),
    (("data.train=a.jsonl",), "data.train: cannot be given with rounds.clients.*give each client its data"),
    (("moe.unit=ffn",), "moe.unit: must be linear with rounds.clients"),
    (("lora.r=[4,8]",), "lora.r: must be one number with rounds.clients.*another r"),
    (("rounds.aggregate=refine", UNEQUAL), "rounds.aggregate: refine needs clients of one rank, but they have 4, 8.*use stack"),
    (("rounds.refine.ridge=1",), "rounds.refine.ridge: is read with rounds.aggregate=refine only, but it is average"),
    (("rounds.aggregate=refine", "rounds.refine.ridge=-1"), "rounds.refine.ridge: must be >= 0, got -1"),
    (("rounds.aggregate=stack",), "rounds.aggregate: stack has more terms than any client's.*rounds.merge_into_base=true"),
    (("rounds.merge_into_base=true",), "rounds.merge_into_base: is for rounds.aggregate=stack, but it is average"),
    (("rounds.aggregate=stack", "rounds.codec.up=0.5"), "rounds.codec.up: does not go together with rounds.aggregate=stack"),
    (
        ("rounds.aggregate=stack", "rounds.merge_into_base=true", "model.num_hidden_layers=1"),
        "rounds.merge_into_base: merges into the whole base model.*leave model.num_hidden_layers out",
    ),
    (("rounds.codec.up=0",), "rounds.codec.up: must be > 0"),
    (("rounds.aggregate=lego", "rounds.server.optimizer=adamw"), "rounds.server.optimizer: is read with rounds.aggregate=average only"),
    (("rounds.server.optimizer=adamw", UNEQUAL), "rounds.server.optimizer: needs clients of one rank"),
    (("lora.pairs=nola",), "lora.pairs: nola makes A and B of other numbers"),
    (("lora.pairs=fixed_a", "rounds.aggregate=lego"), "rounds.aggregate: lego changes A, which is fixed.*use average"),
    (("lora.gradient_rule=row_norm", "lora.eta=1", "lora.dropout=0"), "lora.gradient_rule: row_norm is not supported in rounds"),
    (("rounds.drop=[a]",), r"rounds.drop\[0\]: must be ROUND:CLIENT, got a.*the clients are a, other"),
    (("rounds.drop=['3:a']",), r"rounds.drop\[0\]: there are 2 rounds, got 3"),
    (("rounds.drop=['1:a','1:other']",), "rounds.drop: leaves no client in round 1"),
    (("rounds.clients=[]", "data.train=a.jsonl", "max_steps=2"), "rounds.count: is read with rounds.clients only"),
    (("data.separate=true",), "data.separate: cannot be given with rounds.clients"),
    (("deterministic=true",), "rounds.clients: does not go together with deterministic: it is of runs that follow each other"),
    (("moe.replay=check",), "moe.replay: does not go together with rounds.clients, whose adapters"),
    (("fssdp.plan=replay", "moe.replay=force"), "fssdp.plan: does not go together with rounds.clients, whose adapters"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "reason"), REFUSED, ids=lambda one: one if isinstance(one, str) else " ".join(one)[:60])
def test_what_does_not_go_together_is_refused(folder: Path, overrides: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){reason}"):
        load(ROUNDS, *overrides)


@pytest.mark.parametrize("overrides", [("deterministic=true",), ("moe.replay=check",), ("fssdp.plan=replay", "moe.replay=force")])
def test_what_clients_decide_is_not_refused_beside_it(folder: Path, overrides: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        load(ROUNDS, *overrides)
    assert len(error.value.problems) == 1


@pytest.mark.parametrize("first", ["hecate.config", "hecate.config.ranges", "hecate.apps.federate.section.settings"])
def test_the_section_is_there_whatever_is_imported_first(first: str) -> None:
    program = f"import {first}; from hecate.config.schema import LEAVES; assert 'rounds.count' in LEAVES"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_quantised_base_model_is_not_merged_into(folder: Path) -> None:
    stacks = ("rounds.aggregate=stack", "rounds.merge_into_base=true")
    assert load(ROUNDS, *stacks).rounds.merge_into_base
    (folder / "model/config.json").write_text(json.dumps({"quantization_config": {"bits": 4}}))
    with pytest.raises(
        ConfigError, match=r"(?s)rounds.merge_into_base: needs a base model whose weights are not quantised, but model has.*dequantise it"
    ):
        load(ROUNDS, *stacks)
    (folder / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"(?s)rounds.merge_into_base: needs.*but model.gguf has quantised ones.*dequantise it"):
        load(ROUNDS, *stacks, "model.name_or_path=model.gguf")


def test_separate_sources_have_equal_parts_of_a_step(folder: Path) -> None:
    sources = "{model: {name_or_path: model}, output_dir: runs/a, max_steps: 2, data: {train: [a.jsonl, b.jsonl], separate: true}}"
    assert load(sources, "gradient_accumulation_steps=2").data.separate
    with pytest.raises(
        ConfigError, match=r"(?s)data.separate: takes equally many sequences of each of 2 items, but a step has 3.*multiple of 2"
    ):
        load(sources, "micro_batch_size=3")
