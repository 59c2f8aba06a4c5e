"""The mock device itself: what it refuses, what it reports, and that its memory is no valid data before it is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
from tests.mock_cuda import install
install.install(devices=2)
import threading
import pytest
import torch
from tests.mock_cuda.waits import watching

def memory():
    fresh = torch.empty(3, device="cuda")
    assert fresh.isnan().all() and fresh.device == torch.device("cuda", 0)
    assert (torch.empty(2, dtype=torch.int64, device="cuda:1") == -1).all()
    before = torch.cuda.memory_allocated(1)
    held = torch.zeros(1000, device="cuda:1")
    assert torch.cuda.memory_allocated(1) - before == 4096, "4000 bytes in blocks of 512"
    del held
    assert torch.cuda.memory_allocated(1) == before
    assert torch.cuda.max_memory_allocated(1) >= before + 4096
    leaf = torch.ones(4, device="cuda")
    leaf.untyped_storage().resize_(0)
    leaf.untyped_storage().resize_(16)
    assert leaf.isnan().all(), "what was freed has come back"

def devices():
    here, there, host = (torch.ones(3, device=name) for name in ("cuda:0", "cuda:1", "cpu"))
    for other in (there, host):
        with pytest.raises(RuntimeError, match="on the same device|on one device"):
            here + other
        with pytest.raises(RuntimeError, match="on the same device|on one device"):
            torch.cat([here, other])
    with pytest.raises(RuntimeError, match="generator"):
        torch.empty(3, device="cuda").normal_(generator=torch.Generator())
    with torch.cuda.device(1):
        assert torch.empty(1, device="cuda").device.index == 1
    assert torch.cuda.current_device() == 0

def arithmetic():
    torch.manual_seed(0)
    host = torch.randn(5, 4, dtype=torch.float64)
    device = host.to("cuda")
    for compute in (
        lambda x: torch.softmax(x, 0)[1:, ::2].T @ x[1:],
        lambda x: x.view(2, 10).cumsum(1).topk(3)[0],
        lambda x: torch.where(x > 0, x, 0).index_add(0, torch.tensor([1, 1], device=x.device), x[:2]),
        lambda x: torch.stack(x.split(2, dim=1)).to(torch.bfloat16).float(),
    ):
        assert torch.equal(compute(device).cpu(), compute(host))
    numbers = torch.tensor([0, 2, 2], dtype=torch.int32, device="cuda")
    assert torch.histc(numbers, bins=3, min=0, max=2).tolist() == [1, 0, 2], "CUDA counts whole numbers, the CPU does not"
    norms()
    threads = set()
    weight = device.clone().requires_grad_()
    weight.register_hook(lambda grad: threads.add(threading.get_ident()))
    (weight ** 2).sum().backward()
    assert torch.equal(weight.grad.cpu(), 2 * host)
    assert threads and threading.get_ident() not in threads, "the backward pass of a GPU runs in a thread of its own"

def norms():
    # One operator a pass, and the values and gradients of the plain formula.
    rows, weight = torch.randn(5, 3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    own = lambda x, w: w * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.1)
    fused = lambda x, w: torch.nn.functional.rms_norm(x, (4,), w, 0.1)
    for trained in (True, False):
        results = []
        for compute, kind in ((own, "cpu"), (fused, "cuda")):
            x, w = rows.to(kind).requires_grad_(), weight.to(kind).requires_grad_(trained)
            with watching() as watched:
                (gradient,) = torch.autograd.grad(y := compute(x, w), x, torch.ones_like(y).cumsum(0), retain_graph=trained)
            results.append([y, gradient, *(torch.autograd.grad(y.square().sum(), w) if trained else ())])
        assert watched.operators["aten::_fused_rms_norm"] == watched.operators["aten::_fused_rms_norm_backward"] == 1
        assert set(watched.operators) <= {"aten::_fused_rms_norm", "aten::_fused_rms_norm_backward", "aten::fill_", "aten::cumsum"}
        for got, wanted in zip(*reversed(results), strict=True):
            torch.testing.assert_close(got.detach().cpu(), wanted.detach(), rtol=1e-13, atol=1e-14)
    assert fused(rows.cuda().bfloat16(), weight.cuda().bfloat16()).dtype == torch.bfloat16

def waits():
    device, pinned = torch.ones(4, device="cuda"), torch.ones(4).pin_memory()
    assert pinned.is_pinned() and not torch.ones(4).is_pinned()
    multiply = lambda: device.mul(2).add(1)
    for act, kind in (
        (lambda: device.sum().item(), "item"),
        (lambda: device.tolist(), "D2H"),
        (lambda: device.to("cpu", non_blocking=True), "D2H pinned"),
        (lambda: device.nonzero(), "waits"),
        (lambda: device[device > 0], "waits"),
        (lambda: device[torch.tensor([0, 1])], "H2D blocking"),
        (lambda: torch.ones(4).to("cuda"), "H2D blocking"),
        (lambda: torch.ones(4).to("cuda", non_blocking=True), "H2D pageable"),
        (lambda: pinned.to("cuda", non_blocking=True), "H2D pinned"),
        (lambda: torch.cuda.synchronize(), "synchronize"),
        (multiply, None),
    ):
        with watching() as watched:
            act()
        assert act is not multiply or watched.operators == {"aten::mul": 1, "aten::add": 1}, watched.operators
        assert set(watched.by_kind()) == ({kind} if kind else set()), (watched.by_kind(), kind)
        assert bool(watched.by_place()) == (kind not in (None, "H2D pinned", "D2H pinned"))

def streams():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() == stream
        torch.ones(2, device="cuda").record_stream(stream)
    assert torch.cuda.current_stream() == torch.cuda.default_stream() != stream
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(), end.record()
    stream.wait_event(stream.record_event())
    assert start.elapsed_time(end) >= 0

def optimizer():
    # Norm, clip and step are the CPU's to rounding, in as few operators for 40 experts as for two, and the host waits for none.
    from hecate.optim.adamw import AdamW
    from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables

    def trained(kind, experts):
        named = lambda prefix, count: {
            f"{prefix}.{i}": torch.nn.Parameter(torch.linspace(-1, 1, 6 + i, device=kind)) for i in range(count)
        }
        owned, replicated = named("0", experts), named("router", 3)
        rule = AdamW(weight_decay=0.1, exclude=("norms",))
        stepping = ExpertOptimizer(Trainables(owned, replicated), rule, LearningRate(0.1), torch.device(kind))
        norms = []
        for step in range(3):
            for number, one in enumerate([*owned.values(), *replicated.values()]):
                one.grad = None if (number, step) == (1, 0) else torch.full_like(one, 0.1 * (number + step + 1))
            with watching() as watched:
                squares = stepping.squares()
                norms.append(squares.sum().sqrt().item() if kind == "cpu" else float(squares.cpu().sum().sqrt()))
            before = dict(watched.operators)
            with watching() as watched:
                assert stepping.step(norms[-1], 0.5)
            assert not watched.by_place(), watched.by_place()
        counts = [float(state["step"]) for state in map(stepping.row, owned.values())]
        assert counts[:2] == [3, 2] and all(state["step"].device.type == "cpu" for state in map(stepping.row, owned.values()))
        return [one.detach().cpu() for one in (*owned.values(), *replicated.values())], norms, sum((before | watched.operators).values())

    operators = []
    for experts in (2, 40):
        (values, norms, number), (wanted, plain_norms, _) = trained("cuda", experts), trained("cpu", experts)
        for got, expected in zip([*values, *map(torch.tensor, norms)], [*wanted, *map(torch.tensor, plain_norms)]):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
        operators.append(number)
    assert operators[0] == operators[1] <= 30, operators
    print(operators)

for check in (memory, devices, arithmetic, waits, streams, optimizer):
    check()
    print("passed", check.__name__)
"""


@pytest.mark.slow
def test_what_the_device_does() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("passed") == 6
