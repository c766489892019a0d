"""What weights have seen, and their terms."""

from __future__ import annotations

import pytest

from models.settings import MaskClipSettings
from pipeline.labelling.lineage import licence, lineage
from pipeline.labelling.recipes import RECIPES, LabelRecipe


@pytest.mark.parametrize(
    ("model", "pretrained", "seen", "terms"),
    [
        ("ViT-B-16-quickgelu", "openai", "image-text only", "permissive"),
        ("ViT-H-14", "laion2b_s32b_b79k", "image-text only", "permissive"),
        ("ViT-B-16-quickgelu", "metaclip_400m", "image-text only", "non-commercial"),
        ("ViT-B-16-quickgelu", "dfn2b", "image-text only", "research only"),
        ("hf-hub:ORG/NAME", None, "image-text only", "see its publisher"),
        ("ViT-B-16", "weights.safetensors", "image-text only", "see its publisher"),
        ("ViT-B-16", "random:0", "image-text only", "none: random weights"),
        ("TIPSv2-L-14", "webli", "image-text only", "permissive"),
        ("C-RADIOv4-SO400M", None, "a teacher saw annotated masks", "see its publisher"),
        ("C-RADIOv3-B", "radio.safetensors", "a teacher saw annotated masks", "see its publisher"),
        ("runs/student", None, "its training's", "see its publisher"),
        ("s3://bucket/student", None, "its training's", "see its publisher"),
    ],
)
def test_lineage_and_licence(model: str, pretrained: str | None, seen: str, terms: str) -> None:
    recipe = LabelRecipe(model=model, pretrained=pretrained)
    assert (lineage(recipe), licence(recipe)) == (seen, terms)


@pytest.mark.parametrize(
    ("pretrained", "helper", "weights", "seen", "terms"),
    [
        ("openai", "vit_base_patch16_224.dino", "", "self-supervised helper", "permissive"),
        ("dfn2b", "vit_base_patch16_224.dino", "", "self-supervised helper", "research only"),
        ("openai", "vit_base_patch16_224.mae", "", "self-supervised helper", "non-commercial"),
        ("openai", "vit_base_patch16_dinov3.lvd1689m", "", "self-supervised helper", "see its publisher"),
        ("metaclip_400m", "vit_base_patch16_dinov3.lvd1689m", "", "self-supervised helper", "non-commercial"),
        ("openai", "samvit_base_patch16.sa1b", "", "a teacher saw annotated masks", "permissive"),
        ("openai", "vit_base_patch16_224", "weights.pth", "see its publisher", "see its publisher"),
        (
            "random:0",
            "vit_base_patch16_224.dino",
            "random:0",
            "self-supervised helper",
            "none: random weights",
        ),
        ("openai", "vit_base_patch16_224.mae", "random:0", "self-supervised helper", "permissive"),
    ],
)
def test_with_a_helper(pretrained: str, helper: str, weights: str, seen: str, terms: str) -> None:
    recipe = LabelRecipe(
        pretrained=pretrained,
        maskclip=MaskClipSettings(head="proxy", helper=helper, helper_weights=weights),
    )
    assert (lineage(recipe), licence(recipe)) == (seen, terms)


def test_every_recipe_says_where_its_weights_come_from() -> None:
    for name, recipe in RECIPES.items():
        assert licence(recipe) == ("see its publisher" if name == "radseg" else "permissive")
        seen = "self-supervised helper" if recipe.maskclip.helper else "image-text only"
        masks = name.startswith("clipseg") or name == "radseg"
        assert lineage(recipe) == ("a teacher saw annotated masks" if masks else seen)
