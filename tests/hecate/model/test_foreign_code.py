"""A model's folder may bring code and ask for it to be run. It is never run, and nobody is asked whether it may be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from testing.commands import run_hecate
from testing.tiny_run import make_workshop

CODE = """
from pathlib import Path

Path(__file__).with_name("ran").touch()
Path("{folder}", "ran").touch()
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, PreTrainedTokenizerFast as Tokenizer
"""
COMMANDS = {
    "train": ["train", "{config}", "model.name_or_path={model}", "output_dir={folder}/run"],
    "plan": ["plan", "{config}", "model.name_or_path={model}", "output_dir={folder}/run"],
    "generate": ["generate", "{model}", "w1"],
    "chat": ["chat", "{model}"],
    "eval": ["eval", "{model}", "--choices", "{choices}"],
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def with_code(workshop: Path, folder: Path, *, model_type: str) -> Path:
    """A copy of the tiny model whose configuration and tokenizer name classes in a file beside them."""
    model = folder / "model"
    model.mkdir()
    for path in (workshop / "model").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    for name, wanted in (
        ("config.json", {"model_type": model_type, "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}}),
        ("tokenizer_config.json", {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": [None, "theirs.Tokenizer"]}}),
    ):
        found = json.loads((model / name).read_text(encoding="utf-8"))
        (model / name).write_text(json.dumps(found | wanted), encoding="utf-8")
    (model / "theirs.py").write_text(CODE.format(folder=folder), encoding="utf-8")
    return model


QUICK = [("train", "theirs"), ("plan", "theirs"), ("generate", "llama"), ("chat", "theirs"), ("eval", "theirs")]
PAIRS = [(verb, model_type) for verb in COMMANDS for model_type in ("llama", "theirs")]


@pytest.mark.parametrize(("verb", "model_type"), [pair if pair in QUICK else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS])
def test_a_models_own_code_is_not_run(workshop: Path, tmp_path: Path, verb: str, model_type: str) -> None:
    """Whoever starts the command answers every question with yes."""
    model = with_code(workshop, tmp_path, model_type=model_type)
    choices = tmp_path / "choices.jsonl"
    choices.write_text(json.dumps({"question": "w1", "choices": ["W1", "W2"], "answer": 0}) + "\n", encoding="utf-8")
    names = {"config": workshop / "config.yaml", "model": model, "folder": tmp_path, "choices": choices}
    done = run_hecate([word.format_map(names) for word in COMMANDS[verb]], given="y\n" * 20, timeout=120)
    said = done.stdout + done.stderr
    assert not list(tmp_path.rglob("ran")), said
    assert "[y/N]" not in said
    assert "Traceback" not in said
    assert "trust_remote_code" not in said, "the reader is told to do what hecate never does"


def test_a_plan_from_sizes_alone_runs_none_either(workshop: Path, tmp_path: Path) -> None:
    """transformers knows the type, and has no language model for it, so the file's own would be taken."""
    (tmp_path / "theirs.py").write_text(CODE.format(folder=tmp_path), encoding="utf-8")
    wanted = {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "theirs.Model"}, "name_or_path": str(tmp_path)}
    (tmp_path / "config.json").write_text(json.dumps(wanted), encoding="utf-8")
    given = ["plan", str(workshop / "config.yaml"), f"model.name_or_path={tmp_path}", f"output_dir={tmp_path}/run"]
    done = run_hecate(given, given="y\n" * 20, timeout=120)
    assert done.returncode == 2
    assert not (tmp_path / "ran").exists()
    assert "[y/N]" not in done.stdout + done.stderr
