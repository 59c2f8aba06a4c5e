from dataclasses import fields

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from hecate.data.batches import Batch, block_diagonal_mask, collate, packed_samples, sequence_ranges
from hecate.data.sequences import PackedSequence, build_sequence, empty_sequence, piece_of
from hecate.data.stream import TrainStream
from tests.hecate.data.making import source_of_lengths


def test_collate_by_hand() -> None:
    source = [source_of_lengths([2, 3, 6])]
    sequences = [build_sequence(5, [piece_of(source, 0, 0), piece_of(source, 0, 1)], source), empty_sequence()]
    batch = collate(sequences, pad_id=99, seq_len=100)
    assert batch.input_ids.tolist() == [[0, 1, 1000, 1001, 1002, 99, 99, 99], [99] * 8]
    assert batch.targets.tolist() == [[1, 2, 1001, 1002, 1003, -100, -100, -100], [-100] * 8]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 0, 0, 0], [0] * 8]
    assert batch.segment_ids.tolist() == [[1, 1, 2, 2, 2, 0, 0, 0], [0] * 8]
    assert batch.token_ids.tolist() == [[500, 501, 502, 503, 504, -1, -1, -1], [-1] * 8]
    assert batch.task.tolist() == [[0] * 5 + [-1] * 3, [-1] * 8]
    assert batch.user is None
    assert {tensor.dtype for tensor in vars(batch).values() if tensor is not None} == {torch.int64}


def test_rows_are_padded_to_equal_parts() -> None:
    sequences = [empty_sequence()]
    assert [collate(sequences, 0, 100, parts).input_ids.shape[1] for parts in (1, 2, 3, 16)] == [8, 8, 24, 16]
    assert [collate(sequences, 0, 100, parts, multiple=64).input_ids.shape[1] for parts in (1, 3)] == [64, 192]


@pytest.mark.parametrize(
    ("sequences", "shares", "sizes"),
    [(8, (1, 1), [4, 4]), (8, (1, 1, 1), [3, 2, 3]), (8, (3, 3, 1, 1), [3, 3, 1, 1]), (2, (1, 1, 1), [1, 0, 1]), (5, (0, 1), [0, 5])],
)
def test_rows_are_shared_out(sequences: int, shares: tuple[float, ...], sizes: list[int]) -> None:
    ranges = sequence_ranges(sequences, shares)
    assert [len(mine) for mine in ranges] == sizes
    assert [sequence for mine in ranges for sequence in mine] == list(range(sequences))


@pytest.mark.parametrize(("longest", "width"), [(1, 8), (8, 8), (9, 16), (13, 16), (30, 32)])
def test_batch_is_as_wide_as_its_longest_row(longest: int, width: int) -> None:
    source = [source_of_lengths([1, longest])]
    sequences = [build_sequence(i, [piece_of(source, 0, i)], source) for i in range(2)]
    assert collate(sequences, pad_id=0, seq_len=30).input_ids.shape == (2, width)


def test_token_ids_are_unique_over_a_run() -> None:
    stream = TrainStream([source_of_lengths([3, 5, 9, 13] * 20)], seq_len=13, packing=True, sequences_per_step=4, seed=0)
    batches = [collate(stream.next_step(), pad_id=0, seq_len=13) for _ in range(30)]
    ids = torch.cat([batch.token_ids[batch.segment_ids > 0] for batch in batches])
    assert len(ids) > 1000
    assert len(ids.unique()) == len(ids)


def test_to_moves_every_tensor() -> None:
    source = [source_of_lengths([2, 3])]
    batch = collate([build_sequence(0, [piece_of(source, 0, 0), piece_of(source, 0, 1)], source)], pad_id=0, seq_len=8)
    moved = batch.to("meta")
    assert isinstance(moved, Batch)
    samples, kept = moved.layout.samples, batch.layout.samples
    assert samples is not None
    assert kept is not None
    of_layout = moved.layout.labelled, samples.segment_ids, samples.bounds
    of_batch = [tensor for field in fields(Batch) if (tensor := getattr(moved, field.name)) is not None]
    assert {tensor.device.type for tensor in (*of_batch, *of_layout)} == {"meta"}
    assert (samples.bounds.shape, samples.bounds.dtype, samples.longest) == (kept.bounds.shape, torch.int32, 3)
    assert moved.layout.labelled.shape == batch.layout.labelled.shape


def test_samples_by_hand() -> None:
    samples = packed_samples(torch.tensor([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 2, 3]]))
    assert samples.bounds.tolist() == [0, 2, 5, 6, 10, 11, 12]
    assert samples.longest == 4


def test_mask_by_hand() -> None:
    mask = block_diagonal_mask(torch.tensor([[1, 1, 2, 2, 0, 0]]))
    assert mask.shape == (1, 1, 6, 6)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def losses_by_sample(model: LlamaForCausalLM, sequences: list[PackedSequence]) -> dict[tuple[int, int], float]:
    """Summed loss of each sample in the sequences."""
    batch = collate(sequences, pad_id=0, seq_len=64)
    logits = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=block_diagonal_mask(batch.segment_ids),
    ).logits
    assert logits.isfinite().all()
    losses = cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none").view_as(batch.targets)
    return {
        sample: losses[b][batch.segment_ids[b] == segment].sum().item()
        for b, sequence in enumerate(sequences)
        for segment, sample in enumerate(sequence.samples, start=1)
    }


def test_packed_loss_equals_unpacked_loss() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12_000,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).double().eval()
    sources = [source_of_lengths([5, 17, 30, 3, 9, 21]), source_of_lengths([8, 11, 40, 6])]
    options = {"seq_len": 64, "sequences_per_step": 2, "seed": 0}
    packed_sequences = TrainStream(sources, packing=True, **options).next_step()
    assert all(len(sequence.samples) > 1 for sequence in packed_sequences)
    with torch.no_grad():
        packed = losses_by_sample(model, [*packed_sequences, empty_sequence()])
        for (source, sample), loss in packed.items():
            # The plain way: alone, unpadded, causal attention and positions by the model itself.
            tokens = sources[source][sample]
            logits = model(input_ids=torch.from_numpy(tokens.input_ids).long()[None]).logits[0]
            alone = cross_entropy(logits, torch.from_numpy(tokens.targets).long(), reduction="sum").item()
            assert loss == pytest.approx(alone, rel=1e-12)
