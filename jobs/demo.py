"""``maskmill demo``: label, train, evaluate and promote, offline, on the embedded toy world."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table

from jobs.console import timed
from jobs.evaluate.compare import evaluate
from jobs.retrain.command import PROMOTED, REFUSED, retrain
from jobs.show import Show
from models.errors import WrongUse
from pipeline.datasets.base import Dataset
from pipeline.datasets.pairs import open_pairs
from pipeline.evaluation.results import EvaluationResult, read_results
from pipeline.files.outputs import check_output_folder
from pipeline.labelling.recipes import RECIPES, LabelRecipe
from pipeline.metrics.names import percent
from pipeline.ontology.reading import load_ontology
from pipeline.report.student_page import write_student_page
from pipeline.report.training_page import PAGE, SHEET, Score
from pipeline.retraining.config import EXAMPLE_FILE, Retraining, read_config
from pipeline.trained.student import read_student_record
from pipeline.training.maskclip_plus.recipes import MASKCLIP_PLUS_RECIPES

MARKER = "made-by-maskmill-demo.txt"
TRUTH_SEED = 1
"""Offset between the seed of the unlabelled scenes and that of the test scenes."""
EARLY = 5
"""One in so many scenes is there from the beginning."""
SHORT, SHORTEST = 10, 40
"""The first training is so many times shorter, but has so many steps."""
ENOUGH = 30
"""Test scenes that the gate asks for, if there are as many."""
_ABOUT = """\
# What the demo runs. With more scenes in images/, maskmill retrain continues from here.
# maskmill retrain --init explains every field.
"""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Run the whole pipeline on the embedded toy world, offline: label, train, evaluate, promote, show.

    Scenes arrive twice, as they would for a scheduler: a student that is trained on the first ones for a
    short time becomes champion, until the one that is trained on all of them takes its place.

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
        """Draw scenes, label them, train students, evaluate them and their teacher, promote the better one.

        Raises:
            MaskMillError: ``output_not_ours`` if the folder holds other files; ``wrong_use``.
        """
        MASKCLIP_PLUS_RECIPES.load("toy", [f"iterations={self.steps}"])
        for name, least in (("images", 2), ("size", 1), ("test", 1)):
            if getattr(self, name) < least:
                raise WrongUse(
                    "wrong_use", f"--{name} {getattr(self, name)} is too small.", f"Give {least} or more."
                )
        output = self.output
        empty_folder(output)
        console = console or Console()
        images, test, results = output / "images", output / "test", output / "results"
        early = max(1, self.images // EARLY)
        _title(
            console,
            f"1. Draw {self.images} unlabelled scenes of the toy world, and {self.test} with their true maps",
        )
        with timed(console, "drawing the scenes"):
            scenes, _ = _draw(self.images, self.size, self.seed)
            _save(images, scenes[:early])
            for name, pictures in zip(
                ("images", "truth"), _draw(self.test, self.size, self.seed + TRUTH_SEED), strict=True
            ):
                _save(test / name, pictures)
        truth = open_pairs(
            images=str(test / "images"), masks=str(test / "truth"), ontology=load_ontology("toyworld")
        )
        config = self._configuration()

        _title(
            console,
            f"2. maskmill retrain: {early} scenes have arrived; label them, train a student briefly",
        )
        short = min(self.steps, max(SHORTEST, self.steps // SHORT))
        briefly = {"settings": {"iterations": short}}
        models = tuple(model.model_copy(update=briefly) for model in config.models)
        status = retrain(config.model_copy(update={"models": models}), console)
        if status not in (PROMOTED, REFUSED):
            return status

        _title(
            console,
            f"3. maskmill retrain: {self.images - early} more have arrived; train on all, and compare",
        )
        _save(images, scenes[early:], start=early)
        status = retrain(config, console)
        if status not in (PROMOTED, REFUSED):
            return status
        tick = "retraining/runs/0002"
        table, student = output / "table", output / "student"
        table.symlink_to("retraining/table")
        student.symlink_to(f"{tick}/student")
        results.mkdir()
        (results / "student").symlink_to(f"../{tick}/student-evaluation/candidate")

        _title(console, "4. maskmill evaluate: the teacher against the true maps, beside the student")
        measured = read_results(results / "student")[0][1]
        assert isinstance(measured, EvaluationResult), "the retraining has measured it"
        found = {
            "teacher": _evaluate(truth, RECIPES["toy"], results / "teacher", console),
            "student": measured,
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
            f"Side by side:      {(student / PAGE).absolute().as_uri()}",
            f"Why promoted:      {(output / tick / 'report.html').absolute().as_uri()}",
            f"One picture:       {student / SHEET}",
            f"All pseudo-labels: {(output / 'gallery.html').resolve().as_uri()}",
            f"Label with it:     maskmill label --model {_quoted(student)} --images DIR --output OUT",
            f"Go back:           maskmill rollback {_quoted(output / 'retraining')}",
        ]
        console.print("\n".join(lines), soft_wrap=True, highlight=False)
        return 0

    def _configuration(self) -> Retraining:
        """Write the configuration of the retraining, and read it as the command does."""
        file = self.output / EXAMPLE_FILE
        written = {
            "name": "toyworld",
            "output": "retraining",
            "images": "images",
            "ontology": "toyworld",
            "tracking": "sqlite:///mlruns.db",
            "label": {"recipe": "toy"},
            "models": [{"kind": "maskclip-plus", "recipe": "toy", "set": {"iterations": self.steps}}],
            "evaluation": {"images": "test/images", "truth": "test/truth"},
            "gate": {"min_images": max(2, min(self.test, ENOUGH))},
        }
        file.write_text(_ABOUT + yaml.safe_dump(written, sort_keys=False))
        return read_config(file)


def _quoted(path: Path) -> str:
    return shlex.quote(os.fspath(path))


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


def _draw(count: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scenes, uint8 (N, H, W, 3), and their true maps, (N, H, W)."""
    from pipeline.toyworld.scenes import generate

    scenes, maps, _captions = generate(seed, count, size)
    return np.asarray(scenes), np.asarray(maps)


def _save(folder: Path, pictures: np.ndarray, *, start: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pictures, start):
        Image.fromarray(picture).save(folder / f"scene_{index:04d}.png")


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
