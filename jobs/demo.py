"""``maskmill demo``: label, train and evaluate, offline, on the embedded toy world."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from jobs.console import timed
from jobs.evaluate import evaluate
from jobs.label import LabelJob, label_images
from jobs.show import Show
from jobs.train.maskclip_plus import train_student
from jobs.train.run import TrainOptions
from models.errors import WrongUse
from pipeline.datasets.base import Dataset
from pipeline.datasets.pairs import open_pairs
from pipeline.evaluation.results import EvaluationResult
from pipeline.files.outputs import check_output_folder
from pipeline.labelling.prepare import student_recipe
from pipeline.labelling.recipes import RECIPES, LabelRecipe
from pipeline.metrics.names import percent
from pipeline.ontology.ontology import load_ontology
from pipeline.report.student_page import write_student_page
from pipeline.report.training_page import PAGE, SHEET, Score
from pipeline.tracking.tracker import OFF
from pipeline.trained.student import read_student_record
from pipeline.training.maskclip_plus.recipes import MASKCLIP_PLUS_RECIPES

MARKER = "made-by-maskmill-demo.txt"
TRUTH_SEED = 1
"""Offset between the seed of the unlabelled scenes and that of the test scenes."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Run the whole pipeline on the embedded toy world, offline: label, train a student, evaluate, show.

    Attributes:
        output: folder for all results; an earlier demo there is replaced.
        images: number of unlabelled scenes.
        size: side of a scene in pixels.
        seed: random seed of the scenes; the bundled CLIP was trained on different ones.
        test: number of held-out scenes with truth for evaluation.
        steps: number of training steps.
    """

    output: Path = Path("demo")
    images: int = 500
    size: int = 128
    seed: int = 2026
    test: int = 80
    steps: int = 1000

    def run(self, console: Console | None = None) -> int:
        """Draw scenes, label them, train a student on the labels, evaluate both models on held-out scenes.

        Raises:
            MaskMillError: ``output_not_ours`` if the folder holds other files; ``wrong_use``.
        """
        recipe = MASKCLIP_PLUS_RECIPES.load("toy", [f"iterations={self.steps}"])
        for name in ("images", "size", "test"):
            if getattr(self, name) < 1:
                raise WrongUse(
                    "wrong_use", f"--{name} {getattr(self, name)} is too small.", "Give 1 or more."
                )
        output = self.output
        empty_folder(output)
        console = console or Console()
        images, table, student = output / "images", output / "table", output / "student"
        test, results = output / "test", output / "results"
        ontology = load_ontology("toyworld")
        _title(
            console,
            f"1. Draw {self.images} unlabelled scenes of the toy world, and {self.test} with their true maps",
        )
        with timed(console, "drawing the scenes"):
            _draw(images, None, count=self.images, size=self.size, seed=self.seed)
            _draw(
                test / "images", test / "truth", count=self.test, size=self.size, seed=self.seed + TRUTH_SEED
            )
        truth = open_pairs(images=str(test / "images"), masks=str(test / "truth"), ontology=ontology)

        _title(console, "2. maskmill label: class names in, pseudo-labels out")
        job = LabelJob(source=str(images), ontology=ontology, recipe=RECIPES["toy"], output=str(table))
        status = label_images(job, console)
        if status:
            return status

        _title(console, "3. maskmill train maskclip-plus: a student learns from the pseudo-labels")
        status = train_student(
            str(table),
            recipe,
            TrainOptions(output=str(student), tracking=OFF),
            console=console,
        )
        if status:
            return status

        _title(console, "4. maskmill evaluate: teacher and student against the true maps")
        found = {
            "teacher": _evaluate(truth, RECIPES["toy"], results / "teacher", console),
            "student": _evaluate(truth, student_recipe(str(student))[0], results / "student", console),
        }
        _print_scores(found, console)
        record = read_student_record(student)
        with timed(console, "writing the page of the student"):
            write_student_page(
                record,
                [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()],
                labels=str(results / "teacher" / "labels"),
                truth=truth,
                scores=[
                    Score(name, one.metrics["miou"] or 0.0, [entry.iou for entry in one.classes])
                    for name, one in found.items()
                ],
                note=f"{self.test} held-out scenes and their true maps.",
            )
        Show(table=str(table), output=output / "gallery.html").run(Console(quiet=True))
        lines = [
            f"Side by side:      {(student / PAGE).resolve().as_uri()}",
            f"One picture:       {student / SHEET}",
            f"All pseudo-labels: {(output / 'gallery.html').resolve().as_uri()}",
            f"Label with it:     maskmill label --model {student} --images DIR --output OUT",
        ]
        console.print("\n".join(lines), soft_wrap=True, highlight=False)
        return 0


def _title(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]", highlight=False)


def empty_folder(output: Path) -> None:
    """Create the demo's folder, or empty it.

    Raises:
        MaskMillError: ``output_not_ours`` if it holds files that the demo did not write.
    """
    check_output_folder(output)
    if output.exists() and any(output.iterdir()):
        if not (output / MARKER).exists():
            raise WrongUse(
                "output_not_ours",
                f"{output} exists and was not made by the demo.",
                "Name another folder: maskmill demo --output DIR.",
            )
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).write_text("maskmill demo made this folder and replaces it when it runs again.\n")


def _draw(images: Path, truth: Path | None, *, count: int, size: int, seed: int) -> None:
    from pipeline.toyworld.scenes import generate

    images.mkdir(parents=True)
    scenes, maps, _captions = generate(seed, count, size)
    for index, (scene, ids) in enumerate(zip(scenes, maps, strict=True)):
        Image.fromarray(scene).save(images / f"scene_{index:04d}.png")
        if truth is not None:
            truth.mkdir(parents=True, exist_ok=True)
            Image.fromarray(ids).save(truth / f"scene_{index:04d}.png")


def _evaluate(truth: Dataset, recipe: LabelRecipe, folder: Path, console: Console) -> EvaluationResult:
    ontology = load_ontology("toyworld")
    return evaluate(
        truth, console, recipe=recipe, ontology=ontology, output=folder, boundary=False, pictures=0
    )[1]


def _print_scores(found: Mapping[str, EvaluationResult], console: Console) -> None:
    report = Table(title="IoU on scenes with truth, in percent", title_justify="left")
    report.add_column("class")
    for name in found:
        report.add_column(name, justify="right")
    for entries in zip(*(one.classes for one in found.values()), strict=True):
        report.add_row(
            entries[0].name,
            *(percent(entry.iou) for entry in entries),
        )
    report.add_section()
    report.add_row("mIoU", *(percent(one.metrics["miou"]) for one in found.values()))
    console.print(report)
