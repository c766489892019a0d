"""The models behind the page: Labellers whose classes change with each request, and CLIPSeg.

For privacy, nothing is written to disk, not even text embeddings.

Shapes: C classes, D embedding channels, H W pixels of the masks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.clip.loading import Clip
from models.clip.text import TextClassifier, build_text_classifier
from models.clip.weights import find_weights
from pipeline.files.images import ImageSettings, fit
from pipeline.labelling.clipseg.prompting import Finder, levels
from pipeline.labelling.maskclip import MaskClipLabeller
from pipeline.labelling.prepare import load_text_tower, prepare_labeller, student_recipe, student_text_source
from pipeline.labelling.recipes import LabelRecipe
from pipeline.labelling.student import StudentLabeller
from pipeline.ontology.ontology import Ontology
from pipeline.serving.registry import (
    HeatAnswer,
    LabelAnswer,
    Prompt,
    TextPrompt,
    unclaimed,
)
from pipeline.trained.student import read_student_record

OTHER = "something else"
_WORDS_KEPT = 4096


class Words:
    """An in-memory LRU cache of word embeddings.

    Args:
        load: returns the CLIP with its text tower; called for the first unknown word.
        templates: from ``models.clip.templates``.
        known: initial embeddings (D,) by word.
    """

    def __init__(
        self,
        load: Callable[[], Clip],
        templates: str | Sequence[str],
        known: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._load = load
        self._templates = templates
        self._rows: OrderedDict[str, Tensor] = OrderedDict(known or {})

    @cached_property
    def _clip(self) -> Clip:
        return self._load()

    def classifier(self, classes: Sequence[Sequence[str]]) -> TextClassifier:
        """A classifier of C classes with one or more words each; the best-scoring word counts."""
        wanted = list(dict.fromkeys(word for words in classes for word in words))
        fresh = [word for word in wanted if word not in self._rows]
        if fresh:
            made = build_text_classifier(self._clip, [[word] for word in fresh], templates=self._templates)
            self._rows.update(zip(fresh, made.embeddings, strict=True))
        for word in wanted:
            self._rows.move_to_end(word)
        rows = torch.stack([self._rows[word] for words in classes for word in words])
        ids = torch.tensor([index for index, words in enumerate(classes) for _ in words])
        while len(self._rows) > _WORDS_KEPT:
            self._rows.popitem(last=False)
        return TextClassifier(rows, ids, len(classes))


class WordModel:
    """MaskCLIP or a student: the prompts and, as one more class, the context compete for every pixel.

    Args:
        labeller: the Labeller.
        images: its input size.
        words: embeds prompts.
        own: the labeller's own classes; None if it needs prompts. Prompts from these classes, with all of
            them as context, need no text tower and are scored as in training.
    """

    def __init__(
        self,
        labeller: MaskClipLabeller | StudentLabeller,
        images: ImageSettings,
        words: Words,
        own: Ontology | None = None,
    ) -> None:
        self._labeller = labeller
        self._images = images
        self._words = words
        self._own = own

    def predict(
        self,
        image: NDArray[np.uint8],
        prompts: Sequence[Prompt],
        context: Sequence[str],
        size: tuple[int, int],
    ) -> LabelAnswer:
        """See ``pipeline.serving.registry.ServedModel``."""
        names = [prompt.text for prompt in prompts if isinstance(prompt, TextPrompt)]
        own = self._own.names if self._own is not None else ()
        if self._own is not None and set(names) <= set(own) and (not names or tuple(context) == own):
            labels, confidence = self._label(None, image, size)
            if names:
                place = np.full(len(own), len(names), np.uint8)
                place[[own.index(name) for name in names]] = np.arange(len(names))
                return LabelAnswer((*names, OTHER), place[labels], confidence, other=len(names))
            colors = tuple(f"#{r:02x}{g:02x}{b:02x}" for r, g, b in self._own.palette().tolist())
            background = 0 if self._own.background is not None else None
            return LabelAnswer(own, labels, confidence, other=background, colors=colors)
        others = unclaimed(context, prompts)
        classes = [[name] for name in names] + ([list(others)] if others else [])
        labels, confidence = self._label(self._words.classifier(classes), image, size)
        if not others:
            return LabelAnswer(tuple(names), labels, confidence)
        return LabelAnswer((*names, OTHER), labels, confidence, other=len(names))

    def _label(
        self, text: TextClassifier | None, image: NDArray[np.uint8], size: tuple[int, int]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        if isinstance(self._labeller, StudentLabeller):
            self._labeller.set_text(text)
        else:
            assert text is not None, "a teacher has no classes without prompts"
            self._labeller.set_text(text)
        (found,) = self._labeller.label([fit(image, self._images)], [size])
        return found.labels, found.confidence


class HeatModel:
    """CLIPSeg: a probability map for each text or example prompt, as in ``maskmill segment``."""

    def __init__(self, finder: Finder) -> None:
        self._finder = finder

    def predict(
        self,
        image: NDArray[np.uint8],
        prompts: Sequence[Prompt],
        context: Sequence[str],
        size: tuple[int, int],
    ) -> HeatAnswer:
        """See ``pipeline.serving.registry.ServedModel``."""
        asked = [
            (prompt.text, None)
            if isinstance(prompt, TextPrompt)
            else (None, self._finder.show(prompt.picture))
            for prompt in prompts
        ]
        maps = self._finder.find(image, self._finder.embed(asked), size)
        heat = np.stack([levels(p) for p in maps])
        names = tuple(p.text if isinstance(p, TextPrompt) else p.name for p in prompts)
        return HeatAnswer(names, heat)


def load_teacher(recipe: LabelRecipe, context: Ontology) -> WordModel:
    """Load MaskCLIP for prompts.

    Args:
        recipe: its recipe.
        context: the default context words, one per class; embedded now rather than with the first image.

    Raises:
        MaskMillError: as ``prepare_labeller``.
    """
    prepared = prepare_labeller(recipe.replace(min_confidence=0.0), context)
    labeller = prepared.build()
    assert isinstance(labeller, MaskClipLabeller), "served by a recipe that names a CLIP"
    tower = load_text_tower(find_weights(recipe.model, recipe.pretrained), prepared.precision)
    known = dict(zip(context.names, labeller.text.embeddings, strict=True))
    return WordModel(labeller, recipe.images, Words(lambda: tower, context.templates, known))


def load_student(uri: str) -> WordModel:
    """Load a trained student, for its own classes and for prompts.

    Raises:
        MaskMillError: as ``prepare_labeller``.
    """
    recipe, ontology = student_recipe(uri)
    labeller = prepare_labeller(recipe, ontology).build()
    assert isinstance(labeller, StudentLabeller), "that is what the folder holds"
    record = read_student_record(uri)
    words = Words(
        lambda: load_text_tower(student_text_source(record), record.text["precision"]), ontology.templates
    )
    return WordModel(labeller, record.labelling, words, ontology)


def load_clipseg(finder: Finder) -> HeatModel:
    """Load CLIPSeg.

    Raises:
        MaskMillError: as ``Finder.model``.
    """
    assert finder.model is not None, "loads it"
    return HeatModel(finder)
