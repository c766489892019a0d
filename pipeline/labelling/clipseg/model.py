"""Which CLIPSeg, and its defaults. Imports no torch until ``load``."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.labelling.clipseg.options import CLIP
from pipeline.trained.clipseg import is_trained, load_trained, read_clipseg_record

if TYPE_CHECKING:
    import torch

    from models.clip.loading import Towers
    from models.clipseg.decoder import ClipSeg

THRESHOLD = 0.3
"""Minimum probability of a mask's pixels: the paper's, for texts on PhraseCut and Pascal (tables 3, 5, 7)."""
VISUAL_PROMPT = "crop_blur_highlight352"
"""Treatment of an example with a mask: darken and blur the background, crop to the object."""
_RELEASED_SIZE, _TOY_SIZE = 352, 128
_TOY = "toyclip"
_SCHEMES = ("hf-hub:", "local-dir:")


@dataclass(frozen=True)
class ClipSegWeights:
    """Which CLIPSeg; picklable, so that every worker can load it.

    Attributes:
        weights: a decoder file, the folder of a trained CLIPSeg (local or in an object store), a folder in
            Hugging Face's layout, a hub name, or ``random:SEED`` for an untrained decoder (for tests).
            ``~`` is expanded, because a shell does not expand it after ``=``.
        clip: NAME:PRETRAINED of the CLIP under a decoder file; a folder or hub name includes its own. None is
            the toy CLIP if the file says so, else ``CLIP``.
        extract_layers: blocks that the decoder reads; None takes those of the weights.
    """

    weights: str
    clip: str | None = None
    extract_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", os.path.expanduser(self.weights))

    def load(
        self,
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
        towers: Towers = "both",
    ) -> ClipSeg:
        """Load the model in evaluation mode.

        Args:
            device: device of the model.
            dtype: of CLIP and decoder; None is fp32.
            towers: ``visual`` if no text will be embedded.

        Raises:
            MaskMillError: as ``load_clipseg``, ``load_clip`` and ``load_trained``.
        """
        import torch

        from models.clip.loading import load_clip
        from models.clipseg.decoder import build_clipseg
        from models.clipseg.weights import load_clipseg
        from models.settings import ClipSegConfig

        dtype = dtype or torch.float32
        if self._is_folder:
            load = load_trained if is_trained(self.weights) else load_clipseg
            return load(self.weights, extract_layers=self.extract_layers, device=device, dtype=dtype)
        name, pretrained = split_clip(self._clip())
        clip = load_clip(name, pretrained, device=device, dtype=dtype, towers=towers)
        if self._seed is None:
            return load_clipseg(self.weights, clip=clip, extract_layers=self.extract_layers, dtype=dtype)
        config = ClipSegConfig(extract_layers=self.extract_layers or ClipSegConfig().extract_layers)
        model = build_clipseg(clip, config, seed=self._seed)
        model.decoder.cast(dtype)
        return model

    def known_clip(self) -> tuple[str, str | None] | None:
        """Name and weights of the CLIP, if known without loading it.

        Raises:
            MaskMillError: as ``read_clipseg_record``.
        """
        if not self._is_folder:
            return split_clip(self._clip())
        if is_trained(self.weights):
            clip = read_clipseg_record(self.weights).clip
            return clip["model"], clip["pretrained"]
        return None

    def sizes(self) -> tuple[int, int]:
        """Sides in pixels of the training images and examples, both square.

        Raises:
            MaskMillError: as ``read_clipseg_record``.
        """
        if self._is_folder and is_trained(self.weights):
            recorded = read_clipseg_record(self.weights).sizes
            if recorded is not None:
                return recorded
        known = self.known_clip()
        side = _TOY_SIZE if known is not None and known[0] == _TOY else _RELEASED_SIZE
        return side, side

    @property
    def _seed(self) -> int | None:
        seed = self.weights.removeprefix("random:")
        return int(seed) if seed != self.weights and seed.isdecimal() else None

    @property
    def _is_folder(self) -> bool:
        """Whether the weights are not just a decoder file but a folder or hub name."""
        return self._seed is None and not Path(self.weights).is_file()

    def _clip(self) -> str:
        if self.clip is not None or self._seed is not None:
            return self.clip or CLIP
        return f"{_TOY}:bundled" if _recorded_clip(Path(self.weights)) == _TOY else CLIP


def split_clip(text: str) -> tuple[str, str | None]:
    """Split ``NAME:PRETRAINED`` for ``load_clip``; hub names and folders have no second part."""
    if text.startswith(_SCHEMES):
        return text, None
    name, _, pretrained = text.partition(":")
    return name, pretrained or None


def _recorded_clip(path: Path) -> str | None:
    """Name of the CLIP that a decoder file was trained on, if the file says so."""
    if path.suffix != ".safetensors":
        return None
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            name: str | None = json.loads((file.metadata() or {}).get("clipseg", "{}")).get("clip")
    except Exception:  # on damaged files the reader raises many types
        return None  # loading will report the fault
    return name
