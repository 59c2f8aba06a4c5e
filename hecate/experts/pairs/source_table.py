"""All pair sources by the name that `lora.pairs` gives, each a file of `hecate.experts.pairs.sources`. Importing them needs no torch."""

from __future__ import annotations

from hecate.experts.pairs.source_facts import SourceFacts
from hecate.io.registry import registered
from hecate.parallel.values.expert_kinds import LoraShape

PAIR_SOURCES: dict[str, SourceFacts] = registered("hecate.experts.pairs.sources", "SOURCE", ("plain",))


def trains_a(lora: LoraShape) -> bool:
    """Whether A of an adapter on a linear layer trains; otherwise it is drawn from the layer's name and stays fixed."""
    return not PAIR_SOURCES[lora.source].fixes_a
