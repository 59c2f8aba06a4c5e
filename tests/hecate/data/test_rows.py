from hecate.data.pack import Piece
from hecate.data.rows import build_row, empty_row, piece_of
from tests.hecate.data.files import source_of_lengths


def test_row_of_two_sources_by_hand() -> None:
    sources = [source_of_lengths([2, 3]), source_of_lengths([2])]
    row = build_row(7, [Piece(0, 1, 3), Piece(1, 0, 2)], sources)
    assert row.number == 7
    assert row.input_ids.tolist() == [1000, 1001, 1002, 0, 1]
    assert row.targets.tolist() == [1001, 1002, 1003, 1, 2]
    assert row.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert row.segment_ids.tolist() == [1, 1, 1, 2, 2]
    assert row.task.tolist() == [0, 0, 0, 1, 1]
    assert row.samples == ((0, 1), (1, 0))


def test_piece_knows_its_length() -> None:
    assert piece_of([source_of_lengths([4]), source_of_lengths([2, 3])], 1, 1) == Piece(1, 1, 3)


def test_empty_row() -> None:
    row = empty_row()
    assert (row.number, row.samples, row.input_ids.tolist(), row.task.tolist()) == (-1, (), [], [])
