"""Our MoE layer in a GPTModel against Megatron's own, with experts spread over one and two ranks: outputs, routing, losses, gradients. And
whole steps of the trainer against a plain loop over a GPTModel that is Megatron's throughout.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hecate.experts.forward_pass import PassTokens
from hecate.experts.routers.router import load_balancing_loss
from hecate.parallel.values.units import Unit
from hecate.train.training import Training
from testing.ranks import run_ranks
from tests.hecate.apps.megatron.making import config_of, ranks_of, write_parts
from tests.plain_mixlora import clip

ROWS, AUX_COEF = 4, 0.03


def _tokens(rank: int, world: int) -> tuple[Tensor, Tensor]:
    """This rank's rows, and what each position is to foretell."""
    ids = torch.randint(0, 256, (ROWS, 33), generator=torch.Generator().manual_seed(3))
    share = ids[rank * ROWS // world : (rank + 1) * ROWS // world]
    return share[:, :-1], share[:, 1:]


def _close(got: Tensor, wanted: Tensor, what: str) -> None:
    error = float((got - wanted).detach().norm() / wanted.detach().norm())
    assert error < 3e-6, f"{what} is off by {error:.1e}"


def _compare(rank: int, world: int, folder: str, policy: str) -> None:
    from hecate.apps.megatron.front_end import build_megatron, outside_experts
    from hecate.apps.megatron.imports import quietly

    with quietly():
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        from hecate.apps.megatron.expert_parallel import expert_parallel_config, expert_parallel_spec
        from hecate.apps.megatron.gpt import build_gpt, process_groups
        from testing.megatron_experts import AUX_LOSS, flat_expert, set_expert
    ranks = ranks_of(rank, world)
    ours = build_megatron(config_of(Path(folder), f"fssdp.policy={policy}"), ranks)
    shape, moe, group = ours.shape, ours.moe, ranks.groups.tokens
    with quietly():
        config = expert_parallel_config(shape, torch.float32, world, aux_loss_coef=AUX_COEF)
        theirs = build_gpt(shape, ours.vocab_size, config, expert_parallel_spec(), process_groups(ranks.groups), seed=0)
    layers: list[Any] = [layer.mlp for layer in theirs.decoder.layers]
    others = outside_experts(theirs)
    assert others.keys() == moe.others.keys()
    for name, parameter in others.items():
        parameter.data.copy_(moe.others[name])
    for index, layer in enumerate(layers):
        moe.layers[Unit(index)].router.weight.data.mul_(20)  # the init alone is nearly uniform
        layer.router.weight.data.copy_(moe.layers[Unit(index)].router.weight)
        for expert in range(shape.experts):
            set_expert(layer, expert, moe.engine.shards.families[Unit(index)].init_chunk(expert))

    ids, targets = _tokens(rank, world)
    maps: list[Tensor] = []
    for layer in layers:
        layer.router.register_forward_hook(lambda _module, _inputs, output: maps.append(output[1]))

    def loss_of(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / 128

    their_logits = theirs(ids, None, None)
    loss_of(their_logits).backward()
    tracked = get_moe_layer_wise_logging_tracker()[AUX_LOSS]["values"]
    their_aux = tracked.clone()
    tracked.zero_()  # the next policy's would be added to it; the mapping may be a copy, so that taking the entry out leaves the sum
    dist.all_reduce(their_aux)

    token = torch.arange(ids.numel()) + rank * ids.numel()
    step = moe.engine.begin_step(0)
    micro = step.begin_micro_step(PassTokens(None, token))
    our_logits = ours.model(ids, None, None)
    # Ours is k times Megatron's of a layer.
    aux = [load_balancing_loss({unit: stats}, group) / shape.top_k for unit, stats in sorted(micro.stats.items())]
    stats = dict(micro.stats)
    micro.backward(loss_of(our_logits) + AUX_COEF * sum(aux))
    step.finish()

    _close(our_logits, their_logits, "the logits")
    our_aux = torch.stack(aux).detach()
    dist.all_reduce(our_aux)
    _close(our_aux, their_aux, "the aux loss")
    for unit, one in stats.items():
        # Positions come first in Megatron, rows in ours: counts do not care.
        assert torch.equal(one.count_KE.sum(0), maps[unit.layer].sum(0)), "routed otherwise"
        assert len(set(one.count_KE.sum(0).tolist())) > 1, "the routing is too even to say anything"
    for (unit, expert), parameter in moe.engine.shards.named_parameters().items():
        index = unit.layer
        assert parameter.grad is not None
        _close(parameter.grad, flat_expert(layers[index], expert, grad=True), f"the gradient of expert {unit}.{expert}")
    for index, layer in enumerate(layers):
        assert moe.layers[Unit(index)].router.weight.grad is not None
        _close(moe.layers[Unit(index)].router.weight.grad, layer.router.weight.grad, f"the gradient of router {index}")
    for name, parameter in moe.others.items():
        assert parameter.grad is not None
        assert others[name].grad is not None
        _close(parameter.grad, others[name].grad, f"the gradient of {name}")  # type: ignore[arg-type]


def _compare_all(rank: int, world: int, folder: str, policies: tuple[str, ...]) -> None:
    for policy in policies:
        _compare(rank, world, folder, policy)


@pytest.mark.parametrize(("world", "policies"), [(1, ("full",)), (2, ("static_ep", "full"))])
def test_our_layer_is_megatrons(tmp_path: Path, world: int, policies: tuple[str, ...]) -> None:
    """Contiguous owners are Megatron's, too, so each rank has the gradients of the same experts."""
    write_parts(tmp_path)
    run_ranks(world, _compare_all, str(tmp_path), policies)


STEPS, RATE, DECAY, MAX_NORM = 5, 1e-3, 0.1, 0.5
TRAINING = (
    f"max_steps={STEPS}",
    f"learning_rate={RATE}",
    f"weight_decay={DECAY}",
    f"max_grad_norm={MAX_NORM}",
    "gradient_accumulation_steps=2",
    "lr_scheduler_type=constant",
    "warmup_ratio=0",
    "moe.router_aux_loss_coef=0",  # Megatron's is of each layer, ours of all together
    "data.packing=false",
)


def _train_beside(rank: int, world: int, folder: str) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Losses and norms of our trainer's steps, and of a plain loop over Megatron's model, which must end with the same weights."""
    from hecate.apps.megatron.front_end import outside_experts
    from hecate.apps.megatron.imports import quietly

    with quietly():
        from hecate.apps.megatron.expert_parallel import expert_parallel_config, expert_parallel_spec
        from hecate.apps.megatron.gpt import build_gpt, process_groups
        from testing.megatron_experts import flat_expert, set_expert
    ranks = ranks_of(rank, world)
    config = config_of(Path(folder), *TRAINING, f"data.train={folder}/rows.jsonl")
    run, other = Training(config, ranks), Training(config, ranks)
    base, moe = run.parts.base, run.parts.moe
    with quietly():
        theirs = build_gpt(
            base.shape,  # type: ignore[attr-defined]
            base.vocab_size,
            expert_parallel_config(base.shape, torch.float32, world),  # type: ignore[attr-defined]
            expert_parallel_spec(),
            process_groups(ranks.groups),
            seed=0,
        )
    layers: list[Any] = [layer.mlp for layer in theirs.decoder.layers]
    others = outside_experts(theirs)
    for name, parameter in others.items():
        parameter.data.copy_(moe.others[name])
    for index, layer in enumerate(layers):
        moe.layers[Unit(index)].router.weight.data.mul_(20)
        layer.router.weight.data.copy_(moe.layers[Unit(index)].router.weight)
    owned = moe.engine.shards.named_parameters()
    for (unit, expert), parameter in owned.items():
        set_expert(layers[unit.layer], expert, parameter.detach())
    began = {name: parameter.detach().clone() for name, parameter in others.items()}

    trained = list(theirs.parameters())
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    wanted = []
    for _ in range(STEPS):
        batches = other.micro_batches(other.parts.stream.next_step())
        assert all(bool(batch.layout.is_token.all()) for batch in batches), "Megatron would route padding, too"
        labels, total = sum(int((batch.targets != -100).sum()) for batch in batches), 0.0
        for batch in batches:
            logits = theirs(batch.input_ids, None, None)
            loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100, reduction="sum") / labels
            loss.backward()
            total += float(loss.detach())
        for parameter in (one for layer in layers for one in layer.experts.parameters()):
            if parameter.grad is not None and not parameter.grad.any():
                parameter.grad = None  # an expert without tokens stays as it is
        wanted.append((total, clip(trained, MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
    found = []
    for _ in range(STEPS):
        result = run.train_one().result
        found.append((result.loss, result.grad_norm))

    for (unit, expert), parameter in owned.items():
        _close(parameter.detach(), flat_expert(layers[unit.layer], expert, grad=False), f"expert {unit}.{expert}")
    for index, layer in enumerate(layers):
        _close(moe.layers[Unit(index)].router.weight, layer.router.weight, f"router {index}")
    for name, parameter in others.items():
        _close(moe.others[name], parameter, name)
        assert float((parameter - began[name]).detach().norm() / began[name].norm()) > 1e-3, f"{name} has not been trained"
    return found, wanted


def test_steps_of_the_trainer_are_those_of_a_plain_loop_over_megatrons_model(tmp_path: Path) -> None:
    write_parts(tmp_path)
    rows = [f"{number} sheep and {number * number} wolves went up the hill"[:32] for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    ((found, wanted),) = run_ranks(1, _train_beside, str(tmp_path), timeout=400)
    assert wanted[-1][0] < wanted[0][0] - 0.05
    assert any(norm > MAX_NORM for _, norm in wanted)
    for got, plain in zip(found, wanted, strict=True):
        assert got == pytest.approx(plain, rel=1e-5)
