"""Put the mock CUDA device under torch, in this process. This module must be imported before torch.

    from tests.mock_cuda import install     # loads the device
    install.install(devices=4)              # torch.cuda says that there are four GPUs

torch itself must think that CUDA is there (`torch.cuda`'s questions, `torch.Storage.resize_`); collectives run through gloo on the same
memory (`tests.mock_cuda.collectives`), and Triton kernels in Triton's interpreter.
"""

# ruff: noqa: E402
from __future__ import annotations

import ctypes
import importlib.util
import sys
import time
from types import ModuleType
from typing import Any

from tests.mock_cuda.build import build

assert "torch" not in sys.modules, "tests.mock_cuda.install must be imported before torch"
_FOLDER = build()
ctypes.CDLL(str(_FOLDER / "mock_hooks.so"), mode=ctypes.RTLD_GLOBAL)

import torch


def _load_device() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mock_device", _FOLDER / "mock_device.so")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


device: Any = _load_device()
"""the compiled device: see the end of `device.cpp` for its functions"""

MEMORY = 80 << 30
"""bytes that each device says it has"""


def install(devices: int = 4, capability: tuple[int, int] = (9, 0)) -> None:
    """Make torch.cuda answer for the mock devices.

    Args:
        devices: how many there are.
        capability: the compute capability that they report.
    """
    # Imported before CUDA is said to be there: these modules look for what this build of torch lacks.
    import torch._dynamo
    import torch._inductor.utils

    device.set_device_count(devices)
    for name, value in _answers(capability).items():
        setattr(torch.cuda, name, value)
    torch.UntypedStorage.resize_ = _resize_storage(torch.UntypedStorage.resize_)


def index_of(given: Any) -> int:
    """The number of a device that is given in any of torch's ways; None: the current one."""
    if given is None:
        return int(device.current_device())
    if isinstance(given, int):
        return given
    index = torch.device(given).index
    return int(device.current_device()) if index is None else index


class Properties:
    """What `torch.cuda.get_device_properties` says of each device."""

    name, major, minor, total_memory, multi_processor_count, warp_size = "Mock H100", 9, 0, MEMORY, 132, 32
    shared_memory_per_multiprocessor, shared_memory_per_block_optin = 233472, 232448
    regs_per_multiprocessor, L2_cache_size, gcnArchName = 65536, 50 << 20, ""


class OnDevice:
    """`torch.cuda.device`: another current device until the end of a block."""

    def __init__(self, given: Any) -> None:
        self._index, self._before = index_of(given), -1

    def __enter__(self) -> None:
        self._before = int(device.current_device())
        device.set_device(self._index)

    def __exit__(self, *_: object) -> None:
        device.set_device(self._before)


class Stream(torch.Stream):
    """`torch.cuda.Stream`. Whatever it is given has happened when the call returns."""

    def __new__(cls, given: Any = None, priority: int = 0, **ids: int) -> Stream:
        return super().__new__(cls, **ids) if ids else super().__new__(cls, torch.device("cuda", index_of(given)), priority=priority)

    @property
    def cuda_stream(self) -> int:
        return self.stream_id

    def record_event(self, event: Event | None = None) -> Event:
        recorded = Event() if event is None else event
        recorded.record(self)
        return recorded

    def wait_event(self, event: Event) -> None:
        """What the event stands for has happened. (torch.Stream takes events of its own type only.)"""


class Event:
    """`torch.cuda.Event`. It has happened when it was recorded; its time is the host's."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._seconds = 0.0

    def record(self, stream: torch.Stream | None = None) -> None:
        self._seconds = time.perf_counter()

    def wait(self, stream: torch.Stream | None = None) -> None:
        """Orders streams, which have nothing to do."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        torch.accelerator.synchronize(int(device.current_device()))

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end._seconds - self._seconds)


def _stream_of(given: torch.Stream) -> Stream:
    return Stream(stream_id=given.stream_id, device_index=given.device_index, device_type=given.device_type)


def _answers(capability: tuple[int, int]) -> dict[str, Any]:
    def nothing() -> Any:
        """A function of its own for each name: torch's compiler refuses one function under several names of `torch.cuda`."""
        return lambda *_, **__: None

    def memory(now: bool) -> Any:
        return lambda given=None: device.memory(index_of(given))[0 if now else 1]

    return {
        "_initialized": True,
        "_lazy_init": nothing(),
        "_is_compiled": lambda: True,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": device.device_count,
        "current_device": lambda: int(device.current_device()),
        "set_device": lambda given: device.set_device(index_of(given)),
        "get_device_name": lambda device=None: Properties.name,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: Properties(),
        "mem_get_info": lambda given=None: (MEMORY - device.memory(index_of(given))[0], MEMORY),
        "memory_allocated": memory(now=True),
        "memory_reserved": memory(now=True),
        "max_memory_allocated": memory(now=False),
        "max_memory_reserved": memory(now=False),
        "reset_peak_memory_stats": lambda given=None: device.reset_peak_memory(index_of(given)),
        "empty_cache": nothing(),
        "synchronize": lambda given=None: torch.accelerator.synchronize(index_of(given)),
        "device": OnDevice,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda given=None: _stream_of(torch.accelerator.current_stream(torch.device("cuda", index_of(given)))),
        "default_stream": lambda given=None: Stream(stream_id=0, device_index=index_of(given), device_type=1),
        "set_stream": lambda stream: torch.accelerator.set_stream(stream),
        "manual_seed": nothing(),
        "manual_seed_all": nothing(),
        "get_rng_state": lambda given=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": nothing(),
        "get_rng_state_all": list,
        "set_rng_state_all": nothing(),
    }


def _resize_storage(plain: Any) -> Any:
    def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        if storage.device.type != "cuda":
            return plain(storage, size)
        device.resize_storage(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage), size)
        return storage

    return resize
