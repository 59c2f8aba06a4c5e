"""Checks what pairs are made from, before any process of a job starts."""

from __future__ import annotations

from hecate.config import Config
from hecate.errors import UserError
from hecate.experts.pairs.source_table import PAIR_SOURCES


def check_pair_sizes(config: Config, local_ranks: int | None = None) -> None:
    """Check that the model's sizes allow the configured pools, that it has the experts that are to train and a rank can be divided as
    configured, and that this machine has room for the matrices that ranks draw.

    What else is wrong with a model is left to those who load it.

    Args:
        local_ranks: the ranks that this machine will run; None: they run elsewhere.

    Raises:
        UserError: a size or a number does not fit, recorded loads cannot be read, or there is too little free memory.
    """
    lora, source = config.lora, PAIR_SOURCES[config.lora.pairs]
    if lora.experts is not None or lora.hottest_experts is not None or lora.moe_rank_scaling:
        _check_experts(config)
    if source.check_pool is not None:
        _check_pools(config)
    if source.draws and local_ranks is not None:
        _check_room(config, local_ranks)


def _check_experts(config: Config) -> None:
    from hecate.model.sizes.run_shape import base_shape_of

    _, of_model = base_shape_of(config)
    of_model.lora.shape_of_experts(of_model.moe)


def _check_pools(config: Config) -> None:
    from hecate.model.sizes.run_shape import base_shape_of, pool_shapes  # takes seconds to import, which other runs need not wait for

    try:
        base, of_model = base_shape_of(config)
    except UserError:
        return
    pool_shapes(base, of_model)


def _check_room(config: Config, local_ranks: int) -> None:
    """Every rank draws all matrices for itself, and holds them as long as the run lasts."""
    import torch

    from hecate.model.files.memory_check import free_bytes
    from hecate.model.sizes.run_shape import run_shape

    try:
        run = run_shape(config, None, local_ranks)
    except UserError:
        return
    on_gpus = torch.cuda.is_available()
    ranks, free = (1, free_bytes(torch.device("cuda", 0))) if on_gpus else (local_ranks, free_bytes(torch.device("cpu")))
    needed = ranks * run.seeded_parameters * run.master_bytes
    if free is not None and needed > free:
        raise UserError(
            f"lora.pairs: {config.lora.pairs}: the matrices that are drawn for pairs take {needed / 1e9:.1f} GB for {ranks} ranks, "
            f"{(needed - free) / 1e9:.1f} GB more than {'a GPU' if on_gpus else 'this machine'} has free\n"
            "  lower lora.r or, with nola, lora.nola.bases; or start fewer ranks on this machine"
        )
