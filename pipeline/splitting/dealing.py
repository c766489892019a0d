"""Deal groups of images out to the parts of a split, so that each class is spread by the shares."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def deal(
    group: Indices,
    image: Indices,
    present: Indices,
    shares: npt.NDArray[np.float64],
    *,
    seed: int,
    fixed: npt.NDArray[np.int8] | None = None,
) -> npt.NDArray[np.int8]:
    """Choose a part for each group.

    One after the other, the groups of the rarest classes and the largest first, each goes where it raises
    sum over parts and classes of (images there - wanted there)^2 / wanted there
    least, with the number of all images as one more class: iterative stratification (Sechidis, Tsoumakas and
    Vlahavas, "On the Stratification of Multi-Label Data", 2011) for groups.

    Args:
        group: (N,), number of the group of each image, from 0 to G - 1.
        image: (P,), with ``present`` the classes of the images, each pair once.
        present: (P,), class ids.
        shares: (S,), of the parts; their sum is 1. A part with share 0 gets nothing.
        seed: of the order of equal groups.
        fixed: (G,), parts that are known already, -1 for others.

    Returns:
        int8 (G,), parts.
    """
    groups = int(group.max(initial=-1)) + 1
    classes = int(present.max(initial=-1)) + 1
    sizes = np.bincount(group, minlength=groups)
    # Images by group and class; the last class is that of all images.
    pairs, counts = np.unique(
        np.concatenate([group[image] * (classes + 1) + present, np.arange(groups) * (classes + 1) + classes]),
        return_counts=True,
    )
    owner, of_class = np.divmod(pairs, classes + 1)
    counts = np.where(of_class == classes, sizes[owner], counts)
    total = np.bincount(of_class, counts, minlength=classes + 1)
    rarest = np.full(groups, np.inf)
    np.minimum.at(rarest, owner, total[of_class])
    part = np.full(groups, -1, np.int8) if fixed is None else fixed.astype(np.int8)
    wanted = np.maximum(shares[:, None] * total, 1e-9)
    have = np.zeros_like(wanted)
    starts = np.searchsorted(owner, np.arange(groups + 1))
    for number in np.flatnonzero(part >= 0).tolist():
        mine = slice(starts[number], starts[number + 1])
        have[part[number], of_class[mine]] += counts[mine]
    tie = np.random.default_rng(seed).random(groups)
    for number in np.lexsort((tie, -sizes, rarest)).tolist():
        if part[number] >= 0:
            continue
        mine = slice(starts[number], starts[number + 1])
        ids, count = of_class[mine], counts[mine]
        rise = (count * (2 * (have[:, ids] - wanted[:, ids]) + count) / wanted[:, ids]).sum(1)
        chosen = int(np.where(shares > 0, rise, np.inf).argmin())
        part[number] = chosen
        have[chosen, ids] += count
    return part
