"""Triplets from the toy world: its classes by name, colour and pattern, and the number of things.

A scene does not record the colour of its individuals, so the mean colour of their pixels decides. Scenes are
analysed at 64 pixels, at which they show the same picture, and read at the dataset's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from models.errors import WrongUse
from pipeline.datasets.toy import ToyDataset, ToySample
from pipeline.toyworld import scenes as toyworld
from pipeline.toyworld.captions import CLASSES, COLOURS, THINGS
from pipeline.toyworld.phrases import PATTERN_WORDS
from pipeline.toyworld.scenes import VISIBLE_SHARE
from pipeline.training.clipseg.sources.base import OBJECT, OTHER, Example, Pairs, TripletSource, fingerprint

Kind = Literal["names", "coloured", "colours", "patterns", "counts"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_SIDE = 64
_COUNTS = ("one thing", "two things", "three things")
# Mean RGB of individuals by colour word, measured on scenes. Lighting varies, so only ratios are compared.
_LOOKS: Mapping[str, Mapping[str, tuple[float, float, float]]] = {
    "brick": {"red": (0.69, 0.35, 0.26), "gray": (0.55, 0.55, 0.56)},
    "sky": {"blue": (0.49, 0.71, 0.94), "pink": (0.82, 0.59, 0.73)},
    "ladybug": {"red": (0.37, 0.12, 0.12), "yellow": (0.38, 0.26, 0.12)},
    "leaf": {"green": (0.41, 0.65, 0.34), "red": (0.76, 0.35, 0.18), "yellow": (0.88, 0.75, 0.31)},
    "fish": {"silver": (0.53, 0.58, 0.62), "blue": (0.23, 0.40, 0.70), "purple": (0.53, 0.29, 0.61)},
    "chessboard": {"black and white": (0.49, 0.46, 0.43), "brown": (0.62, 0.46, 0.31)},
    "cloud": {"white": (0.87, 0.89, 0.91), "gray": (0.70, 0.73, 0.77)},
}


@dataclass(frozen=True, eq=False)
class ToySource(TripletSource):
    """See ``open_toy_source``."""

    _dataset: ToyDataset
    _samples: tuple[ToySample, ...]
    _meant: npt.NDArray[np.bool_]  # (N, classes): the classes that a pair's phrase means in its scene

    def read(self, pair: int) -> Example:
        """See ``TripletSource.read``."""
        scene = _scene(
            self._dataset.seed, self._samples[int(self.pairs.image[pair])].index, self._dataset.size
        )
        mask = np.where(self._meant[pair][scene.labels], OBJECT, OTHER)
        return Example(scene.image, mask.astype(np.uint8))


def open_toy_source(
    dataset: ToyDataset, *, kinds: Sequence[Kind] = KINDS, class_ids: Sequence[int] | None = None
) -> ToySource:
    """Open pairs of toy scenes and phrases. Draws every scene once, at 64 pixels.

    A class below ``pipeline.toyworld.scenes.VISIBLE_SHARE`` of the picture is neither asked for nor a
    negative, and a scene with such a small thing has no count phrase.

    Args:
        dataset: from ``pipeline.datasets.toy.open_toyworld``.
        kinds: kinds of phrases: ``names`` ("ladybug"); ``coloured``, for classes that vary in colour ("red
            ladybug"); ``colours`` ("something red": all classes that are red in this scene); ``patterns``
            ("something striped"); ``counts`` ("two things": all things of a scene that has two).
        class_ids: classes to train on; None is all. A phrase that means another class in a scene is neither
            asked for there nor a negative, so the model never sees a name of such a class.

    Raises:
        MaskMillError: ``wrong_use`` for an unknown kind; ``too_few_images``.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise WrongUse(
            "wrong_use",
            f"{', '.join(unknown) or 'Nothing'} is not a kind of toy phrase.",
            f"Use some of {', '.join(KINDS)}.",
        )
    samples = tuple(sample for sample in dataset.samples if isinstance(sample, ToySample))
    everything = range(len(CLASSES)) if class_ids is None else class_ids
    unseen = ~np.isin(np.arange(len(CLASSES)), list(everything))
    texts: dict[str, int] = {}
    images: list[int] = []
    phrases: list[int] = []
    meant: list[npt.NDArray[np.bool_]] = []
    unsure: list[tuple[int, int]] = []
    for image, sample in enumerate(samples):
        scene = toyworld.scene(dataset.seed, sample.index, _SIDE)
        area = np.bincount(scene.labels.ravel(), minlength=len(CLASSES)) / scene.labels.size
        visible = area >= VISIBLE_SHARE
        for text, classes, sure in _phrases(scene, visible, area > 0, kinds):
            number = texts.setdefault(text, len(texts))
            if sure and (classes & visible).any() and not (classes & unseen).any():
                images.append(image)
                phrases.append(number)
                meant.append(classes)
            else:
                unsure.append((image, number))
    return ToySource(
        name=f"{dataset.name} {dataset.split}",
        fingerprint=fingerprint(dataset.fingerprint(), [sorted(kinds), sorted(everything)]),
        pairs=Pairs.of([(text,) for text in texts], images, phrases, unsure=unsure),
        _dataset=dataset.reader(),
        _samples=samples,
        _meant=np.array(meant),
    )


def _phrases(
    scene: toyworld.Scene,
    visible: npt.NDArray[np.bool_],
    present: npt.NDArray[np.bool_],
    kinds: Sequence[Kind],
) -> Iterator[tuple[str, npt.NDArray[np.bool_], bool]]:
    """Phrases that are or may be true of a scene, the classes they mean, and whether they are surely true."""
    names = {CLASSES[number]: bool(visible[number]) for number in np.flatnonzero(present).tolist()}
    looks = {name: _look(scene, name) for name, seen in names.items() if seen}
    for name, seen in names.items():
        if "names" in kinds:
            yield name, _marked(name), seen
        if "coloured" in kinds and name in _LOOKS:
            for colour in (looks[name],) if seen else _LOOKS[name]:
                yield f"{colour} {name}", _marked(name), seen
    if "colours" in kinds:
        # A class too small to judge may have any of its colours.
        doubtful = {colour for name, seen in names.items() if not seen for colour, _ in COLOURS[name]}
        for colour in sorted({*looks.values(), *doubtful}):
            same = [name for name, look in looks.items() if look == colour]
            yield f"something {colour}", _marked(*same), colour not in doubtful
    if "patterns" in kinds:
        for text, name in PATTERN_WORDS.items():
            if name in names:
                yield text, _marked(name), names[name]
    if "counts" in kinds:
        things = [name for name in THINGS if name in names]
        clear = sum(names[name] for name in things)
        for count in range(max(clear, 1), len(things) + 1):
            yield _COUNTS[count - 1], _marked(*things), clear == len(things)


def kind_of(phrase: str) -> Kind:
    """The kind of a phrase from ``open_toy_source``."""
    if phrase in CLASSES:
        return "names"
    if phrase in _COUNTS:
        return "counts"
    if phrase in PATTERN_WORDS:
        return "patterns"
    return "colours" if phrase.startswith("something ") else "coloured"


@lru_cache(maxsize=64)
def _scene(seed: int, index: int, size: int) -> toyworld.Scene:
    """Draw a scene; cached because grouped phrases of an image follow each other. Read-only."""
    return toyworld.scene(seed, index, size)


def _look(scene: toyworld.Scene, name: str) -> str:
    """The colour word of a class in a scene."""
    if name not in _LOOKS:
        return COLOURS[name][0][0]
    mean = scene.image[scene.labels == CLASSES.index(name)].mean(0)
    looks = _LOOKS[name]

    def distance(word: str) -> float:
        colour = np.array(looks[word])
        return float(np.square(mean / mean.sum() - colour / colour.sum()).sum())

    return min(looks, key=distance)


def _marked(*names: str) -> npt.NDArray[np.bool_]:
    return np.isin(CLASSES, names)
