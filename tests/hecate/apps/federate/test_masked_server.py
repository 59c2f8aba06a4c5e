"""What becomes of the server's numbers that no client sees, because `rounds.codec.down` leaves them out."""

from __future__ import annotations

import torch
from torch import Tensor

from hecate.apps.federate.codec import decode, encode
from hecate.apps.federate.section.settings import ServerConfig
from hecate.apps.federate.server_optimizer import ServerState, server_step

CLIENTS, HIDDEN, RANK, LAYERS, ROUNDS = 5, 128, 8, 4, 6
NUMEL = LAYERS * HIDDEN * RANK


def masked(vector: Tensor, density: float) -> Tensor:
    """What goes down, or up, of a vector."""
    return decode(encode(vector, density), len(vector))


def test_a_number_that_does_not_go_down_is_asked_for_again_in_each_round() -> None:
    """The client wants 1.0 and 0.9, sees only the larger of the server's numbers, and takes the other for 0.

    So the server's number goes past what is wanted, until it is the larger one, and then the other one does.
    """
    wanted, state, found = torch.tensor([1.0, 0.9]), ServerState(torch.zeros(2)), []
    for _ in range(5):
        state = server_step(state, wanted - masked(state.vector, 0.5), ServerConfig())
        found.append([round(one, 6) for one in state.vector.tolist()])
    assert found == [[1.0, 0.9], [1.0, 1.8], [2.0, 0.9], [1.0, 1.8], [2.0, 0.9]]


class Regression:
    """Five clients with a task each: B of four layers over fixed A, of which each task has a part of its own and a part that all have."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.a = [(2 * torch.rand(RANK, HIDDEN, generator=self.random) - 1) / HIDDEN**0.5 for _ in range(LAYERS)]
        self.base = [self.normal(HIDDEN, HIDDEN) / HIDDEN**0.5 for _ in range(LAYERS)]
        shared = 0.02 * self.normal(NUMEL)
        self.wanted = [shared + 0.02 * self.normal(NUMEL) for _ in range(CLIENTS)]
        self.inputs = [self.normal(HIDDEN, HIDDEN // CLIENTS) for _ in range(CLIENTS)]
        self.held_out = [self.batch(client, 256) for client in range(CLIENTS)]

    def normal(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=self.random)

    def output(self, x_TD: Tensor, vector: Tensor) -> Tensor:
        for base_DD, a_rD, b_Dr in zip(self.base, self.a, vector.view(LAYERS, HIDDEN, RANK), strict=True):
            x_TD = torch.tanh(x_TD @ (base_DD + 2.0 * b_Dr @ a_rD).T)
        return x_TD

    def batch(self, client: int, tokens: int) -> tuple[Tensor, Tensor]:
        x_TD = self.normal(tokens, HIDDEN // CLIENTS) @ self.inputs[client].T / (HIDDEN // CLIENTS) ** 0.5
        return x_TD, self.output(x_TD, self.wanted[client])

    def loss(self, vector: Tensor) -> float:
        return sum(float(((self.output(x_TD, vector) - y_TD) ** 2).mean()) for x_TD, y_TD in self.held_out) / CLIENTS

    def trained(self, client: int, begun: Tensor) -> Tensor:
        """After ten of the client's steps."""
        vector = begun.clone().requires_grad_()
        optimizer = torch.optim.AdamW([vector], lr=4e-3, weight_decay=0.0)
        for _ in range(10):
            x_TD, y_TD = self.batch(client, 32)
            optimizer.zero_grad()
            ((self.output(x_TD, vector) - y_TD) ** 2).mean().backward()
            optimizer.step()
        return vector.detach()


def rounds(density: float) -> list[tuple[float, float]]:
    """After each round the losses of the server's whole vector, and of what of it goes down."""
    regression, state, found = Regression(0), ServerState(torch.zeros(NUMEL)), []
    for _ in range(ROUNDS):
        begun = masked(state.vector, density)
        changes = [masked(regression.trained(client, begun) - begun, density) for client in range(CLIENTS)]
        state = server_step(state, torch.stack(changes).mean(0), ServerConfig(optimizer="adamw", learning_rate=1e-2))
        found.append((regression.loss(state.vector), regression.loss(masked(state.vector, density))))
    return found


def test_the_whole_vector_grows_worse_from_round_to_round_and_what_goes_down_does_not() -> None:
    """As in benchmarks/results/federated.json, density 1/4 is worse than 0.1 by the whole vector. By what goes down, it is better."""
    quarter, tenth = rounds(0.25), rounds(0.1)
    whole, down = ([one[which] for one in quarter] for which in (0, 1))
    assert whole[-1] > 2 * min(whole)
    assert down[-1] < 1.3 * min(down)
    assert quarter[-1][0] > 1.2 * tenth[-1][0]
    assert quarter[-1][1] < tenth[-1][1]
