"""The decoder alone: the authors' files, and this project's, also for baselines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models.clip.loading import Clip
from models.clip.weights import read_state
from models.clipseg.baselines import ClipDeconvConfig, ViTSegConfig, build_clip_deconv, build_vitseg
from models.clipseg.decoder import ClipSeg, ClipSegDecoder
from models.clipseg.weights.fitting import (
    build_decoder,
    check_names,
    check_shapes,
    detached,
    does_not_fit,
    refuse_existing,
)
from models.errors import WrongUse
from models.settings import ClipSegConfig

_METADATA = "clipseg"  # the file's metadata entry with the settings, which the tensors tell only in part


def read_decoder(path: Path, *, extract_layers: tuple[int, ...] | None = None) -> ClipSegDecoder:
    """Read a decoder file of the authors or of ``save_decoder``, in the stored dtypes.

    Width, number of blocks and kind of head follow from the tensors. ``reduce.*``, a leftover of the authors'
    training that CLIPSeg never uses, is ignored.

    Args:
        path: ``.pth`` (read without running code) or ``.safetensors``.
        extract_layers: see ``load_clipseg``.

    Raises:
        MaskMillError: ``model_damaged``, ``weights_do_not_fit``.
    """
    state = {name: tensor for name, tensor in read_state(path).items() if not name.startswith("reduce.")}
    needed = ("film_mul.weight", "reduces.0.weight", "blocks.0.linear1.weight")
    if any(name not in state for name in needed):
        raise does_not_fit(path, [name for name in needed if name not in state], [])
    depth = len({name.split(".")[1] for name in state if name.startswith("reduces.")})
    told = _metadata(path)
    layers = extract_layers or told.get("extract_layers") or ((3, 6, 9) if depth == 3 else None)
    if layers is None or len(layers) != depth:
        raise WrongUse(
            "setting_invalid",
            f"{path} has {depth} decoder blocks, and extract_layers is {layers}.",
            f"Name the {depth} blocks of the tower that it was trained on as extract_layers.",
        )
    refined = "trans_conv.0.weight" in state
    config = ClipSegConfig(
        reduce_dim=state["film_mul.weight"].shape[0],
        extract_layers=tuple(layers),
        refined=refined,
        heads=told.get("heads", 4),  # not in the tensors; all released decoders have 4
        feedforward=state["blocks.0.linear1.weight"].shape[0],
        cond_layer=told.get("cond_layer", 0),
        dropout=told.get("dropout", 0.1),
    )
    kernels = ["trans_conv.2.weight", "trans_conv.4.weight"] if refined else ["trans_conv.weight"]
    if any(name not in state for name in kernels):
        raise does_not_fit(path, [name for name in kernels if name not in state], [])
    patch = 1
    for name in kernels:
        patch *= state[name].shape[-1]
    return build_decoder(
        config,
        state,
        path,
        width=state["reduces.0.weight"].shape[1],
        embed_dim=state["film_mul.weight"].shape[1],
        patch=patch,
    )


def save_decoder(model: ClipSeg, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a decoder with its settings.

    Read it back with ``load_clipseg``, or ``load_baseline`` for a baseline; both need the CLIP.

    Args:
        model: only its decoder is written, under the authors' names; ViTSeg's includes the random map.
        path: ``.safetensors``.
        overwrite: replace an existing file.

    Raises:
        MaskMillError: ``output_exists``.
    """
    from safetensors.torch import save_file

    path = Path(path)
    refuse_existing([path], overwrite)
    decoder = model.decoder
    told = {
        **decoder.config.model_dump(),
        "kind": type(decoder).__name__,
        "clip": model.clip.name,
        "clip_fingerprint": model.clip.fingerprint,
    }
    save_file(detached(decoder.state_dict()), path, metadata={_METADATA: json.dumps(told)})


def load_baseline(path: str | Path, clip: Clip, *, tower: str = "pretrained") -> ClipSeg:
    """Load a CLIP-Deconv or ViTSeg from a file of ``save_decoder``.

    Args:
        path: ``.safetensors``.
        clip: the CLIP it was trained on.
        tower: weights of ViTSeg's image tower; see ``models.clipseg.baselines.build_vitseg``.

    Returns:
        The model in evaluation mode.

    Raises:
        MaskMillError: ``weights_missing``, ``model_damaged``; ``weights_do_not_fit`` if the file holds no
            baseline, or its tensors do not match its settings; ``weights_do_not_fit``.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise WrongUse("weights_missing", f"There is no file {path}.", "Check the path.")
    state = read_state(path)
    told = _metadata(path)
    check_clip(path, clip)
    kind = told.get("kind")
    if kind == "ClipDeconvDecoder":
        model = build_clip_deconv(clip, ClipDeconvConfig(**_settings_of(ClipDeconvConfig, told)))
    elif kind == "ViTSegDecoder":
        model = build_vitseg(clip, ViTSegConfig(**_settings_of(ViTSegConfig, told)), weights=tower)
    else:
        raise WrongUse(
            "weights_do_not_fit",
            f"{path} is not a baseline that save_decoder wrote.",
            "Read a CLIPSeg with load_clipseg.",
        )
    expected = model.decoder.state_dict()
    check_names(path, expected, state)
    check_shapes(path, expected, state)
    model.decoder.load_state_dict(state)
    return model


def check_clip(path: Path, clip: Clip) -> None:
    """Refuse a decoder trained on another CLIP: with one of the same shape, masks would be silently wrong."""
    told = _metadata(path)
    trained_on = told.get("clip_fingerprint")
    # Random weights are identified by their seed alone, because one model may have several names.
    same = [
        part.split(":")[:2] if part.startswith("random:") else part
        for part in (trained_on or "", clip.fingerprint)
    ]
    if trained_on is not None and same[0] != same[1]:
        raise WrongUse(
            "weights_do_not_fit",
            f"{path} was trained on other weights of CLIP ({told.get('clip')}, {trained_on[:20]}) than those "
            f"of {clip.name} ({clip.fingerprint[:20]}).",
            "Load the CLIP it was trained on.",
        )


def _settings_of(config: type[ClipDeconvConfig | ViTSegConfig], told: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in told.items() if name in config.model_fields}


def _metadata(path: Path) -> dict[str, Any]:
    if path.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(_METADATA)
    return {} if text is None else json.loads(text)
