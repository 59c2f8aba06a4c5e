"""The server's step, beside torch's own optimizers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hecate.apps.federate.section.settings import ServerConfig
from hecate.apps.federate.server_optimizer import ServerState, load_server, save_server, server_step
from hecate.errors import UserError


def drawn(count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    source = torch.Generator().manual_seed(1)
    return [torch.randn(50, generator=source, dtype=torch.float64).to(dtype) for _ in range(count)]


def test_rounds_of_adamw_are_steps_of_torch(tmp_path: Path) -> None:
    """With the state written and read between them, and with nothing of what was given changed."""
    start, *deltas = drawn(5)
    settings = ServerConfig(optimizer="adamw", learning_rate=0.03, weight_decay=0.1)
    parameter = nn.Parameter(start.clone())
    reference = torch.optim.AdamW([parameter], lr=0.03, weight_decay=0.1)
    state = ServerState(start)
    for delta in deltas:
        before, given = state.vector.clone(), delta.clone()
        after = server_step(state, delta, settings)
        assert torch.equal(state.vector, before)
        assert torch.equal(delta, given)
        save_server(tmp_path / "server.safetensors", after)
        state = load_server(tmp_path / "server.safetensors")
        parameter.grad = -delta
        reference.step()
        torch.testing.assert_close(state.vector, parameter.detach(), rtol=1e-14, atol=1e-14)


def test_sgd_with_the_learning_rate_1_adds_the_mean_change_and_with_another_steps_as_torch() -> None:
    start, delta = drawn(2, torch.float32)
    assert torch.equal(server_step(ServerState(start), delta, ServerConfig()).vector, start + delta)
    parameter = nn.Parameter(start.clone())
    parameter.grad = -delta
    torch.optim.SGD([parameter], lr=0.3).step()
    stepped = server_step(ServerState(start), delta, ServerConfig(learning_rate=0.3)).vector
    torch.testing.assert_close(stepped, parameter.detach(), rtol=1e-6, atol=1e-7)


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "server.safetensors"
    with pytest.raises(UserError, match="state of the server cannot be read"):
        load_server(path)
    save_server(path, ServerState(torch.ones(3), {"exp_avg": torch.ones(2)}))
    with pytest.raises(UserError, match="is not the state of a server; it has exp_avg"):
        load_server(path)
