"""What of a configuration must be as it was for a run to go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from hecate.config import Config, to_yaml
from hecate.errors import UserError
from hecate.train.state import _refuse_other_run
from tests.hecate.megatron.making import config_of, write_parts


def meta_of(config: Config) -> dict[str, str]:
    return {"config": to_yaml(config)}


def test_what_makes_it_another_run_is_named_and_nothing_else(tmp_path: Path) -> None:
    write_parts(tmp_path)
    elsewhere = ("nproc=4", "fssdp.shard_size=2", "resume=true", "save_steps=7", "data.eval=[]", "max_steps=9", "fssdp.prefetch=2")
    before = meta_of(config_of(tmp_path))
    _refuse_other_run(Path("checkpoint-1"), before, config_of(tmp_path, *elsewhere))
    with pytest.raises(UserError) as caught:
        _refuse_other_run(Path("checkpoint-1"), before, config_of(tmp_path, *elsewhere, "seed=9", "moe.top_k=1"))
    assert str(caught.value).splitlines()[1:] == ["  moe.top_k: 2 then, 1 now", "  seed: 0 then, 9 now"]
