"""The command ``maskmill``. Exit status: 0 done, 1 failed work, 2 wrong use, 130 interrupted."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import tyro

from models.errors import MaskMillError

FAILED_WORK = frozenset({"labelling_failed", "cluster_unreachable", "table_damaged", "output_in_use"})
"""Codes of errors that are no mistake in the command; the others exit with 2."""


def label(
    *,
    images: str | None = None,
    manifest: str | None = None,
    output: str,
    classes: str | None = None,
    ontology: str | None = None,
    recipe: str = "maskclip",
    settings: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="set", metavar="KEY=VALUE")
    ] = (),
    background: tyro.conf.FlagCreatePairsOff[bool] = True,
    min_confidence: float | None = None,
    max_failure_rate: float = 0.05,
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False,
    address: str | None = None,
    verbose: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(aliases=["-v"])] = False,
) -> int:
    """Label images with class names: images in, a label table (Parquet) out.

    The same command again goes on after a crash and labels what is new.

    Args:
        images: folder, glob ("photos/*.jpg") or list file (.txt, one path or URI a line) of images.
        manifest: manifest in Parquet (columns id, uri), instead of --images.
        output: folder (or s3://… prefix) for the label table.
        classes: class names between commas: "cat, dog, grass". Everything else becomes "background".
        ontology: YAML file of classes, or a built-in name (voc21, context59, …), instead of --classes.
        recipe: named recipe or YAML file: every knob that changes the labels.
        settings: change one knob of the recipe; may be repeated.
        background: with --no-background every pixel gets one of the classes of --classes.
        min_confidence: pixels less sure than this (0 to 1) become "ignore" (255).
        max_failure_rate: exit with 1 if a larger share of the images fails.
        overwrite: delete a table that is already in --output and start anew.
        address: of a Ray cluster; default: the one that RAY_ADDRESS names, else this machine alone.
        verbose: show what Ray says.
    """
    from jobs.label import LabelJob, run, with_min_confidence
    from jobs.recipes import load_recipe
    from pipeline.ontology import Ontology, load_ontology, parse_classes

    source = _exactly_one("--images", images, "--manifest", manifest)
    _exactly_one("--classes", classes, "--ontology", ontology)
    for flag, value in (("--min-confidence", min_confidence), ("--max-failure-rate", max_failure_rate)):
        if value is not None and not 0 <= value <= 1:
            raise MaskMillError(
                "wrong_use", f"{flag} {value} is not between 0 and 1.", "Give a share, such as 0.05."
            )
    chosen = with_min_confidence(load_recipe(recipe, settings), min_confidence)
    templates = "toyworld" if chosen.model == "toyclip" else "openai85"
    if classes is not None:
        wanted = parse_classes(classes, background="default" if background else None, templates=templates)
    else:
        assert ontology is not None
        wanted = load_ontology(ontology)
        if not background:
            wanted = Ontology.from_dict(wanted.to_dict() | {"background": None})
    return run(
        LabelJob(
            source=source,
            ontology=wanted,
            recipe=chosen,
            output=output,
            overwrite=overwrite,
            max_failure_rate=max_failure_rate,
            address=address,
            verbose=verbose,
        )
    )


def show(
    table: Annotated[str, tyro.conf.Positional],
    /,
    *,
    output: Path | None = None,
    limit: int = 60,
) -> int:
    """Make a page of pictures from a label table: overlays, coverage, confidence, failures.

    Args:
        table: the --output of maskmill label.
        output: the page; default: gallery.html beside the table.
        limit: images on the page.
    """
    from jobs.show import run

    return run(table, output=output, limit=limit)


def demo(*, output: Path = Path("demo"), images: int = 240, size: int = 128, seed: int = 2026) -> int:
    """The main job on the embedded toy world: make images, label them, measure, show.

    Args:
        output: folder for everything it makes.
        images: number of scenes.
        size: side of a scene in pixels.
        seed: of the scenes.
    """
    from jobs.demo import run

    return run(output, count=images, size=size, seed=seed)


def recipes() -> int:
    """List the recipes with every field."""
    import yaml

    from jobs.recipes import RECIPES

    for recipe in RECIPES.values():
        print(yaml.safe_dump({recipe.name: recipe.to_dict()}, sort_keys=False))
    return 0


COMMANDS: dict[str, Callable[..., int]] = {"label": label, "show": show, "demo": demo, "recipes": recipes}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; ends the process with the exit status."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        status: Any = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="maskmill",
            description="Images and class names in, a segmentation dataset out.",
            args=arguments,
        )
    except MaskMillError as error:
        print(f"maskmill: {error}", file=sys.stderr)
        status = 1 if error.code in FAILED_WORK else 2
    except KeyboardInterrupt:
        print("Stopped. What is finished is kept: the same command goes on from there.", file=sys.stderr)
        status = 130
    sys.exit(status)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    """A polite request to end is treated as Ctrl-C: the run stops cleanly and can be taken up."""
    raise KeyboardInterrupt


def _exactly_one(first: str, one: str | None, second: str, other: str | None) -> str:
    given = [value for value in (one, other) if value is not None]
    if len(given) != 1:
        raise MaskMillError(
            "wrong_use",
            f"Give either {first} or {second}{', not both' if given else ''}.",
            "See maskmill label --help.",
        )
    return given[0]


if __name__ == "__main__":
    main()
