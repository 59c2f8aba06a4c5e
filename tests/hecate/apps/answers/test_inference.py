from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hecate.adapters.folder import save_adapter
from hecate.errors import UserError
from testing.answering import answer
from tests.hecate.adapters.making import config_of, tensors_of


@pytest.mark.parametrize(
    ("router", "reason"),
    [
        ("sinkhorn", "made with the router sinkhorn; this version has no router sinkhorn"),
        ({"score": "cosine"}, "made with the router .*; this version has no score cosine"),
        ({"bias_rate": "fast"}, "this version has no bias_rate fast"),
        ({"temperature": 0.0}, r"this version has no temperature 0\.0"),
        ({"sharpness": 2.0}, r"this version has no sharpness 2\.0"),
        (["softmax"], "this version has no router"),
    ],
)
def test_an_adapter_with_a_router_of_another_version_is_refused(tmp_path: Path, router: Any, reason: str) -> None:
    """Routing as softmax would give wrong answers without a word."""
    save_adapter(tmp_path / "adapter", tensors_of(), config_of(extra={"router": router}))
    with pytest.raises(UserError, match=reason):
        answer(tmp_path / "adapter", "2 + 2 =", system=None, model=None, max_new_tokens=1)
