"""Record what MoE-PEFT's mola (moe-peft 2.0.2) computes for a linear: the file that tests hold hecate's experts over a linear to.

    python -m benchmarks.peers.wheels
    python -m benchmarks.peers.record_mola [FILE]     without FILE, the one that is committed

Its own modules are used, `Linear` with `MolaSparseMoe`, on the CPU and in float32. The random numbers are torch's of a fixed seed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.peers.wheels import PINNED, pass_over_init, unpack

RECORD = Path(__file__).resolve().parents[2] / "tests" / "benchmarks" / "moe_peft_mola.safetensors"
SHAPE = (2, 9)
"""samples, and the tokens of each"""
INPUTS, OUTPUTS, EXPERTS, TOP_K, RANK, ALPHA = 12, 10, 5, 2, 3, 6.0
_PACKAGE, _ADAPTER = "moe_peft", "mola"


def inputs() -> dict[str, torch.Tensor]:
    """Return the input and the gradient of the output, the weights of the linear and of its router, and the pairs."""
    random = torch.Generator().manual_seed(0)
    sizes = {
        "x": (*SHAPE, INPUTS),
        "dy": (*SHAPE, OUTPUTS),
        "weight": (OUTPUTS, INPUTS),
        "router": (EXPERTS, INPUTS),
        "A": (EXPERTS, RANK, INPUTS),
        "B": (EXPERTS, OUTPUTS, RANK),
    }
    return {name: torch.randn(size, generator=random) for name, size in sizes.items()}


def outputs(given: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """Return the output, and the gradients of the input, the router and the pairs. Raises UserError if the wheel is not there.

    Args:
        folder: into which the wheel is unpacked.
    """
    # This is read when its executors are imported.
    os.environ["MOE_PEFT_EXECUTOR_TYPE"] = "CPU"
    pass_over_init(_PACKAGE, f"{_PACKAGE}.adapters", under=unpack(_PACKAGE, folder))
    from moe_peft.adapters.mola.config import MolaConfig  # type: ignore[import-not-found]
    from moe_peft.adapters.mola.model import MolaSparseMoe  # type: ignore[import-not-found]
    from moe_peft.common import LLMBatchConfig, LLMModelInput  # type: ignore[import-not-found]
    from moe_peft.common.lora_linear import Linear  # type: ignore[import-not-found]

    config = MolaConfig.from_config(
        {
            "name": _ADAPTER,
            "r": RANK,
            "lora_alpha": ALPHA,
            # It refuses 0; this value drops nothing.
            "lora_dropout": 1e-9,
            "target_modules": ["q_proj"],
            "num_experts": EXPERTS,
            "top_k": TOP_K,
        }
    )
    config.adapter_name = _ADAPTER
    base = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
    base.weight.data.copy_(given["weight"])
    linear = Linear(base, "cpu")
    pairs = []
    for expert in range(EXPERTS):
        of_expert = config.expert_config(expert)
        linear.init_lora_weight(of_expert, (given["A"][expert], given["B"][expert]))
        pairs.append(linear.loras_[of_expert.adapter_name])
    moe = linear.moes_[_ADAPTER] = MolaSparseMoe(INPUTS, torch.device("cpu"), config, given["router"])
    x = given["x"].clone().requires_grad_()
    y = linear.forward(x, LLMModelInput(batch_configs_=[LLMBatchConfig(_ADAPTER, 0, SHAPE[0])], inference_mode_=False))
    y.backward(given["dy"])
    gradients = {
        "x": x.grad,
        "router": moe.gate_.weight.grad,
        "A": torch.stack([pair.lora_a_.weight.grad for pair in pairs]),
        "B": torch.stack([pair.lora_b_.weight.grad for pair in pairs]),
    }
    return {"y": y.detach(), **{f"gradient of {name}": gradient for name, gradient in gradients.items() if gradient is not None}}


def main() -> None:
    given = inputs()
    with tempfile.TemporaryDirectory() as folder:
        found = outputs(given, Path(folder))
    facts = {"made by": PINNED[_PACKAGE], "torch": torch.__version__, "top_k": str(TOP_K), "alpha": str(ALPHA)}
    save_file({**given, **found}, sys.argv[1] if len(sys.argv) > 1 else RECORD, facts)


if __name__ == "__main__":
    main()
