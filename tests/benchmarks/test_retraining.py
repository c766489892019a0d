from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.faults.ledger import LOSSES, Ledger, table
from benchmarks.retraining.__main__ import Counted, run_case, run_cases
from benchmarks.retraining.cases import CASES
from benchmarks.retraining.growing import HALF, NEW_CLASS, STAGES, After, draw, scenes_of
from benchmarks.retraining.growing import table as growing_table
from benchmarks.retraining.judging import Cost
from benchmarks.retraining.luck import luck, miou
from benchmarks.retraining.refused import LOST_CLASS, renamed
from benchmarks.retraining.results import STEPS, step_name
from benchmarks.retraining.world import FEW, MANY, World, Worlds
from pipeline.metrics.paired import miou_of_counts
from pipeline.retraining import measured
from pipeline.retraining.config import read_config, training_recipe
from pipeline.table.labels import ok_row
from pipeline.toyworld.captions import CLASSES


def test_every_step_of_a_tick_has_a_case_that_kills_the_driver_in_it() -> None:
    assert {f"driver_{step}" for step in STEPS} <= set(CASES)
    assert step_name("label") == "label" and step_name("train") == "train student"


def test_the_configuration_is_one_and_the_second_training_is_longer(tmp_path: Path) -> None:
    world = World(tmp_path)
    for steps in (FEW, MANY):
        config = read_config(world.configure(steps))
        assert training_recipe(config.models[0]).loop.iterations == steps
        assert (config.output, config.tracking) == (world.output, world.server.uri)
    assert FEW < MANY


def test_what_is_more_or_less_than_it_should_be_is_counted() -> None:
    cost = Cost()
    cost.count("versions", 3, 1)
    cost.count("entries", 0, 1)
    cost.count("rows", 5, 5)
    cost.add("promoted", 0, "nothing")
    assert (cost.doubled, cost.lost, cost.wrong, cost.promoted) == (2, 1, 0, 0)
    assert len(cost.notes) == 2


def test_a_case_that_fails_is_counted_and_outlives_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(worlds: Worlds, rng: random.Random) -> Cost:
        raise KeyError("outcome")

    def promotes(worlds: Worlds, rng: random.Random) -> Cost:
        return Cost(promoted=1, notes=["version 2"])

    monkeypatch.setitem(CASES, "second_tick", breaks)  # type: ignore[arg-type]
    monkeypatch.setitem(CASES, "rolled_back", promotes)  # type: ignore[arg-type]
    ledger = Ledger(tmp_path / "retraining.jsonl", Counted)
    for _ in range(2):
        run_cases(Worlds(tmp_path), ledger, ["second_tick", "rolled_back"])
    found = ledger.entries()
    assert [(one.kind, one.wrong, one.promoted) for one in found] == [
        ("second_tick", 1, 0),
        ("rolled_back", 0, 1),
    ]
    assert "KeyError" in found[0].notes[0] and "version 2" in capsys.readouterr().out
    assert table(found, ["rolled_back"], ("promoted", *LOSSES)).splitlines()[0] == (
        "| kind | times | promoted | lost | doubled | wrong | hung | seconds each |"
    )


def test_the_labels_of_a_lost_class_are_those_of_another() -> None:
    lost, instead = CLASSES.index(LOST_CLASS), CLASSES.index("grass")
    labels = np.array([[lost, instead], [9, 255]], np.uint8)
    row = ok_row(
        id=1, uri="a.png", sha256=bytes(32), height=2, width=2, labels=labels,
        confidence=np.full((2, 2), 200, np.uint8), ignore_index=255,
    )  # fmt: skip
    assert renamed(row, lost, instead) == ok_row(
        id=1, uri="a.png", sha256=bytes(32), height=2, width=2,
        labels=np.where(labels == lost, np.uint8(instead), labels),
        confidence=np.full((2, 2), 200, np.uint8), ignore_index=255,
    )  # fmt: skip


def model(seed: int, accuracy: float) -> measured.Measured:
    """Counts of 200 images with 3 classes, of which a share is right."""
    rng = np.random.default_rng(seed)
    truth = np.full((200, 3), 100)
    correct = rng.binomial(100, accuracy, (200, 3))
    return measured.Measured(
        name="one", evaluation_set="e", protocol="p", has_truth=True, classes=("a", "b", "c"),
        images=tuple(f"{number:03}" for number in range(200)), truth=truth,
        predicted=correct + np.roll(100 - correct, 1, axis=1), correct=correct, labels_digest="d",
    )  # fmt: skip


def test_the_worse_model_is_judged_against_the_better_one() -> None:
    good, bad, alike = model(0, 0.8), model(1, 0.6), model(2, 0.8)
    assert miou(good) == miou_of_counts(good.truth.sum(0), good.predicted.sum(0), good.correct.sum(0))
    found = luck(bad, good, small=40, times=5, seed=0)
    assert (found.seemed, found.promoted, found.proven) == (0, 0, 0) and found.gap > 0.1
    assert luck(good, bad, small=40, times=5, seed=0) == found
    near = luck(good, alike, small=40, times=20, seed=0)
    assert 0 <= near.proven <= near.promoted <= near.seemed and near.gap < 0.02
    assert luck(good, replace(good, images=good.images), small=40, times=3, seed=0).promoted == 0


def test_each_stage_brings_what_was_not_there(tmp_path: Path) -> None:
    classes = [
        {CLASSES[number] for _, labels in scenes_of(stage, 3, 2) for number in np.unique(labels)}
        for stage in STAGES
    ]
    assert classes[0] <= set(HALF) and classes[1] <= set(HALF) and NEW_CLASS in classes[2] - set(HALF)
    found = [After(stage.title, "promoted", "1", 0.5, 0.4) for stage in STAGES]
    assert growing_table(found).count("50.0 | 40.0") == 3
    draw(found, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
@pytest.mark.cluster
def test_a_driver_that_is_killed_costs_nothing(tmp_path: Path) -> None:
    worlds = Worlds(tmp_path)
    try:
        found = run_case(worlds, "driver_promote", 5, 0)
    finally:
        worlds.close()
    assert (found.promoted, found.doubled, found.lost, found.wrong, found.hung) == (0, 0, 0, 0, 0), (
        found.notes
    )
