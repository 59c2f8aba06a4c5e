"""What comes between two steps (`hecate.train.loop`)."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch.distributed as dist

from hecate.train.loop import _one_step


def test_ranks_that_left_their_group_and_found_no_other_do_not_go_on() -> None:
    training, outside = mock.MagicMock(saving=None), mock.MagicMock(caller=None)
    training.run_state = SimpleNamespace(step=1, completed=0)  # the step is done, and what follows it is not
    given = {"max_steps": 9, "save_steps": None, "eval_steps": None, "best_metric": None, "early_stopping_patience": None}
    training.parts.config = SimpleNamespace(fssdp=SimpleNamespace(reshard_interval=None), **given)
    training.ranks.all_most.return_value = [0.0, 1.0, 0.0, 0.0, 0.0]  # some rank has seen that others have come
    outside.membership.next_group.return_value = None
    with pytest.raises(dist.DistError, match="none was formed"):
        _one_step(training, outside, mock.Mock())
    training.ranks.leave.assert_called_once_with(agreed=True)
