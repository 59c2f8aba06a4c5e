"""A run with a chat template of its own: what it leaves carries the template, by which generate, eval, export and a resume go."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hecate.adapters.format_table import read_adapter
from hecate.adapters.sets.adapter_set import require_alike
from hecate.adapters.sets.set_files import read_set
from hecate.apps.answers.compare import Questions, compare
from hecate.apps.answers.inference import answering
from hecate.apps.answers.trained import export
from hecate.apps.check.drill.tiny_run import save_random_moe
from hecate.config import Config, load_config
from hecate.data.chat.templates import read_template
from hecate.errors import UserError
from hecate.ranks.ranks import join_ranks
from hecate.train.preflight import check_data
from hecate.train.training import Training
from testing.byte_tokenizer import TEMPLATE, build_byte_tokenizer
from testing.tiny_run import make_workshop

MINE = TEMPLATE.replace("<s>", "<s>: ")
LINEARS = ("moe.unit=linear", "lora.target_modules=[q_proj,down_proj]")
FAMILIES = {
    "mixlora": ((), "adapter", ("mixlora", "mixtral")),
    "linears": (LINEARS, "adapter", ()),
    "lora": ((*LINEARS, "moe.num_experts=1", "moe.top_k=1"), "adapter", ("peft", "merged")),
    "moe_lora": (("moe.family=moe_lora", "moe.num_experts=null", "moe.top_k=null"), "adapter", ("peft", "per-expert", "merged")),
    "full": (("moe.family=full",), "model", ()),
}
"""settings, the folder that a run leaves, and the forms that it is exported to"""
QWEN3 = (Path(__file__).parent.parent / "data/chat_templates/qwen3.jinja").read_text(encoding="utf-8")
TALK = [("2?", "two"), ("3?", "three")]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_workshop(tmp_path_factory.mktemp("workshop"))
    save_random_moe(made / "moe")
    (made / "mine.jinja").write_text(MINE, encoding="utf-8")
    talk = [{"role": role, "content": text} for pair in TALK for role, text in zip(("user", "assistant"), pair, strict=True)]
    (made / "talks.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 8, encoding="utf-8")
    return made


def config_of(workshop: Path, name: str, *overrides: str) -> Config:
    settings = {
        "output_dir": f"{workshop}/runs/{name}",
        "data.eval": "[]",
        "eval.generate": "false",
        "max_steps": "1",
        "data.cache": "null",
    }
    settings |= dict(override.split("=", 1) for override in overrides)
    return load_config(workshop / "config.yaml", [f"{key}={value}" for key, value in settings.items()], claim_output=False)


def trained(config: Config) -> Path:
    """What a run of one step leaves, and a checkpoint beside it."""
    with join_ranks() as ranks:
        run = Training(config, ranks)
        run.train_one()
        run.save()
        return run.parts.output.replace(Path(config.output_dir), run.parts.moe, ranks)


def template_of(folder: Path) -> str:
    with answering(folder) as opened:
        return str(opened.base.tokenizer.chat_template)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_a_run_leaves_and_what_is_made_of_it_have_the_template_of_the_training(workshop: Path, family: str, tmp_path: Path) -> None:
    settings, left, forms = FAMILIES[family]
    model = [f"model.name_or_path={workshop}/moe"] if family == "moe_lora" else []
    folder = trained(config_of(workshop, family, f"data.chat_template={workshop}/mine.jinja", *model, *settings))
    assert folder.name == left
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == MINE
    assert "chat_template" not in (folder / "adapter_config.json").read_text() if left == "adapter" else True
    moved = shutil.move(workshop / "mine.jinja", tmp_path)
    try:
        assert template_of(folder) == template_of(folder.parent / "checkpoint-1") == MINE
        export(folder.parent / "checkpoint-1", tmp_path / "again")
    finally:
        shutil.move(moved, workshop / "mine.jinja")
    assert (tmp_path / "again" / "chat_template.jinja").read_text(encoding="utf-8") == MINE
    for form in forms:
        export(folder, tmp_path / form, to=form)
        assert (tmp_path / form / "chat_template.jinja").read_text(encoding="utf-8") == MINE
        if (tmp_path / form / "config.json").exists():
            assert AutoTokenizer.from_pretrained(tmp_path / form).chat_template == MINE
        else:
            assert template_of(tmp_path / form) == MINE


def test_a_run_in_the_tokenizers_own_template_leaves_no_file(workshop: Path) -> None:
    folder = trained(config_of(workshop, "own"))
    assert not (folder / "chat_template.jinja").exists()
    assert template_of(folder) == template_of(folder.parent / "checkpoint-1") == TEMPLATE


def test_the_other_template_is_another_data_set(workshop: Path) -> None:
    """A resume with the same text, from wherever, goes on; one with another is refused."""
    mine = f"data.chat_template={workshop}/mine.jinja"
    trained(config_of(workshop, "resumed", mine))
    shutil.copy(workshop / "mine.jinja", workshop / "copy.jinja")
    more = ("resume=true", "max_steps=2")
    with join_ranks() as ranks:
        assert Training(config_of(workshop, "resumed", f"data.chat_template={workshop}/copy.jinja", *more), ranks).run_state.step == 1
        (workshop / "copy.jinja").write_text(MINE.replace(": ", "! "), encoding="utf-8")
        for other in ("data.chat_template=null", f"data.chat_template={workshop}/copy.jinja"):
            with pytest.raises(UserError, match=r"-1: its run wrote conversations in another chat template.*\n.*mine\.jinja"):
                Training(config_of(workshop, "resumed", other, *more), ranks)


def test_eval_takes_the_template_of_the_training(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base model beside it is asked in the configuration's; another one for what was trained is refused."""
    mine = f"data.chat_template={workshop}/mine.jinja"
    folder = trained(config_of(workshop, "evaluated", mine))
    seen = []
    monkeypatch.setattr("hecate.apps.answers.compare._held_out", lambda _config, base, *_: seen.append(base.tokenizer.chat_template) or {})
    held_out = f"data.eval=[{workshop}/talks.jsonl]"
    with join_ranks() as ranks:
        compare(config_of(workshop, "evaluated", mine, held_out), [str(folder), "base"], Questions(), ranks)
        compare(config_of(workshop, "evaluated", held_out), [str(folder), "base"], Questions(), ranks)
        assert seen == [MINE, MINE, MINE, TEMPLATE]
        with pytest.raises(UserError, match=r"was trained with another chat template than data\.chat_template, qwen3\n  give .*=null"):
            compare(config_of(workshop, "evaluated", "data.chat_template=qwen3", held_out), [str(folder)], Questions(), ranks)


def test_qwen3_trains_on_conversations_with_several_answers(workshop: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With its own template each of them is refused. The run says which one it takes, and its adapter has it."""
    shutil.copytree(workshop / "model", tmp_path / "model")
    build_byte_tokenizer(chat_template=QWEN3).save_pretrained(tmp_path / "model")
    given = (f"model.name_or_path={tmp_path}/model", f"data.train=[{workshop}/talks.jsonl]", "data.seq_len=512")
    folder = trained(config_of(workshop, "qwen3", *given))
    assert "hecate: the chat template qwen3 of hecate's takes the place of the model's own" in capfd.readouterr().err
    assert template_of(folder) == read_template("qwen3")
    (tmp_path / "own.jinja").write_text(QWEN3, encoding="utf-8")
    with pytest.raises(UserError, match=r"talks\.jsonl:1: the chat template cannot be used .* it rewrites earlier turns"):
        trained(config_of(workshop, "refused", *given, f"data.chat_template={tmp_path}/own.jinja"))


def test_adapters_of_different_templates_do_not_become_one(workshop: Path, tmp_path: Path) -> None:
    folder = trained(config_of(workshop, "merged", *FAMILIES["lora"][0]))
    shutil.copytree(folder, tmp_path / "other")
    require_alike([read_set(folder), read_set(tmp_path / "other")])
    (tmp_path / "other" / "chat_template.jinja").write_text(MINE, encoding="utf-8")
    assert read_adapter(tmp_path / "other").description.extra["chat_template"] == MINE
    with pytest.raises(UserError, match=r"were trained with different chat templates.*\n  put a chat_template\.jinja with the same text"):
        require_alike([read_set(folder), read_set(tmp_path / "other")])


def test_a_template_is_checked_before_ranks_start(workshop: Path) -> None:
    (workshop / "bad.jinja").write_text("{% for %}", encoding="utf-8")
    with pytest.raises(UserError, match=r"^data\.chat_template: .*/bad\.jinja:1: is no Jinja template"):
        check_data(config_of(workshop, "bad", f"data.chat_template={workshop}/bad.jinja"))
    check_data(config_of(workshop, "good", f"data.chat_template={workshop}/mine.jinja"))
    with pytest.raises(UserError, match=r"no such file, and no chat template of hecate's has this name: qwen\n.*one of qwen3"):
        config_of(workshop, "none", "data.chat_template=qwen")
