from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from models.regions import OUTSIDE, cell_labels, components, means, regions_of

LABELS = np.array([[0, 0, 1, 0], [2, 0, 1, 0], [2, 2, -1, 0]])


def test_components_are_connected_and_cover_what_has_a_label() -> None:
    regions = components(LABELS)
    assert (regions == OUTSIDE).tolist() == (LABELS == -1).tolist()
    assert sorted(set(regions.ravel()) - {OUTSIDE}) == [0, 1, 2, 3]  # 0 falls into two
    for region in range(4):
        inside = regions == region
        assert len(set(LABELS[inside])) == 1 and ndimage.label(inside)[1] == 1
    assert regions[0, 0] != regions[0, 3]


def test_means_are_those_of_each_region() -> None:
    values = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    regions = components(LABELS)
    found = means(values, regions)
    expected = np.stack([values.numpy()[:, regions == region].mean(1) for region in range(4)])
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert means(values, np.full((3, 4), OUTSIDE)).shape == (0, 5)


def test_cells_have_the_commonest_label() -> None:
    mask = np.full((8, 10), 255, np.uint8)
    mask[:4, :5], mask[:4, 5:], mask[3, 5] = 3, 7, 3
    assert cell_labels(mask, (2, 2), 255).tolist() == [[3, 7], [OUTSIDE, OUTSIDE]]
    assert cell_labels(np.full((4, 4), 255, np.uint8), (2, 2), 255).tolist() == [[OUTSIDE] * 2] * 2


def test_clusters_and_superpixels_find_two_halves() -> None:
    features = torch.zeros(4, 8, 12)
    features[0, :, :6], features[1, :, 6:] = 1, 1
    image = torch.zeros(3, 64, 96, dtype=torch.uint8)
    image[0, :, 48:] = 255
    for kind in ("clusters", "superpixels"):
        regions = regions_of(kind, labels=np.zeros((8, 12), int), features=features, image=image)
        assert regions.min() == 0 and not set(regions[:, :6].ravel()) & set(regions[:, 6:].ravel())
        again = regions_of(kind, labels=np.zeros((8, 12), int), features=features, image=image)
        assert (regions == again).all()
    assert regions.max() > 1, "superpixels part what has one colour by place"


def test_noise_falls_into_whole_regions() -> None:
    generator = torch.Generator().manual_seed(1)
    features = F.normalize(torch.randn(8, 7, 9, generator=generator), dim=0)
    image = torch.randint(0, 256, (3, 56, 72), generator=generator, dtype=torch.uint8)
    for kind in ("clusters", "superpixels"):
        regions = regions_of(kind, labels=np.zeros((7, 9), int), features=features, image=image)
        assert sorted(set(regions.ravel())) == list(range(regions.max() + 1))
