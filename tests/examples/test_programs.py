"""The notebook of the first hour and the loop of one's own run as they stand, on tiny models."""

from __future__ import annotations

import ast
import math
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from torch.nn.functional import cross_entropy

from testing.tiny_run import make_workshop
from tests.rooms import ROOT

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "RANK"} | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def test_the_notebook_of_the_first_hour_runs(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a kernel of its own; only the cell of settings is another."""
    notebook = nbformat.read(ROOT / "examples" / "first_hour.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in code), "committed with outputs"
    assert code[0].source.startswith("MODEL = ")
    code[0].source = f"MODEL, FOLDER, STEPS = {str(workshop / 'model')!r}, {str(workshop / 'first_hour')!r}, 4"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(workshop)}}).execute()
    shown = [cell.outputs[-1]["data"]["text/plain"] if cell.outputs and "data" in cell.outputs[-1] else "" for cell in code]
    assert shown[3].split()[:2] == ["(True,", "4,"]
    scores = ast.literal_eval(shown[4])
    assert set(scores) == {2, 4}
    focal, plain = ast.literal_eval(shown[6])
    assert 0 < focal < plain


def losses_of_own_loop(workshop: Path, world: int) -> list[list[float]]:
    text = (
        (workshop / "config.yaml")
        .read_text(encoding="utf-8")
        .replace("dtype: float32", "dtype: float64")
        .replace("alpha: 8.0", "alpha: 8.0, dropout: 0.0")
    )
    config = workshop / f"own-{world}.yaml"
    config.write_text(text.replace("runs/unset", f"runs/own-{world}"), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "-m", "examples.own_loop", str(config)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (workshop / f"runs/own-{world}/adapter/adapter_model.safetensors").exists()
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return [[float(word) for word in line.split()] for line in lines[-world:]]


def test_a_loop_of_ones_own_trains_alike_on_any_number_of_ranks(workshop: Path) -> None:
    """Its first loss is that of the base model, since new experts change nothing."""
    from transformers import AutoModelForCausalLM

    (alone,) = losses_of_own_loop(workshop, 1)
    ids_BS = torch.randint(250, (4, 25), generator=torch.Generator().manual_seed(0))
    base = AutoModelForCausalLM.from_pretrained(workshop / "model", dtype=torch.float64)
    with torch.no_grad():
        first = cross_entropy(base(ids_BS[:, :-1]).logits.flatten(0, 1), ids_BS[:, 1:].flatten())
    assert alone[0] == pytest.approx(float(first), abs=1e-5)
    assert alone[-1] < alone[0]
    assert all(map(math.isfinite, alone))
    for losses in losses_of_own_loop(workshop, 2):
        assert losses == pytest.approx(alone, abs=1e-6)


def test_the_loop_of_ones_own_has_at_most_forty_lines() -> None:
    (function,) = [
        node for node in ast.parse((ROOT / "examples/own_loop.py").read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)
    ]
    assert (function.end_lineno or 0) - function.lineno + 1 <= 40
