"""Compute the memory of each rank in the phases of a step.

Activations, and what a GPU's memory holds beside tensors, are estimated; everything else is counted exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hecate.config.sections import OPTIMIZERS
from hecate.model.sizes.replicated_tensors import replicated_bytes_of
from hecate.model.sizes.run_shape import ExpertLayers, PoolShape, RunShape
from hecate.parallel.cluster.backup_ranks import backup_ranks
from hecate.parallel.cluster.gpu_memory import CONTEXT_BYTES, nccl_bytes, rounding_bytes
from hecate.parallel.cluster.mesh import owners_topology
from hecate.parallel.values.expert_kinds import MIXES_ON_EVERY_RANK
from hecate.parallel.values.optimizer_state import ParameterSpec, expert_spec, kept_tensors, owner_bytes
from hecate.parallel.values.placement import owners_by_memory

PHASES = ("forward", "backward", "optimizer")
BESIDE_TENSORS = ("CUDA context (estimate)", "NCCL's buffers (estimate)", "allocator's rounding (at most)")
"""The names of the parts of a GPU's memory that are no tensors."""
_HEAD_ROWS = 512
"""The number of tokens whose logits are in memory at a time."""
_MIXLORA_TILE, _TILE_ROWS = 1 << 20, 512
"""The sizes of tiles on a CPU: the bytes of one buffer for experts that share an FFN, and the assignments of a tile of others
(`kernels/`)."""
_CHUNK_ROWS = 1024
"""The number of assignments of which a GPU sums the gradients of pairs at once (`kernels/mixlora/passes.py`)."""
_OTHER_TENSORS, _OUTSIDE_LAYERS = 5, 3
"""The numbers of tensors in a layer beside its projections (three of its FFN, two norms), and outside the layers (embedding, norm,
head)."""


@dataclass(frozen=True, eq=False)
class MemoryPart:
    """The bytes of one kind of tensors, float64 [phases, ranks]."""

    name: str
    bytes_PD: np.ndarray


def memory_parts(
    run: RunShape,
    others_GD: list[np.ndarray],
    served_tokens_D: np.ndarray,
    frozen_GD: list[np.ndarray] | None = None,
    most_tokens_D: np.ndarray | None = None,
) -> list[MemoryPart]:
    """Return the bytes that each rank holds in each phase, by kind of tensors.

    Args:
        others_GD: for each of the run's groups, the number of replicas of other ranks' experts on each rank, in all its layers together;
            with `fssdp.rematerialize` in its fullest layer.
        served_tokens_D: the distinct tokens of a micro-step that each rank computes in a layer, averaged over the layers.
        frozen_GD: for each group, the number of other ranks' frozen parts that each rank keeps in all layers; None: as `others_GD`.
        most_tokens_D: as `served_tokens_D`, in each rank's fullest layer, whose backward pass needs the most; None: as on average.
    """
    config = run.config
    world, micro_steps = run.topology.world_size, config.gradient_accumulation_steps
    owned, replicas, gradients, fullest = _expert_bytes(run, others_GD)
    most_tokens_D = served_tokens_D if most_tokens_D is None else most_tokens_D
    forward, backward_3D = _activation_bytes(run, served_tokens_D, most_tokens_D)
    backward_3D = backward_3D + _chunk_bytes(run, others_GD, most_tokens_D * _assignments_per_token(run, served_tokens_D))
    held, backward = replicas, backward_3D[0]
    if micro_steps == 1:
        one_layer = fullest if config.fssdp.rematerialize else gradients
        gradients_3D = _gradient_bytes(run, one_layer, owned)
        # A layer's replicas are freed as soon as its gradients are complete.
        left = [1.0, 1.0, 1.0] if config.fssdp.rematerialize else _left(run)
        held_3D = replicas * np.array(left)[:, None]
        largest_D = (gradients_3D + held_3D + backward_3D).argmax(0)
        held, gradients, backward = (each[largest_D, np.arange(world)] for each in (held_3D, gradients_3D, backward_3D))
    elif config.fssdp.per_micro_step:  # gradients are reduced at once, and owners accumulate them
        gradients = fullest + owned
    blocks = owned_blocks(run, lambda pool: pool.numel * run.master_bytes)
    each_pool = [pool.blocks * pool.numel * run.master_bytes for pool in run.pools]
    pools, nothing = sum(each_pool), np.zeros(world)
    # Autograd adds up the gradient of a whole pool, of one layer after the other, and then adds it to that of earlier micro-steps.
    gradients = gradients + (2 if micro_steps > 1 else 1) * pools + max(each_pool, default=0)
    frozen = np.zeros(world)
    for group, others_D in zip(run.groups, others_GD if frozen_GD is None else frozen_GD, strict=True):
        frozen += (owned_experts(group, run) + others_D) * group.cost.frozen_bytes
    computed = _computed_bytes(run, others_GD)
    replicated = np.full(world, float((run.replicated_parameters + run.parts_parameters) * run.master_bytes))
    seeded = np.full(world, float(run.seeded_parameters * run.master_bytes))
    sent, backups = _backup_bytes(run, owned + blocks)
    return [
        MemoryPart("base weights", _base_bytes(run)),
        *([MemoryPart("frozen experts", np.stack([frozen] * 3))] if frozen.any() else []),
        *_with_moments(run),
        *([MemoryPart("seeded parts of pairs", np.stack([seeded] * 3))] if seeded.any() else []),
        MemoryPart("replicas", np.stack([replicas, held, nothing])),
        *([MemoryPart("pools", np.stack([np.full(world, float(pools))] * 2 + [nothing]))] if pools else []),
        *([MemoryPart("pairs made of replicas", np.stack([computed, computed, nothing]))] if computed.any() else []),
        MemoryPart("gradients", np.stack([nothing, gradients + replicated, owned + blocks + replicated + sent + backups])),
        MemoryPart("activations (estimate)", np.stack([forward, backward, nothing])),
        *_beside_tensors(run, others_GD if frozen_GD is None else frozen_GD),
    ]


def _with_moments(run: RunShape) -> list[MemoryPart]:
    """Return what trains, with what the optimizer keeps of it; the same in all phases."""
    state, world = OPTIMIZERS[run.config.optim].STATE, run.topology.world_size
    experts = sum((owned_experts(group, run) * group.cost.state_bytes for group in run.groups), np.zeros(world))
    blocks = owned_blocks(run, lambda pool: owner_bytes(state, expert_spec(pool.specs), run.master_bytes))
    backups = _backup_bytes(run, experts + blocks)[1]
    return [
        MemoryPart("owned experts, moments", np.stack([experts] * 3)),
        *([MemoryPart("owned blocks of pools, moments", np.stack([blocks] * 3))] if run.pools else []),
        *([MemoryPart("backups of other ranks' experts, moments", np.stack([backups] * 3))] if backups.any() else []),
        MemoryPart("routers, adapters, moments" if run.groups else "adapters, moments", np.full((3, world), replicated_bytes_of(run))),
    ]


def _expert_bytes(run: RunShape, others_GD: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return, float64 [ranks] each, the bytes of a rank's own experts, of its replicas, of their gradients, and of its fullest layer's.

    Args:
        others_GD: see `memory_parts`.
    """
    config = run.config
    world, micro_steps = run.topology.world_size, config.gradient_accumulation_steps
    layers_at_once = max(1, config.fssdp.prefetch)
    owned, replicas, gradients, fullest = np.zeros(world), np.zeros(world), np.zeros(world), np.zeros(world)
    of_stack: dict[int, np.ndarray] = {}
    for group, others_D in zip(run.groups, others_GD, strict=True):
        owned_D = owned_experts(group, run)
        owned += owned_D * group.cost.reduced_bytes  # masters have the type of gradients
        if config.fssdp.rematerialize:
            slots_D = owned_D / group.number + others_D
            at_once = min(layers_at_once, group.number // group.per_layer) * group.per_layer
            of_stack[group.stack] = of_stack.get(group.stack, 0.0) + at_once * slots_D * group.cost.trainable_bytes
            fullest = np.maximum(fullest, slots_D * group.cost.reduced_bytes)
            continue
        slots_D = owned_D + others_D
        replicas += slots_D * group.cost.trainable_bytes
        fullest = np.maximum(fullest, slots_D / group.number * group.cost.reduced_bytes)
        # With one micro-step a layer's gradients are reduced at once; with several they are first accumulated in all layers.
        gradients += slots_D * group.cost.reduced_bytes / (1 if micro_steps > 1 else group.number)
    if of_stack:  # all units of a layer come together
        replicas = np.max(list(of_stack.values()), axis=0)
    return owned, replicas, gradients, fullest


def _backup_bytes(run: RunShape, owned_D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, float64 [ranks] each, the bytes of gradients that a rank sends to its backup ranks, and of the backups that it holds.

    Args:
        owned_D: bytes of the parameters that each rank owns.
    """
    if run.mesh.num_sharding_groups > 1:  # other groups hold each expert
        return np.zeros_like(owned_D), np.zeros_like(owned_D)
    backup_rank_DB = backup_ranks(run.topology, run.config.fssdp.redundancy, run.tensor_parallel)
    copies = backup_rank_DB.shape[1]
    held_D = np.bincount(backup_rank_DB.ravel(), weights=np.repeat(owned_D, copies), minlength=len(owned_D))
    return copies * owned_D, held_D


def _computed_bytes(run: RunShape, others_GD: list[np.ndarray]) -> np.ndarray:
    """Return the bytes of pairs that are made of replicas, float64 [ranks]: of all layers, or with checkpointing of the largest one.

    Replicas may be freed before the backward pass, but not what was made of them.

    Args:
        others_GD: see `memory_parts`.
    """
    rematerialize, world = run.config.fssdp.rematerialize, run.topology.world_size
    all_layers, largest = np.zeros(world), np.zeros(world)
    for group, others_D in zip(run.groups, others_GD, strict=True):
        slots_D = owned_experts(group, run) + others_D * (group.number if rematerialize else 1)
        bytes_D = slots_D * group.computed_numel * run.master_bytes
        all_layers += bytes_D
        largest = np.maximum(largest, bytes_D / group.number * group.per_layer)
    return largest if run.config.gradient_checkpointing else all_layers


def _beside_tensors(run: RunShape, others_GD: list[np.ndarray]) -> list[MemoryPart]:
    """Return what is in a GPU's memory beside tensors; nothing for a topology of CPUs.

    Counted are the tensors that live through a step: weights, and of what trains the parameter, its moments and its gradient. Those of
    activations, some thirty a layer, are few beside them.
    """
    if not run.is_gpu_D.any():
        return []
    base = sum(len(layer.linears) + _OTHER_TENSORS for layer in run.base.layers) + _OUTSIDE_LAYERS
    adapters, routers = sum(2 * len(layer.linears) for layer in run.base.layers), len(run.base.layers)
    if run.config.moe.kind.over_linears:
        adapters = sum(2 * len(layer.all_linears) * bool(own) for layer, own in zip(run.base.layers, run.adapters, strict=True))
        routers = sum(group.number for group in run.groups)
    elif not run.config.moe.kind.has_pairs:
        adapters = 0
    state = OPTIMIZERS[run.config.optim].STATE
    kept = max(kept_tensors(state, ParameterSpec((hidden, hidden), kind)) for kind in (None, "routers") for hidden in (1, 1 << 10))
    tensors = np.full(run.topology.world_size, float(base + (2 + kept) * (adapters + routers)))
    for group, others_D in zip(run.groups, others_GD, strict=True):
        tensors += (2 + group.kept_tensors) * owned_experts(group, run) + 2 * others_D
    nccl_D = nccl_bytes(run.mesh, run.topology.node_of_rank, sharded_layers=run.config.model.shard_non_experts)
    estimates = (float(CONTEXT_BYTES), nccl_D, rounding_bytes(tensors))
    return [MemoryPart(name, np.stack([run.is_gpu_D * bytes_D] * 3)) for name, bytes_D in zip(BESIDE_TENSORS, estimates, strict=True)]


def _base_bytes(run: RunShape) -> np.ndarray:
    """Return the bytes of the weights outside the experts that no step changes, float64 [phases, ranks]: frozen ones, and rounded copies.

    Of sharded layers a rank holds its part, and while layers run also the whole of two: the running one and the next one.
    """
    world, sharded = run.topology.world_size, run.sharded_parameters
    for_good = run.frozen_parameters + run.rounded_parameters - sum(sharded) + sum(sharded) / run.mesh.shard_size
    while_running = for_good + min(2, len(sharded)) * max(sharded, default=0)
    return np.repeat(np.array([[while_running], [while_running], [for_good]]) * run.dtype_bytes, world, axis=1)


def owned_blocks(run: RunShape, size: Callable[[PoolShape], float]) -> np.ndarray:
    """Return the sizes of the blocks of pools that each rank owns together, float64 [ranks], by the size of a block of each pool."""
    memory = owners_topology(run.topology, run.mesh).memory
    owned = np.zeros(len(memory))
    for pool in run.pools:
        owned += size(pool) * np.bincount(owners_by_memory(pool.blocks, memory), minlength=len(memory))
    return np.tile(owned, run.mesh.num_sharding_groups)


def first_owners(experts: int, run: RunShape) -> np.ndarray:
    """Return which rank of a sharding group owns each expert of a layer when training begins, int64 [experts]."""
    return owners_by_memory(experts, owners_topology(run.topology, run.mesh).memory)


def owned_experts(group: ExpertLayers, run: RunShape) -> np.ndarray:
    """Return the number of experts that each rank owns in all layers of the group, float64 [ranks]."""
    owned = group.number * np.bincount(first_owners(group.experts, run), minlength=run.mesh.shard_size).astype(float)
    return np.tile(owned, run.mesh.num_sharding_groups)


def _gradient_bytes(run: RunShape, one_layer: np.ndarray, owned: np.ndarray) -> np.ndarray:
    """Return the bytes of the experts' gradients while the last, the last but one, and the first layer run backward, float64 [3, ranks].

    The running layer has those of its replicas. Those of the layer that ran before are being reduced: they, and copies that are sent and
    received, which together are as many again; on one rank they are the sum itself. Of layers before that the owners' sums are left.

    Args:
        one_layer: the bytes of the gradients of a layer's replicas.
        owned: those of all owned experts' gradients.
    """
    layers = len(run.base.layers)
    reducing = 2 * one_layer if run.mesh.shard_size > 1 else owned / layers
    second, last = min(1, layers - 1), max(0, layers - 2)
    return np.stack([one_layer, one_layer + second * reducing, one_layer + second * reducing + last * owned / layers])


def _activation_bytes(run: RunShape, served_tokens_D: np.ndarray, most_tokens_D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the most bytes of activations in the forward pass, float64 [ranks], and in the backward pass, float64 [3, ranks].

    Autograd keeps those of all layers, among which is the last norm's input; or, with checkpointing, the layers' inputs, beside which
    there is either one layer that runs or, with the logits, the last norm's input in float32. Of the backward pass see `_left`.
    """
    layers = [_saved_layer_bytes(run, index, served_tokens_D) for index in range(len(run.base.layers))]
    head, gradients = _head_bytes(run), _backward_bytes(run, most_tokens_D, _assignments_per_token(run, served_tokens_D))
    left = np.array(_left(run))[:, None]
    if not run.config.gradient_checkpointing:
        kept = np.asarray(sum(layers))
        return kept + head, left * kept + gradients
    inputs = sum(layer.hidden for layer in run.base.layers) * run.tokens_D * run.dtype_bytes
    last_norm = 4.0 * run.tokens_D * run.base.layers[-1].hidden
    running_3D = np.stack([layers[-1], layers[-min(2, len(layers))], layers[0]])
    return inputs + np.maximum(np.max(layers, axis=0), last_norm + head), left * inputs + running_3D + gradients


def _left(run: RunShape) -> tuple[float, float, float]:
    """Return the share of the layers that are left when the last, the last but one, and the first layer run backward.

    What is held of layers falls, and sums of gradients rise, equally from the second of these on: between these three is no largest one.
    """
    layers = len(run.base.layers)
    return 1.0, (layers - min(1, layers - 1)) / layers, 1 / layers


def _saved_layer_bytes(run: RunShape, index: int, served_tokens_D: np.ndarray) -> np.ndarray:
    """Return the bytes that autograd keeps of a layer, counted tensor by tensor, of rows that hold several samples and some padding.

    Attention keeps what `_saved_by_attention` says, its normalized input, and low-rank products; norms, those of
    queries and keys among them, and the router keep float32 inputs.
    Experts keep x, gate and up of each distinct token that the rank computes, or, if experts have their own FFNs, of each assignment.
    """
    layer, b = run.base.layers[index], run.dtype_bytes
    products_D = served_tokens_D * _products_per_token(run, index, served_tokens_D)
    trained = 0.0
    if run.trains_non_experts:  # the inputs that norms and a plain FFN multiply by their trained weights
        plain = not run.config.moe.experts_per_layer(len(run.base.layers))[index]
        trained = 2 * b * (layer.hidden + plain * layer.ffn)
    attention = _saved_by_attention(run, index)
    wide = 4 * (2 * layer.hidden + layer.normalized)
    if run.config.moe.kind.over_linears:
        return np.asarray(run.tokens_D * (b * attention + _saved_by_linears(run, index) + wide), dtype=np.float64)
    low_rank = 0
    if run.config.moe.kind.has_pairs:
        low_rank = run.config.lora.rank * sum(name in run.config.lora.target_modules for name, _, _ in layer.linears)
    wide += 4 * layer.hidden if b < 4 else 0
    per_token = b * (layer.hidden + attention + low_rank) + wide
    if index == 0 and not run.trains_non_experts and not any(run.adapters[0]):  # nothing before its router is trained
        per_token = 4 * layer.hidden if b < 4 else 0
    return np.asarray(run.tokens_D * (per_token + trained) + b * (served_tokens_D * layer.hidden + products_D * 2 * layer.ffn))


def _saved_by_attention(run: RunShape, index: int) -> int:
    """Return the numbers that the attention of one layer keeps of a token: queries, keys, values and output.

    Where rows hold several samples, torch's fused attention takes a mask of [row, row], which each layer keeps in the queries' type, and
    keys and values that are repeated for all heads. Flash and flex attention on a GPU need neither.
    """
    layer, config = run.base.layers[index], run.config
    key_value = sum(outputs for name, outputs, _ in layer.linears if name in ("k_proj", "v_proj"))
    if config.model.front_end == "megatron":  # the view of the values keeps the joint product; the rest are copies
        return 3 * layer.query_width + key_value + key_value // 2
    fused = config.model.attention == "sdpa" or not run.is_gpu_D.any()
    if config.data.packing and fused:
        return 4 * layer.query_width + config.data.seq_len
    return 2 * layer.query_width + key_value


def _saved_by_linears(run: RunShape, index: int) -> float:
    """Return the bytes that the linears of a layer with experts, or plain pairs, and its FFN keep of a token.

    The FFN keeps gate, the activation of gate, and up. Each linear with experts keeps its input without padding, which is a copy of its
    own, its router's probabilities and weights, and A x of each assignment with the assignment's indices; where few ranks are multiplied
    densely, A x of all experts without indices, which is about as much. Plain pairs share inputs.
    """
    layer, b, config = run.base.layers[index], run.dtype_bytes, run.config
    experts, k = config.moe.experts_per_layer(len(run.base.layers))[index], config.moe.experts_per_token
    targets = [inputs for name, _, inputs in layer.all_linears if name in config.lora.target_modules]
    kept = sum(targets) if experts else 2 * layer.hidden + layer.query_width + layer.ffn
    routing = 2 * 4 * experts + k * (3 * 4 + 4 * 8) if experts else 0
    if config.moe.router.mixes in MIXES_ON_EVERY_RANK:  # nothing is sorted
        routing = 16 * experts
    low_rank = len(targets) * (config.lora.rank * b * (k if experts else 1) + routing)
    return b * (3 * layer.ffn + kept) + low_rank


def _products_per_token(run: RunShape, index: int, served_tokens_D: np.ndarray) -> float:
    """Return how many gate and up products are kept of a distinct token: one if the experts share the base's."""
    if run.config.moe.kind.shares_ffn or not run.config.moe.experts_per_layer(len(run.base.layers))[index]:
        return 1.0
    return _assignments_per_token(run, served_tokens_D)


def _assignments_per_token(run: RunShape, served_tokens_D: np.ndarray) -> float:
    """Return how many of a token's assignments the ranks that compute it have, on average."""
    return float(run.tokens_D.sum()) * run.config.moe.experts_per_token / max(float(served_tokens_D.sum()), 1.0)


def _backward_bytes(run: RunShape, served_tokens_D: np.ndarray, assignments: float) -> np.ndarray:
    """Return the bytes of the gradients of one layer's activations in its backward pass, float64 [ranks].

    Of a plain FFN, and where linears have experts: hidden states, gate, up and their product. Experts that share an FFN
    (`kernels/mixlora`): of each token the gradients of y, x, hidden, gate and up, and of each assignment those of x, gate and up. Experts
    with FFNs of their own (`kernels/experts/torch_path.py`): the gradients of y and x of each token, and a tile of assignments; and of
    trained FFNs whose gradients are wider than they, on a CPU, one product for gate's and up's gradients, in both types.

    Args:
        served_tokens_D: of the layer.
        assignments: see `_assignments_per_token`.
    """
    index, widest = max(enumerate(run.base.layers), key=lambda layer: layer[1].ffn)
    ffn, hidden, b = widest.ffn, widest.hidden, run.dtype_bytes
    kind, own = run.config.moe.kind, bool(run.config.moe.experts_per_layer(len(run.base.layers))[index])
    plain_D = served_tokens_D * b * (3 * ffn + 2 * hidden)
    if kind.over_linears or not own:
        return np.asarray(plain_D)
    assignments_D = served_tokens_D * assignments
    if kind.shares_ffn:
        tile = 0.0 if run.is_gpu_D.any() else _MIXLORA_TILE * (6 + 2 * hidden / ffn) + _mask_bytes(run, _MIXLORA_TILE / (ffn * b), index)
        return np.asarray(b * (served_tokens_D * (3 * ffn + 2 * hidden) + assignments_D * (2 * ffn + hidden)) + tile)
    rows_D = assignments_D if run.is_gpu_D.any() else np.minimum(assignments_D, _TILE_ROWS)
    product = 0.0
    if kind.ffn == "trained" and b < run.master_bytes and not run.is_gpu_D.any():
        product = 2.0 * ffn * hidden * (b + run.master_bytes)
    masks_D = 0.0 if run.is_gpu_D.any() else _mask_bytes(run, rows_D, index)
    return np.asarray(b * (served_tokens_D * 2 * hidden + rows_D * (5 * ffn + 3 * hidden)) + product + masks_D)


def _chunk_bytes(run: RunShape, others_GD: list[np.ndarray], assignments_D: np.ndarray) -> np.ndarray:
    """Return the bytes of the parts that the gradients of a layer's pairs are summed from on a GPU, float64 [ranks].

    They are float32, of each chunk of assignments, where experts share an FFN; each expert's last chunk may be short.

    Args:
        others_GD: see `memory_parts`.
        assignments_D: of the layer.
    """
    most = np.zeros(run.topology.world_size)
    if not (run.config.moe.kind.shares_ffn and run.config.moe.kind.has_pairs and run.is_gpu_D.any()):
        return most
    for group, others_D in zip(run.groups, others_GD, strict=True):
        slots_D = owned_experts(group, run) / group.number + others_D / (1 if run.config.fssdp.rematerialize else group.number)
        chunks_D = assignments_D // _CHUNK_ROWS + np.minimum(slots_D, assignments_D)
        most = np.maximum(most, 4.0 * max(group.computed_numel, group.cost.chunk_numel) * chunks_D)
    return most


def _mask_bytes(run: RunShape, rows: float | np.ndarray, index: int) -> float | np.ndarray:
    """Return the bytes of dropout's masks of x and of the hidden state for a tile of rows, and of the 32-bit words they are made of."""
    layer = run.base.layers[index]
    if run.config.lora.dropout == 0 or not run.config.moe.kind.has_pairs:
        return 0.0
    return rows * (run.dtype_bytes * (layer.hidden + layer.ffn) + 4 * max(layer.hidden, layer.ffn))


def _head_bytes(run: RunShape) -> np.ndarray:
    """Return the bytes that the head needs, float64 [ranks]: the logits of one chunk of tokens, and all hidden states with their gradients.

    The softmax takes the place of float32 logits. In a narrower type there are the logits, the softmax in float32, and its rounded copy.
    Hidden states that are gathered from several ranks, and their gradients, are included.
    """
    tokens_D, parts = run.tokens_D * run.tensor_parallel, run.tensor_parallel
    gathered = 2 * tokens_D * run.base.layers[0].hidden * run.dtype_bytes if parts > 1 else 0
    rows_D = np.minimum(_HEAD_ROWS, tokens_D)
    b, hidden = run.dtype_bytes, run.base.layers[-1].hidden
    logits_D = rows_D * run.base.vocabulary // parts * (b if b >= 4 else 2 * b + 4)
    return np.asarray(logits_D + 2 * run.tokens_D * hidden * b + gathered, dtype=np.float64)
