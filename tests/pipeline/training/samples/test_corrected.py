"""What people say of a table takes the place of its labels in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.review.desk import encode_page_mask, open_desk
from pipeline.table.corrections import Corrections, open_corrections
from pipeline.table.splits import Chosen
from pipeline.training.loop.protocols import GUESS, IGNORED
from pipeline.training.samples.augment import AugmentSettings
from pipeline.training.samples.corrected import open_corrected_samples
from pipeline.training.samples.mixed import MixedSamples
from pipeline.training.samples.table import TableSamples
from tests.pipeline.review.reviews import IGNORED as HOLE
from tests.pipeline.review.reviews import TOYWORLD, make_reviewed, queue_of, row_id, truth_of


def say(folder: Path, said: dict[int, str]) -> Corrections:
    """Accept, reject or paint images; what is painted has a hole in its first rows."""
    desk = open_desk(queue_of(folder, 4))
    for number, decision in said.items():
        mask = None
        if decision == "painted":
            painted = truth_of(folder, number).copy()
            painted[:4] = HOLE
            mask = encode_page_mask(painted)
        desk.save(row_id(folder, number), decision, mask, reviewer="Ann", follows=None)  # type: ignore[arg-type]
    corrections = open_corrections(str(folder / "table"))
    assert corrections is not None
    return corrections


def opened(folder: Path, corrections: Corrections | None, **how: Any) -> TableSamples | MixedSamples:
    settings = AugmentSettings(crop=(48, 48))
    return open_corrected_samples(
        str(folder / "table"), corrections, ontology=TOYWORLD, augment=settings, **how
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_reviewed(tmp_path, [0.5, 0.0, 0.6, 0.4])


def test_corrections_are_believed_and_rejected_images_left_out(folder: Path) -> None:
    samples = opened(folder, say(folder, {0: "painted", 1: "accepted", 2: "rejected"}))
    assert isinstance(samples, MixedSamples)
    assert (samples.num_images, samples.num_known) == (3, 2) and samples.left_out == {"rejected by people": 1}
    maps = {whole.id: whole.maps for whole in map(samples.read, range(samples.num_images))}
    painted, untouched = maps[row_id(folder, 0)], maps[row_id(folder, 3)]
    np.testing.assert_array_equal(painted["labels"][4:], truth_of(folder, 0)[4:])
    # Nothing is guessed where a person has left a hole.
    assert (painted["labels"][:4] == GUESS).all() and (painted["teacher"][:4] == IGNORED).all()
    assert (untouched["labels"] == GUESS).all() and (untouched["teacher"] >= 0).all()


def test_without_a_correction_to_learn_there_is_the_table_alone(folder: Path) -> None:
    assert isinstance(opened(folder, None), TableSamples)
    corrections = say(folder, {1: "accepted", 2: "rejected"})
    one, two, three = (np.array([row_id(folder, number)]) for number in (1, 2, 3))
    # The only one is in another part of the split: nothing of it is learned.
    part = Chosen("train", three, np.sort(np.concatenate([one, two])), "x")
    samples = opened(folder, corrections, chosen=part)
    assert isinstance(samples, TableSamples) and samples.ids.tolist() == three.tolist()
    (folder / "table" / "corrections").rename(folder / "before")
    samples = opened(folder, say(folder, {2: "rejected"}))
    assert isinstance(samples, TableSamples) and samples.num_images == 3


def test_an_image_of_low_quality_is_learned_once_it_is_corrected(folder: Path) -> None:
    samples = opened(folder, say(folder, {0: "painted"}), min_quality=0.9)
    assert isinstance(samples, MixedSamples)
    ids = [samples.read(index).id for index in range(samples.num_images)]
    assert sorted(ids) == sorted([row_id(folder, 1), row_id(folder, 0)])
    assert sorted(samples.order(0, 0)) == [0, 1]
