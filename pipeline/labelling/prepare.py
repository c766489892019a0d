"""Prepare a Labeller from a recipe and an ontology: find weights, embed class names, check settings.

There is one function per kind of Labeller; ``prepare_labeller`` chooses by the recipe's ``model``. To add a
kind, see ``pipeline.labelling.labeller``.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from models.catalogue import DEEP, HEADS, check_resnet_head
from models.errors import MaskMillError, WrongUse
from pipeline.files.storage import cache_dir, canonical_uri, is_remote
from pipeline.labelling.clipseg.options import RELEASED
from pipeline.labelling.labeller import LabellerSettings, PreparedLabeller
from pipeline.labelling.recipes import RECIPES, LabelRecipe, change_recipe, parse_settings
from pipeline.ontology.ontology import Ontology

if TYPE_CHECKING:
    import torch

    from models.clip.loading import Clip
    from models.clip.text import TextClassifier
    from models.clip.weights import WeightSource
    from pipeline.trained.student import StudentRecord

CLIPSEG = "clipseg"
"""A recipe's ``model`` for CLIPSeg; its ``pretrained`` names the weights."""

READING = ("head", "sigma", "alpha", "helper", "helper_weights", "image_stats", "profile", "positions")
"""Settings of MaskCLIP on which the features depend that a memory holds."""

CheckWeights = Callable[[str], None]


def prepare_labeller(
    recipe: LabelRecipe,
    ontology: Ontology,
    *,
    precision: str | None = None,
    check_weights: CheckWeights = lambda _fingerprint: None,
) -> PreparedLabeller:
    """Find the weights and embed the class names, so that mistakes show before workers start.

    Args:
        recipe: which model, and how to read its scores. The model is a student if it is the path or URI of a
            student's folder, CLIPSeg if it is ``clipseg``, and otherwise a CLIP used as MaskCLIP.
        ontology: the classes.
        precision: overrides the recipe's; ``auto`` is what this machine computes natively.
        check_weights: called with the fingerprint before the class names are embedded; may raise.

    Raises:
        MaskMillError: ``setting_invalid`` for settings that the model does not use, ``classes_differ`` for
            classes that it does not accept; as ``models.clip.weights.find_weights``,
            ``models.clip.loading.load_source``, ``models.clip.text.build_text_classifier`` and
            ``pipeline.trained.student.read_student_record``.
    """
    if recipe.model != CLIPSEG:
        _refuse_examples(ontology, recipe.model)
    # Before torch is imported, so that missing or other weights, and memories, are reported at once.
    fingerprint = require_weights(recipe)
    beside: dict[str, dict[str, str]] = {}
    if fingerprint is not None:
        beside = find_beside(recipe, fingerprint)
        check_weights(fingerprint)
    from models.device import best_device, native_precision

    precision = precision or recipe.precision
    thresholds = ontology.thresholds(default=recipe.min_confidence)
    settings = LabellerSettings(
        num_classes=ontology.num_classes,
        ignore_index=ontology.ignore_index,
        thresholds=() if thresholds is None else tuple(thresholds.tolist()),
        precision=native_precision(best_device()) if precision == "auto" else precision,
        batch_size=recipe.batch_size,
        agreement=recipe.agreement,
    )
    if recipe.model == CLIPSEG:
        return _prepare_clipseg(recipe, ontology, settings, check_weights)
    if _names_student(recipe.model):
        return _prepare_student(recipe, ontology, settings)
    return _prepare_maskclip(recipe, ontology, settings, beside)


def require_weights(recipe: LabelRecipe) -> str | None:
    """Find the weights of a recipe, and download them if needed; in most cases without importing torch.

    Returns:
        Their fingerprint; None for CLIPSeg, which finds its weights when it is loaded.

    Raises:
        MaskMillError: ``setting_invalid`` for settings that a student does not use; as
            ``models.clip.weights.find_weights`` and ``pipeline.trained.student.read_student_record``.
    """
    if recipe.model == CLIPSEG:
        return None
    if _names_student(recipe.model):
        from pipeline.trained.student import read_student_record

        _refuse_useless(recipe)
        return read_student_record(recipe.model).fingerprint
    from models.clip.weights import own_fingerprint

    fingerprint = own_fingerprint(recipe.model, recipe.pretrained)
    if fingerprint is None:
        return _find_clip(recipe).fingerprint
    if recipe.model.startswith("RN"):
        check_resnet_head(recipe.maskclip.head)
    return fingerprint


def _find_clip(recipe: LabelRecipe) -> WeightSource:
    from models.clip.published import check_reading
    from models.clip.weights import find_weights

    source = find_weights(recipe.model, recipe.pretrained)
    check_reading(source.name, source.config, recipe.maskclip)
    if isinstance(_blocks(source), list):
        check_resnet_head(recipe.maskclip.head)
    return source


def _blocks(source: WeightSource) -> int | list[int]:
    """The number of blocks of a ViT, or those of a ResNet's stages."""
    blocks: int | list[int] = source.config["vision_cfg"].get("layers", 12)
    return blocks


def _prepare_maskclip(
    recipe: LabelRecipe, ontology: Ontology, settings: LabellerSettings, beside: dict[str, dict[str, str]]
) -> PreparedLabeller:
    """The training-free teacher: a CLIP by name, with what ``find_beside`` has found."""
    from pipeline.labelling.maskclip import MaskClipLabeller

    recipe.maskclip.classes.refuse_unfit(ontology.num_classes)
    source = _find_clip(recipe)
    blocks, head = _blocks(source), recipe.maskclip.head
    if HEADS[head].own_values and isinstance(blocks, int) and blocks >= DEEP and "tower" not in source.config:
        logging.getLogger(__name__).warning(
            "head %s does badly on a tower of %d blocks (published: 13.9 %% mean IoU with ViT-L/14, where "
            "head sc has 45.2 %%): use --set head=sc.",
            head,
            blocks,
        )
    make = functools.partial(
        MaskClipLabeller,
        model=recipe.model,
        pretrained=recipe.pretrained,
        text=embed_names(source, ontology, settings.precision),
        reading=recipe.maskclip,
        memory=beside.get("memory", {}).get("fingerprint", ""),
    )
    weights = {
        "model": recipe.model,
        "pretrained": recipe.pretrained,
        "fingerprint": source.fingerprint,
        **beside,
    }
    named = Path(recipe.pretrained or "").expanduser().is_file() or recipe.model.startswith("local-dir:")
    files = [str(source.path)] if named else []
    if Path(recipe.maskclip.helper_weights).expanduser().is_file():
        files.append(recipe.maskclip.helper_weights)
    return PreparedLabeller(make, settings, weights, tuple(files))


def find_beside(recipe: LabelRecipe, weights: str) -> dict[str, dict[str, str]]:
    """What a recipe's CLIP works with: a ``memory`` and a ``helper``, as far as the recipe names them.

    Args:
        recipe: how images are labelled.
        weights: fingerprint of its CLIP.

    Raises:
        MaskMillError: as ``find_memory`` and ``models.helper.find_helper``.
    """
    found = {}
    memory = find_memory(recipe, weights)
    if memory:
        found["memory"] = memory
    reading = recipe.maskclip
    if reading.helper:
        from models.helper import find_helper

        source = find_helper(reading.helper, reading.helper_weights)
        found["helper"] = {
            "model": reading.helper,
            "pretrained": reading.helper_weights,
            "fingerprint": source.fingerprint,
        }
    return found


def find_memory(recipe: LabelRecipe, weights: str) -> dict[str, str]:
    """``uri`` and ``fingerprint`` of the memory that a recipe names; empty if it names none.

    Args:
        recipe: how images are labelled.
        weights: fingerprint of its CLIP.

    Raises:
        MaskMillError: ``input_missing``, ``file_damaged``; ``weights_do_not_fit`` if it was built with
            another CLIP, or another reading of it.
    """
    if not recipe.maskclip.memory:
        return {}
    from pipeline.files.storage import open_storage
    from pipeline.memory.record import read_memory_record

    storage = open_storage(recipe.maskclip.memory)
    record = read_memory_record(storage)
    own, theirs = recipe.to_dict()["maskclip"], record.recipe.get("maskclip", {})
    differ = [name for name in READING if own[name] != theirs.get(name, own[name])]
    if record.weights.get("fingerprint") != weights or differ:
        why = f"other settings: {', '.join(differ)}" if differ else "other weights"
        raise WrongUse(
            "weights_do_not_fit",
            f"The memory in {storage.uri} was built with {why}; its regions mean nothing here.",
            "Label with the settings of its table, or build another memory.",
        )
    return {"uri": storage.uri, "fingerprint": record.fingerprint}


def _prepare_student(recipe: LabelRecipe, ontology: Ontology, settings: LabellerSettings) -> PreparedLabeller:
    """A trained student: its own classes as trained, any others through its CLIP's text tower."""
    from pipeline.labelling.student import StudentLabeller
    from pipeline.trained.record import read_trained_weights
    from pipeline.trained.student import read_student_record

    record = read_student_record(recipe.model)
    read_trained_weights(record)  # find a damaged file here rather than in every worker
    text = None
    if not _same_words(record.ontology, ontology):
        text = embed_names(student_text_source(record), ontology, record.text["precision"])
    make = functools.partial(StudentLabeller, uri=record.uri, fingerprint=record.fingerprint, text=text)
    weights = {
        "model": f"student:{record.uri}",
        "pretrained": None,
        "fingerprint": record.fingerprint,
        "text": {name: record.text[name] for name in ("model", "pretrained", "fingerprint")},
    }
    files = () if is_remote(record.uri) else (f"{record.uri}/{record.RECORD_FILE}",)
    return PreparedLabeller(make, settings, weights, files)


def _prepare_clipseg(
    recipe: LabelRecipe, ontology: Ontology, settings: LabellerSettings, check_weights: CheckWeights
) -> PreparedLabeller:
    """CLIPSeg: each class is a prompt of words or examples, embedded in fp32."""
    import torch

    from models.clip.text import TextClassifier
    from models.device import best_device
    from pipeline.labelling.clipseg.labeller import ClipSegLabeller, resolution_of
    from pipeline.labelling.clipseg.model import ClipSegWeights
    from pipeline.labelling.clipseg.prompting import class_conditionals, parse_style

    options = recipe.clipseg
    useless = _changed_maskclip(recipe)
    if useless:
        raise WrongUse(
            "setting_invalid",
            f"CLIPSeg has no {', '.join(useless)}.",
            "Start from --recipe clipseg, and leave these settings out.",
        )
    limits = settings.thresholds or (0.0,) * settings.num_classes
    resolution = resolution_of(ontology, options, limits)
    parse_style(options.visual_prompt)
    weights = ClipSegWeights(recipe.pretrained or RELEASED, options.clip, options.extract_layers)
    model = weights.load(device=best_device())
    check_weights(model.fingerprint)
    prompts = [
        class_conditionals(model, ontology, class_id, options).cpu() for class_id in resolution.class_ids
    ]
    rows = torch.arange(len(prompts)).repeat_interleave(torch.tensor([len(rows) for rows in prompts]))
    make = functools.partial(
        ClipSegLabeller,
        weights=weights,
        text=TextClassifier(torch.cat(prompts), rows, len(prompts)),
        resolution=resolution,
    )
    described = {"model": recipe.model, "pretrained": weights.weights, "fingerprint": model.fingerprint}
    files = (weights.weights,) if Path(weights.weights).exists() else ()
    return PreparedLabeller(make, settings, described, files)


# --- recipes of trained models ------------------------------------------------------------------------------


def student_recipe(uri: str, settings: Sequence[str] = ()) -> tuple[LabelRecipe, Ontology]:
    """The recipe for a student, with the image sizes of its training, and its classes.

    Args:
        uri: the student's folder.
        settings: ``key=value`` changes, as in ``pipeline.labelling.recipes.load_recipe``.

    Raises:
        MaskMillError: as ``pipeline.trained.student.read_student_record``; ``setting_invalid``.
    """
    from pipeline.trained.student import read_student_record

    record = read_student_record(uri)
    recipe = LabelRecipe(name=record.name, model=record.uri, pretrained=None, images=record.labelling)
    return change_recipe(recipe, parse_settings(settings)), record.ontology


def clipseg_recipe(uri: str, settings: Sequence[str] = ()) -> LabelRecipe:
    """The recipe for a trained CLIPSeg: ``clipseg`` with its weights and the sizes of its training.

    Args:
        uri: its folder.
        settings: ``key=value`` changes, as in ``pipeline.labelling.recipes.load_recipe``.

    Raises:
        MaskMillError: as ``pipeline.trained.clipseg.read_clipseg_record``; ``setting_invalid``.
    """
    from pipeline.trained.clipseg import read_clipseg_record

    # Canonical, because the recipe is part of a table's identity.
    recipe = RECIPES["clipseg"].replace(pretrained=canonical_uri(uri))
    sizes = read_clipseg_record(uri).sizes
    if sizes is not None:
        side, example = sizes
        recipe = recipe.replace(
            images=recipe.images.replace(scale=(side, side)),
            clipseg=recipe.clipseg.replace(example_size=example),
        )
    return change_recipe(recipe, parse_settings(settings))


# --- what a model accepts -----------------------------------------------------------------------------------


def _names_student(model: str) -> bool:
    from pipeline.trained.student import is_student

    # A URI can only be a student's; reading a folder shows whether it holds a student.
    return "://" in model or (os.sep in model and Path(model).is_dir()) or is_student(model)


def _changed_maskclip(recipe: LabelRecipe) -> list[str]:
    """MaskCLIP settings changed by a recipe for another model, which ignores them."""
    usual, changed = LabelRecipe().effective(), recipe.effective()
    return [name for name in usual if name.startswith("maskclip.") and changed[name] != usual[name]]


def _refuse_useless(recipe: LabelRecipe) -> None:
    """Refuse settings that mean nothing to a student."""
    useless = _changed_maskclip(recipe)
    if recipe.pretrained not in (None, LabelRecipe().pretrained):
        useless.append("pretrained")
    if useless:
        raise WrongUse(
            "setting_invalid",
            f"{', '.join(useless)} of recipe {recipe.name!r} mean nothing to a student ({recipe.model}).",
            "Leave them out; of a student's recipe, sizes, precision and thresholds can be changed.",
        )


def _refuse_examples(ontology: Ontology, model: str) -> None:
    """Refuse examples: MaskCLIP and students take names only."""
    shown = [name for name, given in zip(ontology.names, ontology.examples(), strict=True) if given]
    if shown:
        raise WrongUse(
            "model_unsupported",
            f"{model} reads class names only, and the ontology gives examples for {', '.join(shown[:5])}.",
            "Label with CLIPSeg (--recipe clipseg), or take the examples out of the ontology.",
        )


def _same_words(own: Ontology, other: Ontology) -> bool:
    """Whether two ontologies give the same classifier; set names, colours and thresholds do not matter."""
    return (own.prompts(), own.merges(), own.templates) == (other.prompts(), other.merges(), other.templates)


# --- class names --------------------------------------------------------------------------------------------


def student_text_source(record: StudentRecord) -> WeightSource:
    """The CLIP that embeds classes outside a student's own.

    Raises:
        MaskMillError: ``classes_differ`` for a student with a closed vocabulary, ``weights_do_not_fit`` if
            this machine has other weights of that CLIP; as ``models.clip.weights.find_weights``.
    """
    from models.clip.weights import find_weights

    own = f"Or label with its own classes: {', '.join(record.ontology.names[:8])}"
    own += ", …" if record.ontology.num_classes > 8 else "."
    if record.config.get("learned_background"):
        raise WrongUse(
            "classes_differ",
            f"{record.uri} has learned what background is among its own classes; it takes no others.",
            f"Train with learned_background=false for an open vocabulary. {own}",
        )
    try:
        source = find_weights(record.text["model"], record.text["pretrained"])
    except MaskMillError as error:
        raise type(error)(
            error.code,
            f"Other classes than the student's own need the CLIP that it was trained with: {error.message}",
            f"{error.remedy} {own}",
        ) from error
    if source.fingerprint != record.text["fingerprint"]:
        raise WrongUse(
            "weights_do_not_fit",
            f"The weights of {source.name} here ({source.fingerprint[:12]}) are not those that the student "
            f"was trained with ({record.text['fingerprint'][:12]}): its features mean nothing to them.",
            f"Put the same weights in place. {own}",
        )
    return source


def embed_names(source: WeightSource, ontology: Ontology, precision: str) -> TextClassifier:
    """A classifier of the class names, from the cache if they were embedded before.

    Raises:
        MaskMillError: as ``models.clip.loading.load_source`` and ``models.clip.text.build_text_classifier``.
    """
    from models.clip.text import build_text_classifier, cached_text_classifier

    text = cached_text_classifier(
        source.fingerprint,
        ontology.prompts(),
        templates=ontology.templates,
        merge=ontology.merges(),
        cache_dir=cache_dir(),
        dtype=text_dtype(precision),
    )
    if text is not None:
        return text
    return build_text_classifier(
        load_text_tower(source, precision),
        ontology.prompts(),
        templates=ontology.templates,
        merge=ontology.merges(),
        cache_dir=cache_dir(),
    )


def load_text_tower(source: WeightSource, precision: str) -> Clip:
    """Load the text tower of a CLIP for a run of this precision."""
    from models.clip.loading import load_source
    from models.device import best_device

    return load_source(source, device=best_device(), dtype=text_dtype(precision), towers="text")


def text_dtype(precision: str) -> torch.dtype:
    """The dtype of text towers: as requested, or fp32 if this machine would have to emulate it."""
    from models.device import DTYPES, best_device, native_precision

    native = native_precision(best_device())
    return DTYPES[native if precision in ("auto", native) else "fp32"]
