"""Training samples from two label tables: one that is believed, and one whose labels are guesses.

This is truth for some images, some classes or some pixels, and pseudo-labels for the rest. Nothing is
written: the samples are a view of both tables. Where the *known* table has a class for a pixel, that is the
truth of the sample; everything else is to be guessed, and the other table is the teacher. An image may be in
either table or in both; the same image has the same id.

The table of guesses is read in its own order, part by part; the known one is looked up by id.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.errors import WrongUse
from pipeline.training.loop.protocols import GUESS, IGNORED, Sample
from pipeline.training.samples.augment import augment
from pipeline.training.samples.table import FILL, TableSamples, Whole, columns

_NO_ROW = -1


@dataclass(frozen=True, eq=False)
class MixedSamples:
    """``pipeline.training.loop.protocols.Samples`` over two tables; see ``mix``.

    Samples are those of ``guessed``, then those of ``known`` whose image only that has. Their columns are
    those of ``TableSamples``.

    Attributes:
        guessed: the teacher's labels.
        known: the labels that are believed.
        known_of: int64: sample of ``known`` with the image of each sample of ``guessed``; -1 if there is
            none.
        only_known: int64: samples of ``known`` whose image ``guessed`` does not have.
        complete: bool (C,): classes that are nowhere else in an image that ``known`` has.
        left_out: number of rows that are not used, by reason.
    """

    guessed: TableSamples
    known: TableSamples
    known_of: npt.NDArray[np.int64]
    only_known: npt.NDArray[np.int64]
    complete: npt.NDArray[np.bool_]
    left_out: dict[str, int]

    @property
    def num_images(self) -> int:
        """Number of distinct samples."""
        return len(self.known_of) + len(self.only_known)

    @property
    def num_known(self) -> int:
        """Number of samples with known labels."""
        return int(np.count_nonzero(self.known_of != _NO_ROW)) + len(self.only_known)

    @property
    def place_of_known(self) -> npt.NDArray[np.int64]:
        """Index here of each sample of ``known``."""
        place = np.full(self.known.num_images, _NO_ROW)
        has = np.flatnonzero(self.known_of != _NO_ROW)
        place[self.known_of[has]] = has
        place[self.only_known] = len(self.known_of) + np.arange(len(self.only_known))
        return place

    def order(self, epoch: int, seed: int) -> npt.NDArray[np.int64]:
        """Indices of one epoch: each table keeps its order, and the two are evenly interleaved."""
        first = self.guessed.order(epoch, seed)
        place = np.full(self.known.num_images, _NO_ROW)
        place[self.only_known] = len(self.known_of) + np.arange(len(self.only_known))
        second = place[self.known.order(epoch, seed)]
        second = second[second != _NO_ROW]
        ranks = [(np.arange(len(part)) + 0.5) / max(len(part), 1) for part in (first, second)]
        mixed: npt.NDArray[np.int64] = np.concatenate([first, second])
        return mixed[np.argsort(np.concatenate(ranks), kind="stable")]

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        """Read and augment one sample; see ``TableSamples.load``."""
        found = self.read(index)
        labels, teacher = found.maps["labels"], found.maps["teacher"]
        # What makes a crop varied are the classes that are learned there, from whichever table.
        judged = found.maps | {"judged": np.where(labels >= 0, labels, teacher)}
        image, maps = augment(
            found.image, judged, fill={**FILL, "judged": IGNORED}, settings=self.guessed.augment, rng=rng,
            categories=("judged",),
        )  # fmt: skip
        del maps["judged"]
        return columns(image, maps, found.id)

    def read(self, index: int) -> Whole:
        """Read one sample whole, before augmentation.

        Raises:
            MaskMillError: as ``TableSamples.load``; ``image_invalid`` if the two tables are of different
                images of that name, ``mask_invalid`` if they differ in its size.
        """
        count = len(self.known_of)
        if index >= count:
            found = self.known.read(int(self.only_known[index - count]))
            return found._replace(maps=found.maps | _believed(found.maps["teacher"]))
        found = self.guessed.read(index)
        at = int(self.known_of[index])
        if at == _NO_ROW:
            return found
        hashes = {
            table.read_row(number)["sha256"] for table, number in ((self.guessed, index), (self.known, at))
        }
        if len(hashes - {None}) > 1:
            uri = self.guessed.read_row(index)["uri"]
            raise WrongUse(
                "image_invalid",
                f"{uri} was another image when {self.known.storage.uri} was made: its known labels are those "
                "of another image.",
                "Make them anew, or leave its row out.",
            )
        return found._replace(maps=found.maps | self._merged(index, found.maps["teacher"], at))

    def _merged(
        self, index: int, guesses: npt.NDArray[np.int32], at: int
    ) -> dict[str, npt.NDArray[np.int32]]:
        """Labels and teacher of an image that both tables have.

        Args:
            index: sample of ``guessed``, for errors.
            guesses: its classes, (H, W).
            at: sample of ``known``.
        """
        row = self.known.read_row(at)
        truth = self.known.teacher[self.known.maps(row)[0]]
        if truth.shape != guesses.shape:
            raise WrongUse(
                "mask_invalid",
                f"{row['uri']} has {truth.shape[0]} x {truth.shape[1]} pixels in {self.known.storage.uri}, "
                f"and {guesses.shape[0]} x {guesses.shape[1]} in {self.guessed.storage.uri}.",
                "Label the image anew, or give the known labels that belong to it.",
            )
        elsewhere = self.complete[np.maximum(guesses, 0)] & (guesses >= 0)
        return _believed(truth) | {"teacher": np.where(elsewhere, IGNORED, guesses).astype(np.int32)}

    def blank(self) -> Sample:
        """See ``TableSamples.blank``."""
        return self.guessed.blank()

    def class_frequencies(self) -> npt.NDArray[np.float64]:
        """Share of each class in what is learned: (C,), with sum 1.

        Reads the labels of all images that both tables have.
        """
        pixels = self.guessed.pixels + self.known.pixels
        for index in np.flatnonzero(self.known_of != _NO_ROW).tolist():
            guesses = self.guessed.teacher[self.guessed.maps(self.guessed.read_row(index))[0]]
            maps = self._merged(index, guesses, int(self.known_of[index]))
            kept = (maps["labels"] < 0) & (maps["teacher"] >= 0)
            pixels = pixels - np.bincount(guesses[(guesses >= 0) & ~kept], minlength=len(pixels))
        return np.asarray(pixels / max(int(pixels.sum()), 1), dtype=np.float64)


def _believed(classes: npt.NDArray[np.int32]) -> dict[str, npt.NDArray[np.int32]]:
    return {"labels": np.where(classes >= 0, classes, GUESS).astype(np.int32)}


def mix(
    guessed: TableSamples, known: TableSamples, *, complete: bool = False, whole: bool = False
) -> MixedSamples:
    """Train on two tables; both opened annotation-free, with the same classes.

    Args:
        guessed: the teacher's labels.
        known: labels that are believed.
        complete: in an image that ``known`` has, its classes are nowhere but where it says so: guesses of
            them are ignored. Without it, they fill the pixels that ``known`` ignores.
        whole: in an image that ``known`` has, nothing is guessed.
    """
    assert guessed.num_classes == known.num_classes and guessed.augment == known.augment
    order = np.argsort(known.ids)
    at = np.minimum(np.searchsorted(known.ids[order], guessed.ids), len(order) - 1)
    found = order[at]
    known_of = np.where(known.ids[found] == guessed.ids, found, _NO_ROW).astype(np.int64)
    only_known = np.flatnonzero(~np.isin(known.ids, guessed.ids)).astype(np.int64)
    has = np.zeros(known.num_classes, np.bool_)
    has[known.teacher[known.teacher >= 0]] = complete
    has |= whole
    left_out = guessed.left_out | {f"known, {why}": count for why, count in known.left_out.items()}
    return MixedSamples(guessed, known, known_of, only_known, has, left_out)
