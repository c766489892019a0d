from __future__ import annotations

import math

import pytest

from pipeline.metrics.names import is_share, percent


@pytest.mark.parametrize(
    ("share", "text", "signed"),
    [
        (0.6861, "68.6", "+68.6"),
        (0.0384, "3.8", "+3.8"),
        (-0.0321, "-3.2", "-3.2"),
        (0.0, "0.0", "0.0"),
        (-0.0004, "0.0", "0.0"),
        (1.0, "100.0", "+100.0"),
        (None, "–", "–"),
        (math.nan, "–", "–"),
        (math.inf, "–", "–"),
    ],
)
def test_scores_are_read_in_percent_with_one_digit(share: float | None, text: str, signed: str) -> None:
    assert percent(share) == text
    assert percent(share, sign=True) == signed


@pytest.mark.parametrize(
    ("key", "is_one"),
    [
        ("miou", True),
        ("iou_fg_standard", True),
        ("iou/cat", True),
        ("boundary_iou/images_per_second", True),  # a class of that name
        ("final/iou", True),
        ("heads/maskclip/miou", True),
        ("mean_quality", True),
        ("loss", False),
        ("images_per_second", False),
        ("failed/truncated", False),
        ("final/learning_rate", False),
    ],
)
def test_which_metrics_are_shares(key: str, is_one: bool) -> None:
    assert is_share(key) == is_one
