"""Every kernel compiled for GPUs that are not here: nothing spills, and `compiled.json` says what came out.

After a change of kernels or configurations: `python -m tests.kernels.compiled_table --write` with the newest triton, and with 3.6 in an
environment that has it.
"""

from __future__ import annotations

from typing import Any

import pytest
import triton

from tests.kernels.compile_process import json_of
from tests.kernels.compiled_table import complaints, read_table
from tests.kernels.layer_cases import CASES, SPREAD

BEARABLE = {
    # Without tensor cores no block of ours does without it under both versions, and it is one value of a thread.
    "3.6.0": ("sm_90: gated_backward_kernel: float32 ACTIVATION=silu BM=16 BN=16 BR_DOWN=128", "'stack': 8,"),
}
"""triton version -> the one kernel that may spill, and how much"""
REWRITE = "if that is meant: python -m tests.kernels.compiled_table --write"


@pytest.fixture(scope="module")
def spread() -> Any:
    """Some layers' rows, compiled now."""
    return json_of("tests.kernels.compiled_table", "--spread")


@pytest.mark.slow
def test_what_is_compiled_now_fits_and_does_not_spill(spread: Any) -> None:
    assert complaints(spread) == []


@pytest.mark.slow
def test_it_is_what_the_table_says(spread: Any) -> None:
    table = read_table().get(triton.__version__)
    if table is None:
        pytest.skip(f"compiled.json has no rows of triton {triton.__version__}")
    differing = [
        f"{gpu} {name}: {row}, not {table[gpu].get(name)}"
        for gpu, rows in spread.items()
        for name, row in rows.items()
        if table[gpu].get(name) != row
    ]
    assert not differing, f"{REWRITE}\n" + "\n".join(differing)


def test_the_table_has_the_kernels_that_the_layers_launch_and_no_others() -> None:
    """Of each version of triton: what layers launch is the same under all."""
    names = json_of("tests.kernels.compiled_table", "--names")
    for version, table in read_table().items():
        for gpu, launched in names.items():
            assert set(launched) == set(table[gpu]), f"triton {version}: {REWRITE}"


@pytest.mark.parametrize("version", read_table())
def test_no_kernel_of_the_table_spills(version: str) -> None:
    found = complaints(read_table()[version])
    begins, spill = BEARABLE.get(version, ("no kernel", ""))
    assert [line for line in found if not (line.startswith(begins) and spill in line)] == []


def test_the_table_is_of_the_oldest_triton_and_of_a_newer() -> None:
    assert "3.6.0" in read_table()
    assert len(read_table()) > 1


@pytest.mark.parametrize("version", read_table())
def test_large_products_run_on_the_tensor_cores_of_their_generation(version: str) -> None:
    """HGMMA and TMA on sm_90; on sm_80 HMMA, fed by asynchronous copies. A sum over 16 numbers is one step, with nothing to copy ahead."""
    rows = read_table()[version]
    wide = {
        gpu: [
            row
            for name, row in kernels.items()
            if "grouped_gemm" in name and "bfloat16" in name and "BM=128" in name and " K=16 " not in name
        ]
        for gpu, kernels in rows.items()
    }
    assert all(wide.values())
    assert all(row.get("HGMMA") and row.get("UTMALDG") for row in wide["sm_90"])
    assert all(row.get("HMMA") and row.get("LDGSTS") for row in wide["sm_80"])


def test_a_kernel_that_spills_or_sums_by_atomics_or_does_not_fit_is_complained_of() -> None:
    fine = {"registers": 32, "stack": 0, "shared": 1024}
    bad = {"spills": {**fine, "stack": 8, "LDL": 2}, "sums": {**fine, "RED": 1}, "fits not": {**fine, "shared": 200 << 10}}
    assert len(complaints({"sm_80": {**bad, "good": fine}})) == 3
    assert len(complaints({"sm_90": {**bad, "good": fine}})) == 2


def test_layers_of_the_spread_exist() -> None:
    assert {name for names in SPREAD.values() for name in names} <= set(CASES)
