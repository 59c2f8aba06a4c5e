"""The package layout: four top-level folders linked into one package, imports that point one way, nothing that unpickles."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.rooms import ALL_SOURCES, ROOMS, ROOT, imports_of_modules, modules, nodes, sources, under

LINKED = ("configs", "kernels", "launch", "parallel")
OBJECT_COLLECTIVES = {
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}
PICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


EVERYTHING = [*ALL_SOURCES, *sources("tests")]


def files(paths: list[Path]) -> Iterator[tuple[str, tuple[ast.AST, ...]]]:
    """(path below the checkout, nodes) of each file."""
    for path in paths:
        yield str(path.relative_to(ROOT)), nodes(path)


@cache
def imported(path: Path) -> frozenset[str]:
    """Dotted names of all modules that a file imports, anywhere in it; `from a import b` counts as a and a.b."""
    names: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def importing(paths: list[Path], *packages: str) -> dict[str, str]:
    """File -> a module that it imports and that is of `packages`, where there is one."""
    return {str(path.relative_to(ROOT)): name for path in paths for name in imported(path) if under(name, *packages)}


def test_the_sources_are_seen() -> None:
    """Otherwise everything below would pass on an empty list."""
    names = {str(path.relative_to(ROOT)) for path in ALL_SOURCES}
    assert {
        "hecate/__init__.py",
        "parallel/planners/plan.py",
        "kernels/mixlora/torch_path.py",
        "hecate/engine/engine.py",
    } <= names
    assert not any(name.startswith(("hecate/parallel", "hecate/kernels")) for name in names)


@pytest.mark.parametrize("name", LINKED)
def test_a_folder_is_linked_relatively_into_the_package(name: str) -> None:
    link = ROOT / "hecate" / name
    assert link.is_symlink(), f"{link} is no symbolic link"
    assert str(link.readlink()) == f"../{name}"
    assert link.resolve() == (ROOT / name).resolve()


def test_git_holds_the_links_as_links() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    paths = [f"hecate/{name}" for name in LINKED]
    listed = subprocess.run(["git", "ls-files", "-s", *paths], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    modes = {line.split("\t")[1]: line.split()[0] for line in listed.splitlines()}
    assert modes == dict.fromkeys(paths, "120000")


@pytest.mark.parametrize("name", ["kernels", "launch", "parallel"])
def test_a_linked_folder_is_no_package_of_its_own(name: str) -> None:
    """With an __init__.py, Hugging Face's `kernels` package and ours would hide each other in a checkout."""
    assert not (ROOT / name / "__init__.py").exists()


def test_every_folder_of_tests_is_a_package() -> None:
    folders = [ROOT / "tests", *(p for p in (ROOT / "tests").rglob("*") if p.is_dir() and p.name != "__pycache__")]
    missing = [str(f.relative_to(ROOT)) for f in folders if list(f.glob("*.py")) and not (f / "__init__.py").exists()]
    assert not missing, f"no __init__.py in {missing}"


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    return set(output.split())


def test_importing_hecate_imports_nothing_heavy() -> None:
    loaded = modules_after("import hecate, hecate.errors")
    assert "hecate.errors" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "yaml", "omegaconf", "typer", "rich"}


def test_the_planners_need_no_torch() -> None:
    loaded = modules_after("import hecate.parallel.planners, hecate.parallel.values.loads, hecate.parallel.values.layout")
    assert {"hecate.parallel.planners", "numpy"} <= loaded
    assert not loaded & {"torch", "transformers", "ray"}


def test_a_dry_run_and_the_sizes_of_pair_sources_need_no_torch() -> None:
    loaded = modules_after("import hecate.model.sizes.run_shape, hecate.apps.foresee.dry_run")
    assert {"hecate.experts.pairs.sources.plain", "hecate.experts.pairs.sources.nola"} <= loaded
    assert not loaded & {"torch", "transformers", "ray"}


def test_the_configuration_needs_neither_torch_nor_numpy() -> None:
    loaded = modules_after("import hecate.config")
    assert "hecate.config.schema" in loaded
    assert not loaded & {"torch", "transformers", "ray", "numpy"}


@pytest.mark.parametrize(("folder", "other"), [("parallel", "kernels"), ("kernels", "parallel")])
def test_the_lower_folders_know_nothing_above_nor_beside_them(folder: str, other: str) -> None:
    allowed = ("hecate.errors", "hecate.io", f"hecate.{folder}")
    wrong = {}
    for path in sources(folder):
        for name in imported(path):
            foreign = under(name, "transformers", "ray", "megatron", "launch", other)
            if foreign or name.startswith(".") or (under(name, "hecate") and not under(name, *allowed)):
                wrong[str(path.relative_to(ROOT))] = name
    assert not wrong, f"imports against the grain (file: module): {wrong}"


MOST_FILES, MOST_FOLDERS = 14, 15
"""in a folder, its `__init__.py` aside; in `hecate/`, the linked ones aside"""


def test_a_folder_can_be_read_at_a_glance() -> None:
    files_of: dict[Path, int] = {}
    for path in modules().values():
        files_of[path.parent] = files_of.get(path.parent, 0) + (path.name != "__init__.py")
    crowded = {str(folder.relative_to(ROOT)): number for folder, number in files_of.items() if number > MOST_FILES}
    assert not crowded
    assert len({path.parts[len(ROOT.parts) + 1] for path in sources("hecate") if path.parent != ROOT / "hecate"}) <= MOST_FOLDERS


def height(module: str) -> int:
    """The number of a module's room in ROOMS; -1: the package itself."""
    if module == "hecate":
        return -1
    rooms = [number for number, room in enumerate(ROOMS) if under(module, room)]
    assert rooms, f"{module} is in no room: add its folder to ROOMS"
    return max(rooms, key=lambda number: len(ROOMS[number]))


def test_every_import_goes_downwards() -> None:
    upwards = {(name, other) for name, others in imports_of_modules().items() for other in others if height(other) > height(name)}
    assert not upwards, f"imports against the order of ROOMS (module, what it imports): {sorted(upwards)}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(imports_of_modules()).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_class_names_are_unique() -> None:
    places: dict[str, list[str]] = {}
    for name, path in modules().items():
        for node in nodes(path):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(name)
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert not twice, f"a class name with two meanings: {twice}"


SAME_MEANING = {
    "main": "of a program, which `python -m` runs",
    "preload": "of a program that ranks are forked from",
    "train": "a run from its beginning to its end: `hecate.api` of a program that has no ranks yet, `hecate.train.loop` on each rank",
}
"""public functions that several modules may have, because they are the same of each"""


def test_function_names_are_unique() -> None:
    """The verbs of the command line aside, which have the names of what they start."""
    places: dict[str, list[str]] = {}
    for name, path in modules().items():
        if under(name, "hecate.cli"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(name)
    twice = {name: where for name, where in places.items() if len(where) > 1 and name not in SAME_MEANING}
    assert not twice, f"a function name with two meanings: {twice}"


VERBS = ("hecate.cli.answers", "hecate.cli.models", "hecate.cli.forecasts")
"""files whose functions are verbs: typer makes an option of each parameter, and some verbs have many"""


def test_functions_are_short_and_have_few_parameters() -> None:
    """At most 60 lines and 8 parameters. Compiled functions have no values that stand for several."""
    long, many = [], []
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            decorators = " ".join(ast.unparse(one) for one in node.decorator_list)
            if any(compiled in decorators for compiled in ("triton.", "loop", "entry")) or name in VERBS:
                continue
            parameters = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            if len(parameters) - (parameters[:1] in (["self"], ["cls"])) > 8:
                many.append(f"{name}.{node.name}")
            if (node.end_lineno or 0) - node.lineno + 1 > 60:
                long.append(f"{name}.{node.name}")
    assert not long, f"more than 60 lines: {long}"
    assert not many, f"more than 8 parameters: {many}"


def test_every_module_is_named_by_a_test() -> None:
    """In an import, or in a text that a test runs, such as `python -m hecate.launch.ray_job.worker`."""
    tests = [path for path in sources("tests") if path.name not in (Path(__file__).name, "rooms.py")]
    named = set().union(*(imported(path) for path in tests))
    in_texts = {name for path in tests for name in re.findall(r"hecate(?:\.\w+)+", path.read_text(encoding="utf-8"))}
    with_code = {name for name, path in modules().items() if path.name != "__init__.py"}
    missing = with_code - named - in_texts
    assert not missing, f"named by no test: {sorted(missing)}"


def test_nobody_imports_the_linked_folders_bare() -> None:
    wrong = importing(EVERYTHING, "kernels", "parallel", "launch")
    assert not wrong, f"must be hecate.…: {wrong}"


def test_the_trainer_does_not_import_what_launches_it() -> None:
    inside = [path for path in sources("hecate") if not {"cli", "apps"} & set(path.parts)]
    assert not importing(inside, "hecate.launch")


@pytest.mark.parametrize(
    ("folder", "barred"),
    [("hecate", ("testing", "tests", "benchmarks")), ("testing", ("tests", "benchmarks")), ("benchmarks", ("tests",))],
)
def test_tests_and_benchmarks_share_only_testing(folder: str, barred: tuple[str, ...]) -> None:
    assert not importing(sources(*((folder, *LINKED) if folder == "hecate" else (folder,))), *barred)


def test_no_file_of_tests_imports_another() -> None:
    """What several of them need stands in a file of its own, whose name says what it is."""
    found = {path: name for path in sources("tests") for name in imported(path) if is_test_file(name)}
    assert not found


def is_test_file(module: str) -> bool:
    return under(module, "tests") and any(part.startswith("test_") for part in module.split("."))


def test_only_tests_of_benchmarks_import_them() -> None:
    others = [path for path in sources("tests") if not path.is_relative_to(ROOT / "tests" / "benchmarks")]
    assert not importing(others, "benchmarks")


def test_nothing_is_unpickled() -> None:
    wrong = [f"{path}: imports {name}" for path, name in importing(ALL_SOURCES, *PICKLERS).items()]
    wrong += [f"{path}: {name}" for path in ALL_SOURCES for name in imported(path) if name.rpartition(".")[2] in OBJECT_COLLECTIVES]
    for path, found in files(ALL_SOURCES):
        names = {node.attr for node in found if isinstance(node, ast.Attribute)}
        names |= {node.id for node in found if isinstance(node, ast.Name)}
        wrong += [f"{path}: {name}" for name in names & OBJECT_COLLECTIVES]
        for node in found:
            if (
                isinstance(node, ast.Attribute)
                and node.attr == "load"
                and ast.unparse(node) == "torch.load"
                and not path.startswith("hecate/adapters/")
            ):
                wrong.append(f"{path}:{node.lineno}: torch.load")
    assert not wrong, "\n".join(wrong)


def test_no_remote_code_is_run() -> None:
    wrong = []
    for path, found in files(ALL_SOURCES):
        for node in found:
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and not _is_false(node.value):
                wrong.append(f"{path}:{node.value.lineno}")
            is_built = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_config"
            if is_built and not path.startswith("benchmarks/") and not any(word.arg == "trust_remote_code" for word in node.keywords):
                wrong.append(f"{path}:{node.lineno}: says nothing, so transformers asks")
            if isinstance(node, ast.Dict):
                keys = zip(node.keys, node.values, strict=True)
                wrong += [
                    f"{path}:{value.lineno}"
                    for key, value in keys
                    if isinstance(key, ast.Constant) and key.value == "trust_remote_code" and not _is_false(value)
                ]
    assert not wrong, f"trust_remote_code: {wrong}"


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


WRITES_PLAINLY = {
    "hecate/io/durable.py": "it is the room",
    "hecate/checkpoint/save.py": "the rename of a staging folder commits a checkpoint",
    "hecate/checkpoint/file_system.py": "it tries whether a folder can be renamed",
    "hecate/checkpoint/history.py": "a folder is renamed before it is deleted",
    "hecate/data/token_cache.py": "arrays grow beside one another in a staging folder, which `new_folder` renames; they have checksums",
    "hecate/elastic/restart.py": "an error's text for the launcher, in the folder that goes with it; the rank ends at once",
    "hecate/ranks/launcher_files.py": "as hecate/elastic/restart.py",
    "hecate/apps/check/drill/tiny_run.py": "in a folder for temporary files, as all that a drill writes",
    "hecate/apps/check/drill/launchers.py": "as hecate/apps/check/drill/tiny_run.py",
    "hecate/apps/check/drill/cases/losses.py": "as hecate/apps/check/drill/tiny_run.py",
    "hecate/apps/check/drill/program.py": "as hecate/apps/check/drill/tiny_run.py",
    "hecate/apps/check/drill/prove.py": "it takes the one rename of a commit away",
    "hecate/apps/check/drill/cases/resuming.py": "as hecate/apps/check/drill/tiny_run.py",
    "hecate/apps/check/drill/ranks.py": "as hecate/apps/check/drill/tiny_run.py",
    "hecate/apps/check/drill/run.py": "as hecate/apps/check/drill/tiny_run.py",
    "hecate/apps/foresee/plan.py": "a result to whatever path the user names, a pipe among them; the command can be given again",
    "hecate/apps/foresee/report.py": "as hecate/apps/foresee/plan.py",
    "launch/many_runs/processes.py": "what a run prints, as it prints it",
    "launch/run_folder.py": "in the folder for temporary files, read by the process that removes it",
    "launch/ray_job/worker.py": "in a folder for temporary files",
    "parallel/loops/jit.py": "a lock and a log",
}
"""Files outside `hecate/io/durable.py` that write other files themselves, and why that is right."""


READS_PLAINLY = {
    "hecate/io/plain_files.py": "it is the room",
    "hecate/io/durable.py": "folders, for fsync, and files that it writes",
    "hecate/io/one_writer.py": "the run's folder, for its lock",
    "hecate/io/npz.py": "members of an archive that is open",
    "hecate/checkpoint/files.py": "no link is followed within a checkpoint",
    "hecate/adapters/folder.py": "by libraries that take names, after `require_plain`",
    "hecate/adapters/peft/reading.py": "as hecate/adapters/folder.py",
    "hecate/adapters/model_files.py": "what transformers has just written into a staging folder",
    "hecate/apps/federate/server_optimizer.py": "as hecate/adapters/folder.py",
    "hecate/model/files/stored_model.py": "as hecate/adapters/folder.py",
    "hecate/model/files/read_experts.py": "weights whose headers `safetensors_headers` has read",
    "hecate/data/files/indexed_files.py": "as hecate/adapters/folder.py",
    "hecate/data/files/records.py": "gzip, over a file that `open_plain` has opened",
    "hecate/data/token_cache.py": "as hecate/adapters/folder.py, in a cache that is the user's alone; and its lock",
    "launch/many_runs/ledger.py": "a lock",
    "hecate/config/reference.py": "hecate's own source",
    "hecate/model/sizes/run_shape.py": "a preset of hecate's",
    "hecate/apps/federate/rounds.py": "a folder that the rounds have written, copied as it is",
    "hecate/model/files/memory_check.py": "/proc",
    "hecate/apps/check/doctor/software.py": "/proc",
    "launch/profile/probe.py": "/proc and /sys",
    "launch/profile/rank_main.py": "a file that the process has just written in a temporary folder",
    "hecate/ranks/cores.py": "/sys",
    "hecate/ranks/devices.py": "/proc",
    "hecate/ranks/processor.py": "/proc",
    "hecate/ranks/launcher_files.py": "in the launcher's own folder for temporary files",
    "launch/surviving_nodes.py": "as hecate/ranks/launcher_files.py",
    "launch/surviving_ranks.py": "as hecate/ranks/launcher_files.py",
    "launch/job_secret.py": "a token file that it makes",
    "launch/run_folder.py": "/proc",
    "launch/stopped_ranks.py": "/proc",
    "launch/ray_job/cluster.py": "/proc",
    "launch/ray_job/upload.py": "files that were looked at, copied",
    "parallel/loops/jit.py": "hecate's own sources, and machine code in a folder that is the user's alone",
    "kernels/common/launch_config.py": "hecate's own tables of tuned kernels",
}
"""Files outside `hecate/io/plain_files.py` that open other files themselves to read them, and why that is right."""
_LOADERS = ("np.load", "torch.load", "json.load", "yaml.load", "pickle.load")
_READERS = (".read_text", ".read_bytes", "memmap", "load_file", "safe_open", "fromfile", "gzip.open", "copyfile", "copytree", "copy2")


def files_that_call(is_one: Callable[[ast.Call], bool]) -> set[str]:
    """The files of the product with such a call."""
    product = files(sources("hecate", "parallel", "kernels", "launch"))
    return {path for path, found in product for node in found if isinstance(node, ast.Call) and is_one(node)}


def test_files_are_written_by_one_room() -> None:
    """So that a crash leaves the old content or the new one, and a full disk an error that somebody handles."""

    def writes(call: ast.Call) -> bool:
        function = ast.unparse(call.func)
        mode = [ast.unparse(argument).strip("'") for argument in (*call.args, *(given.value for given in call.keywords))]
        opens = function.endswith("open") and any(re.fullmatch("[wax]b?[+]?|r[+]?b[+]|rb?[+]", text) for text in mode)
        return opens or function in ("os.replace", "os.rename") or function.endswith((".write_text", ".write_bytes"))

    writers = files_that_call(writes)
    assert not writers - set(WRITES_PLAINLY), f"write through hecate/io/durable.py: {sorted(writers - set(WRITES_PLAINLY))}"
    assert not set(WRITES_PLAINLY) - writers, f"mended: remove them: {sorted(set(WRITES_PLAINLY) - writers)}"


def test_files_of_users_are_opened_by_one_room() -> None:
    """So that no pipe, device, folder or endless file is waited for or read. The drills damage files and look at them."""

    def reads(call: ast.Call) -> bool:
        function = ast.unparse(call.func)
        mode = [ast.unparse(argument).strip("'") for argument in (*call.args, *(given.value for given in call.keywords))]
        writes = any(re.fullmatch("[wax]b?[+]?|r[+]?b[+]|rb?[+]", text) for text in mode)
        opens = (function == "open" or function.endswith(".open")) and not writes
        by_library = function in _LOADERS or function.endswith(_READERS)
        return (opens or by_library) and function not in ("scalars.read_text", "_load_file")  # of hecate's own

    readers = {path for path in files_that_call(reads) if "/drill/" not in path}
    assert not readers - set(READS_PLAINLY), f"read through hecate/io/plain_files.py: {sorted(readers - set(READS_PLAINLY))}"
    assert not set(READS_PLAINLY) - readers, f"mended: remove them: {sorted(set(READS_PLAINLY) - readers)}"


PRINTS_ITSELF = {
    "hecate/io/terminal.py": "it is the room",
    "launch/forked_rank.py": "it imports the standard library alone, and prints one sentence of its own",
}


def test_everything_is_printed_by_one_room() -> None:
    """So that no text out of somebody's file gives orders to a terminal. Drills print what they have made themselves."""
    ways = ("print", "Console", "rich.print", "typer.echo", "sys.stdout.write", "sys.stderr.write")
    printers = {
        path for path in files_that_call(lambda call: ast.unparse(call.func) in ways) if not path.startswith("hecate/apps/check/drill/")
    }
    assert not printers - set(PRINTS_ITSELF), f"print by hecate/io/terminal.py: {sorted(printers - set(PRINTS_ITSELF))}"
    assert not set(PRINTS_ITSELF) - printers, f"mended: remove them: {sorted(set(PRINTS_ITSELF) - printers)}"
