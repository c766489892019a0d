from __future__ import annotations

import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from pipeline.ontology.reading import parse_classes
from pipeline.table.record import TableRecord
from pipeline.tracking.names import (
    MAX_NAME,
    flatten,
    key_part,
    key_parts,
    place_name,
    recipe_name,
    record_params,
    run_name,
)

NAMES = st.text(max_size=300) | st.sampled_from(
    ["..", ".", "", "/", "a/../b", "a//b", " x ", "$x^2$", "\x00", "猫"]
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[MlflowClient, str]:
    """A real store, which refuses names that MLflow does not take."""
    client = MlflowClient(f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/runs.db")
    return client, client.create_run(client.create_experiment("names")).info.run_id


@pytest.mark.slow
@settings(deadline=None)
@given(st.lists(NAMES, max_size=8))
def test_mlflow_takes_every_name_and_none_collide(run: tuple[MlflowClient, str], texts: list[str]) -> None:
    parts = key_parts(texts)
    client, run_id = run
    client.log_batch(
        run_id,
        metrics=[Metric(f"boundary_iou/{part}", 1.0, 0, 0) for part in parts],
        params=[Param(f"recipe.{part}", "x") for part in parts],
    )
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
    pets = parse_classes("cat, dog", background=None, name="pets")
    recipe, weights = (
        {"head": "maskclip", "hash": "r1"},
        {"model": "m", "pretrained": None, "fingerprint": "w1"},
    )
    record = TableRecord(ontology=pets, recipe=recipe, weights=weights)
    assert flatten(record_params(record)) == {
        "recipe.head": "maskclip",
        "recipe.hash": "r1",
        "weights.model": "m",
        "weights.pretrained": "null",
        "weights.fingerprint": "w1",
        "ontology.name": "pets",
        "ontology.hash": pets.hash,
        "ontology.classes": '["cat", "dog"]',
    }


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ({"name": "toy", "model": "toyclip", "pretrained": "bundled"}, "toy (toyclip)"),
        ({"name": "student", "model": "s3://bucket/runs/pets/student"}, "student (pets/student)"),
        (
            {"name": "clipseg", "model": "clipseg", "pretrained": "/w/rd64-uni.pth"},
            "clipseg (w/rd64-uni.pth)",
        ),
        ({"name": "mine", "model": "hf-hub:org/name", "pretrained": None}, "mine (hf-hub:org/name)"),
        ({}, "labels"),
    ],
)
def test_a_recipe_is_named_with_its_model(recipe: dict[str, Any], name: str) -> None:
    assert recipe_name(recipe) == name


def test_a_run_is_named_after_command_model_and_data() -> None:
    data = place_name("/home/me/pets/photos/")
    assert run_name("label", "maskclip (ViT-B-16)", data) == "label maskclip (ViT-B-16) on pets/photos"
    assert run_name("benchmark", "toyworld") == "benchmark toyworld"
    assert place_name("photos") == "photos" and place_name("/photos") == "photos"
    assert place_name("s3://bucket/a/b/*.jpg") == "b/*.jpg"
    secret = place_name("https://host/a/x.jpg?X-Amz-Signature=abcdef0123456789")
    assert "abcdef" not in run_name("label", "toy", secret)
    assert len(run_name("label", "x" * 500, "y")) == MAX_NAME
