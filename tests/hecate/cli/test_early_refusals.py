"""What can be known from headers, tokenizer, data and folders is refused before any process is started."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from hecate.apps.megatron import imports
from hecate.cli import app
from hecate.config import load_config, to_yaml
from hecate.errors import UserError
from hecate.launch import local_launcher
from hecate.launch.ray_job import driver
from hecate.model.sizes import model_check
from hecate.train import rank_main
from hecate.train.preflight import check_architecture
from testing.commands import run_hecate
from testing.tiny_run import make_workshop
from tests.hecate.apps.foresee.making import write_model
from tests.hecate.checkpoint.saving import save, shards_of


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workshop(tmp_path_factory.mktemp("workshop"))
    write_model(folder / "moe", "mixtral", num_local_experts=2)
    for file in (folder / "model").iterdir():
        (folder / "base").mkdir(exist_ok=True)
        if not file.name.startswith("chat_template"):
            (folder / "base" / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "base" / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("chat_template", None)
    (folder / "base" / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object, **__: object) -> int:
        raise AssertionError("ranks were started")

    monkeypatch.setattr(local_launcher, "launch_local", started)


def refused(workshop: Path, *overrides: str, output: str = "") -> str:
    given = [f"{workshop}/config.yaml", "nproc=1", f"output_dir={output or f'{workshop}/runs/new'}"]
    done = CliRunner().invoke(app, ["train", *given, *overrides])
    assert isinstance(done.exception, UserError), done.exception
    return str(done.exception)


def test_what_is_right_is_started_and_says_so(workshop: Path) -> None:
    done = CliRunner().invoke(app, ["train", str(workshop / "config.yaml"), "nproc=1", f"output_dir={workshop}/runs/new"])
    assert isinstance(done.exception, AssertionError)
    assert str(done.exception) == "ranks were started"
    assert done.output == "hecate: starting 1 rank\n"


def test_another_number_of_layers(workshop: Path) -> None:
    assert "moe.num_experts lists 3 layers, but the model has 2" in refused(workshop, "moe.num_experts=[4,4,4]")
    assert "lists 2 layers, but model.num_hidden_layers is 1" in refused(workshop, "moe.num_experts=[4,4]", "model.num_hidden_layers=1")


def test_a_model_with_experts_and_one_without(workshop: Path) -> None:
    assert "the model has experts already, but moe.family mixlora" in refused(workshop, f"model.name_or_path={workshop}/moe/model")
    without = refused(workshop, "moe.family=moe_lora", "moe.num_experts=null", "moe.top_k=null")
    assert "the model has no experts, but moe.family is moe_lora" in without


OF_MOE = ("moe.family=moe_lora", "moe.num_experts=null", "moe.top_k=null")


def test_experts_with_biases(workshop: Path) -> None:
    write_model(workshop / "biased", "gpt_oss", num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"] * 3)
    said = refused(workshop, f"model.name_or_path={workshop}/biased/model", *OF_MOE, "eval.generate=false")
    assert "experts.down_proj_bias: experts with biases are not supported" in said


def test_a_router_of_another_kind_is_refused_by_the_program_that_runs_before_the_ranks(
    workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(workshop / "glm", "glm4_moe", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, first_k_dense_replace=0)
    started: dict[str, Any] = {}
    monkeypatch.setattr(local_launcher, "launch_local", lambda *_, first, **__: started.update(first=first) or 0)
    words = [f"{workshop}/config.yaml", "nproc=1", f"output_dir={workshop}/runs/new", *OF_MOE, "eval.generate=false"]
    glm = f"model.name_or_path={workshop}/glm/model"
    done = CliRunner().invoke(app, ["train", *words, glm])
    assert done.exit_code == 0, done.exception
    with pytest.raises(SystemExit) as ended:
        rank_main.main(started["first"])
    assert ended.value.code == 2
    assert "unsupported architecture: Glm4MoeForCausalLM, model.layers.0.mlp has no router that is known here" in capsys.readouterr().err
    rank_main.main(["--check", *words, f"model.name_or_path={workshop}/moe/model"])


def ungated(folder: Path, architecture: str) -> str:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300, "pad_token_id": 0, "eos_token_id": 1}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes)).save_pretrained(folder / "model")
    return f"model.name_or_path={folder}/model"


UNGATED = {
    "gpt2": "unsupported architecture: GPT2LMHeadModel, transformer.h.0 has no gated FFN; exactly one is needed",
    "phi3": "unsupported architecture: Phi3ForCausalLM, model.layers.0 has no gated FFN; exactly one is needed",
}


@pytest.mark.parametrize("architecture", UNGATED)
def test_a_dense_architecture_without_gated_ffns_is_refused_before_the_ranks(
    architecture: str, workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"{workshop}/config.yaml", f"output_dir={tmp_path}/new"]
    with pytest.raises(SystemExit) as ended:
        rank_main.main(["--check", *words, ungated(tmp_path, architecture)])
    assert ended.value.code == 2
    assert UNGATED[architecture] in capsys.readouterr().err


def test_a_launched_job_ends_with_what_is_said_before_its_ranks(workshop: Path, tmp_path: Path) -> None:
    model = "model.name_or_path=" + str(ungated_copy(workshop, tmp_path))
    words = [f"{workshop}/config.yaml", "nproc=2", f"output_dir={tmp_path}/new", model, "fssdp.redundancy=1"]
    done = run_hecate(["launch", *words], timeout=120)
    assert done.returncode == 2
    assert UNGATED["gpt2"] in done.stderr.splitlines()[0], done.stderr
    assert not list((tmp_path / "new").glob("*.json*")), "a rank has begun the run"


def test_a_ray_job_is_refused_before_a_cluster_is_joined(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def joined(_: object) -> None:
        raise AssertionError("a cluster was joined")

    monkeypatch.setattr(driver, "connected", joined)
    model = "model.name_or_path=" + str(ungated_copy(workshop, tmp_path))
    words = ["ray", f"{workshop}/config.yaml", f"output_dir={tmp_path}/new", model, "--address", "127.0.0.1:9"]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, UserError), done.exception
    assert UNGATED["gpt2"] in str(done.exception)


def ungated_copy(workshop: Path, folder: Path) -> Path:
    """GPT-2 with the workshop's tokenizer and chat template."""
    ungated(folder, "gpt2")
    for file in (workshop / "model").iterdir():
        if not (folder / "model" / file.name).exists():
            shutil.copy(file, folder / "model")
    return folder / "model"


def test_a_template_that_rewrites_earlier_turns(workshop: Path, tmp_path: Path) -> None:
    shutil.copytree(workshop / "model", tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text("{{ messages | length }}" + template.read_text(encoding="utf-8"), encoding="utf-8")
    said = refused(workshop, f"model.name_or_path={tmp_path}/model")
    assert said.startswith(f"{workshop}/up.train.jsonl:1: the chat template cannot be used for training on this conversation: it rewrites")


def test_held_out_data_without_a_record(workshop: Path, tmp_path: Path) -> None:
    for name, text in (("a.jsonl", ""), ("b.json", "[]"), ("c.csv", "text\n")):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert f"{tmp_path}/{name} is empty: a data file needs at least one sample" in refused(workshop, f"data.eval=[{tmp_path}/{name}]")


def test_a_gguf_file_where_a_models_own_experts_are_wanted(workshop: Path) -> None:
    (workshop / "dense.gguf").write_bytes(b"GGUF")
    said = refused(workshop, f"model.name_or_path={workshop}/dense.gguf", *OF_MOE)
    assert "dense.gguf: a GGUF file, which moe.family moe_lora does not read\n  give a folder" in said


def test_a_topology_that_is_not_there_or_has_other_devices(workshop: Path) -> None:
    assert "topology: no such preset: nowhere" in refused(workshop, "topology=nowhere")
    other = refused(workshop, "topology=h100-node")
    assert "topology: h100-node has 8 devices, but the number of the job's ranks is 1\n  start 8 ranks (nproc), use auto, or" in other


def test_conversations_without_a_chat_template(workshop: Path) -> None:
    said = refused(workshop, f"model.name_or_path={workshop}/base")
    assert said.startswith(f"{workshop}/up.train.jsonl holds conversations, but the model's tokenizer has no chat template")


def test_a_folder_that_cannot_be_made(workshop: Path) -> None:
    assert "output_dir: no folder can be made in /proc" in refused(workshop, output="/proc/new")
    assert not list(workshop.glob(".hecate-*"))


def test_no_checkpoint_and_one_of_another_run(workshop: Path) -> None:
    said = refused(workshop, "resume=true")
    assert said.startswith(
        f"resume=true, but {workshop}/runs/new has no checkpoint\n  if the run's folder was moved, give output_dir=FOLDER"
    )
    assert not (workshop / "runs").exists()
    then = load_config(workshop / "config.yaml", [f"output_dir={workshop}/runs/old"], claim_output=False)
    (workshop / "runs" / "old").mkdir(parents=True)
    save(workshop / "runs" / "old", 4, shards_of(1.0), meta={"config": to_yaml(then)})
    said = refused(workshop, "resume=true", "learning_rate=1", "max_steps=99", "logging_steps=7", output=f"{workshop}/runs/old")
    changed = f"  learning_rate: {yaml.safe_load(to_yaml(then))['learning_rate']} then, 1.0 now"
    assert said.splitlines()[1:] == [changed]
    # A run that was stopped before its first checkpoint begins again, by the configuration that it was begun with.
    (workshop / "runs" / "early").mkdir()
    (workshop / "runs" / "early" / "config.yaml").write_text(to_yaml(then), encoding="utf-8")
    said = refused(workshop, "resume=true", "learning_rate=1", output=f"{workshop}/runs/early")
    assert said.startswith(f"{workshop}/runs/early/config.yaml: belongs to a run with another configuration")
    assert said.splitlines()[1:] == [changed]


def test_a_model_whose_layers_are_not_known_is_left_to_its_loader(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_check, "tensor_shapes", lambda _: {"strange.weight": (2, 2)})
    model_check.check_model(load_config(workshop / "config.yaml", ["moe.num_experts=[4,4,4]"], claim_output=False))


def test_megatron_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron", None)
    config = load_config("pretrain", [f"output_dir={tmp_path}/run"], inputs=False)
    with pytest.raises(UserError, match=r"megatron-core is not installed\n  .*\[megatron\]"):
        check_architecture(config)
    monkeypatch.setattr(imports, "_NO_WHEEL", (3, 0))
    with pytest.raises(UserError, match=r"it has no wheel for Python 3\.\d+\.\d+: use Python 3.11 to 3.13"):
        check_architecture(config)
