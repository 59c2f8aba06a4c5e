"""Checks of the software find what is wrong, with other versions and variables in the place of this environment's."""

from __future__ import annotations

import importlib.metadata as metadata
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hecate.apps.check.doctor import software, triton_kernel
from hecate.apps.check.doctor.finding import Finding
from hecate.kernels import backend
from hecate.parallel.loops import jit


def _versions(**other: str | None) -> Callable[[str], str]:
    own = metadata.version

    def version(name: str) -> str:
        found = other[name] if name in other else own(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    return version


def test_old_and_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", _versions(numpy="1.26.4", xxhash=None))
    found = software.packages()
    assert found.state == "problem"
    assert found.what == "numpy 1.26.4 (needs >=2.0); xxhash missing (needs >=3.4)"


def test_the_other_project_of_the_same_name_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", _versions(hecate="0.1.0"))
    assert software.namesake().state == "problem"
    monkeypatch.setattr(metadata, "version", _versions(hecate=None))
    assert software.namesake().state == "ok"


def test_extras_that_are_missing_say_how_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    others = {"megatron-core": None, "reasoning-gym": "0.1.25", "scikit-learn": "1.9.1", "bitsandbytes": "0.50"}
    monkeypatch.setattr(metadata, "version", _versions(ray="2.60.0", matplotlib="3.11", **others))
    found = software.extras()
    there = "ray (2.60.0), report (3.11), quickstart (0.1.25), merge (1.9.1), optim (0.50)"
    assert found.what.startswith(f"{there}; not installed: megatron (in hecate's checkout: pip install")


@pytest.mark.parametrize(
    ("built_with", "visible", "state", "words"),
    [
        (None, None, "problem", "built without CUDA"),
        ("12.9", "", "warning", "CUDA_VISIBLE_DEVICES is empty"),
        ("12.9", None, "problem", "sees no GPU of the driver 535.183.01"),
    ],
)
def test_a_driver_whose_gpus_torch_does_not_see(
    built_with: str | None, visible: str | None, state: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n", encoding="utf-8")
    monkeypatch.setattr(software, "_GPU_DRIVER", driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_with)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = software.gpus()
    assert found.state == state
    assert words in found.what


def test_a_busy_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ((78, 20)[index] * 2**30, 80 * 2**30))
    assert software.gpu_memory() == Finding(
        "warning", "78 of 80 GiB free, 20 of 80 GiB free", "other programs use GPU 1: nvidia-smi lists them"
    )


def test_collectives_of_a_wrong_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HECATE_COLLECTIVES", "mpi")
    found = software.collectives()
    assert (found.state, found.mend) == ("problem", "unset HECATE_COLLECTIVES")
    monkeypatch.setenv("HECATE_COLLECTIVES", "gloo")
    assert software.collectives() == Finding("ok", "gloo sums; ranks use gloo")


def test_an_interpreted_triton_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert software.triton().state == "warning"
    monkeypatch.setattr(metadata, "version", _versions(triton=None))
    assert software.triton().what == "not installed"


def test_a_kernel_that_does_not_compile_or_computes_wrongly_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("Failed to find C compiler\nand more")

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "triton_problem", lambda _: None)
    monkeypatch.setattr(torch, "arange", lambda *numbers, device="cpu", arange=torch.arange: arange(*numbers))
    for kernel, words in ((no_compiler, "Failed to find C compiler"), (torch.neg, "computes wrongly")):
        monkeypatch.setattr(triton_kernel, "add_one", kernel)
        found = software.triton()
        assert found.state == "problem"
        assert words in found.what
    monkeypatch.setattr(triton_kernel, "add_one", lambda x: x + 1)
    assert software.triton().state == "ok"


def test_loops_that_cannot_be_kept_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "new" / "cache"))
    monkeypatch.setattr(jit, "_process", jit._Process())
    monkeypatch.setattr(jit, "_numba_is_installed", lambda: True)
    jit.code_folder.cache_clear()
    try:
        assert "not yet compiled" in software.planner_cache().what
        assert "--compile" in software.planner_cache().mend
        jit.all_is_compiled()
        assert software.planner_cache().state == "ok"
        assert software.planner_cache().mend == ""
        assert software.planner_cache().what.endswith(str(tmp_path / "new" / "cache"))
        (tmp_path / "all").mkdir()
        (tmp_path / "all").chmod(0o777)
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "all"))
        jit.code_folder.cache_clear()
        assert software.planner_cache().state == "warning", "anybody could put machine code there"
    finally:
        jit.code_folder.cache_clear()


def test_a_cluster_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert software.ray_cluster().state == "problem"
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert software.ray_cluster().state == "ok"
    monkeypatch.delenv("RAY_ADDRESS")
    assert software.ray_cluster().state == "ok"
