from __future__ import annotations

from jobs.labelling.estimate import Estimate, size
from pipeline.cluster.progress import Progress


def _after(seconds: float, done: int) -> Progress:
    return Progress(done=done, first_s=20, last_s=20 + seconds, first_done=100, written=done * 20_000)


def test_it_is_told_once_after_the_first_minute() -> None:
    said: list[str] = []
    estimate = Estimate(1_000_000, said.append)
    for progress in (Progress(), _after(1, 200), _after(59, 6000)):
        estimate.update(progress)
    assert not said
    estimate.update(_after(60, 6100))
    estimate.update(_after(90, 9100))
    # 993,900 images are left, at 100 a second; all of them take 20 KB each.
    assert said == [
        "Estimate for 1,000,000 images: 2 h 45 min more at 100.0 images/s, 20 GB on disk (20 KB an image)"
    ]


def test_a_cluster_is_told_its_machine_hours() -> None:
    said: list[str] = []
    Estimate(726_100, said.append, lambda: 4).update(_after(60, 6100))
    assert said[0].endswith("8.1 machine-hours on 4 node(s)")  # 4 x (80 s + 7,200 s)


def test_nothing_is_said_at_the_end_of_a_short_run() -> None:
    said: list[str] = []
    Estimate(6100, said.append).update(_after(61, 6100))
    assert not said


def test_sizes() -> None:
    assert [size(count) for count in (0, 999, 1000, 2.5e9, 1e18)] == [
        "0 bytes", "999 bytes", "1 KB", "2.5 GB", "1e+03 PB",
    ]  # fmt: skip
