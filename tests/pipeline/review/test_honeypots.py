"""Nobody can tell which images of a queue are those whose truth is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.review.choosing import Wish, choose
from pipeline.review.honeypots import scattered
from pipeline.review.queue import Entry
from tests.pipeline.review.reviews import make_reviewed, row_id

SHARES = [0.1 * (number % 7) for number in range(24)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reviewed(tmp_path_factory.mktemp("honeypots"), SHARES)


def queue(folder: Path, worst: int, chance: int, seed: int = 0) -> list[Entry]:
    known = np.sort([row_id(folder, number) for number in range(0, 24, 2)])
    wish = Wish(worst, chance, known=known, honeypots=4, diverse=False, seed=seed)
    entries = choose(str(folder / "table"), wish).entries
    assert {entry.id for entry in entries if entry.known} <= set(known.tolist())
    assert len({entry.id for entry in entries}) == len(entries) and all(entry.reasons for entry in entries)
    return entries


def kinds(entries: list[Entry], *, known: bool) -> list[str]:
    return [entry.reasons[0].kind for entry in entries if entry.known == known]


def test_they_are_there_for_the_reasons_of_the_others(folder: Path) -> None:
    doubtful = queue(folder, 8, 0)
    assert len(kinds(doubtful, known=True)) == 4
    assert "random" not in kinds(doubtful, known=True) + kinds(doubtful, known=False)
    assert set(kinds(doubtful, known=True)) <= set(kinds(doubtful, known=False))
    assert set(kinds(queue(folder, 0, 8), known=True)) == {"random"}
    # Half of either: the same shares.
    mixed = queue(folder, 4, 4)
    assert kinds(mixed, known=True).count("random") == 2


def test_they_are_anywhere(folder: Path) -> None:
    places = {
        tuple(at for at, entry in enumerate(queue(folder, 4, 4, seed)) if entry.known) for seed in range(4)
    }
    assert len(places) > 1
    assert queue(folder, 4, 4) == queue(folder, 4, 4)


def test_scattered_keeps_the_order_of_the_first() -> None:
    found = scattered([*range(20)], [*range(100, 105)], 3)
    assert [one for one in found if one < 100] == [*range(20)]
    assert {one for one in found if one >= 100} == {*range(100, 105)}
