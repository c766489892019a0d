"""Load a CLIP of open_clip for dense labelling.

Shapes: B batch, P prompts, D embedding channels, H W pixels, h w grid, N = 1 + h*w tokens, W_ tower width.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from models.clip.dense import ResNetDense, TimmDense, VitDense, dense_encoder
from models.clip.towers.modules import TimmTower, TwoTowers, build, published_state
from models.clip.towers.tokens import tokenizer_of
from models.clip.weights import WeightSource, check_supported, find_weights, read_state
from models.errors import WrongUse

Towers = Literal["both", "visual", "text"]

_PROMPTS_AT_ONCE = 128
_EMBEDDINGS = (
    "class_embedding", "positional_embedding", "cls_emb", "cls_token", "reg_token", "pos_embed"
)  # fmt: skip
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "position_ids", "attn_mask", "logit_bias")


class Activations(NamedTuple):
    """Outputs of a ViT's residual blocks, before any final norm.

    Attributes:
        layers: one (B, N, W_) per requested block, class token first, in the tower's dtype.
        grid: (h, w); the tokens are row-major.
        size: (H, W) of the images before padding to whole patches.
    """

    layers: tuple[Tensor, ...]
    grid: tuple[int, int]
    size: tuple[int, int]


@dataclass(eq=False)
class Clip:
    """An image–text model in evaluation mode, without gradients.

    Attributes:
        model: open_clip's ``CLIP`` or ``CustomTextCLIP``, or a ``TwoTowers``; with ``towers="visual"`` only
            its ``visual`` exists, with ``towers="text"`` everything else.
    """

    source: WeightSource
    model: nn.Module
    device: torch.device
    dtype: torch.dtype
    towers: Towers

    @property
    def name(self) -> str:
        """The model name."""
        return self.source.name

    @property
    def pretrained(self) -> str | None:
        """The spec that chose the weights."""
        return self.source.pretrained

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights file in hex, or ``random:SEED:NAME``; read on first use."""
        return self.source.fingerprint

    @property
    def mean(self) -> tuple[float, float, float]:
        """CLIP's own image mean, RGB in [0, 1]."""
        return self.source.mean

    @property
    def std(self) -> tuple[float, float, float]:
        """CLIP's own image standard deviation, RGB in [0, 1]."""
        return self.source.std

    @property
    def visual(self) -> VisionTransformer | ModifiedResNet | TimmTower:
        """The visual tower itself, not a copy.

        Raises:
            MaskMillError: ``model_unsupported`` with ``towers="text"``.
        """
        if self.towers == "text":
            raise WrongUse(
                "model_unsupported",
                f"{self.name} was loaded without its visual tower, and images are to be read.",
                "Load it with towers='both' or 'visual'.",
            )
        return self.model.visual

    @property
    def embed_dim(self) -> int:
        """D, the width of the joint embedding."""
        return int(self.source.config["embed_dim"])

    @property
    def stride(self) -> int:
        """Pixels per cell of the dense grid: the patch size, or 32 for a ResNet."""
        return 32 if isinstance(self.visual, ModifiedResNet) else int(self.visual.patch_size[0])

    @cached_property
    def tokenizer(self) -> Callable[[list[str]], Tensor]:
        """open_clip's tokenizer for this model: P strings to int64 (P, context)."""
        if self.name == "toyclip":
            from models.clip import toy as toyclip

            return toyclip.tokenizer()
        if "tower" in self.source.config:
            return tokenizer_of(self.source.config, self.source.path)
        if ":" not in self.name and open_clip.get_model_config(self.name) is None:
            # Weights with their own configuration, such as CLIPSeg's, use OpenAI's vocabulary.
            return open_clip.SimpleTokenizer(context_length=self.source.config["text_cfg"]["context_length"])
        return open_clip.get_tokenizer(self.name)

    @cached_property
    def _tower(self) -> VitDense | ResNetDense | TimmDense:
        return dense_encoder(self.visual, head="plain")

    def activations(self, images: Tensor, layers: Sequence[int]) -> Activations:
        """Compute the outputs of residual blocks at any image size.

        Images are padded and the position table is resized as for dense features (``models.clip.dense``).
        Blocks behind the deepest requested one do not run.

        Args:
            images: normalised, float (B, 3, H, W).
            layers: 0-based block indices, increasing.

        Raises:
            MaskMillError: ``model_unsupported`` for a ResNet.
        """
        tower = self._tower
        if not isinstance(tower, VitDense):
            raise WrongUse(
                "model_unsupported",
                f"{self.name} is a ResNet and has no blocks of tokens.",
                "Use a ViT, such as ViT-B-16-quickgelu.",
            )
        whole = tower.whole_patches(images)
        grid = (whole.shape[-2] // tower.stride, whole.shape[-1] // tower.stride)
        x = tower.tokens(whole, tower.position_table(grid))
        taken = []
        for index, block in enumerate(tower.visual.transformer.resblocks[: max(layers) + 1]):
            x = block(x)
            if index in layers:
                taken.append(x)
        return Activations(tuple(taken), grid, (images.shape[-2], images.shape[-1]))

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed normalised images (B, 3, H, W) of any size: (B, D), not scaled to length 1."""
        return self._tower.image_embedding(images)

    @torch.inference_mode()
    def encode_text(self, prompts: Sequence[str], *, normalize: bool = True) -> Tensor:
        """Embed P prompts.

        Args:
            normalize: scale every row to length 1.

        Returns:
            fp32 (P, D) on this CLIP's device.

        Raises:
            MaskMillError: ``model_unsupported`` with ``towers="visual"``; ``prompt_invalid``.
        """
        if self.towers == "visual":
            raise WrongUse(
                "model_unsupported",
                f"{self.name} was loaded without its text tower, and prompts are to be embedded.",
                "Load it with towers='both' or 'text', or take the classifier from the cache.",
            )
        if not prompts:
            return torch.empty(0, self.embed_dim, device=self.device)
        unique = list(dict.fromkeys(prompts))
        tokens = self.tokenize(unique)
        # Sort by length: every batch is as long as its longest prompt.
        order = (tokens != 0).sum(1).argsort(stable=True)
        batches = tokens[order].split(_PROMPTS_AT_ONCE)
        embeddings = torch.cat([_encode_tokens(self.model, batch.to(self.device)) for batch in batches])
        embeddings = F.normalize(embeddings.float(), dim=-1) if normalize else embeddings.float()
        row = dict(zip([unique[i] for i in order.tolist()], range(len(unique)), strict=True))
        return embeddings[[row[prompt] for prompt in prompts]]

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Tokenize P prompts to int64 (P, context).

        Raises:
            MaskMillError: ``prompt_invalid``. open_clip would truncate silently, which changes the meaning.
        """
        tokens = self.tokenizer(list(prompts))
        encode = getattr(self.tokenizer, "encode", None)
        if encode is None:
            return tokens
        for row in (tokens[:, -1] != 0).nonzero().flatten().tolist():
            needed = len(encode(prompts[row])) + getattr(self.tokenizer, "special", 2)
            if needed > tokens.shape[1]:
                raise WrongUse(
                    "prompt_invalid",
                    f"The prompt {prompts[row]!r} has {needed} tokens; {self.name} reads {tokens.shape[1]}.",
                    "Shorten the class name or the template.",
                )
        return tokens


def _encode_tokens(model: Any, tokens: Tensor) -> Tensor:
    """``model.encode_text``, tokens (P, context) to (P, D), truncated to the longest prompt where possible.

    CLIP's text tower is causal and reads the end-of-text token, which has the highest id, so the padding
    behind it changes nothing. Other kinds of tower read the full context.
    """
    causal = isinstance(model, open_clip.CLIP) and model.attn_mask is not None
    if not causal or model.text_pool_type != "argmax":
        return model.encode_text(tokens)
    ends = tokens.argmax(1)
    length = int(ends.max()) + 1
    x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    x = model.ln_final(x[torch.arange(len(x), device=x.device), ends])
    projection = model.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def load_clip(
    model: str,
    pretrained: str | None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    towers: Towers = "both",
    cache_dir: str | None = None,
) -> Clip:
    """Load a CLIP whose visual tower has dense features.

    Args:
        model, pretrained, cache_dir: see ``models.clip.weights.find_weights``.
        dtype: float32, bfloat16, float16 or float64. Weights are converted; there is no autocast.
        towers: load only the ``visual`` or the ``text`` tower; the other takes no memory.

    Raises:
        MaskMillError: as ``models.clip.weights.find_weights`` and ``read_state``; ``weights_do_not_fit`` if
            the tensors are not those of the model.
    """
    return load_source(
        find_weights(model, pretrained, cache_dir=cache_dir), device=device, dtype=dtype, towers=towers
    )


def load_source(
    source: WeightSource,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    towers: Towers = "both",
    state: dict[str, Tensor] | None = None,
) -> Clip:
    """``load_clip`` for weights that have already been found or read.

    Args:
        source: from ``models.clip.weights.find_weights``.
        device, dtype, towers: see ``load_clip``.
        state: the tensors under open_clip's names, of both towers unless ``towers`` is ``visual``; None reads
            the file.
    """
    check_supported(source.name, source.config)
    skeleton: nn.Module = build(source) if "tower" in source.config else _build(source)
    if towers == "visual":
        _drop_text_tower(skeleton)
    if state is None and source.path is None:
        assert source.seed is not None, "a source has a file or a seed"
        if towers == "text":
            del skeleton.visual
        tensors = seeded_state(skeleton, source.seed)
    else:
        if state is not None:
            tensors = _fitting(skeleton, state, towers)
        elif isinstance(skeleton, TwoTowers):
            tensors = published_state(source, skeleton, towers)
        else:
            assert source.path is not None
            prefix = "visual." if towers == "visual" else ""
            tensors = _fitting(skeleton, read_state(source.path, prefix=prefix), towers)
        if towers == "text" and isinstance(skeleton, TwoTowers):
            del skeleton.visual  # its text tower is in a part, or a file, of its own
        elif towers == "text":
            # Weights of another model may have the same text tower, so the shapes of all are looked at.
            _assign(skeleton, {name: tensor.to("meta") for name, tensor in tensors.items()}, source)
            del skeleton.visual
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("visual.")}
    device = torch.device(device)
    loaded: dict[str, Tensor] = {}
    for name in list(tensors):
        # One at a time: a mapped file and its copy are then never both whole in memory.
        tensor = tensors.pop(name)
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
        if source.path is not None:
            # The file may change or vanish under a mapping; own the memory.
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        loaded[name] = tensor.to(device)
    _assign(skeleton, loaded, source)
    if towers != "visual":
        _restore_masks(skeleton, device, dtype)
    left = [name for name, t in (*skeleton.named_parameters(), *skeleton.named_buffers()) if t.is_meta]
    assert not left, f"never loaded: {left}"
    skeleton.to(device)
    skeleton.eval().requires_grad_(False)
    return Clip(source, skeleton, device, dtype, towers)


def _build(source: WeightSource) -> nn.Module:
    """The model on the meta device, which takes no memory and draws no random numbers."""
    config = {key: value for key, value in source.config.items() if key != "custom_text"}
    text = config["text_cfg"]
    foreign_text = "hf_model_name" in text
    if foreign_text:
        config["text_cfg"] = {**text, "hf_model_pretrained": False}
    custom = source.config.get("custom_text", False) or foreign_text
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    try:
        # Hugging Face text towers compute buffers when built, so they need real memory.
        with torch.device("cpu" if foreign_text else "meta"):
            return kind(**config)
    except Exception as error:
        remedy = "Check the configuration against open_clip's own model_configs."
        if foreign_text:
            remedy = (
                "Its text tower comes from transformers: pip install it, and let it fetch the settings once."
            )
        raise WrongUse(
            "model_unsupported",
            f"open_clip could not build {source.name}: {str(error).splitlines()[0]}.",
            remedy,
        ) from error


def _fitting(model: nn.Module, state: dict[str, Tensor], towers: Towers) -> dict[str, Tensor]:
    """The tensors under the model's names, without the other tower and without what is no weight."""
    if towers == "visual":
        state = {name: tensor for name, tensor in state.items() if name.startswith("visual.")}
    expected = model.state_dict()
    if any(name.startswith("text.") for name in expected) and "text_projection" in state:
        state = open_clip.model.convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in expected:
            state[name] = state[name].reshape(expected[name].shape)
    return {
        name: tensor
        for name, tensor in state.items()
        if name in expected or name.rsplit(".", 1)[-1] not in _NOT_WEIGHTS
    }


def _assign(model: nn.Module, state: dict[str, Tensor], source: WeightSource) -> None:
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        details = " ".join(str(error).split())[:400]
        raise WrongUse(
            "weights_do_not_fit",
            f"The tensors of {source.path} are not those of {source.name}: {details}",
            "Name the model the weights were made for; its image size may be part of it, as in ViT-L-14-336.",
        ) from error


def _restore_masks(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Compute the causal mask, a buffer that no file holds."""
    for module in (model, getattr(model, "text", None)):
        mask = getattr(module, "attn_mask", None)
        if isinstance(mask, Tensor) and mask.is_meta:
            assert module is not None
            module.attn_mask = torch.full(mask.shape, -math.inf, dtype=dtype, device=device).triu_(1)


def _drop_text_tower(model: nn.Module) -> None:
    for name in [name for name, _ in model.named_children() if name != "visual"]:
        delattr(model, name)
    for name in [name for name, _ in model.named_parameters(recurse=False)]:
        delattr(model, name)
    for name in [name for name, _ in model.named_buffers(recurse=False)]:
        delattr(model, name)


def seeded_state(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Random weights for tests and benchmarks, each tensor from its own generator.

    They depend only on the seed and the tensor's name, not on the loaded towers. Nothing stays zero or one
    (open_clip zeroes all biases and the last batch-norm weight of every residual branch), so that an error in
    any term shows.
    """
    state: dict[str, Tensor] = {}
    for name, like in model.state_dict().items():
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        leaf = name.rsplit(".", 1)[-1]
        if not like.is_floating_point():
            state[name] = torch.zeros(like.shape, dtype=like.dtype)
            continue
        # Uniform with variance 1: several times faster than normal, and benchmarks include the start-up.
        noise = torch.empty(like.shape).uniform_(-(3**0.5), 3**0.5, generator=generator)
        if leaf == "logit_scale":
            state[name] = torch.full(like.shape, math.log(100.0))
        elif leaf == "running_var":
            state[name] = 0.5 + torch.rand(like.shape, generator=generator)
        elif leaf in ("running_mean", "logit_bias"):
            state[name] = 0.1 * noise
        elif leaf.endswith("bias"):
            state[name] = 0.05 * noise
        elif leaf in _EMBEDDINGS or "token_embedding" in name:
            state[name] = noise.mul_(like.shape[-1] ** -0.5)
        elif like.ndim == 1:
            state[name] = 1.0 + 0.1 * noise
        elif like.ndim == 4:
            state[name] = noise.mul_((2.0 / math.prod(like.shape[1:])) ** 0.5)
        else:
            fan_in = like.shape[0] if leaf in ("proj", "text_projection") else like.shape[1]
            state[name] = noise.mul_(fan_in**-0.5)
    return state
