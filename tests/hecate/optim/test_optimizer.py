"""The optimizer over ranks: one norm, skipped steps, and a state that continues bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hecate.optim.adamw import AdamW
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables, schedule
from hecate.train.steps.step_totals import exchange_totals
from testing.ranks import run_ranks


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def make(owned: dict[str, nn.Parameter], replicated: dict[str, nn.Parameter]) -> ExpertOptimizer:
    return ExpertOptimizer(
        Trainables(owned, replicated),
        AdamW(weight_decay=0.01),
        LearningRate(0.1, schedule("linear", 10, 0.2)),
        torch.device("cpu"),
    )


def _norm_over_ranks(rank: int, world: int) -> float:
    """Rank r owns one expert with gradient (r + 1); the router's shares (2, 0) on every rank are summed before."""
    group = dist.group.WORLD
    assert group is not None
    owned, router = parameter(1.0), parameter(1.0, 1.0)
    optimizer = make({"expert": owned}, {"router": router})
    owned.grad, router.grad = torch.full((1,), rank + 1.0, dtype=torch.float64), torch.tensor([2.0, 0.0], dtype=torch.float64)
    optimizer.reduce_replicated(group)
    totals = exchange_totals(torch.zeros(2, dtype=torch.float64), optimizer.squares(), group)
    return totals.grad_norm


def test_the_norm_counts_a_sharded_parameter_once_and_a_replicated_one_once() -> None:
    # experts: 1 + 4 + 9; router: 3 ranks x 2 = 6, squared once.
    assert run_ranks(3, _norm_over_ranks) == [math.sqrt(1 + 4 + 9 + 36)] * 3


def _unlike_ranks(rank: int, world: int, value: float) -> tuple[int, ...]:
    """Rank 1's own sum of squares of the router's gradients, which all ranks should have alike, is this value."""
    group = dist.group.WORLD
    assert group is not None
    squares = torch.tensor([1.0 + rank, value if rank == 1 else 36.0], dtype=torch.float64)
    return exchange_totals(torch.zeros(2, dtype=torch.float64), squares, group).unlike


@pytest.mark.parametrize(("value", "unlike"), [(36.0, ()), (36.0 + 1e-9, ()), (36.1, (1,)), (0.0, (1,)), (math.nan, ())])
def test_a_rank_whose_sum_of_what_all_have_is_another_is_named(value: float, unlike: tuple[int, ...]) -> None:
    assert run_ranks(3, _unlike_ranks, value) == [unlike] * 3


EXPERTS = [f"0.{expert:02}" for expert in range(16)]
GRADIENTS = dict(zip(EXPERTS, [1e8] + 15 * [1.0], strict=True))
"""by expert: one square that swallows any other one, but not eight of them that were added up before"""


def _norm_of_named(rank: int, world: int, owners: list[list[str]], by_name: bool) -> float:
    group = dist.group.WORLD
    assert group is not None
    owned = {name: parameter(1.0) for name in owners[rank]}
    for name, one in owned.items():
        one.grad = torch.tensor([GRADIENTS[name]], dtype=torch.float64)
    squares = make(owned, {}).squares(names=EXPERTS if by_name else ())
    return exchange_totals(torch.zeros(2, dtype=torch.float64), squares, group).grad_norm


@pytest.mark.parametrize("owners", [[EXPERTS[:7], EXPERTS[7:]], [EXPERTS[3:], [], EXPERTS[:3]]])
def test_by_names_the_norm_has_the_same_bits_whoever_owns_what(owners: list[list[str]]) -> None:
    alone = math.sqrt(sum(value * value for value in GRADIENTS.values()))
    assert run_ranks(len(owners), _norm_of_named, owners, True) == [alone] * len(owners)
    assert run_ranks(len(owners), _norm_of_named, owners, False) != [alone] * len(owners), "the order does not show"


def test_a_rank_without_experts_adds_its_zero_where_the_others_sums_are() -> None:
    optimizer = ExpertOptimizer(Trainables({}, {}), AdamW(weight_decay=0.0), LearningRate(0.1), torch.device("meta"))
    assert optimizer.squares().device.type == "meta"  # a device that is not the CPU


def test_a_rank_without_anything_that_trains_steps_with_the_others_and_may_own_an_expert_later() -> None:
    optimizer = make({}, {})
    assert optimizer.step(1.0, max_grad_norm=0.5)
    assert optimizer.state_tensors() == {}
    received, owned = parameter(1, 2, 3), parameter(1, 2, 3)
    optimizer.replace_owned({"e": received}, {})
    other = make({"e": owned}, {})
    other.steps_done = 1
    for p, stepped in ((received, optimizer), (owned, other)):
        p.grad = torch.ones(3, dtype=torch.float64)
        stepped.step(1.0, max_grad_norm=0.5)
    assert torch.equal(received, owned)


def test_the_learning_rate_follows_the_schedule() -> None:
    p = parameter(1, 2, 3)
    optimizer, factor = make({"e": p}, {}), schedule("linear", 10, 0.2)
    rates = []
    for _ in range(4):
        rates.append(optimizer.learning_rate)
        p.grad = torch.ones(3, dtype=torch.float64)
        optimizer.step(1.0, max_grad_norm=None)
    assert rates == [0.1 * factor(step) for step in range(4)]


def gradients(step: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(step)
    return [torch.randn(3, generator=random, dtype=torch.float64) for _ in range(2)]


def train(optimizer: ExpertOptimizer, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for p, grad in zip(parameters, gradients(step), strict=True):
            p.grad = grad
        optimizer.step(grad_norm=1.0, max_grad_norm=None)


def test_a_saved_state_continues_bit_for_bit() -> None:
    whole = [parameter(1, 2, 3), parameter(4, 5, 6)]
    train(make({"e": whole[0]}, {"r": whole[1]}), whole, range(6))
    first = [parameter(1, 2, 3), parameter(4, 5, 6)]
    optimizer = make({"e": first[0]}, {"r": first[1]})
    train(optimizer, first, range(3))
    saved = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    second = [parameter(0, 0, 0), parameter(0, 0, 0)]
    resumed = make({"e": second[0]}, {"r": second[1]})
    resumed.load_state_tensors(saved, steps_done=3)
    assert resumed.learning_rate == optimizer.learning_rate
    train(resumed, second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


def test_a_saved_state_continues_in_the_strides_of_a_parameter_that_is_a_view() -> None:
    """float32, in which torch has fused steps for CPUs: those go through memory."""
    start, random = torch.randn(4, 3, generator=torch.Generator().manual_seed(9)), torch.Generator().manual_seed(0)
    steps = [torch.randn(4, 3, generator=random) for _ in range(3)]

    def steps_from(optimizer: ExpertOptimizer, view: nn.Parameter, gradients: list[Tensor]) -> None:
        for grad in gradients:
            view.grad = torch.empty_like(view).copy_(grad)
            optimizer.step(grad_norm=1.0, max_grad_norm=None)

    whole, second = (nn.Parameter(start.T.contiguous().T) for _ in range(2))
    optimizer = make({}, {"r": whole})
    steps_from(optimizer, whole, steps[:2])
    saved = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in optimizer.state_tensors().items()}
    steps_from(optimizer, whole, steps[2:])
    resumed = make({}, {"r": second})
    resumed.load_state_tensors(saved, steps_done=2)
    steps_from(resumed, second, steps[2:])
    assert torch.equal(whole, second)


def test_a_skipped_step_changes_nothing_but_the_schedule() -> None:
    parameters = [parameter(1, 2, 3), parameter(4, 5, 6)]
    optimizer = make({"e": parameters[0]}, {"r": parameters[1]})
    train(optimizer, parameters, range(2))
    before = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    rate = optimizer.learning_rate
    for p in parameters:
        p.grad = torch.full((3,), math.nan, dtype=torch.float64)
    assert not optimizer.step(math.inf, max_grad_norm=None)
    after = optimizer.state_tensors()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.grad is None for p in parameters)
    assert optimizer.learning_rate < rate


def test_clipping_scales_to_the_limit() -> None:
    clipped, plain = parameter(1, 2, 3), parameter(1, 2, 3)
    grad = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    seen: list[Tensor] = []
    for p, scale in ((clipped, 1.0), (plain, 0.5 / (5.0 + 1e-6))):
        optimizer = make({"e": p}, {})
        p.grad = grad * scale
        optimizer.step(grad_norm=5.0, max_grad_norm=0.5 if p is clipped else None)
        seen.append(optimizer.state_tensors()["owned/e/exp_avg"])
    assert torch.allclose(seen[0], seen[1], rtol=0, atol=1e-15)


def test_weight_decay_leaves_out_the_kinds_that_are_excluded_and_the_betas_are_the_configured_ones() -> None:
    """Held to AdamW's formula by hand, over two steps with another gradient each."""
    names = ["layers.0.router", "model.norm.weight", "model.proj.bias", "model.proj.weight"]
    shapes = [(2, 2), (2,), (2,), (2, 2)]
    replicated = {name: nn.Parameter(torch.full(shape, 1.0, dtype=torch.float64)) for name, shape in zip(names, shapes, strict=True)}
    owned = {"0.0": parameter(1.0, 2.0)}
    rate, decay, beta1, beta2, epsilon = 0.1, 0.5, 0.8, 0.95, 1e-3
    rule = AdamW(weight_decay=decay, beta1=beta1, beta2=beta2, epsilon=epsilon, exclude=("norms", "biases", "routers"))
    optimizer = ExpertOptimizer(Trainables(owned, replicated), rule, LearningRate(rate), torch.device("cpu"))
    decayed = {"0.0", "model.proj.weight"}
    expected = {name: value.detach().clone() for name, value in (owned | replicated).items()}
    mean = {name: torch.zeros_like(value) for name, value in expected.items()}
    square = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step, size in ((1, 1.0), (2, -3.0)):
        for name, value in (owned | replicated).items():
            value.grad = torch.full_like(value, size)
            mean[name] = beta1 * mean[name] + (1 - beta1) * size
            square[name] = beta2 * square[name] + (1 - beta2) * size**2
            expected[name] *= 1 - rate * decay * (name in decayed)
            expected[name] -= rate * mean[name] / (1 - beta1**step) / ((square[name] / (1 - beta2**step)).sqrt() + epsilon)
        optimizer.step(1.0, max_grad_norm=None)
    for name, value in (owned | replicated).items():
        torch.testing.assert_close(value.detach(), expected[name], rtol=1e-12, atol=0)


def test_who_decays_stays_the_same_when_owners_and_backups_change() -> None:
    rule = AdamW(weight_decay=0.5, exclude=("routers",))
    router, expert, backup = parameter(1.0), parameter(1.0), parameter(1.0)
    optimizer = ExpertOptimizer(Trainables({}, {"layers.0.router": router}), rule, LearningRate(0.1), torch.device("cpu"))
    for replace, parameters in ((optimizer.replace_owned, {"0.1": expert}), (optimizer.replace_backups, {"0.2": backup})):
        replace(parameters, {})
        for trained in (router, *parameters.values()):
            trained.grad = torch.zeros(1, dtype=torch.float64)
        optimizer.step(1.0, max_grad_norm=None)
        assert router.item() == 1.0
        assert all(trained.item() == 1 - 0.1 * 0.5 for trained in parameters.values())


def separate(*gradients: tuple[float, ...]) -> ExpertOptimizer:
    """Two adapters in two layers, each parameter with its gradient."""
    names = ("0.0", "0.1", "1.0", "1.1")
    owned = {name: parameter(1.0, 1.0) for name in names}
    for one, gradient in zip(owned.values(), gradients, strict=True):
        one.grad = torch.tensor(gradient, dtype=torch.float64)
    return ExpertOptimizer(Trainables(owned, {}, separate=2), AdamW(weight_decay=0.0), LearningRate(0.1), torch.device("cpu"))


def test_each_separate_expert_has_the_norm_of_its_layers_and_is_clipped_by_it() -> None:
    optimizer = separate((3.0, 0.0), (0.3, 0.0), (0.0, 4.0), (0.0, 0.4))
    squares = optimizer.squares()
    assert squares.tolist() == pytest.approx([25.0, 0.25, 0.0])
    owned = dict(optimizer.owned)
    held = {name: one.grad for name, one in owned.items()}
    assert optimizer.step(math.sqrt(25.25), 1.0, None, [5.0, 0.5])
    assert held["0.0"] is not None
    assert held["1.1"] is not None
    assert held["0.0"].tolist() == pytest.approx([3.0 / (5 + 1e-6), 0.0])
    assert held["1.1"].tolist() == [0.0, 0.4], "an adapter within the limit was clipped"
    assert optimizer.last_norms == (5.0, 0.5)


def test_a_separate_expert_without_a_finite_norm_is_left_untouched_and_the_other_is_stepped() -> None:
    optimizer = separate((math.nan, 0.0), (0.3, 0.0), (0.0, 4.0), (0.0, 0.4))
    owned = dict(optimizer.owned)
    assert not optimizer.step(math.nan, 1.0, None, [math.nan, 0.5]), "nobody hears of the adapter that was skipped"
    assert {name: one.tolist() == [1.0, 1.0] for name, one in owned.items()} == {"0.0": True, "0.1": False, "1.0": True, "1.1": False}
    assert not any(name.startswith(("owned/0.0/", "owned/1.0/")) for name in optimizer.state_tensors())
    untouched = separate((math.nan, 0.0), (math.inf, 0.0), (0.0, 4.0), (0.0, 0.4))
    assert not untouched.step(math.nan, 1.0, None, [math.nan, math.inf])
    assert not any("/exp_avg" in name for name in untouched.state_tensors())


def test_separate_experts_share_no_parameters() -> None:
    with pytest.raises(AssertionError, match="share parameters"):
        ExpertOptimizer(Trainables({}, {"x": parameter(1.0)}, separate=2), AdamW(weight_decay=0.0), LearningRate(0.1), torch.device("cpu"))
