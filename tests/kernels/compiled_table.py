"""What the kernels of `layer_cases` compile to, as a table: `compiled.json`, for each triton version, kind of GPU and kernel.

    python -m tests.kernels.compiled_table --write            all layers, into the table, for the triton at hand
    python -m tests.kernels.compiled_table --write --add      only what the table lacks: after a change of configurations, not of kernels
    python -m tests.kernels.compiled_table                    prints their rows as JSON
    python -m tests.kernels.compiled_table --spread           those of `SPREAD` only
    python -m tests.kernels.compiled_table --names            which kernels all layers launch; compiles nothing

A row of the table: registers of a thread, bytes of stack (0: nothing is spilled), bytes of shared memory of a program, and how many
instructions of each kind (`tests.kernels.ahead_of_time.KINDS`) stand in the code.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import triton
from torch import Tensor

from hecate.kernels.common.kernel_launch import Launch
from hecate.kernels.common.launch_config import meta_tensors_are_on
from tests.kernels.ahead_of_time import MAX_SHARED, SMS, compiling_for, machine_code
from tests.kernels.layer_cases import CASES, SPREAD

TABLE = Path(__file__).with_name("compiled.json")
Rows = dict[str, dict[str, dict[str, Any]]]
"""by GPU ("sm_90"), then by kernel (`label`)"""


def label(launch: Launch) -> str:
    """The kernel, what of it a reader wants to know, and a hash of all that its code depends on."""
    constants = [f"{name}={value}" for name, value in sorted(launch.constants.items()) if value is not False]
    alike = launch.kernel.do_not_specialize
    args = {name: "any int" if name in alike else _specialization(value) for name, value in launch.args.items()}
    everything = {**args, **launch.constants}
    types = dict.fromkeys(kind for kind in map(_specialization, launch.args.values()) if kind.startswith(("float", "bfloat")))
    parts = [*types, *constants, f"warps={launch.num_warps}", f"stages={launch.num_stages}"]
    return f"{launch.kernel.__name__}: {' '.join(parts)} {hashlib.sha256(repr(sorted(everything.items())).encode()).hexdigest()[:6]}"


def _specialization(value: Any) -> str:
    """What triton compiles for: types, and of integers whether they are 1 or multiples of 16, unless the kernel asks not to."""
    if isinstance(value, Tensor):
        return str(value.dtype).removeprefix("torch.")
    if isinstance(value, int):
        return "1" if value == 1 else "multiple of 16" if value % 16 == 0 else "int"
    return type(value).__name__


def launches_of(layers: Mapping[int, Iterable[str]]) -> dict[str, dict[str, Launch]]:
    """By GPU and kernel: what these layers, given by sm number, launch."""
    found = {}
    for sm, names in layers.items():
        with meta_tensors_are_on(sm):
            launches = {label(launch): launch for name in names for launch in CASES[name].launches()}
        found[f"sm_{sm}"] = {name: launches[name] for name in sorted(launches)}
    return found


def compiled(launches: Mapping[str, Mapping[str, Launch]]) -> Rows:
    """The rows of what `launches_of` found."""
    rows: Rows = {}
    for gpu, kernels in launches.items():
        with compiling_for(int(gpu.removeprefix("sm_"))):
            rows[gpu] = {name: _row(launch) for name, launch in kernels.items()}
    return rows


def complaints(rows: Rows) -> list[str]:
    """Kernels that spill or do not fit."""
    found = []
    for gpu, kernels in rows.items():
        for name, row in kernels.items():
            if row["stack"] or "LDL" in row or "STL" in row:
                found.append(f"{gpu}: {name} spills: {row}")
            if row["shared"] > MAX_SHARED[int(gpu.removeprefix("sm_"))]:
                found.append(f"{gpu}: {name} needs {row['shared']} bytes of shared memory, more than a program can have")
            if "ATOM" in row or "RED" in row:
                found.append(f"{gpu}: {name} has atomics, so its sums may come in any order: {row}")
    return found


def read_table() -> dict[str, Rows]:
    """By triton version."""
    return json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}


def write_table(table: Mapping[str, Rows]) -> None:
    """One kernel a line, so that a change can be read."""
    lines = ["{"]
    for version in sorted(table):
        lines.append(f" {json.dumps(version)}: {{")
        for gpu, kernels in table[version].items():
            rows = ",\n".join(f"   {json.dumps(name)}: {json.dumps(row)}" for name, row in kernels.items())
            lines += [f"  {json.dumps(gpu)}: {{", rows, "  },"]
        lines[-1] = "  }"
        lines.append(" },")
    lines[-1] = " }"
    TABLE.write_text("\n".join([*lines, "}", ""]), encoding="utf-8")


def _row(launch: Launch) -> dict[str, Any]:
    code = machine_code(launch)
    return {"registers": code.registers, "stack": code.stack, "shared": code.shared, **code.instructions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--write", "--add", "--spread", "--names"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args()
    launches = launches_of(SPREAD if options.spread else dict.fromkeys(SMS, CASES))
    if options.names:
        print(json.dumps({gpu: list(kernels) for gpu, kernels in launches.items()}))
        return
    known: Rows = read_table().get(triton.__version__, {}) if options.add else {}
    lacking = {gpu: {name: each for name, each in kernels.items() if name not in known.get(gpu, {})} for gpu, kernels in launches.items()}
    found = compiled(lacking)
    rows = {gpu: {name: found[gpu].get(name) or known[gpu][name] for name in kernels} for gpu, kernels in launches.items()}
    if options.write:
        write_table({**read_table(), triton.__version__: rows})
        print(f"{sum(map(len, rows.values()))} kernels of triton {triton.__version__}")
        print("\n".join(complaints(rows)) or "none spills")
    else:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
