"""Three ticks on a world that changes, beside the first model, which is never trained again.

First half of the classes under blue skies by day; then dusk, with pink skies; then a class that was absent.
After each tick both are measured on scenes that no training saw, of all that has been seen so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.retraining.luck import miou
from benchmarks.retraining.world import NAME, SIZE, World, png
from pipeline.files.storage import open_storage
from pipeline.retraining.measured import read_measured
from pipeline.retraining.registry import PREFIX
from pipeline.toyworld.captions import CLASSES
from pipeline.toyworld.scenes import Scene, scene

HALF = ("grass", "water", "sky", "ladybug", "fish", "orange", "cloud")
NEW_CLASS = "brick"
ARRIVE, MEASURED = 60, 40
"""Scenes in each tick: to train on, and more to measure on."""
STEPS = 250
"""Of the training, for each tick so far: it goes through its images as often, however many there are."""
DUSK = 0.75
"""Brightness at dusk."""


@dataclass(frozen=True)
class Stage:
    """What a tick brings.

    Attributes:
        title: for people.
        takes: whether a scene may occur, given its image and the classes in it.
        brightness: of its scenes.
    """

    title: str
    takes: Callable[[Scene, set[str]], bool]
    brightness: float = 1.0


def _pink_sky(one: Scene) -> bool:
    red, _, blue = one.image[one.labels == CLASSES.index("sky")].mean(0)
    return bool(red > blue)


STAGES: Sequence[Stage] = (
    Stage(
        "seven classes by day", lambda one, here: here <= {*HALF} and not ("sky" in here and _pink_sky(one))
    ),
    Stage("pink skies at dusk", lambda one, here: "sky" in here and here <= {*HALF} and _pink_sky(one), DUSK),
    Stage(f"a new class: {NEW_CLASS}", lambda _one, here: NEW_CLASS in here and here <= {*HALF, NEW_CLASS}),
)


def scenes_of(
    stage: Stage, seed: int, count: int
) -> list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]:
    """Images (H, W, 3) and label maps (H, W) of a stage."""
    found: list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]] = []
    index = 0
    while len(found) < count:
        one = scene(seed, index, SIZE)
        index += 1
        if stage.takes(one, {CLASSES[number] for number in np.unique(one.labels)}):
            found.append(((one.image * stage.brightness).astype(np.uint8), one.labels))
    return found


@dataclass(frozen=True)
class After:
    """After a tick.

    Attributes:
        stage: what it brought.
        outcome: promoted or refused.
        version: that is champion.
        champion, first: mean IoU of the champion, and of the first model.
    """

    stage: str
    outcome: str
    version: str
    champion: float
    first: float


def grow(world: World) -> list[After]:
    """Three ticks; what was measured after each."""
    world.server.start()
    found: list[After] = []
    for number, stage in enumerate(STAGES, 1):
        place, truth = open_storage(world.images), open_storage(world.truth)
        for index, (image, _) in enumerate(scenes_of(stage, 20 + number, ARRIVE)):
            place.write_bytes(f"{number}-{index:04}.png", png(image))
        for index, (image, labels) in enumerate(scenes_of(stage, 30 + number, MEASURED)):
            truth.write_bytes(f"images/{number}-{index:04}.png", png(image))
            truth.write_bytes(f"masks/{number}-{index:04}.png", png(labels))
        world.configure(STEPS * number)
        tick = world.tick()
        tick.expect(0, 3)
        version = world.champion
        assert version is not None, tick.said
        run = world.client.get_model_version(NAME, version).tags[f"{PREFIX}run"]
        found.append(
            After(
                stage.title,
                world.at(f"{number:04}").outcome or "unfinished",
                version,
                _miou(world, run, f"champion-{number}"),
                _miou(world, "0001", f"first-{number}"),
            )
        )
        print(found[-1], flush=True)
    return found


def _miou(world: World, run: str, name: str) -> float:
    """Mean IoU of the model of a tick on all that was seen so far, over the classes in it."""
    output = world.now / "measured" / name
    world.run(
        "evaluate", "--model", f"{world.output}/runs/{run}/student", "--images", f"{world.truth}/images",
        "--truth", f"{world.truth}/masks", "--ontology", "toyworld", "--output", output, "--no-boundary",
        "--tracking", "off",
    ).expect(0)  # fmt: skip
    return miou(read_measured(output, name))


def table(found: Sequence[After]) -> str:
    """Markdown."""
    lines = [
        "| tick | what is new | outcome | champion | mIoU of the champion | of the first model |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {number} | {one.stage} | {one.outcome} | version {one.version} | {100 * one.champion:.1f} | "
        f"{100 * one.first:.1f} |"
        for number, one in enumerate(found, 1)
    ]
    return "\n".join(lines)


def draw(found: Sequence[After], file: Path) -> None:
    """A chart of both models, below scenes of each tick."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    grid = figure.add_gridspec(2, len(STAGES), height_ratios=(1, 2.2))
    for column, stage in enumerate(STAGES):
        picture = np.concatenate([image for image, _ in scenes_of(stage, 40 + column, 3)], axis=1)
        axes = figure.add_subplot(grid[0, column])
        axes.imshow(Image.fromarray(picture).resize((picture.shape[1] * 2, picture.shape[0] * 2)))
        axes.set_title(f"tick {column + 1}: {stage.title}", fontsize=9)
        axes.axis("off")
    axes = figure.add_subplot(grid[1, :])
    ticks = range(1, len(found) + 1)
    for label, values, style in (
        ("champion, retrained", [100 * one.champion for one in found], "o-"),
        ("first model, never trained again", [100 * one.first for one in found], "s--"),
    ):
        axes.plot(ticks, values, style, label=label)
        for tick, value in zip(ticks, values, strict=True):
            axes.annotate(
                f"{value:.0f}", (tick, value), textcoords="offset points", xytext=(0, 6), ha="center"
            )
    axes.set_xticks(list(ticks), [f"after tick {tick}" for tick in ticks])
    axes.set_xlim(0.6, len(found) + 0.4)
    axes.set_ylim(0, 100)
    axes.set_ylabel("mean IoU, %, on all seen so far")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(file, dpi=110)
