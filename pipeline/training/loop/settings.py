"""Optimisation settings of a training run, and the hash by which a resumed run recognises them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from models.errors import WrongUse
from models.settings import NEUTRAL, Settings, Steps


class LoopSettings(Settings):
    """How ``pipeline.training.loop.driver.train`` trains."""

    iterations: Annotated[int, Field(ge=1)]
    """Optimiser updates; the learning rate schedule ends with the last one. When this is changed, phases,
    warm-up and intervals follow in proportion, unless they are set as well."""
    batch_size: Annotated[int, Field(ge=1)]
    """Samples per update, over all workers and micro-batches."""
    accumulation: Annotated[int, Field(ge=1)] = 1
    """Micro-batches into which a worker splits its share of a batch to save memory. Batch norm sees one
    micro-batch at a time."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """``sgd`` or ``adamw`` (betas 0.9, 0.999)."""
    learning_rate: Annotated[float, Field(ge=0)] = 0.01
    """Learning rate of the first update after the warm-up."""
    min_learning_rate: Annotated[float, Field(ge=0)] = 1e-4
    """Learning rate at the end of the schedule."""
    momentum: Annotated[float, Field(ge=0)] = 0.9
    """Momentum of SGD."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Weight decay of all parameters; decoupled with AdamW."""
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    """``poly``, ``cosine`` or ``constant``; see ``pipeline.training.loop.optimisation``."""
    power: Annotated[float, Field(ge=0)] = 0.9
    """Exponent of ``poly``."""
    warmup: Annotated[int, Field(ge=0), Steps()] = 0
    """Updates over which the learning rate rises linearly from 0."""
    clip_norm: Annotated[float, Field(ge=0)] = 0.0
    """Maximum L2 norm of the gradient of all parameters; 0 does not clip."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """``fp32``, or autocast to ``bf16`` or ``fp16``; the latter needs a GPU and scales the loss."""
    sync_batchnorm: bool = True
    """Compute batch norm statistics over all workers."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of initial weights, sample order, augmentation and dropout."""
    checkpoint_every: Annotated[int, Field(ge=1), NEUTRAL, Steps(interval=True)] = 1000
    """Updates between two checkpoints; the last update always writes one."""
    keep: Annotated[int, Field(ge=1), NEUTRAL] = 2
    """Number of newest checkpoints to keep, besides milestones."""
    log_every: Annotated[int, Field(ge=1), NEUTRAL, Steps(interval=True)] = 50
    """Updates per line of figures."""
    max_failures: Annotated[int, Field(ge=-1), NEUTRAL] = 3
    """How often dead workers are restarted before the run gives up; -1 is unlimited. Announced preemptions do
    not count."""

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
        """Refuse a number of workers that does not divide a batch evenly.

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
    """Short hash of JSON-able settings, independent of their order."""
    text = json.dumps(record, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
