"""A function over many parts, on Ray."""

from __future__ import annotations

import contextlib
import logging
import pickle
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from models.errors import MaskMillError

R = TypeVar("R")


def on_ray(
    function: Callable[[str], R],
    parts: Sequence[str],
    workers: int,
    *,
    address: str | None = None,
    notice: Callable[[str], None] = lambda _text: None,
) -> Iterator[R]:
    """Yield what a function returns for each part, in any order.

    Args:
        function: picklable.
        parts: its arguments.
        workers: parallel tasks.
        address, notice: for ``ray_session``, if no Ray is running yet.

    Raises:
        MaskMillError: the first that the function raises.
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
        shared = ray.put(function)

        def call(row: dict[str, str]) -> dict[str, bytes]:
            try:
                found: R | MaskMillError = ray.get(shared)(row["part"])
            except MaskMillError as error:
                found = error  # if raised, Ray would wrap it in its own exception
            return {"found": pickle.dumps(found)}

        work = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
        done = work.map(call, num_cpus=0.25, compute=ray.data.TaskPoolStrategy(size=workers))
        for row in done.iter_rows():
            found = pickle.loads(row["found"])  # trusted: pickled by our own task
            if isinstance(found, MaskMillError):
                raise found
            yield found
