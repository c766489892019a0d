"""The labelling data flow on Ray Data: manifest → fetch, decode → CLIP actors → encode → label table.

Every image of the manifest becomes exactly one row. Exactly once rests on Ray Data's checkpoint: a part of
the table counts when its ids are committed, and a run reads only ids that no commit names. That filtering
happens in the driver, which compares manifest and commits anyway: within Ray Data it would start a dataset
and a pool of actors of its own for each resume.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.checkpoint import CheckpointConfig
from ray.data.checkpoint.checkpoint_filter import IdColumnCheckpointManager
from ray.data.datasource import Datasource, ReadTask
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from models.errors import FailedWork, MaskMillError
from pipeline.cluster.alone import alone
from pipeline.cluster.collector import collect_rarely, without_collection
from pipeline.cluster.progress import Board, Progress
from pipeline.cluster.session import Compute
from pipeline.files.images import ImageSettings
from pipeline.files.storage import Storage
from pipeline.labelling.labeller import Labeller
from pipeline.labelling.stages import Decode, Encode, Label
from pipeline.table.committed import CHECKPOINT_DIR, LABELS_DIR

MANIFEST_DIR = "manifest"
_WAITING = "waiting"
FIRST_PART, USUAL_PART, LARGEST_PART = 1, 32, 256
MANY_PARTS = 4000
"""Parts are of the usual size until there would be more of them than this. A small part costs little memory,
and little work when a run is killed; many small files cost whoever reads the table."""


def part_sizes(count: int, workers: int) -> list[int]:
    """Sizes of the parts that a run is cut into.

    They double from ``FIRST_PART``, so that the first results are on disk soon, up to ``USUAL_PART`` (more in
    a run of very many images, ``LARGEST_PART`` at most), and shrink again at the end, so that no worker is
    left alone with a large part.

    Args:
        count: images.
        workers: parts that are labelled at a time.

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


def write_run_manifest(storage: Storage, run_name: str, todo: pa.Table, workers: int) -> str:
    """Write what a run has to do, one Parquet row group per part.

    Returns:
        Its path relative to the output.
    """
    path = f"{MANIFEST_DIR}/{run_name}.parquet"
    filesystem = storage.arrow_filesystem()
    filesystem.create_dir(storage.path(MANIFEST_DIR), recursive=True)
    with pq.ParquetWriter(storage.path(path), todo.schema, filesystem=filesystem) as writer:
        start = 0
        for size in part_sizes(todo.num_rows, workers):
            writer.write_table(todo.slice(start, size))
            start += size
    return path


def start_board() -> Any:
    """The actor that the stages report to, on the driver's node: what it holds is lost with that only."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    board = ray.remote(num_cpus=0, concurrency_groups={_WAITING: 1}, scheduling_strategy=here)(Board)
    return board.remote()


def words_to_come(board: Any) -> Callable[[], Any]:
    """A function for workers: it blocks until ``hand_over_words``, and gives the words.

    Args:
        board: of ``start_board``. One that is gone ends the run, through the workers that wait for it.
    """
    coming = board.words.options(concurrency_group=_WAITING).remote()
    return functools.partial(_arrived, coming)


def _arrived(coming: ray.ObjectRef) -> Any:
    return pickle.loads(ray.get(coming))


def hand_over_words(board: Any, words: bytes) -> None:
    """Let the workers have what they wait for.

    Args:
        board: of ``start_board``.
        words: pickle of them.
    """
    board.hand_over_words.remote(words)


def build_labeller(make_labeller: bytes, **settings: Any) -> Labeller:
    """The Labeller that a pickle builds, in a process that has yet to import what that takes.

    Args:
        make_labeller: pickle of a function.
        settings: its arguments.
    """
    collect_rarely()
    with without_collection():
        make = pickle.loads(make_labeller)
    labeller: Labeller = make(**settings)
    return labeller


def run_labelling(
    storage: Storage,
    manifest: str,
    *,
    make_labeller: Callable[[], Labeller],
    image_settings: ImageSettings,
    num_classes: int,
    ignore_index: int,
    compute: Compute,
    board: Any,
    report: Callable[[Progress], None],
) -> Progress:
    """Label every image of a run manifest into ``labels/``. Blocks until done; call with the lease held.

    Args:
        storage: the output.
        manifest: as ``write_run_manifest`` returned it.
        make_labeller: builds the Labeller, in each actor; must be picklable.
        image_settings: decoding and resizing.
        num_classes: C, background included.
        ignore_index: id of unsure pixels.
        compute: how to use the cluster.
        board: of ``start_board``.
        report: called about twice a second from a thread.

    Raises:
        MaskMillError: ``labelling_failed`` with the cause; what was committed stays, and the same run can
            be started again.
    """
    _configure(storage)
    board.begin.remote(time.monotonic())
    pool = ray.data.ActorPoolStrategy(
        size=compute.actors,
        max_concurrent_calls_per_actor=compute.calls,
        enable_true_multi_threading=compute.calls > 1,
    )
    dataset = (
        ray.data.read_datasource(
            _RunManifest(storage, manifest),
            num_cpus=compute.task_cpus,
            concurrency=compute.decoders,
            override_num_blocks=len(_row_counts(storage, manifest)),
        )
        .map_batches(
            Decode(image_settings, board),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=compute.task_cpus,
            compute=ray.data.TaskPoolStrategy(size=compute.decoders),
        )
        .map_batches(
            Label,
            fn_constructor_args=(make_labeller, board),
            # With GPUs Ray Data wants a number; enough rows that buckets of one image size fill up.
            batch_size=LARGEST_PART if compute.gpus else None,
            batch_format="pyarrow",
            num_cpus=compute.cpus,
            num_gpus=compute.gpus or None,
            compute=pool,
        )
        .map_batches(
            Encode(ignore_index, num_classes, board),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=compute.task_cpus,
            compute=ray.data.TaskPoolStrategy(size=compute.writers),
        )
    )
    try:
        with _watched(board, report), alone() if compute.local else contextlib.nullcontext():
            dataset.write_parquet(
                storage.path(LABELS_DIR),
                filesystem=storage.arrow_filesystem(),
                ray_remote_args={"num_cpus": compute.task_cpus},
                concurrency=compute.writers,
            )
        progress: Progress = ray.get(board.snapshot.remote())
    except ray.exceptions.RayError as error:
        raise _explained(error) from error
    report(progress)
    return progress


def _configure(storage: Storage) -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Waiting for spot GPUs or a queue is no fault; Ray Data would give up after half an hour.
    context.execution_no_progress_timeout_s = -1
    context.checkpoint_config = CheckpointConfig(
        id_column="id",
        checkpoint_path=storage.uri_of(CHECKPOINT_DIR),
        override_filesystem=storage.arrow_filesystem(),
        delete_checkpoint_on_success=False,
        checkpoint_manager_cls=_FilteredBefore,
    )
    if logging.getLogger("ray").getEffectiveLevel() > logging.INFO:
        # What matters of its errors is raised, and told in one line; -v shows the rest.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)


class _FilteredBefore(IdColumnCheckpointManager):
    """Ray Data's manager for a manifest that holds no finished id: clean up, filter nothing."""

    def load_checkpoint(
        self, data_file_dir: str | None = None, data_file_filesystem: Any = None
    ) -> tuple[None, int]:
        if data_file_dir is not None:
            self._clean_pending_checkpoints(data_file_dir, data_file_filesystem)
        return None, 0


def _row_counts(storage: Storage, manifest: str) -> list[int]:
    with storage.arrow_filesystem().open_input_file(storage.path(manifest)) as file:
        metadata = pq.ParquetFile(file).metadata
        return [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]


class _RunManifest(Datasource):
    """One read task per row group. ``read_parquet`` would join small files and split large ones at will."""

    def __init__(self, storage: Storage, manifest: str) -> None:
        super().__init__()
        self._storage = storage
        self._manifest = manifest

    def get_name(self) -> str:
        return "Manifest"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: Any = None,
    ) -> list[ReadTask]:
        storage, manifest = self._storage, self._manifest

        def read(index: int) -> Iterable[pa.Table]:
            with storage.arrow_filesystem().open_input_file(storage.path(manifest)) as file:
                yield pq.ParquetFile(file).read_row_group(index)

        return [
            ReadTask(
                lambda index=index: read(index),
                BlockMetadata(num_rows=rows, size_bytes=None, input_files=None, exec_stats=None),
                per_task_row_limit=per_task_row_limit,
            )
            for index, rows in enumerate(_row_counts(storage, manifest))
        ]


@contextlib.contextmanager
def _watched(board: Any, report: Callable[[Progress], None]) -> Iterator[None]:
    """Report the progress meanwhile; not after, when Ray may be gone."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            with contextlib.suppress(ray.exceptions.RayError):
                report(ray.get(board.snapshot.remote(), timeout=5))

    watcher = threading.Thread(target=watch, name="progress", daemon=True)
    try:
        watcher.start()
        yield
    finally:
        stop.set()
        if watcher.is_alive():  # Ctrl-C may come before it is
            watcher.join()


def _explained(error: ray.exceptions.RayError) -> MaskMillError:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MaskMillError):
            return cause
        inner = getattr(cause, "cause", None)
        cause = inner if isinstance(inner, BaseException) else cause.__cause__
    return FailedWork(
        "labelling_failed",
        f"The run stopped: {str(error).strip().splitlines()[-1]}",
        "What is finished is kept: run the same command again. With -v Ray tells more.",
    )
