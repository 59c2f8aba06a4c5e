"""Every kind has its family in one registry, and nothing else asks of which kind experts are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch

from hecate.config.schema import LEAVES
from hecate.engine.engine import Engine
from hecate.engine.step_plans import EngineConfig
from hecate.experts.families import ROUTERS, make_experts
from hecate.experts.family import ExpertChoices, FfnSource, Site
from hecate.experts.pairs.gradient_rules import pair_rules
from hecate.experts.pairs.source_facts import SourceFacts
from hecate.experts.pairs.source_table import PAIR_SOURCES
from hecate.experts.routers.by_input.token import SCORES
from hecate.experts.routers.router import LOSSES, WEIGHTS
from hecate.kernels.common.ffn import FfnShape
from hecate.parallel.cluster.mesh import make_mesh
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.planners import POLICIES
from hecate.parallel.values.expert_kinds import KINDS, MOE_LORA, ExpertKind, FfnSizes, LinearSizes, LoraShape, ShardShape
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import expert_groups
from testing.ranks import run_ranks
from tests.hecate.experts.making import base, experts
from tests.rooms import sources

FAMILIES = {"MixLoraExperts", "FullExperts", "MoeLoraExperts", "LinearExperts", "FfnExperts", "UnitExperts"}
CONSTANTS = {kind.name.upper() for kind in KINDS.values()}
ROOT = Path(__file__).resolve().parents[3]
OWN = ("hecate/experts/", "parallel/values/expert_kinds.py")
"""where kinds are told apart"""


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_each_kind_is_made_by_its_name(kind: ExpertKind) -> None:
    shape, double = FfnShape(6, 10, "silu"), torch.float64
    sizes = LinearSizes(6, 10) if kind.over_linears else shape
    site = Site(Unit(1), 4, sizes, 3, double, double, torch.device("cpu"))
    lora = LoraShape(2, 0.5, 0.0) if kind.has_pairs else None
    source = FfnSource(base(), lambda expert: torch.full((shape.numel,), float(expert), dtype=double))
    family = make_experts(kind, site, source, ExpertChoices(lora, kind.projections(("gate_proj", "up_proj", "down_proj"))))
    assert family.kind is kind
    assert len(family.init_chunk(2)) == family.layout().trainable_numel
    assert len(family.frozen_chunk(2)) == family.layout().frozen_numel
    assert bool(family.layout().frozen) == (kind is MOE_LORA)


def test_each_name_of_the_configuration_is_there() -> None:
    assert set(ROUTERS) == set(get_args(LEAVES["moe.router.input"].type))
    assert set(SCORES) == set(get_args(LEAVES["moe.router.score"].type))
    assert set(WEIGHTS) == set(get_args(LEAVES["moe.router.weights"].type))
    assert set(LOSSES) == set(get_args(LEAVES["moe.router.balance"].type))
    assert set(PAIR_SOURCES) == set(get_args(LEAVES["lora.pairs"].type))
    assert {"none", *pair_rules()} == set(get_args(LEAVES["lora.gradient_rule"].type))


@pytest.mark.parametrize("name", PAIR_SOURCES)
def test_a_pair_source_trains_what_the_dry_run_counts(name: str) -> None:
    shape, double = FfnShape(6, 10, "silu"), torch.float64
    site = Site(Unit(1), 4, shape, 3, double, double, torch.device("cpu"))
    projections = ("gate_proj", "down_proj")
    lora = LoraShape(2, 0.5, 0.0, name, shards=ShardShape(per_vector=2))
    made = PAIR_SOURCES[name].make(site, lora, projections)
    assert made.sizes == PAIR_SOURCES[name].sizes(FfnSizes(6, 10), projections, lora)
    assert bool(made.sizes.pooled) == (not made.sizes.trained) == (PAIR_SOURCES[name].check_pool is not None)
    assert isinstance(PAIR_SOURCES[name], SourceFacts)
    assert bool(made.sizes.seeded) == PAIR_SOURCES[name].draws
    assert len(made.initial(0, 3, "expert", "1", 0)) == made.sizes.trained_numel + made.sizes.pooled_numel


def questions(tree: ast.AST) -> Iterator[ast.AST]:
    """Comparisons of a kind or family with one of them, and questions for a family's class."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("cast", "isinstance", "issubclass"):
            if {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} & FAMILIES:
                yield node
        elif isinstance(node, ast.Compare):
            sides = ast.unparse(node)
            names = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
            known = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            if known & CONSTANTS or (names & set(KINDS) and ("family" in sides or "kind" in sides)):
                yield node


@pytest.mark.parametrize(
    "text",
    [
        'config.moe.family == "full"',
        'family in ("mixlora", "x")',
        "kind is MOE_LORA",
        "isinstance(experts, FullExperts)",
        "cast(UnitExperts, family)",
    ],
)
def test_a_question_is_noticed(text: str) -> None:
    assert list(questions(ast.parse(text)))


def test_nothing_else_asks_which_kind_it_is() -> None:
    asked = []
    for path in sources("hecate", "parallel", "kernels", "launch"):
        name = str(path.relative_to(ROOT))
        if not name.startswith(OWN):
            asked += [f"{name}:{node.lineno}: {ast.unparse(node)}" for node in questions(ast.parse(path.read_text(encoding="utf-8")))]  # type: ignore[attr-defined]
    assert not asked, "\n".join(asked)


def _asked_for(rank: int, world: int) -> list[int]:
    """The experts that this rank makes of a layer that has one expert."""
    family, asked = experts(1), []
    made = family.init_chunk
    family.init_chunk = lambda expert: asked.append(expert) or made(expert)  # type: ignore[method-assign, func-returns-value]
    Engine({Unit(0): family}, EngineConfig(POLICIES["static_ep"], local_topology(world, cuda=False)), expert_groups(make_mesh(world)))
    return asked


def test_a_rank_that_owns_nothing_makes_no_expert() -> None:
    assert run_ranks(2, _asked_for) == [[0], []]
