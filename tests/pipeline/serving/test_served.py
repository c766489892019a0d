"""What the page shows is what the models say: against the labellers and CLIPSeg itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from jobs.labellers import prepare_labeller, student_recipe
from jobs.recipes import load_recipe
from jobs.serve import entry
from models.clip import load_clip
from models.clipseg import normalize
from models.clipseg_weights import load_clipseg
from models.errors import MaskMillError
from models.visual_prompts import VisualPrompt
from pipeline import toyworld
from pipeline.images import resize, target_size
from pipeline.ontology import load_ontology, parse_classes
from pipeline.serving.models import HeatAnswer, ImagePrompt, LabelAnswer, TextPrompt, unclaimed
from tests.pipeline.test_student import toy_student

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
    labeller = prepare_labeller(recipe, load_ontology("toyworld"), precision="fp32").make(precision="fp32")
    small = resize(SCENE.image, target_size(*SIZE, scale=recipe.scale))
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
    small = resize(SCENE.image, target_size(*SIZE, scale=recipe.scale))

    def labelled(ontology: object) -> np.ndarray:
        labeller = prepare_labeller(recipe, ontology, precision="fp32").make(precision="fp32")  # type: ignore[arg-type]
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
    assert caught.value.code == "vocabulary_fixed"


def test_clipseg_with_words_examples_and_marked_examples(toy_decoder: Path) -> None:
    example = toyworld.scene(2026, 1, 96)
    mask = example.labels == toyworld.CLASSES.index("ladybug")
    prompts = [
        ImagePrompt("whole", example.image),
        TextPrompt("a red ladybug"),
        ImagePrompt("marked", example.image, mask),
    ]
    size = (100, 130)
    answer = entry(str(toy_decoder)).load().predict(SCENE.image, prompts, ("ignored",), size)
    assert isinstance(answer, HeatAnswer)
    assert answer.names == ("whole", "a red ladybug", "marked") and answer.heat.shape == (3, *size)

    model = load_clipseg(toy_decoder, clip=load_clip("toyclip", "bundled"))
    scene, shown = (
        normalize(torch.from_numpy(image).permute(2, 0, 1)[None], 128)
        for image in (SCENE.image, example.image)
    )
    inside = F.adaptive_max_pool2d(torch.from_numpy(mask)[None].float(), 128)
    marked = VisualPrompt(blur=3, background=0.1, context=0.1, size=128)(shown, inside)
    conditionals = torch.cat(
        [
            model.encode_prompt_images(shown),
            model.encode_text(["a red ladybug"]),
            model.encode_prompt_images(marked),
        ]
    )
    with torch.inference_mode():
        p = model(scene, conditionals).sigmoid()
        p = F.interpolate(p, size, mode="bilinear", align_corners=False, antialias=True)[0]
    assert np.abs(answer.heat - 255 * p.numpy()).max() < 1
    assert np.abs(answer.heat[0].astype(int) - answer.heat[2]).max() > 0


def test_a_thin_stroke_is_still_a_mark(toy_decoder: Path) -> None:
    example = toyworld.scene(2026, 1, 1000).image
    stroke = np.zeros(example.shape[:2], bool)
    stroke[501, 400:600] = True
    heat = (
        entry(str(toy_decoder))
        .load()
        .predict(SCENE.image, [ImagePrompt("a", example), ImagePrompt("b", example, stroke)], (), SIZE)
        .heat
    )
    assert (heat[0] != heat[1]).any()
