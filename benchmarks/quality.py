"""How well the scores of a label table rank images by what the truth says of their labels.

Scores: the column ``quality`` (mean over classes of their confidence), softmin (what older versions
stored), the column ``agreement`` (with a second reading: ``--set agreement=size`` or ``flip``), and means of
ranks. An image's labels are right to the mean IoU over the classes in its truth or its labels.

In the toy world, the toy CLIP and a student of it label scenes that neither has seen. The photographs are
labelled by the same toy CLIP, unless ``--model`` names another.

    python -m benchmarks.quality --output out/
    python -m benchmarks.quality --output out/ --seeds 0 --photographs ../shared/data/voc2012_subset
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmarks.toytables import draw_scenes, label_folder
from jobs.train.maskclip_plus import TrainMaskClipPlus
from jobs.train.run import TrainOptions
from pipeline.datasets.voc import open_voc
from pipeline.labelling.labeller import Prediction
from pipeline.labelling.single import ImageLabeller, load_labeller
from pipeline.metrics.confusion import confusion_matrix, mean_iou
from pipeline.metrics.estimation import Estimate, regression_estimate, sample_estimate
from pipeline.metrics.ranking import aurc, auroc, rank_correlation, rank_mean
from pipeline.ontology.ontology import Ontology
from pipeline.ontology.reading import load_ontology
from pipeline.table.statistics import quality, softmin
from pipeline.toyworld.scenes import generate

SAMPLE, DRAWS = 50, 400
"""Images with truth that an estimate is made from, and how often they are drawn."""
READINGS = ("size", "flip")
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
        steps: of a student's training; 0 leaves it out.
        photographs: also a folder of PASCAL VOC 2012.
        most: of its validation images, the first.
        model: recipe that labels the photographs.
    """

    output: Path
    seeds: int = 3
    first: int = 0
    images: int = 200
    test: int = 100
    size: int = 128
    steps: int = 300
    photographs: Path | None = None
    most: int = 60
    model: str = "toy"

    def run(self) -> None:
        """Print tables in Markdown."""
        toyworld = load_ontology("toyworld")
        for seed in range(self.first, self.first + self.seeds):
            scenes = generate(1000 + seed, self.test, self.size)
            for name in ("toy CLIP", "student"):
                if name == "student" and not self.steps:
                    continue
                model = "toy" if name == "toy CLIP" else str(self._student(seed))
                pairs = zip(scenes.images, scenes.labels, strict=True)
                report(f"{name}, seed {seed}", *measured(model, toyworld, pairs))
        if self.photographs is not None:
            voc = open_voc(str(self.photographs), split="val", classes="voc21")
            photographs = ((voc.image(one), voc.truth(one)) for one in voc.samples[: self.most])
            report(f"{self.model}, photographs", *measured(self.model, load_ontology("voc21"), photographs))

    def _student(self, seed: int) -> Path:
        """A student of the toy CLIP."""
        place = self.output / f"seed-{seed}"
        draw_scenes(place, self.images, self.size, seed=2000 + seed)
        TrainMaskClipPlus(
            labels=label_folder(place / "images", place / "table"),
            recipe="toy",
            settings=(f"iterations={self.steps}", f"seed={seed}"),
            options=TrainOptions(output=str(place / "student"), tracking="off"),
        ).run()
        return place / "student"


def measured(model: str, classes: Ontology, pairs: Pairs) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Scores by name (N,), and the mean IoU of each image (N,); without images whose truth is all ignored.

    Args:
        model: recipe, or folder of a student.
        classes: of the truth.
        pairs: N images with their truth.
    """
    labellers: dict[str, ImageLabeller] = {
        how: load_labeller(model, classes, settings=(f"agreement={how}",)) for how in READINGS
    }
    rows, right = [], []
    for image, truth in pairs:
        found: dict[str, Prediction] = {how: labeller(image) for how, labeller in labellers.items()}
        labels, confidence = found["size"].labels, found["size"].confidence
        matrix = confusion_matrix(truth, labels, classes.num_classes, ignore_index=classes.ignore_index)
        iou = mean_iou(matrix)
        if np.isnan(iou):
            continue
        right.append(iou)
        agree = [float(np.mean(found[how].agreement or [0.0])) for how in READINGS]
        ignored = classes.ignore_index
        rows.append(
            [
                softmin(confidence, labels, ignore_index=ignored),
                quality(confidence, labels, ignore_index=ignored),
                *agree,
            ]
        )
    lowest, mean, size, flip = np.array(rows).T
    return {
        "softmin": lowest,
        "quality": mean,
        "agreement, size": size,
        "agreement, flip": flip,
        "quality and agreement, size": rank_mean(mean, size),
        "quality and agreement, flip": rank_mean(mean, flip),
        "softmin and agreement, size": rank_mean(lowest, size),
        "agreements, size and flip": rank_mean(size, flip),
    }, np.array(right)


def report(title: str, scores: dict[str, np.ndarray], right: np.ndarray) -> None:
    """Print a table; the last row but one is the truth itself as score, the last the random order's risk."""
    bounds = (0.5, float(np.median(right)))
    print(f"\n### {title}: {len(right)} images, mean {right.mean():.3f}, {np.sum(right < 0.5)} below 0.5\n")
    print(f"| score | rho | AUROC of < 0.5 | AUROC of < median, {bounds[1]:.2f} | AURC |")
    print("|---|---|---|---|---|")
    for name, score in scores.items():
        areas = " | ".join(f"{auroc(score, right >= bound):.2f}" for bound in bounds)
        print(f"| {name} | {rank_correlation(score, right):.2f} | {areas} | {aurc(score, right):.3f} |")
    best, chance = aurc(right, right), aurc(np.zeros(len(right)), right)
    print(f"| best possible; by chance | | | | {best:.3f}; {chance:.3f} |", flush=True)
    if len(right) >= 2 * SAMPLE:
        report_estimates(title, scores["quality"], right)


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
