"""An object store of images and tables that fails for some seconds, over real HTTP."""

from __future__ import annotations

import functools
import random
import threading
import time
from typing import Any

import boto3

from benchmarks.faults.object_store import Fault, FaultyStore, faulty_object_store, object_store
from benchmarks.faults.processes import MOST
from benchmarks.faults.runs import Unexpected
from benchmarks.faults.world import OWN, Injected, World, rows_of
from pipeline.files.storage import open_storage


class Windows:
    """Times at which a store fails: each begins a number of requests after the end of the one before.

    Args:
        answer: to requests within a window.
        rng: chooses the windows and the requests that fail.
        count: number of windows.

    Attributes:
        begun: number of windows so far.
    """

    def __init__(self, answer: Fault, rng: random.Random, count: int) -> None:
        self.begun = 0
        self._answer, self._rng, self._count = answer, rng, count
        self._lock = threading.Lock()
        self._until = 0.0
        self._quiet = rng.randint(15, 80)
        self._where = ""

    def __call__(self, method: str, path: str) -> Fault:
        """See ``FaultyStore.fault``."""
        with self._lock:
            if time.monotonic() > self._until:
                self._quiet -= 1
                if self._quiet > 0 or self.begun == self._count:
                    return None
                self.begun += 1
                self._until = time.monotonic() + self._rng.uniform(0.5, 6)
                self._quiet = self._rng.randint(15, 80)
                self._where = self._rng.choice(("", "/photos", "/results"))
            return self._answer if path.startswith(self._where) else None


def _failing(answer: Fault, world: World, rng: random.Random, most: int) -> Injected:
    store, environment = _store(world)
    store.fault = lambda _method, _path: None
    client = boto3.client("s3")
    number = world.folder("bucket").name
    photos, results = f"photos-{number}", f"results-{number}"
    for bucket in (photos, results):
        client.create_bucket(Bucket=bucket)
    for path in world.images.iterdir():
        client.upload_file(str(path), photos, f"2026/{path.name}")
    expected = {
        f"s3://{photos}/2026/{uri.rpartition('/')[2]}": found
        for uri, found in world.expected(world.images).items()
    }
    windows = Windows(answer, rng, min(most, MOST))
    store.fault = windows
    output = f"s3://{results}/run"
    from_store: dict[str, Any] = {"images": f"s3://{photos}/2026", "environment": {**OWN, **environment}}
    for _ in range(2 * MOST):
        # 2 is a store that fails before there is anything to lose.
        if world.label(output, pace_s=0.05, **from_store).expect(0, 1, 2) == 0:
            break
    else:
        raise Unexpected(f"{2 * MOST} runs did not finish")
    store.fault = lambda _method, _path: None
    world.finish(output, **from_store)
    codes = {row["status"] for row in rows_of(open_storage(output))} & {
        "unavailable",
        "permission",
        "not_found",
    }
    if codes:  # images that could not be read have rows that say so
        world.finish(output, "--retry-failed", *sorted(codes), **from_store)
    return Injected(max(1, windows.begun), world.judge(output, expected))


def _store(world: World) -> tuple[FaultyStore, dict[str, str]]:
    """The object store of a world, started when it is first needed."""
    if world.object_store is None:
        plain = world.open_until_the_end.enter_context(object_store())
        world.object_store = world.open_until_the_end.enter_context(faulty_object_store(plain))
    return world.object_store


s3_503 = functools.partial(_failing, (503, "SlowDown"))
s3_denied = functools.partial(_failing, (403, "AccessDenied"))
s3_expired = functools.partial(_failing, (400, "ExpiredToken"))
s3_cut = functools.partial(_failing, "cut")
