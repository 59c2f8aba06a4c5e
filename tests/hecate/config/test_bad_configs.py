"""Each bad configuration is refused with one problem: its key, its line and the words of its text."""

from pathlib import Path

import pytest

from hecate.config import ConfigError, load_config
from hecate.config.schema import LEAF_TYPES

BASE = {
    "model": "{name_or_path: model}",
    "data": "{train: a.jsonl}",
    "output_dir": "runs/first",
    "max_steps": "10",
}

GPT = "name_or_path: gpt-moe-s, front_end: megatron, tokenizer: model"
"""12 attention heads"""

# What is put over BASE in the file (top-level key to YAML; None leaves it out), the problem's key, words of its text.
IN_FILE: list[tuple[dict[str, str | None], str, str]] = [
    # unknown and missing keys
    ({"lerning_rate": "1e-3"}, "lerning_rate", "did you mean learning_rate?"),
    ({"lora_alpha": "8"}, "lora_alpha", "write lora.alpha"),
    ({"num_experts": "8"}, "num_experts", "write moe.num_experts"),
    ({"lroa": "{r: 8}"}, "lroa", "unknown key"),
    ({"weight_decay_exclude": "[norms, bias]"}, "weight_decay_exclude[1]", "did you mean biases?"),
    ({"moe": "{topk: 1}"}, "moe.topk", "did you mean moe.top_k?"),
    ({"moe.top_k": "1"}, "moe.top_k", "nest it: moe: {top_k: ...}"),
    ({"1": "2"}, "1", "unknown key"),
    ({"? [a, b]\n": "2"}, "(a list or mapping)", "is not the name of a key"),
    ({"<<": "{seed: 1}"}, "<<", "merge keys"),
    ({"max_steps": None}, "max_steps", "must be given"),
    ({"data": None}, "data.train", "must be given"),
    ({"model": "{}"}, "model.name_or_path", "must be given"),
    ({"data": "{train: [{name: x}]}"}, "data.train[0].path", "must be given"),
    ({"data": "{train: [{path: a.jsonl, wieght: 2}]}"}, "data.train[0].wieght", "did you mean data.train[0].weight?"),
    # Megatron's layers
    ({"fssdp": "{policy: megatron_ep}"}, "fssdp.policy", "needs model.front_end=megatron"),
    # tensor parallelism
    ({"model": "{name_or_path: model, tensor_parallel: 2}"}, "model.tensor_parallel", "needs model.front_end=megatron, whose layers"),
    ({"model": f"{{{GPT}, tensor_parallel: 0}}", "moe": "{family: full}"}, "model.tensor_parallel", "must be >= 1"),
    ({"model": f"{{{GPT}, tensor_parallel: 8}}", "moe": "{family: full}"}, "model.tensor_parallel", "give one of 1, 2, 3, 4, 6, 12: each"),
    (
        {"model": f"{{{GPT}, tensor_parallel: 2}}", "moe": "{family: full}", "nproc": "3"},
        "model.tensor_parallel",
        "must divide the number of ranks, which is 3 (nproc), got 2\n    hint: give one of 1, 3: each",
    ),
    (
        {"model": f"{{{GPT}, tensor_parallel: 2}}", "moe": "{family: full}", "fssdp": "{redundancy: 1, shard_size: 2}"},
        "fssdp.redundancy",
        "does not work together with model.tensor_parallel and fssdp.shard_size yet",
    ),
    (
        {"model": f"{{{GPT}, tensor_parallel: 2}}", "moe": "{family: full}", "fssdp": "{redundancy: 2}", "nproc": "4"},
        "fssdp.redundancy",
        "2 needs more tensor groups than that",
    ),
    (
        {"model": f"{{{GPT}, tensor_parallel: 2}}", "moe": "{family: full}", "fssdp": "{policy: megatron_ep}"},
        "model.tensor_parallel",
        "belongs to hecate's own layers",
    ),
    # kernels
    ({"kernels": "cuda"}, "kernels", "must be one of auto, triton, torch, reference"),
    ({"kernels": "triton", "model": "{name_or_path: model, dtype: float64}"}, "kernels", "model.dtype is float64"),
    ({"kernels": "triton", "lora": "{r: 257}"}, "kernels", "ranks up to 256, but lora.r is 257"),
    # attention
    ({"model": "{name_or_path: model, attention: ring}"}, "model.attention", "must be one of auto, sdpa, flex, flash"),
    ({"model": "{name_or_path: model, attention: flash, dtype: float32}"}, "model.attention", "flash computes in bfloat16"),
    ({"model": "{name_or_path: model, attention: flex, dtype: float64}"}, "model.attention", "but model.dtype is float64"),
    ({"model": f"{{{GPT}, attention: sdpa}}", "moe": "{family: full}"}, "model.attention", "front_end=transformers only"),
    # types
    ({"seed": "many"}, "seed", "must be an integer, got many"),
    ({"seed": "1.5"}, "seed", "must be an integer, got 1.5"),
    ({"seed": '"1"'}, "seed", "remove the quotes"),
    ({"seed": "true"}, "seed", "must be an integer, got true"),
    ({"seed": "null"}, "seed", "must be an integer, got null"),
    ({"seed": "[1]"}, "seed", "must be an integer, got a list"),
    ({"seed": "9" * 5000}, "seed", "at most 18 digits"),
    ({"save_steps": "x"}, "save_steps", "must be an integer or null, got x"),
    ({"learning_rate": "fast"}, "learning_rate", "must be a number, got fast"),
    ({"resume": "1"}, "resume", "must be true or false, got 1"),
    ({"resume": '"true"'}, "resume", "remove the quotes"),
    ({"output_dir": "{a: b}"}, "output_dir", "must be text, got a mapping"),
    ({"output_dir": "null"}, "output_dir", "must be text, but unquoted null is null"),
    ({"output_dir": "''"}, "output_dir", "must not be empty"),
    ({"output_dir": "'???'"}, "output_dir", "must be given"),
    ({"lora": "16"}, "lora", "is a section"),
    ({"lora": None, "moe": ""}, "moe", "is a section"),
    ({"lora": "{target_modules: q_proj}"}, "lora.target_modules", "must be a list, got q_proj"),
    ({"moe": "{num_experts: [2, x]}"}, "moe.num_experts[1]", "must be an integer, got x"),
    ({"moe": "{num_experts: lots}"}, "moe.num_experts", "must be an integer or a list or null, got lots"),
    ({"data": "{train: [[a.jsonl]]}"}, "data.train[0]", "must be a path or a mapping, got a list"),
    ({"data": "{train: a.jsonl, eval: null}"}, "data.eval", "must be a list"),
    # YAML 1.1
    ({"output_dir": "NO"}, "output_dir", 'quote it: "NO"'),
    ({"output_dir": "yes"}, "output_dir", 'quote it: "yes"'),
    ({"output_dir": "On"}, "output_dir", 'quote it: "On"'),
    ({"output_dir": "off"}, "output_dir", 'quote it: "off"'),
    ({"output_dir": "012"}, "output_dir", "octal"),
    ({"output_dir": "12:30"}, "output_dir", "sexagesimal"),
    ({"output_dir": "1_000"}, "output_dir", "a number with _"),
    ({"output_dir": "1e3"}, "output_dir", "a number"),
    ({"output_dir": "2024"}, "output_dir", 'quote it: "2024"'),
    ({"output_dir": "0x1F"}, "output_dir", "hexadecimal"),
    ({"data": "{train: no}"}, "data.train[0].path", 'quote it: "no"'),
    ({"lora": "{target_modules: [q_proj, on]}"}, "lora.target_modules[1]", 'quote it: "on"'),
    ({"seed": "012"}, "seed", "octal number in YAML 1.1"),
    ({"seed": "08"}, "seed", "leading zero"),
    ({"seed": "0o12"}, "seed", "octal number in YAML 1.2"),
    ({"seed": "0b11"}, "seed", "binary"),
    ({"seed": "1_000"}, "seed", "write plain decimal digits"),
    ({"seed": "12:30"}, "seed", "sexagesimal"),
    ({"learning_rate": "1_0.5"}, "learning_rate", "a number with _"),
    ({"learning_rate": "010"}, "learning_rate", "octal"),
    ({"seed": "&s 1"}, "seed", "the anchor &s is not supported"),
    ({"seed": "!!int '1'"}, "seed", "the tag !!int is not supported"),
    ({"output_dir": "!!python/object/apply:os.getcwd []"}, "output_dir", "is not supported"),
    # ranges
    ({"max_steps": "0"}, "max_steps", "must be given, at least 1, or num_train_epochs in its place"),
    ({"max_steps": "-1"}, "max_steps", "must be >= 1 and <= 2147483647, got -1"),
    ({"num_train_epochs": "3"}, "num_train_epochs", "cannot be given together with max_steps"),
    ({"warmup_steps": "3", "warmup_ratio": "0.1"}, "warmup_steps", "cannot be given together with warmup_ratio"),
    ({"warmup_steps": "-1"}, "warmup_steps", "must be >= 0"),
    ({"max_steps": None, "num_train_epochs": "0"}, "num_train_epochs", "must be > 0"),
    ({"max_steps": "2147483648"}, "max_steps", "got 2147483648"),
    ({"seed": "-1"}, "seed", "must be >= 0"),
    ({"micro_batch_size": "-3"}, "micro_batch_size", "must be >= 1"),
    ({"learning_rate": "0"}, "learning_rate", "must be > 0, got 0.0"),
    ({"learning_rate": ".inf"}, "learning_rate", "must be a finite number, got .inf"),
    ({"learning_rate": "1e999"}, "learning_rate", "must be a finite number, got 1e999"),
    ({"max_grad_norm": ".NaN"}, "max_grad_norm", "must be a finite number, got .NaN"),
    ({"weight_decay": "nan"}, "weight_decay", "must be a finite number, got nan"),
    ({"weight_decay": "-0.1"}, "weight_decay", "must be >= 0"),
    ({"warmup_ratio": "1.5"}, "warmup_ratio", "must be >= 0 and <= 1, got 1.5"),
    ({"save_total_limit": "0"}, "save_total_limit", "must be >= 1"),
    ({"lora": "{dropout: 1}"}, "lora.dropout", "must be >= 0 and < 1, got 1.0"),
    ({"lora": "{alpha: 0}"}, "lora.alpha", "must be > 0"),
    ({"lora": "{alpha: 8.5}"}, "lora.alpha", "must be a whole number"),
    ({"fssdp": "{memory_slots: -1}"}, "fssdp.memory_slots", "must be >= 0"),
    ({"fssdp": "{reshard_interval: 0}"}, "fssdp.reshard_interval", "must be >= 1"),
    ({"fssdp": "{shard_size: 0}", "nproc": "2"}, "fssdp.shard_size", "must be >= 1"),
    ({"fssdp": "{prefetch: -1}"}, "fssdp.prefetch", "must be >= 0"),
    ({"data": "{train: a.jsonl, seq_len: 7}"}, "data.seq_len", "must be >= 8 with data.packing, got 7"),
    ({"data": "{train: a.jsonl, seq_len: 1, packing: false}"}, "data.seq_len", "must be >= 2"),
    ({"data": "{train: {path: a.jsonl, weight: 0}}"}, "data.train[0].weight", "must be > 0, got 0.0"),
    # choices
    ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type", "did you mean cosine?"),
    ({"fssdp": "{policy: fastmoe}"}, "fssdp.policy", "must be one of static_ep, full, fastermoe,"),
    ({"fssdp": "{max_imbalance: 0.9}"}, "fssdp.max_imbalance", "must be >= 1"),
    ({"moe": "{family: smora}"}, "moe.family", "must be one of mixlora, full, moe_lora, got smora"),
    ({"model": "{name_or_path: model, dtype: float16}"}, "model.dtype", "float32, bfloat16, float64, got float16"),
    ({"data": "{train: '*.csv'}"}, "data.train[0].path", "no file matches *.csv"),
    ({"data": "{train: {path: a.jsonl, fields: {question: prompt}}}"}, "data.train[0].fields.question", "unknown key"),
    ({"data": "{train: {path: a.jsonl, fields: prompt}}"}, "data.train[0].fields", "must be a mapping or null, got prompt"),
    ({"data": "{train: {path: a.jsonl, format: csv}}"}, "data.train[0].format", "alpaca, sharegpt, text, tokens, got csv"),
    ({"fssdp": "{plan: true_loads}"}, "fssdp.plan", "must be one of history, calibrated, exact"),
    # keys that must fit each other
    ({"fssdp": "{plan: calibrated, prefetch: 0}"}, "fssdp.prefetch", "must be >= 1 with fssdp.plan=calibrated"),
    ({"fssdp": "{shard_size: 3}", "nproc": "4"}, "fssdp.shard_size", "must divide the number of ranks, which is 4 (nproc), got 3"),
    ({"fssdp": "{shard_size: 2, redundancy: 2}", "nproc": "4"}, "fssdp.redundancy", "2 needs more sharding groups than that"),
    ({"fssdp": "{verify_copies_steps: 1, redundancy: 0}"}, "fssdp.verify_copies_steps", "set fssdp.redundancy=1, or 2"),
    ({"moe": "{num_experts: 1}"}, "moe.top_k", "must be from 1 to 1"),
    ({"moe": "{train_router: true}"}, "moe.train_router", "applies to moe.family=moe_lora only, but the family is mixlora"),
    ({"model": "{name_or_path: model, shard_non_experts: true}"}, "model.shard_non_experts", "applies to moe.family=moe_lora only"),
    ({"moe": "{family: moe_lora}", "lora": "{init_from: model}"}, "lora.init_from", "no adapter_config.json in model"),
    ({"lora": "{moe_rank_scaling: true}"}, "lora.moe_rank_scaling", "applies to moe.family=moe_lora only, but the family is mixlora"),
    (
        {"moe": "{family: moe_lora}", "lora": "{moe_rank_scaling: true, pairs: nola}"},
        "lora.moe_rank_scaling",
        "needs lora.pairs=plain, got nola",
    ),
    ({"moe": "{family: moe_lora}", "lora": "{experts: [1, 2, 1]}"}, "lora.experts", "lists an expert twice, got [1, 2, 1]"),
    ({"moe": "{family: moe_lora}", "lora": "{experts: [[1, 2], [3, 3]]}"}, "lora.experts", "lists an expert twice, got [3, 3]"),
    ({"moe": "{family: moe_lora}", "lora": "{experts: []}"}, "lora.experts", "names no expert"),
    ({"moe": "{family: moe_lora}", "lora": "{experts: [[], []]}"}, "lora.experts", "names no expert"),
    ({"moe": "{family: moe_lora}", "lora": "{experts: [1, [2]]}"}, "lora.experts", "has numbers beside lists"),
    ({"moe": "{family: moe_lora}", "lora": "{experts: [[0, -2]]}"}, "lora.experts[0][1]", "must be >= 0 and <= 2147483647, got -2"),
    ({"lora": "{experts: [1]}"}, "lora.experts", "applies to moe.family=moe_lora only, but the family is mixlora"),
    ({"moe": "{family: moe_lora}", "lora": "{hottest_experts: 2}"}, "lora.hottest_experts", "needs lora.loads"),
    ({"moe": "{family: moe_lora}", "lora": "{loads: runs/a/loads}"}, "lora.loads", "is read with lora.hottest_experts only"),
    (
        {"moe": "{family: moe_lora}", "lora": "{hottest_experts: 2, loads: runs/a/loads, experts: [1]}"},
        "lora.hottest_experts",
        "cannot be given with lora.experts",
    ),
    (
        {"moe": "{family: moe_lora}", "lora": "{hottest_experts: 2, loads: runs/a/loads, pairs: fixed_a}"},
        "lora.hottest_experts",
        "needs lora.pairs=plain, got fixed_a",
    ),
    ({"moe": "{num_experts: 4, allocation: [2, 4]}"}, "moe.allocation", "cannot be given together with moe.num_experts"),
    ({"moe": "{allocation: [2, 0, 3], top_k: 3}"}, "moe.top_k", "must be from 1 to 2, the fewest experts of a layer (moe.allocation)"),
    ({"moe": "{allocation: [0, 0]}"}, "moe.allocation", "at least one layer"),
    ({"moe": "{allocation: [4, -1]}"}, "moe.allocation[1]", "must be >= 0"),
    (
        {"model": "{name_or_path: model, num_hidden_layers: 3}", "moe": "{allocation: [2, 4, 6, 8]}"},
        "moe.allocation",
        "has 4 groups of layers, but model.num_hidden_layers is 3",
    ),
    ({"moe": "{family: moe_lora, allocation: [2, 4]}"}, "moe.allocation", "the model has its own number of experts in each layer"),
    ({"moe": "{family: full, unit: linear}"}, "moe.unit", "linear does not go together with moe.family=full"),
    ({"moe": "{family: moe_lora, unit: linear}"}, "moe.unit", "linear does not go together with moe.family=moe_lora"),
    ({"model": f"{{{GPT}}}", "moe": "{family: full, unit: linear}"}, "moe.unit", "linear needs model.front_end=transformers"),
    ({"moe": "{unit: layer}"}, "moe.unit", "must be one of ffn, linear, got layer"),
    ({"lora": "{init_from: runs}"}, "lora.init_from", "no adapter_config.json in runs"),
    ({"lora": "{init_from: runs}", "moe": "{family: full}"}, "lora.init_from", "is about low-rank pairs, which experts of moe.family=full"),
    ({"lora": "{init_from: runs}", "moe": "{unit: linear}"}, "lora.init_from", "no adapter_config.json in runs"),
    ({"moe": "{num_experts: [8, 0, 3], top_k: 4}"}, "moe.top_k", "must be from 1 to 3"),
    ({"moe": "{num_experts: 0}"}, "moe.num_experts", "must be >= 1"),
    ({"moe": "{num_experts: []}"}, "moe.num_experts", "at least one layer"),
    ({"moe": "{num_experts: [0, 0]}"}, "moe.num_experts", "at least one layer"),
    ({"moe": "{num_experts: [4, -1]}"}, "moe.num_experts[1]", "must be >= 0"),
    (
        {"model": "{name_or_path: model, num_hidden_layers: 3}", "moe": "{num_experts: [4, 4]}"},
        "moe.num_experts",
        "lists 2 layers, but model.num_hidden_layers is 3",
    ),
    ({"eval": "{generate: true}"}, "eval.generate", "needs data.eval"),
    ({"eval_steps": "5"}, "eval_steps", "needs data.eval"),
    ({"lora": "{target_modules: []}"}, "lora.target_modules", "at least one module"),
    ({"lora": "{target_modules: [q_proj, q_proj]}"}, "lora.target_modules[1]", "q_proj is listed twice"),
    ({"lora": "{target_modules: ['.*_proj']}"}, "lora.target_modules[0]", "must be a module's name"),
    ({"data": "{train: []}"}, "data.train", "at least one source"),
    ({"data": "{train: [a.jsonl, a.txt]}"}, "data.train[1].name", "a is already the name of data.train[0]"),
    ({"data": "{train: {path: a.jsonl, name: 'my data'}}"}, "data.train[0].name", "got my data"),
    ({"data": "{train: a.jsonl, roles_to_train: [gpt]}"}, "data.roles_to_train[0]", "human is user, and gpt is assistant"),
    (
        {"data": "{train: {path: a.jsonl, roles_to_train: [bot]}}"},
        "data.train[0].roles_to_train[0]",
        "must be one of system, developer, user",
    ),
    ({"data": "{train: a.jsonl, train_on_eos: always}"}, "data.train_on_eos", "must be one of turn, all, last, none"),
    ({"data": "{train: {path: a.jsonl, sample_by: file}}"}, "data.train[0].sample_by", "applies to plain text only"),
    ({"data": "{train: {path: a.txt, delimiter: ';'}}"}, "data.train[0].delimiter", "applies to CSV files only"),
    ({"data": "{train: {path: a.jsonl, delimiter: '||'}}"}, "data.train[0].delimiter", "must be one sign"),
    ({"data": "{train: 'no/dataset_info.json:x'}"}, "data.train[0].path", "no/dataset_info.json cannot be read"),
    # files
    ({"model": "{name_or_path: org/model}"}, "model.name_or_path", "hub: true fetches org/model from the hub"),
    ({"model": "{name_or_path: used}"}, "model.name_or_path", "no config.json"),
    ({"model": "{name_or_path: a.jsonl}"}, "model.name_or_path", "neither a folder nor a .gguf file"),
    ({"model": "{name_or_path: 'package:no_such_package'}"}, "model.name_or_path", "no Python package no_such_package"),
    ({"model": "{name_or_path: 'package:__main__'}"}, "model.name_or_path", "__main__"),
    ({"data": "{train: c.jsonl}"}, "data.train[0].path", "no such file or folder: c.jsonl"),
    ({"data": "{train: a.jsonl, eval: ['~/c.jsonl']}"}, "data.eval[0].path", "~ is not expanded"),
    ({"topology": "cluster.yaml"}, "topology", "no such file: cluster.yaml"),
    ({"topology": "no such preset"}, "topology", "must be auto, a preset's name or a YAML file"),
    ({"output_dir": "used"}, "output_dir", "choose another, or pass resume=true"),
    ({"output_dir": "a.jsonl/first"}, "output_dir", "a.jsonl is not a folder"),
    ({"output_dir": "a.jsonl"}, "output_dir", "a.jsonl is not a folder"),
    ({"output_dir": "runs/my run"}, "output_dir", "got my run"),
    ({"output_dir": "runs/.."}, "output_dir", "last component"),
    ({"output_dir": "/"}, "output_dir", "last component"),
    ({"output_dir": "runs/" + "x" * 65}, "output_dir", "1 to 64"),
    ({"output_dir": "'runs/a\\b'"}, "output_dir", "last component"),
    ({"output_dir": '"runs/a\\0b"'}, "output_dir", "null characters"),
    # references
    ({"output_dir": "runs/${oc.env:HOME}"}, "output_dir", "a secret would end up in the saved config"),
    ({"output_dir": "runs/${oc.decode:x}"}, "output_dir", "only ${key}"),
    ({"output_dir": "runs/${sead}"}, "output_dir", "did you mean seed?"),
    ({"output_dir": "runs/${lora}"}, "output_dir", "${lora} refers to no key"),
    ({"output_dir": "runs/${data.train}"}, "output_dir", "refers to a list"),
    ({"output_dir": "runs/${seed"}, "output_dir", "only ${key}"),
    ({"output_dir": "runs/${${seed}}"}, "output_dir", "only ${key}"),
    ({"output_dir": "runs/\\${seed}"}, "output_dir", "no escape"),
    ({"output_dir": "runs/${save_steps}"}, "output_dir", "${save_steps} is null"),
    ({"output_dir": "${save_steps}"}, "output_dir", "None"),
    ({"output_dir": "runs/${output_dir}"}, "output_dir", "Recursive interpolation"),
    ({"seed": "${model.dtype}"}, "seed", "could not be converted to Integer"),
    ({"seed": "1${nproc}"}, "seed", "must be one ${key} alone"),
    ({"lr_scheduler_type": "${model.dtype}"}, "lr_scheduler_type", "expected one of"),
    ({"lora": "{dropout: '${max_steps}'}"}, "lora.dropout", "must be >= 0 and < 1, got 10.0"),
    ({"data": "{train: [{path: a.jsonl, weight: '${model.dtype}'}]}"}, "data.train", "could not be converted to Float"),
]


def problems(text: str | bytes, *overrides: str) -> ConfigError:
    Path("run.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as caught:
        load_config("run.yaml", list(overrides))
    return caught.value


@pytest.mark.parametrize(("changes", "key", "words"), IN_FILE, ids=lambda value: str(value)[:60])
def test_bad_file(folder: Path, changes: dict[str, str | None], key: str, words: str) -> None:
    values = {**BASE, **changes}
    text = "".join(f"{name}: {value}\n" for name, value in values.items() if value is not None)
    error = problems(text)
    assert [p.key for p in error.problems] == [key]
    assert words in str(error)
    (problem,) = error.problems
    assert problem.source == "run.yaml"
    given = next((name for name in changes if changes[name] is not None), None)
    if given is not None and "\n" not in given and len(changes) == 1:
        line = next(i for i, row in enumerate(text.splitlines(), 1) if row.startswith(f"{given}:"))
        assert problem.line == line
    assert str(problem).count("\n") <= 1
    assert len(str(problem)) < 400


ON_COMMAND_LINE = [
    ("seed", "seed", "must have the form key=value"),
    ("=3", "=3", "must have the form key=value"),
    ("seed=", "seed", "write seed=VALUE, or leave it out"),
    ("data.eval=", "data.eval", "write data.eval=[] for none"),
    ("data.eval=null", "data.eval", "must be a list, got null\n    hint: write [] for an empty one"),
    ("data.train=", "data.train", "write data.train=VALUE, or leave it out"),
    ("moe.top_k=", "moe.top_k", "write moe.top_k=null for none"),
    ("--seed=3", "--seed", "write seed=... without signs"),
    ("--max-grad-norm=3", "--max-grad-norm", "write max_grad_norm=..."),
    ("+lora.r=3", "+lora.r", "write lora.r=..."),
    ("lora.rr=3", "lora.rr", "did you mean lora.r?"),
    ("lora.r.x=3", "lora.r.x", "unknown key"),
    ("data.train[0].weight=3", "data.train[0].weight", "unknown key"),
    ("output_dir=NO", "output_dir", "on a command line '\"NO\"'"),
    ("output_dir=runs/a #1", "output_dir", "YAML reads only runs/a of runs/a #1"),
    ("output_dir=@x", "output_dir", "put the value in quotes"),
    ("output_dir=a: b", "output_dir", "got a mapping"),
    ("output_dir=*a", "output_dir", "the alias *a is not supported"),
    ("output_dir=${oc.env:HOME}", "output_dir", "environment variables"),
    ("output_dir=\udce9", "output_dir", "unprintable character U+DCE9"),
    ("seed=012", "seed", "octal"),
    ("lora={r: 0}", "lora.r", "must be >= 1"),
    ("lora={r: 1, r: 2}", "lora.r", "given twice"),
    ("lora=3", "lora", "is a section"),
    ("moe.top_k=9", "moe.top_k", "must be from 1 to 8"),
    ("moe.num_experts=[[[[[[[[[1]]]]]]]]]", "moe.num_experts", "nested more than 8 levels"),
]


@pytest.mark.parametrize(("override", "key", "words"), ON_COMMAND_LINE, ids=lambda value: ascii(value)[:60])
def test_bad_override(folder: Path, override: str, key: str, words: str) -> None:
    error = problems("".join(f"{name}: {value}\n" for name, value in BASE.items()), override)
    assert [(p.key, p.source, p.line) for p in error.problems] == [(key, "command line", None)]
    assert words in str(error)


def test_a_value_that_the_shell_has_split_is_one_problem(folder: Path) -> None:
    words = ["data.train=[{path:", "qa.csv,", "fields:", "{prompt:", "q,", "completion:", "a}}]"]
    error = problems("".join(f"{name}: {value}\n" for name, value in BASE.items()), *words, "lora.rr=3")
    assert [p.key for p in error.problems] == ["data.train", "lora.rr"]
    assert "the shell splits words at blanks; put it in quotes: data.train='...'" in str(error)


def test_an_override_given_twice_is_refused(folder: Path) -> None:
    error = problems("".join(f"{name}: {value}\n" for name, value in BASE.items()), "lora.r=1", "lora={r: 2}")
    assert [p.key for p in error.problems] == ["lora.r"]
    assert "given twice on the command line" in str(error)


def test_a_problem_is_not_reported_again_by_those_who_refer_to_it(folder: Path) -> None:
    text = "".join(f"{name}: {value}\n" for name, value in BASE.items())
    error = problems(text + "seed: x\nmicro_batch_size: '${seed}'\nlogging_steps: '${micro_batch_size}'\n")
    assert [p.key for p in error.problems] == ["seed"]


FILES: list[tuple[bytes, int | None, str]] = [
    (b"", None, "is empty"),
    (b"# only a comment\n", None, "is empty"),
    (b"---\n", None, "is empty"),
    (b"just words\n", 1, "must be a mapping"),
    (b"- a\n- b\n", 1, "must be a mapping"),
    (b"&a {seed: 1}\n", 1, "must be a mapping"),
    (b"\x7fELF\x00\x00", None, "binary"),
    ("seed: 1\n".encode("utf-16"), None, "UTF-8"),
    (b"seed: 1\noutput_dir: caf\xe9\n", 2, "is not UTF-8: byte 0xe9"),
    (b"seed: 1\noutput_dir: a\x1bb\n", 2, "unprintable character U+001B"),
    (b"seed: 1\n\tlora: 2\n", 2, "indent with spaces, not tabs"),
    (b"seed: [1\nmax_steps: 2\n", 2, "not YAML"),
    (b"seed: 1\n---\nseed: 2\n", 2, "a second document"),
    (b"x: " + b"[" * 20_000 + b"\n", 1, "nested more than 8 levels"),
    (b"".join(b" " * i + b"a:\n" for i in range(300)), 9, "nested more than 8 levels"),
    (b"seed: 1 #" + b"x" * 300_000, None, "larger than 256 KiB"),
]


@pytest.mark.parametrize(("raw", "line", "words"), FILES, ids=lambda value: ascii(value)[:40])
def test_bad_bytes(folder: Path, raw: bytes, line: int | None, words: str) -> None:
    error = problems(raw)
    assert [(p.key, p.line) for p in error.problems] == [("", line)]
    assert words in str(error)


def test_missing_file_and_folder(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        load_config("none.yaml", [])
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(folder, [])
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config("a\0b", [])


def test_references_that_multiply_are_refused_before_they_are_written_out(folder: Path) -> None:
    """A few lines of some hundred characters would make a text that fits no memory."""
    keys = [key for key, kind in LEAF_TYPES.items() if kind in (str, str | None) and "." in key][:9]
    assert len(keys) >= 5
    before, given = "output_dir", []
    for key in keys:
        given.append(f"{key}=" + f"${{{before}}}" * 30)
        before = key
    error = problems("data: {train: a.jsonl}\noutput_dir: runs/first\nmax_steps: 1\n", *given)
    assert "what it refers to makes a text of more than 16384 characters" in str(error)
