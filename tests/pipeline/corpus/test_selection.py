from __future__ import annotations

import itertools
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.corpus.corpus import Corpus
from pipeline.corpus.manifest import build_corpus, build_manifest, stable_id
from pipeline.corpus.selection import distinct, some_of


def manifest(count: int) -> pa.Table:
    uris = [f"/photos/{number}.jpg" for number in range(count)]
    return pa.table({"id": [stable_id(uri) for uri in uris], "uri": uris})


@pytest.mark.parametrize("seed", [0, 1])
def test_a_larger_sample_holds_a_smaller_one(seed: int) -> None:
    whole = Corpus.of(manifest(3000))
    sizes = (1, 30, 300, 2999)
    samples = [set(some_of(whole, size, seed).table()["id"].to_pylist()) for size in sizes]
    assert [len(sample) for sample in samples] == list(sizes)
    assert all(small < large for small, large in itertools.pairwise(samples))
    # Of a corpus twice as large about half is new: 150 of 300, give or take six standard deviations.
    grown = set(some_of(Corpus.of(manifest(6000)), 300, seed).table()["id"].to_pylist())
    assert 100 < len(samples[2] & grown) < 200


def test_a_sample_is_even_and_in_order() -> None:
    chosen = some_of(Corpus.of(manifest(4000)), 400).table()["uri"].to_pylist()
    numbers = [int(uri.split("/")[-1].split(".")[0]) for uri in chosen]
    assert numbers == sorted(numbers)
    quarters = [
        sum(1000 * quarter <= number < 1000 * (quarter + 1) for number in numbers) for quarter in range(4)
    ]
    assert all(60 < quarter < 140 for quarter in quarters)
    assert set(numbers) != {
        int(u.split("/")[-1][:-4])
        for u in some_of(Corpus.of(manifest(4000)), 400, 1).table()["uri"].to_pylist()
    }


def test_limits(tmp_path: Path) -> None:
    whole = Corpus.of(manifest(5))
    assert some_of(whole, None) is whole and some_of(whole, 9) is whole
    assert some_of(whole, 1).num_rows == 1
    (tmp_path / "l.txt").write_text("\n".join("badcabe"))
    few = build_corpus(tmp_path / "l.txt", limit=3).table()
    assert few["uri"].to_pylist() == [f"{tmp_path}/{name}" for name in "bad"]


def test_equal_images_are_kept_once(tmp_path: Path) -> None:
    for name, data in {"a": b"x", "b": b"y", "c": b"x", "d": b"x", "e": b""}.items():
        (tmp_path / f"{name}.jpg").write_bytes(data)
    whole = build_manifest(tmp_path)
    (tmp_path / "b.jpg").unlink()
    reported: list[int] = []
    found = distinct(Corpus.of(whole), reported.append)
    names = [uri.rpartition("/")[2] for uri in found.corpus.table()["uri"].to_pylist()]
    assert names == ["a.jpg", "b.jpg", "e.jpg"] and found.unreadable == 1 and reported == [5]
    assert sorted(found.copies()) == [(f"{tmp_path}/{name}.jpg", f"{tmp_path}/a.jpg") for name in "cd"]
