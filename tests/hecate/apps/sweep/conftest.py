from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a configuration with the files that it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    (tmp_path / "model").mkdir()
    for name, text in {"config.json": "{}", "model.safetensors": "", "tokenizer.json": "{}"}.items():
        (tmp_path / "model" / name).write_text(text, encoding="utf-8")
    text = "model: {name_or_path: model}\ndata: {train: a.jsonl}\noutput_dir: runs/unset\nmax_steps: 10\n"
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    return tmp_path
