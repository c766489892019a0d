"""The commands that do alone what a step does, for state, page and errors."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from jobs.retrain.work import HELD_TRUTH, Work
from pipeline.retraining.config import Model, as_settings
from pipeline.retraining.intake import CORPUS_FILE, TABLE


def step_command(work: Work, name: str) -> str:
    """``maskmill retrain`` of a step that no other job does; empty if the configuration has no file."""
    return "" if work.file is None else _command(f"maskmill retrain {shlex.quote(work.file)}", step=name)


def label_command(work: Work) -> str:
    """``maskmill label`` of all images that were taken in."""
    config = work.config
    classes = config.classes if isinstance(config.classes, str) else ", ".join(config.classes or ())
    return _command(
        "maskmill label",
        manifest=work.storage.uri_of(CORPUS_FILE),
        ontology=config.ontology,
        classes=classes or None,
        recipe=config.label.recipe,
        set=as_settings(config.label.settings),
        output=work.storage.uri_of(TABLE),
    )


def train_command(model: Model, table: str, folder: str, corrections: str | None) -> str:
    """``maskmill train`` of a model on a label table and what people say of it, into a folder."""
    return _command(
        f"maskmill train {model.kind}",
        labels=table,
        recipe=model.recipe,
        set=as_settings(model.settings),
        corrections=corrections or "off",
        output=folder,
    )


def evaluate_command(work: Work, folder: str) -> str:
    """``maskmill evaluate`` of a model."""
    asked = work.config.evaluation
    if asked.dataset is not None:
        return _command(
            "maskmill evaluate", model=folder, dataset=asked.dataset, root=asked.root, split=asked.split
        )
    truth = work.storage.uri_of(HELD_TRUTH)
    return _command(
        "maskmill evaluate",
        model=folder,
        images=asked.images or f"{truth}/images",
        truth=asked.truth or f"{truth}/masks",
        ontology=asked.ontology or work.config.ontology or f"{truth}/classes.yaml",
    )


def _command(words: str, **options: str | Sequence[str] | None) -> str:
    """A command as it is typed."""
    for name, value in options.items():
        for one in [value] if isinstance(value, str) else value or ():
            words += f" --{name} {shlex.quote(one)}"
    return words
