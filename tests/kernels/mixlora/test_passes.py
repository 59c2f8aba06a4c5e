"""Each Triton pass of the MixLoRA feed-forward against its plain twin in float64, over unwritten memory that is NaN."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from hecate.kernels.common.assignments import AssignmentBlocks
from hecate.kernels.common.dropout import Dropout
from hecate.kernels.common.low_rank import LowRankPairs, LowRankTerm
from hecate.kernels.mixlora import passes, triton_kernels
from hecate.kernels.mixlora.passes import RULES, GatedInputs
from tests.kernels.grouping import GROUPS, assert_close, grouped, poisoned
from tests.kernels.layer_cases import CASES as LAYERS
from tests.kernels.mixlora import passes_reference
from tests.kernels.plain_orders import assignment_blocks, assignment_order

__all__ = ["poisoned"]

pytestmark = pytest.mark.usefixtures("poisoned")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 3 * 2**-9, torch.float16: 3 * 2**-12}
"""relative to the largest value: what is rounded on the way is h or a low, and then the result"""


@dataclass(frozen=True)
class Case:
    sizes: tuple[int, ...] = GROUPS["uneven"]
    elsewhere: int = 3
    k: int = 2
    hidden: int = 40
    ffn: int = 70
    """over two programs of the interpreter's gated kernel, and no multiple of its blocks"""
    rank: int = 8
    rank_up: int = 5
    activation: str = "silu"
    dropout: float = 0.0
    projections: str = "gate up down"
    dtype: torch.dtype = torch.float32
    pair_dtype: torch.dtype = torch.float32


CASES = {
    **{f"groups: {name}": Case(sizes=sizes) for name, sizes in GROUPS.items()},
    "over two chunks of a slot": Case(sizes=(70, 33), k=1),
    "k 4": Case(k=4),
    "gelu": Case(activation="gelu"),
    "gelu_tanh, dropout": Case(activation="gelu_tanh", dropout=0.3),
    "rank 1": Case(rank=1, rank_up=1),
    "rank 16 and 64": Case(rank=16, rank_up=64, sizes=(5, 18)),
    "size 1": Case(hidden=1, ffn=1),
    "full blocks": Case(hidden=64, ffn=64, rank=16, rank_up=16, sizes=(32, 16), elsewhere=0),
    "gate only": Case(projections="gate", dropout=0.3),
    "up only": Case(projections="up"),
    "down only": Case(projections="down", dropout=0.3),
    "bf16": Case(dtype=torch.bfloat16, dropout=0.3),
    "bf16 pairs": Case(dtype=torch.bfloat16, pair_dtype=torch.bfloat16),
    "fp16": Case(dtype=torch.float16, dropout=0.3),
}


class Inputs:
    """Random ones of a case."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self._random, self._device = torch.Generator().manual_seed(5), device
        self.case = case
        slot_TK = grouped(case.sizes, case.elsewhere, case.k).to(device)
        rows = RULES["mixlora_rows"][-1].config.blocks
        self.blocks = assignment_blocks(assignment_order(slot_TK, len(case.sizes)), rows["ROWS"], rows["CHUNK_ROWS"])
        self.tokens, self.assignments, self.slots = slot_TK.shape[0], slot_TK.numel(), len(case.sizes)
        self.weight = self.normal(self.tokens, case.k, dtype=torch.float32)
        self.dropout = None
        if case.dropout:
            dropout = Dropout(case.dropout, key=7)
            self.dropout = dropout.rows(torch.arange(self.assignments, device=device), 3)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self._random, dtype=torch.float64).to(self._device, dtype or self.case.dtype)

    def matrix(self, width: int, rank: int, *, transposed: bool = False) -> Tensor:
        """[S, width, rank], a view into chunks that hold more; its last dimension is the wide one if transposed."""
        chunks = self.normal(self.slots, width * rank + 3, dtype=self.case.pair_dtype)[:, 3:]
        return chunks.view(-1, rank, width).transpose(1, 2) if transposed else chunks.view(-1, width, rank)

    def adapter(self, width: int, rank: int, *, transposed: bool = False) -> LowRankTerm:
        return LowRankTerm(self.normal(self.assignments, rank), self.matrix(width, rank, transposed=transposed))


@dataclass(frozen=True)
class Call:
    pass_name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    written: tuple[Tensor, ...] = ()
    """the parts of chunks that it writes"""


def calls(inputs: Inputs) -> dict[str, Call]:
    """By what is special about them."""
    case, blocks, normal = inputs.case, inputs.blocks, inputs.normal
    down_rank = case.rank + 1
    gate, up = (
        inputs.adapter(case.ffn, rank) if name in case.projections else None for name, rank in (("gate", case.rank), ("up", case.rank_up))
    )
    down = inputs.adapter(case.ffn, down_rank, transposed=True) if "down" in case.projections else None
    gate_TF, up_TF, dhidden_TF, x_TD = (normal(inputs.tokens, width) for width in (case.ffn, case.ffn, case.ffn, case.hidden))
    twice = tuple(inputs.matrix(case.hidden, rank, transposed=True) for rank in (case.rank, case.rank_up))
    both = tuple(inputs.adapter(case.hidden, rank, transposed=True) for rank in (case.rank, case.rank_up))
    lows = tuple(adapter.low_PR for adapter in both)
    once = (inputs.matrix(case.ffn, case.rank),)
    ranks = {"gate_proj": (case.rank, case.hidden, case.ffn), "up_proj": (case.rank_up, case.hidden, case.ffn)}
    ranks["down_proj"] = (down_rank, case.ffn, case.hidden)
    empty = {name: LowRankPairs(normal(0, rank, wide), normal(0, out, rank), 1.0) for name, (rank, wide, out) in ranks.items()}
    _, parts = passes.chunk_parts(blocks, empty)
    keep, a_down = inputs.dropout, None if down is None else down.matrix_SNR
    gated = GatedInputs(gate_TF, up_TF, blocks, gate, up, a_down, keep, case.activation)
    of_x, dy_low = tuple(parts[name].a_SrI for name in ("gate_proj", "up_proj")), normal(inputs.assignments, down_rank)
    found = {"gate": parts["gate_proj"].b_SOr, "up": parts["up_proj"].b_SOr, "down": parts["down_proj"].a_SrI}
    of_gated = tuple(part for name, part in found.items() if name in case.projections)
    back = (gated, dhidden_TF, inputs.weight, None if down is None else down.low_PR, parts)
    of_dy = (parts["down_proj"].b_SOr,)
    return {
        "shrink two": Call("shrink", (x_TD, blocks, twice, (0.5, 2.0), keep), {"gather": True}),
        "shrink one": Call("shrink", (normal(inputs.assignments, case.ffn), blocks, once, (0.5,), None), {"gather": False}),
        "expand two": Call("expand", (both, blocks, keep)),
        "expand one": Call("expand", (both[:1], blocks, None)),
        "gated": Call("gated", (gated, 0.5)),
        "gated_backward": Call("gated_backward", back, written=of_gated),
        "outer two": Call("outer", (x_TD, blocks, lows, None, keep, of_x), {"transposed": True}, of_x),
        "outer one": Call("outer", (x_TD, blocks, (dy_low,), inputs.weight, None, of_dy), {"transposed": False}, of_dy),
        "sum_chunks": Call("sum_chunks", (normal(len(blocks.chunks), 3 * case.ffn, dtype=torch.float32), blocks, case.pair_dtype)),
    }


def widened(value: Any) -> Any:
    """The same values in float64; parts of chunks stay what they are, because they are written to."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, LowRankTerm | GatedInputs):
        return type(value)(*(widened(getattr(value, field.name)) for field in dataclasses.fields(value)))
    if isinstance(value, tuple):
        return tuple(map(widened, value))
    return torch.float64 if isinstance(value, torch.dtype) else value


def results(module: ModuleType, call: Call, args: tuple[Any, ...], blocks: AssignmentBlocks) -> list[Tensor | None]:
    """What a pass returns, of assignments only those on this rank, and what it writes, of chunks only those with rows."""
    for part in call.written:
        part.fill_(math.nan)
    found = getattr(module, call.pass_name)(*args, **call.kwargs)
    here, rows = int(blocks.order.starts[-1]), blocks.order.num_assignments
    returned = found if isinstance(found, tuple) else () if found is None else (found,)
    chunks = int(blocks.first_chunk[-1])
    return [
        *(value[:here] if value is not None and len(value) == rows else value for value in returned),
        *(part[:chunks].clone() for part in call.written),
    ]


@pytest.mark.parametrize("name", CASES)
def test_passes(name: str, device: torch.device) -> None:
    case = CASES[name]
    inputs = Inputs(case, device)
    for what, call in calls(inputs).items():
        args = tuple(arg if arg is call.written else widened(arg) for arg in call.args)
        got, want = results(passes, call, call.args, inputs.blocks), results(passes_reference, call, args, inputs.blocks)
        for place, (mine, theirs) in enumerate(zip(got, want, strict=True)):
            assert (mine is None) == (theirs is None), (what, place)
            if mine is not None and theirs is not None:
                assert mine.isfinite().all(), f"{what}: result {place} is not finite"
                assert_close(mine, theirs, TOLERANCE[case.dtype], f"{what}: result {place}")


def test_a_hot_slot_has_several_chunks(device: torch.device) -> None:
    """70 assignments in chunks of 32 at most: three; 33: two; none for a slot with no assignments."""
    blocks = assignment_blocks(assignment_order(grouped((70, 0, 33), 0, 1).to(device), 3), 16, 32)
    assert blocks.first_chunk.tolist() == [0, 3, 3, 5]
    assert blocks.chunks[:5].tolist() == [[0, 0, 32], [0, 32, 32], [0, 64, 6], [2, 70, 32], [2, 102, 1]]


def test_a_layer_launches_every_kernel() -> None:
    launched = [launch.kernel for launch in LAYERS["7B"].launches()]
    for name in ("shrink", "expand", "gated", "gated_backward", "outer", "sum_chunks"):
        kernel = getattr(triton_kernels, f"{name}_kernel")
        assert any(each is kernel for each in launched), name
