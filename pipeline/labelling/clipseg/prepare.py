"""From a recipe and an ontology to a CLIPSeg Labeller: weights found, words and examples embedded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from models.errors import WrongUse
from pipeline.labelling.clipseg.options import PREFIXES, RELEASED, ClipSegOptions
from pipeline.labelling.recipes import LabelRecipe
from pipeline.ontology.ontology import Ontology

if TYPE_CHECKING:
    from torch import Tensor

    from models.clipseg.decoder import ClipSeg
    from pipeline.labelling.clipseg.labeller import Resolution
    from pipeline.labelling.prepare import PreparedLabeller

MODEL = "clipseg"
"""What a recipe's ``model`` says for CLIPSeg; its ``pretrained`` names the weights."""


def prepare_clipseg(
    recipe: LabelRecipe,
    ontology: Ontology,
    options: ClipSegOptions,
    *,
    check_weights: Callable[[str], None] = lambda _fingerprint: None,
) -> PreparedLabeller:
    """Find the weights, and embed the words and examples of the classes: in fp32, whatever the run has.

    Args:
        recipe: ``pretrained`` names the weights (a decoder file, a folder or a hub name; None is
            ``RELEASED``), ``min_confidence`` is the threshold of classes that have none.
        ontology: the classes, by words and by examples.
        options: how they are asked.
        check_weights: is given the fingerprint before anything is embedded; may raise.

    Raises:
        MaskMillError: ``recipe_invalid`` for settings that CLIPSeg does not have, or that contradict each
            other; else see ``pipeline.labelling.clipseg.prompting``.
    """
    import torch

    from models.device import best_device
    from pipeline.labelling.clipseg.labeller import ClipSegLabeller
    from pipeline.labelling.clipseg.model import ClipSegWeights
    from pipeline.labelling.clipseg.prompting import parse_style
    from pipeline.labelling.prepare import PreparedLabeller

    _refuse_settings(recipe)
    resolution = resolution_of(recipe, ontology, options)
    parse_style(options.visual_prompt)
    weights = ClipSegWeights(recipe.pretrained or RELEASED, options.clip, options.extract_layers)
    model = weights.load(device=best_device())
    check_weights(model.fingerprint)
    conditionals, rows = [], []
    for row, class_id in enumerate(resolution.class_ids):
        embedded = class_conditionals(model, ontology, class_id, options)
        conditionals.append(embedded)
        rows += [row] * len(embedded)
    make = functools.partial(
        ClipSegLabeller,
        weights=weights,
        conditionals=torch.cat(conditionals).cpu().numpy(),
        rows=torch.tensor(rows).numpy(),
        resolution=resolution,
        batch_size=recipe.batch_size,
        num_classes=ontology.num_classes,
        ignore_index=ontology.ignore_index,
    )
    described = {"model": recipe.model, "pretrained": weights.weights, "fingerprint": model.fingerprint}
    return PreparedLabeller(make, described)


def resolution_of(recipe: LabelRecipe, ontology: Ontology, options: ClipSegOptions) -> Resolution:
    """Which classes are asked for, and how one label is made of the answers.

    Raises:
        MaskMillError: ``recipe_invalid`` where the background is the rest, and thresholds leave no rest.
    """
    from pipeline.labelling.clipseg.labeller import Resolution

    limits = ontology.thresholds(default=recipe.min_confidence)
    thresholds = [0.0] * ontology.num_classes if limits is None else limits.tolist()
    ids = list(range(ontology.num_classes))
    factors = [1.0] * len(ids)
    none_id, left = ontology.ignore_index, False
    if ontology.background is not None and options.background == "rest":
        ids, none_id, left = ids[1:], 0, True
        boundless = [ontology.names[index] for index in ids if not thresholds[index]]
        if boundless:
            raise WrongUse(
                "recipe_invalid",
                f"There can be no background beside {', '.join(boundless[:5])}: without a threshold "
                f"{'they are' if len(boundless) > 1 else 'it is'} everywhere.",
                "Set min_confidence (the paper has 0.1 to 0.3) or a threshold for each class; or ask for the "
                "background by its words: --set clipseg.background=words.",
            )
    elif ontology.background is not None:
        factors[0] = options.background_factor
    return Resolution(
        class_ids=tuple(ids),
        thresholds=tuple(thresholds[index] for index in ids),
        factors=tuple(factors[index] for index in ids),
        none_id=none_id,
        none_is_a_class=left,
    )


def class_conditionals(model: ClipSeg, ontology: Ontology, class_id: int, options: ClipSegOptions) -> Tensor:
    """What a class is asked with, fp32 (P, E).

    Without examples there is one prompt per word. With examples there is one per example: the picture's
    embedding, mixed with the mean embedding of the words (``text_weight``). Either is made one by its mean
    where the class merges so.

    Raises:
        MaskMillError: see ``pipeline.labelling.clipseg.prompting``; ``example_unreadable`` if a picture is no
        longer the one that
            the ontology was made with.
    """
    from models.clip.templates import get_templates
    from models.clipseg.decoder import mix
    from pipeline.labelling.clipseg.prompting import (
        embed_pictures,
        embed_words,
        parse_style,
        read_picture,
        visual_prompt_of,
    )

    templates = (
        get_templates(ontology.templates) if options.prefix == "ontology" else PREFIXES[options.prefix]
    )
    examples = ontology.examples()[class_id]
    for example in examples:
        example.check_unchanged()
    weight = options.text_weight
    if examples and not weight:
        embedded = None
    else:
        embedded = embed_words(model, ontology.prompts()[class_id], templates)
    if examples:
        style = parse_style(options.visual_prompt, options.example_size)
        pictures = embed_pictures(
            model,
            [
                visual_prompt_of(read_picture(example.image, example.mask), style, options.example_size)
                for example in examples
            ],
        )
        embedded = pictures if embedded is None else mix(embedded.mean(0), pictures, weight)
    assert embedded is not None, "a class has a name"
    return embedded.mean(0, keepdim=True) if ontology.merges()[class_id] == "mean" else embedded


def refuse_examples(ontology: Ontology, model: str) -> None:
    """For Labellers that can only be asked with words.

    Raises:
        MaskMillError: ``model_unsupported`` if a class is given by examples.
    """
    shown = [name for name, given in zip(ontology.names, ontology.examples(), strict=True) if given]
    if shown:
        raise WrongUse(
            "model_unsupported",
            f"{model} reads class names only, and the ontology gives examples for {', '.join(shown[:5])}.",
            "Label with CLIPSeg (--recipe clipseg), or take the examples out of the ontology.",
        )


def changed_maskclip(recipe: LabelRecipe) -> list[str]:
    """Settings of MaskCLIP that a recipe for another model has changed, by dotted name."""
    usual = LabelRecipe().effective()
    changed = recipe.effective()
    return [name for name in usual if name.startswith("maskclip.") and changed[name] != usual[name]]


def _refuse_settings(recipe: LabelRecipe) -> None:
    given = changed_maskclip(recipe)
    if given:
        raise WrongUse(
            "recipe_invalid",
            f"CLIPSeg has no {', '.join(given)}.",
            "Start from --recipe clipseg, and leave these settings out.",
        )
