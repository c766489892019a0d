"""CLIPSeg's weights: the authors' files, Hugging Face's layout, and files of this project.

The authors' files (``rd64-uni.pth``, ``rd16-uni.pth``, ``rd64-uni-refined.pth``) and this project's decoder
files hold the decoder; a CLIP is given to them. Hugging Face's layout (a folder or a hub repository with
``config.json`` and ``model.safetensors``) holds CLIP and decoder, and is read and written here. One table of
names serves both directions, so what is missing or unexpected is known by name, and always an error: a
refined checkpoint that is read into the plain head otherwise keeps a random head in silence.
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
from models.clipseg.baselines import ClipDeconvConfig, ViTSegConfig, build_clip_deconv, build_vitseg
from models.clipseg.decoder import IMAGE_SIZE, ClipSeg, ClipSegDecoder, tower_shape
from models.errors import MaskMillError, WrongUse
from models.hub import download, hub_cache_folder, in_hub_cache
from models.maskclip import IMAGENET_MEAN, IMAGENET_STD
from models.settings import ClipSegConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_METADATA = "clipseg"  # of a decoder file: the settings, which tensors do not tell all of

# What Hugging Face takes where a configuration is silent.
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


def load_clipseg(
    weights: str | Path,
    *,
    clip: Clip | None = None,
    extract_layers: tuple[int, ...] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    cache_dir: str | None = None,
) -> ClipSeg:
    """Load a CLIPSeg.

    Args:
        weights: the authors' ``.pth``, a decoder file of ``save_decoder``, a folder in Hugging Face's layout,
            or a hub name (``CIDAS/clipseg-rd64-refined``).
        clip: the CLIP beneath the decoder; needed with a file that holds a decoder only. With Hugging Face's
            layout it takes the place of the CLIP in there, which is then not read.
        extract_layers: read these blocks; None takes what the weights say, and for the authors' files, which
            do not say, (3, 6, 9) as everybody runs them. The paper has (3, 7, 9).
        device: of what is read here. A given ``clip`` stays where it is, and the decoder joins it.
        dtype: of what is read here.
        cache_dir: where the hub client keeps downloads; None is its own choice.

    Returns:
        In evaluation mode.

    Raises:
        MaskMillError: ``weights_missing``, also for a decoder without a CLIP; ``model_damaged``;
            ``weights_do_not_fit`` with the names of missing and unexpected tensors, or if CLIP and decoder
            are of different kinds; ``model_unsupported`` for a configuration that open_clip cannot run;
            ``weights_differ`` if a file of ``save_decoder`` was trained on other weights of CLIP.
    """
    path = Path(weights).expanduser()
    if path.is_file():
        if clip is None:
            raise WrongUse(
                "weights_missing",
                f"{path} holds a decoder without the CLIP beneath it.",
                "Pass clip=load_clip('ViT-B-16-quickgelu', 'openai'), or the CLIP it was trained on.",
            )
        decoder = read_decoder(path, extract_layers=extract_layers)
    else:
        settings_path, tensors_path = _hugging_face_files(str(weights), cache_dir)
        settings = _read_settings(settings_path)
        config = _decoder_config(settings, settings_path)
        if clip is None:
            clip = _read_clip(str(weights), settings, settings_path, tensors_path, device, dtype)
        decoder = _decoder_from_hugging_face(config, settings, tensors_path)
        if extract_layers is not None:
            decoder = _with_layers(decoder, extract_layers)
    model = ClipSeg(clip, decoder.cast(dtype).eval())
    if path.is_file():
        _check_clip(path, clip)
    return model


# --- the decoder alone --------------------------------------------------------------------------------------


def read_decoder(path: Path, *, extract_layers: tuple[int, ...] | None = None) -> ClipSegDecoder:
    """The decoder in a file of the authors or of ``save_decoder``, in the types it is stored in.

    Width, number of blocks and kind of head are read from the tensors. ``reduce.*``, a layer that training
    kept and CLIPSeg never uses, may be there.

    Args:
        path: ``.pth`` (read without running code) or ``.safetensors``.
        extract_layers: as ``load_clipseg``.

    Raises:
        MaskMillError: ``model_damaged``, ``weights_do_not_fit``.
    """
    state = {name: tensor for name, tensor in read_state(path).items() if not name.startswith("reduce.")}
    needed = ("film_mul.weight", "reduces.0.weight", "blocks.0.linear1.weight")
    if any(name not in state for name in needed):
        raise _does_not_fit(path, [name for name in needed if name not in state], [])
    depth = len({name.split(".")[1] for name in state if name.startswith("reduces.")})
    told = _metadata(path)
    layers = extract_layers or told.get("extract_layers") or ((3, 6, 9) if depth == 3 else None)
    if layers is None or len(layers) != depth:
        raise WrongUse(
            "setting_invalid",
            f"{path} has {depth} decoder blocks, and extract_layers is {layers}.",
            f"Name the {depth} blocks of the tower that it was trained on as extract_layers.",
        )
    refined = "trans_conv.0.weight" in state
    config = ClipSegConfig(
        reduce_dim=state["film_mul.weight"].shape[0],
        extract_layers=tuple(layers),
        refined=refined,
        heads=told.get("heads", 4),  # no tensor tells; all released decoders have 4
        feedforward=state["blocks.0.linear1.weight"].shape[0],
        cond_layer=told.get("cond_layer", 0),
        dropout=told.get("dropout", 0.1),
    )
    kernels = ["trans_conv.2.weight", "trans_conv.4.weight"] if refined else ["trans_conv.weight"]
    if any(name not in state for name in kernels):
        raise _does_not_fit(path, [name for name in kernels if name not in state], [])
    patch = 1
    for name in kernels:
        patch *= state[name].shape[-1]
    return _decoder(
        config,
        state,
        path,
        width=state["reduces.0.weight"].shape[1],
        embed_dim=state["film_mul.weight"].shape[1],
        patch=patch,
    )


def save_decoder(model: ClipSeg, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a decoder with its settings.

    ``load_clipseg`` reads a CLIPSeg's, given the CLIP, and ``load_baseline`` a baseline's.

    Args:
        model: only its decoder is written, under the authors' names; with ViTSeg's goes the random map.
        path: ``.safetensors``.
        overwrite: replace a file that is there.

    Raises:
        MaskMillError: ``output_exists``.
    """
    from safetensors.torch import save_file

    path = Path(path)
    _refuse_existing([path], overwrite)
    decoder = model.decoder
    told = {
        **decoder.config.model_dump(),
        "kind": type(decoder).__name__,
        "clip": model.clip.name,
        "clip_fingerprint": model.clip.fingerprint,
    }
    save_file(_plain(decoder.state_dict()), path, metadata={_METADATA: json.dumps(told)})


def load_baseline(path: str | Path, clip: Clip, *, tower: str = "pretrained") -> ClipSeg:
    """A CLIP-Deconv or ViTSeg from a file of ``save_decoder``.

    Args:
        path: ``.safetensors``.
        clip: the CLIP it was trained on.
        tower: weights of ViTSeg's image tower, as ``models.clipseg.baselines.build_vitseg`` takes them.

    Returns:
        In evaluation mode.

    Raises:
        MaskMillError: ``weights_missing``, ``model_damaged``; ``weights_do_not_fit`` if the file holds
            no baseline, or other tensors than its settings ask for; ``weights_do_not_fit``;
            ``weights_differ``.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise WrongUse("weights_missing", f"There is no file {path}.", "Check the path.")
    state = read_state(path)
    told = _metadata(path)
    _check_clip(path, clip)
    kind = told.get("kind")
    if kind == "ClipDeconvDecoder":
        model = build_clip_deconv(clip, ClipDeconvConfig(**_settings_of(ClipDeconvConfig, told)))
    elif kind == "ViTSegDecoder":
        model = build_vitseg(clip, ViTSegConfig(**_settings_of(ViTSegConfig, told)), weights=tower)
    else:
        raise WrongUse(
            "weights_do_not_fit",
            f"{path} is not a baseline that save_decoder wrote.",
            "Read a CLIPSeg with load_clipseg.",
        )
    expected = model.decoder.state_dict()
    _check_names(path, expected, state)
    _check_shapes(path, expected, state)
    model.decoder.load_state_dict(state)
    return model


def _check_clip(path: Path, clip: Clip) -> None:
    """A decoder over another CLIP of the same shape gives wrong masks without a word."""
    told = _metadata(path)
    trained_on = told.get("clip_fingerprint")
    # Seeded weights are told apart by their seed; the same model may go by several names.
    same = [
        part.split(":")[:2] if part.startswith("random:") else part
        for part in (trained_on or "", clip.fingerprint)
    ]
    if trained_on is not None and same[0] != same[1]:
        raise WrongUse(
            "weights_differ",
            f"{path} was trained on other weights of CLIP ({told.get('clip')}, {trained_on[:20]}) than those "
            f"of {clip.name} ({clip.fingerprint[:20]}).",
            "Load the CLIP it was trained on.",
        )


def _settings_of(config: type[ClipDeconvConfig | ViTSegConfig], told: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in told.items() if name in config.model_fields}


def _decoder(
    config: ClipSegConfig, state: Mapping[str, Tensor], where: Path, *, width: int, embed_dim: int, patch: int
) -> ClipSegDecoder:
    with torch.device("meta"):
        decoder = ClipSegDecoder(config, width=width, embed_dim=embed_dim, patch=patch)
    expected = decoder.state_dict()
    _check_names(where, expected, state)
    _check_shapes(where, expected, state)
    # The file may change or vanish under a mapping; own the memory.
    decoder.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return decoder.requires_grad_(True)


def _with_layers(decoder: ClipSegDecoder, layers: tuple[int, ...]) -> ClipSegDecoder:
    if len(layers) != len(decoder.extract_layers):
        raise WrongUse(
            "setting_invalid",
            f"The weights have {len(decoder.extract_layers)} decoder blocks, and extract_layers is {layers}.",
            f"Name {len(decoder.extract_layers)} blocks of the tower.",
        )
    decoder.config = decoder.config.replace(extract_layers=layers)
    decoder.extract_layers = decoder.config.extract_layers
    return decoder


def _metadata(path: Path) -> dict[str, Any]:
    if path.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(_METADATA)
    return {} if text is None else json.loads(text)


def _clipseg_decoder(model: ClipSeg) -> ClipSegDecoder:
    if type(model.decoder) is not ClipSegDecoder:
        raise WrongUse(
            "model_unsupported",
            f"Hugging Face has no class for a {type(model.decoder).__name__}; it has CLIPSeg's decoder.",
            "Write it with save_decoder; load_baseline reads it.",
        )
    return model.decoder


# --- names --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Name:
    """A tensor's name here and in Hugging Face's layout.

    Attributes:
        ours: open_clip's or the decoder's.
        theirs: Hugging Face's; three where the packed q, k, v are apart there.
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


def _check_names(where: Path, expected: Iterable[str], found: Iterable[str]) -> None:
    expected, found = set(expected), set(found)
    if expected != found:
        raise _does_not_fit(where, sorted(expected - found), sorted(found - expected))


def _check_shapes(where: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    wrong = [name for name, like in expected.items() if like.shape != found[name].shape]
    if wrong:
        raise WrongUse(
            "weights_do_not_fit",
            f"Tensors in {where} have other shapes than this decoder: "
            + ", ".join(f"{n} {tuple(found[n].shape)}, not {tuple(expected[n].shape)}" for n in wrong[:4])
            + ".",
            "Its widths must agree with one another, and with the CLIP beneath.",
        )


def _does_not_fit(where: Path, missing: list[str], unexpected: list[str]) -> MaskMillError:
    def listed(word: str, names: list[str]) -> str:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return f" {word}: {', '.join(names[:8])}{more}." if names else ""

    return WrongUse(
        "weights_do_not_fit",
        f"The tensors of {where} are not those of a CLIPSeg or of its settings."
        + listed("Missing", missing)
        + listed("Unexpected", unexpected),
        "Use the decoder as its authors saved it (rd64-uni.pth, rd16-uni.pth, rd64-uni-refined.pth), a file "
        "of save_decoder, or a folder in Hugging Face's layout; fetch it again if it was cut off.",
    )


# --- Hugging Face's layout, read ----------------------------------------------------------------------------


def _hugging_face_files(weights: str, cache: str | None) -> tuple[Path, Path]:
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

    return in_hub_cache(repository, name, cache) or download(
        fetch,
        f"https://huggingface.co/{repository} ({name})",
        cache or hub_cache_folder(),
        repository,
        f"put {CONFIG_FILE} and {WEIGHTS_FILE} into one folder and name that folder",
    )


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _unsupported(path, f"it is not JSON: {error}") from error
    if not isinstance(settings, dict) or settings.get("model_type") != "clipseg":
        raise _unsupported(path, "its model_type is not clipseg")
    for part, defaults in (("text_config", _TEXT_DEFAULTS), ("vision_config", _VISION_DEFAULTS)):
        # The *_config_dict of old files overrides what stands beside it.
        old = settings.get(f"{part}_dict")
        settings[part] = {**defaults, **(settings.get(part) or {}), **({**defaults, **old} if old else {})}
    return settings


def _decoder_config(settings: dict[str, Any], path: Path) -> ClipSegConfig:
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


def _decoder_from_hugging_face(config: ClipSegConfig, settings: dict[str, Any], path: Path) -> ClipSegDecoder:
    names = _decoder_names(len(config.extract_layers), config.refined)
    theirs = read_state(path, prefix="decoder.")
    _check_names(path, (part for name in names for part in name.theirs), theirs)
    vision = settings["vision_config"]
    return _decoder(
        config,
        _to_ours(names, theirs),
        path,
        width=vision["hidden_size"],
        embed_dim=settings.get("projection_dim", 512),
        patch=vision["patch_size"],
    )


def _read_clip(
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
    _check_names(tensors_path, (part for name in names for part in name.theirs), theirs)
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
    """open_clip's name of an architecture, the shortest if there are several."""
    toyclip.register()
    wanted = _complete(config)
    known = [
        name for name in open_clip.list_models() if _complete(open_clip.get_model_config(name)) == wanted
    ]
    return min(known, key=lambda name: (len(name), name), default=None)


def _complete(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with open_clip's defaults written out."""
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


# --- Hugging Face's layout, written -------------------------------------------------------------------------


def hugging_face_state(model: ClipSeg) -> dict[str, Tensor]:
    """CLIP and decoder under Hugging Face's names: the state dict of ``CLIPSegForImageSegmentation``.

    Raises:
        MaskMillError: ``model_unsupported`` as ``save_clipseg``.
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
    """The ``config.json`` to ``hugging_face_state``.

    Raises:
        MaskMillError: ``model_unsupported`` as ``save_clipseg``.
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
            # open_clip's last two tokens
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
    """Write CLIP, decoder, tokenizer and image processor as ``transformers`` reads them.

    ``CLIPSegForImageSegmentation.from_pretrained`` and ``CLIPSegProcessor.from_pretrained`` take the folder,
    and so does ``load_clipseg``. Dropout, which Hugging Face's decoder does not have, is not kept: a model
    read back has the paper's 0.1.

    Args:
        model: with both towers.
        folder: made if it is not there.
        overwrite: replace files that are there.

    Raises:
        MaskMillError: ``output_exists``; ``model_unsupported`` for what Hugging Face's class cannot hold:
            other towers than CLIP's own, or a refined head for another patch than 16.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    state, config = hugging_face_state(model), hugging_face_config(model)
    texts = {
        "preprocessor_config.json": _preprocessor(),
        **_tokenizer_files(model.clip),
        CONFIG_FILE: _json(config),
    }
    _refuse_existing([folder / name for name in (WEIGHTS_FILE, *texts)], overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_plain(state), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    for name, text in texts.items():  # config.json last: a folder that has it is whole
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


def _refuse_existing(paths: list[Path], overwrite: bool) -> None:
    there = [str(path) for path in paths if path.exists()]
    if there and not overwrite:
        raise WrongUse(
            "output_exists",
            f"Already there: {', '.join(there)}.",
            "Choose another place, or pass overwrite=True.",
        )


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


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
    """The byte-pair vocabulary in the names of ``transformers``; empty for a tokenizer of another kind."""
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
