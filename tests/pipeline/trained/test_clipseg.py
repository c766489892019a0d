"""The folder of a trained CLIPSeg gives back the model that went in, and notices what was changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.clip.loading import Clip, load_clip
from models.clipseg.baselines import ClipDeconvConfig, ViTSegConfig, build_clip_deconv, build_vitseg
from models.clipseg.decoder import ClipSeg, build_clipseg
from models.clipseg.weights import load_clipseg
from models.errors import MaskMillError
from models.settings import ClipSegConfig
from pipeline.trained.clipseg import (
    DECODER_FILE,
    HUGGING_FACE_FILES,
    RECORD_FILE,
    load_trained,
    read_clipseg_record,
    write_clipseg_folder,
)

SMALL = ClipSegConfig(reduce_dim=16, extract_layers=(0, 2), feedforward=32)
TOWER = "vit_tiny_patch16_224"
REFINED = ClipSegConfig(reduce_dim=16, extract_layers=(1,), refined=True, feedforward=32)
DECONV = ClipDeconvConfig(reduce_dim=8, reduce2_dim=8, extract_layer=1)
VITSEG = ViTSegConfig(reduce_dim=16, extract_layers=(0, 2), feedforward=32, tower=TOWER)


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_clip("toyclip", "bundled")


def _write(folder: Path, model: ClipSeg, kind: str = "clipseg", **more: Any) -> str:
    facts: dict[str, Any] = {"recipe": {"name": "x"}, "data": {"images": 3}, "metrics": {"iou": 0.5}}
    _, reason = write_clipseg_folder(
        folder, model, kind=kind, training={"iterations": 7}, versions={"python": "3"}, **facts, **more
    )
    return reason


@pytest.mark.parametrize(
    ("kind", "build", "in_their_layout"),
    [
        ("clipseg", lambda clip: build_clipseg(clip, SMALL, seed=2), True),
        # Hugging Face's refined head is right for patches of 16 pixels only.
        ("clipseg", lambda clip: build_clipseg(clip, REFINED), False),
        ("clip-deconv", lambda clip: build_clip_deconv(clip, DECONV, seed=2), False),
        ("vitseg", lambda clip: build_vitseg(clip, VITSEG, weights="random:4"), False),
    ],
    ids=["clipseg", "refined at patch 8", "clip-deconv", "vitseg"],
)
def test_what_is_written_is_read(
    clip: Clip, tmp_path: Path, kind: str, build: Callable[[Clip], ClipSeg], in_their_layout: bool
) -> None:
    model = build(clip)
    reason = _write(tmp_path, model, kind, tower_weights="random:4" if kind == "vitseg" else None)
    record = read_clipseg_record(tmp_path)
    assert record.model == kind and record.hugging_face == in_their_layout == (not reason)
    assert record.training == {"iterations": 7} and record.metrics == {"iou": 0.5}
    files = {path.name for path in tmp_path.iterdir()}
    assert files - set(HUGGING_FACE_FILES) == {RECORD_FILE, DECODER_FILE}
    found = load_trained(tmp_path)
    pixels, conditional = torch.randn(1, 3, 32, 32), model.encode_text(["a zebra"])
    with torch.no_grad():
        for again in [found, load_clipseg(tmp_path)] if in_their_layout else [found]:
            logits = model(pixels, conditional)
            torch.testing.assert_close(again(pixels, conditional), logits, atol=1e-5, rtol=0)
    assert found.encode_text(["a zebra"]).equal(conditional)


def test_a_model_is_not_replaced_unasked(clip: Clip, tmp_path: Path) -> None:
    _write(tmp_path, build_clipseg(clip, SMALL, seed=2))
    other = build_clipseg(clip, SMALL, seed=3)
    with pytest.raises(MaskMillError) as error:
        _write(tmp_path, other)
    assert error.value.code == "output_exists"
    _write(tmp_path, other, overwrite=True)
    assert load_trained(tmp_path).decoder.film_mul.weight.equal(other.decoder.film_mul.weight)


@pytest.mark.parametrize(
    ("harm", "code"),
    [
        (lambda folder: (folder / RECORD_FILE).unlink(), "name_unknown"),
        (lambda folder: (folder / RECORD_FILE).write_text("{"), "model_damaged"),
        (lambda folder: _change(folder, recipe=None), "model_damaged"),
        (lambda folder: _change(folder, schema_version=99), "newer_version"),
        (lambda folder: (folder / DECODER_FILE).unlink(), "model_damaged"),
        (lambda folder: (folder / DECODER_FILE).write_bytes(b"other"), "model_damaged"),
    ],
    ids=["no record", "torn record", "a field gone", "newer", "no decoder", "another decoder"],
)
def test_harm_is_noticed(clip: Clip, tmp_path: Path, harm: Callable[[Path], None], code: str) -> None:
    _write(tmp_path, build_clipseg(clip, SMALL))
    harm(tmp_path)
    with pytest.raises(MaskMillError) as error:
        load_trained(tmp_path)
    assert error.value.code == code


def _change(folder: Path, **values: Any) -> None:
    record = json.loads((folder / RECORD_FILE).read_text()) | values
    kept = {name: value for name, value in record.items() if value is not None}
    (folder / RECORD_FILE).write_text(json.dumps(kept))
