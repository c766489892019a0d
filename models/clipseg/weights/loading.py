"""Load a CLIPSeg from any of its formats."""

from __future__ import annotations

from pathlib import Path

import torch

from models.clip.loading import Clip
from models.clipseg.decoder import ClipSeg, ClipSegDecoder
from models.clipseg.weights.decoder_file import check_clip, read_decoder
from models.clipseg.weights.hugging_face import (
    decoder_config,
    hugging_face_files,
    read_clip,
    read_hugging_face_decoder,
    read_settings,
)
from models.errors import WrongUse


def load_clipseg(
    weights: str | Path,
    *,
    clip: Clip | None = None,
    extract_layers: tuple[int, ...] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    cache_dir: str | None = None,
) -> ClipSeg:
    """Load a CLIPSeg.

    Args:
        weights: the authors' ``.pth``, a decoder file of ``save_decoder``, a folder in Hugging Face's layout,
            or a hub name (``CIDAS/clipseg-rd64-refined``).
        clip: the CLIP under the decoder, required for a decoder file. With Hugging Face's layout it replaces
            the CLIP there, which is then not read.
        extract_layers: the blocks to read; None takes them from the weights. The authors' files do not tell;
            for them it is (3, 6, 9), as is customary. The paper has (3, 7, 9).
        device: for a CLIP loaded here. A given ``clip`` stays where it is, and the decoder joins it.
        dtype: for what is loaded here.
        cache_dir: the hub client's download cache; None for its default.

    Returns:
        The model in evaluation mode.

    Raises:
        MaskMillError: ``weights_missing``, also for a decoder without a CLIP; ``model_damaged``;
            ``weights_do_not_fit`` with the names of missing and unexpected tensors, or if the decoder was
            made for another kind of CLIP; ``model_unsupported`` for a configuration that open_clip cannot
            run; ``weights_do_not_fit`` if a file of ``save_decoder`` was trained on other CLIP weights.
    """
    path = Path(weights).expanduser()
    if path.is_file():
        if clip is None:
            raise WrongUse(
                "weights_missing",
                f"{path} holds a decoder without the CLIP beneath it.",
                "Pass clip=load_clip('ViT-B-16-quickgelu', 'openai'), or the CLIP it was trained on.",
            )
        decoder = read_decoder(path, extract_layers=extract_layers)
    else:
        settings_path, tensors_path = hugging_face_files(str(weights), cache_dir)
        settings = read_settings(settings_path)
        config = decoder_config(settings, settings_path)
        if clip is None:
            clip = read_clip(str(weights), settings, settings_path, tensors_path, device, dtype)
        decoder = read_hugging_face_decoder(config, settings, tensors_path)
        if extract_layers is not None:
            decoder = _with_layers(decoder, extract_layers)
    model = ClipSeg(clip, decoder.cast(dtype).eval())
    if path.is_file():
        check_clip(path, clip)
    return model


def _with_layers(decoder: ClipSegDecoder, layers: tuple[int, ...]) -> ClipSegDecoder:
    if len(layers) != len(decoder.extract_layers):
        raise WrongUse(
            "setting_invalid",
            f"The weights have {len(decoder.extract_layers)} decoder blocks, and extract_layers is {layers}.",
            f"Name {len(decoder.extract_layers)} blocks of the tower.",
        )
    decoder.config = decoder.config.replace(extract_layers=layers)
    decoder.extract_layers = decoder.config.extract_layers
    return decoder
