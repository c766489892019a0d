from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageEnhance

from pipeline.splitting import duplicates
from pipeline.splitting.duplicates import connected, near_pairs
from pipeline.splitting.hashing import perceptual_hash
from pipeline.toyworld.scenes import generate


def _groups(hashes: npt.NDArray[np.uint64], distance: int) -> list[frozenset[int]]:
    """Transitive groups, from all pairs, by a search from each image."""
    near = np.bitwise_count(hashes[:, None] ^ hashes[None]) <= distance
    left, groups = set(range(len(hashes))), []
    while left:
        group, open_ = set(), [left.pop()]
        while open_:
            one = open_.pop()
            group.add(one)
            open_ += [int(other) for other in np.flatnonzero(near[one]) if other in left]
            left -= group | set(open_)
        groups.append(frozenset(group))
    return sorted(groups, key=min)


@pytest.mark.parametrize("distance", [0, 3, 7, 10, 15])
@pytest.mark.parametrize("at_once", [50, 4_000_000])
def test_the_groups_are_those_of_all_pairs(
    distance: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "AT_ONCE", at_once)
    random = np.random.default_rng(distance)
    seeds = random.integers(0, 2**64, 60, np.uint64)
    hashes = np.repeat(seeds, 5)
    for index in range(len(hashes)):  # chains of copies, up to 16 bits away
        for bit in random.choice(64, random.integers(0, 17), replace=False):
            hashes[index] ^= np.uint64(1) << np.uint64(bit)
    hashes = np.concatenate([hashes, hashes[:7]])
    pairs = near_pairs(hashes, distance)
    assert (np.bitwise_count(hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]) <= distance).all()
    numbers = connected(pairs, len(hashes))
    found = sorted((frozenset(np.flatnonzero(numbers == n).tolist()) for n in np.unique(numbers)), key=min)
    assert found == _groups(hashes, distance)


def test_without_images_there_are_no_pairs() -> None:
    assert near_pairs(np.empty(0, np.uint64), 10).shape == (0, 2)
    assert connected(np.empty((0, 2), np.int64), 3).tolist() == [0, 1, 2]


def _jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=50)
    return Image.open(file)


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "resized": lambda image: image.resize((77, 77)),
    "compressed": _jpeg,
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "cropped": lambda image: image.crop((2, 2, image.width - 2, image.height - 2)),
}


def test_a_changed_image_keeps_its_hash_nearly_and_others_have_another() -> None:
    images = [Image.fromarray(scene) for scene in generate(5, 40, 128).images]
    hashes = np.array([perceptual_hash(np.asarray(image)) for image in images], np.uint64)
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None])[np.triu_indices(len(hashes), 1)]
    assert apart.min() > 10 and 28 < apart.mean() < 36
    for name, change in CHANGES.items():
        changed = [perceptual_hash(np.asarray(change(image).convert("RGB"))) for image in images]
        distances = np.bitwise_count(hashes ^ np.array(changed, np.uint64))
        assert np.mean(distances <= 10) >= 0.95, (name, distances)


def test_a_plain_image_has_a_hash() -> None:
    assert 0 <= perceptual_hash(np.zeros((5, 9, 3), np.uint8)) < 2**64
