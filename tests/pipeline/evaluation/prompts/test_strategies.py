"""Visual prompts shown to CLIP, against open_clip's own towers one object at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.clip.loading import Clip, load_source
from models.clip.weights import OPENAI_MEAN, OPENAI_STD, WeightSource
from models.clipseg.visual_prompts import TABLE2, VisualPrompt
from pipeline.datasets.registry import open_dataset
from pipeline.evaluation.prompts.strategies import (
    LEAST_SHARE,
    STRATEGIES,
    UNMODIFIED,
    Shown,
    draw_objects,
    object_probabilities,
)
from pipeline.evaluation.published import load_published
from tests.pipeline.evaluation.prompts.test_protocols import SMALL


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_source(WeightSource("small", "random:0", SMALL, None, 0, OPENAI_MEAN, OPENAI_STD))


def test_strategies_are_those_of_the_published_table() -> None:
    assert list(STRATEGIES) == [line.method for line in load_published("clipseg_visual_prompts").rows]
    assert [strategy for strategy in STRATEGIES.values() if isinstance(strategy, VisualPrompt)] == [
        prompt for name, prompt in TABLE2.items() if name != "image"
    ]


def objects() -> Iterator[Shown]:
    generator = torch.Generator().manual_seed(1)
    for number, names in enumerate((("dog", "cat", "car"), ("road", "dog", "tree", "sky"))):
        mask = np.zeros((352, 352), bool)
        mask[40 + 90 * number : 200, 30:300] = True
        yield Shown(torch.randn(3, 352, 352, generator=generator), mask, names)


def test_probabilities(clip: Clip) -> None:
    strategies = ["crop & blur & 10 %", "BG intensity 0 %"]
    done: list[int] = []
    found = object_probabilities(clip, objects(), strategies, progress=done.append)
    assert done == [2] and list(found) == [UNMODIFIED, *strategies]
    crop = VisualPrompt(blur=3, background=0.1, context=0.1)
    for place, shown in enumerate(objects()):
        image, mask = shown.image[None], torch.from_numpy(shown.mask)[None]
        text = clip.model.encode_text(  # type: ignore[operator]
            clip.tokenizer([f"a photo of a {name}" for name in shown.names]), normalize=True
        )
        made = {
            UNMODIFIED: image,
            strategies[0]: crop(image, mask),
            strategies[1]: image * mask[:, None],
        }
        for name, pixels in made.items():
            small = F.interpolate(pixels, (64, 64), mode="bilinear", align_corners=False)
            logits = 100 * F.normalize(clip.visual(small), dim=-1) @ text.T
            assert found[name][place] == pytest.approx(float(logits.softmax(-1)[0, 0]), abs=2e-4)
    assert found[UNMODIFIED] != found[strategies[0]] != found[strategies[1]]


def test_objects_are_large_things_of_images_that_show_three() -> None:
    dataset = open_dataset("toyworld", count=12)
    kinds = dict(zip(dataset.class_names, dataset.classes.kinds(), strict=True))  # type: ignore[attr-defined]
    assert {"thing", "stuff"} <= set(kinds.values())
    expected = 0
    for sample in dataset.samples:
        share = np.bincount(dataset.truth(sample).ravel(), minlength=len(kinds)) / 128**2
        things = [i for i, kind in enumerate(kinds.values()) if kind == "thing" and share[i] > 0]
        if len(things) >= 3:
            expected += sum(share[i] >= LEAST_SHARE for i in things)
    drawn = list(draw_objects(dataset))  # type: ignore[arg-type]
    assert len(drawn) == expected > 2
    for shown in drawn:
        assert len(set(shown.names)) == len(shown.names) >= 3
        assert all(kinds[name] == "thing" for name in shown.names)
        assert shown.mask.mean() >= LEAST_SHARE * 0.9
    some = list(draw_objects(dataset, 2))  # type: ignore[arg-type]
    assert [shown.names for shown in some] == [shown.names for shown in drawn[:2]]
    other = list(draw_objects(dataset, seed=1))  # type: ignore[arg-type]
    assert sorted(shown.names for shown in other) == sorted(shown.names for shown in drawn)
