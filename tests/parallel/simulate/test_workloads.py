from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hecate.errors import UserError
from hecate.parallel.simulate.workloads import WORKLOADS

NAMES = [
    "balanced",
    "one_hot_expert",
    "hot_rank",
    "hot_spread",
    "ragged_sources",
    "empty_rank",
    "idle_expert",
    "all_to_one",
    "rotating",
    "burst",
    "lognormal",
    "zipf",
    "dirichlet_drift",
    "trained_steady",
    "trained_drift",
    "trained_jump",
]
FULL = [name for name in NAMES if name not in ("ragged_sources", "empty_rank")]
"""every rank has all tokens that it may have"""


def make(name: str, steps: int, layers: int, ranks: int, experts: int, tokens: int, top_k: int, seed: int = 0) -> np.ndarray:
    return WORKLOADS[name](
        num_steps=steps, num_layers=layers, world_size=ranks, num_experts=experts, tokens_per_rank=tokens, top_k=top_k, seed=seed
    )


def totals(name: str, *sizes: int, seed: int = 0) -> np.ndarray:
    """[steps, layers, experts], all ranks together."""
    return make(name, *sizes, seed=seed).sum(-1)


def hot_experts(total_E: np.ndarray) -> list[int]:
    """Those with more than thrice the load of most."""
    return np.flatnonzero(total_E > 3 * np.median(total_E)).tolist()


def test_their_names() -> None:
    assert list(WORKLOADS) == NAMES


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(st.data())
def test_every_token_has_as_many_different_experts(name: str, data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 12))
    top_k = data.draw(st.integers(1, experts - 1 if name == "idle_expert" and experts > 1 else experts))
    steps, layers, ranks, tokens = (data.draw(st.integers(1, most)) for most in (7, 3, 6, 40))
    if name == "idle_expert" and experts == 1:
        return
    loads = make(name, steps, layers, ranks, experts, tokens, top_k, data.draw(st.integers(0, 2**40)))
    assert loads.dtype == np.int64
    assert loads.shape == (steps, layers, experts, ranks)
    assert loads.min() >= 0
    assignments = loads.sum(2)
    assert (assignments % top_k == 0).all()
    tokens_of = assignments // top_k
    # No expert twice for a token; with that, any loads with these sums can be dealt to tokens.
    assert (loads <= tokens_of[:, :, None]).all()
    assert (tokens_of == tokens_of[:, :1]).all(), "a step's tokens pass through all layers"
    assert (tokens_of == tokens).all() if name in FULL else tokens_of.max() <= tokens


@pytest.mark.parametrize("name", NAMES)
def test_a_pure_function_whose_beginning_does_not_depend_on_the_end(name: str) -> None:
    whole = make(name, 7, 3, 4, 8, 50, 2, seed=5)
    assert (make(name, 7, 3, 4, 8, 50, 2, seed=5) == whole).all()
    assert (make(name, 2, 1, 4, 8, 50, 2, seed=5) == whole[:2, :1]).all()
    assert not (make(name, 7, 3, 4, 8, 50, 2, seed=6) == whole).all()
    assert not (whole[:, 0] == whole[:, 1]).all(), "layers alike"


def test_balanced_by_hand() -> None:
    # Two ranks of 3 tokens with 2 assignments: 6 assignments to 4 experts, so 2 experts get 2; the next rank's 2 are the other ones.
    loads_ED = make("balanced", 1, 1, 2, 4, 3, 2)[0, 0]
    assert loads_ED.T.tolist() == [[2, 2, 1, 1], [1, 1, 2, 2]]


@given(ranks=st.integers(1, 9), experts=st.integers(2, 9), tokens=st.integers(1, 30))
def test_balanced_to_one_assignment(ranks: int, experts: int, tokens: int) -> None:
    loads = make("balanced", 2, 2, ranks, experts, tokens, 2)
    assert np.ptp(loads, axis=2).max() <= 1
    assert np.ptp(loads.sum(3), axis=-1).max() <= 1


def test_one_hot_expert() -> None:
    # 2 of 64 experts: alike, 1/32 of the tokens would choose it; half of the other 31/32 do, too: 0.516 of all.
    loads = make("one_hot_expert", 2, 3, 4, 64, 4000, 2)
    hot = [hot_experts(total_E) for total_E in loads[0].sum(2)]
    assert all(len(experts) == 1 for experts in hot)
    assert len({experts[0] for experts in hot}) == 3
    assert [hot_experts(total_E) for total_E in loads[1].sum(2)] == hot
    np.testing.assert_allclose(loads[0, 0][hot[0][0]] / 4000, 0.516, atol=0.03)


def test_a_hot_rank_and_as_many_hot_experts_spread() -> None:
    owner = [expert // 8 for expert in range(64)]  # 8 ranks
    at_one, spread = totals("hot_rank", 1, 8, 8, 64, 2000, 2)[0], totals("hot_spread", 1, 8, 8, 64, 2000, 2)[0]
    ranks = [{owner[expert] for expert in hot_experts(total_E)} for total_E in at_one]
    assert [len(hot_experts(total_E)) for total_E in at_one] == [8] * 8
    assert all(len(rank) == 1 for rank in ranks)
    assert all(before != after for before, after in pairwise(ranks))
    assert [len({owner[expert] for expert in hot_experts(total_E)}) for total_E in spread] == [8] * 8
    # Eight times as popular: 8 of 8 + 7 parts at the hot rank.
    np.testing.assert_allclose(at_one.reshape(8, 8, 8).sum(2).max(1) / at_one.sum(1), 8 / 15, atol=0.01)


def test_ragged_sources() -> None:
    tokens = make("ragged_sources", 6, 2, 8, 16, 64, 4)[:, 0].sum(1) // 4
    assert np.sort(tokens, axis=1).tolist() == [[8, 16, 24, 32, 40, 48, 56, 64]] * 6
    assert len({tuple(step) for step in tokens.tolist()}) > 1


def test_an_empty_rank() -> None:
    assignments = make("empty_rank", 3, 2, 5, 8, 10, 2, seed=7).sum(2)
    assert assignments.tolist() == [[[20, 20, 0, 20, 20]] * 2] * 3


def test_an_idle_expert() -> None:
    total = totals("idle_expert", 2, 3, 4, 8, 200, 2)
    idle = [np.flatnonzero(total_E == 0).tolist() for total_E in total.reshape(6, 8)]
    assert all(len(experts) == 1 for experts in idle)
    assert idle[:3] == idle[3:]
    assert len({experts[0] for experts in idle[:3]}) == 3


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_all_to_one(top_k: int) -> None:
    loads = make("all_to_one", 2, 3, 4, 8, 100, top_k)
    full = (loads == 100).all(3)
    assert (full.sum(-1) == (8 if top_k == 8 else 1)).all()
    assert (full[:, 0] == full[:, 1]).all() == (top_k == 8)
    rest = np.where(full[..., None], 0, loads)
    if top_k == 2:  # the other assignment, of 7 experts
        np.testing.assert_allclose(rest.sum(3)[~full] / 400, 1 / 7, atol=0.06)


def test_rotating_visits_all_and_never_stays() -> None:
    total = totals("rotating", 9, 1, 3, 9, 500, 1)[:, 0]
    hot = total.argmax(1).tolist()
    assert sorted(hot) == list(range(9))
    assert all(hot_experts(total_E) == [expert] for total_E, expert in zip(total, hot, strict=True))


def test_bursts() -> None:
    total = totals("burst", 16, 1, 2, 32, 500, 1)[:, 0]
    hot = [hot_experts(total_E) for total_E in total]
    assert [step for step, experts in enumerate(hot) if experts] == [4, 5, 12, 13]
    assert hot[4] == hot[5] != hot[12] == hot[13]


def test_lognormal() -> None:
    total = totals("lognormal", 2, 1, 1, 1024, 2_000_000, 1)[:, 0]
    assert np.std(np.log(total[0])) == pytest.approx(1.0, abs=0.1)
    assert np.corrcoef(total)[0, 1] > 0.99, "the popularities stay"


def test_lognormal_is_as_uneven_as_measured_elsewhere() -> None:
    """256 experts on 32 devices, 8 each: a published figure for static expert parallelism is 2.36."""
    per_rank = totals("lognormal", 1, 16, 32, 256, 256, 8)[0].reshape(16, 32, 8).sum(2)
    assert (per_rank.max(1) / per_rank.mean(1)).mean() == pytest.approx(2.36, rel=0.15)


def test_zipf() -> None:
    loads_E = np.sort(totals("zipf", 1, 1, 1, 16, 1_000_000, 1)[0, 0])[::-1]
    np.testing.assert_allclose(loads_E[0] / loads_E[[1, 3, 7]], [2.297, 5.278, 12.126], rtol=0.03)  # 2, 4 and 8 to the power 1.2


def test_dirichlet_drift() -> None:
    loads = make("dirichlet_drift", 36, 1, 2, 2048, 2_000_000, 1)[:, 0].astype(float)
    ordered = np.sort(loads[0, :, 0])
    gini = (2 * np.arange(1, 2049) - 2049) @ ordered / (2048 * ordered.sum())
    assert gini == pytest.approx(0.375, abs=0.02)  # a Gamma(a) variable's is G(a + 1/2) / (G(a + 1) sqrt(pi))
    # Squares of normals correlate by the square of the normals' correlation.
    assert np.corrcoef(loads[0].T)[0, 1] == pytest.approx(0.5**2, abs=0.06)
    for steps in (1, 35):
        assert np.corrcoef(loads[0, :, 0], loads[steps, :, 0])[0, 1] == pytest.approx(0.98 ** (2 * steps), abs=0.06)


def test_trained_routers_are_as_uneven_as_published() -> None:
    """64 experts, top-8, 8 ranks: 1.3 times the mean on average, 1.7 at worst; steps differ by 0.07, samples by 0.35."""
    total = totals("trained_steady", 3, 48, 8, 64, 4096, 8)
    per_rank = total.reshape(3, 48, 8, 8).sum(3)
    uneven = per_rank.max(-1) / per_rank.mean(-1)
    assert uneven.mean() == pytest.approx(1.3, abs=0.07)
    assert 1.5 < uneven.max() < 1.9
    assert variation(total[:-1], total[1:]).mean() == pytest.approx(0.07, abs=0.015)
    # A rank's step is eight samples, whose mean varies by the root of 8 less.
    loads = make("trained_steady", 2, 4, 64, 64, 512 * 8, 8).astype(float)
    of_ranks = variation(loads[0, :, :, :-1].swapaxes(1, 2), loads[0, :, :, 1:].swapaxes(1, 2)).mean()
    assert of_ranks * 8**0.5 == pytest.approx(0.35, abs=0.04)


def variation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Total variation of loads [..., experts]."""
    shares, others = (loads / loads.sum(-1, keepdims=True) for loads in (one, other))
    return np.abs(shares - others).sum(-1) / 2


def test_trained_routers_drift_and_jump() -> None:
    drift, steady, jump = (totals(f"trained_{kind}", 36, 4, 8, 64, 4096, 8) for kind in ("drift", "steady", "jump"))
    assert variation(drift[0], drift[35]).mean() > 1.5 * variation(steady[0], steady[35]).mean()
    steps = variation(jump[:-1], jump[1:]).mean(-1)
    assert [step + 1 for step in np.flatnonzero(steps > 0.15)] == [8, 16, 24, 32]


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("zipf", (1, 1, 2, 4, 8, 5), "top_k is 5, but there are 4 experts"),
        ("balanced", (0, 1, 2, 4, 8, 2), "num_steps must be >= 1, got 0"),
        ("burst", (1, 1, 2, 4, 0, 2), "tokens_per_rank must be >= 1"),
        ("idle_expert", (1, 1, 2, 4, 8, 4), "none can be idle"),
    ],
)
def test_sizes_that_are_refused(name: str, sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        WORKLOADS[name](*sizes, seed=0)
    with pytest.raises(UserError, match="seed must be >= 0"):
        WORKLOADS[name](1, 1, 2, 4, 8, 2, seed=-1)
