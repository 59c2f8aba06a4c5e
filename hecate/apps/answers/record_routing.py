"""Record which experts a model's routers choose for held-out data, and write the data with that beside them, to be replayed in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hecate.config import DataSource
from hecate.data.files.formats import how_read
from hecate.data.files.records import read_records
from hecate.data.routed_experts import KEY, routing_text
from hecate.data.sequences import PackedSequence
from hecate.data.sources import TokenSource
from hecate.errors import UserError
from hecate.experts.routers.router import RouterStats
from hecate.io.durable import replace_output
from hecate.io.strict_json import json_line
from hecate.model.moe_model import MoeModel
from hecate.parallel.values.units import FFN, Unit


def require_routers(moe: MoeModel, name: str) -> None:
    """Raises UserError: the model has no routers whose choices could be replayed."""
    if not moe.layers:
        raise UserError(
            f"--record-routing: {name} is a model whose layers compute their experts themselves\n"
            "  give an adapter or, of a run that has trained whole experts, a checkpoint in its folder"
        )
    if any(unit.place != FFN for unit in moe.layers):
        raise UserError(f"--record-routing: {name} has experts over single linears, whose routing cannot be replayed")


class RoutingRecord:
    """The routing of one source's samples, from passes in any order, in memory: 2 bytes for each assignment."""

    def __init__(self) -> None:
        self._of_sample: dict[int, NDArray[np.int16]] = {}
        """[tokens, MoE layers, top_k], by the sample's index in its source"""

    def note(self, rows: Sequence[PackedSequence], routed: Mapping[Unit, RouterStats]) -> None:
        """Keep the routing of a pass, whose tokens without padding are those of these rows, one row after the other."""
        chosen = [stats.expert_TK for _, stats in sorted(routed.items()) if stats.expert_TK is not None]
        expert_TUK = torch.stack(chosen, dim=1).to(torch.int16).cpu().numpy()
        assert len(expert_TUK) == sum(len(row.input_ids) for row in rows), "a pass of other rows"
        begin = 0
        for row in rows:
            for segment, (_, sample) in enumerate(row.samples, start=1):
                end = begin + int((row.segment_ids == segment).sum())
                self._of_sample[sample] = expert_TUK[begin:end]
                begin = end

    def write(self, path: Path, source: TokenSource, named: DataSource) -> int:
        """Write each record whose samples were all noted with their routing, one JSON object a line, in the order of the source; how many.

        Raises:
            UserError: the file cannot be written.
        """
        of_record: dict[int, list[NDArray[np.int16] | None]] = {}
        for sample, line in enumerate(source.lines.tolist()):
            of_record.setdefault(line, []).append(self._of_sample.get(sample))
        # A document may be several samples, and eval.max_samples may leave some of them out.
        by_record = {
            line: noted for line, found in of_record.items() if len(noted := [one for one in found if one is not None]) == len(found)
        }
        key = KEY if named.fields is None or named.fields.routed_experts is None else named.fields.routed_experts

        def lines() -> Iterator[bytes]:
            for record in read_records(named.path, **how_read(named)):
                if record.number in by_record:
                    value = record.value | {key: routing_text(np.concatenate(by_record[record.number]))}
                    yield json_line(value).encode() + b"\n"

        try:
            replace_output(path, lines())
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
        return len(by_record)
