"""Baselines of the CLIPSeg paper (§4): a decoder without attention, and a tower other than CLIP's.

Both share the interface of ``models.clipseg.decoder.ClipSeg``, so anything that runs or trains a CLIPSeg
works with them too.

Shapes: see ``models.clipseg.decoder``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import torch.nn.functional as F
from pydantic import Field
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.clip.loading import Activations, Clip
from models.clip.weights import read_state
from models.clipseg import toyvit
from models.clipseg.decoder import (
    ClipSeg,
    ClipSegDecoder,
    PromptDecoder,
    plain_head,
    tower_shape,
    upsample,
)
from models.errors import MaskMillError, WrongUse
from models.settings import ClipSegConfig, Settings


class ClipDeconvConfig(Settings):
    """CLIP-Deconv."""

    reduce_dim: Annotated[int, Field(ge=1)] = 64
    """D."""
    reduce2_dim: Annotated[int, Field(ge=1)] = 64
    """Hidden width of the two-layer MLP behind the conditioning."""
    extract_layer: Annotated[int, Field(ge=0)] = 9
    """0-based index of the one block to read."""


class ClipDeconvDecoder(PromptDecoder):
    """One activation, FiLM, a two-layer MLP per token, a transposed convolution; no attention, no skips.

    Args:
        width, embed_dim, patch: of the CLIP; the defaults are those of ViT-B/16.
    """

    config: ClipDeconvConfig

    def __init__(
        self, config: ClipDeconvConfig, *, width: int = 768, embed_dim: int = 512, patch: int = 16
    ) -> None:
        super().__init__(config, (config.extract_layer,), width=width, embed_dim=embed_dim, patch=patch)
        dim = config.reduce_dim
        self.reduce = nn.Linear(width, dim)
        self.reduce2 = nn.Sequential(
            nn.Linear(dim, config.reduce2_dim), nn.ReLU(), nn.Linear(config.reduce2_dim, dim)
        )
        self.trans_conv = plain_head(dim, patch)

    def forward(self, layers: Sequence[Tensor], conditionals: Tensor, grid: tuple[int, int]) -> Tensor:
        x = self.reduce(layers[0].to(self.film_mul.weight.dtype))
        x = self.film(x, conditionals).to(self.dtype)
        return upsample(self.reduce2(x), grid, self.trans_conv)


def build_clip_deconv(clip: Clip, config: ClipDeconvConfig | None = None, *, seed: int = 0) -> ClipSeg:
    """Build CLIP-Deconv with a new decoder; otherwise like ``models.clipseg.decoder.build_clipseg``."""
    width, _ = tower_shape(clip)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = ClipDeconvDecoder(
            config or ClipDeconvConfig(), width=width, embed_dim=clip.embed_dim, patch=clip.stride
        )
    return ClipSeg(clip, decoder.eval())


class ViTSegConfig(ClipSegConfig):
    """ViTSeg: CLIPSeg's decoder on a ViT trained with ImageNet labels."""

    extract_layers: tuple[int, ...] = (3, 7, 9)
    """0-based indices of the tower's blocks to read, increasing."""
    tower: str = "vit_base_patch16_384"
    """A timm ViT with a class token."""


class ViTSegDecoder(ClipSegDecoder):
    """CLIPSeg's decoder, plus a random projection in place of the tower's classifier.

    ``prompt_projection`` maps an example image's class token to the width of a text embedding. It is never
    trained, but depends on the seed, so it is saved with the decoder's weights.
    """

    config: ViTSegConfig

    def __init__(
        self, config: ViTSegConfig, *, width: int = 768, embed_dim: int = 512, patch: int = 16
    ) -> None:
        super().__init__(config, width=width, embed_dim=embed_dim, patch=patch)
        self.prompt_projection = nn.Linear(width, embed_dim).requires_grad_(False)


class ViTSeg(ClipSeg):
    """A timm ViT for images, CLIP's text tower for texts.

    As in the reference, images of any size are resized to the tower's (384 x 384) by nearest neighbour, and
    the logits are resized back the same way; pixels are ImageNet-normalised. The reference leaves CLIP's text
    tower trainable by oversight; here everything but the decoder is frozen.

    Args:
        clip: only its text tower is used.
        tower: timm's module without a classifier; frozen.
        decoder: built for this tower and this CLIP's embedding.

    Raises:
        MaskMillError: ``weights_do_not_fit``.
    """

    decoder: ViTSegDecoder

    def __init__(self, clip: Clip, tower: Any, decoder: ViTSegDecoder) -> None:
        self.tower: Any = tower.to(clip.device, clip.dtype).eval().requires_grad_(False)
        super().__init__(clip, decoder)

    def _check(self) -> None:
        made = (self.decoder.width, self.decoder.embed_dim, self.decoder.patch)
        has = (self.tower.embed_dim, self.clip.embed_dim, self.tower.patch_embed.patch_size[0])
        depth = len(self.tower.blocks)
        if made != has or max(self.decoder.extract_layers) >= depth:
            raise WrongUse(
                "weights_do_not_fit",
                f"The decoder reads width, embedding and patch {made}, blocks {self.decoder.extract_layers}; "
                f"the towers have {has} and {depth} blocks.",
                "Use the towers it was trained on.",
            )

    def _fingerprinted(self) -> tuple[nn.Module, ...]:
        return (self.decoder, self.tower)

    def _squeeze(self, pixels: Tensor) -> Tensor:
        return F.interpolate(pixels.to(self.clip.dtype), size=self.tower.patch_embed.img_size)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Activations:
        """Outputs of the tower's blocks for images (B, 3, H, W)."""
        taken = self.tower.forward_intermediates(
            self._squeeze(pixels),
            indices=list(self.decoder.extract_layers),
            return_prefix_tokens=True,
            output_fmt="NLC",
            intermediates_only=True,
            stop_early=True,
        )
        layers = tuple(torch.cat([prefix, patches], dim=1) for patches, prefix in taken)
        return Activations(layers, self.tower.patch_embed.grid_size, (pixels.shape[-2], pixels.shape[-1]))

    @torch.no_grad()
    def encode_prompt_images(self, pixels: Tensor) -> Tensor:
        """Conditionals fp32 (P, E): the normed class token through the random projection."""
        tokens = self.tower.forward_features(self._squeeze(pixels))
        projection = self.decoder.prompt_projection
        return projection(tokens[:, 0].to(projection.weight.dtype)).float()

    def decode(self, activations: Activations, conditionals: Tensor, *, prompts_at_once: int = 64) -> Tensor:
        """``ClipSeg.decode``, with logits resized from the tower's size to H x W by nearest neighbour."""
        side = self.tower.patch_embed.img_size
        logits = super().decode(
            activations._replace(size=tuple(side)), conditionals, prompts_at_once=prompts_at_once
        )
        return F.interpolate(logits, size=activations.size)


def build_vitseg(
    clip: Clip, config: ViTSegConfig | None = None, *, weights: str = "pretrained", seed: int = 0
) -> ViTSeg:
    """Build ViTSeg with a new decoder.

    Args:
        clip: provides the text tower.
        weights: for the tower: ``pretrained`` (timm downloads its own), a file with timm's names, or
            ``random:SEED``.
        seed: of the decoder and the random projection.

    Raises:
        MaskMillError: ``name_unknown`` if timm has no such ViT with a class token; ``weights_missing``,
            ``model_damaged``, ``weights_do_not_fit``.
    """
    config = config or ViTSegConfig()
    tower = _timm_tower(config.tower, weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = ViTSegDecoder(
            config,
            width=tower.embed_dim,
            embed_dim=clip.embed_dim,
            patch=tower.patch_embed.patch_size[0],
        )
    return ViTSeg(clip, tower, decoder.eval())


def _timm_tower(name: str, weights: str) -> Any:
    toyvit.register()
    if not timm.is_model(name):
        raise _unknown(name)
    kind, _, seed = weights.partition(":")
    if kind == "pretrained":
        try:
            tower = timm.create_model(name, pretrained=True, num_classes=0)
        except Exception as error:  # the hub client and the network raise many types
            raise WrongUse(
                "weights_missing",
                f"timm's weights of {name} are not on this machine and could not be fetched: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}.",
                "Fetch them on another machine, copy the file here, and add: --set tower_weights=FILE.",
            ) from error
    elif kind == "random" and seed.isdigit():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed))
            tower = timm.create_model(name, num_classes=0)
    else:
        tower = _tower_from_file(name, Path(weights).expanduser())
    if not (isinstance(tower, VisionTransformer) and tower.has_class_token and tower.num_prefix_tokens == 1):
        raise _unknown(name)
    return tower


def _unknown(name: str) -> MaskMillError:
    return WrongUse(
        "name_unknown",
        f"timm has no ViT named {name!r} with a class token and no further tokens beside it.",
        "Use vit_base_patch16_384, as the paper does.",
    )


def _tower_from_file(name: str, path: Path) -> Any:
    if not path.is_file():
        raise WrongUse(
            "weights_missing",
            f"There is no weights file {path}.",
            "Name a file, pretrained, or random:SEED.",
        )
    tower = timm.create_model(name, num_classes=0)
    state = {key: tensor for key, tensor in read_state(path).items() if not key.startswith("head.")}
    try:
        tower.load_state_dict(state)
    except RuntimeError as error:
        raise WrongUse(
            "weights_do_not_fit",
            f"The tensors of {path} are not those of timm's {name}: {' '.join(str(error).split())[:400]}",
            "Name the tower the weights were made for.",
        ) from error
    return tower
