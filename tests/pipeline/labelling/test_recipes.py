from __future__ import annotations

import operator
from typing import Any

import pytest

from models.errors import MaskMillError
from models.settings import MaskClipSettings
from pipeline.files.images import ImageSettings
from pipeline.files.recipes import describe
from pipeline.labelling.recipes import RECIPES, LabelRecipe, change_recipe, load_recipe, recipe_from_dict


@pytest.mark.parametrize(
    ("settings", "field", "expected"),
    [
        (["pd_threshold=0.5"], "maskclip.pd_threshold", 0.5),
        (["scale=[1024, 448]"], "images.scale", (1024, 448)),
        (["pretrained=null"], "pretrained", None),
        (["pretrained=random:3"], "pretrained", "random:3"),
        (["images.keep_ratio=false"], "images.keep_ratio", False),
        (["window=224", "window_stride=112"], "maskclip.window_stride", 112),
        (["corruption=jpeg_compression:3"], "images.corruption", "jpeg_compression:3"),
        (
            ["ks_threshold=0.2", "maskclip.ks_threshold=1"],
            "maskclip.ks_threshold",
            1.0,
        ),  # the later one holds
    ],
)
def test_settings_are_typed(settings: list[str], field: str, expected: object) -> None:
    assert operator.attrgetter(field)(load_recipe("maskclip", settings)) == expected


@pytest.mark.parametrize(
    ("name", "settings", "code", "says"),
    [
        ("maskclp", [], "setting_invalid", "Did you mean maskclip"),
        ("maskclip", ["pd_treshold=0.5"], "setting_invalid", "Did you mean maskclip.pd_threshold"),
        ("maskclip", ["pd_threshold"], "setting_invalid", "key=value"),
        ("maskclip", ["pd_threshold=2"], "setting_invalid", "less than or equal to 1"),
        ("maskclip", ["pd_threshold=nan"], "setting_invalid", "finite number"),
        ("maskclip", ["window=9223372036854775808", "window_stride=1"], "setting_invalid", "64 bits"),
        ("maskclip", ["head=other"], "setting_invalid", "maskclip"),
        ("maskclip", ["scale=[0, 512]"], "setting_invalid", "scale"),
        ("maskclip", ["window=224"], "setting_invalid", "window_stride"),
        ("maskclip-refined", ["head=plain"], "setting_invalid", "needs keys"),
        ("maskclip", ["window=224", "window_stride=300"], "setting_invalid", "window_stride"),
        ("maskclip", ["clipseg.text_weight=0"], "setting_invalid", "mean nothing to ViT-B-16"),
        ("clipseg", ["text_weight=2"], "setting_invalid", "less than or equal to 1"),
        ("maskclip", ["corruption=snow:3"], "setting_invalid", "jpeg_compression"),
        ("maskclip", ["corruption=spatter:6"], "setting_invalid", "'spatter:6'"),
        ("maskclip", ["corruption=spatter"], "setting_invalid", "NAME:LEVEL"),
        ("nowhere.yaml", [], "setting_invalid", "nowhere.yaml"),
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
    assert recipe == RECIPES["maskclip-windows"].replace(
        name="mine", maskclip=RECIPES["maskclip-windows"].maskclip.replace(window_stride=56, temperature=40.0)
    )


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
    assert recipe.replace(name="renamed").hash == recipe.hash


def test_the_hash_counts_every_field_that_changes_the_result() -> None:
    base = LabelRecipe(name="x", model="clipseg", maskclip=MaskClipSettings(window=8, window_stride=8))
    others: dict[str, Any] = {
        "model": "RN50", "pretrained": "a", "images.scale": (9, 9), "images.keep_ratio": False,
        "images.resize": "antialias", "images.max_pixels": 9, "images.large_window": 999,
        "images.large_overlap": 9, "images.corruption": "spatter:1", "maskclip.head": "plain",
        "maskclip.image_stats": "clip", "maskclip.profile": "weights",
        "maskclip.window": 9, "maskclip.window_stride": 4, "maskclip.ks_threshold": 1.0,
        "maskclip.ks_axis": "channel", "maskclip.ks_source": "raw", "maskclip.pd_threshold": 0.5,
        "maskclip.temperature": 9.0, "clipseg.clip": "a:b", "clipseg.extract_layers": [1],
        "clipseg.prefix": "plain", "clipseg.text_weight": 0.1, "clipseg.visual_prompt": "crop",
        "clipseg.example_size": 9, "clipseg.background": "words", "clipseg.background_factor": 1.0,
        "precision": "fp32", "min_confidence": 0.1, "templates": "simple", "maskclip.sigma": 2.0,
        "maskclip.refine": "pamr", "maskclip.refine_steps": 3, "maskclip.refine_classes": 4,
        "maskclip.refine_pixels": 999, "maskclip.refine_cells": 9, "maskclip.refine_dilations": [1, 2],
        "maskclip.alpha": 0.3, "maskclip.windows": "splice", "maskclip.positions": "offset",
        "maskclip.classes.candidates": 3, "maskclip.classes.candidates_above": 0.2,
        "maskclip.classes.redundant_below": 0.15, "maskclip.classes.ambiguous_above": 0.7,
        "maskclip.classes.calibrate": 0.9, "maskclip.classes.calibrate_weight": 0.5,
        "maskclip.classes.calibrate_images": 9, "maskclip.classes.bias": [0.1],
        "maskclip.memory": "/m", "maskclip.memory_share": 0.2, "maskclip.memory_neighbours": 5,
        "maskclip.helper": "test_vit.a", "maskclip.helper_weights": "random:0",
    }  # fmt: skip
    needs = {"maskclip.sigma": {"maskclip.head": "nn"}, "maskclip.alpha": {"maskclip.head": "pa"}}
    needs |= {
        f"maskclip.refine_{name}": {"maskclip.refine": "pamr"}
        for name in ("steps", "classes", "pixels", "dilations")
    }
    needs["maskclip.refine_cells"] = {"maskclip.refine": "tlp"}
    helped = {"maskclip.head": "proxy", "maskclip.helper": "test_vit.b"}
    needs |= {"maskclip.helper": {"maskclip.head": "proxy"}, "maskclip.helper_weights": helped}
    whole = {"maskclip.window": 0, "maskclip.window_stride": 0}  # purification needs the whole image
    needs |= {f"maskclip.classes.{name}": whole for name in ("redundant_below", "ambiguous_above")}
    needs["maskclip.memory"] = whole
    needs |= {
        f"maskclip.memory_{name}": {**whole, "maskclip.memory": "/n"} for name in ("share", "neighbours")
    }
    assert set(others) == {field.name for field in describe(base) if field.changes_result}
    hashes = {change_recipe(base, {key: value, **needs.get(key, {})}).hash for key, value in others.items()}
    assert len(hashes) == len(others)
    assert base.hash not in hashes
    assert base.replace(name="y", batch_size=3).hash == base.hash


@pytest.mark.parametrize("name", RECIPES)
def test_every_field_is_explained(name: str) -> None:
    for field in describe(RECIPES[name]):
        assert 15 < len(field.description) < 250 and "\n" not in field.description, field
        assert change_recipe(RECIPES[name], {field.name: field.value}) == RECIPES[name]


def test_paper_protocol_is_the_default() -> None:
    recipe = RECIPES["maskclip"]
    assert recipe.images == ImageSettings(scale=(2048, 512), keep_ratio=True, resize="opencv")
    assert recipe.maskclip == MaskClipSettings(
        head="maskclip", image_stats="imagenet", profile="reference", ks_threshold=0, pd_threshold=0,
        window=0, window_stride=0, temperature=100,
    )  # fmt: skip
    assert RECIPES["maskclip-refined"].maskclip == MaskClipSettings(
        ks_threshold=1.0, pd_threshold=0.5, ks_axis="token", ks_source="projected"
    )
