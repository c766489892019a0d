"""A helper: a self-supervised tower of timm, whose features say which patches belong together.

It runs beside a CLIP, sees the same images, and knows no words. Positions are resized as timm does it.

Shapes: B batch, H W pixels, h w the helper's grid, K its width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from models.clip.weights import read_state, sha256
from models.errors import WrongUse, did_you_mean
from models.hub import download, hub_file, in_hub_cache, same_cache

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from models.settings import MaskClipSettings

Kind = Literal["tokens", "values"]
"""What is read: the last tokens, behind the final norm, or the values of the last attention."""

_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class HelperSource:
    """A tower and the location of its weights.

    Attributes:
        name: timm's, with the tag of its weights if it has one, which also says how images are normalised.
        path: the weights file; None for random weights.
        seed: the seed of random weights, else None.
    """

    name: str
    path: Path | None
    seed: int | None

    @property
    def architecture(self) -> str:
        """The name without the tag."""
        return self.name.partition(".")[0]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights file in hex, or ``random:SEED:NAME``."""
        return f"random:{self.seed}:{self.name}" if self.path is None else sha256(self.path)


def find_helper(name: str, weights: str, *, cache_dir: str | None = None) -> HelperSource:
    """Find a helper's weights, downloading them if necessary; without importing timm if they are here.

    Args:
        name: timm's (``vit_base_patch16_224.dino``), with the tag of its weights, unless they are named.
        weights: a file, ``random:SEED``, or empty for those of the tag.
        cache_dir: the download cache; None for Hugging Face's default.

    Raises:
        MaskMillError: ``name_unknown``; ``weights_missing``, with the file to get and where to put it.
    """
    if weights.startswith("random:"):
        try:
            seed = int(weights.removeprefix("random:"))
        except ValueError:
            raise WrongUse(
                "name_unknown",
                f"The seed in helper_weights={weights!r} is not a whole number.",
                "Write random:SEED, as in random:0.",
            ) from None
        _check_name(name)
        return HelperSource(name, None, seed)
    if weights:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise WrongUse(
                "weights_missing",
                f"There is no weights file {weights}.",
                "Check the path, or leave helper_weights out to take those that timm publishes.",
            )
        _check_name(name)
        return HelperSource(name, path, None)
    repository = f"timm/{name}"
    for file in _FILES if "." in name else ():
        cached = in_hub_cache(repository, file, cache_dir)
        if cached:
            return HelperSource(name, cached, None)
    _check_name(name, weights_too=True)

    def fetch() -> str:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(repository, _FILES[0], cache_dir=cache_dir)

    use = (
        f"Copy it here, and add to the command:\n  --set helper_weights={_FILES[0]}\n{same_cache(cache_dir)}"
    )
    path = download(fetch, [hub_file(repository, _FILES[0])], f"the helper {name}", use)
    return HelperSource(name, path, None)


def _check_name(name: str, *, weights_too: bool = False) -> None:
    """Refuse what timm does not know: an architecture, or the tag of weights."""
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise WrongUse(
            "name_unknown",
            f"timm has no model named {architecture!r}.",
            f"{did_you_mean(architecture, timm.list_models('vit_*'))}Use a ViT, such as "
            "vit_base_patch16_224.dino.",
        )
    known = timm.list_pretrained(f"{architecture}.*")
    if name not in known and (tag or weights_too):
        raise WrongUse(
            "name_unknown",
            f"timm knows no weights {tag!r} of {architecture}."
            if tag
            else f"The name {architecture} does not say which weights.",
            f"Use one of {', '.join(known) or 'none'}; or name a file with helper_weights.",
        )


class Helper:
    """A tower of timm in evaluation mode, without gradients."""

    def __init__(self, source: HelperSource, tower: Any, device: torch.device, dtype: torch.dtype) -> None:
        import timm

        self.source = source
        self.tower = tower
        self.device = device
        self.dtype = dtype
        self.stride = int(tower.patch_embed.patch_size[0])
        published = timm.get_pretrained_cfg(source.name)
        self.mean: tuple[float, ...] = published.mean
        self.std: tuple[float, ...] = published.std

    def view(self, mean: Tensor, std: Tensor) -> _View:
        """This helper for images that were normalised as (x - mean) / std, with x in [0, 255].

        Args:
            mean, std: (3, 1, 1).
        """
        import torch

        own_mean, own_std = (
            255 * torch.tensor(own, dtype=mean.dtype)[:, None, None].to(mean.device)
            for own in (self.mean, self.std)
        )
        return _View(self, std / own_std, (mean - own_mean) / own_std)

    def features(self, images: Tensor, kind: Kind) -> Tensor:
        """Features (B, K, h, w), in the helper's dtype.

        Args:
            images: normalised for the helper, (B, 3, H, W), H and W multiples of the stride.
            kind: what to read.

        Raises:
            MaskMillError: ``model_unsupported`` for values of a tower that does not pack them.
        """
        import torch.nn.functional as F
        from timm.models import VisionTransformer

        tower, images = self.tower, images.to(self.dtype).contiguous()
        if kind == "tokens":
            (tokens,) = tower.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
            return tokens
        if not isinstance(tower, VisionTransformer):
            raise WrongUse(
                "model_unsupported",
                f"The values of {self.source.architecture}'s last attention cannot be read: it is a "
                f"{type(tower).__name__}.",
                "Use a plain ViT as helper, such as vit_base_patch16_224.dino.",
            )
        before, block = len(tower.blocks) - 2, tower.blocks[-1]
        (tokens,) = tower.forward_intermediates(
            images, indices=[before], stop_early=True, intermediates_only=True
        )
        packed = block.attn.qkv
        width = packed.weight.shape[0] // 3
        bias = None if packed.bias is None else packed.bias[2 * width :]
        values = F.linear(block.norm1(tokens.permute(0, 2, 3, 1)), packed.weight[2 * width :], bias)
        return values.permute(0, 3, 1, 2)


class _View(NamedTuple):
    """A ``models.clip.dense.HelperView``; see ``Helper.view``."""

    helper: Helper
    scale: Tensor
    shift: Tensor

    @property
    def stride(self) -> int:
        """See ``models.clip.dense.HelperView``."""
        return self.helper.stride

    def features(self, images: Tensor, kind: Kind) -> Tensor:
        """See ``models.clip.dense.HelperView``."""
        return self.helper.features(images.to(self.scale.dtype) * self.scale + self.shift, kind)


def helper_of(
    settings: MaskClipSettings,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    cache_dir: str | None = None,
) -> Helper | None:
    """Load the helper that settings name, if they name one.

    Args:
        dtype: None is float32.
        cache_dir: see ``find_helper``.

    Raises:
        MaskMillError: as ``find_helper`` and ``load_helper``.
    """
    if not settings.helper:
        return None
    source = find_helper(settings.helper, settings.helper_weights, cache_dir=cache_dir)
    return load_helper(source, device=device, dtype=dtype)


def load_helper(
    source: HelperSource, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Helper:
    """Load a helper whose weights have been found.

    Args:
        dtype: None is float32.

    Raises:
        MaskMillError: as ``models.clip.weights.read_state``; ``model_unsupported`` for a tower that does not
            take images of any size; ``weights_do_not_fit``.
    """
    import timm
    import torch

    from models.clip.loading import seeded_state

    try:
        tower = timm.create_model(source.architecture, pretrained=False, num_classes=0, dynamic_img_size=True)
    except TypeError as error:
        raise WrongUse(
            "model_unsupported",
            f"timm's {source.architecture} does not take images of any size.",
            "Use a ViT, such as vit_base_patch16_224.dino.",
        ) from error
    if source.path is None:
        assert source.seed is not None, "a source has a file or a seed"
        state = seeded_state(tower, source.seed)
    else:
        state = _converted(read_state(source.path), tower)
    try:
        tower.load_state_dict(state, strict=True)
    except RuntimeError as error:
        details = " ".join(str(error).split())[:400]
        raise WrongUse(
            "weights_do_not_fit",
            f"The tensors of {source.path} are not those of timm's {source.architecture}: {details}",
            "Name the model that the weights were made for.",
        ) from error
    device, dtype = torch.device(device), dtype or torch.float32
    tower.to(dtype).to(device).eval().requires_grad_(False)
    return Helper(source, tower, device, dtype)


def _converted(state: dict[str, Tensor], tower: Any) -> dict[str, Tensor]:
    """Tensors under timm's names, without a classifier; original files of DINO and DINOv2 are known too."""
    from timm.models import VisionTransformer
    from timm.models.vision_transformer import checkpoint_filter_fn

    if isinstance(tower, VisionTransformer):
        state = checkpoint_filter_fn(state, tower)
    own = tower.state_dict()
    return {name: t for name, t in state.items() if name in own or not name.startswith(("head.", "fc_norm."))}
