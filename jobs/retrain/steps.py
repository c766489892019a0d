"""The steps of a tick: each calls the job that does the same alone, and says what it made.

The jobs run in this process: a kill then ends them with it, and their leases are free at once; memory and Ray
are given back between them. Each can be called again whatever an earlier attempt has left.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from jobs.export import Export
from jobs.label import label_images
from jobs.labelling.options import LabelOptions
from jobs.retrain.commands import evaluate_command, label_command, step_command, train_command
from jobs.retrain.measuring import RECORDS, champion_recipe, holds_result, measure_both
from jobs.retrain.page import write_page
from jobs.retrain.work import (
    HELD_TRUTH,
    Work,
    champion,
    corrections_of,
    decision_of,
    digest,
    labels_before,
    measured_on,
    tell,
)
from jobs.train.clipseg import train_clipseg
from jobs.train.maskclip_plus import COLLAPSED, train_student
from jobs.train.run import INTERRUPTED, TrainOptions
from jobs.verify import check_table
from models.errors import FailedWork, MaskMillError
from pipeline.files.storage import open_storage
from pipeline.formats.record import find_export
from pipeline.labelling.recipes import LabelRecipe
from pipeline.retraining import registry
from pipeline.retraining.config import (
    Model,
    label_recipe,
    tracking_uri,
    training_recipe,
)
from pipeline.retraining.corrections import FROZEN, freeze
from pipeline.retraining.decision import write_decision
from pipeline.retraining.gate import decide
from pipeline.retraining.intake import (
    CORPUS_FILE,
    EXCLUDED_FILE,
    HELD_FILE,
    HELD_OUT_FILE,
    HELD_TABLE,
    NEW_FILE,
    TABLE,
    Ids,
    ids_of,
    joined,
    look_through,
    picked,
    read_images,
    table_digests,
    taken_in,
    write_images,
)
from pipeline.retraining.labels import (
    LabelSummary,
    read_labels,
    summarise_labels,
    write_labels,
)
from pipeline.retraining.measured import read_measured
from pipeline.retraining.parent import close_parent, job_run, open_parent
from pipeline.retraining.promotion import promote, refuse
from pipeline.retraining.registry import Facts, Version
from pipeline.retraining.state import Step, read_ticks, tick_folder
from pipeline.table.corrections import OFF, open_corrections
from pipeline.table.drift import compare_labels
from pipeline.table.record import content_digest, read_table_record
from pipeline.table.verify import PROBLEMS
from pipeline.trained.record import read_trained, read_trained_weights

TABLES = "tables"
LABELLED_FILE = "labelled.parquet"
"""In a tick's folder: the images that a champion labels in it."""
PAGE = "report.html"


def open_run(work: Work) -> None:
    """Make sure that the tick has its run in MLflow, and that registry and ledger agree on the champions.

    Raises:
        MaskMillError: ``tracking_unreachable``; ``champion_changed``; ``output_not_ours``.
    """
    for model in work.config.models:
        registry.refuse_other_owner(work.client, work.config.registered(model), work.storage)
        _measure_anew(work, model, champion(work, model))
    if work.runner.tick.mlflow_run is None:
        uri = tracking_uri(work.config)
        found = open_parent(work.client, uri, work.config.name, work.run, output=work.storage.uri)
        work.runner.write(mlflow_run=found)


def _measure_anew(work: Work, model: Model, version: Version | None) -> None:
    """Have candidate and champion compared again if another version is champion since."""
    measured = work.runner.outputs(f"evaluate {model.folder}")
    if not measured or work.runner.tick.step(f"promote {model.folder}").state == "done":
        return
    known = {
        None if measured["champion"] is None else measured["champion"]["version"],
        work.runner.outputs(f"register {model.folder}").get("version"),  # a kill after the alias moved
    }
    if (None if version is None else version.number) not in known:
        work.runner.reset([f"evaluate {model.folder}", f"gate {model.folder}"])


def steps_of(work: Work) -> list[Step]:
    """The steps of a tick, in order."""
    steps = [
        Step(
            name="intake",
            work=lambda _again: _intake(work),
            command=step_command(work, "intake"),
            holds=lambda _outputs: work.storage.exists(work.here(NEW_FILE)),
        ),
        Step(
            name="label",
            work=lambda _again: _label(work),
            holds=lambda outputs: content_digest(outputs["table"]) == outputs["digest"],
            needs=("intake",),
            command=label_command(work),
        ),
        Step(
            name="verify",
            work=lambda _again: _verify(work),
            needs=("label",),
            command=f"maskmill verify {shlex.quote(work.storage.uri_of(TABLE))}",
        ),
    ]
    for model in work.config.models:
        steps += _steps_of_model(work, model)
    verdicts = [f"{kind} {model.folder}" for model in work.config.models for kind in ("gate", "promote")]
    steps.append(
        Step(
            name="report",
            work=lambda _again: _report(work),
            command=step_command(work, "report"),
            holds=lambda _outputs: work.storage.exists(work.here(PAGE)),
            needs=verdicts,
        )
    )
    return steps


def _steps_of_model(work: Work, model: Model) -> list[Step]:
    name = model.folder
    folder = work.storage.uri_of(work.here(name))
    table = work.runner.outputs("label").get("table", work.storage.uri_of(TABLE))
    return [
        Step(
            name=f"train {name}",
            work=lambda again: _train(work, model, again=again),
            holds=lambda outputs: _holds_model(model, outputs),
            needs=("label", "verify"),
            command=train_command(model, table, folder, corrections_of(work)),
        ),
        Step(
            name=f"evaluate {name}",
            work=lambda _again: measure_both(work, model),
            holds=lambda outputs: all(holds_result(outputs[who]) for who in ("candidate", "champion")),
            needs=(f"train {name}",),
            command=evaluate_command(work, folder),
        ),
        Step(
            name=f"gate {name}",
            work=lambda _again: _gate(work, model),
            command=step_command(work, f"gate {name}"),
            holds=lambda _outputs: work.storage.exists(work.here(f"{name}-verdict.json")),
            needs=(f"evaluate {name}",),
        ),
        Step(
            name=f"register {name}",
            work=lambda _again: _register(work, model),
            command=step_command(work, f"register {name}"),
            needs=(f"train {name}", f"gate {name}"),
        ),
        Step(
            name=f"promote {name}",
            work=lambda _again: _promote(work, model),
            command=step_command(work, f"promote {name}"),
            needs=(f"gate {name}", f"register {name}"),
            once=True,
        ),
    ]


# --- intake, label, verify ----------------------------------------------------------------------------------


def _intake(work: Work) -> dict[str, Any]:
    found = work.intake()
    storage = work.storage
    write_images(storage, work.here(HELD_FILE), found.held)
    write_images(storage, work.here(NEW_FILE), found.new)
    if found.excluded.num_rows:
        write_images(storage, EXCLUDED_FILE, joined([read_images(storage, EXCLUDED_FILE), found.excluded]))
    work.runner.write(images=found.new.num_rows)
    return {
        "images": found.new.num_rows,
        "held": found.held.num_rows,
        "excluded": found.excluded.num_rows,
        "waiting": found.waiting,
        "digest": _ids_digest(ids_of(found.new)),
        "lines": list(found.lines),
    }


def _label(work: Work) -> dict[str, Any]:
    config, storage = work.config, work.storage
    ticks = list(read_ticks(storage))
    corpus, held = taken_in(storage, ticks), taken_in(storage, ticks, HELD_FILE)
    write_images(storage, CORPUS_FILE, corpus)
    recipe, table, teacher, source = label_recipe(config), TABLE, "", CORPUS_FILE
    if config.label.by == "champion":
        version = champion(work, config.models[0])
        if version is not None:
            recipe, fingerprint = champion_recipe(work, config.models[0], version)
            table, teacher = f"{TABLES}/{fingerprint[:16]}", f"{version.name} version {version.number}"
            source = work.here(LABELLED_FILE)
            new = ids_of(read_images(storage, work.here(NEW_FILE)))
            write_images(storage, source, picked(corpus, new, config.when.budget.images))
    _run_label(work, source, table, recipe)
    if held.num_rows:
        write_images(storage, HELD_OUT_FILE, held)
        _run_label(work, HELD_OUT_FILE, HELD_TABLE, label_recipe(config))
        _draw_held_out(work)
    record = read_table_record(storage.uri_of(table))
    before = [tick.step("label").outputs.get("table") for tick in ticks if tick.run != work.run]
    others = [place for place in dict.fromkeys(before) if place and place != storage.uri_of(table)]
    said = freeze([*map(open_storage, others), storage.child(table)], storage.child(work.here(FROZEN)))
    teacher = teacher or f"{recipe.name} ({recipe.model})"
    return {
        "table": storage.uri_of(table),
        "source": source,
        "digest": content_digest(storage.uri_of(table)),
        "images": record.counts["images"],
        "failed": record.counts["failed"],
        "teacher": f"{teacher}, {said:,} corrected by people" if said else teacher,
        "corrections": said,
    }


def _run_label(work: Work, source: str, table: str, recipe: LabelRecipe) -> None:
    config = work.config
    options = LabelOptions(
        output=work.storage.uri_of(table),
        max_failure_rate=config.label.max_failure_rate,
        address=config.address,
        verbose=work.verbose,
        tracking=tracking_uri(config),
        tags=work.tags(),
    )
    source = work.storage.uri_of(source)
    if label_images(source, recipe, work.classes, options, console=work.console):
        raise FailedWork(
            "labelling_failed",
            f"More than {config.label.max_failure_rate:.1%} of the new images could not be labelled.",
            f"See which and why: maskmill show {shlex.quote(work.storage.uri_of(table))}. They stay in the "
            "table and are not tried again: the same command continues without them.",
        )


def _draw_held_out(work: Work) -> None:
    """Write the labels of the images that are held out as masks, which then stand for the truth.

    They are the teacher's, or what people say of them.
    """
    said = open_corrections(work.storage.uri_of(HELD_TABLE))
    drawn = find_export(work.storage.child(HELD_TRUTH))
    Export(
        source=work.storage.uri_of(HELD_TABLE),
        format="png",
        output=work.storage.uri_of(HELD_TRUTH),
        with_images=True,
        overwrite=drawn is not None and drawn.corrections != ("" if said is None else said.identity),
        address=work.config.address,
        verbose=work.verbose,
    ).run(work.console)


def _verify(work: Work) -> dict[str, Any]:
    """Look at the rows that this tick added; older ones were looked at by theirs."""
    labelled = work.runner.outputs("label")
    storage = open_storage(labelled["table"])
    record = read_table_record(labelled["table"])
    new = ids_of(read_images(work.storage, work.here(NEW_FILE)))
    held = ids_of(read_images(work.storage, HELD_OUT_FILE))
    known = table_digests(work.storage.child(HELD_TABLE))
    parts, missing = look_through(storage, new, held, work.dataset, known)
    found = check_table(storage, record, None, work.console, parts=parts, address=work.config.address)
    problems = {PROBLEMS[kind][0]: count for kind, count in found.counts.items()}
    if missing:
        problems["new images without a row"] = missing
    if problems:
        table = shlex.quote(labelled["table"])
        raise FailedWork(
            "table_damaged",
            f"{labelled['table']}: {', '.join(f'{count:,} {what}' for what, count in problems.items())}.",
            f"See them with maskmill verify {table}, mend it with --repair, and run the same command again.",
        )
    labels = summarise_labels(labelled["table"])
    write_labels(work.storage.child(tick_folder(work.run)), labels)
    before = labels_before(work)
    drift = None if before is None else compare_labels(before, labels)
    return {
        "digest": labels.digest,
        "rows": found.rows,
        "quality": labels.mean_quality,
        "drift": None if drift is None else drift.divergence,
        "lines": [] if drift is None else drift.sentences(),
    }


# --- train, evaluate, gate ----------------------------------------------------------------------------------


def _train(work: Work, model: Model, *, again: bool) -> dict[str, Any]:
    config, table = work.config, work.runner.outputs("label")["table"]
    folder = work.storage.uri_of(work.here(model.folder))
    options = TrainOptions(
        output=folder,
        workers=config.workers,
        # What an earlier attempt learned from other labels is of no use.
        overwrite=not again and open_storage(folder).exists(),
        tracking=tracking_uri(config),
        address=config.address,
        verbose=work.verbose,
        tags=work.tags(model=model.folder),
    )
    recipe: Any = training_recipe(model)
    corrections = open_corrections(table, corrections_of(work) or OFF)
    stopped = ""
    try:
        if model.kind == "maskclip-plus":
            status = train_student(table, recipe, options, corrections=corrections, console=work.console)
        else:
            status = train_clipseg(
                recipe, options, labels=table, corrections=corrections, console=work.console
            )
    except MaskMillError as error:
        if error.code != COLLAPSED or not open_storage(folder).exists(RECORDS[model.kind].RECORD_FILE):
            raise
        status, stopped = 0, error.message  # the model of the last good step is there: the gate judges it
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    record = read_trained(RECORDS[model.kind], folder)
    return {
        "folder": folder,
        "fingerprint": record.fingerprint,
        "steps": record.training.get("iterations"),
        "stopped": stopped,
    }


def _holds_model(model: Model, outputs: Mapping[str, Any]) -> bool:
    try:
        record = read_trained(RECORDS[model.kind], outputs["folder"])
        read_trained_weights(record)
    except MaskMillError:
        return False
    return record.fingerprint == outputs["fingerprint"]


def _labels_of(work: Work, name: str, version: str) -> LabelSummary | None:
    """What the labels were that a version was trained on, if a tick of this retraining has made it."""
    runs = [entry.run for entry in work.ledger.of(name) if entry.version == version and entry.run]
    return read_labels(work.storage.child(tick_folder(runs[0]))) if runs else None


def _gate(work: Work, model: Model) -> dict[str, Any]:
    found = work.runner.outputs(f"evaluate {model.folder}")
    best = found["champion"]
    candidate = read_measured(
        found["candidate"]["folder"],
        "candidate",
        model_bytes=found["candidate"]["bytes"],
        labels=read_labels(work.storage.child(tick_folder(work.run))),
    )
    champion_measured = None
    if best is not None:
        champion_measured = read_measured(
            best["folder"],
            f"champion version {best['version']}",
            model_bytes=best["bytes"],
            labels=_labels_of(work, work.config.registered(model), best["version"]),
        )
        if best["network"] == found["candidate"]["network"]:
            # It takes as long: a difference is that of the load of the machine.
            champion_measured = replace(champion_measured, seconds_per_image=None)
    decision = decide(candidate, champion_measured, work.config.gate)
    write_decision(work.storage, work.here(f"{model.folder}-verdict.json"), decision)
    return {"verdict": decision.verdict, "digest": digest(decision.model_dump(mode="json"))}


# --- register, promote, report ------------------------------------------------------------------------------


def _register(work: Work, model: Model) -> dict[str, Any]:
    name, labelled = work.config.registered(model), work.runner.outputs("label")
    decision = decision_of(work, model)
    run_id = job_run(work.client, "train", work.config.name, work.run, model=model.folder)
    version = registry.register(
        work.client,
        name,
        work.runner.outputs(f"train {model.folder}")["folder"],
        Facts(
            key=f"{work.config.name}/{work.run}/{model.folder}",
            kind=model.kind,
            run=work.run,
            data=work.runner.outputs("intake")["digest"],
            labels=labelled["digest"],
            teacher=labelled["teacher"],
            verdict=decision.verdict,
            reasons=tuple(decision.sentences()[1:]),
            page=work.storage.uri_of(work.here(PAGE)),
        ),
        run_id=run_id or work.runner.tick.mlflow_run or "",
        output=work.storage,
    )
    return {"name": name, "version": version.number}


def _promote(work: Work, model: Model) -> dict[str, Any]:
    name, decision = work.config.registered(model), decision_of(work, model)
    version = work.runner.outputs(f"register {model.folder}")["version"]
    best = work.runner.outputs(f"evaluate {model.folder}")["champion"]
    verdict = decision.model_dump(mode="json")
    if decision.promotes:
        try:
            entry = promote(
                work.ledger,
                work.client,
                work.lease,
                name,
                version,
                expected=None if best is None else best["version"],
                verdict=verdict,
                run=work.run,
            )
        except MaskMillError as error:
            if error.code == "champion_changed":
                # The next run compares with whoever is champion then.
                work.runner.reset([f"evaluate {model.folder}", f"gate {model.folder}"])
            raise
    else:
        entry = refuse(work.ledger, work.client, work.lease, name, version, verdict=verdict, run=work.run)
    tell(
        work,
        "promoted" if decision.promotes else "refused",
        model=name,
        version=version,
        previous=None if best is None else best["version"],
        miou=decision.candidate_miou,
        champion_miou=decision.champion_miou,
        reasons=decision.sentences()[1:],
        page=work.storage.uri_of(work.here(PAGE)),
    )
    return {"kind": entry.kind, "sequence": entry.sequence, "version": version}


def _report(work: Work) -> dict[str, Any]:
    text = write_page(work, work.here(PAGE), measured_on(work))
    metrics: dict[str, float | None] = {
        "new_images": work.runner.outputs("intake")["images"],
        "images": work.runner.outputs("label")["images"],
        "label_drift": work.runner.outputs("verify")["drift"],
        "label_quality": work.runner.outputs("verify")["quality"],
    }
    outcomes = {}
    for model in work.config.models:
        decision = decision_of(work, model)
        outcomes[model.folder] = decision.verdict
        metrics |= {
            f"{model.folder}/candidate_miou": decision.candidate_miou,
            f"{model.folder}/champion_miou": decision.champion_miou,
            f"{model.folder}/gain": decision.gain,
            f"{model.folder}/gain_low": decision.low,
            f"{model.folder}/gain_high": decision.high,
        }
    run_id = work.runner.tick.mlflow_run
    assert run_id is not None, "it is opened before the steps"
    close_parent(
        work.client,
        run_id,
        work.config.name,
        metrics=metrics,
        params={"output": work.storage.uri, "teacher": work.runner.outputs("label")["teacher"]},
        tags={f"{registry.PREFIX}verdict.{name}": verdict for name, verdict in outcomes.items()},
        files={PAGE: text},
        succeeded=True,
    )
    return {"page": work.storage.uri_of(work.here(PAGE))}


# --- digests ----------------------------------------------------------------------------------------------


def _ids_digest(ids: Ids) -> str:
    return hashlib.sha256(np.sort(ids).tobytes()).hexdigest()
