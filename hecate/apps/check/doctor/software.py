"""Checks of the software: Python, packages, GPUs, and what torch can do with them."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import re
import sys
import tempfile
from pathlib import Path

from hecate.apps.check.doctor.finding import Finding, by_name, ok, problem, skipped, warning
from hecate.errors import UserError, install_hint

_DISTRIBUTION = "hecate-moe"
_NAMESAKE = "hecate"
"""a distribution of this name is another project's, whose package has the same name"""
_EXTRAS = {
    "ray": "ray",
    "megatron": "megatron-core",
    "report": "matplotlib",
    "quickstart": "reasoning-gym",
    "merge": "scikit-learn",
    "optim": "bitsandbytes",
}
"""extra -> the distribution that it is about"""
_GPU_DRIVER = Path("/proc/driver/nvidia/version")


def python() -> Finding:
    return ok(f"{sys.version.split()[0]} at {sys.executable}")  # an older one than 3.11 does not come so far


def packages() -> Finding:
    """What hecate needs, in versions that it was tested with."""
    from packaging.requirements import Requirement

    try:
        needed = [Requirement(text) for text in metadata.requires(_DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        return warning(f"{_DISTRIBUTION} is not installed; hecate runs from its sources", "make install, or pip install -e .")
    wrong, found = [], []
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version or 'missing'} (needs {requirement.specifier})")
        else:
            found.append(f"{requirement.name} {version}")
    if wrong:
        return problem("; ".join(wrong), "install hecate's wheel again, or make install")
    return ok(", ".join(found[:4]) + f" and {len(found) - 4} more")


def namesake() -> Finding:
    version = _version(_NAMESAKE)
    if version is not None:
        return problem(
            f"the package {_NAMESAKE} {version} is another project's", f"pip uninstall {_NAMESAKE}, then install {_DISTRIBUTION} again"
        )
    return ok(f"no other package {_NAMESAKE}")


def extras() -> Finding:
    """The optional parts. What a configuration asks for and is missing is refused when it is asked for."""
    there = [f"{extra} ({_version(name)})" for extra, name in _EXTRAS.items() if _version(name)]
    missing = [extra for extra, name in _EXTRAS.items() if not _version(name)]
    hint = f"; not installed: {', '.join(missing)} ({install_hint(missing[0])})" if missing else ""
    return ok((", ".join(there) or "none") + hint)


def torch_import() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        return problem(str(error).splitlines()[0], "pip install --force-reinstall torch")
    return ok(f"torch {torch.__version__}, vector instructions {torch.backends.cpu.get_cpu_capability()}")


def gpus() -> Finding:
    """Whether torch sees the GPUs that the machine's driver has."""
    import torch

    driver = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", _GPU_DRIVER.read_text(encoding="utf-8")) if _GPU_DRIVER.is_file() else None
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        each = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        return ok(f"{each}; CUDA {torch.version.cuda}, driver {driver[1] if driver else 'unknown'}")
    if not _GPU_DRIVER.is_file():
        return ok("none; ranks compute on the CPU")
    if torch.version.cuda is None:
        return problem(
            f"a driver ({driver[1] if driver else '?'}), but torch {torch.__version__} is built without CUDA", "install torch with CUDA"
        )
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return warning("CUDA_VISIBLE_DEVICES is empty, so ranks compute on the CPU", "unset CUDA_VISIBLE_DEVICES")
    return problem(
        f"torch {torch.__version__} sees no GPU of the driver {driver[1] if driver else '?'}",
        "CUDA of torch needs a newer driver, or /dev/nvidia* is not in the container: docker run --gpus all",
    )


def gpu_memory() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return skipped("no GPU")
    free = [torch.cuda.mem_get_info(index) for index in range(torch.cuda.device_count())]
    busy = [index for index, (left, total) in enumerate(free) if left < 0.9 * total]
    what = ", ".join(f"{left / 2**30:.0f} of {total / 2**30:.0f} GiB free" for left, total in dict.fromkeys(free))
    if busy:
        return warning(what, f"other programs use GPU {', '.join(map(str, busy))}: nvidia-smi lists them")
    return ok(what)


def gpu_links() -> Finding:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        return skipped("fewer than two GPUs")
    apart = [(a, b) for a in range(count) for b in range(count) if a != b and not torch.cuda.can_device_access_peer(a, b)]
    if apart:
        return warning(
            f"{len(apart) // 2} of {count * (count - 1) // 2} pairs reach each other through the host only",
            "nvidia-smi topo -m shows the links",
        )
    return ok("all reach each other")


def nccl() -> Finding:
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available():
        return skipped("no GPU; ranks exchange with gloo")
    if not dist.is_nccl_available():
        return problem(f"torch {torch.__version__} is built without NCCL", "install torch with CUDA")
    return ok(".".join(map(str, torch.cuda.nccl.version())))


def collectives() -> Finding:
    """A group of one rank that sums a tensor with gloo; HECATE_COLLECTIVES is read, too."""
    import torch
    import torch.distributed as dist

    from hecate.ranks.backend import chosen_backend

    try:
        backend = chosen_backend()
    except UserError as error:
        return problem(str(error).splitlines()[0], "unset HECATE_COLLECTIVES")
    if dist.is_initialized():
        return skipped("this process is a rank of a job")
    with tempfile.TemporaryDirectory() as folder:
        try:
            store = dist.FileStore(str(Path(folder, "store")), 1)
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
            dist.all_reduce(torch.ones(1))
        except (RuntimeError, ValueError) as error:
            return problem(
                f"gloo: {str(error).splitlines()[0]}", "export GLOO_SOCKET_IFNAME=lo, or the interface by which nodes reach each other"
            )
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    return ok(f"gloo sums; ranks use {backend}")


def bfloat16() -> Finding:
    import torch

    from hecate.model.files.load import pick_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if pick_dtype("auto", device) == torch.bfloat16:
        return ok(f"the {device.type} computes in bfloat16, and so does model.dtype=auto")
    return ok(f"the {device.type} emulates bfloat16; model.dtype=auto computes in float32")


def triton() -> Finding:
    """Compiles and runs a small kernel on a GPU. Without one only the package is looked at."""
    import torch

    version = _version("triton")
    if version is None:
        return warning("not installed", "pip install triton; without it kernels=auto computes with torch")
    if os.environ.get("TRITON_INTERPRET") not in (None, "", "0"):
        return warning("TRITON_INTERPRET is set, so kernels are interpreted, very slowly", "unset TRITON_INTERPRET")
    if not torch.cuda.is_available():
        return ok(f"{version}; without a GPU experts are computed with torch")
    from hecate.kernels.backend import triton_problem

    found = triton_problem("cuda")
    if found is not None:
        return problem(found.splitlines()[0], "kernels=torch trains without it")
    from hecate.apps.check.doctor.triton_kernel import add_one

    try:
        right = bool(torch.equal(add_one(torch.arange(8.0, device="cuda")).cpu(), torch.arange(1.0, 9.0)))
    except Exception as error:  # noqa: BLE001 - a compiler fails in many ways, and each is a finding
        return problem(
            f"{version}: {str(error).splitlines()[0]}", "Triton needs a C compiler (gcc) and a folder for its cache (TRITON_CACHE_DIR)"
        )
    return (
        ok(f"{version} compiles") if right else problem(f"{version} computes wrongly", "report it with the output of hecate doctor --json")
    )


def planner_cache() -> Finding:
    """Whether the planner's loops are compiled for this machine, and where: without a folder for them they run as plain Python."""
    import numba

    from hecate.parallel.loops import jit

    folder = jit.code_folder()
    if folder is None:
        return warning(
            "no folder for compiled loops can be written by this user alone, so that planners run in plain Python",
            "export NUMBA_CACHE_DIR=$HOME/.cache/numba",
        )
    if not jit.can_compile():
        return skipped("NUMBA_DISABLE_JIT is set, so that planners run in plain Python")
    state = jit.state()
    if state == "ready":
        return ok(f"numba {numba.__version__} has compiled the planner's loops for this machine, in {folder.parent}")
    if state == "plain":
        return warning("the planner's loops could not be compiled and stay plain Python", f"see {folder / 'compiler.log'}")
    return Finding(
        "ok",
        f"the planner's loops are not yet compiled for this machine; a run for which it pays compiles them, in {folder.parent}",
        "hecate doctor --compile does it now",
    )


def ray_cluster() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    if _version("ray") is None:
        return skipped("ray is not installed")
    if not address:
        return ok("RAY_ADDRESS is not set; hecate ray takes --address")
    if address == "local":
        return ok("RAY_ADDRESS=local: hecate ray starts a cluster of its own")
    import socket

    host, _, port = address.removeprefix("ray://").removeprefix("http://").partition(":")
    try:
        with socket.create_connection((host, int(port or 6379)), timeout=3):
            return ok(f"RAY_ADDRESS={address} answers")
    except (OSError, ValueError) as error:
        return problem(f"RAY_ADDRESS={address}: {error}", "start the cluster with ray start --head, or unset RAY_ADDRESS")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


CHECKS = by_name(
    python,
    packages,
    namesake,
    extras,
    torch_import,
    gpus,
    gpu_memory,
    gpu_links,
    nccl,
    collectives,
    bfloat16,
    triton,
    planner_cache,
    ray_cluster,
)
