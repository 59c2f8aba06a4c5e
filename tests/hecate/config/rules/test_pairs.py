"""What the pair source shards does not go together with is refused, given typed values and no file."""

from __future__ import annotations

from typing import Any

import pytest

from hecate.config.rules.keys import check_values
from hecate.config.rules.pairs import check_pairs


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (
            {"lora.pairs": "plain", "lora.shards.per_vector": 8},
            ("lora.shards.per_vector", "is read with lora.pairs=shards only, got 8", "leave it out, or set lora.pairs=shards"),
        ),
        (
            {"lora.pairs": "shards", "lora.r": 8, "lora.shards.equivalent_rank": 2, "lora.shards.private_rank": 3},
            (
                "lora.shards.private_rank",
                "must be at most lora.shards.equivalent_rank, which is 2, got 3",
                "set it to 2 or less, or raise lora.shards.equivalent_rank: private shards are a part of both",
            ),
        ),
        (
            {"lora.pairs": "shards", "lora.r": 1, "lora.shards.equivalent_rank": 2, "lora.shards.private_rank": 2},
            (
                "lora.shards.private_rank",
                "must be at most lora.r, which is 1, got 2",
                "set it to 1 or less, or raise lora.r: private shards are a part of both",
            ),
        ),
        (
            {"lora.pairs": "shards", "lora.gradient_rule": "row_norm", "lora.eta": 2.0},
            (
                "lora.gradient_rule",
                "row_norm is about rows of A and B that train by themselves, but with lora.pairs=shards pairs are parts of a pool, "
                "which several pairs share",
                "leave it out, or use lora.pairs=plain",
            ),
        ),
        (
            {"lora.pairs": "shards", "fssdp.rematerialize": True},
            (
                "fssdp.rematerialize",
                "frees replicas after each layer, but with lora.pairs=shards pairs are parts of a pool, which all layers share "
                "and which lives a whole step",
                "leave it out, or use lora.pairs=plain",
            ),
        ),
        (
            {"lora.pairs": "shards", "fssdp.plan": "exact"},
            (
                "fssdp.plan",
                "gathers in each micro-step, but with lora.pairs=shards pairs are parts of a pool, which lives a whole step",
                "leave it out, or use lora.pairs=plain",
            ),
        ),
        (
            {"lora.pairs": "shards", "lora.init_from": "adapter"},
            (
                "lora.init_from",
                "cannot be given with lora.pairs=shards: A and B of an adapter do not say by which shards they were made",
                "leave it out, or use lora.pairs=plain, which trains the adapter's own A and B on",
            ),
        ),
        (
            {"lora.pairs": "shards", "moe.router.input": "given"},
            (
                "lora.pairs",
                "shards has one pool for all experts, but with moe.router.input=given each is an adapter that nothing else may influence",
                "use lora.pairs=plain",
            ),
        ),
    ],
)
def test_what_shards_do_not_go_together_with_is_refused(values: dict[str, Any], problem: tuple[str, str, str]) -> None:
    problems: list[tuple[str, str, str]] = []
    check_pairs(values, lambda *one: problems.append(one))
    assert problems == [problem]


def test_shards_stand_over_linears_and_their_rules_are_checked_with_all_others() -> None:
    problems: list[tuple[str, str, str]] = []
    values = {"moe.family": "mixlora", "moe.unit": "linear", "lora.pairs": "shards"}
    check_values(values, lambda *one: problems.append(one), claim_output=False)
    assert problems == []
    check_values({**values, "fssdp.rematerialize": True}, lambda *one: problems.append(one), claim_output=False)
    assert [key for key, *_ in problems] == ["fssdp.rematerialize"]


def test_shards_of_experts_that_differ_in_rank_are_refused() -> None:
    problems: list[tuple[str, str, str]] = []
    values = {"moe.family": "mixlora", "moe.unit": "linear", "moe.num_experts": 2, "moe.top_k": 1, "lora.pairs": "shards", "lora.r": (4, 8)}
    values |= {"lora.shards.equivalent_rank": 2, "lora.shards.private_rank": 1}
    check_values(values, lambda *one: problems.append(one), claim_output=False)
    assert problems == [("lora.r", "must be one number with lora.pairs=shards, got a list of 2", "give one, or lora.pairs=plain")]
