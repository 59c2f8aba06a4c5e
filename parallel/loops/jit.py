"""Loops that numba compiles to machine code: once for each machine, in the background, while plain Python does the same work.

Plain Python gives the same results to the bit, so a process that finds no machine code begins with it. Once it has spent as much on plain
Python as compiling costs, it starts a process that compiles: so compiling never more than doubles what a run spends, and a short run does
not compile at all. The compiler runs at idle priority. Where plain Python still takes a large share of the time, calls wait for the machine
code, which a compiler at ordinary priority then makes. Without numba everything stays plain Python.

    @loop                    a function that compiled functions call; from Python it runs as plain Python
    @entry                   a function that Python calls: machine code where there is some, else plain Python

The machine code lies in the user's cache directory, or under NUMBA_CACHE_DIR; in a folder named after the content of the sources that have
loops and the versions of Python, numba and llvmlite, so that old code is never run, and all copies of the same sources share it.
`hecate.parallel.loops.machine_code` says how it is made and kept.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import importlib.util
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, Literal, ParamSpec, TypeVar

from hecate.io.own_folder import ours_alone
from hecate.io.python_module import RUN_MODULE

P = ParamSpec("P")
R = TypeVar("R")
Function = TypeVar("Function", bound=Callable[..., Any])

COMPILING_SECONDS = 30.0
"""about what compiling costs; a process that has spent as many processor seconds on plain Python has it begin"""
PLAIN_SECONDS, PLAIN_SHARE = 5.0, 0.3
"""a process waits for the machine code once it has spent more processor seconds than this, and a larger share of the time, on plain Python
since compiling began"""
_PATIENCE = 300.0
"""seconds for which a process waits for machine code, in all, before it goes on without until there is some"""
_COMPILER_MODULE = "hecate.parallel.plan.compile_loops"

State = Literal["unknown", "plain", "compiling", "ready"]
"""unknown: there is no machine code yet. plain: there will be none in this process. compiling: somebody is making it"""


class _Process:
    """What this process has found out about the machine code, and the seconds that it did without."""

    state: State = "unknown"
    compiles = False
    """whether this process compiles what is not in the folder"""
    plain_seconds = 0.0
    """the processor time that this process has spent on plain Python"""
    compiling_since, plain_before = 0.0, 0.0
    """the time, and the plain seconds, when this process found that somebody compiles"""
    waited_seconds = 0.0
    compiler: subprocess.Popen[bytes] | None = None
    """the compiler that this process has started"""
    idle = True
    """whether the compiler that this process starts has idle priority"""
    say: Callable[[str], None] = staticmethod(lambda text: None)


_process = _Process()
_ROOT = Path(__file__).resolve().parents[1]
_COMPILING = ("jit.py", "machine_code.py", "compile_loops.py")
_loops: list[Callable[..., Any]] = []
_loading = threading.Lock()


def loop(function: Function) -> Function:
    """Mark a function of numbers, tuples and arrays that compiled functions call."""
    _loops.append(function)
    return function


class Entry(Generic[P, R]):
    """A function of numbers, tuples and arrays that Python calls; see `entry`."""

    def __init__(self, function: Callable[P, R]) -> None:
        self.plain = function
        """the function in plain Python"""
        self._machine_code: Any = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if have_machine_code():
            from hecate.parallel.loops.machine_code import NoMachineCode

            try:
                return self.machine_code(*args, **kwargs)
            except NoMachineCode:
                # What should be ready is not: all processes do without until it has been compiled anew.
                _process.state = "unknown"
                if (folder := code_folder()) is not None:
                    _marker(folder).unlink(missing_ok=True)
        started = time.thread_time()
        result = self.plain(*args, **kwargs)
        _process.plain_seconds += time.thread_time() - started
        return result

    @property
    def machine_code(self) -> Callable[P, R]:
        """numba's dispatcher; it loads what is in the folder. What is missing from it is compiled inside `compiling_in_this_process`;
        elsewhere a call raises `NoMachineCode`."""
        if self._machine_code is None:
            with _loading:  # a run plans in one thread and carries plans out in another
                self._load()
        return self._machine_code

    def _load(self) -> None:
        from hecate.parallel.loops import machine_code

        if (folder := code_folder()) is None:
            raise machine_code.NoMachineCode
        # Late, since numba takes seconds to import; and all at once, since any loop may be called from this entry.
        while _loops:
            machine_code.register_loop(_loops.pop())
        self._machine_code = machine_code.dispatcher(self.plain, folder, compiles=lambda: _process.compiles)


def entry(function: Callable[P, R]) -> Entry[P, R]:
    """Let machine code do what a function does, as soon as there is some. Every call must give the same types."""
    return Entry(function)


def have_machine_code() -> bool:
    """Whether there is machine code now. If there is none, a compiler is started, and waited for, where plain Python takes too long."""
    if state() == "unknown" and _process.plain_seconds >= COMPILING_SECONDS:
        start_compiling()
    if _process.state == "compiling":
        share = PLAIN_SHARE * (time.perf_counter() - _process.compiling_since)
        if _process.plain_seconds - _process.plain_before > max(PLAIN_SECONDS, share) and _process.waited_seconds < _PATIENCE:
            _wait(_PATIENCE - _process.waited_seconds)
    return _process.state == "ready"


def start_compiling() -> State:
    """If there is no machine code yet, start a process that makes it, unless another process has. Returns at once."""
    if state() in ("unknown", "compiling") and _process.compiler is None and (folder := code_folder()) is not None:
        if _process.state == "unknown":
            _process.state, _process.compiling_since, _process.plain_before = "compiling", time.perf_counter(), _process.plain_seconds
            _process.say("planner: compiling its loops, once for this machine, in the background; plain Python plans the steps until then")
        _process.compiler = _start_compiler(folder)
    return _process.state


def compile_and_wait() -> State:
    """Have the loops compiled at ordinary priority, unless they are, and wait for the end."""
    _process.idle = False
    if start_compiling() == "compiling":
        _wait(float("inf"))
    return _process.state


def state() -> State:
    """What this process knows of the machine code, after looking whether there is some, or can be none."""
    if _process.state in ("ready", "plain"):
        return _process.state
    folder = code_folder() if _numba_is_installed() else None
    if folder is None:
        _process.state = "plain"
    elif _marker(folder).exists():
        if _process.compiler is not None:
            _process.compiler.wait()  # it has nothing left to do but end, and would stay a zombie
        _process.state, _process.compiler = "ready", None
    elif _process.compiler is not None and _process.compiler.poll():
        _process.state = "plain"
        _process.say(f"planner: its loops could not be compiled and stay plain Python; see {folder / 'compiler.log'}")
    return _process.state


def say_with(say: Callable[[str], None]) -> None:
    """Report from now on what happens to the machine code, by calling `say` with a line for the user each time."""
    _process.say = say


def waited_seconds() -> float:
    """Seconds for which this process has waited for machine code so far."""
    return _process.waited_seconds


@cache
def sources() -> tuple[Path, ...]:
    """The files that machine code is made of: those that have loops, and those that say how they are compiled."""
    marked = re.compile(rb"^@(jit\.)?(loop|entry)$", re.MULTILINE)
    return tuple(path for path in sorted(_ROOT.rglob("*.py")) if path.name in _COMPILING or marked.search(path.read_bytes()))


def can_compile() -> bool:
    """Whether numba is installed, and there is a folder for its machine code."""
    return _numba_is_installed() and code_folder() is not None


@contextmanager
def compiling_in_this_process() -> Iterator[None]:
    """Compile whatever is called inside, and keep it for all processes. For the compiler's process, tests and benchmarks.

    Raises:
        RuntimeError: numba is missing, or no folder can be written.
    """
    if not can_compile():
        raise RuntimeError("the planner's loops cannot be compiled: numba is missing, or no cache directory can be written")
    from hecate.parallel.loops.machine_code import optimising_entries_alone

    _process.state, _process.compiles = "ready", True
    try:
        with optimising_entries_alone():
            yield
    finally:
        _process.compiles = False


def all_is_compiled() -> None:
    """Tell all processes that there is machine code of every entry."""
    folder = code_folder()
    if folder is None:
        return
    for path in folder.glob("*.nb?"):  # whole on the disk before the mark says so
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _marker(folder).touch()


@contextmanager
def plain_python() -> Iterator[None]:
    """Run without machine code during the block, even if there is some. Tests and measurements use this."""
    before, _process.state = _process.state, "plain"
    try:
        yield
    finally:
        _process.state = before


def _wait(patience: float) -> None:
    _process.say("planner: waiting until its loops are compiled, once for this machine")
    started = time.perf_counter()
    if _process.idle and _process.compiler is not None:  # its priority could not be raised without rights that users lack
        _process.compiler.terminate()
        _process.compiler.wait()
        _process.compiler = None
    _process.idle = False
    while start_compiling() == "compiling" and time.perf_counter() - started < patience:
        time.sleep(0.05)
    _process.waited_seconds += time.perf_counter() - started


def _start_compiler(folder: Path) -> subprocess.Popen[bytes] | None:
    """Start a process that compiles; None: another process compiles already. There may be one of each priority: who waits is not kept by a
    compiler that gets what others leave of the processors."""
    # The new process inherits the lock. The kernel gives it up when the last process that has it open ends, however it ends, so no
    # compiler that was killed keeps others from compiling.
    with (folder / ("idle.lock" if _process.idle else "lock")).open("w") as lock, (folder / "compiler.log").open("a") as log:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return None
        root = str(Path(sys.modules["hecate"].__path__[0]).parent)
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        compiler = subprocess.Popen(
            [*RUN_MODULE, _COMPILER_MODULE],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(lock.fileno(),),
            env=os.environ | {"PYTHONPATH": path},
        )
        if _process.idle and hasattr(os, "SCHED_IDLE"):  # Linux
            with suppress(OSError):  # it has ended, or a container does not allow it
                os.sched_setscheduler(compiler.pid, os.SCHED_IDLE, os.sched_param(0))
        return compiler


@cache
def _numba_is_installed() -> bool:
    if os.environ.get("NUMBA_DISABLE_JIT", "0") != "0":
        return False
    try:
        return importlib.util.find_spec("numba") is not None
    except ValueError:  # a test has put None in its place
        return False


@cache
def code_folder() -> Path | None:
    """The folder that the machine code of these sources is kept in; None: there is none that only this user can write."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hecate"
    places = [user_cache, Path(tempfile.gettempdir()) / f"hecate-{os.getuid()}"]
    if "NUMBA_CACHE_DIR" in os.environ:
        places = [Path(os.environ["NUMBA_CACHE_DIR"])]
    for place in places:
        folder = place / f"loops-{_sources_digest()}"
        try:
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.mkdir(exist_ok=True, mode=0o700)
            if not all(map(ours_alone, (place, folder))):
                continue
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    return None


def _sources_digest() -> str:
    digest = hashlib.sha256(f"{platform.python_version()} numba {version('numba')} {version('llvmlite')}".encode())
    for path in sources():
        digest.update(f"{path.relative_to(_ROOT)} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _marker(folder: Path) -> Path:
    """The file that says that all entries are compiled for this kind of processor: machines of several kinds may share a folder."""
    llvm: Any = importlib.import_module("llvmlite.binding")
    features = ",".join(f"{name}{on}" for name, on in sorted(llvm.get_host_cpu_features().items()))
    processor = hashlib.sha256(f"{llvm.get_host_cpu_name()} {features}".encode()).hexdigest()[:16]
    return folder / f"{processor}.ready"
