"""The engine in a training loop of one's own: `torchrun --nproc-per-node 2 -m examples.own_loop CONFIG`, or without torchrun.

The configuration says the base model, its experts and the optimizer. Data, loss and loop are this program's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from hecate.adapters.trained_output import output_of
from hecate.config import load_config
from hecate.optim.from_config import gradient_rule, learning_rate
from hecate.optim.optimizer import ExpertOptimizer, Trainables
from hecate.ranks.ranks import join_ranks
from hecate.train.build import build_moe, front_end
from hecate.train.steps.step_totals import exchange_totals


def main(path: str) -> list[float]:
    """Train on random texts of 24 tokens, four a step over all ranks, and return the losses."""
    config, losses = load_config(path, claim_output=False), []
    with join_ranks(config.fssdp.shard_size) as ranks:
        base = front_end(config, ranks)
        moe, world = build_moe(config, base, ranks), ranks.groups.world
        optimizer = ExpertOptimizer(Trainables.of(moe), gradient_rule(config), learning_rate(config), ranks.device)
        ids_BS = torch.randint(250, (4, 25), generator=torch.Generator().manual_seed(0)).to(ranks.device)
        for number in range(config.max_steps):
            step = moe.engine.begin_step(number)  # plans, and starts to gather experts
            micro = step.begin_micro_step()  # of tokens without padding
            own_BS = ids_BS[ranks.rank :: ranks.world_size]
            logits_BSV = base.model(input_ids=own_BS[:, :-1]).logits.float()
            loss = cross_entropy(logits_BSV.flatten(0, 1), own_BS[:, 1:].flatten(), reduction="sum") / ids_BS[:, 1:].numel()
            aux = moe.balance_loss(micro.stats, world)
            micro.backward(loss if aux is None else loss + config.moe.router_aux_loss_coef * aux)  # sums experts' gradients onto owners
            loads = step.finish()
            optimizer.reduce_replicated(world)
            own = torch.stack([loss.detach(), torch.zeros_like(loss) if aux is None else aux.detach()]).double()
            totals = exchange_totals(own, optimizer.squares(counts_owned=moe.engine.shards.in_first_group), world)
            optimizer.step(totals.grad_norm, config.max_grad_norm, loads)
            losses.append(totals.loss)
        output_of(config, base).replace(Path(config.output_dir), moe, ranks)
    return losses


if __name__ == "__main__":
    print(*main(sys.argv[1]))
