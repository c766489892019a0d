"""What a training run is told about optimisation, and what of it must stay the same when it goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from models.errors import WrongUse


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How ``pipeline.training.loop.driver.train`` trains.

    Attributes:
        iterations: optimiser updates; the learning rate ends with the last one.
        batch_size: samples of one update, all workers and micro-batches together.
        accumulation: micro-batches that a worker cuts its share of a batch into, one after the other; saves
            memory. Batch normalisation sees one micro-batch at a time.
        optimizer: ``sgd`` or ``adamw`` (betas 0.9, 0.999).
        learning_rate: of the first update after the warm-up.
        min_learning_rate: what the schedule falls to.
        momentum: of SGD.
        weight_decay: of all parameters alike; decoupled for AdamW.
        schedule: ``poly``, ``cosine`` or ``constant``; see ``pipeline.training.loop.optimisation``.
        power: exponent of ``poly``.
        warmup: updates over which the learning rate rises linearly from 0.
        clip_norm: largest L2 norm of the gradient of all parameters; 0 does not clip.
        precision: ``fp32``, or autocast to ``bf16`` or ``fp16``; the latter needs a GPU and scales the loss.
        sync_batchnorm: batch statistics over all workers' samples.
        seed: of initial weights, order of samples, augmentation and dropout.
        checkpoint_every: updates between two checkpoints; the last update has one in any case.
        keep: newest checkpoints that are kept; milestones are kept as well.
        log_every: updates that one line of figures stands for.
        max_failures: how often workers that died are started again before the run gives up; -1 is without
            limit. Nodes taken away with notice are not counted.
    """

    iterations: int
    batch_size: int
    accumulation: int = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.01
    min_learning_rate: float = 1e-4
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    power: float = 0.9
    warmup: int = 0
    clip_norm: float = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    sync_batchnorm: bool = True
    seed: int = 0
    checkpoint_every: int = 1000
    keep: int = 2
    log_every: int = 50
    max_failures: int = 3

    def __post_init__(self) -> None:
        at_least = {
            "iterations": 1, "batch_size": 1, "accumulation": 1, "learning_rate": 0.0, "momentum": 0.0,
            "min_learning_rate": 0.0, "weight_decay": 0.0, "power": 0.0, "warmup": 0, "clip_norm": 0.0,
            "seed": 0, "checkpoint_every": 1, "keep": 1, "log_every": 1, "max_failures": -1,
        }  # fmt: skip
        for name, least in at_least.items():
            # Written so that NaN is refused as well.
            if not getattr(self, name) >= least:
                raise WrongUse(
                    "setting_invalid",
                    f"{name} is {getattr(self, name)}, less than {least}.",
                    f"Set {name} to {least} or more.",
                )
        known = {
            "optimizer": ("sgd", "adamw"),
            "schedule": ("poly", "cosine", "constant"),
            "precision": ("fp32", "bf16", "fp16"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise WrongUse(
                    "setting_invalid",
                    f"{name} is {getattr(self, name)!r}.",
                    f"Choose one of {', '.join(values)}.",
                )
        if self.min_learning_rate > self.learning_rate:
            raise WrongUse(
                "setting_invalid",
                f"min_learning_rate {self.min_learning_rate:g} is above learning_rate "
                f"{self.learning_rate:g}.",
                "The schedule falls from the latter to the former: set the smaller one as the minimum.",
            )

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

    def training(self) -> dict[str, Any]:
        """The settings that alter what is learned: a run that goes on must have the same."""
        free = {"checkpoint_every", "keep", "log_every", "max_failures"}
        return {name: value for name, value in asdict(self).items() if name not in free}


def settings_hash(record: Mapping[str, Any]) -> str:
    """Short fingerprint of JSON-able settings, the same whatever the order of their names."""
    text = json.dumps(record, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
