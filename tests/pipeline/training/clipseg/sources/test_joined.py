"""Joined sources: all pairs of both, and no negatives across them."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.training.clipseg.sources.base import Example, Pairs, TripletSource
from pipeline.training.clipseg.sources.joined import JoinedSource, join_sources
from pipeline.training.clipseg.triplets import TripletSamples, TripletSettings, decode_phrase

SIDE = 16


@dataclass(frozen=True, eq=False)
class Flat(TripletSource):
    """Images whose grey value encodes source and image, with a mask that encodes the phrase."""

    shade: int

    def read(self, pair: int) -> Example:
        image = np.full((SIDE, SIDE, 3), self.shade + int(self.pairs.image[pair]), np.uint8)
        mask = (np.arange(SIDE * SIDE) <= self.pairs.phrase[pair]).reshape(SIDE, SIDE).astype(np.uint8)
        return Example(image, mask)


@pytest.fixture
def first() -> Flat:
    pairs = Pairs.of(
        [("cat",), ("red cat",), ("dog",)],
        [0, 0, 1, 1, 3],
        [0, 1, 0, 2, 2],
        block=[0, 0, 1, 1, 2],
        unsure=[(5, 0)],
    )
    return Flat("truth", "aa", pairs, shade=100)


@pytest.fixture
def second() -> Flat:
    pairs = Pairs.of([("bird",), ("fish", "a fish")], [0, 0, 1, 2], [0, 1, 1, 0], unsure=[(1, 0)])
    return Flat("label table", "bb", pairs, shade=200)


@pytest.fixture
def joined(first: Flat, second: Flat) -> JoinedSource:
    return pickle.loads(pickle.dumps(join_sources(first, second)))


def test_every_pair_is_read_from_its_own_source(first: Flat, second: Flat, joined: JoinedSource) -> None:
    count = len(first.pairs)
    assert len(joined.pairs) == count + len(second.pairs)
    for pair in range(len(joined.pairs)):
        source, number = (first, pair) if pair < count else (second, pair - count)
        own, read = source.read(number), joined.read(pair)
        assert np.array_equal(read.image, own.image) and np.array_equal(read.mask, own.mask)
        text = joined.pairs.phrases[joined.pairs.phrase[pair]]
        assert text == source.pairs.phrases[source.pairs.phrase[number]]
    # The sources share no image and no block.
    for column in (joined.pairs.image, joined.pairs.block):
        assert not set(column[:count].tolist()) & set(column[count:].tolist())


def test_a_phrase_can_only_be_absent_within_its_source(
    first: Flat, second: Flat, joined: JoinedSource
) -> None:
    images, phrases = joined.pairs.seam or (0, 0)
    assert images == 6 and phrases == 3  # image 5 only has an unsure phrase
    for image in range(9):
        for phrase in range(5):
            own = (image >= images) == (phrase >= phrases)
            source = second if phrase >= phrases else first
            expected = not own or source.pairs.may_hold(
                image - images * (image >= images), phrase - phrases * (phrase >= phrases)
            )
            assert joined.pairs.may_hold(image, phrase) is expected


def test_negatives_are_drawn_from_the_same_source(joined: JoinedSource) -> None:
    settings = TripletSettings(size=SIDE, crop=False, q_neg=1.0, prefix="plain", with_visual=False)
    samples = TripletSamples(joined, settings)
    drawn: dict[bool, set[str]] = {}
    for pair in range(len(joined.pairs)):
        for seed in range(20):
            sample = samples.load(pair, np.random.default_rng(seed))
            if sample["negative"]:
                drawn.setdefault(pair >= 5, set()).add(decode_phrase(sample["phrase"]))
    # A red cat implies a cat. In the second source, only image 2 surely lacks a phrase: the fish.
    assert drawn == {False: {"red cat", "dog", "cat"}, True: {"fish", "a fish"}}


@pytest.mark.parametrize("grouped", [False, True])
def test_an_epoch_has_every_pair_once_and_mixes_the_sources(grouped: bool) -> None:
    def source(images: int, shade: int) -> Flat:
        numbers = np.repeat(np.arange(images), 3)
        return Flat("x", "x", Pairs.of([("a",), ("b",), ("c",)], numbers, np.tile(range(3), images)), shade)

    joined = join_sources(source(200, 0), source(40, 100))
    order = joined.order(1, 7, grouped=grouped)
    assert sorted(order.tolist()) == list(range(720))
    shares = [(part >= 600).mean() for part in np.array_split(order, 10)]
    assert max(abs(share - 1 / 6) for share in shares) < 0.05
    assert np.array_equal(order, joined.order(1, 7, grouped=grouped))
    images: npt.NDArray[np.int64] = joined.pairs.image[order]
    changes = int((images[1:] != images[:-1]).sum())
    assert changes == 239 if grouped else changes > 600


def test_the_fingerprint_depends_on_both_sources(first: Flat, second: Flat) -> None:
    made = {
        join_sources(a, b).fingerprint
        for a, b in [
            (first, second), (second, first), (replace(first, fingerprint="cc"), second),
            (first, replace(second, fingerprint="cc")),
        ]
    }  # fmt: skip
    assert len(made) == 4
    assert join_sources(first, second).name == "truth and label table"
