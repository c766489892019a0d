from __future__ import annotations

import pytest

from pipeline.cluster.progress import Progress, TimeLeft


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
    more = progress.plus(
        done=1,
        failures={},
        at_s=5.0,
        decode_s=0.5,
        label_s=0.0,
        encode_s=0.5,
        fetch_s=0.25,
        write_s=0.125,
        batches=0.5,
    )  # fmt: skip
    assert (more.fetch_s, more.write_s, more.batches) == (0.25, 0.125, 0.5)
    assert progress.rate == 2.5


def _estimates(reports: list[tuple[float, int]], total: int) -> list[tuple[float, float | None]]:
    left = TimeLeft(total)
    found = []
    for at_s, done in reports:
        left.update(done, at_s)
        found.append((at_s, left.seconds(at_s)))
    return found


def test_the_estimate_follows_the_work_of_the_last_minute() -> None:
    # A slow start, then parts that double in size, as labelling reports them, at 4 images a second.
    reports, done, at_s = [(25.0, 1)], 1, 25.0
    for size in (2, 4, 8, 16, *[32] * 25):
        done, at_s = done + size, at_s + size / 4
        reports.append((at_s, done))
    estimates = _estimates(reports, done)
    assert [seconds for at, seconds in estimates if at < 35] == [None] * 5  # warm-up
    known = [(at, seconds) for at, seconds in estimates if seconds is not None]
    assert len(known) > 20
    for at, seconds in known:
        assert seconds == pytest.approx(at_s - at, abs=1e-6)
    assert estimates[-1][1] is None  # it does not say "0 s left" of what is done


def test_an_estimate_does_not_jump_when_work_comes_in_bursts() -> None:
    # Two workers finish 32 images each at about the same time, every 16 seconds.
    reports = [(16.0 * burst + worker, 64 * burst + 32 * worker) for burst in range(20) for worker in (0, 1)]
    known = [(at, seconds) for at, seconds in _estimates(reports, 64 * 20) if seconds is not None]
    ratios = [seconds / max(1.0, 320 - at) for at, seconds in known if at < 280]
    assert min(ratios) > 0.7 and max(ratios) < 1.4


def test_a_slower_second_half_shows_within_a_minute() -> None:
    reports = [(float(at), at) for at in range(100)] + [(100.0 + 4 * n, 100 + n) for n in range(20)]
    (_, seconds) = _estimates(reports, 200)[-1]
    assert seconds == pytest.approx(4 * (200 - 119), rel=0.1)


def test_work_that_is_repeated_after_a_restart_starts_the_estimate_anew() -> None:
    left = TimeLeft(1000)
    for step in range(0, 600, 20):
        left.update(step, step / 10)
    assert left.seconds(58.0) == pytest.approx(42.0)
    left.update(400, 90.0)
    assert left.seconds(90.0) is None


def test_time_passes_between_reports() -> None:
    left = TimeLeft(100)
    for done in range(0, 60, 10):
        left.update(done, float(done))
    assert left.seconds(50.0) == pytest.approx(50.0) and left.seconds(57.0) == pytest.approx(43.0)
    assert left.seconds(500.0) == 0.0
