"""A tensor group that loses a rank is lost as a whole; the others go on with its experts' backups, and lose no step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hecate.elastic.rebuild import Group
from hecate.parallel.cluster.topology import local_topology
from hecate.ranks.ranks import connect
from hecate.train.training import Training
from testing.ranks import run_ranks
from tests.hecate.apps.megatron.making import FOUR_HEADS, config_of, write_parts
from tests.hecate.elastic.losing import DEATH_STEP, PHASES, Dead, die_in, steps_until
from tests.hecate.train.in_process import Losses

STEPS = 5
SETTINGS = ("model.dtype=float64", f"max_steps={STEPS}", "model.tensor_parallel=2", "fssdp.redundancy=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("gpt")
    write_parts(made)
    (made / "tiny.yaml").write_text(FOUR_HEADS)
    return str(made)


@pytest.fixture(scope="module")
def whole(folder: str) -> Losses:
    return run_ranks(4, losing_a_group, folder, "nothing")[0][1]


def losing_a_group(rank: int, world: int, folder: str, phase: str) -> tuple[list[int], Losses]:
    """Rank 1 of two tensor groups dies in a phase of a step: which experts the last two ranks own then, and the losses of their steps."""
    losses: dict[int, tuple[float, float, float]] = {}
    dist.destroy_process_group()
    ranks = connect(dist.FileStore(f"{folder}/{phase}-store", world), rank, world, None, 2)
    run = Training(config_of(Path(folder), f"output_dir={folder}/{phase}", *SETTINGS), ranks)
    steps_until(run, DEATH_STEP, losses)
    try:
        if rank == 1 and phase != "nothing":
            die_in(phase)
        steps_until(run, STEPS, losses)
    except (Dead, RuntimeError):
        run.ranks.leave()
        if rank < 2:
            return [], []
        run.join(Group(connect(dist.FileStore(f"{folder}/{phase}-two", 2), rank - 2, 2, None, 2), local_topology(2, cuda=False)))
        assert run.run_state.step == DEATH_STEP
        steps_until(run, STEPS, losses)
        run.save()
    return sorted(int(name.replace(".", "")) for name in run.parts.optimizer.owned), [losses[step] for step in sorted(losses)]


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_the_other_tensor_group_goes_on(folder: str, whole: Losses, phase: str) -> None:
    results = run_ranks(4, losing_a_group, folder, phase)
    assert [losses for _, losses in results[:2]] == [[], []]
    assert sorted(results[2][0] + results[3][0]) == [layer * 10 + expert for layer in (0, 1) for expert in range(4)]
    for _, losses in results[2:]:
        assert torch.tensor(losses).sub(torch.tensor(whole)).abs().max() <= 1e-10
