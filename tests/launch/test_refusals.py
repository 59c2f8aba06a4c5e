"""Group sizes that the ranks, the model or the launcher do not support are refused by every command before it starts or writes anything."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hecate.cli import app
from hecate.errors import UserError
from hecate.launch import local_launcher, node_launcher
from hecate.launch.ray_job import driver
from hecate.train import preflight
from tests.hecate.apps.megatron.making import write_parts

TENSOR = "model.tensor_parallel=2"
TENSOR_RANKS = r"model\.tensor_parallel: must divide the number of ranks, which is 3, got 2\n  give one of 1, 3"
SHARD_RANKS = r"fssdp\.shard_size: must divide the number of ranks, which is 3, got 2\n  give one of 1, 3, or null for all ranks"
NODE = r"{key}: must divide the number of ranks on a node, which is 3, got 2\n  .* Give another --nproc-per-node"
VOCABULARY = r"model\.tensor_parallel: must divide the 258 tokens of the vocabulary, got 4\n  give one of 1, 2, 3, 6, 43, or add tokens"
OTHER_MODEL = ["model.front_end=transformers", "model.name_or_path={folder}", "model.tokenizer=null", TENSOR]
NO_PARTS = r"model\.tensor_parallel: needs model\.front_end=megatron, whose layers can be split\n    hint: leave it at 1"
FEW_GROUPS = r"fssdp\.redundancy: 1 needs more tensor groups than that, .*, got 1\n    hint: leave it at 0, or take 4 ranks or more"
ON_RAY = r"{key}: is not supported on Ray, .*\n  set it to .*, or use hecate launch"
NOWHERE = ["--address", "127.0.0.1:9"]
NO_DASHBOARD = ["--address", "http://127.0.0.1:9", "--working-dir", "{folder}"]

MISTAKES: list[tuple[str, list[str], str]] = [
    ("train", ["ranks", TENSOR], TENSOR_RANKS),
    ("train", ["ranks", "fssdp.shard_size=2"], SHARD_RANKS),
    ("train", ["nproc=4", "model.tensor_parallel=4"], VOCABULARY),
    ("train", OTHER_MODEL, NO_PARTS),
    ("train", ["nproc=2", TENSOR, "fssdp.redundancy=1"], FEW_GROUPS),
    ("launch", ["--nproc-per-node", "3", TENSOR], TENSOR_RANKS),
    ("launch", ["--nproc-per-node", "3", "fssdp.shard_size=2"], SHARD_RANKS),
    ("launch", ["--nproc-per-node", "3", "--nnodes", "1:2", TENSOR], NODE.format(key=r"model\.tensor_parallel")),
    ("launch", ["--nproc-per-node", "3", "--nnodes", "1:2", "fssdp.shard_size=2"], NODE.format(key=r"fssdp\.shard_size")),
    ("launch", ["--nproc-per-node", "4", "model.tensor_parallel=4"], VOCABULARY),
    ("launch", OTHER_MODEL, NO_PARTS),
    ("plan", ["--ranks", "3", TENSOR], TENSOR_RANKS),
    ("plan", ["--ranks", "3", "fssdp.shard_size=2"], SHARD_RANKS),
    ("plan", ["--ranks", "4", "model.tensor_parallel=4"], VOCABULARY),
    ("plan", OTHER_MODEL, NO_PARTS),
    ("ray", [*NOWHERE, TENSOR], ON_RAY.format(key=r"model\.tensor_parallel")),
    ("ray", [*NOWHERE, "fssdp.shard_size=2"], ON_RAY.format(key=r"fssdp\.shard_size")),
    ("submit", [*NO_DASHBOARD, TENSOR], ON_RAY.format(key=r"model\.tensor_parallel")),
    ("submit", [*NO_DASHBOARD, "fssdp.shard_size=2"], ON_RAY.format(key=r"fssdp\.shard_size")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("refusals")
    write_parts(made)
    (made / "tiny.yaml").write_text("{kind: full, hidden: 32, ffn: 48, layers: 2, seq: 32, experts: 4, top_k: 2, query_width: 256}\n")
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(b"")
    return made


@pytest.mark.parametrize(("command", "given", "words"), MISTAKES)
def test_a_mistake_starts_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, given: list[str], words: str) -> None:
    def started(*_: Any, **__: Any) -> Any:
        raise AssertionError("a process was started, or a cluster was looked for")

    monkeypatch.setattr(local_launcher, "launch_local", started)
    monkeypatch.setattr(node_launcher, "launch", started)
    monkeypatch.setattr(driver, "connected", started)
    monkeypatch.setattr(subprocess.Popen, "__init__", started)
    monkeypatch.setattr(preflight, "default_ranks", lambda: 3 if "ranks" in given else 2)
    monkeypatch.delenv("RANK", raising=False)
    options = [option.format(folder=folder) for option in given if option != "ranks"]
    result = CliRunner().invoke(app, [command, str(folder / "config.yaml"), f"output_dir={folder}/runs/bad", *options])
    assert isinstance(result.exception, UserError), result.exception
    with pytest.raises(UserError, match=words):
        raise result.exception
    assert len(str(result.exception).splitlines()) <= 8
    assert not (folder / "runs").exists()
