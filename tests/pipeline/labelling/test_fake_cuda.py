"""Every Labeller on a fake GPU: from pictures in memory to label maps in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.labelling.base import BaseLabeller
from pipeline.labelling.clipseg.model import ClipSegWeights
from pipeline.labelling.clipseg.options import ClipSegOptions
from pipeline.labelling.clipseg.pictures import Picture
from pipeline.labelling.clipseg.prompting import Finder
from pipeline.labelling.prepare import prepare_labeller, student_recipe
from pipeline.labelling.recipes import RECIPES, LabelRecipe, change_recipe
from pipeline.ontology.ontology import Ontology
from pipeline.ontology.reading import load_ontology
from pipeline.toyworld.scenes import generate
from tests.fake_cuda import CUDA, PRECISIONS, FakeGpu, fake_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")

TOYWORLD = load_ontology("toyworld")
REFINED = {"ks_threshold": 1.0, "pd_threshold": 0.5, "window": 32, "window_stride": 16}
SIZES = [(64, 70), (64, 64), (91, 33)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """A fake GPU that is the best device."""
    for module in ("models.device", "pipeline.labelling.base", "pipeline.labelling.clipseg.prompting"):
        monkeypatch.setattr(f"{module}.best_device", lambda: CUDA)
    with fake_cuda() as gpu:
        yield gpu


@pytest.fixture
def recipes(student_folder: Path, clipseg_file: Path) -> dict[str, tuple[LabelRecipe, Ontology]]:
    clipseg = LabelRecipe(
        name="test",
        model="clipseg",
        pretrained=str(clipseg_file),
        clipseg=ClipSegOptions(clip="toyclip:bundled", prefix="fixed", example_size=64),
    )
    return {
        "maskclip": (RECIPES["toy"], TOYWORLD),
        "maskclip, refined in windows": (change_recipe(RECIPES["toy"], REFINED), TOYWORLD),
        "student": student_recipe(str(student_folder)),
        "clipseg": (clipseg, TOYWORLD),
    }


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["maskclip", "maskclip, refined in windows", "student", "clipseg"])
def test_labels(
    gpu: FakeGpu, recipes: dict[str, tuple[LabelRecipe, Ontology]], kind: str, precision: str
) -> None:
    recipe, ontology = recipes[kind]
    recipe = recipe.replace(min_confidence=0.5, batch_size=4)
    labeller = prepare_labeller(recipe, ontology, precision=precision).build()
    assert isinstance(labeller, BaseLabeller) and labeller.device == CUDA
    images = list(generate(9, 3, 64).images)
    labeller.label(images, SIZES)
    gpu.waits.clear()
    found = labeller.label(images, SIZES)
    for prediction, size in zip(found, SIZES, strict=True):
        assert prediction.labels.shape == prediction.confidence.shape == size
        assert prediction.labels.dtype == prediction.confidence.dtype == np.uint8
    # Of each image: whether its scores are finite, then labels and confidence.
    waits = Counter(gpu.waits)
    check = "prompting.py:check_finite __bool__" if kind == "clipseg" else "labelmap.py:finite_ranges copy"
    assert [(place.rpartition("/")[2], count) for place, count in waits.most_common()] == [
        ("base.py:label copy", 6), (check, 3)
    ]  # fmt: skip


def test_clipseg_with_examples(gpu: FakeGpu, clipseg_file: Path, tmp_path: Path) -> None:
    for name in ("scene", "mask"):
        Image.fromarray(generate(1, 1, 64).images[0]).save(tmp_path / f"{name}.png")
    text = {"name": "dog", "examples": [{"image": "scene.png"}, {"image": "scene.png", "mask": "mask.png"}]}
    path = tmp_path / "ontology.yaml"
    path.write_text(str({"name": "pets", "classes": ["cat", text]}))
    recipe = LabelRecipe(
        name="test",
        model="clipseg",
        pretrained=str(clipseg_file),
        clipseg=ClipSegOptions(clip="toyclip:bundled", example_size=64),
    )
    labeller = prepare_labeller(recipe, load_ontology(path), precision="bf16").build()
    (found,) = labeller.label([generate(9, 1, 64).images[0]], [(64, 64)])
    assert found.labels.shape == (64, 64)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_page_that_finds_prompts(gpu: FakeGpu, clipseg_file: Path, precision: str) -> None:
    finder = Finder(ClipSegWeights(str(clipseg_file), "toyclip:bundled"), precision=precision)
    scene = generate(9, 1, 64).images[0]
    shown = finder.show(Picture(scene, np.ones(scene.shape[:2], np.bool_)))
    prompts: list[tuple[Any, Any]] = [("grass", None), (None, shown), ("a cloud", shown)]
    conditionals = finder.embed(prompts, ("{}", "a {}."))
    maps = list(finder.find(scene, conditionals, (80, 90)))
    assert [one.shape for one in maps] == [(80, 90)] * 3 and maps[0].dtype == np.float32
