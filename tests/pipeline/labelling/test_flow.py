"""How a run is cut into parts; the whole flow on Ray is in tests/jobs."""

from __future__ import annotations

import time

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.data.exceptions import omit_traceback_stdout

from pipeline.cluster.session import ray_session
from pipeline.labelling.flow import (
    FIRST_PART,
    LARGEST_PART,
    USUAL_PART,
    fault_in_run,
    part_sizes,
    shared_attempts,
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


def test_a_fault_inside_ray_data_is_told_by_its_own_name() -> None:
    @omit_traceback_stdout  # as around every execution
    def execute() -> None:
        raise KeyError("no such operator")

    with pytest.raises(KeyError) as caught:
        execute()
    assert "KeyError: 'no such operator'" in fault_in_run(caught.value).message


@pytest.mark.cluster
def test_a_book_of_attempts_that_is_killed_is_replaced(shared_ray: str) -> None:
    with ray_session("test-flow", address=shared_ray, verbose=False):
        book = shared_attempts()
        assert [book.begin("a"), book.begin("a")] == [0, 1]
        end = time.monotonic() + 60
        # That of a run before this one may take a moment to go.
        while len(found := [one for one in psutil.process_iter() if _is_book(one, shared_ray)]) > 1:
            assert time.monotonic() < end
            time.sleep(0.1)
        (process,) = found
        process.kill()
        process.wait(60)
        assert [book.begin("a"), book.begin("a")] == [0, 1]


def _is_book(process: psutil.Process, address: str) -> bool:
    try:
        raylet = process.parent()
        is_book = "".join(process.cmdline()[:1]).startswith("ray::AttemptBook")
        return is_book and raylet is not None and any(address in word for word in raylet.cmdline())
    except psutil.Error:
        return False
