"""Hugging Face's layout of CLIP and decoder, read and written.

One table of names serves both directions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.pretrained import download_pretrained_from_hf
from torch import Tensor

from models.clip import toy as toyclip
from models.clip.loading import Clip, load_source
from models.clip.weights import OPENAI_MEAN, OPENAI_STD, WeightSource, read_state
from models.clipseg.decoder import IMAGE_SIZE, ClipSeg, ClipSegDecoder, tower_shape
from models.clipseg.weights.fitting import build_decoder, check_names, detached, refuse_existing
from models.errors import MaskMillError, WrongUse
from models.hub import download, hub_file, in_hub_cache, put_into, same_cache
from models.maskclip import IMAGENET_MEAN, IMAGENET_STD
from models.settings import ClipSegConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

# Hugging Face's defaults for missing entries.
_TEXT_DEFAULTS = {
    "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}  # fmt: skip
_VISION_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
_ACTIVATIONS = {"quick_gelu": True, "gelu": False}
_VISION_KEYS = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
_TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}


# --- names --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Name:
    """A tensor's name here and in Hugging Face's layout.

    Attributes:
        ours: open_clip's or the decoder's name.
        theirs: Hugging Face's; three names where they split the packed q, k, v.
        transposed: whether their matrix is the transpose of ours.
    """

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False


def _clip_names(vision_layers: int, text_layers: int) -> list[_Name]:
    text, vision = "clip.text_model", "clip.vision_model"
    names = [
        _Name("logit_scale", ("clip.logit_scale",)),
        _Name("token_embedding.weight", (f"{text}.embeddings.token_embedding.weight",)),
        _Name("positional_embedding", (f"{text}.embeddings.position_embedding.weight",)),
        _Name("text_projection", ("clip.text_projection.weight",), transposed=True),
        _Name("visual.class_embedding", (f"{vision}.embeddings.class_embedding",)),
        _Name("visual.conv1.weight", (f"{vision}.embeddings.patch_embedding.weight",)),
        _Name("visual.positional_embedding", (f"{vision}.embeddings.position_embedding.weight",)),
        _Name("visual.proj", ("clip.visual_projection.weight",), transposed=True),
        *_affine("ln_final", f"{text}.final_layer_norm"),
        *_affine("visual.ln_pre", f"{vision}.pre_layrnorm"),  # spelled so there
        *_affine("visual.ln_post", f"{vision}.post_layernorm"),
    ]
    towers = (("transformer", text, text_layers), ("visual.transformer", vision, vision_layers))
    inside = {
        "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    }  # fmt: skip
    for ours, theirs, layers in towers:
        for index in range(layers):
            here, there = f"{ours}.resblocks.{index}", f"{theirs}.encoder.layers.{index}"
            names += _packed(f"{here}.attn", f"{there}.self_attn")
            for a, b in inside.items():
                names += _affine(f"{here}.{a}", f"{there}.{b}")
    return names


def _decoder_names(layers: int, refined: bool) -> list[_Name]:
    names = [*_affine("film_mul", "decoder.film_mul"), *_affine("film_add", "decoder.film_add")]
    inside = {
        "norm1": "layer_norm1", "norm2": "layer_norm2", "self_attn.out_proj": "self_attn.out_proj",
        "linear1": "mlp.fc1", "linear2": "mlp.fc2",
    }  # fmt: skip
    for index in range(layers):
        here, there = f"blocks.{index}", f"decoder.layers.{index}"
        names += _affine(f"reduces.{index}", f"decoder.reduces.{index}")
        names += _packed(f"{here}.self_attn", f"{there}.self_attn")
        for a, b in inside.items():
            names += _affine(f"{here}.{a}", f"{there}.{b}")
    for part in (".0", ".2", ".4") if refined else ("",):
        names += _affine(f"trans_conv{part}", f"decoder.transposed_convolution{part}")
    return names


def _affine(ours: str, theirs: str) -> list[_Name]:
    return [_Name(f"{ours}.{leaf}", (f"{theirs}.{leaf}",)) for leaf in ("weight", "bias")]


def _packed(ours: str, theirs: str) -> list[_Name]:
    return [
        _Name(f"{ours}.in_proj_{leaf}", tuple(f"{theirs}.{part}_proj.{leaf}" for part in "qkv"))
        for leaf in ("weight", "bias")
    ]


def _to_theirs(names: Iterable[_Name], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name in names:
        tensor = ours[name.ours].T if name.transposed else ours[name.ours]
        parts = tensor.chunk(len(name.theirs)) if name.theirs[1:] else (tensor,)
        state.update(zip(name.theirs, parts, strict=True))
    return state


def _to_ours(names: Iterable[_Name], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name in names:
        parts = [theirs[part] for part in name.theirs]
        tensor = torch.cat(parts) if parts[1:] else parts[0]
        state[name.ours] = tensor.T if name.transposed else tensor
    return state


# --- reading ------------------------------------------------------------------------------------------------


def hugging_face_files(weights: str, cache: str | None) -> tuple[Path, Path]:
    folder = Path(weights).expanduser()
    if folder.is_dir():
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise WrongUse(
                    "weights_missing",
                    f"There is no {name} in {folder}.",
                    f"A folder in Hugging Face's layout has {CONFIG_FILE} and {WEIGHTS_FILE}. Convert other "
                    "weights there with transformers: save_pretrained.",
                )
        return folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", weights) or folder.suffix in (".pth", ".pt", ".safetensors"):
        raise WrongUse(
            "weights_missing",
            f"There is no file or folder {weights}.",
            "Check the path, or name a hub repository, such as CIDAS/clipseg-rd64-refined.",
        )
    return _from_hub(weights, CONFIG_FILE, cache), _from_hub(weights, WEIGHTS_FILE, cache)


def _from_hub(repository: str, name: str, cache: str | None) -> Path:
    def fetch() -> str:
        return str(download_pretrained_from_hf(repository, filename=name, cache_dir=cache))

    folder = repository.rpartition("/")[2]
    return in_hub_cache(repository, name, cache) or download(
        fetch,
        [hub_file(repository, file) for file in (CONFIG_FILE, WEIGHTS_FILE)],
        repository,
        f"Copy both here, into one folder:\n{put_into(folder, CONFIG_FILE)}{put_into(folder, WEIGHTS_FILE)}"
        f"Then name the folder (label and evaluate: --set pretrained={folder}):\n  --weights {folder}\n"
        f"{same_cache(cache)}To try it without a download, use the bundled toy: maskmill serve --model toy.",
    )


def read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _unsupported(path, f"it is not JSON: {error}") from error
    if not isinstance(settings, dict) or settings.get("model_type") != "clipseg":
        raise _unsupported(path, "its model_type is not clipseg")
    for part, defaults in (("text_config", _TEXT_DEFAULTS), ("vision_config", _VISION_DEFAULTS)):
        # Old files have a *_config_dict that overrides *_config.
        old = settings.get(f"{part}_dict")
        settings[part] = {**defaults, **(settings.get(part) or {}), **({**defaults, **old} if old else {})}
    return settings


def decoder_config(settings: dict[str, Any], path: Path) -> ClipSegConfig:
    patch, refined = settings["vision_config"]["patch_size"], _refined(settings)
    if refined and patch != 16:
        raise _unsupported(path, f"its refined head gives {(patch // 4) ** 2} pixels a token of {patch}")
    return ClipSegConfig(
        reduce_dim=settings.get("reduce_dim", 64),
        extract_layers=tuple(settings.get("extract_layers", (3, 6, 9))),
        refined=refined,
        heads=settings.get("decoder_num_attention_heads", 4),
        feedforward=settings.get("decoder_intermediate_size", 2048),
        cond_layer=settings.get("conditional_layer", 0),
    )


def _refined(settings: dict[str, Any]) -> bool:
    return bool(settings.get("use_complex_transposed_convolution", False))


def read_hugging_face_decoder(config: ClipSegConfig, settings: dict[str, Any], path: Path) -> ClipSegDecoder:
    names = _decoder_names(len(config.extract_layers), config.refined)
    theirs = read_state(path, prefix="decoder.")
    check_names(path, (part for name in names for part in name.theirs), theirs)
    vision = settings["vision_config"]
    return build_decoder(
        config,
        _to_ours(names, theirs),
        path,
        width=vision["hidden_size"],
        embed_dim=settings.get("projection_dim", 512),
        patch=vision["patch_size"],
    )


def read_clip(
    weights: str,
    settings: dict[str, Any],
    settings_path: Path,
    tensors_path: Path,
    device: str | torch.device,
    dtype: torch.dtype,
) -> Clip:
    config = _open_clip_config(settings, settings_path)
    names = _clip_names(config["vision_cfg"]["layers"], config["text_cfg"]["layers"])
    theirs = {
        name: tensor
        for name, tensor in read_state(tensors_path, prefix="clip.").items()
        if not name.endswith(".position_ids")  # a buffer of old versions: 0, 1, 2, ...
    }
    check_names(tensors_path, (part for name in names for part in name.theirs), theirs)
    name = _known_name(config)
    if name is None and config["text_cfg"]["vocab_size"] != 49408:
        raise _unsupported(settings_path, "its vocabulary is neither OpenAI's nor the bundled one")
    source = WeightSource(name or weights, weights, config, tensors_path, None, OPENAI_MEAN, OPENAI_STD)
    return load_source(source, device=device, dtype=dtype, state=_to_ours(names, theirs))


def _open_clip_config(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    text, vision = settings["text_config"], settings["vision_config"]
    acts = {text["hidden_act"], vision["hidden_act"]}
    if len(acts) > 1 or not acts <= set(_ACTIVATIONS):
        raise _unsupported(path, f"its activations are {', '.join(sorted(acts))}")
    if {text["layer_norm_eps"], vision["layer_norm_eps"]} != {1e-5}:
        raise _unsupported(path, "its layer norms do not add 1e-5")
    return {
        "embed_dim": settings.get("projection_dim", 512),
        "quick_gelu": _ACTIVATIONS[acts.pop()],
        "vision_cfg": {
            "image_size": vision["image_size"],
            "layers": vision["num_hidden_layers"],
            "width": vision["hidden_size"],
            "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
            "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
        },
    }


def _known_name(config: dict[str, Any]) -> str | None:
    """open_clip's name for an architecture, the shortest if there are several."""
    toyclip.register()
    wanted = _complete(config)
    known = [
        name for name in open_clip.list_models() if _complete(open_clip.get_model_config(name)) == wanted
    ]
    return min(known, key=lambda name: (len(name), name), default=None)


def _complete(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with open_clip's defaults filled in."""
    return {
        "quick_gelu": False,
        **config,
        "vision_cfg": {"head_width": 64, "mlp_ratio": 4.0, **config["vision_cfg"]},
        "text_cfg": {"mlp_ratio": 4.0, **config["text_cfg"]},
    }


def _unsupported(path: Path, reason: str) -> MaskMillError:
    return WrongUse(
        "model_unsupported",
        f"{path} is not the configuration of a CLIPSeg that can be read here: {reason}.",
        "Use a CLIPSeg as transformers saves it.",
    )


# --- writing ------------------------------------------------------------------------------------------------


def hugging_face_state(model: ClipSeg) -> dict[str, Tensor]:
    """CLIP and decoder under Hugging Face's names: the state dict of ``CLIPSegForImageSegmentation``.

    Raises:
        MaskMillError: ``model_unsupported``; see ``save_clipseg``.
    """
    decoder = _clipseg_decoder(model)
    config = _complete_or_refuse(model)
    names = _clip_names(config["vision_cfg"]["layers"], config["text_cfg"]["layers"])
    ours = model.clip.model.state_dict()
    left = sorted(set(ours) ^ {name.ours for name in names})
    if left:
        raise _not_representable(model, f"of tensors: {', '.join(left[:8])}")
    state = _to_theirs(names, ours)
    parts = _decoder_names(len(decoder.extract_layers), decoder.config.refined)
    return {**state, **_to_theirs(parts, decoder.state_dict())}


def hugging_face_config(model: ClipSeg) -> dict[str, Any]:
    """The ``config.json`` that belongs to ``hugging_face_state``.

    Raises:
        MaskMillError: ``model_unsupported``; see ``save_clipseg``.
    """
    config, decoder = _complete_or_refuse(model), _clipseg_decoder(model).config
    vision, text = config["vision_cfg"], config["text_cfg"]
    act = "quick_gelu" if config["quick_gelu"] else "gelu"
    dtype = str(model.clip.dtype).removeprefix("torch.")
    return {
        "architectures": ["CLIPSegForImageSegmentation"],
        "model_type": "clipseg",
        "dtype": dtype,
        "projection_dim": config["embed_dim"],
        "extract_layers": list(decoder.extract_layers),
        "reduce_dim": decoder.reduce_dim,
        "decoder_num_attention_heads": decoder.heads,
        "decoder_intermediate_size": decoder.feedforward,
        "conditional_layer": decoder.cond_layer,
        "use_complex_transposed_convolution": decoder.refined,
        "text_config": {
            "model_type": "clipseg_text_model",
            "dtype": dtype,
            "vocab_size": text["vocab_size"],
            "hidden_size": text["width"],
            "intermediate_size": round(text["width"] * text["mlp_ratio"]),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "hidden_act": act,
            # the last two ids in open_clip's vocabulary
            "bos_token_id": text["vocab_size"] - 2,
            "eos_token_id": text["vocab_size"] - 1,
            "pad_token_id": text["vocab_size"] - 1,
        },
        "vision_config": {
            "model_type": "clipseg_vision_model",
            "dtype": dtype,
            "hidden_size": vision["width"],
            "intermediate_size": round(vision["width"] * vision["mlp_ratio"]),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision["head_width"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "hidden_act": act,
        },
    }


def save_clipseg(model: ClipSeg, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write CLIP, decoder, tokenizer and image processor for ``transformers``.

    ``CLIPSegForImageSegmentation.from_pretrained``, ``CLIPSegProcessor.from_pretrained`` and
    ``load_clipseg`` read the folder. Hugging Face's decoder has no dropout, so that setting is lost: a model
    read back has the paper's 0.1.

    Args:
        model: needs both towers.
        folder: created if necessary.
        overwrite: replace existing files.

    Raises:
        MaskMillError: ``output_exists``; ``model_unsupported`` for what Hugging Face's class cannot
            represent: towers unlike CLIP's, or a refined head for a patch other than 16.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    state, config = hugging_face_state(model), hugging_face_config(model)
    texts = {
        "preprocessor_config.json": _preprocessor(),
        **_tokenizer_files(model.clip),
        CONFIG_FILE: _json(config),
    }
    refuse_existing([folder / name for name in (WEIGHTS_FILE, *texts)], overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(detached(state), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    for name, text in texts.items():  # config.json last: it marks the folder as complete
        (folder / name).write_text(text, encoding="utf-8")


def _complete_or_refuse(model: ClipSeg) -> dict[str, Any]:
    decoder, config = _clipseg_decoder(model), model.clip.source.config
    if model.clip.towers != "both":
        raise _not_representable(model, "without a text tower")
    tower_shape(model.clip)
    extra = {
        *(set(config) - {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}),
        *(set(config["vision_cfg"]) - _VISION_KEYS),
        *(set(config["text_cfg"]) - _TEXT_KEYS),
    }
    if extra:
        raise _not_representable(model, f"with {', '.join(sorted(extra))}")
    if decoder.config.refined and decoder.patch != 16:
        raise _not_representable(model, f"with a refined head for patches of {decoder.patch}")
    return _complete(config)


def _not_representable(model: ClipSeg, reason: str) -> MaskMillError:
    return WrongUse(
        "model_unsupported",
        f"Hugging Face's CLIPSeg has no place for {model.clip.name} {reason}.",
        "Write the decoder alone with save_decoder; load_clipseg reads it with the same CLIP.",
    )


def _clipseg_decoder(model: ClipSeg) -> ClipSegDecoder:
    if type(model.decoder) is not ClipSegDecoder:
        raise WrongUse(
            "model_unsupported",
            f"Hugging Face has no class for a {type(model.decoder).__name__}; it has CLIPSeg's decoder.",
            "Write it with save_decoder; load_baseline reads it.",
        )
    return model.decoder


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _preprocessor() -> str:
    return _json(
        {
            "image_processor_type": "ViTImageProcessor",
            "processor_class": "CLIPSegProcessor",
            "do_resize": True,
            "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            "resample": 2,  # bilinear
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(IMAGENET_MEAN),
            "image_std": list(IMAGENET_STD),
        }
    )


def _tokenizer_files(clip: Clip) -> dict[str, str]:
    """The byte-pair vocabulary as ``transformers`` names its files; empty for other kinds of tokenizer."""
    tokenizer = clip.tokenizer
    if not isinstance(tokenizer, open_clip.SimpleTokenizer):
        return {}
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {special.get(word, word): index for word, index in tokenizer.encoder.items()}
    merges = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.bpe_ranks)]
    end = "<|endoftext|>"
    words = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": end}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "processor_class": "CLIPSegProcessor",
        "model_max_length": tokenizer.context_length,
        "do_lower_case": True,
        **words,
    }
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False) + "\n",
        "merges.txt": "\n".join(merges) + "\n",
        "special_tokens_map.json": _json(words),
        "tokenizer_config.json": _json(settings),
    }
