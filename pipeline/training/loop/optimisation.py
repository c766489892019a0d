"""The optimiser, and the learning rate of each update.

The rate is a pure function of the step, so resuming needs no scheduler state. To add an optimiser or a
schedule, name it in ``LoopSettings.optimizer`` or ``LoopSettings.schedule`` and add a branch here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from pipeline.training.loop.settings import LoopSettings


def make_optimizer(parameters: Iterable[nn.Parameter], settings: LoopSettings) -> torch.optim.Optimizer:
    """Create the optimiser; the loop sets its learning rate before each update."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        parameters,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )


def learning_rate(step: int, settings: LoopSettings) -> float:
    """Learning rate of an update.

    With t = (step - 1) / iterations, base and minimum rates b and m:

    * ``poly``: m + (b - m) (1 - t)^power, as in MaskCLIP+'s reference (mmcv's ``poly`` by iteration);
    * ``cosine``: m + (b - m) (1 + cos(pi t)) / 2;
    * ``constant``: b.

    During the warm-up this is multiplied by step / (warmup + 1). Steps count from 1 to
    ``settings.iterations``.
    """
    assert 1 <= step <= settings.iterations, step
    done = (step - 1) / settings.iterations
    if settings.schedule == "poly":
        left = (1 - done) ** settings.power
    elif settings.schedule == "cosine":
        left = (1 + math.cos(math.pi * done)) / 2
    else:
        return settings.learning_rate * _warm(step, settings.warmup)
    rate = settings.min_learning_rate + (settings.learning_rate - settings.min_learning_rate) * left
    return rate * _warm(step, settings.warmup)


def _warm(step: int, warmup: int) -> float:
    return min(1.0, step / (warmup + 1))
