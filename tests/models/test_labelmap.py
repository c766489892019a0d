"""The tiled label map against the naive one: interpolate twice in fp64, then argmax."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import MaskMillError
from models.labelmap import label_map


def naive(scores: Tensor, network: tuple[int, int], image: tuple[int, int]) -> Tensor:
    """(C, H, W) in fp64 by two successive resizes, as the reference does it."""
    up = F.interpolate(scores[None].double(), size=network, mode="bilinear", align_corners=False)
    return F.interpolate(up, size=image, mode="bilinear", align_corners=False)[0]


def random_scores(classes: int, h: int, w: int, seed: int = 0) -> Tensor:
    return torch.randn(classes, h, w, generator=torch.Generator().manual_seed(seed)) * 0.05 + 0.2


SIZES = (
    ((32, 43), (512, 683), (375, 500)),
    ((21, 32), (333, 500), (333, 500)),
    ((4, 9), (64, 130), (200, 611)),
    ((32, 32), (512, 512), (40, 31)),
    ((1, 1), (16, 16), (50, 20)),
    ((7, 3), (112, 33), (1, 1)),
    ((2, 90), (32, 1440), (30, 1351)),
    ((128, 1), (2048, 16), (5000, 3)),
    ((1, 128), (16, 2048), (2, 3000)),
)


@pytest.mark.parametrize(
    ("classes", "grid", "network", "image"),
    # The naive way takes gigabytes for 300 classes on the first two sizes.
    [(n, *sizes) for sizes in SIZES for n in (1, 2, 30, 171, 300) if n < 300 or sizes not in SIZES[:2]],
)
def test_equals_naive_except_at_ties(
    classes: int, grid: tuple[int, int], network: tuple[int, int], image: tuple[int, int]
) -> None:
    scores = random_scores(classes, *grid)
    ignore = 255 if classes <= 254 else 65535
    labels, confidence = label_map(scores, network_size=network, image_size=image, ignore_index=ignore)
    assert tuple(labels.shape) == tuple(confidence.shape) == image
    assert labels.dtype == (torch.uint8 if classes <= 254 else torch.uint16)
    assert confidence.dtype == torch.uint8
    full = naive(scores, network, image)
    wrong = labels.long() != full.argmax(0)
    if classes > 1:
        best = full.topk(2, 0).values
        assert ((best[0] - best[1])[wrong] < 1e-6).all(), "only ties may be decided differently"
        assert wrong.sum() <= 3
    p = (100 * full).softmax(0).amax(0) * 255
    assert (confidence - p).abs().max() < 0.51


@pytest.mark.parametrize("classes", [3, 40])
def test_identical_on_exactly_representable_scores(classes: int) -> None:
    """Small integers and powers of two: nothing is rounded, so ties are exact and go to the lower id."""
    scores = torch.randint(0, 3, (classes, 8, 8), generator=torch.Generator().manual_seed(1)).float()
    labels, _ = label_map(scores, network_size=(32, 32), image_size=(64, 128), temperature=1.0)
    full = naive(scores, (32, 32), (64, 128))
    ties = (full == full.amax(0)).sum(0) > 1
    assert ties.sum() > 100, "the case must hold ties"
    lowest = torch.where(full == full.amax(0), torch.arange(classes)[:, None, None], classes).amin(0)
    assert torch.equal(labels.long(), lowest)


def test_thresholds_and_ignore() -> None:
    scores = random_scores(5, 6, 8)
    thresholds = torch.tensor([0.0, 0.5, 0.9, 1.1, 0.3])
    plain, p0 = label_map(scores, network_size=(96, 128), image_size=(90, 111))
    labels, p = label_map(
        scores, network_size=(96, 128), image_size=(90, 111), thresholds=thresholds, ignore_index=200
    )
    assert torch.equal(p, p0), "thresholds change labels, not confidences"
    exact = (100 * naive(scores, (96, 128), (90, 111))).softmax(0).amax(0)
    low = exact < thresholds[plain.long()]
    clear = (exact - thresholds[plain.long()]).abs() > 1e-4
    assert torch.equal((labels == 200)[clear], low[clear])
    assert torch.equal(labels[labels != 200], plain[labels != 200])
    assert 0 < low.sum() < low.numel()


def test_denied_classes_never_win_and_cost_nothing() -> None:
    scores = random_scores(50, 10, 10)
    allowed = [3, 17, 40]
    scores[[c for c in range(50) if c not in allowed]] = -100.0
    labels, confidence = label_map(scores, network_size=(160, 160), image_size=(100, 100))
    assert set(labels.unique().tolist()) == set(allowed)
    full = naive(scores, (160, 160), (100, 100))
    assert torch.equal(labels.long(), full.argmax(0))
    assert (confidence - 255 * (100 * full).softmax(0).amax(0)).abs().max() < 0.51
    labels, confidence = label_map(
        torch.full((50, 10, 10), -100.0), network_size=(160, 160), image_size=(20, 20)
    )
    assert (labels == 0).all()
    assert (confidence == round(255 / 50)).all()


def test_confidence_of_key_smoothed_scores_is_a_share() -> None:
    scores = 40 * torch.randn(6, 9, 9, generator=torch.Generator().manual_seed(2))
    _, confidence = label_map(scores, network_size=(144, 144), image_size=(130, 77), temperature=None)
    full = naive(scores, (144, 144), (130, 77))
    share = full.amax(0).clamp(min=0) / full.clamp(min=0).sum(0)
    assert (confidence - 255 * share.nan_to_num(0)).abs().max() < 0.51
    _, nothing = label_map(-scores.abs(), network_size=(144, 144), image_size=(20, 20), temperature=None)
    assert (nothing == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers(value: float) -> None:
    scores = random_scores(3, 4, 4)
    scores[1, 2, 2] = value
    with pytest.raises(MaskMillError, match="NaN or infinite"):
        label_map(scores, network_size=(64, 64), image_size=(64, 64))


@pytest.mark.slow
def test_memory_is_bounded() -> None:
    """171 classes on 2000x1500 pixels: 2 GB when done naively. Measured in a fresh process."""
    code = """
import resource, torch
from models.labelmap import label_map
scores = torch.randn(171, 32, 43)
label_map(scores, network_size=(512, 683), image_size=(64, 64))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
labels, confidence = label_map(scores, network_size=(512, 683), image_size=(1500, 2000), temperature=1.0)
print(labels.shape, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout.split()[-1]) < 200_000, "KB"


@pytest.mark.slow
@pytest.mark.parametrize("thin", [(1_000_000, 1), (1, 1_000_000)])
def test_long_thin_images_take_memory_by_their_pixels(thin: tuple[int, int]) -> None:
    """Dense interpolation matrices took 3.5 GB and a minute."""
    code = f"""
import resource, torch
from models.labelmap import label_map
height, width = {thin}
grid = torch.randn(20, max(1, height // 16), max(1, width // 16)) * 0.05
label_map(grid[:, :4, :4], network_size=(64, 64), image_size=(64, 64))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
labels, _ = label_map(grid, network_size=(height, width), image_size=(height, width))
print(labels.shape, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout.split()[-1]) < 300_000, "KB"


@pytest.mark.parametrize("thin", [(2_000_000, 1), (1, 2_000_000)])
def test_long_thin_images_take_time_by_their_pixels(thin: tuple[int, int]) -> None:
    def seconds(size: tuple[int, int], grid: tuple[int, int]) -> float:
        network = (min(2048, size[0]), min(2048, size[1]))
        scores = torch.randn(20, *grid) * 0.05
        label_map(scores[:, :1, :1], network_size=(16, 16), image_size=(16, 16))
        began = time.process_time()
        label_map(scores, network_size=network, image_size=size)
        return time.process_time() - began

    grid = (128, 1) if thin[0] > 1 else (1, 128)
    assert seconds(thin, grid) < 5 * seconds((1000, 2000), (16, 32)) + 0.5


@pytest.mark.parametrize("thin", [(20_001, 3), (2, 30_011)])
def test_long_thin_images_are_labelled_as_any_other(thin: tuple[int, int]) -> None:
    scores = random_scores(5, *(max(1, min(2048, side) // 16) for side in thin))
    network = (min(2048, thin[0]), min(2048, thin[1]))
    labels, _ = label_map(scores, network_size=network, image_size=thin)
    best = naive(scores, network, thin).topk(2, 0)
    sure = (best.values[0] - best.values[1]) > 1e-5
    assert (labels.long() == best.indices[0])[sure].all() and sure.float().mean() > 0.99


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_same_on_the_gpu() -> None:
    scores = random_scores(171, 32, 43)
    network, image = (512, 683), (480, 640)
    labels, confidence = label_map(scores, network_size=network, image_size=image)
    there, sure = label_map(scores.cuda(), network_size=network, image_size=image)
    best = naive(scores, network, image).topk(2, 0).values
    wrong = labels != there.cpu()
    assert ((best[0] - best[1])[wrong] < 1e-6).all()
    assert (confidence.int() - sure.cpu().int()).abs().max() <= 1
