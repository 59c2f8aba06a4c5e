"""Grouped products against float64 products slot by slot, over unwritten memory that is NaN."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from hecate.kernels.common.assignments import AssignmentOrder
from hecate.kernels.common.dropout import Dropout
from hecate.kernels.common.low_rank import LowRankTerm
from hecate.kernels.experts.grouped_gemm import GemmOptions, gemm_launch, grouped_gemm
from hecate.kernels.experts.slot_weights import SlotWeights, separate_weights, stacked_weights
from tests.kernels.grouping import GROUPS, TOLERANCE, assert_close, grouped, poisoned
from tests.kernels.plain_orders import assignment_order

__all__ = ["poisoned"]

DROPOUT = Dropout(0.4, key=5)


@dataclass(frozen=True)
class Case:
    sizes: tuple[int, ...] = GROUPS["uneven"]
    elsewhere: int = 0
    outputs: int = 40
    """of a half"""
    inputs: int = 48
    """of a half"""
    halves: int = 1
    gather: bool = False
    transposed: bool = False
    separate: bool = False
    unaligned: bool = False
    rank: int = 0
    scaled: bool = False
    drop: str = ""
    """`x` or `low`"""
    dtype: torch.dtype = torch.float32


CASES = {
    **{f"groups: {name}": Case(sizes=sizes, elsewhere=3) for name, sizes in GROUPS.items()},
    "gather": Case(gather=True, elsewhere=4),
    "transposed": Case(transposed=True),
    "transposed, gather": Case(transposed=True, gather=True, inputs=24, outputs=36),
    "sizes below every tile": Case(outputs=5, inputs=7),
    "odd sizes": Case(outputs=37, inputs=53, gather=True),
    "odd sizes, transposed": Case(outputs=37, inputs=53, transposed=True),
    "size 1": Case(outputs=1, inputs=1, sizes=(1,)),
    "separate": Case(separate=True),
    "separate, unaligned": Case(separate=True, unaligned=True),
    "rank 16": Case(rank=16),
    "rank 64": Case(rank=64, outputs=24),
    "rank 128": Case(rank=128, outputs=24),
    "halves": Case(halves=2, outputs=20),
    "halves, rank": Case(halves=2, rank=16, outputs=20, gather=True, separate=True),
    "halves, transposed, scaled": Case(halves=2, transposed=True, scaled=True, outputs=16),
    "scaled": Case(scaled=True),
    "transposed, rank": Case(transposed=True, rank=32, outputs=33),
    "dropout of x": Case(drop="x", gather=True, inputs=45),
    "dropout of the low-rank term": Case(drop="low", rank=16, transposed=True),
}


@dataclass(frozen=True)
class Operands:
    x: torch.Tensor
    weights: SlotWeights
    matrices: torch.Tensor
    """[S, rows, columns]"""
    order: AssignmentOrder
    options: GemmOptions


def operands(case: Case, device: torch.device) -> Operands:
    random = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(case.dtype).to(device)

    slot_TK = grouped(case.sizes, case.elsewhere, k=2).to(device)
    order = assignment_order(slot_TK, len(case.sizes))
    x_halves = case.halves if case.transposed else 1
    x = normal(len(slot_TK) if case.gather else order.num_assignments, x_halves * case.inputs)
    rows, columns = (case.inputs, case.outputs) if case.transposed else (case.outputs, case.inputs)
    matrices = normal(len(case.sizes), case.halves * rows, columns)
    options: dict[str, Any] = {"gather": case.gather, "transposed": case.transposed, "halves": case.halves}
    # Clones, in an order that is not theirs, lie at uneven distances.
    apart = {slot: moved(matrices[slot], slot * case.unaligned) for slot in torch.randperm(len(matrices), generator=random).tolist()}
    weights = separate_weights([apart[slot] for slot in range(len(matrices))]) if case.separate else stacked_weights(matrices)
    if case.rank:
        outer = (case.rank, case.outputs) if case.transposed else (case.halves * case.outputs, case.rank)
        b = normal(len(matrices), *outer)
        options["low_rank"] = LowRankTerm(
            normal(order.num_assignments, case.halves * case.rank), b.transpose(1, 2) if case.transposed else b
        )
    if case.scaled or case.rank:
        options["scales"] = (0.5, -1.25)
    if case.drop:
        options[f"drop_{case.drop}"] = DROPOUT.rows(torch.arange(order.num_assignments, device=device) * 7, 3)
    return Operands(x, weights, matrices, order, GemmOptions(**options))


def moved(matrix: torch.Tensor, by: int) -> torch.Tensor:
    """A copy that lies so many elements behind an aligned place."""
    return matrix.new_empty(matrix.numel() + by)[by:].view_as(matrix).copy_(matrix)


def expected(case: Case, given: Operands) -> torch.Tensor:
    """Of the assignments on this rank, in float64."""
    order, x, matrices = given.order, given.x.double(), given.matrices.double()
    x = x[order.token_P.long()] if case.gather else x
    drop, low = given.options.drop_x or given.options.drop_low, given.options.low_rank
    scales = given.options.scales or (1.0, 1.0)

    def keep(width: int) -> torch.Tensor:
        assert drop is not None
        return drop.keep(width, torch.float64)

    if case.drop == "x":
        x = x * keep(x.shape[1])
    parts = []
    starts = order.starts.tolist()
    for slot, matrix in enumerate(matrices):
        span = slice(starts[slot], starts[slot + 1])
        halves = []
        for half, part in enumerate(matrix.chunk(case.halves)):
            if case.transposed:
                y = x[span].chunk(case.halves, dim=1)[half] @ part
            else:
                y = x[span] @ part.T
            if low is not None:
                b = low.matrix_SNR[slot].double().chunk(case.halves)[half]
                term = scales[half] * low.low_PR[span].double().chunk(case.halves, dim=1)[half] @ b.T
                y = y + (term * keep(term.shape[1])[span] if case.drop == "low" else term)
            halves.append(y if low is not None else y * scales[half])
        parts.append(torch.cat(halves, dim=1))
    return torch.cat(parts)


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str, device: torch.device, poisoned: None) -> None:
    case = CASES[name]
    given = operands(case, device)
    want = expected(case, given)
    y = grouped_gemm(given.x, given.weights, given.order, given.options)
    assert_close(y[: len(want)], want, TOLERANCE[case.dtype])
    assert y[len(want) :].isnan().all(), "rows of assignments elsewhere were written"


@pytest.mark.parametrize("name", ["gather", "transposed, rank", "halves, rank", "dropout of x"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(name: str, dtype: torch.dtype, device: torch.device, poisoned: None) -> None:
    case = replace(CASES[name], dtype=dtype)
    given = operands(case, device)
    want = expected(case, given)
    y = grouped_gemm(given.x, given.weights, given.order, given.options)
    assert y.dtype == dtype
    assert_close(y[: len(want)], want, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["groups: uneven", "transposed", "separate", "halves, rank", "odd sizes"])
def test_tensor_descriptors(name: str, device: torch.device, poisoned: None) -> None:
    """What Hopper runs: TMA where the operands are aligned, which odd sizes are not."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9:
        pytest.skip("this GPU has no tensor memory accelerator")
    case = replace(CASES[name], dtype=torch.bfloat16)
    given = operands(case, device)
    want = expected(case, given)
    y = given.x.new_empty(given.order.num_assignments, want.shape[1])
    launch = gemm_launch(given.x, given.weights, given.order, y, given.options, sm=90)
    assert launch.constants["W_DESCRIPTOR"] == (name != "odd sizes")
    assert launch.constants["X_DESCRIPTOR"] == (not case.gather)
    launch.run()
    assert_close(y[: len(want)], want, TOLERANCE[case.dtype])


def test_separate_weights_always_have_a_table_which_is_made_once() -> None:
    """Also one matrix, and matrices equally far apart: with and without a table are two compiled kernels."""
    matrices = torch.zeros(4, 6, 10)[::2, :3]
    equally, one, backwards = (separate_weights(each) for each in (list(matrices), [matrices[0]], [matrices[1], matrices[0]]))
    found = [weights.offset_S for weights in (equally, one, backwards)]
    assert all(table is not None for table in found)
    assert [table.tolist() for table in found if table is not None] == [[0, 120], [0], [0, -120]]
    assert separate_weights(list(matrices)).offset_S is equally.offset_S
