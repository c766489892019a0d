"""CLIPSeg (arXiv 2112.10003): a mask from a text or an example image.

A frozen CLIP ViT encodes the image. A small transformer decoder reads the outputs of a few of its blocks,
deepest first, conditioned (FiLM) on an embedding from CLIP's joint space that says what to find. Images may
have any size and shape. The vision tower runs once per image and all prompts are decoded in one batch;
everything before the conditioning is computed once for all prompts.

Shapes: B images, P prompts, E joint embedding, W_ tower width, D decoder width, h w grid, L = h*w,
N = 1 + L tokens (class token first), H W pixels.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from models.clip.loading import Activations, Clip
from models.errors import WrongUse
from models.maskclip import IMAGENET_MEAN, IMAGENET_STD, per_channel
from models.settings import PAPER, ClipSegConfig

IMAGE_SIZE = 352
"""Side of the square that training and evaluation resize images to: 22 x 22 tokens of 16 pixels."""
_READERS = frozenset({"film_mul", "film_add", "reduce", "reduces"})
PROMPTS_AT_ONCE = 64
"""Prompts per decoder batch at inference; their activations take under 0.4 GB at 352 x 352."""


ABLATIONS = {
    "base": PAPER,
    "d16": PAPER.replace(reduce_dim=16),
    "d128": PAPER.replace(reduce_dim=128),
    "layer3": PAPER.replace(extract_layers=(3,)),
    "refined": PAPER.replace(refined=True),
}
"""Decoders of the paper's ablation table by name. The row without CLIP pre-training is ``base`` on
``load_clip(NAME, "random:SEED")``; those on negatives, visual prompts and highlighting are settings of the
training data."""


class PromptDecoder(nn.Module):
    """Base of decoders: outputs of tower blocks and conditional embeddings to logits.

    Attributes:
        extract_layers: the blocks whose outputs ``forward`` takes.
        width, embed_dim, patch: W_, E and patch size of the tower it was built for.
        config: the decoder's ``Settings``.
    """

    def __init__(
        self, config: Any, extract_layers: tuple[int, ...], *, width: int, embed_dim: int, patch: int
    ) -> None:
        super().__init__()
        self.config = config
        self.extract_layers = extract_layers
        self.width, self.embed_dim, self.patch = width, embed_dim, patch
        self.film_mul = nn.Linear(embed_dim, config.reduce_dim)
        self.film_add = nn.Linear(embed_dim, config.reduce_dim)

    def forward(self, layers: Sequence[Tensor], conditionals: Tensor, grid: tuple[int, int]) -> Tensor:
        """Logits (B, P, h * patch, w * patch).

        Args:
            layers: (B, N, W_) per block of ``extract_layers``, in that order.
            conditionals: (P, E) for all images, or (B, P, E) with separate prompts per image.
            grid: (h, w).
        """
        raise NotImplementedError

    def film(self, x: Tensor, conditionals: Tensor) -> Tensor:
        """Scale and shift all tokens: (B, N, D), (P, E) or (B, P, E) -> (B, P, N, D)."""
        conditionals = conditionals.to(self.film_mul.weight.dtype)
        scale, shift = (film(conditionals).unsqueeze(-2) for film in (self.film_mul, self.film_add))
        return scale * x[:, None] + shift

    @property
    def readers(self) -> dict[str, nn.Linear]:
        """The linear maps that read CLIP's outputs, by name: FiLM's, and those that reduce the tokens."""
        return {
            name: module
            for name, module in self.named_modules()
            if isinstance(module, nn.Linear) and name.split(".")[0] in _READERS
        }

    def cast(self, dtype: torch.dtype) -> PromptDecoder:
        """Convert to a dtype, in place.

        For half types the ``readers`` stay in fp32: most of CLIP's output is common to all inputs and cancels
        in these maps; in half precision little of the remainder would survive.
        """
        half = torch.finfo(dtype).bits < 32
        exact = {name: copy.deepcopy(reader).float() for name, reader in self.readers.items()} if half else {}
        self.to(dtype)
        for name, reader in exact.items():
            self.set_submodule(name, reader)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of everything behind the readers."""
        return next(self.get_submodule("trans_conv").parameters()).dtype


class ClipSegDecoder(PromptDecoder):
    """The paper's decoder (§3), with the tensor names of the authors' files.

    Args:
        width, embed_dim, patch: of the CLIP; the defaults are those of ViT-B/16.
    """

    config: ClipSegConfig

    def __init__(
        self, config: ClipSegConfig, *, width: int = 768, embed_dim: int = 512, patch: int = 16
    ) -> None:
        super().__init__(config, config.extract_layers, width=width, embed_dim=embed_dim, patch=patch)
        dim, depth = config.reduce_dim, len(config.extract_layers)
        self.reduces = nn.ModuleList(nn.Linear(width, dim) for _ in range(depth))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, config.heads, config.feedforward, config.dropout, batch_first=True
            )
            for _ in range(depth)
        )
        self.trans_conv = refined_head(dim, patch) if config.refined else plain_head(dim, patch)

    def forward(self, layers: Sequence[Tensor], conditionals: Tensor, grid: tuple[int, int]) -> Tensor:
        x: Tensor | None = None
        for index, (reduce, block) in enumerate(zip(self.reduces, self.blocks, strict=True)):
            step = reduce(layers[-1 - index].to(self.film_mul.weight.dtype))
            if x is not None:
                # Conditioned tokens have a prompt axis, the tower's do not.
                step = (step if x.ndim == 3 else step[:, None]) + x
            x = self.film(step, conditionals) if index == self.config.cond_layer else step
            x = post_norm_block(block, x.to(self.dtype))
        assert x is not None, "a decoder has at least one block"
        return upsample(x, grid, self.trans_conv)


def plain_head(dim: int, patch: int) -> nn.Module:
    """A linear map from each token to its patch x patch pixels."""
    return nn.ConvTranspose2d(dim, 1, patch, stride=patch)


def refined_head(dim: int, patch: int) -> nn.Module:
    """The refined head: a 3 x 3 convolution and two upsamplings whose factors multiply to the patch size.

    The reference uses patch // 4 twice, which is right only for 16. Here it is the factor pair nearest the
    square root, larger first: 4 * 4 for 16, 8 * 4 for 32, 7 * 2 for 14.
    """
    second = max(factor for factor in range(1, math.isqrt(patch) + 1) if patch % factor == 0)
    first = patch // second
    return nn.Sequential(
        nn.Conv2d(dim, dim, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(dim, dim // 2, first, stride=first),
        nn.ReLU(),
        nn.ConvTranspose2d(dim // 2, 1, second, stride=second),
    )


def upsample(x: Tensor, grid: tuple[int, int], head: nn.Module) -> Tensor:
    """Tokens (B, P, N, D) through a head to logits (B, P, H, W); the class token is dropped."""
    tokens = x[:, :, 1:].flatten(0, 1)
    if isinstance(head, nn.ConvTranspose2d):
        # Stride equals kernel, so one matrix product does it, in a fifth of the time on a CPU.
        assert head.bias is not None
        tiles = F.linear(tokens, head.weight.flatten(1).T) + head.bias
        tiles = tiles.unflatten(2, head.kernel_size).unflatten(1, grid)
        logits = tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    else:
        logits = head(tokens.transpose(1, 2).unflatten(2, grid))[:, 0]
    return logits.unflatten(0, x.shape[:2])


def post_norm_block(block: nn.Module, x: Tensor) -> Tensor:
    """A ``TransformerEncoderLayer`` (post-norm, ReLU) on tokens (..., N, D).

    Written out because torch's fused path does not specify the precision of the norms and is not used in
    training. The fused attention computes its softmax in fp32 for half types.
    """
    assert isinstance(block, nn.TransformerEncoderLayer)
    attention = block.self_attn
    packed = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = (
        part.unflatten(-1, (attention.num_heads, -1)).transpose(-3, -2).flatten(0, -4)
        for part in packed.chunk(3, -1)
    )
    rate = attention.dropout if block.training else 0.0
    mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=rate)
    mixed = mixed.transpose(1, 2).flatten(2).reshape(x.shape)
    x = layer_norm(block.norm1, x + block.dropout1(attention.out_proj(mixed)))
    hidden = block.dropout(F.relu(block.linear1(x), inplace=not torch.is_grad_enabled()))
    return layer_norm(block.norm2, x + block.dropout2(block.linear2(hidden)))


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """A layer norm (..., D) computed in fp32 at least, and rounded once to the dtype of ``x``."""
    exact = torch.promote_types(x.dtype, torch.float32)
    weight, bias = norm.weight.to(exact), norm.bias.to(exact)
    return F.layer_norm(x.to(exact), norm.normalized_shape, weight, bias, norm.eps).to(x.dtype)


class ClipSeg:
    """A frozen CLIP and a decoder.

    ``encode_*`` pass no gradient to CLIP; only ``decoder`` is trained.

    Args:
        clip: a ViT; its text tower is needed only for text prompts.
        decoder: moved to the CLIP's device; it keeps its dtype.

    Raises:
        MaskMillError: ``model_unsupported`` for a ResNet; ``weights_do_not_fit`` if the decoder was built
            for another tower.
    """

    def __init__(self, clip: Clip, decoder: PromptDecoder) -> None:
        self.clip = clip
        self.decoder = decoder.to(clip.device)
        self._check()

    def _check(self) -> None:
        width, depth = tower_shape(self.clip)
        decoder = self.decoder
        made = (decoder.width, decoder.embed_dim, decoder.patch)
        has = (width, self.clip.embed_dim, self.clip.stride)
        if made != has:
            raise WrongUse(
                "weights_do_not_fit",
                f"The decoder reads a tower of width {made[0]}, embedding {made[1]} and patch {made[2]}; "
                f"{self.clip.name} has {has[0]}, {has[1]} and {has[2]}.",
                "Load the CLIP it was trained on; for the released weights: ViT-B-16-quickgelu, openai.",
            )
        if max(decoder.extract_layers) >= depth:
            raise WrongUse(
                "weights_do_not_fit",
                f"The decoder reads block {max(decoder.extract_layers)} (from 0); {self.clip.name} has "
                f"{depth} blocks.",
                "Set extract_layers to blocks of this tower.",
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex over CLIP's fingerprint, the settings and the decoder's tensors."""
        digest = hashlib.sha256()
        settings = [type(self.decoder).__name__, self.clip.fingerprint, self.decoder.config.model_dump()]
        digest.update(json.dumps(settings, sort_keys=True).encode())
        for module in self._fingerprinted():
            for name, tensor in sorted(module.state_dict().items()):
                digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def _fingerprinted(self) -> tuple[nn.Module, ...]:
        """Modules to hash, since no file's fingerprint covers them."""
        return (self.decoder,)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Activations:
        """Run the vision tower up to the deepest block that the decoder reads.

        Images are zero-padded (with the mean colour) right and below to whole patches, and ``decode`` crops
        the logits to H x W.

        Args:
            pixels: float (B, 3, H, W), ImageNet-normalised (``normalize``).
        """
        return self.clip.activations(pixels, self.decoder.extract_layers)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Conditionals fp32 (P, E) of P texts, without a template and not normalised."""
        # The clone is a normal tensor, not an inference one, so a decoder can be trained on it.
        return self.clip.encode_text(prompts, normalize=False).clone()

    @torch.no_grad()
    def encode_prompt_images(self, pixels: Tensor) -> Tensor:
        """Conditionals fp32 (P, E) of example images (P, 3, H, W), not normalised.

        The images are ImageNet-normalised; ``models.clipseg.visual_prompts`` emphasises the object in them.
        """
        return self.clip.encode_image(pixels).float()

    def decode(
        self, activations: Activations, conditionals: Tensor, *, prompts_at_once: int = PROMPTS_AT_ONCE
    ) -> Tensor:
        """Logits fp32 (B, P, H, W), or fp64 from an fp64 decoder; their sigmoid is the probability.

        Args:
            activations: from ``encode_image``.
            conditionals: (P, E) for all images, or (B, P, E) with separate prompts per image.
            prompts_at_once: the decoder's batch size, which bounds the memory.
        """
        height, width = activations.size
        grid, layers = activations.grid, activations.layers
        parts = [
            self.decoder(layers, part.to(layers[0].device), grid)[..., :height, :width]
            for part in conditionals.split(max(1, prompts_at_once), dim=-2)
        ]
        logits = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def __call__(self, pixels: Tensor, conditionals: Tensor) -> Tensor:
        """``decode`` of ``encode_image``: images (B, 3, H, W) and conditionals to logits (B, P, H, W)."""
        return self.decode(self.encode_image(pixels), conditionals)


def build_clipseg(clip: Clip, config: ClipSegConfig = PAPER, *, seed: int = 0) -> ClipSeg:
    """Build a CLIPSeg with a new decoder in torch's default initialisation.

    Args:
        clip: a ViT.
        config: the decoder's settings.
        seed: equal seeds give equal decoders; the global random state does not change.

    Returns:
        The model in evaluation mode, the decoder in fp32.

    Raises:
        MaskMillError: see ``ClipSeg``.
    """
    width, _ = tower_shape(clip)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = ClipSegDecoder(config, width=width, embed_dim=clip.embed_dim, patch=clip.stride)
    return ClipSeg(clip, decoder.eval())


def tower_shape(clip: Clip) -> tuple[int, int]:
    """Width and number of blocks of the visual tower.

    Raises:
        MaskMillError: ``model_unsupported`` for a ResNet.
    """
    visual = clip.visual
    if not isinstance(visual, VisionTransformer):
        raise WrongUse(
            "model_unsupported",
            f"CLIPSeg reads the tokens of a ViT, and {clip.name} is a ResNet.",
            "Use ViT-B-16-quickgelu, the CLIP of the paper, or another ViT.",
        )
    return int(visual.conv1.out_channels), len(visual.transformer.resblocks)


def mix(text: Tensor, image: Tensor, weight: float | Tensor) -> Tensor:
    """Interpolate unnormalised conditionals: weight * text + (1 - weight) * image (§3.2).

    Args:
        text: (..., E).
        image: (..., E).
        weight: in [0, 1]; one number, or one per row (...).
    """
    if isinstance(weight, Tensor):
        weight = weight.to(text)[..., None]
    return weight * text + (1 - weight) * image


def normalize(images: Tensor, size: int | tuple[int, int] | None = None) -> Tensor:
    """Normalise images for CLIPSeg, with ImageNet's statistics rather than CLIP's.

    Args:
        images: uint8 (B, 3, H, W) RGB.
        size: (height, width), or the side of a square, to resize to (bilinear, antialiased); None keeps the
            size. The paper uses ``IMAGE_SIZE``.

    Returns:
        fp32 (B, 3, height, width).
    """
    x = images.to(torch.float32) / 255
    if size is not None:
        target = (size, size) if isinstance(size, int) else size
        if target != tuple(x.shape[-2:]):
            x = F.interpolate(x, size=target, mode="bilinear", align_corners=False, antialias=True)
    return (x - per_channel(IMAGENET_MEAN, x)) / per_channel(IMAGENET_STD, x)
