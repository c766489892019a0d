from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.errors import MaskMillError
from pipeline.datasets.pairs import open_pairs
from pipeline.evaluation.classes import NO_CLASS, ClassMatch, match_classes, matched, read_mapping
from pipeline.ontology.ontology import Ontology
from pipeline.ontology.reading import load_ontology

TRUTH = Ontology.from_dict(
    {
        "name": "truth",
        "background": ["wall"],
        "classes": ["Cat", {"name": "dog", "synonyms": ["puppy"]}, "sofa", "car", "bus"],
    }
)


def labels(*classes: object, background: object = ("grass",)) -> Ontology:
    return Ontology.from_dict({"name": "labels", "background": background, "classes": list(classes)})


def shown(match: ClassMatch) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    return [(one.name, one.labels, one.truth) for one in match.classes]


def test_names_and_synonyms_match_in_any_case() -> None:
    match = match_classes(labels("cat", "hound", "Puppy", {"name": "couch", "synonyms": ["sofa"]}), TRUTH)
    assert shown(match) == [
        ("background", ("background",), ("background",)),
        ("Cat", ("cat",), ("Cat",)),
        ("dog", ("Puppy",), ("dog",)),
        ("sofa", ("couch",), ("sofa",)),
    ]
    assert match.only_labels == ("hound",) and match.only_truth == ("car", "bus")
    assert match.others == "background"
    assert match.labels[:5].tolist() == [0, 1, 0, 2, 3] and match.labels[255] == NO_CLASS
    assert match.truth[:6].tolist() == [0, 1, 2, 3, 0, 0] and match.truth[255] == 255
    assert match.ontology.names == ("background", "Cat", "dog", "sofa")
    assert (match.ontology.palette() == TRUTH.palette()[:4]).all()


def test_others_can_be_ignored() -> None:
    match = match_classes(labels("cat", "hound"), TRUTH, others="ignored")
    assert match.labels[:3].tolist() == [0, 1, NO_CLASS]
    assert match.truth[:6].tolist() == [0, 1, 255, 255, 255, 255]
    bare = match_classes(labels("cat", "hound", background=None), TRUTH)
    assert bare.others == "ignored" and bare.only_truth[0] == "background"
    with pytest.raises(MaskMillError, match="not both have a class called background"):
        match_classes(labels("cat", background=None), TRUTH, others="background")


def test_the_words_of_a_background_are_no_synonyms() -> None:
    truth = Ontology.from_dict({"name": "t", "background": ["tree"], "classes": ["grass", "cat"]})
    match = match_classes(labels("tree", "cat"), truth)
    assert match.only_labels == ("tree",) and match.only_truth == ("grass",)


def test_a_coarser_class_of_the_labels_is_measured_as_one() -> None:
    own = labels({"name": "vehicle", "synonyms": ["car", "bus"]}, "cat")
    match = match_classes(own, TRUTH)
    assert shown(match)[2] == ("vehicle", ("vehicle",), ("car", "bus"))
    assert match.truth[4] == match.truth[5] == match.labels[1]


def test_a_mapping_comes_first_and_may_be_coarse_on_either_side() -> None:
    own = labels("cat", "hound", "dog", "vehicle", "seat")
    given = {"Hound": ["dog"], "vehicle": ["car", "BUS"], "cat": []}
    match = match_classes(own, TRUTH, given=given)
    assert shown(match) == [
        ("background", ("background",), ("background",)),
        ("dog", ("hound", "dog"), ("dog",)),
        ("vehicle", ("vehicle",), ("car", "bus")),
    ]
    assert match.only_labels == ("cat", "seat") and match.only_truth == ("Cat", "sofa")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"cow": ["dog"]}, "There is no class cow in the labels"),
        ({"cat": ["dgo"]}, "There is no class dgo in the truth"),
        ({"cat": ["dog"], "CAT": ["sofa"]}, "cat and CAT, the same class"),
        ({"cat": ["dog", "Dog"]}, "Dog twice for cat"),
        ({"cat": ["Cat", "dog"], "dog": ["dog"]}, "mixed up"),
    ],
)
def test_a_mapping_that_contradicts_itself_is_refused(given: dict[str, list[str]], says: str) -> None:
    with pytest.raises(MaskMillError, match=says) as error:
        match_classes(labels("cat", "dog"), TRUTH, given=given)
    assert error.value.code == "classes_differ" and error.value.exit_status == 2


def test_what_has_nothing_in_common_or_is_not_whole_is_refused() -> None:
    with pytest.raises(MaskMillError, match="no class in common"):
        match_classes(labels("tree", background=None), TRUTH)
    with pytest.raises(MaskMillError, match="no counterpart of the truth's dog, sofa, car, bus") as error:
        match_classes(labels("cat"), TRUTH, partial=False)
    assert "--common" in error.value.remedy
    assert match_classes(load_ontology("voc20"), load_ontology("voc20"), partial=False).only_labels == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cat: dog\nbird: cat\ncat: sofa\n", ":3: cat is there twice"),
        ("cat: 3\n", "reads 3 as something else"),
        ("yes: cat\n", "reads True as something else"),
        ("- cat\n", "maps no class"),
        ("cat: [dog\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(MaskMillError, match=says):
        read_mapping(str(tmp_path / "map.yaml"))


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text("puppy: dog\npet: [cat, dog]\nsky: null\n")
    assert read_mapping(str(tmp_path / "map.yaml")) == {"puppy": ("dog",), "pet": ("cat", "dog"), "sky": ()}
    with pytest.raises(MaskMillError, match="There is no file"):
        read_mapping(str(tmp_path / "nowhere.yaml"))


def test_the_truth_is_read_in_measured_ids(tmp_path: Path) -> None:
    mask = np.array([[0, 1, 2, 3, 4, 5, 255]], np.uint8)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    Image.fromarray(mask).save(tmp_path / "masks/a.png")
    Image.fromarray(np.zeros((1, 7, 3), np.uint8)).save(tmp_path / "images/a.png")
    whole = open_pairs(str(tmp_path), ontology=TRUTH)
    dataset = matched(
        whole, match_classes(labels("cat", {"name": "vehicle", "synonyms": ["car", "bus"]}), TRUTH)
    )
    reader = pickle.loads(pickle.dumps(dataset.reader()))
    assert reader.truth(dataset.samples[0]).tolist() == [[0, 1, 0, 0, 2, 2, 255]]
    assert reader.image(dataset.samples[0]).shape == (1, 7, 3)
    assert not reader.samples and not reader.whole.samples
    assert dataset.fingerprint() != whole.fingerprint()
