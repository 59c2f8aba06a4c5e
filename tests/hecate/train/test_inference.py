from __future__ import annotations

from pathlib import Path

import pytest

from hecate.adapters import save_adapter
from hecate.errors import UserError
from hecate.train.inference import answer
from tests.hecate.adapters.making import config_of, tensors_of


def test_an_adapter_with_a_router_of_another_version_is_refused(tmp_path: Path) -> None:
    """Routing as softmax would give wrong answers without a word."""
    save_adapter(tmp_path / "adapter", tensors_of(), config_of(extra={"router": "sinkhorn"}))
    with pytest.raises(UserError, match=r"made with the router 'sinkhorn'; this version has softmax"):
        answer(tmp_path / "adapter", "2 + 2 =", system=None, model=None, max_new_tokens=1)
