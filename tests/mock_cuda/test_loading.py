"""A model is loaded onto a GPU tensor by tensor: the host never holds all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import gc, json, sys, threading
from tests.mock_cuda import install
install.install(devices=2)
import torch
from transformers import MixtralForCausalLM
from hecate.model.files.load import load_model, load_without, read_config, resolve_model
from tests.hecate.model.tiny import tiny

lock, copies, most, before = threading.Lock(), 0, 0, set()

def tensors():
    return (o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.device.type == "cpu")

def note(kind, what):
    global copies, most
    with lock:  # what one thread looks at, it keeps, and another would count it
        copies += kind.startswith("H2D")
        if copies % 8 == 1:
            most = max(most, sum({one.data_ptr(): one.nbytes for one in tensors() if id(one) not in before}.values()))

def dense(source, device):
    return load_model(source, torch.bfloat16, device)

def without_experts(source, device):
    blocks = [f"model.layers.{layer}.mlp.experts" for layer in range(8)]
    return load_without(blocks, MixtralForCausalLM, read_config(source), source, torch.bfloat16, device)

for load, kind, stored in ((dense, "llama", torch.float32), (without_experts, "mixtral", torch.bfloat16)):
    folder, device = f"{sys.argv[1]}/{kind}", torch.device("cuda", 1)
    values = tiny(kind, stored, num_hidden_layers=8).save_pretrained(folder) or tiny(kind, stored, num_hidden_layers=8).state_dict()
    before, copies, most = {id(one) for one in tensors()}, 0, 0
    install.device.observe(note)
    model = load(resolve_model(folder), device)
    install.device.observe(None)
    assert {t.device for t in (*model.parameters(), *model.buffers())} == {device}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value.cpu(), values[name].to(torch.bfloat16)), name
    print(json.dumps([most, sum(value.nbytes for value in model.state_dict().values())]))
"""


@pytest.mark.slow
def test_the_host_holds_a_few_tensors_at_a_time(tmp_path: Path) -> None:
    """A dense model that is stored in another type, and a model that is loaded without its experts, as owners alone read them."""
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2
    for most, size in found:
        assert 0 < most < size / 4, f"the host held {most} bytes at a time of a model of {size}"
