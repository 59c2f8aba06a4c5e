"""`hub: true` fetches what is named on the hub, and without it nothing asks the hub. A stand-in takes the hub's place."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from hecate.config import ConfigError, load_config
from hecate.config.files.hub import hub_hint
from tests.hecate.config.making import MINIMAL, load
from tests.rooms import ALL_SOURCES, ROOT

NAMED = MINIMAL.replace("name_or_path: model", "name_or_path: org/small").replace("train: a.jsonl", "train: [org/talk/data/*.jsonl]")


@pytest.fixture
def asked(folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the stand-in was asked for. It has one model and one data set."""
    cache, calls = tmp_path_factory.mktemp("hub"), []
    (cache / "small").mkdir()
    for file in (folder / "model").iterdir():
        (cache / "small" / file.name).write_bytes(file.read_bytes())
    (cache / "talk" / "data").mkdir(parents=True)
    (cache / "talk" / "data" / "one.jsonl").write_text('{"text": "hello"}\n')

    def snapshot(name: str, *, repo_type: str, allow_patterns: list[str] | None, local_files_only: bool) -> str:
        calls.append((name, repo_type, allow_patterns, local_files_only))
        if not (cache / name.partition("/")[2]).is_dir():
            raise huggingface_hub.errors.RepositoryNotFoundError(f"no {name}", response=_Response())  # type: ignore[arg-type]
        return str(cache / name.partition("/")[2])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return calls


class _Response:
    """As much of an answer as the error of huggingface_hub looks at."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.request = None
        self.status_code = 404


def test_the_model_and_the_files_of_a_data_set_are_fetched(asked: list[tuple[Any, ...]]) -> None:
    config = load(NAMED, "hub=true")
    (model, data) = asked
    assert (model[0], model[1], model[3]) == ("org/small", "model", False)
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in model[2]), "code, or what must be unpickled"
    assert data == ("org/talk", "dataset", ["data/*.jsonl"], False)
    assert Path(config.model.name_or_path).name == "small"
    (source,) = config.data.train
    assert source.name == "talk"
    assert source.path.endswith("talk/data/*.jsonl")


def test_only_the_launcher_fetches(asked: list[tuple[Any, ...]]) -> None:
    load(NAMED, "hub=true")
    del asked[:]
    load_config("run.yaml", ["hub=true"], claim_output=False)
    assert [call[3] for call in asked] == [True, True]


def test_clients_read_what_was_fetched_for_them(asked: list[tuple[Any, ...]]) -> None:
    rounds = "rounds: {local_steps: 2, clients: [{data: org/talk/data/one.jsonl, eval: org/talk/data/one.jsonl}]}\n"
    text = MINIMAL.replace("data: {train: a.jsonl}\n", rounds).replace("max_steps: 10\n", "")
    (client,) = load(text, "hub=true").rounds.clients
    assert client.data == client.eval
    assert Path(client.data).is_file()


def test_a_plan_fetches_no_data(asked: list[tuple[Any, ...]]) -> None:
    Path("run.yaml").write_text(NAMED)
    load_config("run.yaml", ["hub=true"], claim_output=False, inputs=False)
    assert [call[1] for call in asked] == ["model"]


def test_what_is_there_is_not_fetched(asked: list[tuple[Any, ...]]) -> None:
    load(MINIMAL, "hub=true")
    Path("data/talk").mkdir(parents=True)
    Path("data/talk/a.jsonl").write_text('{"text": "hello"}\n')
    assert load(MINIMAL, "hub=true", "data.train=data/talk/*.jsonl").data.train[0].path == "data/talk/*.jsonl"
    with pytest.raises(ConfigError, match=r"data\.train\[0\]\.path: no file matches data/talks/\*\.jsonl"):
        load(MINIMAL, "hub=true", "data.train=data/talks/*.jsonl")
    assert not asked


def test_nothing_is_asked_of_the_hub_without_the_key(asked: list[tuple[Any, ...]]) -> None:
    with pytest.raises(ConfigError) as refused:
        load(NAMED.replace("data/*.jsonl", "one.jsonl"))
    assert str(refused.value).count("nothing is downloaded. hub: true fetches org/") == 2
    assert not asked
    Path("models").mkdir()
    assert hub_hint("models/mine") == "", "a folder that is there holds no name of the hub"
    uses = [path for path in ALL_SOURCES if "huggingface_hub" in _imports(path)]
    assert uses == [ROOT / "hecate" / "config" / "files" / "hub.py"]


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_a_name_that_the_hub_does_not_have(asked: list[tuple[Any, ...]]) -> None:
    with pytest.raises(ConfigError, match=r"model\.name_or_path: the hub does not give the model org/none"):
        load(NAMED.replace("org/small", "org/none"), "hub=true")


def test_offline_the_cache_is_all_there_is(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(ConfigError) as refused:
        load(NAMED, "hub=true")
    for said in ("hf download org/small", "hf download org/talk --repo-type dataset", "is not in the hub's cache"):
        assert said in str(refused.value)
    assert sorted(problem.key for problem in refused.value.problems) == ["data.train[0].path", "model.name_or_path"], "each once"


def test_paths_that_are_no_names_get_no_hint() -> None:
    assert all(hub_hint(name) for name in ("org/name", "org/name/data/x.jsonl"))
    assert not any(hub_hint(path) for path in ("name", "/models/name", "./org/name", "../x/y", "~/x/y"))
