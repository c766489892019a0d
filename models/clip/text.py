"""Turn class names into the rows of a dense classifier, cached on disk.

Shapes: C classes, P rows, D embedding channels.

Each name fills every template; its embeddings are normalised, averaged and normalised again (MaskCLIP, arXiv
2112.01071). The names of one class are merged in one of two ways:

* ``max``: one row per name; at each position the class scores the best of its rows. For background words and
  synonyms that look different.
* ``mean``: one row per class, the normalised mean of its names' rows. For synonyms that mean the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip.templates import fill, get_templates
from models.errors import Damaged, MaskMillError, WrongUse
from models.files import write_file

if TYPE_CHECKING:
    from models.clip.loading import Clip

Merge = Literal["max", "mean"]

_FORMAT = 3  # of cached files; increase it when their meaning or arithmetic changes


@dataclass(frozen=True, eq=False)
class TextClassifier:
    """Text embeddings as the weights of a dense classifier.

    Attributes:
        embeddings: fp32 (P, D), rows of length 1.
        class_ids: int64 (P,), ascending: the class of each row.
        num_classes: C; every class has at least one row.
    """

    embeddings: Tensor
    class_ids: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        rows = self.class_ids.shape[0]
        assert self.embeddings.shape[0] == rows, "one class id per row"
        assert torch.equal(self.class_ids.unique(), torch.arange(self.num_classes)), "every class has a row"
        assert bool((self.class_ids.diff() >= 0).all()), "class ids ascend"


def row_table(text: TextClassifier) -> Tensor:
    """(C, R) row indices of each class, R the largest row count; shorter lists repeat their last row."""
    counts = torch.bincount(text.class_ids, minlength=text.num_classes)
    first = counts.cumsum(0) - counts
    offsets = torch.minimum(torch.arange(int(counts.max()))[None], counts[:, None] - 1)
    return first[:, None] + offsets


def build_text_classifier(
    clip: Clip,
    class_prompts: Sequence[Sequence[str]],
    *,
    templates: str | Sequence[str] = "openai85",
    merge: Merge | Sequence[Merge] = "max",
    cache_dir: Path | None = None,
) -> TextClassifier:
    """Embed the names of all classes, or read them from the cache.

    Args:
        clip: its text tower is needed only on a cache miss.
        class_prompts: the names of class 0, 1, …; C lists of at least one name. With a background, class 0
            has the background words.
        templates: the name of a set in ``models.clip.templates``, or the templates themselves.
        merge: one rule for all classes, or one per class; see the module.
        cache_dir: where to cache the result; None disables the cache.

    Raises:
        MaskMillError: ``prompt_invalid``, ``setting_invalid``, ``model_unsupported``.
    """
    texts, merges = get_templates(templates), _merges(merge, class_prompts)
    cached = cached_text_classifier(
        clip.fingerprint,
        class_prompts,
        templates=texts,
        merge=merges,
        cache_dir=cache_dir,
        dtype=clip.dtype,
        embed_dim=clip.embed_dim,
    )
    if cached is not None:
        return cached
    names = list(dict.fromkeys(name for group in class_prompts for name in group))
    prompts = [prompt for name in names for prompt in fill(texts, name)]
    embedded = clip.encode_text(prompts).float().cpu().unflatten(0, (len(names), len(texts)))
    by_name = dict(zip(names, F.normalize(embedded.mean(1), dim=-1), strict=True))
    rows: list[Tensor] = []
    class_ids: list[int] = []
    for class_id, (group, rule) in enumerate(zip(class_prompts, merges, strict=True)):
        vectors = torch.stack([by_name[name] for name in dict.fromkeys(group)])
        if rule == "mean":
            vectors = F.normalize(vectors.mean(0, keepdim=True), dim=-1)
        rows.append(vectors)
        class_ids += [class_id] * len(vectors)
    classifier = TextClassifier(torch.cat(rows), torch.tensor(class_ids), len(class_prompts))
    if cache_dir is not None:
        write_text_classifier(
            _cache_file(cache_dir, clip.fingerprint, class_prompts, texts, merges, clip.dtype), classifier
        )
    return classifier


def cached_text_classifier(
    fingerprint: str,
    class_prompts: Sequence[Sequence[str]],
    *,
    templates: str | Sequence[str] = "openai85",
    merge: Merge | Sequence[Merge] = "max",
    cache_dir: Path | None,
    dtype: torch.dtype = torch.float32,
    embed_dim: int | None = None,
) -> TextClassifier | None:
    """Read the classifier that ``build_text_classifier`` cached for these weights and words.

    Args:
        fingerprint: ``Clip.fingerprint``.
        class_prompts, templates, merge, cache_dir: see ``build_text_classifier``.
        dtype: ``Clip.dtype`` when the classifier was built.
        embed_dim: D, checked if given.

    Returns:
        None on a cache miss, or if the file is damaged or has another shape.
    """
    texts, merges = get_templates(templates), _merges(merge, class_prompts)
    if cache_dir is None:
        return None
    try:
        classifier = read_text_classifier(
            _cache_file(cache_dir, fingerprint, class_prompts, texts, merges, dtype)
        )
    except (OSError, MaskMillError):
        return None
    rows = sum(
        len(dict.fromkeys(group)) if rule == "max" else 1
        for group, rule in zip(class_prompts, merges, strict=True)
    )
    fits = classifier.num_classes == len(class_prompts) and classifier.embeddings.shape[0] == rows
    if not fits or (embed_dim is not None and classifier.embeddings.shape[1] != embed_dim):
        return None
    return classifier


def write_text_classifier(path: Path, classifier: TextClassifier) -> None:
    """Write a classifier as safetensors, atomically."""
    from safetensors.torch import save

    data = save(
        {"embeddings": classifier.embeddings.contiguous(), "class_ids": classifier.class_ids.contiguous()}
    )
    write_file(path, data)


def read_text_classifier(path: Path) -> TextClassifier:
    """Read a file of ``write_text_classifier``.

    Raises:
        OSError: the file cannot be read.
        MaskMillError: ``model_damaged``.
    """
    from safetensors.torch import load

    data = path.read_bytes()
    try:
        tensors = load(data)
        embeddings, class_ids = tensors["embeddings"], tensors["class_ids"]
        lengths = torch.linalg.vector_norm(embeddings.double(), dim=-1)
        if embeddings.dtype != torch.float32 or not bool(((lengths - 1).abs() < 1e-3).all()):
            raise ValueError("rows are not of length 1")
        return TextClassifier(embeddings, class_ids, int(class_ids.max()) + 1)
    except Exception as error:  # on damaged files the readers raise many types
        raise Damaged(
            "model_damaged",
            f"{path} holds no text classifier: {error}.",
            "Delete it; it will be made again.",
        ) from error


def _merges(merge: Merge | Sequence[Merge], class_prompts: Sequence[Sequence[str]]) -> list[Merge]:
    merges: list[Merge] = [merge] * len(class_prompts) if isinstance(merge, str) else list(merge)
    if len(merges) != len(class_prompts) or any(rule not in ("max", "mean") for rule in merges):
        raise WrongUse(
            "setting_invalid",
            f"There are {len(class_prompts)} classes, and the merge rules are {merges}.",
            "Give max or mean, once or for each class.",
        )
    if not class_prompts:
        raise WrongUse("prompt_invalid", "There are no classes.", "Name at least one.")
    for class_id, group in enumerate(class_prompts):
        if not group or any(not name.strip() for name in group):
            raise WrongUse(
                "prompt_invalid",
                f"Class {class_id} has an empty name or no name at all: {list(group)}.",
                "Give every class at least one word.",
            )
    return merges


def _cache_file(
    cache_dir: Path,
    fingerprint: str,
    class_prompts: Sequence[Sequence[str]],
    templates: Sequence[str],
    merges: Sequence[Merge],
    dtype: torch.dtype,
) -> Path:
    key = {
        "format": _FORMAT,
        "weights": fingerprint,
        "classes": [list(dict.fromkeys(group)) for group in class_prompts],
        "templates": list(templates),
        "merge": list(merges),
        "precision": str(dtype).removeprefix("torch."),
    }
    digest = hashlib.sha256(json.dumps(key, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
    return Path(cache_dir) / f"text-{digest[:40]}.safetensors"
