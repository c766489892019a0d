"""The toy world: seeds, label maps, captions."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pipeline.toyworld import scenes as toyworld
from pipeline.toyworld.captions import CLASSES, COLOURS, PATTERNS, STUFF, THINGS
from pipeline.toyworld.scenes import VISIBLE_SHARE, generate, scene


@pytest.fixture(scope="module")
def many() -> toyworld.ToySet:
    return generate(11, 300, 48)


def test_classes_are_those_of_the_built_in_ontology() -> None:
    assert CLASSES == STUFF + THINGS
    assert len(CLASSES) == len(set(CLASSES)) == 14
    assert set(COLOURS) == set(CLASSES)
    assert set(PATTERNS) <= set(CLASSES)


@pytest.mark.parametrize("size", [16, 64, 97])
def test_shapes_and_types(size: int) -> None:
    made = generate(3, 4, size)
    assert made.images.shape == (4, size, size, 3)
    assert made.images.dtype == np.uint8
    assert made.labels.shape == (4, size, size)
    assert made.labels.dtype == np.uint8
    assert len(made.captions) == 4
    assert made.labels.max() < len(CLASSES)


def test_a_scene_depends_on_its_seed_and_number_alone() -> None:
    whole = generate(5, 12, 64)
    again = generate(5, 4, 64, start=6)
    np.testing.assert_array_equal(again.images, whole.images[6:10])
    np.testing.assert_array_equal(again.labels, whole.labels[6:10])
    assert again.captions == whole.captions[6:10]
    one = scene(5, 9, 64)
    np.testing.assert_array_equal(one.image, whole.images[9])
    np.testing.assert_array_equal(one.labels, whole.labels[9])


def test_other_seeds_and_numbers_are_other_scenes() -> None:
    pictures = {scene(seed, index, 32).image.tobytes() for seed in range(4) for index in range(8)}
    assert len(pictures) == 32


def test_a_scene_is_the_same_picture_at_every_size() -> None:
    for index in range(8):
        small, large = scene(21, index, 48), scene(21, index, 192)
        shrunk = large.image.reshape(48, 4, 48, 4, 3).mean((1, 3))
        assert np.abs(shrunk - small.image).mean() < 16
        assert (large.labels[2::4, 2::4] == small.labels).mean() > 0.95


def test_every_class_occurs_often_and_large_enough(many: toyworld.ToySet) -> None:
    for index, name in enumerate(CLASSES):
        shares = (many.labels == index).mean((1, 2))
        there = shares[shares > 0]
        assert len(there) > 0.12 * len(shares), name
        assert there.mean() > (0.35 if name in STUFF else 0.035), name


def test_stuff_is_everywhere_and_things_lie_on_top(many: toyworld.ToySet) -> None:
    stuff = many.labels < len(STUFF)
    assert stuff.any((1, 2)).all()
    things_per_scene = [len(set(np.unique(ids)) - set(range(len(STUFF)))) for ids in many.labels]
    assert set(things_per_scene) == {0, 1, 2, 3}
    assert 0.6 < stuff.mean() < 0.9


def test_label_maps_follow_the_picture(many: toyworld.ToySet) -> None:
    """Colours that a class cannot have are not under its label: the map belongs to the picture."""
    red, green, blue = (many.images[..., c].astype(int) for c in range(3))
    orange = many.labels == CLASSES.index("orange")
    assert ((red > blue + 60) & orange).sum() > 0.85 * orange.sum()
    grass = many.labels == CLASSES.index("grass")
    assert ((green > blue) & (green > red) & grass).sum() > 0.85 * grass.sum()
    water = many.labels == CLASSES.index("water")
    assert ((blue > red) & water).sum() > 0.95 * water.sum()


def test_captions_name_only_what_is_visible(many: toyworld.ToySet) -> None:
    for ids, caption in zip(many.labels, many.captions, strict=True):
        shares = np.bincount(ids.ravel(), minlength=len(CLASSES)) / ids.size
        # "orange" is a colour as well; it describes nothing but oranges.
        named = {name for name in CLASSES if re.search(rf"\b{name}\b", caption)}
        visible = {name for name, share in zip(CLASSES, shares, strict=True) if share >= VISIBLE_SHARE}
        assert named <= visible, caption
        words = {w for name in visible for w in (*PATTERNS.get(name, ()), *(c for c, _ in COLOURS[name]))}
        everything = {
            w for name in CLASSES for w in (*PATTERNS.get(name, ()), *(c for c, _ in COLOURS[name]))
        }
        # "black and white" is a way to take photographs as well, and would count as "white".
        told = caption.replace("black and white", "")
        said = {word for word in everything if re.search(rf"\b{word}\b", told)}
        assert said <= words, caption


def test_captions_are_incomplete_and_varied(many: toyworld.ToySet) -> None:
    left_out = coloured = nameless = 0
    for ids, caption in zip(many.labels, many.captions, strict=True):
        shares = np.bincount(ids.ravel(), minlength=len(CLASSES)) / ids.size
        visible = {name for name, share in zip(CLASSES, shares, strict=True) if share >= VISIBLE_SHARE}
        left_out += any(not re.search(rf"\b{name}\b", caption) for name in visible)
        coloured += any(
            re.search(rf"\b{word}\b", caption) for word in ("red", "green", "blue", "striped", "spotted")
        )
        nameless += "something" in caption
    assert 0.4 * len(many.captions) < left_out < 0.9 * len(many.captions)
    assert coloured > 10
    assert nameless > 5
    assert len(set(many.captions)) > 0.9 * len(many.captions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 1, 64), "negative"),
        ((0, -1, 64), "negative"),
        ((0, 1, 8), "16 pixels"),
    ],
)
def test_wrong_numbers(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(*arguments)
