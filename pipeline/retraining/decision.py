"""The gate's verdict on a candidate, and its reasons: a record that is written before anything moves."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from pipeline.files.records import find_record
from pipeline.files.storage import Storage
from pipeline.retraining.measured import Measured

SCHEMA_VERSION = 1


class _Record(BaseModel):
    # Fields that a later version adds do not make a file unreadable.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Reason(_Record):
    """What one check found.

    Attributes:
        check: stable name.
        passed: None if it could not be judged, or did not apply.
        text: a sentence for people.
        figures: its numbers: IoUs, shares and divergences in [0, 1], seconds, bytes, counts.
    """

    check: str
    passed: bool | None
    text: str
    figures: dict[str, FiniteFloat] = {}


class Decision(_Record):
    """The verdict on a candidate; written as JSON before anything moves.

    Attributes:
        verdict: ``refuse`` if any check failed.
        candidate: its name.
        champion: its name; None without one.
        has_truth: False if figures are agreement with a teacher's labels.
        evaluation_set: digest of what the candidate was measured on.
        images: how many.
        candidate_miou: mean IoU over the classes with true pixels; None if undefined.
        champion_miou: the same.
        gain: their difference; None if they cannot be compared.
        low: lower end of its interval.
        high: upper end.
        policy: fields of the policy.
        reasons: one of each check, in order.
    """

    schema_version: int = SCHEMA_VERSION
    verdict: Literal["promote", "refuse"]
    candidate: str
    champion: str | None
    has_truth: bool
    evaluation_set: str
    images: int
    candidate_miou: FiniteFloat | None = None
    champion_miou: FiniteFloat | None = None
    gain: FiniteFloat | None = None
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    policy: dict[str, Any]
    reasons: Annotated[tuple[Reason, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _follows_from_reasons(self) -> Decision:
        if (self.verdict == "refuse") != bool(self.failed):
            raise ValueError(f"the verdict {self.verdict} does not follow from its reasons")
        return self

    @property
    def promotes(self) -> bool:
        """Whether the candidate may become the champion."""
        return self.verdict == "promote"

    @property
    def failed(self) -> tuple[Reason, ...]:
        """The checks that say no."""
        return tuple(reason for reason in self.reasons if reason.passed is False)

    def sentences(self) -> list[str]:
        """The verdict and all reasons for people, a line each; what failed comes first."""
        what = "is promoted" if self.promotes else "is refused"
        marks = {True: "passed", False: "FAILED", None: "not judged"}
        order = sorted(self.reasons, key=lambda reason: reason.passed is not False)
        return [
            f"{self.candidate} {what}.",
            *(f"{marks[reason.passed]}: {reason.text}" for reason in order),
        ]


def write_decision(storage: Storage, name: str, decision: Decision) -> None:
    """Write a decision as JSON."""
    storage.write_json(name, decision.model_dump(mode="json"))


def read_decision(storage: Storage, name: str) -> Decision | None:
    """Read a decision; None if there is no such file.

    Raises:
        MaskMillError: ``newer_version``, ``file_damaged``.
    """
    remedy = "Delete it; maskmill retrain then judges the candidate again."
    return find_record(Decision, storage, name, SCHEMA_VERSION, remedy=remedy)


def reason_about(one: Measured, check: str, passed: bool | None, text: str, **figures: float) -> Reason:
    """A reason that rests on the evaluation set, and says so if that has no truth."""
    if not one.has_truth:
        text = f"{text} There is no truth: this is agreement with the teacher's labels."
    finite = {name: float(figure) for name, figure in figures.items() if np.isfinite(figure)}
    return Reason(check=check, passed=None if passed is None else bool(passed), text=text, figures=finite)
