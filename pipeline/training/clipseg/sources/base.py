"""The interface of CLIPSeg's data sources: pairs of an image and a phrase that is true of it.

To add a source, write a module next to this one with a ``TripletSource`` and a function that opens it from a
dataset of ``pipeline.datasets``, then add a line to ``pipeline.training.clipseg.data.SOURCES``.

Shapes: N pairs, P phrases, H W pixels.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from models.errors import WrongUse

OBJECT, OTHER, IGNORED = 1, 0, 255
"""Values of a mask."""

_Ids = npt.NDArray[np.int64]


class Example(NamedTuple):
    """Image and mask of a pair.

    Attributes:
        image: uint8 (H, W, 3) RGB.
        mask: uint8 (H, W): ``OBJECT`` where the phrase is true, else ``OTHER`` or ``IGNORED``.
        weight: float32 (H, W), weight of each pixel in the loss; None is 1 everywhere.
    """

    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.uint8]
    weight: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, eq=False)
class Pairs:
    """Which phrase is true of which image. Every phrase has a pair; create it with ``Pairs.of``.

    Attributes:
        phrases: P phrases, each a tuple of wordings that mean the same.
        image: int64 (N,): index of the image.
        phrase: int64 (N,): index of the phrase.
        block: int64 (N,): pairs of one block are read together, so a second one costs nothing.
        unsure: int64 (n, 2): image and phrase that are not paired, though the phrase may be true.
        seam: in joined sources (``pipeline.training.clipseg.sources.joined``), the first image and the first
            phrase of the second source.
    """

    phrases: tuple[tuple[str, ...], ...]
    image: _Ids
    phrase: _Ids
    block: _Ids
    unsure: _Ids
    seam: tuple[int, int] | None = None

    @classmethod
    def of(
        cls,
        phrases: Sequence[Sequence[str]],
        image: npt.ArrayLike,
        phrase: npt.ArrayLike,
        *,
        block: npt.ArrayLike | None = None,
        unsure: npt.ArrayLike = (),
    ) -> Pairs:
        """Build pairs. Phrases without a pair are dropped: they would only ever be negatives.

        Raises:
            MaskMillError: ``too_few_images``.
        """
        images, numbers = np.asarray(image, np.int64), np.asarray(phrase, np.int64)
        if not len(images):
            raise WrongUse(
                "too_few_images",
                "There is no pair of an image and a phrase that is true of it.",
                "Give images that show the classes or phrases, or exclude fewer of them.",
            )
        used, renumbered = np.unique(numbers, return_inverse=True)
        doubtful = np.asarray(unsure, np.int64).reshape(-1, 2)
        doubtful = doubtful[np.isin(doubtful[:, 1], used)]
        doubtful[:, 1] = np.searchsorted(used, doubtful[:, 1])
        blocks = np.zeros_like(images) if block is None else np.asarray(block, np.int64)
        texts = tuple(tuple(phrases[number]) for number in used.tolist())
        return cls(texts, images, renumbered.astype(np.int64), blocks, doubtful)

    def __len__(self) -> int:
        return len(self.image)

    def members(self, phrase: int) -> _Ids:
        """Indices of a phrase's pairs, ascending."""
        order, starts = self._by_phrase
        return order[starts[phrase] : starts[phrase + 1]]

    def may_hold(self, image: int, phrase: int) -> bool:
        """Whether a phrase is, or could be, true of an image.

        That holds for pairs, for unsure ones, and if all words of the phrase occur in a true one: a "red car"
        is a "car". In joined sources it holds for every phrase of the other source.
        """
        if self.seam is not None and (image >= self.seam[0]) != (phrase >= self.seam[1]):
            return True
        order, starts = self._by_image
        held = order[np.searchsorted(starts, image) : np.searchsorted(starts, image, "right")].tolist()
        if phrase in held:
            return True
        asked = [self._words[text] for text in self.phrases[phrase]]
        return any(
            words <= self._words[text] for words in asked for number in held for text in self.phrases[number]
        )

    @cached_property
    def _by_phrase(self) -> tuple[_Ids, _Ids]:
        """Pairs ordered by phrase, and the offset of each phrase."""
        order = np.argsort(self.phrase, kind="stable")
        return order, np.searchsorted(self.phrase[order], np.arange(len(self.phrases) + 1))

    @cached_property
    def _by_image(self) -> tuple[_Ids, _Ids]:
        """Phrases ordered by image, including unsure ones, and their images."""
        image = np.concatenate([self.image, self.unsure[:, 0]])
        phrase = np.concatenate([self.phrase, self.unsure[:, 1]])
        order = np.argsort(image, kind="stable")
        return phrase[order], image[order]

    @cached_property
    def _words(self) -> dict[str, frozenset[str]]:
        return {text: frozenset(text.casefold().split()) for texts in self.phrases for text in texts}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


@dataclass(frozen=True, eq=False)
class TripletSource(ABC):
    """Pairs that can be read. Pickled and sent to every loader process, so it holds paths, not pixels.

    Attributes:
        name: its name in records.
        fingerprint: hash of the data it reads, for records.
        left_out: number of images that it does not use, by reason.
    """

    name: str
    fingerprint: str
    pairs: Pairs
    left_out: Mapping[str, int] = field(default_factory=dict, kw_only=True)

    @abstractmethod
    def read(self, pair: int) -> Example:
        """Read image and mask of a pair.

        Raises:
            MaskMillError: it cannot be read; training counts and skips it.
        """

    def order(self, epoch: int, seed: int, *, grouped: bool = False) -> _Ids:
        """Pairs of an epoch, see ``Samples.order``; ``grouped`` as in ``TripletSettings``."""
        if grouped:
            images, number = np.unique(self.pairs.image, return_inverse=True)
            rank = np.random.default_rng((seed, 0)).permutation(len(images))
            return np.argsort(rank[number], kind="stable")
        return np.random.default_rng((seed, epoch)).permutation(len(self.pairs))


def fingerprint(*parts: Any) -> str:
    """SHA-256 (hex) of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()
