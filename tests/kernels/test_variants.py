"""No kernel is compiled in the middle of a run: batches and placements of other sizes find the machine code of the first."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kernels.compile_process import json_of


@pytest.fixture(scope="module")
def variants() -> Any:
    return json_of("tests.kernels.variants")


@pytest.mark.parametrize("layer", ["mixlora", "moe_lora", "full", "linear"])
def test_every_batch_finds_the_same_machine_code(variants: Any, layer: str) -> None:
    first, *others = variants[layer].items()
    assert first[1], "the layer launches nothing"
    for batch, keys in others:
        assert len(keys) == len(first[1])
        anew = [f"{mine.split()[0]}, launch {number}" for number, (mine, its) in enumerate(zip(keys, first[1], strict=True)) if mine != its]
        assert not anew, f"a batch {batch!r} compiles anew: {', '.join(anew)}"
