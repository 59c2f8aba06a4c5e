"""Our MoE layer in a GPTModel against Megatron's own, with experts spread over one and two ranks: outputs, routing, losses, gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hecate.experts.forward_pass import PassTokens
from hecate.experts.router import load_balancing_loss
from hecate.parallel.units import Unit
from testing.ranks import run_ranks
from tests.hecate.megatron.making import config_of, ranks_of, write_parts

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
    from hecate.megatron.front_end import build_megatron, outside_experts
    from hecate.megatron.imports import quietly

    with quietly():
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        from hecate.megatron.expert_parallel import AUX_LOSS, expert_parallel_config, expert_parallel_spec, flat_expert, set_expert
        from hecate.megatron.gpt import build_gpt, process_groups
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
    their_aux = get_moe_layer_wise_logging_tracker().pop(AUX_LOSS)["values"]
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
