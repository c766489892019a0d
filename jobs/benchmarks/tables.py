"""Shared by the papers' tables: the user's request, opening data, and why a row was not measured.

To add a paper's table, put its figures into ``pipeline/evaluation/published/NAME.yaml`` and write a module
here with a function that yields sections. List the function in the module's ``TABLES``, and the module in
``jobs.benchmark``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from models.errors import FailedWork, MaskMillError, WrongUse, did_you_mean
from pipeline.datasets.base import Dataset
from pipeline.datasets.protocols import ProtocolName
from pipeline.datasets.registry import DATASETS, open_dataset
from pipeline.labelling.recipes import LabelRecipe

RANDOM_WEIGHTS = "Random weights: the figures only show that the code runs."


@dataclass(frozen=True)
class Request:
    """The user's options for a table.

    Attributes:
        folder: result folder, with a subfolder for the rows.
        console: for progress.
        roots: ``DIR`` or ``DIR#SPLIT`` by dataset.
        labels: label table by row, written ``METHOD (MODEL)@DATASET`` or ``METHOD@DATASET``.
        weights: weights file or folder by row, for rows whose model the user provides.
        settings: recipe fields for all rows.
        rows: only rows whose name contains one of these; empty for all.
        datasets: only these datasets; empty for all.
        limit: maximum images per dataset; 0 for all.
        image_sizes: for CLIPSeg's tables: further sides of the network's input to measure at.
        recipe: for ``unified``: measure this instead of the published methods; ``settings`` are in it.
        protocols: for ``unified``.
        quick: for ``unified``: a sample of one dataset.
    """

    folder: Path
    console: Console
    roots: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[str] = ()
    datasets: Sequence[str] = ()
    limit: int = 0
    image_sizes: Sequence[int] = ()
    recipe: LabelRecipe | None = None
    protocols: Sequence[ProtocolName] = ("unified",)
    quick: bool = False


def open_root(request: Request, name: str, *, usual_split: str | None = None) -> Any:
    """Open a dataset in the folder that the user gave.

    Args:
        request: the user's options.
        name: name of the dataset.
        usual_split: split if the user names none; None for the dataset's default.

    Raises:
        MaskMillError: those of ``pipeline.datasets.registry.open_dataset``.
    """
    root, _, split = request.roots.get(name, "").partition("#")
    return open_dataset(name, root=root or None, split=split or usual_split)


def check_rows(request: Request, titles: Sequence[str]) -> None:
    """Refuse a ``--row`` that selects none of the rows.

    Raises:
        WrongUse: ``wrong_use``.
    """
    for part in request.rows:
        if not any(part in title for title in titles):
            raise WrongUse(
                "wrong_use",
                f"--row {part}: no row has this in its name.",
                f"{did_you_mean(part, titles)}Rows: {'; '.join(titles)}.",
            )


def needs_root(name: str) -> str:
    """The option that provides a missing dataset."""
    return f"{DATASETS[name].source.title}: --root {name}=DIR"


def random_weights(settings: Mapping[str, Any]) -> bool:
    """Whether the settings ask for a CLIP with random weights."""
    return str(settings.get("pretrained", "")).startswith("random")


def why_not_measured(error: MaskMillError) -> str:
    """The reason to print in a row. Re-raises errors that a second run could resolve."""
    if isinstance(error, FailedWork) or error.code in ("output_differs", "file_damaged"):
        raise error
    return f"{error.code}: {error.message}"


def of_other_images(dataset: Dataset, split: str) -> str:
    """How the data differ from the benchmark's ``split``; empty if they do not."""
    whole, count = DATASETS[dataset.name].official.get(split), len(dataset.samples)
    if dataset.split != split:
        return f"Measured on {dataset.split}, not on {split}: not comparable with the benchmark."
    if whole not in (None, count):
        return f"{count:,} of the benchmark's {whole:,} images: not comparable with it."
    return ""
