"""Teacher, student and CLIPSeg behind the interface of ``pipeline.serving.models``.

Nothing is kept on disk, text embeddings neither: the words of strangers are not this machine's business.

Shapes: C classes, P prompts, D embedding channels, H W pixels of the masks, h w grid.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.clip.loading import Clip, load_clip
from models.clip.text import TextClassifier, build_text_classifier
from models.device import DTYPES, best_device
from models.errors import WrongUse
from models.labelmap import label_map
from models.maskclip import MaskClip
from models.settings import MaskClipSettings
from pipeline.files.images import ImageSettings, resize, target_size
from pipeline.labelling.clipseg.labeller import stretched
from pipeline.labelling.clipseg.model import VISUAL_PROMPT, ClipSegWeights
from pipeline.labelling.clipseg.prompting import (
    Picture,
    embed_prompts,
    parse_style,
    probability_maps,
    visual_prompt_of,
)
from pipeline.serving.models import (
    HeatAnswer,
    ImagePrompt,
    LabelAnswer,
    Prompt,
    TextPrompt,
    unclaimed,
)
from pipeline.trained.student import StudentRecord, load_student

OTHER = "something else"
_WORDS_KEPT = 4096


class Words:
    """Embeddings of single words, kept in memory, least recently used out first.

    Args:
        clip: with its text tower.
        templates: of ``models.clip.templates``.
    """

    def __init__(self, clip: Clip, templates: str | Sequence[str]) -> None:
        self._clip = clip
        self._templates = templates
        self._rows: OrderedDict[str, Tensor] = OrderedDict()

    def classifier(self, classes: Sequence[Sequence[str]]) -> TextClassifier:
        """A classifier of C classes with one or more words each, merged by their best."""
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


class Teacher:
    """MaskCLIP without training: the prompts and, as one more class, the context compete for every pixel.

    Args:
        model, pretrained: as ``models.clip.loading.load_clip``.
        settings: how the CLIP is read.
        templates: of ``models.clip.templates``.
        sizes: how images are resized before the network sees them.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        warm: words that will be asked for: embedded now, not with the first image.
    """

    def __init__(
        self,
        *,
        model: str,
        pretrained: str | None,
        settings: MaskClipSettings,
        templates: str | Sequence[str],
        sizes: ImageSettings,
        precision: str = "fp32",
        warm: Sequence[str] = (),
    ) -> None:
        self._clip = load_clip(model, pretrained, device=best_device(), dtype=DTYPES[precision])
        self._config = settings
        self._sizes = sizes
        self._words = Words(self._clip, templates)
        if warm:
            self._words.classifier([[word] for word in warm])

    @torch.inference_mode()
    def predict(
        self,
        image: NDArray[np.uint8],
        prompts: Sequence[Prompt],
        context: Sequence[str],
        size: tuple[int, int],
    ) -> LabelAnswer:
        """See ``pipeline.serving.models.ServedModel``."""
        names, others = _texts(prompts), unclaimed(context, prompts)
        maskclip = MaskClip(self._clip, self._words.classifier(_classes(names, others)), self._config)
        seen = fit(image, self._sizes)
        labels, confidence = label_map(
            maskclip.grid_scores(_batch(seen))[0],
            network_size=(seen.shape[0], seen.shape[1]),
            image_size=size,
            temperature=maskclip.confidence_temperature,
        )
        return _competing(names, others, labels.cpu().numpy(), confidence.cpu().numpy())


class Student:
    """A trained student: its own classes, or any words.

    Its own words, against its own classes, need no text tower, and are scored by the classifier that it was
    trained with. For others the CLIP of its training is loaded when they are first asked for.

    Args:
        record: of the student's folder.
        precision: ``fp32``, ``bf16`` or ``fp16``.
    """

    def __init__(self, record: StudentRecord, *, precision: str = "fp32") -> None:
        self._record = record
        self._device = best_device()
        self._model = load_student(record, device=self._device, dtype=DTYPES[precision])
        self._own = self._model.text
        ontology = record.ontology
        self._names = ontology.names
        self._colors = tuple(f"#{r:02x}{g:02x}{b:02x}" for r, g, b in ontology.palette().tolist())
        self._background = 0 if ontology.background is not None else None
        self._words: Words | None = None

    @torch.inference_mode()
    def predict(
        self,
        image: NDArray[np.uint8],
        prompts: Sequence[Prompt],
        context: Sequence[str],
        size: tuple[int, int],
    ) -> LabelAnswer:
        """See ``pipeline.serving.models.ServedModel``."""
        names = _texts(prompts)
        if not names:
            labels, confidence = self._label(self._own, image, size)
            return LabelAnswer(self._names, labels, confidence, other=self._background, colors=self._colors)
        if set(names) <= set(self._names) and tuple(context) == self._names:
            labels, confidence = self._label(self._own, image, size)
            place = np.full(len(self._names), len(names), np.uint8)
            place[[self._names.index(name) for name in names]] = np.arange(len(names))
            return LabelAnswer((*names, OTHER), place[labels], confidence, other=len(names))
        others = unclaimed(context, prompts)
        text = self._open_vocabulary().classifier(_classes(names, others))
        labels, confidence = self._label(text, image, size)
        return _competing(names, others, labels, confidence)

    def _open_vocabulary(self) -> Words:
        if self._record.config.get("learned_background"):
            raise WrongUse(
                "classes_differ",
                "This student has learned what background is among its own classes; it takes no others.",
                f"Use its classes: {', '.join(self._names)}.",
            )
        if self._words is None:
            text = self._record.text
            clip = load_clip(text["model"], text["pretrained"], device=self._device)
            self._words = Words(clip, self._record.ontology.templates)
        return self._words

    def _label(
        self, text: TextClassifier, image: NDArray[np.uint8], size: tuple[int, int]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        self._model.set_classifier(text)
        seen = fit(image, self._record.labelling)
        scores = self._model.grid_logits(self._model.features(_batch(seen).to(self._device)))[0].float()
        labels, confidence = label_map(
            scores, network_size=(seen.shape[0], seen.shape[1]), image_size=size, temperature=1.0
        )
        return labels.cpu().numpy(), confidence.cpu().numpy()


class PromptModel:
    """CLIPSeg: a probability map for each prompt, text or example, as ``maskmill segment`` makes them.

    Args:
        weights: which one.
        precision: ``fp32``, ``bf16`` or ``fp16``.
    """

    def __init__(self, weights: ClipSegWeights, *, precision: str = "fp32") -> None:
        self._model = weights.load(device=best_device(), dtype=DTYPES[precision])
        self._size, self._example_size = weights.sizes()
        self._style = parse_style(VISUAL_PROMPT, self._example_size)

    @torch.inference_mode()
    def predict(
        self,
        image: NDArray[np.uint8],
        prompts: Sequence[Prompt],
        context: Sequence[str],
        size: tuple[int, int],
    ) -> HeatAnswer:
        """See ``pipeline.serving.models.ServedModel``."""
        asked = [
            (prompt.text, None) if isinstance(prompt, TextPrompt) else (None, self._shown(prompt))
            for prompt in prompts
        ]
        found = probability_maps(self._model, image, embed_prompts(self._model, asked), size=self._size)
        heat = stretched(found, size).clamp(0, 1).mul(255).round().to(torch.uint8)
        names = tuple(p.text if isinstance(p, TextPrompt) else p.name for p in prompts)
        return HeatAnswer(names, heat.cpu().numpy())

    def _shown(self, prompt: ImagePrompt) -> Tensor:
        return visual_prompt_of(Picture(prompt.image, prompt.mask), self._style, self._example_size)


def fit(image: NDArray[np.uint8], sizes: ImageSettings) -> NDArray[np.uint8]:
    """The image at the size at which the network sees it."""
    size = target_size(image.shape[0], image.shape[1], scale=sizes.scale, keep_ratio=sizes.keep_ratio)
    return resize(image, size, method=sizes.resize)


def _classes(names: Sequence[str], others: Sequence[str]) -> list[list[str]]:
    """A class for each name, and one for all others."""
    return [[name] for name in names] + ([list(others)] if others else [])


def _competing(
    names: Sequence[str],
    others: Sequence[str],
    labels: NDArray[np.uint8],
    confidence: NDArray[np.uint8],
) -> LabelAnswer:
    if not others:
        return LabelAnswer(tuple(names), labels, confidence)
    return LabelAnswer((*names, OTHER), labels, confidence, other=len(names))


def _batch(image: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]


def _texts(prompts: Sequence[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts if isinstance(prompt, TextPrompt)]
