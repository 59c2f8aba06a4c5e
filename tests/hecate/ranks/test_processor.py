from pathlib import Path

import pytest

from hecate.ranks.processor import computes_bfloat16

SAPPHIRE_RAPIDS = "flags\t\t: fpu avx2 avx512f avx512bw avx512_bf16 amx_bf16 amx_tile\n"
ZEN_3 = "flags\t\t: fpu avx avx2 fma\n"


@pytest.mark.parametrize(("flags", "expected"), [(SAPPHIRE_RAPIDS, True), (ZEN_3, False), ("flags : amx_tile", True), ("", False)])
def test_the_processor_must_have_instructions_for_it(tmp_path: Path, flags: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(flags)
    assert computes_bfloat16(tmp_path / "cpuinfo", {}) is expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ATEN_CPU_CAPABILITY": "avx2"}, False),
        ({"ATEN_CPU_CAPABILITY": "default"}, False),
        ({"ATEN_CPU_CAPABILITY": "avx512"}, True),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, False),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, False),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX", "ATEN_CPU_CAPABILITY": "avx2"}, False),
    ],
)
def test_torch_may_be_bounded_to_those_of_a_lesser_processor(tmp_path: Path, environment: dict[str, str], expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(SAPPHIRE_RAPIDS)
    assert computes_bfloat16(tmp_path / "cpuinfo", environment) is expected


def test_a_machine_without_the_file_computes_in_float32(tmp_path: Path) -> None:
    assert not computes_bfloat16(tmp_path / "cpuinfo", {})
