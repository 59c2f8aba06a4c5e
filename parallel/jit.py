"""Loops that numba compiles to machine code: once for each machine, in the background, while plain Python does the same work.

Compiling takes about ten seconds. So the first call that finds no machine code starts a process that compiles, and goes on as plain Python,
which gives the same results to the bit. Where plain Python takes long, and a large share of the time, calls wait for the machine code
instead. Without numba everything stays plain Python.

    @loop                    a function that compiled functions call; from Python it runs as plain Python
    @entry                   a function that Python calls: machine code where there is some, else plain Python

The machine code lies beside the source (`__pycache__`), or in the user's cache directory where the source is read-only, or under
NUMBA_CACHE_DIR; in a folder named after the sources and the versions of Python and numba, so that old code is never run.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import importlib.util
import os
import platform
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, Literal, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
Function = TypeVar("Function", bound=Callable[..., Any])

PLAIN_SECONDS, PLAIN_SHARE = 5.0, 0.3
"""of one process: with more processor seconds of plain Python, and a larger share of the time, it waits for the machine code"""
_PATIENCE = 300.0
"""seconds to wait for machine code before doing without"""
_COMPILER_MODULE = "hecate.parallel.compile_loops"

State = Literal["unknown", "plain", "compiling", "ready"]
"""plain: there will be no machine code in this process. compiling: there is none yet, but somebody is making it"""


class _Process:
    """What this process has found out about the machine code, and the seconds that it did without."""

    state: State = "unknown"
    plain_seconds = 0.0
    """processor time"""
    compiling_since = 0.0
    waited_seconds = 0.0
    compiler: subprocess.Popen[bytes] | None = None
    say: Callable[[str], None] = staticmethod(lambda text: None)


_process = _Process()
_loops: list[Callable[..., Any]] = []


def loop(function: Function) -> Function:
    """Mark a function of numbers, tuples and arrays that compiled functions call."""
    _loops.append(function)
    return function


class Entry(Generic[P, R]):
    """A function of numbers, tuples and arrays that Python calls; see `entry`."""

    def __init__(self, function: Callable[P, R]) -> None:
        self.plain = function
        """the same in plain Python"""
        self._machine_code: Any = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if have_machine_code():
            return self.machine_code(*args, **kwargs)
        started = time.thread_time()
        result = self.plain(*args, **kwargs)
        _process.plain_seconds += time.thread_time() - started
        return result

    @property
    def machine_code(self) -> Callable[P, R]:
        """numba's dispatcher; it loads what is in the cache, and compiles what is not."""
        if self._machine_code is None:
            self._machine_code = _dispatcher(self.plain)
        return self._machine_code


def entry(function: Callable[P, R]) -> Entry[P, R]:
    """Let machine code do what a function does, as soon as there is some. Every call must give the same types."""
    return Entry(function)


def have_machine_code() -> bool:
    """Whether there is machine code now. If there is none, a compiler is started, and waited for where plain Python takes too long."""
    if _process.state == "ready":
        return True
    start_compiling()
    if _process.state == "compiling":
        share = PLAIN_SHARE * (time.perf_counter() - _process.compiling_since)
        if _process.plain_seconds > max(PLAIN_SECONDS, share):
            _wait()
    return _process.state == "ready"


def start_compiling() -> State:
    """If there is no machine code yet, start a process that makes it, unless another process has. Returns at once."""
    if _process.state in ("ready", "plain"):
        return _process.state
    folder = _folder() if _numba_is_there() else None
    if folder is None:
        _process.state = "plain"
    elif _marker(folder).exists():
        if _process.compiler is not None:
            _process.compiler.wait()  # it has nothing left to do but end
        _process.state, _process.compiler = "ready", None
    elif _process.compiler is not None and _process.compiler.poll():
        _process.state = "plain"
        _process.say(f"planner: its loops could not be compiled and stay plain Python; see {folder / 'compiler.log'}")
    else:
        if _process.state == "unknown":
            _process.state, _process.compiling_since = "compiling", time.perf_counter()
        if _process.compiler is None:
            _process.compiler = _start_compiler(folder)
    return _process.state


def say_with(say: Callable[[str], None]) -> None:
    """Report from now on what happens to the machine code, by calling `say` with a line for the user each time."""
    _process.say = say
    if start_compiling() == "compiling":
        say("planner: compiling its loops, once for this machine, in the background; plain Python plans the steps until then")


def waited_seconds() -> float:
    """Seconds for which this process has waited for machine code so far."""
    return _process.waited_seconds


def code_folder() -> Path | None:
    """The folder that machine code is kept in; None: there is none that only this user can write."""
    return _folder()


def can_compile() -> bool:
    """Whether numba is installed, and there is a folder for its machine code."""
    return _numba_is_there() and _folder() is not None


@contextmanager
def compiling_here() -> Iterator[None]:
    """Compile whatever is called inside, in this process, and keep it for all processes. For the compiler's process, tests and benchmarks.

    Raises:
        RuntimeError: numba is missing, or no folder can be written.
    """
    folder = _folder() if can_compile() else None
    if folder is None:
        raise RuntimeError("the planner's loops cannot be compiled: numba is missing, or no cache directory can be written")
    _process.state = "ready"
    yield
    _marker(folder).touch()


@contextmanager
def plain_python() -> Iterator[None]:
    """Run without machine code during the block, even if there is some. Tests and measurements use this."""
    before, _process.state = _process.state, "plain"
    try:
        yield
    finally:
        _process.state = before


def _wait() -> None:
    _process.say("planner: waiting until its loops are compiled, once for this machine")
    started = time.perf_counter()
    while start_compiling() == "compiling" and time.perf_counter() - started < _PATIENCE:
        time.sleep(0.05)
    if _process.state == "compiling":
        _process.state = "plain"
    _process.waited_seconds += time.perf_counter() - started


def _start_compiler(folder: Path) -> subprocess.Popen[bytes] | None:
    """Start a process that compiles; None: another process compiles already. The new process holds the lock until it ends."""
    with (folder / "lock").open("w") as lock, (folder / "compiler.log").open("a") as log:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return None
        root = str(Path(sys.modules["hecate"].__path__[0]).parent)
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.Popen(
            [sys.executable, "-m", _COMPILER_MODULE],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(lock.fileno(),),
            env=os.environ | {"PYTHONPATH": path},
        )


def _dispatcher(function: Callable[..., Any]) -> Any:
    import numba

    _register_loops()
    # Only while the dispatcher is made does numba read where its cache is.
    settings: Any = numba.config
    before, settings.CACHE_DIR = settings.CACHE_DIR, str(_folder())
    try:
        return numba.njit(function, cache=True, nogil=True, error_model="numpy")
    finally:
        settings.CACHE_DIR = before


def _register_loops() -> None:
    from numba.extending import register_jitable

    while _loops:
        register_jitable(error_model="numpy")(_loops.pop())


@cache
def _numba_is_there() -> bool:
    if os.environ.get("NUMBA_DISABLE_JIT", "0") != "0":
        return False
    try:
        return importlib.util.find_spec("numba") is not None
    except ValueError:  # a test has put None in its place
        return False


@cache
def _folder() -> Path | None:
    """Where the machine code of these sources lies; None: nowhere can be written."""
    places = [Path(__file__).resolve().parent / "__pycache__", _user_cache(), Path(tempfile.gettempdir()) / f"hecate-{os.getuid()}"]
    if "NUMBA_CACHE_DIR" in os.environ:
        places = [Path(os.environ["NUMBA_CACHE_DIR"])]
    for place in places:
        folder = place / f"loops-{_sources_digest()}"
        try:
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.mkdir(exist_ok=True, mode=0o700)
            if not all(map(_is_ours, (place, folder))):
                continue
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    return None


def _is_ours(folder: Path) -> bool:
    """Whether nobody else can put machine code there, which this process would run: in a folder for all, anybody may have made it first."""
    found = folder.stat()
    return found.st_uid == folder.lstat().st_uid == os.geteuid() and not found.st_mode & stat.S_IWOTH


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hecate"


def _sources_digest() -> str:
    digest = hashlib.sha256(f"{platform.python_version()} numba {version('numba')} {version('llvmlite')}".encode())
    for path in sorted(Path(__file__).resolve().parent.rglob("*.py")):
        # numba distrusts a cache whose source has another time of change.
        digest.update(f"{path.name} {path.stat().st_mtime_ns}".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _marker(folder: Path) -> Path:
    """The file that says that all entries are compiled for this kind of processor: machines of several kinds may share a folder."""
    return folder / f"{_processor()}.ready"


@cache
def _processor() -> str:
    llvm: Any = importlib.import_module("llvmlite.binding")

    features = ",".join(f"{name}{on}" for name, on in sorted(llvm.get_host_cpu_features().items()))
    return hashlib.sha256(f"{llvm.get_host_cpu_name()} {features}".encode()).hexdigest()[:16]
