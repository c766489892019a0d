from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.training.maskclip_plus.thresholds import LEVELS, class_thresholds, confidence_counts

C = 5


def _guesses(seed: int, count: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """Guesses of classes 0 to 3 (never 4) with increasing confidence."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, C - 1, (count,), generator=generator)
    confidence = (0.35 + 0.15 * classes + 0.2 * torch.rand(count, generator=generator)).clamp(0, 1)
    return classes, confidence


def test_counts_are_correct_and_additive():
    classes, confidence = _guesses(0)
    expected = np.zeros((C, LEVELS), np.int64)
    for c, p in zip(classes.tolist(), confidence.tolist(), strict=True):
        expected[c, int(np.rint(np.float32(p) * np.float32(255)))] += 1
    whole = confidence_counts(classes, confidence, C)
    parts = [
        confidence_counts(classes[part], confidence[part], C) for part in (slice(1500), slice(1500, None))
    ]
    assert np.array_equal(whole, expected)
    assert torch.equal(whole, parts[0] + parts[1])
    assert torch.equal(confidence_counts(classes[:0], confidence[:0], C), torch.zeros(C, LEVELS).long())


@pytest.mark.parametrize("base", [0.0, 0.5, 0.8, 1.0])
def test_fixed_is_one_threshold_for_all(base):
    counts = confidence_counts(*_guesses(1), C)
    assert class_thresholds(counts, base, rule="fixed").tolist() == pytest.approx([base] * C)


@pytest.mark.parametrize("base", [0.5, 0.9])
def test_relative_is_the_share_of_the_surest_class_s_mean_confidence(base):
    classes, confidence = _guesses(2)
    means = np.array([confidence[classes == c].mean() for c in range(C - 1)])
    limits = class_thresholds(confidence_counts(classes, confidence, C), base, rule="relative")
    assert limits[:-1].numpy() == pytest.approx(base * means / means.max(), abs=1 / 255)
    assert limits[3] == pytest.approx(base)
    assert limits[4] == pytest.approx(base), "never guessed: the fixed one"


@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("base", [0.6, 0.8, 1.0])
def test_quantile_keeps_the_surest_share_of_every_class(base, keep):
    classes, confidence = _guesses(3)
    limits = class_thresholds(confidence_counts(classes, confidence, C), base, rule="quantile", keep=keep)
    assert (limits <= base + 1e-6).all()
    for c in range(C - 1):
        own = confidence[classes == c].numpy()
        kept = (own >= limits[c].item()).mean()
        assert kept >= keep
        quantile = np.quantile(own, 1 - keep)
        if quantile < base - 0.01:
            assert limits[c] == pytest.approx(quantile, abs=2 / 255), "no lower than it has to be"
        else:
            assert limits[c] == pytest.approx(base, abs=2 / 255)
    assert limits[4] == pytest.approx(base)


def test_running_averages_give_the_thresholds_of_the_counts():
    counts = confidence_counts(*_guesses(4), C)
    for rule in ("relative", "quantile"):
        assert torch.equal(
            class_thresholds(counts, 0.9, rule=rule), class_thresholds(counts.double() * 0.25, 0.9, rule=rule)
        )
