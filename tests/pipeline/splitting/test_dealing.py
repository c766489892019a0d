from __future__ import annotations

import numpy as np

from pipeline.splitting.dealing import deal

SHARES = np.array([0.8, 0.1, 0.1])


def _drawn(seed: int, images: int = 600, classes: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups of 1 to 6 images that share most of their classes; rare classes too."""
    random = np.random.default_rng(seed)
    group = np.repeat(np.arange(images), random.integers(1, 7, images))[:images]
    _, group = np.unique(group, return_inverse=True)
    likely = np.geomspace(0.5, 0.03, classes)
    of_group = random.random((group.max() + 1, classes)) < likely
    has = of_group[group] & (random.random((images, classes)) < 0.9)
    image, present = np.nonzero(has)
    return group, image, present


def test_every_class_is_spread_by_the_shares() -> None:
    group, image, present = _drawn(0)
    part = deal(group, image, present, SHARES, seed=0)[group]
    assert np.abs(np.bincount(part, minlength=3) / len(part) - SHARES).max() < 0.01
    for number in range(8):
        if len(np.unique(group[image[present == number]])) < 30:
            continue  # a few large groups cannot be spread evenly
        of_class = part[image[present == number]]
        shares = np.bincount(of_class, minlength=3) / len(of_class)
        assert np.abs(shares - SHARES).max() < 0.06, (number, len(of_class), shares)
    # By chance a class comes out several times as uneven.
    random = np.random.default_rng(0).choice(3, group.max() + 1, p=SHARES)[group]

    def unevenness(parts: np.ndarray) -> float:
        counts = np.zeros((8, 3))
        np.add.at(counts, (present, parts[image]), 1)
        return float(np.abs(counts / counts.sum(1, keepdims=True) - SHARES).mean())

    assert unevenness(part) < 0.4 * unevenness(random)


def test_a_seed_gives_one_split_and_another_seed_another() -> None:
    drawn = _drawn(1)
    first, again, other = (deal(*drawn, SHARES, seed=seed) for seed in (3, 3, 4))
    assert (first == again).all() and (first != other).any()


def test_groups_with_a_part_keep_it_and_count() -> None:
    group, image, present = _drawn(2)
    fixed = np.full(group.max() + 1, -1, np.int8)
    fixed[:40] = 1  # more than the share of the validation
    part = deal(group, image, present, SHARES, seed=0, fixed=fixed)
    assert (part[:40] == 1).all() and not (part[40:] == 1).any()


def test_a_part_without_a_share_stays_empty() -> None:
    part = deal(*_drawn(3), np.array([0.5, 0.0, 0.5]), seed=0)
    assert set(part.tolist()) == {0, 2}
    nothing = deal(np.arange(4), np.empty(0, int), np.empty(0, int), np.array([0.5, 0.5, 0]), seed=0)
    assert sorted(nothing.tolist()) == [0, 0, 1, 1]
