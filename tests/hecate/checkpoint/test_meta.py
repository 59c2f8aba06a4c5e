"""What a run writes of itself into a manifest is read, or the checkpoint is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hecate.checkpoint.files import CheckpointError
from hecate.checkpoint.manifest import Manifest
from hecate.checkpoint.meta import config_text, config_values, owners_of, reading_meta
from hecate.errors import UserError
from hecate.parallel.values.units import Unit


def manifest(meta: Any) -> Manifest:
    return Manifest(3, 2, {}, meta)


def test_what_is_sound_is_returned(tmp_path: Path) -> None:
    meta = {"config": "max_steps: 3\n", "owners": {"0": [0, 1, 1]}}
    assert config_text(tmp_path, meta) == "max_steps: 3\n"
    assert config_values(tmp_path, meta) == {"max_steps": 3}
    assert {unit: owner_E.tolist() for unit, owner_E in owners_of(tmp_path, manifest(meta)).items()} == {Unit(0): [0, 1, 1]}


@pytest.mark.parametrize("config", [None, 3, "- a", "a: [", "a: &a [*a]", "3"])
def test_another_configuration_is_damage(tmp_path: Path, config: Any) -> None:
    for meta in ({"config": config}, {}, [], None):
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            config_values(tmp_path, meta)


@pytest.mark.parametrize(
    "owners", [None, [0], {"x": [0]}, {"0": [2]}, {"0": [-1]}, {"0": [[0]]}, {"0": [0.5]}, {"0": "a"}, {"0": [2**70]}, {"0": [[0], 1]}]
)
def test_owners_that_are_no_ranks_are_damage(tmp_path: Path, owners: Any) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        owners_of(tmp_path, manifest({"owners": owners}))


def test_errors_of_other_things_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="other data") as caught, reading_meta(tmp_path):
        raise UserError("other data")
    assert not isinstance(caught.value, CheckpointError)
