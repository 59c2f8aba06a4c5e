"""What other trainers have reached on GPUs, by their own publications: how far below a card's matmuls the steps of real trainings are.

Listed are trainings in bf16 (fp16 on V100) of at least 3e9 parameters at work for a token, all settings that a publication has or, of long
tables, the fastest and the slowest. A rate is that of a whole step, waiting included, in FLOPs of the model: what gradient checkpointing
computes twice counts once, and what a frozen base spares is not counted, in LoRA runs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedRun:
    """The speed of one training, as it was published."""

    what: str
    """model, number of GPUs, and the method where it is no pretraining"""
    flops: float
    """the model's FLOP/s of one GPU"""
    source: str
    """title, table and address"""
    has_experts: bool = False
    """whether the model is a mixture of experts"""


_AUTOMODEL = "NeMo AutoModel, Performance Summary, Pre-Training: https://docs.nvidia.com/nemo/automodel/nightly/performance-summary.html"
_AUTOMODEL_LORA = _AUTOMODEL.replace("Pre-Training", "Fine-Tuning (LoRA)")
_AUTOMODEL_2025 = "NeMo AutoModel, docs/performance-summary.md, LoRA, 2025-10-02: https://github.com/NVIDIA-NeMo/Automodel (01926a5c)"
_BRIDGE = "Megatron Bridge, docs/performance-summary.md, 25.11, DGX-H100: https://github.com/NVIDIA-NeMo/Megatron-Bridge (00b7660b)"
_ZOO = "Megatron-MoE-ModelZoo, best_practice/Qwen3/readme.md, Performance Results: https://github.com/yanring/Megatron-MoE-ModelZoo"
_MPT_H100 = "llm-foundry, MPT Training Benchmarks, H100 80GB BF16: https://github.com/mosaicml/llm-foundry scripts/train/benchmarking"
_MPT_A100, _MPT_A100_40 = (_MPT_H100.replace("H100 80GB BF16", table) for table in ("A100 80GB", "A100 40GB"))
_TITAN = "torchtitan, docs/performance.md of 2024, Llama 3 with FSDP2 on 64 A100 (MFU): https://github.com/pytorch/torchtitan"
_FORGE = "KempnerForge, MFU scaling, best MFU by GPU count: https://kempnerinstitute.github.io/KempnerForge/reference/benchmarks.html"

RUNS: dict[str, tuple[PublishedRun, ...]] = {
    "H100 80GB HBM3": (
        PublishedRun("DeepSeek-V3 671B, 1024 GPUs", 216e12, _AUTOMODEL, has_experts=True),
        PublishedRun("DeepSeek-V3 671B, 256 GPUs", 250e12, _AUTOMODEL, has_experts=True),
        PublishedRun("Kimi K2, 256 GPUs", 189e12, _AUTOMODEL, has_experts=True),
        PublishedRun("Qwen3 MoE 30B, 8 GPUs", 277e12, _AUTOMODEL, has_experts=True),
        PublishedRun("GPT-OSS 20B, 8 GPUs", 279e12, _AUTOMODEL, has_experts=True),
        PublishedRun("GPT-OSS 120B, 64 GPUs", 231e12, _AUTOMODEL, has_experts=True),
        PublishedRun("Llama3 8B, LoRA, 1 GPU", 402e12, _AUTOMODEL_LORA),
        PublishedRun("Qwen2.5 7B, LoRA, 1 GPU", 423e12, _AUTOMODEL_LORA),
        PublishedRun("Llama3 70B, LoRA, 8 GPUs", 176e12, _AUTOMODEL_2025),
        PublishedRun("GPT-OSS 120B, 64 GPUs", 153e12, _BRIDGE, has_experts=True),
        PublishedRun("Qwen3 235B, 256 GPUs, DeepEP across nodes with overlap", 276e12, _ZOO, has_experts=True),
        PublishedRun("Qwen3 235B, 256 GPUs, TP 4", 167e12, _ZOO, has_experts=True),
        PublishedRun("MPT 7B of 2048 tokens, 8 GPUs", 459.5e12, _MPT_H100),
        PublishedRun("MPT 7B of 65536 tokens, 8 GPUs", 282.9e12, _MPT_H100),
    ),
    "H200": (
        PublishedRun("Llama-3-like 7B, 1 GPU", 0.578 * 989e12, _FORGE),
        PublishedRun("Llama-3-like 7B, 4 GPUs, FSDP", 0.538 * 989e12, _FORGE),
        PublishedRun("Llama-3-like 13B, 32 GPUs, TP 4 and FSDP", 0.327 * 989e12, _FORGE),
        PublishedRun("Llama-3-like 70B, 32 GPUs, TP 4 and FSDP", 0.254 * 989e12, _FORGE),
    ),
    "A100-SXM4-80GB": (
        PublishedRun("Llama 3 8B, 64 GPUs", 0.582 * 312e12, _TITAN),
        PublishedRun("Llama 3 70B, 64 GPUs", 0.505 * 312e12, _TITAN),
        PublishedRun("MPT 7B of 2048 tokens, 8 GPUs", 200.4e12, _MPT_A100),
        PublishedRun("MPT 30B of 8192 tokens, 8 GPUs", 122.9e12, _MPT_A100),
    ),
    "A100-SXM4-40GB": (
        PublishedRun("MPT 30B, 128 GPUs", 0.5225 * 312e12, _MPT_A100_40),
        PublishedRun("MPT 13B, 32 GPUs", 0.5262 * 312e12, _MPT_A100_40),
        PublishedRun("MPT 70B, 64 GPUs", 0.3587 * 312e12, _MPT_A100_40),
    ),
    "V100-SXM2-32GB": (
        PublishedRun("GPT of 8.3e9 parameters, 512 GPUs", 15.1e15 / 512, "Megatron-LM, abstract: https://arxiv.org/abs/1909.08053"),
        PublishedRun("over 100e9 parameters, 400 GPUs", 15e15 / 400, "ZeRO, abstract: https://arxiv.org/abs/1910.02054"),
        PublishedRun("ZeRO-Infinity, 512 GPUs", 25e15 / 512, "ZeRO-Infinity, abstract: https://arxiv.org/abs/2104.07857"),
    ),
}
"""trainings by the card, under the driver's name without "NVIDIA" """
