"""What the papers' tables share: what the user asks for, the data, and how a row says what it lacks.

To add a paper's table: its figures as ``pipeline/evaluation/published/NAME.yaml``, and here a module with a
function that yields sections, listed in its ``TABLES`` and there in ``jobs.benchmark``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from models.errors import FailedWork, MaskMillError
from pipeline.datasets.base import Dataset
from pipeline.datasets.registry import DATASETS, open_dataset

RANDOM_WEIGHTS = "Random weights: the figures show that the path works, and mean nothing else."


@dataclass(frozen=True)
class Request:
    """What the user asks of a table.

    Attributes:
        folder: for the result; each row's result lies below it.
        console: for progress.
        roots: ``DIR`` or ``DIR#SPLIT`` by dataset.
        labels: label table by row, written ``METHOD (MODEL)@DATASET`` or ``METHOD@DATASET``.
        weights: weights file or folder by row, for rows whose model the user brings.
        settings: recipe fields that hold for all rows.
        rows: only rows whose name contains one of these; all if empty.
        datasets: only these; all of the table if empty.
        limit: at most so many images of each dataset; 0 is all.
        image_sizes: of CLIPSeg's tables: sides of the network's input to measure at besides the paper's.
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


def open_root(request: Request, name: str, *, usual_split: str | None = None) -> Any:
    """The dataset in the folder that the user gave for it.

    Args:
        request: with a root for the dataset, if it needs one.
        name: of the dataset.
        usual_split: where the user names none; None is the dataset's own default.

    Raises:
        MaskMillError: as ``pipeline.datasets.registry.open_dataset``.
    """
    root, _, split = request.roots.get(name, "").partition("#")
    return open_dataset(name, root=root or None, split=split or usual_split)


def needs_root(name: str) -> str:
    """What to give for a dataset that is missing."""
    return f"{DATASETS[name].source.title}: --root {name}=DIR"


def random_weights(settings: Mapping[str, Any]) -> bool:
    """Whether the user asks for a CLIP without trained weights."""
    return str(settings.get("pretrained", "")).startswith("random")


def why_not_measured(error: MaskMillError) -> str:
    """What a row says that could not be measured; raises what the same command again could mend."""
    if isinstance(error, FailedWork) or error.code == "output_differs":
        raise error
    return f"{error.code}: {error.message}"


def of_other_images(dataset: Dataset, split: str) -> str:
    """How the data differ from those of the benchmark; empty if they do not.

    Args:
        dataset: as it is measured.
        split: of the benchmark.
    """
    whole, count = DATASETS[dataset.name].official.get(split), len(dataset.samples)
    if dataset.split != split:
        return f"Measured on {dataset.split}, not on {split}: not comparable with the benchmark."
    if whole not in (None, count):
        return f"{count:,} of the benchmark's {whole:,} images: not comparable with it."
    return ""
