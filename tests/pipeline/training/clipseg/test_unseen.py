"""Which phrases name unseen classes."""

from __future__ import annotations

import pickle

import pytest

from models.errors import MaskMillError
from pipeline.datasets.oneshot import BENCHMARKS
from pipeline.datasets.zeroshot import zero_shot_split
from pipeline.training.clipseg.unseen import (
    VOC_SYNSETS,
    affordance_phrases,
    class_phrases,
    voc_phrases,
)

VOC = {name.partition(".")[0]: number for number, name in enumerate(VOC_SYNSETS, 1)}


@pytest.mark.parametrize(
    ("synset", "phrase", "named"),
    [
        ("dog", "brown dog", True),
        ("dog", "two Dogs", True),
        ("dog", "a sleeping poodle", True),  # a hyponym
        ("dog", "Great Dane on grass", True),  # of two words
        ("dog", "hot doggie bag holder", True),
        ("dog", "dogwood tree", False),  # part of a word
        ("dog", "hound's", False),
        ("dog", "black cat", False),
        ("bird", "flying geese", True),  # irregular
        ("bird", "ostriches", True),
        ("bird", "birdhouse", False),
        ("cattle", "oxen in a field", True),
        ("bus", "double-decker buses", True),
        ("bus", "two busses", True),
        ("person", "three policemen", False),  # "policeman" is not in CLIPSeg's list for people
        ("person", "men", True),
        ("person", "children playing", True),
        ("person", "a woman's hat", False),
        ("person", "babies", True),
        ("television", "flat screen tv.", True),
        ("vessel", "sailboats", True),
        ("vessel", "ship's wheel", False),
        ("sofa", "couches", True),
        ("table", "coffee tables", True),
        ("bottle", "glass of milk", False),
        ("motorcycle", "dirt bike", True),
        ("bicycle", "bikes", True),
        ("train", "", False),
    ],
)
def test_voc(synset: str, phrase: str, named: bool) -> None:
    assert voc_phrases([VOC[synset]])(phrase) == named


def test_every_class_names_itself() -> None:
    names = [
        "airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "table", "dog",
        "horse", "motorbike", "person", "pot plant", "sheep", "sofa", "train", "television",
    ]  # fmt: skip
    for number, name in enumerate(names, 1):
        naming = [other for other in range(1, 21) if voc_phrases([other])(f"some {name}s")]
        # WordNet lists "bus" below "car".
        assert naming == ([6, 7] if name == "bus" else [number])


@pytest.mark.parametrize("fold", range(4))
def test_folds_and_splits_give_ids(fold: int) -> None:
    tested = BENCHMARKS["pascal5i"].folds[fold]
    drop = pickle.loads(pickle.dumps(voc_phrases(tested)))
    named = [
        number for number in range(1, 21) if drop(VOC_SYNSETS[number - 1].partition(".")[0].replace("_", " "))
    ]
    assert named == list(tested)


def test_zero_shot_split() -> None:
    drop = voc_phrases(zero_shot_split("pascal-unseen4").unseen_ids)
    dropped = [phrase for phrase in ("cows", "a moped", "airliner", "couch", "cat", "train") if drop(phrase)]
    assert dropped == ["cows", "a moped", "airliner", "couch"]


@pytest.mark.parametrize("ids", [[], [0], [21], [1, 255]])
def test_invalid_class_ids(ids: list[int]) -> None:
    with pytest.raises(MaskMillError) as caught:
        voc_phrases(ids)
    assert caught.value.code == "wrong_use"


@pytest.mark.parametrize(
    ("phrase", "named"),
    [
        ("traffic light", True),
        ("Traffic Lights at night", True),
        ("light traffic", False),
        ("knives", False),  # WordNet's rule is "-ves" to "-f"; "knives" is an exception listed for "knife"
        ("a giraffe", True),
        ("giraffes", True),
        ("foxes", True),
        ("wolves", True),
    ],
)
def test_words_of_any_class(phrase: str, named: bool) -> None:
    assert class_phrases(["traffic_light", "giraffe", "fox", "Wolf"])(phrase) == named


@pytest.mark.parametrize(
    ("phrase", "named"), [("man riding", True), ("chair leg", True), ("writing desk", False)]
)
def test_affordances(phrase: str, named: bool) -> None:
    assert affordance_phrases()(phrase) == named
