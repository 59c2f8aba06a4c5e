"""Machine code once for each machine: who compiles, who waits, and what happens meanwhile. Each test has a cache of its own."""

from __future__ import annotations

import ast
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hecate.parallel.loops import jit

pytestmark = pytest.mark.skipif(not jit.can_compile(), reason="numba is not installed")

PROGRAM = """
import sys
from hecate.parallel.loops import jit
jit._COMPILER_MODULE = "{compiler}"
jit._process.idle = False  # an idle compiler may get no processor beside other tests
said = []
from tests.parallel.slow_compiler import twice
jit.say_with(said.append)
"""


ROOT = Path(__file__).resolve().parents[3]


def run(program: str, cache: Path, *, compiler: str = "tests.parallel.slow_compiler", root: Path = ROOT) -> str:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(root)}
    whole = PROGRAM.format(compiler=compiler) + program
    done = subprocess.run(
        [sys.executable, "-c", whole], capture_output=True, text=True, check=False, env=environment, cwd=root, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_short_run_compiles_nothing(tmp_path: Path) -> None:
    """A run that spends less on plain Python than compiling costs starts no compiler; the first call after that does, and says so."""
    program = """
jit._process.plain_seconds = 0.9 * jit.COMPILING_SECONDS
assert twice(3.0) == 6.5 and jit._process.state == "unknown" and jit._process.compiler is None and not said
jit._process.plain_seconds = jit.COMPILING_SECONDS
assert twice(3.0) == 6.5 and jit._process.state == "compiling" and jit._process.compiler is not None
jit._process.compiler.wait()
"""
    run(program, tmp_path)


def test_plain_python_goes_on_while_another_process_compiles(tmp_path: Path) -> None:
    program = """
jit._process.plain_seconds = jit.COMPILING_SECONDS
assert twice(3.0) == 6.5 and jit._process.state == "compiling", jit._process.state
assert len(said) == 1 and "in the background" in said[0], said
assert jit.waited_seconds() == 0.0
jit._process.plain_seconds += 6.0  # much, but little of the time
jit._process.compiling_since -= 60.0
assert twice(3.0) == 6.5 and jit._process.state == "compiling" and jit.waited_seconds() == 0.0
jit._process.compiler.wait()
assert twice(3.0) == 6.5 and jit._process.state == "ready"
assert twice.machine_code.signatures
"""
    run(program, tmp_path)
    assert len(list(tmp_path.glob("loops-*/*.ready"))) == 1


def test_the_compiler_is_idle_until_somebody_waits(tmp_path: Path) -> None:
    program = """
import os
jit._process.idle = True
jit.start_compiling()
idle = jit._process.compiler
assert os.sched_getscheduler(idle.pid) == os.SCHED_IDLE
jit._process.plain_seconds = 1e9
started = []
start = jit._start_compiler
def noting(folder):
    compiler = start(folder)
    started.append(os.sched_getscheduler(compiler.pid))
    return compiler
jit._start_compiler = noting
assert twice(3.0) == 6.5 and jit._process.state == "ready"
assert idle.returncode and started == [os.SCHED_OTHER], (idle.returncode, started)
"""
    run(program, tmp_path)


def test_who_waits_is_not_kept_by_the_idle_compiler_of_another_process(tmp_path: Path) -> None:
    program = """
import fcntl
jit._process.idle = True
folder = jit.code_folder()
lock = (folder / "idle.lock").open("w")
fcntl.flock(lock, fcntl.LOCK_EX)  # as a compiler does that never gets a processor
jit.start_compiling()
assert jit._process.state == "compiling" and jit._process.compiler is None
jit._process.plain_seconds = 1e9
assert twice(3.0) == 6.5 and jit._process.state == "ready"
"""
    run(program, tmp_path)


def test_who_has_waited_long_enough_goes_on_and_takes_what_comes_later(tmp_path: Path) -> None:
    program = """
jit._PATIENCE = 0.1
jit.start_compiling()
jit._process.plain_seconds = 1e9
assert twice(3.0) == 6.5 and jit._process.state == "compiling"
waited = jit.waited_seconds()
assert twice(3.0) == 6.5 and jit.waited_seconds() == waited > 0
jit._process.compiler.wait()
assert twice(3.0) == 6.5 and jit._process.state == "ready"
"""
    run(program, tmp_path)


def test_the_second_process_neither_compiles_nor_says_anything(tmp_path: Path) -> None:
    run("jit.compile_and_wait()", tmp_path)
    run(USES_WHAT_IS_THERE, tmp_path)


USES_WHAT_IS_THERE = """
import numba.core.event as event
with event.install_recorder("numba:run_pass") as compiled:
    assert twice(1.0) == 2.5 and jit._process.state == "ready" and jit._process.compiler is None and not said
assert not compiled.buffer and twice.machine_code.stats.cache_hits
print(jit.code_folder())
"""


def test_a_compiler_goes_on_where_another_one_was_stopped(tmp_path: Path) -> None:
    """An entry was compiled, but not all of them: a second compiler loads it."""
    run("jit.compile_and_wait()", tmp_path)
    (mark,) = tmp_path.glob("loops-*/*.ready")
    mark.unlink()
    run("assert jit.compile_and_wait() == 'ready' and len(said) == 2, said", tmp_path)
    run(USES_WHAT_IS_THERE, tmp_path)


def test_copies_of_the_sources_share_machine_code(tmp_path: Path) -> None:
    """Two copies at two paths with other times of change: what one has compiled, the other one finds. Another source finds nothing."""
    roots = []
    for name in ("checkout", "wheel"):
        root = tmp_path / name
        (root / "hecate").mkdir(parents=True)
        (root / "hecate" / "__init__.py").touch()
        shutil.copytree(ROOT / "parallel", root / "hecate" / "parallel", copy_function=shutil.copyfile)
        (root / "tests" / "parallel").mkdir(parents=True)
        shutil.copyfile(ROOT / "tests" / "parallel" / "slow_compiler.py", root / "tests" / "parallel" / "slow_compiler.py")
        roots.append(root)
    cache = tmp_path / "cache"
    run("assert jit.compile_and_wait() == 'ready'", cache, root=roots[0])
    run(USES_WHAT_IS_THERE, cache, root=roots[1])
    changed = roots[1] / "hecate" / "parallel" / "cost" / "cost_loops.py"
    changed.write_text(changed.read_text().replace("ROUNDING = 1e-9", "ROUNDING = 1e-8"))
    run("assert twice(1.0) == 2.5 and jit._process.state == 'unknown'", cache, root=roots[1])


@pytest.mark.parametrize("length", [pytest.param(0, marks=pytest.mark.slow), 100, pytest.param(None, marks=pytest.mark.slow)])
def test_damaged_machine_code_is_made_anew(tmp_path: Path, length: int | None) -> None:
    """Files that are cut, or were removed by whoever cleans folders for temporary files."""
    run("jit.compile_and_wait()", tmp_path)
    (code,) = tmp_path.glob("loops-*/*.nbc")
    if length is None:
        code.unlink()
    else:
        code.write_bytes(code.read_bytes()[:length])
    program = """
from hecate.parallel.loops.machine_code import NoMachineCode
try:
    twice.machine_code(1.0)
except NoMachineCode:
    assert twice(1.0) == 2.5 and jit._process.state == "unknown"
    assert jit.compile_and_wait() == "ready"
else:
    raise AssertionError
"""
    run(program, tmp_path)
    run(USES_WHAT_IS_THERE, tmp_path)


def test_the_folders_name_says_every_source_that_machine_code_is_made_of() -> None:
    """No constant or function that a loop uses comes from a source without loops, which the name does not say."""
    folder, wrong = ROOT / "parallel", []
    for path in jit.sources():
        if path.name in jit._COMPILING:
            continue
        tree = ast.parse(path.read_text())
        foreign = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hecate."):
                source = folder / (node.module.removeprefix("hecate.parallel.").replace(".", "/") + ".py")
                if source not in jit.sources():
                    foreign |= {name.asname or name.name for name in node.names}
        for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
            if {ast.unparse(one).rpartition(".")[2] for one in function.decorator_list} & {"loop", "entry"}:
                used = {node.id for part in function.body for node in ast.walk(part) if isinstance(node, ast.Name)}
                wrong += [f"{path.name}: {function.name} uses {name}" for name in used & foreign]
    assert not wrong, wrong


def test_one_of_several_processes_compiles(tmp_path: Path) -> None:
    program = """
import subprocess
jit.start_compiling()
other = subprocess.run([sys.executable, "-c", OTHER], check=True)
jit._process.compiler.wait()
"""
    other = PROGRAM.format(compiler="tests.parallel.slow_compiler")
    other += "jit.start_compiling(); assert twice(1.0) == 2.5 and jit._process.state == 'compiling' and jit._process.compiler is None"
    run(f"OTHER = {other!r}" + program, tmp_path)


def test_who_has_done_enough_in_plain_python_waits_and_says_so(tmp_path: Path) -> None:
    program = """
jit.start_compiling()
jit._process.plain_seconds = 1e9
assert twice(3.0) == 6.5 and jit._process.state == "ready"
assert jit.waited_seconds() > 0 and "waiting" in said[-1], said
"""
    run(program, tmp_path)


def test_a_compiler_that_fails_leaves_plain_python_and_says_where_to_look(tmp_path: Path) -> None:
    program = """
jit.start_compiling()
jit._process.plain_seconds = 1e9
assert twice(3.0) == 6.5 and jit._process.state == "plain"
assert "compiler.log" in said[-1], said
"""
    run(program, tmp_path, compiler="tests.parallel.no_such_module")


def test_without_numba_all_is_plain(tmp_path: Path) -> None:
    run("", tmp_path)
    program = "import sys; sys.modules['numba'] = None\nfrom hecate.parallel.loops import jit\nassert jit.start_compiling() == 'plain'"
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)})


def test_machine_code_lies_in_the_users_cache(tmp_path: Path) -> None:
    program = "from hecate.parallel.loops import jit; print(jit.code_folder())"
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"} | {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert Path(done.stdout.strip()).parent == tmp_path / "hecate"


def test_machine_code_of_others_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "loops"))
    find = jit.code_folder.__wrapped__
    folder = find()
    assert folder is not None
    assert stat.S_IMODE((tmp_path / "loops").stat().st_mode) == 0o700
    for mode in (0o777, 0o770):  # all, and the members of the group
        folder.chmod(mode)
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
from hecate.parallel.loops import jit
assert jit.compile_and_wait() == "ready"
import numba.core.event as event
from tests.parallel.planners.auto_inputs import planned_and_priced
with event.install_recorder("numba:compile") as compiled:
    planned_and_priced()
assert not compiled.buffer, [one.data["dispatcher"].py_func.__name__ for _, one in compiled.buffer]
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)
