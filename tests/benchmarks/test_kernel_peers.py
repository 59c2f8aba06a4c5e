"""Peers from their wheels compute the same as our layer: small, in float32, on the CPU, in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers.wheels import WHEELS

ROOT = Path(__file__).resolve().parents[2]
CHECK = """
import dataclasses, json, sys, tempfile, torch
from pathlib import Path
from benchmarks.kernel_cases import SHAPES, errors, expected, make_inputs
from benchmarks.peers import moe_peft_layer
shape = dataclasses.replace(SHAPES[0], hidden=32, ffn=48, rank=8, experts=5, tokens=40)
inputs = make_inputs(shape, torch.device("cpu"), torch.float32)
with tempfile.TemporaryDirectory() as folder:
    print(json.dumps(errors(moe_peft_layer.make(inputs, Path(folder)).results(inputs.dy_TD), expected(inputs))))
"""


MOLA = """
import json, os, sys, tempfile, torch
from pathlib import Path
os.environ["MOE_PEFT_EXECUTOR_TYPE"] = "CPU"
from benchmarks.peers.wheels import pass_over_init, unpack
from hecate.experts.family import ExpertReplicas, Site
from hecate.experts.linear import LinearExperts
from hecate.experts.pairs import PlainPairs
from hecate.experts.router import RouterSite, TopKRouter
from hecate.kernels.common.assignments import RoutedTokens
from hecate.parallel.expert_kinds import LinearSizes, LoraShape
from hecate.parallel.units import Unit

I, O, E, K, R, T, SCALE = 12, 10, 5, 2, 3, 40, 2.0
torch.manual_seed(0)
x_TI, dy_TO, gate_EI = torch.randn(T, I), torch.randn(T, O), torch.randn(E, I)
a_ErI, b_EOr = torch.randn(E, R, I), torch.randn(E, O, R)

unit, sizes, cpu = Unit(0, "self_attn.q_proj"), LinearSizes(I, O), torch.device("cpu")
site = Site(unit, E, sizes, 0, torch.float32, torch.float32, cpu)
experts = LinearExperts(site, PlainPairs(LoraShape(R, SCALE, 0.0), ("linear",), sizes))
router = TopKRouter(RouterSite(unit=unit, hidden=I, num_experts=E, top_k=K, seed=0, dtype=torch.float32, device=cpu))
router.weight.data.copy_(gate_EI)
x = x_TI.clone().requires_grad_()
chunks = torch.cat([a_ErI.flatten(1), b_EOr.flatten(1)], 1).requires_grad_()
routing = router(x)
y = experts.compute(RoutedTokens(x, routing.expert_TK, routing.weight_TK, None, torch.arange(E)), ExpertReplicas(chunks), None)
y.backward(dy_TO)
ours = {"y": y.detach(), "x": x.grad, "gate": router.weight.grad, "chunks": chunks.grad}

with tempfile.TemporaryDirectory() as folder:
    pass_over_init("moe_peft", "moe_peft.adapters", under=unpack("moe_peft", Path(folder)))
    from moe_peft.adapters.mola.config import MolaConfig
    from moe_peft.adapters.mola.model import MolaSparseMoe
    from moe_peft.common.lora_linear import Linear
    given = {"name": "t", "r": R, "lora_alpha": SCALE * R, "lora_dropout": 1e-9, "target_modules": ["q_proj"], "num_experts": E, "top_k": K}
    config = MolaConfig.from_config(given)
    linear = Linear(torch.nn.Linear(I, O, bias=False), "cpu")
    for expert in range(E):
        linear.init_lora_weight(config.expert_config(expert), (a_ErI[expert], b_EOr[expert]))
    moe = MolaSparseMoe(I, cpu, config, gate_EI)
    x = x_TI.clone().requires_grad_()
    y = moe.forward(torch.zeros(1, T, O), x[None], linear)[0]
    y.backward(dy_TO)
    pairs = [linear.loras_[config.expert_config(expert).adapter_name] for expert in range(E)]
    grads = [torch.cat([pair.lora_a_.weight.grad.flatten(), pair.lora_b_.weight.grad.flatten()]) for pair in pairs]
theirs = {"y": y.detach(), "x": x.grad, "gate": moe.gate_.weight.grad, "chunks": torch.stack(grads)}
print(json.dumps({name: float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in ours}))
"""


needs_moe_peft = pytest.mark.skipif(
    not list(WHEELS.glob("moe_peft-*.whl")), reason="no wheel of MoE-PEFT: `python -m benchmarks.peers.wheels` downloads it"
)


@needs_moe_peft
def test_moe_peft_gives_output_and_gradients_of_the_reference() -> None:
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 8
    assert max(found.values()) < 1e-5, found


@needs_moe_peft
def test_moe_peft_s_mola_gives_output_and_gradients_of_experts_over_a_linear() -> None:
    done = subprocess.run([sys.executable, "-c", MOLA], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert max(found.values()) < 1e-6, found
