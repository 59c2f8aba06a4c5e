"""How numba compiles the planner's loops, and where it keeps what it has compiled (for `jit`, which loads this file late).

Three things differ from numba's own way, and all only by what its classes may override:

- numba optimises a function with all that it calls, and then again as a part of each function that calls it, so that what lies five calls
  deep is optimised six times. Here a loop is only translated, and optimised once, as a part of each entry.
- numba optimises for long loops over long arrays, in two rounds. The planner's loops are short: nothing is made into vector instructions or
  unrolled, and only small functions are put where they are called, which leaves less machine code and is as fast.
- numba's cache belongs to one path of the source and its time of change. Here it belongs to the content of the sources, which the name of
  the folder says, so that all copies of the same sources find the same machine code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]
import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator
from numba.core.codegen import JITCodeLibrary
from numba.core.registry import cpu_target
from numba.extending import register_jitable

_OPTIONS: dict[str, Any] = {"error_model": "numpy", "no_cfunc_wrapper": True}
"""numba's options for loops and entries, which no C program calls"""
_WRAPPER = "_ZN7cpython"
"""how the names of the functions begin by which Python calls compiled ones"""
_INLINED = 50
"""the cost, about in instructions, up to which a function becomes a part of those that call it; LLVM's own is 225"""


class NoMachineCode(Exception):
    """A file of machine code is missing or damaged."""


def register_loop(function: Callable[..., Any]) -> None:
    """Let compiled functions call a function."""
    register_jitable(**_OPTIONS)(function)


def dispatcher(function: Callable[..., Any], folder: Path, *, compiles: Callable[[], bool]) -> Any:
    """numba's compiled function, which it keeps in a folder.

    Args:
        compiles: says whether what is not in the folder is compiled now; else a call raises `NoMachineCode`.
    """
    register_loop(function)

    # numba compiles what functions with other options call once more for each kind of caller: only this one differs from the loops.
    def entry(*args: Any) -> Any:
        return function(*args)

    compiled: Any = numba.njit(entry, nogil=True, **_OPTIONS)
    compiled._cache = _cache(entry, f"{function.__module__}.{function.__qualname__}", folder, compiles=compiles)
    return compiled


@contextmanager
def optimising_entries_alone() -> Iterator[None]:
    """Compile during the block without optimising the functions that entries call before they are parts of these."""
    cpu_target.target_context.refresh()  # compiles what numba itself needs
    codegen = cpu_target.target_context.codegen()

    class Library(JITCodeLibrary):
        def _python_calls_it(self) -> bool:
            if self._shared_module is not None:  # it was loaded from the folder, where only entries are
                return True
            return any(function.name.startswith(_WRAPPER) for function in self._final_module.functions)

        def _optimize_functions(self, module: Any) -> None:
            module.data_layout = codegen._data_layout
            passes, builder = codegen._function_pass_manager(opt=1)
            for function in module.functions:
                if not function.is_declaration:
                    passes.run(function, builder)

        def _optimize_final_module(self) -> None:
            if self._python_calls_it():
                builder = llvm.create_pass_builder(codegen._tm, _tuning())
                passes = builder.getModulePassManager()
                passes.add_refprune_pass()
                passes.run(self._final_module, builder)

        def _finalize_final_module(self) -> None:
            if self._python_calls_it():
                super()._finalize_final_module()
            else:
                self._finalize_dynamic_globals()
                self._finalized = True

    def set_env(name: str, environment: Any) -> None:
        if codegen._engine.is_symbol_defined(name):
            type(codegen).set_env(codegen, name, environment)

    codegen._library_class, codegen.set_env = Library, set_env
    try:
        yield
    finally:
        del codegen._library_class, codegen.set_env


def _tuning() -> Any:
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    options.inlining_threshold = _INLINED
    return options


def _cache(entry: Callable[..., Any], name: str, folder: Path, *, compiles: Callable[[], bool]) -> Any:
    class Locator(_CacheLocator):
        _py_file, _lineno = entry.__code__.co_filename, entry.__code__.co_firstlineno

        @classmethod
        def from_function(cls, py_func: Any, py_file: str) -> Any:
            return cls()

        def get_cache_path(self) -> str:
            return str(folder)

        def get_source_stamp(self) -> str:
            return folder.name

        def get_disambiguator(self) -> str:
            return name

    class Implementation(CompileResultCacheImpl):
        _locator_classes: Any = (Locator,)

    class Cache(FunctionCache):
        _impl_class = Implementation

        def _index_key(self, sig: Any, codegen: Any) -> Any:
            return sig, codegen.magic_tuple()  # the types and the processor; numba adds the code, and with it paths

        def load_overload(self, sig: Any, target_context: Any) -> Any:
            try:
                found = super().load_overload(sig, target_context)
            except Exception as error:
                if compiles():
                    return None
                raise NoMachineCode(name) from error
            if found is None and not compiles():
                raise NoMachineCode(name)
            return found

    return Cache(entry)
