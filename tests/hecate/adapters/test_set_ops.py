"""Operations on sets of terms, beside dense matrices, PEFT, and scikit-learn's Ridge and KMeans."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor

from hecate.adapters.sets.adapter_set import EXACT, AdapterSet, Merged
from hecate.adapters.sets.by_peft import linear, ties
from hecate.adapters.sets.lego import REWEIGHTS, cluster_labels, in_fewer_coordinates, lego
from hecate.adapters.sets.refine import refine
from hecate.adapters.sets.set_files import read_set, write_set
from hecate.adapters.sets.sums import average, kept_numbers, recompress, stack
from hecate.adapters.sets.terms import Terms, inner, norm
from hecate.errors import UserError
from tests import plain_sets as plain
from tests.hecate.adapters.exporting import save_dense
from tests.hecate.adapters.making_sets import SIZES, changed, pair_of, random_set, set_from, sums, with_a_of

WEIGHTS = [0.5, 0.3, 0.2]
THREE = [random_set(1, 3, 2.0), random_set(2, 3, 2.0), random_set(3, 3, 2.0)]
MIXED = [random_set(1, 4, 0.5), random_set(2, 2, 2.0), random_set(3, 1)]
TO_ROUNDING: dict[str, float] = {"rtol": 1e-12, "atol": 1e-12}
ALL_METHODS: dict[str, Callable[..., Merged]] = {
    "stack": stack,
    "average": average,
    "linear": linear,
    "ties": ties,
    "lego": lego,
    "refine": refine,
}


def wanted(sets: list[AdapterSet], weights: list[float]) -> Tensor:
    return torch.cat([plain.weighted_sum([pair_of(one, module) for one in sets], weights).flatten() for module in SIZES])


def test_a_stack_is_the_weighted_sum_of_adapters_of_any_ranks_and_scales() -> None:
    merged = stack(MIXED, WEIGHTS)
    torch.testing.assert_close(sums(merged.result), wanted(MIXED, WEIGHTS), **TO_ROUNDING)
    assert (merged.result.rank, merged.result.description.alpha, merged.result.scale) == (7, 7, 1.0)
    assert max(merged.errors().values()) < EXACT
    # The guard of this test: federated averaging of the same adapters is another matrix, and says so.
    assert min(average(MIXED, WEIGHTS, inexact=True).errors().values()) > 0.1
    with pytest.raises(UserError, match=r"take the means all the same: --inexact$"):
        average(MIXED, WEIGHTS)


def test_an_error_is_that_of_dense_matrices() -> None:
    merged = average(THREE, WEIGHTS, inexact=True)
    for module, error in merged.errors().items():
        found, whole = pair_of(merged.result, module), plain.weighted_sum([pair_of(one, module) for one in THREE], WEIGHTS)
        assert error == pytest.approx(float((plain.dense(found) - whole).norm() / whole.norm()), rel=1e-12)
    one, other = (adapter.read("layers.0.q_proj") for adapter in MIXED[:2])
    assert inner(one, other) == pytest.approx(float((one.b_Or @ one.a_rI * (other.b_Or @ other.a_rI)).sum()))
    assert norm(one) == pytest.approx(float((one.b_Or @ one.a_rI).norm()))


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_recompressed_is_the_truncated_svd(rank: int) -> None:
    merged = stack(MIXED, WEIGHTS, rank=rank)
    for module, error in merged.errors().items():
        whole = plain.weighted_sum([pair_of(one, module) for one in MIXED], WEIGHTS)
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
        torch.testing.assert_close(plain.dense(pair_of(merged.result, module)), u[:, :rank] * s[:rank] @ v[:rank], **TO_ROUNDING)
        assert merged.result.read(module).rank == rank
        assert error == pytest.approx(float(s[rank:].norm() / s.norm()), abs=1e-12)


def test_the_average_is_exact_where_all_have_one_a() -> None:
    same = [with_a_of(THREE[0], one) for one in THREE]
    merged = average(same, WEIGHTS)
    assert max(merged.errors().values()) < EXACT
    torch.testing.assert_close(sums(merged.result), wanted(same, WEIGHTS), **TO_ROUNDING)
    assert all(torch.equal(merged.result.read(module).a_rI, THREE[0].read(module).a_rI) for module in SIZES)
    assert (merged.result.scale, merged.result.description.alpha) == (2.0, 6)  # a run can begin with it


PEFT_CASES: dict[str, tuple[int, list[int], list[float], float]] = {
    "a mean": (2, [8, 2], [0.75, 0.25], 0.5),
    "a difference": (2, [8, 2], [1.25, -0.25], 0.5),
    "one term each": (1, [1, 3, 2], [0.2, 0.3, 0.5], 0.2),
    "all numbers": (3, [3, 6, 1], [0.5, 0.25, 0.25], 1.0),
    "many terms, few numbers": (8, [16, 4, 8, 32], [0.4, -0.3, 0.7, 0.2], 0.07),
    "far apart": (4, [4, 8], [-1.5, 2.5], 0.3),
}
"""rank, alphas, weights, and the density of ties"""


@pytest.mark.parametrize("case", PEFT_CASES)
def test_cat_linear_and_ties_are_those_of_peft(tmp_path: Path, case: str) -> None:
    """Of adapters with different scales, on PEFT's own model."""
    rank, alphas, weights, density = PEFT_CASES[case]
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(save_dense("llama", tmp_path / "model"), dtype=torch.float64)
    configs = {
        f"adapter{number}": LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q_proj", "down_proj"])
        for number, alpha in enumerate(alphas)
    }
    names = list(configs)
    model: Any = get_peft_model(base, configs[names[0]], names[0])
    for name in names[1:]:
        model.add_adapter(name, configs[name])
    random = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3, generator=random)
    model.save_pretrained(tmp_path)
    sets = [read_set(tmp_path / name) for name in names]
    merges = {"cat": stack(sets, weights), "linear": linear(sets, weights), "ties": ties(sets, weights, density=density)}
    for kind, merged in merges.items():
        model.add_weighted_adapter(names, weights, kind, combination_type=kind, **({"density": density} if kind == "ties" else {}))
        assert len(write_set(merged, tmp_path / "out" / kind).errors) == len(merged.result.sizes) > 3
        written = read_set(tmp_path / "out" / kind)
        for module in merged.result.sizes:
            theirs = model.get_submodule(f"base_model.model.{module}").get_delta_weight(kind)
            for ours in (merged.result, written):
                # PEFT has the weights in float32.
                torch.testing.assert_close(plain.dense(pair_of(ours, module)), theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reweight", ["none", "parameter"])
def test_lego_with_as_many_clusters_as_terms_is_the_sum(reweight: Any) -> None:
    merged = lego(MIXED, [1 / 3] * 3, rank=7, reweight=reweight)
    torch.testing.assert_close(sums(merged.result), wanted(MIXED, [1.0, 1.0, 1.0]), **TO_ROUNDING)
    assert max(merged.errors().values()) < EXACT
    weighted = lego(MIXED, WEIGHTS, rank=7, reweight=reweight)
    torch.testing.assert_close(sums(weighted.result), 3 * wanted(MIXED, WEIGHTS), **TO_ROUNDING)
    assert max(weighted.errors().values()) < EXACT


def test_lego_of_equal_adapters_is_one_of_them() -> None:
    merged = lego([THREE[0]] * 3, [1 / 3] * 3)
    torch.testing.assert_close(sums(merged.result), sums(THREE[0]), **TO_ROUNDING)


@pytest.mark.parametrize("reweight", REWEIGHTS)
@pytest.mark.parametrize("rank", [2, 3, 5])
def test_lego_is_its_plain_rule(rank: int, reweight: Any) -> None:
    merged = lego(MIXED, [1 / 3] * 3, rank=rank, reweight=reweight)
    parts = {"parameter": reweight in ("parameter", "both"), "output": reweight in ("output", "both")}
    for module in SIZES:
        expected = plain.lego([pair_of(one, module) for one in MIXED], rank, **parts)
        torch.testing.assert_close(plain.dense(pair_of(merged.result, module)), expected, **TO_ROUNDING)
        assert merged.result.read(module).rank == rank
    assert max(merged.errors().values()) > 0.1


def test_a_result_is_computed_with_one_thread(tmp_path: Path) -> None:
    """While it is written: of such matrices several threads mostly wait for each other."""
    seen = []

    def read(module: str) -> Terms:
        seen.append(torch.get_num_threads())
        return random_set(1, 3).read(module)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        write_set(lego([replace(random_set(1, 3), read=read)], [1.0], rank=2), tmp_path / "out")
        assert (set(seen), torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("clusters", [4, 12, 20])
def test_k_means_finds_the_clusters_of_the_points_themselves(clusters: int) -> None:
    """It is given them in fewer coordinates: 16 different points of 900, and each of them twice."""
    random = np.random.default_rng(1)
    points = np.tile(random.normal(size=(4, 1, 900)) + 0.9 * random.normal(size=(4, 4, 900)), (1, 2, 1)).reshape(32, 900)
    points[:, 7], points[:16, 8], points[16:, 8] = 0.0, 0.0, -0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer different points than clusters
        expected = KMeans(clusters, n_init=10, max_iter=300, random_state=0).fit(points).labels_
    assert cluster_labels(points, clusters).tolist() == expected.tolist()
    assert in_fewer_coordinates(points).shape == (32, 16)


def test_neither_order_nor_gauge_nor_padding_changes_lego() -> None:
    expected = sums(lego(THREE, [1 / 3] * 3, rank=4).result)
    order = torch.tensor([2, 0, 1])
    factors = torch.tensor([-3.0, 0.01, 5.0], dtype=torch.float64)
    others = {
        "adapters": THREE[::-1],
        "ranks": [changed(one, lambda a, b: (a[order], b[:, order])) for one in THREE],
        "gauge": [changed(one, lambda a, b: (a * factors[:, None], b / factors)) for one in THREE],
        "sign": [changed(one, lambda a, b: (-a, -b)) for one in THREE[:1]] + THREE[1:],
    }
    for what, sets in others.items():
        torch.testing.assert_close(sums(lego(sets, [1 / 3] * 3, rank=4).result), expected, **TO_ROUNDING, msg=what)
    padded = [replace(changed(one, lambda a, b: (F.pad(a, (0, 0, 0, 2)), F.pad(b, (0, 2)))), rank=5) for one in THREE]
    plain_sum = sums(lego(THREE, [1 / 3] * 3, rank=4, reweight="parameter").result)
    torch.testing.assert_close(sums(lego(padded, [1 / 3] * 3, rank=4, reweight="parameter").result), plain_sum, **TO_ROUNDING)


@pytest.mark.parametrize("ridge", [0.0, 0.01, 3.0])
def test_refine_is_ridge_regression(ridge: float) -> None:
    merged = refine(THREE, WEIGHTS, ridge=ridge)
    before = average(THREE, WEIGHTS, inexact=True)
    for module in SIZES:
        pairs = [pair_of(one, module) for one in THREE]
        a, b = pair_of(merged.result, module)
        for found, expected in zip((a, b), plain.refined(pairs, WEIGHTS, ridge), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        mean_b = before.result.read(module).b_Or
        slope = (b @ a - plain.weighted_sum(pairs, WEIGHTS)) @ a.T + ridge * (b - mean_b)
        assert float(slope.abs().max()) < 1e-10
    floor = stack(THREE, WEIGHTS, rank=3).errors()
    for module, error in merged.errors().items():
        assert floor[module] - 1e-12 <= error < before.errors()[module]


def test_refine_at_its_ends() -> None:
    mean = average(THREE, WEIGHTS, inexact=True).result
    torch.testing.assert_close(sums(refine(THREE, WEIGHTS, ridge=1e15).result), sums(mean), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sums(refine([THREE[0]] * 3, WEIGHTS).result), sums(THREE[0]), **TO_ROUNDING)
    same = [with_a_of(THREE[0], one) for one in THREE]
    assert max(refine(same, WEIGHTS).errors().values()) < EXACT


@pytest.mark.parametrize("ridge", [0.0, 0.01, 10.0])
def test_refine_by_cosine_descends(ridge: float) -> None:
    merged, before = (op.result for op in (refine(THREE, WEIGHTS, ridge=ridge, distance="cosine"), average(THREE, WEIGHTS, inexact=True)))
    for module in SIZES:
        whole = plain.weighted_sum([pair_of(one, module) for one in THREE], WEIGHTS)

        def objective(b: Tensor, module: str = module, whole: Tensor = whole) -> Tensor:
            mean = before.read(module)
            change = b - mean.b_Or
            return 1 - torch.cosine_similarity((b @ mean.a_rI).flatten(), whole.flatten(), 0) + ridge * change.norm()

        begun, ended = objective(before.read(module).b_Or), objective(merged.read(module).b_Or)
        if ridge == 10.0:  # nothing that is gained is worth a change
            assert torch.equal(merged.read(module).b_Or, before.read(module).b_Or)
            continue
        assert ended < begun - 0.01
        for seed in range(5):
            random = torch.randn(merged.read(module).b_Or.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            assert objective(merged.read(module).b_Or + 1e-3 * random) > ended


def test_refine_by_cosine_leaves_its_start_as_soon_as_that_is_worth_the_change() -> None:
    """The size of a change has no gradient at 0: with a ridge just below the slope of the distance there is still a way down."""
    for module in SIZES:
        mean = average(THREE, WEIGHTS, inexact=True).result.read(module)
        whole = plain.weighted_sum([pair_of(one, module) for one in THREE], WEIGHTS)
        b = mean.b_Or.clone().requires_grad_()
        (slope,) = torch.autograd.grad(1 - torch.cosine_similarity((b @ mean.a_rI).flatten(), whole.flatten(), 0), b)
        for factor, moves in ((0.8, True), (1.2, False)):
            found = refine(THREE, WEIGHTS, ridge=factor * float(slope.norm()), distance="cosine").result.read(module)
            assert torch.equal(found.b_Or, mean.b_Or) != moves


REFUSED: dict[str, tuple[Any, str]] = {
    "weights for others": (lambda: stack(THREE, [0.5, 0.5]), "2 weights were given for 3 adapters\n  give one for each"),
    "weights without sum 1": (lambda: stack(THREE, [1.0, 1.0, 1.0]), "the weights 1, 1, 1 have the sum 3, which must be 1"),
    "weight 0": (lambda: stack(THREE, [0.5, 0.5, 0.0]), "the weight of adapter 3 is 0, so that it would add nothing"),
    "weight nan": (lambda: stack(THREE, [0.5, 0.5, math.nan]), "the weight of adapter 3 is nan"),
    "average of different A": (
        lambda: sums(average(THREE, WEIGHTS).result),
        "layers.0.q_proj: the A of 3 adapters are not the same, and the product of two means is not the mean of products\n  use stack",
    ),
    "average of different ranks": (lambda: average(MIXED, WEIGHTS), "ranks 2 and 4, and the product .*\n  use stack"),
    "refine of different ranks": (lambda: refine(MIXED, WEIGHTS), "rank 2, but adapter 1 rank 4: refine .*\n  use stack"),
    "linear of different ranks": (lambda: linear(MIXED, WEIGHTS), "linear is of factors of one rank\n  use stack"),
    "negative ridge": (lambda: refine(THREE, WEIGHTS, ridge=-1), "ridge -1: must be a number from 0"),
    "singular": (
        lambda: sums(refine([changed(THREE[0], lambda a, b: (a * 0 + a[:1], b))], [1.0], ridge=0).result),
        "layers.0.q_proj: the rows of the mean of A depend on one another.*\n  give a ridge above 0",
    ),
    "distance": (lambda: refine(THREE, WEIGHTS, distance="l1"), "distance l1: must be one of frobenius, cosine"),  # type: ignore[arg-type]
    "more clusters than terms": (
        lambda: lego(MIXED, WEIGHTS, rank=8),
        r"have 7 terms in each module, 4 \+ 2 \+ 1\n  give a rank from 1 to 7",
    ),
    "reweight": (lambda: lego(MIXED, WEIGHTS, reweight="l1"), "reweight l1: must be one of none, parameter, output, both"),  # type: ignore[arg-type]
    "rank of an svd": (lambda: recompress(THREE[0], 4), "rank 4: adapter 1 has 3 terms in each module\n  give a rank from 1 to 3"),
    "density 0": (lambda: kept_numbers(0.0, 9), "density 0: must be above 0 and at most 1"),
    "density above 1": (lambda: kept_numbers(1.5, 9), "density 1.5: must be above 0"),
    "density of ties": (lambda: ties(THREE, WEIGHTS, density=0), "density 0: must be above 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_operation_cannot_do_is_refused(name: str) -> None:
    act, reason = REFUSED[name]
    with pytest.raises(UserError, match=reason) as error:
        act()
    assert len(str(error.value).splitlines()) <= 8


@pytest.mark.parametrize("method", ALL_METHODS)
def test_sets_that_have_little_in_common_are_refused(method: str) -> None:
    op, one = ALL_METHODS[method], THREE[0]
    short = set_from({"layers.0.q_proj": pair_of(one, "layers.0.q_proj")}, "short")
    wide = replace(one, name="wide", sizes={**SIZES, "layers.0.q_proj": (7, 10)})
    elsewhere = replace(one, name="other", description=replace(one.description, base_model_name_or_path="models/other"))
    for other, reason in (
        (short, r"short has no pair for layers.1.down_proj \(1 such\), but adapter 1 has one"),
        (wide, "wide has layers.0.q_proj of 10 x 7, but adapter 1 of 9 x 7"),
        (elsewhere, "other is for models/other, and adapter 1 for models/tiny; whether both are the same is not known.*--model PATH"),
        (replace(one, name="routed", others={"router": torch.ones(2)}), "routed and adapter 1 have different routers"),
    ):
        with pytest.raises(UserError, match=f"(?s){reason}"):
            op([one, other], [0.5, 0.5])
    known, unlike = replace(one, base_digest="1"), replace(elsewhere, base_digest="2")
    with pytest.raises(
        UserError, match="other is for another base model than adapter 1: models/other and models/tiny have different weights"
    ):
        op([known, unlike], [0.5, 0.5])
    op([known, replace(unlike, base_digest="1")], [0.5, 0.5])  # a copy of the base model elsewhere


def test_a_set_of_zeros_has_no_error() -> None:
    """An adapter that was not trained: all B are zero."""
    untrained = changed(THREE[0], lambda a, b: (a, 0 * b))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method, op in ALL_METHODS.items():
            assert set(op([untrained], [1.0]).errors().values()) == {0.0}, method
        assert refine([untrained], [1.0], distance="cosine").errors() == dict.fromkeys(SIZES, 0.0)


def test_terms_of_one_module_are_asked_for_when_they_are_needed() -> None:
    """So that an adapter larger than memory can be merged."""
    asked: list[str] = []

    def read(module: str) -> Terms:
        asked.append(module)
        return THREE[0].read(module)

    for op in ALL_METHODS.values():
        merged = op([replace(THREE[0], read=read)], [1.0])
        assert not asked
        merged.result.read("layers.1.down_proj")
        assert set(asked) == {"layers.1.down_proj"}
        asked.clear()
