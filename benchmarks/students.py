"""Students of better teachers, on the toy world: labels made with a memory of the corpus.

    python -m benchmarks.students --output made [--ways agreement "two teachers"] [--picture students.png]

For each seed 1,000 unlabelled scenes are labelled by the recipe ``toy``, a memory is built of them, they are
labelled again with all that helps (``BEST``) and the memory, and a student learns from these labels, in each
of the ways (``WAYS``) that are asked for; ``truth`` learns from the truth of these scenes, and is as far as a
student of this size can come in so many steps. Printed is the mIoU of teacher and student on the scenes of
the seed's set. What is in ``--output`` already is used again. A toy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from jobs.benchmarks.toyworld.labelling import scene_set
from jobs.benchmarks.toyworld.students import TRAINING_SEED, UNLABELLED, draw_scenes, measured
from jobs.label import label_images
from jobs.labelling.options import LabelOptions
from jobs.memory import BuildMemory
from jobs.train.maskclip_plus import train_student
from jobs.train.run import TrainOptions
from pipeline.datasets.pairs import open_pairs
from pipeline.labelling.prepare import prepare_labeller
from pipeline.labelling.recipes import RECIPES, LabelRecipe, change_recipe, table_recipe
from pipeline.ontology.reading import load_ontology
from pipeline.report.pictures import Pixels, colorize, contact_sheet
from pipeline.table.record import read_table_record
from pipeline.tracking.tracker import OFF
from pipeline.training.maskclip_plus.recipes import MASKCLIP_PLUS_RECIPES

BEST = {"calibrate": 0.95, "candidates": 6, "refine": "pamr", "refine_dilations": (1, 2, 4, 8)}
WAYS: dict[str, list[str]] = {
    "recipe": [],
    "agreement": ["agreement=true"],
    "two teachers": [],
    "cross-entropy alone": ["guided=[1,-1]", "self_train=[-1,-1]"],
    "adaptive thresholds": ["self_threshold=0.6", "threshold_rule=quantile", "threshold_keep=0.8"],
    "truth": [],
}
"""Settings of the student's recipe. Of the ``two teachers``, the second is the recipe ``toy`` as it comes."""
TRAINING_FREE = "Best labels without training"
ONTOLOGY = load_ontology("toyworld")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--unlabelled", type=int, default=UNLABELLED)
    parser.add_argument("--alone", action="store_true", help="without the memory")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["recipe"])
    parser.add_argument("--set", action="append", default=[], help="of the student's recipe")
    parser.add_argument("--picture", type=Path, help="also draw six scenes of the last seed to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| seed | way | teacher | student |\n|---|---|---|---|")
    for seed in options.seeds:
        folder = options.output / f"seed-{seed}"
        draw_scenes(folder / "images", folder / "masks", seed + TRAINING_SEED, options.unlabelled)
        teacher = labelled(folder, alone=options.alone)
        by_teacher = maps(table_recipe(read_table_record(str(teacher))), seed, options.scenes)
        for way in options.ways:
            student = taught(folder, seed, teacher.name, way, options.set)
            found = by_teacher, maps(LabelRecipe(model=str(student)), seed, options.scenes)
            figures = [100 * measured(each, seed, options.scenes, ())["miou"] for each in found]
            print(f"| {seed} | {way} | {figures[0]:.1f} | {figures[1]:.1f} |", flush=True)
    if options.picture:
        before = maps(change_recipe(RECIPES["toy"], {"head": "maskclip"}), seed, 6)
        draw(
            options.picture, seed, {"MaskCLIP": before, TRAINING_FREE: found[0][:6], "Student": found[1][:6]}
        )


def labelled(folder: Path, *, alone: bool) -> Path:
    """The table of the best labels of the scenes in ``folder / "images"``; ``plain`` is beside it."""
    recipe = change_recipe(RECIPES["toy"], BEST)
    plain = label(folder, "plain", RECIPES["toy"])
    if alone:
        return label(folder, "alone", recipe)
    memory = str(folder / "memory")
    BuildMemory(table=str(plain), output=memory, workers=0).run(Console(stderr=True))
    return label(folder, "supported", change_recipe(recipe, {"memory": memory}))


def label(folder: Path, name: str, recipe: LabelRecipe) -> Path:
    """A table of the scenes."""
    options = LabelOptions(output=str(folder / name), tracking=OFF)
    label_images(str(folder / "images"), recipe, ONTOLOGY, options, console=Console(stderr=True))
    return folder / name


def taught(folder: Path, seed: int, table: str, way: str, settings: Sequence[str]) -> Path:
    """The student of a table."""
    name = "toy-supervised" if way == "truth" else "toy"
    recipe = MASKCLIP_PLUS_RECIPES.load(name, [f"loop.seed={seed}", *WAYS[way], *settings])
    second = str(folder / "plain") if way == "two teachers" else None
    output = folder / f"student-{table}{'-confirmed' if second else ''}-{recipe.hash[:8]}"
    truth = None
    if way == "truth":
        truth = open_pairs(images=str(folder / "images"), masks=str(folder / "masks"), ontology=ONTOLOGY)
    options = TrainOptions(output=str(output), workers=0, address="local", tracking=OFF)
    console = Console(stderr=True)
    if train_student(str(folder / table), recipe, options, second=second, truth=truth, console=console):
        sys.exit("the training was stopped")
    return output


def maps(recipe: LabelRecipe, seed: int, count: int) -> list[np.ndarray]:
    """Labels of the first scenes of a seed's set."""
    labeller = prepare_labeller(recipe, ONTOLOGY, precision="fp32").build(threads=1)
    return [labeller.label([image], [(128, 128)])[0].labels for image in scene_set(seed, count, 128).images]


def draw(path: Path, seed: int, found: dict[str, list[np.ndarray]]) -> None:
    """Six scenes, their true maps and labels."""
    scenes, palette = scene_set(seed, 6, 128), ONTOLOGY.palette()
    rows: list[tuple[str, Sequence[Pixels]]] = [("Toy scenes", list(scenes.images))]
    for title, each in {"True maps": list(scenes.labels), **found}.items():
        rows.append((title, [colorize(one, palette) for one in each]))
    contact_sheet(rows, names=ONTOLOGY.names, palette=palette, cell=160).save(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
