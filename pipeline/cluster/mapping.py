"""A function over many parts, on Ray."""

from __future__ import annotations

import contextlib
import itertools
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from models.errors import FailedWork, MaskMillError
from pipeline.cluster.disks import Landmarks, find_place, own_cores

P = TypeVar("P")
R = TypeVar("R")
NOWHERE = Landmarks()
RETRIES = 3
"""How often a part is begun again whose process or node was lost."""


def on_ray(
    function: Callable[[P], R],
    parts: Iterable[P],
    workers: int,
    *,
    address: str | None = None,
    notice: Callable[[str], None] = lambda _text: None,
    landmarks: Landmarks = NOWHERE,
) -> Iterator[R]:
    """Yield what a function returns for each part, in any order.

    Args:
        function: picklable.
        parts: its arguments, which are taken one by one; ``str`` gives their names.
        workers: parallel tasks.
        address: for ``ray_session``, if no Ray is running yet.
        notice: called with what the user should know.
        landmarks: local files that the function needs. If some nodes do not see them, it runs on the driver's
            node alone.

    Raises:
        MaskMillError: the first that the function raises; ``crashed_worker``; ``disk_not_shared`` if a node
            that joins later does not see the landmarks, and gets a part.
    """
    import ray

    from pipeline.cluster.session import ray_session

    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            stack.enter_context(ray_session(uuid.uuid4().hex, address=address, verbose=False, notice=notice))
        place = find_place(landmarks, "files are read and written", notice)
        if place.node is not None:
            workers = min(workers, own_cores())
        shared = ray.put(place.guarded(function))
        work = ray.remote(**place.task_options(0.25), max_retries=RETRIES)(_result)
        waiting = iter(parts)
        running: dict[Any, P] = {}
        try:
            while True:
                for part in itertools.islice(waiting, workers - len(running)):
                    running[work.remote(shared, part)] = part
                if not running:
                    return
                (done,), _ = ray.wait([*running], num_returns=1)
                part = running.pop(done)
                try:
                    found = ray.get(done)
                except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
                    raise FailedWork(
                        "crashed_worker",
                        f"The process that worked on part {part} died {RETRIES + 1} times: it crashed, or "
                        "used more memory than there is.",
                        "Use fewer workers, or a machine with more memory; -v shows Ray's own messages.",
                    ) from error
                if isinstance(found, MaskMillError):
                    raise found
                yield found
        finally:
            for task in running:
                ray.cancel(task)


def _result(function: Callable[[P], R], part: P) -> R | MaskMillError:
    try:
        return function(part)
    except MaskMillError as error:
        return error  # if raised, Ray would wrap it in its own exception
