"""What weights have seen, and their terms."""

from __future__ import annotations

import pytest

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
        ("runs/student", None, "its training's", "see its publisher"),
        ("s3://bucket/student", None, "its training's", "see its publisher"),
    ],
)
def test_lineage_and_licence(model: str, pretrained: str | None, seen: str, terms: str) -> None:
    recipe = LabelRecipe(model=model, pretrained=pretrained)
    assert (lineage(recipe), licence(recipe)) == (seen, terms)


def test_every_recipe_says_where_its_weights_come_from() -> None:
    for name, recipe in RECIPES.items():
        assert licence(recipe) == "permissive"
        masks = name.startswith("clipseg")
        assert lineage(recipe) == ("a teacher saw annotated masks" if masks else "image-text only")
