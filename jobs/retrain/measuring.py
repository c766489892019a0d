"""Candidate and champion, measured on the same images: by ``evaluate``, once each, wherever they are."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jobs.evaluate.compare import evaluate
from jobs.retrain.work import Work, champion, digest, measured_on
from pipeline.datasets.base import Dataset
from pipeline.evaluation.results import EVALUATION_FILE, EvaluationResult, read_results
from pipeline.files.storage import Storage, cache_dir, open_storage
from pipeline.labelling.prepare import clipseg_recipe, student_recipe
from pipeline.labelling.recipes import LabelRecipe
from pipeline.ontology.ontology import Ontology
from pipeline.retraining import registry
from pipeline.retraining.config import Model, tracking_uri
from pipeline.retraining.parent import job_run
from pipeline.retraining.registry import Version
from pipeline.retraining.state import read_ticks
from pipeline.table.record import find_table_record
from pipeline.tracking.names import place_name, run_name
from pipeline.tracking.results import log_result
from pipeline.tracking.tracker import TrackedDataset, open_tracker
from pipeline.trained.clipseg import ClipSegRecord
from pipeline.trained.record import TrainedRecord, read_trained
from pipeline.trained.student import StudentRecord

RECORDS: Mapping[str, type[TrainedRecord]] = {"maskclip-plus": StudentRecord, "clipseg": ClipSegRecord}
"""What each kind of model is known by."""
CHAMPIONS = "champions"


def champion_recipe(work: Work, model: Model, version: Version) -> tuple[LabelRecipe, str]:
    """How a champion labels, and the fingerprint of its weights."""
    folder = _folder_of(work, model, version)
    return _labelling(model, folder)[0], read_trained(RECORDS[model.kind], folder).fingerprint


def _folder_of(work: Work, model: Model, version: Version) -> str:
    """The folder of a version, downloaded from the registry if its own is gone."""
    into = work.storage.path(CHAMPIONS) if work.storage.is_local else cache_dir() / CHAMPIONS
    return registry.version_folder(work.client, version, model.kind, into)


def _labelling(model: Model, folder: str) -> tuple[LabelRecipe, Ontology | None]:
    """How a trained model labels, and its own classes if it has some."""
    if model.kind == "maskclip-plus":
        return student_recipe(folder)
    return clipseg_recipe(folder), None


def measure_both(work: Work, model: Model) -> dict[str, Any]:
    """Measure candidate and champion.

    Returns:
        The places of the results, and what they are of. None without a champion.
    """
    dataset = measured_on(work)
    trained = work.runner.outputs(f"train {model.folder}")
    place = work.here(f"{model.folder}-evaluation")
    candidate = _measure(work, model, dataset, trained["folder"], f"{place}/candidate", "candidate")
    version = champion(work, model)
    best: dict[str, Any] | None = None
    if version is not None:
        folder = _folder_of(work, model, version)
        fingerprint = read_trained(RECORDS[model.kind], folder).fingerprint
        earlier = _measured_before(work, model, candidate, fingerprint)
        best = (earlier or _measure(work, model, dataset, folder, f"{place}/champion", "champion")) | {
            "version": version.number,
            "reused": earlier is not None,
        }
    return {"candidate": candidate, "champion": best}


def _measure(work: Work, model: Model, dataset: Dataset, folder: str, place: str, who: str) -> dict[str, Any]:
    """Measure a model unless its result exists; returns its place, and what it is a result of."""
    record = read_trained(RECORDS[model.kind], folder)
    target = work.storage.child(place)
    begun = find_table_record(target.child("labels"))
    if begun is not None and begun.weights["fingerprint"] != record.fingerprint:
        target.delete()  # of a model that was trained anew since
    if not target.exists(EVALUATION_FILE):
        recipe, own = _labelling(model, folder)
        words = own or work.classes
        with _local(target) as output:
            evaluate(
                dataset,
                work.console,
                recipe=recipe,
                ontology=words if set(dataset.class_names) <= set(words.names) else None,
                output=output,
                boundary=False,
                pictures=0,
                address=work.config.address,
                verbose=work.verbose,
            )
    result = _result(target)
    _track(work, model, target, result, who)
    return {
        "folder": target.uri,
        "sha256": _sha256(target),
        "fingerprint": record.fingerprint,
        "bytes": _model_bytes(model, folder),
        "network": digest(record.config),
        "set": result.dataset.content,
        "conditions": result.conditions,
        "miou": result.metrics.get("miou"),
    }


@contextmanager
def _local(target: Storage) -> Iterator[str]:
    """A local folder for a result, whose files then go to their place, ``evaluation.json`` last."""
    if target.is_local:
        yield target.path()
        return
    with tempfile.TemporaryDirectory(prefix="maskmill-") as folder:
        yield folder
        made = open_storage(folder)
        names = made.list(recursive=True)
        for name in sorted(names, key=lambda name: name == EVALUATION_FILE):
            target.write_bytes(name, made.read_bytes(name))


def _track(work: Work, model: Model, target: Storage, result: EvaluationResult, who: str) -> None:
    """Track a result, unless an earlier attempt has done so."""
    told = {"model": model.folder, "measured": who, "result": _sha256(target)}
    if job_run(work.client, "evaluate", work.config.name, work.run, finished=True, **told):
        return
    dataset = result.dataset
    with open_tracker(tracking_uri(work.config), say=lambda _line: None) as tracker:
        tracker.start(
            "evaluate",
            run_name("evaluate", f"{who} {model.folder}", place_name(work.storage.uri)),
            tags=work.tags(**told),
            dataset=TrackedDataset(
                dataset.name, dataset.fingerprint or "", profile={"images": dataset.images}
            ),
        )
        log_result(tracker, target.uri)


def _measured_before(
    work: Work, model: Model, candidate: Mapping[str, Any], fingerprint: str
) -> dict[str, Any] | None:
    """An earlier result of the same model on the same images under the same conditions.

    Of a candidate with another network it is measured again: times of different days cannot be compared.
    """
    for tick in reversed(list(read_ticks(work.storage))):
        outputs = tick.step(f"evaluate {model.folder}").outputs
        for who in ("candidate", "champion"):
            found = outputs.get(who)
            if found is None:
                continue
            same = all(found.get(key) == candidate[key] for key in ("set", "conditions", "network"))
            if same and found["fingerprint"] == fingerprint and holds_result(found):
                return {key: value for key, value in found.items() if key not in ("version", "reused")}
    return None


def holds_result(found: Mapping[str, Any] | None) -> bool:
    """Whether a result still exists, unchanged."""
    return found is None or _sha256(open_storage(found["folder"])) == found["sha256"]


def _model_bytes(model: Model, folder: str) -> int | None:
    storage = open_storage(folder)
    with storage.open_file(RECORDS[model.kind].WEIGHTS_FILE) as file:
        return file.seek(0, os.SEEK_END)


def _sha256(folder: Storage) -> str:
    """Of an evaluation; "" if there is none."""
    try:
        return hashlib.sha256(folder.read_bytes(EVALUATION_FILE)).hexdigest()
    except FileNotFoundError:
        return ""


def _result(folder: Storage) -> EvaluationResult:
    found = read_results(folder.uri)[0][1]
    assert isinstance(found, EvaluationResult)
    return found
