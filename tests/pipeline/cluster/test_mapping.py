from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path

import pytest

from models.errors import FailedWork, MaskMillError
from pipeline.cluster.mapping import RETRIES, on_ray
from pipeline.cluster.session import ray_session

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def work(part: str, *, folder: Path) -> int:
    """Note when it begins and ends; some parts go wrong."""
    with (folder / "begun").open("a") as file:
        file.write(f"{part}\n")
    if part == "wrong":
        raise FailedWork("table_damaged", "It is torn.", "Repair it.")
    if part == "bug":
        raise ZeroDivisionError("a bug")
    if part == "deadly" or (part == "deadly once" and not (folder / "died").exists()):
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    mine = folder / f"running-{part}"
    mine.touch()
    time.sleep(0.05)
    together = len(list(folder.glob("running-*")))
    mine.unlink()
    return together


@pytest.fixture(scope="module", autouse=True)
def session(shared_ray: str) -> object:
    with ray_session("test-mapping", address=shared_ray, verbose=False):
        yield


def begun(folder: Path) -> list[str]:
    return (folder / "begun").read_text().splitlines()


def test_each_part_once_and_no_more_at_once_than_asked_for(tmp_path: Path) -> None:
    parts = [str(number) for number in range(30)]
    together = list(on_ray(functools.partial(work, folder=tmp_path), parts, 2))
    assert len(together) == 30 and max(together) <= 2
    assert sorted(begun(tmp_path), key=int) == parts
    assert list(on_ray(functools.partial(work, folder=tmp_path), [], 2)) == []


def test_what_is_raised_is_raised_here(tmp_path: Path) -> None:
    with pytest.raises(MaskMillError, match="It is torn") as caught:
        list(on_ray(functools.partial(work, folder=tmp_path), ["wrong"], 2))
    assert caught.value.code == "table_damaged" and begun(tmp_path) == ["wrong"]
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(on_ray(functools.partial(work, folder=tmp_path), ["bug"], 2))


def test_a_part_whose_process_dies_is_begun_again_but_not_for_ever(tmp_path: Path) -> None:
    assert len(list(on_ray(functools.partial(work, folder=tmp_path), ["a", "deadly once", "b"], 2))) == 3
    assert begun(tmp_path).count("deadly once") == 2
    with pytest.raises(MaskMillError, match=f"part deadly died {RETRIES + 1} times"):
        list(on_ray(functools.partial(work, folder=tmp_path), ["deadly"], 2))
    assert begun(tmp_path).count("deadly") == RETRIES + 1
