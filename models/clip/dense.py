"""Dense features from CLIP's visual tower, read by one of the heads in ``models.clip.heads``.

The heads share everything before the last block and the projection behind it. The computation runs on
open_clip's own modules and never changes a parameter.

Shapes: B batch, D embedding channels, H W pixels, h w grid, L = h*w, N = 1 + L tokens, W_ tower width, K key
channels.
"""

from __future__ import annotations

import copy
import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn

from models.catalogue import HEADS, check_resnet_head
from models.clip.heads.base import (
    KEY,
    USUAL,
    Head,
    HeadOptions,
    ResNetLayer,
    Spread,
    VitLayer,
    after_mixing,
    in_projection,
    load_head,
    on_grid,
)
from models.clip.heads.value import attention_pool
from models.clip.published import READINGS
from models.clip.towers.modules import TimmTower
from models.errors import WrongUse
from models.settings import KeySource, Positions, Profile

_TABLES_KEPT = 16  # position tables, one per grid; 2 MB each for a ViT-B/16 at 512x683 in bf16


class HelperView(Protocol):
    """A helper tower (``models.helper``), as an encoder sees it: with images normalised for CLIP."""

    @property
    def stride(self) -> int:
        """Pixels per cell of its grid."""
        ...

    def features(self, images: Tensor, kind: Literal["tokens", "values"]) -> Tensor:
        """Features (B, K, h, w) of images (B, 3, H, W), H and W multiples of the stride."""
        ...


class Dense(NamedTuple):
    """Output of a tower for a batch of images.

    Attributes:
        features: (B, D, h, w) in the joint embedding, not normalised, in the tower's dtype.
        keys: (B, L, K) of the last attention; None unless requested.
        whole: CLIP's unmodified embedding (B, D) of the images; None unless requested.
        early: tokens (B, W_, h, w) that an early block puts out; None unless requested.
        helper: features (B, K, h, w) of the helper, for heads that spread cosines with them; else None.
    """

    features: Tensor
    keys: Tensor | None
    whole: Tensor | None = None
    early: Tensor | None = None
    helper: Tensor | None = None


def dense_encoder(
    visual: nn.Module,
    *,
    head: str = "maskclip",
    profile: Profile = "weights",
    keys: KeySource | None = None,
    positions: Positions = "exact",
    options: HeadOptions = USUAL,
    whole: bool = False,
    early: int | None = None,
    helper: HelperView | None = None,
) -> VitDense | ResNetDense | TimmDense:
    """Wrap a visual tower to compute dense features at any image size.

    Args:
        visual: open_clip's ``VisionTransformer`` with a class token, its ``ModifiedResNet``, or a
            ``TimmTower``; shared, never changed.
        head: a name in ``models.catalogue.HEADS``.
        profile: ``weights`` runs the tower as it was trained. ``reference`` runs a ViT as the MaskCLIP code
            does: exact (erf) GELU and LayerNorm eps 1e-6, on copies of the modules that share every
            parameter. A ResNet has neither, so the profile makes no difference there.
        keys: also return the keys of the last attention, for key smoothing: ``projected`` through the output
            projection, as in the reference code, or ``raw``. A ResNet has only raw keys and returns those
            either way.
        positions: how a ViT's position table is resized; see ``VitDense.position_table``. A ResNet's is not
            used.
        options: settings of single heads.
        whole: also return the embedding of the whole image, which takes one block more.
        early: also return the output of this block, from 0, which is not the last; not for ResNets.
        helper: for heads that need one; the grid is then the helper's.

    Raises:
        MaskMillError: ``setting_invalid``, ``model_unsupported``.
    """
    if head not in HEADS:
        raise WrongUse(
            "setting_invalid", f"There is no dense head {head!r}.", f"Use one of {', '.join(HEADS)}."
        )
    if profile not in ("reference", "weights"):
        raise WrongUse("setting_invalid", f"There is no profile {profile!r}.", "Use reference or weights.")
    if keys is not None and not HEADS[head].keys:
        raise WrongUse(
            "setting_invalid",
            f"Key smoothing needs the keys of the last attention, which the head {head!r} does not give.",
            "Use the head maskclip, or set the key smoothing threshold to 0.",
        )
    if HEADS[head].helper and helper is None:
        raise WrongUse(
            "setting_invalid",
            f"The head {head} needs a helper tower, and none was given.",
            "Load one (models.helper.load_helper), or use another head.",
        )
    if isinstance(visual, TimmTower):
        return TimmDense(visual, _tower_head(head, visual.kind, bool(keys) or whole or early is not None))
    if HEADS[head].tower:
        raise WrongUse(
            "setting_invalid",
            f"The head {head} reads the last block of another tower than CLIP's.",
            "Use another head, or the model that it was made for.",
        )
    if isinstance(visual, ModifiedResNet):
        check_resnet_head(head)
        if early is not None:
            raise WrongUse(
                "setting_invalid",
                "A memory's keys are tokens of a block of a ViT, and a ResNet has none.",
                "Use a ViT, or leave memory out.",
            )
        return ResNetDense(visual, load_head(head), keys, options, whole)
    if isinstance(visual, VisionTransformer) and visual.attn_pool is None:
        tower = reference_view(visual) if profile == "reference" else visual
        helper = helper if HEADS[head].helper else None
        return VitDense(tower, load_head(head), keys, positions, options, whole, early, helper)
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
    h = ceil(H / patch), w = ceil(W / patch). With a helper they are padded to whole patches of both towers,
    so that both grids cover the same pixels, and the grid is the helper's, without what only the padding
    needed.
    """

    embedded: Callable[[Tensor], Tensor] | None = None

    def __init__(
        self,
        visual: VisionTransformer,
        head: Head,
        keys: KeySource | None,
        positions: Positions,
        options: HeadOptions,
        whole: bool = False,
        early: int | None = None,
        helper: HelperView | None = None,
    ) -> None:
        super().__init__()
        last = len(visual.transformer.resblocks) - 1
        if early is not None and not 0 <= early < last:
            raise WrongUse(
                "setting_invalid",
                f"There is no block {early} before the last of the {last + 1} blocks of this tower.",
                f"Use one from 0 to {last - 1}.",
            )
        self.visual = visual
        self._early = early
        self._head = head
        assert head.vit is not None, "checked by dense_encoder"
        self._read = head.vit
        self._layers = head.layers(len(visual.transformer.resblocks))
        self._keys = keys
        self._positions = positions
        self._options = options
        self._whole = whole
        self._helper = helper
        self._tables: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        self._tables_lock = threading.Lock()  # several threads may label images

    @property
    def patch(self) -> int:
        """Side of CLIP's patches in pixels."""
        return int(self.visual.patch_size[0])

    @property
    def stride(self) -> int:
        """Pixels per grid cell."""
        return self.patch if self._helper is None else self._helper.stride

    @property
    def spread(self) -> Spread | None:
        """How the head makes cosines of all windows agree, if it does."""
        return self._head.spread

    def forward(self, images: Tensor) -> Dense:
        """Dense features of normalised images.

        Args:
            images: float (B, 3, H, W).
        """
        helped = None
        if self._helper is not None:
            assert self._head.helper is not None, "checked by dense_encoder"
            both = math.lcm(self.patch, self._helper.stride)
            height, width = images.shape[-2:]
            images = F.pad(images, (0, -width % both, 0, -height % both))
            helped = self._helper.features(images, self._head.helper)
        x = self.whole_patches(images)
        table = self.position_table((x.shape[-2] // self.patch, x.shape[-1] // self.patch))
        if helped is None:
            return self.encode(x, table)
        return _cropped(self.encode(x, table, helped), -(-height // self.stride), -(-width // self.stride))

    def whole_patches(self, images: Tensor) -> Tensor:
        """Pad images to (B, 3, H', W') in the tower's dtype, H' and W' multiples of the patch."""
        right, below = -images.shape[-1] % self.patch, -images.shape[-2] % self.patch
        # One memory layout for all: for a slice of a batch, or an image decoded with channels last, the
        # convolution would pick another kernel, which rounds differently in bf16.
        padded = F.pad(images.to(self.visual.conv1.weight.dtype), (0, right, 0, below))
        return padded.contiguous()

    def encode(self, images: Tensor, positions: Tensor, helper: Tensor | None = None) -> Dense:
        """The arithmetic alone, for ``torch.compile``.

        Args:
            images: from ``whole_patches``.
            positions: (1 + L, W_), from ``position_table``.
            helper: the helper's features (B, K, h', w').
        """
        h, w = images.shape[-2] // self.patch, images.shape[-1] // self.patch
        blocks = list(self.visual.transformer.resblocks)
        x = self.tokens(images, positions)
        outputs = {}
        for index, block in enumerate(blocks[:-1]):
            x = block(x)
            if index in self._layers or index == self._early:
                outputs[index] = x
        earlier = tuple(outputs[index] for index in self._layers)
        layer = VitLayer(blocks[-1], x, (h, w), earlier, self._options, helper)
        features = self._project(self.visual.ln_post(self._read(layer)))
        keys = None if self._keys is None else _keys(layer, self._keys)
        whole = self.pooled(blocks[-1](x)) if self._whole else None
        first = None if self._early is None else on_grid(outputs[self._early][:, 1:], (h, w))
        if helper is None:
            return Dense(on_grid(features, (h, w)), keys, whole, first)
        grid = (helper.shape[-2], helper.shape[-1])
        if first is not None:
            first = _resized(first, grid)
        if self.spread is None:
            return Dense(on_grid(features, grid), keys, whole, first)
        return Dense(_resized(on_grid(features, (h, w)), grid), keys, whole, first, helper)

    def image_embedding(self, images: Tensor) -> Tensor:
        """CLIP's unmodified embedding (B, D) of whole images of any size.

        At the training size it equals open_clip's ``encode_image``.
        """
        x = self.whole_patches(images)
        x = self.tokens(x, self.position_table((x.shape[-2] // self.patch, x.shape[-1] // self.patch)))
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

        With positions ``offset`` a side of n cells is sampled as if the table were enlarged by (n + 0.1) over
        its own side, not n over it. This was DINO's way around rounding; MaskCLIP's successors took it over.
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
            how: dict[str, Any] = {"size": grid}
            if self._positions == "offset":
                own = self.visual.grid_size
                how = {"scale_factor": ((grid[0] + 0.1) / own[0], (grid[1] + 0.1) / own[1])}
            square = F.interpolate(square, **how, mode="bicubic", align_corners=False, antialias=False)
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
    spread: Spread | None = None
    embedded: Callable[[Tensor], Tensor] | None = None

    def __init__(
        self,
        visual: ModifiedResNet,
        head: Head,
        keys: KeySource | None,
        options: HeadOptions,
        whole: bool = False,
    ) -> None:
        super().__init__()
        assert head.resnet is not None, "checked by dense_encoder"
        self.visual = visual
        self._read = head.resnet
        self._keys = keys
        self._options = options
        self._whole = whole

    def forward(self, images: Tensor) -> Dense:
        """Dense features of normalised images.

        Args:
            images: float (B, 3, H, W).
        """
        x = self._trunk(images)
        pool, tokens = self.visual.attnpool, x.flatten(2).transpose(1, 2)
        grid = (x.shape[-2], x.shape[-1])
        read = self._read(ResNetLayer(pool, tokens, grid, self._options))
        features = read.transpose(1, 2).unflatten(2, grid)
        keys = None if self._keys is None else pool.k_proj(tokens)
        return Dense(features, keys, self._pooled(x) if self._whole else None)

    def image_embedding(self, images: Tensor) -> Tensor:
        """CLIP's embedding (B, D) of whole images of any size; the pool's position table is resized."""
        return self._pooled(self._trunk(images))

    def _pooled(self, x: Tensor) -> Tensor:
        """CLIP's embedding (B, D) from the trunk's output (B, W_, h, w)."""
        pool = self.visual.attnpool
        native = pool.positional_embedding
        side = round((native.shape[0] - 1) ** 0.5)
        if x.shape[-2:] != (side, side):
            square = native[1:].unflatten(0, (side, side)).permute(2, 0, 1)[None]
            square = F.interpolate(square, size=x.shape[-2:], mode="bicubic", align_corners=False)
            native = torch.cat([native[:1], square[0].flatten(1).T])
        return attention_pool(pool, x.flatten(2).transpose(1, 2), native)[:, 0]

    def _trunk(self, images: Tensor) -> Tensor:
        visual = self.visual
        right, below = max(0, self.stride - images.shape[-1]), max(0, self.stride - images.shape[-2])
        x = visual.stem(F.pad(images.to(visual.conv1.weight.dtype), (0, right, 0, below)).contiguous())
        return visual.layer4(visual.layer3(visual.layer2(visual.layer1(x))))


class TimmDense(nn.Module):
    """Dense features of a ``TimmTower``, whose class tokens and registers are left out.

    Normalised images are zero-padded right and below to whole patches.
    """

    spread: Spread | None = None

    def __init__(self, visual: TimmTower, head: Head) -> None:
        super().__init__()
        assert head.timm is not None, "checked by dense_encoder"
        self.visual = visual
        self._read = head.timm
        self._gather = head.gather

    @property
    def stride(self) -> int:
        """Pixels per grid cell."""
        return self.visual.patch_size[0]

    def forward(self, images: Tensor) -> Dense:
        """Patches (B, W_, h, w) of normalised images, behind the trunk's norm, not yet ``embedded``.

        Args:
            images: float (B, 3, H, W).
        """
        trunk, side = self.visual.trunk, self.stride
        images = images.to(next(trunk.parameters()).dtype)
        images = F.pad(images, (0, -images.shape[-1] % side, 0, -images.shape[-2] % side)).contiguous()
        x = trunk.norm(self._read(trunk.blocks[-1], self.visual.before_last(images)))
        grid = (images.shape[-2] // side, images.shape[-1] // side)
        return Dense(on_grid(x[:, trunk.num_prefix_tokens :], grid), None)

    def embedded(self, features: Tensor) -> Tensor:
        """Embeddings (B, D, h, w) of the patches (B, W_, h, w) of whole images."""
        if self._gather is not None:
            features = self._gather(features)
        patches = features.flatten(2).mT.to(next(self.visual.parameters()).dtype)
        return on_grid(self.visual.head(patches), (features.shape[-2], features.shape[-1]))

    def image_embedding(self, images: Tensor) -> Tensor:
        """Refused: what the authors read of whole images is not built here.

        Raises:
            MaskMillError: ``model_unsupported``.
        """
        raise WrongUse(
            "model_unsupported",
            "Of this tower only patches are read, not whole images.",
            "Use an open_clip model.",
        )


def _tower_head(name: str, kind: str, more: bool) -> Head:
    """The head of a ``TimmTower``, if it is one that was published for this kind of tower."""
    published, recipe = READINGS[kind]
    if name != published or more:
        raise WrongUse(
            "setting_invalid",
            f"Of this tower patches are read, with the head {published}: no keys, no class token, no earlier "
            "blocks.",
            f"Begin with --recipe {recipe}.",
        )
    return load_head(name)


def _resized(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, D, any, any) on another grid over the same pixels."""
    return x if x.shape[-2:] == grid else F.interpolate(x, grid, mode="bilinear", align_corners=False)


def _cropped(dense: Dense, h: int, w: int) -> Dense:
    """The first rows and columns of what lies on the grid."""
    early, helper = (None if x is None else x[..., :h, :w] for x in (dense.early, dense.helper))
    return dense._replace(features=dense.features[..., :h, :w], early=early, helper=helper)


def _keys(layer: VitLayer, source: KeySource) -> Tensor:
    """Keys (B, L, W_) of the patches in the last attention, raw or through the output projection."""
    key = in_projection(layer.block, layer.block.ln_1(layer.tokens[:, 1:]), KEY)
    return after_mixing(layer.block, key) if source == "projected" else key
