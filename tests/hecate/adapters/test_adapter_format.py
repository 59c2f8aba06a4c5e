"""One protocol for all formats: each file is found, folders are of one format at most, and what a format cannot do it says in one way."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hecate.adapters import formats
from hecate.adapters.adapter_format import AdapterFormat, refuse_different, require_kind
from hecate.adapters.description import Adapter
from hecate.adapters.export import FORMS
from hecate.adapters.format_table import FORMATS, format_of, read_adapter
from hecate.adapters.model_tensors import require_tensors
from hecate.adapters.peft.description import LoraDescription
from hecate.errors import UserError
from hecate.parallel.values.expert_kinds import KINDS
from tests.hecate.adapters.exporting import save_dense, save_mixlora, save_moe, save_peft
from tests.hecate.adapters.making import linear_config_of
from tests.rooms import ROOT


def test_each_file_is_a_format_and_runs_leave_what_is_there() -> None:
    files = {path.stem for path in Path(formats.__path__[0]).glob("*.py")} - {"__init__"}
    assert len(FORMATS) == len(files)
    assert all(type(one) is not AdapterFormat and one.name == name and one.what for name, one in FORMATS.items())
    assert {kind.output for kind in KINDS.values()} | {"lora", "peft_by_source"} <= set(FORMATS)


def test_the_page_lists_the_forms() -> None:
    page = (ROOT / "docs" / "use" / "adapters.md").read_text(encoding="utf-8")
    assert set(FORMS) <= set(re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE))


def test_a_folder_is_of_one_format(tmp_path: Path) -> None:
    dense, moe = save_dense("llama", tmp_path / "dense"), save_moe("qwen3_moe", tmp_path / "moe")
    save_peft(tmp_path / "sources" / "one", dense, ["q_proj"], experts=False)
    found = {
        "mixlora": save_mixlora(tmp_path / "mixture", dense),
        "peft": save_peft(tmp_path / "experts", moe, ["q_proj"])[0],
        "lora": tmp_path / "sources" / "one",
        "peft_by_source": tmp_path / "sources",
        "model": dense,
    }
    for name, folder in found.items():
        assert [one.name for one in FORMATS.values() if one.recognises(folder)] == [name]
        assert format_of(folder) is FORMATS[name]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"adapter_config\.json: cannot be read: .*; is this an adapter folder\?"):
        format_of(tmp_path / "empty")


def test_what_a_format_cannot_do_it_says_in_one_way(tmp_path: Path) -> None:
    """Of one that can do nothing, and of those that are no adapter."""

    class Nothing(AdapterFormat):
        name = "nothing"
        what = "a stone"

    none: Any = None
    stone, config = Nothing(), SimpleNamespace(output_dir="runs/a", lora=SimpleNamespace(init_from="a"))
    tries = (
        lambda: stone.read(tmp_path),
        lambda: stone.describe(config, none),
        lambda: stone.output(config, none),
        lambda: stone.begin(config, none, none, stone.read),
        lambda: stone.open_for_answers(tmp_path, none, none),
        lambda: stone.export(none, tmp_path),
    )
    for refused in tries:
        with pytest.raises(UserError, match=r": is a stone, which cannot .*\n  give the folder of an adapter"):
            refused()
    assert not stone.recognises(tmp_path)
    assert not stone.exchange(none, none, tmp_path, tmp_path)
    model = save_dense("llama", tmp_path / "model")
    for read in (read_adapter, FORMATS["model"].adapters_in):
        with pytest.raises(UserError, match=r"/model: is a whole model, which cannot be read as an adapter\n  give"):
            read(model)
    save_peft(tmp_path / "sources" / "one", model, ["q_proj"], experts=False)
    assert FORMATS["peft_by_source"].adapters_in(tmp_path / "sources") == [tmp_path / "sources" / "one"]
    with pytest.raises(UserError, match=r"/sources: holds the adapters of several sources: one\n  name one: .*/sources/one"):
        read_adapter(tmp_path / "sources")


def test_a_run_begins_with_its_own_kind_alone(tmp_path: Path) -> None:
    ours = LoraDescription(base_model_name_or_path="models/tiny", r=2, alpha=4, target_modules=("q_proj",))
    with pytest.raises(
        UserError, match=r"(?s)lora\.init_from: .*/left is a mixture of experts over single linears.*but the run trains a LoRA"
    ):
        require_kind(Adapter(tmp_path / "left", {}, linear_config_of()), ours)
    with pytest.raises(
        UserError, match=r"/left has lora\.alpha, scaled 2, but the configuration has 4\n  give lora\.alpha and lora\.use_rslora"
    ):
        refuse_different(tmp_path / "left", "lora.alpha, scaled", 2, 4)
    with pytest.raises(UserError, match=r"/left: has no tensor a \(1 missing\), which the base model needs"):
        require_tensors({}, {"a": (1,)}, tmp_path / "left")
