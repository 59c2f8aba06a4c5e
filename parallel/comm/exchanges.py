"""The exchanges that collectives are made of: an uneven all-to-all, and messages between pairs of ranks that follow it.

A collective over leaders is both. The second exchange starts by itself as soon as the first has arrived on this rank, without the caller:
on gloo in one of its threads, by a callback of the first one's future; on NCCL it is queued at once, on a stream that waits for the first.
Callbacks of two collectives may run in another order on another rank; the messages of a second exchange therefore carry a tag that belongs
to the collective. NCCL has no tags and needs none: its exchanges run in the order of the calls.

Shapes: M chunks sent or received by this rank, C elements of a chunk.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.parallel.transfer.routes import PeerChunks
from hecate.parallel.transfer.transfer_plan import Exchange

all_gather_single = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
"""torch's gather of one tensor from each rank into one; torch 2.13 has given it this name and warns of the older one"""


class FirstExchange:
    """One uneven all-to-all of the chunks of one or more layers. Every rank must start it, in the same order, with the same layers."""

    def __init__(self, layers: Sequence[Exchange], group: dist.ProcessGroup) -> None:
        world = dist.get_world_size(group)
        assert all(len(exchange.sent.count_D) == world for exchange in layers), world
        self._layers = layers
        self._idle = all(exchange.idle for exchange in layers)
        self._group = group
        self._widths: list[int] = []
        self._buffer: Tensor | None = None
        self.bytes_to = [0] * world
        self.work: dist.Work | None = None
        """The all-to-all under way; None where no rank sends anything."""

    def start(self, rows: Sequence[Tensor]) -> None:
        """Args:
        rows: per layer [M, C], the chunks to be sent.
        """
        assert len({(r.dtype, r.device) for r in rows}) <= 1, [(r.dtype, r.device) for r in rows]
        self._widths = [r.shape[1] for r in rows]
        if not rows:
            return
        send_counts = [sum(lengths) for lengths in self._lengths([exchange.sent for exchange in self._layers])]
        recv_counts = [sum(lengths) for lengths in self._lengths([exchange.received for exchange in self._layers])]
        self.bytes_to = [count * rows[0].element_size() for count in send_counts]
        self._buffer = rows[0].new_empty(sum(recv_counts))
        # Left out only where no rank sends: a rank with nothing to send still takes part, or the others would wait for it.
        if not self._idle:
            self.work = dist.all_to_all_single(
                self._buffer, self._by_peer(rows), recv_counts, send_counts, group=self._group, async_op=True
            )

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()

    def arrived(self, layer: int = 0) -> Tensor:
        """[M, C]: the chunks of a layer that have arrived; after `wait`."""
        assert self._buffer is not None, "arrived() before start()"
        width, layers = self._widths[layer], len(self._widths)
        if layers == 1:
            return self._buffer.view(-1, width)
        lengths = itertools.chain.from_iterable(self._lengths([exchange.received for exchange in self._layers]))
        return torch.cat(self._buffer.split(list(lengths))[layer::layers]).view(-1, width)

    def _lengths(self, layers: Sequence[PeerChunks]) -> list[list[int]]:
        """[peer][layer]: elements for, or from, each peer."""
        by_peer = zip(*(chunks.count_D for chunks in layers), strict=True)
        return [[count * width for count, width in zip(counts, self._widths, strict=True)] for counts in by_peer]

    def _by_peer(self, rows: Sequence[Tensor]) -> Tensor:
        """The chunks of all layers in one flat buffer: by peer, then by layer, then by expert."""
        if len(rows) == 1:
            return rows[0].flatten()
        split = [layer_rows.split(exchange.sent.count_D) for layer_rows, exchange in zip(rows, self._layers, strict=True)]
        return torch.cat([piece.flatten() for pieces in zip(*split, strict=True) for piece in pieces])


_tags: WeakKeyDictionary[dist.ProcessGroup, Iterator[int]] = WeakKeyDictionary()


def _next_tag(group: dist.ProcessGroup) -> int:
    """The next tag, which is the same on every rank because all ranks call a group's collectives in the same order; it has 65536 values."""
    return next(_tags.setdefault(group, itertools.cycle(range(2**16))))


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU for all second exchanges. One, because torch keeps the memory that a stream has freed for that stream."""
    return torch.cuda.Stream(device)


class SecondExchange:
    """Messages between pairs of ranks; a rank without any does nothing. Every rank must make it, in the same order."""

    def __init__(self, exchange: Exchange, group: dist.ProcessGroup, like_nC: Tensor) -> None:
        self._exchange = exchange
        # Made on the caller's stream: NCCL fills it on another, but it is read, and freed, on the caller's.
        self.buffer_MC = like_nC.new_empty((len(exchange.received.expert_M), like_nC.shape[1]))
        """[M, C]: the chunks that have arrived"""
        chunk_bytes = like_nC.shape[1] * like_nC.element_size()
        self.bytes_to = [count * chunk_bytes for count in exchange.sent.count_D]
        self._group = group
        self._tag = _next_tag(group)
        by_nccl = dist.get_backend(group) == dist.Backend.NCCL
        self._on_side_stream = like_nC.is_cuda and by_nccl
        # gloo has collectives for GPU tensors, but no messages, and its callbacks do not order streams.
        self._through_host = like_nC.is_cuda and not by_nccl
        self._works: list[dist.Work] = []

    def follow(self, first: FirstExchange, rows: Callable[[], Tensor]) -> Callable[[], None]:
        """Have it started when `first` has arrived, with the chunks [M, C] that `rows` makes then; returns what waits for both.

        On NCCL `rows` runs on another stream, which has waited for what was queued before `first` was started, and for `first`. With GPU
        tensors on gloo nothing is started before the wait, which every rank with messages must then call, in the same order.
        """
        messages = bool(self._exchange.sent.pieces or self._exchange.received.pieces)
        if first.work is None:
            assert not messages
            return lambda: None
        if not messages:
            return first.wait
        if self._on_side_stream:
            return self._follow_on_side_stream(first.work, rows)
        if self._through_host:
            return lambda: self._follow_through_host(first, rows)

        def start(done: torch.futures.Future) -> None:
            done.value()  # raises if the first exchange failed
            self._start(rows(), self.buffer_MC)

        started = first.work.get_future().then(start)

        def arrive() -> None:
            started.wait()  # first, since it is `start` that makes the works; it also raises what went wrong in it
            for work in self._works:
                work.wait()

        return arrive

    def _follow_on_side_stream(self, first: dist.Work, rows: Callable[[], Tensor]) -> Callable[[], None]:
        device = self.buffer_MC.device
        side, done = _side_stream(device), torch.cuda.Event()
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            first.wait()
            self._start(rows(), self.buffer_MC)
            for work in self._works:  # what `rows` has made is this stream's memory, and may be used again only after the sends
                work.wait()
            done.record(side)
        return lambda: torch.cuda.current_stream(device).wait_event(done)

    def _follow_through_host(self, first: FirstExchange, rows: Callable[[], Tensor]) -> None:
        first.wait()
        arriving_MC = torch.empty_like(self.buffer_MC, device="cpu")
        self._start(rows().cpu(), arriving_MC)
        for work in self._works:
            work.wait()
        self.buffer_MC.copy_(arriving_MC)

    def _start(self, rows_MC: Tensor, arriving_MC: Tensor) -> None:
        directions = ((dist.isend, rows_MC, self._exchange.sent), (dist.irecv, arriving_MC, self._exchange.received))
        operations = [
            dist.P2POp(operation, rows[piece], group=self._group, tag=self._tag, group_peer=peer)
            for operation, rows, chunks in directions
            for peer, piece in chunks.pieces
        ]
        self._works = dist.batch_isend_irecv(operations)
