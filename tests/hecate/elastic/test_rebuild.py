"""A run that loses or gains a rank ends with the same result as a run that never did."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from hecate import faults
from hecate.elastic.backups import copy_to_backup_ranks
from hecate.parallel.cluster.backup_ranks import backup_ranks
from hecate.ranks.ranks import connect
from hecate.ranks.sockets import tcp_sockets
from testing.ranks import run_ranks
from testing.tiny_run import STEPS, make_workshop
from tests.hecate.elastic.losing import DEATH_STEP, PHASES, VICTIM, Dead, die_in, make_run, make_run_in_groups, regroup, steps_until
from tests.hecate.train.in_process import Losses, ranks_of_default_group


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_workshop(tmp_path_factory.mktemp("workshop")))


@pytest.fixture(scope="module")
def whole(workshop: str) -> Losses:
    return run_ranks(4, uninterrupted, workshop)[0]


def uninterrupted(rank: int, world: int, workshop: str, name: str = "whole", *overrides: str) -> Losses:
    losses: dict[int, tuple[float, float, float]] = {}
    steps_until(make_run(workshop, name, rank, world, *overrides), STEPS, losses)
    return [losses[step] for step in sorted(losses)]


def shrinking(rank: int, world: int, workshop: str, name: str, phases: list[str], overrides: tuple[str, ...]) -> list[Any]:
    """For each phase, the losses of the steps that rank 0 has reported, and the steps that this rank has done twice."""
    found = []
    for number, phase in enumerate(phases):
        run = make_run(workshop, f"{name}-{phase}", rank, world, *overrides)
        losses: dict[int, tuple[float, float, float]] = {}
        steps_until(run, DEATH_STEP, losses)
        if "fssdp.redundancy=0" in overrides:
            run.save()
            steps_until(run, DEATH_STEP + 1, losses)
        try:
            if rank == VICTIM:
                die_in(phase)
            steps_until(run, STEPS, losses)
        except (Dead, RuntimeError):
            done = run.run_state.step
            if rank != VICTIM:
                regroup(run, f"{workshop}/{name}-{number}", rank - (rank > VICTIM), world - 1)
                chunks = sum(chunked.num_experts for chunked in run.parts.moe.engine.shards.chunked.values())
                assert len(run.parts.optimizer.owned) in (chunks // 3, chunks // 3 + 1)
                found.append((done, run.run_state.step, losses))
                steps_until(run, STEPS, losses)
        run.ranks.leave()
        # The next phase's run begins with all four again.
        connect(dist.FileStore(f"{workshop}/{name}-again-{number}", world), rank, world)
    return found


@pytest.mark.parametrize(
    "phases", [("backward", "stepped"), pytest.param(("forward", "gradients", "norm"), marks=pytest.mark.slow)], ids=str
)
def test_survivors_go_on_without_losing_a_step(workshop: str, whole: Losses, phases: tuple[str, ...]) -> None:
    results = run_ranks(4, shrinking, workshop, f"shrunk-{phases[0]}", list(phases), ("fssdp.redundancy=1",))
    for rank in (0, 2, 3):
        for phase, (done, restarted, losses) in zip(phases, results[rank], strict=True):
            assert done == restarted == DEATH_STEP, phase
            assert torch.tensor([losses[step] for step in sorted(losses)]).sub(torch.tensor(whole)).abs().max() <= 1e-10, phase


def leaving_groups(rank: int, world: int, workshop: str, phase: str) -> tuple[int, int, Losses]:
    """Two groups of two lose a rank in a step, and another one between two steps: the experts' backups at the end, the steps lost, and the
    losses of the first rank's steps."""
    losses: dict[int, tuple[float, float, float]] = {}
    run = make_run_in_groups(workshop, f"groups-{phase}", rank, world, 2, "fssdp.redundancy=1")
    steps_until(run, DEATH_STEP, losses)
    assert not run.parts.optimizer.backups, "the other group holds each expert"
    try:
        if rank == VICTIM:
            die_in(phase)
        steps_until(run, STEPS, losses)
    except Dead:
        run.ranks.leave()
        return 0, 0, []
    except RuntimeError:
        lost = DEATH_STEP - run.run_state.step
        regroup(run, f"{workshop}/groups-{phase}-three", rank - (rank > VICTIM), world - 1)
    assert run.parts.moe.engine.shards.mesh.shard_size == 3
    kept = len(run.parts.optimizer.backups)
    steps_until(run, STEPS, losses)
    return kept, lost, [losses[step] for step in sorted(losses)]


@pytest.mark.parametrize("phase", [pytest.param(one, marks=() if one == "norm" else pytest.mark.slow) for one in PHASES])
def test_sharding_groups_that_lose_a_rank_go_on_as_one_with_backups(workshop: str, whole: Losses, phase: str) -> None:
    results = run_ranks(4, leaving_groups, workshop, phase)
    assert sum(kept for kept, _, _ in results) == 2 * 5, "each of two layers' five experts has a backup"
    assert [lost for _, lost, _ in results] == [0] * 4
    for number in {0, 1, 2, 3} - {VICTIM}:
        assert torch.tensor(results[number][2]).sub(torch.tensor(whole)).abs().max() <= 1e-10


def losing_while_saving(rank: int, world: int, workshop: str) -> tuple[list[str], bool]:
    """A rank is lost while all write a checkpoint that never ends; what is in the run's folder after the survivors have saved again."""

    def write(staging: Path, rank: int, world_size: int, tensors: object, go_on: Callable[[], None]) -> None:
        staging.mkdir(parents=True, exist_ok=True)
        while True:
            go_on()
            time.sleep(0.01)

    run = make_run(workshop, "losing-while-saving", rank, world, "fssdp.redundancy=1")
    steps_until(run, 1, {})
    with mock.patch("hecate.checkpoint.save_run.write_shard", write):
        run.begin_save()
    try:
        if rank == VICTIM:
            raise Dead
        steps_until(run, 2, {})
    except Dead:
        run.drop_save()
        run.ranks.leave()
        return [], False
    except RuntimeError:
        regroup(run, f"{workshop}/losing-while-saving", rank - (rank > VICTIM), world - 1)
    assert run.saving is None
    steps_until(run, 2, {})
    run.begin_save()
    folder = run.end_save().folder
    assert folder is not None
    writing = any(thread.name == "checkpoint writer" for thread in threading.enumerate())
    return sorted(path.name for path in folder.parent.glob("checkpoint-*")), writing


@pytest.mark.slow
def test_a_save_under_way_is_given_up_with_the_rank_and_the_next_one_is_whole(workshop: str) -> None:
    for found in [one for rank, one in enumerate(run_ranks(4, losing_while_saving, workshop)) if rank != VICTIM]:
        assert found == (["checkpoint-2"], False)


@pytest.mark.slow
def test_survivors_end_with_the_same_bits_where_sums_have_an_order(workshop: str) -> None:
    ordered = ("fssdp.redundancy=1", "deterministic=true")
    whole = run_ranks(4, uninterrupted, workshop, "whole-ordered", *ordered)[0]
    phases = [phase for phase in PHASES if phase != "gradients"]  # there is no such all-reduce
    for done, restarted, losses in run_ranks(4, shrinking, workshop, "shrunk-ordered", phases, ordered)[0]:
        assert done == restarted == DEATH_STEP
        assert [losses[step] for step in sorted(losses)] == whole


@pytest.mark.slow
def test_without_copies_they_go_back_to_the_checkpoint(workshop: str, whole: Losses) -> None:
    done, restarted, losses = run_ranks(4, shrinking, workshop, "back", ["backward"], ("fssdp.redundancy=0",))[0][0]
    assert (done, restarted) == (DEATH_STEP + 1, DEATH_STEP)
    assert torch.tensor([losses[step] for step in sorted(losses)]).sub(torch.tensor(whole)).abs().max() <= 1e-10


@pytest.mark.slow
def test_blocks_of_a_pool_outlive_their_owner(workshop: str) -> None:
    """With backups on another rank, or from the checkpoint."""
    pool = ("lora.pairs=shards",)
    whole = run_ranks(4, uninterrupted, workshop, "whole-pool", *pool)[0]
    for phases, redundancy in ((["forward", "backward", "norm"], 1), (["backward"], 0)):
        overrides = (f"fssdp.redundancy={redundancy}", *pool)
        for done, restarted, losses in run_ranks(4, shrinking, workshop, f"pool-{redundancy}", phases, overrides)[0]:
            assert (done, restarted) == (DEATH_STEP + 1 - redundancy, DEATH_STEP)
            assert torch.tensor([losses[step] for step in sorted(losses)]).sub(torch.tensor(whole)).abs().max() <= 1e-10


def half_stepped(rank: int, world: int, workshop: str) -> tuple[int, Losses]:
    """All ranks have the norm of step 3 when the victim dies. Ranks 2 and 3 get the error before they have taken the step."""
    run = make_run(workshop, "half", rank, world, "fssdp.redundancy=1")
    losses: dict[int, tuple[float, float, float]] = {}
    steps_until(run, DEATH_STEP, losses)

    def fail(place: str, _subject: object) -> None:
        if place == "optimizer" and rank >= VICTIM:
            faults.arm(None)
            raise Dead if rank == VICTIM else RuntimeError("a peer is lost")

    faults.arm(fail)
    try:
        steps_until(run, STEPS, losses)
    except (Dead, RuntimeError):
        faults.arm(None)
        done = run.run_state.step
        if rank == VICTIM:
            run.ranks.leave()
            return done, []
        regroup(run, f"{workshop}/half-store", rank - (rank > VICTIM), world - 1)
        assert run.run_state.step == DEATH_STEP + 1
        steps_until(run, STEPS, losses)
    return done, [losses[step] for step in sorted(losses)]


def test_a_step_that_some_have_taken_is_taken_by_all(workshop: str, whole: Losses) -> None:
    results = run_ranks(4, half_stepped, workshop)
    assert [done for done, _ in results] == [DEATH_STEP + 1, DEATH_STEP, DEATH_STEP, DEATH_STEP]
    assert torch.tensor(results[0][1]).sub(torch.tensor(whole)).abs().max() <= 1e-10
    assert torch.tensor(results[2][1]).sub(torch.tensor(whole[:2] + whole[3:])).abs().max() <= 1e-10


def growing(rank: int, world: int, workshop: str, redundancy: int) -> Losses:
    """Two ranks train two steps. A third rank, which has loaded by itself meanwhile, joins them and becomes rank 0."""
    losses: dict[int, tuple[float, float, float]] = {}
    name = f"grown-{redundancy}"
    ranks_of_default_group(rank, world).leave()
    if rank == 2:
        connect(dist.HashStore(), 0, 1)
        run = make_run(workshop, name, 0, 1, f"fssdp.redundancy={redundancy}")
        run.state = None
    else:
        connect(dist.FileStore(f"{workshop}/{name}-two", 2), rank, 2)
        # As many rows as the other runs have on four ranks.
        run = make_run(workshop, name, rank, 2, f"fssdp.redundancy={redundancy}")
        run.parts.stream.sequences_per_step = 8
        steps_until(run, 2, losses)
    regroup(run, f"{workshop}/{name}-three", (rank + 1) % 3, 3)
    assert run.run_state.step == 2
    assert len(run.parts.optimizer.owned) in (3, 4)
    steps_until(run, STEPS, losses)
    return [losses[step] for step in sorted(losses)]


@pytest.mark.parametrize("redundancy", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_comes_new(workshop: str, whole: Losses, redundancy: int) -> None:
    results = run_ranks(3, growing, workshop, redundancy)
    for losses in results:
        assert torch.tensor(losses).sub(torch.tensor(whole[-len(losses) :])).abs().max() <= 1e-10
    assert [len(losses) for losses in results] == [STEPS, STEPS, STEPS - 2]


def compare_shadows(rank: int, world: int, workshop: str, backups: int) -> int:
    """Send each rank's expert states to its backup ranks by other means, and compare them there; return the number compared."""
    run = make_run(workshop, f"shadowed-{backups}", rank, world, f"fssdp.redundancy={backups}")
    steps_until(run, 3, {})
    rows: list[dict[str, dict[str, torch.Tensor]]] = [{} for _ in range(world)]
    dist.all_gather_object(rows, {name: run.parts.optimizer.row(parameter) for name, parameter in run.parts.optimizer.owned.items()})
    backup_rank_DB = backup_ranks(run.parts.moe.engine.shards.config.topology, backups).tolist()
    wards = {name: row for ward, its_own in enumerate(backup_rank_DB) if rank in its_own for name, row in rows[ward].items()}
    assert wards.keys() == run.parts.optimizer.backups.keys()
    for name, backup in run.parts.optimizer.backups.items():
        ours, theirs = run.parts.optimizer.row(backup), wards[name]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert any(len(row) == 4 for row in wards.values()), "none was ever stepped"
    saved = [name.split("/")[1] for name in run.parts.optimizer.state_tensors() if name.startswith("owned/")]
    assert not set(saved) & run.parts.optimizer.backups.keys()
    before = {name: run.parts.optimizer.row(backup) for name, backup in run.parts.optimizer.backups.items()}
    assert copy_to_backup_ranks(run.parts.moe.engine, run.parts.optimizer, backups) > 0
    for name, backup in run.parts.optimizer.backups.items():
        again = run.parts.optimizer.row(backup)
        assert all(torch.equal(again[key], before[name][key]) for key in again), name
    return len(run.parts.optimizer.backups)


@pytest.mark.slow
@pytest.mark.parametrize("backups", [1, 2])
def test_a_shadow_is_its_owner_bit_for_bit(workshop: str, backups: int) -> None:
    assert sum(run_ranks(3, compare_shadows, workshop, backups)) == backups * 2 * 5


def test_ranks_that_wait_are_freed_by_an_abort(tmp_path: Path) -> None:
    """Rank 2 waits for rank 1, which waits for rank 0, which aborts. All of them get an error, and none waits for a timeout."""
    assert run_ranks(3, waiting_in_a_row, timeout=60)[1:] == ["lost"] * 2


def waiting_in_a_row(rank: int, world: int) -> str:
    ranks = replace(ranks_of_default_group(rank, world), connections=frozenset(tcp_sockets()))
    ranks.barrier()
    receive: Callable[[], Any] = lambda: dist.recv(torch.zeros(1), src=rank - 1, group=ranks.groups.tokens)  # noqa: E731
    try:
        if rank:
            receive()
    except RuntimeError:
        ranks.leave()
        return "lost"
    ranks.leave()
    return "left"
