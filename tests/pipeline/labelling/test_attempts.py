"""Images that kill the process that works on them: real SIGKILLs, on Ray and off it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.cluster.session import ray_session
from pipeline.files.images import ImageSettings
from pipeline.files.storage import Storage, open_storage
from pipeline.labelling.attempts import IMAGE_DEATHS, PART_DEATHS, AttemptBook, Turns
from pipeline.labelling.labeller import Prediction
from pipeline.labelling.stages import Decode, Label, Write
from pipeline.table.lease import Lease

SETTINGS = ImageSettings(scale=(64, 32), keep_ratio=True, resize="opencv", max_pixels=10_000)
POISON = 200
"""Grey value of the images that kill."""


class DeadlyLabeller:
    """Kills its process when it gets a poisonous image."""

    def __init__(self, threads: int = 0, tally: Path | None = None) -> None:
        self.batch_size = 4
        self._tally = tally

    def label(self, images: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        if any(image[0, 0, 0] == POISON for image in images):
            if self._tally:
                with self._tally.open("a") as file:
                    file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return [Prediction(np.zeros(size, np.uint8), np.full(size, 255, np.uint8)) for size in sizes]


class Death(BaseException):
    """Passes all handlers of exceptions, as death does."""


class RaisingLabeller(DeadlyLabeller):
    def label(self, images: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        if any(image[0, 0, 0] == POISON for image in images):
            raise Death
        return super().label(images, sizes)


def pictures(folder: Path, poisonous: Sequence[int], count: int) -> pa.Table:
    folder.mkdir(exist_ok=True)
    for index in range(count):
        grey = POISON if index in poisonous else index % 100
        Image.new("RGB", (48, 32), (grey,) * 3).save(folder / f"{index:03d}.png")
    uris = [str(path) for path in sorted(folder.iterdir())]
    return pa.table({"id": pa.array(range(count), pa.int64()), "uri": uris})


def statuses(storage: Storage) -> dict[int, str]:
    table = pa.concat_tables([pq.read_table(part) for part in Path(storage.path("labels")).glob("*.parquet")])
    assert len(set(table["id"].to_pylist())) == table.num_rows
    return dict(zip(table["id"].to_pylist(), table["status"].to_pylist(), strict=True))


def expected(count: int, poisonous: Sequence[int]) -> dict[int, str]:
    return {index: "crashed_worker" if index in poisonous else "ok" for index in range(count)}


def test_a_part_is_split_after_deaths_and_only_the_images_to_blame_fail(tmp_path: Path) -> None:
    poisonous = (3, 9)
    manifest = pictures(tmp_path / "images", poisonous, 12)
    decoded = pa.concat_tables(Decode(SETTINGS)(manifest))
    book, deaths = AttemptBook(), 0
    while True:
        try:
            labelled = pa.concat_tables(Label(RaisingLabeller, book)(decoded))
            break
        except Death:
            deaths += 1
    assert deaths == PART_DEATHS + IMAGE_DEATHS * len(poisonous)
    found = dict(zip(labelled["id"].to_pylist(), labelled["status"].to_pylist(), strict=True))
    assert found == expected(12, poisonous)
    # Its rows may be lost with their process, by another part's death: nothing dies of this one again.
    again = pa.concat_tables(Label(RaisingLabeller, book)(decoded))
    assert dict(zip(again["id"].to_pylist(), again["status"].to_pylist(), strict=True)) == found
    # Work that ended leaves nothing in the book; an image that kills stays in it.
    assert book.begin("label 0") == 0 and book.begin("label 3") >= IMAGE_DEATHS


def test_who_works_alone_works_alone() -> None:
    turns, working, seen = Turns(), [0], []

    def together() -> None:
        for _ in range(50):
            with turns.together():
                working[0] += 1
                time.sleep(0.0005)
                working[0] -= 1

    def alone() -> None:
        for _ in range(20):
            with turns.alone():
                seen.append(working[0])
                time.sleep(0.0005)
                seen.append(working[0])

    threads = [threading.Thread(target=target) for target in (together, together, alone, alone)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert len(seen) == 80 and set(seen) == {0}


@pytest.mark.cluster
@pytest.mark.slow
def test_images_that_kill_the_labeller_become_rows(tmp_path: Path, shared_ray: str) -> None:
    from pipeline.labelling.flow import run_labelling

    poisonous = (5, 17)
    manifest = pictures(tmp_path / "images", poisonous, 40)
    storage = open_storage(tmp_path / "table")
    tally = tmp_path / "tally"

    def make(threads: int) -> DeadlyLabeller:
        return DeadlyLabeller(threads, tally)

    with (
        Lease.acquire(storage, on_lost=lambda _reason: None) as lease,
        ray_session(lease.run_id, address=shared_ray, verbose=False) as compute,
    ):
        run_labelling(
            manifest,
            make_labeller=make,
            image_settings=SETTINGS,
            write=Write(storage, lease.run_id, ignore_index=255, num_classes=2),
            compute=compute,
            report=lambda progress: None,
        )
    assert statuses(storage) == expected(40, poisonous)
    assert len(tally.read_text()) <= len(poisonous) * (PART_DEATHS + IMAGE_DEATHS)
