"""The recipes for models of billions of parameters need the memory that their files say, planned from sizes alone."""

from __future__ import annotations

import re

import numpy as np
import pytest

from hecate.apps.foresee.dry_run import fits, forecast
from hecate.config import load_config
from hecate.config.files.presets import base_presets, run_presets
from hecate.model.files.tensor_shapes import tensors_of
from hecate.model.sizes.run_shape import run_shape

BASES = {
    "llama3_8b": "llama-3-8b",
    "qwen2.5_7b": "qwen2.5-7b",
    "mistral_7b": "mistral-7b",
    "qwen3_30b_a3b": "qwen3-30b-a3b",
    "mixtral_8x7b": "mixtral-8x7b",
}
TOPOLOGIES = ("one-h100", "h100-node", "two-h100-nodes", "four-h100-nodes")
IN_MAKE_TEST = [("llama3_8b", "one-h100"), ("mixtral_8x7b", "h100-node")]
OTHERS = [(recipe, topology) for recipe in BASES for topology in TOPOLOGIES if (recipe, topology) not in IN_MAKE_TEST]


@pytest.mark.parametrize(
    ("recipe", "topology"), [*IN_MAKE_TEST, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)], ids=lambda name: name
)
def test_the_memory_is_what_the_recipe_says(recipe: str, topology: str) -> None:
    config = load_config(recipe, [f"model.name_or_path={BASES[recipe]}"], claim_output=False, inputs=False)
    found = forecast(run_shape(config, topology, None), "dirichlet_drift")
    one = found.policies[0]
    rank = int((one.memory_PD.max(0) / np.asarray(found.run.topology.memory)).argmax())
    got = f"{one.memory_PD[:, rank].max() / 1e9:.1f}{'' if fits(one, found.run) else ' (too much)'}"
    said = re.search(r"with 1, 8, 16 and 32 of them: (.*)", run_presets()[recipe].read_text(encoding="utf-8"))
    assert said is not None
    assert got == said[1].split(", ")[TOPOLOGIES.index(topology)]


def test_bases_have_as_many_parameters_as_their_makers_say() -> None:
    """In billions, from the cards of the models."""
    published = {"llama-3-8b": 8.03, "qwen2.5-7b": 7.62, "mistral-7b": 7.25, "qwen3-30b-a3b": 30.5, "mixtral-8x7b": 46.7}
    found = {name: sum(one.numel for one in tensors_of(path).values()) / 1e9 for name, path in base_presets().items()}
    assert found == pytest.approx(published, rel=2e-3)


def test_every_base_is_one_of_a_recipe() -> None:
    assert set(base_presets()) == set(BASES.values())
