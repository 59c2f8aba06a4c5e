"""A private run: each sample a micro-step, what is said at its end, and what is refused at its beginning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hecate.apps.federate.privacy.accountant import privacy_spent
from hecate.apps.federate.privacy.training import spent_by_source
from hecate.config import load_config
from hecate.errors import UserError
from hecate.ranks.groups import ExpertGroups
from hecate.ranks.ranks import Ranks
from hecate.train.training import Training
from testing.tiny_run import make_workshop

PRIVATE = (
    "data.packing=false",
    "data.eval=[]",
    "eval={generate: false}",
    "max_grad_norm=null",
    "fssdp.policy=full",
    "lora.target_modules=[gate_proj,up_proj,down_proj]",
    "moe={num_experts: 2, top_k: 1, router_aux_loss_coef: 0, router: {input: given}}",
    "privacy={clip: 0.5, noise: 1.0, delta: 1e-4}",
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def training(workshop: Path, group: dist.ProcessGroup, name: str, *overrides: str) -> Training:
    given = [*PRIVATE, f"output_dir={workshop}/runs/{name}", *overrides]
    config = load_config(workshop / "config.yaml", given, claim_output=False)
    return Training(config, Ranks(0, 1, torch.device("cpu"), ExpertGroups(group, group)))


def test_a_run_takes_samples_one_by_one_and_says_what_it_has_told(workshop: Path, one_rank: dist.ProcessGroup) -> None:
    """The weights of the sources, 2 and 1, say how many of a step's samples each has."""
    run = training(workshop, one_rank, "private", "gradient_accumulation_steps=3")
    batches = run.micro_batches(run.parts.stream.next_step())
    assert [len(batch.input_ids) for batch in batches] == [1] * 6
    run.train_one()
    run.train_one()
    expected = {"up.train": 4, "echo.train": 2}
    assert spent_by_source(run.parts, run.run_state.step) == {
        name: privacy_spent(noise=1.0, delta=1e-4, samples=120, samples_per_step=taken, steps=2) for name, taken in expected.items()
    }
    run.save()
    again = training(workshop, one_rank, "private", "gradient_accumulation_steps=3", "resume=true")
    assert again.train_one().result.loss == run.train_one().result.loss
    for (name, here), there in zip(
        run.parts.optimizer.state_tensors().items(), again.parts.optimizer.state_tensors().values(), strict=True
    ):
        assert torch.equal(here, there), name


def test_a_rank_with_fewer_sequences_runs_as_many_micro_steps(workshop: Path, one_rank: dist.ProcessGroup) -> None:
    """As after ranks were lost: of the shares 2 and 0 the second rank has two micro-steps without a sample."""
    run = training(workshop, one_rank, "shares", "gradient_accumulation_steps=1")
    sequences = run.parts.stream.next_step()
    run.shares = (2, 0)
    assert [int(batch.task.max()) >= 0 for batch in run.micro_batches(sequences)] == [True, True]
    run.ranks = Ranks(1, 2, torch.device("cpu"), run.ranks.groups)
    assert [int(batch.task.max()) for batch in run.micro_batches(sequences)] == [-1, -1]


def test_a_step_larger_than_a_source_is_refused(workshop: Path, one_rank: dist.ProcessGroup) -> None:
    with pytest.raises(UserError, match=r"privacy\.clip: a step takes 133\.333 samples of up\.train, which has 120"):
        training(workshop, one_rank, "large", "gradient_accumulation_steps=100")


def test_a_document_of_several_samples_is_refused(workshop: Path, one_rank: dist.ProcessGroup) -> None:
    """Each of its samples would be clipped by itself, and epsilon would not hold for the document."""
    for name, text in (("short", "w1"), ("long", "w1 " * 200)):
        (workshop / f"{name}.jsonl").write_text('{"text": "w2"}\n' * 3 + f'{{"text": "{text}"}}\n', encoding="utf-8")
    small = ("gradient_accumulation_steps=1", "micro_batch_size=1")
    training(workshop, one_rank, "whole", f"data.train=[{workshop}/short.jsonl,{workshop}/echo.train.jsonl]", *small)
    with pytest.raises(
        UserError, match=r"privacy\.clip: 1 documents of .*long\.jsonl were cut into several samples.*\n  the first is record 4;"
    ):
        training(workshop, one_rank, "cut", f"data.train=[{workshop}/long.jsonl,{workshop}/echo.train.jsonl]", *small)
