"""Read a sweep, which lists many models, clusters and workloads to simulate, from a YAML file. See docs/use/simulator.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hecate.apps.foresee.cases import Case, Options, chosen_names, chosen_policies, known_plan, known_route, synthetic_cases
from hecate.errors import UserError
from hecate.io.plain_files import read_plain_text
from hecate.io.strict_yaml import MOST_BYTES, YamlError, parse_yaml
from hecate.parallel.cost.cost_model import HISTORY, ExecutionMode, PlanMode
from hecate.parallel.simulate.workloads import WORKLOADS

_TOP = (
    *("policies", "steps", "run_steps", "seed", "plan", "rematerialize", "prefetch", "micro_steps", "route", "max_imbalance", "shard_size"),
    "runs",
)
_MOST = 10**9
_RUN = ("topologies", "models", "workloads", "tokens_per_rank", "experts")


def load_sweep(path: Path) -> tuple[list[Case], Options]:
    """Return the cases of a sweep, which combine every topology of a run with each of its models and workloads, and its options.

    Raises:
        UserError: the file cannot be read, a key is missing or unknown, a value is out of range, or a name is unknown.
    """
    try:
        raw = parse_yaml(read_plain_text(path, MOST_BYTES))
    except (OSError, UnicodeDecodeError, YamlError) as error:
        raise UserError(f"{path}: cannot be read as a sweep: {error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("runs"), list) or not raw["runs"]:
        raise UserError(f"{path}: a sweep is a mapping with the list `runs`; it may have {', '.join(_TOP[:-1])}")
    _only_known(raw, _TOP, str(path))
    execution, choose_modes = _execution(raw, str(path))
    options = Options(
        policies=chosen_policies(_list(raw, "policies", str(path)), f"{path}.policies") if "policies" in raw else Options.policies,
        steps=_count(raw, "steps", str(path), Options.steps),
        run_steps=_count(raw, "run_steps", str(path), Options.run_steps),
        seed=_count(raw, "seed", str(path), Options.seed, least=0),
        execution=execution,
        choose_modes=choose_modes,
        max_imbalance=_max_imbalance(raw, str(path)),
        shard_size=_count(raw, "shard_size", str(path), 1) if "shard_size" in raw else None,
    )
    cases: list[Case] = []
    for number, run in enumerate(raw["runs"]):
        where = f"{path}: runs[{number}]"
        if not isinstance(run, dict) or "topologies" not in run or "models" not in run:
            raise UserError(f"{where}: a run has the lists topologies and models, and may have {', '.join(_RUN[2:])}")
        _only_known(run, _RUN, where)
        workloads = _names(run, "workloads", tuple(WORKLOADS), where)
        tokens = _count(run, "tokens_per_rank", where, 8192)
        experts = _count(run, "experts", where, 1) if "experts" in run else None
        for topology in _list(run, "topologies", where):
            for model in _list(run, "models", where):
                try:
                    cases += synthetic_cases(topology, model, workloads, tokens, experts)
                except UserError as error:
                    raise UserError(f"{where}: {error}") from None
    return cases, options


def _only_known(mapping: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = sorted(str(key) for key in mapping if key not in known)
    if unknown:
        raise UserError(f"{where}: unknown: {', '.join(unknown)[:300]}\n  there are {', '.join(known)}")


def _list(mapping: dict[str, Any], key: str, where: str) -> list[str]:
    value = mapping[key]
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values or not all(isinstance(name, str) for name in values):
        raise UserError(f"{where}.{key}: must be a name or a list of names, got {repr(value)[:100]}")
    return values


def _names(mapping: dict[str, Any], key: str, known: tuple[str, ...], where: str) -> tuple[str, ...]:
    return chosen_names(_list(mapping, key, where), known, f"{where}.{key}") if key in mapping else known


def _count(mapping: dict[str, Any], key: str, where: str, default: int, least: int = 1) -> int:
    value = mapping.get(key, default)
    if type(value) is not int or not least <= value <= _MOST:
        raise UserError(f"{where}: {key} must be an integer from {least} to {_MOST}, got {repr(value)[:60]}")
    return value


def _flag(mapping: dict[str, Any], key: str, where: str) -> bool:
    value = mapping.get(key, False)
    if type(value) is not bool:
        raise UserError(f"{where}: {key} must be true or false, got {repr(value)[:60]}")
    return value


def _execution(mapping: dict[str, Any], where: str) -> tuple[ExecutionMode, tuple[PlanMode, ...]]:
    """`Options.execution` and `Options.choose_modes`."""
    prefetch = _count(mapping, "prefetch", where, HISTORY.prefetch, least=0)
    plan, choose_modes = known_plan(mapping.get("plan", HISTORY.plan), prefetch, f"{where}: plan")
    execution = ExecutionMode(
        plan=plan,
        rematerialize=_flag(mapping, "rematerialize", where),
        prefetch=prefetch,
        micro_steps=_count(mapping, "micro_steps", where, HISTORY.micro_steps),
        route=known_route(mapping.get("route", HISTORY.route), f"{where}: route"),
    )
    return execution, choose_modes


def _max_imbalance(mapping: dict[str, Any], where: str) -> float | None:
    value = mapping.get("max_imbalance")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= _MOST:
        raise UserError(f"{where}: max_imbalance must be a number >= 1, got {repr(value)[:60]}")
    return float(value)
