"""What a run has left is found in its folder, also a moved one, and a checkpoint is as good as an adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from hecate.apps.answers import opened
from hecate.apps.answers.checkpointed import is_checkpoint, model_of_checkpoint
from hecate.apps.answers.trained import export, find_trained, run_config_of
from hecate.cli import app
from hecate.config import load_config, to_yaml
from hecate.errors import UserError
from hecate.model.base import BaseChoice
from hecate.ranks.ranks import join_ranks
from hecate.train.training import Training
from testing.answering import answer, evaluate_trained
from testing.tiny_run import make_workshop
from tests.hecate.adapters.exporting import save_moe

UP = "lora.target_modules=[up_proj]"
FAMILIES: dict[str, tuple[tuple[str, ...], str]] = {
    "mixlora": ((), "mixtral"),
    "biased": (("moe.router.bias=balancing", "moe.router_aux_loss_coef=0", "lora.pairs=fixed_a"), ""),
    "linears": (("moe.unit=linear", "lora.target_modules=[q_proj,down_proj]"), ""),
    "pools": (("moe.unit=linear", "lora.pairs=shards", "lora.target_modules=[q_proj,down_proj]"), ""),
    "lora": (("moe.unit=linear", "moe.num_experts=1", "moe.top_k=1"), "merged"),
    "given": (
        (
            "moe.router.input=given",
            "moe.num_experts=2",
            "moe.top_k=1",
            "moe.router_aux_loss_coef=0",
            "data.eval=[]",
            "eval.generate=false",
            UP,
        ),
        "",
    ),
    "moe_lora": (("moe.family=moe_lora", "moe.num_experts=null", "moe.top_k=null", "model.name_or_path={workshop}/moe"), "per-expert"),
    "full": (("moe.family=full",), "mixtral"),
}
IN_MAKE_TEST = ("mixlora", "moe_lora")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_workshop(tmp_path_factory.mktemp("workshop"))
    save_moe("qwen3_moe", made / "moe")
    return made


def trained(workshop: Path, name: str, *overrides: str, steps: int = 2) -> Path:
    """The folder of a run that was stopped after some of its steps, and, beside it in the folder `left`, what it would have left."""
    folder = workshop / "runs" / name
    given = [*(one.format(workshop=workshop) for one in overrides), f"output_dir={folder}"]
    config = load_config(workshop / "config.yaml", given, claim_output=False)
    with join_ranks() as ranks:
        run = Training(config, ranks)
        for _ in range(steps):
            run.train_one()
        run.save()
        (folder / "config.yaml").write_text(to_yaml(run.parts.config), encoding="utf-8")
        run.parts.output.replace(workshop / "left" / name, run.parts.moe, ranks)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in sorted(folder.rglob("*.safetensors")) for name, one in load_file(file).items()}


@pytest.mark.parametrize("name", [name if name in IN_MAKE_TEST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES])
def test_a_checkpoint_is_as_good_as_what_the_run_would_have_left(workshop: Path, tmp_path: Path, name: str) -> None:
    """Bit for bit, for every kind of experts; moved elsewhere; and in another form."""
    overrides, form = FAMILIES[name]
    moved = tmp_path / "moved"
    shutil.move(trained(workshop, name, *overrides), moved)
    assert export(moved, tmp_path / "out") == []
    (left,) = (workshop / "left" / name).iterdir()
    ours, theirs = weights(tmp_path / "out"), weights(left)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    if form:
        export(moved / "checkpoint-2", tmp_path / "form", to=form)
        assert list((tmp_path / "form").glob("*.safetensors"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["form", "moved", "out"][not form :]


def test_a_run_without_a_checkpoint_begins_again_where_it_is_resumed(workshop: Path) -> None:
    """Unless it has left what it has trained, or no run was there."""
    folder = workshop / "runs" / "early"
    config = load_config(workshop / "config.yaml", [f"output_dir={folder}", "resume=true"], claim_output=False)
    with join_ranks() as ranks:
        with pytest.raises(UserError, match=r"resume=true, but .* has no checkpoint"):
            Training(config, ranks)
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        run = Training(config, ranks)
        assert run.warnings == (f"{folder} holds a run that was stopped before its first checkpoint: it begins again",)
        assert run.train_one().step == 1
        (folder / "adapter").mkdir()
        with pytest.raises(UserError, match=r"resume=true, but .* has no checkpoint"):
            Training(config, ranks)


def test_a_checkpoint_that_is_deleted_while_it_is_opened_is_not_the_last_word(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the run that goes on, which then has a newer one."""
    folder = trained(workshop, "pruned")
    found = iter([folder / "checkpoint-1", folder / "checkpoint-2"])
    monkeypatch.setattr(opened, "find_trained", lambda path: next(found))
    with join_ranks() as ranks:
        assert opened.open_trained(folder, ranks, BaseChoice()).trained == folder / "checkpoint-2"


def test_a_run_is_evaluated_and_answers_wherever_it_is(workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = tmp_path / "moved"
    shutil.move(trained(workshop, "stopped", "max_steps=9"), moved)
    of_run = answer(moved, "w1x1", system=None, model=None, max_new_tokens=4)
    export(moved, tmp_path / "adapter")
    assert "| steps | 2 |" in (tmp_path / "adapter" / "README.md").read_text()
    capsys.readouterr()
    assert answer(tmp_path / "adapter", "w1x1", system=None, model=None, max_new_tokens=4) == of_run
    shown = []
    for folder in (moved, moved / "checkpoint-2", tmp_path / "adapter"):
        config = load_config(moved / "config.yaml", [f"output_dir={moved}"], claim_output=False)
        evaluate_trained(config, folder)
        shown.append([line.split() for line in capsys.readouterr().out.splitlines() if "up.eval" in line])
    assert shown[0]
    assert shown[0] == shown[1] == shown[2]
    assert run_config_of(moved / "checkpoint-2") == moved / "config.yaml"
    done = CliRunner().invoke(app, ["eval", str(moved)])
    assert done.exit_code == 0, done.output
    assert not (workshop / "runs" / "stopped").exists(), "a moved run's old folder must not come back"


def test_the_newest_is_taken(workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the run left at its end, unless it has gone on since; and the command says which."""
    run = tmp_path / "run"
    shutil.move(trained(workshop, "newest", "max_steps=2"), run)
    assert find_trained(run) == run / "checkpoint-2"
    shutil.copytree(workshop / "left" / "newest" / "adapter", run / "adapter")
    assert find_trained(run) == run / "adapter"
    value = json.loads((run / "adapter" / "adapter_config.json").read_text())
    value["hecate"]["extra"]["training"]["steps"] = 1
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(value))
    assert find_trained(run) == run / "checkpoint-2"
    assert capsys.readouterr().err.splitlines()[-1] == f"hecate: {run}: takes checkpoint-2"
    assert find_trained(run / "checkpoint-2") == run / "checkpoint-2"
    assert is_checkpoint(run / "checkpoint-2")
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoint-2")
    with pytest.raises(UserError, match="has left neither an adapter nor a checkpoint"):
        find_trained(run)


def test_a_mixture_begins_with_an_adapter(workshop: Path, tmp_path: Path) -> None:
    """Written before the first step, it is the same, bit for bit; also from the libraries' folder, and from the folder of a run."""
    trained(workshop, "begun")
    left = workshop / "left" / "begun"
    (left / "config.yaml").touch()
    export(left / "adapter", tmp_path / "library", to="mixlora")
    for number, folder in enumerate((left, tmp_path / "library")):
        again = trained(workshop, f"begin{number}", f"lora.init_from={folder}", steps=0)
        ours, theirs = weights(workshop / "left" / again.name), weights(left)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for override, reason in (
        ("lora.alpha=4", r"has lora.alpha, scaled 2.0, but the configuration has 1.0"),
        ("moe.num_experts=2", r"has moe.num_experts \[3, 3\], but the configuration has \[2, 2\]"),
        ("moe.top_k=1", r"has moe.top_k 2, but the configuration has 1\n  give moe.top_k as the adapter has it"),
        ("moe.router.score=sigmoid", r"has moe.router {'score': 'softmax'}, but the configuration has {'score': 'sigmoid'}"),
        (f"model.name_or_path={workshop}/narrow", r"moe_gate.weight has shape \(3, 32\), but the base model needs \(3, 16\)"),
    ):
        if "narrow" in override:
            from testing.tiny_run import save_random_llama

            sizes = {"hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
            save_random_llama(workshop / "narrow", **sizes)
        with pytest.raises(UserError, match=reason):
            trained(workshop, "refused", f"lora.init_from={left}", override, steps=0)


def test_what_cannot_be_exported_is_refused(workshop: Path, tmp_path: Path) -> None:
    run, other = trained(workshop, "refusals"), trained(workshop, "whole", "moe.family=full")
    adapter, model = workshop / "left" / "refusals" / "adapter", workshop / "left" / "whole" / "model"
    out = tmp_path / "out"
    for source, given, reason in (
        (run, {"to": "onnx"}, "--to onnx: there is no such form\n  forms: merged, mixlora, mixtral, peft, per-expert"),
        (adapter, {}, "say in which form it is to be written\n  give --to mixlora or mixtral"),
        (adapter, {"user": "u1"}, "--user and --features: the one needs the other"),
        (run, {"to": "peft", "user": "u1"}, "--to and --user were given"),
        (model, {"to": "mixtral"}, "is a whole model already"),
        (other, {"to": "peft"}, "was trained with whole experts, which are no adapter\n  give --to mixtral"),
        (run / "nothing", {"to": "peft"}, r"nothing: no such folder\n  give the folder of a run"),
    ):
        with pytest.raises(UserError, match=reason):
            export(source, out, **given)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    out.mkdir()
    with pytest.raises(UserError, match="out: exists already"):
        export(run, out, to="mixlora")
    done = CliRunner().invoke(app, ["export", str(run), "--to", "mixlora"])
    assert "name the new folder once" in str(done.exception)


def test_a_checkpoint_on_another_base_is_refused(workshop: Path, tmp_path: Path) -> None:
    run = trained(workshop, "elsewhere")
    shutil.copytree(workshop / "model", tmp_path / "same")
    shutil.copytree(workshop / "model", tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 64
    file.write_bytes(bytes(content))
    with join_ranks() as ranks:
        model_of_checkpoint(run / "checkpoint-2", ranks, BaseChoice(str(tmp_path / "same")))
        with pytest.raises(UserError, match="belongs to a run on another base model"):
            model_of_checkpoint(run / "checkpoint-2", ranks, BaseChoice(str(tmp_path / "other")))


def test_a_base_that_is_gone_is_named_with_the_way_out(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(workshop, "orphan")
    folder = workshop / "left" / "orphan" / "adapter"
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "gone/model"}))
    with join_ranks() as ranks, pytest.raises(UserError, match=r"checkpoint-2: its base model is not found: no such file or folder: gone"):
        model_of_checkpoint(run / "checkpoint-2", ranks, BaseChoice("gone"))
    with pytest.raises(UserError, match=r"adapter: its base model is not found: .*gone/model\n  say where it is now: --model PATH"):
        answer(folder, "w1", system=None, model=None, max_new_tokens=1)
    with pytest.raises(UserError, match=r"^/.*adapter: its base model is not found"):
        export(folder, tmp_path / "out", to="mixtral")
    export(folder, tmp_path / "out", to="mixtral", model=f"{workshop}/model")
    monkeypatch.chdir(workshop)
    export(folder, tmp_path / "library", to="mixlora", model="model")
    assert json.loads((tmp_path / "library" / file.name).read_text())["base_model_name_or_path"] == f"{workshop}/model"
