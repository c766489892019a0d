"""``maskmill train``: one of the trainings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import subcommand

from jobs.options import FLAT
from jobs.train.clipseg import TrainClipSeg
from jobs.train.maskclip_plus import TrainMaskClipPlus


@dataclass(frozen=True)
class Train:
    """Train a model on labels, on this machine or on a Ray cluster."""

    model: Annotated[
        Annotated[TrainMaskClipPlus, subcommand("maskclip-plus")]
        | Annotated[TrainClipSeg, subcommand("clipseg")],
        FLAT,
    ]

    def run(self) -> int:
        """Train the chosen model."""
        return self.model.run()
