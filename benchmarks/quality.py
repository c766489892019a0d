"""How well the scores of a label table rank images and segments by what the truth says of their labels.

Scores: the column ``quality`` (mean over classes of their confidence), softmin (what older versions
stored), the column ``agreement`` (with a second reading: ``--set agreement=size`` or ``flip``), for a student
also the agreement with its teacher, and means of ranks. An image's labels are right to the mean IoU over the
classes in its truth or its labels, a segment (all pixels of a class in an image) to its IoU.

In the toy world, the toy CLIP and a student of it label scenes that neither has seen. The photographs are
labelled by the same toy CLIP, unless ``--model`` names another. Students and scores are kept in ``--output``:
a student that is there already is not trained again.

    python -m benchmarks.quality --output out/
    python -m benchmarks.quality --output out/ --seeds 0 --photographs VOC2012/
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from benchmarks.toytables import draw_scenes, label_folder
from jobs.train.maskclip_plus import TrainMaskClipPlus
from jobs.train.run import TrainOptions
from pipeline.datasets.voc import open_voc
from pipeline.labelling.single import load_labeller
from pipeline.metrics.confusion import confusion_matrix, iou_per_class, mean_iou
from pipeline.metrics.estimation import Estimate, regression_estimate, sample_estimate
from pipeline.metrics.ranking import aurc, auroc, rank_correlation, rank_mean
from pipeline.ontology.ontology import Ontology
from pipeline.ontology.reading import load_ontology
from pipeline.table.statistics import agreement, quality, segments, softmin
from pipeline.toyworld.scenes import generate

SAMPLE, DRAWS = 50, 400
"""Images with truth that an estimate is made from, and how often they are drawn."""
Pairs = Iterable[tuple[np.ndarray, np.ndarray]]
"""Images (H, W, 3) and their truth (H, W)."""


@dataclass(frozen=True)
class Benchmark:
    """Rank images without their truth.

    Attributes:
        output: folder for students and what they learn from.
        seeds: of the toy world, with other scenes and another student for each.
        first: the first of them.
        images: scenes that a student learns from.
        test: scenes to rank.
        size: of a scene in pixels.
        steps: of a student's training.
        models: which are to label the scenes.
        photographs: also a folder of PASCAL VOC 2012: its training and validation images.
        most: of these, the first.
        model: recipe that labels the photographs.
        flip: whether photographs are read mirrored, too.
    """

    output: Path
    seeds: int = 3
    first: int = 0
    images: int = 400
    test: int = 120
    size: int = 128
    steps: int = 1000
    models: tuple[Literal["toy CLIP", "student"], ...] = ("toy CLIP", "student")
    photographs: Path | None = None
    most: int = 1_000_000
    model: str = "toy"
    flip: bool = True

    def run(self) -> None:
        """Print tables in Markdown."""
        toyworld = load_ontology("toyworld")
        self.output.mkdir(parents=True, exist_ok=True)
        for seed in range(self.first, self.first + self.seeds):
            scenes = generate(1000 + seed, self.test, self.size)
            pairs = list(zip(scenes.images, scenes.labels, strict=True))
            if "toy CLIP" in self.models:
                self._tell(f"toy CLIP, seed {seed}", measured("toy", toyworld, pairs))
            if "student" in self.models:
                student = str(self._student(seed))
                self._tell(f"student, seed {seed}", measured(student, toyworld, pairs, teacher="toy"))
        if self.photographs is not None:
            self._tell(f"{self.model}, photographs", self._photographs(str(self.photographs)))

    def _photographs(self, folder: str) -> Ranked:
        sets = [open_voc(folder, split=split, classes="voc21") for split in ("train", "val")]
        samples = [(one, sample) for one in sets for sample in one.samples][: self.most]
        pairs = ((one.image(sample), one.truth(sample)) for one, sample in samples)
        return measured(self.model, load_ontology("voc21"), pairs, flip=self.flip)

    def _tell(self, title: str, found: Ranked) -> None:
        report(title, found)
        name = title.replace(", ", "-").replace(" ", "-")
        np.savez(self.output / f"{name}.npz", right=found.right, **found.images)  # type: ignore[arg-type]

    def _student(self, seed: int) -> Path:
        """A student of the toy CLIP."""
        place = self.output / f"seed-{seed}"
        if (place / "student").is_dir():
            return place / "student"
        draw_scenes(place, self.images, self.size, seed=2000 + seed)
        TrainMaskClipPlus(
            labels=label_folder(place / "images", place / "table"),
            recipe="toy",
            settings=(f"iterations={self.steps}", f"seed={seed}"),
            options=TrainOptions(output=str(place / "student"), tracking="off"),
        ).run()
        return place / "student"


@dataclass(frozen=True)
class Ranked:
    """Scores, and what is right.

    Attributes:
        images: scores of the images by name, (N,) each.
        right: mean IoU of each image (N,).
        segments: scores of the segments by name, (S,) each.
        segments_right: IoU of each (S,).
    """

    images: dict[str, np.ndarray]
    right: np.ndarray
    segments: dict[str, np.ndarray]
    segments_right: np.ndarray


def measured(
    model: str, classes: Ontology, pairs: Pairs, *, teacher: str | None = None, flip: bool = True
) -> Ranked:
    """Label images, and compare what their scores say with the truth, where not all of it is ignored.

    Args:
        model: recipe, or folder of a student.
        classes: of the truth.
        pairs: images with their truth.
        teacher: recipe that is compared with, too.
        flip: whether images are read mirrored, too.
    """
    ignored = classes.ignore_index
    labeller = load_labeller(model, classes, settings=("agreement=size",))
    plain = load_labeller(model, classes)
    other = None if teacher is None else load_labeller(teacher, classes)
    names = ["size", *(["flip"] if flip else []), *(["teacher"] if teacher else [])]
    rows, right, pieces, pieces_right = [], [], [], []
    for image, truth in pairs:
        found = labeller(image)
        labels, confidence = found.labels, found.confidence
        matrix = confusion_matrix(truth, labels, classes.num_classes, ignore_index=ignored)
        iou, each = mean_iou(matrix), iou_per_class(matrix)
        if np.isnan(iou):
            continue
        agree = [found.agreement or []]
        if flip:  # as agreement=flip does
            mirrored = plain(np.ascontiguousarray(image[:, ::-1])).labels[:, ::-1]
            agree.append(agreement(labels, mirrored, ignore_index=ignored))
        if other is not None:
            agree.append(agreement(labels, other(image).labels, ignore_index=ignored))
        right.append(iou)
        rows.append(
            [
                softmin(confidence, labels, ignore_index=ignored),
                quality(confidence, labels, ignore_index=ignored),
                *(float(np.mean(one or [0.0])) for one in agree),
            ]
        )
        of_classes = segments(labels, confidence, ignore_index=ignored)
        for segment, *agreed in zip(of_classes, *agree, strict=True):
            if np.isfinite(each[segment["class_id"]]):  # else the truth of all of it is ignored
                pieces.append([segment["mean_confidence"], *agreed])
                pieces_right.append(each[segment["class_id"]])
    lowest, mean, *agreements = np.array(rows).T
    scores = {"softmin": lowest, "quality": mean}
    for name, score in zip(names, agreements, strict=True):
        scores[f"agreement, {name}"] = score
        scores[f"ranks of quality and agreement, {name}"] = rank_mean(mean, score)
    scores["ranks of softmin and agreement, size"] = rank_mean(lowest, agreements[0])
    if len(agreements) > 1:
        scores["ranks of all agreements"] = rank_mean(*agreements)
        scores["ranks of quality and all agreements"] = rank_mean(mean, *agreements)
    sure, *agreements = np.array(pieces).T
    parts = {"confidence": sure}
    for name, score in zip(names, agreements, strict=True):
        parts[f"agreement, {name}"] = score
        parts[f"ranks of confidence and agreement, {name}"] = rank_mean(sure, score)
    return Ranked(scores, np.array(right), parts, np.array(pieces_right))


def report(title: str, found: Ranked) -> None:
    """Print tables: of images, of segments, and of estimates if there are enough images."""
    right = found.right
    table_of(f"{title}: {len(right)} images", found.images, right)
    table_of(f"{title}: {len(found.segments_right)} segments", found.segments, found.segments_right)
    if len(right) >= 2 * SAMPLE:
        report_estimates(title, found.images["quality"], right)


def table_of(title: str, scores: dict[str, np.ndarray], right: np.ndarray) -> None:
    """Print a table; in the last row are the risks of the truth as score, and of no order."""
    bounds = (0.5, float(np.median(right)))
    print(f"\n### {title}, mean {right.mean():.3f}, {np.sum(right < 0.5)} below 0.5\n")
    print(f"| score | rho | AUROC of < 0.5 | AUROC of < median, {bounds[1]:.2f} | AURC |")
    print("|---|---|---|---|---|")
    for name, score in scores.items():
        areas = " | ".join(f"{auroc(score, right >= bound):.2f}" for bound in bounds)
        print(f"| {name} | {rank_correlation(score, right):.2f} | {areas} | {aurc(score, right):.3f} |")
    best, chance = aurc(right, right), aurc(np.zeros(len(right)), right)
    print(f"| best possible; by chance | | | | {best:.3f}; {chance:.3f} |", flush=True)


def report_estimates(title: str, score: np.ndarray, right: np.ndarray) -> None:
    """Print how far estimates of the mean are off, from samples that are drawn again and again."""
    rng = np.random.default_rng(0)
    found: dict[str, list[Estimate]] = {"sample alone": [], "with quality": []}
    for _ in range(DRAWS):
        drawn = rng.choice(len(right), SAMPLE, replace=False)
        found["sample alone"].append(sample_estimate(right[drawn], len(right)))
        found["with quality"].append(
            regression_estimate(score[drawn], right[drawn], float(score.mean()), len(right))
        )
    print(f"\n### {title}: estimates of {right.mean():.3f} from {SAMPLE} of {len(right)} images\n")
    print("| by | off, in points | width of the interval | it holds |\n|---|---|---|---|")
    for name, estimates in found.items():
        off = 100 * np.mean([abs(one.mean - right.mean()) for one in estimates])
        width = 100 * np.mean([one.high - one.low for one in estimates])
        held = np.mean([one.low <= right.mean() <= one.high for one in estimates])
        print(f"| {name} | {off:.1f} | {width:.1f} | {held:.1%} |", flush=True)


if __name__ == "__main__":
    tyro.cli(Benchmark).run()
