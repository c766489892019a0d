"""What a training run is told about optimisation, and what of it must stay the same when it goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from models.errors import WrongUse
from models.settings import NEUTRAL, Settings


class LoopSettings(Settings):
    """How ``pipeline.training.loop.driver.train`` trains."""

    iterations: Annotated[int, Field(ge=1)]
    """Optimiser updates; the learning rate ends with the last one."""
    batch_size: Annotated[int, Field(ge=1)]
    """Samples of one update, all workers and micro-batches together."""
    accumulation: Annotated[int, Field(ge=1)] = 1
    """Micro-batches that a worker cuts its share of a batch into, one after the other; saves memory. Batch
    normalisation sees one micro-batch at a time."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """``sgd`` or ``adamw`` (betas 0.9, 0.999)."""
    learning_rate: Annotated[float, Field(ge=0)] = 0.01
    """Learning rate of the first update after the warm-up."""
    min_learning_rate: Annotated[float, Field(ge=0)] = 1e-4
    """Learning rate that the schedule falls to."""
    momentum: Annotated[float, Field(ge=0)] = 0.9
    """Momentum of SGD."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Weight decay of all parameters; decoupled for AdamW."""
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    """``poly``, ``cosine`` or ``constant``; see ``pipeline.training.loop.optimisation``."""
    power: Annotated[float, Field(ge=0)] = 0.9
    """Exponent of ``poly``."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Updates over which the learning rate rises linearly from 0."""
    clip_norm: Annotated[float, Field(ge=0)] = 0.0
    """Largest L2 norm of the gradient of all parameters; 0 does not clip."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """``fp32``, or autocast to ``bf16`` or ``fp16``; the latter needs a GPU and scales the loss."""
    sync_batchnorm: bool = True
    """Batch norms use the statistics of all workers' samples."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of initial weights, order of samples, augmentation and dropout."""
    checkpoint_every: Annotated[int, Field(ge=1), NEUTRAL] = 1000
    """Updates between two checkpoints; the last update has one in any case."""
    keep: Annotated[int, Field(ge=1), NEUTRAL] = 2
    """Newest checkpoints that are kept; milestones are kept as well."""
    log_every: Annotated[int, Field(ge=1), NEUTRAL] = 50
    """Updates that one line of figures stands for."""
    max_failures: Annotated[int, Field(ge=-1), NEUTRAL] = 3
    """How often workers that died are started again before the run gives up; -1 is without limit. Nodes
    taken away with notice are not counted."""

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise WrongUse(
                "setting_invalid",
                f"min_learning_rate {self.min_learning_rate:g} is above learning_rate "
                f"{self.learning_rate:g}.",
                "The schedule falls from the latter to the former: set the smaller one as the minimum.",
            )
        return self

    def check_workers(self, workers: int) -> None:
        """Refuse a number of workers among which a batch cannot be shared evenly.

        Raises:
            MaskMillError: ``setting_invalid``.
        """
        parts = max(1, workers) * self.accumulation
        if self.batch_size % parts:
            raise WrongUse(
                "setting_invalid",
                f"A batch of {self.batch_size} cannot be shared evenly by {max(1, workers)} worker(s) with "
                f"{self.accumulation} micro-batch(es) each.",
                f"Set the batch size to a multiple of {parts}, or change the workers or the accumulation.",
            )


def settings_hash(record: Mapping[str, Any]) -> str:
    """Short fingerprint of JSON-able settings, the same whatever the order of their names."""
    text = json.dumps(record, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
