"""Loading of training samples in a fixed order, by subprocesses of the training worker.

This is torch's ``DataLoader`` with a sampler of *positions* (``pipeline.training.loop.protocols``). The seed
alone decides which sample a position holds and which random numbers augment it. So neither the number of
workers and loaders nor a restart changes the training data, a run resumes by position, and new loaders can
replace dead ones at the next step.

Loaders are spawned: a process with Ray's threads and a GPU cannot be forked safely. A loader that loses its
training worker exits within seconds.

Shapes: B samples in a batch over all workers, b = B / world size in one worker's share.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import math
import os
import pickle
import shutil
import signal
import tempfile
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from models.errors import Damaged, FailedWork, MaskMillError, WrongUse
from pipeline.files.images import use_one_thread
from pipeline.training.loop.protocols import Sample, Samples

AHEAD_BYTES = 2 << 30
"""Limit on the prefetched batches of one training worker, in bytes."""
_SHARED_MEMORY = Path("/dev/shm")
_PREFETCH = 2
"""Batches that a loader prepares ahead."""
_MOST_LOSSES, _LOSS_WINDOW = 3, 1000
"""Give up when loaders die this often within so many steps, and no sample is to blame."""
_DEADLY = 2
"""Deaths of a loader that works alone after which its sample is left out; one may be an accident."""
_MOST_AT_A_STEP = 7
"""Give up when so many loaders died before one step was loaded: one, and those of three deadly samples."""

_Loaded = tuple[int, Sample, bytes]
"""Position, sample, and its pickled error, or no bytes."""


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
    pin_memory: bool = False,
    notice: Callable[[str], None] = lambda text: None,
    max_failure_rate: float = 0.05,
    failure_window: int = 1000,
) -> Generator[dict[str, Tensor], None, None]:
    """Yield this worker's share of the batches of steps ``start_step + 1`` to ``stop_step``, in order.

    Close the iterator to stop its loaders before the last step.

    Args:
        samples: pickled and sent to each loader once.
        seed: of order and augmentation.
        start_step: updates already done; 0 at the beginning.
        stop_step: number of the last step.
        batch_size: B.
        rank: of this worker; it gets samples ``rank * b`` to ``(rank + 1) * b - 1`` of each batch.
        world_size: number of workers; must divide B.
        loaders: loader processes for this worker; fewer if prefetched batches would exceed 2 GiB.
        pin_memory: put batches into pinned memory.
        notice: called with messages for the user, when loaders died.
        max_failure_rate: share of ``failure_window`` that may fail to load.
        failure_window: number of this worker's latest samples over which failures are counted.

    Yields:
        The columns of ``samples`` stacked to (b, ...), on the CPU; ``position`` int64 (b,); ``failed`` bool
        (b,): the sample could not be loaded, and its row is ``samples.blank()``.

    Raises:
        MaskMillError: ``wrong_use``; ``too_few_images``; ``training_failed`` with the latest reasons, or
            if loaders keep dying. Any other error of a sample is a bug and is re-raised.
    """
    if world_size < 1 or not 0 <= rank < world_size or batch_size % world_size or batch_size < 1:
        raise WrongUse(
            "wrong_use",
            f"A batch of {batch_size} samples cannot be divided among {world_size} workers.",
            "Choose a batch size that is a multiple of the number of workers.",
        )
    if loaders < 1 or start_step < 0:
        raise WrongUse("wrong_use", f"{loaders=}, {start_step=}", "Use at least one loader.")
    failures = Failures(max_failure_rate, failure_window)
    deaths = _Deaths()
    step = alone_until = start_step
    while step < stop_step:
        alone = step < alone_until
        stop = min(alone_until, stop_step) if alone else stop_step
        shares = shares_of(
            samples, seed=seed, start_step=step, stop_step=stop, batch_size=batch_size, rank=rank,
            world_size=world_size,
        )  # fmt: skip
        # Without samples, this raises before a process starts that nobody would stop in order.
        shares = itertools.chain([next(shares)], shares)
        with _new_note() as note:
            loading = Loading(samples, seed, left_out=deaths.deadly, note=note if alone else None)
            count = 1 if alone else min(loaders, stop - step)
            running = _start(loading, shares, batch_size // world_size, count, pin_memory)
            try:
                while step < stop:
                    try:
                        columns, errors = next(running)
                    except (RuntimeError, OSError, EOFError) as error:
                        # Errors of samples arrive as data, so this is the DataLoader losing a process.
                        notice(deaths.add(step, note.read_text(), error))
                        alone_until = step + _PREFETCH * loaders + 1
                        break
                    step += 1
                    batch = {name: torch.as_tensor(column) for name, column in columns.items()}
                    failures.add(batch["position"].tolist(), errors)
                    if step == stop_step:
                        failures.end()
                    yield batch
            finally:
                del running  # stops the loaders


def shares_of(
    samples: Samples,
    *,
    seed: int,
    start_step: int,
    stop_step: int,
    batch_size: int,
    rank: int,
    world_size: int,
) -> Iterator[list[tuple[int, int]]]:
    """Yield, for each step, (position, sample index) of a worker's share.

    Raises:
        MaskMillError: ``too_few_images``.
    """
    share = batch_size // world_size
    epoch, first, order = 0, 0, _order(samples, 0, seed)
    for step in range(start_step, stop_step):
        begin = step * batch_size + rank * share
        keys = []
        for position in range(begin, begin + share):
            while position >= first + len(order):
                epoch, first = epoch + 1, first + len(order)
                order = _order(samples, epoch, seed)
            keys.append((position, int(order[position - first])))
        yield keys


def _order(samples: Samples, epoch: int, seed: int) -> npt.NDArray[np.int64]:
    order = samples.order(epoch, seed)
    if not len(order):
        raise WrongUse(
            "too_few_images",
            "There is no sample to train on.",
            "Give more images, or lower min_quality.",
        )
    return order


# --- loaders ---


def _start(
    loading: Loading,
    shares: Iterator[list[tuple[int, int]]],
    share: int,
    loaders: int,
    pin_memory: bool,
) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
    batch_bytes = max(1, share * sum(column.nbytes for column in loading.blank.values()))
    ahead = max(1, AHEAD_BYTES // batch_bytes)
    # Containers often have almost no shared memory; then batches are piped, as arrays.
    shared = free_shared_memory() > 2 * min(_PREFETCH * loaders * batch_bytes, AHEAD_BYTES)
    with _interrupts_blocked():
        return iter(
            DataLoader(
                loading,
                batch_sampler=shares,
                num_workers=min(loaders, ahead),
                prefetch_factor=_PREFETCH if _PREFETCH * loaders <= ahead else 1,
                collate_fn=_tensors if shared else _arrays,
                pin_memory=pin_memory,
                worker_init_fn=_prepare_loader,
                multiprocessing_context="spawn",
                # By default, torch would draw from the global generator, which training uses.
                generator=torch.Generator(),
            )
        )


def free_shared_memory() -> float:
    """Free shared memory in bytes; infinite if the system sets no limit."""
    return shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else math.inf


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Start processes that ignore Ctrl-C, which asks the training worker for a checkpoint."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare_loader(number: int) -> None:
    use_one_thread()
    # Exit at once: at shutdown, Python would kill the thread that hands batches over inside torch's C++ code,
    # which aborts.
    atexit.register(os._exit, 0)


@contextlib.contextmanager
def _new_note() -> Iterator[Path]:
    """A file in which a loader names the sample that it works on; it outlives the loader."""
    with tempfile.NamedTemporaryFile(prefix="maskmill-loading-") as file:
        yield Path(file.name)


class Loading(Dataset[_Loaded]):
    """Maps (position, index) to samples, in a loader.

    Args:
        samples: what loads them.
        seed: of augmentation.
        left_out: samples that kill the process that loads them.
        note: a file that names a sample while it is being loaded.
    """

    def __init__(
        self,
        samples: Samples,
        seed: int,
        *,
        left_out: frozenset[int] = frozenset(),
        note: Path | None = None,
    ) -> None:
        self.blank = samples.blank()
        self._samples, self._seed, self._left_out, self._note = samples, seed, left_out, note

    def __getitem__(self, key: tuple[int, int]) -> _Loaded:
        position, index = key
        if index in self._left_out:
            return position, self.blank, pickled_error(_deadly(index))
        if self._note is not None:
            self._note.write_text(str(index))
        try:
            sample = self._samples.load(index, np.random.default_rng((self._seed, position)))
            found, wanted = _layout(sample), _layout(self.blank)
            if found != wanted:
                raise TypeError(f"sample {index} is {found}, a blank one {wanted}")
            return position, sample, b""
        except Exception as error:  # raised here, it would arrive as another type
            return position, self.blank, pickled_error(error)
        finally:
            if self._note is not None:
                self._note.write_text("")


def _layout(sample: Sample) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (str(column.dtype), column.shape) for name, column in sorted(sample.items())}


def _arrays(loaded: list[_Loaded]) -> tuple[dict[str, npt.NDArray[Any]], list[bytes]]:
    positions, rows, errors = zip(*loaded, strict=True)
    columns: dict[str, npt.NDArray[Any]] = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    columns |= {
        "position": np.array(positions, np.int64),
        "failed": np.array([bool(error) for error in errors]),
    }
    return columns, list(errors)


def _tensors(loaded: list[_Loaded]) -> tuple[dict[str, Tensor], list[bytes]]:
    columns, errors = _arrays(loaded)
    return {name: torch.from_numpy(column) for name, column in columns.items()}, errors


def pickled_error(error: Exception) -> bytes:
    """Pickle an error with its traceback; only its text if it cannot be pickled."""
    trace = "".join(traceback.format_exception(error))
    try:
        data = pickle.dumps((error, trace))
        pickle.loads(data)  # some errors pickle but do not unpickle
    except Exception:
        data = pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), trace))
    return data


# --- failures ---


class Failures:
    """Counts failed samples and gives up if there are too many."""

    def __init__(self, max_rate: float, window: int) -> None:
        self._recent: deque[bool] = deque(maxlen=window)
        self._limit = max_rate * window
        self._latest: deque[str] = deque(maxlen=3)
        self._seen = self._count = self._recently = 0

    def add(self, positions: Sequence[int], errors: Sequence[bytes]) -> None:
        """Count the failures of a batch.

        Raises:
            MaskMillError: ``training_failed``.
            Exception: an error that is a bug, not a bad sample.
        """
        for position, data in zip(positions, errors, strict=True):
            if len(self._recent) == self._recent.maxlen:
                self._recently -= self._recent[0]
            self._recent.append(bool(data))
            self._seen += 1
            if not data:
                continue
            error, trace = pickle.loads(data)  # trusted: from our own loader
            if not isinstance(error, MaskMillError | OSError):
                raise error from RuntimeError(f"while sample {position} was loaded:\n{trace}")
            self._latest.append(str(error).splitlines()[0])
            self._count, self._recently = self._count + 1, self._recently + 1
            if self._recently > self._limit:
                raise self._failing()

    def end(self) -> None:
        """Give up if nothing could be loaded at all."""
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


class _Deaths:
    """Counts loaders that died, finds the samples to blame, and gives up if there are too many others."""

    def __init__(self) -> None:
        self._steps: deque[int] = deque(maxlen=_MOST_LOSSES)
        self._at_a_step: Counter[int] = Counter()
        self._by_sample: Counter[int] = Counter()

    @property
    def deadly(self) -> frozenset[int]:
        """Samples that are left out."""
        return frozenset(index for index, count in self._by_sample.items() if count >= _DEADLY)

    def add(self, step: int, begun: str, error: Exception) -> str:
        """Count a death.

        Args:
            step: that was waited for.
            begun: index of the sample that was being loaded, if a loader worked alone, else "".
            error: of the ``DataLoader``.

        Returns:
            What to tell the user.

        Raises:
            MaskMillError: ``training_failed``.
        """
        self._steps.append(step)
        self._at_a_step[step] += 1
        if begun and self._at_a_step[step] < _MOST_AT_A_STEP:
            self._by_sample[int(begun)] += 1
            if self._by_sample[int(begun)] == _DEADLY:
                self._steps.clear()
                return f"Training sample {int(begun):,} kills the process that loads it; it is left out."
        many = len(self._steps) == _MOST_LOSSES and step - self._steps[0] < _LOSS_WINDOW
        if many or self._at_a_step[step] >= _MOST_AT_A_STEP:
            raise _loaders_lost(error) from error
        return f"A process that loads samples died at step {step:,}; restarting the loaders."


def _deadly(index: int) -> MaskMillError:
    return Damaged(
        "crashed_worker",
        f"training sample {index:,} killed the process that loads it.",
        "Take its image out, or convert it to another format.",
    )


def _loaders_lost(error: Exception) -> MaskMillError:
    return FailedWork(
        "training_failed",
        f"The processes that load samples keep dying: {' '.join(str(error).split())}",
        "Most often memory ran out (the system's log says so): use fewer workers, smaller crops or a smaller "
        "batch, and run the same command again.",
    )
