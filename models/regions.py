"""Regions of an image without annotation, on the grid of a dense head.

Three ways: the connected components of labels; clusters of features; and superpixels, which are clusters of
colour and place (after SLIC, Achanta et al., 2012, on cells in place of pixels). Clusters fall apart into
their connected components.

Shapes: D channels, h w grid, R regions.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from models.settings import RegionKind

OUTSIDE = -1
"""The region of cells that belong to none."""
CLUSTERS = 6
"""Clusters of features an image."""
SUPERPIXELS = 24
"""Superpixels an image, before they fall apart."""
_PLACE = 0.5  # how much place counts beside colour, in colours from 0 to 1 per side of a superpixel
_ROUNDS = 8
Regions = npt.NDArray[np.int64]


def regions_of(
    kind: RegionKind, *, labels: npt.NDArray[np.integer], features: Tensor, image: Tensor
) -> Regions:
    """The regions of an image.

    Args:
        kind: the way.
        labels: class of each cell (h, w), ``OUTSIDE`` for none.
        features: of the cells (D, h, w), of length 1.
        image: uint8 (3, H, W), RGB.

    Returns:
        (h, w): 0 to R - 1, each of which has a cell, or ``OUTSIDE``.
    """
    if kind == "labels":
        return components(labels)
    if kind == "clusters":
        return components(_clusters(features.flatten(1).T.double(), CLUSTERS, features.shape[1:]))
    h, w = features.shape[1:]
    colours = F.adaptive_avg_pool2d(image[None].double() / 255, (h, w))[0].flatten(1)
    side = (h * w / SUPERPIXELS) ** 0.5
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    places = torch.stack([rows, columns]).flatten(1).to(colours) * (_PLACE / side)
    return components(_clusters(torch.cat([colours, places]).T, SUPERPIXELS, (h, w)))


def components(labels: npt.NDArray[np.integer]) -> Regions:
    """Connected cells (by their sides) of one label; see ``regions_of``."""
    regions = np.full(labels.shape, OUTSIDE, np.int64)
    count = 0
    for label in np.unique(labels):
        if label == OUTSIDE:
            continue
        parts, found = ndimage.label(labels == label)
        inside = parts > 0
        regions[inside] = parts[inside] - 1 + count
        count += found
    return regions


def cell_labels(mask: npt.NDArray[np.integer], grid: tuple[int, int], ignore_index: int) -> Regions:
    """The commonest label of each cell of a label map; ignored pixels do not count.

    Args:
        mask: (H, W) of any size.
        grid: (h, w).
        ignore_index: of the mask.

    Returns:
        (h, w), ``OUTSIDE`` where all is ignored.
    """
    present = [int(label) for label in np.unique(mask) if label != ignore_index]
    if not present:
        return np.full(grid, OUTSIDE, np.int64)
    shares = torch.stack([torch.from_numpy(mask == label).float() for label in present])
    shares = F.adaptive_avg_pool2d(shares[None], grid)[0]
    best, index = shares.max(0)
    chosen = torch.tensor(present)[index].where(best > 0, torch.tensor(OUTSIDE))
    return chosen.numpy().astype(np.int64)


def means(values: Tensor, regions: Regions) -> Tensor:
    """Mean of the values (D, h, w) over each region, (R, D)."""
    ids = torch.from_numpy(regions.ravel()).to(values.device)
    inside = ids != OUTSIDE
    flat, ids = values.flatten(1).T[inside], ids[inside]
    count = int(ids.max()) + 1 if len(ids) else 0
    sums = flat.new_zeros(count, flat.shape[1]).index_add_(0, ids, flat)
    return sums / torch.bincount(ids, minlength=count)[:, None].to(flat.dtype)


def _clusters(vectors: Tensor, count: int, grid: tuple[int, ...]) -> Regions:
    """K-means from centres that lie evenly over the grid: (h*w, D) -> (h, w). The same for the same input."""
    rows = max(1, min(grid[0], round((count * grid[0] / grid[1]) ** 0.5)))
    columns = max(1, min(grid[1], round(count / rows)))
    places = [
        int((row + 0.5) * grid[0] / rows) * grid[1] + int((column + 0.5) * grid[1] / columns)
        for row in range(rows)
        for column in range(columns)
    ]
    centres = vectors[places]
    nearest = torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
    for _ in range(_ROUNDS):
        nearest = torch.cdist(vectors, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
        sizes = torch.bincount(nearest, minlength=len(centres))[:, None]
        centres = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
    return nearest.unflatten(0, grid[:2]).cpu().numpy()
