"""The interfaces that the training loop needs: samples that any process can load, and a task.

A *step* is one optimiser update, counted from 1. A *position* is the number of a sample in the endless
sequence of training samples, counted from 0. Step s of a run with batches of B samples (over all workers)
consumes positions (s-1)*B to s*B-1, whatever the number of workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    # Loader processes import this module too, and need no torch.
    import torch
    from torch import Tensor, nn

GUESS = -1
"""A pixel whose label is to be guessed (the reference's suppressed labels)."""
IGNORED = -100
"""A pixel that the loss ignores; the default ``ignore_index`` of ``torch.nn.functional.cross_entropy``."""

Sample = dict[str, npt.NDArray[Any]]


class Samples(Protocol):
    """A set of training samples. Sent to every loader process, so it holds paths, not pixels."""

    def order(self, epoch: int, seed: int) -> npt.NDArray[np.int64]:
        """Sample indices of one epoch, in order; balancing classes may repeat some.

        Deterministic: every process computes the same.
        """
        ...

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        """Read, augment and crop one sample; all samples have the same names, shapes and dtypes.

        ``rng`` is seeded with the run's seed and the sample's position.

        Raises:
            MaskMillError: the sample cannot be loaded (file missing, damaged …); the loop counts and skips
                it.
        """
        ...

    def blank(self) -> Sample:
        """A substitute for a sample that could not be loaded, with weight 0 in the loss."""
        ...


class Task(Protocol):
    """The model and loss to train. Built in every worker by a picklable factory.

    Attributes:
        host_columns: columns of ``Samples`` that ``loss`` reads on the host, and gets there: to read them
            from a GPU, the host would wait for it.
    """

    host_columns: frozenset[str]

    def build(self, device: torch.device) -> nn.Module:
        """Build the module on a device; parameters that require a gradient are trained. Called once."""
        ...

    def loss(
        self, module: nn.Module, batch: Mapping[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of this worker's share of a batch, a mean over its samples, and figures to log.

        Args:
            module: the result of ``build``, possibly wrapped (``DistributedDataParallel``); call this one, so
                that gradients are synchronised.
            batch: columns of ``Samples``, stacked along a first axis, on the device except ``host_columns``.
            step: number of the update.

        Returns:
            Scalar loss, and detached figures of one element each, which the loop averages over micro-batches
            and workers and logs.
        """
        ...

    def after_step(self, step: int) -> None:
        """Called in every worker after each update of the module's parameters."""
        ...

    def milestones(self) -> Sequence[int]:
        """Steps after which a checkpoint is always written and kept: ends of phases."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """State to checkpoint besides the module: tensors, numbers, strings, and lists and dicts of them."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of ``state_dict``, after ``build``."""
        ...
