"""Samples from two tables on toy scenes: what is known, what is guessed, and what is counted."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import MaskMillError
from pipeline.files.storage import open_storage
from pipeline.ontology.ontology import Ontology
from pipeline.ontology.united import unite
from pipeline.table.labels import LABEL_SCHEMA, ok_row
from pipeline.table.record import TableRecord, write_table_record
from pipeline.table.views import View
from pipeline.toyworld import scenes as toyworld
from pipeline.training.loop.protocols import GUESS, IGNORED
from pipeline.training.samples.mixed import MixedSamples, mix
from pipeline.training.samples.table import open_table_samples
from tests.pipeline.training.samples.test_table import PLAIN, SEED, SIZE, TOY, make, png, teacher_of

#: Known are two of the classes, and everything else in one word.
OURS = Ontology.from_dict(
    {"name": "ours", "background": ["anything else"], "classes": ["sky", "zebra", "kite"]}
)
KNOWN = range(6, 13)


def truth_of(index: int) -> np.ndarray:
    """Ids of ``OURS``; 255 in the first rows."""
    names = {TOY.names.index("sky"): 1, TOY.names.index("zebra"): 2}
    labels = toyworld.scene(SEED, index, SIZE).labels
    found = np.zeros((SIZE, SIZE), np.uint8)
    for theirs, own in names.items():
        found[labels == theirs] = own
    found[:6] = 255
    return found


def write_known(root: Path, numbers: Iterable[int], rows_cut: int = 0) -> str:
    """A table of true labels in two files."""
    rows = []
    (root / "labels").mkdir(parents=True)
    for index in numbers:
        data = png(toyworld.scene(SEED, index, SIZE).image)
        path = root / f"{index}.png"
        path.write_bytes(data)
        labels = truth_of(index)[rows_cut:]
        rows.append(
            ok_row(
                id=index, uri=str(path), sha256=hashlib.sha256(data).digest(), height=len(labels), width=SIZE,
                labels=labels, confidence=np.full_like(labels, 255), ignore_index=255,
            )
        )  # fmt: skip
    for part in range(2):
        table = pa.Table.from_pylist(rows[part::2], schema=LABEL_SCHEMA)
        pq.write_table(table, root / "labels" / f"part-{part}.parquet")
    weights = {"model": "imported", "pretrained": None, "fingerprint": ""}
    record = TableRecord(ontology=OURS, recipe={"name": "imported"}, weights=weights)
    write_table_record(open_storage(root), record)
    return str(root)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Guesses for the scenes 0 to 9, and known labels for 6 to 12."""
    root = tmp_path_factory.mktemp("mixed")
    return make(root / "guesses", 10), write_known(root / "known", KNOWN)


CLASSES = unite(TOY, OURS)


def opened(tables: tuple[str, str], *, complete: bool = False, drop: bool = True) -> MixedSamples:
    guessed = open_table_samples(tables[0], ontology=CLASSES, augment=PLAIN)
    view = View(drop=("background",)).of(OURS) if drop else None
    known = open_table_samples(tables[1], ontology=CLASSES, augment=PLAIN, view=view)
    return mix(guessed, known, complete=complete)


def expected(index: int, complete: bool) -> tuple[np.ndarray, np.ndarray]:
    """Labels and teacher of a scene, in the ids of ``CLASSES``."""
    known = np.array([IGNORED, CLASSES.names.index("sky"), CLASSES.names.index("zebra")])
    guesses = np.full((SIZE, SIZE), IGNORED)
    if index < 10:
        own = teacher_of(index)[0]
        ids = np.array([CLASSES.names.index(name) for name in TOY.names])
        guesses = np.where(own == 255, IGNORED, ids[np.minimum(own, len(ids) - 1)])
    labels = np.full((SIZE, SIZE), GUESS)
    if index in KNOWN:
        truth = truth_of(index)
        found = np.where(truth == 255, IGNORED, known[np.minimum(truth, 2)])
        labels = np.where(found >= 0, found, GUESS)
        if complete:
            guesses = np.where(np.isin(guesses, known[1:]), IGNORED, guesses)
    return labels, guesses


@pytest.mark.parametrize("complete", [False, True])
def test_known_labels_win_and_guesses_fill_the_rest(tables: tuple[str, str], complete: bool) -> None:
    samples = pickle.loads(pickle.dumps(opened(tables, complete=complete)))
    assert samples.num_images == 13 and samples.num_known == len(KNOWN)
    pixels = np.zeros(CLASSES.num_classes, np.int64)
    seen, known_somewhere = set(), 0
    for index in range(13):
        found = samples.load(index, np.random.default_rng(0))
        number = int(found["id"])
        seen.add(number)
        labels, guesses = expected(number, complete)
        assert np.array_equal(found["image"], toyworld.scene(SEED, number, SIZE).image.transpose(2, 0, 1))
        assert np.array_equal(found["labels"], labels) and found["labels"].dtype == np.int32
        to_guess = labels == GUESS
        known_somewhere += int((~to_guess).any())
        assert np.array_equal(found["teacher"][to_guess], guesses[to_guess])
        assert found["teacher"].dtype == np.int32
        learned = np.where(to_guess, guesses, labels)
        pixels += np.bincount(learned[learned >= 0], minlength=len(pixels))
    assert seen == set(range(13)) and known_somewhere >= 3
    assert samples.class_frequencies() == pytest.approx(pixels / pixels.sum())
    assert found.keys() == samples.blank().keys() == samples.guessed.load(0, np.random.default_rng(0)).keys()


def test_pixels_on_which_two_teachers_differ_have_no_label(tables: tuple[str, str], tmp_path: Path) -> None:
    second = open_table_samples(tables[1], ontology=CLASSES, augment=PLAIN)
    samples = open_table_samples(tables[0], ontology=CLASSES, augment=PLAIN, second=second)
    samples = pickle.loads(pickle.dumps(samples))
    own, same = np.array([CLASSES.names.index(name) for name in OURS.names]), 0
    for index in range(10):
        found = samples.load(index, np.random.default_rng(0))
        number = int(found["id"])
        _, guesses = expected(number, complete=False)
        if number in KNOWN:
            truth = truth_of(number)
            others = np.where(truth == 255, IGNORED, own[np.minimum(truth, len(own) - 1)])
            guesses = np.where(guesses == others, guesses, IGNORED)
            same += int((guesses >= 0).sum())
        assert np.array_equal(found["teacher"], guesses) and found["teacher"].dtype == np.int32
        assert (found["labels"] == GUESS).all()
    assert same > 0
    cut = open_table_samples(write_known(tmp_path, [6], rows_cut=1), ontology=CLASSES, augment=PLAIN)
    samples = open_table_samples(tables[0], ontology=CLASSES, augment=PLAIN, second=cut)
    at = int(np.flatnonzero(samples.ids == 6)[0])
    with pytest.raises(MaskMillError) as caught:
        samples.load(at, np.random.default_rng(0))
    assert caught.value.code == "mask_invalid"


def test_an_epoch_has_each_image_once(tables: tuple[str, str]) -> None:
    samples = opened(tables)
    for epoch in range(3):
        order = samples.order(epoch, 7)
        assert sorted(order.tolist()) == list(range(13))
        assert np.array_equal(order, opened(tables).order(epoch, 7))
    assert not np.array_equal(samples.order(0, 7), samples.order(1, 7))


def test_a_known_background_is_truth_unless_it_is_dropped(tables: tuple[str, str]) -> None:
    whole = opened(tables, drop=False)
    index = whole.known_of.tolist().index(0)
    labels = whole.read(index).maps["labels"]
    assert (labels[6:] >= 0).all() and (labels[:6] == GUESS).all()


def test_maps_of_two_sizes_are_refused(tables: tuple[str, str], tmp_path: Path) -> None:
    samples = opened((tables[0], write_known(tmp_path / "cut", [3], rows_cut=1)))
    with pytest.raises(MaskMillError, match=r"47 x 48 pixels in .*cut.*, and 48 x 48 in") as error:
        samples.read(int(np.flatnonzero(samples.known_of >= 0)[0]))
    assert error.value.code == "mask_invalid"


def test_known_labels_of_another_image_are_refused(tables: tuple[str, str], tmp_path: Path) -> None:
    place = write_known(tmp_path / "other", [3, 4])
    part = Path(place) / "labels/part-0.parquet"
    rows = pq.read_table(part).to_pylist()
    pq.write_table(
        pa.Table.from_pylist([row | {"sha256": bytes(32)} for row in rows], schema=LABEL_SCHEMA), part
    )
    samples = opened((tables[0], place))
    with pytest.raises(MaskMillError, match="of another image") as error:
        samples.read(samples.guessed.ids.tolist().index(3))
    assert error.value.code == "image_invalid"
    samples.read(samples.guessed.ids.tolist().index(4))
