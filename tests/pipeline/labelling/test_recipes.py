from __future__ import annotations

import dataclasses

import pytest

from models.errors import MaskMillError
from pipeline.labelling.clipseg.options import ClipSegOptions
from pipeline.labelling.recipes import RECIPES, LabelRecipe, load_recipe, recipe_from_dict


@pytest.mark.parametrize(
    ("settings", "field", "expected"),
    [
        (["pd_threshold=0.5"], "pd_threshold", 0.5),
        (["scale=[1024, 448]"], "scale", (1024, 448)),
        (["pretrained=null"], "pretrained", None),
        (["pretrained=random:3"], "pretrained", "random:3"),
        (["keep_ratio=false"], "keep_ratio", False),
        (["window=224", "window_stride=112"], "window_stride", 112),
        (["corruption=jpeg_compression:3"], "corruption", "jpeg_compression:3"),
        (["ks_threshold=0.2", "ks_threshold=1"], "ks_threshold", 1.0),  # the later one holds
    ],
)
def test_settings_are_typed(settings: list[str], field: str, expected: object) -> None:
    assert getattr(load_recipe("maskclip", settings), field) == expected


@pytest.mark.parametrize(
    ("name", "settings", "code", "says"),
    [
        ("maskclp", [], "recipe_invalid", "Did you mean maskclip"),
        ("maskclip", ["pd_treshold=0.5"], "recipe_invalid", "Did you mean pd_threshold"),
        ("maskclip", ["pd_threshold"], "recipe_invalid", "key=value"),
        ("maskclip", ["pd_threshold=2"], "recipe_invalid", "less than or equal to 1"),
        ("maskclip", ["head=other"], "recipe_invalid", "maskclip"),
        ("maskclip", ["scale=[0, 512]"], "recipe_invalid", "scale"),
        ("maskclip", ["window=224"], "recipe_invalid", "window_stride"),
        ("maskclip-refined", ["head=plain"], "recipe_invalid", "needs keys"),
        ("maskclip", ["window=224", "window_stride=300"], "recipe_invalid", "window_stride"),
        ("maskclip", ["clipseg.text_weight=0"], "recipe_invalid", "mean nothing to ViT-B-16"),
        ("clipseg", ["text_weight=2"], "recipe_invalid", "less than or equal to 1"),
        ("maskclip", ["corruption=snow:3"], "recipe_invalid", "jpeg_compression"),
        ("maskclip", ["corruption=spatter:6"], "recipe_invalid", "'spatter:6'"),
        ("maskclip", ["corruption=spatter"], "recipe_invalid", "NAME:LEVEL"),
        ("nowhere.yaml", [], "recipe_invalid", "nowhere.yaml"),
    ],
)
def test_mistakes_are_named(name: str, settings: list[str], code: str, says: str) -> None:
    with pytest.raises(MaskMillError) as caught:
        load_recipe(name, settings)
    assert caught.value.code == code
    assert says in str(caught.value)


def test_yaml_file_builds_on_a_base(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: maskclip-windows\ntemperature: 40\n")
    recipe = load_recipe(str(path), ["window_stride=56"])
    assert (recipe.name, recipe.window, recipe.window_stride, recipe.temperature) == ("mine", 224, 56, 40.0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("base: nobody\n", "nobody"),
        ("colour: red\n", "colour"),
        ("- a\n- b\n", "no fields"),
        ("a: [\n", "YAML"),
    ],
)
def test_yaml_mistakes_are_named(tmp_path, text: str, says: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(MaskMillError, match=says):
        load_recipe(str(path))


@pytest.mark.parametrize("name", RECIPES)
def test_round_trip_and_hash(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe_from_dict(recipe.to_dict()) == recipe
    assert dataclasses.replace(recipe, name="renamed").hash == recipe.hash


def test_every_field_but_the_name_changes_the_hash() -> None:
    base = LabelRecipe(name="x", window=8, window_stride=8)
    others = {
        "model": "RN50", "pretrained": "a", "scale": (9, 9), "keep_ratio": False, "resize": "antialias",
        "max_pixels": 9, "corruption": "spatter:1",
        "head": "plain", "image_stats": "clip", "profile": "weights", "window": 9, "window_stride": 4,
        "ks_threshold": 1.0, "ks_axis": "channel", "ks_source": "raw", "pd_threshold": 0.5,
        "temperature": 9.0,        "precision": "fp32", "batch_size": 3, "min_confidence": 0.1,
        "clipseg": ClipSegOptions(text_weight=0.1),
    }  # fmt: skip
    assert set(others) == {field.name for field in dataclasses.fields(LabelRecipe)} - {"name"}
    hashes = {dataclasses.replace(base, **{key: value}).hash for key, value in others.items()}
    assert len(hashes) == len(others)
    assert base.hash not in hashes


def test_paper_protocol_is_the_default() -> None:
    recipe = RECIPES["maskclip"]
    assert recipe.scale == (2048, 512) and recipe.resize == "opencv"
    assert (recipe.image_stats, recipe.profile, recipe.head) == ("imagenet", "reference", "maskclip")
    assert (recipe.ks_threshold, recipe.pd_threshold, recipe.window, recipe.temperature) == (0, 0, 0, 100)
    refined = RECIPES["maskclip-refined"]
    assert (refined.ks_threshold, refined.pd_threshold, refined.ks_axis, refined.ks_source) == (
        1.0,
        0.5,
        "token",
        "projected",
    )
