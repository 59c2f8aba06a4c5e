"""Reading and expanding a sweep file, naming its runs, and what is refused before the first of them starts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hecate.apps.sweep.checks import checked_configs
from hecate.apps.sweep.names import column_names, run_names
from hecate.apps.sweep.sweep_file import load_run_sweep, plain_text
from hecate.cli.sweeps import once_for_data, sweep
from hecate.config import Config, ConfigError
from hecate.config.yaml_text import Mapping, parse
from hecate.errors import UserError
from hecate.launch.many_runs.ledger import SweepEntry, read_entries
from hecate.launch.many_runs.sweep import Sweep

HEAD = "run: run.yaml\noutput_dir: runs/s\n"


def sweep_of(text: str, *overrides: str) -> Sweep:
    Path("sweep.yaml").write_text(HEAD + text, encoding="utf-8")
    return load_run_sweep("sweep.yaml", overrides)


def checked(swept: Sweep, entries: dict[str, SweepEntry] | None = None) -> dict[str, Config]:
    return checked_configs(swept, entries or {}, lambda config: None)


def test_a_grid_is_all_combinations_of_its_values_with_all_seeds(folder: Path) -> None:
    swept = sweep_of(
        "set: {max_steps: 3, warmup_ratio: 0.1}\ngrid: {learning_rate: [1e-4, 1e-3], lora.r: [4, 8]}\nseeds: [1, 2]\n", "max_steps=7"
    )
    configs = checked(swept)
    found = {(config.learning_rate, config.lora.r, config.seed) for config in configs.values()}
    assert found == {(rate, r, seed) for rate in (1e-4, 1e-3) for r in (4, 8) for seed in (1, 2)}
    assert all((config.max_steps, config.warmup_ratio) == (7, 0.1) for config in configs.values())
    assert [run.name for run in swept.runs[:3]] == [
        "learning_rate-1e-4_r-4_seed-1",
        "learning_rate-1e-4_r-4_seed-2",
        "learning_rate-1e-4_r-8_seed-1",
    ]
    assert {config.output_dir for config in configs.values()} == {f"runs/s/{run.name}" for run in swept.runs}


def test_a_list_has_named_runs_with_values_of_any_form(folder: Path) -> None:
    second = "{name: wide, lora.target_modules: [q_proj, up_proj], model.dtype: 'float32'}"
    swept = sweep_of(f"list:\n- {{name: small, lora: {{r: 4, alpha: 8}}}}\n- {second}\n- {{lora.r: 2}}\n")
    configs = checked(swept)
    assert list(configs) == ["small", "wide", "r-2"]
    assert (configs["small"].lora.r, configs["small"].lora.alpha) == (4, 8.0)
    assert configs["wide"].lora.target_modules == ("q_proj", "up_proj")
    assert configs["wide"].model.dtype == "float32"
    assert swept.keys == ["lora", "lora.target_modules", "model.dtype", "lora.r"]


def test_the_command_line_replaces_keys_of_a_section_in_set(folder: Path) -> None:
    sets = "set: {lora: {r: 8, alpha: 16}, moe: {router: {dense: true}}}\ngrid: {seed: [1, 2]}\n"
    for override in ("lora.r=16", "lora={r: 16}"):
        config = checked(sweep_of(sets, override))["seed-1"]
        assert (config.lora.r, config.lora.alpha, config.moe.router.dense) == (16, 16.0, True)


@pytest.mark.parametrize(
    "text", ["1e-4", "null", "[a, 'b, c', \"1\"]", "{path: a.jsonl, weight: 2, name: '{x}'}", "'true'", "${seed}", "['${seed}', [1, 2]]"]
)
def test_text_is_read_as_the_same_node(text: str) -> None:
    def bare(node: object) -> object:
        return re.sub(r"line=\d+, ?", "", repr(node)) if not isinstance(node, Mapping) else [list(map(bare, pair)) for pair in node.pairs]

    node = parse(text)
    assert node is not None
    assert bare(parse(plain_text(node))) == bare(node)


def test_names_are_unique_safe_and_short() -> None:
    runs = [
        {"a.r": "[1, 2]"},
        {"a.r": "[1,2 ]"},
        {"a.r": "1e+4"},
        {"a.r": "1e-4"},
        {"a.r": "data/../x y/é.jsonl"},
        {"a.r": "v" * 200},
        {"a.r": "W"},
        {"a.r": "w"},
    ]
    names = run_names(runs)
    assert len({name.lower() for name in names}) == len(runs)
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", name) for name in names)
    assert names[2:4] == ["r-1e4", "r-1e-4"]
    assert re.fullmatch(r"r-1-2-[0-9a-f]{8}", names[0])
    assert run_names([*runs[:2], {"a.r": "7"}])[:2] == names[:2]  # other runs do not change them
    assert column_names(["lora.r", "moe.router.r", "seed"]) == {"lora.r": "lora.r", "moe.router.r": "router.r", "seed": "seed"}


def test_problems_of_all_runs_are_told_at_once_with_their_lines(folder: Path) -> None:
    swept = sweep_of("set: {max_stps: 3}\ngrid:\n  learning_rate: [1e-4, -1]\n  moe.top_k: [2, 40]\n")

    def check(config: Config) -> None:
        raise UserError("a.jsonl:1: is broken")

    with pytest.raises(UserError) as told:
        checked_configs(swept, {}, check)
    text = str(told.value)
    assert "sweep.yaml:3: max_stps: unknown key\n    hint: did you mean max_steps?\nsweep" in text
    assert "sweep.yaml:5: learning_rate: must be > 0, got -1.0\n    in learning_rate--1_top_k-2, learning_rate--1_top_k-40" in text
    assert text.count("moe.top_k: must be from 1 to 8") == 1
    with pytest.raises(UserError, match=r"sweep\.yaml:5: lora\.r: "):  # the line of the value that holds
        checked(sweep_of("set: {lora: {alpha: 4}}\ngrid:\n  lora.r: [0, 1]\n"))


def test_data_are_checked_once_for_each_model(folder: Path) -> None:
    """Whether conversations can be trained on depends on the model's chat template, too."""
    seen: list[str] = []
    swept = sweep_of("grid: {learning_rate: [1e-4, 1e-3], model.dtype: [float32, bfloat16]}\n")
    checked_configs(swept, {}, once_for_data(lambda config: seen.append(config.model.dtype)))
    assert sorted(seen) == ["bfloat16", "float32"]
    swept = sweep_of("grid: {fssdp.plan: [history, replay]}\n")  # with replay each record must have its routing
    checked_configs(swept, {}, once_for_data(lambda config: seen.append(config.fssdp.plan)))
    assert seen[2:] == ["history", "replay"]
    swept = sweep_of("set: {data.eval: a.jsonl}\ngrid: {eval.generate: [false, true]}\n")  # answers are not asked for from documents
    checked_configs(swept, {}, once_for_data(lambda config: seen.append(str(config.eval.generate))))
    assert seen[4:] == ["False", "True"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("grid: {learning_rate: [1e-3, 0.001]}", "learning_rate-0.001: is the same run as learning_rate-1e-3"),
        ("grid: {lora.r: [4]}\nset: {lora.r: 8}", "sweep.yaml: lora.r: is one of the keys that the sweep varies"),
        ("list: [{lora: {r: 4}}]\nset: {lora: {r: 8}}", "sweep.yaml: lora.r: is one of the keys that the sweep varies"),
        ("grid: {seed: [4]}\nseeds: [1]\nset: {seed: 8}", "sweep.yaml: seed: is one of the keys that the sweep varies"),
        ("grid: {lora.r: 4}", "sweep.yaml:3: grid.lora.r: must be a list of values\n    hint: write [4, ...]"),
        ("grid: {lora.r: [4, 4]}", "grid.lora.r: has 4 twice"),
        ("grid: {lora.r: [&a 4, *a]}", "grid.lora.r: the anchor &a is not supported"),
        ("grid: {output_dir: [a, b]}", "grid.output_dir: cannot be given: the sweep gives each run a folder of its own"),
        ("grid: {seed: [1], lora.r: [2]}\nlist: [{name: a}]", "grid: must be given, or list, and not both"),
        ("jobs: 0\ngrid: {lora.r: [4]}", "jobs: must be an integer >= 1"),
        ("gird: {lora.r: [4]}", "gird: unknown key of a sweep"),
        ("list: [{name: ../x}]", "list[0].name: must be 1 to 64 of A-Z a-z 0-9 . _ -, got ../x"),
        ("list: [{name: sweep}]", "list[0].name: must be 1 to 64"),
        ("list: [{name: a}, {name: A, seed: 2}]", "list[1].name: A is the name of an earlier run"),
        ("list: [{lora.r: 2}, {lora.r: 2}]", "list[1]: has the values of an earlier run"),
        ("grid: {seed: [" + ",".join(map(str, range(1001))) + "]}", "grid: has 1001 combinations, more than 1000"),
        ("seeds: [1, 1]\ngrid: {lora.r: [4]}", "seeds: names a seed twice"),
    ],
)
def test_a_bad_sweep_is_refused(folder: Path, text: str, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        checked(sweep_of(text + "\n"))


def test_overrides_are_refused_with_the_reason(folder: Path) -> None:
    grid = "grid: {lora.r: [4]}\n"
    for override, told in {
        "lora.r=2": "command line: lora.r: is one of the keys that the sweep varies",
        "resume=true": "the same command goes on",
        "--x": "must have the form key=value",
    }.items():
        with pytest.raises(UserError, match=re.escape(told)):
            sweep_of(grid, override)
    assert sweep_of(grid, "output_dir=runs/t", "jobs=3").runs[0].folder == "runs/t/r-4"
    assert sweep_of(grid, 'output_dir="/tmp/my runs/x"').runs[0].folder == "/tmp/my runs/x/r-4"
    for given in ("null", "[a]", "a: b", ""):
        with pytest.raises(UserError, match=r"output_dir: .*must be the path of a folder\n.*put it in quotes"):
            sweep_of(grid, f"output_dir={given}")
    with pytest.raises(ConfigError, match="no such file"):
        load_run_sweep("nothing.yaml")


def test_a_folder_that_is_somebody_elses_is_refused(folder: Path) -> None:
    (folder / "runs/s/r-4").mkdir(parents=True)
    (folder / "runs/s/r-4/notes.txt").write_text("mine", encoding="utf-8")
    swept = sweep_of("grid: {lora.r: [4, 8]}\n")
    assert read_entries(swept) == {}
    with pytest.raises(UserError, match="runs/s/r-4 exists and is not empty") as told:
        checked(swept)
    assert "in r-4" in str(told.value)


def test_the_verb_refuses_torchrun_and_several_runs_on_all_of_a_cluster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("sweep.yaml").write_text(HEAD + "grid: {lora.r: [4, 8]}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"ray\.workers: must be given with jobs > 1"):
        sweep(Path("sweep.yaml"), ["jobs=2"], address="local")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="give the command without torchrun"):
        sweep(Path("sweep.yaml"))
    assert not Path("runs").exists()
