from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name, _validate_param

from pipeline.tracking.names import flatten, key_part, key_parts, record_params

NAMES = st.text(max_size=300) | st.sampled_from(
    ["..", ".", "", "/", "a/../b", "a//b", " x ", "$x^2$", "\x00", "猫"]
)


@given(st.lists(NAMES, max_size=8))
def test_mlflow_takes_every_name_and_none_collide(texts: list[str]) -> None:
    parts = key_parts(texts)
    for part in parts:
        _validate_metric_name(f"boundary_iou/{part}")
        _validate_param(f"recipe.{part}", "x")
    assert len({unicodedata.normalize("NFC", part).casefold() for part in parts}) == len(texts)


def test_ordinary_names_stay_as_they_are() -> None:
    names = ["traffic light", "tv-monitor", "Straße", "grass_2", "v1.5"]
    assert key_parts(names) == names
    assert key_part("pavement/floor, wet") == "pavement_floor_ wet"


def test_flatten() -> None:
    settings = {"recipe": {"scale": [2048, 512], "head": "maskclip", "deep": {"x": None}}, "toy": True}
    assert flatten(settings) == {
        "recipe.scale": "[2048, 512]",
        "recipe.head": "maskclip",
        "recipe.deep.x": "null",
        "toy": "true",
    }


def test_record_params_names_the_classes_and_both_hashes() -> None:
    record = {
        "recipe": {"head": "maskclip", "hash": "r1"},
        "weights": {"fingerprint": "w1"},
        "ontology": {"name": "pets", "hash": "o1", "names": ["cat", "dog"], "classes": [{"name": "cat"}]},
    }
    assert flatten(record_params(record)) == {
        "recipe.head": "maskclip",
        "recipe.hash": "r1",
        "weights.fingerprint": "w1",
        "ontology.name": "pets",
        "ontology.hash": "o1",
        "ontology.classes": '["cat", "dog"]',
    }
