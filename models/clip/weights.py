"""Find CLIP's weights, and read them without running untrusted code.

There are three independent steps. ``find_weights`` resolves a model name and a ``pretrained`` spec to a
``WeightSource`` (architecture, file, image statistics), downloading the file if needed;
``WeightSource.fingerprint`` identifies the weights; ``read_state`` reads the tensors.

Pickles are read with ``weights_only=True``. TorchScript archives hold code, which ``torch.jit.load``
compiles: only OpenAI's own files are accepted, recognised by the SHA-256 in their URLs.

torch and open_clip take seconds to import, so they are imported where needed: missing weights are reported
at once wherever the spec alone decides.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.clip import published
from models.clip import toy as toyclip
from models.clip.refused import refusal
from models.errors import Damaged, MaskMillError, WrongUse, did_you_mean
from models.hub import (
    HF_CONFIG_NAME,
    HF_SAFE_WEIGHTS_NAME,
    HF_WEIGHTS_NAME,
    download,
    hub_file,
    in_hub_cache,
    put_into,
    same_cache,
)

if TYPE_CHECKING:
    from torch import Tensor

SUPPORTED = (
    "open_clip's ViTs with a class token (ViT-B-16, ViT-L-14, ..., their -quickgelu twins, the CLIPA ones, "
    "those with a Hugging Face text tower) and its ModifiedResNets (RN50, RN101, RN50x4, RN50x16, RN50x64); "
    f"{', '.join(published.NAMES)}"
)
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
_NO_DOWNLOAD = "To try MaskMill without a download, use the bundled toy: --recipe toy."
_FILE_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".ckpt")
HUB_REPOSITORIES = {
    ("ViT-B-16-quickgelu", "openai"): "timm/vit_base_patch16_clip_224.openai",
    ("RN50-quickgelu", "openai"): "timm/resnet50_clip.openai",
    ("RN50x16-quickgelu", "openai"): "timm/resnet50x16_clip.openai",
}
"""Where open_clip gets the weights of MaskMill's own recipes, so that these are looked for without it."""


@dataclass(frozen=True)
class WeightSource:
    """An architecture and the location of its weights.

    Attributes:
        name: open_clip's model name (``ViT-B-16``, ``hf-hub:…``, ``local-dir:…``).
        pretrained: the spec that chose the weights, or None if the model name implies them.
        config: open_clip's model configuration (``embed_dim``, ``vision_cfg``, ``text_cfg``, …).
        path: the weights file; None for random weights.
        seed: the seed of random weights, else None.
        mean, std: the image statistics used in training, RGB in [0, 1].
    """

    name: str
    pretrained: str | None
    config: dict[str, Any]
    path: Path | None
    seed: int | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights file in hex, or ``random:SEED:NAME``."""
        return f"random:{self.seed}:{self.name}" if self.path is None else _sha256_once(self.path)


def find_weights(model: str, pretrained: str | None, *, cache_dir: str | Path | None = None) -> WeightSource:
    """Find the weights of a supported CLIP, downloading them if necessary.

    Args:
        model: an open_clip name (``ViT-B-16-quickgelu``), ``hf-hub:ORG/REPO``, ``local-dir:PATH``,
            ``toyclip``, or one of ``models.clip.published.NAMES``.
        pretrained: an open_clip tag (``openai``), a file, ``random:SEED``, or ``bundled`` for ``toyclip``;
            None for ``hf-hub:`` and ``local-dir:``, where the name implies the weights.
        cache_dir: the download cache; None for open_clip's default.

    Raises:
        MaskMillError: ``name_unknown``, ``model_unsupported``, ``weights_missing`` (with the file to get and
            where to put it).
    """
    schema, identifier = _schema(model)
    cache = None if cache_dir is None else str(cache_dir)
    if schema == "local-dir":
        found = _from_directory(model, Path(identifier), pretrained)
    elif schema == "hf-hub":
        found = _from_hub(model, identifier, pretrained, cache)
    else:
        found = _from_name(model.replace("/", "-"), pretrained, cache)
    check_supported(found.name, found.config)
    return found


def own_fingerprint(model: str, pretrained: str | None) -> str | None:
    """The ``fingerprint`` of weights of MaskMill's own recipes, found without importing open_clip.

    Returns:
        None for other weights, which ``find_weights`` finds.

    Raises:
        MaskMillError: as ``find_weights``.
    """
    seed = _seed(pretrained)
    if model == toyclip.MODEL_NAME and pretrained in (None, toyclip.PRETRAINED):
        return _sha256_once(toyclip.weights_path())
    if seed is not None and any(model == known for known, _ in HUB_REPOSITORIES):
        return f"random:{seed}:{model}"
    if pretrained is not None and (model, pretrained) in HUB_REPOSITORIES:
        return _sha256_once(_find_own(model, pretrained, None))
    return None


def read_state(path: Path, *, prefix: str = "") -> dict[str, Tensor]:
    """Read the tensors of a weights file to the CPU, in their stored dtypes.

    Args:
        path: ``.safetensors``, a pickled state dict or training checkpoint, or an OpenAI (TorchScript)
            archive.
        prefix: read only the names with this prefix, which they keep (``visual.`` leaves the text tower on
            disk).

    Raises:
        MaskMillError: ``model_damaged`` if the file is damaged, is not a weights file, or holds more than
            weights; ``model_unsupported`` for a TorchScript archive that OpenAI did not publish.
    """
    try:
        if path.suffix == ".safetensors":
            state = _read_safetensors(path, prefix)
        elif is_torchscript(path):
            state = _read_torchscript(path)
        else:
            state = _read_pickle(path)
    except MaskMillError:
        raise
    except Exception as error:  # on damaged files the readers raise a dozen unrelated types
        raise _unreadable(
            path, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    if not state:
        raise _unreadable(path, "it holds no tensors")
    return {name: tensor for name, tensor in state.items() if name.startswith(prefix)}


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a ``.safetensors`` file, which are not read.

    Raises:
        MaskMillError: ``model_damaged``.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, str(error)) from error


def check_supported(name: str, config: dict[str, Any]) -> None:
    """Raise ``model_unsupported`` unless the tower is one of ``SUPPORTED``."""
    if "tower" in config:
        return
    vision = config.get("vision_cfg", {})
    reason = None
    known = refusal(name)
    if "timm_model_name" in vision:
        reason = known.reason if known else f"its image tower is timm's {vision['timm_model_name']}"
    elif "multimodal_cfg" in config or vision.get("attentional_pool"):
        reason = "it is a CoCa, which pools its tokens with a learned attention"
    elif vision.get("pool_type", "tok") not in ("tok", "avg"):
        reason = f"it pools its tokens by {vision['pool_type']!r}"
    if reason:
        raise WrongUse(
            "model_unsupported",
            f"MaskMill cannot take dense features from {name}: {reason}.",
            f"Use one of {SUPPORTED}.",
        )


def _refuse_family(name: str) -> None:
    """Refuse a model that open_clip does not have, if it is known why it cannot be read."""
    known = refusal(name)
    if known:
        also = (
            f" Beside one of them its tower can help: --set head=proxy --set helper={known.helper}."
            if known.helper
            else ""
        )
        raise WrongUse(
            "model_unsupported",
            f"MaskMill cannot take dense features from {name}: {known.reason}.",
            f"Use one of {SUPPORTED}.{also}",
        )


def sha256(path: Path) -> str:
    """SHA-256 of a file in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sha256_once(path: Path) -> str:
    state = path.stat()
    return _sha256_of_state(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=8)
def _sha256_of_state(path: Path, _size: int, _changed_ns: int) -> str:
    return sha256(path)


def openai_archives() -> frozenset[str]:
    """SHA-256 of each file that OpenAI published, taken from its URL."""
    import open_clip

    urls = [open_clip.get_pretrained_url(name, "openai") for name in open_clip.list_openai_models()]
    return frozenset(url.split("/")[-2] for url in urls if url)


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive, the format of OpenAI's own weights."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.split("/", 1)[-1] == "constants.pkl" for name in archive.namelist())


# --- finding ------------------------------------------------------------------------------------------------


def _schema(model: str) -> tuple[str | None, str]:
    for schema in ("hf-hub", "local-dir"):
        if model.startswith(f"{schema}:"):
            identifier = model.removeprefix(f"{schema}:")
            if not identifier:
                raise WrongUse(
                    "name_unknown",
                    f"There is nothing after {schema}: in the model name.",
                    f"Write {schema}:NAME.",
                )
            return schema, identifier
    return None, model


def _seed(pretrained: str | None) -> int | None:
    if pretrained is None or not pretrained.startswith("random:"):
        return None
    try:
        return int(pretrained.removeprefix("random:"))
    except ValueError:
        raise WrongUse(
            "name_unknown",
            f"The seed in pretrained={pretrained!r} is not a whole number.",
            "Write random:SEED, as in random:0.",
        ) from None


def _from_name(name: str, pretrained: str | None, cache: str | None) -> WeightSource:
    seed = _seed(pretrained)
    if name == toyclip.MODEL_NAME and pretrained in (None, toyclip.PRETRAINED):
        path = toyclip.weights_path()
        return WeightSource(name, str(path), toyclip.config(), path, None, OPENAI_MEAN, OPENAI_STD)
    if name in published.NAMES:
        file = None if seed is not None else _tower_file(name, pretrained, cache)
        mean, std = (OPENAI_MEAN, OPENAI_STD) if name in published.RADIO else ((0.0,) * 3, (1.0,) * 3)
        return WeightSource(name, pretrained, published.configuration(name), file, seed, mean, std)
    if pretrained is not None and (name, pretrained) in HUB_REPOSITORIES:
        # Tell that they are missing before the import, which takes seconds.
        _find_own(name, pretrained, cache)
    import open_clip

    if name == toyclip.MODEL_NAME:
        toyclip.register()
    config = open_clip.get_model_config(name)
    if config is None:
        _refuse_family(name)
        raise WrongUse(
            "name_unknown",
            f"open_clip has no model named {name!r}.",
            _near(name, open_clip.list_models()) + f"MaskMill works with {SUPPORTED}.",
        )
    check_supported(name, config)
    if seed is not None:
        return WeightSource(name, pretrained, config, None, seed, OPENAI_MEAN, OPENAI_STD)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        raise WrongUse(
            "name_unknown",
            f"{name} needs weights, and none were named.",
            f"Set pretrained to a tag ({', '.join(tags) or 'open_clip lists none'}), a file, or random:SEED.",
        )
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if tag:
        _check_quick_gelu(name, config, bool(tag.get("quick_gelu", False)), f"the weights {pretrained!r}")
        path = _fetch_tag(name, pretrained, tag, cache)
        return WeightSource(name, pretrained, config, path, None, tuple(tag["mean"]), tuple(tag["std"]))
    path = Path(pretrained).expanduser()
    if path.is_file():
        mean, std = OPENAI_MEAN, OPENAI_STD
        known = _tag_of_file(name, path)
        if is_torchscript(path):
            _check_quick_gelu(name, config, True, f"the OpenAI archive {path.name}")
        elif known:
            _check_quick_gelu(
                name, config, bool(known.get("quick_gelu", False)), f"the weights in {path.name}"
            )
            mean, std = tuple(known["mean"]), tuple(known["std"])
        return WeightSource(name, pretrained, config, path, None, mean, std)
    if path.suffix in _FILE_SUFFIXES or os.sep in pretrained:
        raise WrongUse(
            "weights_missing",
            f"There is no weights file {pretrained}.",
            "Check the path, or name an open_clip tag.",
        )
    raise _unknown_tag(name, pretrained, tags)


def _tower_file(name: str, pretrained: str | None, cache: str | None) -> Path:
    """The safetensors file of a C-RADIO or TIPSv2."""
    tips = published.TIPS.get(name)
    if tips and pretrained == published.TIPS_TAG:
        file = published.TIPS_FILES[0]
        cached = in_hub_cache(tips.repository, file, cache)
        if cached:
            return cached

        def fetch() -> str:
            from huggingface_hub import hf_hub_download

            return hf_hub_download(tips.repository, file, cache_dir=cache)

        use = (
            "Copy both here, into one folder, and add to the command:\n"
            f"  --set pretrained={file}\n{same_cache(cache)}{_NO_DOWNLOAD}"
        )
        urls = [hub_file(tips.repository, each) for each in published.TIPS_FILES]
        return download(fetch, urls, name, use)
    path = Path(pretrained or "").expanduser()
    if pretrained and path.is_file() and path.suffix == ".safetensors":
        return path
    if tips:
        how = (
            f"Set pretrained={published.TIPS_TAG}, a .safetensors file of {tips.repository}, or random:SEED."
        )
    else:
        how = (
            "Their SigLIP2 head is in NVIDIA's .pth.tar only, which is a pickle: convert it once, as "
            "docs/heads.md shows, and set pretrained to the .safetensors file. Or set random:SEED."
        )
    said = f"there is no .safetensors file {pretrained}" if pretrained else "none were named"
    raise WrongUse("weights_missing", f"{name} needs weights, and {said}.", how)


def siglip2_weights(cache: str | None = None) -> Path:
    """The file of the SigLIP2 whose words C-RADIO's head leads to.

    Raises:
        MaskMillError: ``weights_missing``.
    """
    import open_clip

    tag = open_clip.get_pretrained_cfg(published.SIGLIP2, "webli")
    repository, file = os.path.split(tag["hf_hub"])
    return _fetch_from_hub(published.SIGLIP2, "webli", repository, file, cache)


def _find_own(name: str, pretrained: str, cache: str | None) -> Path:
    return _fetch_from_hub(name, pretrained, HUB_REPOSITORIES[name, pretrained], "", cache)


def _unknown_tag(name: str, pretrained: str, tags: list[str]) -> MaskMillError:
    import open_clip

    plain = name.removesuffix("-quickgelu")
    if plain != name and open_clip.get_pretrained_cfg(plain, pretrained):
        return WrongUse(
            "model_unsupported",
            f"The weights {pretrained!r} were trained with the plain GELU, and {name} computes QuickGELU.",
            f"Use the model {plain} with them.",
        )
    return WrongUse(
        "name_unknown",
        f"{pretrained!r} is neither weights of {name} that open_clip knows nor a file.",
        _near(pretrained, tags) + f"open_clip lists for {name}: {', '.join(tags) or 'none'}.",
    )


def _check_quick_gelu(name: str, config: dict[str, Any], trained: bool, what: str) -> None:
    import open_clip

    if bool(config.get("quick_gelu", False)) == trained:
        return
    if trained:
        right = f"{name}-quickgelu"
        remedy = f"Use the model {right}."
        if right not in open_clip.list_models():
            remedy = f"open_clip has no {right}; add a config with quick_gelu: true as local-dir:."
        message = f"{what} were trained with QuickGELU, and {name} computes the plain GELU"
    else:
        remedy = f"Use the model {name.removesuffix('-quickgelu')}."
        message = f"{what} were trained with the plain GELU, and {name} computes QuickGELU"
    raise WrongUse(
        "model_unsupported",
        f"{message[0].upper()}{message[1:]}: every layer would be a little wrong.",
        remedy,
    )


def _tag_of_file(name: str, path: Path) -> dict[str, Any]:
    """The open_clip tag whose published file has this name, for the activation, which no tensor tells."""
    import open_clip

    for model in (name, name.removesuffix("-quickgelu")):
        for tag in open_clip.list_pretrained_tags_by_model(model):
            config = open_clip.get_pretrained_cfg(model, tag)
            if config.get("url") and os.path.basename(config["url"]) == path.name:
                return config
    return {}


def _fetch_tag(name: str, pretrained: str, tag: dict[str, Any], cache: str | None) -> Path:
    if tag.get("hf_hub"):
        repository, file = os.path.split(tag["hf_hub"])
        return _fetch_from_hub(name, pretrained, repository, file, cache)
    store = cache or os.path.expanduser("~/.cache/clip")
    file = os.path.basename(tag["url"])
    cached = Path(store) / file
    if cached.is_file() and cached.stat().st_size:
        # open_clip would hash the whole file on every start; the fingerprint hashes it once.
        return cached
    return _download_tag(
        name,
        pretrained,
        tag["url"],
        cache,
        f"Copy it here, and put it where the same command finds it:\n{put_into(store, file)}"
        f"Or leave it anywhere, and add to the command:\n  --set pretrained={file}\n",
    )


def _fetch_from_hub(name: str, pretrained: str, repository: str, file: str, cache: str | None) -> Path:
    """The weights of a tag that open_clip gets from the hub; an empty ``file`` is the usual one."""
    cached = in_hub_cache(repository, file or HF_WEIGHTS_NAME, cache)
    if cached:
        return cached
    file = file or HF_SAFE_WEIGHTS_NAME
    return _download_tag(
        name,
        pretrained,
        hub_file(repository, file),
        cache,
        f"Copy it here, and add to the command:\n  --set pretrained={file}\n{same_cache(cache)}",
    )


def _download_tag(name: str, pretrained: str, url: str, cache: str | None, use: str) -> Path:
    def fetch() -> str:
        import open_clip

        tag = open_clip.get_pretrained_cfg(name, pretrained)
        return open_clip.download_pretrained(tag, cache_dir=cache)

    return download(fetch, [url], f"{name} {pretrained}", f"{use}{_NO_DOWNLOAD}")


def _from_hub(model: str, repository: str, pretrained: str | None, cache: str | None) -> WeightSource:
    seed = _schema_seed(model, pretrained)

    def fetch(file: str | None) -> str:
        from open_clip.pretrained import download_pretrained_from_hf

        return download_pretrained_from_hf(repository, filename=file, cache_dir=cache)

    urls = [hub_file(repository, file) for file in (HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME)]
    folder = repository.rpartition("/")[2]
    use = (
        f"Copy both here, into one folder:\n{put_into(folder, HF_CONFIG_NAME)}"
        f"{put_into(folder, HF_SAFE_WEIGHTS_NAME)}"
        f"Then add to the command:\n  --set model=local-dir:{folder} --set pretrained=null\n"
        f"{same_cache(cache)}{_NO_DOWNLOAD}"
    )
    settings_path = in_hub_cache(repository, HF_CONFIG_NAME, cache) or download(
        lambda: fetch(HF_CONFIG_NAME), urls, model, use
    )
    settings = _settings(settings_path)
    check_supported(model, settings["model_cfg"])
    path = None
    if seed is None:
        path = in_hub_cache(repository, HF_WEIGHTS_NAME, cache) or download(
            lambda: fetch(None), urls, model, use
        )
    return _from_settings(model, pretrained, settings, path, seed)


def _from_directory(model: str, folder: Path, pretrained: str | None) -> WeightSource:
    seed = _schema_seed(model, pretrained)
    folder = folder.expanduser()
    settings_path = folder / HF_CONFIG_NAME
    if not settings_path.is_file():
        raise WrongUse(
            "name_unknown",
            f"There is no {HF_CONFIG_NAME} in {folder}.",
            "Give a folder as open_clip's push_to_hf_hub writes it, the configuration beside the weights.",
        )
    settings = _settings(settings_path)
    if seed is not None:
        return _from_settings(model, pretrained, settings, None, seed)
    preferred = [
        folder / HF_SAFE_WEIGHTS_NAME,
        folder / "open_clip_pytorch_model.safetensors",
        folder / HF_WEIGHTS_NAME,
    ]
    files = [path for path in preferred if path.is_file()]
    if not files:
        files = sorted(path for path in folder.iterdir() if path.suffix in _FILE_SUFFIXES)
        if len(files) > 1:
            raise WrongUse(
                "name_unknown",
                f"{folder} holds several weights files: {', '.join(path.name for path in files)}.",
                f"Keep one, or name the right one {HF_SAFE_WEIGHTS_NAME}.",
            )
    if not files:
        raise WrongUse(
            "weights_missing",
            f"There are no weights in {folder}.",
            f"Put them there as {HF_SAFE_WEIGHTS_NAME}.",
        )
    return _from_settings(model, pretrained, settings, files[0], None)


def _schema_seed(model: str, pretrained: str | None) -> int | None:
    seed = _seed(pretrained)
    if pretrained is not None and seed is None:
        raise WrongUse(
            "name_unknown",
            f"{model} brings its own weights, and pretrained={pretrained!r} names others.",
            "Leave pretrained out.",
        )
    return seed


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WrongUse("name_unknown", f"{path} is not JSON: {error}.", "Write it again.") from error
    if not isinstance(settings, dict) or "model_cfg" not in settings:
        raise WrongUse(
            "name_unknown",
            f"{path} has no model_cfg.",
            "It must be an open_clip_config.json as open_clip's push_to_hf_hub writes it.",
        )
    return settings


def _from_settings(
    model: str, pretrained: str | None, settings: dict[str, Any], path: Path | None, seed: int | None
) -> WeightSource:
    statistics = settings.get("preprocess_cfg", {})
    mean, std = tuple(statistics.get("mean", OPENAI_MEAN)), tuple(statistics.get("std", OPENAI_STD))
    return WeightSource(model, pretrained, settings["model_cfg"], path, seed, mean, std)


def _near(word: str, words: list[str]) -> str:
    return did_you_mean(word, words, most=3, cutoff=0.5)


# --- reading ------------------------------------------------------------------------------------------------


def _unreadable(path: Path, reason: str) -> MaskMillError:
    return Damaged(
        "model_damaged",
        f"{path} cannot be read as weights: {reason}.",
        "It must be a .safetensors file, a state dict that torch.load reads with weights_only=True, or an "
        "OpenAI archive. Fetch it again if it was cut off; convert it to .safetensors if it holds more.",
    )


def _read_safetensors(path: Path, prefix: str) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118


def _read_pickle(path: Path) -> dict[str, Tensor]:
    import torch

    # Memory-mapping, which needs the zip format, leaves an unused tower on disk.
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise _unreadable(path, f"it holds a {type(state).__name__}, not a state dict")
    state = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    if sha256(path) not in openai_archives():
        raise WrongUse(
            "model_unsupported",
            f"{path} is a TorchScript archive, which holds code, and none of those that OpenAI published.",
            "If you trust it, convert it with torch.jit.load and safetensors.torch.save_file, and name the "
            ".safetensors file.",
        )
    import torch

    return dict(torch.jit.load(path, map_location="cpu").state_dict())
