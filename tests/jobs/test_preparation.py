from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_equal

from jobs.apart import Apart
from jobs.preparation import Request, Settled, prepare, preparing
from models.device import best_device, native_precision
from models.errors import MaskMillError
from pipeline.labelling.prepare import prepare_labeller
from pipeline.labelling.recipes import RECIPES
from pipeline.ontology.ontology import parse_classes
from pipeline.toyworld.scenes import generate

OTHERS = parse_classes("zebra, striped animal, sky", background=None, templates="toyworld")
REQUEST = Request(RECIPES["toy"], OTHERS, "out", "fp32", None)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKMILL_CACHE", str(tmp_path / "cache"))


def labels_of(settled: object) -> np.ndarray:
    assert isinstance(settled, Settled)
    labeller = pickle.loads(settled.labeller)(threads=1)
    prediction = labeller.label([generate(3, 1, 64).images[0]], [(64, 64)])[0]
    return prediction.labels


def test_here_and_apart_the_same_is_prepared(tmp_path: Path) -> None:
    wanted = prepare_labeller(RECIPES["toy"], OTHERS, precision="fp32").build(precision="fp32", threads=1)
    expected = wanted.label([generate(3, 1, 64).images[0]], [(64, 64)])[0].labels
    with preparing(REQUEST, {}) as here:  # torch is imported
        assert not isinstance(here, Apart)
        assert_equal(labels_of(*here), expected)
    with Apart(prepare, REQUEST, environment={"MASKMILL_CACHE": str(tmp_path / "theirs")}) as apart:
        assert_equal(labels_of(*apart), expected)
    assert list((tmp_path / "theirs").iterdir()), "embedded there"


def test_what_is_settled() -> None:
    (settled,) = prepare(replace(REQUEST, precision="auto"))
    assert isinstance(settled, Settled)
    assert settled.precision == native_precision(best_device())
    assert settled.weights["model"] == "toyclip"
    (again,) = prepare(replace(REQUEST, fingerprint=settled.weights["fingerprint"]))
    assert isinstance(again, Settled) and again.weights == settled.weights


def test_other_weights_than_the_table_s_are_refused_before_any_work() -> None:
    with pytest.raises(MaskMillError) as caught:
        next(prepare(replace(REQUEST, fingerprint="f" * 64)))
    assert caught.value.code == "output_differs"
    assert "ffffffffffff" in caught.value.message
