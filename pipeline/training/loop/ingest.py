"""Training samples through Ray Data: a fixed sequence of samples, read by loaders beside the worker.

Every training worker runs a pipeline of its own: positions → loaders (a pool of actors on the worker's node)
→ batches, in order. Which sample a position holds, and the random numbers it is augmented with, follow from
the seed alone, so neither the number of workers and loaders nor a restart changes what is trained on.

Memory is bounded by bytes: loaders work ahead of training until a few blocks wait. Loaders ask for no logical
CPUs, since a worker that waits for samples must not wait for a processor that another worker holds; their
number is what limits them.

Shapes: B samples of a batch of all workers together, b = B / world size of one worker's share.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import pickle
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.data.collate_fn import NumpyBatchCollateFn
from ray.data.datasource import Datasource, ReadTask

from models.errors import FailedWork, MaskMillError, WrongUse
from pipeline.files.images import use_one_thread
from pipeline.training.loop.protocols import Sample, Samples

if TYPE_CHECKING:
    # Loaders import this module as well, and have no use for torch.
    from torch import Tensor

_BLOCK_BYTES = 32 << 20
_BLOCK_SAMPLES = 64
_QUEUED = 2
"""Blocks that a loader has at hand: one that it works on, one that waits for it."""
_LEG_BLOCKS = 1024
"""Blocks of one run of Ray Data, which plans them all before it starts. A long training is cut into legs of
this length; each is started a little before the one before it ends."""
_LEG_LEAD = 64
_NAP_S = 0.01
_PATIENCE_S = 10.0
_RAY_DATA_THREADS = ("iter_threaded", "Prefetcher", "StreamingExecutor")
_POSITION, _INDEX, _FAILED, _ERROR = "position", "index", "failed", "error"


def batches(
    samples: Samples,
    *,
    seed: int,
    start_step: int,
    stop_step: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    loaders: int = 2,
    max_failure_rate: float = 0.05,
    failure_window: int = 1000,
) -> Generator[dict[str, Tensor], None, None]:
    """This worker's share of the batches of steps ``start_step + 1`` to ``stop_step``, in order.

    Close the iterator to end its loaders before the last step.

    Args:
        samples: what to load; sent to the loaders once.
        seed: of the order and of the augmentation.
        start_step: updates that are done already; 0 at the beginning.
        stop_step: number of the last step.
        batch_size: B.
        rank: of this worker: of each batch it gets samples ``rank * b`` to ``(rank + 1) * b - 1``.
        world_size: number of workers; must divide B.
        loaders: processes that load for this worker.
        max_failure_rate: share of ``failure_window`` that may fail to load.
        failure_window: this worker's latest samples, which are watched for failures.

    Yields:
        The columns of ``samples`` stacked to (b, ...), on the CPU; ``position`` int64 (b,); ``failed`` bool
        (b,): the sample could not be loaded, and its row is ``samples.blank()``.

    Raises:
        MaskMillError: ``wrong_use``; ``training_data_empty``; ``training_failed`` with the latest
            reasons. Whatever else a sample raises is an error of the program and rises as it is.
        ray.exceptions.RayError: Ray lost the loaders and could not get them back.
    """
    if world_size < 1 or not 0 <= rank < world_size or batch_size % world_size or batch_size < 1:
        raise WrongUse(
            "wrong_use",
            f"A batch of {batch_size} samples cannot be shared out to {world_size} workers.",
            "Choose a batch size that is a multiple of the number of workers.",
        )
    if loaders < 1 or start_step < 0:
        raise WrongUse("wrong_use", f"{loaders=}, {start_step=}", "Use at least one loader.")
    share = batch_size // world_size
    sample_bytes = sum(column.nbytes for column in samples.blank().values())
    size = _block_samples(sample_bytes, share)
    legs = _legs(samples, seed, start_step, stop_step, batch_size, share, rank, size)
    leg = functools.partial(
        _run,
        constructor_args=(ray.put(samples), seed),
        share=share,
        loaders=loaders,
        # What loaders have made and nobody has taken yet, and what the batch at hand is made of.
        memory=(_QUEUED * loaders + 2 * max(1, share // size) + 2) * size * sample_bytes,
    )
    failures = _Failures(max_failure_rate, failure_window)
    with contextlib.closing(_relay(legs, leg)) as found:
        for step, (batch, errors) in enumerate(found, start_step + 1):
            failures.add(batch[_POSITION].tolist(), errors)
            if step == stop_step:
                failures.end()
            yield batch


# --- which samples ---


@dataclass(frozen=True)
class _Block:
    """Positions of the samples of one block, and their indices in ``Samples``: int64 (n,) each."""

    positions: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int64]


class _Sequence:
    """The endless sequence of samples: epochs one after the other. To be asked in ascending order."""

    def __init__(self, samples: Samples, seed: int) -> None:
        self._samples, self._seed = samples, seed
        self._epoch, self._first = 0, 0
        self._order = self._of_epoch()

    def __call__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Indices of the samples at ascending positions."""
        found = np.empty_like(positions)
        done = 0
        while done < len(positions):
            end = self._first + len(self._order)
            until = int(np.searchsorted(positions, end))
            found[done:until] = self._order[positions[done:until] - self._first]
            done = until
            if done < len(positions):
                self._epoch, self._first = self._epoch + 1, end
                self._order = self._of_epoch()
        return found

    def _of_epoch(self) -> npt.NDArray[np.int64]:
        order = self._samples.order(self._epoch, self._seed)
        if not len(order):
            raise WrongUse(
                "training_data_empty",
                "There is no sample to train on.",
                "Give more images, or ask less of them (min_quality).",
            )
        return order


def _block_samples(sample_bytes: int, share: int) -> int:
    """Samples of a block: whole shares of a batch where several fit, else a share in equal parts."""
    most = int(np.clip(_BLOCK_BYTES // max(sample_bytes, 1), 1, _BLOCK_SAMPLES))
    if share <= most:
        return most // share * share
    return -(-share // -(-share // most))


def _legs(
    samples: Samples, seed: int, start: int, stop: int, batch: int, share: int, rank: int, size: int
) -> Iterator[list[_Block]]:
    """Blocks of ``size`` samples (fewer at the end of a leg), in legs of whole steps."""
    sequence = _Sequence(samples, seed)
    steps_a_leg = max(1, _LEG_BLOCKS * size // share)
    for first in range(start, stop, steps_a_leg):
        steps = np.arange(first, min(first + steps_a_leg, stop), dtype=np.int64)
        positions = (steps[:, None] * batch + rank * share + np.arange(share)).ravel()
        indices = sequence(positions)
        yield [
            _Block(positions[at : at + size].copy(), indices[at : at + size].copy())
            for at in range(0, len(positions), size)
        ]


# --- Ray Data ---

_Loaded = tuple[dict[str, "Tensor"], list[bytes]]
"""A batch, and per sample its pickled error, or nothing."""
_Begun = tuple[_Loaded, Generator[_Loaded, None, None], int]
"""First batch of a leg, the others, and the number of samples after which the next leg is to start."""


def _relay(
    legs: Iterator[list[_Block]], run: Callable[[list[_Block]], Generator[_Loaded, None, None]]
) -> Generator[_Loaded, None, None]:
    """What the legs yield, one after the other; each is started while the one before runs out."""

    def start() -> _Begun | None:
        blocks = next(legs, None)
        if blocks is None:
            return None
        running = run(blocks)
        lead = sum(len(block.positions) for block in blocks[:-_LEG_LEAD])
        return next(running), running, lead  # Ray Data starts when it is asked for the first batch

    with ThreadPoolExecutor(1, "training-data") as pool:
        upcoming = pool.submit(start)
        try:
            while (begun := upcoming.result()) is not None:
                first, running, lead = begun
                begun_next, seen = False, 0
                with contextlib.closing(running):
                    for loaded in itertools.chain([first], running):
                        seen += len(loaded[1])
                        if seen > lead and not begun_next:
                            begun_next, upcoming = True, pool.submit(start)
                        yield loaded
        finally:
            if upcoming.exception() is None and (unused := upcoming.result()) is not None:
                unused[1].close()


def _run(
    blocks: list[_Block], *, constructor_args: tuple[Any, ...], share: int, loaders: int, memory: int
) -> Generator[_Loaded, None, None]:
    """Load the blocks with Ray Data, and cut them into batches."""
    if logging.getLogger("ray").getEffectiveLevel() > logging.INFO:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    dataset = ray.data.read_datasource(_Positions(blocks), num_cpus=0, override_num_blocks=len(blocks))
    _configure(dataset.context, memory)
    dataset = dataset.map_batches(
        _Load,
        fn_constructor_args=constructor_args,
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0,
        compute=ray.data.ActorPoolStrategy(
            size=min(loaders, len(blocks)), max_tasks_in_flight_per_actor=_QUEUED
        ),
    )
    others = set(threading.enumerate())
    found = iter(
        dataset.iter_torch_batches(batch_size=share, collate_fn=_Tensors(), device="cpu", prefetch_batches=1)
    )
    try:
        with contextlib.closing(found):
            yield from found
    finally:
        # Ray Data tells its threads to end and does not wait. Whichever of them touches Ray after its end
        # takes the whole process with it, without a word.
        del found
        deadline = time.monotonic() + _PATIENCE_S
        for thread in set(threading.enumerate()) - others:
            if thread.name.startswith(_RAY_DATA_THREADS):
                thread.join(max(0.0, deadline - time.monotonic()))


def _configure(context: ray.data.DataContext, memory: int) -> None:
    """Settings of one data set; those of the process stay as they are."""
    context.checkpoint_config = None  # that of a labelling run in the same process
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # training may pause, to evaluate or to write
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        object_store_memory=memory
    )
    # Beside the worker: samples that cross the network cost more than loaders elsewhere bring.
    context.execution_options.label_selector = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, _Nap]


class _Nap(ExecutionCallback):
    """A pause in each round of Ray Data's scheduler.

    While finished blocks wait for a consumer that is slower than the loaders, its loop turns without
    waiting, and takes a processor (and Python's lock) from the training that it feeds.
    """

    def on_execution_step(self, executor: object) -> None:
        time.sleep(_NAP_S)


class _Positions(Datasource):
    """One read task per block; Ray Data joins it with the loading that follows."""

    def __init__(self, blocks: list[_Block]) -> None:
        super().__init__()
        self._blocks = blocks

    def get_name(self) -> str:
        return "Positions"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        return [
            ReadTask(
                functools.partial(_read, block),
                BlockMetadata(
                    num_rows=len(block.positions), size_bytes=None, input_files=None, exec_stats=None
                ),
                per_task_row_limit=per_task_row_limit,
            )
            for block in self._blocks
        ]


def _read(block: _Block) -> list[pa.Table]:
    return [pa.table({_POSITION: block.positions, _INDEX: block.indices})]


class _Load:
    """Positions and indices → samples, in one loader."""

    def __init__(self, samples: ray.ObjectRef[Samples], seed: int) -> None:
        use_one_thread()
        self._samples = ray.get(samples)
        self._seed = seed
        self._blank = self._samples.blank()

    def __call__(self, table: pa.Table) -> dict[str, npt.NDArray[Any]]:
        positions = table[_POSITION].to_numpy()
        loaded = [
            self._load(position, index)
            for position, index in zip(positions.tolist(), table[_INDEX].to_pylist(), strict=True)
        ]
        columns = {name: np.stack([sample[name] for sample, _ in loaded]) for name in self._blank}
        errors = np.array([error for _, error in loaded], object)
        return columns | {_POSITION: positions, _ERROR: errors}

    def _load(self, position: int, index: int) -> tuple[Sample, bytes]:
        try:
            sample = self._samples.load(index, np.random.default_rng((self._seed, position)))
            found, wanted = _layout(sample), _layout(self._blank)
            if found != wanted:
                raise TypeError(f"sample {index} is {found}, a blank one {wanted}")
            return sample, b""
        except Exception as error:  # raised here, it would come back as text among Ray's own
            return self._blank, _pickled(error)


def _layout(sample: Sample) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (str(column.dtype), column.shape) for name, column in sorted(sample.items())}


def _pickled(error: Exception) -> bytes:
    trace = "".join(traceback.format_exception(error))
    try:
        data = pickle.dumps((error, trace))
        pickle.loads(data)  # some can be written, but not read
    except Exception:
        data = pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), trace))
    return data


class _Tensors(NumpyBatchCollateFn):
    """Columns of Ray Data → a batch."""

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> Any:
        import torch

        errors = batch.pop(_ERROR).tolist()
        # Copied out of Ray's store, whose memory is read-only and in short supply.
        tensors = {name: torch.from_numpy(np.array(column)) for name, column in batch.items()}
        return tensors | {_FAILED: torch.tensor([bool(error) for error in errors])}, errors


# --- failures ---


class _Failures:
    """Counts failed samples, and gives up when there are too many."""

    def __init__(self, max_rate: float, window: int) -> None:
        self._recent: deque[bool] = deque(maxlen=window)
        self._limit = max_rate * window
        self._latest: deque[str] = deque(maxlen=3)
        self._seen = self._count = self._recently = 0

    def add(self, positions: Sequence[int], errors: Sequence[bytes]) -> None:
        """Take note of a batch.

        Raises:
            MaskMillError: ``training_failed``.
            Exception: what is no failure of a sample, but of the program.
        """
        for position, data in zip(positions, errors, strict=True):
            if len(self._recent) == self._recent.maxlen:
                self._recently -= self._recent[0]
            self._recent.append(bool(data))
            self._seen += 1
            if not data:
                continue
            error, trace = pickle.loads(data)  # of our own loader, a moment ago
            if not isinstance(error, MaskMillError | OSError):
                raise error from RuntimeError(f"while sample {position} was loaded:\n{trace}")
            self._latest.append(str(error).splitlines()[0])
            self._count, self._recently = self._count + 1, self._recently + 1
            if self._recently > self._limit:
                raise self._failing()

    def end(self) -> None:
        """Give up, too, if nothing could be loaded at all."""
        if self._seen and self._count == self._seen:
            raise self._failing()

    def _failing(self) -> MaskMillError:
        reasons = "\n".join(f"  {text}" for text in dict.fromkeys(self._latest))
        return FailedWork(
            "training_failed",
            f"{self._recently:,} of the last {len(self._recent):,} training samples could not be loaded, "
            f"lately:\n{reasons}",
            "Correct what the errors name (are the images still there, and readable from here?), "
            "or label them again.",
        )
