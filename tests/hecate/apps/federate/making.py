"""A small federated run over the workshop's model."""

from __future__ import annotations

from pathlib import Path

from hecate.config import Config, load_config

RECIPE = """
model: {{name_or_path: {folder}/model, dtype: float64}}
data: {{seq_len: 64}}
output_dir: {folder}/runs/unset
gradient_accumulation_steps: 2
learning_rate: 1e-2
lr_scheduler_type: constant
nproc: 1
lora: {{r: 4, alpha: 8.0, dropout: 0.0, target_modules: [q_proj, down_proj]}}
rounds:
  count: 2
  local_steps: 3
  clients:
    - {{data: {folder}/up.train.jsonl, name: up}}
    - {{data: {folder}/echo.train.jsonl, name: echo}}
    - {{data: {folder}/up.eval.jsonl, name: few}}
"""
UNEQUAL = (
    "rounds.clients=[{{data: {folder}/up.train.jsonl, name: up}}, {{data: {folder}/echo.train.jsonl, name: echo, r: 2}}, "
    "{{data: {folder}/up.eval.jsonl, name: few, r: 1}}]"
)


def write_recipe(folder: Path) -> Path:
    path = folder / "federated.yaml"
    path.write_text(RECIPE.format(folder=folder), encoding="utf-8")
    return path


def recipe(folder: Path, name: str, *overrides: str, claim_output: bool = False) -> Config:
    """The configuration of a federated run whose folder is runs/NAME."""
    given = [override.format(folder=folder) for override in overrides]
    return load_config(write_recipe(folder), [*given, f"output_dir={folder}/runs/{name}"], claim_output=claim_output)
