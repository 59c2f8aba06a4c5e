"""`hecate merge`: the methods by their names, and what is said of the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from hecate.adapters.folder import OLD_WEIGHTS, WEIGHTS, refuse_existing
from hecate.adapters.sets.adapter_set import EXACT, AdapterSet, Merged
from hecate.adapters.sets.by_peft import linear, ties
from hecate.adapters.sets.fewer_experts import fewer_experts
from hecate.adapters.sets.lego import lego
from hecate.adapters.sets.refine import refine
from hecate.adapters.sets.set_files import Written, read_set, write_set
from hecate.adapters.sets.sums import average, stack
from hecate.errors import UserError


def _lego(sets: Sequence[AdapterSet], weights: Sequence[float], *, experts: int | None = None, **options: Any) -> Merged:
    if experts is None:
        return lego(sets, weights, **options)
    if len(sets) > 1 or "reweight" in options:
        what = "reweight" if "reweight" in options else f"{len(sets)} adapters"
        raise UserError(f"experts and {what} were given: the experts of one mixture become fewer, as they are\n  merge first, then shrink")
    return fewer_experts(sets[0], experts, **options)


METHODS: dict[str, tuple[Callable[..., Merged], frozenset[str]]] = {
    "lego": (_lego, frozenset({"rank", "reweight", "experts"})),
    **{op.__name__: (op, frozenset(signature(op).parameters) - {"sets", "weights"}) for op in (stack, average, linear, ties, refine)},
}
"""by the name that `--method` gives: the operation, and its options"""


def merge_adapters(
    folders: Sequence[Path],
    out: Path,
    method: str,
    weights: Sequence[float] | None,
    base: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    **options: Any,
) -> list[str]:
    """Merge adapter folders into the new folder `out`; what the user should know, line by line.

    Args:
        weights: one for each adapter, with the sum 1; None: equal ones.
        base: name or path of their base model; None: the one that each names.
        progress: see `write_set`.
        options: those of the method that were given; None: not given.

    Raises:
        UserError: there is no such method, it has no such option, the adapters cannot be merged so, or a file cannot be read or written.
    """
    refuse_existing(out)
    if method not in METHODS:
        raise UserError(f"--method {method[:100]}: there is no such method\n  methods: {', '.join(METHODS)}")
    op, taken = METHODS[method]
    given = {name: value for name, value in options.items() if value is not None}
    if wrong := [name for name in given if name not in taken]:
        takers = [name for name, (_, others) in METHODS.items() if wrong[0] in others]
        raise UserError(f"--{wrong[0]} was given, which the method {method} does not take\n  it is for {', '.join(takers)}")
    if missing := [folder for folder in folders if not folder.exists()]:
        raise UserError(f"{missing[0]}: no such folder\n  give the folder of a run, or of an adapter")
    if len(folders) == 1 and not {"rank", "experts"} & set(given):
        raise UserError(
            f"{folders[0]}: one adapter alone is what it is\n  name several, or give --rank or --experts, which make it smaller"
        )
    sets = [read_set(folder, base) for folder in folders]
    merged = op(sets, [1 / len(sets)] * len(sets) if weights is None else weights, **given)
    return summary(folders, merged, write_set(merged, out, progress))


def summary(folders: Sequence[Path], merged: Merged, written: Written) -> list[str]:
    """Return what was merged, how far it is from what it stands for, and the sizes of the files, line by line."""
    result, made = merged.result, merged.result.made
    weights = ", ".join(f"{weight:.4g}" for weight in made.get("weights", ()))
    lines = [
        f"{made['method']} of {len(folders)} adapter{'s' * (len(folders) > 1)}{f' with the weights {weights}' * (len(folders) > 1)}, "
        f"{len(result.sizes)} pairs of rank {result.rank}, over {result.description.base_model_name_or_path}"
    ]
    stands_for = "the adapter" if len(folders) == 1 else "the sum of the adapters" if made["method"] == "lego" else "the weighted sum"
    worst = max(written.errors, key=lambda module: written.errors[module])
    errors = sorted(written.errors.values())
    if errors[-1] <= EXACT:
        lines.append(f"exact: {stands_for} to rounding, relative error {errors[-1]:.1e}")
    else:
        median, largest = errors[len(errors) // 2], errors[-1]
        lines.append(f"not exact: relative error against {stands_for} {median:.3g} (median of the pairs), {largest:.3g} in {worst}")
    if "experts" in made:
        lines.append("the routers' rows of experts that became one are means, which is not in the error")
    before = sum((folder / (WEIGHTS if (folder / WEIGHTS).exists() else OLD_WEIGHTS)).stat().st_size for folder in folders)
    lines.append(f"{before:,} bytes of weights became {written.num_bytes:,}")
    return lines
