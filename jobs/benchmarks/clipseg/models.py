"""The models of CLIPSeg's tables: weights per row, on top of the CLIP from the settings.

Weights are a decoder (the authors' ``.pth`` or one of our files), or a folder in Hugging Face layout, which
includes its CLIP. ``PATH#3,7,9`` names the blocks that the decoder reads, for files that do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.tables import random_weights
from models.errors import WrongUse, did_you_mean
from pipeline.evaluation.published import Row

if TYPE_CHECKING:
    from models.clip.loading import Clip
    from models.clipseg.decoder import ClipSeg

SETTINGS = {"model": "ViT-B-16-quickgelu", "pretrained": "openai", "precision": "fp32"}
"""Settings of the tables, with the paper's values as defaults."""
PRECISIONS = ("fp32", "bf16", "fp16")


def clip_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the given settings into the defaults.

    Raises:
        MaskMillError: ``wrong_use`` for an unknown setting or precision.
    """
    wrong = [name for name in given if name not in SETTINGS]
    if wrong:
        raise WrongUse(
            "wrong_use",
            f"The tables of CLIPSeg have no setting {wrong[0]!r}; their protocol is fixed.",
            f"{did_you_mean(wrong[0], SETTINGS)}Settings: {', '.join(SETTINGS)}.",
        )
    settings = SETTINGS | dict(given)
    if settings["precision"] not in PRECISIONS:
        raise WrongUse(
            "wrong_use",
            f"precision cannot be {settings['precision']!r}.",
            f"Use one of {', '.join(PRECISIONS)}.",
        )
    return settings


def settings_clip(settings: Mapping[str, Any]) -> Clip:
    """Load the CLIP named in the settings onto the best device.

    Raises:
        MaskMillError: as ``models.clip.loading.load_clip``.
    """
    from models.clip.loading import load_clip
    from models.device import DTYPES, best_device

    return load_clip(
        str(settings["model"]),
        settings["pretrained"],
        device=best_device(),
        dtype=DTYPES[str(settings["precision"])],
    )


class RowModels:
    """Loads the rows' models on top of one CLIP, keeping one in memory at a time.

    Args:
        weights: ``PATH`` or ``PATH#BLOCKS`` by row.
        settings: from ``clip_settings``.
    """

    def __init__(self, weights: Mapping[str, str], settings: Mapping[str, Any]) -> None:
        self._weights = weights
        self._settings = settings
        self._loaded: tuple[Any, ClipSeg] | None = None

    def load(self, line: Row, **numbers: str) -> ClipSeg:
        """The model of a row, in evaluation mode.

        Args:
            line: the row.
            **numbers: values of the placeholders in its weights path.

        Raises:
            MaskMillError: ``weights_missing``, and those of ``models.clipseg.weights.load_clipseg``.
        """
        path, _, blocks = self._weights[line.title].partition("#")
        for name, number in numbers.items():
            path = path.replace(f"{{{name}}}", number)
        key = (line.method, path, _layers(blocks))
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # free the memory before loading the next model
            self._loaded = (key, self._load(*key))
        return self._loaded[1]

    def _load(self, method: str, path: str, layers: tuple[int, ...] | None) -> ClipSeg:
        from models.clipseg.weights import load_clipseg
        from models.device import DTYPES, best_device

        if method.startswith("CLIP-Deconv"):
            return _clip_deconv(self._clip, Path(path), layers)
        if method.startswith("ViTSeg"):
            return _vitseg(self._clip, Path(path), layers, str(self._settings["pretrained"]))
        decoder_only = Path(path).expanduser().is_file()
        random = random_weights(self._settings)
        if method.endswith("no CLIP pre-training") and decoder_only and not random:
            raise WrongUse(
                "weights_missing",
                f"{path} holds a decoder without its CLIP, whose weights are random in this row: give "
                "--row 'no CLIP' --set pretrained=random:SEED, or a folder with decoder and CLIP.",
                "Name the CLIP that the decoder was trained on.",
            )
        if layers is None and method.endswith("only layer 3"):
            layers = (3,)
        return load_clipseg(
            path,
            clip=self._clip if decoder_only else None,
            extract_layers=layers,
            device=best_device(),
            dtype=DTYPES[str(self._settings["precision"])],
        )

    @cached_property
    def _clip(self) -> Clip:
        return settings_clip(self._settings)


def _clip_deconv(clip: Clip, path: Path, layers: tuple[int, ...] | None) -> ClipSeg:
    from models.clipseg.baselines import ClipDeconvConfig, build_clip_deconv

    state = _baseline_state(path, ("film_mul.weight", "reduce2.0.weight"))
    config = ClipDeconvConfig(
        reduce_dim=len(state["film_mul.weight"]),
        reduce2_dim=len(state["reduce2.0.weight"]),
        extract_layer=layers[0] if layers else ClipDeconvConfig().extract_layer,
    )
    return _filled(build_clip_deconv(clip, config), state, path)


def _vitseg(clip: Clip, path: Path, layers: tuple[int, ...] | None, pretrained: str) -> ClipSeg:
    from models.clipseg.baselines import ViTSegConfig, build_vitseg

    state = _baseline_state(path, ("film_mul.weight",))
    config = ViTSegConfig(
        reduce_dim=len(state["film_mul.weight"]),
        extract_layers=layers or ViTSegConfig().extract_layers,
    )
    # A trial with a random CLIP should not download the other tower.
    tower = pretrained if pretrained.startswith("random:") else "pretrained"
    return _filled(build_vitseg(clip, config, weights=tower), state, path)


def _baseline_state(path: Path, needed: Sequence[str]) -> dict[str, Any]:
    from models.clip.weights import read_state

    path = path.expanduser()
    if not path.is_file():
        raise WrongUse("weights_missing", f"There is no file {path}.", "Check the path.")
    state = read_state(path)
    absent = [name for name in needed if name not in state]
    if absent:
        raise WrongUse(
            "weights_do_not_fit", f"{path} has no {', '.join(absent)}.", "Give the decoder of this baseline."
        )
    return state


def _filled(model: ClipSeg, state: Mapping[str, Any], path: Path) -> ClipSeg:
    try:
        model.decoder.load_state_dict(state)
    except RuntimeError as error:
        raise WrongUse(
            "weights_do_not_fit",
            f"The tensors of {path} are not those of this baseline: {' '.join(str(error).split())[:400]}",
            "Give the decoder's state_dict, and the CLIP it was trained on as --set model=....",
        ) from error
    return model


def _layers(blocks: str) -> tuple[int, ...] | None:
    if not blocks:
        return None
    try:
        return tuple(int(block) for block in blocks.split(","))
    except ValueError as error:
        raise WrongUse(
            "wrong_use", f"#{blocks} is not a list of blocks.", "Write them as in rd64-uni.pth#3,7,9."
        ) from error
