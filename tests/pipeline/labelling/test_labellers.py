"""What every Labeller promises; a new kind needs nothing but a recipe in ``recipe``."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.mosaic import spread
from pipeline.files.images import ImageSettings, fit
from pipeline.files.large.picture import Picture
from pipeline.labelling.base import BaseLabeller
from pipeline.labelling.clipseg.options import ClipSegOptions
from pipeline.labelling.labeller import Labeller, PreparedLabeller
from pipeline.labelling.prepare import prepare_labeller, student_recipe
from pipeline.labelling.recipes import RECIPES, LabelRecipe, change_recipe, table_view
from pipeline.ontology.ontology import Ontology
from pipeline.ontology.reading import load_ontology
from pipeline.table.record import TableRecord
from pipeline.table.statistics import agreement, segments
from pipeline.table.views import View
from pipeline.toyworld.scenes import generate

KINDS = ("maskclip", "student", "clipseg")
ON_GPU = torch.cuda.is_available()
PRECISIONS = ("fp32", "bf16", "fp16") if ON_GPU else ("fp32", "bf16")
TOYWORLD = load_ontology("toyworld")
Prepare = Callable[..., PreparedLabeller]


@pytest.fixture(params=KINDS)
def recipe(request: pytest.FixtureRequest, student_folder: Path, clipseg_file: Path) -> LabelRecipe:
    if request.param == "student":
        return student_recipe(str(student_folder))[0]
    if request.param == "maskclip":
        return change_recipe(RECIPES["toy"], {"temperature": 20.0})  # unsure of some pixels
    return LabelRecipe(
        name="test",
        model="clipseg",
        pretrained=str(clipseg_file),
        clipseg=ClipSegOptions(clip="toyclip:bundled", prefix="plain"),
    )


@pytest.fixture
def prepare(recipe: LabelRecipe) -> Prepare:
    def prepare(ontology: Ontology = TOYWORLD, precision: str = "fp32", **changes: Any) -> PreparedLabeller:
        return prepare_labeller(recipe.replace(**changes), ontology, precision=precision)

    return prepare


def many(count: int, **fields: Any) -> Ontology:
    names = [f"thing number {index}" for index in range(count)]
    return Ontology.from_dict({"name": "many", "classes": names, "templates": ["{}"], **fields})


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch_size", [3, 8])
def test_labels_do_not_depend_on_the_batch(prepare: Prepare, precision: str, batch_size: int) -> None:
    labeller = prepare(precision=precision, batch_size=batch_size).build(threads=1)
    assert labeller.batch_size == batch_size
    images, sizes = list(generate(9, 5, 64).images), [(64 + index, 80) for index in range(5)]
    alone = [labeller.label([image], [size])[0] for image, size in zip(images, sizes, strict=True)]
    for start in range(0, 5, batch_size):
        together = labeller.label(images[start : start + batch_size], sizes[start : start + batch_size])
        for one, other in zip(together, alone[start : start + batch_size], strict=True):
            np.testing.assert_array_equal(one.labels, other.labels)
            np.testing.assert_array_equal(one.confidence, other.confidence)


def test_it_is_the_same_wherever_it_is_built(prepare: Prepare) -> None:
    prepared = prepare()
    image, size = generate(3, 1, 64).images[0], (61, 83)
    first, second, sent = (
        each.build(threads=1).label([image], [size])[0]
        for each in (prepared, prepare(), pickle.loads(pickle.dumps(prepared)))
    )
    assert first.labels.shape == first.confidence.shape == size
    assert first.labels.dtype == first.confidence.dtype == np.uint8
    assert len(np.unique(first.labels)) > 1, "one label everywhere would prove little"
    for other in (second, sent):
        np.testing.assert_array_equal(first.labels, other.labels)
        np.testing.assert_array_equal(first.confidence, other.confidence)


def test_unsure_pixels_are_ignored(prepare: Prepare) -> None:
    image, size = generate(3, 1, 64).images[0], (64, 64)
    labeller = prepare().build()
    assert isinstance(labeller, BaseLabeller)
    (free,) = labeller.label([image], [size])
    limit = (float(np.quantile(free.confidence, 0.3, method="lower")) + 0.5) / 255
    fields = TOYWORLD.to_dict() | {"ignore_index": 200}
    for entry in fields["classes"]:
        entry["threshold"] = limit
    for limited, ignore in (
        (prepare(min_confidence=limit).build(), 255),
        (prepare(Ontology.from_dict(fields), min_confidence=0.999).build(), 200),
        (labeller.with_thresholds([limit] * TOYWORLD.num_classes), 255),
    ):
        (found,) = limited.label([image], [size])
        ignored = found.labels == ignore
        assert 0.2 < ignored.mean() < 0.8
        np.testing.assert_array_equal(ignored, free.confidence < 255 * limit)
        np.testing.assert_array_equal(found.labels[~ignored], free.labels[~ignored])
        np.testing.assert_array_equal(found.confidence, free.confidence)  # before any threshold
    (again,) = labeller.label([image], [size])
    np.testing.assert_array_equal(again.labels, free.labels)


@pytest.mark.parametrize("background", [None, ["wall", "floor"]])
def test_a_view_shows_what_labelling_with_its_threshold_finds(
    prepare: Prepare, recipe: LabelRecipe, background: list[str] | None
) -> None:
    fields = TOYWORLD.to_dict() | {"background": background}
    if recipe.model != "clipseg":  # there the second-best class may step in, which no table holds
        fields["classes"][3]["threshold"] = 0.2  # its own comes first, in labelling as in a view
    classes = Ontology.from_dict(fields)
    image, size = generate(3, 1, 64).images[0], (80, 72)
    low = {"min_confidence": 0.1}
    (free,) = prepare(classes, **low).build().label([image], [size])
    weights = {"model": recipe.model, "pretrained": recipe.pretrained, "fingerprint": "0"}
    record = TableRecord(ontology=classes, recipe=recipe.replace(**low).to_dict(), weights=weights)
    between = (float(np.quantile(free.confidence, 0.4, method="lower")) + 0.5) / 255
    for threshold in (0.4, between):
        (labelled,) = prepare(classes, min_confidence=threshold).build().label([image], [size])
        labels, confidence = table_view(View(threshold=threshold), record).apply(free.labels, free.confidence)
        differs = labels != labelled.labels
        assert (np.abs(free.confidence[differs] - 255 * threshold) <= 0.5).all() and differs.mean() < 0.02
        assert (np.abs(confidence - labelled.confidence.astype(int))[~differs] <= 1).all()
    assert 0.1 < (labels != free.labels).mean() < 0.9, "a threshold without effect would prove little"


@pytest.mark.parametrize(
    ("ontology", "dtype"),
    [
        (many(254), np.uint8),
        (many(255), np.uint16),
    ],
)
def test_ids_take_16_bits_where_8_do_not_hold_them(prepare: Prepare, ontology: Ontology, dtype: Any) -> None:
    labeller = prepare(ontology, min_confidence=1.0).build()
    (found,) = labeller.label([generate(3, 1, 32).images[0]], [(20, 30)])
    assert found.labels.dtype == dtype
    assert (found.labels[found.confidence < 255] == ontology.ignore_index).all()


@pytest.mark.slow
def test_several_threads_may_label_at_a_time(prepare: Prepare) -> None:
    labeller = prepare().build(threads=1)
    # More sizes than MaskCLIP keeps position tables of, so that threads evict each other's.
    images = [generate(3, 1, 16 * side).images[0] for side in range(2, 13) for _ in range(2)]

    def label(image: np.ndarray) -> tuple[np.ndarray, int]:
        return labeller.label([image], [image.shape[:2]])[0].labels, torch.get_num_threads()

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(label, images))
        assert {threads for _, threads in together} == {1}
        for image, (labels, _) in zip(images, together, strict=True):
            np.testing.assert_array_equal(pool.submit(label, image).result()[0], labels)


def test_bf16_agrees_with_fp32(prepare: Prepare) -> None:
    prepared = prepare()
    image = generate(4, 1, 64).images[0]
    exact, coarse = (
        prepared.build(precision=precision).label([image], [(64, 64)])[0] for precision in ("fp32", "bf16")
    )
    assert (exact.labels == coarse.labels).mean() > 0.9
    assert not (exact.confidence == coarse.confidence).all(), "it was computed otherwise"


@pytest.mark.parametrize("size", [(40, 56), (37, 61), (16, 16)])
def test_any_network_size(prepare: Prepare, size: tuple[int, int]) -> None:
    image = generate(3, 1, 64).images[0][: size[0], : size[1]]
    (found,) = prepare().build().label([image], [(33, 71)])
    assert found.labels.shape == (33, 71)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
def test_on_a_gpu_batches_are_larger(prepare: Prepare) -> None:
    assert prepare().build().batch_size >= 8


class _Array(Picture):
    """An image in memory that notes what is read of it."""

    def __init__(self, pixels: np.ndarray) -> None:
        super().__init__((pixels.shape[0], pixels.shape[1]), 1)
        self._pixels = pixels
        self.regions: list[tuple[int, int, int, int]] = []

    def read_stored(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        self.regions.append((top, left, height, width))
        return self._pixels[top : top + height, left : left + width]

    def close(self) -> None: ...


def _in_windows(
    labeller: Labeller, pixels: np.ndarray, settings: ImageSettings
) -> tuple[np.ndarray, np.ndarray]:
    strips = list(labeller.label_picture(_Array(pixels), settings))
    assert [strip.top for strip in strips] == [0, *np.cumsum([len(strip.labels) for strip in strips])[:-1]]
    return tuple(
        np.concatenate([getattr(strip, name) for strip in strips]) for name in ("labels", "confidence")
    )


def _whole_and_windows(
    prepare: Prepare, window: int, overlap: int, **changes: Any
) -> tuple[Labeller, np.ndarray, ImageSettings]:
    scenes = generate(4, 4, 64).images
    pixels = np.concatenate([np.concatenate(scenes[:2], 1), np.concatenate(scenes[2:], 1)])
    settings = ImageSettings(scale=(64, 64), large_window=window, large_overlap=overlap)
    return prepare(**changes).build(threads=1), pixels, settings


def test_one_window_is_the_plain_reading(prepare: Prepare) -> None:
    labeller, pixels, settings = _whole_and_windows(prepare, 128, 0)
    labels, confidence = _in_windows(labeller, pixels, settings)
    (plain,) = labeller.label([fit(pixels, settings)], [(128, 128)])
    np.testing.assert_array_equal(labels, plain.labels)
    np.testing.assert_array_equal(confidence, plain.confidence)
    assert labels.dtype == plain.labels.dtype


@pytest.mark.parametrize("batch_size", [1, 3])
def test_windows_without_overlap_are_images_of_their_own(prepare: Prepare, batch_size: int) -> None:
    labeller, pixels, settings = _whole_and_windows(prepare, 64, 0, batch_size=batch_size)
    labels, confidence = _in_windows(labeller, pixels, settings)
    for top, left in ((0, 0), (0, 64), (64, 0), (64, 64)):
        area = (slice(top, top + 64), slice(left, left + 64))
        (plain,) = labeller.label([np.ascontiguousarray(pixels[area])], [(64, 64)])
        np.testing.assert_array_equal(labels[area], plain.labels)
        np.testing.assert_array_equal(confidence[area], plain.confidence)


def test_windows_change_labels_only_where_they_overlap(prepare: Prepare) -> None:
    labeller, pixels, settings = _whole_and_windows(prepare, 64, 16, min_confidence=0.35)
    labels, _ = _in_windows(labeller, pixels, settings)
    starts = spread(128, 64, 16)
    assert starts == [0, 32, 64]
    (corner,) = labeller.label([np.ascontiguousarray(pixels[:64, :64])], [(64, 64)])
    np.testing.assert_array_equal(labels[:32, :32], corner.labels[:32, :32])


def test_the_image_is_read_once_in_windows(prepare: Prepare) -> None:
    labeller, pixels, settings = _whole_and_windows(prepare, 48, 8)
    picture = _Array(pixels[:, :50])
    for _ in labeller.label_picture(picture, settings):
        pass
    assert picture.regions == [(top, left, 48, 48) for top in spread(128, 48, 8) for left in (0, 2)]


def test_refined_windows_are_labelled_with_the_classes_of_each() -> None:
    recipe = change_recipe(
        RECIPES["toy"], {"refine": "pamr", "refine_classes": 3, "refine_dilations": [1], "refine_steps": 2}
    )
    labeller = prepare_labeller(recipe, TOYWORLD).build(threads=1)
    pixels = np.concatenate(list(generate(4, 2, 64).images), 1)
    settings = ImageSettings(scale=(64, 64), large_window=64, large_overlap=0)
    labels, _ = _in_windows(labeller, pixels, settings)
    for left in (0, 64):
        (plain,) = labeller.label([np.ascontiguousarray(pixels[:, left : left + 64])], [(64, 64)])
        np.testing.assert_array_equal(labels[:, left : left + 64], plain.labels)
    settings = settings.replace(large_overlap=32)
    labels, _ = _in_windows(labeller, pixels, settings)
    assert labels.shape == (64, 128) and len(np.unique(labels)) > 1


@pytest.mark.parametrize("how", ["size", "flip"])
def test_a_second_reading_says_how_far_it_agrees_and_changes_no_label(prepare: Prepare, how: str) -> None:
    images, sizes = list(generate(4, 3, 64).images), [(64, 64), (70, 60), (64, 64)]
    plain = prepare().build(threads=1).label(images, sizes)
    twice = prepare(agreement=how, batch_size=3).build(threads=1).label(images, sizes)
    for one, two in zip(plain, twice, strict=True):
        np.testing.assert_array_equal(one.labels, two.labels)
        np.testing.assert_array_equal(one.confidence, two.confidence)
        assert one.agreement is None and two.agreement is not None
        found = segments(two.labels, two.confidence, ignore_index=255)
        assert len(two.agreement) == len(found) and all(0 <= value <= 1 for value in two.agreement)
    # A network has no sense of left and right that would agree with itself exactly.
    assert any(value < 1 for two in twice for value in two.agreement or [])


def test_a_mirrored_image_agrees_with_itself_mirrored(prepare: Prepare) -> None:
    """The second reading of a symmetric image is the first one, mirrored back."""
    half = generate(4, 1, 64).images[0][:, :32]
    image = np.concatenate([half, half[:, ::-1]], 1)
    labeller = prepare(agreement="flip").build(threads=1)
    (found,) = labeller.label([image], [(64, 64)])
    mirrored = found.labels[:, ::-1]
    assert found.agreement == pytest.approx(agreement(found.labels, mirrored, ignore_index=255))
