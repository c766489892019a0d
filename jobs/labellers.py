"""From a recipe and an ontology to a Labeller: weights found, class names embedded, settings checked."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.recipes import LabelRecipe
from pipeline.ontology import Ontology

if TYPE_CHECKING:
    from pipeline.labeller import Labeller

MASKCLIP_OPTIONS = (
    "head",
    "image_stats",
    "profile",
    "window",
    "window_stride",
    "ks_threshold",
    "ks_axis",
    "ks_source",
    "pd_threshold",
    "temperature",
)


@dataclass(frozen=True)
class PreparedLabeller:
    """A Labeller that any process can build.

    Attributes:
        make: builds it; picklable. Takes ``precision`` and, on a CPU, ``threads``.
        weights: model, the word that chose the weights, and their fingerprint.
    """

    make: Callable[..., Labeller]
    weights: dict[str, Any]


def prepare_labeller(
    recipe: LabelRecipe,
    ontology: Ontology,
    *,
    precision: str = "auto",
    check_weights: Callable[[str], None] = lambda _fingerprint: None,
) -> PreparedLabeller:
    """Find the weights, so that mistakes show before work starts, and embed the class names.

    Args:
        recipe: which CLIP, and how its scores are read.
        ontology: the classes.
        precision: of the run that it is for; ``auto`` if that is yet to be decided.
        check_weights: is given the fingerprint before the class names are embedded; may raise.

    Raises:
        MaskMillError: see ``models.weights.find_weights`` and ``models.text.build_text_classifier``.
    """
    from models.clip import load_source
    from models.precision import DTYPES, best_device, native_precision
    from models.text import build_text_classifier, cached_text_classifier
    from models.weights import find_weights
    from pipeline.maskclip_labeller import MaskClipLabeller

    device = best_device()
    # Class names are embedded with the arithmetic of the run, unless this machine would have to emulate it.
    native = native_precision(device)
    text_precision = native if precision in ("auto", native) else "fp32"
    source = find_weights(recipe.model, recipe.pretrained)
    check_weights(source.fingerprint)
    words: dict[str, Any] = {
        "templates": ontology.templates,
        "merge": ontology.merges(),
        "cache_dir": cache_dir(),
    }
    text = cached_text_classifier(
        source.fingerprint, ontology.prompts(), **words, dtype=DTYPES[text_precision]
    ) or build_text_classifier(
        load_source(source, device=device, dtype=DTYPES[text_precision]), ontology.prompts(), **words
    )
    thresholds = ontology.thresholds(default=recipe.min_confidence)
    make = functools.partial(
        MaskClipLabeller,
        model=recipe.model,
        pretrained=recipe.pretrained,
        embeddings=text.embeddings.cpu().numpy(),
        class_ids=text.class_ids.cpu().numpy(),
        num_classes=ontology.num_classes,
        thresholds=[0.0] * ontology.num_classes if thresholds is None else thresholds.tolist(),
        options={name: getattr(recipe, name) for name in MASKCLIP_OPTIONS},
        batch_size=recipe.batch_size,
        ignore_index=ontology.ignore_index,
    )
    weights = {"model": recipe.model, "pretrained": recipe.pretrained, "fingerprint": source.fingerprint}
    return PreparedLabeller(make, weights)


def cache_dir() -> Path:
    """Where text embeddings are kept: ``$MASKMILL_CACHE``, else below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    own = os.environ.get("MASKMILL_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maskmill"
