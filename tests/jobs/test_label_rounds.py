"""A large run: several partitions of the corpus, one round after the other, and files of many rows."""

from __future__ import annotations

import functools
import gc
import itertools
import json
import subprocess
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray.data

from jobs import label
from pipeline.corpus.manifest import build_corpus, build_manifest
from pipeline.labelling import rounds
from pipeline.table.labels import iter_rows

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

Run = Callable[..., subprocess.CompletedProcess[str]]
ROWS = 3


def _command(images: Path, output: Path) -> list[object]:
    return [
        "label", "--images", images, "--ontology", "toyworld", "--output", output, "--recipe", "toy",
    ]  # fmt: skip


def _rows(table: Path) -> dict[int, dict[str, object]]:
    found = [{k: v for k, v in row.items() if k != "version"} for row in iter_rows(table)]
    rows = {int(str(row["id"])): row for row in found}
    assert len(found) == len(rows)
    return rows


def _four_even_partitions(images: Path, listing: Path) -> int:
    """List as many images of each quarter of the ids, wherever the folder is; returns their number."""
    quarters: dict[int, list[str]] = {}
    for row in build_manifest(images).to_pylist():
        quarters.setdefault(row["id"] % 2**64 >> 62, []).append(row["uri"])
    each = min(map(len, quarters.values()))
    listing.write_text("\n".join(uri for uris in quarters.values() for uri in uris[:each]))
    return each


def test_rounds_give_the_rows_of_one_run_also_after_a_failure_between_them(
    maskmill_joined: Run, toy_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "list.txt"
    each = _four_even_partitions(toy_images, images)
    once = tmp_path / "once"
    done = maskmill_joined(*_command(images, once))
    assert done.returncode == 0, done.stderr

    monkeypatch.setattr(label, "build_corpus", functools.partial(build_corpus, most=each))
    monkeypatch.setattr(label, "PARTITION", 4 * each)
    monkeypatch.setattr(rounds, "PARTITION", each)
    monkeypatch.setattr(rounds, "ROUND_IMAGES", 0)
    monkeypatch.setattr(rounds, "rows_per_file", lambda _todo: ROWS)
    labelled: list[int] = []
    kept: list[int] = []
    threads: list[set[threading.Thread]] = []
    run, commit, commits = rounds.run_labelling, rounds.commit, itertools.count()

    def counted(todo: object, **more: object) -> object:
        labelled.append(todo.num_rows)  # type: ignore[attr-defined]
        kept.append(sum(issubclass(type(each), ray.data.Datasource) for each in gc.get_objects()))
        threads.append(set(threading.enumerate()))
        return run(todo, **more)  # type: ignore[arg-type]

    def failing(*given: object) -> object:
        if next(commits) == 1:
            raise RuntimeError("the power is gone")
        return commit(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(rounds, "run_labelling", counted)
    monkeypatch.setattr(rounds, "commit", failing)
    table = tmp_path / "table"
    failed = maskmill_joined(*_command(images, table))
    assert failed.returncode == 1 and "the power is gone" in failed.stderr
    assert labelled == [each, each] and len(_rows(table)) == 2 * each
    record = json.loads((table / "dataset.json").read_text())
    assert record["counts"]["images"] == each  # of the round that was committed

    gc.collect()
    gc.disable()  # it goes by numbers of objects, and this run is small
    try:
        done = maskmill_joined(*_command(images, table))
    finally:
        gc.enable()
    assert done.returncode == 0 and f"{2 * each:,} new of {4 * each}" in done.stderr, done.stderr
    assert labelled == [each] * 4
    # Of the round before nothing is left in memory when the next one begins.
    assert kept[2:] == [0, 0] and not threads[3] - threads[2]
    assert _rows(table) == _rows(once)
    assert set(_rows(table)) == set(build_manifest(images)["id"].to_pylist())
    record = json.loads((table / "dataset.json").read_text())
    expected = json.loads((once / "dataset.json").read_text())["counts"]
    assert record["counts"] == expected | {"mean_quality": pytest.approx(expected["mean_quality"])}
    # Of each round, all files but one have as many rows as was asked for, also when only half was left.
    sizes = Counter(pq.read_metadata(path).num_rows for path in (table / "labels").iterdir())
    assert sizes == +Counter({ROWS: 4 * (each // ROWS)}) + Counter([each % ROWS] * 4 if each % ROWS else [])
