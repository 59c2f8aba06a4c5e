"""Peers from their wheels compute the same as our layer: small, in float32, on the CPU, in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.peers.record_mola import RECORD
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
def test_moe_peft_s_mola_computes_what_is_recorded_of_it(tmp_path: Path) -> None:
    """`test_recorded_mola` holds experts over a linear to the record."""
    found = tmp_path / "again.safetensors"
    command = [sys.executable, "-m", "benchmarks.peers.record_mola", str(found)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    again, recorded = load_file(found), load_file(RECORD)
    assert again.keys() == recorded.keys()
    for name, tensor in recorded.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-5, atol=1e-6)
