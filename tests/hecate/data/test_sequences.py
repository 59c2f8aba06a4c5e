from hecate.data.pack import Piece
from hecate.data.sequences import build_sequence, empty_sequence, piece_of
from tests.hecate.data.making import source_of_lengths


def test_row_of_two_sources_by_hand() -> None:
    sources = [source_of_lengths([2, 3]), source_of_lengths([2])]
    sequence = build_sequence(7, [Piece(0, 1, 3), Piece(1, 0, 2)], sources)
    assert sequence.number == 7
    assert sequence.input_ids.tolist() == [1000, 1001, 1002, 0, 1]
    assert sequence.targets.tolist() == [1001, 1002, 1003, 1, 2]
    assert sequence.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert sequence.segment_ids.tolist() == [1, 1, 1, 2, 2]
    assert sequence.task.tolist() == [0, 0, 0, 1, 1]
    assert sequence.samples == ((0, 1), (1, 0))


def test_piece_knows_its_length() -> None:
    assert piece_of([source_of_lengths([4]), source_of_lengths([2, 3])], 1, 1) == Piece(1, 1, 3)


def test_empty_row() -> None:
    sequence = empty_sequence()
    assert (sequence.number, sequence.samples, sequence.input_ids.tolist(), sequence.task.tolist()) == (-1, (), [], [])
