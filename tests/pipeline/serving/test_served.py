"""What the page shows is what the models say: against the labellers and CLIPSeg itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from jobs.segment import Segment
from jobs.serve import entry
from models.errors import MaskMillError
from pipeline.files.images import fit
from pipeline.labelling.clipseg.pictures import Picture
from pipeline.labelling.prepare import prepare_labeller, student_recipe
from pipeline.labelling.recipes import load_recipe
from pipeline.ontology.reading import load_ontology, parse_classes
from pipeline.serving.registry import HeatAnswer, ImagePrompt, LabelAnswer, TextPrompt, unclaimed
from pipeline.toyworld import scenes as toyworld
from tests.pipeline.trained.test_student import toy_student

SCENE = toyworld.scene(2026, 0, 160)
SIZE = (160, 160)
EVERYTHING = [TextPrompt(name) for name in toyworld.CLASSES]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student") / "run"
    toy_student(path)
    return path


def test_the_toy_teacher_labels_as_its_labeller() -> None:
    recipe = load_recipe("toy")
    labeller = prepare_labeller(recipe, load_ontology("toyworld"), precision="fp32").build(precision="fp32")
    small = fit(SCENE.image, recipe.images)
    (expected,) = labeller.label([small], [SIZE])
    answer = entry("toy").load().predict(SCENE.image, EVERYTHING, (), SIZE)
    assert isinstance(answer, LabelAnswer) and answer.names == toyworld.CLASSES and answer.other is None
    # The served one may compute in bf16, where the processor does.
    assert (answer.labels == expected.labels).mean() > 0.99
    assert (answer.labels == SCENE.labels).mean() > 0.85


def test_context_competes_with_the_prompts() -> None:
    teacher = entry("toy").load()
    name = "sunflower"
    mask = SCENE.labels == toyworld.CLASSES.index(name)
    alone = teacher.predict(SCENE.image, [TextPrompt(name)], (), SIZE)
    assert alone.other is None and (alone.labels == 0).all()  # nothing else could win
    answer = teacher.predict(SCENE.image, [TextPrompt(name)], toyworld.CLASSES, SIZE)
    assert answer.names == (name, "something else") and answer.other == 1
    found = answer.labels == 0
    assert (found & mask).sum() / (found | mask).sum() > 0.5
    assert (found & mask).sum() > 0.6 * mask.sum()


@pytest.mark.parametrize(
    ("words", "prompts", "left"),
    [
        (["cat", "dog"], ["dog"], ("cat",)),
        (["cat", "dogs"], ["a small dog"], ("cat",)),
        (["cat", "dog"], ["two dogs"], ("cat",)),
        (["cat", "cat"], ["catalogue"], ("cat",)),
        (["sky", "car"], ["Sky"], ("car",)),
        ([], ["sky"], ()),
    ],
)
def test_context_gives_way_to_prompts(words: list[str], prompts: list[str], left: tuple[str, ...]) -> None:
    assert unclaimed(words, [TextPrompt(prompt) for prompt in prompts]) == left


def test_a_student_with_its_own_classes_and_with_others(student: Path) -> None:
    served = entry(str(student)).load()
    recipe, own = student_recipe(str(student))
    small = fit(SCENE.image, recipe.images)

    def labelled(ontology: object) -> np.ndarray:
        labeller = prepare_labeller(recipe, ontology, precision="fp32").build(precision="fp32")  # type: ignore[arg-type]
        return labeller.label([small], [SIZE])[0].labels

    expected = labelled(own)
    answer = served.predict(SCENE.image, [], own.names, SIZE)
    assert answer.names == own.names
    assert (answer.labels == expected).mean() > 0.98

    ids = np.bincount(expected.ravel(), minlength=14).argsort()[::-1][:2]
    names = [own.names[i] for i in ids]
    answer = served.predict(SCENE.image, [TextPrompt(name) for name in names], own.names, SIZE)
    assert answer.names == (*names, "something else") and answer.other == 2
    for index, class_id in enumerate(ids):
        assert ((answer.labels == index) == (expected == class_id)).mean() > 0.98

    others = parse_classes("zebra stripes, green thing, fruit", background=None, templates="toyworld")
    answer = served.predict(SCENE.image, [TextPrompt(name) for name in others.names], (), SIZE)
    assert answer.names == others.names and answer.other is None
    assert (answer.labels == labelled(others)).mean() > 0.98
    again = served.predict(SCENE.image, [], own.names, SIZE)  # its own classifier is back in place
    assert (again.labels == expected).mean() > 0.98


def test_a_student_with_a_learned_background_takes_no_other_words(tmp_path: Path) -> None:
    ontology = parse_classes("grass, sky", background=["stone", "house"], templates="toyworld")
    toy_student(tmp_path / "run", ontology=ontology, learned_background=True)
    served = entry(str(tmp_path / "run")).load()
    answer = served.predict(SCENE.image, [], ontology.names, SIZE)
    assert answer.names == ("background", "grass", "sky") and answer.other == 0
    answer = served.predict(SCENE.image, [TextPrompt("sky")], ontology.names, SIZE)
    assert answer.names == ("sky", "something else")
    with pytest.raises(MaskMillError) as caught:
        served.predict(SCENE.image, [TextPrompt("fish")], ontology.names, SIZE)
    assert caught.value.code == "classes_differ"


def test_clipseg_answers_as_segment_does(toy_decoder: Path, tmp_path: Path) -> None:
    """The same weights, words and examples: the page's maps are the heat maps of ``maskmill segment``."""
    example = toyworld.scene(2026, 1, 96)
    mask = example.labels == toyworld.CLASSES.index("ladybug")
    Image.fromarray(SCENE.image).save(tmp_path / "scene.png")
    Image.fromarray(example.image).save(tmp_path / "example.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    command = Segment(
        images=(str(tmp_path / "scene.png"),),
        output=str(tmp_path / "out"),
        prompts=("a red ladybug",),
        prompt_images=(str(tmp_path / "example.png"),) * 2,
        prompt_masks=("-", str(tmp_path / "mask.png")),
        weights=str(toy_decoder),
    )
    status = command.run(Console(quiet=True))
    assert status == 0
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["settings"]["size"] == record["settings"]["example_size"] == 128  # the toy CLIP's own
    heat = [
        np.asarray(Image.open(tmp_path / "out" / one["files"]["heat"]))
        for one in record["images"][0]["prompts"]
    ]
    prompts = [
        ImagePrompt("whole", Picture(example.image)),
        TextPrompt("a red ladybug"),
        ImagePrompt("marked", Picture(example.image, mask)),
    ]
    served = entry(str(toy_decoder))
    assert {one["threshold"] for one in record["prompts"]} == {served.info.threshold} == {0.3}
    answer = served.load().predict(SCENE.image, prompts, ("ignored",), SIZE)
    assert isinstance(answer, HeatAnswer) and answer.names == ("whole", "a red ladybug", "marked")
    for ours, theirs in zip(answer.heat, (heat[1], heat[0], heat[2]), strict=True):
        assert np.abs(ours.astype(int) - theirs).max() <= 1  # batches of other sizes round otherwise
    assert (answer.heat[0] != answer.heat[2]).any()


def test_a_thin_stroke_is_still_a_mark(toy_decoder: Path) -> None:
    example = toyworld.scene(2026, 1, 1000).image
    stroke = np.zeros(example.shape[:2], bool)
    stroke[501, 400:600] = True
    heat = (
        entry(str(toy_decoder))
        .load()
        .predict(
            SCENE.image,
            [ImagePrompt("a", Picture(example)), ImagePrompt("b", Picture(example, stroke))],
            (),
            SIZE,
        )
        .heat
    )
    assert (heat[0] != heat[1]).any()
