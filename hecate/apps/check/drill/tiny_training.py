"""Trainings of the tiny run on ranks that a drill has started itself, without the loop around them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hecate.apps.check.drill.ranks import settings
from hecate.checkpoint import read_manifest
from hecate.config import Config, load_config
from hecate.optim.optimizer import ExpertOptimizer
from hecate.ranks.ranks import Ranks
from hecate.train.training import Training


def tiny_config(workshop: str, output: Path | str, *overrides: str) -> Config:
    return load_config(f"{workshop}/config.yaml", settings(f"output_dir={output}", *overrides), claim_output=False)


def tiny_training(ranks: Ranks, workshop: str, output: Path | str, *overrides: str) -> Training:
    """Every rank must call it."""
    return Training(tiny_config(workshop, output, *overrides), ranks)


def train_until(run: Training, step: int, *, save_each: bool = False) -> list[int]:
    """Train up to a step, and save there, or after each step. Returns the bytes that each step has sent, which tell where experts were."""
    sent = []
    while run.run_state.step < step:
        sent.append(run.train_one().result.bytes_sent)
        if save_each and run.run_state.step < step:
            run.save()
    run.save()
    return sent


def digests(folder: Path) -> dict[str, str]:
    """Name and digest of every tensor of a checkpoint."""
    return {name: entry.digest for name, entry in read_manifest(folder).tensors.items()}


@dataclass(frozen=True)
class Held:
    """A copy of all that an optimizer holds on this rank."""

    tensors: dict[str, Tensor]

    @staticmethod
    def by(optimizer: ExpertOptimizer) -> Held:
        backups = {f"backup/{name}/{key}": one for name, held in optimizer.backups.items() for key, one in optimizer.row(held).items()}
        return Held({name: one.detach().clone() for name, one in {**optimizer.state_tensors(), **backups}.items()})

    def changed(self, later: Held) -> list[str]:
        """The names whose bits have changed, and those that have come or gone."""
        names = self.tensors.keys() ^ later.tensors.keys()
        both = self.tensors.keys() & later.tensors.keys()
        return sorted(names | {name for name in both if not _same_bits(self.tensors[name], later.tensors[name])})


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
