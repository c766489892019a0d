"""One image at a time, as in a notebook, gives what ``maskmill label`` gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.errors import MaskMillError
from pipeline.files.images import ImageError
from pipeline.labelling.prepare import prepare_labeller
from pipeline.labelling.recipes import RECIPES
from pipeline.labelling.single import load_labeller
from pipeline.ontology.reading import load_ontology, parse_classes
from pipeline.toyworld.scenes import generate

TOYWORLD = load_ontology("toyworld")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    Image.fromarray(generate(7, 1, 128).images[0]).save(path)
    return path


def test_three_lines(scene: Path) -> None:
    labeller = load_labeller("toy", TOYWORLD)
    found = labeller(str(scene))
    pixels = np.asarray(Image.open(scene))
    expected = prepare_labeller(RECIPES["toy"], TOYWORLD).build().label([pixels], [(128, 128)])[0]
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_array_equal(found.confidence, expected.confidence)
    truth = generate(7, 1, 128).labels[0]
    assert (found.labels == truth).mean() > 0.6  # chance is below 0.2
    for same in (scene, pixels, Image.open(scene)):
        np.testing.assert_array_equal(labeller(same).labels, expected.labels)


def test_large_and_rotated_images_keep_their_size(scene: Path, tmp_path: Path) -> None:
    image = Image.open(scene).resize((300, 200))
    rotated = tmp_path / "rotated.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image.save(rotated, exif=exif, quality=95)
    labeller = load_labeller("toy", "grass, sky", settings=["min_confidence=0.5"])
    assert labeller.recipe.min_confidence == 0.5
    assert labeller(image).labels.shape == (200, 300)
    assert labeller(rotated).labels.shape == labeller(Image.open(rotated)).labels.shape == (300, 200)


def test_classes_are_those_of_the_command_line() -> None:
    own = parse_classes("grass, zebra", background="default", templates="toyworld")
    assert load_labeller("toy", "grass, zebra").ontology.hash == own.hash
    assert load_labeller("toy", ["grass", "zebra"]).ontology.hash == own.hash
    assert load_labeller("toy", "grass, zebra", background=False).ontology.names == ("grass", "zebra")
    assert load_labeller(RECIPES["toy"], ["a, b", "c"], background=False).ontology.names == ("a, b", "c")


def test_trained_models(student_folder: Path, scene: Path) -> None:
    student = load_labeller(str(student_folder))
    assert student.ontology.names == TOYWORLD.names and student(scene).labels.shape == (128, 128)
    assert load_labeller(str(student_folder), "lawn, sky").ontology.num_classes == 3


@pytest.mark.parametrize(
    ("model", "classes", "code", "says"),
    [
        ("maskclp", "cat", "name_unknown", "Did you mean maskclip?"),
        ("toy", None, "wrong_use", "Name some"),
        ("toy", "", "ontology_invalid", "no classes"),
    ],
)
def test_mistakes_are_told(model: str, classes: str | None, code: str, says: str) -> None:
    with pytest.raises(MaskMillError) as caught:
        load_labeller(model, classes)
    assert caught.value.code == code and says in str(caught.value)


def test_what_is_no_image(tmp_path: Path) -> None:
    labeller = load_labeller("toy", "grass, sky")
    with pytest.raises(ImageError) as caught:
        labeller(tmp_path / "nowhere.png")
    assert caught.value.code == "not_found"
    for wrong in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            labeller(wrong)
