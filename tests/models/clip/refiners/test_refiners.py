"""Refiners against plain re-derivations from their formulas: loops over pixels, dense matrices."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.catalogue import REFINERS
from models.clip.refiners.base import RefineOptions, likeliest, load_refiner, refine, working_size
from models.clip.refiners.lposs import lposs_plus
from models.clip.refiners.pamr import pamr
from models.clip.refiners.tlp import tlp
from models.errors import MaskMillError
from models.labelmap import Subset, label_map
from models.settings import MaskClipSettings

STD = (0.26862954, 0.26130258, 0.27577711)


def made(height: int, width: int, classes: int = 4, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] of two regions with some noise, and cosines."""
    generator = torch.Generator().manual_seed(height)
    image = 0.2 + 0.02 * torch.rand(batch, 3, height, width, generator=generator, dtype=torch.float64)
    image[:, :, :, width // 2 :] += 0.5
    image[:, 0, height // 2 :] += 0.1
    cosines = torch.rand(batch, classes, height, width, generator=generator, dtype=torch.float64)
    return image, 0.2 + 0.05 * cosines


# --- re-derivations, for one image --------------------------------------------------------------------------


def plain_pamr(image: Tensor, cosines: Tensor, steps: int, dilations: tuple[int, ...] = (8, 16)) -> Tensor:
    _, h, w = image.shape
    around = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]

    def at(map_: Tensor, y: int, x: int) -> Tensor:
        return map_[:, min(max(y, 0), h - 1), min(max(x, 0), w - 1)]

    table = {}
    for y in range(h):
        for x in range(w):
            seen = torch.stack([at(image, y + d * a, x + d * b) for d in dilations for a, b in around])
            near = [(d * a, d * b) for d in dilations for a, b in around if (a, b) != (0, 0)]
            scale = 1e-8 + 0.1 * seen.std(0)
            logit = [
                float(-((at(image, y + a, x + b) - image[:, y, x]).abs() / scale).mean()) for a, b in near
            ]
            table[y, x] = list(
                zip(near, torch.tensor(logit, dtype=image.dtype).softmax(0).tolist(), strict=True)
            )
    for _ in range(steps):
        new = torch.empty_like(cosines)
        for (y, x), neighbours in table.items():
            new[:, y, x] = sum(weight * at(cosines, y + a, x + b) for (a, b), weight in neighbours)
        cosines = new
    return cosines


def grid_edges(h: int, w: int) -> list[tuple[int, int, int]]:
    """(cell, cell, direction)."""
    down = [(y * w + x, (y + 1) * w + x, 0) for y in range(h - 1) for x in range(w)]
    return down + [(y * w + x, y * w + x + 1, 1) for y in range(h) for x in range(w - 1)]


def tlp_system(image: Tensor, cosines: Tensor) -> tuple[Tensor, Tensor]:
    """The dense matrix (cells, cells), and the right side (C, cells)."""
    _, h, w = image.shape
    normal = torch.stack([image[i] / STD[i] for i in range(3)])
    grey = (0.299 * normal[0] + 0.587 * normal[1] + 0.114 * normal[2]).flatten()
    edges = grid_edges(h, w)
    means = [
        sum(abs(float(grey[a] - grey[b])) for a, b, d in edges if d == way) / sum(d == way for *_, d in edges)
        for way in (0, 1)
    ]
    matrix = torch.zeros(h * w, h * w, dtype=image.dtype)
    for a, b, way in edges:
        weight = math.exp(-5 * abs(float(grey[a] - grey[b])) / means[way])
        matrix[a, b] -= weight
        matrix[b, a] -= weight
        matrix[a, a] += weight
        matrix[b, b] += weight
    flat = cosines.flatten(1)
    for cell in range(h * w):
        certain = max(float(flat[:, cell].softmax(0).max()), 0.05) ** 2
        matrix[cell, cell] += certain
    certain = flat.softmax(0).amax(0).clamp(min=0.05).square()
    return matrix, certain * flat


def plain_tlp(image: Tensor, cosines: Tensor, steps: int) -> Tensor:
    matrix, right = tlp_system(image, cosines)
    x = cosines.flatten(1).clone()
    r = right - x @ matrix
    p = r.clone()
    for _ in range(steps):
        a = (r * r).sum() / (p * (p @ matrix)).sum()
        x = x + a * p
        new = r - a * p @ matrix
        p = new + (new * new).sum() / (r * r).sum() * p
        r = new
    return x.view_as(cosines)


def srgb_to_lab(rgb: list[float]) -> list[float]:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    matrix = [
        [0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227],
    ]  # fmt: skip
    white = [0.950456, 1.0, 1.088754]
    xyz = [
        sum(m * c for m, c in zip(row, linear, strict=True)) / n for row, n in zip(matrix, white, strict=True)
    ]
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz)
    return [116 * y - 16, 500 * (x - y), 200 * (y - z)]


def lposs_matrix(image: Tensor) -> Tensor:
    """I - 0.95 Wn."""
    _, h, w = image.shape
    lab = [srgb_to_lab(image[:, y, x].tolist()) for y in range(h) for x in range(w)]
    weight = torch.zeros(h * w, h * w, dtype=image.dtype)
    for i in range(h * w):
        for j in range(h * w):
            if i != j and abs(i // w - j // w) <= 6 and abs(i % w - j % w) <= 6:
                steps = [(a - b) / n for a, b, n in zip(lab[i], lab[j], (100, 128, 128), strict=True)]
                weight[i, j] = math.exp(-math.sqrt(sum(s * s for s in steps)) / 0.01)
    root = weight.sum(1).rsqrt()
    return torch.eye(h * w, dtype=image.dtype) - 0.95 * root[:, None] * weight * root


def plain_lposs(image: Tensor, cosines: Tensor, steps: int) -> Tensor:
    matrix, found = lposs_matrix(image), []
    for y in cosines.flatten(1):
        x, r, p = torch.zeros_like(y), y.clone(), y.clone()
        for _ in range(steps):
            a = (r @ r) / (p @ matrix @ p)
            x = x + a * p
            new = r - a * matrix @ p
            p = new + (new @ new) / (r @ r) * p
            r = new
        found.append(0.05 * x)
    return torch.stack(found).view_as(cosines)


# --- parity -------------------------------------------------------------------------------------------------

Plain = Callable[[Tensor, Tensor, int], Tensor]
CASES: dict[str, tuple[Plain, int]] = {
    "pamr": (plain_pamr, 3), "tlp": (plain_tlp, 12), "lposs+": (plain_lposs, 10),
}  # fmt: skip


@pytest.mark.parametrize("size", [(10, 10), (7, 15)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_parity(name: str, size: tuple[int, int]) -> None:
    assert set(CASES) == set(REFINERS)
    plain, steps = CASES[name]
    images, cosines = made(*size)
    options, before = RefineOptions(steps=steps), cosines.clone()
    found = load_refiner(name).refine(images, cosines, options)
    assert torch.equal(cosines, before), "scores are not written to"
    expected = torch.stack([plain(*each, steps) for each in zip(images, cosines, strict=True)])
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-10
    rough = load_refiner(name).refine(images.float(), cosines.float(), options)
    assert float((rough - expected).abs().max() / expected.abs().max()) < 1e-5
    assert (found - cosines).abs().max() > 1e-3


def test_many_steps_solve_the_equations() -> None:
    images, cosines = made(8, 9, batch=1)
    matrix, right = tlp_system(images[0], cosines[0])
    assert (
        tlp(images, cosines, RefineOptions(steps=300))[0].flatten(1) - torch.linalg.solve(matrix, right.T).T
    ).abs().max() < 1e-9
    exact = 0.05 * torch.linalg.solve(lposs_matrix(images[0]), cosines[0].flatten(1).T).T
    assert (lposs_plus(images, cosines, RefineOptions(steps=300))[0].flatten(1) - exact).abs().max() < 1e-9


@pytest.mark.parametrize("name", REFINERS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (40, 3)], ids=str)
def test_flat_images_and_small_ones(name: str, size: tuple[int, int]) -> None:
    for image in (
        torch.zeros(1, 3, *size),
        torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)),
    ):
        flat = load_refiner(name).refine(image, torch.full((1, 3, *size), 0.25), RefineOptions(steps=5))
        assert torch.isfinite(flat).all()
        if name != "lposs+":  # whose border pixels have fewer neighbours
            assert (flat - 0.25).abs().max() < 1e-5


# --- sizes, classes, bounds ---------------------------------------------------------------------------------


def test_cells_are_means_over_the_image_at_its_own_size() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 61, 90), generator=generator, dtype=torch.uint8)
    scores = 0.2 + 0.05 * torch.rand(2, 4, 8, 12, generator=generator, dtype=torch.float64)
    size, cells = (101, 230), 20  # 5 and 12 (11.5) pixels a cell

    def pooled(x: Tensor) -> Tensor:
        return F.avg_pool2d(F.interpolate(x, size, mode="bilinear", align_corners=False), (5, 12))

    found = refine("tlp", images, scores, size, RefineOptions(cells=cells))
    expected = tlp(pooled(images.double() / 255), pooled(scores), RefineOptions(steps=25))
    assert found.classes is None and found.scores.shape == (2, 4, 20, 19)
    assert (found.scores - expected).abs().max() < 1e-12


@pytest.mark.parametrize(("name", "work"), [("pamr", pamr), ("lposs+", lposs_plus)])
def test_pixels_and_classes_are_bounded(
    name: str, work: Callable[[Tensor, Tensor, RefineOptions], Tensor]
) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 20, 30), generator=generator, dtype=torch.uint8)
    scores = torch.rand(2, 9, 5, 8, generator=generator, dtype=torch.float64)
    found = refine(name, images, scores, (40, 60), RefineOptions(steps=2, classes=3, pixels=600))
    assert found.scores.shape == (2, 3, 20, 30) and found.classes is not None
    for index in range(2):
        kept = found.classes[index]
        wins = torch.bincount(scores[index].argmax(0).flatten(), minlength=9)
        assert (
            set(kept.tolist()) == set(wins.argsort(descending=True)[:3].tolist()) or wins.unique().numel() < 9
        )
        assert (kept.diff() > 0).all()
        resized = F.interpolate(scores[index][kept][None], (20, 30), mode="bilinear")
        expected = work(images[index : index + 1].double() / 255, resized, RefineOptions(steps=2))
        assert (found.scores[index] - expected[0]).abs().max() < 1e-12


def test_likeliest_classes() -> None:
    scores = torch.tensor([[3.0, 3, 3, 0], [0, 0, 0, 2], [0, 0, 0, 1.9], [-100, -100, -100, -100]])[
        None, :, None
    ]
    assert likeliest(scores, 1).tolist() == [[0]]
    assert likeliest(scores, 2).tolist() == [[0, 1]]
    assert likeliest(scores, 3).tolist() == [[0, 1, 2]]


def test_working_size() -> None:
    assert working_size((375, 500), 1 << 19) == (375, 500)
    for size in [(3000, 4000), (1, 10**7), (10**7, 1), (7, 10**6)]:
        height, width = working_size(size, 1 << 19)
        assert 1 <= height * width <= 1 << 19
    assert working_size((3000, 4000), 1 << 19) == (627, 836)


@pytest.mark.parametrize("name", ["pamr", "lposs+"])
def test_work_does_not_grow_with_the_image_and_the_classes(name: str) -> None:
    images, bounds = (
        torch.zeros(1, 3, 64, 64, dtype=torch.uint8),
        RefineOptions(classes=3, pixels=2000, steps=2),
    )
    for classes, size in ((171, (3000, 4000)), (2000, (300_000, 400_000))):
        scores = torch.rand(1, classes, 4, 4, generator=torch.Generator().manual_seed(0))
        assert refine(name, images, scores, size, bounds).scores.shape == (1, 3, 38, 51)


def test_labels_of_some_classes() -> None:
    scores = torch.rand(300, 6, 9, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([3, 7, 200, 299])
    options = {"network_size": (48, 72), "image_size": (50, 70), "temperature": 10.0, "ignore_index": 300}
    thresholds = torch.zeros(300)
    thresholds[200] = 0.5
    denied = torch.full_like(scores, -100.0)
    denied[ids] = scores[ids]
    whole = label_map(denied, thresholds=thresholds, **options)
    part = label_map(scores[ids], thresholds=thresholds, subset=Subset(ids, 300), **options)
    assert part[0].dtype == torch.uint16
    assert torch.equal(whole[0], part[0]) and torch.equal(whole[1], part[1])
    assert (part[0] == 300).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refine": "tpl"}, "Did you mean tlp"),
        ({"refine": "tlp", "refine_classes": 5}, "refine_classes means nothing to refine tlp"),
        ({"refine_steps": 5}, "refine_steps means nothing to refine none"),
        ({"refine": "pamr", "ks_threshold": 1.0}, "key smoothing leaves none"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, object], message: str) -> None:
    with pytest.raises(MaskMillError, match=message):
        MaskClipSettings(**settings)
