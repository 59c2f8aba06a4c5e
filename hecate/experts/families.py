"""The one place where names of the configuration become classes: kinds of experts, pair sources, routers."""

from __future__ import annotations

from collections.abc import Callable

from hecate.experts.family import ExpertChoices, FfnSource, Site, UnitExperts
from hecate.experts.full import FullExperts, noisy_copies
from hecate.experts.linear import LinearExperts
from hecate.experts.mixlora import MixLoraExperts
from hecate.experts.moe_lora import MoeLoraExperts
from hecate.experts.pairs.source import PairSource
from hecate.experts.pairs.source_table import PAIR_SOURCES
from hecate.experts.routers.router import MakeRouter
from hecate.io.registry import registered
from hecate.parallel.values.expert_kinds import ExpertKind, KindName


def make_experts(kind: ExpertKind, site: Site, source: FfnSource, choices: ExpertChoices) -> UnitExperts:
    """The experts of a unit."""
    return _MAKERS[kind.name](site, source, choices)


def _mixlora(site: Site, source: FfnSource, choices: ExpertChoices) -> UnitExperts:
    assert source.base is not None
    return MixLoraExperts(site, source.base, _pairs(site, choices))


def _full(site: Site, source: FfnSource, choices: ExpertChoices) -> UnitExperts:
    assert source.base is not None
    return FullExperts(site, noisy_copies(source.base, choices.upcycle_noise, unit=site.unit, seed=site.seed))


def _moe_lora(site: Site, source: FfnSource, choices: ExpertChoices) -> UnitExperts:
    assert source.own_expert is not None
    return MoeLoraExperts(site, source.own_expert, _pairs(site, choices))


def _linear(site: Site, source: FfnSource, choices: ExpertChoices) -> UnitExperts:
    return LinearExperts(site, _pairs(site, choices), choices.mix)


def _pairs(site: Site, choices: ExpertChoices) -> PairSource:
    assert choices.lora is not None
    return PAIR_SOURCES[choices.lora.source].make(site, choices.lora, choices.projections)


_MAKERS: dict[KindName, Callable[[Site, FfnSource, ExpertChoices], UnitExperts]] = {
    "mixlora": _mixlora,
    "full": _full,
    "moe_lora": _moe_lora,
    "linears": _linear,
}

ROUTERS: dict[str, MakeRouter] = registered("hecate.experts.routers.by_input", "ROUTER")
"""new routers, by what they decide by, as `moe.router.input` gives it"""
