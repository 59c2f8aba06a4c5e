"""Write a configuration file and load it; the fixture `folder` makes the files that it names."""

from pathlib import Path

from hypothesis import HealthCheck, settings

from hecate.config import Config, load_config

reuse_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
"""for tests of Hypothesis that write into one folder again and again"""
MINIMAL = "model: {name_or_path: model}\ndata: {train: a.jsonl}\noutput_dir: runs/first\nmax_steps: 10\n"


def load(text: str, *overrides: str) -> Config:
    Path("run.yaml").write_text(text)
    return load_config("run.yaml", list(overrides))
