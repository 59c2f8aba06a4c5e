"""Compile the mock device against the torch of this environment, once for each version of the sources and of torch."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = ("hooks.cpp", "device.cpp")
LIBRARIES = {"hooks.cpp": "mock_hooks.so", "device.cpp": "mock_device.so"}


def why_not() -> str | None:
    """Why the mock device cannot be built; None: it can. Imports no torch."""
    if shutil.which("g++") is None:
        return "there is no g++"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return f"there is no Python.h in {sysconfig.get_paths()['include']}"
    if list((_torch_folder() / "lib").glob("libtorch_cuda*")):
        return "this torch is built for CUDA and has kernels of its own for the device"
    return None


def build() -> Path:
    """Return the folder of the compiled libraries. Processes that call this at the same time wait for the first of them."""
    torch_folder, include = _torch_folder(), sysconfig.get_paths()["include"]
    digest = hashlib.sha256("".join([version("torch"), sys.version, *((HERE / name).read_text() for name in SOURCES)]).encode())
    folder = HERE / "build" / digest.hexdigest()[:16]
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder
        staging = folder.with_suffix(".staging")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        compilers = [subprocess.Popen(_command(name, staging, torch_folder, include)) for name in SOURCES]
        failed = [name for name, compiler in zip(SOURCES, compilers, strict=True) if compiler.wait()]
        assert not failed, f"g++ could not compile {failed}"
        staging.rename(folder)
    return folder


def _torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def _command(name: str, folder: Path, torch_folder: Path, include: str) -> list[str]:
    headers = [f"-I{torch_folder}/include", f"-I{torch_folder}/include/torch/csrc/api/include", f"-I{include}"]
    libraries = [f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu", *(["-ltorch_python"] if name == "device.cpp" else [])]
    flags = ["-shared", "-fPIC", "-std=c++20", "-O1", "-g0", "-DTORCH_EXTENSION_NAME=mock_device", f"-Wl,-rpath,{torch_folder}/lib"]
    # Libraries come after the source, because the linker reads from left to right.
    return ["g++", *flags, *headers, str(HERE / name), "-o", str(folder / LIBRARIES[name]), *libraries]
