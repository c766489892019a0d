from __future__ import annotations

import numpy as np
import pytest
import torch

from models.calibration import BINS, bias_of, score_histogram
from models.errors import MaskMillError

WIDTH = 2 / BINS


def scores(images: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.1, 0.3, 0.05, 0.2])[:, None, None]
    return 0.1 + spread * torch.randn(images, 4, 9, 7, generator=generator).clamp(-3, 3)


def test_the_bias_is_a_share_of_each_classes_quantile() -> None:
    made = scores()
    counted = sum(score_histogram(image) for image in made)
    exact = np.quantile(made.numpy().transpose(1, 0, 2, 3).reshape(4, -1), 0.95, axis=1)
    bias = np.array(bias_of(counted, 0.95, 0.25))
    np.testing.assert_allclose(bias, 0.25 * (exact - exact.mean()), atol=2 * WIDTH)
    assert abs(bias.sum()) < 1e-5 and np.abs(bias).max() > 20 * WIDTH


def test_histograms_add_up_and_leave_out_removed_classes() -> None:
    made = scores(2)
    together = score_histogram(torch.cat([made[0], made[1]], dim=1))
    assert (score_histogram(made[0]) + score_histogram(made[1]) == together).all()
    assert together.sum() == made.numel()
    made[1, 2] = -100.0
    assert score_histogram(made[1]).sum(1).tolist() == [63, 63, 0, 63]


def test_scores_outside_of_cosines_are_counted_at_the_ends() -> None:
    counted = score_histogram(torch.tensor([[[1.0, 1.5, -1.0]]]))
    assert counted[0, -1] == 2 and counted[0, 0] == 1


def test_nothing_was_counted() -> None:
    with pytest.raises(MaskMillError) as caught:
        bias_of(np.zeros((2, BINS), np.int64), 0.9, 0.5)
    assert caught.value.code == "labelling_failed" and caught.value.remedy
