"""How a run is cut into parts and read back; the whole flow on Ray is in tests/jobs."""

from __future__ import annotations

import functools
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cluster.progress import Progress
from pipeline.cluster.session import ray_session
from pipeline.files.storage import open_storage
from pipeline.labelling import flow as labelling
from pipeline.labelling.flow import (
    FIRST_PART,
    LARGEST_PART,
    USUAL_PART,
    build_labeller,
    hand_over_words,
    part_sizes,
    start_board,
    words_to_come,
    write_run_manifest,
)


@given(st.integers(0, 20_000), st.integers(1, 64))
def test_parts_cover_everything_once(count: int, workers: int) -> None:
    sizes = part_sizes(count, workers)
    assert sum(sizes) == count
    assert all(1 <= size <= LARGEST_PART for size in sizes)
    if count:
        assert sizes[0] <= FIRST_PART  # the first result must not wait for a large part
        assert sizes[-1] <= FIRST_PART or workers == 1 or sizes[-1] <= -(-count // workers)


@pytest.mark.parametrize(
    ("count", "usual"),
    [(10_000, USUAL_PART), (100_000, USUAL_PART), (400_000, 100), (5_000_000, LARGEST_PART)],
)
def test_parts_grow_only_where_there_would_be_too_many(count: int, usual: int) -> None:
    sizes = part_sizes(count, 4)
    assert max(sizes) == usual and sizes.count(usual) > 0.8 * len(sizes)
    assert max(sizes[-4:]) <= 2 * FIRST_PART  # nobody is left alone with a large part


def test_run_manifest_has_a_row_group_for_each_part(tmp_path: Path) -> None:
    todo = pa.table({"id": pa.array(range(1000), pa.int64()), "uri": [f"/{index}" for index in range(1000)]})
    path = write_run_manifest(open_storage(tmp_path), "run", todo, 2)
    file = pq.ParquetFile(tmp_path / path)
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == part_sizes(1000, 2)
    assert file.read().equals(todo)
    source = labelling._RunManifest(open_storage(tmp_path), path)
    blocks = [block for task in source.get_read_tasks(1) for block in task()]
    assert pa.concat_tables(blocks).equals(todo)


def _begin(size: int, threads: int, words: Callable[[], list[str]]) -> dict[str, Any]:
    read = size * 2  # what needs no words
    return {"size": read, "threads": threads, "words": words()}


@pytest.mark.slow
def test_workers_begin_while_words_are_embedded() -> None:
    make = pickle.dumps(functools.partial(_begin, 3))

    def build(make_labeller: Any, board: Any) -> Any:
        board.add.remote(done=1)
        return make_labeller()

    with ray_session("test", address=None, verbose=False):
        board = start_board()
        coming = functools.partial(build_labeller, make, threads=2, words=words_to_come(board))
        built = [ray.remote(num_cpus=1)(build).remote(coming, board) for _ in range(2)]
        # The board goes on taking reports while the workers wait.
        while ray.get(board.snapshot.remote(), timeout=60).done < 2:
            assert not ray.wait(built, timeout=0.1)[0]
        assert not ray.wait(built, timeout=0.5)[0]
        hand_over_words(board, pickle.dumps(["a", "b"]))
        assert ray.get(built, timeout=60) == [{"size": 6, "threads": 2, "words": ["a", "b"]}] * 2


@pytest.mark.parametrize("when", ["before it", "while it", "after it"])
def test_ctrl_c_around_its_start_ends_the_report_of_progress(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, reports = threading.Thread.start, []

    def interrupted_start(thread: threading.Thread) -> None:
        if when == "while it":
            start(thread)
        raise KeyboardInterrupt

    if when != "after it":
        monkeypatch.setattr(threading.Thread, "start", interrupted_start)
    monkeypatch.setattr(ray, "get", lambda _reference, timeout: Progress())
    with pytest.raises(KeyboardInterrupt), labelling._watched(mock.MagicMock(), reports.append):
        while not reports:
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert len(reports) <= 1
    assert "progress" not in [thread.name for thread in threading.enumerate()]


def test_a_board_that_does_not_answer_ends_no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([ray.exceptions.GetTimeoutError(), Progress(done=3)])
    reports: list[Progress] = []

    def answer(_reference: Any, timeout: float) -> Progress:
        given = next(answers, Progress(done=4))
        if isinstance(given, Exception):
            raise given
        return given

    monkeypatch.setattr(ray, "get", answer)
    with labelling._watched(mock.MagicMock(), reports.append):
        while not reports:
            time.sleep(0.01)
    assert reports[0].done == 3
