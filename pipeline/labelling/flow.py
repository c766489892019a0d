"""The labelling data flow on Ray Data: parts of the manifest → fetch, decode → CLIP actors → encode, write.

Every image of the manifest becomes exactly one row; see ``pipeline.table.committed``. The flow itself does
not track finished work: it labels everything it receives.

On a cluster, nodes are lost and join. If a run cannot go on as planned, or there is much more to use than
planned for, the flow ends, and another one with a new plan labels what is left.

Images and outputs on a disk that only the driver's node has are read and written there; labelling itself runs
on all nodes (``pipeline.cluster.disks``).
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray.data
from ray.data.block import BlockMetadata
from ray.data.exceptions import SystemException
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from models.errors import FailedWork, MaskMillError, WrongUse
from pipeline.cluster.disks import ANYWHERE, NOT_SHARED, Landmarks, Place, find_place, own_cores
from pipeline.cluster.nodes import NodesChanged, NodeWatch, stop_when_changed
from pipeline.cluster.progress import Progress
from pipeline.cluster.resources import Compute
from pipeline.cluster.signals import signals_held
from pipeline.corpus.manifest import ADDRESS
from pipeline.files.faults import explain, one_line
from pipeline.files.images import ImageSettings
from pipeline.labelling.attempts import AttemptBook, Attempts
from pipeline.labelling.labeller import Labeller
from pipeline.labelling.stages import Decode, Label, Write

FIRST_PART, USUAL_PART, LARGEST_PART = 1, 32, 256
NOTHING = Progress()
MANY_PARTS = 4000
"""Parts have the usual size up to this number of parts. Small parts use little memory and lose little work
when a run is killed, but many small files slow down readers of the table."""


def part_sizes(count: int, workers: int) -> list[int]:
    """Sizes of the parts of a run.

    They double from ``FIRST_PART``, so that first results appear soon, up to ``USUAL_PART`` (in very large
    runs up to ``LARGEST_PART``), and shrink towards the end, so that no worker finishes far behind.

    Args:
        count: number of images.
        workers: number of parts labelled concurrently.

    Returns:
        Sizes that sum to ``count``, each at least 1.
    """
    sizes: list[int] = []
    size, largest = FIRST_PART, min(LARGEST_PART, max(USUAL_PART, count // MANY_PARTS))
    while count > 0:
        for _ in range(workers):
            fair = max(FIRST_PART, -(-count // (2 * workers)))
            part = min(size, fair, count)
            if part:
                sizes.append(part)
                count -= part
        size = min(2 * size, largest)
    return sizes


@dataclass(frozen=True)
class _Places:
    """Where images are read, and where the table is written."""

    read: Place = ANYWHERE
    write: Place = ANYWHERE


@dataclass(frozen=True)
class Replanning:
    """How a run on a cluster continues when its nodes have changed.

    Attributes:
        plan: waits until there are enough nodes to go on from a plan, and returns how to use them.
        unfinished: those images of a manifest that have no row.
        notice: called with what the user should know.
    """

    plan: Callable[[Compute], Compute]
    unfinished: Callable[[pa.Table], pa.Table]
    notice: Callable[[str], None]


def run_labelling(
    todo: pa.Table,
    *,
    make_labeller: Callable[..., Labeller],
    image_settings: ImageSettings,
    write: Write,
    compute: Compute,
    report: Callable[[Progress], None],
    replanning: Replanning | None = None,
    so_far: Progress = NOTHING,
    began: float | None = None,
    file_rows: int | None = None,
) -> Progress:
    """Label images into a table, and block until done. The caller must hold the lease of the table.

    Args:
        todo: manifest of the images without a row.
        make_labeller: builds the Labeller in each actor, for a number of CPU ``threads``; picklable.
        image_settings: for decoding and resizing.
        write: encodes and commits.
        compute: how to use the cluster.
        report: called after each part.
        replanning: on a cluster whose nodes may change; None if they cannot.
        so_far: what earlier rounds of the run have done.
        began: when the run began, by ``time.monotonic``; default: now.
        file_rows: gather so many rows for each file; None writes a file for each part.

    Raises:
        MaskMillError: ``labelling_failed`` with the cause, ``cluster_too_small`` if too few nodes are left.
            Committed rows stay, and the run can be resumed.
    """
    began = time.monotonic() if began is None else began
    total = so_far.done + todo.num_rows
    progress = so_far

    def count(row: dict[str, Any]) -> None:
        nonlocal progress
        failures: dict[str, int] = {}
        for code in row.pop("failures"):
            failures[code] = failures.get(code, 0) + 1
        progress = progress.plus(**row, failures=failures, at_s=time.monotonic() - began)
        report(progress)

    alone = False
    while True:
        try:
            places = _Places() if replanning is None else _find_places(todo, write, replanning.notice, alone)
            make_flow = functools.partial(
                _flow, todo, make_labeller, image_settings, write, compute, places, file_rows
            )
            if replanning is None:
                _run(make_flow, count, places, stop=[])
            else:
                with NodeWatch(compute, replanning.notice) as watch:
                    _run(make_flow, count, places, stop=watch.reasons, finished=watch.part_finished)
            return progress
        except NodesChanged as change:
            assert replanning is not None
            why = str(change)
        except Exception as error:  # Ray Data wraps what happened in types of its own
            told = explain(error) or fault_in_run(error)
            if replanning is None or told.code != NOT_SHARED or isinstance(told, WrongUse):
                raise told from error
            # For good: a landmark that somebody changes would end each flow.
            alone = True
            why = "another node does not see local files as they were, which are now left to this one"
        replanning.notice(f"{why}: starting the workers anew on those that are there")
        compute = replanning.plan(compute)
        todo = replanning.unfinished(todo)
        # What was committed while the flow ended was not reported.
        progress = replace(progress, done=total - todo.num_rows)


def _find_places(todo: pa.Table, write: Write, notice: Callable[[str], None], alone: bool) -> _Places:
    addresses = todo["uri"].to_pylist()
    if ADDRESS in todo.column_names:
        addresses = [own or uri for own, uri in zip(todo[ADDRESS].to_pylist(), addresses, strict=True)]
    images = Landmarks.of(addresses)
    output = Landmarks.of((), output=write.storage, run_id=write.run_id)
    return _Places(
        find_place(images, "images are read", notice, alone=alone),
        find_place(output, "labels are written", notice, alone=alone),
    )


def _run(
    make_flow: Callable[[], ray.data.Dataset],
    count: Callable[[dict[str, Any]], None],
    places: _Places,
    *,
    stop: list[str],
    finished: Callable[[], None] = lambda: None,
) -> None:
    """Run a flow to its end, and pass on the statistics of each part.

    Raises:
        NodesChanged: ``stop`` has got a reason.
    """
    _configure(stop, places)
    with signals_held():  # the destructor of a half-made Dataset prints a traceback
        flow = make_flow()
    # Without prefetching, Ray Data leaves a thread behind for each flow.
    for part in flow.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        finished()
        for row in part.to_pylist():
            count(row)


def _flow(
    todo: pa.Table,
    make_labeller: Callable[..., Labeller],
    image_settings: ImageSettings,
    write: Write,
    compute: Compute,
    places: _Places,
    file_rows: int | None,
) -> ray.data.Dataset:
    """The stages. Each block is a decoded part of the manifest, or a piece of a large one."""
    attempts = shared_attempts()
    parts = _Parts(
        todo,
        part_sizes(todo.num_rows, compute.actors * compute.calls),
        places.read.guarded(Decode(image_settings, attempts)),
    )
    # The driver's node has other work, too: the driver, and on a head the control plane.
    decoders = compute.decoders if places.read.node is None else max(1, own_cores() // 2)
    writers = compute.writers if places.write.node is None else max(1, own_cores() // 4)
    stage: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
    labelled = ray.data.read_datasource(
        parts,
        override_num_blocks=len(parts.sizes),
        **places.read.task_options(compute.task_cpus),
        concurrency=decoders,
    ).map_batches(
        Label,
        fn_constructor_args=(
            functools.partial(make_labeller, threads=compute.threads),
            attempts,
            write.run_id,
            image_settings,
            write.ignore_index,
        ),
        # With GPUs, Ray Data requires a number: enough rows to fill batches of one image size.
        **stage | ({"batch_size": LARGEST_PART} if compute.gpus else {}),
        num_cpus=compute.cpus,
        num_gpus=compute.gpus or None,
        compute=ray.data.ActorPoolStrategy(
            size=compute.actors,
            max_concurrent_calls_per_actor=compute.calls,
            enable_true_multi_threading=compute.calls > 1,
        ),
    )
    tasks = stage | places.write.task_options(compute.task_cpus)
    if file_rows is None:
        return labelled.map_batches(
            places.write.guarded(write), **tasks, compute=ray.data.TaskPoolStrategy(size=writers)
        )
    return (
        labelled.map_batches(
            write.encode,
            **stage,
            num_cpus=compute.task_cpus,
            compute=ray.data.TaskPoolStrategy(size=compute.writers),
        )
        .repartition(target_num_rows_per_block=file_rows, strict=True)
        .map_batches(
            places.write.guarded(write.commit), **tasks, compute=ray.data.TaskPoolStrategy(size=writers)
        )
    )


class _SharedAttempts:
    """An ``AttemptBook`` in an actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def begin(self, key: str) -> int:
        """See ``pipeline.labelling.attempts.Attempts``."""
        before: int = ray.get(self._actor.begin.remote(key))
        return before

    def end(self, key: str) -> None:
        """See ``pipeline.labelling.attempts.Attempts``."""
        self._actor.end.remote(key)


def shared_attempts() -> Attempts:
    """A book for all processes of a run. If it is killed, an empty one takes its place."""
    # On the driver's node: others may be lost.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "scheduling_strategy": here, "max_restarts": -1, "max_task_retries": -1}
    return _SharedAttempts(ray.remote(**options)(AttemptBook).remote())


class _Parts(ray.data.Datasource):
    """Parts of the manifest, decoded by the tasks that read them.

    ``ray.data.from_arrow`` followed by a stage would first start tasks that only count the rows of each part.

    Attributes:
        sizes: images in each part.
    """

    def __init__(
        self, todo: pa.Table, sizes: Sequence[int], decode: Callable[[pa.Table], Iterable[pa.Table]]
    ) -> None:
        super().__init__()
        self.sizes = sizes
        self._todo = todo
        self._decode = decode

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown before images are decoded."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ray.data.ReadTask]:
        """One task for each part, whatever number is asked for."""
        ends = itertools.accumulate(self.sizes)
        return [
            ray.data.ReadTask(
                # ``take`` copies; a slice would be pickled with the whole manifest.
                functools.partial(self._decode, self._todo.take(pa.array(range(end - size, end)))),
                BlockMetadata(num_rows=size, size_bytes=None, exec_stats=None),
            )
            for end, size in zip(ends, self.sizes, strict=True)
        ]


def _configure(stop: list[str], places: _Places) -> None:
    context = ray.data.DataContext.get_current()
    # By default, as many decoded images wait as all nodes have room for; these wait on one of them.
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=None if places.read.node is None else _object_store(places.read.node) / 2
    )
    context.custom_execution_callback_classes = [stop_when_changed(stop)]
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Waiting for spot GPUs or in a queue is fine; Ray Data would give up after half an hour.
    context.execution_no_progress_timeout_s = -1
    # The wrapper loses what it wraps on the way between processes.
    context.raise_original_map_exception = True
    if logging.getLogger("ray").getEffectiveLevel() > logging.INFO:
        # Its errors are raised and reported in one line; -v shows the rest.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def _object_store(node: str) -> float:
    return float(
        next(each["Resources"]["object_store_memory"] for each in ray.nodes() if each["NodeID"] == node)
    )


def fault_in_run(error: Exception) -> MaskMillError:
    """A fault that is none of the user's, with the innermost exception."""
    cause: BaseException = error
    while isinstance(inner := getattr(cause, "cause", None) or cause.__cause__, BaseException):
        if isinstance(inner, SystemException):  # an empty mark that Ray Data puts behind its own errors
            break
        cause = inner
    return FailedWork(
        "labelling_failed",
        f"The run stopped at a fault of MaskMill: {type(cause).__name__}: {one_line(cause)}",
        "Finished work is kept: run the same command again. -v shows Ray's own messages.",
    )
