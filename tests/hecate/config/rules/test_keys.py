"""Rules over several keys, given typed values and no file: what is wrong is said once, and what has a problem already is passed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hecate.config import DataSource
from hecate.config.rules.keys import check_values
from hecate.config.rules.megatron import check_megatron, check_megatron_ep

Problems = list[tuple[str, str, str]]


def found(values: dict[str, Any], *, claim: bool = True) -> Problems:
    problems: Problems = []
    check_values(values, lambda *problem: problems.append(problem), claim_output=claim)
    return problems


def test_keys_that_are_absent_have_their_problem_elsewhere() -> None:
    assert found({}) == []
    assert found({"moe.top_k": 3, "moe.family": "mixlora"}) == [], "the number of experts is unknown"
    assert found({"moe.num_experts": None, "moe.top_k": 9, "moe.family": "mixlora"}) == [
        ("moe.top_k", "must be from 1 to 8, the fewest experts of a layer (moe.num_experts), got 9", "")
    ]
    assert found({"moe.num_experts": None, "moe.top_k": 9, "moe.family": "moe_lora"}) == [], "the base model says how many"


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"lora.alpha": 2.5}, ("lora.alpha", "must be a whole number, got 2.5", "adapter files can store no other")),
        (
            {"moe.num_experts": (4, 0), "model.num_hidden_layers": 3},
            ("moe.num_experts", "lists 2 layers, but model.num_hidden_layers is 3", "give one number for all layers, or 3 of them"),
        ),
        (
            {"fssdp.plan": "calibrated", "fssdp.prefetch": 0},
            (
                "fssdp.prefetch",
                "must be >= 1 with fssdp.plan=calibrated, got 0",
                "use exact if nothing is to be gathered before the router",
            ),
        ),
        (
            {"data.packing": True, "data.seq_len": 7},
            ("data.seq_len", "must be >= 8 with data.packing, got 7", "or set data.packing to false"),
        ),
        (
            {"fssdp.shard_size": 3, "nproc": 4},
            ("fssdp.shard_size", "must divide the number of ranks, which is 4 (nproc), got 3", "null: all ranks"),
        ),
        ({"ray.workers": 2, "ray.min_workers": 3}, ("ray.min_workers", "must be from 1 to 2 (ray.workers), got 3", "")),
        ({"data.train": ()}, ("data.train", "must name at least one source", "")),
        (
            {"moe.family": "full", "lora.pairs": "fixed_a"},
            ("lora.pairs", "is about low-rank pairs, which experts of moe.family=full do not have, got fixed_a", "leave it out"),
        ),
        (
            {"moe.family": "full", "lora.gradient_rule": "row_norm"},
            ("lora.gradient_rule", "is about low-rank pairs, which experts of moe.family=full do not have, got row_norm", "leave it out"),
        ),
        (
            {"moe.family": "full", "lora.pairs": "nola"},
            ("lora.pairs", "is about low-rank pairs, which experts of moe.family=full do not have, got nola", "leave it out"),
        ),
        (
            {"moe.family": "full", "lora.use_rslora": True},
            ("lora.use_rslora", "is about low-rank pairs, which experts of moe.family=full do not have, got True", "leave it out"),
        ),
        (
            {"moe.family": "mixlora", "moe.upcycle_noise": 0.1, "moe.num_experts": 2},
            ("moe.upcycle_noise", "applies to moe.family=full only, but the family is mixlora", "leave it out"),
        ),
        (
            {"fssdp.policy": "static_ep", "fssdp.max_imbalance": 1.5},
            ("fssdp.max_imbalance", "is read by the policies auto and llep only, but fssdp.policy is static_ep", "leave it out"),
        ),
        (
            {"fssdp.policy": "full", "fssdp.memory_slots": 2},
            (
                "fssdp.memory_slots",
                "limits the replicas on a rank, but fssdp.policy=full has all experts on every rank, got 2",
                "set it to null, or take another policy",
            ),
        ),
        (
            {"save_total_limit": None, "save_retain_hours": 24},
            (
                "save_retain_hours",
                "needs save_total_limit, without which all checkpoints are kept",
                "set save_total_limit, or leave it out",
            ),
        ),
        ({"lora.r": (4, 0)}, ("lora.r[1]", "must be >= 1 and <= 2147483647, got 0", "")),
        ({"lora.r": ()}, ("lora.r", "must be a number, or a list with one for each expert", "")),
        (
            {"lora.r": (4, 2), "moe.num_experts": (2, 0, 3)},
            (
                "lora.r",
                "lists the ranks of 2 experts, but moe.num_experts gives layers 3",
                "give one rank for all, or every layer that has experts 2 of them",
            ),
        ),
        (
            {"lora.r": (4, 2), "moe.num_experts": 2, "lora.pairs": "fixed_a"},
            ("lora.r", "must be one number with lora.pairs=fixed_a, got a list of 2", "give one, or lora.pairs=plain"),
        ),
        (
            {"lora.r": (4, 2), "moe.num_experts": 2, "lora.gradient_rule": "row_norm", "lora.eta": 2.0},
            ("lora.r", "must be one number with lora.gradient_rule=row_norm, got a list of 2", "give one, or lora.gradient_rule=none"),
        ),
        (
            {"lora.r": (4, 2), "moe.family": "moe_lora", "moe.unit": "ffn"},
            ("lora.r", "must be one number with moe.family=moe_lora, got a list of 2", "give one"),
        ),
        (
            {"lora.pairs": "nola", "lora.nola.bases": 0},
            ("lora.nola.bases", "must be >= 1 and <= 2147483647, got 0", ""),
        ),
        (
            {"lora.pairs": "fixed_a", "lora.nola.bases": 8},
            ("lora.nola.bases", "is read with lora.pairs=nola only, got 8", "leave it out, or set lora.pairs=nola"),
        ),
        (
            {"lora.pairs": "nola", "lora.gradient_rule": "row_norm", "lora.eta": 2.0},
            (
                "lora.gradient_rule",
                "row_norm is about rows of A and B that train by themselves, but with lora.pairs=nola all rows share their coefficients",
                "leave it out, or use lora.pairs=plain",
            ),
        ),
        (
            {"lora.pairs": "nola", "lora.init_from": "adapter"},
            (
                "lora.init_from",
                "cannot be given with lora.pairs=nola: A and B of an adapter do not say by which coefficients they were made",
                "leave it out, or use lora.pairs=plain, which trains the adapter's own A and B on",
            ),
        ),
        (
            {"lora.gradient_rule": "row_norm", "lora.eta": 2.0, "lora.dropout": 0.05},
            ("lora.dropout", "must be 0 with lora.gradient_rule=row_norm, got 0.05", "set lora.dropout=0"),
        ),
        (
            {"lora.gradient_rule": "row_norm", "lora.eta": 2.0, "lora.alpha": 16.0},
            ("lora.alpha", "has no meaning with lora.gradient_rule=row_norm, got 16.0", "leave it out: the rule has eta in its place"),
        ),
        (
            {"lora.gradient_rule": "row_norm", "lora.eta": 2.0, "lora.use_rslora": True},
            ("lora.use_rslora", "has no meaning with lora.gradient_rule=row_norm, which scales nothing", "leave it out"),
        ),
        (
            {"lora.gradient_rule": "row_norm", "lora.eta": None},
            ("lora.eta", "must be given with lora.gradient_rule=row_norm", "ALLoRA's own values are 1, 1.414 and 2"),
        ),
        (
            {"lora.gradient_rule": "none", "lora.eta": 2.0},
            ("lora.eta", "is read with lora.gradient_rule=row_norm only, got 2.0", "leave it out, or set the rule"),
        ),
        ({"lora.gradient_rule": "row_norm", "lora.eta": 0.0}, ("lora.eta", "must be > 0, got 0.0", "")),
        ({"lora.gradient_rule": "row_norm", "lora.eta": -1.0}, ("lora.eta", "must be > 0, got -1.0", "")),
        (
            {"lora.gradient_rule": "row_norm", "lora.eta": 2.0, "kernels": "triton", "lora.r": 129},
            ("kernels", "triton takes LoRA ranks up to 128 with lora.gradient_rule=row_norm, but lora.r is 129", "use auto"),
        ),
    ],
)
def test_a_rule_over_two_keys_is_said_once(values: dict[str, Any], problem: tuple[str, str, str]) -> None:
    assert found(values) == [problem]


def test_two_sources_of_one_name_and_a_source_that_is_not_there(folder: Path) -> None:
    sources = tuple(DataSource(path=f"{file}.jsonl", name=name) for file, name in ("aa", "ba", "cc"))
    assert [(key, what) for key, what, _ in found({"data.eval": sources})] == [
        ("data.eval[1].name", "a is already the name of data.eval[0]"),
        ("data.eval[2].path", "no such file or folder: c.jsonl"),
    ]


@pytest.mark.parametrize(("resume", "claim", "problems"), [(False, True, 1), (True, True, 0), (False, False, 0)])
def test_a_used_output_folder_is_for_who_resumes_or_joins(folder: Path, resume: bool, claim: bool, problems: int) -> None:
    assert [key for key, *_ in found({"output_dir": "used", "resume": resume}, claim=claim)] == ["output_dir"] * problems


GPT = {"model.name_or_path": "gpt-moe-s", "model.tokenizer": "model", "moe.num_experts": None, "moe.top_k": None}
"""12 layers, 12 heads, 64 experts"""


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"moe.family": "mixlora"}, "moe.family", "must be full with model.front_end=megatron: the model is built from scratch"),
        ({"moe.num_experts": (4, 4)}, "moe.num_experts", "must be one number with model.front_end=megatron"),
        ({"model.num_hidden_layers": 99}, "model.num_hidden_layers", "99, but the model has only 12"),
        ({"moe.top_k": 65}, "moe.top_k", "must be from 1 to 64, the experts of a layer, got 65"),
        ({"model.tensor_parallel": 5}, "model.tensor_parallel", "must divide the model's 12 attention heads, got 5"),
        ({"model.tokenizer": None}, "model.tokenizer", "must be given with model.front_end=megatron"),
        ({"model.tokenizer": "used"}, "model.tokenizer", "no tokenizer.json in the folder used"),
    ],
)
def test_what_the_megatron_front_end_does_not_take(folder: Path, changes: dict[str, Any], key: str, words: str) -> None:
    problems: Problems = []
    check_megatron(GPT, lambda *problem: problems.append(problem))
    assert not problems
    check_megatron({**GPT, **changes}, lambda *problem: problems.append(problem))
    ((found_key, what, _),) = problems
    assert (found_key, what[: len(words)]) == (key, words)


def test_megatrons_own_layers_take_none_of_what_belongs_to_ours() -> None:
    problems: Problems = []
    given = {"fssdp.policy": "megatron_ep", "fssdp.prefetch": 2, "fssdp.redundancy": 0, "kernels": "torch"}
    check_megatron_ep({**given, "fssdp.policy": "auto"}, lambda *problem: problems.append(problem))
    assert not problems
    check_megatron_ep({**given, "model.front_end": "transformers"}, lambda *problem: problems.append(problem))
    assert [(key, hint) for key, _, hint in problems] == [
        ("fssdp.policy", "use static_ep: it places experts the same way"),
        ("fssdp.prefetch", "leave it out"),
        ("kernels", "leave it out"),
    ]
