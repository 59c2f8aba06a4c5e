"""Turn sequences into the padded tensors of one forward pass, and share a step's sequences out among the ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate, pairwise
from math import lcm

import torch
from torch import Tensor
from torch.nn.functional import pad

from hecate.data.encode import IGNORED
from hecate.data.sequences import PackedSequence
from hecate.parallel.comm.device_tables import copy_to


# Shapes: B sequences, S positions, N label tokens
@dataclass(frozen=True, eq=False)
class PackedSamples:
    """Where the samples of packed sequences lie. The padding of a sequence counts as a sample of its own."""

    segment_ids: Tensor  # int64 [B, S]; as in `Batch`
    bounds: Tensor  # int32 [M + 1]; where in [B·S] each of the M samples begins, and B·S
    longest: int  # the most positions of a sample


def packed_samples(segment_ids: Tensor) -> PackedSamples:
    """The samples of sequences with these segment ids, [B, S], on the CPU."""
    begins = torch.ones_like(segment_ids, dtype=torch.bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    bounds = pad(begins.flatten().nonzero().squeeze(1), (0, 1), value=segment_ids.numel())
    return PackedSamples(segment_ids, bounds.to(torch.int32), int(bounds.diff().max()))


@dataclass(frozen=True, eq=False)
class BatchLayout:
    """The positions of tokens and labels in a batch, which the host needs to start a forward pass."""

    is_token: Tensor  # bool [B, S], on the CPU; False at padding
    labelled: Tensor  # int64 [N], on the batch's device: indices in [B·S] of the positions with a label
    samples: PackedSamples | None  # on the batch's device; None: no sequence has more than one sample
    most_samples: int  # the most samples of a sequence, at least 1


@dataclass(frozen=True, eq=False)
class Batch:
    """The int64 tensors of one micro-batch, and its routing. `collate` pads every sequence to the same length S."""

    input_ids: Tensor  # [B, S]; the pad id at padding
    targets: Tensor  # [B, S]; the token that each position is to predict, already shifted; -100: none
    position_ids: Tensor  # [B, S]; the position within the sample, from 0; 0 at padding
    segment_ids: Tensor  # [B, S]; the sample's number within the sequence, from 1; 0 at padding
    token_ids: Tensor  # [B, S]; sequence number * seq_len + position in the sequence; -1 at padding
    task: Tensor  # [B, S]; the index of the sample's source; -1 at padding
    user: Tensor | None = None  # [B, S]; the row of the sample's user in the features; -1 at padding; None: no sample has a user
    routed: Tensor | None = None  # int16 [B, S, MoE layers, top_k]: the experts that samples name for their tokens; 0 at padding

    @cached_property
    def layout(self) -> BatchLayout:
        """The layout, computed on the CPU before `to` moves the batch, because the host would have to wait for a GPU's answers."""
        is_token = (self.segment_ids > 0).cpu()
        labelled = (self.targets.flatten() != IGNORED).nonzero().squeeze(1)
        most = max(1, int(self.segment_ids.max()))
        return BatchLayout(is_token, labelled, None if most == 1 else packed_samples(self.segment_ids), most)

    def to(self, device: torch.device | str) -> "Batch":
        """Return this batch, which must be on the CPU, on `device`. The host does not wait for a GPU: the tensors go there in a few copies
        from pinned memory.
        """
        device = torch.device(device)
        assert self.input_ids.device.type == "cpu", self.input_ids.device
        if device.type == "cpu":
            return self
        names = [f.name for f in fields(self) if f.name != "routed" and getattr(self, f.name) is not None]
        stacked = copy_to(torch.stack([getattr(self, name) for name in names]), device)
        routed = None if self.routed is None else copy_to(self.routed, device)
        moved = Batch(**dict(zip(names, stacked.unbind(), strict=True)), routed=routed)
        # `cached_property` stores its value here, so the device copy is not computed from device tensors.
        moved.__dict__["layout"] = _moved_layout(self.layout, moved.segment_ids)
        return moved


def _moved_layout(layout: BatchLayout, segment_ids: Tensor) -> BatchLayout:
    """The layout with its tensors on the device of the batch's `segment_ids`, in one copy."""
    if layout.samples is None:
        return replace(layout, labelled=copy_to(layout.labelled, segment_ids.device))
    sizes = [len(layout.labelled), len(layout.samples.bounds)]
    labelled, bounds = copy_to(torch.cat([layout.labelled, layout.samples.bounds]), segment_ids.device).split(sizes)
    return replace(layout, labelled=labelled, samples=replace(layout.samples, segment_ids=segment_ids, bounds=bounds.to(torch.int32)))


def sequence_ranges(num_sequences: int, shares: Sequence[float]) -> list[range]:
    """Divide `num_sequences` sequences into one consecutive range per rank, in proportion to `shares`.

    The ends of the ranges are rounded, so each range is within one sequence of its share; where there are fewer sequences than
    ranks, some ranges are empty. All ranks compute the same division.
    """
    total = sum(shares)
    assert total > 0, shares
    assert min(shares) >= 0, shares
    ends = [round(num_sequences * part / total) for part in accumulate(shares)]
    return [range(start, end) for start, end in pairwise([0, *ends])]


def collate(sequences: Sequence[PackedSequence], pad_id: int, seq_len: int, parts: int = 1, multiple: int = 8) -> Batch:
    """Stack sequences into a batch, padded to one length S that is a multiple of `multiple` and of `parts`.

    `seq_len` is the run's maximum, not this batch's: it spaces the token ids.
    """
    assert sequences, "a batch needs sequences; a rank without any passes empty_sequence()"
    longest = max(len(sequence.input_ids) for sequence in sequences)
    assert longest <= seq_len, (longest, seq_len)
    step = lcm(multiple, parts)
    width = max(step, -(-longest // step) * step)
    shape = (len(sequences), width)
    routed = next((sequence.routed for sequence in sequences if sequence.routed is not None), None)
    batch = Batch(
        input_ids=torch.full(shape, pad_id),
        targets=torch.full(shape, IGNORED),
        position_ids=torch.zeros(shape, dtype=torch.int64),
        segment_ids=torch.zeros(shape, dtype=torch.int64),
        token_ids=torch.full(shape, -1),
        task=torch.full(shape, -1),
        user=torch.full(shape, -1) if any(sequence.user is not None for sequence in sequences) else None,
        routed=None if routed is None else torch.zeros(*shape, *routed.shape[1:], dtype=torch.int16),
    )
    for b, sequence in enumerate(sequences):
        length = len(sequence.input_ids)
        batch.token_ids[b, :length] = sequence.number * seq_len + torch.arange(length)
        for name in ("input_ids", "targets", "position_ids", "segment_ids", "task"):
            getattr(batch, name)[b, :length] = torch.from_numpy(getattr(sequence, name))
        if batch.user is not None and sequence.user is not None:
            batch.user[b, :length] = torch.from_numpy(sequence.user)
        if batch.routed is not None and sequence.routed is not None:
            batch.routed[b, :length] = torch.from_numpy(sequence.routed)
    return batch


def block_diagonal_mask(segment_ids: Tensor) -> Tensor:
    """Return the causal attention mask of packed samples, bool [B, 1, S, S]; True: the query may attend to the key.

    A position attends to itself and to earlier positions of its own sample. Padding attends to itself only, which keeps its
    softmax finite. The mask is for `scaled_dot_product_attention`. transformers makes its own masks.
    """
    _, length = segment_ids.shape
    position = torch.arange(length, device=segment_ids.device)
    earlier = position[:, None] > position[None, :]
    itself = position[:, None] == position[None, :]
    same = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids[:, :, None] > 0)
    return ((same & earlier) | itself)[:, None]
