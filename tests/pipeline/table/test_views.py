from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from models.errors import MaskMillError
from pipeline.files.storage import open_storage
from pipeline.ontology.ontology import Ontology
from pipeline.table.views import TableView, View, parse_view, read_view, save_view, saved_views

PETS = Ontology.from_dict(
    {
        "name": "pets",
        "background": ["wall", "floor"],
        "classes": [
            {"name": "cat", "synonyms": ["kitten"], "kind": "thing"},
            {"name": "dog", "synonyms": ["puppy"], "kind": "thing", "threshold": 0.5},
            {"name": "grass", "color": "#3a9d4b", "kind": "stuff"},
            "sky",
        ],
    }
)
APPLIED = PETS.thresholds()
IGNORED = 255


def bound(**fields: object) -> TableView:
    return parse_view(fields, "test").of(PETS, applied=APPLIED)


def maps(seed: int = 0, shape: tuple[int, int] = (40, 50)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1, 2, 3, 4, IGNORED], shape).astype(np.uint8)
    confidence = rng.integers(0, 256, shape).astype(np.uint8)
    confidence[(labels == 2) & (confidence < 128)] = 128  # the labelling's own threshold
    return labels, confidence


def test_a_view_without_fields_changes_nothing() -> None:
    labels, confidence = maps()
    view = bound()
    assert view.view.changes_nothing and view.ontology is PETS
    found, sure = view.apply(labels, confidence)
    assert (found == labels).all() and (sure == confidence).all() and found.dtype == np.uint8


@given(st.floats(0, 1), st.integers(1, 4), st.floats(0.5, 1))
def test_thresholds_are_those_of_labelling(threshold: float, number: int, own: float) -> None:
    labels, confidence = maps()
    name = PETS.names[number]
    found, _ = bound(threshold=threshold, thresholds={name: own}).apply(labels, confidence)
    limits = np.full(256, threshold)
    limits[2] = 0.5  # dog's own, which comes before the general one, as in labelling
    limits[number] = own
    p = confidence / 255
    clear = np.abs(p - limits[labels]) > 0.5 / 255
    expected = np.where((labels != IGNORED) & (p < limits[labels]), IGNORED, labels)
    assert (found == expected)[clear].all()


def test_a_threshold_below_that_of_the_labelling_is_refused() -> None:
    with pytest.raises(MaskMillError, match=r"labelled with a threshold of 0\.5 for dog") as error:
        bound(thresholds={"dog": 0.4})
    assert error.value.code == "wrong_use" and error.value.exit_status == 2
    labels, confidence = maps()
    confidence[labels == 2] = 127  # p = 0.5 rounds to 128, or to 127 in 32 bits: it was kept, and stays
    assert (bound(thresholds={"dog": 0.5}).apply(labels, confidence)[0] == labels).all()


def test_classes_are_merged_dropped_and_renamed() -> None:
    labels, confidence = maps()
    view = bound(merge={"pet": ["Dog", "cat"]}, drop=["sky"], rename={"grass": "lawn"})
    assert view.ontology.names == ("background", "pet", "lawn")
    pet = ["pet", "cat", "kitten", "dog", "puppy"]
    assert view.ontology.prompts() == [["wall", "floor"], pet, ["lawn", "grass"]]
    before, after = PETS.palette(), view.ontology.palette()
    assert (after == before[[0, 1, 3]]).all()
    assert view.ontology.kinds() == ["stuff", "thing", "stuff"]
    found, _ = view.apply(labels, confidence)
    expected = np.array([0, 1, 1, 2, IGNORED])
    known = labels != IGNORED
    assert (found[known] == expected[labels[known]]).all() and (found[~known] == IGNORED).all()


def test_classes_can_become_background_and_background_can_go() -> None:
    view = bound(merge={"background": ["sky", "grass"]})
    assert view.ontology.names == ("background", "cat", "dog")
    assert view.ontology.prompts()[0] == ["wall", "floor", "grass", "sky"]
    assert view.apply(*maps())[0].max() == IGNORED and set(np.unique(view.apply(*maps())[0])) == {
        0,
        1,
        2,
        255,
    }
    without = bound(drop=["background"])
    assert without.ontology.names == ("cat", "dog", "grass", "sky")
    assert without.lookup[:5].tolist() == [IGNORED, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"drop": ["gras"]}, "There is no class gras in the table"),
        ({"thresholds": {"cow": 0.5}}, "There is no class cow"),
        ({"drop": ["cat"], "rename": {"cat": "lynx"}}, "two things of cat"),
        ({"merge": {"pet": ["cat", "dog"], "animal": ["dog"]}}, "two things of dog"),
        ({"merge": {"scene": ["background", "sky"]}}, "no class like the others"),
        ({"rename": {"cat": "dog"}}, "'dog'"),
        ({"drop": ["cat", "dog", "grass", "sky"]}, "no class but background"),
        ({"drop": list(PETS.names)}, "drops all classes"),
        ({"merge": {"pet": ["cat", "dog"]}, "min_areas": {"cat": 5}}, "a part of pet"),
        ({"merge": {"pet": []}}, "merges nothing"),
    ],
)
def test_what_contradicts_itself_or_the_table_is_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(MaskMillError, match=says) as error:
        bound(**fields)
    assert error.value.exit_status == 2
    if "gras" in says:
        assert error.value.remedy.startswith("Did you mean grass?")


@given(st.integers(0, 2**32 - 1), st.integers(0, 40))
def test_small_components_are_ignored(seed: int, least: int) -> None:
    labels, confidence = maps(seed, (17, 23))
    labels = np.repeat(np.repeat(labels, 2, 0), 3, 1)
    confidence = np.full(labels.shape, 255, np.uint8)
    view = bound(merge={"pet": ["cat", "dog"]}, min_area=least, min_areas={"sky": 0, "pet": 12})
    found, _ = view.apply(labels, confidence)
    expected = view.lookup[labels]
    areas = {0: least, 1: 12, 2: least, 3: 0}
    for number, smallest in areas.items():
        components, count = ndimage.label(expected == number, np.ones((3, 3)))
        sizes = np.bincount(components.ravel(), minlength=count + 1)
        small = sizes < smallest
        small[0] = False
        expected = np.where(small[components], IGNORED, expected)
    assert (found == expected).all()


def test_weak_pixels_become_the_remainder_where_there_is_one() -> None:
    labels, confidence = np.array([[1, 1, 0, IGNORED]], np.uint8), np.array([[90, 200, 30, 7]], np.uint8)
    view = View(threshold=0.5).of(PETS, applied=np.full(5, 0.3, np.float32), remainder=True)
    found, sure = view.apply(labels, confidence)
    assert found.tolist() == [[0, 1, 0, IGNORED]] and sure.tolist() == [[165, 200, 30, 7]]
    with pytest.raises(MaskMillError, match="background has no threshold"):
        View(thresholds={"background": 0.5}).of(PETS, remainder=True)


def test_names_are_found_however_they_are_typed() -> None:
    classes = Ontology.from_dict({"name": "n", "classes": ["caf\u00e9 au lait", "Stra\u00dfe", "=,x"]})
    view = View(drop=("CAFE\u0301  AU LAIT",), rename={"STRASSE": "road"}, thresholds={"=,x": 0.5}).of(
        classes
    )
    assert view.ontology.names == ("road", "=,x") and view.least[2] == 128


def test_many_classes_become_few() -> None:
    wide = Ontology.from_dict({"name": "wide", "classes": [f"c{number}" for number in range(300)]})
    view = View(merge={"rest": tuple(f"c{number}" for number in range(2, 300))}).of(wide)
    found, _ = view.apply(np.array([[0, 1, 299, 65_535]], np.uint16), np.zeros((1, 4), np.uint8))
    assert found.tolist() == [[0, 1, 2, 255]] and found.dtype == np.uint8


def test_files_are_read_kept_and_never_overwritten(tmp_path: Path) -> None:
    view = View(threshold=0.25, merge={"pet": ("cat", "dog")}, drop=("sky",))
    table = tmp_path / "table"
    place = save_view(view, str(table), "strict")
    assert place == str(table / "views" / "strict.json")
    assert save_view(view, str(table), "strict") == place
    assert read_view("strict", str(table)) == view
    assert read_view(place, "anywhere") == view
    with pytest.raises(MaskMillError, match="another view") as error:
        save_view(View(), str(table), "strict")
    assert error.value.code == "output_exists" and read_view("strict", str(table)) == view
    assert list(saved_views(open_storage(table))) == ["strict"]
    with pytest.raises(MaskMillError) as error:
        read_view("stric", str(table))
    assert error.value.remedy.startswith("Did you mean strict?")
    with pytest.raises(MaskMillError, match="no name for a view"):
        save_view(view, str(table), "../dataset")
    (tmp_path / "v.yaml").write_text("threshold: 0.25\nmerge: {pet: [cat, dog]}\ndrop: [sky]\n")
    assert read_view(str(tmp_path / "v.yaml"), "anywhere").hash == view.hash


def test_views_are_kept_in_object_stores(bucket: str) -> None:
    view = View(min_area=7)
    assert save_view(view, bucket, "small") == f"{bucket}/views/small.json"
    with pytest.raises(MaskMillError, match="another view"):
        save_view(View(min_area=8), bucket, "small")
    assert read_view("small", bucket) == read_view(f"{bucket}/views/small.json", "anywhere") == view


@pytest.mark.parametrize(
    ("text", "says", "code"),
    [
        ("treshold: 0.5", "Did you mean threshold?", "setting_invalid"),
        ("threshold: 1.5", "threshold: Input should be less than or equal to 1", "setting_invalid"),
        ("min_area: 2.5", "min_area", "setting_invalid"),
        ("min_areas: {cat: 9223372036854775808}", "min_areas", "setting_invalid"),
        ("- cat", "it has no fields", "setting_invalid"),
        ("schema_version: 2", "newer MaskMill", "newer_version"),
        ("threshold: [", "v.yaml:", "setting_invalid"),
    ],
)
def test_a_file_that_is_no_view_is_refused(tmp_path: Path, text: str, says: str, code: str) -> None:
    (tmp_path / "v.yaml").write_text(text)
    with pytest.raises(MaskMillError) as error:
        read_view(str(tmp_path / "v.yaml"), "table")
    assert says in str(error.value) and error.value.code == code


def test_changes_add_to_a_view() -> None:
    base = View(threshold=0.2, thresholds={"cat": 0.4, "dog": 0.6}, drop=("sky",))
    changed = base.with_changes(View(threshold=0.3, thresholds={"dog": 0.7}, drop=("grass",)))
    assert changed == View(threshold=0.3, thresholds={"cat": 0.4, "dog": 0.7}, drop=("sky", "grass"))
    twice = View(drop=("sky", "Sky"), merge={"pet": ("cat", "CAT", "dog")}).of(PETS)
    assert twice.ontology.names == ("background", "pet", "grass")
    assert base.hash != changed.hash == View.model_validate(json.loads(changed.model_dump_json())).hash
