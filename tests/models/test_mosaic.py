from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.errors import MaskMillError
from models.labelmap import label_map
from models.mosaic import Mosaic, best_class, spread


def assemble(
    size: tuple[int, int],
    window: tuple[int, int],
    tops: list[int],
    lefts: list[int],
    scores: dict[tuple[int, int], torch.Tensor],
    network: tuple[int, int],
    rule=None,
    ids: dict[tuple[int, int], torch.Tensor] | None = None,
    classes: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The whole map, and the most bytes that were held."""
    classes = classes or len(scores[0, 0])
    mosaic = Mosaic(size, window, tops, lefts, num_classes=classes, rule=rule or best_class(None, 255))
    labels = torch.full(size, -1)
    confidence = torch.full(size, -1)
    held = 0
    for row, column in itertools.product(range(len(tops)), range(len(lefts))):
        block = mosaic.add(
            row, column, scores[row, column], network_size=network, ids=(ids or {}).get((row, column))
        )
        held = max(held, mosaic.held_bytes)
        area = (
            slice(tops[row], tops[row] + block.labels.shape[0]),
            slice(block.left, block.left + block.labels.shape[1]),
        )
        assert (labels[area] == -1).all(), "no pixel comes twice"
        labels[area], confidence[area] = block.labels.long(), block.confidence.long()
    assert mosaic.held_bytes == 0
    return labels, confidence, held


def canvas(size, window, tops, lefts, scores, network) -> torch.Tensor:
    """The mean scores (C, H, W), by plain means: every window resized twice and added to a whole canvas."""
    total = torch.zeros(len(scores[0, 0]), *size, dtype=torch.float64)
    count = torch.zeros(size, dtype=torch.float64)
    for (row, column), each in scores.items():
        part = F.interpolate(each[None].double(), network, mode="bilinear", align_corners=False)
        part = F.interpolate(part, window, mode="bilinear", align_corners=False)[0]
        area = (slice(tops[row], tops[row] + window[0]), slice(lefts[column], lefts[column] + window[1]))
        total[(slice(None), *area)] += part
        count[area] += 1
    return total / count


def windows_of(tops, lefts, shape, seed=0) -> dict[tuple[int, int], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        place: torch.randn(shape, generator=generator)
        for place in itertools.product(range(len(tops)), range(len(lefts)))
    }


@pytest.mark.parametrize(
    ("length", "window", "overlap"), [(10, 20, 3), (20, 20, 3), (21, 20, 3), (1000, 64, 0), (999, 64, 31)]
)
def test_spread_covers_the_axis(length: int, window: int, overlap: int) -> None:
    starts = spread(length, window, overlap)
    assert starts[0] == 0 and starts[-1] + min(window, length) == length
    assert all(window - (b - a) >= overlap for a, b in itertools.pairwise(starts))
    # One window less would not do.
    assert len(starts) == 1 or (len(starts) - 1) * (window - overlap) + overlap < length


@pytest.mark.parametrize(
    ("size", "window", "overlap"),
    [
        ((150, 210), (64, 64), 16),
        ((70, 70), (64, 64), 10),  # windows nearly on top of each other
        ((64, 300), (64, 64), 8),  # one row
        ((300, 50), (64, 50), 33),  # one column, three windows over some pixels
        ((130, 90), (64, 64), 50),
    ],
)
def test_equals_a_whole_canvas(size, window, overlap) -> None:
    tops, lefts = spread(size[0], window[0], overlap), spread(size[1], window[1], overlap)
    network, shape = (48, 40), (5, 6, 5)
    scores = windows_of(tops, lefts, shape)
    labels, confidence, _ = assemble(size, window, tops, lefts, scores, network)
    whole = canvas(size, window, tops, lefts, scores, network)
    top2 = whole.topk(2, dim=0).values
    clear = (top2[0] - top2[1]) > 1e-4  # ties fall either way
    assert clear.float().mean() > 0.99
    assert torch.equal(labels[clear], whole.argmax(0)[clear])
    right = (255 * whole.softmax(0).amax(0)).round().long()
    assert (confidence - right).abs().max() <= 1


def test_without_overlap_each_window_is_labelled_as_by_itself() -> None:
    size, window, network = (96, 128), (32, 32), (16, 16)
    tops, lefts = spread(96, 32, 0), spread(128, 32, 0)
    scores = windows_of(tops, lefts, (7, 4, 4))
    labels, confidence, _ = assemble(size, window, tops, lefts, scores, network)
    for (row, column), each in scores.items():
        area = (slice(tops[row], tops[row] + 32), slice(lefts[column], lefts[column] + 32))
        own, sure = label_map(each, network_size=network, image_size=window, temperature=1.0)
        assert torch.equal(labels[area], own.long())
        assert torch.equal(confidence[area], sure.long())


def test_one_window_is_the_plain_label_map() -> None:
    scores = windows_of([0], [0], (3, 9, 11))
    labels, confidence, _ = assemble((70, 90), (70, 90), [0], [0], scores, (36, 44))
    own, sure = label_map(scores[0, 0], network_size=(36, 44), image_size=(70, 90), temperature=1.0)
    assert torch.equal(labels, own.long())
    assert torch.equal(confidence, sure.long())


def test_thresholds_and_shares() -> None:
    scores = windows_of([0], [0], (3, 5, 5))
    limits = torch.tensor([0.5, 0.9, 0.2])
    labels, _, _ = assemble((40, 40), (40, 40), [0], [0], scores, (20, 20), best_class(limits, 200))
    own, _ = label_map(
        scores[0, 0],
        network_size=(20, 20),
        image_size=(40, 40),
        temperature=1.0,
        thresholds=limits,
        ignore_index=200,
    )
    assert torch.equal(labels, own.long())
    labels, sure, _ = assemble(
        (40, 40), (40, 40), [0], [0], scores, (20, 20), best_class(None, 255, share=True)
    )
    own, share = label_map(scores[0, 0], network_size=(20, 20), image_size=(40, 40), temperature=None)
    assert torch.equal(labels, own.long())
    assert torch.equal(sure, share.long())


def test_classes_that_a_window_lacks_have_its_lowest_score() -> None:
    # Left window: classes 0 and 3; right window: 1 and 3. Where they overlap, 3 is best in the mean.
    left = torch.stack([torch.full((2, 2), 2.0), torch.full((2, 2), 1.9)])
    right = torch.stack([torch.full((2, 2), 2.0), torch.full((2, 2), 1.9)])
    labels, _, _ = assemble(
        (8, 12),
        (8, 8),
        [0],
        [0, 4],
        {(0, 0): left, (0, 1): right},
        (8, 8),
        ids={(0, 0): torch.tensor([0, 3]), (0, 1): torch.tensor([1, 3])},
        classes=4,
    )
    assert labels[0].tolist() == [0] * 4 + [0] * 4 + [1] * 4
    left[1], right[1] = 1.99, 1.99
    left[0], right[0] = 2.0, 2.0
    left[1, 0, 0] = right[1, 0, 0] = 1.0  # the lowest of each window
    labels, _, _ = assemble(
        (8, 12),
        (8, 8),
        [0],
        [0, 4],
        {(0, 0): left, (0, 1): right},
        (8, 8),
        ids={(0, 0): torch.tensor([0, 3]), (0, 1): torch.tensor([1, 3])},
        classes=4,
    )
    assert labels[-1].tolist() == [0] * 4 + [3] * 4 + [1] * 4


def test_holds_a_strip_and_not_the_canvas() -> None:
    window, overlap, shape = 64, 8, (6, 8, 8)
    per_window = 4 * int(np.prod(shape))
    for rows in (4, 12):  # what is held does not grow with the image's height
        tops, lefts = spread(rows * 56 + 8, window, overlap), spread(20 * 56 + 8, window, overlap)
        scores = windows_of(tops, lefts, shape)
        _, _, held = assemble((rows * 56 + 8, 20 * 56 + 8), (window, window), tops, lefts, scores, (64, 64))
        # Of each column the cells of the overlap: two of eight, with the one that interpolation reads.
        assert held <= len(lefts) * per_window * 2 / 8 + 3 * per_window


def test_too_many_scores_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.mosaic.MOST_BYTES", 4 * 2 * 4 * 4 + 3)
    mosaic = Mosaic((8, 16), (8, 8), [0], [0, 8], num_classes=2, rule=best_class(None, 9))
    mosaic.add(0, 0, torch.zeros(2, 4, 4), network_size=(8, 8))  # let go, as nothing overlaps
    with pytest.raises(MaskMillError, match="fewer classes"):
        mosaic.add(0, 1, torch.zeros(2, 8, 8), network_size=(8, 8))


def test_scores_that_are_no_numbers_are_told() -> None:
    mosaic = Mosaic((8, 8), (8, 8), [0], [0], num_classes=2, rule=best_class(None, 9))
    with pytest.raises(MaskMillError, match="NaN"):
        mosaic.add(0, 0, torch.full((2, 2, 2), float("nan")), network_size=(8, 8))
