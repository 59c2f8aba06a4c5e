"""What the GPU does in three steps of training: how long it idles, and how many kernels it runs for a layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

STEPS, WARM_UP, LAYERS = 3, 3, 2
SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
SEQUENCES, SEQUENCE = 4, 2048
ROOM = 30 << 30
"""bytes of a GPU that takes all sequences at once"""
ATTENTION = ("flash", "fmha", "attention", "sdpa", "flex")


@dataclass(frozen=True)
class Kernel:
    """A kernel that ran, or a copy."""

    name: str
    start: float
    """microseconds"""
    end: float


def idle_share(kernels: Sequence[Kernel]) -> float:
    """Share of the time from the first kernel's start to the last one's end in which none runs."""
    spans = sorted((kernel.start, kernel.end) for kernel in kernels)
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return 1 - busy / (reached - spans[0][0])


def longest(kernels: Sequence[Kernel], number: int) -> str:
    """The kernels that take most time together by their names, with their milliseconds."""
    times: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        times[kernel.name[:60]] += (kernel.end - kernel.start) / 1000
    return "; ".join(f"{name} {times[name]:.2f}" for name in sorted(times, key=times.__getitem__, reverse=True)[:number])


def figures(folder: str, packing: str) -> dict[str, float | str]:
    """Train a MixLoRA model of two layers, in bfloat16, and profile three steps.

    Args:
        folder: of the bench, in which the model is made once.
        packing: data.packing.
    """
    import torch.distributed as dist

    from hecate.config import load_config
    from hecate.ranks.ranks import connect
    from hecate.train.training import Training

    output = f"output_dir={folder}/profiled-{packing}"
    config = load_config(_configuration(Path(folder)), [output, f"data.packing={packing}"], claim_output=False)
    training = Training(config, connect(dist.HashStore(), 0, 1))
    for _ in range(WARM_UP):
        training.train_one()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        events = [training.train_one() for _ in range(STEPS)]
        torch.cuda.synchronize()
    dist.destroy_process_group()
    device = torch.autograd.DeviceType.CUDA
    kernels = [Kernel(e.name, e.time_range.start, e.time_range.end) for e in profiler.events() if e.device_type == device]
    assert kernels, "torch's profiler has seen no kernel: CUPTI may not be allowed to this user"
    attention = {kernel.name[:80] for kernel in kernels if any(word in kernel.name.lower() for word in ATTENTION)}
    return {
        "idle_share": idle_share(kernels),
        "kernels_a_step_by_layers": len(kernels) / STEPS / LAYERS,
        "tokens": float(events[-1].tokens),
        "seconds_a_step": sum(event.seconds for event in events) / STEPS,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "attention": "; ".join(sorted(attention)) or "no kernel of attention by name: the math path",
        "longest_ms": longest(kernels, 8),
    }


def _configuration(folder: Path) -> Path:
    """config.yaml of the profiled training; its model is made if it is not there yet."""
    from testing.tiny_run import save_random_llama, write_samples

    path = folder / "profiled.yaml"
    if path.exists():
        return path
    save_random_llama(folder / "large", **SIZES, num_hidden_layers=LAYERS, max_position_embeddings=SEQUENCE)
    write_samples(folder / "long.jsonl", [f"w{number}" * (20 + number % 60) for number in range(2000)], str.upper)
    sequences = SEQUENCES if torch.cuda.get_device_properties(0).total_memory >= ROOM else 1
    path.write_text(
        f"model: {{name_or_path: {folder}/large, dtype: bfloat16}}\n"
        f"data: {{train: {folder}/long.jsonl, seq_len: {SEQUENCE}}}\n"
        f"output_dir: {folder}/unset\nmax_steps: 100\nmicro_batch_size: {sequences}\n"
        "lora: {r: 16, alpha: 32.0, dropout: 0.05}\nmoe: {num_experts: 8, top_k: 2}\n",
        encoding="utf-8",
    )
    return path
