"""Triplet sources: exactly the expected pairs, with the masks of the datasets."""

from __future__ import annotations

import io
import json
import pickle
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.errors import MaskMillError
from pipeline.datasets.cocojson import CocoDataset, open_coco_json
from pipeline.datasets.phrasecut import PhraseSample, open_phrasecut
from pipeline.datasets.toy import ToyDataset, open_toyworld
from pipeline.ontology.ontology import Ontology
from pipeline.table.views import View
from pipeline.toyworld import scenes as toyworld
from pipeline.toyworld.captions import CLASSES, COLOURS, THINGS
from pipeline.toyworld.phrases import PATTERN_WORDS
from pipeline.toyworld.scenes import VISIBLE_SHARE
from pipeline.training.clipseg.sources.base import IGNORED, OBJECT, OTHER, TripletSource
from pipeline.training.clipseg.sources.benchmarks import (
    open_class_source,
    open_instance_source,
    open_phrase_source,
)
from pipeline.training.clipseg.sources.table import TableSource, open_table_source
from pipeline.training.clipseg.sources.toy import KINDS, open_toy_source
from pipeline.training.clipseg.triplets import TripletSamples, TripletSettings
from pipeline.training.clipseg.unseen import class_phrases
from tests.pipeline.training.samples.test_table import SEED, SIZE, TOY, make, teacher_of

DATA = Path(__file__).resolve().parents[6] / "shared" / "data"
Held = dict[int, dict[str, int]]


def held(source: TripletSource) -> Held:
    """Pairs by image and first wording."""
    found: Held = defaultdict(dict)
    for pair, (image, phrase) in enumerate(zip(source.pairs.image, source.pairs.phrase, strict=True)):
        text = source.pairs.phrases[int(phrase)][0]
        assert text not in found[int(image)]
        found[int(image)][text] = pair
    return dict(found)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


# --- PhraseCut ----------------------------------------------------------------------------------------------


@pytest.fixture
def phrasecut(tmp_path: Path) -> Any:
    """Two images with four phrases, one of them with two instances."""
    folder = tmp_path / "VGPhraseCut_v0"
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    sizes = {4: (20, 30), 30: (24, 18)}
    for number, size in sizes.items():
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.jpg")
    tasks = []
    for image, phrase, polygons in (
        (
            4,
            "red dogs",
            [[[[1, 1], [9, 1], [9, 9]]], [[[12, 3], [20, 3], [20, 15]], [[1, 12], [5, 12], [5, 18]]]],
        ),
        (4, "grass", [[[[0, 0], [29, 0], [29, 8], [0, 8]]]]),
        (30, "grass", [[[[3, 3], [15, 4], [9, 20]]]]),
        (30, "a man", [[[[2, 2], [6, 2], [6, 22], [2, 22]]]]),
    ):
        tasks.append(
            {
                "task_id": f"{image}__{len(tasks)}", "image_id": image, "instance_boxes": [[0, 0, 5, 5]],
                "Polygons": polygons, "phrase": phrase, "phrase_structure": {"name": "x"},
            }
        )  # fmt: skip
    (folder / "refer_train.json").write_text(json.dumps(tasks))
    rows = [{"image_id": number, "height": h, "width": w} for number, (h, w) in sizes.items()]
    (folder / "image_data_split.json").write_text(json.dumps(rows))
    return open_phrasecut(str(tmp_path), split="train")


def test_phrasecut_pairs_are_its_samples(phrasecut: Any) -> None:
    source = pickle.loads(pickle.dumps(open_phrase_source(phrasecut)))
    assert len(source.pairs) == 4 and len(source.pairs.phrases) == 3
    for pair, sample in enumerate(phrasecut.samples):
        assert isinstance(sample, PhraseSample)
        assert source.pairs.phrases[int(source.pairs.phrase[pair])] == (sample.phrase,)
        image, truth = phrasecut.image_and_truth(sample)
        example = source.read(pair)
        assert np.array_equal(example.image, image) and np.array_equal(example.mask, truth)
        assert truth.any() and example.weight is None
    assert source.pairs.image.tolist() == [0, 0, 1, 1]


def test_phrasecut_without_unseen_classes(phrasecut: Any) -> None:
    whole, left = (
        open_phrase_source(phrasecut),
        open_phrase_source(phrasecut, drop=class_phrases(["dog", "man"])),
    )
    assert left.pairs.phrases == (("grass",),) and left.fingerprint != whole.fingerprint
    for pair in (0, 1):
        assert np.array_equal(left.read(pair).mask, whole.read(pair + 1).mask)
    with pytest.raises(MaskMillError) as caught:
        open_phrase_source(phrasecut, drop=lambda _: True)
    assert caught.value.code == "too_few_images"


# --- label maps ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy() -> ToyDataset:
    return open_toyworld(split=f"seed-{SEED}", count=12, size=SIZE)


@pytest.mark.parametrize("min_area", [1, 250])
@pytest.mark.parametrize("class_ids", [None, (0, 3, 8)])
def test_a_pair_for_every_class_in_every_image(
    toy: ToyDataset, min_area: int, class_ids: Sequence[int] | None
) -> None:
    source = pickle.loads(pickle.dumps(open_class_source(toy, class_ids=class_ids, min_area=min_area)))
    found = held(source)
    asked = range(len(CLASSES)) if class_ids is None else class_ids
    texts = {wordings[0]: number for number, wordings in enumerate(source.pairs.phrases)}
    doubtful = 0
    for image, sample in enumerate(toy.samples):
        truth = toy.truth(sample)
        area = {CLASSES[number]: int((truth == number).sum()) for number in asked}
        assert set(found.get(image, ())) == {name for name, pixels in area.items() if pixels >= min_area}
        for name, pair in found.get(image, {}).items():
            example = source.read(pair)
            assert np.array_equal(example.mask == OBJECT, truth == CLASSES.index(name))
        for name, number in texts.items():
            assert source.pairs.may_hold(image, number) == (area[name] > 0)
            doubtful += 0 < area[name] < min_area
    assert class_ids is not None or bool(doubtful) == (min_area > 1)


def test_synonyms_and_ignored_pixels(tmp_path: Path) -> None:
    from pipeline.datasets.pairs import open_pairs

    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    mask = np.zeros((6, 8), np.uint8)
    mask[:3], mask[3:, :2], mask[5] = 1, 2, 255
    (tmp_path / "images" / "a.png").write_bytes(png(np.zeros((6, 8, 3), np.uint8)))
    (tmp_path / "masks" / "a.png").write_bytes(png(mask))
    ontology = Ontology.from_dict(
        {"name": "pets", "background": ["wall"], "classes": [{"name": "cat", "synonyms": ["kitty"]}, "dog"]}
    )
    dataset = open_pairs(
        images=str(tmp_path / "images"), masks=str(tmp_path / "masks"), ontology=ontology, root=None
    )
    source = open_class_source(dataset)
    assert source.pairs.phrases == (("cat", "kitty"), ("dog",))  # no background
    assert open_class_source(dataset, synonyms=False).pairs.phrases == (("cat",), ("dog",))
    found = source.read(0).mask
    assert np.array_equal(found, np.where(mask == 255, IGNORED, np.where(mask == 1, OBJECT, OTHER)))
    with pytest.raises(MaskMillError) as caught:
        open_class_source(dataset, class_ids=[3])
    assert caught.value.code == "wrong_use"


# --- COCO instances -----------------------------------------------------------------------------------------


def coco(folder: Path) -> CocoDataset:
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(png(np.full((20, 20, 3), 9, np.uint8)))

    def box(number: int, category: int, x: int, y: int, width: int, height: int) -> dict[str, Any]:
        corners = [x, y, x + width, y, x + width, y + height, x, y + height]
        return {"id": number, "image_id": 1, "category_id": category, "segmentation": [corners], "iscrowd": 0}

    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 20, "width": 20}],
        "categories": [{"id": 5, "name": "table"}, {"id": 7, "name": "cup"}, {"id": 8, "name": "dog"}],
        "annotations": [box(1, 5, 0, 4, 20, 16), box(2, 7, 6, 8, 4, 5), box(3, 7, 14, 1, 3, 3)],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    ontology = Ontology.from_dict({"name": "home", "classes": ["table", "cup", "dog"]})
    return open_coco_json(str(folder / "instances.json"), str(folder / "images"), ontology=ontology)


def test_instances_are_complete_where_others_cover_them(tmp_path: Path) -> None:
    dataset = coco(tmp_path)
    source = pickle.loads(pickle.dumps(open_instance_source(dataset)))
    pairs = held(source)[0]
    assert set(pairs) == {"table", "cup"}
    table, cup = (source.read(pairs[name]).mask for name in ("table", "cup"))
    assert table.sum() == 16 * 20 and cup.sum() == 4 * 5 + 3 * 3
    flat = held(open_class_source(dataset))[0]
    assert (open_class_source(dataset).read(flat["table"]).mask == OBJECT).sum() == 16 * 20 - 4 * 5
    assert set(held(open_instance_source(dataset, class_ids=[1]))[0]) == {"cup"}


@pytest.mark.skipif(not (DATA / "coco_tiny").is_dir(), reason="shared/data/coco_tiny is not on this machine")
def test_instances_of_real_images() -> None:
    from pycocotools.coco import COCO

    file = next((DATA / "coco_tiny" / "annotations").glob("instances_val*.json"))
    reference = COCO(str(file))
    ontology = Ontology.from_dict({"name": "some", "classes": ["person", "chair", "car"]})
    dataset = open_coco_json(str(file), str(DATA / "coco_tiny" / "val2017"), ontology=ontology)
    source = open_instance_source(dataset)
    ids = {name: reference.getCatIds(catNms=[name])[0] for name in ontology.names}
    numbers = {
        str(Path(image["file_name"]).with_suffix("")): image["id"] for image in reference.imgs.values()
    }
    checked = 0
    for image, texts in list(held(source).items())[:6]:
        number = numbers[dataset.samples[image].name]
        for name, pair in texts.items():
            annotations = reference.loadAnns(reference.getAnnIds(imgIds=number, catIds=[ids[name]]))
            expected = np.max([reference.annToMask(annotation) for annotation in annotations], axis=0)
            assert np.array_equal(source.read(pair).mask, expected)
            checked += 1
    assert checked > 6


# --- label table --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make(tmp_path_factory.mktemp("toy"), 10)


def opened(table: str, **options: Any) -> TableSource:
    return open_table_source(table, **({"ontology": TOY} | options))


def test_a_view_decides_what_is_asked_for_and_where_it_is(table: str) -> None:
    view = View(threshold=0.5, merge={"animal": ("zebra", "fish")}).of(TOY)
    source = opened(table, ontology=view.ontology, view=view)
    assert source.fingerprint != opened(table, ontology=view.ontology).fingerprint
    assert source.name == "label table (confidence from 0.5; zebra and fish are animal)"
    found = held(source)
    for index in range(10):
        labels, _ = view.apply(*teacher_of(index))
        assert set(found[index]) == {
            view.ontology.names[number] for number in np.unique(labels[labels != 255])
        }
        for name, pair in found[index].items():
            expected = np.where(labels == 255, IGNORED, labels == view.ontology.names.index(name))
            assert np.array_equal(source.read(pair).mask, expected)


def test_a_table_s_labels_weigh_by_their_confidence(table: str) -> None:
    source = pickle.loads(pickle.dumps(opened(table)))
    found = held(source)
    for index in range(10):
        labels, confidence = teacher_of(index)
        names = {CLASSES[number] for number in np.unique(labels[labels != 255])}
        assert set(found[index]) == names
        for name, pair in found[index].items():
            example = source.read(pair)
            expected = np.where(labels == 255, IGNORED, labels == CLASSES.index(name))
            assert np.array_equal(example.mask, expected)
            assert example.weight is not None
            np.testing.assert_allclose(example.weight, confidence / 255, rtol=1e-6)
            assert np.array_equal(example.image, toyworld.scene(SEED, index, SIZE).image)
    # Samples too: half the confidence is half the weight, and ignored pixels have weight 0.
    samples = TripletSamples(source, TripletSettings(size=SIZE, with_visual=False, q_neg=0.5))
    for index in range(5):
        sample = samples.load(index, np.random.default_rng(index))
        labels, confidence = teacher_of(int(source.pairs.image[index]))
        np.testing.assert_allclose(sample["weight"], np.where(labels == 255, 0, confidence / 255), rtol=1e-6)


@pytest.mark.parametrize("limits", [{"min_share": 0.1}, {"min_confidence": 0.5}])
def test_faint_classes_of_a_table_are_neither_asked_for_nor_negatives(
    table: str, limits: dict[str, float]
) -> None:
    source = opened(table, **limits)
    found = held(source)
    texts = {wordings[0]: number for number, wordings in enumerate(source.pairs.phrases)}
    faint = 0
    for index in range(10):
        labels, confidence = teacher_of(index)
        known = labels != 255
        for name in texts:
            inside = labels == CLASSES.index(name)
            good = inside.any() and (
                inside.sum() / known.sum() >= limits.get("min_share", 0)
                and confidence[inside].mean() / 255 >= limits.get("min_confidence", 0) - 1e-3
            )
            assert (name in found.get(index, {})) == good
            assert source.pairs.may_hold(index, texts[name]) == inside.any()
            faint += bool(inside.any()) and not good
    assert faint


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"min_confidence": 1.0}, "too_few_images"),
        ({"min_share": 1.5}, "wrong_use"),
        ({"class_ids": [99]}, "wrong_use"),
    ],
)
def test_wrong_table_options(table: str, options: dict[str, Any], code: str) -> None:
    with pytest.raises(MaskMillError) as caught:
        opened(table, **options)
    assert caught.value.code == code


def test_table_pairs_by_synonym_and_of_some_classes(table: str) -> None:
    words = {"name": "mine", "classes": [{"name": "insect", "synonyms": ["ladybug"]}, "grass", "moon"]}
    source = opened(table, ontology=Ontology.from_dict(words))
    assert set(source.pairs.phrases) <= {("insect", "ladybug"), ("grass",)}
    assert opened(table, class_ids=[0]).pairs.phrases == (("grass",),)
    assert opened(table).fingerprint == opened(table).fingerprint != opened(table, class_ids=[0]).fingerprint


@pytest.mark.parametrize("grouped", [False, True])
def test_order_over_a_table_has_every_pair_once(table: str, grouped: bool) -> None:
    source = opened(table)
    orders = [source.order(epoch, 1, grouped=grouped).tolist() for epoch in (0, 0, 1)]
    assert orders[0] == orders[1] and sorted(orders[0]) == list(range(len(source.pairs)))
    assert (orders[0] == orders[2]) == grouped


# --- toy phrases --------------------------------------------------------------------------------------------


def test_toy_phrases_are_true_of_the_drawn_scene(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with the colours that the scene was drawn with, intercepted where its caption is written."""
    drawn: list[dict[str, str]] = []
    caption = toyworld.caption

    def listen(rng: Any, visible: Any, colour_of: dict[str, str], light: float) -> str:
        drawn.append(dict(colour_of))
        return caption(rng, visible, colour_of, light)

    monkeypatch.setattr(toyworld, "caption", listen)
    dataset = open_toyworld(split="seed-41", count=50, size=64)
    source = open_toy_source(dataset)
    found = held(source)
    assert len(drawn) == 50
    coloured = wrong = 0
    kinds = dict.fromkeys(KINDS, 0)
    for image, colours in enumerate(drawn[:50]):
        labels = toyworld.scene(41, image, 64).labels
        area = np.bincount(labels.ravel(), minlength=len(CLASSES)) / labels.size
        seen = {name for name, share in zip(CLASSES, area, strict=True) if share >= VISIBLE_SHARE}
        things = [name for name in THINGS if area[CLASSES.index(name)] > 0]
        for text, pair in found[image].items():
            classes = {CLASSES[number] for number in np.unique(labels[source.read(pair).mask == OBJECT])}
            first, last = text.split(" ", 1)[0], text.rsplit(" ", 1)[-1]
            if text in CLASSES:
                kinds["names"] += 1
                assert classes == {text} <= seen
            elif text in PATTERN_WORDS:
                kinds["patterns"] += 1
                assert classes == {PATTERN_WORDS[text]} <= seen
            elif last in ("thing", "things") and first in ("one", "two", "three"):
                kinds["counts"] += 1
                assert classes == set(things) <= seen
                assert len(things) == ("one", "two", "three").index(first) + 1
            elif first == "something":
                kinds["colours"] += 1
                same = {name for name in seen if colours[name] == text.removeprefix("something ")}
                coloured, wrong = coloured + 1, wrong + (classes != same)
            else:
                kinds["coloured"] += 1
                assert classes == {last}
                coloured, wrong = coloured + 1, wrong + (text != f"{colours[last]} {last}")
    assert min(kinds.values()) > 20
    assert wrong <= 0.02 * coloured


def test_toy_negatives_are_absent() -> None:
    dataset = open_toyworld(split="seed-7", count=20, size=48)
    source = open_toy_source(dataset, kinds=["names", "colours"])
    texts = {wordings[0]: number for number, wordings in enumerate(source.pairs.phrases)}
    absent = 0
    for image in range(20):
        labels = toyworld.scene(7, image, 64).labels
        present = {CLASSES[number] for number in np.unique(labels)}
        for text, number in texts.items():
            if not source.pairs.may_hold(image, number):
                absent += 1
                colour = text.removeprefix("something ")
                # A colour can only be absent if no class of the scene always has it.
                assert text not in present
                assert not any(COLOURS[name] == ((colour, 1.0),) for name in present)
    assert absent > 100
    with pytest.raises(MaskMillError):
        open_toy_source(dataset, kinds=["sounds"])  # type: ignore[list-item]
