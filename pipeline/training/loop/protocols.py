"""What the training loop asks of its two partners: samples that can be loaded in any process, and a task.

Words: a *step* is one optimiser update, counted from 1; a *position* is the number of a sample in the endless
sequence of training samples, counted from 0. Step s of a run with batches of B samples (all workers together)
takes the positions (s-1)*B to s*B-1, whatever the number of workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    # Loading processes import this module as well, and have no use for torch.
    import torch
    from torch import Tensor, nn

GUESS = -1
"""A pixel whose label is to be guessed (the reference's suppressed labels)."""
IGNORED = -100
"""A pixel that the loss leaves out; ``torch.nn.functional.cross_entropy`` knows it by this number."""

Sample = dict[str, npt.NDArray[Any]]


class Samples(Protocol):
    """A set of training samples. Sent to every process that loads: it holds paths, not pixels."""

    def order(self, epoch: int, seed: int) -> npt.NDArray[np.int64]:
        """Indices of the samples of one epoch, in order; repeats where classes are balanced.

        A function of its arguments alone: any process computes the same.
        """
        ...

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        """Read, augment and crop one sample; all samples have the same names, shapes and dtypes.

        ``rng`` is seeded with the run's seed and the sample's position.

        Raises:
            MaskMillError: the sample cannot be had (file gone, damaged …); the loop counts it and trains
                without it.
        """
        ...

    def blank(self) -> Sample:
        """What takes the place of a sample that could not be loaded: it must not weigh in the loss."""
        ...


class Task(Protocol):
    """What is trained. Built in every worker by a picklable factory."""

    def build(self, device: torch.device) -> nn.Module:
        """The module, on its device; parameters that require a gradient are trained. Called once, first."""
        ...

    def loss(
        self, module: nn.Module, batch: Mapping[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of this worker's share of a batch, a mean over its samples, and figures to log.

        Args:
            module: that of ``build``, possibly wrapped (``DistributedDataParallel``): call it, so that
                gradients are exchanged.
            batch: columns of ``Samples``, stacked along a first axis, on the device.
            step: the number of the update that this is for.

        Returns:
            Scalar loss; and detached figures of one element each, which the loop averages over micro-batches
            and workers before it logs them.
        """
        ...

    def after_step(self, step: int) -> None:
        """Called in every worker after each update; the module's parameters are the new ones."""
        ...

    def milestones(self) -> Sequence[int]:
        """Steps after which a checkpoint is written in any case, and kept: ends of phases."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the module: tensors, numbers, strings, lists, dicts of them."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave, after ``build``."""
        ...
