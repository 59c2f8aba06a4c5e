"""Sequences to the tensors of one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate, pairwise
from math import lcm

import torch
from torch import Tensor

from hecate.data.encode import IGNORED
from hecate.data.sequences import PackedSequence


# Shapes: B sequences, S positions, N label tokens
@dataclass(frozen=True, eq=False)
class BatchLayout:
    """Where a batch has tokens and labels: what the host must know to start a forward pass."""

    is_token: Tensor  # bool [B, S], on the CPU; False at padding
    labelled: Tensor  # int64 [N], on the batch's device: indices in [B·S] of the positions with a label
    one_sample_each: bool  # no sequence has more than one sample


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch. S is the longest sequence's length rounded up to a multiple of 8, or more (`collate`); all tensors are int64."""

    input_ids: Tensor  # [B, S]; the pad id at padding
    targets: Tensor  # [B, S]; what position t is to predict, not to be shifted again; -100: nothing
    position_ids: Tensor  # [B, S]; from 0 in each sample; 0 at padding
    segment_ids: Tensor  # [B, S]; from 1, one a sample; 0 at padding
    token_ids: Tensor  # [B, S]; sequence number * seq_len + position in the sequence: unique over the run; -1 at padding
    task: Tensor  # [B, S]; index of the source; -1 at padding

    @cached_property
    def layout(self) -> BatchLayout:
        """Worked out on the CPU, before the batch moves to another device (`to`), where each of its questions would wait for the device."""
        is_token = (self.segment_ids > 0).cpu()
        labelled = (self.targets.flatten() != IGNORED).nonzero().squeeze(1)
        return BatchLayout(is_token, labelled, one_sample_each=bool((self.segment_ids <= 1).all()))

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`; from pinned memory without waiting."""
        moved = Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})
        # In the place where the property keeps what it has worked out.
        moved.__dict__["layout"] = replace(self.layout, labelled=copy_to(self.layout.labelled, torch.device(device)))
        return moved


def copy_to(indices: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` of a tensor that was just made on the CPU; the host does not wait for the device."""
    return (indices.pin_memory() if device.type == "cuda" else indices).to(device, non_blocking=True)


def sequence_ranges(num_sequences: int, shares: Sequence[float]) -> list[range]:
    """Consecutive sequences for each rank, as many as its share of the whole says: rounded where they end, so within one sequence of it.

    Some ranks get none where there are fewer sequences than ranks. A pure function: all ranks divide alike.
    """
    total = sum(shares)
    assert total > 0, shares
    assert min(shares) >= 0, shares
    ends = [round(num_sequences * part / total) for part in accumulate(shares)]
    return [range(start, end) for start, end in pairwise([0, *ends])]


def collate(sequences: Sequence[PackedSequence], pad_id: int, seq_len: int, parts: int = 1) -> Batch:
    """Pad sequences to one length, which `parts` divides. `seq_len` is the run's, not the batch's: it spaces the token ids."""
    assert sequences, "a batch needs sequences; a rank without any takes empty_sequence()"
    longest = max(len(sequence.input_ids) for sequence in sequences)
    assert longest <= seq_len, (longest, seq_len)
    step = lcm(8, parts)
    width = max(step, -(-longest // step) * step)
    shape = (len(sequences), width)
    batch = Batch(
        input_ids=torch.full(shape, pad_id),
        targets=torch.full(shape, IGNORED),
        position_ids=torch.zeros(shape, dtype=torch.int64),
        segment_ids=torch.zeros(shape, dtype=torch.int64),
        token_ids=torch.full(shape, -1),
        task=torch.full(shape, -1),
    )
    for b, sequence in enumerate(sequences):
        length = len(sequence.input_ids)
        batch.token_ids[b, :length] = sequence.number * seq_len + torch.arange(length)
        for name in ("input_ids", "targets", "position_ids", "segment_ids", "task"):
            getattr(batch, name)[b, :length] = torch.from_numpy(getattr(sequence, name))
    return batch


def block_diagonal_mask(segment_ids: Tensor) -> Tensor:
    """Who may attend to whom, bool [B, 1, S, S] (True: may): earlier positions of the same sample, and itself.

    Padding attends to itself only, so that its softmax stays finite. For scaled_dot_product_attention: transformers'
    eager attention adds its mask and needs 0 and -inf instead.
    """
    _, length = segment_ids.shape
    position = torch.arange(length, device=segment_ids.device)
    earlier = position[:, None] > position[None, :]
    itself = position[:, None] == position[None, :]
    same = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids[:, :, None] > 0)
    return ((same & earlier) | itself)[:, None]
