"""How often the gate promotes a model that is worse, because the images that it is measured on suit it.

Students of the same labels, which differ in their seed or in their number of steps, are measured on many
images: that says which of two is worse. Then the gate judges the worse one against the better one on many
small sets of these images, as a retraining would: by its own policy, and with ``delta: 0``, by which the
whole interval of the gain must be above 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from benchmarks.faults.world import OWN
from benchmarks.retraining.world import SIZE, World, png
from pipeline.retraining.gate import GatePolicy, decide
from pipeline.retraining.measured import Measured, read_measured
from pipeline.toyworld.scenes import generate

STUDENTS = ((60, 0), (60, 1), (60, 2), (80, 0), (100, 0))
"""Steps of the training, and seed."""
MANY, TIMES = 600, 200
"""Images that say which model is worse; number of small sets."""
SMALL = (60, 200)
"""Images in a small set."""


@dataclass(frozen=True)
class Luck:
    """Two models on small sets.

    Attributes:
        gap: by how much the mean IoU of the worse one is below that of the other on many images.
        small: images in a set.
        times: number of small sets.
        seemed: how often the worse one had the higher mean IoU.
        promoted: how often the gate promoted it by its own policy.
        proven: how often it did so with ``delta: 0``.
    """

    gap: float
    small: int
    times: int
    seemed: int
    promoted: int
    proven: int


def taken(one: Measured, images: npt.NDArray[np.intp], name: str) -> Measured:
    """The measurement on some of the images."""
    return replace(
        one,
        name=name,
        images=tuple(one.images[at] for at in images),
        truth=one.truth[images],
        predicted=one.predicted[images],
        correct=one.correct[images],
    )


def miou(one: Measured) -> float:
    """Mean IoU over the classes with true pixels."""
    truth, predicted, correct = (part.sum(0) for part in (one.truth, one.predicted, one.correct))
    there = truth > 0
    return float(np.mean(correct[there] / (truth + predicted - correct)[there]))


def luck(one: Measured, other: Measured, *, small: int, times: int, seed: int) -> Luck:
    """Judge the worse of two models against the better one on small sets of the images.

    Args:
        one, other: measured on the same images.
        small: images in a set; none is there twice.
        times: number of sets.
        seed: of their choice.
    """
    worse, better = sorted((one, other), key=miou)
    rng = np.random.default_rng(seed)
    seemed, promoted, proven = 0, 0, 0
    own = GatePolicy(max_seconds_ratio=None)
    strict = GatePolicy(max_seconds_ratio=None, delta=0)
    for _ in range(times):
        images = rng.choice(len(worse.images), small, replace=False)
        candidate, champion = taken(worse, images, "candidate"), taken(better, images, "champion")
        decision = decide(candidate, champion, own)
        seemed += decision.gain is not None and decision.gain > 0
        promoted += decision.promotes
        proven += decision.promotes and decide(candidate, champion, strict).promotes
    return Luck(miou(better) - miou(worse), small, times, seemed, promoted, proven)


def students(world: World) -> list[Measured]:
    """Train students on the labels of a retraining, and measure them on many images."""
    world.begin()
    many = world.now / "many"
    scenes, masks, _ = generate(77, MANY, SIZE)
    for folder, pictures in (("images", scenes), ("masks", masks)):
        (many / folder).mkdir(parents=True)
        for number, picture in enumerate(pictures):
            (many / folder / f"{number:04}.png").write_bytes(png(picture))
    found = []
    for steps, seed in STUDENTS:
        student, result = many / f"student-{steps}-{seed}", many / f"result-{steps}-{seed}"
        world.run(
            "train", "maskclip-plus", "--labels", f"{world.output}/table", "--output", student,
            "--workers", "0",
            "--recipe", "toy", *world.settings(steps), "--set", f"seed={seed}", "--tracking", "off",
            environment=OWN,
        ).expect(0)  # fmt: skip
        world.run(
            "evaluate", "--model", student, "--images", many / "images", "--truth", many / "masks",
            "--ontology", "toyworld", "--output", result, "--no-boundary", "--tracking", "off",
            environment=OWN,
        ).expect(0)  # fmt: skip
        found.append(read_measured(result, student.name))
    return found


def luck_table(world: World, seed: int) -> str:
    """Markdown: each pair of students, from the closest to the farthest apart."""
    pairs = list(itertools.combinations(students(world), 2))
    return table(
        [luck(one, other, small=small, times=TIMES, seed=seed) for small in SMALL for one, other in pairs]
    )


def table(found: Sequence[Luck]) -> str:
    """Markdown."""
    lines = [
        "| images | worse by, points | sets | seemed better | promoted | promoted with delta: 0 |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.small} | {100 * one.gap:.2f} | {one.times} | {one.seemed} | {one.promoted} | {one.proven} |"
        for one in sorted(found, key=lambda one: (one.small, one.gap))
    ]
    return "\n".join(lines)
