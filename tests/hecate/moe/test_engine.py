"""Evaluation and idle paths of the engine; training is tested as a whole by tests/hecate/test_equivalence.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from hecate.kernels.mixlora_reference import mixlora_ffn_reference
from tests.hecate.moe.making import HIDDEN, base, chunk, engine, experts
from tests.ranks import run_ranks

LAYERS = {0: 3, 2: 5}


def tokens(seed: int, layer: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, HIDDEN, generator=random, dtype=torch.float64)
    expert = torch.rand(count, LAYERS[layer], generator=random).argsort(1)[:, :2]
    return x, expert, torch.rand(count, 2, generator=random, dtype=torch.float64), torch.arange(count)


def wanted(layer: int, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    family = experts(LAYERS[layer], layer=layer)
    numel = family.layout().trainable_numel
    pairs = family.pairs(torch.stack([chunk(layer, e, numel) for e in range(LAYERS[layer])]))
    return mixlora_ffn_reference(x, expert, weight, base(), pairs)


def _evaluate(rank: int, world: int) -> int:
    made = engine(LAYERS)
    with pytest.raises(ZeroDivisionError), made.evaluating():
        raise ZeroDivisionError
    assert made.replica_bytes == 0, "replicas outlived a failed evaluation"
    with made.evaluating():
        held = made.replica_bytes
        sent = made.bytes_sent
        # Each rank another number of times, in another order: any collective in here would hang or mix things up.
        for layer in [*[2, 0, 2, 2][: 1 + rank], 0]:
            x, expert, weight, token = tokens(rank, layer, 4 + rank)
            y = made.experts(layer, x, expert, weight, token, count=False)
            torch.testing.assert_close(y, wanted(layer, x, expert, weight), rtol=1e-12, atol=1e-12)
        assert made.bytes_sent == sent
    assert made.replica_bytes == 0
    assert all(p.grad is None for p in made.named_parameters().values())
    return held


@pytest.mark.parametrize("world", [1, 3])
def test_evaluating_holds_everything_and_drops_it_after(world: int) -> None:
    numel = experts(1).layout().trainable_numel
    assert run_ranks(world, _evaluate) == [sum(LAYERS.values()) * numel * 8] * world


def _idle(rank: int, world: int) -> dict[int, list[list[int]]]:
    """Rank 1 has no token, and expert 0 of each layer is chosen by nobody."""
    made = engine(LAYERS)
    made.begin_step(0)
    made.last_micro_step()
    total = torch.zeros((), dtype=torch.float64)
    for layer in LAYERS:
        x, expert, weight, token = tokens(0, layer, 0 if rank == 1 else 4)
        expert = torch.tensor([[1, 2]]).expand(len(x), 2)
        total = total + made.experts(layer, x.requires_grad_(), expert, weight.requires_grad_(), token, count=True).sum()
    total.backward()
    loads = made.finish_step()
    for (_, expert_number), parameter in made.named_parameters().items():
        assert (parameter.grad is not None) == (expert_number in (1, 2)), f"expert {expert_number}"
    predicted = made.history.predict(2)
    assert predicted is not None
    assert predicted.tolist() == loads[2].tolist()
    assert made.replica_bytes == 0
    return {layer: values.tolist() for layer, values in loads.items()}


def test_idle_ranks_and_experts_take_part() -> None:
    """Four tokens with two choices each, on rank 0 and on rank 2."""
    busy, idle = [0, 4, 4], [0, 0, 0]
    loads = run_ranks(3, _idle)
    assert loads[0] == loads[1] == loads[2]
    assert loads[0][0] == [busy, idle, busy]
    assert loads[0][2] == [[*busy, 0, 0], [*idle, 0, 0], [*busy, 0, 0]]


def test_a_layer_left_out_of_the_backward_pass_is_noticed(one_rank: dist.ProcessGroup) -> None:
    made = engine(LAYERS)
    made.begin_step(0)
    made.last_micro_step()
    x, expert, weight, token = tokens(0, 0, 4)
    made.experts(0, x.requires_grad_(), expert, weight, token, count=True).sum().backward()
    with pytest.raises(AssertionError, match="layer 2 took no part"):
        made.finish_step()


def test_gradients_add_up_over_micro_steps_and_loads_are_counted_when_asked(one_rank: dist.ProcessGroup) -> None:
    """The same tokens twice, counted once (as a checkpointed layer's rerun is): twice the gradient, once the loads."""
    gradients = []
    for times in (1, 2):
        made = engine({0: 3})
        made.begin_step(0)
        for number in range(times):
            if number == times - 1:
                made.last_micro_step()
            x, expert, weight, token = tokens(0, 0, 6)
            made.experts(0, x.requires_grad_(), expert, weight, token, count=number == 0).sum().backward()
        assert made.finish_step()[0].sum() == 12
        gradients.append({key: p.grad for key, p in made.named_parameters().items()})
    for key, once in gradients[0].items():
        twice = gradients[1][key]
        assert once is not None
        assert twice is not None
        torch.testing.assert_close(twice, 2 * once, rtol=1e-12, atol=1e-12)


def test_an_engine_without_expert_layers_finishes_its_steps(one_rank: dist.ProcessGroup) -> None:
    """As when only attention gets adapters (lora.target_modules: [q_proj]), which surgery allows."""
    made = engine({})
    made.begin_step(0)
    made.last_micro_step()
    assert made.finish_step() == {}
