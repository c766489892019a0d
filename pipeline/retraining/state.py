"""A tick of a retraining: its steps, how far each is, and how they run so that a kill costs nothing.

``runs/0007/state.json`` is written before a step begins and after it ends. Whatever ends the process in
between, the same command reads it and continues: a step that is done and whose outputs are still there is not
done again, and one that was running is begun again, with what it left behind.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from models.errors import Damaged, FailedWork, MaskMillError, WrongUse
from pipeline.files.faults import explain, one_line
from pipeline.files.records import find_record, now
from pipeline.files.redaction import redact
from pipeline.files.storage import Storage

RUNS = "runs"
STATE_FILE = "state.json"
SCHEMA_VERSION = 1

Progress = Literal["pending", "running", "done", "failed"]
Outcome = Literal["promoted", "refused", "abandoned"]
_REMEDY = "Restore the file from a copy, or delete the folder of the tick: its images are then new again."


class _Record(BaseModel):
    # Fields that a later version adds do not make a file unreadable.
    model_config = ConfigDict(frozen=True, extra="ignore")


class StepState(_Record):
    """How far a step is.

    Attributes:
        name: such as ``label`` or ``train student``.
        state: what it is.
        attempts: how often it was begun.
        started, finished: of the last attempt, UTC in ISO 8601.
        seconds: that the last attempt took.
        command: that does the same alone; empty if there is none.
        inputs: digest of what it was begun with.
        outputs: what it made: facts, and digests by which that is recognised.
        error: code of what ended the last attempt.
        message: the same in words.
    """

    name: str = Field(min_length=1)
    state: Progress = "pending"
    attempts: NonNegativeInt = 0
    started: str | None = None
    finished: str | None = None
    seconds: float | None = None
    command: str = ""
    inputs: str = ""
    outputs: dict[str, Any] = {}
    error: str | None = None
    message: str = ""


class Tick(_Record):
    """``state.json``: one tick.

    Attributes:
        schema_version: of the file.
        run: its number, such as ``0007``.
        created: UTC, ISO 8601.
        finished: the same, once it has an outcome.
        outcome: None while it is unfinished.
        images: number of new images.
        mlflow_run: id of its run in MLflow; None before there is one.
        steps: in order.
    """

    schema_version: int = SCHEMA_VERSION
    run: str = Field(pattern=r"^\d{4,}$")
    created: str
    finished: str | None = None
    outcome: Outcome | None = None
    images: NonNegativeInt = 0
    mlflow_run: str | None = None
    steps: tuple[StepState, ...] = ()

    def step(self, name: str) -> StepState:
        """The state of a step; pending if it is not there."""
        return next((step for step in self.steps if step.name == name), StepState(name=name))

    def with_step(self, changed: StepState) -> Tick:
        """A copy with another state of one step."""
        steps = tuple(changed if step.name == changed.name else step for step in self.steps)
        if changed.name not in (step.name for step in steps):
            steps = (*steps, changed)
        return self.model_copy(update={"steps": steps})

    @property
    def at(self) -> StepState | None:
        """The first step that is not done; None if all are."""
        return next((step for step in self.steps if step.state != "done"), None)


def tick_folder(run: str) -> str:
    """Name of a tick's folder in the output."""
    return f"{RUNS}/{run}"


def run_names(storage: Storage) -> list[str]:
    """Numbers of the ticks in an output, oldest first."""
    found = (
        re.fullmatch(rf"{RUNS}/(\d{{4,}})/{STATE_FILE}", name)
        for name in storage.glob(f"{RUNS}/*/{STATE_FILE}")
    )
    return sorted((match[1] for match in found if match), key=int)


def read_tick(storage: Storage, run: str) -> Tick:
    """Read a tick.

    Raises:
        MaskMillError: ``file_damaged``, ``newer_version``.
    """
    name = f"{tick_folder(run)}/{STATE_FILE}"
    tick = find_record(Tick, storage, name, SCHEMA_VERSION, remedy=_REMEDY)
    if tick is None:
        raise Damaged("file_damaged", f"{storage.uri_of(name)} is missing.", _REMEDY)
    return tick


def read_ticks(storage: Storage) -> Iterator[Tick]:
    """All ticks of an output, oldest first."""
    for run in run_names(storage):
        yield read_tick(storage, run)


def write_tick(storage: Storage, tick: Tick) -> None:
    """Write a tick in one piece."""
    storage.write_json(f"{tick_folder(tick.run)}/{STATE_FILE}", tick.model_dump(mode="json"))


# --- running ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of a tick.

    Attributes:
        name: unique in the tick.
        work: does it, given whether an earlier attempt began with the same inputs, and returns facts about
            what it made as JSON values. It may be called again after a kill at any point.
        holds: given these facts, whether what it made is still there.
        needs: names of earlier steps whose outputs it reads.
        once: what it does cannot be taken back: it is never done again because of what it needs.
        command: that does the same alone.
    """

    name: str
    work: Callable[[bool], Mapping[str, Any]]
    holds: Callable[[Mapping[str, Any]], bool] = lambda _outputs: True
    needs: Sequence[str] = ()
    once: bool = False
    command: str = ""


class Runner:
    """Runs the steps of a tick.

    Args:
        storage: the output.
        tick: as it is recorded.
        fence: called before every write; raises if another run has the output now.
        began: called when a step begins.
        ended: called when it has ended, well or not.
    """

    def __init__(
        self,
        storage: Storage,
        tick: Tick,
        *,
        fence: Callable[[], None] = lambda: None,
        began: Callable[[StepState], None] = lambda _step: None,
        ended: Callable[[StepState], None] = lambda _step: None,
    ) -> None:
        self.tick = tick
        self._storage = storage
        self._fence = fence
        self._began = began
        self._ended = ended

    def outputs(self, name: str) -> dict[str, Any]:
        """What a step that is done has made."""
        return self.tick.step(name).outputs

    def write(self, **changes: Any) -> None:
        """Change the tick and write it."""
        self._fence()
        self.tick = self.tick.model_copy(update=changes)
        write_tick(self._storage, self.tick)

    def run(
        self,
        steps: Sequence[Step],
        *,
        only: str | None = None,
        around: Callable[[str], AbstractContextManager[None]] = lambda _name: nullcontext(),
    ) -> None:
        """Do what is left of the steps, in order.

        Args:
            steps: all of them.
            only: name of one step: do nothing else, and that only if it is left to do.
            around: context in which a step works, given its name.

        Raises:
            MaskMillError: ``wrong_use`` if another step comes before ``only``.
            Exception: what a step raises; it is recorded first. An interrupt leaves the step to do.
        """
        steps_now = tuple(self.tick.step(step.name) for step in steps)
        self.tick = self.tick.model_copy(update={"steps": steps_now})
        wanted = self._wanted(steps)
        if only is not None:
            first = next((step.name for step in steps if step.name in wanted), only)
            if only in wanted and first != only:
                raise WrongUse(
                    "wrong_use",
                    f"Step {first} of tick {self.tick.run} comes before step {only}, and is not done.",
                    f"Do it first: --step {shlex.quote(first)}; or all that is left, without --step.",
                )
            wanted &= {only}
        for step in steps:
            if step.name not in wanted:
                continue
            before = self.tick.step(step.name)
            self._do(step, before, around)
            if before.outputs and self.outputs(step.name) != before.outputs:
                again = {one.name for one in steps if step.name in one.needs and not one.once}
                self.reset([name for name in again if self.tick.step(name).state == "done"])
                wanted |= again if only is None else set()

    def _wanted(self, steps: Sequence[Step]) -> set[str]:
        """What is not done, and what is gone of that which it needs."""
        by_name = {step.name: step for step in steps}
        wanted: set[str] = set()

        def want(name: str) -> None:
            wanted.add(name)
            for need in by_name[name].needs:
                state = self.tick.step(need)
                if need not in wanted and not (state.state == "done" and by_name[need].holds(state.outputs)):
                    want(need)

        for step in steps:
            if self.tick.step(step.name).state != "done" and step.name not in wanted:
                want(step.name)
        return wanted

    def _do(
        self, step: Step, before: StepState, around: Callable[[str], AbstractContextManager[None]]
    ) -> None:
        inputs = _digest([self.outputs(need) for need in step.needs])
        state = before.model_copy(
            update={
                "state": "running",
                "attempts": before.attempts + 1,
                "started": now(),
                "finished": None,
                "seconds": None,
                "command": step.command,
                "inputs": inputs,
                "error": None,
                "message": "",
            }
        )
        self._record(state)
        self._began(state)
        began = time.monotonic()
        changes: dict[str, Any] = {}
        try:
            with around(step.name):
                made = dict(step.work(before.inputs == inputs))
            changes = {"state": "done", "outputs": made}
        except KeyboardInterrupt:
            changes = {"state": "pending", "message": "It was stopped; what it has finished is kept."}
            raise
        except Exception as error:
            told = explain(error) or FailedWork("internal", f"{type(error).__name__}: {one_line(error)}", "")
            changes = {
                "state": "failed",
                "error": told.code,
                "message": redact(told.message, assignments=False),
            }
            raise
        finally:
            ended = {"finished": now(), "seconds": round(time.monotonic() - began, 3)}
            state = state.model_copy(update=changes | ended)
            try:
                self._record(state)
            finally:
                self._ended(state)

    def reset(self, names: Sequence[str]) -> None:
        """Have steps done again by the next run."""
        tick = self.tick
        for name in names:
            tick = tick.with_step(tick.step(name).model_copy(update={"state": "pending"}))
        self.write(steps=tick.steps)

    def _record(self, state: StepState) -> None:
        self.write(steps=self.tick.with_step(state).steps)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def lost_output(error: Exception) -> bool:
    """Whether a run failed because another one has its output: then nothing of it may be written."""
    return isinstance(error, MaskMillError) and error.code == "output_in_use"
