from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from hecate.model.parameter_parts import TensorParts
from hecate.ranks.groups import TensorGroups
from testing.ranks import run_ranks

WHOLE = torch.arange(24.0).view(4, 6)


def _put_together(rank: int, world: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    rows, columns = WHOLE[2 * rank : 2 * rank + 2], WHOLE[:, 3 * rank : 3 * rank + 3]
    mine = {"rows": nn.Parameter(rows.clone()), "columns": nn.Parameter(columns.clone())}
    parts = TensorParts(mine, {"rows": 0, "columns": 1}, TensorGroups(group, group))
    for name, part in (("rows", rows), ("columns", columns)):
        assert torch.equal(parts.whole(name, parts.parameters[name]), WHOLE), name
        assert torch.equal(parts.part_of(name, WHOLE), part), name
    # Of something of the parameter's shape, such as a moment.
    assert torch.equal(parts.whole("columns", 2 * columns), 2 * WHOLE)


def test_two_ranks_have_half_each_and_the_whole_together() -> None:
    run_ranks(2, _put_together)
