import os
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import pytest

from hecate.config import ConfigError, DataSource
from hecate.config.files.presets import run_presets
from hecate.config.load import MAX_BYTES, load_config
from hecate.config.schema import LEAF_TYPES, RANGES, REQUIRED, SECTIONS, FieldNames
from hecate.parallel.values.policy_names import renamed
from tests.hecate.config.making import MINIMAL, load


def test_defaults_are_those_documented(folder: Path) -> None:
    config = load(MINIMAL)
    assert config.data.train == (DataSource(path="a.jsonl", name="a", weight=1.0, format="auto"),)
    assert config.data.eval == ()
    assert (config.data.seq_len, config.data.packing, config.data.on_bad_sample) == (512, True, "skip_long")
    assert (config.lora.r, config.lora.alpha, config.lora.dropout, config.lora.use_rslora) == (16, 32.0, 0.05, False)
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert config.lora.target_modules == modules
    assert (config.moe.family, config.moe.num_experts, config.moe.top_k) == ("mixlora", 8, 2)
    assert config.moe.router_aux_loss_coef == 0.001
    assert (config.fssdp.policy, config.fssdp.load_window, config.fssdp.memory_slots) == ("auto", 5, None)
    assert (config.learning_rate, config.max_grad_norm, config.lr_scheduler_type) == (2e-4, 1.0, "cosine")
    assert (config.eval_steps, config.save_steps, config.nproc, config.topology) == (None, None, None, "auto")
    assert (config.eval.generate, config.eval.max_new_tokens, config.eval.batch_size) == (False, 32, 16)


@pytest.mark.parametrize("overrides", [("fssdp.policy=hecate",), ("fssdp.policy='hecate'",), ()])
def test_a_policys_former_name_is_read_and_a_line_says_so(
    overrides: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = MINIMAL if overrides else MINIMAL + "fssdp: {policy: hecate}\n"
    assert load(text, *overrides).fssdp.policy == "hecate_paper"
    assert capsys.readouterr().err == f"hecate: {renamed('fssdp.policy', 'hecate')}\n"
    load_config(folder / "run.yaml", overrides, claim_output=False)  # as every rank does
    assert not capsys.readouterr().err


def test_sources_as_paths_and_mappings(folder: Path) -> None:
    train = "[a.jsonl, {path: b.jsonl, name: sums, weight: 2, format: alpaca}]"
    config = load(MINIMAL.replace("a.jsonl", train), "data.eval=b.jsonl")
    assert config.data.train == (
        DataSource(path="a.jsonl", name="a"),
        DataSource(path="b.jsonl", name="sums", weight=2.0, format="alpaca"),
    )
    assert config.data.eval == (DataSource(path="b.jsonl", name="b"),)


def test_sources_take_what_they_do_not_say_themselves_from_the_whole_of_the_data(folder: Path) -> None:
    train = "[a.jsonl, {path: b.jsonl, roles_to_train: [], train_on_eos: last}]"
    data = load(MINIMAL.replace("a.jsonl", train), "data.roles_to_train=[user, assistant]", "data.train_on_eos=none").data
    first, second = data.settled(data.train)
    assert (first.roles_to_train, first.train_on_eos) == (("user", "assistant"), "none")
    assert (second.roles_to_train, second.train_on_eos) == ((), "last")


def test_a_data_set_of_llama_factory_is_named_in_its_own_file(folder: Path) -> None:
    (folder / "dataset_info.json").write_text('{"sums": {"file_name": "a.jsonl", "columns": {"prompt": "q", "response": "output"}}}')
    data = load(MINIMAL.replace("a.jsonl", "dataset_info.json:sums"), "data.eval=[{path: 'dataset_info.json:sums', weight: 2}]").data
    fields = FieldNames(instruction="q")
    assert data.train == (DataSource(path="a.jsonl", name="sums", format="alpaca", fields=fields),)
    assert data.eval == (DataSource(path="a.jsonl", name="sums", format="alpaca", fields=fields, weight=2.0),)


def test_numbers_take_the_type_of_their_field(folder: Path) -> None:
    config = load(MINIMAL, "lora.alpha=16", "learning_rate=1e-3", "weight_decay=.5", "max_grad_norm=null")
    assert isinstance(config.lora.alpha, float)
    assert (config.lora.alpha, config.learning_rate, config.weight_decay) == (16.0, 0.001, 0.5)
    assert config.max_grad_norm is None


@pytest.mark.parametrize(("word", "value"), [("true", True), ("yes", True), ("OFF", False), ("no", False)])
def test_yes_and_no_are_read_where_a_truth_value_is_expected(folder: Path, word: str, value: bool) -> None:
    assert load(MINIMAL + f"gradient_checkpointing: {word}\n").gradient_checkpointing is value


def test_quoted_words_are_text(folder: Path) -> None:
    assert load(MINIMAL.replace("runs/first", '"NO"')).output_dir == "NO"
    assert load(MINIMAL, "output_dir='012'").output_dir == "012"


def test_an_override_replaces_the_files_value_even_a_bad_one(folder: Path) -> None:
    assert load(MINIMAL + "seed: 012\n", "seed=7").seed == 7
    assert load(MINIMAL + "lora: {r: 4, alpha: 8}\n", "lora={r: 2}").lora.r == 2
    assert load(MINIMAL + "lora: {r: 4, alpha: 8}\n", "lora={r: 2}").lora.alpha == 8.0


def test_references_repeat_other_keys(folder: Path) -> None:
    text = MINIMAL.replace("runs/first", "runs/${model.dtype}-${seed}") + "seed: 3\nmoe: {top_k: '${seed}'}\n"
    config = load(text, "data.train=[{path: '${model.name_or_path}', name: 'm${seed}', weight: '${lora.r}'}]")
    assert config.output_dir == "runs/auto-3"
    assert config.moe.top_k == 3
    assert config.data.train == (DataSource(path="model", name="m3", weight=16.0),)


def test_experts_per_layer(folder: Path) -> None:
    assert load(MINIMAL).moe.experts_per_layer(3) == (8, 8, 8)
    listed = load(MINIMAL, "moe.num_experts=[4,0,3]", "model.num_hidden_layers=3").moe
    assert listed.experts_per_layer(3) == (4, 0, 3)
    with pytest.raises(ValueError, match="lists 3 layers, but the model has 4"):
        listed.experts_per_layer(4)


def test_the_config_is_frozen_and_plain(folder: Path) -> None:
    config = load(MINIMAL, "moe.num_experts=[4,4]")

    def walk(value: Any) -> None:
        if is_dataclass(value) and not isinstance(value, type):
            with pytest.raises(FrozenInstanceError):
                setattr(value, fields(value)[0].name, None)
            for item in fields(value):
                walk(getattr(value, item.name))
        elif isinstance(value, tuple):
            for item in value:
                walk(item)
        else:
            assert type(value) in (int, float, str, bool, type(None))

    walk(config)
    assert hash(config) == hash(pickle.loads(pickle.dumps(config)))  # noqa: S301


def test_a_used_output_folder_may_be_resumed(folder: Path) -> None:
    assert load(MINIMAL.replace("runs/first", "used"), "resume=true").resume is True
    (folder / "fresh").mkdir()
    assert load(MINIMAL.replace("runs/first", "fresh")).output_dir == "fresh"


def test_later_ranks_find_the_output_folder_in_use(folder: Path) -> None:
    Path("run.yaml").write_text(MINIMAL.replace("runs/first", "used"))
    assert load_config("run.yaml", claim_output=False).output_dir == "used"
    with pytest.raises(ConfigError, match="output_dir: used exists and is not empty"):
        load_config("run.yaml")


def test_a_file_may_be_as_large_as_the_limit_and_no_larger(folder: Path) -> None:
    filling = "#" * (MAX_BYTES - len(MINIMAL))
    assert load(MINIMAL + filling).max_steps == 10
    with pytest.raises(ConfigError, match="is larger than 256 KiB"):
        load(MINIMAL + filling + "#")


def test_a_byte_order_mark_and_a_document_start_are_no_matter(folder: Path) -> None:
    assert load("\ufeff---\n# a comment\n" + MINIMAL).max_steps == 10


def test_keys_of_the_design_are_there() -> None:
    assert set(REQUIRED) == {"model.name_or_path", "data.train", "output_dir"}
    inner = {"lora.nola", "lora.shards", "moe.router", "rounds.refine", "rounds.server", "rounds.codec"}
    assert set(SECTIONS) == {
        "model",
        "data",
        "lora",
        "moe",
        "fssdp",
        "eval",
        "ray",
        "rounds",
        "privacy",
        "muon",
        "lr_scheduler_kwargs",
        *inner,
    }


def test_every_number_has_a_range() -> None:
    def holds_numbers(hint: Any) -> bool:
        return hint in (int, float) or any(map(holds_numbers, get_args(hint)))

    numbers = {key for key, hint in LEAF_TYPES.items() if holds_numbers(hint)}
    assert numbers - {"moe.num_experts", "moe.allocation"} == set(RANGES)


def test_loading_imports_neither_torch_nor_numpy(folder: Path) -> None:
    Path("run.yaml").write_text(MINIMAL)
    code = (
        "import sys; from hecate.config import load_config, to_yaml\n"
        "c = load_config('run.yaml', ['seed=1']); to_yaml(c)\n"
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": root}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert out.stdout.strip() == "[]"


def test_all_problems_come_in_one_report_in_the_order_of_the_file(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load("model: {name_or_path: model, dtyp: auto}\nlora:\n  r: 0\n  r: 1\nseed: NO\n", "moe.top_k=9", "nproc=0")
    found = [(p.key, p.source, p.line) for p in caught.value.problems]
    assert found == [
        ("model.dtyp", "run.yaml", 1),
        ("lora.r", "run.yaml", 3),
        ("lora.r", "run.yaml", 4),
        ("seed", "run.yaml", 5),
        ("data.train", "run.yaml", None),
        ("max_steps", "run.yaml", None),
        ("moe.top_k", "command line", None),
        ("nproc", "command line", None),
        ("output_dir", "run.yaml", None),
    ]
    assert "run.yaml:1: model.dtyp: unknown key\n    hint: did you mean model.dtype?" in str(caught.value)


def test_the_report_crosses_processes_and_stays_short(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(MINIMAL, f"report_to=[{'wandbb,' * 199}wandbb]")
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert again.problems == caught.value.problems
    assert len(again.problems) == 201  # and that one is named twice
    assert str(again) == str(caught.value)
    assert str(again).endswith("... and 181 more")


def test_every_unknown_key_is_shown_on_one_line(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(MINIMAL + "".join(f"zz{i}: 1\n" for i in range(30)) + "lora_r: 8\n", "moe.num_experts=-1")
    lines = str(caught.value).splitlines()
    assert [f"run.yaml:{5 + i}: zz{i}: unknown key" for i in range(30)] == [line.partition(";")[0] for line in lines[:30]]
    assert lines[30] == "run.yaml:35: lora_r: unknown key; write lora.r"
    assert "moe.num_experts: must be" in lines[31]


@pytest.mark.parametrize("none", ["none", "[none]", "[]"])
def test_no_tracker_by_transformers_word(none: str, folder: Path) -> None:
    assert load(MINIMAL, f"report_to={none}").report_to == ()
    assert load(f"{MINIMAL}report_to: {none}\n").report_to == ()


def test_trackers_beside_none_and_all_of_them_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="hint: name each that is wanted"):
        load(MINIMAL, "report_to=[all]")
    with pytest.raises(ConfigError, match="must be one of tensorboard, wandb, mlflow, trackio, got none"):
        load(MINIMAL, "report_to=[none,wandb]")


def test_a_preset_is_found_by_its_name_wherever_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config("mola")
    assert {problem.key.partition("[")[0] for problem in caught.value.problems} == {"data.train", "data.eval"}
    assert {problem.source for problem in caught.value.problems} == {str(run_presets()["mola"])}
    with pytest.raises(ConfigError, match=r"molas: no such file\n    hint: give the path of a YAML file, or one of the presets .*, mola, "):
        load_config("molas")
    with pytest.raises(
        ConfigError, match=r"max_steps=3: stands where the configuration must be\n    hint: give the configuration or run first"
    ):
        load_config("max_steps=3")
    (tmp_path / "run").mkdir()
    with pytest.raises(
        ConfigError, match=r"run: is a folder that has no config\.yaml\n    hint: give the path of a YAML file, or the folder of a run"
    ):
        load_config("run")
    (tmp_path / "run" / "config.yaml").write_text("unsense: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run/config\.yaml:1: unsense: unknown key"):
        load_config("run")
    (tmp_path / "mola").write_text("nonsense: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="nonsense: unknown key"):
        load_config("mola")


def test_a_length_on_the_command_line_replaces_the_files_in_either_unit(folder: Path) -> None:
    in_epochs = MINIMAL.replace("max_steps: 10", "num_train_epochs: 2.5")
    lengths = [
        (config.max_steps, config.num_train_epochs)
        for config in (
            load(in_epochs),
            load(in_epochs, "max_steps=7"),
            load(MINIMAL, "num_train_epochs=3"),
            load(MINIMAL + "num_train_epochs: null\n", "max_steps=7"),
            load(MINIMAL, "num_train_epochs=null"),
        )
    ]
    assert lengths == [(0, 2.5), (7, None), (0, 3.0), (7, None), (10, None)]
    with pytest.raises(ConfigError, match="cannot be given together"):
        load(MINIMAL, "num_train_epochs=3", "max_steps=7")
