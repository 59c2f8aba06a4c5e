from __future__ import annotations

import pytest
import torch

from hecate.config import RouterConfig
from hecate.experts.forward_pass import OrderError
from hecate.experts.routers.by_input.given import GivenRouter
from hecate.experts.routers.router import TokenFeatures
from tests.hecate.experts.making import router_site


def router(experts: int) -> GivenRouter:
    return GivenRouter(router_site(4, experts, 1, dtype=torch.float32, choices=RouterConfig(input="given")))


def test_each_token_goes_to_the_expert_of_its_source() -> None:
    source, valid = torch.tensor([0, 2, -1, 1, 1, -1]), torch.tensor([0, 1, 3, 4])
    routing = router(3).route(torch.zeros(4, 4, dtype=torch.bfloat16), TokenFeatures(valid, source_N=source))
    assert routing.expert_TK.tolist() == [[0], [2], [1], [1]]
    assert routing.weight_TK.tolist() == [[1.0]] * 4
    assert (routing.weight_TK.dtype, routing.prob_TE.dtype) == (torch.float32, torch.float32)
    assert routing.stats().count_KE.tolist() == [[1, 2, 1]]
    assert routing.prob_TE.argmax(1).tolist() == [0, 2, 1, 1]


def test_one_source_may_be_said_of_all_tokens() -> None:
    routing = router(3).route(torch.zeros(5, 4), TokenFeatures(source_N=torch.tensor([2])))
    assert routing.expert_TK.tolist() == [[2]] * 5


def test_a_single_expert_takes_all_tokens() -> None:
    routing = router(1).route(torch.zeros(2, 4), TokenFeatures(torch.tensor([1, 3]), source_N=torch.tensor([-1, 7, -1, 7])))
    assert routing.expert_TK.tolist() == [[0], [0]]


def test_without_sources_it_says_what_is_missing() -> None:
    with pytest.raises(OrderError, match=r"without the sources of its tokens.*\n.*PassTokens\(source=\.\.\.\)"):
        router(3).route(torch.zeros(2, 4), TokenFeatures())


def test_there_is_nothing_to_train_and_no_loss() -> None:
    given = router(3)
    assert not list(given.parameters())
    assert (dict(given.trained), given.loss) == ({}, None)
    assert router(2).route(
        torch.zeros(0, 4), TokenFeatures(torch.zeros(0, dtype=torch.int64), source_N=torch.tensor([-1]))
    ).weight_TK.shape == (0, 1)
