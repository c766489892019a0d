"""Pairs of a label table that people have corrected."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.training.clipseg.sources.base import IGNORED, OBJECT
from pipeline.training.clipseg.sources.table import TableSource, open_table_source
from pipeline.training.clipseg.triplets import TripletSamples, TripletSettings
from tests.pipeline.review.reviews import TOYWORLD, make_reviewed, truth_of, wrong
from tests.pipeline.training.clipseg.sources.test_benchmarks import held
from tests.pipeline.training.samples.test_corrected import say


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reviewed(tmp_path_factory.mktemp("corrected"), [0.5, 0.0, 0.6, 0.4])


def opened(folder: Path, **options: Any) -> TableSource:
    return open_table_source(str(folder / "table"), ontology=TOYWORLD, **options)


@pytest.mark.parametrize("min_quality", [0.0, 0.8])
def test_what_people_say_is_asked_for_instead_of_labels(folder: Path, min_quality: float) -> None:
    corrections = say(folder, {0: "painted", 2: "rejected"})
    source = pickle.loads(pickle.dumps(opened(folder, corrections=corrections, min_quality=min_quality)))
    pairs = {
        source.read(next(iter(asked.values()))).image.tobytes(): (image, asked)
        for image, asked in held(source).items()
    }
    shown = [
        np.asarray(Image.open(folder / "images" / f"scene_{number:03d}_0.png")).tobytes()
        for number in range(4)
    ]
    assert shown[2] not in pairs
    # Painted: its classes, and no other, with full weight outside the hole.
    image, asked = pairs[shown[0]]
    truth = truth_of(folder, 0)[4:]
    assert set(asked) == {TOYWORLD.names[number] for number in np.unique(truth)}
    for name, pair in asked.items():
        example = source.read(pair)
        assert (example.mask[:4] == IGNORED).all()
        np.testing.assert_array_equal(example.mask[4:] == OBJECT, truth == TOYWORLD.names.index(name))
        assert example.weight is not None and (example.weight[4:] == 1).all()
    texts = {wordings[0]: number for number, wordings in enumerate(source.pairs.phrases)}
    absent = [name for name in texts if name not in asked]
    assert absent and not any(source.pairs.may_hold(image, texts[name]) for name in absent)
    # Nobody has looked at it: as the model made it.
    if min_quality == 0:
        _, asked = pairs[shown[3]]
        labels, confidence = wrong(truth_of(folder, 3), 0.4, 3)
        for name, pair in asked.items():
            example = source.read(pair)
            np.testing.assert_array_equal(example.mask == OBJECT, labels == TOYWORLD.names.index(name))
            assert example.weight is not None
            np.testing.assert_allclose(example.weight, confidence / 255, rtol=1e-6)
    assert sorted(source.order(1, 0)) == [*range(len(source.pairs))]
    samples = TripletSamples(source, TripletSettings(size=48, q_neg=0.5, support_size=48))
    for pair in range(len(source.pairs)):
        samples.load(pair, np.random.default_rng(pair))
    assert source.fingerprint != opened(folder).fingerprint
