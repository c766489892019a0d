from __future__ import annotations

import pytest

from pipeline.cluster.progress import Progress


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


def test_progress_sums_what_parts_report() -> None:
    progress = Progress()
    progress = progress.plus(done=3, failures={"empty": 1}, at_s=2.0, decode_s=1.5, label_s=0.0, encode_s=0.5)
    progress = progress.plus(
        done=5, failures={"empty": 2, "not_found": 1}, at_s=4.0, decode_s=0.0, label_s=2.0, encode_s=0.0
    )
    assert (progress.done, progress.first_done, progress.first_s, progress.last_s) == (8, 3, 2.0, 4.0)
    assert progress.failures == {"empty": 3, "not_found": 1}
    assert (progress.decode_s, progress.label_s, progress.encode_s) == (1.5, 2.0, 0.5)
    assert progress.rate == 2.5
