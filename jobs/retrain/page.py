"""What is on the page of a tick, from the files of the retraining."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.console import duration
from jobs.retrain.work import Work, labels_before
from pipeline.datasets.base import Dataset
from pipeline.evaluation.results import EVALUATION_FILE, EvaluationResult, read_results
from pipeline.evaluation.tables import ImageScore, class_lookup, read_labels
from pipeline.files.storage import open_storage
from pipeline.report.pictures import colorize
from pipeline.report.retraining_page import (
    Check,
    ClassBars,
    Event,
    Judged,
    LabelShare,
    RetrainingPage,
    retraining_page,
)
from pipeline.report.training_page import Card
from pipeline.retraining.config import Model
from pipeline.retraining.decision import Decision, read_decision
from pipeline.retraining.labels import read_labels as read_summary
from pipeline.retraining.ledger import Entry
from pipeline.retraining.state import tick_folder
from pipeline.table.record import read_table_record

SHOWN = 4
"""Images on the page."""
_KINDS = {"maskclip-plus": "a student", "clipseg": "a CLIPSeg"}
_EVENTS = {
    "promoted": "promoted",
    "forced": "promoted by hand",
    "rolled_back": "back to",
    "refused": "refused",
    "failed": "failed",
}


def write_page(work: Work, name: str, dataset: Dataset) -> str:
    """Write the page of a tick; returns its text."""
    models = [_judged(work, model, dataset) for model in work.config.models]
    text = retraining_page(
        RetrainingPage(
            title=f"{work.config.name}, tick {int(work.run)}",
            place=work.storage.uri_of(name.rpartition("/")[0]),
            toy=any(_result(work, model, "candidate").toy for model in work.config.models),
            tiles=_tiles(work),
            models=models,
            labels=_labels(work),
            labels_note=_labels_note(work),
            steps=[
                (step.name, duration(step.seconds or 0), step.attempts)
                for step in work.runner.tick.steps
                if step.state == "done"
            ],
            commands=_commands(work, models),
            alone=[(step.name, step.command) for step in work.runner.tick.steps if step.command],
        )
    )
    work.storage.write_bytes(name, text.encode())
    return text


def _tiles(work: Work) -> list[tuple[str, str]]:
    intake, label, verify = (work.runner.outputs(name) for name in ("intake", "label", "verify"))
    took = sum(step.seconds or 0 for step in work.runner.tick.steps)
    tiles = [
        ("new images", f"{intake['images']:,}"),
        ("images trained on", f"{label['images'] - label['failed']:,}"),
        ("labels made by", label["teacher"]),
    ]
    if verify["quality"] is not None:
        tiles.append(("mean label quality", f"{verify['quality']:.2f}"))
    return [*tiles, ("time", duration(took))]


def _labels(work: Work) -> list[LabelShare]:
    after, before = read_summary(work.storage.child(tick_folder(work.run))), labels_before(work)
    assert after is not None, "the step verify has written it"
    colors = read_table_record(work.runner.outputs("label")["table"]).ontology.palette()
    return [
        LabelShare(
            name,
            "#{:02x}{:02x}{:02x}".format(*colors[index]),
            None if before is None else before.shares.get(name, 0.0),
            after.shares.get(name, 0.0),
        )
        for index, name in enumerate(after.classes)
    ]


def _labels_note(work: Work) -> str:
    note = "Share of each class in all labelled pixels, in percent"
    lines = work.runner.outputs("verify")["lines"]
    return " ".join([f"{note}, before and with the new images.", *lines]) if lines else f"{note}."


def _judged(work: Work, model: Model, dataset: Dataset) -> Judged:
    decision = read_decision(work.storage, work.here(f"{model.folder}-verdict.json"))
    assert decision is not None, "the gate has written it"
    outputs = work.runner.outputs(f"evaluate {model.folder}")
    candidate = _result(work, model, "candidate")
    best = outputs["champion"]
    champion = None if best is None else _result(work, model, "champion")
    ious: Mapping[str, float | None] = (
        {} if champion is None else {entry.name: entry.iou for entry in champion.classes}
    )
    name = work.config.registered(model)
    return Judged(
        name=name,
        kind=_KINDS[model.kind],
        promoted=decision.promotes,
        version=work.runner.outputs(f"register {model.folder}")["version"],
        champion=None if best is None else best["version"],
        has_truth=decision.has_truth,
        images=decision.images,
        candidate_miou=decision.candidate_miou,
        champion_miou=decision.champion_miou,
        gain=decision.gain,
        low=decision.low,
        high=decision.high,
        confidence=work.config.gate.confidence,
        delta=work.config.gate.delta,
        checks=[
            Check(reason.check.replace("_", " "), reason.passed, reason.text[:1].upper() + reason.text[1:])
            for reason in decision.reasons
        ],
        classes=[
            ClassBars(entry.name, entry.color, entry.iou, ious.get(entry.name)) for entry in candidate.classes
        ],
        cards=_cards(dataset, outputs["candidate"]["folder"], None if best is None else best["folder"]),
        history=_history(work.ledger.of(name), work.ledger.current(name)),
    )


def _result(work: Work, model: Model, who: str) -> EvaluationResult:
    folder = work.runner.outputs(f"evaluate {model.folder}")[who]["folder"]
    found = read_results(folder)[0][1]
    assert isinstance(found, EvaluationResult), EVALUATION_FILE
    return found


def _history(entries: tuple[Entry, ...], current: str | None) -> list[Event]:
    """What the ledger says, newest first, without intents."""
    events: list[Event] = []
    for entry in reversed(entries):
        if entry.is_intent:
            continue
        decision = None if entry.verdict is None else Decision.model_validate(entry.verdict)
        failed = decision.failed if decision else ()
        made = entry.kind in ("promoted", "forced", "rolled_back")
        events.append(
            Event(
                entry.time.replace("T", " ").removesuffix("Z"),
                _EVENTS[entry.kind],
                entry.version or "–",
                entry.run or "by hand",
                None if decision is None else decision.candidate_miou,
                entry.why or (failed[0].text if failed else ""),
                now=made and entry.version == current and not any(event.now for event in events),
            )
        )
    return events


def _cards(dataset: Dataset, candidate: str, champion: str | None) -> list[Card]:
    """Images on which candidate and champion differ most, for better and for worse."""
    ours = _mious(candidate)
    theirs = {} if champion is None else _mious(champion)
    scored = {
        name: value - (theirs.get(name) or 0.0 if champion is not None else 0.0)
        for name, value in ours.items()
    }
    order = sorted(scored, key=lambda name: (scored[name], name))
    half = SHOWN // 2
    chosen = list(dict.fromkeys([*order[::-1][:half], *order[:half]]))
    samples = {sample.name: sample for sample in dataset.samples if sample.name in chosen}
    palette = dataset.classes.palette()
    maps = {"candidate": _maps(candidate, dataset, chosen)}
    if champion is not None:
        maps = {"champion": _maps(champion, dataset, chosen), **maps}
    cards = []
    for name in chosen:
        sample = samples[name]
        masks = "truth" if dataset.has_truth else "teacher"
        pictures = [("image", dataset.image(sample)), (masks, colorize(dataset.truth(sample), palette))]
        pictures += [(who, colorize(found[name], palette)) for who, found in maps.items() if name in found]
        said = f"{name}: IoU {100 * ours[name]:.0f}"
        if champion is not None:
            said = f"{name}: IoU {100 * (theirs.get(name) or 0):.0f} → {100 * ours[name]:.0f}"
        cards.append(Card(said, pictures))
    return cards


def _mious(folder: str) -> dict[str, float]:
    """Mean IoU of each image that has one."""
    with open_storage(folder).open_file("images.parquet") as file:
        table: pa.Table = pq.read_table(file, columns=["name", "miou"])
    rows: list[dict[str, Any]] = table.to_pylist()
    return {row["name"]: row["miou"] for row in rows if row["miou"] is not None}


def _maps(folder: str, dataset: Dataset, names: list[str]) -> dict[str, np.ndarray]:
    """Label maps in the ids of the dataset, by name of the image."""
    table = open_storage(folder).child("labels")
    record = read_table_record(table.uri)
    lookup = class_lookup(
        record.ontology.names, dataset.class_names, ignore_index=record.ontology.ignore_index
    )
    samples = {sample.name: sample for sample in dataset.samples}
    found = read_labels(table, [ImageScore(name, "", None) for name in names], samples)
    return {name: lookup[labels] for name, labels in found.items()}


def _commands(work: Work, models: list[Judged]) -> dict[str, str]:
    output = shlex.quote(work.storage.uri)
    commands = {}
    for model, judged in zip(work.config.models, models, strict=True):
        which = f" --model {judged.name}" if len(models) > 1 else ""
        of = f" ({judged.name})" if which else ""
        folder = shlex.quote(work.runner.outputs(f"train {model.folder}")["folder"])
        if judged.promoted:
            commands[f"Label with it{of}"] = f"maskmill label --model {folder} --images DIR --output OUT"
            if judged.champion is not None:
                commands[f"Go back{of}"] = f"maskmill rollback {output}{which}"
        else:
            commands[f"Promote it all the same{of}"] = (
                f"maskmill promote {output}{which} --version {judged.version} --force --why TEXT"
            )
    commands["What it does now"] = f"maskmill status {output}"
    return commands
