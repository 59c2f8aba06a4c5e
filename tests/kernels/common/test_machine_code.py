"""The costs of compiled kernels: a kernel that spills registers is reported as one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kernels.ahead_of_time import count_instructions
from tests.kernels.compile_process import json_of


@pytest.fixture(scope="module")
def compiled() -> Any:
    return json_of("tests.kernels.spilling_kernel")


@pytest.mark.parametrize("sm", [80, 90])
def test_too_few_registers_are_found_out(compiled: Any, sm: int) -> None:
    spilling, roomy = compiled[f"sm_{sm}, 1 warps"], compiled[f"sm_{sm}, 4 warps"]
    assert spilling["spills"]
    assert spilling["stack"] > 0
    assert min(spilling["instructions"]["LDL"], spilling["instructions"]["STL"]) > 0
    assert spilling["registers"] == 255
    assert not roomy["spills"]
    assert roomy["registers"] < 255
    assert roomy["shared"] > 0


def test_the_newer_gpu_gets_its_own_instructions(compiled: Any) -> None:
    """x has 64 x 64 elements, enough for a warpgroup's product where there are four warps."""
    assert "HGMMA" in compiled["sm_90, 4 warps"]["instructions"]
    assert "HGMMA" not in compiled["sm_80, 4 warps"]["instructions"]
    assert compiled["sm_80, 4 warps"]["instructions"]["HMMA"] > 0


def test_counting_is_by_whole_names() -> None:
    code = """
        /*0000*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R17], desc[UR6][R4.64] ;
        /*0020*/                   LDGDEPBAR ;
        /*0030*/             @!UP0 UTMALDG.2D [UR8], [UR4] ;
        /*0040*/                   ATOMS.ADD R1, [R2], R3 ;
        /*0048*/                   ATOMG.E.EXCH.STRONG.GPU PT, RZ, [R12], R15 ;
        /*0050*/               @P1 REDUX.SUM UR4, R1 ;
        /*0060*/                   REDG.E.ADD.STRONG.GPU desc[UR4][R2.64], R5 ;
    """
    assert count_instructions(code) == {"UTMALDG": 1, "LDGSTS": 1, "LDG": 1, "ATOM": 1, "RED": 1}
