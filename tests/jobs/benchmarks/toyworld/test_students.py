from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jobs.benchmarks.toyworld.labelling import scene_set
from jobs.benchmarks.toyworld.students import measured, students
from pipeline.toyworld.scenes import CLASSES


def testmeasured_tell_seen_from_unseen() -> None:
    truth = list(scene_set(5, 4, 128).labels)
    assert measured(truth, 5, 4, [2]) == {
        "miou": 1.0, "pixel_accuracy": 1.0, "miou_unseen": 1.0, "miou_seen": 1.0,
    }  # fmt: skip
    hidden = CLASSES.index("grass")
    without = [np.where(labels == hidden, CLASSES.index("water"), labels) for labels in truth]
    figures = measured(without, 5, 4, [hidden])
    assert figures["miou_unseen"] == 0 and 0 < figures["miou_seen"] <= 1


@pytest.mark.cluster
@pytest.mark.long
def test_rows_and_claims_of_two_seeds(tmp_path: Path) -> None:
    console = Console(record=True, width=160)
    quick = [
        "iterations=6", "guided=[1, 4]", "self_train=[5, -1]", "checkpoint_every=100", "warmup=1",
        "augment.scale=[64, 64]", "crop=[64, 64]",
    ]  # fmt: skip
    small = {"unlabelled": 8, "settings": quick, "forms": {"annotation-free": "toy"}}
    sections, claims = students((11, 12), 2, tmp_path, console, **small)  # type: ignore[arg-type]
    assert [section.name for section in sections] == ["maskclip-plus"]
    rows = {line.name: line.values["miou"].runs for line in sections[0].rows}
    assert set(rows) == {"teacher", "student, guided phase", "student"}
    assert all(len(runs) == 2 and all(0 <= value <= 1 for value in runs) for runs in rows.values())
    assert claims[0].shows is False  # six steps teach nothing
