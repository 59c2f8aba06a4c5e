from __future__ import annotations

import torch
import torch.distributed as dist

from hecate.experts.layer import MoeLayer
from hecate.experts.micro_step import MicroStep
from hecate.experts.router import TopKRouter
from tests.hecate.experts.making import HIDDEN, engine


def layer(micro_step: MicroStep, experts: int = 4) -> MoeLayer:
    router = TopKRouter(HIDDEN, experts, 2, layer=0, seed=1, dtype=torch.float64, device=torch.device("cpu"))
    return MoeLayer(0, router, engine({0: experts}), micro_step)


def hidden() -> torch.Tensor:
    return torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 20


VALID = torch.tensor([0, 1, 2, 5, 6, 9])
PADDING = torch.tensor([3, 4, 7, 8])


def test_padding_comes_out_as_zeros_and_the_rest_as_without_it(one_rank: dist.ProcessGroup) -> None:
    micro = MicroStep()
    moe = layer(micro)
    with moe._engine.evaluating():
        whole = moe(hidden())
        micro.start(VALID, torch.arange(10), step=0, recording=False)
        got = moe(hidden())
    assert got.shape == (2, 5, HIDDEN)
    assert not got.flatten(0, 1)[PADDING].any()
    assert whole.flatten(0, 1)[PADDING].any()
    torch.testing.assert_close(got.flatten(0, 1)[VALID], whole.flatten(0, 1)[VALID], rtol=1e-12, atol=1e-12)


def test_a_batch_of_padding_alone(one_rank: dist.ProcessGroup) -> None:
    micro = MicroStep()
    moe = layer(micro)
    micro.start(VALID[:0], torch.arange(10), step=0, recording=True)
    with moe._engine.evaluating():
        assert not moe(hidden()).any()
    assert not micro.stats[0].count_KE.any()


def test_statistics_are_of_real_tokens_and_kept_only_when_recording(one_rank: dist.ProcessGroup) -> None:
    micro = MicroStep()
    moe = layer(micro)
    micro.start(VALID, torch.arange(10), step=0, recording=True)
    moe._engine.begin_step(0)
    moe(hidden())
    x = hidden().flatten(0, 1)[VALID]
    prob = (x @ moe.router.weight.T).softmax(1)
    torch.testing.assert_close(micro.stats[0].prob_sum_E, prob.sum(0), rtol=1e-12, atol=1e-12)
    order = prob.argsort(1, descending=True)
    for choice in range(2):
        counts = [int((order[:, choice] == expert).sum()) for expert in range(4)]
        assert micro.stats[0].count_KE[choice].tolist() == counts
    before = micro.stats[0]
    with micro.recomputing():
        moe(hidden())
    assert micro.stats == {0: before}
    assert micro.stats[0] is before
    assert micro.recording
    assert int(moe._engine._counts[0].sum()) == 2 * len(VALID), "a rerun was counted again"


def test_starting_and_clearing_a_micro_step() -> None:
    micro = MicroStep()
    micro.start(VALID, torch.arange(10), step=4, recording=True)
    assert micro.step == 4
    micro.clear()
    assert (micro.valid, micro.token, micro.recording, micro.stats) == (None, None, False, {})
