"""Processes of a labelling run are killed, stopped by signals, or killed by what they read."""

from __future__ import annotations

import functools
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from benchmarks.faults.hooks.sitecustomize import DECODE_POISON, LABEL_POISON
from benchmarks.faults.runs import Command, Unexpected, parts_of
from benchmarks.faults.world import OWN, Injected, World, grey

TARGETS = {
    "actor": ("ray::MapWorker",),
    "task": ("ray::MapBatches", "ray::Read", "ray::IDLE"),  # decode and write in the same workers
    "raylet": ("raylet",),
    "gcs": ("gcs_server",),
    "trainer": ("ray::RayTrainWorker",),
}
"""How the processes are called that may be killed, besides the driver."""
ENDS = (0, 1, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGABRT)
"""How a run may end of which a process is killed. Ray's own code aborts the driver without its head."""
MOST = 6
"""Faults in a row on one output."""


def victims(driver: psutil.Process, target: str) -> list[psutil.Process]:
    """The processes of a run that are called like this."""
    if target == "driver":
        return [driver]
    found = []
    for process in driver.children(recursive=True):
        try:
            title = " ".join(process.cmdline()[:1])
        except psutil.Error:
            continue
        if Path(title).name.startswith(TARGETS[target]):
            found.append(process)
    return found


def kill_somewhere(command: Command, output: Path, target: str, rng: random.Random) -> bool:
    """Kill one process at a random moment; returns whether there was one to kill.

    Raises:
        Hung: the run comes to no such moment.
    """
    if target in ("actor", "task") or rng.random() < 0.7:
        # Most kills fall where rows are being written, the others into the start.
        wait_for_parts(command, output, rng.randint(1, 3))
        time.sleep(rng.uniform(0, 0.5))
    else:
        time.sleep(rng.uniform(0.2, 8))
    if not command.runs:
        return False
    try:
        rng.choice(victims(command.driver, target)).kill()
    except (IndexError, psutil.NoSuchProcess):
        return False
    return True


def wait_for_parts(command: Command, output: Path, more: int) -> bool:
    """Wait until a run has written more parts; returns whether it runs on."""
    there = parts_of(output)
    command.wait_until(lambda: parts_of(output) >= there + more)
    return command.runs


def take_some_away(output: Path, rng: random.Random) -> None:
    """The table got whole before all faults were spent: lose most of its parts, as a user's mistake would."""
    parts = sorted((output / "labels").glob("*.parquet"))
    for part in rng.sample(parts, k=max(1, len(parts) * 3 // 4)):
        part.unlink()


def label_through(
    start: Callable[[], Command], output: Path, targets: Sequence[str], rng: random.Random
) -> None:
    """Label, kill the targets one by one meanwhile, and run again until all are killed and all is labelled.

    Raises:
        Hung, Unexpected: a run did not end, or not well.
    """
    left = list(targets)
    while True:
        command = start()
        while left and command.runs:
            if kill_somewhere(command, output, left[0], rng):
                del left[0]
        if command.expect(*ENDS) == 0:
            if not left:
                return
            take_some_away(output, rng)


def _killed(target: str, world: World, rng: random.Random, most: int) -> Injected:
    times = min(most, MOST)
    output = world.folder("killed")
    label_through(functools.partial(world.label, output, environment=OWN), output, [target] * times, rng)
    return Injected(times, world.judge(output))


driver, actor, task, raylet, gcs = (
    functools.partial(_killed, target) for target in ("driver", "actor", "task", "raylet", "gcs")
)


def _signalled(number: int, world: World, rng: random.Random, most: int) -> Injected:
    """A run that is asked to stop does so cleanly, and the next one goes on."""
    times, output = 0, world.folder("signalled")
    while times < min(most, MOST):
        command = world.label(output)
        if rng.random() < 0.7:
            wait_for_parts(command, output, rng.randint(1, 3))
        else:
            time.sleep(rng.uniform(2, 10))  # Python itself takes a second to come to our code
        family = command.driver.children(recursive=True) if command.runs else []
        command.send(number)
        if command.expect(130, 0) == 0:
            take_some_away(output, rng)
            continue
        times += 1
        _, alive = psutil.wait_procs(family, timeout=60)
        if alive:
            raise Unexpected(f"a run that was stopped left processes behind: {alive}")
    world.finish(output)
    return Injected(times, world.judge(output))


sigterm, ctrl_c = functools.partial(_signalled, signal.SIGTERM), functools.partial(_signalled, signal.SIGINT)


def _poison(level: int, world: World, rng: random.Random, most: int) -> Injected:
    """Images that kill the process that works on them become rows with a code, and cost no other image."""
    times = min(most, MOST)
    images = world.folder("poisoned")
    shutil.copytree(world.images, images)
    expected = world.expected(images)
    for path in rng.sample(sorted(images.glob("scene_*.png")), times):
        path.write_bytes(grey(level))
        expected[str(path)] = ("crashed_worker", None)
    output = world.folder("of-poison")
    world.finish(output, images=images)
    return Injected(times, world.judge(output, expected))


poison_decode, poison_label = (functools.partial(_poison, level) for level in (DECODE_POISON, LABEL_POISON))
