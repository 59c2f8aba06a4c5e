"""Measures how fast this rank's device is during training, independently of the other ranks."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from hecate import faults
from hecate.experts.linear import MoeLinear
from hecate.model.gated_ffn import decoder_layers
from hecate.model.moe_model import MoeModel
from hecate.report.events import DenseWork


class LayerTimer:
    """Times each decoder layer of a training step from its beginning to its experts: norms and attention, which wait for no other rank.

    Where the linears have experts, which may have to wait at each of them, what is timed is the linears' own products.

    Evaluation and generation, which run without gradients, are not timed. On a GPU the times come from events that are read by `take`
    only, so a layer does not wait for the device.
    """

    def __init__(self, moe: MoeModel, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._started: Any = None
        self._spans: list[tuple[Any, Any]] = []
        self._seconds, self._tokens = 0.0, 0
        layers = decoder_layers(moe.model)[1]
        for unit, experts in moe.layers.items():
            if isinstance(experts, MoeLinear):
                experts.linear.register_forward_pre_hook(self._begin)
                experts.linear.register_forward_hook(self._end)
            else:
                layers[unit.layer].register_forward_pre_hook(self._begin)
                experts.register_forward_pre_hook(self._end)

    def take(self) -> DenseWork:
        """The work since the last call."""
        if self._spans:
            # `elapsed_time` raises if an event is not done. At the end of a step the host has waited for all of them, so this rarely waits.
            if not self._spans[-1][1].query():
                self._spans[-1][1].synchronize()
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._spans) / 1000
            self._spans.clear()
        taken = DenseWork(self._tokens, self._seconds)
        self._tokens, self._seconds = 0, 0.0
        return taken

    def _begin(self, _module: nn.Module, _inputs: Any) -> None:
        self._started = self._now() if torch.is_grad_enabled() else None
        faults.at("layer")

    def _end(self, _module: nn.Module, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor | None = None) -> None:
        if self._started is None:
            return
        ended = self._now()
        if self._cuda:
            self._spans.append((self._started, ended))
        else:
            self._seconds += ended - self._started
        self._tokens += inputs[0].numel() // inputs[0].shape[-1]
        self._started = None

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
