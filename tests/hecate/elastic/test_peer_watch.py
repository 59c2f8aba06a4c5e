"""A thread of each rank notices in the launcher's file that a rank is lost, while the main thread waits for a GPU."""

from __future__ import annotations

import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from hecate.elastic import peer_watch
from hecate.elastic.peer_watch import LOOK_SECONDS, PeerWatch
from hecate.parallel.comm.aborts import AbortedError, read
from hecate.ranks.launcher_files import MEETING_VARIABLE, Generation, write_generation
from hecate.ranks.ranks import Ranks, connect, lost_a_peer
from testing.ranks import run_ranks
from tests.hecate.ranks.stand_in import gloo_as_nccl
from tests.hecate.train.in_process import ranks_of_default_group


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(peer_watch, "is_nccl", lambda group: group == "nccl")
    write_generation(tmp_path / "store", Generation(0, (0, 1, 2), (0, 1, 2)))
    return tmp_path / "store"


def ranks_on(backend: str) -> mock.Mock:
    ranks = mock.create_autospec(Ranks, instance=True)
    ranks.groups = mock.Mock(world=backend)
    return ranks


def test_a_lost_rank_is_noticed_within_a_second(store: Path) -> None:
    assert LOOK_SECONDS < 1
    aborted, ranks = threading.Event(), ranks_on("nccl")
    ranks.abort.side_effect = aborted.set
    watch = PeerWatch(store)
    watch.begin((0, 1, 2), ranks)
    write_generation(store, Generation(1, (0, 2), (0, 2)))
    assert aborted.wait(60)
    store.with_name("generation").unlink()
    assert watch._thread is not None
    watch._thread.join(60)
    assert not watch._thread.is_alive(), "the thread outlives the launcher"


def test_which_generations_mean_a_loss(store: Path) -> None:
    """A loss may be followed by a growth before anybody looks. A growth alone waits for the end of a step."""
    watch, ranks = PeerWatch(store), ranks_on("nccl")
    with mock.patch.object(threading.Thread, "start"):
        watch.begin((0, 1, 2), ranks)
    for number, (members, lost) in enumerate([((0, 1, 2), False), ((0, 1, 2, 3), False), ((0, 1, 3), True)]):
        write_generation(store, Generation(number, members, tuple(range(len(members)))))
        ranks.abort.reset_mock()
        assert watch.look()
        assert ranks.abort.called == lost, members
    watch.begin((0, 1, 3), next_ranks := ranks_on("nccl"))
    ranks.abort.reset_mock()
    assert watch.look()
    assert not ranks.abort.called
    assert not next_ranks.abort.called


def test_ranks_of_several_nodes_are_watched_on_gloo_too(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that falls silent breaks no connection for a while."""
    monkeypatch.setenv(MEETING_VARIABLE, "10.0.0.1:29400")
    monkeypatch.setattr(threading.Thread, "start", lambda _: None)
    watch, ranks = PeerWatch(store), ranks_on("gloo")
    watch.begin((0, 1, 2), ranks)
    write_generation(store, Generation(1, (0, 1), (0, 1)))
    assert watch.look()
    assert ranks.abort.called


def test_ranks_on_gloo_are_not_watched(store: Path) -> None:
    watch, ranks = PeerWatch(store), ranks_on("gloo")
    watch.begin((0, 1, 2), ranks)
    assert watch._thread is None
    write_generation(store, Generation(1, (0, 1), (0, 1)))
    assert watch.look()
    assert not ranks.abort.called


def read_behind_a_lost_rank(rank: int, world: int, folder: str) -> tuple[str, bool, float]:
    """This rank waits in a read that ends by an abort only, and with garbage; then it goes on alone."""
    store, freed = Path(folder, "store"), threading.Event()
    ranks, whole = ranks_of_default_group(rank, world), distributed_c10d._abort_process_group
    written = mock.Mock(spec=torch.Tensor)
    written.cpu.side_effect = lambda: freed.wait(60) and torch.full((2,), 7e30)
    write_generation(store, Generation(0, (0, 1), (0, 1)))
    with gloo_as_nccl():

        def abort() -> None:
            whole()
            freed.set()

        watch = PeerWatch(store)
        watch.begin((0, 1), ranks)
        with mock.patch.object(distributed_c10d, "_abort_process_group", abort):
            write_generation(store, Generation(1, (0,), (0,)))
            try:
                raise AssertionError(f"garbage was read: {read(written, ranks.groups.world)}")
            except AbortedError as error:
                text, lost = str(error), lost_a_peer(error)
            ranks.leave()
        alone = connect(dist.HashStore(), 0, 1)
        watch.begin((0,), alone)
        return text, lost, alone.all_max(3.0)


def test_a_rank_that_waits_in_a_read_is_freed_and_goes_on(tmp_path: Path) -> None:
    ((text, lost, value),) = run_ranks(1, read_behind_a_lost_rank, str(tmp_path))
    assert "another rank was lost" in text
    assert lost
    assert value == 3.0
