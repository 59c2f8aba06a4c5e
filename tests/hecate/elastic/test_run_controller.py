"""A controller receives a run's steps, and its orders change all ranks alike between two steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hecate.config import load_config
from hecate.elastic.run_controller import BeginFacts, ReplanOrder, StepFacts
from hecate.io.strict_json import JsonError
from hecate.ranks.groups import ExpertGroups
from hecate.ranks.ranks import Ranks
from hecate.train.loop import train
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop


class Recorder:
    """Has an order after step 2 on the first rank, and another one on the second rank, which is ignored. It stops the run after `until`."""

    def __init__(self, rank: int, order: ReplanOrder | None, until: int) -> None:
        self.rank, self.until = rank, until
        self.to_give, self.given = order, None if rank == 0 else ReplanOrder(number=7, sequences=(0, 8))
        self.begun: list[BeginFacts] = []
        self.steps: list[StepFacts] = []
        self.checkpoints: list[tuple[int, str]] = []

    def begins(self, facts: BeginFacts) -> None:
        self.begun.append(facts)

    def stepped(self, facts: StepFacts) -> None:
        self.steps.append(facts)
        if self.rank == 0 and facts.step == 2:
            self.given = self.to_give

    def saved(self, step: int, path: Path) -> None:
        self.checkpoints.append((step, path.name))

    def replan_order(self) -> ReplanOrder | None:
        return self.given

    def stop_requested(self) -> bool:
        return self.rank == 1 and len(self.steps) == self.until


def watched(
    rank: int, world: int, workshop: str, name: str, order: ReplanOrder | None, until: int, kind: type[Recorder] = Recorder
) -> tuple[bool, Recorder]:
    overrides = (
        "model.dtype=float64",
        "data.eval=[]",
        "eval.generate=false",
        "fssdp.policy=hecate_paper",
        f"output_dir={workshop}/runs/{name}",
    )
    default = dist.group.WORLD
    assert default is not None
    ranks = Ranks(rank, world, torch.device("cpu"), ExpertGroups(default, dist.new_group()))
    recorder = kind(rank, order, until)
    ended = train(load_config(f"{workshop}/config.yaml", overrides, claim_output=False), ranks, controller=recorder)
    return ended, recorder


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_workshop(tmp_path_factory.mktemp("workshop")))


def test_an_order_of_the_first_rank_changes_the_shares_of_all_and_no_loss(workshop: str) -> None:
    plain = run_ranks(2, watched, workshop, "plain", None, 99)
    order = ReplanOrder(number=1, flops=(3e10, 1e10), sequences=(3, 1), reshard=True)
    ordered = run_ranks(2, watched, workshop, "ordered", order, 99)
    assert all(ended for ended, _ in plain + ordered)
    for (_, before), (_, after), share in zip(plain, ordered, (1.5, 0.5), strict=True):
        assert [facts.step for facts in after.steps] == [1, 2, 3, 4, 5, 6]
        assert [facts.loss for facts in after.steps] == pytest.approx([facts.loss for facts in before.steps], abs=1e-10)
        # Rows are packed to at most 64 tokens; a batch is as wide as its longest row.
        for old, new in zip(before.steps[3:], after.steps[3:], strict=True):
            assert new.dense_tokens / old.dense_tokens == pytest.approx(share, rel=0.3)
        assert after.steps[:3] != after.steps[3:6]
        assert all(facts.dense_seconds > 0 and facts.seconds > facts.dense_seconds for facts in after.steps)
        assert all(sum(load_E) == 2 * facts.tokens for facts in after.steps for load_E in facts.loads.values())
    first, second = ordered[0][1], ordered[1][1]
    assert first.begun == second.begun
    begun = first.begun[0]
    assert (begun.step, begun.max_steps, begun.sequences, begun.owned) == (0, 6, (2, 2), (4, 2))
    assert begun.topology.world_size == 2
    assert (first.checkpoints, second.checkpoints) == ([(6, "checkpoint-6")], [])


def test_one_rank_that_wants_to_stop_stops_all_with_a_checkpoint(workshop: str) -> None:
    """It asks when step 3 has ended, so the step under way is the fourth."""
    results = run_ranks(2, watched, workshop, "stopped", None, 3)
    assert [ended for ended, _ in results] == [False, False]
    assert [len(recorder.steps) for _, recorder in results] == [4, 4]
    assert results[0][1].checkpoints == [(4, "checkpoint-4")]


class Failing(Recorder):
    """Raises on the first rank when a step has ended, and on the second when it is asked."""

    def stepped(self, facts: StepFacts) -> None:
        super().stepped(facts)
        if self.rank == 0 and facts.step == 2:
            raise OSError(28, "No space left on device")

    def stop_requested(self) -> bool:
        if self.rank == 1 and len(self.steps) == 3:
            raise KeyError("gone")
        return False


def failing(rank: int, world: int, workshop: str) -> tuple[bool, Recorder]:
    return watched(rank, world, workshop, "failing", None, 99, Failing)


def test_a_controller_that_fails_is_named_once_and_stops_nothing(workshop: str) -> None:
    results = run_ranks(2, failing, workshop)
    assert [ended for ended, _ in results] == [True, True]
    assert [len(recorder.steps) for _, recorder in results] == [2, 3]
    records = [json.loads(line) for line in Path(workshop, "runs/failing/metrics.jsonl").read_text().splitlines()]
    said = [(record["step"], record["text"]) for record in records if "controller" in record.get("text", "")]
    assert said == [(2, "the run's controller failed: [Errno 28] No space left on device; the run goes on without it")]


def test_an_order_travels_as_json() -> None:
    for order in (ReplanOrder(number=1), ReplanOrder(number=2, flops=(1.5e9, 2.0), sequences=(3, 0), reshard=True)):
        assert ReplanOrder.from_bytes(order.to_bytes()) == order
    for bad in (b"", b"[]", b'{"number": 1}'):
        with pytest.raises(JsonError):
            ReplanOrder.from_bytes(bad)
