"""Adapters of several sources in one folder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hecate.adapters.formats import peft_by_source
from hecate.adapters.peft.description import LoraDescription
from hecate.errors import UserError
from hecate.parallel.values.expert_kinds import ONLY_PROJECTION
from hecate.parallel.values.units import Unit

DESCRIPTION = LoraDescription(
    base_model_name_or_path="models/tiny", r=2, alpha=4, use_rslora=False, target_modules=("q_proj",), target_parameters=(), dropout=0.0
)


def test_all_adapters_are_written_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = SimpleNamespace(a_SrI=torch.ones(2, 2, 6), b_SOr=torch.ones(2, 4, 2))
    monkeypatch.setattr(peft_by_source, "pairs_on_first", lambda *_: [(Unit(0, "q_proj"), {ONLY_PROJECTION: pairs})])
    monkeypatch.setattr(peft_by_source, "with_drawn_digest", lambda description, _: description)
    base: Any = SimpleNamespace(linears=[SimpleNamespace(unit=Unit(0, "q_proj"), path="model.layers.0.self_attn.q_proj")])
    moe: Any = SimpleNamespace(layers={})
    ranks: Any = SimpleNamespace(is_first=True)
    peft_by_source.write_by_source(tmp_path / "run" / "adapters", ["a", "b"], DESCRIPTION, base, moe, ranks)
    assert sorted(path.name for path in (tmp_path / "run" / "adapters").iterdir()) == ["a", "b"]
    pairs.b_SOr[1] = torch.nan  # the second adapter cannot be written
    with pytest.raises(UserError, match="is not finite"):
        peft_by_source.write_by_source(tmp_path / "other" / "adapters", ["a", "b"], DESCRIPTION, base, moe, ranks)
    assert list((tmp_path / "other").iterdir()) == []
