"""Dense heads: features from the last block of CLIP's visual tower.

To add a head, write one function per kind of tower with the signatures in ``Head``, enter them in ``HEADS``
at the end of this module, and add the name to ``HeadName`` in ``models.settings``; recipes, tables and
benchmarks pick it up from there. ``_value_vit`` is a short example. The heads share everything before the
last block and the projection behind it.

The computation runs on open_clip's own modules and never changes a parameter.

Shapes: B batch, D embedding channels, H W pixels, h w grid, L = h*w, N = 1 + L tokens, W_ tower width, K key
channels.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn

from models.errors import WrongUse
from models.settings import KEYLESS_HEADS, HeadName, KeySource, Profile

_TABLES_KEPT = 16  # position tables, one per grid; 2 MB each for a ViT-B/16 at 512x683 in bf16
_KEY, _VALUE = 1, 2  # places in the packed q, k, v


class Dense(NamedTuple):
    """Output of a tower for a batch of images.

    Attributes:
        features: (B, D, h, w) in the joint embedding, not normalised, in the tower's dtype.
        keys: (B, L, K) of the last attention; None unless requested.
    """

    features: Tensor
    keys: Tensor | None


@dataclass(frozen=True)
class Head:
    """One way to read the last layer.

    Attributes:
        vit: (last residual block, its input (B, N, W_), class token first) -> patches (B, L, W_), the input
            of the tower's final norm and projection.
        resnet: (attention pool, output of layer4 (B, L, W_)) -> embeddings (B, L, D).
    """

    vit: Callable[[Any, Tensor], Tensor]
    resnet: Callable[[AttentionPool2d, Tensor], Tensor]


def dense_encoder(
    visual: nn.Module,
    *,
    head: HeadName = "maskclip",
    profile: Profile = "weights",
    keys: KeySource | None = None,
) -> VitDense | ResNetDense:
    """Wrap a visual tower of open_clip to compute dense features at any image size.

    Args:
        visual: ``VisionTransformer`` with a class token, or ``ModifiedResNet``; shared, never changed.
        head: a name in ``HEADS``.
        profile: ``weights`` runs the tower as it was trained. ``reference`` runs a ViT as the MaskCLIP code
            does: exact (erf) GELU and LayerNorm eps 1e-6, on copies of the modules that share every
            parameter. A ResNet has neither, so the profile makes no difference there.
        keys: also return the keys of the last attention, for key smoothing: ``projected`` through the output
            projection, as in the reference code, or ``raw``. A ResNet has only raw keys and returns those
            either way.

    Raises:
        MaskMillError: ``setting_invalid``, ``model_unsupported``.
    """
    if head not in HEADS:
        raise WrongUse(
            "setting_invalid", f"There is no dense head {head!r}.", f"Use one of {', '.join(HEADS)}."
        )
    if profile not in ("reference", "weights"):
        raise WrongUse("setting_invalid", f"There is no profile {profile!r}.", "Use reference or weights.")
    if keys is not None and head in KEYLESS_HEADS:
        raise WrongUse(
            "setting_invalid",
            f"Key smoothing needs the keys of the last attention, which the head {head!r} does not give.",
            "Use the head maskclip, or set the key smoothing threshold to 0.",
        )
    if isinstance(visual, ModifiedResNet):
        return ResNetDense(visual, HEADS[head], keys)
    if isinstance(visual, VisionTransformer) and visual.attn_pool is None:
        return VitDense(reference_view(visual) if profile == "reference" else visual, HEADS[head], keys)
    raise WrongUse(
        "model_unsupported",
        f"A {type(visual).__name__} has no class token and patch tokens that MaskMill could read.",
        "Use an open_clip ViT with a class token or a ModifiedResNet.",
    )


def reference_view(visual: VisionTransformer) -> VisionTransformer:
    """The tower with erf-GELU and LayerNorm eps 1e-6, as the MaskCLIP code runs it.

    The modules are copies that share the parameters and buffers of ``visual``, which is left unchanged.
    """
    shared = {id(tensor): tensor for tensor in (*visual.parameters(), *visual.buffers())}
    view = copy.deepcopy(visual, memo=dict(shared))
    for module in view.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
        for name, child in module.named_children():
            if isinstance(child, QuickGELU | nn.GELU):
                setattr(module, name, nn.GELU())
    return view


class VitDense(nn.Module):
    """Dense features of an open_clip ViT.

    Normalised images are zero-padded right and below to whole patches, so the padding has the mean colour;
    h = ceil(H / patch), w = ceil(W / patch).
    """

    def __init__(self, visual: VisionTransformer, head: Head, keys: KeySource | None) -> None:
        super().__init__()
        self.visual = visual
        self._head = head
        self._keys = keys
        self._tables: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        self._tables_lock = threading.Lock()  # several threads may label images

    @property
    def stride(self) -> int:
        """Pixels per grid cell."""
        return int(self.visual.patch_size[0])

    def forward(self, images: Tensor) -> Dense:
        """Dense features of normalised images.

        Args:
            images: float (B, 3, H, W).
        """
        x = self.whole_patches(images)
        grid = (x.shape[-2] // self.stride, x.shape[-1] // self.stride)
        return self.encode(x, self.position_table(grid))

    def whole_patches(self, images: Tensor) -> Tensor:
        """Pad images to (B, 3, H', W') in the tower's dtype, H' and W' multiples of the patch."""
        right, below = -images.shape[-1] % self.stride, -images.shape[-2] % self.stride
        # One memory layout for all: for a slice of a batch, or an image decoded with channels last, the
        # convolution would pick another kernel, which rounds differently in bf16.
        padded = F.pad(images.to(self.visual.conv1.weight.dtype), (0, right, 0, below))
        return padded.contiguous()

    def encode(self, images: Tensor, positions: Tensor) -> Dense:
        """The arithmetic alone, for ``torch.compile``.

        Args:
            images: from ``whole_patches``.
            positions: (1 + L, W_), from ``position_table``.
        """
        h, w = images.shape[-2] // self.stride, images.shape[-1] // self.stride
        blocks = list(self.visual.transformer.resblocks)
        x = self.tokens(images, positions)
        for block in blocks[:-1]:
            x = block(x)
        features = self._project(self.visual.ln_post(self._head.vit(blocks[-1], x)))
        keys = None if self._keys is None else _keys_vit(blocks[-1], x, self._keys)
        return Dense(features.transpose(1, 2).unflatten(2, (h, w)), keys)

    def image_embedding(self, images: Tensor) -> Tensor:
        """CLIP's unmodified embedding (B, D) of whole images of any size.

        At the training size it equals open_clip's ``encode_image``.
        """
        x = self.whole_patches(images)
        x = self.tokens(x, self.position_table((x.shape[-2] // self.stride, x.shape[-1] // self.stride)))
        for block in self.visual.transformer.resblocks:
            x = block(x)
        return self.pooled(x)

    def pooled(self, x: Tensor) -> Tensor:
        """CLIP's embedding (B, D) from the last block's output (B, N, W_)."""
        norm, pool = self.visual.ln_post, self.visual.pool_type
        if not self.visual.final_ln_after_pool:
            x = norm(x)
        x = x[:, 0] if pool == "tok" else x[:, 1:].mean(1)
        if self.visual.final_ln_after_pool:
            x = norm(x)
        return self._project(x)

    def position_table(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings (1 + L, W_) for a grid, the class row unchanged.

        The grid part is resized bicubically, align_corners False, without antialiasing. The reference skips
        this whenever the token *count* is the native one, so it reads a 7x28 grid with the 14x14 table. That
        is a bug; here the grid decides.
        """
        native = self.visual.positional_embedding
        if grid == tuple(self.visual.grid_size):
            return native
        with self._tables_lock:
            if grid in self._tables:
                self._tables.move_to_end(grid)
                return self._tables[grid]
        exact = native.dtype if native.dtype == torch.float64 else torch.float32
        with torch.no_grad():
            square = native[1:].to(exact).unflatten(0, self.visual.grid_size).permute(2, 0, 1)[None]
            square = F.interpolate(square, size=grid, mode="bicubic", align_corners=False, antialias=False)
            table = torch.cat([native[:1], square[0].flatten(1).T.to(native.dtype)])
        with self._tables_lock:
            self._tables[grid] = table
            if len(self._tables) > _TABLES_KEPT:
                self._tables.popitem(last=False)
        return table

    def tokens(self, images: Tensor, positions: Tensor) -> Tensor:
        """Input (B, N, W_) of the first block, class token first."""
        x = self.visual.conv1(images).flatten(2).transpose(1, 2)
        first = self.visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        return self.visual.ln_pre(torch.cat([first, x], dim=1) + positions)

    def _project(self, x: Tensor) -> Tensor:
        return x if self.visual.proj is None else x @ self.visual.proj


class ResNetDense(nn.Module):
    """Dense features of open_clip's ModifiedResNet.

    The trunk takes any size from 32 pixels a side (smaller images are zero-padded), and its pools round down:
    333x500 gives a 10x15 grid. As in the reference, the attention pool's position table is not used.
    """

    stride = 32

    def __init__(self, visual: ModifiedResNet, head: Head, keys: KeySource | None) -> None:
        super().__init__()
        self.visual = visual
        self._head = head
        self._keys = keys

    def forward(self, images: Tensor) -> Dense:
        """Dense features of normalised images.

        Args:
            images: float (B, 3, H, W).
        """
        x = self._trunk(images)
        pool, tokens = self.visual.attnpool, x.flatten(2).transpose(1, 2)
        features = self._head.resnet(pool, tokens).transpose(1, 2).unflatten(2, x.shape[-2:])
        return Dense(features, None if self._keys is None else pool.k_proj(tokens))

    def image_embedding(self, images: Tensor) -> Tensor:
        """CLIP's embedding (B, D) of whole images of any size; the pool's position table is resized."""
        pool = self.visual.attnpool
        x = self._trunk(images)
        native = pool.positional_embedding
        side = round((native.shape[0] - 1) ** 0.5)
        if x.shape[-2:] != (side, side):
            square = native[1:].unflatten(0, (side, side)).permute(2, 0, 1)[None]
            square = F.interpolate(square, size=x.shape[-2:], mode="bicubic", align_corners=False)
            native = torch.cat([native[:1], square[0].flatten(1).T])
        return _attention_pool(pool, x.flatten(2).transpose(1, 2), native)[:, 0]

    def _trunk(self, images: Tensor) -> Tensor:
        visual = self.visual
        right, below = max(0, self.stride - images.shape[-1]), max(0, self.stride - images.shape[-2])
        x = visual.stem(F.pad(images.to(visual.conv1.weight.dtype), (0, right, 0, below)).contiguous())
        return visual.layer4(visual.layer3(visual.layer2(visual.layer1(x))))


# --- heads --------------------------------------------------------------------------------------------------


def _plain_vit(block: Any, x: Tensor) -> Tensor:
    return block(x)[:, 1:]


def _plain_resnet(pool: AttentionPool2d, x: Tensor) -> Tensor:
    # The reference's baseline keeps the mean token in the attention and omits the positions.
    return _attention_pool(pool, x, None)[:, 1:]


def _value_vit(block: Any, x: Tensor) -> Tensor:
    patches = block.ln_1(x[:, 1:])
    return _after_mixing(block, _in_projection(block, patches, _VALUE))


def _value_resnet(pool: AttentionPool2d, x: Tensor) -> Tensor:
    return pool.c_proj(pool.v_proj(x))


def _maskclip_vit(block: Any, x: Tensor) -> Tensor:
    # From here on tokens do not interact, so the class token can be dropped.
    z = x[:, 1:] + block.ls_1(_value_vit(block, x))
    return z + block.ls_2(block.mlp(block.ln_2(z)))


def _keys_vit(block: Any, x: Tensor, source: KeySource) -> Tensor:
    """Keys (B, L, W_) of the patches in the last attention, raw or through the output projection."""
    key = _in_projection(block, block.ln_1(x[:, 1:]), _KEY)
    return _after_mixing(block, key) if source == "projected" else key


def _in_projection(block: Any, y: Tensor, part: int) -> Tensor:
    """Queries, keys or values (B, L, W_) of a block; rows are packed in the order q, k, v."""
    attention = block.attn
    width = attention.in_proj_weight.shape[1]
    rows = slice(part * width, (part + 1) * width)
    bias = None if attention.in_proj_bias is None else attention.in_proj_bias[rows]
    return F.linear(y, attention.in_proj_weight[rows], bias)


def _after_mixing(block: Any, x: Tensor) -> Tensor:
    """Map attention outputs (B, L, W_): output projection, plus the scaling and norms of custom blocks."""
    attention = block.attn
    head_scale = getattr(attention, "head_scale", None)
    if head_scale is not None:
        x = (x.unflatten(-1, (attention.num_heads, -1)) * head_scale.flatten()[:, None]).flatten(-2)
    if hasattr(attention, "ln_inner"):
        x = attention.ln_inner(x)
    x = attention.out_proj(x)
    return block.ln_attn(x) if hasattr(block, "ln_attn") else x


def _attention_pool(pool: AttentionPool2d, x: Tensor, positions: Tensor | None) -> Tensor:
    """All outputs (B, 1 + L, D) of the attention pool on (B, L, W_), the mean token's first."""
    x = torch.cat([x.mean(1, keepdim=True), x], dim=1)
    if positions is not None:
        x = x + positions.to(x.dtype)
    split = [
        proj(x).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
        for proj in (pool.q_proj, pool.k_proj, pool.v_proj)
    ]
    mixed = F.scaled_dot_product_attention(split[0], split[1], split[2])
    return pool.c_proj(mixed.transpose(1, 2).flatten(-2))


HEADS: dict[HeadName, Head] = {
    "maskclip": Head(_maskclip_vit, _value_resnet),
    "value": Head(_value_vit, _value_resnet),
    "plain": Head(_plain_vit, _plain_resnet),
}
"""Dense heads by name. ``maskclip`` (arXiv 2112.01071, §3.2) removes the mixing of tokens from the last
attention: each token keeps its own value, sent through the output projection. As in the reference code, a ViT
keeps the block's residual and MLP. ``value`` drops both, as in the paper's text and several later methods; on
a ResNet the two heads are the same. ``plain`` reads the tokens of the unmodified CLIP."""
