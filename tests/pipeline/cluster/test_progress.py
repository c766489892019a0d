from __future__ import annotations

import pytest

from pipeline.cluster.progress import Board, Progress


@pytest.mark.parametrize(
    ("progress", "rate"),
    [
        (Progress(), None),
        (Progress(done=4, first_done=4, first_s=9.0, last_s=9.0), None),  # nothing but the first part
        (Progress(done=24, first_done=4, first_s=9.0, last_s=19.0), 2.0),
    ],
)
def test_the_rate_leaves_the_start_out(progress: Progress, rate: float | None) -> None:
    assert progress.rate == rate


def test_the_board_sums_what_it_is_told() -> None:
    board = Board()
    board.add(decode_s=1.5)
    assert board.snapshot().first_s is None
    board.add(done=3, failures={"empty": 1}, encode_s=0.5)
    board.add(done=5, failures={"empty": 2, "not_found": 1}, label_s=2.0)
    progress = board.snapshot()
    assert (progress.done, progress.first_done) == (8, 3)
    assert progress.failures == {"empty": 3, "not_found": 1}
    assert (progress.decode_s, progress.label_s, progress.encode_s) == (1.5, 2.0, 0.5)
    assert (
        progress.first_s is not None and progress.last_s is not None and progress.first_s <= progress.last_s
    )
