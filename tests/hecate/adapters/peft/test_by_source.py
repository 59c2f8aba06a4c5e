"""Adapters of several sources in one folder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hecate.adapters.peft import by_source as peft_by_source
from hecate.adapters.peft.by_source import export_by_source
from hecate.adapters.peft.peft_moe import PeftMoeConfig
from hecate.errors import UserError
from hecate.parallel.values.expert_kinds import ONLY_PROJECTION
from hecate.parallel.values.units import Unit

DESCRIPTION = PeftMoeConfig(
    base_model_name_or_path="models/tiny", r=2, alpha=4, use_rslora=False, target_modules=("q_proj",), target_parameters=(), dropout=0.0
)


def test_all_adapters_are_written_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = SimpleNamespace(a_SrI=torch.ones(2, 2, 6), b_SOr=torch.ones(2, 4, 2))
    monkeypatch.setattr(peft_by_source, "pairs_on_first", lambda *_: [(Unit(0, "q_proj"), {ONLY_PROJECTION: pairs})])
    monkeypatch.setattr(peft_by_source, "with_drawn_digest", lambda description, _: description)
    paths = {Unit(0, "q_proj"): {ONLY_PROJECTION: "model.layers.0.self_attn.q_proj"}}
    moe: Any = SimpleNamespace(layers={})
    ranks: Any = SimpleNamespace(is_first=True)
    export_by_source(tmp_path / "run" / "adapters", ["a", "b"], DESCRIPTION, paths, moe, ranks)
    assert sorted(path.name for path in (tmp_path / "run" / "adapters").iterdir()) == ["a", "b"]
    pairs.b_SOr[1] = torch.nan  # the second adapter cannot be written
    with pytest.raises(UserError, match="is not finite"):
        export_by_source(tmp_path / "other" / "adapters", ["a", "b"], DESCRIPTION, paths, moe, ranks)
    assert list((tmp_path / "other").iterdir()) == []
