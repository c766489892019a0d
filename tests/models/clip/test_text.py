"""Text classifiers against a plain computation, and their cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from open_clip import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor

from models.clip.loading import Clip, load_source
from models.clip.templates import TEMPLATE_SETS, fill, get_templates
from models.clip.text import build_text_classifier, cached_text_classifier, read_text_classifier
from models.clip.weights import OPENAI_MEAN, OPENAI_STD, WeightSource
from models.errors import MaskMillError

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PROMPTS = [["sky", "wall", "road"], ["cat"], ["dog", "puppy"]]


def clip(seed: int = 0, towers: str = "both", dtype: torch.dtype = torch.float32) -> Clip:
    source = WeightSource("ViT-B-32", f"random:{seed}", CONFIG, None, seed, OPENAI_MEAN, OPENAI_STD)
    return load_source(source, towers=towers, dtype=dtype)


@pytest.fixture(scope="module")
def small() -> Clip:
    return clip()


def one_name(model: Clip, name: str, templates: tuple[str, ...]) -> Tensor:
    """normalise - mean - normalise, with open_clip's own full-length text encoder."""
    tokens = model.tokenizer([template.format(name) for template in templates])
    return F.normalize(F.normalize(model.model.encode_text(tokens), dim=-1).mean(0), dim=-1)


def test_template_sets() -> None:
    assert len(TEMPLATE_SETS["openai85"]) == len(set(TEMPLATE_SETS["openai85"])) == 85
    assert set(TEMPLATE_SETS["imagenet80"]) == {template("{}") for template in OPENAI_IMAGENET_TEMPLATES}
    assert all(template.endswith("in the scene.") for template in TEMPLATE_SETS["scene5"])
    assert get_templates(["one {}"]) == ("one {}",)
    assert fill(("a {}.",), "{odd} {} name") == ["a {odd} {} name."]
    for templates in TEMPLATE_SETS.values():
        assert get_templates(templates) == templates


@pytest.mark.parametrize(
    ("templates", "code"),
    [("openai58", "prompt_invalid"), ([], "prompt_invalid"), (["no place"], "prompt_invalid")],
)
def test_wrong_templates(templates: str | list[str], code: str) -> None:
    with pytest.raises(MaskMillError) as caught:
        get_templates(templates)
    assert caught.value.code == code


def test_rows_and_merging(small: Clip) -> None:
    text = build_text_classifier(small, PROMPTS, templates="openai85", merge=["max", "max", "mean"])
    assert text.class_ids.tolist() == [0, 0, 0, 1, 2]
    assert text.num_classes == 3
    names = {name: one_name(small, name, TEMPLATE_SETS["openai85"]) for group in PROMPTS for name in group}
    expected = [names["sky"], names["wall"], names["road"], names["cat"]]
    expected.append(F.normalize((names["dog"] + names["puppy"]) / 2, dim=0))
    assert (text.embeddings - torch.stack(expected)).abs().max() < 2e-6
    assert torch.allclose(text.embeddings.norm(dim=1), torch.ones(5), atol=1e-6)


def test_one_rule_for_all(small: Clip) -> None:
    assert build_text_classifier(small, PROMPTS, templates="simple").embeddings.shape == (6, 32)
    assert build_text_classifier(small, PROMPTS, templates="simple", merge="mean").embeddings.shape == (3, 32)


def test_cache_needs_no_text_tower(small: Clip, tmp_path: Path) -> None:
    text = build_text_classifier(small, PROMPTS, templates="simple", cache_dir=tmp_path / "new")
    found = cached_text_classifier(small.fingerprint, PROMPTS, templates="simple", cache_dir=tmp_path / "new")
    assert found is not None
    assert torch.equal(found.embeddings, text.embeddings)
    again = build_text_classifier(
        clip(towers="visual"), PROMPTS, templates="simple", cache_dir=tmp_path / "new"
    )
    assert torch.equal(again.embeddings, text.embeddings)
    assert len(list((tmp_path / "new").iterdir())) == 1, "no temporary file is left"


@pytest.mark.parametrize("change", ["weights", "classes", "order", "templates", "merge", "precision"])
def test_cache_key_holds_everything(small: Clip, tmp_path: Path, change: str) -> None:
    build_text_classifier(small, PROMPTS, templates="simple", merge="max", cache_dir=tmp_path)
    arguments = {"templates": "simple", "merge": "max", "cache_dir": tmp_path}
    fingerprint, prompts = small.fingerprint, PROMPTS
    assert cached_text_classifier(fingerprint, prompts, **arguments) is not None
    if change == "weights":
        fingerprint = "random:1:ViT-B-32"
    elif change == "classes":
        prompts = [*PROMPTS, ["cow"]]
    elif change == "order":
        prompts = PROMPTS[::-1]
    elif change == "templates":
        arguments["templates"] = "name"
    elif change == "merge":
        arguments["merge"] = "mean"
    else:
        arguments["dtype"] = torch.bfloat16
    assert cached_text_classifier(fingerprint, prompts, **arguments) is None


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "zeros"])
def test_damaged_cache_is_computed_again(small: Clip, tmp_path: Path, damage: str) -> None:
    text = build_text_classifier(small, PROMPTS, templates="simple", cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    path.write_bytes(
        {"cut": data[:-20], "empty": b"", "garbage": b"x" * 500, "zeros": data[:-200] + bytes(200)}[damage]
    )
    with pytest.raises(MaskMillError, match="no text classifier"):
        read_text_classifier(path)
    again = build_text_classifier(small, PROMPTS, templates="simple", cache_dir=tmp_path)
    assert torch.equal(again.embeddings, text.embeddings)
    assert torch.equal(read_text_classifier(path).embeddings, text.embeddings)


def test_half_precision_is_close(small: Clip) -> None:
    exact = build_text_classifier(small, PROMPTS).embeddings
    coarse = build_text_classifier(clip(dtype=torch.bfloat16), PROMPTS).embeddings
    assert coarse.dtype == torch.float32
    assert (exact * coarse).sum(1).min() > 0.999


@pytest.mark.parametrize(
    ("prompts", "merge", "code"),
    [
        ([], "max", "prompt_invalid"),
        ([["cat"], []], "max", "prompt_invalid"),
        ([["cat"], [" "]], "max", "prompt_invalid"),
        ([["cat"]], "median", "setting_invalid"),
        ([["cat"]], ["max", "max"], "setting_invalid"),
    ],
)
def test_wrong_classes(small: Clip, prompts: list[list[str]], merge: str | list[str], code: str) -> None:
    with pytest.raises(MaskMillError) as caught:
        build_text_classifier(small, prompts, merge=merge)
    assert caught.value.code == code
