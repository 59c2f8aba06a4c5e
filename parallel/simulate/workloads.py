"""Synthetic expert loads on which planners are compared: sixteen kinds of skew, each a pure function of its sizes and a seed.

Loads count assignments. A token's k experts are all different, so no expert gets more assignments from a rank than the rank has tokens.
Owners are those of expert parallelism (`contiguous_owners`). Neighbouring layers have different hot experts. With fewer steps or layers,
the loads are the first ones of a longer run.

Shapes: E experts, S source ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import count, islice, repeat
from math import gcd
from typing import Protocol

import numpy as np

from hecate.errors import UserError
from hecate.parallel.values.placement import contiguous_owners

_HEAT = 8.0
"""how many times as popular a hot expert is as another one"""
_ZIPF_EXPONENT = 1.2
_NORMALS = 4
"""half the sum of squares of 2a normals is Gamma(a), and such numbers over their sum are Dirichlet(a); a is 2, with a Gini of 0.375"""
_MEMORY = 0.98
"""the correlation of a drifting normal with its value one step before, which halves in 35 steps"""
_TRAINED, _OF_SAMPLES, _OF_STEPS = 0.5, 0.63, 0.07
"""sigma of the lognormal popularities of trained routers, of a sample around them, and of a step; see `_trained`"""
_SAMPLES = 8
"""samples of a rank in a step"""
_JUMP_PERIOD = 8
_TOPIC, _LASTING = 0.8, 1.0
"""sigma of the lognormal popularities of a topic, and of those that noise is added to"""
_COLLAPSE_STEPS, _FIRST_SKEW, _LAST_SKEW = 100, 0.1, 2.0
"""in how many steps a router collapses, and sigma of its lognormal popularities before and after"""
_BURST_PERIOD, _BURST_START, _BURST_STEPS = 8, 4, 2
_WEIGHTS, _COUNTS, _TOKENS = range(3)
"""the streams of random numbers"""


class Workload(Protocol):
    """A function that returns the loads (see `hecate.parallel.values.loads`) of a kind, int64 [steps, layers, experts, source ranks].

    A rank has at most `tokens_per_rank` tokens, the same number in every layer of a step, and `top_k` assignments for each of them.

    Raises:
        UserError: a size is below 1, the seed is negative, top_k exceeds the experts, or there are too few experts for the kind.
    """

    def __call__(
        self, num_steps: int, num_layers: int, world_size: int, num_experts: int, tokens_per_rank: int, top_k: int, seed: int
    ) -> np.ndarray: ...


@dataclass(frozen=True)
class _Size:
    num_steps: int
    num_layers: int
    world_size: int
    num_experts: int
    tokens_per_rank: int
    top_k: int
    seed: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "seed" else 1
            if value < least:
                raise UserError(f"workload: {field.name} must be >= {least}, got {value}")
        if self.top_k > self.num_experts:
            raise UserError(f"workload: top_k is {self.top_k}, but there are {self.num_experts} experts")

    def random(self, stream: int, layer: int = 0, step: int = 0) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream, layer, step])

    def hot_expert(self, turn: int) -> int:
        """Return a different expert each turn until all have had one, and usually one of a different rank."""
        least = max(self.num_experts // self.world_size, 1)
        stride = next(s for s in count(least) if gcd(s, self.num_experts) == 1)
        return (self.seed + turn * stride) % self.num_experts


_Profile = Callable[[_Size, int], Iterator[np.ndarray]]
"""a function of sizes and layer that yields, for each step, the popularity of each expert: float64 [experts] or [source ranks, experts]"""


def _drawn(profile: _Profile, tokens: Callable[[_Size, int], np.ndarray] | None = None) -> Workload:
    """Return the workload that draws from a profile.

    Args:
        tokens: a function of sizes and step that returns each rank's tokens, int64 [source ranks]; None: the most that a rank may have.
    """

    def workload(
        num_steps: int, num_layers: int, world_size: int, num_experts: int, tokens_per_rank: int, top_k: int, seed: int
    ) -> np.ndarray:
        size = _Size(num_steps, num_layers, world_size, num_experts, tokens_per_rank, top_k, seed)
        loads = np.empty((num_steps, num_layers, num_experts, world_size), dtype=np.int64)
        for layer in range(num_layers):
            for step, weight in enumerate(islice(profile(size, layer), num_steps)):
                tokens_S = tokens(size, step) if tokens else np.full(world_size, tokens_per_rank)
                weight_SE = np.broadcast_to(weight, (world_size, num_experts))
                loads[step, layer] = _choose(size.random(_COUNTS, layer, step), weight_SE, tokens_S, top_k).T
        return loads

    return workload


def _choose(rng: np.random.Generator, weight_SE: np.ndarray, tokens_S: np.ndarray, top_k: int) -> np.ndarray:
    """Draw each rank's assignments by the experts' weights, int64 [S, E].

    An expert cannot get more assignments from a rank than the rank has tokens. The excess is drawn again among the other experts.
    """
    most_SE = np.where(weight_SE > 0, tokens_S[:, None], 0)
    total_S = tokens_S * top_k
    count_SE = np.zeros(weight_SE.shape, dtype=np.int64)
    while len(rows := np.flatnonzero(count_SE.sum(1) < total_S)):  # in each round a rank is finished, or one more of its experts is full
        have, most = count_SE[rows], most_SE[rows]
        open_weight = np.where(have < most, weight_SE[rows], 0.0)
        drawn = rng.multinomial(total_S[rows] - have.sum(1), open_weight / open_weight.sum(1, keepdims=True))
        count_SE[rows] = np.minimum(have + drawn, most)
    return count_SE


def _balanced(
    num_steps: int, num_layers: int, world_size: int, num_experts: int, tokens_per_rank: int, top_k: int, seed: int
) -> np.ndarray:
    """No skew and no randomness: assignments are dealt to the experts in turn, rank after rank, so that loads differ by at most 1."""
    size = _Size(num_steps, num_layers, world_size, num_experts, tokens_per_rank, top_k, seed)
    each, extra = divmod(tokens_per_rank * top_k, num_experts)
    first_S = np.arange(world_size) * extra
    loads = np.empty((num_steps, num_layers, num_experts, world_size), dtype=np.int64)
    for step, layer in np.ndindex(num_steps, num_layers):
        place_ED = np.arange(num_experts)[:, None] - first_S - size.hot_expert(step + layer)
        loads[step, layer] = each + (place_ED % num_experts < extra)
    return loads


def _flat(size: _Size, layer: int) -> Iterator[np.ndarray]:
    return repeat(np.ones(size.num_experts))


def _one_hot(size: _Size, expert: int, share: float) -> np.ndarray:
    """Popularities by which `expert` also gets `share` of the tokens that it would not get if all experts were equal.

    The other experts are equal.
    """
    alike = size.top_k / size.num_experts
    hot = (alike + share * (1 - alike)) / size.top_k
    weight_E = np.full(size.num_experts, (1 - hot) / max(size.num_experts - 1, 1))
    weight_E[expert] = hot
    return weight_E


def _one_hot_expert(size: _Size, layer: int) -> Iterator[np.ndarray]:
    """One expert gets about half of all tokens."""
    return repeat(_one_hot(size, size.hot_expert(layer), 0.5))


def _hot_rank(size: _Size, layer: int) -> Iterator[np.ndarray]:
    """All experts owned by one rank are hot."""
    owner_E = contiguous_owners(size.num_experts, size.world_size)
    return repeat(np.where(owner_E == owner_E[size.hot_expert(layer)], _HEAT, 1.0))


def _hot_spread(size: _Size, layer: int) -> Iterator[np.ndarray]:
    """Make as many experts hot as in `hot_rank`, but at equal distances."""
    owner_E = contiguous_owners(size.num_experts, size.world_size)
    hot = size.hot_expert(layer)
    num_hot = int((owner_E == owner_E[hot]).sum())
    weight_E = np.ones(size.num_experts)
    weight_E[(hot + np.arange(num_hot) * size.num_experts // num_hot) % size.num_experts] = _HEAT
    return repeat(weight_E)


def _idle_expert(size: _Size, layer: int) -> Iterator[np.ndarray]:
    """One expert gets no token."""
    if size.top_k == size.num_experts:
        raise UserError(f"workload idle_expert: with top_k {size.top_k} of {size.num_experts} experts none can be idle")
    return repeat(np.where(np.arange(size.num_experts) == size.hot_expert(layer), 0.0, 1.0))


def _all_to_one(size: _Size, layer: int) -> Iterator[np.ndarray]:
    """One expert gets an assignment of every token; the others are equal."""
    # The weight is so large that the first draw always fills the expert; the second draw shares the rest evenly.
    return repeat(np.where(np.arange(size.num_experts) == size.hot_expert(layer), 1e30, 1.0))


def _rotating(size: _Size, layer: int) -> Iterator[np.ndarray]:
    """One expert is hot, a different one in each step, so that a prediction from past steps is always wrong."""
    return (_one_hot(size, size.hot_expert(layer + step), 0.5) for step in count())


def _burst(size: _Size, layer: int) -> Iterator[np.ndarray]:
    """Loads are even, but in two of every eight steps, from the fifth on, nearly all tokens go to one expert, a new one each time."""
    for step in count():
        number, phase = divmod(step, _BURST_PERIOD)
        bursting = _BURST_START <= phase < _BURST_START + _BURST_STEPS
        yield _one_hot(size, size.hot_expert(layer + number), 0.9 if bursting else 0.0)


def _lognormal(size: _Size, layer: int) -> Iterator[np.ndarray]:
    """Popularities are lognormal with s = 1."""
    return repeat(size.random(_WEIGHTS, layer).lognormal(0.0, 1.0, size.num_experts))


def _zipf(size: _Size, layer: int) -> Iterator[np.ndarray]:
    """The n-th most popular expert has 1 / n^1.2 of the popularity of the first."""
    return repeat(size.random(_WEIGHTS, layer).permutation(np.arange(1.0, size.num_experts + 1) ** -_ZIPF_EXPONENT))


def _dirichlet_drift(size: _Size, layer: int) -> Iterator[np.ndarray]:
    """Each rank has its own Dirichlet(2) popularities, half of which are shared with the other ranks, and they drift all the time."""
    rng = size.random(_WEIGHTS, layer)
    shape = (size.world_size + 1, size.num_experts, _NORMALS)  # the last source is the part that all ranks share
    normals = rng.standard_normal(shape)
    while True:
        yield np.square(normals[:-1] + normals[-1]).sum(-1)
        normals = _MEMORY * normals + np.sqrt(1 - _MEMORY**2) * rng.standard_normal(shape)


def _trained(size: _Size, layer: int, memory: Callable[[int], float]) -> Iterator[np.ndarray]:
    """Popularities like those of trained routers on real text.

    They are made after published statistics of models with 64 experts and top-8: with expert parallelism on 8 ranks the busiest rank has
    1.3 times the mean on average over layers and 1.7 at worst; consecutive steps of many samples differ by 0.07 in total variation, single
    samples by 0.35.

    Args:
        memory: a function of the step that returns the correlation of the popularities' logarithms with those of the step before.
    """
    rng = size.random(_WEIGHTS, layer)
    normal_E = rng.standard_normal(size.num_experts)
    for step in count():
        if step > 0:
            kept = memory(step)
            normal_E = kept * normal_E + np.sqrt(1 - kept**2) * rng.standard_normal(size.num_experts)
        log_E = _TRAINED * normal_E + _OF_STEPS * rng.standard_normal(size.num_experts)
        log_SXE = log_E + _OF_SAMPLES * rng.standard_normal((size.world_size, _SAMPLES, size.num_experts))
        weight_SXE = np.exp(log_SXE)
        yield (weight_SXE / weight_SXE.sum(-1, keepdims=True)).mean(1)


def _trained_steady(size: _Size, layer: int) -> Iterator[np.ndarray]:
    """A trained router whose popularities stay."""
    return _trained(size, layer, lambda step: 1.0)


def _trained_drift(size: _Size, layer: int) -> Iterator[np.ndarray]:
    """A trained router whose popularities drift, half of them in 35 steps."""
    return _trained(size, layer, lambda step: _MEMORY)


def _trained_jump(size: _Size, layer: int) -> Iterator[np.ndarray]:
    """A trained router with data of another kind from every eighth step on: other experts are popular then."""
    return _trained(size, layer, lambda step: 0.0 if step % _JUMP_PERIOD == 0 else 1.0)


def _ragged(size: _Size, step: int) -> np.ndarray:
    """Return token counts spaced evenly from an eighth of the most to the most that a rank may have, in a new order in each step."""
    most = size.tokens_per_rank
    return size.random(_TOKENS, step=step).permutation(np.ceil(np.linspace(most / 8, most, size.world_size)).astype(np.int64))


def _one_empty(size: _Size, step: int) -> np.ndarray:
    """Return the token counts when one rank, always the same, has none."""
    return np.where(np.arange(size.world_size) == size.seed % size.world_size, 0, size.tokens_per_rank)


def _collapse(size: _Size, layer: int) -> Iterator[np.ndarray]:
    """A router that collapses as training begins: nearly even popularities grow apart, and then stay."""
    normal_E = size.random(_WEIGHTS, layer).standard_normal(size.num_experts)
    for step in count():
        yield np.exp((_FIRST_SKEW + (_LAST_SKEW - _FIRST_SKEW) * min(step / _COLLAPSE_STEPS, 1.0)) * normal_E)


def _topics(period: int) -> _Profile:
    """Other experts are popular with each new topic, which comes every `period` steps."""

    def profile(size: _Size, layer: int) -> Iterator[np.ndarray]:
        rng = size.random(_WEIGHTS, layer)
        for step in count():
            if step % period == 0:
                weight_E = rng.lognormal(0.0, _TOPIC, size.num_experts)
            yield weight_E

    return profile


def _noisy(share: float) -> _Profile:
    """Popularities that last, times lognormal noise of this sigma, which is new in each step."""

    def profile(size: _Size, layer: int) -> Iterator[np.ndarray]:
        rng = size.random(_WEIGHTS, layer)
        lasting_E = rng.lognormal(0.0, _LASTING, size.num_experts)
        while True:
            yield lasting_E * rng.lognormal(0.0, share, size.num_experts)

    return profile


DRIFTING: dict[str, Workload] = {
    "router_collapse": _drawn(_collapse),
    "topic_every_10": _drawn(_topics(10)),
    "topic_every_50": _drawn(_topics(50)),
    "noise_5": _drawn(_noisy(0.05)),
    "noise_20": _drawn(_noisy(0.2)),
    "noise_50": _drawn(_noisy(0.5)),
}
"""workloads whose loads change from step to step, by which ways to plan are compared (`benchmarks.drift`)"""
WORKLOADS: dict[str, Workload] = {
    "balanced": _balanced,
    "one_hot_expert": _drawn(_one_hot_expert),
    "hot_rank": _drawn(_hot_rank),
    "hot_spread": _drawn(_hot_spread),
    "ragged_sources": _drawn(_flat, _ragged),
    "empty_rank": _drawn(_flat, _one_empty),
    "idle_expert": _drawn(_idle_expert),
    "all_to_one": _drawn(_all_to_one),
    "rotating": _drawn(_rotating),
    "burst": _drawn(_burst),
    "lognormal": _drawn(_lognormal),
    "zipf": _drawn(_zipf),
    "dirichlet_drift": _drawn(_dirichlet_drift),
    "trained_steady": _drawn(_trained_steady),
    "trained_drift": _drawn(_trained_drift),
    "trained_jump": _drawn(_trained_jump),
}
"""the workloads by name, in a fixed order"""
