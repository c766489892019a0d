"""The learning rate of each update, as a pure function: a run that goes on needs no state for it."""

from __future__ import annotations

import math

from pipeline.training.loop.settings import LoopSettings


def learning_rate(step: int, settings: LoopSettings) -> float:
    """Learning rate of an update.

    With t = (step - 1) / iterations, base and minimum rates b and m:

    * ``poly``: m + (b - m) (1 - t)^power, as the reference of MaskCLIP+ (mmcv's ``poly`` by iteration);
    * ``cosine``: m + (b - m) (1 + cos(pi t)) / 2;
    * ``constant``: b.

    During the warm-up this is multiplied by step / (warmup + 1).

    Args:
        step: number of the update, 1 to ``settings.iterations``.
        settings: of the run.
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
