"""Ranks that are started again go on from a checkpoint; a taken output folder stops all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from hecate.elastic.restart import begin_or_resume
from hecate.errors import USER_ERROR_EXIT, UserError
from hecate.ranks.launcher_files import BEGINS_VARIABLE, ERRORS_VARIABLE, STORE_VARIABLE, error_file
from tests.hecate.apps.megatron.making import config_of, write_parts
from tests.hecate.checkpoint.saving import save, shards_of


def ranks_of(*others: float, rank: int = 0) -> Any:
    """One rank of several. `others` are the values that the other ranks give to each maximum in turn."""
    given = iter(others)
    return mock.Mock(is_first=rank == 0, rank=rank, all_max=lambda value: max(value, next(given)))


def test_a_run_that_begins_claims_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parts(tmp_path)
    config, claim = config_of(tmp_path), mock.Mock()
    assert begin_or_resume(config, ranks_of(0.0, 0.0), claim) == config
    claim.assert_called_once()
    with pytest.raises(UserError, match="taken"):
        begin_or_resume(config, ranks_of(0.0, 0.0), mock.Mock(side_effect=UserError("output_dir is taken")))
    # A rank that only hears of it leaves a text for its launcher, and ends with the status of a user's mistake.
    monkeypatch.setenv(ERRORS_VARIABLE, str(tmp_path))
    with pytest.raises(SystemExit) as caught:
        begin_or_resume(config, ranks_of(0.0, 1.0, rank=1), None)
    assert caught.value.code == USER_ERROR_EXIT
    assert "rank 0 found an error" in error_file(tmp_path, 1).read_text()


def test_ranks_that_begin_again_claim_their_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first rank that was lost before the run had begun may have left files in it."""
    write_parts(tmp_path)
    (tmp_path / "launcher").mkdir()
    monkeypatch.setenv(STORE_VARIABLE, str(tmp_path / "launcher" / "store"))
    config, taken = config_of(tmp_path), mock.Mock(side_effect=UserError("output_dir is taken"))
    with pytest.raises(UserError, match="taken"):
        begin_or_resume(config, ranks_of(0.0, 0.0), taken)
    begin_or_resume(config, ranks_of(0.0, 0.0), mock.Mock())
    monkeypatch.setenv(BEGINS_VARIABLE, "1")
    assert begin_or_resume(config, ranks_of(0.0, 0.0), taken) == config


def test_after_a_restart_by_any_agent_of_torchrun_all_ranks_resume_if_there_is_a_checkpoint(tmp_path: Path) -> None:
    write_parts(tmp_path)
    config, claim = config_of(tmp_path), mock.Mock()
    assert begin_or_resume(config, ranks_of(1.0, 0.0), claim) == replace(config, resume=False)
    Path(config.output_dir).mkdir(exist_ok=True)
    save(Path(config.output_dir), 2, shards_of(1.0))
    assert begin_or_resume(config, ranks_of(1.0, 0.0), claim) == replace(config, resume=True)
    assert begin_or_resume(config, ranks_of(1.0, 1.0, rank=1), None) == replace(config, resume=True)
    claim.assert_not_called()


def test_ranks_that_hecates_launcher_starts_again_resume_the_run_that_had_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first rank that was lost before it had claimed the folder has begun none, whatever lies in it."""
    write_parts(tmp_path)
    config = config_of(tmp_path)
    Path(config.output_dir).mkdir(exist_ok=True)
    save(Path(config.output_dir), 2, shards_of(1.0))
    (tmp_path / "launcher").mkdir()
    monkeypatch.setenv(STORE_VARIABLE, str(tmp_path / "launcher" / "store"))
    monkeypatch.setenv(BEGINS_VARIABLE, "1")
    taken = mock.Mock(side_effect=UserError("output_dir is taken"))
    with pytest.raises(UserError, match="taken"):
        begin_or_resume(config, ranks_of(0.0, 0.0), taken)
    assert begin_or_resume(config, ranks_of(0.0, 0.0), None) == replace(config, resume=True), "its launcher had claimed the folder"
    (tmp_path / "launcher" / "claimed").touch()
    assert begin_or_resume(config, ranks_of(0.0, 0.0), taken) == replace(config, resume=True)
    assert begin_or_resume(config, ranks_of(0.0, 0.0, rank=1), None) == config, "the first rank decides"
