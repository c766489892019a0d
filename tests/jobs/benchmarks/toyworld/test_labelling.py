from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from jobs.benchmarks.toyworld.labelling import Bench, Condition, measure, refinement, scene_set, vocabulary
from models.clip.loading import load_clip
from models.clip.text import build_text_classifier
from models.device import DTYPES, best_device, native_precision
from models.labelmap import label_map
from models.maskclip import MaskClip
from models.settings import MaskClipSettings
from pipeline.files.corruptions import corrupt
from pipeline.ontology.reading import load_ontology
from pipeline.toyworld.scenes import CLASSES

SEEDS, SCENES = (11, 12), 4


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    made = Bench(SEEDS, SCENES, workers=2)
    yield made
    made.close()


def by_hand(corruption: tuple[str, int] | None, **options: object) -> list[float]:
    """The same figure from the model, the label maps and sets of pixels alone."""
    import torch

    dtype = DTYPES[native_precision(best_device())]
    clip = load_clip("toyclip", "bundled", dtype=dtype)
    text = build_text_classifier(clip, [[name] for name in CLASSES], templates="toyworld")
    settings = {"head": "value", "image_stats": "clip", "profile": "weights", **options}
    model = MaskClip(clip, text, MaskClipSettings(**settings))
    found = []
    for seed in SEEDS:
        made = scene_set(seed, SCENES, 128)
        pairs = []
        for index, image in enumerate(made.images):
            if corruption:
                image = corrupt(image, *corruption, seed=index)
            scores = model.grid_scores(torch.from_numpy(image).permute(2, 0, 1)[None])[0]
            labels, _ = label_map(scores, network_size=(128, 128), image_size=(128, 128))
            pairs.append((made.labels[index], labels.numpy()))
        truth, labels = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
        ious = []
        for number in range(len(CLASSES)):
            union = ((truth == number) | (labels == number)).sum()
            if union:
                ious.append(((truth == number) & (labels == number)).sum() / union)
        found.append(float(np.mean(ious)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("condition", "corruption", "options"),
    [
        (Condition("a"), None, {}),
        (Condition("b", {"head": "plain"}), None, {"head": "plain"}),
        (Condition("c", corruption=("gaussian_noise", 4)), ("gaussian_noise", 4), {}),
        (Condition("d", {"window": 64, "window_stride": 32}), None, {"window": 64, "window_stride": 32}),
    ],
)
def test_a_condition_gives_the_figure_of_the_model(condition, corruption, options) -> None:
    assert measure(condition, SEEDS, SCENES)["miou"] == pytest.approx(by_hand(corruption, **options))


@pytest.mark.slow
def test_a_section_compares_rows_on_the_same_scenes_and_measures_each_once(bench: Bench) -> None:
    section, claims = refinement(bench)
    assert len(section.rows) == 10 and len(claims) == 3
    assert all(len(line.values["miou"].runs) == len(SEEDS) for line in section.rows)
    done = bench.done
    again, _ = refinement(bench)
    assert again == section and bench.done == done


def test_words_outside_the_classes_are_scored(bench: Bench) -> None:
    section, claims = vocabulary(bench)
    figures = {line.name: line.values["auc"].mean for line in section.rows}
    assert figures["something wavy"] > 0.8  # water has the best pattern word
    assert "a yellow spotted thing" in figures
    assert claims[0].detail and "AUC" in claims[0].detail


def test_conditions_differ_by_what_is_measured_not_by_their_name() -> None:
    ontology = load_ontology("toyworld")
    assert Condition("a").key == Condition("b").key
    keys = {
        Condition("a").key,
        Condition("a", {"head": "plain"}).key,
        Condition("a", size=256).key,
        Condition("a", corruption=("spatter", 1)).key,
        Condition("a", ontology=ontology).key,
    }
    assert len(keys) == 5
