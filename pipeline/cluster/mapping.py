"""A function over many parts, on Ray."""

from __future__ import annotations

import contextlib
import logging
import pickle
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from models.errors import MaskMillError
from pipeline.cluster.disks import Landmarks, find_place, own_cores

R = TypeVar("R")
NOWHERE = Landmarks()


def on_ray(
    function: Callable[[str], R],
    parts: Sequence[str],
    workers: int,
    *,
    address: str | None = None,
    notice: Callable[[str], None] = lambda _text: None,
    landmarks: Landmarks = NOWHERE,
) -> Iterator[R]:
    """Yield what a function returns for each part, in any order.

    Args:
        function: picklable.
        parts: its arguments.
        workers: parallel tasks.
        address: for ``ray_session``, if no Ray is running yet.
        notice: called with what the user should know.
        landmarks: local files that the function needs. If some nodes do not see them, it runs on the driver's
            node alone.

    Raises:
        MaskMillError: the first that the function raises; ``disk_not_shared`` if a node that joins later
            does not see the landmarks, and gets a part.
    """
    import ray

    from pipeline.cluster.session import ray_session

    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            stack.enter_context(ray_session(uuid.uuid4().hex, address=address, verbose=False, notice=notice))
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        if logging.getLogger("ray").getEffectiveLevel() > logging.INFO:  # set by ray_session
            logging.getLogger("ray.data").setLevel(logging.ERROR)
        place = find_place(landmarks, "files are read and written", notice)
        if place.node is not None:
            workers = min(workers, own_cores())
        shared = ray.put(place.guarded(function))

        def call(row: dict[str, str]) -> dict[str, bytes]:
            try:
                found: R | MaskMillError = ray.get(shared)(row["part"])
            except MaskMillError as error:
                found = error  # if raised, Ray would wrap it in its own exception
            return {"found": pickle.dumps(found)}

        work = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
        done = work.map(call, **place.task_options(0.25), compute=ray.data.TaskPoolStrategy(size=workers))
        for row in done.iter_rows():
            found = pickle.loads(row["found"])  # trusted: pickled by our own task
            if isinstance(found, MaskMillError):
                raise found
            yield found
