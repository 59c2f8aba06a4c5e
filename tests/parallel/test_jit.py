"""Machine code once for each machine: who compiles, who waits, and what happens meanwhile. Each test has a cache of its own."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hecate.parallel import jit

pytestmark = pytest.mark.skipif(not jit.can_compile(), reason="numba is not installed")

PROGRAM = """
import sys
from hecate.parallel import jit
jit._COMPILER_MODULE = "{compiler}"
said = []
from tests.parallel.slow_compiler import twice
jit.say_with(said.append)
"""


def run(program: str, cache: Path, *, compiler: str = "tests.parallel.slow_compiler") -> str:
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": root}
    whole = PROGRAM.format(compiler=compiler) + program
    done = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plain_python_goes_on_while_another_process_compiles(tmp_path: Path) -> None:
    program = """
assert twice(3.0) == 6.5 and jit._process.state == "compiling", jit._process.state
assert len(said) == 1 and "in the background" in said[0], said
assert jit.waited_seconds() == 0.0
jit._process.plain_seconds = 6.0  # much, but little of the time
jit._process.compiling_since -= 60.0
assert twice(3.0) == 6.5 and jit._process.state == "compiling" and jit.waited_seconds() == 0.0
jit._process.compiler.wait()
assert twice(3.0) == 6.5 and jit._process.state == "ready"
assert twice.machine_code.signatures
"""
    run(program, tmp_path)
    assert len(list(tmp_path.glob("loops-*/*.ready"))) == 1


def test_the_second_process_neither_compiles_nor_says_anything(tmp_path: Path) -> None:
    run("twice(1.0); jit._process.compiler.wait()", tmp_path)
    run("assert twice(1.0) == 2.5 and jit._process.state == 'ready' and jit._process.compiler is None and not said", tmp_path)


def test_one_of_several_processes_compiles(tmp_path: Path) -> None:
    program = """
import subprocess
other = subprocess.run([sys.executable, "-c", OTHER], check=True)
jit._process.compiler.wait()
"""
    other = PROGRAM.format(compiler="tests.parallel.slow_compiler")
    other += "twice(1.0); assert jit._process.state == 'compiling' and jit._process.compiler is None"
    run(f"OTHER = {other!r}" + program, tmp_path)


def test_who_has_done_enough_in_plain_python_waits_and_says_so(tmp_path: Path) -> None:
    program = """
jit._process.plain_seconds = 1e9
assert twice(3.0) == 6.5 and jit._process.state == "ready"
assert jit.waited_seconds() > 0 and "waiting" in said[-1], said
"""
    run(program, tmp_path)


def test_a_compiler_that_fails_leaves_plain_python_and_says_where_to_look(tmp_path: Path) -> None:
    program = """
jit._process.plain_seconds = 1e9
assert twice(3.0) == 6.5 and jit._process.state == "plain"
assert "compiler.log" in said[-1], said
"""
    run(program, tmp_path, compiler="tests.parallel.no_such_module")


def test_without_numba_all_is_plain(tmp_path: Path) -> None:
    run("", tmp_path)
    program = "import sys; sys.modules['numba'] = None\nfrom hecate.parallel import jit\nassert jit.start_compiling() == 'plain'"
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)})


def test_machine_code_lies_in_the_users_cache_where_the_source_cannot_be_written(tmp_path: Path) -> None:
    program = """
from pathlib import Path
import tempfile
real = tempfile.TemporaryFile
def only_outside(dir):
    if "__pycache__" in str(dir):
        raise PermissionError("read-only")
    return real(dir=dir)
tempfile.TemporaryFile = only_outside
from hecate.parallel import jit
print(jit._folder())
"""
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"} | {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert Path(done.stdout.strip()).parent == tmp_path / "hecate"


def test_machine_code_of_others_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "loops"))
    find = jit._folder.__wrapped__
    folder = find()
    assert folder is not None
    assert stat.S_IMODE((tmp_path / "loops").stat().st_mode) == 0o700
    folder.chmod(0o777)
    assert find() is None
    folder.chmod(0o700)
    assert find() == folder
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)  # the folder is another user's then
    assert find() is None
    monkeypatch.undo()
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/tmp")  # anybody can put a folder of that name there first
    assert find() is None


def test_the_compiler_compiles_every_entry() -> None:
    """With the real compiler, whose machine code all tests use: afterwards nothing is left to compile."""
    program = """
import time
from hecate.parallel import jit
while jit.start_compiling() == "compiling":
    time.sleep(0.5)
assert jit.start_compiling() == "ready"
import numba.core.event as event
from tests.parallel.planners.auto_inputs import planned_and_priced
with event.install_recorder("numba:compile") as compiled:
    planned_and_priced()
assert not compiled.buffer, [one.data["dispatcher"].py_func.__name__ for _, one in compiled.buffer]
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)
