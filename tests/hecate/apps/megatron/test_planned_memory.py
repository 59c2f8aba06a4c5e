"""The dry run predicts the memory of Megatron's GPT on one rank, in tensor groups and in sharding groups."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hecate.data.batches import Batch
from hecate.model.sizes.memory import PHASES, memory_parts
from hecate.model.sizes.run_shape import run_shape
from hecate.train.steps.passes import forward_loss, pass_tokens
from hecate.train.training import Training
from testing.ranks import run_ranks
from tests.hecate.apps.foresee.making import num_bytes
from tests.hecate.apps.megatron.making import config_of, tensor_ranks_of, write_parts

SHAPE = "{kind: full, hidden: 64, ffn: 136, layers: 2, seq: 96, experts: 5, top_k: 2, query_width: 256, key_value_width: 128}\n"
"""four heads of 64 for queries, two for keys"""
ROWS, LENGTH = 8, 96


def overrides(tensor: int, shard: int, world: int, policy: str, dtype: str) -> tuple[str, ...]:
    own = (f"model.dtype={dtype}", f"model.tensor_parallel={tensor}", f"fssdp.shard_size={shard}", f"fssdp.policy={policy}")
    return (*own, f"nproc={world}", f"micro_batch_size={ROWS}", f"data.seq_len={LENGTH}", "data.eval=[]")


def full_rows(copy: int) -> Batch:
    """One sample a row, without padding; as many labels."""
    position = torch.arange(LENGTH).expand(ROWS, -1)
    token = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) + copy * ROWS * LENGTH
    return Batch(token * 7 % 256, token * 11 % 256, position, torch.ones_like(token), token, torch.zeros_like(token))


def measured(run: Training) -> dict[str, int]:
    """Bytes of this rank, in a step and in the forward pass of the next."""
    optimizer, step = run.parts.optimizer, run.parts.optimizer.step
    parts = run.parts.moe.parts.parameters if run.parts.moe.parts else {}
    others: list[nn.Parameter] = [*run.parts.moe.replicated_parameters().values(), *parts.values()]
    found: dict[str, int] = {}

    def watched(*given: Any) -> bool:
        gradients = [parameter.grad for parameter in [*optimizer.owned.values(), *others] if parameter.grad is not None]
        found["gradients"] = sum(gradient.numel() * gradient.element_size() for gradient in gradients)
        return step(*given)

    optimizer.step = watched  # type: ignore[method-assign]
    run.train_one()

    def with_moments(parameters: Iterable[nn.Parameter]) -> int:
        return num_bytes(tensor for parameter in parameters for tensor in optimizer.row(parameter).values() if tensor.dim())

    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = full_rows(run.ranks.dp_rank)
    run.parts.moe.engine.begin_step(1).begin_micro_step(pass_tokens(run.parts.base.head, batch))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward_loss(run.parts.base.head, batch)
    replicas = [store.replicas() for store in run.parts.moe.engine.shards.stores.values()]
    weights = {id(parameter): parameter for parameter in [*run.parts.base.model.parameters(), *others]}.values()
    known = [*weights, *replicas, *(store.owned for store in run.parts.moe.engine.shards.stores.values())]
    # The embedding's gradient is there already; the plan has it among the gradients.
    embedding = run.parts.base.model.embedding.word_embeddings.weight.shape
    pointers = {tensor.untyped_storage().data_ptr() for tensor in known}
    pointers |= {pointer for pointer, tensor in kept.items() if tensor.shape == embedding}
    del loss
    return {
        **found,
        "base weights": num_bytes(weights) - num_bytes(others),
        "owned experts, moments": with_moments(optimizer.owned.values()),
        "routers, adapters, moments": with_moments(others),
        "replicas": num_bytes(replicas),
        "activations": sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in pointers),
    }


def _job(rank: int, world: int, folder: str, cases: list[tuple[int, int, str, str]]) -> list[dict[str, int]]:
    found = []
    for tensor, shard, policy, dtype in cases:
        name = f"output_dir={folder}/{world}-{tensor}-{shard}-{policy}-{dtype}"
        config = config_of(Path(folder), *overrides(tensor, shard, world, policy, dtype), name)
        found.append(measured(Training(config, tensor_ranks_of(rank, world, tensor, shard))))
    return found


@pytest.mark.slow
def test_every_rank_holds_what_was_planned(tmp_path: Path) -> None:
    """Of 5 experts in two layers rank 0 owns 6 and rank 1 four, or in sharding groups of one each all ten."""
    world = 2
    cases = [(1, 2, "full"), (2, 2, "full"), (2, 2, "static_ep"), (2, 1, "full")]
    typed = [*((*case, "float32") for case in cases), (2, 2, "full", "bfloat16")]
    write_parts(tmp_path)
    (tmp_path / "tiny.yaml").write_text(SHAPE)
    found = run_ranks(world, _job, str(tmp_path), typed)
    for index, (tensor, shard, policy, dtype) in enumerate(typed):
        run = run_shape(config_of(tmp_path, *overrides(tensor, shard, world, policy, dtype)), None, world)
        others = np.array([4.0, 6.0]) if policy == "full" and shard > 1 else np.zeros(world)
        rows = np.full(world, ROWS * LENGTH / tensor)
        parts: dict[str, Any] = {part.name: part.bytes_PD for part in memory_parts(run, [others], rows)}
        for rank in range(world):
            what = f"rank {rank}, {tensor} parts, groups of {shard}, {policy}, {dtype}"
            got = found[rank][index]
            for name in ("base weights", "owned experts, moments", "routers, adapters, moments", "replicas"):
                assert got[name] == parts[name][PHASES.index("forward"), rank], f"{name}, {what}"
            assert got["gradients"] == parts["gradients"][PHASES.index("optimizer"), rank], f"gradients, {what}"
            logits = min(512, ROWS * LENGTH) * run.base.vocabulary // tensor * 8
            if policy == "full":  # with tokens at home
                estimate = parts["activations (estimate)"][PHASES.index("forward"), rank] - logits
                # In bfloat16 torch's norm, made of small operators on a CPU, keeps what it computes in float32.
                assert estimate == pytest.approx(got["activations"], rel=0.1 if dtype == "float32" else 0.15), what
