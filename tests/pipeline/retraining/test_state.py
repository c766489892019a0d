"""The state machine of a tick, killed at every write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import FailedWork, MaskMillError
from pipeline.files.storage import Storage, open_storage
from pipeline.retraining.state import (
    Runner,
    Step,
    StepState,
    Tick,
    read_tick,
    read_ticks,
    run_names,
    write_tick,
)
from tests.pipeline.retraining.outputs import Killed

TICK = Tick(run="0001", created="2026-01-01T00:00:00Z")


class Clock:
    """Ends the process at its ``at``-th moment; a dead process does nothing more."""

    def __init__(self, at: int | None = None) -> None:
        self.moments = 0
        self.at = at
        self.dead = False

    def __call__(self) -> None:
        if self.dead or self.moments == self.at:
            self.dead = True
            raise Killed
        self.moments += 1


@dataclass(frozen=True)
class Dying(Storage):
    """A storage whose process may end before and after each write."""

    clock: Clock = field(default_factory=Clock)

    def write_bytes(self, name: str, data: bytes) -> None:
        self.clock()
        super().write_bytes(name, data)
        self.clock()


class World:
    """Steps that make files, count what they do, and may be ended between any two of their deeds."""

    def __init__(self, folder: Path) -> None:
        self.storage = open_storage(folder)
        self.finished: dict[str, int] = {}
        self.made: list[str] = []

    def steps(self, clock: Clock) -> list[Step]:
        storage = Dying(self.storage.uri, self.storage.fs, self.storage.root, clock)

        def make(name: str, needs: Sequence[str]) -> Callable[[bool], Mapping[str, Any]]:
            def work(_again: bool) -> Mapping[str, Any]:
                inputs = [self.storage.read_bytes(f"{need}.txt").decode() for need in needs]
                for half in ("first", "second"):
                    if not self.storage.exists(f"{name}-{half}.txt"):  # each job resumes where it was
                        storage.write_bytes(f"{name}-{half}.txt", b"")
                        self.made.append(f"{name}-{half}")
                text = f"{name}({', '.join(inputs)})"
                storage.write_bytes(f"{name}.txt", text.encode())
                self.finished[name] = self.finished.get(name, 0) + 1
                return {"text": text}

            return work

        def holds(name: str) -> Callable[[Mapping[str, Any]], bool]:
            return lambda outputs: (
                self.storage.exists(f"{name}.txt")
                and self.storage.read_bytes(f"{name}.txt").decode() == outputs["text"]
            )

        needs = {"intake": (), "label": ("intake",), "train": ("label",), "promote": ("train",)}
        return [
            Step(name=name, work=make(name, of), holds=holds(name), needs=of, once=name == "promote")
            for name, of in (*needs.items(), ("report", ("promote", "label")))
        ]

    def run(self, clock: Clock | None = None) -> Tick:
        """The command, run once."""
        clock = clock or Clock()
        names = run_names(self.storage)
        tick = read_tick(self.storage, names[-1]) if names else TICK
        storage = Dying(self.storage.uri, self.storage.fs, self.storage.root, clock)
        runner = Runner(storage, tick)
        runner.run(self.steps(clock))
        return runner.tick


def moments(folder: Path) -> int:
    clock = Clock()
    World(folder).run(clock)
    return clock.moments


def test_a_kill_at_any_write_costs_at_most_the_step_that_ran(tmp_path: Path) -> None:
    total = moments(tmp_path / "whole")
    assert total > 40
    whole = read_tick(open_storage(tmp_path / "whole"), "0001")
    for at in range(total):
        world = World(tmp_path / f"killed-{at}")
        with pytest.raises(Killed):
            world.run(Clock(at))
        done = world.run()
        assert [(step.name, step.state, step.outputs) for step in done.steps] == [
            (step.name, "done", step.outputs) for step in whole.steps
        ], at
        assert read_tick(world.storage, "0001") == done
        # Every deed is done once; a step is finished twice only if the kill came before that was written.
        assert sorted(world.made) == sorted(set(world.made)), at
        again = [name for name, count in world.finished.items() if count > 1]
        assert len(again) <= 1 and all(done.step(name).attempts == 2 for name in again), at
        assert sum(step.attempts for step in done.steps) <= len(done.steps) + 1, at


@pytest.mark.slow
@settings(max_examples=40)
@given(kills=st.lists(st.integers(0, 50), max_size=6))
def test_however_often_it_is_killed_the_end_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, kills: list[int]
) -> None:
    world = World(tmp_path_factory.mktemp("world"))
    for at in kills:
        try:
            world.run(Clock(at))
        except Killed:
            continue
    done = world.run()
    assert done.at is None
    assert done.step("report").outputs["text"] == "report(promote(train(label(intake()))), label(intake()))"
    assert sorted(world.made) == sorted(set(world.made))
    finished = dict(world.finished)
    assert world.run() == done and world.finished == finished  # and nothing is left to do


def test_what_is_gone_is_made_again_if_something_needs_it(tmp_path: Path) -> None:
    world = World(tmp_path)
    clock = Clock()
    steps = world.steps(clock)
    failing = [
        replace(step, work=raises(FailedWork("no", "no", "no"))) if step.name == "train" else step
        for step in steps
    ]
    runner = Runner(world.storage, TICK)
    with pytest.raises(FailedWork):
        runner.run(failing)
    assert (runner.tick.step("train").state, runner.tick.step("train").error) == ("failed", "no")
    world.storage.delete("intake.txt")  # nothing that is left to do reads it
    world.storage.delete("label.txt")
    world.storage.write_bytes("intake.txt", b"intake()")
    done = world.run()
    assert {name: count for name, count in world.finished.items() if count > 1} == {"label": 2}
    assert done.at is None


def test_a_step_is_done_anew_if_what_it_needs_has_changed_but_never_what_cannot_be_taken_back(
    tmp_path: Path,
) -> None:
    storage = open_storage(tmp_path)
    calls: list[tuple[str, bool]] = []
    answer = {"label": 1}

    def step(name: str, needs: tuple[str, ...], **options: Any) -> Step:
        def work(again: bool) -> dict[str, Any]:
            calls.append((name, again))
            return {"value": answer.get(name, 0)}

        return Step(name=name, work=work, needs=needs, **options)

    steps = [
        step("label", (), holds=lambda outputs: outputs["value"] == answer["label"]),
        step("train", ("label",)),
        step("promote", ("train",), once=True),
        step("report", ("label", "promote")),
    ]
    Runner(storage, TICK).run(steps)
    assert [name for name, _ in calls] == ["label", "train", "promote", "report"]
    calls.clear()
    answer["label"] = 2
    tick = read_tick(storage, "0001")
    Runner(storage, tick).run(steps)
    assert calls == []  # all is done: what has become of it since is of no concern
    undone = tick.with_step(tick.step("report").model_copy(update={"state": "pending"}))
    Runner(storage, undone).run(steps)
    assert calls == [("label", True), ("train", False), ("report", False)]


def test_one_step_alone_is_done_in_its_turn_and_leaves_what_needs_it_to_do(tmp_path: Path) -> None:
    storage, answer, calls = open_storage(tmp_path), {"label": 1}, list[str]()

    def step(name: str, *needs: str, **options: Any) -> Step:
        def work(_again: bool) -> dict[str, Any]:
            calls.append(name)
            return {"value": answer.get(name, 0)}

        return Step(name=name, work=work, needs=needs, **options)

    steps = [
        step("label", holds=lambda outputs: outputs["value"] == answer["label"]),
        step("train", "label"),
        step("report", "label", "train"),
    ]

    def alone(name: str) -> Runner:
        runner = Runner(storage, read_tick(storage, "0001"))
        runner.run(steps, only=name)
        return runner

    write_tick(storage, TICK)
    with pytest.raises(MaskMillError, match="Step label of tick 0001 comes before step train") as caught:
        alone("train")
    assert caught.value.exit_status == 2 and "--step label" in caught.value.remedy
    for name in ("label", "label", "train"):
        alone(name)
    assert calls == ["label", "train"] and (left := alone("train").tick.at) is not None
    assert left.name == "report"
    # The labels are gone: they come first, and what was trained on them is to be done again.
    answer["label"] = 2
    with pytest.raises(MaskMillError, match="Step label of tick 0001 comes before step report"):
        alone("report")
    assert alone("label").tick.step("train").state == "pending"
    Runner(storage, read_tick(storage, "0001")).run(steps)
    assert calls == ["label", "train", "label", "train", "report"]


def test_a_step_knows_whether_it_goes_on_with_the_same_inputs(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    seen: list[bool] = []

    def train(again: bool) -> dict[str, Any]:
        seen.append(again)
        if len(seen) < 3:
            raise KeyboardInterrupt
        return {}

    def steps(value: int) -> list[Step]:
        label = Step(name="label", work=lambda _: {"v": value}, holds=lambda outputs: outputs["v"] == value)
        return [label, Step(name="train", work=train, needs=("label",))]

    for value in (1, 1, 2):
        tick = read_tick(storage, "0001") if run_names(storage) else TICK
        runner = Runner(storage, tick)
        if len(seen) < 2:
            with pytest.raises(KeyboardInterrupt):
                runner.run(steps(value))
            assert runner.tick.step("train").state == "pending"
        else:
            runner.run(steps(value))
    assert seen == [False, True, False]


def raises(error: BaseException) -> Callable[[bool], Mapping[str, Any]]:
    def work(_again: bool) -> Mapping[str, Any]:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (FailedWork("disk_full", "No room at s3://key:pa55word@bucket.", "x"), "failed", "disk_full"),
        (ZeroDivisionError("by zero"), "failed", "internal"),
        (KeyboardInterrupt(), "pending", None),
    ],
)
def test_what_ends_a_step_is_recorded_without_secrets(
    tmp_path: Path, error: BaseException, state: str, code: str | None
) -> None:
    storage, told = open_storage(tmp_path), []
    runner = Runner(storage, TICK, began=told.append, ended=told.append)
    with pytest.raises(type(error)):
        runner.run([Step(name="label", work=raises(error))])
    found = read_tick(storage, "0001").step("label")
    assert (found.state, found.error, found.attempts) == (state, code, 1)
    assert found.message and found.finished and "pa55word" not in found.message
    assert [step.state for step in told] == ["running", state]


def test_nothing_is_written_once_another_run_has_the_output(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    mine = True

    def fence() -> None:
        if not mine:
            raise FailedWork("output_in_use", "It was taken over.", "Wait.")

    def work(_again: bool) -> dict[str, Any]:
        nonlocal mine
        mine = False
        return {}

    runner = Runner(storage, TICK, fence=fence)
    with pytest.raises(MaskMillError, match="taken over"):
        runner.run([Step(name="label", work=work)])
    assert read_tick(storage, "0001").step("label").state == "running"


def test_steps_can_be_done_again_on_request(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.run()
    runner = Runner(world.storage, read_tick(world.storage, "0001"))
    runner.reset(["train"])
    assert read_tick(world.storage, "0001").step("train").state == "pending"
    world.run()
    assert world.finished["train"] == 2 and world.finished["label"] == 1


def test_ticks_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    for run in ("0002", "10000", "0001", "9999"):
        write_tick(storage, TICK.model_copy(update={"run": run}))
    storage.write_bytes("runs/0003/new.parquet", b"")  # killed before its state was written
    storage.write_bytes("runs/notes/state.json", b"{}")
    assert [tick.run for tick in read_ticks(storage)] == ["0001", "0002", "9999", "10000"]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"{", "file_damaged"),
        (b"[]", "file_damaged"),
        (b'{"schema_version": 99}', "newer_version"),
        (b'{"run": "0001"}', "file_damaged"),
        (b'{"run": "1", "created": ""}', "file_damaged"),
        (b'{"run": "0001", "created": "", "steps": [{"name": "x", "state": "odd"}]}', "file_damaged"),
        (b'{"run": "0001", "created": "", "images": -1}', "file_damaged"),
    ],
)
def test_a_state_is_checked_before_it_is_believed(tmp_path: Path, text: bytes, code: str) -> None:
    storage = open_storage(tmp_path)
    storage.write_bytes("runs/0001/state.json", text)
    with pytest.raises(MaskMillError) as caught:
        read_tick(storage, "0001")
    assert caught.value.code == code and "runs/0001/state.json" in caught.value.message


@settings(max_examples=30)
@given(
    steps=st.lists(
        st.builds(
            StepState,
            name=st.text(min_size=1),
            state=st.sampled_from(["pending", "running", "done", "failed"]),
            attempts=st.integers(0, 9),
            seconds=st.none() | st.floats(0, 1e6),
            outputs=st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.booleans()),
            message=st.text(),
        ),
        max_size=4,
    ),
    outcome=st.sampled_from([None, "promoted", "refused", "abandoned"]),
)
def test_a_tick_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, steps: list[StepState], outcome: Any
) -> None:
    storage = open_storage(tmp_path_factory.mktemp("ticks"))
    tick = Tick(run="0012", created="2026-01-01T00:00:00Z", steps=tuple(steps), outcome=outcome)
    write_tick(storage, tick)
    assert read_tick(storage, "0012") == tick
