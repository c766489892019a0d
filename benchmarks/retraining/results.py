"""What a tick has come to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from pipeline.files.storage import Storage
from pipeline.retraining.state import read_tick, tick_folder

MODEL = "student"
TICK = "0002"
"""The tick that is disturbed."""
STEPS = ("intake", "label", "verify", "train", "evaluate", "gate", "register", "promote", "report")


def step_name(step: str) -> str:
    """What one of ``STEPS`` is called in a tick."""
    return step if step in ("intake", "label", "verify", "report") else f"{step} {MODEL}"


@dataclass(frozen=True)
class Result:
    """What a tick has come to.

    Attributes:
        outcome: promoted or refused.
        decision: of the gate.
        weights: SHA-256 of the candidate's.
        seconds: by step.
    """

    outcome: str | None
    decision: dict[str, Any]
    weights: str
    seconds: dict[str, float]

    @property
    def verdict(self) -> dict[str, Any]:
        """What of the decision does not depend on how busy the machine was."""
        figures = ("verdict", "images", "candidate_miou", "champion_miou", "gain", "low", "high")
        checks = {reason["check"]: reason["passed"] for reason in self.decision["reasons"]}
        return {name: self.decision[name] for name in figures} | checks

    @property
    def failed(self) -> list[str]:
        """Names of the checks that say no."""
        return [reason["check"] for reason in self.decision["reasons"] if reason["passed"] is False]

    def text(self, check: str) -> str:
        """What a check says."""
        return next((one["text"] for one in self.decision["reasons"] if one["check"] == check), "")


def result_of(output: Storage, run: str = TICK) -> Result:
    """What a tick has come to."""
    tick, place = read_tick(output, run), output.child(tick_folder(run))
    return Result(
        outcome=tick.outcome,
        decision=json.loads(place.read_bytes(f"{MODEL}-verdict.json")),
        weights=hashlib.sha256(place.read_bytes(f"{MODEL}/model.safetensors")).hexdigest(),
        seconds={step.name: step.seconds or 0.0 for step in tick.steps},
    )
