"""Towers of C-RADIO and TIPSv2 from timm's, open_clip's and torch's modules, and their published weights.

Shapes: B batch, P prompts, T tokens of a prompt, D embedding channels, W_ tower width, N = prefix + L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import open_clip
import timm
import torch
from timm.models import naflexvit, vision_transformer
from torch import Tensor, nn

from models.clip.weights import WeightSource, read_state, siglip2_weights, stored_shapes
from models.errors import WrongUse

_NONE = {"image_size": 8, "layers": 0, "width": 8, "head_width": 8, "patch_size": 8}
"""An image tower of open_clip that is thrown away: the text tower beside it is wanted."""
_SIGLIP2_HEADS = ("_heads.siglip2-g.", "_heads.siglip2.")
_TRUNK = "base_model."
_TIPS_TEXT = {"attn.": "self_attn.", "mlp.c_fc.": "linear1.", "mlp.c_proj.": "linear2.", "ln_": "norm"}


class TimmTower(nn.Module):
    """A ViT of timm, with registers, and what leads from its patches to the words.

    Attributes:
        trunk: timm's.
        head: patches (…, W_) to embeddings (…, D).
        kind: ``radio`` or ``tips``.
        patch_size: sides of a patch in pixels.
    """

    def __init__(self, trunk: Any, head: nn.Module, kind: str, patch: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.kind = kind
        self.patch_size = (patch, patch)

    def before_last(self, images: Tensor) -> Tensor:
        """Input (B, N, W_) of the last block, class tokens and registers first.

        Args:
            images: normalised (B, 3, H, W), H and W multiples of the patch.
        """
        (both,) = self.trunk.forward_intermediates(
            images,
            indices=[len(self.trunk.blocks) - 2],
            return_prefix_tokens=True,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        patches, prefix = both
        return torch.cat([prefix, patches], 1)


class RadioHead(nn.Module):
    """C-RADIO's head for a teacher's summary: a linear layer, residual ones, and a last."""

    def __init__(self, width: int, hidden: int, inner: int, embed_dim: int) -> None:
        super().__init__()

        def layer(out: int) -> nn.Sequential:
            return nn.Sequential(nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, out))

        self.fc1 = nn.Linear(width, hidden)
        self.blocks = nn.ModuleList(layer(hidden) for _ in range(inner))
        self.final = layer(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(…, W_) to (…, D)."""
        x = self.fc1(x)
        for block in self.blocks:
            x = x + block(x)
        embedded: Tensor = self.final(x)
        return embedded


class TipsText(nn.Module):
    """TIPS's text tower (arXiv 2410.16512): pre-norm blocks with ReLU, sinusoids, the mean token.

    Token 0 is padding: it is no key, and not in the mean.
    """

    def __init__(self, width: int, heads: int, layers: int, mlp: int, vocab_size: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, mlp, dropout=0.0, activation="relu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.ln_final = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens int64 (P, T) to (P, W_)."""
        padding = tokens == 0
        length = max(1, int((~padding).sum(1).max()))
        tokens, padding = tokens[:, :length], padding[:, :length]
        x = self.token_embedding(tokens)
        x = x * x.shape[-1] ** 0.5 + sinusoids(length, x)
        block: Any
        for block in self.blocks:
            y = block.norm1(x)
            # Not the whole layer at once, whose fused kernel in inference drops the padding's columns.
            x = x + block.self_attn(y, y, y, key_padding_mask=padding, need_weights=False)[0]
            x = x + block.linear2(block.linear1(block.norm2(x)).relu())
        kept = (~padding).to(x.dtype)[..., None]
        return (self.ln_final(x) * kept).sum(1) / kept.sum(1)


def sinusoids(length: int, like: Tensor) -> Tensor:
    """Positions (T, W_): sines, then cosines, of wave lengths from 2π to 20,000π, as ``like``."""
    count = like.shape[-1] // 2
    exact = torch.float64 if like.dtype == torch.float64 else torch.float32
    steps = torch.arange(count, dtype=exact, device=like.device)
    rates = (-math.log(10_000.0) / max(count - 1, 1) * steps).exp()
    angles = torch.arange(length, dtype=exact, device=like.device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1).to(like.dtype)


class TwoTowers(nn.Module):
    """An image and a text tower."""

    def __init__(self, visual: TimmTower, text: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        self.text = text

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens int64 (P, T) to (P, D)."""
        embeddings: Tensor = self.text(tokens)
        return embeddings


def build(source: WeightSource) -> TwoTowers:
    """The model on the meta device.

    Raises:
        MaskMillError: ``model_unsupported`` if timm is older than the trunk; ``weights_do_not_fit`` if the
            file has no SigLIP2 head, or one for other words.
    """
    config, vision = source.config, source.config["vision_cfg"]
    if not timm.is_model(vision["trunk"]):
        raise WrongUse(
            "model_unsupported",
            f"timm {timm.__version__} has no {vision['trunk']}, which is the image tower of {source.name}.",
            "Update it: pip install -U timm.",
        )
    radio = config["tower"] == "radio"
    options = vision["options"] if radio else {"dynamic_img_size": True, **vision["options"]}
    text_cfg = config["text_cfg"]
    with torch.device("meta"):
        trunk = timm.create_model(vision["trunk"], pretrained=False, num_classes=0, **options)
        if radio:
            hidden, inner = (
                vision["head"] if source.path is None else _head_sizes(source.path, config["embed_dim"])
            )
            head: nn.Module = RadioHead(trunk.embed_dim, hidden, inner, config["embed_dim"])
            text = open_clip.CustomTextCLIP(config["embed_dim"], _NONE, text_cfg).text
        else:
            head = nn.Identity()
            text = TipsText(*(text_cfg[name] for name in ("width", "heads", "layers", "mlp", "vocab_size")))
    return TwoTowers(TimmTower(trunk, head, config["tower"], vision["patch_size"]), text)


def published_state(
    source: WeightSource, model: TwoTowers, towers: Literal["both", "visual", "text"]
) -> dict[str, Tensor]:
    """The tensors of published files under the names of ``TwoTowers``, of the towers that are wanted.

    Raises:
        MaskMillError: as ``models.clip.weights.read_state`` and ``siglip2_weights``; ``weights_do_not_fit``.
    """
    assert source.path is not None, "random weights are in no file"
    state: dict[str, Tensor] = {}
    trunk = model.visual.trunk
    if source.config["tower"] == "radio":
        if towers != "text":
            stored = read_state(source.path)
            # timm knows them under the names that NVIDIA's code for transformers gives them.
            theirs = {
                f"radio_model.model.{name.removeprefix(_TRUNK)}": tensor
                for name, tensor in stored.items()
                if name.startswith(_TRUNK)
            }
            state |= _named("visual.trunk.", naflexvit.checkpoint_filter_fn(theirs, trunk))
            prefix = _head_prefix(stored)
            state |= _named("visual.head.", _without(prefix, stored))
        if towers != "visual":
            state |= read_state(siglip2_weights(), prefix="text.")
        return state
    if towers != "text":
        stored = read_state(source.path, prefix="vision_encoder.")
        own = vision_transformer.checkpoint_filter_fn(stored, trunk)
        state |= _named("visual.trunk.", own)
    if towers != "visual":
        for name, tensor in _without("text_encoder.", read_state(source.path)).items():
            if name != "temperature":
                state[f"text.{_tips_name(name)}"] = tensor
    return state


def _tips_name(name: str) -> str:
    """A tensor of TIPS's text tower under torch's name."""
    name = name.replace("transformer.resblocks.", "blocks.")
    if name.startswith("blocks."):
        for theirs, ours in _TIPS_TEXT.items():
            name = name.replace(f".{theirs}", f".{ours}")
    return name


def _named(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def _without(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def _head_prefix(names: Iterable[str]) -> str:
    """How the names of the SigLIP2 head begin."""
    names = list(names)
    for prefix in _SIGLIP2_HEADS:
        if any(name.startswith(prefix) for name in names):
            return prefix
    found = sorted({name.split(".")[1] for name in names if name.startswith("_heads.")})
    raise WrongUse(
        "weights_do_not_fit",
        "The file has no head for SigLIP2's words"
        + (f"; its heads: {', '.join(found)}." if found else ", nor any other."),
        "Convert NVIDIA's checkpoint whole, its heads by name: docs/heads.md shows how.",
    )


def _head_sizes(path: Path, embed_dim: int) -> tuple[int, int]:
    """Hidden width and number of inner layers of the SigLIP2 head in a file."""
    shapes = stored_shapes(path)
    prefix = _head_prefix(shapes)
    head = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    name = prefix.removesuffix(".")
    if "final.2.weight" not in head or "fc1.weight" not in head:
        raise WrongUse(
            "weights_do_not_fit",
            f"The head {name} is of another make: it has {', '.join(sorted(head)[:4])}.",
            "Heads of C-RADIO v3 and v4 are read.",
        )
    width = head["final.2.weight"][0]
    if width != embed_dim:
        raise WrongUse(
            "weights_do_not_fit",
            f"The head {name} leads to {width} channels, and SigLIP2-g, the teacher whose words open_clip "
            f"has, to {embed_dim}.",
            "Use a C-RADIOv4, whose head siglip2-g is that.",
        )
    inner = {each.split(".")[1] for each in head if each.startswith("blocks.")}
    return head["fc1.weight"][0], len(inner)
