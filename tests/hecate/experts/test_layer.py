from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from hecate.config import RouterConfig
from hecate.engine.engine import Engine
from hecate.experts.forward_pass import CurrentPass, OrderError, PassTokens
from hecate.experts.layer import MoeLayer
from hecate.experts.routers.by_input.token import TopKRouter
from hecate.parallel.values.units import Unit
from tests.hecate.apps.foresee.making import saved_for_backward
from tests.hecate.experts.making import HIDDEN, engine, router_site


def layer(current: CurrentPass, experts: int = 4) -> MoeLayer:
    router = TopKRouter(router_site(HIDDEN, experts, 2, seed=1))
    return MoeLayer(0, router, current)


def both(experts: int = 4) -> tuple[MoeLayer, Engine]:
    made = engine({0: experts})
    return layer(made.current, experts), made


def passed(choices: RouterConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output, and the gradient of each chunk that has one."""
    made = engine({Unit(0): 4})
    moe = MoeLayer(Unit(0), TopKRouter(router_site(HIDDEN, 4, 1, seed=1, choices=choices)), made.current)
    step = made.begin_step(0)
    micro = step.begin_micro_step()
    result = moe(hidden())
    micro.backward(result.square().sum())
    step.finish()
    chunks = made.shards.named_parameters().items()
    return result.detach(), {f"{unit}.{expert}": chunk.grad for (unit, expert), chunk in chunks if chunk.grad is not None}


def test_llava_moles_router_without_a_bias_is_mixloras_with_one_expert(one_rank: dist.ProcessGroup) -> None:
    """To the bit. A learned bias begins at zero."""
    y, gradients = passed(RouterConfig(bias="learned", weights="one", balance="sample"))
    wanted, gradients_wanted = passed(RouterConfig())
    assert torch.equal(y, wanted)
    assert gradients.keys() == gradients_wanted.keys()
    assert len(gradients) > 1
    assert all(torch.equal(gradient, gradients_wanted[name]) and gradient.any() for name, gradient in gradients.items())


def hidden() -> torch.Tensor:
    return torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 20


VALID = torch.tensor([0, 1, 2, 5, 6, 9])
PADDING = torch.tensor([3, 4, 7, 8])


def test_padding_comes_out_as_zeros_and_the_rest_as_without_it(one_rank: dist.ProcessGroup) -> None:
    moe, made = both()
    with made.evaluation() as evaluation:
        whole = moe(hidden())
        with evaluation.forward(PassTokens(VALID, torch.arange(10))):
            got = moe(hidden())
    assert got.shape == (2, 5, HIDDEN)
    assert not got.flatten(0, 1)[PADDING].any()
    assert whole.flatten(0, 1)[PADDING].any()
    torch.testing.assert_close(got.flatten(0, 1)[VALID], whole.flatten(0, 1)[VALID], rtol=1e-12, atol=1e-12)


def test_results_among_padding_are_not_kept_for_the_backward_pass(one_rank: dist.ProcessGroup) -> None:
    moe, made = both()
    made.begin_step(0).begin_micro_step(PassTokens(VALID, torch.arange(10)))
    with saved_for_backward() as kept:
        result = moe(hidden()).flatten(0, 1)[VALID]
    assert kept
    assert not any(tensor.shape == result.shape and torch.equal(tensor, result) for tensor in kept.values())


def test_a_batch_of_padding_alone(one_rank: dist.ProcessGroup) -> None:
    moe, made = both()
    with made.evaluation() as evaluation, evaluation.forward(PassTokens(VALID[:0], torch.arange(10))) as stats:
        assert not moe(hidden()).any()
    assert not stats[0].count_KE.any()


def test_statistics_and_loads_are_of_real_tokens_and_counted_once(one_rank: dist.ProcessGroup) -> None:
    moe, made = both()
    step = made.begin_step(0)
    micro = step.begin_micro_step(PassTokens(VALID, torch.arange(10)))
    y = moe(hidden())
    x = hidden().flatten(0, 1)[VALID]
    prob = (x @ moe.router.weight.T).softmax(1)
    torch.testing.assert_close(micro.stats[0].prob_sum_E, prob.sum(0), rtol=1e-12, atol=1e-12)
    order = prob.argsort(1, descending=True)
    for k in range(2):
        counts = [int((order[:, k] == expert).sum()) for expert in range(4)]
        assert micro.stats[0].count_KE[k].tolist() == counts
    before = micro.stats[0]
    with made.current.set_to(micro.again()):
        moe(hidden())
    assert made.current.now is micro
    assert micro.stats == {0: before}
    assert micro.stats[0] is before
    micro.backward(y.sum())
    assert step.finish()[0].sum() == 2 * len(VALID), "a rerun was counted again"


def test_a_model_is_called_in_a_step_or_an_evaluation_only(one_rank: dist.ProcessGroup) -> None:
    moe, made = both()
    with pytest.raises(OrderError, match="outside of a training step and of an evaluation"):
        moe(hidden())
    with made.evaluation() as evaluation:
        with evaluation.forward(PassTokens(VALID, torch.arange(10))):
            moe(hidden())
        moe(hidden()[:, :3])  # of any tokens again: an evaluation's padding does not outlive its batch
    with pytest.raises(OrderError):
        moe(hidden())
