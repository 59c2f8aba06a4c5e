"""What a configuration takes from a base model that has experts itself: their numbers, and the hottest of them by recorded loads."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hecate.config.schema import Config
from hecate.errors import UserError
from hecate.parallel.values.units import Unit


def with_experts_of_model(config: Config, experts_per_layer: tuple[int, ...], top_k: int) -> Config:
    """Return the configuration with the numbers of the model, and the hottest experts by their numbers.

    Args:
        experts_per_layer: of each decoder layer; 0: it has none.

    Raises:
        UserError: the configuration gives other numbers, or experts that do not exist; or loads cannot be read, or are of another model.
    """
    moe, lora = config.moe.of_model(experts_per_layer, top_k), config.lora
    if lora.hottest_experts is not None:
        assert lora.loads is not None
        found = hottest_experts(Path(lora.loads), lora.hottest_experts, experts_per_layer)
        lora = replace(lora, experts=found, hottest_experts=None, loads=None)
    if lora.experts is not None:
        _check_chosen(lora.experts, experts_per_layer)
    return replace(config, moe=moe, lora=lora)


def hottest_experts(loads: Path, number: int, experts_per_layer: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return the experts of each decoder layer to which most tokens went, ascending; nothing for a layer without experts.

    Args:
        loads: a folder or a file that `hecate.parallel.values.traces.load_trace` reads.
        number: how many of each layer; of experts with equal loads those with lower numbers.

    Raises:
        UserError: the loads cannot be read, or are of other layers or experts; or a layer has fewer experts.
    """
    import numpy as np  # which most runs' launchers do not need

    from hecate.parallel.values.traces import load_trace

    try:
        trace = load_trace(loads)
    except UserError as error:
        raise UserError(f"lora.loads: {error}\n  give the folder loads of a run with trace: true") from error
    recorded = dict(zip(trace.units, trace.num_experts, strict=True))
    own = {Unit(layer): experts for layer, experts in enumerate(experts_per_layer) if experts}
    if recorded != own:
        raise UserError(
            f"lora.loads: {loads} has the loads of {_in_words(recorded)}, but the model has {_in_words(own)}\n"
            "  give the loads of a run over the same base model"
        )
    if number > (fewest := min(recorded.values())):
        raise UserError(f"lora.hottest_experts: {number}, but the model has layers of {fewest} experts\n  give {fewest} or less")
    total_LE = trace.loads.sum((0, 3), dtype=np.int64)
    chosen: list[tuple[int, ...]] = [()] * len(experts_per_layer)
    for unit, total_E in zip(trace.units, total_LE, strict=True):
        of_layer = total_E[: recorded[unit]]
        chosen[unit.layer] = tuple(sorted(np.argsort(-of_layer, kind="stable")[:number].tolist()))
    return tuple(chosen)


def _in_words(experts: Mapping[Unit, int]) -> str:
    units, counts = list(experts), sorted(set(experts.values()))
    return f"{len(units)} layers ({units[0]} to {units[-1]}) of {' or '.join(map(str, counts))} experts"


def _check_chosen(chosen: Sequence[int | tuple[int, ...]], experts_per_layer: Sequence[int]) -> None:
    """Raises UserError: an expert that does not exist, or lists that are not as many as the model has layers."""
    listed = [one for one in chosen if isinstance(one, tuple)]
    if listed and len(listed) != len(experts_per_layer):
        raise UserError(
            f"lora.experts: has lists for {len(listed)} layers, but the model has {len(experts_per_layer)} decoder layers\n"
            "  give one for each, [] for a layer without experts; or one list of numbers for all"
        )
    flat = tuple(one for one in chosen if isinstance(one, int))
    for layer, count in enumerate(experts_per_layer):
        of_layer = listed[layer] if listed else flat if count else ()
        if bool(count) != bool(of_layer):
            what = f"lora.experts[{layer}]: is {list(of_layer)}, but layer {layer} of the model has {count} experts"
            raise UserError(f"{what}\n  give {'one of them at least' if count else '[]'}")
        if of_layer and max(of_layer) >= count:
            what = f"lora.experts: {max(of_layer)}, but layer {layer} of the model has {count} experts"
            raise UserError(f"{what}\n  give numbers from 0 to {count - 1}")
